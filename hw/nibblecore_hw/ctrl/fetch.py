"""Fetch: reads the program from region 0 and puts each instruction into the queue of its engine."""

from typing import Any

from amaranth import Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import HEADER, INSTRUCTION_BITS, INSTRUCTIONS, Engine
from nibblecore.arch.regs import ErrorCause

from ..layouts import INDEX_BITS, axi_read_signature, region_layout
from .decode import Decoder
from .instructions import beat_bytes, beats_per_instruction, write_signature

BUFFERED = 4
"""Instructions that the prefetch buffer holds."""

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

    The beats of a word are written behind its engine's queue as they come; the word counts as queued when it has been
    checked and there is room.

    A burst ends at a multiple of its full length, so that none crosses a 4 KiB boundary, and is requested only when its
    data fit the prefetch buffer: ``rready`` is always high, and fetch never blocks the read channel for others. Nothing
    is read beyond the last whole instruction of the region or beyond 2**``addr_bits``. A beat is 32 bytes where the bus
    is wider (a narrow burst, each beat on its lanes).

    What stops fetch, in program order and without dispatching anything after it: END; a word that is no instruction
    (ILLEGAL_INSTRUCTION); a read answered with SLVERR or DECERR in any of the instruction's beats (BUS_READ); an
    instruction that does not lie within the region as a whole (REGION). Data that were prefetched behind END count for
    nothing, errors included.

    Cycles: the first request is on the bus 3 cycles after ``start_stb``; with ``n = max(1, 256 / bus_bits)`` beats per
    instruction, an instruction is offered ``n + 3`` cycles after its first beat arrived at the earliest, and one every
    ``n + 3`` cycles follows while the bus keeps up.

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
        Beats for the memory that holds the queues, at most one of each number for each ``index``, in order.
    queue : Out(4)
        One-hot: what was written last is an instruction for that engine's queue. Stays until there is ``room``.
    room : In(4)
        An engine's queue has room.
    index : Out(24)
        The instruction that is dispatched next, modulo 2**24.
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
        exhausted = Signal()  # nothing is left to request, to come or to take out
        beats = stream.Signature(self._beat_layout()).create(path=("beats",))
        self._read(m, active, beats, exhausted)
        self._dispatch(m, active, beats, exhausted)
        return m

    def _beat_layout(self) -> data.StructLayout:
        return data.StructLayout({"bits": 8 * self.beat_bytes, "error": 1})

    def _read(self, m: Module, active: Signal, beats: Any, exhausted: Signal) -> None:
        """Bus side: requests, and the prefetch buffer that fills ``beats``."""
        arch, axi = self._arch, self.axi
        beat_log2 = (self.beat_bytes - 1).bit_length()
        burst = self.burst_beats
        burst_log2 = (burst - 1).bit_length()
        depth = BUFFERED * self.beats_per_instruction
        depth_log2 = (depth - 1).bit_length()
        word_beats_log2 = (self.beats_per_instruction - 1).bit_length()

        # One bit above a 32-bit address shows that the region leaves the address space.
        addr = Signal(33 - beat_log2, reset_less=True)  # next request, in beats
        left = Signal(32 - beat_log2, reset_less=True)  # beats of whole instructions that the region still has
        length = Signal(burst_log2 + 1, reset_less=True)  # beats of the next burst
        prepared = Signal()  # `length` is valid
        in_flight = Signal(range(BURSTS + 1))
        # Beats modulo twice the buffer's depth: reserved by a request, received, taken out.
        reserved, received, taken = Signal(depth_log2 + 1), Signal(depth_log2 + 1), Signal(depth_log2 + 1)
        outside = addr[arch.addr_bits - beat_log2 :].any() if arch.addr_bits <= 32 else 0
        at_limit = Signal()
        m.d.comb += at_limit.eq((left == 0) | outside)

        to_boundary = Signal(burst_log2 + 1)
        m.d.comb += to_boundary.eq(burst - addr[:burst_log2])
        issue = Signal()
        room = (reserved - taken)[: depth_log2 + 1] <= depth - burst
        m.d.comb += issue.eq(
            active & ~self.stop & prepared & ~axi.arvalid & room & (in_flight < min(BURSTS, arch.outstanding))
        )
        with m.If(axi.arvalid & axi.arready):
            m.d.sync += axi.arvalid.eq(0)
        with m.If(issue):
            m.d.sync += [
                prepared.eq(0),
                axi.arvalid.eq(1),
                axi.araddr.eq(addr << beat_log2),
                axi.arlen.eq(length - 1),
                addr.eq(addr + length),
                left.eq(left - length),
                reserved.eq(reserved + length),
            ]
        with m.Elif(active & ~prepared):
            m.d.sync += [
                length.eq(to_boundary),
                prepared.eq(~at_limit),
            ]
            # `left < to_boundary`, without a comparator of the width of `left`
            with m.If((left[burst_log2 + 1 :] == 0) & (left[: burst_log2 + 1] < to_boundary)):
                m.d.sync += length.eq(left[: burst_log2 + 1])
        last = axi.rvalid & axi.rlast
        with m.If(issue & ~last):
            m.d.sync += in_flight.eq(in_flight + 1)
        with m.Elif(~issue & last):
            m.d.sync += in_flight.eq(in_flight - 1)
        m.d.comb += [
            axi.arid.eq(self._axi_id),
            axi.arsize.eq(beat_log2),
            axi.arburst.eq(0b01),  # incrementing
            axi.arcache.eq(0b0011),  # normal memory, not cacheable, bufferable
            axi.rready.eq(1),
            self.idle.eq(in_flight == 0),
        ]

        m.submodules.buffer = buffer = Memory(
            shape=self._beat_layout(), depth=depth, init=[], attrs={"ram_style": "distributed"}
        )
        write, read = buffer.write_port(), buffer.read_port(domain="comb")
        m.d.comb += [
            write.addr.eq(received[:depth_log2]),
            write.data.bits.eq(axi.rdata),
            write.data.error.eq(axi.rresp[1]),  # SLVERR or DECERR
            write.en.eq(axi.rvalid),
            read.addr.eq(taken[:depth_log2]),
        ]
        if arch.bus_bytes > self.beat_bytes:
            lanes = Signal(range(arch.bus_bytes // self.beat_bytes))
            m.d.comb += write.data.bits.eq(axi.rdata.word_select(lanes, 8 * self.beat_bytes))
            with m.If(self.start_stb):
                m.d.sync += lanes.eq(self.region.base[beat_log2:])
            with m.Elif(axi.rvalid):
                m.d.sync += lanes.eq(lanes + 1)
        with m.If(axi.rvalid):
            m.d.sync += received.eq(received + 1)

        m.d.comb += [beats.valid.eq(received != taken), beats.payload.eq(read.data)]
        with m.If(beats.valid & beats.ready):
            m.d.sync += taken.eq(taken + 1)

        with m.If(self.start_stb):
            whole = self.region.size[5:]
            m.d.sync += [
                addr.eq(self.region.base[beat_log2:]),
                left.eq(whole << word_beats_log2),
                prepared.eq(0),
                reserved.eq(0),
                received.eq(0),
                taken.eq(0),
            ]
        m.d.comb += exhausted.eq(at_limit & ~prepared & (in_flight == 0) & ~beats.valid)

    def _dispatch(self, m: Module, active: Signal, beats: Any, exhausted: Signal) -> None:
        """Assemble words, decode them, and offer them to the queues."""
        beats_per_word = self.beats_per_instruction
        beat_bits = 8 * self.beat_bytes
        word = Signal(INSTRUCTION_BITS, reset_less=True)
        bad = Signal(reset_less=True)  # a beat of the word came with an error
        filled = Signal(range(beats_per_word + 1))
        m.submodules.decoder = decoder = Decoder()
        m.d.comb += decoder.word.eq(word)
        legal, end = Signal(reset_less=True), Signal(reset_less=True)
        queued = Signal()
        m.d.comb += [
            queued.eq((self.queue & self.room).any()),
            self.progress_stb.eq(self.axi.rvalid | queued),
        ]

        # A beat goes on to the engine's memory a cycle after it has entered the word: the opcode in the first one says
        # to whose. Whether it is an instruction, and whether there is room, is seen when all are there.
        write, first = self.write, word[-beat_bits:]
        engine = Signal.like(write.engine, reset_less=True)
        m.d.comb += [
            write.beat.bits.eq(first),
            write.beat.index.eq(self.index.word_select(write.number, len(write.beat.index))),
            write.engine.eq(engine),
        ]
        with m.If(write.number == 0), m.Switch(first[: HEADER[0].bits]):
            for spec in INSTRUCTIONS.values():
                if spec.engine is not None:
                    with m.Case(int(spec.opcode)):
                        m.d.comb += write.engine.eq(int(spec.engine))
        with m.If(write.en):
            m.d.sync += engine.eq(write.engine)
        m.d.sync += [write.en.eq(0), write.number.eq(filled)]

        def fail(cause: ErrorCause) -> None:
            m.d.sync += [self.error_stb.eq(1), self.error_cause.eq(int(cause)), active.eq(0)]

        m.d.sync += self.error_stb.eq(0)
        with m.FSM(name="dispatch_state"):
            with m.State("FILL"):
                with m.If(self.stop):
                    m.d.sync += active.eq(0)
                with m.Elif(active):
                    with m.If(beats.valid):
                        m.d.comb += beats.ready.eq(1)
                        # First beat in the low bits: beats enter at the top and move down.
                        m.d.sync += [
                            word.eq(Cat(word[beat_bits:], beats.payload.bits)),
                            bad.eq(beats.payload.error | (bad & (filled != 0))),
                            filled.eq(filled + 1),
                            write.en.eq(1),
                        ]
                        with m.If(filled == beats_per_word - 1):
                            m.next = "DECODE"
                    with m.Elif(exhausted):
                        fail(ErrorCause.REGION)
            with m.State("DECODE"):
                m.d.sync += [filled.eq(0), legal.eq(decoder.legal), end.eq(decoder.end)]
                m.next = "JUDGE"
            with m.State("JUDGE"):
                m.next = "FILL"
                with m.If(self.stop):
                    m.d.sync += active.eq(0)
                with m.Elif(bad):
                    fail(ErrorCause.BUS_READ)
                with m.Elif(~legal):
                    fail(ErrorCause.ILLEGAL_INSTRUCTION)
                with m.Elif(end):
                    m.d.sync += [self.ended.eq(1), active.eq(0)]
                with m.Else():
                    m.d.sync += self.queue.eq(1 << engine)
                    m.next = "OFFER"
            with m.State("OFFER"), m.If(queued):
                m.d.sync += [self.queue.eq(0), self.index.eq(self.index + 1)]
                m.next = "FILL"
        with m.If(self.start_stb):
            m.d.sync += [active.eq(1), self.ended.eq(0), self.index.eq(0), filled.eq(0)]
