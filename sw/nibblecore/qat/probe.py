"""Are weights stuck at the edges of their bins? (Gupta and Asthana, WACV 2024.)

Weights that oscillate between two codes gather where the rounding decides. Whether the network depends on where they
happen to be is what :func:`soft_round` tells: it leaves those near an edge unrounded. If the accuracy does not drop,
they had settled for values between the levels, and :class:`nibblecore.qat.Ema` or freezing has something to gain.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .methods import wide
from .regularization import low_bit_layers


def _check(k: float) -> None:
    if not 0 <= k <= 0.5:
        raise ValueError(f"k must be at least 0 and at most 0.5, not {k!r}")


@contextmanager
def soft_round(model: nn.Module, k: float = 0.45) -> Iterator[None]:
    """Evaluate with weights that are farther than ``k`` steps from their level left as they are.

    ``round(u)`` becomes ``u`` where ``|u - round(u)| > k``, for the weights of 4 bits and fewer; those that are clipped
    stay so. Integers are not affected. With ``k`` 0.5, nothing changes; with 0, nothing is rounded.

    Raises
    ------
    ValueError
        ``k`` outside 0..0.5, or a method whose codes are not those of ``w / step``.
    """
    _check(k)
    quantizers = [layer.weight_quantizer for _, layer in low_bit_layers(model)]
    before = [quantizer.soft_rounding for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.soft_rounding = k
        yield
    finally:
        for quantizer, value in zip(quantizers, before, strict=True):
            quantizer.soft_rounding = value


@torch.no_grad()
def bin_offsets(model: nn.Module) -> dict[str, Tensor]:
    """Where weights are in their bins, by module path: ``u - round(u)``, -0.5 .. 0.5, of those that are not clipped.

    One dimension per layer, for a histogram. Raises :class:`ValueError` as :func:`soft_round`.
    """
    offsets = {}
    for path, layer in low_bit_layers(model):
        quantizer, weight = layer.weight_quantizer, wide(layer.latent())
        u = weight / quantizer.scale_like(weight)
        inside = (u > quantizer.low) & (u < quantizer.high)
        offsets[path] = (u - quantizer.codes(weight))[inside]
    return offsets


def edge_shares(model: nn.Module, k: float = 0.45) -> dict[str, float]:
    """The share of each layer's weights, clipped ones included, that :func:`soft_round` leaves unrounded, 0..1.

    By module path; weights spread evenly over their bins would give ``1 - 2 * k``. Raises :class:`ValueError` as
    :func:`soft_round`.
    """
    _check(k)
    sizes = {path: layer.weight.numel() for path, layer in low_bit_layers(model)}
    return {path: int((offsets.abs() > k).sum()) / sizes[path] for path, offsets in bin_offsets(model).items()}
