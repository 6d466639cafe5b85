"""Adders of a plan as merged carry chains of the ECP5.

A ``CCU2C`` is two half-cells, each a 4-input table with a carry: ``S = T(A, B, C, D) ^ carry``; the carry out is the
carry in where ``T`` is 1, and elsewhere what the table says for ``A, B`` with ``C = D = 0``. (Source: the cell model of
Yosys, ``ecp5/ccu2c_sim.vh``.) So one half-cell adds two bit products: ``T = (A & B) ^ (C & D)``, whose lowest four
entries ``A & B`` are the carry that is due where both addends are equal.

nextpnr adds four sites to every chain for entering and leaving it. Adders are therefore put one behind the other, with
a *joint* between them: a half-cell whose table is 0 for ``C = D = 1``, so that its sum is the carry out of the adder
below; its carry out, any function of ``A`` and ``B``, is the carry in of the adder above.
"""

import dataclasses
from collections.abc import Callable, Sequence

from amaranth.hdl import Const, Instance, Module, Signal, Value

from .heap import Bit, Leaf, One, Plan, Row, Wire


def plan_chains(plan: Plan, *, chain_cells: int) -> list[list[Row]]:
    """Distribute the rows over chains of at most ``chain_cells`` half-cells, about equally long.

    Rows share a chain only if they are equally far from the registers before them: a chain never runs through logic
    that comes back to it.
    """
    first_level = [plan.stage_of_level.index(stage) for stage in plan.stage_of_level]
    phases: dict[int, list[Row]] = {}
    for row in plan.rows:
        if not row.is_gate:
            phases.setdefault(row.level - first_level[row.level], []).append(row)

    chains: list[list[Row]] = []
    for rows in phases.values():
        count = -(-sum(row.cells + 1 for row in rows) // chain_cells)
        while True:
            bins: list[list[Row]] = [[] for _ in range(count)]
            for row in sorted(rows, key=lambda row: -row.cells):
                min(bins, key=_half_cells).append(row)
            if all(_half_cells(chain) <= chain_cells for chain in bins):
                break
            count += 1
        for chain in bins:
            # A carry that is no leaf enters the chain without a joint before the first row.
            chain.sort(key=lambda row: isinstance(row.carry, Leaf))
            chains.append(chain)
    return chains


def _half_cells(chain: list[Row]) -> int:
    return sum(row.cells + 1 for row in chain)


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An addend of a half-cell, a function of two inputs: bit ``a + 2 * b`` of ``table`` for inputs ``a, b``."""

    table: int
    inputs: tuple[Value, Value]
    fixed: bool
    """Whether the second input is the constant 1."""


_ONE = Const(1, 1)


class _HalfCell:
    """One half of a ``CCU2C``; ``sum`` is where its sum goes, ``None`` for nowhere."""

    def __init__(self, left: _Operand, right: _Operand, *, sum: Value | None, invert: bool = False) -> None:
        if not right.fixed and right.table & 1:
            raise AssertionError("the right operand must be 0 where both of its inputs are")
        init = 0
        for entry in range(16):
            init |= ((left.table >> (entry & 3) ^ right.table >> (entry >> 2) ^ invert) & 1) << entry
        if right.fixed:
            # D = 1: the lowest four entries are only read as the carry.
            init = init & ~0xF | left.table
        elif invert:
            raise AssertionError("an inverted sum needs a right operand with a free input")
        self.init = init
        self.inputs = (*left.inputs, *right.inputs)
        self.sum = sum


def _joint(carry: _Operand, *, sum: Value | None) -> _HalfCell:
    cell = _HalfCell(carry, _Operand(0, (_ONE, _ONE), fixed=True), sum=sum)
    cell.init = carry.table
    return cell


def add_chains(
    m: Module,
    chains: list[list[Row]],
    *,
    sums: Sequence[Signal],
    gate: Callable[[Leaf], tuple[int, tuple[Value, Value]]],
    wired: Callable[[Row, Wire], Value],
    name: str = "chain",
) -> None:
    """Instantiate the chains.

    Parameters
    ----------
    m : Module
        Gets one submodule per ``CCU2C``.
    chains : list of list of Row
        From :func:`plan_chains`.
    sums : sequence of Signal
        Driven here: the output of each row, by the row's index.
    gate : callable
        Gives a leaf as a function of two registers: bit ``a + 2 * b`` of a table is its value for ``a, b``.
    wired : callable
        Gives the signal of a wire as a row sees it.
    name : str
        Submodules are called ``<name><chain>_<n>``.
    """

    def operand(row: Row, bit: Bit | None) -> _Operand:
        match bit:
            case None:
                return _Operand(0b0000, (_ONE, _ONE), fixed=True)
            case Wire():
                return _Operand(0b1010, (wired(row, bit), _ONE), fixed=True)
            case One():
                return _Operand(0b1111, (_ONE, _ONE), fixed=True)
            case _:
                return _Operand(*gate(bit), fixed=False)

    for number, chain in enumerate(chains):
        cells: list[_HalfCell] = []
        carry_in: Value = Const(0, 1)
        carry_out: Value | None = None
        for row in chain:
            carry = operand(row, row.carry)
            if not cells and carry.fixed:
                carry_in = carry.inputs[0] if isinstance(row.carry, Wire) else Const(carry.table & 1, 1)
            else:
                cells.append(_joint(carry, sum=carry_out))
            for n, (left, right) in enumerate(zip(row.left, row.right, strict=True)):
                cells.append(
                    _HalfCell(
                        operand(row, left),
                        operand(row, right),
                        sum=sums[row.index][n],
                        invert=row.invert_top and n == row.cells - 1,
                    )
                )
            carry_out = sums[row.index][row.cells] if row.carry_out else None
        _instantiate(m, cells, name=f"{name}{number}", carry_in=carry_in, carry_out=carry_out)


def add_kept(m: Module, kept: Value, keep: Value, either: tuple[Value, Value], total: Signal, *, name: str) -> None:
    """``total = (kept & keep) + (either[0] | either[1])`` in one chain of ``len(total)`` half-cells.

    All but ``keep``, which is one bit, have the same width; the sum wraps. Submodules are called ``<name>_<n>``.
    """
    cells = [
        _HalfCell(_Operand(0b1110, (a, b), fixed=False), _Operand(0b1000, (c, keep), fixed=False), sum=s)
        for a, b, c, s in zip(*either, kept, total, strict=True)
    ]
    _instantiate(m, cells, name=name, carry_in=Const(0, 1), carry_out=None)


def subtract_gated(
    m: Module,
    differences: Sequence[tuple[Value, Value, Value, Signal]],
    *,
    chain_cells: int,
    name: str,
) -> None:
    """``difference = minuend - (subtrahend & gate)`` for each ``minuend, subtrahend, gate, difference``.

    All but the gate, which is one bit, have the same width; the difference wraps. One half-cell per bit and one more
    per difference, in chains of at most ``chain_cells``. Submodules are called ``<name><chain>_<n>``.
    """
    per_chain = max(1, chain_cells // (len(differences[0][3]) + 1))
    one = _Operand(0b1111, (_ONE, _ONE), fixed=True)
    for number, first in enumerate(range(0, len(differences), per_chain)):
        cells: list[_HalfCell] = []
        for minuend, subtrahend, gate, difference in differences[first : first + per_chain]:
            if cells:
                cells.append(_joint(one, sum=None))
            cells += [
                _HalfCell(_Operand(0b0111, (b, gate), fixed=False), _Operand(0b1010, (a, _ONE), fixed=True), sum=d)
                for a, b, d in zip(minuend, subtrahend, difference, strict=True)
            ]
        _instantiate(m, cells, name=f"{name}{number}", carry_in=_ONE, carry_out=None)


def _instantiate(m: Module, cells: list[_HalfCell], *, name: str, carry_in: Value, carry_out: Value | None) -> None:
    """One chain; an odd number of half-cells gets one more, which gives ``carry_out`` as its sum."""
    if len(cells) % 2:
        cells = [*cells, _joint(_Operand(0b0000, (_ONE, _ONE), fixed=True), sum=carry_out)]
        carry_out = None
    for n in range(0, len(cells), 2):
        ports: dict[str, Value | int | str] = {"i_CIN": carry_in, "p_INJECT1_0": "NO", "p_INJECT1_1": "NO"}
        for half, cell in enumerate(cells[n : n + 2]):
            ports[f"p_INIT{half}"] = Const(cell.init, 16)
            ports |= {f"i_{port}{half}": pin for port, pin in zip("ABCD", cell.inputs, strict=True)}
            # An open pin would be a lint error in Verilator.
            unused = Signal(name=f"{name}_unused{n + half}")
            ports[f"o_S{half}"] = unused if cell.sum is None else cell.sum
        if n + 2 < len(cells) or carry_out is None:
            carry_in = Signal(name=f"{name}_carry{n // 2}")
            ports["o_COUT"] = carry_in
        else:
            ports["o_COUT"] = carry_out
        m.submodules[f"{name}_{n // 2}"] = Instance("CCU2C", **ports)
