"""The modules of a prepared model: fake-quantized operators that also give the integers of the chip.

Between them travel pairs: a tensor of real numbers that lie on a grid, and the step of that grid. Each module has
``forward(*pairs) -> pair`` and computes in real arithmetic what the integer graph computes in integers. Biases,
requantization multipliers and the factors of sums are rounded here as they are there; what remains is float32, which
moves fewer than one code in 10**5 to its neighbour, where ``x/step`` is next to a tie.
"""

import abc
import math
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arch import numerics
from ..frontend.from_torch import FloatAvgPool, FloatBatchNorm, FloatConv
from .distributed import processes, reduce_sum
from .methods import ActQuantizer, WeightQuantizer, wide
from .powers import exponent, power_of_two


class Grid(NamedTuple):
    """A tensor of real numbers and the step of the grid that they lie on, a number or a tensor of shape ``()``.

    ``step`` is None where the tensor is not quantized: during calibration, or switched off.
    """

    x: Tensor
    step: Tensor | float | None


def round_ratio(ratio: Tensor) -> Tensor:
    """``mult * 2**-shift`` of :func:`nibblecore.arch.numerics.quantize_multiplier`, elementwise, in float64.

    ``ratio`` must be positive; magnitudes that the record cannot hold are :func:`nibblecore.qat.convert`'s to refuse.
    """
    unit = power_of_two((numerics.MULT_BITS - 1 - exponent(ratio)).clamp(max=numerics.SHIFT_MAX))
    return torch.floor(ratio * unit + 0.5) / unit


def round_factors(step_a: Tensor | float, step_b: Tensor | float, step: Tensor) -> tuple[Tensor, Tensor]:
    """``k / 2**n * step / step_i`` of both operands, with the factors of :func:`nibblecore.arch.numerics.add_factors`.

    In tensors of float64, so that a model compiles without a break; quotients of two float32 are never so near to a tie
    that it matters. Factors that 16 bits cannot hold are :func:`nibblecore.qat.convert`'s to refuse.
    """
    step = step.double()
    a, b = step_a / step, step_b / step
    largest = a.maximum(b)
    bits = numerics.ADD_FACTOR_BITS - 1
    n = (bits - exponent(largest)).clamp(numerics.ADD_SHIFT_MIN, 24)
    unit = power_of_two(n)
    # The rounding may have reached the limit.
    unit = torch.where((torch.floor(largest * unit + 0.5) >= 1 << bits) & (n > numerics.ADD_SHIFT_MIN), unit / 2, unit)
    return torch.floor(a * unit + 0.5) / unit / a, torch.floor(b * unit + 0.5) / unit / b


class QuantOp(nn.Module):
    """Base of the operators whose results have a grid: a clamp, then the quantizer.

    ReLU is in the quantizer where that has no negative values. Any other clamp is done before it, and integers saturate
    at the code of its limit: rounding is monotonic, so that the code of a clamped value is the clamped code. A ReLU6
    has an unsigned grid that may reach beyond 6, where training has made its step larger than ``6 / 15``.

    Parameters
    ----------
    output : ActQuantizer or None
        Several operators have the same one where their results are concatenated: it is a submodule of the first of
        them, so that a ``state_dict`` has it once, and an attribute of all.
    """

    limits: tuple[float, float] = (-math.inf, math.inf)
    """Lowest and highest value, ``low <= 0 <= high``; infinite where the quantizer does it."""

    def __init__(self, output: ActQuantizer | None) -> None:
        super().__init__()
        self.output_quantizer = output

    def finish(self, x: Tensor, dtype: torch.dtype | None = None) -> Grid:
        """The result ``x`` clamped and quantized, in the type ``dtype``, or its own."""
        if self.limits != QuantOp.limits:
            x = x.clamp(*self.limits)
        quantizer = self.output_quantizer
        if quantizer is None:
            return Grid(x.to(dtype or x.dtype), None)
        result = quantizer(x).to(dtype or x.dtype)
        return Grid(result, quantizer.value() if quantizer.fake_quant_enabled else None)

    def share(self, quantizer: ActQuantizer) -> None:
        """Use a quantizer that belongs to another operator."""
        del self.output_quantizer
        # Not as a submodule: averages and optimizers would see its state twice.
        self.__dict__["output_quantizer"] = quantizer

    def grid(self) -> ActQuantizer:
        """The quantizer of an operator that has one."""
        assert self.output_quantizer is not None
        return self.output_quantizer

    def code_limits(self) -> tuple[int, int]:
        """Lowest and highest code, relative to that of real zero, clamp included."""
        quantizer = self.grid()
        scale = quantizer.scale().detach()
        low, high = quantizer.low, quantizer.high
        # As the quantizer rounds: in the type of the step.
        least, most = (float(torch.floor(scale.new_tensor(limit) / scale + 0.5)) for limit in self.limits)
        return int(max(low, least)), int(min(high, most))


