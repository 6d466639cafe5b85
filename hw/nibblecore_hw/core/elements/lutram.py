# amaranth: UnusedElaboratable=no
"""Dot products by distributed arithmetic: tables of sums of weights in LUT RAM, addressed by activation bits.

Four lanes form a *group*. With ``b_ik`` the bits of activation ``a_i`` and ``s_ik = 2 * b_ik - 1``, which is 1 or -1,

    2 * a_i + 1 = s_i0 + 2 * s_i1 + 4 * s_i2 - 8 * s_i3,

so that ``sum_i w_i * (2 * a_i + 1)`` is a weighted sum of four values ``Q_k = sum_i w_i * s_ik``, one per bit *plane*.
Changing all signs negates ``Q_k`` (offset binary coding: Croisier et al., 1973; White, IEEE ASSP Magazine, 1989), so a
table needs only the eight sums with ``s_3k = 1``; two of them, one in use and one being filled, are the 16 entries of a
LUT RAM. With ``S`` the sum of the group's weights, the entry for signs that differ from lane 3's where ``c_i = 1`` is

    E = 16 + floor(S / 2) - c_0 * w_0 - c_1 * w_1 - c_2 * w_2,        0 <= E <= 31,

5 bits for all weights of -8..7. ``E - 16`` is half of ``Q_k``, rounded down. Where ``S`` is odd, half of ``-Q_k``
rounded down is the complement of ``E``; where it is even, one more: a *correction*. Plane 3 counts negatively, so its
signs are the other way round, and where ``S`` is odd the two halves that rounding drops make a correction of 1 there.
Left over is the *base* ``-ceil(S / 2)`` of each group, which the activations do not change.

Entries, signs, corrections and the base are the leaves of :func:`.heap.plan_tables`: 6 bits per lane instead of the 16
bit products of :mod:`.bitplane`, and columns with common activations share LUT RAMs, which are 4 bits wide.

With only one *bank*, a table may fill its LUT RAM: 16 sums, of all signs, addressed by four bits of activations. With

    E = 16 + ceil(S / 2) - b_0 * w_0 - b_1 * w_1 - b_2 * w_2 - b_3 * w_3,

which is ``16 - Q_k / 2``, rounded up, the parities of the planes add up to a constant of the group:

    sum_i w_i * a_i = -E_0 - 2 * E_1 - 4 * E_2 + 8 * E_3 - 16 - ceil(S / 2).

There are no signs and no corrections: 5 bits per lane, and a base ``15 - ceil(S / 2)``, the complement of the first
entry. ``Q_k`` has up to 33 values, but for weights of -7..7 it has 29, and 5 bits are enough. (Sixteen entries would
also do for groups of five lanes in offset binary coding, with all weights; but their 6 bits and one correction are more
for the adders: 25 leaves per plane of 16 lanes, one of them alone, instead of 20.)
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Final

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.elements import TABLE_DEPTH, table_entries, table_load_cycles

from ...registers import copies
from ...technology import check_technology
from .base import DotElement, check_int
from .ecp5 import subtract_gated
from .heap import TABLE_BITS, Base, Correction, Entry, Leaf, Plan, base_bits, plan_tables
from .summation import add_plan

GROUP: Final = 4
"""Lanes that address one table."""

_BASE_INDEX: Final = 4
"""With this entry the base and the parities of a block are valid: any time before the next block's would do."""


def check_lanes(lanes: int) -> int:
    """``lanes``, if it is a power of two in 4..64."""
    check_int("lanes", lanes, GROUP, 64)
    if lanes & (lanes - 1):
        raise ValueError(f"lanes must be a power of two, not {lanes}")
    return lanes


def check_banks(banks: int) -> int:
    """``banks``, if it is 1 or 2."""
    check_int("banks", banks, 1, 2)
    return banks


