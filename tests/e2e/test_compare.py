"""``nibblecore export`` and ``nibblecore diff``: agreement, planted differences, and how they fail."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from nibblecore import ir
from nibblecore.cli import compare
from nibblecore.cli.app import app, main
from nibblecore.errors import NibbleError
from nibblecore.frontend import run_onnx
from nibblecore.models.resnet8 import ResNet8
from nibblecore.qat import QConfig, calibrate, prepare, save_checkpoint

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    images = torch.rand(32, *SHAPE)
    model = prepare(ResNet8().eval(), QConfig(), images[:1], (0.0, 1.0))
    calibrate(model, [images])
    path = tmp_path_factory.mktemp("checkpoint") / "untrained.ckpt"
    save_checkpoint(model, path, factory="nibblecore.models.resnet8:ResNet8")
    return path


@pytest.fixture(scope="module")
def images(checkpoint: Path) -> Path:
    path = checkpoint.with_name("images.npy")
    np.save(path, np.random.default_rng(0).random((20, *SHAPE)))
    return path


def call(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result.stdout


def call_json(*arguments: object, status: int = 0) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(call(*arguments, "--json", status=status))
    return values


def error(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert isinstance(result.exception, NibbleError), result.output
    return str(result.exception)


# export ------------------------------------------------------------------------------------------------------------


def test_export_writes_a_model_that_the_checker_accepts(checkpoint: Path, tmp_path: Path) -> None:
    values = call_json("export", checkpoint, "-o", tmp_path / "net.onnx")
    assert values["layers"] == {"float32": 14, "float64": 0, "approximate": 0}
    assert values["bytes"] == (tmp_path / "net.onnx").stat().st_size
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"), full_check=True)
    assert "exactly, in float32" in call("export", checkpoint, "-o", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "net.onnx").read_bytes()
    call("export", checkpoint, "-o", tmp_path / "plain.onnx", "--style", "plain", "--codes")
    model = onnx.load(tmp_path / "plain.onnx")
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT8


def test_export_goes_beside_the_checkpoint(checkpoint: Path) -> None:
    assert call_json("export", checkpoint)["file"] == str(checkpoint.with_suffix(".onnx"))


def test_export_refuses(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error("export", checkpoint, "--style", "loose") == "--style is exact or plain, not 'loose'."
    assert error("export", checkpoint, "-o", tmp_path) == (
        f"{tmp_path} is a folder, not a file to write.\nGive the name of a file."
    )
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        sys, "argv", ["nibblecore", "export", str(checkpoint), "-o", str(tmp_path / "file" / "net.onnx")]
    )
    with pytest.raises(SystemExit, match=r"^1$"):
        main()
    assert "".join(capsys.readouterr().err.split()) == f"error:{tmp_path}/file:Fileexists"


# diff --------------------------------------------------------------------------------------------------------------


def test_all_executions_agree(checkpoint: Path, images: Path) -> None:
    values = call_json("diff", checkpoint, "-i", images, "--on", "golden,fake-quant,onnx", "--tolerance", "2")
    assert values["images"] == 20
    assert values["failed"] == []
    exact = [r for r in values["tensors"] if r["on"] != "fake-quant"]
    assert sum(r["mismatches"] for r in exact) == 0
    assert {r["on"] for r in exact} == {"golden", "onnx"}
    on_onnx = [r["tensor"] for r in exact if r["on"] == "onnx"]
    assert on_onnx[0] == "stem.0"
    assert on_onnx[-1] == "classifier"
    assert len(on_onnx) == 14


def test_isolated_layers_stay_within_a_code(checkpoint: Path, images: Path) -> None:
    values = call_json("diff", checkpoint, "-i", images, "--on", "fake-quant,onnx,onnx-plain", "--isolated")
    assert values["failed"] == []
    assert max(r["most"] for r in values["tensors"] if r["tensor"] != "classifier") <= 1
    assert sum(r["mismatches"] for r in values["tensors"] if r["on"] == "onnx") == 0


def test_a_planted_difference_is_named(checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_onnx.OnnxRun.run

    def broken(self: run_onnx.OnnxRun, inputs: Any) -> Any:
        result = real(self, inputs)
        code = result["stage2.conv1"][3, 5, 1, 2]
        result["stage2.conv1"][3, 5, 1, 2] = 7 if code < 0 else -8
        result["pool"][0, 0, 0, 0] += 1
        return result

    monkeypatch.setattr(run_onnx.OnnxRun, "run", broken)
    values = call_json("diff", checkpoint, "-i", images, "--on", "onnx", status=1)
    assert values["failed"] == ["onnx"]
    assert values["mismatches"] == 2
    assert values["first"]["onnx"].startswith("stage2.conv1[3, 5, 1, 2]: ")
    text = " ".join(call("diff", checkpoint, "-i", images, "--on", "onnx", status=1).split())
    assert "onnx differs first at stage2.conv1[3, 5, 1, 2]: " in text
    assert "2 of 144,840 codes differ (1.4e-05)" in text


def test_a_difference_on_a_core_is_named(checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compare.execute

    def broken(*arguments: Any, **options: Any) -> Any:
        results = real(*arguments, **options)
        results[2].tensors["stage1.add"][0, 1, 1] ^= 1
        return results

    monkeypatch.setattr(compare, "execute", broken)
    values = call_json("diff", checkpoint, "-i", images, "--on", "golden", status=1)
    assert (values["failed"], values["mismatches"]) == (["golden"], 1)
    assert values["first"]["golden"].startswith("stage1.add[2, 0, 1, 1]: ")


def test_tolerance_counts_codes(checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nibblecore import qat

    real = qat.fake_quant_codes

    def broken(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        result["stem.0"][0, 0, 0, 0] += 3
        return result

    monkeypatch.setattr(qat, "fake_quant_codes", broken)
    arguments = ("diff", checkpoint, "-i", images, "--on", "fake-quant", "--isolated")
    assert call_json(*arguments, "--tolerance", "3")["failed"] == []
    assert call_json(*arguments, status=1)["failed"] == ["fake-quant"]
    assert call_json(*arguments, "--tolerance", "3")["first"]["fake-quant"].startswith("stem.0[0, 0, 0, 0]: ")


def test_sums_are_counted_on_a_grid_of_8_bits() -> None:
    graph = ir.Graph((), {"y": ir.TensorType((2, 1, 1), 32, (0.5, 0.25), 0)}, (), ("y",))
    want = np.array([127_000, 40_000]).reshape(1, 2, 1, 1)
    # One code is 1/127 of 127000 * 0.5: a thousand sums of the first channel, two thousand of the second.
    off = compare.compare(graph, "y", "fake-quant", want + np.array([0, 3000.0]).reshape(1, 2, 1, 1), want, 1.0)
    assert (off.mismatches, off.most, off.failed) == (1, 1.5, True)
    assert off.first == "y[0, 1, 0, 0]: 43000, not 40000"
    near = compare.compare(graph, "y", "fake-quant", want + 400.0, want, 1.0)
    assert (near.mismatches, near.failed) == (0, False)
    exact = compare.compare(graph, "y", "golden", want + 1, want, None)
    assert (exact.mismatches, exact.most, exact.failed) == (2, 1.0, True)


def test_networks_that_the_core_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depthwise convolutions, for one: fake-quant and ONNX compare all the same."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3, groups=4), nn.Hardswish(), nn.Conv2d(4, 3, 1)
    )
    model = prepare(net.eval(), QConfig(), torch.rand(2, 1, 8, 8))
    calibrate(model, [torch.rand(4, 1, 8, 8)])
    monkeypatch.setattr(compare, "load_quantized", lambda *_: (model.eval(), _convert(model)))
    assert call_json("diff", "x", "--on", "fake-quant,onnx")["failed"] == []
    assert error("diff", "x", "--on", "golden").startswith("2: Convolutions have one group; ")


def _convert(model: Any) -> ir.Graph:
    from nibblecore.qat import convert

    return convert(model)


def test_diff_refuses(checkpoint: Path) -> None:
    text = error("diff", checkpoint, "--on", "golden,silicon")
    assert text.startswith("diff compares golden, ")
    assert text.endswith("fake-quant, onnx, onnx-plain, not 'silicon'.\nSeveral go with commas.")
    assert error("diff", checkpoint, "--on", "golden", "--isolated") == (
        "golden executes whole programs, so --isolated has no meaning for it.\n"
        "Compare fake-quant, onnx, onnx-plain with it: --on fake-quant,onnx,onnx-plain"
    )
