"""Registers that synthesis leaves apart."""

from amaranth import Const, Module, Signal, Value

__all__ = ["copies"]


def copies(m: Module, value: Value, count: int, *, name: str, enable: Value | None = None) -> list[Value]:
    """``value`` one cycle later, unsigned, from each of ``count`` registers that synthesis leaves apart.

    For what reaches so much that one register cannot be near all of it. They keep what they hold where ``enable`` is
    given and 0. ``ValueError`` where ``count`` is not in 1..4.

    Yosys makes one of registers with the same input, whatever attributes they have. These have different contents after
    power-up; from the third one on, they store the opposite, which takes LUTs where a block RAM is behind them.
    """
    if count not in range(1, 5):
        raise ValueError(f"count must be in 1..4, not {count!r}")
    result: list[Value] = []
    enable = Const(1) if enable is None else enable
    for n in range(count):
        register = Signal(len(value), name=f"{name}_copy{n}", init=-(n & 1), reset_less=True)
        with m.If(enable):
            m.d.sync += register.eq(~value if n & 2 else value)
        result.append(~register if n & 2 else register)
    return result
