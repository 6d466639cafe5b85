# amaranth: UnusedElaboratable=no
"""Every register's access through AXI4-Lite, against a model made from the register map."""

import random
from typing import Any

import pytest
from amaranth import ResetInserter, Signal
from amaranth.sim import SimulatorContext

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import ISA_VERSION, REGIONS
from nibblecore.arch.regs import CSR_ADDR_BITS, MAGIC, REGISTERS, Counter
from nibblecore_hw.ctrl.csr import OKAY, SLVERR, Csr, bits_of
from nibblecore_sim.pysim import Stalls, simulate

ARCH = ArchConfig(name="t", lanes=4, columns=4, post_lanes=2, acc_depth=16, act_depth=256, weight_depth=256)
BY_OFFSET = {r.offset: r for r in REGISTERS.values()}
ALL = 0xFFFF_FFFF
REGION_NAMES = [f"REGION{n}_{what}" for n in range(REGIONS) for what in ("BASE", "SIZE")]


async def handshake(ctx: SimulatorContext, valid: Any, ready: Any) -> None:
    ctx.set(valid, 1)
    while True:
        _, _, taken = await ctx.tick().sample(ready)
        if taken:
            break
    ctx.set(valid, 0)


async def write(
    ctx: SimulatorContext, bus: Any, offset: int, value: int, strobes: int = 15, order: int = 0, wait: int = 0
) -> int:
    """One write; ``order`` 0: address and data at once, 1: address first, 2: data first. The response."""
    ctx.set(bus.awaddr, offset)
    ctx.set(bus.wdata, value)
    ctx.set(bus.wstrb, strobes)
    if order == 0:
        ctx.set(bus.awvalid, 1)
        ctx.set(bus.wvalid, 1)
        while ctx.get(bus.awvalid) or ctx.get(bus.wvalid):
            _, _, address, data = await ctx.tick().sample(bus.awready, bus.wready)
            if address:
                ctx.set(bus.awvalid, 0)
            if data:
                ctx.set(bus.wvalid, 0)
    else:
        pairs = [(bus.awvalid, bus.awready), (bus.wvalid, bus.wready)]
        for valid, ready in pairs if order == 1 else reversed(pairs):
            await handshake(ctx, valid, ready)
            for _ in range(wait):
                await ctx.tick()
    ctx.set(bus.awaddr, ALL)
    ctx.set(bus.wdata, ALL)
    for _ in range(wait):
        await ctx.tick()
    return (await response(ctx, bus.bvalid, bus.bready, bus.bresp))[0]


async def read(ctx: SimulatorContext, bus: Any, offset: int, wait: int = 0) -> tuple[int, int]:
    """One read: response and data."""
    ctx.set(bus.araddr, offset)
    await handshake(ctx, bus.arvalid, bus.arready)
    ctx.set(bus.araddr, ALL)
    for _ in range(wait):
        await ctx.tick()
    resp, data = await response(ctx, bus.rvalid, bus.rready, bus.rresp, bus.rdata)
    return resp, data


async def response(ctx: SimulatorContext, valid: Any, ready: Any, *values: Any) -> list[int]:
    ctx.set(ready, 1)
    for _ in range(40):
        _, _, done, *result = await ctx.tick().sample(valid, *values)
        if done:
            ctx.set(ready, 0)
            return result
    raise AssertionError("no response in 40 cycles")


async def shown_to_core(ctx: SimulatorContext, dut: Csr, name: str) -> int:
    """What the core sees of a register that can be written."""
    if name not in REGION_NAMES:
        return int(ctx.get(getattr(dut, name.lower())))
    number, size = divmod(REGION_NAMES.index(name), 2)
    ctx.set(dut.region_number, number)
    ctx.set(dut.region_size, size)
    ctx.set(dut.region_en, 1)
    word = ctx.get(dut.region_word)
    ctx.set(dut.region_en, 0)
    if number == 0:
        assert ctx.get(dut.fetch_region.size if size else dut.fetch_region.base) == word
    return int(word)


def stretch(strobes: int) -> int:
    return sum(0xFF << 8 * n for n in range(4) if strobes >> n & 1)


