"""What the sequencer of an array and the cost model have to know of its processing elements: when weights are there."""

import dataclasses
from typing import Final

from .config import ArchConfig

TABLE_ENTRIES: Final = 8
"""Entries of a table of sums of four weights."""

TABLE_LOAD_CYCLES: Final = 12
"""Cycles from the last weight word of a tile to the write of its last table entry."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElementTiming:
    """How an array takes its weight tiles.

    Parameters
    ----------
    load_interval : int
        Least cycles from one weight word to the next one of its tile.
    load_cycles : int
        Cycles from the last word of a tile to the first pixel that may use it, counted at the ports of the array.
    fill_columns : int
        Columns whose tables are filled at once; 0 for elements without tables.
    """

    load_interval: int = 1
    load_cycles: int = 0
    fill_columns: int = 0


def element_timing(arch: ArchConfig) -> ElementTiming:
    """Of the array of a core.

    Tables of as many columns are filled at once as it takes to fill a tile in about 50 cycles: a tile of 7 x 7 pixels,
    the smallest in common networks, hides that.
    """
    if arch.element != "lutram2":
        return ElementTiming()
    with_tables = arch.columns - arch.paired_columns
    columns = min(with_tables, max(arch.post_lanes, 4 if arch.columns <= 16 else TABLE_ENTRIES))
    while with_tables % columns:
        columns //= 2
    return ElementTiming(
        load_interval=max(1, TABLE_ENTRIES // columns), load_cycles=TABLE_LOAD_CYCLES, fill_columns=columns
    )


def tile_cycles(arch: ArchConfig) -> int:
    """Cycles from the swap of a weight tile to that of the next one, at least; loading begins behind the swap."""
    timing = element_timing(arch)
    return (arch.columns - 1) * timing.load_interval + 1 + timing.load_cycles


__all__ = ["TABLE_ENTRIES", "TABLE_LOAD_CYCLES", "ElementTiming", "element_timing", "tile_cycles"]
