# amaranth: UnusedElaboratable=no
"""The whole control half: programs in memory, engines with random durations, the host on AXI4-Lite."""

import random
from collections import deque
from collections.abc import Callable, Iterable

import pytest
from amaranth.sim import SimulatorContext

from nibblecore.arch import isa
from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Engine, Instruction, Opcode
from nibblecore.arch.regs import REGISTERS, Counter, ErrorCause, ErrorUnit, extract, field
from nibblecore_hw.ctrl.control import DMA_ENGINES, Control
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
    queue_depth=2,
)
LOAD, MAC, POST, STORE = Engine
OPCODES = {LOAD: Opcode.LOAD, MAC: Opcode.MAC, POST: Opcode.POST, STORE: Opcode.STORE}
END = isa.make(Opcode.END)
BASE = 0x2000


def op(engine: Engine, wait: Iterable[Engine] = (), signal: Iterable[Engine] = ()) -> Instruction:
    return isa.make(OPCODES[engine], wait=wait, signal=signal)


def random_program(rng: random.Random, count: int) -> list[Instruction]:
    """Instructions that can run one after the other, which is enough for them not to deadlock."""
    tokens = {(a, b): 0 for a in Engine for b in Engine if a is not b}
    program = []
    for _ in range(count):
        engine = rng.choice(list(Engine))
        others = [e for e in Engine if e is not engine]
        wait = [a for a in others if tokens[a, engine] and rng.random() < 0.6]
        signal = [b for b in others if tokens[engine, b] < 3 and rng.random() < 0.5]
        for a in wait:
            tokens[a, engine] -= 1
        for b in signal:
            tokens[engine, b] += 1
        program.append(op(engine, wait, signal))
    return [*program, END]


