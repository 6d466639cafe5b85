# amaranth: UnusedElaboratable=no
"""BankedBuffer against a Python memory: random requests on every port, every cycle."""

import random
from typing import Any

import pytest
from amaranth.sim import Simulator

from nibblecore_hw.layouts import LAST_READ_LATENCY, READ_LATENCY
from nibblecore_hw.mem.buffer import BankedBuffer

GOOD: dict[str, Any] = {
    "depth": 64, "banks": 4, "word_bits": 16, "parts": 1, "kind": "dual", "readers": 3, "writers": 2,
}  # fmt: skip


def run(dut: BankedBuffer, bench: Any) -> None:
    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("kind", "banks", "parts", "word_bits", "foretold"),
    [
        ("dual", 1, 1, 16, False), ("dual", 1, 1, 16, True), ("dual", 4, 1, 16, False), ("dual", 4, 1, 16, True),
        ("dual", 2, 4, 16, True), ("dual", 2, 1, 128, False), ("dual", 1, 2, 256, False),
        ("single", 1, 2, 16, False), ("single", 4, 4, 16, True),
    ],
)  # fmt: skip
def test_random_accesses(kind: str, banks: int, parts: int, word_bits: int, foretold: bool, seed: int) -> None:
    arguments = GOOD | {"kind": kind, "banks": banks, "parts": parts, "word_bits": word_bits, "checks": True,
                        "foretold": foretold}  # fmt: skip
    dut = BankedBuffer(**arguments)
    rng = random.Random(seed)
    memory = [0] * dut.depth
    expected: list[tuple[int, int, int]] = []  # cycle, reader, word
    bank = lambda addr: addr * banks // dut.depth  # noqa: E731
    grants = 0
    last = len(dut.reads) - 1
    # Of a dual buffer: banks that the last reader does not get now and in the next cycle; words that were written in
    # the cycle before, and what the others were granted then.
    taken_banks, taken_next = set[int](), set[int]()
    just_written: set[int] = set()
    just_read: list[tuple[int, int, int]] = []  # cycle, reader, address
    # What the first reader does in the next cycle, and banks that it says now, and has said the cycle before.
    first_next = (False, 0)
    tells, told = set[int](), set[int]()

    async def bench(ctx: Any) -> None:
        nonlocal grants, taken_banks, taken_next, just_written, just_read, first_next, tells, told
        for cycle in range(600):
            note = f"{kind=} {banks=} {parts=} {word_bits=} {seed=} {cycle=}"
            for when, reader, word in list(expected):
                if when == cycle:
                    assert ctx.get(dut.reads[reader].data) == word, f"reader {reader}: {note}"
                    expected.remove((when, reader, word))
            # Ports crowd into few addresses, so that banks and words collide often.
            writes = [
                (
                    rng.random() < 0.5,
                    rng.randrange(dut.depth) & 0x33,
                    rng.getrandbits(word_bits),
                    rng.getrandbits(parts),
                )
                for _ in dut.writes
            ]
            reads = [first_next, *((rng.random() < 0.5, rng.randrange(dut.depth) & 0x33) for _ in dut.reads[1:])]
            first_next = (rng.random() < 0.5, rng.randrange(dut.depth) & 0x33)
            told = tells
            # Now and then one bank too many, which is allowed.
            tells = {bank(a) for v, a in [first_next] if v} | {b for b in range(banks) if rng.random() < 0.1}
            ctx.set(dut.first_next, sum(1 << b for b in tells))
            if kind == "dual":
                writes = [(v and a not in {addr for _, _, addr in just_read}, a, *rest) for v, a, *rest in writes]
                won_w = [not any(v for v, *_ in writes[:j]) for j in range(len(writes))]
                reads[last] = (reads[last][0] and reads[last][1] not in just_written, reads[last][1])
                just_written = {a for (v, a, _, _), won in zip(writes, won_w, strict=True) if v and won}
                winners = []
            else:
                won_w = [not any(v and bank(a) == bank(w[1]) for v, a, *_ in writes[:j]) for j, w in enumerate(writes)]
                winners = [(v, a) for v, a, *_ in writes]
            won_r = [
                not any(v and bank(a) == bank(addr) for v, a in [*reads[:i], *winners])
                for i, (_, addr) in enumerate(reads)
            ]
            if kind == "dual" and foretold:
                won_r[1:last] = [
                    bank(addr) not in told and not any(v and bank(a) == bank(addr) for v, a in reads[1 : 1 + n])
                    for n, (_, addr) in enumerate(reads[1:last])
                ]
            if kind == "dual":
                won_r[last] = bank(reads[last][1]) not in taken_banks
                just_read = [(cycle, i, a) for i, (v, a) in enumerate(reads[:last]) if v and won_r[i]]
                free_next = sum(1 << b for b in range(banks) if b not in taken_next)
                taken_banks, taken_next = taken_next, {bank(a) for v, a in reads[:last] if v}
            else:
                free_next = 0
            for port, (valid, addr, data, mask) in zip(dut.writes, writes, strict=True):
                ctx.set(port.valid, valid)
                ctx.set(port.addr, addr)
                ctx.set(port.data, data)
                ctx.set(port.mask, mask)
            for port, (valid, addr) in zip(dut.reads, reads, strict=True):
                ctx.set(port.valid, valid)
                ctx.set(port.addr, addr)
            assert [ctx.get(p.ready) for p in dut.writes] == won_w, note
            assert [ctx.get(p.ready) for p in dut.reads] == won_r, note
            conflicts = sum((v and not won) << i for i, ((v, _), won) in enumerate(zip(reads, won_r, strict=True)))
            assert ctx.get(dut.conflicts) == conflicts, note
            assert ctx.get(dut.last_ready_next) == free_next, note
            part_bits = dut.word_bits // parts
            before = memory[:]
            for (valid, addr, data, mask), won in zip(writes, won_w, strict=True):
                if valid and won:
                    for p in range(parts):
                        if mask >> p & 1:
                            field = ((1 << part_bits) - 1) << p * part_bits
                            memory[addr] = memory[addr] & ~field | data & field
            # The last reader of a dual buffer does not see what is written in this cycle; whoever waits does.
            for i, ((valid, addr), won) in enumerate(zip(reads, won_r, strict=True)):
                if valid and won:
                    grants += 1
                    if i == last:
                        word, latency = (before if kind == "dual" else memory)[addr], LAST_READ_LATENCY
                    else:
                        word, latency = memory[addr], READ_LATENCY
                    expected.append((cycle + latency, i, word))
            await ctx.tick()

    run(dut, bench)
    assert grants > 100, f"{kind=} {banks=} {parts=} {seed=}"


