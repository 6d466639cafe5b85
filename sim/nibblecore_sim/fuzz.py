"""Random networks through every stage: integer graph = golden model = RTL, or an error that says why not.

A case is decided by its core and its seed alone: the network, its weights and inputs, the order in which the golden
model runs the engines, and how the simulated memory stalls.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from nibblecore.arch.config import ARCHS, ArchConfig, get_arch
from nibblecore.compiler.options import CompileOptions
from nibblecore.compiler.pipeline import compile_graph
from nibblecore.errors import CompileError
from nibblecore.ir import Graph
from nibblecore.ir.interpret import run as interpret
from nibblecore.ir.random_graph import random_inputs, random_layer, random_network
from nibblecore.runtime.device import Device, Result
from nibblecore.runtime.transport import GoldenTransport, Transport

Tensors = dict[str, npt.NDArray[np.int64]]

FUZZ_ARCHS: Final[dict[str, ArchConfig]] = {
    a.name: a
    for a in (
        # Small buffers, so that random layers meet every bound; each differs from the others in what hardware may get
        # wrong: bus against word, columns against lanes, kinds of memory, element.
        ArchConfig(name="fuzz-square", lanes=4, columns=4, element="bitplane", acc_depth=32, post_lanes=2,
                   act_depth=512, act_banks=4, weight_depth=256, bus_bits=64, burst_beats=8, outstanding=2,
                   queue_depth=2),
        ArchConfig(name="fuzz-wide", lanes=8, columns=16, element="lutram2", acc_depth=64, post_lanes=4, act_depth=512,
                   act_banks=2, weight_depth=512, bus_bits=32, burst_beats=16, acc_bits=26),
        ArchConfig(name="fuzz-narrow", lanes=16, columns=4, element="dsp", acc_depth=32, post_lanes=2, act_depth=256,
                   act_banks=1, act_memory="single", weight_depth=256, weight_memory="single", bus_bits=64,
                   burst_beats=4, outstanding=1, queue_depth=4),
        ArchConfig(name="fuzz-reload", lanes=8, columns=8, element="lutram", acc_depth=32, post_lanes=2, act_depth=512,
                   act_banks=2, weight_depth=256, bus_bits=64, burst_beats=8, queue_depth=2),
        ArchConfig(name="fuzz-sequential", lanes=8, columns=4, acc_depth=32, post_lanes=1, act_depth=512, act_banks=1,
                   act_memory="single", weight_depth=256, weight_memory="single", bus_bits=32, burst_beats=8,
                   outstanding=1, queue_depth=0, semaphore_bits=2),
    )
}  # fmt: skip
"""Cores made for fuzzing; cheap to build and to simulate."""


def find_arch(name: str) -> ArchConfig:
    """A named core, or one of :data:`FUZZ_ARCHS`."""
    return FUZZ_ARCHS[name] if name in FUZZ_ARCHS else get_arch(name)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What one seed gave.

    Parameters
    ----------
    seed : int
    arch : str
    layers : int
        Nodes of the network.
    refused : str
        Why the compiler refused it, if it did; that is a legal outcome.
    mismatch : str
        The first tensor that differs, between which two executions and where; empty when all agree.
    cycles, predicted : int
        Measured on RTL, and by the cost model; 0 where it was not simulated.
    """

    seed: int
    arch: str
    layers: int
    refused: str = ""
    mismatch: str = ""
    cycles: int = 0
    predicted: int = 0


def first_difference(want: Tensors, got: Tensors, names: list[str]) -> str:
    """Name, place and values of the first code that differs, or an empty string."""
    for name in names:
        if not np.array_equal(want[name], got[name]):
            place = tuple(int(k) for k in np.argwhere(want[name] != got[name])[0])
            count = int((want[name] != got[name]).sum())
            return (
                f"{name}{list(place)}: {got[name][place]}, not {want[name][place]} ({count} of {want[name].size} codes)"
            )
    return ""


