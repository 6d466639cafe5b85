# amaranth: UnusedElaboratable=no
"""LoadDma against an AXI memory that checks its master, and a Python model of LOAD."""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from amaranth import ResetInserter, Signal

from nibblecore.arch import isa
from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Instruction, LoadTarget, Opcode
from nibblecore.arch.regs import ErrorCause
from nibblecore_hw.dma.load import LoadDma
from nibblecore_sim.models.axi_pysim import AxiMemory
from nibblecore_sim.models.copy3d import copied_words, random_copy
from nibblecore_sim.pysim import Stalls, put, simulate

# (lanes, bus_bits): words of 1/2, 1/4 of the bus, equal, 2 and 4 beats.
RATIOS = [(8, 64), (4, 64), (8, 32), (16, 32), (32, 32)]
SIZE = 1 << 16
REGION, OTHER_REGION = 3, 6


def make_arch(lanes: int = 8, bus_bits: int = 32, burst_beats: int = 8, outstanding: int = 2) -> ArchConfig:
    return ArchConfig(name="t", lanes=lanes, columns=4, post_lanes=4, acc_depth=16, act_depth=256, act_banks=2,
                      weight_depth=512, bus_bits=bus_bits, burst_beats=burst_beats,
                      outstanding=outstanding)  # fmt: skip


def random_load(rng: random.Random, words: int, *, longest: int = 24, region: int = REGION) -> Instruction:
    return random_copy(rng, Opcode.LOAD, words=words, region=region, longest=longest)


@dataclass
class Run:
    """What a bench saw, by cycle."""

    commands: list[int] = field(default_factory=list)
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # target, address, word
    write_cycles: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    errors: list[tuple[int, int, int]] = field(default_factory=list)  # cycle, cause, instructions done before
    ar: list[int] = field(default_factory=list)
    busy: list[bool] = field(default_factory=list)
    stalls: int = 0
    idle_at_end: bool = False


def run_load(
    arch: ArchConfig,
    loads: Sequence[Instruction],
    memory: AxiMemory,
    *,
    base: int,
    size: int,
    other_base: int = 0,
    seed: int = 0,
    gap: float = 0.0,
    write_stall: float = 0.0,
    stop_at: int | None = None,
    until: Callable[[Run], bool] | None = None,
    tail: int = 6,
) -> Run:
    """Run instructions until they are done, or ``until`` says so; then ``tail`` more cycles."""
    dut = LoadDma(arch=arch)
    run = Run()
    over = until or (lambda r: len(r.done) == len(loads))

    async def commands(ctx: Any) -> None:
        pauses = Stalls(gap, seed=seed + 1)
        for load in loads:
            while pauses.pause():
                await ctx.tick()
            ctx.set(dut.region, {"base": other_base if load["region"] == OTHER_REGION else base, "size": size})
            await put(ctx, dut.command, isa.encode(load))

    async def observe(ctx: Any) -> None:
        left, last_ar, cycle = tail, False, 0
        ready = {port: Stalls(write_stall, seed=seed + 2 + n) for n, port in enumerate((dut.act, dut.weights))}
        act_ready_next = True
        while left:
            ctx.set(dut.stop, stop_at is not None and cycle >= stop_at)
            ctx.set(dut.weights.ready, not ready[dut.weights].pause())
            ctx.set(dut.act.ready, act_ready_next)
            act_ready_next = not ready[dut.act].pause()
            ctx.set(dut.act_ready_next, act_ready_next)
            values = await ctx.tick().sample(
                dut.command.valid & dut.command.ready, dut.done_stb, dut.error_stb, dut.error_cause, dut.busy,
                dut.stall_bus_stb, dut.bus.arvalid, dut.bus.arready, dut.idle,
                *(s for p in ready for s in (p.valid & p.ready, p.addr, p.data, p.mask)),
            )  # fmt: skip
            taken, done, error, cause, busy, stall, arvalid, arready, idle, *writes = values[2:]
            if taken:
                run.commands.append(cycle)
            if done:
                run.done.append(cycle)
            if error:
                run.errors.append((cycle, cause, len(run.done)))
            if arvalid and not last_ar:
                run.ar.append(cycle)
            last_ar = arvalid and not arready
            for target in (LoadTarget.ACTIVATIONS, LoadTarget.WEIGHTS):
                valid, addr, data, mask = writes[4 * target : 4 * target + 4]
                if valid:
                    assert mask == (1 << (arch.parts_per_brick if target == LoadTarget.ACTIVATIONS else 1)) - 1
                    run.writes.append((int(target), addr, data))
                    run.write_cycles.append(cycle)
            run.busy.append(bool(busy))
            run.stalls += stall
            run.idle_at_end = bool(idle)
            left -= over(run) and (stop_at is None or cycle >= stop_at)
            cycle += 1

    simulate(dut, observe, background=[commands, memory.reader(dut.bus)], max_cycles=20_000)
    return run


