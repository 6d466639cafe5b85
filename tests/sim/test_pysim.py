# amaranth: UnusedElaboratable=no
import random
import re

import pytest
from amaranth import ClockDomain, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out, connect, flipped

from nibblecore.errors import SimulationError
from nibblecore_sim.pysim import STALLS, Stalls, get, put, receive, send, simulate, transfer

BEAT = data.StructLayout({"lane": data.ArrayLayout(signed(4), 2), "last": 1})


class Register(wiring.Component):
    """Stream register with one item of storage; ``fault`` plants a bug."""

    LATENCY = 1

    def __init__(self, *, shape=8, fault=None):
        self.fault = fault
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.i.ready.eq(~self.o.valid | self.o.ready)
        with m.If(self.i.ready):
            m.d.sync += [self.o.valid.eq(self.i.valid), self.o.payload.eq(self.i.payload)]
        match self.fault:
            case "changes":
                with m.Elif(self.o.valid):
                    m.d.sync += self.o.payload.eq(self.i.payload)
            case "falls":
                with m.Elif(self.o.valid):
                    m.d.sync += self.o.valid.eq(0)
            case "ignores valid":
                with m.If(self.i.ready):
                    m.d.sync += self.o.valid.eq(1)
            case "never ready":
                m.d.comb += self.i.ready.eq(0)
        return m


class Fifo(wiring.Component):
    def __init__(self):
        super().__init__({"i": In(stream.Signature(8)), "o": Out(stream.Signature(8))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.fifo = fifo = SyncFIFOBuffered(width=8, depth=4)
        connect(m, flipped(self.i), fifo.w_stream)
        connect(m, fifo.r_stream, flipped(self.o))
        return m


@pytest.mark.parametrize(("producer", "consumer"), STALLS)
@pytest.mark.parametrize("component", [Register, Fifo])
@pytest.mark.parametrize("seed", [1, 2])
def test_items_pass_in_order_under_any_stalls(component, producer, consumer, seed, vcd):
    items = random.Random(seed).choices(range(256), k=100)
    run = transfer(component(), items, count=100, producer=producer, consumer=consumer, seed=seed, vcd=vcd)
    assert run.items == items, f"seed {seed}"


def test_cycles_are_counted():
    assert transfer(Register(), range(50), count=50, seed=1).cycles == 50 + Register.LATENCY


def test_stalls_cost_what_they_should():
    cycles = transfer(Register(), range(200), count=200, consumer=0.5, seed=3).cycles
    assert 300 < cycles < 550


def test_structs_are_dicts():
    items = [{"lane": [-8, 7], "last": 0}, {"lane": [3, -1], "last": 1}]
    run = transfer(Register(shape=BEAT), items, count=2, seed=1)
    assert run.items == items
    assert [item.lane[0] for item in run.items] == [-8, 3]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("changes", r"^o__payload changed from 0x[0-9a-f]+ to 0x[0-9a-f]+ before the item was taken$"),
        ("falls", r"^o__valid fell before the item was taken$"),
    ],
)
def test_broken_stream_rule_is_found(fault, text):
    with pytest.raises(SimulationError, match=text):
        transfer(Register(fault=fault), range(100), count=100, producer=0.5, consumer=0.5, seed=1)


def test_payload_is_random_while_not_valid():
    dut, seen = Register(fault="ignores valid"), []

    async def produce(ctx):
        await send(ctx, dut.i, [1] * 20, stalls=Stalls(0.5, seed=1))

    async def consume(ctx):
        while True:
            seen.append(await get(ctx, dut.o))

    simulate(dut, produce, background=[consume])
    assert len(set(seen) - {0, 1}) > 3


def test_surplus_items_are_found():
    with pytest.raises(SimulationError, match=r"^o has 9 after the 9 items that were expected \(seed 1\)$"):
        transfer(Register(), range(10), count=9, seed=1)


def test_hang_says_who_waits_for_what():
    text = (
        "the benches have not finished after 1480 cycles:\n"
        "    produce: put waits for i__ready\n"
        "    consume: get waits for o__valid"
    )
    with pytest.raises(SimulationError, match=f"^{re.escape(text)}$"):
        transfer(Register(fault="never ready"), range(12), count=12, seed=1)


def test_watchdog_names_a_bench_that_waits_by_itself():
    async def sleeper(ctx):
        while True:
            await ctx.tick()

    text = "the benches have not finished after 20 cycles:\n    sleeper: not in put or get"
    with pytest.raises(SimulationError, match=f"^{re.escape(text)}$"):
        simulate(Register(), sleeper, max_cycles=20)


