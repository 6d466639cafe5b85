"""The CSR map of the AXI4-Lite port: registers, their fields, error causes and performance counters.

All registers are 32 bits wide; reserved bits read as 0 and ignore writes. An access to an offset without a register,
or a write to a read-only one, is answered with SLVERR.

In the first 16 cycles after a hardware reset the registers of the regions are cleared: WREADY stays low, and a read
that was accepted is answered afterwards.
"""

import dataclasses
import enum
from typing import Final, Literal

from .isa import REGIONS

Access = Literal["ro", "rw", "wo", "w1c"]

MAGIC: Final = 0x4E49424C
"""ASCII ``NIBL``."""


@dataclasses.dataclass(frozen=True)
class RegisterField:
    name: str
    low: int
    bits: int
    doc: str


@dataclasses.dataclass(frozen=True)
class Register:
    """One 32-bit register at a byte ``offset``."""

    name: str
    offset: int
    access: Access
    doc: str
    fields: tuple[RegisterField, ...] = ()
    reset: int = 0


class ErrorCause(enum.IntEnum):
    """Why the core stopped; the first error wins."""

    NONE = 0
    ILLEGAL_INSTRUCTION = 1
    REGION = 2
    BUS_READ = 3
    BUS_WRITE = 4
    WATCHDOG = 5


ERROR_TEXT: Final = {
    ErrorCause.NONE: "no error",
    ErrorCause.ILLEGAL_INSTRUCTION: "the instruction's encoding is illegal",
    ErrorCause.REGION: "an access would leave its DRAM region",
    ErrorCause.BUS_READ: "the bus answered a read with SLVERR or DECERR",
    ErrorCause.BUS_WRITE: "the bus answered a write with SLVERR or DECERR",
    ErrorCause.WATCHDOG: "no engine made progress for the watchdog's time",
}


class ErrorUnit(enum.IntEnum):
    """Who met the error: the engines of :class:`nibblecore.arch.isa.Engine`, or fetch."""

    LOAD = 0
    MAC = 1
    POST = 2
    STORE = 3
    FETCH = 4


class Counter(enum.IntEnum):
    """Performance counters, in cycles from start to done; each 32 bits, wrapping.

    An engine is *busy* from the cycle it starts an instruction to the cycle it has finished it, all stalls but that
    for semaphores included.
    """

    TOTAL = 0
    LOAD_BUSY = 1
    MAC_BUSY = 2
    POST_BUSY = 3
    STORE_BUSY = 4
    LOAD_SEMAPHORE = 5
    MAC_SEMAPHORE = 6
    POST_SEMAPHORE = 7
    STORE_SEMAPHORE = 8
    LOAD_BUS = 9
    STORE_BUS = 10
    MAC_WEIGHTS = 11
    MAC_BANK = 12
    POST_BANK = 13
    MAC_ACTIVE = 14


COUNTER_DOC: Final = {
    Counter.TOTAL: "cycles from start to done or error",
    Counter.LOAD_BUSY: "load DMA busy",
    Counter.MAC_BUSY: "MAC engine busy",
    Counter.POST_BUSY: "post unit busy",
    Counter.STORE_BUSY: "store DMA busy",
    Counter.LOAD_SEMAPHORE: "load DMA has an instruction and waits for a semaphore",
    Counter.MAC_SEMAPHORE: "MAC engine has an instruction and waits for a semaphore",
    Counter.POST_SEMAPHORE: "post unit has an instruction and waits for a semaphore",
    Counter.STORE_SEMAPHORE: "store DMA has an instruction and waits for a semaphore",
    Counter.LOAD_BUS: "load DMA busy, and no word arrives from the bus",
    Counter.STORE_BUS: "store DMA busy, and the bus takes no word",
    Counter.MAC_WEIGHTS: "MAC engine waits for the next weight tile to reach the array",
    Counter.MAC_BANK: "MAC engine loses an activation bank to another engine",
    Counter.POST_BANK: "post unit loses an activation bank to another engine",
    Counter.MAC_ACTIVE: "cycles in which pixels enter the array",
}


