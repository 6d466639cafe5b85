"""Benches for Amaranth's simulator: streams with random stalls, a watchdog, waveforms on request.

A bench is an ``async`` function of the simulator's context. The usual test of a component with one stream in and one
out needs none of its own::

    for producer, consumer in STALLS:
        run = transfer(dut, items, count=len(items), producer=producer, consumer=consumer, seed=1)
        assert run.items == model(items)

The helpers wait by single ticks and never by ``tick().until()``: a bench left suspended in the latter makes Python 3.11
complain about a running generator when the simulation is over.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from amaranth.hdl import Const, Value
from amaranth.lib import data
from amaranth.sim import Simulator

from nibblecore.errors import SimulationError

__all__ = ["STALLS", "Bench", "Stalls", "Transfer", "get", "put", "receive", "send", "simulate", "transfer"]

Bench = Callable[[Any], Coroutine[Any, Any, None]]
"""An ``async`` function of the simulator's context."""

STALLS: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.1, 0.8), (0.8, 0.1))
"""Pairs (producer, consumer) of stall probabilities that every handshake should be crossed with."""

# What each bench waits for, for the watchdog's message.
_waiting: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


class Stalls:
    """Random pauses in runs of 1 to ``longest`` cycles, so that buffers fill and empty.

    Parameters
    ----------
    probability : float
        Share of cycles with a pause, at least 0 and below 1.
    seed : int
        The same seed makes the same pauses.
    longest : int
        Longest run, in cycles.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(self, probability: float, *, seed: int, longest: int = 16) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"probability must be at least 0 and below 1, not {probability!r}")
        if longest < 1:
            raise ValueError(f"longest must be at least 1, not {longest!r}")
        self.probability = probability
        self.random = random.Random(seed)
        self._lengths = (1, 1, 1, 2, 3, longest)
        self._left = 0
        self._pause = False

    def pause(self) -> bool:
        """Whether to pause in the next cycle."""
        if self._left == 0:
            self._pause = self.random.random() < self.probability
            self._left = min(self.random.choice(self._lengths), self._lengths[-1])
        self._left -= 1
        return self._pause


def simulate(
    dut: Any,
    *benches: Bench,
    background: Sequence[Bench] = (),
    checked: Iterable[Any] = (),
    max_cycles: int = 10_000,
    clocks: Mapping[str, float] | None = None,
    vcd: Path | None = None,
) -> int:
    """Run benches on a component until all have returned.

    Parameters
    ----------
    dut : Elaboratable
        What is simulated.
    benches : async functions
        The simulation ends when all of them have returned.
    background : sequence of async functions
        Run as long as the others do.
    checked : iterable of stream interfaces
        Outputs of ``dut`` that must keep the stream rule: once ``valid`` is high, it and the payload stay until
        ``ready`` is high too. (Streams of domain ``sync``.)
    max_cycles : int
        Watchdog, in cycles of the first clock.
    clocks : mapping, optional
        Period of each clock domain in seconds, ``{"sync": 1e-8}`` if not given. ``{}`` is for combinational
        components: their benches wait with ``await ctx.delay(1e-9)``, and there is no watchdog.
    vcd : Path, optional
        Write a waveform there.

    Returns
    -------
    int
        Cycles of the first clock until the last bench returned; 0 without a clock.

    Raises
    ------
    SimulationError
        If the benches have not returned after ``max_cycles``; it says what each of them waits for. Also if a checked
        stream breaks the stream rule.
    ValueError
        If there is no bench, or ``dut`` lacks one of the clock domains.
    """
    if not benches:
        raise ValueError("there is no bench to run")
    clocks = {"sync": 1e-8} if clocks is None else clocks
    simulator = Simulator(dut)
    for domain, period in clocks.items():
        try:
            simulator.add_clock(period, domain=domain)
        except NameError:
            raise ValueError(
                f"there is no clock domain {domain!r} in {type(dut).__name__}; "
                "a combinational component needs clocks={}"
            ) from None
    running: dict[str, Any] = {}
    cycles = 0
    begun = False
    failures: list[Exception] = []

    def wrapped(bench: Bench, name: str | None = None) -> Bench:
        async def run(ctx: Any) -> None:
            if name is not None:
                running[name] = ctx
            try:
                await bench(ctx)
            except Exception as error:
                # Raised from here before every bench has begun, it would leave coroutines that were never awaited,
                # which Python warns of: `begin` raises it.
                if begun:
                    raise
                failures.append(error)
            if name is not None:
                del running[name]

        return run

    async def begin(ctx: Any) -> None:
        nonlocal begun
        begun = True
        for error in failures:
            raise error

    async def watchdog(ctx: Any) -> None:
        nonlocal cycles
        for _ in range(max_cycles):
            await ctx.tick(next(iter(clocks)))
            cycles += 1
        stuck = "".join(f"\n    {name}: {_waiting.get(ctx, 'not in put or get')}" for name, ctx in running.items())
        raise SimulationError(f"the benches have not finished after {max_cycles} cycles:{stuck}")

    for index, bench in enumerate(benches):
        simulator.add_testbench(wrapped(bench, getattr(bench, "__name__", f"bench {index}")))
    for bench in [*background, *map(_stream_rule, checked), *([watchdog] if clocks else [])]:
        simulator.add_testbench(wrapped(bench), background=True)
    simulator.add_testbench(begin)
    with nullcontext() if vcd is None else simulator.write_vcd(str(vcd)):
        simulator.run()
    return cycles


async def put(ctx: Any, stream: Any, item: Any, *, domain: str = "sync") -> None:
    """Offer one item and wait until it is taken; at least one cycle.

    Parameters
    ----------
    ctx : SimulatorContext
        The bench's context.
    stream : stream interface
        An input of the component.
    item : int, dict, list
        The payload; a dict for a struct, a list for an array.

    Raises
    ------
    ValueError
        If the payload cannot hold the item (the simulator would truncate it silently).
    """
    ctx.set(stream.payload, item)
    if not _same(held := ctx.get(stream.payload), item):
        raise ValueError(f"{item!r} does not fit {_name(stream.payload)}, which holds {held!r} instead")
    if not isinstance(stream.valid, Const):
        ctx.set(stream.valid, 1)
    _waiting[ctx] = f"put waits for {_name(stream.ready)}"
    while True:
        _, _, ready = await ctx.tick(domain).sample(stream.ready)
        if ready:
            break
    del _waiting[ctx]
    if not isinstance(stream.valid, Const):
        ctx.set(stream.valid, 0)


async def get(ctx: Any, stream: Any, *, domain: str = "sync") -> Any:
    """Take one item from an output of the component: an int, or a ``data.Const`` that compares with dicts and lists."""
    return await _get(ctx, stream, None, domain)


async def _get(ctx: Any, stream: Any, stalls: Stalls | None, domain: str) -> Any:
    always_ready = isinstance(stream.ready, Const)
    _waiting[ctx] = f"get waits for {_name(stream.valid)}"
    while True:
        pause = not always_ready and stalls is not None and stalls.pause()
        if not always_ready:
            ctx.set(stream.ready, not pause)
        _, _, valid, payload = await ctx.tick(domain).sample(stream.valid, stream.payload)
        if valid and not pause:
            break
    del _waiting[ctx]
    if not always_ready:
        ctx.set(stream.ready, 0)
    return payload


async def send(
    ctx: Any, stream: Any, items: Iterable[Any], *, stalls: Stalls | None = None, domain: str = "sync"
) -> None:
    """:func:`put` every item, with pauses in between in which the payload holds random bits."""
    for item in items:
        while stalls is not None and stalls.pause():
            bits = Value.cast(stream.payload)
            ctx.set(bits, stalls.random.getrandbits(len(bits)) if len(bits) else 0)
            await ctx.tick(domain)
        await put(ctx, stream, item, domain=domain)


async def receive(
    ctx: Any, stream: Any, count: int, *, stalls: Stalls | None = None, domain: str = "sync"
) -> list[Any]:
    """:func:`get` so many items, with ``ready`` low in the cycles that ``stalls`` pauses."""
    return [await _get(ctx, stream, stalls, domain) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What :func:`transfer` saw: the items that came out, and the cycles it took."""

    items: list[Any]
    cycles: int


