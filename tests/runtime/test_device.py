import dataclasses
import re

import numpy as np
import pytest

from nibblecore.arch import isa, regs
from nibblecore.arch.config import get_arch
from nibblecore.arch.isa import Engine, Opcode, Region
from nibblecore.errors import ExecutionError, ProgramError
from nibblecore.runtime.device import Device
from nibblecore.runtime.program import LayerInfo, Program, TensorBinding
from nibblecore.runtime.transport import GoldenTransport


def copy_program(*extra: isa.Instruction, **changes: object) -> Program:
    """Copies its input, 20 channels of 1x2 pixels, to its output."""
    words = 4
    program = Program(
        arch=get_arch("small"),
        name="copy",
        instructions=[
            isa.make(Opcode.LOAD, region=Region.INPUT, count0=words, signal=[Engine.STORE]),
            isa.make(Opcode.STORE, region=Region.OUTPUT, count0=words, wait=[Engine.LOAD]),
            *extra,
            isa.make(Opcode.END),
        ],
        constants=b"",
        region_sizes={Region.PROGRAM: 256, Region.INPUT: 32, Region.OUTPUT: 32},
        inputs=[TensorBinding("x", Region.INPUT, 0, (20, 1, 2), 4, 0.5, -8)],
        outputs=[TensorBinding("y", Region.OUTPUT, 0, (20, 1, 2), 4, 0.5, -8)],
        tensors=[],
        layers=[LayerInfo("y", "body.copy", "copy", 0, 1)],
        debug=[0] * (3 + len(extra)),
    )
    return program.replace(**changes)


def device(memory_bytes: int = 1 << 20) -> Device:
    return Device(GoldenTransport(get_arch("small"), memory_bytes=memory_bytes))


def test_run_quantizes_and_returns_codes_and_real_numbers() -> None:
    d = device()
    d.load(copy_program())
    x = np.random.default_rng(1).uniform(0, 7.5, (20, 1, 2))
    result = d.run(x)
    assert (result.outputs["y"] == np.floor(x / 0.5 + 0.5) - 8).all()
    assert np.abs(result.real() - x).max() <= 0.25
    assert result.cycles is None
    codes = result.outputs["y"]
    assert (d.run({"x": codes}).outputs["y"] == codes).all()


@pytest.mark.parametrize("counters", [True, False])
def test_cycles_are_those_of_the_core_or_of_the_transport_where_it_has_no_counters(counters: bool) -> None:
    arch = dataclasses.replace(get_arch("small"), counters=counters)
    transport = GoldenTransport(arch, memory_bytes=1 << 20)
    transport.timed, transport.elapsed_cycles = True, 77
    transport._values["COUNT_TOTAL"] = 55
    d = Device(transport)
    d.load(copy_program(arch=arch))
    result = d.run(np.zeros((20, 1, 2)))
    assert result.cycles == (55 if counters else 77)
    assert bool(result.counters) == counters


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros((20, 2, 1)), "input 'x' must have shape (20, 1, 2), not (20, 2, 1)"),
        (np.full((20, 1, 2), np.nan), "input 'x' holds numbers that are not finite"),
        (
            np.full((20, 1, 2), 8),
            "input 'x' holds codes 8..8, allowed are -8..7\nGive floating-point numbers to have them quantized.",
        ),
        (np.full((20, 1, 2), "a"), "input 'x' must hold floating-point numbers or integer codes, not <U1"),
        ({}, "no value for input x"),
        ({"x": np.zeros((20, 1, 2)), "z": 0}, "the program has no input z; it has x"),
    ],
)
def test_wrong_inputs_are_named(value: object, text: str) -> None:
    d = device()
    d.load(copy_program())
    with pytest.raises(ExecutionError, match=f"^{re.escape(text)}$"):
        d.run(value)  # type: ignore[arg-type]


def test_run_without_program() -> None:
    with pytest.raises(ExecutionError, match="^no program is loaded\nCall load"):
        device().run(np.zeros((20, 1, 2)))


def test_other_cores_program_names_the_fields() -> None:
    with pytest.raises(
        ProgramError,
        match=(
            r"^the program 'copy' was compiled for another core \(other\): they differ in "
            r"act_depth: 8192, not 4096; bus_bits: 128, not 64\nCompile the network for this core.$"
        ),
    ):
        device().load(copy_program(arch=get_arch("small").replace(name="other", act_depth=8192, bus_bits=128)))


def test_memory_too_small() -> None:
    with pytest.raises(ProgramError, match="^the program 'copy' needs 12288 bytes of memory, the core has 8192$"):
        device(8192).load(copy_program())


def test_error_names_cause_instruction_and_layer_and_the_core_recovers() -> None:
    d = device()
    bad = isa.make(Opcode.LOAD, region=Region.INPUT, dram_addr=4)
    d.load(copy_program(bad))
    with pytest.raises(
        ExecutionError,
        match=(
            r"^the core stopped: an access would leave its DRAM region "
            r"\(load, instruction 2, layer body.copy: load region=3 dram_addr=4\)$"
        ),
    ):
        d.run(np.zeros((20, 1, 2)))
    d.load(copy_program())
    assert (d.run(np.zeros((20, 1, 2))).outputs["y"] == -8).all()


def test_foreign_hardware_is_refused() -> None:
    class Foreign(GoldenTransport):
        def csr_read(self, offset: int) -> int:
            return 0xDEADBEEF if offset == regs.REGISTERS["MAGIC"].offset else super().csr_read(offset)

    with pytest.raises(
        ExecutionError, match="^there is no nibblecore behind this transport: its MAGIC register reads 0xdeadbeef"
    ):
        Device(Foreign(get_arch("small"), memory_bytes=4096))


def test_other_isa_version_is_refused() -> None:
    class Newer(GoldenTransport):
        def csr_read(self, offset: int) -> int:
            return 9 if offset == regs.REGISTERS["VERSION"].offset else super().csr_read(offset)

    with pytest.raises(ExecutionError, match="^the core implements ISA version 9, this nibblecore 1\n"):
        Device(Newer(get_arch("small"), memory_bytes=4096))


def test_wait_without_start() -> None:
    with pytest.raises(ExecutionError, match="^nothing has been started, no interrupt will come$"):
        GoldenTransport(get_arch("small"), memory_bytes=4096).wait()


def test_registers() -> None:
    t = GoldenTransport(get_arch("small"), memory_bytes=4096)
    with pytest.raises(ExecutionError, match="^there is no register at offset 0x3c$"):
        t.csr_read(0x3C)
    with pytest.raises(ExecutionError, match="^register MAGIC cannot be written$"):
        t.csr_write(0, 1)
    assert t.csr_read(regs.REGISTERS["CONTROL"].offset) == 0


def test_outputs_of_an_earlier_run_are_poison() -> None:
    """A run that reads what only an earlier run stored is an error, not an accident."""
    d = device()
    d.load(copy_program())
    d.run(np.zeros((20, 1, 2)))
    program = copy_program(
        instructions=[isa.make(Opcode.LOAD, region=Region.OUTPUT), isa.make(Opcode.END)], debug=[0, 0]
    )
    d.load(program)
    with pytest.raises(ExecutionError, match="which nobody has written"):
        d.run(np.zeros((20, 1, 2)))
