"""Learned step sizes: LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020).

Our own autograd function, because torch's learnable fake quantization tests for clipping behind the rounding: between
the last level and half a step above it, that gives other gradients than the paper's equations 3 and 5.
"""

import dataclasses
import math
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import kernels
from .distributed import processes
from .methods import METHODS, ActQuantizer, Method, MethodOptions, WeightQuantizer, check_choice
from .powers import power_of_two

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


class NearestPowerOfTwo(torch.autograd.Function):
    """``2 ** round(log2(step))``; the rounding of the exponent passes gradients straight through.

    Hence ``d result / d step = result / step``.
    """

    @staticmethod
    def forward(ctx: Any, step: Tensor) -> Tensor:
        # log2 of a power of two may be off by an ulp, which the rounding removes.
        result = power_of_two(step.detach().log2().round().nan_to_num().long()).to(step.dtype)
        result = torch.where(step.isnan(), step, result)
        ctx.save_for_backward(result / step)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope


class Lsq(torch.autograd.Function):
    """``step * code(v / step)`` with the gradients of the paper.

    ``code`` limits to ``low..high`` and rounds: half up, or half to even and onto the grid of 8-bit weights (``w8``).
    With ``u = v / step``::

        d/dv    = 1 where low < u < high, else 0
        d/dstep = grad_scale * sum(code - u where low < u < high, else code)

    where the sum is over everything that shares the step. Computed in one pass where
    :func:`nibblecore.qat.kernels.usable` says so, with the same bits but for the order of that sum.

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
    stored : bool
        Whether ``step`` is a stored one: it goes through :class:`PositiveStep` first, and one of shape ``(n,)`` holds a
        step for each of the n parts ``v[i]``, or for all.
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, step: Tensor, low: int, high: int, grad_scale: float, kind: str, stored: bool = False
    ) -> Tensor:
        ctx.options = low, high, grad_scale, kind
        raw = step if stored else None
        if raw is not None:
            step = raw.abs().clamp_min_(STEP_MIN)
            if raw.ndim:
                step = step.reshape(-1, *[1] * (v.ndim - 1))
        if kernels.usable(v, step):
            ctx.save_for_backward(v, None, step, raw)
            return kernels.lsq_forward(v, step, low, high, kind)
        u = v / step
        code = quantize(u, low, high, kind)
        ctx.save_for_backward(u, code, step, raw)
        return code * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, code, step, raw = ctx.saved_tensors
        low, high, grad_scale, kind = ctx.options
        grad_v = grad_step = None
        if code is None:
            grad_v, grad_step = kernels.lsq_backward(grad, v, step, low, high, kind, grad_scale)
        else:
            u = v
            if ctx.needs_input_grad[0]:
                grad_v = where_inside(grad, u, low, high)
            if ctx.needs_input_grad[1]:
                slope = where_inside(u, u, low, high).sub_(code)  # of the opposite sign
                grad_step = slope.mul_(grad).sum_to_size(step.shape) * -grad_scale
        if raw is not None and grad_step is not None:
            grad_step = grad_step.reshape(raw.shape)
            grad_step = torch.where(raw < 0, -grad_step, grad_step)
        return grad_v, grad_step, None, None, None, None, None


class LsqParameters(torch.autograd.Function):
    """:class:`Lsq` of a layer's weights from stored steps, times the factors of its rounded multipliers, and its bias.

    What ``QuantLayer._parameters_for`` computes, in two kernels. ``input_step`` and ``output_step`` (0 for none) are
    numbers; no gradient goes to them, and that of the bias passes straight through. The third result is the bin
    regularization loss of the weights, unless ``binned`` is None; it says whether that moves steps too. Another
    gradient of the same weights would be another tensor to write and to add; here it is a few operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        raw: Tensor,
        bias: Tensor | None,
        input_step: float,
        output_step: float,
        low: int,
        high: int,
        grad_scale: float,
        kind: str,
        binned: bool | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        step, gain, rounded = kernels.parameters(raw, bias, input_step, output_step, STEP_MIN, len(weight))
        loss = population = None
        if binned is not None:
            loss, population = kernels.bins_forward(weight, step, low, high)
        ctx.save_for_backward(weight, raw, step, gain, population)
        ctx.options = low, high, kind, grad_scale, binned
        return kernels.lsq_forward(weight, step, low, high, kind, gain), rounded, loss

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, grad_bias: Tensor | None, grad_loss: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        weight, raw, step, gain, population = ctx.saved_tensors
        low, high, kind, grad_scale, binned = ctx.options
        bins = None if binned is None or grad_loss is None else (population, float(grad_loss), binned)
        grad_weight, grad_step = kernels.lsq_backward(grad, weight, step, low, high, kind, grad_scale, gain, bins)
        if len(raw) == 1:
            grad_step = grad_step.sum(0, keepdim=True)
        return grad_weight, torch.where(raw < 0, -grad_step, grad_step), grad_bias, *[None] * 7


