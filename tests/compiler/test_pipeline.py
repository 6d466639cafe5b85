"""Whole compilations: program against interpreter, determinism, options, targets."""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from nibblecore.arch.config import get_arch
from nibblecore.arch.isa import Opcode, Region, to_bytes
from nibblecore.compiler import CompileOptions, compile_graph, estimate
from nibblecore.errors import CompileError
from nibblecore.ir.graph import Graph
from nibblecore.ir.random_graph import GraphBuilder, random_layer, random_network

from .conftest import CORES, Checked

NAMES = sorted(CORES)


def options_for(seed: int, rng: np.random.Generator) -> CompileOptions:
    return CompileOptions(
        dump_tensors=seed % 3 == 0,
        keep_on_chip=seed % 4 != 1,
        prefetch=seed % 5 != 2,
        tile_pixels=int(rng.integers(8, 40)) if seed % 2 else None,
    )


@contextlib.contextmanager
def tolerated() -> Iterator[None]:
    """The generator does not know the accumulators' width nor what the smallest buffers hold: it may be refused."""
    try:
        yield
    except CompileError as error:
        allowed = ("acc_bits", "act_depth", "Pool it first")
        unexpected = [v for v in error.violations if not any(a in v for a in allowed)]
        assert not unexpected, unexpected


@pytest.mark.parametrize("core", NAMES)
@pytest.mark.parametrize("seed", range(8))
def test_random_layer(checked: Checked, core: str, seed: int) -> None:
    rng = np.random.default_rng([seed, NAMES.index(core)])
    graph = random_layer(rng, CORES[core])
    with tolerated():
        checked(graph, CORES[core], options_for(seed, rng), seed=seed, order=seed)


@pytest.mark.parametrize("core", ["narrow", "parts", "small", "wide"])
@pytest.mark.parametrize("seed", range(4))
def test_random_layer_beyond_the_buffers(checked: Checked, core: str, seed: int) -> None:
    rng = np.random.default_rng([seed, NAMES.index(core), 1])
    graph = random_layer(rng, CORES[core], large=True)
    options = dataclasses.replace(options_for(seed, rng), tile_pixels=None)
    with tolerated():
        checked(graph, CORES[core], options, seed=seed)


