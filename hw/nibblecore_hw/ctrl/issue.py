"""Issue stage: where an engine's instructions wait, and its side of the semaphores."""

from typing import Any

from amaranth import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Engine, Opcode

from ..layouts import command_signature, instruction_layout
from .instructions import IN_FLIGHT, beat_bytes, beats_of, slot_bits


class IssueStage(wiring.Component):
    """Start an engine's instructions when their semaphores allow, and signal when they have finished.

    The instructions lie in :class:`nibblecore_hw.ctrl.instructions.InstructionMemory`, in a ring of slots with three
    pointers: from ``head`` to ``tail`` the queue, from ``oldest`` to ``head`` what the engine has accepted and not
    finished. The word at ``head`` is brought here beat by beat, into a shift register. It is offered on ``command``
    when there is a semaphore to take from every engine named in its ``wait`` mask; one of each is taken in the cycle
    after the engine accepts. At most :data:`IN_FLIGHT` accepted instructions are remembered in order; each ``done_stb``
    finishes the oldest, which then signals all engines of its ``signal`` mask at once, and waits while one of these
    semaphores is full. Until it has signalled, no further instruction is offered.

    Cycles, with ``n`` beats of an instruction that this engine looks at: an instruction is offered ``max(6, n + 4)``
    cycles after it was queued in an empty stage, and as many after the one before was accepted, if no other engine's
    instruction is being read. ``signal`` is given in the cycle of ``done_stb``, so that an instruction that waits for
    it is offered 2 cycles after ``done_stb``.

    Parameters
    ----------
    arch : ArchConfig
        For ``queue_depth`` and ``bus_bits``.
    engine : Engine
        Whose instructions these are; its longest one decides how many beats are looked at.

    Members
    -------
    queue_stb : In(1)
        The slot at ``tail`` holds an instruction, a legal one of this engine. Only while there is ``room``.
    room : Out(1)
        The queue is not full: it holds less than ``queue_depth`` instructions.
    tail, head, oldest : Out(slot_bits(arch))
        Slots: where the next instruction comes, the next of the queue, the oldest unfinished instruction (without
        one, the next of the queue; arbitrary while ``empty``).
    want : Out(1)
        The instruction at ``head`` shall be read.
    beat, beat_stb, first_stb, known_stb : In
        Its beats: see :class:`nibblecore_hw.ctrl.instructions.InstructionMemory`.
    prepared : In(1)
        In the next cycle the engine has what it needs beside the word. Means something when the word is known.
    command : Out(command_signature())
        To the engine. Once offered, an instruction stays until it is accepted, also under ``hold``.
    done_stb : In(1)
        From the engine; at least one cycle after the instruction was accepted, never without one.
    available, full : In(4)
        This engine's view of the semaphores: where it could take, where it cannot signal.
    take, signal : Out(4)
        What it takes, a cycle after the transfer of ``command``, and what it signals in this cycle.
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

    Raises
    ------
    TypeError
        If ``arch`` is no ArchConfig or ``engine`` no Engine.
    """

    queue_stb: Signal
    room: Signal
    tail: Signal
    head: Signal
    oldest: Signal
    want: Signal
    beat: Signal
    beat_stb: Signal
    first_stb: Signal
    known_stb: Signal
    prepared: Signal
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

    def __init__(self, *, arch: ArchConfig, engine: Engine) -> None:
        if not isinstance(arch, ArchConfig):
            raise TypeError(f"arch must be an ArchConfig, not {arch!r}")
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an Engine, not {engine!r}")
        self._arch = arch
        self._engine = engine
        super().__init__(
            {
                "queue_stb": In(1),
                "room": Out(1),
                "tail": Out(slot_bits(arch)),
                "head": Out(slot_bits(arch)),
                "oldest": Out(slot_bits(arch)),
                "want": Out(1),
                "beat": In(8 * beat_bytes(arch)),
                "beat_stb": In(1),
                "first_stb": In(1),
                "known_stb": In(1),
                "prepared": In(1, init=1),
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
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        depth = self._arch.queue_depth
        # How far apart two pointers are is a power of two at most: one bit more than that tells all distances apart.
        queued_bits, started_bits = depth.bit_length(), IN_FLIGHT.bit_length()
        queued, started = Signal(queued_bits), Signal(started_bits)  # 0: none
        m.d.comb += [
            queued.eq((self.tail ^ self.head)[:queued_bits]),
            started.eq((self.head ^ self.oldest)[:started_bits]),
            self.room.eq(queued != depth),
            self.executing.eq(started != 0),
            self.empty.eq((queued == 0) & ~self.executing),
        ]
        with m.If(self.queue_stb):
            m.d.sync += self.tail.eq(self.tail + 1)

        # The header is at the same place in every instruction, and within the first beat.
        header = Signal(instruction_layout(Opcode.END))
        beats = beats_of(self._arch, self._engine)
        word = Signal(beats * len(self.beat), reset_less=True)
        known = Signal()  # `wait` is that of the queue's head
        wait, mask = Signal(len(Engine), reset_less=True), Signal(len(Engine), reset_less=True)
        offered = Signal()
        completed = Signal(range(IN_FLIGHT + 1))  # finished by the engine, not signalled yet
        missing = Signal(len(Engine))
        accepted = Signal()

        with m.If(self.beat_stb):
            # First beat in the low bits: beats enter at the top and move down.
            m.d.sync += word.eq(Cat(word, self.beat)[len(self.beat) :])
        with m.If(self.first_stb):
            m.d.sync += [wait.eq(header.wait), mask.eq(header.signal)]
        m.d.comb += [
            header.as_value().eq(self.beat),
            self.want.eq((queued != 0) & ~known),
            missing.eq(known.replicate(len(Engine)) & wait & ~self.available),
            self.command.valid.eq(offered),
            self.command.payload.eq(word),
            accepted.eq(offered & self.command.ready),
            self.waiting.eq((~offered).replicate(len(Engine)) & missing),
        ]
        # The mask and `offered` are registers: neither the memory nor the semaphores are in the path to the engine. It
        # costs nothing in correctness: what this engine could take cannot be taken by anybody else. For the same reason
        # it is taken a cycle after the transfer; the next instruction is not known before that.
        m.d.sync += self.take.eq(accepted.replicate(len(Engine)) & wait)
        with m.If(accepted):
            m.d.sync += [known.eq(0), self.head.eq(self.head + 1)]
        with m.Elif(self.known_stb):
            m.d.sync += known.eq(1)
        with m.If(offered):
            m.d.sync += offered.eq(~self.command.ready)
        with m.Else():
            m.d.sync += offered.eq(
                Cat(known, self.prepared, ~missing.any(), started != IN_FLIGHT, completed == 0, ~self.hold).all()
            )

        # Signal masks of what has been accepted, by slot.
        m.submodules.signals = signals = Memory(
            shape=len(Engine), depth=IN_FLIGHT, init=[], attrs={"ram_style": "distributed"}
        )
        write, read = signals.write_port(), signals.read_port(domain="comb")
        m.d.comb += [
            write.addr.eq(self.head[: len(write.addr)]),
            write.data.eq(mask),
            write.en.eq(accepted),
            read.addr.eq(self.oldest[: len(read.addr)]),
        ]

        finishing, finished = self.done_stb | (completed != 0), Signal()
        m.d.comb += [
            self.held.eq(finishing.replicate(len(Engine)) & read.data & self.full),
            finished.eq(self.executing & finishing & ~self.held.any()),
        ]
        with m.If(finished):
            m.d.comb += self.signal.eq(read.data)
            m.d.sync += self.oldest.eq(self.oldest + 1)
            with m.If(~self.done_stb):
                m.d.sync += completed.eq(completed - 1)
        with m.Elif(self.done_stb):
            m.d.sync += completed.eq(completed + 1)
        return m
