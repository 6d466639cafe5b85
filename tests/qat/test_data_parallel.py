"""Training in two processes, each with half of every batch, against one process: same integers, same everything."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nibblecore.qat import QConfig, calibrate, prepare

WORKER = Path(__file__).with_name("data_parallel.py")
SW = Path(__file__).parents[2] / "sw"

Result = dict[str, Any]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load(WORKER)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Result], dict[str, Result]]:
    """What two processes under ``torchrun`` end with."""
    folder = tmp_path_factory.mktemp("data_parallel")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SW), os.environ.get("PYTHONPATH", ""))),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [*command, str(WORKER), str(folder)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


def flat(result: Result, prefix: str = "") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in result.items():
        if isinstance(value, dict):
            tensors |= flat(value, f"{prefix}{key}: ")
        else:
            tensors[prefix + key] = torch.as_tensor(value)
    return tensors


@pytest.mark.parametrize("case", list(worker.CASES))
def test_two_processes_train_as_one(case: str, ranks: tuple[dict[str, Result], dict[str, Result]]) -> None:
    first, second = (flat(r[case]) for r in ranks)
    alone = flat(worker.train(case, 0, 1))
    assert first.keys() == second.keys() == alone.keys()
    assert sum("integers" in key for key in alone) == 24
    # All that differs from one process is the order of sums.
    near: Any = {"rtol": 1e-9, "atol": 1e-11} if case != worker.SINGLE else {"rtol": 1e-3, "atol": 1e-5}
    for key, value in alone.items():
        if key == "losses":  # a process's own; their mean is that of the batch
            torch.testing.assert_close((first[key] + second[key]) / 2, value, **near)
            continue
        # Weights, steps, gradients, averages, trackers: bit for bit in both processes.
        assert torch.equal(first[key], second[key]), key
        if value.is_floating_point():
            torch.testing.assert_close(first[key], value, **near, msg=lambda m, key=key: f"{key}: {m}")
        elif case != worker.SINGLE:  # there, a sum of another order may decide a tie
            assert torch.equal(first[key], value), key


def test_uneven_calibration(ranks: tuple[dict[str, Result], dict[str, Result]]) -> None:
    """A process without batches gets the others' steps; where one fails, none is left waiting."""
    first, second = (r["uneven"] for r in ranks)
    assert first["steps"] == second["steps"]
    torch.manual_seed(0)
    model = prepare(worker.Net(), QConfig(), torch.zeros(1, 1, 6, 6))
    calibrate(model, [torch.rand(worker.BATCH, 1, 6, 6)])
    assert first["steps"] == {name: float(q.scale().detach()) for name, q in model._quantizers().items()}
    text = "Calibration batch 1 makes values at x that are not finite."
    assert second["error"] == text
    assert first["error"] == f"Calibration has failed in process 1: {text}"
