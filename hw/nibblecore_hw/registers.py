"""Registers: delays, of streams, and copies that synthesis leaves apart."""

from typing import Any

from amaranth import Const, Module, Mux, Signal, Value
from amaranth.hdl import ShapeLike
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["SkidBuffer", "copies", "delayed"]


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


class SkidBuffer(wiring.Component):
    """A stream register: one item per cycle, and neither ``i.ready`` nor ``o`` depends on anything of the same cycle.

    An item is at the output :attr:`LATENCY` cycle after it was taken. Two items fit.

    Parameters
    ----------
    shape : ShapeLike
        Shape of an item.
    groups : int
        The bits of an item are cut into so many groups, 1..4, which have registers of their own for what lets them go
        on: for items of so many bits that one register would be far from most of them. With more than one, no item may
        come in the cycle behind a reset or in the first one of all.

    Members
    -------
    i : In(stream.Signature(shape))
    o : Out(stream.Signature(shape))
    """

    LATENCY = 1

    i: Any
    o: Any

    def __init__(self, *, shape: ShapeLike, groups: int = 1) -> None:
        if groups not in range(1, 5):
            raise ValueError(f"groups must be in 1..4, not {groups!r}")
        self._groups = groups
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        groups = self._groups
        payload = Value.cast(self.i.payload)
        out, kept = Signal(len(payload), reset_less=True), Signal(len(payload), reset_less=True)
        out_valid, kept_valid = Signal(), Signal()
        waits = Signal()
        out_valid_next, kept_valid_next = Signal(), Signal()
        m.d.comb += [
            self.i.ready.eq(~kept_valid),
            self.o.valid.eq(out_valid),
            Value.cast(self.o.payload).eq(out),
            waits.eq(out_valid & ~self.o.ready),
            out_valid_next.eq(waits | kept_valid | self.i.valid),
            kept_valid_next.eq(waits & (kept_valid | self.i.valid)),
        ]
        m.d.sync += [out_valid.eq(out_valid_next), kept_valid.eq(kept_valid_next)]
        out_valids, kept_valids = (
            [register] if groups == 1 else copies(m, following, groups, name=name)
            for register, following, name in (
                (out_valid, out_valid_next, "out_valid"), (kept_valid, kept_valid_next, "kept_valid")
            )
        )  # fmt: skip
        for n, (here, there) in enumerate(zip(out_valids, kept_valids, strict=True)):
            part = slice(n * len(payload) // groups, (n + 1) * len(payload) // groups)
            with m.If(~here | self.o.ready):
                m.d.sync += out[part].eq(Mux(there, kept[part], payload[part]))
            with m.If(~there):
                m.d.sync += kept[part].eq(payload[part])
        return m


def delayed(m: Module, value: Value, cycles: int, name: str) -> Value:
    """``value`` behind ``cycles`` registers without reset, named ``<name>_<n>``."""
    for i in range(1, cycles + 1):
        stage = Signal(value.shape(), name=f"{name}_{i}", reset_less=True)
        m.d.sync += stage.eq(value)
        value = stage
    return value
