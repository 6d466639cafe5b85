"""The command, as users call it: what it prints, what it writes, and how it fails."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nibblecore.models.resnet8 import ResNet8
from nibblecore.qat import QConfig, calibrate, prepare, save_checkpoint
from nibblecore.runtime.program import Program

SHAPE = (1, 8, 8)


def call(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nibblecore.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr or "--debug" in arguments
    return done


def call_json(*arguments: object, status: int = 0) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(call(*arguments, "--json", status=status).stdout)
    return values


def error(*arguments: object) -> str:
    """What a command that fails says, as one line."""
    return re.sub(r"\s+", " ", call(*arguments, status=1).stderr).strip()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network: the command does not care how well it recognizes anything."""
    torch.manual_seed(0)
    images = torch.rand(32, *SHAPE)
    model = prepare(ResNet8().eval(), QConfig(), images[:1], (0.0, 1.0))
    calibrate(model, [images])
    path = tmp_path_factory.mktemp("checkpoint") / "untrained.ckpt"
    save_checkpoint(model, path, factory="nibblecore.models.resnet8:ResNet8")
    return path


@pytest.fixture(scope="module")
def program(checkpoint: Path) -> Path:
    path = checkpoint.with_suffix(".nib")
    values = call_json("compile", checkpoint, "--arch", "small", "-o", path)
    assert values["file"] == str(path)
    assert values["predicted_cycles"] > 0
    assert len(values["layers"]) == 11
    return path


def test_compile_is_deterministic(checkpoint: Path, program: Path, tmp_path: Path) -> None:
    call("compile", checkpoint, "-o", tmp_path / "again.nib")
    assert (tmp_path / "again.nib").read_bytes() == program.read_bytes()


def test_run_on_golden_gives_the_integers_and_real_numbers(program: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(1).random((3, *SHAPE))
    np.save(tmp_path / "images.npy", images)
    out = tmp_path / "out.npy"
    values = call_json("run", program, "-i", tmp_path / "images.npy", "-o", out)
    assert values["images"] == 3
    assert values["cycles"] == []
    real = np.load(out)
    assert real.shape == (3, 10, 1, 1)
    binding = Program.load(program).outputs[0]
    codes = np.array(values["outputs"][1][binding.name]).reshape(10, 1, 1)
    assert np.array_equal(binding.dequantize(codes), real[1])


def test_diff_compares_every_layer(checkpoint: Path) -> None:
    values = call_json("diff", checkpoint, "--on", "golden")
    assert values["mismatches"] == 0
    assert {r["tensor"] for r in values["tensors"]} >= {"stem.0", "stage1.add", "classifier"}


def test_lint_disasm_estimate_info(program: Path) -> None:
    assert call_json("lint", program)["findings"] == []
    listing = call("disasm", program).stdout.splitlines()
    assert len(listing) == len(Program.load(program).instructions)
    assert listing[-1].split() == [str(len(listing) - 1), "end"]
    estimate = call_json("estimate", program)
    assert sum(layer["cycles"] for layer in estimate["layers"]) == estimate["predicted_cycles"]
    assert call_json("info", program)["predicted_cycles"] == estimate["predicted_cycles"]
    assert set(call_json("info")["archs"]) == {"tiny", "small", "large", "xlarge"}


def test_lint_fails_on_a_program_with_a_race(program: Path, tmp_path: Path) -> None:
    loaded = Program.load(program)
    instructions = list(loaded.instructions)
    position = next(k for k, i in enumerate(instructions) if i["wait"])
    fields = {**instructions[position].fields, "wait": 0}
    instructions[position] = type(instructions[position])(instructions[position].opcode, fields)
    loaded.replace(instructions=instructions).save(tmp_path / "racy.nib")
    assert call_json("lint", tmp_path / "racy.nib", status=1)["findings"]


def test_factory_with_state_dict(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynet.py").write_text(
        "import torch\n"
        "from nibblecore.models.resnet8 import ResNet8\n"
        "from nibblecore.qat import QConfig, prepare\n"
        "def plain():\n"
        "    return ResNet8()\n"
        "def quantized():\n"
        "    return prepare(ResNet8().eval(), QConfig(), torch.zeros(1, 1, 8, 8), (0.0, 1.0))\n"
    )
    from nibblecore.qat import load_checkpoint

    torch.save(load_checkpoint(checkpoint).state_dict(), tmp_path / "state.pt")
    monkeypatch.chdir(tmp_path)
    values = call_json("compile", "mynet:quantized", "--weights", "state.pt", "-o", "net.nib")
    assert values["predicted_cycles"] > 0
    torch.save(ResNet8().state_dict(), tmp_path / "plain.pt")
    assert error("compile", "mynet:plain", "--weights", "plain.pt") == (
        "error: mynet:plain returned ResNet8, which has no quantizers. Return nibblecore.qat.prepare(model, ...), and "
        "give the state dict that its training ended with."
    )
    assert error("compile", "mynet:quantized") == (
        "error: mynet:quantized needs its state dict. Give the file with --weights."
    )


def test_errors_are_sentences(program: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.nib"
    assert error("run", missing) == f"error: {missing}: cannot be read: No such file or directory"
    short = tmp_path / "short.nib"
    short.write_bytes(program.read_bytes()[:1000])
    assert error("lint", short).startswith(f"error: {short}: is not a program file, or is truncated (")
    assert error("run", program, "--on", "silicon").startswith(
        "error: there is no way to run on 'silicon'; installed are golden"
    )
    assert error("run", program, "--waves", tmp_path / "w") == (
        "error: --waves needs a simulation of hardware. Add --on rtl."
    )
    np.save(tmp_path / "wrong.npy", np.zeros((2, 3)))
    assert error("run", program, "-i", tmp_path / "wrong.npy").endswith(
        "has shape (2, 3); the input 'x' takes (1, 8, 8) per image"
    )
    (tmp_path / "text.npy").write_text("hello")
    assert "text.npy: is not a NumPy array file (" in error("run", program, "-i", tmp_path / "text.npy")
    assert error("compile", program, "--arch", "huge") == (
        "error: there is no core 'huge'; the named cores are tiny, small, large, xlarge"
    )
    assert error("compile", program, "-o", tmp_path) == (
        f"error: {tmp_path} is a folder, not a file to write. Give the name of a file."
    )


def test_wrong_usage_exits_with_2() -> None:
    assert "No such command" in call("fly", status=2).stderr
    assert "Missing argument" in call("run", status=2).stderr


def test_traceback_only_with_debug(tmp_path: Path) -> None:
    assert "Traceback" in call("run", tmp_path / "missing", "--debug", status=1).stderr
