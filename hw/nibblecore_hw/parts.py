"""The core's parts by name, each as it is built on its own: to be counted, placed and timed."""

from typing import Any, Final

from nibblecore.arch.config import ArchConfig
from nibblecore.errors import ConfigError

PARTS: Final = ("core", "array", "mac", "post", "requantizer", "load", "store", "control")
"""``core``: everything. ``mac``: the array with its accumulators and sequencer. ``requantizer``: one lane.
``load``, ``store``: the same where they are one."""


def build_part(part: str, arch: ArchConfig, *, technology: str) -> Any:
    """The component of one part; :class:`ConfigError` lists the names where there is none.

    Parameters
    ----------
    part : str
        One of :data:`PARTS`.
    arch : ArchConfig
    technology : str
        See :class:`nibblecore_hw.top.Accelerator`.
    """
    from .core.array import SystolicArray
    from .core.mac import MacEngine
    from .core.post import PostUnit
    from .core.requantize import RequantLane
    from .core.sequential import SequentialMac
    from .core.sequential_post import SequentialPost, SerialRequantizer
    from .ctrl.control import Control
    from .ctrl.sequential import SequentialControl
    from .dma.load import LoadDma
    from .dma.sequential import SequentialDma
    from .dma.store import StoreDma
    from .top import Accelerator

    match part:
        case "core":
            return Accelerator(arch, technology=technology)
        case "array":
            return SystolicArray(arch, technology=technology)
        case "mac" if arch.sequential:
            return SequentialMac(arch)
        case "mac":
            return MacEngine(arch, technology=technology)
        case "post" if arch.sequential:
            return SequentialPost(arch)
        case "requantizer" if arch.sequential:
            return SerialRequantizer(acc_bits=arch.acc_bits)
        case "post":
            return PostUnit(arch, technology=technology)
        case "requantizer":
            return RequantLane(acc_bits=arch.acc_bits, technology=technology)
        case "load" | "store" if arch.sequential:
            return SequentialDma(arch=arch)
        case "load":
            return LoadDma(arch=arch)
        case "store":
            return StoreDma(arch=arch)
        case "control":
            return SequentialControl(arch=arch) if arch.sequential else Control(arch=arch, technology=technology)
    raise ConfigError(f"there is no part {part!r}; known are {', '.join(PARTS)}")


__all__ = ["PARTS", "build_part"]
