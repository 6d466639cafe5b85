"""Area budgets: what parts of the core may cost by Yosys' count, so that no change makes them grow unseen.

``python -m nibblecore_hw.synth.budget FILE`` measures all and writes the file anew.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nibblecore.arch.config import get_arch
from nibblecore.files import write_atomically

from ..parts import build_part
from .devices import get_device
from .run import count

SLACK: Final = 0.03
"""Share by which a figure may exceed its budget."""

ITEMS: Final = ("small/array", "small/requantizer", "small/core")
"""Core and part of each budget."""

DEVICE: Final = "ecp5-25k"

_CELLS: Final = {
    "lut": {"LUT4": 1, "CCU2C": 2},
    "ff": {"TRELLIS_FF": 1},
    "lutram": {"TRELLIS_DPR16X4": 1},
    "bram": {"DP16KD": 1},
    "dsp": {"MULT18X18D": 1},
}
"""What Yosys' cells count for in each figure. A carry cell takes two LUT4 sites, before placement adds its share."""


def measure(item: str) -> dict[str, int]:
    """``lut``, ``ff``, ``lutram``, ``bram`` and ``dsp`` of one of :data:`ITEMS`."""
    arch, _, part = item.partition("/")
    device = get_device(DEVICE)
    cells = count(build_part(part, get_arch(arch), technology=device.technology), device)
    return {name: sum(cells.get(kind, 0) * n for kind, n in kinds.items()) for name, kinds in _CELLS.items()}


def excess(item: str, budget: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """A sentence for each figure that exceeds its budget by more than :data:`SLACK`."""
    return [
        f"{item}: {name} was {budget[name]:,} and is {now[name]:,} "
        f"({(now[name] - budget[name]) / max(1, budget[name]):+.1%}; {SLACK:.0%} are allowed)"
        for name in _CELLS
        if now[name] > budget[name] * (1 + SLACK)
    ]


def main(path: Path) -> None:
    """Measure everything and write ``path``."""
    budgets = {}
    for item in ITEMS:
        budgets[item] = measure(item)
        print(item, *(f"{name} {value:,}" for name, value in budgets[item].items()), sep="  ")
    write_atomically(path, (json.dumps(budgets, indent=2) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
