"""Output tiles of a layer: which rectangle of pixels is computed at once, and what of it lies in the activation buffer.

A tensor is *resident* (whole in the activation buffer) or *banded*: it lies in DRAM, and only the rectangle that the
current tile needs is in the buffer. The tile with the least estimated cycles wins.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from ..arch.config import ArchConfig
from ..arch.isa import INSTRUCTIONS, Opcode
from ..arch.numerics import clamp
from ..runtime.layout import groups, planes
from .cost import CostParameters, drain_cycles, pass_cycles, transfer_cycles
from .nodes import Layer, MacLayer
from .pack import PackedLayer

WINDOW_LIMIT = next(f.high for f in INSTRUCTIONS[Opcode.MAC].fields if f.name == "width")
"""Rows and columns of the rectangle that an instruction can see."""

TILE_LIMIT = next(f.high for f in INSTRUCTIONS[Opcode.POOL].fields if f.name == "cols")
"""Rows and columns of a tile."""


@dataclasses.dataclass(frozen=True)
class Rect:
    """A rectangle of pixels of a map."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def pixels(self) -> int:
        return self.rows * self.cols


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor's words lie, in DRAM or whole in the buffer: pixel after pixel, row after row."""

    height: int
    width: int
    pixel_words: int

    @property
    def row_words(self) -> int:
        return self.width * self.pixel_words

    @property
    def words(self) -> int:
        return self.height * self.row_words


def tensor_layout(shape: tuple[int, int, int], bits: int, arch: ArchConfig) -> Layout:
    channels, height, width = shape
    return Layout(height, width, groups(channels, arch.lanes) * planes(bits))


def input_rect(layer: Layer, tile: Rect, x: Layout) -> Rect:
    """The rectangle of the input map that an output tile reads."""
    row, rows = _axis(tile.row, tile.rows, layer, 0, x.height)
    col, cols = _axis(tile.col, tile.cols, layer, 1, x.width)
    return Rect(row, col, rows, cols)


def _axis(first: int, count: int, layer: Layer, axis: int, size: int) -> tuple[int, int]:
    start = first * layer.stride[axis] - layer.padding[axis]
    end = start + (count - 1) * layer.stride[axis] + (layer.kernel[axis] - 1) * layer.dilation[axis] + 1
    low, high = clamp(start, 0, size - 1), clamp(end, 1, size)
    return low, max(1, high - low)