class Core:
    """`Control` with four engines, a memory behind fetch and a host.

    Each engine runs what it accepts one at a time; ``duration(engine, number)`` says for how many cycles (at least 1),
    None for ever. What happened is in ``log`` as (cycle, event, engine).
    """

    def __init__(
        self,
        *,
        arch: ArchConfig = ARCH,
        seed: int = 0,
        duration: Callable[[Engine, int], int | None] = lambda engine, number: 3,
    ) -> None:
        self.dut = Control(arch=arch)
        self.seed = seed
        self.rng = random.Random(seed)
        self.duration = duration
        self.memory = b""
        self.fetch_resp: dict[int, int] = {}  # byte offset -> RRESP
        self.fetch_answers = True
        self.cycle = 0
        self.log: list[tuple[int, str, Engine]] = []
        self.words: list[tuple[Engine, int]] = []
        self.fail: dict[tuple[Engine, int], ErrorCause] = {}  # (engine, number) -> error instead of done
        self.inject: dict[Engine, ErrorCause] = {}  # errors in this very cycle
        self.drain = 0  # cycles that a DMA needs to become idle after stop
        self.resets = 0
        self.counts = dict.fromkeys(Counter, 0)
        self.number = dict.fromkeys(Engine, 0)
        self.regions: dict[int, tuple[int, int]] = {}  # base and size, as the host has set them

    def engine(self, engine: Engine) -> Callable:
        port, dut = self.dut.engine(engine), self.dut

        async def run(ctx: SimulatorContext) -> None:
            left: int | None = 0
            active = False
            draining = 0
            offered: int | None = None
            announced = 0  # engines are reset in the cycle after `core_reset`
            while True:
                ready = not active and self.rng.random() < 0.7
                finish = active and left == 1
                failing = finish and (engine, self.number[engine]) in self.fail
                ctx.set(port.command.ready, ready)
                ctx.set(port.busy, active)
                ctx.set(port.done_stb, finish and not failing)
                if engine in DMA_ENGINES:
                    ctx.set(port.idle, not active and not draining)
                    cause = self.fail[engine, self.number[engine]] if failing else self.inject.get(engine)
                    ctx.set(port.error_stb, cause is not None)
                    ctx.set(port.error_cause, cause or 0)
                _, _, valid, word, stop, core_reset, running, *region = await ctx.tick().sample(
                    port.command.valid, port.command.payload, dut.stop, dut.core_reset, dut.running,
                    *((port.region.base, port.region.size) if engine in DMA_ENGINES else ()),
                )  # fmt: skip
                core_reset, announced = announced, core_reset
                self.counts[Counter[f"{engine.name}_BUSY"]] += running and active
                # Offers stay and do not change, but for a reset.
                assert offered is None or (valid and word == offered), f"{engine}'s offer changed (seed {self.seed})"
                offered = word if valid and not ready and not core_reset else None
                if core_reset:
                    assert engine not in DMA_ENGINES or not (active or draining), f"reset on the bus (seed {self.seed})"
                    active, left = False, 0
                    continue
                if stop and engine in DMA_ENGINES and active:  # gives up, but the bus needs its time
                    active, draining = False, self.drain + 1
                draining = max(0, draining - 1)
                if failing:
                    active = False
                    self.log.append((self.cycle, "error", engine))
                elif finish:
                    active = False
                    self.number[engine] += 1
                    self.log.append((self.cycle, "done", engine))
                elif active and left is not None:
                    left -= 1
                if valid and ready:
                    active = True
                    left = self.duration(engine, self.number[engine])
                    self.log.append((self.cycle, "start", engine))
                    self.words.append((engine, word))
                    if region:
                        number = isa.decode(word)["region"]
                        assert tuple(region) == self.regions.get(number, (0, 0)), f"region {number} (seed {self.seed})"

        return run

    async def bus(self, ctx: SimulatorContext) -> None:
        axi, due, sent = self.dut.m_axi, deque(), False
        ctx.set(axi.arready, 1)
        while True:
            _, _, valid, addr, length, core_reset, running = await ctx.tick().sample(
                axi.arvalid, axi.araddr, axi.arlen, self.dut.core_reset, self.dut.running
            )
            self.counts[Counter.TOTAL] += running
            self.cycle += 1
            self.resets += core_reset
            assert not (core_reset and due), f"reset while fetch was on the bus (seed {self.seed})"
            if sent:
                due.popleft()
            if valid:
                size = self.dut._arch.bus_bytes
                due.extend((addr + n * size - BASE, n == length) for n in range(length + 1))
            sent = bool(due) and self.fetch_answers and self.rng.random() < 0.7
            ctx.set(axi.rvalid, sent)
            if sent:
                offset, last = due[0]
                beat = self.memory[offset : offset + self.dut._arch.bus_bytes]
                ctx.set(axi.rdata, int.from_bytes(beat, "little"))
                ctx.set(axi.rresp, self.fetch_resp.get(offset, 0))
                ctx.set(axi.rlast, last)

    # The host ---------------------------------------------------------------------------------------------------

    async def write(self, ctx: SimulatorContext, name: str, value: int) -> None:
        bus = self.dut.s_axil
        ctx.set(bus.awaddr, REGISTERS[name].offset)
        ctx.set(bus.wdata, value)
        ctx.set(bus.wstrb, 15)
        ctx.set(bus.awvalid, 1)
        ctx.set(bus.wvalid, 1)
        ctx.set(bus.bready, 1)
        while not (ctx.get(bus.awready) and ctx.get(bus.wready)):  # regions are being cleared; both come at once
            await ctx.tick()
        await ctx.tick()
        ctx.set(bus.awvalid, 0)
        ctx.set(bus.wvalid, 0)
        while not ctx.get(bus.bvalid):
            await ctx.tick()
        assert ctx.get(bus.bresp) == 0
        await ctx.tick()

    async def read(self, ctx: SimulatorContext, name: str) -> int:
        bus = self.dut.s_axil
        ctx.set(bus.araddr, REGISTERS[name].offset)
        ctx.set(bus.arvalid, 1)
        ctx.set(bus.rready, 1)
        await ctx.tick()
        ctx.set(bus.arvalid, 0)
        while not ctx.get(bus.rvalid):
            await ctx.tick()
        assert ctx.get(bus.rresp) == 0
        value = ctx.get(bus.rdata)
        await ctx.tick()
        return value

    async def status(self, ctx: SimulatorContext) -> str:
        """The names of the bits that are set."""
        value = await self.read(ctx, "STATUS")
        return " ".join(f.name for f in REGISTERS["STATUS"].fields if value >> f.low & 1)

    async def start(self, ctx: SimulatorContext, program: Iterable[Instruction | int], *, watchdog: int = 300) -> None:
        words = [isa.encode(i) if isinstance(i, Instruction) else i for i in program]
        self.memory = b"".join(w.to_bytes(32, "little") for w in words)
        self.log.clear()
        self.words.clear()
        self.counts = dict.fromkeys(Counter, 0)
        self.number = dict.fromkeys(Engine, 0)
        self.regions[0] = (BASE, len(self.memory))
        for number, (base, size) in self.regions.items():
            await self.write(ctx, f"REGION{number}_BASE", base)
            await self.write(ctx, f"REGION{number}_SIZE", size)
        await self.write(ctx, "WATCHDOG", watchdog)
        await self.write(ctx, "IRQ_ENABLE", 1)
        await self.command(ctx, "start")

    async def command(self, ctx: SimulatorContext, name: str) -> None:
        await self.write(ctx, "CONTROL", 1 << field("CONTROL", name).low)

    async def irq(self, ctx: SimulatorContext) -> None:
        while not ctx.get(self.dut.irq):
            await ctx.tick()

    async def error(self, ctx: SimulatorContext) -> tuple[ErrorCause, ErrorUnit, int]:
        """Wait for the interrupt; cause, unit and index."""
        await self.irq(ctx)
        assert await self.read(ctx, "IRQ_STATUS") == 1 << field("IRQ_STATUS", "error").low
        assert await self.status(ctx) == "error"
        value = await self.read(ctx, "ERROR")
        return (
            ErrorCause(extract("ERROR", "cause", value)),
            ErrorUnit(extract("ERROR", "unit", value)),
            await self.read(ctx, "ERROR_INDEX"),
        )

    async def waits(self, ctx: SimulatorContext) -> dict[Engine, tuple[Engine, ...]]:
        value = await self.read(ctx, "ERROR_WAITS")
        return {e: isa.engines_in(value >> 4 * e & 15) for e in Engine if value >> 4 * e & 15}

    async def soft_reset(self, ctx: SimulatorContext) -> None:
        resets = self.resets
        await self.command(ctx, "reset")
        while self.resets == resets:
            await ctx.tick()
        assert await self.status(ctx) == "idle"

    def check(self, program: list[Instruction]) -> None:
        """Every instruction ran once, in its engine's order, and never without its tokens."""
        queues = {e: [i for i in program if i.engine is e] for e in Engine}
        for e in Engine:
            assert [w for owner, w in self.words if owner is e] == [isa.encode(i) for i in queues[e]], (
                f"seed {self.seed}"
            )
        tokens = {(a, b): 0 for a in Engine for b in Engine if a is not b}
        at = {"start": dict.fromkeys(Engine, 0), "done": dict.fromkeys(Engine, 0)}
        # A done and a start in one cycle have nothing to do with each other: starts first.
        for _, event, e in sorted(self.log, key=lambda entry: (entry[0], entry[1] == "done")):
            instruction = queues[e][at[event][e]]
            at[event][e] += 1
            if event == "start":
                for a in isa.engines_in(instruction["wait"]):
                    tokens[a, e] -= 1
                    assert tokens[a, e] >= 0, f"{e} started without a token of {a} (seed {self.seed})"
            else:
                for b in isa.engines_in(instruction["signal"]):
                    tokens[e, b] += 1

    def simulate(self, bench: Callable, *, max_cycles: int = 20000) -> None:
        simulate(
            self.dut,
            bench,
            background=[self.bus, *map(self.engine, Engine)],
            max_cycles=max_cycles,
        )


