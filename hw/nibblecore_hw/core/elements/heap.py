"""Plans the summation of the bits of a dot product: which bits meet in which adder.

The bits are *leaves*: functions of two register bits each, which the first adders compute on their way. With two's
complement nibbles, ``sum_i a_i * w_i`` is a sum of ``16 * lanes`` bit products ``a_i[k] & w_i[j]`` of weight
``2**(j + k)``. Those with exactly one sign bit count negatively; they enter inverted, as ``-x = ~x - 1``, and the
constants add up to ``-112 * lanes`` (Baugh and Wooley, 1973). Where tables hold sums of weights (:mod:`.lutram`), the
leaves are bits of their entries.

The heap of bits is reduced level by level with *rows*: ripple-carry adders over consecutive weights that take two bits
per weight and a third one as the carry at their lowest weight. A row of ``n`` cells turns ``2n + 1`` bits into
``n + 1``.

The plan is plain data: :mod:`.summation` writes it as Amaranth adders, :mod:`.ecp5` as carry chains.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final


@dataclasses.dataclass(frozen=True)
class Product:
    """The bit product ``activations[lane][activation_bit] & weights[lane][weight_bit]``, inverted if it is negative."""

    lane: int
    activation_bit: int
    weight_bit: int

    @property
    def weight(self) -> int:
        return self.activation_bit + self.weight_bit

    @property
    def inverted(self) -> bool:
        return (self.activation_bit == 3) != (self.weight_bit == 3)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Bit ``bit`` of the table of lane group ``group`` for activation bit ``plane``, complemented with its sign.

    Where the table has sums of all signs, it is complemented in planes 0..2.
    """

    group: int
    plane: int
    bit: int

    @property
    def weight(self) -> int:
        return self.plane + self.bit


@dataclasses.dataclass(frozen=True)
class Correction:
    """1 where the complement of an :class:`Entry` is one less than its negative."""

    group: int
    plane: int

    @property
    def weight(self) -> int:
        return self.plane


@dataclasses.dataclass(frozen=True)
class Base:
    """Bit ``bit`` of the part of the sum that no activation changes."""

    bit: int

    @property
    def weight(self) -> int:
        return self.bit


Leaf = Product | Entry | Correction | Base


@dataclasses.dataclass(frozen=True)
class Wire:
    """Output ``bit`` of row number ``row``; bit 0 has the weight of the row."""

    row: int
    bit: int


@dataclasses.dataclass(frozen=True)
class One:
    """The constant 1."""


Bit = Leaf | Wire | One


@dataclasses.dataclass(frozen=True)
class Row:
    """One adder: ``left + right + carry``, ``None`` being 0.

    ``level`` counts from 0; the inputs come from lower levels. The output has one bit per cell and, with ``carry_out``,
    one more. ``invert_top`` complements the highest bit of the sum.
    """

    index: int
    level: int
    weight: int
    left: tuple[Bit | None, ...]
    right: tuple[Bit | None, ...]
    carry: Bit | None
    carry_out: bool
    invert_top: bool = False

    @property
    def cells(self) -> int:
        return len(self.left)

    @property
    def width(self) -> int:
        return self.cells + self.carry_out

    @property
    def is_gate(self) -> bool:
        """Whether the row only computes one leaf, which then needs no adder."""
        return self.cells == 1 and self.right == (None,) and self.carry is None

    @property
    def inputs(self) -> Iterator[tuple[Bit, int]]:
        """Bits that the row consumes, with their weights."""
        for n, pair in enumerate(zip(self.left, self.right, strict=True)):
            yield from ((bit, self.weight + n) for bit in pair if bit is not None)
        if self.carry is not None:
            yield self.carry, self.weight


@dataclasses.dataclass(frozen=True)
class Plan:
    """All rows of a dot product, in order of level, and where registers stand between them.

    ``stage_of_level[level]`` is the pipeline stage of a level. A bit that is produced in one stage and consumed in a
    later one is registered at every boundary that it crosses; leaves are consumed in stage 0.
    ``result[n]`` is bit ``n`` of the sum.
    """

    lanes: int
    rows: tuple[Row, ...]
    stage_of_level: tuple[int, ...]
    result: tuple[Wire, ...]

    @property
    def stages(self) -> int:
        return self.stage_of_level[-1] + 1

    @property
    def last_use(self) -> dict[Wire, int]:
        """Stage in which each wire is last needed; ``stages`` for the bits of the result."""
        use = {wire: self.stages for wire in self.result}
        for row in self.rows:
            use |= {bit: self.stage_of_level[row.level] for bit, _ in row.inputs if isinstance(bit, Wire)}
        return use

    @property
    def register_bits(self) -> int:
        """Flip-flops between the stages and behind the last one."""
        return sum(stage - self.stage_of_level[self.rows[wire.row].level] for wire, stage in self.last_use.items())

    @property
    def adder_cells(self) -> int:
        """Cells of all rows, each with the one that separates it from the next in a carry chain."""
        return sum(1 if row.is_gate else row.cells + 1 for row in self.rows)


