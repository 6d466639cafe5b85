"""Dependencies, stream order and semaphores on hand-made sequences."""

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Engine, Instruction, LoadTarget, Opcode, Region, engines_in, make
from nibblecore.compiler.cost import DEFAULT_COST, simulate, timing
from nibblecore.compiler.emit import dependencies, stream_order, synchronize

from .conftest import CORES

ARCH: ArchConfig = CORES["narrow"]


def load(address: int, words: int = 4, target: int = LoadTarget.ACTIVATIONS) -> Instruction:
    region = Region.INPUT if target == LoadTarget.ACTIVATIONS else Region.CONSTANTS
    return make(Opcode.LOAD, target=target, region=region, local_addr=address, count0=words)


def store(address: int, words: int = 4, dram: int = 0) -> Instruction:
    return make(Opcode.STORE, region=Region.OUTPUT, local_addr=address, count0=words, dram_addr=dram)


def pool(source: int, target: int, words: int = 4) -> Instruction:
    return make(Opcode.POOL, in_addr=source, out_addr=target, cols=words, ox_step=1, out_ox_step=1, width=words)


def emitted(code: list[Instruction], arch: ArchConfig = ARCH) -> list[Instruction]:
    needed = dependencies(code, arch)
    return synchronize(code, needed, stream_order(code, needed, arch, DEFAULT_COST), arch)


def test_raw_war_and_waw() -> None:
    code = [load(0), pool(0, 8), load(0), store(8), pool(0, 8), load(8), store(8, dram=4)]
    assert dependencies(code, ARCH) == [
        [],
        [0],  # reads what LOAD wrote
        [1],  # overwrites what POOL reads
        [1],
        [2, 3],  # reads the second LOAD, overwrites what STORE reads
        [4, 3],  # writes where POOL wrote and STORE read
        [5, 4],  # the POOL's write is older, but nothing implies it here
    ]


def test_dram_is_tracked_word_by_word() -> None:
    back = make(Opcode.LOAD, region=Region.OUTPUT, local_addr=16, count0=4)
    later = make(Opcode.LOAD, region=Region.OUTPUT, local_addr=32, count0=4, dram_addr=4)
    code = [load(0), store(0), back, later, store(16)]
    assert dependencies(code, ARCH) == [[], [0], [1], [], [2]]


def test_implied_edges_are_dropped() -> None:
    """LOAD -> POOL -> STORE implies LOAD -> STORE."""
    code = emitted([load(0), pool(0, 8), store(0), store(8)])
    masks = [(i.opcode, engines_in(i["wait"]), engines_in(i["signal"])) for i in code]
    assert masks == [
        (Opcode.LOAD, (), (Engine.POST, Engine.STORE)),
        (Opcode.POOL, (Engine.LOAD,), (Engine.STORE,)),
        (Opcode.STORE, (Engine.LOAD,), ()),
        (Opcode.STORE, (Engine.POST,), ()),
        (Opcode.END, (), ()),
    ]
    code = emitted([load(0), pool(0, 8), store(8), store(0, dram=4)])
    assert [engines_in(i["signal"]) for i in code][:2] == [(Engine.POST,), (Engine.STORE,)]


def test_signals_under_way_stay_within_the_semaphore() -> None:
    """Eight loads run ahead of eight stores; three tokens fit two bits."""
    arch = ARCH.replace(semaphore_bits=2)
    code = [load(4 * k) for k in range(8)] + [store(4 * k, dram=4 * k) for k in range(8)]
    needed = dependencies(code, arch)
    for bits, most in ((2, 3), (4, 8)):
        stream = synchronize(code, needed, range(16), ARCH.replace(semaphore_bits=bits))
        under_way = highest = 0
        for i in stream:
            under_way += bool(i["signal"]) - bool(i["wait"])
            highest = max(highest, under_way)
        assert under_way == 0
        assert highest == most
        simulate(stream, ARCH.replace(semaphore_bits=bits))


def test_independent_work_is_not_queued_behind_what_waits() -> None:
    """Canonically the second pair comes last; in the stream its load stands before the first pair's long pool."""
    code = [load(0), pool(0, 128, 64), store(128, 64), load(64), pool(64, 200)]
    needed = dependencies(code, ARCH)
    order = stream_order(code, needed, ARCH, DEFAULT_COST)
    assert order.index(3) < order.index(1)
    assert sorted(order) == list(range(5))


def test_simulation_knows_queues_and_semaphores() -> None:
    single = simulate([load(0, 64), make(Opcode.END)], ARCH)
    t = timing(load(0, 64), ARCH)
    assert single[0].done - single[0].start == t.lead + t.busy + t.tail
    assert t.busy == 64 * ARCH.word_bytes // ARCH.bus_bytes
    chain = emitted([load(0), pool(0, 8), store(8)])
    spans = simulate(chain, ARCH)
    assert spans[1].start >= spans[0].done
    assert spans[2].start >= spans[1].done
    assert spans[3].done == spans[2].done
