"""Cycle model of a core: closed forms per instruction, and a simulation of engines, queues and semaphores.

The execution model is that of :mod:`nibblecore.arch.isa`; what depends on the microarchitecture is gathered in
:class:`CostParameters`. The same model chooses tiles, orders the instruction stream and predicts the cycles of the
finished program.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..arch.config import ArchConfig
from ..arch.isa import INSTRUCTION_BYTES, Engine, Instruction, Opcode, OutputMode, engines_in

if TYPE_CHECKING:
    from ..runtime.program import Program

MODE_WORDS: Final = {OutputMode.INT4: 1, OutputMode.INT8: 2, OutputMode.RAW32: 8}
"""Words that POST writes per pixel and brick."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostParameters:
    """Cycles of the microarchitecture and of the memory behind it.

    Parameters
    ----------
    issue : int
        From an instruction's arrival in an empty queue, or from the last semaphore it waits for, to its start.
    signal : int
        From an engine's done pulse to the semaphore that others see.
    fetch_latency, fetch_overhead : int
        First instruction after start; cycles per instruction on top of its bus beats.
    mac_startup : int
        From the start of a MAC to its first pixel, the load of the first weight tile (``columns`` words) not counted.
        Hidden while the previous MAC still streams.
    mac_drain : int
        From a MAC's last pixel to its done pulse, hops from column group to column group not counted.
    acc_hazard : int
        Least cycles between two additions to one accumulator: the shortest pass.
    post_startup, post_drain : int
        Before the first and behind the last pixel of POST, the read of its records not counted.
    pool_startup : int
        Around POOL.
    load_latency, store_latency : int
        From the start of a transfer to its first beat, and behind its last one to the done pulse.
    burst_overhead : int
        Least cycles between the starts of two bursts of one transfer.
    transfers_overlap : bool
        Whether a LOAD's addresses are issued while the previous LOAD's data still arrive.
    """

    issue: int = 3
    signal: int = 1
    fetch_latency: int = 24
    fetch_overhead: int = 2
    mac_startup: int = 8
    mac_drain: int = 10
    acc_hazard: int = 8
    post_startup: int = 8
    post_drain: int = 12
    pool_startup: int = 12
    load_latency: int = 26
    store_latency: int = 26
    burst_overhead: int = 2
    transfers_overlap: bool = False


DEFAULT_COST: Final = CostParameters()


