"""The two sides of a 3-D copy: bursts of the DRAM side, words of the buffer side."""

from typing import Any

from amaranth import Assert, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import INSTRUCTIONS, Opcode

from ..layouts import regions_layout
from .region import REGION_BITS, RegionCheck

__all__ = [
    "BurstIssue",
    "BurstWalk",
    "WordWalk",
    "burst_layout",
    "burst_words",
    "dram_signature",
    "lane_bits",
    "region_layout",
]

_FIELDS = {f.name: f for f in INSTRUCTIONS[Opcode.STORE].fields}
_COUNTS = ("count0", "count1", "count2")


def burst_words(arch: ArchConfig) -> int:
    """Words of the longest burst, at least 1."""
    return arch.burst_beats // arch.beats_per_word


def lane_bits(arch: ArchConfig) -> int:
    """Bits of a lane's number: a bus wider than a word carries one of ``2**lane_bits`` words, by its address."""
    return ceil_log2(max(1, arch.bus_bits // arch.word_bits))


def burst_layout(arch: ArchConfig) -> data.StructLayout:
    """A burst: byte address, words minus 1, whether it is the instruction's last."""
    return data.StructLayout({"addr": arch.addr_bits, "words_m1": max(1, ceil_log2(burst_words(arch))), "last": 1})


def region_layout() -> data.StructLayout:
    """Base and size of a region, in bytes."""
    return data.StructLayout({"base": REGION_BITS, "size": REGION_BITS})


def dram_signature() -> stream.Signature:
    """The DRAM side of a LOAD or STORE, as encoded; a transfer starts the instruction."""
    names = ("region", "dram_addr", *_COUNTS, "dram_step1", "dram_step2")
    return stream.Signature(data.StructLayout({name: _FIELDS[name].bits for name in names}))


class BurstWalk(wiring.Component):
    """Cut the DRAM side of a LOAD or STORE into bursts.

    A burst never crosses a multiple of its largest size (``burst_beats`` beats of a word or of the bus, whichever is
    smaller; at most 4 KiB), so it never crosses 4 KiB either; an unaligned row begins with a shorter burst. Every
    burst is checked against the region as the CSRs described it when the instruction was taken. The first one that
    would leave it raises ``refused`` instead of ``bursts.valid``, which then stays until reset.

    Cycles: the first burst is offered 4 cycles after the one in which ``i`` transfers, and one every 2 cycles after
    that while they are taken at once, across rows and planes too. The next instruction can be taken in the cycle in
    which the last burst is offered.

    Parameters
    ----------
    arch : ArchConfig

    Members
    -------
    regions : In(regions_layout(arch))
        From the CSRs.
    i : In(dram_signature())
    bursts : Out(stream.Signature(burst_layout(arch)))
    refused : Out(1)
        The next burst would leave the region; stays until reset.
    idle : Out(1)
        No instruction is in progress and no burst offered.
    region, burst_region : Out(region_layout())
        The regions of the instruction in progress and of the burst that is offered, for proofs.
    """

    regions: Any
    i: Any
    bursts: Any
    refused: Signal
    idle: Signal
    region: Any
    burst_region: Any

    def __init__(self, *, arch: ArchConfig) -> None:
        self.arch = arch
        super().__init__(
            {
                "regions": In(regions_layout(arch)),
                "i": In(dram_signature()),
                "bursts": Out(stream.Signature(burst_layout(arch))),
                "refused": Out(1),
                "idle": Out(1),
                "region": Out(region_layout()),
                "burst_region": Out(region_layout()),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        low_bits = ceil_log2(burst_words(self.arch))
        m.submodules.check = check = RegionCheck(unit_bytes=self.arch.word_bytes, addr_bits=self.arch.addr_bits)
        word_log2 = ceil_log2(self.arch.word_bytes)
        offset_bits = check.offset_bits
        take, fields = self.i.valid & self.i.ready, self.i.payload

        def offset(name: str) -> Signal:
            return Signal(offset_bits, name=name, reset_less=True)

        def register(field: str) -> Signal:
            return Signal(_FIELDS[field].bits, name=field, reset_less=True)

        base = Signal(REGION_BITS, reset_less=True)
        size = Signal(REGION_BITS, reset_less=True)
        step1, step2, count0, count1 = (register(n) for n in ("dram_step1", "dram_step2", "count0", "count1"))
        left0, left1, left2 = (Signal(_FIELDS[n].bits, name=f"left_{n}", reset_less=True) for n in _COUNTS)
        here, row, plane = offset("here"), offset("row"), offset("plane")

        active = Signal()
        advance = Signal()  # 0: the burst at `here` is measured, 1: the walk steps over it
        words_m1 = Signal(max(1, low_bits), reset_less=True)
        ends_row = Signal(reset_less=True)
        # A burst to be checked, then one that was: `out_addr` is valid if `out_ok`.
        found, found_last = Signal(), Signal(reset_less=True)
        found_offset, found_end, found_words_m1 = offset("found_offset"), offset("found_end"), Signal.like(words_m1)
        out, out_ok, out_last = Signal(), Signal(reset_less=True), Signal(reset_less=True)
        out_addr, out_words_m1 = Signal(self.arch.addr_bits, reset_less=True), Signal.like(words_m1)

        # A burst that was found is still checked against `base` and `size`.
        m.d.comb += self.i.ready.eq(~active & ~found)
        with m.If(take):
            region = self.regions[fields.region]
            m.d.sync += [
                base.eq(region.base),
                size.eq(region.size),
                *(reg.eq(fields.dram_addr) for reg in (here, row, plane)),
                step1.eq(fields.dram_step1),
                step2.eq(fields.dram_step2),
                count0.eq(fields.count0),
                count1.eq(fields.count1),
                left0.eq(fields.count0),
                left1.eq(fields.count1),
                left2.eq(fields.count2),
                active.eq(1),
                advance.eq(0),
            ]

        # Words to the end of the aligned block, minus 1: its size minus 1 minus the word's number in it.
        block_m1 = Signal(max(1, low_bits))
        if low_bits:
            m.d.comb += block_m1.eq(~(base[word_log2:] + here)[:low_bits])
        ends = left0 <= block_m1

        out_free = ~out | (out_ok & self.bursts.ready)
        found_free = ~found | out_free
        last = ends_row & (left1 == 0) & (left2 == 0)
        with m.If(out_free):
            m.d.sync += [
                out.eq(found),
                out_ok.eq(check.ok),
                out_addr.eq(check.address),
                out_words_m1.eq(found_words_m1),
                out_last.eq(found_last),
                self.burst_region.eq(self.region),
                found.eq(0),
            ]
        with m.If(active & ~advance):
            m.d.sync += [words_m1.eq(Mux(ends, left0, block_m1)), ends_row.eq(ends), advance.eq(1)]
        with m.If(active & advance & found_free):
            # No sum of an offset inside a region and a step wraps; an offset outside is found, and the walk ends.
            next_burst = Signal(offset_bits)
            next_row, next_plane = row + step1, plane + step2
            m.d.comb += next_burst.eq(here + words_m1 + 1)
            m.d.sync += [
                found.eq(1),
                found_offset.eq(here),
                found_end.eq(next_burst),
                found_words_m1.eq(words_m1),
                found_last.eq(last),
                advance.eq(0),
                active.eq(~last),
            ]
            with m.If(~ends_row):
                m.d.sync += [here.eq(next_burst), left0.eq(left0 - words_m1 - 1)]
            with m.Elif(left1 != 0):
                m.d.sync += [here.eq(next_row), row.eq(next_row), left0.eq(count0), left1.eq(left1 - 1)]
            with m.Else():
                m.d.sync += [here.eq(next_plane), row.eq(next_plane), plane.eq(next_plane)]
                m.d.sync += [left0.eq(count0), left1.eq(count1), left2.eq(left2 - 1)]

        m.d.comb += [
            check.base.eq(base),
            check.size.eq(size),
            check.offset.eq(found_offset),
            check.end.eq(found_end),
            self.bursts.valid.eq(out & out_ok),
            self.bursts.payload.addr.eq(out_addr),
            self.bursts.payload.words_m1.eq(out_words_m1),
            self.bursts.payload.last.eq(out_last),
            self.refused.eq(out & ~out_ok),
            self.idle.eq(~active & ~found & ~out),
            self.region.base.eq(base),
            self.region.size.eq(size),
        ]
        if platform == "formal":
            # What induction has to know about registers: no burst leaves its aligned block, what was found is what is
            # checked, and what was checked stays checked.
            found_block_m1 = Signal.like(block_m1)
            m.d.comb += found_block_m1.eq(~(base[word_log2:] + found_offset)[:low_bits] if low_bits else 0)
            m.d.comb += [
                Assert(~(active & advance) | (words_m1 <= block_m1)),
                Assert(~found | (found_words_m1 <= found_block_m1)),
                Assert(~found | (found_end == (found_offset + found_words_m1 + 1)[:offset_bits])),
            ]
            out_end = out_addr + ((out_words_m1 + 1) << word_log2)
            limit = self.burst_region.base + self.burst_region.size
            with m.If(self.bursts.valid):
                m.d.comb += [
                    Assert((out_addr >= self.burst_region.base) & (out_end <= limit)),
                    Assert(~out_addr[:word_log2].any()),
                    Assert(out_addr[word_log2:][:low_bits] + out_words_m1 < 1 << low_bits),
                ]
        return m


class BurstIssue(wiring.Component):
    """:class:`BurstWalk` behind an AXI address channel, with at most ``outstanding`` bursts in flight.

    A burst is in flight from the edge at which ``a_valid`` is raised for it to the one with its ``finished_stb``. The
    first address is valid 5 cycles after the one in which ``i`` transfers, and one every 2 cycles after that if
    ``a_ready`` does not wait; each cycle that it waits comes on top.

    Parameters
    ----------
    arch : ArchConfig

    Members
    -------
    regions, i : as in :class:`BurstWalk`
    enable : In(1)
        0: raise no further ``a_valid``; what is raised stays until it is taken.
    a_addr, a_len, a_valid : Out
    a_ready : In(1)
        AXI address channel, ARADDR or AWADDR and so on.
    burst : Out(burst_layout(arch))
    burst_stb : Out(1)
        ``a_valid`` is raised for a burst at the next edge.
    finished_stb : In(1)
        A burst has ended.
    idle : Out(1)
        No burst is in flight.
    busy : Out(1)
        An instruction is in progress or a burst is in flight.
    refused : Out(1)
        The next burst would leave the region, and all before it have ended; stays until reset.
    region, burst_region : Out(region_layout())
        As in :class:`BurstWalk`.
    """

    regions: Any
    i: Any
    enable: Signal
    a_addr: Signal
    a_len: Signal
    a_valid: Signal
    a_ready: Signal
    burst: Any
    burst_stb: Signal
    finished_stb: Signal
    idle: Signal
    busy: Signal
    refused: Signal
    region: Any
    burst_region: Any

    def __init__(self, *, arch: ArchConfig) -> None:
        self.arch = arch
        super().__init__(
            {
                "regions": In(regions_layout(arch)),
                "i": In(dram_signature()),
                "enable": In(1),
                "a_addr": Out(arch.addr_bits),
                "a_len": Out(8),
                "a_valid": Out(1),
                "a_ready": In(1),
                "burst": Out(burst_layout(arch)),
                "burst_stb": Out(1),
                "finished_stb": In(1),
                "idle": Out(1, init=1),
                "busy": Out(1),
                "refused": Out(1),
                "region": Out(region_layout()),
                "burst_region": Out(region_layout()),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.walk = walk = BurstWalk(arch=self.arch)
        wiring.connect(m, wiring.flipped(self.i), walk.i)
        valid = Signal()
        in_flight, after = Signal(range(self.arch.outstanding + 1)), Signal(range(self.arch.outstanding + 1))
        full, idle = Signal(), Signal(init=1)
        m.d.comb += [
            walk.regions.eq(self.regions),
            walk.bursts.ready.eq(valid & self.a_ready),
            self.burst.eq(walk.bursts.payload),
            self.burst_stb.eq(walk.bursts.valid & ~valid & self.enable & ~full),
            after.eq(in_flight + self.burst_stb - self.finished_stb),
            self.a_addr.eq(self.burst.addr),
            # Words to beats, both minus 1: n words of b beats are n*b beats.
            self.a_len.eq(Cat(Const(1).replicate(ceil_log2(self.arch.beats_per_word)), self.burst.words_m1)),
            self.a_valid.eq(valid),
            self.idle.eq(idle),
            self.busy.eq(~walk.idle | ~idle),
            self.refused.eq(walk.refused & idle),
            self.region.eq(walk.region),
            self.burst_region.eq(walk.burst_region),
        ]
        m.d.sync += [
            valid.eq(self.burst_stb | (valid & ~self.a_ready)),
            in_flight.eq(after),
            full.eq(after == self.arch.outstanding),
            idle.eq(after == 0),
        ]
        if platform == "formal":
            m.d.comb += Assert(~valid | walk.bursts.valid)
        return m


class WordWalk(wiring.Component):
    """Buffer addresses of the words of a LOAD or STORE, in the order in which they pass the bus.

    One address per cycle, without a gap between rows, planes and instructions: the next instruction is taken in the
    cycle in which the last word of the one before is, and its first word is offered in the next.

    Parameters
    ----------
    addr_bits : int
        Width of a buffer address; addresses wrap.
    lane_bits : int
        Width of the lane's number, see :func:`lane_bits`; 0 where there is none.

    Members
    -------
    i : In(stream)
        ``local_addr``, ``local_step1``, ``local_step2`` (modulo the buffer), ``count0``..``count2`` as encoded, and
        ``lane``, ``lane_step1``, ``lane_step2``: the lane of the first word and the DRAM steps, modulo the lanes.
    o : Out(stream)
        ``addr``, ``lane`` and ``last``, whether it is the instruction's last word.
    """

    i: Any
    o: Any

    def __init__(self, *, addr_bits: int, lane_bits: int = 0) -> None:
        steps = {"local_addr": addr_bits, "local_step1": addr_bits, "local_step2": addr_bits}
        lanes = {"lane": lane_bits, "lane_step1": lane_bits, "lane_step2": lane_bits}
        self.counts = {name: _FIELDS[name].bits for name in _COUNTS}
        super().__init__(
            {
                "i": In(stream.Signature(data.StructLayout(steps | lanes | self.counts))),
                "o": Out(stream.Signature(data.StructLayout({"addr": addr_bits, "lane": lane_bits, "last": 1}))),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        active = Signal()
        left0, left1, left2 = (Signal(bits, name=f"left_{name}", reset_less=True) for name, bits in self.counts.items())
        count0, count1 = (Signal(self.counts[name], name=name, reset_less=True) for name in ("count0", "count1"))
        row_ends, plane_ends = left0 == 0, left1 == 0
        last = row_ends & plane_ends & (left2 == 0)
        fields = self.i.payload
        m.d.comb += [
            self.i.ready.eq(~active | (self.o.ready & last)),
            self.o.valid.eq(active),
            self.o.payload.last.eq(last),
        ]
        with m.If(active & self.o.ready):
            m.d.sync += active.eq(~last)
            m.d.sync += left0.eq(Mux(row_ends, count0, left0 - 1))
            with m.If(row_ends):
                m.d.sync += left1.eq(Mux(plane_ends, count1, left1 - 1))
                with m.If(plane_ends):
                    m.d.sync += left2.eq(left2 - 1)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [
                active.eq(1),
                *(reg.eq(fields.count0) for reg in (left0, count0)),
                *(reg.eq(fields.count1) for reg in (left1, count1)),
                left2.eq(fields.count2),
            ]
        for out, first, first_step in (("addr", "local_addr", "local_step"), ("lane", "lane", "lane_step")):
            width = len(fields[first])
            here, row, plane = (
                Signal(width, name=f"{out}_{what}", reset_less=True) for what in ("here", "row", "plane")
            )
            step1, step2 = (Signal(width, name=f"{out}_step{n}", reset_less=True) for n in (1, 2))
            m.d.comb += self.o.payload[out].eq(here)
            with m.If(active & self.o.ready):
                jump = Mux(plane_ends, plane + step2, row + step1)
                m.d.sync += here.eq(Mux(row_ends, jump, here + 1))
                with m.If(row_ends):
                    m.d.sync += row.eq(jump)
                    with m.If(plane_ends):
                        m.d.sync += plane.eq(jump)
            with m.If(self.i.valid & self.i.ready):
                m.d.sync += [*(reg.eq(fields[first]) for reg in (here, row, plane))]
                m.d.sync += [step1.eq(fields[f"{first_step}1"]), step2.eq(fields[f"{first_step}2"])]
        return m
