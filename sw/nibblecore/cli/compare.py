"""``export`` and ``diff``: a network in other forms, and whether they compute the same."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import typer

from ..arch.config import get_arch
from ..errors import NibbleError
from .build import SOURCE_ARGUMENT, WEIGHTS_OPTION, compile_timed, load_graph, load_quantized
from .console import ARCH_OPTION, JSON_OPTION, OUT, print_json, require_output_folder, say, table, transports
from .execute import INPUT_OPTION, RANDOM_OPTION, execute, load_images

if TYPE_CHECKING:
    from ..ir import Graph

Array = npt.NDArray[Any]

FAKE_QUANT: Final = "fake-quant"
ONNX: Final = "onnx"
ONNX_PLAIN: Final = "onnx-plain"
_TOLERANT: Final = (FAKE_QUANT, ONNX_PLAIN)
_LAYERWISE: Final = (FAKE_QUANT, ONNX, ONNX_PLAIN)


def export(
    source: str = SOURCE_ARGUMENT,
    weights: Path | None = WEIGHTS_OPTION,
    output: Path | None = typer.Option(None, "--output", "-o", help="File to write; default: <source>.onnx."),
    style: str = typer.Option("exact", "--style", help="exact: computes the integers; plain: QDQ with the real steps."),
    codes: bool = typer.Option(False, "--codes", help="Inputs are stored codes (INT8), not real numbers."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Write a trained network as ONNX with 4-bit tensors (QDQ, opset 21)."""
    from ..frontend.to_onnx import OPSET, export_onnx

    if style not in ("exact", "plain"):
        raise NibbleError(f"--style is exact or plain, not {style!r}.")
    default = Path(f"{source.rpartition(':')[2]}.onnx") if ":" in source else Path(source).with_suffix(".onnx")
    path = require_output_folder(output or default)
    graph = load_graph(source, weights)
    # mypy does not narrow str to the literals.
    result = export_onnx(
        graph, path, style="exact" if style == "exact" else "plain", inputs="codes" if codes else "real"
    )
    kinds = ("float32", "float64", "approximate")
    counts = {kind: sum(found == kind for found in result.exactness.values()) for kind in kinds}
    if as_json:
        print_json(
            {
                "file": str(path),
                "name": graph.name,
                "style": style,
                "opset": OPSET,
                "bytes": len(result.data),
                "layers": counts,
                "exactness": result.exactness,
            }
        )
        return
    rows = table(f"{graph.name} as ONNX, opset {OPSET}, {style}", "layers", "how they compute the integers")
    texts = ("exactly, in float32", "exactly, with a float64 multiplication", "within a code")
    for kind, text in zip(kinds, texts, strict=True):
        if counts[kind]:
            rows.add_row(str(counts[kind]), text)
    OUT.print(rows)
    say(f"{path}: {len(result.data):,} bytes")


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of one execution beside the integers.

    Parameters
    ----------
    tensor, on : str
    codes : int
        How many were compared.
    mismatches : int
        How many differ.
    most : float
        The largest difference, in codes.
    failed : bool
        Whether that is too much.
    first : str
        Where the first differing code is, and both values; empty without one.
    """

    tensor: str
    on: str
    codes: int
    mismatches: int
    most: float
    failed: bool
    first: str

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "share": self.mismatches / self.codes}


def compare(graph: "Graph", name: str, on: str, got: Array, want: Array, tolerance: float | None) -> Row:
    """One tensor against the integers; ``tolerance`` in codes, or None for equality.

    Sums of 32 bits have no code to count in. Where a tolerance holds, a code of theirs is what it would be on a grid of
    8 bits over the tensor: 1/127 of the largest magnitude.
    """
    tensor = graph.tensors[name]
    if tensor.bits == 32 and tolerance is not None:
        scale = np.asarray(tensor.scale).reshape(-1, 1, 1)
        difference = np.abs(got - want) * scale
        difference *= 127 / max(np.abs(want * scale).max(), np.finfo(float).tiny)
        differs = difference > 0.5
    else:
        difference = np.abs(got - want)
        differs = difference > 0
    most = float(difference.max())
    first = ""
    if differs.any():
        place = tuple(int(k) for k in np.argwhere(differs)[0])
        first = f"{name}{list(place)}: {got[place]:.6g}, not {want[place]:.6g}"
    failed = bool(differs.any()) if tolerance is None else most > tolerance
    return Row(name, on, got.size, int(differs.sum()), most, failed, first)


def diff(
    source: str = SOURCE_ARGUMENT,
    weights: Path | None = WEIGHTS_OPTION,
    arch: str = ARCH_OPTION,
    images: Path | None = INPUT_OPTION,
    random: int = RANDOM_OPTION,
    on: str = typer.Option(
        "golden,rtl",
        "--on",
        help="What to compare with the integer graph: golden, rtl, onnx (all equal to it), onnx-plain, fake-quant.",
    ),
    isolated: bool = typer.Option(
        False, "--isolated", help="Give every layer the integers as inputs, so that differences do not add up."
    ),
    tolerance: float = typer.Option(
        1.0, "--tolerance", min=0, help="Codes by which onnx-plain and fake-quant may differ; the others may not."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Compare executions of a network with its integer graph, tensor by tensor, and name the first that differs.

    Exit status 1: a code of golden, rtl or onnx differs, or one of onnx-plain or fake-quant by more than the tolerance.
    """
    from ..ir import quantize
    from ..ir.interpret import run as interpret

    kinds = list(dict.fromkeys(kind.strip() for kind in on.split(",")))
    known = [*transports(), *_LAYERWISE]
    for kind in kinds:
        if kind not in known:
            raise NibbleError(f"diff compares {', '.join(known)}, not {kind!r}.", hint="Several go with commas.")
        if isolated and kind not in _LAYERWISE:
            raise NibbleError(
                f"{kind} executes whole programs, so --isolated has no meaning for it.",
                hint=f"Compare {', '.join(_LAYERWISE)} with it: --on {','.join(_LAYERWISE)}",
            )
    model, graph = load_quantized(source, weights)
    if len(graph.inputs) > 1:
        raise NibbleError(f"diff needs a network with one input; this one has {', '.join(graph.inputs)}.")
    (name,) = graph.inputs
    tensor = graph.tensors[name]
    given = load_images(images, name, tensor.shape, tensor.bits, random)
    codes = np.stack([quantize(x[None], tensor)[0] if np.issubdtype(x.dtype, np.floating) else x for x in given])
    want = interpret(graph, {name: codes}, keep=True)
    rows: list[Row] = []
    for kind in kinds:
        for tensor_name, got in _tensors(kind, model, graph, want, arch, isolated, as_json):
            limit = tolerance if kind in _TOLERANT else None
            rows.append(compare(graph, tensor_name, kind, got, want[tensor_name], limit))
    first = {kind: next((r.first for r in rows if r.on == kind and r.mismatches), "") for kind in kinds}
    failed = [kind for kind in kinds if any(r.failed for r in rows if r.on == kind)]
    if as_json:
        print_json(
            {
                "images": len(codes),
                "tensors": [r.to_dict() for r in rows],
                "first": {kind: text for kind, text in first.items() if text},
                "mismatches": sum(r.mismatches for r in rows),
                "failed": failed,
            }
        )
    else:
        compared = {r.tensor for r in rows}
        names = [node.output for node in graph.nodes if node.output in compared]
        _print(f"{graph.name} against its integer graph, {len(codes)} images", names, rows, first, failed)
    if failed:
        raise typer.Exit(1)


