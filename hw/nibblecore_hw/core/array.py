# amaranth: UnusedElaboratable=no
"""The systolic array: columns of processing elements through which activation words travel group by group."""

from typing import Any

from amaranth import Const, Module, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig

from ..layouts import word_layout
from .elements import make_element


class SystolicArray(wiring.Component):
    """``columns`` dot products of one activation word, with a weight tile each way: one works, the next is loaded.

    Columns stand in groups of ``post_lanes``. Activations and swap reach group 0 through one register and every further
    group through one more; weights reach group 0 directly and every further group through one register. So, counted in
    cycles at the ports, what comes in cycle ``k`` is worth in group ``g``:

    - ``activations``: ``sums`` of the group's columns in cycle ``k + latency + g``, see :attr:`latency`;
    - ``swap_stb``: the activations of the same cycle are the first to meet the loaded tile;
    - ``load_stb``: ``weights`` become column ``column`` of the next tile. The loads of a tile may begin in the cycle
      after the previous tile's swap, and its own swap may come in the cycle of its last load or later: a tile needs
      ``columns`` cycles, and nothing is lost between tiles.

    No backpressure and no valid bit: every cycle's activations are multiplied, and whoever sends them knows which sums
    mean something. Sums are exact. A reset changes no weight.

    Parameters
    ----------
    arch : ArchConfig
        ``lanes``, ``columns``, ``post_lanes`` and ``element`` count.
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
        self._elements = [
            make_element(arch.element, lanes=arch.lanes, inverted=True, technology=technology)
            for _ in range(arch.columns)
        ]
        if self._elements[0].load_cycles != 1:
            cycles = self._elements[0].load_cycles
            raise ValueError(
                f"element {arch.element!r} takes {cycles} cycles from load to swap, and the timing of the "
                "array allows 1"
            )
        word = word_layout(arch)
        super().__init__(
            {
                "activations": In(word),
                "swap_stb": In(1),
                "weights": In(word),
                "column": In(ceil_log2(arch.columns)),
                "load_stb": In(1),
                "sums": Out(data.ArrayLayout(signed(len(self._elements[0].sum)), arch.columns)),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from ``activations`` to the sums of group 0."""
        return 1 + self._elements[0].latency

    @property
    def latencies(self) -> tuple[int, ...]:
        """Cycles from ``activations`` to the sums of each group."""
        return tuple(self.latency + group for group in range(self._arch.columns // self._arch.post_lanes))

    @property
    def sum_bits(self) -> int:
        """Width of a sum."""
        return len(self._elements[0].sum)

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        arch = self._arch
        word = word_layout(arch)
        swap, load, column = Signal(), self.load_stb, self.column
        activations, weights = Signal(word, reset_less=True), Signal(word, name="weights0")
        # Bits that elements store inverted are inverted here, once for all columns.
        element = self._elements[0]
        m.d.comb += weights.as_value().eq(
            self.weights.as_value() ^ Const(element.WEIGHT_POLARITY, 4).replicate(arch.lanes)
        )
        m.d.sync += [
            activations.as_value().eq(
                self.activations.as_value() ^ Const(element.ACTIVATION_POLARITY, 4).replicate(arch.lanes)
            ),
            swap.eq(self.swap_stb),
        ]
        for group in range(arch.columns // arch.post_lanes):
            if group:
                hop_activations = Signal(word, name=f"activations{group}", reset_less=True)
                hop_weights = Signal(word, name=f"weights{group}", reset_less=True)
                hop_column = Signal.like(self.column, name=f"column{group}", reset_less=True)
                hop_swap, hop_load = Signal(name=f"swap{group}"), Signal(name=f"load{group}")
                m.d.sync += [
                    hop_activations.eq(activations),
                    hop_swap.eq(swap),
                    hop_weights.eq(weights),
                    hop_column.eq(column),
                    hop_load.eq(load),
                ]
                activations, weights = hop_activations, hop_weights
                swap, load, column = hop_swap, hop_load, hop_column
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
        return m

    def model(self, activations: list[int], tile: list[list[int]]) -> list[int]:
        """One word's sums: ``activations`` are ``lanes`` nibbles, ``tile`` holds ``lanes`` weights per column."""
        return [self._elements[0].model(activations, column) for column in tile]