@pytest.mark.parametrize("seed", range(3))
def test_random_programs(seed: int) -> None:
    """One after the other on one core, tokens left over; counters as observed."""
    rng = random.Random(seed)
    slowest = {e: rng.choice([1, 8, 40]) for e in Engine}
    core = Core(seed=seed, duration=lambda engine, number: rng.randint(1, slowest[engine]))

    async def bench(ctx: SimulatorContext) -> None:
        assert await core.status(ctx) == "idle"
        for _ in range(2):
            program = random_program(rng, 30)
            await core.start(ctx, program)
            await core.irq(ctx)
            assert await core.status(ctx) == "idle done", f"seed {seed}"
            assert await core.read(ctx, "IRQ_STATUS") == 1
            await core.write(ctx, "IRQ_STATUS", 1)
            await ctx.tick()
            assert not ctx.get(core.dut.irq)
            core.check(program)
            for name in ("TOTAL", *(f"{e.name}_BUSY" for e in Engine)):
                assert await core.read(ctx, f"COUNT_{name}") == core.counts[Counter[name]], f"{name} (seed {seed})"
            for name in ("ERROR", "ERROR_INDEX", "ERROR_WAITS"):
                assert await core.read(ctx, name) == 0

    core.simulate(bench, max_cycles=60000)


