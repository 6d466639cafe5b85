"""Random integer graphs for tests: every operator, bit width, zero point, stride and padding, with sensible outputs.

All randomness comes from the generator that is passed in: one seed, one graph. What the core does not run is drawn only
where it is asked for: ``random_network(..., every_operator=True)``.
"""

import math
from typing import Any, Final

import numpy as np

from ..arch import numerics
from ..arch.config import ArchConfig
from ..runtime.layout import tensor_words
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
from .verify import output_size, verify

Rng = np.random.Generator
Shape = tuple[int, int, int]

_BITS: Final = (4, 4, 4, 8)


def random_inputs(graph: Graph, rng: Rng, *, images: int = 1) -> dict[str, IntArray]:
    """Codes ``(images, C, H, W)`` for every input of the graph, uniform with a share of extreme ones."""
    result = {}
    for name in graph.inputs:
        t = graph.tensors[name]
        low, high = numerics.code_range(t.bits)
        codes = rng.integers(low, high, (images, *t.shape), endpoint=True)
        extreme = rng.random(codes.shape) < 0.1
        result[name] = np.where(extreme, np.where(rng.random(codes.shape) < 0.5, low, high), codes).astype(np.int64)
    return result


class GraphBuilder:
    """Adds random nodes one behind the other; :meth:`finish` verifies the graph.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all choices.
    shape : tuple[int, int, int]
        Of the input.
    bits : int, optional
        Of the input; random without it.
    """

    def __init__(self, rng: Rng, shape: Shape, *, bits: int | None = None) -> None:
        self.rng = rng
        self.nodes: list[Node] = []
        self.tensors: dict[str, TensorType] = {}
        self.input = self._tensor("input", shape, bits if bits is not None else self._choice(_BITS))

    def _choice(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def _tensor(self, name: str, shape: Shape, bits: int) -> str:
        low, high = numerics.code_range(bits)
        zero = 0 if bits == 32 else self._choice((0, low, high, int(self.rng.integers(low, high + 1))))
        self.tensors[name] = TensorType(shape, bits, 2.0 ** -int(self.rng.integers(1, 9)), zero)
        return name

    def _name(self, kind: str) -> str:
        return f"{kind}{len(self.nodes)}"

    def _clamp(self, tensor: str) -> tuple[int, int]:
        """Clamp of an output: its whole range, or none of what is negative, or something in between."""
        t = self.tensors[tensor]
        low, high = numerics.code_range(t.bits)
        kind = int(self.rng.integers(4))
        if kind == 0 and t.zero < high:
            return t.zero, high
        if kind == 1:
            first, last = sorted(int(v) for v in self.rng.integers(low, high + 1, 2))
            return first, last
        return low, high

    def conv(
        self,
        x: str,
        channels: int,
        *,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (1, 1, 1, 1),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        weight_bits: int | None = None,
        bits: int | None = None,
    ) -> str:
        """A convolution with weights of their full range, multipliers of both signs and some constant channels."""
        rng, source = self.rng, self.tensors[x]
        bits = bits if bits is not None else self._choice(_BITS)
        weight_bits = weight_bits if weight_bits is not None else self._choice(_BITS)
        low, high = numerics.code_range(weight_bits)
        shape = (channels, source.shape[0] // groups, *kernel)
        spread = self._choice((0.15, 0.5, 2.0))
        weight = np.clip(np.rint(rng.normal(0, spread * high, shape)), low, high).astype(np.int64)
        if rng.random() < 0.2:
            weight[int(rng.integers(channels))] = 0
        rows = output_size(source.shape[1], kernel[0], stride[0], dilation[0], padding[0], padding[2])
        cols = output_size(source.shape[2], kernel[1], stride[1], dilation[1], padding[1], padding[3])
        name = self._tensor(self._name("conv"), (channels, rows, cols), bits)
        sums = weight.reshape(channels, -1).sum(axis=1)
        deviation = np.sqrt((weight.reshape(channels, -1) ** 2).sum(axis=1)) * (1 << source.bits) / 3.46 + 1
        bias = np.rint(-source.zero * sums + rng.normal(0, 0.5, channels) * deviation).astype(np.int64)
        records = [self._record(d, 8 if bits == 32 else bits) for d in deviation]
        mult = np.array([m for m, _ in records], np.int64)
        shift = np.array([s for _, s in records], np.int64)
        clamp = (-8, 7) if bits == 32 else self._clamp(name)
        self.nodes.append(
            Conv(
                name, (x,), f"net.{name}", weight=weight, weight_bits=weight_bits,
                weight_scale=np.full(channels, 0.01), bias=bias, mult=mult, shift=shift, stride=stride,
                padding=padding, dilation=dilation, low=clamp[0], high=clamp[1], groups=groups,
            )
        )  # fmt: skip
        return name

    def _record(self, deviation: float, bits: int) -> tuple[int, int]:
        """Multiplier and shift that spread the sums over the output's codes, sometimes far too much or too little."""
        gain = self._choice((0.05, 1.0, 1.0, 1.0, 4.0)) * (1 << bits) / 4 / deviation
        mult, shift = numerics.quantize_multiplier(gain)
        if self.rng.random() < 0.3:
            mult = -mult
        if self.rng.random() < 0.05:
            mult = 0
        return mult, shift

    def max_pool(
        self,
        x: str,
        *,
        kernel: tuple[int, int] = (2, 2),
        stride: tuple[int, int] = (2, 2),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> str:
        source = self.tensors[x]
        rows = output_size(source.shape[1], kernel[0], stride[0], dilation[0], padding[0], padding[2])
        cols = output_size(source.shape[2], kernel[1], stride[1], dilation[1], padding[1], padding[3])
        name = self._name("pool")
        self.tensors[name] = TensorType((source.shape[0], rows, cols), source.bits, source.scale, source.zero)
        self.nodes.append(MaxPool(name, (x,), f"net.{name}", kernel, stride, padding, dilation))
        return name

    def avg_pool(
        self,
        x: str,
        *,
        kernel: tuple[int, int] | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        bits: int | None = None,
    ) -> str:
        """An average pool, global without ``kernel``."""
        source = self.tensors[x]
        kernel = kernel if kernel is not None else source.shape[1:]
        rows = output_size(source.shape[1], kernel[0], stride[0], 1, padding[0], padding[2])
        cols = output_size(source.shape[2], kernel[1], stride[1], 1, padding[1], padding[3])
        name = self._tensor(self._name("mean"), (source.shape[0], rows, cols), bits or self._choice(_BITS))
        count = kernel[0] * kernel[1]
        ratio = 2.0 ** (self.tensors[name].bits - source.bits) / count
        mult, shift = numerics.quantize_multiplier(ratio * self._choice((1.0, 1.7)))
        low, high = self._clamp(name)
        self.nodes.append(
            AvgPool(
                name, (x,), f"net.{name}", kernel, stride, padding, -source.zero * count, mult, shift, low, high
            )
        )  # fmt: skip
        return name

    def add(self, a: str, b: str, *, bits: int | None = None) -> str:
        """A residual addition of two tensors of one shape."""
        name = self._tensor(self._name("add"), self.tensors[a].shape, bits or self._choice(_BITS))
        y = self.tensors[name]
        shift = int(self.rng.integers(1, 15))
        factors = []
        for operand in (a, b):
            ratio = 2.0 ** (y.bits - self.tensors[operand].bits) * self.rng.uniform(0.3, 1.0)
            factor = min(int(ratio * 2**shift), (1 << numerics.ADD_FACTOR_BITS - 1) - 1)
            factors.append(-factor if self.rng.random() < 0.15 else factor)
        low, high = self._clamp(name)
        self.nodes.append(ResidualAdd(name, (a, b), f"net.{name}", factors[0], factors[1], shift, low, high))
        return name

    def lookup(self, x: str, *, bits: int | None = None) -> str:
        """A table of a smooth function, or of noise; the input must have 8 bits."""
        name = self._tensor(self._name("lookup"), self.tensors[x].shape, bits or self._choice(_BITS))
        y = self.tensors[name]
        low, high = numerics.code_range(y.bits)
        if self.rng.random() < 0.3:
            table = self.rng.integers(low, high, 256, endpoint=True)
        else:
            bend = np.arange(-128, 128) * self.rng.uniform(0.01, 0.06)
            table = np.clip(np.rint(bend / (1 + np.exp(-bend)) * high / 2) + y.zero, low, high)
        self.nodes.append(Lookup(name, (x,), f"net.{name}", table.astype(np.int64), "silu"))
        return name

    def multiply(self, a: str, b: str, *, bits: int | None = None) -> str:
        """A product of two tensors of one shape, or of a tensor and a factor per channel."""
        name = self._tensor(self._name("mul"), self.tensors[a].shape, bits or self._choice(_BITS))
        y = self.tensors[name]
        ratio = 2.0 ** (y.bits + 1 - self.tensors[a].bits - self.tensors[b].bits) * self.rng.uniform(0.5, 2.0)
        k, shift = numerics.mul_factor(ratio, 1.0, 1.0)
        low, high = self._clamp(name)
        self.nodes.append(
            ChannelMul(name, (a, b), f"net.{name}", -k if self.rng.random() < 0.15 else k, shift, low, high)
        )
        return name

    def concat(self, *parts: str) -> str:
        """Parts of one grid, which :meth:`on_grid_of` makes of others."""
        first = self.tensors[parts[0]]
        name = self._name("concat")
        channels = sum(self.tensors[p].shape[0] for p in parts)
        self.tensors[name] = TensorType((channels, *first.shape[1:]), first.bits, first.scale, first.zero)
        self.nodes.append(Concat(name, parts, f"net.{name}"))
        return name

    def upsample(self, x: str, factor: tuple[int, int] = (2, 2)) -> str:
        source = self.tensors[x]
        name = self._name("up")
        shape = (source.shape[0], source.shape[1] * factor[0], source.shape[2] * factor[1])
        self.tensors[name] = TensorType(shape, source.bits, source.scale, source.zero)
        self.nodes.append(Upsample(name, (x,), f"net.{name}", factor))
        return name

    def on_grid_of(self, x: str, other: str) -> str:
        """A convolution of ``x`` whose output has the grid of ``other``."""
        y = self.tensors[other]
        name = self.conv(x, self.tensors[x].shape[0], bits=y.bits)
        self.tensors[name] = TensorType(self.tensors[name].shape, y.bits, y.scale, y.zero)
        return name

    def flatten(self, x: str) -> str:
        source = self.tensors[x]
        name = self._name("flat")
        self.tensors[name] = TensorType((math.prod(source.shape), 1, 1), source.bits, source.scale, source.zero)
        self.nodes.append(Flatten(name, (x,), f"net.{name}"))
        return name

    def linear(self, x: str, channels: int, *, bits: int | None = None) -> str:
        """A linear layer on a tensor of 1x1 pixels."""
        return self.conv(x, channels, kernel=(1, 1), padding=(0, 0, 0, 0), bits=bits)

    def finish(self, *outputs: str, name: str = "random") -> Graph:
        """The graph with these outputs; tensors that nothing reads become outputs too."""
        read = {t for node in self.nodes for t in node.inputs}
        loose = [n.output for n in self.nodes if n.output not in read and n.output not in outputs]
        return verify(Graph(tuple(self.nodes), self.tensors, (self.input,), (*outputs, *loose), name))


def random_layer(rng: Rng, arch: ArchConfig, *, large: bool = False) -> Graph:
    """One random convolution, its sizes chosen around the bounds of a core's buffers.

    ``large``: maps beyond the activation buffer, or weights beyond the weight buffer; else both are small. Kernels,
    strides, dilations and paddings are drawn independently; channels lie at, below and above whole bricks.
    """

    def near(unit: int, most: int) -> int:
        return max(1, unit * int(rng.integers(1, most + 1)) + int(rng.integers(-2, 3)) * (rng.random() < 0.5))

    kernel = (int(rng.choice([1, 1, 2, 3, 3, 3, 4, 5, 7])), int(rng.choice([1, 1, 2, 3, 3, 3, 4, 5, 7])))
    if rng.random() < 0.5:
        kernel = (kernel[0], kernel[0])
    stride = (int(rng.choice([1, 1, 1, 2, 3])), int(rng.choice([1, 1, 1, 2, 3])))
    dilation = (int(rng.choice([1, 1, 1, 2])), int(rng.choice([1, 1, 1, 2])))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    top, left, bottom, right = (int(rng.integers(0, s)) for s in spans * 2)
    padding = (top, left, bottom, right)
    bits = int(rng.choice(_BITS))
    if large and rng.random() < 0.4:  # weights
        inputs, outputs = near(arch.lanes, 6), near(arch.columns, 3)
        while inputs * kernel[0] * kernel[1] * 2 < arch.weight_depth * arch.lanes // arch.columns:
            inputs *= 2
        inputs = min(inputs, 32 * arch.lanes)
        rows, cols = (int(rng.integers(1, 6)) + max(0, s - 2) for s in spans)
    else:
        inputs, outputs = near(arch.lanes, 2), near(arch.columns, 3)
        rows, cols = (int(rng.integers(1, 10)) + max(0, s - 2) for s in spans)
    inputs, outputs = max(1, inputs), max(1, outputs)
    if large and rng.random() < 0.7:  # map
        while tensor_words((inputs, rows, cols), bits, arch.lanes) < arch.act_depth * 1.2:
            rows, cols = (rows * 3 // 2 + 1, cols) if rng.random() < 0.5 else (rows, cols * 3 // 2 + 1)
    rows = max(rows, spans[0] - padding[0] - padding[2])
    cols = max(cols, spans[1] - padding[1] - padding[3])
    builder = GraphBuilder(rng, (inputs, rows, cols), bits=bits)
    result = builder.conv(
        builder.input,
        outputs,
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        bits=int(rng.choice([4, 4, 8, 32])),
    )
    return builder.finish(result, name="layer")


def random_network(
    rng: Rng, arch: ArchConfig, *, blocks: int = 3, size: int | None = None, every_operator: bool = False
) -> Graph:
    """A random small network: convolutions, residual blocks with and without projection, pools, a linear head.

    ``every_operator``: also what the core does not run, as groups, lookups, squeeze-excite, concatenations, upsampling.
    """
    lanes = arch.lanes
    size = size if size is not None else int(rng.integers(4, 13))
    widths = [max(1, w) for w in (lanes // 2, lanes - 1, lanes, lanes + 1, 2 * lanes)]
    builder = GraphBuilder(rng, (int(rng.integers(1, 5)), size, size + int(rng.integers(0, 3))))
    x = builder.conv(builder.input, int(rng.choice(widths)))
    outputs = []
    for _ in range(blocks):
        _, rows, cols = builder.tensors[x].shape
        kind = int(rng.integers(12 if every_operator else 7))
        if kind == 0 and min(rows, cols) >= 2:
            overlap = rng.random() < 0.5
            x = builder.max_pool(
                x, kernel=(3, 3) if overlap else (2, 2), padding=(1, 1, 1, 1) if overlap else (0, 0, 0, 0)
            )
        elif kind == 1 and min(rows, cols) >= 3:
            x = builder.avg_pool(x, kernel=(2, 2), stride=(1, 2), padding=(0, 1, 1, 0))
        elif kind == 2:
            x = builder.conv(x, int(rng.choice(widths)), kernel=(1, 1), padding=(0, 0, 0, 0))
        elif kind == 3:  # identity shortcut
            y = builder.conv(x, int(rng.choice(widths)))
            y = builder.conv(y, builder.tensors[x].shape[0], bits=8)
            x = builder.add(*((x, y) if rng.random() < 0.5 else (y, x)))
        elif kind == 4:  # projection shortcut
            width, stride = int(rng.choice(widths)), int(rng.integers(1, 3))
            y = builder.conv(x, width, stride=(stride, stride))
            y = builder.conv(y, width, bits=8)
            z = builder.conv(x, width, kernel=(1, 1), padding=(0, 0, 0, 0), stride=(stride, stride), bits=8)
            x = builder.add(*((y, z) if rng.random() < 0.5 else (z, y)))
        elif kind == 5:  # an addition that nothing is fused with, and a tensor with many readers
            y = builder.conv(x, builder.tensors[x].shape[0], bits=4)
            z = builder.add(x, y)
            x = builder.add(y, z)
        elif kind >= 7:
            x = _random_block(builder, x, kind, int(rng.choice(widths)))
        else:
            x = builder.conv(x, int(rng.choice(widths)), stride=(2, 1), dilation=(1, 2), padding=(1, 2, 1, 2))
            if rng.random() < 0.3:
                outputs.append(x)
    head = int(rng.integers(4))
    if head == 0:
        x = builder.linear(builder.avg_pool(x), int(rng.integers(1, 2 * lanes)), bits=32)
    elif head == 1:
        x = builder.linear(builder.flatten(x), int(rng.integers(1, 2 * lanes)), bits=8)
        x = builder.linear(x, 5, bits=32)
    elif head == 2:
        x = builder.linear(builder.flatten(builder.avg_pool(x)), 10)
    else:
        x = builder.max_pool(x, kernel=(2, 1), stride=(1, 1), padding=(1, 0, 0, 0))
    return builder.finish(*outputs, x, name="network")


def _random_block(builder: GraphBuilder, x: str, kind: int, width: int) -> str:
    """One of the blocks that the core does not run."""
    rng, (channels, rows, cols) = builder.rng, builder.tensors[x].shape
    if kind == 7:  # depthwise
        return builder.conv(x, channels * int(rng.integers(1, 3)), groups=channels, stride=(1, int(rng.integers(1, 3))))
    if kind == 8:  # groups
        groups = int(rng.choice([g for g in range(1, channels + 1) if channels % g == 0]))
        return builder.conv(x, groups * int(rng.integers(1, 4)), groups=groups)
    if kind == 9:  # an activation, and a tensor times a function of itself
        y = builder.conv(x, width, bits=8)
        z = builder.lookup(y)
        return z if rng.random() < 0.5 else builder.multiply(y, z)
    if kind == 10:  # squeeze-excite
        y = builder.conv(builder.avg_pool(x), channels, kernel=(1, 1), padding=(0, 0, 0, 0), bits=8)
        return builder.multiply(x, builder.lookup(y))
    if min(rows, cols) < 2:
        return builder.concat(x, x)
    y = builder.max_pool(x, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1))
    factor = (2 - rows % 2, 2 - cols % 2)
    z = builder.upsample(builder.max_pool(x, kernel=factor, stride=factor), factor)
    return builder.concat(x, builder.on_grid_of(x, x), y, z)
