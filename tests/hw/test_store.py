# amaranth: UnusedElaboratable=no
"""StoreDma against an AXI memory that checks its master, and a Python model of STORE."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from amaranth import ResetInserter, Signal

from nibblecore.arch import isa
from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Instruction, Opcode
from nibblecore.arch.regs import ErrorCause
from nibblecore_hw.dma.store import StoreDma
from nibblecore_hw.layouts import READ_LATENCY
from nibblecore_sim.models.axi_pysim import AxiMemory
from nibblecore_sim.models.copy3d import copied_words, random_copy
from nibblecore_sim.pysim import Stalls, put, simulate

# (lanes, bus_bits): words of 1/2, 1/4 of the bus, equal, 2 and 4 beats; a bus so wide that W has four groups of bits.
RATIOS = [(8, 64), (4, 64), (8, 32), (16, 32), (32, 32), (32, 128)]
SIZE = 1 << 16
REGION, OTHER_REGION = 3, 6
DEPTH = 256


def make_arch(lanes: int = 8, bus_bits: int = 32, burst_beats: int = 8, outstanding: int = 2) -> ArchConfig:
    return ArchConfig(name="t", lanes=lanes, columns=4, post_lanes=4, acc_depth=16, act_depth=DEPTH, act_banks=2,
                      weight_depth=512, bus_bits=bus_bits, burst_beats=burst_beats,
                      outstanding=outstanding)  # fmt: skip


@dataclass
class Run:
    """What a bench saw, by cycle."""

    commands: list[int] = field(default_factory=list)
    reads: int = 0
    done: list[int] = field(default_factory=list)
    errors: list[tuple[int, int, int]] = field(default_factory=list)  # cycle, cause, instructions done before
    aw: list[int] = field(default_factory=list)
    w: list[tuple[int, int]] = field(default_factory=list)  # cycle of the transfer, strobes
    w_first_valid: int | None = None
    b: list[int] = field(default_factory=list)
    busy: list[bool] = field(default_factory=list)
    stalls: int = 0
    idle_at_end: bool = False


def make_words(arch: ArchConfig, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.getrandbits(arch.word_bits) for _ in range(DEPTH)]


def run_store(
    arch: ArchConfig,
    stores: Sequence[Instruction],
    memory: AxiMemory,
    words: Sequence[int],
    *,
    base: int,
    size: int,
    other_base: int = 0,
    seed: int = 0,
    gap: float = 0.0,
    read_stall: float = 0.0,
    stop_at: int | None = None,
    until: Callable[[Run], bool] | None = None,
    tail: int = 6,
) -> Run:
    """Run instructions until they are done, or ``until`` says so; then ``tail`` more cycles."""
    dut = StoreDma(arch=arch)
    run = Run()
    over = until or (lambda r: len(r.done) == len(stores))
    rng = random.Random(seed)

    async def commands(ctx: Any) -> None:
        pauses = Stalls(gap, seed=seed + 1)
        for store in stores:
            while pauses.pause():
                await ctx.tick()
            ctx.set(dut.region, {"base": other_base if store["region"] == OTHER_REGION else base, "size": size})
            await put(ctx, dut.command, isa.encode(store))

    async def observe(ctx: Any) -> None:
        left, last_aw, cycle = tail, False, 0
        foretold, waits = 0, False
        row_bits = (DEPTH // arch.act_banks).bit_length() - 1
        grants = Stalls(read_stall, seed=seed + 2)
        arriving: list[int | None] = [None] * READ_LATENCY
        bus = dut.bus
        while left:
            ctx.set(dut.stop, stop_at is not None and cycle >= stop_at)
            ctx.set(dut.act.ready, not grants.pause())
            word = arriving.pop(0)
            ctx.set(dut.act.data, rng.getrandbits(arch.word_bits) if word is None else word)
            values = await ctx.tick().sample(
                dut.command.valid & dut.command.ready, dut.done_stb, dut.error_stb, dut.error_cause, dut.busy,
                dut.stall_bus_stb, dut.idle, dut.act.valid & dut.act.ready, dut.act.addr, bus.awvalid, bus.awready,
                bus.wvalid, bus.wready, bus.wstrb, bus.bvalid & bus.bready, dut.act.valid, dut.act_next,
            )  # fmt: skip
            taken, done, error, cause, busy, stall, idle, granted, addr = values[2:11]
            awvalid, awready, wvalid, wready, wstrb, b, asks, foretells = values[11:]
            # One that waits is not told of again.
            assert foretold == (0 if waits or not asks else 1 << (addr >> row_bits)), f"{cycle=} {seed=}"
            foretold, waits = foretells, asks and not granted
            arriving.append(words[addr] if granted else None)
            run.reads += granted
            if taken:
                run.commands.append(cycle)
            if done:
                run.done.append(cycle)
            if error:
                run.errors.append((cycle, cause, len(run.done)))
            if awvalid and not last_aw:
                run.aw.append(cycle)
            last_aw = awvalid and not awready
            if wvalid and run.w_first_valid is None:
                run.w_first_valid = cycle
            if wvalid and wready:
                run.w.append((cycle, wstrb))
            if b:
                run.b.append(cycle)
            run.busy.append(bool(busy))
            run.stalls += stall
            run.idle_at_end = bool(idle)
            left -= over(run) and (stop_at is None or cycle >= stop_at)
            cycle += 1

    simulate(dut, observe, background=[commands, memory.writer(dut.bus)], max_cycles=20_000)
    return run


def apply(arch: ArchConfig, stores: Sequence[Instruction], words: Sequence[int], data: bytearray,
          bases: dict[int, int]) -> set[int]:  # fmt: skip
    """Execute the instructions on ``data``; returns the bytes that were written."""
    touched = set()
    for store in stores:
        for local, dram in copied_words(store):
            where = bases[store["region"]] + dram * arch.word_bytes
            data[where : where + arch.word_bytes] = words[local % DEPTH].to_bytes(arch.word_bytes, "little")
            touched.update(range(where, where + arch.word_bytes))
    return touched


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("lanes", "bus_bits"), RATIOS)
def test_random_stores(lanes: int, bus_bits: int, seed: int) -> None:
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
    data, words = bytearray(memory.data), make_words(arch, seed)
    stores = [random_copy(rng, Opcode.STORE, words=size // arch.word_bytes, region=rng.choice(list(bases)))
              for _ in range(8)]  # fmt: skip
    run = run_store(arch, stores, memory, words, base=bases[REGION], other_base=bases[OTHER_REGION], size=size,
                    seed=seed, gap=stall / 2, read_stall=stall)  # fmt: skip
    note = f"{lanes=} {bus_bits=} {seed=}"
    assert memory.touched == apply(arch, stores, words, data, bases), note
    assert memory.data == data, note
    # Each done comes right after the last response to its bursts.
    assert set(run.done) <= {cycle + 1 for cycle in run.b}, note
    assert run.done[-1] == run.b[-1] + 1, note
    assert not run.errors, note
    assert not run.busy[-1], note
    assert run.idle_at_end, note
    assert memory.in_flight == 0, note


def test_done_waits_for_its_own_responses() -> None:
    """With slow responses, the number of bursts answered at each done is that of all instructions so far."""
    arch = make_arch(outstanding=8)
    rng = random.Random(5)
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=5, latency=(5, 30))
    stores = [random_copy(rng, Opcode.STORE, words=2000, region=REGION, longest=6) for _ in range(6)]
    run = run_store(arch, stores, memory, make_words(arch, 1), base=0, size=SIZE)
    answered = [sum(cycle < done for cycle in run.b) for done in run.done]
    bursts = []
    for store in stores:
        rows = [copied_words(store)[n : n + store["count0"]]
                for n in range(0, len(copied_words(store)), store["count0"])]  # fmt: skip
        bursts.append(sum(row[-1][1] // 8 - row[0][1] // 8 + 1 for row in rows))
    assert answered == [sum(bursts[: n + 1]) for n in range(6)]


@pytest.mark.parametrize(("lanes", "bus_bits"), RATIOS)
def test_long_rows_have_no_gap(lanes: int, bus_bits: int) -> None:
    arch = make_arch(lanes, bus_bits, burst_beats=16, outstanding=8)
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1, latency=(6, 6))
    store = isa.make(Opcode.STORE, region=REGION, dram_addr=3, count0=37, count1=3, count2=2, dram_step1=37,
                     dram_step2=128, local_step1=37, local_step2=111)  # fmt: skip
    stores = [store, isa.make(Opcode.STORE, region=REGION, dram_addr=500, count0=100), store]
    run = run_store(arch, stores, memory, make_words(arch, 1), base=0, size=SIZE)
    beats = [len(copied_words(x)) * arch.beats_per_word for x in stores]
    # The docstring's cycles; here a response comes 7 cycles after WLAST.
    response = 7
    assert run.aw[0] - run.commands[0] == StoreDma.AW_LATENCY
    assert run.w_first_valid == run.commands[0] + StoreDma.W_LATENCY
    assert [cycle for cycle, _ in run.w] == [run.commands[0] + StoreDma.W_LATENCY + n for n in range(sum(beats))]
    done = run.commands[0] + StoreDma.W_LATENCY + beats[0] - 1 + response + 1
    assert run.done == [done, done + beats[1], done + beats[1] + beats[2]]
    assert run.busy.index(True) == run.commands[0] + 1
    assert sum(run.busy) == run.done[2] - run.commands[0] - 1
    assert run.stalls == sum(run.busy) - sum(beats) // arch.beats_per_word


@pytest.mark.parametrize(("row", "cycles"), [(1, 2), (2, 2), (3, 3), (8, 8)])
def test_short_rows(row: int, cycles: int) -> None:
    """One burst per row: 2 cycles for a row of one word, the row's words for others."""
    arch = make_arch(outstanding=16)
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1)
    store = isa.make(Opcode.STORE, region=REGION, count0=row, count1=32, dram_step1=8, local_step1=row)
    run = run_store(arch, [store], memory, make_words(arch, 1), base=0, size=SIZE)
    # From the eighth row on: the first ones wait for the buffer.
    assert run.w[-1][0] - run.w[8 * row - 1][0] == 24 * cycles
    assert len(run.aw) == 32


