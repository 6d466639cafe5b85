"""Instruction decoder: legality and engine of an instruction, generated from the instruction set's data."""

from functools import reduce
from operator import and_, or_
from typing import Final

from amaranth import Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch import isa
from nibblecore.arch.isa import INSTRUCTION_BITS, INSTRUCTIONS, Engine, Field, InstructionSpec, Opcode
from nibblecore.errors import EncodingError

OPCODE_BITS: Final = isa.HEADER[0].bits


def _raw(field: Field, value: int) -> int:
    return value - field.offset & (1 << field.bits) - 1


class _Part:
    """The bits of a word from ``low`` on that are at hand, and what can be said about instructions from them alone."""

    def __init__(self, m: Module, bits: Value, low: int) -> None:
        self.bits, self.low, self.top = bits, low, low + len(bits)
        # Spare bits start at another place in each format: one chain of partial ORs serves all.
        self.above: dict[int, Value] = {}
        upper: Value | None = None
        end = self.top
        for start in sorted({max(spec.bits, low) for spec in INSTRUCTIONS.values()}, reverse=True):
            if start >= self.top:
                continue
            spare = Signal(name=f"spare_{start}")
            some = bits[start - low : end - low].any()
            m.d.comb += spare.eq(some if upper is None else some | upper)
            self.above[start], upper, end = spare, spare, start

    def has(self, spec: InstructionSpec, name: str) -> bool:
        """Whether the field is here; a field that is checked never lies in two parts."""
        low, field = spec.layout()[name]
        assert not low < self.low < low + field.bits
        assert not low < self.top < low + field.bits
        return self.low <= low < self.top

    def field(self, spec: InstructionSpec, name: str) -> tuple[Value, Field]:
        low, field = spec.layout()[name]
        return self.bits[low - self.low : low - self.low + field.bits], field

    def term(self, spec: InstructionSpec, name: str, value: int) -> Value:
        """Whether the field is ``value``."""
        bits, field = self.field(spec, name)
        return bits == _raw(field, value)

    def faults(self, spec: InstructionSpec) -> Value:
        """Whether something here keeps a word with this opcode from being an instruction."""
        faults: list[Value] = [Const(0)]
        if self.low == 0:
            own = (1 << len(Engine)) - 1 if spec.engine is None else 1 << spec.engine
            faults += [(self.field(spec, name)[0] & own).any() for name in ("wait", "signal")]
        if spec.bits < self.top:
            faults.append(self.above[max(spec.bits, self.low)])
        for field in spec.all_fields:
            if field.allowed is not None and self.has(spec, field.name):
                faults.append(~reduce(or_, [self.term(spec, field.name, v) for v in field.allowed]))
        for rule in spec.forbidden:
            if all(self.has(spec, name) for name in rule.values):
                faults.append(reduce(and_, [self.term(spec, *item) for item in rule.values.items()]))
        return reduce(or_, faults)


