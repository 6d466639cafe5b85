"""Allocation by lifetimes, and the verifier that does not know how it was made."""

import numpy as np
import pytest

from nibblecore.compiler.memory import Kind, Request, allocate, overlaps, verify_allocation


@pytest.mark.parametrize("seed", range(10))
def test_random_requests_never_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds: tuple[Kind, ...] = ("resident", "x", "y", "add")
    requests = []
    for k in range(60):
        start, kind = int(rng.integers(0, 200)), kinds[int(rng.integers(4))]
        end = start + int(rng.integers(1, 40 if kind == "resident" else 8))
        requests.append(Request(f"r{k}", int(rng.integers(1, 40)), start, end, end + 3, kind))
    addresses, failed = allocate(requests, 256, 4)
    placed = [k for k in range(60) if k not in failed]
    assert verify_allocation([requests[k] for k in placed], [addresses[k] for k in placed], 256) == []
    for k in failed:  # no place, indeed: the others leave no gap
        assert addresses[k] == -1
    assert len(placed) > 40, f"seed {seed}: {len(failed)} found no place"


def test_a_lifetime_ends_before_the_next_one_begins() -> None:
    a, b, c = Request("a", 8, 0, 4), Request("b", 8, 4, 6), Request("c", 8, 3, 5)
    assert not overlaps(a, b)
    assert overlaps(a, c)
    addresses, failed = allocate([a, b], 8)
    assert (addresses, failed) == ([0, 0], [])
    assert allocate([a, c], 8)[1] == [1]


def test_what_is_read_at_one_time_lies_in_different_banks() -> None:
    x, y = Request("x", 16, 0, 4, kind="x"), Request("y", 16, 1, 5, kind="y")
    addresses, _ = allocate([x, y], 256, 4)
    assert addresses[0] // 64 != addresses[1] // 64


def test_words_rest_where_there_is_room() -> None:
    first, second = Request("y0", 16, 0, 4, 8, "y"), Request("y1", 16, 4, 8, 12, "y")
    low, high = sorted(allocate([first, second], 64)[0])
    assert high - low >= 16
    assert allocate([first, second], 16)[0] == [0, 0]


def test_the_verifier_finds_planted_overlaps() -> None:
    a, b = Request("a", 8, 0, 4), Request("b", 8, 3, 5)
    assert verify_allocation([a, b], [0, 8], 16) == []
    assert verify_allocation([a, b], [0, 7], 16) == ["b at 7..14 overlaps a at 0..7"]
    assert verify_allocation([a, b], [0, 9], 16) == ["b lies at 9..16, outside 0..15"]
    assert verify_allocation([Request("c", 0, 3, 3)], [0], 16) == ["c has 0 words from 3 to 3"]
    rng = np.random.default_rng(1)
    requests = [Request(f"r{k}", 4, k, k + 3) for k in range(50)]
    addresses, failed = allocate(requests, 64)
    assert not failed
    for _ in range(20):  # move one request onto a neighbour in time
        k = int(rng.integers(1, 50))
        moved = [*addresses[:k], addresses[k - 1] + int(rng.integers(-3, 4)), *addresses[k + 1 :]]
        assert verify_allocation(requests, moved, 64)
