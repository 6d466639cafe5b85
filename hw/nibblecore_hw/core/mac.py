# amaranth: UnusedElaboratable=no
"""The MAC engine: sequencer, weight feeder, array and accumulators."""

from collections.abc import MutableSequence, Sequence
from typing import Any

from amaranth import Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.elements import element_timing, swap_cycles, tile_cycles
from nibblecore.arch.isa import LOCAL_ADDR_BITS, Instruction, Opcode
from nibblecore.arch.numerics import wrap

from ..layouts import LAST_READ_LATENCY, acc_read_port, command_signature, instruction_layout, read_port, word_layout
from .accumulate import Accumulators, control_layout
from .array import SystolicArray
from .loopnest import LoopNest, assign_job, loops_of

LOOPS = loops_of(Opcode.MAC, ("ox", "oy", "brick", "kx", "ky"))
"""Loops of a MAC instruction, innermost first: the pixels of a pass, then the passes."""

_TAG = data.StructLayout({"accumulate": 1, "bank": 1, "shift": 2, "pad": 4})


class MacEngine(wiring.Component):
    """Executes MAC instructions: one weight tile per pass, one pixel per cycle.

    Cycles, where no bank is lost and every read is granted at once, with ``P = max(pixels, swap_cycles, HAZARD)`` of a
    tile of ``pixels = rows * cols``, made even where the core has ``dsp`` elements, which take pixels in pairs, and
    ``swap_cycles`` of :func:`nibblecore.arch.elements.swap_cycles`, which are ``columns`` for elements without tables:

    - A pass takes ``P`` cycles from its first pixel to that of the next pass. So does the last pass of an instruction
      to the first pixel of the next one, whose first tile is fetched meanwhile, if that command is offered
      :attr:`start_cycles` cycles before; no pixel enters sooner after the offer of its instruction.
    - From idle, the first pixel enters :attr:`start_cycles` cycles after the first cycle with ``command.valid``.
    - ``done_stb`` comes :attr:`drain_cycles` cycles after the last pixel.

    A single instruction thus takes ``start_cycles + (passes - 1) * P + pixels - 1 + drain_cycles`` cycles from the
    first one with ``command.valid`` to its ``done_stb``: :meth:`cycles`. ``command.ready`` comes 2 cycles after
    ``valid`` from idle, and otherwise while the last pixels of the instruction before enter the array: an instruction
    is read, and its first tile fetched, before it is accepted.

    The accumulators of the smallest tiles would be read again before they are written: ``HAZARD`` is
    :attr:`Accumulators.HAZARD`, and a tile of fewer pixels is followed by pauses.

    A lost grant of ``x`` delays the pixels by one cycle, one of ``w`` the next pass if it is due; nothing else waits
    for them. Pixels outside the window need no grant. Both ports' addresses are those of the instruction modulo the
    depth of the buffer.

    A reset abandons all instructions, and leaves weights as they are; the first pass of an instruction loads its tile
    anew. It must last for :attr:`reset_cycles`: what is on its way through the array, over half the chip, has no reset
    of its own and is still added to the accumulators.

    Parameters
    ----------
    arch : ArchConfig
        The core.
    technology : {"generic", "ecp5"}
        Primitives that the elements may instantiate.

    Members
    -------
    command : In(command_signature())
        Legal MAC instructions whose semaphores are there.
    done_stb : Out(1)
        All accumulators of the oldest unfinished instruction are written and may be read from this cycle on.
    busy : Out(1)
        An instruction is offered or unfinished.
    x : Out(read_port(...))
        Reads of the activation buffer, at its last port. Where the weight memory is ``single``, ``valid`` depends
        combinationally on ``w.ready``.
    w : Out(read_port(...))
        Reads of the weight buffer, at its last port.
    x_ready_next : In(act_banks)
        ``x.ready`` of the next cycle, for an address in each bank; only looked at where the activation memory is
        ``dual``.
    w_ready_next : In(1)
        ``w.ready`` of the next cycle; only looked at where the weight memory is ``dual``.
    acc_read : In(acc_read_port(arch))
        Drain of a bank that no unfinished instruction writes.
    mac_weights, mac_bank, mac_active : Out(1)
        The cycle counts for this counter. At most one of them is high: the first pixel of a pass waits for its tile; a
        pixel waits for its bank; a pixel enters the array.

    Raises
    ------
    ValueError
        If the element or the technology is unknown.
    """

    HAZARD = Accumulators.HAZARD

    command: Any
    done_stb: Signal
    busy: Signal
    x: Any
    w: Any
    x_ready_next: Signal
    w_ready_next: Signal
    acc_read: Any
    mac_weights: Signal
    mac_bank: Signal
    mac_active: Signal

    def __init__(self, arch: ArchConfig, *, technology: str = "generic") -> None:
        self._arch = arch
        self._array = SystolicArray(arch, technology=technology)
        self._accumulators = Accumulators(
            arch, sum_bits=self._array.sum_bits, latencies=self._array.latencies, technology=technology
        )
        super().__init__(
            {
                "command": In(command_signature()),
                "done_stb": Out(1),
                "busy": Out(1),
                "x": Out(read_port(addr_bits=ceil_log2(arch.act_depth), word_bits=arch.word_bits)),
                "w": Out(read_port(addr_bits=ceil_log2(arch.weight_depth), word_bits=arch.word_bits)),
                "x_ready_next": In(arch.act_banks),
                "w_ready_next": In(1),
                "acc_read": In(acc_read_port(arch)),
                "mac_weights": Out(1),
                "mac_bank": Out(1),
                "mac_active": Out(1),
            }
        )

    @property
    def start_cycles(self) -> int:
        """Cycles from the first one with ``command.valid`` to the first pixel, from idle."""
        return max(tile_cycles(self._arch), LoopNest.LATENCY + 1)

    @property
    def drain_cycles(self) -> int:
        """Cycles from the last pixel of an instruction to its ``done_stb``."""
        return LAST_READ_LATENCY + self._accumulators.done_latency

    @property
    def reset_cycles(self) -> int:
        """Cycles for which a reset must last: until the last pixel is added up, and the last tile is in its tables.

        Filling tables takes ``load_cycles`` from a tile's last word on; twice that covers the words on their way.
        """
        return self.drain_cycles + 2 * element_timing(self._arch).load_cycles

    def pass_cycles(self, *, pixels: int) -> int:
        """Cycles of a pass over a tile of so many pixels."""
        if self._arch.paired_columns:
            return max(pixels + pixels % 2, swap_cycles(self._arch, pixels), self.HAZARD)
        return max(pixels, swap_cycles(self._arch, pixels), self.HAZARD)

    def cycles(self, *, pixels: int, passes: int) -> int:
        """Cycles of one instruction from idle, from its first cycle with ``command.valid`` to its ``done_stb``."""
        return self.start_cycles + (passes - 1) * self.pass_cycles(pixels=pixels) + pixels - 1 + self.drain_cycles

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        arch = self._arch
        m.submodules.nest = nest = LoopNest(loops=LOOPS, tag_bits=_TAG.size, inner=2)
        m.submodules.array = array = self._array
        m.submodules.accumulators = accumulators = self._accumulators
        instruction = data.View(instruction_layout(Opcode.MAC), self.command.payload)

        # Pixels and weights take an instruction from the same offer, each when it is ready for it.
        pixels_taken = Signal()
        weights_taken = Signal()
        job_tag = data.View(_TAG, nest.job.payload.tag)
        m.d.comb += [
            assign_job(nest.job.payload, instruction, LOOPS, base=instruction.x_addr),
            job_tag.accumulate.eq(instruction.accumulate),
            job_tag.bank.eq(instruction.acc_bank),
            job_tag.shift.eq(instruction.shift),
            job_tag.pad.eq(instruction.pad),
            nest.job.valid.eq(self.command.valid & ~pixels_taken),
            self.command.ready.eq((pixels_taken | nest.job.ready) & weights_taken),
        ]
        with m.If(self.command.ready):
            m.d.sync += [pixels_taken.eq(0), weights_taken.eq(0)]
        with m.Elif(nest.job.ready):
            m.d.sync += pixels_taken.eq(1)

        # A step of the nest is a pixel. It enters when its word is granted; the first one of a pass also waits for the
        # weight tile, whose last column may be granted in the same cycle, and for the accumulators of small tiles.
        enters = Signal()
        step = Signal(nest.o.payload.shape(), reset_less=True)
        step_valid, takes_step = Signal(), Signal()
        m.d.comb += [takes_step.eq(enters | ~step_valid), nest.o.ready.eq(takes_step)]
        with m.If(takes_step):
            m.d.sync += [step.eq(nest.o.payload), step_valid.eq(nest.o.valid)]
        tag = data.View(_TAG, step.tag)
        pass_begins, pass_ends = Signal(), Signal()
        first_pass, last_pass = Signal(), Signal()
        tile_there = Signal()
        # pause != 0 and pixel < HAZARD - 1, both as registers: whether a pixel enters is known late in a cycle.
        pause = Signal(range(self.HAZARD))
        pausing = Signal()
        is_short = Signal(init=1)
        may_begin_pass, may_begin_pass_next = Signal(), Signal()  # tile_there & ~pausing
        may_enter = Signal()
        goes = Signal()  # there is a pixel, and it needs no word, or its bank is free
        # What is found out a cycle ahead is so of both pixels that may be there then: the buffers are far away, and
        # whether a pixel enters reaches much.
        knows_tile = arch.weight_memory == "dual" and arch.columns > 1
        if arch.act_memory == "dual":
            banks = slice(ceil_log2(arch.act_depth // arch.act_banks), ceil_log2(arch.act_depth))

            def goes_next(pixel: data.View) -> Value:
                return ~pixel.inside | self.x_ready_next.bit_select(pixel.addr[banks], 1)

            found = Mux(takes_step, nest.o.valid & goes_next(nest.o.payload), goes_next(step))
            m.d.sync += goes.eq(found)
            if knows_tile:
                begins_next = Mux(takes_step, nest.o.payload.first_inner, pass_begins)
                m.d.sync += enters.eq(found & (~begins_next | may_begin_pass_next))
        else:
            m.d.comb += goes.eq(step_valid & (~step.inside | self.x.ready))
        if not (knows_tile and arch.act_memory == "dual"):
            m.d.comb += enters.eq(may_enter & goes)
        m.d.comb += [
            pass_begins.eq(step.first_inner),
            pass_ends.eq(step.last_inner),
            first_pass.eq(step.first_outer),
            last_pass.eq(step.last_outer),
            may_enter.eq(~pass_begins | may_begin_pass),
            self.x.addr.eq(step.addr),
            self.x.valid.eq(step_valid & step.inside & may_enter),
            self.mac_active.eq(enters),
            self.mac_bank.eq(step_valid & may_enter & ~goes),
            self.mac_weights.eq(step_valid & pass_begins & ~may_begin_pass & ~pausing),
        ]
        # A pixel that has no partner when the next pass begins would be lost to elements that take pairs. They count
        # from the first pixel of a pass, as `second` does.
        second = Signal()
        m.d.sync += second.eq(~second | (enters & pass_begins))
        pixel = Signal(ceil_log2(arch.acc_depth))
        pausing_next = Signal()
        m.d.comb += pausing_next.eq(pausing & (pause != 1))
        m.d.sync += pausing.eq(pausing_next)
        with m.If(pausing):
            m.d.sync += pause.eq(pause - 1)
        with m.If(enters):
            m.d.sync += [pixel.eq(pixel + 1), is_short.eq(is_short & (pixel != self.HAZARD - 2))]
            with m.If(pass_ends):
                m.d.sync += [pixel.eq(0), is_short.eq(1)]
                with m.If(is_short):
                    m.d.sync += pause.eq(self.HAZARD - 1 - pixel)
                    m.d.comb += pausing_next.eq(1)
                if arch.paired_columns:
                    with m.Elif(~second):
                        m.d.sync += pause.eq(1)
                        m.d.comb += pausing_next.eq(1)

        # Weight feeder: as soon as a tile is in use, it fetches the next, be it of the next instruction.
        fetches = Signal()  # words of a tile are being asked for
        complete, completes = Signal(), Signal()  # a whole tile waits for its pass, from the next cycle on
        wanting = Signal(init=1)  # the next tile is that of an instruction not taken yet
        tile_begins = Signal()
        tile = Signal(len(self.w.addr), reset_less=True)
        tile_step = Signal(instruction.w_step.shape(), reset_less=True)
        address = Signal.like(tile, reset_less=True)
        column = Signal(ceil_log2(arch.columns))
        is_last = Signal(init=arch.columns == 1)  # column == columns - 1, as a register
        granted, tile_ends, offered = Signal(), Signal(), Signal()
        # Tables take their words at intervals, and some cycles after the last one.
        timing = element_timing(arch)
        resting = Signal()  # rest != 0
        rest = Signal(range(timing.load_interval))
        settle = Signal(range(timing.load_cycles + 1))
        # Where tables cannot be filled in use, the word that begins to fill them waits for the last pixel.
        in_use, is_held = Signal(), Signal(init=timing.fill_columns == 1)
        waits = Signal()
        next_tile = Signal.like(tile, reset_less=True)  # as a register: a tile is in use for HAZARD cycles
        is_first = Signal()  # the next tile is the first one of an instruction
        m.d.comb += [
            self.w.addr.eq(address),
            waits.eq(resting | (in_use & is_held)),
            self.w.valid.eq(fetches & ~waits),
            granted.eq(self.w.valid & self.w.ready),
            # The last column is only due while words are fetched.
            tile_ends.eq(self.w.ready & (is_last if arch.columns > 1 else fetches) & ~waits),
            tile_there.eq(complete if timing.load_cycles else complete | tile_ends),
            tile_begins.eq(enters & pass_begins),
            offered.eq(self.command.valid & ~weights_taken),
            completes.eq(settle == 1 if timing.load_cycles > 1 else tile_ends),
            is_first.eq(wanting | last_pass),
        ]
        m.d.sync += next_tile.eq(tile + tile_step)
        if knows_tile:
            due_next = Signal()
            m.d.comb += due_next.eq(Mux(granted, column == arch.columns - 2, is_last))
            there_next = complete | completes
            if not timing.load_cycles:
                assert timing.load_interval == 1
                there_next |= due_next & self.w_ready_next
            m.d.comb += may_begin_pass_next.eq(there_next & ~tile_begins & ~pausing_next)
            m.d.sync += may_begin_pass.eq(may_begin_pass_next)
        else:
            m.d.comb += may_begin_pass.eq(tile_there & ~pausing)
        with m.If(granted):
            m.d.sync += [
                address.eq(address + 1),
                column.eq(column + 1),
                is_last.eq(column == (arch.columns - 2) % arch.columns),
            ]
        if not timing.overlaps:
            with m.If(granted):
                m.d.sync += is_held.eq(column == (timing.fill_columns - 2) % arch.columns)
            with m.If(enters & (pass_begins | pass_ends)):
                m.d.sync += in_use.eq(~pass_ends)
        if timing.load_interval > 1:
            with m.If(granted):
                m.d.sync += [rest.eq(timing.load_interval - 1), resting.eq(1)]
            with m.Elif(resting):
                m.d.sync += [rest.eq(rest - 1), resting.eq(rest != 1)]
        if timing.load_cycles > 1:
            with m.If(tile_ends):
                m.d.sync += settle.eq(timing.load_cycles - 1)
            with m.Elif(settle.any()):
                m.d.sync += settle.eq(settle - 1)
        with m.If(tile_ends):
            m.d.sync += fetches.eq(0)
        with m.If(completes):
            m.d.sync += complete.eq(1)
        with m.If(tile_begins):
            m.d.sync += complete.eq(0)
        # While nothing is offered these take what does not matter, and go on wanting.
        with m.If(tile_begins | wanting):
            start = Mux(is_first, instruction.w_addr, next_tile)
            m.d.sync += [
                wanting.eq(is_first & ~offered),
                fetches.eq(~is_first | offered),
                tile.eq(start),
                address.eq(start),
                tile_step.eq(Mux(is_first, instruction.w_step, tile_step)),
            ]
            with m.If(is_first & offered):
                m.d.sync += weights_taken.eq(1)

        # What was granted arrives LAST_READ_LATENCY edges later, and its orders travel along.
        orders = data.StructLayout(
            {
                "control": control_layout(arch),
                "swap": 1,
                "inside": 1,
                "pad": 4,
                "load": 1,
                "column": ceil_log2(arch.columns),
            }
        )
        order = Signal(orders)
        m.d.comb += [
            order.control.valid.eq(enters),
            order.control.addr.eq(pixel),
            order.control.bank.eq(tag.bank),
            order.control.overwrite.eq(first_pass & ~tag.accumulate),
            order.control.shift.eq(tag.shift),
            order.control.end.eq(enters & pass_ends & last_pass),
            order.swap.eq(tile_begins),
            order.inside.eq(step.inside),
            order.pad.eq(tag.pad),
            order.load.eq(granted),
            order.column.eq(column),
        ]
        for i in range(LAST_READ_LATENCY):
            later = Signal(orders, name=f"order{i}", reset_less=True)
            m.d.sync += later.eq(order)
            order = later
        word = word_layout(arch)
        m.d.comb += [
            array.activations.eq(Mux(order.inside, self.x.data, order.pad.replicate(arch.lanes))),
            array.swap_stb.eq(order.swap),
            array.weights.eq(data.View(word, self.w.data)),
            array.column.eq(order.column),
            array.load_stb.eq(order.load),
            accumulators.control.eq(order.control),
            accumulators.sums.eq(array.sums),
            accumulators.read.bank.eq(self.acc_read.bank),
            accumulators.read.addr.eq(self.acc_read.addr),
            accumulators.read.group.eq(self.acc_read.group),
            accumulators.read.en.eq(self.acc_read.en),
            self.acc_read.data.eq(accumulators.read.data),
            self.done_stb.eq(accumulators.done_stb),
        ]

        # Accepted and not done: a pass takes at least HAZARD cycles, and a few more instructions are in the nest.
        unfinished = Signal(range(self.drain_cycles // self.HAZARD + 9))
        accepted = Signal()
        m.d.sync += [
            accepted.eq(self.command.valid & self.command.ready),
            unfinished.eq(unfinished + accepted - self.done_stb),
        ]
        m.d.comb += self.busy.eq(self.command.valid | accepted | unfinished.any())
        return m

    def model(
        self,
        instruction: Instruction,
        *,
        x: Sequence[int],
        w: Sequence[int],
        acc: Sequence[Sequence[MutableSequence[int]]],
    ) -> None:
        """Execute ``instruction`` on the words ``x`` of the activation buffer and ``w`` of the weight buffer.

        ``acc[bank][pixel][column]`` is changed in place.

        Raises
        ------
        ValueError
            If the tile exceeds ``acc_depth``.
        """
        arch, i = self._arch, instruction
        pixels = i["rows"] * i["cols"]
        if pixels > arch.acc_depth:
            raise ValueError(f"rows * cols = {pixels} pixels exceed acc_depth={arch.acc_depth}")

        def nibbles(memory: Sequence[int], address: int) -> list[int]:
            word = memory[address % (1 << LOCAL_ADDR_BITS) % len(memory)]
            return [wrap(word >> 4 * lane, 4) for lane in range(arch.lanes)]

        overwrite = not i["accumulate"]
        tile = i["w_addr"]
        for ky in range(i["kernel_y"]):
            for kx in range(i["kernel_x"]):
                for brick in range(i["bricks"]):
                    weights = [nibbles(w, tile + column) for column in range(arch.columns)]
                    for pixel in range(pixels):
                        oy, ox = divmod(pixel, i["cols"])
                        row = i["y0"] + oy * i["stride_y"] + ky * i["dilation_y"]
                        col = i["x0"] + ox * i["stride_x"] + kx * i["dilation_x"]
                        word = [i["pad"]] * arch.lanes
                        if 0 <= row < i["height"] and 0 <= col < i["width"]:
                            word = nibbles(
                                x,
                                i["x_addr"]
                                + oy * i["oy_step"]
                                + ox * i["ox_step"]
                                + ky * i["ky_step"]
                                + kx * i["kx_step"]
                                + brick * i["brick_step"],
                            )
                        cells = acc[i["acc_bank"]][pixel]
                        for column, product in enumerate(self._array.model(word, weights)):
                            cells[column] = self._accumulators.model(
                                cells[column], product, overwrite=overwrite, shift=i["shift"]
                            )
                    overwrite = False
                    tile += i["w_step"]