class Decoder(wiring.Component):
    """Say whether a word is an instruction, and whose. Combinational.

    ``legal`` is 1 exactly where :func:`nibblecore.arch.isa.decode` accepts the word: known opcode, own bits of ``wait``
    and ``signal`` clear (all bits for END), enumerated fields at one of their values, no forbidden combination, and
    zeros above the last field.

    Members
    -------
    word : In(256)
        The instruction.
    legal : Out(1)
        It is one.
    end : Out(1)
        Its opcode is END. Meaningless unless ``legal``.
    engine : Out(2)
        Whose queue it goes to. Meaningless unless ``legal`` and not ``end``.
    """

    LATENCY = 0

    word: Signal
    legal: Signal
    end: Signal
    engine: Signal

    def __init__(self) -> None:
        super().__init__({"word": In(INSTRUCTION_BITS), "legal": Out(1), "end": Out(1), "engine": Out(2)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        whole = _Part(m, self.word, 0)
        with m.Switch(self.word[:OPCODE_BITS]):
            for spec in INSTRUCTIONS.values():
                with m.Case(int(spec.opcode)):
                    m.d.comb += self.legal.eq(~whole.faults(spec))
                    if spec.engine is None:
                        m.d.comb += self.end.eq(1)
                    else:
                        m.d.comb += self.engine.eq(int(spec.engine))
        return m

    @staticmethod
    def model(word: int) -> Engine | None:
        """The engine of ``word``; None for END. Raises :class:`EncodingError` where ``legal`` is 0."""
        instruction = isa.decode(word)
        return instruction.engine

    @staticmethod
    def is_legal(word: int) -> bool:
        """What ``legal`` says of ``word``."""
        try:
            isa.decode(word)
        except EncodingError:
            return False
        return True


class BeatDecoder(wiring.Component):
    """:class:`Decoder` for a word that comes in beats, lowest first: no more of it than a beat has to be kept.

    Parameters
    ----------
    beat_bits : int
        Bits of a beat: a power of two in 32..256.

    Members
    -------
    beat, number, en : In(beat_bits), In(range(n)), In(1)
        A beat of the word, and which one; those of a word come in order.
    engine : Out(2)
        The cycle after each beat: whose queue its word goes to. Meaningless unless it is legal and not END.
    beat_later : Out(beat_bits)
        ``beat``, a cycle later.
    legal, end : Out(1), Out(1)
        Two cycles after the last beat: it was an instruction; its opcode is END, meaningless unless ``legal``.

    Raises
    ------
    ValueError
        If ``beat_bits`` is not such a number.
    """

    LATENCY = 2

    beat: Signal
    number: Signal
    en: Signal
    engine: Signal
    beat_later: Signal
    legal: Signal
    end: Signal

    def __init__(self, *, beat_bits: int) -> None:
        if beat_bits not in (32, 64, 128, 256):
            raise ValueError(f"beat_bits must be a power of two in 32..{INSTRUCTION_BITS}, not {beat_bits!r}")
        self._beats = INSTRUCTION_BITS // beat_bits
        super().__init__(
            {
                "beat": In(beat_bits),
                "number": In(range(self._beats)),
                "en": In(1),
                "engine": Out(2),
                "beat_later": Out(beat_bits),
                "legal": Out(1),
                "end": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        width, specs = len(self.beat), list(INSTRUCTIONS.values())
        # First what the rest depends on: the opcode of the beat's word, whose it is, which beat this is.
        held, opcode_now = Signal(OPCODE_BITS, reset_less=True), Signal(OPCODE_BITS)
        opcode = Signal(OPCODE_BITS, reset_less=True)
        number = Signal.like(self.number, name="number_later", reset_less=True)
        beat, engine = Signal(width, name="beat_r", reset_less=True), Signal(2, name="engine_r", reset_less=True)
        first, en = Signal(reset_less=True), Signal()
        m.d.comb += [
            opcode_now.eq(Mux(self.number == 0, self.beat[:OPCODE_BITS], held)),
            self.engine.eq(engine),
            self.beat_later.eq(beat),
        ]
        with m.If(self.en):
            m.d.sync += held.eq(opcode_now)
        m.d.sync += [opcode.eq(opcode_now), number.eq(self.number), first.eq(self.number == 0)]
        m.d.sync += [beat.eq(self.beat), en.eq(self.en)]
        with m.Switch(opcode_now):
            for spec in specs:
                if spec.engine is not None:
                    with m.Case(int(spec.opcode)):
                        m.d.sync += engine.eq(int(spec.engine))

        before, fault = Signal(reset_less=True), Signal()  # in earlier beats, and now
        is_end = Signal(reset_less=True)
        m.d.comb += [self.legal.eq(~before), self.end.eq(is_end)]
        with m.If(en):
            m.d.sync += [before.eq(fault | (before & ~first)), is_end.eq(opcode == int(Opcode.END))]

        parts = [_Part(m, beat, k * width) for k in range(self._beats)]
        across = {
            (k, spec.opcode): self._across(m, spec, parts, k, en=en, beat_number=number)
            for k in range(self._beats)
            for spec in specs
        }
        with m.Switch(number):
            for k, part in enumerate(parts):
                with m.Case(k), m.Switch(opcode):
                    for spec in specs:
                        with m.Case(int(spec.opcode)):
                            m.d.comb += fault.eq(part.faults(spec) | across[k, spec.opcode])
                    with m.Default():
                        m.d.comb += fault.eq(1)
        return m

    def _across(
        self, m: Module, spec: InstructionSpec, parts: list[_Part], k: int, *, en: Value, beat_number: Value
    ) -> Value:
        """Whether beat ``k`` completes a forbidden combination of fields in several beats."""
        completed: Value = Const(0)
        for number, rule in enumerate(spec.forbidden):
            places = {name: next(i for i, part in enumerate(parts) if part.has(spec, name)) for name in rule.values}
            if max(places.values()) != k or min(places.values()) == k:
                continue
            terms = []
            for name, value in rule.values.items():
                term = parts[places[name]].term(spec, name, value)
                if places[name] != k:
                    # What was seen then; other instructions' bits at that place are never asked for.
                    seen = Signal(name=f"seen_{spec.opcode.name.lower()}_{number}_{name}", reset_less=True)
                    with m.If(en & (beat_number == places[name])):
                        m.d.sync += seen.eq(term)
                    term = seen
                terms.append(term)
            completed |= reduce(and_, terms)
        return completed

    @staticmethod
    def model(word: int) -> Engine | None:
        """As :meth:`Decoder.model`."""
        return Decoder.model(word)
