# amaranth: UnusedElaboratable=no
"""Buffers as block RAM and SPRAM: random requests on every port, in every cycle, against a Python memory."""

import dataclasses
import random
import re
from collections import Counter
from typing import Any

import pytest

from nibblecore_hw.layouts import LAST_READ_LATENCY, READ_LATENCY
from nibblecore_hw.mem.buffer import BankedBuffer

pytestmark = pytest.mark.cosim

CYCLES = 3600
"""Of random requests, after every word was written once."""

Port = dict[str, int]
"""Inputs of a port in one cycle."""


@dataclasses.dataclass(kw_only=True)
class Traffic:
    """Requests, and what a buffer has to answer.

    Attributes
    ----------
    rows, answers : list of dict
        Inputs of every cycle; outputs of every cycle, all but the words.
    words : list of tuple
        ``(cycle, reader, word)``, the cycle being that of the grant.
    spoilt : set of tuple
        ``(cycle, reader)`` of words that are read while they are written.
    seen : Counter
        How often what is of interest came about.
    """

    rows: list[dict[str, int]] = dataclasses.field(default_factory=list)
    answers: list[dict[str, int]] = dataclasses.field(default_factory=list)
    words: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    spoilt: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    seen: Counter[str] = dataclasses.field(default_factory=Counter)


