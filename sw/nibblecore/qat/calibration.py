"""From observed values to a range: what the grid of an activation tensor is first set to.

A calibrator sees batches and then gives ``(low, high)`` with ``low <= 0 <= high``; the grid covers that range, or for
grids without a zero point the smallest symmetric one around it. Register others in :data:`CALIBRATIONS`.
"""

import abc
import copy
import math
from collections.abc import Callable
from typing import ClassVar, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]


class Calibrator(abc.ABC):
    """Observes one tensor, batch by batch."""

    @abc.abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take in one batch; any shape, at least one value, finite values."""

    @abc.abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what the calibrator of another process has observed, as if both had been one.

        The first batches of both are one batch, and so on.
        """

    @abc.abstractmethod
    def range(self, bits: int, low: int, high: int, affine: bool) -> tuple[float, float]:
        """``(low, high)`` of real values, for codes ``low..high`` of ``bits`` bits.

        ``affine``: the grid has a zero point, so that both ends are free.
        """


class MeanMagnitude(Calibrator):
    """LSQ's: a step of ``2 * mean|x| / sqrt(high)``, but never more than what covers the largest magnitude.

    With 8 bits the paper's formula alone would leave most codes unused.
    """

    def __init__(self) -> None:
        self.total = self.largest = 0.0
        self.count = 0

    def observe(self, x: Tensor) -> None:
        magnitude = x.abs()
        self.total += float(magnitude.sum(dtype=torch.float64))
        self.count += x.numel()
        self.largest = max(self.largest, float(magnitude.max()))

    def merge(self, other: Self) -> None:
        self.total += other.total
        self.count += other.count
        self.largest = max(self.largest, other.largest)

    def range(self, bits: int, low: int, high: int, affine: bool) -> tuple[float, float]:
        step = min(2 * self.total / self.count / math.sqrt(high), self.largest / high)
        return step * low, step * high


class MinMax(Calibrator):
    """The union of the ranges of all batches."""

    def __init__(self) -> None:
        self.low = self.high = 0.0

    def observe(self, x: Tensor) -> None:
        low, high = x.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def merge(self, other: Self) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def range(self, bits: int, low: int, high: int, affine: bool) -> tuple[float, float]:
        return self.low, self.high


class MeanRange(Calibrator):
    """The mean over batches of each batch's smallest and largest value."""

    def __init__(self) -> None:
        self.ranges: list[tuple[float, float]] = []

    def observe(self, x: Tensor) -> None:
        low, high = x.aminmax()
        self.ranges.append((float(low), float(high)))

    def merge(self, other: Self) -> None:
        both = list(zip(self.ranges, other.ranges, strict=False))
        rest = self.ranges[len(both) :] + other.ranges[len(both) :]
        self.ranges = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in both] + rest

    def range(self, bits: int, low: int, high: int, affine: bool) -> tuple[float, float]:
        lows, highs = zip(*self.ranges, strict=True)
        return min(0.0, sum(lows) / len(lows)), max(0.0, sum(highs) / len(highs))


