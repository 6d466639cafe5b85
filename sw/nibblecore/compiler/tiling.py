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
from .cost import CostParameters, drain_cycles, mac_gap, pass_cycles, transfer_cycles
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
    bricks: int
    brick_words: int

    @property
    def pixel_words(self) -> int:
        return self.bricks * self.brick_words

    @property
    def row_words(self) -> int:
        return self.width * self.pixel_words

    @property
    def words(self) -> int:
        return self.height * self.row_words


def tensor_layout(shape: tuple[int, int, int], bits: int, arch: ArchConfig) -> Layout:
    channels, height, width = shape
    return Layout(height, width, groups(channels, arch.lanes), planes(bits))


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
    chunk : int
        Column tiles whose output (and stored operand) is in the buffer at once, where it is banded.
    keep_weights : bool
        Every block of weights stays in the weight buffer for the whole layer.
    prefetch : bool
        There is room for the bands of two tiles.
    cycles : float
        Estimated.
    """

    tiles: tuple[Rect, ...]
    order: Literal["tiles", "columns"]
    chunk: int
    keep_weights: bool
    prefetch: bool
    cycles: float


def _interior(layer: Layer, rows: int, cols: int, x: Layout) -> tuple[int, int]:
    """Largest input rectangle of any tile of that size."""
    span = [
        (n - 1) * layer.stride[a] + (layer.kernel[a] - 1) * layer.dilation[a] + 1 for a, n in enumerate((rows, cols))
    ]
    return min(span[0], x.height), min(span[1], x.width)


def tile_words(layer: Layer, rows: int, cols: int, demand: Demand, bricks: int) -> tuple[int, int]:
    """Most words of the activation buffer that any tile of that size takes: its input, and ``bricks`` output bricks."""
    in_rows, in_cols = _interior(layer, rows, cols, demand.x)
    x_words = demand.x_banded * in_rows * in_cols * demand.x.pixel_words
    words = demand.y_banded * demand.y.brick_words
    if demand.add is not None:
        words += demand.add_banded * demand.add.brick_words
    return x_words, rows * cols * words * min(bricks, demand.y.bricks)


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
    best: tuple[float, int, int, int, bool] | None = None
    model = _Model(layer, packed, demand, arch, cost)
    columns = len(packed.tiles) if packed is not None else 1
    for cols in _sizes(y.width, min(TILE_LIMIT, limit)):
        if _interior(layer, 1, cols, demand.x)[1] > WINDOW_LIMIT:
            continue
        for rows in _sizes(y.height, min(TILE_LIMIT, limit // cols)):
            if _interior(layer, rows, cols, demand.x)[0] > WINDOW_LIMIT:
                continue
            several = rows < y.height or cols < y.width
            for chunk in _chunks(columns, demand, arch):
                bricks = chunk_bricks(chunk, columns, demand, arch)
                x_words, out_words = tile_words(layer, rows, cols, demand, bricks)
                if x_words + out_words > demand.room:
                    continue
                double = prefetch and (1 + several) * x_words + 2 * out_words <= demand.room
                cycles = model.cycles(rows, cols, double, bricks)
                if best is None or cycles < best[0]:
                    best = (cycles, rows, cols, chunk, double)
    if best is None:
        return None
    cycles, rows, cols, chunk, double = best
    tiles = tuple(
        Rect(r, c, min(rows, y.height - r), min(cols, y.width - c))
        for r in range(0, y.height, rows)
        for c in range(0, y.width, cols)
    )
    return LayerPlan(tiles, model.order, chunk, model.keep_weights, double, cycles)


def _chunks(columns: int, demand: Demand, arch: ArchConfig) -> Iterator[int]:
    """Numbers of column tiles worth holding at once: all, or fewer in whole bricks while rows stay worth a burst."""
    yield columns
    if not (demand.y_banded or demand.add_banded):
        return
    last = columns
    for share in (2, 4, 8):
        chunk = -(-columns // (share * arch.parts_per_brick)) * arch.parts_per_brick
        if chunk >= last or chunk_bricks(chunk, columns, demand, arch) < 4:
            continue
        yield chunk
        last = chunk


def chunk_bricks(chunk: int, columns: int, demand: Demand, arch: ArchConfig) -> int:
    """Output bricks of ``chunk`` of the layer's ``columns`` column tiles; all for a pool."""
    if chunk >= columns:
        return demand.y.bricks
    return min(demand.y.bricks, chunk // arch.parts_per_brick * arch.bricks_per_tile)


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
        self.terms = sum(len(t.terms) for t in packed.tiles) if packed else 0
        tile_blocks = 0
        if packed is not None:
            tile_blocks = max(sum(len(packed.blocks[b]) for b in t.blocks) for t in packed.tiles) // arch.word_bytes
        fits = 2 * tile_blocks <= arch.weight_depth
        self.order: Literal["tiles", "columns"] = (
            "columns" if not banded and not self.keep_weights and fits else "tiles"
        )

    def cycles(self, rows: int, cols: int, double: bool, bricks: int) -> float:
        """Estimate for tiles of ``rows x cols``, ``bricks`` output bricks at once."""
        d, arch, cost, layer = self.demand, self.arch, self.cost, self.layer
        count = -(-d.y.height // rows) * -(-d.y.width // cols)
        pixels = rows * cols
        parts = -(-d.y.bricks // bricks)
        in_rows, in_cols = _interior(layer, rows, cols, d.x)
        load = store = 0
        if d.x_banded:
            load += _latency(cost) + self._transfer(in_rows, in_cols, d.x, d.x.bricks)
        if d.add_banded and d.add is not None:
            load += parts * (_latency(cost) + self._transfer(rows, cols, d.add, bricks))
        if d.y_stored:
            store = parts * (cost.write_latency + self._transfer(rows, cols, d.y, bricks))
        if self.packed is None:
            words = pixels * d.x.pixel_words
            busy = words * layer.kernel[0] * layer.kernel[1] + cost.pool_overhead
            return count * self._combine(busy, load, store, double) + load + store
        tiles = self.packed.tiles
        assert isinstance(layer, MacLayer)
        mac = self.packed.passes * self._passes(rows, cols) / count + self.terms * mac_gap(arch, cost)
        add_words = d.add.brick_words if d.add is not None else 0
        last = drain_cycles(arch, pixels, tiles[-1].bricks, layer.mode, add_words)
        post = drain_cycles(arch, pixels, sum(t.bricks for t in tiles), layer.mode, add_words)
        post += len(tiles) * (cost.post_start + cost.post_end + arch.param_words)
        reloads = 1 if self.keep_weights or self.order == "columns" else count
        weights = transfer_cycles(arch, 1, self.weight_words) + len(self.packed.blocks) * cost.burst_interval
        fetch = (self.terms + len(tiles) + 2) * 4  # instructions share the bus with the loads
        steady = self._combine(max(mac, post), load + weights * reloads / count + fetch, store, double)
        first = load + transfer_cycles(arch, 1, self.weight_words // len(tiles))
        return count * steady + first + last + store + cost.post_start + cost.post_end

    def _passes(self, rows: int, cols: int) -> int:
        """Cycles of one pass over all tiles, smaller ones at the edges included."""
        edges = []
        for total, size in ((self.demand.y.height, rows), (self.demand.y.width, cols)):
            edges.append([(size, total // size), (total % size, 1)] if total % size else [(size, total // size)])
        return sum(m * n * pass_cycles(self.arch, r * c, self.cost) for r, m in edges[0] for c, n in edges[1])

    def _transfer(self, rows: int, cols: int, layout: Layout, bricks: int) -> int:
        """Data cycles of a rectangle of which ``bricks`` per pixel move."""
        if bricks < layout.bricks:
            return transfer_cycles(self.arch, rows * cols, bricks * layout.brick_words, self.cost)
        if cols < layout.width:
            return transfer_cycles(self.arch, rows, cols * layout.pixel_words, self.cost)
        return transfer_cycles(self.arch, 1, rows * cols * layout.pixel_words, self.cost)

    @staticmethod
    def _combine(compute: float, load: float, store: float, double: bool) -> float:
        """Cycles per tile: the longest of all that overlaps, and a little of the rest, for what the model omits."""
        total = compute + load + store
        return 0.95 * max(compute, load, store) + 0.05 * total if double else total
