"""What a step of quantization-aware training costs: against the float step of the same network, and against Brevitas.

A step is forward pass, loss, backward pass and optimizer (SGD with momentum), on one batch that stays. All candidates
run in turns, a few steps each, so that whatever else the machine does hits all of them alike; ratios are taken within a
round, and their median and quartiles are printed. Brevitas runs in processes of its own, which wait in between.

::

    python tests/bench/qat_speed.py --network resnet8 --rounds 40
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any, Final, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nibblecore.models.resnet8 import Block, resnet8_digits
from nibblecore.models.resnet18 import ResNet18
from nibblecore.qat import QConfig, bin_regularization, calibrate, parameter_groups, prepare
from nibblecore.qat.recipes import digits

FLOAT: Final = "float"
QAT: Final = "nibblecore"
REGULARIZED: Final = "nibblecore, bin regularization"
BREVITAS: Final = "Brevitas"
BREVITAS_JIT: Final = "Brevitas, JIT"

WARM_UP: Final = 6
"""Steps of each candidate before the first round. Brevitas collects statistics in five of them."""

LIMIT: Final = 1.5
"""What a step may cost, in float steps."""
REGULARIZATION_LIMIT: Final = 1.1
"""What a step with bin regularization may cost, in steps without."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What is measured: a float network, and a batch for it.

    ``burst`` is how many steps of a candidate are timed in a round; one more before them warms its caches.
    """

    title: str
    threads: int
    burst: int
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def _digits_batch() -> tuple[Tensor, Tensor]:
    data = digits.load()
    return torch.from_numpy(data.train_images[:64]), torch.from_numpy(data.train_labels[:64])


def _random_batch(count: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, size, size, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


NETWORKS: Final = {
    # One thread: the demonstration trains on one too, and threads that wait for each other, on a machine that does
    # something else besides, measure that.
    "resnet8": Network("ResNet-8, digits 8x8, batch 64", 1, 3, resnet8_digits, _digits_batch),
    "resnet18": Network("ResNet-18, 64x64, batch 16", 1, 1, ResNet18, lambda: _random_batch(16, 64, 1000)),
}

Step = Callable[[], None]


def step_of(model: nn.Module, groups: Any, batch: tuple[Tensor, Tensor], regularize: bool = False) -> Step:
    """One step of training as a function."""
    x, y = batch
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    model.train()

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        if regularize:
            loss = loss + 0.5 * bin_regularization(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def quantized(float_model: nn.Module, batch: tuple[Tensor, Tensor], *, regularize: bool, **config: Any) -> Step:
    """A step of nibblecore."""
    model = prepare(float_model, QConfig(**config), batch[0][:1])
    calibrate(model, [batch[0]])
    groups = parameter_groups(model, lr=1e-3, step_lr=1e-3, weight_decay=1e-4)
    return step_of(model, groups, batch, regularize)


def folded(float_model: nn.Module) -> nn.Module:
    """The float network without its batch norms: they go into the convolutions, as in a network to deploy."""
    model = copy.deepcopy(float_model).eval()
    for module in list(model.modules()):
        names = list(module._modules)
        for name, following in itertools.pairwise(names):
            conv, norm = module._modules[name], module._modules[following]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module._modules[name] = fuse_conv_bn_eval(conv, norm)
                module._modules[following] = nn.Identity()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    return model


def brevitas_model(float_model: nn.Module) -> nn.Module:
    """The network with Brevitas' layers, at the bits that nibblecore gives it by default.

    Weights of 4 bits (8 at the ends) with a learned scale per channel, activations of 4 bits (8 in front of the sums
    and behind the pool) with a learned scale, batch norms as they are. Layers pass plain tensors, not ``QuantTensor``,
    which is the faster way.
    """
    import brevitas.nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    weights = Int8WeightPerChannelFloat.let(scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS)
    # Scales of activations come from statistics of the first steps, then they are learned.
    signed, unsigned = (
        Int8ActPerTensorFloat.let(collect_stats_steps=5),
        Uint8ActPerTensorFloat.let(collect_stats_steps=5),
    )

    def conv(source: nn.Conv2d, bits: int) -> nn.Module:
        result = qnn.QuantConv2d(
            source.in_channels,
            source.out_channels,
            source.kernel_size,
            source.stride,
            source.padding,
            bias=False,
            weight_quant=weights,
            weight_bit_width=bits,
        )
        result.weight.data.copy_(source.weight.data)
        return cast(nn.Module, result)

    def relu() -> nn.Module:
        return cast(nn.Module, qnn.QuantReLU(bit_width=4, act_quant=unsigned))

    def identity(quantizer: Any = signed) -> nn.Module:
        return cast(nn.Module, qnn.QuantIdentity(bit_width=8, act_quant=quantizer))

    class QuantBlock(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.conv1, self.bn1, self.relu1 = conv(block.conv1, 4), block.bn1, relu()
            self.conv2, self.bn2, self.quant2 = conv(block.conv2, 4), block.bn2, identity()
            self.shortcut: nn.Module = nn.Identity()
            if isinstance(block.shortcut, nn.Sequential):
                first = block.shortcut[0]
                assert isinstance(first, nn.Conv2d)
                self.shortcut = nn.Sequential(conv(first, 4), block.shortcut[1], identity())
            self.relu2 = relu()

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu1(self.bn1(self.conv1(x)))
            y = self.quant2(self.bn2(self.conv2(y)))
            result: Tensor = self.relu2(y + self.shortcut(x))
            return result

    def replace(module: nn.Module) -> nn.Module:
        if isinstance(module, Block):
            return QuantBlock(module)
        if isinstance(module, nn.Conv2d):
            return conv(module, 8)  # the first
        if isinstance(module, nn.ReLU):
            return relu()
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return nn.Sequential(module, identity(unsigned))
        if isinstance(module, nn.Linear):
            linear = qnn.QuantLinear(
                module.in_features, module.out_features, bias=True, weight_quant=weights, weight_bit_width=8
            )
            linear.weight.data.copy_(module.weight.data)
            linear.bias.data.copy_(module.bias.data)
            return cast(nn.Module, linear)
        for name, child in module.named_children():
            module._modules[name] = replace(child)
        return module

    return nn.Sequential(identity(unsigned), replace(copy.deepcopy(float_model)))


def timed(step: Step, count: int) -> list[float]:
    """Seconds of each of ``count`` steps."""
    result = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        result.append(time.perf_counter() - start)
    return result


class Worker:
    """A candidate in a process of its own, which waits while others run. ``note`` is what it says about itself."""

    def __init__(self, network: str, threads: int, env: dict[str, str]) -> None:
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--worker",
            "--network",
            network,
            "--threads",
            str(threads),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | env
        )
        self._in, self._out = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        self.note: str = json.loads(self._line())

    def _line(self) -> str:
        while line := self._out.readline():
            if line.startswith(">"):
                return line[1:]
        raise RuntimeError(f"the process that runs Brevitas ended with {self._process.wait()}; see its output above")

    def run(self, count: int) -> list[float]:
        self._in.write(f"{count}\n")
        self._in.flush()
        result: list[float] = json.loads(self._line())
        return result

    def close(self) -> None:
        self._in.close()
        self._process.wait()


def work(network: Network, threads: int) -> None:
    """The other end of :class:`Worker`: a number of steps comes in, their times go out."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    import brevitas
    from brevitas import config

    model = brevitas_model(network.make())
    step = step_of(model, model.parameters(), network.batch())
    native = bool(getattr(brevitas, "NATIVE_STE_BACKEND_LOADED", False))
    loaded = "with its C++ part" if native else "WITHOUT its C++ part, which did not build (it wants ninja)"
    note = f"BREVITAS_JIT=1, {loaded}" if config.JIT_ENABLED else ""
    print(">" + json.dumps(note), flush=True)
    for line in sys.stdin:
        print(">" + json.dumps(timed(step, int(line))), flush=True)


