"""The memory that holds the queued instructions of all engines, and what reads them out of it."""

from typing import Any

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, Signature

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import INSTRUCTION_BYTES, INSTRUCTIONS, Engine

from ..layouts import INDEX_BITS

ENGINE_BITS = (len(Engine) - 1).bit_length()

IN_FLIGHT = 4
"""Instructions that an engine may have been given and not yet finished."""

BUFFERED = 4
"""Instructions that fetch may have read before their turn to be queued has come."""


def beat_bytes(arch: ArchConfig) -> int:
    """Bytes in which instructions move: a bus beat, or a whole instruction where the bus is wider."""
    return min(arch.bus_bytes, INSTRUCTION_BYTES)


def beats_per_instruction(arch: ArchConfig) -> int:
    """Beats that a whole instruction takes."""
    return INSTRUCTION_BYTES // beat_bytes(arch)


def word_bits(engine: Engine) -> int:
    """Bits of the longest instruction that ``engine`` runs; all bits above are 0 in every legal one."""
    return max(spec.bits for spec in INSTRUCTIONS.values() if spec.engine is engine)


def beats_of(arch: ArchConfig, engine: Engine) -> int:
    """Beats of an instruction that ``engine`` looks at; those above are 0."""
    return -(-word_bits(engine) // (8 * beat_bytes(arch)))


def slot_bits(arch: ArchConfig) -> int:
    """Bits of the number of a slot in an engine's ring of instructions.

    A ring has room for a full queue, for what its engine has accepted and not finished, and for all that fetch has
    read ahead, as that may be one engine's.
    """
    return (arch.queue_depth + IN_FLIGHT + BUFFERED - 1).bit_length()


def beat_layout(arch: ArchConfig) -> data.StructLayout:
    """One beat of an instruction in the memory, with as large a part of the instruction's index; lowest bits first."""
    return data.StructLayout({"bits": 8 * beat_bytes(arch), "index": INDEX_BITS // beats_per_instruction(arch)})


def write_signature(arch: ArchConfig) -> Signature:
    """From fetch: a beat for a slot of ``engine``."""
    return Signature(
        {
            "en": Out(1),
            "engine": Out(ENGINE_BITS),
            "slot": Out(slot_bits(arch)),
            "number": Out(range(beats_per_instruction(arch))),
            "beat": Out(beat_layout(arch)),
        }
    )


class InstructionMemory(wiring.Component):
    """One block RAM for the queues of all engines; instructions move through it beat by beat.

    Each engine has a ring of slots, whose pointers belong to its :class:`nibblecore_hw.ctrl.issue.IssueStage`. Fetch
    writes to slots that are not in the queue yet. Where an engine wants the instruction at ``head``, its beats are read
    one per cycle without a gap; of several engines the lowest is served first, and none is interrupted. The index of
    the instruction at ``oldest`` is read when the supervisor asks for it, which is before everything else.

    Cycles: the first beat is given in the cycle after the one in which ``want`` rises, if no other is being served.
    An index is found ``n + 2`` cycles after ``lookup`` rises, ``n`` being the beats of an instruction, where nobody is
    being served.

    Parameters
    ----------
    arch : ArchConfig
        For ``queue_depth`` and ``bus_bits``.

    Members
    -------
    write : In(write_signature(arch))
        From fetch.
    head, oldest : In(data.ArrayLayout)
        Slots, by engine: what is read next, the oldest unfinished instruction.
    want : In(4)
        Engines that want the instruction at ``head``. Stays until ``known_stb``.
    beat : Out(8 * beat_bytes)
        A beat of it.
    beat_stb, first_stb, known_stb : Out(4)
        Whose beat it is; it is the first one; the next cycle brings the last one (with a single beat: it is the last).
    lookup, lookup_engine : In(1), In(2)
        Read the index of that engine's oldest instruction; both stay until ``index_stb``.
    index, index_stb : Out(24), Out(1)
        The index.

    Raises
    ------
    TypeError
        If ``arch`` is no ArchConfig.
    """

    write: Any
    head: Any
    oldest: Any
    want: Signal
    beat: Signal
    beat_stb: Signal
    first_stb: Signal
    known_stb: Signal
    lookup: Signal
    lookup_engine: Signal
    index: Signal
    index_stb: Signal

    def __init__(self, *, arch: ArchConfig) -> None:
        if not isinstance(arch, ArchConfig):
            raise TypeError(f"arch must be an ArchConfig, not {arch!r}")
        self._arch = arch
        slots = data.ArrayLayout(slot_bits(arch), len(Engine))
        super().__init__(
            {
                "write": In(write_signature(arch)),
                "head": In(slots),
                "oldest": In(slots),
                "want": In(len(Engine)),
                "beat": Out(8 * beat_bytes(arch)),
                "beat_stb": Out(len(Engine)),
                "first_stb": Out(len(Engine)),
                "known_stb": Out(len(Engine)),
                "lookup": In(1),
                "lookup_engine": In(ENGINE_BITS),
                "index": Out(INDEX_BITS),
                "index_stb": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        arch = self._arch
        beats = beats_per_instruction(arch)
        beat_addr_bits = (beats - 1).bit_length()
        row_bits = ENGINE_BITS + slot_bits(arch) + beat_addr_bits
        # A word is never read while it is written: fetch writes to a slot that nobody reads.
        m.submodules.memory = memory = Memory(
            shape=beat_layout(arch), depth=1 << row_bits, init=[], attrs={"ram_style": "block"}
        )
        write, read = memory.write_port(), memory.read_port()
        m.d.comb += [
            write.addr.eq(Cat(self.write.number[:beat_addr_bits], self.write.slot, self.write.engine)),
            write.data.eq(self.write.beat),
            write.en.eq(self.write.en),
        ]

        # Addresses: a transfer's first one at once, the others from registers.
        active, active_index = Signal(), Signal()
        engine, slot = Signal(ENGINE_BITS, reset_less=True), Signal(slot_bits(arch), reset_less=True)
        number = Signal(beat_addr_bits)
        last = Signal()
        begin, begin_index = Signal(), Signal()
        now_engine, now_slot = Signal(ENGINE_BITS), Signal(slot_bits(arch))
        # Data, a cycle behind the addresses.
        given, given_index, given_last = Signal(), Signal(), Signal()
        given_engine = Signal(ENGINE_BITS, reset_less=True)
        given_first, given_known = Signal(reset_less=True), Signal(reset_less=True)

        whose = Signal(len(Engine))
        # Not a shift: in simulation, one by an amount that is not known yet makes all bits unknown, those of a 0 too.
        m.d.comb += [whose[int(e)].eq(given & (given_engine == int(e))) for e in Engine]
        open_wants = Signal(len(Engine))
        m.d.comb += [
            open_wants.eq(self.want & ~whose),  # what is just arriving is not wanted twice
            begin_index.eq(self.lookup & ~given_index & ~self.index_stb),
            begin.eq(~active & (begin_index | open_wants.any())),
            now_engine.eq(engine),
            now_slot.eq(slot),
        ]
        with m.If(~active):
            for e in reversed(Engine):
                with m.If(open_wants[int(e)]):
                    m.d.comb += now_engine.eq(int(e))
            m.d.comb += now_slot.eq(self.head[now_engine])
            with m.If(begin_index):
                m.d.comb += [now_engine.eq(self.lookup_engine), now_slot.eq(self.oldest[self.lookup_engine])]
        final = Signal(range(beats))  # the last beat that is read
        now_index = Signal()
        m.d.comb += now_index.eq(Mux(active, active_index, begin_index))
        with m.Switch(now_engine):
            for e in Engine:
                with m.Case(int(e)):
                    m.d.comb += final.eq(Mux(now_index, beats - 1, beats_of(arch, e) - 1))
        m.d.comb += [
            last.eq(number == final),
            read.addr.eq(Cat(number, now_slot, now_engine)),
        ]
        with m.If(active | begin):
            m.d.sync += [
                active.eq(~last),
                number.eq(Mux(last, 0, number + 1)),
                engine.eq(now_engine),
                slot.eq(now_slot),
                active_index.eq(now_index),
            ]
        m.d.sync += [
            given.eq((active | begin) & ~now_index),
            given_index.eq((active | begin) & now_index),
            given_engine.eq(now_engine),
            given_first.eq(number == 0),
            given_known.eq(Mux(final == 0, 1, number + 1 == final)),
            given_last.eq(last),
        ]
        m.d.comb += [
            self.beat.eq(read.data.bits),
            self.beat_stb.eq(whose),
            self.first_stb.eq(Mux(given_first, whose, 0)),
            self.known_stb.eq(Mux(given_known, whose, 0)),
        ]
        m.d.sync += self.index_stb.eq(given_index & given_last)
        with m.If(given_index):
            m.d.sync += self.index.eq(Cat(self.index, read.data.index)[-INDEX_BITS:])
        return m
