"""A memory behind AXI for cocotb benches: the only place that knows cocotbext-axi."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from cocotbext.axi import AxiRam, AxiReadBus, AxiWriteBus
from cocotbext.axi.axi_channels import AxiBus

__all__ = ["RandomAxiRam"]


class RandomAxiRam:
    """``size`` bytes behind the read port ``read`` and the write port ``write`` of a design, with random stalls.

    Parameters
    ----------
    dut : handle
        The design; ports are called ``<read>__arvalid`` and so on, as Amaranth names members of an interface.
    read, write : str
        Names of the two interfaces.
    size : int
        Bytes.
    seed : int
        Of contents and stalls.
    stall : float
        Probability of a pause in a cycle, on each channel by itself.
    """

    def __init__(self, dut: Any, *, read: str, write: str, size: int, seed: int, stall: float) -> None:
        rng = random.Random(seed)
        bus = AxiBus(
            AxiWriteBus.from_prefix(dut, write, bus_separator="__"),
            AxiReadBus.from_prefix(dut, read, bus_separator="__"),
        )
        self._ram = AxiRam(bus, dut.clk, dut.rst, size=size)
        self._size = size
        self.write(0, rng.randbytes(size))
        channels = (
            self._ram.write_if.aw_channel,
            self._ram.write_if.w_channel,
            self._ram.write_if.b_channel,
            self._ram.read_if.ar_channel,
            self._ram.read_if.r_channel,
        )
        for number, channel in enumerate(channels):
            channel.set_pause_generator(_pauses(stall, seed * len(channels) + number))

    def read(self, address: int, count: int) -> bytes:
        """``count`` bytes from ``address`` on."""
        return bytes(self._ram.read(address, count))

    def write(self, address: int, data: bytes) -> None:
        """Put ``data`` at ``address``."""
        self._ram.write(address, data)

    def contents(self) -> bytearray:
        """A copy of everything."""
        return bytearray(self.read(0, self._size))


def _pauses(probability: float, seed: int) -> Iterator[bool]:
    rng = random.Random(seed)
    while True:
        yield rng.random() < probability