def negative_constant(lanes: int) -> int:
    """What the inverted bit products add too much, as a number to subtract."""
    return lanes * 2 * (8 + 16 + 32)


TABLE_BITS: Final = 5
"""Bits of a table's entry."""


def table_constant(lanes: int, banks: int) -> int:
    """What the leaves of a dot product by tables add too much, as a number to subtract.

    Each of ``lanes // 4`` groups adds 16 per plane for an inverted sign bit, which is ``16 * (1 + 2 + 4 + 8)``, and 16
    for a base that is never negative. With one bank, three planes enter as ``31 - E_k``, which is ``31 * (1 + 2 + 4)``
    too much, and the base is 31 more than it should be.
    """
    return lanes // 4 * (248 if banks == 1 else 256)


def base_bits(lanes: int, banks: int) -> int:
    """Width of the base of a dot product by tables.

    It is in ``2 * groups .. 32 * groups``, or, with one bank and weights of -7..7, in ``groups .. 29 * groups``.
    """
    return ((29 if banks == 1 else 32) * (lanes // 4)).bit_length()


def second_operand(bit: Bit) -> bool:
    """Whether a bit may be the right operand of a cell whose left one is a function of two bits as well.

    An ECP5 carry cell derives the generate term from the table entries with the right operand's two inputs at 0, so the
    right operand has to be 0 there. All leaves of :mod:`.lutram` are. :mod:`.bitplane` stores activation bit 3 and
    weight bits 1 and 2 inverted to make that true for as many products as need it.
    """
    if not isinstance(bit, Product):
        return True
    both_inverted = bit.activation_bit == 3 and bit.weight_bit in (1, 2)
    return both_inverted == bit.inverted


class _Builder:
    """Bits that wait to be added, by weight, and the rows that have been made so far."""

    def __init__(self, lanes: int, leaves: Iterable[Leaf], surplus: int) -> None:
        self.lanes = lanes
        self.width = 8 + (lanes - 1).bit_length()
        self.bits: list[list[Bit]] = [[] for _ in range(self.width)]
        for leaf in leaves:
            self.bits[leaf.weight].append(leaf)
        constant = -surplus % (1 << self.width)
        # The highest bit costs nothing as an inversion, because nothing is carried out of it.
        self.invert_top = bool(constant >> (self.width - 1))
        for weight in range(self.width - 1):
            if constant >> weight & 1:
                self.bits[weight].append(One())
        self.rows: list[Row] = []
        self.fresh: list[tuple[int, Bit]] = []
        self.level = 0

    def build(self, *, levels_per_stage: int, least_gain: float, most_cells: int) -> Plan:
        """Add rows, level by level, until one bit of each weight is left.

        A row of n cells removes n bits (n - 1 without a carry) and costs n + 1 cells in a chain; rows that remove fewer
        than ``least_gain`` bits per cell wait for company on the next level.
        """
        while any(len(bits) > 1 for bits in self.bits):
            if self._is_last():
                self._add_last_row()
            else:
                self._add_rows(least_gain, most_cells)
                if self.level == levels_per_stage - 1:
                    self._add_gates(self.width)
                if not self.fresh:
                    least_gain *= 0.75
                    continue
            for weight, bit in self.fresh:
                self.bits[weight].append(bit)
            self.fresh = []
            self.level += 1
        return Plan(
            lanes=self.lanes,
            rows=tuple(self.rows),
            stage_of_level=tuple(level // levels_per_stage for level in range(self.level)),
            result=tuple(bit for bits in self.bits for bit in bits if isinstance(bit, Wire)),
        )

    def _is_last(self) -> bool:
        """Whether one row is enough: two bits at every weight, three at its lowest."""
        tall = [weight for weight in range(self.width) if len(self.bits[weight]) > 1]
        return all(len(self.bits[weight]) <= 2 + (weight == tall[0]) and self._pairable(weight) for weight in tall)

    def _add_last_row(self) -> None:
        lowest = min(weight for weight in range(self.width) if len(self.bits[weight]) > 1)
        self._add_gates(lowest)
        right = [self._take_right(w) if len(self.bits[w]) > 1 else None for w in range(lowest, self.width)]
        left = [self._take_left(w) if self.bits[w] else None for w in range(lowest, self.width)]
        carry = self._take_left(lowest) if self.bits[lowest] else None
        self._add_row(lowest, left, right, carry, invert_top=self.invert_top)

    def _add_rows(self, least_gain: float, most_cells: int) -> None:
        weight = 0
        while weight < self.width:
            top = weight
            while top < self.width and top - weight < most_cells and self._pairable(top):
                top += 1
            cells = top - weight
            gain = cells - 1 + (len(self.bits[weight]) > 2)
            if gain <= 0 or gain < least_gain * (cells + 1):
                weight += 1
                continue
            right = [self._take_right(w) for w in range(weight, top)]
            left = [self._take_left(w) for w in range(weight, top)]
            self._add_row(weight, left, right, self._take_left(weight) if self.bits[weight] else None)

    def _add_gates(self, end: int) -> None:
        """Compute the leaves below weight ``end`` that no row has taken: behind a register they are gone."""
        for weight in range(end):
            leaves = [bit for bit in self.bits[weight] if isinstance(bit, Leaf)]
            self.bits[weight] = [bit for bit in self.bits[weight] if not isinstance(bit, Leaf)]
            for leaf in leaves:
                self._add_row(weight, [leaf], [None], None)

    def _add_row(
        self,
        weight: int,
        left: Sequence[Bit | None],
        right: Sequence[Bit | None],
        carry: Bit | None,
        *,
        invert_top: bool = False,
    ) -> None:
        gate = list(right) == [None] and carry is None
        row = Row(
            len(self.rows),
            self.level,
            weight,
            tuple(left),
            tuple(right),
            carry,
            carry_out=not gate and weight + len(left) < self.width,
            invert_top=invert_top,
        )
        self.rows.append(row)
        self.fresh.extend((weight + n, Wire(row.index, n)) for n in range(row.width))

    def _pairable(self, weight: int) -> bool:
        return len(self.bits[weight]) > 1 and any(second_operand(bit) for bit in self.bits[weight])

    def _take_right(self, weight: int) -> Bit:
        return self._take(weight, lambda bit: (not second_operand(bit), not isinstance(bit, Leaf)))

    def _take_left(self, weight: int) -> Bit:
        """Bits that can only be left operands or carries go first, so that the others last for the right side."""
        return self._take(weight, lambda bit: (second_operand(bit), not isinstance(bit, Leaf)))

    def _take(self, weight: int, order: Callable[[Bit], tuple[bool, bool]]) -> Bit:
        bits = self.bits[weight]
        return bits.pop(min(range(len(bits)), key=lambda n: order(bits[n])))


@functools.cache
def plan_dot(*, lanes: int, levels_per_stage: int) -> Plan:
    """The cheapest plan for bit products that the search finds among those with the fewest pipeline stages.

    Parameters
    ----------
    lanes : int
        Length of the dot product, a power of two.
    levels_per_stage : int
        Rows that a bit may pass between two registers, at least 1.
    """
    leaves = [Product(lane, k, j) for lane in range(lanes) for j in range(4) for k in range(4)]
    return _cheapest(lanes, leaves, negative_constant(lanes), levels_per_stage)


@functools.cache
def plan_tables(*, lanes: int, levels_per_stage: int, banks: int = 2) -> Plan:
    """The same for table entries of groups of four lanes, their corrections if there are two banks, and a base.

    ``lanes`` is a power of two of at least 4.
    """
    leaves: list[Leaf] = []
    for group, plane in itertools.product(range(lanes // 4), range(4)):
        leaves += [Entry(group, plane, bit) for bit in range(TABLE_BITS)]
        if banks == 2:
            leaves.append(Correction(group, plane))
    leaves += [Base(bit) for bit in range(base_bits(lanes, banks))]
    return _cheapest(lanes, leaves, table_constant(lanes, banks), levels_per_stage)


def _cheapest(lanes: int, leaves: Sequence[Leaf], surplus: int, levels_per_stage: int) -> Plan:
    candidates = (
        _Builder(lanes, leaves, surplus).build(
            levels_per_stage=levels_per_stage, least_gain=gain / 20, most_cells=cells
        )
        for gain in range(6, 19)
        for cells in (4, 5, 6, 7, 8, 12)
    )
    # A flip-flop is free as long as its site is needed for an adder anyway.
    return min(candidates, key=lambda plan: (plan.stages, plan.adder_cells + plan.register_bits / 4))
