"""Powers of two and rounded factors against the integer reference."""

import math

import pytest
import torch

from nibblecore.arch import numerics
from nibblecore.qat.layers import round_factors, round_ratio
from nibblecore.qat.powers import exponent, power_of_two


def test_exponents_are_those_of_frexp() -> None:
    generator = torch.Generator().manual_seed(0)
    edges = [math.nextafter(8, 0), 8.0, math.nextafter(8, 9), *(math.ldexp(1, k) for k in range(-1022, 1024))]
    values = torch.rand(1000, generator=generator, dtype=torch.float64) * 100 + 1e-9
    x = torch.cat((values, torch.tensor(edges, dtype=torch.float64)))
    assert exponent(x).tolist() == [math.frexp(v)[1] for v in x.tolist()]
    e = torch.arange(-1022, 1024)
    assert power_of_two(e).tolist() == [math.ldexp(1.0, k) for k in e.tolist()]


@pytest.mark.parametrize("seed", range(3))
def test_factors_of_sums_are_those_of_the_integers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.exp2(torch.empty(300, 3).uniform_(-8, 4, generator=generator))
    # Powers of two, equal ones, and ratios whose rounding reaches the limit.
    edges = [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (1.0, 2**-30, 1.0), (8191.9, 1.0, 1.0), (1 - 2**-24, 1.0, 1.0),
             (2 - 2**-23, 2**-20, 1.0), (16383.0, 16383.5, 1.0)]  # fmt: skip
    for a, b, y in [*steps.tolist(), *edges]:
        k_a, k_b, n = numerics.add_factors(a, b, y)
        got = round_factors(torch.tensor(a).double(), b, torch.tensor(y).double())
        a = float(torch.tensor(a))
        want = (k_a / 2**n * y / a, k_b / 2**n * y / b)
        assert [float(g) for g in got] == pytest.approx(want, rel=1e-12, abs=0), f"seed {seed}: {a}, {b}, {y}"


def test_multipliers_are_those_of_the_integers() -> None:
    generator = torch.Generator().manual_seed(4)
    ratios = torch.exp2(torch.empty(500).uniform_(-30, 15, generator=generator)).double()
    ratios = torch.cat((ratios, 2.0 ** torch.arange(-20.0, 10).double()))
    for ratio, got in zip(ratios.tolist(), round_ratio(ratios).tolist(), strict=True):
        mult, shift = numerics.quantize_multiplier(ratio)
        assert got == mult / 2**shift, ratio
