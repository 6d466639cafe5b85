# amaranth: UnusedElaboratable=no
"""Issue stages and semaphores: order, tokens, holding back, against a Python model with random engine durations."""

import random
from collections import deque

import pytest
from amaranth import Module
from amaranth.hdl import Array, Elaboratable
from amaranth.sim import SimulatorContext

from nibblecore.arch import isa
from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Engine, Opcode
from nibblecore_hw.ctrl.instructions import (
    IN_FLIGHT,
    InstructionMemory,
    beat_bytes,
    beats_of,
    beats_per_instruction,
    slot_bits,
    word_bits,
)
from nibblecore_hw.ctrl.issue import IssueStage
from nibblecore_hw.ctrl.queue import Queue
from nibblecore_hw.ctrl.semaphores import Semaphores
from nibblecore_sim.pysim import simulate

ARCH = ArchConfig(
    name="t",
    lanes=4,
    columns=4,
    post_lanes=2,
    acc_depth=16,
    act_depth=256,
    weight_depth=256,
    semaphore_bits=2,
    queue_depth=4,
)
OPCODES = {Engine.LOAD: Opcode.LOAD, Engine.MAC: Opcode.MAC, Engine.POST: Opcode.POOL, Engine.STORE: Opcode.STORE}


class Cluster(Elaboratable):
    """Four issue stages around instruction memory and semaphores, as in `Control`."""

    def __init__(self, arch: ArchConfig) -> None:
        self.arch = arch
        self.memory = InstructionMemory(arch=arch)
        self.semaphores = Semaphores(bits=arch.semaphore_bits)
        self.stages = {e: IssueStage(arch=arch, engine=e) for e in Engine}

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.semaphores = semaphores = self.semaphores
        m.submodules.memory = memory = self.memory
        m.d.comb += memory.write.slot.eq(Array(self.stages[e].tail for e in Engine)[memory.write.engine])
        for engine, stage in self.stages.items():
            m.submodules[engine.name.lower()] = stage
            m.d.comb += [
                stage.available.eq(semaphores.available[int(engine)]),
                stage.full.eq(semaphores.full[int(engine)]),
                semaphores.take[int(engine)].eq(stage.take),
                semaphores.signal[int(engine)].eq(stage.signal),
                memory.head[int(engine)].eq(stage.head),
                memory.oldest[int(engine)].eq(stage.oldest),
                memory.want[int(engine)].eq(stage.want),
                stage.beat.eq(memory.beat),
                stage.beat_stb.eq(memory.beat_stb[int(engine)]),
                stage.first_stb.eq(memory.first_stb[int(engine)]),
                stage.known_stb.eq(memory.known_stb[int(engine)]),
            ]
        return m

    def write(self, ctx: SimulatorContext, engine: Engine, number: int, word: int, index: int) -> None:
        """Have beat ``number`` of an instruction written at the next edge; none if that is not one of its beats."""
        write, beats = self.memory.write, beats_per_instruction(self.arch)
        bits, part = len(write.beat.bits), len(write.beat.index)
        ctx.set(write.en, number < beats)
        ctx.set(write.engine, engine)
        ctx.set(write.number, number % beats)
        ctx.set(write.beat.bits, word >> number * bits & (1 << bits) - 1)
        ctx.set(write.beat.index, index >> number * part & (1 << part) - 1)

    async def put(self, ctx: SimulatorContext, engine: Engine, word: int, index: int) -> None:
        """Write an instruction, then queue it as soon as there is room; that takes one cycle where there is."""
        for number in range(beats_per_instruction(self.arch) + 1):
            self.write(ctx, engine, number, word, index)
            if number < beats_per_instruction(self.arch):
                await ctx.tick()
        while not ctx.get(self.stages[engine].room):
            await ctx.tick()
        ctx.set(self.stages[engine].queue_stb, 1)
        await ctx.tick()
        ctx.set(self.stages[engine].queue_stb, 0)

    async def index(self, ctx: SimulatorContext, engine: Engine) -> int:
        """Look up the index of the engine's oldest unfinished instruction."""
        ctx.set(self.memory.lookup_engine, engine)
        ctx.set(self.memory.lookup, 1)
        await ctx.tick().until(self.memory.index_stb)
        ctx.set(self.memory.lookup, 0)
        return ctx.get(self.memory.index)


