"""Nodes of the lowered graph: what the engines of the core do, before tiling.

The passes of :mod:`nibblecore.compiler.passes` replace every node of :mod:`nibblecore.ir.graph` by one of these; a
graph is fully lowered when it holds nothing else.
"""

import dataclasses
from typing import Literal

from ..arch.isa import OutputMode
from ..ir.graph import IntArray, Node


@dataclasses.dataclass(frozen=True, eq=False)
class WeightPlane:
    """Weight nibbles ``(out, in, kernel_y, kernel_x)`` whose products count ``16**shift``."""

    shift: int
    weight: IntArray


@dataclasses.dataclass(frozen=True)
class FusedAdd:
    """A residual addition behind the requantization; the stored operand is the layer's second input.

    ``clamp(zero + (((q - layer.zero)*k_a + (b - zero_b)*k_b + 2**(shift-1)) >> shift), low, high)``.
    """

    k_a: int
    k_b: int
    shift: int
    zero_b: int
    zero: int
    low: int
    high: int


@dataclasses.dataclass(frozen=True, eq=False)
class MacLayer(Node):
    """A layer of the MAC array with its requantization, and an addition if ``add`` is not None.

    Parameters
    ----------
    op : str
        What it was in the integer graph, for people.
    kind : {"dense", "identity"}
        ``dense``: every input channel times every output channel, with ``planes``. ``identity``: the sum of each
        channel's own window, with weights 1.
    kernel, stride, dilation : tuple[int, int]
        Rows, columns.
    padding : tuple[int, int, int, int]
        Top, left, bottom, right; taps outside the map read the input's zero point.
    weight : int64 array or None
        Codes of a dense layer, shape ``(out, in, kernel_y, kernel_x)``.
    weight_bits : int
        4 or 8.
    planes : tuple[WeightPlane, ...]
        Nibbles of ``weight``; empty until :func:`nibblecore.compiler.passes.split_planes.split_planes`.
    bias, mult, shift : int64 arrays
        Records, shape ``(out,)``; ``bias`` counts sums of codes until planes are split, sums of nibbles afterwards.
    zero, low, high : int
        Grid and clamp of the requantized code ``q``, which is the output only where ``add`` is None.
    mode : OutputMode
        How the output is written.
    """

    op: str
    kind: Literal["dense", "identity"]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    weight: IntArray | None
    weight_bits: int
    planes: tuple[WeightPlane, ...]
    bias: IntArray
    mult: IntArray
    shift: IntArray
    zero: int
    low: int
    high: int
    mode: OutputMode
    add: FusedAdd | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PoolLayer(Node):
    """Max-pool of stored codes in the post unit; fields as :class:`nibblecore.ir.graph.MaxPool`."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @property
    def op(self) -> str:
        return "MaxPool"


Layer = MacLayer | PoolLayer
