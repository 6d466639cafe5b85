# amaranth: UnusedElaboratable=no
"""Processing elements and the array of them, after synthesis, against their models."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from nibblecore.arch.config import ELEMENT_WEIGHT_RANGE
from nibblecore.arch.elements import element_timing, tile_cycles
from nibblecore_hw.core.elements import ELEMENTS, DotElement

pytestmark = pytest.mark.cosim

Step = tuple[list[list[int]], list[int], bool, bool]
"""Words of activations, one per pixel; weights; load; swap."""


def pack(values: Sequence[int], bits: int = 4) -> int:
    return sum((value & (1 << bits) - 1) << bits * n for n, value in enumerate(values))


def unpack(word: int, bits: int, count: int) -> list[int]:
    fields = [word >> bits * n & (1 << bits) - 1 for n in range(count)]
    return [field - (1 << bits) * (field >> bits - 1) for field in fields]


def operands(rng: random.Random, low: int, high: int, lanes: int) -> list[int]:
    """Uniform, or extremes only, or one value in all lanes, or one lane that is not zero."""
    match rng.randrange(4):
        case 0:
            return [rng.choice((low, high)) for _ in range(lanes)]
        case 1:
            return [rng.choice((low, -1, 0, high))] * lanes
        case 2:
            place, value = rng.randrange(lanes), rng.randint(low, high)
            return [value if n == place else 0 for n in range(lanes)]
        case _:
            return [rng.randint(low, high) for _ in range(lanes)]


def steps(element: DotElement, rng: random.Random) -> list[Step]:
    """Pairs of extremes in all lanes, every pair of operands in a lane, then random ones, strobes rare and dense."""
    lanes, (low, high) = element.lanes, element.weight_range
    idle: Step = ([[0] * lanes] * element.pixels, [0] * lanes, False, False)
    found = []

    def use(weights: list[int], words: list[list[list[int]]]) -> None:
        """Load weights, wait until they may be swapped in, and multiply words with them."""
        found.append((idle[0], weights, True, False))
        found.extend([idle] * (element.load_cycles - 1))
        found.extend((word, [high] * lanes, False, n == 0) for n, word in enumerate(words))

    for w in (low, -1, 0, 1, high):
        use([w] * lanes, [[[a] * lanes] * element.pixels for a in (-8, -7, -1, 0, 1, 7)])
    for place, w in itertools.product((0, lanes - 1), range(low, high + 1)):
        alone = [w if n == place else 0 for n in range(lanes)]
        use(alone, [[[a] * lanes, [-1 - a] * lanes][: element.pixels] for a in range(-8, 8)])
    closed = 0
    for n in range(2400):
        often = (0.05, 0.5, 0.9)[n // 200 % 3]
        load, swap = (rng.random() < often and n >= closed for _ in range(2))
        if load:
            closed = n + element.load_cycles
        words = [operands(rng, -8, 7, lanes) for _ in range(element.pixels)]
        found.append((words, operands(rng, low, high, lanes), load, swap))
    return found


def first_difference(element: DotElement, stream: list[Step], outputs: list[dict[str, int]]) -> str:
    active: list[int] | None = [0] * element.lanes
    shadow = active
    bits = 8 + (element.lanes - 1).bit_length()
    compared = 0
    for n, (words, weights, load, swap) in enumerate(stream[: -element.latency]):
        active = shadow if swap else active
        got = unpack(outputs[n + element.latency]["sum"], bits, element.pixels)
        if active is not None:
            want = [element.model(word, active) for word in words]
            if got != want:
                return f"step {n}: {words} times {active} gives {got}, not {want}"
            compared += 1
        if load:
            shadow, active = weights, active if element.OVERLAPS else None
    assert compared > (2000 if element.OVERLAPS else 600)
    return ""


def play(bench: Any, kind: str, netlist: str, seed: int) -> str:
    element = bench.component(f"element_{kind}")
    stream = steps(element, random.Random(seed))
    outputs = bench.play(netlist, [
        {"activations": sum(pack(word) << 4 * element.lanes * p for p, word in enumerate(words)),
         "weights": pack(weights), "load_stb": load, "swap_stb": swap}
        for words, weights, load, swap in stream
    ])  # fmt: skip
    return first_difference(element, stream, outputs)


@pytest.mark.parametrize("kind", ELEMENTS)
def test_element(bench: Any, kind: str) -> None:
    assert play(bench, kind, f"element_{kind}", seed=1) == ""


def test_one_wrong_bit_of_a_table_is_found(bench: Any) -> None:
    assert "gives" in play(bench, "bitplane", "element_bitplane_mutant", seed=1)


@pytest.mark.parametrize("name", [*(f"array_{kind}" for kind in ELEMENT_WEIGHT_RANGE), "wide_array"])
def test_array(bench: Any, name: str) -> None:
    """Passes as short as they can be, a new tile each: every column is loaded while it multiplies, if it can be."""
    if name == "wide_array" and bench.device.family != "ecp5":
        pytest.skip("what is special about it is in carry chains of the ECP5")
    array = bench.component(name)
    arch = array._arch
    lanes, columns, passes, rng = arch.lanes, arch.columns, 40, random.Random(2)
    length, timing = tile_cycles(arch), element_timing(arch)
    works = length if timing.overlaps else (timing.fill_columns - 1) * timing.load_interval + 1
    low, high = arch.weight_range
    tiles = [[operands(rng, low, high, lanes) for _ in range(columns)] for _ in range(passes)]
    words = [operands(rng, -8, 7, lanes) for _ in range(passes * length)]
    start = length - 1  # the cycle of the first swap
    rows: list[dict[str, int]] = [{} for _ in range(start + len(words) + max(array.latencies) + 1)]
    for n, tile in enumerate(tiles):
        for column, weights in enumerate(tile):
            # From the cycle behind the swap of the tile before.
            rows[n * length + column * timing.load_interval] |= {
                "load_stb": 1, "column": column, "weights": pack(weights),
            }  # fmt: skip
    for pixel, word in enumerate(words):
        rows[start + pixel] |= {"activations": pack(word), "swap_stb": pixel % length == 0}
    outputs = bench.play(name, rows)
    bits = 8 + (lanes - 1).bit_length()
    for pixel, word in enumerate(words):
        if pixel % length >= works:
            continue  # the tables are being filled
        want = array.model(word, tiles[pixel // length])
        for column in range(columns):
            cycle = start + pixel + array.latencies[column // arch.post_lanes]
            got = unpack(outputs[cycle]["sums"], bits, columns)[column]
            assert got == want[column], f"pixel {pixel}, column {column}: {got}, not {want[column]}"
