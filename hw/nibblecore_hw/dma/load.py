"""LOAD: copy words from DRAM to the activation buffer or the weight buffer."""

from typing import Any

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import LoadTarget, Opcode
from nibblecore.arch.regs import ErrorCause

from ..ctrl.queue import Queue
from ..layouts import axi_read_signature, command_signature, instruction_layout, region_layout, write_port
from .axi import address_constants, is_error
from .walk import DRAM_FIELDS, BurstIssue, WordWalk, burst_words, lane_bits, taking

__all__ = ["LoadDma"]


class LoadDma(wiring.Component):
    """Execute LOAD instructions.

    ::

        command ─► BurstIssue ─────────────────────────► AR
           └─────► WordWalk ─► address ─┐
        R ─► beats to words ─► Queue ─► lane ─► activation or weight buffer

    Addresses run ahead of data: the bursts of the next rows, planes and of the next instruction are sent while earlier
    data still arrives, up to ``arch.outstanding`` bursts in flight. See :class:`~.walk.BurstWalk` for how rows are cut.

    Cycles, counted from the one in which ``command`` transfers, the second one in which it is valid, of an idle engine:

    - the first ARVALID is :attr:`AR_LATENCY` cycles later, and one burst can follow every 2 cycles;
    - a word is written :attr:`WRITE_LATENCY` cycle after the one in which its last beat is taken, unless the write port
      makes it wait; ``done_stb`` comes one cycle after the last word was written;
    - so an instruction of n words takes ``AR_LATENCY + L + n * beats_per_word + WRITE_LATENCY + 1`` cycles, where L is
      the number of cycles from ARVALID to the first R beat if R never pauses: long rows pass without a gap between
      bursts and rows. R pauses for nobody else's sake where every burst has 2 words or more and ``outstanding`` bursts
      have as many beats as a burst takes from ARVALID to its last beat;
    - at most two instructions are in the engine: the next one is taken while the data of one arrive, its first address
      follows the last of the one before by 4 cycles, and its words follow without a gap if L is not longer than the
      words that are still to come; a third one is taken in the cycle behind the first one's ``done_stb``.

    After an error, or once ``stop`` has been seen, the engine writes nothing, and starts no burst and takes no command
    from the second cycle on; what is in flight is taken from the bus and dropped. Only a reset leads out of that, and
    must not come before ``idle``.

    Parameters
    ----------
    arch : ArchConfig

    Members
    -------
    command : In(command_signature())
        LOAD instructions.
    region : In(region_layout())
        The region of the instruction on ``command``.
    act, weights : Out(write_port(...))
        To the buffers.
    act_ready_next : In(1)
        ``act.ready`` of the next cycle; only looked at, instead of that, where the activation memory is ``dual``.
    bus : Out(axi_read_signature(arch))
    done_stb : Out(1)
        An instruction's last word was written.
    busy : Out(1)
        From the cycle after an instruction is taken to the one before its ``done_stb``.
    stop : In(1)
    idle : Out(1)
        No burst is in flight.
    error_stb, error_cause : Out
        REGION: a burst would leave its region; it is not sent, and reported when all before it have arrived. BUS_READ:
        SLVERR or DECERR; reported when its word's turn comes, so that all instructions before have reported done. At
        most one error until reset; it belongs to the oldest instruction that is not done.
    stall_bus_stb : Out(1)
        For LOAD_BUS, one cycle late.
    """

    AR_LATENCY = 4
    WRITE_LATENCY = 1

    command: Any
    region: Any
    act: Any
    weights: Any
    act_ready_next: Signal
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
        act_bits, weight_bits = ceil_log2(arch.act_depth), ceil_log2(arch.weight_depth)
        super().__init__(
            {
                "command": In(command_signature()),
                "region": In(region_layout()),
                "act": Out(write_port(addr_bits=act_bits, word_bits=arch.word_bits, parts=arch.parts_per_brick)),
                "weights": Out(write_port(addr_bits=weight_bits, word_bits=arch.word_bits, parts=1)),
                "act_ready_next": In(1),
                "bus": Out(axi_read_signature(arch)),
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
        m.submodules.words = words = WordWalk(
            addr_bits=ceil_log2(max(arch.act_depth, arch.weight_depth)), lane_bits=lane_bits(arch)
        )
        command = data.View(instruction_layout(Opcode.LOAD), self.command.payload)
        halted = Signal()
        m.d.sync += halted.eq(halted | self.stop)

        # The DRAM side takes an instruction at once, the buffer side when it is through with the one before.
        waiting, waiting_target = Signal(words.i.payload.shape(), reset_less=True), Signal(1, reset_less=True)
        waiting_valid, target = Signal(), Signal(1, reset_less=True)
        take = taking(m, self.command, issue.i.ready & ~waiting_valid & ~halted)
        m.d.comb += [
            issue.enable.eq(~halted),
            issue.i.valid.eq(take),
            issue.i.payload.region.eq(self.region),
            *(issue.i.payload[name].eq(command[name]) for name in DRAM_FIELDS),
            words.i.valid.eq(waiting_valid),
            words.i.payload.eq(waiting),
        ]
        next_target = Mux(words.i.ready & waiting_valid, waiting_target, target)
        m.d.sync += target.eq(next_target)
        with m.If(words.i.ready):
            m.d.sync += waiting_valid.eq(0)
        with m.If(take):
            word_log2 = ceil_log2(arch.word_bytes)
            m.d.sync += [
                waiting_valid.eq(1),
                waiting_target.eq(command.target),
                *(waiting[n].eq(command[n]) for n in ("local_addr", "local_step1", "local_step2", *words.counts)),
                waiting.lane.eq(self.region.base[word_log2:] + command.dram_addr),
                waiting.lane_step1.eq(command.dram_step1),
                waiting.lane_step2.eq(command.dram_step2),
            ]

        # AR
        m.d.comb += [
            *address_constants(bus, "ar", arch),
            bus.araddr.eq(issue.a_addr),
            bus.arlen.eq(issue.a_len),
            bus.arvalid.eq(issue.a_valid),
            issue.a_ready.eq(bus.arready),
            self.idle.eq(issue.idle),
        ]
        m.d.sync += issue.finished_stb.eq(bus.rvalid & bus.rready & bus.rlast)

        # R: beats to words (to whole beats where the bus is wider). What takes one reaches a counter of the queue, not
        # all bits of a register. Behind one with an error no other enters.
        m.submodules.items = items = Queue(shape=max(arch.bus_bits, arch.word_bits), depth=2)
        error, complete, failed = Signal(), Signal(), Signal()
        m.d.comb += [bus.rready.eq(items.i.ready), items.i.valid.eq(bus.rvalid & complete & ~error & ~failed)]
        m.d.sync += failed.eq(failed | (bus.rvalid & bus.rready & complete & error))
        if arch.beats_per_word == 1:
            m.d.comb += [complete.eq(1), items.i.payload.eq(bus.rdata), error.eq(is_error(bus.rresp))]
        else:
            beat = Signal(range(arch.beats_per_word))
            early_beats = Signal(arch.word_bits - arch.bus_bits, reset_less=True)
            early_error = Signal()
            m.d.comb += [
                complete.eq(beat == arch.beats_per_word - 1),
                items.i.payload.eq(Cat(early_beats, bus.rdata)),
                error.eq(is_error(bus.rresp) | early_error),
            ]
            with m.If(bus.rvalid & bus.rready):
                m.d.sync += [
                    beat.eq(beat + 1),
                    early_beats.eq(Cat(early_beats, bus.rdata)[arch.bus_bits :]),
                    early_error.eq(error & ~complete),
                ]

        # Words to the buffers.
        lane = words.o.payload.lane
        word = items.o.payload.word_select(lane, arch.word_bits) if len(lane) else items.o.payload
        usable, written, may_write = Signal(), Signal(), Signal()
        m.d.comb += [
            usable.eq(items.o.valid & words.o.valid & ~halted),
            written.eq(
                items.o.valid
                & words.o.valid
                & may_write
                & ((target == int(LoadTarget.ACTIVATIONS)) | self.weights.ready)
            ),
            items.o.ready.eq(written | halted),
            words.o.ready.eq(written),
        ]
        for port, number in ((self.act, LoadTarget.ACTIVATIONS), (self.weights, LoadTarget.WEIGHTS)):
            m.d.comb += [
                port.addr.eq(words.o.payload.addr),
                port.data.eq(word),
                port.mask.eq(~0),
                port.valid.eq(usable & (target == number)),
            ]

        # What the rest of the core sees.
        done, error_stb, cause, stall = Signal(), Signal(), Signal(8, reset_less=True), Signal()
        refused, bad_data = Signal(), Signal()
        # The activation buffer takes a word, and no error keeps it back. Known a cycle ahead where the other writer
        # says so: it is far away.
        to_activations = int(LoadTarget.ACTIVATIONS)
        if arch.act_memory == "dual":
            halts = halted | self.stop | refused
            m.d.sync += may_write.eq(~halts & ((next_target != to_activations) | self.act_ready_next))
        else:
            m.d.comb += may_write.eq(~halted & ((target != to_activations) | self.act.ready))
        m.d.comb += [
            refused.eq(issue.refused & ~items.o.valid & ~halted),
            bad_data.eq(failed & ~items.o.valid & words.o.valid & ~halted),
            self.busy.eq(waiting_valid | words.o.valid),
            self.done_stb.eq(done),
            self.error_stb.eq(error_stb),
            self.error_cause.eq(cause),
            self.stall_bus_stb.eq(stall),
        ]
        m.d.sync += [
            done.eq(written & words.o.payload.last),
            error_stb.eq(refused | bad_data),
            cause.eq(Mux(bad_data, ErrorCause.BUS_READ, ErrorCause.REGION)),
            stall.eq(self.busy & ~(bus.rvalid & complete & bus.rready)),
        ]
        with m.If(refused | bad_data):
            m.d.sync += halted.eq(1)
        return m
