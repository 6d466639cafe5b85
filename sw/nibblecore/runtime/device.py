"""Runs programs on a core, wherever it is: the same calls for golden model, RTL simulation and board."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..arch import regs
from ..arch.config import ARCHS
from ..arch.isa import ISA_VERSION, REGIONS, Engine, Region, disassemble, engines_in, to_bytes
from ..arch.regs import ERROR_TEXT, REGISTERS, Counter, ErrorCause, ErrorUnit
from ..errors import ExecutionError, ProgramError
from . import layout
from .program import Program, TensorBinding
from .transport.base import Transport

REGION_ALIGNMENT = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What one run gave.

    Parameters
    ----------
    outputs : dict of str to int64 array
        Stored codes (sums for 32-bit tensors) of shape ``(C, H, W)``.
    tensors : dict of str to int64 array
        Intermediate tensors that the program stores for comparison; empty unless it was compiled so.
    counters : dict of Counter to int
        Performance counters; empty where the core has none, or the transport no time.
    elapsed : int or None
        Cycles that the transport has counted, a few more or less than the core's own count.
    """

    program: Program
    outputs: dict[str, npt.NDArray[np.int64]]
    tensors: dict[str, npt.NDArray[np.int64]]
    counters: dict[Counter, int]
    elapsed: int | None = None

    @property
    def cycles(self) -> int | None:
        """Cycles from start to done: the core's own count, else the transport's; None where nobody counts."""
        return self.counters.get(Counter.TOTAL, self.elapsed)

    def real(self, name: str | None = None) -> npt.NDArray[np.float64]:
        """An output as real numbers; the first one unless named."""
        binding = next(b for b in self.program.outputs if name in (None, b.name))
        return binding.dequantize(self.outputs[binding.name])


