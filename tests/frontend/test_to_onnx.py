"""Every operator in ONNX Runtime against the interpreter; the file as such; refusals."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from nibblecore import ir
from nibblecore.arch import numerics
from nibblecore.arch.config import get_arch
from nibblecore.errors import CompileError, ExecutionError, GraphError, ToolchainError
from nibblecore.frontend import to_onnx as module
from nibblecore.frontend.run_onnx import OnnxLayers, OnnxRun, single
from nibblecore.frontend.to_onnx import export_onnx, power_of_two, prove, to_onnx
from nibblecore.ir.random_graph import GraphBuilder, random_inputs, random_network

Shape = tuple[int, int, int]


def network(seed: int) -> tuple[ir.Graph, dict[str, Any], dict[str, Any]]:
    """A random graph, inputs and every tensor."""
    rng = np.random.default_rng(seed)
    graph = random_network(rng, get_arch("tiny"), every_operator=True)
    inputs = random_inputs(graph, rng, images=4)
    return graph, inputs, ir.run(graph, inputs, keep=True)


def operator(kind: str, seed: int) -> ir.Graph:
    """A graph around one operator."""
    rng = np.random.default_rng(seed)
    bits = (4, 8)[seed % 2]
    builder = GraphBuilder(rng, (6, 7, 8), bits=8 if kind == "lookup" else bits)
    x = builder.input
    if kind.startswith("conv"):
        out_bits = {"conv4": 4, "conv8": 8, "conv32": 32}[kind]
        padding, dilation = (1, 2, 0, 1), (1 + seed % 2, 1)
        y = builder.conv(x, 5, stride=(1, 2), padding=padding, dilation=dilation, bits=out_bits)
    elif kind == "depthwise":
        y = builder.conv(x, 12, groups=6)
    elif kind == "groups":
        y = builder.conv(x, 9, groups=3, weight_bits=8)
    elif kind == "add":
        y = builder.add(x, builder.conv(x, 6, bits=(8, 4)[seed % 2]))
    elif kind == "add itself":
        y = builder.add(x, x)
    elif kind == "multiply":
        y = builder.multiply(x, builder.conv(x, 6))
    elif kind == "squeeze-excite":
        y = builder.multiply(x, builder.conv(builder.avg_pool(x), 6, kernel=(1, 1), padding=(0, 0, 0, 0)))
    elif kind == "lookup":
        y = builder.lookup(x)
    elif kind == "max_pool":
        y = builder.max_pool(x, kernel=(3, 2), stride=(2, 1), padding=(2, 1, 0, 1), dilation=(1, 2))
    elif kind == "avg_pool":
        y = builder.avg_pool(x, kernel=(3, 2), stride=(1, 2), padding=(2, 1, 0, 1))
    elif kind == "global avg_pool":
        y = builder.avg_pool(x)
    elif kind == "concat":
        y = builder.concat(x, x, builder.on_grid_of(x, x))
    elif kind == "upsample":
        y = builder.upsample(x, (2, 3))
    else:
        assert kind == "flatten"
        y = builder.flatten(x)
    return builder.finish(y)


KINDS = ["conv4", "conv8", "conv32", "depthwise", "groups", "add", "add itself", "multiply", "squeeze-excite", "lookup",
         "max_pool", "avg_pool", "global avg_pool", "concat", "upsample", "flatten"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_each_operator_gives_the_integers(kind: str, seed: int) -> None:
    graph = operator(kind, seed)
    inputs = random_inputs(graph, np.random.default_rng(seed), images=5)
    want = ir.run(graph, inputs, keep=True)
    run = OnnxRun(graph, threads=1)
    got = run.run(inputs)
    assert set(got) == set(graph.tensors)
    for name in graph.tensors:
        assert np.array_equal(got[name], want[name]), f"seed {seed}: {name}"
    assert set(run.model.exactness.values()) <= {"float32", "float64"}
    for name, codes in OnnxLayers(graph, style="plain", threads=1).run(want).items():
        most = 1 if graph.tensors[name].bits != 32 else 0
        assert np.abs(codes - want[name]).max() <= most, f"seed {seed}: {name}"


def test_kinds_are_all_operators() -> None:
    made = {type(node) for kind in KINDS for node in operator(kind, 0).nodes}
    assert made == set(module._EMIT)


@pytest.mark.parametrize("seed", range(12))
def test_whole_networks_give_the_integers(seed: int) -> None:
    graph, inputs, want = network(seed)
    got = OnnxRun(graph, threads=1).run(inputs)
    for name in graph.tensors:
        assert np.array_equal(got[name], want[name]), f"seed {seed}: {name}"
    isolated = OnnxLayers(graph, threads=1).run(want)
    for name, codes in isolated.items():
        assert np.array_equal(codes, want[name]), f"seed {seed}: {name}, isolated"


@pytest.mark.parametrize("seed", range(6))
def test_plain_style_differs_by_one_code_at_most_in_each_layer(seed: int) -> None:
    graph, _, want = network(seed)
    for name, codes in OnnxLayers(graph, style="plain", threads=1).run(want).items():
        if graph.tensors[name].bits != 32:
            assert np.abs(codes - want[name]).max() <= 1, f"seed {seed}: {name}"


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_the_runtimes_optimizations(level: str, threads: int) -> None:
    graph, inputs, want = network(3)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = threads
    data = to_onnx(graph, inputs="codes").data
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    given = {name: codes.astype(np.int8) for name, codes in inputs.items()}
    for name, value in zip(graph.outputs, session.run(None, given), strict=True):
        tensor = graph.tensors[name]
        real = ir.dequantize(want[name], tensor).reshape(value.shape)
        np.testing.assert_allclose(value, real, rtol=1e-6, atol=0)


# Rounding ----------------------------------------------------------------------------------------------------------


def chain(mult: int, shift: int, *, bits: int = 8, weight: int = 1, bias: int = 0) -> ir.Graph:
    """One 1x1 convolution of one channel: every 8-bit code goes through one requantization."""
    tensors = {"x": ir.TensorType((1, 1, 256), 8, 0.1, 0), "y": ir.TensorType((1, 1, 256), bits, 0.1, 0)}
    low, high = numerics.code_range(bits)
    node = ir.Conv(
        "y", ("x",), "y", np.full((1, 1, 1, 1), weight), 8, np.ones(1), np.array([bias]), np.array([mult]),
        np.array([shift]), (1, 1), (0, 0, 0, 0), (1, 1), low, high,
    )  # fmt: skip
    return ir.verify(ir.Graph((node,), tensors, ("x",), ("y",)))


def every_code(graph: ir.Graph) -> tuple[Any, Any]:
    codes = np.arange(-128, 128).reshape(1, 1, 1, 256)
    return OnnxRun(graph, threads=1).run({"x": codes})["y"], ir.run(graph, {"x": codes})["y"]


@pytest.mark.parametrize("mult", [1, 2, 3, -1, -2, -3, 65536, -65536])
@pytest.mark.parametrize("shift", [1, 2, 3, 17])
@pytest.mark.parametrize("bits", [4, 8])
def test_ties_round_up_and_codes_saturate(mult: int, shift: int, bits: int) -> None:
    graph = chain(mult, shift, bits=bits)
    got, want = every_code(graph)
    assert np.array_equal(got, want)
    plain = OnnxRun(graph, style="plain", threads=1).run({"x": np.arange(-128, 128).reshape(1, 1, 1, 256)})["y"]
    # The test would be pointless if the runtime's rule for ties, to even, gave the same.
    if abs(mult) == 1 and shift == 1 and bits == 8:
        assert not np.array_equal(plain, want)


@pytest.mark.parametrize("weight", [-128, -1, 127])
def test_signs_of_multipliers_in_the_plain_style(weight: int) -> None:
    # The opposite of -128 does not exist: such a layer gets its signs behind it.
    graph = chain(-70001, 24, weight=weight, bias=300)
    codes = np.arange(-128, 128).reshape(1, 1, 1, 256)
    run = OnnxRun(graph, style="plain", threads=1)
    difference = run.run({"x": codes})["y"] - ir.run(graph, {"x": codes})["y"]
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.05
    kinds = [node.op_type for node in onnx.load_from_string(run.model.data).graph.node]
    assert ("Mul" in kinds) == (weight == -128)


def test_a_multiplier_of_zero_and_a_constant_channel() -> None:
    for graph in (chain(0, 1, bias=7), chain(2, 1, weight=0, bias=-5)):
        got, want = every_code(graph)
        assert np.array_equal(got, want)
        assert len(np.unique(want)) == 1


def test_sums_beyond_float32_are_added_in_float64() -> None:
    rng = np.random.default_rng(0)
    channels = 1200
    for bits in (8, 32):
        tensors = {
            "x": ir.TensorType((channels, 2, 2), 8, 0.01, -128),
            "y": ir.TensorType((3, 2, 2), bits, 0.5 if bits == 8 else (0.1, 0.2, 0.3), 0),
        }
        weight = rng.integers(90, 120, (3, channels, 1, 1))
        bias = 128 * weight.sum(axis=(1, 2, 3)) - 15_000_000
        node = ir.Conv(
            "y", ("x",), "y", weight, 8, np.ones(3), bias, np.array([70001, -70001, 99999]), np.full(3, 31), (1, 1),
            (0, 0, 0, 0), (1, 1), -128, 127,
        )  # fmt: skip
        graph = ir.verify(ir.Graph((node,), tensors, ("x",), ("y",)))
        x = rng.integers(-128, 128, (20, channels, 2, 2))
        run = OnnxRun(graph, threads=1)
        assert run.model.exactness == {"y": "float64"}
        want = ir.run(graph, {"x": x})["y"]
        assert len(np.unique(want)) > 20
        assert np.array_equal(run.run({"x": x})["y"], want)


def test_one_channel_with_too_many_taps_is_said_to_be_approximate() -> None:
    tensors = {"x": ir.TensorType((1, 40, 40), 8, 0.01, -128), "y": ir.TensorType((1, 1, 1), 8, 1.0, 0)}
    node = ir.Conv(
        "y", ("x",), "y", np.full((1, 1, 40, 40), 119), 8, np.ones(1), np.zeros(1, np.int64), np.array([70001]),
        np.array([34]), (1, 1), (0, 0, 0, 0), (1, 1), -128, 127,
    )  # fmt: skip
    assert to_onnx(ir.verify(ir.Graph((node,), tensors, ("x",), ("y",)))).exactness == {"y": "approximate"}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_proved_holds_for_every_total(seed: int) -> None:
    rng = np.random.default_rng(seed)
    channels, reach = 6, int(2 ** rng.integers(4, 16))
    mult = rng.integers(-(1 << 17), 1 << 17, channels)
    mult[0] = 1 << int(rng.integers(0, 17))  # many ties
    shift = rng.integers(12, 30, channels)
    low, high = sorted(int(v) for v in rng.integers(-200, 200, 2))
    lowest, highest = np.full(channels, -reach), np.full(channels, reach - 1)
    found = prove(mult, shift, lowest, highest, highest + 2, (low, high))
    if found is None:  # of 8-bit codes over few totals; the float64 path has its own test
        assert reach > 1 << 8, f"seed {seed}"
        return
    total = np.arange(-reach, reach)[None]
    want = numerics.requantize(total, 0, mult[:, None], shift[:, None]).clip(low, high)
    x = (total + found.offset[:, None]).astype(np.float32)
    assert np.array_equal(x.astype(np.float64), total + found.offset[:, None])
    assert np.array_equal(np.rint(x * found.factor[:, None]).clip(low, high), want), f"seed {seed}"


def test_powers_of_two() -> None:
    assert [power_of_two(v) for v in (1.0, 0.3, 0.4, 3.0, 1 / 255)] == [1.0, 0.25, 0.5, 4.0, 1 / 256]


# The file ----------------------------------------------------------------------------------------------------------


def test_the_file(tmp_path: Path) -> None:
    graph = operator("conv4", 1)
    (node,) = graph.nodes
    assert isinstance(node, ir.Conv)
    graph = graph.replace(nodes=(dataclasses.replace(node, weight=node.weight.clip(-7, 7), weight_bits=4),))
    result = export_onnx(graph, tmp_path / "net.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_bytes() == result.data == to_onnx(graph).data
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.producer_name == "nibblecore"
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    facts = {p.key: p.value for p in model.metadata_props}
    assert facts["nibblecore.style"] == "exact"
    y = graph.tensors["conv0"]
    assert json.loads(facts["nibblecore.tensors"])["conv0"] == {
        "shape": list(y.shape), "bits": 4, "scale": y.scale, "zero": y.zero,
    }  # fmt: skip
    assert json.loads(facts["nibblecore.exactness"]) == {"net.conv0": "float32"}
    weight = next(i for i in model.graph.initializer if i.name == "conv0.weight")
    assert weight.data_type == onnx.TensorProto.INT4
    assert np.array_equal(numpy_helper.to_array(weight).astype(np.int64), node.weight.clip(-7, 7))
    names = {name for n in model.graph.node for name in n.output}
    assert {"conv0.codes", "input.codes", "input.value"} <= names


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_odd_numbers_of_nibbles(count: int) -> None:
    tensors = {"x": ir.TensorType((count, 1, 1), 4, 0.5, 0), "y": ir.TensorType((1, 1, 1), 32, 1.0, 0)}
    codes = np.arange(-8, -8 + count) * np.where(np.arange(count) % 2, -1, 1)
    weight = codes.clip(-8, 7).reshape(1, count, 1, 1)
    zeros = np.zeros(1, np.int64)
    node = ir.Conv("y", ("x",), "y", weight, 4, np.ones(1), zeros, zeros, zeros + 1, (1, 1), (0, 0, 0, 0), (1, 1), 0, 0)
    graph = ir.verify(ir.Graph((node,), tensors, ("x",), ("y",)))
    run = OnnxRun(graph, threads=1)
    stored = next(i for i in onnx.load_from_string(run.model.data).graph.initializer if i.name == "y.weight")
    assert len(stored.raw_data) == (count + 1) // 2
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.int64), weight)
    x = np.random.default_rng(0).integers(-8, 8, (9, count, 1, 1))
    assert np.array_equal(run.run({"x": x})["y"], ir.run(graph, {"x": x})["y"])


@pytest.mark.parametrize("style", ["exact", "plain"])
def test_real_numbers_in_and_out(style: Any) -> None:
    graph, _, _ = network(5)
    (name,) = graph.inputs
    tensor = graph.tensors[name]
    assert isinstance(tensor.scale, float)
    rng = np.random.default_rng(0)
    lowest, highest = numerics.code_range(tensor.bits)
    x = (rng.uniform(lowest - 2, highest + 2, (3, *tensor.shape)) - tensor.zero) * tensor.scale
    # Ties of the input's grid, and values that no float32 code holds.
    x[0] = (rng.integers(lowest, highest, tensor.shape) + 0.5 - tensor.zero) * tensor.scale
    x[2].flat[:3] = 1e30, -1e30, 3e38
    x = x.astype(np.float32)
    want = ir.run(graph, {name: ir.quantize(x, tensor)})
    options = onnxruntime.SessionOptions()
    if style == "plain":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        x[0] += np.float32(0.1 * tensor.scale)  # ties are the exact style's business
        want = ir.run(graph, {name: ir.quantize(x, tensor)})
    session = onnxruntime.InferenceSession(
        to_onnx(graph, style=style).data, options, providers=["CPUExecutionProvider"]
    )
    assert [i.name for i in session.get_inputs()] == [name]
    assert [o.name for o in session.get_outputs()] == list(graph.outputs)
    for output, value in zip(graph.outputs, session.run(None, {name: x}), strict=True):
        shape = graph.tensors[output].shape
        assert value.shape == (3, *(shape if shape[1:] != (1, 1) else shape[:1]))
        if style == "exact":
            real = ir.dequantize(want[output], graph.tensors[output])
            np.testing.assert_allclose(value, real.reshape(value.shape), rtol=1e-6)


# Refusals ----------------------------------------------------------------------------------------------------------


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    text = (
        "ONNX models need the package 'onnx', which is not installed or does not load: No module named 'onnx'.\n"
        "Install: pip install 'nibblecore[onnx]'"
    )
    with pytest.raises(ToolchainError, match=f"^{re.escape(text)}$"):
        to_onnx(operator("flatten", 0))


def test_missing_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name=name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(
        ToolchainError, match=r"^ONNX models need the package 'onnxruntime', which is not installed or "
    ):
        OnnxRun(operator("flatten", 0))


def test_a_model_that_the_runtime_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ExecutionError, match=r"^ONNX Runtime [\d.]+ does not load the model: no kernel$"):
        OnnxRun(operator("flatten", 0))


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        export_onnx(operator("flatten", 0), tmp_path / "file" / "net.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_module_loads_without_the_packages() -> None:
    code = (
        "import sys, nibblecore.frontend.run_onnx; print(*sorted({'onnx', 'onnxruntime', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_nodes_without_translation() -> None:
    class Exotic(ir.Node):
        pass

    graph = operator("flatten", 0)
    odd = graph.replace(nodes=(*graph.nodes, Exotic("y", (graph.nodes[-1].output,), "net.odd")))
    with pytest.raises(GraphError, match=r"^net\.odd: Exotic is not a node of the integer graph$"):
        to_onnx(odd)


def test_nodes_that_the_writer_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(module._EMIT, ir.Flatten)
    with pytest.raises(CompileError, match=r"^net\.flat0: Flatten has no translation to ONNX\.$"):
        to_onnx(operator("flatten", 0))


def test_an_output_that_is_an_input() -> None:
    graph = operator("flatten", 0)
    with pytest.raises(CompileError, match=r"^input is an input and an output of the network\.$"):
        to_onnx(graph.replace(outputs=(*graph.outputs, "input")))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"style": "loose"}, r"^style must be 'exact' or 'plain', not 'loose'$"),
        ({"inputs": "bytes"}, r"^inputs must be 'real' or 'codes', not 'bytes'$"),
    ],
)
def test_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        to_onnx(operator("flatten", 0), **arguments)


def test_single_node_graphs() -> None:
    graph = operator("add itself", 0)
    layer = single(graph, graph.nodes[0])
    assert (layer.inputs, layer.outputs) == (("input",), (graph.nodes[0].output,))
    assert ir.verify(layer) is layer