@pytest.mark.parametrize("bus_bits", [32, 64, 128, 256])
def test_instructions_come_with_their_regions(bus_bits: int) -> None:
    """Also with a host that reads the registers all the time, and engines that are faster than the queues."""
    rng = random.Random(bus_bits)
    core = Core(arch=ARCH.replace(bus_bits=bus_bits, burst_beats=16), seed=bus_bits, duration=lambda engine, number: 1)
    core.regions = {n: (rng.getrandbits(32), rng.getrandbits(32)) for n in range(1, 8)}
    program = [isa.make(OPCODES[rng.choice(DMA_ENGINES)], region=rng.randrange(8)) for _ in range(60)]

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [*program, END])
        while await core.status(ctx) == "running":
            number = rng.randrange(8)
            assert await core.read(ctx, f"REGION{number}_SIZE") == core.regions[number][1]
        assert await core.status(ctx) == "idle done"
        assert len(core.words) == len(program)

    core.simulate(bench)


def test_semaphore_counters_and_stalls() -> None:
    core = Core(duration=lambda engine, number: 50 if engine is LOAD else 2)

    async def bench(ctx: SimulatorContext) -> None:
        ctx.set(core.dut.stalls.mac_bank, 1)
        await core.start(ctx, [op(LOAD, signal=[MAC]), op(MAC, wait=[LOAD], signal=[POST]), op(POST, wait=[MAC]), END])
        await core.irq(ctx)
        counts = {c: await core.read(ctx, f"COUNT_{c.name}") for c in Counter}
        times = {(event, e): cycle for cycle, event, e in core.log}
        assert counts[Counter.MAC_BANK] == counts[Counter.TOTAL]
        assert counts[Counter.POST_BANK] == 0
        assert counts[Counter.LOAD_SEMAPHORE] == 0
        assert counts[Counter.STORE_SEMAPHORE] == 0
        # MAC waits from the arrival of its instruction to the load's end.
        assert 20 < counts[Counter.MAC_SEMAPHORE] <= times["done", LOAD] - times["start", LOAD] + 2
        assert 20 < counts[Counter.POST_SEMAPHORE] <= times["done", MAC] - times["start", LOAD] + 2
        assert times["start", MAC] - times["done", LOAD] >= 2

    core.simulate(bench)


def test_a_program_of_only_end() -> None:
    core = Core()

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [END])
        await core.irq(ctx)
        assert await core.status(ctx) == "idle done"
        assert core.words == []

    core.simulate(bench)


def test_tokens_left_over_are_gone_at_the_next_start() -> None:
    core = Core()

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [op(LOAD, signal=[MAC]), END])
        await core.irq(ctx)
        await core.write(ctx, "IRQ_STATUS", 3)
        await core.start(ctx, [op(MAC, wait=[LOAD]), END])
        assert await core.error(ctx) == (ErrorCause.WATCHDOG, ErrorUnit.MAC, 0)
        assert await core.waits(ctx) == {MAC: (LOAD,)}

    core.simulate(bench)


def test_cycles_from_start_to_the_first_instruction_and_to_done() -> None:
    """The figures of the docstring, with a memory that answers in the cycle after the request."""
    core = Core()
    core.rng.random = lambda: 0.0  # type: ignore[method-assign]
    seen: list[tuple[bool, ...]] = []

    async def watch(ctx: SimulatorContext) -> None:
        dut = core.dut
        while True:
            _, _, *now = await ctx.tick().sample(
                dut.running, dut.load.command.valid, dut.load.done_stb, dut.m_axi.rvalid, dut.irq
            )
            seen.append(tuple(now))

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [op(LOAD), END])
        await core.irq(ctx)
        assert await core.read(ctx, "COUNT_TOTAL") == sum(running for running, *_ in seen)

    simulate(core.dut, bench, background=[core.bus, *map(core.engine, Engine), watch])
    running, offer, done, beat, irq = ([n for n, now in enumerate(seen) if now[k]] for k in range(5))
    assert beat[0] - running[0] == 3
    assert offer[0] - beat[0] == 4 + 11  # four beats of 64 bits
    assert running[-1] - done[0] == 2
    assert irq[0] - running[-1] == 2


