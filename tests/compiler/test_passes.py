"""Each pass on small graphs: what it changes, what it leaves, and the verifier behind it."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from nibblecore.arch.config import ArchConfig, get_arch
from nibblecore.arch.isa import OutputMode
from nibblecore.compiler.nodes import MacLayer
from nibblecore.compiler.passes import fuse_add, lower, merge_flatten, split_planes
from nibblecore.compiler.passes.split_planes import split_weights
from nibblecore.compiler.verify import verify_lowered
from nibblecore.errors import GraphError
from nibblecore.ir import run
from nibblecore.ir.random_graph import GraphBuilder, random_inputs
from nibblecore.runtime.program import Program

ARCH = get_arch("small")


def builder(shape: tuple[int, int, int] = (3, 4, 5)) -> GraphBuilder:
    return GraphBuilder(np.random.default_rng(0), shape, bits=8)


def test_merge_flatten_keeps_every_result() -> None:
    b = builder()
    flat = b.flatten(b.input)
    x, y = b.linear(flat, 7, bits=8), b.linear(flat, 6, bits=32)
    graph = b.finish(b.linear(b.flatten(x), 4, bits=32), y)
    merged = merge_flatten(graph)
    assert [type(n).__name__ for n in merged.nodes] == ["Conv"] * 3
    assert merged.nodes[0].weight.shape == (7, 3, 4, 5)  # type: ignore[attr-defined]
    assert merged.nodes[2].weight.shape == (4, 7, 1, 1)  # type: ignore[attr-defined]
    inputs = random_inputs(graph, np.random.default_rng(1), images=3)
    expected, actual = run(graph, inputs), run(merged, inputs)
    for name in graph.outputs:
        assert (expected[name] == actual[name]).all()


def residual(order: str, *, loose: bool = False) -> tuple[GraphBuilder, str]:
    b = builder((8, 4, 4))
    x = b.conv(b.input, 8, bits=4)
    y = b.conv(x, 8, bits=8)
    z = b.conv(x, 8, kernel=(1, 1), padding=(0, 0, 0, 0), bits=8)
    return b, b.add(*((y, z) if order == "yz" else (z, y)), bits=4)


@pytest.mark.parametrize("order", ["yz", "zy"])
def test_the_later_convolution_takes_the_addition(order: str) -> None:
    b, out = residual(order)
    graph = b.finish(out)
    fused = verify_lowered(fuse_add(ARCH)(verify_lowered(lower(graph))))
    assert [n.op for n in fused.nodes] == ["Conv", "Conv", "Conv+Add"]  # type: ignore[attr-defined]
    last = fused.nodes[-1]
    assert isinstance(last, MacLayer)
    assert (last.inputs, last.output, last.path) == (("conv0", "conv1"), "add3", "net.conv2+net.add3")
    assert last.add is not None
    add = graph.nodes[-1]
    factors = (add.k_a, add.k_b) if order == "zy" else (add.k_b, add.k_a)  # type: ignore[attr-defined]
    assert (last.add.k_a, last.add.k_b) == factors
    assert last.add.zero_b == graph.tensors["conv1"].zero
    assert last.zero == graph.tensors["conv2"].zero
    assert last.mode is OutputMode.INT4
    assert "conv2" not in fused.tensors


def test_what_others_read_is_not_fused() -> None:
    b, out = residual("yz")
    graph = b.finish(out, "conv2", "conv1")
    fused = fuse_add(ARCH)(lower(graph))
    assert [n.op for n in fused.nodes] == ["Conv", "Conv", "Conv", "ResidualAdd"]  # type: ignore[attr-defined]
    b = builder((8, 4, 4))
    x = b.conv(b.input, 8)
    graph = b.finish(b.add(x, x))
    assert [n.op for n in fuse_add(ARCH)(lower(graph)).nodes] == ["Conv", "ResidualAdd"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("channels", "window_fused"), [(4, True), (8, False)])
def test_a_convolution_whose_window_leaves_no_room_does_not_take_the_addition(
    channels: int, window_fused: bool, checked: Callable[..., Program]
) -> None:
    # 256 words of 4 nibbles: 250 of the window; of 8 bits per pixel 2 or 4 each of the stored operand and of the sum.
    b = GraphBuilder(np.random.default_rng(3), (40, 6, 6), bits=4)
    z = b.conv(b.input, channels, kernel=(1, 1), padding=(0, 0, 0, 0), bits=8)
    y = b.conv(b.input, channels, kernel=(5, 5), padding=(2, 2, 2, 2), bits=8)
    graph = b.finish(b.add(z, y, bits=8))
    arch = ArchConfig(name="narrow", lanes=4, columns=4, post_lanes=2, acc_depth=16, act_depth=256, weight_depth=256)
    fused = fuse_add(arch)(lower(graph)).nodes[-1]
    assert isinstance(fused, MacLayer)
    assert (fused.op, fused.kernel) == ("Conv+Add", (5, 5) if window_fused else (1, 1))
    checked(graph, arch)


@pytest.mark.parametrize("limits", [(-8, 7), (-7, 7)])
@pytest.mark.parametrize("bits", [4, 8])
def test_planes_add_up(bits: int, limits: tuple[int, int]) -> None:
    low = -(1 << bits - 1)
    weight = np.arange(low, -low).reshape(-1, 1, 1, 1)
    planes = split_weights(weight, bits, limits)
    assert (sum(p.weight * 16**p.shift for p in planes) == weight).all()
    assert all(p.weight.min() >= limits[0] and p.weight.max() <= limits[1] for p in planes)
    expected = {(4, -8): 1, (4, -7): 2, (8, -8): 3, (8, -7): 4}
    assert len(planes) == expected[bits, limits[0]]


def test_training_weights_take_two_planes() -> None:
    codes = np.array([16 * h + low for h in range(-7, 8) for low in range(-7, 8)]).reshape(-1, 1, 1, 1)
    assert len(split_weights(codes, 8, (-7, 7))) == 2


def test_the_constant_of_wide_inputs_joins_the_bias() -> None:
    b = builder()
    x = b.conv(b.input, 4, bits=4, weight_bits=4)
    graph = lower(b.finish(b.avg_pool(x)))
    split = verify_lowered(split_planes((-8, 7))(graph))
    before, after = graph.nodes[0], split.nodes[0]
    assert isinstance(before, MacLayer)
    assert isinstance(after, MacLayer)
    assert before.weight is not None
    assert (after.bias - before.bias == 8 * before.weight.sum(axis=(1, 2, 3))).all()
    assert (split.nodes[1].bias == graph.nodes[1].bias).all()  # type: ignore[attr-defined]


def test_the_verifier_names_what_is_wrong() -> None:
    b = builder((8, 4, 4))
    graph = lower(b.finish(b.conv(b.input, 4, bits=8)))
    verify_lowered(graph)
    node = graph.nodes[0]
    assert isinstance(node, MacLayer)
    for changes, text in (
        ({"mode": OutputMode.INT4}, r"mode INT4 does not write 8 bits"),
        ({"stride": (2, 1)}, r"its output has shape \(4, 4, 4\), but the window gives \(2, 4\)"),
        ({"kind": "identity"}, r"a layer of kind identity has weights"),
        ({"inputs": ("input", "input")}, r"it has 2 inputs, and no addition"),
        ({"bias": node.bias[:2]}, r"bias must have shape \(4,\), not \(2,\)"),
    ):
        broken = dataclasses.replace(node, **changes)  # type: ignore[arg-type]
        with pytest.raises(GraphError, match=text):
            verify_lowered(graph.replace(nodes=(broken,)))
    planes = tuple(dataclasses.replace(p, weight=p.weight + 1) for p in split_weights(node.weight, 8, (-8, 7)))  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="the planes do not add up to the weights"):
        verify_lowered(graph.replace(nodes=(dataclasses.replace(node, planes=planes),)))
    with pytest.raises(GraphError, match="Conv has not been lowered"):
        verify_lowered(b.finish("conv0"))
