"""``roundings``: a network in the arithmetic of other integer systems."""

import dataclasses
from pathlib import Path

import numpy as np
import typer

from ..errors import NibbleError
from .build import SOURCE_ARGUMENT, WEIGHTS_OPTION, load_graph
from .console import JSON_OPTION, OUT, print_json, table
from .execute import INPUT_OPTION, RANDOM_OPTION, load_images


def roundings(
    source: str = SOURCE_ARGUMENT,
    weights: Path | None = WEIGHTS_OPTION,
    images: Path | None = INPUT_OPTION,
    random: int = RANDOM_OPTION,
    modes: str = typer.Option(
        "all",
        "--modes",
        help="Which: tflite-double (gemmlowp's), tflite-single, tflite-16x8, dyadic, onnx; with commas.",
    ),
    layers: bool = typer.Option(False, "--layers", help="Print every layer, too."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Run a network with the requantization of other systems, and count what differs from the core's.

    "Alone" is each layer on the core's own codes, "together" the network as a whole.
    """
    from ..ir import compare_requantization, quantize
    from ..ir.requantization import MODES, NIBBLECORE, requantization

    chosen = [m for m in MODES if m != NIBBLECORE] if modes == "all" else [m.strip() for m in modes.split(",")]
    for mode in chosen:
        try:
            requantization(mode)
        except ValueError as error:
            raise NibbleError(f"{error}.") from None
    graph = load_graph(source, weights)
    if len(graph.inputs) > 1:
        raise NibbleError(f"roundings needs a network with one input; this one has {', '.join(graph.inputs)}.")
    (name,) = graph.inputs
    tensor = graph.tensors[name]
    given = load_images(images, name, tensor.shape, tensor.bits, random)
    codes = np.stack([quantize(x[None], tensor)[0] if np.issubdtype(x.dtype, np.floating) else x for x in given])
    summaries, differences = compare_requantization(graph, {name: codes}, chosen)
    if as_json:
        print_json(
            {
                "images": len(codes),
                "modes": [
                    {**dataclasses.asdict(s), "classes": None if np.isnan(s.classes) else s.classes} for s in summaries
                ],
                "layers": [dataclasses.asdict(d) for d in differences],
            }
        )
        return
    title = f"{graph.name}, {len(codes)} images: codes unlike the core's"
    result = table(title, "requantization", "alone>", "together>", "outputs>", "classes>")
    for s in summaries:
        classes = "-" if np.isnan(s.classes) else f"{s.classes:.3%}"
        result.add_row(s.mode, f"{s.alone:.4%}", f"{s.together:.4%}", f"{s.outputs:.3%}", classes)
    OUT.print(result)
    if layers:
        result = table("by layer", "layer", "requantization", "codes>", "alone>", "together>", "most>")
        for d in sorted(differences, key=lambda d: [n.path for n in graph.nodes].index(d.path)):
            shares = (f"{count / d.codes:.4%}" for count in (d.alone, d.together))
            result.add_row(d.path, d.mode, f"{d.codes:,}", *shares, str(d.most_together))
        OUT.print(result)
