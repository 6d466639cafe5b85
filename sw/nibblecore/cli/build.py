"""``compile``: from a checkpoint to a program."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..arch.config import ArchConfig, get_arch
from ..errors import NibbleError
from ..runtime.program import Program
from .console import ARCH_OPTION, JSON_OPTION, OUT, print_json, require_output_folder, say, table

if TYPE_CHECKING:
    from ..compiler.cost import Estimate
    from ..ir import Graph
    from ..qat import QuantModel

SOURCE_ARGUMENT = typer.Argument(
    ..., help="Checkpoint that `nibblecore train` writes, or package.module:factory of a prepared model."
)
WEIGHTS_OPTION = typer.Option(None, "--weights", "-w", help="State dict for package.module:factory.")


def load_graph(source: str, weights: Path | None) -> "Graph":
    """The integer graph of a checkpoint, or of ``package.module:factory`` with a state dict."""
    return load_quantized(source, weights)[1]


def load_quantized(source: str, weights: Path | None) -> "tuple[QuantModel, Graph]":
    """The prepared model that :func:`load_graph` converts, in evaluation mode, and its integer graph."""
    try:
        from ..qat import QuantModel, convert, load_checkpoint, load_model
    except ImportError as error:
        raise NibbleError(
            f"reading a PyTorch model needs the package {error.name!r}, which is not installed.",
            hint="Install: pip install 'nibblecore[train]'",
        ) from None
    if ":" in source and not Path(source).exists():
        if weights is None:
            raise NibbleError(f"{source} needs its state dict.", hint="Give the file with --weights.")
        # As `python -m` does: the user's package lies in the folder where the command is called.
        sys.path.insert(0, os.getcwd())
        model = load_model(source, weights)
        if not isinstance(model, QuantModel):
            raise NibbleError(
                f"{source} returned {type(model).__name__}, which has no quantizers.",
                hint="Return nibblecore.qat.prepare(model, ...), and give the state dict that its training ended with.",
            )
        return model.eval(), convert(model)
    if weights is not None:
        raise NibbleError(
            f"--weights goes with package.module:factory, and {source} is a file.",
            hint="A checkpoint holds its own weights.",
        )
    loaded = load_checkpoint(source)
    return loaded, convert(loaded)


def compile_model(
    source: str = SOURCE_ARGUMENT,
    weights: Path | None = WEIGHTS_OPTION,
    arch: str = ARCH_OPTION,
    output: Path | None = typer.Option(None, "--output", "-o", help="Program to write; default: <source>.nib."),
    dump_tensors: bool = typer.Option(
        False, "--dump-tensors", help="Make the program store every layer's tensor, too."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Compile a trained network for a core, and report what it will cost there."""
    core = get_arch(arch)
    default = Path(f"{source.rpartition(':')[2]}.nib") if ":" in source else Path(source).with_suffix(".nib")
    path = require_output_folder(output or default)
    graph = load_graph(source, weights)
    program, seconds = compile_timed(graph, core, dump_tensors=dump_tensors)
    program.save(path)
    report(program, path=path, seconds=seconds, as_json=as_json)


def compile_timed(graph: "Graph", arch: ArchConfig, *, dump_tensors: bool = False) -> tuple[Program, float]:
    """The program and the seconds that compiling it took."""
    from ..compiler.options import CompileOptions
    from ..compiler.pipeline import compile_graph

    began = time.monotonic()
    program = compile_graph(graph, arch, CompileOptions(dump_tensors=dump_tensors))
    return program, time.monotonic() - began


def estimate_values(program: Program, estimate: "Estimate") -> dict[str, Any]:
    """The figures of an estimate, for JSON."""
    layers = zip(program.layers, estimate.layer_cycles, estimate.layer_utilization, strict=True)
    return {
        "name": program.name,
        "arch": program.arch.name,
        "predicted_cycles": estimate.cycles,
        "mac_utilization": estimate.utilization,
        "macs": sum(layer.macs for layer in program.layers),
        "instructions": len(program.instructions),
        "constants_bytes": len(program.constants),
        "layers": [
            {"name": layer.name, "path": layer.path, "op": layer.op, "macs": layer.macs, "cycles": c, "utilization": u}
            for layer, c, u in layers
        ],
    }


def report(program: Program, *, path: Path | None, seconds: float | None, as_json: bool) -> None:
    """What the cost model predicts, layer by layer."""
    from ..compiler.cost import estimate

    values = estimate_values(program, estimate(program))
    if as_json:
        extra = {} if path is None else {"file": str(path), "seconds": seconds}
        print_json({**values, **extra})
        return
    rows = table(
        f"{program.name} on {program.arch.name}: predicted", "layer", "operation", "MACs>", "cycles>", "utilization>"
    )
    for layer in values["layers"]:
        rows.add_row(
            layer["path"] or layer["name"],
            layer["op"],
            f"{layer['macs']:,}",
            f"{layer['cycles']:,}",
            f"{layer['utilization']:.1%}",
        )
    rows.add_section()
    rows.add_row(
        "total", "", f"{values['macs']:,}", f"{values['predicted_cycles']:,}", f"{values['mac_utilization']:.1%}"
    )
    OUT.print(rows)
    say(f"{values['instructions']} instructions, {values['constants_bytes']:,} bytes of weights and records")
    if path is not None:
        say(f"{path}: compiled in {seconds:.1f} s")
