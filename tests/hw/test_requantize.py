# amaranth: UnusedElaboratable=no
import itertools
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nibblecore.arch import numerics
from nibblecore_hw.core.requantize import RequantLane, RoundShiftClamp
from nibblecore_sim.pysim import simulate

Row = tuple[int, ...]


def run(dut: Any, inputs: tuple[str, ...], output: str, latency: int, rows: list[Row]) -> list[int]:
    """Feed one row per cycle; the outputs ``latency`` cycles behind each."""
    found: list[int] = []

    async def bench(ctx: Any) -> None:
        ports = [getattr(dut, name) for name in inputs]
        held: list[int | None] = [None] * len(ports)
        late = isinstance(dut, RequantLane)
        # Records follow their accumulators.
        behind = [RequantLane.RECORD_LATENCY if n in ("bias", "mult") or (n == "shift" and late) else 0 for n in inputs]
        for cycle in range(len(rows) + latency):
            if cycle >= latency:
                found.append(ctx.get(getattr(dut, output)))
            for i, cycles in enumerate(behind):
                if 0 <= cycle - cycles < len(rows) and (value := rows[cycle - cycles][i]) != held[i]:
                    ctx.set(ports[i], value)
                    held[i] = value
            await ctx.tick()

    simulate(dut, bench, max_cycles=len(rows) + latency + 1)
    return found


def check(
    dut: Any,
    inputs: tuple[str, ...],
    constant: dict[str, int],
    output: str,
    rows: list[Row],
    model: Callable[..., int],
    seed: int | None = None,
) -> None:
    """``constant`` stands for the whole run, ``rows`` change every cycle."""
    names = (*inputs, *constant)
    latency = dut.SUM_LATENCY if output == "sum" else dut.LATENCY
    found = run(dut, names, output, latency, [(*row, *constant.values()) for row in rows])
    for row, got in zip(rows, found, strict=True):
        want = model(**dict(zip(inputs, row, strict=True)), **constant)
        assert got == want, f"{dict(zip(inputs, row, strict=True))} with {constant}, seed {seed}: {got}, not {want}"


INPUTS = ("acc", "bias", "mult", "shift")
WIDE = {"zero": 0, "low": -128, "high": 127}
SHIFTS = range(numerics.SHIFT_MIN, numerics.SHIFT_MAX + 1)


def requant(
    rows: Iterable[Row], constant: dict[str, int] = WIDE, *, acc_bits: int = 32, seed: int | None = None
) -> None:
    check(RequantLane(acc_bits=acc_bits), INPUTS, constant, "code", list(rows), RequantLane.model, seed)


def split(total: int, rng: random.Random) -> tuple[int, int]:
    """A total of 32 bits as accumulator and bias of 32 bits each."""
    low, high = max(-(1 << 31), total - (1 << 31) + 1), min((1 << 31) - 1, total + (1 << 31))
    acc = rng.choice((low, high, min(max(0, low), high), rng.randint(low, high)))
    return acc, total - acc


def products(shift: int, quotients: Iterable[int]) -> Iterable[tuple[int, int]]:
    """``(acc + bias, mult)`` whose product is one of ``quotients`` halves of ``2**shift``, in every way of halving."""
    for quotient, power in itertools.product(quotients, range(18)):
        total = quotient << shift - 1 - power if power < shift else None
        if total is not None and numerics.signed_fits(total, 32):
            for mult in (1 << power, -(1 << power)):
                if numerics.signed_fits(mult, 18):
                    yield total, mult


@pytest.mark.parametrize("zero", [0, 127, -128])
def test_ties_of_every_shift(zero: int) -> None:
    # Odd multiples of half a unit are ties; those around 2*(code - zero) also meet both ends of the clamp.
    rng = random.Random(zero)
    quotients = [0, 1, 2, 3, 5, -1, -2, -3, -5]
    quotients += [2 * (end - zero) + d for end in (-128, 127) for d in (-3, -2, -1, 0, 1, 2, 3)]
    rows = []
    for shift in SHIFTS:
        ways = list(products(shift, quotients))
        kept = {(total * mult, mult < 0): (total, mult) for total, mult in rng.sample(ways, len(ways))}
        for total, mult in kept.values():
            for off in (-1, 0, 1):  # one unit of the sum beside the tie
                if numerics.signed_fits(total + off, 32):
                    rows.append((*split(total + off, rng), mult, shift))
    assert {row[3] for row in rows} == set(SHIFTS)
    assert all(any(s == shift and (a + b) * k % (1 << s) == 1 << s - 1 for a, b, k, s in rows) for shift in SHIFTS)
    requant(rows, {"zero": zero, "low": -128, "high": 127}, seed=zero)


