"""The page of measured results, ``hw/RESULTS.md``, written from the records of :mod:`.suite` and nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, Final

from .devices import get_device
from .suite import CONFIGURATIONS, Configuration, Record

_TITLE: Final = """\
# What the hardware costs, and how fast it is

Written by `nibblecore bench-synth` (`make bench-synth`) from `hw/results.json`; do not edit. Tools: {tools}.

Every figure is after placement and routing by nextpnr, the measuring harness not counted. A MAC is one product of
nibbles and its sum per cycle. Fmax is that of speed grade 6 on the ECP5, the median of all placement seeds and the best
of them. Flip-flops are counted after synthesis. The command below each table prints a row's figures; results are kept
by content. Made anew, all of them take the tools {hours:.1f} hours of one core.
"""
_ELEMENTS: Final = """\
## Processing elements

The array alone, weight loading included, in the sizes of the cores `small` (16x16) and `large` (32x32), on an ECP5-85F.
`+dsp`: half of the columns are `dsp` elements, the others what stands before it.

**Sites** are TRELLIS_COMB + 2·TRELLIS_RAMW, as others count. nextpnr 0.11 has the two sites that a cell of LUT RAM
blocks among TRELLIS_COMB already, so elements with LUT RAM occupy less than that: the column *occupied* is TRELLIS_COMB
alone.
"""
_NETWORKS: Final = """\
### On networks

What counts: **true products per second and thousand sites**, at the median Fmax. Cycles are those of the array alone
with the compiler's tiles, every layer with nibbles; padding of channels and tiles is no product. *Lost*: share of the
cycles that would not be there if weights were loaded in no time; in parentheses what of it passes between MAC
instructions. *Per tile*: cycles by which a weight tile lengthens a
pass of a full accumulator bank. *Shortest*: cycles of a pass of one pixel. The stem's share is what three input
channels on an array of 16 or 32 lanes cost; `nibblecore throughput` lists all layers.
"""
_CORES: Final = """\
## Cores

Sites are those that are occupied, LUT RAM included; shares of the device in parentheses. Targets are met unless it says
*missed*.
"""
_PARTS: Final = """\
### Parts of `small`

Each synthesized and placed alone, with registers at every port; what crosses between them is in no row.
"""
_PATHS: Final = """\
## Critical paths

