"""Additions of signals, each on its own or many in one carry chain of the ECP5."""

import dataclasses
from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value

from .ecp5 import _ONE, _HalfCell, _instantiate, _joint, _Operand


@dataclasses.dataclass(frozen=True, eq=False)
class Addition:
    """``total = (left ^ inverted) + (right ^ inverted) + carry``.

    ``left`` and ``right`` are equally wide, ``total`` is as wide or one bit wider. ``late`` says that operands come
    from far away.
    """

    left: Value
    right: Value
    carry: Value
    total: Signal
    inverted: int = 0
    late: bool = False

    @property
    def bits(self) -> int:
        """Half-cells without that for the carry."""
        return len(self.left)

    def value(self) -> Value:
        """The sum as an expression."""
        # A third addend would become an adder of its own; one more bit below is only a carry.
        left, right = (Cat(self.carry, value ^ self.inverted) for value in (self.left, self.right))
        return (left + right)[1:]

    def half_cells(self) -> list[_HalfCell]:
        """The sum as cells of a chain; ``total``'s bit above ``left``'s is its carry out."""
        cells = []
        for n, (left, right) in enumerate(zip(self.left, self.right, strict=True)):
            table = 0b0101 if self.inverted >> n & 1 else 0b1010
            operands = (_Operand(table, (value, _ONE), fixed=True) for value in (left, right))
            cells.append(_HalfCell(*operands, sum=self.total[n]))
        return cells


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """``total = (values[select] + carry) ^ inverted``, modulo the width that ``values`` and ``total`` have.

    Only the highest bit may be inverted. The multiplexer takes no cell of its own.
    """

    select: Value
    values: tuple[Value, Value]
    carry: Value
    total: Signal
    inverted: int = 0

    @property
    def bits(self) -> int:
        """Half-cells without that for the carry."""
        return len(self.total)

    def value(self) -> Value:
        """The sum as an expression."""
        return (Mux(self.select, self.values[1], self.values[0]) + self.carry)[: self.bits] ^ self.inverted

    def half_cells(self) -> list[_HalfCell]:
        """The sum as cells of a chain."""
        cells = []
        for n, (first, second) in enumerate(zip(*self.values, strict=True)):
            cell = _HalfCell(
                _Operand(0, (first, second), fixed=False),
                _Operand(0, (self.select, _ONE), fixed=True),
                sum=self.total[n],
            )
            # D = 1: the upper half is the chosen bit, the lowest four entries say that 0 + carry carries nothing out.
            cell.init = (0b1100_1010 ^ 0xFF * (self.inverted >> n & 1)) << 8
            cells.append(cell)
        return cells


def add_in_chains(m: Module, operations: Sequence[Addition | Choice], *, chain_cells: int, name: str) -> None:
    """Instantiate operations as carry chains of at most ``chain_cells`` half-cells, about equally long.

    They are cut in their order. Within a chain those with late operands come last: static timing analysis charges an
    operand with all of the chain behind it.

    Neighbours share a chain, between two of them a half-cell that hands the lower one's carry out and the upper one's
    in. So no operation may depend on another within a cycle, or static timing analysis would see a loop.
    """
    total = sum(operation.bits + 1 for operation in operations)
    target = total / -(-total // chain_cells)
    chains: list[list[Addition | Choice]] = [[]]
    length = done = 0
    for operation in operations:
        cells = operation.bits + 1
        if chains[-1] and (length + cells > chain_cells or done + cells / 2 > target * len(chains)):
            chains.append([])
            length = 0
        chains[-1].append(operation)
        length += cells
        done += cells

    for number, chain in enumerate(chains):
        chain.sort(key=lambda operation: isinstance(operation, Addition) and operation.late)
        half_cells: list[_HalfCell] = []
        carry_out: Value | None = None
        for operation in chain:
            if operation is not chain[0]:
                carry = operation.carry
                constant = isinstance(carry, Const)
                operand = (
                    _Operand(0b1111 * carry.value, (_ONE, _ONE), True)
                    if constant
                    else _Operand(0b1010, (carry, _ONE), True)
                )
                half_cells.append(_joint(operand, sum=carry_out))
            half_cells += operation.half_cells()
            carry_out = operation.total[operation.bits] if len(operation.total) > operation.bits else None
        _instantiate(m, half_cells, name=f"{name}{number}", carry_in=chain[0].carry, carry_out=carry_out)
