# amaranth: UnusedElaboratable=no
"""Buffers as block RAM and SPRAM: every port busy in every cycle, and never a word read while it is written."""

import random
from typing import Any

import pytest

from nibblecore_hw.layouts import LAST_READ_LATENCY, READ_LATENCY
from nibblecore_hw.mem.buffer import BankedBuffer

pytestmark = pytest.mark.cosim


def accesses(
    dut: BankedBuffer, rng: random.Random, *, collide: bool
) -> tuple[list[dict[str, int]], list[tuple[int, int, int]], int, int]:
    """Inputs of every cycle; ``(cycle, reader, word)`` that are to be seen; how often a bank, and how often a word, was
    read and written at one edge."""
    # The first cycles write every word; then ports crowd in a few places, so that banks are shared in most cycles.
    memory = [0] * dut.depth
    few = [rng.randrange(dut.depth) for _ in range(24)]
    part_bits = dut.word_bits // dut.parts
    rows, wanted, shared, collisions = [], [], 0, 0
    recent: set[int] = set()
    last_read = -1

    def bank(addr: int) -> int:
        return addr * dut.banks // dut.depth

    for cycle in range(dut.depth + 4500):
        row: dict[str, int] = {}
        last_read = last_read if cycle % 3 == 1 else -1
        granted: dict[int, tuple[int, int, int]] = {}
        for j in range(dut.writers):
            filling = cycle < dut.depth
            addr = cycle if filling else rng.choice([a for a in few if a != last_read])
            valid = (filling and j == 0) or (not filling and rng.random() < 0.6)
            word, mask = rng.getrandbits(dut.word_bits), (1 << dut.parts) - 1 if filling else rng.getrandbits(dut.parts)
            row |= {f"writes__{j}__valid": valid, f"writes__{j}__addr": addr, f"writes__{j}__data": word}
            row[f"writes__{j}__mask"] = mask
            if valid and bank(addr) not in granted:
                granted[bank(addr)] = (addr, word, mask)
        # One reader in three cycles: no other one delays it, and it is not where words were just written or will be.
        if cycle % 3 == 0 and cycle > dut.depth:
            i = dut.readers - 1
            addr = rng.choice(few)
            here = bank(addr) in granted
            written = here and granted[bank(addr)][0] == addr
            blocked = addr in recent or (written and not collide) or (here and dut.kind == "single")
            if not blocked:
                row |= {f"reads__{i}__valid": True, f"reads__{i}__addr": addr}
                wanted.append((cycle, i, memory[addr]))
                shared += here and granted[bank(addr)][2] != 0
                collisions += written and granted[bank(addr)][2] != 0
                last_read = addr
        recent = {addr for addr, _, _ in granted.values()}
        rows.append(row)
        for addr, word, mask in granted.values():
            for p in range(dut.parts):
                if mask >> p & 1:
                    field = ((1 << part_bits) - 1) << p * part_bits
                    memory[addr] = memory[addr] & ~field | word & field
    return rows + [{}] * READ_LATENCY, wanted, shared, collisions


def differences(bench: Any, name: str, *, collide: bool = False) -> tuple[int, int, int]:
    """Words that are not what was last written; reads of a bank, and of a word, that is written at the same edge."""
    dut = bench.component(name)
    rows, wanted, shared, collisions = accesses(dut, random.Random(3), collide=collide)
    outputs = bench.play(name, rows)
    assert len(wanted) > 200
    latencies = [READ_LATENCY] * (dut.readers - 1) + [LAST_READ_LATENCY]
    wrong = sum(outputs[c + latencies[i]][f"reads__{i}__data"] != word for c, i, word in wanted)
    return wrong, shared, collisions


@pytest.mark.parametrize("name", ["buffer_words"])
def test_words_are_what_was_written(bench: Any, name: str) -> None:
    if name not in bench.player.netlists:
        pytest.skip(f"{bench.device.name} has no memory of one port")
    cells = bench.player.netlists[name].cells
    ram = {"ecp5": "DP16KD", "ice40": "SB_SPRAM256KA" if name == "buffer_single" else "SB_RAM40_4K"}
    assert cells[ram[bench.device.family]] >= 1
    wrong, shared, collisions = differences(bench, name)
    assert (wrong, collisions) == (0, 0)
    assert (shared > 100) == (name != "buffer_single"), f"{shared} reads came with a write to their bank"


def test_words_that_are_read_while_written_are_spoilt(bench: Any) -> None:
    """What the promise of the buffers is about: without it, block RAM may give anything, and its model does."""
    if bench.device.family != "ecp5":
        pytest.skip("Yosys' model of the block RAM of iCE40 reads the old word")
    wrong, _, collisions = differences(bench, "buffer_words", collide=True)
    assert wrong == collisions > 5
