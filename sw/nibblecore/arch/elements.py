"""What the sequencer of an array and the cost model have to know of its processing elements: when weights are there."""

import dataclasses
from typing import Final

from .config import ArchConfig

TABLE_DEPTH: Final = 16
"""Sums of weights that a LUT RAM holds."""

TABLE_BANKS: Final = {"lutram": 1, "lutram2": 2}
"""Elements with tables of sums of weights: how many tables, each for a weight tile, share a LUT RAM.

With two, one is filled while the other one is in use; with one, the array waits.
"""


def table_entries(banks: int) -> int:
    """Sums in one table."""
    return TABLE_DEPTH // banks


def table_load_cycles(banks: int) -> int:
    """Cycles from the last weight word of a tile to the write of its last table entry; the first takes 5."""
    return 4 + table_entries(banks)


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
    table_banks : int
        Tables that share a LUT RAM; 0 for elements without tables.
    overlaps : bool
        Whether a tile is loaded while the one before is in use. If not, only the first ``fill_columns - 1`` words may
        come meanwhile.
    """

    load_interval: int = 1
    load_cycles: int = 0
    fill_columns: int = 0
    table_banks: int = 0
    overlaps: bool = True


def element_timing(arch: ArchConfig) -> ElementTiming:
    """Of the array of a core.

    Tables of as many columns are filled at once as it takes to fill a tile of eight entries each in about 50 cycles: a
    tile of 7 x 7 pixels, the smallest in common networks, hides that where there are two banks.
    """
    banks = TABLE_BANKS.get(arch.element)
    if banks is None:
        return ElementTiming()
    with_tables = arch.columns - arch.paired_columns
    columns = min(with_tables, max(arch.post_lanes, 4 if arch.columns <= 16 else 8))
    while with_tables % columns:
        columns //= 2
    return ElementTiming(
        load_interval=max(1, table_entries(banks) // columns),
        load_cycles=table_load_cycles(banks),
        fill_columns=columns,
        table_banks=banks,
        overlaps=banks > 1,
    )


def tile_cycles(arch: ArchConfig) -> int:
    """Cycles from the first weight word of a tile to the first pixel that may use it, and one more.

    That is, from the swap of a weight tile to that of the next one, at least; loading begins behind the swap.
    """
    timing = element_timing(arch)
    return (arch.columns - 1) * timing.load_interval + 1 + timing.load_cycles


def swap_cycles(arch: ArchConfig, pixels: int) -> int:
    """The same for a tile that ``pixels`` activation words, one per cycle, use: what the next tile's loading allows.

    Where loading overlaps, pixels make no difference. Where it does not, the words that wait for the last pixel are
    those from the last one of the first ``fill_columns`` on.
    """
    timing = element_timing(arch)
    if timing.overlaps:
        return tile_cycles(arch)
    waiting = (arch.columns - timing.fill_columns) * timing.load_interval + timing.load_cycles
    return max(tile_cycles(arch), pixels + waiting)


__all__ = [
    "TABLE_BANKS",
    "TABLE_DEPTH",
    "ElementTiming",
    "element_timing",
    "swap_cycles",
    "table_entries",
    "table_load_cycles",
    "tile_cycles",
]
