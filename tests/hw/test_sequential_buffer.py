"""The buffers of a core without queues."""

import random
from typing import Any

import pytest

from nibblecore.arch.config import MemoryKind
from nibblecore_hw.layouts import SEQUENTIAL_READ_LATENCY
from nibblecore_hw.mem.sequential import SequentialBuffer
from nibblecore_sim.pysim import simulate


@pytest.mark.parametrize("kind", ["single", "dual"])
def test_words_come_at_the_next_edge_and_stay(kind: MemoryKind) -> None:
    dut = SequentialBuffer(depth=8, word_bits=16, parts=2, kind=kind, readers=3, writers=2)
    assert dut.LATENCY == SEQUENTIAL_READ_LATENCY == 1
    rng = random.Random(4)
    words: list[int] = []

    async def bench(ctx: Any) -> None:
        for addr in range(8):
            words.append(rng.getrandbits(16))
            ctx.set(dut.writes[1].addr, addr)
            ctx.set(dut.writes[1].data, words[-1])
            ctx.set(dut.writes[1].mask, 3)
            ctx.set(dut.writes[1].valid, 1)
            await ctx.tick()
        ctx.set(dut.writes[1].valid, 0)
        stands: int | None = None
        for _ in range(400):
            # Whoever does not ask says anything.
            for port in (*dut.reads, *dut.writes):
                ctx.set(port.addr, rng.randrange(8))
                assert ctx.get(port.ready)
            for port in dut.writes:
                ctx.set(port.data, rng.getrandbits(16))
                ctx.set(port.mask, rng.randrange(4))
            who = rng.choice([*dut.reads, *dut.writes, None])
            if who is not None:
                ctx.set(who.valid, 1)
                addr = ctx.get(who.addr)
                if any(who is port for port in dut.writes):
                    mask = sum(0xFF << 8 * n for n in range(2) if ctx.get(who.mask) >> n & 1)
                    words[addr] = words[addr] & ~mask | ctx.get(who.data) & mask
                    stands = (
                        None if kind == "single" else stands
                    )  # not what SPRAM does, whatever Amaranth's memory does
                else:
                    stands = words[addr]
            await ctx.tick()
            if who is not None:
                ctx.set(who.valid, 0)
            if stands is not None:
                assert [ctx.get(port.data) for port in dut.reads] == [stands] * 3

    simulate(dut, bench, max_cycles=1000)
