"""Load and store DMA as generated Verilog, with the activation buffer between them, against cocotbext-axi's memory."""

from pathlib import Path
from typing import Any

import pytest
from amaranth import Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import REGIONS, Opcode
from nibblecore_hw.dma.load import LoadDma
from nibblecore_hw.dma.store import StoreDma
from nibblecore_hw.layouts import (
    axi_read_signature,
    axi_write_signature,
    command_signature,
    instruction_layout,
    region_layout,
)
from nibblecore_hw.mem.buffer import BankedBuffer
from nibblecore_sim.build import build_verilator, to_verilog
from nibblecore_sim.core_build import GENERATED

pytestmark = pytest.mark.cosim


class DmaPair(wiring.Component):
    """LOAD and STORE through one activation buffer."""

    def __init__(self, *, arch: ArchConfig) -> None:
        self.arch = arch
        super().__init__(
            {
                "regions": In(data.ArrayLayout(region_layout(), REGIONS)),
                "load_command": In(command_signature()),
                "store_command": In(command_signature()),
                "load_bus": Out(axi_read_signature(arch)),
                "store_bus": Out(axi_write_signature(arch)),
                "load_done_stb": Out(1),
                "store_done_stb": Out(1),
                "error_stb": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        arch = self.arch
        m.submodules.load = load = LoadDma(arch=arch)
        m.submodules.store = store = StoreDma(arch=arch)
        # The second reader asks for nothing: the last one's words come earlier than those of the STORE.
        m.submodules.buffer = buffer = BankedBuffer(
            depth=arch.act_depth, banks=arch.act_banks, word_bits=arch.word_bits, parts=arch.parts_per_brick,
            kind=arch.act_memory, readers=2, writers=1,
        )  # fmt: skip
        connect(m, flipped(self.load_command), load.command)
        connect(m, flipped(self.store_command), store.command)
        connect(m, load.bus, flipped(self.load_bus))
        connect(m, store.bus, flipped(self.store_bus))
        connect(m, load.act, buffer.writes[0])
        connect(m, store.act, buffer.reads[0])
        m.d.comb += [
            load.act_ready_next.eq(1),
            *(
                engine.region.eq(self.regions[data.View(instruction_layout(opcode), engine.command.payload).region])
                for engine, opcode in ((load, Opcode.LOAD), (store, Opcode.STORE))
            ),
            self.load_done_stb.eq(load.done_stb),
            self.store_done_stb.eq(store.done_stb),
            self.error_stb.eq(load.error_stb | store.error_stb),
        ]
        return m


# Each is a build of its own: the first stands for all where time is short.
@pytest.mark.parametrize(
    ("lanes", "bus_bits", "memory"),
    [
        (16, 32, "dual"),
        pytest.param(16, 64, "dual", marks=pytest.mark.slow),
        pytest.param(8, 64, "single", marks=pytest.mark.slow),
    ],
)
def test_copies(lanes: int, bus_bits: int, memory: Any, tmp_path: Path) -> None:
    arch = ArchConfig(name="t", lanes=lanes, columns=4, post_lanes=4, acc_depth=16, act_depth=256, act_banks=2,
                      act_memory=memory, weight_depth=256, bus_bits=bus_bits, burst_beats=16)  # fmt: skip
    source = tmp_path / "dma_pair.v"
    source.write_text(to_verilog(DmaPair(arch=arch), name="dma_pair"))
    build = build_verilator("dma_pair", [source], flags=GENERATED)
    env = {"NIBBLECORE_WORD_BYTES": str(arch.word_bytes), "NIBBLECORE_ACT_DEPTH": str(arch.act_depth)}
    results = build.run("nibblecore_sim.tb.tb_dma", directory=tmp_path, seed=lanes + bus_bits, env=env)
    assert len(results.passed) == 2