def where_inside(values: Tensor, u: Tensor, low: float, high: float) -> Tensor:
    """``values`` where ``low < u < high``, else 0: a new tensor.

    It is what the backward pass of hardtanh computes, in one pass over memory and many times faster than with masks,
    whose booleans the processor does not handle in vectors.
    """
    result: Tensor = torch.ops.aten.hardtanh_backward(values, u, low, high)
    return result


def quantize(u: Tensor, low: int, high: int, kind: str) -> Tensor:
    """Codes of ``v / step``, in the float type of ``u``."""
    if kind == "half_up":
        # The order does not matter to the codes, and this one has fewer passes.
        return (u + 0.5).floor_().clamp_(low, high)
    limited = u.clamp(low, high)
    return limited.round_() if kind == "half_even" else _project_w8(limited)


def _project_w8(limited: Tensor) -> Tensor:
    """:func:`nibblecore.arch.numerics.w8_project` of reals in -119..119, which it overwrites, in floats alone.

    Integers and booleans would take ten times as long.
    """
    code = limited.round()
    # A hole, 16*k + 8, is where (code - 8) / 16 is an integer; elsewhere that is 1/16 off and more.
    sixteenths = code.sub(8).mul_(1 / 16)
    hole = sixteenths.sub_(sixteenths.round()).abs_().mul_(-16).add_(1).clamp_min_(0)
    # Away from zero only where the value is beyond the hole: the difference is exact, and a tie becomes negative.
    beyond = limited.abs_().sub_(code.abs()).sub_(1e-20)
    return code.addcmul_(hole.mul_(code.sign()), torch.copysign(torch.ones_like(beyond), beyond))


