"""LOAD and STORE of a core that runs one instruction at a time: one walk, one burst at a time, for both."""

from typing import Any

from amaranth import Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import INSTRUCTIONS, LoadTarget, Opcode
from nibblecore.arch.regs import ErrorCause

from ..layouts import (
    SEQUENTIAL_READ_LATENCY,
    axi_read_signature,
    axi_write_signature,
    command_signature,
    instruction_layout,
    read_port,
    region_layout,
    write_port,
)
from .axi import address_constants, is_error
from .walk import burst_words

__all__ = ["SequentialDma"]


class SequentialDma(wiring.Component):
    """Execute LOAD and STORE instructions, of which there is never more than one.

    A word is a beat. The walk is that of :class:`nibblecore_hw.dma.walk.BurstWalk` and
    :class:`nibblecore_hw.dma.walk.WordWalk` in one: a burst ends with its row or before a multiple of
    ``arch.burst_beats`` beats, so that none crosses 4 KiB, and is checked against the region before it is sent. Nothing
    is copied: the instruction and its region have to stay from ``valid`` to ``done_stb``.

    Cycles: the first address is valid 2 cycles after the one in which a command transfers. A burst takes a cycle for
    its address, those of the bus, and 2 more before the next address. A word is written to its buffer in the cycle in
    which its beat is taken; a word that is stored takes ``SEQUENTIAL_READ_LATENCY + 2`` cycles. ``done_stb``
    comes 2 cycles after the last beat of a LOAD or the last response of a STORE.

    After an error, or once ``stop`` has been seen, no burst is started and nothing is written: R beats are dropped, W
    beats that are still due write nothing (WSTRB = 0; one that is being offered stays as it is). Only a reset leads out
    of that, and must not come before ``idle``.

    Parameters
    ----------
    arch : ArchConfig
        ``queue_depth`` is 0, and so a beat of the bus as wide as a word.

    Members
    -------
    load, store : In(command_signature())
        LOAD and STORE instructions.
    region : In(region_layout())
        The region of the instruction.
    act, weights : Out(write_port(...))
        To the buffers.
    act_read : Out(read_port(...))
        From the activation buffer.
    read_bus, write_bus : Out(axi_read_signature(arch)), Out(axi_write_signature(arch))
    done_stb : Out(2)
        A LOAD, a STORE has finished.
    busy : Out(2)
        A LOAD, a STORE is being executed.
    stop : In(1)
    idle : Out(1)
        No burst is in flight, and no address waits for the bus.
    error_stb, error_cause : Out(2), Out(8)
        As :class:`nibblecore_hw.dma.load.LoadDma` and :class:`nibblecore_hw.dma.store.StoreDma` say it.
    stall_bus_stb : Out(2)
        For LOAD_BUS and STORE_BUS.
    """

    load: Any
    store: Any
    region: Any
    act: Any
    weights: Any
    act_read: Any
    read_bus: Any
    write_bus: Any
    done_stb: Signal
    busy: Signal
    stop: Signal
    idle: Signal
    error_stb: Signal
    error_cause: Signal
    stall_bus_stb: Signal

    def __init__(self, *, arch: ArchConfig) -> None:
        self.arch = arch
        act_bits, weight_bits = ceil_log2(arch.act_depth), ceil_log2(arch.weight_depth)
        super().__init__(
            {
                "load": In(command_signature()),
                "store": In(command_signature()),
                "region": In(region_layout()),
                "act": Out(write_port(addr_bits=act_bits, word_bits=arch.word_bits, parts=arch.parts_per_brick)),
                "weights": Out(write_port(addr_bits=weight_bits, word_bits=arch.word_bits, parts=1)),
                "act_read": Out(read_port(addr_bits=act_bits, word_bits=arch.word_bits)),
                "read_bus": Out(axi_read_signature(arch)),
                "write_bus": Out(axi_write_signature(arch)),
                "done_stb": Out(2),
                "busy": Out(2),
                "stop": In(1),
                "idle": Out(1),
                "error_stb": Out(2),
                "error_cause": Out(8),
                "stall_bus_stb": Out(2),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        arch = self.arch
        r, w = self.read_bus, self.write_bus
        # Both instructions have these fields at the same places.
        fields = data.View(instruction_layout(Opcode.LOAD), self.load.payload)
        layouts = [INSTRUCTIONS[o].layout() for o in (Opcode.LOAD, Opcode.STORE)]
        assert all(layouts[0][name] == place for name, place in layouts[1].items() if name != "opcode")
        is_store = Signal()
        m.d.comb += is_store.eq(fields.opcode == int(Opcode.STORE))
        halted, stopped = Signal(), Signal()
        m.d.comb += stopped.eq(halted | self.stop)

        # Where it is, in DRAM and in the buffer: the word at hand, the beginning of its row and of its plane. DRAM
        # addresses count words of the region; what is beyond the address space is only remembered as being so.
        dram_bits = arch.addr_bits - ceil_log2(arch.word_bytes)
        local_bits = ceil_log2(max(arch.act_depth, arch.weight_depth))
        ends_row, ends_plane, ends = Signal(), Signal(), Signal()
        first_stb, word_stb, step_stb = Signal(), Signal(), Signal()
        counts = [Signal(len(fields[n]), name=f"left_{n}", reset_less=True) for n in ("count0", "count1", "count2")]
        row_is_over = Signal(reset_less=True)
        m.d.comb += [ends_row.eq(counts[0] == 0), ends_plane.eq(counts[1] == 0), ends.eq(counts[2] == 0)]
        next_row = step_stb & ~ends_plane
        next_plane = step_stb & ends_plane

        def place(name: str, bits: int, start: Any, step1: Any, step2: Any, *, sticky: bool) -> Signal:
            here, row, plane = (
                Signal(bits + sticky, name=f"{name}_{n}", reset_less=True) for n in ("here", "row", "plane")
            )
            base, more, total = Signal(bits + sticky), Signal(start.shape()), Signal(bits + sticky)
            m.d.comb += [
                base.eq(Mux(first_stb, 0, Mux(step_stb, Mux(ends_plane, plane, row), here))),
                more.eq(Mux(first_stb, start, Mux(step_stb, Mux(ends_plane, step2, step1), 0))),
            ]
            added = (base[:bits] + more[:bits] + word_stb)[: bits + 1]
            m.d.comb += total.eq(added[: bits + sticky])
            if sticky:
                m.d.comb += total[bits].eq(added[bits] | base[bits] | more[bits:].any())
            with m.If(first_stb | step_stb | word_stb):
                m.d.sync += here.eq(total)
            with m.If(first_stb | step_stb):
                m.d.sync += row.eq(total)
            with m.If(first_stb | next_plane):
                m.d.sync += plane.eq(total)
            return here

        dram = place("dram", dram_bits, fields.dram_addr, fields.dram_step1, fields.dram_step2, sticky=True)
        local = place(
            "local", local_bits, fields.local_addr, fields.local_step1.as_unsigned(), fields.local_step2.as_unsigned(),
            sticky=False,
        )  # fmt: skip
        with m.If(word_stb):
            m.d.sync += [counts[0].eq(counts[0] - 1), row_is_over.eq(ends_row)]
        with m.If(first_stb | step_stb):
            m.d.sync += counts[0].eq(fields.count0)
        with m.If(next_row):
            m.d.sync += counts[1].eq(counts[1] - 1)
        with m.If(first_stb | next_plane):
            m.d.sync += counts[1].eq(fields.count1)
        with m.If(next_plane):
            m.d.sync += counts[2].eq(counts[2] - 1)
        with m.If(first_stb):
            m.d.sync += counts[2].eq(fields.count2)

        # The next burst: to the end of its block or of its row.
        word_log2 = ceil_log2(arch.word_bytes)
        burst_bits = ceil_log2(burst_words(arch))
        address, left = Signal(dram_bits + 1), Signal(dram_bits + 1)
        base, size = self.region.base[word_log2:], self.region.size[word_log2:]
        length_m1, allowed = Signal(burst_bits), Signal()
        in_row, to_block = counts[0], ~address[:burst_bits]
        m.d.comb += [
            address.eq(base[:dram_bits] + dram[:dram_bits]),
            length_m1.eq(Mux(in_row[burst_bits:].any() | (in_row[:burst_bits] > to_block), to_block, in_row)),
            left.eq(size[:dram_bits] - dram[:dram_bits]),
            # It begins below the region's end and in the address space, and there are as many words as it takes.
            allowed.eq(
                ~dram[-1]
                & ~address[-1]
                & ~base[dram_bits:].any()
                & ~self.region.base[:word_log2].any()
                & (size[dram_bits:].any() | (~left[-1] & (left[burst_bits:].any() | (left[:burst_bits] > length_m1))))
            ),
        ]
        beats = Signal(burst_bits, reset_less=True)  # still to come, minus 1
        last_beat = Signal()
        m.d.comb += [
            last_beat.eq(beats == 0),
            *address_constants(r, "ar", arch),
            *address_constants(w, "aw", arch),
            r.araddr.eq(address[:dram_bits] << word_log2),
            w.awaddr.eq(address[:dram_bits] << word_log2),
            r.arlen.eq(length_m1),
            w.awlen.eq(length_m1),
        ]

        # Words to the buffers, and from there.
        writes = Signal()
        to_weights = fields.target == LoadTarget.WEIGHTS
        for port, mine in ((self.act, ~to_weights), (self.weights, to_weights)):
            m.d.comb += [
                port.addr.eq(local),
                port.data.eq(r.rdata),
                port.mask.eq(~0),
                port.valid.eq(writes & mine),
            ]
        wdata, enabled = Signal(arch.bus_bits, reset_less=True), Signal(reset_less=True)
        ready = Mux(to_weights, self.weights.ready, self.act.ready)
        m.d.comb += [
            self.act_read.addr.eq(local),
            w.wdata.eq(wdata),
            w.wlast.eq(last_beat),
            w.wstrb.eq(enabled.replicate(len(w.wstrb))),
        ]
        arriving = Signal(SEQUENTIAL_READ_LATENCY)

        done, error = Signal(), Signal()
        cause = Signal(8, reset_less=True)
        m.d.comb += self.error_cause.eq(cause)
        active = Signal()

        def fail(why: Any) -> None:
            m.d.sync += [error.eq(1), cause.eq(why), halted.eq(1)]

        m.d.sync += [done.eq(0), error.eq(0)]
        m.d.comb += active.eq(1)
        with m.FSM(name="dma_state"):
            with m.State("IDLE"):
                m.d.comb += [
                    active.eq(0),
                    self.idle.eq(1),
                    self.load.ready.eq(~stopped),
                    self.store.ready.eq(~stopped),
                ]
                with m.If((self.load.valid | self.store.valid) & ~stopped):
                    m.d.comb += first_stb.eq(1)
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.d.comb += self.idle.eq(1)
                m.d.sync += beats.eq(length_m1)
                with m.If(stopped):
                    m.next = "STOPPED"
                with m.Elif(~allowed):
                    fail(ErrorCause.REGION)
                    m.next = "STOPPED"
                with m.Else():
                    m.next = "ADDRESS"
            with m.State("ADDRESS"):
                m.d.comb += [r.arvalid.eq(~is_store), w.awvalid.eq(is_store)]
                with m.If(Mux(is_store, w.awready, r.arready)):
                    m.next = "READ"
                    with m.If(~is_store):
                        m.next = "RECEIVE"
            with m.State("RECEIVE"):
                bad = is_error(r.rresp)
                m.d.comb += [
                    writes.eq(r.rvalid & ~bad & ~stopped),
                    r.rready.eq(ready | bad | stopped),
                    word_stb.eq(r.rvalid & r.rready),
                ]
                with m.If(word_stb):
                    m.d.sync += beats.eq(beats - 1)
                    with m.If(bad & ~stopped):
                        fail(ErrorCause.BUS_READ)
                    with m.If(last_beat):
                        m.next = "NEXT"
            with m.State("READ"):
                # Once stopped, a beat needs no word.
                m.d.comb += self.act_read.valid.eq(~stopped)
                m.d.sync += [arriving.eq(1), enabled.eq(~stopped)]
                with m.If(self.act_read.ready | stopped):
                    m.next = "ARRIVE"
            with m.State("ARRIVE"):
                m.d.sync += arriving.eq(arriving << 1)
                with m.If(arriving[-1]):
                    m.d.sync += wdata.eq(self.act_read.data)
                    m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += [w.wvalid.eq(1), word_stb.eq(w.wready)]
                with m.If(w.wready):
                    m.d.sync += beats.eq(beats - 1)
                    m.next = "READ"
                    with m.If(last_beat):
                        m.next = "RESPONSE"
            with m.State("RESPONSE"):
                m.d.comb += w.bready.eq(1)
                with m.If(w.bvalid):
                    m.next = "NEXT"
                    with m.If(is_error(w.bresp) & ~stopped):
                        fail(ErrorCause.BUS_WRITE)
            with m.State("NEXT"):
                m.d.comb += self.idle.eq(1)
                with m.If(stopped):
                    m.next = "STOPPED"
                with m.Elif(~row_is_over):
                    m.next = "CHECK"
                with m.Elif(ends_plane & ends):
                    m.d.sync += done.eq(1)
                    m.next = "IDLE"
                with m.Else():
                    m.d.comb += step_stb.eq(1)
                    m.next = "CHECK"
            with m.State("STOPPED"):
                m.d.comb += self.idle.eq(1)
        for n, mine in enumerate((~is_store, is_store)):
            m.d.comb += [
                self.done_stb[n].eq(done & mine),
                self.error_stb[n].eq(error & mine),
                self.busy[n].eq(active & mine),
                self.stall_bus_stb[n].eq(active & mine & ~word_stb),
            ]
        return m
