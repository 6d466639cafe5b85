"""A complete training, from nothing to a checkpoint: float, calibration, quantization-aware."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TrainingError
from .checkpoint import load_model, save_checkpoint
from .config import QConfig
from .prepare import QuantModel, calibrate, parameter_groups, prepare
from .recipes import digits

DIGITS_FACTORY: Final = "nibblecore.models.resnet8:resnet8_digits"
BATCH: Final = 64
CALIBRATION_BATCHES: Final = 8


@dataclasses.dataclass(frozen=True)
class Progress:
    """One finished epoch.

    Parameters
    ----------
    phase : {"float", "quantized"}
    epoch, epochs : int
        ``epoch`` counts from 1.
    loss : float
        Mean over the epoch's batches.
    accuracy : float
        On the test images, 0..1.
    """

    phase: str
    epoch: int
    epochs: int
    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training gives: the prepared model in evaluation mode, and accuracies on the test images, 0..1."""

    model: QuantModel
    float_model: nn.Module
    float_accuracy: float
    fake_quant_accuracy: float
    seed: int


def train_digits(
    seed: int = 0,
    *,
    float_epochs: int = 20,
    qat_epochs: int = 10,
    qconfig: QConfig | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train ResNet-8 on scikit-learn's digits and quantize it.

    SGD with momentum 0.9 in both phases: one learning rate cycle up to 0.1 in float; 0.01 falling along a cosine for
    weights and steps in the quantized phase. Images move by up to a pixel. What is returned is the last epoch's model;
    test images choose nothing.

    Parameters
    ----------
    seed : int
        Of initialization, order and augmentation. Runs on one thread, so that the same seed gives the same model
        whatever the number of cores.
    float_epochs, qat_epochs : int
        At least 1 and 0.
    qconfig : QConfig, optional
        W4A4 with 8-bit ends by default.
    checkpoint : str or Path, optional
        Where to write the result, see :func:`nibblecore.qat.save_checkpoint`.
    progress : callable, optional
        Called after each epoch.

    Raises
    ------
    TrainingError
        A loss that is not finite, or scikit-learn is missing.
    """
    if float_epochs < 1 or qat_epochs < 0:
        raise ValueError(f"float_epochs must be at least 1 and qat_epochs 0, not {float_epochs} and {qat_epochs}")
    data = digits.load()
    images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
    test = torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels)
    report = progress or (lambda _: None)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = load_model(DIGITS_FACTORY)
        steps = len(images) // BATCH
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=float_epochs * steps)
        for epoch in range(1, float_epochs + 1):
            loss = _epoch(model, optimizer, cycle, images, labels, generator, f"float epoch {epoch}")
            report(Progress("float", epoch, float_epochs, loss, accuracy(model, *test)))
        float_accuracy = accuracy(model, *test)

        prepared = prepare(model, qconfig or QConfig(), images[:1])
        calibrate(prepared, images[: BATCH * CALIBRATION_BATCHES].split(BATCH))
        groups = parameter_groups(prepared, lr=0.01, step_lr=0.01, weight_decay=1e-4)
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, qat_epochs * steps))
        for epoch in range(1, qat_epochs + 1):
            loss = _epoch(prepared, optimizer, cosine, images, labels, generator, f"quantized epoch {epoch}")
            report(Progress("quantized", epoch, qat_epochs, loss, accuracy(prepared, *test)))
        result = TrainResult(prepared.eval(), model.eval(), float_accuracy, accuracy(prepared, *test), seed)
    if checkpoint is not None:
        save_checkpoint(
            prepared,
            checkpoint,
            factory=DIGITS_FACTORY,
            float_accuracy=result.float_accuracy,
            fake_quant_accuracy=result.fake_quant_accuracy,
            seed=seed,
        )
    return result


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of the label, in evaluation mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(256), labels.split(256), strict=True)
        )
    model.train(was_training)
    return right / len(labels)


def check_loss(loss: Tensor, where: str) -> float:
    """The loss as a number; :class:`TrainingError` where it is none, before it spoils the weights."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(f"The loss is {value} in {where}.", hint="Train again with a smaller learning rate.")
    return value


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    where: str,
) -> float:
    model.train()
    losses = []
    # The last, smaller batch is left out: another one each epoch.
    for batch in torch.randperm(len(images), generator=generator).split(BATCH)[: len(images) // BATCH]:
        loss = F.cross_entropy(model(digits.shift_randomly(images[batch], generator)), labels[batch])
        losses.append(check_loss(loss, where))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return sum(losses) / len(losses)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
