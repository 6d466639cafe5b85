import random
import re

import pytest

from nibblecore.arch import isa
from nibblecore.arch.isa import Engine, Instruction, Opcode
from nibblecore.errors import EncodingError


def random_instruction(rng: random.Random) -> Instruction:
    spec = isa.INSTRUCTIONS[rng.choice(list(Opcode))]
    fields = {
        f.name: rng.choice(f.allowed) if f.allowed else rng.choice((f.low, f.high, rng.randint(f.low, f.high)))
        for f in spec.all_fields
    }
    own = 0 if spec.engine is None else ~(1 << spec.engine) & 0xF
    fields |= {"opcode": int(spec.opcode), "wait": fields["wait"] & own, "signal": fields["signal"] & own}
    if spec.opcode is Opcode.POST:
        fields["add_shift"] = min(fields["add_shift"], 31)
        if fields["mode"] == isa.OutputMode.RAW32:
            fields["add"] = 0
    return Instruction(spec.opcode, fields)


@pytest.mark.parametrize("seed", range(20))
def test_decode_inverts_encode(seed: int) -> None:
    rng = random.Random(seed)
    program = [random_instruction(rng) for _ in range(50)]
    assert isa.from_bytes(isa.to_bytes(program)) == program, f"seed {seed}"


@pytest.mark.parametrize("spec", isa.INSTRUCTIONS.values(), ids=lambda s: s.opcode.name)
def test_fields_fit_and_names_are_unique(spec: isa.InstructionSpec) -> None:
    assert spec.bits <= isa.INSTRUCTION_BITS
    assert len({f.name for f in spec.all_fields}) == len(spec.all_fields)


def encoded(name: str, value: int) -> Instruction:
    return isa.make(Opcode.MAC, **{name: value})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: encoded("cols", 0), "MAC.cols=0 is not in 1..1024"),
        (lambda: encoded("x0", -129), "MAC.x0=-129 is not in -128..127"),
        (lambda: encoded("shift", 3), "MAC.shift=3 is not one of 0, 1, 2"),
        (lambda: encoded("colour", 3), "MAC has no field 'colour'"),
        (lambda: isa.make(Opcode.LOAD, wait=[Engine.LOAD]), "LOAD.wait=0b0001 names LOAD itself"),
        (lambda: isa.make(Opcode.END, signal=[Engine.MAC]), "END.signal=0b0010 must be 0"),
        (lambda: isa.make(Opcode.POST, add=1, mode=2), "POST.add=1 cannot go with mode=2 (RAW32)"),
        (lambda: isa.make(Opcode.POST, add_shift=32), "POST.add_shift=32 is not in 1..31"),
        (lambda: isa.decode(0), "there is no opcode 0"),
        (lambda: isa.decode(15), "there is no opcode 15"),
        (lambda: isa.decode(1 | 1 << 255), "END has bits set above its last field, at 12..255"),
        (lambda: isa.decode(3 | 3 << 14), "MAC.shift=3 is not one of 0, 1, 2"),
        (lambda: isa.from_bytes(bytes(33)), "33 bytes are not a multiple of the 32 of an instruction"),
        (
            lambda: isa.from_bytes(isa.to_bytes([isa.make(Opcode.END)]) + bytes(32)),
            "instruction 1: there is no opcode 0",
        ),
    ],
)
def test_illegal_encodings_are_named(call: object, text: str) -> None:
    with pytest.raises(EncodingError, match=f"^{re.escape(text)}$"):
        call()  # type: ignore[operator]


def test_disassembly_shows_what_differs_from_the_default() -> None:
    text = str(isa.make(Opcode.LOAD, wait=[Engine.MAC, Engine.POST], signal=[Engine.MAC], count0=16, local_addr=3))
    assert text == "load <-mac,post ->mac local_addr=3 count0=16"
