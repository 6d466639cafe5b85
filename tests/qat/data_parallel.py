"""A short training that several processes share, or one does alone: ``torchrun ... data_parallel.py FOLDER``.

Every process writes what it ends with as ``FOLDER/RANK.pt``. In float64, so that what is left of the order of sums is
far below what decides about a code, but for one that is as users have it.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nibblecore import ir
from nibblecore.errors import TrainingError
from nibblecore.qat import (
    Ema,
    IaoOptions,
    LsqOptions,
    OscillationTracker,
    QConfig,
    bin_regularization,
    calibrate,
    convert,
    dampening,
    parameter_groups,
    prepare,
    reestimate_batch_norm,
    synchronize_batch_norm,
)

CASES: dict[str, QConfig] = {
    "lsq": QConfig(),
    "lsq, N of the batch": QConfig(granularity="tensor", options=(LsqOptions(act_count="batch"),)),
    "lsq+": QConfig(method="lsq+", calibration="percentile"),
    "tqt": QConfig(method="tqt", calibration="minmax"),
    "pact": QConfig(method="pact", calibration="mean_range"),
    "dorefa": QConfig(method="dorefa", weight_bits=3),
    "iao": QConfig(method="iao", options=(IaoOptions(decay=0.8),), calibration="mse"),
    "unfolded": QConfig(batch_norm="unfolded"),
    "folded in training": QConfig(batch_norm="folded_train"),
}
SINGLE = "lsq in float32"
CASES[SINGLE] = QConfig(granularity="tensor")
STEPS = 4
BATCH = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.body, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.norm(self.stem(x)))
        logits: torch.Tensor = self.head(F.adaptive_avg_pool2d(x + self.body(x), 2).flatten(1))
        return logits


def train(case: str, rank: int, processes: int) -> dict[str, Any]:
    """What a process ends with: states, integers and losses."""
    torch.manual_seed(0)
    qconfig, dtype = CASES[case], torch.float32 if case == SINGLE else torch.float64
    model = prepare(Net(), qconfig, torch.zeros(1, 1, 6, 6)).to(dtype)
    if qconfig.batch_norm != "folded":
        synchronize_batch_norm(model)
    x, labels = torch.rand(STEPS + 2, BATCH, 1, 6, 6).to(dtype), torch.arange(BATCH) % 3
    share = slice(rank, None, processes)
    calibrate(model, x[:2, share])
    steps = {name: float(q.scale().detach()) for name, q in model._quantizers().items()}
    parallel = DistributedDataParallel(model) if processes > 1 else model
    parallel.train()
    uniform = qconfig.method != "dorefa"
    ema = Ema(model, decay=0.5, ramp=0)
    tracker = OscillationTracker(model, momentum=0.5) if uniform else None
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05, step_lr=0.02), lr=0.05, momentum=0.9)
    losses, gradients = [], {}
    for images in x[:STEPS]:
        optimizer.zero_grad()
        loss = F.cross_entropy(parallel(images[share]), labels[share])
        losses.append(float(loss.detach()))
        if uniform:
            loss = loss + 0.01 * bin_regularization(model) + 0.01 * dampening(model)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        if tracker is not None:
            tracker.step(0.3)
        ema.update(model)
    result: dict[str, Any] = {
        "steps": steps,
        "gradients": gradients,
        "model": model.state_dict(),
        "ema": ema.state_dict()["model"],
        "losses": torch.tensor(losses, dtype=torch.float64),
    }
    if tracker is not None:
        result["tracker"] = tracker.state_dict()
    for name, trained in (("integers", model), ("integers of the average", ema.model)):
        graph = convert(trained)
        result[name] = {
            f"{n.output}.{field}": torch.from_numpy(getattr(n, field).copy())
            for n in graph.nodes
            if isinstance(n, ir.Conv)
            for field in ("weight", "bias", "mult", "shift")
        }
    if qconfig.batch_norm != "folded":
        reestimate_batch_norm(model, x[:2, share])
        result["re-estimated"] = {k: v for k, v in model.state_dict().items() if "running" in k}
    return result


def uneven(rank: int) -> dict[str, Any]:
    """Calibration where only the first process has batches, and where only the second one's are broken."""
    torch.manual_seed(0)
    model, x = prepare(Net(), QConfig(), torch.zeros(1, 1, 6, 6)), torch.rand(BATCH, 1, 6, 6)
    calibrate(model, [] if rank else [x])
    steps = {name: float(q.scale().detach()) for name, q in model._quantizers().items()}
    try:
        calibrate(model, [x, x * math.inf if rank else x])
    except TrainingError as error:
        return {"steps": steps, "error": str(error)}
    return {"steps": steps, "error": ""}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        results = {case: train(case, rank, dist.get_world_size()) for case in CASES}
        results["uneven"] = uneven(rank)
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
