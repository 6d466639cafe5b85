"""What every integer graph keeps to, checked between passes and behind every producer of graphs."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from ..arch import numerics
from ..errors import GraphError
from .graph import (
    AvgPool,
    ChannelMul,
    Concat,
    Conv,
    Flatten,
    Graph,
    Lookup,
    MaxPool,
    Node,
    ResidualAdd,
    TensorType,
    Upsample,
)


def verify(graph: Graph) -> Graph:
    """Return ``graph`` if it keeps every rule of :mod:`nibblecore.ir.graph`.

    Raises :class:`~nibblecore.errors.GraphError` with every broken rule at once, each naming tensor or node and value.
    The checks that need sound references (shapes, grids, ranges) run only where the references are sound.
    """
    violations = list(_references(graph)) or [*_tensors(graph), *_nodes(graph)]
    if violations:
        raise GraphError(violations)
    return graph


def output_size(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> int:
    """Output rows or columns of a window operator, rounded down; 0 or less where no window fits."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def accumulator_range(node: Conv, tensor: TensorType) -> tuple[Any, Any]:
    """Lowest and highest ``acc`` of each output channel over every input of codes, two int64 arrays ``(out,)``.

    Taps outside the map read the zero point, which is such a code too, so borders are included.
    """
    low, high = numerics.code_range(tensor.bits)
    flat = node.weight.reshape(node.weight.shape[0], -1)
    positive, negative = flat.clip(min=0).sum(axis=1), flat.clip(max=0).sum(axis=1)
    return positive * low + negative * high, positive * high + negative * low


# References --------------------------------------------------------------------------------------------------------


def _references(graph: Graph) -> Iterator[str]:
    for kind, names in (("input", graph.inputs), ("output", graph.outputs)):
        if not names:
            yield f"the graph has no {kind}"
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"{kind} {name} is named twice"
    known = set(graph.inputs)
    for node in graph.nodes:
        if type(node) not in _RULES:
            yield f"{node.path}: {type(node).__name__} is not a node of the integer graph"
            continue
        arity = 2 if isinstance(node, ResidualAdd | ChannelMul | Concat) else 1
        more = isinstance(node, Concat) and len(node.inputs) > arity
        if len(node.inputs) != arity and not more:
            wanted = f"{arity} tensor{'s'[: arity - 1]}{' or more' * isinstance(node, Concat)}"
            yield f"{node.path}: {type(node).__name__} reads {wanted}, not {len(node.inputs)}"
        for name in node.inputs:
            if name not in known:
                yield f"{node.path}: tensor {name} is read before any node has written it"
        if node.output in known:
            yield f"{node.path}: tensor {node.output} is written a second time"
        known.add(node.output)
    for name in graph.outputs:
        if name not in known:
            yield f"output {name} is written by no node"
    for name in sorted(known - set(graph.tensors)):
        yield f"tensor {name} has no type"
    for name in sorted(set(graph.tensors) - known):
        yield f"tensor {name} has a type, but no node writes it"


# Tensors -----------------------------------------------------------------------------------------------------------


def _tensors(graph: Graph) -> Iterator[str]:
    read = {name for node in graph.nodes for name in node.inputs}
    for name, tensor in graph.tensors.items():
        if len(tensor.shape) != 3 or any(not isinstance(n, int) or n < 1 for n in tensor.shape):
            yield f"tensor {name} must have three positive sizes, not {tensor.shape}"
        if tensor.bits not in (4, 8, 32):
            yield f"tensor {name} must have 4, 8 or 32 bits, not {tensor.bits}"
            continue
        scales = tensor.scale if isinstance(tensor.scale, tuple) else (tensor.scale,)
        if any(not math.isfinite(s) or s <= 0 for s in scales):
            yield f"tensor {name} must have positive finite scales, not {tensor.scale}"
        if isinstance(tensor.scale, tuple):
            if tensor.bits != 32:
                yield f"tensor {name} has {tensor.bits} bits and must have one scale, not {len(scales)}"
            elif len(scales) != tensor.shape[0]:
                yield f"tensor {name} must have one scale or {tensor.shape[0]}, not {len(scales)}"
        low, high = (0, 0) if tensor.bits == 32 else numerics.code_range(tensor.bits)
        if not low <= tensor.zero <= high:
            yield f"tensor {name} must have a zero point in {low}..{high}, not {tensor.zero}"
        if tensor.bits == 32:
            if name in read:
                yield f"tensor {name} has 32 bits and leaves the core, but a node reads it"
            if not isinstance(graph.producer(name), Conv):
                yield f"tensor {name} has 32 bits, but only a Conv writes such a tensor"


# Nodes -------------------------------------------------------------------------------------------------------------


