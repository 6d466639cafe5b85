"""The other modules of a prepared model: products of tensors, functions by table, and what only moves values."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..arch import numerics
from ..frontend.from_torch import (
    FloatAdd,
    FloatAvgPool,
    FloatConcat,
    FloatConv,
    FloatFlatten,
    FloatLookup,
    FloatMaxPool,
    FloatMul,
    FloatOp,
    FloatUpsample,
)
from .layers import Grid, QuantAdd, QuantAvgPool2d, QuantConv2d, QuantLinear, QuantOp
from .methods import ActQuantizer, WeightQuantizer, wide
from .powers import exponent, power_of_two


def round_factor(step_a: Tensor | float, step_b: Tensor | float, step: Tensor) -> Tensor:
    """``k / 2**n * step / (step_a * step_b)`` with the factor of :func:`nibblecore.arch.numerics.mul_factor`, float64.

    A factor that 16 bits cannot hold is :func:`nibblecore.qat.convert`'s to refuse.
    """
    ratio = torch.as_tensor(step_a).double() * step_b / step.double()
    bits = numerics.MUL_FACTOR_BITS - 1
    n = (bits - exponent(ratio)).clamp(numerics.MUL_SHIFT_MIN, numerics.MUL_SHIFT_MAX)
    unit = power_of_two(n)
    # The rounding may have reached the limit.
    full = (torch.floor(ratio * unit + 0.5) >= 1 << bits) & (n > numerics.MUL_SHIFT_MIN)
    unit = torch.where(full, unit / 2, unit)
    return torch.floor(ratio * unit + 0.5) / unit / ratio


class QuantMul(QuantOp):
    """Product of two tensors, the second perhaps one factor per channel, with a grid of its own.

    The factor ``k / 2**n`` of :func:`nibblecore.arch.numerics.channel_mul` has at most 15 bits; the product is scaled
    to the rounded factor.
    """

    def factor(self, step_a: float, step_b: float) -> tuple[int, int]:
        """``(k, n)`` for operands with these steps."""
        return numerics.mul_factor(step_a, step_b, float(self.grid().scale().detach()))

    def forward(self, a: Grid, b: Grid) -> Grid:
        product = wide(a.x) * wide(b.x)
        if a.step is not None and b.step is not None and self.grid().fake_quant_enabled:
            product = product * round_factor(a.step, b.step, self.grid().scale().detach()).to(product.dtype)
        return self.finish(product, torch.promote_types(a.x.dtype, b.x.dtype))


class TableLookup(torch.autograd.Function):
    """``values[index]``; the gradient with respect to ``x`` is ``slopes[index]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(index, slopes)
        return values.index_select(0, index.flatten()).reshape(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        index, slopes = ctx.saved_tensors
        return grad * slopes.index_select(0, index.flatten()).reshape(grad.shape), None, None, None


class QuantLookup(QuantOp):
    """A function of each value: SiLU, sigmoid and others, with a grid of its own.

    What it reads has 8 bits, a rounding that training sees as the chip does. The values of all codes are computed
    once, in float64, and looked up: training has exactly those that the integer table is made of.
    """

    CODES = 255
    """Codes of 8 bits, relative to that of real zero, are in -255..255 whatever the zero point is."""

    def __init__(self, op: FloatLookup, output: ActQuantizer) -> None:
        super().__init__(output)
        self.function, self.arguments = op.function, op.arguments
        self.evaluate = op.evaluate  # the function in real numbers

    def tables(self, step: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """The function of codes -255..255 times ``step`` and its derivatives, in the type and place of ``like``.

        Computed in float64. Derivatives are central differences, good to nine digits; at a kink, the mean.
        """
        codes = torch.arange(-self.CODES, self.CODES + 1, dtype=torch.float64, device=like.device)
        width = 1e-5
        places = codes * step
        # In one call, for its overhead; training and conversion must make the same.
        here, right, left = self.evaluate(torch.stack((places, places + width, places - width)))
        return here.to(like.dtype), ((right - left) / (2 * width)).to(like.dtype)

    def forward(self, x: Grid) -> Grid:
        if x.step is None:
            return self.finish(self.evaluate(x.x))
        # Also of a code in bfloat16, whose error is below 255 / 512 of a step, this is the code.
        real = wide(x.x)
        with torch.no_grad():
            index = (real / x.step).round().clamp(-self.CODES, self.CODES).to(torch.int32) + self.CODES
            values, slopes = self.tables(x.step, real)
        result: Tensor = TableLookup.apply(real, index, values, slopes)
        return self.finish(result, x.x.dtype)

    def table(self, step: float, zero: int) -> Tensor:
        """Codes relative to that of real zero, int64, for the stored codes -128..127 of a grid."""
        quantizer = self.grid()
        mode = quantizer.training
        quantizer.eval()  # ranges that follow the values stay
        try:
            with torch.no_grad():
                scale = quantizer.scale()
                real = self.tables(step, scale)[0][torch.arange(256) - 128 - zero + self.CODES]
                real = real.clamp(*self.limits)
                return (quantizer.fake_quantize(real) / scale).round().long().cpu()
        finally:
            quantizer.train(mode)

    def extra_repr(self) -> str:
        return ", ".join([self.function, *(f"{k}={v}" for k, v in self.arguments.items())])


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


class QuantConcat(nn.Module):
    """Tensors of one grid one behind the other along the channels."""

    def forward(self, *parts: Grid) -> Grid:
        quantized = all(p.step is not None for p in parts)
        return Grid(torch.cat([p.x for p in parts], 1), parts[0].step if quantized else None)


class QuantUpsample(nn.Module):
    """Nearest neighbour: every pixel ``factor`` times; values pass through on their grid."""

    def __init__(self, op: FloatUpsample) -> None:
        super().__init__()
        self.factor = op.factor

    def forward(self, x: Grid) -> Grid:
        rows, cols = x.x.shape[2:]
        size = (rows * self.factor[0], cols * self.factor[1])
        return Grid(F.interpolate(x.x, size=size, mode="nearest"), x.step)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class QuantFlatten(nn.Module):
    """``(N, C, H, W)`` to ``(N, C*H*W)``, perhaps with ones behind; values pass through on their grid."""

    def __init__(self, op: FloatFlatten) -> None:
        super().__init__()
        self.ones = (1,) * (len(op.shape) - 1)

    def forward(self, x: Grid) -> Grid:
        flat = x.x.flatten(1)
        return Grid(flat.reshape(*flat.shape, *self.ones), x.step)


def build(op: FloatOp, weights: WeightQuantizer | None, output: ActQuantizer | None) -> nn.Module:
    """The module for one captured operator."""
    if isinstance(op, FloatConv):
        assert weights is not None
        return (QuantLinear if op.weight.ndim == 2 else QuantConv2d)(op, weights, output)
    if isinstance(op, FloatMaxPool):
        return QuantMaxPool2d(op)
    if isinstance(op, FloatFlatten):
        return QuantFlatten(op)
    if isinstance(op, FloatConcat):
        return QuantConcat()
    if isinstance(op, FloatUpsample):
        return QuantUpsample(op)
    assert output is not None
    if isinstance(op, FloatAvgPool):
        return QuantAvgPool2d(op, output)
    if isinstance(op, FloatLookup):
        return QuantLookup(op, output)
    if isinstance(op, FloatMul):
        return QuantMul(output)
    assert isinstance(op, FloatAdd)
    return QuantAdd(output)
