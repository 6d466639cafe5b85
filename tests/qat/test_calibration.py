"""Calibration against closed forms and direct computation."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.qat import QConfig, calibrate, convert, prepare
from nibblecore.qat.calibration import (
    CALIBRATIONS,
    Entropy,
    Histogram,
    MeanRange,
    MinMax,
    Percentile,
    SquaredError,
    affine_grid,
    kl_divergence,
)
from nibblecore.qat.iao import IaoActivations
from nibblecore.qat.lsq import LsqActivations
from nibblecore.qat.lsq_plus import LsqPlusActivations


def test_union_and_mean_of_ranges() -> None:
    for calibrator, expected in ((MinMax(), (-3.0, 5.0)), (MeanRange(), (-1.5, 4.0))):
        calibrator.observe(torch.tensor([-3.0, 1.0, 5.0]))
        calibrator.observe(torch.tensor([0.0, 3.0]))
        assert calibrator.range(4, -8, 7, False) == expected
    positive = MeanRange()
    positive.observe(torch.tensor([2.0, 3.0]))
    assert positive.range(4, -8, 7, False) == (0.0, 3.0)  # 0 is in every range


def test_histograms_grow_by_merging() -> None:
    torch.manual_seed(0)
    histogram, values = Percentile(), []
    for scale in (0.0, 1.0, 0.3, 7.0):
        x = torch.randn(3000, dtype=torch.float64) * scale
        values.append(x)
        histogram.observe(x)
    every = torch.cat(values).numpy()
    assert math.frexp(histogram.width)[0] == 0.5
    assert np.abs(every).max() < histogram.width * Histogram.BINS <= 2 * np.abs(every).max()
    index = np.clip(np.floor(every / histogram.width).astype(int) + Histogram.BINS, 0, 2 * Histogram.BINS - 1)
    expected = np.bincount(index, minlength=2 * Histogram.BINS)
    assert np.array_equal(histogram.counts, expected)
    assert histogram.counts.sum() == 12000


def test_percentile() -> None:
    torch.manual_seed(0)
    calibrator = Percentile()
    x = torch.randn(20, 5000)
    for batch in x:
        calibrator.observe(batch)
    low, high = calibrator.range(4, -8, 7, True)
    exact = np.quantile(x.numpy(), [0.001, 0.999])
    assert low == pytest.approx(exact[0], abs=2 * calibrator.width + 2e-3)
    assert high == pytest.approx(exact[1], abs=2 * calibrator.width + 2e-3)
    outliers = Percentile()
    outliers.observe(torch.cat([torch.full((99950,), 0.5), torch.full((50,), 100.0)]))
    low, high = outliers.range(4, 0, 15, False)
    assert low == 0
    assert 0.5 < high <= 0.5 + 2 * outliers.width


def test_divergence_step_by_step() -> None:
    # 6 bins clipped to 4, in 2 levels: P = (4, 0, 2, 2+1+1), Q = (4, 0 | 2, 2).
    counts = np.array([4.0, 0, 2, 2, 1, 1])
    p, q = np.array([4, 2, 4]) / 10, np.array([4, 2, 2]) / 8
    assert kl_divergence(counts, 4, 2) == pytest.approx(float((p * np.log(p / q)).sum()))
    # All bins, one group each: nothing is lost.
    assert kl_divergence(counts, 6, 6) == pytest.approx(0.0)
    # A Q of 0 where the clipped mass is gets 1e-30.
    p0 = np.array([4, 6]) / 10
    assert kl_divergence(counts, 2, 2) == pytest.approx(
        float(p0[0] * math.log(p0[0] / 1) + p0[1] * math.log(p0[1] / 1e-30))
    )


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (4, 0, 15), (8, -128, 127)])
def test_entropy_is_the_last_smallest_divergence(bits: int, low: int, high: int) -> None:
    torch.manual_seed(bits)
    calibrator = Entropy()
    x = torch.randn(20000) if low else torch.randn(20000).relu()
    calibrator.observe(x)
    got = calibrator.range(bits, low, high, False)
    counts, _ = np.histogram(x.abs().double().numpy(), 2048, (0, float(x.abs().max())))
    counts = counts.astype(float)
    counts[0] = counts[1]
    levels = {(4, -8): 8, (4, 0): 16, (8, -128): 128}[bits, low]
    start = 128 if bits == 8 else 16
    divergences = {i: kl_divergence(counts, i, levels) for i in range(start, 2049)}
    best = max(i for i, d in divergences.items() if d == min(divergences.values()))
    assert got[1] == pytest.approx(best * float(x.abs().max()) / 2048, rel=1e-2)
    assert got[0] == (-got[1] if low else 0)
    if bits == 4:
        assert got[1] < float(x.abs().max())


def test_squared_error_finds_the_best_shrinkage() -> None:
    torch.manual_seed(0)
    x = torch.randn(5000, dtype=torch.float64) ** 3
    calibrator = SquaredError()
    calibrator.observe(x)
    low, high = calibrator.range(4, -8, 7, False)

    def error(shrink: int) -> float:
        scale = 1 - shrink / 100
        step = max(float(x.max()) * scale / 7, float(-x.min()) * scale / 8)
        return float(((x / step + 0.5).floor().clamp(-8, 7) * step - x).square().sum())

    best = min(range(81), key=error)
    assert error(best) < error(0)
    assert high == pytest.approx(float(x.max()) * (1 - best / 100), rel=1e-3)
    assert low == pytest.approx(float(x.min()) * (1 - best / 100), rel=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.3, 1.2, (0.1, 3)), (0.5, 1.5, (0.1, 0)), (-3.0, -1.0, (0.2, 15)), (0.0, 0.0, (1.0, 0))],
)
def test_affine_grids_contain_zero(low: float, high: float, expected: tuple[float, int]) -> None:
    step, zero = affine_grid(low, high, 4)
    assert (pytest.approx(step), zero) == expected


@pytest.mark.parametrize("name", sorted(CALIBRATIONS))
@pytest.mark.parametrize("method", ["lsq", "lsq+"])
def test_every_calibration_in_a_network(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = prepare(resnet8_digits(), QConfig(method=method, calibration=name), torch.zeros(1, 1, 8, 8))
    x = torch.rand(16, 1, 8, 8)
    calibrate(model, [x[:8], x[8:]])
    model.eval()
    assert bool(model(x).isfinite().all())
    convert(model)


@pytest.mark.parametrize("name", sorted(CALIBRATIONS))
@pytest.mark.parametrize("make", [LsqPlusActivations, IaoActivations, LsqActivations])
def test_negative_values_have_codes(name: str, make: Any) -> None:
    """Calibrating a second time finds the same grid, although the zero point has moved meanwhile."""
    torch.manual_seed(0)
    x = torch.randn(4000)
    quantizer = make(4, False, 1, calibration=name)
    grids = []
    for _ in range(2):
        quantizer.observe(x)
        quantizer.finish()
        grids.append((quantizer.low, quantizer.high, quantizer.zero, float(quantizer.scale().detach())))
    assert grids[0] == grids[1]
    assert -10 <= quantizer.low <= -5
    assert float((quantizer.eval()(x) - x).square().mean().detach()) < 0.06
    with pytest.raises(RuntimeError, match=r"^finish\(\) comes after observe\(\)$"):
        quantizer.finish()


@pytest.mark.parametrize("name", sorted(CALIBRATIONS))
def test_a_tensor_of_zeros(name: str) -> None:
    calibrator: Any = CALIBRATIONS[name]()
    calibrator.observe(torch.zeros(10))
    for arguments in ((4, -8, 7, False), (4, 0, 15, False), (4, 0, 15, True)):
        assert calibrator.range(*arguments) == (0, 0)


def test_number_of_batches() -> None:
    model = prepare(resnet8_digits(), QConfig(calibration="minmax"), torch.zeros(1, 1, 8, 8))
    x = torch.rand(4, 1, 8, 8)
    calibrate(model, [x, 100 * x], batches=1)
    first = float(model.pool.output_quantizer.scale().detach())
    calibrate(model, [x])
    assert float(model.pool.output_quantizer.scale().detach()) == first


@pytest.mark.parametrize("name", sorted(CALIBRATIONS))
def test_calibrators_of_several_processes_are_one(name: str) -> None:
    """Merged, they give what one gives that has seen batches of both."""
    torch.manual_seed(0)
    first, second = ([torch.randn(500) * s for s in sizes] for sizes in ((1.0, 5.0, 0.0), (0.0, 0.3, 7.0)))
    parts: Any = [CALIBRATIONS[name]() for _ in range(3)]
    whole: Any = CALIBRATIONS[name]()
    for a, b in zip(first, second, strict=True):
        parts[0].observe(a)
        parts[1].observe(b)
        whole.observe(torch.cat((a, b)))
    merged = copy.deepcopy(parts[0])
    for other in parts[1:] if name != "mean_range" else parts[1:2]:  # the last has seen nothing
        merged.merge(other)
    backwards = copy.deepcopy(parts[1])
    backwards.merge(parts[0])
    for arguments in ((4, -8, 7, False), (4, 0, 15, False), (4, -8, 7, True)):
        assert merged.range(*arguments) == pytest.approx(whole.range(*arguments), rel=1e-12)
        assert backwards.range(*arguments) == pytest.approx(whole.range(*arguments), rel=1e-12)


def test_batches_that_only_one_process_has() -> None:
    calibrator, other = MeanRange(), MeanRange()
    calibrator.observe(torch.tensor([-1.0, 2.0]))
    for batch in ([-3.0, 1.0], [-4.0, 6.0]):
        other.observe(torch.tensor(batch))
    calibrator.merge(other)
    assert calibrator.range(4, -8, 7, True) == (-3.5, 4.0)
