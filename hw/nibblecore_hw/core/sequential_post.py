"""The post unit of a core that runs one instruction at a time: one column, one tap, one address after the other."""

from typing import Any

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import PARAM_BITS, ArchConfig
from nibblecore.arch.isa import INSTRUCTIONS, LOCAL_ADDR_BITS, Instruction, Opcode, OutputMode
from nibblecore.arch.numerics import ADD_FACTOR_BITS, BIAS_BITS, MULT_BITS, SHIFT_MAX

from ..layouts import (
    acc_read_port,
    command_signature,
    instruction_layout,
    param_layout,
    read_port,
    write_port,
)
from .requantize import CODE_BITS, DIFFERENCE_BITS, RequantLane, RoundShiftClamp

__all__ = ["SequentialPost", "SerialRequantizer"]


class SerialRequantizer(wiring.Component):
    """One requantization, step by step, in :attr:`CYCLES` cycles and one to look at the code; nothing overlaps.

    The arithmetic is that of :class:`nibblecore_hw.core.requantize.RequantLane`, without its pipeline: whoever drives
    it raises ``add_stb``, ``multiply_stb``, ``shift_stb`` and ``round_stb`` in this order, one per cycle at most.
    Behind them is ``code``. With ``again_stb`` it becomes, less ``zero``, the first term of an addition, to which
    ``multiply_stb`` and what follows it lead once more.

    Parameters
    ----------
    acc_bits : int
        Width of an accumulator.

    Members
    -------
    acc, bias : In(signed(acc_bits)), In(signed(32))
        Looked at with ``add_stb``; so is ``mult``.
    mult, shift : In(signed(18)), In(unsigned(6))
        ``shift`` is looked at with ``shift_stb``; on a second pass it is that of the addition, plus 16.
    zero, low, high : In(signed(8))
        Of this pass, looked at with ``round_stb`` and behind it.
    k_a, k_b, b : In(signed(16)), In(signed(16)), In(signed(9))
        Factors of the addition; the stored code less its zero point. Looked at with ``again_stb``.
    add_stb, multiply_stb, shift_stb, round_stb, again_stb : In(1)
        Steps.
    again : Out(1)
        This is the second pass.
    sum : Out(signed(32))
        ``acc + bias``, behind ``add_stb``.
    code : Out(signed(8))
        Behind ``round_stb``.
    """

    CYCLES = 4

    acc: Signal
    bias: Signal
    mult: Signal
    shift: Signal
    zero: Signal
    low: Signal
    high: Signal
    k_a: Signal
    k_b: Signal
    b: Signal
    add_stb: Signal
    multiply_stb: Signal
    shift_stb: Signal
    round_stb: Signal
    again_stb: Signal
    again: Signal
    sum: Signal
    code: Signal

    def __init__(self, *, acc_bits: int) -> None:
        code, factor = signed(CODE_BITS), signed(ADD_FACTOR_BITS)
        super().__init__(
            {
                "acc": In(signed(acc_bits)),
                "bias": In(signed(BIAS_BITS)),
                "mult": In(signed(MULT_BITS)),
                "shift": In(range(SHIFT_MAX + 1)),
                "zero": In(code),
                "low": In(code),
                "high": In(code),
                "k_a": In(factor),
                "k_b": In(factor),
                "b": In(signed(DIFFERENCE_BITS)),
                **dict.fromkeys(("add_stb", "multiply_stb", "shift_stb", "round_stb", "again_stb"), In(1)),
                "again": Out(1),
                "sum": Out(signed(BIAS_BITS)),
                "code": Out(code),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        half = BIAS_BITS // 2
        # On the second pass the factors of the addition are the sum of nothing, and the differences multiply them.
        total = Signal(signed(BIAS_BITS), reset_less=True)
        low_factor, high_factor = (
            Signal(signed(MULT_BITS), name=name, reset_less=True) for name in ("low_factor", "high_factor")
        )
        m.d.comb += self.sum.eq(total)
        with m.If(self.add_stb | self.again_stb):
            m.d.sync += [
                self.again.eq(self.again_stb),
                total.eq(Mux(self.again_stb, Cat(self.k_b, self.k_a).as_signed(), self.acc + self.bias)),
                low_factor.eq(Mux(self.again_stb, self.b, self.mult)),
                high_factor.eq(Mux(self.again_stb, self.code - self.zero, self.mult)),
            ]

        low_product = Signal(signed(half + MULT_BITS))
        high_product = Signal(signed(half + MULT_BITS))
        product = Signal(signed(BIAS_BITS + MULT_BITS), reset_less=True)
        # The sum of the second pass stands `half` bits higher, where the two products of the first one are added. What
        # is below it does not count, as its shift is at least 1. Its products fit 24 bits: a difference is within
        # -255..255.
        lower = Mux(
            self.again, low_product[: DIFFERENCE_BITS + ADD_FACTOR_BITS].as_signed(), low_product[half:].as_signed()
        )
        m.d.comb += [
            low_product.eq(Cat(total[:half], total[half - 1] & self.again).as_signed() * low_factor),
            high_product.eq(total[half:].as_signed() * high_factor),
        ]
        with m.If(self.multiply_stb):
            m.d.sync += product.eq(Cat(low_product[:half], high_product + lower))

        # As RoundShiftClamp, from one register to the next.
        value: Value = Cat(Const(0, 1), product).as_signed()
        dropped: Value = Const(0, 1)
        for bit in reversed(range(len(self.shift))):
            value, dropped = RoundShiftClamp.halve(
                m, value, dropped, self.shift[bit], 1 << bit, keep=RoundShiftClamp.WINDOW + (1 << bit) - 1
            )
        window = Signal(signed(RoundShiftClamp.WINDOW), reset_less=True)
        is_far = Signal(reset_less=True)
        with m.If(self.shift_stb):
            m.d.sync += [window.eq(value), is_far.eq(dropped)]

        moved = Signal(signed(RoundShiftClamp.WINDOW), reset_less=True)
        is_far_r, is_negative = Signal(reset_less=True), Signal(reset_less=True)
        with m.If(self.round_stb):
            m.d.sync += [
                moved.eq(window[1:].as_signed() + self.zero + window[0]),
                is_far_r.eq(is_far),
                is_negative.eq(window[-1]),
            ]
        below = Mux(is_far_r, is_negative, moved < self.low)
        above = Mux(is_far_r, ~is_negative, moved > self.high)
        m.d.comb += self.code.eq(Mux(below, self.low, Mux(above, self.high, moved[:CODE_BITS].as_signed())))
        return m


class SequentialPost(wiring.Component):
    """Executes POST and POOL one column, one tap, one address after the other.

    What :class:`nibblecore_hw.core.post.PostUnit` is to its neighbours, for cores without queues, with its
    :meth:`~nibblecore_hw.core.post.PostUnit.model`. Addresses and coordinates lie in a memory, and one adder moves them
    on; :meth:`cycles` says how long that takes. The instruction has to stay from ``command.valid`` to ``done_stb``, as
    nothing of it is copied, and what a buffer has read has to stay until it reads or writes again.

    Parameters
    ----------
    arch : ArchConfig
        The core: ``queue_depth`` is 0, and so ``post_lanes`` 1 and a word as wide as a sum.

    Members
    -------
    As those of :class:`nibblecore_hw.core.post.PostUnit`, without ``params_wanted``; buffers and accumulators answer
    after one cycle.
    """

    command: Any
    done_stb: Signal
    busy: Signal
    bank_stall: Signal
    params: Any
    act_read: Any
    act_write: Any
    acc_read: Any

    def __init__(self, arch: ArchConfig) -> None:
        assert arch.sequential
        assert arch.word_bits == BIAS_BITS  # a consequence of ArchConfig's limits
        self._arch = arch
        act_addr_bits = ceil_log2(arch.act_depth)
        super().__init__(
            {
                "command": In(command_signature()),
                "done_stb": Out(1),
                "busy": Out(1),
                "bank_stall": Out(1),
                "params": Out(read_port(addr_bits=ceil_log2(arch.weight_depth), word_bits=arch.word_bits)),
                "act_read": Out(read_port(addr_bits=act_addr_bits, word_bits=arch.word_bits)),
                "act_write": Out(
                    write_port(addr_bits=act_addr_bits, word_bits=arch.word_bits, parts=arch.parts_per_brick)
                ),
                "acc_read": Out(acc_read_port(arch)),
            }
        )

    # Loops, outermost first, and what begins them all; `level` is one of these.
    _LOOPS = ("oy", "ox", "brick", "ky", "kx")
    _START = 7  # its places in the memory hold -1, and as coordinates' steps are stored minus 1, 1 is added to most
    _OY, _OX, _BRICK, _KY, _KX = range(len(_LOOPS))
    # What moves: the address that is read, the one that is written, the coordinates. POST has no coordinates; there,
    # the third one is the address of a record.
    _READ, _WRITE, _X, _Y = range(4)
    _RECORD = _X

    def elaborate(self, platform: object) -> Module:
        m = Module()
        arch = self._arch
        lanes, columns, word_bits = arch.lanes, min(arch.lanes, arch.columns), arch.word_bits
        partial = arch.parts_per_brick > 1
        post = instruction_layout(Opcode.POST)(self.command.payload)
        pool = instruction_layout(Opcode.POOL)(self.command.payload)
        # What both have is at the same place.
        places = [INSTRUCTIONS[o].layout() for o in (Opcode.POST, Opcode.POOL)]
        same = {n: n for n in ("cols", "rows", "out_addr", "out_ox_step", "out_oy_step", "bricks")}
        same |= {"add_addr": "in_addr", "add_ox_step": "ox_step", "add_oy_step": "oy_step"}
        assert all(places[0][ours][0] == places[1][theirs][0] for ours, theirs in same.items())
        is_pool, raw, wide, add = Signal(), Signal(), Signal(), Signal()
        assert int(Opcode.POST) ^ int(Opcode.POOL) == 1
        m.d.comb += [
            is_pool.eq(post.opcode[0] ^ (int(Opcode.POOL) & 1 ^ 1)),
            raw.eq(post.mode[1]),
            wide.eq(Mux(is_pool, pool.wide, post.mode[0])),
            add.eq(post.add),
        ]
        assert (int(OutputMode.INT4), int(OutputMode.INT8), int(OutputMode.RAW32)) == (0, 1, 2)

        # --- loops ------------------------------------------------------------------------------------------------

        level = Signal(3, reset_less=True)  # of the loop that moves on
        moves = Signal()
        is_start = Signal()
        m.d.comb += is_start.eq(level == self._START)
        is_last: dict[str, Signal] = {}
        numbers: dict[str, Signal] = {}
        for n, (name, field) in enumerate(
            zip(self._LOOPS, ("rows", "cols", "bricks", "kernel_y", "kernel_x"), strict=True)
        ):
            total: Value = pool[field]
            number = numbers[name] = Signal(len(total), name=f"number_{name}", reset_less=True)
            if name == "brick":
                total = Mux(is_pool, total, post.bricks if arch.bricks_per_tile > 1 else 0)
            is_last[name] = Signal(name=f"is_last_{name}")
            m.d.comb += is_last[name].eq(number == total)
            with m.If(moves):
                with m.If(level == n):
                    m.d.sync += number.eq(number + 1)
                with m.If(is_start | ((level < n) if n else 0)):
                    m.d.sync += number.eq(0)
        pixel = Signal(ceil_log2(arch.acc_depth), reset_less=True)
        with m.If(moves):
            with m.If(is_start):
                m.d.sync += pixel.eq(0)
            with m.Elif((level == self._OX) | (level == self._OY)):
                m.d.sync += pixel.eq(pixel + 1)

        # --- addresses and coordinates ----------------------------------------------------------------------------

        # One of each per loop: where that loop is, all inner ones being at their beginning.
        m.submodules.places = memory = Memory(
            shape=unsigned(LOCAL_ADDR_BITS),
            depth=32,
            init=[(1 << LOCAL_ADDR_BITS) - 1 if n % 8 == self._START else 0 for n in range(32)],
            attrs={"ram_style": "block", "no_rw_check": 1},
        )
        read, write = memory.read_port(), memory.write_port()
        what, place = Signal(2, reset_less=True), Signal(3, reset_less=True)
        innermost = Signal(3)
        step, total = Signal(LOCAL_ADDR_BITS), Signal(LOCAL_ADDR_BITS)
        # How far the loop moves; 0 once a place has been looked at, and then `offset` says which word is meant. A
        # register, as it is chosen from many fields, and goes on to the buffers' addresses.
        more, offset = Signal(LOCAL_ADDR_BITS, reset_less=True), Signal(3)
        one, one_more, next_place = Signal(), Signal(reset_less=True), Signal()
        looks = Signal()  # reads the innermost place of `seen`
        seen = Signal(2)
        placing = Signal()  # reads where `level` is
        moving = Signal()  # moves it
        m.d.comb += [
            innermost.eq(Mux(is_pool, self._KX, self._BRICK)),
            read.addr.eq(Mux(looks, Cat(innermost, seen), Cat(level, what))),
            write.addr.eq(Cat(place, what)),
            write.data.eq(total),
            read.en.eq(looks | placing),
            one.eq(one_more | next_place),
            total.eq(read.data + (more | offset) + one),
        ]
        with m.If(looks | placing):
            m.d.sync += [more.eq(step), one_more.eq(0)]
        with m.If(placing), m.Switch(Cat(level, what)):
            cases: dict[tuple[int, int], Value] = {
                (self._READ, self._START): pool.in_addr,
                (self._READ, self._OY): pool.oy_step,
                (self._READ, self._OX): pool.ox_step,
                (self._READ, self._KY): pool.ky_step,
                (self._READ, self._KX): pool.kx_step,
                (self._WRITE, self._START): pool.out_addr,
                (self._WRITE, self._OY): pool.out_oy_step,
                (self._WRITE, self._OX): pool.out_ox_step,
                (self._X, self._START): Mux(is_pool, pool.x0, post.p_addr.as_signed()),
                (self._X, self._OX): pool.stride_x,
                (self._X, self._KX): pool.dilation_x,
                (self._Y, self._START): pool.y0,
                (self._Y, self._OY): pool.stride_y,
                (self._Y, self._KY): pool.dilation_y,
            }
            if arch.bricks_per_tile > 1:
                raw_step = Mux(raw, columns, Mux(post.mode[0], 2, 1))
                cases |= {
                    (self._READ, self._BRICK): Mux(is_pool, pool.brick_step, Mux(post.add_wide, 2, 1)),
                    (self._WRITE, self._BRICK): Mux(is_pool, pool.brick_step, raw_step),
                }
            else:
                cases |= {(what_, self._BRICK): pool.brick_step for what_ in (self._READ, self._WRITE)}
            for (what_, level_), value in cases.items():
                with m.Case(what_ << 3 | level_):
                    m.d.comb += step.eq(value)
                    if level_ == self._START or what_ in (self._X, self._Y):
                        m.d.sync += one_more.eq(1)
        # Coordinates are known to be inside where they are written.
        inside = Signal(2, reset_less=True)
        for n, limit in enumerate((pool.width, pool.height)):
            with m.If(moving & (what == self._X + n)):
                m.d.sync += inside[n].eq(~total[len(limit) :].any() & (total[: len(limit)] <= limit))

        # --- records and accumulators -----------------------------------------------------------------------------

        column = Signal(range(lanes))
        plane = Signal(reset_less=True)
        brick = numbers["brick"][: ceil_log2(arch.bricks_per_tile)]
        last_column, next_column = Signal(), Signal()
        m.d.comb += last_column.eq(column == Mux(is_pool, lanes - 1, columns - 1))
        with m.If(next_column):
            m.d.sync += column.eq(Mux(last_column, 0, column + 1))
        group = Cat(column[: ceil_log2(columns)], brick)
        record = param_layout()
        used = PARAM_BITS - record["spare"].width
        stored = Signal(2)
        words = []
        for n, bits in enumerate((BIAS_BITS, used - BIAS_BITS)):
            memory = Memory(
                shape=unsigned(bits), depth=arch.columns, init=[], attrs={"ram_style": "block", "no_rw_check": 1}
            )
            m.submodules[f"records_{n}"] = memory
            port, out = memory.write_port(), memory.read_port()
            m.d.comb += [
                port.addr.eq(group), port.data.eq(self.params.data), port.en.eq(stored[n]), out.addr.eq(group),
            ]  # fmt: skip
            words.append(out.data)
        this = data.View(record, Cat(*words, Const(0, PARAM_BITS - used)))
        m.d.comb += [
            self.params.addr.eq(total),
            self.acc_read.bank.eq(post.acc_bank),
            self.acc_read.addr.eq(pixel),
            self.acc_read.group.eq(group),
            self.acc_read.en.eq(1),
        ]

        # --- codes ------------------------------------------------------------------------------------------------

        m.submodules.requant = requant = SerialRequantizer(acc_bits=arch.acc_bits)
        pack = [Signal(word_bits, name=f"pack_{name}", reset_less=True) for name in ("high", "low")]
        high, low = pack[0][:4], pack[1][:4]
        # 16*high + low + 8, or low alone.
        stored_code = Cat(low[:3], low[3] ^ post.add_wide, Mux(post.add_wide, high, low[3].replicate(4)))
        again = requant.again
        m.d.comb += [
            requant.acc.eq(self.acc_read.data[0]),
            requant.bias.eq(this.bias),
            requant.mult.eq(this.mult),
            requant.shift.eq(Mux(again, RequantLane.add_record(post.k_a, post.k_b, post.add_shift + 1)[1], this.shift)),
            requant.zero.eq(Mux(again, post.add_zero, post.zero)),
            requant.low.eq(Mux(again, post.add_low, post.low)),
            requant.high.eq(Mux(again, post.add_high, post.high)),
            requant.k_a.eq(post.k_a),
            requant.k_b.eq(post.k_b),
            requant.b.eq(stored_code.as_signed() - post.zero_b),
        ]

        # --- packing, and the maximum of POOL ---------------------------------------------------------------------

        # Nibbles of a word pass by one after the other: stored ones leave below, codes enter above.
        shifts, loads = Signal(2), Signal()
        # Outside of the map is the lowest code, which is -8 in either plane.
        tap = Mux(inside.all(), self.act_read.data.word_select(column, 4), 0b1000)
        other = Mux(plane, low, high)
        is_greater, is_equal, takes = Signal(), Signal(), Signal()
        # What the high nibbles have said about the codes whose low nibbles follow.
        better, equal = Signal(lanes, reset_less=True), Signal(lanes, reset_less=True)
        first_tap = (level != self._KY) & (level != self._KX)
        m.d.comb += [
            is_greater.eq(tap.as_signed() > other.as_signed()),
            is_equal.eq(tap == other),
            takes.eq(first_tap | Mux(plane, better[0] | (equal[0] & is_greater), is_greater)),
        ]
        with m.If(shifts.any()):
            m.d.sync += [better.eq(Cat(better[1:], is_greater)), equal.eq(Cat(equal[1:], is_equal))]
        largest = Mux(takes, tap, other)
        # numerics.split_code8; a 4-bit code goes where high nibbles go.
        code = requant.code
        codes = (Mux(wide, code[4:8], code[:4]), Cat(code[:3], ~code[3]))
        operand = self.act_read.data
        if partial:
            operand = operand >> Cat(Const(0, ceil_log2(4 * columns)), post.part[: ceil_log2(arch.parts_per_brick)])
        for n, register in enumerate(pack):
            with m.If(shifts[n] | (loads & (plane == n))):
                shifted = Cat(register[4:], Mux(is_pool, largest, codes[n]))
                m.d.sync += register.eq(Mux(loads, operand, shifted))

        # --- what is read and written -----------------------------------------------------------------------------

        by_plane, writes_raw = Signal(), Signal()
        packed = Mux(plane, pack[1], pack[0])
        if partial:
            # Codes of a part are the last that have entered.
            packed = Mux(is_pool, packed, packed[-4 * columns :].replicate(arch.parts_per_brick))
            parts = ceil_log2(arch.parts_per_brick)
            mask = Mux(is_pool | raw, (1 << arch.parts_per_brick) - 1, (1 << post.part[:parts])[: 1 << parts])
            m.d.comb += self.act_write.mask.eq(mask)
            number_raw = Cat(column[: ceil_log2(columns)], post.part[:parts])
        else:
            m.d.comb += self.act_write.mask.eq(1)
            number_raw = column
        m.d.comb += offset.eq(Mux(writes_raw, number_raw, plane & by_plane))
        m.d.comb += [
            self.act_read.addr.eq(total),
            self.act_write.addr.eq(total),
            self.act_write.data.eq(Mux(writes_raw, requant.sum, packed)),
        ]
        m.d.sync += self.bank_stall.eq(
            (self.act_read.valid & ~self.act_read.ready) | (self.act_write.valid & ~self.act_write.ready)
        )

        m.d.comb += self.busy.eq(1)
        with m.FSM(name="post_state"):
            with m.State("IDLE"):
                m.d.comb += [self.busy.eq(0), self.command.ready.eq(1)]
                m.d.sync += [level.eq(self._START), what.eq(self._READ)]
                with m.If(self.command.valid):
                    m.next = "PLACE"
            with m.State("PLACE"):
                m.d.comb += [placing.eq(1), moves.eq(what == self._READ)]
                m.d.sync += place.eq(Mux(is_start, self._OY, level))
                m.next = "MOVE"
            with m.State("MOVE"):
                m.d.comb += [moving.eq(1), write.en.eq(1)]
                m.d.sync += place.eq(place + 1)
                is_tap = (level == self._KY) | (level == self._KX)
                last = Mux(
                    is_pool,
                    (what == self._Y) | ((what == self._X) & (level == self._KX)),
                    what == Mux(is_start, self._RECORD, self._WRITE),
                )
                with m.If(place == innermost):
                    m.d.sync += [plane.eq(0), what.eq(what + 1)]
                    with m.If((what == self._READ) & is_tap):
                        m.d.sync += what.eq(self._X)
                    m.next = "PLACE"
                    with m.If(last):
                        m.next = "WORDS"
                        with m.If(~is_pool & is_start):
                            m.next = "RECORD"
            # Records, word by word.
            with m.State("RECORD"):
                m.d.comb += [looks.eq(1), seen.eq(self._RECORD)]
                m.next = "RECORD_READ"
            with m.State("RECORD_READ"):
                m.d.comb += self.params.valid.eq(1)
                with m.If(self.params.ready):
                    m.next = "RECORD_KEEP"
            with m.State("RECORD_KEEP"):
                m.d.comb += [next_place.eq(1), write.en.eq(1), write.addr.eq(Cat(innermost, Const(self._RECORD, 2)))]
                m.d.comb += [stored.eq(Mux(plane, 2, 1)), next_column.eq(plane)]
                m.d.sync += plane.eq(~plane)
                m.next = "RECORD"
                over = plane & last_column
                if arch.bricks_per_tile > 1:
                    number = numbers["brick"]
                    with m.If(over):
                        m.d.sync += number.eq(Mux(number == arch.bricks_per_tile - 1, 0, number + 1))
                    over = over & (number == arch.bricks_per_tile - 1)
                with m.If(over):
                    m.next = "WORDS"
            # A tap of POOL, the stored operand of POST.
            with m.State("WORDS"):
                m.d.comb += looks.eq(1)
                with m.If(is_pool):
                    m.next = "NEXT_TAP"
                    with m.If(inside.all() | first_tap):
                        m.next = "READ"
                with m.Elif(add):
                    m.d.sync += plane.eq(~post.add_wide)
                    m.next = "READ"
                with m.Else():
                    m.next = "COLUMN"
            with m.State("READ"):
                fetches = ~is_pool | inside.all()
                m.d.comb += [by_plane.eq(is_pool | post.add_wide), self.act_read.valid.eq(fetches)]
                with m.If(self.act_read.ready | ~fetches):
                    m.next = "LOAD"
                    with m.If(is_pool):
                        m.next = "SWEEP"
            with m.State("SWEEP"):
                m.d.comb += [shifts.eq(Mux(plane, 2, 1)), next_column.eq(1)]
                with m.If(last_column):
                    m.d.sync += plane.eq(1)
                    m.next = "NEXT_TAP"
                    with m.If(wide & ~plane):
                        m.next = "READ"
            with m.State("NEXT_TAP"):
                m.d.sync += [plane.eq(0), what.eq(self._READ)]
                m.next = "PLACE"
                with m.If(~is_last["kx"]):
                    m.d.sync += level.eq(self._KX)
                with m.Elif(~is_last["ky"]):
                    m.d.sync += level.eq(self._KY)
                with m.Else():
                    m.d.comb += [looks.eq(1), seen.eq(self._WRITE)]
                    m.next = "WRITE"
            with m.State("LOAD"):
                m.d.comb += loads.eq(1)
                m.d.sync += plane.eq(1)
                m.next = "READ"
                with m.If(plane):
                    m.next = "COLUMN"
            # A column: its accumulator and record are read while the one before is finished.
            with m.State("COLUMN"):
                m.d.comb += [looks.eq(1), seen.eq(self._WRITE)]
                m.d.sync += plane.eq(0)
                m.next = "ADD"
            with m.State("ADD"):
                m.d.comb += requant.add_stb.eq(1)
                m.next = "MULTIPLY"
                with m.If(raw):
                    m.next = "RAW"
            with m.State("MULTIPLY"):
                m.d.comb += requant.multiply_stb.eq(1)
                m.next = "SHIFT"
            with m.State("SHIFT"):
                m.d.comb += [requant.shift_stb.eq(1), next_column.eq(~again)]
                m.next = "ROUND"
            with m.State("ROUND"):
                m.d.comb += requant.round_stb.eq(1)
                m.next = "CODE"
            with m.State("CODE"):
                with m.If(add & ~again):
                    m.d.comb += requant.again_stb.eq(1)
                    m.next = "MULTIPLY"
                with m.Else():
                    m.d.comb += shifts.eq(0b11)
                    m.next = "ADD"
                    with m.If(column == 0):
                        m.next = "WRITE"
            with m.State("RAW"):
                m.d.comb += [writes_raw.eq(1), self.act_write.valid.eq(1), next_column.eq(self.act_write.ready)]
                with m.If(self.act_write.ready):
                    m.next = "COLUMN"
                    with m.If(last_column):
                        m.next = "NEXT_WORD"
            with m.State("WRITE"):
                m.d.comb += [by_plane.eq(1), self.act_write.valid.eq(1)]
                with m.If(self.act_write.ready):
                    m.d.sync += plane.eq(1)
                    with m.If(plane | ~wide):
                        m.next = "NEXT_WORD"
            with m.State("NEXT_WORD"):
                m.d.sync += what.eq(self._READ)
                m.next = "PLACE"
                with m.If(~is_last["brick"]):
                    m.d.sync += level.eq(self._BRICK)
                with m.Elif(~is_last["ox"]):
                    m.d.sync += level.eq(self._OX)
                with m.Elif(~is_last["oy"]):
                    m.d.sync += level.eq(self._OY)
                with m.Else():
                    m.next = "DONE"
            with m.State("DONE"):
                m.d.comb += [self.done_stb.eq(1), self.busy.eq(0)]
                m.next = "IDLE"
        return m

    # --- what it does, in Python ------------------------------------------------------------------------------------

    @classmethod
    def _move_cycles(cls, level: int, *, pool: bool) -> int:
        """Of a loop that moves on, or of the start."""
        moved = 4 if pool else 3 if level == cls._START else 2
        if pool:
            moved -= {cls._KY: 1, cls._KX: 2}.get(level, 0)
        first = cls._OY if level == cls._START else level
        return moved * (1 + (cls._KX if pool else cls._BRICK) - first + 1)

    @classmethod
    def cycles(cls, arch: ArchConfig, instruction: Instruction) -> int:
        """Cycles from the first with ``command.valid``, the unit being idle, to ``done_stb``, if nothing is refused."""
        i, pool = instruction, instruction.opcode is Opcode.POOL
        bricks = i["bricks"] if pool or arch.bricks_per_tile > 1 else 1
        rows, cols = i["rows"], i["cols"]
        total = 1 + cls._move_cycles(cls._START, pool=pool)
        outer = ((cls._OY, rows - 1), (cls._OX, rows * (cols - 1)), (cls._BRICK, rows * cols * (bricks - 1)))
        total += sum(n * cls._move_cycles(level, pool=pool) for level, n in outer)
        words = rows * cols * bricks
        if pool:
            kernel_y, kernel_x, planes = i["kernel_y"], i["kernel_x"], 1 + i["wide"]
            inner = ((cls._KY, kernel_y - 1), (cls._KX, kernel_y * (kernel_x - 1)))
            total += words * sum(n * cls._move_cycles(level, pool=pool) for level, n in inner)
            # A tap outside is passed by, unless it is the first one.
            swept, first = 1, 1
            for axis, size, number, taps in (("x", "width", cols, kernel_x), ("y", "height", rows, kernel_y)):
                at = [
                    [i[f"{axis}0"] + n * i[f"stride_{axis}"] + k * i[f"dilation_{axis}"] for k in range(taps)]
                    for n in range(number)
                ]
                swept *= sum(0 <= place < i[size] for taps_ in at for place in taps_)
                first *= sum(0 <= taps_[0] < i[size] for taps_ in at)
            swept += rows * cols - first
            total += words * (2 * kernel_y * kernel_x + planes + 1)
            return total + bricks * swept * planes * (1 + arch.lanes)
        columns = min(arch.lanes, arch.columns)
        total += 3 * arch.param_words
        if i["mode"] == OutputMode.RAW32:
            return total + words * (2 + 3 * columns)
        step = 2 * SerialRequantizer.CYCLES + 1 if i["add"] else SerialRequantizer.CYCLES + 1
        total += words * (3 + columns * step + 1 + (i["mode"] == OutputMode.INT8))
        return total + words * i["add"] * 2 * (1 + i["add_wide"])
