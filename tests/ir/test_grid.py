"""Real numbers to stored codes and back."""

import numpy as np
import pytest

from nibblecore.ir import TensorType, dequantize, quantize

UINT8 = TensorType((1, 1, 3), 8, 1 / 255, -128)


def test_ties_round_up_and_ends_are_limited() -> None:
    tensor = TensorType((1, 1, 7), 4, 0.5, -8)
    real = np.array([-1.0, 0.25, 0.75, 1.24, 3.0, 7.5, 1e30]).reshape(1, 1, 1, 7)
    assert quantize(real, tensor).ravel().tolist() == [-8, -7, -6, -6, -2, 7, 7]


def test_image_bytes_are_exact() -> None:
    tensor = TensorType((1, 16, 16), 8, 1 / 255, -128)
    image = np.arange(256).reshape(1, 1, 16, 16)
    assert np.array_equal(quantize(image / 255, tensor), image - 128)
    assert np.array_equal(quantize((image / 255).astype(np.float32), tensor), image - 128)


def test_dequantize_inverts_quantize() -> None:
    codes = np.array([-128, 0, 127]).reshape(1, 1, 1, 3)
    assert np.array_equal(quantize(dequantize(codes, UINT8), UINT8), codes)


def test_scales_per_channel_of_a_raw_tensor() -> None:
    tensor = TensorType((2, 1, 1), 32, (0.5, 0.25), 0)
    assert dequantize(np.array([3, 3]).reshape(1, 2, 1, 1), tensor).ravel().tolist() == [1.5, 0.75]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^the tensor has shape \(N, 1, 1, 3\), not \(1, 3\)$"):
        quantize(np.zeros((1, 3)), UINT8)
    with pytest.raises(ValueError, match=r"^the tensor contains numbers that are not finite$"):
        quantize(np.array([0, np.nan, 1]).reshape(1, 1, 1, 3), UINT8)
    with pytest.raises(ValueError, match=r"^real numbers are quantized to 4- or 8-bit tensors only, not to 32 bits$"):
        quantize(np.zeros((1, 2, 1, 1)), TensorType((2, 1, 1), 32, (0.5, 0.25), 0))
    with pytest.raises(ValueError, match=r"^the tensor has shape \(N, 1, 1, 3\), not \(3,\)$"):
        dequantize(np.zeros(3, int), UINT8)
