"""What a user gets: the wheel's contents and metadata, imported from the wheel alone."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import nibblecore

ROOT = Path(__file__).parents[2]
ROOTS = {"nibblecore": "sw", "nibblecore_hw": "hw", "nibblecore_sim": "sim"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (file,) = folder.iterdir()
    return file


def test_wheel_is_for_any_machine(wheel):
    assert wheel.name == f"nibblecore-{nibblecore.__version__}-py3-none-any.whl"


def test_wheel_has_every_file_of_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        f"{package}/{file.relative_to(ROOT / root / package).as_posix()}"
        for package, root in ROOTS.items()
        for file in (ROOT / root / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert packed == sources
    assert {f"{package}/py.typed" for package in ROOTS} <= packed


def test_metadata(wheel):
    info = f"nibblecore-{nibblecore.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode().splitlines()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert sorted(metadata.get_all("Provides-Extra")) == ["bench", "dev", "hw", "onnx", "sim", "train"]
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not any(name in line for line in required for name in ("torch", "amaranth", "cocotb")), required
    assert not any(" @ " in line for line in metadata.get_all("Requires-Dist")), "registries refuse direct references"
    assert {
        "nibblecore = nibblecore.cli:main",
        "hw = nibblecore_hw.commands:register",
        "sim = nibblecore_sim.commands:register",
    } <= set(entry_points)


def test_packages_import_from_the_wheel(wheel, tmp_path):
    code = "import nibblecore, nibblecore_hw, nibblecore_sim; print(nibblecore.__file__, nibblecore.__version__)"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}); {code}"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == [str(wheel / "nibblecore" / "__init__.py"), nibblecore.__version__]


def test_lock_names_every_declared_dependency_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "the lock has names and versions only"
    locked = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    declared = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in declared} - {"nibblecore"}
    assert names <= locked, f"run `make lock`: {sorted(names - locked)}"
