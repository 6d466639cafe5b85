"""Builds the adders and registers of a plan, as synthesis infers them or as carry chains."""

from collections.abc import Callable

from amaranth.hdl import Cat, Const, Module, Signal, Value

from .ecp5 import add_chains, plan_chains
from .heap import Bit, Leaf, One, Plan, Row, Wire


def add_plan(
    m: Module,
    plan: Plan,
    *,
    technology: str,
    chain_cells: int,
    value: Callable[[Leaf], Value],
    gate: Callable[[Leaf], tuple[int, tuple[Value, Value]]],
    name: str = "",
) -> Value:
    """Add up the leaves of ``plan``; the result is signed and ``plan.stages`` cycles behind them.

    Both technologies have the same registers and the same sums in every cycle.

    Parameters
    ----------
    m : Module
        Gets the adders; on ``ecp5``, one submodule per ``CCU2C``.
    plan : Plan
    technology : {"generic", "ecp5"}
        Adders that synthesis infers, or carry cells.
    chain_cells : int
        Longest carry chain in half-cells; ignored by ``generic``.
    value : callable
        Gives a leaf; for ``generic``.
    gate : callable
        Gives a leaf as a function of two registers, bit ``a + 2 * b`` of a table being its value for ``a, b``; for
        ``ecp5``.
    name : str
        What the names of signals and submodules begin with.
    """
    sums = [Signal(row.width, name=f"{name}row{row.index}") for row in plan.rows]
    # delayed[wire][n]: the wire behind n registers.
    delayed: dict[Wire, list[Value]] = {}
    for wire, stage in plan.last_use.items():
        row = plan.rows[wire.row]
        delayed[wire] = [sums[wire.row][wire.bit]]
        for n in range(plan.stage_of_level[row.level], stage):
            register = Signal(name=f"{name}row{wire.row}_{wire.bit}_stage{n}", reset_less=True)
            m.d.sync += register.eq(delayed[wire][-1])
            delayed[wire].append(register)

    def wired(row: Row, wire: Wire) -> Value:
        age = plan.stage_of_level[row.level] - plan.stage_of_level[plan.rows[wire.row].level]
        return delayed[wire][age]

    def bit_value(row: Row, bit: Bit | None) -> Value:
        match bit:
            case None:
                return Const(0, 1)
            case Wire():
                return wired(row, bit)
            case One():
                return Const(1, 1)
            case _:
                return value(bit)

    for row in plan.rows:
        if row.is_gate:
            m.d.comb += sums[row.index].eq(bit_value(row, row.left[0]))
        elif technology == "generic":
            left = Cat(bit_value(row, bit) for bit in row.left)
            right = Cat(bit_value(row, bit) for bit in row.right)
            if row.carry is None:
                total = left + right
            else:
                # A third addend would become an adder of its own; one more bit below is only a carry.
                carry = bit_value(row, row.carry)
                total = (Cat(carry, left) + Cat(carry, right))[1:]
            flip = row.invert_top << (row.width - 1)
            m.d.comb += sums[row.index].eq(total[: row.width] ^ flip)
    if technology == "ecp5":
        chains = plan_chains(plan, chain_cells=chain_cells)
        add_chains(m, chains, sums=sums, gate=gate, wired=wired, name=f"{name}chain")
    return Cat(delayed[wire][-1] for wire in plan.result).as_signed()
