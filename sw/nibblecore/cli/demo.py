"""``demo``: the whole path on one page. Train, compile, run on the golden model and on the simulated hardware."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import typer

from ..arch.config import ArchConfig, get_arch
from ..errors import NibbleError
from ..runtime.device import Device
from ..runtime.program import Program
from .build import compile_timed, load_graph
from .console import ARCH_OPTION, JSON_OPTION, OUT, open_transport, print_json, progress, say, table
from .execute import execute
from .training import train_with_bars


def demo(
    output: Path = typer.Option(Path("build/demo"), "--output", "-o", help="Folder for checkpoint and programs."),
    arch: str = ARCH_OPTION,
    seed: int = typer.Option(1, "--seed", help="Seed of the training."),
    rtl_images: int = typer.Option(16, "--rtl-images", min=1, help="Test images that run on the simulated hardware."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Train a residual network to int4, compile it, and run it bit for bit on the simulated hardware."""
    began = time.monotonic()
    core = get_arch(arch)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "digits.ckpt"
    say("training on handwritten digits: float, then W4A4 with 8-bit ends", quiet=as_json)
    trained = train_with_bars(checkpoint, seed=seed, quiet=as_json)
    graph = load_graph(str(checkpoint), None)
    program, _ = compile_timed(graph, core)
    dumping, _ = compile_timed(graph, core, dump_tensors=True)
    program.save(output / "digits.nib")
    dumping.save(output / "digits-dump.nib")
    values = _compare(graph, program, dumping, core, rtl_images, as_json)
    layer = _layer(core, as_json)
    result = {
        "float_accuracy": trained.float_accuracy,
        "fake_quant_accuracy": trained.fake_quant_accuracy,
        **values,
        "seed": seed,
        "artefacts": str(output),
        "predicted_cycles_per_image": program.predicted_cycles,
        "layer_cycles": layer["cycles"],
        "layer_predicted_cycles": layer["predicted"],
        "layer_mac_utilization": layer["utilization"],
        "layer_mismatches": layer["mismatches"],
        "seconds": round(time.monotonic() - began, 1),
    }
    if as_json:
        print_json(result)
    else:
        _print(result, core)
    if result["mismatches"] or result["tensor_mismatches"] or result["layer_mismatches"]:
        raise NibbleError(
            "golden model and hardware differ.", hint=f"nibblecore diff {checkpoint} names the first tensor."
        )


def _compare(
    graph: Any, program: Program, dumping: Program, core: ArchConfig, count: int, quiet: bool
) -> dict[str, Any]:
    """Accuracy of the integers over the test set; mismatches of outputs and tensors; cycles."""
    from ..ir.interpret import run as interpret
    from ..qat.recipes import digits

    binding = program.inputs[0]
    data = digits.load()
    codes = [binding.quantize(x) for x in data.test_images]
    labels = data.test_labels
    want = interpret(graph, {binding.name: np.stack(codes)}, keep=True)
    name = program.outputs[0].name
    golden = execute(program, "golden", codes, quiet=quiet)
    predictions = np.array([r.real().reshape(-1).argmax() for r in golden])
    mismatches = sum(int((r.outputs[name] != w).sum()) for r, w in zip(golden, want[name], strict=True))
    tensors = 0

    def count_tensors(result: Any, k: int) -> int:
        return sum(int((got != want[t][k]).any()) for t, got in result.tensors.items())

    for k, result in enumerate(execute(dumping, "golden", codes[:count], quiet=quiet)):
        tensors += count_tensors(result, k)
    say(f"preparing the simulation of {core.name} (building it takes a minute the first time)", quiet=quiet)
    cycles = []
    with open_transport("rtl", core) as transport, progress(quiet) as bar:
        device = Device(transport)
        task = bar.add_task("running on rtl", total=2 * count)
        device.load(program)
        for k, x in enumerate(codes[:count]):
            result = device.run(x)
            mismatches += int((result.outputs[name] != golden[k].outputs[name]).sum())
            cycles.append(result.cycles or 0)
            bar.advance(task)
        device.load(dumping)
        for k, x in enumerate(codes[:count]):
            result = device.run(x)
            tensors += count_tensors(result, k)
            bar.advance(task)
        # Only a simulation has them; this one is.
        speed = getattr(transport, "simulated_cycles", 0) / getattr(transport, "simulated_seconds", float("nan"))
    mean = sum(cycles) / len(cycles)
    return {
        "int4_accuracy": float((predictions == labels).mean()),
        "images_golden": len(codes),
        "images_rtl": count,
        "mismatches": mismatches,
        "tensor_mismatches": tensors,
        "cycles_per_image": round(mean),
        "mac_utilization": program.utilization(round(mean)),
        "simulated_cycles_per_second": round(speed),
    }


