# amaranth: UnusedElaboratable=no
"""Four products per multiplier: the packing for all operands, the trees behind it, and who hands operands to them."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from amaranth.hdl import Module, Signal, signed
from amaranth.sim import Simulator

from nibblecore_hw.core.elements import DspQuad
from nibblecore_hw.core.elements.dsp import FIELD_BITS, FIELDS, PRODUCT_BITS, PackedMultiplier, ProductTrees, decrement
from nibblecore_sim.pysim import simulate

ACTIVATIONS, WEIGHTS = range(-8, 8), range(-7, 8)


def test_every_product_comes_back_from_its_field() -> None:
    """All 16 * 16 * 15 * 15 operands: the field's bits and the one below are the product."""
    first, second, even, odd = np.meshgrid(ACTIVATIONS, ACTIVATIONS, WEIGHTS, WEIGHTS, indexing="ij")
    product = (first + (second << 7)) * (even + (odd << 14)) & ((1 << PRODUCT_BITS) - 1)
    wanted = (first * even, second * even, first * odd, second * odd)
    for field, want in zip(range(FIELDS), wanted, strict=True):
        bits = product >> FIELD_BITS * field & 127
        # What the trees add up: the highest bit inverted counts 64 too much.
        value = (bits ^ 64) - 64 + (product >> FIELD_BITS * field - 1 & 1 if field else 0)
        assert (value == want).all(), field
    a, w = (-8, 7), (-7, 3)
    assert PackedMultiplier.model(a, w) == product[a[0] + 8, a[1] + 8, w[0] + 7, w[1] + 7]


def test_a_bit_less() -> None:
    """The operands' own correction, for all of them: 5 bits, of which weights need only the lower four."""
    m = Module()
    value, by, difference = Signal(signed(4)), Signal(), Signal(signed(5))
    m.d.comb += difference.eq(decrement(value, by))

    async def bench(ctx: Any) -> None:
        for number, less in itertools.product(ACTIVATIONS, (0, 1)):
            ctx.set(value, number)
            ctx.set(by, less)
            assert ctx.get(difference) == number - less

    simulator = Simulator(m)
    simulator.add_testbench(bench)
    simulator.run()


def test_multiplier() -> None:
    """All activations with the corners of weights, and all weights with the corners of activations."""
    corners = [-7, -1, 0, 1, 7]
    operands = list(itertools.product(ACTIVATIONS, ACTIVATIONS, corners, corners))
    operands += itertools.product([-8, *corners], [-8, *corners], WEIGHTS, WEIGHTS)
    random.Random(1).shuffle(operands)
    dut = PackedMultiplier()
    seen = []

    async def bench(ctx: Any) -> None:
        for first, second, even, odd in operands + operands[: dut.LATENCY]:
            ctx.set(dut.pair, {"first": first, "second": second - (first < 0)})
            ctx.set(dut.even, even)
            ctx.set(dut.odd, odd - (even < 0))
            seen.append((await ctx.tick().sample(dut.product))[2])

    simulate(dut, bench, max_cycles=20_000)
    for (first, second, even, odd), product in zip(operands, seen[dut.LATENCY :], strict=True):
        assert product == dut.model((first, second), (even, odd)), (first, second, even, odd)


@pytest.mark.parametrize("lanes", [2, 4, 16, 64])
def test_trees(lanes: int) -> None:
    """Pairs back to back and with cycles between them, extremes among them."""
    rng = random.Random(lanes)
    dut = ProductTrees(lanes=lanes)
    products: list[list[int]] = []
    selects: list[int] = []
    wanted: dict[tuple[int, int], int] = {}  # of column and cycle
    for n in range(60):
        if n % 3 == 0 and rng.random() < 0.7:
            products.append([rng.getrandbits(PRODUCT_BITS) for _ in range(lanes)])
            selects.append(0)
        extreme = rng.random() < 0.4
        pixels = [[rng.choice((-8, 7)) if extreme else rng.randint(-8, 7) for _ in range(lanes)] for _ in range(2)]
        if extreme and rng.random() < 0.5:
            pixels = [[-8] * lanes] * 2
        for select in range(2):
            weights = [[rng.choice((-7, 7)) if extreme else rng.randint(-7, 7) for _ in range(lanes)] for _ in range(2)]
            if pixels[0][0] == -8 and pixels[0] == pixels[1]:
                weights = [[rng.choice((-7, 7))] * lanes] * 2
            operands = zip(zip(*pixels, strict=True), zip(*weights, strict=True), strict=True)
            products.append([PackedMultiplier.model(*pair) for pair in operands])
            selects.append(select)
            for odd, pixel in itertools.product(range(2), range(2)):
                key = 2 * select + odd, len(products) - 1 + dut.latency + pixel
                wanted[key] = sum(a * w for a, w in zip(pixels[pixel], weights[odd], strict=True))
    assert {-7 * 8 * lanes, 7 * 8 * lanes} <= set(wanted.values())
    seen: list[list[int]] = []

    async def bench(ctx: Any) -> None:
        for cycle in range(len(products) + dut.latency + 2):
            ctx.set(dut.select, selects[cycle] if cycle < len(selects) else 0)
            for lane in range(lanes):
                ctx.set(dut.products[lane], products[cycle][lane] if cycle < len(products) else 0)
            _, _, *sums = await ctx.tick().sample(*(dut.sums[column] for column in range(4)))
            seen.append(sums)

    simulate(dut, bench)
    for (column, cycle), want in wanted.items():
        assert seen[cycle][column] == want, f"lanes={lanes}, column {column}, cycle {cycle}"


def test_a_reset_changes_no_weight() -> None:
    dut = DspQuad(lanes=2)
    seen: list[list[int]] = []

    async def bench(ctx: Any) -> None:
        for column, word in enumerate(([3, -5], [4, 6], [-1, -7], [0, 1])):
            ctx.set(dut.weights, word)
            ctx.set(dut.load_column, column)
            ctx.set(dut.load_stb, 1)
            ctx.set(dut.load_bank, 1)
            await ctx.tick()
        ctx.set(dut.load_stb, 0)
        # 3 and 4 times 7 and -8, less what was taken for the sign of the first.
        ctx.set(dut.pairs, [{"first": 7, "second": -8}, {"first": -8, "second": 6}])
        ctx.set(dut.bank, 1)
        for cycle in range(dut.latency + 3):
            ctx.set(dut.select, cycle == 1)
            _, _, *sums = await ctx.tick().sample(*(dut.sums[column] for column in range(4)))
            seen.append(sums)

    simulate(dut, bench)
    assert [seen[dut.latency][0], seen[dut.latency + 1][0]] == [3 * 7 + 5 * 8, 3 * -8 - 5 * 7]


def test_arguments() -> None:
    for kind in (ProductTrees, DspQuad):
        with pytest.raises(ValueError, match=r"^lanes must be in 2\.\.64, not 1$"):
            kind(lanes=1)
        with pytest.raises(ValueError, match=r"^lanes must be a power of two, not 12$"):
            kind(lanes=12)
        with pytest.raises(TypeError, match=r"^lanes must be an integer, not '4'$"):
            kind(lanes="4")
        with pytest.raises(ValueError, match=r"^chain_cells must be in 16\.\.192, not 8$"):
            kind(lanes=4, chain_cells=8)
        with pytest.raises(ValueError, match=r"^technology must be one of generic, ecp5, not 'gowin'$"):
            kind(lanes=4, technology="gowin")
    with pytest.raises(ValueError, match=r"^technology must be one of generic, ecp5, not 'gowin'$"):
        PackedMultiplier(technology="gowin")
