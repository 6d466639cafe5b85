"""Sites of block RAM: what belongs together comes together, whatever the cells are called."""

import itertools
import random
from collections import defaultdict
from typing import Any

import pytest

from nibblecore_hw.synth.devices import DEVICES
from nibblecore_hw.synth.floorplan import Site, assign_sites

SITES = {"DP16KD": [Site(9 * x, 24 * y, f"X{9 * x}/Y{24 * y}/EBR0") for x in range(8) for y in range(2)]}


def clusters(count: int, blocks: int, rng: random.Random) -> dict[str, Any]:
    """``count`` groups of ``blocks`` block RAMs, each of which shares 20 flip-flops with every other of its group."""
    bits = itertools.count(2)
    cells: dict[str, Any] = {}
    for group in range(count):
        connections: dict[int, dict[str, list[int]]] = {block: defaultdict(list) for block in range(blocks)}
        for n, (a, b) in enumerate(itertools.combinations(range(blocks), 2)):
            for register in range(20):
                d, q = next(bits), next(bits)
                cells[f"{group}.r{n}_{register}"] = {"type": "TRELLIS_FF", "connections": {"D": [d], "Q": [q]}}
                connections[a]["DOA"].append(d)
                connections[b]["ADB"].append(q)
        for block in range(blocks):
            wires = {**connections[block], "CLKA": [0], "WEA": ["1"]}
            cells[f"{group}.ram{block}"] = {"type": "DP16KD", "connections": wires}
    names = list(cells)
    rng.shuffle(names)
    return {name: cells[name] for name in names}


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_a_group_are_neighbours(seed: int) -> None:
    cells = clusters(4, 4, random.Random(seed))
    chosen = assign_sites(cells, SITES, seed=seed)
    assert set(chosen) == {name for name, cell in cells.items() if cell["type"] == "DP16KD"}
    assert len(set(chosen.values())) == 16, "two blocks on one site"
    at = {site.bel: site for site in SITES["DP16KD"]}
    for group in range(4):
        places = [at[chosen[f"{group}.ram{block}"]] for block in range(4)]
        spans = [max(values) - min(values) for values in ([p.x for p in places], [p.y for p in places])]
        assert sum(spans) <= 9 + 24, f"group {group} is neither a row nor a square: {places}"


def test_the_same_seed_gives_the_same() -> None:
    cells = clusters(2, 3, random.Random(0))
    assert assign_sites(cells, SITES, seed=1, starts=2) == assign_sites(cells, SITES, seed=1, starts=2)


def test_more_blocks_than_sites_and_none_are_left_to_the_placer() -> None:
    assert assign_sites(clusters(5, 4, random.Random(0)), SITES, seed=0, starts=1) == {}
    assert assign_sites({"r": {"type": "TRELLIS_FF", "connections": {"D": [2], "Q": [3]}}}, SITES, seed=0) == {}


def test_a_block_without_wires_gets_a_site() -> None:
    cells = {"ram": {"type": "DP16KD", "connections": {"WEA": ["0"]}}}
    assert list(assign_sites(cells, SITES, seed=0)) == ["ram"]


@pytest.mark.parametrize("name", [name for name, device in DEVICES.items() if device.family == "ecp5"])
def test_there_are_as_many_sites_as_blocks(name: str) -> None:
    device = DEVICES[name]
    assert len({site.bel for site in device.sites["DP16KD"]}) == device.bram
    assert len({site.bel for site in device.sites["MULT18X18D"]}) == device.dsp
