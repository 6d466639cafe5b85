"""Block RAM with a register at its output."""

from typing import Any, Final

from amaranth import Cat, ClockSignal, Const, Module, Signal, Value
from amaranth.hdl import Instance
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from ..technology import check_technology

_ECP5_WIDTHS: Final = ((512, 36), (1024, 18), (2048, 9), (4096, 4), (8192, 2), (16384, 1))
"""Words and bits of a ``DP16KD``."""


class BlockMemory(wiring.Component):
    """A simple dual-port memory: one write and one read per cycle, two edges from a read's address to its data.

    The second of the two edges is that of the output register of block RAM. On an ECP5 its outputs are valid 5.8 ns
    after the clock without it and 0.95 ns with it (nextpnr's timing database, speed grade 6), and a register of the
    fabric would be one flip-flop and a wire per bit. Yosys does not merge a register into ``DP16KD``; so the primitive
    is instantiated.

    A word must not be read at the edge at which it is written: what is read then is undefined on an ECP5. Contents are
    0 after configuration, and survive a reset; the data of the first two cycles mean nothing.

    Parameters
    ----------
    width : int
        Bits of a word.
    depth : int
        Words.
    technology : {"generic", "ecp5"}
        ``ecp5`` instantiates ``DP16KD`` for up to 16384 words, in its widest shape of ``depth`` words; ``generic``, and
        more words, are left to synthesis.

    Members
    -------
    write_addr, write_data, write_en : In
    read_addr : In(log2(depth))
    read_data : Out(width)
        The word whose address was on ``read_addr`` two cycles before.

    Raises
    ------
    ValueError
        If ``width`` is below 1, ``depth`` below 2, or the technology unknown.
    """

    write_addr: Signal
    write_data: Signal
    write_en: Signal
    read_addr: Signal
    read_data: Signal

    def __init__(self, *, width: int, depth: int, technology: str = "generic") -> None:
        for name, value, least in (("width", width, 1), ("depth", depth, 2)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value!r}")
        self._width, self._depth, self._technology = width, depth, check_technology(technology)
        addr_bits = ceil_log2(depth)
        super().__init__(
            {
                "write_addr": In(addr_bits),
                "write_data": In(width),
                "write_en": In(1),
                "read_addr": In(addr_bits),
                "read_data": Out(width),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        if self._technology == "ecp5" and self._depth <= _ECP5_WIDTHS[-1][0]:
            self._instantiate(m)
            return m
        # no_rw_check: without the promise about words read while written, Yosys builds a bypass.
        memory = Memory(shape=self._width, depth=self._depth, init=[], attrs={"ram_style": "block", "no_rw_check": 1})
        m.submodules.words = memory
        write, read = memory.write_port(), memory.read_port()
        word = Signal(self._width, reset_less=True)
        m.d.comb += [
            write.addr.eq(self.write_addr), write.data.eq(self.write_data), write.en.eq(self.write_en),
            read.addr.eq(self.read_addr), read.en.eq(1), self.read_data.eq(word),
        ]  # fmt: skip
        m.d.sync += word.eq(read.data)
        return m

    def _instantiate(self, m: Module) -> None:
        """Port A writes, port B reads; words of 36 bits take the data pins of both."""
        bits = next(bits for words, bits in _ECP5_WIDTHS if words >= self._depth)
        # A word's address begins above those of the bits or bytes in it. In words of 18 and 36 bits, the lowest two
        # and four address pins of a port that writes enable bytes. In words of 36 bits nothing else may: nextpnr then
        # sets the mode of PDPW16KD, which has no write enable, and leaves alone what WEA means.
        shift = {36: 5, 18: 4, 9: 3, 4: 2, 2: 1, 1: 0}[bits]
        enables = {36: 4, 18: 2}.get(bits, 0)
        for n, low in enumerate(range(0, self._width, bits)):
            data, word = self.write_data[low : low + bits], Signal(bits, name=f"word{n}")
            pins: dict[str, Value | int | str] = {
                "p_DATA_WIDTH_A": bits, "p_DATA_WIDTH_B": bits, "p_REGMODE_A": "OUTREG", "p_REGMODE_B": "OUTREG",
                "p_WRITEMODE_A": "NORMAL", "p_WRITEMODE_B": "NORMAL", "p_RESETMODE": "SYNC", "p_GSR": "DISABLED",
                "i_WEA": Const(1) if enables else self.write_en, "i_WEB": Const(0),
                "i_CEA": Const(1), "i_CEB": Const(1),
            }  # fmt: skip
            for port, addr in (("A", self.write_addr), ("B", self.read_addr)):
                lowest = Cat(self.write_en.replicate(enables if port == "A" else 0), Const(0, 5))[:shift]
                pins |= {f"i_CLK{port}": ClockSignal(), f"i_OCE{port}": Const(1), f"i_RST{port}": Const(0)}
                pins |= {f"i_CS{port}{i}": Const(0) for i in range(3)}
                full = Cat(lowest, addr, Const(0, 14))
                pins |= {f"i_AD{port}{i}": full[i] for i in range(14)}
            padded = Cat(data, Const(0, 36))
            pins |= {f"i_DIA{i}": padded[i] for i in range(18)}
            pins |= {f"i_DIB{i}": padded[18 + i] for i in range(18)}
            # An open pin would be a lint error in Verilator.
            outputs = {"A": Signal(18, name=f"outputs_a{n}"), "B": Signal(18, name=f"outputs_b{n}")}
            pins |= {f"o_DO{port}{i}": value[i] for port, value in outputs.items() for i in range(18)}
            m.submodules[f"ram{n}"] = Instance("DP16KD", **pins)
            wide = Cat(outputs["A"], outputs["B"])
            m.d.comb += word.eq(wide if bits == 36 else outputs["B"][:bits])
            m.d.comb += self.read_data[low : low + bits].eq(word)
