"""Trained quantization thresholds: TQT (Jain et al., MLSys 2020). Power-of-two steps, learned in log2 of a threshold.

``step = 2**ceil(log2 t) / 2**(bits-1)``, or over ``2**bits`` where codes are unsigned, and the rounding up passes
gradients straight through, so that ``d v_hat / d log2 t = step * ln 2 * (code - v/step inside, code elsewhere)``.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .lsq import Lsq, quantize
from .methods import METHODS, ActQuantizer, Method, WeightQuantizer


class ThresholdStep(torch.autograd.Function):
    """``2 ** (ceil(log2_t) - exponent)``; the gradient is that without the rounding up: times ``step * ln 2``."""

    @staticmethod
    def forward(ctx: Any, log2_t: Tensor, exponent: int) -> Tensor:
        # ldexp of a one is exact, exp2 is not everywhere. Limits keep it from 0 and infinity.
        power = (log2_t.ceil() - exponent).clamp(-40, 40)
        step = torch.where(log2_t.isnan(), log2_t, torch.ldexp(torch.ones_like(log2_t), power.nan_to_num()))
        ctx.save_for_backward(step)
        return step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (step,) = ctx.saved_tensors
        return grad * step * math.log(2), None


class TqtWeights(WeightQuantizer):
    """Weights with learned thresholds, at first the largest magnitude. The paper has one per layer.

    The codes are those of every method here, so that code ``-2**(bits-1)`` is left out where they are narrow.
    """

    def __init__(self, weight: Tensor, bits: int, **grid: Any) -> None:
        super().__init__(weight, bits, **grid)
        largest = self.groups(weight.detach()).abs().amax(1)
        usual = largest[largest > 0].mean() if bool((largest > 0).any()) else torch.ones_like(largest[0])
        self.log2_t = nn.Parameter(torch.where(largest > 0, largest, usual).log2())

    def scale(self, weight: Tensor) -> Tensor:
        step: Tensor = ThresholdStep.apply(self.log2_t, self.bits - 1)
        return step.expand(weight.shape[0])

    def codes(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return quantize(weight / self.scale_like(weight), self.low, self.high, self.kind).long()

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = Lsq.apply(weight, self.scale_like(weight), self.low, self.high, 1.0, self.kind)
        return result


class TqtActivations(ActQuantizer):
    """Activations with one learned threshold; nan until calibrated."""

    own_calibration = "entropy"

    def __init__(self, bits: int, unsigned: bool, features: int, **grid: Any) -> None:
        super().__init__(bits, unsigned, features, **grid)
        self.log2_t = nn.Parameter(torch.tensor(math.nan))

    def scale(self) -> Tensor:
        step: Tensor = ThresholdStep.apply(self.log2_t, self.bits if self.unsigned else self.bits - 1)
        return step

    def set_range(self, low: float, high: float) -> None:
        threshold = max(-low, high)
        self.log2_t.fill_(math.log2(threshold) if threshold > 0 else 0.0)

    def fake_quantize(self, x: Tensor) -> Tensor:
        result: Tensor = Lsq.apply(x, self.scale(), self.low, self.high, 1.0, "half_up")
        return result


METHODS["tqt"] = Method(weights=TqtWeights, activations=TqtActivations)
