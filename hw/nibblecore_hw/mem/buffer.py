"""Banked on-chip memory with several readers and writers: the activation buffer and the weight buffer."""

import functools
import operator
from collections.abc import Sequence
from typing import Final, get_args

from amaranth import Assert, Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import MemoryKind

from ..layouts import LAST_READ_LATENCY, READ_LATENCY, read_port, write_port
from ..registers import copies, delayed
from ..technology import check_technology
from .block import BlockMemory

__all__ = ["BankedBuffer"]

_WIDE: Final = 128
"""From so many bits on, the two halves of a bank have address registers of their own."""


def choose_word(m: Module, words: Sequence[Value], index: Value, *, name: str) -> Value:
    """``words[index]`` for the index of three cycles earlier, of a power of two of words of one width.

    One of four takes two LUTs of four inputs per bit, where a multiplexer takes three: the first one gives ``words[0]``
    or ``words[1]``, or, where it is one of the others, which of them; the second one chooses by that. Registers for
    what controls them are added to ``m``.
    """
    if len(words) == 1:
        return words[0]
    width = len(words[0])
    earlier = index
    for n in range(2):
        stage = Signal(len(index), name=f"bank_{name}_{n}", reset_less=True)
        m.d.sync += stage.eq(earlier)
        earlier = stage
    if len(words) == 2:
        second = Signal(name=f"second_{name}", reset_less=True)
        m.d.sync += second.eq(earlier)
        return Mux(second, words[1], words[0])
    result: Value = Const(0, width)
    for n in range(0, len(words), 4):
        here = earlier[2:] == n // 4
        odd, upper, fixed = (Signal(name=f"{s}_{name}_{n}", reset_less=True) for s in ("odd", "upper", "fixed"))
        m.d.sync += [odd.eq(earlier[0] & here), upper.eq(earlier[1] & here), fixed.eq(earlier[1] | ~here)]
        first = Mux(fixed, odd.replicate(width), Mux(odd, words[n + 1], words[n]))
        second_pair = (words[n + 3] & first) | (words[n + 2] & ~first)
        result = result | Mux(upper, second_pair, first)
    return result


def _any(values: list[Value]) -> Value:
    return Cat(values).any() if values else Const(0)


