"""Control: everything that decides when which engine does what."""

from typing import Any

from amaranth import Cat, Module, ResetInserter, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, Signature, connect, flipped

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import INSTRUCTIONS, Engine, Opcode
from nibblecore.arch.regs import Counter, ErrorUnit, field

from ..layouts import axi_lite_signature, axi_read_signature, command_signature, region_layout
from ..technology import check_technology
from .counters import Counters
from .csr import Csr
from .fetch import Fetch, check_arguments
from .instructions import InstructionMemory
from .issue import IssueStage
from .regions import RegionLookup
from .semaphores import Semaphores
from .supervisor import Supervisor

DMA_ENGINES = (Engine.LOAD, Engine.STORE)


def engine_signature(engine: Engine) -> Signature:
    """Control's side of an engine.

    ======================== ========================================================================================
    ``command``              a transfer starts one instruction; its semaphores have been waited for
    ``done_stb``             one pulse per finished instruction, in order, at least one cycle after its transfer
    ``busy``                 an instruction is being executed
    ``region``               (DMA) base and size of the region that the instruction on ``command`` names
    ``idle``                 (DMA) no bus transaction is in flight, nor a request waiting for the bus
    ``error_stb``            (DMA) the oldest unfinished instruction met an error
    ``error_cause``          (DMA) with it: a :class:`nibblecore.arch.regs.ErrorCause`
    ======================== ========================================================================================
    """
    members = {"command": Out(command_signature()), "done_stb": In(1), "busy": In(1)}
    if engine in DMA_ENGINES:
        members |= {"region": Out(region_layout()), "idle": In(1), "error_stb": In(1), "error_cause": In(8)}
    return Signature(members)


def _is_stall(counter: Counter) -> bool:
    return counter is not Counter.TOTAL and not counter.name.endswith(("_BUSY", "_SEMAPHORE"))


def stalls_layout() -> data.StructLayout:
    """The counters' events that only the engines know: one bit per such :class:`Counter`, by its name in lower case."""
    return data.StructLayout({c.name.lower(): 1 for c in Counter if _is_stall(c)})


def connect_registers(m: Module, csr: Csr, supervisor: Supervisor) -> None:
    """Registers to and from the supervisor."""
    m.d.comb += [
        supervisor.start.eq(csr.control_ones[field("CONTROL", "start").low]),
        supervisor.reset.eq(csr.control_ones[field("CONTROL", "reset").low]),
        supervisor.watchdog.eq(csr.watchdog),
        supervisor.watchdog_stb.eq(csr.watchdog_stb),
        supervisor.irq_enable.eq(csr.irq_enable[field("IRQ_ENABLE", "enable").low]),
        supervisor.irq_status_ones.eq(csr.irq_status_ones),
        csr.status.eq(supervisor.status),
        csr.irq_status.eq(supervisor.irq_status),
        csr.error.eq(supervisor.error),
        csr.error_index.eq(supervisor.error_index_kept),
        csr.error_waits.eq(supervisor.error_waits),
    ]


def connect_counters(
    m: Module, csr: Csr, supervisor: Supervisor, stalls: Any, engines: dict[Engine, tuple[Value, Value]]
) -> None:
    """The counters and their events; ``engines`` are busy and wait for a semaphore."""
    m.submodules.counters = counters = Counters()
    events: dict[str, Any] = {"total": 1}
    events |= {name: stalls[name] for name in stalls_layout().members}
    for engine, (busy, waits) in engines.items():
        name = engine.name.lower()
        events[f"{name}_busy"] = busy
        events[f"{name}_semaphore"] = ~busy & waits
    for name, event in events.items():
        # Registers, as some of these are the end of a long path.
        m.d.sync += counters.events[name].eq(supervisor.running & event)
    m.d.sync += counters.clear_stb.eq(supervisor.start_stb | supervisor.core_reset)
    m.d.comb += [
        csr.slot.eq(counters.slot),
        csr.count.eq(counters.value),
    ]