def random_program(rng: random.Random, count: int, maximum: int) -> list[isa.Instruction]:
    """Instructions that can run one after the other in this order, and so in every order that semaphores allow."""
    tokens = {(a, b): 0 for a in Engine for b in Engine if a is not b}
    program = []
    for _ in range(count):
        engine = rng.choice(list(Engine))
        others = [e for e in Engine if e is not engine]
        wait = [a for a in others if tokens[a, engine] and rng.random() < 0.6]
        for a in wait:
            tokens[a, engine] -= 1
        signal = [b for b in others if tokens[engine, b] < maximum and rng.random() < 0.6]
        for b in signal:
            tokens[engine, b] += 1
        program.append(
            isa.make(OPCODES[engine], wait=wait, signal=signal, out_addr=len(program))
            if engine is Engine.POST
            else isa.make(
                OPCODES[engine],
                wait=wait,
                signal=signal,
                **{"x_addr" if engine is Engine.MAC else "local_addr": len(program)},
            )
        )
    return program


def play(seed: int, arch: ArchConfig = ARCH) -> tuple[int, int]:
    """Run a random program; how often an engine was held back, and how often one accepted an instruction ahead."""
    rng = random.Random(seed)
    maximum = Semaphores(bits=ARCH.semaphore_bits).maximum
    program = random_program(rng, 150, maximum)
    engines = [i.engine for i in program]
    slowest = {e: rng.choice([1, 5, 40]) for e in Engine}
    dut = Cluster(arch)
    slots = 1 << slot_bits(arch)
    tokens = {(a, b): 0 for a in Engine for b in Engine if a is not b}
    expected = {e: [n for n, owner in enumerate(engines) if owner is e] for e in Engine}
    started: dict[Engine, list[int]] = {e: [] for e in Engine}
    signalled: dict[Engine, int] = dict.fromkeys(Engine, 0)
    done: dict[Engine, int] = dict.fromkeys(Engine, 0)
    takes: dict[Engine, int] = dict.fromkeys(Engine, 0)
    blocked = 0
    overlapped = 0

    async def bench(ctx: SimulatorContext) -> None:
        nonlocal blocked, overlapped
        running: dict[Engine, deque[int]] = {
            e: deque() for e in Engine
        }  # remaining cycles of each accepted instruction
        fetch = number = 0  # the next instruction, and the next of its beats
        cycle = 0
        while any(signalled[e] < len(expected[e]) for e in Engine):
            assert cycle < 20000, f"stuck at {done} of {program} (seed {seed})"
            cycle += 1
            # Fetch writes the beats of the next instruction, then queues it where there is room.
            ctx.set(dut.memory.write.en, 0)
            queued = None
            if fetch < len(program) and rng.random() < 0.8:
                if number < beats_per_instruction(arch):
                    dut.write(ctx, engines[fetch], number, isa.encode(program[fetch]), fetch)
                    number += 1
                elif ctx.get(dut.stages[engines[fetch]].room):
                    queued = engines[fetch]
                    fetch, number = fetch + 1, 0
            for e, stage in dut.stages.items():
                ctx.set(stage.queue_stb, e is queued)
                finished = bool(running[e]) and running[e][0] == 0
                if finished:
                    running[e].popleft()
                    done[e] += 1
                ctx.set(stage.done_stb, finished)
                # MAC takes up to three ahead, the others one at a time.
                limit = 3 if e is Engine.MAC else 1
                ctx.set(stage.command.ready, len(running[e]) < limit and rng.random() < 0.7)
            moves = []
            for e, stage in dut.stages.items():
                waiting, available, full = ctx.get(stage.waiting), ctx.get(stage.available), ctx.get(stage.full)
                assert available == sum(1 << a for a in Engine if a is not e and tokens[a, e] > 0), f"seed {seed}"
                assert full == sum(1 << b for b in Engine if b is not e and tokens[e, b] == maximum), f"seed {seed}"
                assert waiting & available == 0, f"seed {seed}"
                # Tokens are taken in the cycle after a transfer.
                assert ctx.get(stage.take) == takes[e], f"seed {seed}"
                moves += [(a, e, -1) for a in isa.engines_in(takes[e])]
                takes[e] = 0
                if ctx.get(stage.command.valid) and ctx.get(stage.command.ready):
                    taken = expected[e][len(started[e])]
                    assert ctx.get(stage.command.payload) == isa.encode(program[taken]), f"{taken} (seed {seed})"
                    takes[e] = program[taken]["wait"]
                    overlapped += bool(running[e])
                    started[e].append(taken)
                    running[e].append(rng.randrange(slowest[e]))
                # A finished instruction signals as soon as none of its semaphores is full, and in order.
                signal = held = 0
                if signalled[e] < done[e]:
                    oldest = expected[e][signalled[e]]
                    assert ctx.get(stage.oldest) == signalled[e] % slots, f"seed {seed}"
                    if program[oldest]["signal"] & full:
                        blocked += 1
                        held = program[oldest]["signal"] & full
                    else:
                        signal = program[oldest]["signal"]
                        signalled[e] += 1
                assert ctx.get(stage.signal) == signal, f"seed {seed}"
                assert ctx.get(stage.held) == held, f"seed {seed}"
                moves += [(e, b, 1) for b in isa.engines_in(signal)]
                if len(running[e]) and running[e][0] > 0:
                    running[e][0] -= 1
            for a, b, step in moves:
                tokens[a, b] += step
            for pair, count in tokens.items():
                assert 0 <= count <= maximum, f"{pair}: {count} (seed {seed})"
            await ctx.tick()
        for stage in dut.stages.values():
            ctx.set(stage.done_stb, 0)
        await ctx.tick()
        for stage in dut.stages.values():
            assert ctx.get(stage.empty)

    simulate(dut, bench, checked=[s.command for s in dut.stages.values()], max_cycles=25000)
    assert started == expected
    return blocked, overlapped


