"""What a training leaves to look at: CSV files, curves for TensorBoard, histograms."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from ...errors import ToolchainError
from ...files import write_atomically
from ..layers import QuantLayer

LOG: Final = "log.csv"
LAYERS: Final = "layers.csv"
HISTOGRAMS: Final = "histograms.npz"
TENSORBOARD: Final = "tensorboard"
COLUMNS: Final = (
    "phase", "epoch", "loss", "regularization", "accuracy", "lr", "step_min", "step_max", "oscillation", "frozen",
    "seconds",
)  # fmt: skip
LAYER_COLUMNS: Final = (
    "epoch", "layer", "weight_step_min", "weight_step_mean", "weight_step_max", "weight_zeros", "act_step", "act_zeros",
    "oscillation", "frozen",
)  # fmt: skip
POSITION_BINS: Final = 50
LEVEL_BINS: Final = 20
"""Bins of a histogram within one level, and for each level of the grid."""


@dataclasses.dataclass
class Log:
    """The records of a run so far; all of it travels with the checkpoint, so that a resumed run has no gap.

    ``rows`` and ``layers`` are those of the two CSV files. ``histograms`` has ``layer/epoch/levels``: counts of
    ``weight / step`` from half a level below the grid to half a level above, with what is clipped in the end bins, and
    ``layer/low``, the lowest code. Epoch 0 is the state behind the calibration.
    """

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    layers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    histograms: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def write(self, run: Path) -> None:
        """The files, each of them complete or not there."""
        write_atomically(run / LOG, _csv(COLUMNS, self.rows))
        if self.layers:
            write_atomically(run / LAYERS, _csv(LAYER_COLUMNS, self.layers))
        if self.histograms:
            buffer = io.BytesIO()
            arrays: dict[str, Any] = {k: v.numpy() for k, v in self.histograms.items()}
            np.savez_compressed(buffer, **arrays)
            write_atomically(run / HISTOGRAMS, buffer.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "layers": self.layers, "histograms": self.histograms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows, self.layers, self.histograms = state["rows"], state["layers"], state["histograms"]

    @torch.no_grad()
    def add_histograms(self, model: nn.Module, epoch: int) -> None:
        """Where in their bins the weights of 4 bits and fewer are."""
        for name, layer in model.named_modules():
            if not (isinstance(layer, QuantLayer) and layer.weight_quantizer.bits <= 4):
                continue
            quantizer = layer.weight_quantizer
            if not quantizer.uniform:
                continue
            low, high = quantizer.low - 0.5, quantizer.high + 0.5
            u = (layer.weight / quantizer.scale_like(layer.weight)).clamp(low, high).float()
            self.histograms[f"{name}/low"] = torch.tensor(quantizer.low)
            counts = torch.histc(u, LEVEL_BINS * round(high - low), low, high)
            self.histograms[f"{name}/{epoch}/levels"] = counts.to(torch.int64)
            # Clipped weights belong to the ends and say nothing about edges.
            inside = u[(u > quantizer.low) & (u < quantizer.high)]
            position = torch.histc(inside - inside.round(), POSITION_BINS, -0.5, 0.5)
            self.histograms[f"{name}/{epoch}/position"] = position.to(torch.int64)


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


class Curves:
    """The rows of a log as scalars for TensorBoard; a resumed run replaces what it repeats.

    Raises
    ------
    ToolchainError
        The package tensorboard is missing.
    """

    def __init__(self, run: Path, first: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ToolchainError(
                f"Curves for TensorBoard need the package {error.name!r}, which is not installed.",
                hint="Install: pip install 'nibblecore[train]', or train with --no-tensorboard.",
            ) from error
        self.writer = SummaryWriter(str(run / TENSORBOARD), purge_step=first or None)

    def add(self, row: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], step: int) -> None:
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "epoch":
                self.writer.add_scalar(f"{row['phase']}/{key}", value, step)
        for layer in layers:
            for key, value in layer.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{key}/{layer['layer']}", value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
