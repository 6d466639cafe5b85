# amaranth: UnusedElaboratable=no
"""The MAC engine against its model, and its cycles against the formula of its documentation."""

import dataclasses
import random
import re
from typing import Any

import pytest
from amaranth import Module, ResetInserter, Signal
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.elements import swap_cycles, tile_cycles
from nibblecore.arch.isa import Instruction, Opcode, encode, make
from nibblecore_hw.core.mac import MacEngine
from nibblecore_hw.layouts import ACC_READ_LATENCY, LAST_READ_LATENCY
from nibblecore_sim.pysim import simulate


def config(lanes: int = 4, columns: int = 4, **changes: Any) -> ArchConfig:
    return ArchConfig(
        **{
            "name": "t",
            "lanes": lanes,
            "columns": columns,
            "post_lanes": 2,
            "acc_depth": 16,
            "act_depth": 256,
            "weight_depth": 256,
        }
        | changes
    )


CONFIGS = {
    "square": config(),
    "narrow": config(8, 2, post_lanes=1, act_memory="single", weight_memory="single"),
    "wide": config(4, 8),
    "one_group": config(4, 4, post_lanes=4),
    "one_column": config(4, 1, post_lanes=1, element="bitplane"),
    "dsp": config(4, 4, element="dsp"),
    "tables": config(4, 4, element="lutram2", adder_levels=1),
    "tables_mix": config(4, 8, element="lutram2", dsp_columns=4),
    "one_table": config(4, 4, element="lutram"),
    "one_table_single": config(8, 8, post_lanes=1, element="lutram", act_memory="single", weight_memory="single"),
    "one_table_mix": config(4, 8, element="lutram", dsp_columns=4),
    "mix": config(4, 8, element="bitplane", dsp_columns=4, adder_levels=1),
}


