"""Pictures of a run: curves, steps, oscillations, and where in their bins the weights are."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ...errors import DataError, ToolchainError
from ...files import write_atomically
from .log import HISTOGRAMS, LAYERS, LEVEL_BINS, LOG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST, LAST, EDGE, ZERO = "#9aa5b1", "#1f6f8b", "#c8553d", "#e8e8e8"
DPI: Final = 110
MOST: Final = 24
"""Layers of a picture; of more, evenly spaced ones are drawn."""


def plot_run(run: Path) -> list[Path]:
    """Write ``curves.png``, ``steps.png``, ``oscillation.png`` and ``weights.png`` into a run's folder.

    Pictures for which the run has no numbers (a run without quantized phase has no steps) are left out.

    Raises
    ------
    DataError
        A folder without a log, or with one that cannot be read.
    ToolchainError
        matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ToolchainError(
            f"Plots need the package {error.name!r}, which is not installed.",
            hint="Install: pip install 'nibblecore[train]'",
        ) from error
    rows = _read(run / LOG)
    if not rows:
        raise DataError(f"{run} has no finished epoch to plot.")
    layers = _read(run / LAYERS) if (run / LAYERS).exists() else []
    figures: dict[str, Figure | None] = {
        "curves.png": _curves(rows),
        "steps.png": _steps(layers),
        "oscillation.png": _oscillation(rows, layers),
        "weights.png": _weights(run / HISTOGRAMS) if (run / HISTOGRAMS).exists() else None,
    }
    paths = []
    for name, figure in figures.items():
        if figure is None:
            continue
        buffer = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(buffer, dpi=DPI, format="png")
        write_atomically(run / name, buffer.getvalue())
        paths.append(run / name)
    return paths


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", hint="Name the folder of a training.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no log of a training: {error}.") from error


def _numbers(rows: Sequence[dict[str, str]], key: str) -> npt.NDArray[np.float64]:
    return np.array([float(r[key]) if r.get(key) else math.nan for r in rows])


def _figure(width: float, height: float, rows: int, columns: int, title: str) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, list(axes.flat)


