"""What the core runs. Each rule is a function: its docstring is the user's message and a line of ``sw/SUPPORTED.md``.

A rule returns None, or what is wrong: value, limit, and what to change. All broken rules of all layers are reported at
once.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

import numpy as np

from ..arch import numerics
from ..arch.config import ArchConfig
from ..arch.isa import INSTRUCTIONS, Opcode
from ..errors import CompileError
from ..ir.graph import (
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
    Upsample,
)
from .tiling import tensor_layout


@dataclasses.dataclass(frozen=True)
class Context:
    """What a rule may look at besides the node."""

    graph: Graph
    arch: ArchConfig


def _high(opcode: Opcode, name: str) -> int:
    return next(f.high for f in INSTRUCTIONS[opcode].fields if f.name == name)


KERNEL_MAX: Final = _high(Opcode.MAC, "kernel_x")
POOL_MAX: Final = _high(Opcode.POOL, "kernel_x")
STRIDE_MAX: Final = _high(Opcode.MAC, "stride_x")
DILATION_MAX: Final = _high(Opcode.MAC, "dilation_x")
PAD_MAX: Final = 128
PIXEL_WORDS_MAX: Final = _high(Opcode.POST, "out_ox_step")
DRAM_WORDS_MAX: Final = 1 << 28
ROW_WORDS_MAX: Final = _high(Opcode.LOAD, "dram_step1")

Windowed = Conv | AvgPool | MaxPool


def _kernel(node: Node) -> tuple[int, int]:
    if isinstance(node, Conv):
        return node.weight.shape[2], node.weight.shape[3]
    assert isinstance(node, AvgPool | MaxPool)
    return node.kernel


def _dilation(node: Node) -> tuple[int, int]:
    return node.dilation if isinstance(node, Conv | MaxPool) else (1, 1)


# Core --------------------------------------------------------------------------------------------------------------


def rule_core(arch: ArchConfig) -> str | None:
    """The core's columns are at most 8 times its lanes, at least an eighth of them, and at most 128."""
    if arch.parts_per_brick > 8 or arch.bricks_per_tile > 8 or arch.columns > 128:
        return f"It has {arch.columns} columns and {arch.lanes} lanes. Build another core."
    return None


# Windows -----------------------------------------------------------------------------------------------------------


def rule_kernel(node: Windowed, context: Context) -> str | None:
    """Kernels of convolutions and average pools have at most 64 rows and 64 columns, those of max-pools 32."""
    limit = POOL_MAX if isinstance(node, MaxPool) else KERNEL_MAX
    rows, cols = _kernel(node)
    if max(rows, cols) > limit:
        return f"Its kernel is {rows}x{cols}, the limit {limit}. Use several smaller kernels one behind the other."
    return None


def rule_stride(node: Windowed, context: Context) -> str | None:
    """Strides are at most 16."""
    if max(node.stride) > STRIDE_MAX:
        return f"Its stride is {node.stride[0]}x{node.stride[1]}. Split it into two layers with smaller strides."
    return None


def rule_dilation(node: Conv | MaxPool, context: Context) -> str | None:
    """Dilations are at most 32."""
    if max(node.dilation) > DILATION_MAX:
        return f"Its dilation is {node.dilation[0]}x{node.dilation[1]}. Use a smaller one."
    return None


def rule_padding(node: Windowed, context: Context) -> str | None:
    """Padding is smaller than the window, and at most 128 rows and columns."""
    spans = [(k - 1) * d + 1 for k, d in zip(_kernel(node), _dilation(node), strict=True)]
    for side, pad, span in zip(("top", "left", "bottom", "right"), node.padding, spans * 2, strict=True):
        if pad >= span or pad > PAD_MAX:
            limit = min(span - 1, PAD_MAX)
            return f"Its padding at the {side} is {pad}, the limit {limit}. Pad less; such outputs see padding only."
    return None


# Tensors -----------------------------------------------------------------------------------------------------------


