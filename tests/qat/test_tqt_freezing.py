"""Incremental freezing of TQT's thresholds, first steps of least squared error, symmetric divergence."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nibblecore.qat import LsqOptions, QConfig, ThresholdFreezer, TqtOptions, calibrate, prepare
from nibblecore.qat.calibration import Entropy, SymmetricEntropy, kl_divergence
from nibblecore.qat.lsq import LsqWeights, quantize
from nibblecore.qat.tqt import TqtWeights


class Thresholds(nn.Module):
    """Nothing but thresholds, some of them per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.log2_t = nn.Parameter(torch.tensor([0.4, 1.6, -2.5]))
        self.b = nn.Module()
        self.b.log2_t = nn.Parameter(torch.tensor(3.2))
        self.weight = nn.Parameter(torch.tensor(1.0))


def move(model: Any, a: list[float], b: float, grads: list[float]) -> None:
    with torch.no_grad():
        model.a.log2_t.copy_(torch.tensor(a))
        model.b.log2_t.fill_(b)
    model.a.log2_t.grad, model.b.log2_t.grad = torch.tensor(grads[:3]), torch.tensor(grads[3])


def test_order_and_places_of_freezing() -> None:
    model: Any = Thresholds()
    freezer = ThresholdFreezer(model, start=2, every=2, momentum=0.5)
    still = [0.4, 1.6, -2.5]
    move(model, still, 3.2, [0.1, -0.2, 0.3, -0.05])
    freezer.step()
    assert freezer.frozen() == 0
    # The smallest gradient is that of b, but it has just gone to the other side, 3, and was on 4 mostly.
    move(model, still, 2.9, [0.1, -0.2, 0.3, -0.01])
    freezer.step()
    assert freezer.frozen() == 0.25
    assert freezer.state["a.log2_t"]["frozen"].tolist() == [True, False, False]
    # What is frozen goes back, whatever the optimizer does; only every other step freezes.
    move(model, [1.9, 1.6, -2.5], 3.2, [0.0, 0.2, 0.3, 0.01])
    freezer.step()
    assert model.a.log2_t.tolist() == pytest.approx(still)
    assert freezer.frozen() == 0.25
    move(model, [1.9, 1.6, -2.5], 3.2, [0.0, 0.2, 0.3, 0.01])
    freezer.step()
    assert bool(freezer.state["b.log2_t"]["frozen"])
    for _ in range(8):
        move(model, still, 3.2, [0.1, 0.2, 0.3, 0.01])
        freezer.step()
    assert freezer.frozen() == 1
    assert model.weight.item() == 1.0


def test_state_of_freezing() -> None:
    model: Any = Thresholds()
    freezer = ThresholdFreezer(model, start=1, every=1)
    move(model, [0.4, 1.6, -2.5], 3.2, [0.1, 0.2, 0.3, 0.4])
    freezer.step()
    other = ThresholdFreezer(Thresholds(), start=1, every=1)
    other.load_state_dict(freezer.state_dict())
    assert other.steps == 1
    assert other.frozen() == 0.25
    state = freezer.state_dict()
    del state["b.log2_t.side"]
    with pytest.raises(ValueError, match=r"^the state is that of a freezer of another model$"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"^the model has no thresholds; prepare it with method='tqt'$"):
        ThresholdFreezer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^start must be at least 0 and every at least 1, not 0 and 0$"):
        ThresholdFreezer(model, start=0, every=0)
    with pytest.raises(ValueError, match=r"^momentum must be above 0 and at most 1, not 0$"):
        ThresholdFreezer(model, momentum=0)


def test_freezing_in_a_training() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
    model = prepare(net, QConfig(method="tqt", granularity="tensor"), torch.zeros(1, 1, 8, 8))
    x = torch.rand(8, 1, 8, 8)
    calibrate(model, [x])
    freezer = ThresholdFreezer(model, start=0, every=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    count = len(freezer.thresholds)
    assert count == 3
    for _ in range(count + 20):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        freezer.step()
    assert freezer.frozen() == 1
    before = [t.detach().clone() for t in freezer.thresholds.values()]
    optimizer.step()
    freezer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, freezer.thresholds.values(), strict=True))


def test_first_thresholds_of_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 100)
    weight[2] = 0
    weight[3] = torch.tensor([1.0, -1.0] * 50)
    largest = TqtWeights(weight, 4)
    assert largest.log2_t.detach().exp2()[[0, 1, 3]].tolist() == pytest.approx(weight[[0, 1, 3]].abs().amax(1).tolist())
    three = TqtWeights(torch.cat([weight[:2] ** 3, weight[2:]]), 4, options=TqtOptions(weight_threshold="3std"))
    want = [3 * float((weight[k] ** 3).std(correction=0)) for k in (0, 1)]
    assert three.log2_t.detach().exp2()[:2].tolist() == pytest.approx(want, rel=1e-5)
    # Never more than the largest weight, and something where all are zero.
    assert three.log2_t.detach().exp2()[3].item() == pytest.approx(1.0)
    assert three.log2_t.isfinite().all()
    with pytest.raises(ValueError, match=r"^weight_threshold of TqtOptions must be one of 'max', '3std', not 'x'$"):
        TqtOptions(weight_threshold="x")


@pytest.mark.parametrize(("bits", "full"), [(2, False), (3, False), (4, False), (4, True), (8, False)])
def test_first_steps_of_least_squared_error(bits: int, full: bool) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(3, 400)
    weight[1] = 0
    quantizer = LsqWeights(weight, bits, full_range=full, options=LsqOptions(weight_init="mse"))

    def error(step: float, row: torch.Tensor) -> float:
        codes = quantize(row / step, quantizer.low, quantizer.high, quantizer.kind)
        return float((codes * step - row).square().sum())

    for row in (0, 2):
        step = float(quantizer.step[row].detach())
        ends = max(float(weight[row].max()) / quantizer.high, float(weight[row].min()) / quantizer.low)
        all_errors = [error(ends * (1 - k / 100), weight[row]) for k in range(81)]
        assert error(step, weight[row]) == pytest.approx(min(all_errors), rel=1e-4)
        assert bits > 4 or step < 0.9 * ends
    # A row of zeros has the usual step.
    assert float(quantizer.step[1].detach()) == pytest.approx(float(quantizer.step[[0, 2]].mean().detach()))
    with pytest.raises(ValueError, match=r"^weight_init of LsqOptions must be one of 'mean', 'mse', not 'x'$"):
        LsqOptions(weight_init="x")


def test_symmetric_divergence() -> None:
    counts = np.array([8.0, 6, 0, 3, 2, 2, 1, 1, 1, 4])
    size, levels = 8, 4
    p = counts[:size].copy()
    p[-1] += counts[size:].sum()
    q = np.zeros(size)
    for start in range(0, size, 2):
        group = counts[start : start + 2]
        q[start : start + 2] = np.where(group > 0, group.sum() / max(1, (group > 0).sum()), 0)
    kept = p > 0
    p, q = p[kept] / p.sum(), q[kept] / q.sum()
    forward, backward = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    assert kl_divergence(counts, size, levels) == pytest.approx(forward)
    assert kl_divergence(counts, size, levels, symmetric=True) == pytest.approx(forward + backward)
    torch.manual_seed(0)
    x = torch.randn(20_000).relu() ** 2
    ranges = []
    for kind in (Entropy, SymmetricEntropy):
        calibrator = kind()
        calibrator.observe(x)
        ranges.append(calibrator.range(4, 0, 15, False))
    assert all(low == 0 and 0 < high < float(x.max()) for low, high in ranges)
    assert not math.isclose(ranges[0][1], ranges[1][1])
