"""The integer-graph interpreter against an independent computation in torch float64, and its argument errors."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nibblecore.arch import numerics
from nibblecore.arch.config import get_arch
from nibblecore.ir import (
    AvgPool,
    ChannelMul,
    Concat,
    Conv,
    Flatten,
    Graph,
    Lookup,
    MaxPool,
    ResidualAdd,
    TensorType,
    Upsample,
    run,
    verify,
)
from nibblecore.ir.random_graph import random_inputs, random_network


def conv(rng: np.random.Generator, source: TensorType, output: TensorType, shape: tuple[int, int, int, int],
         weight_bits: int = 4, **geometry: Any) -> Conv:  # fmt: skip
    """A convolution with random codes and records that spread its output over the whole code range and beyond."""
    limit = numerics.W4_LIMIT if weight_bits == 4 else numerics.W8_LIMIT
    out = shape[0]
    low, high = numerics.code_range(8 if output.bits == 32 else output.bits)
    weight = rng.integers(-limit, limit + 1, shape)
    spread = limit * (1 << source.bits - 1) * np.sqrt(np.prod(shape[1:])) / 2
    ratios = rng.uniform(0.3, 2, out) * high / spread * rng.choice([-1, 1], out)
    records = [numerics.quantize_multiplier(float(r)) for r in ratios]
    return Conv(
        output="y", inputs=("x",), path="layer", weight=weight, weight_bits=weight_bits,
        weight_scale=rng.uniform(0.01, 0.1, out), bias=rng.integers(-int(spread), int(spread), out),
        mult=np.array([m for m, _ in records]), shift=np.array([s for _, s in records]),
        stride=geometry.get("stride", (1, 1)), padding=geometry.get("padding", (0, 0, 0, 0)),
        dilation=geometry.get("dilation", (1, 1)), low=geometry.get("low", low), high=high,
        groups=geometry.get("groups", 1),
    )  # fmt: skip


def one_node(node: Any, x: TensorType, y: TensorType) -> Graph:
    return verify(Graph(nodes=(node,), tensors={"x": x, "y": y}, inputs=("x",), outputs=("y",)))


def codes(rng: np.random.Generator, tensor: TensorType, batch: int) -> np.ndarray:
    low, high = numerics.code_range(tensor.bits)
    return rng.integers(low, high + 1, (batch, *tensor.shape))


def reference_round(total: torch.Tensor, mult: np.ndarray, shift: np.ndarray) -> torch.Tensor:
    """floor(total * mult / 2**shift + 1/2); float64 is exact up to 2**53, and 32 + 18 bits are 50."""
    scaled = (
        total * torch.as_tensor(mult)[:, None, None].double() * 0.5 ** torch.as_tensor(shift)[:, None, None].double()
    )
    return torch.floor(scaled + 0.5)


@pytest.mark.parametrize("seed", range(24))
def test_conv_equals_float64(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x_bits, weight_bits, y_bits = (int(rng.choice(c)) for c in ((4, 8), (4, 8), (4, 8, 32)))
    kernel = tuple(int(k) for k in rng.integers(1, 5, 2))
    stride, dilation = (tuple(int(v) for v in rng.integers(1, 4, 2)) for _ in range(2))
    padding = tuple(int(p) for p in rng.integers(0, 3, 4))
    channels, out = (int(c) for c in rng.integers(1, 20, 2))
    rows, cols = (int(n) + dilation[i] * (kernel[i] - 1) for i, n in enumerate(rng.integers(1, 9, 2)))
    x_low, x_high = numerics.code_range(x_bits)
    x_type = TensorType((channels, rows, cols), x_bits, 0.1, int(rng.integers(x_low, x_high + 1)))
    out_rows = (rows + padding[0] + padding[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_cols = (cols + padding[1] + padding[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    y_zero = 0 if y_bits == 32 else int(rng.integers(*numerics.code_range(y_bits)))
    y_type = TensorType((out, out_rows, out_cols), y_bits, 0.2, y_zero)
    node = conv(rng, x_type, y_type, (out, channels, *kernel), weight_bits, stride=stride, dilation=dilation,
                padding=padding, low=numerics.code_range(min(y_bits, 8))[0] + 1)  # fmt: skip
    x = codes(rng, x_type, 3)

    result = run(one_node(node, x_type, y_type), {"x": x})["y"]

    top, left, bottom, right = padding
    padded = F.pad(torch.from_numpy(x).double(), (left, right, top, bottom), value=x_type.zero)
    acc = F.conv2d(padded, torch.from_numpy(node.weight).double(), stride=stride, dilation=dilation)
    total = acc + torch.from_numpy(node.bias)[:, None, None]
    if y_bits != 32:
        total = (reference_round(total, node.mult, node.shift) + y_zero).clamp(node.low, node.high)
        assert len(np.unique(result)) > 3 or result.size < 20, f"seed {seed}: the test saturates"
    assert result.dtype == np.int64
    assert np.array_equal(result, total.numpy()), f"seed {seed}"


@pytest.mark.parametrize("block_bytes", [1, 2000])
def test_blocks_of_rows_do_not_change_the_result(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    x_type, y_type = TensorType((5, 9, 7), 4, 0.1, -8), TensorType((6, 9, 7), 4, 0.1, 0)
    graph = one_node(conv(rng, x_type, y_type, (6, 5, 3, 3), padding=(1, 1, 1, 1)), x_type, y_type)
    x = codes(rng, x_type, 2)
    whole = run(graph, {"x": x})["y"]
    monkeypatch.setattr("nibblecore.ir.interpret._COLUMN_BYTES", block_bytes)
    assert np.array_equal(run(graph, {"x": x})["y"], whole)


def test_sums_that_float32_cannot_hold_are_exact() -> None:
    # 1500 products of -128 * 119 and one of 1: 24 bits of mantissa would lose the 1.
    x_type, y_type = TensorType((1501, 1, 1), 8, 1.0, 0), TensorType((1, 1, 1), 32, 1.0, 0)
    weight = np.full((1, 1501, 1, 1), 119)
    weight[0, 1500] = 1
    node = Conv(output="y", inputs=("x",), path="layer", weight=weight, weight_bits=8, weight_scale=np.ones(1),
                bias=np.zeros(1, np.int64), mult=np.ones(1, np.int64), shift=np.ones(1, np.int64), stride=(1, 1),
                padding=(0, 0, 0, 0), dilation=(1, 1), low=0, high=0)  # fmt: skip
    x = np.full((1, 1501, 1, 1), -128)
    x[0, 1500] = 1
    assert run(one_node(node, x_type, y_type), {"x": x})["y"].item() == -128 * 119 * 1500 + 1


@pytest.mark.parametrize("seed", range(8))
def test_max_pool_equals_torch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = int(rng.choice((4, 8)))
    x_type = TensorType((3, 9, 11), bits, 0.1, 0)
    kernel, stride, dilation = (2, 3), tuple(int(s) for s in rng.integers(1, 4, 2)), (2, 1)
    padding = (1, int(rng.integers(0, 2)))
    x = codes(rng, x_type, 2)
    expected = F.max_pool2d(torch.from_numpy(x).double(), kernel, stride, padding, dilation).numpy()
    y_type = TensorType((3, *expected.shape[2:]), bits, 0.1, 0)
    node = MaxPool(output="y", inputs=("x",), path="pool", kernel=kernel, stride=stride, padding=padding * 2,
                   dilation=dilation)  # fmt: skip
    assert np.array_equal(run(one_node(node, x_type, y_type), {"x": x})["y"], expected), f"seed {seed}"


@pytest.mark.parametrize("seed", range(8))
def test_avg_pool_equals_float64(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x_bits, y_bits = (int(rng.choice((4, 8))) for _ in range(2))
    x_zero = int(rng.integers(*numerics.code_range(x_bits)))
    kernel, stride, padding = (3, 2), (2, 1), (1, 0)
    x_type = TensorType((4, 7, 6), x_bits, 0.1, x_zero)
    x = codes(rng, x_type, 2)
    # avg_pool2d pads with real zero and counts it: pool code minus zero point.
    mean = F.avg_pool2d(torch.from_numpy(x - x_zero).double(), kernel, stride, padding)
    mult, shift = numerics.quantize_multiplier(float(rng.uniform(0.2, 0.7)))
    low, high = numerics.code_range(y_bits)
    y_type = TensorType((4, *mean.shape[2:]), y_bits, 0.1, low)
    node = AvgPool(output="y", inputs=("x",), path="pool", kernel=kernel, stride=stride, padding=padding * 2,
                   bias=-x_zero * 6, mult=mult, shift=shift, low=low, high=high - 1)  # fmt: skip
    expected = torch.floor((mean * 6).round() * mult * 0.5**shift + 0.5) + low
    result = run(one_node(node, x_type, y_type), {"x": x})["y"]
    assert np.array_equal(result, expected.clamp(low, high - 1)), f"seed {seed}"


def test_residual_add_equals_float64() -> None:
    rng = np.random.default_rng(3)
    a_type, b_type = TensorType((4, 3, 2), 8, 0.03, 5), TensorType((4, 3, 2), 4, 0.2, -8)
    y_type = TensorType((4, 3, 2), 4, 0.25, -8)
    k_a, k_b, n = numerics.add_factors(0.03, 0.2, 0.25)
    node = ResidualAdd(output="y", inputs=("a", "b"), path="add", k_a=k_a, k_b=k_b, shift=n, low=-8, high=7)
    graph = verify(Graph(nodes=(node,), tensors={"a": a_type, "b": b_type, "y": y_type}, inputs=("a", "b"),
                         outputs=("y",)))  # fmt: skip
    a, b = codes(rng, a_type, 50), codes(rng, b_type, 50)
    expected = np.clip(np.floor(((a - 5.0) * k_a + (b + 8.0) * k_b) / 2**n + 0.5) - 8, -8, 7)
    assert np.array_equal(run(graph, {"a": a, "b": b})["y"], expected)


@pytest.mark.parametrize(
    ("groups", "inputs", "out"), [(2, 4, 6), (3, 3, 3), (4, 4, 8), (6, 6, 2 * 6), (2, 8, 2), (1, 5, 3)]
)
def test_grouped_conv_equals_a_convolution_of_each_part(groups: int, inputs: int, out: int) -> None:
    rng = np.random.default_rng(groups * 100 + inputs)
    x_type, y_type = TensorType((inputs, 6, 5), 8, 0.1, 3), TensorType((out, 3, 5), 8, 0.1, -7)
    node = conv(rng, x_type, y_type, (out, inputs // groups, 3, 3), groups=groups, stride=(2, 1), padding=(1, 1, 1, 1))
    x = codes(rng, x_type, 2)
    whole = run(one_node(node, x_type, y_type), {"x": x})["y"]
    n, m = inputs // groups, out // groups
    for g in range(groups):
        some = slice(g * m, (g + 1) * m)
        part = dataclasses.replace(
            node, weight=node.weight[some], weight_scale=node.weight_scale[some], bias=node.bias[some],
            mult=node.mult[some], shift=node.shift[some], groups=1,
        )  # fmt: skip
        types = TensorType((n, 6, 5), 8, 0.1, 3), TensorType((m, 3, 5), 8, 0.1, -7)
        assert np.array_equal(run(one_node(part, *types), {"x": x[:, g * n : (g + 1) * n]})["y"], whole[:, some])


def test_lookup_reads_entry_0_for_the_lowest_code() -> None:
    x_type, y_type = TensorType((2, 8, 16), 8, 0.1, 5), TensorType((2, 8, 16), 4, 0.1, -8)
    table = np.random.default_rng(0).integers(-8, 8, 256)
    graph = one_node(Lookup("y", ("x",), "act", table, "tanh"), x_type, y_type)
    x = np.arange(-128, 128).reshape(1, 2, 8, 16)
    assert np.array_equal(run(graph, {"x": x})["y"].ravel(), table)


@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_channel_mul_is_one_factor_per_channel_or_per_value(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    a_type, b_type = TensorType((4, 3, 2), 8, 0.03, 5), TensorType((4, *size), 8, 0.004, -128)
    y_type = TensorType((4, 3, 2), 4, 0.2, -8)
    k, n = numerics.mul_factor(0.03, 0.004, 0.2)
    node = ChannelMul(output="y", inputs=("a", "b"), path="scale", k=k, shift=n, low=-8, high=7)
    graph = verify(Graph((node,), {"a": a_type, "b": b_type, "y": y_type}, ("a", "b"), ("y",)))
    a, b = codes(rng, a_type, 30), codes(rng, b_type, 30)
    result = run(graph, {"a": a, "b": b})["y"]
    assert len(np.unique(result)) > 8
    for index in np.ndindex(result.shape):
        factor = int(b[index] if size != (1, 1) else b[index[:2]][0, 0]) + 128
        want = ((int(a[index]) - 5) * factor * k + 2 ** (n - 1)) // 2**n - 8
        assert result[index] == min(7, max(-8, want))


def test_concat_and_upsample_copy_codes() -> None:
    x_type = TensorType((1, 2, 2), 4, 0.1, 1)
    nodes = (
        Upsample("u", ("x",), "up", (2, 3)),
        MaxPool("m", ("u",), "pool", (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
        Concat("y", ("u", "m", "u"), "cat"),
    )
    big = TensorType((1, 4, 6), 4, 0.1, 1)
    tensors = {"x": x_type, "u": big, "m": big, "y": TensorType((3, 4, 6), 4, 0.1, 1)}
    result = run(verify(Graph(nodes, tensors, ("x",), ("y",))), {"x": np.array([[[[-8, 1], [2, -3]]]])})["y"][0]
    assert result[0].tolist() == [[-8, -8, -8, 1, 1, 1]] * 2 + [[2, 2, 2, -3, -3, -3]] * 2
    assert np.array_equal(result[2], result[0])
    assert result[1].tolist()[0] == [-8, -8, 1, 1, 1, 1]


def random_graph(seed: int) -> Graph:
    rng = np.random.default_rng(seed)
    return random_network(rng, get_arch("tiny"), blocks=5, size=int(rng.integers(5, 10)), every_operator=True)


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_of_every_operator_equal_float64(seed: int, evaluate: Callable[..., Any]) -> None:
    graph = random_graph(seed)
    inputs = random_inputs(graph, np.random.default_rng(seed), images=2)
    expected = evaluate(graph, inputs)
    for name, result in run(graph, inputs, keep=True).items():
        assert np.array_equal(result, expected[name]), f"seed {seed}, tensor {name}"


def test_random_graphs_contain_every_operator_only_where_asked_for() -> None:
    new = (Lookup, ChannelMul, Concat, Upsample)
    drawn = Counter(type(n) for seed in range(40) for n in random_graph(seed).nodes)
    assert all(drawn[kind] >= 5 for kind in (Conv, ResidualAdd, MaxPool, AvgPool, Flatten, *new)), drawn
    groups = [n.groups for seed in range(40) for n in random_graph(seed).nodes if isinstance(n, Conv)]
    assert sum(g > 1 for g in groups) >= 10
    for seed in range(40):
        for node in random_network(np.random.default_rng(seed), get_arch("tiny"), blocks=5).nodes:
            assert not isinstance(node, new)
            assert getattr(node, "groups", 1) == 1


def test_flatten_puts_channels_outermost_and_keep_returns_everything() -> None:
    x_type, y_type = TensorType((2, 2, 3), 4, 0.1, 0), TensorType((12, 1, 1), 4, 0.1, 0)
    graph = one_node(Flatten(output="y", inputs=("x",), path="flatten"), x_type, y_type)
    x = np.arange(-6, 6).reshape(1, 2, 2, 3)
    assert run(graph, {"x": x})["y"].ravel().tolist() == list(range(-6, 6))
    assert set(run(graph, {"x": x})) == {"y"}
    assert set(run(graph, {"x": x}, keep=True)) == {"x", "y"}


def test_an_output_that_is_also_read_survives() -> None:
    t = TensorType((1, 4, 4), 4, 0.1, 0)
    small = TensorType((1, 2, 2), 4, 0.1, 0)
    pool = MaxPool(output="y", inputs=("x",), path="a", kernel=(2, 2), stride=(2, 2), padding=(0,) * 4, dilation=(1, 1))
    flat = Flatten(output="z", inputs=("y",), path="b")
    graph = verify(Graph(nodes=(pool, flat), tensors={"x": t, "y": small, "z": TensorType((4, 1, 1), 4, 0.1, 0)},
                         inputs=("x",), outputs=("y", "z")))  # fmt: skip
    assert set(run(graph, {"x": np.zeros((1, 1, 4, 4), int)})) == {"y", "z"}


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ({}, ValueError, r"^the graph's inputs are x, not none$"),
        ({"x": np.zeros((1, 1, 4, 4), int), "w": 0}, ValueError, r"^the graph's inputs are x, not x, w$"),
        ({"x": np.zeros((1, 1, 4, 4))}, TypeError, r"^input x must hold integer codes, not float64$"),
        ({"x": np.zeros((1, 4, 4), int)}, ValueError, r"^input x must have shape \(N, 1, 4, 4\), not \(1, 4, 4\)$"),
        ({"x": np.full((1, 1, 4, 4), 8)}, ValueError, r"^input x has codes 8\.\.8, outside -8\.\.7$"),
    ],
)
def test_input_errors(inputs: dict[str, Any], error: type[Exception], text: str) -> None:
    flat = Flatten(output="y", inputs=("x",), path="f")
    graph = one_node(flat, TensorType((1, 4, 4), 4, 0.1, 0), TensorType((16, 1, 1), 4, 0.1, 0))
    with pytest.raises(error, match=text):
        run(graph, inputs)


def test_inputs_of_different_batch_sizes() -> None:
    t = TensorType((1, 1, 1), 4, 0.1, 0)
    node = ResidualAdd(output="y", inputs=("a", "b"), path="add", k_a=1, k_b=1, shift=1, low=-8, high=7)
    graph = Graph(nodes=(node,), tensors={"a": t, "b": t, "y": t}, inputs=("a", "b"), outputs=("y",))
    with pytest.raises(ValueError, match=r"^all inputs must have the same number of images$"):
        run(graph, {"a": np.zeros((1, 1, 1, 1), int), "b": np.zeros((2, 1, 1, 1), int)})


def test_a_sum_beyond_32_bits_is_an_error_not_a_wrap() -> None:
    rng = np.random.default_rng(0)
    x_type, y_type = TensorType((1, 1, 1), 4, 0.1, 0), TensorType((1, 1, 1), 4, 0.1, 0)
    node = conv(rng, x_type, y_type, (1, 1, 1, 1))
    node.weight[:], node.bias[:] = 7, 2**31 - 1
    graph = Graph(nodes=(node,), tensors={"x": x_type, "y": y_type}, inputs=("x",), outputs=("y",))
    with pytest.raises(
        OverflowError, match=r"^layer: acc \+ bias is 2147483654\.\.2147483654 and does not fit 32 bits$"
    ):
        run(graph, {"x": np.ones((1, 1, 1, 1), int)})