def random_traffic(dut: BankedBuffer, seed: int, *, collide: bool) -> Traffic:
    """Every word is written once; then ports crowd in a few places, so that banks are shared in most cycles.

    A request stands until it is granted, or is now and then taken back. Only with ``collide`` are words read while they
    are written.
    """
    rng = random.Random(seed)
    is_dual, last, full = dut.kind == "dual", dut.readers - 1, (1 << dut.parts) - 1
    few = [rng.randrange(dut.depth) for _ in range(24)]
    traffic = Traffic()
    writes: list[Port] = [{"valid": 0}] * dut.writers
    reads: list[Port] = [{"valid": 0}] * dut.readers
    write_grants: list[list[Port]] = []
    read_grants: list[list[tuple[int, Port]]] = []
    # Addresses that all readers but the last were granted in the two cycles before, the later ones first.
    early: list[list[int]] = [[], []]

    def bank(addr: int) -> int:
        return addr * dut.banks // dut.depth

    def beaten(port: Port, winners: list[Port]) -> bool:
        return any(w["valid"] and bank(w["addr"]) == bank(port["addr"]) for w in winners)

    def place() -> int:
        return rng.choice(few) if rng.random() < 0.9 else rng.randrange(dut.depth)

    for cycle in range(dut.depth + CYCLES):
        filling = cycle < dut.depth
        busy = (0.2, 0.7, 1.0)[cycle // 100 % 3]
        # Who is idle shows garbage.
        for j, w in enumerate(writes):
            if filling or not w["valid"] or w in write_grants[-1] or rng.random() < 0.1:
                # In a single buffer reads have only what writes leave.
                often = busy if is_dual else busy / 3
                writes[j] = {"valid": rng.random() < often, "addr": place(), "data": rng.getrandbits(dut.word_bits),
                             "mask": rng.choice((full, rng.getrandbits(dut.parts)))}  # fmt: skip
            if filling:
                writes[j]["valid"] = cycle % dut.writers == j
                writes[j] |= {"addr": cycle, "mask": full} if writes[j]["valid"] else {}
        for i, r in enumerate(reads):
            if filling or not r["valid"] or (i, r) in read_grants[-1] or rng.random() < 0.1:
                reads[i] = {"valid": not filling and rng.random() < busy, "addr": place()}
        if is_dual and not collide:
            # What all readers but the last were granted in the cycle before meets this write at the memory.
            writes = [w | {"valid": 0} if w["valid"] and w["addr"] in early[0] else w for w in writes]
        # In a dual buffer one write, whatever its bank; in a single one, one access per bank.
        write_won = [not (any(p["valid"] for p in writes[:j]) if is_dual else beaten(w, writes[:j]))
                     for j, w in enumerate(writes)]  # fmt: skip
        write_grants.append([w for w, won in zip(writes, write_won, strict=True) if w["valid"] and won])
        # And the last reader the write of the cycle before.
        met = {w["addr"] for written in write_grants[-2:-1] for w in written}
        if is_dual and not collide and reads[last]["addr"] in met:
            reads[last] = reads[last] | {"valid": 0}
        read_won = [not beaten(r, reads[:i] + ([] if is_dual else writes)) for i, r in enumerate(reads)]
        if is_dual:
            read_won[last] = bank(reads[last]["addr"]) not in map(bank, early[1])
        read_grants.append([(i, r) for i, r in enumerate(reads) if r["valid"] and read_won[i]])
        free = set(range(dut.banks)) - set(map(bank, early[0])) if is_dual else set()
        early = [[r["addr"] for i, r in read_grants[-1] if i != last], early[0]]
        conflicts = [r["valid"] and not won for r, won in zip(reads, read_won, strict=True)]
        traffic.seen["conflicts"] += any(conflicts)
        traffic.seen["banks read together"] += len(read_grants[-1]) > 1
        traffic.rows.append(
            {f"writes__{j}__{name}": value for j, w in enumerate(writes) for name, value in w.items()}
            | {f"reads__{i}__{name}": value for i, r in enumerate(reads) for name, value in r.items()}
        )
        traffic.answers.append(
            {f"writes__{j}__ready": won for j, won in enumerate(write_won)}
            | {f"reads__{i}__ready": won for i, won in enumerate(read_won)}
            | {"conflicts": sum(c << i for i, c in enumerate(conflicts)), "last_ready_next": sum(1 << b for b in free)}
        )

    # What meets at an edge of the memory: the writes of a cycle, and the reads of the same cycle; but of a dual buffer,
    # what the last reader was granted in the cycle behind, and the others in the cycle before.
    memory, part_bits = [0] * dut.depth, dut.word_bits // dut.parts
    for cycle, written in enumerate(write_grants):
        for granted in range(max(0, cycle - 1), min(cycle + 2, len(read_grants))):
            for i, r in read_grants[granted]:
                if granted != cycle + (0 if not is_dual else 1 if i == last else -1):
                    continue
                traffic.words.append((granted, i, memory[r["addr"]]))
                for w in written:
                    if w["mask"] and w["addr"] == r["addr"]:
                        traffic.spoilt.add((granted, i))
                    traffic.seen["bank written beside"] += w["mask"] > 0 and bank(w["addr"]) == bank(r["addr"])
        for w in written:
            traffic.seen["parts written"] += 0 < w["mask"] < full
            for p in range(dut.parts):
                if w["mask"] >> p & 1:
                    field = ((1 << part_bits) - 1) << p * part_bits
                    memory[w["addr"]] = memory[w["addr"]] & ~field | w["data"] & field
    traffic.rows += [{}] * READ_LATENCY
    return traffic


def play(bench: Any, name: str, seed: int, *, collide: bool = False) -> tuple[Traffic, set[tuple[int, int]]]:
    """The traffic, and ``(cycle, reader)`` of words that are not what was last written."""
    if name not in bench.player.netlists:
        pytest.skip(f"{bench.device.name} has no memory of one port")
    dut = bench.component(name)
    traffic = random_traffic(dut, seed, collide=collide)
    outputs = bench.play(name, traffic.rows)
    for cycle, (want, got) in enumerate(zip(traffic.answers, outputs, strict=False)):
        differing = [port for port, value in want.items() if got[port] != value]
        assert not differing, f"{name}, seed {seed}, cycle {cycle}: {', '.join(differing)}"
    latencies = [READ_LATENCY] * (dut.readers - 1) + [LAST_READ_LATENCY]
    assert len(traffic.words) > CYCLES // 3
    return traffic, {
        (c, i) for c, i, word in traffic.words if outputs[c + latencies[i]][f"reads__{i}__data"] != word
    }  # fmt: skip


@pytest.mark.parametrize("name", ["buffer_parts", "buffer_words", "buffer_single", "buffer_single_banks"])
def test_words_are_what_was_written(bench: Any, name: str) -> None:
    traffic, wrong = play(bench, name, seed=3)
    dut, cells = bench.component(name), bench.player.netlists[name].cells
    ram = {"ecp5": "DP16KD", "ice40": "SB_SPRAM256KA" if dut.kind == "single" else "SB_RAM40_4K"}
    assert cells[ram[bench.device.family]] >= dut.banks
    assert not traffic.spoilt
    assert not wrong, f"first of {len(wrong)} wrong words: cycle and reader {min(wrong)}"
    assert (traffic.seen["bank written beside"] > 500) == (dut.kind == "dual")
    assert (traffic.seen["banks read together"] > 500) == (dut.banks > 1)
    assert (traffic.seen["parts written"] > 500) == (dut.parts > 1)
    assert traffic.seen["conflicts"] > 500


@pytest.mark.parametrize("name", ["buffer_parts", "buffer_words"])
def test_words_that_are_read_while_written_are_spoilt(bench: Any, name: str) -> None:
    """What the promise of the buffers is about: without it, block RAM may give anything, and its model does. They are
    the words of which the documentation says so, and no others."""
    if bench.device.family != "ecp5":
        pytest.skip("Yosys' model of the block RAM of iCE40 reads the old word")
    traffic, wrong = play(bench, name, seed=4, collide=True)
    assert wrong == traffic.spoilt
    dut = bench.component(name)
    assert {i for _, i in wrong} == set(range(dut.readers))


@pytest.mark.parametrize("name", ["sequential_dual", "sequential_single"])
def test_buffer_of_a_core_without_queues(bench: Any, name: str) -> None:
    """One client at a time; a word stands until the next one is read, in one-port memory until anything happens."""
    if name not in bench.player.netlists:
        pytest.skip(f"{bench.device.name} has no memory of one port")
    depth, bits, parts = (1024, 32, 8) if name == "sequential_single" else (512, 32, 4)
    part, full = bits // parts, (1 << parts) - 1
    rng = random.Random(7)
    few, memory = [rng.randrange(depth) for _ in range(16)], [0] * depth
    rows: list[Port] = []
    stands: list[int | None] = [None]  # in every cycle
    for cycle in range(depth + 3000):
        row: Port = {}
        for i in range(3):
            row |= {f"reads__{i}__addr": rng.randrange(depth)}
        for j in range(2):
            row |= {f"writes__{j}__addr": rng.randrange(depth), f"writes__{j}__data": rng.getrandbits(bits),
                    f"writes__{j}__mask": rng.getrandbits(parts)}  # fmt: skip
        word, addr, who = stands[-1], rng.choice(few), rng.randrange(8)
        if cycle < depth or who < 2:
            writer = cycle % 2
            port, addr, mask = (
                f"writes__{writer}",
                *((cycle, full) if cycle < depth else (addr, rng.getrandbits(parts))),
            )
            row |= {f"{port}__valid": 1, f"{port}__addr": addr, f"{port}__mask": mask}
            enabled = sum(((1 << part) - 1) << p * part for p in range(parts) if mask >> p & 1)
            memory[addr] = memory[addr] & ~enabled | row[f"{port}__data"] & enabled
            word = None if name == "sequential_single" else word
        elif who < 5:
            row |= {f"reads__{who - 2}__valid": 1, f"reads__{who - 2}__addr": addr}
            word = memory[addr]
        rows.append(row)
        stands.append(word)
    assert sum(word is not None for word in stands) > 1000
    for cycle, got in enumerate(bench.play(name, rows)):
        for i in range(3):
            assert got[f"reads__{i}__ready"]
            assert stands[cycle] in (None, got[f"reads__{i}__data"]), f"{name}, cycle {cycle}, reader {i}"
        assert all(got[f"writes__{j}__ready"] for j in range(2))


def test_block_ram_of_every_shape(bench: Any) -> None:
    if bench.device.family != "ecp5":
        pytest.skip("the model of another block RAM is Yosys'")
    dut, rng = bench.component("memories"), random.Random(6)
    few = [rng.getrandbits(14) for _ in range(12)]
    rows: list[Port] = []
    for _ in range(6000):
        write, read = rng.choice(few), rng.choice((rng.choice(few), rng.getrandbits(14)))
        # At different words of all memories, of which the one with the fewest leaves out most bits of an address.
        if (read ^ write) % min(depth for depth, _, _ in dut.SHAPES) == 0:
            read ^= 1
        rows.append({"read": read, "write": write, "word": rng.getrandbits(36), "mask": rng.getrandbits(4)})
    outputs = bench.play("memories", [*rows, {}])
    for depth, bits, parts in dut.SHAPES:
        memory, part = dut.contents(depth, bits), bits // parts
        changed = 0
        for cycle, row in enumerate(rows):
            word, want = outputs[cycle + 1][f"word{bits}"], memory[row["read"] % depth]
            assert word == want, f"{depth} words of {bits} bits, cycle {cycle}: {word:x}, not {want:x}"
            enabled = sum(((1 << part) - 1) << p * part for p in range(parts) if row["mask"] >> p & 1)
            place = row["write"] % depth
            before, memory[place] = memory[place], memory[place] & ~enabled | row["word"] & enabled
            changed += before != memory[place]
        assert changed > 500
    text = bench.player.netlists["memories"].path.read_text()
    widths = {int(width) for width in re.findall(r"\.DATA_WIDTH_[AB]\(32'd(\d+)\)", text)}
    assert widths == {bits for _, bits, _ in dut.SHAPES}


def test_block_memories_of_every_shape(bench: Any) -> None:
    """A word two cycles after its address, out of the register of block RAM: no flip-flop, no LUT."""
    seed = 8
    dut, rng = bench.component("block_memories"), random.Random(seed)
    spaces = {depth: 1 << (depth - 1).bit_length() for depth, _, _ in dut.SHAPES}

    def place() -> int:
        """An address that every memory has."""
        while True:
            addr = rng.getrandbits(14)
            if all(addr % space < depth for depth, space in spaces.items()):
                return addr

    few = [place() for _ in range(12)]
    rows: list[Port] = []
    for _ in range(6000):
        write, read = rng.choice(few), rng.choice((rng.choice(few), place()))
        # Only while nothing is written, the same word of any memory.
        enable = (read ^ write) % min(spaces.values()) != 0 and rng.random() < 0.7
        rows.append({"read": read, "write": write, "enable": enable, "word": rng.getrandbits(96)})
    outputs = bench.play("block_memories", [*rows, {}, {}])
    for depth, bits, _ in dut.SHAPES:
        memory = [0] * depth
        read_again = changed = 0
        for cycle, row in enumerate(rows):
            read, write = row["read"] % spaces[depth], row["write"] % spaces[depth]
            got, want = outputs[cycle + 2][f"word{depth}x{bits}"], memory[read]
            where = f"{depth} words of {bits} bits, seed {seed}, cycle {cycle}"
            assert got == want, f"{where}: {got:x}, not {want:x}"
            read_again += want != 0
            if row["enable"]:
                before, memory[write] = memory[write], row["word"] & (1 << bits) - 1
                changed += before != memory[write]
        assert changed > 500
        assert read_again > 500
    if bench.device.family != "ecp5":
        return
    netlist = bench.player.netlists["block_memories"]
    cells = {kind: count for kind, count in netlist.cells.items() if not kind.startswith("$")}
    assert cells == {"DP16KD": sum(count for _, _, count in dut.SHAPES)}
    text = netlist.path.read_text()
    widths = {int(width) for width in re.findall(r"\.DATA_WIDTH_[AB]\(32'd(\d+)\)", text)}
    assert widths == {36, 18, 9, 4, 2, 1}
    assert set(re.findall(r"\.REGMODE_[AB]\(\"(\w+)\"\)", text)) == {"OUTREG"}
    # A block RAM of 36 bits has no write enable but those of its bytes.
    wide = [ram for ram in text.split("DP16KD #(")[1:] if ".DATA_WIDTH_A(32'd36)" in ram]
    assert len(wide) == 6
    assert all(".WEA(1'h1)" in ram and all(f".ADA{n}(enable)" in ram for n in range(4)) for ram in wide)
