"""The post unit: drains accumulators through requantization lanes, adds stored tensors, pools."""

from collections.abc import Iterator, Sequence
from typing import Any

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch import numerics
from nibblecore.arch.config import PARAM_BITS, ArchConfig
from nibblecore.arch.isa import INSTRUCTIONS, LOCAL_ADDR_BITS, Instruction, Opcode, OutputMode
from nibblecore.arch.numerics import BIAS_BITS

from ..layouts import (
    ACC_READ_LATENCY,
    READ_LATENCY,
    acc_read_port,
    command_signature,
    instruction_layout,
    param_layout,
    read_port,
    write_port,
)
from ..mem.block import BlockMemory
from ..registers import SkidBuffer, copies, delayed
from ..technology import check_technology
from .loopnest import Loop, LoopNest, assign_job, loops_of
from .requantize import CODE_BITS, DIFFERENCE_BITS, RequantLane

__all__ = ["PostUnit", "RecordStore", "WordFifo"]

RAW_WORDS = 8
"""Words of one brick of 32-bit sums."""

Write = tuple[int, int, int]
"""Address, word and mask of a buffer write."""


class RecordStore(wiring.Component):
    """Loads the requantization records of a column tile from the weight buffer, and gives them out group by group.

    Loading takes ``param_words + READ_LATENCY + 2`` cycles from ``start`` to ``loaded``, plus the cycles in which the
    buffer does not grant. A word that somebody else waits for (``wanted``) is followed by a cycle without a request, so
    that both are served in turn; this at most doubles the cycles. ``records`` belongs to ``group`` and ``again`` of
    :attr:`LATENCY` cycles before. Records stay until the next ``start``.

    Parameters
    ----------
    arch : ArchConfig
        ``lanes``, ``columns``, ``post_lanes`` and ``weight_depth`` count.

    Members
    -------
    start : In(1)
        Load from ``addr``. Not while loading.
    addr : In
        First word, looked at with ``start``.
    params : Out(read_port(...))
        To the weight buffer; ``valid`` is a register.
    wanted : In(1)
        Somebody else asks for the port of ``params``.
    loaded : Out(1)
        High from the end of loading to the next ``start``.
    again : In(1)
        Give out ``again_record``, whatever ``group`` is.
    again_record : In(param_layout())
        Taken in the cycle after ``start``, for every lane.
    group : In(range(columns // post_lanes))
        Column group, columns ``group*post_lanes`` onwards.
    records : Out(ArrayLayout(param_layout(), post_lanes))
        Their records; ``spare`` is 0.
    """

    LATENCY = 1

    start: Signal
    addr: Signal
    params: Any
    wanted: Signal
    loaded: Signal
    again: Signal
    again_record: data.View
    group: Signal
    records: data.View

    def __init__(self, arch: ArchConfig) -> None:
        self._arch = arch
        addr_bits = ceil_log2(arch.weight_depth)
        super().__init__(
            {
                "start": In(1),
                "addr": In(addr_bits),
                "params": Out(read_port(addr_bits=addr_bits, word_bits=arch.word_bits)),
                "wanted": In(1),
                "loaded": Out(1),
                "again": In(1),
                "again_record": In(param_layout()),
                "group": In(ceil_log2(arch.columns // arch.post_lanes)),
                "records": Out(data.ArrayLayout(param_layout(), arch.post_lanes)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        arch, lanes = self._arch, self._arch.post_lanes
        used = PARAM_BITS - len(self.records[0].spare)
        word_bits, words = arch.word_bits, arch.param_words
        per_word = max(1, word_bits // PARAM_BITS)
        # ArchConfig's limits of post_lanes: the records of one word belong to different lanes, one group.
        assert per_word <= lanes
        assert words * word_bits == arch.columns * PARAM_BITS

        requesting, pausing = Signal(), Signal()
        left = Signal(range(words))
        addr = Signal.like(self.addr)
        granted = Signal()
        m.d.comb += [
            self.params.valid.eq(requesting),
            self.params.addr.eq(addr),
            granted.eq(requesting & self.params.ready),
        ]
        with m.If(granted):
            m.d.sync += [
                addr.eq(addr + 1),
                left.eq(left - 1),
                requesting.eq((left != 0) & ~self.wanted),
                pausing.eq((left != 0) & self.wanted),
            ]
        with m.Elif(pausing):
            m.d.sync += [requesting.eq(1), pausing.eq(0)]
        arrives = granted
        for i in range(READ_LATENCY + 1):
            stage = Signal(name=f"arrives_{i + 1}")
            m.d.sync += stage.eq(arrives)
            arrives = stage

        # Counts arriving words; from its low bits upwards: part of a record, lane (or lanes), group.
        count = Signal(range(words))
        chunk_bits = ceil_log2(max(1, PARAM_BITS // word_bits))
        slot_bits = ceil_log2(lanes // per_word)
        chunk, slot, group = (
            count[:chunk_bits],
            count[chunk_bits : chunk_bits + slot_bits],
            count[chunk_bits + slot_bits :],
        )
        with m.If(arrives):
            m.d.sync += [count.eq(count + 1), self.loaded.eq(count == words - 1)]
        with m.If(self.start):
            m.d.sync += [requesting.eq(1), left.eq(words - 1), addr.eq(self.addr), count.eq(0), self.loaded.eq(0)]
        # What writes `again_record` reaches every lane.
        sets_again = copies(m, self.start, min(4, max(1, lanes // 2)), name="sets_again")

        word: Value = delayed(m, self.params.data, 1, "word")  # the weight buffer is far away
        if word_bits < PARAM_BITS:
            earlier = Signal(PARAM_BITS - word_bits, reset_less=True)
            word = Cat(earlier, word)
            with m.If(arrives):
                m.d.sync += earlier.eq(word[word_bits:])
        complete = arrives & (chunk == (1 << chunk_bits) - 1)
        # The record of the second pass is beside that of group 0.
        for lane in range(lanes):
            memory = Memory(shape=unsigned(used), depth=2 * arch.columns // lanes, init=[])
            m.submodules[f"records_{lane}"] = memory
            read, write = memory.read_port(), memory.write_port()
            first = lane % per_word * PARAM_BITS
            sets = sets_again[lane * len(sets_again) // lanes]
            m.d.comb += [
                write.addr.eq(Cat(sets, Mux(sets, 0, group))),
                write.data.eq(Mux(sets, self.again_record.as_value()[:used], word[first : first + used])),
                write.en.eq(sets | (complete & (slot == lane // per_word))),
                read.addr.eq(Cat(self.again, Mux(self.again, 0, self.group))),
                self.records[lane].as_value().eq(read.data),
            ]
        return m


class WordFifo(wiring.Component):
    """First-in first-out memory of words with a register behind it. Whoever pushes knows how many words are in it.

    A word is on ``o_data`` 2 cycles behind its ``i_en`` at the earliest. One word per cycle in, one out.

    Parameters
    ----------
    word_bits : int
        Width.
    depth : int
        Words in the memory, without the one in the register; a power of two, at least 2.

    Members
    -------
    i_en : In(1)
        Push ``i_data``. There must be room.
    i_data : In(word_bits)
        A word.
    o_valid, o_ready, o_data
        The oldest word, as in a stream.
    o_valid_next : Out(1)
        ``o_valid`` of the next cycle.
    freed_stb : Out(1)
        A place in the memory has become free the cycle before: one pulse per word.
    """

    i_en: Signal
    i_data: Signal
    o_valid: Signal
    o_ready: Signal
    o_data: Signal
    o_valid_next: Signal
    freed_stb: Signal

    def __init__(self, *, word_bits: int, depth: int) -> None:
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"depth must be a power of two of at least 2, not {depth!r}")
        self._word_bits, self._depth = word_bits, depth
        super().__init__(
            {
                "i_en": In(1),
                "i_data": In(word_bits),
                "o_valid": Out(1),
                "o_ready": In(1),
                "o_data": Out(word_bits),
                "o_valid_next": Out(1),
                "freed_stb": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.words = memory = Memory(shape=unsigned(self._word_bits), depth=self._depth, init=[])
        read, write = memory.read_port(), memory.write_port()
        head, tail = Signal(range(self._depth)), Signal(range(self._depth))
        level = Signal(range(self._depth + 1))
        holds = Signal()  # level != 0, as a register
        fetch = Signal()
        m.d.comb += [
            write.addr.eq(head),
            write.data.eq(self.i_data),
            write.en.eq(self.i_en),
            read.addr.eq(tail),
            read.en.eq(fetch),
            fetch.eq(holds & (~self.o_valid | self.o_ready)),
            self.o_data.eq(read.data),
            self.o_valid_next.eq(fetch | (self.o_valid & ~self.o_ready)),
        ]
        m.d.sync += [
            head.eq(head + self.i_en),
            tail.eq(tail + fetch),
            level.eq(level + self.i_en - fetch),
            holds.eq(self.i_en | (holds & ~(fetch & (level == 1)))),
            self.o_valid.eq(self.o_valid_next),
            self.freed_stb.eq(fetch),
        ]
        return m


class PostUnit(wiring.Component):
    """Executes POST and POOL (:mod:`nibblecore.arch.isa`) with ``post_lanes`` requantization lanes.

    A lane takes two 18x18 multipliers (:class:`RequantLane`). One instruction at a time. With ``steps = min(lanes,
    columns) // post_lanes``, a POST takes per pixel and brick

    - INT4, INT8: ``steps`` cycles, or ``2 * steps`` with ``add``, but at least one per word written (1, 2);
    - RAW32: one cycle per word written, ``8 * min(lanes, columns) // lanes`` of them.

    A POOL takes one cycle per word of every tap, inside the map or not. Before that and after it, counted from the
    first cycle with ``command.valid`` (when the unit is idle) to the one with ``done_stb``, a POST takes
    ``param_words + 27`` cycles (with ``add``: 35, INT8 with more than one step: one more, RAW32: ``param_words + 18``),
    a POOL 16; :meth:`cycles` has the sum.
    The next command may be there with ``done_stb`` and then starts in that cycle. ``command.ready`` comes in the fourth
    cycle of ``command.valid``: the transfer is not what starts the address generators, but what lets go of the payload.

    All of this without stalls. Reads and writes may be refused in any cycle: up to 16 bricks of the stored operand are
    read ahead, and finished words wait in a memory of 16 or 32, so that refusals cost time only where they leave less
    than what is needed; never more than one cycle each.

    Programs guarantee: ``bricks`` and ``part`` are below what a tile has, ``low <= high``, ``add_low <= add_high``,
    every used record has a shift of 1..47 and a bias that keeps ``acc + bias`` within 32 bits (except for RAW32, which
    wraps). Nothing hangs otherwise.

    Parameters
    ----------
    arch : ArchConfig
        The core.
    technology : {"generic", "ecp5"}
        Primitives that may be instantiated.

    Members
    -------
    command : In(command_signature())
        POST and POOL, decoded as legal.
    done_stb : Out(1)
        The instruction's last write was granted in the cycle before.
    busy : Out(1)
        From the cycle after a command's transfer to that before its ``done_stb``.
    bank_stall : Out(1)
        A read or write of the activation buffer was refused in the cycle before.
    params : Out(read_port(...))
        Weight buffer.
    params_wanted : In(1)
        Somebody else asks for the port of ``params``, which then gets every second cycle.
    act_read : Out(read_port(...))
        Activation buffer.
    act_write : Out(write_port(...))
        Activation buffer; ``parts_per_brick`` parts per word.
    act_write_next : Out(1)
        ``act_write.valid`` of the next cycle.
    acc_read : Out(acc_read_port(arch))
        Accumulators.
    """

    command: Any
    done_stb: Signal
    busy: Signal
    bank_stall: Signal
    params: Any
    params_wanted: Signal
    act_read: Any
    act_write: Any
    act_write_next: Signal
    acc_read: Any

    READ_AHEAD = 16
    """Bricks of the stored operand that are read before they are needed."""

    def __init__(self, arch: ArchConfig, *, technology: str = "generic") -> None:
        self._arch, self._technology = arch, check_technology(technology)
        act_addr_bits = ceil_log2(arch.act_depth)
        super().__init__(
            {
                "command": In(command_signature()),
                "done_stb": Out(1),
                "busy": Out(1),
                "bank_stall": Out(1),
                "params": Out(read_port(addr_bits=ceil_log2(arch.weight_depth), word_bits=arch.word_bits)),
                "params_wanted": In(1),
                "act_read": Out(read_port(addr_bits=act_addr_bits, word_bits=arch.word_bits)),
                "act_write": Out(
                    write_port(addr_bits=act_addr_bits, word_bits=arch.word_bits, parts=arch.parts_per_brick)
                ),
                "act_write_next": Out(1),
                "acc_read": Out(acc_read_port(arch)),
            }
        )

    # Steps: the nests
    # ----------------
    # `reads` walks the words that are read: taps of POOL, bricks of the operand of POST. For a POST without operand it
    # walks all the same and reads nothing, as every brick it has passed is a token that lets the accumulators of one
    # brick be read; so no other counter has to know how many pixels there are. `writes` walks the words that are
    # written; its last one ends the instruction.
    #
    # Timing of POST, T being the cycle of an accumulator read:
    #   T + ACC_READ_LATENCY   accumulators enter the lanes, a cycle later their records
    #   T + _SUM               acc + bias: words of RAW32 are pushed into the output memory
    #   T + _CODE              8-bit codes; with an operand they enter again, beside its word that has just been read
    #   T + _SECOND            codes behind the addition
    # The packing registers take high nibbles where the codes are, then low ones; a cycle later a full word of high
    # nibbles (or 4-bit codes) is pushed, and then one of low nibbles. With an operand a step starts every second cycle,
    # those that `phase` marks, which leaves the lanes the others for the second pass.
    _SUM = ACC_READ_LATENCY + RequantLane.SUM_LATENCY
    _CODE = ACC_READ_LATENCY + RequantLane.LATENCY
    _AGAIN = ACC_READ_LATENCY + RequantLane.AGAIN_LATENCY
    _SECOND = _AGAIN + RequantLane.LATENCY

    @staticmethod
    def _write_loops() -> tuple[Loop, ...]:
        fields = {f.name: f for f in INSTRUCTIONS[Opcode.POOL].fields}

        def loop(name: str, count: str, step: str) -> Loop:
            return Loop(
                name=name, count_bits=fields[count].bits, step_bits=fields[step].bits, step_signed=fields[step].signed
            )

        return (
            Loop(name="word", count_bits=ceil_log2(RAW_WORDS), step_bits=1),
            loop("brick", "bricks", "brick_step"),
            loop("ox", "cols", "out_ox_step"),
            loop("oy", "rows", "out_oy_step"),
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        arch = self._arch
        lanes, post_lanes, word_bits = arch.lanes, arch.post_lanes, arch.word_bits
        brick_columns = min(lanes, arch.columns)
        steps = brick_columns // post_lanes
        raw_words = RAW_WORDS * post_lanes // lanes  # per step
        partial = arch.parts_per_brick > 1

        # --- the command ------------------------------------------------------------------------------------------

        post = instruction_layout(Opcode.POST)(self.command.payload)
        pool = instruction_layout(Opcode.POOL)(self.command.payload)
        to_post = Signal()
        idle = Signal(init=1)
        opening = Signal()
        opened = Signal()
        transfer = Signal()
        m.d.comb += [
            to_post.eq(post.opcode == int(Opcode.POST)),
            transfer.eq(self.command.valid & self.command.ready),
        ]
        # The nests are idle whenever a job comes: they let go of it in its third cycle, which is known before.
        assert LoopNest.HOLD == 2
        m.d.sync += [
            opening.eq(idle & self.command.valid & ~transfer),
            opened.eq(opening & ~transfer),
            self.command.ready.eq(opened & ~transfer),
        ]
        with m.If(transfer):
            m.d.sync += [idle.eq(0), self.busy.eq(1)]

        code = signed(CODE_BITS)
        is_pool, raw, wide, add = (Signal(name=n, reset_less=True) for n in ("is_pool", "raw", "wide", "add"))
        # Of the code that leaves the lanes at last, and of the first of two passes.
        zero, low, high = (Signal(code, name=n, reset_less=True) for n in ("zero", "low", "high"))
        first_low, first_high = (
            Signal(signed(DIFFERENCE_BITS), name=n, reset_less=True) for n in ("first_low", "first_high")
        )

        def kept(field: str, bits: int) -> Value:
            """The lowest ``bits`` of a field of POST, until the instruction is done."""
            register = Signal(bits, name=field, reset_less=True)
            with m.If(opening):
                m.d.sync += register.eq(Value.cast(post[field])[:bits])
            return register

        zero_b = kept("zero_b", CODE_BITS).as_signed()
        add_wide, acc_bank = kept("add_wide", 1), kept("acc_bank", 1)
        part = kept("part", ceil_log2(arch.parts_per_brick))
        last_brick = kept("bricks", ceil_log2(arch.bricks_per_tile))
        with m.If(opening):
            m.d.sync += [
                is_pool.eq(~to_post),
                raw.eq(to_post & (post.mode == OutputMode.RAW32)),
                wide.eq(Mux(to_post, post.mode == OutputMode.INT8, pool.wide)),
                add.eq(to_post & post.add),
                zero.eq(Mux(post.add, post.add_zero, post.zero)),
                low.eq(Mux(post.add, post.add_low, post.low)),
                high.eq(Mux(post.add, post.add_high, post.high)),
                first_low.eq(post.low - post.zero),
                first_high.eq(post.high - post.zero),
            ]

        # --- what is read and written -----------------------------------------------------------------------------

        pool_loops = loops_of(Opcode.POOL, ("kx", "ky", "brick", "ox", "oy"))
        read_loops = (Loop(name="plane", count_bits=1, step_bits=1), *pool_loops)
        m.submodules.reads = reads = LoopNest(loops=read_loops)
        m.submodules.writes = writes = LoopNest(loops=self._write_loops())
        m.d.comb += [
            reads.job.valid.eq(opening),
            writes.job.valid.eq(opening),
        ]
        read_job, write_job = reads.job.payload, writes.job.payload
        m.d.comb += [
            *assign_job(read_job, pool, pool_loops, base=pool.in_addr),
            read_job.step_plane.eq(1),
            read_job.count_plane.eq(pool.wide),
            write_job.base.eq(pool.out_addr),
            write_job.step_word.eq(1),
            write_job.count_word.eq(pool.wide),
            write_job.count_brick.eq(pool.bricks),
            write_job.step_brick.eq(pool.brick_step),
            write_job.count_ox.eq(pool.cols),
            write_job.step_ox.eq(pool.out_ox_step),
            write_job.count_oy.eq(pool.rows),
            write_job.step_oy.eq(pool.out_oy_step),
        ]
        with m.If(to_post):
            two_planes = post.add & post.add_wide
            m.d.comb += [
                read_job.base.eq(post.add_addr),
                read_job.count_plane.eq(two_planes),
                read_job.count_kx.eq(0),
                read_job.count_ky.eq(0),
                read_job.count_brick.eq(0 if partial else post.bricks),
                read_job.step_brick.eq(Mux(two_planes, 2, 1)),
                read_job.count_ox.eq(post.cols),
                read_job.step_ox.eq(post.add_ox_step),
                read_job.count_oy.eq(post.rows),
                read_job.step_oy.eq(post.add_oy_step),
                write_job.base.eq(post.out_addr),
                write_job.count_brick.eq(0 if partial else post.bricks),
                write_job.count_ox.eq(post.cols),
                write_job.step_ox.eq(post.out_ox_step),
                write_job.count_oy.eq(post.rows),
                write_job.step_oy.eq(post.out_oy_step),
            ]
            with m.Switch(post.mode):
                with m.Case(OutputMode.INT4):
                    m.d.comb += [write_job.count_word.eq(0), write_job.step_brick.eq(1)]
                with m.Case(OutputMode.INT8):
                    m.d.comb += [write_job.count_word.eq(1), write_job.step_brick.eq(2)]
                with m.Default():
                    words = RAW_WORDS * brick_columns // lanes
                    m.d.comb += [write_job.count_word.eq(words - 1), write_job.step_brick.eq(words)]
                    if partial:
                        m.d.comb += write_job.base.eq(post.out_addr + (post.part << ceil_log2(words)))

        # --- records ----------------------------------------------------------------------------------------------

        m.submodules.store = store = RecordStore(arch)
        wiring.connect(m, store.params, wiring.flipped(self.params))
        add_bias, add_shift = RequantLane.add_record(post.k_a, post.k_b, post.add_shift + 1)
        # A register: what it starts reaches every record, and the payload stands for two cycles more.
        m.d.sync += store.start.eq(opening & ~opened & to_post)
        m.d.comb += [
            store.wanted.eq(self.params_wanted),
            store.addr.eq(post.p_addr),
            store.again_record.bias.eq(add_bias),
            store.again_record.shift.eq(add_shift),
        ]

        # --- words read -------------------------------------------------------------------------------------------

        # Places in the output memory that no word on its way has reserved. A word of POOL reserves one with its last
        # tap, a brick with its first step, a word of RAW32 with its own.
        depth = 32 if steps < 4 else 16
        m.submodules.fifo = fifo = WordFifo(word_bits=word_bits, depth=depth)
        places = Signal(range(depth + 1), init=depth)
        reserve, reserve_r = Signal(2), Signal(2)
        room = Signal()
        # All registers: two cycles may reserve 2 before `room` knows, and the one that it lets through 2 more; or three
        # cycles 1, and the one that it lets through 1 more.
        m.d.sync += [
            reserve_r.eq(reserve),
            places.eq(places - reserve_r + fifo.freed_stb),
            room.eq(places[2:].any()),  # at least 4
        ]

        ahead = Signal(range(self.READ_AHEAD + 1))  # bricks read, being read or to be read, and not used up
        is_full = Signal()  # ahead == READ_AHEAD, as a register
        # Steps that may go on wait for the buffer's grant behind registers, as it depends on other units' requests.
        # `entered`: a step has taken its place there; `passed`: it has its grant, or needs none.
        request = data.StructLayout(
            {
                "addr": len(self.act_read.addr),
                "fetches": 1,
                "inside": 1,
                "first_plane": 1,
                "last_plane": 1,
                "first_tap": 1,
                "last_tap": 1,
            }
        )
        m.submodules.requests = requests = SkidBuffer(shape=request)
        allowed, entered, passed = Signal(), Signal(), Signal()
        found, entering, step = reads.o.payload, requests.i.payload, requests.o.payload
        m.d.comb += [
            allowed.eq(Mux(is_pool, room, ~is_full)),
            requests.i.valid.eq(reads.o.valid & allowed),
            reads.o.ready.eq(requests.i.ready & allowed),
            entered.eq(reads.o.valid & reads.o.ready),
            entering.addr.eq(found.addr),
            entering.fetches.eq(Mux(is_pool, found.inside, add)),
            entering.inside.eq(found.inside),
            entering.first_plane.eq(found.first.plane),
            entering.last_plane.eq(found.last.plane),
            entering.first_tap.eq(found.first.kx & found.first.ky),
            entering.last_tap.eq(found.last.kx & found.last.ky),
            self.act_read.addr.eq(step.addr),
            self.act_read.valid.eq(requests.o.valid & step.fetches),
            requests.o.ready.eq(self.act_read.ready | ~step.fetches),
            passed.eq(requests.o.valid & requests.o.ready),
        ]

        def arriving(value: Value, name: str, *, later: int = 0, reset_less: bool = False) -> Value:
            """``value`` of a passing step, ``later`` cycles after the one in which its word arrives."""
            for i in range(READ_LATENCY + later):
                stage = Signal(name=f"{name}_{i + 1}", reset_less=reset_less)
                m.d.sync += stage.eq(value)
                value = stage
            return value

        # --- the stored operand -----------------------------------------------------------------------------------

        # High and low words have a memory each, as a step needs both; 4-bit codes are low words. Block RAM, as LUT RAM
        # would take 6 LUTs per 4 bits, with a register of its own behind it.
        operand_head, operand_tail = Signal(range(self.READ_AHEAD)), Signal(range(self.READ_AHEAD))
        heads = copies(m, operand_head, 2, name="operand_head")
        operand_words = []
        is_operand = passed & ~is_pool
        high_arrives = arriving(is_operand & step.first_plane, "operand_high_arrives")
        low_arrives = arriving(is_operand & step.last_plane, "operand_low_arrives")
        # Words and all that belongs to them go through a register, as the buffer is far away.
        word = delayed(m, self.act_read.data, 1, "word_read")
        for name, now, head in (("operand_high", high_arrives, heads[0]), ("operand_low", low_arrives, heads[1])):
            arrives = delayed(m, now, 1, f"{name}_word")
            m.submodules[name] = memory = BlockMemory(
                width=word_bits, depth=self.READ_AHEAD, technology=self._technology
            )
            m.d.comb += [
                memory.write_addr.eq(head),
                memory.write_data.eq(word),
                memory.write_en.eq(arrives),
                memory.read_addr.eq(operand_tail),
            ]
            operand_words.append(memory.read_data)
        m.d.sync += operand_head.eq(operand_head + low_arrives)

        # --- accumulators are read --------------------------------------------------------------------------------

        # What is compared here stands beside in registers, as `go` reaches all of this.
        tokens, has_token = Signal(range(self.READ_AHEAD + 1)), Signal()
        pixel = Signal(ceil_log2(arch.acc_depth), reset_less=True)
        brick, brick_begins = Signal(range(arch.bricks_per_tile)), Signal(init=1)
        step_in_brick, is_last_step = Signal(range(steps)), Signal(init=steps == 1)
        # Cycles of one step: each word of RAW32 is a read of its own, and two words need two cycles, as an addition.
        sub, last_sub = Signal(range(max(2, raw_words))), Signal(range(max(2, raw_words)), reset_less=True)
        sub_next, sub_any, sub_ends = Signal.like(sub), Signal(), Signal()
        m.d.sync += last_sub.eq(Mux(raw, raw_words - 1, add | (wide if steps == 1 else 0)))
        phase, in_phase = Signal(), Signal()
        m.d.sync += [phase.eq(~phase | opening), in_phase.eq(~phase | opening | ~add)]
        go, enters, ends_step, ends_brick = (Signal(name=n) for n in ("go", "enters", "ends_step", "ends_brick"))
        new_token, new_token_r = passed & ~is_pool & step.last_plane, Signal()
        m.d.comb += [
            go.eq(store.loaded & (in_phase | sub_any) & (has_token | ~brick_begins) & (room | ~(brick_begins | raw))),
            enters.eq(go & (raw | ~sub_any)),
            ends_step.eq(go & sub_ends),
            ends_brick.eq(ends_step & is_last_step),
            self.acc_read.bank.eq(acc_bank),
            self.acc_read.addr.eq(pixel),
            self.acc_read.group.eq(Cat(step_in_brick, brick)),
            self.acc_read.en.eq(enters),
            sub_next.eq(Mux(sub_ends, 0, sub + 1)),
        ]
        takes_token = go & brick_begins
        m.d.sync += [
            new_token_r.eq(new_token),
            tokens.eq(tokens + new_token_r - takes_token),
            has_token.eq(new_token_r | Mux(takes_token, tokens[1:].any(), has_token)),
            sub_ends.eq(Mux(go, sub_next, sub) == last_sub),
        ]
        with m.If(go):
            m.d.sync += [sub.eq(sub_next), sub_any.eq(~sub_ends), brick_begins.eq(ends_brick)]
        with m.If(ends_step):
            m.d.sync += [step_in_brick.eq(step_in_brick + 1), is_last_step.eq(step_in_brick == (steps - 2) % steps)]
        with m.If(ends_brick):
            m.d.sync += brick.eq(brick + 1)
            with m.If(brick == last_brick):
                m.d.sync += [brick.eq(0), pixel.eq(pixel + 1)]
        with m.If(opening):
            m.d.sync += [pixel.eq(0), brick.eq(0)]
        pool_reserves = Signal()
        m.d.sync += pool_reserves.eq(entered & is_pool & entering.last_tap)
        with m.If(is_pool):
            m.d.comb += reserve.eq(pool_reserves)
        with m.Elif(raw):
            m.d.comb += reserve.eq(go)
        with m.Elif(takes_token):
            m.d.comb += reserve.eq(Mux(wide, 2, 1))

        # Steps with their accumulators on the way.
        valid: list[Value] = [enters]
        for i in range(1, self._SECOND + 1):
            stage = Signal(name=f"valid_{i}")
            # What has been used has no business behind there: the next instruction may have begun.
            goes_on = {self._SUM + 1: ~raw, self._CODE + 1: add}.get(i)
            m.d.sync += stage.eq(valid[-1] if goes_on is None else valid[-1] & goes_on)
            valid.append(stage)

        def counted(passing: Value, name: str) -> tuple[Signal, Value]:
            """Which group of its brick a passing step is, and whether it is the last one; bricks are never cut short.

            Cheaper than to have it travel along.
            """
            number = Signal(range(steps), name=name)
            with m.If(passing):
                m.d.sync += number.eq(number + 1)
            return number, passing & (number == steps - 1)

        coded = Signal()
        assert self._SUM + 1 < self._CODE < self._SECOND - 1
        m.d.sync += coded.eq(Mux(add, valid[self._SECOND - 1], valid[self._CODE - 1]))
        _, coded_last = counted(coded, "coded_step")
        coded_r, coded_last_r = Signal(), Signal()
        m.d.sync += [coded_r.eq(coded), coded_last_r.eq(coded_last)]

        # --- lanes ------------------------------------------------------------------------------------------------

        m.d.comb += store.group.eq(
            delayed(m, self.acc_read.group, ACC_READ_LATENCY + RequantLane.RECORD_LATENCY - store.LATENCY, "group")
            if len(self.acc_read.group)
            else 0
        )
        # The memories' words come two cycles behind their address. A register follows the choice of a step's part, and
        # one what is made of it: the address moves on four before the last step, told by a register.
        assert self._SUM < self._CODE - 5  # none of RAW32
        step_read, operand_used = counted(valid[self._CODE - 5], "step_read")
        using_up, used_up = Signal(), Signal()
        m.d.sync += [
            using_up.eq(operand_used | (raw & ends_brick)),
            operand_tail.eq(operand_tail + using_up),
            used_up.eq(using_up),
        ]
        # Second passes begin in one phase, and accumulators enter in the other one.
        assert RequantLane.AGAIN_LATENCY % 2 == 1
        again = Signal()
        reserved = entered & ~is_pool & entering.last_plane
        again_early = add & (phase if self._AGAIN % 2 else ~phase)  # the cycle before
        record_cycles = RequantLane.RECORD_LATENCY - store.LATENCY
        m.d.sync += again.eq(again_early)
        m.d.comb += store.again.eq(delayed(m, again, record_cycles, "again"))
        m.d.sync += [
            ahead.eq(ahead + reserved - used_up),
            is_full.eq(
                Mux(
                    reserved & ~used_up,
                    ahead == self.READ_AHEAD - 1,
                    (ahead == self.READ_AHEAD) & (reserved | ~used_up),
                )
            ),
        ]
        step_bits = ceil_log2(steps)
        operand_steps: list[Value] = [Const(0, 1)] * 2
        if steps > 1:
            operand_steps = copies(m, delayed(m, step_read[:step_bits], 2, "operand_step"), 2, name="operand_step")
        if partial:
            # Which group of the brick a step of this part is.
            operand_steps = [Cat(operand_step[:step_bits], part) for operand_step in operand_steps]
        operand_high, operand_low = (
            delayed(m, operand.word_select(operand_step, 4 * post_lanes), 1, f"operand_{name}")
            for name, operand, operand_step in zip(("high", "low"), operand_words, operand_steps, strict=True)
        )

        nibbles_high: list[Value] = []
        nibbles_low: list[Value] = []
        sums = []
        for i in range(post_lanes):
            m.submodules[f"requant_{i}"] = requant = RequantLane(acc_bits=arch.acc_bits, technology=self._technology)
            record = store.records[i]
            b_high, b_low = operand_high.word_select(i, 4), operand_low.word_select(i, 4)
            # 16*high + low + 8, or low alone. Without an operand 0, and not what the memory happens to hold: times
            # k_b = 0 it is all the same, but not to a four-state simulator. It costs no LUT.
            code = Cat(b_low[:3], b_low[3] ^ add_wide, Mux(add_wide, b_high, b_low[3].replicate(4)))
            joined = delayed(m, code & add.replicate(8), 1, f"joined_{i}")
            m.d.comb += [
                requant.acc.eq(self.acc_read.data[i]),
                requant.bias.eq(record.bias),
                requant.mult.eq(record.mult),
                requant.shift.eq(record.shift),
                requant.zero.eq(zero),
                requant.low.eq(low),
                requant.high.eq(high),
                requant.add.eq(add),
                requant.again.eq(again),
                requant.b.eq(joined.as_signed()),
                requant.first_low.eq(first_low),
                requant.first_high.eq(first_high),
                requant.zero_b.eq(zero_b),
            ]
            sums.append(requant.sum)
            # numerics.split_code8; a 4-bit code goes where high nibbles go
            nibbles_high.append(Mux(wide, requant.code[4:8], requant.code[:4]))
            nibbles_low.append(delayed(m, Cat(requant.code[:3], ~requant.code[3]), 1, f"low_{i}"))

        # --- packing, and the maximum of POOL ---------------------------------------------------------------------

        # One register per plane: POST shifts codes in, the parts of a brick alike; POOL keeps the largest code.
        is_tap = passed & is_pool
        tap_arrives = arriving(is_tap, "tap_arrives")
        tap_inside, tap_first, tap_plane = (
            arriving(value, f"tap_{name}", reset_less=True)
            for name, value in (("inside", step.inside), ("first", step.first_tap), ("plane", ~step.first_plane))
        )
        tap_last = arriving(is_tap & step.last_tap, "tap_last", later=1)
        # These reach every lane, and are registers for some lanes each.
        groups = min(4, max(1, lanes // 16))

        def for_lanes(value: Value, name: str) -> list[Value]:
            """``value`` a cycle later, beside ``word``, for each lane."""
            values = copies(m, value, groups, name=name)
            return [values[lane * groups // lanes] for lane in range(lanes)]

        is_second = for_lanes(tap_plane, "tap_is_second")
        starts = for_lanes(tap_first, "tap_starts")
        in_map = for_lanes(tap_inside, "tap_in_map")
        pools = for_lanes(is_pool, "pools")
        comes_first = for_lanes(tap_arrives & ~tap_plane, "tap_comes_first")
        counts, clears = (
            [
                for_lanes(tap_arrives & condition & plane, f"tap_{name}_{n}")
                for n, plane in enumerate((~tap_plane, tap_plane))
            ]
            for name, condition in (("counts", tap_inside), ("clears", tap_first & ~tap_inside))
        )
        pack = [Signal(word_bits, name=f"pack_{name}", reset_less=True) for name in ("high", "low")]
        takes = [Signal(lanes, name=f"takes_{name}") for name in ("high", "low")]
        for lane in range(lanes):
            nibble = word.word_select(lane, 4).as_signed()
            other = Mux(is_second[lane], pack[1].word_select(lane, 4), pack[0].word_select(lane, 4)).as_signed()
            greater, equal = Signal(name=f"greater_{lane}"), Signal(name=f"equal_{lane}")
            # What the high nibbles have said about the code whose low nibble arrives now.
            better, same = (Signal(name=f"{n}_{lane}", reset_less=True) for n in ("better", "same"))
            m.d.comb += [
                greater.eq(nibble > other),
                equal.eq(nibble == other),
                takes[0][lane].eq(counts[0][lane] & (starts[lane] | greater)),
                takes[1][lane].eq(counts[1][lane] & (starts[lane] | better | (same & greater))),
            ]
            with m.If(comes_first[lane]):
                m.d.sync += [better.eq(in_map[lane] & greater), same.eq(in_map[lane] & equal)]
        for plane, incoming in enumerate((nibbles_high, nibbles_low)):
            shifts = coded_r if plane else coded
            for lane in range(lanes):
                place = lane % brick_columns - (brick_columns - post_lanes)
                shifted = incoming[place] if place >= 0 else pack[plane].word_select(lane + post_lanes, 4)
                target = pack[plane].word_select(lane, 4)
                with m.If(clears[plane][lane]):
                    m.d.sync += target.eq(0b1000)
                with m.Elif(takes[plane][lane] | shifts):
                    m.d.sync += target.eq(Mux(pools[lane], word.word_select(lane, 4), shifted))

        # --- words written ----------------------------------------------------------------------------------------

        # Decided a cycle ahead, as these reach every bit of the output memory.
        push, push_low, push_raw = Signal(), Signal(reset_less=True), Signal()
        tap_is_low = delayed(m, tap_plane, 1, "tap_is_low")
        first = coded_last
        second = coded_last_r & wide
        m.d.sync += [
            push.eq(Mux(is_pool, tap_last, first | second)),
            push_low.eq(Mux(is_pool, tap_is_low, second)),
            push_raw.eq(valid[self._SUM - 1] & raw),
        ]
        raw_index = delayed(m, sub, self._SUM, "raw_index") if raw_words > 1 else Const(0, 1)
        raw_word = Cat(sums).word_select(raw_index, word_bits)
        m.d.comb += [
            fifo.i_en.eq(push | push_raw),
            # A register of its own, as this one reaches every bit.
            fifo.i_data.eq(Mux(delayed(m, raw, 1, "raw_data"), raw_word, Mux(push_low, pack[1], pack[0]))),
        ]

        place = writes.o.payload
        granted = Signal()
        m.d.comb += [
            self.act_write.addr.eq(place.addr),
            self.act_write.data.eq(fifo.o_data),
            self.act_write.mask.eq(Mux(is_pool | raw, (1 << arch.parts_per_brick) - 1, 1 << part) if partial else 1),
            # The nest has no fewer places than there are words: it gives one per cycle, and is as quick to begin as
            # the one that what is written has been read by.
            self.act_write.valid.eq(fifo.o_valid),
            self.act_write_next.eq(fifo.o_valid_next),
            granted.eq(fifo.o_valid & self.act_write.ready),
            fifo.o_ready.eq(self.act_write.ready),
            writes.o.ready.eq(granted),
        ]
        ends = granted & place.last.as_value().all()
        m.d.sync += [
            self.done_stb.eq(ends),
            self.bank_stall.eq(
                (self.act_read.valid & ~self.act_read.ready) | (self.act_write.valid & ~self.act_write.ready)
            ),
        ]
        with m.If(ends):
            m.d.sync += [idle.eq(1), self.busy.eq(0)]
        return m

    # --- what it does, in Python ------------------------------------------------------------------------------------

    @classmethod
    def cycles(cls, arch: ArchConfig, instruction: Instruction) -> int:
        """Cycles from the first with ``command.valid``, the unit being idle, to ``done_stb``, if nothing is refused."""
        i, pixels = instruction, instruction["rows"] * instruction["cols"]
        if i.opcode is Opcode.POOL:
            return pixels * i["bricks"] * i["kernel_y"] * i["kernel_x"] * (1 + i["wide"]) + READ_LATENCY + 10
        bricks = 1 if arch.parts_per_brick > 1 else i["bricks"]
        columns = min(arch.lanes, arch.columns)
        steps = columns // arch.post_lanes
        start = arch.param_words + READ_LATENCY + 4
        if i["mode"] == OutputMode.RAW32:
            return start + pixels * bricks * RAW_WORDS * columns // arch.lanes - 1 + cls._SUM + 3
        add, words_out = i["add"], 1 + (i["mode"] == OutputMode.INT8)
        step = max(1 + add, words_out if steps == 1 else 1)
        first = max(start, 8 + (add and i["add_wide"]))
        first += add * (first % 2)
        last = first + (pixels * bricks * steps - 1) * step
        return last + (cls._SECOND if add else cls._CODE) + 3 + words_out

    @classmethod
    def model(
        cls,
        arch: ArchConfig,
        instruction: Instruction,
        *,
        act: Sequence[int],
        weights: Sequence[int],
        acc: Sequence[Sequence[Sequence[int]]],
    ) -> list[Write]:
        """Every write of one instruction, in order: address, word, mask. Parts outside the mask are 0.

        Parameters
        ----------
        act, weights : sequence of int
            The buffers' words, as unsigned integers, as they are before the instruction.
        acc : sequence
            Accumulators ``[bank][pixel][column]``.
        """
        return list(
            (cls._pool if instruction.opcode is Opcode.POOL else cls._post)(arch, instruction, act, weights, acc)
        )

    @staticmethod
    def _nibbles(arch: ArchConfig, buffer: Sequence[int], addr: int) -> list[int]:
        word = buffer[addr % (1 << LOCAL_ADDR_BITS) % arch.act_depth]
        return [numerics.wrap(word >> 4 * lane, 4) for lane in range(arch.lanes)]

    @staticmethod
    def _write(arch: ArchConfig, addr: int, values: Sequence[int], bits: int, part: int | None = None) -> Write:
        word = sum((v & (1 << bits) - 1) << bits * n for n, v in enumerate(values))
        addr = addr % (1 << LOCAL_ADDR_BITS) % arch.act_depth
        if part is None:
            return addr, word, (1 << arch.parts_per_brick) - 1
        return addr, word << part * bits * len(values), 1 << part

    @classmethod
    def _pool(cls, arch: ArchConfig, i: Instruction, act: Sequence[int], *_: object) -> Iterator[Write]:
        wide = i["wide"]
        for oy in range(i["rows"]):
            for ox in range(i["cols"]):
                for brick in range(i["bricks"]):
                    best = [numerics.code_range(8 if wide else 4)[0]] * arch.lanes
                    for ky in range(i["kernel_y"]):
                        for kx in range(i["kernel_x"]):
                            y = i["y0"] + oy * i["stride_y"] + ky * i["dilation_y"]
                            x = i["x0"] + ox * i["stride_x"] + kx * i["dilation_x"]
                            if not (0 <= y < i["height"] and 0 <= x < i["width"]):
                                continue
                            addr = i["in_addr"] + oy * i["oy_step"] + ox * i["ox_step"] + brick * i["brick_step"]
                            addr += ky * i["ky_step"] + kx * i["kx_step"]
                            codes = cls._nibbles(arch, act, addr)
                            if wide:
                                low = cls._nibbles(arch, act, addr + 1)
                                codes = list(map(numerics.join_code8, codes, low))
                            best = [max(b, c) for b, c in zip(best, codes, strict=True)]
                    addr = i["out_addr"] + oy * i["out_oy_step"] + ox * i["out_ox_step"] + brick * i["brick_step"]
                    planes = zip(*map(numerics.split_code8, best), strict=True) if wide else [best]
                    for plane, nibbles in enumerate(planes):
                        yield cls._write(arch, addr + plane, nibbles, 4)

    @classmethod
    def _post(
        cls,
        arch: ArchConfig,
        i: Instruction,
        act: Sequence[int],
        weights: Sequence[int],
        acc: Sequence[Sequence[Sequence[int]]],
    ) -> Iterator[Write]:
        partial = arch.parts_per_brick > 1
        bricks, part = (1, i["part"]) if partial else (i["bricks"], None)
        if bricks > arch.bricks_per_tile or (i["part"] >= arch.parts_per_brick and partial):
            raise ValueError(
                f"a column tile has {arch.bricks_per_tile} bricks and a brick {arch.parts_per_brick} parts; "
                f"the instruction has bricks={i['bricks']} and part={i['part']}"
            )
        columns = min(arch.lanes, arch.columns)
        raw = sum(weights[(i["p_addr"] + n) % arch.weight_depth] << n * arch.word_bits for n in range(arch.param_words))
        records = [param_layout().from_bits(raw >> PARAM_BITS * c & (1 << PARAM_BITS) - 1) for c in range(arch.columns)]
        for pixel in range(i["rows"] * i["cols"]):
            oy, ox = divmod(pixel, i["cols"])
            out = i["out_addr"] + oy * i["out_oy_step"] + ox * i["out_ox_step"]
            operand = i["add_addr"] + oy * i["add_oy_step"] + ox * i["add_ox_step"]
            for brick in range(bricks):
                tile = [
                    (acc[i["acc_bank"]][pixel][c], records[c]) for c in range(brick * columns, (brick + 1) * columns)
                ]
                if i["mode"] == OutputMode.RAW32:
                    value = sum(
                        (RequantLane.model_sum(a, r.bias) & 0xFFFFFFFF) << BIAS_BITS * n
                        for n, (a, r) in enumerate(tile)
                    )
                    words = RAW_WORDS * columns // arch.lanes
                    for n in range(words):
                        word = value >> n * arch.word_bits & (1 << arch.word_bits) - 1
                        yield cls._write(
                            arch, out + (i["part"] if partial else brick) * words + n, [word], arch.word_bits
                        )
                    continue
                codes = [RequantLane.model(a, r.bias, r.mult, r.shift, i["zero"], i["low"], i["high"]) for a, r in tile]
                if i["add"]:
                    first = cls._nibbles(arch, act, operand + brick * (1 + i["add_wide"]))
                    if i["add_wide"]:
                        second = cls._nibbles(arch, act, operand + 2 * brick + 1)
                        first = list(map(numerics.join_code8, first, second))
                    stored = first[i["part"] * columns if partial else 0 :][:columns]
                    codes = [
                        RequantLane.model_add(
                            a, b, zero_a=i["zero"], zero_b=i["zero_b"], k_a=i["k_a"], k_b=i["k_b"], n=i["add_shift"],
                            zero=i["add_zero"], low=i["add_low"], high=i["add_high"],
                        )
                        for a, b in zip(codes, stored, strict=True)
                    ]  # fmt: skip
                if i["mode"] == OutputMode.INT8:
                    for plane, nibbles in enumerate(zip(*map(numerics.split_code8, codes), strict=True)):
                        yield cls._write(arch, out + 2 * brick + plane, nibbles, 4, part)
                else:
                    yield cls._write(arch, out + brick, codes, 4, part)
