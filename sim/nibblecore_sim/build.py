"""Verilog from Amaranth, simulators built from Verilog, and cocotb benches run on them.

::

    Amaranth component ─► to_verilog ─► build_verilator ─┐
                                     └► build_icarus ────┴► Build ─► Build.run(bench) ─► Results, or SimulationError

Builds are cached by the hash of everything that goes into them: sources, parameters, options, versions of the tools.
Several processes may build at once: one builds, the others wait for it and then use what it made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock
from xml.etree import ElementTree

import cocotb
import cocotb_tools.config
import find_libpython
from cocotb_tools.runner import get_runner

from nibblecore.errors import SimulationError, ToolchainError
from nibblecore.files import cache_dir
from nibblecore_hw.verilog import to_verilog

from .toolchain import find_icarus, find_verilator

__all__ = ["Build", "Results", "build_icarus", "build_verilator", "cache_dir", "clear_cache", "to_verilog"]

JOBS = 2
"""C++ files compiled at the same time in one build."""

KEEP_DAYS = 30
"""A build that was not used for so long is deleted when another one is made."""

TIMESCALE = ("1ns", "1ps")
"""Time unit and precision of every build; cocotb needs one, and Icarus would default to 1 s."""

# Part of every key: change it when builds made by older code must not be used any more.
_FORMAT = 1


def clear_cache() -> None:
    """Delete every build. Do not call it while another process builds or simulates."""
    shutil.rmtree(cache_dir(), ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a bench said.

    Attributes
    ----------
    passed : tuple of str
        Names of the cocotb tests, all of which passed.
    log : Path
        What the simulator and the tests printed.
    sim_seconds : float
        Wall-clock time of the simulator's process, in seconds.
    """

    passed: tuple[str, ...]
    log: Path
    sim_seconds: float


@dataclass(frozen=True, kw_only=True)
class Build:
    """A simulator for one design.

    Attributes
    ----------
    simulator : str
        ``"verilator"`` or ``"icarus"``.
    top : str
        Name of the top module.
    directory : Path
        Holds the program, ``build.log`` and ``build.json`` with everything that went into it.
    executable : Path
        The simulator's program, or Icarus' ``sim.vvp``.
    waves : bool
        Whether it can write waveforms.
    cached : bool
        Whether it was found in the cache rather than built now.
    """

    simulator: Literal["verilator", "icarus"]
    top: str
    directory: Path
    executable: Path
    waves: bool
    cached: bool

    def run(
        self,
        bench: str | Path,
        *,
        directory: Path,
        tests: Sequence[str] = (),
        seed: int = 1,
        env: Mapping[str, str] | None = None,
        plusargs: Sequence[str] = (),
        waves: bool = False,
    ) -> Results:
        """Run the cocotb tests of a Python module on this design.

        Parameters
        ----------
        bench : str or Path
            The module's name, importable as from here, or its file.
        directory : Path
            Where the simulator runs and writes; it gets ``<bench>.log``, ``<bench>.xml`` and, with ``waves``, a
            waveform (``dump.vcd`` of Verilator, ``<top>.fst`` of Icarus).
        tests : sequence of str
            Names of the tests to run; all of them if empty.
        seed : int
            Seed of Python's random numbers in the bench.
        env : mapping, optional
            More environment variables: the way to hand values to a bench.
        plusargs : sequence of str
            Arguments for the simulator, ``"+name=value"``.
        waves : bool
            Write a waveform; the build must have been made with ``waves=True``.

        Raises
        ------
        SimulationError
            If a test fails, none ran, or the simulator stopped; it names the failed tests and the log.
        ToolchainError
            If this Python has no shared library, which the simulator loads.
        ValueError
            If ``waves`` is asked of a build that cannot write them.
        """
        if waves and not self.waves:
            raise ValueError(f"waves=True needs a build of {self.top} with waves=True")
        if find_libpython.find_libpython() is None:
            raise ToolchainError(
                "The shared library of this Python, which the simulator loads, is missing.",
                hint="Install it, on Debian or Ubuntu with: apt-get install libpython3.11 (for Python 3.11).",
            )
        directory = directory.absolute()
        directory.mkdir(parents=True, exist_ok=True)
        module = bench.stem if isinstance(bench, Path) else bench
        log, results = directory / f"{module}.log", directory / f"{module}.xml"
        results.unlink(missing_ok=True)
        tools = find_icarus().environment() if self.simulator == "icarus" else dict(os.environ)
        # These would override the runner's arguments; the first also makes it behave as if it were the test.
        for variable in ("PYTEST_CURRENT_TEST", "WAVES", "GUI", "COCOTB_TEST_FILTER", "COCOTB_RANDOM_SEED"):
            tools.pop(variable, None)
        # The runner hands its whole environment and sys.path to the simulator; its own argument for more variables
        # loses against what is set already.
        path = [str(bench.parent.absolute()), *sys.path] if isinstance(bench, Path) else sys.path
        began = time.monotonic()
        with (
            mock.patch.dict(os.environ, {**tools, **(env or {})}, clear=True),
            mock.patch.object(sys, "path", path),
            contextlib.suppress(SystemExit),  # the simulator's exit status; the results file says more
        ):
            get_runner(self.simulator).test(
                test_module=module,
                hdl_toplevel=self.top,
                hdl_toplevel_lang="verilog",
                build_dir=self.directory,
                test_dir=directory,
                results_xml=str(results),
                testcase=list(tests) or None,
                seed=seed,
                plusargs=list(plusargs),
                waves=waves,
                log_file=log,
            )
        return _read_results(module, results, log, time.monotonic() - began)


