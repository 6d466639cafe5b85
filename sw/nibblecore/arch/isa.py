"""The instruction set: opcodes, fields, encoder, decoder, disassembler.

An instruction is 256 bits, stored little-endian, 8-byte aligned in the program region. Fields are packed from bit 0 in
the order in which they are listed; the bits above the last field must be zero. Encoder, hardware decoder, golden
model, disassembler and ``hw/ISA.md`` are all derived from :data:`INSTRUCTIONS`.

Execution model
---------------
Fetch reads instructions in order and puts each into the queue of its engine (load, MAC, post, store); a full queue
stops fetch. An engine runs its queue in order, one instruction at a time. Engines synchronize by semaphores only:
``semaphore[a][b]`` counts what engine ``a`` has signalled to engine ``b``. An instruction starts when, for every engine
named in its ``wait`` mask, the semaphore from that engine to its own is above zero, and then takes one from each. When
it has finished (all its writes are visible, a store has all its write responses), it adds one to the semaphore towards
every engine in its ``signal`` mask; while one of these is at its maximum, it waits. All semaphores start at zero. END
stops fetch; the program is done when every queue is empty and every engine idle.

Addresses
---------
On-chip and DRAM addresses count *words* of ``lanes`` nibbles. Local addresses are computed modulo 2**16, then taken
modulo the depth of the buffer. DRAM addresses are offsets into one of eight *regions*.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Final

from ..errors import EncodingError

ISA_VERSION: Final = 1
INSTRUCTION_BITS: Final = 256
INSTRUCTION_BYTES: Final = INSTRUCTION_BITS // 8
REGIONS: Final = 8
LOCAL_ADDR_BITS: Final = 16
DRAM_ADDR_BITS: Final = 28


class Engine(enum.IntEnum):
    """Who executes an instruction; also the bit in ``wait`` and ``signal`` masks."""

    LOAD = 0
    MAC = 1
    POST = 2
    STORE = 3


class Opcode(enum.IntEnum):
    """0 is no instruction, so that zeroed memory stops the core."""

    END = 1
    LOAD = 2
    MAC = 3
    POST = 4
    POOL = 5
    STORE = 6


class Region(enum.IntEnum):
    """What the compiler keeps in which region; hardware only knows REGION 0, from which it fetches."""

    PROGRAM = 0
    CONSTANTS = 1
    SCRATCH = 2
    INPUT = 3
    OUTPUT = 4


class LoadTarget(enum.IntEnum):
    ACTIVATIONS = 0
    WEIGHTS = 1


class OutputMode(enum.IntEnum):
    """How POST writes a pixel: one word per brick, a high and a low word per brick, or 32-bit sums."""

    INT4 = 0
    INT8 = 1
    RAW32 = 2


@dataclasses.dataclass(frozen=True)
class Field:
    """``bits`` wide; the encoded integer is ``value - offset``. Signed fields are two's complement."""

    name: str
    bits: int
    doc: str
    signed: bool = False
    offset: int = 0
    allowed: tuple[int, ...] | None = None

    @property
    def low(self) -> int:
        return self.offset - (1 << (self.bits - 1) if self.signed else 0)

    @property
    def high(self) -> int:
        return self.offset + (1 << (self.bits - (1 if self.signed else 0))) - 1


def _count(name: str, bits: int, doc: str) -> Field:
    return Field(name, bits, f"{doc} (stored minus 1)", offset=1)


def _address(name: str, doc: str) -> Field:
    return Field(name, LOCAL_ADDR_BITS, doc)


def _step(name: str, bits: int, doc: str) -> Field:
    return Field(name, bits, doc, signed=bits == LOCAL_ADDR_BITS)


@dataclasses.dataclass(frozen=True)
class Forbidden:
    """Field values that are illegal when they come together, and the error that says so."""

    values: Mapping[str, int]
    why: str


@dataclasses.dataclass(frozen=True)
class InstructionSpec:
    """Opcode, the engine that runs it (None: fetch itself), its fields after the header, and what it does."""

    opcode: Opcode
    engine: Engine | None
    fields: tuple[Field, ...]
    doc: str
    forbidden: tuple[Forbidden, ...] = ()

    @property
    def all_fields(self) -> tuple[Field, ...]:
        return HEADER + self.fields

    @property
    def bits(self) -> int:
        return sum(f.bits for f in self.all_fields)

    def layout(self) -> dict[str, tuple[int, Field]]:
        """Field name to (lowest bit, field)."""
        result, low = {}, 0
        for f in self.all_fields:
            result[f.name] = (low, f)
            low += f.bits
        return result


HEADER: Final = (
    Field("opcode", 4, "what to do"),
    Field("wait", 4, "engines to wait for, one bit each; its own bit must be 0"),
    Field("signal", 4, "engines to signal when finished, one bit each; its own bit must be 0"),
)

