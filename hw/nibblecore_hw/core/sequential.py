"""The MAC engine of a core that runs one instruction at a time: one dot product per cycle, column after column."""

import itertools
from collections.abc import MutableSequence, Sequence
from typing import Any

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import LOCAL_ADDR_BITS, Instruction, Opcode
from nibblecore.arch.numerics import wrap

from ..layouts import (
    SEQUENTIAL_READ_LATENCY,
    acc_read_port,
    command_signature,
    instruction_layout,
    read_port,
)

__all__ = ["PairedDot", "SequentialMac"]


class PairedDot(wiring.Component):
    """Dot product of ``lanes`` nibbles with two products per multiplier, in the same cycle.

    ``(a0 + 2**8 * a1) * (w1 + 2**8 * w0)`` holds ``a0*w0 + a1*w1`` from bit 8 on, above ``a0*w1``, whose sign is
    borrowed from it, and below ``a1*w0``, which is cut off. The wanted sum is in -112..128; with 113 added, and the
    borrow not yet given back, eight bits hold it without a sign. Multipliers take 13 x 13 bits: one SB_MAC16 each.

    Parameters
    ----------
    lanes : int
        Products, a multiple of 4.

    Members
    -------
    activations, weights : In(ArrayLayout(signed(4), lanes))
    sum : Out(signed(8 + log2(lanes)))
    """

    activations: Any
    weights: Any
    sum: Signal

    def __init__(self, *, lanes: int) -> None:
        self._lanes = lanes
        word = data.ArrayLayout(signed(4), lanes)
        super().__init__({"activations": In(word), "weights": In(word), "sum": Out(signed(8 + ceil_log2(lanes)))})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        parts: list[Value] = []
        borrows: list[Value] = []
        for n in range(0, self._lanes, 2):
            a, w, p = Signal(signed(13), name=f"a{n}"), Signal(signed(13), name=f"w{n}"), Signal(26, name=f"p{n}")
            m.d.comb += [
                a.eq(self.activations[n] + (self.activations[n + 1] << 8)),
                w.eq(self.weights[n + 1] + (self.weights[n] << 8)),
                p.eq(a * w + Const(113 << 8)),
            ]
            parts.append(p[8:16])
            borrows.append(p[7])
        # Every adder has a carry to give a borrow back; the last one is left for the constant.
        while len(parts) > 1:
            added = [parts[n] + parts[n + 1] + borrows.pop() for n in range(0, len(parts), 2)]
            parts = [total[: len(parts[0]) + 1] for total in added]
        m.d.comb += self.sum.eq(parts[0] + borrows.pop() - 113 * (self._lanes // 2))
        assert not borrows
        return m

    @staticmethod
    def model(activations: Sequence[int], weights: Sequence[int]) -> int:
        """``sum``."""
        return sum(a * w for a, w in zip(activations, weights, strict=True))


class SequentialMac(wiring.Component):
    """Executes MAC instructions: ``lanes`` products per cycle, a pixel in ``columns`` cycles.

    What :class:`nibblecore_hw.core.mac.MacEngine` is to its neighbours, for cores without queues. Weights are not kept:
    every pixel reads the words of its tile anew, one per cycle, from a buffer that nobody else uses meanwhile. So the
    two banks of accumulators are halves of one memory, which the post unit reads when no MAC runs. The instruction has
    to stay from ``command.valid`` to ``done_stb``, as nothing of it is copied.

    Cycles of an instruction, from the one in which its command transfers to ``done_stb``: ``passes * pixels * columns +
    SEQUENTIAL_READ_LATENCY + 2``, and one more for each grant that is refused.

    Parameters
    ----------
    arch : ArchConfig
        The core; its ``post_lanes`` are 1.

    Members
    -------
    As those of :class:`nibblecore_hw.core.mac.MacEngine`. ``mac_weights`` and ``mac_bank``: the grant of a word of
    weights, of activations was refused.
    """

    command: Any
    done_stb: Signal
    busy: Signal
    x: Any
    w: Any
    acc_read: Any
    mac_weights: Signal
    mac_bank: Signal
    mac_active: Signal

    def __init__(self, arch: ArchConfig) -> None:
        self._arch = arch
        super().__init__(
            {
                "command": In(command_signature()),
                "done_stb": Out(1),
                "busy": Out(1),
                "x": Out(read_port(addr_bits=ceil_log2(arch.act_depth), word_bits=arch.word_bits)),
                "w": Out(read_port(addr_bits=ceil_log2(arch.weight_depth), word_bits=arch.word_bits)),
                "acc_read": In(acc_read_port(arch)),
                "mac_weights": Out(1),
                "mac_bank": Out(1),
                "mac_active": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        arch = self._arch
        i = data.View(instruction_layout(Opcode.MAC), self.command.payload)
        start, step = Signal(), Signal()
        running = Signal()

        # Loops, innermost first; `moves` is the one that goes on when the last column of a pixel has been read.
        names = ("ox", "oy", "brick", "kx", "ky")
        fields = dict(zip(names, ("cols", "rows", "bricks", "kernel_x", "kernel_y"), strict=True))
        column = Signal(range(arch.columns))
        next_pixel, moves, over = Signal(), Signal(len(names)), Signal()
        m.d.comb += next_pixel.eq(step & (column == arch.columns - 1))
        with m.If(step):
            m.d.sync += column.eq(column + 1)
        inner: Value = next_pixel
        is_last = {}
        for n, name in enumerate(names):
            number = Signal(len(i[fields[name]]), name=f"number_{name}", reset_less=True)
            is_last[name] = Signal(name=f"is_last_{name}")
            m.d.comb += [is_last[name].eq(number == i[fields[name]]), moves[n].eq(inner & ~is_last[name])]
            with m.If(start | (inner & is_last[name])):
                m.d.sync += number.eq(0)
            with m.Elif(inner):
                m.d.sync += number.eq(number + 1)
            inner = inner & is_last[name]
        m.d.comb += over.eq(inner)
        ox, oy, brick, kx, ky = moves
        pass_ends = Signal()
        m.d.comb += pass_ends.eq(next_pixel & is_last["ox"] & is_last["oy"])

        # The address: where the word is, and where the loops around it began.
        addr_bits = len(self.x.addr)
        address = [Signal(addr_bits, name=f"address_{name}", reset_less=True) for name in names]
        base, more, total = Signal(addr_bits), Signal(addr_bits), Signal(addr_bits)
        m.d.comb += [base.eq(0), more.eq(i.x_addr), total.eq(base + more)]
        for n, name in enumerate(names):
            with m.If(moves[n]):
                m.d.comb += [base.eq(address[n]), more.eq(i[f"{name}_step"])]
            with m.If(start | moves[n:].any()):
                m.d.sync += address[n].eq(total)

        # Coordinates. They fit 16 bits: 127 + 1023*16 + 63*32 at most.
        inside = []
        for axis, move, tap, returns in (("x", ox, kx, oy | brick), ("y", oy, ky, brick | kx)):
            at = Signal(signed(16), name=axis, reset_less=True)
            origin = Signal(signed(16), name=f"{axis}_of_tap", reset_less=True)
            added, by, now = Signal(signed(16), name=f"{axis}_base"), Signal(6, name=f"{axis}_by"), Signal(signed(16))
            m.d.comb += [added.eq(i[f"{axis}0"]), by.eq(0), now.eq(added + by)]
            with m.If(move):
                m.d.comb += [added.eq(at), by.eq(i[f"stride_{axis}"] + 1)]
            with m.If(tap):
                m.d.comb += [added.eq(origin), by.eq(i[f"dilation_{axis}"] + 1)]
            with m.If(returns):
                m.d.comb += added.eq(origin)
            # Along x, a move of ky begins anew, as the start does; along y, ox does not move at all.
            anew = start | (ky if axis == "x" else Const(0))
            with m.If(anew | move | tap | returns):
                m.d.sync += at.eq(now)
            with m.If(anew | tap):
                m.d.sync += origin.eq(now)
            limit = i.width if axis == "x" else i.height
            inside += [~at[len(limit) :].any(), at[: len(limit)] <= limit]
        is_inside = Cat(inside).all()

        # Weights.
        tile = Signal(len(self.w.addr), reset_less=True)
        with m.If(start):
            m.d.sync += tile.eq(i.w_addr)
        with m.Elif(pass_ends):
            m.d.sync += tile.eq(tile + i.w_step)

        first_pass = Signal(reset_less=True)
        with m.If(start | pass_ends):
            m.d.sync += first_pass.eq(start)
        m.d.comb += [
            self.x.addr.eq(address[0]),
            self.x.valid.eq(running & is_inside),
            self.w.addr.eq(tile + column),
            self.w.valid.eq(running),
            step.eq(running & self.w.ready & (self.x.ready | ~is_inside)),
            self.mac_active.eq(step),
            self.mac_weights.eq(running & ~self.w.ready),
            self.mac_bank.eq(self.x.valid & self.w.ready & ~self.x.ready),
        ]

        # What was read arrives SEQUENTIAL_READ_LATENCY edges later.
        orders = data.StructLayout({"valid": 1, "inside": 1, "overwrite": 1, "pass_ends": 1})
        order = Signal(orders)
        m.d.comb += [
            order.valid.eq(step),
            order.inside.eq(is_inside),
            order.overwrite.eq(first_pass & ~i.accumulate),
            order.pass_ends.eq(pass_ends),
        ]
        in_flight = []
        for n in range(SEQUENTIAL_READ_LATENCY):
            later = Signal(orders, name=f"order{n}")
            m.d.sync += later.eq(order)
            in_flight.append(later.valid)
            order = later
        m.submodules.dot = dot = PairedDot(lanes=arch.lanes)
        word = dot.activations.shape()
        product = Signal(dot.sum.shape(), reset_less=True)
        m.d.comb += [
            dot.activations.eq(data.View(word, Mux(order.inside, self.x.data, i.pad.replicate(arch.lanes)))),
            dot.weights.eq(data.View(word, self.w.data)),
        ]
        m.d.sync += product.eq(dot.sum)

        # Accumulators: read beside the product, written a cycle later. A pass takes 2 cycles or more.
        place = Signal(ceil_log2(arch.acc_depth * arch.columns), reset_less=True)
        adds, overwrites = Signal(), Signal(reset_less=True)
        m.submodules.accumulators = memory = Memory(
            shape=unsigned(arch.acc_bits), depth=2 * arch.acc_depth * arch.columns, init=[], attrs={"no_rw_check": 1}
        )
        read, write = memory.read_port(), memory.write_port()
        m.d.sync += [adds.eq(order.valid), overwrites.eq(order.overwrite), write.addr.eq(read.addr)]
        with m.If(start | (order.valid & order.pass_ends)):
            m.d.sync += place.eq(0)
        with m.Elif(order.valid):
            m.d.sync += place.eq(place + 1)
        drained = Cat(self.acc_read.group, self.acc_read.addr, self.acc_read.bank)
        shifted = Signal(signed(len(product) + 8))
        m.d.comb += [
            read.addr.eq(Mux(self.busy, Cat(place, i.acc_bank), drained)),
            shifted.eq(Mux(i.shift[1], product << 8, Mux(i.shift[0], product << 4, product))),
            write.data.eq(Mux(overwrites, 0, read.data) + shifted),
            write.en.eq(adds),
            self.acc_read.data[0].eq(read.data),
        ]

        m.d.comb += self.busy.eq(1)
        with m.FSM(name="mac_state"):
            with m.State("IDLE"):
                m.d.comb += [self.busy.eq(0), self.command.ready.eq(1), start.eq(self.command.valid)]
                with m.If(self.command.valid):
                    m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += running.eq(1)
                with m.If(over):
                    m.next = "DRAIN"
            with m.State("DRAIN"), m.If(~Cat(in_flight, adds).any()):
                m.d.comb += self.done_stb.eq(1)
                m.next = "IDLE"
        return m

    def model(
        self,
        instruction: Instruction,
        *,
        x: Sequence[int],
        w: Sequence[int],
        acc: Sequence[Sequence[MutableSequence[int]]],
    ) -> None:
        """As :meth:`nibblecore_hw.core.mac.MacEngine.model`."""
        arch, i = self._arch, instruction

        def nibbles(memory: Sequence[int], address: int) -> list[int]:
            word = memory[address % (1 << LOCAL_ADDR_BITS) % len(memory)]
            return [wrap(word >> 4 * lane, 4) for lane in range(arch.lanes)]

        passes = itertools.product(range(i["kernel_y"]), range(i["kernel_x"]), range(i["bricks"]))
        for n, (ky, kx, brick) in enumerate(passes):
            tile = [nibbles(w, i["w_addr"] + n * i["w_step"] + column) for column in range(arch.columns)]
            for oy, ox in itertools.product(range(i["rows"]), range(i["cols"])):
                row = i["y0"] + oy * i["stride_y"] + ky * i["dilation_y"]
                col = i["x0"] + ox * i["stride_x"] + kx * i["dilation_x"]
                word = [i["pad"]] * arch.lanes
                if 0 <= row < i["height"] and 0 <= col < i["width"]:
                    at = i["x_addr"] + oy * i["oy_step"] + ox * i["ox_step"] + brick * i["brick_step"]
                    word = nibbles(x, at + ky * i["ky_step"] + kx * i["kx_step"])
                cells = acc[i["acc_bank"]][oy * i["cols"] + ox]
                for column, weights in enumerate(tile):
                    before = cells[column] if n or i["accumulate"] else 0
                    cells[column] = wrap(before + (PairedDot.model(word, weights) << 4 * i["shift"]), arch.acc_bits)