def test_what_the_first_reader_has_not_foretold_is_caught() -> None:
    dut = BankedBuffer(**GOOD, foretold=True, checks=True)

    async def bench(ctx: Any) -> None:
        ctx.set(dut.reads[0].valid, 1)
        await ctx.tick()

    with pytest.raises(AssertionError, match="the first reader asks for what it has not foretold"):
        run(dut, bench)


@pytest.mark.parametrize("reader", range(3))
def test_read_while_written_is_caught(reader: int) -> None:
    dut = BankedBuffer(**GOOD, checks=True)

    async def bench(ctx: Any) -> None:
        ports = [dut.writes[0], dut.reads[reader]] if reader == 2 else [dut.reads[reader], dut.writes[0]]
        ctx.set(dut.writes[0].mask, 1)
        for port in ports:
            ctx.set(port.addr, 35)
            ctx.set(port.valid, 1)
            # The last one is quicker than a write, others are slower.
            await ctx.tick()
            ctx.set(port.valid, 0)
        for _ in range(4):
            await ctx.tick()

    with pytest.raises(AssertionError, match="a word of bank 2 is read while written"):
        run(dut, bench)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"depth": 48}, "depth must be a power of two, not 48"),
        ({"banks": 3}, "banks must be a power of two, not 3"),
        ({"depth": 4}, "depth=4 leaves fewer than 2 words in each of 4 banks"),
        ({"parts": 3}, "parts=3 must divide word_bits=16"),
        ({"kind": "triple"}, "kind must be 'dual' or 'single', not 'triple'"),
        ({"readers": 0}, "readers must be at least 1, not 0"),
        (
            {"readers": 2, "foretold": True},
            "foretold is about readers between the first and the last: there are none of 2",
        ),
        ({"writers": 0}, "writers must be at least 1, not 0"),
    ],
)
def test_arguments(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        BankedBuffer(**GOOD | change)
