"""From layers to operations in canonical order: residency, tiles, weight ring, bands.

The canonical order is a sequential program: executed one operation after the other it is correct. Dependencies are
derived from it (:mod:`nibblecore.compiler.emit`), and every order that keeps them is as good.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ..arch.config import ArchConfig
from ..arch.isa import INSTRUCTIONS, LOCAL_ADDR_BITS, Field, Instruction, LoadTarget, Opcode, OutputMode, Region, make
from ..errors import CompileError
from ..ir.graph import Graph
from .cost import MODE_WORDS, CostParameters
from .memory import Kind, Request, allocate, verify_allocation
from .nodes import Layer, MacLayer, PoolLayer
from .options import CompileOptions
from .pack import PackedLayer, Term, pack_layer
from .tiling import WINDOW_LIMIT, Demand, LayerPlan, Layout, Rect, input_rect, plan_layer, tensor_layout

_DEFAULTS: Final = {opcode: make(opcode).fields for opcode in Opcode}
_FIELDS: Final[dict[str, Field]] = {f.name: f for f in INSTRUCTIONS[Opcode.LOAD].fields}
_ROW_LIMIT: Final = _FIELDS["count0"].high
_ROWS_LIMIT: Final = _FIELDS["count1"].high
_POOL_BRICKS: Final = next(f.high for f in INSTRUCTIONS[Opcode.POOL].fields if f.name == "bricks")
_ADDRESSES: Final = 1 << LOCAL_ADDR_BITS


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies in DRAM, in words."""

    region: Region
    offset: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction whose activation buffer addresses are relative: ``local`` maps a field to (buffer, offset)."""

    opcode: Opcode
    fields: Mapping[str, int]
    local: Mapping[str, tuple[int, int]]
    layer: int


@dataclasses.dataclass(frozen=True)
class View:
    """A rectangle of a map in the activation buffer: map pixel ``(row, col)`` is word ``offset`` of ``buffer``."""

    buffer: int
    row: int
    col: int
    offset: int
    row_words: int
    pixel_words: int
    first_brick: int
    bricks: int

    def at(self, row: int, col: int) -> tuple[int, int]:
        """Buffer and word of a pixel, which may lie outside."""
        return self.buffer, self.offset + (row - self.row) * self.row_words + (col - self.col) * self.pixel_words


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Instructions in canonical order, without semaphores, and what they work on."""

    instructions: list[Instruction]
    layers: list[int]
    constants: bytes
    places: dict[str, Place]
    region_words: dict[Region, int]
    residents: frozenset[str]
    requests: list[Request]
    addresses: list[int]