def random_instruction(rng: random.Random, arch: ArchConfig, *, bank: int) -> Instruction:
    """Any MAC instruction that does not run for too long; tiles of 1 pixel up to ``acc_depth``."""
    cols = rng.choice([1, 1, 2, 3, 4, 5, arch.acc_depth])
    rows = rng.choice([1, 2, 3, arch.acc_depth // cols])
    rows = max(1, min(rows, arch.acc_depth // cols))
    big = rng.random() < 0.3

    def step(bits: int) -> int:
        if bits == 16:
            return rng.randint(-(1 << 15), (1 << 15) - 1) if big else rng.randint(-20, 20)
        return rng.randrange(1 << bits) if big else rng.randint(0, 4)

    return make(
        Opcode.MAC,
        acc_bank=bank,
        accumulate=rng.randrange(2),
        shift=rng.randrange(3),
        w_addr=rng.randrange(1 << 16),
        w_step=rng.choice([0, arch.columns, arch.columns, 255]),
        x_addr=rng.randrange(1 << 16),
        cols=cols,
        rows=rows,
        bricks=rng.choice([1, 1, 2, 3]),
        kernel_x=rng.choice([1, 1, 2, 3]),
        kernel_y=rng.choice([1, 1, 2]),
        ox_step=step(16),
        oy_step=step(16),
        brick_step=step(12),
        kx_step=step(16),
        ky_step=step(16),
        x0=rng.randint(-128, 127) if big else rng.randint(-4, 2),
        y0=rng.randint(-4, 2),
        width=rng.choice([1, 5, 2048]),
        height=rng.choice([1, 4, 2048]),
        stride_x=rng.choice([1, 2, 16]),
        stride_y=rng.choice([1, 2, 3]),
        dilation_x=rng.choice([1, 2, 32]),
        dilation_y=rng.choice([1, 2, 5]),
        pad=rng.randint(-8, 7),
    )


def random_weights(rng: random.Random, arch: ArchConfig) -> int:
    """A word of the weight buffer, of weights that the elements take."""
    low, high = arch.weight_range
    return sum((rng.randint(low, high) & 15) << 4 * lane for lane in range(arch.lanes))


@dataclasses.dataclass
class Trace:
    """Cycles of what happened, counted from the first cycle with an offer."""

    accepted: list[int] = dataclasses.field(default_factory=list)
    entered: list[int] = dataclasses.field(default_factory=list)
    done: list[int] = dataclasses.field(default_factory=list)
    busy: list[int] = dataclasses.field(default_factory=list)
    mac_weights: list[int] = dataclasses.field(default_factory=list)
    mac_bank: list[int] = dataclasses.field(default_factory=list)
    x_refused: list[int] = dataclasses.field(default_factory=list)


def passes_of(i: Instruction) -> int:
    return i["bricks"] * i["kernel_x"] * i["kernel_y"]


def pixels_of(i: Instruction) -> int:
    return i["rows"] * i["cols"]


def run(
    engine: MacEngine,
    arch: ArchConfig,
    instructions: list[Instruction],
    *,
    seed: int,
    x_stall: float = 0.0,
    w_stall: float = 0.0,
    offer_stall: float = 0.0,
    offer_gap: int = 0,
    drain: bool = True,
    reset_after: int | None = None,
) -> Trace:
    """Run instructions and compare every accumulator of each with the model.

    With ``reset_after``, an instruction that does not count is reset so many cycles after its offer, before all others.

    With ``drain``, an instruction's bank is read as soon as it is done, while others run, and an instruction is offered
    when the earlier ones of its bank have been read. Without, both banks are read at the end.
    """
    rng = random.Random(seed)
    x = [rng.getrandbits(arch.word_bits) for _ in range(arch.act_depth)]
    w = [random_weights(rng, arch) for _ in range(arch.weight_depth)]
    acc = [[[0] * arch.columns for _ in range(arch.acc_depth)] for _ in range(2)]
    expected = []
    for i in instructions:
        engine.model(i, x=x, w=w, acc=acc)
        expected.append([list(cells) for cells in acc[i["acc_bank"]]])
    groups = arch.columns // arch.post_lanes
    trace = Trace()
    drained = 0
    label = f"seed={seed} x_stall={x_stall} w_stall={w_stall}"

    rst = Signal()

    async def offer(ctx: Any) -> None:
        if reset_after is not None:
            ctx.set(engine.command.payload, encode(make(Opcode.MAC, cols=5, kernel_x=20, ox_step=1, width=2048)))
            ctx.set(engine.command.valid, 1)
            await ctx.tick().repeat(reset_after)
            ctx.set(rst, 1)
            ctx.set(engine.command.valid, 0)
            await ctx.tick()
            ctx.set(rst, 0)
            await ctx.tick()  # so that `monitor` has seen the cycle of the reset
            for record in vars(trace).values():
                record.clear()
        for n, i in enumerate(instructions):
            while drain and any(later["acc_bank"] == i["acc_bank"] for later in instructions[drained:n]):
                await ctx.tick()
            while rng.random() < offer_stall:
                await ctx.tick()
            for _ in range(offer_gap if n else 0):
                await ctx.tick()
            ctx.set(engine.command.payload, encode(i))
            ctx.set(engine.command.valid, 1)
            while not (await ctx.tick().sample(engine.command.ready))[2]:
                pass
            ctx.set(engine.command.valid, 0)
            ctx.set(engine.command.payload, rng.getrandbits(256))

    # Whether a bank is free; the one that is asked for, as the buffer answers.
    x_free, w_free = Signal(arch.act_banks), Signal()
    row_bits = ceil_log2(arch.act_depth // arch.act_banks)

    def buffer(port: Any, words: list[int], stall: float, free: Signal, free_next: Signal) -> Any:
        async def serve(ctx: Any) -> None:
            under_way: list[int | None] = [None] * LAST_READ_LATENCY
            free_then = (1 << len(free)) - 1
            while True:
                arrived = under_way.pop()
                ctx.set(port.data, rng.getrandbits(arch.word_bits) if arrived is None else words[arrived])
                ctx.set(free, free_then)
                free_then = sum((rng.random() >= stall) << n for n in range(len(free)))
                ctx.set(free_next, free_then)
                _, _, valid, ready, addr = await ctx.tick().sample(port.valid, port.ready, port.addr)
                under_way.insert(0, addr if valid and ready else None)

        return serve

    async def monitor(ctx: Any) -> None:
        cycle = 0
        begun = False
        while True:
            _, _, valid, ready, enters, stb, busy, weights, bank, x_valid, x_ready = await ctx.tick().sample(
                engine.command.valid,
                engine.command.ready,
                engine.mac_active,
                engine.done_stb,
                engine.busy,
                engine.mac_weights,
                engine.mac_bank,
                engine.x.valid,
                engine.x.ready,
            )
            begun = begun or valid
            assert enters + weights + bank <= 1, label
            for name, happened in (
                ("entered", enters),
                ("done", stb),
                ("busy", busy),
                ("mac_weights", weights),
                ("mac_bank", bank),
                ("accepted", valid and ready),
                ("x_refused", x_valid and not x_ready),
            ):
                if happened:
                    getattr(trace, name).append(cycle)
            cycle += begun

    async def read_bank(ctx: Any, bank: int, pixels: int) -> list[list[int]]:
        places = [(pixel, group) for pixel in range(pixels) for group in range(groups)]
        rng.shuffle(places)
        cells = [[0] * arch.columns for _ in range(pixels)]
        for n in range(len(places) + ACC_READ_LATENCY):
            ctx.set(engine.acc_read.en, n < len(places))
            if n < len(places):
                ctx.set(engine.acc_read.addr, places[n][0])
                ctx.set(engine.acc_read.group, places[n][1])
            ctx.set(engine.acc_read.bank, bank if n < len(places) else rng.randrange(2))
            _, _, *data = await ctx.tick().sample(*(engine.acc_read.data[lane] for lane in range(arch.post_lanes)))
            if n >= ACC_READ_LATENCY:
                pixel, group = places[n - ACC_READ_LATENCY]
                cells[pixel][group * arch.post_lanes : (group + 1) * arch.post_lanes] = data
        return cells

    async def check(ctx: Any) -> None:
        nonlocal drained
        for n, i in enumerate(instructions):
            while len(trace.done) <= n:
                await ctx.tick()
            if drain:
                cells = await read_bank(ctx, i["acc_bank"], pixels_of(i))
                assert cells == expected[n][: pixels_of(i)], f"{label}: instruction {n}, {i}"
            drained = n + 1
        for bank in range(2):
            assert await read_bank(ctx, bank, arch.acc_depth) == acc[bank], f"{label}: bank {bank} at the end"
        for _ in range(20):
            await ctx.tick()

    dut = Module()
    dut.submodules.engine = engine if reset_after is None else ResetInserter(rst)(engine)
    dut.d.comb += [engine.x.ready.eq(x_free.bit_select(engine.x.addr[row_bits:], 1)), engine.w.ready.eq(w_free)]
    simulate(
        dut,
        offer,
        check,
        background=[
            buffer(engine.x, x, x_stall, x_free, engine.x_ready_next),
            buffer(engine.w, w, w_stall, w_free, engine.w_ready_next),
            monitor,
        ],
        max_cycles=60_000,
    )
    assert len(trace.done) == len(instructions), label
    assert len(trace.entered) == sum(passes_of(i) * pixels_of(i) for i in instructions), label
    assert trace.mac_bank == trace.x_refused, label
    return trace


def filled(arch: ArchConfig) -> list[Instruction]:
    """Instructions that overwrite all accumulators of both banks, whose contents are undefined before."""
    return [make(Opcode.MAC, acc_bank=bank, cols=arch.acc_depth, ox_step=1, width=2048) for bank in range(2)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("x_stall", "w_stall", "offer_stall"), [(0.4, 0.0, 0.0), (0.0, 0.5, 0.3), (0.7, 0.2, 0.8)])
def test_random_instructions_equal_the_model(kind: str, x_stall: float, w_stall: float, offer_stall: float) -> None:
    arch = CONFIGS[kind]
    seed = int(10 * x_stall + 100 * w_stall)
    rng = random.Random(f"{kind} {seed}")
    instructions = filled(arch) + [
        random_instruction(rng, arch, bank=rng.choice([n % 2, n % 2, rng.randrange(2)])) for n in range(8)
    ]
    run(MacEngine(arch), arch, instructions, seed=seed, x_stall=x_stall, w_stall=w_stall, offer_stall=offer_stall)


@pytest.mark.parametrize("cycles", [1, 3, 5, 6, 30])
def test_a_reset_abandons_an_instruction_at_any_time(cycles: int) -> None:
    arch = CONFIGS["square"]
    rng = random.Random(cycles)
    instructions = [*filled(arch), random_instruction(rng, arch, bank=0)]
    trace = run(MacEngine(arch), arch, instructions, seed=cycles, x_stall=0.2, w_stall=0.2, reset_after=cycles)
    assert len(trace.accepted) == 3


@pytest.mark.parametrize("kind", CONFIGS)
def test_small_tiles_one_after_the_other_on_one_bank(kind: str) -> None:
    """The hazard: every instruction adds to what the one before has just written, with pixels delayed at random."""
    arch = CONFIGS[kind]
    rng = random.Random(kind)
    instructions = filled(arch)
    for _ in range(14):
        cols, rows = rng.choice([(1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (5, 1)])
        instructions.append(
            make(
                Opcode.MAC,
                accumulate=1,
                cols=cols,
                rows=rows,
                bricks=rng.choice([1, 1, 2, 3]),
                w_addr=rng.randrange(256),
                w_step=arch.columns,
                x_addr=rng.randrange(256),
                ox_step=1,
                oy_step=7,
                brick_step=3,
                width=2048,
                height=2048,
            )
        )
    for x_stall, w_stall in ((0.5, 0.0), (0.3, 0.2)):
        run(MacEngine(arch), arch, instructions, seed=3, x_stall=x_stall, w_stall=w_stall, drain=False)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("offer_gap", [0, 1])
def test_cycles_of_the_documentation(kind: str, offer_gap: int) -> None:
    """Pixels enter without a gap within and between instructions, though commands come every second cycle at most."""
    arch = CONFIGS[kind]
    rng = random.Random(f"{kind} {offer_gap}")
    engine = MacEngine(arch)
    instructions = filled(arch) + [random_instruction(rng, arch, bank=rng.randrange(2)) for _ in range(12)]
    trace = run(engine, arch, instructions, seed=1, offer_gap=offer_gap, drain=False)
    entered, done, begin = [], [], engine.start_cycles
    for i in instructions:
        pixels = pixels_of(i)
        for _ in range(passes_of(i)):
            entered += range(begin, begin + pixels)
            begin += max(pixels + pixels % 2 * (arch.paired_columns > 0), swap_cycles(arch, pixels), engine.HAZARD)
        done.append(entered[-1] + engine.drain_cycles)
    assert trace.entered == entered
    assert trace.done == done
    assert trace.busy == list(range(done[-1] + 1))
    assert trace.accepted[0] == 2
    assert trace.mac_bank == []


@pytest.mark.parametrize("kind", CONFIGS)
def test_cycles_of_one_instruction(kind: str) -> None:
    arch = CONFIGS[kind]
    i = make(Opcode.MAC, cols=3, rows=2, bricks=2, kernel_x=3, width=5, height=5, x0=-1)
    engine = MacEngine(arch)
    trace = run(engine, arch, [i], seed=0)
    assert trace.done == [engine.cycles(pixels=6, passes=6)]
    assert trace.entered[0] == engine.start_cycles == max(tile_cycles(arch), 5)
    assert engine.pass_cycles(pixels=1) == max(tile_cycles(arch), 4)


@pytest.mark.parametrize(("pixels", "slack"), [(4, 0), (6, 2)])
def test_a_command_is_in_time_until_the_first_pixel_of_the_pass_before(pixels: int, slack: int) -> None:
    """The first command is accepted in cycle 2 and enters in cycle 5; the second is offered in cycle ``3 + gap``."""
    arch = CONFIGS["square"]
    engine = MacEngine(arch)
    i = make(Opcode.MAC, cols=pixels, width=8)
    for gap in range(6):
        trace = run(engine, arch, [i, i], seed=gap, offer_gap=gap, drain=False)
        assert trace.entered[pixels] == engine.start_cycles + pixels + max(0, gap - 1 - slack), gap


def test_pixels_outside_the_map_need_no_bank() -> None:
    """With the activation buffer always refused, a window that lies outside goes through, and nothing else does."""
    arch = CONFIGS["square"]
    engine = MacEngine(arch)
    instructions = filled(arch)
    outside = make(Opcode.MAC, cols=4, rows=2, kernel_x=2, y0=-20, pad=-3, width=9, height=9)
    lanes = arch.lanes
    acc = [[[0] * arch.columns for _ in range(arch.acc_depth)] for _ in range(2)]
    w = [0x1111] * arch.weight_depth
    engine.model(outside, x=[0x7777] * arch.act_depth, w=w, acc=acc)
    assert acc[0][7] == [2 * -3 * lanes] * arch.columns
    seen: list[int] = []

    async def bench(ctx: Any) -> None:
        ctx.set(engine.w.ready, 1)
        ctx.set(engine.w.data, w[0])
        for i, cycles in ((outside, 60), (instructions[0], 60)):
            ctx.set(engine.command.payload, encode(i))
            ctx.set(engine.command.valid, 1)
            while not (await ctx.tick().sample(engine.command.ready))[2]:
                pass
            ctx.set(engine.command.valid, 0)
            for _ in range(cycles):
                _, _, stb, asks = await ctx.tick().sample(engine.done_stb, engine.x.valid)
                assert not (asks and i is outside)
                seen.append(stb)

    simulate(engine, bench)
    assert sum(seen[:60]) == 1
    assert sum(seen[60:]) == 0


def test_model_refuses_a_tile_larger_than_the_accumulators() -> None:
    arch = CONFIGS["square"]
    acc = [[[0] * arch.columns for _ in range(arch.acc_depth)] for _ in range(2)]
    with pytest.raises(ValueError, match=f"^{re.escape('rows * cols = 18 pixels exceed acc_depth=16')}$"):
        MacEngine(arch).model(make(Opcode.MAC, rows=2, cols=9), x=[0], w=[0], acc=acc)
