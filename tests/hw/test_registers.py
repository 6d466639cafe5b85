# amaranth: UnusedElaboratable=no
"""Copies of registers that synthesis leaves apart."""

from typing import Any

import pytest
from amaranth.hdl import Module, Signal
from amaranth.sim import Simulator

from nibblecore_hw.registers import copies


def test_copies_are_equal_from_the_first_edge_on_and_wait_for_their_enable() -> None:
    m = Module()
    value, enable = Signal(4), Signal()
    free, held = copies(m, value, 4, name="free"), copies(m, value, 2, name="held", enable=enable)
    sim = Simulator(m)
    sim.add_clock(1e-6)

    async def bench(ctx: Any) -> None:
        assert [ctx.get(copy) for copy in free] == [0, 15, 15, 0], "they would be made one"
        for now, enabled, kept in ((5, 1, 5), (9, 0, 5), (9, 1, 9)):
            ctx.set(value, now)
            ctx.set(enable, enabled)
            await ctx.tick()
            assert [ctx.get(copy) for copy in free] == [now] * 4
            assert [ctx.get(copy) for copy in held] == [kept] * 2

    sim.add_testbench(bench)
    sim.run()


def test_too_many_copies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^count must be in 1\.\.4, not 5$"):
        copies(Module(), Signal(), 5, name="five")
