# amaranth: UnusedElaboratable=no
"""BlockMemory against a list of words, without primitives; tests/netlist has those of the ECP5."""

import random
import re
from typing import Any

import pytest
from amaranth import ResetInserter, Signal

from nibblecore_hw.mem.block import BlockMemory
from nibblecore_sim.pysim import simulate

LATENCY = 2


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("width", "depth"), [(1, 2), (5, 3), (9, 600), (36, 512), (96, 32), (20, 1000)])
def test_a_word_stands_two_cycles_after_its_address(width: int, depth: int, seed: int) -> None:
    rng = random.Random(seed)
    dut = BlockMemory(width=width, depth=depth)
    few = rng.sample(range(depth), min(depth, 6))
    memory = [0] * depth
    wanted: list[int] = []
    seen: list[int] = []

    async def bench(ctx: Any) -> None:
        for _ in range(1000):
            seen.append(ctx.get(dut.read_data))
            read, write, data = rng.choice(few), rng.choice(few), rng.getrandbits(width)
            # Where nothing is written, it may be the same word.
            enable = read != write and rng.random() < 0.7
            for port, value in zip(
                (dut.read_addr, dut.write_addr, dut.write_data, dut.write_en), (read, write, data, enable), strict=True
            ):
                ctx.set(port, value)
            wanted.append(memory[read])
            if enable:
                memory[write] = data
            await ctx.tick()

    simulate(dut, bench)
    for cycle, (want, got) in enumerate(zip(wanted, seen[LATENCY:], strict=False)):
        assert got == want, f"{width=} {depth=} {seed=} {cycle=}: {got:x}, not {want:x}"
    # Any other latency would show.
    for other in (LATENCY - 1, LATENCY + 1):
        assert sum(want != got for want, got in zip(wanted, seen[other:], strict=False)) > 100, f"{seed=}"


def test_contents_survive_a_reset_and_begin_with_zeros() -> None:
    dut, reset, seen = BlockMemory(width=8, depth=16), Signal(), []

    async def bench(ctx: Any) -> None:
        ctx.set(dut.write_addr, 5)
        ctx.set(dut.write_data, 0xA5)
        for in_reset, enable, read in [(0, 1, 4), (1, 0, 5), (1, 0, 5), (0, 0, 4), (0, 0, 5), (0, 0, 0), (0, 0, 0)]:
            seen.append(ctx.get(dut.read_data))
            ctx.set(reset, in_reset)
            ctx.set(dut.write_en, enable)
            ctx.set(dut.read_addr, read)
            await ctx.tick()

    simulate(ResetInserter(reset)(dut), bench)
    assert seen[LATENCY:] == [0, 0xA5, 0xA5, 0, 0xA5]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"depth": 1}, "depth must be at least 2, not 1"),
        ({"technology": "gowin"}, "technology must be one of generic, ecp5, not 'gowin'"),
    ],
)
def test_errors(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        BlockMemory(**{"width": 8, "depth": 16} | change)
