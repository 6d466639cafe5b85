"""Fake quantization in the codes of the integers, and a trained model as an ONNX file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nibblecore import ir
from nibblecore.frontend.run_onnx import OnnxRun
from nibblecore.frontend.to_onnx import to_onnx
from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.qat import QConfig, QuantModel, calibrate, convert, export_onnx, fake_quant_codes, prepare


@pytest.fixture(scope="module")
def network() -> tuple[QuantModel, ir.Graph, dict[str, Any]]:
    """A model, its graph, and every tensor of it."""
    torch.manual_seed(0)
    x = torch.rand(24, 1, 8, 8)
    model = prepare(resnet8_digits().eval(), QConfig(), x)
    calibrate(model, [x])
    graph = convert(model.eval())
    return model, graph, ir.run(graph, {"x": ir.quantize(x.numpy(), graph.tensors["x"])}, keep=True)


@pytest.mark.parametrize("isolated", [False, True])
def test_codes_are_nearly_those_of_the_integers(network: Any, isolated: bool) -> None:
    model, graph, tensors = network
    given = tensors if isolated else {"x": tensors["x"]}
    found = fake_quant_codes(model, graph, given, isolated=isolated)
    assert list(found) == list(graph.tensors)
    for name, codes in found.items():
        assert codes.shape == tensors[name].shape
        if graph.tensors[name].bits == 32:
            assert np.abs(codes - tensors[name]).max() < 0.01 * np.abs(tensors[name]).max()
        else:
            assert (codes != tensors[name]).mean() < 1e-3, name
            assert np.abs(codes - tensors[name]).max() <= 1, name


def test_isolated_layers_do_not_see_what_others_compute(network: Any) -> None:
    model, graph, tensors = network
    planted = {name: codes.copy() for name, codes in tensors.items()}
    # The output of stage1.conv1 is all zero for its reader, whatever the module computes.
    planted["stage1.conv1"][:] = graph.tensors["stage1.conv1"].zero
    isolated = fake_quant_codes(model, graph, planted, isolated=True)
    assert np.array_equal(
        isolated["stage1.conv1"], fake_quant_codes(model, graph, tensors, isolated=True)["stage1.conv1"]
    )
    one_value_per_channel = isolated["stage1.conv2"][:, :, 1:-1, 1:-1]
    assert (one_value_per_channel == one_value_per_channel[:1, :, :1, :1]).all()
    assert np.array_equal(
        isolated["stage2.conv1"], fake_quant_codes(model, graph, tensors, isolated=True)["stage2.conv1"]
    )


@pytest.mark.parametrize(
    "qconfig",
    [
        QConfig(weight_bits=2, act_bits=2),
        QConfig(weight_bits=3, act_bits=3, first_last_bits=4),
        QConfig(weight_range="full", output_bits=8),
        QConfig(method="tqt", scale_kind="power_of_two"),
        QConfig(method="lsq+", shortcut_bits=4),
        QConfig(batch_norm="unfolded"),
    ],
    ids=["2 bits", "3 bits", "full range", "powers of two", "zero points", "unfolded"],
)
def test_every_kind_of_grid_in_onnx(qconfig: QConfig) -> None:
    torch.manual_seed(0)
    net = resnet8_digits()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # factors of both signs
                module.weight.copy_(torch.randn(module.weight.shape))
    x = torch.rand(6, 1, 8, 8)
    model = prepare(net.eval(), qconfig, x)
    calibrate(model, [x])
    graph = convert(model.eval())
    given = {"x": ir.quantize(x.numpy(), graph.tensors["x"])}
    want = ir.run(graph, given, keep=True)
    run = OnnxRun(graph, threads=1)
    assert "approximate" not in run.model.exactness.values()
    for name, codes in run.run(given).items():
        assert np.array_equal(codes, want[name]), name


def test_flattening_that_the_graph_does_not_have() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(5, 1, 6, 6)
    model = prepare(net.eval(), QConfig(), x)
    calibrate(model, [x])
    graph = convert(model.eval())
    tensors = ir.run(graph, {"input": ir.quantize(x.numpy(), graph.tensors["input"])}, keep=True)
    found = fake_quant_codes(model, graph, tensors, isolated=True)
    assert list(found) == list(graph.tensors) == ["input", "0", "2", "4"]
    assert np.array_equal(found["2"], tensors["2"])


def test_a_model_or_its_graph_as_onnx(network: Any, tmp_path: Path) -> None:
    model, graph, _ = network
    export_onnx(model, tmp_path / "model.onnx")
    export_onnx(graph, tmp_path / "graph.onnx")
    data = (tmp_path / "model.onnx").read_bytes()
    assert data == (tmp_path / "graph.onnx").read_bytes() == to_onnx(graph).data
    export_onnx(graph, tmp_path / "plain.onnx", style="plain", inputs="codes")
    assert (tmp_path / "plain.onnx").read_bytes() == to_onnx(graph, style="plain", inputs="codes").data


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^model must be a QuantModel or an integer graph, not a Linear$"):
        export_onnx(nn.Linear(1, 1), tmp_path / "x.onnx")  # type: ignore[arg-type]