def rule_pixel(node: Node, context: Context) -> str | None:
    """A pixel of a tensor takes at most 4095 words of ``lanes`` nibbles, in windows with a stride fewer."""
    for name in (*node.inputs, node.output):
        t = context.graph.tensors[name]
        words = tensor_layout(t.shape, t.bits, context.arch).pixel_words
        factor = 1
        if isinstance(node, MaxPool) and name == node.inputs[0]:
            factor = max(node.stride[1], node.dilation[1])
        if words * factor > PIXEL_WORDS_MAX:
            return (
                f"Tensor {name} has {t.shape[0]} channels of {t.bits} bits: {words} words, with its step of {factor} "
                f"{words * factor}. Use fewer channels, fewer bits or a core with more lanes."
            )
    return None


def rule_map(node: Node, context: Context) -> str | None:
    """A row of a map is shorter than 2**24 words, a whole map shorter than 2**28."""
    for name in (*node.inputs, node.output):
        t = context.graph.tensors[name]
        layout = tensor_layout(t.shape, t.bits, context.arch)
        if layout.row_words > ROW_WORDS_MAX or layout.words >= DRAM_WORDS_MAX:
            return f"Tensor {name} of shape {t.shape} has rows of {layout.row_words} words. Cut the image into pieces."
    return None


def rule_window_fits(node: Windowed | ResidualAdd, context: Context) -> str | None:
    """The window of one output pixel, with that pixel and what is added to it, fits the activation buffer."""
    arch, graph = context.arch, context.graph
    sizes = [tensor_layout(graph.tensors[n].shape, graph.tensors[n].bits, arch) for n in (*node.inputs, node.output)]
    rows = cols = 1
    if isinstance(node, Conv | AvgPool | MaxPool):
        spans = [(k - 1) * d + 1 for k, d in zip(_kernel(node), _dilation(node), strict=True)]
        rows, cols = min(spans[0], sizes[0].height), min(spans[1], sizes[0].width)
    words = rows * cols * sizes[0].pixel_words + sum(s.pixel_words for s in sizes[1:])
    if words > arch.act_depth:
        return (
            f"It takes {words} words ({rows}x{cols} input pixels of {sizes[0].pixel_words}), the buffer has "
            f"{arch.act_depth}. Use a smaller kernel, dilation or channel count, or a core with a larger act_depth."
        )
    return None


# Convolutions ------------------------------------------------------------------------------------------------------


def rule_weights(node: Conv, context: Context) -> str | None:
    """Weights are codes of 4 bits (-8..7) or 8 bits (-128..127); those that one or two nibbles of the element do not
    reach take more passes, with the same result."""
    low, high = numerics.code_range(node.weight_bits)
    if node.weight.min() < low or node.weight.max() > high:
        return f"They are {node.weight.min()}..{node.weight.max()}, not in {low}..{high}. Quantize them again."
    return None


def rule_accumulator(node: Conv, context: Context) -> str | None:
    """The largest sum that the weights and the input's code range allow fits the accumulator (``acc_bits``)."""
    x = context.graph.tensors[node.inputs[0]]
    # The array sums nibbles: an 8-bit code x enters as x - 8, the rest is in the bias.
    low, high = (c - 8 * (x.bits == 8) for c in numerics.code_range(x.bits))
    flat = node.weight.reshape(node.weight.shape[0], -1)
    return _accumulator(flat.clip(min=0).sum(axis=1), flat.clip(max=0).sum(axis=1), low, high, context.arch)


def rule_pool_accumulator(node: AvgPool, context: Context) -> str | None:
    """The largest sum of a window of an average pool fits the accumulator (``acc_bits``)."""
    x = context.graph.tensors[node.inputs[0]]
    low, high = (c - 8 * (x.bits == 8) for c in numerics.code_range(x.bits))
    count = np.array([node.kernel[0] * node.kernel[1]])
    return _accumulator(count, 0 * count, low, high, context.arch)


