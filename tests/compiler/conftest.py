"""Cores and helpers of the compiler's tests."""

from collections.abc import Callable

import numpy as np
import pytest

from nibblecore.arch.config import ARCHS, ArchConfig
from nibblecore.compiler import CompileOptions, compile_graph
from nibblecore.ir import run
from nibblecore.ir.graph import Graph
from nibblecore.ir.random_graph import random_inputs
from nibblecore.runtime.device import Device
from nibblecore.runtime.program import Program
from nibblecore.runtime.transport.golden import GoldenTransport

CORES: dict[str, ArchConfig] = {
    **ARCHS,
    # Buffers that nothing fits, semaphores and queues at their smallest, bus narrower and wider than a word.
    "narrow": ArchConfig(
        name="narrow", lanes=4, columns=4, post_lanes=2, acc_depth=16, act_depth=256, weight_depth=256, bus_bits=32
    ),
    "wide": ArchConfig(
        name="wide", lanes=8, columns=16, post_lanes=4, acc_depth=32, act_depth=512, weight_depth=256,
        semaphore_bits=2, queue_depth=2,
    ),
    "parts": ArchConfig(
        name="parts", lanes=16, columns=4, post_lanes=2, acc_depth=32, act_depth=256, act_banks=2, weight_depth=128,
        semaphore_bits=2, queue_depth=2, bus_bits=128,
    ),
}  # fmt: skip
"""Named cores, and small ones whose buffers overflow with small networks."""

Checked = Callable[..., Program]


def compare(graph: Graph, program: Program, *, seed: int, order: int | None = None) -> None:
    """Run the program on the golden model; every tensor that it stores must equal the interpreter's."""
    inputs = random_inputs(graph, np.random.default_rng(seed))
    expected = run(graph, inputs, keep=True)
    device = Device(GoldenTransport(program.arch, seed=order))
    device.load(program)
    result = device.run({name: codes[0] for name, codes in inputs.items()})
    tensors = {**result.outputs, **result.tensors}
    assert tensors
    for name, codes in tensors.items():
        wrong = int((expected[name][0] != codes).sum())
        assert wrong == 0, f"seed {seed}, {program.arch.name}: {wrong} of {codes.size} codes of {name} are wrong"


@pytest.fixture
def checked() -> Checked:
    """Compile (which lints), run on the golden model, compare with the interpreter, return the program."""

    def check(
        graph: Graph,
        arch: ArchConfig,
        options: CompileOptions | None = None,
        *,
        seed: int = 0,
        order: int | None = None,
    ) -> Program:
        program = compile_graph(graph, arch, options or CompileOptions())
        program.check()
        compare(graph, program, seed=seed, order=order)
        return program

    return check
