"""The element that multiplies bit by bit, and adds bit products in as few cells as possible."""

from typing import Any

from amaranth.hdl import Module, Signal, Value

from ...technology import check_technology
from .base import DotElement, check_int
from .heap import Leaf, Plan, Product, plan_dot
from .summation import add_plan

# Activation bit 3 and weight bits 1 and 2 are inverted in the registers; heap.second_operand says why.
ACTIVATION_POLARITY = 0b1000
WEIGHT_POLARITY = 0b0110


class BitplaneDot(DotElement):
    """Dot product as a sum of bit products ``a_i[k] & w_i[j]``, with the weights in flip-flops.

    Members are those of :class:`DotElement`. The latency depends on ``lanes`` and ``levels_per_stage`` and not on
    ``technology``: both technologies have the same registers and the same sums in every cycle.

    Parameters
    ----------
    lanes, inverted
        As in :class:`DotElement`.
    technology : {"generic", "ecp5"}
        ``generic``: adders that synthesis infers; for simulation and for any FPGA. ``ecp5``: ``CCU2C`` carry cells that
        take two bit products each, several adders in one carry chain. The Amaranth simulator refuses their instances;
        for Verilator, ``ecp5_models.v`` beside this file holds a model.
    levels_per_stage : int
        Adders between two registers, 1..4. More save flip-flops and cost clock frequency.
    chain_cells : int
        Longest carry chain in half-cells (bits), 16..192; ignored by ``generic``. Every chain costs up to four sites
        for its ends; static timing analysis charges its whole length to every adder in it.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """

    ACTIVATION_POLARITY = ACTIVATION_POLARITY
    WEIGHT_POLARITY = WEIGHT_POLARITY

    def __init__(
        self,
        *,
        lanes: int,
        inverted: bool = False,
        technology: str = "generic",
        levels_per_stage: int = 2,
        chain_cells: int = 48,
    ) -> None:
        self._technology = check_technology(technology)
        check_int("levels_per_stage", levels_per_stage, 1, 4)
        check_int("chain_cells", chain_cells, 16, 192)
        super().__init__(lanes=lanes, inverted=inverted)
        self._chain_cells = chain_cells
        self._plan = plan_dot(lanes=lanes, levels_per_stage=levels_per_stage)

    @property
    def latency(self) -> int:
        return 1 + self._plan.stages

    @property
    def technology(self) -> str:
        """Primitives that are instantiated."""
        return self._technology

    @property
    def plan(self) -> Plan:
        """Which bits meet in which adder."""
        return self._plan

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        lanes = range(self.lanes)
        activations = [Signal(4, name=f"activation{n}", init=ACTIVATION_POLARITY, reset_less=True) for n in lanes]
        shadow = [Signal(4, name=f"shadow{n}", init=WEIGHT_POLARITY, reset_less=True) for n in lanes]
        active = [Signal(4, name=f"active{n}", init=WEIGHT_POLARITY, reset_less=True) for n in lanes]
        for n in lanes:
            m.d.sync += activations[n].eq(self.activations[n].as_unsigned() ^ self._invert_activation)
            with m.If(self.load_stb):
                m.d.sync += shadow[n].eq(self.weights[n].as_unsigned() ^ self._invert_weight)
            with m.If(self.swap_stb):
                m.d.sync += active[n].eq(shadow[n])

        def stored(leaf: Leaf) -> tuple[Value, Value]:
            assert isinstance(leaf, Product)
            return activations[leaf.lane][leaf.activation_bit], active[leaf.lane][leaf.weight_bit]

        def value(leaf: Leaf) -> Value:
            assert isinstance(leaf, Product)
            a, w = stored(leaf)
            a = ~a if ACTIVATION_POLARITY >> leaf.activation_bit & 1 else a
            w = ~w if WEIGHT_POLARITY >> leaf.weight_bit & 1 else w
            return ~(a & w) if leaf.inverted else a & w

        def gate(leaf: Leaf) -> tuple[int, tuple[Value, Value]]:
            assert isinstance(leaf, Product)
            table = 0
            for entry in range(4):
                a = entry & 1 ^ ACTIVATION_POLARITY >> leaf.activation_bit & 1
                w = entry >> 1 ^ WEIGHT_POLARITY >> leaf.weight_bit & 1
                table |= (a & w ^ leaf.inverted) << entry
            return table, stored(leaf)

        total = add_plan(
            m, self._plan, technology=self._technology, chain_cells=self._chain_cells, value=value, gate=gate
        )
        m.d.comb += self.sum.eq(total)
        return m
