"""How other integer systems get from sums to codes, exactly, to compare with the core's own rule.

The core's is :func:`nibblecore.arch.numerics.requantize`: an 18-bit multiplier and one rounding, ties up. Here are

- the primitives of gemmlowp, on which TensorFlow Lite's reference kernels are built,
- TensorFlow Lite's requantization with two roundings (its default) and with one (``TFLITE_SINGLE_ROUNDING``), its
  16-bit multiplier for 64-bit sums, and its sum of two tensors,
- the dyadic numbers of HAWQ-V3 (Yao et al., ICML 2021), and what ONNX's QuantizeLinear rounds to,

and :data:`MODES`, which :func:`nibblecore.ir.run` executes whole graphs with. A mode derives its own multipliers from
the real scales of a graph; weights, biases, zero points and clamps are those of the graph. Everything is numpy int64,
except where a system computes in float64 itself.
"""

import abc
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from ..arch import numerics
from .graph import AvgPool, ChannelMul, Conv, Graph, IntArray, Node, ResidualAdd

Ratio = npt.NDArray[np.float64] | np.float64

# Primitives --------------------------------------------------------------------------------------------------------


def _limits(bits: int) -> tuple[int, int]:
    if bits not in (8, 16, 32):
        raise ValueError(f"bits must be 8, 16 or 32, not {bits!r}")
    return numerics.code_range(bits)


def _integers(bits: int, **operands: Any) -> list[IntArray]:
    low, high = _limits(bits)
    result = []
    for name, value in operands.items():
        array = np.asarray(value)
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name} must hold integers, not {array.dtype}")
        if array.size and not low <= int(array.min()) <= int(array.max()) <= high:
            raise ValueError(f"{name} must fit {bits} bits signed, not reach {array.min()}..{array.max()}")
        result.append(array.astype(np.int64))
    return result


def saturating_rounding_doubling_high_mul(a: Any, b: Any, bits: int = 32) -> IntArray:
    """``floor(2*a*b / 2**bits + 1/2)``: the high half of twice the product, ties towards +inf; 16 or 32 bits.

    Only ``a = b = -2**(bits-1)`` saturates, to ``2**(bits-1) - 1``.
    """
    if bits == 8:
        raise ValueError("bits must be 16 or 32, not 8")
    x, y = _integers(bits, a=a, b=b)
    return np.minimum((x * y + (1 << bits - 2)) >> bits - 1, (1 << bits - 1) - 1)


def rounding_divide_by_pot(x: Any, exponent: Any) -> IntArray:
    """``x / 2**exponent`` to the nearest integer, ties away from zero; ``exponent`` in 0..31, 32 bits."""
    (value,) = _integers(32, x=x)
    shift = np.asarray(exponent, np.int64)
    if shift.size and not 0 <= int(shift.min()) <= int(shift.max()) <= 31:
        raise ValueError(f"exponent must be in 0..31, not {shift.min()}..{shift.max()}")
    mask = (np.int64(1) << shift) - 1
    return (value >> shift) + ((value & mask) > (mask >> 1) + (value < 0))


def rounding_half_sum(a: Any, b: Any) -> IntArray:
    """``(a + b) / 2`` to the nearest integer, ties away from zero; 32 bits."""
    x, y = _integers(32, a=a, b=b)
    total = x + y
    return np.where(total >= 0, (total + 1) >> 1, -((1 - total) >> 1))


def saturating_add(a: Any, b: Any, bits: int = 16) -> IntArray:
    """``a + b``, limited to what ``bits`` hold: 8, 16 or 32."""
    x, y = _integers(bits, a=a, b=b)
    return np.clip(x + y, *_limits(bits))


# TensorFlow Lite ---------------------------------------------------------------------------------------------------


