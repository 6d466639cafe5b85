# amaranth: UnusedElaboratable=no
"""Stream registers, and copies of registers that synthesis leaves apart."""

import random
from typing import Any

import pytest
from amaranth.hdl import Module, Signal
from amaranth.sim import Simulator

from nibblecore_hw.registers import SkidBuffer, copies


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


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize(("offers", "takes"), [(1, 1), (1, 0.5), (0.5, 1), (0.5, 0.5)])
def test_skid_buffer_passes_every_item_once_and_in_order(groups: int, offers: float, takes: float) -> None:
    rng = random.Random(groups)
    m = Module()
    m.submodules.buffer = buffer = SkidBuffer(shape=13, groups=groups)
    items = [rng.randrange(1 << 13) for _ in range(200)]
    sent, taken, cycles = 0, list[int](), 0
    sim = Simulator(m)
    sim.add_clock(1e-6)

    async def bench(ctx: Any) -> None:
        nonlocal sent, cycles
        while len(taken) < len(items):
            # Not in the first cycle; and an item that is offered stays.
            offered = sent < len(items) and cycles > 0 and (ctx.get(buffer.i.valid) or rng.random() < offers)
            ctx.set(buffer.i.valid, offered)
            ctx.set(buffer.i.payload, items[sent] if offered else rng.randrange(1 << 13))
            ctx.set(buffer.o.ready, rng.random() < takes)
            if ctx.get(buffer.o.valid & buffer.o.ready):
                taken.append(ctx.get(buffer.o.payload))
            went = ctx.get(buffer.i.valid & buffer.i.ready)
            await ctx.tick()
            cycles += 1
            sent += went
            if went:
                ctx.set(buffer.i.valid, 0)

    sim.add_testbench(bench)
    sim.run()
    assert taken == items
    if offers == takes == 1:
        assert cycles == len(items) + 2


def test_skid_buffer_refuses_too_many_groups() -> None:
    with pytest.raises(ValueError, match=r"^groups must be in 1\.\.4, not 5$"):
        SkidBuffer(shape=8, groups=5)
