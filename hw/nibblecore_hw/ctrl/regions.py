"""Looks up the DRAM regions that the instructions of the DMA engines name."""

from typing import Any

from amaranth import Cat, Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch.isa import REGIONS

from ..layouts import REGION_BITS, region_layout


class RegionLookup(wiring.Component):
    """Have base and size of a region ready for an engine when its instruction is offered.

    A client gives the region's number when it meets it; two reads of the regions' registers, one per cycle, bring base
    and size. Of several clients the lowest is served first.

    Cycles: ``region`` is complete 3 cycles after ``number_stb``, and ``ready`` is high from the cycle before that on;
    2 cycles later for each client that is served before.

    Parameters
    ----------
    clients : int
        Engines with regions.

    Members
    -------
    number, number_stb : In(data.ArrayLayout(range(REGIONS), clients)), In(clients)
        The instruction that is being brought names this region.
    region : Out(data.ArrayLayout(region_layout(), clients))
        The region that was named last, as the registers described it then.
    ready : Out(clients)
        In the next cycle ``region`` is complete. Arbitrary in the cycle of ``number_stb``.
    en, select, size : Out(1), Out(3), Out(1)
        To the registers: read that region's base, or its size.
    word : In(32)
        What they hold, in the same cycle.
    """

    number: Any
    number_stb: Signal
    region: Any
    ready: Signal
    en: Signal
    select: Signal
    size: Signal
    word: Signal

    def __init__(self, *, clients: int) -> None:
        self._clients = clients
        super().__init__(
            {
                "number": In(data.ArrayLayout(range(REGIONS), clients)),
                "number_stb": In(clients),
                "region": Out(data.ArrayLayout(region_layout(), clients)),
                "ready": Out(clients),
                "en": Out(1),
                "select": Out(range(REGIONS)),
                "size": Out(1),
                "word": In(REGION_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        free: Any = 1
        for n in range(self._clients):
            number = Signal(range(REGIONS), name=f"number_{n}", reset_less=True)
            wanted, size = Signal(name=f"wanted_{n}"), Signal(name=f"size_{n}")
            region = Signal(2 * REGION_BITS, name=f"region_{n}", reset_less=True)
            served = Signal(name=f"served_{n}")
            m.d.comb += [
                served.eq(wanted & free),
                self.ready[n].eq(~wanted | (served & size)),
                self.region[n].as_value().eq(region),
            ]
            with m.If(served):
                m.d.comb += [self.en.eq(1), self.select.eq(number), self.size.eq(size)]
                # The base comes first, and moves down.
                m.d.sync += [region.eq(Cat(region, self.word)[REGION_BITS:]), size.eq(1), wanted.eq(~size)]
            with m.If(self.number_stb[n]):
                m.d.sync += [number.eq(self.number[n]), wanted.eq(1), size.eq(0)]
            free = free & ~wanted
        return m
