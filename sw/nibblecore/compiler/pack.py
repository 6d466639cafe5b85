"""Pack weights and requantization records in the order in which the engines consume them.

The output channels of a layer are cut into *column tiles*, as many channels as the array has columns. A column tile is
computed by one or more MAC instructions (:class:`Term`), whose weights lie in *blocks*: what one LOAD brings into the
weight buffer. The records of a column tile lie behind its last weights, in the same block.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..arch.config import ArchConfig
from ..arch.numerics import BIAS_BITS, MULT_BITS, split_code8
from ..ir.graph import IntArray, TensorType
from ..runtime.layout import groups, nibbles_to_bytes
from .nodes import MacLayer

Span = tuple[int, int]
"""First index and count."""


@dataclasses.dataclass(frozen=True)
class InputPlane:
    """One plane of nibbles of the input: word offset, shift that its products get, nibble of real zero."""

    index: int
    shift: int
    pad: int


@dataclasses.dataclass(frozen=True)
class Term:
    """One MAC instruction of a column tile: the weights it uses, the taps and bricks it covers.

    ``offset`` counts words from the start of ``block``; ``step`` is the distance of consecutive weight tiles.
    """

    block: int
    offset: int
    step: int
    rows: Span
    cols: Span
    bricks: Span
    shift: int
    plane: InputPlane

    @property
    def passes(self) -> int:
        return self.rows[1] * self.cols[1] * self.bricks[1]


@dataclasses.dataclass(frozen=True)
class ColumnTile:
    """Output channels that are computed together: ``bricks`` from ``brick`` on, or a ``part`` of one."""

    brick: int
    bricks: int
    part: int
    terms: tuple[Term, ...]
    record_block: int
    record_offset: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks in the order of their first use."""
        return tuple(dict.fromkeys([*(t.block for t in self.terms), self.record_block]))

    @property
    def passes(self) -> int:
        return sum(t.passes for t in self.terms)


@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """Blocks as bytes (whole words) and the column tiles that use them."""

    blocks: tuple[bytes, ...]
    tiles: tuple[ColumnTile, ...]

    @property
    def passes(self) -> int:
        return sum(t.passes for t in self.tiles)


def input_planes(x: TensorType) -> tuple[InputPlane, ...]:
    """The planes of a 4- or 8-bit tensor, in the order of their words."""
    if x.bits == 4:
        return (InputPlane(0, 0, x.zero),)
    high, low = split_code8(x.zero)
    return InputPlane(0, 1, high), InputPlane(1, 0, low)


def block_limit(arch: ArchConfig) -> int:
    """Words of weights in a block, records not counted: two blocks with records fit the weight buffer."""
    return arch.weight_depth // 2 - arch.param_words


def pack_layer(layer: MacLayer, x: TensorType, y: TensorType, arch: ArchConfig) -> PackedLayer:
    """Pack a layer whose planes are split; ``x`` and ``y`` are the types of its input and output."""
    packer = _Packer(arch)
    planes = input_planes(x)
    if layer.kind == "identity":
        _pack_identity(packer, layer, planes, y.shape[0])
    else:
        _pack_dense(packer, layer, planes, y.shape[0])
    return PackedLayer(tuple(packer.blocks), tuple(packer.tiles))


def records(arch: ArchConfig, bias: IntArray, mult: IntArray, shift: IntArray) -> bytes:
    """``param_words`` words of records; columns behind the last given one get 0, whose requantization is real zero."""
    words = np.zeros(arch.columns, np.uint64)
    words[:] = 1 << BIAS_BITS + MULT_BITS  # shift 0 is no legal record
    n = len(bias)
    words[:n] = (
        (bias & (1 << BIAS_BITS) - 1) | (mult & (1 << MULT_BITS) - 1) << BIAS_BITS | shift << BIAS_BITS + MULT_BITS
    ).astype(np.uint64)
    return words.astype("<u8").tobytes().ljust(arch.param_words * arch.word_bytes, b"\0")


class _Packer:
    """Collects blocks and tiles of one layer."""

    def __init__(self, arch: ArchConfig) -> None:
        self.arch = arch
        self.blocks: list[bytes] = []
        self.tiles: list[ColumnTile] = []

    def add_block(self, data: bytes) -> int:
        self.blocks.append(data)
        return len(self.blocks) - 1

    def words(self, data: bytes | bytearray) -> int:
        return len(data) // self.arch.word_bytes


def column_tiles(channels: int, arch: ArchConfig) -> Iterator[tuple[int, int, int, int]]:
    """``(brick, bricks, part, first channel)`` of every column tile, parts without channels included."""
    count = groups(channels, arch.lanes)
    if arch.parts_per_brick > 1:
        for brick in range(count):
            for part in range(arch.parts_per_brick):
                yield brick, 1, part, brick * arch.lanes + part * arch.columns
    else:
        for brick in range(0, count, arch.bricks_per_tile):
            yield brick, min(arch.bricks_per_tile, count - brick), 0, brick * arch.lanes