def test_every_split_of_a_tie_between_sum_and_multiplier() -> None:
    rng = random.Random(1)
    rows = [(*split(t, rng), k, s) for s in SHIFTS for t, k in products(s, (1, -1, 7, -7))]
    assert {k for _, _, k, _ in rows} >= {1 << n for n in range(17)} | {-(1 << n) for n in range(18)}
    requant(rows)


@pytest.mark.parametrize("bounds", [(-128, 127), (-8, 7), (0, 0), (-128, -128), (127, 127)])
def test_extremes_saturate(bounds: tuple[int, int]) -> None:
    ends = [
        -(1 << 31),
        -(1 << 31) + 1,
        -(1 << 17) - 1,
        -(1 << 17),
        -(1 << 16),
        -1,
        0,
        1,
        (1 << 16) - 1,
        1 << 16,
        (1 << 17) - 1,
        1 << 17,
        (1 << 31) - 2,
        (1 << 31) - 1,
    ]
    mults = [-(1 << 17), -(1 << 17) + 1, -(1 << 16), -1, 0, 1, (1 << 16) + 1, (1 << 17) - 2, (1 << 17) - 1]
    rng = random.Random(2)
    rows = [(*split(t, rng), k, s) for t, k, s in itertools.product(ends, mults, SHIFTS)]
    requant(rows, {"zero": 3, "low": bounds[0], "high": bounds[1]}, seed=2)


def test_boundaries_of_the_dropped_bits() -> None:
    # Quotients of 2**n and beside it, for every n that the shifter narrows at: what it drops must still be noticed.
    rng = random.Random(3)
    rows = []
    for shift, n, sign, off in itertools.product(SHIFTS, range(6, 49), (1, -1), (-1, 0)):
        product = sign * (1 << n) + off * sign
        if abs(product) < 1 << 31:
            rows.append((*split(product, rng), 1, shift))
        elif abs(product) >> 17 < 1 << 31 and off == 0:
            rows.append((*split(-sign * (1 << n - 17), rng), -(1 << 17), shift))
    requant(rows, seed=3)


@pytest.mark.parametrize("acc_bits", [24, 27, 32])
@pytest.mark.parametrize("seed", range(2))
def test_random_records(acc_bits: int, seed: int) -> None:
    rng = random.Random(seed)
    half = 1 << acc_bits - 1
    rows = []
    for _ in range(2000):
        acc, mult = rng.randint(-half, half - 1) >> rng.randrange(acc_bits), rng.randint(-(1 << 17), (1 << 17) - 1)
        bias = rng.randint(-(1 << 31), (1 << 31) - 1) >> rng.randrange(32)
        bias = numerics.clamp(acc + bias, -(1 << 31), (1 << 31) - 1) - acc
        near = max(1, ((acc + bias) * mult).bit_length() - 8)
        rows.append((acc, bias, mult, min(47, max(1, rng.choice((near, near + 1, near + 3, rng.randint(1, 47)))))))
    low, high = sorted(rng.sample(range(-128, 128), 2))
    requant(rows, {"zero": rng.randint(-128, 127), "low": low, "high": high}, acc_bits=acc_bits, seed=seed)


@pytest.mark.parametrize("acc_bits", [24, 32])
def test_sum_wraps_at_32_bits(acc_bits: int) -> None:
    rng = random.Random(4)
    half = 1 << acc_bits - 1
    rows = [(a, b) for a in (-half, -1, 0, half - 1) for b in (-(1 << 31), -1, 0, 1, (1 << 31) - 1)]
    rows += [(rng.randint(-half, half - 1), rng.randint(-(1 << 31), (1 << 31) - 1)) for _ in range(200)]
    check(RequantLane(acc_bits=acc_bits), ("acc", "bias"), {}, "sum", rows, RequantLane.model_sum)


def random_add(rng: random.Random) -> dict[str, int]:
    low, high = rng.choice((sorted(rng.sample(range(-128, 128), 2)), (-128, 127), (-8, 7)))
    extreme = rng.choice(((-32768, 32767), (-32768, -32768), (32767, 32767)))
    return {
        "zero_a": rng.randint(-128, 127), "zero_b": rng.randint(-128, 127), "zero": rng.randint(-128, 127),
        "k_a": rng.choice((*extreme, 2, 0, rng.randint(-32768, 32767), rng.randint(0, 400))),
        "k_b": rng.choice((*extreme, 0, rng.randint(-32768, 32767), rng.randint(0, 400))),
        "low": low, "high": high,
    }  # fmt: skip


