"""Ranges that follow the values: IAO (Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", CVPR 2018). Nothing but weights is learned.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .distributed import reduce_max
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
        # A channel of zeros gets the mean of the others.
        count = (step > 0).sum()
        usual = torch.where(count > 0, step.clamp_min(0).sum() / count.clamp_min(1), 1.0)
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

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Step and unsigned code of real zero, float64, as :func:`nibblecore.qat.calibration.affine_grid` has them.

        In tensors, so that a model compiles without a break. The step is nan before calibration.
        """
        low, high = self.range.double()
        if self.affine:
            top = (1 << self.bits) - 1
            step = (high.clamp_min(0) - low.clamp_max(0)) / top
            zero = torch.where(step > 0, torch.floor(0.5 - low.clamp_max(0) / step).clamp(0, top), 0.0)
        else:
            lowest, highest = self.plain_range
            step = (high / highest).maximum(low / lowest) if lowest else high / highest
            zero = torch.zeros_like(step)
        step = torch.where(step <= 0, 1.0, step).clamp_min(STEP_MIN)
        return step, zero

    def scale(self) -> Tensor:
        step = self._grid()[0].to(self.range.dtype)
        return NearestPowerOfTwo.apply(step) if self.power_of_two else step

    @property
    def low(self) -> int:
        return -int(self._grid()[1]) if self.affine else self.plain_range[0]

    @property
    def high(self) -> int:
        return (1 << self.bits) - 1 - int(self._grid()[1]) if self.affine else self.plain_range[1]

    @property
    def zero(self) -> int:
        return int(self._grid()[1]) - (1 << self.storage_bits - 1) if self.affine else super().zero

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
        if not x.numel():
            return
        zero = x.new_zeros(())
        low, high = self._ends(x)
        low, high = reduce_max(torch.stack((-low.minimum(zero), high.maximum(zero))))
        now = torch.stack((-low, high)).to(self.range)
        moved = self.range.lerp(now, 1 - self.options.decay)
        # Without calibration, the first batch sets the range.
        self.range.copy_(torch.where(self.range.isnan(), now, moved))
        self.seen += 1

    def fake_quantize(self, x: Tensor) -> Tensor:
        scale, zero = self.scale(), self._grid()[1].to(x.dtype)
        low, high = (-zero, (1 << self.bits) - 1 - zero) if self.affine else (zero + self.low, zero + self.high)
        u = x.detach() / scale
        inside = (u >= low) & (u <= high)
        result: Tensor = _Straight.apply(x, torch.floor(u + 0.5).maximum(low).minimum(high) * scale, inside)
        if self.training and self.options.delay:
            result = torch.where(self.seen <= self.options.delay, x.relu() if self.rectified else x, result)
        return result


METHODS["iao"] = Method(weights=MinMaxWeights, activations=IaoActivations, options=IaoOptions)
