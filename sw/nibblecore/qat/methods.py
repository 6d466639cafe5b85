"""Training methods by name.

A method supplies two quantizer classes; :func:`nibblecore.qat.prepare` builds them, and everything behind them (integer
weights, calibration, conversion) speaks to the two interfaces here. To add one, register it::

    METHODS["mine"] = Method(weights=MyWeightQuantizer, activations=MyActQuantizer)
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from ..arch import numerics
from .calibration import CALIBRATIONS, Calibrator
from .distributed import gather


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Base of the options of a method, which :attr:`nibblecore.qat.QConfig.options` holds."""

    method: ClassVar[str]
    """The name in :data:`METHODS`."""


def check_choice(options: MethodOptions, name: str, allowed: tuple[Any, ...]) -> None:
    """Raise :class:`ValueError` unless the option ``name`` is one of ``allowed``."""
    value = getattr(options, name)
    if value not in allowed:
        shown = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} of {type(options).__name__} must be one of {shown}, not {value!r}")


def weight_range(bits: int, full_range: bool = False) -> tuple[int, int]:
    """Lowest and highest code of weights.

    2 and 3 bits use their whole grids, 4 bits -7..7 or, with ``full_range``, -8..7; of 8 bits see
    :func:`nibblecore.arch.numerics.is_weight8`.
    """
    if bits == 8:
        return -numerics.W8_LIMIT, numerics.W8_LIMIT
    if bits == 4 and not full_range:
        return -numerics.W4_LIMIT, numerics.W4_LIMIT
    return numerics.code_range(bits)