def signed_step(words: int) -> int:
    """A step as its 16-bit field holds it: addresses are computed modulo 2**16."""
    return (words + _ADDRESSES // 2) % _ADDRESSES - _ADDRESSES // 2


class Planner:
    """Plans one lowered graph for one core. Use :func:`schedule`."""

    def __init__(self, graph: Graph, arch: ArchConfig, options: CompileOptions, cost: CostParameters) -> None:
        self.graph, self.arch, self.options, self.cost = graph, arch, options, cost
        self.layers: list[Layer] = [n for n in graph.nodes if isinstance(n, MacLayer | PoolLayer)]
        assert len(self.layers) == len(graph.nodes)
        self.packed: list[PackedLayer | None] = [
            pack_layer(n, graph.tensors[n.inputs[0]], graph.tensors[n.output], arch)
            if isinstance(n, MacLayer)
            else None
            for n in self.layers
        ]
        self.layouts = {name: tensor_layout(t.shape, t.bits, arch) for name, t in graph.tensors.items()}
        last = {name: i for i, n in enumerate(self.layers) for name in n.inputs}
        self.first_use = {name: i for i, n in reversed(list(enumerate(self.layers))) for name in n.inputs}
        self.produced = {n.output: i for i, n in enumerate(self.layers)}
        self.last_use = {name: max(last.get(name, -1), self.produced.get(name, -1)) for name in graph.tensors}
        self.residents = {
            name
            for name, layout in self.layouts.items()
            if options.keep_on_chip and layout.words <= arch.act_depth and self.last_use[name] >= 0
        }
        self.slack = [0] * len(self.layers)
        self.no_hoist: set[Unit] = set()
        self._plans: dict[tuple[int, Demand], LayerPlan | None] = {}

    # Residency -------------------------------------------------------------------------------------------------

    def live_residents(self, layer: int) -> list[str]:
        """Resident tensors that the buffer holds while ``layer`` runs."""
        begin = {name: self.produced.get(name, self.first_use.get(name, 0)) for name in self.residents}
        return sorted(name for name in self.residents if begin[name] <= layer <= self.last_use[name])

    def stored(self, name: str) -> bool:
        """Whether the layer that computes a tensor also writes it to DRAM."""
        return name not in self.residents or name in self.graph.outputs or self.options.dump_tensors

    def demand(self, index: int) -> Demand:
        layer = self.layers[index]
        used = sum(self.layouts[name].words for name in self.live_residents(index))
        add = layer.inputs[1] if len(layer.inputs) > 1 else None
        return Demand(
            x=self.layouts[layer.inputs[0]],
            y=self.layouts[layer.output],
            add=self.layouts[add] if add is not None else None,
            x_banded=layer.inputs[0] not in self.residents,
            y_banded=layer.output not in self.residents,
            y_stored=self.stored(layer.output),
            add_banded=add is not None and add not in self.residents,
            room=self.arch.act_depth - used - self.slack[index],
        )

    def plan_one(self, index: int) -> LayerPlan | None:
        """The plan of one layer beside the tensors that are resident now; None where it lacks room."""
        demand = self.demand(index)
        key = (index, demand)
        if key not in self._plans:
            self._plans[key] = None if demand.room < 0 else plan_layer(
                self.layers[index], self.packed[index], demand, self.arch, self.cost,
                prefetch=self.options.prefetch, tile_pixels=self.options.tile_pixels,
            )  # fmt: skip
        return self._plans[key]

    def plan(self) -> list[LayerPlan]:
        """A plan for every layer; spills resident tensors until all fit, then those that cost more than they save."""
        plans: list[LayerPlan] = []
        while len(plans) < len(self.layers):
            index = len(plans)
            plan = self.plan_one(index)
            if plan is not None:
                plans.append(plan)
            else:
                first = self.spill(index)
                del plans[first:]
        for name in sorted(self.residents, key=lambda name: (-self.layouts[name].words, name)):
            first = self.produced.get(name, self.first_use.get(name, 0))
            span = range(first, self.last_use[name] + 1)
            self.residents.remove(name)
            trial = [self.plan_one(index) for index in span]
            cycles = sum(p.cycles if p is not None else float("inf") for p in trial)
            if cycles < sum(plans[index].cycles for index in span):
                plans[span.start : span.stop] = [p for p in trial if p is not None]
            else:
                self.residents.add(name)
        return plans

    def spill(self, index: int) -> int:
        """Move one tensor out of the buffer that layer ``index`` lacks room in; returns the first layer affected."""
        layer = self.layers[index]
        live = self.live_residents(index)
        touched = {layer.output, *layer.inputs}
        bystanders = [name for name in live if name not in touched]
        choice = bystanders or live
        if not choice:
            raise CompileError([f"{layer.path}: {self.too_large(index)}"])
        self.slack[index] = 0
        victim = max(choice, key=lambda name: (self.layouts[name].words, name))
        self.residents.remove(victim)
        return min(self.produced.get(victim, self.first_use.get(victim, index)), index)

    def too_large(self, index: int) -> str:
        layer, depth = self.layers[index], self.arch.act_depth
        rect = [(k - 1) * d + 1 for k, d in zip(layer.kernel, layer.dilation, strict=True)]
        return (
            f"The window of one output pixel and the pixel itself fit the activation buffer. (A window of "
            f"{rect[0]}x{rect[1]} pixels of {self.layouts[layer.inputs[0]].pixel_words} words does not fit beside the "
            f"output in {depth} words. Use a smaller kernel or dilation, fewer channels, or a core with a larger "
            f"act_depth.)"
        )

    # DRAM ------------------------------------------------------------------------------------------------------

    def places(self) -> tuple[dict[str, Place], dict[Region, int]]:
        """DRAM of graph inputs and outputs, spilled and dumped tensors; words of each region."""
        align = max(1, self.arch.bus_bytes // self.arch.word_bytes)
        places: dict[str, Place] = {}
        words = {Region.INPUT: 0, Region.OUTPUT: 0, Region.SCRATCH: 0}
        for region, names in ((Region.INPUT, self.graph.inputs), (Region.OUTPUT, self.graph.outputs)):
            for name in names:
                places[name] = Place(region, words[region])
                words[region] += -(-self.layouts[name].words // align) * align
        rest = [n.output for n in self.layers if n.output not in places and self.stored(n.output)]
        forever = len(self.layers) + 1
        requests = [
            Request(
                name,
                -(-self.layouts[name].words // align),
                self.produced[name],
                forever if self.options.dump_tensors else self.last_use[name] + 1,
                soft_end=self.last_use[name] + 2,
                kind="y",
            )
            for name in rest
        ]
        depth = sum(r.words for r in requests)
        addresses, _ = allocate(requests, max(depth, 1))
        if problems := verify_allocation(requests, addresses, max(depth, 1)):
            raise AssertionError("\n".join(problems))
        for name, request, address in zip(rest, requests, addresses, strict=True):
            places[name] = Place(Region.SCRATCH, address * align)
            words[Region.SCRATCH] = max(words[Region.SCRATCH], (address + request.words) * align)
        return places, words


@dataclasses.dataclass(frozen=True)
class Group:
    """One accumulator tile: output tile and column tile of a layer (None: a pool).

    ``chunk`` numbers the part of the output channels that is in the buffer at once; the group is the first or the last
    of its tile and chunk.
    """

    layer: int
    tile: int
    column: int | None
    chunk: int
    first: bool
    last: bool

    @property
    def key(self) -> "Unit":
        return self.layer, self.tile, self.chunk


Unit = tuple[int, int, int]
"""Layer, tile and chunk: what is loaded and stored together."""


def groups_of(index: int, plan: LayerPlan, columns: int | None) -> list[Group]:
    """The groups of a layer in the order of its plan."""
    tiles = range(len(plan.tiles))
    if columns is None:
        return [Group(index, t, None, 0, True, True) for t in tiles]
    last, n = columns - 1, plan.chunk
    if plan.order == "tiles":
        return [
            Group(index, t, c, c // n, c % n == 0, c % n == n - 1 or c == last) for t in tiles for c in range(columns)
        ]
    return [Group(index, t, c, 0, c == 0, c == last) for c in range(columns) for t in tiles]


class Builder:
    """Writes the operations of all layers in canonical order."""

    def __init__(self, planner: Planner, plans: Sequence[LayerPlan]) -> None:
        self.p, self.plans, self.arch, self.graph = planner, plans, planner.arch, planner.graph
        self.places, self.region_words = planner.places()
        self.operations: list[Operation] = []
        self.buffer_names: list[str] = []
        self.buffer_words: list[int] = []
        self.buffer_kinds: list[Kind] = []
        self.buffer_origin: list[Unit] = []  # to report and to mend
        self.buffer_span: list[list[int]] = []
        self.buffer_cooldown: list[int] = []  # group until whose end the buffer is better left alone
        self.resident_views: dict[str, View] = {}
        self.loaded_rows: dict[str, int] = {}
        self.views: dict[tuple[Unit, str], View] = {}
        self.done_loads: set[Unit] = set()
        self.stored: dict[str, npt.NDArray[np.bool_]] = {}
        self.constants = bytearray()
        self.constant_at: dict[bytes, int] = {}
        self.ring = 0
        self.live_blocks: dict[tuple[int, int], int] = {}
        self.bank = 0
        self.groups: list[Group] = []
        for i, plan in enumerate(plans):
            packed = planner.packed[i]
            self.groups += groups_of(i, plan, len(packed.tiles) if packed is not None else None)
        self.hoisted = self._hoists()
        self.group_end: list[int] = []
        for g, group in enumerate(self.groups):
            self._group(g, group)
            self.group_end.append(len(self.operations))

    # Order -----------------------------------------------------------------------------------------------------

    def _hoists(self) -> dict[int, list[Group]]:
        """Group index to the tiles whose loads are issued there, ahead of their own first group."""
        result: dict[int, list[Group]] = {}
        previous = None
        for g, group in enumerate(self.groups):
            if not group.first or (group.chunk and not self._add_banded(group.layer)):
                continue
            if previous is not None and self.plans[group.layer].prefetch and group.key not in self.p.no_hoist:
                result.setdefault((previous + g) // 2, []).append(group)
            previous = g
        return result

    def _add_banded(self, index: int) -> bool:
        return any(name not in self.p.residents for name in self.p.layers[index].inputs[1:])

    def _group(self, g: int, group: Group) -> None:
        layer = self.p.layers[group.layer]
        packed = self.p.packed[group.layer]
        plan = self.plans[group.layer]
        tile = plan.tiles[group.tile]
        ahead = self.hoisted.get(g, ())
        if isinstance(layer, PoolLayer):
            self._loads(group)
            for other in ahead:
                self._loads(other, early=True)
            y = self._output_view(group, g, len(self.groups))
            self._pool(group, layer, tile, y)
        else:
            assert packed is not None
            assert group.column is not None
            column = packed.tiles[group.column]
            # Weights first: what else the tile needs may still be on its way to DRAM.
            self._load_block(group.layer, column.blocks[0], packed)
            self._loads(group)
            for other in ahead:
                self._loads(other, early=True)
            y = self._output_view(group, g, plan.chunk)
            for n, term in enumerate(column.terms):
                weights = self._load_block(group.layer, term.block, packed)
                self._mac(group, layer, tile, term, weights, accumulate=n > 0)
            records = self._load_block(group.layer, column.record_block, packed) + column.record_offset
            self._post(group, layer, tile, y, records % self.arch.weight_depth)
            self.bank ^= 1
            self._release_blocks(g, group, plan)
        if group.last and self.p.stored(layer.output):
            self._transfer(Opcode.STORE, layer.output, tile, y, group.layer)
            if packed is None or group.column == len(packed.tiles) - 1:
                self.stored[layer.output][tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols] = True

    # Buffers ---------------------------------------------------------------------------------------------------

    def _buffer(self, name: str, words: int, kind: Kind, origin: Unit, cooldown: int = -1) -> int:
        self.buffer_names.append(name)
        self.buffer_words.append(words)
        self.buffer_kinds.append(kind)
        self.buffer_origin.append(origin)
        self.buffer_span.append([-1, -1])
        self.buffer_cooldown.append(cooldown)
        return len(self.buffer_names) - 1

    def _resident(self, name: str, origin: Unit) -> View:
        if name not in self.resident_views:
            layout = self.p.layouts[name]
            buffer = self._buffer(name, layout.words, "resident", origin)
            self.resident_views[name] = View(buffer, 0, 0, 0, layout.row_words, layout.pixel_words, 0, layout.bricks)
        return self.resident_views[name]

    def _output_view(self, group: Group, g: int, tile_groups: int) -> View:
        name = self.p.layers[group.layer].output
        if self.p.stored(name) and name not in self.stored:
            layout = self.p.layouts[name]
            self.stored[name] = np.zeros((layout.height, layout.width), bool)
        if name in self.p.residents:
            return self._resident(name, group.key)
        key = (group.key, "y")
        if key not in self.views:
            until = g + 2 * tile_groups - 1 if self.p.packed[group.layer] is not None else g + 1
            self.views[key] = self._band(name, f"{name}[{group.tile}.{group.chunk}]", "y", group, until)
        return self.views[key]

    def _band(self, name: str, title: str, kind: Kind, group: Group, cooldown: int = -1) -> View:
        """A buffer for the group's chunk of output channels of its tile."""
        tile, layout = self.plans[group.layer].tiles[group.tile], self.p.layouts[name]
        first, bricks = self._chunk(group, layout)
        words = bricks * layout.brick_words
        buffer = self._buffer(title, tile.pixels * words, kind, group.key, cooldown)
        return View(buffer, tile.row, tile.col, 0, tile.cols * words, words, first, bricks)

    def _chunk(self, group: Group, layout: Layout) -> tuple[int, int]:
        """First brick and number of bricks of the group's chunk."""
        packed, plan = self.p.packed[group.layer], self.plans[group.layer]
        if packed is None or plan.chunk >= len(packed.tiles):
            return 0, layout.bricks
        first = packed.tiles[group.chunk * plan.chunk].brick
        last = packed.tiles[min((group.chunk + 1) * plan.chunk, len(packed.tiles)) - 1]
        return first, last.brick + last.bricks - first

    def _loads(self, group: Group, *, early: bool = False) -> None:
        """Bring the tile's operands into the activation buffer, unless that has happened already.

        ``early``: only if the tensors have been stored by now.
        """
        key = group.key
        if key in self.done_loads:
            return
        layer = self.p.layers[group.layer]
        tile = self.plans[group.layer].tiles[group.tile]
        operands = []
        if group.chunk == 0:
            operands.append((layer.inputs[0], input_rect(layer, tile, self.p.layouts[layer.inputs[0]]), "x"))
        if len(layer.inputs) > 1:
            operands.append((layer.inputs[1], tile, "add"))
        if early and not all(self._in_dram(name, rect) for name, rect, _ in operands):
            return
        for name, rect, kind in operands:
            if name in self.p.residents:
                self._load_resident(name, rect, key)
                continue
            title = f"{name}@{layer.output}[{group.tile}.{group.chunk}]"
            if kind == "add":
                view = self._band(name, title, "add", group)
            else:
                layout = self.p.layouts[name]
                words = layout.pixel_words
                buffer = self._buffer(title, rect.pixels * words, "x", key)
                view = View(buffer, rect.row, rect.col, 0, rect.cols * words, words, 0, layout.bricks)
            self.views[key, kind] = view
            self._transfer(Opcode.LOAD, name, rect, view, group.layer)
        self.done_loads.add(key)

    def _in_dram(self, name: str, rect: Rect) -> bool:
        if name in self.p.residents or name in self.graph.inputs:
            return True
        done = self.stored.get(name)
        if done is None:
            return False
        return bool(done[rect.row : rect.row + rect.rows, rect.col : rect.col + rect.cols].all())

    def _load_resident(self, name: str, rect: Rect, origin: Unit) -> None:
        """Graph inputs that stay in the buffer arrive as their rows are needed."""
        view = self._resident(name, origin)
        if name not in self.graph.inputs:
            return
        first, end = self.loaded_rows.get(name, 0), rect.row + rect.rows
        if end > first:
            layout = self.p.layouts[name]
            self._transfer(Opcode.LOAD, name, Rect(first, 0, end - first, layout.width), view, origin[0])
            self.loaded_rows[name] = end

    def _operand_view(self, group: Group, name: str, kind: str) -> View:
        if name in self.p.residents:
            return self.resident_views[name]
        return self.views[(group.layer, group.tile, 0 if kind == "x" else group.chunk), kind]

    # Weights ---------------------------------------------------------------------------------------------------

    def _load_block(self, layer: int, block: int, packed: PackedLayer) -> int:
        """Address of a block in the weight buffer, which it is loaded into if it is not there."""
        key = (layer, block)
        if key in self.live_blocks:
            return self.live_blocks[key]
        data = packed.blocks[block]
        words = len(data) // self.arch.word_bytes
        if not self.plans[layer].keep_weights and self.plans[layer].order == "tiles":
            self.live_blocks.clear()  # a streamed block is dead when the next one arrives
        address = self.ring
        self.ring = (self.ring + words) % self.arch.weight_depth
        self.live_blocks[key] = address
        self._check_ring()
        if data not in self.constant_at:
            self.constant_at[data] = len(self.constants) // self.arch.word_bytes
            self.constants += data
            self.constants += bytes(-len(self.constants) % max(self.arch.bus_bytes, self.arch.word_bytes))
        dram = self.constant_at[data]
        for first in range(0, words, _ROW_LIMIT):
            fields = {
                "target": LoadTarget.WEIGHTS,
                "region": Region.CONSTANTS,
                "dram_addr": dram + first,
                "local_addr": (address + first) % self.arch.weight_depth,
                "count0": min(_ROW_LIMIT, words - first),
            }
            self._operation(Opcode.LOAD, fields, {}, layer)
        return address

    def _check_ring(self) -> None:
        """Live blocks never overlap: they are loaded one behind the other and released before the ring comes round."""
        total = 0
        for layer, block in self.live_blocks:
            packed = self.p.packed[layer]
            assert packed is not None
            total += len(packed.blocks[block]) // self.arch.word_bytes
        assert total <= self.arch.weight_depth, f"{total} words of weights are live"

    def _release_blocks(self, g: int, group: Group, plan: LayerPlan) -> None:
        following = self.groups[g + 1] if g + 1 < len(self.groups) else None
        if following is not None and following.layer == group.layer:
            if plan.keep_weights:
                return
            if plan.order == "columns" and following.column == group.column:
                return
        self.live_blocks.clear()

    # Operations ------------------------------------------------------------------------------------------------

    def _operation(
        self, opcode: Opcode, fields: Mapping[str, int], local: Mapping[str, tuple[int, int]], layer: int
    ) -> None:
        position = len(self.operations)
        for buffer, _ in local.values():
            span = self.buffer_span[buffer]
            span[0] = position if span[0] < 0 else span[0]
            span[1] = position
        self.operations.append(Operation(opcode, fields, local, layer))

    def _transfer(self, opcode: Opcode, name: str, rect: Rect, view: View, layer: int) -> None:
        """Move a rectangle of a tensor between DRAM and its view in the buffer: those bricks that the view has."""
        layout, place = self.p.layouts[name], self.places[name]
        if view.bricks < layout.bricks:
            self._transfer_bricks(opcode, name, rect, view, layer)
            return
        first = place.offset + rect.row * layout.row_words + rect.col * layout.pixel_words
        buffer, local = view.at(rect.row, rect.col)
        words = rect.cols * layout.pixel_words
        target = {"target": LoadTarget.ACTIVATIONS} if opcode is Opcode.LOAD else {}
        if words == layout.row_words == view.row_words:
            runs = [(0, rect.rows * words)]
        elif words <= _ROW_LIMIT:
            for row in range(0, rect.rows, _ROWS_LIMIT):
                fields = {
                    **target,
                    "region": place.region,
                    "dram_addr": first + row * layout.row_words,
                    "count0": words,
                    "count1": min(_ROWS_LIMIT, rect.rows - row),
                    "dram_step1": layout.row_words,
                    "local_step1": signed_step(view.row_words),
                }
                self._operation(opcode, fields, {"local_addr": (buffer, local + row * view.row_words)}, layer)
            return
        else:
            runs = [(row, words) for row in range(rect.rows)]
        for row, count in runs:
            for part in range(0, count, _ROW_LIMIT):
                fields = {
                    **target,
                    "region": place.region,
                    "dram_addr": first + row * layout.row_words + part,
                    "count0": min(_ROW_LIMIT, count - part),
                }
                self._operation(opcode, fields, {"local_addr": (buffer, local + row * view.row_words + part)}, layer)

    def _transfer_bricks(self, opcode: Opcode, name: str, rect: Rect, view: View, layer: int) -> None:
        """Move some bricks of every pixel: a row per pixel, a plane per row of pixels."""
        layout, place = self.p.layouts[name], self.places[name]
        first = place.offset + rect.row * layout.row_words + rect.col * layout.pixel_words
        first += view.first_brick * layout.brick_words
        fields = {
            "region": place.region,
            "dram_addr": first,
            "count0": view.pixel_words,
            "count1": rect.cols,
            "count2": rect.rows,
            "dram_step1": layout.pixel_words,
            "dram_step2": layout.row_words,
            "local_step1": view.pixel_words,
            "local_step2": signed_step(view.row_words),
        }
        if opcode is Opcode.LOAD:
            fields["target"] = LoadTarget.ACTIVATIONS
        self._operation(opcode, fields, {"local_addr": view.at(rect.row, rect.col)}, layer)

    @staticmethod
    def _window(layer: Layer, tile: Rect, x: Layout, tap: tuple[int, int]) -> tuple[dict[str, int], tuple[int, int]]:
        """Window fields for the taps from ``tap`` on, and the map pixel of the first one."""
        row = tile.row * layer.stride[0] - layer.padding[0] + tap[0] * layer.dilation[0]
        col = tile.col * layer.stride[1] - layer.padding[1] + tap[1] * layer.dilation[1]
        # Validity is relative to the first tap that is inside the map, so that the fields stay small.
        top, left = min(max(row, 0), x.height - 1), min(max(col, 0), x.width - 1)
        fields = {
            "y0": min(row - top, 127),
            "x0": min(col - left, 127),
            "height": min(x.height - top, WINDOW_LIMIT),
            "width": min(x.width - left, WINDOW_LIMIT),
            "stride_y": layer.stride[0],
            "stride_x": layer.stride[1],
            "dilation_y": layer.dilation[0],
            "dilation_x": layer.dilation[1],
            "rows": tile.rows,
            "cols": tile.cols,
        }
        return fields, (row, col)

    def _mac(self, group: Group, layer: MacLayer, tile: Rect, term: Term, weights: int, *, accumulate: bool) -> None:
        x = self._operand_view(group, layer.inputs[0], "x")
        planes = 2 if self.graph.tensors[layer.inputs[0]].bits == 8 else 1
        window, first = self._window(layer, tile, self.p.layouts[layer.inputs[0]], (term.rows[0], term.cols[0]))
        buffer, offset = x.at(*first)
        fields = {
            **window,
            "acc_bank": self.bank,
            "accumulate": int(accumulate),
            "shift": term.shift,
            "w_addr": (weights + term.offset) % self.arch.weight_depth,
            "w_step": term.step,
            "bricks": term.bricks[1],
            "kernel_y": term.rows[1],
            "kernel_x": term.cols[1],
            "ox_step": signed_step(layer.stride[1] * x.pixel_words),
            "oy_step": signed_step(layer.stride[0] * x.row_words),
            "brick_step": planes,
            "kx_step": signed_step(layer.dilation[1] * x.pixel_words),
            "ky_step": signed_step(layer.dilation[0] * x.row_words),
            "pad": term.plane.pad,
        }
        word = offset + term.bricks[0] * planes + term.plane.index
        self._operation(Opcode.MAC, fields, {"x_addr": (buffer, word)}, group.layer)

    def _post(self, group: Group, layer: MacLayer, tile: Rect, y: View, records: int) -> None:
        packed = self.p.packed[group.layer]
        assert packed is not None
        assert group.column is not None
        column = packed.tiles[group.column]
        buffer, offset = y.at(tile.row, tile.col)
        fields = {
            "acc_bank": self.bank,
            "rows": tile.rows,
            "cols": tile.cols,
            "p_addr": records,
            "out_ox_step": y.pixel_words,
            "out_oy_step": signed_step(y.row_words),
            "mode": layer.mode,
            "bricks": column.bricks,
            "part": column.part,
        }
        local = {"out_addr": (buffer, offset + (column.brick - y.first_brick) * MODE_WORDS[layer.mode])}
        if layer.mode is not OutputMode.RAW32:
            fields |= {"zero": layer.zero, "low": layer.low, "high": layer.high}
        if layer.add is not None:
            other = self._operand_view(group, layer.inputs[1], "add")
            wide = int(self.graph.tensors[layer.inputs[1]].bits == 8)
            add_buffer, add_offset = other.at(tile.row, tile.col)
            local["add_addr"] = (add_buffer, add_offset + (column.brick - other.first_brick) * (1 + wide))
            fields |= {
                "add": 1,
                "add_wide": wide,
                "add_ox_step": other.pixel_words,
                "add_oy_step": signed_step(other.row_words),
                "k_a": layer.add.k_a,
                "k_b": layer.add.k_b,
                "add_shift": layer.add.shift,
                "zero_b": layer.add.zero_b,
                "add_zero": layer.add.zero,
                "add_low": layer.add.low,
                "add_high": layer.add.high,
            }
        self._operation(Opcode.POST, fields, local, group.layer)

    def _pool(self, group: Group, layer: PoolLayer, tile: Rect, y: View) -> None:
        x = self._operand_view(group, layer.inputs[0], "x")
        wide = int(self.graph.tensors[layer.inputs[0]].bits == 8)
        window, first = self._window(layer, tile, self.p.layouts[layer.inputs[0]], (0, 0))
        count = y.pixel_words // (1 + wide)
        for brick in range(0, count, _POOL_BRICKS):
            buffer, offset = x.at(*first)
            out_buffer, out_offset = y.at(tile.row, tile.col)
            fields = {
                **window,
                "bricks": min(_POOL_BRICKS, count - brick),
                "kernel_y": layer.kernel[0],
                "kernel_x": layer.kernel[1],
                "ox_step": layer.stride[1] * x.pixel_words,
                "oy_step": signed_step(layer.stride[0] * x.row_words),
                "kx_step": layer.dilation[1] * x.pixel_words,
                "ky_step": signed_step(layer.dilation[0] * x.row_words),
                "brick_step": 1 + wide,
                "out_ox_step": y.pixel_words,
                "out_oy_step": signed_step(y.row_words),
                "wide": wide,
            }
            word = brick * (1 + wide)
            local = {"in_addr": (buffer, offset + word), "out_addr": (out_buffer, out_offset + word)}
            self._operation(Opcode.POOL, fields, local, group.layer)

    # Result ----------------------------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        result = []
        for k, name in enumerate(self.buffer_names):
            start, last = self.buffer_span[k]
            soft = self.group_end[min(self.buffer_cooldown[k], len(self.group_end) - 1)]
            soft = soft if self.buffer_cooldown[k] >= 0 else 0
            result.append(Request(name, self.buffer_words[k], start, last + 1, soft, self.buffer_kinds[k]))
        return result

    def resolve(self, addresses: Sequence[int]) -> list[Instruction]:
        """Instructions with their final activation buffer addresses."""
        result = []
        for op in self.operations:
            local = {field: (addresses[buffer] + offset) % _ADDRESSES for field, (buffer, offset) in op.local.items()}
            fields = {**_DEFAULTS[op.opcode], **op.fields, **local}
            result.append(Instruction(op.opcode, fields))  # the linter encodes, and so checks, all of them
        return result


def schedule(graph: Graph, arch: ArchConfig, options: CompileOptions, cost: CostParameters) -> Schedule:
    """Plan a lowered graph; raises :class:`CompileError` where a layer fits no buffer.

    Where the buffer is too fragmented for the plan, banks are disregarded, then loads are issued later, then bands get
    smaller, then tensors move to DRAM, until everything has a place.
    """
    planner = Planner(graph, arch, options, cost)
    while True:
        plans = planner.plan()
        builder = Builder(planner, plans)
        requests = builder.requests()
        addresses, failed = allocate(requests, arch.act_depth, arch.act_banks)
        if failed:  # denser, without regard to banks
            dense, still = allocate(requests, arch.act_depth)
            if len(still) < len(failed):
                addresses, failed = dense, still
        if not failed:
            break
        for k in failed:
            unit = builder.buffer_origin[k]
            layer = unit[0]
            if requests[k].kind == "resident":
                planner.residents.discard(requests[k].name)
            elif unit not in planner.no_hoist and plans[layer].prefetch:
                planner.no_hoist.add(unit)
            else:
                _tighten(planner, layer)
    if problems := verify_allocation(requests, addresses, arch.act_depth):
        raise AssertionError("the planned allocation is wrong:\n" + "\n".join(problems))
    return Schedule(
        builder.resolve(addresses), [op.layer for op in builder.operations], bytes(builder.constants), builder.places,
        builder.region_words, frozenset(planner.residents), requests, addresses,
    )  # fmt: skip


def _tighten(planner: Planner, layer: int) -> None:
    """Give the layer less room than it asked for; spill a tensor when that has gone on for long."""
    step = max(1, planner.arch.act_depth // 16)
    planner.slack[layer] += step
    if planner.slack[layer] > 4 * step and planner.live_residents(layer):
        planner.spill(layer)