def expected(arch: ArchConfig, load: Instruction, data: bytes, base: int) -> list[tuple[int, int, int]]:
    depth = arch.weight_depth if load["target"] == LoadTarget.WEIGHTS else arch.act_depth
    wb = arch.word_bytes
    return [
        (load["target"], local % depth, int.from_bytes(data[base + dram * wb : base + (dram + 1) * wb], "little"))
        for local, dram in copied_words(load)
    ]


def flat(parts: Iterable[list[tuple[int, int, int]]]) -> list[tuple[int, int, int]]:
    return list(itertools.chain.from_iterable(parts))


def touched(arch: ArchConfig, load: Instruction, base: int) -> set[int]:
    return {base + dram * arch.word_bytes + i for _, dram in copied_words(load) for i in range(arch.word_bytes)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("lanes", "bus_bits"), RATIOS)
def test_random_loads(lanes: int, bus_bits: int, seed: int) -> None:
    rng = random.Random(f"{lanes} {bus_bits} {seed}")
    arch = make_arch(lanes, bus_bits, burst_beats=rng.choice([4, 8, 32]), outstanding=rng.choice([1, 2, 4]))
    stall = [0.0, 0.3, 0.6][seed]
    size = 6000 + rng.randrange(3000)
    # Bases below a 4 KiB boundary that are multiples of the word only.
    bases = {region: n * 16384 + 4096 - arch.word_bytes * rng.randint(1, 9)
             for n, region in enumerate((REGION, OTHER_REGION))}  # fmt: skip
    memory = AxiMemory(
        size=SIZE, bus_bytes=arch.bus_bytes, seed=rng.getrandbits(32), max_beats=arch.burst_beats,
        max_bursts=arch.outstanding, stall=stall, latency=(0, 12 * seed),
        windows=[(base, base + size) for base in bases.values()],
    )  # fmt: skip
    loads = [random_load(rng, size // arch.word_bytes, region=rng.choice(list(bases))) for _ in range(8)]
    run = run_load(arch, loads, memory, base=bases[REGION], other_base=bases[OTHER_REGION], size=size, seed=seed,
                   gap=stall / 2, write_stall=stall)  # fmt: skip
    note = f"{lanes=} {bus_bits=} {seed=}"
    writes = [expected(arch, load, memory.data, bases[load["region"]]) for load in loads]
    assert run.writes == flat(writes), note
    # Each done comes right after its last write.
    ends = [sum(map(len, writes[: i + 1])) for i in range(len(loads))]
    assert run.done == [run.write_cycles[n - 1] + 1 for n in ends], note
    assert memory.touched == set().union(*(touched(arch, load, bases[load["region"]]) for load in loads)), note
    assert not run.errors, note
    assert not run.busy[-1], note
    assert run.idle_at_end, note


@pytest.mark.parametrize(("lanes", "bus_bits"), RATIOS)
def test_long_rows_have_no_gap(lanes: int, bus_bits: int) -> None:
    arch = make_arch(lanes, bus_bits, burst_beats=16, outstanding=4)
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1, latency=(6, 6))
    load = isa.make(Opcode.LOAD, region=REGION, dram_addr=3, count0=37, count1=3, count2=2, dram_step1=37,
                    dram_step2=128, local_step1=37, local_step2=111)  # fmt: skip
    loads = [load, isa.make(Opcode.LOAD, region=REGION, target=1, dram_addr=500, count0=100), load]
    run = run_load(arch, loads, memory, base=0, size=SIZE)
    words = [len(copied_words(x)) for x in loads]
    # The docstring's cycles: here R comes 7 cycles after ARVALID, which is taken at once.
    latency = 7
    assert run.ar[0] - run.commands[0] == LoadDma.AR_LATENCY
    assert run.write_cycles[0] - run.commands[0] == (
        LoadDma.AR_LATENCY + latency + (arch.beats_per_word - 1) + LoadDma.WRITE_LATENCY
    )
    first = LoadDma.AR_LATENCY + latency + words[0] * arch.beats_per_word + LoadDma.WRITE_LATENCY
    assert run.done[0] - run.commands[0] == first
    for n in (1, 2):
        assert run.done[n] - run.done[n - 1] == words[n] * arch.beats_per_word
    # Busy throughout, and stalled but for the words that arrived.
    assert run.busy.index(True) == run.commands[0] + 1
    assert sum(run.busy) == run.done[2] - run.commands[0] - 1
    assert run.stalls == sum(run.busy) - sum(words)


@pytest.mark.parametrize(("row", "cycles"), [(1, 2), (2, 2), (3, 3), (8, 8)])
def test_short_rows(row: int, cycles: int) -> None:
    """One burst per row: 2 cycles for a row of one word, the row's words for others."""
    arch = make_arch(outstanding=16)
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1)
    load = isa.make(Opcode.LOAD, region=REGION, count0=row, count1=32, dram_step1=8, local_step1=row)
    run = run_load(arch, [load], memory, base=0, size=SIZE)
    assert run.write_cycles[-1] - run.write_cycles[row - 1] == 31 * cycles
    assert len(run.ar) == 32