def storage_bits(bits: int) -> int:
    """What codes of ``bits`` take in memory: a nibble or a byte."""
    return 4 if bits <= 4 else 8


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 where it is narrower, as under ``torch.autocast``: a division in bfloat16 would move codes."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class WeightQuantizer(nn.Module, abc.ABC):
    """Fake quantization of one layer's weights: symmetric, one step per output channel or one for all.

    Built from the float weights, out of which it must initialize itself completely.

    Parameters
    ----------
    weight : Tensor
        Output channels first.
    bits : int
        2, 3, 4 or 8, see :func:`weight_range`. Codes of 2 and 3 bits are stored in nibbles.
    per_channel : bool
    full_range : bool
        Whether 4-bit weights use the code -8 too.
    power_of_two : bool
        Whether steps are powers of two.
    """

    uniform: ClassVar[bool] = True
    """Whether codes are those of ``weight / step``."""
    magnitudes: ClassVar[tuple[str, ...]] = ()
    """Parameters of which only the magnitude counts, see :class:`nibblecore.qat.lsq.PositiveStep`."""

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        *,
        per_channel: bool = True,
        full_range: bool = False,
        power_of_two: bool = False,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.per_channel = per_channel
        self.power_of_two = power_of_two
        self.low, self.high = weight_range(bits, full_range)
        self.fake_quant_enabled = True
        self.soft_rounding: float | None = None
        """How far from its level a weight stays as it is, see :func:`nibblecore.qat.soft_round`; in steps."""

    @property
    def limit(self) -> int:
        """Highest code."""
        return self.high

    @property
    def storage_bits(self) -> int:
        """4 or 8."""
        return storage_bits(self.bits)

    @property
    def kind(self) -> str:
        """How codes are rounded, see :func:`nibblecore.qat.lsq.quantize`."""
        return "w8" if self.bits == 8 else "half_even"

    def groups(self, weight: Tensor) -> Tensor:
        """The weights, a row for each step."""
        return weight.reshape(weight.shape[0] if self.per_channel else 1, -1)

    @abc.abstractmethod
    def scale(self, weight: Tensor) -> Tensor:
        """Step per output channel, shape ``(out,)``, all positive; equal ones where there is one step for all."""

    def scale_like(self, weight: Tensor) -> Tensor:
        """:meth:`scale` in a shape that broadcasts against ``weight``."""
        return self.scale(weight).reshape(-1, *[1] * (weight.ndim - 1))

    @abc.abstractmethod
    def codes(self, weight: Tensor) -> Tensor:
        """What the chip gets: int64 codes of the shape of ``weight``."""

    def refusal(self) -> str | None:
        """Why the integers of this quantizer have no place on the chip, in two sentences; None if they have."""
        return None

    @abc.abstractmethod
    def fake_quantize(self, weight: Tensor) -> Tensor:
        """``codes(weight) * scale(weight)``, differentiable."""

    def chip_parameters(
        self, weight: Tensor, bias: Tensor | None, input_step: Tensor | float, output_step: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a layer without norm and correction as the chip has them, in one go; None: step by step.

        For quantizers that know a faster way to what ``QuantLayer._parameters_for`` computes.
        """
        return None

    def pending_loss(self, weight: Tensor, grad_to_step: bool) -> Tensor | None:
        """The bin regularization loss of ``weight``, if the last forward pass has computed it on the way."""
        return None

    def forward(self, weight: Tensor) -> Tensor:
        """:meth:`fake_quantize`, or the weights as they are where that is switched off."""
        if not self.fake_quant_enabled:
            return weight
        result = self.fake_quantize(wide(weight))
        if self.soft_rounding is not None:
            scale = self.scale_like(weight)
            limited = (wide(weight) / scale).clamp(self.low, self.high)
            apart = (limited - self.codes(wide(weight))).abs() > self.soft_rounding
            result = torch.where(apart, limited * scale, result)
        return result.to(weight.dtype)


class ActQuantizer(nn.Module, abc.ABC):
    """Fake quantization of one activation tensor: one step.

    Code ``q`` in :attr:`low` .. :attr:`high` stands for ``step * q``: unsigned codes (as 0..15) where no value is
    negative, signed ones (as -8..7) elsewhere, and with a zero point ``z`` unsigned ones less ``z``. *Stored* codes are
    ``q + zero``, signed always, in the lower part of a nibble or byte where it is unsigned: those of uint2 are -8..-5.

    Parameters
    ----------
    bits : int
        2, 3, 4 or 8.
    unsigned : bool
        Whether codes are unsigned; then negative values become 0.
    features : int
        Values per image.
    rectified : bool
        Whether negative values become 0 although codes are signed: the tensor is behind a ReLU.
    power_of_two : bool
        Whether the step is a power of two.
    calibration : str
        How the range is found: a name in :data:`nibblecore.qat.calibration.CALIBRATIONS`, or "method" for what the
        method's authors do.
    """

    own_calibration: ClassVar[str] = "minmax"
    """What "method" means."""
    magnitudes: ClassVar[tuple[str, ...]] = ()
    """Parameters of which only the magnitude counts, see :class:`nibblecore.qat.lsq.PositiveStep`."""
    observes: ClassVar[bool] = False
    """Whether the observer is on from the start."""

    def __init__(
        self,
        bits: int,
        unsigned: bool,
        features: int,
        *,
        rectified: bool = False,
        power_of_two: bool = False,
        calibration: str = "method",
    ) -> None:
        super().__init__()
        self.bits = bits
        self.unsigned = unsigned
        self.features = features
        self.rectified = rectified or unsigned
        self.power_of_two = power_of_two
        self.calibration = self.own_calibration if calibration == "method" else calibration
        self.fake_quant_enabled = True
        self.observer_enabled = self.observes
        self.calibrator: Calibrator | None = None
        self.parts = 1
        """How many operators share this grid; what they compute in one pass is observed as one tensor behind it."""
        self.parts_seen: list[Tensor] = []

    @property
    def storage_bits(self) -> int:
        """4 or 8."""
        return storage_bits(self.bits)

    @property
    def plain_range(self) -> tuple[int, int]:
        """Lowest and highest code of a grid without a zero point of its own."""
        low, high = numerics.code_range(self.bits)
        return 0 if self.rectified else low, (1 << self.bits) - 1 if self.unsigned else high

    @property
    def low(self) -> int:
        """Lowest code, relative to that of real zero."""
        return self.plain_range[0]

    @property
    def high(self) -> int:
        """Highest code, relative to that of real zero."""
        return self.plain_range[1]

    @property
    def zero(self) -> int:
        """Stored code of real zero."""
        return numerics.code_range(self.storage_bits)[0] if self.unsigned else 0

    @property
    def affine(self) -> bool:
        """Whether the grid has a zero point of its own."""
        return False

    @abc.abstractmethod
    def scale(self) -> Tensor:
        """The step: positive, shape ``()``; nan before calibration."""

    def value(self) -> Tensor:
        """:meth:`scale` without a gradient."""
        return self.scale().detach()

    def observe(self, x: Tensor) -> None:
        """Take in one batch of calibration data; an empty one is none."""
        if self.calibrator is None:
            self.calibrator = CALIBRATIONS[self.calibration]()
        if x.numel():
            self.calibrator.observe(x)

    def join(self) -> None:
        """Let calibration have seen what all processes have: a collective operation, see :mod:`.distributed`."""
        merged: Calibrator | None = None
        for calibrator in gather(self.calibrator):  # in the same order everywhere, so that results are the same
            if merged is None:
                merged = calibrator
            elif calibrator is not None:
                merged.merge(calibrator)
        self.calibrator = merged

    def finish(self) -> None:
        """Set the grid from what has been observed and forget it."""
        if self.calibrator is None:
            raise RuntimeError("finish() comes after observe()")
        # The zero point of an affine grid is still to be found: it may be anywhere.
        codes = numerics.code_range(self.bits) if self.affine else (self.low, self.high)
        low, high = self.calibrator.range(self.bits, *codes, self.affine)
        self.calibrator = None
        with torch.no_grad():
            self.set_range(low, high)

    @abc.abstractmethod
    def set_range(self, low: float, high: float) -> None:
        """Set the grid so that it covers ``low <= 0 <= high``; both 0 for a tensor that is always zero."""

    def step_for(self, low: float, high: float) -> float:
        """The step of a grid without zero point that covers ``low..high``; 1 where both are 0."""
        step = max(high / self.high, low / self.low if self.low else 0.0)
        return step if step > 0 else 1.0

    @abc.abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """``step * clamp(floor(x/step + 1/2))``, differentiable; ties round up as on the chip."""

    def follow(self, x: Tensor) -> None:
        """What an observer that is on does with a batch, without its gradient and behind the ReLU: calibration."""
        self.observe(x)

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`fake_quantize`, or nothing but the ReLU where that is switched off, in the type of ``x``.

        Codes are found in float32 at least, also where ``x`` is narrower.
        """
        if self.observer_enabled:
            seen = x.detach().relu() if self.rectified else x.detach()
            if self.parts == 1:
                self.follow(seen)
            else:
                self.parts_seen.append(seen.flatten())
        if self.fake_quant_enabled:
            return self.fake_quantize(wide(x)).to(x.dtype)
        return x.relu() if self.rectified else x

    def follow_parts(self) -> None:
        """Observe what the operators that share this grid have computed in a pass, now that all have used it."""
        if self.parts_seen:
            seen = torch.cat(self.parts_seen)
            self.parts_seen.clear()
            self.follow(seen)

    def enable_observer(self) -> None:
        """Observe from now on."""
        self.observer_enabled = True

    def disable_observer(self) -> None:
        """Observe no more, and set the grid from what calibration has observed, if it has."""
        self.observer_enabled = False
        if self.calibrator is not None:
            self.finish()

    def is_calibrated(self) -> bool:
        return math.isfinite(float(self.scale().detach()))

    def extra_repr(self) -> str:
        return f"{'uint' if self.unsigned else 'int'}{self.bits}, step={float(self.scale().detach()):.4g}"


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method: its two quantizers, as classes or factories with the signatures of the base classes.

    Both are also given ``options``, an instance of the class of that name, unless that is None.
    """

    weights: Any
    activations: Any
    options: type[MethodOptions] | None = None


METHODS: Final[dict[str, Method]] = {}
"""Training methods by name."""


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
        self.fake_quant_enabled = True
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

    def _relative_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes relative to that of real zero, and the step: all of it tensors of float64, so that it compiles.

        In float64, as :func:`nibblecore.ir.quantize`: image values are often ties.
        """
        lowest, highest = numerics.code_range(self.bits)
        step = self.step_tensor()
        zero = (torch.floor(0.5 - self.range[0].double() / step) + lowest).clamp(lowest, highest)
        codes = torch.floor(x.double() / step + 0.5)
        return codes.maximum(lowest - zero).minimum(highest - zero), step

    def step_tensor(self) -> Tensor:
        """:meth:`step` as a tensor, float64, shape ``()``."""
        low, high = self.range.double()
        return (high - low) / ((1 << self.bits) - 1)

    def codes(self, x: Tensor) -> Tensor:
        """Stored codes, int64."""
        return self._relative_codes(x)[0].long() + self.zero

    def forward(self, x: Tensor) -> Tensor:
        """The values of the codes, or ``x`` where fake quantization is switched off."""
        if not self.fake_quant_enabled:
            return x
        codes, step = self._relative_codes(x)
        return (codes * step).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range=({float(self.range[0]):g}, {float(self.range[1]):g})"
