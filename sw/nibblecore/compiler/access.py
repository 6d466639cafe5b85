"""Which words each instruction of the compiler reads and writes; the basis of dependencies.

The linter has its own expansion and shares nothing with this one.
"""

import dataclasses
import functools
from typing import Final

import numpy as np
import numpy.typing as npt

from ..arch.config import ArchConfig
from ..arch.isa import LOCAL_ADDR_BITS, Instruction, LoadTarget, Opcode, OutputMode, Region
from .cost import MODE_WORDS

Words = npt.NDArray[np.int64]
_ADDRESSES: Final = 1 << LOCAL_ADDR_BITS

ACTIVATIONS: Final = "activations"
WEIGHTS: Final = "weights"
ACCUMULATORS: Final = "accumulators"


@dataclasses.dataclass(frozen=True)
class Access:
    """Words of one memory (a buffer's name, or a region) that an instruction reads or writes."""

    memory: str
    words: Words
    write: bool


def accesses(i: Instruction, arch: ArchConfig) -> list[Access]:
    """Every access of an instruction, each word named once or more."""
    if i.opcode is Opcode.LOAD or i.opcode is Opcode.STORE:
        return _dma(i, arch)
    if i.opcode is Opcode.MAC:
        passes = i["kernel_y"] * i["kernel_x"] * i["bricks"]
        weights = i["w_addr"] + np.arange((passes - 1) * i["w_step"] + arch.columns)
        return [
            Access(ACTIVATIONS, _window(i, i["x_addr"], 1, arch), False),
            Access(WEIGHTS, weights % _ADDRESSES % arch.weight_depth, False),
            Access(ACCUMULATORS, np.array([i["acc_bank"]]), True),
        ]
    if i.opcode is Opcode.POOL:
        planes = 1 + i["wide"]
        return [
            Access(ACTIVATIONS, _window(i, i["in_addr"], planes, arch), False),
            Access(ACTIVATIONS, _pixels(i, "out", planes * i["bricks"], arch), True),
        ]
    words = MODE_WORDS[OutputMode(i["mode"])] * i["bricks"]
    records = (i["p_addr"] + np.arange(arch.param_words)) % _ADDRESSES % arch.weight_depth
    result = [
        Access(ACCUMULATORS, np.array([i["acc_bank"]]), False),
        Access(WEIGHTS, records, False),
        Access(ACTIVATIONS, _pixels(i, "out", words, arch), True),
    ]
    if i["add"]:
        result.append(Access(ACTIVATIONS, _pixels(i, "add", i["bricks"] * (1 + i["add_wide"]), arch), False))
    return result


def _dma(i: Instruction, arch: ArchConfig) -> list[Access]:
    planes, rows = np.arange(i["count2"])[:, None, None], np.arange(i["count1"])[:, None]
    words = np.arange(i["count0"])
    dram = (i["dram_addr"] + planes * i["dram_step2"] + rows * i["dram_step1"] + words).reshape(-1)
    to_weights = i.opcode is Opcode.LOAD and i["target"] == LoadTarget.WEIGHTS
    depth = arch.weight_depth if to_weights else arch.act_depth
    local = i["local_addr"] + planes * i["local_step2"] + rows * i["local_step1"] + words
    local = local.reshape(-1) % _ADDRESSES % depth
    load = i.opcode is Opcode.LOAD
    return [
        Access(Region(i["region"]).name, dram, not load),
        Access(WEIGHTS if to_weights else ACTIVATIONS, local, load),
    ]


_WINDOW_FIELDS: Final = tuple(
    f"{name}{xy}{end}"
    for xy in "yx"
    for name, end in (("", "0"), ("stride_", ""), ("dilation_", ""), ("kernel_", ""), ("o", "_step"), ("k", "_step"))
)


def _window(i: Instruction, base: int, planes: int, arch: ArchConfig) -> Words:
    """Words of all valid taps: validity separates into rows and columns, so the union is a sum of offsets."""
    y, x = (i["rows"], i["height"]), (i["cols"], i["width"])
    values = tuple(i[name] for name in _WINDOW_FIELDS)
    rows, cols = _axis(*y, *values[:6]), _axis(*x, *values[6:])
    grid = base + rows[:, None, None] + cols[:, None] + _bricks(i["bricks"], i["brick_step"], planes)
    return grid.reshape(-1) % _ADDRESSES % arch.act_depth


@functools.lru_cache(maxsize=1024)
def _axis(
    count: int, size: int, start: int, stride: int, dilation: int, kernel: int, pixel_step: int, tap_step: int
) -> Words:
    """Address offsets of the valid taps along one axis."""
    pixel, tap = np.arange(count)[:, None], np.arange(kernel)
    place = start + pixel * stride + tap * dilation
    return np.unique((pixel * pixel_step + tap * tap_step)[(place >= 0) & (place < size)] % _ADDRESSES)


@functools.lru_cache(maxsize=256)
def _bricks(count: int, step: int, planes: int) -> Words:
    return (np.arange(count)[:, None] * step + np.arange(planes)).reshape(-1)


def _pixels(i: Instruction, name: str, words: int, arch: ArchConfig) -> Words:
    rows = np.arange(i["rows"])[:, None, None] * i[f"{name}_oy_step"]
    cols = np.arange(i["cols"])[:, None] * i[f"{name}_ox_step"]
    grid = i[f"{name}_addr"] + rows + cols + np.arange(words)
    return grid.reshape(-1) % _ADDRESSES % arch.act_depth
