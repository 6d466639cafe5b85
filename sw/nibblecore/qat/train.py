"""The demo's training in one call; :mod:`nibblecore.qat.training` has trainings by recipe."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from .config import QConfig
from .prepare import QuantModel
from .training.data import TensorSplit
from .training.guard import check_loss
from .training.recipe import load_recipe
from .training.trainer import Progress, Trainer, accuracy_of


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
    """Train ResNet-8 on scikit-learn's digits and quantize it: the recipe ``digits``.

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
        A loss, gradient or weight that is not finite, a step that left its range, or scikit-learn is missing.
    """
    if float_epochs < 1 or qat_epochs < 0:
        raise ValueError(f"float_epochs must be at least 1 and qat_epochs 0, not {float_epochs} and {qat_epochs}")
    settings = (f"seed={seed}", f"float.epochs={float_epochs}", f"qat.epochs={qat_epochs}")
    recipe = load_recipe("digits", settings)
    if qconfig is not None:
        recipe = dataclasses.replace(recipe, quantization=qconfig)
    trainer = Trainer(recipe, progress=progress)
    outcome = trainer.train()
    if checkpoint is not None:
        trainer.save(outcome, Path(checkpoint))
    return TrainResult(outcome.model, outcome.float_model, outcome.float_accuracy, outcome.fake_quant_accuracy, seed)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of the label, in evaluation mode."""
    return accuracy_of(model, TensorSplit(images, labels))


__all__ = ["Progress", "TrainResult", "accuracy", "check_loss", "train_digits"]