class Correction(nn.Module):
    """Quantization correction (QC): ``gamma * h + beta`` per output channel of what a layer computes, before its norm.

    Gupta and Asthana, WACV 2024. See :func:`nibblecore.qat.add_correction`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def extra_repr(self) -> str:
        return str(len(self.gamma))


class QuantLayer(QuantOp, abc.ABC):
    """Base of convolution and linear layer: weights, bias, one quantizer for each of weights and output.

    Batch norm was folded when the model was prepared, and ``weight`` and ``bias`` are the folded ones, or is ``norm``.
    ``norm`` in training mode normalizes with each batch. Otherwise it is, together with ``correction``, an affine map
    per channel, which the integers have in their requantization: multipliers then have the sign of the map.

    With ``fold``, the factor of ``norm``, ``gamma / sqrt(var + eps)``, is multiplied into the weights before these are
    quantized (Jacob et al., CVPR 2018, figure C.8). In training mode ``var`` and ``mean`` are those of the batch, of
    the layer's results with weights that are not quantized, and gradients flow through them as through a batch norm;
    running statistics follow with the momentum of ``norm``. Otherwise they are the running ones.

    Parameters
    ----------
    op : FloatConv
    weights : WeightQuantizer
    output : ActQuantizer or None
        None: the layer gives ``acc + bias`` to the host.
    """

    fold = False
    """Whether ``norm`` goes into the weights before they are quantized."""
    bias_bits: int | None = None
    """8: the integer bias of each channel is one of -128..127 times a power of two that the layer shares."""
    sync_norm = False
    """Whether ``norm`` takes the statistics of all processes that train together."""
    frozen_norm = False
    """Whether ``norm`` keeps its running statistics in training mode too, and uses them."""

    def __init__(self, op: FloatConv, weights: WeightQuantizer, output: ActQuantizer | None) -> None:
        super().__init__(None)
        self.weight = nn.Parameter(op.weight.clone())
        self.bias = None if op.bias is None else nn.Parameter(op.bias.clone())
        self.weight_quantizer = weights
        self.output_quantizer = output
        self.norm = None if op.norm is None else _batch_norm(op.norm, len(op.weight), op.weight.ndim == 4)
        self.correction: Correction | None = None

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.norm is not None and self.frozen_norm:
            self.norm.eval()
        return self

    def latent(self) -> Tensor:
        """What is quantized: ``weight``, with the factor of a folded ``norm`` in it."""
        if self.norm is None or not self.fold:
            return self.weight
        return self.weight * self._per_channel(self._norm_affine()[0])

    def from_latent(self, value: Tensor) -> Tensor:
        """The ``weight`` of which ``value`` is :meth:`latent`; as it is where the factor of the norm is 0."""
        if self.norm is None or not self.fold:
            return value.to(self.weight.dtype)
        factor = self._per_channel(self._norm_affine()[0].detach())
        return torch.where(factor == 0, self.weight, value.to(factor) / torch.where(factor == 0, 1.0, factor))

    def scale(self) -> Tensor:
        """Step of the weights per output channel, shape ``(out,)``."""
        return self.weight_quantizer.scale(wide(self.latent()))

    def int_weight(self) -> Tensor:
        """What the weight buffer gets, int64, of the shape of ``weight``: nibbles or the 225 codes of 8 bits."""
        return self.weight_quantizer.codes(wide(self.latent()))

    def _per_channel(self, values: Tensor) -> Tensor:
        """One value per output channel in the shape and type that multiply ``weight``."""
        return values.to(self.weight.dtype).reshape(-1, *[1] * (self.weight.ndim - 1))

    def _norm_affine(self) -> tuple[Tensor, Tensor]:
        """``(factor, offset)`` of ``norm`` with its running statistics, float64."""
        assert self.norm is not None
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert var is not None
        factor = (var.double() + self.norm.eps).rsqrt() * self.norm.weight.double()
        return factor, self.norm.bias.double() - mean.double() * factor

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """``(factor, offset)`` per channel, float64, of frozen norm and correction; None where there is neither."""
        if self.norm is None and self.correction is None:
            return None
        factor = torch.ones(len(self.weight), dtype=torch.float64, device=self.weight.device)
        offset = torch.zeros_like(factor)
        if self.norm is not None:
            factor, offset = self._norm_affine()
        if self.correction is not None:
            offset = factor * self.correction.beta.double() + offset
            factor = factor * self.correction.gamma.double()
        return factor, offset

    def unit(self, input_step: Tensor | float) -> Tensor:
        """What a product of codes stands for behind norm and correction, signed: float64, shape ``(out,)``."""
        unit = input_step * self.scale().detach().double()
        factor = self._factor()
        return unit if factor is None else unit * factor.detach()

    def _factor(self) -> Tensor | None:
        """What a product of *quantized* weights is multiplied by behind it: :meth:`affine` without a folded norm."""
        if self.norm is None or not self.fold:
            affine = self.affine()
            return None if affine is None else affine[0]
        return None if self.correction is None else self.correction.gamma.double()

    def real_bias(self) -> Tensor | None:
        """The bias behind norm and correction, float64, shape ``(out,)``; differentiable."""
        bias = None if self.bias is None else self.bias.double()
        affine = self.affine()
        if affine is None:
            return bias
        return affine[1] if bias is None else affine[0] * bias + affine[1]

    def int_bias(self, input_step: Tensor | float) -> Tensor:
        """Bias in units of :meth:`unit`, rounded half up: integers in float64, shape ``(out,)``.

        The zero point of the input is not in it. 0 where the unit is 0.
        """
        unit = self.unit(input_step)
        bias = self.real_bias()
        return torch.zeros_like(unit) if bias is None else self._bias_codes(bias.detach(), unit)

    def _bias_codes(self, bias: Tensor, unit: Tensor) -> Tensor:
        """``bias / unit`` as the integers that ``bias_bits`` allows, in float64; 0 where the unit is 0."""
        ratio = torch.where(unit == 0, 0.0, bias / torch.where(unit == 0, 1.0, unit))
        if self.bias_bits is None:
            return torch.floor(ratio + 0.5)
        low, high = numerics.code_range(self.bias_bits)
        # The smallest grid on which no bias reaches high + 1/2.
        step = power_of_two(exponent(ratio.abs().max() / (high + 0.5)).clamp_min(0))
        return torch.floor(ratio / step + 0.5).clamp(low, high) * step

    def _parameters_for(self, input_step: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the chip has them, multipliers included; the bias with a straight-through gradient."""
        output = self.output_quantizer
        output_step = None if output is None or not output.fake_quant_enabled else output.value()
        quantized = input_step is not None and self.weight_quantizer.fake_quant_enabled
        soft = self.weight_quantizer.soft_rounding is not None
        if quantized and self.norm is None and self.correction is None and self.bias_bits is None and not soft:
            assert input_step is not None
            fast = self.weight_quantizer.chip_parameters(self.weight, self.bias, input_step, output_step)
            if fast is not None:
                return fast
        behind, bias, latent = self._factor(), self.real_bias(), self.latent()
        dtype = self.weight.dtype
        if input_step is None or not self.weight_quantizer.fake_quant_enabled:
            # There is no unit without both steps, and nothing but the weights is rounded.
            weight = self.weight_quantizer(latent)
            weight = weight if behind is None else weight * self._per_channel(behind)
            return weight, None if bias is None else bias.to(dtype)
        unit = self.unit(input_step)
        factor = torch.ones_like(unit)
        if output_step is not None:
            ratio = (unit / output_step.double()).abs()
            ratio = torch.where(ratio == 0, 1.0, ratio)
            factor = round_ratio(ratio) / ratio
        channel = factor if behind is None else factor * behind
        weight = self.weight_quantizer(latent) * self._per_channel(channel)
        if bias is None:
            return weight, None
        # A channel whose unit is 0 is a constant.
        rounded = torch.where(unit == 0, bias.detach(), self._bias_codes(bias.detach(), unit) * unit * factor)
        return weight, (bias + (rounded - bias).detach()).to(dtype)

    @abc.abstractmethod
    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution or matrix product."""

    def _synchronized(self) -> bool:
        return self.sync_norm or isinstance(self.norm, nn.SyncBatchNorm)

    def _batch_statistics(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per channel of a batch, which the running ones take in.

        Where they are synchronized, of the batches of all processes.
        """
        assert self.norm is not None
        h = wide(h)
        dims = (0, *range(2, h.ndim))
        own = h.numel() // h.shape[1]
        count = torch.full((), own, dtype=h.dtype, device=h.device)
        if self._synchronized() and processes() > 1:
            count = reduce_sum(count)
            mean = reduce_sum(h.sum(dims)) / count
            shape = (-1, *[1] * (h.ndim - 2))
            var = reduce_sum((h - mean.reshape(shape)).square().sum(dims)) / count
        else:
            var, mean = torch.var_mean(h, dims, correction=0)
        with torch.no_grad():
            running_mean, running_var = self.norm.running_mean, self.norm.running_var
            assert running_mean is not None
            assert running_var is not None
            assert self.norm.num_batches_tracked is not None
            assert self.norm.momentum is not None
            self.norm.num_batches_tracked += 1
            running_mean.lerp_(mean, self.norm.momentum)
            running_var.lerp_(var * (count / (count - 1).clamp_min(1)), self.norm.momentum)
        return mean, var

    def _normalized(self, h: Tensor) -> Tensor:
        """``norm`` in training mode."""
        assert self.norm is not None
        if not self.sync_norm or processes() == 1:
            result: Tensor = self.norm(h)
            return result
        mean, var = self._batch_statistics(h)
        factor = (var + self.norm.eps).rsqrt() * self.norm.weight
        shape = (-1, *[1] * (h.ndim - 2))
        normal = (wide(h) - mean.reshape(shape)) * factor.reshape(shape) + self.norm.bias.reshape(shape)
        return normal.to(h.dtype)

    def _folded_with_batch(self, x: Grid) -> Tensor:
        """The result with ``norm`` folded into the weights with the statistics of this batch, which it takes in."""
        assert self.norm is not None
        h = self._product(x.x, self.weight, self.bias)
        bias: Tensor | None = self.bias
        gain = None if self.correction is None else self.correction.gamma
        if self.correction is not None:
            shape = (-1, *[1] * (self.weight.ndim - 2))
            h = h * self.correction.gamma.reshape(shape) + self.correction.beta.reshape(shape)
            bias = self.correction.beta if bias is None else bias * self.correction.gamma + self.correction.beta
        mean, var = self._batch_statistics(h)
        factor = (var + self.norm.eps).rsqrt() * self.norm.weight
        weight = self.weight * self._per_channel(factor)
        offset = self.norm.bias - mean * factor
        offset = offset if bias is None else offset + factor * bias
        if x.step is not None and self.weight_quantizer.fake_quant_enabled and self.bias_bits is not None:
            unit = x.step * self.weight_quantizer.scale(weight).detach().double()
            unit = unit if gain is None else unit * gain.detach()
            rounded = self._bias_codes(offset.detach().double(), unit) * unit
            rounded = torch.where(unit == 0, offset.detach(), rounded.to(offset.dtype))
            offset = offset + (rounded - offset).detach()
        weight = self.weight_quantizer(weight)
        return self._product(x.x, weight if gain is None else weight * self._per_channel(gain), offset)

    def forward(self, x: Grid) -> Grid:
        if self.norm is not None and self.norm.training and self.fold:
            # The integers have other statistics, and so another bias: neither it nor multipliers are rounded here.
            y = self._folded_with_batch(x)
        elif self.norm is not None and self.norm.training:
            # Statistics of the batch: the integers have others, so that multipliers are not rounded here.
            y = self._product(x.x, self.weight_quantizer(self.weight), self.bias)
            if self.correction is not None:
                shape = (-1, *[1] * (self.weight.ndim - 2))
                y = y * self.correction.gamma.reshape(shape) + self.correction.beta.reshape(shape)
            y = self._normalized(y)
        else:
            y = self._product(x.x, *self._parameters_for(x.step))
        return self.finish(y)