def _pack_dense(packer: _Packer, layer: MacLayer, planes: tuple[InputPlane, ...], channels: int) -> None:
    arch = packer.arch
    shape = layer.planes[0].weight.shape
    kernel, bricks = (shape[2], shape[3]), groups(shape[1], arch.lanes)
    chunks = list(_chunks(kernel, bricks, arch))
    empty: tuple[int, int] | None = None
    for brick, count, part, first in column_tiles(channels, arch):
        used = slice(first, min(first + arch.columns, channels))
        if first >= channels:  # a part of the last brick that nobody asked for: one pass of zeros
            if empty is None:
                none = np.zeros(0, np.int64)
                zeros = bytes(arch.columns * arch.word_bytes)
                empty = packer.add_block(zeros + records(arch, none, none, none)), arch.columns
            term = Term(empty[0], 0, arch.columns, (0, 1), (0, 1), (0, 1), 0, planes[0])
            packer.tiles.append(ColumnTile(brick, count, part, (term,), *empty))
            continue
        terms: list[Term] = []
        block, index = bytearray(), len(packer.blocks)
        active = [p for p in layer.planes if p.weight[used].any()] or [layer.planes[-1]]
        for weight_plane in active:
            array = _tile_array(weight_plane.weight[used], arch)
            for rows, cols, span in chunks:
                data = _chunk_bytes(array, rows, cols, span)
                if packer.words(block) + packer.words(data) > block_limit(arch):
                    index = packer.add_block(bytes(block)) + 1
                    block.clear()
                for plane in planes:
                    shift = weight_plane.shift + plane.shift
                    terms.append(Term(index, packer.words(block), arch.columns, rows, cols, span, shift, plane))
                block += data
        offset = packer.words(block)
        block += records(arch, layer.bias[used], layer.mult[used], layer.shift[used])
        packer.add_block(bytes(block))
        packer.tiles.append(ColumnTile(brick, count, part, tuple(terms), index, offset))


def _chunks(kernel: tuple[int, int], bricks: int, arch: ArchConfig) -> Iterator[tuple[Span, Span, Span]]:
    """Cut the passes of a column tile into boxes of kernel rows, columns and bricks that fit a block."""
    budget = block_limit(arch) // arch.columns
    per_brick = min(bricks, budget)
    per_col = min(kernel[1], budget // per_brick) if per_brick == bricks else 1
    per_row = min(kernel[0], budget // (per_brick * per_col)) if per_col == kernel[1] else 1
    for row in range(0, kernel[0], per_row):
        for col in range(0, kernel[1], per_col):
            for brick in range(0, bricks, per_brick):
                yield (
                    (row, min(per_row, kernel[0] - row)),
                    (col, min(per_col, kernel[1] - col)),
                    (brick, min(per_brick, bricks - brick)),
                )


def _tile_array(weight: IntArray, arch: ArchConfig) -> npt.NDArray[np.int8]:
    """``(channels, in, ky, kx)`` to ``(ky, kx, brick, column, lane)``, padded with zeros."""
    channels, inputs, rows, cols = weight.shape
    bricks = groups(inputs, arch.lanes)
    full = np.zeros((arch.columns, bricks * arch.lanes, rows, cols), np.int8)
    full[:channels, :inputs] = weight
    return full.reshape(arch.columns, bricks, arch.lanes, rows, cols).transpose(3, 4, 1, 0, 2)


def _chunk_bytes(array: npt.NDArray[np.int8], rows: Span, cols: Span, bricks: Span) -> bytes:
    part = array[rows[0] : rows[0] + rows[1], cols[0] : cols[0] + cols[1], bricks[0] : bricks[0] + bricks[1]]
    return nibbles_to_bytes(np.ascontiguousarray(part)).tobytes()


def _pack_identity(packer: _Packer, layer: MacLayer, planes: tuple[InputPlane, ...], channels: int) -> None:
    """One block for all: an identity tile per brick or part of a column tile, then the records, which are all alike.

    Unused lanes hold the code of real zero in and therefore out.
    """
    arch = packer.arch
    lane, column = np.arange(arch.lanes), np.arange(arch.columns)[:, None]
    if arch.parts_per_brick > 1:
        identities = [lane == part * arch.columns + column for part in range(arch.parts_per_brick)]
    else:
        identities = [column == brick * arch.lanes + lane for brick in range(arch.bricks_per_tile)]
    data = b"".join(nibbles_to_bytes(i.astype(np.int8)).tobytes() for i in identities)
    offset = packer.words(data)
    data += records(arch, *(np.full(arch.columns, a[0]) for a in (layer.bias, layer.mult, layer.shift)))
    block = packer.add_block(data)
    for brick, count, part, _ in column_tiles(channels, arch):
        terms = [
            Term(block, (part + k) * arch.columns, 0, (0, layer.kernel[0]), (0, layer.kernel[1]), (brick + k, 1),
                 plane.shift, plane)
            for k in range(count)
            for plane in planes
        ]  # fmt: skip
        packer.tiles.append(ColumnTile(brick, count, part, tuple(terms), block, offset))
