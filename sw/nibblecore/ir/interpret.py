"""The integer-graph interpreter: layer by layer, in numpy, exactly the arithmetic of :mod:`nibblecore.arch.numerics`.

Program-level results (golden model, RTL, boards) are compared with it for equality. With another ``requantization`` it
is what other systems would compute.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..arch import numerics
from . import requantization as rules
from .graph import (
    AvgPool,
    ChannelMul,
    Concat,
    Conv,
    Flatten,
    Graph,
    IntArray,
    Lookup,
    MaxPool,
    Node,
    ResidualAdd,
    TensorType,
    Upsample,
)

_COLUMN_BYTES: Final = 64 << 20
"""Memory that the unfolded windows of one block of output rows may take."""


def run(
    graph: Graph, inputs: dict[str, Any], keep: bool = False, *, requantization: str = rules.NIBBLECORE
) -> dict[str, IntArray]:
    """Execute ``graph`` on a batch of images.

    Parameters
    ----------
    graph : Graph
        Should have passed :func:`nibblecore.ir.verify.verify`.
    inputs : dict[str, integer array]
        Stored codes of shape ``(N, C, H, W)`` for every input of the graph and nothing else.
    keep : bool
        Return every tensor, inputs and intermediate ones included, not the outputs only.
    requantization : str
        One of :data:`nibblecore.ir.requantization.MODES`. Others than the core's own derive their multipliers from the
        scales of the graph; lookup tables stay.

    Returns
    -------
    dict[str, int64 array]
        Tensor name to stored codes ``(N, C, H, W)``; ``acc + bias`` for 32-bit tensors.

    Raises
    ------
    TypeError, ValueError
        Inputs that are missing, unknown, not integers, of the wrong shape or out of their code range; with another
        requantization, multipliers that are not those of the scales.
    OverflowError
        ``acc + bias`` of a layer does not fit 32 bits, or not another system's registers.
    """
    execute = executors(requantization)
    tensors = _check_inputs(graph, inputs)
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    for index, node in enumerate(graph.nodes):
        operands = [tensors[name] for name in node.inputs]
        tensors[node.output] = execute[type(node)](graph, node, *operands)
        if not keep:
            for name in set(node.inputs) - set(graph.outputs):
                if last_use[name] == index:
                    del tensors[name]
    return tensors if keep else {name: tensors[name] for name in graph.outputs}


def _check_inputs(graph: Graph, inputs: dict[str, Any]) -> dict[str, IntArray]:
    if set(inputs) != set(graph.inputs):
        raise ValueError(f"the graph's inputs are {', '.join(graph.inputs)}, not {', '.join(inputs) or 'none'}")
    result: dict[str, IntArray] = {}
    for name in graph.inputs:
        codes, tensor = np.asarray(inputs[name]), graph.tensors[name]
        if not np.issubdtype(codes.dtype, np.integer):
            raise TypeError(f"input {name} must hold integer codes, not {codes.dtype}")
        if codes.ndim != 4 or codes.shape[1:] != tensor.shape:
            raise ValueError(
                f"input {name} must have shape (N, {', '.join(map(str, tensor.shape))}), not {codes.shape}"
            )
        low, high = numerics.code_range(tensor.bits)
        if codes.size and not low <= int(codes.min()) <= int(codes.max()) <= high:
            raise ValueError(f"input {name} has codes {codes.min()}..{codes.max()}, outside {low}..{high}")
        result[name] = codes.astype(np.int64)
    if len({codes.shape[0] for codes in result.values()}) > 1:
        raise ValueError("all inputs must have the same number of images")
    return result


def windows(
    x: IntArray,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    fill: int,
) -> IntArray:
    """Every window of ``x`` (``N, C, H, W``) as a read-only view of shape ``(N, C, OH, OW, KH, KW)``.

    Taps outside the map read ``fill``; ``padding`` is top, left, bottom, right.
    """
    top, left, bottom, right = padding
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    span = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(2, 3))
    return view[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def _float_for(taps: int, x_bits: int, weight: IntArray) -> type[np.floating[Any]]:
    """The float type whose matrix product is exact: every partial sum is an integer below its mantissa's range.

    BLAS multiplies floats an order of magnitude faster than numpy multiplies integers.
    """
    largest = taps << x_bits - 1
    bound = largest * int(np.abs(weight).max(initial=0))
    if bound <= 1 << 24:
        return np.float32
    assert bound <= 1 << 53, "a sum of more than 2**53 needs 2**38 taps of 8-bit products"
    return np.float64


def _accumulate(node: Conv, x: IntArray, tensor: TensorType) -> IntArray:
    """``acc`` of every output, shape ``(N, out, OH, OW)``."""
    out_channels, in_channels, kernel_y, kernel_x = node.weight.shape
    groups = node.groups
    taps = in_channels * kernel_y * kernel_x
    dtype = _float_for(taps, tensor.bits, node.weight)
    view = windows(
        x,
        kernel=(kernel_y, kernel_x),
        stride=node.stride,
        padding=node.padding,
        dilation=node.dilation,
        fill=tensor.zero,
    )
    batch, _, rows, cols = view.shape[:4]
    view = view.reshape(batch, groups, in_channels, *view.shape[2:])
    # One product of matrices per group: (windows, taps) times (taps, outputs).
    matrix: npt.NDArray[Any] = node.weight.reshape(groups, -1, taps).transpose(0, 2, 1).astype(dtype)
    acc = np.empty((batch, groups, out_channels // groups, rows, cols), dtype=np.int64)
    block = max(1, _COLUMN_BYTES // max(1, batch * cols * groups * taps * np.dtype(dtype).itemsize))
    for row in range(0, rows, block):
        part = view[:, :, :, row : row + block].transpose(1, 0, 3, 4, 2, 5, 6).astype(dtype)
        sums = part.reshape(groups, -1, taps) @ matrix
        acc[:, :, :, row : row + block] = sums.reshape(groups, batch, -1, cols, acc.shape[2]).transpose(1, 0, 4, 2, 3)
    return acc.reshape(batch, out_channels, rows, cols)


def _check_fits(node: Node, total: IntArray) -> None:
    if total.size and not (
        numerics.signed_fits(int(total.min()), numerics.BIAS_BITS)
        and numerics.signed_fits(int(total.max()), numerics.BIAS_BITS)
    ):
        raise OverflowError(f"{node.path}: acc + bias is {total.min()}..{total.max()} and does not fit 32 bits")


def _conv(graph: Graph, node: Conv, x: IntArray, rule: rules.Requantization | None = None) -> IntArray:
    output = graph.tensors[node.output]
    acc = _accumulate(node, x, graph.tensors[node.inputs[0]])
    bias, mult, shift = (a[:, None, None] for a in (node.bias, node.mult, node.shift))
    _check_fits(node, acc + bias)
    if output.bits == 32:
        return acc + bias
    codes = numerics.requantize(acc, bias, mult, shift) if rule is None else rules.conv(rule, graph, node, acc + bias)
    return numerics.clamp(codes + output.zero, node.low, node.high)


def _residual_add(
    graph: Graph, node: ResidualAdd, a: IntArray, b: IntArray, rule: rules.Requantization | None = None
) -> IntArray:
    if rule is not None:
        codes = rules.residual_add(rule, graph, node, a, b)
        return numerics.clamp(codes + graph.tensors[node.output].zero, node.low, node.high)
    type_a, type_b = (graph.tensors[name] for name in node.inputs)
    return numerics.residual_add(
        a,
        b,
        zero_a=type_a.zero,
        zero_b=type_b.zero,
        k_a=node.k_a,
        k_b=node.k_b,
        n=node.shift,
        zero=graph.tensors[node.output].zero,
        low=node.low,
        high=node.high,
    )


def _channel_mul(
    graph: Graph, node: ChannelMul, a: IntArray, b: IntArray, rule: rules.Requantization | None = None
) -> IntArray:
    if rule is not None:
        codes = rules.channel_mul(rule, graph, node, a, b)
        return numerics.clamp(codes + graph.tensors[node.output].zero, node.low, node.high)
    type_a, type_b = (graph.tensors[name] for name in node.inputs)
    return numerics.channel_mul(
        a,
        b,
        zero_a=type_a.zero,
        zero_b=type_b.zero,
        k=node.k,
        n=node.shift,
        zero=graph.tensors[node.output].zero,
        low=node.low,
        high=node.high,
    )


def _lookup(graph: Graph, node: Lookup, x: IntArray) -> IntArray:
    return node.table[x + 128]


def _concat(graph: Graph, node: Concat, *parts: IntArray) -> IntArray:
    return np.concatenate(parts, axis=1)


def _upsample(graph: Graph, node: Upsample, x: IntArray) -> IntArray:
    return x.repeat(node.factor[0], axis=2).repeat(node.factor[1], axis=3)


def _max_pool(graph: Graph, node: MaxPool, x: IntArray) -> IntArray:
    lowest, _ = numerics.code_range(graph.tensors[node.inputs[0]].bits)
    view = windows(x, kernel=node.kernel, stride=node.stride, padding=node.padding, dilation=node.dilation, fill=lowest)
    return view.max(axis=(4, 5))


def _avg_pool(graph: Graph, node: AvgPool, x: IntArray, rule: rules.Requantization | None = None) -> IntArray:
    zero = graph.tensors[node.inputs[0]].zero
    view = windows(x, kernel=node.kernel, stride=node.stride, padding=node.padding, fill=zero)
    total = view.sum(axis=(4, 5), dtype=np.int64)
    _check_fits(node, total + node.bias)
    if rule is None:
        codes = numerics.requantize(total, node.bias, node.mult, node.shift)
    else:
        codes = rules.avg_pool(rule, graph, node, total + node.bias)
    return numerics.clamp(codes + graph.tensors[node.output].zero, node.low, node.high)


def _flatten(graph: Graph, node: Flatten, x: IntArray) -> IntArray:
    return x.reshape(x.shape[0], *graph.tensors[node.output].shape)


_EXECUTE: Final[dict[type[Node], Callable[..., IntArray]]] = {
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
REQUANTIZE: Final = (Conv, ResidualAdd, ChannelMul, AvgPool)
"""Kinds of nodes that requantize."""


def executors(requantization: str) -> dict[type[Node], Callable[..., IntArray]]:
    """What executes a node of each kind, from graph, node and the codes that it reads; see :func:`run`."""
    rule = rules.requantization(requantization)
    if rule is None:
        return _EXECUTE
    return _EXECUTE | {kind: functools.partial(_EXECUTE[kind], rule=rule) for kind in REQUANTIZE}