def _batch_norm(norm: FloatBatchNorm, channels: int, images: bool) -> nn.BatchNorm1d | nn.BatchNorm2d:
    result = (nn.BatchNorm2d if images else nn.BatchNorm1d)(channels, norm.eps, norm.momentum)
    with torch.no_grad():
        for target, value in (
            (result.weight, norm.weight),
            (result.bias, norm.bias),
            (result.running_mean, norm.mean),
            (result.running_var, norm.var),
        ):
            if value is not None and target is not None:
                target.copy_(value)
    return result


class QuantConv2d(QuantLayer):
    """``nn.Conv2d`` with folded batch norm and ReLU, trained against its integers.

    ``padding`` is top, left, bottom, right.
    """

    def __init__(self, op: FloatConv, weights: WeightQuantizer, output: ActQuantizer | None) -> None:
        super().__init__(op, weights, output)
        self.stride, self.padding, self.dilation = op.stride, op.padding, op.dilation
        self.groups = op.groups

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        top, left, bottom, right = self.padding
        padding = (top, left)
        if (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        out, channels, *kernel = self.weight.shape
        geometry = f"kernel_size={tuple(kernel)}, stride={self.stride}, padding={self.padding}"
        geometry = f"{geometry}, dilation={self.dilation}, groups={self.groups}"
        return f"{channels * self.groups}, {out}, {geometry}, weight_bits={self.weight_quantizer.bits}"


class QuantLinear(QuantLayer):
    """``nn.Linear`` with folded batch norm and ReLU, trained against its integers."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        out, features = self.weight.shape
        return f"{features}, {out}, weight_bits={self.weight_quantizer.bits}"


class QuantAdd(QuantOp):
    """Residual sum with a grid of its own, ReLU included where the grid is unsigned.

    The factors ``k / 2**n`` of :func:`nibblecore.arch.numerics.residual_add` have at most 15 bits; the operands are
    scaled to the rounded factors.
    """

    def factors(self, step_a: Tensor | float, step_b: Tensor | float) -> tuple[int, int, int]:
        """``(k_a, k_b, n)`` for operands with these steps."""
        return numerics.add_factors(float(step_a), float(step_b), float(self.grid().scale().detach()))

    def forward(self, a: Grid, b: Grid) -> Grid:
        if a.step is None or b.step is None or not self.grid().fake_quant_enabled:
            return self.finish(a.x + b.x)
        factor_a, factor_b = round_factors(a.step, b.step, self.grid().scale().detach())
        return self.finish(wide(a.x) * factor_a + wide(b.x) * factor_b, torch.promote_types(a.x.dtype, b.x.dtype))


class QuantAvgPool2d(QuantOp):
    """Average pool with a grid of its own; divides by the whole window, padding included."""

    def __init__(self, op: FloatAvgPool, output: ActQuantizer) -> None:
        super().__init__(output)
        self.kernel, self.stride, self.padding = op.kernel, op.stride, op.padding

    def forward(self, x: Grid) -> Grid:
        mean = F.avg_pool2d(wide(x.x), self.kernel, self.stride, self.padding)
        if x.step is not None and self.grid().fake_quant_enabled:
            scale = self.grid().value().double()
            ratio = x.step / (self.kernel[0] * self.kernel[1] * scale)
            mean = mean * (round_ratio(ratio) / ratio).to(mean.dtype)
        return self.finish(mean, x.x.dtype)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel}, stride={self.stride}, padding={self.padding}"
