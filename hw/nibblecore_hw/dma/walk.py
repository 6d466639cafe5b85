"""The two sides of a 3-D copy: bursts of the DRAM side, words of the buffer side."""

from typing import Any

from amaranth import Assert, Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import INSTRUCTIONS, Opcode

from ..layouts import region_layout
from .region import RegionCheck

__all__ = [
    "DRAM_FIELDS",
    "BurstIssue",
    "BurstWalk",
    "WordWalk",
    "burst_layout",
    "burst_words",
    "dram_signature",
    "lane_bits",
    "taking",
]

_FIELDS = {f.name: f for f in INSTRUCTIONS[Opcode.STORE].fields}
_COUNTS = ("count0", "count1", "count2")

# What makes the next address of a BurstWalk: the next block, row or plane of the instruction, or the first of the next.
_BLOCK, _ROW, _FIRST, _PLANE = range(4)


def burst_words(arch: ArchConfig) -> int:
    """Words of the longest burst, at least 1."""
    return arch.burst_beats // arch.beats_per_word


def lane_bits(arch: ArchConfig) -> int:
    """Bits of a lane's number: a bus wider than a word carries one of ``2**lane_bits`` words, by its address."""
    return ceil_log2(max(1, arch.bus_bits // arch.word_bits))


def burst_layout(arch: ArchConfig) -> data.StructLayout:
    """A burst: byte address, words minus 1, whether it is the instruction's last."""
    return data.StructLayout({"addr": arch.addr_bits, "words_m1": max(1, ceil_log2(burst_words(arch))), "last": 1})


DRAM_FIELDS = ("dram_addr", *_COUNTS, "dram_step1", "dram_step2")
"""Fields of a LOAD or STORE that say what it does on the DRAM side."""


def dram_signature() -> stream.Signature:
    """The DRAM side of a LOAD or STORE, as encoded, with its region; a transfer starts the instruction."""
    fields = {name: _FIELDS[name].bits for name in DRAM_FIELDS}
    return stream.Signature(data.StructLayout({"region": region_layout(), **fields}))


def taking(m: Module, command: Any, may: Value) -> Signal:
    """``command.ready`` of an engine, and the register behind it: a cycle after ``command.valid`` and ``may``.

    Commands come from far away, and what takes one reaches all of its fields. A valid one stays; one that is taken in
    the first cycles of a stop comes to nothing all the same.
    """
    take = Signal(name="take")
    m.d.sync += take.eq(command.valid & ~take & may)
    m.d.comb += command.ready.eq(take)
    return take


class BurstWalk(wiring.Component):
    """Cut the DRAM side of a LOAD or STORE into bursts.

    A burst never crosses a multiple of its largest size (``burst_beats`` beats of a word or of the bus, whichever is
    smaller; at most 4 KiB), so it never crosses 4 KiB either; an unaligned row begins with a shorter burst. Every
    burst is checked against the region that came with the instruction. The first one that would leave it raises
    ``refused`` instead of ``bursts.valid``, which then stays until reset.

    One adder makes all addresses. A row that does not end within a block goes on at the next block; what lies behind
    the block's last word is counted by blocks. So the last word of a burst is that of its block or that of its row, and
    only its place within the block is ever computed.

    Cycles: the first burst is offered 3 cycles after the one in which ``i`` transfers, and one every 2 cycles after
    that while they are taken at once, across rows and planes too. The next instruction can be taken in the cycle in
    which the last burst is offered.

    Parameters
    ----------
    arch : ArchConfig

    Members
    -------
    i : In(dram_signature())
    bursts : Out(stream.Signature(burst_layout(arch)))
    refused : Out(1)
        The next burst would leave the region; stays until reset.
    idle : Out(1)
        No instruction is in progress and no burst offered.
    region, burst_region : Out(region_layout())
        The regions of the instruction in progress and of the burst that is offered, for proofs.
    """

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
        take, fields = self.i.valid & self.i.ready, self.i.payload

        def address(name: str) -> Signal:
            """In words. Its highest bit stays once it is set, and no region reaches so far: nothing ever wraps."""
            return Signal(check.unit_bits, name=name, reset_less=True)

        def register(field: str) -> Signal:
            return Signal(_FIELDS[field].bits, name=field, reset_less=True)

        step1, step2, count0, count1, count2 = (register(n) for n in ("dram_step1", "dram_step2", *_COUNTS))
        row_number, plane_number = Signal.like(count1), Signal.like(count2)
        here, row, plane = address("here"), address("row"), address("plane")
        limit, aligned = Signal(check.unit_bits, reset_less=True), Signal(reset_less=True)

        active = Signal()
        advance = Signal()  # 0: the burst at `here` is measured, 1: the walk steps over it
        row_begins = Signal(reset_less=True)
        # From the beginning of the block that `here` is in to the last word of the row, minus 1.
        extent = Signal(max(low_bits, len(count0)) + 1, reset_less=True)
        source = Signal(2, init=_FIRST)  # where the next address comes from
        row_ends, plane_ends, last = source[0], source[1], Signal(reset_less=True)
        # A burst that was checked: `out_addr` is valid if `out_ok`.
        out, out_ok, out_last = Signal(), Signal(reset_less=True), Signal(reset_less=True)
        out_addr, out_words_m1 = Signal(self.arch.addr_bits, reset_less=True), Signal(max(1, low_bits), reset_less=True)

        # The adder: the first address, or the next block's, row's or plane's.
        first, second, carry = address("first"), Signal(_FIELDS["dram_addr"].bits), Signal()
        total = Signal(check.unit_bits + 1)
        next_address = address("next_address")
        m.d.comb += [
            total.eq(first + second + carry),
            next_address.eq(total | Cat(Const(0, check.unit_bits - 1), first[-1])),
        ]
        # All ones in the place within a block, and one more, lead to the next one.
        block = Cat(Const(1).replicate(low_bits), here[low_bits:])
        base = fields.region.base[word_log2:]
        m.d.comb += [
            first.eq(Mux(source[1], Mux(source[0], plane, base), Mux(source[0], row, block))),
            second.eq(Mux(source[1], Mux(source[0], step2, fields.dram_addr), Mux(source[0], step1, 0))),
            carry.eq(source == _BLOCK),
        ]

        m.d.comb += self.i.ready.eq(~active)
        with m.If(take):
            m.d.sync += [
                limit.eq(check.limit_of(fields.region.base, fields.region.size)),
                aligned.eq(check.is_aligned(fields.region.base)),
                *(reg.eq(next_address) for reg in (here, row, plane)),
                step1.eq(fields.dram_step1),
                step2.eq(fields.dram_step2),
                *(reg.eq(fields[name]) for name, reg in zip(_COUNTS, (count0, count1, count2), strict=True)),
                row_number.eq(0),
                plane_number.eq(0),
                active.eq(1),
                advance.eq(0),
                row_begins.eq(1),
            ]

        # Measure.
        now_extent = Signal.like(extent)
        blocks_m1 = now_extent[low_bits:]
        last_of_row = Signal(low_bits)
        m.d.comb += [
            # Behind the first block of a row, a block less; the place within the block stays.
            now_extent.eq(Mux(row_begins, count0, extent) + Mux(row_begins, here[:low_bits], -(1 << low_bits))),
            last_of_row.eq(Mux(row_ends, extent[:low_bits], ~0)),
        ]
        with m.If(active & ~advance):
            m.d.sync += [
                extent.eq(now_extent),
                source.eq(Mux(blocks_m1 == 0, Mux(row_number == count1, _PLANE, _ROW), _BLOCK)),
                last.eq((blocks_m1 == 0) & (row_number == count1) & (plane_number == count2)),
                advance.eq(1),
            ]

        # Step.
        m.d.comb += [
            check.first.eq(here),
            check.last.eq(Cat(last_of_row, here[low_bits:])),
            check.limit.eq(limit),
            check.aligned.eq(aligned),
        ]
        # A burst that is taken leaves room a cycle later, in which the next one is measured.
        with m.If(out_ok & self.bursts.ready):
            m.d.sync += out.eq(0)
        with m.If(active & advance & ~out):
            m.d.sync += [
                out.eq(1),
                out_ok.eq(check.ok),
                out_addr.eq(check.address),
                out_words_m1.eq(last_of_row - here[:low_bits]),
                out_last.eq(last),
                self.burst_region.eq(self.region),
                here.eq(next_address),
                row_begins.eq(row_ends),
                advance.eq(0),
                active.eq(~last),
            ]
            with m.If(last):
                m.d.sync += source.eq(_FIRST)
            with m.If(row_ends):
                m.d.sync += [row.eq(next_address), row_number.eq(row_number + 1)]
                with m.If(plane_ends):
                    m.d.sync += [plane.eq(next_address), row_number.eq(0), plane_number.eq(plane_number + 1)]

        m.d.comb += [
            self.bursts.valid.eq(out & out_ok),
            self.bursts.payload.addr.eq(out_addr),
            self.bursts.payload.words_m1.eq(out_words_m1),
            self.bursts.payload.last.eq(out_last),
            self.refused.eq(out & ~out_ok),
            self.idle.eq(~active & ~out),
        ]
        with m.If(take):
            m.d.sync += self.region.eq(fields.region)
        if platform == "formal":
            # What induction has to know about registers: nothing lies before the region, the limit is its end, a row
            # does not end before the burst at `here` begins, and what was checked stays checked.
            base = self.region.base[word_log2:]
            m.d.comb += [
                *(Assert(~active | (reg >= base)) for reg in (here, row, plane)),
                Assert(~active | (limit == check.limit_of(self.region.base, self.region.size))),
                Assert(~active | (aligned == check.is_aligned(self.region.base))),
                Assert(~active | advance | row_begins | (here[:low_bits] == 0)),
                Assert(active | (source == _FIRST)),
                Assert(~active | ~advance | (source != _FIRST)),
                Assert(~active | ~advance | ~row_ends | (extent[:low_bits] >= here[:low_bits])),
            ]
            out_end = out_addr + ((out_words_m1 + 1) << word_log2)
            end = self.burst_region.base + self.burst_region.size
            with m.If(self.bursts.valid):
                m.d.comb += [
                    Assert((out_addr >= self.burst_region.base) & (out_end <= end)),
                    Assert(~out_addr[:word_log2].any()),
                    Assert(out_addr[word_log2:][:low_bits] + out_words_m1 < 1 << low_bits),
                ]
        return m


class BurstIssue(wiring.Component):
    """:class:`BurstWalk` behind an AXI address channel, with at most ``outstanding`` bursts in flight.

    A burst is in flight from the edge at which ``a_valid`` is raised for it to the one with its ``finished_stb``. The
    first address is valid 4 cycles after the one in which ``i`` transfers, and one every 2 cycles after that if
    ``a_ready`` does not wait; each cycle that it waits comes on top.

    Parameters
    ----------
    arch : ArchConfig

    Members
    -------
    i : as in :class:`BurstWalk`
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
    region : Out(region_layout())
        As in :class:`BurstWalk`.
    burst_region : Out(region_layout())
        The region of the burst whose address was raised last, for proofs.
    """

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
        address, words_m1 = Signal.like(self.a_addr, reset_less=True), Signal.like(self.burst.words_m1, reset_less=True)
        m.d.comb += [
            # Registers of its own for the channel: the bus is far away, and whether it is ready would reach all of the
            # walk.
            walk.bursts.ready.eq(self.burst_stb),
            self.burst.eq(walk.bursts.payload),
            self.burst_stb.eq(walk.bursts.valid & ~valid & self.enable & ~full),
            after.eq(in_flight + self.burst_stb - self.finished_stb),
            self.a_addr.eq(address),
            # Words to beats, both minus 1: n words of b beats are n*b beats.
            self.a_len.eq(Cat(Const(1).replicate(ceil_log2(self.arch.beats_per_word)), words_m1)),
            self.a_valid.eq(valid),
            self.idle.eq(idle),
            self.busy.eq(~walk.idle | ~idle),
            self.refused.eq(walk.refused & idle),
            self.region.eq(walk.region),
        ]
        with m.If(~valid):
            m.d.sync += [
                address.eq(self.burst.addr),
                words_m1.eq(self.burst.words_m1),
                self.burst_region.eq(walk.burst_region),
            ]
        m.d.sync += [
            valid.eq(self.burst_stb | (valid & ~self.a_ready)),
            in_flight.eq(after),
            full.eq(after == self.arch.outstanding),
            idle.eq(after == 0),
        ]
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
        fields = self.i.payload
        step, take = active & self.o.ready, self.i.valid & self.i.ready
        counts = [Signal(bits, name=name, reset_less=True) for name, bits in self.counts.items()]
        # How many words, rows and planes follow, and whether none does: registers, as most of the walk waits for them.
        left = [Signal(bits, name=f"left_{name}", reset_less=True) for name, bits in self.counts.items()]
        ends = [Signal(name=f"{name}_ends", reset_less=True) for name in ("row", "plane", "planes")]
        single = [Signal(name=f"single_{name}", reset_less=True) for name in self.counts]
        # The same for a word that is the last one of its row; of its row and its plane; of all.
        together = [ends[0], *(Signal(name=name, reset_less=True) for name in ("ends_plane", "last"))]
        row_ends, row_and_plane_end, last = together
        m.d.comb += [
            self.i.ready.eq(~active | (self.o.ready & last)),
            self.o.valid.eq(active),
            self.o.payload.last.eq(last),
        ]
        ends_next = []
        for n, moves in enumerate((Const(1, 1), *together[:2])):
            ends_next.append(Mux(moves, Mux(ends[n], single[n], left[n] == 1), ends[n]))
            with m.If(step & moves):
                m.d.sync += [left[n].eq(Mux(ends[n], counts[n], left[n] - 1)), ends[n].eq(ends_next[n])]
        with m.If(step):
            m.d.sync += [register.eq(Cat(ends_next[: n + 2]).all()) for n, register in enumerate(together[1:])]
            m.d.sync += active.eq(~last)
        with m.If(take):
            m.d.sync += active.eq(1)
            empty = [fields[name] == 0 for name in self.counts]
            for n, name in enumerate(self.counts):
                m.d.sync += [register.eq(fields[name]) for register in (counts[n], left[n])]
                m.d.sync += [flag.eq(empty[n]) for flag in (single[n], ends[n])]
            m.d.sync += [register.eq(Cat(empty[: n + 2]).all()) for n, register in enumerate(together[1:])]
        for out, first, first_step in (("addr", "local_addr", "local_step"), ("lane", "lane", "lane_step")):
            width = len(fields[first])
            here, row, plane = (
                Signal(width, name=f"{out}_{what}", reset_less=True) for what in ("here", "row", "plane")
            )
            step1, step2 = (Signal(width, name=f"{out}_step{n}", reset_less=True) for n in (1, 2))
            # One adder for all.
            base, more, following = (Signal(width, name=f"{out}_{what}") for what in ("base", "more", "following"))
            m.d.comb += [
                base.eq(Mux(row_ends, Mux(row_and_plane_end, plane, row), here)),
                more.eq(Mux(row_ends, Mux(row_and_plane_end, step2, step1), 0)),
                following.eq(base + more + ~row_ends),
                self.o.payload[out].eq(here),
            ]
            with m.If(step):
                m.d.sync += here.eq(following)
                with m.If(row_ends):
                    m.d.sync += row.eq(following)
                with m.If(row_and_plane_end):
                    m.d.sync += plane.eq(following)
            with m.If(take):
                m.d.sync += [*(reg.eq(fields[first]) for reg in (here, row, plane))]
                m.d.sync += [step1.eq(fields[f"{first_step}1"]), step2.eq(fields[f"{first_step}2"])]
        return m
