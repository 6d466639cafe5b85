"""``run``, ``diff`` and ``estimate``: execute programs, compare executions, predict them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer

from ..arch.config import get_arch
from ..arch.regs import COUNTER_DOC, Counter
from ..errors import NibbleError
from ..files import write_atomically
from ..runtime.device import Device, Result
from ..runtime.program import Program, TensorBinding
from .build import SOURCE_ARGUMENT, WEIGHTS_OPTION, compile_timed, load_graph, report
from .console import (
    ARCH_OPTION,
    JSON_OPTION,
    OUT,
    open_transport,
    print_json,
    progress,
    require_output_folder,
    say,
    table,
)

Array = npt.NDArray[Any]

PROGRAM_ARGUMENT = typer.Argument(..., help="Program file, as `nibblecore compile` writes it.")
INPUT_OPTION = typer.Option(
    None, "--input", "-i", help="Images as .npy: (C, H, W) or (N, C, H, W), real numbers or stored codes."
)
RANDOM_OPTION = typer.Option(1, "--random", help="Seed of a random image, where there is no --input.")


def load_images(path: Path | None, binding: TensorBinding, seed: int) -> list[Array]:
    """The images of a .npy file, or one of random codes."""
    if path is None:
        low, high = -(1 << binding.bits - 1), 1 << binding.bits - 1
        return [np.random.default_rng(seed).integers(low, high, binding.shape)]
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise NibbleError(f"{path}: is not a NumPy array file ({error})", hint="Write it with numpy.save.") from None
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != binding.shape:
        raise NibbleError(
            f"{path}: has shape {array.shape}; the input {binding.name!r} takes {binding.shape} per image"
        )
    return list(array)


def run(
    program: Path = PROGRAM_ARGUMENT,
    on: str = typer.Option("golden", "--on", help="golden: functional model; rtl: the simulated hardware."),
    images: Path | None = INPUT_OPTION,
    random: int = RANDOM_OPTION,
    output: Path | None = typer.Option(None, "--output", "-o", help="Write the first output of every image as .npy."),
    waves: Path | None = typer.Option(None, "--waves", help="With --on rtl: folder that gets a waveform."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Run a program on images, and print outputs and cycles."""
    loaded = Program.load(program)
    if waves is not None and on == "golden":
        raise NibbleError("--waves needs a simulation of hardware.", hint="Add --on rtl.")
    if output is not None:
        require_output_folder(output)
    given = load_images(images, loaded.inputs[0], random)
    results = execute(loaded, on, given, quiet=as_json, **({"waves": waves} if waves is not None else {}))
    real = np.stack([r.real() for r in results])
    if output is not None:
        import io

        buffer = io.BytesIO()
        np.save(buffer, real)
        write_atomically(output, buffer.getvalue())
    cycles = [r.cycles for r in results if r.cycles is not None]
    if as_json:
        print_json(
            {
                "on": on,
                "images": len(results),
                "outputs": [{name: o.reshape(-1).tolist() for name, o in r.outputs.items()} for r in results],
                "cycles": cycles,
                "predicted_cycles": loaded.predicted_cycles,
                "mac_utilization": [loaded.utilization(c) for c in cycles],
                "counters": [{c.name: v for c, v in r.counters.items()} for r in results],
            }
        )
        return
    rows = table(f"{loaded.name} on {on}", "image>", "output", "cycles>", "utilization>")
    for k, (result, values) in enumerate(zip(results, real, strict=True)):
        flat = values.reshape(-1)
        text = " ".join(f"{v:.3g}" for v in flat[:10]) + (" ..." if flat.size > 10 else "")
        spent = result.cycles
        rows.add_row(str(k), text, f"{spent:,}" if spent else "", f"{loaded.utilization(spent):.1%}" if spent else "")
    OUT.print(rows)
    if cycles:
        counters = table("counters of the last image", "counter", "cycles>", "meaning")
        for counter in Counter:
            counters.add_row(counter.name, f"{results[-1].counters[counter]:,}", COUNTER_DOC[counter])
        OUT.print(counters)
        say(f"predicted: {loaded.predicted_cycles:,} cycles")


def execute(program: Program, on: str, images: list[Array], *, quiet: bool, **options: Any) -> list[Result]:
    """All images through one core, with a progress bar."""
    if on == "rtl":
        say(f"preparing the simulation of {program.arch.name} (building it takes a minute the first time)", quiet=quiet)
    with open_transport(on, program.arch, **options) as transport, progress(quiet) as bar:
        device = Device(transport)
        device.load(program)
        task = bar.add_task(f"running on {on}", total=len(images))
        results = []
        for image in images:
            results.append(device.run(image))
            bar.advance(task)
        return results


def diff(
    source: str = SOURCE_ARGUMENT,
    weights: Path | None = WEIGHTS_OPTION,
    arch: str = ARCH_OPTION,
    images: Path | None = INPUT_OPTION,
    random: int = RANDOM_OPTION,
    on: str = typer.Option("golden,rtl", "--on", help="What to compare with the integer graph."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Compare integer graph, golden model and RTL tensor by tensor, and name the first that differs."""
    from ..ir.interpret import run as interpret

    graph = load_graph(source, weights)
    program, _ = compile_timed(graph, get_arch(arch), dump_tensors=True)
    binding = program.inputs[0]
    given = load_images(images, binding, random)
    codes = [binding.quantize(x) if np.issubdtype(x.dtype, np.floating) else x for x in given]
    want = interpret(graph, {binding.name: np.stack(codes)}, keep=True)
    names = [b.name for b in (*program.tensors, *program.outputs)]
    rows: list[dict[str, Any]] = []
    first: dict[str, str] = {}
    for where in on.split(","):
        results = execute(program, where, codes, quiet=as_json)
        for name in names:
            got = np.stack([{**r.tensors, **r.outputs}[name] for r in results])
            wrong = int((got != want[name]).sum())
            rows.append({"tensor": name, "on": where, "codes": got.size, "mismatches": wrong})
            if wrong and where not in first:
                place = tuple(int(k) for k in np.argwhere(got != want[name])[0])
                first[where] = f"{name}{list(place)}: {got[place]}, not {want[name][place]}"
    if as_json:
        print_json({"tensors": rows, "first": first, "mismatches": sum(r["mismatches"] for r in rows)})
    else:
        result = table(f"{program.name} against its integer graph", "tensor", "on", "codes>", "mismatches>")
        for r in rows:
            colour = "red" if r["mismatches"] else "green"
            result.add_row(r["tensor"], r["on"], f"{r['codes']:,}", f"[{colour}]{r['mismatches']}")
        OUT.print(result)
        for where, text in first.items():
            OUT.print(f"[red]{where} differs first at {text}", highlight=False)
    if first:
        raise typer.Exit(1)


def estimate(
    program: Path = PROGRAM_ARGUMENT,
    as_json: bool = JSON_OPTION,
) -> None:
    """Predict cycles and MAC utilization of a program, layer by layer."""
    report(Program.load(program), path=None, seconds=None, as_json=as_json)
