"""cocotb side of :class:`nibblecore_sim.transport.SimTransport`: serves the host's calls inside the simulator.

While it waits for the next call, no simulated time passes; while a program runs, Python only waits for the interrupt.
"""

import os
import time
from collections import Counter
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, FallingEdge, First, RisingEdge, Timer
from cocotb.utils import get_sim_time

PERIOD_NS = 10

INPUTS = (
    *(f"s_axil_{name}" for name in ("awvalid", "wvalid", "bready", "arvalid", "rready", "awaddr", "wdata", "araddr")),
    *("stall_permille", "error_first", "error_last", "error_response"),
    *("host_write", "host_read", "host_beat", "host_count"),
)


class Tb:
    """Drives the ports of ``simulated_core``."""

    def __init__(self, dut: Any) -> None:
        self.dut = dut
        self.bus_bytes = int(os.environ["NIBBLECORE_BUS_BYTES"])
        self.accesses: Counter[str] = Counter()
        for name in INPUTS:
            getattr(dut, name).value = 0

    async def start(self) -> None:
        self.dut.rst.value = 1
        Clock(self.dut.clk, PERIOD_NS, unit="ns", impl="gpi").start()
        await ClockCycles(self.dut.clk, 4)
        self.dut.rst.value = 0
        await ClockCycles(self.dut.clk, 2)

    async def _handshake(self, valid: str, ready: str) -> None:
        """Hold ``valid`` until the edge at which ``ready`` is seen."""
        getattr(self.dut, valid).value = 1
        while True:
            await RisingEdge(self.dut.clk)
            if getattr(self.dut, ready).value == 1:
                break
        getattr(self.dut, valid).value = 0

    async def csr_write(self, offset: int, value: int) -> int:
        dut = self.dut
        dut.s_axil_awaddr.value, dut.s_axil_wdata.value, dut.s_axil_bready.value = offset, value, 1
        address = cocotb.start_soon(self._handshake("s_axil_awvalid", "s_axil_awready"))
        await self._handshake("s_axil_wvalid", "s_axil_wready")
        await address
        while dut.s_axil_bvalid.value != 1:
            await RisingEdge(dut.clk)
        response = int(dut.s_axil_bresp.value)
        await RisingEdge(dut.clk)
        dut.s_axil_bready.value = 0
        return response

    async def csr_read(self, offset: int) -> tuple[int, int]:
        dut = self.dut
        dut.s_axil_araddr.value, dut.s_axil_rready.value = offset, 1
        await self._handshake("s_axil_arvalid", "s_axil_arready")
        while dut.s_axil_rvalid.value != 1:
            await RisingEdge(dut.clk)
        result = int(dut.s_axil_rdata.value), int(dut.s_axil_rresp.value)
        await RisingEdge(dut.clk)
        dut.s_axil_rready.value = 0
        return result

    async def _door(self, strobe: str, beat: int, count: int) -> None:
        self.dut.host_beat.value, self.dut.host_count.value = beat, count
        getattr(self.dut, strobe).value = 1
        await ClockCycles(self.dut.clk, 2)
        getattr(self.dut, strobe).value = 0
        await ClockCycles(self.dut.clk, 2)

    async def write(self, beat: int, data: bytes) -> None:
        size = self.bus_bytes
        lines = (data[k : k + size][::-1].hex() for k in range(0, len(data), size))
        Path("host_write.hex").write_text("\n".join(lines) + "\n", encoding="ascii")
        await self._door("host_write", beat, len(data) // size)

    async def read(self, beat: int, count: int) -> bytes:
        await self._door("host_read", beat, count)
        lines = Path("host_read.hex").read_text(encoding="ascii").split("\n")
        words = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(("//", "@"))]
        # Beats that nobody has written are unknown in a four-state simulator; the host sees zeros.
        clean = (word.lower().replace("x", "0").zfill(2 * self.bus_bytes) for word in words)
        return b"".join(bytes.fromhex(word)[::-1] for word in clean)

    async def wait(self, cycles: int) -> tuple[bool, int, float]:
        """Whether the interrupt came within ``cycles``, and the cycles and the seconds that it took."""
        began, at = time.monotonic(), get_sim_time("ns")
        if self.dut.irq.value != 1:
            await First(RisingEdge(self.dut.irq), Timer(cycles * PERIOD_NS, unit="ns"))
        # Back to an edge of the clock: whatever follows is synchronous.
        await RisingEdge(self.dut.clk)
        passed = round((get_sim_time("ns") - at) / PERIOD_NS)
        return self.dut.irq.value == 1, passed, time.monotonic() - began

    async def configure(self, **values: int) -> None:
        for name, value in values.items():
            getattr(self.dut, name).value = value
        await ClockCycles(self.dut.clk, 1)

    async def violation(self) -> int:
        return int(self.dut.violation.value)

    async def watch_buffers(self, buffers: dict[str, tuple[int, int, int]]) -> None:
        """Begin to count; ``buffers``: readers and writers of each, and the bits of an address within a bank."""
        for buffer, (readers, writers, row_bits) in buffers.items():
            cocotb.start_soon(self._watch(getattr(self.dut.core, buffer), readers, writers, row_bits))

    async def _watch(self, buffer: Any, readers: int, writers: int, row_bits: int) -> None:
        def granted(ports: list[tuple[Any, Any]]) -> dict[int, int]:
            """Address by bank. In each, the first one that asks wins."""
            found: dict[int, int] = {}
            for valid, addr in ports:
                if valid.value == 1:
                    found.setdefault(addr.value.to_unsigned() >> row_bits, addr.value.to_unsigned())
            return found

        reads, writes = (
            [(getattr(buffer, f"{kind}__{n}__valid"), getattr(buffer, f"{kind}__{n}__addr")) for n in range(count)]
            for kind, count in (("reads", readers), ("writes", writers))
        )
        while True:
            # What stands between two rising edges is what counts at the second one.
            await FallingEdge(self.dut.clk)
            read, written = granted(reads), granted(writes)
            both = read.keys() & written.keys()
            self.accesses["reads"] += len(read)
            self.accesses["writes"] += len(written)
            self.accesses["both"] += len(both)
            self.accesses["collisions"] += sum(read[bank] == written[bank] for bank in both)

    async def buffer_accesses(self) -> dict[str, int]:
        return dict(self.accesses)


@cocotb.test()
async def serve(dut: Any) -> None:
    """Answer calls ``(method, args, kwargs)`` until the host hangs up."""
    tb = Tb(dut)
    await tb.start()
    with Client(os.environ["NIBBLECORE_SOCKET"], "AF_UNIX") as connection:
        while True:
            try:
                method, args, kwargs = connection.recv()
            except EOFError:
                return
            try:
                connection.send((True, await getattr(tb, method)(*args, **kwargs)))
            except Exception as error:
                connection.send((False, repr(error)))