def random_case(arch: ArchConfig, rng: np.random.Generator) -> Graph:
    """Half of the cases are single layers, a tenth layers beyond the buffers, the others small networks."""
    kind = rng.random()
    if kind < 0.4:
        return random_network(rng, arch, blocks=int(rng.integers(1, 5)))
    return random_layer(rng, arch, large=kind < 0.5)


def run_case(arch: ArchConfig, seed: int, rtl: Transport | None = None) -> Case:
    """One network: compile it, and compare integer graph, golden model and, where given, RTL."""
    rng = np.random.default_rng([seed, arch.lanes, arch.columns])
    graph = random_case(arch, rng)
    # Every other case stores all tensors, so that not only the last one is compared.
    options = CompileOptions(dump_tensors=bool(seed % 2))
    try:
        program = compile_graph(graph, arch, options)
    except CompileError as error:
        return Case(seed, arch.name, len(graph.nodes), refused=error.violations[0])
    batch = random_inputs(graph, rng)
    inputs = {name: codes[0] for name, codes in batch.items()}
    want = {name: codes[0] for name, codes in interpret(graph, batch, keep=True).items()}
    names = [b.name for b in (*program.tensors, *program.outputs)]
    case = Case(seed, arch.name, len(graph.nodes), predicted=program.predicted_cycles)

    def execute(transport: Transport) -> Result:
        device = Device(transport)
        device.load(program)
        given: Mapping[str, npt.ArrayLike] = inputs
        return device.run(given)

    golden = execute(GoldenTransport(arch, memory_bytes=1 << 24, seed=seed))
    if text := first_difference(want, {**golden.tensors, **golden.outputs}, names):
        return dataclasses.replace(case, mismatch=f"golden model against integer graph: {text}")
    if rtl is not None:
        configure = getattr(rtl, "configure", None)
        stall = (0, 0, 100, 500)[seed % 4]
        if configure is not None:
            configure(stall_permille=stall)
        result = execute(rtl)
        case = dataclasses.replace(case, cycles=result.cycles or 0, predicted=0 if stall else case.predicted)
        if text := first_difference(want, {**result.tensors, **result.outputs}, names):
            return dataclasses.replace(case, mismatch=f"RTL against golden model: {text}")
    return case


@dataclasses.dataclass
class Summary:
    """Counts over the cases of a run."""

    cases: int = 0
    refused: int = 0
    mismatches: list[Case] = dataclasses.field(default_factory=list)
    cycles: int = 0
    seconds: float = 0.0

    def add(self, case: Case) -> None:
        self.cases += 1
        self.refused += bool(case.refused)
        self.cycles += case.cycles
        if case.mismatch:
            self.mismatches.append(case)


def fuzz(
    archs: list[ArchConfig],
    *,
    count: int,
    seed: int,
    open_rtl: Callable[[ArchConfig], Transport] | None,
) -> Iterator[Case]:
    """``count`` cases, spread evenly over the cores, from ``seed`` upwards.

    Parameters
    ----------
    open_rtl : callable, optional
        Opens a simulation of a core, kept for all of its cases; without it only the golden model runs.
    """
    for position, arch in enumerate(archs):
        seeds = range(seed + position, seed + count, len(archs))
        rtl = open_rtl(arch) if open_rtl is not None else None
        try:
            for number in seeds:
                yield run_case(arch, number, rtl)
        finally:
            if rtl is not None:
                rtl.close()


def timed(cases: Iterator[Case], summary: Summary) -> Iterator[Case]:
    """Pass cases on while counting them."""
    began = time.monotonic()
    for case in cases:
        summary.add(case)
        summary.seconds = time.monotonic() - began
        yield case


__all__ = ["ARCHS", "FUZZ_ARCHS", "Case", "Summary", "find_arch", "first_difference", "fuzz", "run_case", "timed"]
