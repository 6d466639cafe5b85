"""Every method's gradients against its closed form in float64, the clip edges exactly; and what no step may become."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibblecore.errors import TrainingError
from nibblecore.qat import METHODS, LsqOptions, QConfig, calibrate, convert, prepare
from nibblecore.qat.methods import ActQuantizer, WeightQuantizer

STEP = 0.375  # times any code is exact, and so is the quotient
FEATURES = 48


def activations(name: str, bits: int, unsigned: bool, power_of_two: bool = False) -> ActQuantizer:
    quantizer: ActQuantizer = METHODS[name].activations(bits, unsigned, FEATURES, power_of_two=power_of_two)
    return quantizer.double().eval()


def places(low: float, high: float) -> list[float]:
    """Both edges exactly, both sides of each, ties, and the middle."""
    ends = [
        end + d for end in (low, high) for d in (-3, -1, -0.625, -0.5, -0.25, -(2**-40), 0, 2**-40, 0.25, 0.5, 0.625, 2)
    ]
    return [*ends, -0.0, 0.25, 0.5, 1.5, -0.5, -0.25]


def half_up(u: float, low: float, high: float) -> float:
    return max(low, min(high, math.floor(u + 0.5)))


def run(quantizer: nn.Module, values: list[float]) -> tuple[list[float], list[float], list[float], dict[str, float]]:
    """Results, upstream gradients, gradients of values and of parameters."""
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    y = quantizer(x)
    upstream = torch.linspace(-1, 2, len(values), dtype=torch.float64)
    y.backward(upstream)
    assert x.grad is not None
    assert y.dtype == torch.float64
    gradients = {n: float(p.grad) for n, p in quantizer.named_parameters() if p.grad is not None}
    return y.tolist(), upstream.tolist(), x.grad.tolist(), gradients


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


GRIDS = [(2, True), (4, True), (4, False), (8, True), (8, False)]


@pytest.mark.parametrize(("bits", "unsigned"), GRIDS)
def test_lsq(bits: int, unsigned: bool) -> None:
    quantizer = activations("lsq", bits, unsigned)
    with torch.no_grad():
        quantizer.get_parameter("step").fill_(STEP)
    low, high = quantizer.low, quantizer.high
    us = places(low, high)
    got, upstream, dx, gradients = run(quantizer, [u * STEP for u in us])
    codes = [half_up(u, low, high) for u in us]
    assert got == [c * STEP for c in codes]
    # Equations 3 and 5: at u == low and u == high the value is clipped.
    assert dx == [g * (low < u < high) for g, u in zip(upstream, us, strict=True)]
    slopes = [c - u if low < u < high else c for c, u in zip(codes, us, strict=True)]
    assert gradients["step"] == pytest.approx(dot(upstream, slopes) / math.sqrt(FEATURES * high), rel=1e-12)


@pytest.mark.parametrize("raw", [0.3, 0.4, -0.3])
def test_lsq_with_powers_of_two(raw: float) -> None:
    """The rounding of the exponent passes gradients straight through: d step / d raw = step / raw."""
    quantizer = activations("lsq", 4, True, power_of_two=True)
    with torch.no_grad():
        quantizer.get_parameter("step").fill_(raw)
    step = 2.0 ** round(math.log2(abs(raw)))
    us = places(0, 15)
    got, upstream, _, gradients = run(quantizer, [u * step for u in us])
    codes = [half_up(u, 0, 15) for u in us]
    assert got == [c * step for c in codes]
    slopes = [c - u if 0 < u < 15 else c for c, u in zip(codes, us, strict=True)]
    expected = dot(upstream, slopes) / math.sqrt(FEATURES * 15) * step / raw
    assert gradients["step"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("zeta", [0.0, 4.5, 4.4999, 15.0, -2.0, 17.0])
def test_lsq_plus(zeta: float) -> None:
    quantizer = activations("lsq+", 4, False)
    with torch.no_grad():
        quantizer.get_parameter("step").fill_(STEP)
        quantizer.get_parameter("zeta").fill_(zeta)
    zero = max(0, min(15, math.floor(zeta + 0.5)))
    low, high = -zero, 15 - zero
    us = places(low, high)
    got, upstream, dx, gradients = run(quantizer, [u * STEP for u in us])
    codes = [half_up(u, low, high) for u in us]
    assert got == [c * STEP for c in codes]
    inside = [low < u < high for u in us]
    assert dx == [g * i for g, i in zip(upstream, inside, strict=True)]
    scale = 1 / math.sqrt(FEATURES * 15)
    slopes = [c - u if i else c for c, u, i in zip(codes, us, inside, strict=True)]
    assert gradients["step"] == pytest.approx(scale * dot(upstream, slopes), rel=1e-12)
    # d x_hat / d beta = 1 outside, with beta = -step * zeta.
    assert gradients["zeta"] == pytest.approx(-STEP * scale * dot(upstream, [not i for i in inside]), rel=1e-12)


@pytest.mark.parametrize(("bits", "unsigned"), GRIDS)
@pytest.mark.parametrize("log2_t", [1.0, 1.25, -0.5])
def test_tqt(bits: int, unsigned: bool, log2_t: float) -> None:
    quantizer = activations("tqt", bits, unsigned)
    with torch.no_grad():
        quantizer.get_parameter("log2_t").fill_(log2_t)
    step = 2.0 ** (math.ceil(log2_t) - (bits if unsigned else bits - 1))
    low, high = quantizer.low, quantizer.high
    us = places(low, high)
    got, upstream, dx, gradients = run(quantizer, [u * step for u in us])
    codes = [half_up(u, low, high) for u in us]
    assert got == [c * step for c in codes]
    # Equations 7 and 8: inside is what rounds to a code.
    inside = [low <= math.floor(u + 0.5) <= high for u in us]
    assert sum(i != (low < u < high) for i, u in zip(inside, us, strict=True)) >= 6
    assert dx == [g * i for g, i in zip(upstream, inside, strict=True)]
    slopes = [c - u if i else c for c, u, i in zip(codes, us, inside, strict=True)]
    assert gradients["log2_t"] == pytest.approx(step * math.log(2) * dot(upstream, slopes), rel=1e-12)


@pytest.mark.parametrize(("bits", "unsigned"), GRIDS)
def test_pact(bits: int, unsigned: bool) -> None:
    quantizer = activations("pact", bits, unsigned)
    high, low = quantizer.high, quantizer.low
    alpha = STEP * high
    with torch.no_grad():
        quantizer.get_parameter("alpha").fill_(alpha)
    us = places(low, high)
    got, upstream, dx, gradients = run(quantizer, [u * STEP for u in us])
    assert got == pytest.approx([half_up(u, low, high) * STEP for u in us], rel=1e-15)
    # 1 at and above alpha; unsigned values pass gradients at 0 itself; the signed lower end is alpha * low / high.
    below = [u <= low if low else u < 0 for u in us]
    slopes = [1.0 if u >= high else low / high if b else 0.0 for u, b in zip(us, below, strict=True)]
    assert gradients["alpha"] == pytest.approx(dot(upstream, slopes), rel=1e-12)
    assert dx == [g * (u < high and not b) for g, u, b in zip(upstream, us, below, strict=True)]


@pytest.mark.parametrize("unsigned", [False, True])
def test_ranges_and_fixed_grids_have_gradients_of_values_only(unsigned: bool) -> None:
    """IAO: 1 on the closed range. DoReFa: 1 inside 0..1."""
    quantizer = activations("iao", 4, unsigned)
    low, high = (0, 15) if unsigned else (-6, 9)
    with torch.no_grad():
        quantizer.set_range(low * STEP, high * STEP)
    assert (quantizer.low, quantizer.high, float(quantizer.scale())) == (low, high, STEP)
    us = places(low, high)
    got, upstream, dx, gradients = run(quantizer, [u * STEP for u in us])
    assert got == [half_up(u, low, high) * STEP for u in us]
    assert dx == [g * (low <= u <= high) for g, u in zip(upstream, us, strict=True)]
    assert not gradients
    quantizer = activations("dorefa", 4, unsigned)
    step = float(quantizer.scale())
    low, high = quantizer.low, quantizer.high
    us = places(low, high)
    got, upstream, dx, gradients = run(quantizer, [u * step for u in us])
    assert got == pytest.approx([half_up(u * step / step, low, high) * step for u in us], rel=1e-15)
    assert dx == [g * (low < u * step / step < high) for g, u in zip(upstream, us, strict=True)]


# Weights -----------------------------------------------------------------------------------------------------------


def weight_grid(bits: int, full_range: bool, channels: int = 3) -> tuple[Tensor, list[float], list[list[float]]]:
    """Weights of ``channels`` with steps of their own, their steps and their quotients."""
    high = {2: 1, 4: 7, 8: 119}[bits]
    low = {2: -2, 4: -8 if full_range else -7, 8: -119}[bits]
    us = [u for u in places(low, high)]
    steps = [STEP * 2.0**-c for c in range(channels)]
    return torch.tensor([[u * s for u in us] for s in steps], dtype=torch.float64), steps, [us] * channels


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", ["step", "layer"])
@pytest.mark.parametrize("name", ["lsq", "tqt"])
def test_weights_per_channel(name: str, count: str, bits: int, full_range: bool) -> None:
    weight, steps, quotients = weight_grid(bits, full_range)
    options: dict[str, Any] = {"options": LsqOptions(weight_count=count)} if name == "lsq" else {}
    quantizer: WeightQuantizer = METHODS[name].weights(weight, bits, full_range=full_range, **options).double()
    if name == "lsq":
        parameter = quantizer.get_parameter("step")
        values = steps
    else:
        steps = [2.0 ** math.ceil(math.log2(s)) for s in steps]
        products = [[u * s for u in us] for s, us in zip(steps, quotients, strict=True)]
        weight = torch.tensor(products, dtype=torch.float64)
        parameter = quantizer.get_parameter("log2_t")
        values = [math.log2(s) + bits - 1 for s in steps]
    with torch.no_grad():
        parameter.copy_(torch.tensor(values, dtype=torch.float64))
    weight.requires_grad_()
    low, high = quantizer.low, quantizer.high
    result = quantizer(weight)
    codes = quantizer.codes(weight)
    assert torch.equal(result.detach(), codes * torch.tensor(steps, dtype=torch.float64)[:, None])
    upstream = torch.linspace(-2, 1, weight.numel(), dtype=torch.float64).reshape(weight.shape)
    result.backward(upstream)
    assert weight.grad is not None
    assert parameter.grad is not None
    n = weight.shape[1] if count == "step" else weight.numel()
    for channel, us in enumerate(quotients):
        code, g = codes[channel].tolist(), upstream[channel].tolist()
        inside = [low < u < high if name == "lsq" else low <= round(u) <= high for u in us]
        if bits != 8:  # of 8 bits some codes do not exist
            assert code == [max(low, min(high, round(u))) for u in us]
        assert weight.grad[channel].tolist() == [a * i for a, i in zip(g, inside, strict=True)]
        slopes = [c - u if i else c for c, u, i in zip(code, us, inside, strict=True)]
        factor = 1 / math.sqrt(n * high) if name == "lsq" else steps[channel] * math.log(2)
        assert float(parameter.grad[channel]) == pytest.approx(factor * dot(g, slopes), rel=1e-10)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dorefa_weights(bits: int) -> None:
    """d/dw of 2*quant(tanh(w)/(2 max|tanh w|) + 1/2) - 1, straight through the rounding, with the maximum's part."""
    torch.manual_seed(bits)
    weight = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    quantizer = METHODS["dorefa"].weights(weight, bits).double()
    upstream = torch.randn(3, 20, dtype=torch.float64)
    quantizer(weight).backward(upstream)
    w = weight.detach()
    largest, scale = w.tanh().abs().max(), w.abs().max()
    expected = upstream * (1 - w.tanh() ** 2) / largest
    at = w.tanh().abs().flatten().argmax()
    pull = -(upstream * w.tanh()).sum() / largest**2 * w.tanh().flatten()[at].sign() * (1 - w.tanh().flatten()[at] ** 2)
    expected.view(-1)[at] += pull
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected * scale, rtol=1e-9, atol=1e-12)