def _nodes(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        operands = [graph.tensors[name] for name in node.inputs]
        for text in _RULES[type(node)](node, *operands, graph.tensors[node.output]):
            yield f"{node.path}: {text}"


def _geometry(
    x: TensorType,
    y: TensorType,
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Iterator[str]:
    for what, values, least in (
        ("kernel", kernel, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
    ):
        length = 4 if what == "padding" else 2
        if len(values) != length or any(v < least for v in values):
            yield f"{what} must be {length} integers of at least {least}, not {values}"
            return
    top, left, bottom, right = padding
    rows = output_size(x.shape[1], kernel[0], stride[0], dilation[0], top, bottom)
    cols = output_size(x.shape[2], kernel[1], stride[1], dilation[1], left, right)
    if (channels, rows, cols) != y.shape:
        yield f"its output has shape {y.shape}, but the window gives {(channels, rows, cols)}"


def _clamps(low: int, high: int, y: TensorType) -> Iterator[str]:
    lowest, highest = numerics.code_range(y.bits)
    if not lowest <= low <= high <= highest:
        yield f"low and high must be ordered and in {lowest}..{highest}, not {low} and {high}"


def _within(what: str, values: Any, low: int, high: int) -> Iterator[str]:
    least, most = int(np.min(values)), int(np.max(values))
    if least < low or most > high:
        yield f"{what} must be in {low}..{high}, not {least}..{most}"


def _record(bias: Any, mult: Any, shift: Any) -> Iterator[str]:
    for what, values, bits in (("bias", bias, numerics.BIAS_BITS), ("mult", mult, numerics.MULT_BITS)):
        yield from _within(what, values, *numerics.code_range(bits))
    yield from _within("shift", shift, numerics.SHIFT_MIN, numerics.SHIFT_MAX)


def _conv(node: Conv, x: TensorType, y: TensorType) -> Iterator[str]:
    for name in ("weight", "bias", "mult", "shift"):
        if getattr(node, name).dtype != np.int64:
            yield f"{name} must be int64, not {getattr(node, name).dtype}"
    if node.weight.ndim != 4 or node.weight.size == 0:
        yield f"weight must have shape (out, in / groups, kernel_y, kernel_x), not {node.weight.shape}"
        return
    out_channels, in_channels, kernel_y, kernel_x = node.weight.shape
    if node.groups < 1:
        yield f"groups must be at least 1, not {node.groups}"
        return
    if in_channels * node.groups != x.shape[0]:
        per_group = f" in each of {node.groups} groups" if node.groups > 1 else ""
        yield f"weight has {in_channels} input channels{per_group}, but its input {x.shape[0]}"
    if out_channels % node.groups:
        yield f"weight has {out_channels} output channels, which {node.groups} groups do not divide"
    wrong = [n for n in ("bias", "mult", "shift", "weight_scale") if getattr(node, n).shape != (out_channels,)]
    for name in wrong:
        yield f"{name} must have shape ({out_channels},), not {getattr(node, name).shape}"
    yield from _geometry(x, y, out_channels, (kernel_y, kernel_x), node.stride, node.padding, node.dilation)
    if node.weight_bits not in (4, 8):
        yield f"weight_bits must be 4 or 8, not {node.weight_bits}"
        return
    yield from _within("weight codes", node.weight, *numerics.code_range(node.weight_bits))
    if wrong:
        return
    if not (np.isfinite(node.weight_scale) & (node.weight_scale > 0)).all():
        yield "weight_scale must be positive and finite"
    yield from _record(node.bias, node.mult, node.shift)
    if y.bits != 32:
        yield from _clamps(node.low, node.high, y)
    lowest, highest = accumulator_range(node, x)
    limit_low, limit_high = numerics.code_range(numerics.BIAS_BITS)
    for channel in np.flatnonzero((lowest + node.bias < limit_low) | (highest + node.bias > limit_high))[:1]:
        yield (
            f"acc + bias of channel {channel} can be {lowest[channel] + node.bias[channel]}.."
            f"{highest[channel] + node.bias[channel]} and does not fit 32 bits"
        )


def _residual_add(node: ResidualAdd, a: TensorType, b: TensorType, y: TensorType) -> Iterator[str]:
    if not a.shape == b.shape == y.shape:
        yield f"both operands and the sum must have one shape, not {a.shape}, {b.shape} and {y.shape}"
    for name in ("k_a", "k_b"):
        yield from _within(name, getattr(node, name), *numerics.code_range(numerics.ADD_FACTOR_BITS))
    yield from _within("shift", node.shift, numerics.ADD_SHIFT_MIN, numerics.ADD_SHIFT_MAX)
    yield from _clamps(node.low, node.high, y)


def _channel_mul(node: ChannelMul, a: TensorType, b: TensorType, y: TensorType) -> Iterator[str]:
    if a.shape != y.shape:
        yield f"the first operand and the product must have one shape, not {a.shape} and {y.shape}"
    if b.shape not in (a.shape, (a.shape[0], 1, 1)):
        yield f"the second operand must have shape {a.shape} or {(a.shape[0], 1, 1)}, not {b.shape}"
    yield from _within("k", node.k, *numerics.code_range(numerics.MUL_FACTOR_BITS))
    yield from _within("shift", node.shift, numerics.MUL_SHIFT_MIN, numerics.MUL_SHIFT_MAX)
    yield from _clamps(node.low, node.high, y)


def _lookup(node: Lookup, x: TensorType, y: TensorType) -> Iterator[str]:
    if x.shape != y.shape:
        yield f"input and output must have one shape, not {x.shape} and {y.shape}"
    if x.bits != 8:
        yield f"its input must have 8 bits, not {x.bits}"
    if node.table.dtype != np.int64:
        yield f"table must be int64, not {node.table.dtype}"
    if node.table.shape != (256,):
        yield f"table must have shape (256,), not {node.table.shape}"
        return
    yield from _within("table", node.table, *numerics.code_range(y.bits))


def _concat(node: Concat, *tensors: TensorType) -> Iterator[str]:
    *parts, y = tensors
    grids = list(dict.fromkeys(_grid(t) for t in tensors))
    if len(grids) > 1:
        yield f"codes pass through, but bits, scale and zero point are {' and '.join(map(str, grids))}"
    sizes = {t.shape[1:] for t in parts}
    if len(sizes) > 1:
        shown = " and ".join(f"{rows}x{cols}" for rows, cols in sorted(sizes))
        yield f"its inputs must have the same rows and columns, not {shown}"
        return
    shape = (sum(t.shape[0] for t in parts), *parts[0].shape[1:])
    if y.shape != shape:
        yield f"its output must have shape {shape}, not {y.shape}"


def _upsample(node: Upsample, x: TensorType, y: TensorType) -> Iterator[str]:
    yield from _same_grid(x, y)
    if len(node.factor) != 2 or any(f < 1 for f in node.factor):
        yield f"factor must be 2 integers of at least 1, not {node.factor}"
        return
    shape = (x.shape[0], x.shape[1] * node.factor[0], x.shape[2] * node.factor[1])
    if y.shape != shape:
        yield f"its output must have shape {shape}, not {y.shape}"


def _max_pool(node: MaxPool, x: TensorType, y: TensorType) -> Iterator[str]:
    yield from _same_grid(x, y)
    yield from _geometry(x, y, x.shape[0], node.kernel, node.stride, node.padding, node.dilation)
    spans = [d * (k - 1) + 1 for k, d in zip(node.kernel, node.dilation, strict=True)]
    if any(p >= s for p, s in zip(node.padding, spans * 2, strict=True)):
        yield f"padding {node.padding} must be smaller than the window of {spans[0]}x{spans[1]}"


def _avg_pool(node: AvgPool, x: TensorType, y: TensorType) -> Iterator[str]:
    yield from _geometry(x, y, x.shape[0], node.kernel, node.stride, node.padding, (1, 1))
    yield from _record(node.bias, node.mult, node.shift)
    yield from _clamps(node.low, node.high, y)
    low, high = (c * node.kernel[0] * node.kernel[1] + node.bias for c in numerics.code_range(x.bits))
    if not (numerics.signed_fits(low, numerics.BIAS_BITS) and numerics.signed_fits(high, numerics.BIAS_BITS)):
        yield f"sum + bias can be {low}..{high} and does not fit 32 bits"


def _flatten(node: Flatten, x: TensorType, y: TensorType) -> Iterator[str]:
    yield from _same_grid(x, y)
    if y.shape != (math.prod(x.shape), 1, 1):
        yield f"its output must have shape {(math.prod(x.shape), 1, 1)}, not {y.shape}"


def _same_grid(x: TensorType, y: TensorType) -> Iterator[str]:
    if _grid(x) != _grid(y):
        yield f"codes pass through, but bits, scale and zero point change from {_grid(x)} to {_grid(y)}"


def _grid(tensor: TensorType) -> tuple[int, float | tuple[float, ...], int]:
    return tensor.bits, tensor.scale, tensor.zero


_RULES: Final[dict[type[Node], Callable[..., Iterator[str]]]] = {
    Conv: _conv,
    ResidualAdd: _residual_add,
    ChannelMul: _channel_mul,
    Lookup: _lookup,
    MaxPool: _max_pool,
    AvgPool: _avg_pool,
    Concat: _concat,
    Upsample: _upsample,
    Flatten: _flatten,
}