def transfer(
    dut: Any,
    items: Iterable[Any],
    *,
    count: int,
    producer: float = 0.0,
    consumer: float = 0.0,
    seed: int,
    i: str = "i",
    o: str = "o",
    extra: int = 4,
    max_cycles: int | None = None,
    vcd: Path | None = None,
) -> Transfer:
    """Send items through a component with a stream in and a stream out, both in domain ``sync``.

    Parameters
    ----------
    dut : wiring.Component
        Its stream members are named by ``i`` and ``o``.
    items : iterable
        Payloads for the input.
    count : int
        How many items must come out.
    producer, consumer : float
        Stall probabilities of each side, see :data:`STALLS`.
    seed : int
        Seed of the stalls.
    extra : int
        Cycles, after the last item has come out, in which no other may.
    max_cycles : int, optional
        Watchdog; if not given, generous for one item per cycle and these stalls.

    Raises
    ------
    SimulationError
        If the items do not come out, more come out, or the output breaks the stream rule.
    """
    items = list(items)
    if max_cycles is None:
        max_cycles = 1000 + int(20 * (len(items) + count) / (1 - max(producer, consumer)))
    received: list[Any] = []

    async def produce(ctx: Any) -> None:
        await send(ctx, getattr(dut, i), items, stalls=Stalls(producer, seed=seed))

    async def consume(ctx: Any) -> None:
        stream = getattr(dut, o)
        received.extend(await receive(ctx, stream, count, stalls=Stalls(consumer, seed=seed + 1)))
        for _ in range(extra):
            _, _, valid, payload = await ctx.tick().sample(stream.valid, stream.payload)
            if valid:
                raise SimulationError(f"{o} has {payload!r} after the {count} items that were expected (seed {seed})")

    cycles = simulate(dut, produce, consume, checked=[getattr(dut, o)], max_cycles=max_cycles, vcd=vcd)
    return Transfer(items=received, cycles=cycles - extra)


def _stream_rule(stream: Any) -> Bench:
    async def check(ctx: Any) -> None:
        offered = None
        while True:
            _, reset, valid, ready, bits = await ctx.tick().sample(
                stream.valid, stream.ready, Value.cast(stream.payload)
            )
            if offered is not None and not reset:
                if not valid:
                    raise SimulationError(f"{_name(stream.valid)} fell before the item was taken")
                if bits != offered:
                    raise SimulationError(
                        f"{_name(stream.payload)} changed from {offered:#x} to {bits:#x} before the item was taken"
                    )
            offered = bits if valid and not ready and not reset else None

    return check


def _same(held: Any, item: Any) -> bool:
    if isinstance(held, data.Const):
        if isinstance(item, Mapping):
            return all(_same(held[name], value) for name, value in item.items())
        if isinstance(item, Sequence):
            return all(_same(held[index], value) for index, value in enumerate(item))
    return bool(held == item)


def _name(signal: Any) -> str:
    value = Value.cast(signal)
    return str(getattr(value, "name", value))
