"""The modules of a prepared model: fake-quantized operators that also give the integers of the chip.

Between them travel pairs: a tensor of real numbers that lie on a grid, and the step of that grid. Each module has
``forward(*pairs) -> pair`` and computes in real arithmetic what the integer graph computes in integers. Biases,
requantization multipliers and the factors of sums are rounded here as they are there; what remains is float32, which
moves fewer than one code in 10**5 to its neighbour, where ``x/step`` is next to a tie.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arch import numerics
from ..frontend.from_torch import FloatAdd, FloatAvgPool, FloatConv, FloatFlatten, FloatMaxPool
from .methods import ActQuantizer, WeightQuantizer


class Grid(NamedTuple):
    """A tensor of real numbers and the step of the grid that they lie on, a number or a tensor of shape ``()``.

    ``step`` is None while calibration observes unquantized values.
    """

    x: Tensor
    step: Tensor | float | None


def round_ratio(ratio: Tensor) -> Tensor:
    """``mult * 2**-shift`` of :func:`nibblecore.arch.numerics.quantize_multiplier`, elementwise, in float64.

    ``ratio`` must be positive; magnitudes that the record cannot hold are :func:`nibblecore.qat.convert`'s to refuse.
    """
    exponent = torch.frexp(ratio).exponent
    unit = torch.ldexp(torch.ones_like(ratio), (numerics.MULT_BITS - 1 - exponent).clamp(max=numerics.SHIFT_MAX))
    return torch.floor(ratio * unit + 0.5) / unit


def _quantize(quantizer: ActQuantizer, x: Tensor) -> Grid:
    result = quantizer(x)
    return Grid(result, None if quantizer.observing else quantizer.scale().detach())


class QuantLayer(nn.Module):
    """Base of convolution and linear layer: weights, bias, one quantizer for each of weights and output.

    Batch norm was folded when the model was prepared: ``weight`` and ``bias`` are the folded ones and are what trains.

    Parameters
    ----------
    weight : Tensor
        Output channels first.
    bias : Tensor or None
    weights : WeightQuantizer
    output : ActQuantizer or None
        None: the layer gives ``acc + bias`` to the host.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, weights: WeightQuantizer, output: ActQuantizer | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.weight_quantizer = weights
        self.output_quantizer = output

    def scale(self) -> Tensor:
        """Step of the weights per output channel, shape ``(out,)``."""
        return self.weight_quantizer.scale(self.weight)

    def int_weight(self) -> Tensor:
        """What the weight buffer gets, int64, of the shape of ``weight``: nibbles or the 225 codes of 8 bits."""
        return self.weight_quantizer.codes(self.weight)

    def int_bias(self, input_step: Tensor | float) -> Tensor:
        """Bias in units of ``input_step * scale()``, rounded half up: integers in float64, shape ``(out,)``.

        The zero point of the input is not in it.
        """
        scale = input_step * self.scale().detach().double()
        if self.bias is None:
            return torch.zeros_like(scale)
        return torch.floor(self.bias.detach().double() / scale + 0.5)

    def _parameters_for(self, input_step: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the chip has them, multipliers included; the bias with a straight-through gradient."""
        if input_step is None:
            return self.weight, self.bias
        unit = input_step * self.scale().detach().double()
        factor = torch.ones_like(unit)
        if self.output_quantizer is not None:
            ratio = unit / self.output_quantizer.scale().detach().double()
            factor = round_ratio(ratio) / ratio
        weight = self.weight_quantizer(self.weight)
        weight = weight * factor.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
        if self.bias is None:
            return weight, None
        rounded = (self.int_bias(input_step) * unit * factor).to(self.bias.dtype)
        return weight, self.bias + (rounded - self.bias).detach()

    def _finish(self, y: Tensor) -> Grid:
        return Grid(y, None) if self.output_quantizer is None else _quantize(self.output_quantizer, y)


class QuantConv2d(QuantLayer):
    """``nn.Conv2d`` with folded batch norm and ReLU, trained against its integers.

    ``padding`` is top, left, bottom, right.
    """

    def __init__(self, op: FloatConv, weights: WeightQuantizer, output: ActQuantizer | None) -> None:
        super().__init__(op.weight, op.bias, weights, output)
        self.stride, self.padding, self.dilation = op.stride, op.padding, op.dilation

    def forward(self, x: Grid) -> Grid:
        weight, bias = self._parameters_for(x.step)
        top, left, bottom, right = self.padding
        values, padding = x.x, (top, left)
        if (top, left) != (bottom, right):
            values, padding = F.pad(values, (left, right, top, bottom)), (0, 0)
        return self._finish(F.conv2d(values, weight, bias, self.stride, padding, self.dilation))

    def extra_repr(self) -> str:
        out, channels, *kernel = self.weight.shape
        geometry = f"kernel_size={tuple(kernel)}, stride={self.stride}, padding={self.padding}"
        return f"{channels}, {out}, {geometry}, dilation={self.dilation}, weight_bits={self.weight_quantizer.bits}"


class QuantLinear(QuantLayer):
    """``nn.Linear`` with folded batch norm and ReLU, trained against its integers."""

    def __init__(self, op: FloatConv, weights: WeightQuantizer, output: ActQuantizer | None) -> None:
        super().__init__(op.weight, op.bias, weights, output)

    def forward(self, x: Grid) -> Grid:
        return self._finish(F.linear(x.x, *self._parameters_for(x.step)))

    def extra_repr(self) -> str:
        out, features = self.weight.shape
        return f"{features}, {out}, weight_bits={self.weight_quantizer.bits}"


class QuantAdd(nn.Module):
    """Residual sum with a grid of its own, ReLU included where the grid is unsigned.

    The factors ``k / 2**n`` of :func:`nibblecore.arch.numerics.residual_add` have at most 15 bits; the operands are
    scaled to the rounded factors.
    """

    def __init__(self, output: ActQuantizer) -> None:
        super().__init__()
        self.output_quantizer = output

    def factors(self, step_a: Tensor | float, step_b: Tensor | float) -> tuple[int, int, int]:
        """``(k_a, k_b, n)`` for operands with these steps."""
        return numerics.add_factors(float(step_a), float(step_b), float(self.output_quantizer.scale().detach()))

    def forward(self, a: Grid, b: Grid) -> Grid:
        if a.step is None or b.step is None:
            return _quantize(self.output_quantizer, a.x + b.x)
        k_a, k_b, n = self.factors(a.step, b.step)
        unit = float(self.output_quantizer.scale().detach()) / 2**n
        return _quantize(self.output_quantizer, a.x * (k_a * unit / float(a.step)) + b.x * (k_b * unit / float(b.step)))


class QuantAvgPool2d(nn.Module):
    """Average pool with a grid of its own; divides by the whole window, padding included."""

    def __init__(self, op: FloatAvgPool, output: ActQuantizer) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = op.kernel, op.stride, op.padding
        self.output_quantizer = output

    def forward(self, x: Grid) -> Grid:
        mean = F.avg_pool2d(x.x, self.kernel, self.stride, self.padding)
        if x.step is not None:
            scale = self.output_quantizer.scale().detach().double()
            ratio = x.step / (self.kernel[0] * self.kernel[1] * scale)
            mean = mean * (round_ratio(ratio) / ratio).to(mean.dtype)
        return _quantize(self.output_quantizer, mean)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel}, stride={self.stride}, padding={self.padding}"


class QuantMaxPool2d(nn.Module):
    """Max-pool: values pass through on their grid."""

    def __init__(self, op: FloatMaxPool) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.dilation = op.kernel, op.stride, op.padding, op.dilation

    def forward(self, x: Grid) -> Grid:
        return Grid(F.max_pool2d(x.x, self.kernel, self.stride, self.padding, self.dilation), x.step)

    def extra_repr(self) -> str:
        geometry = f"kernel_size={self.kernel}, stride={self.stride}, padding={self.padding}"
        return f"{geometry}, dilation={self.dilation}"


class QuantFlatten(nn.Module):
    """``(N, C, H, W)`` to ``(N, C*H*W)``; values pass through on their grid."""

    def forward(self, x: Grid) -> Grid:
        return Grid(x.x.flatten(1), x.step)


def build(op: Any, weights: WeightQuantizer | None, output: ActQuantizer | None) -> nn.Module:
    """The module for one captured operator."""
    if isinstance(op, FloatConv):
        assert weights is not None
        return (QuantLinear if op.weight.ndim == 2 else QuantConv2d)(op, weights, output)
    if isinstance(op, FloatMaxPool):
        return QuantMaxPool2d(op)
    if isinstance(op, FloatFlatten):
        return QuantFlatten()
    assert output is not None
    if isinstance(op, FloatAvgPool):
        return QuantAvgPool2d(op, output)
    assert isinstance(op, FloatAdd)
    return QuantAdd(output)