@dataclasses.dataclass(frozen=True)
class Result:
    """Times of one network: a row for each round, in seconds, by candidate."""

    network: str
    threads: int
    rounds: dict[str, list[float]]
    notes: dict[str, str]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, to: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratios of the rounds."""
        ratios = [a / b for a, b in zip(self.rounds[name], self.rounds[to], strict=True)]
        if len(ratios) < 2:
            return (ratios[0],) * 3
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high


def measure(name: str, *, rounds: int, threads: int | None = None, brevitas: bool = True) -> Result:
    """Run all candidates on a network, in turns."""
    network = NETWORKS[name]
    threads = threads or network.threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, batch = network.make(), network.batch()
    with torch.no_grad():
        for _ in range(10):
            model.train()(batch[0])  # statistics for the batch norms that are folded below
    without = folded(model)
    steps = {
        FLOAT: step_of(copy.deepcopy(model), model.parameters(), batch),
        "float, batch norm folded": step_of(without, without.parameters(), batch),
        QAT: quantized(model, batch, regularize=False),
        REGULARIZED: quantized(model, batch, regularize=True),
        "nibblecore, batch norm unfolded": quantized(model, batch, regularize=False, batch_norm="unfolded"),
    }
    run: dict[str, Callable[[int], list[float]]] = {t: functools.partial(timed, step) for t, step in steps.items()}
    workers = {}
    try:
        if brevitas:
            workers = {
                title: Worker(name, threads, {"BREVITAS_JIT": jit})
                for title, jit in ((BREVITAS, "0"), (BREVITAS_JIT, "1"))
            }
        run |= {title: worker.run for title, worker in workers.items()}
        for candidate in run.values():
            candidate(WARM_UP)
        times: dict[str, list[float]] = {title: [] for title in run}
        order = list(run)
        for _ in range(rounds):
            for title in order:
                times[title].append(statistics.median(run[title](1 + network.burst)[1:]))
            order.append(order.pop(0))
        notes = {title: worker.note for title, worker in workers.items() if worker.note}
        return Result(name, threads, times, notes)
    finally:
        for worker in workers.values():
            worker.close()


def checks(result: Result) -> list[tuple[str, float, float]]:
    """What is promised: text, measured ratio, limit."""
    found = [
        ("nibblecore / float", result.ratio(QAT, FLOAT)[1], LIMIT),
        ("with / without bin regularization", result.ratio(REGULARIZED, QAT)[1], REGULARIZATION_LIMIT),
    ]
    for name in (BREVITAS, BREVITAS_JIT):
        if name in result.rounds:
            found.append((f"nibblecore / {name}", result.ratio(QAT, name)[1], 1.0))
    return found


def report(result: Result, console: Console) -> None:
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    network, rounds = NETWORKS[result.network], len(result.rounds[FLOAT])
    table = Table(
        title=f"{network.title}: {threads}, medians of {rounds} rounds ({network.burst} timed in each)",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("a step of", no_wrap=True)
    for column in ("ms", "/ float", "quartiles", "/ nibblecore", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in result.rounds:
        cells = []
        for to in (FLOAT, QAT):
            low, middle, high = result.ratio(name, to)
            cells += ["1", ""] if name == to else [f"{middle:.2f}", f"{low:.2f}–{high:.2f}"]
        table.add_row(name, f"{1e3 * result.median(name):.2f}", *cells)
    console.print(table)
    for name, note in result.notes.items():
        console.print(f"{name}: {note}", highlight=False)
    for text, ratio, limit in checks(result):
        console.print(f"{text}: {ratio:.2f}, {'within' if ratio <= limit else 'ABOVE'} {limit:g}", highlight=False)
    console.print()


def to_json(results: list[Result]) -> str:
    return json.dumps(
        {
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
            "networks": [
                {
                    "network": r.network,
                    "threads": r.threads,
                    "rounds": len(r.rounds[FLOAT]),
                    "burst": NETWORKS[r.network].burst,
                    "steps": {
                        name: {
                            "median_ms": 1e3 * r.median(name),
                            "per_float": r.ratio(name, FLOAT),
                            "per_nibblecore": r.ratio(name, QAT),
                            "note": r.notes.get(name, ""),
                        }
                        for name in r.rounds
                    },
                    "checks": [{"what": what, "ratio": ratio, "limit": limit} for what, ratio, limit in checks(r)],
                }
                for r in results
            ],
        },
        indent=2,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--network", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=30, help="turns of all candidates (30)")
    parser.add_argument("--threads", type=int, help="of torch (1)")
    parser.add_argument("--no-brevitas", action="store_true", help="compare with the float network only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a ratio is above its limit")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--rounds and --threads must be at least 1")
    if options.worker:
        work(NETWORKS[options.network], options.threads)
        return 0
    if not options.no_brevitas and importlib.util.find_spec("brevitas") is None:
        parser.error("Brevitas is not installed; install: pip install 'nibblecore[bench]', or give --no-brevitas")
    console = Console(stderr=options.json, width=110)
    results = []
    for name in NETWORKS if options.network == "all" else [options.network]:
        result = measure(name, rounds=options.rounds, threads=options.threads, brevitas=not options.no_brevitas)
        report(result, console)
        results.append(result)
    if options.json:
        print(to_json(results))
    failed = options.check and any(ratio > limit for r in results for _, ratio, limit in checks(r))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
