# amaranth: UnusedElaboratable=no
"""The read arbiter between two masters and a memory that mixes their bursts beat by beat."""

import itertools
import random
from collections import deque
from typing import Any

import pytest

from nibblecore.arch.config import ArchConfig
from nibblecore_hw.dma.axi import FETCH_ID, LOAD_ID, AxiReadArbiter
from nibblecore_hw.registers import SkidBuffer
from nibblecore_sim.models.axi_pysim import AxiMemory
from nibblecore_sim.pysim import STALLS, Stalls, simulate, transfer

ARCH = ArchConfig(name="t", lanes=8, columns=4, post_lanes=4, acc_depth=16, act_depth=256, weight_depth=256,
                  bus_bits=32)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_two_masters(seed: int) -> None:
    dut = AxiReadArbiter(arch=ARCH)
    stall = [0.0, 0.2, 0.5, 0.7][seed]
    memory = AxiMemory(size=8192, bus_bytes=4, seed=seed, stall=stall, latency=(0, 8), max_bursts=60)
    mixed = []

    def master(port: Any, number: int) -> Any:
        rng = random.Random(f"{seed} {number}")

        async def run(ctx: Any) -> None:
            ready, gaps = Stalls(stall, seed=seed * 2 + number), Stalls(0.5, seed=100 + seed * 2 + number)
            beats: deque[tuple[int, bool]] = deque()
            offered, sent = False, 0
            while sent < 30 or beats or offered:
                if not offered and sent < 30 and not gaps.pause():
                    addr, count = 128 * rng.randrange(64), rng.randint(1, 8)
                    ctx.set(port.araddr, addr)
                    ctx.set(port.arlen, count - 1)
                    ctx.set(port.arsize, 2)
                    ctx.set(port.arburst, 1)
                    ctx.set(port.arid, 1 - number)  # the arbiter's business, not the master's
                    offered, sent = True, sent + 1
                    beats.extend((addr + 4 * i, i == count - 1) for i in range(count))
                ctx.set(port.arvalid, offered)
                ctx.set(port.rready, not ready.pause())
                _, _, taken, got, data, last = await ctx.tick().sample(
                    port.arvalid & port.arready, port.rvalid & port.rready, port.rdata, port.rlast
                )
                if taken:
                    offered = False
                if got:
                    addr, is_last = beats.popleft()
                    assert data == int.from_bytes(memory.data[addr : addr + 4], "little"), f"{seed=} {number=}"
                    assert last == is_last, f"{seed=} {number=}"
                    mixed.append(number)

        run.__name__ = f"master {number}"
        return run

    simulate(dut, master(dut.load, LOAD_ID), master(dut.fetch, FETCH_ID), background=[memory.reader(dut.bus)])
    assert {b.id for b in memory.bursts} == {LOAD_ID, FETCH_ID}
    assert len(memory.bursts) == 60
    assert sum(a != b for a, b in itertools.pairwise(mixed)) > 20, f"{seed=}: the masters did not mix"


def test_fetch_wins() -> None:
    """Unless load's address was already offered to the bus."""
    dut = AxiReadArbiter(arch=ARCH)

    async def bench(ctx: Any) -> None:
        for port in (dut.load, dut.fetch):
            ctx.set(port.arvalid, 1)
        assert ctx.get(dut.bus.arid) == FETCH_ID
        ctx.set(dut.fetch.arvalid, 0)
        assert ctx.get(dut.bus.arid) == LOAD_ID
        await ctx.tick()
        ctx.set(dut.fetch.arvalid, 1)
        assert ctx.get(dut.bus.arid) == LOAD_ID
        ctx.set(dut.bus.arready, 1)
        assert (ctx.get(dut.load.arready), ctx.get(dut.fetch.arready)) == (1, 0)
        await ctx.tick()
        assert ctx.get(dut.bus.arid) == FETCH_ID

    simulate(dut, bench)


@pytest.mark.parametrize(("producer", "consumer"), STALLS)
def test_skid_buffer(producer: float, consumer: float) -> None:
    items = [random.Random(1).getrandbits(8) for _ in range(200)]
    run = transfer(SkidBuffer(shape=8), items, count=len(items), producer=producer, consumer=consumer, seed=1)
    assert run.items == items