def tflite_multiplier(ratio: Any, *, single_rounding: bool = False) -> tuple[IntArray, IntArray]:
    """``(q, shift)`` with ``q * 2**(shift - 31)`` nearest to ``ratio``: ``q`` in 2**30..2**31-1, or 0.

    The significand of ``frexp`` times ``2**31``, rounded half away from zero; a ``q`` of 2**31 becomes 2**30 with one
    more ``shift``. Shifts below -31 give (0, 0); with one rounding, shifts above 30 give (2**31 - 1, 30).

    Raises
    ------
    ValueError
        Ratios that are negative or not finite: these systems keep signs in the weights.
    """
    value = np.asarray(ratio, np.float64)
    if not (np.isfinite(value).all() and (value >= 0).all()):
        raise ValueError(f"ratio must be finite and not negative, not {value[~(value >= 0) | np.isinf(value)].flat[0]}")
    significand, exponent = np.frexp(value)
    q = np.floor(np.ldexp(significand, 31) + 0.5).astype(np.int64)
    shift = exponent.astype(np.int64)
    full = q == 1 << 31
    q, shift = np.where(full, 1 << 30, q), shift + full
    vanishes = (q == 0) | (shift < -31)
    q, shift = np.where(vanishes, 0, q), np.where(vanishes, 0, shift)
    if single_rounding:
        huge = shift > 30
        q, shift = np.where(huge, (1 << 31) - 1, q), np.where(huge, 30, shift)
    return q, shift


def multiply_double_rounding(x: Any, q: Any, shift: Any) -> IntArray:
    """TensorFlow Lite's default, and gemmlowp's: two roundings.

    :func:`saturating_rounding_doubling_high_mul` of ``x << max(shift, 0)`` and ``q``, then
    :func:`rounding_divide_by_pot` by ``max(-shift, 0)``. Raises :class:`OverflowError` where ``x << shift`` does not
    fit 32 bits, which is undefined there.
    """
    (value,) = _integers(32, x=x)
    exponent = np.asarray(shift, np.int64)
    # Nothing that fits is shifted by more than 31 bits, but zeros are.
    raised = value << np.clip(exponent, 0, 31)
    if ((raised >= 1 << 31) | (raised < -(1 << 31)) | ((exponent > 31) & (value != 0))).any():
        raise OverflowError("a sum, shifted left by its multiplier's exponent, does not fit 32 bits")
    return rounding_divide_by_pot(saturating_rounding_doubling_high_mul(raised, q), np.maximum(-exponent, 0))


def multiply_single_rounding(x: Any, q: Any, shift: Any) -> IntArray:
    """``(x*q + 2**(30-shift)) >> (31-shift)``: one rounding, ties up; ``shift`` in -31..30."""
    (value,) = _integers(32, x=x)
    total = 31 - np.asarray(shift, np.int64)
    return (value * np.asarray(q, np.int64) + (np.int64(1) << (total - 1))) >> total


def multiply_reduced(x: Any, q: Any, shift: Any) -> IntArray:
    """For sums of up to 48 bits, as with 16-bit activations: ``q`` reduced to 16 bits, one rounding, ties up.

    ``r = (q + 2**15) >> 16``, but 0x7FFF from 0x7FFF0000 on; ``(x*r + 2**(14-shift)) >> (15-shift)``; ``shift`` in
    -31..7.
    """
    value = np.asarray(x)
    if not np.issubdtype(value.dtype, np.integer):
        raise TypeError(f"x must hold integers, not {value.dtype}")
    exponent, full = np.asarray(shift, np.int64), np.asarray(q, np.int64)
    if value.size and not -(1 << 47) <= int(value.min()) <= int(value.max()) < 1 << 47:
        raise ValueError(f"x must fit 48 bits signed, not reach {value.min()}..{value.max()}")
    if exponent.size and not -31 <= int(exponent.min()) <= int(exponent.max()) <= 7:
        raise ValueError(f"shift must be in -31..7, not {exponent.min()}..{exponent.max()}")
    reduced = np.where(full < 0x7FFF0000, (full + (1 << 15)) >> 16, 0x7FFF)
    total = 15 - exponent
    return (value.astype(np.int64) * reduced + (np.int64(1) << (total - 1))) >> total


def tflite_add(
    a: Any,
    b: Any,
    scale_a: float,
    scale_b: float,
    scale: float,
    left_shift: int = 20,
    *,
    single_rounding: bool = False,
) -> IntArray:
    """The sum of two tensors of codes less their zero points, as codes less theirs.

    Both are raised by ``left_shift`` bits (20 for 8-bit codes, 15 for 16-bit ones) and scaled to twice the larger of
    their scales; their sum is scaled to the output. Each of the three multiplications rounds, once or twice.
    """
    multiply = multiply_single_rounding if single_rounding else multiply_double_rounding
    common = 2 * max(scale_a, scale_b)

    def scaled(x: Any, ratio: float) -> IntArray:
        return multiply(x, *tflite_multiplier(ratio, single_rounding=single_rounding))

    first = scaled(np.asarray(a, np.int64) << left_shift, scale_a / common)
    second = scaled(np.asarray(b, np.int64) << left_shift, scale_b / common)
    return scaled(first + second, common / (float(1 << left_shift) * scale))