def test_random_programs_keep_order_and_tokens() -> None:
    held_back, ahead = zip(*(play(seed) for seed in range(8)), strict=True)
    assert sum(held_back) > 0, "no semaphore was ever full: the programs test too little"
    assert sum(ahead) > 0, "no engine ever accepted an instruction ahead: the programs test too little"


@pytest.mark.parametrize("bus_bits", [32, 128, 512])
def test_random_programs_at_other_bus_widths(bus_bits: int) -> None:
    play(1, ARCH.replace(bus_bits=bus_bits, burst_beats=16, queue_depth=2))


def command(engine: Engine, **masks: list[Engine]) -> int:
    return isa.encode(isa.make(OPCODES[engine], **masks))


@pytest.mark.parametrize("bus_bits", [32, 64, 128, 256])
@pytest.mark.parametrize("engine", list(Engine))
def test_cycles_from_queue_to_offer_and_from_start_to_the_next_offer(engine: Engine, bus_bits: int) -> None:
    arch = ARCH.replace(bus_bits=bus_bits, burst_beats=16)
    dut = Cluster(arch)
    stage, cycles = dut.stages[engine], max(6, beats_of(arch, engine) + 4)

    async def bench(ctx: SimulatorContext) -> None:
        await dut.put(ctx, engine, command(engine), 1)  # queued in cycle 0
        for cycle in range(1, cycles):
            assert not ctx.get(stage.command.valid), f"offered after {cycle} cycles"
            await ctx.tick()
        assert ctx.get(stage.command.valid), f"not offered after {cycles} cycles"
        await dut.put(ctx, engine, command(engine), 2)
        ctx.set(stage.command.ready, 1)
        await ctx.tick()  # accepted in cycle 0
        for cycle in range(1, cycles):
            assert not ctx.get(stage.command.valid), f"offered after {cycle} cycles"
            await ctx.tick()
        assert ctx.get(stage.command.valid), f"not offered after {cycles} cycles"

    simulate(dut, bench, checked=[s.command for s in dut.stages.values()])


def test_a_waiting_instruction_is_offered_two_cycles_after_done() -> None:
    dut = Cluster(ARCH)
    load, mac = dut.stages[Engine.LOAD], dut.stages[Engine.MAC]

    async def bench(ctx: SimulatorContext) -> None:
        await dut.put(ctx, Engine.LOAD, command(Engine.LOAD, signal=[Engine.MAC]), 0xABC007)
        await dut.put(ctx, Engine.MAC, command(Engine.MAC, wait=[Engine.LOAD]), 0xABC008)
        ctx.set(load.command.ready, 1)
        await ctx.tick().until(load.command.valid)
        ctx.set(load.command.ready, 0)
        assert ctx.get(load.executing)
        assert await dut.index(ctx, Engine.LOAD) == 0xABC007
        await ctx.tick().repeat(8)
        assert not ctx.get(mac.command.valid)
        assert ctx.get(mac.waiting) == 1 << Engine.LOAD
        assert await dut.index(ctx, Engine.MAC) == 0xABC008
        ctx.set(load.done_stb, 1)
        await ctx.tick()
        ctx.set(load.done_stb, 0)
        assert ctx.get(load.empty)
        assert not ctx.get(mac.command.valid)
        await ctx.tick()
        assert ctx.get(mac.command.valid), "a waiting instruction is offered 2 cycles after done_stb"
        assert ctx.get(mac.waiting) == 0

    simulate(dut, bench, checked=[s.command for s in dut.stages.values()])


