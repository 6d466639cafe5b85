# amaranth: UnusedElaboratable=no
"""Closed forms of the cost model against those that the hardware states for itself."""

from typing import Any

import pytest

from nibblecore.arch.config import get_arch
from nibblecore.arch.isa import Opcode, make
from nibblecore.compiler.cost import timing
from nibblecore_hw.core.mac import MacEngine


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize(
    "changes", [{}, {"element": "dsp"}, {"dsp_columns": 8}, {"adder_levels": 2}], ids=["plain", "dsp", "mix", "levels"]
)
def test_cycles_of_one_instruction(name: str, changes: dict[str, Any]) -> None:
    """Any tile: shorter than the load of its weights, and longer by an even and by an odd number of pixels."""
    arch = get_arch(name).replace(**changes)
    engine = MacEngine(arch)
    for rows, cols, bricks in ((1, 1, 1), (3, 5, 2), (7, 9, 4), (8, 8, 4), (1, 511, 1)):
        mac = make(Opcode.MAC, rows=rows, cols=cols, bricks=bricks, kernel_x=3, w_step=arch.columns)
        predicted = timing(mac, arch)
        cycles = engine.cycles(pixels=rows * cols, passes=3 * bricks)
        assert abs(predicted.lead + predicted.busy + predicted.tail - cycles) <= 2, mac
        assert predicted.busy == 3 * bricks * engine.pass_cycles(pixels=rows * cols)
