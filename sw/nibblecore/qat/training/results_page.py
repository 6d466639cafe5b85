"""The page that compares training methods, written from the records of :mod:`.results`."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...errors import NibbleError
from ...files import write_atomically
from ..recipes import digits
from .results import FLOAT_EPOCHS, METHOD_RECIPES, QAT_EPOCHS


@dataclasses.dataclass(frozen=True)
class Published:
    """An ordering of the literature: ``better`` above ``worse`` at ``bits``, with the numbers that say so.

    Only what was read in a primary (V1) or secondary (V2) source; see the page for which.
    """

    better: str
    worse: str
    bits: int
    numbers: str
    source: str


_OSCILLATIONS: Final = """\
Fake quantization, and the share of weights that still oscillate at the end: their code changes against the direction of
its last change, in more than 0.5 % of steps.
"""
_BESIDE: Final = """\
## Beside what was published

Differences are paired by seed, in percentage points, with their 95 % interval (Student's t): an ordering is reproduced
or reversed where the interval does not hold 0, and not told apart where it does. The published numbers belong to other
networks and data and are context, not a target; given are only numbers that were read in the publication itself or in
one that quotes it. For TQT, IAO, FQN and DoReFa there are none that compare with LSQ in one setting.
"""
_NAGEL: Final = "Nagel et al. 2022, table 6: MobileNetV2, ImageNet, top-1"
_HAN: Final = "Han et al. 2021, as quoted there"
_GUPTA: Final = "Gupta and Asthana 2024, table 2: YOLOv5-n, COCO, mAP"
PUBLISHED: Final = (
    Published("bin-regularization", "lsq", 4, "70.4 over 69.5", _HAN.replace("there", f"by {_NAGEL}")),
    Published("bin-regularization", "lsq", 3, "67.4 over 65.3", _HAN.replace("there", f"by {_NAGEL}")),
    Published("bin-regularization", "lsq", 2, "+3.9", "abstract of Han et al. 2021 (secondary): MobileNetV2, ImageNet"),
    Published("dampening", "lsq", 4, "70.5 over 69.5", _NAGEL),
    Published("dampening", "lsq", 3, "67.8 over 65.3", _NAGEL),
    Published("freezing", "lsq", 4, "70.6 over 69.5", _NAGEL),
    Published("freezing", "lsq", 3, "67.6 over 65.3", _NAGEL),
    Published("lsq", "pact", 4, "69.5 over 61.4", _NAGEL),
    Published("ema", "lsq", 4, "22.1 over 20.6", _GUPTA),
    Published("ema", "lsq", 3, "16.4 over 15.2", _GUPTA),
    Published("ema-qc", "ema", 4, "23.8 over 22.1", _GUPTA),
    Published("ema-qc", "ema", 3, "18.2 over 16.4", _GUPTA),
    Published("lsq+", "lsq", 4, "+1.8", "abstract of Bhalgat et al. 2020 (secondary): EfficientNet-B0, ImageNet"),
    Published("lsq+", "lsq", 2, "+5.6 at most", "abstract of Bhalgat et al. 2020 (secondary), ImageNet"),
)
"""Orderings whose numbers were read, not remembered."""
PUBLISHED_OSCILLATIONS: Final = (
    ("dampening", 3, "4.93 % to 1.11 %"),
    ("freezing", 3, "4.93 % to 0.04 %"),
)
"""Nagel et al. 2022, tables 4 and 5: MobileNetV2, weights of 3 bits."""
_T95: Final = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Student's t, two-sided 95 %, for 1, 2, .. degrees of freedom."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two methods over the same seeds, in percentage points: mean and half of its 95 % interval."""

    mean: float
    half: float
    count: int

    @property
    def verdict(self) -> str:
        """ "reproduced", "reversed", or "not told apart": 0 lies in the interval."""
        if abs(self.mean) <= self.half:
            return "not told apart"
        return "reproduced" if self.mean > 0 else "reversed"


class Table:
    """Records by method, width and seed."""

    def __init__(self, cells: Iterable[Mapping[str, Any]]) -> None:
        self.cells = list(cells)
        self.by_place = {(c["method"], c["bits"], c["seed"]): c for c in self.cells}
        self.bits = list(dict.fromkeys(c["bits"] for c in self.cells if c["bits"]))
        self.methods = [m for m in METHOD_RECIPES if any(c["method"] == m for c in self.cells)]
        self.seeds = sorted({c["seed"] for c in self.cells})

    def values(self, method: str, bits: int, key: str) -> dict[int, float]:
        """By seed; without trainings that stopped and values that there are not."""
        found = {s: self.by_place.get((method, bits, s), {}).get(key) for s in self.seeds}
        return {s: float(v) for s, v in found.items() if v is not None}

    def accuracy(self, method: str, bits: int) -> dict[int, float]:
        """Of the integers; of fake quantization where the core cannot have them."""
        return self.values(method, bits, "integer") or self.values(method, bits, "fake")

    def difference(self, better: str, worse: str, bits: int) -> Difference | None:
        """Paired by seed; None with fewer than two pairs."""
        a, b = self.accuracy(better, bits), self.accuracy(worse, bits)
        pairs = [100 * (a[s] - b[s]) for s in self.seeds if s in a and s in b]
        if len(pairs) < 2:
            return None
        error = statistics.stdev(pairs) / math.sqrt(len(pairs))
        return Difference(statistics.mean(pairs), _T95[min(len(pairs) - 1, len(_T95)) - 1] * error, len(pairs))


def _spread(values: Mapping[int, float]) -> str:
    if not values:
        return "–"
    numbers = [100 * v for v in values.values()]
    return f"{statistics.mean(numbers):.2f} ± {statistics.stdev(numbers) if len(numbers) > 1 else 0:.2f}"


def _name(method: str) -> str:
    return METHOD_RECIPES[method][1]


def write_page(cells: Sequence[Mapping[str, Any]], path: Path, *, seeds: int, settings: tuple[str, ...] = ()) -> None:
    """Write the page from records of :func:`run_table`."""
    write_atomically(path, page(Table(cells), seeds=seeds, settings=settings).encode())


def page(table: Table, *, seeds: int, settings: tuple[str, ...] = ()) -> str:
    """The page as Markdown."""
    if not table.bits:
        raise NibbleError("There are no results to write a page from.")
    floats = table.values("float", 0, "fake")
    options = "".join(f" --set {s}" for s in settings) + ("" if seeds == 5 else f" --seeds {seeds}")
    images = digits.NOISY_COPIES * digits.TEST_IMAGES
    text = f"""# Training methods compared

Written by `nibblecore results{options}` (`make results`); do not edit. Accuracy is that of the **integers** which the
core gets, on {images} test images, in percent: mean ± standard deviation over seeds {table.seeds[0]} to
{table.seeds[-1]}. Float, from which all trainings of a seed start: **{_spread(floats)}**.
"""
    return "\n".join([text, *_tables(table), *_orderings(table), _conditions(table)])


def _tables(table: Table) -> list[str]:
    lines = ["| method | " + " | ".join(f"{b} bits" for b in table.bits) + " |", "|---|" + "---|" * len(table.bits)]
    best = {
        b: max((statistics.mean(v.values()) for m in table.methods if (v := table.values(m, b, "integer"))), default=0)
        for b in table.bits
    }
    notes: dict[str, str] = {}
    for method in table.methods:
        row = []
        for bits in table.bits:
            values = table.values(method, bits, "integer")
            text = _spread(values)
            if values and statistics.mean(values.values()) == best[bits]:
                text = f"**{text}**"
            stopped = [c for c in table.cells if (c["method"], c["bits"]) == (method, bits) and "error" in c]
            if stopped:
                text += f" ({len(stopped)} of {len(table.seeds)} stopped)"
                notes[f"{_name(method)}, {bits} bits, stopped"] = str(stopped[0]["error"])
            refusal = next(
                (c["refusal"] for c in table.cells if (c["method"], c["bits"]) == (method, bits) and c.get("refusal")),
                None,
            )
            if refusal is not None:
                notes[f"{_name(method)}, {bits} bits, has no integers"] = str(refusal)
            row.append(text)
        lines.append(f"| {_name(method)} | " + " | ".join(row) + " |")
    lines += ["", *(f"- {what}: {why}" for what, why in notes.items()), *([""] if notes else [])]
    lines += [
        _OSCILLATIONS,
        "| method | " + " | ".join(f"{b} bits, fake-quantized | oscillating, % " for b in table.bits) + "|",
        "|---|" + "---|---|" * len(table.bits),
    ]
    for method in table.methods:
        row = []
        for bits in table.bits:
            trained = method != "ptq"
            row += [_spread(table.values(method, bits, "fake"))]
            row += [_spread(table.values(method, bits, "oscillation")) if trained else "–"]
        lines.append(f"| {_name(method)} | " + " | ".join(row) + " |")
    return [*lines, ""]


def _orderings(table: Table) -> list[str]:
    lines = [_BESIDE, "| ordering | bits | published | here | |", "|---|---|---|---|---|"]
    verdicts: dict[str, list[str]] = {"reproduced": [], "not told apart": [], "reversed": []}
    for claim in PUBLISHED:
        found = table.difference(claim.better, claim.worse, claim.bits) if claim.bits in table.bits else None
        if found is None:
            continue
        title = f"{_name(claim.better)} > {_name(claim.worse)}"
        verdicts[found.verdict].append(f"{title} at {claim.bits} bits ({found.mean:+.2f} ± {found.half:.2f})")
        here = f"{found.mean:+.2f} ± {found.half:.2f}"
        lines.append(f"| {title} | {claim.bits} | {claim.numbers} ({claim.source}) | {here} | {found.verdict} |")
    lines += ["", *_text(table, verdicts)]
    return lines


def _text(table: Table, verdicts: Mapping[str, Sequence[str]]) -> list[str]:
    """What the numbers say, in words."""
    count = sum(map(len, verdicts.values()))
    lines = [f"Of {count} published orderings, {len(verdicts['reproduced'])} reproduced here."]
    for verdict, text in (
        ("reproduced", "Reproduced"),
        ("not told apart", "Did not reproduce, because the difference is within the spread of the seeds"),
        ("reversed", "Did not reproduce: here it is the other way round"),
    ):
        if verdicts[verdict]:
            lines.append(f"{text}: {'; '.join(verdicts[verdict])}.")
    for method, bits, numbers in PUBLISHED_OSCILLATIONS:
        own, base = table.values(method, bits, "oscillation"), table.values("lsq", bits, "oscillation")
        if own and base:
            a, b = (100 * statistics.mean(v.values()) for v in (base, own))
            word = "does so here too" if b < a else "does not here"
            lines.append(
                f"{_name(method)} is published to lower the oscillating weights of {bits} bits from {numbers}; "
                f"it {word}: {a:.2f} % to {b:.2f} %."
            )
    for bits in table.bits:
        if (d := table.difference("lsq", "ptq", bits)) is not None:
            lines.append(
                f"Training is worth {d.mean:+.2f} ± {d.half:.2f} points over calibration alone at {bits} bits."
            )
    widths = sorted(table.bits, reverse=True)
    means = [statistics.mean(v.values()) for b in widths if (v := table.accuracy("lsq", b))]
    if len(means) == len(widths) > 1:
        falls = all(x >= y for x, y in itertools.pairwise(means))
        lines.append(
            f"LSQ {'falls with each bit less' if falls else 'does not fall with each bit less'}: "
            f"{', '.join(f'{100 * m:.2f} at {b}' for m, b in zip(means, widths, strict=True))} bits; so it does where "
            "it was published (VGG-small on CIFAR-10, 94.26, 93.89, 93.42 at 4, 3, 2 bits in the repository "
            "hustzxd/LSQuantization)."
        )
    return ["\n".join(f"- {line}" for line in lines), ""]


def _conditions(table: Table) -> str:
    steps = sum(c.get("steps", 0) for c in table.cells)
    seconds = sum(c.get("seconds", 0.0) for c in table.cells)
    return f"""## Conditions

- Task: scikit-learn's digits, 8x8 pixels. On the clean images the demo's network is right on 99 % with 4 bits, and
  methods cannot differ. So the test images are {digits.NOISY_COPIES} copies of each of {digits.TEST_IMAGES}, moved by
  up to a pixel, with normal noise of standard deviation {digits.NOISE} (black is 1), always the same ones; training
  images are moved and get noise anew each time they are seen. The network is ResNet-8 with a quarter of its channels, 5
  thousand parameters, because few bits cost a network nothing that has more than it needs.
- Bits hold for weights, activations and the ends; the network's input has at least 4, sums go to the host as they are,
  operands of sums have 8 but in FQN and the hardware-friendly setting, where they have the same. The published numbers
  have ends of 8 bits.
- Training: {FLOAT_EPOCHS} epochs float, then {QAT_EPOCHS} quantized from the same float network, SGD, a cosine from
  0.01 for weights and steps, the last epoch's model. Everything else is what the recipes say (`nibblecore recipes`),
  the same for all widths; test images choose nothing.
- LSQ and what builds on it have a step per layer and unfolded batch norm, as in the papers; TQT, IAO and FQN fold it,
  as in theirs.
- Cost: {len(table.cells)} trainings, {steps:,} steps of 64 images, {seconds / 60:.0f} CPU minutes, one thread each.
"""