def add(rows: list[tuple[int, int]], constant: dict[str, int], seed: int | None = None) -> None:
    """Codes ``a`` through the first pass (shifted by nothing in effect: times 2, by 1), and ``b`` on the second."""
    second, latency = RequantLane.AGAIN_LATENCY, RequantLane.AGAIN_LATENCY + RequantLane.LATENCY
    dut = RequantLane(acc_bits=24)
    record = {
        "bias": numerics.wrap((constant["k_b"] & 0xFFFF) + (constant["k_a"] << 16), 32), "shift": constant["n"] + 16,
    }  # fmt: skip
    stand = {k: v for k, v in constant.items() if k not in ("zero_a", "k_a", "k_b", "n")} | {
        "add": 1, "first_low": -128 - constant["zero_a"], "first_high": 127 - constant["zero_a"],
    }  # fmt: skip
    rng = random.Random(seed)
    found: list[int] = []

    async def bench(ctx: Any) -> None:
        for name, value in stand.items():
            ctx.set(getattr(dut, name), value)
        for cycle in range(2 * (len(rows) + latency)):
            if cycle >= latency and (cycle - latency) % 2 == 0 and len(found) < len(rows):
                found.append(ctx.get(dut.code))
            # What is not looked at is garbage.
            garbage = {"acc": 24, "bias": 32, "mult": 18, "b": 8}
            values = {n: rng.randint(-(1 << bits - 1), (1 << bits - 1) - 1) for n, bits in garbage.items()}
            values |= {"shift": rng.randint(1, 47), "again": cycle % 2 == second % 2}
            if cycle % 2 == 0 and cycle // 2 < len(rows):
                values["acc"] = rows[cycle // 2][0] - constant["zero_a"]
            if cycle % 2 == 1:
                values |= {"bias": 0, "mult": 2, "shift": 1}
            if (n := cycle - second - 1) >= 0 and n % 2 == 0:
                values |= record
                if n // 2 < len(rows):
                    values["b"] = rows[n // 2][1]
            for name, value in values.items():
                ctx.set(getattr(dut, name), value)
            await ctx.tick()

    simulate(dut, bench, max_cycles=2 * (len(rows) + latency) + 1)
    for (a, b), got in zip(rows, found, strict=True):
        want = RequantLane.model_add(numerics.clamp(a, -128, 127), b, **constant)
        assert got == want, f"a={a}, b={b} with {constant}, seed {seed}: {got}, not {want}"


@pytest.mark.parametrize("n", range(numerics.ADD_SHIFT_MIN, numerics.ADD_SHIFT_MAX + 1))
def test_second_pass_adds_a_stored_code(n: int) -> None:
    rng = random.Random(n)
    codes = (-128, -127, -8, -1, 0, 1, 7, 126, 127)
    rows = list(itertools.product((-300, *codes, 500), codes)) + [
        (rng.randint(-128, 127), rng.randint(-128, 127)) for _ in range(60)
    ]
    for constant in (
        random_add(rng),
        random_add(rng),
        # Largest sums: differences of 255 times factors of 2**15.
        {"zero_a": 127, "zero_b": 127, "zero": 0, "k_a": -32768, "k_b": -32768, "low": -128, "high": 127},
        {"zero_a": -128, "zero_b": -128, "zero": 0, "k_a": -32768, "k_b": -32768, "low": -128, "high": 127},
        # Ties: every odd sum is one at n = 1, every odd multiple of 2**(n-1) at n.
        {"zero_a": 0, "zero_b": 0, "zero": 5, "k_a": 1 << min(n - 1, 14), "k_b": 1 << max(0, n - 3) % 15,
         "low": -128, "high": 127},
    ):  # fmt: skip
        add(rows, {**constant, "n": n}, n)


@pytest.mark.parametrize(("value_bits", "shift_max"), [(11, 2), (12, 63), (30, 7), (40, 20)])
def test_round_shift_clamp_of_any_width(value_bits: int, shift_max: int) -> None:
    rng = random.Random(value_bits)
    half = 1 << value_bits - 1
    rows = [(rng.randint(-half, half - 1) >> rng.randrange(value_bits), rng.randint(1, shift_max)) for _ in range(1000)]
    rows += [(v, s) for v in (-half, -1, 0, 1, half - 1) for s in range(1, shift_max + 1)]
    dut = RoundShiftClamp(value_bits=value_bits, shift_max=shift_max)
    check(dut, ("value", "shift"), {"zero": -3, "low": -100, "high": 99}, "out", rows, dut.model)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: RequantLane(acc_bits=23), "acc_bits must be in 24..32, not 23"),
        (lambda: RoundShiftClamp(value_bits=10, shift_max=5), "value_bits must be at least 11, not 10"),
        (lambda: RoundShiftClamp(value_bits=11, shift_max=64), "shift_max must be in 2..63, not 64"),
    ],
)
def test_arguments_are_checked(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        call()
