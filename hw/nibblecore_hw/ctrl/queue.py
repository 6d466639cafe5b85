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
    ``o.valid`` do not depend on anything of the same cycle. A reset empties the queue.

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
        # One bit more than an address: equal pointers are an empty queue, pointers a whole depth apart a full one.
        head, tail = Signal(addr_bits + 1), Signal(addr_bits + 1)
        m.d.comb += [
            self.level.eq((tail - head)[: addr_bits + 1]),
            self.i.ready.eq((tail ^ head) != self._depth),
            self.o.valid.eq(tail != head),
            write.addr.eq(tail[:addr_bits]),
            write.data.eq(self.i.payload),
            write.en.eq(self.i.valid & self.i.ready),
            read.addr.eq(head[:addr_bits]),
            self.o.payload.eq(read.data),
        ]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += tail.eq(tail + 1)
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += head.eq(head + 1)
        return m
