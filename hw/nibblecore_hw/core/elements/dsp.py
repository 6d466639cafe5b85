# amaranth: UnusedElaboratable=no
"""The element that gets four exact products from one multiplier: two pixels times two columns.

Two activations and two weights make the factors ``a0 + a1 * 2**7`` and ``w0 + w1 * 2**14``, so that the product holds
``a0*w0``, ``a1*w0``, ``a0*w1`` and ``a1*w1`` at bits 0, 7, 14 and 21. With weights in -7..7 each fits its 7 bits; a
negative one borrows 1 from the field above, which is given back by adding the bit below a field to it::

    v[k] = signed(p[7*k : 7*k + 7]) + p[7*k - 1]

That bit is the carry of an adder that is there anyway. (Four products at once: Xilinx WP521 and Sommer et al.,
"DSP-Packing", arXiv 2203.11028, for multipliers that are wider on one side.)

The array takes one pixel per cycle, so two consecutive pixels make a pair, which a multiplier sees for two cycles: with
the weights of one pair of columns, then with those of another. That is a *quad*: four columns on ``lanes`` multipliers.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ...technology import check_technology
from ..multiply import Multiplier
from .base import check_int
from .chains import Addition, Choice, add_in_chains

FIELD_BITS = 7
"""Bits of a product of -8..7 and -7..7."""
FIELDS = 4
PRODUCT_BITS = FIELD_BITS * FIELDS

PAIR = data.StructLayout({"first": signed(4), "second": signed(5)})
"""Two activations as the multiplier's left factor ``first + second * 2**7``: ``second`` is lower by 1 than the
activation where ``first``, extended by its sign, takes 1 from it."""


def check_lanes(lanes: int) -> int:
    """``lanes``, if it is a power of two in 2..64."""
    check_int("lanes", lanes, 2, 64)
    if lanes & (lanes - 1):
        raise ValueError(f"lanes must be a power of two, not {lanes}")
    return lanes


def decrement(value: Value, by: Value) -> Value:
    """The ``signed(5)`` difference of a ``signed(4)`` and one bit, in LUTs: no carry chain is worth its ends here."""
    borrows = [by]
    for n in range(3):
        borrows.append(borrows[-1] & ~value[n])
    return Cat(*(value[n] ^ borrows[n] for n in range(4)), value[3] | borrows[3]).as_signed()


class PackedMultiplier(wiring.Component):
    """Four products of two activations and two weights.

    ``product`` is, :attr:`LATENCY` cycles after the operands, ``(first + second * 2**7) * (even + odd * 2**14)``, where
    ``second`` and ``odd`` are less by 1 than the second activation and weight where the first ones are negative: that
    is what their fields take from those above.

    Parameters
    ----------
    technology : {"generic", "ecp5"}
        ``ecp5`` instantiates a ``MULT18X18D`` with the registers that it has.

    Members
    -------
    pair : In(PAIR)
    even, odd : In(signed(4))
        ``even`` in -7..7; ``odd``, in -8..7, is the other weight less 1 where ``even`` is negative.
    product : Out(28)

    Raises
    ------
    ValueError
        If the technology is unknown.
    """

    LATENCY: ClassVar[int] = Multiplier.LATENCY

    pair: data.View
    even: Signal
    odd: Signal
    product: Signal

    def __init__(self, *, technology: str = "generic") -> None:
        self._technology = check_technology(technology)
        super().__init__({"pair": In(PAIR), "even": In(signed(4)), "odd": In(signed(4)), "product": Out(PRODUCT_BITS)})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        # Each field of 7 or 14 bits takes the sign of what stands in it; the field above has been corrected for that.
        m.submodules.multiplier = multiplier = Multiplier(product_bits=PRODUCT_BITS, technology=self._technology)
        m.d.comb += [
            multiplier.left.eq(Cat(self.pair.first, self.pair.first[3].replicate(3), self.pair.second).as_signed()),
            multiplier.right.eq(Cat(self.even, self.even[3].replicate(10), self.odd).as_signed()),
            self.product.eq(multiplier.product),
        ]
        return m

    @staticmethod
    def model(activations: Sequence[int], weights: Sequence[int]) -> int:
        """The 28 bits for two activations in -8..7 and two weights in -7..7."""
        (first, second), (even, odd) = activations, weights
        return (first + (second << 7)) * (even + (odd << 14)) % (1 << PRODUCT_BITS)


class ProductTrees(wiring.Component):
    """Adds up packed products, one tree per field, and hands each pixel's sums to their columns in turn.

    In a cycle with ``select`` 0, ``products`` are those of a pair of pixels and columns 0 and 1; with ``select`` 1, of
    the same pair, one cycle later, and columns 2 and 3. ``sums`` of the first pixel come :attr:`latency` cycles after
    the products of their columns, those of the second pixel in the cycle after. So columns 2 and 3 are a cycle behind
    columns 0 and 1, and all get a sum per cycle. Between two pairs there may be any number of cycles with ``select`` 0,
    whose products become sums that mean nothing.

    Parameters
    ----------
    lanes : int
        Multipliers, a power of two in 2..64.
    technology : {"generic", "ecp5"}
        ``ecp5`` instantiates carry cells, several adders in one chain.
    chain_cells : int
        Longest carry chain in half-cells, 16..192; ignored by ``generic``.

    Members
    -------
    products : In(ArrayLayout(28, lanes))
    select : In(1)
    sums : Out(ArrayLayout(signed(8 + log2(lanes)), 4))

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """

    products: data.View
    select: Signal
    sums: data.View

    def __init__(self, *, lanes: int, technology: str = "generic", chain_cells: int = 64) -> None:
        self._lanes = check_lanes(lanes)
        self._technology = check_technology(technology)
        check_int("chain_cells", chain_cells, 16, 192)
        self._chain_cells = chain_cells
        self._levels = lanes.bit_length() - 1
        super().__init__(
            {
                "products": In(data.ArrayLayout(unsigned(PRODUCT_BITS), lanes)),
                "select": In(1),
                "sums": Out(data.ArrayLayout(signed(8 + self._levels), 4)),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from the products to the sums of the first pixel."""
        return self._levels + 1

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        levels, width = self._levels, FIELD_BITS + self._levels
        operations: list[Addition | Choice] = []

        def delayed(value: Value, cycles: int, name: str) -> Value:
            for n in range(cycles):
                register = Signal(value.shape(), name=f"{name}_{n}", reset_less=True)
                m.d.sync += register.eq(value)
                value = register
            return value

        # A signed field with its highest bit inverted is an unsigned number, larger by 64. So 64 * lanes too much reach
        # the root, where they are undone the same way: as |v| <= 56, inverting the root's highest bit is enough.
        # Every adder but those of field 0 has a bit to carry in; one bit of each tree is left over for the end.
        @functools.cache
        def carry(field: int, lane: int, cycles: int) -> Value:
            if not field:
                return Const(0, 1)
            return delayed(self.products[lane][FIELD_BITS * field - 1], cycles, f"carry{field}_{lane}")

        def add(low: int, high: int) -> list[Value]:
            """Registered sums of each field over some lanes."""
            if high - low == 1:
                return [self.products[low][FIELD_BITS * k : FIELD_BITS * (k + 1)] for k in range(FIELDS)]
            middle = (low + high) // 2
            lefts, rights = add(low, middle), add(middle, high)
            level = (high - low).bit_length() - 2
            sums: list[Value] = []
            for field, (left, right) in enumerate(zip(lefts, rights, strict=True)):
                total = Signal(FIELD_BITS + level + 1, name=f"total{field}_{low}_{high}")
                register = Signal.like(total, name=f"sum{field}_{low}_{high}", reset_less=True)
                operations.append(
                    Addition(
                        left=left,
                        right=right,
                        # The carry of lane `middle` has found no adder further down.
                        carry=carry(field, middle, level),
                        total=total,
                        inverted=0 if level else 1 << (FIELD_BITS - 1),
                        late=level == 0,  # from a column of multipliers
                    )
                )
                m.d.sync += register.eq(total)
                sums.append(register)
            return sums

        roots = add(0, self._lanes)
        # second[k]: the roots of the second pixel, a cycle later.
        seconds = [delayed(roots[k], 1, f"second{k}") for k in (1, 3)]
        selects = [self.select]
        for n in range(levels):
            selects.append(delayed(selects[-1], 1, f"select{n}"))
        for column in range(4):
            odd, late = column % 2, column // 2
            # In the cycle in which the first pixel of these columns is at the root; before, for what is registered.
            is_first, will_be_first = (selects[n] == late for n in (levels, levels - 1))
            rest = Signal(name=f"rest{column}", reset_less=True)
            m.d.sync += rest.eq(Mux(will_be_first, carry(2 * odd, 0, levels - 1), carry(2 * odd + 1, 0, levels)))
            total = Signal(width, name=f"column{column}")
            operations.append(
                Choice(
                    select=is_first,
                    values=(seconds[odd], roots[2 * odd]),
                    carry=rest,
                    total=total,
                    inverted=1 << (width - 1),
                )
            )
            register = Signal(signed(width), name=f"register{column}", reset_less=True)
            m.d.sync += register.eq(total)
            m.d.comb += self.sums[column].eq(register)

        if self._technology == "ecp5":
            add_in_chains(m, operations, chain_cells=self._chain_cells, name="chain")
        else:
            m.d.comb += [operation.total.eq(operation.value()) for operation in operations]
        return m