# HAWQ-V3 -----------------------------------------------------------------------------------------------------------


def dyadic_number(ratio: Any) -> tuple[IntArray, IntArray]:
    """``(b, c)`` with ``b / 2**c`` nearest to ``ratio`` >= 0: the significand of ``frexp`` in 31 bits, half up."""
    significand, exponent = np.frexp(np.asarray(ratio, np.float64))
    return np.floor(np.ldexp(significand, 31) + 0.5).astype(np.int64), 31 - exponent.astype(np.int64)


def multiply_dyadic(x: Any, b: Any, c: Any) -> IntArray:
    """``x * b / 2**c``, the product in float64 with its 53 bits, to the nearest integer, ties to even."""
    product = np.asarray(x, np.int64).astype(np.float64) * np.asarray(b, np.int64).astype(np.float64)
    return np.rint(np.ldexp(product, -np.asarray(c, np.int64))).astype(np.int64)


# Modes -------------------------------------------------------------------------------------------------------------


class Requantization(abc.ABC):
    """A system's way from sums to codes, before zero point and clamp."""

    name: ClassVar[str]

    @abc.abstractmethod
    def scale(self, total: IntArray, ratio: Ratio) -> IntArray:
        """``total * ratio`` as an integer; ``ratio`` is not negative and broadcasts against ``total``."""

    @abc.abstractmethod
    def add(self, a: IntArray, b: IntArray, scale_a: float, scale_b: float, scale: float) -> IntArray:
        """``(a * scale_a + b * scale_b) / scale`` as an integer, of codes less their zero points."""


class _Tflite(Requantization):
    left_shift: ClassVar[int] = 20
    single_rounding: ClassVar[bool] = False

    def scale(self, total: IntArray, ratio: Ratio) -> IntArray:
        multiply = multiply_single_rounding if self.single_rounding else multiply_double_rounding
        return multiply(total, *tflite_multiplier(ratio, single_rounding=self.single_rounding))

    def add(self, a: IntArray, b: IntArray, scale_a: float, scale_b: float, scale: float) -> IntArray:
        return tflite_add(a, b, scale_a, scale_b, scale, self.left_shift, single_rounding=self.single_rounding)


class TfliteDouble(_Tflite):
    """TensorFlow Lite with two roundings; gemmlowp's output stage is the same."""

    name = "tflite-double"


class TfliteSingle(_Tflite):
    """TensorFlow Lite built with ``TFLITE_SINGLE_ROUNDING``."""

    name = "tflite-single"
    single_rounding = True


class Tflite16x8(_Tflite):
    """TensorFlow Lite's kernels for 16-bit activations: a 16-bit multiplier; sums of tensors have 32 bits, as ever."""

    name = "tflite-16x8"
    left_shift = 15

    def scale(self, total: IntArray, ratio: Ratio) -> IntArray:
        return multiply_reduced(total, *tflite_multiplier(ratio))


class Dyadic(Requantization):
    """HAWQ-V3: ties to even; of a sum of two tensors each operand is rounded by itself."""

    name = "dyadic"

    def scale(self, total: IntArray, ratio: Ratio) -> IntArray:
        return multiply_dyadic(total, *dyadic_number(ratio))

    def add(self, a: IntArray, b: IntArray, scale_a: float, scale_b: float, scale: float) -> IntArray:
        first, second = self.scale(a, np.float64(scale_a / scale)), self.scale(b, np.float64(scale_b / scale))
        return np.asarray(first + second, np.int64)


class Onnx(Requantization):
    """QuantizeLinear of exact real sums, in float64: ties to even."""

    name = "onnx"

    def scale(self, total: IntArray, ratio: Ratio) -> IntArray:
        return np.rint(total * ratio).astype(np.int64)

    def add(self, a: IntArray, b: IntArray, scale_a: float, scale_b: float, scale: float) -> IntArray:
        return np.rint((a * scale_a + b * scale_b) / scale).astype(np.int64)


