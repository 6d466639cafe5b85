"""Trained quantization thresholds: TQT (Jain et al., MLSys 2020). Power-of-two steps, learned in log2 of a threshold.

``step = 2**ceil(log2 t) / 2**(bits-1)``, or over ``2**bits`` where codes are unsigned, and the rounding up passes
gradients straight through, so that ``d v_hat / d log2 t = step * ln 2 * (code - v/step inside, code elsewhere)``. What
is inside is what *rounds* to a code (equations 7 and 8), up to half a step further than with LSQ.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .lsq import quantize, where_inside
from .methods import METHODS, ActQuantizer, Method, MethodOptions, WeightQuantizer, check_choice
from .powers import power_of_two


@dataclasses.dataclass(frozen=True, kw_only=True)
class TqtOptions(MethodOptions):
    """Options of TQT.

    Parameters
    ----------
    weight_threshold : {"max", "3std"}
        The first thresholds of weights: their largest magnitude, or three standard deviations, which the paper takes
        where the weights train too.
    """

    method: ClassVar[str] = "tqt"
    weight_threshold: str = "max"

    def __post_init__(self) -> None:
        check_choice(self, "weight_threshold", ("max", "3std"))


class Tqt(torch.autograd.Function):
    """``step * clamp(round(v / step))``, with the gradients of the paper.

    With ``u = v / step``, and inside where ``low <= round(u) <= high``::

        d/dv    = 1 inside, else 0
        d/dstep = sum(code - u inside, code elsewhere)

    ``kind``, and the shapes, are those of :class:`nibblecore.qat.lsq.Lsq`.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, low: int, high: int, kind: str) -> Tensor:
        u = v / step
        code = quantize(u, low, high, kind)
        ctx.save_for_backward(u, code, step)
        ctx.grid = low, high, kind
        return code * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, code, step = ctx.saved_tensors
        low, high, kind = ctx.grid
        nearest = torch.floor(u + 0.5) if kind == "half_up" else u.round()
        # Integers are strictly between half ones.
        ends = low - 0.5, high + 0.5
        slope = code - where_inside(u, nearest, *ends)
        return where_inside(grad, nearest, *ends), (grad * slope).sum_to_size(step.shape), None, None, None


class ThresholdStep(torch.autograd.Function):
    """``2 ** (ceil(log2_t) - exponent)``; the gradient is that without the rounding up: times ``step * ln 2``."""

    @staticmethod
    def forward(ctx: Any, log2_t: Tensor, exponent: int) -> Tensor:
        # Limits keep it from 0 and infinity.
        power = (log2_t.ceil() - exponent).clamp(-40, 40).nan_to_num()
        step = torch.where(log2_t.isnan(), log2_t, power_of_two(power.long()).to(log2_t.dtype))
        ctx.save_for_backward(step)
        return step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (step,) = ctx.saved_tensors
        return grad * step * math.log(2), None