def build_verilator(
    top: str,
    sources: Sequence[Path],
    *,
    parameters: Mapping[str, int | str] | None = None,
    defines: Mapping[str, int | str] | None = None,
    includes: Sequence[Path] = (),
    flags: Sequence[str] = (),
    harness: Sequence[Path] = (),
    public: Literal["ports", "all"] = "ports",
    threads: int = 1,
    optimize: bool = True,
    waves: bool = False,
) -> Build:
    """Compile Verilog with Verilator, or find the same build in the cache.

    Parameters
    ----------
    top : str
        Name of the top module.
    sources : sequence of Path
        Verilog and SystemVerilog files; ``.vlt`` control files too.
    parameters, defines : mapping, optional
        Parameters of the top module and preprocessor macros, as Verilog text or as ints.
    includes : sequence of Path
        Folders for ```include``. Every file in them counts as a source. Files that the design reads when it runs
        (``$readmemh``) are not part of the build.
    flags : sequence of str
        More options for Verilator.
    harness : sequence of Path
        C++ files with ``main``, instead of cocotb's; the class of the design is ``Vtop``. Such a build has no VPI, so
        that Verilator optimizes freely, and :meth:`Build.run` is not for it.
    public : str
        What a cocotb bench can see: ``"ports"`` of the top module, or ``"all"`` signals. The latter keeps Verilator
        from optimizing: a design of 257 small modules ran at 110 k instead of 648 k cycles/s.
    threads : int
        Threads of the simulation, at least 1.
    optimize : bool
        Let the C++ compiler optimize. Without it the build takes half as long, and the simulation several times.
    waves : bool
        Can write a VCD; slower even when it does not.

    Raises
    ------
    ToolchainError
        If a tool is missing, or the build fails; it quotes the first error and names the log.
    ValueError
        If ``threads`` is less than 1, or there are no sources.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads!r}")
    tool = find_verilator()
    options = ["--cc", "--exe", "--top-module", top, "--prefix", "Vtop", "-o", top, "--threads", str(threads)]
    options += ["-O3", "--x-assign", "fast", "--x-initial", "fast", "--timescale", "/".join(TIMESCALE)]
    # Amaranth writes a + b with operands of different widths, as Verilog allows.
    options += ["-Wno-WIDTHEXPAND", "-Wno-WIDTHTRUNC"]
    if harness:
        main = [Path(file) for file in harness]
    else:
        main = [cocotb_tools.config.share_dir / "lib" / "verilator" / "verilator.cpp"]
        libs = cocotb_tools.config.libs_dir
        options += ["--vpi", *(["--public-flat-rw"] if public == "all" else ["--public-depth", "1"])]
        options += ["-LDFLAGS", f"-Wl,-rpath,{libs} -L{libs} -lcocotbvpi_verilator"]
    options += [*(["--trace", "--trace-structs"] if waves else []), *flags]
    options += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    options += [f"-I{Path(folder).absolute()}" for folder in includes]
    options += [f"-G{name}={value}" for name, value in (parameters or {}).items()]
    levels = ("-O3", "-O2") if optimize else ("-O0", "-O0")
    make = ["make", "-j", str(JOBS), "-f", "Vtop.mk", f"OPT_FAST={levels[0]}", f"OPT_GLOBAL={levels[1]}"]
    make += [f"VM_TRACE={int(waves)}"]
    files = [Path(file).absolute() for file in sources]
    inputs = {
        "verilator": [tool.version, str(tool.root)],
        "cxx": _first_line([tool.make_variables.get("CXX", os.environ.get("CXX", "g++")), "--version"]),
        "cocotb": None if harness else cocotb.__version__,
        "options": options,
        "make": make,
        "sources": _hashes([*files, *main], includes),
    }

    def build(folder: Path, log: Path) -> Path:
        env = tool.environment()
        verilate = [str(tool.executable), "--Mdir", str(folder), *options, *map(str, main), *map(str, files)]
        _call("Verilator", verilate, folder, env, log, top)
        _call("the C++ build", make, folder, env, log, top)
        return folder / top

    directory, cached = _cached("verilator", top, inputs, build)
    return Build(
        simulator="verilator", top=top, directory=directory, executable=directory / top, waves=waves, cached=cached
    )


def build_icarus(
    top: str,
    sources: Sequence[Path],
    *,
    parameters: Mapping[str, int | str] | None = None,
    defines: Mapping[str, int | str] | None = None,
    includes: Sequence[Path] = (),
    waves: bool = False,
) -> Build:
    """Compile Verilog with Icarus, or find the same build in the cache.

    Icarus is the second opinion on protocol benches. It shows X on Amaranth's Verilog until an input changes, so a
    bench drives every input before it looks at an output. Parameters and errors are those of :func:`build_verilator`.
    """
    tool = find_icarus()
    options = ["-g2012", "-s", top]
    options += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    options += [f"-I{Path(folder).absolute()}" for folder in includes]
    options += [f"-P{top}.{name}={value}" for name, value in (parameters or {}).items()]
    files = [Path(file).absolute() for file in sources]
    dump = f'module nibblecore_dump; initial begin $dumpfile("{top}.fst"); $dumpvars(0, {top}); end endmodule\n'
    inputs = {
        "icarus": [tool.version, str(tool.iverilog)],
        "options": options,
        "dump": dump if waves else None,
        "sources": _hashes(files, includes),
    }

    def build(folder: Path, log: Path) -> Path:
        (folder / "cmds.f").write_text(f"+timescale+{'/'.join(TIMESCALE)}\n")
        command = [str(tool.iverilog), "-o", "sim.vvp", *options, "-f", "cmds.f", *map(str, files)]
        if waves:
            (folder / "dump.v").write_text(dump)
            command += ["-s", "nibblecore_dump", "dump.v"]
        _call("Icarus", command, folder, tool.environment(), log, top)
        return folder / "sim.vvp"

    directory, cached = _cached("icarus", top, inputs, build)
    return Build(
        simulator="icarus", top=top, directory=directory, executable=directory / "sim.vvp", waves=waves, cached=cached
    )


def _cached(
    simulator: str, top: str, inputs: Mapping[str, Any], build: Callable[[Path, Path], Path]
) -> tuple[Path, bool]:
    """The folder of a build, and whether it was there already; ``build(folder, log)`` returns the program's path."""
    if not inputs["sources"]:
        raise ValueError(f"there are no sources to build {top} from")
    text = json.dumps({"format": _FORMAT, **inputs}, sort_keys=True, indent=1)
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    cache = cache_dir()
    final = cache / simulator / f"{top}-{key}"
    with _locked(cache / "locks" / f"{simulator}-{key}"):
        # build.json is written last, and the folder appears under its name only when it is complete.
        if (final / "build.json").exists():
            os.utime(final)
            return final, True
        final.parent.mkdir(parents=True, exist_ok=True)
        _prune(final.parent)
        with tempfile.TemporaryDirectory(prefix=f".{top}-", dir=final.parent) as scratch:
            objects, done = Path(scratch, "objects"), Path(scratch, "done")
            objects.mkdir()
            done.mkdir()
            log = cache / "logs" / f"{simulator}-{top}-{key}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("")
            program = build(objects, log)
            # Object files are large and of no use any more.
            shutil.move(program, done / program.name)
            shutil.move(log, done / "build.log")
            (done / "build.json").write_text(text)
            shutil.rmtree(final, ignore_errors=True)
            done.rename(final)
    return final, False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed, also if this process is killed
        yield


