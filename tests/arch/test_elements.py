"""When the weights of a tile are there: what the sequencer and the cost model share."""

import pytest

from nibblecore.arch.config import ELEMENT_WEIGHT_RANGE, get_arch
from nibblecore.arch.elements import TABLE_BANKS, ElementTiming, element_timing, swap_cycles, tile_cycles


@pytest.mark.parametrize("element", [kind for kind in ELEMENT_WEIGHT_RANGE if kind not in TABLE_BANKS])
def test_a_word_per_cycle(element: str) -> None:
    arch = get_arch("small").replace(element=element)
    assert element_timing(arch) == ElementTiming(load_interval=1, load_cycles=0, fill_columns=0, table_banks=0)
    assert tile_cycles(arch) == swap_cycles(arch, 1000) == 16


@pytest.mark.parametrize(
    ("name", "interval", "fill_columns", "cycles"), [("small", 2, 4, 43), ("large", 1, 8, 44), ("xlarge", 1, 8, 76)]
)
def test_tables(name: str, interval: int, fill_columns: int, cycles: int) -> None:
    """A tile of 7 x 7 pixels hides the fill of ``small`` and ``large``."""
    arch = get_arch(name).replace(element="lutram2")
    assert element_timing(arch) == ElementTiming(
        load_interval=interval, load_cycles=12, fill_columns=fill_columns, table_banks=2
    )
    assert tile_cycles(arch) == swap_cycles(arch, 1000) == cycles


@pytest.mark.parametrize(
    ("name", "interval", "fill_columns", "cycles", "waiting"),
    [("small", 4, 4, 81, 68), ("large", 2, 8, 83, 68), ("xlarge", 2, 8, 147, 132)],
)
def test_one_table_waits_for_the_last_pixel(
    name: str, interval: int, fill_columns: int, cycles: int, waiting: int
) -> None:
    arch = get_arch(name).replace(element="lutram")
    assert element_timing(arch) == ElementTiming(
        load_interval=interval, load_cycles=20, fill_columns=fill_columns, table_banks=1, overlaps=False
    )
    assert tile_cycles(arch) == cycles
    assert swap_cycles(arch, 1) == cycles
    assert swap_cycles(arch, 100) == 100 + waiting


@pytest.mark.parametrize(
    ("changes", "fill_columns"),
    [
        ({"columns": 4, "post_lanes": 2}, 4),
        ({"columns": 16, "post_lanes": 16}, 16),
        ({"columns": 32, "post_lanes": 2, "dsp_columns": 4}, 4),
        ({"columns": 32, "post_lanes": 2, "dsp_columns": 8}, 8),
    ],
)
def test_blocks_are_of_whole_groups_and_fill_the_columns(changes: dict[str, int], fill_columns: int) -> None:
    arch = get_arch("small").replace(element="lutram2", **changes)
    assert element_timing(arch).fill_columns == fill_columns
    assert fill_columns % arch.post_lanes == 0
    assert (arch.columns - arch.dsp_columns) % fill_columns == 0
