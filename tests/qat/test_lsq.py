"""LSQ against the paper's equations, written out elementwise, and the grids."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nibblecore.arch import numerics
from nibblecore.qat import kernels
from nibblecore.qat.lsq import STEP_MIN, Lsq, LsqActivations, LsqWeights, PositiveStep, initial_step, quantize


def paper(v: float, s: float, low: int, high: int) -> tuple[float, float]:
    """d(v_hat)/dv and d(v_hat)/ds of one value: equations 3 and 5, ties up."""
    u = v / s
    if u <= low:
        return 0.0, low
    if u >= high:
        return 0.0, high
    return 1.0, math.floor(u + 0.5) - u


@pytest.mark.parametrize(("low", "high"), [(0, 15), (-8, 7), (0, 255), (-128, 127)])
def test_gradients_of_activations(low: int, high: int) -> None:
    step = 0.25  # u is exact in float32, so the edges are hit exactly
    edges = [low - 1, low - 0.25, low, low + 0.25, 0.0, 0.5, high - 0.25, high, high + 0.25, high + 0.5, high + 3]
    v = torch.tensor([step * u for u in edges], requires_grad=True)
    s = torch.tensor(step, requires_grad=True)
    upstream = torch.linspace(-1, 2, len(edges))
    scale = 0.125
    result = Lsq.apply(v, s, low, high, scale, "half_up")
    result.backward(upstream)
    expected = [paper(step * u, step, low, high) for u in edges]
    assert v.grad is not None
    assert s.grad is not None
    assert v.grad.tolist() == [g * d for g, (d, _) in zip(upstream.tolist(), expected, strict=True)]
    total = sum(g * d for g, (_, d) in zip(upstream.tolist(), expected, strict=True))
    assert float(s.grad) == pytest.approx(total * scale, rel=1e-6)


def awkward(dtype: torch.dtype, step: float) -> Tensor:
    """Values around every edge and tie of all grids, ends of floats too, in more than one vector of the processor."""
    halves = torch.arange(-280, 281, dtype=dtype) / 2
    near = [halves, halves.nextafter(torch.full_like(halves, 1e4)), halves.nextafter(torch.full_like(halves, -1e4))]
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, math.inf, -math.inf], dtype=dtype)
    return torch.cat([*near, ends, torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype) * 60]) * step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(0, 15, "half_up"), (-8, 7, "half_up"), (-128, 127, "half_up"), (-7, 7, "half_even"), (-119, 119, "w8")],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_values_and_gradients_bit_by_bit(
    low: int, high: int, kind: str, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Quantizer and gradients as one would write them down, with masks and integers.
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda: None)
    v = awkward(dtype, 0.25).requires_grad_()
    step = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    u = (v / step).detach()
    limited = u.clamp(low, high)
    code = torch.floor(limited + 0.5).clamp_max(high) if kind == "half_up" else limited.round()
    if kind == "w8":
        code = numerics.w8_project(code.to(torch.int16), limited).to(dtype)
    upstream = torch.randn(len(v), generator=torch.Generator().manual_seed(1)).to(dtype)
    result = Lsq.apply(v, step, low, high, 0.5, kind)
    result.backward(upstream)
    inside = (u > low) & (u < high)
    slope = torch.where(inside, code - u, code)
    assert v.grad is not None
    assert step.grad is not None
    assert torch.equal(quantize(u, low, high, kind), code)
    assert torch.equal(result, code * 0.25)
    assert torch.equal(v.grad, torch.where(inside, upstream, 0))
    terms = upstream * slope * 0.5
    if compiled and dtype == torch.float32:
        assert kernels.usable(v, step)
        assert float((step.grad - terms.double().sum()).abs()) <= 1e-7 * float(terms.abs().sum())
    else:
        assert torch.equal(step.grad, (upstream * slope).sum() * 0.5)


def test_the_zone_where_torch_differs_from_the_paper() -> None:
    # u = 7.25 rounds to 7 and is clipped: the paper has d/ds = 7 and d/dv = 0.
    v, s = torch.tensor([7.25], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    Lsq.apply(v, s, -8, 7, 1.0, "half_up").sum().backward()
    assert v.grad is not None
    assert s.grad is not None
    assert (v.grad.item(), s.grad.item()) == (0.0, 7.0)


@pytest.mark.parametrize(("bits", "limit"), [(4, 7), (8, 119)])
def test_gradients_of_weights_per_channel(bits: int, limit: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    quantizer = LsqWeights(weight, bits).double()
    with torch.no_grad():
        quantizer.step.mul_(0.4)  # so that some are clipped
    weight.requires_grad_()
    upstream = torch.randn_like(weight)
    quantizer(weight).backward(upstream)
    assert weight.grad is not None
    assert quantizer.step.grad is not None
    codes = quantizer.codes(weight)
    for channel in range(3):
        u = (weight[channel] / quantizer.step[channel]).detach()
        inside = u.abs() < limit
        assert 0 < int(inside.sum()) < inside.numel()
        slope = torch.where(inside, codes[channel] - u, limit * u.sign())
        # N is the weights of the channel, p the highest code.
        expected = (upstream[channel] * slope).sum() / math.sqrt(36 * limit)
        assert float(quantizer.step.grad[channel]) == pytest.approx(float(expected))
        assert torch.equal(weight.grad[channel], upstream[channel] * inside)


def test_gradient_scale_of_activations_counts_one_image() -> None:
    quantizer = LsqActivations(4, unsigned=True, features=50)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    quantizer(torch.full((8, 50), 100.0)).sum().backward()
    assert quantizer.step.grad is not None
    assert float(quantizer.step.grad) == pytest.approx(8 * 50 * 15 / math.sqrt(50 * 15))


def test_autograd_recipe_gives_the_same() -> None:
    # The published straight-through formulation, with its detach calls, on random values.
    torch.manual_seed(1)
    v = torch.randn(500, dtype=torch.float64)
    for low, high in ((0, 15), (-8, 7)):
        a, s = v.clone().requires_grad_(), torch.tensor(0.21, dtype=torch.float64, requires_grad=True)
        Lsq.apply(a, s, low, high, 0.3, "half_up").square().sum().backward()
        b, t = v.clone().requires_grad_(), torch.tensor(0.21, dtype=torch.float64, requires_grad=True)
        scaled = (t - 0.3 * t).detach() + 0.3 * t
        u = (b / scaled).clamp(low, high)
        (((torch.floor(u + 0.5) - u).detach() + u) * scaled).square().sum().backward()
        assert a.grad is not None
        assert s.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(s.grad, t.grad)


def test_steps_are_positive_whatever_an_optimizer_does() -> None:
    raw = torch.tensor([-0.5, -1e-12, 0.0, 1e-12, 0.5], requires_grad=True)
    step: Tensor = PositiveStep.apply(raw)
    assert step.tolist() == [0.5, STEP_MIN, STEP_MIN, STEP_MIN, 0.5]
    step.sum().backward()
    assert raw.grad is not None
    assert raw.grad.tolist() == [-1, -1, 1, 1, 1]
    assert math.isnan(float(PositiveStep.apply(torch.tensor(math.nan))))


def test_a_step_that_starts_negative_trains_back() -> None:
    torch.manual_seed(0)
    x = torch.rand(2000) * 3
    quantizer = LsqActivations(4, unsigned=True, features=1)
    with torch.no_grad():
        quantizer.step.fill_(-0.01)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.01)
    for _ in range(200):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert quantizer.scale().item() > 0
    assert quantizer.scale().item() == pytest.approx(0.2, rel=0.1)


def test_activations_round_half_up_and_saturate() -> None:
    quantizer = LsqActivations(4, unsigned=False, features=1)
    with torch.no_grad():
        quantizer.step.fill_(0.5)
    x = torch.tensor([-9.0, -4.0, -0.75, -0.25, 0.25, 0.75, 3.5, 3.75, 9.0])
    assert (quantizer(x) / 0.5).tolist() == [-8, -8, -1, 0, 1, 2, 7, 7, 7]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (5, 40)])
def test_fake_quant_equals_codes_times_scale(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(len(shape))
    weight = torch.randn(shape)
    quantizer = LsqWeights(weight, bits)
    codes = quantizer.codes(weight)
    scale = quantizer.scale_like(weight)
    assert torch.equal(quantizer(weight), codes * scale)
    assert codes.dtype == torch.int64
    assert int(codes.abs().max()) <= quantizer.limit
    if bits == 8:
        assert bool(numerics.is_weight8(codes.numpy()).all())


def test_8_bit_weights_take_the_nearest_of_225_codes() -> None:
    allowed = np.array([c for c in range(-119, 120) if numerics.is_weight8(c)])
    assert len(allowed) == 225
    values = np.arange(-130, 130, 0.125)
    weight = torch.from_numpy(values).reshape(1, -1)
    quantizer = LsqWeights(weight, 8).double()
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    got = quantizer.codes(weight).numpy()[0]
    distance = np.abs(allowed - values[:, None])
    assert np.array_equal(np.abs(got - values), distance.min(axis=1))
    assert got[values == 8.0] == 7  # a tie goes to the smaller magnitude
    assert got[values == -8.0] == -7
    assert got[values == 8.125] == 9


def test_initial_steps() -> None:
    mean, largest = torch.tensor(1.0), torch.tensor(8.0)
    assert float(initial_step(mean, largest, 7)) == pytest.approx(2 / math.sqrt(7))
    assert float(initial_step(mean, largest, 127)) == pytest.approx(8 / 127)
    weight = torch.tensor([[1.0, -1.0], [0.0, 0.0], [4.0, 2.0]])
    steps = LsqWeights(weight, 4).step.tolist()
    # 1/7 < 2*1/sqrt(7); a channel of zeros gets the others' mean.
    assert steps == pytest.approx([1 / 7, (1 / 7 + 4 / 7) / 2, 4 / 7])
    assert LsqWeights(torch.zeros(2, 3), 4).step.tolist() == [1, 1]


def test_calibration_uses_every_batch() -> None:
    quantizer = LsqActivations(4, unsigned=True, features=4)
    assert not quantizer.is_calibrated()
    quantizer.observe(torch.tensor([0.0, 1.0]))
    quantizer.observe(torch.tensor([2.0, 9.0, 0.0, 0.0]))
    quantizer.finish()
    assert quantizer.step.item() == pytest.approx(9 / 15)
    quantizer.observe(torch.tensor([0.0, 1.0]))
    quantizer.observe(torch.tensor([2.0, 90.0, 0.0, 0.0]))
    quantizer.finish()
    assert quantizer.step.item() == pytest.approx(90 / 15)
    for batch in (torch.ones(63), torch.full((1,), 90.0)):
        quantizer.observe(batch)
    quantizer.finish()
    assert quantizer.step.item() == pytest.approx(2 * 153 / 64 / math.sqrt(15))
    quantizer.observe(torch.zeros(3))
    quantizer.finish()
    assert quantizer.step.item() == 1.0


def test_quantizers_copy_and_print() -> None:
    quantizer = LsqActivations(8, unsigned=False, features=4)
    assert repr(copy.deepcopy(quantizer)) == "LsqActivations(int8, step=nan)"
