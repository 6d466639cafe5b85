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
NOISE: Final = 0.2
"""Standard deviation of the noise of :func:`load_noisy`, where black is 1."""
NOISY_COPIES: Final = 4


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


def load_noisy() -> Digits:
    """The digits, with :data:`NOISY_COPIES` of each test image: each moved by up to a pixel, with :data:`NOISE`.

    Harder and with more test images than :func:`load`, so that methods differ by more than chance; always the same.
    Training images are clean: train with the same moves and noise.
    """
    data = load()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    images = torch.from_numpy(data.test_images).repeat(NOISY_COPIES, 1, 1, 1)
    noisy = add_noise(shift_randomly(images, generator), NOISE, generator)
    return dataclasses.replace(data, test_images=noisy.numpy(), test_labels=np.tile(data.test_labels, NOISY_COPIES))


def shift_randomly(images: Tensor, generator: torch.Generator, pixels: int = 1) -> Tensor:
    """Each image moved by up to ``pixels`` in each direction, zeros moving in."""
    n, channels, rows, cols = images.shape
    padded = F.pad(images, (pixels,) * 4)
    moves = torch.randint(0, 2 * pixels + 1, (n, 2), generator=generator)
    row = (moves[:, :1] + torch.arange(rows))[:, None, :, None]
    col = (moves[:, 1:] + torch.arange(cols))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None], row, col]


def add_noise(images: Tensor, std: float, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Normal noise on each value, limited to ``low..high``."""
    return (images + std * torch.randn(images.shape, generator=generator)).clamp(low, high)
