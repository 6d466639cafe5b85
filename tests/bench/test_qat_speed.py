"""The benchmark runs, and computes what it prints."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qat_speed", Path(__file__).with_name("qat_speed.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ratios_are_taken_within_rounds(speed: ModuleType) -> None:
    # The machine was twice as slow in the second round, and four times in the third.
    times = {speed.FLOAT: [1.0, 2.0, 4.0], speed.QAT: [1.5, 3.2, 5.6], speed.REGULARIZED: [1.65, 3.2, 5.6]}
    result = speed.Result("resnet8", 1, times, {})
    assert result.ratio(speed.QAT, speed.FLOAT) == pytest.approx((1.45, 1.5, 1.55))
    assert [(ratio, limit) for _, ratio, limit in speed.checks(result)] == [(1.5, 1.5), (1.0, 1.1)]


def test_a_short_run(speed: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert speed.main(["--network", "resnet8", "--rounds", "2", "--no-brevitas", "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    assert network["threads"] == 1
    assert len(network["steps"]) == 5
    assert all(step["median_ms"] > 0 for step in network["steps"].values())


def test_arguments_that_make_no_sense(speed: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(["--rounds", "0"])
    assert "--rounds and --threads must be at least 1" in capsys.readouterr().err
