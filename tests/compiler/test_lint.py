"""The linter finds what is planted: every dropped semaphore, every foreign address, every unwritten word."""

import numpy as np
import pytest

from nibblecore.arch.isa import Engine, Instruction, LoadTarget, Opcode, Region, engines_in, make
from nibblecore.compiler import CompileOptions, compile_graph, lint
from nibblecore.compiler.lint import check
from nibblecore.errors import ExecutionError, LintError
from nibblecore.ir.random_graph import GraphBuilder, random_network
from nibblecore.runtime.device import Device
from nibblecore.runtime.program import Program
from nibblecore.runtime.transport.golden import GoldenTransport

from .conftest import CORES

SMALL = CORES["narrow"]


def change(program: Program, index: int, **fields: int) -> Program:
    """The program with some fields of one instruction replaced."""
    code = list(program.instructions)
    code[index] = Instruction(code[index].opcode, {**code[index].fields, **fields})
    return program.replace(instructions=code)


def network(core: str, seed: int = 1, **options: bool) -> Program:
    graph = random_network(np.random.default_rng(seed), CORES[core], blocks=2, size=5)
    return compile_graph(graph, CORES[core], CompileOptions(**options))


@pytest.mark.parametrize(("core", "keep"), [("small", True), ("small", False), ("wide", False)])
def test_every_dropped_semaphore_is_found(core: str, keep: bool) -> None:
    """The emitter adds no semaphore that is implied by others, so none can be dropped."""
    program = network(core, keep_on_chip=keep)
    assert lint(program) == []
    dropped = 0
    for index, i in enumerate(program.instructions):
        for mask in ("wait", "signal"):
            for engine in engines_in(i[mask]):
                mutant = change(program, index, **{mask: i[mask] & ~(1 << engine)})
                assert lint(mutant), f"instruction {index} ({i}) without {mask} {engine.name}"
                dropped += 1
    assert dropped > 20


def edges(program: Program) -> list[tuple[int, int]]:
    """(signalling, waiting) instruction of every token."""
    signals: dict[tuple[int, int], list[int]] = {}
    result = []
    for index, i in enumerate(program.instructions):
        if i.engine is None:
            continue
        for source in engines_in(i["wait"]):
            result.append((signals[source, i.engine].pop(0), index))
        for target in engines_in(i["signal"]):
            signals.setdefault((i.engine, target), []).append(index)
    return result


@pytest.mark.parametrize(("core", "keep"), [("small", True), ("narrow", False)])
def test_every_dropped_edge_is_a_race(core: str, keep: bool) -> None:
    """Without a token's signal *and* its wait nothing deadlocks; what is left is a race, and named so."""
    program = network(core, keep_on_chip=keep)
    for source, target in edges(program):
        a, b = program.instructions[source], program.instructions[target]
        assert a.engine is not None
        assert b.engine is not None
        mutant = change(program, source, signal=a["signal"] & ~(1 << b.engine))
        mutant = change(mutant, target, wait=b["wait"] & ~(1 << a.engine))
        kinds = {f.kind for f in lint(mutant)}
        assert "race" in kinds, f"{source} -> {target}: {kinds}"
        assert "deadlock" not in kinds


DATA_ERRORS = ("a requantization record has shift", "acc + bias does not fit")
"""What depends on the values that a wrong address fetches; the linter looks at addresses only."""


def outcome(program: Program, order: int) -> bytes | str:
    """The outputs of one legal order of engines on the golden model, or what stopped it."""
    device = Device(GoldenTransport(program.arch, memory_bytes=1 << 18, seed=order))
    device.load(program)
    rng = np.random.default_rng(7)
    inputs = {b.name: rng.integers(-8, 8, b.shape) for b in program.inputs}
    try:
        result = device.run(inputs)
    except ExecutionError as error:
        return str(error)
    return b"".join(codes.tobytes() for codes in result.outputs.values())


@pytest.mark.parametrize(("core", "keep", "seed"), [("small", True, 0), ("small", False, 1), ("parts", True, 2)])
def test_what_the_linter_passes_runs_alike_in_every_order(core: str, keep: bool, seed: int) -> None:
    """Fields are changed at random. Either the linter objects, or no legal order of engines stops or differs."""
    program = network(core, keep_on_chip=keep)
    rng = np.random.default_rng(seed)
    passed = refused = 0
    for _ in range(70):
        index = int(rng.integers(len(program.instructions) - 1))
        i = program.instructions[index]
        name = str(rng.choice([f.name for f in i.spec.all_fields if f.name != "opcode"]))
        f = next(f for f in i.spec.all_fields if f.name == name)
        value = int(np.clip(i[name] + int(rng.choice([-16, -3, -1, 1, 2, 8, 64])), f.low, f.high))
        mutant = change(program, index, **{name: value})
        if lint(mutant):
            refused += 1
            continue
        passed += 1
        outcomes = {outcome(mutant, order) for order in range(3)}
        what = f"seed {seed}: instruction {index} ({i}) with {name}={value}"
        if any(isinstance(o, str) for o in outcomes):
            assert all(isinstance(o, str) and any(d in o for d in DATA_ERRORS) for o in outcomes), f"{what}: {outcomes}"
        else:
            assert len(outcomes) == 1, what
    assert passed > 10
    assert refused > 15


