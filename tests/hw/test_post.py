# amaranth: UnusedElaboratable=no
import itertools
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from amaranth import ResetInserter, Signal

from nibblecore.arch import numerics
from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Instruction, Opcode, encode, make
from nibblecore.golden import GoldenCore, GoldenMemory
from nibblecore_hw.core.post import PostUnit, RecordStore, WordFifo
from nibblecore_hw.layouts import ACC_READ_LATENCY, READ_LATENCY
from nibblecore_sim.post_cases import Surroundings, bits_of
from nibblecore_sim.pysim import Stalls, simulate

ARCHS = {
    (lanes, columns, post_lanes): ArchConfig(
        name="t", lanes=lanes, columns=columns, post_lanes=post_lanes, acc_depth=16, act_depth=512, weight_depth=256
    )
    for lanes, columns, post_lanes in (
        (4, 4, 2),  # words of 16 bits: a quarter of a record, half a 32-bit sum
        (4, 8, 2),  # two bricks
        (4, 8, 4),  # one step per brick
        (4, 4, 1),
        (8, 4, 2),  # two parts
        (8, 4, 1),
        (8, 8, 8),  # one group
        (16, 4, 4),  # four parts of one step
        (16, 16, 4),
        (32, 32, 4),  # two records per word, one word of 32-bit sums per step
        (64, 16, 8),  # four records per word, four parts
    )
}
SMALL = [ARCHS[k] for k in ((4, 4, 2), (4, 8, 2), (4, 8, 4), (8, 4, 2))]
IDS = {"ids": lambda a: f"{a.lanes}x{a.columns}x{a.post_lanes}"}


