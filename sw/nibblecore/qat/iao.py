"""Ranges that follow the values: IAO (Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", CVPR 2018). Nothing but weights is learned.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .calibration import affine_grid
from .lsq import STEP_MIN, NearestPowerOfTwo, quantize
from .methods import METHODS, ActQuantizer, Method, MethodOptions, WeightQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class IaoOptions(MethodOptions):
    """Options of IAO.

    Parameters
    ----------
    decay : float
        Of the moving averages of activations' ranges, 0 <= decay < 1; they move in training mode only.
    delay : int
        Batches of training for which activations are not quantized, while their ranges settle.
    quantile : float
        What the averages follow: the quantiles ``1 - quantile`` and ``quantile`` of each batch, with 1 its smallest and
        largest value; 0.5 < quantile <= 1.
    """

    method: ClassVar[str] = "iao"
    decay: float = 0.99
    delay: int = 0
    quantile: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay of IaoOptions must be at least 0 and less than 1, not {self.decay!r}")
        if not 0.5 < self.quantile <= 1:
            raise ValueError(f"quantile of IaoOptions must be above 0.5 and at most 1, not {self.quantile!r}")
        if not isinstance(self.delay, int) or self.delay < 0:
            raise ValueError(f"delay of IaoOptions must be an integer of at least 0, not {self.delay!r}")


class _Straight(torch.autograd.Function):
    """``quantized``, with the gradient passed to ``v`` where ``inside``, and nothing to the rest."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, quantized: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


class MinMaxWeights(WeightQuantizer):
    """Symmetric weights whose step is the largest magnitude over the highest code, whatever it is at the moment."""

    def __init__(self, weight: Tensor, bits: int, *, options: MethodOptions | None = None, **grid: Any) -> None:
        super().__init__(weight, bits, **grid)

    def scale(self, weight: Tensor) -> Tensor:
        groups = self.groups(weight.detach())
        # The full grids reach further down than up.
        step = torch.maximum(groups.amax(1) / self.high, groups.amin(1) / self.low)
        usual = step[step > 0].mean() if bool((step > 0).any()) else torch.ones_like(step[0])
        step = torch.where(step > 0, step, usual).clamp_min(STEP_MIN)
        if self.power_of_two:
            step = NearestPowerOfTwo.apply(step)
        return step.expand(weight.shape[0])

    def codes(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return quantize(weight / self.scale_like(weight), self.low, self.high, self.kind).long()

    def fake_quantize(self, weight: Tensor) -> Tensor:
        scale = self.scale_like(weight)
        u = weight.detach() / scale
        inside = (u >= self.low) & (u <= self.high)
        result: Tensor = _Straight.apply(weight, quantize(u, self.low, self.high, self.kind) * scale, inside)
        return result


class IaoActivations(ActQuantizer):
    """Activations whose range is a moving average of the batches', with an integer zero point where it is needed.

    ``range`` holds the smallest and largest value, ``seen`` the batches of training. Values outside are clipped, and
    their gradients are 0. The range moves in training mode, while the observer is on, as it is from the start; in
    evaluation mode the observer calibrates, and only where fake quantization is off.
    """

    range: Tensor
    seen: Tensor
    own_calibration = "minmax"
    observes = True

    def __init__(
        self, bits: int, unsigned: bool, features: int, *, options: IaoOptions | None = None, **grid: Any
    ) -> None:
        super().__init__(bits, unsigned, features, **grid)
        self.options = options or IaoOptions()
        self.register_buffer("range", torch.full((2,), math.nan))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @property
    def affine(self) -> bool:
        # A power-of-two step would not cover a nudged range.
        return not self.rectified and not self.power_of_two

    def _grid(self) -> tuple[float, int]:
        low, high = (float(v) for v in self.range)
        if math.isnan(low + high):
            return math.nan, 0
        if self.affine:
            step, zero = affine_grid(low, high, self.bits)
        else:
            step, zero = self.step_for(low, high), 0
        return max(step, STEP_MIN), zero

    def scale(self) -> Tensor:
        step = self.range.new_tensor(self._grid()[0])
        return NearestPowerOfTwo.apply(step) if self.power_of_two else step

    @property
    def low(self) -> int:
        return -self._grid()[1] if self.affine else super().low

    @property
    def high(self) -> int:
        return (1 << self.bits) - 1 - self._grid()[1] if self.affine else super().high

    @property
    def zero(self) -> int:
        return self._grid()[1] - (1 << self.storage_bits - 1) if self.affine else super().zero

    def set_range(self, low: float, high: float) -> None:
        self.range.copy_(torch.tensor([min(low, 0.0), max(high, 0.0)]))

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the moving averages take in."""
        if self.options.quantile == 1:
            low, high = values.aminmax()
            return low, high
        flat = values.flatten()
        # How many values may be beyond either end.
        beyond = math.floor((1 - self.options.quantile) * len(flat) + 1e-6)
        return flat.kthvalue(beyond + 1).values, flat.kthvalue(len(flat) - beyond).values

    def follow(self, x: Tensor) -> None:
        if not self.training:
            if not self.fake_quant_enabled:
                self.observe(x)
            return
        zero = x.new_zeros(())
        low, high = self._ends(x)
        now = torch.stack((low.minimum(zero), high.maximum(zero))).to(self.range)
        moved = self.range.lerp(now, 1 - self.options.decay)
        # Without calibration, the first batch sets the range.
        self.range.copy_(torch.where(self.range.isnan(), now, moved))
        self.seen += 1

    def fake_quantize(self, x: Tensor) -> Tensor:
        if self.training and int(self.seen) <= self.options.delay:
            return x.relu() if self.rectified else x
        scale, low, high = self.scale(), self.low, self.high
        u = x.detach() / scale
        inside = (u >= low) & (u <= high)
        result: Tensor = _Straight.apply(x, torch.floor(u + 0.5).clamp(low, high) * scale, inside)
        return result


METHODS["iao"] = Method(weights=MinMaxWeights, activations=IaoActivations, options=IaoOptions)