class Device:
    """One core behind a transport.

    Raises :class:`ExecutionError` where there is no core of this instruction set.

    Parameters
    ----------
    transport : Transport
        How to reach it.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.program: Program | None = None
        self._bases: dict[Region, int] = {}
        magic = self._read("MAGIC")
        if magic != regs.MAGIC:
            raise ExecutionError(
                f"there is no nibblecore behind this transport: its MAGIC register reads {magic:#010x}, "
                f"not {regs.MAGIC:#010x}"
            )
        version = regs.extract("VERSION", "isa", self._read("VERSION"))
        if version != ISA_VERSION:
            raise ExecutionError(
                f"the core implements ISA version {version}, this nibblecore {ISA_VERSION}",
                hint="Use the nibblecore release that the bitstream was made with.",
            )

    def _read(self, name: str) -> int:
        return self.transport.csr_read(REGISTERS[name].offset)

    def _write(self, name: str, value: int) -> None:
        self.transport.csr_write(REGISTERS[name].offset, value)

    # Loading ---------------------------------------------------------------------------------------------------

    def load(self, program: Program) -> None:
        """Place the program's regions in memory. Raises :class:`ProgramError` for a program of another core."""
        self._check_core(program)
        bases, end = {}, 0
        for region in sorted(program.region_sizes):
            bases[region] = end
            size = program.region_sizes[region]
            end += -(-size // REGION_ALIGNMENT) * REGION_ALIGNMENT
        if end > self.transport.memory_bytes:
            raise ProgramError(
                f"the program {program.name!r} needs {end} bytes of memory, the core has {self.transport.memory_bytes}"
            )
        for index in range(REGIONS):
            self._write(f"REGION{index}_BASE", 0)
            self._write(f"REGION{index}_SIZE", 0)
        for region, base in bases.items():
            self._write(f"REGION{region}_BASE", base)
            self._write(f"REGION{region}_SIZE", program.region_sizes[region])
        self.transport.write(bases[Region.PROGRAM], to_bytes(program.instructions))
        if program.constants:
            self.transport.write(bases[Region.CONSTANTS], program.constants)
        self._bases, self.program = bases, program

    def _check_core(self, program: Program) -> None:
        found = self._read("CONFIG_HASH")
        if found == program.arch.hash:
            return
        core = self.transport.arch or next((a for a in ARCHS.values() if a.hash == found), None)
        if core is None:
            detail = f"the core's configuration hash is {found:#010x}, the program's {program.arch.hash:#010x}"
        else:
            detail = "they differ in " + "; ".join(program.arch.differences(core))
        raise ProgramError(
            f"the program {program.name!r} was compiled for another core ({program.arch.name}): {detail}",
            hint="Compile the network for this core.",
        )

    # Running ---------------------------------------------------------------------------------------------------

    def run(self, inputs: npt.ArrayLike | Mapping[str, npt.ArrayLike], *, timeout_cycles: int | None = None) -> Result:
        """One image through the loaded program.

        Parameters
        ----------
        inputs : array or mapping of str to array
            ``(C, H, W)`` per input: floating-point numbers are quantized with the input's grid, integers are stored
            codes. A bare array is the only input.
        timeout_cycles : int, optional
            Give up after so many cycles; 50 times the predicted ones and at least a million unless given.

        Raises
        ------
        ExecutionError
            When the core stops with an error: cause, unit, instruction and layer are in the text, and the core has
            been reset.
        """
        program = self._loaded()
        for binding, codes in self._input_codes(program, inputs):
            data = layout.pack(codes, bits=binding.bits, zero=binding.zero, lanes=program.arch.lanes)
            self.transport.write(self._address(binding), data.tobytes())
        self._write("IRQ_STATUS", 0b11)
        self._write("IRQ_ENABLE", 1)
        self._write("CONTROL", 1 << regs.field("CONTROL", "start").low)
        self.transport.wait(timeout_cycles or max(1_000_000, 50 * program.predicted_cycles))
        if regs.extract("STATUS", "error", self._read("STATUS")):
            raise self._stopped(program)
        counted = self.transport.timed and program.arch.counters
        counters = {c: self._read(f"COUNT_{c.name}") for c in Counter} if counted else {}
        outputs, tensors = self._fetch(program.outputs), self._fetch(program.tensors)
        return Result(program, outputs, tensors, counters, self.transport.elapsed_cycles)

    def reset(self) -> None:
        """Soft reset: the core becomes idle, the loaded program stays."""
        self._write("CONTROL", 1 << regs.field("CONTROL", "reset").low)
        for _ in range(10_000):
            if not regs.extract("STATUS", "resetting", self._read("STATUS")):
                return
        raise ExecutionError("the core does not finish its soft reset: a bus transaction never ends")

    def _loaded(self) -> Program:
        if self.program is None:
            raise ExecutionError("no program is loaded", hint="Call load() first.")
        return self.program

    def _address(self, binding: TensorBinding) -> int:
        return self._bases[binding.region] + binding.offset_words * self._loaded().arch.word_bytes

    def _fetch(self, bindings: Sequence[TensorBinding]) -> dict[str, npt.NDArray[np.int64]]:
        lanes = self._loaded().arch.lanes
        result = {}
        for b in bindings:
            raw = self.transport.read(self._address(b), b.words(lanes) * lanes // 2)
            result[b.name] = layout.unpack(np.frombuffer(raw, np.uint8), shape=b.shape, bits=b.bits, lanes=lanes)
        return result

    @staticmethod
    def _input_codes(
        program: Program, inputs: npt.ArrayLike | Mapping[str, npt.ArrayLike]
    ) -> list[tuple[TensorBinding, npt.NDArray[np.int64]]]:
        if not isinstance(inputs, Mapping):
            if len(program.inputs) != 1:
                raise ExecutionError(
                    f"the program has {len(program.inputs)} inputs; give a mapping with "
                    f"{', '.join(b.name for b in program.inputs)}"
                )
            inputs = {program.inputs[0].name: inputs}
        if missing := [b.name for b in program.inputs if b.name not in inputs]:
            raise ExecutionError(f"no value for input {', '.join(missing)}")
        if unknown := [name for name in inputs if name not in {b.name for b in program.inputs}]:
            raise ExecutionError(
                f"the program has no input {', '.join(unknown)}; it has {', '.join(b.name for b in program.inputs)}"
            )
        result = []
        for b in program.inputs:
            value = np.asarray(inputs[b.name])
            if value.shape != b.shape:
                raise ExecutionError(f"input {b.name!r} must have shape {b.shape}, not {value.shape}")
            if np.issubdtype(value.dtype, np.floating):
                if not np.isfinite(value).all():
                    raise ExecutionError(f"input {b.name!r} holds numbers that are not finite")
                codes = b.quantize(value)
            elif np.issubdtype(value.dtype, np.integer):
                codes = value.astype(np.int64)
                low, high = -(1 << b.bits - 1), (1 << b.bits - 1) - 1
                if codes.size and (codes.min() < low or codes.max() > high):
                    raise ExecutionError(
                        f"input {b.name!r} holds codes {codes.min()}..{codes.max()}, allowed are {low}..{high}",
                        hint="Give floating-point numbers to have them quantized.",
                    )
            else:
                raise ExecutionError(
                    f"input {b.name!r} must hold floating-point numbers or integer codes, not {value.dtype}"
                )
            result.append((b, codes))
        return result

    def _stopped(self, program: Program) -> ExecutionError:
        error, index, waits = self._read("ERROR"), self._read("ERROR_INDEX"), self._read("ERROR_WAITS")
        cause = ErrorCause(regs.extract("ERROR", "cause", error))
        unit = ErrorUnit(regs.extract("ERROR", "unit", error))
        text = f"the core stopped: {ERROR_TEXT[cause]} ({unit.name.lower()}, instruction {index}"
        if index < len(program.instructions):
            layer = program.debug[index]
            where = f", layer {program.layers[layer].path or program.layers[layer].name}" if layer >= 0 else ""
            text += f"{where}: {disassemble(program.instructions[index])}"
        text += ")"
        if cause is ErrorCause.WATCHDOG:
            waiting = [
                f"{e.name.lower()} waits for {' and '.join(f.name.lower() for f in engines_in(waits >> 4 * e & 15))}"
                for e in Engine
                if waits >> 4 * e & 15
            ]
            text += "; " + ("; ".join(waiting) or "no engine waits for a semaphore")
        self.reset()
        return ExecutionError(text)