def _count(ax: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(label, fontsize=9)


def _epochs(ax: "Axes", rows: Sequence[dict[str, str]]) -> None:
    """Epochs from the start, with the phases told apart."""
    _count(ax, "epoch")
    begin = 0
    for phase in dict.fromkeys(r["phase"] for r in rows):
        count = sum(r["phase"] == phase for r in rows)
        if begin:
            ax.axvline(begin + 0.5, color=FIRST, linewidth=0.8, linestyle=":")
        ax.text(begin + 0.6, 1.0, phase, transform=ax.get_xaxis_transform(), fontsize=8, color="#555555", va="bottom")
        begin += count


def _curves(rows: Sequence[dict[str, str]]) -> "Figure":
    figure, (loss, accuracy, rate) = _figure(12, 3.6, 1, 3, "training")
    x = np.arange(1, len(rows) + 1)
    loss.plot(x, _numbers(rows, "loss"), color=LAST, marker=".", label="task")
    regularization = _numbers(rows, "regularization")
    if np.nanmax(np.nan_to_num(regularization)) > 0:
        loss.plot(
            x, np.where(regularization > 0, regularization, math.nan), color=EDGE, marker=".", label="regularization"
        )
        loss.legend(fontsize=8, frameon=False)
    loss.set_yscale("log")
    loss.set_ylabel("loss, mean of an epoch", fontsize=9)
    values = 100 * _numbers(rows, "accuracy")
    accuracy.plot(x, values, color=LAST, marker=".")
    accuracy.set_ylabel("test accuracy, %", fontsize=9)
    # The first epochs would flatten everything else.
    accuracy.set_ylim(
        max(0.0, min(float(np.nanquantile(values, 0.2)), float(values[-1])) - 3), min(100.5, float(values.max()) + 1)
    )
    rate.plot(x, _numbers(rows, "lr"), color=LAST, marker=".")
    rate.set_ylabel("learning rate", fontsize=9)
    for ax in (loss, accuracy, rate):
        _epochs(ax, rows)
    return figure


def _spread(names: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    if len(names) <= MOST:
        return names
    return [names[round(k * (len(names) - 1) / (MOST - 1))] for k in range(MOST)]


def _steps(layers: Sequence[dict[str, str]]) -> "Figure | None":
    if not layers:
        return None
    import matplotlib

    figure, (weights, activations) = _figure(12, 4.6, 1, 2, "steps over time, relative to calibration")
    colors = matplotlib.colormaps["turbo"]
    for ax, key, title in (
        (weights, "weight_step_mean", "weights (mean over channels)"),
        (activations, "act_step", "activations"),
    ):
        names = _spread([r["layer"] for r in layers if r.get(key)])
        for k, name in enumerate(names):
            own = [r for r in layers if r["layer"] == name and r.get(key)]
            x, y = _numbers(own, "epoch"), _numbers(own, key)
            color = colors(0.05 + 0.9 * k / max(1, len(names) - 1))
            ax.plot(x, y / y[0], color=color, linewidth=1.3, label=f"{name} ({y[-1]:.3g})")
            if key == "weight_step_mean":
                low, high = _numbers(own, "weight_step_min"), _numbers(own, "weight_step_max")
                if (high > low).any() and len(names) <= 3:
                    ax.fill_between(x, low / y[0], high / y[0], color=color, alpha=0.12, linewidth=0)
        ax.axhline(1, color=FIRST, linewidth=0.8, linestyle=":")
        ax.set_title(title, fontsize=9)
        _count(ax, "epoch of the quantized phase; 0 is behind calibration")
        ax.set_ylabel("step / first step", fontsize=9)
        if names:
            ax.legend(
                fontsize=7,
                frameon=False,
                loc="center left",
                bbox_to_anchor=(1.0, 0.5),
                title="layer (last step)",
                title_fontsize=7,
            )
    return figure


def _oscillation(rows: Sequence[dict[str, str]], layers: Sequence[dict[str, str]]) -> "Figure | None":
    quantized = [r for r in rows if r.get("oscillation")]
    if not quantized:
        return None
    import matplotlib

    figure, (whole, each) = _figure(12, 4.2, 1, 2, "weights that oscillate between two codes")
    x = _numbers(quantized, "epoch")
    whole.plot(x, 100 * _numbers(quantized, "oscillation"), color=LAST, marker=".", label="oscillating")
    frozen = 100 * _numbers(quantized, "frozen")
    if np.nanmax(frozen) > 0:
        whole.plot(x, frozen, color=EDGE, marker=".", label="frozen")
    whole.legend(fontsize=8, frameon=False)
    whole.set_title("all layers of 4 bits and fewer", fontsize=9)
    own = [r for r in layers if r.get("oscillation") and int(r["epoch"])]
    names = _spread([r["layer"] for r in own])
    epochs = sorted({int(r["epoch"]) for r in own})
    values = {(r["layer"], int(r["epoch"])): float(r["oscillation"]) for r in own}
    grid = np.array([[100 * values.get((n, e), math.nan) for e in epochs] for n in names])
    if grid.size:
        colors = matplotlib.colormaps["magma_r"]
        image = each.imshow(
            grid, aspect="auto", cmap=colors, vmin=0, extent=(epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5)
        )
        each.set_yticks(range(len(names)), names, fontsize=7)
        figure.colorbar(image, ax=each, shrink=0.9).set_label("oscillating weights, %", fontsize=8)
    each.set_title("by layer", fontsize=9)
    for ax in (whole, each):
        _count(ax, "epoch of the quantized phase")
    whole.set_ylabel("share of weights, %", fontsize=9)
    whole.set_ylim(bottom=0)
    return figure


def _weights(path: Path) -> "Figure | None":
    """For each layer: weights over levels, first and last; and over all levels, where in the bin they are."""
    try:
        # Opened here, as numpy leaves files open that are broken.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            content: dict[str, Any] = {k: file[k] for k in file}
    except Exception as error:  # numpy and zipfile raise a class of their own for each way in which a file is broken
        raise DataError(f"{path} is broken: {error}.") from error
    names = _spread([k.removesuffix("/low") for k in content if k.endswith("/low")])
    if not names:
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = _figure(4.6 * columns, 0.7 + 2.2 * rows, rows, 2 * columns, "weights in units of their steps")
    for ax in axes[2 * len(names) :]:
        ax.set_visible(False)
    for k, name in enumerate(names):
        levels, position = axes[2 * k], axes[2 * k + 1]
        epochs = sorted(
            int(key.split("/")[-2]) for key in content if key.startswith(f"{name}/") and key.endswith("/levels")
        )
        low = int(content[f"{name}/low"])
        for epoch, color, label in ((epochs[0], FIRST, "calibrated"), (epochs[-1], LAST, f"epoch {epochs[-1]}")):
            counts = content[f"{name}/{epoch}/levels"]
            edges = low - 0.5 + np.arange(len(counts) + 1) / LEVEL_BINS
            _stairs(levels, counts, edges, color, label)
            inside = content[f"{name}/{epoch}/position"]
            _stairs(position, inside, np.linspace(-0.5, 0.5, len(inside) + 1), color, label)
        high = low + len(counts) // LEVEL_BINS - 1
        for code in range(low, high):
            levels.axvline(code + 0.5, color=EDGE, linewidth=0.6, linestyle=":")
        levels.set_xticks(range(low, high + 1) if high - low < 9 else range(low + (low % 2), high + 1, 2))
        levels.set_title(name, fontsize=9, loc="left")
        levels.set_ylabel("share of weights, %", fontsize=7)
        position.set_title("within a bin", fontsize=8)
        position.set_xticks([-0.5, 0, 0.5], ["edge", "level", "edge"])
        for x in (-0.5, 0.5):
            position.axvline(x, color=EDGE, linewidth=1.0, linestyle=":")
        for ax in (levels, position):
            ax.set_ylim(bottom=0)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _stairs(ax: "Axes", counts: npt.NDArray[np.int64], edges: npt.NDArray[np.float64], color: str, label: str) -> None:
    share = 100 * counts / max(1, int(counts.sum()))
    ax.stairs(
        share, edges, color=color, fill=color == FIRST, alpha=0.55 if color == FIRST else 1, label=label, linewidth=1.1
    )