def test_start_is_ignored_unless_idle() -> None:
    core = Core(duration=lambda engine, number: 100)

    async def bench(ctx: SimulatorContext) -> None:
        program = [op(LOAD), op(LOAD), END]
        await core.start(ctx, program)
        for _ in range(5):
            await core.command(ctx, "start")
        assert await core.status(ctx) == "running"
        await core.irq(ctx)
        core.check(program)
        await core.write(ctx, "CONTROL", 0)
        await core.write(ctx, "CONTROL", 0xFFFF_FFFC)
        assert await core.status(ctx) == "idle done"
        await core.write(ctx, "CONTROL", 3)  # reset wins
        for _ in range(40):
            await ctx.tick()
        assert await core.status(ctx) == "idle"

    core.simulate(bench)


def test_the_interrupt_needs_its_enable() -> None:
    core = Core()

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [op(STORE), END])
        await core.write(ctx, "IRQ_ENABLE", 0)
        while await core.status(ctx) != "idle done":
            assert not ctx.get(core.dut.irq)
        assert not ctx.get(core.dut.irq)
        assert await core.read(ctx, "IRQ_STATUS") == 1
        await core.write(ctx, "IRQ_ENABLE", 1)
        await ctx.tick()
        assert ctx.get(core.dut.irq)
        await core.write(ctx, "IRQ_STATUS", 2)  # another bit
        assert ctx.get(core.dut.irq)

    core.simulate(bench)


def test_illegal_instruction_then_reset_then_a_good_program() -> None:
    core = Core(duration=lambda engine, number: 400)
    core.drain = 37

    async def bench(ctx: SimulatorContext) -> None:
        core.regions[3] = (0x40, 0x1234)
        await core.start(ctx, [op(LOAD), op(STORE), 0xF0F, op(MAC), END])
        assert await core.error(ctx) == (ErrorCause.ILLEGAL_INSTRUCTION, ErrorUnit.FETCH, 2)
        assert {e for e, _ in core.words} <= {LOAD, STORE}
        starts = len(core.words)
        await core.command(ctx, "start")
        for _ in range(100):
            await ctx.tick()
        assert len(core.words) == starts
        assert await core.status(ctx) == "error"
        await core.soft_reset(ctx)
        for name in ("ERROR", "ERROR_INDEX", "ERROR_WAITS", "IRQ_STATUS", *(f"COUNT_{c.name}" for c in Counter)):
            assert await core.read(ctx, name) == 0, name
        for name, value in (("REGION3_SIZE", 0x1234), ("REGION0_BASE", BASE), ("WATCHDOG", 300), ("IRQ_ENABLE", 1)):
            assert await core.read(ctx, name) == value, name
        core.duration = lambda engine, number: 2
        program = [op(LOAD, signal=[MAC]), op(MAC, wait=[LOAD]), END]
        await core.start(ctx, program)
        await core.irq(ctx)
        assert await core.status(ctx) == "idle done"
        core.check(program)

    core.simulate(bench)


@pytest.mark.parametrize("cause", [ErrorCause.REGION, ErrorCause.BUS_READ, ErrorCause.BUS_WRITE])
@pytest.mark.parametrize("engine", DMA_ENGINES)
def test_dma_errors_name_unit_cause_and_instruction(engine: Engine, cause: ErrorCause) -> None:
    core = Core()
    core.fail = {(engine, 1): cause}

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [op(MAC), op(engine), op(POST), op(engine), *[op(MAC)] * 30, op(engine), END])
        assert await core.error(ctx) == (cause, ErrorUnit(engine), 3)
        assert sum(owner is engine for owner, _ in core.words) == 2
        # MAC may accept what it was being offered, and nothing more.
        at = next(cycle for cycle, event, _ in core.log if event == "error")
        assert sum(event == "start" and cycle > at for cycle, event, _ in core.log) <= 1
        total = await core.read(ctx, "COUNT_TOTAL")
        for _ in range(50):
            await ctx.tick()
        assert await core.read(ctx, "COUNT_TOTAL") == total, "the counters stand still after an error"
        await core.soft_reset(ctx)

    core.simulate(bench)


