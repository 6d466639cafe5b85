"""Accumulators: one memory per column group and bank, with a pipelined read-modify-write."""

from typing import Any

from amaranth import Array, Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.numerics import wrap

from ..layouts import ACC_READ_LATENCY, acc_read_port


def control_layout(arch: ArchConfig) -> data.StructLayout:
    """What is to be done with the sums of one pixel.

    ``valid``: anything at all; ``addr``, ``bank``: which accumulators; ``overwrite``: the sum replaces what they hold;
    ``shift``: the sum counts ``16**shift``; ``end``: this is the last one of an instruction.
    """
    return data.StructLayout(
        {
            "valid": unsigned(1),
            "addr": unsigned(ceil_log2(arch.acc_depth)),
            "bank": unsigned(1),
            "overwrite": unsigned(1),
            "shift": unsigned(2),
            "end": unsigned(1),
        }
    )


class Accumulators(wiring.Component):
    """Two banks of ``acc_depth`` accumulators per column, which add up what the array sends.

    Cycle ``k`` being that of ``control``, the sums of group ``g`` are taken in cycle ``k + latency + g``; the memory of
    the group holds the result from cycle ``k + latency + g + 3`` on. One pixel per cycle.
    Between two pixels with the same address and bank must lie at least :attr:`HAZARD` cycles, which is for the
    sequencer to ensure; otherwise the second one adds to an outdated value.

    ``done_stb`` comes with the first cycle in which all groups hold the result of a pixel with ``end``: in cycle
    ``k + done_latency``.

    The banks are separate memories: ``read`` may read one bank in every cycle while the other one is added to. It must
    not read the bank that is being added to. Contents are undefined after power-up and survive a reset.

    Parameters
    ----------
    arch : ArchConfig
        ``columns``, ``post_lanes``, ``acc_bits`` and ``acc_depth`` count.
    sum_bits : int
        Width of the array's sums, at most ``acc_bits``.
    latency : int
        Cycles from ``control`` to the sums of group 0, at least 1 (:attr:`SystolicArray.latency`).

    Members
    -------
    control : In(control_layout(arch))
    sums : In(ArrayLayout(signed(sum_bits), columns))
    read : In(acc_read_port(arch))
        Data after :data:`~nibblecore_hw.layouts.ACC_READ_LATENCY` edges.
    done_stb : Out(1)

    Raises
    ------
    ValueError
        If ``sum_bits`` or ``latency`` is out of range.
    """

    HAZARD = 4

    control: data.View
    sums: data.View
    read: Any
    done_stb: Signal

    def __init__(self, arch: ArchConfig, *, sum_bits: int, latency: int) -> None:
        if not 1 <= sum_bits <= arch.acc_bits:
            raise ValueError(f"sum_bits must be in 1..{arch.acc_bits}, not {sum_bits}")
        if latency < 1:
            raise ValueError(f"latency must be at least 1, not {latency}")
        self._arch = arch
        self._latency = latency
        super().__init__(
            {
                "control": In(control_layout(arch)),
                "sums": In(data.ArrayLayout(signed(sum_bits), arch.columns)),
                "read": In(acc_read_port(arch)),
                "done_stb": Out(1),
            }
        )

    @property
    def done_latency(self) -> int:
        """Cycles from ``control`` to ``done_stb``."""
        return self._latency + self._arch.columns // self._arch.post_lanes + 2

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        arch = self._arch
        groups = arch.columns // arch.post_lanes

        # delayed[i] is the control of i cycles ago. One line serves all groups, each of which taps it a cycle later
        # than the one before. Only what says that something is to be done needs a reset.
        delayed: list[data.View] = [self.control]
        for i in range(1, self.done_latency + 1):
            flags = Signal(2, name=f"flags{i}")
            rest = Signal(control_layout(arch), name=f"control{i}", reset_less=True)
            last = delayed[-1]
            m.d.sync += [flags.eq(Cat(last.valid, last.end)), rest.eq(last)]
            stage = Signal(control_layout(arch), name=f"delayed{i}")
            m.d.comb += [stage.eq(rest), stage.valid.eq(flags[0]), stage.end.eq(flags[1])]
            delayed.append(stage)
        m.d.comb += self.done_stb.eq(delayed[self.done_latency].valid & delayed[self.done_latency].end)

        held: dict[tuple[int, int], Signal] = {}
        word = data.ArrayLayout(signed(arch.acc_bits), arch.post_lanes)
        for group in range(groups):
            arrival = self._latency + group
            totals = Signal(word, name=f"totals{group}", reset_less=True)
            for bank in range(2):
                memory = Memory(shape=unsigned(word.size), depth=arch.acc_depth, init=[], attrs={"no_rw_check": 1})
                m.submodules[f"group{group}_bank{bank}"] = memory
                read, write = memory.read_port(), memory.write_port()
                begin, end = delayed[arrival - 1], delayed[arrival + 2]
                adding, draining = Signal(name=f"adding{group}_{bank}"), Signal(name=f"draining{group}_{bank}")
                held[group, bank] = Signal(word, name=f"held{group}_{bank}", reset_less=True)
                m.d.comb += [
                    adding.eq(begin.valid & (begin.bank == bank)),
                    draining.eq(self.read.en & (self.read.bank == bank) & (self.read.group == group)),
                    read.addr.eq(Mux(adding, begin.addr, self.read.addr)),
                    read.en.eq(adding | draining),
                    write.addr.eq(end.addr),
                    write.data.eq(totals),
                    write.en.eq(end.valid & (end.bank == bank)),
                ]
                m.d.sync += held[group, bank].eq(read.data)
            shift, add = delayed[arrival].shift, delayed[arrival + 1]
            for lane in range(arch.post_lanes):
                product = self.sums[group * arch.post_lanes + lane]
                shifted = Signal(signed(len(product) + 8), name=f"shifted{group}_{lane}", reset_less=True)
                with m.Switch(shift):
                    with m.Case(0):
                        m.d.sync += shifted.eq(product)
                    with m.Case(1):
                        m.d.sync += shifted.eq(product << 4)
                    with m.Default():
                        m.d.sync += shifted.eq(product << 8)
                before = Mux(add.overwrite, 0, Mux(add.bank, held[group, 1][lane], held[group, 0][lane]))
                m.d.sync += totals[lane].eq(before + shifted)

        # The memory's register and `held` are the first two edges of the drain, the register behind this multiplexer is
        # the third.
        assert ACC_READ_LATENCY == 3
        select: Value = Cat(self.read.bank, self.read.group)
        for i in range(2):
            later = Signal(len(select), name=f"select{i}", reset_less=True)
            m.d.sync += later.eq(select)
            select = later
        drained = Signal(word, reset_less=True)
        choices = Array([held[group, bank].as_value() for group in range(groups) for bank in range(2)])
        m.d.sync += drained.eq(choices[select])
        m.d.comb += self.read.data.eq(drained)
        return m

    def model(self, before: int, product: int, *, overwrite: bool, shift: int) -> int:
        """What an accumulator holds after a sum ``product`` was added to what it held ``before``."""
        return wrap((0 if overwrite else before) + (product << 4 * shift), self._arch.acc_bits)
