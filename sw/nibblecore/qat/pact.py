"""PACT (Choi et al., "PACT: Parameterized clipping activation for quantized neural networks", 2018): a baseline.

Activations are clipped to a learned ``alpha``; weights have steps by their largest magnitude, as in
:mod:`nibblecore.qat.iao`, because the paper's (DoReFa's) have no code of zero. Give ``alpha`` the decay of the weights:
:func:`nibblecore.qat.parameter_groups` leaves it out, and :func:`clipping_penalty` is the paper's term of the loss.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .iao import MinMaxWeights
from .lsq import NearestPowerOfTwo, PositiveStep
from .methods import METHODS, ActQuantizer, Method


class Pact(torch.autograd.Function):
    """``step * clamp(floor(x/step + 1/2), low, high)`` with ``step = alpha / high`` and the gradients of the paper.

    ``d/dalpha`` is the sum of 1 where ``x >= alpha``, of ``low/high`` where ``x <= alpha * low/high`` (0 for unsigned
    codes) and of 0 between, where the rounding is not looked at; ``d/dx`` is 1 between, and at 0 for unsigned codes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        u = x / step
        above = u >= high
        below = u <= low if low else u < 0
        ctx.save_for_backward(above, below)
        ctx.ratio = low / high
        return torch.floor(u + 0.5).clamp(low, high) * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        above, below = ctx.saved_tensors
        grad_alpha = (grad * above).sum() + ctx.ratio * (grad * below).sum()
        return grad * ~(above | below), grad_alpha, None, None, None


class PactActivations(ActQuantizer):
    """Activations clipped to a learned ``alpha``, nan until calibrated; signed ones are clipped on both sides."""

    own_calibration = "minmax"
    magnitudes = ("alpha",)

    def __init__(self, bits: int, unsigned: bool, features: int, **grid: Any) -> None:
        super().__init__(bits, unsigned, features, **grid)
        self.alpha = nn.Parameter(torch.tensor(math.nan))

    def scale(self) -> Tensor:
        step: Tensor = PositiveStep.apply(self.alpha) / self.high
        return NearestPowerOfTwo.apply(step) if self.power_of_two else step

    def set_range(self, low: float, high: float) -> None:
        self.alpha.fill_(self.step_for(low, high) * self.high)

    def fake_quantize(self, x: Tensor) -> Tensor:
        alpha: Tensor = PositiveStep.apply(self.alpha)
        result: Tensor = Pact.apply(x, alpha, self.scale().detach(), self.low, self.high)
        return result


def clipping_penalty(model: nn.Module) -> Tensor:
    """``sum(alpha**2)`` over the activations of PACT; to be added to the loss times a weight decay."""
    terms = [m.alpha.square() for m in model.modules() if isinstance(m, PactActivations)]
    return torch.stack(terms).sum() if terms else torch.zeros(())


METHODS["pact"] = Method(weights=MinMaxWeights, activations=PactActivations)
