"""Between real numbers and stored codes, on the host: what a runtime does with inputs and outputs of a graph."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..arch import numerics
from .graph import IntArray, TensorType


def quantize(real: Any, tensor: TensorType) -> IntArray:
    """Stored codes of real numbers: ``clamp(floor(real/scale + 1/2) + zero)``, computed in float64; ties round up.

    ``real`` has shape ``(N, *tensor.shape)``. Raises :class:`ValueError` for another shape, for 32-bit tensors and for
    numbers that are not finite.
    """
    values = np.asarray(real, dtype=np.float64)
    if isinstance(tensor.scale, tuple) or tensor.bits == 32:
        raise ValueError("real numbers are quantized to 4- or 8-bit tensors only, not to 32 bits")
    if values.shape[1:] != tensor.shape:
        raise ValueError(f"the tensor has shape (N, {', '.join(map(str, tensor.shape))}), not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("the tensor contains numbers that are not finite")
    low, high = numerics.code_range(tensor.bits)
    # Limited before the conversion: int64 of a huge float is undefined.
    codes = np.clip(np.floor(values / tensor.scale + 0.5) + tensor.zero, low, high)
    return codes.astype(np.int64)


def dequantize(codes: IntArray, tensor: TensorType) -> npt.NDArray[np.float64]:
    """``scale * (code - zero)`` as float64; ``codes`` has shape ``(N, *tensor.shape)``."""
    if codes.shape[1:] != tensor.shape:
        raise ValueError(f"the tensor has shape (N, {', '.join(map(str, tensor.shape))}), not {codes.shape}")
    scale = np.asarray(tensor.scale, dtype=np.float64)
    return (codes - tensor.zero) * (scale[:, None, None] if scale.ndim else scale)