def _accumulator(
    positive: "np.typing.NDArray[np.int64]", negative: "np.typing.NDArray[np.int64]", low: int, high: int,
    arch: ArchConfig,
) -> str | None:  # fmt: skip
    highest, lowest = positive * high + negative * low, positive * low + negative * high
    limit = 1 << arch.acc_bits - 1
    bad = np.flatnonzero((highest >= limit) | (lowest < -limit))
    if not bad.size:
        return None
    worst = int(bad[np.argmax(np.maximum(highest[bad] + 1, -lowest[bad]))])
    value = int(highest[worst] if highest[worst] + 1 >= -lowest[worst] else lowest[worst])
    return (
        f"Channel {worst} can reach {value}, and {bad.size} channels leave {-limit}..{limit - 1} of {arch.acc_bits} "
        f"bits. Use fewer input channels, smaller weights or fewer bits, or a core with a larger acc_bits."
    )


def rule_bias(node: Conv | AvgPool, context: Context) -> str | None:
    """Biases, with the constants of 8-bit inputs taken into them, fit 32 bits."""
    x = context.graph.tensors[node.inputs[0]]
    if x.bits != 8:
        return None
    if isinstance(node, Conv):
        bias = node.bias + 8 * node.weight.reshape(node.weight.shape[0], -1).sum(axis=1)
    else:
        bias = np.array([node.bias + 8 * node.kernel[0] * node.kernel[1]])
    low, high = numerics.code_range(numerics.BIAS_BITS)
    bad = np.flatnonzero((bias < low) | (bias > high))
    if bad.size:
        return f"That of channel {bad[0]} becomes {bias[bad[0]]}. Choose a larger scale for input or weights."
    return None


def rule_groups(node: Conv, context: Context) -> str | None:
    """Convolutions have one group; there is no unit for depthwise and grouped ones yet."""
    if node.groups > 1:
        each = node.weight.shape[1]
        return f"This one has {node.groups} groups of {each} input channel{'s' * (each > 1)}. {_change('groups=1')}"
    return None


# What the core has no unit for -------------------------------------------------------------------------------------


def _change(instead: str) -> str:
    return f"Use {instead}, or execute the graph with nibblecore.ir.run."


def rule_lookup(node: Lookup, context: Context) -> str | None:
    """There is no unit for lookup tables yet: activations are ReLU and clamps."""
    return f"This one is {node.function}. {_change('ReLU or ReLU6')}"


def rule_channel_mul(node: ChannelMul, context: Context) -> str | None:
    """There is no unit for products of two tensors yet, as in squeeze-excite."""
    a, b = (context.graph.tensors[name].shape for name in node.inputs)
    return f"This one multiplies {a} by {b}. {_change('a block without it')}"


def rule_concat(node: Concat, context: Context) -> str | None:
    """Concatenations are not assigned to addresses yet."""
    parts = [context.graph.tensors[name].shape[0] for name in node.inputs]
    return f"This one joins {' + '.join(map(str, parts))} channels. {_change('a sum')}"


def rule_upsample(node: Upsample, context: Context) -> str | None:
    """Upsampling is not part of instructions yet."""
    return f"This one is by {node.factor[0]}x{node.factor[1]}. {_change('a network without it')}"


# Additions, reshapes, outputs --------------------------------------------------------------------------------------


def rule_flatten(node: Flatten, context: Context) -> str | None:
    """Flatten stands before linear layers only, or behind a map of one pixel."""
    graph = context.graph
    shape = graph.tensors[node.inputs[0]].shape
    if shape[1:] == (1, 1):
        return None
    if node.output in graph.outputs:
        return f"Its result is an output of the network. Return the map of shape {shape} and flatten it afterwards."
    for reader in graph.consumers(node.output):
        if not (isinstance(reader, Conv) and reader.weight.shape[2:] == (1, 1) and not any(reader.padding)):
            return f"{reader.path} ({type(reader).__name__}) reads it. Put a linear layer behind it, or leave it out."
    return None