def test_identity() -> None:
    dut = Csr(arch=ARCH)

    async def bench(ctx: SimulatorContext) -> None:
        assert await read(ctx, dut.s_axil, REGISTERS["MAGIC"].offset) == (OKAY, MAGIC)
        assert await read(ctx, dut.s_axil, REGISTERS["VERSION"].offset) == (OKAY, ISA_VERSION)
        assert await read(ctx, dut.s_axil, REGISTERS["CONFIG_HASH"].offset) == (OKAY, ARCH.hash)

    simulate(dut, bench)


@pytest.mark.parametrize("seed", range(2))
def test_every_register(seed: int) -> None:
    """Reset value, read, write with random strobes, of every offset of the map, holes included."""
    rng = random.Random(seed)
    dut = Csr(arch=ARCH)
    bus = dut.s_axil
    shown = {
        name: rng.getrandbits(32)
        for name, r in REGISTERS.items()
        if r.access in ("ro", "w1c") and hasattr(dut, name.lower())
    }
    held = {r.name: r.reset for r in REGISTERS.values() if r.access == "rw"}
    counts = {f"COUNT_{c.name}": rng.getrandbits(32) for c in Counter}
    constants = {"MAGIC": MAGIC, "VERSION": ISA_VERSION, "CONFIG_HASH": ARCH.hash}
    strobed: list[str] = []
    ones: dict[str, int] = {}

    async def counter_turns(ctx: SimulatorContext) -> None:
        turn = 0
        while True:
            ctx.set(dut.slot, turn)
            ctx.set(dut.count, counts.get(f"COUNT_{Counter(turn).name}", 0) if turn < len(Counter) else 0)
            await ctx.tick()
            turn = (turn + 1) % 16

    async def watch(ctx: SimulatorContext) -> None:
        """What the core sees of writes."""
        names = [n for n, r in REGISTERS.items() if r.access == "rw" and n not in REGION_NAMES]
        commands = [n for n, r in REGISTERS.items() if r.access in ("wo", "w1c")]
        while True:
            _, _, *values = await ctx.tick().sample(
                *(getattr(dut, f"{n.lower()}_stb") for n in names),
                *(getattr(dut, f"{n.lower()}_ones") for n in commands),
            )
            for name, stb in zip(names, values, strict=False):
                if stb:
                    strobed.append(name)
            for name, value in zip(commands, values[len(names) :], strict=True):
                if value:
                    assert name not in ones
                    ones[name] = value

    def expected(name: str) -> int:
        register = REGISTERS[name]
        if register.access == "wo":
            return 0
        if register.access == "rw":
            return held[name]
        return {**constants, **counts}.get(name, shown.get(name, 0) & bits_of(register))

    async def bench(ctx: SimulatorContext) -> None:
        for name, value in shown.items():
            ctx.set(getattr(dut, name.lower()), value)
        offsets = list(range(0, 1 << CSR_ADDR_BITS, 4))
        rng.shuffle(offsets)
        for offset in offsets:
            register = BY_OFFSET.get(offset)
            note = f"{register.name if register else hex(offset)} (seed {seed})"
            at = offset + rng.randrange(4)  # the lowest bits count for nothing
            if register is None:
                assert await read(ctx, bus, at) == (SLVERR, 0), note
            else:
                assert await read(ctx, bus, at, wait=rng.randrange(3)) == (OKAY, expected(register.name)), note
            for _ in range(2):
                strobed.clear()
                ones.clear()
                value, strobes = rng.getrandbits(32), rng.randrange(16)
                resp = await write(ctx, bus, at, value, strobes, order=rng.randrange(3), wait=rng.randrange(3))
                await ctx.tick()
                assert resp == (SLVERR if register is None or register.access == "ro" else OKAY), note
                effective = value & stretch(strobes) & (bits_of(register) if register else 0)
                if register is not None and register.access == "rw":
                    held[register.name] = effective | held[register.name] & ~stretch(strobes)
                    assert strobed == [register.name] * (register.name not in REGION_NAMES), note
                else:
                    assert strobed == [], note
                if register is not None and register.access in ("wo", "w1c") and effective:
                    assert ones == {register.name: effective}, note
                else:
                    assert ones == {}, note
                for name, value in held.items():
                    assert await shown_to_core(ctx, dut, name) == value, f"{name} after {note}"
            if register is not None:
                assert await read(ctx, bus, at) == (OKAY, expected(register.name)), note

    simulate(dut, bench, background=[counter_turns, watch], max_cycles=40000)


