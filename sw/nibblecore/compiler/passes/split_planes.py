"""Split 8-bit weights into nibbles, and take the constants of 8-bit inputs into the bias."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ...arch.numerics import split_weight8
from ...ir.graph import Graph, IntArray
from ..nodes import MacLayer, WeightPlane


def split_weights(weight: IntArray, bits: int, weight_range: tuple[int, int]) -> tuple[WeightPlane, ...]:
    """Planes with ``sum(16**shift * plane) == weight`` exactly, each within ``weight_range``.

    4-bit weights take one plane, 8-bit weights two (high nibble first). Codes that no nibble of the element reaches
    (-8 on an element of -7..7; 8-bit weights above 119) leave a remainder for one or two more planes, which are zero
    almost everywhere.
    """
    parts = [(0, weight)] if bits == 4 else list(zip((1, 0), split_weight8(weight), strict=True))
    low, high = weight_range
    planes, remainders = [], []
    for shift, part in parts:
        inside = part.clip(low, high)
        planes.append(WeightPlane(shift, inside))
        if (inside != part).any():
            remainders.append(WeightPlane(shift, part - inside))
    return tuple(planes + remainders)


def split_planes(weight_range: tuple[int, int]) -> Callable[[Graph], Graph]:
    """The pass for elements that multiply weights of ``weight_range``.

    An 8-bit input is ``16*high + low + 8``: the array sums ``16*high + low``, so ``8 * sum(weight)`` joins the bias.
    Taps outside the map read the zero point's own nibbles, so this holds at borders too.
    """

    def split(graph: Graph) -> Graph:
        return graph.replace(nodes=tuple(_split(graph, n) if isinstance(n, MacLayer) else n for n in graph.nodes))

    def _split(graph: Graph, node: MacLayer) -> MacLayer:
        wide = graph.tensors[node.inputs[0]].bits == 8
        if node.weight is None:
            offset = np.full(node.bias.shape, node.kernel[0] * node.kernel[1], np.int64)
            planes: tuple[WeightPlane, ...] = ()
        else:
            offset = node.weight.reshape(node.weight.shape[0], -1).sum(axis=1)
            planes = split_weights(node.weight, node.weight_bits, weight_range)
        return dataclasses.replace(node, planes=planes, bias=node.bias + 8 * offset * wide)

    return split
