"""Trainings by recipe: phases, logs, checkpoints that resume to the same bits, and what stops them."""

import csv
import dataclasses
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nibblecore.errors import CheckpointError, DataError, TrainingError
from nibblecore.qat import QuantModel, convert, load_checkpoint
from nibblecore.qat.layers import QuantLayer
from nibblecore.qat.training import Outcome, Progress, Trainer, load_recipe
from nibblecore.qat.training.guard import StepGuard, check_gradients, check_weights
from nibblecore.qat.training.trainer import STATE

MODULE = """
import os, signal
import torch
from torch import nn
from nibblecore.qat.training import DataSet, TensorSplit

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, 3)
    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.drop(torch.relu(self.conv(x)))
        return self.head(x.mean((2, 3)))

def net():
    return Net()

def four():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))

class Deadly(TensorSplit):
    # The batch in which the process dies, of all batches of a training.
    def batch(self, indices):
        if "DIE_AT" in os.environ and len(indices) == 8:
            Deadly.count = getattr(Deadly, "count", 0) + 1
            if Deadly.count == int(os.environ["DIE_AT"]):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(indices)

def data():
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(56) % 3
    images = torch.rand(56, 1, 4, 4, generator=generator) / 2 + labels[:, None, None, None] / 4
    return DataSet(train=Deadly(images[:40], labels[:40]), test=TensorSplit(images[40:], labels[40:]), classes=3)
"""
RECIPE = """
summary = "everything at once"
[model]
factory = "tiny_training:net"
[data]
name = "tiny_training:data"
batch = 8
shift = 1
noise = 0.05
calibration_batches = 2
[float]
epochs = 2
lr = 0.05
[qat]
epochs = 3
lr = 0.01
step_lr = 1e-4
step_optimizer = "adam"
[quantization]
weight_bits = 3
act_bits = 3
first_last_bits = 4
batch_norm = "unfolded"
[bin_regularization]
weight = 0.01
[freezing]
first = 0.5
last = 0.05
start = 0.1
[oscillation]
momentum = 0.1
[ema]
decay = 0.9
ramp = 3
[batch_norm]
reestimate_batches = 2
[correction]
epochs = 2
lr = 1e-3
[run]
checkpoint_steps = 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe of a network and a data set that are importable by name; 5 steps an epoch, 7 epochs in all."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny_training.py").write_text(MODULE)
    (folder / "tiny.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder / "tiny.toml"
    sys.modules.pop("tiny_training", None)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> tuple[Outcome, Path]:
    """A run that nothing has interrupted, and its folder."""
    run = recipe.parent / "whole"
    return train(recipe, run), run


def train(recipe: Path, run: Path | None = None, *settings: str, **arguments: Any) -> Outcome:
    return Trainer(load_recipe(recipe, settings), run, tensorboard=False, **arguments).train()


def resume(run: Path) -> Outcome:
    return Trainer.resume(run, tensorboard=False).train()


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(run: Path) -> list[dict[str, str]]:
    """The log, without what no two runs have in common."""
    with (run / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_run_and_what_it_leaves(recipe: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    ticks: list[tuple[str, int, int]] = []
    run = tmp_path / "run"
    state = torch.random.get_rng_state()
    outcome = train(recipe, run, progress=seen.append, tick=lambda *t: ticks.append(t))
    assert torch.equal(torch.random.get_rng_state(), state)
    phases = [("float", 2), ("quantized", 3), ("correction", 2)]
    assert [(p.phase, p.epoch, p.epochs) for p in seen] == [(n, e + 1, c) for n, c in phases for e in range(c)]
    assert ticks == [(n, t + 1, 5 * c) for n, c in phases for t in range(5 * c)]

    log = rows(run)
    assert [(r["phase"], int(r["epoch"])) for r in log] == [(p.phase, p.epoch) for p in seen]
    for row, progress in zip(log, seen, strict=True):
        assert float(row["loss"]) == pytest.approx(progress.loss, rel=1e-5)
        assert float(row["accuracy"]) == pytest.approx(progress.accuracy, rel=1e-5)
    quantized = [r for r in log if r["phase"] == "quantized"]
    assert all(0 < float(r["step_min"]) < float(r["step_max"]) for r in quantized)
    # S2: nothing in the first third.
    assert [float(r["regularization"]) > 0 for r in quantized] == [False, True, True]
    assert [float(r["lr"]) for r in quantized] == pytest.approx([0.01, 0.0075, 0.0025], rel=1e-3)
    assert all(0 <= float(r["oscillation"]) <= 1 for r in quantized)
    assert log[0]["oscillation"] == ""
    with (run / "layers.csv").open(newline="") as file:
        layers = list(csv.DictReader(file))
    assert {(int(r["epoch"]), r["layer"]) for r in layers} >= {
        (e, n) for e in range(4) for n in ("stem", "conv", "head")
    }
    first = next(r for r in layers if r["layer"] == "conv")
    assert float(first["weight_step_min"]) <= float(first["weight_step_mean"]) <= float(first["weight_step_max"])
    assert 0 <= float(first["act_zeros"]) < 1

    assert sorted(p.name for p in run.iterdir()) == [
        "float.safetensors", "histograms.npz", "layers.csv", "log.csv", "model.ckpt", "recipe.toml", "training.pt"
    ]  # fmt: skip
    assert load_recipe(run / "recipe.toml").identity() == load_recipe(recipe).identity()
    loaded = load_checkpoint(run / "model.ckpt", "tiny_training:net")
    assert same(loaded, outcome.model)
    assert not outcome.model.training
    convert(loaded)
    # A run that has ended gives its result again.
    again = resume(run)
    assert same(again.model, outcome.model)
    assert (again.float_accuracy, again.fake_quant_accuracy, again.oscillation) == (
        outcome.float_accuracy,
        outcome.fake_quant_accuracy,
        outcome.oscillation,
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("steps", [1, 3, 10, 14, 22, 25, 27, 34])
def test_a_resumed_run_ends_with_the_same_bits(
    recipe: Path, whole: tuple[Outcome, Path], tmp_path: Path, steps: int
) -> None:
    expected, folder = whole
    left = steps

    def tick(*_: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", tick=tick)
    torch.rand(7)  # somebody else's random numbers
    if steps < 2:  # before the first checkpoint there is nothing but the recipe
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["recipe.toml"]
    outcome = resume(tmp_path / "run")
    assert same(outcome.model, expected.model)
    assert same(outcome.float_model, expected.float_model)
    assert outcome.oscillation == expected.oscillation
    assert rows(tmp_path / "run") == rows(folder)
    for name in ("layers.csv", "model.ckpt", "float.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes(), name


def test_thresholds_that_freeze_resume(recipe: Path, tmp_path: Path) -> None:
    tqt = ("method=tqt", "bin_regularization.weight=0", "threshold_freezing.every=2", "ema.decay=0", "qat.step_lr=0.1")
    whole = train(recipe, tmp_path / "whole", *tqt)
    assert not same(train(recipe, None, *tqt, "threshold_freezing.every=0").model, whole.model)
    left = 19

    def tick(*_: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", *tqt, tick=tick)
    assert same(resume(tmp_path / "run").model, whole.model)


def test_a_killed_process_resumes(recipe: Path, whole: tuple[Outcome, Path], tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch of the quantized phase."""
    expected, folder = whole
    code = (
        "import sys; from pathlib import Path; from nibblecore.qat.training import Trainer, load_recipe; "
        "Trainer(load_recipe(sys.argv[1]), Path(sys.argv[2]), tensorboard=False).train()"
    )
    environment = {**os.environ, "DIE_AT": "21", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "-c", code, str(recipe), str(tmp_path / "run")], env=environment, check=False
    )
    assert process.returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "run" / STATE, weights_only=True)
    assert state["phase"] == "quantized"
    assert 0 < state["step"] < 5
    outcome = resume(tmp_path / "run")
    assert same(outcome.model, expected.model)
    assert (tmp_path / "run" / "model.ckpt").read_bytes() == (folder / "model.ckpt").read_bytes()


