"""Learned step sizes: LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020).

Our own autograd function, because torch's learnable fake quantization tests for clipping behind the rounding: between
the last level and half a step above it, that gives other gradients than the paper's equations 3 and 5.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..arch import numerics
from .methods import METHODS, ActQuantizer, Method, WeightQuantizer

STEP_MIN: Final = 2.0**-26
"""The smallest step; a layer whose values are smaller is quantized to zeros."""


class PositiveStep(torch.autograd.Function):
    """``max(|raw|, STEP_MIN)``: how a stored step becomes the step that is used.

    The gradient is that of ``|raw|``, with 1 at 0, also below :data:`STEP_MIN`, so that no step is ever stuck. While
    optimizers keep ``raw`` positive, it *is* the step: learning rates mean what they mean in the paper.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor) -> Tensor:
        ctx.save_for_backward(raw)
        return raw.abs().clamp_min(STEP_MIN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (raw,) = ctx.saved_tensors
        return torch.where(raw < 0, -grad, grad)


class Lsq(torch.autograd.Function):
    """``step * code(v / step)`` with the gradients of the paper.

    ``code`` limits to ``low..high`` and rounds: half up, or half to even and onto the grid of 8-bit weights (``w8``).
    With ``u = v / step``::

        d/dv    = 1 where low < u < high, else 0
        d/dstep = grad_scale * sum(code - u where low < u < high, else code)

    where the sum is over everything that shares the step.

    Parameters
    ----------
    v : Tensor
    step : Tensor
        Positive; broadcasts against ``v``.
    low, high : int
        Lowest and highest code.
    grad_scale : float
        ``1 / sqrt(N * high)``, N the values that share the step.
    kind : {"half_up", "half_even", "w8"}
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, low: int, high: int, grad_scale: float, kind: str) -> Tensor:
        u = v / step
        code = quantize(u, low, high, kind)
        ctx.save_for_backward(u, code, step)
        ctx.low, ctx.high, ctx.grad_scale = low, high, grad_scale
        return code * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, code, step = ctx.saved_tensors
        inside = (u > ctx.low) & (u < ctx.high)
        grad_step = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, code - u, code)
            grad_step = (grad * slope).sum_to_size(step.shape) * ctx.grad_scale
        return grad * inside, grad_step, None, None, None, None


def quantize(u: Tensor, low: int, high: int, kind: str) -> Tensor:
    """Codes of ``v / step``, in the float type of ``u``."""
    limited = u.clamp(low, high)
    if kind == "half_up":
        return torch.floor(limited + 0.5).clamp_max(high)
    nearest = limited.round()
    if kind == "half_even":
        return nearest
    # Only numbers are compared in the projection, so that integers may come as int16.
    return numerics.w8_project(nearest.to(torch.int16), limited).to(u.dtype)


def initial_step(mean: Tensor, largest: Tensor, high: int) -> Tensor:
    """``2 * mean|v| / sqrt(high)``, the paper's; but never more than what covers the largest value.

    With 8 bits the paper's formula alone would leave most codes unused. Where all values are zero, the result is 0.
    """
    return torch.minimum(2 * mean / math.sqrt(high), largest / high)


class LsqWeights(WeightQuantizer):
    """Weights with a learned step per output channel; ``step`` is stored as it is, see :class:`PositiveStep`.

    ``grad_scale`` is ``1 / sqrt(N * p)`` with N the weights of one channel and p the highest code.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight, bits)
        flat = weight.detach().reshape(weight.shape[0], -1)
        steps = initial_step(flat.abs().mean(1), flat.abs().amax(1), self.limit)
        # A channel of zeros has no step of its own; a usual one keeps its bias representable.
        usual = steps[steps > 0].mean() if bool((steps > 0).any()) else torch.ones_like(steps[0])
        self.step = nn.Parameter(torch.where(steps > 0, steps, usual))
        self.grad_scale = 1 / math.sqrt(flat.shape[1] * self.limit)
        self.kind = "half_even" if bits == 4 else "w8"

    def scale(self) -> Tensor:
        step: Tensor = PositiveStep.apply(self.step)
        return step

    def _scale_like(self, weight: Tensor) -> Tensor:
        return self.scale().reshape(-1, *[1] * (weight.ndim - 1))

    def codes(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return quantize(weight / self._scale_like(weight), -self.limit, self.limit, self.kind).long()

    def forward(self, weight: Tensor) -> Tensor:
        scale = self._scale_like(weight)
        result: Tensor = Lsq.apply(weight, scale, -self.limit, self.limit, self.grad_scale, self.kind)
        return result


class LsqActivations(ActQuantizer):
    """Activations with one learned step, stored as it is (see :class:`PositiveStep`) and nan until calibrated.

    ``grad_scale`` is ``1 / sqrt(N * p)`` with N the values per image, fixed when the model is prepared, so that neither
    batch size nor image size changes how fast steps learn.
    """

    def __init__(self, bits: int, unsigned: bool, features: int) -> None:
        super().__init__(bits, unsigned, features)
        self.step = nn.Parameter(torch.tensor(math.nan))
        self.grad_scale = 1 / math.sqrt(features * self.high)
        self._reset()

    def _reset(self) -> None:
        self._total = self._count = self._largest = 0.0

    def scale(self) -> Tensor:
        step: Tensor = PositiveStep.apply(self.step)
        return step

    def observe(self, x: Tensor) -> None:
        magnitude = x.abs()
        self._total += float(magnitude.sum(dtype=torch.float64))
        self._count += x.numel()
        self._largest = max(self._largest, float(magnitude.max()))

    def finish(self) -> None:
        mean, largest = (torch.tensor(v, dtype=torch.float64) for v in (self._total / self._count, self._largest))
        step = float(initial_step(mean, largest, self.high))
        self._reset()
        with torch.no_grad():
            # A tensor that is always zero: any step represents it.
            self.step.fill_(step if step > 0 else 1.0)

    def fake_quantize(self, x: Tensor) -> Tensor:
        result: Tensor = Lsq.apply(x, self.scale(), self.low, self.high, self.grad_scale, "half_up")
        return result


METHODS["lsq"] = Method(weights=LsqWeights, activations=LsqActivations)
