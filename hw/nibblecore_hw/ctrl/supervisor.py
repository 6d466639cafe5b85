"""Start, stop, errors, watchdog, interrupt and soft reset."""

from typing import Any

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch.isa import Engine
from nibblecore.arch.regs import ErrorCause, ErrorUnit, field

from ..layouts import INDEX_BITS
from .instructions import ENGINE_BITS
from .semaphores import MASKS

UNITS = len(ErrorUnit)

SETTLE = 4
"""Cycles for which the bus must have been idle before a soft reset clears the core."""


_IRQ_DONE = field("IRQ_STATUS", "done").low
_IRQ_ERROR = field("IRQ_STATUS", "error").low


class Supervisor(wiring.Component):
    """The state of the core as a whole: idle, running, error, resetting.

    =========  ==========================  =====================================================================
    from       when                        to
    =========  ==========================  =====================================================================
    idle       ``start``                   running; ``start_stb`` in the same cycle
    running    an error, or the watchdog   error; unit, cause, index and waits are kept
    running    ``finished``                idle, and done
    any        ``reset``                   resetting: ``stop`` until ``idle`` has been high for :data:`SETTLE` cycles,
                                           then one cycle of ``core_reset``, two more, then idle
    =========  ==========================  =====================================================================

    ``reset`` wins over everything else, an error over ``finished``. Of several errors in one cycle the one of the
    lowest unit wins, and any over the watchdog. Errors count while running only.

    The watchdog stops the core when ``progress`` has been low for as many cycles as ``watchdog`` says, counted from the
    start or from a write to that register. It blames the lowest engine that executes an instruction, since others may
    wait for it; without one, the lowest that waits for a semaphore; without one, fetch.

    Members
    -------
    start, reset : In(1)
        The host's commands.
    finished : In(1)
        The program has ended. May not be left over from an earlier program in the first cycle of ``running``.
    idle : In(1)
        No bus transaction is in flight, requests that wait for the bus included.
    error_stb, error_cause : In
        Per unit: it met an error; its :class:`nibblecore.arch.regs.ErrorCause`.
    fetch_index : In(24)
        The instruction that fetch is at; sampled in the cycle after the error.
    lookup, lookup_engine : Out(1), Out(2)
        Which instruction is that engine at? From the cycle after its error to ``index_stb``. Until then the core does
        not say that it has stopped.
    index, index_stb : In(24), In(1)
        The answer.
    executing : In(4)
        Engines with an unfinished instruction.
    waits : In(MASKS)
        Per engine, whom it waits for.
    progress : In(1)
        Some engine has made progress.
    watchdog, watchdog_stb : In(32), In(1)
        The register, and that it was written.
    irq_enable, irq_status_ones : In(1), In(2)
        Interrupt enable, and the interrupts to clear.
    start_stb : Out(1)
        A program starts.
    running : Out(1)
        From the cycle after ``start_stb`` until done or error.
    stop : Out(1)
        Start no instruction and no bus transaction. High in the states error and resetting.
    core_reset : Out(1)
        One cycle: clear everything that belongs to a program.
    status, error, error_index_kept, error_waits, irq_status : Out(32)
        What the registers read as.
    irq : Out(1)
        The interrupt line.
    """

    start: Signal
    reset: Signal
    finished: Signal
    idle: Signal
    error_stb: Signal
    error_cause: Any
    fetch_index: Signal
    lookup: Signal
    lookup_engine: Signal
    index: Signal
    index_stb: Signal
    executing: Signal
    waits: Any
    progress: Signal
    watchdog: Signal
    watchdog_stb: Signal
    irq_enable: Signal
    irq_status_ones: Signal
    start_stb: Signal
    running: Signal
    stop: Signal
    core_reset: Signal
    status: Signal
    error: Signal
    error_index_kept: Signal
    error_waits: Signal
    irq_status: Signal
    irq: Signal

    def __init__(self) -> None:
        super().__init__(
            {
                "start": In(1),
                "reset": In(1),
                "finished": In(1),
                "idle": In(1),
                "error_stb": In(UNITS),
                "error_cause": In(data.ArrayLayout(8, UNITS)),
                "fetch_index": In(INDEX_BITS),
                "lookup": Out(1),
                "lookup_engine": Out(ENGINE_BITS),
                "index": In(INDEX_BITS),
                "index_stb": In(1),
                "executing": In(len(Engine)),
                "waits": In(MASKS),
                "progress": In(1),
                "watchdog": In(32),
                "watchdog_stb": In(1),
                "irq_enable": In(1),
                "irq_status_ones": In(2),
                "start_stb": Out(1),
                "running": Out(1),
                "stop": Out(1),
                "core_reset": Out(1),
                "status": Out(32),
                "error": Out(32),
                "error_index_kept": Out(32),
                "error_waits": Out(32),
                "irq_status": Out(32),
                "irq": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        done = Signal()
        settled = Signal(range(SETTLE + 1))
        cause = Signal(8)
        unit = Signal(8)
        index = Signal(INDEX_BITS)
        unindexed = Signal()
        waits = Signal(MASKS)
        pending = Signal(2)
        expired = self._watchdog(m)

        # Who is to blame: the lowest unit with an error, else the watchdog's choice.
        blamed = Signal(range(UNITS))
        waiting = Cat(self.waits[int(e)].any() for e in Engine)
        m.d.comb += blamed.eq(int(ErrorUnit.FETCH))
        for candidates in (waiting, self.executing, self.error_stb):  # the last assignment wins
            for n in reversed(range(len(candidates))):
                with m.If(candidates[n]):
                    m.d.comb += blamed.eq(n)

        of_fetch = unit[: blamed.shape().width] == int(ErrorUnit.FETCH)
        m.d.comb += self.lookup_engine.eq(unit)

        def reset_wins() -> None:
            with m.If(self.reset):
                m.d.sync += [settled.eq(0), self.stop.eq(1)]
                m.next = "RESETTING"

        m.d.sync += self.lookup.eq(0)
        m.d.sync += pending.eq(pending & ~self.irq_status_ones)  # what is set below in the same cycle stays
        with m.FSM(name="core_state") as fsm:
            with m.State("IDLE"):
                m.d.comb += self.start_stb.eq(self.start & ~self.reset)
                with m.If(self.start_stb):
                    m.d.sync += [done.eq(0), cause.eq(0), unit.eq(0), index.eq(0), waits.eq(0)]
                    m.next = "RUNNING"
                reset_wins()
            with m.State("RUNNING"):
                m.d.sync += waits.eq(self.waits)
                with m.If(self.error_stb.any() | expired):
                    m.d.sync += [
                        cause.eq(int(ErrorCause.WATCHDOG)),
                        unit.eq(blamed),
                        unindexed.eq(1),
                    ]
                    with m.If(self.error_stb.any()):
                        m.d.sync += cause.eq(self.error_cause[blamed])
                    m.d.sync += self.stop.eq(1)
                    m.next = "ERROR"
                with m.Elif(self.finished):
                    m.d.sync += [done.eq(1), pending[_IRQ_DONE].eq(1)]
                    m.next = "IDLE"
                reset_wins()
            with m.State("ERROR"):
                # The error shows when all is known about it.
                with m.If(unindexed):
                    # A register, as it chooses what is read next.
                    m.d.sync += self.lookup.eq(~of_fetch & ~self.index_stb)
                    with m.If(of_fetch | self.index_stb):
                        m.d.sync += [
                            index.eq(Mux(of_fetch, self.fetch_index, self.index)),
                            unindexed.eq(0),
                            pending[_IRQ_ERROR].eq(1),
                        ]
                reset_wins()
            with m.State("RESETTING"):
                m.d.sync += settled.eq(settled + 1)
                with m.If(~self.idle):
                    m.d.sync += settled.eq(0)
                with m.Elif(settled == SETTLE - 1):
                    m.d.sync += self.core_reset.eq(1)
                    m.next = "CLEAR"
            with m.State("CLEAR"):
                m.d.sync += [self.core_reset.eq(0), done.eq(0), pending.eq(0)]
                m.d.sync += [cause.eq(0), unit.eq(0), index.eq(0), waits.eq(0)]
                m.next = "CLEARED"
            # `core_reset` may reach the units two cycles late.
            with m.State("CLEARED"):
                m.next = "SETTLED"
            with m.State("SETTLED"):
                m.d.sync += self.stop.eq(0)
                m.next = "IDLE"

        # `stop` is a register, high in ERROR and while resetting: it leads to every engine.
        resetting = fsm.ongoing("RESETTING") | fsm.ongoing("CLEAR")
        resetting |= fsm.ongoing("CLEARED") | fsm.ongoing("SETTLED")
        m.d.comb += [
            self.running.eq(fsm.ongoing("RUNNING")),
            self.error_index_kept.eq(index),
            self.error_waits.eq(waits),
            self.irq_status.eq(pending),
        ]
        for name, value in (
            ("idle", fsm.ongoing("IDLE")),
            ("running", fsm.ongoing("RUNNING") | (fsm.ongoing("ERROR") & unindexed)),
            ("done", done),
            ("error", fsm.ongoing("ERROR") & ~unindexed),
            ("resetting", resetting),
        ):
            m.d.comb += self.status[field("STATUS", name).low].eq(value)
        for name, value in (("cause", cause), ("unit", unit)):
            f = field("ERROR", name)
            m.d.comb += self.error[f.low : f.low + f.bits].eq(value)
        m.d.sync += self.irq.eq(self.irq_enable & pending.any())
        return m

    def _watchdog(self, m: Module) -> Signal:
        """Returns that the time without progress is over."""
        # Counts from 1, so that the comparison has a register behind it.
        waited = Signal(32, reset_less=True)
        enabled, long_enough, starts_anew = Signal(), Signal(), Signal()
        expired = Signal()
        m.d.comb += starts_anew.eq(~self.running | self.progress | self.watchdog_stb)
        m.d.sync += [
            enabled.eq(self.watchdog != 0),
            waited.eq(Mux(starts_anew, 1, waited + 1)),
            long_enough.eq((waited == self.watchdog) & ~starts_anew),
        ]
        m.d.comb += expired.eq(self.running & enabled & ~self.watchdog_stb & long_enough)
        return expired
