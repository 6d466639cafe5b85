"""Pictures of a run: they exist, show something, and broken runs are named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nibblecore.errors import DataError
from nibblecore.qat.training.log import Log
from nibblecore.qat.training.plots import plot_run

LAYERS = ("stem", "stage1.conv1", "stage1.conv2")


def log(*, quantized: bool = True) -> Log:
    import torch

    random = np.random.default_rng(1)
    result = Log()
    for epoch in range(1, 4):
        result.rows.append({"phase": "float", "epoch": epoch, "loss": 2.0 / epoch, "accuracy": 0.3 * epoch, "lr": 0.1})
    if not quantized:
        return result
    for epoch in range(5):
        row = {
            "phase": "quantized",
            "epoch": epoch,
            "loss": 0.5 / (epoch + 1),
            "accuracy": 0.9,
            "lr": 0.01 / (epoch + 1),
        }
        row |= {"regularization": 0.1 * epoch, "oscillation": 0.01 * epoch, "frozen": 0.1 * epoch}
        if epoch:
            result.rows.append(row)
        for name in LAYERS:
            step = 0.1 * (1 + 0.1 * epoch)
            layer = {"epoch": epoch, "layer": name, "weight_step_mean": step, "act_step": 2 * step}
            layer |= {"weight_step_min": step / 2, "weight_step_max": step * 2, "oscillation": 0.02 * epoch}
            result.layers.append(layer)
            u = torch.from_numpy(random.normal(0, 1.5, 3000)).clamp(-4.5, 3.5)
            result.histograms[f"{name}/low"] = torch.tensor(-4)
            result.histograms[f"{name}/{epoch}/levels"] = torch.histc(u, 160, -4.5, 3.5).long()
            result.histograms[f"{name}/{epoch}/position"] = torch.histc(u - u.round(), 50, -0.5, 0.5).long()
    return result


def test_pictures(tmp_path: Path) -> None:
    log().write(tmp_path)
    paths = plot_run(tmp_path)
    assert [p.name for p in paths] == ["curves.png", "steps.png", "oscillation.png", "weights.png"]
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 250
        # Lines and text on white: neither empty nor full.
        drawn = float((pixels < 250).any(-1).mean())
        assert 0.01 < drawn < 0.8, f"{path.name}: {drawn:.1%} of the pixels are drawn"
        colors = np.unique(pixels.reshape(-1, 3), axis=0)
        assert len(colors) > 20


def test_a_run_without_quantized_phase(tmp_path: Path) -> None:
    log(quantized=False).write(tmp_path)
    assert [p.name for p in plot_run(tmp_path)] == ["curves.png"]


def test_runs_that_cannot_be_drawn(tmp_path: Path) -> None:
    text = rf"^{tmp_path}/log\.csv cannot be read: No such file or directory\.\nName the folder of a training\.$"
    with pytest.raises(DataError, match=text):
        plot_run(tmp_path)
    Log().write(tmp_path)
    with pytest.raises(DataError, match=rf"^{tmp_path} has no finished epoch to plot\.$"):
        plot_run(tmp_path)
    log().write(tmp_path)
    (tmp_path / "histograms.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=rf"^{tmp_path}/histograms\.npz is broken: "):
        plot_run(tmp_path)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from nibblecore.errors import ToolchainError

    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    text = (
        r"^Plots need the package 'matplotlib\.backends\.backend_agg', which is not installed\.\nInstall: pip install "
    )
    with pytest.raises(ToolchainError, match=text):
        plot_run(tmp_path)
