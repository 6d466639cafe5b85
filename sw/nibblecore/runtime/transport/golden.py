"""The golden model behind the transport's interface: same registers, same error causes, no time."""

from ...arch import isa, regs
from ...arch.config import ArchConfig
from ...arch.regs import REGISTERS, ErrorCause
from ...errors import ExecutionError
from ...golden.model import CoreStopped, GoldenCore, GoldenMemory, Observer
from .base import Transport

_BY_OFFSET = {r.offset: r for r in REGISTERS.values()}


class GoldenTransport(Transport):
    """A functional core.

    Parameters
    ----------
    arch : ArchConfig
        The core.
    memory_bytes : int
        Size of its DRAM.
    seed : int, optional
        Run engines in a random legal order; see :meth:`nibblecore.golden.GoldenCore.run`.
    observer : callable, optional
        Called after every instruction.
    """

    def __init__(
        self,
        arch: ArchConfig,
        *,
        memory_bytes: int = 1 << 26,
        seed: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.arch: ArchConfig = arch
        self.memory_bytes = memory_bytes
        self.timed = False
        self.seed = seed
        self.observer = observer
        self.memory = GoldenMemory(memory_bytes, arch.word_bytes)
        self._values = {r.name: r.reset for r in REGISTERS.values()}
        self._values["VERSION"] = isa.ISA_VERSION
        self._values["CONFIG_HASH"] = arch.hash

    def read(self, address: int, count: int) -> bytes:
        return self.memory.read(address, count)

    def write(self, address: int, data: bytes) -> None:
        self.memory.write(address, data)

    def csr_read(self, offset: int) -> int:
        register = self._register(offset)
        if register.access == "wo":
            return 0
        return self._values[register.name]

    def csr_write(self, offset: int, value: int) -> None:
        register = self._register(offset)
        if register.name == "CONTROL":
            self._control(value)
        elif register.access == "w1c":
            self._values[register.name] &= ~value
        elif register.access == "rw":
            self._values[register.name] = value & 0xFFFFFFFF
        else:
            raise ExecutionError(f"register {register.name} cannot be written")

    def wait(self, timeout_cycles: int | None = None) -> None:
        """Returns at once: a start runs the whole program."""
        if not (self._values["IRQ_STATUS"] and self._values["IRQ_ENABLE"]):
            raise ExecutionError("nothing has been started, no interrupt will come")

    @staticmethod
    def _register(offset: int) -> regs.Register:
        try:
            return _BY_OFFSET[offset]
        except KeyError:
            raise ExecutionError(f"there is no register at offset {offset:#x}") from None

    def _control(self, value: int) -> None:
        if regs.extract("CONTROL", "reset", value):
            for name in ("STATUS", "IRQ_STATUS", "ERROR", "ERROR_INDEX", "ERROR_WAITS"):
                self._values[name] = REGISTERS[name].reset
        elif regs.extract("CONTROL", "start", value) and regs.extract("STATUS", "idle", self._values["STATUS"]):
            self._run()

    def _run(self) -> None:
        values = self._values
        regions = [(values[f"REGION{i}_BASE"], values[f"REGION{i}_SIZE"]) for i in range(isa.REGIONS)]
        self.memory.begin_run()
        core = GoldenCore(self.arch, self.memory, regions)
        status, irq = {f: regs.field("STATUS", f).low for f in ("idle", "done", "error")}, "done"
        values["ERROR"] = values["ERROR_INDEX"] = values["ERROR_WAITS"] = ErrorCause.NONE
        try:
            core.run(seed=self.seed, observer=self.observer)
            values["STATUS"] = 1 << status["idle"] | 1 << status["done"]
        except CoreStopped as stop:
            values["STATUS"], irq = 1 << status["error"], "error"
            values["ERROR"] = stop.cause | stop.unit << regs.field("ERROR", "unit").low
            values["ERROR_INDEX"] = stop.index
        values["IRQ_STATUS"] |= 1 << regs.field("IRQ_STATUS", irq).low
