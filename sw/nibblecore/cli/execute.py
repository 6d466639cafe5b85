"""``run`` and ``estimate``: execute programs, predict them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer

from ..arch.regs import COUNTER_DOC, Counter
from ..errors import NibbleError
from ..files import write_atomically
from ..runtime.device import Device, Result
from ..runtime.program import Program
from .build import report
from .console import (
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


def load_images(path: Path | None, name: str, shape: tuple[int, int, int], bits: int, seed: int) -> list[Array]:
    """The images of a .npy file, or one of random codes, for the input of that name."""
    if path is None:
        return [np.random.default_rng(seed).integers(-(1 << bits - 1), 1 << bits - 1, shape)]
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise NibbleError(f"{path}: is not a NumPy array file ({error})", hint="Write it with numpy.save.") from None
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != shape:
        raise NibbleError(f"{path}: has shape {array.shape}; the input {name!r} takes {shape} per image")
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
    binding = loaded.inputs[0]
    given = load_images(images, binding.name, binding.shape, binding.bits, random)
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
    if results[-1].counters:
        counters = table("counters of the last image", "counter", "cycles>", "meaning")
        for counter in Counter:
            counters.add_row(counter.name, f"{results[-1].counters[counter]:,}", COUNTER_DOC[counter])
        OUT.print(counters)
    if cycles:
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


def estimate(
    program: Path = PROGRAM_ARGUMENT,
    as_json: bool = JSON_OPTION,
) -> None:
    """Predict cycles and MAC utilization of a program, layer by layer."""
    report(Program.load(program), path=None, seconds=None, as_json=as_json)
