"""Whole cores after synthesis: networks through their AXI ports, every byte of DRAM as the golden model leaves it."""

import numpy as np
import pytest

from nibblecore.arch.config import ArchConfig, get_arch
from nibblecore.compiler.options import CompileOptions
from nibblecore.compiler.pipeline import compile_graph
from nibblecore.errors import CompileError
from nibblecore.ir.interpret import run as interpret
from nibblecore.ir.random_graph import random_inputs
from nibblecore.runtime.device import Device
from nibblecore.runtime.transport import GoldenTransport, Transport
from nibblecore_hw.synth.devices import get_device
from nibblecore_sim.fuzz import FUZZ_ARCHS, first_difference, random_case
from nibblecore_sim.toolchain import has_icarus
from nibblecore_sim.transport import SimTransport

pytestmark = pytest.mark.cosim

MEMORY_BYTES = 1 << 20


def check_network(arch: ArchConfig, seed: int, core: Transport) -> bool:
    """Compile and run a random network; whether the compiler takes it."""
    rng = np.random.default_rng([seed, arch.lanes, arch.columns])
    graph = random_case(arch, rng)
    try:
        program = compile_graph(graph, arch, CompileOptions(dump_tensors=True))
    except CompileError:
        return False
    batch = random_inputs(graph, rng)
    inputs = {name: codes[0] for name, codes in batch.items()}
    want = {name: codes[0] for name, codes in interpret(graph, batch, keep=True).items()}
    before = rng.bytes(MEMORY_BYTES)
    after = []
    for transport in (GoldenTransport(arch, memory_bytes=MEMORY_BYTES), core):
        transport.write(0, before)
        device = Device(transport)
        device.load(program)
        result = device.run(inputs)
        found = {**result.tensors, **result.outputs}
        names = [b.name for b in (*program.tensors, *program.outputs)]
        assert first_difference(want, found, names) == "", f"seed {seed}"
        after.append(transport.read(0, MEMORY_BYTES))
    assert after[0] == after[1], f"seed {seed}: DRAM differs from the golden model's at other places than its tensors"
    assert after[0] != before
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "device", "seeds"),
    [
        (FUZZ_ARCHS["fuzz-square"], "ecp5-25k", range(1, 9)),
        # The one core that is meant for this device, with its buffers in SPRAM.
        (get_arch("tiny"), "up5k", range(1, 5)),
    ],
    ids=["ecp5-25k", "up5k"],
)
def test_core_runs_networks(arch: ArchConfig, device: str, seeds: range) -> None:
    with SimTransport(arch, memory_bytes=MEMORY_BYTES, netlist=get_device(device)) as core:
        ran = [check_network(arch, seed, core) for seed in seeds]
    assert sum(ran) > len(seeds) // 2


@pytest.mark.skipif(not has_icarus(), reason="Icarus is not installed")
@pytest.mark.slow
def test_no_word_is_read_while_it_is_written() -> None:
    """On which all netlists rely: no buffer has logic for it, and Icarus' words are unknown where it happens."""
    arch = FUZZ_ARCHS["fuzz-square"]
    with SimTransport(arch, memory_bytes=MEMORY_BYTES, simulator="icarus") as core:
        core.watch_buffers()
        ran = [check_network(arch, seed, core) for seed in (1, 4, 8, 10)]
        accesses = core.buffer_accesses()
    assert all(ran)
    assert accesses["collisions"] == 0, accesses
    assert accesses["both"] > 100, accesses
    assert accesses["reads"] > 3000, accesses
