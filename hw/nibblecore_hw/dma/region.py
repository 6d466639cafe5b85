"""Translation of offsets in a DRAM region into byte addresses, and the check that nothing leaves the region."""

from typing import Any

from amaranth import Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from ..layouts import REGION_BITS

__all__ = ["RegionCheck"]


class RegionCheck(wiring.Component):
    """Whether an access to a region is allowed, and its byte address.

    Combinational. Addresses count units from byte 0 on, not from the region. Units that all lie at the region's base or
    behind it are allowed if the last one lies before its end (so a region of size 0 refuses everything, and a size that
    is no multiple of the unit counts as the next lower one), the base is a multiple of the unit, and the first one lies
    below ``2**addr_bits`` bytes. An access that does not cross a multiple of 4 KiB, as AXI demands of bursts, then ends
    below ``2**addr_bits`` too.

    Parameters
    ----------
    unit_bytes : int
        Bytes of a unit; a power of two.
    addr_bits : int
        Width of a byte address, at least 16.

    Attributes
    ----------
    unit_bits : int
        Width of an address in units: all regions end at half of what can be counted, or before.

    Members
    -------
    first, last : In(unit_bits)
        First and last unit of the access.
    limit, aligned : In(unit_bits), In(1)
        Of the region: :meth:`limit_of` and :meth:`is_aligned`.
    address : Out(addr_bits)
        Byte address of the first unit, if ``ok``.
    ok : Out(1)
        The access is allowed, given that it does not begin before the region.

    Raises
    ------
    ValueError
        For a parameter outside its range.
    """

    first: Signal
    last: Signal
    limit: Signal
    aligned: Signal
    address: Signal
    ok: Signal

    def __init__(self, *, unit_bytes: int, addr_bits: int) -> None:
        if unit_bytes < 1 or unit_bytes & (unit_bytes - 1):
            raise ValueError(f"unit_bytes must be a power of two, not {unit_bytes!r}")
        self.unit_log2 = ceil_log2(unit_bytes)
        self.unit_bits = REGION_BITS - self.unit_log2 + 2
        if addr_bits < 16:
            raise ValueError(f"addr_bits must be at least 16, not {addr_bits!r}")
        self.addr_bits = addr_bits
        super().__init__(
            {
                "first": In(self.unit_bits),
                "last": In(self.unit_bits),
                "limit": In(self.unit_bits),
                "aligned": In(1),
                "address": Out(addr_bits),
                "ok": Out(1),
            }
        )

    def limit_of(self, base: Value, size: Value) -> Value:
        """The unit behind the last one of a region."""
        return base[self.unit_log2 :] + size[self.unit_log2 :]

    def is_aligned(self, base: Value) -> Value:
        """Whether a region begins at a multiple of the unit."""
        return ~base[: self.unit_log2].any()

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        low = self.unit_log2
        m.d.comb += [
            self.address.eq(self.first << low),
            self.ok.eq(self.aligned & (self.last < self.limit) & ~self.first[self.addr_bits - low :].any()),
        ]
        return m
