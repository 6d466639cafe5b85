"""The import rules of README.md and of each root's README, checked on the sources and on a running interpreter."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "nibblecore": ROOT / "sw" / "nibblecore",
    "nibblecore_hw": ROOT / "hw" / "nibblecore_hw",
    "nibblecore_sim": ROOT / "sim" / "nibblecore_sim",
}

# What each part may import of ours; itself always. `errors` and `files` are for everybody.
MAY_IMPORT: dict[str, set[str]] = {
    "nibblecore": set(),
    "nibblecore.errors": set(),
    "nibblecore.files": set(),
    "nibblecore.arch": set(),
    "nibblecore.ir": {"nibblecore.arch"},
    "nibblecore.ir.random_graph": {"nibblecore.arch", "nibblecore.ir", "nibblecore.runtime"},  # sizes tensors to a core
    "nibblecore.frontend": {"nibblecore", "nibblecore.arch", "nibblecore.ir"},
    "nibblecore.models": set(),
    "nibblecore.qat": {"nibblecore.arch", "nibblecore.ir", "nibblecore.frontend", "nibblecore.models"},
    "nibblecore.golden": {"nibblecore.arch", "nibblecore.runtime"},
    "nibblecore.runtime": {"nibblecore", "nibblecore.arch", "nibblecore.golden"},
    "nibblecore.compiler": {
        "nibblecore",
        "nibblecore.arch",
        "nibblecore.ir",
        "nibblecore.golden",
        "nibblecore.runtime",
    },
    "nibblecore.cli": {"nibblecore.*"},
    "nibblecore_hw": {"nibblecore.arch"},
    "nibblecore_hw.commands": {"nibblecore.arch", "nibblecore.cli", "nibblecore_hw"},
    "nibblecore_sim": {"nibblecore.*", "nibblecore_hw"},
}
FOR_EVERYBODY = {"nibblecore.errors", "nibblecore.files"}

# Where torch may be imported; elsewhere only inside a function of a command.
TORCH_AT_ONCE = ("nibblecore.qat", "nibblecore.frontend.from_torch", "nibblecore.models")
TORCH_LAZILY = ("nibblecore.cli",)


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    at_once: bool
    place: str


def module_name(package: str, file: Path) -> str:
    parts = file.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join([package, *parts]).removesuffix(".__init__")


def imports_of(package: str, file: Path) -> Iterator[Import]:
    importer = module_name(package, file)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = importer.split(".") if file.name == "__init__.py" else importer.split(".")[:-1]
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from nibblecore import ir` imports nibblecore.ir.
            names = [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
        for name in names:
            yield Import(importer, name, id(node) not in lazy, f"{file.relative_to(ROOT)}:{node.lineno}")


def is_module(name: str) -> bool:
    package, _, rest = name.partition(".")
    path = PACKAGES.get(package, ROOT / "none").joinpath(*rest.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() or path.is_dir()


SOURCES = [(package, file) for package, root in PACKAGES.items() for file in sorted(root.rglob("*.py"))]
IMPORTS = [found for package, file in SOURCES for found in imports_of(package, file)]


def is_within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def part_of(module: str) -> str:
    """The most exact key of MAY_IMPORT that holds the module."""
    return max((part for part in MAY_IMPORT if is_within(module, part)), key=len)


def test_every_part_has_a_rule():
    names = (module_name(package, file) for package, file in SOURCES if package == "nibblecore")
    parts = {".".join(name.split(".")[:2]) for name in names}
    assert parts <= set(MAY_IMPORT), "say in MAY_IMPORT what the new part may import"


def test_parts_import_only_what_they_may():
    offences = []
    for found in IMPORTS:
        if found.imported.split(".")[0] not in PACKAGES:
            continue
        importer, imported = part_of(found.importer), part_of(found.imported)
        allowed = MAY_IMPORT[importer] | FOR_EVERYBODY | {importer}
        if imported in allowed or ("nibblecore.*" in allowed and is_within(imported, "nibblecore")):
            continue
        offences.append(f"{found.place}: {found.importer} may not import {found.imported}")
    assert not offences, "\n".join(offences)


def test_contract_needs_only_the_standard_library():
    offences = [
        f"{found.place}: {found.imported}"
        for found in IMPORTS
        if is_within(found.importer, "nibblecore.arch") or is_within(found.importer, "nibblecore.errors")
        if found.imported.split(".")[0] not in sys.stdlib_module_names | {"nibblecore"}
    ]
    assert not offences, "\n".join(offences)


def test_torch_is_imported_only_where_it_may():
    offences = [
        f"{found.place}: {found.importer} imports {found.imported}"
        for found in IMPORTS
        if found.imported.split(".")[0] in ("torch", "sklearn")
        if not any(is_within(found.importer, part) for part in TORCH_AT_ONCE)
        if found.at_once or not any(is_within(found.importer, part) for part in TORCH_LAZILY)
    ]
    assert not offences, "\n".join(offences)


def test_no_star_imports_and_no_future_annotations_in_hardware():
    offences = []
    for package, file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                if "*" in names:
                    offences.append(f"{file.relative_to(ROOT)}:{node.lineno}: star import")
                if package == "nibblecore_hw" and node.module == "__future__" and "annotations" in names:
                    offences.append(f"{file.relative_to(ROOT)}:{node.lineno}: breaks components and structs")
    assert not offences, "\n".join(offences)


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        "nibblecore": project["dependencies"] + extras["train"],  # where torch may be is checked above
        "nibblecore_hw": project["dependencies"] + extras["hw"],
        "nibblecore_sim": project["dependencies"] + extras["hw"] + extras["sim"],
    }
    distributions = importlib.metadata.packages_distributions()
    offences = []
    for found in IMPORTS:
        module = found.imported.split(".")[0]
        if module in sys.stdlib_module_names or module in PACKAGES:
            continue
        names = {
            re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in declared[found.importer.split(".")[0]]
        }
        owners = {owner.lower().replace("_", "-") for owner in distributions.get(module, [])}
        if not owners & names:
            offences.append(f"{found.place}: {module} is not a dependency of {found.importer.split('.')[0]}")
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize(
    "module", ["nibblecore.arch", "nibblecore.compiler", "nibblecore.golden", "nibblecore.runtime"]
)
def test_a_host_needs_neither_torch_nor_amaranth(module):
    if not is_module(module):
        pytest.skip(f"{module} does not exist yet")
    code = f"""if True:
        import importlib, pkgutil, sys, {module} as top
        for found in pkgutil.walk_packages(top.__path__, top.__name__ + "."):
            importlib.import_module(found.name)
        heavy = {{"torch", "sklearn", "amaranth", "cocotb", "nibblecore_hw", "nibblecore_sim"}}
        print(*sorted(heavy & set(sys.modules)))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "", f"{module} loads {run.stdout.strip()}"
