"""scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, ten classes; part of that package, no download."""

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import TrainingError

TEST_IMAGES: Final = 360
SPLIT_SEED: Final = 0
"""Which images are the test set; not the seed of the training."""


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 8, 8)`` as float32 in 0..1, and labels 0..9 as int64."""

    train_images: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]


def load() -> Digits:
    """1437 images to train on and 360 to test, with equal shares of the classes; the same split always."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise TrainingError(
            "The digits come with scikit-learn, which is not installed.", hint="Run: pip install nibblecore[train]"
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels.astype(np.int64), test_size=TEST_IMAGES, random_state=SPLIT_SEED, stratify=labels
    )
    return Digits(train_x, train_y, test_x, test_y)


def shift_randomly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel in each direction, zeros moving in."""
    n, _, rows, cols = images.shape
    padded = F.pad(images, (1, 1, 1, 1))[:, 0]
    moves = torch.randint(0, 3, (n, 2), generator=generator)
    row = (moves[:, :1] + torch.arange(rows))[:, :, None]
    col = (moves[:, 1:] + torch.arange(cols))[:, None, :]
    return padded[torch.arange(n)[:, None, None], row, col][:, None]
