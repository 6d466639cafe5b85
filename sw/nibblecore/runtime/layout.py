"""How tensors lie in memory: NHWC in channel bricks of ``lanes`` nibbles, and the packing of nibbles into bytes.

Word ``((y*W + x)*groups + g)*planes + plane`` of a tensor holds channels ``g*lanes .. g*lanes+lanes-1`` of pixel
``(y, x)``. 4-bit tensors have one plane; 8-bit tensors a high and a low plane
(:func:`nibblecore.arch.numerics.split_code8`); 32-bit tensors ``32*lanes/word_bits`` words per group of little-endian
integers, channel by channel. Byte ``i`` of a word holds lane ``2*i`` in its low and lane ``2*i+1`` in its high nibble.
"""

import numpy as np
import numpy.typing as npt

from ..arch import numerics

Nibbles = npt.NDArray[np.int8]
Codes = npt.NDArray[np.int64]

_LOW = np.array([(b & 15) - 16 * ((b & 15) > 7) for b in range(256)], np.int8)
_HIGH = np.array([(b >> 4) - 16 * ((b >> 4) > 7) for b in range(256)], np.int8)


def bytes_to_nibbles(data: npt.NDArray[np.uint8]) -> Nibbles:
    """``(..., n)`` bytes to ``(..., 2n)`` signed nibbles, low nibble first."""
    result = np.empty((*data.shape[:-1], 2 * data.shape[-1]), np.int8)
    result[..., 0::2] = _LOW[data]
    result[..., 1::2] = _HIGH[data]
    return result


def nibbles_to_bytes(nibbles: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """The inverse of :func:`bytes_to_nibbles`."""
    unsigned = nibbles.astype(np.uint8) & np.uint8(15)
    return unsigned[..., 0::2] | unsigned[..., 1::2] << np.uint8(4)


def planes(bits: int) -> int:
    """Words per pixel and channel group."""
    if bits == 32:
        return 8
    return bits // 4


def groups(channels: int, lanes: int) -> int:
    """Channel groups (bricks of a 4-bit tensor) of ``channels``."""
    return -(-channels // lanes)


def tensor_words(shape: tuple[int, int, int], bits: int, lanes: int) -> int:
    """Words that a ``(C, H, W)`` tensor takes."""
    channels, height, width = shape
    return height * width * groups(channels, lanes) * planes(bits)


def pack(codes: npt.NDArray[np.integer], *, bits: int, zero: int, lanes: int) -> npt.NDArray[np.uint8]:
    """``(C, H, W)`` stored codes of 4 or 8 bits to the bytes of the tensor; unused lanes hold ``zero``."""
    channels, height, width = codes.shape
    count = groups(channels, lanes)
    full = np.full((height, width, count * lanes), zero, np.int64)
    full[..., :channels] = np.moveaxis(codes, 0, -1)
    words = full.reshape(height, width, count, 1, lanes)
    if bits == 8:
        words = np.concatenate(numerics.split_code8(words), axis=3)
    elif bits != 4:
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    return nibbles_to_bytes(words).reshape(-1)


def unpack(data: npt.NDArray[np.uint8], *, shape: tuple[int, int, int], bits: int, lanes: int) -> Codes:
    """The bytes of a tensor to ``(C, H, W)`` stored codes, or sums for 32 bits."""
    channels, height, width = shape
    count = groups(channels, lanes)
    if bits == 32:
        values = data.view("<i4").reshape(height, width, count * lanes).astype(np.int64)
    else:
        words = bytes_to_nibbles(data.reshape(height, width, count, planes(bits), lanes // 2)).astype(np.int64)
        joined = words[:, :, :, 0] if bits == 4 else numerics.join_code8(words[:, :, :, 0], words[:, :, :, 1])
        values = joined.reshape(height, width, count * lanes)
    return np.moveaxis(values, -1, 0)[:channels]