def run(
    around: Surroundings,
    program: Sequence[Instruction],
    *,
    stall: float,
    gap: float = 0.0,
    seed: int = 0,
    abandoned: Sequence[tuple[Instruction, int]] = (),
) -> Any:
    """Execute a program; the writes of each instruction, its cycles from command to done, and the stall strobes.

    ``abandoned``: instructions that begin before the program and end in a reset after so many cycles.
    """
    arch, dut = around.arch, PostUnit(around.arch)
    reset = Signal()
    rng = random.Random(seed)
    writes: list[list[tuple[int, int, int]]] = [[] for _ in program]
    cycles: list[int] = []
    refused = strobes = 0
    wanted = [len(around.model(i)) for i in program]

    async def bench(ctx: Any) -> None:
        nonlocal refused, strobes
        stalls = {p: Stalls(stall, seed=seed + n) for n, p in enumerate((dut.act_read, dut.act_write, dut.params))}
        gaps = Stalls(gap, seed=seed + 9)
        garbage, nonsense = rng.getrandbits(arch.word_bits), [rng.getrandbits(23) for _ in range(arch.post_lanes)]
        arriving = {
            dut.act_read: deque([None] * (READ_LATENCY - 1)), dut.params: deque([None] * (READ_LATENCY - 1)),
            dut.acc_read: deque([None] * (ACC_READ_LATENCY - 1)),
        }  # fmt: skip
        for port in stalls:
            ctx.set(port.ready, 1)
        wanted_by_others = Stalls(stall, seed=seed + 8)
        for instruction, length in abandoned:
            ctx.set(dut.command.payload, encode(instruction))
            ctx.set(dut.command.valid, 1)
            for _ in range(length):
                _, _, ready = await ctx.tick().sample(dut.command.ready)
                if ready:
                    ctx.set(dut.command.valid, 0)
            ctx.set(dut.command.valid, 0)
            ctx.set(reset, 1)
            await ctx.tick()
            ctx.set(reset, 0)
        now, done, sent, began, busy_wanted, last_write = 0, 0, 0, None, False, None
        announced = 0
        while done < len(program):
            for port, pauses in stalls.items():
                ctx.set(port.ready, not pauses.pause())
            ctx.set(dut.params_wanted, wanted_by_others.pause())
            if began is None and sent < len(program) and sent == done and not gaps.pause():
                began = now
                ctx.set(dut.command.payload, encode(program[sent]))
                ctx.set(dut.command.valid, 1)
            write_next = ctx.get(dut.act_write_next)
            transfer, done_stb, busy, bank_stall, acc_en, acc, params, read, write = await sample(ctx)
            assert write[0] == announced, f"a write is not there when announced, cycle {now}, seed {seed}"
            announced = write_next
            strobes += bank_stall
            assert busy == busy_wanted, f"busy is {busy} in cycle {now}, seed {seed}"
            if done_stb:
                assert last_write == now - 1, f"done {now - last_write} cycles after the last write, seed {seed}"
                cycles.append(now - began)
                done, began = done + 1, None
            else:
                assert not (last_write == now - 1 and len(writes[done]) == wanted[done]), f"no done_stb, seed {seed}"
            if transfer:
                ctx.set(dut.command.valid, 0)
                ctx.set(dut.command.payload, rng.getrandbits(256))
                sent, busy_wanted = sent + 1, True
            # What is not asked for is garbage.
            first = acc[2] * arch.post_lanes
            arriving[dut.acc_read].append(
                around.acc[acc[0]][acc[1]][first : first + arch.post_lanes] if acc_en else None
            )
            sums = arriving[dut.acc_read].popleft()
            ctx.set(dut.acc_read.data, sums if sums is not None else nonsense)
            for port, (valid, ready, addr), buffer in (
                (dut.params, params, around.weights), (dut.act_read, read, around.act),
            ):  # fmt: skip
                arriving[port].append(buffer[addr] if valid and ready else None)
                word = arriving[port].popleft()
                ctx.set(port.data, word if word is not None else garbage)
            valid, ready, addr, word, mask = write
            if valid and ready:
                assert done < len(program), f"a write after the end, seed {seed}"
                writes[done].append((addr, word & bits_of(mask, arch), mask))
                last_write = now
                if len(writes[done]) == wanted[done]:
                    busy_wanted = False
            refused += (valid and not ready) or (read[0] and not read[1])
            now += 1
        for _ in range(5):
            _, _, extra = await ctx.tick().sample(dut.act_write.valid)
            assert not extra, f"writes after the end, seed {seed}"

    async def sample(ctx: Any) -> Any:
        r, w, p, a = dut.act_read, dut.act_write, dut.params, dut.acc_read
        command = (dut.command.valid & dut.command.ready, dut.done_stb, dut.busy, dut.bank_stall)
        reads = (a.en, a.bank, a.addr, a.group, p.valid, p.ready, p.addr, r.valid, r.ready, r.addr)
        v = await ctx.tick().sample(*command, *reads, w.valid, w.ready, w.addr, w.data, w.mask)
        return (*v[2:7], v[7:10], v[10:13], v[13:16], v[16:21])

    limit = 100 + sum(PostUnit.cycles(arch, i) for i in program)
    limit += sum(length + 1 for _, length in abandoned)
    simulate(ResetInserter(reset)(dut), bench, max_cycles=int(limit * (8 / (1 - stall)) * (8 if gap else 1)))
    return writes, cycles, refused, strobes


def check(
    around: Surroundings,
    program: Sequence[Instruction],
    *,
    stall: float,
    gap: float = 0.0,
    seed: int,
) -> None:
    writes, cycles, refused, strobes = run(around, program, stall=stall, gap=gap, seed=seed)
    for n, instruction in enumerate(program):
        want = around.model(instruction)
        where = f"instruction {n} ({instruction}), seed {seed}"
        assert len(writes[n]) == len(want), where
        for k, (got, expected) in enumerate(zip(writes[n], want, strict=True)):
            assert got == expected, f"write {k} of {where}: {got}, not {expected}"
        if stall == 0:
            assert cycles[n] == PostUnit.cycles(around.arch, instruction), where
    if stall:
        assert refused > 0
        assert strobes <= refused
    else:
        assert strobes == 0


