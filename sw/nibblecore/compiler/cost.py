"""Cycle model of a core: closed forms per instruction, and a simulation of engines, queues and semaphores.

The execution model is that of :mod:`nibblecore.arch.isa`; what depends on the microarchitecture is gathered in
:class:`CostParameters`. The same model chooses tiles, orders the instruction stream and predicts the cycles of the
finished program.
"""

import bisect
import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from ..arch.config import ArchConfig
from ..arch.elements import swap_cycles, tile_cycles
from ..arch.isa import INSTRUCTION_BYTES, Engine, Instruction, LoadTarget, Opcode, OutputMode, engines_in

if TYPE_CHECKING:
    from ..runtime.program import Program

MODE_WORDS: Final = {OutputMode.INT4: 1, OutputMode.INT8: 2, OutputMode.RAW32: 8}
"""Words that POST writes per pixel and brick."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostParameters:
    """Cycles of the microarchitecture and of the memory behind it.

    The figures are those that the hardware units state for themselves (``nibblecore_hw``, docstrings and ``cycles()``),
    counted from the cycle in which an engine is offered its instruction.

    Parameters
    ----------
    issue : int
        From an instruction's arrival in an empty queue, or from the done pulse that it waits for, to its offer.
    fetch_start, fetch_interval : int
        From start to the first request; per instruction on top of its bus beats.
    mac_start : int
        Least cycles before a MAC's first pixel; the first weight tile takes ``tile_cycles``.
    mac_prefetch : bool
        Whether the first tile of a MAC is fetched while the MAC before still streams; if not, ``tile_cycles`` pass
        between the two.
    mac_drain : int
        From a MAC's last pixel to its done pulse, one hop per further column group not counted.
    mac_drain_dsp : int
        What ``dsp`` elements add to it.
    mac_drain_levels : int
        What a register behind every adder adds to it (``adder_levels=1``).
    acc_hazard : int
        Shortest pass.
    post_start, post_end, post_end_add, post_end_raw : int
        Before the first pixel of POST, the read of its records not counted; behind the last one; the same with a stored
        operand, whose codes take two passes through the lanes; the same for RAW32.
    pool_overhead : int
        Of POOL, before and after.
    load_start, load_end : int
        Before the first address of a LOAD; behind its last beat.
    store_start, store_end : int
        Before the first beat of a STORE; behind its last response.
    store_word : int
        Per word of a STORE, in a core without queues.
    sequential_drain : int
        From a MAC's last word to its done pulse, in a core without queues.
    read_latency, write_latency : int
        Of the memory: from an address to its first beat; from the last beat of a write to its response.
    burst_interval : int
        Least cycles between two addresses of one engine.
    """

    issue: int = 2
    fetch_start: int = 9
    fetch_interval: int = 3
    mac_start: int = 5
    mac_prefetch: bool = True
    mac_drain: int = 13
    mac_drain_dsp: int = 4
    mac_drain_levels: int = 3
    acc_hazard: int = 4
    post_start: int = 10
    post_end: int = 17
    post_end_add: int = 25
    post_end_raw: int = 8
    pool_overhead: int = 16
    load_start: int = 5
    load_end: int = 2
    store_start: int = 12
    store_end: int = 1
    store_word: int = 3
    sequential_drain: int = 3
    read_latency: int = 20
    write_latency: int = 20
    burst_interval: int = 2


DEFAULT_COST: Final = CostParameters()


def transfer_cycles(arch: ArchConfig, rows: int, words: int, cost: CostParameters = DEFAULT_COST) -> int:
    """Data cycles of a DMA transfer of ``rows`` rows of ``words`` consecutive words each; latency not counted."""
    beats = -(-words * arch.word_bytes // arch.bus_bytes)
    bursts = -(-beats // arch.burst_beats)
    return rows * max(beats, bursts * cost.burst_interval)


def pass_cycles(arch: ArchConfig, pixels: int, cost: CostParameters = DEFAULT_COST) -> int:
    """Cycles of one pass of a tile of ``pixels`` pixels, to the first one of the next pass with its weight tile.

    That tile loads meanwhile, or behind the last pixel where elements have only one table.
    """
    return max(free_pass_cycles(arch, pixels, cost), swap_cycles(arch, pixels))


def free_pass_cycles(arch: ArchConfig, pixels: int, cost: CostParameters = DEFAULT_COST) -> int:
    """:func:`pass_cycles` if weights were loaded in no time: what is more is lost to loading."""
    if arch.sequential:
        return pixels * arch.columns  # which take turns, with weights that are read for every pixel
    # Elements that take pixels in pairs do not mix those of two passes.
    return max(pixels + (pixels % 2 if arch.paired_columns else 0), cost.acc_hazard)


def mac_gap(arch: ArchConfig, cost: CostParameters = DEFAULT_COST) -> int:
    """Cycles between the last pixel's slot of one MAC and the first pixel of the next."""
    return 0 if cost.mac_prefetch or arch.sequential else tile_cycles(arch)