def code_activations(activations: data.View, *, banks: int = 2) -> Value:
    """Activations as tables are addressed: lanes 0..2 of a group relative to lane 3, and lane 3 as signs.

    A bit of lanes 0..2 is 1 where it differs from that of lane 3; one of lane 3 is 1 where the entry is to be
    complemented: plane 3 counts negatively. With one bank, they are as they come.
    """
    nibbles = [lane.as_unsigned() for lane in activations]
    if banks == 1:
        return Cat(nibbles)
    return Cat(nibble ^ (0b0111 if n % GROUP == 3 else nibbles[n | 3]) for n, nibble in enumerate(nibbles))


_SUBTRACTERS_PER_GATE: Final = 16
"""How many table entries of 5 bits one register gates: more are too far from each other in a large array."""


def write_layout(*, lanes: int, columns: int, banks: int = 2) -> data.StructLayout:
    """One entry of every group's table, for each of ``columns``.

    ``bank``, ``index``: which entry; ``entries[group][column]``; with the base also ``odd[column]``, a bit per group
    that says whether the sum of its weights is odd, and ``base[column]``, the sum of all ``16 - ceil(S / 2)``, or
    ``15 - ceil(S / 2)`` with one bank. ``bank`` and ``odd`` are there if there are two banks.
    """
    groups = lanes // GROUP
    return data.StructLayout(
        {
            "index": ceil_log2(table_entries(banks)),
            "entries": data.ArrayLayout(data.ArrayLayout(unsigned(TABLE_BITS), columns), groups),
            "base": data.ArrayLayout(unsigned(base_bits(lanes, banks)), columns),
        }
        | ({"bank": 1, "odd": data.ArrayLayout(unsigned(groups), columns)} if banks == 2 else {})
    )


def table_entry(weights: Sequence[int], index: int, *, banks: int = 2) -> int:
    """Entry ``index`` of the table of four weights; bit ``i`` says that the sign of lane ``i`` is not lane 3's.

    With one bank, it is the bit of lane ``i``.
    """
    return 16 + (sum(weights) + (banks == 1)) // 2 - sum(w for i, w in enumerate(weights) if index >> i & 1)


