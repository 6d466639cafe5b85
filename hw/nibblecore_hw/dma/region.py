"""Translation of offsets in a DRAM region into byte addresses, and the check that nothing leaves the region."""

from typing import Any

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

__all__ = ["REGION_BITS", "RegionCheck"]

REGION_BITS = 32
"""Width of a region's base and size, in bytes."""


class RegionCheck(wiring.Component):
    """Byte address of an access to a region, and whether the access is allowed.

    Combinational: an adder beside a comparison. It allows the units from ``offset`` to the one before ``end`` if all of
    them lie in the region (so a region of size 0 refuses everything, and a size that is no multiple of the unit counts
    as the next lower one), the base is a multiple of the unit, and the first one lies below ``2**addr_bits``. An access
    that does not cross a multiple of 4 KiB, as AXI demands of bursts, then ends below ``2**addr_bits`` too.

    Parameters
    ----------
    unit_bytes : int
        Bytes of a unit; a power of two.
    addr_bits : int
        Width of a byte address, at least 16.

    Attributes
    ----------
    offset_bits : int
        Width of ``offset`` and ``end``: one bit more than offsets within the largest region have, so that a step from
        one of them can be added without wrapping, and is refused if it leads out.

    Members
    -------
    base, size : In(REGION_BITS)
        The region, in bytes.
    offset : In(offset_bits)
        First unit, relative to the region.
    end : In(offset_bits)
        ``offset`` plus the number of units, which must be in ``1..2**(offset_bits - 1)``; it may have wrapped where
        ``offset`` is beyond every region, which is refused for that.
    address : Out(addr_bits)
        Byte address of the first unit, if ``ok``.
    ok : Out(1)
        The access is allowed.

    Raises
    ------
    ValueError
        For a parameter outside its range.
    """

    base: Signal
    size: Signal
    offset: Signal
    end: Signal
    address: Signal
    ok: Signal

    def __init__(self, *, unit_bytes: int, addr_bits: int) -> None:
        if unit_bytes < 1 or unit_bytes & (unit_bytes - 1):
            raise ValueError(f"unit_bytes must be a power of two, not {unit_bytes!r}")
        self.unit_log2 = ceil_log2(unit_bytes)
        self.offset_bits = REGION_BITS - self.unit_log2 + 1
        if addr_bits < 16:
            raise ValueError(f"addr_bits must be at least 16, not {addr_bits!r}")
        self.addr_bits = addr_bits
        super().__init__(
            {
                "base": In(REGION_BITS),
                "size": In(REGION_BITS),
                "offset": In(self.offset_bits),
                "end": In(self.offset_bits),
                "address": Out(addr_bits),
                "ok": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        low = self.unit_log2
        first = Signal(self.offset_bits + 1)
        m.d.comb += [
            first.eq(self.base[low:] + self.offset),
            self.address.eq(first << low),
            self.ok.eq(
                ~self.offset[-1]
                & (self.end <= self.size[low:])
                & ~self.base[:low].any()
                & ~first[self.addr_bits - low :].any()
            ),
        ]
        return m

    def model(self, base: int, size: int, offset: int, count: int) -> int | None:
        """Byte address of ``count`` units from ``offset`` on, or None if the access is refused."""
        unit = 1 << self.unit_log2
        address = base + offset * unit
        allowed = base % unit == 0 and (offset + count) * unit <= size and address < 1 << self.addr_bits
        return address if allowed else None
