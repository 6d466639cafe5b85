"""Accumulators: memories of column groups with a pipelined read-modify-write."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

from amaranth import Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.numerics import wrap

from ..layouts import ACC_READ_LATENCY, acc_read_port
from ..mem.block import BlockMemory
from ..registers import copies
from ..technology import check_technology
from .elements.ecp5 import add_kept


class AccumulateAdder(wiring.Component):
    """``(kept & keep) + (either[0] | either[1])``, modulo ``2**bits``, in the same cycle.

    On an ECP5 the four inputs of a carry cell take all of it, and no LUT stands before the adder.

    Parameters
    ----------
    bits : int
        Width of operands and sum, at least 1.
    technology : {"generic", "ecp5"}
        ``ecp5`` instantiates carry cells, ``generic`` leaves them to synthesis.

    Members
    -------
    kept : In(bits)
    keep : In(1)
    either : In(bits).array(2)
    total : Out(bits)

    Raises
    ------
    ValueError
        If the technology is unknown.
    """

    kept: Signal
    keep: Signal
    either: Any
    total: Signal

    def __init__(self, *, bits: int, technology: str = "generic") -> None:
        self._technology = check_technology(technology)
        super().__init__({"kept": In(bits), "keep": In(1), "either": In(bits).array(2), "total": Out(bits)})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        either = (self.either[0], self.either[1])
        if self._technology == "ecp5":
            add_kept(m, self.kept, self.keep, either, self.total, name="chain")
        else:
            m.d.comb += self.total.eq((self.kept & self.keep.replicate(len(self.kept))) + (either[0] | either[1]))
        return m


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

    Cycle ``k`` being that of ``control``, group ``g`` takes its sums in cycle ``k + latencies[g]``, and the memory of
    the group holds the result from cycle ``k + latencies[g] + 3`` on. One pixel per cycle.
    Between two pixels with the same address and bank must lie at least :attr:`HAZARD` cycles, which is for the
    sequencer to ensure; otherwise the second one adds to an outdated value.

    ``done_stb`` comes with the first cycle in which all groups hold the result of a pixel with ``end``: in cycle
    ``k + done_latency``.

    Every group has two memories of both banks, which are written alike: one gives what is added to, the other one what
    ``read`` asks for. So nothing has to be chosen behind a memory, and ``read`` may read one bank in every cycle while
    the other one is added to. It must not read the bank that is being added to. Contents are undefined after power-up
    and survive a reset.

    Parameters
    ----------
    arch : ArchConfig
        ``columns``, ``post_lanes``, ``acc_bits`` and ``acc_depth`` count.
    sum_bits : int
        Width of the array's sums, at most ``acc_bits``.
    latencies : sequence of int
        Cycles from ``control`` to the sums of each group, at least 1 (:attr:`SystolicArray.latencies`).
    technology : {"generic", "ecp5"}
        Primitives that may be instantiated.

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
        If ``sum_bits`` or ``latencies`` is out of range, or the technology is unknown.
    """

    HAZARD = 4

    control: data.View
    sums: data.View
    read: Any
    done_stb: Signal

    def __init__(
        self, arch: ArchConfig, *, sum_bits: int, latencies: Sequence[int], technology: str = "generic"
    ) -> None:
        if not 1 <= sum_bits <= arch.acc_bits:
            raise ValueError(f"sum_bits must be in 1..{arch.acc_bits}, not {sum_bits}")
        groups = arch.columns // arch.post_lanes
        if len(latencies) != groups or min(latencies) < 1:
            raise ValueError(f"latencies must be {groups} numbers of at least 1, not {list(latencies)}")
        self._arch = arch
        self._latencies = tuple(latencies)
        self._technology = check_technology(technology)
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
        return max(self._latencies) + 3

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        arch = self._arch
        groups = arch.columns // arch.post_lanes

        # delayed[i] is the control of i cycles ago. One line serves all groups, each of which taps it where its sums
        # arrive. Without a reset: what is in here when one begins comes to nothing before it ends.
        delayed: list[data.View] = [self.control]
        for i in range(1, self.done_latency):
            stage = Signal(control_layout(arch), name=f"delayed{i}", reset_less=True)
            m.d.sync += stage.eq(delayed[-1])
            delayed.append(stage)
        m.d.sync += self.done_stb.eq(delayed[-1].valid & delayed[-1].end)

        # Nobody waits for `read.en`, which comes late: what nobody asks for goes nowhere.
        asked = Signal(groups, reset_less=True)
        m.d.sync += asked.eq(1 << self.read.group)
        gates = Signal.like(asked, reset_less=True)
        m.d.sync += gates.eq(asked)
        words: list[Value] = []  # 0 where another group is asked
        word = data.ArrayLayout(signed(arch.acc_bits), arch.post_lanes)
        for group in range(groups):
            arrival = self._latencies[group]
            # The memory's address is asked for in the cycle of delayed[arrival - 1]; its word and the sum to be added
            # to it stand side by side two cycles later.
            begin, end = delayed[arrival - 1], delayed[arrival + 2]
            totals = Signal(word, name=f"totals{group}", reset_less=True)
            memories = [
                BlockMemory(width=word.size, depth=2 * arch.acc_depth, technology=self._technology) for _ in range(2)
            ]
            # A register for each of the two, as they are all over the chip.
            before_end = delayed[arrival + 1]
            write_addrs = copies(m, Cat(before_end.addr, before_end.bank), 2, name=f"write_addr{group}")
            for name, memory, addr, write_addr in (
                ("added", memories[0], Cat(begin.addr, begin.bank), write_addrs[0]),
                ("drained", memories[1], Cat(self.read.addr, self.read.bank), write_addrs[1]),
            ):
                m.submodules[f"group{group}_{name}"] = memory
                m.d.comb += [
                    memory.read_addr.eq(addr),
                    memory.write_addr.eq(write_addr),
                    memory.write_data.eq(totals),
                    memory.write_en.eq(end.valid),
                ]
            words.append(memories[1].read_data & gates[group].replicate(word.size))
            kept = data.View(word, memories[0].read_data)
            keeps = [Signal(name=f"{n}{group}", reset_less=True) for n in ("kept", "keep")]
            m.d.sync += [keeps[0].eq(~begin.overwrite), keeps[1].eq(keeps[0])]
            # Each is the reset of one of the two operands, so both are registers.
            shifts, stays, by_8 = (Signal(name=f"{n}{group}", reset_less=True) for n in ("shifts", "stays", "by_8"))
            m.d.sync += [shifts.eq(begin.shift != 0), stays.eq(begin.shift == 0), by_8.eq(begin.shift[1])]
            for lane in range(arch.post_lanes):
                column = group * arch.post_lanes + lane
                product = self.sums[column]
                straight = Signal(product.shape(), name=f"straight{column}", reset_less=True)
                shifted = Signal(signed(len(product) + 8), name=f"shifted{column}", reset_less=True)
                m.d.sync += [straight.eq(product), shifted.eq(Mux(by_8, product << 8, product << 4))]
                with m.If(shifts):
                    m.d.sync += straight.eq(0)
                with m.If(stays):
                    m.d.sync += shifted.eq(0)
                m.submodules[f"add{column}"] = adder = AccumulateAdder(bits=arch.acc_bits, technology=self._technology)
                m.d.comb += [adder.kept.eq(kept[lane]), adder.keep.eq(keeps[1])]
                m.d.comb += [adder.either[0].eq(straight), adder.either[1].eq(shifted)]
                m.d.sync += totals[lane].eq(adder.total)

        # The memory's two registers are the first two edges. Of large arrays, the groups are far apart: a register
        # between the choices among two of them and among all is the third, the one behind that the fourth.
        assert ACC_READ_LATENCY == 4
        pairs = []
        for n in range(0, groups, 2):
            pair = Signal(word.size, name=f"pair{n}", reset_less=True)
            m.d.sync += pair.eq(functools.reduce(operator.or_, words[n : n + 2]))
            pairs.append(pair)
        drained_word = Signal(word, reset_less=True)
        m.d.sync += drained_word.eq(functools.reduce(operator.or_, pairs))
        m.d.comb += self.read.data.eq(drained_word)
        return m

    def model(self, before: int, product: int, *, overwrite: bool, shift: int) -> int:
        """What an accumulator holds after a sum ``product`` was added to what it held ``before``."""
        return wrap((0 if overwrite else before) + (product << 4 * shift), self._arch.acc_bits)
