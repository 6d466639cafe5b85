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
    wanted: list[tuple[int, int]] = []
    once = dict.fromkeys(("add", "again", "b", "first_low", "first_high", "zero_b"), 0)  # one pass through the lane
    for zero, low, high in ((0, -128, 127), (3, -8, 7), (-128, -128, 127), (127, 0, 0)):
        constant = {"zero": zero, "low": low, "high": high}
        for acc, bias, mult, shift in records(rng):
            wanted.append((len(rows), RequantLane.model(acc=acc, bias=bias, mult=mult, shift=shift, **constant)))
            rows.append({"acc": acc, "bias": bias, "mult": mult, "shift": shift, **once, **constant})
        # These have to stand until the code is there.
        rows += [{"acc": 0, "bias": 0, "mult": 0, "shift": 1, **once, **constant}] * RequantLane.LATENCY
    # Records follow their accumulators.
    late = [row | {k: before[k] for k in ("bias", "mult", "shift")} for before, row in itertools.pairwise(rows)]
    assert RequantLane.RECORD_LATENCY == 1
    outputs = bench.play("requantizer", [rows[0], *late])
    for row, want in wanted:
        got = as_code(outputs[row + RequantLane.LATENCY]["code"])
        assert got == want, f"{rows[row]} gives {got}, not {want}"
    codes = {want for _, want in wanted}
    assert {-128, 127, -8, 7} < codes
    assert len(codes) > 240
