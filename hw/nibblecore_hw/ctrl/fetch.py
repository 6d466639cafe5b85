"""Fetch: reads the program from region 0 and puts each instruction into the queue of its engine."""

from typing import Any

from amaranth import Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Engine
from nibblecore.arch.regs import ErrorCause

from ..layouts import INDEX_BITS, axi_read_signature, region_layout
from .decode import BeatDecoder
from .instructions import BUFFERED, beat_bytes, beats_per_instruction, write_signature
from .queue import Queue

BURST_INSTRUCTIONS = 2
"""Instructions of a full burst, where ``burst_beats`` allows it."""

BURSTS = 2
"""Bursts in flight, where ``outstanding`` allows it."""


def check_arguments(*, arch: ArchConfig, axi_id: int, id_bits: int) -> None:
    """Raise what :class:`Fetch` raises for these arguments."""
    if not isinstance(arch, ArchConfig):
        raise TypeError(f"arch must be an ArchConfig, not {arch!r}")
    if not 1 <= id_bits <= 16:
        raise ValueError(f"id_bits must be in 1..16, not {id_bits!r}")
    if not 0 <= axi_id < 1 << id_bits:
        raise ValueError(f"axi_id must be in 0..{(1 << id_bits) - 1}, not {axi_id!r}")


class Fetch(wiring.Component):
    """Read instructions in order, check them, and put each into one of four queues.

    The beats of a word are written behind its engine's queue as they come, up to
    :data:`~nibblecore_hw.ctrl.instructions.BUFFERED` words ahead: there is no other prefetch buffer. A word counts as
    queued when it has been checked, all before it are queued, and there is room.

    A burst ends at a multiple of its full length, so that none crosses a 4 KiB boundary, and is requested only when its
    words may be prefetched: ``rready`` is always high, and fetch never blocks the read channel for others. Nothing
    is read beyond the last whole instruction of the region or beyond 2**``addr_bits``. A beat is 32 bytes where the bus
    is wider (a narrow burst, each beat on its lanes).

    What stops fetch, in program order and without dispatching anything after it: END; a word that is no instruction
    (ILLEGAL_INSTRUCTION); a read answered with SLVERR or DECERR in any of the instruction's beats (BUS_READ); an
    instruction that does not lie within the region as a whole (REGION). Data that were prefetched behind END count for
    nothing, errors included.

    Cycles: the first request is on the bus 3 cycles after ``start_stb``; with ``n = max(1, 256 / bus_bits)`` beats per
    instruction, an instruction is offered ``n + 4`` cycles after its first beat arrived at the earliest, and one every
    ``max(2, n)`` cycles follows while the bus keeps up.

    Parameters
    ----------
    arch : ArchConfig
        For ``bus_bits``, ``addr_bits``, ``burst_beats`` and ``outstanding``.
    axi_id : int
        ID of every transaction.
    id_bits : int
        Width of the bus's IDs, 1..16.

    Members
    -------
    axi : Out(axi_read_signature(arch))
        AXI4 read master; incrementing bursts of normal, non-cacheable memory.
    region : In
        ``base`` and ``size`` of region 0 in bytes; sampled at ``start_stb``. The base's bits below a beat are ignored.
    start_stb : In(1)
        Begin at the region's base, with index 0. Only while ``idle``.
    stop : In(1)
        Request and dispatch nothing further; an instruction that is offered stays so until it is accepted.
    idle : Out(1)
        No bus transaction is in flight.
    ended : Out(1)
        END was reached; from the cycle after the last dispatch until the next start.
    write : Out(write_signature(arch))
        Beats for the memory that holds the queues, in order; at most one of each number for each ``index``. From a
        start on an engine's words go to slots 0, 1, 2... of its ring.
    queue : Out(4)
        One-hot: the next word of that engine is an instruction of its queue. Stays until there is ``room``.
    room : In(4)
        An engine's queue has room.
    index : Out(24)
        The instruction that has stopped fetch; until then the one that comes from memory. Modulo 2**24.
    error_stb, error_cause : Out(1), Out(8)
        One pulse, with a :class:`nibblecore.arch.regs.ErrorCause`, for instruction ``index``; at most one per start.
    progress_stb : Out(1)
        A beat has arrived or an instruction was dispatched.

    Raises
    ------
    TypeError, ValueError
        If ``arch`` is no ArchConfig, ``id_bits`` is out of range or ``axi_id`` does not fit it.
    """

    axi: Any
    region: Any
    start_stb: Signal
    stop: Signal
    idle: Signal
    ended: Signal
    write: Any
    queue: Signal
    room: Signal
    index: Signal
    error_stb: Signal
    error_cause: Signal
    progress_stb: Signal

    def __init__(self, *, arch: ArchConfig, axi_id: int = 0, id_bits: int = 1) -> None:
        check_arguments(arch=arch, axi_id=axi_id, id_bits=id_bits)
        self._arch = arch
        self._axi_id = axi_id
        super().__init__(
            {
                "axi": Out(axi_read_signature(arch, id_bits=id_bits)),
                "region": In(region_layout()),
                "start_stb": In(1),
                "stop": In(1),
                "idle": Out(1),
                "ended": Out(1),
                "write": Out(write_signature(arch)),
                "queue": Out(len(Engine)),
                "room": In(len(Engine)),
                "index": Out(INDEX_BITS),
                "error_stb": Out(1),
                "error_cause": Out(8),
                "progress_stb": Out(1),
            }
        )

    @property
    def beat_bytes(self) -> int:
        """Bytes of one beat of fetch's bursts."""
        return beat_bytes(self._arch)

    @property
    def beats_per_instruction(self) -> int:
        """Beats that bring one instruction."""
        return beats_per_instruction(self._arch)

    @property
    def burst_beats(self) -> int:
        """Beats of a full burst."""
        return min(self._arch.burst_beats, BURST_INSTRUCTIONS * self.beats_per_instruction)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        active = Signal()  # started, and not stopped by anything yet
        reading = Signal()  # no word has been found that is the last
        taken = Signal()  # an instruction has left the prefetched ones
        exhausted = Signal()  # nothing is left to request or to come
        arrived = stream.Signature(self._beat_layout(), always_ready=True).create(path=("arrived",))
        self._request(m, active & reading, taken, exhausted)
        self._arrive(m, arrived)
        self._dispatch(m, active, reading, taken, exhausted, arrived)
        return m

    def _beat_layout(self) -> data.StructLayout:
        return data.StructLayout({"bits": 8 * self.beat_bytes, "error": 1})

    def _request(self, m: Module, active: Value, taken: Signal, exhausted: Signal) -> None:
        """Bursts, for as many instructions as may wait for their turn."""
        arch, axi = self._arch, self.axi
        beat_log2 = (self.beat_bytes - 1).bit_length()
        burst = self.burst_beats
        burst_log2 = (burst - 1).bit_length()
        depth = BUFFERED * self.beats_per_instruction
        word_beats_log2 = (self.beats_per_instruction - 1).bit_length()

        # One bit above a 32-bit address shows that the region leaves the address space.
        addr = Signal(33 - beat_log2, reset_less=True)  # next request, in beats
        left = Signal(32 - beat_log2, reset_less=True)  # beats of whole instructions that the region still has
        length = Signal(burst_log2 + 1, reset_less=True)  # beats of the next burst
        prepared = Signal()  # `length` is valid
        in_flight = Signal(range(BURSTS + 1))
        # Here and below, what a start resets needs no other reset, which would stand before it in its path.
        reserved = Signal(
            range(depth + 1), reset_less=True
        )  # beats that were requested, until their instruction has had its turn
        outside = addr[arch.addr_bits - beat_log2 :].any() if arch.addr_bits <= 32 else 0
        at_limit = Signal()
        m.d.comb += at_limit.eq((left == 0) | outside)

        to_boundary = Signal(burst_log2 + 1)
        m.d.comb += to_boundary.eq(burst - addr[:burst_log2])
        issue, accepted = Signal(), Signal()
        room = (reserved <= depth - burst) & (in_flight < min(BURSTS, arch.outstanding))
        m.d.comb += [
            issue.eq(active & ~self.stop & prepared & ~axi.arvalid & room),
            accepted.eq(axi.arvalid & axi.arready),
        ]
        with m.If(issue):
            m.d.sync += axi.arvalid.eq(1)
        with m.If(accepted):
            m.d.sync += [axi.arvalid.eq(0), prepared.eq(0), addr.eq(addr + length), left.eq(left - length)]
        with m.Elif(active & ~prepared):
            m.d.sync += [length.eq(to_boundary), prepared.eq(~at_limit)]
            # `left < to_boundary`, without a comparator of the width of `left`
            with m.If((left[burst_log2 + 1 :] == 0) & (left[: burst_log2 + 1] < to_boundary)):
                m.d.sync += length.eq(left[: burst_log2 + 1])
        m.d.sync += reserved.eq(reserved + Mux(issue, length, 0) - (taken << word_beats_log2))
        last = axi.rvalid & axi.rlast
        with m.If(issue & ~last):
            m.d.sync += in_flight.eq(in_flight + 1)
        with m.Elif(~issue & last):
            m.d.sync += in_flight.eq(in_flight - 1)
        m.d.comb += [
            axi.araddr.eq(addr << beat_log2),
            axi.arlen.eq(length - 1),
            axi.arid.eq(self._axi_id),
            axi.arsize.eq(beat_log2),
            axi.arburst.eq(0b01),  # incrementing
            axi.arcache.eq(0b0011),  # normal memory, not cacheable, bufferable
            self.idle.eq(in_flight == 0),
            exhausted.eq(at_limit & ~prepared & (in_flight == 0)),
        ]
        with m.If(self.start_stb):
            whole = self.region.size[5:]
            m.d.sync += [
                addr.eq(self.region.base[beat_log2:]),
                left.eq(whole << word_beats_log2),
                prepared.eq(0),
                reserved.eq(0),
            ]

    def _arrive(self, m: Module, arrived: Any) -> None:
        """The bus' data, a cycle later."""
        axi = self.axi
        bits: Value = axi.rdata
        if self._arch.bus_bytes > self.beat_bytes:
            beat_log2 = (self.beat_bytes - 1).bit_length()
            lanes = Signal(range(self._arch.bus_bytes // self.beat_bytes))
            bits = axi.rdata.word_select(lanes, 8 * self.beat_bytes)
            with m.If(self.start_stb):
                m.d.sync += lanes.eq(self.region.base[beat_log2:])
            with m.Elif(axi.rvalid):
                m.d.sync += lanes.eq(lanes + 1)
        beat, valid = Signal(self._beat_layout(), name="beat", reset_less=True), Signal(name="beat_valid")
        m.d.comb += [axi.rready.eq(1), arrived.payload.eq(beat), arrived.valid.eq(valid)]
        m.d.sync += [beat.bits.eq(bits), beat.error.eq(axi.rresp[1]), valid.eq(axi.rvalid)]  # SLVERR or DECERR

    def _dispatch(
        self, m: Module, active: Signal, reading: Signal, taken: Signal, exhausted: Signal, arrived: Any
    ) -> None:
        """Write beats to where their instruction is looked for, judge it, and offer it when its turn has come."""
        write, beats = self.write, self.beats_per_instruction
        m.submodules.decoder = decoder = BeatDecoder(beat_bits=8 * self.beat_bytes)
        number, index = Signal(range(beats), reset_less=True), Signal(INDEX_BITS, reset_less=True)
        m.d.comb += self.index.eq(index)
        bad = Signal(reset_less=True)  # a beat of the word came with an error
        engine = Signal.like(decoder.engine, reset_less=True)
        judge = Signal()  # the word before is complete
        slots = [Signal(len(write.slot), name=f"slot_{e.name.lower()}", reset_less=True) for e in Engine]
        use, complete, good = Signal(), Signal(), Signal()
        # The cycle after a beat: what the decoder says of it, and which one it is.
        later, number_later = Signal(), Signal.like(number, name="number_later", reset_less=True)
        is_first, is_last, is_bad = (Signal(name=n, reset_less=True) for n in ("is_first", "is_last", "is_bad"))
        with m.If(arrived.valid):
            m.d.sync += number.eq(Mux(number == beats - 1, 0, number + 1))
        m.d.sync += [
            later.eq(arrived.valid),
            number_later.eq(number),
            is_first.eq(number == 0),
            is_last.eq(number == beats - 1),
            is_bad.eq(arrived.payload.error),
        ]
        m.d.comb += [
            use.eq(later & reading),
            complete.eq(use & is_last),
            decoder.beat.eq(arrived.payload.bits),
            decoder.number.eq(number),
            decoder.en.eq(arrived.valid),
            write.en.eq(use),
            write.engine.eq(decoder.engine),
            write.number.eq(number_later),
            write.beat.bits.eq(decoder.beat_later),
            write.beat.index.eq(index.word_select(number_later, len(write.beat.index))),
            good.eq(~bad & decoder.legal & ~decoder.end),
        ]
        m.d.sync += judge.eq(complete)
        with m.If(use):
            m.d.sync += [engine.eq(decoder.engine), bad.eq(is_bad | (bad & ~is_first))]
        with m.Switch(decoder.engine):
            for e in Engine:
                with m.Case(int(e)):
                    m.d.comb += write.slot.eq(slots[e])
                    with m.If(complete):
                        m.d.sync += slots[e].eq(slots[e] + 1)

        # Instructions wait for their turn: of each, whose it is. Meanwhile those behind it come, up to a word that is
        # none, which has its turn when all before it have had theirs. What comes behind that counts for nothing.
        m.submodules.turns = turns = ResetInserter(self.start_stb)(Queue(shape=len(engine), depth=BUFFERED))
        m.d.comb += [turns.i.valid.eq(judge & reading & good), turns.i.payload.eq(engine)]
        cause = Signal(ErrorCause, reset_less=True)
        by_end = Signal(reset_less=True)
        fails = judge & reading & ~good
        with m.If(fails):
            m.d.sync += [
                reading.eq(0),
                by_end.eq(~bad & decoder.legal),
                cause.eq(Mux(bad, ErrorCause.BUS_READ, ErrorCause.ILLEGAL_INSTRUCTION)),
            ]
        # One that was counted before it was judged is not counted after all, nor one that was while it was judged.
        uncount = Signal(2, reset_less=True)
        m.d.sync += uncount.eq(Mux(fails, 1 + complete, 0))
        with m.If(complete | uncount.any()):
            m.d.sync += index.eq(index + Mux(complete, 1, -uncount))

        m.d.comb += [taken.eq((self.queue & self.room).any()), self.progress_stb.eq(self.axi.rvalid | taken)]
        m.d.sync += self.error_stb.eq(0)
        with m.If(taken):
            m.d.sync += self.queue.eq(0)
        with m.Elif(active & ~self.stop & ~self.queue.any()):
            with m.If(turns.o.valid):
                m.d.comb += turns.o.ready.eq(1)
                m.d.sync += [self.queue[int(e)].eq(turns.o.payload == int(e)) for e in Engine]
            with m.Elif(~reading):
                m.d.sync += [self.ended.eq(by_end), self.error_stb.eq(~by_end), active.eq(0)]
                m.d.sync += self.error_cause.eq(cause)
            with m.Elif(exhausted & ~arrived.valid & ~later & ~judge):
                m.d.sync += [self.error_stb.eq(1), active.eq(0)]
                m.d.sync += self.error_cause.eq(ErrorCause.REGION)
        with m.If(self.stop):
            m.d.sync += active.eq(0)
        with m.If(self.start_stb):
            m.d.sync += [
                active.eq(1),
                reading.eq(1),
                self.ended.eq(0),
                index.eq(0),
                number.eq(0),
                judge.eq(0),
                later.eq(0),
            ]
            m.d.sync += [slot.eq(0) for slot in slots]
