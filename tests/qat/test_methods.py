"""LSQ+, TQT, IAO, PACT and DoReFa against their equations, and the integers of each."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.arch.config import get_arch
from nibblecore.compiler.pipeline import compile_graph
from nibblecore.errors import CompileError
from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.qat import (
    METHODS,
    DorefaOptions,
    IaoOptions,
    LsqOptions,
    LsqPlusOptions,
    Override,
    QConfig,
    QuantModel,
    calibrate,
    clipping_penalty,
    convert,
    prepare,
)
from nibblecore.qat.dorefa import DorefaActivations, DorefaWeights
from nibblecore.qat.iao import IaoActivations, MinMaxWeights
from nibblecore.qat.lsq_plus import LsqPlus, LsqPlusActivations, LsqPlusWeights
from nibblecore.qat.pact import PactActivations
from nibblecore.qat.tqt import ThresholdStep, TqtActivations, TqtWeights
from nibblecore.runtime.device import Device
from nibblecore.runtime.transport import GoldenTransport

EXAMPLE = torch.zeros(1, 1, 8, 8)


def ready(qconfig: QConfig, seed: int = 0, train: int = 0) -> tuple[QuantModel, Tensor]:
    torch.manual_seed(seed)
    model = prepare(resnet8_digits(), qconfig, EXAMPLE)
    x = torch.rand(16, 1, 8, 8)
    calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(train):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(16) % 10).backward()
        optimizer.step()
    return model.eval(), x


CONFIGS = [
    *(QConfig(method=name) for name in sorted(METHODS) if name != "dorefa"),
    QConfig(method="lsq+", weight_bits=2, act_bits=2, residual_bits=2, shortcut_bits=3, first_last_bits=4),
    QConfig(method="iao", weight_bits=3, act_bits=3, granularity="tensor", residual_bits=4),
    QConfig(method="tqt", first_last_bits=4, granularity="tensor", residual_bits=4, shortcut_bits=4),
    QConfig(method="pact", signed=True, scale_kind="power_of_two"),
    QConfig(method="dorefa", weight_bits=2, act_bits=2, first_last_bits=8),
    QConfig(method="dorefa", weight_bits=3, act_bits=3, first_last_bits=3, residual_bits=4),
    QConfig(overrides=(Override(pattern="stage2.*", method="lsq+"), Override(pattern="stage3.*", method="tqt"))),
]


@pytest.mark.parametrize("qconfig", CONFIGS, ids=lambda q: f"{q.method}-W{q.weight_bits}A{q.act_bits}")
def test_integers(qconfig: QConfig, compare: Any) -> None:
    model, x = ready(qconfig, train=2)
    compare(model, convert(model), x)


@pytest.mark.parametrize("method", ["lsq+", "iao"])
def test_zero_points_on_the_core(method: str) -> None:
    model, x = ready(QConfig(method=method, residual_bits=4, shortcut_bits=4), 2)
    graph = convert(model)
    zeros = {t.zero for t in graph.tensors.values() if t.bits == 4}
    assert len(zeros) > 1, zeros
    program = compile_graph(graph, get_arch("small"))
    device = Device(GoldenTransport(program.arch))
    device.load(program)
    codes = ir.quantize(x[:1].numpy(), graph.tensors["x"])
    want = ir.run(graph, {"x": codes})
    for name, got in device.run(codes[0]).outputs.items():
        assert np.array_equal(got, want[name][0])


def test_state_and_copies_of_every_method() -> None:
    for name in METHODS:
        bits = 2 if name == "dorefa" else 4
        model, x = ready(QConfig(method=name, weight_bits=bits), train=1)
        other = prepare(resnet8_digits(), QConfig(method=name, weight_bits=bits), EXAMPLE).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x)), name
        assert torch.equal(copy.deepcopy(model)(x), model(x)), name


def test_options_survive_json() -> None:
    options = (LsqOptions(grad_scale=False), LsqPlusOptions(act_count="batch"), IaoOptions(decay=0.9, delay=3),
               DorefaOptions(restore=False))  # fmt: skip
    qconfig = QConfig(method="iao", options=options)
    assert QConfig.from_json(qconfig.to_json()) == qconfig


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LsqOptions(act_count="x"), r"^act_count of LsqOptions must be one of 'features', 'batch', not 'x'$"),
        (lambda: IaoOptions(decay=1.0), r"^decay of IaoOptions must be at least 0 and less than 1, not 1\.0$"),
        (lambda: IaoOptions(delay=-1), r"^delay of IaoOptions must be an integer of at least 0, not -1$"),
        (lambda: QConfig(options=(LsqOptions(), LsqOptions())), r"^options must hold one item for each method, not "),
        (lambda: QConfig(granularity="row"), r"^granularity must be 'channel' or 'tensor', not 'row'$"),
        (lambda: QConfig(calibration="best"), r"^calibration must be one of method, .*, not 'best'$"),
        (lambda: Override(pattern="a", scale_kind="x"),
         r"^scale_kind of override 'a' must be 'free' or 'power_of_two', not 'x'$"),
        (lambda: QConfig.from_json('{"overrides": [], "options": [{"method": "x"}]}'),
         r"^there is no training method 'x' with options$"),
        (lambda: prepare(resnet8_digits(), QConfig(method="lsq+", options=(LsqOptions(),)), EXAMPLE),
         r"^options hold LsqOptions, but no layer trains with that method$"),
        (lambda: prepare(resnet8_digits(), QConfig(method="dorefa", scale_kind="power_of_two"), EXAMPLE),
         r"^DoReFa has steps of its own below 8 bits; scale_kind must be 'free', not 'power_of_two'$"),
    ],
)  # fmt: skip
def test_errors(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
    with pytest.raises(TypeError, match=r"^options must be a tuple of MethodOptions, not \{\}$"):
        QConfig(options={})  # type: ignore[arg-type]


# LSQ+ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeta", [0.0, 4.3, 15.0, 22.0, -3.0])
def test_lsq_plus_gradients(zeta: float) -> None:
    step, top, factor = 0.25, 15, 0.125
    z = max(0, min(15, math.floor(zeta + 0.5)))
    edges = [-z - 1, -z - 0.25, -z, -z + 0.25, 0.5, top - z - 0.25, top - z, top - z + 0.25, top - z + 3]
    x = torch.tensor([step * u for u in edges], requires_grad=True)
    s, zero = torch.tensor(step, requires_grad=True), torch.tensor(zeta, requires_grad=True)
    upstream = torch.linspace(-1, 2, len(edges))
    result = LsqPlus.apply(x, s, zero, top, factor)
    result.backward(upstream)
    inside = [-z < u < top - z for u in edges]
    codes = [max(-z, min(top - z, math.floor(u + 0.5))) for u in edges]
    assert result.tolist() == [step * c for c in codes]
    slopes = [c - u if i else c for c, u, i in zip(codes, edges, inside, strict=True)]
    weights = upstream.tolist()
    assert x.grad is not None
    assert s.grad is not None
    assert zero.grad is not None
    assert x.grad.tolist() == [g * i for g, i in zip(weights, inside, strict=True)]
    assert float(s.grad) == pytest.approx(factor * sum(g * d for g, d in zip(weights, slopes, strict=True)), rel=1e-5)
    # beta = -step * z, and d x_hat / d beta is 1 outside.
    outside = sum(g for g, i in zip(weights, inside, strict=True) if not i)
    assert float(zero.grad) == pytest.approx(-step * factor * outside, rel=1e-5)


def test_lsq_plus_grids_and_first_steps() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 500) * torch.tensor([[1.0], [3.0]]) + 0.5
    mean, std = weight.mean(1), weight.std(1, correction=0)
    expected = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 8
    torch.testing.assert_close(LsqPlusWeights(weight, 4).step.detach(), expected)
    quantizer = LsqPlusActivations(4, False, 10, calibration="minmax")
    quantizer.observe(torch.tensor([-0.2785, 0.1, 2.7215]))
    quantizer.finish()
    # A SiLU: step 3/15, and the lowest value gets about one code.
    assert quantizer.scale().item() == pytest.approx(0.2)
    assert (quantizer.low, quantizer.high, quantizer.zero) == (-1, 14, -7)
    assert quantizer(torch.tensor([-9.0, 0.0, 9.0])).tolist() == pytest.approx([-0.2, 0.0, 2.8])
    relu = LsqPlusActivations(4, True, 10)
    assert [name for name, _ in relu.named_parameters()] == ["step"]
    assert (relu.low, relu.high, relu.zero) == (0, 15, -8)


def test_lsq_plus_learns_its_zero_point() -> None:
    torch.manual_seed(0)
    x = F.silu(3 * torch.randn(4000))
    quantizer = LsqPlusActivations(4, False, 1)
    with torch.no_grad():
        quantizer.step.fill_(0.5)
        quantizer.zeta.fill_(8.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    first = float((quantizer(x) - x).square().mean().detach())
    for _ in range(300):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first / 2
    assert quantizer.zero_point() <= 4  # from 8: codes that nothing needs move to the other end


# TQT ---------------------------------------------------------------------------------------------------------------


def test_tqt_steps_and_their_gradients() -> None:
    log2_t = torch.tensor([0.0, 0.3, 1.0, -2.5], requires_grad=True)
    step = ThresholdStep.apply(log2_t, 3)
    assert step.tolist() == [2**-3, 2**-2, 2**-2, 2**-5]
    step.sum().backward()
    assert log2_t.grad is not None
    assert log2_t.grad.tolist() == pytest.approx([s * math.log(2) for s in step.tolist()])


@pytest.mark.parametrize(("bits", "unsigned"), [(2, True), (4, True), (4, False), (8, False)])
def test_tqt_gradients_of_activations(bits: int, unsigned: bool) -> None:
    quantizer = TqtActivations(bits, unsigned, 1)
    with torch.no_grad():
        quantizer.set_range(0.0, 3.0)
    step = 4.0 / 2 ** (bits if unsigned else bits - 1)
    assert quantizer.scale().item() == step
    low, high = quantizer.low, quantizer.high
    u = [low - 1.0, low, low + 0.25, 0.25, high - 0.25, high, high + 0.25]
    x = torch.tensor([step * v for v in u], requires_grad=True)
    upstream = torch.linspace(-1, 2, len(u))
    quantizer(x).backward(upstream)
    nearest = [math.floor(v + 0.5) for v in u]
    slopes = [max(low, min(high, n)) - (v if low <= n <= high else 0) for n, v in zip(nearest, u, strict=True)]
    expected = step * math.log(2) * sum(g * d for g, d in zip(upstream.tolist(), slopes, strict=True))
    assert quantizer.log2_t.grad is not None
    assert x.grad is not None
    assert quantizer.log2_t.grad.item() == pytest.approx(expected, rel=1e-5)
    assert x.grad.tolist() == [g * (low <= n <= high) for g, n in zip(upstream.tolist(), nearest, strict=True)]


def test_tqt_weights_and_multipliers() -> None:
    weight = torch.tensor([[0.9, -0.3], [0.0, 0.0], [5.0, -6.0]])
    assert TqtWeights(weight, 4).scale(weight).tolist() == [1 / 8, 4 / 8, 1.0]
    assert TqtWeights(weight, 4, per_channel=False).scale(weight).tolist() == [1.0] * 3
    model, _ = ready(QConfig(method="tqt"))
    graph = convert(model)
    for node in graph.nodes:
        if isinstance(node, ir.Conv) and node.inputs != ("x",) and graph.tensors[node.output].bits != 32:
            assert set(node.mult.tolist()) == {1 << 16}


# IAO ---------------------------------------------------------------------------------------------------------------


def test_iao_ranges_move_in_training_only() -> None:
    quantizer = IaoActivations(4, False, 1, options=IaoOptions(decay=0.75))
    quantizer.observe(torch.tensor([-1.0, 2.0]))
    quantizer.finish()
    quantizer(torch.tensor([-5.0, 6.0]))
    assert quantizer.range.tolist() == [-2.0, 3.0]
    quantizer(torch.tensor([1.0, 3.0]))  # a range contains 0
    assert quantizer.range.tolist() == [-1.5, 3.0]
    quantizer.eval()
    x = torch.tensor([-9.0, -1.5, 0.0, 1.0, 9.0], requires_grad=True)
    y = quantizer(x)
    assert quantizer.range.tolist() == [-1.5, 3.0]
    assert quantizer.scale().item() == pytest.approx(0.3)
    assert (quantizer.low, quantizer.high, quantizer.zero) == (-5, 10, -3)
    assert y.tolist() == pytest.approx([-1.5, -1.5, 0.0, 0.9, 3.0])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_iao_delay() -> None:
    quantizer = IaoActivations(4, False, 1, options=IaoOptions(delay=2))
    with torch.no_grad():
        quantizer.set_range(-1.0, 1.0)
    x = torch.tensor([-0.97, 0.123])
    assert torch.equal(quantizer(x), x)
    assert torch.equal(quantizer(x), x)
    assert not torch.equal(quantizer(x), x)


def test_iao_weights_follow_the_largest() -> None:
    weight = torch.tensor([[0.7, -0.3], [1.4, 0.21]], requires_grad=True)
    quantizer = MinMaxWeights(weight, 4)
    assert quantizer.scale(weight).tolist() == pytest.approx([0.1, 0.2])
    assert quantizer.codes(weight).tolist() == [[7, -3], [7, 1]]
    quantizer(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1], [1, 1]]
    # Of a full grid, the lower end reaches further.
    assert MinMaxWeights(weight, 2).scale(torch.tensor([[1.0, -3.0]])).tolist() == [1.5]
    assert not list(quantizer.parameters())


# PACT --------------------------------------------------------------------------------------------------------------


def test_pact_equations() -> None:
    quantizer = PactActivations(4, True, 1)
    with torch.no_grad():
        quantizer.alpha.fill_(6.0)
    x = torch.tensor([-1.0, 0.0, 0.3, 5.9, 6.0, 6.1, 20.0], requires_grad=True)
    y = quantizer(x)
    # y = round(clip(x, 0, alpha) * 15/alpha) * alpha/15
    expected = torch.floor(x.detach().clamp(0, 6) * 15 / 6 + 0.5) * 6 / 15
    torch.testing.assert_close(y.detach(), expected)
    upstream = torch.arange(1.0, 8.0)
    y.backward(upstream)
    assert quantizer.alpha.grad is not None
    assert x.grad is not None
    assert quantizer.alpha.grad.item() == 5 + 6 + 7
    assert x.grad.tolist() == [0, 2, 3, 4, 0, 0, 0]


def test_pact_of_signed_values_and_the_penalty() -> None:
    quantizer = PactActivations(4, False, 1)
    with torch.no_grad():
        quantizer.alpha.fill_(7.0)
    x = torch.tensor([-9.0, -8.0, 1.0, 7.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert quantizer.alpha.grad is not None
    assert quantizer.alpha.grad.item() == pytest.approx(1 - 2 * 8 / 7)
    other = PactActivations(4, True, 1)
    with torch.no_grad():
        other.alpha.fill_(-2.0)
    assert float(clipping_penalty(nn.ModuleList([quantizer, other])).detach()) == 53.0
    assert float(clipping_penalty(nn.Linear(1, 1))) == 0.0


# DoReFa ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dorefa_equations(bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    quantizer = DorefaWeights(weight, bits, options=DorefaOptions(restore=False))
    n = 2**bits - 1
    bounded = weight.detach().tanh() / (2 * weight.detach().tanh().abs().max()) + 0.5
    expected = 2 * (n * bounded).round() / n - 1
    torch.testing.assert_close(quantizer(weight).detach(), expected)
    codes = quantizer.codes(weight)
    assert set(codes.flatten().tolist()) <= set(range(-n, n + 1, 2))
    restored = DorefaWeights(weight, bits)
    torch.testing.assert_close(restored(weight).detach(), expected * weight.detach().abs().max())
    # Straight through the rounding: the gradient of tanh(w) / max|tanh(w)|.
    upstream = torch.randn_like(weight)
    (grad,) = torch.autograd.grad(quantizer(weight), weight, upstream)
    (smooth,) = torch.autograd.grad(weight.tanh() / weight.tanh().abs().max(), weight, upstream)
    torch.testing.assert_close(grad, smooth)
    acts = DorefaActivations(bits, True, 1)
    a = torch.linspace(-0.5, 1.5, 98)
    torch.testing.assert_close(acts(a), torch.floor(a.clamp(0, 1) * n + 0.5) / n)


def test_dorefa_of_4_bits_has_no_integers() -> None:
    model, x = ready(QConfig(method="dorefa"))
    model(x)
    with pytest.raises(CompileError) as caught:
        convert(model)
    assert caught.value.violations[0] == (
        "stage1.conv1: Weights fit nibbles. DoReFa's of 4 bits are the odd numbers in -15..15. "
        "Train with 2 or 3 bits, or with another method."
    )
