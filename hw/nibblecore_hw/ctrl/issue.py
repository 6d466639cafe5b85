"""Issue stage: an engine's instruction queue, and its side of the semaphores."""

from typing import Any

from amaranth import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import INSTRUCTION_BITS, INSTRUCTIONS, Engine, Opcode

from ..layouts import INDEX_BITS, command_signature, instruction_layout
from .queue import Queue

IN_FLIGHT = 4
"""Instructions that an engine may have been given and not yet finished."""


def entry_layout(*, word_bits: int = INSTRUCTION_BITS) -> data.StructLayout:
    """An instruction in a queue: the low ``word_bits`` of its word, and its index in the program."""
    return data.StructLayout({"word": word_bits, "index": INDEX_BITS})


def word_bits(engine: Engine) -> int:
    """Bits of the longest instruction that ``engine`` runs; all bits above are 0 in every legal one."""
    return max(spec.bits for spec in INSTRUCTIONS.values() if spec.engine is engine)


class IssueStage(wiring.Component):
    """Hold an engine's instructions, start each when its semaphores allow, and signal when it has finished.

    The instruction at the head of the queue is offered on ``command`` when there is a semaphore to take from every
    engine named in its ``wait`` mask; one of each is taken when the engine accepts. Instructions that the engine has
    accepted are remembered in order (at most :data:`IN_FLIGHT`); each ``done_stb`` finishes the oldest, which then
    signals all engines of its ``signal`` mask at once, and waits while one of these semaphores is full. Until it has
    signalled, no further instruction is offered.

    Cycles: an instruction is offered 3 cycles after it was queued in an empty stage, and at most every third cycle.
    ``signal`` is given in the cycle of ``done_stb``, so that an instruction that waits for it is offered 2 cycles after
    ``done_stb``.

    Parameters
    ----------
    arch : ArchConfig
        For ``queue_depth``.
    engine : Engine
        Whose queue it is; its longest instruction decides how wide the queue is.

    Members
    -------
    i : In(stream.Signature(entry_layout()))
        Instructions from fetch; only legal ones of this engine.
    command : Out(command_signature())
        To the engine. Once offered, an instruction stays until it is accepted, also under ``hold``.
    done_stb : In(1)
        From the engine; at least one cycle after the instruction was accepted, never without one.
    available, full : In(4)
        This engine's view of the semaphores: where it could take, where it cannot signal.
    take, signal : Out(4)
        What it takes and signals in this cycle.
    hold : In(1)
        Offer no further instruction.
    waiting : Out(4)
        Engines whose semaphores the next instruction lacks; 0 without one.
    held : Out(4)
        Engines whose semaphores are full, so that the oldest instruction, finished, cannot signal.
    executing : Out(1)
        The engine has an instruction that has not signalled yet.
    empty : Out(1)
        No instruction is queued or unfinished.
    index : Out(24)
        The oldest unfinished instruction; without one, the next of the queue. Arbitrary while ``empty``.

    Raises
    ------
    TypeError
        If ``arch`` is no ArchConfig or ``engine`` no Engine.
    """

    i: Any
    command: Any
    done_stb: Signal
    available: Signal
    full: Signal
    take: Signal
    signal: Signal
    hold: Signal
    waiting: Signal
    held: Signal
    executing: Signal
    empty: Signal
    index: Signal

    def __init__(self, *, arch: ArchConfig, engine: Engine) -> None:
        if not isinstance(arch, ArchConfig):
            raise TypeError(f"arch must be an ArchConfig, not {arch!r}")
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an Engine, not {engine!r}")
        self._arch = arch
        self._engine = engine
        super().__init__(
            {
                "i": In(stream.Signature(entry_layout())),
                "command": Out(command_signature()),
                "done_stb": In(1),
                "available": In(len(Engine)),
                "full": In(len(Engine)),
                "take": Out(len(Engine)),
                "signal": Out(len(Engine)),
                "hold": In(1),
                "waiting": Out(len(Engine)),
                "held": Out(len(Engine)),
                "executing": Out(1),
                "empty": Out(1),
                "index": Out(INDEX_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = word_bits(self._engine)
        m.submodules.queue = queue = Queue(shape=entry_layout(word_bits=bits), depth=self._arch.queue_depth)
        m.submodules.started = started = Queue(
            shape=data.StructLayout({"signal": len(Engine), "index": INDEX_BITS}), depth=IN_FLIGHT
        )
        # The header is at the same place in every instruction.
        header = instruction_layout(Opcode.END)
        head = Signal(header)
        known = Signal()  # `wait` is that of the queue's head
        wait = Signal(len(Engine), reset_less=True)
        offered = Signal()
        completed = Signal(range(IN_FLIGHT + 1))  # finished by the engine, not signalled yet
        missing = Signal(len(Engine))

        m.d.comb += [
            queue.i.valid.eq(self.i.valid),
            queue.i.payload.word.eq(self.i.payload.word[:bits]),
            queue.i.payload.index.eq(self.i.payload.index),
            self.i.ready.eq(queue.i.ready),
            head.as_value().eq(queue.o.payload.word),
            missing.eq(known.replicate(len(Engine)) & wait & ~self.available),
            self.command.valid.eq(offered),
            self.command.payload.eq(queue.o.payload.word),
            queue.o.ready.eq(offered & self.command.ready),
            started.i.valid.eq(offered & self.command.ready),
            started.i.payload.signal.eq(head.signal),
            started.i.payload.index.eq(queue.o.payload.index),
            self.waiting.eq((~offered).replicate(len(Engine)) & missing),
        ]
        # The mask and `offered` are registers: neither the queue's memory nor the semaphores are in the path to the
        # engine. It costs nothing in correctness: what this engine could take cannot be taken by anybody else.
        m.d.comb += self.take.eq((offered & self.command.ready).replicate(len(Engine)) & wait)
        m.d.sync += [wait.eq(head.wait), known.eq(queue.o.valid & ~(offered & self.command.ready))]
        with m.If(offered):
            m.d.sync += offered.eq(~self.command.ready)
        with m.Else():
            m.d.sync += offered.eq(known & ~missing.any() & started.i.ready & (completed == 0) & ~self.hold)

        finishing = self.done_stb | (completed != 0)
        m.d.comb += [
            self.held.eq(finishing.replicate(len(Engine)) & started.o.payload.signal & self.full),
            started.o.ready.eq(finishing & ~self.held.any()),
        ]
        with m.If(started.o.valid & started.o.ready):
            m.d.comb += self.signal.eq(started.o.payload.signal)
            with m.If(~self.done_stb):
                m.d.sync += completed.eq(completed - 1)
        with m.Elif(self.done_stb):
            m.d.sync += completed.eq(completed + 1)

        m.d.comb += [
            self.executing.eq(started.o.valid),
            self.empty.eq(~queue.o.valid & ~started.o.valid),
            self.index.eq(started.o.payload.index),
        ]
        with m.If(~started.o.valid):
            m.d.comb += self.index.eq(queue.o.payload.index)
        return m