def test_short_instructions() -> None:
    """The docstring's cycles from instruction to instruction."""
    arch = make_arch(outstanding=16)
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1, latency=(6, 6))
    run = run_load(arch, [isa.make(Opcode.LOAD, region=REGION)] * 4, memory, base=0, size=SIZE)
    assert run.ar[1] - run.ar[0] == 4
    assert run.commands[2:] == [cycle + 1 for cycle in run.done[:2]]


@pytest.mark.parametrize("seed", range(12))
def test_bus_errors(seed: int) -> None:
    rng = random.Random(seed)
    lanes, bus_bits = rng.choice(RATIOS)
    arch = make_arch(lanes, bus_bits)
    loads = [random_load(rng, 1000, longest=12) for _ in range(3)]
    bad_burst, bad_beat, response = rng.randint(0, 12), rng.randrange(arch.burst_beats), rng.choice([2, 3])
    memory = AxiMemory(
        size=SIZE, bus_bytes=arch.bus_bytes, seed=seed, stall=0.3, latency=(0, 9),
        respond=lambda burst, beat: response if (burst, beat) == (bad_burst, bad_beat) else 1,
    )  # fmt: skip
    run = run_load(arch, loads, memory, base=64, size=SIZE - 64, seed=seed, write_stall=0.3,
                   until=lambda r: len(r.done) == 3 or bool(r.errors), tail=200)  # fmt: skip
    writes = [expected(arch, load, memory.data, 64) for load in loads]
    sent = [b for b in memory.bursts if b.number == bad_burst and b.beats > bad_beat]
    note = f"{seed=} {lanes=} {bus_bits=} {bad_burst=} {bad_beat=}"
    if not sent:
        assert not run.errors, note
        assert run.writes == flat(writes), note
        return
    # All words before the bad one are written, none behind it; instructions before report done.
    good = sum(b.beats for b in memory.bursts[:bad_burst]) + bad_beat
    good_words = good // arch.beats_per_word
    assert run.writes == flat(writes)[:good_words], note
    finished = sum(sum(map(len, writes[: i + 1])) <= good_words for i in range(3))
    assert [(cause, done) for _, cause, done in run.errors] == [(ErrorCause.BUS_READ, finished)], note
    assert len(run.done) == finished, note
    assert run.idle_at_end, note
    assert memory.in_flight == 0, note
    # Nothing new leaves once the error is reported.
    assert all(cycle <= run.errors[0][0] for cycle in run.ar), note


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(("lanes", "bus_bits"), RATIOS)
def test_last_word_of_region(lanes: int, bus_bits: int, extra: int) -> None:
    """The last word may be read, the next one not."""
    arch = make_arch(lanes, bus_bits, burst_beats=16)
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1, windows=[(0, 50 * arch.word_bytes)])
    load = isa.make(Opcode.LOAD, region=REGION, dram_addr=49 - 3, count0=4 + extra)
    size = 51 * arch.word_bytes - 1
    run = run_load(arch, [load], memory, base=0, size=size, until=lambda r: bool(r.done or r.errors))
    assert [cause for _, cause, _ in run.errors] == [ErrorCause.REGION] * extra
    assert len(run.done) == 1 - extra


@pytest.mark.parametrize("seed", range(12))
def test_region_errors(seed: int) -> None:
    rng = random.Random(seed)
    lanes, bus_bits = rng.choice(RATIOS)
    arch = make_arch(lanes, bus_bits)
    words = rng.choice([0, 1, 100, 300])
    base = 128 * rng.randint(0, 3)
    size = words * arch.word_bytes + rng.randrange(arch.word_bytes)
    good = [random_load(rng, words, longest=12) for _ in range(words > 1)]
    bad = random_copy(rng, Opcode.LOAD, words=1000, region=REGION, longest=30, least=words)
    memory = AxiMemory(
        size=SIZE, bus_bytes=arch.bus_bytes, seed=seed, stall=0.3, latency=(0, 9), windows=[(base, base + size)]
    )
    run = run_load(arch, [*good, bad], memory, base=base, size=size, seed=seed, write_stall=0.3,
                   until=lambda r: bool(r.errors), tail=50)  # fmt: skip
    note = f"{seed=} {lanes=} {bus_bits=} {words=}"
    assert [(cause, done) for _, cause, done in run.errors] == [(ErrorCause.REGION, len(good))], note
    assert len(run.done) == len(good), note
    # Whole bursts before the refused one were copied; it holds the first word outside.
    before = flat(expected(arch, x, memory.data, base) for x in good)
    inside = 0
    for _, dram in copied_words(bad):
        if dram >= words:
            break
        inside += 1
    copied = len(run.writes) - len(before)
    longest = arch.burst_beats // arch.beats_per_word
    assert inside - longest < copied <= inside, note
    assert run.writes == (before + expected(arch, bad, memory.data, base))[: len(run.writes)], note
    assert run.idle_at_end, note


