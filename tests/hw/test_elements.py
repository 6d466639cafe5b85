# amaranth: UnusedElaboratable=no
"""Processing elements: arguments, the summation plan, and every element against its model in Amaranth's simulator."""

import functools
import itertools
import random
from collections import Counter

import numpy as np
import pytest
from amaranth.hdl import ClockDomain, Fragment, Module, signed
from amaranth.sim import Simulator

from nibblecore.arch.config import ELEMENT_WEIGHT_RANGE
from nibblecore_hw.core.elements import (
    ELEMENTS,
    BitplaneDot,
    DotElement,
    DspQuad,
    GenericDot,
    LutramDot,
    OneBankLutramDot,
    TableColumns,
    TableFill,
    make_element,
)
from nibblecore_hw.core.elements.ecp5 import plan_chains
from nibblecore_hw.core.elements.heap import (
    Base,
    Correction,
    Entry,
    One,
    Product,
    Wire,
    base_bits,
    negative_constant,
    plan_dot,
    plan_tables,
    second_operand,
    table_constant,
)
from nibblecore_hw.core.elements.lutram import table_entry
from nibblecore_sim.pysim import simulate

LANES = (1, 2, 4, 8, 16, 32, 64)


def elements(lanes):
    return [
        GenericDot(lanes=lanes),
        *(BitplaneDot(lanes=lanes, levels_per_stage=n) for n in (1, 2, 3, 4)),
        *(LutramDot(lanes=lanes, levels_per_stage=n) for n in (1, 2, 3) if lanes >= 4),
        *(OneBankLutramDot(lanes=lanes, levels_per_stage=n) for n in (1, 2, 3) if lanes >= 4),
    ]


def lanes_of(kind):
    """Lanes that elements of this kind may have."""
    return LANES[2:] if kind in ("lutram", "lutram2") else LANES


def element_id(element):
    if isinstance(element, BitplaneDot | LutramDot):
        (kind,) = (name for name, cls in ELEMENTS.items() if type(element) is cls)
        return f"{kind}-{element.lanes}-stages{element.plan.stages}"
    return f"generic-{element.lanes}"


# Arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ELEMENTS)
def test_lanes_outside_range(kind):
    lowest = lanes_of(kind)[0]
    for lanes in (0, 65, -4, lowest - 1):
        with pytest.raises(ValueError, match=rf"^lanes must be in {lowest}\.\.64, not {lanes}$"):
            ELEMENTS[kind](lanes=lanes)
    for lanes in (6, 48):
        with pytest.raises(ValueError, match=rf"^lanes must be a power of two, not {lanes}$"):
            ELEMENTS[kind](lanes=lanes)


@pytest.mark.parametrize("lanes", [4.0, "4", True])
def test_lanes_of_wrong_type(lanes):
    with pytest.raises(TypeError, match=rf"^lanes must be an integer, not {lanes!r}$"):
        GenericDot(lanes=lanes)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"^element must be one of generic, bitplane, lutram, lutram2, not 'dsp48'$"):
        make_element("dsp48", lanes=4)
    with pytest.raises(ValueError, match=r"^technology must be one of generic, ecp5, not 'ice40'$"):
        make_element("generic", lanes=4, technology="ice40")
    for make in (
        lambda: BitplaneDot(lanes=4, technology="ice40"),
        lambda: LutramDot(lanes=4, technology="ice40"),
        lambda: TableColumns(lanes=4, columns=1, technology="ice40"),
        lambda: TableFill(lanes=4, columns=1, technology="ice40"),
    ):
        with pytest.raises(ValueError, match=r"^technology must be one of generic, ecp5, not 'ice40'$"):
            make()


@pytest.mark.parametrize(("name", "low", "high"), [("levels_per_stage", 1, 4), ("chain_cells", 16, 192)])
@pytest.mark.parametrize("element", [BitplaneDot, LutramDot])
def test_numbers_of_elements_with_adders_to_plan(element, name, low, high):
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=rf"^{name} must be in {low}\.\.{high}, not {value}$"):
            element(lanes=4, **{name: value})
    with pytest.raises(TypeError, match=rf"^{name} must be an integer, not '2'$"):
        element(lanes=4, **{name: "2"})