@dataclasses.dataclass(frozen=True)
class Demand:
    """What of a layer passes through the activation buffer in bands, and how much room there is for them."""

    x: Layout
    y: Layout
    add: Layout | None
    x_banded: bool
    y_banded: bool
    y_stored: bool
    add_banded: bool
    room: int


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How a layer is executed.

    Parameters
    ----------
    tiles : tuple[Rect, ...]
        Output tiles in order.
    order : {"tiles", "columns"}
        Outer loop: over output tiles, or over column tiles (where everything is resident and weights are not).
    keep_weights : bool
        Every block of weights stays in the weight buffer for the whole layer.
    prefetch : bool
        There is room for the bands of two tiles.
    cycles : float
        Estimated.
    """

    tiles: tuple[Rect, ...]
    order: Literal["tiles", "columns"]
    keep_weights: bool
    prefetch: bool
    cycles: float


def _interior(layer: Layer, rows: int, cols: int, x: Layout) -> tuple[int, int]:
    """Largest input rectangle of any tile of that size."""
    span = [
        (n - 1) * layer.stride[a] + (layer.kernel[a] - 1) * layer.dilation[a] + 1 for a, n in enumerate((rows, cols))
    ]
    return min(span[0], x.height), min(span[1], x.width)


def tile_words(layer: Layer, rows: int, cols: int, demand: Demand) -> int:
    """Most words of the activation buffer that the bands of any tile of that size take."""
    in_rows, in_cols = _interior(layer, rows, cols, demand.x)
    words = demand.x_banded * in_rows * in_cols * demand.x.pixel_words
    words += demand.y_banded * rows * cols * demand.y.pixel_words
    if demand.add is not None:
        words += demand.add_banded * rows * cols * demand.add.pixel_words
    return words


def _sizes(total: int, limit: int) -> Iterator[int]:
    """Tile sizes worth trying: for each number of tiles the smallest size, largest first."""
    last = 0
    count = -(-total // limit)
    while count <= total:
        size = -(-total // count)
        if size != last:
            yield size
        last = size
        if size == 1:
            return
        count = max(count + 1, -(-total // size))


def plan_layer(
    layer: Layer,
    packed: PackedLayer | None,
    demand: Demand,
    arch: ArchConfig,
    cost: CostParameters,
    *,
    prefetch: bool = True,
    tile_pixels: int | None = None,
) -> LayerPlan | None:
    """The cheapest plan, or None where not even the smallest tile fits ``demand.room``."""
    y = demand.y
    limit = min(arch.acc_depth if packed is not None else TILE_LIMIT * TILE_LIMIT, tile_pixels or 1 << 30)
    best: tuple[float, int, int, bool] | None = None
    model = _Model(layer, packed, demand, arch, cost)
    for cols in _sizes(y.width, min(TILE_LIMIT, limit)):
        if _interior(layer, 1, cols, demand.x)[1] > WINDOW_LIMIT:
            continue
        for rows in _sizes(y.height, min(TILE_LIMIT, limit // cols)):
            words = tile_words(layer, rows, cols, demand)
            if words > demand.room or _interior(layer, rows, cols, demand.x)[0] > WINDOW_LIMIT:
                continue
            double = prefetch and 2 * words <= demand.room
            cycles = model.cycles(rows, cols, double)
            if best is None or cycles < best[0]:
                best = (cycles, rows, cols, double)
    if best is None:
        return None
    cycles, rows, cols, double = best
    tiles = tuple(
        Rect(r, c, min(rows, y.height - r), min(cols, y.width - c))
        for r in range(0, y.height, rows)
        for c in range(0, y.width, cols)
    )
    return LayerPlan(tiles, model.order, model.keep_weights, double, cycles)


def _latency(cost: CostParameters) -> int:
    return cost.load_start + cost.read_latency


class _Model:
    """Estimated cycles of a layer as a function of the tile size."""

    def __init__(
        self, layer: Layer, packed: PackedLayer | None, demand: Demand, arch: ArchConfig, cost: CostParameters
    ) -> None:
        self.layer, self.packed, self.demand, self.arch, self.cost = layer, packed, demand, arch, cost
        banded = demand.x_banded or demand.y_banded or demand.add_banded
        self.weight_words = sum(len(b) for b in packed.blocks) // arch.word_bytes if packed else 0
        self.keep_weights = self.weight_words <= arch.weight_depth
        tile_blocks = 0
        if packed is not None:
            tile_blocks = max(sum(len(packed.blocks[b]) for b in t.blocks) for t in packed.tiles) // arch.word_bytes
        fits = 2 * tile_blocks <= arch.weight_depth
        self.order: Literal["tiles", "columns"] = (
            "columns" if not banded and not self.keep_weights and fits else "tiles"
        )

    def cycles(self, rows: int, cols: int, double: bool) -> float:
        d, arch, cost, layer = self.demand, self.arch, self.cost, self.layer
        count = -(-d.y.height // rows) * -(-d.y.width // cols)
        pixels = rows * cols
        in_rows, in_cols = _interior(layer, rows, cols, d.x)
        x_words, row_words = in_rows * in_cols * d.x.pixel_words, in_cols * d.x.pixel_words
        load = store = 0
        if d.x_banded:
            whole = in_cols == d.x.width
            load += _latency(cost) + transfer_cycles(arch, 1 if whole else in_rows, x_words if whole else row_words)
        out_words = pixels * d.y.pixel_words
        if d.add_banded and d.add is not None:
            load += _latency(cost) + transfer_cycles(arch, 1, pixels * d.add.pixel_words)
        if d.y_stored:
            whole = cols == d.y.width
            rows_moved = 1 if whole else rows
            store = cost.write_latency + transfer_cycles(arch, rows_moved, out_words // rows_moved)
        if self.packed is None:
            words = pixels * d.x.pixel_words
            busy = words * layer.kernel[0] * layer.kernel[1] + cost.pool_overhead
            steady, tail = self._combine(busy, load, store, double), store
            return count * steady + load + tail
        tiles = self.packed.tiles
        assert isinstance(layer, MacLayer)
        mac = sum(t.passes for t in tiles) * pass_cycles(arch, pixels, cost)
        add_words = 0 if layer.add is None or d.add is None else d.add.pixel_words // max(1, self._groups())
        last = drain_cycles(arch, pixels, tiles[-1].bricks, layer.mode, add_words)
        post = sum(drain_cycles(arch, pixels, t.bricks, layer.mode, add_words) for t in tiles)
        post += len(tiles) * (cost.post_start + cost.post_end + arch.param_words)
        reloads = 1 if self.keep_weights or self.order == "columns" else count
        blocks = len(self.packed.blocks)
        weights = transfer_cycles(arch, 1, self.weight_words) + blocks * _latency(cost)
        terms = sum(len(t.terms) for t in tiles)
        fetch = (terms + len(tiles) + 2) * 8  # instructions share the bus with the loads
        steady = self._combine(max(mac, post), load + weights * reloads / count + fetch, store, double)
        first = load + transfer_cycles(arch, 1, self.weight_words // max(1, len(tiles)))
        return count * steady + first + last + store + cost.post_start + cost.post_end

    def _groups(self) -> int:
        return self.packed.tiles[-1].brick + self.packed.tiles[-1].bricks if self.packed else 1

    @staticmethod
    def _combine(compute: float, load: float, store: float, double: bool) -> float:
        """Cycles per tile: the longest of all that overlaps, and a little of the rest, for what the model omits."""
        total = compute + load + store
        return 0.95 * max(compute, load, store) + 0.05 * total if double else total