@pytest.mark.parametrize(
    ("shape", "item", "held"),
    [
        (signed(4), 8, "-8"),
        (4, -1, "15"),
        (BEAT, {"lane": [0, 8], "last": 0}, "Const(StructLayout({"),
    ],
)
def test_items_that_do_not_fit_are_errors(shape, item, held):
    text = f"{item!r} does not fit i__payload, which holds {held}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        transfer(Register(shape=shape), [item], count=1, seed=1)


def test_put_get_send_receive_in_own_benches():
    dut, seen = Register(), []

    async def produce(ctx):
        await put(ctx, dut.i, 1)
        await send(ctx, dut.i, [2, 3])

    async def consume(ctx):
        seen.append(await get(ctx, dut.o))
        seen.extend(await receive(ctx, dut.o, 2))

    simulate(dut, produce, consume, checked=[dut.o])
    assert seen == [1, 2, 3]


def test_streams_that_are_always_ready_and_valid():
    class Plain(wiring.Component):
        def __init__(self):
            signature = stream.Signature(8, always_ready=True, always_valid=True)
            super().__init__({"i": In(signature), "o": Out(signature)})

        def elaborate(self, platform):
            m = Module()
            m.d.sync += self.o.payload.eq(self.i.payload)
            return m

    dut, seen = Plain(), []

    async def produce(ctx):
        await send(ctx, dut.i, [5, 6, 7])

    async def consume(ctx):
        seen.extend(await receive(ctx, dut.o, 4))

    simulate(dut, produce, consume)
    assert seen == [0, 5, 6, 7]


class Maximum(wiring.Component):
    def __init__(self):
        super().__init__({"a": In(4), "b": In(4), "o": Out(4)})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.o.eq(Mux(self.a > self.b, self.a, self.b))
        return m


def test_combinational_component_has_no_clock():
    dut, seen = Maximum(), []

    async def bench(ctx):
        for a, b in ((3, 9), (9, 3)):
            ctx.set(dut.a, a)
            ctx.set(dut.b, b)
            await ctx.delay(1e-9)
            seen.append(ctx.get(dut.o))

    assert simulate(dut, bench, clocks={}) == 0
    assert seen == [9, 9]
    text = "there is no clock domain 'sync' in Maximum; a combinational component needs clocks={}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        simulate(Maximum(), bench)


def test_several_clocks_and_background_benches():
    m = Module()
    m.domains.fast = ClockDomain("fast", local=False)
    slow, fast = Signal(8), Signal(8)
    m.d.sync += slow.eq(slow + 1)
    m.d.fast += fast.eq(fast + 1)
    seen = []

    async def follow(ctx):
        while True:
            await ctx.tick()
            seen.append(ctx.get(slow))

    async def bench(ctx):
        for _ in range(10):
            await ctx.tick()
        assert 38 <= ctx.get(fast) <= 42

    assert simulate(m, bench, background=[follow], clocks={"sync": 4e-8, "fast": 1e-8}) == 10
    assert seen == list(range(1, 11))


def test_waveform_only_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transfer(Register(), [1], count=1, seed=1)
    assert list(tmp_path.iterdir()) == []
    transfer(Register(), [1], count=1, seed=1, vcd=tmp_path / "wave.vcd")
    assert "$enddefinitions" in (tmp_path / "wave.vcd").read_text()


def test_a_bench_is_needed():
    with pytest.raises(ValueError, match=r"^there is no bench to run$"):
        simulate(Register())


@pytest.mark.parametrize("seed", range(3))
def test_stalls_are_random_and_reproducible(seed):
    stalls = Stalls(0.3, seed=seed)
    pauses = [stalls.pause() for _ in range(20_000)]
    again = Stalls(0.3, seed=seed)
    assert pauses == [again.pause() for _ in range(20_000)], f"seed {seed}"
    assert 0.25 < sum(pauses) / len(pauses) < 0.35, f"seed {seed}"
    runs = "".join("#" if pause else "." for pause in pauses)
    assert "#" * 16 in runs, f"seed {seed}"
    assert not any(Stalls(0.0, seed=seed).pause() for _ in range(100))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"probability": 1.0}, "probability must be at least 0 and below 1, not 1.0"),
        ({"probability": -0.1}, "probability must be at least 0 and below 1, not -0.1"),
        ({"probability": 0.5, "longest": 0}, "longest must be at least 1, not 0"),
    ],
)
def test_stalls_check_their_arguments(arguments, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Stalls(**arguments, seed=1)
