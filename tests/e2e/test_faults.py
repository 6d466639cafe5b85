"""What can go wrong on a bus or in a program, on the simulated hardware: a clear error, and life after it."""

import re
from collections.abc import Iterator

import numpy as np
import pytest

from nibblecore.arch import isa, regs
from nibblecore.arch.isa import Engine, Opcode, Region
from nibblecore.compiler.pipeline import compile_graph
from nibblecore.errors import ExecutionError, ProgramError
from nibblecore.ir import Graph
from nibblecore.ir.interpret import run as interpret
from nibblecore.ir.random_graph import GraphBuilder
from nibblecore.runtime.device import Device
from nibblecore.runtime.program import Program
from nibblecore_sim.fuzz import FUZZ_ARCHS
from nibblecore_sim.transport import SimTransport

pytestmark = pytest.mark.cosim
ARCH = FUZZ_ARCHS["fuzz-square"]


def example_graph() -> Graph:
    builder = GraphBuilder(np.random.default_rng(5), (6, 6, 6), bits=4)
    return builder.finish(builder.conv(builder.conv(builder.input, 8, bits=4), 5, bits=8))


GRAPH = example_graph()
PROGRAM = compile_graph(GRAPH, ARCH)
CODES = np.random.default_rng(6).integers(-8, 8, (6, 6, 6))


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with SimTransport(ARCH) as transport:
        yield Device(transport)


def transport(device: Device) -> SimTransport:
    assert isinstance(device.transport, SimTransport)
    return device.transport


def assert_works(device: Device) -> None:
    """The core gives the right integers."""
    transport(device).configure()
    device.load(PROGRAM)
    result = device.run(CODES)
    want = interpret(GRAPH, {PROGRAM.inputs[0].name: CODES[None]})
    for name, codes in result.outputs.items():
        assert (codes == want[name][0]).all()