# What no step may become -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_whatever_an_optimizer_does_steps_are_positive_numbers(name: str, power_of_two: bool) -> None:
    if name == "dorefa":
        power_of_two = False  # it refuses
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(4, 10, generator=generator)
        weights = METHODS[name].weights(weight, 4, power_of_two=power_of_two)
        acts: ActQuantizer = METHODS[name].activations(4, False, FEATURES, power_of_two=power_of_two)
        with torch.no_grad():
            acts.set_range(-1.0, 2.0)
            for parameter in (*weights.parameters(), *acts.parameters()):
                size = 10.0 ** float(torch.empty(()).uniform_(-30, 4, generator=generator))
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
                if seed % 4 == 0:
                    parameter.mul_(-1)
                elif seed % 4 == 1:
                    parameter.zero_()
        for scale in (weights.scale(weight), acts.scale()):
            assert bool((scale > 0).all()), f"seed {seed}: {scale}"
            assert bool(scale.isfinite().all()), f"seed {seed}: {scale}"
        assert bool(weights(weight).isfinite().all()), f"seed {seed}"
        assert bool(acts(weight).isfinite().all()), f"seed {seed}"


@pytest.mark.parametrize("calibration", ["method", "minmax", "mean_range", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, -2.0])
def test_constant_values_give_a_step(name: str, calibration: str, value: float) -> None:
    for unsigned in (False, True):
        quantizer: ActQuantizer = METHODS[name].activations(4, unsigned, 1, calibration=calibration)
        quantizer.eval()
        with torch.no_grad():
            quantizer.fake_quant_enabled = False
            quantizer.enable_observer()
            quantizer(torch.full((6,), value))
            quantizer(torch.zeros(0))  # an empty batch says nothing
            quantizer.disable_observer()
            quantizer.fake_quant_enabled = True
            step = float(quantizer.scale())
            assert math.isfinite(step)
            assert step > 0
            assert bool(quantizer(torch.tensor([-5.0, 0.0, value, 5.0])).isfinite().all())


def test_empty_batches_change_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    for name in sorted(METHODS):
        model = prepare(net, QConfig(method=name, weight_bits=3 if name == "dorefa" else 4), torch.zeros(1, 1, 8, 8))
        x = torch.rand(8, 1, 8, 8)
        calibrate(model, [x[:0], x, x[:0]])
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.train()
        model(x[:0]).sum().backward()
        for parameter in model.parameters():
            assert parameter.grad is None or not bool(parameter.grad.any()), name
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), (name, key)
        convert(model)
        with pytest.raises(TrainingError, match=r"^Calibration needs at least one batch; the loader gave none\.$"):
            calibrate(model, [x[:0]])