def test_without_counters_they_read_as_0() -> None:
    dut = Csr(arch=ARCH.replace(counters=False))
    assert not hasattr(dut, "slot")

    async def bench(ctx: SimulatorContext) -> None:
        for c in Counter:
            offset = REGISTERS[f"COUNT_{c.name}"].offset
            assert await read(ctx, dut.s_axil, offset) == (OKAY, 0)
            assert await write(ctx, dut.s_axil, offset, 1) == SLVERR

    simulate(dut, bench)


@pytest.mark.parametrize("seed", range(3))
def test_channels_with_random_stalls(seed: int) -> None:
    """Independent traffic on all five channels: one answer per access, in order, stable until it is taken."""
    rng = random.Random(seed)
    dut = Csr(arch=ARCH)
    bus = dut.s_axil
    regions = [f"REGION{n}_{what}" for n in range(8) for what in ("BASE", "SIZE")]
    writes = [(rng.choice(regions), rng.getrandbits(32), rng.randrange(16)) for _ in range(60)]
    holes = [rng.random() < 0.2 for _ in writes]
    reads = [rng.choice(["MAGIC", "CONFIG_HASH", "NONE"]) for _ in range(60)]
    held = dict.fromkeys(regions, 0)

    async def drive(ctx: SimulatorContext, valid: Any, ready: Any, items: list[dict[str, int]], stalls: Stalls) -> None:
        for item in items:
            while stalls.pause():
                await ctx.tick()
            for name, value in item.items():
                ctx.set(getattr(bus, name), value)
            await handshake(ctx, valid, ready)

    async def addresses(ctx: SimulatorContext) -> None:
        offsets = [0x1F8 if hole else REGISTERS[name].offset for (name, _, _), hole in zip(writes, holes, strict=True)]
        await drive(ctx, bus.awvalid, bus.awready, [{"awaddr": o} for o in offsets], Stalls(0.5, seed=seed))

    async def words(ctx: SimulatorContext) -> None:
        items = [{"wdata": value, "wstrb": strobes} for _, value, strobes in writes]
        await drive(ctx, bus.wvalid, bus.wready, items, Stalls(0.5, seed=seed + 1))

    async def read_addresses(ctx: SimulatorContext) -> None:
        items = [{"araddr": REGISTERS[name].offset if name in REGISTERS else 0x1F8} for name in reads]
        await drive(ctx, bus.arvalid, bus.arready, items, Stalls(0.3, seed=seed + 2))

    async def collect(ctx: SimulatorContext, valid: Any, ready: Any, values: list[Any], count: int) -> list[list[int]]:
        stalls, got, offered = Stalls(0.5, seed=seed + 3), [], None
        while len(got) < count:
            pause = stalls.pause()
            ctx.set(ready, not pause)
            _, _, there, *now = await ctx.tick().sample(valid, *values)
            assert offered is None or (there and now == offered), f"an answer changed or went (seed {seed})"
            offered = now if there and pause else None
            if there and not pause:
                got.append(now)
        ctx.set(ready, 0)
        return got

    async def responses(ctx: SimulatorContext) -> None:
        got = await collect(ctx, bus.bvalid, bus.bready, [bus.bresp], len(writes))
        assert got == [[SLVERR if hole else OKAY] for hole in holes], f"seed {seed}"
        for (name, value, strobes), hole in zip(writes, holes, strict=True):
            if not hole:
                held[name] = value & stretch(strobes) | held[name] & ~stretch(strobes)
        for name, value in held.items():
            assert await shown_to_core(ctx, dut, name) == value, f"{name} (seed {seed})"

    async def data(ctx: SimulatorContext) -> None:
        got = await collect(ctx, bus.rvalid, bus.rready, [bus.rresp, bus.rdata], len(reads))
        values = {"MAGIC": [OKAY, MAGIC], "CONFIG_HASH": [OKAY, ARCH.hash], "NONE": [SLVERR, 0]}
        assert got == [values[name] for name in reads], f"seed {seed}"

    simulate(dut, addresses, words, read_addresses, responses, data)


