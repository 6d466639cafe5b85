"""Control of a core without queues: one instruction after the other, each from fetch to its end."""

from typing import Any

from amaranth import Cat, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import INSTRUCTION_BITS, INSTRUCTION_BYTES, REGIONS, Engine, Opcode
from nibblecore.arch.regs import ErrorCause, ErrorUnit

from ..layouts import INDEX_BITS, axi_lite_signature, axi_read_signature, instruction_layout, region_layout
from .control import DMA_ENGINES, connect_counters, connect_registers, engine_signature, stalls_layout
from .csr import Csr
from .decode import Decoder
from .fetch import check_arguments
from .semaphores import Semaphores
from .supervisor import Supervisor


class Sequencer(wiring.Component):
    """Fetch an instruction, have it run, fetch the next one.

    Cycles, with ``n = 256 / bus_bits`` beats per instruction: the request is on the bus 2 cycles after ``start_stb``
    or 3 after ``done_stb``; ``offer`` rises 3 cycles after the last beat, for a DMA engine 4. Where the program does
    not begin at a multiple of 32 bytes, every instruction takes a second burst.

    Parameters
    ----------
    arch : ArchConfig
        For ``bus_bits`` and ``addr_bits``.
    axi_id : int
        ID of every transaction.
    id_bits : int
        Width of the bus's IDs.

    Members
    -------
    axi : Out(axi_read_signature(arch))
        AXI4 read master; incrementing bursts of normal, non-cacheable memory. ``rready`` is always high.
    start_stb : In(1)
        Begin with instruction 0 of region 0.
    stop : In(1)
        Request and start nothing further.
    idle : Out(1)
        No bus transaction is in flight.
    ended : Out(1)
        END was reached; until the next start.
    word : Out(256)
        The instruction; stays from ``offer`` to ``done_stb``.
    index : Out(24)
        Its number.
    region_en, region_number : Out(1), Out(3)
        To the registers: look that region up, of the program or of the instruction of a DMA engine.
    region : In(region_layout())
        It, from the next cycle to the next ``region_en``.
    target : Out(4)
        One-hot: whose instruction it is.
    missing : In(1)
        A semaphore that the instruction waits for is 0.
    blocked : In(1)
        A semaphore that it signals is full.
    waiting, executing, ending : Out(1)
        It is known and has not been started; it has been started; it has ended and wants to signal.
    offer : Out(1)
        To the engine: its ``command.valid``.
    accepted : In(1)
        The engine has taken it.
    done_stb : In(1)
        The engine has finished it.
    take_stb, signal_stb : Out(1)
        Take what it waits for; signal.
    error_stb, error_cause : Out(1), Out(8)
        One pulse for what is no instruction: see :class:`nibblecore_hw.ctrl.fetch.Fetch`.
    """

    axi: Any
    start_stb: Signal
    stop: Signal
    idle: Signal
    ended: Signal
    word: Signal
    index: Signal
    region: Any
    region_en: Signal
    region_number: Signal
    target: Signal
    missing: Signal
    blocked: Signal
    waiting: Signal
    executing: Signal
    ending: Signal
    offer: Signal
    accepted: Signal
    done_stb: Signal
    take_stb: Signal
    signal_stb: Signal
    error_stb: Signal
    error_cause: Signal

    def __init__(self, *, arch: ArchConfig, axi_id: int = 0, id_bits: int = 1) -> None:
        self._arch = arch
        self._axi_id = axi_id
        super().__init__(
            {
                "axi": Out(axi_read_signature(arch, id_bits=id_bits)),
                "start_stb": In(1),
                "stop": In(1),
                "idle": Out(1),
                "ended": Out(1),
                "word": Out(INSTRUCTION_BITS),
                "index": Out(INDEX_BITS),
                "region": In(region_layout()),
                "region_en": Out(1),
                "region_number": Out(range(REGIONS)),
                "target": Out(len(Engine)),
                "missing": In(1),
                "blocked": In(1),
                "waiting": Out(1),
                "executing": Out(1),
                "ending": Out(1),
                "offer": Out(1),
                "accepted": In(1),
                "done_stb": In(1),
                "take_stb": Out(1),
                "signal_stb": Out(1),
                "error_stb": Out(1),
                "error_cause": Out(8),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        arch, axi = self._arch, self.axi
        m.submodules.decoder = decoder = Decoder()
        word = Signal(INSTRUCTION_BITS, reset_less=True)
        bad = Signal()  # a beat of it came with an error
        m.d.comb += [decoder.word.eq(word), self.word.eq(word)]
        m.d.comb += [self.target[int(e)].eq(decoder.engine == int(e)) for e in Engine]

        # A region: that of the program, or of the instruction.
        of_program = Signal(init=1)
        with m.If(~of_program):
            for e in DMA_ENGINES:
                with m.If(self.target[int(e)]):
                    m.d.comb += self.region_number.eq(instruction_layout(Opcode[e.name])(word).region)

        # An instruction comes in one burst, or in two where it lies across a multiple of its size.
        beat_log2 = (arch.bus_bytes - 1).bit_length()
        size_log2 = (INSTRUCTION_BYTES - 1).bit_length()
        last_beat = INSTRUCTION_BYTES // arch.bus_bytes - 1
        second = Signal()
        in_flight = Signal()  # from the cycle after the address was raised to the last beat
        place = self.region.base[beat_log2:size_log2]
        block = Signal(33 - size_log2)
        outside: Value | int = block[arch.addr_bits - size_log2 :].any() if arch.addr_bits <= 32 else 0
        exhausted = Signal()
        m.d.comb += [
            block.eq(self.region.base[size_log2:] + self.index + second),
            exhausted.eq((self.index >= self.region.size[size_log2:]) | self.index.all() | outside),
            axi.arlen.eq(Mux(second, place - 1, last_beat - place)[: len(place)]),
            axi.arid.eq(self._axi_id),
            axi.arsize.eq(beat_log2),
            axi.arburst.eq(0b01),  # incrementing
            axi.arcache.eq(0b0011),  # normal memory, not cacheable, bufferable
            axi.rready.eq(1),
            self.idle.eq(~in_flight),
        ]
        m.d.comb += axi.araddr.eq(Cat((Mux(second, 0, place) << beat_log2)[:size_log2], block))
        with m.If(axi.rvalid):
            # First beat in the low bits: beats enter at the top and move down.
            m.d.sync += [word.eq(Cat(word, axi.rdata)[arch.bus_bits :]), bad.eq(bad | axi.rresp[1])]

        def fail(cause: ErrorCause) -> None:
            m.d.sync += [self.error_stb.eq(1), self.error_cause.eq(int(cause))]
            m.next = "STOPPED"

        m.d.sync += self.error_stb.eq(0)
        with m.FSM(name="sequence"):
            with m.State("STOPPED"), m.If(self.start_stb):
                m.d.sync += [self.index.eq(0), self.ended.eq(0), of_program.eq(1)]
                m.next = "REGION"
            with m.State("REGION"):
                m.d.comb += self.region_en.eq(1)
                m.d.sync += [second.eq(0), bad.eq(0)]
                with m.If(of_program):
                    m.next = "REQUEST"
                with m.Else():
                    m.next = "WAIT"
            with m.State("REQUEST"):
                with m.If(in_flight | ~(self.stop | exhausted)):
                    m.d.comb += axi.arvalid.eq(1)
                    m.d.sync += in_flight.eq(1)
                    with m.If(axi.arready):
                        m.next = "BEATS"
                with m.Elif(self.stop):
                    m.next = "STOPPED"
                with m.Else():
                    fail(ErrorCause.REGION)
            with m.State("BEATS"), m.If(axi.rvalid & axi.rlast):
                m.d.sync += [in_flight.eq(0), second.eq(1)]
                with m.If(~second & (place != 0)):
                    m.next = "REQUEST"
                with m.Else():
                    m.next = "JUDGE"
            with m.State("JUDGE"):
                with m.If(self.stop):
                    m.next = "STOPPED"
                with m.Elif(bad):
                    fail(ErrorCause.BUS_READ)
                with m.Elif(~decoder.legal):
                    fail(ErrorCause.ILLEGAL_INSTRUCTION)
                with m.Elif(decoder.end):
                    m.d.sync += self.ended.eq(1)
                    m.next = "STOPPED"
                with m.Elif(Cat(self.target[int(e)] for e in DMA_ENGINES).any()):
                    m.d.sync += of_program.eq(0)
                    m.next = "REGION"
                with m.Else():
                    m.next = "WAIT"
            with m.State("WAIT"):
                m.d.comb += self.waiting.eq(1)
                with m.If(self.stop):
                    m.next = "STOPPED"
                with m.Elif(~self.missing):
                    m.d.comb += self.take_stb.eq(1)
                    m.d.sync += self.offer.eq(1)
                    m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += self.executing.eq(1)
                with m.If(self.accepted):
                    m.d.sync += self.offer.eq(0)
                with m.If(self.done_stb):
                    m.next = "SIGNAL"
            with m.State("SIGNAL"):
                m.d.comb += [self.executing.eq(1), self.ending.eq(1)]
                with m.If(self.stop):
                    m.next = "STOPPED"
                with m.Elif(~self.blocked):
                    m.d.comb += self.signal_stb.eq(1)
                    m.d.sync += [self.index.eq(self.index + 1), of_program.eq(1)]
                    m.next = "REGION"
        return m


class SequentialControl(wiring.Component):
    """What :class:`nibblecore_hw.ctrl.control.Control` is to its neighbours, where ``queue_depth`` is 0.

    Instructions run one at a time, in the order of the program, so that the register into which fetch reads is the only
    place for them: no queues, no memory of instructions, no issue stages. An instruction that waits for a semaphore
    which nothing before it has signalled, or signals one that is full, waits for ever; the linter refuses such
    programs, and the watchdog stops them. The payload of every engine's ``command`` is that register, which stays from
    ``valid`` to ``done_stb``, and so does ``region``: engines may look at both all that time.

    Cycles: see :class:`Sequencer`. The last cycle that counts is 2 cycles after END has been read; ``irq`` follows 2
    cycles later. A program has less than 2**24 instructions: one of that index is outside of any region.

    Parameters
    ----------
    arch : ArchConfig
        The core; its ``queue_depth`` is 0.
    axi_id, id_bits : int
        ID of fetch's transactions, and the width of IDs.

    Members
    -------
    As those of :class:`nibblecore_hw.ctrl.control.Control`.

    Raises
    ------
    TypeError, ValueError
        As :class:`nibblecore_hw.ctrl.control.Control`.
    """

    s_axil: Any
    m_axi: Any
    load: Any
    mac: Any
    post: Any
    store: Any
    stalls: Any
    progress: Signal
    stop: Signal
    core_reset: Signal
    running: Signal
    irq: Signal

    def __init__(self, *, arch: ArchConfig, axi_id: int = 0, id_bits: int = 1) -> None:
        check_arguments(arch=arch, axi_id=axi_id, id_bits=id_bits)
        self._arch = arch
        self._axi_id = axi_id
        self._id_bits = id_bits
        super().__init__(
            {
                "s_axil": Out(axi_lite_signature()),
                "m_axi": Out(axi_read_signature(arch, id_bits=id_bits)),
                **{e.name.lower(): Out(engine_signature(e)) for e in Engine},
                "stalls": In(stalls_layout()),
                "progress": In(1),
                "stop": Out(1),
                "core_reset": Out(1),
                "running": Out(1),
                "irq": Out(1),
            }
        )

    def engine(self, engine: Engine) -> Any:
        """The port of ``engine``."""
        return getattr(self, engine.name.lower())

    def elaborate(self, platform: object) -> Module:
        m = Module()
        arch = self._arch
        csr, supervisor = Csr(arch=arch), Supervisor()
        sequencer = Sequencer(arch=arch, axi_id=self._axi_id, id_bits=self._id_bits)
        semaphores = Semaphores(bits=arch.semaphore_bits)
        m.submodules.csr = csr
        m.submodules.supervisor = supervisor
        m.submodules.sequencer = ResetInserter(supervisor.core_reset)(sequencer)
        m.submodules.semaphores = ResetInserter(supervisor.core_reset | supervisor.start_stb)(semaphores)
        connect(m, csr.s_axil, flipped(self.s_axil))
        connect(m, sequencer.axi, flipped(self.m_axi))
        connect_registers(m, csr, supervisor)
        header = instruction_layout(Opcode.END)(sequencer.word)

        idle, quiet, moves = [sequencer.idle], [sequencer.ended], [self.progress, self.m_axi.rvalid]
        missing, held = Signal(len(Engine)), Signal(len(Engine))
        accepted, done = [], []
        for e in Engine:
            port, n = self.engine(e), int(e)
            mine = sequencer.target[n]
            accepted.append(port.command.valid & port.command.ready)
            done.append(port.done_stb)
            quiet.append(~port.busy)
            m.d.comb += [
                port.command.payload.eq(sequencer.word),
                port.command.valid.eq(sequencer.offer & mine),
                semaphores.take[n].eq(Mux(sequencer.take_stb & mine, header.wait, 0)),
                semaphores.signal[n].eq(Mux(sequencer.signal_stb & mine, header.signal, 0)),
            ]
            with m.If(mine):
                m.d.comb += [
                    missing.eq(header.wait & ~semaphores.available[n]),
                    held.eq(header.signal & semaphores.full[n]),
                ]
            m.d.sync += [
                supervisor.executing[n].eq(sequencer.executing & mine),
                supervisor.waits[n].eq(
                    Mux(mine & sequencer.waiting, missing, 0) | Mux(mine & sequencer.ending, held, 0)
                ),
            ]
            if e in DMA_ENGINES:
                idle.append(port.idle)
                m.d.comb += [
                    port.region.eq(csr.region),
                    supervisor.error_stb[n].eq(port.error_stb),
                    supervisor.error_cause[n].eq(port.error_cause),
                ]
        fetch = int(ErrorUnit.FETCH)
        m.d.comb += [
            csr.region_en.eq(sequencer.region_en),
            csr.region_number.eq(sequencer.region_number),
            sequencer.region.eq(csr.region),
            sequencer.start_stb.eq(supervisor.start_stb),
            sequencer.stop.eq(supervisor.stop),
            sequencer.missing.eq(missing.any()),
            sequencer.blocked.eq(held.any()),
            sequencer.accepted.eq(Cat(accepted).any()),
            sequencer.done_stb.eq(Cat(done).any()),
            supervisor.error_stb[fetch].eq(sequencer.error_stb),
            supervisor.error_cause[fetch].eq(sequencer.error_cause),
            # Whoever met an error, this is the instruction.
            supervisor.fetch_index.eq(sequencer.index),
            supervisor.index.eq(sequencer.index),
            supervisor.index_stb.eq(1),
            supervisor.idle.eq(Cat(idle).all()),
            self.stop.eq(supervisor.stop),
            self.core_reset.eq(supervisor.core_reset),
            self.running.eq(supervisor.running),
            self.irq.eq(supervisor.irq),
        ]
        # Registers, as these collect from all over the core; `finished` must not outlive the program it belongs to.
        m.d.sync += [
            supervisor.progress.eq(Cat(*moves, *accepted, *done).any()),
            supervisor.finished.eq(supervisor.running & Cat(*quiet, *idle).all()),
        ]
        if arch.counters:
            waits = {e: sequencer.target[int(e)] & (missing.any() & sequencer.waiting) for e in Engine}
            connect_counters(m, csr, supervisor, self.stalls, {e: (self.engine(e).busy, waits[e]) for e in Engine})
        return m