def test_a_checkpoint_is_complete_or_the_one_before(
    recipe: Path, whole: tuple[Outcome, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies between the bytes of a checkpoint and its name."""
    run, replace = tmp_path / "run", os.replace

    def die(source: Any, target: Any) -> None:
        if Path(target).name == STATE and Path(target).exists():
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("nibblecore.files.os.replace", die)
        patch.setattr("nibblecore.files.Path.unlink", lambda *_, **__: None)  # the dead clear nothing away
        with pytest.raises(Killed):
            train(recipe, run)
    assert list(run.glob(f".{STATE}.*"))
    torch.load(run / STATE, weights_only=True)
    assert same(resume(run).model, whole[0].model)
    assert not list(run.glob(".*"))


def test_runs_that_cannot_be_resumed(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = rf"^{run} holds no training: there is no recipe\.toml in it\.\nStart one with --recipe NAME\.$"
    with pytest.raises(CheckpointError, match=text):
        resume(run)
    train(recipe, run, "float.epochs=1", "epochs=1", "correction.epochs=0")
    content = (run / STATE).read_bytes()
    (run / STATE).write_bytes(content[: len(content) // 2])
    text = rf"^{run / STATE} is truncated or no checkpoint of a training\.\nRemove {run / STATE} to start again\.$"
    with pytest.raises(CheckpointError, match=text):
        resume(run)
    (run / STATE).write_bytes(content)
    changed = (run / "recipe.toml").read_text().replace("[qat]\nepochs = 1", "[qat]\nepochs = 2")
    (run / "recipe.toml").write_text(changed)
    text = (
        rf"^{run / STATE} belongs to another recipe than the recipe\.toml beside it\.\nGive a changed recipe a folder "
        r"of its own\.$"
    )
    with pytest.raises(CheckpointError, match=text):
        resume(run)


def test_the_seed_decides(recipe: Path) -> None:
    first, second, other = (train(recipe, None, f"seed={s}") for s in (1, 1, 2))
    assert same(first.model, second.model)
    assert not same(first.model, other.model)


def test_what_a_recipe_turns_on(recipe: Path) -> None:
    """Each of them changes the result, and nothing else does."""
    base = ("bin_regularization.weight=0", "freezing.first=0", "freezing.last=0", "ema.decay=0", "correction.epochs=0")
    base = (*base, "batch_norm.reestimate_batches=0")
    plain = train(recipe, None, *base).model
    assert same(train(recipe, None, *base, "oscillation.track=false").model, plain)
    for setting in (
        "bin_regularization.weight=0.5", "dampening.weight=0.1", "ema.decay=0.9", "correction.epochs=1",
        "batch_norm.reestimate_batches=2", "qat.freeze_norm_after=0.3", "qat.step_lr=0", "qat.clip_norm=0.001",
        "qat.optimizer=adam", "qat.schedule=constant", "qat.schedule=one-cycle", "qat.nesterov=true", "data.flip=true",
        "data.calibration_augment=true",
    ):  # fmt: skip
        assert not same(train(recipe, None, *base, setting).model, plain), setting
    frozen = train(recipe, None, *base, "freezing.first=0.01", "freezing.last=0.01", "qat.lr=0.1").log.rows
    assert max(r.get("frozen", 0.0) for r in frozen) > 0


def test_frozen_statistics(recipe: Path) -> None:
    settings = ("ema.decay=0", "correction.epochs=0", "batch_norm.reestimate_batches=0", "qat.freeze_norm_after=0")
    outcome = train(recipe, None, *settings)
    stem = outcome.model.get_submodule("stem")
    assert isinstance(stem, QuantLayer)
    assert stem.norm is not None
    assert torch.equal(stem.norm.running_var, outcome.float_model.get_submodule("norm").running_var)  # type: ignore[arg-type]


# --- stops ------------------------------------------------------------------------------------------------------------


def test_a_network_that_does_not_fit(recipe: Path, tmp_path: Path) -> None:
    text = (
        r"^tiny_training:four gives \(4,\) for an image; it must be \(3,\), a number for each class of "
        r"tiny_training:data\.$"
    )
    with pytest.raises(DataError, match=text):
        train(recipe, tmp_path / "run", "model.factory=tiny_training:four")
    text = r"^tiny_training:net does not take images of shape \(1, 8\), which tiny_training:data has: "
    text = (
        r"^nibblecore\.models\.resnet18:\w+ does not take images of shape \(1, 4, 4\), which tiny_training:data has: "
    )
    with pytest.raises(DataError, match=text):
        train(recipe, tmp_path / "run", "model.factory=nibblecore.models.resnet18:resnet18")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = r"(?s)^The loss is (nan|inf) in quantized epoch \d, step \d\.\n|^In quantized epoch \d, (step \d, )?"
    with pytest.raises(TrainingError, match=text):
        train(recipe, run, "qat.lr=1e30", "qat.schedule=constant")
    state = torch.load(run / STATE, weights_only=True)
    for name, value in state["model"].items():
        assert bool(torch.as_tensor(value).isfinite().all()), name
    assert not (run / "model.ckpt").exists()
    assert not list(run.glob(".*"))


def test_gradients_and_weights_that_are_no_numbers() -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[1.0, math.nan]]), torch.zeros(1)
    check_weights(model, "float epoch 1")
    text = (
        r"^In float epoch 1, step 3, 1 of 2 gradients of weight are not finite; the first is nan\.\nTrain again with a "
        r"smaller learning rate, as with --set qat\.lr=0\.001\.$"
    )
    with pytest.raises(TrainingError, match=text):
        check_gradients(model, "float epoch 1, step 3")
    model.weight.grad = None
    check_gradients(model, "float epoch 1")
    with torch.no_grad():
        model.bias.fill_(math.inf)
    text = r"^In quantized epoch 2, 1 of 1 values of bias are not finite; the first is inf\.\n"
    with pytest.raises(TrainingError, match=text):
        check_weights(model, "quantized epoch 2")


@pytest.fixture
def guarded(recipe: Path) -> tuple[QuantModel, StepGuard, torch.Tensor]:
    chosen = load_recipe(recipe, ("epochs=1", "float.epochs=1", "correction.epochs=0", "ema.decay=0"))
    trainer = Trainer(chosen)
    model = trainer.train().model
    return model, StepGuard(model, chosen.stops), trainer.data.train.batch(torch.arange(8))[0]


def test_steps_that_leave_their_range(guarded: tuple[QuantModel, StepGuard, torch.Tensor]) -> None:
    model, guard, _ = guarded
    conv = model.get_submodule("conv")
    assert isinstance(conv, QuantLayer)
    guard.check("quantized epoch 1")
    step: torch.Tensor = conv.weight_quantizer.step  # type: ignore[assignment]
    assert len(step) == 4
    original = step.detach().clone()
    tail = r" after calibration\.\nTrain again with a smaller qat\.step_lr, or allow more with stops\.step_factor\.$"
    for value, what in (
        (-0.25, r"fell to 0 or below: it is -0\.25 and was "),
        (float(original[2]) / 1025, r"collapsed to less than 1/1024 of its first value: it is "),
        (float(original[2]) * 1025, r"grew to more than 1024 times its first value: it is "),
        (math.nan, r"is not finite: it is nan and was "),
    ):
        with torch.no_grad():
            step.copy_(original)
            step[2] = value
        text = rf"^In quantized epoch 1, the step of conv\.weight_quantizer, channel 2, {what}.*{tail}"
        with pytest.raises(TrainingError, match=text):
            guard.check("quantized epoch 1")
    with torch.no_grad():
        step.copy_(-original)
    guard.stops = dataclasses.replace(guard.stops, sign=False)
    guard.check("quantized epoch 1")  # its magnitude is the step
    guard.stops = dataclasses.replace(guard.stops, sign=True)
    with torch.no_grad():
        step.copy_(original)
        assert conv.output_quantizer is not None
        conv.output_quantizer.step.neg_()  # type: ignore[operator, union-attr]
    with pytest.raises(TrainingError, match=r"^In epoch 2, the step of conv\.output_quantizer fell to 0 or below: it"):
        guard.check("epoch 2")


def test_codes_that_are_all_zero(guarded: tuple[QuantModel, StepGuard, torch.Tensor]) -> None:
    model, guard, images = guarded
    shares = guard.check_codes(images, "quantized epoch 1")
    conv = model.get_submodule("conv")
    assert isinstance(conv, QuantLayer)
    assert shares["conv.weight_quantizer"] == float((conv.int_weight() == 0).float().mean())
    assert 0 <= shares["conv.output_quantizer"] < 1
    assert conv.output_quantizer is not None
    with torch.no_grad():
        conv.output_quantizer.step.mul_(900)  # type: ignore[operator, union-attr]
    text = (
        r"^In quantized epoch 1, 100\.0000% of the codes of conv\.output_quantizer are 0: its step went from .* to "
        r".*\.\nTrain again with a smaller qat\.step_lr or another calibration, or allow more with stops\.zero_share\.$"
    )
    with pytest.raises(TrainingError, match=text):
        guard.check_codes(images, "quantized epoch 1")
    guard.stops = dataclasses.replace(guard.stops, zero_share=1.0)
    guard.check_codes(images, "quantized epoch 1")
    with torch.no_grad():
        conv.weight_quantizer.step.mul_(900)  # type: ignore[operator, union-attr]
    guard.stops = dataclasses.replace(guard.stops, zero_share=0.999)
    with pytest.raises(
        TrainingError, match=r"^In quantized epoch 1, 100\.0000% of the codes of conv\.weight_quantizer "
    ):
        guard.check_codes(images, "quantized epoch 1")


def test_curves_for_tensorboard(recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    Trainer(load_recipe(recipe, ("float.epochs=1", "epochs=2", "correction.epochs=0")), run).train()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"float/loss", "quantized/accuracy", "quantized/oscillation"} <= set(events.Tags()["scalars"])
    log = [r for r in rows(run) if r["phase"] == "quantized"]
    found = events.Scalars("quantized/accuracy")
    assert [e.step for e in found] == [2, 3]
    assert [e.value for e in found] == pytest.approx([float(r["accuracy"]) for r in log], rel=1e-5)
