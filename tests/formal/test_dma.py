# amaranth: UnusedElaboratable=no
"""Proofs about the DMA: no burst leaves its region or crosses 4 KiB, and the arbiter keeps what it offers."""

from typing import Any

import pytest
from amaranth.asserts import AnySeq
from amaranth.hdl import Assert, Assume, Cat, Cover, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from nibblecore.arch.config import ArchConfig
from nibblecore_hw.dma.axi import AxiReadArbiter
from nibblecore_hw.dma.region import RegionCheck
from nibblecore_hw.dma.walk import BurstIssue, dram_signature
from nibblecore_hw.layouts import axi_read_signature, region_layout
from nibblecore_hw.registers import SkidBuffer
from nibblecore_sim.formal import assert_stream_rule, assume_stream_rule, prove

pytestmark = pytest.mark.formal


class RegionSpec(wiring.Component):
    """Allowed exactly if every byte lies in the region and the first below the end of the address space."""

    def __init__(self, **parameters: int) -> None:
        self.parameters = parameters
        super().__init__({})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        unit, addr_bits = self.parameters["unit_bytes"], self.parameters["addr_bits"]
        m.submodules.check = check = RegionCheck(**self.parameters)
        base, size, offset, count_m1 = AnySeq(32), AnySeq(32), AnySeq(check.unit_bits), AnySeq(check.unit_bits)
        first = base[check.unit_log2 :] + offset
        last = first + count_m1
        m.d.comb += [
            check.first.eq(first),
            check.last.eq(last),
            check.limit.eq(check.limit_of(base, size)),
            check.aligned.eq(check.is_aligned(base)),
            # The walk's addresses do not wrap.
            Assume(last < 1 << check.unit_bits),
        ]
        # None of these sums can wrap: Amaranth's are as wide as they must be.
        start = base + offset * unit
        end = start + (count_m1 + 1) * unit
        inside = (end <= base + size) & (base % unit == 0) & (start < 1 << addr_bits)
        m.d.comb += [
            Assert(check.ok == inside),
            Assert(~check.ok | (check.address == start)),
            Assert(~check.ok | (size != 0)),
            Cover(check.ok & (end == base + size)),
            Cover(~check.ok & (start + unit == base + size)),
        ]
        # prove() wants a clocked design.
        m.d.sync += Signal(name="unused").eq(check.ok)
        return m


@pytest.mark.parametrize(("unit_bytes", "addr_bits"), [(1, 32), (2, 32), (8, 40), (8, 24), (32, 32)])
def test_region_check(unit_bytes: int, addr_bits: int) -> None:
    spec = {"unit_bytes": unit_bytes, "addr_bits": addr_bits}
    prove(RegionSpec(**spec), depth=1)
    prove(RegionSpec(**spec), depth=1, mode="cover")


