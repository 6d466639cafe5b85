"""Allocation of the activation buffer and of DRAM scratch by lifetimes, and its independent check.

Time counts positions in the canonical order of operations. Two requests whose lifetimes overlap never share a word.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal

Kind = Literal["resident", "x", "y", "add"]

_CONFLICTS: Final = {frozenset(pair) for pair in (("x", "y"), ("x", "add"), ("y", "add"))}
"""Bands that different engines read at one time: MAC reads ``x``, the store ``y``, the post unit ``add``."""


@dataclasses.dataclass(frozen=True)
class Request:
    """``words`` needed from position ``start`` until before ``end``.

    Until ``soft_end`` the words had better not be reused, or engines wait for each other. ``kind`` says who reads.
    """

    name: str
    words: int
    start: int
    end: int
    soft_end: int = 0
    kind: Kind = "resident"


def overlaps(a: Request, b: Request) -> bool:
    """Whether both are needed at one time."""
    return a.start < b.end and b.start < a.end


def allocate(requests: Sequence[Request], depth: int, banks: int = 1) -> tuple[list[int], list[int]]:
    """First word of every request, and the indices of the requests that found no place (address -1).

    Long-lived requests go first, largest first; bands follow in the order of time. Among the places that are free, the
    one that shares the fewest banks with what others read at the same time wins, then the lowest.
    """
    bank_words = depth // banks
    addresses = [-1] * len(requests)
    failed: list[int] = []
    residents = [i for i, r in enumerate(requests) if r.kind == "resident"]
    bands = [i for i, r in enumerate(requests) if r.kind != "resident"]
    residents.sort(key=lambda i: (-requests[i].words, requests[i].start, i))
    bands.sort(key=lambda i: (requests[i].start, i))
    active: list[int] = []
    for i in residents + bands:
        r = requests[i]
        if r.kind == "resident":
            others = [j for j in residents if addresses[j] >= 0 and overlaps(r, requests[j])]
            soft: list[int] = []
        else:
            active = [j for j in active if max(requests[j].end, requests[j].soft_end) > r.start]
            others = [j for j in residents if addresses[j] >= 0 and overlaps(r, requests[j])]
            others += [j for j in active if overlaps(r, requests[j])]
            soft = [j for j in active if not overlaps(r, requests[j])]
        taken = sorted((addresses[j], addresses[j] + requests[j].words) for j in others)
        best: tuple[int, int] | None = None
        for address in _candidates(taken, r.words, depth, bank_words):
            penalty = 0
            for j in others:
                if "resident" in (r.kind, requests[j].kind) or frozenset((r.kind, requests[j].kind)) in _CONFLICTS:
                    penalty += _shared(address, r.words, addresses[j], requests[j].words, bank_words)
            for j in soft:
                first = max(address, addresses[j])
                penalty += 4 * max(0, min(address + r.words, addresses[j] + requests[j].words) - first)
            if best is None or (penalty, address) < best:
                best = (penalty, address)
        if best is None:
            failed.append(i)
            continue
        addresses[i] = best[1]
        if r.kind != "resident":
            active.append(i)
    return addresses, failed


def _candidates(taken: list[tuple[int, int]], words: int, depth: int, bank_words: int) -> list[int]:
    """Both ends of every gap that is large enough, and the bank boundaries inside."""
    result: list[int] = []
    first = 0
    for begin, end in [*taken, (depth, depth)]:
        if begin - first >= words:
            result += [first, begin - words]
            result += range(-(-first // bank_words) * bank_words, begin - words + 1, bank_words)
        first = max(first, end)
    return result


def _shared(a: int, a_words: int, b: int, b_words: int, bank_words: int) -> int:
    """Words of ``a`` in banks that ``b`` occupies too."""
    low = b // bank_words * bank_words
    high = -(-(b + b_words) // bank_words) * bank_words
    return max(0, min(a + a_words, high) - max(a, low))


def verify_allocation(requests: Sequence[Request], addresses: Sequence[int], depth: int) -> list[str]:
    """What is wrong with an allocation: places outside the memory and overlaps, one sentence each.

    Knows nothing of how it was made: plays the time line and marks words.
    """
    problems = []
    for r, address in zip(requests, addresses, strict=True):
        if r.words < 1 or r.end <= r.start:
            problems.append(f"{r.name} has {r.words} words from {r.start} to {r.end}")
        elif address < 0 or address + r.words > depth:
            problems.append(f"{r.name} lies at {address}..{address + r.words - 1}, outside 0..{depth - 1}")
    if problems:
        return problems
    events = [(r.end, 0, k) for k, r in enumerate(requests)] + [(r.start, 1, k) for k, r in enumerate(requests)]
    live: dict[int, tuple[int, int]] = {}
    for _, begins, k in sorted(events):
        if not begins:
            del live[k]
            continue
        low, high = addresses[k], addresses[k] + requests[k].words
        for other, (low_2, high_2) in live.items():
            if low < high_2 and low_2 < high:
                problems.append(
                    f"{requests[k].name} at {low}..{high - 1} overlaps {requests[other].name} at {low_2}..{high_2 - 1}"
                )
        live[k] = (low, high)
    return problems
