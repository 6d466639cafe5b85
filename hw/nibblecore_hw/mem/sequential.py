"""On-chip memory of a core that runs one instruction at a time: one client asks at a time, and is answered at once."""

from typing import Any

from amaranth import Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In
from amaranth.utils import ceil_log2

from nibblecore.arch.config import MemoryKind

from ..layouts import read_port, write_port

__all__ = ["SequentialBuffer"]


class SequentialBuffer(wiring.Component):
    """A memory of ``depth`` words, for clients of which no two ever ask in the same cycle: all are always granted.

    What :class:`nibblecore_hw.mem.buffer.BankedBuffer` is for cores whose engines work beside each other. A word stands
    :attr:`LATENCY` edge after its grant, at every reader, and stays until the next grant of any of them; in a
    ``single`` memory until the next of a writer, too, as SPRAM that writes shows nothing defined. There is no register
    but that of the memory.

    Parameters
    ----------
    depth, word_bits, parts, kind, readers, writers
        As those of :class:`nibblecore_hw.mem.buffer.BankedBuffer`.

    Members
    -------
    reads : In(read_port(...)).array(readers)
    writes : In(write_port(...)).array(writers)
    """

    LATENCY = 1

    reads: Any
    writes: Any

    def __init__(self, *, depth: int, word_bits: int, parts: int, kind: MemoryKind, readers: int, writers: int) -> None:
        self._depth, self._word_bits, self._parts, self._kind = depth, word_bits, parts, kind
        addr_bits = ceil_log2(depth)
        super().__init__(
            {
                "reads": In(read_port(addr_bits=addr_bits, word_bits=word_bits)).array(readers),
                "writes": In(write_port(addr_bits=addr_bits, word_bits=word_bits, parts=parts)).array(writers),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        reads, writes = list(self.reads), list(self.writes)
        is_single = self._kind == "single"
        attrs = {"ram_style": "huge"} if is_single else {"no_rw_check": 1}
        m.submodules.words = memory = Memory(shape=self._word_bits, depth=self._depth, init=[], attrs=attrs)
        write = memory.write_port(granularity=self._word_bits // self._parts)
        read = memory.read_port(domain="sync")

        def choose(values: list[Value], clients: list[Any]) -> Value:
            """Of who asks; where nobody does, any."""
            result = values[-1]
            for value, client in reversed(list(zip(values[:-1], clients[:-1], strict=True))):
                result = Mux(client.valid, value, result)
            return result

        writing = Cat(port.valid for port in writes).any()
        write_addr = choose([port.addr for port in writes], writes)
        read_addr = choose([port.addr for port in reads], reads)
        m.d.comb += [
            write.data.eq(choose([port.data for port in writes], writes)),
            write.en.eq(Mux(writing, choose([port.mask for port in writes], writes), 0)),
            read.en.eq(Cat(port.valid for port in reads).any() & (~writing if is_single else 1)),
        ]
        if is_single:
            addr = Signal(len(write_addr))
            m.d.comb += addr.eq(choose([port.addr for port in (*writes, *reads)], [*writes, *reads]))
            write_addr = read_addr = addr
        m.d.comb += [write.addr.eq(write_addr), read.addr.eq(read_addr)]
        for port in (*reads, *writes):
            m.d.comb += port.ready.eq(1)
        for port in reads:
            m.d.comb += port.data.eq(read.data)
        return m