def transfer_cycles(arch: ArchConfig, rows: int, words: int, cost: CostParameters = DEFAULT_COST) -> int:
    """Data cycles of a DMA transfer of ``rows`` rows of ``words`` consecutive words each; latency not counted."""
    beats = -(-words * arch.word_bytes // arch.bus_bytes)
    bursts = -(-beats // arch.burst_beats)
    return rows * max(beats, bursts * cost.burst_overhead)


def pass_cycles(arch: ArchConfig, pixels: int, cost: CostParameters = DEFAULT_COST) -> int:
    """Cycles of one pass of a tile of ``pixels`` pixels: the next weight tile loads meanwhile."""
    return max(pixels, arch.columns, cost.acc_hazard)


def drain_cycles(arch: ArchConfig, pixels: int, bricks: int, mode: int, add_words: int) -> int:
    """Cycles of POST for ``pixels`` pixels without start and end; ``add_words`` are read per pixel and brick."""
    lanes = min(arch.columns, arch.lanes) * bricks
    return pixels * max(lanes // arch.post_lanes, MODE_WORDS[OutputMode(mode)] * bricks, add_words * bricks, 1)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Closed form of one instruction: it occupies its engine for ``busy`` cycles behind ``lead`` cycles that may be
    hidden behind the previous instruction, and is done ``tail`` cycles later."""

    lead: int
    busy: int
    tail: int


def timing(i: Instruction, arch: ArchConfig, cost: CostParameters = DEFAULT_COST) -> Timing:
    """Cycles of one instruction on an otherwise idle core."""
    if i.opcode is Opcode.MAC:
        passes = i["kernel_y"] * i["kernel_x"] * i["bricks"]
        hops = arch.columns // arch.post_lanes
        busy = passes * pass_cycles(arch, i["rows"] * i["cols"], cost)
        return Timing(cost.mac_startup + arch.columns, busy, cost.mac_drain + hops)
    if i.opcode is Opcode.POST:
        add_words = i["add"] * (1 + i["add_wide"])
        busy = drain_cycles(arch, i["rows"] * i["cols"], i["bricks"], i["mode"], add_words)
        return Timing(cost.post_startup + arch.param_words, busy, cost.post_drain)
    if i.opcode is Opcode.POOL:
        words = i["rows"] * i["cols"] * i["bricks"] * (1 + i["wide"])
        return Timing(0, words * i["kernel_y"] * i["kernel_x"], cost.pool_startup)
    rows = i["count1"] * i["count2"]
    busy = transfer_cycles(arch, rows, i["count0"], cost)
    if i.opcode is Opcode.LOAD:
        return Timing(cost.load_latency, busy, 1)
    return Timing(cost.store_latency // 2, busy, cost.store_latency // 2)


@dataclasses.dataclass(frozen=True)
class Span:
    """When an instruction started, and when it was done."""

    start: int
    done: int


class EngineClock:
    """When one engine, in order, starts and finishes instructions; shared by scheduler and simulation."""

    def __init__(self, engine: Engine, cost: CostParameters) -> None:
        self._overlaps = engine is Engine.MAC or (engine is Engine.LOAD and cost.transfers_overlap)
        self._accept = self._free = self._done = 0

    def run(self, ready: int, t: Timing) -> Span:
        """Execute an instruction whose command and semaphores are there at ``ready``."""
        start = max(ready, self._accept if self._overlaps else self._done)
        stream = max(start + t.lead, self._free)
        self._accept = stream  # one instruction ahead of the running one
        self._free = stream + t.busy
        self._done = max(self._free + t.tail, self._done + 1)
        return Span(start, self._done)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted execution of a program.

    Parameters
    ----------
    cycles : int
        From start to the end of the last instruction.
    spans : list of Span
        Per instruction; END ends when everything does.
    busy : dict[Engine, int]
        Cycles in which an engine streams data.
    layer_cycles : list[int]
        Cycles from the end of all earlier layers to the end of the layer: they add up to ``cycles``.
    layer_utilization : list[float]
        True nibble products of the layer over what the array could have done in ``layer_cycles``.
    utilization : float
        The same for the whole program.
    """

    cycles: int
    spans: list[Span]
    busy: dict[Engine, int]
    layer_cycles: list[int]
    layer_utilization: list[float]
    utilization: float

    def table(self, program: "Program") -> str:
        """One line per layer: cycles, share, MAC utilization, name."""
        lines = ["    cycles  share   util  layer"]
        for layer, cycles, use in zip(program.layers, self.layer_cycles, self.layer_utilization, strict=True):
            lines.append(f"{cycles:10d} {cycles / self.cycles:6.1%} {use:6.1%}  {layer.name} ({layer.op})")
        lines.append(f"{self.cycles:10d} 100.0% {self.utilization:6.1%}  {program.name}")
        return "\n".join(lines)


def simulate(instructions: Sequence[Instruction], arch: ArchConfig, cost: CostParameters = DEFAULT_COST) -> list[Span]:
    """Start and end of every instruction.

    One pass in stream order is exact, because in the compiler's programs every semaphore is signalled, and a full one
    freed, by an instruction earlier in the stream. Raises :class:`ValueError` where that is not so.
    """
    fetch_cycles = -(-INSTRUCTION_BYTES // arch.bus_bytes) + cost.fetch_overhead
    limit = (1 << arch.semaphore_bits) - 1
    clocks = {e: EngineClock(e, cost) for e in Engine}
    started: dict[Engine, list[int]] = {e: [] for e in Engine}
    tokens: dict[tuple[Engine, Engine], deque[int]] = {(a, b): deque() for a in Engine for b in Engine}
    taken: dict[tuple[Engine, Engine], list[int]] = {(a, b): [] for a in Engine for b in Engine}
    given = dict.fromkeys(tokens, 0)
    fetched, end = cost.fetch_latency, 0
    spans: list[Span] = []
    for index, i in enumerate(instructions):
        engine = i.engine
        if engine is None:
            spans.append(Span(fetched, max(end, fetched)))
            break
        queue = started[engine]
        if len(queue) >= arch.queue_depth:
            fetched = max(fetched, queue[-arch.queue_depth])
        ready = fetched
        for source in engines_in(i["wait"]):
            if not tokens[source, engine]:
                raise ValueError(f"instruction {index} waits for {source.name}, which nothing earlier signals")
            ready = max(ready, tokens[source, engine].popleft())
        span = clocks[engine].run(ready + cost.issue, timing(i, arch, cost))
        for source in engines_in(i["wait"]):
            taken[source, engine].append(span.start)
        for target in engines_in(i["signal"]):
            pair = (engine, target)
            done = span.done + cost.signal
            if given[pair] >= limit:
                if given[pair] - limit >= len(taken[pair]):
                    raise ValueError(f"instruction {index} overflows the semaphore towards {target.name}")
                done = max(done, taken[pair][given[pair] - limit])
            tokens[pair].append(done)
            given[pair] += 1
        queue.append(span.start)
        spans.append(span)
        end = max(end, span.done)
        fetched += fetch_cycles
    return spans


def estimate(program: "Program", cost: CostParameters = DEFAULT_COST) -> Estimate:
    """Predict the execution of a compiled program."""
    arch = program.arch
    spans = simulate(program.instructions, arch, cost)
    cycles = max(s.done for s in spans)
    busy = dict.fromkeys(Engine, 0)
    ends = [0] * len(program.layers)
    for i, span, layer in zip(program.instructions, spans, program.debug, strict=True):
        if i.engine is not None:
            busy[i.engine] += timing(i, arch, cost).busy
        if layer >= 0:
            ends[layer] = max(ends[layer], span.done)
    layer_cycles, before = [], 0
    for end in ends:
        layer_cycles.append(max(0, end - before))
        before = max(before, end)
    if layer_cycles:
        layer_cycles[-1] += cycles - before
    products = [layer.macs * layer.nibble_products for layer in program.layers]
    use = [p / (c * arch.macs_per_cycle) if c else 0.0 for p, c in zip(products, layer_cycles, strict=True)]
    return Estimate(cycles, spans, busy, layer_cycles, use, program.utilization(cycles))
