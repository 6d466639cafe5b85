"""``train``, ``recipes``, ``plot`` and ``results``: trainings by recipe, and what came of them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import TaskID

from ..errors import NibbleError
from .console import JSON_OPTION, OUT, print_json, progress, require_output_folder, say, table

if TYPE_CHECKING:
    from ..qat.training import Outcome, Trainer

SET_OPTION = typer.Option(
    None, "--set", "-s", metavar="KEY=VALUE", help="Change a value of the recipe: qat.lr=0.003, bits=3; repeatable."
)


@contextmanager
def _needs_torch(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise NibbleError(
            f"{what} needs the package {error.name!r}, which is not installed.",
            hint="Install: pip install 'nibblecore[train]'",
        ) from None


def train(
    recipe: str = typer.Option("digits", "--recipe", "-r", help="A name that `nibblecore recipes` lists, or a file."),
    output: Path | None = typer.Option(
        None, "--output", "-o", help="Checkpoint to write; default: model.ckpt in the run's folder, or digits.ckpt."
    ),
    run: Path | None = typer.Option(
        None, "--run", help="Folder for logs, curves, plots and checkpoints; default: runs/RECIPE-seedN with --recipe."
    ),
    resume: Path | None = typer.Option(None, "--resume", metavar="RUN", help="Go on with the training in this folder."),
    settings: list[str] | None = SET_OPTION,
    seed: int | None = typer.Option(
        None, "--seed", min=0, help="Seed of the initial weights and of the images' order."
    ),
    float_epochs: int | None = typer.Option(None, "--float-epochs", min=0, help="Epochs of floating-point training."),
    qat_epochs: int | None = typer.Option(None, "--qat-epochs", min=0, help="Epochs of quantized training."),
    tensorboard: bool = typer.Option(True, help="Curves for TensorBoard in the run's folder."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Train a network to int4 by a recipe: float, calibration, quantization-aware.

    Without --recipe: a residual network on handwritten digits (W4A4, 8-bit ends) to digits.ckpt, and nothing else.
    """
    with _needs_torch("training"):
        from ..qat.training import Trainer, load_recipe
        from ..qat.training.trainer import MODEL, STATE

    # As `python -m` does: the user's models and data sets lie in the folder where the command is called.
    sys.path.insert(0, os.getcwd())
    given = list(settings or ())
    given += [f"{key}={value}" for key, value in (("seed", seed), ("float.epochs", float_epochs)) if value is not None]
    given += [f"qat.epochs={qat_epochs}"] if qat_epochs is not None else []
    if resume is not None:
        if given or run is not None or recipe != "digits":
            raise NibbleError(
                "--resume goes on with the recipe as it was, and takes no other recipe, folder or setting.",
                hint="A changed recipe needs a run of its own.",
            )
        trainer = Trainer.resume(resume, tensorboard=tensorboard)
        run = resume
    else:
        default_seed = seed is None and not any(s.startswith(("seed=", "run.seed=")) for s in given)
        chosen = load_recipe(recipe, [*given, "seed=1"] if recipe == "digits" and default_seed else given)
        if run is None and recipe != "digits":
            run = Path("runs") / f"{chosen.name}-seed{chosen.run.seed}"
        if run is not None and (run / STATE).exists():
            raise NibbleError(
                f"{run} already holds a training.", hint=f"Go on with it by --resume {run}, or give another --run."
            )
        trainer = Trainer(chosen, run, tensorboard=tensorboard)
    path = require_output_folder(output or (run / MODEL if run is not None else Path("digits.ckpt")))
    outcome = train_shown(trainer, quiet=as_json)
    if run is None or path != run / MODEL:
        trainer.save(outcome, path)
    if run is not None:
        with _needs_torch("plotting"):
            from ..qat.training.plots import plot_run
        plot_run(run)
    values = {
        "checkpoint": str(path),
        "recipe": trainer.recipe.name if resume is None else str(resume),
        "run": None if run is None else str(run),
        "float_accuracy": outcome.float_accuracy,
        "fake_quant_accuracy": outcome.fake_quant_accuracy,
        "oscillation": outcome.oscillation,
        "seed": trainer.recipe.run.seed,
    }
    if as_json:
        print_json(values)
        return
    rows = table(trainer.recipe.summary or trainer.recipe.name, "what", "test accuracy>")
    rows.add_row("float", f"{outcome.float_accuracy:.2%}")
    rows.add_row(f"int{trainer.recipe.quantization.weight_bits}, fake-quantized", f"{outcome.fake_quant_accuracy:.2%}")
    OUT.print(rows)
    OUT.print(f"checkpoint: {path}", highlight=False)
    if run is not None:
        OUT.print(f"logs and plots: {run}", highlight=False)


