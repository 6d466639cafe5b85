"""From observed values to a range: what the grid of an activation tensor is first set to.

A calibrator sees batches and then gives ``(low, high)`` with ``low <= 0 <= high``; the grid covers that range, or for
grids without a zero point the smallest symmetric one around it. Register others in :data:`CALIBRATIONS`.
"""

import abc
import math
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Calibrator(abc.ABC):
    """Observes one tensor, batch by batch."""

    @abc.abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take in one batch; any shape, finite values."""

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

    def range(self, bits: int, low: int, high: int, affine: bool) -> tuple[float, float]:
        return self.low, self.high


CALIBRATIONS: Final[dict[str, Callable[[], Calibrator]]] = {
    "mean_magnitude": MeanMagnitude,
    "minmax": MinMax,
}
"""Calibrators by name."""

FloatArray = npt.NDArray[np.float64]
