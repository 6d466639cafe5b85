import random
from fractions import Fraction

import numpy as np
import pytest

from nibblecore.arch import numerics


def floor_half_up(x: Fraction) -> int:
    return (x + Fraction(1, 2)).__floor__()


@pytest.mark.parametrize("shift", range(1, 48))
def test_requantize_rounds_ties_towards_plus_infinity(shift: int) -> None:
    rng = random.Random(shift)
    half = 1 << shift - 1
    products = [k * half + d for k in (-3, -2, -1, 0, 1, 2, 3) for d in (-1, 0, 1)]
    products += [rng.randint(-(1 << 49), 1 << 49) for _ in range(20)]
    for product in products:
        want = floor_half_up(Fraction(product, 1 << shift))
        assert numerics.rounding_shift(product, shift) == want
        assert numerics.rounding_shift(np.array([product]), np.array([shift]))[0] == want


@pytest.mark.parametrize("mult", [-(1 << 17), -1, 0, 1, (1 << 17) - 1])
@pytest.mark.parametrize("total", [-(1 << 31), -1, 0, 1, (1 << 31) - 1])
def test_requantize_extremes_agree_between_ints_and_arrays(total: int, mult: int) -> None:
    for shift in range(numerics.SHIFT_MIN, numerics.SHIFT_MAX + 1):
        want = floor_half_up(Fraction(total * mult, 1 << shift))
        assert numerics.requantize(total - 5, 5, mult, shift) == want
        got = numerics.requantize(np.array([total - 5]), np.array([5]), np.array([mult]), np.array([shift]))
        assert got.dtype == np.int64
        assert got[0] == want


def test_code8_planes_are_nibbles_and_join_back() -> None:
    codes = np.arange(-128, 128)
    high, low = numerics.split_code8(codes)
    for plane in (high, low):
        assert plane.min() == -8
        assert plane.max() == 7
    assert (numerics.join_code8(high, low) == codes).all()


def test_weight8_grid_has_225_codes_with_nibbles_within_seven() -> None:
    codes = [w for w in range(-128, 128) if numerics.is_weight8(w)]
    assert codes == sorted({16 * high + low for high in range(-7, 8) for low in range(-7, 8)})
    for w in codes:
        high, low = numerics.split_weight8(w)
        assert 16 * high + low == w
        assert max(abs(high), abs(low)) <= 7


@pytest.mark.parametrize("offset", [-0.5, -0.25, 0.0, 0.25, 0.4999])
def test_w8_projection_takes_the_nearest_code_and_ties_the_smaller_one(offset: float) -> None:
    allowed = [w for w in range(-119, 120) if numerics.is_weight8(w)]
    nearest = np.arange(-119, 120)
    got = numerics.w8_project(nearest, nearest + offset)
    for n, g in zip(nearest.tolist(), got.tolist(), strict=True):
        value = n + offset
        if numerics.is_weight8(n):
            assert g == n
        else:
            assert g == min(allowed, key=lambda c: (abs(c - value), abs(c)))
        assert numerics.w8_project(n, value) == g


@pytest.mark.parametrize("seed", range(5))
def test_multiplier_is_as_close_as_18_bits_allow(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        ratio = rng.choice((-1, 1)) * 2.0 ** rng.uniform(-25, 15)
        mult, shift = numerics.quantize_multiplier(ratio)
        assert numerics.signed_fits(mult, 18)
        assert 1 <= shift <= 47
        assert abs(mult / 2**shift - ratio) <= abs(ratio) * 2**-17, f"seed {seed}, ratio {ratio}"


def test_multiplier_limits() -> None:
    assert numerics.quantize_multiplier(0.0) == (0, 1)
    assert numerics.quantize_multiplier(2.0**-60) == (0, 1)
    assert numerics.quantize_multiplier(65535.0) == (131070, 1)
    with pytest.raises(ValueError, match=r"^a scale ratio of 65536 is 2\*\*16 or more in magnitude$"):
        numerics.quantize_multiplier(65536.0)
    with pytest.raises(ValueError, match="NaN"):
        numerics.quantize_multiplier(float("nan"))


def test_constant_record_gives_its_constant() -> None:
    for code in range(-128, 128):
        for zero in (-128, -8, 0, 127):
            bias, mult, shift = numerics.constant_record(code, zero)
            assert numerics.requantize(0, bias, mult, shift) + zero == code


def test_add_factors() -> None:
    k_a, k_b, n = numerics.add_factors(0.1, 0.2, 0.15)
    assert abs(k_a / 2**n - 0.1 / 0.15) < 2**-n
    assert abs(k_b / 2**n - 0.2 / 0.15) < 2**-n
    with pytest.raises(ValueError, match="^scales 1 and 20000 are too large beside the sum's 1$"):
        numerics.add_factors(1.0, 20000.0, 1.0)


@pytest.mark.parametrize(
    ("value", "bits", "want"), [(1 << 23, 24, -(1 << 23)), (-(1 << 23) - 1, 24, (1 << 23) - 1), (-8, 4, -8)]
)
def test_wrap(value: int, bits: int, want: int) -> None:
    assert numerics.wrap(value, bits) == want
    assert numerics.wrap(np.array([value]), bits)[0] == want


def test_mul_factor() -> None:
    k, n = numerics.mul_factor(0.1, 0.004, 0.15)
    assert 2**14 <= k < 2**15
    assert abs(k / 2**n - 0.1 * 0.004 / 0.15) <= 2.0 ** -(n + 1)
    assert numerics.mul_factor(1.0, 2.0**-40, 1.0) == (0, 31)
    assert numerics.mul_factor(16383.0, 1.0, 1.0) == (32766, 1)
    with pytest.raises(ValueError, match="^the product of scales 4 and 5000 is too large beside the result's 1$"):
        numerics.mul_factor(4.0, 5000.0, 1.0)


def test_channel_mul_is_the_rounded_product() -> None:
    fields = {"zero_a": -3, "zero_b": -128, "k": 18000, "n": 21, "zero": 5, "low": -128, "high": 127}
    a, b = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128))
    want = np.clip(5 + np.floor((a + 3) * (b + 128) * 18000 / 2**21 + 0.5), -128, 127)
    assert np.array_equal(numerics.channel_mul(a, b, **fields), want)
    assert numerics.channel_mul(100, 90, **fields) == want[90 + 128, 100 + 128]
    # The largest product of codes and factor is one of 33 bits.
    assert numerics.signed_fits(255 * 255 * 2**15 + 2**30, 33)
