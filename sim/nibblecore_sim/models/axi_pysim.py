"""An AXI4 memory for Amaranth's simulator that checks its master."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..pysim import Bench, Stalls

__all__ = ["AxiMemory", "Burst"]

_INCR = 1
_PAGE = 4096
_SLVERR, _DECERR = 2, 3


@dataclass
class Burst:
    """One burst as its address channel said it, and how far it has come."""

    number: int
    id: int
    addr: int
    beats: int
    beat_bytes: int
    due: int
    sent: int = 0

    @property
    def end(self) -> int:
        """Byte behind the last one."""
        return self.addr + self.beats * self.beat_bytes


class AxiMemory:
    """``size`` bytes behind read and write channels, with random stalls, latencies and errors.

    Run :meth:`reader` or :meth:`writer` in the background of :func:`~nibblecore_sim.pysim.simulate`. Everything that a
    master may not do is an ``AssertionError`` that names the seed: a channel that changes while it waits, a burst that
    is not INCR, crosses 4 KiB, is too long or too many, or touches a byte outside ``windows``; W beats without a valid
    address, a wrong WLAST, strobes outside a narrow beat.

    Parameters
    ----------
    size : int
        Bytes; filled with random data.
    bus_bytes : int
        Bytes of a beat on the bus.
    seed : int
    max_beats, max_bursts : int
        What the master may do.
    stall : float
        Probability of a pause, on each channel by itself; see :class:`~nibblecore_sim.pysim.Stalls`.
    latency : tuple of int
        Least and most cycles from an address to its first data, or from WLAST to its response.
    windows : sequence of (int, int)
        Allowed byte ranges (start, end). None: everything.
    respond : function, optional
        ``(number of the burst, number of the beat) -> response``; a write response has beat 0. OKAY by default.

    Attributes
    ----------
    data : bytearray
    touched : set of int
        Bytes that were read, or written with their strobe set.
    bursts : list of Burst
        All that were taken, in order.
    in_flight : int
        Bursts that were taken and have not ended.
    """

    def __init__(
        self,
        *,
        size: int,
        bus_bytes: int,
        seed: int,
        max_beats: int = 256,
        max_bursts: int = 16,
        stall: float = 0.0,
        latency: tuple[int, int] = (0, 0),
        windows: Sequence[tuple[int, int]] | None = None,
        respond: Callable[[int, int], int] = lambda burst, beat: 0,
    ) -> None:
        self.seed = seed
        self.bus_bytes, self.max_beats, self.max_bursts = bus_bytes, max_beats, max_bursts
        self.latency, self.respond = latency, respond
        self.windows = ((0, size),) if windows is None else tuple(windows)
        self.random = random.Random(seed)
        self.data = bytearray(self.random.randbytes(size))
        self.touched: set[int] = set()
        self.bursts: list[Burst] = []
        self.in_flight = 0
        self.cycle = 0
        self._stall = stall

    def _check(self, condition: bool, text: str) -> None:
        assert condition, f"{text} (cycle {self.cycle}, seed {self.seed})"

    def _stalls(self, offset: int) -> Stalls:
        return Stalls(self._stall, seed=self.seed * 8 + offset)

    def _take(self, ident: int, addr: int, length: int, size: int, kind: int) -> Burst:
        beat_bytes = 1 << size
        due = self.cycle + 1 + self.random.randint(*self.latency)
        burst = Burst(len(self.bursts), ident, addr, length + 1, beat_bytes, due)
        what = f"burst {burst.number} at {addr:#x} of {burst.beats} beats of {beat_bytes} bytes"
        self._check(kind == _INCR, f"{what} is not INCR")
        self._check(beat_bytes <= self.bus_bytes, f"{what} is wider than the bus")
        self._check(addr % beat_bytes == 0, f"{what} is not aligned")
        self._check(burst.beats <= self.max_beats, f"{what} has more than {self.max_beats} beats")
        self._check(addr // _PAGE == (burst.end - 1) // _PAGE, f"{what} crosses 4 KiB")
        self._check(any(a <= addr and burst.end <= b for a, b in self.windows), f"{what} leaves {self.windows}")
        self.in_flight += 1
        self._check(self.in_flight <= self.max_bursts, f"{what} is one of {self.in_flight} in flight")
        self.bursts.append(burst)
        return burst

    class _Stable:
        """A channel must keep what it offers until it is taken."""

        def __init__(self, memory: AxiMemory, name: str) -> None:
            self.memory, self.name, self.offered = memory, name, None

        offered: tuple[Any, ...] | None

        def check(self, valid: int, ready: int, payload: tuple[Any, ...]) -> bool:
            if self.offered is not None:
                self.memory._check(bool(valid), f"{self.name}VALID was withdrawn")
                self.memory._check(payload == self.offered, f"{self.name} changed from {self.offered} to {payload}")
            self.offered = payload if valid and not ready else None
            return bool(valid and ready)

    def reader(self, bus: Any) -> Bench:
        """The slave of the read channels of ``bus``. Bursts of one id stay in order, those of several ids mix."""

        async def read(ctx: Any) -> None:
            address, stable = self._stalls(1), self._Stable(self, "AR")
            pauses = self._stalls(2)
            queues: dict[int, deque[Burst]] = {}
            beat: Burst | None = None
            while True:
                arready = not address.pause()
                if beat is None:
                    ripe = [q[0] for q in queues.values() if q and q[0].due <= self.cycle]
                    if ripe and not pauses.pause():
                        beat = self.random.choice(ripe)
                        where = beat.addr + beat.sent * beat.beat_bytes
                        lane = where % self.bus_bytes
                        raw = bytearray(self.random.randbytes(self.bus_bytes))
                        raw[lane : lane + beat.beat_bytes] = self.data[where : where + beat.beat_bytes]
                        self.touched.update(range(where, where + beat.beat_bytes))
                        ctx.set(bus.rdata, int.from_bytes(raw, "little"))
                        ctx.set(bus.rid, beat.id)
                        ctx.set(bus.rresp, self.respond(beat.number, beat.sent))
                        ctx.set(bus.rlast, beat.sent == beat.beats - 1)
                ctx.set(bus.arready, arready)
                ctx.set(bus.rvalid, beat is not None)
                _, _, valid, rready, *payload = await ctx.tick().sample(
                    bus.arvalid, bus.rready, bus.arid, bus.araddr, bus.arlen, bus.arsize, bus.arburst
                )
                if stable.check(valid, arready, tuple(payload)):
                    burst = self._take(*payload)
                    queues.setdefault(burst.id, deque()).append(burst)
                if beat is not None and rready:
                    beat.sent += 1
                    if beat.sent == beat.beats:
                        queues[beat.id].popleft()
                        self.in_flight -= 1
                    beat = None
                self.cycle += 1

        return read

    def writer(self, bus: Any) -> Bench:
        """The slave of the write channels of ``bus``."""

        async def write(ctx: Any) -> None:
            address, data, responses = self._stalls(3), self._stalls(4), self._stalls(5)
            aw_stable, w_stable = self._Stable(self, "AW"), self._Stable(self, "W")
            open_bursts: deque[Burst] = deque()  # addresses, with W beats to come
            ended: deque[Burst] = deque()  # with a response to come
            early: deque[tuple[int, int, int]] = deque()  # W beats that were taken before their address
            response: Burst | None = None
            while True:
                awready, wready = not address.pause(), not data.pause()
                if response is None and ended and ended[0].due <= self.cycle and not responses.pause():
                    response = ended.popleft()
                    ctx.set(bus.bid, response.id)
                    ctx.set(bus.bresp, self.respond(response.number, 0))
                ctx.set(bus.awready, awready)
                ctx.set(bus.wready, wready)
                ctx.set(bus.bvalid, response is not None)
                _, _, awvalid, wvalid, bready, *values = await ctx.tick().sample(
                    bus.awvalid, bus.wvalid, bus.bready, bus.awid, bus.awaddr, bus.awlen, bus.awsize, bus.awburst,
                    bus.wdata, bus.wstrb, bus.wlast,
                )  # fmt: skip
                aw, w = tuple(values[:5]), tuple(values[5:])
                if aw_stable.check(awvalid, awready, aw):
                    open_bursts.append(self._take(*aw))
                if w_stable.check(wvalid, wready, w):
                    early.append(w)
                    beats = sum(b.beats - b.sent for b in open_bursts)
                    offered = aw[2] + 1 if aw_stable.offered else 0
                    self._check(len(early) <= beats + offered, "W runs ahead of AW")
                while early and open_bursts:
                    burst = open_bursts[0]
                    self._beat(burst, *early.popleft())
                    if burst.sent == burst.beats:
                        burst.due = self.cycle + 1 + self.random.randint(*self.latency)
                        ended.append(open_bursts.popleft())
                if response is not None and bready:
                    response = None
                    self.in_flight -= 1
                self.cycle += 1

        return write

    def _beat(self, burst: Burst, data: int, strobe: int, last: int) -> None:
        where = burst.addr + burst.sent * burst.beat_bytes
        lane = where % self.bus_bytes
        burst.sent += 1
        what = f"beat {burst.sent} of {burst.beats} of burst {burst.number}"
        self._check(last == (burst.sent == burst.beats), f"{what} has WLAST={last}")
        self._check(not strobe & ~(((1 << burst.beat_bytes) - 1) << lane), f"{what} has WSTRB={strobe:#x}")
        for i in range(burst.beat_bytes):
            if strobe >> lane + i & 1:
                self.data[where + i] = data >> 8 * (lane + i) & 0xFF
                self.touched.add(where + i)