Of the best seed, by our own names of nets; a step is all that Yosys made of one signal.
"""
TARGET_MACS: Final = 1024
TARGET_SITES_PER_MAC: Final = 25
TARGET_MHZ: Final = 120
TARGET_LOST: Final = 0.03

_DASH: Final = "–"
_PLAIN: Final = {"LUT4", "TRELLIS_FF"}
"""Cells that are columns of their own."""


def page(records: Mapping[str, Record], tried: str | None = None) -> str:
    """Markdown of all records.

    Parameters
    ----------
    records : Mapping[str, Record]
        As :func:`.suite.load` returns them. Cores and parts that are not there are told to be missing.
    tried : str, optional
        Markdown of the part that people write; by default ``tried.md`` of this package.
    """
    if tried is None:
        tried = resources.files(__package__).joinpath("tried.md").read_text(encoding="utf-8")
    groups = {g: [c for c in CONFIGURATIONS if c.group == g] for g in ("elements", "cores", "parts")}
    tools = {f"{tool} {version}" for r in records.values() for tool, version in r["tools"].items()}
    hours = sum(r["seconds"] or 0 for r in records.values()) / 3600
    text = [_TITLE.format(tools=", ".join(sorted(tools)) or "none yet", hours=hours)]
    for section, rows in (
        (_ELEMENTS, [*_elements(groups["elements"], records)]),
        (_NETWORKS, [*_networks(groups["elements"], records)]),
        (_CORES, [*_cores(groups["cores"], records)]),
        (_PARTS, [*_parts(groups["parts"], records)]),
        (_PATHS, [*_paths(CONFIGURATIONS, records)]),
    ):
        text += [section, "\n".join(rows) + "\n"]
    return "\n".join(text) + f"\n## What was tried\n\n{tried.strip()}\n"


def sites(record: Record) -> int:
    """LUT4 sites of an array on an ECP5, and two more for each LUT RAM cell: TRELLIS_COMB + 2·TRELLIS_RAMW."""
    lut, lutram = record["lut"], record["lutram"]
    return int(lut + 2 * lutram)


def products_per_second(record: Record, network: str) -> float:
    """True products per second on a network, at the median Fmax."""
    figures = record["throughput"]["networks"][network]
    return float(figures["macs"] / figures["cycles"] * record["fmax_median_mhz"] * 1e6)


def _table(*columns: str) -> list[str]:
    """Head of a table; columns whose name ends in ``>`` are right-aligned."""
    names = [c.rstrip(">") for c in columns]
    return [_row(*names), "|" + "|".join("---:" if c.endswith(">") else "---" for c in columns) + "|"]


def _row(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _commands(configurations: Iterable[Configuration], records: Mapping[str, Record]) -> list[str]:
    lines = [f"{records[c.name]['command']}  # {c.label}" for c in configurations if c.name in records]
    return ["", "```sh", *lines, "```"] if lines else []


def _absent(configuration: Configuration, record: Record | None) -> str | None:
    """Why there are no figures; None where there are."""
    if record is None:
        return "not measured yet"
    failed: str | None = record.get("failed")
    return None if failed is None else " ".join(failed.split())


def _mhz(record: Record) -> str:
    seeds = record["seeds"]
    return f"{record['fmax_median_mhz']:.1f} / {record['fmax_mhz']:.1f} ({seeds} seed{'s' if seeds > 1 else ''})"


def _elements(configurations: Sequence[Configuration], records: Mapping[str, Record]) -> Iterable[str]:
    yield from _table("element", "primitives beside LUT4 and flip-flops", "sites>", "sites per MAC>",
                      "occupied per MAC>", "FF per MAC>", "Fmax in MHz, median / best>")  # fmt: skip
    for c in configurations:
        if (record := records.get(c.name)) is None:
            continue
        if (why := _absent(c, record)) is not None:
            yield _row(c.label, why, *(_DASH,) * 5)
            continue
        macs = c.config().macs_per_cycle
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in record["cells"].items() if kind not in _PLAIN) or "none"
        yield _row(c.label, kinds, f"{sites(record):,}", f"{record['sites_per_mac']:.1f}",
                   f"{record['lut'] / macs:.1f}", f"{record['ff'] / macs:.1f}", _mhz(record))  # fmt: skip
    yield from _commands(configurations, records)


def _networks(configurations: Sequence[Configuration], records: Mapping[str, Record]) -> Iterable[str]:
    found = [(c, records[c.name]) for c in configurations if c.name in records and "failed" not in records[c.name]]
    names = list(found[0][1]["throughput"]["networks"]) if found else []
    heads = [f"{n}: {what}>" for n in names for what in ("lost", "GMAC/s", "GMAC/s per thousand sites")]
    yield from _table("element", "per tile>", "shortest>", *heads)
    best = {
        (name, c.arch): max(products_per_second(r, name) / sites(r) for d, r in found if d.arch == c.arch)
        for name in names
        for c, _ in found
    }
    for c, record in found:
        cells = []
        for name in names:
            figures = record["throughput"]["networks"][name]
            speed = products_per_second(record, name)
            density = f"{speed / 1e6 / sites(record):.2f}"
            bold = speed / sites(record) == best[name, c.arch]
            cells += [
                f"{figures['lost_cycles'] / figures['cycles']:.2%} ({figures['gap_cycles'] / figures['cycles']:.2%})",
                f"{speed / 1e9:.1f}",
                f"**{density}**" if bold else density,
            ]
        throughput = record["throughput"]
        yield _row(c.label, str(throughput["lost_per_tile"]), str(throughput["shortest_pass"]), *cells)
    for arch in dict.fromkeys(c.arch for c, _ in found):
        record = next(r for c, r in found if c.arch == arch)
        shares = (
            f"{v['first_layer_cycles'] / v['cycles']:.0%} of {name}"
            for name, v in record["throughput"]["networks"].items()
        )
        yield f"\nThe stem's share of the cycles on the array of `{arch}`: {', '.join(shares)}."
    large = [(c, r) for c, r in found if c.config().macs_per_cycle == TARGET_MACS]
    if large:
        met = [c.label for c, r in large if _meets_targets(r)]
        yield (
            f"\nThe target at {TARGET_MACS} MAC/cycle, at most {TARGET_SITES_PER_MAC} sites per MAC, at least "
            f"{TARGET_MHZ} MHz and at most {TARGET_LOST:.0%} of the cycles lost: {_met_by(met)}."
        )
    if found:
        yield f"\nWith `-n {names[0]}`, and so for the other:" if len(names) > 1 else ""
        yield "\n```sh"
        for c, record in found:
            words = c.command(1).split(" -d ")[0].replace("nibblecore synth", "nibblecore throughput")
            yield f"{words} -n {names[0]} --freq {record['fmax_median_mhz']:g}  # {c.label}"
        yield "```"


def _meets_targets(record: Record) -> bool:
    lost = [v["lost_cycles"] / v["cycles"] for v in record["throughput"]["networks"].values()]
    return bool(
        record["sites_per_mac"] <= TARGET_SITES_PER_MAC
        and record["fmax_median_mhz"] >= TARGET_MHZ
        and max(lost) <= TARGET_LOST
    )


def _met_by(labels: Sequence[str]) -> str:
    return f"met by {' and '.join(labels)}" if labels else "*missed* by all"


def _cores(configurations: Sequence[Configuration], records: Mapping[str, Record]) -> Iterable[str]:
    yield from _table("core", "MAC/cycle>", "sites>", "FF>", "LUT RAM>", "block RAM>", "single-port RAM>",
                      "multipliers>", "Fmax in MHz, median / best>", "GOPS, peak>", "targets")  # fmt: skip
    for c in configurations:
        record = records.get(c.name)
        macs = c.config().macs_per_cycle
        if (why := _absent(c, record)) is not None:
            yield _row(c.label, str(macs), *(_DASH,) * 8, why)
            continue
        assert record is not None
        device = get_device(c.device)
        used = {"sites": record["lut"], **{k: record[k] for k in ("ff", "lutram", "bram", "spram", "dsp")}}
        shares = [_share(n, device.lut if name == "sites" else getattr(device, name)) for name, n in used.items()]
        peak = 2 * macs * record["fmax_median_mhz"] / 1e3
        yield _row(c.label, str(macs), *shares, _mhz(record), f"{peak:.1f}", _targets(c, record))
    yield from _commands(configurations, records)


def _share(used: int, there: int) -> str:
    return f"{used:,} ({used / there:.0%})" if there else f"{used:,}" if used else _DASH


def _targets(c: Configuration, record: Record) -> str:
    device = get_device(c.device)
    found = []
    for name, target in c.targets.items():
        if name == "fmax_mhz":
            text, met = f"≥ {target:g} MHz", record["fmax_median_mhz"] >= target
        elif name == "lut":
            text, met = f"≤ {target:.0%} of the sites", record["lut"] <= target * device.lut
        else:
            text, met = f"≤ {target:.0%} of the block RAM", record[name] <= target * getattr(device, name)
        found.append(text if met else f"{text} *missed*")
    return ", ".join(found) or "fits"


def _parts(configurations: Sequence[Configuration], records: Mapping[str, Record]) -> Iterable[str]:
    yield from _table("part", "sites>", "FF>", "LUT RAM>", "block RAM>", "multipliers>", "Fmax in MHz>")
    for c in configurations:
        record = records.get(c.name)
        if (why := _absent(c, record)) is not None:
            yield _row(f"{c.part}: {why}", *(_DASH,) * 6)
            continue
        assert record is not None
        figures = [record[k] for k in ("lut", "ff", "lutram", "bram", "dsp")]
        yield _row(c.part, *(f"{n:,}" for n in figures), f"{record['fmax_mhz']:.1f}")
    yield from _commands(configurations, records)


def _paths(configurations: Iterable[Configuration], records: Mapping[str, Record]) -> Iterable[str]:
    for c in configurations:
        record: Mapping[str, Any] = records.get(c.name, {})
        if record.get("critical_path"):
            yield from (f"### {c.label}, {record['fmax_mhz']:.1f} MHz", "")
            yield from ("```text", *record["critical_path"], "```", "")
    if not any(record.get("critical_path") for record in records.values()):
        yield "None is known yet."


__all__ = ["page", "products_per_second", "sites"]