class TqtWeights(WeightQuantizer):
    """Weights with learned thresholds, at first as :class:`TqtOptions` has it. The paper has one per layer.

    The codes are those of every method here, so that code ``-2**(bits-1)`` is left out where they are narrow.
    """

    def __init__(self, weight: Tensor, bits: int, *, options: TqtOptions | None = None, **grid: Any) -> None:
        super().__init__(weight, bits, **grid)
        groups = self.groups(weight.detach())
        largest = groups.abs().amax(1)
        if options is not None and options.weight_threshold == "3std":
            largest = largest.minimum(3 * groups.std(1, correction=0))
        usual = largest[largest > 0].mean() if bool((largest > 0).any()) else torch.ones_like(largest[0])
        self.log2_t = nn.Parameter(torch.where(largest > 0, largest, usual).log2())

    def scale(self, weight: Tensor) -> Tensor:
        step: Tensor = ThresholdStep.apply(self.log2_t, self.bits - 1)
        return step.expand(weight.shape[0])

    def codes(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return quantize(weight / self.scale_like(weight), self.low, self.high, self.kind).long()

    def fake_quantize(self, weight: Tensor) -> Tensor:
        result: Tensor = Tqt.apply(weight, self.scale_like(weight), self.low, self.high, self.kind)
        return result


class TqtActivations(ActQuantizer):
    """Activations with one learned threshold; nan until calibrated."""

    own_calibration = "symmetric_entropy"

    def __init__(
        self, bits: int, unsigned: bool, features: int, *, options: TqtOptions | None = None, **grid: Any
    ) -> None:
        super().__init__(bits, unsigned, features, **grid)
        self.log2_t = nn.Parameter(torch.tensor(math.nan))

    def scale(self) -> Tensor:
        step: Tensor = ThresholdStep.apply(self.log2_t, self.bits if self.unsigned else self.bits - 1)
        return step

    def set_range(self, low: float, high: float) -> None:
        threshold = max(-low, high)
        self.log2_t.fill_(math.log2(threshold) if threshold > 0 else 0.0)

    def fake_quantize(self, x: Tensor) -> Tensor:
        result: Tensor = Tqt.apply(x, self.scale(), self.low, self.high, "half_up")
        return result


class ThresholdFreezer:
    """Freezes thresholds one after another, once they do no more than swing around an integer.

    While a threshold's log2 moves around an integer, its step jumps between two powers of two, and disturbs everything
    behind it. Call :meth:`step` after each step of the optimizer, before gradients are cleared. From ``start`` on,
    every ``every`` steps, one threshold is frozen: that with the smallest gradient, on average, of those that are on
    the side of the integer on which they mostly were. Thresholds per channel count one by one.

    Parameters
    ----------
    model : nn.Module
        Prepared with the method "tqt".
    start, every : int
        In steps; at least 0 and 1.
    momentum : float
        Of the moving averages of gradients and sides.
    """

    def __init__(self, model: nn.Module, start: int = 1000, every: int = 50, momentum: float = 0.05) -> None:
        if start < 0 or every < 1:
            raise ValueError(f"start must be at least 0 and every at least 1, not {start} and {every}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, not {momentum!r}")
        self.start, self.every, self.momentum = start, every, momentum
        self.steps = 0
        self.thresholds = {n: p for n, p in model.named_parameters() if n.endswith("log2_t")}
        if not self.thresholds:
            raise ValueError("the model has no thresholds; prepare it with method='tqt'")
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, log2_t in self.thresholds.items():
            value = log2_t.detach()
            self.state[name] = {
                "gradient": torch.zeros_like(value),
                "side": value.ceil(),
                "frozen": torch.zeros_like(value, dtype=torch.bool),
                "value": value.clone(),
            }

    @torch.no_grad()
    def step(self) -> None:
        """Track one step, put frozen thresholds back, and freeze another when it is time."""
        self.steps += 1
        best = (math.inf, "", 0)
        for name, log2_t in self.thresholds.items():
            state = self.state[name]
            log2_t.copy_(torch.where(state["frozen"], state["value"], log2_t))
            if log2_t.grad is not None:
                state["gradient"].lerp_(log2_t.grad.abs(), self.momentum)
            state["side"].lerp_(log2_t.ceil(), self.momentum)
            ready = ~state["frozen"] & (state["side"].round() == log2_t.ceil())
            gradient = torch.where(ready, state["gradient"], math.inf).flatten()
            index = int(gradient.argmin())
            best = min(best, (float(gradient[index]), name, index))
        if self.steps >= self.start and (self.steps - self.start) % self.every == 0 and best[0] < math.inf:
            _, name, index = best
            state = self.state[name]
            state["frozen"].view(-1)[index] = True
            state["value"].view(-1)[index] = self.thresholds[name].view(-1)[index]

    def frozen(self) -> float:
        """Share of thresholds that are frozen, 0..1."""
        flags = torch.cat([state["frozen"].flatten() for state in self.state.values()])
        return float(flags.double().mean())

    def state_dict(self) -> dict[str, Any]:
        values = {f"{name}.{key}": value.clone() for name, s in self.state.items() for key, value in s.items()}
        return {"steps": self.steps, **values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises :class:`ValueError` for the state of another model."""
        own = self.state_dict()
        if set(own) != set(state) or any(isinstance(v, Tensor) and v.shape != state[k].shape for k, v in own.items()):
            raise ValueError("the state is that of a freezer of another model")
        self.steps = int(state["steps"])
        for name, s in self.state.items():
            for key in s:
                s[key] = state[f"{name}.{key}"].clone()


METHODS["tqt"] = Method(weights=TqtWeights, activations=TqtActivations, options=TqtOptions)
