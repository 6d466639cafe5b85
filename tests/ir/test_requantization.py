"""Other systems' requantization: primitives against exact rationals, whole graphs, and how often codes differ."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nibblecore import ir
from nibblecore.arch import numerics
from nibblecore.ir import requantization as rq
from nibblecore.ir.differences import compare_requantization

INT32 = (-(1 << 31), (1 << 31) - 1)
SAMPLES = 1_000_000


def half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def half_away(x: Fraction) -> int:
    return half_up(x) if x >= 0 else -half_up(-x)


def half_even(x: Fraction) -> int:
    return round(x)  # Python's


def saturate(x: int, bits: int) -> int:
    return max(-(1 << bits - 1), min((1 << bits - 1) - 1, x))


def edges(bits: int) -> list[int]:
    """Both ends of the range, powers of two with their neighbours, and numbers around zero."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    powers = {s * (1 << n) + d for n in range(bits) for s in (-1, 1) for d in (-1, 0, 1)}
    return sorted(v for v in powers | {0, low, low + 1, high, high - 1} if low <= v <= high)


# Primitives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 32])
def test_high_mul(bits: int) -> None:
    def exact(a: int, b: int) -> int:
        return saturate(half_up(Fraction(2 * a * b, 1 << bits)), bits)

    values = edges(bits)
    a, b = (m.ravel() for m in np.meshgrid(values, values))
    got = rq.saturating_rounding_doubling_high_mul(a, b, bits)
    assert got.tolist() == [exact(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    low = -(1 << bits - 1)
    assert int(rq.saturating_rounding_doubling_high_mul(low, low, bits)) == -low - 1


def test_high_mul_as_specified() -> None:
    """The published definition: a nudge by the sign of the product, then division that truncates; 10**6 pairs."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(*INT32, (2, SAMPLES), endpoint=True)
    product = a * b
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    truncated = np.where(nudged >= 0, nudged >> 31, -(-nudged >> 31))
    assert np.array_equal(rq.saturating_rounding_doubling_high_mul(a, b), truncated)


def test_high_mul_of_16_bits_as_specified() -> None:
    rng = np.random.default_rng(9)
    a, b = rng.integers(-(1 << 15), 1 << 15, (2, SAMPLES))
    a[:4], b[:4] = -(1 << 15), (-(1 << 15), (1 << 15) - 1, 1, -1)
    product = a * b
    nudged = product + np.where(product >= 0, 1 << 14, 1 - (1 << 14))
    truncated = np.where(nudged >= 0, nudged >> 15, -(-nudged >> 15))
    want = np.where((a == b) & (a == -(1 << 15)), (1 << 15) - 1, truncated)
    assert np.array_equal(rq.saturating_rounding_doubling_high_mul(a, b, 16), want)


@pytest.mark.parametrize("exponent", range(32))
def test_divide_by_power_of_two(exponent: int) -> None:
    values = edges(32)
    # Every tie, and its neighbours.
    half = 1 << max(0, exponent - 1)
    ties = [k * (1 << exponent) + half + d for k in range(-9, 9) for d in (-1, 0, 1)]
    values += [t for t in ties if INT32[0] <= t <= INT32[1]]
    got = rq.rounding_divide_by_pot(values, exponent)
    assert got.tolist() == [half_away(Fraction(v, 1 << exponent)) for v in values]


def test_divide_random() -> None:
    rng = np.random.default_rng(1)
    x, n = rng.integers(*INT32, SAMPLES, endpoint=True), rng.integers(0, 32, SAMPLES)
    got = rq.rounding_divide_by_pot(x, n)
    # |x| / 2**n of a 32-bit number is exact in float64, and so is adding a half.
    want = np.copysign(np.floor(np.ldexp(np.abs(x).astype(np.float64), -n) + 0.5), x)
    assert np.array_equal(got, want)


def test_half_sum_and_additions() -> None:
    values = edges(32)
    a, b = (m.ravel() for m in np.meshgrid(values, values))
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert rq.rounding_half_sum(a, b).tolist() == [half_away(Fraction(x + y, 2)) for x, y in pairs]
    for bits in (8, 16):
        values = edges(bits)
        a, b = (m.ravel() for m in np.meshgrid(values, values))
        want = [saturate(int(x) + int(y), bits) for x, y in zip(a, b, strict=True)]
        assert rq.saturating_add(a, b, bits).tolist() == want
    every = np.arange(-128, 128)
    assert np.array_equal(rq.saturating_add(every[:, None], every, 8), np.clip(every[:, None] + every, -128, 127))


def test_primitives_as_known() -> None:
    """Values that anyone can check by hand."""
    assert int(rq.rounding_divide_by_pot(-3, 1)) == -2
    assert int(rq.rounding_divide_by_pot(3, 1)) == 2
    assert int(rq.rounding_divide_by_pot(-1, 1)) == -1
    assert int(rq.rounding_half_sum(1, 2)) == 2
    assert int(rq.rounding_half_sum(-1, -2)) == -2
    # -0.5 goes up to 0, as 2**30 * -1 / 2**31 is a tie.
    assert int(rq.saturating_rounding_doubling_high_mul(1 << 30, -1)) == 0
    assert int(rq.saturating_rounding_doubling_high_mul(1 << 30, 1)) == 1
    assert int(rq.saturating_rounding_doubling_high_mul(1 << 14, 1 << 14, 16)) == 1 << 13


# Multipliers -------------------------------------------------------------------------------------------------------


def exact_multiplier(ratio: float) -> tuple[int, int]:
    if ratio == 0:
        return 0, 0
    value, shift = Fraction(ratio), 0
    while value >= 1:
        value, shift = value / 2, shift + 1
    while value < Fraction(1, 2):
        value, shift = value * 2, shift - 1
    q = half_away(value * (1 << 31))
    if q == 1 << 31:
        q, shift = 1 << 30, shift + 1
    return (q, shift) if shift >= -31 else (0, 0)


def test_multipliers() -> None:
    rng = np.random.default_rng(2)
    ratios = [*np.exp2(rng.uniform(-36, 20, 3000)), 0.0, 1.0, 0.5, 2.0**-31, 2.0**-32, 2.0**-33, 1 - 2.0**-40,
              1 - 2.0**-32, 1 - 2.0**-33, math.nextafter(1 - 2.0**-32, 0), 0.75 + 2.0**-32, 3 * 2.0**20]  # fmt: skip
    q, shift = rq.tflite_multiplier(ratios)
    assert list(zip(q.tolist(), shift.tolist(), strict=True)) == [exact_multiplier(r) for r in ratios]
    # Half of the last place becomes 2**31, which is 2**30 with a larger exponent.
    assert [int(v) for v in rq.tflite_multiplier(1 - 2.0**-32)] == [1 << 30, 1]
    assert [int(v) for v in rq.tflite_multiplier(math.nextafter(1 - 2.0**-32, 0))] == [(1 << 31) - 1, 0]
    # Below 2**-32 everything vanishes.
    assert [int(v) for v in rq.tflite_multiplier(2.0**-32)] == [1 << 30, -31]
    assert [int(v) for v in rq.tflite_multiplier(math.nextafter(2.0**-32, 0))] == [1 << 30, -31]
    assert [int(v) for v in rq.tflite_multiplier(2.0**-33)] == [0, 0]
    assert [int(v) for v in rq.tflite_multiplier(2.0**31, single_rounding=True)] == [(1 << 31) - 1, 30]
    assert [int(v) for v in rq.tflite_multiplier(2.0**31)] == [1 << 30, 32]
    b, c = rq.dyadic_number(0.3)
    assert Fraction(int(b), 1 << int(c)) == Fraction(half_up(Fraction(0.6) * (1 << 31)), 1 << 32)


def random_products(seed: int, count: int, bits: int = 20) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(-(1 << bits), 1 << bits, count), np.exp2(rng.uniform(-14, 2, count))


def test_both_roundings_are_exact() -> None:
    x, ratio = random_products(3, 20_000)
    q, shift = rq.tflite_multiplier(ratio)
    double, single = rq.multiply_double_rounding(x, q, shift), rq.multiply_single_rounding(x, q, shift)
    for i in range(len(x)):
        value, m, s = int(x[i]), int(q[i]), int(shift[i])
        once = half_up(Fraction(value * m, 1 << 31 - s))
        first = half_up(Fraction((value << max(s, 0)) * m, 1 << 31))
        twice = half_away(Fraction(first, 1 << max(-s, 0)))
        assert (int(double[i]), int(single[i])) == (twice, once), f"seed 3, sample {i}"


@pytest.mark.parametrize("shift", range(1, 9))
def test_every_tie(shift: int) -> None:
    """Multiplication by 2**-shift of every small integer: each mode has its own way with ties."""
    x = np.arange(-(1 << 11), 1 << 11)
    exact = [Fraction(int(v), 1 << shift) for v in x]
    q, s = rq.tflite_multiplier(2.0**-shift)
    assert (int(q), int(s)) == (1 << 30, 1 - shift)
    up, even = [half_up(v) for v in exact], [half_even(v) for v in exact]
    assert rq.multiply_single_rounding(x, q, s).tolist() == up
    assert rq.multiply_reduced(x, q, s).tolist() == up
    assert rq.multiply_dyadic(x, *rq.dyadic_number(2.0**-shift)).tolist() == even
    twice = [half_away(Fraction(half_up(Fraction(int(v), 2)), 1 << shift - 1)) for v in x]
    assert rq.multiply_double_rounding(x, q, s).tolist() == twice
    onnx = rq.requantization("onnx")
    assert onnx is not None
    assert onnx.scale(x, np.float64(2.0**-shift)).tolist() == even
    assert numerics.rounding_shift(x, shift).tolist() == up


@pytest.mark.parametrize("x", [(1 << 31) - 1, -(1 << 31)])
def test_ends_of_the_range(x: int) -> None:
    for ratio in (1.0, 0.999999, 0.5, 2.0**-31, 3e-10):
        q, s = exact_multiplier(ratio)
        once = half_up(Fraction(x * q, 1 << 31 - s))
        assert int(rq.multiply_single_rounding(x, q, s)) == once
        if s <= 0:
            twice = half_away(Fraction(half_up(Fraction(x * q, 1 << 31)), 1 << -s))
            assert int(rq.multiply_double_rounding(x, q, s)) == twice
        else:
            with pytest.raises(OverflowError):
                rq.multiply_double_rounding(x, q, s)


def test_reduced_multiplier() -> None:
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.integers(-(1 << 47), 1 << 47, 5000), [-(1 << 47), (1 << 47) - 1, 0, 1, -1]])
    ratio = np.exp2(rng.uniform(-31, -20, len(x)))
    ratio[:20] = 0.999999 * 2.0 ** -rng.integers(8, 20, 20)  # q of 0x7FFF0000 and more
    q, shift = rq.tflite_multiplier(ratio)
    assert (q[:20] >= 0x7FFF0000).all()
    got = rq.multiply_reduced(x, q, shift)
    for i in range(len(x)):
        reduced = min(0x7FFF, half_up(Fraction(int(q[i]), 1 << 16)))
        assert int(got[i]) == half_up(Fraction(int(x[i]) * reduced, 1 << 15 - int(shift[i]))), f"seed 4, sample {i}"


def test_dyadic_is_exact_where_float64_is() -> None:
    x, ratio = random_products(5, 20_000)
    b, c = rq.dyadic_number(ratio)
    got = rq.multiply_dyadic(x, b, c)
    for i in range(len(x)):
        # 21 and 31 bits make 52: the product is exact.
        assert int(got[i]) == half_even(Fraction(int(x[i]) * int(b[i]), 1 << int(c[i]))), f"seed 5, sample {i}"
    assert rq.multiply_dyadic([1, 3, 5, -1, -3], 1 << 30, 31).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize(("left_shift", "bits"), [(20, 4), (20, 8), (15, 16)])
def test_tflite_sum(left_shift: int, bits: int) -> None:
    """The published steps in rationals, each rounding by itself."""
    rng = np.random.default_rng(6)
    limit = 1 << bits
    for seed in range(6):
        s1, s2, s3 = (float(s) for s in np.exp2(rng.uniform(-6, 2, 3)))
        a, b = rng.integers(-limit + 1, limit, (2, 200))
        got = rq.tflite_add(a, b, s1, s2, s3, left_shift)
        once = rq.tflite_add(a, b, s1, s2, s3, left_shift, single_rounding=True)

        def times(x: int, ratio: float, single: bool) -> int:
            q, shift = exact_multiplier(ratio)
            if single:
                return half_up(Fraction(x * q, 1 << 31 - shift))
            first = half_up(Fraction((x << max(shift, 0)) * q, 1 << 31))
            return half_away(Fraction(first, 1 << max(-shift, 0)))

        t = 2 * max(s1, s2)
        for i in range(len(a)):
            for single, result in ((False, got), (True, once)):
                total = times(int(a[i]) << left_shift, s1 / t, single) + times(int(b[i]) << left_shift, s2 / t, single)
                want = times(total, t / (2**left_shift * s3), single)
                assert int(result[i]) == want, f"seed 6, round {seed}, sample {i}"
        # And near what it stands for.
        real = (a * s1 + b * s2) / s3
        assert np.abs(got - real).max() < 0.51


# Published facts about how often they differ -----------------------------------------------------------------------


@pytest.mark.parametrize("shift", [4, 6])
def test_one_and_two_roundings_differ_in_one_of_2_to_the_shift_plus_1(shift: int) -> None:
    """0.8 % at 6: the first rounding makes ties out of what was near one."""
    rng = np.random.default_rng(7)
    x = rng.integers(-(1 << 16), 1 << 16, SAMPLES)
    ratio = rng.uniform(0.5, 1, SAMPLES) * 2.0**-shift
    q, s = rq.tflite_multiplier(ratio)
    differing = (rq.multiply_double_rounding(x, q, s) != rq.multiply_single_rounding(x, q, s)).mean()
    assert differing == pytest.approx(2.0 ** -(shift + 1), rel=0.05)


@pytest.mark.parametrize("shift", [4, 6])
def test_ties_of_powers_of_two(shift: int) -> None:
    """Half up and half to even differ in one code of 2**(shift + 1): 3.1 % at 4, 0.8 % at 6."""
    x = np.random.default_rng(8).integers(-(1 << 16), 1 << 16, SAMPLES)
    ratio = np.float64(2.0**-shift)
    core = numerics.rounding_shift(x, shift)
    rates = {}
    for mode in rq.MODES[1:]:
        rule = rq.requantization(mode)
        assert rule is not None
        rates[mode] = (rule.scale(x, ratio) != core).mean()
    for mode in ("dyadic", "onnx"):
        assert rates[mode] == pytest.approx(2.0 ** -(shift + 1), rel=0.05)
    # One rounding is the core's rule. With two, ties of negative sums go down; and of positive sums, what is one less
    # than a tie becomes one, as a multiplier of 2**30 first rounds halves.
    assert rates["tflite-single"] == rates["tflite-16x8"] == 0
    assert rates["tflite-double"] == pytest.approx(2.0**-shift, rel=0.05)


# Graphs ------------------------------------------------------------------------------------------------------------


def graph(seed: int, **changes: Any) -> ir.Graph:
    """Convolution, sum with its input, product, average: all that requantizes, with scales that are kept to."""
    rng = np.random.default_rng(seed)
    x = ir.TensorType((4, 6, 6), 8, 0.02, 3)
    y = ir.TensorType((4, 6, 6), 4, 0.31, -2)
    total = ir.TensorType((4, 6, 6), 8, 0.029, -20)
    product = ir.TensorType((4, 6, 6), 8, 0.05, 1)
    mean = ir.TensorType((4, 2, 2), 8, 0.011, 0)
    weight = rng.integers(-7, 8, (4, 4, 3, 3))
    weight[2] = 0
    scale = rng.uniform(0.005, 0.02, 4)
    records = [numerics.quantize_multiplier(x.scale * s / y.scale * sign)
               for s, sign in zip(scale, (1, -1, 1, 1), strict=True)]  # fmt: skip
    records[2] = (2, 1)
    bias = rng.integers(-3000, 3000, 4) - x.zero * weight.sum(axis=(1, 2, 3))
    bias[2] = 3
    k_a, k_b, n = numerics.add_factors(x.scale, y.scale, total.scale)  # type: ignore[arg-type]
    mult, shift = numerics.quantize_multiplier(product.scale / (9 * mean.scale))  # type: ignore[operator]
    k, k_shift = numerics.quantize_multiplier(total.scale * x.scale / product.scale)  # type: ignore[operator]
    k, k_shift = k >> 3, k_shift - 3
    conv = ir.Conv("y", ("x",), "conv", weight, 4, scale, bias, np.array([m for m, _ in records]),
                   np.array([s for _, s in records]), (1, 1), (1, 1, 1, 1), (1, 1), -8, 7)  # fmt: skip
    nodes: tuple[Any, ...] = (
        conv,
        ir.ResidualAdd("total", ("x", "y"), "sum", k_a, k_b, n, -128, 127),
        ir.ChannelMul("product", ("total", "x"), "product", k, k_shift, -128, 127),
        ir.AvgPool("mean", ("product",), "mean", (3, 3), (3, 3), (0, 0, 0, 0), -9, mult, shift, -128, 127),
    )
    tensors = {"x": x, "y": y, "total": total, "product": product, "mean": mean, **changes}
    return ir.verify(ir.Graph(nodes, tensors, ("x",), ("mean",)))


def exact_scale(mode: str, total: int, ratio: float) -> int:
    if mode == "onnx":
        return half_even(Fraction(total * ratio))  # the product in float64
    q, shift = exact_multiplier(ratio)
    if mode == "dyadic":
        return half_even(Fraction(total * q, 1 << 31 - shift))
    if mode == "tflite-16x8":
        return half_up(Fraction(total * min(0x7FFF, half_up(Fraction(q, 1 << 16))), 1 << 15 - shift))
    if mode == "tflite-single":
        return half_up(Fraction(total * q, 1 << 31 - shift))
    return half_away(Fraction(half_up(Fraction((total << max(shift, 0)) * q, 1 << 31)), 1 << max(-shift, 0)))


@pytest.mark.parametrize("mode", rq.MODES[1:])
def test_graphs(mode: str) -> None:
    """Every node against rationals on the codes that it has read; channels with negative factors and constants too."""
    network = graph(0)
    x = np.random.default_rng(1).integers(-128, 128, (2, 4, 6, 6))
    tensors = ir.run(network, {"x": x}, keep=True, requantization=mode)
    types = network.tensors
    scale = {name: float(t.scale) for name, t in types.items()}  # type: ignore[arg-type]
    conv: Any = network.nodes[0]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=types["x"].zero)
    for index in np.ndindex(2, 4, 6, 6):
        n, c, row, col = index
        acc = int((padded[n, :, row : row + 3, col : col + 3] * conv.weight[c]).sum()) + int(conv.bias[c])
        want = acc
        if c != 2:
            sign = -1 if c == 1 else 1
            want = exact_scale(mode, sign * acc, scale["x"] * conv.weight_scale[c] / scale["y"])
        assert tensors["y"][index] == max(-8, min(7, want - 2)), index
        a, b = int(x[index]) - 3, int(tensors["y"][index]) + 2
        if mode == "onnx":
            want = half_even(Fraction((a * scale["x"] + b * scale["y"]) / scale["total"]))
        elif mode == "dyadic":
            want = sum(exact_scale(mode, v, scale[s] / scale["total"]) for v, s in ((a, "x"), (b, "y")))
        else:
            inner = "tflite-single" if mode == "tflite-single" else "tflite-double"
            left, common = 15 if mode == "tflite-16x8" else 20, 2 * max(scale["x"], scale["y"])
            parts = [exact_scale(inner, v << left, scale[s] / common) for v, s in ((a, "x"), (b, "y"))]
            want = exact_scale(inner, sum(parts), common / (2**left * scale["total"]))
        assert tensors["total"][index] == max(-128, min(127, want - 20)), index
        want = exact_scale(
            mode, (int(tensors["total"][index]) + 20) * a, scale["total"] * scale["x"] / scale["product"]
        )
        assert tensors["product"][index] == max(-128, min(127, want + 1)), index
    for index in np.ndindex(2, 4, 2, 2):
        n, c, row, col = index
        window = tensors["product"][n, c, 3 * row : 3 * row + 3, 3 * col : 3 * col + 3] - 1
        want = exact_scale(mode, int(window.sum()), scale["product"] / (9 * scale["mean"]))
        assert tensors["mean"][index] == max(-128, min(127, want)), index


def test_gemmlowp_is_tflites_default() -> None:
    x = np.random.default_rng(2).integers(-128, 128, (2, 4, 6, 6))
    first = ir.run(graph(3), {"x": x}, requantization="gemmlowp")
    assert np.array_equal(first["mean"], ir.run(graph(3), {"x": x}, requantization="tflite-double")["mean"])


def test_differences() -> None:
    network = graph(4)
    x = np.random.default_rng(5).integers(-128, 128, (20, 4, 6, 6))
    summaries, differences = compare_requantization(network, {"x": x}, ("nibblecore", "gemmlowp", "tflite-single"))
    assert [s.mode for s in summaries] == ["gemmlowp", "tflite-single"]
    assert [d.path for d in differences] == ["conv", "sum", "product", "mean"] * 2
    core = ir.run(network, {"x": x}, keep=True)
    other = ir.run(network, {"x": x}, keep=True, requantization="gemmlowp")
    for row in differences[:4]:
        node = next(n for n in network.nodes if n.path == row.path)
        wrong = other[node.output] - core[node.output]
        assert row.together == np.count_nonzero(wrong)
        assert row.most_together == np.abs(wrong).max()
        assert row.codes == wrong.size
    # The first node reads the same codes either way.
    assert differences[0].alone == differences[0].together > 0
    assert summaries[0].alone == pytest.approx(
        sum(d.alone for d in differences[:4]) / sum(d.codes for d in differences[:4])
    )
    assert summaries[0].outputs == np.mean(core["mean"] != other["mean"])
    assert math.isnan(summaries[0].classes)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: rq.saturating_rounding_doubling_high_mul(1, 1, 8), ValueError, r"^bits must be 16 or 32, not 8$"),
        (lambda: rq.saturating_add(1, 1, 4), ValueError, r"^bits must be 8, 16 or 32, not 4$"),
        (lambda: rq.saturating_add(1.5, 1), TypeError, r"^a must hold integers, not float64$"),
        (lambda: rq.rounding_half_sum(1, 1 << 31), ValueError,
         r"^b must fit 32 bits signed, not reach 2147483648\.\.2147483648$"),
        (lambda: rq.rounding_divide_by_pot(1, 32), ValueError, r"^exponent must be in 0\.\.31, not 32\.\.32$"),
        (lambda: rq.tflite_multiplier(-1.0), ValueError, r"^ratio must be finite and not negative, not -1\.0$"),
        (lambda: rq.tflite_multiplier([1.0, math.inf]), ValueError,
         r"^ratio must be finite and not negative, not inf$"),
        (lambda: rq.multiply_double_rounding(1 << 20, 1 << 30, 12), OverflowError,
         r"^a sum, shifted left by its multiplier's exponent, does not fit 32 bits$"),
        (lambda: rq.multiply_reduced(1 << 47, 1, 0), ValueError, r"^x must fit 48 bits signed, not reach "),
        (lambda: rq.multiply_reduced(1.0, 1, 0), TypeError, r"^x must hold integers, not float64$"),
        (lambda: rq.multiply_reduced(1, 1, 8), ValueError, r"^shift must be in -31\.\.7, not 8\.\.8$"),
        (lambda: rq.requantization("exact"), ValueError,
         r"^there is no requantization 'exact'; there is nibblecore, tflite-double, .*, onnx, gemmlowp$"),
        (lambda: ir.run(graph(0, y=ir.TensorType((4, 6, 6), 4, 0.3, -2)), {"x": np.zeros((1, 4, 6, 6), np.int64)},
                        requantization="onnx"), ValueError,
         r"^conv: the multiplier 0\.\d+ is not that of the scales, 0\.\d+; other requantizations than .* from scales$"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
