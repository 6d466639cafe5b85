"""The semaphores between the engines."""

from typing import Any

from amaranth import Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch.isa import Engine

ENGINES = len(Engine)
MASKS = data.ArrayLayout(ENGINES, ENGINES)
"""One mask of engines per engine."""


class Semaphores(wiring.Component):
    """One counter from each engine to each other one.

    A counter moves one cycle after ``signal`` or ``take``; both in one cycle leave it as it is. It neither wraps nor
    saturates: who signals must not do so where ``full`` is set, who takes must not where ``available`` is clear (the
    issue stages see to both; a violation is ignored in the counter at its end). All counters start at 0.

    Parameters
    ----------
    bits : int
        Width of a counter, 2..8.

    Members
    -------
    signal : In(MASKS)
        ``signal[a]`` bit ``b``: engine ``a`` signals engine ``b``.
    take : In(MASKS)
        ``take[b]`` bit ``a``: engine ``b`` takes one of what engine ``a`` has signalled.
    available : Out(MASKS)
        ``available[b]`` bit ``a``: there is one to take.
    full : Out(MASKS)
        ``full[a]`` bit ``b``: engine ``a`` cannot signal engine ``b`` now.

    counts : dict
        The counter from engine ``a`` to engine ``b``, by ``(a, b)``; not a port, for specs and benches.

    Raises
    ------
    ValueError
        If ``bits`` is not such a number.
    """

    LATENCY = 1

    signal: Any
    take: Any
    available: Any
    full: Any

    def __init__(self, *, bits: int) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits must be in 2..8, not {bits!r}")
        self._bits = bits
        # Made here and not in `elaborate`, so that a spec or a bench can look at them.
        self.counts = {
            (a, b): Signal(bits, name=f"{a.name.lower()}_to_{b.name.lower()}")
            for a in Engine
            for b in Engine
            if a is not b
        }
        super().__init__({"signal": In(MASKS), "take": In(MASKS), "available": Out(MASKS), "full": Out(MASKS)})

    @property
    def maximum(self) -> int:
        """The count at which a semaphore is full."""
        return (1 << self._bits) - 1

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for (a, b), count in self.counts.items():
            up, down = self.signal[int(a)][int(b)], self.take[int(b)][int(a)]
            m.d.comb += [
                self.available[int(b)][int(a)].eq(count != 0),
                self.full[int(a)][int(b)].eq(count == self.maximum),
            ]
            # One adder for both directions, and what moves the counter is its clock enable.
            with m.If(Mux(up, ~down & (count != self.maximum), down & (count != 0))):
                m.d.sync += count.eq(count + Mux(down, -1, 1))
        return m