@pytest.mark.parametrize("core", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_random_network(checked: Checked, core: str, seed: int) -> None:
    rng = np.random.default_rng([seed, NAMES.index(core), 2])
    graph = random_network(rng, CORES[core])
    with tolerated():
        checked(graph, CORES[core], options_for(seed, rng), seed=seed, order=seed)


def single(**choices: object) -> Graph:
    rng = np.random.default_rng(3)
    builder = GraphBuilder(rng, (64, 16, 16), bits=4)
    return builder.finish(builder.conv(builder.input, 64, bits=4, weight_bits=4, **choices))  # type: ignore[arg-type]


def resnet8() -> Graph:
    """The shape of the demo's network: 8x8 digits, 16, 32 and 64 channels."""
    b = GraphBuilder(np.random.default_rng(4), (1, 8, 8), bits=8)
    x = b.conv(b.input, 16, bits=4, weight_bits=8)
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        y = b.conv(x, width, stride=(stride, stride), bits=4, weight_bits=4)
        y = b.conv(y, width, bits=8, weight_bits=4)
        if stride > 1:
            x = b.conv(x, width, kernel=(1, 1), padding=(0, 0, 0, 0), stride=(stride, stride), bits=8, weight_bits=4)
        x = b.add(y, x, bits=4)
    return b.finish(b.linear(b.flatten(b.avg_pool(x, bits=8)), 10, bits=32), name="resnet8")


def test_a_layer_keeps_the_array_busy(checked: Checked) -> None:
    """Design target for a single 3x3 layer of 64 channels, input and output DMA included."""
    program = checked(single(), get_arch("small"))
    report = estimate(program)
    assert report.cycles == program.predicted_cycles
    assert report.utilization >= 0.85
    assert "conv0 (Conv)" in report.table(program)


@pytest.mark.parametrize("core", ["tiny", "small", "large", "xlarge"])
def test_the_demo_stays_on_chip(checked: Checked, core: str) -> None:
    program = checked(resnet8(), get_arch(core))
    assert Region.SCRATCH not in program.region_sizes
    loads = [i for i in program.instructions if i.opcode is Opcode.LOAD and not i["target"]]
    assert {i["region"] for i in loads} == {Region.INPUT}
    assert [layer.op for layer in program.layers].count("Conv+Add") == 3
    stem, head = program.layers[0], program.layers[-1]
    assert (stem.macs, stem.nibble_products) == (16 * 9 * 64, 4)
    assert (head.macs, head.nibble_products) == (64 * 10, 2)
    assert program.nibble_macs == sum(layer.macs for layer in program.layers) + 3 * stem.macs + head.macs


def test_dumped_tensors_cover_every_layer(checked: Checked) -> None:
    program = checked(resnet8(), get_arch("small"), CompileOptions(dump_tensors=True))
    assert {b.name for b in (*program.tensors, *program.outputs)} == {layer.name for layer in program.layers}


def test_everything_through_dram(checked: Checked) -> None:
    program = checked(resnet8(), get_arch("small"), CompileOptions(keep_on_chip=False))
    assert program.region_sizes[Region.SCRATCH] > 0


def test_the_same_input_gives_the_same_bytes() -> None:
    for core in ("small", "parts"):
        first, second = (
            compile_graph(random_network(np.random.default_rng(5), CORES[core]), CORES[core]) for _ in "ab"
        )
        assert first.to_bytes() == second.to_bytes()


def test_weights_that_no_nibble_reaches_take_another_pass(checked: Checked) -> None:
    """8-bit weights above 119 have a high nibble of 8."""
    builder = GraphBuilder(np.random.default_rng(6), (5, 4, 4), bits=8)
    graph = builder.finish(builder.conv(builder.input, 20, weight_bits=8, bits=8))
    conv = graph.nodes[0]
    weight = np.clip(conv.weight, -128, 119)  # type: ignore[attr-defined]
    plain = graph.replace(nodes=(dataclasses.replace(conv, weight=weight),))  # type: ignore[type-var]
    weight = weight.copy()
    weight[17, 2, 1, 1] = 127
    more = graph.replace(nodes=(dataclasses.replace(conv, weight=weight),))  # type: ignore[type-var]
    counts = [
        sum(i.opcode is Opcode.MAC for i in checked(g, get_arch("small"), CompileOptions(tile_pixels=16)).instructions)
        for g in (plain, more)
    ]
    assert counts == [8, 10]  # two column tiles of four products; the second one has a third weight plane


def test_debug_names_the_layer_of_every_instruction() -> None:
    program = compile_graph(resnet8(), get_arch("small"))
    assert program.debug[-1] == -1
    assert sorted(set(program.debug[:-1])) == list(range(len(program.layers)))
    assert len(to_bytes(program.instructions)) == program.region_sizes[Region.PROGRAM]


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^tile_pixels must be at least 1, not 0$"):
        CompileOptions(tile_pixels=0)


@pytest.mark.parametrize("seed", range(12))
def test_what_the_rules_allow_finds_a_place(checked: Checked, seed: int) -> None:
    """Windows that nearly fill the buffer: no fragmentation may refuse what the rules have let pass."""
    core = CORES["parts"]
    rng = np.random.default_rng([seed, 3])
    builder = GraphBuilder(rng, (int(rng.integers(17, 33)), 4, int(rng.integers(8, 12))), bits=8)
    x = builder.conv(builder.input, int(rng.integers(17, 33)), bits=8, weight_bits=4, kernel=(1, 1), padding=(0,) * 4)
    x = builder.avg_pool(x)
    checked(builder.finish(builder.linear(x, 7, bits=32)), core, CompileOptions(tile_pixels=11), seed=seed)
