"""What ends a training before its time: numbers that are none, and steps that leave their range."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ..layers import QuantLayer
from ..methods import ActQuantizer
from ..prepare import QuantModel
from .recipe import StopsSection

SMALLER: str = "Train again with a smaller learning rate, as with --set qat.lr=0.001."


def check_loss(loss: Tensor, where: str) -> float:
    """The loss as a number; :class:`TrainingError` where it is none, before it spoils the weights."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(f"The loss is {value} in {where}.", hint="Train again with a smaller learning rate.")
    return value


def check_gradients(model: nn.Module, where: str) -> None:
    """Raise where a gradient is not finite, naming the first such parameter."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # One number for all: looking at each tensor would cost more than this.
    if gradients and not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
        _blame(((n, p.grad) for n, p in model.named_parameters() if p.grad is not None), "gradient", where)


def check_weights(model: nn.Module, where: str) -> None:
    """Raise where a parameter or statistic is not finite, naming the first."""
    _blame(((n, v) for n, v in model.state_dict().items() if v.is_floating_point()), "value", where)


def _blame(tensors: Iterable[tuple[str, Tensor]], what: str, where: str) -> None:
    for name, tensor in tensors:
        bad = tensor[~tensor.isfinite()]
        if len(bad):
            raise TrainingError(
                f"In {where}, {len(bad)} of {tensor.numel()} {what}s of {name} are not finite; the first is "
                f"{float(bad[0])}.",
                hint=SMALLER,
            )


class StepGuard:
    """Looks at the steps of a model while it trains.

    Parameters
    ----------
    model : QuantModel
        Calibrated: what its steps are now is what they are compared with.
    stops : StopsSection
    """

    def __init__(self, model: QuantModel, stops: StopsSection) -> None:
        self.model, self.stops = model, stops
        self.initial = {name: step.clone() for name, step, _ in self._steps()}

    def _steps(self) -> Iterator[tuple[str, Tensor, nn.Module]]:
        """Quantizers, their steps, and where those are stored."""
        for name, module in self.model.named_modules():
            if isinstance(module, QuantLayer):
                scale = module.scale().detach()
                one = len(scale) > 1 and not module.weight_quantizer.per_channel
                yield f"{name}.weight_quantizer", scale[:1] if one else scale, module.weight_quantizer
            elif isinstance(module, ActQuantizer):
                yield name, module.scale().detach().reshape(1), module

    def check(self, where: str) -> None:
        """Raise :class:`TrainingError` for the first step that left its range."""
        for name, step, quantizer in self._steps():
            for parameter in ("step", "alpha"):
                stored = getattr(quantizer, parameter, None)
                if self.stops.sign and isinstance(stored, nn.Parameter):
                    self._stop(stored.detach().reshape(-1) <= 0, name, stored.detach(), where, "fell to 0 or below")
            first = self.initial[name]
            self._stop(~step.isfinite(), name, step, where, "is not finite")
            factor = self.stops.step_factor
            text = f"less than 1/{factor:g} of its first value"
            self._stop(step * factor < first, name, step, where, f"collapsed to {text}")
            self._stop(step > first * factor, name, step, where, f"grew to more than {factor:g} times its first value")

    def _stop(self, bad: Tensor, name: str, value: Tensor, where: str, what: str) -> None:
        if not bool(bad.any()):
            return
        index = int(bad.nonzero()[0])
        channel = f", channel {index}," if len(bad) > 1 else ""
        raise TrainingError(
            f"In {where}, the step of {name}{channel} {what}: it is {float(value.reshape(-1)[index]):g} and was "
            f"{float(self.initial[name].expand(len(bad))[index]):g} after calibration.",
            hint="Train again with a smaller qat.step_lr, or allow more with stops.step_factor.",
        )

    @torch.no_grad()
    def check_codes(self, images: Tensor, where: str) -> dict[str, float]:
        """Share of zeros among the codes of each tensor, 0..1; raise where there is nearly nothing else.

        Parameters
        ----------
        images : Tensor
            A batch to look at activations with, in evaluation mode.
        """
        shares: dict[str, float] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, QuantLayer) and bool(module.weight.any()):
                shares[f"{name}.weight_quantizer"] = float((module.int_weight() == 0).float().mean())
        handles = [
            module.register_forward_hook(
                lambda _m, _i, output, name=name: shares.__setitem__(name, float((output == 0).float().mean()))
            )
            for name, module in self.model.named_modules()
            if isinstance(module, ActQuantizer)
        ]
        was_training = self.model.training
        try:
            self.model.eval()(images)
        finally:
            self.model.train(was_training)
            for handle in handles:
                handle.remove()
        now = {name: float(step.mean()) for name, step, _ in self._steps()}
        for name, share in shares.items():
            if share > self.stops.zero_share:
                raise TrainingError(
                    f"In {where}, {share:.4%} of the codes of {name} are 0: its step went from "
                    f"{float(self.initial[name].mean()):g} to {now[name]:g}.",
                    hint="Train again with a smaller qat.step_lr or another calibration, or allow more with "
                    "stops.zero_share.",
                )
        return shares