@pytest.mark.parametrize("stall", [0.0, 0.5])
@pytest.mark.parametrize("arch", SMALL, **IDS)
def test_post_in_every_mode(arch: ArchConfig, stall: float) -> None:
    seed = arch.columns + int(stall * 10)
    around = Surroundings(arch, seed)
    modes = [{"mode": m, "add": a, "add_wide": w} for m, a, w in
             ((0, 0, 0), (0, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 1))]  # fmt: skip
    check(around, [around.post(**m) for m in modes], stall=stall, gap=0.3, seed=seed)


@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize("arch", ARCHS.values(), **IDS)
def test_random_programs(arch: ArchConfig, stall: float) -> None:
    seed = 100 + arch.word_bits + arch.columns + arch.post_lanes
    around = Surroundings(arch, seed)
    count = 8 if arch.lanes <= 8 else 4
    program = [around.rng.choice((around.post, around.pool))() for _ in range(count)]
    check(around, program, stall=stall, seed=seed)


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_pool(stall: float) -> None:
    around = Surroundings(SMALL[0], 7)
    program = []
    for wide in (0, 1):
        program += [around.pool(wide=wide) for _ in range(5)]
        # No tap inside: the lowest code. A window of one tap. Every tap inside.
        inside = {"wide": wide, "x0": 0, "y0": 0, "width": 64, "height": 64}
        program += [around.pool(wide=wide, x0=-100), around.pool(kernel_x=1, kernel_y=1, **inside)]
        program += [around.pool(**inside)]
    check(around, program, stall=stall, gap=0.3, seed=7)


def test_pool_compares_joined_codes() -> None:
    # Pairs of 8-bit codes that share the high nibble, the low one, both or none, in either order.
    arch = ARCHS[4, 4, 2].replace(act_depth=1024)
    around = Surroundings(arch, 3)
    codes = [(high, low) for high in (-8, -1, 0, 7) for low in (-8, -1, 7)]
    pairs = [(a, b) for a in codes for b in codes]
    words = [(nibble & 15) * 0x1111 for pair in pairs for code in pair for nibble in code]
    around.act[: len(words)] = words
    window = {"kernel_x": 2, "kx_step": 2, "cols": len(pairs), "ox_step": 4, "width": len(pairs) + 1}
    program = [make(Opcode.POOL, wide=1, out_ox_step=2, **window)]
    assert len({word for _, word, _ in around.model(program[0])}) > 2
    check(around, program, stall=0.0, seed=3)


@pytest.mark.parametrize("seed", range(3))
def test_a_reset_abandons_an_instruction(seed: int) -> None:
    around = Surroundings(ARCHS[4, 8, 2], seed)
    instructions = [around.post(mode=m, add=int(m < 2), rows=2, cols=3) for m in (0, 1, 2)] + [around.pool(wide=1)]
    abandoned = [
        (i, around.rng.randint(1, PostUnit.cycles(around.arch, i) - 1)) for i in around.rng.choices(instructions, k=4)
    ]
    program = [around.rng.choice(instructions) for _ in range(2)]
    writes, cycles, _, _ = run(around, program, stall=0.0, seed=seed, abandoned=abandoned)
    assert writes == [around.model(i) for i in program], f"seed {seed}"
    assert cycles == [PostUnit.cycles(around.arch, i) for i in program], f"seed {seed}"


def test_long_tiles_keep_the_rate() -> None:
    # Counters of full width, read-ahead and output memory at their limits: one word per cycle in and out.
    for key in ((4, 4, 1), (4, 8, 4), (8, 4, 2)):
        arch = ARCHS[key].replace(acc_depth=32)
        around = Surroundings(arch, 5)
        size = {"cols": 8, "rows": 4}
        program = [around.post(mode=m, add=a, add_wide=w, **size) for m in (0, 1) for a, w in ((0, 0), (1, 0), (1, 1))]
        program += [around.post(mode=2, add=0, **size), around.pool(wide=1, kernel_x=1, kernel_y=1, **size)]
        check(around, program, stall=0.0, seed=5)


