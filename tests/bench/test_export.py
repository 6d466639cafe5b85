"""The benchmark runs, and fails where it must."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nibblecore import ir
from nibblecore.arch.config import get_arch
from nibblecore.ir.random_graph import random_inputs, random_network


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark, with a training of one epoch."""
    spec = importlib.util.spec_from_file_location("bench_export", Path(__file__).with_name("export.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    short = dataclasses.replace(module.NETWORKS["resnet8"], float_epochs=1, qat_epochs=1)
    monkeypatch.setitem(module.NETWORKS, "resnet8", short)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


ARGUMENTS = ["--network", "resnet8", "--images", "6", "--workers", "1", "--json"]


def test_a_short_run(export: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(ARGUMENTS) == 0
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    assert network["equal"]
    assert network["layers"] == 14
    compared = network["compared"]
    assert {kind for kind, count in compared.items() if count["must_be_equal"]} == set(export.EQUAL)
    for kind in export.EQUAL:
        assert compared[kind]["mismatches"] == 0
        assert compared[kind]["values"] == (60 if kind == export.LOGITS else compared[kind]["values"])
        assert compared[kind]["same_top1"] == compared[kind]["images"] == 6
    # The program stores what it does not fuse.
    assert 0 < compared[export.GOLDEN]["values"] < compared[export.TORCH]["values"] == compared[export.ONNX]["values"]


def test_a_difference_fails(
    export: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.torch_integers

    def broken(*arguments: Any) -> Any:
        result = real(*arguments)
        result["stage1.add"][0, 0, 0, 0] ^= 1
        return result

    monkeypatch.setattr(export, "torch_integers", broken)
    assert export.main(ARGUMENTS) == 1
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    assert not network["equal"]
    assert network["compared"][export.TORCH]["mismatches"] == 1


@pytest.mark.parametrize("seed", range(8))
def test_the_second_evaluation_knows_every_operator(export: ModuleType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = random_network(rng, get_arch("tiny"), every_operator=True)
    inputs = random_inputs(graph, rng, images=3)
    want = ir.run(graph, inputs, keep=True)
    for name, codes in export.torch_integers(graph, inputs["input"]).items():
        assert np.array_equal(codes, want[name]), f"seed {seed}: {name}"


def test_results_that_are_no_integers_are_differences(export: ModuleType) -> None:
    bench = object.__new__(export.Bench)
    bench.output = "y"
    bench.graph = ir.Graph((), {"y": ir.TensorType((2, 1, 1), 32, (0.5, 0.25), 0)}, (), ("y",))
    sums = bench._sums(np.array([[50.0, 25.0], [50.1, 1e6]], np.float32))
    assert np.array_equal(sums[:, :, 0, 0], [[100, 100], [np.nan, 4e6]], equal_nan=True)


def test_arguments_that_make_no_sense(export: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--images", "0"], ["--images", "361"], ["--workers", "0"]):
        with pytest.raises(SystemExit):
            export.main(arguments)
        assert "--images must be in 1..360, and --workers at least 1" in capsys.readouterr().err