class BankedBuffer(wiring.Component):
    """A memory of ``depth`` words in equal banks of consecutive addresses.

    Every port may be granted one access per cycle (``valid`` and ``ready``). Of readers that ask for the *same* bank
    the one with the lowest index wins. In a ``dual`` buffer one write, whatever its bank, goes on beside one read per
    bank: writers share a register, and the lower index wins. A ``single`` bank has one access, and every writer wins
    over every reader. ``ready`` depends combinationally on ``valid`` and ``addr`` of the ports that win over it, and
    not on its own ``valid``; except that the last reader of a ``dual`` buffer is told by registers: it loses two cycles
    *after* the one in which another reader has asked for its bank. With ``foretold``, a register tells
    those between it and the first reader of a ``dual`` buffer whether that one beats them.

    Read data stands in the cycle that begins :data:`~nibblecore_hw.layouts.LAST_READ_LATENCY` edges after the grant of
    the last reader, and :data:`~nibblecore_hw.layouts.READ_LATENCY` edges, two more, after that of any other. There are
    registers before the memory, as its address is not chosen and brought there in one cycle; its own; the one at its
    output (:class:`~nibblecore_hw.mem.block.BlockMemory`); and one behind the choice of a bank.

    A read granted at a later edge than a write sees it; in a ``dual`` buffer the last reader's only two edges later, as
    a write passes one register more, and that of another one also at the same edge. A word of a ``dual`` bank must not
    be read at the edge at which it is written, that is, be granted to the last reader in the cycle after the write's
    grant, or to another one in the cycle before it: what is read then is undefined, so that no bypass has to be built
    around block RAM. Whoever schedules the clients guarantees it; ``checks`` asserts it.

    A ``dual`` bank becomes DP16KD alone on an ECP5. A ``single`` bank becomes SB_SPRAM256KA alone on an iCE40 when
    Yosys is told to drop the initial contents that Amaranth always writes, which SPRAM cannot have: ``proc; delete
    t:$meminit*`` before ``synth_ice40 -spram``. Without that it stops with an error.

    Parameters
    ----------
    depth : int
        Words; a power of two.
    banks : int
        Banks; a power of two. The bank is the upper ``log2(banks)`` bits of an address.
    word_bits : int
        Bits of a word.
    parts : int
        Equal parts of a word that a write can enable one by one. A ``dual`` bank is one memory per part, as write
        enables for less than 8 bits would double the block RAM.
    kind : {"dual", "single"}
        ``dual``: one read and one write port per bank (block RAM). ``single``: one port for both (iCE40 SPRAM).
    readers, writers : int
        Ports, at least 1 each, in order of priority.
    technology : {"generic", "ecp5"}
        Primitives that may be instantiated.
    foretold : bool
        ``first_next`` is driven: the first reader, which always wins in a ``dual`` buffer, says a cycle ahead which
        bank it asks for.
    checks : bool
        Assert in simulation and formal proofs that no word of a ``dual`` bank is read while it is written, and that the
        first reader asks for nothing that it has not foretold. Leave it off
        for synthesis.

    Members
    -------
    reads : In(read_port(...)).array(readers)
    writes : In(write_port(...)).array(writers)
    first_next : In(banks)
        Bit b: the first reader asks for bank b in the next cycle. Only looked at with ``foretold``, in a ``dual``
        buffer; a bit that is set for nothing costs the other readers of that bank a cycle.
    conflicts : Out(readers)
        Bit i: reader i asks in this cycle and is not granted.
    last_ready_next : Out(banks)
        Bit b: the last reader would be granted bank b in the next cycle. A register; only of a ``dual`` buffer, 0
        otherwise.

    Raises
    ------
    ValueError
        For a parameter outside its range, or an unknown technology.
    """

    first_next: Signal
    conflicts: Signal
    last_ready_next: Signal

    def __init__(
        self,
        *,
        depth: int,
        banks: int,
        word_bits: int,
        parts: int,
        kind: MemoryKind,
        readers: int,
        writers: int,
        technology: str = "generic",
        foretold: bool = False,
        checks: bool = False,
    ) -> None:
        for name, value in (("depth", depth), ("banks", banks)):
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value!r}")
        if depth < 2 * banks:
            raise ValueError(f"depth={depth} leaves fewer than 2 words in each of {banks} banks")
        if parts < 1 or word_bits % parts:
            raise ValueError(f"parts={parts} must divide word_bits={word_bits}")
        if kind not in get_args(MemoryKind):
            raise ValueError(f"kind must be 'dual' or 'single', not {kind!r}")
        for name, value in (("readers", readers), ("writers", writers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value!r}")
        if foretold and readers < 3:
            raise ValueError(f"foretold is about readers between the first and the last: there are none of {readers}")
        self.depth, self.banks, self.word_bits, self.parts, self.kind = depth, banks, word_bits, parts, kind
        self.readers, self.writers, self.foretold, self.checks = readers, writers, foretold, checks
        self._technology = check_technology(technology)
        addr_bits = ceil_log2(depth)
        super().__init__(
            {
                "reads": In(read_port(addr_bits=addr_bits, word_bits=word_bits)).array(readers),
                "writes": In(write_port(addr_bits=addr_bits, word_bits=word_bits, parts=parts)).array(writers),
                "first_next": In(banks),
                "conflicts": Out(readers),
                "last_ready_next": Out(banks),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        row_bits = ceil_log2(self.depth // self.banks)
        bank_bits = ceil_log2(self.banks)
        reads, writes = list(self.reads), list(self.writes)

        def bank_of(addr: Value) -> Value:
            return addr[row_bits:]

        def beaten(port: wiring.PureInterface, winners: list[wiring.PureInterface]) -> Value:
            return _any([w.valid & (bank_of(w.addr) == bank_of(port.addr)) for w in winners])

        def wanted(port: wiring.PureInterface, b: int) -> Value:
            return port.valid & (bank_of(port.addr) == b)

        is_dual = self.kind == "dual"
        for j, port in enumerate(writes):
            m.d.comb += port.ready.eq(~(_any([w.valid for w in writes[:j]]) if is_dual else beaten(port, writes[:j])))
        early, last = reads[:-1], reads[-1]
        # What beats a reader that is far from the first one stands in registers that can be near it.
        first_asks = Signal(self.banks, reset_less=True)
        if is_dual and self.foretold:
            m.d.sync += first_asks.eq(self.first_next)
            if self.checks:
                asks = Cat(wanted(reads[0], b) for b in range(self.banks))
                m.d.sync += Assert(~(asks & ~first_asks).any(), "the first reader asks for what it has not foretold")
        for i, port in enumerate(early):
            if i and is_dual and self.foretold:
                loses = first_asks.bit_select(bank_of(port.addr), 1) | beaten(port, reads[1:i])
            else:
                loses = beaten(port, reads[:i] + ([] if is_dual else writes))
            m.d.comb += port.ready.eq(~loses)
        m.d.comb += self.conflicts.eq(Cat(port.valid & ~port.ready for port in reads))

        # What stands before the registers of the banks. In a dual buffer, all readers but the last go through two
        # registers that say which bank each of them takes. Addresses of idle ports do not matter.
        addresses = [port.addr for port in reads]
        takes = [[wanted(port, b) & port.ready for b in range(self.banks)] for port in reads]
        if is_dual:
            for i, port in enumerate(early):
                addresses[i] = delayed(m, port.addr, 2, f"address_{i}")
                takes[i] = list(delayed(m, Cat(takes[i]), 2, f"takes_{i}"))
            free_next, free = (Signal(self.banks, name=n, init=-1, reset_less=True) for n in ("free_next", "free"))
            m.d.sync += [
                free_next.eq(~Cat(_any([wanted(port, b) for port in early]) for b in range(self.banks))),
                free.eq(free_next),
            ]
            m.d.comb += [
                self.last_ready_next.eq(free_next),
                last.ready.eq(free.bit_select(bank_of(last.addr), 1)),
            ]
        else:
            m.d.comb += last.ready.eq(~beaten(last, early + writes))

        def choose(values: list[Value], wanted: list[Value]) -> Value:
            """The first value that is wanted, or the last."""
            result = values[-1]
            for value, is_wanted in reversed(list(zip(values[:-1], wanted[:-1], strict=True))):
                result = Mux(is_wanted, value, result)
            return result

        # The bank's register, the memory's two, and the one behind the choice of a bank.
        assert LAST_READ_LATENCY == 4
        if is_dual:
            chosen_row, chosen_data = Signal(row_bits, reset_less=True), Signal(self.word_bits, reset_less=True)
            write_data = Signal(self.word_bits, reset_less=True)
            valid = [w.valid for w in writes]
            m.d.sync += [
                chosen_row.eq(choose([w.addr[:row_bits] for w in writes], valid)),
                chosen_data.eq(choose([w.data for w in writes], valid)),
                write_data.eq(chosen_data),
            ]
        bank_words = []
        for b in range(self.banks):
            wanted_w = [wanted(w, b) & w.ready for w in writes]
            mask, read_en = Signal(self.parts, name=f"b{b}_mask"), Signal(name=f"b{b}_read")
            read_row = choose([addr[:row_bits] for addr in addresses], [take[b] for take in takes])
            masks = [Mux(w_wanted, w.mask, 0) for w, w_wanted in zip(writes, wanted_w, strict=True)]
            m.d.sync += [
                mask.eq(functools.reduce(operator.or_, masks)),
                read_en.eq(_any([take[b] for take in takes])),
            ]
            if is_dual:
                # A second register, for the way to the bank: the memories of large buffers are all over the chip. What
                # enables it is the bank's own, which keeps Yosys from making one register of those of all banks.
                write_mask = Signal(self.parts, name=f"b{b}_write_mask", reset_less=True)
                m.d.sync += write_mask.eq(mask)
                # So are those of one bank of wide words.
                pieces = 2 if self.word_bits // self.parts >= _WIDE else 1
                write_rows = copies(m, chosen_row, pieces, name=f"b{b}_write_row", enable=mask.any())
                read_rows = copies(m, read_row, pieces, name=f"b{b}_row")
                word = self._dual_bank(m, b, write_rows, write_data, write_mask, read_rows, read_en)
            else:
                data = Signal(self.word_bits, name=f"b{b}_data", reset_less=True)
                row = Signal(row_bits, name=f"b{b}_row", reset_less=True)
                m.d.sync += [data.eq(choose([w.data for w in writes], wanted_w)), row.eq(read_row)]
                with m.If(_any(wanted_w)):
                    m.d.sync += row.eq(choose([w.addr[:row_bits] for w in writes], wanted_w))
                word = self._single_bank(m, b, row, data, mask, read_en)
            bank_words.append(word)

        words: list[Value] = []
        for i, addr in enumerate(addresses):
            if not bank_bits and i:
                words.append(words[0])
                continue
            chosen = choose_word(m, bank_words, bank_of(addr), name=f"{i}")
            word = Signal(self.word_bits, name=f"word_{i}", reset_less=True)
            m.d.sync += word.eq(chosen)
            words.append(word)
        for i, (r, word) in enumerate(zip(reads, words, strict=True)):
            # In a single bank nobody waits before the memory, so behind it.
            if not is_dual and r is not last:
                word = delayed(m, word, READ_LATENCY - LAST_READ_LATENCY, f"later_{i}")
            m.d.comb += r.data.eq(word)
        return m

    def _dual_bank(
        self, m: Module, b: int, write_rows: Sequence[Value], write_data: Signal, write_mask: Signal,
        read_rows: Sequence[Value], read_en: Signal,
    ) -> Value:  # fmt: skip
        """One simple dual-port memory per part, or as many as there are copies of the addresses; returns the word
        behind the memory's output register."""
        pieces = len(read_rows)
        bits = self.word_bits // self.parts // pieces
        result = []
        for p in range(self.parts * pieces):
            memory = BlockMemory(width=bits, depth=self.depth // self.banks, technology=self._technology)
            m.submodules[f"bank{b}_part{p}"] = memory
            # Nobody waits for who asks: what is read for nobody goes nowhere.
            m.d.comb += [
                memory.write_addr.eq(write_rows[p % pieces]), memory.write_data.eq(write_data.word_select(p, bits)),
                memory.write_en.eq(write_mask[p // pieces]), memory.read_addr.eq(read_rows[p % pieces]),
            ]  # fmt: skip
            result.append(memory.read_data)
        if self.checks:
            m.d.sync += Assert(
                ~(read_en & write_mask.any() & (read_rows[0] == write_rows[0])),
                f"a word of bank {b} is read while written",
            )
        return Cat(result)

    def _single_bank(
        self, m: Module, b: int, row: Signal, write_data: Signal, write_mask: Signal, read_en: Signal
    ) -> Value:
        """One memory with one address; a write of any part keeps the read port still."""
        memory = Memory(shape=self.word_bits, depth=self.depth // self.banks, init=[], attrs={"ram_style": "huge"})
        m.submodules[f"bank{b}"] = memory
        write = memory.write_port(granularity=self.word_bits // self.parts)
        read = memory.read_port(domain="sync")
        m.d.comb += [
            write.addr.eq(row), write.data.eq(write_data), write.en.eq(write_mask),
            read.addr.eq(row), read.en.eq(read_en & ~write_mask.any()),
        ]  # fmt: skip
        word = Signal(self.word_bits, name=f"b{b}_word", reset_less=True)
        m.d.sync += word.eq(read.data)
        return word