class DspQuad(wiring.Component):
    """Four columns of the array on ``lanes`` multipliers, with two banks of weights.

    In the first cycle that a pair of pixels is on ``pairs``, with ``select`` 0, it is multiplied with the weights of
    columns 0 and 1; in the second, with ``select`` 1, with those of columns 2 and 3. In both, ``bank`` says which
    weights. Counted from that cycle, ``sums`` of the first pixel come :attr:`latency` cycles later and those of the
    second pixel in the cycle after; so columns 2 and 3 are a cycle behind columns 0 and 1.

    ``load_stb`` writes the weights of one column into ``load_bank``, for all cycles after this one. Those of columns 1
    and 3 are corrected: less 1 where the weight of the column before is negative. Weights that were never loaded are
    arbitrary. A reset changes none.

    Parameters
    ----------
    lanes, technology, chain_cells
        As in :class:`ProductTrees`; ``ecp5`` also instantiates the multipliers.

    Members
    -------
    pairs : In(ArrayLayout(PAIR, lanes))
    select, bank : In(1)
    weights : In(ArrayLayout(signed(4), lanes))
        In -7..7 before the correction, which is not checked.
    load_stb, load_bank : In(1)
    load_column : In(2)
    sums : Out(ArrayLayout(signed(8 + log2(lanes)), 4))

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """

    WEIGHT_RANGE: ClassVar[tuple[int, int]] = (-7, 7)
    COLUMNS: ClassVar[int] = 4

    pairs: data.View
    select: Signal
    bank: Signal
    weights: data.View
    load_stb: Signal
    load_bank: Signal
    load_column: Signal
    sums: data.View

    def __init__(self, *, lanes: int, technology: str = "generic", chain_cells: int = 64) -> None:
        self._lanes = check_lanes(lanes)
        self._technology = technology
        self._trees = ProductTrees(lanes=lanes, technology=technology, chain_cells=chain_cells)
        super().__init__(
            {
                "pairs": In(data.ArrayLayout(PAIR, lanes)),
                "select": In(1),
                "bank": In(1),
                "weights": In(data.ArrayLayout(signed(4), lanes)),
                "load_stb": In(1),
                "load_bank": In(1),
                "load_column": In(2),
                "sums": Out(self._trees.sums.shape()),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from a pair to the sums of its first pixel."""
        return PackedMultiplier.LATENCY + self._trees.latency

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.trees = trees = self._trees
        word = self.weights.shape()
        # Read without a register, for the multipliers have one: a few LUTs as memory replace flip-flops for two banks
        # and the multiplexers behind them.
        weights = []
        for odd, name in enumerate(("even", "odd")):
            memory = Memory(shape=unsigned(word.size), depth=4, init=[], attrs={"ram_style": "distributed"})
            m.submodules[name] = memory
            read, write = memory.read_port(domain="comb"), memory.write_port()
            m.d.comb += [
                read.addr.eq(Cat(self.select, self.bank)),
                write.addr.eq(Cat(self.load_column[1], self.load_bank)),
                write.data.eq(self.weights),
                write.en.eq(self.load_stb & (self.load_column[0] == odd)),
            ]
            weights.append(data.View(word, read.data))
        for lane in range(self._lanes):
            m.submodules[f"lane{lane}"] = multiplier = PackedMultiplier(technology=self._technology)
            m.d.comb += [
                multiplier.pair.eq(self.pairs[lane]),
                multiplier.even.eq(weights[0][lane]),
                multiplier.odd.eq(weights[1][lane]),
                trees.products[lane].eq(multiplier.product),
            ]
        select: Value = self.select
        for n in range(PackedMultiplier.LATENCY):
            later = Signal(name=f"select{n}", reset_less=True)
            m.d.sync += later.eq(select)
            select = later
        m.d.comb += [trees.select.eq(select), self.sums.eq(trees.sums)]
        return m


class DspHead(wiring.Component):
    """Makes of a stream of activation words, and of the weights of a tile, what quads take.

    Cycle ``k`` being that of ``swap_stb``, the activations of cycles ``k`` and ``k + 1``, ``k + 2`` and ``k + 3``, and
    so on become pairs until the next swap. A pair is on ``pairs`` in the two cycles after that of its second pixel,
    with ``select`` 0 and 1, and ``bank`` is that of the swap's tile. A swap in the second cycle of a pair is the
    beginning of another one: the activations of the cycle before, which found no partner, give no sum.

    ``load_stb`` passes on ``weights`` to ``o_weights``, two cycles later, with the index of the column and the bank for
    the tile of the next swap. Even columns come before the odd ones that are one more; columns with an odd index are
    corrected as :class:`DspQuad` wants it. The first load of a tile may come in the same cycle as the swap of the one
    before, and the last one a cycle before its own swap at the latest.

    Parameters
    ----------
    lanes : int
        Activations per word.
    column_bits : int
        Width of the index of a column.
    weight_polarity : int
        Bits of every weight that come inverted.
    activation_polarity : int
        Bits of every activation that come inverted.

    Members
    -------
    activations, weights : In(ArrayLayout(signed(4), lanes))
    swap_stb, load_stb : In(1)
    column : In(column_bits)
    pairs : Out(ArrayLayout(PAIR, lanes))
    select, bank : Out(1)
    o_weights : Out(ArrayLayout(signed(4), lanes))
    o_load_stb, o_load_bank : Out(1)
    o_column : Out(column_bits)
    """

    LATENCY: ClassVar[int] = 2
    """Cycles from the first activation of a pair to the pair."""

    activations: data.View
    weights: data.View
    swap_stb: Signal
    load_stb: Signal
    column: Signal
    pairs: data.View
    select: Signal
    bank: Signal
    o_weights: data.View
    o_load_stb: Signal
    o_load_bank: Signal
    o_column: Signal

    def __init__(self, *, lanes: int, column_bits: int, weight_polarity: int = 0, activation_polarity: int = 0) -> None:
        self._lanes = lanes
        self._weight_polarity, self._activation_polarity = weight_polarity, activation_polarity
        word = data.ArrayLayout(signed(4), lanes)
        super().__init__(
            {
                "activations": In(word),
                "weights": In(word),
                "swap_stb": In(1),
                "load_stb": In(1),
                "column": In(column_bits),
                "pairs": Out(data.ArrayLayout(PAIR, lanes)),
                "select": Out(1),
                "bank": Out(1),
                "o_weights": Out(word),
                "o_load_stb": Out(1),
                "o_load_bank": Out(1),
                "o_column": Out(column_bits),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        word = self.activations.shape()

        # None of these registers is reset, so that a reset changes no weight: neither their bank nor their use.
        second = Signal(reset_less=True)  # the next activations are the second ones of a pair, but for a swap
        swapped = Signal(reset_less=True)  # bank of the tile that works, seen from the activations that come in
        bank, paired = Signal(reset_less=True), Signal(reset_less=True)
        select, pairs = Signal(reset_less=True), Signal(self.pairs.shape(), reset_less=True)
        before = Signal(word, reset_less=True)
        now_bank, pair_stb = Signal(), Signal()
        activations = Signal(word)
        m.d.comb += [
            activations.as_value().eq(
                self.activations.as_value() ^ Const(self._activation_polarity, 4).replicate(self._lanes)
            ),
            now_bank.eq(swapped ^ self.swap_stb),
            pair_stb.eq(second & ~self.swap_stb),
        ]
        m.d.sync += [
            before.eq(activations),
            second.eq(~pair_stb),
            swapped.eq(now_bank),
            bank.eq(swapped),
            paired.eq(pair_stb),
            select.eq(paired),
        ]
        with m.If(pair_stb):
            for lane in range(self._lanes):
                m.d.sync += [
                    pairs[lane].first.eq(before[lane]),
                    pairs[lane].second.eq(decrement(activations[lane], before[lane][3])),
                ]
        m.d.comb += [self.pairs.eq(pairs), self.select.eq(select), self.bank.eq(bank)]

        # Registered before they are corrected, for they come from block RAM, and after.
        weights, negative = Signal(word, reset_less=True), Signal(self._lanes, reset_less=True)
        column, load_bank = Signal.like(self.column, reset_less=True), Signal(reset_less=True)
        load = Signal(reset_less=True)
        m.d.sync += [
            weights.as_value().eq(self.weights.as_value() ^ Const(self._weight_polarity, 4).replicate(self._lanes)),
            column.eq(self.column),
            load.eq(self.load_stb),
            load_bank.eq(~now_bank),
        ]
        with m.If(load):
            m.d.sync += negative.eq(Cat(weights[lane][3] for lane in range(self._lanes)))
        o_weights = Signal(word, reset_less=True)
        o_column, o_load_bank = Signal.like(self.column, reset_less=True), Signal(reset_less=True)
        o_load = Signal(reset_less=True)
        for lane in range(self._lanes):
            m.d.sync += o_weights[lane].eq(decrement(weights[lane], negative[lane] & column[0]))
        m.d.sync += [o_column.eq(column), o_load.eq(load), o_load_bank.eq(load_bank)]
        m.d.comb += [
            self.o_weights.eq(o_weights),
            self.o_column.eq(o_column),
            self.o_load_stb.eq(o_load),
            self.o_load_bank.eq(o_load_bank),
        ]
        return m