@pytest.mark.parametrize("port", ["act_read", "act_write"])
def test_lost_grants_cost_at_most_a_cycle_each(port: str) -> None:
    arch = ARCHS[4, 4, 2]
    around = Surroundings(arch, 6)
    program = [around.post(mode=m, add=1, add_wide=w, cols=4, rows=4) for m in (0, 1) for w in (0, 1)]
    program += [around.pool(wide=w, cols=4, rows=4, kernel_x=2, kernel_y=2) for w in (0, 1)]
    _, cycles, refused, strobes = run(around, program, stall=0.3, seed=6)
    assert strobes <= refused
    assert sum(cycles) <= sum(PostUnit.cycles(arch, i) for i in program) + refused


def test_records_leave_every_second_cycle_to_who_waits_for_the_port() -> None:
    arch = ARCHS[4, 4, 2]
    for wanted in (0, 1):
        dut = RecordStore(arch)
        asked: list[int] = []

        async def bench(ctx: Any, dut: Any = dut, wanted: int = wanted, asked: list[int] = asked) -> None:
            for signal, value in ((dut.wanted, wanted), (dut.params.ready, 1), (dut.start, 1), (dut.addr, 5)):
                ctx.set(signal, value)
            await ctx.tick()
            ctx.set(dut.start, 0)
            for cycle in itertools.count(1):
                if ctx.get(dut.params.valid):
                    asked.append(cycle)
                if ctx.get(dut.loaded):
                    assert cycle == asked[-1] + READ_LATENCY + 2
                    break
                await ctx.tick()

        simulate(dut, bench, max_cycles=100)
        assert asked == list(range(1, 1 + arch.param_words * (1 + wanted), 1 + wanted))


def golden(around: Surroundings) -> GoldenCore:
    arch = around.arch
    core = GoldenCore(arch, GoldenMemory(64, arch.word_bytes), [(0, 0)] * 8)
    for buffer, written, words in (
        (core.act, core.act_written, around.act), (core.weights, core.weights_written, around.weights),
    ):  # fmt: skip
        for n, word in enumerate(words):
            buffer[n] = [numerics.wrap(word >> 4 * lane, 4) for lane in range(arch.lanes)]
        written[:] = True
    core.acc[:] = around.acc
    core.acc_written[:] = True
    return core


@pytest.mark.parametrize("arch", ARCHS.values(), **IDS)
def test_model_agrees_with_the_golden_core(arch: ArchConfig) -> None:
    around = Surroundings(arch, 11)
    for n in range(40):
        core = golden(around)
        instruction = around.rng.choice((around.post, around.pool))()
        # The golden model checks more than hardware can: `part` also where it does not count.
        if instruction.opcode is Opcode.POST and arch.parts_per_brick == 1:
            instruction = Instruction(Opcode.POST, {**instruction.fields, "part": 0})
        want, writes = list(around.act), around.model(instruction)
        if len({addr for addr, *_ in writes}) < len(writes):
            continue  # the order of writes to the same word is not part of the contract
        for addr, word, mask in writes:
            kept = bits_of(mask, arch)
            want[addr] = want[addr] & ~kept | word
        core._execute(n, instruction)
        got = [sum((int(v) & 15) << 4 * lane for lane, v in enumerate(word)) for word in core.act]
        assert got == want, f"{instruction}, seed 11"


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="^depth must be a power of two of at least 2, not 12$"):
        WordFifo(word_bits=8, depth=12)


def test_model_refuses_what_a_tile_does_not_have() -> None:
    around = Surroundings(ARCHS[8, 4, 2], 0)
    text = "a column tile has 1 bricks and a brick 2 parts; the instruction has bricks=1 and part=2"
    with pytest.raises(ValueError, match=f"^{text}$"):
        around.model(around.post(part=2))
    around = Surroundings(ARCHS[4, 8, 2], 0)
    text = "a column tile has 2 bricks and a brick 1 parts; the instruction has bricks=3 and part=0"
    with pytest.raises(ValueError, match=f"^{text}$"):
        around.model(around.post(bricks=3, part=0))
