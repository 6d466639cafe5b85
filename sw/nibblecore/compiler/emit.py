"""Dependencies, order of the instruction stream, and semaphores.

1. :func:`dependencies` finds, for every instruction of the canonical order, the instructions of other engines that it
   must follow: read after write, write after read, write after write on buffers, accumulator banks and DRAM.
2. :func:`stream_order` orders the stream by the start times of an ideal execution, so that fetch never stands in front
   of a full queue while another engine waits for work.
3. :func:`synchronize` chooses waits and signals: no dependency is waited for that others already imply.

The result cannot deadlock. Every signal stands before its wait in the stream, and :func:`synchronize` keeps the number
of signals that are under way between two engines, counted in stream order, within the semaphore: so the earliest
unfinished instruction can always be fetched, start, finish and signal.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ..arch.config import ArchConfig
from ..arch.isa import Engine, Instruction, Opcode, make
from .access import accesses
from .cost import CostParameters, EngineClock, timing

ENGINES: Final = len(Engine)
Latest = tuple[int, ...]
"""Per engine, the number of its instructions that are known to be done."""


def _engine(i: Instruction) -> Engine:
    assert i.engine is not None
    return i.engine


def dependencies(instructions: Sequence[Instruction], arch: ArchConfig) -> list[list[int]]:
    """For each instruction, the latest instruction of each other engine that it must follow (canonical indices)."""
    # Per memory and engine, the last instruction that wrote, and that read, each word.
    last: dict[tuple[str, bool, Engine], npt.NDArray[np.int32]] = {}
    sizes: dict[str, int] = {}
    expanded = [accesses(i, arch) for i in instructions]
    for access_list in expanded:
        for a in access_list:
            sizes[a.memory] = max(sizes.get(a.memory, 0), int(a.words.max(initial=0)) + 1)
    result = []
    for index, (i, access_list) in enumerate(zip(instructions, expanded, strict=True)):
        engine = _engine(i)
        latest = dict.fromkeys(Engine, -1)
        for a in access_list:
            for other in Engine:
                if other is engine:
                    continue
                for write in (True, False) if a.write else (True,):
                    table = last.get((a.memory, write, other))
                    if table is not None:
                        latest[other] = max(latest[other], int(table[a.words].max(initial=-1)))
        for a in access_list:
            key = (a.memory, a.write, engine)
            if key not in last:
                last[key] = np.full(sizes[a.memory], -1, np.int32)
            last[key][a.words] = index
        result.append([latest[e] for e in Engine if latest[e] >= 0])
    return result


def stream_order(
    instructions: Sequence[Instruction], needed: Sequence[Sequence[int]], arch: ArchConfig, cost: CostParameters
) -> list[int]:
    """Canonical indices in stream order: by the start times that unlimited queues would allow.

    A topological order, in which each engine keeps its canonical order.
    """
    clocks = {e: EngineClock(e) for e in Engine}
    done = [0] * len(instructions)
    keys: list[tuple[int, int]] = []
    latest_start = dict.fromkeys(Engine, 0)
    for index, i in enumerate(instructions):
        ready = max((done[d] for d in needed[index]), default=0)
        engine = _engine(i)
        span = clocks[engine].run(ready + cost.issue, timing(i, arch, cost))
        done[index] = span.done
        latest_start[engine] = max(latest_start[engine], span.start)
        keys.append((latest_start[engine], index))
    return [index for _, index in sorted(keys)]


def synchronize(
    instructions: Sequence[Instruction], needed: Sequence[Sequence[int]], order: Sequence[int], arch: ArchConfig
) -> list[Instruction]:
    """Instructions in stream order with their wait and signal masks, END behind them."""
    edges = _coalesce(_reduce(instructions, needed, order), order, instructions, (1 << arch.semaphore_bits) - 1)
    waits: dict[int, set[Engine]] = {index: set() for index in order}
    signals: dict[int, set[Engine]] = {index: set() for index in order}
    for source, target in edges:
        waits[target].add(_engine(instructions[source]))
        signals[source].add(_engine(instructions[target]))
    result = []
    for index in order:
        i = instructions[index]
        masks = {"wait": sum(1 << e for e in waits[index]), "signal": sum(1 << e for e in signals[index])}
        result.append(Instruction(i.opcode, {**i.fields, **masks}))  # the linter encodes, and so checks, all of them
    return [*result, make(Opcode.END)]


def _reduce(
    instructions: Sequence[Instruction], needed: Sequence[Sequence[int]], order: Sequence[int]
) -> list[tuple[int, int]]:
    """Edges (source, target) that imply all needed ones; at most one per instruction and pair of engines.

    Walks the stream with, per instruction, how many instructions of each engine are done when it starts. Waits of an
    engine are in order, so an edge that goes back behind an earlier one of the same pair is always implied.
    """
    number: dict[int, int] = {}  # position in its engine, from 1
    count = [0] * ENGINES
    known_at: dict[int, list[int]] = {}  # per finished instruction, including itself
    before: list[list[int]] = [[0] * ENGINES for _ in Engine]  # per engine, known at its latest start
    edges: list[tuple[int, int]] = []
    for target in order:
        engine = _engine(instructions[target])
        known = before[engine]
        candidates = [d for d in needed[target] if number[d] > known[_engine(instructions[d])]]
        for d in candidates:
            source = _engine(instructions[d])
            implied = any(known_at[o][source] >= number[d] for o in candidates if o != d)
            if not implied:
                edges.append((d, target))
        for d in candidates:
            known = [max(a, b) for a, b in zip(known, known_at[d], strict=True)]
        before[engine] = known
        count[engine] += 1
        number[target] = count[engine]
        at_end = known.copy()
        at_end[engine] = count[engine]
        known_at[target] = at_end
    return edges


def _coalesce(
    edges: Sequence[tuple[int, int]], order: Sequence[int], instructions: Sequence[Instruction], limit: int
) -> list[tuple[int, int]]:
    """Keep the signals under way, in stream order, within ``limit`` per pair of engines.

    Where one more would not fit, the previous wait takes the new signal instead of its own: both signals stand before
    it, and the later one implies the earlier.
    """
    position = {index: place for place, index in enumerate(order)}
    by_pair: dict[tuple[Engine, Engine], list[tuple[int, int]]] = {}
    for source, target in edges:
        pair = (_engine(instructions[source]), _engine(instructions[target]))
        by_pair.setdefault(pair, []).append((source, target))
    result: list[tuple[int, int]] = []
    for pair_edges in by_pair.values():
        kept: deque[tuple[int, int]] = deque()  # under way
        for source, target in sorted(pair_edges, key=lambda e: position[e[0]]):
            while kept and position[kept[0][1]] < position[source]:
                result.append(kept.popleft())
            if len(kept) >= limit:
                target = kept.pop()[1]
            kept.append((source, target))
        result += kept
    return result
