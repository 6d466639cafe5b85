"""The MAC engine of a core without queues, against the model of MAC instructions."""

import random
from typing import Any

import pytest
from amaranth.sim import Simulator

from nibblecore.arch import isa
from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Instruction, Opcode, make
from nibblecore.arch.numerics import wrap
from nibblecore_hw.core.sequential import PairedDot, SequentialMac
from nibblecore_hw.layouts import SEQUENTIAL_READ_LATENCY

ARCH = ArchConfig(
    name="t", lanes=8, columns=4, acc_depth=16, post_lanes=1, act_depth=256, act_banks=1, weight_depth=256,
    bus_bits=32, burst_beats=8, queue_depth=0,
)  # fmt: skip


def test_dot_products_are_exact() -> None:
    dot = PairedDot(lanes=8)
    rng = random.Random(1)
    vectors = [([-8] * 8, [-8] * 8), ([-8] * 8, [7] * 8), ([7] * 8, [-8] * 8), ([7] * 8, [7] * 8), ([0] * 8, [-8] * 8)]
    for n in range(2000):
        pool = (-8, -7, -1, 0, 7) if n % 2 else range(-8, 8)
        vectors.append((rng.choices(pool, k=8), rng.choices(pool, k=8)))

    async def bench(ctx: Any) -> None:
        for a, w in vectors:
            ctx.set(dot.activations, a)
            ctx.set(dot.weights, w)
            await ctx.delay(1e-9)
            assert ctx.get(dot.sum) == dot.model(a, w), (a, w)

    sim = Simulator(dot)
    sim.add_testbench(bench)
    sim.run()


def random_mac(rng: random.Random) -> Instruction:
    cols = rng.randint(1, 5)
    return make(
        Opcode.MAC,
        acc_bank=rng.randint(0, 1),
        accumulate=rng.randint(0, 1),
        shift=rng.randint(0, 2),
        w_addr=rng.randrange(1 << 16),
        w_step=rng.randrange(16),
        x_addr=rng.randrange(1 << 16),
        cols=cols,
        rows=rng.randint(1, 16 // cols),
        bricks=rng.randint(1, 3),
        kernel_x=rng.randint(1, 3),
        kernel_y=rng.randint(1, 3),
        **{f"{n}_step": rng.randint(-50, 50) for n in ("ox", "oy", "kx", "ky")},
        brick_step=rng.randrange(5),
        x0=rng.randint(-4, 2),
        y0=rng.randint(-4, 2),
        width=rng.randint(1, 9),
        height=rng.randint(1, 9),
        **{f"{n}_{a}": rng.randint(1, 3) for n in ("stride", "dilation") for a in "xy"},
        pad=rng.randint(-8, 7),
    )


@pytest.mark.parametrize("seed", range(3))
def test_instructions(seed: int) -> None:
    rng = random.Random(seed)
    dut = SequentialMac(ARCH)
    x, w = ([rng.randrange(1 << 32) for _ in range(256)] for _ in range(2))
    code = [random_mac(rng) for _ in range(12)]
    # The first two fill both banks.
    code[:0] = [make(Opcode.MAC, acc_bank=bank, cols=4, rows=4, width=4, height=4, ox_step=1) for bank in range(2)]
    acc: list[list[list[int]]] = [[[0] * ARCH.columns for _ in range(ARCH.acc_depth)] for _ in range(2)]

    def memory(port: Any, words: list[int], refuse: bool) -> Any:
        async def bench(ctx: Any) -> None:
            pipe: list[int] = [0] * SEQUENTIAL_READ_LATENCY
            async for _, _, valid, ready, addr in ctx.tick().sample(port.valid, port.ready, port.addr):
                pipe = [words[addr] if valid and ready else rng.randrange(1 << 32), *pipe[:-1]]
                ctx.set(port.data, pipe[-1])
                ctx.set(port.ready, not refuse or rng.random() < 0.7)

        return bench

    async def bench(ctx: Any) -> None:
        for i in code:
            ctx.set(dut.command.payload, isa.encode(i))
            ctx.set(dut.command.valid, 1)
            cycles = 0
            while not ctx.get(dut.done_stb):
                taken = ctx.get(dut.command.ready)
                await ctx.tick()
                if taken:
                    ctx.set(dut.command.valid, 0)
                cycles += 1
                assert cycles < 20000, f"seed {seed}: {i} does not end"
            await ctx.tick()
            dut.model(i, x=x, w=w, acc=acc)
            if seed == 0:
                passes = i["kernel_y"] * i["kernel_x"] * i["bricks"]
                assert cycles == passes * i["rows"] * i["cols"] * ARCH.columns + SEQUENTIAL_READ_LATENCY + 2
            for pixel in range(i["rows"] * i["cols"]):
                for column in range(ARCH.columns):
                    ctx.set(dut.acc_read.bank, i["acc_bank"])
                    ctx.set(dut.acc_read.addr, pixel)
                    ctx.set(dut.acc_read.group, column)
                    for _ in range(SEQUENTIAL_READ_LATENCY):
                        await ctx.tick()
                    got, want = ctx.get(dut.acc_read.data[0]), acc[i["acc_bank"]][pixel][column]
                    assert got == wrap(want, ARCH.acc_bits), f"seed {seed}: {i}, pixel {pixel}, column {column}"

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(memory(dut.x, x, refuse=bool(seed)), background=True)
    sim.add_testbench(memory(dut.w, w, refuse=bool(seed)), background=True)
    sim.add_testbench(bench)
    ctx_ready = (dut.x.ready, dut.w.ready)

    async def grant(ctx: Any) -> None:
        for ready in ctx_ready:
            ctx.set(ready, 1)

    sim.add_testbench(grant)
    sim.run()
