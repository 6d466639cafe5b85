# amaranth: UnusedElaboratable=no
"""Issue stages and semaphores: order, tokens, holding back, against a Python model with random engine durations."""

import random
from collections import deque

import pytest
from amaranth import Module
from amaranth.hdl import Elaboratable
from amaranth.sim import SimulatorContext

from nibblecore.arch import isa
from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Engine, Opcode
from nibblecore_hw.ctrl.issue import IN_FLIGHT, IssueStage, word_bits
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
    """Four issue stages around the semaphores, as in `Control`."""

    def __init__(self, arch: ArchConfig) -> None:
        self.semaphores = Semaphores(bits=arch.semaphore_bits)
        self.stages = {e: IssueStage(arch=arch, engine=e) for e in Engine}

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.semaphores = semaphores = self.semaphores
        for engine, stage in self.stages.items():
            m.submodules[engine.name.lower()] = stage
            m.d.comb += [
                stage.available.eq(semaphores.available[int(engine)]),
                stage.full.eq(semaphores.full[int(engine)]),
                semaphores.take[int(engine)].eq(stage.take),
                semaphores.signal[int(engine)].eq(stage.signal),
            ]
        return m


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


def play(seed: int) -> tuple[int, int]:
    """Run a random program; how often an engine was held back, and how often one accepted an instruction ahead."""
    rng = random.Random(seed)
    maximum = Semaphores(bits=ARCH.semaphore_bits).maximum
    program = random_program(rng, 150, maximum)
    engines = [i.engine for i in program]
    slowest = {e: rng.choice([1, 5, 40]) for e in Engine}
    dut = Cluster(ARCH)
    tokens = {(a, b): 0 for a in Engine for b in Engine if a is not b}
    expected = {e: [n for n, owner in enumerate(engines) if owner is e] for e in Engine}
    started: dict[Engine, list[int]] = {e: [] for e in Engine}
    signalled: dict[Engine, int] = dict.fromkeys(Engine, 0)
    done: dict[Engine, int] = dict.fromkeys(Engine, 0)
    blocked = 0
    overlapped = 0

    async def bench(ctx: SimulatorContext) -> None:
        nonlocal blocked, overlapped
        running: dict[Engine, deque[int]] = {
            e: deque() for e in Engine
        }  # remaining cycles of each accepted instruction
        fetch = 0
        cycle = 0
        while any(signalled[e] < len(expected[e]) for e in Engine):
            assert cycle < 20000, f"stuck at {done} of {program} (seed {seed})"
            cycle += 1
            # Fetch offers the next instruction to its queue, in order; the others get nothing.
            offered = engines[fetch] if fetch < len(program) and rng.random() < 0.8 else None
            for e, stage in dut.stages.items():
                ctx.set(stage.i.valid, e is offered)
                if e is offered:
                    word = isa.encode(program[fetch])
                    ctx.set(stage.i.payload, {"word": word, "index": fetch})
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
                if ctx.get(stage.command.valid) and ctx.get(stage.command.ready):
                    number = expected[e][len(started[e])]
                    assert ctx.get(stage.command.payload) == isa.encode(program[number]), f"{number} (seed {seed})"
                    assert ctx.get(stage.take) == program[number]["wait"], f"{number} (seed {seed})"
                    moves += [(a, e, -1) for a in isa.engines_in(program[number]["wait"])]
                    overlapped += bool(running[e])
                    started[e].append(number)
                    running[e].append(rng.randrange(slowest[e]))
                else:
                    assert ctx.get(stage.take) == 0, f"seed {seed}"
                # A finished instruction signals as soon as none of its semaphores is full, and in order.
                signal = held = 0
                if signalled[e] < done[e]:
                    number = expected[e][signalled[e]]
                    assert ctx.get(stage.index) == number, f"seed {seed}"
                    if program[number]["signal"] & full:
                        blocked += 1
                        held = program[number]["signal"] & full
                    else:
                        signal = program[number]["signal"]
                        signalled[e] += 1
                assert ctx.get(stage.signal) == signal, f"seed {seed}"
                assert ctx.get(stage.held) == held, f"seed {seed}"
                moves += [(e, b, 1) for b in isa.engines_in(signal)]
                if len(running[e]) and running[e][0] > 0:
                    running[e][0] -= 1
            if offered is not None and ctx.get(dut.stages[offered].i.ready):
                fetch += 1
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