NIBBLECORE: Final = "nibblecore"
"""The name of the core's own rule."""
_MODES: Final[dict[str, Requantization]] = {
    rule.name: rule for rule in (TfliteDouble(), TfliteSingle(), Tflite16x8(), Dyadic(), Onnx())
}
ALIASES: Final = {"gemmlowp": "tflite-double"}
"""Second names."""
MODES: Final = (NIBBLECORE, *_MODES)
"""Names of all modes."""


def requantization(name: str) -> Requantization | None:
    """The rule of a mode, None for the core's own; :class:`ValueError` lists the names where there is none."""
    if name == NIBBLECORE:
        return None
    rule = _MODES.get(ALIASES.get(name, name))
    if rule is None:
        known = ", ".join([*MODES, *ALIASES])
        raise ValueError(f"there is no requantization {name!r}; there is {known}")
    return rule


# Nodes -------------------------------------------------------------------------------------------------------------


def _scale_of(graph: Graph, name: str) -> float:
    scale = graph.tensors[name].scale
    assert isinstance(scale, float)
    return scale


def _check(node: Node, ratio: Any, record: Any, tolerance: Any) -> None:
    """A graph whose multipliers are not those of its scales has nothing to derive others from."""
    wrong = np.abs(np.asarray(ratio) - record) > tolerance
    if wrong.any():
        index = int(np.flatnonzero(np.atleast_1d(wrong))[0])
        found, wanted = np.atleast_1d(record)[index], np.atleast_1d(ratio)[index]
        raise ValueError(
            f"{node.path}: the multiplier {found:g} is not that of the scales, {wanted:g}; other requantizations than "
            f"{NIBBLECORE!r} are derived from scales"
        )


def conv(rule: Requantization, graph: Graph, node: Conv, total: IntArray) -> IntArray:
    """``acc + bias`` as codes less their zero point.

    A negative multiplier is that of the negative sum. Channels without weights are constants in every mode.
    """
    ratio = _scale_of(graph, node.inputs[0]) * node.weight_scale / _scale_of(graph, node.output)
    record = np.ldexp(node.mult.astype(np.float64), -node.shift.astype(np.int64))
    constant = ~node.weight.reshape(len(node.weight), -1).any(axis=1)
    _check(node, ratio, np.where(constant, ratio, np.abs(record)), ratio * 2**-15 + 2.0**-numerics.SHIFT_MAX)
    sign = np.where(node.mult < 0, -1, 1)[:, None, None]
    result = rule.scale(total[:, ~constant] * sign[~constant], ratio[~constant, None, None])
    codes = np.empty_like(total)
    codes[:, ~constant] = result
    kept = (a[constant, None, None] for a in (node.mult, node.shift))
    codes[:, constant] = numerics.requantize(total[:, constant], 0, *kept)
    return codes


def avg_pool(rule: Requantization, graph: Graph, node: AvgPool, total: IntArray) -> IntArray:
    """Sums of windows, less their zero points, as codes less theirs."""
    window = node.kernel[0] * node.kernel[1]
    ratio = _scale_of(graph, node.inputs[0]) / (window * _scale_of(graph, node.output))
    _check(node, ratio, node.mult * 2.0**-node.shift, ratio * 2**-15 + 2.0**-numerics.SHIFT_MAX)
    return rule.scale(total, np.float64(ratio))


def residual_add(rule: Requantization, graph: Graph, node: ResidualAdd, a: IntArray, b: IntArray) -> IntArray:
    """The sum of two tensors of codes, as codes less their zero point."""
    first, second = (graph.tensors[name] for name in node.inputs)
    scales = [_scale_of(graph, name) for name in (*node.inputs, node.output)]
    for k, scale in ((node.k_a, scales[0]), (node.k_b, scales[1])):
        _check(node, scale / scales[2], k * 2.0**-node.shift, 2.0**-node.shift)
    return rule.add(a - first.zero, b - second.zero, scales[0], scales[1], scales[2])


def channel_mul(rule: Requantization, graph: Graph, node: ChannelMul, a: IntArray, b: IntArray) -> IntArray:
    """The product of two tensors of codes, as codes less their zero point."""
    first, second = (graph.tensors[name] for name in node.inputs)
    scales = [_scale_of(graph, name) for name in (*node.inputs, node.output)]
    ratio = scales[0] * scales[1] / scales[2]
    _check(node, ratio, node.k * 2.0**-node.shift, 2.0**-node.shift)
    return rule.scale((a - first.zero) * (b - second.zero), np.float64(ratio))
