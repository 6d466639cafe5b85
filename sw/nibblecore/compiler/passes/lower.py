"""Lower the nodes of the integer graph to layers of the core."""

from collections.abc import Callable

import numpy as np

from ...arch.isa import OutputMode
from ...arch.numerics import code_range
from ...ir.graph import AvgPool, Conv, Graph, MaxPool, Node, ResidualAdd
from ..nodes import FusedAdd, MacLayer, PoolLayer


def output_mode(bits: int) -> OutputMode:
    """How POST writes a tensor of 4, 8 or 32 bits."""
    return {4: OutputMode.INT4, 8: OutputMode.INT8, 32: OutputMode.RAW32}[bits]


def lower(graph: Graph) -> Graph:
    """Replace convolutions, pools and additions by :class:`MacLayer` and :class:`PoolLayer`, one for one.

    Average pools become sums with weights 1 (identity tiles). Additions become a 1x1 sum of their first operand that
    reproduces its code exactly, with the addition fused behind it; ``fuse_add`` then removes the sum where a
    convolution can take its place.
    """
    lowering: dict[type[Node], Callable[..., Node]] = {
        Conv: _conv,
        AvgPool: _avg_pool,
        ResidualAdd: _residual_add,
        MaxPool: _max_pool,
    }
    return graph.replace(nodes=tuple(lowering[type(n)](graph, n) if type(n) in lowering else n for n in graph.nodes))


def _conv(graph: Graph, node: Conv) -> Node:
    assert node.groups == 1, "check_supported refuses groups"
    y = graph.tensors[node.output]
    return MacLayer(
        node.output, node.inputs, node.path, op="Conv", kind="dense",
        kernel=(node.weight.shape[2], node.weight.shape[3]), stride=node.stride, padding=node.padding,
        dilation=node.dilation, weight=node.weight, weight_bits=node.weight_bits, planes=(), bias=node.bias,
        mult=node.mult, shift=node.shift, zero=y.zero, low=node.low, high=node.high, mode=output_mode(y.bits),
    )  # fmt: skip


def _avg_pool(graph: Graph, node: AvgPool) -> Node:
    y = graph.tensors[node.output]
    channels = y.shape[0]
    bias, mult, shift = (np.full(channels, v, np.int64) for v in (node.bias, node.mult, node.shift))
    return MacLayer(
        node.output, node.inputs, node.path, op="AvgPool", kind="identity", kernel=node.kernel, stride=node.stride,
        padding=node.padding, dilation=(1, 1), weight=None, weight_bits=4, planes=(), bias=bias, mult=mult,
        shift=shift, zero=y.zero, low=node.low, high=node.high, mode=output_mode(y.bits),
    )  # fmt: skip


def _residual_add(graph: Graph, node: ResidualAdd) -> Node:
    a, b = (graph.tensors[name] for name in node.inputs)
    y = graph.tensors[node.output]
    channels = y.shape[0]
    # (code - zero) * 2 >> 1, plus zero: the 8-bit code q is the operand's own.
    bias, mult, shift = (np.full(channels, v, np.int64) for v in (-a.zero, 2, 1))
    low, high = code_range(8)
    add = FusedAdd(node.k_a, node.k_b, node.shift, b.zero, y.zero, node.low, node.high)
    return MacLayer(
        node.output, node.inputs, node.path, op="ResidualAdd", kind="identity", kernel=(1, 1), stride=(1, 1),
        padding=(0, 0, 0, 0), dilation=(1, 1), weight=None, weight_bits=4, planes=(), bias=bias, mult=mult,
        shift=shift, zero=a.zero, low=low, high=high, mode=output_mode(y.bits), add=add,
    )  # fmt: skip


def _max_pool(graph: Graph, node: MaxPool) -> Node:
    return PoolLayer(node.output, node.inputs, node.path, kernel=node.kernel, stride=node.stride,
                     padding=node.padding, dilation=node.dilation)  # fmt: skip