def _layer(core: ArchConfig, quiet: bool) -> dict[str, Any]:
    """Cycles of one 3x3, 64-to-64, 16x16-pixel layer on RTL, DMA of input and output included."""
    from ..ir.interpret import run as interpret
    from ..ir.random_graph import GraphBuilder

    builder = GraphBuilder(np.random.default_rng(1), (64, 16, 16), bits=4)
    graph = builder.finish(builder.conv(builder.input, 64, weight_bits=4, bits=4), name="layer")
    program, _ = compile_timed(graph, core)
    binding = program.inputs[0]
    codes = np.random.default_rng(1).integers(-8, 8, binding.shape)
    want = interpret(graph, {binding.name: codes[None]})
    say("one 3x3, 64-to-64, 16x16-pixel layer", quiet=quiet)
    result = execute(program, "rtl", [codes], quiet=True)[0]
    cycles = result.cycles or 0
    return {
        "cycles": cycles,
        "predicted": program.predicted_cycles,
        "utilization": program.utilization(cycles),
        "mismatches": sum(int((got != want[name][0]).sum()) for name, got in result.outputs.items()),
    }


def _print(r: dict[str, Any], core: ArchConfig) -> None:
    rows = table(
        f"ResNet-8 on handwritten digits, {core.name} ({core.lanes}x{core.columns} int4 MACs)", "what", "value>"
    )
    for name, key in (("float", "float"), ("int4, fake-quantized", "fake_quant"), ("int4, integers", "int4")):
        rows.add_row(f"accuracy, {name}", f"{r[f'{key}_accuracy']:.2%}")
    rows.add_section()
    rows.add_row("images on golden model / hardware", f"{r['images_golden']} / {r['images_rtl']}")
    for name, key in (("outputs", "mismatches"), ("intermediate tensors", "tensor_mismatches")):
        rows.add_row(f"mismatching {name}", f"[{'red' if r[key] else 'green'}]{r[key]}")
    rows.add_section()
    error = r["predicted_cycles_per_image"] / r["cycles_per_image"] - 1
    rows.add_row("cycles per image, measured", f"{r['cycles_per_image']:,}")
    rows.add_row("cycles per image, predicted", f"{r['predicted_cycles_per_image']:,} ({error:+.1%})")
    rows.add_row("MAC utilization", f"{r['mac_utilization']:.1%}")
    rows.add_section()
    error = r["layer_predicted_cycles"] / r["layer_cycles"] - 1
    rows.add_row("3x3, 64-to-64, 16x16 pixels: cycles", f"{r['layer_cycles']:,}")
    rows.add_row("predicted", f"{r['layer_predicted_cycles']:,} ({error:+.1%})")
    rows.add_row("MAC utilization, DMA included", f"{r['layer_mac_utilization']:.1%}")
    rows.add_section()
    rows.add_row("simulated cycles per second", f"{r['simulated_cycles_per_second']:,}")
    rows.add_row("seed / seconds", f"{r['seed']} / {r['seconds']:.0f}")
    OUT.print(rows)
    OUT.print(f"checkpoint and programs: {r['artefacts']}", highlight=False)
    OUT.print("(Maps of 2x2 pixels cannot fill the array; the single layer shows what it reaches when they do.)")
