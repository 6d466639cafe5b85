"""Instruction decoder: legality and engine of an instruction word, generated from the instruction set's data."""

from functools import reduce
from operator import and_

from amaranth import Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch import isa
from nibblecore.arch.isa import INSTRUCTION_BITS, INSTRUCTIONS, Engine, Field, InstructionSpec
from nibblecore.errors import EncodingError


def _raw(field: Field, value: int) -> int:
    return value - field.offset & (1 << field.bits) - 1


def _field(word: Value, spec: InstructionSpec, name: str) -> tuple[Value, Field]:
    low, field = spec.layout()[name]
    return word[low : low + field.bits], field


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
        opcode = self.word[: isa.HEADER[0].bits]

        # Spare bits start at another place in each format: one chain of partial ORs serves all.
        above: dict[int, Value] = {}
        upper: Value | None = None
        top = INSTRUCTION_BITS
        for low in sorted({spec.bits for spec in INSTRUCTIONS.values()}, reverse=True):
            if low == INSTRUCTION_BITS:
                continue
            spare = Signal(name=f"spare_{low}")
            part = self.word[low:top].any()
            m.d.comb += spare.eq(part if upper is None else part | upper)
            above[low], upper, top = spare, spare, low

        with m.Switch(opcode):
            for spec in INSTRUCTIONS.values():
                with m.Case(int(spec.opcode)):
                    m.d.comb += self.legal.eq(~reduce(lambda a, b: a | b, self._faults(spec, above)))
                    if spec.engine is None:
                        m.d.comb += self.end.eq(1)
                    else:
                        m.d.comb += self.engine.eq(int(spec.engine))
        return m

    def _faults(self, spec: InstructionSpec, above: dict[int, Value]) -> list[Value]:
        """One bit per reason for which a word with this opcode is no instruction."""
        own = (1 << len(Engine)) - 1 if spec.engine is None else 1 << spec.engine
        faults = [(_field(self.word, spec, name)[0] & own).any() for name in ("wait", "signal")]
        if spec.bits < INSTRUCTION_BITS:
            faults.append(above[spec.bits])
        for field in spec.all_fields:
            if field.allowed is not None:
                bits, _ = _field(self.word, spec, field.name)
                faults.append(~reduce(lambda a, b: a | b, [bits == _raw(field, v) for v in field.allowed]))
        for rule in spec.forbidden:
            terms = []
            for name, value in rule.values.items():
                bits, field = _field(self.word, spec, name)
                terms.append(bits == _raw(field, value))
            faults.append(reduce(and_, terms))
        return faults

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
