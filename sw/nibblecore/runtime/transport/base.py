"""The interface between :class:`nibblecore.runtime.device.Device` and a core, simulated or real."""

import abc
from types import TracebackType

from ...arch.config import ArchConfig


class Transport(abc.ABC):
    """Memory and registers of one core.

    Use as a context manager, or call :meth:`close`.

    Attributes
    ----------
    arch : ArchConfig or None
        The core behind it where known (models and simulations), to explain a mismatch; the hash register decides.
    memory_bytes : int
        Size of the DRAM, which starts at address 0.
    timed : bool
        Whether cycle counters mean something: False for functional models.
    elapsed_cycles : int or None
        Cycles of the last :meth:`wait`, but for a few from the start to the interrupt, where the transport itself
        counts them, as simulations do.
    """

    arch: ArchConfig | None
    memory_bytes: int
    timed: bool
    elapsed_cycles: int | None = None

    @abc.abstractmethod
    def read(self, address: int, count: int) -> bytes:
        """``count`` bytes of DRAM from ``address``."""

    @abc.abstractmethod
    def write(self, address: int, data: bytes) -> None:
        """Write bytes to DRAM."""

    @abc.abstractmethod
    def csr_read(self, offset: int) -> int:
        """The register at byte ``offset``."""

    @abc.abstractmethod
    def csr_write(self, offset: int, value: int) -> None:
        """Write the register at byte ``offset``."""

    @abc.abstractmethod
    def wait(self, timeout_cycles: int | None = None) -> None:
        """Return when the interrupt line is high; :class:`ExecutionError` after ``timeout_cycles``."""

    def close(self) -> None:  # noqa: B027  (most transports hold nothing that needs closing)
        """Let go of the core; the transport is unusable afterwards."""

    def __enter__(self) -> "Transport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
