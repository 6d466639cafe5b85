"""Counters are exact in their turn, whatever happened since the last one."""

import random

import pytest
from amaranth.hdl import ResetInserter, Signal
from amaranth.sim import SimulatorContext

from nibblecore.arch.regs import Counter
from nibblecore_hw.ctrl.counters import SLOTS, Counters
from nibblecore_sim.pysim import simulate


@pytest.mark.parametrize("seed", range(3))
def test_every_turn_shows_the_exact_count(seed: int) -> None:
    rng = random.Random(seed)
    dut = Counters()
    counts = dict.fromkeys(Counter, 0)
    history: list[dict[Counter, int]] = []

    async def bench(ctx: SimulatorContext) -> None:
        for cycle in range(1500):
            rate = [0.0, 1.0, 0.5, 0.05][cycle // 40 % 4]  # long runs of one event fill its own bits
            events = {c: rng.random() < rate for c in Counter}
            clear = rng.random() < 0.01
            for c, event in events.items():
                ctx.set(dut.events[c.name.lower()], event)
            ctx.set(dut.clear_stb, clear)
            history.append({c: counts[c] + event for c, event in events.items()})
            slot = ctx.get(dut.slot)
            if len(history) > dut.LATENCY:
                then = history.pop(0)
                assert slot == (cycle - dut.LATENCY) % SLOTS
                expected = then[Counter(slot)] if slot < len(Counter) else 0
                assert ctx.get(dut.value) == expected, f"cycle {cycle}, slot {slot} (seed {seed})"
            for c, event in events.items():
                counts[c] = 0 if clear else counts[c] + event
            if clear:
                history.clear()
            await ctx.tick()

    simulate(dut, bench)


def test_counts_wrap_and_a_reset_clears() -> None:
    dut = Counters()
    reset = Signal()

    async def bench(ctx: SimulatorContext) -> None:
        ctx.set(dut.events.mac_busy, 1)
        for _ in range(100):
            await ctx.tick()
        ctx.set(dut.events.mac_busy, 0)
        ctx.set(reset, 1)
        await ctx.tick()
        ctx.set(reset, 0)
        for cycle in range(2 * SLOTS):
            assert ctx.get(dut.value) == 0 or cycle < dut.LATENCY
            await ctx.tick()

    simulate(ResetInserter(reset)(dut), bench)