def test_the_first_error_wins_and_in_one_cycle_the_lowest_unit() -> None:
    core = Core(duration=lambda engine, number: 60)

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [op(STORE), op(LOAD), END])
        while sum(event == "start" for _, event, _ in core.log) < 2:
            await ctx.tick()
        core.inject = {LOAD: ErrorCause.REGION, STORE: ErrorCause.BUS_WRITE}
        await ctx.tick()
        core.inject = {LOAD: ErrorCause.BUS_READ}
        await ctx.tick()
        core.inject = {}
        assert await core.error(ctx) == (ErrorCause.REGION, ErrorUnit.LOAD, 1)

    core.simulate(bench)


def test_a_bus_error_of_fetch_at_any_beat() -> None:
    core = Core()

    async def bench(ctx: SimulatorContext) -> None:
        for beat in range(12):
            core.fetch_resp = {8 * beat: 2 + beat % 2}
            await core.start(ctx, [op(LOAD), op(MAC), END])
            assert await core.error(ctx) == (ErrorCause.BUS_READ, ErrorUnit.FETCH, beat // 4), f"beat {beat}"
            await core.soft_reset(ctx)

    core.simulate(bench)


def test_a_program_without_end() -> None:
    core = Core()

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [op(LOAD), op(MAC), op(POST)])
        assert await core.error(ctx) == (ErrorCause.REGION, ErrorUnit.FETCH, 3)

    core.simulate(bench)


def test_the_watchdog_says_who_waits_for_whom() -> None:
    core = Core()

    async def bench(ctx: SimulatorContext) -> None:
        # MAC and POST wait for each other; STORE waits for both.
        program = [op(LOAD), op(STORE, wait=[MAC, POST]), op(MAC, wait=[POST]), op(POST, wait=[MAC]), END]
        await core.start(ctx, program, watchdog=100)
        assert await core.error(ctx) == (ErrorCause.WATCHDOG, ErrorUnit.MAC, 2)
        assert await core.waits(ctx) == {MAC: (POST,), POST: (MAC,), STORE: (MAC, POST)}
        last = max(cycle for cycle, event, _ in core.log)
        assert core.cycle - last >= 100
        await core.soft_reset(ctx)
        assert await core.waits(ctx) == {}

    core.simulate(bench)


def test_the_watchdog_blames_an_engine_that_hangs_not_those_that_wait_for_it() -> None:
    core = Core(duration=lambda engine, number: None if engine is STORE else 3)

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(
            ctx, [op(LOAD, signal=[STORE]), op(STORE, wait=[LOAD], signal=[MAC]), op(MAC, wait=[STORE]), END]
        )
        assert await core.error(ctx) == (ErrorCause.WATCHDOG, ErrorUnit.STORE, 1)
        assert await core.waits(ctx) == {MAC: (STORE,)}

    core.simulate(bench)


def test_the_watchdog_blames_an_engine_whose_signal_is_not_taken() -> None:
    core = Core()

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [*[op(LOAD, signal=[MAC, POST])] * 4, END])
        assert await core.error(ctx) == (ErrorCause.WATCHDOG, ErrorUnit.LOAD, 3)
        assert await core.waits(ctx) == {LOAD: (MAC, POST)}

    core.simulate(bench)


def test_the_watchdog_blames_fetch_when_memory_does_not_answer() -> None:
    core = Core()
    core.fetch_answers = False

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [op(LOAD), END])
        assert await core.error(ctx) == (ErrorCause.WATCHDOG, ErrorUnit.FETCH, 0)
        assert await core.waits(ctx) == {}
        await core.command(ctx, "reset")
        for _ in range(100):
            await ctx.tick()
        assert await core.status(ctx) == "resetting"
        core.fetch_answers = True
        while await core.status(ctx) != "idle":
            pass
        program = [op(LOAD), END]
        await core.start(ctx, program)
        await core.irq(ctx)
        core.check(program)

    core.simulate(bench)


