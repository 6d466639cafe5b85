"""The memory that holds the queued instructions of all engines, and what reads them out of it."""

from typing import Any

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, Signature

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import INSTRUCTION_BYTES, INSTRUCTIONS, Engine

from ..layouts import INDEX_BITS
from ..mem.block import BlockMemory
from ..technology import check_technology

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

    Cycles: the first beat is given 3 cycles after the one in which ``want`` rises, if no other is being served. An
    index is found ``n + 3`` cycles after ``lookup`` rises, ``n`` being the beats of an instruction, where nobody is
    being served.

    Parameters
    ----------
    arch : ArchConfig
        For ``queue_depth`` and ``bus_bits``.
    technology : {"generic", "ecp5"}
        Primitives that may be instantiated.

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
    ValueError
        If the technology is unknown.
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

    def __init__(self, *, arch: ArchConfig, technology: str = "generic") -> None:
        if not isinstance(arch, ArchConfig):
            raise TypeError(f"arch must be an ArchConfig, not {arch!r}")
        self._arch, self._technology = arch, check_technology(technology)
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
        # A word is never read while it is written: fetch writes to a slot that nobody reads. What is written waits in a
        # register, as its address comes late; that is before anybody can read it.
        m.submodules.memory = memory = BlockMemory(
            width=beat_layout(arch).size, depth=1 << row_bits, technology=self._technology
        )
        written_en = Signal()
        written_addr, written = Signal(row_bits, reset_less=True), Signal(beat_layout(arch), reset_less=True)
        m.d.sync += [
            written_en.eq(self.write.en),
            written_addr.eq(Cat(self.write.number[:beat_addr_bits], self.write.slot, self.write.engine)),
            written.eq(self.write.beat),
        ]
        m.d.comb += [
            memory.write_addr.eq(written_addr),
            memory.write_data.eq(written),
            memory.write_en.eq(written_en),
        ]

        # Addresses, all of them from registers: whose instruction is read is decided the cycle before.
        active, active_index = Signal(), Signal()
        engine, slot = Signal(ENGINE_BITS, reset_less=True), Signal(slot_bits(arch), reset_less=True)
        number, final = Signal(beat_addr_bits), Signal(beat_addr_bits, reset_less=True)  # beats: this one, the last one
        begin, begin_index = Signal(), Signal()
        next_engine, next_slot = Signal(ENGINE_BITS), Signal(slot_bits(arch))
        # What belongs to the data, 1 and 2 cycles behind the addresses.
        whose = [Signal(len(Engine), name=f"whose_{n}") for n in range(2)]
        of_index = [Signal(name=f"of_index_{n}") for n in range(2)]
        is_first, is_known, is_last = (
            [Signal(name=f"{name}_{n}", reset_less=True) for n in range(2)] for name in ("first", "known", "last")
        )
        open_wants = Signal(len(Engine))
        m.d.comb += [
            open_wants.eq(self.want & ~(whose[0] | whose[1])),  # what is just arriving is not wanted twice
            begin_index.eq(self.lookup & ~(of_index[0] | of_index[1] | self.index_stb)),
            begin.eq(~active & (begin_index | open_wants.any())),
        ]
        for e in reversed(Engine):
            with m.If(open_wants[int(e)]):
                m.d.comb += next_engine.eq(int(e))
        m.d.comb += next_slot.eq(self.head[next_engine])
        with m.If(begin_index):
            m.d.comb += [next_engine.eq(self.lookup_engine), next_slot.eq(self.oldest[self.lookup_engine])]
        m.d.comb += memory.read_addr.eq(Cat(number, slot, engine))
        with m.If(active):
            m.d.sync += [active.eq(number != final), number.eq(number + 1)]
        with m.Else():
            m.d.sync += [
                active.eq(begin),
                number.eq(0),
                engine.eq(next_engine),
                slot.eq(next_slot),
                active_index.eq(begin_index),
                final.eq(beats - 1),
            ]
            with m.If(~begin_index), m.Switch(next_engine):
                for e in Engine:
                    with m.Case(int(e)):
                        m.d.sync += final.eq(beats_of(arch, e) - 1)
        # Not a shift: in simulation, one by an amount that is not known yet makes all bits unknown, those of a 0 too.
        m.d.sync += [whose[0][int(e)].eq(active & ~active_index & (engine == int(e))) for e in Engine]
        m.d.sync += [
            of_index[0].eq(active & active_index),
            is_first[0].eq(number == 0),
            is_known[0].eq(Mux(final == 0, 1, number + 1 == final)),
            is_last[0].eq(number == final),
            *(line[1].eq(line[0]) for line in (whose, of_index, is_first, is_known, is_last)),
        ]
        word = data.View(beat_layout(arch), memory.read_data)
        m.d.comb += [
            self.beat.eq(word.bits),
            self.beat_stb.eq(whose[1]),
            self.first_stb.eq(Mux(is_first[1], whose[1], 0)),
            self.known_stb.eq(Mux(is_known[1], whose[1], 0)),
        ]
        m.d.sync += self.index_stb.eq(of_index[1] & is_last[1])
        with m.If(of_index[1]):
            m.d.sync += self.index.eq(Cat(self.index, word.index)[-INDEX_BITS:])
        return m
