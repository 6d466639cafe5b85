"""The control and status registers: an AXI4-Lite slave generated from :data:`nibblecore.arch.regs.REGISTERS`."""

from typing import Any

from amaranth import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Member, Out

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import ISA_VERSION, REGIONS
from nibblecore.arch.regs import CSR_ADDR_BITS, REGISTERS, Counter, Register, field

from ..layouts import axi_lite_signature, region_layout
from .counters import COUNTER_BITS, SLOTS

OKAY, SLVERR = 0, 2

_PAGE_LOG2 = 4
_PAGE = 1 << _PAGE_LOG2
_COUNTER_NAMES = {f"COUNT_{c.name}": c for c in Counter}
_REGION_NAMES = [f"REGION{n}_{what}" for n in range(REGIONS) for what in ("BASE", "SIZE")]
_REGION_PAGE = REGISTERS[_REGION_NAMES[0]].offset >> 2 + _PAGE_LOG2
# Their registers fill a page, which is the LUT RAM.
assert [REGISTERS[name].offset >> 2 for name in _REGION_NAMES] == [_REGION_PAGE * _PAGE + n for n in range(_PAGE)]
# A counter's turn is found in its address.
assert all(REGISTERS[name].offset >> 2 & SLOTS - 1 == c for name, c in _COUNTER_NAMES.items())


def constants(arch: ArchConfig) -> dict[str, int]:
    """Registers that never change, with what they hold."""
    return {
        "MAGIC": REGISTERS["MAGIC"].reset,
        "VERSION": ISA_VERSION << field("VERSION", "isa").low,
        "CONFIG_HASH": arch.hash,
    }


def bits_of(register: Register) -> int:
    """Mask of the register's bits that mean something; the others read as 0 and ignore writes."""
    if not register.fields:
        return 0xFFFF_FFFF
    return sum((1 << f.bits) - 1 << f.low for f in register.fields)


def member(name: str) -> str:
    """The register's member of :class:`Csr`."""
    return name.lower()


def _write_bytes(m: Module, held: Value, word: Value, strobes: Signal) -> None:
    """Byte by byte, so that strobes become clock enables and not multiplexers."""
    for n, strobe in enumerate(strobes):
        with m.If(strobe):
            m.d.sync += held[8 * n : 8 * n + 8].eq(word[8 * n : 8 * n + 8])