_DMA_FIELDS: Final = (
    Field("region", 3, "DRAM region"),
    Field("dram_addr", DRAM_ADDR_BITS, "first word, relative to the region"),
    _address("local_addr", "first word in the buffer"),
    _count("count0", 14, "words in a row, consecutive on both sides"),
    _count("count1", 12, "rows"),
    _count("count2", 12, "planes"),
    Field("dram_step1", 24, "DRAM words from row to row"),
    Field("dram_step2", 24, "DRAM words from plane to plane"),
    _step("local_step1", 16, "buffer words from row to row"),
    _step("local_step2", 16, "buffer words from plane to plane"),
)

_WINDOW_FIELDS: Final = (
    Field("x0", 8, "column of the first pixel's first tap", signed=True),
    Field("y0", 8, "row of the first pixel's first tap", signed=True),
    _count("width", 11, "valid columns are 0..width-1"),
    _count("height", 11, "valid rows are 0..height-1"),
    _count("stride_x", 4, "columns from output pixel to output pixel"),
    _count("stride_y", 4, "rows from output row to output row"),
    _count("dilation_x", 5, "columns from tap to tap"),
    _count("dilation_y", 5, "rows from tap to tap"),
)

_WINDOW: Final = {f.name: f for f in _WINDOW_FIELDS}

_TILE_FIELDS: Final = (
    _count("cols", 10, "output pixels per row of the tile"),
    _count("rows", 10, "rows of the tile"),
)

