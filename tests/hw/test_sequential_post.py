"""The post unit of a core without queues, against the model of POST and POOL."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from amaranth import ResetInserter, Signal

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Instruction, Opcode, encode
from nibblecore.compiler.cost import timing
from nibblecore_hw.core.sequential_post import SequentialPost
from nibblecore_sim.post_cases import Surroundings, bits_of
from nibblecore_sim.pysim import simulate

ARCHS = {
    columns: ArchConfig(
        name="t", lanes=8, columns=columns, acc_depth=16, post_lanes=1, act_depth=512, act_banks=1, weight_depth=256,
        bus_bits=32, burst_beats=8, queue_depth=0,
    )
    for columns in (2, 4, 8, 16)
}  # fmt: skip
Writes = list[list[tuple[int, int, int]]]


def run(
    around: Surroundings,
    program: Sequence[Instruction],
    *,
    refuse: float = 0.0,
    seed: int,
    abandoned: Sequence[tuple[Instruction, int]] = (),
) -> tuple[Writes, list[int]]:
    """What each instruction of a program writes, and its cycles; ``abandoned`` ones end in a reset after so many."""
    arch, dut = around.arch, SequentialPost(around.arch)
    rng = random.Random(seed)
    reset = Signal()
    writes: Writes = [[] for _ in program]
    cycles: list[int] = []

    async def bench(ctx: Any) -> None:
        r, w, p, a = dut.act_read, dut.act_write, dut.params, dut.acc_read
        inputs = (dut.command.ready, dut.done_stb, dut.busy, a.bank, a.addr, a.group)
        ports = [(port.valid, port.ready, port.addr) for port in (r, p, w)]

        async def tick() -> bool:
            """One cycle; whether it was that of ``done_stb``."""
            for port in (r, p, w):
                ctx.set(port.ready, rng.random() >= refuse)
            _, _, ready, done, busy, bank, addr, group, *rest = await ctx.tick().sample(
                *inputs, *(signal for port in ports for signal in port), w.data, w.mask
            )
            assert busy == (running[0] and not done), f"busy is {busy}, seed {seed}"
            if ready and ctx.get(dut.command.valid):
                ctx.set(dut.command.valid, 0)
                running[0] = True
            if done:
                running[0] = False
            ctx.set(a.data, [around.acc[bank][addr][group]])
            for n, (port, buffer) in enumerate(((r, around.act), (p, around.weights))):
                valid, granted, place = rest[3 * n : 3 * n + 3]
                if valid and granted:
                    ctx.set(port.data, buffer[place])
            valid, granted, place, word, mask = rest[6:]
            if valid and granted and len(cycles) < len(program):
                writes[len(cycles)].append((place, word & bits_of(mask, arch), mask))
            return bool(done)

        running = [False]
        for instruction, length in abandoned:
            ctx.set(dut.command.payload, encode(instruction))
            ctx.set(dut.command.valid, 1)
            for _ in range(length):
                await tick()
            ctx.set(dut.command.valid, 0)
            ctx.set(reset, 1)
            await ctx.tick()
            ctx.set(reset, 0)
            running[0] = False
            writes[0].clear()
        for instruction in program:
            ctx.set(dut.command.payload, encode(instruction))
            ctx.set(dut.command.valid, 1)
            took = 0
            while not await tick():
                took += 1
            cycles.append(took)
            ctx.set(dut.command.payload, rng.getrandbits(256))
            for _ in range(rng.randrange(3)):
                assert not await tick(), f"done again, seed {seed}"

    limit = 100 + sum(SequentialPost.cycles(arch, i) for i in (*program, *(i for i, _ in abandoned)))
    simulate(ResetInserter(reset)(dut), bench, max_cycles=int(limit * (1 + 3 * refuse)))
    return writes, cycles


def check(around: Surroundings, program: Sequence[Instruction], *, refuse: float = 0.0, seed: int) -> None:
    writes, cycles = run(around, program, refuse=refuse, seed=seed)
    for n, instruction in enumerate(program):
        where = f"instruction {n} ({instruction}), seed {seed}"
        assert writes[n] == around.model(instruction), where
        if refuse:
            assert cycles[n] >= SequentialPost.cycles(around.arch, instruction), where
        else:
            assert cycles[n] == SequentialPost.cycles(around.arch, instruction), where


@pytest.mark.parametrize(("columns", "refuse"), [(2, 0.0), (4, 0.3), (8, 0.0), (16, 0.5)])
def test_post_in_every_mode(columns: int, refuse: float) -> None:
    arch, seed = ARCHS[columns], columns
    around = Surroundings(arch, seed)
    modes = [{"mode": m, "add": a, "add_wide": w} for m, a, w in
             ((0, 0, 0), (0, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 1))]  # fmt: skip
    check(around, [around.post(**m, rows=2, cols=2) for m in modes], refuse=refuse, seed=seed)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda a: f"{a.columns}columns")
def test_random_programs(arch: ArchConfig) -> None:
    seed = 100 + arch.columns
    around = Surroundings(arch, seed)
    check(around, [around.rng.choice((around.post, around.pool))(rows=2) for _ in range(4)], seed=seed)


@pytest.mark.parametrize("refuse", [0.0, 0.3])
def test_pool(refuse: float) -> None:
    around = Surroundings(ARCHS[8], 7)
    program = []
    for wide in (0, 1):
        program += [around.pool(wide=wide, bricks=2) for _ in range(2)]
        # No tap inside: the lowest code. A window of one tap. Every tap inside.
        inside = {"wide": wide, "x0": 0, "y0": 0, "width": 64, "height": 64}
        program += [around.pool(wide=wide, x0=-100, rows=2), around.pool(kernel_x=1, kernel_y=1, rows=2, **inside)]
        program += [around.pool(bricks=1, **inside)]
    check(around, program, refuse=refuse, seed=7)


def test_pool_compares_joined_codes() -> None:
    # Pairs of 8-bit codes that share the high nibble, the low one, both or none, in either order.
    around = Surroundings(ARCHS[8].replace(act_depth=1024), 3)
    codes = [(high, low) for high in (-8, 0, 7) for low in (-8, 7)]
    pairs = [(a, b) for a in codes for b in codes]
    words = [(nibble & 15) * 0x11111111 for pair in pairs for code in pair for nibble in code]
    around.act[: len(words)] = words
    window = {"kernel_x": 2, "kx_step": 2, "cols": len(pairs), "ox_step": 4, "width": len(pairs) + 1}
    program = [around.pool(
        wide=1, out_ox_step=2, in_addr=0, rows=1, bricks=1, kernel_y=1, x0=0, y0=0, stride_x=1, dilation_x=1, height=1,
        **window,
    )]  # fmt: skip
    assert len({word for _, word, _ in around.model(program[0])}) > 2
    check(around, program, seed=3)


@pytest.mark.parametrize("seed", range(2))
def test_a_reset_abandons_an_instruction(seed: int) -> None:
    around = Surroundings(ARCHS[16], seed)
    instructions = [around.post(mode=m, add=int(m < 2), rows=1, cols=3) for m in (0, 1, 2)] + [around.pool(wide=1)]
    abandoned = [
        (i, around.rng.randint(1, SequentialPost.cycles(around.arch, i) - 1))
        for i in around.rng.choices(instructions, k=4)
    ]
    program = [around.rng.choice(instructions) for _ in range(2)]
    writes, cycles = run(around, program, seed=seed, abandoned=abandoned)
    assert writes == [around.model(i) for i in program], f"seed {seed}"
    assert cycles == [SequentialPost.cycles(around.arch, i) for i in program], f"seed {seed}"


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda a: f"{a.columns}columns")
def test_the_cost_model_knows_the_cycles(arch: ArchConfig) -> None:
    around = Surroundings(arch, 9)
    inside = {"x0": 0, "y0": 0, "width": 64, "height": 64}
    for instruction in [around.post() for _ in range(40)] + [around.pool(**inside) for _ in range(20)]:
        predicted = timing(instruction, arch)
        total = predicted.lead + predicted.busy + predicted.tail
        assert total == SequentialPost.cycles(arch, instruction), f"{instruction}, seed 9"
    outside = around.pool(**(inside | {"x0": -1}))
    assert outside.opcode is Opcode.POOL
    assert timing(outside, arch).busy >= SequentialPost.cycles(arch, outside)