def train_shown(trainer: "Trainer", *, quiet: bool) -> "Outcome":
    """Train with a progress bar for each phase."""
    with progress(quiet) as bar:
        tasks: dict[str, TaskID] = {}

        def tick(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        def report(state: Any) -> None:
            text = f"{state.phase} {state.epoch}/{state.epochs}: loss {state.loss:.3f}, {state.accuracy:.1%}"
            bar.update(tasks[state.phase], description=text)
            if not bar.console.is_terminal:
                say(text, quiet=quiet)

        trainer.tick, trainer.report = tick, report
        return trainer.train()


def train_with_bars(path: Path, *, seed: int, quiet: bool) -> Any:
    """:func:`nibblecore.qat.train.train_digits` with a progress bar; writes a checkpoint."""
    with _needs_torch("training"):
        from ..qat.training import Trainer, load_recipe

    trainer = Trainer(load_recipe("digits", (f"seed={seed}",)))
    outcome = train_shown(trainer, quiet=quiet)
    trainer.save(outcome, path)
    return outcome


def recipes(
    keys: bool = typer.Option(False, "--keys", help="List what a recipe can say, with defaults, instead."),
    as_json: bool = JSON_OPTION,
) -> None:
    """List the recipes that come with the package."""
    with _needs_torch("reading a recipe"):
        from ..qat.training.recipe import builtin_recipes, describe_keys

    if keys:
        found = list(describe_keys())
        if as_json:
            print_json({k: {"type": t, "default": d, "meaning": m} for k, t, d, m in found})
            return
        rows = table("keys of recipes", "key", "type", "default", "meaning")
        for row in found:
            rows.add_row(*row)
        OUT.print(rows)
        OUT.print("quantization.*: the fields of nibblecore.qat.QConfig", highlight=False)
        return
    names = builtin_recipes()
    if as_json:
        print_json(names)
        return
    rows = table("recipes", "name", "summary")
    for name, summary in names.items():
        rows.add_row(name, summary)
    OUT.print(rows)


def plot(
    run: Path = typer.Argument(..., help="Folder of a training, as `nibblecore train --run` writes it."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Draw a training: curves, steps, oscillations, and where in their bins the weights are."""
    with _needs_torch("plotting"):
        from ..qat.training.plots import plot_run
    paths = plot_run(run)
    if as_json:
        print_json({"plots": [str(p) for p in paths]})
        return
    for path in paths:
        OUT.print(str(path), highlight=False)


def results(
    output: Path = typer.Option(Path("sw/RESULTS.md"), "--output", "-o", help="Page to write."),
    cache: Path = typer.Option(Path("build/results.jsonl"), "--cache", help="Finished trainings; reused when equal."),
    seeds: int = typer.Option(5, "--seeds", min=2, help="Trainings per method and width."),
    jobs: int = typer.Option(2, "--jobs", "-j", min=1, help="Processes."),
    methods: str = typer.Option("", "--methods", help="Only these methods, separated by commas."),
    bits: str = typer.Option("4,3,2", "--bits", help="Widths, separated by commas."),
    settings: list[str] | None = SET_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Train every method at 4, 3 and 2 bits with several seeds, and write the page that compares them."""
    with _needs_torch("training"):
        from ..qat.training.results import METHOD_RECIPES, run_table
        from ..qat.training.results_page import write_page

    chosen = [m for m in methods.split(",") if m] or list(METHOD_RECIPES)
    if unknown := [m for m in chosen if m not in METHOD_RECIPES]:
        raise NibbleError(f"there is no method {unknown[0]!r}.", hint=f"Methods: {', '.join(METHOD_RECIPES)}.")
    try:
        widths = [int(b) for b in bits.split(",") if b]
    except ValueError:
        raise NibbleError(f"--bits must be numbers such as 4,3,2, not {bits!r}.") from None
    path = require_output_folder(output)
    with progress(as_json) as bar:
        task: list[TaskID] = []

        def tick(done: int, total: int, text: str) -> None:
            if not task:
                task.append(bar.add_task(text, total=total))
            bar.update(task[0], completed=done, description=text)
            if not bar.console.is_terminal:
                say(f"{done}/{total} {text}", quiet=as_json)

        cells = run_table(chosen, widths, seeds, cache=cache, jobs=jobs, settings=tuple(settings or ()), tick=tick)
    write_page(cells, path, seeds=seeds, settings=tuple(settings or ()))
    if as_json:
        print_json({"page": str(path), "cells": cells})
        return
    OUT.print(f"page: {path}", highlight=False, soft_wrap=True)
