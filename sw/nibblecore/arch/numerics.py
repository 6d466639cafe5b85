"""The integer arithmetic of the contract, written once.

Every function works alike on Python ints and on integer arrays (numpy int64, torch int64), elementwise: training's
export, the integer-graph interpreter, the golden model, compiler and hardware tests all call these. Arithmetic shifts
floor; ties of the rounding shifts go towards +inf.

Codes are *stored* codes: uint4 codes minus 8, uint8 codes minus 128, so that all storage is signed; zero points,
clamps and pad values are stored codes too.
"""

from fractions import Fraction
from typing import Any, Final

BIAS_BITS: Final = 32
MULT_BITS: Final = 18
SHIFT_MIN: Final = 1
SHIFT_MAX: Final = 47
ADD_FACTOR_BITS: Final = 16
ADD_SHIFT_MIN: Final = 1
ADD_SHIFT_MAX: Final = 31
MUL_FACTOR_BITS: Final = 16
MUL_SHIFT_MIN: Final = 1
MUL_SHIFT_MAX: Final = 31
W4_LIMIT: Final = 7
"""4-bit weights of our training are in -7..7."""
W8_LIMIT: Final = 119
"""8-bit weights of our training are 16*h + l with h and l in -7..7."""


def code_range(bits: int) -> tuple[int, int]:
    """Lowest and highest stored code of a ``bits``-wide tensor."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def signed_fits(value: int, bits: int) -> bool:
    """Whether ``value`` is in the range of a ``bits``-wide two's complement integer."""
    return -(1 << bits - 1) <= value < 1 << bits - 1


def clamp(x: Any, low: int, high: int) -> Any:
    """``x`` limited to ``low..high``, both included."""
    return max(low, min(high, x)) if isinstance(x, int) else x.clip(low, high)


def wrap(x: Any, bits: int) -> Any:
    """``x`` modulo ``2**bits``, as a two's complement integer: what an accumulator of that width holds."""
    half = 1 << bits - 1
    return (x + half & (1 << bits) - 1) - half


def rounding_shift(x: Any, n: Any) -> Any:
    """``floor(x / 2**n + 1/2)`` for ``n`` >= 1: the nearest integer, ties towards +inf."""
    one = 1 if isinstance(n, int) else n - n + 1
    return (x + (one << n - 1)) >> n


def requantize(acc: Any, bias: Any, mult: Any, shift: Any) -> Any:
    """``((acc + bias) * mult + 2**(shift-1)) >> shift``, before zero point and clamp.

    ``acc + bias`` fits 32 bits and ``mult`` 18 bits signed, ``shift`` is 1..47: the product fits 50 bits, and int64 is
    enough for every step.
    """
    return rounding_shift((acc + bias) * mult, shift)


def residual_add(
    a: Any, b: Any, *, zero_a: int, zero_b: int, k_a: int, k_b: int, n: int, zero: int, low: int, high: int
) -> Any:
    """``clamp(zero + (((a - zero_a)*k_a + (b - zero_b)*k_b + 2**(n-1)) >> n), low, high)``, one rounding."""
    return clamp(zero + rounding_shift((a - zero_a) * k_a + (b - zero_b) * k_b, n), low, high)


def channel_mul(
    a: Any, b: Any, *, zero_a: int, zero_b: int, k: int, n: int, zero: int, low: int, high: int
) -> Any:  # fmt: skip
    """``clamp(zero + (((a - zero_a)*(b - zero_b)*k + 2**(n-1)) >> n), low, high)``, one rounding.

    Two differences of 9 bits signed and a ``k`` of 16 make a product of at most 33 bits.
    """
    return clamp(zero + rounding_shift((a - zero_a) * (b - zero_b) * k, n), low, high)


def split_code8(code: Any) -> tuple[Any, Any]:
    """High and low nibble of an 8-bit stored code, both signed: ``code = 16*high + low + 8``."""
    return code >> 4, (code & 15) - 8


def join_code8(high: Any, low: Any) -> Any:
    """The inverse of :func:`split_code8`."""
    return 16 * high + low + 8


def split_weight8(weight: Any) -> tuple[Any, Any]:
    """High and low nibble of an 8-bit weight with ``weight = 16*high + low`` and ``low`` in -8..7.

    Both nibbles are in -8..7 for weights in -136..119, and in -7..7 for the codes of :func:`is_weight8`.
    """
    low = (weight + 8 & 15) - 8
    return (weight - low) >> 4, low


