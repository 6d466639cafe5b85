# amaranth: UnusedElaboratable=no
"""The hardware decoder accepts exactly what `isa.decode` accepts."""

import random
from collections.abc import Iterable, Sequence

import pytest
from amaranth.sim import Simulator, SimulatorContext

from nibblecore.arch import isa
from nibblecore.arch.isa import INSTRUCTION_BITS, INSTRUCTIONS, Engine, InstructionSpec, Opcode
from nibblecore_hw.ctrl.decode import BeatDecoder, Decoder
from nibblecore_sim.pysim import simulate


def random_legal(spec: InstructionSpec, rng: random.Random) -> int:
    """A word with random values in every field that `isa.decode` accepts."""
    while True:
        fields = {f.name: rng.choice(f.allowed) if f.allowed else rng.randint(f.low, f.high) for f in spec.all_fields}
        own = 0b1111 if spec.engine is None else 1 << spec.engine
        fields |= {"opcode": int(spec.opcode), "wait": fields["wait"] & ~own, "signal": fields["signal"] & ~own}
        try:
            return isa.encode(isa.Instruction(spec.opcode, fields))
        except isa.EncodingError:
            continue


def check(words: Iterable[int], note: str, beats: Sequence[int] = (64,)) -> tuple[int, int]:
    """Compare all decoders with `isa.decode`; how many words were legal, and how many not."""
    words = list(words)
    for beat_bits in beats:
        check_beats(words, beat_bits, note)
    dut = Decoder()
    seen = [0, 0]

    async def bench(ctx: SimulatorContext) -> None:
        for word in words:
            ctx.set(dut.word, word)
            await ctx.delay(1e-9)
            legal = Decoder.is_legal(word)
            assert ctx.get(dut.legal) == legal, f"{word:#066x} ({note})"
            seen[not legal] += 1
            if legal:
                engine = Decoder.model(word)
                assert ctx.get(dut.end) == (engine is None), f"{word:#066x} ({note})"
                if engine is not None:
                    assert ctx.get(dut.engine) == engine, f"{word:#066x} ({note})"

    sim = Simulator(dut)
    sim.add_testbench(bench)
    sim.run()
    return seen[0], seen[1]


def check_beats(words: list[int], beat_bits: int, note: str) -> None:
    """Compare the decoder of beats, one per cycle without a gap."""
    dut = BeatDecoder(beat_bits=beat_bits)
    beats = INSTRUCTION_BITS // beat_bits
    told: list[tuple[int, int]] = []

    async def bench(ctx: SimulatorContext) -> None:
        ctx.set(dut.en, 1)
        for n in range(beats * len(words) + 2):
            if n > beats and (n - 1) % beats == 0:
                told.append((ctx.get(dut.legal), ctx.get(dut.end)))
            if 0 < n <= beats * len(words):
                word = words[(n - 1) // beats]
                assert ctx.get(dut.beat_later) == word >> (n - 1) % beats * beat_bits & (1 << beat_bits) - 1
                if Decoder.is_legal(word) and (engine := BeatDecoder.model(word)) is not None:
                    assert ctx.get(dut.engine) == engine, f"{word:#066x} in beats of {beat_bits} bits ({note})"
            if n < beats * len(words):
                ctx.set(dut.number, n % beats)
                ctx.set(dut.beat, words[n // beats] >> n % beats * beat_bits & (1 << beat_bits) - 1)
            await ctx.tick()

    simulate(dut, bench, max_cycles=beats * len(words) + 3)
    assert len(told) == len(words)
    for word, (legal, end) in zip(words, told, strict=True):
        assert legal == Decoder.is_legal(word), f"{word:#066x} in beats of {beat_bits} bits ({note})"
        assert not legal or end == (Decoder.model(word) is None), f"{word:#066x} in beats of {beat_bits} bits ({note})"


@pytest.mark.parametrize("opcode", Opcode)
@pytest.mark.parametrize("seed", [1])
def test_every_single_flipped_bit(opcode: Opcode, seed: int) -> None:
    rng = random.Random(f"{opcode}{seed}")
    words = []
    for _ in range(3):
        word = random_legal(INSTRUCTIONS[opcode], rng)
        words += [word, *(word ^ 1 << bit for bit in range(INSTRUCTION_BITS))]
    legal, illegal = check(words, f"seed {seed}")
    assert legal >= 3
    assert illegal >= 3 * (INSTRUCTION_BITS - INSTRUCTIONS[opcode].bits)


@pytest.mark.parametrize("seed", [2, 3])
def test_random_words(seed: int) -> None:
    rng = random.Random(seed)
    words = []
    for _ in range(400):
        word = random_legal(INSTRUCTIONS[rng.choice(list(Opcode))], rng)
        for _ in range(rng.randrange(4)):
            word ^= 1 << rng.randrange(INSTRUCTION_BITS)
        words += [word, rng.getrandbits(INSTRUCTION_BITS), rng.getrandbits(rng.randrange(INSTRUCTION_BITS))]
    legal, illegal = check(words, f"seed {seed}")
    assert legal > 50
    assert illegal > 50


def test_every_class_of_illegal_encodings() -> None:
    words: list[int] = []
    for code in range(16):
        words += [code, code | 0b0101 << 4 | 0b1010 << 8]
    for spec in INSTRUCTIONS.values():
        base = isa.encode(isa.make(spec.opcode))
        for mask in range(16):  # own-engine bits of both masks; all bits for END
            words += [base | mask << 4, base | mask << 8]
        for low, field in spec.layout().values():
            if field.allowed is not None:  # all codes of enumerated fields
                words += [base & ~((1 << field.bits) - 1 << low) | code << low for code in range(1 << field.bits)]
        for rule in spec.forbidden:  # the combination, and each part of it alone
            layout = spec.layout()
            for names in (list(rule.values), *([n] for n in rule.values)):
                word = base
                for name in names:
                    low, field = layout[name]
                    word |= (rule.values[name] - field.offset & (1 << field.bits) - 1) << low
                words.append(word)
        words += [base | 1 << bit for bit in range(spec.bits, INSTRUCTION_BITS)]  # spare bits
    legal, illegal = check(words, "enumerated", beats=(32, 64, 128, 256))
    assert legal > 80
    assert illegal > 300


def test_model_names_the_engine() -> None:
    assert Decoder.model(isa.encode(isa.make(Opcode.POOL))) is Engine.POST
    assert Decoder.model(isa.encode(isa.make(Opcode.END))) is None


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"^beat_bits must be a power of two in 32\.\.256, not 48$"):
        BeatDecoder(beat_bits=48)
