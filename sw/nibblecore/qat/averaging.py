"""Moving averages of weights and steps (Gupta and Asthana, "Reducing the side-effects of oscillations in training of
quantized YOLO networks", WACV 2024)."""

import copy
import math
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from .distributed import unwrap

M = TypeVar("M", bound=nn.Module)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


class Ema(Generic[M]):
    """A copy of a model whose floating-point state is a moving average: weights, biases, steps, statistics.

    Call :meth:`update` after each step of the optimizer; evaluate, convert and save :attr:`model`, which is in
    evaluation mode. What is averaged are the stored values: of TQT its log2 threshold, and of steps the stored step, by
    its magnitude, which is the step that is used also where an optimizer has made it negative. What is nan, as steps
    before calibration, takes the first number that comes. Everything that is no floating-point number is copied.

    Parameters
    ----------
    model : nn.Module
        Prepared; perhaps compiled, or wrapped for data-parallel training, which :attr:`model` is not.
    decay : float
        0 <= decay < 1.
    ramp : int
        The decay of update ``t`` is ``decay * (1 - exp(-t / ramp))``, which starts at 0, as YOLOv5 does; 0 for
        ``decay`` at once.
    """

    def __init__(self, model: M, decay: float = 0.9999, ramp: int = 2000) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, not {decay!r}")
        if ramp < 0:
            raise ValueError(f"ramp must be at least 0, not {ramp!r}")
        self.decay, self.ramp, self.updates = decay, ramp, 0
        self.model: M = copy.deepcopy(cast(M, unwrap(model))).eval().requires_grad_(False)
        self._magnitudes = {
            f"{path}.{name}" if path else name
            for path, module in self.model.named_modules()
            for name in getattr(module, "magnitudes", ())
        }
        with torch.no_grad():
            for name in self._magnitudes:
                self.model.get_parameter(name).abs_()
        self._look_for_missing()

    def _look_for_missing(self) -> None:
        self._missing = {
            name for name, v in _tensors(self.model) if v.is_floating_point() and not bool(v.isfinite().all())
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the state of ``model`` after a step."""
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.ramp)) if self.ramp else self.decay
        current = dict(_tensors(unwrap(model)))
        for name, value in _tensors(self.model):
            now = current[name].detach().to(value)
            if not value.is_floating_point():
                value.copy_(now)
                continue
            if name in self._magnitudes:
                now = now.abs()
            if name in self._missing:
                value.copy_(now)
                if bool(now.isfinite().all()):
                    self._missing.remove(name)
                continue
            # Exact where both are equal, so that what is fixed stays what it is.
            value.lerp_(now, 1 - decay)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the average to another device or type, as :meth:`torch.nn.Module.to`; the model may be elsewhere."""
        self.model.to(*args, **kwargs)
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.model.load_state_dict(state["model"])
        self._look_for_missing()
