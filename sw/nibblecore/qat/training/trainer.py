"""A complete training, from a recipe to a checkpoint: float, calibration, quantization-aware, correction.

Everything that the next step depends on is in the checkpoint: parameters, optimizers, schedules, random numbers,
averages, oscillations, the order of the epoch's images and the place in it. So a run that was killed and resumed ends
with the same bits as one that was not.
"""

import dataclasses
import io
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import CheckpointError, DataError
from ...files import write_atomically
from ..averaging import Ema
from ..checkpoint import load_model, save_checkpoint
from ..layers import QuantLayer
from ..pact import clipping_penalty
from ..prepare import QuantModel, add_correction, calibrate, parameter_groups, prepare, reestimate_batch_norm
from ..regularization import (
    OscillationTracker,
    bin_regularization,
    bin_regularization_weight,
    cosine_ramp,
    dampening,
)
from ..tqt import ThresholdFreezer
from .data import Split, augment, check_batch, open_data
from .guard import StepGuard, check_gradients, check_loss, check_weights
from .log import Curves, Log
from .recipe import Optimization, Recipe, load_recipe

FORMAT: Final = 1
STATE: Final = "training.pt"
MODEL: Final = "model.ckpt"
FLOAT: Final = "float.safetensors"
RECIPE: Final = "recipe.toml"
FLOAT_PHASE, QUANTIZED, CORRECTION, DONE = "float", "quantized", "correction", "done"


