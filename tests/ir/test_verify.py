"""Every rule of the graph verifier has a text, and broken rules are reported together."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from nibblecore.errors import GraphError
from nibblecore.ir import (
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
    verify,
)

X = TensorType((2, 4, 4), 4, 0.1, -8)
Y = TensorType((3, 4, 4), 4, 0.2, 0)
POOLED = TensorType((2, 2, 2), 4, 0.1, -8)
AVERAGED = TensorType((2, 2, 2), 8, 0.05, -128)
SUM = TensorType((2, 4, 4), 8, 0.3, 1)
BYTES = TensorType((2, 4, 4), 8, 0.1, -8)


def node(kind: type[Node], **changes: Any) -> Any:
    common = {"output": "y", "inputs": ("x",), "path": "body.layer"}
    defaults: dict[type[Node], dict[str, Any]] = {
        Conv: {"weight": np.ones((3, 2, 3, 3), np.int64), "weight_bits": 4, "weight_scale": np.full(3, 0.1),
               "bias": np.zeros(3, np.int64), "mult": np.full(3, 70000), "shift": np.full(3, 20), "stride": (1, 1),
               "padding": (1, 1, 1, 1), "dilation": (1, 1), "low": -8, "high": 7},
        ResidualAdd: {"inputs": ("x", "x"), "k_a": 9, "k_b": -9, "shift": 4, "low": -128, "high": 127},
        MaxPool: {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0), "dilation": (1, 1)},
        AvgPool: {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0), "bias": 32, "mult": 70000, "shift": 16,
                  "low": -128, "high": 127},
        Flatten: {},
        ChannelMul: {"inputs": ("x", "x"), "k": -9, "shift": 4, "low": -128, "high": 127},
        Lookup: {"table": np.arange(256) % 16 - 8},
        Concat: {"inputs": ("x", "x")},
        Upsample: {"factor": (2, 3)},
    }  # fmt: skip
    return kind(**{**common, **defaults[kind], **changes})


def graph(*nodes: Node, y: TensorType = Y, **changes: Any) -> Graph:
    values: dict[str, Any] = {"tensors": {"x": X, "y": y}, "inputs": ("x",), "outputs": ("y",)}
    return Graph(nodes=nodes, **{**values, **changes})


def broken(g: Graph) -> list[str]:
    with pytest.raises(GraphError) as caught:
        verify(g)
    assert str(caught.value) == "\n".join(caught.value.violations)
    return caught.value.violations


@pytest.mark.parametrize(
    ("kind", "y"),
    [(Conv, Y), (ResidualAdd, SUM), (MaxPool, POOLED), (AvgPool, AVERAGED),
     (Flatten, dataclasses.replace(X, shape=(32, 1, 1))),
     (Conv, TensorType((3, 4, 4), 32, (0.1, 0.2, 0.3), 0)), (ChannelMul, SUM),
     (Concat, dataclasses.replace(X, shape=(4, 4, 4))), (Upsample, dataclasses.replace(X, shape=(2, 8, 12)))],
)  # fmt: skip
def test_sound_graphs_pass_unchanged(kind: type[Node], y: TensorType) -> None:
    g = graph(node(kind), y=y)
    assert verify(g) is g


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"inputs": ()}, "the graph has no input"),
        ({"outputs": ()}, "the graph has no output"),
        ({"outputs": ("y", "y")}, "output y is named twice"),
        ({"nodes": (Node(output="y", inputs=("x",), path="odd"),)},
         "odd: Node is not a node of the integer graph"),
        ({"nodes": (node(ResidualAdd, inputs=("x",)),)}, "body.layer: ResidualAdd reads 2 tensors, not 1"),
        ({"nodes": (node(ChannelMul, inputs=("x",)),)}, "body.layer: ChannelMul reads 2 tensors, not 1"),
        ({"nodes": (node(Concat, inputs=("x",)),)}, "body.layer: Concat reads 2 tensors or more, not 1"),
        ({"nodes": (node(Conv, inputs=("x", "x")),)}, "body.layer: Conv reads 1 tensor, not 2"),
        ({"nodes": (node(Conv, inputs=("later",)),)},
         "body.layer: tensor later is read before any node has written it"),
        ({"nodes": (node(Conv), node(Conv))}, "body.layer: tensor y is written a second time"),
        ({"outputs": ("y", "z")}, "output z is written by no node"),
        ({"tensors": {"x": X}}, "tensor y has no type"),
        ({"tensors": {"x": X, "y": Y, "w": Y}}, "tensor w has a type, but no node writes it"),
    ],
)  # fmt: skip
def test_references(changes: dict[str, Any], text: str) -> None:
    assert text in broken(graph(node(Conv)).replace(**changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shape": (3, 0, 4)}, "tensor y must have three positive sizes, not (3, 0, 4)"),
        ({"bits": 5}, "tensor y must have 4, 8 or 32 bits, not 5"),
        ({"scale": 0.0}, "tensor y must have positive finite scales, not 0.0"),
        ({"scale": float("nan")}, "tensor y must have positive finite scales, not nan"),
        ({"scale": (0.1, 0.2, 0.3)}, "tensor y has 4 bits and must have one scale, not 3"),
        ({"bits": 32, "scale": (0.1, 0.2)}, "tensor y must have one scale or 3, not 2"),
        ({"zero": 8}, "tensor y must have a zero point in -8..7, not 8"),
        ({"bits": 32, "zero": 1}, "tensor y must have a zero point in 0..0, not 1"),
    ],
)
def test_tensor_types(changes: dict[str, Any], text: str) -> None:
    assert text in broken(graph(node(Conv), y=dataclasses.replace(Y, **changes)))


def test_raw_tensors_leave_the_core() -> None:
    raw = TensorType((3, 4, 4), 32, 0.1, 0)
    g = graph(node(Conv), node(MaxPool, inputs=("y",), output="z"), outputs=("z",),
              tensors={"x": X, "y": raw, "z": TensorType((3, 2, 2), 32, 0.1, 0)})  # fmt: skip
    assert broken(g)[:2] == [
        "tensor y has 32 bits and leaves the core, but a node reads it",
        "tensor z has 32 bits, but only a Conv writes such a tensor",
    ]


@pytest.mark.parametrize(
    ("kind", "y", "changes", "text"),
    [
        (Conv, Y, {"weight": np.ones((3, 2, 3, 3))}, "weight must be int64, not float64"),
        (Conv, Y, {"weight": np.ones((3, 2), np.int64)},
         "weight must have shape (out, in / groups, kernel_y, kernel_x), not (3, 2)"),
        (Conv, Y, {"groups": 0}, "groups must be at least 1, not 0"),
        (Conv, Y, {"groups": 2}, "weight has 2 input channels in each of 2 groups, but its input 2"),
        (Conv, Y, {"weight": np.ones((3, 1, 3, 3), np.int64), "groups": 2},
         "weight has 3 output channels, which 2 groups do not divide"),
        (Conv, Y, {"weight": np.ones((3, 5, 3, 3), np.int64)}, "weight has 5 input channels, but its input 2"),
        (Conv, Y, {"bias": np.zeros(2, np.int64)}, "bias must have shape (3,), not (2,)"),
        (Conv, Y, {"stride": (0, 1)}, "stride must be 2 integers of at least 1, not (0, 1)"),
        (Conv, Y, {"padding": (1, 1)}, "padding must be 4 integers of at least 0, not (1, 1)"),
        (Conv, Y, {"dilation": (2, 1)}, "its output has shape (3, 4, 4), but the window gives (3, 2, 4)"),
        (Conv, Y, {"weight_bits": 3}, "weight_bits must be 4 or 8, not 3"),
        (Conv, Y, {"weight": np.full((3, 2, 3, 3), 8)}, "weight codes must be in -8..7, not 8..8"),
        (Conv, Y, {"weight_scale": np.zeros(3)}, "weight_scale must be positive and finite"),
        (Conv, Y, {"bias": np.full(3, 2**31)}, "bias must be in -2147483648..2147483647, not 2147483648..2147483648"),
        (Conv, Y, {"mult": np.full(3, -(2**17) - 1)}, "mult must be in -131072..131071, not -131073..-131073"),
        (Conv, Y, {"shift": np.array([0, 1, 48])}, "shift must be in 1..47, not 0..48"),
        (Conv, Y, {"low": -9}, "low and high must be ordered and in -8..7, not -9 and 7"),
        (Conv, Y, {"low": 3, "high": 2}, "low and high must be ordered and in -8..7, not 3 and 2"),
        (Conv, Y, {"bias": np.array([0, 2**31 - 100, 0])},
         "acc + bias of channel 1 can be 2147483404..2147483674 and does not fit 32 bits"),
        (ResidualAdd, POOLED, {"low": -8, "high": 7},
         "both operands and the sum must have one shape, not (2, 4, 4), (2, 4, 4) and (2, 2, 2)"),
        (ResidualAdd, SUM, {"k_b": 2**15}, "k_b must be in -32768..32767, not 32768..32768"),
        (ResidualAdd, SUM, {"shift": 32}, "shift must be in 1..31, not 32..32"),
        (ResidualAdd, SUM, {"high": 128}, "low and high must be ordered and in -128..127, not -128 and 128"),
        (MaxPool, dataclasses.replace(POOLED, scale=0.2), {},
         "codes pass through, but bits, scale and zero point change from (4, 0.1, -8) to (4, 0.2, -8)"),
        (MaxPool, POOLED, {"kernel": (3, 2)}, "its output has shape (2, 2, 2), but the window gives (2, 1, 2)"),
        (MaxPool, TensorType((2, 4, 2), 4, 0.1, -8), {"padding": (2, 0, 2, 0)},
         "padding (2, 0, 2, 0) must be smaller than the window of 2x2"),
        (AvgPool, AVERAGED, {"mult": 2**17}, "mult must be in -131072..131071, not 131072..131072"),
        (AvgPool, AVERAGED, {"low": -129}, "low and high must be ordered and in -128..127, not -129 and 127"),
        (AvgPool, AVERAGED, {"bias": 2**31 - 1},
         "sum + bias can be 2147483615..2147483675 and does not fit 32 bits"),
        (AvgPool, AVERAGED, {"stride": (1, 2)}, "its output has shape (2, 2, 2), but the window gives (2, 3, 2)"),
        (Flatten, dataclasses.replace(X, shape=(31, 1, 1)), {},
         "its output must have shape (32, 1, 1), not (31, 1, 1)"),
        (ChannelMul, POOLED, {"low": -8, "high": 7},
         "the first operand and the product must have one shape, not (2, 4, 4) and (2, 2, 2)"),
        (ChannelMul, SUM, {"k": 2**15}, "k must be in -32768..32767, not 32768..32768"),
        (ChannelMul, SUM, {"shift": 0}, "shift must be in 1..31, not 0..0"),
        (ChannelMul, SUM, {"low": 128}, "low and high must be ordered and in -128..127, not 128 and 127"),
        (Lookup, Y, {}, "input and output must have one shape, not (2, 4, 4) and (3, 4, 4)"),
        (Lookup, SUM, {}, "its input must have 8 bits, not 4"),
        (Lookup, SUM, {"table": np.zeros(256)}, "table must be int64, not float64"),
        (Lookup, SUM, {"table": np.zeros(255, np.int64)}, "table must have shape (256,), not (255,)"),
        (Lookup, X, {"table": np.full(256, 8)}, "table must be in -8..7, not 8..8"),
        (Concat, SUM, {},
         "codes pass through, but bits, scale and zero point are (4, 0.1, -8) and (8, 0.3, 1)"),
        (Concat, X, {}, "its output must have shape (4, 4, 4), not (2, 4, 4)"),
        (Upsample, Y, {"factor": (1, 1)},
         "codes pass through, but bits, scale and zero point change from (4, 0.1, -8) to (4, 0.2, 0)"),
        (Upsample, X, {"factor": (0, 1)}, "factor must be 2 integers of at least 1, not (0, 1)"),
        (Upsample, X, {}, "its output must have shape (2, 8, 12), not (2, 4, 4)"),
    ],
)  # fmt: skip
def test_nodes(kind: type[Node], y: TensorType, changes: dict[str, Any], text: str) -> None:
    assert f"body.layer: {text}" in broken(graph(node(kind, **changes), y=y))


def test_a_lookup_of_bytes_is_sound() -> None:
    g = graph(node(Lookup), tensors={"x": BYTES, "y": X})
    assert verify(g) is g


def test_the_second_operand_of_a_product() -> None:
    tensors = {"x": X, "b": dataclasses.replace(X, shape=(2, 4, 1)), "y": SUM}
    g = graph(node(ChannelMul, inputs=("x", "b")), tensors=tensors, inputs=("x", "b"))
    assert broken(g) == ["body.layer: the second operand must have shape (2, 4, 4) or (2, 1, 1), not (2, 4, 1)"]
    verify(g.replace(tensors={**tensors, "b": dataclasses.replace(X, shape=(2, 1, 1))}))


def test_parts_of_different_sizes() -> None:
    tensors = {"x": X, "b": dataclasses.replace(X, shape=(2, 2, 3)), "y": X}
    g = graph(node(Concat, inputs=("x", "b")), tensors=tensors, inputs=("x", "b"))
    assert broken(g) == ["body.layer: its inputs must have the same rows and columns, not 2x3 and 4x4"]


def test_the_worst_case_includes_the_most_negative_code() -> None:
    # 18 weights of -7 times the code -8 reach 1008 above the bias.
    weight = np.full((3, 2, 3, 3), -7)
    fits = np.full(3, 2**31 - 1 - 1008)
    verify(graph(node(Conv, weight=weight, bias=fits)))
    assert "does not fit 32 bits" in broken(graph(node(Conv, weight=weight, bias=fits + 1)))[0]


def test_all_violations_at_once() -> None:
    violations = broken(graph(node(Conv, low=-9, mult=np.full(3, 2**17), shift=np.zeros(3, np.int64))))
    assert len(violations) == 3