class TableFill(wiring.Component):
    """Makes table entries of weights: of a *block* of ``columns`` columns, an entry per cycle for all of them.

    The words of a block come in order, each at least ``max(1, entries // columns)`` cycles after the one before, with
    the 8 or 16 ``entries`` of a table. Entry 0 is on ``o`` 5 cycles after the last word, and the last one
    :attr:`latency` cycles after it.

    Parameters
    ----------
    lanes : int
        4, 8, 16, 32 or 64.
    columns : int
        Columns of a block, 1..64.
    blocks : int
        Blocks of an array, at least 1.
    technology : {"generic", "ecp5"}
        Subtracters that synthesis infers, or carry cells.
    banks : int
        2, or 1 for tables of 16 entries.

    Members
    -------
    weights : In(ArrayLayout(signed(4), lanes))
    column : In(log2(columns))
        Place in its block of the column of ``weights``.
    block : In(log2(blocks))
        Where there are several: which one; taken with the last column.
    load_stb : In(1)
    bank : In(1)
        With two banks: which one is in use. The other one is filled.
    o : Out(write_layout(lanes=lanes, columns=columns, banks=banks))
    o_stb : Out(blocks)
        The bit of the block whose entries are there.
    base_stb : Out(blocks)
        The same with entry 4, when the base is there. Both are registers: they reach all tables of a block.
    """

    weights: data.View
    column: Signal
    block: Signal
    load_stb: Signal
    bank: Signal
    o: data.View
    o_stb: Signal
    base_stb: Signal

    def __init__(
        self, *, lanes: int, columns: int, blocks: int = 1, technology: str = "generic", banks: int = 2
    ) -> None:
        self._lanes = check_lanes(lanes)
        self._banks = check_banks(banks)
        check_int("columns", columns, 1, 64)
        check_int("blocks", blocks, 1, 64)
        self._columns = columns
        self._blocks = blocks
        self._technology = check_technology(technology)
        super().__init__(
            {
                "weights": In(data.ArrayLayout(signed(4), lanes)),
                "column": In(ceil_log2(columns)),
                "load_stb": In(1),
                "o": Out(write_layout(lanes=lanes, columns=columns, banks=banks)),
                "o_stb": Out(blocks),
                "base_stb": Out(blocks),
            }
            | ({"block": In(ceil_log2(blocks))} if blocks > 1 else {})
            | ({"bank": In(1)} if banks == 2 else {})
        )

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self._columns

    @property
    def latency(self) -> int:
        """Cycles from the last word of a block to its last entry."""
        return table_load_cycles(self._banks)

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        groups, columns, banks = self._lanes // GROUP, self._columns, self._banks
        width, entries = base_bits(self._lanes, banks), table_entries(banks)

        # What the entries of a group are made of: the first one, and the weights to subtract from it. Those of lanes
        # 0..2 make eight; with one bank, eight more begin with the one that has lane 3's subtracted, too.
        weights = data.ArrayLayout(unsigned(4), GROUP - 1)
        source = data.StructLayout({"start": TABLE_BITS, "odd": 1, "weights": weights})
        if banks == 1:
            source = data.StructLayout({"start": TABLE_BITS, "second_start": TABLE_BITS, "weights": weights})
        sources = data.ArrayLayout(source, groups)

        def register(name: str, layout: data.ArrayLayout = sources) -> data.View:
            # No signal of that layout: Amaranth would name its elements like its bits, which ABC9 mistakes.
            return data.View(layout, Signal(layout.size, name=name, reset_less=True))

        received = data.StructLayout({"start": TABLE_BITS, "odd": 1, "weights": data.ArrayLayout(unsigned(4), GROUP)})
        word = register("word", data.ArrayLayout(received, groups))
        word_valid = Signal(reset_less=True)
        column = Signal.like(self.column, reset_less=True)
        block = Signal(ceil_log2(self._blocks), reset_less=True) if self._blocks > 1 else Const(0)
        # word_valid & (column == n), as registers: they reach thousands of others.
        is_column = Signal(columns, reset_less=True)
        m.d.sync += [
            word_valid.eq(self.load_stb),
            column.eq(self.column),
            is_column.eq(Cat(self.load_stb & (self.column == n) for n in range(columns))),
        ]
        if self._blocks > 1:
            m.d.sync += block.eq(self.block)
        for group in range(groups):
            nibbles = [self.weights[GROUP * group + n].as_unsigned() for n in range(GROUP)]
            biased = [nibble ^ 0b1000 for nibble in nibbles]  # each 8 more, so that the sum is 32 more
            total = Signal(6, name=f"total{group}")
            if banks == 1:  # half of it is rounded up
                pairs = [Cat(Const(1, 1), biased[n] + biased[n + 1]) for n in (0, 2)]
                m.d.comb += total.eq((pairs[0] + pairs[1])[1:])
            else:
                m.d.comb += total.eq((biased[0] + biased[1]) + (biased[2] + biased[3]))
            m.d.sync += [word[group].start.eq(total[1:]), word[group].odd.eq(total[0])]
            m.d.sync += [word[group].weights[n].eq(nibbles[n]) for n in range(GROUP)]
        taken = data.View(sources, Signal(sources.size, name="taken"))
        for group in range(groups):
            m.d.comb += [taken[group].weights[n].eq(word[group].weights[n]) for n in range(GROUP - 1)]
            m.d.comb += taken[group].start.eq(word[group].start)
            if banks == 1:
                m.d.comb += taken[group].second_start.eq(word[group].start - word[group].weights[-1].as_signed())
            else:
                m.d.comb += taken[group].odd.eq(word[group].odd)

        # The words of a block wait for the last one; then they are worked on while those of the next one come. What
        # says so is a register for some columns each, whatever those hold after power-up.
        gates_count = min(4, max(1, groups * columns // _SUBTRACTERS_PER_GATE))
        begins = is_column[-1]
        begins_copies = copies(m, self.load_stb & (self.column == columns - 1), gates_count, name="begins")
        work = [register(f"work{n}") for n in range(columns)]
        for n in range(columns - 1):
            waiting = register(f"waiting{n}")
            with m.If(is_column[n]):
                m.d.sync += waiting.eq(taken)
            with m.If(begins_copies[n * gates_count // columns]):
                m.d.sync += work[n].eq(waiting)
        # Without a reset, as all here: it comes to its end, which a reset waits for.
        running = Signal(reset_less=True)
        index = Signal(ceil_log2(entries), reset_less=True)
        work_block = Signal.like(block, name="work_block", reset_less=True)
        index_next = Signal.like(index)
        m.d.comb += index_next.eq(Mux(begins, 0, index + 1))
        m.d.sync += index.eq(index_next)
        with m.If(begins):
            m.d.sync += [work[-1].eq(taken), work_block.eq(block), running.eq(1)]
        with m.Elif(index == entries - 1):
            m.d.sync += running.eq(0)
        if banks == 1:
            with m.Elif(index == entries // 2 - 1):
                m.d.sync += [of_group.start.eq(of_group.second_start) for of_column in work for of_group in of_column]

        # One subtracter per weight, with a register behind each.
        stb, place, stage_block = running, index, work_block
        place_next: Value = index_next
        values = [[work[n][group].start for n in range(columns)] for group in range(groups)]
        for lane in reversed(range(GROUP - 1)):
            differences: list[tuple[Value, Value, Value, Signal]] = []
            later = [
                [Signal(TABLE_BITS, name=f"value{lane}_{group}_{n}", reset_less=True) for n in range(columns)]
                for group in range(groups)
            ]
            gates = copies(m, place_next[lane], gates_count, name=f"gate{lane}")
            for group in range(groups):
                for n in range(columns):
                    weight = work[n][group].weights[lane]
                    if lane < GROUP - 2:
                        # The index is a cycle older for each register that the value has passed.
                        weight_later = weight
                        for age in range(GROUP - 2 - lane):
                            older = Signal(4, name=f"weight{lane}_{group}_{n}_{age}", reset_less=True)
                            m.d.sync += older.eq(weight_later)
                            weight_later = older
                        weight = weight_later
                    difference = Signal(TABLE_BITS, name=f"difference{lane}_{group}_{n}")
                    differences.append(
                        (values[group][n], Cat(weight, weight[3]), gates[group * gates_count // groups], difference)
                    )
                    m.d.sync += later[group][n].eq(difference)
            if self._technology == "ecp5":
                subtract_gated(m, differences, chain_cells=48, name=f"subtract{lane}_")
            else:
                m.d.comb += [
                    difference.eq((minuend - (subtrahend & gate.replicate(TABLE_BITS)))[:TABLE_BITS])
                    for minuend, subtrahend, gate, difference in differences
                ]
            stb_later = Signal(name=f"stb{lane}", reset_less=True)
            place_later = Signal(index.shape(), name=f"place{lane}", reset_less=True)
            block_later = Signal.like(block, name=f"block{lane}", reset_less=True)
            m.d.sync += [stb_later.eq(stb), place_later.eq(place), block_later.eq(stage_block)]
            if not lane:
                # Of the last stage, all is known a cycle ahead.
                strobes, base_strobes = (
                    Signal(self._blocks, name=n, reset_less=True) for n in ("strobes", "base_strobes")
                )
                own = [stb & (stage_block == n) for n in range(self._blocks)]
                m.d.sync += [
                    strobes.eq(Cat(own)),
                    base_strobes.eq(Cat(is_own & (place == _BASE_INDEX) for is_own in own)),
                ]
                m.d.comb += [self.o_stb.eq(strobes), self.base_stb.eq(base_strobes)]
            place_next = place
            stb, place, stage_block, values = stb_later, place_later, block_later, later

        # The base of a column is made as its word comes, one adder after the other; it is there before entry 4.
        sums: list[Value] = [~word[group].start for group in range(groups)]
        even: Value = Const(0, groups) if banks == 1 else Cat(~word[group].odd for group in range(groups))
        base_valid, base_column = word_valid, column
        level = 0
        while len(sums) > 1 or level == 0:
            # One carry per adder: of n parities, n - 1 are added on the way and the last one at the end.
            count = max(1, len(sums) // 2)
            pairs = []
            for n in range(count):
                pair = Signal(width, name=f"base{level}_{n}", reset_less=True)
                other = sums[2 * n + 1] if len(sums) > 1 else Const(0, 1)
                m.d.sync += pair.eq((Cat(even[n], sums[2 * n]) + Cat(even[n], other))[1:])
                pairs.append(pair)
            valid_later = Signal(name=f"base_valid{level}", reset_less=True)
            column_later = Signal.like(column, name=f"base_column{level}", reset_less=True)
            even_later = Signal(max(1, len(even) - count), name=f"base_even{level}", reset_less=True)
            m.d.sync += [valid_later.eq(base_valid), column_later.eq(base_column), even_later.eq(even[count:])]
            sums, even, base_valid, base_column = pairs, even_later, valid_later, column_later
            level += 1
        base = sums[0] + even[0] if groups > 1 else sums[0]
        bases = [Signal(width, name=f"base_of{n}", reset_less=True) for n in range(columns)]
        bases_complete = Signal(reset_less=True)
        m.d.sync += bases_complete.eq(base_valid & (base_column == columns - 1))
        for n in range(columns):
            with m.If(base_valid & (base_column == n)):
                m.d.sync += bases[n].eq(base)
        base_out = Signal(data.ArrayLayout(unsigned(width), columns), reset_less=True)
        with m.If(bases_complete):
            m.d.sync += base_out.eq(Cat(bases))

        if banks == 2:
            bank = Signal(reset_less=True)
            odd_out = Signal(data.ArrayLayout(unsigned(groups), columns), reset_less=True)
            m.d.sync += [
                bank.eq(~self.bank),
                odd_out.eq(Cat(work[n][group].odd for n in range(columns) for group in range(groups))),
            ]
            m.d.comb += [self.o.bank.eq(bank), self.o.odd.eq(odd_out)]
        m.d.comb += [
            self.o.index.eq(place),
            self.o.entries.eq(Cat(value for row in values for value in row)),
            self.o.base.eq(base_out),
        ]
        return m


class TableColumns(wiring.Component):
    """Dot products of one activation word with the tables of ``columns`` columns, fully pipelined.

    ``sums`` are those of the activations and the bank :attr:`latency` cycles before. An entry is there for the
    activations that come in the cycle after its write. The base and the parities that came with the last entry 4 are
    used from the activations on that come with ``swap_stb``, as those with the other ``bank`` should. With one bank,
    the sums of activations mean nothing from the write of entry 0 to that of the last one.

    All weights are 0 after power-up; a reset changes nothing.

    Parameters
    ----------
    lanes : int
        4, 8, 16, 32 or 64.
    columns : int
        1..64. Multiples of 4 waste no LUT RAM.
    technology, levels_per_stage, chain_cells
        As in :class:`~.bitplane.BitplaneDot`.
    banks : int
        2, or 1 for tables of 16 entries and weights of -7..7.

    Members
    -------
    activations : In(4 * lanes)
        From :func:`code_activations`.
    bank : In(1)
        With two banks: half of the tables to be used.
    swap_stb : In(1)
        With two banks: the bank is not that of the cycle before.
    write : In(write_layout(lanes=lanes, columns=columns, banks=banks))
    write_stb, base_stb : In(1)
        There is an entry; it is entry 4, and the base is there.
    sums : Out(columns * (8 + log2(lanes)))
        Column 0 in the low bits.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """

    activations: Signal
    bank: Signal
    swap_stb: Signal
    write: data.View
    write_stb: Signal
    base_stb: Signal
    sums: Signal

    def __init__(
        self,
        *,
        lanes: int,
        columns: int,
        technology: str = "generic",
        levels_per_stage: int = 2,
        chain_cells: int = 48,
        banks: int = 2,
    ) -> None:
        self._lanes = check_lanes(lanes)
        self._banks = check_banks(banks)
        check_int("columns", columns, 1, 64)
        check_int("levels_per_stage", levels_per_stage, 1, 4)
        check_int("chain_cells", chain_cells, 16, 192)
        self._columns = columns
        self._technology = check_technology(technology)
        self._chain_cells = chain_cells
        self._plan = plan_tables(lanes=lanes, levels_per_stage=levels_per_stage, banks=banks)
        super().__init__(
            {
                "activations": In(4 * lanes),
                "write": In(write_layout(lanes=lanes, columns=columns, banks=banks)),
                "write_stb": In(1),
                "base_stb": In(1),
                "sums": Out(columns * (8 + (lanes - 1).bit_length())),
            }
            | ({"bank": In(1), "swap_stb": In(1)} if banks == 2 else {})
        )

    @property
    def latency(self) -> int:
        """Cycles from ``activations`` to their ``sums``."""
        return 1 + self._plan.stages

    @property
    def plan(self) -> Plan:
        """Which bits of a column meet in which adder."""
        return self._plan

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        groups, banks = self._lanes // GROUP, self._banks
        entry = data.ArrayLayout(unsigned(TABLE_BITS), self._columns)

        # read[group][plane][column], and whether it is to be complemented.
        read: list[list[data.View]] = []
        signs: list[list[Value]] = []
        # The entries of weights that are all 0.
        init = sum(1 << TABLE_BITS - 1 + TABLE_BITS * n for n in range(self._columns))
        for group in range(groups):
            read.append([])
            signs.append([])
            for plane in range(4):
                name = f"{group}_{plane}"
                table = Memory(
                    shape=unsigned(entry.size),
                    depth=TABLE_DEPTH,
                    init=[init] * TABLE_DEPTH,
                    attrs={"ram_style": "distributed"},
                )
                m.submodules[f"table{name}"] = table
                write, port = table.write_port(), table.read_port(domain="comb")
                # No signal of that layout: Amaranth would name its columns like its bits, which ABC9 mistakes.
                value = Signal(entry.size, name=f"entry{name}", init=init, reset_less=True)
                bits = [self.activations[4 * (GROUP * group + n) + plane] for n in range(GROUP)]
                m.d.comb += [
                    write.addr.eq(Cat(self.write.index, self.write.bank) if banks == 2 else self.write.index),
                    write.data.eq(self.write.entries[group].as_value()),
                    write.en.eq(self.write_stb),
                    port.addr.eq(Cat(bits[: GROUP - 1], self.bank) if banks == 2 else Cat(bits)),
                ]
                m.d.sync += value.eq(port.data)
                read[-1].append(data.View(entry, value))
                if banks == 2:
                    sign = Signal(name=f"sign{name}", reset_less=True)
                    m.d.sync += sign.eq(bits[-1])
                    signs[-1].append(sign)
                else:
                    signs[-1].append(Const(plane != 3, 1))

        for n in range(self._columns):
            shapes = {"base": (base_bits(self._lanes, banks), (15 if banks == 1 else 16) * groups)}
            if banks == 2:
                shapes["odd"] = (groups, 0)
            used: dict[str, Signal] = {}
            for name, (bits_, zero) in shapes.items():
                if banks == 1:
                    # The last activations of the tile before have met the base when entry 1 is written.
                    used[name] = active = Signal(bits_, name=f"{name}{n}", init=zero, reset_less=True)
                    with m.If(self.base_stb):
                        m.d.sync += active.eq(self.write[name][n])
                    continue
                shadow = Signal(bits_, name=f"{name}_shadow{n}", init=zero, reset_less=True)
                used[name] = active = Signal(bits_, name=f"{name}{n}", init=zero, reset_less=True)
                with m.If(self.base_stb):
                    m.d.sync += shadow.eq(self.write[name][n])
                with m.If(self.swap_stb):
                    m.d.sync += active.eq(shadow)

            def inputs(leaf: Leaf, n: int = n, used: dict[str, Signal] = used) -> tuple[Value, Value]:
                match leaf:
                    case Entry():
                        return read[leaf.group][leaf.plane][n][leaf.bit], signs[leaf.group][leaf.plane]
                    case Correction():
                        return used["odd"][leaf.group], signs[leaf.group][leaf.plane]
                    case Base():
                        return used["base"][leaf.bit], Const(1, 1)
                raise AssertionError(leaf)

            def value_of(leaf: Leaf, inputs: Any = inputs) -> Value:
                a, b = inputs(leaf)
                match leaf:
                    case Entry():
                        return a ^ b
                    case Correction():
                        return a | b if leaf.plane == 3 else ~a & b
                return a

            def gate_of(leaf: Leaf, inputs: Any = inputs) -> tuple[int, tuple[Value, Value]]:
                match leaf:
                    case Entry():
                        table = 0b0110
                    case Correction():
                        table = 0b1110 if leaf.plane == 3 else 0b0100
                    case _:
                        table = 0b1000  # the other input is 1
                return table, inputs(leaf)

            total = add_plan(
                m,
                self._plan,
                technology=self._technology,
                chain_cells=self._chain_cells,
                value=value_of,
                gate=gate_of,
                name=f"column{n}_",
            )
            m.d.comb += self.sums.word_select(n, len(total)).eq(total)
        return m


class LutramDot(DotElement):
    """A column of its own with two tables of sums of weights; in an array, columns share most of it.

    Members are those of :class:`DotElement`.

    Parameters
    ----------
    lanes : int
        4, 8, 16, 32 or 64.
    inverted
        As in :class:`DotElement`; there is nothing to invert.
    technology, levels_per_stage, chain_cells
        As in :class:`TableColumns`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """

    BANKS: ClassVar[int] = 2

    def __init__(
        self,
        *,
        lanes: int,
        inverted: bool = False,
        technology: str = "generic",
        levels_per_stage: int = 2,
        chain_cells: int = 48,
    ) -> None:
        self._fill = TableFill(lanes=lanes, columns=1, technology=technology, banks=self.BANKS)
        self._columns = TableColumns(
            lanes=lanes,
            columns=1,
            technology=technology,
            levels_per_stage=levels_per_stage,
            chain_cells=chain_cells,
            banks=self.BANKS,
        )
        super().__init__(lanes=lanes, inverted=inverted)

    @property
    def load_cycles(self) -> int:
        return self._fill.latency + 1

    @property
    def latency(self) -> int:
        return self._columns.latency

    @property
    def plan(self) -> Plan:
        """Which bits meet in which adder."""
        return self._columns.plan

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.fill = fill = self._fill
        m.submodules.columns = columns = self._columns
        m.d.comb += [
            fill.weights.eq(self.weights),
            fill.load_stb.eq(self.load_stb),
            columns.activations.eq(code_activations(self.activations, banks=self.BANKS)),
            columns.write.eq(fill.o),
            columns.write_stb.eq(fill.o_stb),
            columns.base_stb.eq(fill.base_stb),
            self.sum.eq(columns.sums),
        ]
        if self.BANKS == 1:
            return m
        bank = Signal(reset_less=True)
        loaded = Signal(reset_less=True)
        swaps = Signal()
        # A swap without a load since the last one changes nothing.
        m.d.comb += swaps.eq(self.swap_stb & loaded)
        with m.If(self.load_stb):
            m.d.sync += loaded.eq(1)
        with m.Elif(self.swap_stb):
            m.d.sync += loaded.eq(0)
        m.d.sync += bank.eq(bank ^ swaps)
        m.d.comb += [
            fill.bank.eq(bank),
            columns.bank.eq(bank ^ swaps),
            columns.swap_stb.eq(swaps),
        ]
        return m


class OneBankLutramDot(LutramDot):
    """The same with one table of 16 sums, for weights of -7..7, which cannot be loaded while it is in use."""

    BANKS: ClassVar[int] = 1
    WEIGHT_RANGE: ClassVar[tuple[int, int]] = (-7, 7)
    OVERLAPS: ClassVar[bool] = False


__all__ = [
    "LutramDot",
    "OneBankLutramDot",
    "TableColumns",
    "TableFill",
    "code_activations",
    "table_entry",
    "write_layout",
]
