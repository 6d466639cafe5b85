# amaranth: UnusedElaboratable=no
"""Components as netlists of each device, in one simulator per device: most of a build's time is the same for all."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from amaranth import Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from nibblecore.arch.config import ELEMENT_WEIGHT_RANGE, ArchConfig
from nibblecore_hw.core.accumulate import Accumulators
from nibblecore_hw.core.array import SystolicArray
from nibblecore_hw.core.elements import ELEMENTS, make_element
from nibblecore_hw.core.requantize import RequantLane
from nibblecore_hw.mem.block import BlockMemory
from nibblecore_hw.mem.buffer import BankedBuffer
from nibblecore_hw.mem.sequential import SequentialBuffer
from nibblecore_hw.synth.devices import FpgaDevice, get_device
from nibblecore_sim.netlist import Netlist, Player, Row, make_netlist

DEVICES = ("ecp5-25k", "up5k")
LANES = 4


class SumOfProducts(wiring.Component):
    """``s`` is the sum of ``a * b`` and ``c * d`` two cycles before: what ``synth_ice40 -dsp`` gets wrong.

    Unless the registers of the products are kept.
    """

    a: Signal
    b: Signal
    c: Signal
    d: Signal
    s: Signal

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        super().__init__({**{name: In(signed(13)) for name in "abcd"}, "s": Out(signed(27))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        attributes = {"keep": 1} if self.keep else {}
        p, q = (Signal(signed(26), name=name, reset_less=True, attrs=attributes) for name in "pq")
        total = Signal(signed(27), reset_less=True)
        m.d.sync += [p.eq(self.a * self.b), q.eq(self.c * self.d), total.eq(p + q)]
        m.d.comb += self.s.eq(total)
        return m


class Memories(wiring.Component):
    """A memory of each shape that block RAM can have, with enables for parts where it has them; all at one address."""

    SHAPES = ((512, 36, 4), (1024, 18, 2), (2048, 9, 1), (4096, 4, 1), (8192, 2, 1), (16384, 1, 1))
    """Words, their bits, parts of a word."""

    read: Signal
    write: Signal
    word: Signal
    mask: Signal

    def __init__(self) -> None:
        words = {f"word{bits}": Out(bits) for _, bits, _ in self.SHAPES}
        super().__init__({"read": In(14), "write": In(14), "word": In(36), "mask": In(4), **words})

    @staticmethod
    def contents(depth: int, bits: int) -> list[int]:
        """Words at power-up."""
        return [n * 0x9E3779B97F >> 7 & (1 << bits) - 1 for n in range(depth)]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for depth, bits, parts in self.SHAPES:
            init = self.contents(depth, bits)
            memory = Memory(shape=bits, depth=depth, init=init, attrs={"no_rw_check": 1, "ram_style": "block"})
            m.submodules[f"memory{bits}"] = memory
            write, read = memory.write_port(granularity=bits // parts), memory.read_port()
            m.d.comb += [
                read.addr.eq(self.read), getattr(self, f"word{bits}").eq(read.data),
                write.addr.eq(self.write), write.data.eq(self.word), write.en.eq(self.mask),
            ]  # fmt: skip
        return m


class BlockMemories(wiring.Component):
    """A BlockMemory of each shape that block RAM can have, and of some that take several or leave a rest; all at one
    address."""

    SHAPES = ((512, 36, 1), (1024, 18, 1), (2048, 9, 1), (4096, 4, 1), (8192, 2, 1), (16384, 1, 1),
              (512, 96, 3), (1024, 20, 2), (600, 9, 1), (300, 40, 2))  # fmt: skip
    """Words, their bits, how many ``DP16KD`` they take."""

    read: Signal
    write: Signal
    enable: Signal
    word: Signal

    def __init__(self, technology: str) -> None:
        self._technology = technology
        words = {f"word{depth}x{bits}": Out(bits) for depth, bits, _ in self.SHAPES}
        super().__init__({"read": In(14), "write": In(14), "enable": In(1), "word": In(96), **words})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for depth, bits, _ in self.SHAPES:
            memory = BlockMemory(width=bits, depth=depth, technology=self._technology)
            m.submodules[f"memory{depth}x{bits}"] = memory
            m.d.comb += [
                memory.read_addr.eq(self.read), getattr(self, f"word{depth}x{bits}").eq(memory.read_data),
                memory.write_addr.eq(self.write), memory.write_data.eq(self.word), memory.write_en.eq(self.enable),
            ]  # fmt: skip
        return m


def small(element: str, *, lanes: int = 4, columns: int = 4) -> ArchConfig:
    return ArchConfig(name="t", lanes=lanes, columns=columns, post_lanes=2, element=element, acc_depth=16,
                      act_depth=256, weight_depth=256)  # fmt: skip


def buffer(**arguments: Any) -> Callable[[str], BankedBuffer]:
    return lambda technology: BankedBuffer(technology=technology, **arguments)


COMPONENTS: dict[str, Callable[[str], Any]] = {
    **{
        f"element_{kind}": functools.partial(
            lambda kind, technology: make_element(kind, lanes=LANES, technology=technology), kind
        )
        for kind in ELEMENTS
    },
    **{
        f"array_{kind}": functools.partial(
            lambda kind, technology: SystolicArray(small(kind), technology=technology), kind
        )
        for kind in ELEMENT_WEIGHT_RANGE
    },
    # So many entries that what gates them is in several registers, some of which hold the opposite.
    "wide_array": lambda technology: SystolicArray(small("lutram2", lanes=8, columns=32), technology=technology),
    "requantizer": lambda technology: RequantLane(acc_bits=24, technology=technology),
    "sum_of_products": lambda technology: SumOfProducts(keep=True),
    # Groups whose sums come at different times, and so wide that accumulators wrap.
    "accumulators": lambda technology: Accumulators(
        small("generic"), sum_bits=16, latencies=[1, 4], technology=technology
    ),
    "memories": lambda technology: Memories(),
    "block_memories": BlockMemories,
    # A part of 9 bits, a whole word of 36: each way of block RAM.
    "buffer_parts": buffer(depth=2048, banks=2, word_bits=36, parts=4, kind="dual", readers=3, writers=2),
    "buffer_words": buffer(depth=512, banks=1, word_bits=32, parts=1, kind="dual", readers=2, writers=1),
    "buffer_single": buffer(depth=1024, banks=1, word_bits=16, parts=4, kind="single", readers=2, writers=2),
    "buffer_single_banks": buffer(depth=1024, banks=2, word_bits=32, parts=8, kind="single", readers=3, writers=2),
    "sequential_dual": lambda technology: SequentialBuffer(
        depth=512, word_bits=32, parts=4, kind="dual", readers=3, writers=2
    ),
    "sequential_single": lambda technology: SequentialBuffer(
        depth=1024, word_bits=32, parts=8, kind="single", readers=3, writers=2
    ),
}


def mutant(netlist: Netlist, folder: Path) -> Netlist:
    """The same netlist with one bit of one table wrong: the entry for all inputs low, which every run meets."""
    name, table = f"{netlist.name}_mutant", r"(\.(?:INIT|LUT_INIT)\(16'h)([0-9a-f]{4})(\))"
    text = re.sub(rf"\bmodule {netlist.name}\b", f"module {name}", netlist.path.read_text())
    match = list(re.finditer(table, text))[-1]
    text = f"{text[: match.start()]}{match[1]}{int(match[2], 16) ^ 1:04x}{match[3]}{text[match.end() :]}"
    path = folder / "netlists" / f"{name}.v"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return dataclasses.replace(netlist, name=name, path=path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """All components of one device."""

    device: FpgaDevice
    player: Player

    def component(self, name: str) -> Any:
        """The component itself, for its model and its latency."""
        return COMPONENTS[name](self.device.technology)

    def play(self, name: str, rows: Sequence[Row]) -> list[dict[str, int]]:
        return self.player.play({name: rows})[name]


@pytest.fixture
def sum_of_products() -> type[SumOfProducts]:
    return SumOfProducts


@pytest.fixture(scope="session", params=DEVICES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    device = get_device(request.param)
    # The ECP5 has no memory of one port; the shapes of memories are those of its block RAM, whose model is ours.
    others = ("memories", "wide_array") if device.family == "ice40" else ("buffer_single", "sequential_single")
    names = [name for name in COMPONENTS if not name.startswith(others)]
    netlists = [make_netlist(COMPONENTS[name](device.technology), device, name=name) for name in names]
    (bitplane,) = (n for n in netlists if n.name == "element_bitplane")
    netlists.append(mutant(bitplane, tmp_path_factory.mktemp("mutant")))
    return Bench(device=device, player=Player(netlists))
