"""DoReFa (Zhou et al., "DoReFa-Net: Training low bitwidth convolutional neural networks with low bitwidth gradients",
2016): a baseline for research; gradients stay float.

``quant_k(r) = round((2**k - 1) * r) / (2**k - 1)``, weights
``2 * quant_k(tanh(w) / (2 * max|tanh(w)|) + 1/2) - 1``, activations ``quant_k(clip(a, 0, 1))``. The ``2**k`` weight
levels are odd multiples of ``1/(2**k - 1)``: 2 and 3 bits fit nibbles as -3, -1, 1, 3 and -7, -5, .. 7; 4 bits do not.
Layers of 8 bits, which the paper leaves in float, have the grids of :mod:`nibblecore.qat.iao`.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from .iao import IaoActivations, MinMaxWeights
from .lsq import Lsq
from .methods import METHODS, ActQuantizer, Method, MethodOptions, WeightQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DorefaOptions(MethodOptions):
    """Options of DoReFa.

    Parameters
    ----------
    restore : bool
        Whether quantized weights, which the paper has in -1..1, are multiplied by ``max|w|`` of the layer, a constant
        for gradients. Without, a batch norm must stand behind each layer, not folded.
    """

    method: ClassVar[str] = "dorefa"
    restore: bool = True


class _Round(torch.autograd.Function):
    """Half to even, straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _refuse_power_of_two(grid: dict[str, Any]) -> None:
    if grid.get("power_of_two"):
        raise ValueError("DoReFa has steps of its own below 8 bits; scale_kind must be 'free', not 'power_of_two'")


class DorefaWeights(WeightQuantizer):
    """Weights of 2, 3 or 4 bits; one step per layer."""

    uniform = False

    def __init__(self, weight: Tensor, bits: int, *, options: DorefaOptions | None = None, **grid: Any) -> None:
        _refuse_power_of_two(grid)
        super().__init__(weight, bits, **{**grid, "per_channel": False})
        self.options = options or DorefaOptions()
        self.low, self.high = 1 - (1 << bits), (1 << bits) - 1

    def scale(self, weight: Tensor) -> Tensor:
        largest = weight.detach().abs().max() if self.options.restore else weight.new_ones(())
        return (torch.where(largest > 0, largest, 1.0) / self.high).expand(weight.shape[0])

    def _codes(self, weight: Tensor) -> Tensor:
        bounded = weight.tanh()
        largest = bounded.abs().max()
        share = bounded / (2 * torch.where(largest > 0, largest, 1.0)) + 0.5
        code: Tensor = 2 * _Round.apply(self.high * share) - self.high
        return code

    def codes(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return self._codes(weight).long()

    def fake_quantize(self, weight: Tensor) -> Tensor:
        return self._codes(weight) * self.scale_like(weight)

    def refusal(self) -> str | None:
        if self.bits <= 3:
            return None
        return (
            "Weights fit nibbles. DoReFa's of 4 bits are the odd numbers in -15..15. "
            "Train with 2 or 3 bits, or with another method."
        )


class DorefaActivations(ActQuantizer):
    """Activations in 0..1, signed ones in -1..1, less a step above; nothing is learned and nothing calibrated."""

    step: Tensor

    def __init__(self, bits: int, unsigned: bool, features: int, **grid: Any) -> None:
        _refuse_power_of_two(grid)
        super().__init__(bits, unsigned, features, **grid)
        self.register_buffer("step", torch.tensor(1.0 / max(self.high, -self.low)), persistent=False)

    def scale(self) -> Tensor:
        return self.step

    def set_range(self, low: float, high: float) -> None:
        """The range is fixed."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        result: Tensor = Lsq.apply(x, self.step, self.low, self.high, 1.0, "half_up")
        return result


def _weights(weight: Tensor, bits: int, *, options: DorefaOptions | None = None, **grid: Any) -> WeightQuantizer:
    return MinMaxWeights(weight, bits, **grid) if bits == 8 else DorefaWeights(weight, bits, options=options, **grid)


def _activations(
    bits: int, unsigned: bool, features: int, *, options: DorefaOptions | None = None, **grid: Any
) -> ActQuantizer:
    kind = IaoActivations if bits == 8 else DorefaActivations
    return kind(bits, unsigned, features, **grid)


METHODS["dorefa"] = Method(weights=_weights, activations=_activations, options=DorefaOptions)