@pytest.mark.parametrize("component", [TableColumns, TableFill])
def test_columns_and_banks_of_tables(component):
    for columns in (0, 65):
        with pytest.raises(ValueError, match=rf"^columns must be in 1\.\.64, not {columns}$"):
            component(lanes=4, columns=columns)
    for banks in (0, 3):
        with pytest.raises(ValueError, match=rf"^banks must be in 1\.\.2, not {banks}$"):
            component(lanes=4, columns=1, banks=banks)


def test_model_refuses_what_is_no_dot_product():
    with pytest.raises(ValueError, match=r"^activations and weights must be equally long, not 2 and 1$"):
        DotElement.model([1, 2], [3])
    with pytest.raises(ValueError, match=r"^activations\[1\] must be in -8\.\.7, not 8$"):
        DotElement.model([1, 8], [3, 3])
    with pytest.raises(ValueError, match=r"^weights\[0\] must be in -8\.\.7, not -9$"):
        DotElement.model([1, 1], [-9, 3])


def test_registry_knows_the_elements_of_the_architecture():
    ranges = {kind: element.WEIGHT_RANGE for kind, element in ELEMENTS.items()}
    assert {**ranges, "dsp": DspQuad.WEIGHT_RANGE} == ELEMENT_WEIGHT_RANGE


@pytest.mark.parametrize(("kind", "lanes"), [(kind, lanes) for kind in ELEMENTS for lanes in lanes_of(kind)])
def test_interface(kind, lanes):
    element = make_element(kind, lanes=lanes)
    Fragment.get(element, None)  # or Amaranth warns of an unused element
    assert type(element) is ELEMENTS[kind]
    load_cycles = {"lutram": 21, "lutram2": 13}.get(kind, 1)
    assert (element.lanes, element.pixels, element.load_cycles) == (lanes, 1, load_cycles)
    assert element.weight_range == ((-7, 7) if kind == "lutram" else (-8, 7))
    assert element.OVERLAPS is (kind != "lutram")
    # The sum's width holds the extremes and has no bit too many.
    bits = element.sum.shape().width
    assert element.sum.shape() == signed(bits)
    assert -(1 << bits - 1) <= DotElement.model([7] * lanes, [-8] * lanes)
    assert 1 << bits - 2 <= DotElement.model([-8] * lanes, [-8] * lanes) < 1 << bits - 1


def test_technology_changes_no_latency():
    for kind, levels in itertools.product((BitplaneDot, LutramDot), (1, 2)):
        latencies = {
            kind(lanes=8, technology=technology, levels_per_stage=levels).latency for technology in ("generic", "ecp5")
        }
        assert len(latencies) == 1


@pytest.mark.parametrize("kind", ELEMENTS)
def test_inverted_operands(kind):
    """``inverted``: operands come as the element stores them."""
    rng = random.Random(kind)
    element = make_element(kind, lanes=4, inverted=True)
    weights = [rng.randint(*element.weight_range) for _ in range(4)]
    words = [[rng.randint(-8, 7) for _ in range(4)] for _ in range(20)]

    def invert(values, polarity):
        return sum((v & 0xF ^ polarity) << 4 * n for n, v in enumerate(values))

    async def bench(ctx):
        ctx.set(element.weights.as_value(), invert(weights, element.WEIGHT_POLARITY))
        ctx.set(element.load_stb, 1)
        await ctx.tick()
        ctx.set(element.load_stb, 0)
        for _ in range(element.load_cycles - 1):
            await ctx.tick()
        ctx.set(element.swap_stb, 1)
        for word in words:
            ctx.set(element.activations.as_value(), invert(word, element.ACTIVATION_POLARITY))
            for _ in range(element.latency):
                await ctx.tick()
            assert ctx.get(element.sum) == element.model(word, weights)

    sim = Simulator(element)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


# The summation plan ----------------------------------------------------------------------------------------------


plan_one_bank = functools.partial(plan_tables, banks=1)
"""For tables of all signs."""

PLANS = [
    *(pytest.param(plan_dot, n, id=f"plan_dot-{n}") for n in LANES),
    *(pytest.param(plan_tables, n, id=f"plan_tables-{n}") for n in LANES if n >= 4),
    *(pytest.param(plan_one_bank, n, id=f"plan_one_bank-{n}") for n in LANES if n >= 4),
]


