"""The RTL simulation behind the transport's interface: the generated Verilog in Verilator, cocotb at its ports."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, Final

from nibblecore.arch.config import ArchConfig
from nibblecore.errors import ExecutionError, SimulationError
from nibblecore.runtime.transport import Transport
from nibblecore_hw.synth.devices import FpgaDevice

from .core_build import build_core, serve_command

START_SECONDS: Final = 60
VIOLATIONS: Final = {
    1: "a read burst crosses a 4 KiB boundary",
    2: "a read leaves the memory",
    3: "a write burst crosses a 4 KiB boundary",
    4: "a write leaves the memory",
    5: "WLAST does not end the burst",
}


class SimTransport(Transport):
    """One simulated core with its DRAM, alive until :meth:`close`.

    Building the simulator takes a minute the first time and is cached by content.

    Parameters
    ----------
    arch : ArchConfig
        The core.
    memory_bytes : int
        DRAM, a power of two.
    latency : int
        Cycles from a read's address to its first beat, and from a write's last beat to its response.
    simulator : str
        ``"verilator"`` or ``"icarus"``.
    waves : Path, optional
        Folder that gets a waveform of the whole session.
    power_up : int
        Seed of what memories and registers without a reset hold at power-up (Verilator), 1 or more.
    netlist : FpgaDevice, optional
        Simulate what synthesis for this device makes of the core instead of its RTL; see :mod:`nibblecore_sim.netlist`.

    Attributes
    ----------
    simulated_cycles, simulated_seconds
        Cycles that programs have run, and the wall-clock seconds that this took.
    """

    def __init__(
        self,
        arch: ArchConfig,
        *,
        memory_bytes: int = 1 << 24,
        latency: int = 20,
        simulator: str = "verilator",
        waves: Path | None = None,
        power_up: int = 1,
        netlist: FpgaDevice | None = None,
    ) -> None:
        self.arch: ArchConfig = arch
        self._simulator = simulator
        self.memory_bytes = memory_bytes
        self.timed = True
        self.simulated_cycles, self.simulated_seconds = 0, 0.0
        build = build_core(
            arch,
            memory_bytes=memory_bytes,
            latency=latency,
            simulator=simulator,
            waves=waves is not None,
            netlist=netlist,
        )
        self._folder = Path(tempfile.mkdtemp(prefix="nibblecore-"))
        self._waves = waves
        self._connection: Connection | None = None
        self._log = self._folder / "simulator.log"
        socket = str(self._folder / "host")
        environment = {**os.environ, "NIBBLECORE_SOCKET": socket, "NIBBLECORE_BUS_BYTES": str(arch.bus_bytes)}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        command = serve_command(build, self._folder, power_up)
        with Listener(socket, "AF_UNIX") as listener, self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            self._connection = self._accept(listener)

    def _accept(self, listener: Listener) -> Connection:
        inner: Any = listener._listener  # type: ignore[attr-defined]  # only there is the socket, to time out
        inner._socket.settimeout(1.0)
        for _ in range(START_SECONDS):
            with contextlib.suppress(TimeoutError):
                return listener.accept()
            if self._process.poll() is not None:
                break
        self._process.kill()
        raise SimulationError("The simulator did not start.", hint=f"Its output:\n{self._tail()}")

    def _tail(self) -> str:
        logs = [self._log, *self._folder.glob("*.log")]
        return "\n".join("\n".join(log.read_text(errors="replace").splitlines()[-15:]) for log in logs if log.exists())

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._connection is None:
            raise ExecutionError("the simulation has been closed")
        try:
            self._connection.send((method, args, kwargs))
            good, value = self._connection.recv()
        except (EOFError, OSError):
            raise SimulationError("The simulator ended.", hint=f"Its output:\n{self._tail()}") from None
        if not good:
            raise SimulationError(f"The bench failed: {value}")
        return value

    def read(self, address: int, count: int) -> bytes:
        self._check(address, count)
        size = self.arch.bus_bytes
        first, last = address // size, -(-(address + count) // size)
        data: bytes = self._call("read", first, last - first) if count else b""
        return data[address - first * size :][:count]

    def write(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        size = self.arch.bus_bytes
        before, after = address % size, -(address + len(data)) % size
        if before:
            data = self.read(address - before, before) + data
        if after:
            data += self.read(address - before + len(data), after)
        if data:
            self._call("write", (address - before) // size, data)

    def _check(self, address: int, count: int) -> None:
        if address < 0 or count < 0 or address + count > self.memory_bytes:
            raise ExecutionError(
                f"bytes {address:#x}..{address + count:#x} lie outside the memory of {self.memory_bytes:#x}"
            )

    def csr_read(self, offset: int) -> int:
        value, response = self._call("csr_read", offset)
        if response:
            raise ExecutionError(f"there is no register at offset {offset:#x}")
        result: int = value
        return result

    def csr_write(self, offset: int, value: int) -> None:
        if self._call("csr_write", offset, value & 0xFFFFFFFF):
            raise ExecutionError(f"the register at offset {offset:#x} cannot be written")

    def wait(self, timeout_cycles: int | None = None) -> None:
        cycles = timeout_cycles or 10_000_000
        came, passed, seconds = self._call("wait", cycles)
        self.elapsed_cycles = passed
        self.simulated_cycles += passed
        self.simulated_seconds += seconds
        if code := self._call("violation"):
            raise SimulationError(f"The core broke the AXI protocol: {VIOLATIONS[code]}.")
        if not came:
            raise ExecutionError(f"no interrupt within {cycles} cycles")

    def configure(
        self, *, stall_permille: int = 0, error_first: int = 0, error_last: int = 0, error_response: int = 0
    ) -> None:
        """Make the memory difficult: random stalls on every channel; error responses for an address range."""
        self._call(
            "configure",
            stall_permille=stall_permille,
            error_first=error_first,
            error_last=error_last,
            error_response=error_response,
        )

    def watch_buffers(self) -> None:
        """Begin to count accesses to the buffers, for :meth:`buffer_accesses`. Only Icarus lets a bench look inside.

        Raises
        ------
        ValueError
            In another simulator, or if a buffer has a single port, whose reads and writes never come together.
        """
        if self._simulator != "icarus":
            raise ValueError(f"accesses to buffers are counted in icarus, not in {self._simulator}")
        if "single" in (self.arch.act_memory, self.arch.weight_memory):
            raise ValueError(f"{self.arch.name} has a buffer with a single port")
        arch = self.arch
        rows = {"activations": arch.act_depth // arch.act_banks, "weights": arch.weight_depth}
        ports = {"activations": (3, 2), "weights": (2, 1)}  # of nibblecore_hw.top
        self._call("watch_buffers", {n: (*ports[n], rows[n].bit_length() - 1) for n in rows})

    def buffer_accesses(self) -> dict[str, int]:
        """Accesses to all banks since :meth:`watch_buffers`.

        ``reads`` and ``writes``; ``both``, cycles in which a bank did both; ``collisions``, those of the same word.
        """
        counts: dict[str, int] = self._call("buffer_accesses")
        return counts

    def close(self) -> None:
        if self._connection is None:
            return
        self._connection.close()
        self._connection = None
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._waves is not None:
            self._waves.mkdir(parents=True, exist_ok=True)
            for file in [*self._folder.glob("*.vcd"), *self._folder.glob("*.fst")]:
                shutil.move(file, self._waves / file.name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            self.close()
