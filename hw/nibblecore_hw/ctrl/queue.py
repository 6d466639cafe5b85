"""A typed FIFO in LUT RAM."""

from typing import Any

from amaranth import Module, Signal
from amaranth.hdl import ShapeLike
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out


class Queue(wiring.Component):
    """First in, first out, between two streams of the same shape; the items lie in LUT RAM.

    An item is at the output :attr:`LATENCY` cycle after it was taken, and one item per cycle passes. ``i.ready`` and
    ``o.valid`` are registers. A reset empties the queue.

    Parameters
    ----------
    shape : ShapeLike
        Shape of an item, at least one bit wide.
    depth : int
        Items that fit, a power of two in 2..1024.

    Members
    -------
    i : In(stream.Signature(shape))
        Items in; ready while there is room.
    o : Out(stream.Signature(shape))
        Items out; valid while there is one.
    level : Out(range(depth + 1))
        Items inside.

    Raises
    ------
    ValueError
        If ``depth`` is not such a number.
    """

    LATENCY = 1

    i: Any
    o: Any
    level: Signal

    def __init__(self, *, shape: ShapeLike, depth: int) -> None:
        if not 2 <= depth <= 1024 or depth & (depth - 1):
            raise ValueError(f"depth must be a power of two in 2..1024, not {depth!r}")
        self._shape = shape
        self._depth = depth
        super().__init__(
            {
                "i": In(stream.Signature(shape)),
                "o": Out(stream.Signature(shape)),
                "level": Out(range(depth + 1)),
            }
        )

    @property
    def depth(self) -> int:
        """Items that fit."""
        return self._depth

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # A read without a register: the head is looked at (its `wait` mask) before it is taken.
        m.submodules.memory = memory = Memory(
            shape=self._shape, depth=self._depth, init=[], attrs={"ram_style": "distributed"}
        )
        write, read = memory.write_port(), memory.read_port(domain="comb")
        addr_bits = (self._depth - 1).bit_length()
        head, tail = Signal(addr_bits + 1), Signal(addr_bits + 1)  # one bit more than an address, for the level
        valid, ready = Signal(), Signal(init=1)
        pushes, pops = self.i.valid & ready, valid & self.o.ready
        holds_one, has_one_place = ((a + 1)[:addr_bits] == b[:addr_bits] for a, b in ((head, tail), (tail, head)))
        m.d.comb += [
            self.level.eq((tail - head)[: addr_bits + 1]),
            self.i.ready.eq(ready),
            self.o.valid.eq(valid),
            write.addr.eq(tail[:addr_bits]),
            write.data.eq(self.i.payload),
            # Whenever there is room, as only a push makes it an item: a register enables all of the memory, and what is
            # at `i.valid` reaches counters alone.
            write.en.eq(ready),
            read.addr.eq(head[:addr_bits]),
            self.o.payload.eq(read.data),
        ]
        m.d.sync += [
            valid.eq(pushes | (valid & ~(pops & holds_one))),
            ready.eq(pops | (ready & ~(pushes & has_one_place))),
        ]
        with m.If(pushes):
            m.d.sync += tail.eq(tail + 1)
        with m.If(pops):
            m.d.sync += head.eq(head + 1)
        return m