def is_weight8(weight: Any) -> Any:
    """Whether a weight is one of the 225 codes ``16*h + l`` with ``|h|, |l| <= 7``: training's 8-bit weights."""
    return (abs(weight) <= W8_LIMIT) & ((weight + 8 & 15) != 0)


def w8_project(nearest: Any, value: Any) -> Any:
    """The code of :func:`is_weight8` for a real ``value`` whose nearest integer in -119..119 is ``nearest``.

    A code ``16*k + 8`` has no two nibbles in -7..7 and goes to the neighbour that is nearer to ``value``, ties to the
    one of smaller magnitude. ``nearest`` must already be limited to -119..119, whose ends need no projection.
    """
    hole = (nearest + 8 & 15) == 0
    if isinstance(nearest, int):
        if not hole:
            return nearest
        toward_zero = -1 if nearest > 0 else 1
        away = (value - nearest) * toward_zero < 0
        return nearest + (-toward_zero if away else toward_zero)
    positive = (nearest > 0) * 2 - 1
    away = ((value - nearest) * positive > 0) * 2 - 1
    return nearest + hole * positive * away


def quantize_multiplier(ratio: float | Fraction, *, shift_max: int = SHIFT_MAX) -> tuple[int, int]:
    """``(mult, shift)`` with ``mult * 2**-shift`` nearest to ``ratio`` and as many significant bits as fit.

    ``mult`` is signed 18 bits; its magnitude is in 2**16..2**17-1 unless ``shift`` has reached ``shift_max``, below
    which precision is lost, or the ratio vanishes: (0, 1). Rounds half away from zero. Raises :class:`ValueError` for
    a ratio that is not finite, or of magnitude 2**16 and more, which no shift of at least 1 represents.
    """
    exact = Fraction(ratio)  # raises for nan and inf, with Python's own words
    sign, numerator, denominator = (-1 if exact < 0 else 1), abs(exact.numerator), exact.denominator
    # The ratio is above 2**(exponent - 1): larger shifts than the first make mult too large.
    exponent = numerator.bit_length() - denominator.bit_length()
    for shift in range(min(shift_max, MULT_BITS - exponent), SHIFT_MIN - 1, -1):
        mult = ((numerator << shift + 1) + denominator) // (2 * denominator)
        if mult < 1 << MULT_BITS - 1:
            return (sign * mult, shift) if mult else (0, SHIFT_MIN)
    raise ValueError(f"a scale ratio of {float(exact):g} is 2**16 or more in magnitude")


def constant_record(code: int, zero: int) -> tuple[int, int, int]:
    """``(bias, mult, shift)`` of a channel with zero weights whose every output is ``code``, zero point ``zero``."""
    return code - zero, 2, 1


def add_factors(scale_a: float, scale_b: float, scale: float) -> tuple[int, int, int]:
    """``(k_a, k_b, n)`` of :func:`residual_add`: ``k_i = round(scale_i / scale * 2**n)``, n as large as fits.

    Raises :class:`ValueError` where a ratio is 2**14 or more and so does not fit 16 bits at ``n = 1``.
    """
    ratios = [Fraction(scale_a) / Fraction(scale), Fraction(scale_b) / Fraction(scale)]
    limit = 1 << ADD_FACTOR_BITS - 1
    for n in range(ADD_SHIFT_MAX, ADD_SHIFT_MIN - 1, -1):
        k_a, k_b = (int(r * (1 << n) + Fraction(1, 2)) for r in ratios)
        # Two differences of 9 bits times 16 bits plus the rounding constant stay inside 32 bits up to n = 24.
        if n <= 24 and max(k_a, k_b) < limit:
            return k_a, k_b, n
    raise ValueError(f"scales {scale_a:g} and {scale_b:g} are too large beside the sum's {scale:g}")


def mul_factor(scale_a: float, scale_b: float, scale: float) -> tuple[int, int]:
    """``(k, n)`` of :func:`channel_mul`: ``k = round(scale_a * scale_b / scale * 2**n)``, n as large as fits.

    Scales are positive; ``k`` is in 2**14..2**15-1 unless ``n`` has reached 31. Rounds half up. Raises
    :class:`ValueError` where the ratio is 2**14 or more and so does not fit 16 bits at ``n = 1``.
    """
    ratio = Fraction(scale_a) * Fraction(scale_b) / Fraction(scale)
    for n in range(MUL_SHIFT_MAX, MUL_SHIFT_MIN - 1, -1):
        k = int(ratio * (1 << n) + Fraction(1, 2))
        if k < 1 << MUL_FACTOR_BITS - 1:
            return k, n
    raise ValueError(f"the product of scales {scale_a:g} and {scale_b:g} is too large beside the result's {scale:g}")