INSTRUCTIONS: Final[Mapping[Opcode, InstructionSpec]] = {
    spec.opcode: spec
    for spec in (
        InstructionSpec(
            Opcode.END,
            None,
            (),
            """\
End of the program. Its ``wait`` and ``signal`` masks must be 0.""",
        ),
        InstructionSpec(
            Opcode.LOAD,
            Engine.LOAD,
            (*_DMA_FIELDS, Field("target", 1, "buffer: 0 activations, 1 weights")),
            """\
Copy words from DRAM to a buffer: for each plane, for each row, ``count0`` consecutive words.""",
        ),
        InstructionSpec(
            Opcode.MAC,
            Engine.MAC,
            (
                Field("acc_bank", 1, "accumulator bank"),
                Field("accumulate", 1, "0: the first pass overwrites the accumulators, 1: it adds to them"),
                Field("shift", 2, "products count 16**shift", allowed=(0, 1, 2)),
                _address("w_addr", "first word of the first weight tile"),
                Field("w_step", 8, "words from one pass's weight tile to the next's; 0 uses one tile for all"),
                _address("x_addr", "word of pixel (y0, x0), brick 0, which may lie outside the map"),
                *_TILE_FIELDS,
                _count("bricks", 10, "input words of each pixel that are multiplied"),
                _count("kernel_x", 6, "kernel columns"),
                _count("kernel_y", 6, "kernel rows"),
                _step("ox_step", 16, "words from output pixel to output pixel"),
                _step("oy_step", 16, "words from output row to output row"),
                _step("brick_step", 12, "words from brick to brick"),
                _step("kx_step", 16, "words from tap to tap"),
                _step("ky_step", 16, "words from kernel row to kernel row"),
                *_WINDOW_FIELDS,
                Field("pad", 4, "nibble read outside the map", signed=True),
            ),
            """\
One output tile of one column tile. Pass ``(ky, kx, brick)``, the last innermost, holds one weight tile; under it all
``rows x cols`` pixels stream through the array, and ``acc[bank][oy*cols + ox][column] += 16**shift * sum_lane(x * w)``.
``x`` is the word at ``x_addr + oy*oy_step + ox*ox_step + ky*ky_step + kx*kx_step + brick*brick_step``, or ``pad`` in
every lane where row ``y0 + oy*stride_y + ky*dilation_y`` or column ``x0 + ox*stride_x + kx*dilation_x`` is not valid.
Pass ``n`` takes its tile at ``w_addr + n*w_step``: ``columns`` words, one per column, lane 0 in the low nibble.
Sums wrap at ``acc_bits``. ``rows * cols`` must not exceed ``acc_depth``.""",
        ),
        InstructionSpec(
            Opcode.POST,
            Engine.POST,
            (
                Field("acc_bank", 1, "accumulator bank to drain"),
                *_TILE_FIELDS,
                _address("p_addr", "first word of the requantization records, in the weight buffer"),
                _address("out_addr", "word of output pixel (0, 0) in the activation buffer"),
                _step("out_ox_step", 12, "words from output pixel to output pixel"),
                _step("out_oy_step", 16, "words from output row to output row"),
                _count(
                    "bricks", 3, "bricks of the column tile that are written, where columns are a multiple of lanes"
                ),
                Field("mode", 2, "0: 4-bit codes, 1: 8-bit codes, 2: acc + bias as 32 bits", allowed=(0, 1, 2)),
                Field("part", 3, "which part of the brick is written, where columns are a part of lanes"),
                Field("zero", 8, "z_y, zero point of the requantized code", signed=True),
                Field("low", 8, "clamp", signed=True),
                Field("high", 8, "clamp", signed=True),
                Field("add", 1, "1: add a stored tensor behind the requantization"),
                Field("add_wide", 1, "that tensor has 8-bit codes (a high and a low word per brick)"),
                _address("add_addr", "its word for output pixel (0, 0)"),
                _step("add_ox_step", 12, "its words from output pixel to output pixel"),
                _step("add_oy_step", 16, "its words from output row to output row"),
                Field("k_a", 16, "factor of the requantized code", signed=True),
                Field("k_b", 16, "factor of the stored tensor", signed=True),
                _count("add_shift", 5, "n of the addition, 1..31"),
                Field("zero_b", 8, "zero point of the stored tensor", signed=True),
                Field("add_zero", 8, "zero point of the sum", signed=True),
                Field("add_low", 8, "clamp of the sum", signed=True),
                Field("add_high", 8, "clamp of the sum", signed=True),
            ),
            """\
Drain one output tile: per pixel and column ``q = clamp(((acc + bias) * mult + 2**(shift-1) >> shift) + zero, low,
high)`` with the column's record ``bias`` (signed 32), ``mult`` (signed 18), ``shift`` (6, 1..47), 64 bits each from bit
0. With ``add``: ``clamp(add_zero + ((q - zero)*k_a + (b - zero_b)*k_b + 2**(n-1) >> n), add_low, add_high)``, where
``q`` is an 8-bit code. INT4 writes one word per brick; INT8 a high word, then a low word; RAW32 writes ``acc + bias``
sign-extended to 32 bits, ``32*lanes/word_bits`` consecutive words per brick, channel 0 first, and ignores the rest.
Bricks of one pixel follow each other. Where columns are a part of lanes, only nibbles ``part*columns`` onwards of each
word are written (RAW32: the words of that part). ``add`` together with RAW32 is illegal.""",
            (
                Forbidden({"add": 1, "mode": int(OutputMode.RAW32)}, "POST.add=1 cannot go with mode=2 (RAW32)"),
                Forbidden({"add_shift": 32}, "POST.add_shift=32 is not in 1..31"),
            ),
        ),
        InstructionSpec(
            Opcode.POOL,
            Engine.POST,
            (
                # In the order of POST: what both have is at the same place, so that no multiplexer has to choose it.
                Field("wide", 1, "8-bit codes: a high and a low word per brick"),
                *_TILE_FIELDS,
                _WINDOW["x0"],
                _WINDOW["y0"],
                _address("out_addr", "word of output pixel (0, 0), brick 0"),
                _step("out_ox_step", 12, "output words from pixel to pixel"),
                _step("out_oy_step", 16, "output words from row to row"),
                _count("bricks", 8, "bricks (of 8-bit codes: pairs of words)"),
                _step("brick_step", 4, "words from brick to brick, input and output alike"),
                _WINDOW["width"],
                _WINDOW["height"],
                _address("in_addr", "word of pixel (y0, x0), brick 0, which may lie outside the map"),
                _step("ox_step", 12, "input words from output pixel to output pixel"),
                _step("oy_step", 16, "input words from output row to output row"),
                _step("kx_step", 12, "words from tap to tap"),
                _step("ky_step", 16, "words from window row to window row"),
                _count("kernel_x", 5, "window columns"),
                _count("kernel_y", 5, "window rows"),
                *(_WINDOW[name] for name in ("stride_x", "stride_y", "dilation_x", "dilation_y")),
            ),
            """\
Max-pool stored codes: per output pixel, brick and lane the largest code of the window's valid taps, and the lowest
code (-8, or -128 for 8-bit codes) where no tap is valid.""",
        ),
        InstructionSpec(
            Opcode.STORE,
            Engine.STORE,
            _DMA_FIELDS,
            """\
Copy words from the activation buffer to DRAM, as LOAD does in the other direction.""",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: an opcode and a value for every field of its spec except ``opcode``."""

    opcode: Opcode
    fields: Mapping[str, int]

    @property
    def spec(self) -> InstructionSpec:
        return INSTRUCTIONS[self.opcode]

    @property
    def engine(self) -> Engine | None:
        return self.spec.engine

    def __getitem__(self, name: str) -> int:
        return self.fields[name]

    def __str__(self) -> str:
        return disassemble(self)


def make(
    opcode: Opcode, /, *, wait: Iterable[Engine] = (), signal: Iterable[Engine] = (), **values: int
) -> Instruction:
    """Build an instruction; fields left out take the value that encodes as 0 (counts: 1)."""
    spec = INSTRUCTIONS[opcode]
    fields = {f.name: f.offset for f in spec.all_fields}
    fields["opcode"] = int(opcode)
    fields["wait"] = sum(1 << e for e in set(wait))
    fields["signal"] = sum(1 << e for e in set(signal))
    for name, value in values.items():
        if name not in fields or name == "opcode":
            raise EncodingError(f"{opcode.name} has no field {name!r}")
        fields[name] = int(value)
    instruction = Instruction(opcode, fields)
    encode(instruction)
    return instruction


def _check_masks(spec: InstructionSpec, wait: int, signal: int) -> None:
    own = 0b1111 if spec.engine is None else 1 << spec.engine
    for name, mask in (("wait", wait), ("signal", signal)):
        if mask & own:
            who = "END" if spec.engine is None else spec.engine.name
            raise EncodingError(
                f"{spec.opcode.name}.{name}={mask:#06b} names {who} itself"
                if spec.engine is not None
                else f"END.{name}={mask:#06b} must be 0"
            )


def _check_combination(spec: InstructionSpec, fields: Mapping[str, int]) -> None:
    _check_masks(spec, fields["wait"], fields["signal"])
    for rule in spec.forbidden:
        if all(fields[name] == value for name, value in rule.values.items()):
            raise EncodingError(rule.why)


def encode(instruction: Instruction) -> int:
    """The 256-bit word of an instruction. Raises :class:`EncodingError` naming field, value and range."""
    spec, word, low = instruction.spec, 0, 0
    for f in spec.all_fields:
        value = instruction.fields[f.name]
        if not f.low <= value <= f.high:
            raise EncodingError(f"{spec.opcode.name}.{f.name}={value} is not in {f.low}..{f.high}")
        if f.allowed is not None and value not in f.allowed:
            raise EncodingError(f"{spec.opcode.name}.{f.name}={value} is not one of {', '.join(map(str, f.allowed))}")
        word |= (value - f.offset & (1 << f.bits) - 1) << low
        low += f.bits
    _check_combination(spec, instruction.fields)
    return word


def decode(word: int) -> Instruction:
    """The instruction of a 256-bit word. Raises :class:`EncodingError` for what hardware stops at as illegal."""
    code = word & 0xF
    try:
        spec = INSTRUCTIONS[Opcode(code)]
    except ValueError:
        raise EncodingError(f"there is no opcode {code}") from None
    fields, low = {}, 0
    for f in spec.all_fields:
        raw = word >> low & (1 << f.bits) - 1
        if f.signed and raw >> f.bits - 1:
            raw -= 1 << f.bits
        value = raw + f.offset
        if f.allowed is not None and value not in f.allowed:
            raise EncodingError(f"{spec.opcode.name}.{f.name}={value} is not one of {', '.join(map(str, f.allowed))}")
        fields[f.name] = value
        low += f.bits
    if word >> low:
        raise EncodingError(f"{spec.opcode.name} has bits set above its last field, at {low}..{INSTRUCTION_BITS - 1}")
    _check_combination(spec, fields)
    return Instruction(spec.opcode, fields)


def to_bytes(instructions: Iterable[Instruction]) -> bytes:
    """The program region: 32 bytes per instruction, little-endian."""
    return b"".join(encode(i).to_bytes(INSTRUCTION_BYTES, "little") for i in instructions)


def from_bytes(data: bytes) -> list[Instruction]:
    """Decode a program region. Errors name the instruction's index."""
    if len(data) % INSTRUCTION_BYTES:
        raise EncodingError(f"{len(data)} bytes are not a multiple of the {INSTRUCTION_BYTES} of an instruction")
    result = []
    for index in range(len(data) // INSTRUCTION_BYTES):
        word = int.from_bytes(data[index * INSTRUCTION_BYTES : (index + 1) * INSTRUCTION_BYTES], "little")
        try:
            result.append(decode(word))
        except EncodingError as error:
            raise EncodingError(f"instruction {index}: {error}") from None
    return result


def engines_in(mask: int) -> tuple[Engine, ...]:
    """The engines of a ``wait`` or ``signal`` mask."""
    return tuple(e for e in Engine if mask >> e & 1)


def disassemble(instruction: Instruction) -> str:
    """One line: mnemonic, semaphores, then the fields that differ from their default."""
    parts = [instruction.opcode.name.lower()]
    for name, arrow in (("wait", "<-"), ("signal", "->")):
        if mask := instruction.fields[name]:
            parts.append(arrow + ",".join(e.name.lower() for e in engines_in(mask)))
    parts += [
        f"{f.name}={instruction.fields[f.name]}"
        for f in instruction.spec.fields
        if instruction.fields[f.name] != f.offset
    ]
    return " ".join(parts)
