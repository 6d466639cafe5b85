"""Exported graphs in other systems' arithmetic: scales that multipliers are those of, whatever is folded into them."""

from typing import Any

import numpy as np
import pytest
import torch

from nibblecore import ir
from nibblecore.frontend.run_onnx import OnnxLayers
from nibblecore.ir.requantization import MODES
from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.qat import QConfig, add_correction, calibrate, convert, prepare
from nibblecore.qat.layers import QuantLayer

CONFIGS = {
    "folded": QConfig(),
    "unfolded": QConfig(batch_norm="unfolded", method="lsq+", output_bits=8),
    "power_of_two": QConfig(batch_norm="folded_train", scale_kind="power_of_two", input_scale_kind="power_of_two"),
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def network(request: Any) -> tuple[str, ir.Graph, Any]:
    torch.manual_seed(0)
    model = prepare(resnet8_digits(), CONFIGS[request.param], torch.zeros(1, 1, 8, 8))
    if request.param == "unfolded":
        add_correction(model)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, QuantLayer):
                    assert module.correction is not None
                    gamma = module.correction.gamma
                    gamma.uniform_(-1.5, 1.5)
                    gamma[0] = 0.0
    x = torch.rand(32, 1, 8, 8)
    calibrate(model, [x])
    graph = convert(model.eval())
    return request.param, graph, ir.quantize(x.numpy(), graph.tensors["x"])


def test_weight_scales_are_those_of_multipliers(network: tuple[str, ir.Graph, Any]) -> None:
    _, graph, _ = network
    for node in graph.nodes:
        if isinstance(node, ir.Conv) and graph.tensors[node.output].bits != 32:
            kept = node.weight.any(axis=(1, 2, 3))
            x, y = graph.tensors[node.inputs[0]].scale, graph.tensors[node.output].scale
            assert isinstance(x, float)
            assert isinstance(y, float)
            ratio = x * node.weight_scale / y
            np.testing.assert_allclose(np.abs(node.mult * 2.0**-node.shift)[kept], ratio[kept], rtol=2**-16)


@pytest.mark.parametrize("mode", MODES[1:])
def test_modes_differ_seldom_and_by_one(network: tuple[str, ir.Graph, Any], mode: str) -> None:
    name, graph, codes = network
    (summary,), differences = ir.compare_requantization(graph, {"x": codes}, (mode,))
    # Of the operands of a sum HAWQ-V3 rounds both.
    assert all(d.most_alone <= 1 for d in differences)
    if mode in ("tflite-double", "dyadic"):
        # Two roundings where a factor is large, as before a sum; both operands of a sum.
        assert 0.005 < summary.alone < 0.1
    elif name == "power_of_two":
        # Ties are common there, and half to even is not half up.
        assert 0.01 < summary.alone < 0.1 if mode == "onnx" else summary.together == 0
    else:
        assert summary.alone < 1e-3


def test_onnx_is_what_onnx_runtime_computes(network: tuple[str, ir.Graph, Any]) -> None:
    """Its QuantizeLinear between real convolutions, layer by layer; where steps are powers of two, float32 is exact."""
    name, graph, codes = network
    core = ir.run(graph, {"x": codes}, keep=True)
    found = OnnxLayers(graph, style="plain").run(core)
    execute = ir.interpret.executors("onnx")
    unlike_core = compared = 0
    for node in graph.nodes:
        if not isinstance(node, ir.interpret.REQUANTIZE) or graph.tensors[node.output].bits == 32:
            continue
        mine = execute[type(node)](graph, node, *(core[i] for i in node.inputs))
        differing = np.count_nonzero(mine != found[node.output])
        assert differing <= (0 if name == "power_of_two" else 1e-3 * mine.size), node.path
        unlike_core += int(np.count_nonzero(core[node.output] != found[node.output]))
        compared += mine.size
    assert compared > 0
    if name == "power_of_two":
        assert unlike_core > 0.01 * compared
