"""Amaranth layouts and interface signatures that several units share, derived from :mod:`nibblecore.arch`."""

from amaranth import Shape, signed, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out, Signature
from amaranth.utils import ceil_log2

from nibblecore.arch.config import PARAM_BITS, ArchConfig
from nibblecore.arch.isa import INSTRUCTION_BITS, INSTRUCTIONS, Opcode
from nibblecore.arch.numerics import BIAS_BITS, MULT_BITS
from nibblecore.arch.regs import CSR_ADDR_BITS

INDEX_BITS = 24
"""Width of an instruction's index, as errors report it."""

COMMAND_BITS = INSTRUCTION_BITS
"""Width of the instruction word that an engine receives; decode it with :func:`instruction_layout`."""


def instruction_layout(opcode: Opcode) -> data.StructLayout:
    """All fields of an instruction as they are *encoded*: counts are stored minus 1 (``Field.offset``)."""
    spec = INSTRUCTIONS[opcode]
    members: dict[str, Shape] = {f.name: signed(f.bits) if f.signed else unsigned(f.bits) for f in spec.all_fields}
    if spec.bits < INSTRUCTION_BITS:
        members["spare"] = unsigned(INSTRUCTION_BITS - spec.bits)
    return data.StructLayout(members)


def command_signature() -> stream.Signature:
    """Instructions from an issue stage to its engine, as raw words. A transfer starts the instruction."""
    return stream.Signature(COMMAND_BITS)


def word_layout(arch: ArchConfig) -> data.ArrayLayout:
    """One pixel of one brick, or one column of a weight tile: lane 0 in the low nibble."""
    return data.ArrayLayout(signed(4), arch.lanes)


def param_layout() -> data.StructLayout:
    """One requantization record."""
    return data.StructLayout(
        {
            "bias": signed(BIAS_BITS),
            "mult": signed(MULT_BITS),
            "shift": unsigned(6),
            "spare": unsigned(PARAM_BITS - BIAS_BITS - MULT_BITS - 6),
        }
    )


def read_port(*, addr_bits: int, word_bits: int) -> Signature:
    """Client side of a buffer's read port.

    A request is granted at a clock edge with ``valid`` and ``ready``; ``ready`` may depend combinationally on ``valid``
    and ``addr`` of this and other ports, so a client must not make ``valid`` depend on ``ready``. ``data`` holds the
    word during the cycle that begins ``READ_LATENCY`` edges after the grant (1 would be the next cycle), at the last
    port of a buffer ``LAST_READ_LATENCY`` edges after it, and cannot be stalled.
    """
    return Signature({"addr": Out(addr_bits), "valid": Out(1), "ready": In(1), "data": In(word_bits)})


def write_port(*, addr_bits: int, word_bits: int, parts: int) -> Signature:
    """Client side of a buffer's write port: ``mask`` enables each of ``parts`` equal parts of the word.

    A write is granted at a clock edge with ``valid`` and ``ready``; a read granted at a later edge sees it.
    """
    return Signature(
        {"addr": Out(addr_bits), "data": Out(word_bits), "mask": Out(parts), "valid": Out(1), "ready": In(1)}
    )


def acc_read_port(arch: ArchConfig) -> Signature:
    """Post unit's side of the accumulators: one pixel's ``post_lanes`` columns of column group ``group``.

    ``data`` is valid ``ACC_READ_LATENCY`` edges after an edge with ``en``. Never stalls: programs never drain a bank
    that the array is writing.
    """
    return Signature(
        {
            "bank": Out(1),
            "addr": Out(ceil_log2(arch.acc_depth)),
            "group": Out(ceil_log2(arch.columns // arch.post_lanes)),
            "en": Out(1),
            "data": In(data.ArrayLayout(signed(arch.acc_bits), arch.post_lanes)),
        }
    )


LAST_READ_LATENCY = 4
"""Edges from a granted buffer read to its data, at the port of lowest priority: a register before block RAM, block RAM,
a register beside it, one behind the choice of a bank."""

READ_LATENCY = LAST_READ_LATENCY + 2
"""The same at all other ports: what they ask for waits two cycles, so that the last port knows from registers, a cycle
ahead, whether it is granted."""

ACC_READ_LATENCY = 4
"""Edges from an accumulator read to its data: block RAM, the register at its output, one behind the choice among two
groups of columns, one behind that among all."""

SEQUENTIAL_READ_LATENCY = 1
"""The same of buffers and accumulators of a core that runs one instruction at a time, where nobody waits."""


REGION_BITS = 32
"""Width of a region's base and size, in bytes."""


def region_layout() -> data.StructLayout:
    """Base and size of a DRAM region, in bytes, as the host has set them."""
    return data.StructLayout({"base": REGION_BITS, "size": REGION_BITS})


def axi_read_signature(arch: ArchConfig, *, id_bits: int = 1) -> Signature:
    """AXI4 read channels of a master, with their conventional flat names."""
    return Signature(
        {
            "arid": Out(id_bits),
            "araddr": Out(arch.addr_bits),
            "arlen": Out(8),
            "arsize": Out(3),
            "arburst": Out(2),
            "arlock": Out(1),
            "arcache": Out(4),
            "arprot": Out(3),
            "arvalid": Out(1),
            "arready": In(1),
            "rid": In(id_bits),
            "rdata": In(arch.bus_bits),
            "rresp": In(2),
            "rlast": In(1),
            "rvalid": In(1),
            "rready": Out(1),
        }
    )


def axi_write_signature(arch: ArchConfig, *, id_bits: int = 1) -> Signature:
    """AXI4 write channels of a master, with their conventional flat names."""
    return Signature(
        {
            "awid": Out(id_bits),
            "awaddr": Out(arch.addr_bits),
            "awlen": Out(8),
            "awsize": Out(3),
            "awburst": Out(2),
            "awlock": Out(1),
            "awcache": Out(4),
            "awprot": Out(3),
            "awvalid": Out(1),
            "awready": In(1),
            "wdata": Out(arch.bus_bits),
            "wstrb": Out(arch.bus_bytes),
            "wlast": Out(1),
            "wvalid": Out(1),
            "wready": In(1),
            "bid": In(id_bits),
            "bresp": In(2),
            "bvalid": In(1),
            "bready": Out(1),
        }
    )


def axi_lite_signature() -> Signature:
    """AXI4-Lite slave, seen from the slave: 32-bit data."""
    return Signature(
        {
            "awaddr": In(CSR_ADDR_BITS),
            "awprot": In(3),
            "awvalid": In(1),
            "awready": Out(1),
            "wdata": In(32),
            "wstrb": In(4),
            "wvalid": In(1),
            "wready": Out(1),
            "bresp": Out(2),
            "bvalid": Out(1),
            "bready": In(1),
            "araddr": In(CSR_ADDR_BITS),
            "arprot": In(3),
            "arvalid": In(1),
            "arready": Out(1),
            "rdata": Out(32),
            "rresp": Out(2),
            "rvalid": Out(1),
            "rready": In(1),
        }
    )