class Csr(wiring.Component):
    """The register file behind an AXI4-Lite slave port.

    Write address and data may come in any order, one access per direction is served at a time. An access to an offset
    without a register and a write to a read-only register are answered with SLVERR and change nothing; a read of a
    write-only register gives 0. The two lowest address bits are ignored. Write strobes select bytes.

    Cycles: a write acts, and its response is valid, in the second cycle after address and data were both accepted; read
    data are valid 3 cycles after the address was accepted, those of a counter up to 15 cycles later. In the first 16
    cycles after a reset nothing acts, as the regions' registers, which lie in LUT RAM, are being cleared.

    Parameters
    ----------
    arch : ArchConfig
        For the constant registers, and for whether there are ``counters``.

    Members
    -------
    s_axil : Out(axi_lite_signature())
        The slave port (the signature is written from the slave's side).
    <register> : Out(32) or In(32)
        For every register that is neither constant, write-only, a counter nor a region's, by its name in lower case:
        what ``rw`` registers hold, and what ``ro`` and ``w1c`` registers shall read as.
    <register>_ones : Out(32)
        For ``wo`` and ``w1c`` registers: the bits that were written as 1; 0 in all other cycles.
    <register>_stb : Out(1)
        For these ``rw`` registers: written; the register holds the new value in this cycle.
    fetch_region : Out(region_layout())
        What the registers of region 0 hold; not where ``arch.sequential``.
    region_en, region_number, region_size : In(1), In(3), In(1)
        Look up a region's base, or its size: a read of the host waits for it. Where ``arch.sequential`` there is no
        ``region_size``, and nobody waits.
    region_word : Out(32)
        What was asked for, in the same cycle; not where ``arch.sequential``.
    region : Out(region_layout())
        Only where ``arch.sequential``: base and size of the region, from the cycle behind ``region_en`` to the next
        one. They come from block RAM, of which there is enough, instead of registers.
    slot, count : In(4), In(32)
        From :class:`nibblecore_hw.ctrl.counters.Counters`, where there are counters.

    Raises
    ------
    TypeError
        If ``arch`` is no ArchConfig.
    """

    s_axil: Any
    fetch_region: Any
    region_en: Signal
    region_number: Signal
    region_size: Signal
    region_word: Signal
    region: Any
    slot: Signal
    count: Signal

    def __init__(self, *, arch: ArchConfig) -> None:
        if not isinstance(arch, ArchConfig):
            raise TypeError(f"arch must be an ArchConfig, not {arch!r}")
        self._arch = arch
        self._constants = constants(arch)
        members: dict[str, Member] = {
            "s_axil": Out(axi_lite_signature()),
            "fetch_region": Out(region_layout()),
            "region_en": In(1),
            "region_number": In(range(REGIONS)),
            "region_size": In(1),
            "region_word": Out(32),
        }
        for name, register in REGISTERS.items():
            if name in self._constants or name in _COUNTER_NAMES or name in _REGION_NAMES:
                continue
            if register.access == "rw":
                members[member(name)] = Out(32, init=register.reset)
                members[f"{member(name)}_stb"] = Out(1)
            if register.access in ("ro", "w1c"):
                members[member(name)] = In(32)
            if register.access in ("wo", "w1c"):
                members[f"{member(name)}_ones"] = Out(32)
        if arch.counters:
            members["slot"] = In(range(SLOTS))
            members["count"] = In(COUNTER_BITS)
        if arch.sequential:
            for name in ("fetch_region", "region_size", "region_word"):
                del members[name]
            members["region"] = Out(region_layout())
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.regions = regions = Memory(shape=32, depth=_PAGE, init=[], attrs={"ram_style": "distributed"})
        clearing, cleared = Signal(init=1), Signal(range(_PAGE))
        m.d.sync += cleared.eq(cleared + 1)
        with m.If(cleared == _PAGE - 1):
            m.d.sync += clearing.eq(0)
        write = regions.write_port(granularity=8)
        self._write(m, write, clearing, cleared)
        self._read(m, regions.read_port(domain="sync" if self._arch.sequential else "comb"), clearing)
        if self._arch.sequential:
            self._look_up(m, write)
        return m

    def _look_up(self, m: Module, regions: Any) -> None:
        """Copies of the regions' registers, from which both of one region are read at once."""
        for n, (name, word) in enumerate((("bases", self.region.base), ("sizes", self.region.size))):
            memory = Memory(shape=32, depth=REGIONS, init=[], attrs={"ram_style": "block"})
            m.submodules[name] = memory
            write, read = memory.write_port(granularity=8), memory.read_port()
            m.d.comb += [
                write.addr.eq(regions.addr[1:]),
                write.data.eq(regions.data),
                write.en.eq(Mux(regions.addr[0] == n, regions.en, 0)),
                read.addr.eq(self.region_number),
                read.en.eq(self.region_en),
                word.eq(read.data),
            ]

    def _write(self, m: Module, regions: Any, clearing: Signal, cleared: Signal) -> None:
        bus = self.s_axil
        index = Signal(CSR_ADDR_BITS - 2, reset_less=True)
        word = Signal(32)  # 0 while the regions are cleared
        strobes = Signal(4, reset_less=True)
        have_addr, have_data = Signal(), Signal()
        act = Signal()
        m.d.comb += [
            bus.awready.eq(~have_addr & ~bus.bvalid),
            bus.wready.eq(~have_data & ~bus.bvalid & ~clearing),
            act.eq(have_addr & have_data),
        ]
        with m.If(bus.awvalid & bus.awready):
            m.d.sync += [have_addr.eq(1), index.eq(bus.awaddr[2:])]
        with m.If(bus.wvalid & bus.wready):
            m.d.sync += [have_data.eq(1), word.eq(bus.wdata), strobes.eq(bus.wstrb)]
        with m.If(act):
            m.d.sync += [have_addr.eq(0), have_data.eq(0), bus.bvalid.eq(1), bus.bresp.eq(SLVERR)]
        with m.If(bus.bvalid & bus.bready):
            m.d.sync += bus.bvalid.eq(0)

        selected = Signal(32)  # the bits that the strobes select
        m.d.comb += selected.eq(Cat(strobe.replicate(8) for strobe in strobes))
        for name, register in REGISTERS.items():
            if register.access == "rw":
                if name not in _REGION_NAMES:
                    m.d.sync += getattr(self, f"{member(name)}_stb").eq(0)
            elif register.access != "ro":
                m.d.sync += getattr(self, f"{member(name)}_ones").eq(0)
        of_region = Signal()
        m.d.comb += [
            of_region.eq(index[_PAGE_LOG2:] == _REGION_PAGE),
            regions.addr.eq(Mux(clearing, cleared, index[:_PAGE_LOG2])),
            regions.data.eq(word),
            regions.en.eq(Mux(act & of_region, strobes, 0) | clearing.replicate(len(strobes))),
        ]
        with m.If(act & of_region):
            m.d.sync += bus.bresp.eq(OKAY)
            if not self._arch.sequential:
                # Fetch reads its region's registers both at once.
                for n, held in enumerate((self.fetch_region.base, self.fetch_region.size)):
                    with m.If(index[:_PAGE_LOG2] == n):
                        _write_bytes(m, held, word, strobes)
        with m.If(act), m.Switch(index):
            for name, register in REGISTERS.items():
                if register.access == "ro" or name in _REGION_NAMES:
                    continue
                mask = bits_of(register)
                with m.Case(register.offset >> 2):
                    m.d.sync += bus.bresp.eq(OKAY)
                    if register.access == "rw":
                        held = getattr(self, member(name))
                        m.d.sync += getattr(self, f"{member(name)}_stb").eq(1)
                        _write_bytes(m, held, word & mask, strobes)
                    else:
                        m.d.sync += getattr(self, f"{member(name)}_ones").eq(word & selected & mask)

    def _read(self, m: Module, regions: Any, clearing: Signal) -> None:
        bus = self.s_axil
        index = Signal(CSR_ADDR_BITS - 2, reset_less=True)
        busy = Signal()
        m.d.comb += bus.arready.eq(~busy & ~bus.rvalid)
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += [busy.eq(1), index.eq(bus.araddr[2:])]
        with m.If(bus.rvalid & bus.rready):
            m.d.sync += bus.rvalid.eq(0)

        # First look the register up in every page, then choose the page and answer; a counter when it is its turn.
        looked_up, found, counter = Signal(), Signal(), Signal()
        others = Const(0) if self._arch.sequential else self.region_en
        m.d.sync += [looked_up.eq(busy & ~clearing & ~others), found.eq(0), counter.eq(0)]
        pages: dict[int, Value] = {_REGION_PAGE: regions.data}
        if self._arch.sequential:
            m.d.comb += regions.addr.eq(index[:_PAGE_LOG2])
        else:
            m.d.comb += [
                regions.addr.eq(Mux(self.region_en, Cat(self.region_size, self.region_number), index[:_PAGE_LOG2])),
                self.region_word.eq(regions.data),
            ]
            pages[_REGION_PAGE] = Signal(32, name="page_regions", reset_less=True)
            m.d.sync += pages[_REGION_PAGE].eq(regions.data)
        with m.If(index[_PAGE_LOG2:] == _REGION_PAGE):
            m.d.sync += found.eq(1)
        for name, register in REGISTERS.items():
            if name in _REGION_NAMES:
                continue
            with m.If(index == register.offset >> 2):
                m.d.sync += found.eq(1)
            high, low = divmod(register.offset >> 2, _PAGE)
            if name in _COUNTER_NAMES:
                with m.If(index == register.offset >> 2):
                    m.d.sync += counter.eq(int(self._arch.counters))
                continue
            if high not in pages:
                pages[high] = Signal(32, name=f"page_{high}", reset_less=True)
                m.d.sync += pages[high].eq(0)
            with m.If(index[:_PAGE_LOG2] == low):
                m.d.sync += pages[high].eq(self._value(name, register))

        answer = Signal(32)
        ready = Value.cast(looked_up)
        with m.Switch(index[_PAGE_LOG2:]):
            for high, value in pages.items():
                with m.Case(high):
                    m.d.comb += answer.eq(value)
        if self._arch.counters:
            with m.If(counter):
                m.d.comb += answer.eq(self.count)
            ready = looked_up & (~counter | (self.slot == index[: len(self.slot)]))
        with m.If(ready):
            m.d.sync += [
                busy.eq(0),
                looked_up.eq(0),
                bus.rvalid.eq(1),
                bus.rdata.eq(Mux(found, answer, 0)),
                bus.rresp.eq(Mux(found, OKAY, SLVERR)),
            ]

    def _value(self, name: str, register: Register) -> Value | int:
        """What a read of the register gives."""
        if name in self._constants:
            return self._constants[name]
        if register.access == "wo":
            return 0
        return getattr(self, member(name)) & bits_of(register)