def rule_flat_kernel(node: Flatten, context: Context) -> str | None:
    """A map before Flatten has at most 64 rows and 64 columns: the linear layer runs as a kernel of its size."""
    _, rows, cols = context.graph.tensors[node.inputs[0]].shape
    if max(rows, cols) > KERNEL_MAX:
        return f"It has {rows}x{cols}. Pool it first."
    return None


def rule_flat_window(node: Flatten, context: Context) -> str | None:
    """A map before Flatten fits the activation buffer together with one pixel of the linear layer's output."""
    graph, arch = context.graph, context.arch
    x = graph.tensors[node.inputs[0]]
    if x.shape[1:] == (1, 1):
        return None
    readers = [graph.tensors[n.output] for n in graph.consumers(node.output)]
    after = max((tensor_layout(t.shape, t.bits, arch).words for t in readers), default=0)
    words = tensor_layout(x.shape, x.bits, arch).words
    if words + after > arch.act_depth:
        return f"It takes {words} + {after} words, the buffer has {arch.act_depth}. Pool it first."
    return None


Rule = Callable[..., str | None]

_WINDOW: Final[tuple[Rule, ...]] = (rule_kernel, rule_stride, rule_padding, rule_window_fits)
_TENSORS: Final[tuple[Rule, ...]] = (rule_pixel, rule_map)

RULES: Final[dict[type[Node], tuple[Rule, ...]]] = {
    Conv: (*_WINDOW, rule_dilation, rule_groups, rule_weights, rule_accumulator, rule_bias, *_TENSORS),
    MaxPool: (*_WINDOW, rule_dilation, *_TENSORS),
    AvgPool: (*_WINDOW, rule_pool_accumulator, rule_bias, *_TENSORS),
    ResidualAdd: (rule_window_fits, *_TENSORS),
    Flatten: (rule_flatten, rule_flat_kernel, rule_flat_window),
    Lookup: (rule_lookup,),
    ChannelMul: (rule_channel_mul,),
    Concat: (rule_concat,),
    Upsample: (rule_upsample,),
}
"""The rules of every operator of the integer graph, also of those that no core runs yet."""


def message(rule: Rule) -> str:
    """A rule's docstring as one line."""
    return " ".join((rule.__doc__ or "").split())


def check_supported(graph: Graph, arch: ArchConfig) -> Graph:
    """Return ``graph`` if the core runs it; raises :class:`CompileError` with every reason."""
    context = Context(graph, arch)
    violations = []
    if (why := rule_core(arch)) is not None:
        violations.append(f"core {arch.name}: {message(rule_core)} ({why})")
    for name in graph.outputs:
        if name in graph.inputs:
            violations.append(f"output {name}: Outputs of the network are computed by it. (It is an input as well.)")
    for node in graph.nodes:
        for rule in RULES[type(node)]:
            why = rule(node, context)
            if why is not None:
                violations.append(f"{node.path}: {message(rule)} ({why})")
    if violations:
        raise CompileError(violations)
    return graph


# Page --------------------------------------------------------------------------------------------------------------

_TITLES: Final[dict[type[Node], str]] = {
    Conv: "Convolution and linear layers, with batch norm folded and clamping activations",
    MaxPool: "Max-pool",
    AvgPool: "Average pool, global ones included",
    ResidualAdd: "Residual addition",
    Flatten: "Flatten",
    Lookup: "Activations by table: SiLU, sigmoid, hard-swish and others",
    ChannelMul: "Channel-wise multiplication",
    Concat: "Concatenation",
    Upsample: "Nearest upsampling",
}


def supported_page() -> str:
    """The text of ``sw/SUPPORTED.md``."""
    lines = [
        "# What the core runs",
        "",
        "Made from the docstrings of `nibblecore.compiler.rules`; a network that breaks a rule is refused with that",
        "sentence, the layer, the value and what to change.",
        "",
        f"- {message(rule_core)}",
        "- Outputs of the network are computed by it.",
    ]
    for kind, rules in RULES.items():
        lines += ["", f"## {_TITLES[kind]}", ""]
        lines += [f"- {message(rule)}" for rule in rules]
    return "\n".join(lines) + "\n"
