"""What the results page compares: every method at 4, 3 and 2 bits on one task, with several seeds.

Cells (method, width, seed) are trainings of the package's recipes, changed by :data:`TASK`; all cells of a seed start
from the same float network. A finished cell is a line of the cache, found again by what it depends on: recipe, seed
and the code of the training side.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch

from ... import ir
from ...errors import CompileError, NibbleError
from ...files import write_atomically
from ..convert import convert
from ..recipes import digits
from .recipe import Recipe, build_recipe, load_recipe
from .trainer import Trainer

METHOD_RECIPES: Final[dict[str, tuple[str, str]]] = {
    "ptq": ("digits-ptq", "post-training, least squared error"),
    "lsq": ("digits-lsq", "LSQ"),
    "lsq-channel": ("digits-lsq-channel", "LSQ, a step per channel"),
    "lsq+": ("digits-lsq-plus", "LSQ+"),
    "pact": ("digits-pact", "PACT"),
    "dorefa": ("digits-dorefa", "DoReFa"),
    "tqt": ("digits-tqt", "TQT, power-of-two steps"),
    "iao": ("digits-iao", "IAO, min/max"),
    "fqn": ("digits-fqn", "FQN"),
    "bin-regularization": ("digits-bin-regularization", "LSQ + bin regularization"),
    "bin-regularization-hardware": (
        "digits-bin-regularization-hardware",
        "TQT + bin regularization, hardware-friendly",
    ),
    "dampening": ("digits-dampening", "LSQ + dampening"),
    "freezing": ("digits-freezing", "LSQ + freezing"),
    "ema": ("digits-ema", "LSQ + EMA"),
    "ema-qc": ("digits-ema-qc", "LSQ + EMA + QC"),
}
"""Recipe and title of each method, in the order of the page."""
TASK: Final = (
    "data.name=digits-noisy",
    f"data.noise={digits.NOISE}",
    "data.calibration_augment=true",
    "model.factory=nibblecore.models.resnet8:resnet8_digits_narrow",
    # Ends of few bits have large steps, which learn as fast as weights, as in the papers.
    "qat.step_lr=0.01",
    "stops.sign=false",
)
FLOAT_EPOCHS: Final = 40
QAT_EPOCHS: Final = 20
_EVERYWHERE: Final = ("fqn", "bin-regularization-hardware")
"""Methods whose recipes give operands of sums the bits of everything else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of the table.

    Parameters
    ----------
    method : str
        A key of :data:`METHOD_RECIPES`, or "float".
    bits : int
        0 for the float network.
    seed : int
    key : str
        Digest of what the result depends on.
    recipe : str
        As TOML, resolved when the table begins: files that change meanwhile are the next table's.
    """

    method: str
    bits: int
    seed: int
    key: str
    recipe: str


def code_version() -> str:
    """Digest of the sources that results depend on, 12 hexadecimal digits."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    shown = {"results.py", "results_page.py", "plots.py", "log.py"}
    for folder in ("arch", "frontend", "ir", "models", "qat"):
        for file in sorted([*(package / folder).rglob("*.py"), *(package / folder).rglob("*.cpp")]):
            if file.name not in shown:
                digest.update(f"{file.relative_to(package)}\n".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _cell(method: str, bits: int, seed: int, settings: tuple[str, ...], version: str) -> Cell:
    own = [*TASK, f"float.epochs={FLOAT_EPOCHS}", f"qat.epochs={QAT_EPOCHS}"]
    fixed = [f"seed={seed}"]
    if method != "float":
        fixed += [f"bits={bits}", f"quantization.first_last_bits={bits}"]
        if method in _EVERYWHERE:
            fixed += [f"quantization.residual_bits={bits}", f"quantization.shortcut_bits={bits}"]
        if method == "fqn":
            fixed += [f"quantization.output_bits={bits}"]
    if method in ("float", "ptq"):
        fixed += ["qat.epochs=0"]
    name = METHOD_RECIPES["lsq" if method == "float" else method][0]
    recipe = load_recipe(name, (*own, *settings, *fixed))
    key = hashlib.sha256(f"{version}\n{recipe.identity()}\n{method == 'float'}".encode()).hexdigest()[:24]
    return Cell(method=method, bits=bits, seed=seed, key=key, recipe=recipe.to_toml())


def run_table(
    methods: Sequence[str],
    bits: Sequence[int],
    seeds: int,
    *,
    cache: Path,
    jobs: int = 2,
    settings: tuple[str, ...] = (),
    tick: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Train what the cache does not have.

    Parameters
    ----------
    methods : sequence of str
        Keys of :data:`METHOD_RECIPES`.
    bits : sequence of int
        2, 3, 4 or 8, of weights, activations and ends (the input has at least 4).
    seeds : int
        1, 2, .. are used.
    cache : Path
        JSON lines. Float networks lie beside it.
    jobs : int
        Processes, each of one thread; with 1, everything happens in this one.
    settings : tuple of str
        Changes of every recipe, see :func:`load_recipe`.
    tick : callable, optional
        Called with finished cells, all cells and a text.

    Returns
    -------
    list of dict
        A record for each cell, floats first: method, bits, seed, ``fake`` and ``integer`` accuracy (None where the core
        cannot have the integers), ``oscillation``, CPU ``seconds``, optimizer ``steps``, and ``error`` where the
        training stopped.
    """
    version = code_version()
    floats = [_cell("float", 0, s, settings, version) for s in range(1, seeds + 1)]
    # Seed by seed, so that a table that was ended early is one of fewer seeds.
    cells = [_cell(m, b, s, settings, version) for s in range(1, seeds + 1) for b in bits for m in methods]
    done = _read_cache(cache)
    total, report = len(floats) + len(cells), tick or (lambda *_: None)
    cache.parent.mkdir(parents=True, exist_ok=True)
    folder = cache.parent.resolve()
    by_seed = {c.seed: c.key for c in floats}
    for group in (floats, cells):
        todo = []
        for cell in group:
            missing = cell.method == "float" and not _float_file(folder, cell.key).exists()
            if cell.key not in done or missing:
                todo.append(cell)
        finished = (len(floats) if group is cells else 0) + len(group) - len(todo)
        report(finished, total, "trainings")
        for cell, record in _train_all(todo, folder, by_seed, jobs):
            done[record["key"]] = record
            _append(cache, record)
            finished += 1
            report(finished, total, f"{cell.method}, {cell.bits or 32} bits, seed {cell.seed}")
    return [done[cell.key] for cell in (*floats, *cells)]


def _train_all(
    cells: Sequence[Cell], folder: Path, floats: Mapping[int, str], jobs: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with its record, as they finish."""
    if jobs == 1 or len(cells) < 2:
        for cell in cells:
            yield cell, train_cell(cell, folder, floats[cell.seed])
        return
    # Two processes with all cores each would only wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_the_parent) as pool:
        futures = {pool.submit(train_cell, cell, folder, floats[cell.seed]): cell for cell in cells}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would train to the end of its cell, for nobody."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _float_file(folder: Path, key: str) -> Path:
    return folder / f"results-float-{key}.safetensors"


def train_cell(cell: Cell, folder: Path, float_key: str) -> dict[str, Any]:
    """Train one cell and measure it; runs in a process of its own."""
    torch.set_num_threads(1)
    began = time.process_time()
    record: dict[str, Any] = {"key": cell.key, "method": cell.method, "bits": cell.bits, "seed": cell.seed}
    weights = _float_file(folder, float_key)
    recipe = build_recipe(tomllib.loads(cell.recipe), cell.method, "the table")
    if cell.method != "float":
        section = dataclasses.replace(recipe.float_phase, epochs=0, weights=str(weights))
        recipe = dataclasses.replace(recipe, float_phase=section)
    try:
        outcome = Trainer(recipe).train()
    except NibbleError as error:
        return record | {"error": error.message, "seconds": time.process_time() - began}
    if cell.method == "float":
        tensors = {k: v.contiguous().clone() for k, v in outcome.float_model.state_dict().items()}
        write_atomically(weights, safetensors.torch.save(tensors))
        record |= {"fake": outcome.float_accuracy, "integer": None, "oscillation": None}
    else:
        record |= {"fake": outcome.fake_quant_accuracy, "oscillation": outcome.oscillation}
        try:
            record |= {"integer": _integer_accuracy(outcome.model), "refusal": None}
        except CompileError as error:
            record |= {"integer": None, "refusal": error.violations[0]}
    record["steps"] = _steps(recipe)
    record["seconds"] = time.process_time() - began
    return record


def _steps(recipe: Recipe) -> int:
    epochs = recipe.float_phase.epochs + recipe.qat.epochs + recipe.correction.epochs
    images = len(digits.load().train_labels)
    return epochs * (min(images, recipe.data.limit or images) // recipe.data.batch)


def _integer_accuracy(model: Any) -> float:
    """Of the integers that the core gets, on all test images."""
    graph = convert(model)
    data = digits.load_noisy()
    (source,), (output,) = graph.inputs, graph.outputs
    right = 0
    for begin in range(0, len(data.test_images), 360):
        images, labels = data.test_images[begin : begin + 360], data.test_labels[begin : begin + 360]
        codes = ir.run(graph, {source: ir.quantize(images, graph.tensors[source])})[output]
        real = ir.dequantize(codes, graph.tensors[output]).reshape(len(images), -1)
        right += int((real.argmax(1) == labels).sum())
    return right / len(data.test_labels)


def _read_cache(cache: Path) -> dict[str, dict[str, Any]]:
    done = {}
    if cache.exists():
        for line in cache.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                done[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue  # half a line of a run that was killed; that cell is trained again
    return done


def _append(cache: Path, record: Mapping[str, Any]) -> None:
    """On a line of its own, whatever a killed run has left."""
    ends = not cache.exists() or not cache.stat().st_size or cache.read_bytes().endswith(b"\n")
    with cache.open("a", encoding="utf-8") as file:
        file.write(("" if ends else "\n") + json.dumps(dict(record)) + "\n")
