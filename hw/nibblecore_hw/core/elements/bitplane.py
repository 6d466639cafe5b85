"""The element that multiplies bit by bit, and adds bit products in as few cells as possible."""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Signal, Value

from .base import DotElement, check_int, check_technology
from .ecp5 import add_chains, plan_chains
from .heap import Bit, Plan, Product, Row, Wire, plan_dot

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

        plan = self._plan
        sums = [Signal(row.width, name=f"row{row.index}") for row in plan.rows]
        # delayed[wire][n]: the wire behind n registers.
        delayed: dict[Wire, list[Value]] = {}
        for wire, stage in plan.last_use.items():
            row = plan.rows[wire.row]
            delayed[wire] = [sums[wire.row][wire.bit]]
            for n in range(plan.stage_of_level[row.level], stage):
                register = Signal(name=f"row{wire.row}_{wire.bit}_stage{n}", reset_less=True)
                m.d.sync += register.eq(delayed[wire][-1])
                delayed[wire].append(register)

        def stored(product: Product) -> tuple[Value, Value]:
            return activations[product.lane][product.activation_bit], active[product.lane][product.weight_bit]

        def wired(row: Row, wire: Wire) -> Value:
            age = plan.stage_of_level[row.level] - plan.stage_of_level[plan.rows[wire.row].level]
            return delayed[wire][age]

        def value(row: Row, bit: Bit | None) -> Value:
            match bit:
                case None:
                    return Const(0, 1)
                case Product():
                    a, w = stored(bit)
                    a = ~a if ACTIVATION_POLARITY >> bit.activation_bit & 1 else a
                    w = ~w if WEIGHT_POLARITY >> bit.weight_bit & 1 else w
                    return ~(a & w) if bit.inverted else a & w
                case Wire():
                    return wired(row, bit)
                case _:
                    return Const(1, 1)

        for row in plan.rows:
            if row.is_gate:
                m.d.comb += sums[row.index].eq(value(row, row.left[0]))
            elif self._technology == "generic":
                left = Cat(value(row, bit) for bit in row.left)
                right = Cat(value(row, bit) for bit in row.right)
                if row.carry is None:
                    total = left + right
                else:
                    # A third addend would become an adder of its own; one more bit below is only a carry.
                    carry = value(row, row.carry)
                    total = (Cat(carry, left) + Cat(carry, right))[1:]
                flip = row.invert_top << (row.width - 1)
                m.d.comb += sums[row.index].eq(total[: row.width] ^ flip)
        if self._technology == "ecp5":
            add_chains(
                m,
                plan_chains(plan, chain_cells=self._chain_cells),
                sums=sums,
                stored=stored,
                wired=wired,
                activation_polarity=ACTIVATION_POLARITY,
                weight_polarity=WEIGHT_POLARITY,
            )

        m.d.comb += self.sum.eq(Cat(delayed[wire][-1] for wire in plan.result).as_signed())
        return m
