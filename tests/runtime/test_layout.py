import numpy as np
import pytest

from nibblecore.arch import numerics
from nibblecore.runtime import layout


@pytest.mark.parametrize("lanes", [4, 8, 16, 32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (33, 2, 3)])
def test_unpack_inverts_pack(lanes: int, bits: int, shape: tuple[int, int, int]) -> None:
    codes = np.random.default_rng(lanes + bits).integers(*numerics.code_range(bits), shape, endpoint=True)
    data = layout.pack(codes, bits=bits, zero=-3, lanes=lanes)
    assert data.size == layout.tensor_words(shape, bits, lanes) * lanes // 2
    assert (layout.unpack(data, shape=shape, bits=bits, lanes=lanes) == codes).all()
    channels = layout.groups(shape[0], lanes) * lanes
    padding = layout.unpack(data, shape=(channels, *shape[1:]), bits=bits, lanes=lanes)[shape[0] :]
    assert (padding == -3).all()


def test_lane_0_is_the_low_nibble_and_pixels_follow_each_other() -> None:
    codes = np.array([[[1, 5]], [[2, 6]], [[-1, 7]], [[-8, 0]]])
    assert layout.pack(codes, bits=4, zero=0, lanes=4).tolist() == [0x21, 0x8F, 0x65, 0x07]


def test_nibbles() -> None:
    data = np.arange(256, dtype=np.uint8)
    nibbles = layout.bytes_to_nibbles(data)
    assert nibbles.min() == -8
    assert nibbles.max() == 7
    assert (layout.nibbles_to_bytes(nibbles) == data).all()


def test_pack_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match="^bits must be 4 or 8, not 32$"):
        layout.pack(np.zeros((1, 1, 1), np.int64), bits=32, zero=0, lanes=4)