def _build() -> dict[str, Register]:
    registers = [
        Register("MAGIC", 0x000, "ro", "identifies the core: ASCII NIBL", reset=MAGIC),
        Register(
            "VERSION", 0x004, "ro", "version of the instruction set", (RegisterField("isa", 0, 16, "ISA version"),)
        ),
        Register("CONFIG_HASH", 0x008, "ro", "hash of the ArchConfig (ArchConfig.hash)"),
        Register(
            "CONTROL",
            0x010,
            "wo",
            "commands; a write of 1 acts, 0 does nothing",
            (
                RegisterField("start", 0, 1, "fetch from region 0; ignored unless idle"),
                RegisterField(
                    "reset",
                    1,
                    1,
                    "soft reset: finish the bus transactions in flight, then clear all state but "
                    "regions, watchdog and interrupt enable",
                ),
            ),
        ),
        Register(
            "STATUS",
            0x014,
            "ro",
            "what the core does",
            (
                RegisterField("idle", 0, 1, "never started, or done, or reset"),
                RegisterField("running", 1, 1, "a program runs"),
                RegisterField("done", 2, 1, "the last program ended without error"),
                RegisterField("error", 3, 1, "the core has stopped, see ERROR; only a soft reset leaves this state"),
                RegisterField("resetting", 4, 1, "a soft reset waits for the bus"),
            ),
            reset=1,
        ),
        Register(
            "IRQ_ENABLE",
            0x018,
            "rw",
            "1: the interrupt line is high while IRQ_STATUS is not 0",
            (RegisterField("enable", 0, 1, "enable"),),
        ),
        Register(
            "IRQ_STATUS",
            0x01C,
            "w1c",
            "pending interrupt causes, cleared by writing 1",
            (
                RegisterField("done", 0, 1, "a program ended"),
                RegisterField("error", 1, 1, "the core stopped with an error"),
            ),
        ),
        Register(
            "ERROR",
            0x020,
            "ro",
            "the first error since start",
            (
                RegisterField("cause", 0, 8, "ErrorCause"),
                RegisterField("unit", 8, 8, "ErrorUnit"),
            ),
        ),
        Register("ERROR_INDEX", 0x024, "ro", "index of the instruction that met the error"),
        Register(
            "ERROR_WAITS",
            0x028,
            "ro",
            "per engine (4 bits each, LOAD lowest), the engines whose semaphores it waits for; frozen at an error",
        ),
        Register(
            "WATCHDOG",
            0x02C,
            "rw",
            "cycles without progress of any engine that stop the core; 0 switches it off",
            reset=1 << 20,
        ),
    ]
    for i in range(REGIONS):
        registers += [
            Register(
                f"REGION{i}_BASE",
                0x040 + 8 * i,
                "rw",
                f"byte address of region {i}; a multiple of the bus beat and of the word",
            ),
            Register(f"REGION{i}_SIZE", 0x044 + 8 * i, "rw", f"bytes of region {i}; 0 refuses every access"),
        ]
    registers += [Register(f"COUNT_{c.name}", 0x100 + 4 * c, "ro", COUNTER_DOC[c]) for c in Counter]
    return {r.name: r for r in registers}


REGISTERS: Final[dict[str, Register]] = _build()
"""Register name to :class:`Register`, in order of their offsets."""

CSR_ADDR_BITS: Final = 9
"""Byte address bits of the AXI4-Lite port."""


def field(register: str, name: str) -> RegisterField:
    """The named field of a register; :class:`KeyError` where there is none."""
    return {f.name: f for f in REGISTERS[register].fields}[name]


def extract(register: str, name: str, value: int) -> int:
    """The field's part of a register value."""
    f = field(register, name)
    return value >> f.low & (1 << f.bits) - 1