@dataclasses.dataclass(frozen=True)
class Progress:
    """One finished epoch.

    Parameters
    ----------
    phase : {"float", "quantized", "correction"}
    epoch, epochs : int
        ``epoch`` counts from 1.
    loss : float
        Mean over the epoch's batches.
    accuracy : float
        On the test images, 0..1, of what would be the result: the moving average, if there is one.
    """

    phase: str
    epoch: int
    epochs: int
    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a training gives.

    Parameters
    ----------
    model : QuantModel
        In evaluation mode: averaged, re-estimated and corrected as the recipe says.
    float_model : nn.Module
        In evaluation mode.
    float_accuracy, fake_quant_accuracy : float
        On the test images, 0..1.
    oscillation : float or None
        Share of weights that oscillated at the end of the quantized phase, where it was counted.
    log : Log
    """

    model: QuantModel
    float_model: nn.Module
    float_accuracy: float
    fake_quant_accuracy: float
    oscillation: float | None
    log: Log


class Trainer:
    """Trains as a recipe says.

    Parameters
    ----------
    recipe : Recipe
    run : Path, optional
        The folder for recipe, checkpoints, logs and the result; without it, nothing is written.
    progress : callable, optional
        Called with :class:`Progress` after each epoch.
    tick : callable, optional
        Called with phase, steps done and steps in all after each step.
    tensorboard : bool
        Whether to write curves for TensorBoard, too.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path | None = None,
        *,
        progress: Callable[[Progress], None] | None = None,
        tick: Callable[[str, int, int], None] | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.recipe, self.run = recipe, run
        self.report = progress or (lambda _: None)
        self.tick = tick or (lambda *_: None)
        self.tensorboard = tensorboard and run is not None
        self.log = Log()
        self.curves: Curves | None = None
        self.float_accuracy = math.nan

    @classmethod
    def resume(cls, run: Path, **arguments: Any) -> "Trainer":
        """The trainer of a run folder, to be continued with :meth:`train`. Arguments are those of the class."""
        if not (run / RECIPE).is_file():
            raise CheckpointError(
                f"{run} holds no training: there is no {RECIPE} in it.", hint="Start one with --recipe NAME."
            )
        return cls(load_recipe(run / RECIPE), run, **arguments)

    def train(self) -> Outcome:
        """Train to the end, from the start or from the checkpoint in the run folder.

        Raises
        ------
        DataError, TrainingError, CheckpointError
        """
        recipe = self.recipe
        self.data = open_data(recipe.data)
        state = self._read_state()
        with _threads(recipe.run.threads), _own_random_numbers():
            torch.manual_seed(recipe.run.seed)
            self.generator = torch.Generator().manual_seed(recipe.run.seed)
            self.float_model = load_model(recipe.model.factory, recipe.float_phase.weights or None)
            self._check_fit()
            if self.run is not None and state is None:
                write_atomically(self.run / RECIPE, recipe.to_toml().encode())
            if self.tensorboard and self.run is not None:
                self.curves = Curves(self.run, 0 if state is None else len(state["log"]["rows"]))
            try:
                return self._phases(state)
            finally:
                if self.curves is not None:
                    self.curves.close()

    # --- the phases ---------------------------------------------------------------------------------------------------

    def _phases(self, state: dict[str, Any] | None) -> Outcome:
        recipe = self.recipe
        phase = FLOAT_PHASE if state is None else state["phase"]
        if state is not None:
            self.log.load_state_dict(state["log"])
            self.float_accuracy = state["float_accuracy"]
        if phase == FLOAT_PHASE:
            groups = [{"params": list(self.float_model.parameters())}]
            loop = _Loop(self, FLOAT_PHASE, self.float_model, recipe.float_phase, groups)
            loop.run(state)
            state = None
            self.float_accuracy = self._accuracy(self.float_model)
            if self.run is not None:
                tensors = {k: v.contiguous().clone() for k, v in self.float_model.state_dict().items()}
                write_atomically(self.run / FLOAT, safetensors.torch.save(tensors))
        else:
            assert self.run is not None
            self.float_model = load_model(recipe.model.factory, self.run / FLOAT)

        images, _ = self.data.train.batch(torch.arange(1))
        model = prepare(self.float_model, recipe.quantization, images, self.data.input_range)
        if phase == FLOAT_PHASE:
            calibrate(model, self._calibration_batches())
        if phase in (FLOAT_PHASE, QUANTIZED):
            model, oscillation = self._quantized(model, state if phase == QUANTIZED else None)
            state = None
        else:
            assert state is not None
            oscillation = state["oscillation"]
        if recipe.correction.epochs or phase == CORRECTION:
            parameters = add_correction(model)
            section = Optimization(
                epochs=recipe.correction.epochs, optimizer="adam", lr=recipe.correction.lr, schedule="constant"
            )
            if phase != DONE:
                loop = _Loop(self, CORRECTION, model, section, [{"params": parameters}], oscillation=oscillation)
                loop.run(state if phase == CORRECTION else None)
        if phase == DONE:
            assert state is not None
            model.load_state_dict(state["model"])
        return self._finish(model.eval(), oscillation)

    def _quantized(self, model: QuantModel, state: dict[str, Any] | None) -> tuple[QuantModel, float | None]:
        section = self.recipe.qat
        groups = parameter_groups(model, lr=section.lr, step_lr=section.step_lr, weight_decay=section.weight_decay)
        loop = _QatLoop(self, QUANTIZED, model, section, groups)
        loop.run(state)
        oscillation = loop.tracker.rate(self.recipe.oscillation.frequency) if loop.tracker is not None else None
        result = loop.result()
        assert isinstance(result, QuantModel)
        if self.recipe.batch_norm.reestimate_batches:
            reestimate_batch_norm(result, self._batches(), self.recipe.batch_norm.reestimate_batches)
        return result.eval(), oscillation

    def _finish(self, model: QuantModel, oscillation: float | None) -> Outcome:
        accuracy = self._accuracy(model)
        outcome = Outcome(model, self.float_model.eval(), self.float_accuracy, accuracy, oscillation, self.log)
        if self.run is not None:
            self.save(outcome, self.run / MODEL)
            self._write_state({"phase": DONE, "model": model.state_dict(), "oscillation": oscillation})
        return outcome

    def save(self, outcome: Outcome, path: Path) -> None:
        """Write the result as :func:`nibblecore.qat.save_checkpoint` does, with its accuracies and the seed."""
        save_checkpoint(
            outcome.model,
            path,
            factory=self.recipe.model.factory,
            float_accuracy=outcome.float_accuracy,
            fake_quant_accuracy=outcome.fake_quant_accuracy,
            seed=self.recipe.run.seed,
        )

    # --- data ---------------------------------------------------------------------------------------------------------

    def _check_fit(self) -> None:
        """The network takes the images, and has an output for each class."""
        images, _ = self.data.train.batch(torch.arange(2))
        factory, shape = self.recipe.model.factory, tuple(images.shape[1:])
        random_state = torch.random.get_rng_state()
        was_training = self.float_model.training
        try:
            with torch.no_grad():
                result = self.float_model.eval()(images)
        except Exception as error:  # whatever the network raises
            raise DataError(
                f"{factory} does not take images of shape {shape}, which {self.recipe.data.name} has: {error}"
            ) from error
        finally:
            self.float_model.train(was_training)
            torch.random.set_rng_state(random_state)
        if not isinstance(result, Tensor) or result.shape != (2, self.data.classes):
            got = tuple(result.shape[1:]) if isinstance(result, Tensor) else type(result).__name__
            raise DataError(
                f"{factory} gives {got} for an image; it must be {(self.data.classes,)}, a number for each class of "
                f"{self.recipe.data.name}."
            )

    def _calibration_batches(self) -> Iterator[Tensor]:
        section = self.recipe.data
        generator = torch.Generator().manual_seed(self.recipe.run.seed)
        for indices in torch.arange(len(self.data.train)).split(section.batch)[: section.calibration_batches]:
            images, _ = self.data.train.batch(indices)
            yield augment(images, section, self.data, generator) if section.calibration_augment else images

    def _batches(self) -> Iterator[Tensor]:
        """Training images, changed at random, in an order of their own, once."""
        section = self.recipe.data
        for indices in torch.randperm(len(self.data.train), generator=self.generator).split(section.batch):
            if len(indices) == section.batch:
                yield augment(self.data.train.batch(indices)[0], section, self.data, self.generator)

    def _accuracy(self, model: nn.Module) -> float:
        return accuracy_of(model, self.data.test)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _write_state(self, state: dict[str, Any]) -> None:
        assert self.run is not None
        content = {
            "format": FORMAT,
            "recipe": self.recipe.identity(),
            "float_accuracy": self.float_accuracy,
            "log": self.log.state_dict(),
            "random": _random_state(self.generator),
            **state,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(self.run / STATE, buffer.getvalue())

    def _read_state(self) -> dict[str, Any] | None:
        if self.run is None:
            return None
        path = self.run / STATE
        for leftover in self.run.glob(".*.*"):
            # Of a process that was killed while it wrote.
            if leftover.is_file() and leftover.name.startswith(
                (f".{STATE}.", f".{MODEL}.", ".log.csv.", ".layers.csv.")
            ):
                leftover.unlink()
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            version, recipe = state["format"], state["recipe"]
        except Exception as error:  # torch.load raises a class of its own for each way in which a file can be broken
            raise CheckpointError(
                f"{path} is truncated or no checkpoint of a training.", hint=f"Remove {path} to start again."
            ) from error
        if version != FORMAT:
            raise CheckpointError(f"{path} has format {version}; this version resumes format {FORMAT}.")
        if recipe != self.recipe.identity():
            raise CheckpointError(
                f"{path} belongs to another recipe than the {RECIPE} beside it.",
                hint="Give a changed recipe a folder of its own.",
            )
        return state


class _Loop:
    """Epochs over the training images, resumable at every step."""

    def __init__(
        self,
        trainer: Trainer,
        phase: str,
        model: nn.Module,
        section: Optimization,
        groups: list[dict[str, Any]],
        *,
        oscillation: float | None = None,
    ) -> None:
        self.trainer, self.phase, self.model, self.section = trainer, phase, model, section
        self.recipe = trainer.recipe
        self.oscillation = oscillation
        self.batch = self.recipe.data.batch
        self.steps = len(trainer.data.train) // self.batch
        self.optimizers = self._optimizers(groups)
        self.schedules = [s for o in self.optimizers if (s := self._schedule(o)) is not None]
        self.epoch = self.step = 0
        self.order = torch.zeros(0, dtype=torch.int64)
        self.losses: list[float] = []
        self.terms: list[float] = []
        self.seconds = self.lr = 0.0

    def _optimizers(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        return [self._optimizer(groups, self.section.optimizer)]

    def _optimizer(self, groups: list[dict[str, Any]], kind: str) -> torch.optim.Optimizer:
        section = self.section
        if kind == "adam":
            return torch.optim.Adam(groups, lr=section.lr, weight_decay=0.0)
        decay = section.weight_decay if self.phase == FLOAT_PHASE else 0.0  # quantized groups have their own
        return torch.optim.SGD(
            groups, lr=section.lr, momentum=section.momentum, nesterov=section.nesterov, weight_decay=decay
        )

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
        total = max(1, self.section.epochs * self.steps)
        if self.section.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        if self.section.schedule == "one-cycle":
            highest = [group["lr"] for group in optimizer.param_groups]
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=total)
        return None

    # What the quantized phase has more.

    def prepare_epoch(self) -> None:
        if self.phase == CORRECTION:
            self.model.eval()
        else:
            self.model.train()

    def regularization(self) -> Tensor | None:
        """What is added to the loss of this step."""
        return None

    def after_step(self) -> None:
        """Between steps."""

    def look(self, where: str) -> None:
        """Raise where the model is beyond repair."""
        check_weights(self.model, where)

    def result(self) -> nn.Module:
        """What is evaluated."""
        return self.model

    def columns(self) -> dict[str, Any]:
        """More of the row of an epoch."""
        return {}

    def layers(self) -> list[dict[str, Any]]:
        """Rows for each layer behind an epoch."""
        return []

    def more_state(self) -> dict[str, Any]:
        return {"oscillation": self.oscillation}

    def load_more(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`more_state` gave."""

    # The loop itself.

    def where(self) -> str:
        return f"{self.phase} epoch {self.epoch + 1}"

    def run(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.load(state)
        while self.epoch < self.section.epochs:
            self.one_epoch()

    def one_epoch(self) -> None:
        trainer, data = self.trainer, self.trainer.data
        began = time.monotonic() - self.seconds
        self.prepare_epoch()
        if not self.step:
            self.lr = float(self.optimizers[0].param_groups[0]["lr"])
            self.order = torch.randperm(len(data.train), generator=trainer.generator)
            self.losses, self.terms = [], []
        # The last, smaller batch is left out: another one each epoch.
        for k, indices in list(enumerate(self.order.split(self.batch)))[self.step : self.steps]:
            self.train_on(indices)
            self.step = k + 1
            trainer.tick(self.phase, self.epoch * self.steps + self.step, self.section.epochs * self.steps)
            last = self.step == self.steps
            if not last and self.step % self.recipe.stops.every == 0:
                self.look(f"{self.where()}, step {self.step}")
            every = self.recipe.run.checkpoint_steps
            if every and not last and self.step % every == 0:
                self.look(f"{self.where()}, step {self.step}")
                self.seconds = time.monotonic() - began
                self.save()
        self.look(self.where())
        accuracy = trainer._accuracy(self.result())
        loss = sum(self.losses) / len(self.losses)
        row = {
            "phase": self.phase,
            "epoch": self.epoch + 1,
            "loss": loss,
            "accuracy": accuracy,
            "lr": self.lr,
            **self.columns(),
            "seconds": time.monotonic() - began,
        }
        layers = self.layers()
        trainer.log.rows.append(row)
        trainer.log.layers += layers
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        if trainer.curves is not None:
            trainer.curves.add(row, layers, len(trainer.log.rows))
        self.save()
        trainer.report(Progress(self.phase, self.epoch, self.section.epochs, loss, accuracy))

    def train_on(self, indices: Tensor) -> None:
        trainer, data, section = self.trainer, self.trainer.data, self.recipe.data
        where = f"{self.where()}, step {self.step + 1}"
        images, labels = data.train.batch(indices)
        check_batch(
            images,
            labels,
            data,
            [f"image {int(i)}" for i in indices],
            f"the train images of {section.name}",
            section.allow_constant,
        )
        loss = F.cross_entropy(self.model(augment(images, section, data, trainer.generator)), labels)
        self.losses.append(check_loss(loss, where))
        term = self.regularization()
        if term is not None:
            self.terms.append(check_loss(term, f"the regularization of {where}"))
            loss = loss + term
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        check_gradients(self.model, where)
        if self.section.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.section.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()
        self.after_step()

    def save(self) -> None:
        """Write checkpoint and logs; log files first, so that they are never behind what a resumed run believes."""
        trainer = self.trainer
        if trainer.run is None:
            return
        if not self.step:
            trainer.log.write(trainer.run)
        trainer._write_state(
            {
                "phase": self.phase,
                "epoch": self.epoch,
                "step": self.step,
                "order": self.order,
                "losses": self.losses,
                "terms": self.terms,
                "seconds": self.seconds,
                "lr": self.lr,
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "schedules": [s.state_dict() for s in self.schedules],
                **self.more_state(),
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        self.epoch, self.step, self.order = state["epoch"], state["step"], state["order"]
        self.losses, self.terms, self.seconds = state["losses"], state["terms"], state["seconds"]
        self.lr = state["lr"]
        self.model.load_state_dict(state["model"])
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        for schedule, content in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(content)
        self.load_more(state)
        _set_random_state(self.trainer.generator, state["random"])


class _QatLoop(_Loop):
    """The quantized phase: regularization, averages, oscillations, and a look at the steps."""

    model: QuantModel

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        recipe = self.recipe
        self.total = self.section.epochs * self.steps
        self.guard: StepGuard | None = None
        self.tracker: OscillationTracker | None = None
        self.freezer: ThresholdFreezer | None = None
        self.ema: Ema[QuantModel] | None = None
        uniform = all(
            m.weight_quantizer.uniform
            for m in self.model.modules()
            if isinstance(m, QuantLayer) and m.weight_quantizer.bits <= 4
        )
        self.track = recipe.oscillation.track and uniform
        self.probe = next(self.trainer._calibration_batches())

    def run(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            # Steps are nan until they are loaded, and what looks at them is made behind that.
            self.model.load_state_dict(state["model"])
        self.guard = StepGuard(self.model, self.recipe.stops)
        if self.track:
            self.tracker = OscillationTracker(self.model, self.recipe.oscillation.momentum)
        freezing = self.recipe.threshold_freezing
        if freezing.every:
            start = round(freezing.start * self.total)
            self.freezer = ThresholdFreezer(self.model, start, freezing.every, freezing.momentum)
        if self.recipe.ema.decay:
            self.ema = Ema(self.model, self.recipe.ema.decay, self.recipe.ema.ramp)
        if state is None and self.trainer.run is not None:
            check_weights(self.model, "the calibrated model")
            self.guard.check("the calibrated model")
            self.trainer.log.layers += self.layers()
        super().run(state)

    def _optimizers(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        section = self.recipe.qat
        if section.step_optimizer == "same":
            return [self._optimizer(groups, section.optimizer)]
        *others, steps = groups
        return [self._optimizer(others, section.optimizer)] + (
            [torch.optim.Adam([steps], lr=section.step_lr)] if steps["params"] and section.step_lr else []
        )

    def prepare_epoch(self) -> None:
        self.model.train()
        if self.epoch >= self.recipe.qat.freeze_norm_after * self.section.epochs:
            for module in self.model.modules():
                if isinstance(module, QuantLayer) and module.norm is not None:
                    module.norm.eval()

    def regularization(self) -> Tensor | None:
        recipe, model = self.recipe, self.model
        terms: list[Tensor] = []
        bins = recipe.bin_regularization
        if bins.weight and (
            weight := bin_regularization_weight(bins.schedule, self.epoch, self.section.epochs, bins.weight)
        ):
            terms.append(weight * bin_regularization(model, grad_to_step=bins.grad_to_step, groups=bins.groups))
        damp = recipe.dampening
        if damp.weight and (weight := cosine_ramp(self._done(), self.total, 0.0, damp.weight, damp.start)):
            terms.append(weight * dampening(model, aggregation=damp.aggregation))
        if recipe.qat.clipping_penalty:
            terms.append(recipe.qat.clipping_penalty * clipping_penalty(model))
        return torch.stack(terms).sum() if terms else None

    def _done(self) -> int:
        return self.epoch * self.steps + self.step

    def after_step(self) -> None:
        if self.tracker is not None:
            freezing = self.recipe.freezing
            threshold = 0.0
            if freezing.first:
                threshold = cosine_ramp(self._done(), self.total, freezing.first, freezing.last, freezing.start)
            self.tracker.step(threshold)
        if self.freezer is not None:
            self.freezer.step()
        if self.ema is not None:
            self.ema.update(self.model)

    def look(self, where: str) -> None:
        super().look(where)
        assert self.guard is not None
        self.guard.check(where)
        if not self.step % self.steps:
            self.zeros = self.guard.check_codes(self.probe, where)

    def result(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.model

    def columns(self) -> dict[str, Any]:
        assert self.guard is not None
        steps = [step for _, step, _ in self.guard._steps()]
        row: dict[str, Any] = {
            "regularization": sum(self.terms) / len(self.terms) if self.terms else 0.0,
            "step_min": min(float(s.min()) for s in steps),
            "step_max": max(float(s.max()) for s in steps),
        }
        if self.tracker is not None:
            row["oscillation"] = self.tracker.rate(self.recipe.oscillation.frequency)
            row["frozen"] = self.tracker.frozen()
        return row

    def layers(self) -> list[dict[str, Any]]:
        if self.trainer.run is None:
            return []
        assert self.guard is not None
        epoch = len({r["epoch"] for r in self.trainer.log.layers})
        self.trainer.log.add_histograms(self.model, epoch)
        zeros = self.guard.check_codes(self.probe, self.where()) if not epoch else self.zeros
        rows = []
        for name, module in self.model.named_modules():
            row: dict[str, Any] = {"epoch": epoch, "layer": name}
            if isinstance(module, QuantLayer):
                step = module.scale().detach()
                least, most = float(step.min()), float(step.max())
                row |= {"weight_step_min": least, "weight_step_mean": float(step.mean()), "weight_step_max": most}
                row["weight_zeros"] = zeros.get(f"{name}.weight_quantizer", 1.0)
            output = getattr(module, "output_quantizer", None)
            if output is not None:
                row["act_step"] = float(output.scale().detach())
                row["act_zeros"] = zeros.get(f"{name}.output_quantizer", 0.0)
            if self.tracker is not None and name in self.tracker.state:
                own = self.tracker.state[name]
                row["oscillation"] = float((own["frequency"] > self.recipe.oscillation.frequency).float().mean())
                row["frozen"] = float(own["frozen"].float().mean())
            if len(row) > 2:
                rows.append(row)
        return rows

    def more_state(self) -> dict[str, Any]:
        assert self.guard is not None
        return {
            "guard": self.guard.initial,
            "tracker": None if self.tracker is None else self.tracker.state_dict(),
            "freezer": None if self.freezer is None else self.freezer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_more(self, state: dict[str, Any]) -> None:
        assert self.guard is not None
        self.guard.initial = state["guard"]
        if self.tracker is not None:
            self.tracker.load_state_dict(state["tracker"])
        if self.freezer is not None:
            self.freezer.load_state_dict(state["freezer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def accuracy_of(model: nn.Module, split: Split) -> float:
    """Share of images whose largest logit is that of the label, in evaluation mode."""
    was_training = model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for indices in torch.arange(len(split)).split(256):
            images, labels = split.batch(indices)
            right += int((model(images).argmax(1) == labels).sum())
    model.train(was_training)
    return right / len(split)


def _random_state(generator: torch.Generator) -> dict[str, Any]:
    """Of the training's own generator and, for networks and data sets that use them, of everybody's."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "generator": generator.get_state(),
        "torch": torch.random.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def _set_random_state(generator: torch.Generator, state: dict[str, Any]) -> None:
    generator.set_state(state["generator"])
    torch.random.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave the caller's random numbers as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