def test_a_full_semaphore_holds_signalling_and_further_starts_back() -> None:
    dut = Cluster(ARCH)
    load, mac = dut.stages[Engine.LOAD], dut.stages[Engine.MAC]
    maximum = Semaphores(bits=ARCH.semaphore_bits).maximum

    async def finish_one(ctx: SimulatorContext, stage: IssueStage) -> None:
        ctx.set(stage.command.ready, 1)
        await ctx.tick().until(stage.command.valid)
        ctx.set(stage.command.ready, 0)
        ctx.set(stage.done_stb, 1)
        await ctx.tick()
        ctx.set(stage.done_stb, 0)

    async def bench(ctx: SimulatorContext) -> None:
        for n in range(maximum + 1):
            await dut.put(ctx, Engine.LOAD, command(Engine.LOAD, signal=[Engine.MAC]), n)
            await finish_one(ctx, load)
        await dut.put(ctx, Engine.LOAD, command(Engine.LOAD), maximum + 1)
        await ctx.tick().repeat(8)
        assert ctx.get(load.full) == 1 << Engine.MAC
        assert ctx.get(load.executing), "the last instruction still has to signal"
        assert await dut.index(ctx, Engine.LOAD) == maximum
        assert not ctx.get(load.command.valid)
        await dut.put(ctx, Engine.MAC, command(Engine.MAC, wait=[Engine.LOAD]), 50)
        await finish_one(ctx, mac)
        await ctx.tick().repeat(5)
        assert ctx.get(load.full) == 1 << Engine.MAC, "one was taken, and the held back one was signalled"
        assert ctx.get(load.command.valid)

    simulate(dut, bench, checked=[s.command for s in dut.stages.values()])


def test_hold_offers_nothing_further_and_withdraws_nothing() -> None:
    dut = Cluster(ARCH)
    stage = dut.stages[Engine.STORE]

    async def bench(ctx: SimulatorContext) -> None:
        await dut.put(ctx, Engine.STORE, command(Engine.STORE), 1)
        await dut.put(ctx, Engine.STORE, command(Engine.STORE), 2)
        await ctx.tick()
        assert ctx.get(stage.command.valid)
        ctx.set(stage.hold, 1)
        for _ in range(5):
            await ctx.tick()
            assert ctx.get(stage.command.valid), "an offered instruction stays"
        ctx.set(stage.command.ready, 1)
        await ctx.tick()
        for _ in range(12):
            assert not ctx.get(stage.command.valid)
            await ctx.tick()
        ctx.set(stage.hold, 0)
        await ctx.tick()
        assert ctx.get(stage.command.valid)

    simulate(dut, bench, checked=[s.command for s in dut.stages.values()])


def test_no_more_than_so_many_are_in_flight() -> None:
    dut = Cluster(ARCH)
    stage = dut.stages[Engine.MAC]
    accepted = 0

    async def bench(ctx: SimulatorContext) -> None:
        nonlocal accepted
        ctx.set(stage.command.ready, 1)
        while True:
            _, _, valid = await ctx.tick().sample(stage.command.valid)
            accepted += valid

    async def fill(ctx: SimulatorContext) -> None:
        for n in range(IN_FLIGHT + ARCH.queue_depth):
            await dut.put(ctx, Engine.MAC, command(Engine.MAC), n)
        await ctx.tick().repeat(30)
        assert not ctx.get(stage.room)
        assert accepted == IN_FLIGHT

    simulate(dut, fill, background=[bench], checked=[s.command for s in dut.stages.values()])


def test_a_full_queue_has_no_room_and_the_oldest_is_found() -> None:
    """Nothing that is queued or in flight is overwritten by what fetch writes before there is room."""
    dut = Cluster(ARCH)
    stage = dut.stages[Engine.POST]

    async def bench(ctx: SimulatorContext) -> None:
        for n in range(12):  # twice around
            for k in range(ARCH.queue_depth):
                assert ctx.get(stage.room)
                await dut.put(ctx, Engine.POST, isa.encode(isa.make(Opcode.POOL, out_addr=k)), 100 * n + k)
            assert not ctx.get(stage.room)
            for number in range(beats_per_instruction(ARCH)):
                dut.write(ctx, Engine.POST, number, (1 << 256) - 1, (1 << 24) - 1)
                await ctx.tick()
            ctx.set(dut.memory.write.en, 0)
            for k in range(ARCH.queue_depth):
                ctx.set(stage.command.ready, 1)
                (offered,) = await ctx.tick().sample(stage.command.payload).until(stage.command.valid)
                ctx.set(stage.command.ready, 0)
                assert offered == isa.encode(isa.make(Opcode.POOL, out_addr=k))
                assert await dut.index(ctx, Engine.POST) == 100 * n + k
                ctx.set(stage.done_stb, 1)
                await ctx.tick()
                ctx.set(stage.done_stb, 0)
            assert ctx.get(stage.empty)

    simulate(dut, bench, checked=[stage.command])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("depth", [2, 4, 16])