def test_short_instructions() -> None:
    """The docstring's cycles from instruction to instruction."""
    arch = make_arch(outstanding=16)
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1, latency=(6, 6))
    stores = [isa.make(Opcode.STORE, region=REGION, count0=4)] * 4
    run = run_store(arch, stores, memory, make_words(arch, 1), base=0, size=SIZE)
    # As many by its address as by its 4 words.
    assert [cycle - run.aw[0] for cycle in run.aw] == [0, 4, 8, 12]


@pytest.mark.parametrize("seed", range(12))
def test_bus_errors(seed: int) -> None:
    rng = random.Random(seed)
    lanes, bus_bits = rng.choice(RATIOS)
    arch = make_arch(lanes, bus_bits, outstanding=4)
    stores = [random_copy(rng, Opcode.STORE, words=1000, region=REGION, longest=12) for _ in range(3)]
    bad_burst, response = rng.randint(0, 16), rng.choice([2, 3])
    memory = AxiMemory(
        size=SIZE, bus_bytes=arch.bus_bytes, seed=seed, stall=0.3, latency=(0, 9),
        respond=lambda burst, beat: response if burst == bad_burst else 1,
    )  # fmt: skip
    run = run_store(arch, stores, memory, make_words(arch, seed), base=64, size=SIZE - 64, seed=seed, read_stall=0.3,
                    until=lambda r: len(r.done) == 3 or bool(r.errors), tail=200)  # fmt: skip
    note = f"{seed=} {lanes=} {bus_bits=} {bad_burst=}"
    assert run.idle_at_end, note
    assert memory.in_flight == 0, note
    if bad_burst >= len(memory.bursts):
        assert len(run.done) == 3, note
        assert not run.errors, note
        return
    assert run.errors == [(run.b[bad_burst] + 1, ErrorCause.BUS_WRITE, len(run.done))], note
    assert all(cycle <= run.errors[0][0] for cycle in run.aw), note
    assert len(run.done) < 3, note


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(("lanes", "bus_bits"), RATIOS)
def test_last_word_of_region(lanes: int, bus_bits: int, extra: int) -> None:
    """The last word may be written, the next one not."""
    arch = make_arch(lanes, bus_bits, burst_beats=16)
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1, windows=[(0, 50 * arch.word_bytes)])
    store = isa.make(Opcode.STORE, region=REGION, dram_addr=49 - 3, count0=4 + extra)
    run = run_store(arch, [store], memory, make_words(arch, 1), base=0, size=51 * arch.word_bytes - 1,
                    until=lambda r: bool(r.done or r.errors))  # fmt: skip
    assert [cause for _, cause, _ in run.errors] == [ErrorCause.REGION] * extra
    assert len(run.done) == 1 - extra


