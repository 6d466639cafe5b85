# amaranth: UnusedElaboratable=no
"""Proofs about queue, semaphores and issue stage."""

import pytest
from amaranth.asserts import AnyConst, AnySeq
from amaranth.hdl import Assert, Assume, Cat, Cover, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Engine, Opcode
from nibblecore_hw.ctrl.instructions import BUFFERED, IN_FLIGHT, InstructionMemory, beat_layout
from nibblecore_hw.ctrl.issue import IssueStage
from nibblecore_hw.ctrl.queue import Queue
from nibblecore_hw.ctrl.semaphores import MASKS, Semaphores
from nibblecore_sim.formal import assert_stream_rule, prove

pytestmark = pytest.mark.formal

ARCH = ArchConfig(
    name="t",
    lanes=4,
    columns=4,
    post_lanes=2,
    acc_depth=16,
    act_depth=256,
    weight_depth=256,
    semaphore_bits=2,
    queue_depth=2,
)


class QueueSpec(wiring.Component):
    """Whatever went in as number n comes out as number n: nothing is lost, doubled or out of order.

    One item is watched, the one with any number ``n`` and any value. As all items are alike, that is a proof for all.
    """

    def __init__(self, *, depth: int, bits: int) -> None:
        self.queue = Queue(shape=bits, depth=depth)
        self.bits = bits
        super().__init__({"i": In(stream.Signature(bits)), "o": Out(stream.Signature(bits))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.queue = queue = self.queue
        connect(m, flipped(self.i), queue.i)
        connect(m, queue.o, flipped(self.o))
        assert_stream_rule(m, self.o)
        count_bits = queue.depth.bit_length() + 2
        number = AnyConst(count_bits)
        entered, left = Signal(count_bits), Signal(count_bits)  # modulo 4 * depth, far more than fit
        value, watched = Signal(self.bits), Signal()
        ahead = Signal(count_bits)  # items that leave before the watched one, itself included
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += entered.eq(entered + 1)
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += left.eq(left + 1)
        with m.If(self.i.valid & self.i.ready & (entered == number)):
            m.d.sync += [watched.eq(1), value.eq(self.i.payload)]
        with m.Elif(self.o.valid & self.o.ready & (left == number)):
            m.d.sync += watched.eq(0)
        inside = Signal(count_bits)
        m.d.comb += [
            inside.eq(entered - left),
            ahead.eq(number - left),
            Assert(inside <= queue.depth, "more items than the queue has room for"),
            Assert(queue.level == inside, "level"),
            Assert(self.o.valid == (inside != 0), "an item is inside, but not offered, or the other way round"),
            Assert(self.i.ready == (inside != queue.depth), "room, but not ready, or the other way round"),
            Assert(watched == (ahead < inside), "the watched item is inside exactly between entering and leaving"),
        ]
        with m.If(watched & self.o.valid & (left == number)):
            m.d.comb += Assert(self.o.payload == value, "another item came out than went in")
        return m


def test_queue_loses_and_doubles_nothing_and_keeps_the_order() -> None:
    prove(QueueSpec(depth=2, bits=2), mode="bmc", depth=12)
    prove(QueueSpec(depth=4, bits=1), mode="bmc", depth=14)


class SemaphoreSpec(wiring.Component):
    """With signals only where there is room and takes only where there is a token, counts are exact for ever."""

    def __init__(self) -> None:
        self.semaphores = Semaphores(bits=2)
        super().__init__({"signal": In(MASKS), "take": In(MASKS)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.semaphores = semaphores = self.semaphores
        m.d.comb += [semaphores.signal.eq(self.signal), semaphores.take.eq(self.take)]
        for a in range(len(Engine)):
            for b in range(len(Engine)):
                if a == b:
                    m.d.comb += Assert(~semaphores.available[b][a], "an engine has no semaphore to itself")
                    continue
                up, down = self.signal[a][b], self.take[b][a]
                m.d.comb += [Assume(~(up & semaphores.full[a][b])), Assume(~(down & ~semaphores.available[b][a]))]
                exact = Signal(8, name=f"exact_{a}_{b}")  # wide enough to go wrong
                m.d.sync += exact.eq(exact + up - down)
                m.d.comb += [
                    Assert(exact <= semaphores.maximum, "over- or underflow"),
                    Assert(semaphores.counts[Engine(a), Engine(b)] == exact, "the count is not exact"),
                    Assert(semaphores.available[b][a] == (exact != 0), "available"),
                    Assert(semaphores.full[a][b] == (exact == semaphores.maximum), "full"),
                ]
        return m


def test_semaphores_count_exactly() -> None:
    prove(SemaphoreSpec(), mode="induction", depth=2)


class IssueSpec(wiring.Component):
    """An issue stage with any engine and any neighbours that keep the rules.

    Every instruction signals somebody here, so that one pulse of ``signal`` is one instruction. One instruction is
    followed, that with any number, from its queue to its signal. An instruction is one beat.

    With ``memory`` its queue is the real one, which is written at any time, also where nothing comes of it, in the slot
    behind the queue and in those that fetch may write ahead. Without,
    it is anything that brings what was queued, whenever it likes, and whose slots are those of the pointers.
    """

    def __init__(self, *, memory: bool) -> None:
        arch = ARCH.replace(bus_bits=256)
        self.memory = InstructionMemory(arch=arch) if memory else None
        self.stage = IssueStage(arch=arch, engine=Engine.MAC)
        super().__init__(
            {
                "wait": In(4),
                "signal": In(4),
                "tag": In(2),
                "write": In(1),
                "ahead": In(range(BUFFERED)),
                "queue": In(1),
                "ask": In(1),
                "ready": In(1),
                "done_stb": In(1),
                "hold": In(1),
                "prepared": In(1),
                "give": In(4),
                "drain": In(4),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.stage = stage = self.stage
        fresh = Signal(beat_layout(ARCH.replace(bus_bits=256)))
        m.d.comb += [
            Assume(self.signal != 0),
            fresh.bits.eq(int(Opcode.MAC) | self.wait << 4 | self.signal << 8 | self.tag << 20),
            fresh.index.eq(self.tag << 22 | self.tag),
            Assume(~self.queue | stage.room),
            stage.queue_stb.eq(self.queue),
            stage.command.ready.eq(self.ready),
            stage.done_stb.eq(self.done_stb),
            stage.hold.eq(self.hold),
            stage.prepared.eq(self.prepared),
        ]
        entry = fresh if self.memory is None else self._queue(m, self.memory, fresh)
        assert_stream_rule(m, stage.command)
        word = stage.command.payload

        queued, started, finished, signalled = Signal(6), Signal(6), Signal(6), Signal(6)
        enters = self.queue
        starts = stage.command.valid & stage.command.ready
        signals = stage.signal.any()
        m.d.sync += [
            queued.eq(queued + enters),
            started.eq(started + starts),
            finished.eq(finished + self.done_stb),
            signalled.eq(signalled + signals),
        ]
        done = finished + self.done_stb  # the instruction of this very cycle included
        m.d.comb += [
            Assume(~self.done_stb | (started != finished)),  # an engine finishes what it has accepted
            Assert(started - signalled <= IN_FLIGHT, "more instructions in flight than the stage remembers"),
            Assert(~starts | (queued != started), "started what was not queued"),
            Assert(~signals | (signalled < done), "signalled before it was done"),
            Assert((signalled == done) | signals | (stage.held & stage.full).any(), "did not signal, though it could"),
            Assert(stage.empty == ((queued == started) & (started == signalled)), "empty"),
            Assert(stage.executing == (started != signalled), "executing"),
        ]

        # Semaphores from and to the neighbours, who give and drain as they like; wide enough to go wrong.
        for n in range(len(Engine)):
            tokens, room = Signal(6, name=f"tokens_{n}"), Signal(6, name=f"room_{n}", init=1)
            m.d.comb += [stage.available[n].eq(tokens != 0), stage.full[n].eq(room == 0)]
            m.d.sync += [
                tokens.eq(tokens + (self.give[n] & (tokens < 3)) - stage.take[n]),
                room.eq(room + (self.drain[n] & (room < 3)) - stage.signal[n]),
            ]
            m.d.comb += [
                Assert(tokens <= 3, "a token was taken that was not there"),
                Assert(room <= 3, "a full semaphore was signalled"),
            ]
        takes = Signal(len(Engine))
        m.d.sync += takes.eq(starts.replicate(len(Engine)) & word[4:8])
        m.d.comb += [
            Assert(~starts | ((word[4:8] & ~(stage.available & ~stage.take)) == 0), "started without a token"),
            Assert(stage.take == takes, "took something else than what it has waited for"),
        ]
        before = Signal(2)
        m.d.sync += before.eq(Cat(self.hold | ~self.prepared, stage.command.valid))
        m.d.comb += Assert((before != 0b01) | ~stage.command.valid, "a new offer under hold, or unprepared")

        number = AnyConst(6)
        followed, oldest = Signal.like(entry), Signal(2)
        with m.If(enters & (queued == number)):
            m.d.sync += followed.eq(entry)
        with m.If(starts & (started == number)):
            m.d.comb += Assert(word == followed.bits, "another instruction was started")
        m.d.sync += oldest.eq(Cat((signalled == number) & (started != signalled), oldest))
        if self.memory is None:
            slots = len(stage.tail)
            given = AnySeq(len(stage.beat))
            m.d.comb += [
                Assert(stage.tail == queued[:slots], "the slot behind the queue"),
                Assert(stage.head == started[:slots], "the slot of the next instruction"),
                Assert(stage.oldest == signalled[:slots], "the slot of the oldest unfinished instruction"),
                Assert(~stage.want | (queued != started), "wants what was not queued"),
                stage.beat.eq(given),
                Assume(given[8:12] != 0),
                Assume((started != number) | (given == followed.bits)),
                *(stb.eq(self.write & stage.want) for stb in (stage.beat_stb, stage.first_stb, stage.known_stb)),
            ]
        else:
            index_stb = self.memory.index_stb & oldest[1]  # it is looked up two cycles before
            with m.If(index_stb):
                m.d.comb += Assert(self.memory.index == followed.index, "the oldest unfinished instruction")
            m.d.comb += Cover(index_stb & (number == 1), "the index of the second instruction")
        with m.If(signals & (signalled == number)):
            m.d.comb += Assert(stage.signal == followed.bits[8:12], "signalled something else than it should")

        m.d.comb += [
            Cover(stage.held.any() & (started - signalled == 2), "held back with another instruction in flight"),
            Cover(starts & (word[4:8] == 0b1101), "started after waiting for three"),
            Cover(started - finished == IN_FLIGHT, "all places in flight taken"),
        ]
        return m

    def _queue(self, m: Module, memory: InstructionMemory, fresh: Signal) -> Signal:
        """The memory beside the stage; what lies in the slot behind the queue's last one."""
        m.submodules.memory = memory
        stage, n = self.stage, int(Engine.MAC)
        entry, written, asking = Signal.like(fresh), Signal(), Signal()
        now = self.write & (self.ahead == 0)
        m.d.comb += [
            memory.write.en.eq(self.write),
            memory.write.engine.eq(n),
            memory.write.beat.eq(fresh),
            Assume(~self.queue | written),
            Assume(~self.queue | ~now),  # fetch writes the next instruction later
            memory.write.slot.eq(stage.tail + self.ahead),
            memory.head[n].eq(stage.head),
            memory.oldest[n].eq(stage.oldest),
            memory.want.eq(stage.want << n),
            memory.lookup.eq(asking),
            memory.lookup_engine.eq(n),
            stage.beat.eq(memory.beat),
            stage.beat_stb.eq(memory.beat_stb[n]),
            stage.first_stb.eq(memory.first_stb[n]),
            stage.known_stb.eq(memory.known_stb[n]),
        ]
        m.d.sync += asking.eq((asking | self.ask) & ~memory.index_stb)
        with m.If(now):
            m.d.sync += [entry.eq(fresh), written.eq(1)]
        with m.If(self.queue):
            m.d.sync += written.eq(0)
        return entry


def test_issue_stage_starts_in_order_with_its_tokens_and_signals_once() -> None:
    prove(IssueSpec(memory=False), mode="bmc", depth=11)


def test_issue_stage_with_its_memory() -> None:
    prove(IssueSpec(memory=True), mode="bmc", depth=11)


def test_issue_stage_spec_is_not_empty() -> None:
    prove(IssueSpec(memory=False), mode="cover", depth=20)
    prove(IssueSpec(memory=True), mode="cover", depth=32)
