"""Checkpoints: round trip, atomicity, and an error text for every way in which a file can be wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from nibblecore.errors import CheckpointError
from nibblecore.qat import (
    Override,
    QConfig,
    QuantModel,
    calibrate,
    checkpoint_facts,
    load_checkpoint,
    load_model,
    prepare,
    save_checkpoint,
)

KEY = "nibblecore.checkpoint"
FACTORY = "checkpoint_models:small"


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module with factories, importable by name."""
    (tmp_path / "checkpoint_models.py").write_text(
        "from torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))\n"
        "def large():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 3))\n"
        "def number():\n"
        "    return 3\n"
    )
    (tmp_path / "checkpoint_broken.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "checkpoint_models", raising=False)
    return FACTORY


@pytest.fixture
def model() -> QuantModel:
    torch.manual_seed(0)
    qconfig = QConfig(output_bits=8, overrides=(Override(pattern="0", act_bits=8),))
    prepared = prepare(small(), qconfig, torch.zeros(1, 1, 4, 4), (-0.5, 1.0))
    calibrate(prepared, [torch.rand(4, 1, 4, 4)])
    return prepared


@pytest.fixture
def path(model: QuantModel, tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_checkpoint(model, path, factory=FACTORY, float_accuracy=0.5, seed=3)
    return path


def altered(path: Path, **changes: Any) -> None:
    """Rewrite the metadata of a checkpoint; the value None removes an entry."""
    with safetensors.safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[KEY])
    tensors = safetensors.torch.load_file(path)
    content = {k: v for k, v in {**content, **changes}.items() if v is not None}
    safetensors.torch.save_file(tensors, path, {KEY: json.dumps(content)})


def test_round_trip(model: QuantModel, path: Path, models: str) -> None:
    for factory in (models, small):
        loaded = load_checkpoint(path, factory)
        assert not loaded.training
        x = torch.rand(3, 1, 4, 4)
        assert torch.equal(loaded(x), model.eval()(x))
        assert loaded._qconfig == model._qconfig
        assert loaded.get_submodule("input").range.tolist() == [-0.5, 1.0]  # type: ignore[operator, union-attr]
    assert checkpoint_facts(path) == {"float_accuracy": 0.5, "seed": 3}


def test_a_failed_write_leaves_the_old_file(model: QuantModel, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("nibblecore.files.os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(model, path, factory=FACTORY)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".safetensors" or p.name.startswith(".")] == [
        path.name
    ]


def test_only_own_factories_run_unasked(path: Path, models: str) -> None:
    text = (
        rf"^{path} wants to call checkpoint_models:small, which is not part of nibblecore\.\nIf you trust it, name it: "
        r"load_checkpoint\(path, factory='checkpoint_models:small'\)\.$"
    )
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(path)
    assert "checkpoint_models" not in sys.modules


def test_truncated_at_every_eighth(path: Path) -> None:
    data = path.read_bytes()
    for part in range(8):
        path.write_bytes(data[: len(data) * part // 8])
        with pytest.raises(CheckpointError, match=rf"^{path} is truncated or no safetensors file: "):
            load_checkpoint(path, small)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    with pytest.raises(CheckpointError, match=rf"^{missing} cannot be read: No such file or directory"):
        load_checkpoint(missing)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, foreign)
    text = (
        rf"^{foreign} is a safetensors file, but no checkpoint of nibblecore\.\nCheckpoints are written by "
        r"nibblecore\.qat\.save_checkpoint; load others with load_model\.$"
    )
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(foreign)
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(CheckpointError, match=rf"^{image} is truncated or no safetensors file: "):
        load_checkpoint(image)


def test_altered_tensors(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"^{path} has been altered: its tensors do not match their checksum\.$"):
        load_checkpoint(path, small)


def test_altered_metadata(path: Path) -> None:
    altered(path, format=2)
    with pytest.raises(CheckpointError, match=rf"^{path} has checkpoint format 2; this version reads format 1\.$"):
        load_checkpoint(path, small)
    altered(path, format=1, qconfig={"method": "lsq", "overrides": [], "bits": 3})
    with pytest.raises(CheckpointError, match=rf"^{path} describes no model that this version can prepare: .*'bits'"):
        load_checkpoint(path, small)
    altered(path, sha256=None)
    with pytest.raises(CheckpointError, match=rf"^{path} has been altered: its metadata cannot be understood\.$"):
        load_checkpoint(path, small)


def test_another_model(path: Path, models: str) -> None:
    text = (
        rf"^{path} is of another model than this QuantModel: 4\.weight is missing; 4\.bias is missing; "
        r"4\.weight_quantizer\.step is missing; 4\.output_quantizer\.step is missing; 0\.weight has shape "
        r"\(2, 1, 3, 3\), not \(4, 1, 3, 3\); and 3 more\.$"
    )
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(path, "checkpoint_models:large")


def test_load_model_with_weights(models: str, tmp_path: Path) -> None:
    source = small()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        loaded = load_model(models, tmp_path / name)
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("small", r"^A model is named as package\.module:function, not 'small'\.$"),
        (":small", r"^A model is named as package\.module:function, not ':small'\.$"),
        (
            "nowhere.models:small",
            (
                r"^There is no module nowhere for the model nowhere\.models:small\.\nRun in the folder that contains "
                r"it, or install its package\.$"
            ),
        ),
        ("checkpoint_models:tiny", r"^Module checkpoint_models has no tiny for the model checkpoint_models:tiny\.$"),
        ("checkpoint_models:number", r"^checkpoint_models:number returned int, not a torch\.nn\.Module\.$"),
    ],
)  # fmt: skip
def test_load_model_errors(factory: str, text: str, models: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_model(factory)


def test_errors_inside_a_factory_module_are_its_own(models: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        load_model("checkpoint_broken:small")


def test_files_of_weights_that_are_none(models: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    torch.save(small().state_dict(), broken)
    broken.write_bytes(broken.read_bytes()[:300])
    text = (
        rf"^{broken} is truncated or no file of weights\.\nIt must be a \.safetensors file, or one that "
        r"torch\.load\(\.\.\., weights_only=True\) accepts\.$"
    )
    with pytest.raises(CheckpointError, match=text):
        load_model(models, broken)
    whole = tmp_path / "whole.pt"
    torch.save(small(), whole)  # a pickled module would run code
    with pytest.raises(CheckpointError, match=rf"^{whole} is truncated or no file of weights\."):
        load_model(models, whole)
    tensor = tmp_path / "tensor.pt"
    torch.save(torch.zeros(3), tensor)
    with pytest.raises(
        CheckpointError, match=rf"^{tensor} holds no state_dict\.\nSave model\.state_dict\(\), not the model\.$"
    ):
        load_model(models, tensor)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/none\.pt cannot be read: No such file or directory\.$"):
        load_model(models, tmp_path / "none.pt")