def _tensors(
    kind: str, model: Any, graph: "Graph", want: dict[str, Array], arch: str, isolated: bool, quiet: bool
) -> Iterator[tuple[str, Array]]:
    """Every tensor that one execution gives, in the order of the graph."""
    (name,) = graph.inputs
    found: dict[str, Array]
    if kind == FAKE_QUANT:
        from ..qat import fake_quant_codes

        found = fake_quant_codes(model, graph, want, isolated=isolated)
    elif kind in (ONNX, ONNX_PLAIN):
        from ..frontend.run_onnx import OnnxLayers, OnnxRun

        style: Any = "exact" if kind == ONNX else "plain"
        if isolated:
            found = OnnxLayers(graph, style=style).run(want)
        else:
            found = OnnxRun(graph, style=style).run({name: want[name]})
    else:
        program, _ = compile_timed(graph, get_arch(arch), dump_tensors=True)
        results = execute(program, kind, list(want[name]), quiet=quiet)
        stored = [b.name for b in (*program.tensors, *program.outputs)]
        found = {b: np.stack([{**r.tensors, **r.outputs}[b] for r in results]) for b in stored}
    for node in graph.nodes:
        # A program does not store what it has fused or merged away.
        if node.output in found:
            yield node.output, found[node.output]


def _print(title: str, names: list[str], rows: list[Row], first: dict[str, str], failed: list[str]) -> None:
    """A line per tensor, a column per execution: codes that differ, and by how many at most."""
    result = table(title, "tensor", "codes>", *(f"{kind}>" for kind in first))
    found = {(r.tensor, r.on): r for r in rows}
    for name in names:
        cells = []
        for kind in first:
            r = found.get((name, kind))
            if r is None:
                cells.append("[dim]not stored")
                continue
            colour = "red" if r.failed else "yellow" if r.mismatches else "green"
            cells.append(f"[{colour}]{r.mismatches:,}" + (f" (up to {r.most:.3g})" if r.mismatches else ""))
        codes = next(r.codes for r in rows if r.tensor == name)
        result.add_row(name, f"{codes:,}", *cells)
    OUT.print(result)
    for kind, text in first.items():
        if text:
            mine = [r for r in rows if r.on == kind]
            total, wrong = sum(r.codes for r in mine), sum(r.mismatches for r in mine)
            worst = max(mine, key=lambda r: r.most)
            colour = "[red]" if kind in failed else ""
            OUT.print(
                f"{colour}{kind} differs first at {text}; {wrong:,} of {total:,} codes differ ({wrong / total:.2g}), "
                f"by up to {worst.most:.3g} at {worst.tensor}",
                highlight=False,
            )