@pytest.mark.parametrize("seed", range(12))
def test_region_errors(seed: int) -> None:
    rng = random.Random(seed)
    lanes, bus_bits = rng.choice(RATIOS)
    arch = make_arch(lanes, bus_bits)
    limit = rng.choice([0, 1, 100, 300])
    base = 128 * rng.randint(0, 3)
    size = limit * arch.word_bytes + rng.randrange(arch.word_bytes)
    good = [random_copy(rng, Opcode.STORE, words=limit, region=REGION, longest=12) for _ in range(limit > 1)]
    bad = random_copy(rng, Opcode.STORE, words=1000, region=REGION, longest=30, least=limit)
    memory = AxiMemory(
        size=SIZE, bus_bytes=arch.bus_bytes, seed=seed, stall=0.3, latency=(0, 9), windows=[(base, base + size)]
    )
    before, words = bytearray(memory.data), make_words(arch, seed)
    run = run_store(arch, [*good, bad], memory, words, base=base, size=size, seed=seed, read_stall=0.3,
                    until=lambda r: bool(r.errors), tail=50)  # fmt: skip
    note = f"{seed=} {lanes=} {bus_bits=} {limit=}"
    assert [(cause, done) for _, cause, done in run.errors] == [(ErrorCause.REGION, len(good))], note
    assert len(run.done) == len(good), note
    assert run.idle_at_end, note
    # What left before was answered, so the memory holds a whole number of bursts, all words right.
    written = sum(b.beats for b in memory.bursts) // arch.beats_per_word
    everything = [(store["region"], *w) for store in [*good, bad] for w in copied_words(store)]
    for _, local, dram in everything[:written]:
        where = base + dram * arch.word_bytes
        before[where : where + arch.word_bytes] = words[local % DEPTH].to_bytes(arch.word_bytes, "little")
    assert memory.data == before, note
    assert everything[written:], note