@pytest.mark.parametrize(
    ("base", "size", "dram_addr", "count2", "dram_step2"),
    [
        (2, 4096, 0, 1, 0),  # base is no multiple of the word
        (0xFFFFF000, 0xFFFFFFFF, 1024, 1, 0),  # address beyond 2**32
        (0, 0xFFFFFFFF, (1 << 28) - 1, 4096, (1 << 24) - 1),  # offset beyond 2**32 bytes, after bursts inside
    ],
)
def test_extreme_regions(base: int, size: int, dram_addr: int, count2: int, dram_step2: int) -> None:
    arch = make_arch()
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1, windows=[(base, min(base + size, 1 << 32))])
    memory.data = SparseBytes()  # type: ignore[assignment]
    load = isa.make(Opcode.LOAD, region=REGION, dram_addr=dram_addr, count2=count2, dram_step2=dram_step2)
    run = run_load(arch, [load], memory, base=base, size=size, until=lambda r: bool(r.errors))
    assert [cause for _, cause, _ in run.errors] == [ErrorCause.REGION]
    limit = min(size, (1 << 32) - base) if base % arch.word_bytes == 0 else 0
    inside = [dram for _, dram in copied_words(load) if (dram + 1) * arch.word_bytes <= limit]
    assert len(run.writes) == len(inside)


class SparseBytes:
    """4 GiB that read as zeros."""

    def __getitem__(self, key: slice) -> bytes:
        return bytes(key.stop - key.start)


@pytest.mark.parametrize("stop_at", range(1, 40, 2))
def test_stop_drains(stop_at: int) -> None:
    rng = random.Random(stop_at)
    lanes, bus_bits = rng.choice(RATIOS)
    arch = make_arch(lanes, bus_bits, outstanding=16)
    loads = [random_load(rng, 1000, longest=4) for _ in range(6)]
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=stop_at, stall=rng.choice([0, 0.3]), latency=(0, 20))
    run = run_load(arch, loads, memory, base=0, size=SIZE, seed=stop_at, write_stall=0.3, stop_at=stop_at,
                   until=lambda r: True, tail=400)  # fmt: skip
    note = f"{stop_at=} {lanes=} {bus_bits=}"
    assert run.idle_at_end, note
    assert memory.in_flight == 0, note
    assert all(cycle <= stop_at + 1 for cycle in run.ar), note
    assert all(cycle <= stop_at + 1 for cycle in run.commands), note
    assert not run.errors, note
    everything = flat(expected(arch, load, memory.data, 0) for load in loads)
    assert run.writes == everything[: len(run.writes)], note


def test_reset_after_stop() -> None:
    """A reset while idle leads out of the stop, in the middle of an instruction too."""
    arch = make_arch(16, 32)
    dut, reset = LoadDma(arch=arch), Signal()
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1, latency=(3, 3))
    load = isa.make(Opcode.LOAD, region=REGION, count0=40, local_addr=7)
    writes: list[tuple[int, int]] = []

    async def bench(ctx: Any) -> None:
        ctx.set(dut.region, {"base": 0, "size": SIZE})
        ctx.set(dut.act.ready, 1)
        ctx.set(dut.act_ready_next, 1)
        await put(ctx, dut.command, isa.encode(load))
        for _ in range(20):
            await ctx.tick()
        ctx.set(dut.stop, 1)
        await ctx.tick()
        while not ctx.get(dut.idle):
            await ctx.tick()
        assert ctx.get(dut.busy)
        ctx.set(reset, 1)
        await ctx.tick()
        ctx.set(reset, 0)
        ctx.set(dut.stop, 0)
        assert not ctx.get(dut.busy)
        await put(ctx, dut.command, isa.encode(load))
        while not ctx.get(dut.done_stb):
            _, _, valid, addr, data = await ctx.tick().sample(dut.act.valid, dut.act.addr, dut.act.data)
            if valid:
                writes.append((addr, data))

    simulate(ResetInserter(reset)(dut), bench, background=[memory.reader(dut.bus)])
    assert writes == [(addr, word) for _, addr, word in expected(arch, load, memory.data, 0)]