def initial_step(mean: Tensor, largest: Tensor, high: int) -> Tensor:
    """``2 * mean|v| / sqrt(high)``, the paper's; but never more than what covers the largest value.

    With 8 bits the paper's formula alone would leave most codes unused. Where all values are zero, the result is 0.
    """
    return torch.minimum(2 * mean / math.sqrt(high), largest / high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LsqOptions(MethodOptions):
    """Where publications and implementations of LSQ differ.

    Parameters
    ----------
    grad_scale : bool
        Whether the gradients of steps are scaled by ``1 / sqrt(N * p)``, p the highest code. Without, give steps an
        optimizer of their own, as Adam with a learning rate of 1e-5.
    weight_count : {"step", "layer"}
        N of weights: those that share the step, or all of the layer.
    act_count : {"features", "batch"}
        N of activations: values per image, fixed when the model is prepared, so that neither batch size nor image size
        changes how fast steps learn; or all values of each batch.
    weight_init : {"mean", "mse"}
        The first steps of weights: the paper's, by the mean magnitude; or the range of least squared error, of all that
        are 0, 1, .. 80 % smaller than what covers the largest weight (Nagel et al., ICML 2022).
    """

    method: ClassVar[str] = "lsq"
    grad_scale: bool = True
    weight_count: str = "step"
    act_count: str = "features"
    weight_init: str = "mean"

    def __post_init__(self) -> None:
        check_choice(self, "grad_scale", (True, False))
        check_choice(self, "weight_count", ("step", "layer"))
        check_choice(self, "act_count", ("features", "batch"))
        check_choice(self, "weight_init", ("mean", "mse"))


class LsqWeights(WeightQuantizer):
    """Weights with learned steps; ``step`` is stored as it is, see :class:`PositiveStep`.

    ``grad_scale`` is ``1 / sqrt(N * p)``, see :class:`LsqOptions`.
    """

    magnitudes = ("step",)

    def __init__(self, weight: Tensor, bits: int, *, options: LsqOptions | None = None, **grid: Any) -> None:
        super().__init__(weight, bits, **grid)
        options = options or LsqOptions()
        groups = self.groups(weight.detach())
        steps = self.least_error(groups) if options.weight_init == "mse" else self.initial(groups)
        # A channel of zeros has no step of its own; a usual one keeps its bias representable.
        usual = steps[steps > 0].mean() if bool((steps > 0).any()) else torch.ones_like(steps[0])
        self.step = nn.Parameter(torch.where(steps > 0, steps, usual))
        count = weight.numel() // (len(steps) if options.weight_count == "step" else 1)
        self.grad_scale = 1 / math.sqrt(count * self.high) if options.grad_scale else 1.0

    def initial(self, groups: Tensor) -> Tensor:
        """The first steps; ``groups`` has a row for each. 0 where there is no information."""
        return initial_step(groups.abs().mean(1), groups.abs().amax(1), self.high)

    def least_error(self, groups: Tensor) -> Tensor:
        """The first steps, of least squared error; ``groups`` has a row for each. 0 where there is no information."""
        full = torch.maximum(groups.amax(1) / self.high, groups.amin(1) / self.low)
        best, least = full, torch.full_like(full, math.inf)
        for shrink in range(81):
            step = full * (1 - shrink / 100)
            u = groups / torch.where(step > 0, step, 1.0)[:, None]
            error = (quantize(u, self.low, self.high, self.kind) - u).square().sum(1) * step.square()
            best = torch.where(error < least, step, best)
            least = torch.minimum(error, least)
        return best

    def scale(self, weight: Tensor) -> Tensor:
        step: Tensor = PositiveStep.apply(self.step)
        if self.power_of_two:
            step = NearestPowerOfTwo.apply(step)
        return step.expand(weight.shape[0])

    def codes(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return quantize(weight / self.scale_like(weight), self.low, self.high, self.kind).long()

    def fake_quantize(self, weight: Tensor) -> Tensor:
        # Powers of two are found in between; otherwise the stored steps will do, in one function.
        step = self.scale_like(weight) if self.power_of_two else self.step
        stored = not self.power_of_two
        result: Tensor = Lsq.apply(weight, step, self.low, self.high, self.grad_scale, self.kind, stored)
        return result

    def chip_parameters(
        self, weight: Tensor, bias: Tensor | None, input_step: Tensor | float, output_step: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        tensors = (weight, self.step) if bias is None else (weight, self.step, bias)
        # The classes that derive from this one have other steps.
        if type(self) is not LsqWeights or self.power_of_two or not kernels.eager(*tensors) or not kernels.library():
            return None
        number = 0.0 if output_step is None else float(output_step)
        options = self.low, self.high, self.grad_scale, self.kind
        result, rounded, loss = LsqParameters.apply(
            weight, self.step, bias, float(input_step), number, *options, self._wanted(weight)
        )
        if loss is not None:
            self._loss = loss, weight, weight._version, self.step._version
        return result, rounded

    # Bin regularization is cheap where weights pass by anyway. So the first request makes the next forward pass compute
    # the loss too, and it goes on until one is not asked for. A loss belongs to the values that weights had.
    _binned: bool | None = None
    _loss: tuple[Tensor, Tensor, int, int] | None = None

    def _wanted(self, weight: Tensor) -> bool | None:
        if self._binned is None or not torch.is_grad_enabled() or len(self.step) != len(weight):
            return None
        if self._loss is not None:
            self._loss = self._binned = None
        return self._binned

    def pending_loss(self, weight: Tensor, grad_to_step: bool) -> Tensor | None:
        """The bin regularization loss of the last forward pass, once; None if it has not computed this one."""
        pending, self._loss = self._loss, None
        asked, self._binned = self._binned, grad_to_step
        if pending is None or asked is not grad_to_step or not torch.is_grad_enabled():
            return None
        loss, of, *versions = pending
        return loss if of is weight and versions == [weight._version, self.step._version] else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loss": None}  # the loss of a copy is not that of its weights


class LsqActivations(ActQuantizer):
    """Activations with one learned step, stored as it is (see :class:`PositiveStep`) and nan until calibrated.

    ``grad_scale`` is ``1 / sqrt(N * p)``, see :class:`LsqOptions`.
    """

    own_calibration = "mean_magnitude"
    magnitudes = ("step",)

    def __init__(
        self, bits: int, unsigned: bool, features: int, *, options: LsqOptions | None = None, **grid: Any
    ) -> None:
        super().__init__(bits, unsigned, features, **grid)
        self.options = options or LsqOptions()
        self.step = nn.Parameter(torch.tensor(math.nan))

    def grad_scale(self, x: Tensor) -> float:
        """What the gradients of the step are multiplied by for the batch ``x``."""
        if not self.options.grad_scale:
            return 1.0
        count = x.numel() * processes() if self.options.act_count == "batch" else self.features
        return 1 / math.sqrt(count * self.high)

    def scale(self) -> Tensor:
        step: Tensor = PositiveStep.apply(self.step)
        return NearestPowerOfTwo.apply(step) if self.power_of_two else step

    def value(self) -> Tensor:
        return super().value() if self.power_of_two else self.step.detach().abs().clamp_min_(STEP_MIN)

    def set_range(self, low: float, high: float) -> None:
        self.step.fill_(self.step_for(low, high))

    def fake_quantize(self, x: Tensor) -> Tensor:
        step, stored = (self.scale(), False) if self.power_of_two else (self.step, True)
        result: Tensor = Lsq.apply(x, step, self.low, self.high, self.grad_scale(x), "half_up", stored)
        return result


METHODS["lsq"] = Method(weights=LsqWeights, activations=LsqActivations, options=LsqOptions)