@pytest.mark.parametrize("stop_at", range(1, 60, 2))
def test_stop_drains(stop_at: int) -> None:
    rng = random.Random(stop_at)
    lanes, bus_bits = rng.choice(RATIOS)
    arch = make_arch(lanes, bus_bits, outstanding=16)
    stores = [random_copy(rng, Opcode.STORE, words=1000, region=REGION, longest=6) for _ in range(6)]
    stall = rng.choice([0, 0.3])
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=stop_at, stall=stall, latency=(0, 20))
    before, words = bytes(memory.data), make_words(arch, stop_at)
    run = run_store(arch, stores, memory, words, base=0, size=SIZE, seed=stop_at, read_stall=stall, stop_at=stop_at,
                    until=lambda r: True, tail=400)  # fmt: skip
    note = f"{stop_at=} {lanes=} {bus_bits=}"
    assert run.idle_at_end, note
    assert memory.in_flight == 0, note
    assert all(cycle <= stop_at + 1 for cycle in run.aw), note
    assert all(cycle <= stop_at + 1 for cycle in run.commands), note
    assert not run.errors, note
    assert len(run.w) == sum(b.beats for b in memory.bursts), note
    # Beats with strobes come first; behind the cycle of the stop, at most two of the three that it leaves alone.
    enabled = [bool(strobe) for _, strobe in run.w]
    count = sum(enabled)
    assert enabled == [True] * count + [False] * (len(enabled) - count), note
    assert sum(bool(strobe) and cycle > stop_at for cycle, strobe in run.w) <= 2, note
    # What was written is right: the first `count` beats of the copy.
    expected, beat_bytes = bytearray(before), min(arch.word_bytes, arch.bus_bytes)
    beats = [(local, dram, part) for store in stores for local, dram in copied_words(store)
             for part in range(arch.beats_per_word)]  # fmt: skip
    for local, dram, part in beats[:count]:
        value = words[local % DEPTH].to_bytes(arch.word_bytes, "little")[part * beat_bytes : (part + 1) * beat_bytes]
        where = dram * arch.word_bytes + part * beat_bytes
        expected[where : where + beat_bytes] = value
    assert memory.data == expected, note


@pytest.mark.parametrize(("lanes", "bus_bits"), [(16, 32), (32, 128)])
def test_reset_after_stop(lanes: int, bus_bits: int) -> None:
    """A reset while idle leads out of the stop, in the middle of an instruction too."""
    arch = make_arch(lanes, bus_bits)
    dut, reset = StoreDma(arch=arch), Signal()
    memory = AxiMemory(size=SIZE, bus_bytes=arch.bus_bytes, seed=1, latency=(3, 3))
    store = isa.make(Opcode.STORE, region=REGION, count0=40)

    async def bench(ctx: Any) -> None:
        ctx.set(dut.region, {"base": 0, "size": SIZE})
        ctx.set(dut.act.ready, 1)
        ctx.set(dut.act.data, int.from_bytes(b"\x11" * arch.word_bytes))
        await put(ctx, dut.command, isa.encode(store))
        for _ in range(30):
            await ctx.tick()
        ctx.set(dut.stop, 1)
        await ctx.tick()
        while not ctx.get(dut.idle):
            await ctx.tick()
        ctx.set(reset, 1)
        await ctx.tick()
        ctx.set(reset, 0)
        ctx.set(dut.stop, 0)
        assert not ctx.get(dut.busy)
        ctx.set(dut.act.data, int.from_bytes(b"\x22" * arch.word_bytes))
        await put(ctx, dut.command, isa.encode(store))
        while not ctx.get(dut.done_stb):
            await ctx.tick()

    simulate(ResetInserter(reset)(dut), bench, background=[memory.writer(dut.bus)])
    assert memory.data[: 40 * arch.word_bytes] == b"\x22" * (40 * arch.word_bytes)
