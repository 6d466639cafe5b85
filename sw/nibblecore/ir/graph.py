"""Frozen nodes of the integer graph, with explicit quantization.

A graph is a tuple of nodes in topological order; a node names the tensors it reads and the one it writes. Every tensor
holds *stored codes* (see :mod:`nibblecore.arch.numerics`) of shape ``(C, H, W)`` for one image, with
``real = scale * (code - zero)``. Arithmetic is that of :mod:`nibblecore.arch.numerics`, exactly: the interpreter of
:mod:`nibblecore.ir.interpret` executes a graph layer by layer and is what program-level results are compared with.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class TensorType:
    """Shape and grid of one tensor.

    Parameters
    ----------
    shape : tuple[int, int, int]
        Channels, rows, columns; vectors are ``(C, 1, 1)``.
    bits : int
        4 or 8: stored codes of that width. 32: ``acc + bias`` of a convolution that leaves the core unrequantized.
    scale : float or tuple[float, ...]
        Step of the grid; one per channel is allowed for 32-bit tensors only.
    zero : int
        Stored code of real zero (0 for 32-bit tensors).
    """

    shape: tuple[int, int, int]
    bits: int
    scale: float | tuple[float, ...]
    zero: int


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """Common to all: the written tensor's name, the read ones', and the module path in the user's model."""

    output: str
    inputs: tuple[str, ...]
    path: str


@dataclasses.dataclass(frozen=True, eq=False)
class Conv(Node):
    """Convolution or linear layer, batch norm folded, with requantization.

    ``acc[o] = sum(x * weight[o])`` over the window, where taps outside the map read the input's zero point and ``x``
    are the input channels of the group of ``o``: group ``g`` of ``groups`` equal ones reads the ``g``-th part of the
    input channels and writes the ``g``-th part of the output channels. ``groups = in`` is a depthwise convolution. Then
    ``q = clamp(requantize(acc, bias, mult, shift) + zero, low, high)``, or ``acc + bias`` where the output has 32 bits.
    ``x`` are stored codes: ``bias`` already contains ``-zero_x * sum(weight[o])``.

    Parameters
    ----------
    weight : int64 array
        Codes, shape ``(out, in / groups, kernel_y, kernel_x)``.
    weight_bits : int
        4 (codes in -8..7) or 8.
    weight_scale : float64 array
        What a unit of the weight stands for, per output channel, shape ``(out,)``: the step, times the magnitude of
        the factor of a batch norm or correction behind it. ``mult * 2**-shift`` is that of
        ``scale(x) * weight_scale / scale(y)``, with the factor's sign. Takes no part in the arithmetic.
    bias, mult, shift : int64 arrays
        Requantization record per output channel, shape ``(out,)``.
    stride, dilation : tuple[int, int]
        Rows, columns.
    padding : tuple[int, int, int, int]
        Top, left, bottom, right.
    low, high : int
        Clamp of the output code; ReLU is ``low = zero``.
    groups : int
        Divides input and output channels.
    """

    weight: IntArray
    weight_bits: int
    weight_scale: npt.NDArray[np.float64]
    bias: IntArray
    mult: IntArray
    shift: IntArray
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    low: int
    high: int
    groups: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class ResidualAdd(Node):
    """:func:`nibblecore.arch.numerics.residual_add` of two tensors of one shape; 4 or 8 bits each, output too."""

    k_a: int
    k_b: int
    shift: int
    low: int
    high: int


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelMul(Node):
    """:func:`nibblecore.arch.numerics.channel_mul`: the first tensor times the second (squeeze-excite).

    The second has the shape of the first, or ``(C, 1, 1)``: one factor per channel. 4 or 8 bits each, output too.
    """

    k: int
    shift: int
    low: int
    high: int


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup(Node):
    """``q = table[code + 128]``: any function of one 8-bit tensor, 4- or 8-bit codes out.

    Parameters
    ----------
    table : int64 array
        Shape ``(256,)``; entry 0 is for the stored code -128. Rounding and clamps are in it.
    function : str
        What it was in the model, as in ``silu``; for people.
    """

    table: IntArray
    function: str = "lookup"


@dataclasses.dataclass(frozen=True, eq=False)
class MaxPool(Node):
    """Largest stored code of each window; taps outside the map do not count. Output grid = input grid.

    ``kernel``, ``stride``, ``dilation``: rows, columns; ``padding``: top, left, bottom, right.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class AvgPool(Node):
    """Integer sum of each window, taps outside the map reading the zero point, then one requantization.

    ``q = clamp(requantize(sum, bias, mult, shift) + zero, low, high)`` with one record for all channels; ``bias``
    contains ``-zero_x * kernel_y * kernel_x``. Divides by the whole window, padding included.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    bias: int
    mult: int
    shift: int
    low: int
    high: int


@dataclasses.dataclass(frozen=True, eq=False)
class Concat(Node):
    """All inputs one behind the other along the channels; inputs and output share one grid, and codes pass through.

    Two inputs or more, with the same rows and columns; one tensor may be there several times.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Upsample(Node):
    """Nearest neighbour: every pixel ``factor`` times, rows and columns; codes pass through."""

    factor: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Flatten(Node):
    """``(C, H, W)`` to ``(C*H*W, 1, 1)``, channels outermost as in PyTorch; codes pass through."""


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A network of integers.

    Parameters
    ----------
    nodes : tuple[Node, ...]
        In topological order.
    tensors : dict[str, TensorType]
        Every tensor, the graph's inputs included.
    inputs, outputs : tuple[str, ...]
        Names of tensors. Inputs are 8- or 4-bit codes that the runtime quantizes from real numbers with their grid.
    name : str
        Shown to users.
    """

    nodes: tuple[Node, ...]
    tensors: dict[str, TensorType]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str = "network"

    def producer(self, tensor: str) -> Node | None:
        """The node that writes ``tensor``; None for an input."""
        return next((n for n in self.nodes if n.output == tensor), None)

    def consumers(self, tensor: str) -> list[Node]:
        return [n for n in self.nodes if tensor in n.inputs]

    def replace(self, **changes: Any) -> "Graph":
        return dataclasses.replace(self, **changes)