def leaves_of(make_plan, lanes):
    """What a plan has to add up, with the weights, and the number that is too much in it."""
    if make_plan is plan_dot:
        products = {Product(lane, k, j) for lane in range(lanes) for j in range(4) for k in range(4)}
        return {product: product.activation_bit + product.weight_bit for product in products}, negative_constant(lanes)
    places = list(itertools.product(range(lanes // 4), range(4)))
    leaves = {Entry(group, plane, bit): plane + bit for group, plane in places for bit in range(5)}
    banks = 1 if make_plan is plan_one_bank else 2
    if banks == 2:
        leaves |= {Correction(group, plane): plane for group, plane in places}
    return leaves | {Base(bit): bit for bit in range(base_bits(lanes, banks))}, table_constant(lanes, banks)


@pytest.mark.parametrize("levels_per_stage", [1, 2, 3, 4])
@pytest.mark.parametrize(("make_plan", "lanes"), PLANS)
def test_plan_adds_every_leaf_once(make_plan, lanes, levels_per_stage):
    """With correct adders the sum is then right for every input: each row hands on exactly the value it consumes."""
    plan = make_plan(lanes=lanes, levels_per_stage=levels_per_stage)
    leaves, surplus = leaves_of(make_plan, lanes)
    width = 8 + (lanes - 1).bit_length()
    used = Counter()
    ones = 0
    for row in plan.rows:
        assert len(row.left) == len(row.right)
        for bit, weight in row.inputs:
            used[bit] += 1
            match bit:
                case Product() | Entry() | Correction() | Base():
                    assert leaves[bit] == bit.weight == weight
                    assert plan.stage_of_level[row.level] == 0, "the activations are one cycle older behind a register"
                case Wire():
                    source = plan.rows[bit.row]
                    assert weight == source.weight + bit.bit
                    assert bit.bit < source.width
                    assert source.level < row.level
                case One():
                    ones += 1 << weight
        # The value fits the output, unless it is meant to be taken modulo the width of the sum.
        assert row.carry_out or row.is_gate or row.weight + row.cells == width
        assert not row.invert_top or row.weight + row.cells == width
        ones += row.invert_top << (width - 1)
    for n, wire in enumerate(plan.result):
        used[wire] += 1
        assert plan.rows[wire.row].weight + wire.bit == n
    assert len(plan.result) == width
    wires = {Wire(row.index, n) for row in plan.rows for n in range(row.width)}
    assert set(used) - {One()} == set(leaves) | wires
    assert all(count == 1 for bit, count in used.items() if bit != One())
    assert (ones + surplus) % (1 << width) == 0


def test_inverted_products_and_constant_make_the_signed_product():
    for a, w in itertools.product(range(-8, 8), repeat=2):
        products = [Product(0, k, j) for k in range(4) for j in range(4)]
        total = sum(((a >> p.activation_bit & w >> p.weight_bit & 1) ^ p.inverted) << p.weight for p in products)
        assert total - negative_constant(1) == a * w


def test_entries_corrections_and_base_make_the_signed_sum():
    """The coding of the tables, for all weights of a group and, plane by plane, all activation bits.

    If every plane gives half of ``sum_i w_i * s_i``, less half of its parity, the planes and the base add up to the dot
    product: the parities cancel.
    """
    grid = np.arange(-8, 8)
    weights = np.stack(np.meshgrid(grid, grid, grid, grid, indexing="ij"), -1).reshape(-1, 4).T
    total = weights.sum(0)
    odd = total & 1
    for bits in itertools.product((0, 1), repeat=4):
        index = sum((bits[i] ^ bits[3]) << i for i in range(3))
        entry = table_entry(weights, index)
        assert entry.min() >= 0
        assert entry.max() <= 31
        signed_sum = sum(w * (2 * b - 1) for w, b in zip(weights, bits, strict=True))
        for plane, sign in ((0, 1 - bits[3]), (3, bits[3])):
            leaves = (31 - entry if sign else entry) - 16 + (sign | odd if plane == 3 else sign & 1 - odd)
            assert (2 * leaves == (odd - signed_sum if plane == 3 else signed_sum - odd)).all()
    # 1 + 2 + 4 - 8 halves of the parity, with that of plane 3 counted the other way round, and that of the base.
    base = 16 - (total + odd) // 2
    assert (base >= 0).all()
    for lanes in (4, 64):
        assert int(base.max()) * (lanes // 4) < 1 << base_bits(lanes, 2)


def test_entries_of_all_signs_and_base_make_the_signed_sum():
    """The same for one bank, whose entries need no sign, no parity and no correction, with weights of -7..7."""
    grid = np.arange(-7, 8)
    weights = np.stack(np.meshgrid(grid, grid, grid, grid, indexing="ij"), -1).reshape(-1, 4).T
    total = weights.sum(0)
    odd = total & 1
    for bits in itertools.product((0, 1), repeat=4):
        entry = table_entry(weights, sum(b << i for i, b in enumerate(bits)), banks=1)
        assert entry.min() >= 0
        assert entry.max() <= 31
        signed_sum = sum(w * (2 * b - 1) for w, b in zip(weights, bits, strict=True))
        assert (2 * (16 - entry) + odd == signed_sum).all()
    # 2 * sum_i w_i * a_i = Q_0 + 2 * Q_1 + 4 * Q_2 - 8 * Q_3 - S; three planes enter as 31 - E, the fourth one as E.
    base = 31 - table_entry(weights, 0, banks=1)
    surplus = 31 * (1 + 2 + 4) + base
    assert (2 * (surplus - table_constant(4, 1)) == (1 + 2 + 4 - 8) * (32 + odd) - total).all()
    assert (base >= 0).all()
    for lanes in (4, 64):
        assert int(base.max()) * (lanes // 4) < 1 << base_bits(lanes, 1)


@pytest.mark.parametrize("lanes", [4, 8, 64])
@pytest.mark.parametrize("columns", [1, 2, 4, 8])
@pytest.mark.parametrize("banks", [1, 2])
def test_fill(lanes, columns, banks):
    """Entries, parities and bases of blocks that follow each other as closely as they may, or with pauses."""
    rng = random.Random(f"{lanes} {columns}")
    fill = TableFill(lanes=lanes, columns=columns, blocks=8, banks=banks)
    count = 16 // banks
    interval = max(1, count // columns)
    low = -8 if banks == 2 else -7
    blocks = [[random_word(rng, lanes, low) for _ in range(columns)] for _ in range(6)]
    blocks[0] = [[rng.choice((low, 7))] * lanes for _ in range(columns)]
    cycle, words, last = 0, {}, []
    for number, block in enumerate(blocks):
        for column, word in enumerate(block):
            words[cycle] = (number, column, word)
            last.append(cycle) if column == columns - 1 else None
            cycle += interval + (rng.randrange(4) if number > 2 else 0)
    seen = {}

    async def bench(ctx):
        for now in range(cycle + fill.latency + 2):
            number, column, word = words.get(now, (rng.randrange(8), rng.randrange(columns), random_word(rng, lanes)))
            ctx.set(fill.load_stb, now in words)
            ctx.set(fill.block, number)
            ctx.set(fill.column, column)
            ctx.set(fill.weights, word)
            _, _, stb, base_stb, o = await ctx.tick().sample(fill.o_stb, fill.base_stb, fill.o)
            assert base_stb == (stb if o.index == 4 else 0)
            if stb:
                entries = [[o.entries[group][n] for n in range(columns)] for group in range(lanes // 4)]
                more = (o.bank, [o.odd[n] for n in range(columns)]) if banks == 2 else (1, None)
                seen[now] = (stb, o.index, entries, list(o.base), *more)

    simulate(fill, bench)
    assert list(seen) == [end + 5 + index for end in last for index in range(count)]
    assert list(seen)[count - 1] == last[0] + fill.latency
    for number, (block, end) in enumerate(zip(blocks, last, strict=True)):
        groups = [[word[n : n + 4] for word in block] for n in range(0, lanes, 4)]
        for index in range(count):
            stb, place, entries, base, bank, odd = seen[end + 5 + index]
            assert (stb, place, bank) == (1 << number, index, 1)
            assert entries == [[table_entry(weights, index, banks=banks) for weights in group] for group in groups]
            if index == 4:
                sums = [[sum(weights) for weights in column] for column in zip(*groups, strict=True)]
                assert odd in (None, [sum((total & 1) << g for g, total in enumerate(column)) for column in sums])
                assert base == [sum(16 - (banks == 1) + -total // 2 for total in column) for column in sums]


@pytest.mark.parametrize("chain_cells", [16, 48, 192])
@pytest.mark.parametrize(("make_plan", "lanes"), PLANS)
def test_chains_hold_every_row_and_never_feed_themselves(make_plan, lanes, chain_cells):
    plan = make_plan(lanes=lanes, levels_per_stage=2)
    chains = plan_chains(plan, chain_cells=chain_cells)
    assert sorted(row.index for chain in chains for row in chain) == [row.index for row in plan.rows if not row.is_gate]
    chain_of = {row.index: n for n, chain in enumerate(chains) for row in chain}
    for chain in chains:
        assert sum(row.cells + 1 for row in chain) <= chain_cells
        assert len({row.level % 2 for row in chain}) == 1
        for row in chain:
            sources = [plan.rows[bit.row] for bit, _ in row.inputs if isinstance(bit, Wire)]
            unregistered = [s for s in sources if plan.stage_of_level[s.level] == plan.stage_of_level[row.level]]
            assert all(chain_of.get(source.index) != chain_of[row.index] for source in unregistered)
            # What the carry cell can do at all.
            assert all(second_operand(bit) for bit in row.right if bit is not None)


@pytest.mark.parametrize(("lanes", "cells", "registers"), [(4, 18.5, 12), (16, 19.5, 8.6), (64, 19.5, 7.5)])
def test_plan_stays_cheap(lanes, cells, registers):
    """Per lane. (16 would be the bare minimum: one adder cell for every bit product that disappears.)"""
    plan = plan_dot(lanes=lanes, levels_per_stage=2)
    assert plan.adder_cells <= cells * lanes
    assert plan.register_bits <= registers * lanes


@pytest.mark.parametrize(
    ("make_plan", "lanes", "cells", "registers"),
    [
        (plan_tables, 4, 7.5, 5.6),
        (plan_tables, 16, 7.1, 4.4),
        (plan_tables, 64, 7.3, 3.3),
        # No corrections: where there are many lanes, an adder cell less per lane, or a stage of registers.
        (plan_one_bank, 4, 6.8, 6.1),
        (plan_one_bank, 16, 6.5, 2.6),
        (plan_one_bank, 64, 6.2, 2.4),
    ],
)
def test_plan_for_tables_stays_cheap(make_plan, lanes, cells, registers):
    plan = make_plan(lanes=lanes, levels_per_stage=2)
    assert plan.adder_cells <= cells * lanes
    assert plan.register_bits <= registers * lanes


# Elements against their model ------------------------------------------------------------------------------------


def spaced(element, stream):
    """The stream with pauses where a strobe comes sooner after a load than the element allows."""
    since = element.load_cycles
    for activations, weights, load, swap in stream:
        while (load or swap) and since < element.load_cycles:
            yield activations, weights, False, False
            since += 1
        yield activations, weights, load, swap
        since = 1 if load else since + 1


def check_stream(element, stream, note):
    """Feed (activations, weights, load, swap) per cycle, and compare every sum with the model, ``latency`` later.

    Except where the active weights are those that are loaded. Weights outside the element's range become the lowest.
    """
    active = shadow = [0] * element.lanes  # what the weights are after power-up
    expected, sums = [], []

    async def bench(ctx):
        nonlocal active, shadow
        for activations, weights, load, swap in spaced(element, stream):
            weights = [max(weight, element.weight_range[0]) for weight in weights]
            ctx.set(element.activations, activations)
            ctx.set(element.weights, weights)
            ctx.set(element.load_stb, load)
            ctx.set(element.swap_stb, swap)
            if swap:
                active = shadow
            expected.append(None if active is None else element.model(activations, active))
            if load:
                shadow = weights
                active = active if element.OVERLAPS else None
            await ctx.tick()
            sums.append(ctx.get(element.sum))

    simulator = Simulator(element)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.run()
    delay = element.latency - 1  # sums[n] is read one cycle after activations[n]
    assert len(sums) > 2 * delay
    for n, (got, want) in enumerate(zip(sums[delay:], expected, strict=False)):
        assert want is None or got == want, f"{note}: sum {n} is {got}, not {want}"
    assert sum(want is not None for want in expected) >= sum(swap for *_, swap in stream) > 0


def random_word(rng, lanes, low=-8):
    """Uniform nibbles, or extremes only, or one extreme in all lanes, or a single lane that is not zero."""
    match rng.randrange(4):
        case 0:
            return [rng.choice((low, 7)) for _ in range(lanes)]
        case 1:
            return [rng.choice((low, -1, 0, 7))] * lanes
        case 2:
            lane, value = rng.randrange(lanes), rng.randint(low, 7)
            return [value if n == lane else 0 for n in range(lanes)]
        case _:
            return [rng.randint(low, 7) for _ in range(lanes)]


@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("element", [e for lanes in LANES for e in elements(lanes)], ids=element_id)
def test_random_streams(element, seed):
    rng = random.Random(seed)
    often = [rng.choice((0.1, 0.5, 0.9)) for _ in range(8)]  # strobes are rare in one part and dense in the next
    stream = [
        (random_word(rng, element.lanes), random_word(rng, element.lanes), rng.random() < p, rng.random() < p)
        for p in often
        for _ in range(50)
    ]
    assert any(load and swap for _, _, load, swap in stream)
    check_stream(element, stream, f"seed {seed}")


@pytest.mark.parametrize("element", elements(16), ids=element_id)
def test_extremes(element):
    """All lanes at the same two extremes, every pair: the highest and the lowest sum are among them."""
    stream = []
    for a, w in itertools.product((-8, -7, -1, 0, 7), repeat=2):
        stream += [([0] * 16, [w] * 16, True, False), ([a] * 16, [0] * 16, False, True)]
    stream += [([0] * 16, [0] * 16, False, False)] * element.latency
    check_stream(element, stream, "extremes")


@pytest.mark.parametrize("element", elements(4), ids=element_id)
def test_swap_meets_its_own_activations(element):
    first, second, third = [1, 2, 3, 4], [-8, 7, -1, 0], [5, 5, 5, 5]
    ones = [1, 1, 1, 1]
    stream = [
        (ones, first, True, False),
        (ones, second, True, True),  # swaps first in, loads second
        (ones, third, False, False),  # weights without a strobe are not looked at
        (ones, third, False, True),  # second
        (ones, third, False, True),  # second again: a swap leaves the shadow as it is
        (ones, third, True, True),  # still second; third is loaded
        (ones, first, False, True),  # third
        *[(ones, first, False, False)] * (element.latency + 8),
    ]
    check_stream(element, stream, "swap")


@pytest.mark.parametrize("element", elements(1), ids=element_id)
def test_every_product(element):
    stream = [([0], [-8], True, False)]
    for w in range(-8, 8):
        stream += [([a], [min(w + 1, 7)], a == 7, a == -8) for a in range(-8, 8)]
    stream += [([0], [0], False, False)] * element.latency
    check_stream(element, stream, "all pairs")


@pytest.mark.parametrize("element", [GenericDot(lanes=2), BitplaneDot(lanes=2)], ids=element_id)
def test_every_pair_of_weights(element):
    """Two lanes: every pair of weights with activations that together show each weight's four bits."""
    stream = []
    pairs = list(itertools.product(range(-8, 8), repeat=2))
    for n, weights in enumerate([*pairs, (0, 0)]):
        for step, activations in enumerate([(1, 0), (0, 1), (-8, -8), (7, -8), (-8, 7), (7, 7), (-1, 1)]):
            stream.append((list(activations), list(weights), step == 6, step == 0 and n > 0))
    check_stream(element, stream, "weight pairs")


@pytest.mark.parametrize(
    "element",
    [GenericDot(lanes=2), BitplaneDot(lanes=2), LutramDot(lanes=4), OneBankLutramDot(lanes=4)],
    ids=element_id,
)
def test_reset_keeps_the_weights(element):
    top = Module()
    top.domains.sync = domain = ClockDomain()
    top.submodules.element = element
    sums = []

    async def bench(ctx):
        ctx.set(element.weights, [3, -5] + [1] * (element.lanes - 2))
        ctx.set(element.load_stb, 1)
        await ctx.tick()
        ctx.set(element.load_stb, 0)
        for _ in range(element.load_cycles - 1):
            await ctx.tick()
        ctx.set(element.swap_stb, 1)
        ctx.set(element.activations, [7, -8] + [0] * (element.lanes - 2))
        await ctx.tick()
        ctx.set(element.swap_stb, 0)
        ctx.set(domain.rst, 1)
        await ctx.tick()
        ctx.set(domain.rst, 0)
        for _ in range(element.latency):
            await ctx.tick()
        sums.append(ctx.get(element.sum))

    simulator = Simulator(top)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.run()
    assert sums == [3 * 7 + 5 * 8]
