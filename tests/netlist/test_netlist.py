# amaranth: UnusedElaboratable=no
"""The tool itself: what it makes, what it keeps, and what it says when it cannot."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from nibblecore.arch.config import get_arch
from nibblecore.errors import ToolchainError
from nibblecore_hw.core.requantize import RequantLane
from nibblecore_hw.mem.buffer import BankedBuffer
from nibblecore_hw.synth.devices import get_device
from nibblecore_hw.synth.run import count
from nibblecore_hw.verilog import to_verilog
from nibblecore_sim.netlist import Player, cell_models, make_netlist
from nibblecore_sim.transport import SimTransport


class Words(wiring.Component):
    """Memories with each kind of read port."""

    address: Signal
    word: Signal
    old: Signal
    new: Signal
    now: Signal

    def __init__(self) -> None:
        super().__init__({"address": In(4), "word": In(8), "old": Out(8), "new": Out(8), "now": Out(8)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.memory = memory = Memory(shape=8, depth=16, init=[])
        write = memory.write_port()
        ports = (
            memory.read_port(),
            memory.read_port(transparent_for=[write]),
            memory.read_port(domain="comb"),
        )
        m.d.comb += [write.addr.eq(self.address), write.data.eq(self.word), write.en.eq(1)]
        for port, data in zip(ports, (self.old, self.new, self.now), strict=True):
            m.d.comb += [port.addr.eq(self.address), data.eq(port.data)]
        return m


def test_only_ports_that_read_old_words_are_spoilt() -> None:
    unknown = re.compile(r"<= 8'hxx;")
    assert len(unknown.findall(to_verilog(Words(), name="words"))) == 0
    assert len(unknown.findall(to_verilog(Words(), name="words", spoil_collisions=True))) == 1


def test_netlist_is_what_is_counted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness of ``nibblecore synth`` around a component changes none of its cells."""
    monkeypatch.setenv("NIBBLECORE_CACHE", str(tmp_path))
    device = get_device("ecp5-25k")
    netlist = make_netlist(RequantLane(acc_bits=24), device, name="requantizer")
    assert netlist.cells == count(RequantLane(acc_bits=24), device)
    assert {p.name for p in netlist.ports} >= {"clk", "rst", "acc", "code"}
    made = netlist.path.stat().st_mtime_ns
    assert make_netlist(RequantLane(acc_bits=24), device, name="requantizer") == netlist
    assert netlist.path.stat().st_mtime_ns == made


LOST = (
    r"^Yosys lost a factor or a summand of '(core\.)?(s|total)' for up5k: nothing drives C and D of its SB_MAC16\.\n"
    r"It does so where two products with a register each are added\. Set the attribute 'keep' on both registers: "
    r"Signal\(\.\.\., attrs=\{'keep': 1\}\)\.$"
)


def test_product_that_yosys_loses(sum_of_products: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by whoever makes netlists, and what is in the cache is no excuse."""
    monkeypatch.setenv("NIBBLECORE_CACHE", str(tmp_path))
    device = get_device("up5k")
    for _ in range(2):
        with pytest.raises(ToolchainError, match=LOST):
            count(sum_of_products(keep=False), device)
        with pytest.raises(ToolchainError, match=LOST):
            make_netlist(sum_of_products(keep=False), device, name="lost")
    assert count(sum_of_products(keep=True), device)["SB_MAC16"] == 2


@pytest.mark.cosim
def test_products_that_are_kept(bench: Any) -> None:
    rng = random.Random(5)
    extremes = (-4096, -4095, -1, 0, 1, 4095)
    rows = [
        {name: rng.choice((rng.choice(extremes), rng.randint(-4096, 4095))) for name in "abcd"} for _ in range(500)
    ]  # fmt: skip
    cells = bench.player.netlists["sum_of_products"].cells
    assert cells["SB_MAC16" if bench.device.family == "ice40" else "MULT18X18D"] == 2
    outputs = bench.play("sum_of_products", [*rows, {}, {}])
    for cycle, row in enumerate(rows):
        want = row["a"] * row["b"] + row["c"] * row["d"]
        assert outputs[cycle + 2]["s"] == want & (1 << 27) - 1, f"cycle {cycle}: {row}"


def test_failure_of_yosys_is_quoted() -> None:
    buffer = BankedBuffer(depth=64, banks=1, word_bits=16, parts=1, kind="single", readers=1, writers=1)
    text = r"^Yosys failed on buffer for ecp5-25k: ERROR: no valid mapping found for memory core\.bank0$"
    with pytest.raises(ToolchainError, match=text):
        make_netlist(buffer, get_device("ecp5-25k"), name="buffer")


def test_cells_without_models() -> None:
    with pytest.raises(
        ToolchainError, match=r"^There are no models of the cells of gw2a-18: only ECP5's and iCE40's are known\.$"
    ):
        cell_models(get_device("gw2a-18"))


@pytest.mark.cosim
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda b: Player([]), "netlists must be there, and of one family of devices"),
        (
            lambda b: Player([b.player.netlists["requantizer"]] * 2),
            "names of netlists must differ, not requantizer, requantizer",
        ),
        (lambda b: b.play("requantiser", [{}]), "there is no netlist 'requantiser'; there are "),
        (lambda b: b.play("requantizer", [{"carry": 1}]), "requantizer has no input 'carry'; it has "),
        (lambda b: b.play("requantizer", [{"low": 256}]), "requantizer.low has 8 bits, which 256 does not fit"),
    ],
)
def test_arguments_are_checked(bench: Any, call: Callable[[Any], object], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        call(bench)


def test_netlists_run_in_one_simulator_only() -> None:
    with pytest.raises(ValueError, match=r"^netlists run in Verilator only, not in icarus$"):
        SimTransport(get_arch("tiny"), simulator="icarus", netlist=get_device("up5k"))


@pytest.mark.parametrize(
    ("simulator", "arch", "text"),
    [
        ("verilator", "small", "accesses to buffers are counted in icarus, not in verilator"),
        ("icarus", "tiny", "tiny has a buffer with a single port"),
    ],
)
def test_accesses_that_cannot_be_counted(simulator: str, arch: str, text: str) -> None:
    core = SimTransport.__new__(SimTransport)  # asked before the simulation is
    core.arch, core._simulator = get_arch(arch), simulator
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        core.watch_buffers()
