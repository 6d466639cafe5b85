"""Every rule's message, all violations at once, and the generated page."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nibblecore.arch.config import ArchConfig, get_arch
from nibblecore.compiler import compile_graph
from nibblecore.compiler.rules import RULES, check_supported, message, supported_page
from nibblecore.errors import CompileError
from nibblecore.ir.graph import Graph
from nibblecore.ir.random_graph import GraphBuilder

ARCH = get_arch("small")
PAGE = Path(__file__).parents[2] / "sw" / "SUPPORTED.md"


def builder(shape: tuple[int, int, int] = (4, 40, 40), bits: int = 4) -> GraphBuilder:
    return GraphBuilder(np.random.default_rng(0), shape, bits=bits)


def violations(graph: Graph, arch: ArchConfig = ARCH) -> list[str]:
    with pytest.raises(CompileError) as caught:
        check_supported(graph, arch)
    return caught.value.violations


def conv(shape: tuple[int, int, int] = (4, 40, 40), bits: int = 4, **choices: object) -> Graph:
    b = builder(shape, bits)
    return b.finish(b.conv(b.input, 4, **choices))  # type: ignore[arg-type]


def test_kernel() -> None:
    graph = conv((1, 70, 70), kernel=(1, 65), padding=(0, 0, 0, 0))
    assert violations(graph) == [
        (
            "net.conv0: Kernels of convolutions and average pools have at most 64 rows and 64 columns, those of "
            "max-pools 32. (Its kernel is 1x65, the limit 64. Use several smaller kernels one behind the other.)"
        )
    ]
    b = builder()
    assert "Its kernel is 33x2, the limit 32." in violations(b.finish(b.max_pool(b.input, kernel=(33, 2))))[0]


def test_stride() -> None:
    assert violations(conv(stride=(17, 1))) == [
        "net.conv0: Strides are at most 16. (Its stride is 17x1. Split it into two layers with smaller strides.)"
    ]


def test_dilation() -> None:
    assert violations(conv((1, 80, 80), dilation=(1, 33), padding=(0, 0, 0, 0))) == [
        "net.conv0: Dilations are at most 32. (Its dilation is 1x33. Use a smaller one.)"
    ]


def test_padding() -> None:
    assert violations(conv(padding=(0, 0, 3, 0))) == [
        (
            "net.conv0: Padding is smaller than the window, and at most 128 rows and columns. (Its padding at the "
            "bottom is 3, the limit 2. Pad less; such outputs see padding only.)"
        )
    ]
    graph = conv((1, 8, 40), kernel=(1, 10), dilation=(1, 16), padding=(0, 129, 0, 0))
    assert "Its padding at the left is 129, the limit 128." in violations(graph)[0]


def test_window_fits() -> None:
    graph = conv((64, 64, 64), kernel=(40, 40), padding=(0, 0, 0, 0))
    assert violations(graph)[0] == (
        "net.conv0: The window of one output pixel, with that pixel and what is added to it, fits the activation "
        "buffer. (It takes 6401 words (40x40 input pixels of 4), the buffer has 4096. Use a smaller kernel, dilation "
        "or channel count, or a core with a larger act_depth.)"
    )


def test_accumulator() -> None:
    b = builder((64, 5, 5), bits=8)
    graph = b.finish(b.conv(b.input, 4, weight_bits=8, bits=8))
    weight = np.ones_like(graph.nodes[0].weight)  # type: ignore[attr-defined]
    weight[2] = 119
    node = dataclasses.replace(graph.nodes[0], weight=weight)  # type: ignore[type-var]
    graph = graph.replace(nodes=(node,))
    # 576 weights of 119 times codes of -136..119
    assert violations(graph) == [
        (
            "net.conv0: The largest sum that the weights and the input's code range allow fits the accumulator "
            "(``acc_bits``). (Channel 2 can reach -9321984, and 1 channels leave -8388608..8388607 of 24 bits. Use "
            "fewer input channels, smaller weights or fewer bits, or a core with a larger acc_bits.)"
        )
    ]
    check_supported(graph, ARCH.replace(acc_bits=25))


def test_accumulator_is_exact_at_its_limit() -> None:
    """K = 518 products of W8A8 fit 24 bits, 519 do not."""
    b = builder((519, 1, 1), bits=8)
    graph = b.finish(b.linear(b.input, 1, bits=8))
    node = graph.nodes[0]
    weight = np.full((1, 519, 1, 1), 119)
    full = dataclasses.replace(node, weight=weight, weight_bits=8)  # type: ignore[type-var]
    assert "Channel 0 can reach -8399496" in violations(graph.replace(nodes=(full,)))[0]
    weight[0, 0] = 0
    almost = dataclasses.replace(node, weight=weight, weight_bits=8)  # type: ignore[type-var]
    check_supported(graph.replace(nodes=(almost,)), ARCH)


def test_pool_accumulator() -> None:
    b = builder((1, 40, 40), bits=8)
    check_supported(b.finish(b.avg_pool(b.input, bits=8)), ARCH)


def test_bias() -> None:
    b = builder((4, 5, 5), bits=8)
    graph = b.finish(b.conv(b.input, 4, weight_bits=8, bits=8))
    node = graph.nodes[0]
    weight = np.abs(node.weight) // 2 + 1  # type: ignore[attr-defined]
    changes = {"weight": weight, "bias": np.full(4, 2**31 - 1 - 127 * int(weight[0].sum()) - 127 * 200)}
    fine = dataclasses.replace(node, **changes)  # type: ignore[type-var]
    check_supported(graph.replace(nodes=(fine,)), ARCH)
    bad = dataclasses.replace(node, weight=weight, bias=np.full(4, 2**31 - 1))  # type: ignore[type-var]
    total = 2**31 - 1 + 8 * int(weight[0].sum())
    assert violations(graph.replace(nodes=(bad,))) == [
        (
            "net.conv0: Biases, with the constants of 8-bit inputs taken into them, fit 32 bits. (That of channel 0 "
            f"becomes {total}. Choose a larger scale for input or weights.)"
        )
    ]


def test_weights() -> None:
    graph = conv(weight_bits=4)
    weight = graph.nodes[0].weight + 20  # type: ignore[attr-defined]
    bad = graph.replace(nodes=(dataclasses.replace(graph.nodes[0], weight=weight),))  # type: ignore[type-var]
    assert "Quantize them again." in violations(bad)[0]


def test_pixel() -> None:
    b = builder((2100, 16, 16), bits=8)
    text = violations(b.finish(b.max_pool(b.input, stride=(2, 16))))[0]
    assert text == (
        "net.pool0: A pixel of a tensor takes at most 4095 words of ``lanes`` nibbles, in windows with a stride fewer. "
        "(Tensor input has 2100 channels of 8 bits: 264 words, with its step of 16 4224. Use fewer channels, fewer "
        "bits or a core with more lanes.)"
    )


def test_map() -> None:
    b = builder((1, 1, 1), bits=4)
    graph = b.finish(b.linear(b.input, 1))
    shape = (1, 1, 1 << 24)
    tensors = {n: dataclasses.replace(t, shape=shape) for n, t in graph.tensors.items()}
    assert "has rows of 16777216 words. Cut the image into pieces." in violations(graph.replace(tensors=tensors))[0]


def test_flatten() -> None:
    b = builder((4, 3, 3))
    flat = b.flatten(b.input)
    assert violations(b.finish(flat)) == [
        (
            "net.flat0: Flatten stands before linear layers only, or behind a map of one pixel. (Its result is an "
            "output of the network. Return the map of shape (4, 3, 3) and flatten it afterwards.)"
        )
    ]
    b = builder((4, 3, 3))
    flat = b.flatten(b.input)
    graph = b.finish(b.add(flat, flat))
    assert "net.add1 (ResidualAdd) reads it." in violations(graph)[0]
    b = builder((1, 1, 65))
    graph = b.finish(b.linear(b.flatten(b.input), 3))
    assert "It has 1x65. Pool it first." in violations(graph)[0]
    b = builder((64, 60, 60))
    graph = b.finish(b.linear(b.flatten(b.input), 3, bits=4))
    assert "It takes 14400 + 1 words, the buffer has 4096. Pool it first." in violations(graph)[0]


def test_core() -> None:
    arch = ArchConfig(name="odd", lanes=16, columns=256, post_lanes=16, weight_depth=4096)
    assert violations(conv(), arch)[0] == (
        "core odd: The core's columns are at most 8 times its lanes, at least an eighth of them, and at most 128. (It "
        "has 256 columns and 16 lanes. Build another core.)"
    )


def test_an_input_is_no_output() -> None:
    graph = conv()
    graph = graph.replace(outputs=(*graph.outputs, "input"))
    assert violations(graph) == ["output input: Outputs of the network are computed by it. (It is an input as well.)"]


def test_what_the_core_has_no_unit_for() -> None:
    b = builder((4, 6, 6), bits=8)
    x = b.conv(b.input, 8, groups=4, bits=8)
    y = b.conv(b.input, 8, groups=2, bits=8)
    z = b.multiply(b.lookup(x, bits=8), y, bits=8)
    graph = b.finish(b.upsample(b.concat(z, b.on_grid_of(y, z)), (2, 3)))
    assert violations(graph) == [
        (
            "net.conv0: Convolutions have one group; there is no unit for depthwise and grouped ones yet. (This one "
            "has 4 groups of 1 input channel. Use groups=1, or execute the graph with nibblecore.ir.run.)"
        ),
        (
            "net.conv1: Convolutions have one group; there is no unit for depthwise and grouped ones yet. (This one "
            "has 2 groups of 2 input channels. Use groups=1, or execute the graph with nibblecore.ir.run.)"
        ),
        (
            "net.lookup2: There is no unit for lookup tables yet: activations are ReLU and clamps. (This one is silu. "
            "Use ReLU or ReLU6, or execute the graph with nibblecore.ir.run.)"
        ),
        (
            "net.mul3: There is no unit for products of two tensors yet, as in squeeze-excite. (This one multiplies "
            "(8, 6, 6) by (8, 6, 6). Use a block without it, or execute the graph with nibblecore.ir.run.)"
        ),
        (
            "net.concat5: Concatenations are not assigned to addresses yet. (This one joins 8 + 8 channels. Use a sum, "
            "or execute the graph with nibblecore.ir.run.)"
        ),
        (
            "net.up6: Upsampling is not part of instructions yet. (This one is by 2x3. Use a network without it, or "
            "execute the graph with nibblecore.ir.run.)"
        ),
    ]


def test_all_violations_come_at_once() -> None:
    b = builder((4, 60, 60))
    x = b.conv(b.input, 4, stride=(17, 1))
    graph = b.finish(b.max_pool(x, kernel=(1, 40), stride=(1, 1)))
    with pytest.raises(CompileError) as caught:
        compile_graph(graph, ARCH)
    assert [v.split(":")[0] for v in caught.value.violations] == ["net.conv0", "net.pool1"]


def test_every_rule_is_documented_and_on_the_page() -> None:
    page = supported_page()
    for rules in RULES.values():
        for rule in rules:
            assert f"- {message(rule)}\n" in page


def test_the_committed_page_is_current() -> None:
    assert PAGE.read_text() == supported_page(), (
        "sw/SUPPORTED.md is outdated: write nibblecore.compiler.rules.supported_page() to it"
    )
