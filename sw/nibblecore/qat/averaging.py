"""Moving averages of weights and steps (Gupta and Asthana, "Reducing the side-effects of oscillations in training of
quantized YOLO networks", WACV 2024)."""

import copy
import math
from typing import Any

import torch
from torch import nn


class Ema:
    """A copy of a model whose floating-point state is a moving average: weights, biases, steps, statistics.

    Call :meth:`update` after each step of the optimizer; evaluate, convert and save :attr:`model`, which is in
    evaluation mode. What is averaged are the stored values, so of steps the stored step, and of TQT its log2 threshold.
    Everything that is no floating-point number is copied.

    Parameters
    ----------
    model : nn.Module
        Prepared and calibrated.
    decay : float
        0 <= decay < 1.
    ramp : int
        The decay of update ``t`` is ``decay * (1 - exp(-t / ramp))``, which starts at 0; 0 for ``decay`` at once.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, ramp: int = 2000) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, not {decay!r}")
        if ramp < 0:
            raise ValueError(f"ramp must be at least 0, not {ramp!r}")
        self.decay, self.ramp, self.updates = decay, ramp, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the state of ``model`` after a step."""
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.ramp)) if self.ramp else self.decay
        current = model.state_dict()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                # Exact where both are equal, so that what is fixed stays what it is.
                value.lerp_(current[name].to(value), 1 - decay)
            else:
                value.copy_(current[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.model.load_state_dict(state["model"])
