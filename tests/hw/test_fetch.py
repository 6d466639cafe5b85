# amaranth: UnusedElaboratable=no
"""Fetch against an AXI memory that stalls and fails at random, and a Python model of what must be dispatched."""

import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from amaranth.sim import SimulatorContext

from nibblecore.arch import isa
from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import INSTRUCTION_BITS, INSTRUCTION_BYTES, INSTRUCTIONS, Engine, Opcode
from nibblecore.arch.regs import ErrorCause
from nibblecore_hw.ctrl.decode import Decoder
from nibblecore_hw.ctrl.fetch import Fetch
from nibblecore_hw.ctrl.instructions import BUFFERED
from nibblecore_sim.pysim import Stalls, simulate

ENGINE_OPCODES = [op for op in Opcode if op is not Opcode.END]


def arch(bus_bits: int = 64, **changes: Any) -> ArchConfig:
    base = ArchConfig(name="t", lanes=4, columns=4, post_lanes=2, acc_depth=16, act_depth=256, weight_depth=256)
    return base.replace(bus_bits=bus_bits, **{"burst_beats": min(64, 32768 // bus_bits), **changes})


def random_word(rng: random.Random, opcode: Opcode) -> int:
    """A legal word with random addresses and masks."""
    spec = INSTRUCTIONS[opcode]
    word = isa.encode(isa.make(opcode))
    for name, (low, f) in spec.layout().items():
        if f.allowed is None and name not in ("opcode", "wait", "signal", "add", "add_shift"):
            word |= rng.getrandbits(f.bits) << low
    return word


def random_words(rng: random.Random, count: int) -> list[int]:
    return [random_word(rng, rng.choice(ENGINE_OPCODES)) for _ in range(count)]


END = isa.encode(isa.make(Opcode.END))


class Queues:
    """The rings of instructions: beats that fetch writes into their slots, and words that it says are instructions.

    ``ready`` says each cycle which queues have room.
    """

    def __init__(self, dut: Fetch, ready: Callable[[Engine], bool]) -> None:
        self.dut, self.ready = dut, ready
        self.got: list[tuple[Engine, int, int]] = []
        self.started()

    def started(self) -> None:
        """A start is at hand: all rings are empty."""
        self.slots: dict[tuple[int, int], list[tuple[int, int]]] = {}  # beats and parts of the index
        self.written, self.queued = 0, [0] * len(Engine)

    async def __call__(self, ctx: SimulatorContext) -> None:
        dut, write = self.dut, self.dut.write
        bits, part = len(write.beat.bits), len(write.beat.index)
        offered, before = 0, 0
        while True:
            room = sum(self.ready(e) << e for e in Engine)
            ctx.set(dut.room, room)
            _, _, en, engine, slot, number, beat, index, queue, start = await ctx.tick().sample(
                write.en, write.engine, write.slot, write.number, write.beat.bits, write.beat.index, dut.queue,
                dut.start_stb,
            )  # fmt: skip
            assert queue == offered or not offered, "what was offered stays until there is room"
            offered = queue & ~room
            if queue & room:
                owner = Engine(queue.bit_length() - 1)
                assert queue == 1 << owner, "two queues at once"
                ring = 1 << len(write.slot)
                beats = self.slots.pop((owner, self.queued[owner] % ring))
                assert len(beats) * bits == INSTRUCTION_BITS
                word = sum(b << n * bits for n, (b, _) in enumerate(beats))
                self.got.append((owner, word, sum(i << n * part for n, (_, i) in enumerate(beats))))
                self.queued[owner] += 1
            if en:
                assert number == 0 or (engine, slot) == before, "a word goes to one slot"
                before = engine, slot
                beats = self.slots.setdefault(before, [])
                beats[:] = beats if number else []
                assert number == len(beats)
                beats.append((beat, index))
            assert sum(len(b) for b in self.slots.values()) * bits <= (BUFFERED + 1) * INSTRUCTION_BITS
            if start:
                self.started()


@dataclass
class Outcome:
    dispatched: list[tuple[Engine, int, int]] = field(default_factory=list)
    ended: bool = False
    error: tuple[ErrorCause, int] | None = None


def model(words: Sequence[int], *, size: int, failing: Sequence[int] = ()) -> Outcome:
    """What a program of ``words`` does in a region of ``size`` bytes whose ``failing`` offsets answer with an error."""
    outcome = Outcome()
    for index in range(1 << 20):
        start = index * INSTRUCTION_BYTES
        if start + INSTRUCTION_BYTES > size:
            outcome.error = (ErrorCause.REGION, index)
            return outcome
        if any(start <= offset < start + INSTRUCTION_BYTES for offset in failing):
            outcome.error = (ErrorCause.BUS_READ, index)
            return outcome
        word = words[index] if index < len(words) else 0
        if not Decoder.is_legal(word):
            outcome.error = (ErrorCause.ILLEGAL_INSTRUCTION, index)
            return outcome
        engine = Decoder.model(word)
        if engine is None:
            outcome.ended = True
            return outcome
        outcome.dispatched.append((engine, word, index))
    raise AssertionError("the program does not end")


class Bus:
    """AXI4 read slave with random stalls; checks what a master must observe. Bytes outside of the memory are 0xA5."""

    def __init__(
        self,
        dut: Fetch,
        cfg: ArchConfig,
        *,
        base: int,
        data: bytes,
        size: int,
        seed: int,
        failing: Sequence[int] = (),
        resp: int = 2,
        ar: float = 0.0,
        r: float = 0.0,
        latency: int = 3,
    ) -> None:
        self.dut, self.cfg, self.base, self.data, self.size = dut, cfg, base, data, size
        self.failing, self.resp, self.latency = failing, resp, latency
        self.ar, self.r = Stalls(ar, seed=seed), Stalls(r, seed=seed + 1)
        self.pending: deque[tuple[int, int, int, bool]] = deque()  # (not before cycle, address, bytes, last)
        self.bursts: list[tuple[int, int]] = []
        self.note = f"seed {seed}"

    async def __call__(self, ctx: SimulatorContext) -> None:
        axi, cycle, held, ready, sent = self.dut.axi, 0, None, False, False
        while True:
            _, _, valid, addr, length, size, burst, lock, rready = await ctx.tick().sample(
                axi.arvalid, axi.araddr, axi.arlen, axi.arsize, axi.arburst, axi.arlock, axi.rready
            )
            cycle += 1
            if held is not None:
                assert valid, f"arvalid fell ({self.note})"
                assert (addr, length) == held, f"the address changed while it waited ({self.note})"
            held = (addr, length) if valid and not ready else None
            if valid and ready:
                self.accept(cycle, addr, length + 1, size, burst, lock)
            if sent:
                assert rready, f"rready is low: fetch could block the read channel ({self.note})"
                self.pending.popleft()
            ready = not self.ar.pause()
            ctx.set(axi.arready, ready)
            sent = bool(self.pending) and self.pending[0][0] <= cycle and not self.r.pause()
            ctx.set(axi.rvalid, sent)
            if sent:
                _, address, count, last = self.pending[0]
                lane = address % self.cfg.bus_bytes
                value = random.Random(address).getrandbits(self.cfg.bus_bits)  # other lanes hold noise
                for i in range(count):
                    offset = address + i - self.base
                    byte = self.data[offset] if 0 <= offset < len(self.data) else 0xA5
                    value = value & ~(0xFF << 8 * (lane + i)) | byte << 8 * (lane + i)
                bad = any(address <= self.base + f < address + count for f in self.failing)
                ctx.set(axi.rdata, value)
                ctx.set(axi.rresp, self.resp if bad else 0)
                ctx.set(axi.rlast, last)

    def accept(self, cycle: int, addr: int, beats: int, size: int, burst: int, lock: int) -> None:
        count = 1 << size
        assert (burst, lock) == (1, 0), self.note
        assert count == min(self.cfg.bus_bytes, INSTRUCTION_BYTES), self.note
        assert addr % count == 0, self.note
        assert beats <= self.cfg.burst_beats, self.note
        assert addr // 4096 == (addr + beats * count - 1) // 4096, f"{addr:#x}+{beats * count} crosses ({self.note})"
        assert self.base <= addr, self.note
        assert addr + beats * count <= self.base + self.size // INSTRUCTION_BYTES * INSTRUCTION_BYTES, self.note
        assert addr + beats * count <= 1 << self.cfg.addr_bits, self.note
        self.bursts.append((addr, beats))
        for n in range(beats):
            self.pending.append((cycle + self.latency, addr + n * count, count, n == beats - 1))


def run(
    cfg: ArchConfig,
    words: Sequence[int],
    *,
    base: int = 0x1000,
    size: int | None = None,
    seed: int = 0,
    failing: Sequence[int] = (),
    resp: int = 2,
    ar: float = 0.0,
    r: float = 0.0,
    queue: float = 0.0,
    latency: int = 3,
    extra: int = 60,
) -> tuple[Outcome, Bus]:
    """Start fetch once, and collect what it does until it has stopped and some cycles more."""
    data = b"".join(w.to_bytes(INSTRUCTION_BYTES, "little") for w in words)
    size = len(data) if size is None else size
    data = data.ljust(size, b"\0")
    dut = Fetch(arch=cfg, axi_id=1, id_bits=2)
    bus = Bus(
        dut, cfg, base=base, data=data, size=size, seed=seed, failing=failing, resp=resp, ar=ar, r=r, latency=latency
    )
    outcome = Outcome()

    async def start(ctx: SimulatorContext) -> None:
        assert ctx.get(dut.idle)
        ctx.set(dut.region, {"base": base, "size": size})
        ctx.set(dut.start_stb, 1)
        await ctx.tick()
        ctx.set(dut.start_stb, 0)
        ctx.set(dut.region, {"base": 0xFFFFFFFF, "size": 0xFFFFFFFF})  # it is sampled at the start only
        while not ctx.get(dut.ended) and not outcome.error:
            await ctx.tick()
        for _ in range(extra):
            await ctx.tick()
        while not ctx.get(dut.idle):
            await ctx.tick()
        outcome.ended = bool(ctx.get(dut.ended))

    async def errors(ctx: SimulatorContext) -> None:
        while True:
            _, _, stb, cause, index = await ctx.tick().sample(dut.error_stb, dut.error_cause, dut.index)
            if stb:
                assert outcome.error is None, f"a second error (seed {seed})"
                outcome.error = (ErrorCause(cause), index)

    stalls = {e: Stalls(queue, seed=seed + 10 + e) for e in Engine}
    queues = Queues(dut, lambda e: not stalls[e].pause())
    simulate(dut, start, background=[bus, errors, queues], max_cycles=30000)
    outcome.dispatched = queues.got
    return outcome, bus


@pytest.mark.parametrize("bus_bits", [32, 64, 128, 256, 512])
def test_programs_with_stalls(bus_bits: int) -> None:
    for seed, (ar, r, queue) in enumerate([(0, 0, 0), (0.5, 0, 0), (0, 0.6, 0), (0, 0, 0.8), (0.4, 0.4, 0.4)]):
        rng = random.Random(f"{bus_bits} {seed}")
        words = [*random_words(rng, rng.randrange(1, 25)), END]
        base = rng.randrange(1 << 12) * bus_bits // 8  # any multiple of a beat, so any place before a 4 KiB boundary
        base = base if seed else 4096 - 2 * bus_bits // 8
        outcome, bus = run(arch(bus_bits), words, base=base, seed=seed, ar=ar, r=r, queue=queue, latency=seed * 7)
        assert outcome == model(words, size=len(words) * INSTRUCTION_BYTES), f"seed {seed}"
        assert bus.bursts[0][0] == base


@pytest.mark.parametrize(("burst_beats", "outstanding"), [(1, 1), (2, 4), (4, 2), (64, 1)])
def test_short_bursts(burst_beats: int, outstanding: int) -> None:
    rng = random.Random(burst_beats)
    words = [*random_words(rng, 9), END]
    outcome, bus = run(arch(burst_beats=burst_beats, outstanding=outstanding), words, base=0x1FF8, r=0.3, latency=9)
    assert outcome == model(words, size=len(words) * INSTRUCTION_BYTES)
    assert max(beats for _, beats in bus.bursts) == min(burst_beats, 8)


@pytest.mark.parametrize("bus_bits", [32, 64, 512])
@pytest.mark.parametrize("at", [0, 1, 2, 6])
def test_an_illegal_word_stops_and_nothing_behind_it_is_dispatched(bus_bits: int, at: int) -> None:
    rng = random.Random(f"{bus_bits} {at}")
    for illegal in (0, (1 << INSTRUCTION_BITS) - 1, END | 1 << 255, 0xF, END | 1 << 4):
        words = [*random_words(rng, at), illegal, *random_words(rng, 6), END]
        expected = model(words, size=len(words) * INSTRUCTION_BYTES)
        assert expected.error == (ErrorCause.ILLEGAL_INSTRUCTION, at)
        outcome, _ = run(arch(bus_bits), words)
        assert outcome == expected, hex(illegal)


def test_random_flips_agree_with_the_decoder() -> None:
    """One program after the other with a few flipped bits: dispatched or refused as the model says, never hanging."""
    rng = random.Random(77)
    causes = set()
    for n in range(24):
        words = [*random_words(rng, 5), END]
        for _ in range(rng.randrange(1, 6)):
            words[rng.randrange(len(words))] ^= 1 << rng.randrange(INSTRUCTION_BITS)
        expected = model(words, size=len(words) * INSTRUCTION_BYTES)
        outcome, _ = run(arch(256), words, queue=0.3, seed=n, extra=20)
        assert outcome == expected, f"program {n}: {[hex(w) for w in words]}"
        causes.add(expected.error and expected.error[0])
    assert causes >= {None, ErrorCause.ILLEGAL_INSTRUCTION}


@pytest.mark.parametrize("bus_bits", [32, 64, 512])
def test_a_program_without_end_stops_at_the_region(bus_bits: int) -> None:
    rng = random.Random(bus_bits)
    words = random_words(rng, 7)
    for size in (0, 4, 31, 32, 33, 95, 96, 128, 223):
        outcome, bus = run(arch(bus_bits), words, size=size)
        assert outcome == model(words, size=size), f"size {size}"
        assert outcome.error == (ErrorCause.REGION, size // 32)
        assert bool(bus.bursts) == (size >= 32)


def test_end_in_the_last_instruction_of_the_region_is_no_error() -> None:
    words = [*random_words(random.Random(1), 3), END]
    outcome, _ = run(arch(), words, size=128)
    assert outcome.ended
    assert outcome.error is None


@pytest.mark.parametrize("addr_bits", [16, 20, 32])
def test_nothing_is_read_beyond_the_address_space(addr_bits: int) -> None:
    words = [*random_words(random.Random(addr_bits), 9), END]
    base = (1 << addr_bits) - 5 * INSTRUCTION_BYTES - 8
    outcome, bus = run(arch(addr_bits=addr_bits), words, base=base)
    assert outcome.error == (ErrorCause.REGION, 5)
    assert outcome.dispatched == model(words, size=320).dispatched[:5]
    assert bus.bursts[-1] == ((1 << addr_bits) - 64, 8)


def test_a_base_beyond_the_address_space_is_refused() -> None:
    outcome, bus = run(arch(addr_bits=16), [END], base=0x10000)
    assert outcome.error == (ErrorCause.REGION, 0)
    assert bus.bursts == []


def test_wide_addresses() -> None:
    words = [*random_words(random.Random(5), 9), END]
    outcome, _ = run(arch(addr_bits=40), words, base=0xFFFF_FFF0)
    assert outcome == model(words, size=320)


@pytest.mark.parametrize("resp", [2, 3])
@pytest.mark.parametrize("bus_bits", [32, 128, 512])
def test_a_bus_error_at_any_beat(bus_bits: int, resp: int) -> None:
    rng = random.Random(bus_bits)
    words = [*random_words(rng, 2), END]
    for offset in range(0, len(words) * INSTRUCTION_BYTES, min(bus_bits // 8, INSTRUCTION_BYTES)):
        expected = model(words, size=96, failing=[offset])
        assert expected.error == (ErrorCause.BUS_READ, offset // 32)
        outcome, _ = run(arch(bus_bits), words, failing=[offset], resp=resp, extra=30)
        assert outcome == expected, f"offset {offset}"


def test_exclusive_okay_is_no_error() -> None:
    outcome, _ = run(arch(), [END], failing=[0], resp=1)
    assert outcome.ended


def test_errors_of_data_behind_end_count_for_nothing() -> None:
    words = [*random_words(random.Random(3), 2), END]
    outcome, bus = run(arch(), words, size=1024, failing=range(96, 1024))
    assert outcome == model(words, size=1024)
    assert sum(beats for _, beats in bus.bursts) > 12, "nothing was prefetched: the test tests nothing"


def test_a_full_queue_stops_fetch_and_requests_stop_at_the_buffer() -> None:
    """Head-of-line blocking: only one engine's queue is full, and nothing passes it."""
    cfg = arch(64)
    load = random_word(random.Random(1), Opcode.LOAD)
    mac = random_word(random.Random(2), Opcode.MAC)
    words = [mac, load, *[mac] * 20, END]
    data = b"".join(w.to_bytes(32, "little") for w in words)
    dut = Fetch(arch=cfg)
    bus = Bus(dut, cfg, base=0, data=data, size=len(data), seed=0)

    async def bench(ctx: SimulatorContext) -> None:
        ctx.set(dut.region, {"base": 0, "size": len(data)})
        ctx.set(dut.room, 1 << Engine.MAC)
        ctx.set(dut.start_stb, 1)
        await ctx.tick()
        ctx.set(dut.start_stb, 0)
        for _ in range(200):
            await ctx.tick()
        assert ctx.get(dut.queue) == 1 << Engine.LOAD
        # One has had its turn, and all places behind it are full or asked for.
        assert (1 + BUFFERED - 1) * 4 <= sum(beats for _, beats in bus.bursts) <= (1 + BUFFERED) * 4
        ctx.set(dut.room, 1 << Engine.LOAD | 1 << Engine.MAC)
        while not ctx.get(dut.ended):
            await ctx.tick()
        assert ctx.get(dut.index) == 22

    simulate(dut, bench, background=[bus])


@pytest.mark.parametrize("bus_bits", [64, 256])
def test_cycles(bus_bits: int) -> None:
    """The docstring's figures: first request, first offer, rate."""
    cfg = arch(bus_bits)
    beats = max(1, 256 // bus_bits)
    word = random_word(random.Random(1), Opcode.LOAD)
    data = word.to_bytes(32, "little") * 20
    dut = Fetch(arch=cfg)
    bus = Bus(dut, cfg, base=0, data=data, size=len(data), seed=0, latency=1)
    offers, requested, arrived = [], [], []

    async def bench(ctx: SimulatorContext) -> None:
        ctx.set(dut.region, {"base": 0, "size": len(data)})
        ctx.set(dut.room, 1)
        ctx.set(dut.start_stb, 1)
        for cycle in range(300):
            _, _, offer, request, arrive = await ctx.tick().sample(dut.queue[0], dut.axi.arvalid, dut.axi.rvalid)
            ctx.set(dut.start_stb, 0)
            for seen, log in ((offer, offers), (request, requested), (arrive, arrived)):
                if seen:
                    log.append(cycle)

    simulate(dut, bench, background=[bus])
    assert requested[0] == 3
    assert offers[0] == arrived[0] + beats + 4
    assert len(offers) == 20
    assert all(b - a == max(2, beats) for a, b in itertools.pairwise(offers[:BUFFERED]))  # then the bus lags behind


@pytest.mark.parametrize("seed", range(3))
def test_stop_at_any_time_and_start_again(seed: int) -> None:
    rng = random.Random(seed)
    cfg = arch(64)
    words = [*random_words(rng, 12), END]
    expected = model(words, size=32 * len(words)).dispatched
    data = b"".join(w.to_bytes(32, "little") for w in words)
    dut = Fetch(arch=cfg)
    bus = Bus(dut, cfg, base=0x40, data=data, size=len(data), seed=seed, ar=0.3, r=0.3, latency=5)
    queues = Queues(dut, lambda e: rng.random() < 0.6)
    got = queues.got

    async def bench(ctx: SimulatorContext) -> None:
        ctx.set(dut.region, {"base": 0x40, "size": len(data)})
        for _ in range(25):
            got.clear()
            ctx.set(dut.start_stb, 1)
            await ctx.tick()
            ctx.set(dut.start_stb, 0)
            for _ in range(rng.randrange(60)):
                await ctx.tick()
            ctx.set(dut.stop, 1)
            await ctx.tick()
            requesting = ctx.get(dut.axi.arvalid)
            while not ctx.get(dut.idle) or ctx.get(dut.queue):
                await ctx.tick()
                assert requesting >= ctx.get(dut.axi.arvalid), f"a request after stop (seed {seed})"
                requesting = ctx.get(dut.axi.arvalid)
            for _ in range(8):  # a word that was being decoded is dropped
                await ctx.tick()
            assert got == expected[: len(got)], f"seed {seed}"
            ctx.set(dut.stop, 0)
        got.clear()
        ctx.set(dut.start_stb, 1)
        await ctx.tick()
        ctx.set(dut.start_stb, 0)
        while not ctx.get(dut.ended):
            await ctx.tick()
        assert got == expected, f"seed {seed}"

    simulate(dut, bench, background=[bus, queues])


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"^arch must be an ArchConfig, not 'small'$"):
        Fetch(arch="small")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^id_bits must be in 1\.\.16, not 0$"):
        Fetch(arch=arch(), id_bits=0)
    with pytest.raises(ValueError, match=r"^axi_id must be in 0\.\.3, not 4$"):
        Fetch(arch=arch(), axi_id=4, id_bits=2)