def test_head_of_line_blocking() -> None:
    """A full queue stops fetch, so an instruction behind it never reaches its idle engine."""
    core = Core()

    async def bench(ctx: SimulatorContext) -> None:
        depth = ARCH.queue_depth
        # The load waits for a MAC that stands behind more loads than the queue holds.
        deadlock = [op(LOAD, wait=[MAC]), *[op(LOAD)] * depth, op(MAC, signal=[LOAD]), END]
        await core.start(ctx, deadlock)
        assert await core.error(ctx) == (ErrorCause.WATCHDOG, ErrorUnit.LOAD, 0)
        assert await core.waits(ctx) == {LOAD: (MAC,)}
        assert core.words == []
        await core.soft_reset(ctx)
        fits = [op(LOAD, wait=[MAC]), *[op(LOAD)] * (depth - 1), op(MAC, signal=[LOAD]), END]
        await core.start(ctx, fits)
        await core.irq(ctx)
        assert await core.status(ctx) == "idle done"
        core.check(fits)

    core.simulate(bench)


def test_progress_and_zero_keep_the_watchdog_quiet() -> None:
    core = Core(duration=lambda engine, number: None)

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [op(MAC), END], watchdog=50)
        for cycle in range(400):
            ctx.set(core.dut.progress, cycle % 49 == 0)
            await ctx.tick()
        ctx.set(core.dut.progress, 0)
        assert await core.status(ctx) == "running"
        await core.write(ctx, "WATCHDOG", 0)
        for _ in range(400):
            await ctx.tick()
        assert await core.status(ctx) == "running"
        await core.write(ctx, "WATCHDOG", 20)  # switched on while the core hangs
        assert await core.error(ctx) == (ErrorCause.WATCHDOG, ErrorUnit.MAC, 0)

    core.simulate(bench)


@pytest.mark.parametrize("watchdog", [1, 2, 77])
def test_the_watchdog_waits_exactly_so_many_cycles(watchdog: int) -> None:
    """From the start with a memory that never answers: `progress` is a cycle late, nothing else moves."""
    core = Core()
    core.fetch_answers = False
    cycles = 0

    async def count(ctx: SimulatorContext) -> None:
        nonlocal cycles
        while True:
            _, _, running = await ctx.tick().sample(core.dut.running)
            cycles += running

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [END], watchdog=watchdog)
        await core.error(ctx)
        assert cycles == watchdog + 1

    simulate(core.dut, bench, background=[core.bus, count])


@pytest.mark.parametrize("seed", range(3))
def test_reset_in_any_state(seed: int) -> None:
    """At random times of programs that run, fail, hang or have ended; afterwards a program runs as ever."""
    rng = random.Random(seed)
    core = Core(seed=seed)

    async def bench(ctx: SimulatorContext) -> None:
        for round_ in range(7):
            core.duration = lambda engine, number: None if rng.random() < 0.1 else rng.randint(1, 20)
            core.drain = rng.randrange(30)
            core.fail = {(LOAD, 3): ErrorCause.BUS_READ} if rng.random() < 0.3 else {}
            program: list[Instruction | int] = list(random_program(rng, 12))
            if rng.random() < 0.3:
                program[rng.randrange(12)] = 0
            await core.start(ctx, program, watchdog=rng.choice([0, 60]))
            for _ in range(rng.randrange(250)):
                await ctx.tick()
            await core.soft_reset(ctx)
            core.duration = lambda engine, number: rng.randint(1, 20)
            core.fail = {}
            good = random_program(rng, 12)
            await core.start(ctx, good)
            await core.irq(ctx)
            assert await core.status(ctx) == "idle done", f"round {round_} (seed {seed})"
            await core.write(ctx, "IRQ_STATUS", 3)
            core.check(good)

    core.simulate(bench, max_cycles=60000)


def test_without_counters() -> None:
    core = Core(arch=ARCH.replace(counters=False))

    async def bench(ctx: SimulatorContext) -> None:
        await core.start(ctx, [op(LOAD), END])
        await core.irq(ctx)
        assert await core.read(ctx, "COUNT_TOTAL") == 0

    core.simulate(bench)


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"^arch must be an ArchConfig, not 'small'$"):
        Control(arch="small")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^axi_id must be in 0\.\.1, not 2$"):
        Control(arch=ARCH, axi_id=2)