class Histogram(Calibrator):
    """Counts of values in bins of equal width, ``BINS`` on either side of 0: bin ``k`` is ``k*w <= x < (k+1)*w``.

    ``w`` is the smallest power of two for which all values fit. Where a batch needs more, bins are merged by twos,
    which is exact: counts depend on the values only, not on how they came in batches and processes.
    """

    BINS: Final = 1 << 15

    def __init__(self) -> None:
        self.width = 0.0
        self.counts: npt.NDArray[np.int64] = np.zeros(2 * self.BINS, np.int64)

    def _widen(self, width: float) -> None:
        """Make bins at least ``width`` wide, a power of two."""
        # While there is no width, all values are 0 and in the bin that starts there.
        self.width = self.width or width
        while self.width < width:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts[:] = 0
            self.counts[self.BINS // 2 : self.BINS // 2 + len(merged)] = merged
            self.width *= 2

    def observe(self, x: Tensor) -> None:
        largest = float(x.abs().max())
        if not largest:
            self.counts[self.BINS] += x.numel()
            return
        self._widen(math.ldexp(1.0, math.frexp(largest)[1]) / self.BINS)
        index = torch.floor(x.detach().reshape(-1).double() / self.width).long() + self.BINS
        self.counts += torch.bincount(index.clamp_(0, 2 * self.BINS - 1), minlength=2 * self.BINS).cpu().numpy()

    def merge(self, other: Self) -> None:
        if other.width:
            self._widen(other.width)
        if self.width:
            other = copy.deepcopy(other)
            other._widen(self.width)
        self.counts += other.counts

    def magnitudes(self, bins: int) -> tuple[FloatArray, float]:
        """Counts of ``|x|`` in ``bins`` bins from 0 to the largest value, and their width.

        Their edges are between those here, whose counts are split as if values were spread evenly.
        """
        folded = self.counts[self.BINS :] + self.counts[: self.BINS][::-1]
        used = int(np.flatnonzero(folded)[-1]) + 1 if folded.any() else 0
        below = np.concatenate(([0], np.cumsum(folded[:used])))
        edges = np.linspace(0, used, bins + 1)
        return np.diff(np.interp(edges, np.arange(used + 1), below)), used / bins * self.width


class Percentile(Histogram):
    """The quantiles ``1 - gamma`` and ``gamma`` of all observed values, to the width of a bin; gamma = 0.999 (FQN)."""

    GAMMA: Final = 0.999

    def range(self, bits: int, low: int, high: int, affine: bool) -> tuple[float, float]:
        below = np.cumsum(self.counts)
        total = below[-1]
        # Edges behind which no more than a share of 1 - gamma lies.
        upper = int(np.searchsorted(below, self.GAMMA * total)) + 1 - self.BINS
        lower = int(np.searchsorted(below, (1 - self.GAMMA) * total, side="right")) - self.BINS
        return min(0.0, lower * self.width), max(0.0, upper * self.width)


class Entropy(Histogram):
    """The clipping threshold of least Kullback-Leibler divergence (TensorRT, GTC 2017); symmetric, on magnitudes.

    2048 bins; ``kl_divergence`` for every threshold from 128 bins on, or 16 with 4 bits and fewer; the last smallest.
    """

    MAGNITUDES: Final = 2048
    SYMMETRIC: ClassVar[bool] = False

    def range(self, bits: int, low: int, high: int, affine: bool) -> tuple[float, float]:
        counts, width = self.magnitudes(self.MAGNITUDES)
        if not self.width:
            return 0.0, 0.0
        # Behind a ReLU, half of all values are 0; they say nothing about the threshold.
        counts[0] = counts[1]
        levels = 1 << (bits - 1 if low < 0 else bits)
        used = int(np.flatnonzero(counts)[-1]) + 1
        start = min(used, max(levels, 128 if bits == 8 else 16))
        divergences = [kl_divergence(counts, i, levels, self.SYMMETRIC) for i in range(start, used + 1)]
        best = start + len(divergences) - 1 - int(np.argmin(divergences[::-1]))
        threshold = best * width
        return (-threshold if low < 0 else 0.0), threshold


class SymmetricEntropy(Entropy):
    """As :class:`Entropy`, with Jeffreys' divergence: that of P from Q and that of Q from P, added (TQT)."""

    SYMMETRIC = True


def kl_divergence(counts: FloatArray, size: int, levels: int, symmetric: bool = False) -> float:
    """Divergence between a histogram clipped to its first ``size`` bins and the same in ``levels`` levels.

    P: the bins, what is clipped added to the last. Q: the bins without it, split into ``levels`` groups as equal as
    they can be, each group's sum spread evenly over its bins that are not empty. ``sum(P * log(P / Q))`` of the
    normalized two, with 1e-30 for a Q that is 0 where P is not; ``symmetric`` adds ``sum(Q * log(Q / P))``.
    """
    kept = counts[:size]
    p = kept.copy()
    p[-1] += counts[size:].sum()
    edges = np.arange(levels + 1) * size // levels
    group = np.repeat(np.arange(levels), np.diff(edges))
    filled = np.bincount(group, kept > 0, levels)
    q = np.where(kept > 0, (np.bincount(group, kept, levels) / np.maximum(filled, 1))[group], 0.0)
    total_p, total_q = p.sum(), q.sum()
    if not total_q:
        return math.inf
    present = p > 0
    p, q = p[present] / total_p, np.maximum(q[present] / total_q, 1e-30)
    return float(((p - q if symmetric else p) * np.log(p / q)).sum())


class SquaredError(Histogram):
    """The observed range shrunk by 0, 1, .. 80 %, whichever has the least mean squared error; counted by bins."""

    SHRINKS: Final = 81

    def range(self, bits: int, low: int, high: int, affine: bool) -> tuple[float, float]:
        (filled,) = np.nonzero(self.counts)
        counts, values = self.counts[filled].astype(np.float64), (filled - self.BINS + 0.5) * self.width
        if not self.width:
            return 0.0, 0.0
        least = min(0.0, float(filled[0] - self.BINS) * self.width)
        most = max(0.0, float(filled[-1] + 1 - self.BINS) * self.width)
        best = (math.inf, 0.0, 0.0)
        for k in range(self.SHRINKS):
            real_low, real_high = least * (1 - k / 100), most * (1 - k / 100)
            if affine:
                step, zero = affine_grid(real_low, real_high, bits)
                grid_low, grid_high = -zero, (1 << bits) - 1 - zero
            else:
                step = max(real_high / high, real_low / low if low else 0.0)
                grid_low, grid_high = low, high
            if step <= 0:
                break
            quantized = np.clip(np.floor(values / step + 0.5), grid_low, grid_high) * step
            best = min(best, (float((counts * (quantized - values) ** 2).sum()), real_low, real_high))
        return best[1], best[2]


def affine_grid(low: float, high: float, bits: int) -> tuple[float, int]:
    """``(step, zero)`` of unsigned codes over ``low..high``, nudged so that real 0 has the code ``zero``.

    ``step = (high - low) / (2**bits - 1)`` and ``zero = round(-low / step)``, half up, in 0..2**bits - 1, where the
    range is widened to contain 0. A range of 0 gives ``(1.0, 0)``.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    top = (1 << bits) - 1
    step = (high - low) / top
    if step <= 0:
        return 1.0, 0
    return step, max(0, min(top, math.floor(-low / step + 0.5)))


CALIBRATIONS: Final[dict[str, Callable[[], Calibrator]]] = {
    "mean_magnitude": MeanMagnitude,
    "minmax": MinMax,
    "mean_range": MeanRange,
    "percentile": Percentile,
    "entropy": Entropy,
    "symmetric_entropy": SymmetricEntropy,
    "mse": SquaredError,
}
"""Calibrators by name."""
