"""Training methods by name.

A method supplies two quantizer classes; :func:`nibblecore.qat.prepare` builds them, and everything behind them (integer
weights, calibration, conversion) speaks to the two interfaces here. To add one, register it::

    METHODS["mine"] = Method(weights=MyWeightQuantizer, activations=MyActQuantizer)
"""

import abc
import dataclasses
import math
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..arch import numerics


class WeightQuantizer(nn.Module, abc.ABC):
    """Fake quantization of one layer's weights: symmetric, one step per output channel.

    Built from the folded float weights, out of which it must initialize itself completely.

    Parameters
    ----------
    weight : Tensor
        Output channels first.
    bits : int
        4: codes in -7..7. 8: the 225 codes of :func:`nibblecore.arch.numerics.is_weight8`.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.limit = numerics.W4_LIMIT if bits == 4 else numerics.W8_LIMIT

    @abc.abstractmethod
    def scale(self) -> Tensor:
        """Step per output channel, shape ``(out,)``, all positive."""

    @abc.abstractmethod
    def codes(self, weight: Tensor) -> Tensor:
        """What the chip gets: int64 codes of the shape of ``weight``."""

    @abc.abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """``codes(weight) * scale()``, differentiable."""


class ActQuantizer(nn.Module, abc.ABC):
    """Fake quantization of one activation tensor: one step.

    Code ``q`` stands for ``step * q``: unsigned codes (0..15, 0..255) where no value is negative, signed ones (-8..7,
    -128..127) elsewhere. *Stored* codes are signed always: unsigned ones less half their number.

    Parameters
    ----------
    bits : int
        4 or 8.
    unsigned : bool
        Whether negative values become 0: the tensor is behind a ReLU or never negative.
    features : int
        Values per image.
    """

    def __init__(self, bits: int, unsigned: bool, features: int) -> None:
        super().__init__()
        self.bits = bits
        self.unsigned = unsigned
        self.features = features
        lowest, highest = numerics.code_range(bits)
        self.low, self.high = (0, highest - lowest) if unsigned else (lowest, highest)
        self.zero = lowest if unsigned else 0
        """Stored code of real zero."""
        self.observing = False

    @abc.abstractmethod
    def scale(self) -> Tensor:
        """The step: positive, shape ``()``; nan before calibration."""

    @abc.abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take in one batch of calibration data."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Set the step from what has been observed and forget it."""

    @abc.abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """``step * clamp(floor(x/step + 1/2))``, differentiable; ties round up as on the chip."""

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            x = x.relu() if self.unsigned else x
            self.observe(x.detach())
            return x
        return self.fake_quantize(x)

    def is_calibrated(self) -> bool:
        return math.isfinite(float(self.scale().detach()))

    def extra_repr(self) -> str:
        return f"{'uint' if self.unsigned else 'int'}{self.bits}, step={float(self.scale().detach()):.4g}"


@dataclasses.dataclass(frozen=True)
class Method:
    """The two quantizers of a training method, as classes or factories with the signatures of the base classes."""

    weights: Any
    activations: Any


METHODS: Final[dict[str, Method]] = {}
"""Training methods by name; :mod:`nibblecore.qat.lsq` registers ``lsq``."""


def method(name: str) -> Method:
    """The registered method; :class:`ValueError` lists the names where there is none."""
    if name not in METHODS:
        raise ValueError(f"there is no training method {name!r}; there is {', '.join(sorted(METHODS))}")
    return METHODS[name]


class InputQuantizer(nn.Module):
    """The fixed grid of the network's input: unsigned or signed codes over the user's range; nothing is learned.

    The step is ``(high - low) / (2**bits - 1)`` and real zero has a code, so that zero padding is exact; for (0, 1) and
    8 bits the code of ``x`` is that of a byte of an image divided by 255.

    Parameters
    ----------
    low, high : float
        The range, ``low <= 0 <= high`` and not both 0. Values outside saturate.
    bits : int
        4 or 8.
    """

    range: Tensor

    def __init__(self, low: float, high: float, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("range", torch.tensor([low, high], dtype=torch.float64))

    def step(self) -> float:
        """The step as the runtime computes it, in float64."""
        low, high = (float(v) for v in self.range)
        return (high - low) / ((1 << self.bits) - 1)

    @property
    def zero(self) -> int:
        """Stored code of real zero."""
        lowest, highest = numerics.code_range(self.bits)
        return max(lowest, min(highest, lowest + math.floor(-float(self.range[0]) / self.step() + 0.5)))

    @property
    def unsigned(self) -> bool:
        """Whether no value on the grid is negative."""
        return self.zero == numerics.code_range(self.bits)[0]

    def codes(self, x: Tensor) -> Tensor:
        """Stored codes, int64. In float64, as :func:`nibblecore.ir.quantize`: image values are often ties."""
        lowest, highest = numerics.code_range(self.bits)
        return (torch.floor(x.double() / self.step() + 0.5) + self.zero).clamp(lowest, highest).long()

    def forward(self, x: Tensor) -> Tensor:
        return ((self.codes(x) - self.zero) * self.step()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range=({float(self.range[0]):g}, {float(self.range[1]):g})"