def test_queue_against_a_deque(depth: int, seed: int) -> None:
    rng = random.Random(seed)
    dut = Queue(shape=12, depth=depth)
    model: deque[int] = deque()

    async def bench(ctx: SimulatorContext) -> None:
        fullest = 0
        for _ in range(600):
            greedy = rng.random() < 0.5
            put, take, item = rng.random() < (0.9 if greedy else 0.4), rng.random() < 0.5, rng.getrandbits(12)
            ctx.set(dut.i.valid, put)
            ctx.set(dut.i.payload, item)
            ctx.set(dut.o.ready, take)
            assert ctx.get(dut.level) == len(model), f"seed {seed}"
            assert ctx.get(dut.i.ready) == (len(model) < depth), f"seed {seed}"
            assert ctx.get(dut.o.valid) == bool(model), f"seed {seed}"
            room = len(model) < depth
            if model:
                assert ctx.get(dut.o.payload) == model[0], f"seed {seed}"
                if take:
                    model.popleft()
            if put and room:
                model.append(item)
            fullest = max(fullest, len(model))
            await ctx.tick()
        assert fullest == depth, f"the queue was never full (seed {seed})"

    simulate(dut, bench, checked=[dut.o])


@pytest.mark.parametrize("seed", range(2))
def test_semaphores_against_counters(seed: int) -> None:
    """Also signals into full and takes from empty semaphores, which change nothing."""
    rng = random.Random(seed)
    dut = Semaphores(bits=2)
    counts = {(a, b): 0 for a in Engine for b in Engine if a is not b}

    async def bench(ctx: SimulatorContext) -> None:
        for _ in range(1500):
            bias = rng.choice([0.2, 0.5, 0.8])
            signal = {pair: rng.random() < bias for pair in counts}
            take = {pair: rng.random() < 1 - bias for pair in counts}
            for e in Engine:
                ctx.set(dut.signal[int(e)], sum(1 << b for (a, b), up in signal.items() if a is e and up))
                ctx.set(dut.take[int(e)], sum(1 << a for (a, b), down in take.items() if b is e and down))
            for e in Engine:
                assert ctx.get(dut.available[int(e)]) == sum(1 << a for (a, b), n in counts.items() if b is e and n)
                assert ctx.get(dut.full[int(e)]) == sum(1 << b for (a, b), n in counts.items() if a is e and n == 3)
            for pair, n in counts.items():
                step = signal[pair] - take[pair]
                counts[pair] = n if n + step not in range(4) else n + step
            await ctx.tick()

    simulate(dut, bench)


def test_stages_look_at_no_more_beats_than_the_longest_instruction_has() -> None:
    assert {e: word_bits(e) for e in Engine} == {
        Engine.LOAD: 178,
        Engine.MAC: 234,
        Engine.POST: 240,
        Engine.STORE: 177,
    }
    assert beat_bytes(ARCH) == 8
    assert [beats_of(ARCH, e) for e in Engine] == [3, 4, 4, 3]


@pytest.mark.parametrize("depth", [1, 3, 0, 2048])
def test_queue_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^depth must be a power of two in 2\.\.1024, not {depth}$"):
        Queue(shape=4, depth=depth)


@pytest.mark.parametrize("bits", [1, 9])
def test_semaphore_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"^bits must be in 2\.\.8, not {bits}$"):
        Semaphores(bits=bits)


def test_issue_stage_arguments() -> None:
    with pytest.raises(TypeError, match=r"^arch must be an ArchConfig, not 'small'$"):
        IssueStage(arch="small", engine=Engine.LOAD)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^engine must be an Engine, not 0$"):
        IssueStage(arch=ARCH, engine=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^arch must be an ArchConfig, not 'small'$"):
        InstructionMemory(arch="small")  # type: ignore[arg-type]
