"""Performance counters."""

from typing import Any

from amaranth import Cat, Module, Mux, Signal
from amaranth.hdl import Array
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from nibblecore.arch.regs import Counter

SLOTS = 1 << (len(Counter) - 1).bit_length()
"""Cycles in which every counter has its turn."""

COUNTER_BITS = 32

_RECENT_BITS = (SLOTS - 1).bit_length()


def _next(state: Any) -> Any:
    """The bit that enters below and moves a shift register of :data:`_RECENT_BITS` on through all its states.

    An LFSR of the polynomial x^4 + x^3 + 1, with the state of all zeros put between 8 and 1.
    """
    return state[3] ^ state[2] ^ ~(state[2] | state[1] | state[0])


def _states() -> list[int]:
    """The state that stands for each number of events."""
    states = [0]
    while len(states) < SLOTS:
        bits = [states[-1] >> n & 1 for n in range(_RECENT_BITS)]
        states.append((states[-1] << 1 | _next(bits) & 1) % SLOTS)
    assert len(set(states)) == SLOTS
    return states


def events_layout() -> data.StructLayout:
    """One bit per :class:`nibblecore.arch.regs.Counter`, by its name in lower case; 1 in each cycle that counts."""
    return data.StructLayout({c.name.lower(): 1 for c in Counter})


class Counters(wiring.Component):
    """Count the cycles of each event, 32 bits each, wrapping.

    The counts lie in one LUT RAM with one adder: each cycle is the turn of one counter, and what happened since its
    last turn waits in four bits of its own, which count in the order of a shift register, a LUT per counter. ``value``
    is the exact count of :attr:`LATENCY` cycles before, the event of that very cycle included; a reader waits for the
    counter's turn, at most :data:`SLOTS` - 1 cycles.

    Members
    -------
    events : In(events_layout())
        What happens in this cycle.
    clear_stb : In(1)
        All counts become 0; events of this cycle are not counted. A reset does the same. ``value`` is arbitrary until
        :attr:`LATENCY` cycles later.
    slot : Out(4)
        Whose turn ``value`` is about.
    value : Out(32)
        That counter's count; 0 in the turn of nobody.
    """

    LATENCY = 3

    events: data.View
    clear_stb: Signal
    slot: Signal
    value: Signal

    def __init__(self) -> None:
        super().__init__(
            {
                "events": In(events_layout()),
                "clear_stb": In(1),
                "slot": Out(range(SLOTS)),
                "value": Out(COUNTER_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.counts = counts = Memory(
            shape=COUNTER_BITS, depth=SLOTS, init=[], attrs={"ram_style": "distributed"}
        )
        write, read = counts.write_port(), counts.read_port(domain="comb")
        recent = [Signal(range(SLOTS), name=f"recent_{c.name.lower()}") for c in Counter]
        # After a clear, what the memory holds is stale until each slot has been written once: a whole round.
        stale = Signal(range(SLOTS + 1), init=SLOTS)

        turn, second, third = Signal(range(SLOTS)), Signal(range(SLOTS)), Signal(range(SLOTS))
        silent = [0] * (SLOTS - len(Counter))
        event, pending, since = Signal(), Signal(_RECENT_BITS), Signal(_RECENT_BITS)
        with m.Switch(pending):
            for number, state in enumerate(_states()):
                with m.Case(state):
                    m.d.comb += since.eq(number)
        # Four steps, one cycle each: choose, look up, add, write back. A slot comes again long after its last step.
        count = Signal(COUNTER_BITS, reset_less=True)
        more = Signal(range(SLOTS + 1), reset_less=True)
        m.d.comb += [
            read.addr.eq(second),
            write.addr.eq(self.slot),
            write.data.eq(self.value),
            write.en.eq(1),
        ]
        m.d.sync += [
            turn.eq(turn + 1),
            second.eq(turn),
            event.eq(Array([*(self.events[c.name.lower()] for c in Counter), *silent])[turn]),
            pending.eq(Array([*recent, *silent])[turn]),
            third.eq(second),
            count.eq(Mux(stale == 0, read.data, 0)),
            more.eq(since + event),
            self.slot.eq(third),
            self.value.eq(count + more),
        ]
        for c in Counter:
            with m.If(self.events[c.name.lower()]):
                m.d.sync += recent[c].eq(Cat(_next(recent[c]), recent[c]))
            with m.If(turn == int(c)):
                m.d.sync += recent[c].eq(0)
        with m.If(stale != 0):
            m.d.sync += stale.eq(stale - 1)
        with m.If(self.clear_stb):
            m.d.sync += [stale.eq(SLOTS), event.eq(0), pending.eq(0), *(r.eq(0) for r in recent)]
        return m
