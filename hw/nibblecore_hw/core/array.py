# amaranth: UnusedElaboratable=no
"""The systolic array: columns of processing elements through which activation words travel group by group."""

from typing import Any

from amaranth import Cat, Const, Module, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.elements import element_timing

from ..layouts import word_layout
from .elements import DotElement, DspHead, DspQuad, TableColumns, TableFill, code_activations, make_element


class SystolicArray(wiring.Component):
    """``columns`` dot products of one activation word, with a weight tile each way: one works, the next is loaded.

    Columns stand in groups of ``post_lanes``. Activations and swap reach group 0 through one register and every further
    group through one more; weights reach group 0 directly and every further group through one register. So, counted in
    cycles at the ports, what comes in cycle ``k`` is worth in group ``g``:

    - ``activations``: ``sums`` of the group's columns in cycle ``k + latencies[g]``, see :attr:`latencies`;
    - ``swap_stb``: the activations of the same cycle are the first to meet the loaded tile;
    - ``load_stb``: ``weights`` become column ``column`` of the next tile. The loads of a tile may begin in the cycle
      after the previous tile's swap, ``load_interval`` cycles apart or more, and its own swap may come ``load_cycles``
      cycles after its last load or later: a tile needs :func:`~nibblecore.arch.elements.tile_cycles`, and nothing is
      lost between tiles. Where ``load_cycles`` is not 0 (:func:`~nibblecore.arch.elements.element_timing`), every swap
      needs a tile of its own, with its columns in ascending order. Without ``overlaps``, the array works or loads: from
      the cycle of the load of column ``fill_columns - 1`` to that before the swap, activations give no sums that mean
      something. :func:`~nibblecore.arch.elements.swap_cycles` is what that takes.

    If some columns are ``dsp`` elements (``arch.paired_columns``), the activations of a cycle with ``swap_stb`` and of
    the next make a pair, and so do those of every two cycles that follow, up to the next swap. A swap may come at any
    time; but if the cycle before it is the first one of a pair, the activations of that cycle give no sum in those
    columns. And every column is loaded between two swaps, in ascending order.

    No backpressure and no valid bit: every cycle's activations are multiplied, and whoever sends them knows which sums
    mean something. Sums are exact for weights of ``arch.weight_range``. A reset changes no weight.

    Parameters
    ----------
    arch : ArchConfig
        ``lanes``, ``columns``, ``post_lanes``, ``element``, ``dsp_columns`` and ``adder_levels`` count.
    technology : {"generic", "ecp5"}
        Primitives that the elements may instantiate.

    Members
    -------
    activations : In(word_layout(arch))
    swap_stb : In(1)
    weights : In(word_layout(arch))
    column : In(log2(columns))
    load_stb : In(1)
    sums : Out(ArrayLayout(signed(8 + log2(lanes)), columns))

    Raises
    ------
    ValueError
        If the element or the technology is unknown.
    """

    activations: data.View
    swap_stb: Signal
    weights: data.View
    column: Signal
    load_stb: Signal
    sums: data.View

    def __init__(self, arch: ArchConfig, *, technology: str = "generic") -> None:
        self._arch = arch
        # Built here and not in elaborate(), because they know the latency. An array may be asked for that alone.
        plain_columns = arch.columns - arch.paired_columns
        self._timing = element_timing(arch)
        self._elements: list[DotElement] = []
        self._tables: list[TableColumns] = []
        if self._timing.fill_columns:
            self._tables = [
                TableColumns(
                    lanes=arch.lanes,
                    columns=arch.post_lanes,
                    technology=technology,
                    levels_per_stage=arch.adder_levels,
                    banks=self._timing.table_banks,
                )
                for _ in range(plain_columns // arch.post_lanes)
            ]
            self._fill = TableFill(
                lanes=arch.lanes,
                columns=self._timing.fill_columns,
                blocks=arch.columns // self._timing.fill_columns,
                technology=technology,
                banks=self._timing.table_banks,
            )
        else:
            options = {"levels_per_stage": arch.adder_levels} if arch.element == "bitplane" else {}
            self._elements = [
                make_element(arch.element, lanes=arch.lanes, inverted=True, technology=technology, **options)
                for _ in range(plain_columns)
            ]
        self._quads = [
            DspQuad(lanes=arch.lanes, technology=technology) for _ in range(arch.paired_columns // DspQuad.COLUMNS)
        ]
        word = word_layout(arch)
        super().__init__(
            {
                "activations": In(word),
                "swap_stb": In(1),
                "weights": In(word),
                "column": In(ceil_log2(arch.columns)),
                "load_stb": In(1),
                "sums": Out(data.ArrayLayout(signed(self.sum_bits), arch.columns)),
            }
        )

    @property
    def latencies(self) -> tuple[int, ...]:
        """Cycles from ``activations`` to the sums of each group."""
        arch = self._arch
        groups, paired = arch.columns // arch.post_lanes, arch.paired_columns // arch.post_lanes
        first: list[DotElement | TableColumns] = [*self._elements[:1], *self._tables[:1]]
        of_elements = [1 + element.latency for element in first] * (groups - paired)
        of_quads = [1 + DspHead.LATENCY + self._quads[0].latency] * paired if self._quads else []
        return tuple(latency + group for group, latency in enumerate(of_elements + of_quads))

    @property
    def sum_bits(self) -> int:
        """Width of a sum."""
        return 8 + ceil_log2(self._arch.lanes)

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        arch = self._arch
        word = word_layout(arch)
        swap, load, column = Signal(reset_less=True), self.load_stb, self.column
        activations, weights = Signal(word, reset_less=True), Signal(word, name="weights0")
        # Bits that elements store inverted are inverted here, once for all columns.
        activation_polarity = self._elements[0].ACTIVATION_POLARITY if self._elements else 0
        weight_polarity = self._elements[0].WEIGHT_POLARITY if self._elements else 0
        m.d.comb += weights.as_value().eq(self.weights.as_value() ^ Const(weight_polarity, 4).replicate(arch.lanes))
        m.d.sync += [
            activations.as_value().eq(
                self.activations.as_value() ^ Const(activation_polarity, 4).replicate(arch.lanes)
            ),
            swap.eq(self.swap_stb),
        ]
        plain_groups = (arch.columns - arch.paired_columns) // arch.post_lanes
        for group in range(plain_groups + bool(self._quads) if self._elements or self._quads else 0):
            if group:
                hop_activations = Signal(word, name=f"activations{group}", reset_less=True)
                hop_weights = Signal(word, name=f"weights{group}", reset_less=True)
                hop_column = Signal.like(self.column, name=f"column{group}", reset_less=True)
                hop_swap, hop_load = (Signal(name=f"{n}{group}", reset_less=True) for n in ("swap", "load"))
                m.d.sync += [
                    hop_activations.eq(activations),
                    hop_swap.eq(swap),
                    hop_weights.eq(weights),
                    hop_column.eq(column),
                    hop_load.eq(load),
                ]
                activations, weights = hop_activations, hop_weights
                swap, load, column = hop_swap, hop_load, hop_column
            if group == plain_groups:
                break
            if self._tables:
                continue
            for n in range(group * arch.post_lanes, (group + 1) * arch.post_lanes):
                element = self._elements[n]
                m.submodules[f"column{n}"] = element
                m.d.comb += [
                    element.activations.eq(activations),
                    element.swap_stb.eq(swap),
                    element.weights.eq(weights),
                    element.load_stb.eq(load & (column == n)),
                    self.sums[n].eq(element.sum),
                ]
        if self._tables:
            self._add_tables(m)
        if self._quads:
            m.submodules.head = head = DspHead(
                lanes=arch.lanes,
                column_bits=len(self.column),
                activation_polarity=activation_polarity,
                weight_polarity=weight_polarity,
            )
            m.d.comb += [
                head.activations.eq(activations),
                head.swap_stb.eq(swap),
                head.weights.eq(weights),
                head.load_stb.eq(load),
                head.column.eq(column),
            ]
            self._add_quads(m, head)
        return m

    def _add_tables(self, m: Module) -> None:
        """Groups whose columns share LUT RAMs. Their entries are made in one place, and hop as activations do."""
        arch, fill = self._arch, self._fill
        m.submodules.fill = fill
        coded = Signal(arch.word_bits, name="coded0", reset_less=True)
        bank, swap = (Signal(name=f"{n}0", reset_less=True) for n in ("bank", "table_swap"))
        m.d.sync += [
            coded.eq(code_activations(self.activations, banks=self._timing.table_banks)),
            bank.eq(bank ^ self.swap_stb),
            swap.eq(self.swap_stb),
        ]
        m.d.comb += [
            fill.weights.eq(self.weights),
            fill.column.eq(self.column),
            fill.load_stb.eq(self.load_stb),
        ]
        banks = self._timing.table_banks
        if banks == 2:
            m.d.comb += fill.bank.eq(bank)
        if arch.columns > fill.columns:
            m.d.comb += fill.block.eq(self.column[ceil_log2(fill.columns) :])
        # Of a block of columns, every group takes its own.
        parts = fill.columns // arch.post_lanes
        write, write_stb, base_stb = fill.o, fill.o_stb, fill.base_stb
        for group, table in enumerate(self._tables):
            if group:
                hop_coded = Signal.like(coded, name=f"coded{group}", reset_less=True)
                hop_write = data.View(write.shape(), Signal(write.shape().size, name=f"write{group}", reset_less=True))
                hop_bank = Signal(name=f"bank{group}", reset_less=True)
                hop_swap = Signal(name=f"table_swap{group}", reset_less=True)
                hop_stb, hop_base_stb = (
                    Signal.like(write_stb, name=f"{n}{group}", reset_less=True) for n in ("write_stb", "base_stb")
                )
                m.d.sync += [
                    hop_coded.eq(coded),
                    hop_bank.eq(bank),
                    hop_swap.eq(swap),
                    hop_write.eq(write),
                    hop_stb.eq(write_stb),
                    hop_base_stb.eq(base_stb),
                ]
                coded, bank, swap, write = hop_coded, hop_bank, hop_swap, hop_write
                write_stb, base_stb = hop_stb, hop_base_stb
            first = group % parts * arch.post_lanes
            own = range(first, first + arch.post_lanes)
            m.submodules[f"group{group}"] = table
            m.d.comb += [
                table.activations.eq(coded),
                table.write.index.eq(write.index),
                *(
                    table.write.entries[n].eq(Cat(entries[column] for column in own))
                    for n, entries in enumerate(write.entries)
                ),
                table.write.base.eq(Cat(write.base[column] for column in own)),
                table.write_stb.eq(write_stb[group // parts]),
                table.base_stb.eq(base_stb[group // parts]),
            ]
            if banks == 2:
                m.d.comb += [
                    table.bank.eq(bank),
                    table.swap_stb.eq(swap),
                    table.write.bank.eq(write.bank),
                    table.write.odd.eq(Cat(write.odd[column] for column in own)),
                ]
            sums = self.sums.as_value().word_select(group, arch.post_lanes * self.sum_bits)
            m.d.comb += sums.eq(table.sums)

    def _add_quads(self, m: Module, head: DspHead) -> None:
        """Quads of two groups at a time: the columns of the second one, which are a cycle later, are its others."""
        arch = self._arch
        first_column, half = arch.columns - arch.paired_columns, arch.post_lanes // 2
        pairs, select, bank = head.pairs, head.select, head.bank
        weights, column, load, load_bank = head.o_weights, head.o_column, head.o_load_stb, head.o_load_bank
        for unit in range(arch.paired_columns // (2 * arch.post_lanes)):
            if unit:
                # A pair stays for two cycles and so reaches the next two groups two cycles later through one register.
                # Weights hop in one: they may come as early as the last ones of the tile before have been read, and
                # those groups' are the later ones of a tile.
                hop_pairs = Signal(head.pairs.shape(), name=f"pairs{unit}", reset_less=True)
                hop_select, hop_bank = (
                    [Signal(name=f"{n}{unit}_{i}", reset_less=True) for i in range(2)] for n in ("select", "bank")
                )
                hop_weights = Signal(head.weights.shape(), name=f"paired_weights{unit}", reset_less=True)
                hop_column = Signal.like(column, name=f"paired_column{unit}", reset_less=True)
                hop_load, hop_load_bank = (
                    Signal(name=f"paired_{n}{unit}", reset_less=True) for n in ("load", "load_bank")
                )
                with m.If(select):
                    m.d.sync += hop_pairs.eq(pairs)
                m.d.sync += [
                    hop_select[0].eq(select),
                    hop_select[1].eq(hop_select[0]),
                    hop_bank[0].eq(bank),
                    hop_bank[1].eq(hop_bank[0]),
                    hop_weights.eq(weights),
                    hop_column.eq(column),
                    hop_load.eq(load),
                    hop_load_bank.eq(load_bank),
                ]
                pairs, select, bank = hop_pairs, hop_select[1], hop_bank[1]
                weights, column, load, load_bank = hop_weights, hop_column, hop_load, hop_load_bank
            for n in range(half):
                number = unit * half + n
                quad = self._quads[number]
                m.submodules[f"quad{number}"] = quad
                low = first_column + 2 * unit * arch.post_lanes + 2 * n
                columns = [low, low + 1, low + arch.post_lanes, low + arch.post_lanes + 1]
                late = ceil_log2(arch.post_lanes)  # the bit of a column's index that tells the second group
                m.d.comb += [
                    quad.pairs.eq(pairs),
                    quad.select.eq(select),
                    quad.bank.eq(bank),
                    quad.weights.eq(weights),
                    quad.load_stb.eq(load & (column[late + 1 :] == low >> (late + 1)) & (column[1:late] == n)),
                    quad.load_bank.eq(load_bank),
                    quad.load_column.eq(Cat(column[0], column[late])),
                    *(self.sums[c].eq(quad.sums[i]) for i, c in enumerate(columns)),
                ]

    def model(self, activations: list[int], tile: list[list[int]]) -> list[int]:
        """One word's sums: ``activations`` are ``lanes`` nibbles, ``tile`` holds ``lanes`` weights per column."""
        return [DotElement.model(activations, column) for column in tile]
