"""Terms of the loss, and what happens between steps, that settle weights on their levels.

- :func:`bin_regularization` (Han et al., "Improving low-precision network quantization via bin regularization", ICCV
  2021) and its schedules, :func:`bin_regularization_weight`.
- :func:`dampening` and :class:`OscillationTracker` with iterative freezing (Nagel et al., "Overcoming oscillations in
  quantization-aware training", ICML 2022), and their schedule, :func:`cosine_ramp`.

All of them look at the weights of 4 bits and fewer, and take the codes to be those of ``w / step``.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import kernels
from .distributed import unwrap
from .layers import QuantLayer


def low_bit_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Layers whose weights have 4 bits or fewer, by path; :class:`ValueError` where codes are not those of a step."""
    for name, module in unwrap(model).named_modules():
        if isinstance(module, QuantLayer) and module.weight_quantizer.bits <= 4:
            if not module.weight_quantizer.uniform:
                kind = type(module.weight_quantizer).__name__
                raise ValueError(f"{name}: the codes of {kind} are not those of w / step, which this needs")
            yield name, module


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() if terms else torch.zeros(())


class BinRegularization(torch.autograd.Function):
    """The loss of one tensor in two kernels; ``step`` as in :func:`nibblecore.qat.kernels.usable`.

    With ``n`` the population of the bin of ``w`` and ``code`` that of ``w / step``::

        d/dw    = 2 * (w - code * step) / n
        d/dstep = -sum(code * d/dw)
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        loss, population = kernels.bins_forward(weight, step, low, high)
        ctx.save_for_backward(weight, step, population)
        ctx.range = low, high
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *kernels.bins_backward(float(grad), *ctx.saved_tensors, *ctx.range), None, None


def bin_regularization(model: nn.Module, *, grad_to_step: bool = True, groups: str = "step") -> Tensor:
    """The bin regularization loss, summed over layers.

    A bin holds the weights of one code. For each, ``(mean - level)**2 + variance``, the variance biased; that is the
    mean over the bin of ``(w - level)**2``, which is how it is computed. Clipped weights belong to the end bins.

    Parameters
    ----------
    model : nn.Module
    grad_to_step : bool
        Whether the term also moves the steps, as in the paper.
    groups : {"step", "layer"}
        What shares bins: weights with one step, or the layer's, which is the same with a step per layer.
    """
    if groups not in ("step", "layer"):
        raise ValueError(f"groups must be 'step' or 'layer', not {groups!r}")
    terms = []
    for _, layer in low_bit_layers(model):
        quantizer, weight = layer.weight_quantizer, layer.latent()
        if groups == "step" and (loss := quantizer.pending_loss(weight, grad_to_step)) is not None:
            terms.append(loss)
            continue
        if groups == "step" and quantizer.kind == "half_even":
            steps = quantizer.scale(weight)[: len(weight) if quantizer.per_channel else 1]
            steps = (steps if grad_to_step else steps.detach()).reshape(-1, *[1] * (weight.ndim - 1))
            if kernels.usable(weight, steps):
                terms.append(BinRegularization.apply(weight, steps, quantizer.low, quantizer.high))
                continue
        codes = quantizer.codes(weight)
        scale = quantizer.scale_like(weight)
        square = (weight - codes * (scale if grad_to_step else scale.detach())).square()
        bins = quantizer.groups(codes - quantizer.low) if groups == "step" else (codes - quantizer.low).reshape(1, -1)
        levels = quantizer.high - quantizer.low + 1
        index = (bins + levels * torch.arange(len(bins), device=bins.device)[:, None]).flatten()
        population = torch.bincount(index, minlength=levels * len(bins))
        terms.append((square.flatten() / population[index]).sum())
    return _sum(terms)


def bin_regularization_weight(schedule: str, epoch: int, epochs: int, weight: float = 0.5) -> float:
    """What :func:`bin_regularization` is multiplied by in ``epoch``, counted from 0.

    "S1": ``weight`` always. "S2", the paper's choice: 0 for the first third (30 of 90 epochs), in which steps settle.
    "S3": 0 and ``weight`` in turns.
    """
    if schedule not in ("S1", "S2", "S3"):
        raise ValueError(f"schedule must be 'S1', 'S2' or 'S3', not {schedule!r}")
    off = {"S1": False, "S2": 3 * epoch < epochs, "S3": epoch % 2 == 0}[schedule]
    return 0.0 if off else weight


def dampening(model: nn.Module, *, aggregation: str = "kernel_mean") -> Tensor:
    """``|level(w) - clip(w)|**2``, summed over layers; moves weights inside the grid, and never steps.

    ``aggregation`` within a layer: "sum", "mean", or "kernel_mean", the mean over all but the output channels, which
    are summed.
    """
    if aggregation not in ("sum", "mean", "kernel_mean"):
        raise ValueError(f"aggregation must be 'sum', 'mean' or 'kernel_mean', not {aggregation!r}")
    terms = []
    for _, layer in low_bit_layers(model):
        quantizer, weight = layer.weight_quantizer, layer.latent()
        scale = quantizer.scale_like(weight).detach()
        clipped = weight.maximum(scale * quantizer.low).minimum(scale * quantizer.high)
        square = (quantizer.codes(weight) * scale - clipped).square()
        count = {"sum": 1, "mean": weight.numel(), "kernel_mean": weight[0].numel()}[aggregation]
        terms.append(square.sum() / count)
    return _sum(terms)


def cosine_ramp(step: int, steps: int, first: float, last: float, start: float = 0.25) -> float:
    """0 for the share ``start`` of all steps, then from ``first`` to ``last`` along half a cosine."""
    if step < start * steps:
        return 0.0
    done = min(1.0, (step - start * steps) / max(1.0, steps - start * steps))
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


class OscillationTracker:
    """Counts how often weights change their code against the direction of their last change, and can freeze them.

    Call :meth:`step` after each step of the optimizer. A weight oscillates where its code changes in the direction
    opposite to its last change; ``frequency = momentum * oscillates + (1 - momentum) * frequency``. Frozen weights keep
    the code that is nearest to the moving average of theirs, also where their step still moves.

    Parameters
    ----------
    model : nn.Module
        Prepared.
    momentum : float
        Of both averages; at most half of the freezing threshold.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, not {momentum!r}")
        self.momentum = momentum
        self.layers = dict(low_bit_layers(model))
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.layers.items():
            codes = layer.int_weight()
            self.state[name] = {
                "codes": codes,
                "direction": torch.zeros_like(codes),
                "frequency": torch.zeros_like(layer.weight.detach()),
                "average": codes.to(layer.weight.dtype),
                "frozen": torch.zeros_like(codes, dtype=torch.bool),
                "frozen_codes": torch.zeros_like(codes),
            }

    @torch.no_grad()
    def step(self, threshold: float = 0.0) -> None:
        """Track one step; freeze what oscillates more often than ``threshold``, nothing where that is 0."""
        for name, layer in self.layers.items():
            state = self.state[name]
            self._restore(layer, state)
            codes = layer.int_weight()
            change = (codes - state["codes"]).sign()
            oscillates = (change * state["direction"] == -1).to(state["frequency"].dtype)
            state["frequency"].lerp_(oscillates, self.momentum)
            if threshold > 0:
                new = (state["frequency"] > threshold) & ~state["frozen"]
                state["frozen_codes"] = torch.where(new, state["average"].round().long(), state["frozen_codes"])
                state["frozen"] |= new
            state["average"].lerp_(codes.to(state["average"].dtype), self.momentum)
            state["direction"] = torch.where(change != 0, change, state["direction"])
            self._restore(layer, state)
            state["codes"] = layer.int_weight()

    @staticmethod
    def _restore(layer: QuantLayer, state: dict[str, Tensor]) -> None:
        level = state["frozen_codes"] * layer.weight_quantizer.scale_like(layer.latent())
        layer.weight.copy_(torch.where(state["frozen"], layer.from_latent(level), layer.weight))

    def rate(self, frequency: float = 0.005) -> float:
        """Share of tracked weights that oscillate more often than ``frequency``, 0..1.

        Frozen weights do not, although the average of their past takes hundreds of steps to say so.
        """
        return self._share(lambda s: (s["frequency"] > frequency) & ~s["frozen"])

    def frozen(self) -> float:
        """Share of tracked weights that are frozen, 0..1."""
        return self._share(lambda s: s["frozen"])

    def _share(self, which: Any) -> float:
        total = sum(s["codes"].numel() for s in self.state.values())
        return sum(int(which(s).sum()) for s in self.state.values()) / max(1, total)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value.clone() for name, s in self.state.items() for key, value in s.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises :class:`ValueError` for the state of another model."""
        own = self.state_dict()
        if set(own) != set(state) or any(own[k].shape != state[k].shape for k in own):
            raise ValueError("the state is that of a tracker of another model")
        for name, s in self.state.items():
            for key in s:
                s[key] = state[f"{name}.{key}"].to(s[key].device, copy=True)