def command(engine: Engine, **masks: list[Engine]) -> int:
    return isa.encode(isa.make(OPCODES[engine], **masks))


async def queue_up(ctx: SimulatorContext, stage: IssueStage, word: int, index: int) -> None:
    """Put one instruction; takes one cycle where there is room."""
    ctx.set(stage.i.payload, {"word": word, "index": index})
    ctx.set(stage.i.valid, 1)
    await ctx.tick().until(stage.i.ready)
    ctx.set(stage.i.valid, 0)


def test_cycles_from_queue_to_offer_and_from_done_to_the_next_start() -> None:
    dut = Cluster(ARCH)
    load, mac = dut.stages[Engine.LOAD], dut.stages[Engine.MAC]

    async def bench(ctx: SimulatorContext) -> None:
        await queue_up(ctx, load, command(Engine.LOAD, signal=[Engine.MAC]), 7)  # this edge is cycle 0
        await queue_up(ctx, mac, command(Engine.MAC, wait=[Engine.LOAD]), 8)
        assert not ctx.get(load.command.valid)
        await ctx.tick()
        assert ctx.get(load.command.valid), "an instruction is offered 3 cycles after it was queued"
        ctx.set(load.command.ready, 1)
        await ctx.tick()
        ctx.set(load.command.ready, 0)
        assert ctx.get(load.executing)
        assert ctx.get(load.index) == 7
        await ctx.tick().repeat(3)
        assert not ctx.get(mac.command.valid)
        assert ctx.get(mac.waiting) == 1 << Engine.LOAD
        assert ctx.get(mac.index) == 8
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
            await queue_up(ctx, load, command(Engine.LOAD, signal=[Engine.MAC]), n)
            await finish_one(ctx, load)
        await queue_up(ctx, load, command(Engine.LOAD), maximum + 1)
        await ctx.tick().repeat(5)
        assert ctx.get(load.full) == 1 << Engine.MAC
        assert ctx.get(load.executing), "the last instruction still has to signal"
        assert ctx.get(load.index) == maximum
        assert not ctx.get(load.command.valid)
        await queue_up(ctx, mac, command(Engine.MAC, wait=[Engine.LOAD]), 50)
        await finish_one(ctx, mac)
        await ctx.tick().repeat(5)
        assert ctx.get(load.full) == 1 << Engine.MAC, "one was taken, and the held back one was signalled"
        assert ctx.get(load.command.valid)

    simulate(dut, bench, checked=[s.command for s in dut.stages.values()])


def test_hold_offers_nothing_further_and_withdraws_nothing() -> None:
    dut = Cluster(ARCH)
    stage = dut.stages[Engine.STORE]

    async def bench(ctx: SimulatorContext) -> None:
        await queue_up(ctx, stage, command(Engine.STORE), 1)
        await queue_up(ctx, stage, command(Engine.STORE), 2)
        await ctx.tick()
        assert ctx.get(stage.command.valid)
        ctx.set(stage.hold, 1)
        for _ in range(5):
            await ctx.tick()
            assert ctx.get(stage.command.valid), "an offered instruction stays"
        ctx.set(stage.command.ready, 1)
        await ctx.tick()
        for _ in range(5):
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
        ctx.set(stage.i.valid, 1)
        ctx.set(stage.i.payload.word, command(Engine.MAC))
        for _ in range(40):
            accepted += ctx.get(stage.command.valid)
            await ctx.tick()
        assert accepted == IN_FLIGHT

    simulate(dut, bench, checked=[s.command for s in dut.stages.values()])


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


def test_queue_is_as_wide_as_the_longest_instruction() -> None:
    assert {e: word_bits(e) for e in Engine} == {
        Engine.LOAD: 178,
        Engine.MAC: 234,
        Engine.POST: 240,
        Engine.STORE: 177,
    }


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
