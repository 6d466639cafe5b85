"""AXI4 helpers: constant signals, a register for the data channels, and the arbiter of the two read masters."""

from typing import Any, Final

from amaranth import Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig

from ..layouts import axi_read_signature

__all__ = ["FETCH_ID", "LOAD_ID", "AxiReadArbiter", "address_constants"]

LOAD_ID: Final = 0
"""ARID of the load DMA's bursts behind :class:`AxiReadArbiter`."""

FETCH_ID: Final = 1
"""ARID of instruction fetch behind :class:`AxiReadArbiter`."""

_INCR: Final = 0b01
_NORMAL_BUFFERABLE: Final = 0b0011
_ERROR: Final = 0b10
"""Bit of RRESP and BRESP that SLVERR and DECERR have, OKAY and EXOKAY have not."""


def address_constants(bus: Any, channel: str, arch: ArchConfig) -> list[Any]:
    """Assignments of what never changes on channel ``ar`` or ``aw`` of a DMA.

    Bursts are INCR. A beat is a word where the bus is wider than one (a narrow transfer, in the lanes that its address
    says), else a beat of the bus. Memory is normal, not cacheable, bufferable.
    """
    size = ceil_log2(min(arch.bus_bytes, arch.word_bytes))
    values = {"id": LOAD_ID, "size": size, "burst": _INCR, "lock": 0, "cache": _NORMAL_BUFFERABLE, "prot": 0}
    return [getattr(bus, channel + name).eq(value) for name, value in values.items()]


def is_error(response: Value) -> Value:
    """Whether RRESP or BRESP is SLVERR or DECERR."""
    return (response & _ERROR).any()


class AxiReadArbiter(wiring.Component):
    """Put the read channels of the load DMA and of instruction fetch on one AXI port.

    Fetch wins when both want the address channel, as it wants it rarely; a load burst that has been offered to the bus
    first keeps it until it is taken. Every burst carries the number of its master as ARID, :data:`LOAD_ID` or
    :data:`FETCH_ID`, whatever the master itself says, and read data goes where RID says, so that the bus may mix the
    two as it likes. Combinational both ways; one register remembers whose address is on the bus.

    Parameters
    ----------
    arch : ArchConfig

    Members
    -------
    load, fetch : In(axi_read_signature(arch))
        The masters.
    bus : Out(axi_read_signature(arch))
        The port.
    """

    load: Any
    fetch: Any
    bus: Any

    def __init__(self, *, arch: ArchConfig) -> None:
        super().__init__(
            {
                "load": In(axi_read_signature(arch)),
                "fetch": In(axi_read_signature(arch)),
                "bus": Out(axi_read_signature(arch)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        load, fetch, bus = self.load, self.fetch, self.bus
        load_held = Signal()  # load's address was on the bus in the last cycle and not taken
        use_fetch = Signal()
        m.d.comb += use_fetch.eq(fetch.arvalid & ~load_held)
        m.d.sync += load_held.eq(bus.arvalid & ~bus.arready & ~use_fetch)
        with m.If(use_fetch):
            m.d.comb += [bus.arid.eq(FETCH_ID), bus.arvalid.eq(fetch.arvalid), fetch.arready.eq(bus.arready)]
        with m.Else():
            m.d.comb += [bus.arid.eq(LOAD_ID), bus.arvalid.eq(load.arvalid), load.arready.eq(bus.arready)]
        for name in ("araddr", "arlen", "arsize", "arburst", "arlock", "arcache", "arprot"):
            m.d.comb += getattr(bus, name).eq(Mux(use_fetch, getattr(fetch, name), getattr(load, name)))
        for number, master in ((LOAD_ID, load), (FETCH_ID, fetch)):
            m.d.comb += [getattr(master, n).eq(getattr(bus, n)) for n in ("rid", "rdata", "rresp", "rlast")]
            m.d.comb += master.rvalid.eq(bus.rvalid & (bus.rid == number))
        m.d.comb += bus.rready.eq(Mux(bus.rid == FETCH_ID, fetch.rready, load.rready))
        return m
