"""STORE: copy words from the activation buffer to DRAM."""

from typing import Any

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Opcode
from nibblecore.arch.regs import ErrorCause

from ..ctrl.queue import Queue
from ..layouts import (
    READ_LATENCY,
    axi_write_signature,
    command_signature,
    instruction_layout,
    read_port,
    region_layout,
)
from ..registers import SkidBuffer
from .axi import address_constants, is_error
from .walk import DRAM_FIELDS, BurstIssue, WordWalk, burst_words, lane_bits, taking

__all__ = ["StoreDma"]


class StoreDma(wiring.Component):
    """Execute STORE instructions.

    ::

        command ─► BurstIssue ─────────┬───────────────────────────► AW
           └─────► WordWalk            └─► Queue of bursts ─┐
                      └─► activation buffer ─► Queue ─► words to beats ─► W
                                                                          B ─► done

    Addresses run ahead of data, and words are read ahead as far as the queue allows, into the next rows, planes and the
    next instruction; up to ``arch.outstanding`` bursts are in flight. W never runs ahead of AW: the first beat of a
    burst is offered at least one cycle after its address. WVALID is raised only for a beat whose word is there. See
    :class:`~.walk.BurstWalk` for how rows are cut.

    Cycles, counted from the one in which ``command`` transfers, the second one in which it is valid, of an idle engine:

    - the first AWVALID is :attr:`AW_LATENCY` cycles later, and one burst can follow every 2 cycles;
    - the first WVALID is :attr:`W_LATENCY` cycles later, if the buffer grants at once, and W goes on with a beat per
      cycle, without a gap between bursts and rows, where every burst has 2 beats or more and ``outstanding`` bursts
      have as many beats as a burst takes from AWVALID to its response;
    - ``done_stb`` comes one cycle after the last response was taken. So an instruction of n words takes ``W_LATENCY +
      n * beats_per_word + B + 1`` cycles, where B is the number of cycles from the last beat's transfer to its
      response's;
    - a STORE that waits is taken a cycle after the one in which the last burst of the one before can be sent and its
      last word is requested, whichever is later; its first address follows the last of the one before by 4 cycles at
      least.

    After an error, or once ``stop`` has been seen, the engine starts no burst, and takes no command from the second
    cycle on; bursts that are in flight are ended with beats that write nothing (WSTRB = 0; a beat that is being offered
    stays as it is, and the two behind it). Only a reset leads out of that, and must not come before ``idle``.

    Parameters
    ----------
    arch : ArchConfig

    Members
    -------
    command : In(command_signature())
        STORE instructions.
    region : In(region_layout())
        The region of the instruction on ``command``.
    act : Out(read_port(...))
        To the activation buffer.
    act_next : Out(act_banks)
        Bit b: ``act`` asks for bank b in the next cycle, for the first time.
    bus : Out(axi_write_signature(arch))
    done_stb : Out(1)
        The responses of all bursts of an instruction have come.
    busy : Out(1)
        From the cycle after an instruction is taken to the one before its ``done_stb``.
    stop : In(1)
    idle : Out(1)
        No burst is in flight.
    error_stb, error_cause : Out
        REGION: a burst would leave its region; it is not sent, and reported when all before it are answered. BUS_WRITE:
        SLVERR or DECERR. At most one error until reset; it belongs to the oldest instruction that is not done.
    stall_bus_stb : Out(1)
        For STORE_BUS, one cycle late.
    """

    AW_LATENCY = 4
    W_LATENCY = 5 + READ_LATENCY
    QUEUE_WORDS = 16
    """Words that can be read ahead."""

    command: Any
    region: Any
    act: Any
    act_next: Signal
    bus: Any
    done_stb: Signal
    busy: Signal
    stop: Signal
    idle: Signal
    error_stb: Signal
    error_cause: Signal
    stall_bus_stb: Signal

    def __init__(self, *, arch: ArchConfig) -> None:
        self.arch = arch
        burst_words(arch)
        super().__init__(
            {
                "command": In(command_signature()),
                "region": In(region_layout()),
                "act": Out(read_port(addr_bits=ceil_log2(arch.act_depth), word_bits=arch.word_bits)),
                "act_next": Out(arch.act_banks),
                "bus": Out(axi_write_signature(arch)),
                "done_stb": Out(1),
                "busy": Out(1),
                "stop": In(1),
                "idle": Out(1, init=1),
                "error_stb": Out(1),
                "error_cause": Out(8),
                "stall_bus_stb": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        arch, bus = self.arch, self.bus
        m.submodules.issue = issue = BurstIssue(arch=arch)
        m.submodules.words = words = WordWalk(addr_bits=ceil_log2(arch.act_depth))
        command = data.View(instruction_layout(Opcode.STORE), self.command.payload)
        halted, writes_halted = Signal(), Signal()
        # W's part is far away, and what it ends it may end a cycle later.
        m.d.sync += [halted.eq(halted | self.stop), writes_halted.eq(halted)]

        # The DRAM side takes an instruction at once, the buffer side when it is through with the one before.
        waiting, waiting_valid = Signal(words.i.payload.shape(), reset_less=True), Signal()
        take = taking(m, self.command, issue.i.ready & ~waiting_valid & ~halted)
        m.d.comb += [
            issue.enable.eq(~halted),
            issue.i.valid.eq(take),
            issue.i.payload.region.eq(self.region),
            *(issue.i.payload[name].eq(command[name]) for name in DRAM_FIELDS),
            words.i.valid.eq(waiting_valid),
            words.i.payload.eq(waiting),
        ]
        with m.If(words.i.ready):
            m.d.sync += waiting_valid.eq(0)
        with m.If(take):
            m.d.sync += [
                waiting_valid.eq(1),
                *(waiting[n].eq(command[n]) for n in ("local_addr", "local_step1", "local_step2", *words.counts)),
            ]

        # Words from the buffer; `claimed` counts those that are asked for or read, and not yet used.
        m.submodules.queue = queue = Queue(shape=arch.word_bits, depth=self.QUEUE_WORDS)
        claimed, arriving = Signal(range(self.QUEUE_WORDS + 1)), Signal(READ_LATENCY)
        # A register: the requests of the cycle in which it is found out, and of the one after that, find room.
        may_ask = Signal()
        asked, granted, used = Signal(), Signal(), Signal()
        # Requests come from registers, as they decide whether others are granted theirs.
        request = Signal()
        m.d.comb += [
            self.act.valid.eq(request),
            granted.eq(request & self.act.ready),
            words.o.ready.eq((~request | self.act.ready) & may_ask),
            asked.eq(words.o.valid & words.o.ready),
            used.eq(queue.o.valid & queue.o.ready),
            queue.i.valid.eq(arriving[-1]),
            queue.i.payload.eq(self.act.data),
        ]
        m.d.sync += [
            request.eq(asked | (request & ~self.act.ready)),
            arriving.eq(Cat(granted, arriving)),
            claimed.eq(claimed + asked - used),
            may_ask.eq((claimed <= self.QUEUE_WORDS - 2) & ~halted),
        ]
        with m.If(asked):
            m.d.sync += self.act.addr.eq(words.o.payload.addr)
        row_bits = ceil_log2(arch.act_depth // arch.act_banks)
        m.d.comb += self.act_next.eq(Cat(asked & (words.o.payload.addr[row_bits:] == b) for b in range(arch.act_banks)))

        # AW. The queues hold what is in flight, so they never are full when a burst is issued.
        lanes = lane_bits(arch)
        in_flight = max(2, arch.outstanding)
        shape = data.StructLayout({"words_m1": max(1, ceil_log2(burst_words(arch))), "lane": lanes})
        m.submodules.bursts = bursts = Queue(shape=shape, depth=in_flight)
        m.submodules.lasts = lasts = Queue(shape=1, depth=in_flight)
        m.d.comb += [
            *address_constants(bus, "aw", arch),
            bus.awaddr.eq(issue.a_addr),
            bus.awlen.eq(issue.a_len),
            bus.awvalid.eq(issue.a_valid),
            issue.a_ready.eq(bus.awready),
            self.idle.eq(issue.idle),
            bursts.i.valid.eq(issue.burst_stb),
            bursts.i.payload.words_m1.eq(issue.burst.words_m1),
            bursts.i.payload.lane.eq(issue.burst.addr[ceil_log2(arch.word_bytes) :]),
            lasts.i.valid.eq(issue.burst_stb),
            lasts.i.payload.eq(issue.burst.last),
        ]

        # W: words to beats. Once halted, beats need no word and write nothing.
        beat_bits = ceil_log2(arch.beats_per_word)
        number = Signal(len(bursts.o.payload.words_m1))
        beat, word_ends, burst_ends = Signal(beat_bits), Signal(), Signal()
        # Whether the bus is ready ends here: no counter hears of it, and no register lets many bits go on.
        m.submodules.beats = beats = SkidBuffer(
            shape=data.StructLayout({"data": arch.bus_bits, "strobes": arch.bus_bytes, "last": 1, "ends_word": 1}),
            groups=min(4, max(1, arch.bus_bits // 32)),
        )
        offered, sent = beats.i.payload, beats.o.payload
        word_bytes = arch.bus_bytes >> lanes
        word = queue.o.payload
        lane = (bursts.o.payload.lane + number)[:lanes]
        step = Signal()
        m.d.comb += [
            step.eq(beats.i.valid & beats.i.ready),
            word_ends.eq(beat == arch.beats_per_word - 1),
            burst_ends.eq(word_ends & (number == bursts.o.payload.words_m1)),
            queue.o.ready.eq(step & word_ends),
            bursts.o.ready.eq(step & burst_ends),
            beats.i.valid.eq(bursts.o.valid & (queue.o.valid | writes_halted)),
            offered.data.eq(word.word_select(beat, arch.bus_bits) if beat_bits else word.replicate(1 << lanes)),
            offered.strobes.eq(
                Mux(writes_halted, 0, Cat((lane == k).replicate(word_bytes) for k in range(1 << lanes)))
            ),
            offered.last.eq(burst_ends),
            offered.ends_word.eq(word_ends),
            bus.wdata.eq(sent.data),
            bus.wstrb.eq(sent.strobes),
            bus.wlast.eq(sent.last),
            bus.wvalid.eq(beats.o.valid),
            beats.o.ready.eq(bus.wready),
        ]
        with m.If(step):
            m.d.sync += beat.eq(beat + 1)
            with m.If(burst_ends):
                m.d.sync += number.eq(0)
            with m.Elif(word_ends):
                m.d.sync += number.eq(number + 1)

        # B, and what the rest of the core sees.
        done, error_stb, cause, stall = Signal(), Signal(), Signal(8, reset_less=True), Signal()
        refused, bad_response = Signal(), Signal()
        m.d.comb += [
            bus.bready.eq(1),
            issue.finished_stb.eq(bus.bvalid),
            lasts.o.ready.eq(bus.bvalid),
            refused.eq(issue.refused & ~halted),
            bad_response.eq(bus.bvalid & is_error(bus.bresp) & ~halted),
            self.busy.eq(issue.busy),
            self.done_stb.eq(done),
            self.error_stb.eq(error_stb),
            self.error_cause.eq(cause),
            self.stall_bus_stb.eq(stall),
        ]
        m.d.sync += [
            done.eq(bus.bvalid & lasts.o.payload & ~bad_response & ~halted),
            error_stb.eq(refused | bad_response),
            cause.eq(Mux(bad_response, ErrorCause.BUS_WRITE, ErrorCause.REGION)),
            stall.eq(self.busy & ~(bus.wvalid & bus.wready & sent.ends_word)),
        ]
        with m.If(refused | bad_response):
            m.d.sync += halted.eq(1)
        return m
