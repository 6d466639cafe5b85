"""Banked on-chip memory with several readers and writers: the activation buffer and the weight buffer."""

import functools
import operator
from typing import get_args

from amaranth import Assert, Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import MemoryKind

from ..layouts import READ_LATENCY, read_port, write_port

__all__ = ["BankedBuffer"]


def _any(values: list[Value]) -> Value:
    return Cat(values).any() if values else Const(0)


class BankedBuffer(wiring.Component):
    """A memory of ``depth`` words in equal banks of consecutive addresses.

    Every port may be granted one access per cycle (``valid`` and ``ready``). Only accesses to the *same* bank compete,
    by fixed priority: a lower index of ``writes`` or ``reads`` wins. In a ``dual`` bank one read and one write go on in
    the same cycle; in a ``single`` bank there is one access, and every writer wins over every reader. ``ready`` depends
    combinationally on ``valid`` and ``addr`` of all ports that win over it, and not on its own ``valid``.

    Read data stands in the cycle that begins :data:`~nibblecore_hw.layouts.READ_LATENCY` edges after the grant: the
    memory's own register, one beside it, as block RAM of an ECP5 takes more than half a cycle of 100 MHz, and one
    behind the choice of a bank. A read granted at a later edge than a write sees it. A word of a ``dual`` bank must not
    be read at the edge at which it is written: what is read then is undefined, so that no bypass has to be built around
    block RAM. Whoever schedules the clients guarantees it; ``checks`` asserts it.

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
    checks : bool
        Assert in simulation and formal proofs that no word of a ``dual`` bank is read while it is written. Leave it off
        for synthesis.

    Members
    -------
    reads : In(read_port(...)).array(readers)
    writes : In(write_port(...)).array(writers)
    conflicts : Out(readers)
        Bit i: reader i asks in this cycle and is not granted.

    Raises
    ------
    ValueError
        For a parameter outside its range.
    """

    LATENCY = READ_LATENCY

    conflicts: Signal

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
        self.depth, self.banks, self.word_bits, self.parts, self.kind = depth, banks, word_bits, parts, kind
        self.readers, self.writers, self.checks = readers, writers, checks
        addr_bits = ceil_log2(depth)
        super().__init__(
            {
                "reads": In(read_port(addr_bits=addr_bits, word_bits=word_bits)).array(readers),
                "writes": In(write_port(addr_bits=addr_bits, word_bits=word_bits, parts=parts)).array(writers),
                "conflicts": Out(readers),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        row_bits = ceil_log2(self.depth // self.banks)
        bank_bits = ceil_log2(self.banks)
        reads, writes = list(self.reads), list(self.writes)

        def beaten(port: wiring.PureInterface, winners: list[wiring.PureInterface]) -> Value:
            return _any([w.valid & (w.addr[row_bits:] == port.addr[row_bits:]) for w in winners])

        for j, port in enumerate(writes):
            m.d.comb += port.ready.eq(~beaten(port, writes[:j]))
        for i, port in enumerate(reads):
            winners = reads[:i] + (writes if self.kind == "single" else [])
            m.d.comb += port.ready.eq(~beaten(port, winners))
        m.d.comb += self.conflicts.eq(Cat(port.valid & ~port.ready for port in reads))

        # The memory's register, `taken` beside it, and the one behind the OR of all banks.
        assert READ_LATENCY == 3
        bank_words = []
        for b in range(self.banks):
            wanted_w = [w.valid & (w.addr[row_bits:] == b) for w in writes]
            wanted_r = [r.valid & (r.addr[row_bits:] == b) for r in reads]
            write_row, write_data = Signal(row_bits, name=f"b{b}_wrow"), Signal(self.word_bits, name=f"b{b}_wdata")
            write_mask, read_row = Signal(self.parts, name=f"b{b}_wmask"), Signal(row_bits, name=f"b{b}_rrow")
            # The last port needs no test: what stands on the address of an idle memory does not matter.
            row, word, mask = writes[-1].addr[:row_bits], writes[-1].data, writes[-1].mask
            for w, wanted in reversed(list(zip(writes[:-1], wanted_w[:-1], strict=True))):
                row, word = Mux(wanted, w.addr[:row_bits], row), Mux(wanted, w.data, word)
                mask = Mux(wanted, w.mask, mask)
            m.d.comb += [write_row.eq(row), write_data.eq(word), write_mask.eq(Mux(_any(wanted_w), mask, 0))]
            row = reads[-1].addr[:row_bits]
            for r, wanted in reversed(list(zip(reads[:-1], wanted_r[:-1], strict=True))):
                row = Mux(wanted, r.addr[:row_bits], row)
            m.d.comb += read_row.eq(row)
            read_en = Signal(name=f"b{b}_ren")
            build = self._single_bank if self.kind == "single" else self._dual_bank
            m.d.comb += read_en.eq(_any(wanted_r))
            bank_words.append(build(m, b, write_row, write_data, write_mask, _any(wanted_w), read_row, read_en))

        # Every reader has a register per bank, which the bank's word enters or which is reset: so an OR chooses, one
        # LUT per bit for 4 banks, where a multiplexer takes three.
        for i, r in enumerate(reads):
            taken = []
            for b, bank_word in enumerate(bank_words):
                register = Signal(self.word_bits, name=f"taken_{i}_{b}", reset_less=True)
                m.d.sync += register.eq(bank_word)
                if bank_bits:
                    is_other = Signal(name=f"is_other_{i}_{b}", reset_less=True)
                    m.d.sync += is_other.eq(r.addr[row_bits:] != b)
                    with m.If(is_other):
                        m.d.sync += register.eq(0)
                taken.append(register)
            word = Signal(self.word_bits, name=f"word_{i}", reset_less=True)
            m.d.sync += word.eq(functools.reduce(operator.or_, taken))
            m.d.comb += r.data.eq(word)
        return m

    def _dual_bank(
        self, m: Module, b: int, write_row: Signal, write_data: Signal, write_mask: Signal, write_any: Value,
        read_row: Signal, read_en: Signal,
    ) -> Value:  # fmt: skip
        """One simple dual-port memory per part; returns the word behind the memory's register."""
        part_bits = self.word_bits // self.parts
        result = []
        for p in range(self.parts):
            # no_rw_check: the promise about words read while written, without which Yosys builds a bypass.
            memory = Memory(shape=part_bits, depth=self.depth // self.banks, init=[], attrs={"no_rw_check": 1})
            m.submodules[f"bank{b}_part{p}"] = memory
            # Without an enable nobody waits for who asks: what is read for nobody goes nowhere.
            write, read = memory.write_port(), memory.read_port(domain="sync")
            m.d.comb += [
                write.addr.eq(write_row), write.data.eq(write_data.word_select(p, part_bits)),
                write.en.eq(write_mask[p]), read.addr.eq(read_row), read.en.eq(1),
            ]  # fmt: skip
            result.append(read.data)
        if self.checks:
            m.d.sync += Assert(
                ~(read_en & write_mask.any() & (read_row == write_row)), f"a word of bank {b} is read while written"
            )
        return Cat(result)

    def _single_bank(
        self, m: Module, b: int, write_row: Signal, write_data: Signal, write_mask: Signal, write_any: Value,
        read_row: Signal, read_en: Signal,
    ) -> Value:  # fmt: skip
        """One memory with one address; a write of any part keeps the read port still."""
        memory = Memory(shape=self.word_bits, depth=self.depth // self.banks, init=[], attrs={"ram_style": "huge"})
        m.submodules[f"bank{b}"] = memory
        write = memory.write_port(granularity=self.word_bits // self.parts)
        read = memory.read_port(domain="sync")
        row = Signal.like(read_row, name=f"b{b}_row")
        m.d.comb += [
            row.eq(Mux(write_any, write_row, read_row)),
            write.addr.eq(row), write.data.eq(write_data), write.en.eq(write_mask),
            read.addr.eq(row), read.en.eq(read_en & ~write_any),
        ]  # fmt: skip
        return read.data