def test_cycles() -> None:
    dut = Csr(arch=ARCH)
    bus = dut.s_axil

    async def bench(ctx: SimulatorContext) -> None:
        await ctx.tick().repeat(16)  # the regions are being cleared
        ctx.set(bus.awaddr, REGISTERS["WATCHDOG"].offset)
        ctx.set(bus.wdata, 5)
        ctx.set(bus.wstrb, 15)
        ctx.set(bus.awvalid, 1)
        ctx.set(bus.wvalid, 1)
        ctx.set(bus.araddr, 0)
        ctx.set(bus.arvalid, 1)
        await ctx.tick()  # all accepted
        for valid in (bus.awvalid, bus.wvalid, bus.arvalid):
            ctx.set(valid, 0)
        assert not ctx.get(bus.bvalid)
        assert not ctx.get(bus.rvalid)
        await ctx.tick()
        assert ctx.get(bus.bvalid)
        assert not ctx.get(bus.rvalid)
        assert ctx.get(dut.watchdog) == 5
        assert ctx.get(dut.watchdog_stb)
        await ctx.tick()
        assert ctx.get(bus.rvalid)
        assert not ctx.get(dut.watchdog_stb)

    simulate(dut, bench)


@pytest.mark.parametrize("reset_at", [0, 7, 40])
def test_a_reset_clears_the_regions(reset_at: int) -> None:
    reset, dut = Signal(), Csr(arch=ARCH)
    offsets = [REGISTERS[name].offset for name in REGION_NAMES]

    async def bench(ctx: SimulatorContext) -> None:
        for offset in offsets:
            assert await write(ctx, dut.s_axil, offset, ALL) == OKAY
        for _ in range(2):  # a reset in the middle of clearing too
            ctx.set(reset, 1)
            await ctx.tick()
            ctx.set(reset, 0)
            await ctx.tick().repeat(reset_at + 1)
        for offset in reversed(offsets):
            assert await read(ctx, dut.s_axil, offset) == (OKAY, 0)

    simulate(ResetInserter(reset)(dut), bench)


def test_reads_of_regions_wait_for_the_core() -> None:
    rng = random.Random(5)
    dut = Csr(arch=ARCH)
    held = {name: rng.getrandbits(32) for name in REGION_NAMES}

    async def core(ctx: SimulatorContext) -> None:
        while True:
            number, size = rng.randrange(REGIONS), rng.randrange(2)
            ctx.set(dut.region_en, rng.random() < 0.6)
            ctx.set(dut.region_number, number)
            ctx.set(dut.region_size, size)
            await ctx.tick()

    async def bench(ctx: SimulatorContext) -> None:
        for name, value in held.items():
            assert await write(ctx, dut.s_axil, REGISTERS[name].offset, value) == OKAY
        for name in rng.choices(REGION_NAMES, k=60):
            assert await read(ctx, dut.s_axil, REGISTERS[name].offset) == (OKAY, held[name]), name

    simulate(dut, bench, background=[core])


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"^arch must be an ArchConfig, not 'small'$"):
        Csr(arch="small")  # type: ignore[arg-type]


def test_without_queues_both_registers_of_a_region_are_there_until_the_next_look() -> None:
    arch = ArchConfig(
        name="t", lanes=8, columns=4, acc_depth=16, post_lanes=1, act_depth=256, act_banks=1, weight_depth=256,
        bus_bits=32, burst_beats=8, queue_depth=0,
    )  # fmt: skip
    dut, rng = Csr(arch=arch), random.Random(12)

    async def bench(ctx: SimulatorContext) -> None:
        ctx.set(dut.s_axil.bready, 1)
        wanted = [0] * (2 * REGIONS)
        for _ in range(30):
            n, value, strobes = rng.randrange(2 * REGIONS), rng.getrandbits(32), rng.randrange(16)
            assert await write(ctx, dut.s_axil, REGISTERS[REGION_NAMES[n]].offset, value, strobes) == OKAY
            mask = sum(0xFF << 8 * byte for byte in range(4) if strobes >> byte & 1)
            wanted[n] = wanted[n] & ~mask | value & mask
            region = rng.randrange(REGIONS)
            ctx.set(dut.region_number, region)
            ctx.set(dut.region_en, 1)
            await ctx.tick()
            ctx.set(dut.region_en, 0)
            ctx.set(dut.region_number, rng.randrange(REGIONS))
            n = rng.randrange(2 * REGIONS)
            # A read of the host does not touch it.
            assert await read(ctx, dut.s_axil, REGISTERS[REGION_NAMES[n]].offset) == (OKAY, wanted[n])
            found = [ctx.get(dut.region.base), ctx.get(dut.region.size)]
            assert found == wanted[2 * region : 2 * region + 2], "seed 12"

    simulate(dut, bench, max_cycles=2000)
