# amaranth: UnusedElaboratable=no
"""A lane of the post unit, after synthesis, against the arithmetic of nibblecore.arch.numerics."""

import itertools
import random
from typing import Any

import pytest

from nibblecore.arch import numerics
from nibblecore_hw.core.requantize import RequantLane

pytestmark = pytest.mark.cosim

ACC_BITS = 24


def as_code(word: int) -> int:
    return (word & 255) - 256 * (word >> 7 & 1)


def split(total: int, rng: random.Random) -> tuple[int, int]:
    """A total of 32 bits as an accumulator of 24 and a bias of 32 bits."""
    half = 1 << ACC_BITS - 1
    low, high = max(-half, total - (1 << 31) + 1), min(half - 1, total + (1 << 31))
    acc = rng.choice((low, high, rng.randint(low, high)))
    return acc, total - acc


def records(rng: random.Random) -> list[tuple[int, int, int, int]]:
    """(acc, bias, mult, shift): ties of every shift with either sign of mult, extremes, and random ones in range."""
    totals = []
    for shift in range(numerics.SHIFT_MIN, numerics.SHIFT_MAX + 1):
        for power, half_units in itertools.product(range(0, 17, 4), (1, -1, 3, -3, 253, -257)):
            if power < shift and numerics.signed_fits(half_units << shift - 1 - power, 31):
                for off, sign in itertools.product((-1, 0, 1), (1, -1)):
                    totals.append(((half_units << shift - 1 - power) + off, sign << power, shift))
        for total in (-(1 << 31), -(1 << 31) + 1, -1, 0, 1, (1 << 31) - 1):
            totals += [(total, mult, shift) for mult in (-(1 << 17), -1, 0, 1, (1 << 17) - 1)]
    found = [(*split(total, rng), mult, shift) for total, mult, shift in totals]
    for _ in range(1500):
        acc, mult = rng.randint(-(1 << 23), (1 << 23) - 1) >> rng.randrange(24), rng.randint(-(1 << 17), (1 << 17) - 1)
        bias = numerics.clamp(rng.randint(-(1 << 31), (1 << 31) - 1) >> rng.randrange(32), -(1 << 30), (1 << 30) - 1)
        near = max(1, ((acc + bias) * mult).bit_length() - 8)
        found.append((acc, bias, mult, min(numerics.SHIFT_MAX, rng.choice((near, near + 1, rng.randint(1, 47))))))
    assert {shift for *_, shift in found} == set(range(numerics.SHIFT_MIN, numerics.SHIFT_MAX + 1))
    assert any((a + b) * m % (1 << s) == 1 << s - 1 and m < 0 for a, b, m, s in found)
    return found


def test_requantizer(bench: Any) -> None:
    rng = random.Random(1)
    rows: list[dict[str, int]] = []
    wanted: list[tuple[int, dict[str, int]]] = []
    behind = RequantLane.RECORD_LATENCY
    for zero, low, high in ((0, -128, 127), (3, -8, 7), (-128, -128, 127), (127, 0, 0)):
        constant = {"zero": zero, "low": low, "high": high}
        found = records(rng)
        # Zero point and clamp have to stand until the last code is there.
        part = [{"shift": 1, **constant} for _ in range(len(found) + RequantLane.LATENCY)]
        for n, (acc, bias, mult, shift) in enumerate(found):
            part[n]["acc"] = acc
            part[n + behind] |= {"bias": bias, "mult": mult, "shift": shift}
            wanted.append((len(rows) + n, {"acc": acc, "bias": bias, "mult": mult, "shift": shift, **constant}))
        rows += part
    outputs = bench.play("requantizer", [*rows, {}])
    codes = set()
    for row, arguments in wanted:
        want, got = RequantLane.model(**arguments), as_code(outputs[row + RequantLane.LATENCY]["code"])
        assert got == want, f"{arguments} gives {got}, not {want}"
        codes.add(want)
    assert {-128, 127, -8, 7} < codes
    assert len(codes) > 240


def test_second_pass_adds_a_stored_code(bench: Any) -> None:
    rng = random.Random(2)
    second, latency = RequantLane.AGAIN_LATENCY, RequantLane.AGAIN_LATENCY + RequantLane.LATENCY
    rows: list[dict[str, int]] = []
    wanted = []
    for n, extreme in itertools.product(
        range(numerics.ADD_SHIFT_MIN, numerics.ADD_SHIFT_MAX + 1), (-32768, 32767, 2, None)
    ):
        zero_a, zero_b, zero = rng.choice((-128, 0, 127)), rng.randint(-128, 127), rng.randint(-128, 127)
        k_a = rng.randint(-32768, 32767) if extreme is None else extreme
        k_b = rng.choice((32767, -32768, 1 << min(n - 1, 14), rng.randint(-32768, 32767)))
        low, high = rng.choice(((-128, 127), (-8, 7)))
        pairs = [*itertools.product((-128, -1, 0, 127), repeat=2)]
        pairs += [(rng.randint(-128, 127), rng.randint(-128, 127)) for _ in range(12)]
        stand = {"add": 1, "zero": zero, "low": low, "high": high, "zero_b": zero_b, "first_low": -128 - zero_a,
                 "first_high": 127 - zero_a}  # fmt: skip
        # What nobody looks at is garbage. Accumulators in even cycles, second passes in odd ones.
        part = [
            {**stand, "acc": rng.randint(-(1 << 23), (1 << 23) - 1), "b": rng.randint(-128, 127), "shift": 1,
             "bias": 0, "mult": 2, "again": cycle % 2 == second % 2}
            for cycle in range(2 * len(pairs) + latency)
        ]  # fmt: skip
        for cycle in range(second + 1, len(part), 2):
            part[cycle] |= {"bias": (k_b & 0xFFFF) | (k_a & 0xFFFF) << 16, "shift": n + 16, "mult": rng.randint(0, 99)}
        for place, (a, b) in enumerate(pairs):
            part[2 * place]["acc"] = a - zero_a
            part[2 * place + second + 1]["b"] = b
            wanted.append((len(rows) + 2 * place + latency, RequantLane.model_add(
                a, b, zero_a=zero_a, zero_b=zero_b, k_a=k_a, k_b=k_b, n=n, zero=zero, low=low, high=high
            )))  # fmt: skip
        rows += part
        rows += [part[-1]] * (len(part) % 2)
    outputs = bench.play("requantizer", [*rows, {}])
    for row, want in wanted:
        got = as_code(outputs[row]["code"])
        assert got == want, f"cycle {row}: {got}, not {want}"
    assert len({want for _, want in wanted}) > 200