def record_cycles(arch: ArchConfig, pixels: int, cost: CostParameters = DEFAULT_COST) -> int:
    """Cycles that a MAC whose passes have ``pixels`` pixels waits while the records of a POST are read.

    Their words take every second cycle of the port over which weight tiles come; a tile that needs less than half of
    its pass does not notice.
    """
    share = tile_cycles(arch) / pass_cycles(arch, pixels, cost)
    return max(0, round(arch.param_words * (2 * share - 1)))


def drain_cycles(arch: ArchConfig, pixels: int, bricks: int, mode: int, add_words: int) -> int:
    """Cycles of POST for ``pixels`` pixels without start and end; ``add_words`` are read per pixel and brick.

    Lanes take each code twice where something is added to it.
    """
    columns = min(arch.columns, arch.lanes)
    if mode == OutputMode.RAW32:
        return pixels * bricks * max(1, MODE_WORDS[OutputMode.RAW32] * columns // arch.lanes)
    return pixels * bricks * max(columns // arch.post_lanes * (2 if add_words else 1), MODE_WORDS[OutputMode(mode)])


def sequential_post_cycles(i: Instruction, arch: ArchConfig) -> int:
    """Cycles of POST and POOL in a core without queues, to their done pulse, with every tap of a POOL inside the map.

    There is one address after the other, one column after the other: what a loop costs that moves on is the number of
    places in memory that have to be looked at and written. A code takes 5 cycles, with a stored operand 9; a tap takes
    one per lane and word.
    """
    is_pool = i.opcode is Opcode.POOL
    rows, cols = i["rows"], i["cols"]
    bricks = i["bricks"] if is_pool or arch.bricks_per_tile > 1 else 1
    words = rows * cols * bricks
    start, row, pixel, brick = (24, 24, 20, 16) if is_pool else (12, 8, 6, 4)
    total = 1 + start + (rows - 1) * row + rows * (cols - 1) * pixel + rows * cols * (bricks - 1) * brick
    if is_pool:
        kernel_y, kernel_x, planes = i["kernel_y"], i["kernel_x"], 1 + i["wide"]
        taps = kernel_y * kernel_x
        moves = 9 * (kernel_y - 1) + 4 * kernel_y * (kernel_x - 1)
        return total + words * (moves + taps * (2 + planes * (1 + arch.lanes)) + planes + 1)
    columns = min(arch.lanes, arch.columns)
    total += 3 * arch.param_words
    if i["mode"] == OutputMode.RAW32:
        return total + words * (2 + 3 * columns)
    code, operand = (9, 2 * (1 + i["add_wide"])) if i["add"] else (5, 0)
    return total + words * (operand + code * columns + 3 + MODE_WORDS[OutputMode(i["mode"])])


@dataclasses.dataclass(frozen=True)
class Timing:
    """Closed form of one instruction.

    ``lead`` cycles behind its offer it occupies its engine's data path for ``busy`` cycles, and is done ``tail`` cycles
    later. Engines that take instructions ahead hide the lead behind the instruction before, but for ``gap``.
    """

    lead: int
    busy: int
    tail: int
    gap: int = 0


def timing(i: Instruction, arch: ArchConfig, cost: CostParameters = DEFAULT_COST) -> Timing:
    """Cycles of one instruction on an otherwise idle core."""
    if i.opcode is Opcode.MAC and arch.sequential:
        passes = i["kernel_y"] * i["kernel_x"] * i["bricks"]
        return Timing(1, passes * pass_cycles(arch, i["rows"] * i["cols"], cost), cost.sequential_drain)
    if i.opcode in (Opcode.POST, Opcode.POOL) and arch.sequential:
        return Timing(0, sequential_post_cycles(i, arch), 0)
    if i.opcode is Opcode.MAC:
        pixels, passes = i["rows"] * i["cols"], i["kernel_y"] * i["kernel_x"] * i["bricks"]
        busy = passes * pass_cycles(arch, pixels, cost)
        idle = pass_cycles(arch, pixels, cost) - pixels  # behind the last pixel of the last pass
        late = cost.mac_drain_dsp if arch.paired_columns else 0
        if arch.adder_levels == 1 and arch.element not in ("generic", "dsp"):
            late = max(late, cost.mac_drain_levels)  # `dsp` elements are the last columns, the others the first ones
        tail = cost.mac_drain + late + arch.columns // arch.post_lanes - 2 - idle
        gap = mac_gap(arch, cost) + record_cycles(arch, pixels, cost)
        return Timing(max(cost.mac_start, tile_cycles(arch)), busy, tail, gap)
    if i.opcode is Opcode.POST:
        add_words = i["add"] * (1 + i["add_wide"])
        busy = drain_cycles(arch, i["rows"] * i["cols"], i["bricks"], i["mode"], add_words)
        end = cost.post_end_add if i["add"] else cost.post_end
        if i["mode"] == OutputMode.RAW32:
            end = cost.post_end_raw
        return Timing(cost.post_start + arch.param_words, busy, end)
    if i.opcode is Opcode.POOL:
        words = i["rows"] * i["cols"] * i["bricks"] * (1 + i["wide"])
        return Timing(0, words * i["kernel_y"] * i["kernel_x"], cost.pool_overhead)
    busy = transfer_cycles(arch, i["count1"] * i["count2"], i["count0"], cost)
    if arch.sequential:
        # One burst at a time; a word of a STORE is read from the buffer before the next one is.
        bursts = i["count1"] * i["count2"] * -(-i["count0"] // arch.burst_beats)
        words = i["count0"] * i["count1"] * i["count2"]
        if i.opcode is Opcode.LOAD:
            return Timing(2, words + bursts * (cost.read_latency + 3), 2)
        return Timing(2, words * cost.store_word + bursts * (cost.write_latency + 3), 2)
    if i.opcode is Opcode.LOAD:
        return Timing(cost.load_start + cost.read_latency, busy, cost.load_end)
    return Timing(cost.store_start, busy, cost.write_latency + cost.store_end)


@dataclasses.dataclass(frozen=True)
class Span:
    """When an instruction started, when its data began to stream, and when it was done."""

    start: int
    stream: int
    done: int


class EngineClock:
    """When one engine, in order, starts and finishes instructions; shared by scheduler and simulation."""

    def __init__(self, engine: Engine) -> None:
        # MAC and the DMAs take the next instruction while the data of the one before still stream.
        self._overlaps = engine is not Engine.POST
        self._accept = self._free = self._done = 0

    def run(self, ready: int, t: Timing) -> Span:
        """Execute an instruction that is offered at ``ready``, its semaphores being there."""
        start = max(ready, self._accept if self._overlaps else self._done)
        stream = max(start + t.lead, self._free + t.gap)
        self._accept = stream  # one instruction ahead of the running one
        self._free = stream + t.busy
        self._done = max(self._free + t.tail, self._done + 1)
        return Span(start, stream, self._done)


def stolen_words(i: Instruction, arch: ArchConfig, pixels: int) -> float:
    """Accesses that a MAC of ``pixels`` pixels per tile loses to instruction ``i`` while it runs.

    In memories with a single port every other engine wins over MAC: one lost pixel per access to the activation
    buffer; one lost column per word of weights, where a pass leaves no slack. Dual-port banks lose next to nothing, as
    the allocator keeps apart what is read at one time.
    """
    if arch.sequential:
        return 0.0
    if i.opcode is Opcode.LOAD and i["target"] == LoadTarget.WEIGHTS:
        slack = min(1.0, arch.columns / max(1, pixels))
        return i["count0"] * slack if arch.weight_memory == "single" else 0.0
    if arch.act_memory != "single" or i.opcode is Opcode.MAC:
        return 0.0
    if i.opcode is Opcode.POST:
        words = MODE_WORDS[OutputMode(i["mode"])] + i["add"] * (1 + i["add_wide"])
        if i["mode"] == OutputMode.RAW32:
            words = max(1, words // arch.parts_per_brick)
        return i["rows"] * i["cols"] * i["bricks"] * words / arch.act_banks
    if i.opcode is Opcode.POOL:
        taps = i["kernel_y"] * i["kernel_x"]
        return i["rows"] * i["cols"] * i["bricks"] * (1 + i["wide"]) * (taps + 1) / arch.act_banks
    return i["count0"] * i["count1"] * i["count2"] / arch.act_banks


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

    Where memories have a single port, what MACs lose is taken from a first simulation without losses.

    Raises :class:`ValueError` for a program whose semaphores are not signalled, or not freed, in stream order.
    """
    spans = _simulate(instructions, arch, cost, {})
    if "single" in (arch.act_memory, arch.weight_memory):
        for _ in range(2):
            spans = _simulate(instructions, arch, cost, _losses(instructions, spans, arch))
    return spans


def _losses(instructions: Sequence[Instruction], spans: Sequence[Span], arch: ArchConfig) -> dict[int, int]:
    """Cycles that each MAC loses to instructions that stream at the same time, by its index."""
    rivals = [(s, i) for s, i in zip(spans, instructions, strict=True) if i.engine not in (None, Engine.MAC)]
    rivals.sort(key=lambda r: r[0].stream)
    longest = max((s.done - s.stream for s, _ in rivals), default=0)
    starts = [s.stream for s, _ in rivals]
    result = {}
    for index, (span, i) in enumerate(zip(spans, instructions, strict=True)):
        if i.engine is not Engine.MAC:
            continue
        lost = 0.0
        first, last = bisect.bisect_left(starts, span.stream - longest), bisect.bisect_left(starts, span.done)
        for other, rival in rivals[first:last]:
            overlap = min(span.done, other.done) - max(span.stream, other.stream)
            if overlap > 0:
                words = stolen_words(rival, arch, i["rows"] * i["cols"])
                lost += words * overlap / max(1, other.done - other.stream)
        result[index] = round(lost)
    return result


def _simulate(
    instructions: Sequence[Instruction], arch: ArchConfig, cost: CostParameters, losses: Mapping[int, int]
) -> list[Span]:
    """Start and end of every instruction; MACs take as many more cycles as ``losses`` says.

    One pass in stream order is exact, because in the compiler's programs every semaphore is signalled, and a full one
    freed, by an instruction earlier in the stream. Raises :class:`ValueError` where that is not so.
    """
    fetch_cycles = max(1, INSTRUCTION_BYTES // arch.bus_bytes) + cost.fetch_interval
    limit = (1 << arch.semaphore_bits) - 1
    clocks = {e: EngineClock(e) for e in Engine}
    started: dict[Engine, list[int]] = {e: [] for e in Engine}
    tokens: dict[tuple[Engine, Engine], deque[int]] = {(a, b): deque() for a in Engine for b in Engine}
    taken: dict[tuple[Engine, Engine], list[int]] = {(a, b): [] for a in Engine for b in Engine}
    given = dict.fromkeys(tokens, 0)
    fetched, end = cost.fetch_start + cost.read_latency + fetch_cycles, 0
    spans: list[Span] = []
    for index, i in enumerate(instructions):
        engine = i.engine
        if engine is None:
            spans.append(Span(fetched, fetched, max(end, fetched)))
            break
        queue = started[engine]
        if not arch.sequential and len(queue) >= arch.queue_depth:
            fetched = max(fetched, queue[-arch.queue_depth])
        if arch.sequential and index:
            # It is asked for when the one before is done.
            fetched = max(fetched, end + cost.fetch_start + cost.read_latency + fetch_cycles)
        ready = fetched
        for source in engines_in(i["wait"]):
            if not tokens[source, engine]:
                raise ValueError(f"instruction {index} waits for {source.name}, which nothing earlier signals")
            ready = max(ready, tokens[source, engine].popleft())
        t = timing(i, arch, cost)
        if lost := losses.get(index, 0):
            t = dataclasses.replace(t, busy=t.busy + lost)
        span = clocks[engine].run(ready + cost.issue, t)
        for source in engines_in(i["wait"]):
            taken[source, engine].append(span.start)
        for target in engines_in(i["signal"]):
            pair = (engine, target)
            done = span.done
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
