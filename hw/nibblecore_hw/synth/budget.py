"""Budgets: what parts of the core may cost, so that no change makes them larger or slower unseen.

Two kinds: *area* as Yosys counts it, the same on every machine and checked by the tests, and *routed*, sites and clock
after placement and routing, checked where ``nibblecore bench-synth`` measures them.

``python -m nibblecore_hw.synth.budget FILE RECORDS`` measures all areas, takes what is routed from the records of
:mod:`.suite`, and writes the file anew.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nibblecore.arch.config import ELEMENT_WEIGHT_RANGE, get_arch
from nibblecore.files import write_atomically

from ..parts import build_part
from .devices import get_device
from .run import count
from .suite import load

SLACK: Final = 0.03
"""Share by which a figure may be worse than its budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A part of a core on a device, of which cells are counted."""

    arch: str
    part: str
    device: str = "ecp5-25k"
    element: str | None = None

    def component(self) -> Any:
        config = get_arch(self.arch)
        config = config if self.element is None else config.replace(element=self.element)
        return build_part(self.part, config, technology=get_device(self.device).technology)


ITEMS: Final = {
    **{f"small/array/{e}": Item(arch="small", part="array", element=e) for e in ELEMENT_WEIGHT_RANGE},
    "small/requantizer": Item(arch="small", part="requantizer"),
    "small/core": Item(arch="small", part="core"),
    "tiny/core": Item(arch="tiny", part="core", device="up5k"),
}

_FIGURES: Final = ("lut", "ff", "lutram", "bram", "dsp")

_CELLS: Final[dict[str, dict[str, dict[str, int]]]] = {
    "ecp5": {
        "lut": {"LUT4": 1, "CCU2C": 2},
        "ff": {"TRELLIS_FF": 1},
        "lutram": {"TRELLIS_DPR16X4": 1},
        "bram": {"DP16KD": 1},
        "dsp": {"MULT18X18D": 1},
    },
    # Carries are beside the LUT of their cell. Block RAM of both kinds.
    "ice40": {
        "lut": {"SB_LUT4": 1},
        "ff": {"SB_DFF": 1},
        "lutram": {},
        "bram": {"SB_RAM40_4K": 1, "SB_SPRAM256KA": 1},
        "dsp": {"SB_MAC16": 1},
    },
}
"""What Yosys' cells count for in each figure. A carry cell takes two LUT4 sites, before placement adds its share."""


def figures(cells: Mapping[str, int], family: str) -> dict[str, int]:
    """``lut``, ``ff``, ``lutram``, ``bram`` and ``dsp`` of cells by type."""
    found = dict.fromkeys(_FIGURES, 0)
    for name, kinds in _CELLS[family].items():
        for kind, n in cells.items():
            # iCE40 flip-flops have their options in their names.
            kind = "SB_DFF" if kind.startswith("SB_DFF") else kind
            found[name] += kinds.get(kind, 0) * n
    return found


def area(component: Any, device: str) -> dict[str, int]:
    """:func:`figures` of a component on a device."""
    fpga = get_device(device)
    return figures(count(component, fpga), fpga.family)


def measure(item: str) -> dict[str, int]:
    """:func:`area` of one of :data:`ITEMS`."""
    return area(ITEMS[item].component(), ITEMS[item].device)


def excess(item: str, budget: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """A sentence for each figure that exceeds its budget by more than :data:`SLACK`."""
    return [
        _sentence(item, name, f"{budget[name]:,}", f"{now[name]:,}", (now[name] - budget[name]) / max(1, budget[name]))
        for name in _FIGURES
        if now[name] > budget[name] * (1 + SLACK)
    ]


def _sentence(item: str, name: str, before: str, now: str, change: float) -> str:
    return f"{item}: {name} was {before} and is {now} ({change:+.1%}; {SLACK:.0%} are allowed)"


# --- routed ---------------------------------------------------------------------------------------------------------


def routed(record: Mapping[str, Any]) -> dict[str, float]:
    """The budget that a record of :mod:`.suite` with figures gives: sites, median Fmax, and of how many seeds."""
    return {
        "sites": record["lut"] + 2 * record["lutram"],
        "fmax_median_mhz": record["fmax_median_mhz"],
        "seeds": record["seeds"],
    }


def routed_excess(item: str, budget: Mapping[str, float], record: Mapping[str, Any]) -> list[str]:
    """A sentence for more sites, or a lower clock, than :data:`SLACK` allows.

    Clocks are compared only between equal numbers of seeds: a median of fewer is another figure.
    """
    if "failed" in record:
        text = " ".join(record["failed"].split())
        return [f"{item}: it had {budget['sites']:,} sites at {budget['fmax_median_mhz']:.1f} MHz, and now: {text}"]
    now, found = routed(record), []
    if now["sites"] > budget["sites"] * (1 + SLACK):
        change = now["sites"] / budget["sites"] - 1
        found.append(_sentence(item, "sites", f"{budget['sites']:,}", f"{now['sites']:,}", change))
    mhz, floor = now["fmax_median_mhz"], budget["fmax_median_mhz"]
    if now["seeds"] == budget["seeds"] and mhz < floor * (1 - SLACK):
        found.append(_sentence(item, "fmax_median_mhz", f"{floor:.1f}", f"{mhz:.1f}", mhz / floor - 1))
    return found


def load_budgets(path: Path) -> dict[str, dict[str, Any]]:
    """``area`` and ``routed``, each a budget by item."""
    budgets: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return budgets


def main(path: Path, records: Path) -> None:
    """Measure areas, take what is routed from ``records``, and write ``path``."""
    budgets: dict[str, dict[str, Any]] = {"area": {}, "routed": {}}
    for item in ITEMS:
        budgets["area"][item] = measure(item)
        print(item, *(f"{name} {value:,}" for name, value in budgets["area"][item].items()), sep="  ")
    budgets["routed"] = {name: routed(record) for name, record in load(records).items() if "failed" not in record}
    write_atomically(path, (json.dumps(budgets, indent=2) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