def bases(program: Program) -> dict[Region, int]:
    result, end = {}, 0
    for region in sorted(program.region_sizes):
        result[region] = end
        end += -(-program.region_sizes[region] // 4096) * 4096
    return result


@pytest.mark.parametrize("response", [2, 3], ids=["SLVERR", "DECERR"])
@pytest.mark.parametrize("region", [Region.PROGRAM, Region.CONSTANTS, Region.INPUT, Region.OUTPUT])
def test_bus_error_at_any_beat(device: Device, region: Region, response: int) -> None:
    device.load(PROGRAM)
    rng = np.random.default_rng([int(region), response])
    size = len(isa.to_bytes(PROGRAM.instructions)) if region is Region.PROGRAM else PROGRAM.region_sizes[region]
    beats = size // ARCH.bus_bytes
    for beat in {0, beats - 1, *rng.integers(0, beats, 6).tolist()}:
        address = bases(PROGRAM)[region] + int(beat) * ARCH.bus_bytes
        device.load(PROGRAM)
        transport(device).configure(
            error_first=address, error_last=address + ARCH.bus_bytes - 1, error_response=response, stall_permille=100
        )
        cause = regs.ErrorCause.BUS_WRITE if region is Region.OUTPUT else regs.ErrorCause.BUS_READ
        unit = {Region.PROGRAM: "fetch", Region.OUTPUT: "store"}.get(region, "load")
        text = f"the core stopped: {regs.ERROR_TEXT[cause]} ({unit}, instruction "
        with pytest.raises(ExecutionError, match=f"^{re.escape(text)}"):
            device.run(CODES)
        transport(device).configure()
    assert_works(device)


def broken(position: int, instruction: isa.Instruction) -> Program:
    """The program with one instruction replaced."""
    instructions = list(PROGRAM.instructions)
    instructions[position] = instruction
    return PROGRAM.replace(instructions=instructions)


def test_access_outside_a_region(device: Device) -> None:
    loads = [k for k, i in enumerate(PROGRAM.instructions) if i.opcode is Opcode.LOAD]
    stores = [k for k, i in enumerate(PROGRAM.instructions) if i.opcode is Opcode.STORE]
    for position, unit in ((loads[0], "load"), (loads[-1], "load"), (stores[-1], "store")):
        old = PROGRAM.instructions[position]
        bad = isa.Instruction(old.opcode, {**old.fields, "dram_addr": (1 << isa.DRAM_ADDR_BITS) - 1})
        device.load(broken(position, bad))
        text = f"the core stopped: an access would leave its DRAM region ({unit}, instruction {position}, layer "
        with pytest.raises(ExecutionError, match=f"^{re.escape(text)}"):
            device.run(CODES)
    assert_works(device)


def test_illegal_instruction(device: Device) -> None:
    device.load(PROGRAM)
    for position in (0, len(PROGRAM.instructions) - 1):
        for word in (0, 15, 3 | 3 << 14, (1 << 256) - 1):
            address = device._bases[Region.PROGRAM] + position * isa.INSTRUCTION_BYTES
            device.transport.write(address, word.to_bytes(isa.INSTRUCTION_BYTES, "little"))
            text = f"the core stopped: the instruction's encoding is illegal (fetch, instruction {position}"
            with pytest.raises(ExecutionError, match=f"^{re.escape(text)}"):
                device.run(CODES)
        device.load(PROGRAM)
    assert_works(device)


def test_program_without_end(device: Device) -> None:
    device.load(PROGRAM.replace(instructions=PROGRAM.instructions[:-1], debug=PROGRAM.debug[:-1]))
    last = len(PROGRAM.instructions) - 1
    size = regs.REGISTERS["REGION0_SIZE"].offset
    device.transport.csr_write(size, last * isa.INSTRUCTION_BYTES)
    text = f"the core stopped: an access would leave its DRAM region (fetch, instruction {last})"
    with pytest.raises(ExecutionError, match=f"^{re.escape(text)}$"):
        device.run(CODES)
    assert_works(device)


def test_watchdog_says_who_waits_for_whom(device: Device) -> None:
    waiting = isa.make(Opcode.MAC, wait=[Engine.LOAD])
    program = PROGRAM.replace(instructions=[waiting, isa.make(Opcode.END)], debug=[-1, -1])
    device.load(program)
    watchdog = regs.REGISTERS["WATCHDOG"]
    device.transport.csr_write(watchdog.offset, 500)
    text = (
        "the core stopped: no engine made progress for the watchdog's time "
        "(mac, instruction 0: mac <-load); mac waits for load"
    )
    with pytest.raises(ExecutionError, match=f"^{re.escape(text)}$"):
        device.run(CODES)
    device.transport.csr_write(watchdog.offset, watchdog.reset)
    assert_works(device)


def test_program_of_another_core(device: Device) -> None:
    other = PROGRAM.replace(arch=ARCH.replace(acc_depth=64))
    with pytest.raises(ProgramError, match="they differ in acc_depth: 64, not 32\nCompile the network for this core"):
        device.load(other)
    assert_works(device)


def test_reset_at_any_moment(device: Device) -> None:
    control, status = regs.REGISTERS["CONTROL"].offset, regs.REGISTERS["STATUS"].offset
    for reads in (0, 1, 3, 7, 15, 40):
        device.load(PROGRAM)
        device.transport.csr_write(control, 1)
        for _ in range(reads):  # each takes a few cycles
            device.transport.csr_read(status)
        device.reset()
        assert device.transport.csr_read(status) == regs.REGISTERS["STATUS"].reset
    assert_works(device)


def test_registers_that_are_not_there(device: Device) -> None:
    with pytest.raises(ExecutionError, match="^there is no register at offset 0x1fc$"):
        device.transport.csr_read(0x1FC)
    with pytest.raises(ExecutionError, match="^the register at offset 0x0 cannot be written$"):
        device.transport.csr_write(0, 1)