class BurstSpec(wiring.Component):
    """Whatever the instruction, its region and the bus do, an address is only valid for a burst within the region that
    came with its instruction."""

    def __init__(self, *, arch: ArchConfig) -> None:
        self.arch = arch
        super().__init__(
            {
                "i": In(dram_signature()),
                "enable": In(1),
                "a_ready": In(1),
                "finished_stb": In(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.issue = issue = BurstIssue(arch=self.arch)
        connect(m, flipped(self.i), issue.i)
        m.d.comb += [
            issue.enable.eq(self.enable),
            issue.a_ready.eq(self.a_ready),
            issue.finished_stb.eq(self.finished_stb),
            Assume(~(self.finished_stb & issue.idle)),
        ]
        # The region of the instruction that was taken last; `burst_region` is a copy of it, made with the burst.
        taken, mine, burst = Signal(), Signal(region_layout()), issue.burst_region
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [taken.eq(1), mine.eq(self.i.payload.region)]
        beat_bytes = min(self.arch.bus_bytes, self.arch.word_bytes)
        length = (issue.a_len + 1) * beat_bytes
        held, held_addr, held_len = Signal(), Signal.like(issue.a_addr), Signal.like(issue.a_len)
        m.d.sync += [held.eq(issue.a_valid & ~self.a_ready), held_addr.eq(issue.a_addr), held_len.eq(issue.a_len)]
        m.d.comb += [
            # Invariants.
            Assert(taken | ~issue.busy),
            Assert(~taken | (mine == issue.region)),
            # The property, and the rules of AXI.
            Assert(~issue.a_valid | (issue.a_addr >= burst.base)),
            Assert(~issue.a_valid | (issue.a_addr + length <= burst.base + burst.size)),
            Assert(~issue.a_valid | (issue.a_addr[:12] + length <= 4096)),
            Assert(~issue.a_valid | (issue.a_len < self.arch.burst_beats)),
            Assert(~held | (issue.a_valid & (issue.a_addr == held_addr) & (issue.a_len == held_len))),
        ]
        return m


def make_arch(lanes: int, bus_bits: int, burst_beats: int, addr_bits: int = 32) -> ArchConfig:
    return ArchConfig(name="t", lanes=lanes, columns=16, post_lanes=max(1, lanes // 8), act_depth=256,
                      weight_depth=512, bus_bits=bus_bits, burst_beats=burst_beats, addr_bits=addr_bits)  # fmt: skip


@pytest.mark.parametrize(
    "arch",
    [
        make_arch(16, 64, 64),
        make_arch(16, 32, 2),
        make_arch(8, 64, 16),
        make_arch(4, 64, 256),
        make_arch(64, 128, 16, addr_bits=24),
    ],
    ids=lambda a: f"{a.lanes}-{a.bus_bits}-{a.burst_beats}",
)
def test_bursts_stay_in_their_region(arch: ArchConfig) -> None:
    prove(BurstSpec(arch=arch), depth=3, mode="induction")


class ArbiterSpec(wiring.Component):
    """Given masters that keep their addresses, the bus sees each address kept until it is taken, once, and every beat
    reaches the master that it is for."""

    def __init__(self, *, arch: ArchConfig) -> None:
        self.arch = arch
        super().__init__({"load": In(axi_read_signature(arch)), "fetch": In(axi_read_signature(arch)),
                          "bus": Out(axi_read_signature(arch))})  # fmt: skip

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.arbiter = arbiter = AxiReadArbiter(arch=self.arch)
        for name in ("load", "fetch"):
            connect(m, flipped(getattr(self, name)), getattr(arbiter, name))
        connect(m, arbiter.bus, flipped(self.bus))

        def kept(port: Any, what: Any) -> Any:
            waiting, payload = Signal(), Signal(len(port.araddr) + 9)
            now = Cat(port.araddr, port.arlen, port.arid)
            m.d.sync += [waiting.eq(port.arvalid & ~port.arready), payload.eq(now)]
            m.d.comb += what(~waiting | (port.arvalid & (payload == now)))

        kept(self.load, Assume)
        kept(self.fetch, Assume)
        kept(self.bus, Assert)
        load, fetch, bus = self.load, self.fetch, self.bus
        taken = bus.arvalid & bus.arready
        m.d.comb += [
            Assert(bus.arvalid == (load.arvalid | fetch.arvalid)),
            Assert((fetch.arvalid & fetch.arready) == (taken & bus.arid)),
            Assert((load.arvalid & load.arready) == (taken & ~bus.arid)),
            Assert(~(taken & bus.arid) | (bus.araddr == fetch.araddr)),
            Assert(~(taken & ~bus.arid) | (bus.araddr == load.araddr)),
            Assert((fetch.rvalid & fetch.rready) == (bus.rvalid & bus.rready & bus.rid)),
            Assert((load.rvalid & load.rready) == (bus.rvalid & bus.rready & ~bus.rid)),
            Cover(taken & ~bus.arid & fetch.arvalid),
        ]
        return m


def test_arbiter() -> None:
    prove(ArbiterSpec(arch=make_arch(16, 32, 16)), depth=2, mode="induction")
    prove(ArbiterSpec(arch=make_arch(16, 32, 16)), depth=4, mode="cover")


class SkidSpec(wiring.Component):
    """Items come out in the order in which they went in, none twice, none lost: they are numbered, modulo 16."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        super().__init__({"i": In(stream.Signature(4)), "o": Out(stream.Signature(4))})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.skid = skid = SkidBuffer(shape=4, groups=self.groups)
        connect(m, flipped(self.i), skid.i)
        connect(m, skid.o, flipped(self.o))
        assume_stream_rule(m, self.i)
        assert_stream_rule(m, self.o)
        if self.groups > 1:
            begun = Signal()
            m.d.sync += begun.eq(1)
            m.d.comb += Assume(begun | ~self.i.valid)
        entered, left = Signal(4), Signal(4)
        m.d.comb += [Assume(self.i.payload == entered), Assert(~self.o.valid | (self.o.payload == left))]
        m.d.sync += [
            entered.eq(entered + (self.i.valid & self.i.ready)),
            left.eq(left + (self.o.valid & self.o.ready)),
        ]
        # There is room whenever no more than one item is inside, and an item at the output whenever one is inside.
        inside = Signal(4)
        m.d.comb += [
            inside.eq(entered - left),
            Assert(inside <= 2),
            Assert(self.i.ready == (inside < 2)),
            Assert(self.o.valid == (inside > 0)),
        ]
        return m


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_skid_buffer(groups: int) -> None:
    prove(SkidSpec(groups), depth=10, reset="any" if groups > 1 else "never")
