"""``nibblecore roundings``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nibblecore import ir
from nibblecore.cli.app import app
from nibblecore.errors import NibbleError
from nibblecore.models.resnet8 import ResNet8
from nibblecore.qat import QConfig, calibrate, convert, prepare, save_checkpoint

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ir.Graph]:
    torch.manual_seed(0)
    images = torch.rand(16, *SHAPE)
    model = prepare(ResNet8().eval(), QConfig(), images[:1])
    calibrate(model, [images])
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(model, folder / "net.ckpt", factory="nibblecore.models.resnet8:ResNet8")
    np.save(folder / "images.npy", images.numpy())
    return folder / "net.ckpt", folder / "images.npy", convert(model.eval())


def test_shares_are_those_of_the_interpreter(checkpoint: tuple[Path, Path, ir.Graph]) -> None:
    path, images, graph = checkpoint
    arguments = ["roundings", str(path), "-i", str(images), "--modes", "gemmlowp, onnx"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    codes = ir.quantize(np.load(images), graph.tensors["x"])
    summaries, differences = ir.compare_requantization(graph, {"x": codes}, ("gemmlowp", "onnx"))
    assert values["images"] == 16
    assert [(m["mode"], m["alone"], m["together"], m["classes"]) for m in values["modes"]] == [
        (s.mode, s.alone, s.together, s.classes) for s in summaries
    ]
    assert [row["alone"] for row in values["layers"]] == [d.alone for d in differences]
    result = CliRunner().invoke(app, [*arguments, "--layers"])
    assert result.exit_code == 0, result.output
    text = result.stdout.split()
    assert f"{summaries[0].alone:.4%}" in text
    assert text.count("stage2.conv1") == 2


def test_every_mode_by_default(checkpoint: tuple[Path, Path, ir.Graph]) -> None:
    result = CliRunner().invoke(app, ["roundings", str(checkpoint[0])])
    assert result.exit_code == 0, result.output
    for mode in ("tflite-double", "tflite-single", "tflite-16x8", "dyadic", "onnx"):
        assert mode in result.stdout


def test_unknown_mode(checkpoint: tuple[Path, Path, ir.Graph]) -> None:
    result = CliRunner().invoke(app, ["roundings", str(checkpoint[0]), "--modes", "float"])
    assert isinstance(result.exception, NibbleError)
    assert str(result.exception).startswith("there is no requantization 'float'; there is nibblecore, tflite-double, ")
