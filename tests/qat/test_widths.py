"""Grids of 2, 3, 4 and 8 bits: codes, storage, signedness, granularity, power-of-two steps, overrides."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nibblecore import ir
from nibblecore.arch.config import get_arch
from nibblecore.compiler.pipeline import compile_graph
from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.qat import LsqOptions, Override, QConfig, QuantModel, calibrate, convert, prepare
from nibblecore.qat.layers import QuantLayer
from nibblecore.qat.lsq import LsqActivations, LsqWeights, NearestPowerOfTwo
from nibblecore.qat.methods import ActQuantizer
from nibblecore.runtime.device import Device
from nibblecore.runtime.transport import GoldenTransport

EXAMPLE = torch.zeros(1, 1, 8, 8)


def ready(qconfig: QConfig, seed: int = 0) -> tuple[QuantModel, Tensor]:
    torch.manual_seed(seed)
    model = prepare(resnet8_digits(), qconfig, EXAMPLE)
    x = torch.rand(16, 1, 8, 8)
    calibrate(model, [x])
    return model.eval(), x


@pytest.mark.parametrize(
    ("bits", "full", "low", "high"),
    [(2, False, -2, 1), (3, False, -4, 3), (4, False, -7, 7), (4, True, -8, 7), (8, False, -119, 119)],
)
def test_weight_grids(bits: int, full: bool, low: int, high: int) -> None:
    weight = torch.linspace(-200, 200, 2001).reshape(1, -1)
    quantizer = LsqWeights(weight, bits, full_range=full)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    codes = quantizer.codes(weight)
    assert (int(codes.min()), int(codes.max())) == (low, high)
    if bits < 8:
        assert set(codes[0].tolist()) == set(range(low, high + 1))
    assert torch.equal(quantizer(weight), codes.float())
    assert quantizer.storage_bits == (8 if bits == 8 else 4)


@pytest.mark.parametrize(
    ("bits", "unsigned", "rectified", "low", "high", "zero"),
    [
        (2, True, False, 0, 3, -8),
        (3, True, False, 0, 7, -8),
        (4, True, False, 0, 15, -8),
        (8, True, False, 0, 255, -128),
        (2, False, False, -2, 1, 0),
        (3, False, False, -4, 3, 0),
        (3, False, True, 0, 3, 0),
        (8, False, True, 0, 127, 0),
    ],
)
def test_activation_grids(bits: int, unsigned: bool, rectified: bool, low: int, high: int, zero: int) -> None:
    quantizer = LsqActivations(bits, unsigned, 1, rectified=rectified)
    with torch.no_grad():
        quantizer.step.fill_(0.5)
    got = quantizer(torch.linspace(-200, 200, 4001)) / 0.5
    assert set(got.tolist()) == set(range(low, high + 1))
    assert quantizer.zero == zero
    # Stored codes fit what they are stored in.
    half = 1 << quantizer.storage_bits - 1
    assert -half <= zero + low <= zero + high < half


@pytest.mark.parametrize("bits", [2, 3])
def test_gradients_on_asymmetric_weight_grids(bits: int) -> None:
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    step = 0.25
    u = [low - 1.0, low, low + 0.25, 0.0, 0.25, high - 0.25, high, high + 0.25, high + 2.0]
    weight = torch.tensor([[step * v for v in u]], requires_grad=True)
    quantizer = LsqWeights(weight, bits)
    with torch.no_grad():
        quantizer.step.fill_(step)
    upstream = torch.linspace(-1, 2, len(u))
    quantizer(weight).backward(upstream[None])
    slopes = [low if v <= low else high if v >= high else round(v) - v for v in u]
    expected = sum(g * d for g, d in zip(upstream.tolist(), slopes, strict=True)) / math.sqrt(len(u) * high)
    assert quantizer.step.grad is not None
    assert weight.grad is not None
    assert quantizer.step.grad.item() == pytest.approx(expected)
    assert weight.grad[0].tolist() == [g * (low < v < high) for g, v in zip(upstream.tolist(), u, strict=True)]


def test_one_step_for_all_channels() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    quantizer = LsqWeights(weight, 4, per_channel=False).double()
    assert quantizer.step.shape == (1,)
    expected = min(2 * float(weight.abs().mean()) / math.sqrt(7), float(weight.abs().max()) / 7)
    assert quantizer.step.tolist() == [pytest.approx(expected)]
    assert quantizer.scale(weight).tolist() == [pytest.approx(expected)] * 5
    upstream = torch.randn_like(weight)
    quantizer(weight).backward(upstream)
    u = (weight / quantizer.step).detach()
    slope = torch.where(u.abs() < 7, u.round() - u, 7 * u.sign())
    assert quantizer.step.grad is not None
    # N is all weights of the layer.
    assert quantizer.step.grad.item() == pytest.approx(float((upstream * slope).sum()) / math.sqrt(180 * 7))


@pytest.mark.parametrize(
    ("options", "weight_factor", "act_factor"),
    [
        (LsqOptions(), 1 / math.sqrt(36 * 7), 1 / math.sqrt(50 * 15)),
        (LsqOptions(grad_scale=False), 1.0, 1.0),
        (LsqOptions(weight_count="layer"), 1 / math.sqrt(108 * 7), 1 / math.sqrt(50 * 15)),
        (LsqOptions(act_count="batch"), 1 / math.sqrt(36 * 7), 1 / math.sqrt(400 * 15)),
    ],
)
def test_definitions_of_the_gradient_scale(options: LsqOptions, weight_factor: float, act_factor: float) -> None:
    weights = LsqWeights(torch.ones(3, 4, 3, 3), 4, options=options)
    weights(torch.full((3, 4, 3, 3), 1e3)).sum().backward()
    assert weights.step.grad is not None
    assert weights.step.grad.tolist() == [pytest.approx(36 * 7 * weight_factor)] * 3
    acts = LsqActivations(4, True, 50, options=options)
    with torch.no_grad():
        acts.step.fill_(1.0)
    acts(torch.full((8, 50), 1e3)).sum().backward()
    assert acts.step.grad is not None
    assert float(acts.step.grad) == pytest.approx(8 * 50 * 15 * act_factor)


def test_powers_of_two() -> None:
    steps = torch.tensor([1.0, 0.25, 0.7, 0.72, 3.0, 2**-20], requires_grad=True)
    result: Tensor = NearestPowerOfTwo.apply(steps)
    # 2**-0.5 = 0.7071 is where the exponent rounds to the other side.
    assert result.tolist() == [1.0, 0.25, 0.5, 1.0, 4.0, 2**-20]
    result.sum().backward()
    assert steps.grad is not None
    assert steps.grad.tolist() == pytest.approx((result / steps).tolist())
    assert math.isnan(float(NearestPowerOfTwo.apply(torch.tensor(math.nan))))


def test_power_of_two_steps_make_power_of_two_multipliers(compare: Any) -> None:
    model, x = ready(QConfig(scale_kind="power_of_two", first_last_bits=4), 3)
    graph = convert(model)
    for node in graph.nodes:
        if isinstance(node, ir.Conv) and node.inputs != ("x",) and graph.tensors[node.output].bits != 32:
            assert set(node.mult.tolist()) == {1 << 16}, node.path
    scales = [t.scale for name, t in graph.tensors.items() if t.bits != 32 and name != "x"]
    assert all(isinstance(s, float) and math.frexp(s)[0] == 0.5 for s in scales)
    compare(model, graph, x)


@pytest.mark.parametrize(("weight_bits", "act_bits"), list(itertools.product((2, 3, 4, 8), repeat=2)))
def test_integers_of_every_width(weight_bits: int, act_bits: int, compare: Any) -> None:
    qconfig = QConfig(
        weight_bits=weight_bits,
        act_bits=act_bits,
        first_last_bits=max(weight_bits, act_bits),
        residual_bits=act_bits,
        shortcut_bits=act_bits,
        granularity="tensor" if weight_bits == act_bits else "channel",
        weight_range="full" if act_bits == 3 else "narrow",
    )
    model, x = ready(qconfig, weight_bits * 10 + act_bits)
    graph = convert(model)
    for node in graph.nodes:
        if isinstance(node, ir.Conv) and node.path.startswith("stage"):
            module = model.get_submodule(node.path)
            assert isinstance(module, QuantLayer)
            quantizer = module.weight_quantizer
            assert quantizer.low <= node.weight.min() <= node.weight.max() <= quantizer.high
            assert node.weight_bits == (8 if weight_bits == 8 else 4)
    codes = ir.run(graph, {"x": ir.quantize(x.numpy(), graph.tensors["x"])}, keep=True)
    for path, tensor in graph.tensors.items():
        if path.startswith("stage"):
            assert tensor.bits == (8 if act_bits == 8 else 4)
            assert codes[path].max() - codes[path].min() < 1 << act_bits, path
    compare(model, graph, x)


def test_2_and_3_bits_on_the_core() -> None:
    """The program computes what the interpreter does, clamps of narrow grids in fused sums and pools included."""
    overrides = (Override(pattern="stage2.*", weight_bits=3, act_bits=3), Override(pattern="stage3.add", signed=True))
    qconfig = QConfig(
        weight_bits=2, act_bits=2, residual_bits=3, shortcut_bits=2, first_last_bits=3, overrides=overrides
    )
    model, x = ready(qconfig, 1)
    graph = convert(model)
    program = compile_graph(graph, get_arch("small"))
    device = Device(GoldenTransport(program.arch))
    device.load(program)
    codes = ir.quantize(x[:1].numpy(), graph.tensors["x"])
    want = ir.run(graph, {"x": codes})
    for name, got in device.run(codes[0]).outputs.items():
        assert np.array_equal(got, want[name][0])


def test_overrides_of_every_kind(compare: Any) -> None:
    qconfig = QConfig(
        overrides=(
            Override(pattern="stage1.*", granularity="tensor", weight_range="full"),
            Override(pattern="stage1.add", signed=True, act_bits=3),
            Override(pattern="stage2.*", scale_kind="power_of_two", calibration="minmax"),
            Override(pattern="stage2.conv2", scale_kind="free", signed=False),
        )
    )
    model, x = ready(qconfig)

    def weights(path: str) -> Any:
        return model.get_submodule(path).weight_quantizer

    def acts(path: str) -> Any:
        return model.get_submodule(path).output_quantizer

    assert weights("stage1.conv1").step.shape == (1,)
    assert weights("stage1.conv1").low == -8
    assert weights("stage2.conv1").step.shape == weights("stage2.conv1").scale(torch.zeros(32)).shape
    # Behind a ReLU with signed codes: half of the grid.
    assert (acts("stage1.add").low, acts("stage1.add").high, acts("stage1.add").zero) == (0, 3, 0)
    assert math.frexp(float(acts("stage2.conv1").scale().detach()))[0] == 0.5
    assert math.frexp(float(acts("stage2.conv2").scale().detach()))[0] != 0.5
    assert acts("stage2.conv2").unsigned
    assert acts("stage2.conv1").calibration == "minmax"
    graph = convert(model)
    add = next(n for n in graph.nodes if n.path == "stage1.add")
    assert isinstance(add, ir.ResidualAdd)
    assert (add.low, add.high) == (0, 3)
    compare(model, graph, x)


def test_signedness_of_the_whole_network(compare: Any) -> None:
    model, x = ready(QConfig(signed=True))
    assert not any(m.unsigned for m in model.modules() if isinstance(m, ActQuantizer))
    compare(model, convert(model), x)


def test_the_input_stays_in_nibbles_and_bytes() -> None:
    assert prepare(nn.Sequential(nn.Conv2d(1, 2, 3)), QConfig(first_last_bits=2), EXAMPLE).input.bits == 4
    with pytest.raises(ValueError, match=r"^act_bits of the network's input x must be 4 or 8, not 2$"):
        prepare(resnet8_digits(), QConfig(overrides=(Override(pattern="x", act_bits=2),)), EXAMPLE)
