"""Random contents and instructions for benches of the post unit."""

import math
import random
from typing import Any

import numpy as np

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Instruction, Opcode, OutputMode, make
from nibblecore_hw.core.post import PostUnit

__all__ = ["Surroundings", "bits_of"]


class Surroundings:
    """Buffers and accumulators around the unit, with random contents; reads see what was there in the beginning."""

    def __init__(self, arch: ArchConfig, seed: int) -> None:
        self.arch, self.rng = arch, (rng := random.Random(seed))
        self.act = [rng.getrandbits(arch.word_bits) for _ in range(arch.act_depth)]
        records = sum(self._record() << 64 * n for n in range(arch.weight_depth * arch.word_bits // 64))
        self.weights = [records >> n * arch.word_bits & (1 << arch.word_bits) - 1 for n in range(arch.weight_depth)]
        half = 1 << arch.acc_bits - 1
        shape = (2, arch.acc_depth, arch.columns)
        sums = [rng.randint(-half, half - 1) >> rng.randrange(16) for _ in range(math.prod(shape))]
        self.acc = np.array(sums).reshape(shape).tolist()

    def _record(self) -> int:
        rng = self.rng
        bias, mult = rng.randint(-(1 << 30), 1 << 30) >> rng.randrange(30), rng.randint(-(1 << 17), (1 << 17) - 1)
        shift = min(47, max(1, 16 + mult.bit_length() + rng.randint(-14, 4)))
        return bias & 0xFFFFFFFF | (mult & 0x3FFFF) << 32 | shift << 50 | rng.getrandbits(8) << 56

    def tile(self) -> dict[str, int]:
        rng, cols = self.rng, self.rng.choice((1, 1, 2, 3, 5))
        return {
            "cols": cols, "rows": rng.randint(1, min(4, self.arch.acc_depth // cols)),
            "out_addr": rng.getrandbits(16), "out_ox_step": rng.getrandbits(12),
            "out_oy_step": rng.randint(-32768, 32767),
        }  # fmt: skip

    def post(self, **values: int) -> Instruction:
        rng, arch = self.rng, self.arch
        partial = arch.parts_per_brick > 1
        bounds = [rng.choice((sorted(rng.sample(range(-128, 128), 2)), (-8, 7), (-128, 127))) for _ in range(2)]
        mode = values.get("mode", rng.choice(list(OutputMode)))
        fields = self.tile() | {
            "acc_bank": rng.getrandbits(1),
            "p_addr": rng.randrange(arch.weight_depth) // max(1, 64 // arch.word_bits) * max(1, 64 // arch.word_bits),
            "mode": int(mode), "bricks": rng.randint(1, min(8, arch.bricks_per_tile)),
            "part": rng.randrange(arch.parts_per_brick) if partial else rng.getrandbits(3),
            "zero": rng.randint(-128, 127), "low": bounds[0][0], "high": bounds[0][1],
            "add": 0 if mode == OutputMode.RAW32 else rng.getrandbits(1), "add_wide": rng.getrandbits(1),
            "add_addr": rng.getrandbits(16), "add_ox_step": rng.getrandbits(12),
            "add_oy_step": rng.randint(-32768, 32767), "k_a": rng.randint(-32768, 32767),
            "k_b": rng.randint(-32768, 32767), "add_shift": rng.choice((rng.randint(1, 31), 16, 18)),
            "zero_b": rng.randint(-128, 127), "add_zero": rng.randint(-128, 127),
            "add_low": bounds[1][0], "add_high": bounds[1][1],
        }  # fmt: skip
        everything: dict[str, Any] = fields | values
        return make(Opcode.POST, **everything)

    def pool(self, **values: int) -> Instruction:
        rng = self.rng
        fields = self.tile() | {
            "in_addr": rng.getrandbits(16), "bricks": rng.randint(1, 3), "kernel_x": rng.randint(1, 3),
            "kernel_y": rng.randint(1, 3), "ox_step": rng.getrandbits(12), "oy_step": rng.randint(-32768, 32767),
            "kx_step": rng.getrandbits(12), "ky_step": rng.randint(-32768, 32767), "brick_step": rng.getrandbits(4),
            "x0": rng.randint(-3, 2), "y0": rng.randint(-3, 2), "width": rng.randint(1, 8), "height": rng.randint(1, 8),
            "stride_x": rng.randint(1, 3), "stride_y": rng.randint(1, 3), "dilation_x": rng.randint(1, 3),
            "dilation_y": rng.randint(1, 3), "wide": rng.getrandbits(1),
        }  # fmt: skip
        everything: dict[str, Any] = fields | values
        return make(Opcode.POOL, **everything)

    def model(self, instruction: Instruction) -> list[tuple[int, int, int]]:
        return PostUnit.model(self.arch, instruction, act=self.act, weights=self.weights, acc=self.acc)


def bits_of(mask: int, arch: ArchConfig) -> int:
    """The bits of a word in the parts that ``mask`` enables."""
    size = arch.word_bits // arch.parts_per_brick
    return sum((1 << size) - 1 << size * n for n in range(arch.parts_per_brick) if mask >> n & 1)