def _prune(folder: Path) -> None:
    oldest = time.time() - KEEP_DAYS * 86400
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry, ignore_errors=True)


def _hashes(files: Sequence[Path], includes: Sequence[Path]) -> list[list[str]]:
    """Name and hash of every source. Names without folders: the same file elsewhere makes the same build."""
    found = [*files, *(file for folder in includes for file in sorted(Path(folder).rglob("*")) if file.is_file())]
    missing = [str(file) for file in found if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"no such source file: {', '.join(missing)}")
    return [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in found]


def _first_line(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def _call(what: str, command: Sequence[str], folder: Path, env: Mapping[str, str], log: Path, top: str) -> None:
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        status = subprocess.run(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        lines = log.read_text(errors="replace").splitlines()
        error = next((line for line in lines if "rror" in line and not line.startswith("$ ")), lines[-1])
        raise ToolchainError(f"{what} failed on {top} with status {status}: {error.strip()}", hint=f"The log is {log}.")


def _read_results(bench: str, results: Path, log: Path, seconds: float) -> Results:
    if not results.exists():
        tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else ["(no log)"]
        raise SimulationError(
            "\n".join([f"{bench} stopped before it had results:", *(f"    {line}" for line in tail)]),
            hint=f"The log is {log}.",
        )
    passed, failed = [], []
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        name = case.get("name", "?")
        fault = next((child for child in case if child.tag in ("failure", "error")), None)
        if fault is not None:
            reason = (fault.get("error_msg") or fault.get("message") or fault.text or "no reason given").strip()
            failed.append(f"    {name}: {reason.splitlines()[0]}")
        elif case.find("skipped") is None:
            passed.append(name)
    if failed:
        raise SimulationError(
            "\n".join([f"{bench}: {len(failed)} of {len(failed) + len(passed)} tests failed:", *failed]),
            hint=f"The log is {log}.",
        )
    if not passed:
        raise SimulationError(f"{bench} ran no test.", hint=f"The log is {log}.")
    return Results(passed=tuple(passed), log=log, sim_seconds=seconds)