class Control(wiring.Component):
    """Fetch, four issue stages with their semaphores, registers, counters, errors and reset.

    A program is done when END has been fetched, all queues are empty, no engine is busy and no bus transaction is in
    flight. At a start all semaphores are 0, whatever the program before has left in them.

    After an error no instruction is offered any more, except one that an engine has been offered but has not accepted
    yet: streams never withdraw. Every engine can count on ``core_reset`` before the next program.

    Cycles: TOTAL counts from the cycle after ``start``; the first request is then 2 cycles away. An instruction has
    ``n = max(1, 256 / bus_bits)`` beats, of which its engine looks at ``k``
    (:func:`nibblecore_hw.ctrl.instructions.beats_of`). Fetch offers the first one to its queue ``n + 4`` cycles after
    its first beat has arrived. An instruction that waits for nothing is offered to its engine ``max(6, k + 4)`` cycles
    after that, or after the one before was accepted, and one more for DMA engines where k is below 3; the beats of
    another engine's instruction that are being read come on top. One that waits for an instruction of another engine is
    offered 2 cycles after that one's ``done_stb``.
    The last cycle that counts is 2 cycles after the last ``done_stb``; ``irq`` follows 2 cycles later.

    Parameters
    ----------
    arch : ArchConfig
        The core.
    axi_id, id_bits : int
        ID of fetch's transactions, and the width of IDs.
    technology : {"generic", "ecp5"}
        Primitives that may be instantiated.

    Members
    -------
    s_axil : Out(axi_lite_signature())
        The host's port to the registers (the signature is written from the slave's side).
    m_axi : Out(axi_read_signature(arch))
        Fetch's read port. ``rready`` is always high.
    load, mac, post, store : Out(engine_signature(engine))
        The engines.
    stalls : In(stalls_layout())
        Events that the engines count.
    progress : In(1)
        A DMA has moved a beat, or a pixel has entered or left an engine. (Control sees starts and ends by itself.)
    stop : Out(1)
        To the DMAs: start no bus transaction.
    core_reset : Out(1)
        One cycle, when the bus is idle: in the next one, every engine forgets what it was doing, as control does.
    running : Out(1)
        A program runs.
    irq : Out(1)
        The interrupt line, high while an interrupt is enabled and pending.

    Raises
    ------
    TypeError, ValueError
        As :class:`nibblecore_hw.ctrl.fetch.Fetch`.
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

    def __init__(self, *, arch: ArchConfig, axi_id: int = 0, id_bits: int = 1, technology: str = "generic") -> None:
        check_arguments(arch=arch, axi_id=axi_id, id_bits=id_bits)
        self._arch = arch
        self._technology = check_technology(technology)
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
        fetch = Fetch(arch=self._arch, axi_id=self._axi_id, id_bits=self._id_bits)
        csr = Csr(arch=self._arch)
        supervisor = Supervisor()
        semaphores = Semaphores(bits=self._arch.semaphore_bits)
        instructions = InstructionMemory(arch=self._arch, technology=self._technology)
        stages = {e: IssueStage(arch=self._arch, engine=e) for e in Engine}
        # Registers: these reach hundreds of flip-flops. Fetch brings nothing before the third cycle after its start.
        soon, reset_units = Signal(), Signal()
        start_soon, start_anew = Signal(), Signal()
        m.d.sync += [
            soon.eq(supervisor.core_reset),
            reset_units.eq(soon),
            start_soon.eq(supervisor.core_reset | supervisor.start_stb),
            start_anew.eq(start_soon),
        ]
        m.d.comb += self.core_reset.eq(soon)
        core_reset = ResetInserter(reset_units)
        m.submodules.csr = csr
        m.submodules.supervisor = supervisor
        m.submodules.fetch = core_reset(fetch)
        m.submodules.instructions = core_reset(instructions)
        # A program may end with tokens left; the next one starts without, and at the first slot of each queue.
        fresh = ResetInserter(start_anew)
        m.submodules.semaphores = fresh(semaphores)
        for engine, stage in stages.items():
            m.submodules[f"issue_{engine.name.lower()}"] = fresh(stage)

        # Instructions
        connect(m, fetch.axi, flipped(self.m_axi))
        connect(m, fetch.write, instructions.write)
        m.d.comb += [
            fetch.region.eq(csr.fetch_region),
            fetch.start_stb.eq(supervisor.start_stb),
            fetch.stop.eq(supervisor.stop),
        ]
        for engine, stage in stages.items():
            port, n = self.engine(engine), int(engine)
            connect(m, stage.command, flipped(port.command))
            m.d.comb += [
                stage.queue_stb.eq(fetch.queue[n] & stage.room),
                fetch.room[n].eq(stage.room),
                instructions.head[n].eq(stage.head),
                instructions.oldest[n].eq(stage.oldest),
                instructions.want[n].eq(stage.want),
                stage.beat.eq(instructions.beat),
                stage.beat_stb.eq(instructions.beat_stb[n]),
                stage.first_stb.eq(instructions.first_stb[n]),
                stage.known_stb.eq(instructions.known_stb[n]),
                stage.done_stb.eq(port.done_stb),
                stage.hold.eq(supervisor.stop),
                stage.available.eq(semaphores.available[n]),
                stage.full.eq(semaphores.full[n]),
                semaphores.take[n].eq(stage.take),
                semaphores.signal[n].eq(stage.signal),
            ]

        m.d.comb += [
            supervisor.fetch_index.eq(fetch.index),
            instructions.lookup.eq(supervisor.lookup),
            instructions.lookup_engine.eq(supervisor.lookup_engine),
            supervisor.index.eq(instructions.index),
            supervisor.index_stb.eq(instructions.index_stb),
        ]
        self._supervise(m, supervisor, fetch, stages)
        connect(m, csr.s_axil, flipped(self.s_axil))
        connect_registers(m, csr, supervisor)
        self._regions(m, csr, core_reset, stages)
        if self._arch.counters:
            waits = {e: (stage.waiting | stage.held).any() for e, stage in stages.items()}
            connect_counters(m, csr, supervisor, self.stalls, {e: (self.engine(e).busy, waits[e]) for e in Engine})
        return m

    def _supervise(self, m: Module, supervisor: Supervisor, fetch: Fetch, stages: dict[Engine, IssueStage]) -> None:
        """What the supervisor sees of the core."""
        moves = [self.progress, fetch.progress_stb]
        idle = [fetch.idle]
        quiet = [fetch.ended]
        for engine, stage in stages.items():
            port, n = self.engine(engine), int(engine)
            moves += [port.command.valid & port.command.ready, port.done_stb]
            quiet += [stage.empty, ~port.busy]
            m.d.sync += [
                supervisor.executing[n].eq(stage.executing),
                supervisor.waits[n].eq(stage.waiting | stage.held),
            ]
            if engine in DMA_ENGINES:
                idle.append(port.idle)
                m.d.comb += [
                    supervisor.error_stb[n].eq(port.error_stb),
                    supervisor.error_cause[n].eq(port.error_cause),
                ]
        unit = int(ErrorUnit.FETCH)
        m.d.comb += [
            supervisor.error_stb[unit].eq(fetch.error_stb),
            supervisor.error_cause[unit].eq(fetch.error_cause),
            supervisor.idle.eq(Cat(idle).all()),
            self.stop.eq(supervisor.stop),
            self.running.eq(supervisor.running),
            self.irq.eq(supervisor.irq),
        ]
        # Registers, as these collect from all over the core; `finished` must not outlive the program it belongs to.
        moved = Signal(len(moves))
        m.d.sync += [
            moved.eq(Cat(moves)),
            supervisor.progress.eq(moved.any()),
            supervisor.finished.eq(supervisor.running & Cat(*quiet, *idle).all()),
        ]

    def _regions(self, m: Module, csr: Csr, core_reset: Any, stages: dict[Engine, IssueStage]) -> None:
        """The regions of the instructions that are brought to the DMA engines."""
        regions = RegionLookup(clients=len(DMA_ENGINES))
        m.submodules.regions = core_reset(regions)
        m.d.comb += [
            csr.region_en.eq(regions.en),
            csr.region_number.eq(regions.select),
            csr.region_size.eq(regions.size),
            regions.word.eq(csr.region_word),
        ]
        for n, engine in enumerate(DMA_ENGINES):
            stage = stages[engine]
            low, number = INSTRUCTIONS[Opcode[engine.name]].layout()["region"]
            m.d.comb += [
                regions.number[n].eq(stage.beat[low : low + number.bits]),
                regions.number_stb[n].eq(stage.first_stb),
                stage.prepared.eq(regions.ready[n]),
                self.engine(engine).region.eq(regions.region[n]),
            ]