def conv(**options: bool) -> Program:
    b = GraphBuilder(np.random.default_rng(2), (6, 6, 6), bits=4)
    return compile_graph(b.finish(b.conv(b.input, 6, bits=4, weight_bits=4)), SMALL, CompileOptions(**options))


def first(program: Program, opcode: Opcode, **fields: int) -> int:
    return next(
        n for n, i in enumerate(program.instructions)
        if i.opcode is opcode and all(i[k] == v for k, v in fields.items())
    )  # fmt: skip


def texts(program: Program) -> str:
    return "\n".join(map(str, lint(program)))


def test_bounds() -> None:
    program = conv()
    store = first(program, Opcode.STORE)
    assert "writes to region CONSTANTS" in texts(change(program, store, region=Region.CONSTANTS))
    assert "of region 7, which has 0 words" in texts(change(program, store, region=7))
    assert "of region OUTPUT, which has " in texts(change(program, store, dram_addr=1 << 20))
    load = first(program, Opcode.LOAD, target=LoadTarget.ACTIVATIONS)
    assert "of the activation buffer of 256" in texts(change(program, load, local_addr=255, count0=16))
    weights = first(program, Opcode.LOAD, target=LoadTarget.WEIGHTS)
    assert "loads 300 words into the weight buffer of 256" in texts(change(program, weights, count0=300))
    mac = first(program, Opcode.MAC)
    assert "has a tile of 17 pixels; the accumulators hold 16" in texts(change(program, mac, rows=17, cols=1))
    post = first(program, Opcode.POST)
    assert "writes 2 bricks, part 0; a column tile has 1 bricks and a brick 1 parts" in texts(
        change(program, post, bricks=2)
    )


def test_unwritten_words() -> None:
    program = conv()
    mac = first(program, Opcode.MAC)
    text = texts(change(program, mac, accumulate=1))
    assert f"instruction {mac} (mac " in text
    assert "reads word 0 of the accumulators, which nobody has written" in text
    assert "of the weight buffer, which nobody has written" in texts(change(program, mac, w_addr=128))
    load = first(program, Opcode.LOAD, target=LoadTarget.ACTIVATIONS)
    assert "of the activation buffer, which nobody has written" in texts(change(program, load, count0=1))
    store = first(program, Opcode.STORE)
    assert "words of tensor 'conv0' are never written, the first is" in texts(change(program, store, count0=1))


def test_parts_of_a_word_are_told_apart() -> None:
    """Where columns fill a part of a brick only, a missing part is an unwritten word."""
    program = network("parts")
    post = first(program, Opcode.POST, part=3)
    assert "which nobody has written" in texts(change(program, post, part=2))


def test_deadlock_and_tokens() -> None:
    program = conv()
    mac = first(program, Opcode.MAC)
    text = texts(change(program, mac, wait=1 << Engine.STORE))
    assert f"instruction {mac} (mac <-store" in text
    assert "never starts: it waits for STORE" in text
    assert "is never fetched: the queue of its engine stays full" in text
    last = len(program.instructions) - 2
    mutant = change(program, last, signal=1 << Engine.LOAD)
    assert texts(mutant) == "1 signals from STORE to LOAD are never waited for"


def test_a_full_semaphore_is_a_deadlock() -> None:
    """Five signals do not fit a semaphore of two bits, and the wait for them stands behind what they block."""
    program = conv()
    load = make(Opcode.LOAD, region=Region.INPUT, signal=[Engine.STORE])
    store = make(Opcode.STORE, region=Region.SCRATCH, wait=[Engine.LOAD])
    code = [load] * 5 + [make(Opcode.LOAD, region=Region.INPUT)] * 4 + [store] * 5 + [make(Opcode.END)]
    sizes = {**program.region_sizes, Region.SCRATCH: 64}
    mutant = program.replace(
        arch=SMALL.replace(semaphore_bits=2, queue_depth=2), instructions=code, debug=[-1] * len(code),
        region_sizes=sizes, outputs=[], tensors=[],
    )  # fmt: skip
    text = texts(mutant)
    assert "never ends: a semaphore that it signals stays full" in text
    assert "never" not in texts(mutant.replace(arch=SMALL))


def test_encoding() -> None:
    program = conv()
    text = texts(change(program, 1, count0=1 << 14 | 5))
    assert text == "instruction 1: LOAD.count0=16389 is not in 1..16384"
    code = [*program.instructions, make(Opcode.END)]
    assert "END must be the last instruction and nowhere else" in texts(program.replace(instructions=code))


def test_the_error_holds_all_findings() -> None:
    program = conv()
    mac = first(program, Opcode.MAC)
    post = first(program, Opcode.POST)
    mutant = change(change(program, mac, rows=17, cols=1), post, bricks=2)
    with pytest.raises(LintError) as caught:
        check(mutant)
    assert "the accumulators hold 16" in str(caught.value)
    assert "writes 2 bricks" in str(caught.value)
