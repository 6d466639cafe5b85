"""Whether every form of a trained network computes the same integers, over whole test sets.

Networks are trained briefly on scikit-learn's digits, float and then with 4 bits, and converted. The integer graph's
interpreter is compared, tensor by tensor and for all 360 test images, with

* the program-level golden model, for networks that the core runs;
* a second evaluation of the graph, in torch: float64 convolutions, int64 requantization;
* the exported ONNX file in ONNX Runtime, from real images to real results, and all its tensors;
* the same in the plain style, and fake quantization: both in float32 with real steps, which moves some codes. By layer,
  every layer reads the integers, so that it is alone responsible for what differs.

::

    python tests/bench/export.py --network resnet8
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.arch.config import get_arch
from nibblecore.cli.compare import compare
from nibblecore.compiler.options import CompileOptions
from nibblecore.compiler.pipeline import compile_graph
from nibblecore.frontend.run_onnx import OnnxLayers, OnnxRun
from nibblecore.frontend.to_onnx import to_onnx
from nibblecore.models.mobilenet_v2 import mobilenet_v2_small
from nibblecore.models.mobilenet_v3 import mobilenet_v3_small_32
from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.models.resnet18 import ResNet18
from nibblecore.qat import QConfig, QuantModel, calibrate, convert, fake_quant_codes, prepare
from nibblecore.qat.recipes import digits
from nibblecore.runtime.device import Device
from nibblecore.runtime.program import Program
from nibblecore.runtime.transport import GoldenTransport

Array = npt.NDArray[Any]

GOLDEN: Final = "golden model"
TORCH: Final = "torch int64"
ONNX: Final = "ONNX"
LOGITS: Final = "ONNX, real to real"
PLAIN: Final = "ONNX plain"
PLAIN_LAYERS: Final = "ONNX plain, by layer"
FAKE: Final = "fake-quant"
FAKE_LAYERS: Final = "fake-quant, by layer"
EQUAL: Final = (GOLDEN, TORCH, ONNX, LOGITS)
"""What must be the same in every bit; the others may be a code off in each layer."""

BLOCK: Final = 40
"""Images whose tensors are held at once."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained, on digits enlarged ``scale`` times with ``channels`` equal channels; ``core`` may run it."""

    factory: Callable[[], nn.Module]
    scale: int
    channels: int
    core: str | None
    float_epochs: int
    qat_epochs: int


NETWORKS: Final = {
    "resnet8": Network(resnet8_digits, 1, 1, "small", 10, 3),
    "resnet18": Network(lambda: ResNet18(10), 4, 3, "large", 2, 1),
    "mobilenet_v2": Network(mobilenet_v2_small, 2, 3, None, 3, 1),
    "mobilenet_v3_small": Network(mobilenet_v3_small_32, 2, 3, None, 3, 1),
}


@dataclasses.dataclass
class Count:
    """How one form of a network compares with the interpreter."""

    values: int = 0
    mismatches: int = 0
    most: float = 0.0
    same_top1: int = 0
    images: int = 0

    @property
    def share(self) -> float:
        return self.mismatches / self.values


@dataclasses.dataclass(frozen=True)
class Result:
    network: str
    layers: int
    accuracy: float
    exactness: dict[str, int]
    counts: dict[str, Count]
    seconds: float

    @property
    def equal(self) -> bool:
        return not any(count.mismatches for kind, count in self.counts.items() if kind in EQUAL)


# Training ----------------------------------------------------------------------------------------------------------


def enlarge(images: Array, network: Network) -> Tensor:
    x = torch.from_numpy(images).repeat(1, network.channels, 1, 1)
    return F.interpolate(x, scale_factor=network.scale, mode="nearest")


def train(network: Network, data: digits.Digits, seed: int, step: Callable[[], None]) -> QuantModel:
    """A short training: what counts here is that weights and activations look like those of a trained network."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the same seed then gives the same network, whatever the number of cores
    x, labels = enlarge(data.train_images, network), torch.from_numpy(data.train_labels)
    model: nn.Module = network.factory().train()

    def epochs(count: int, lr: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for _ in range(count):
            for batch in torch.randperm(len(x)).split(48)[:-1]:
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), labels[batch]).backward()
                optimizer.step()
            step()

    epochs(network.float_epochs, 2e-3)
    model = prepared = prepare(model.eval(), QConfig(), x[:1])
    calibrate(prepared, x[:192].split(48))
    model.train()
    epochs(network.qat_epochs, 2e-4)
    return prepared.eval()


# A second evaluation of the integers -------------------------------------------------------------------------------


def torch_integers(graph: ir.Graph, codes: Array) -> dict[str, Array]:
    """Every tensor of a graph with one input, by torch's operators: exact in float64 below 2**53, shifts in int64."""
    (name,) = graph.inputs
    tensors = {name: torch.from_numpy(codes)}
    for node in graph.nodes:
        operands = [tensors[source] for source in node.inputs]
        zeros = [graph.tensors[source].zero for source in node.inputs]
        tensors[node.output] = _torch_node(node, operands, zeros, graph.tensors[node.output])
    return {name: value.numpy() for name, value in tensors.items()}


def _torch_node(node: ir.Node, operands: list[Tensor], zeros: list[int], y: ir.TensorType) -> Tensor:
    x, zero = operands[0], zeros[0]
    if isinstance(node, ir.Conv):
        total = _torch_conv(node, x, zero) + _column(node.bias)
        if y.bits == 32:
            return total
        return _requantized(node, total * _column(node.mult), _column(node.shift), y)
    if isinstance(node, ir.AvgPool):
        window = F.pad(x, _torch_padding(node.padding), value=zero).unfold(2, node.kernel[0], node.stride[0])
        total = window.unfold(3, node.kernel[1], node.stride[1]).sum((4, 5)) + node.bias
        return _requantized(node, total * node.mult, torch.tensor(node.shift), y)
    if isinstance(node, ir.ResidualAdd):
        total = (x - zero) * node.k_a + (operands[1] - zeros[1]) * node.k_b
        return _requantized(node, total, torch.tensor(node.shift), y)
    if isinstance(node, ir.ChannelMul):
        total = (x - zero) * (operands[1] - zeros[1]) * node.k
        return _requantized(node, total, torch.tensor(node.shift), y)
    if isinstance(node, ir.MaxPool):
        padded = F.pad(x.double(), _torch_padding(node.padding), value=-1e3)
        return F.max_pool2d(padded, node.kernel, node.stride, 0, node.dilation).long()
    if isinstance(node, ir.Lookup):
        return torch.from_numpy(node.table).take(x + 128)
    if isinstance(node, ir.Concat):
        return torch.cat(operands, 1)
    if isinstance(node, ir.Upsample):
        return x.repeat_interleave(node.factor[0], 2).repeat_interleave(node.factor[1], 3)
    assert isinstance(node, ir.Flatten)
    return x.flatten(1)[:, :, None, None]


def _torch_conv(node: ir.Conv, x: Tensor, zero: int) -> Tensor:
    padded = F.pad(x.double(), _torch_padding(node.padding), value=zero)
    weight = torch.from_numpy(node.weight).double()
    return F.conv2d(padded, weight, None, node.stride, 0, node.dilation, node.groups).long()


def _torch_padding(padding: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    top, left, bottom, right = padding
    return left, right, top, bottom


def _column(values: Array) -> Tensor:
    return torch.from_numpy(values)[:, None, None]


def _requantized(node: Any, product: Tensor, shift: Tensor, y: ir.TensorType) -> Tensor:
    """Division by a power of two, rounded half up, zero point and clamp."""
    divisor = torch.ones_like(shift) << shift
    nearest = torch.div(product + divisor // 2, divisor, rounding_mode="floor")
    return (nearest + y.zero).clamp(node.low, node.high)


# Comparison --------------------------------------------------------------------------------------------------------

_device: Device


def _load(program: Program) -> None:
    global _device
    _device = Device(GoldenTransport(program.arch))
    _device.load(program)


def _run(codes: Array) -> dict[str, Array]:
    result = _device.run(codes)
    return {**result.tensors, **result.outputs}


class Bench:
    """One network and everything that is compared with its integers."""

    def __init__(self, name: str, model: QuantModel, images: Tensor, labels: Array, workers: int) -> None:
        self.network, self.name, self.model = NETWORKS[name], name, model
        self.graph = convert(model, name)
        (self.input,) = self.graph.inputs
        (self.output,) = self.graph.outputs
        self.images, self.labels = images.numpy(), labels
        self.onnx, self.plain = OnnxRun(self.graph), OnnxRun(self.graph, style="plain")
        self.plain_layers = OnnxLayers(self.graph, style="plain")
        self.session = onnxruntime.InferenceSession(
            to_onnx(self.graph).data, _quiet(), providers=["CPUExecutionProvider"]
        )
        self.counts = {kind: Count() for kind in (*EQUAL, PLAIN_LAYERS, PLAIN, FAKE_LAYERS, FAKE)}
        self.right = 0
        self.pool: ProcessPoolExecutor | None = None
        if self.network.core is None:
            del self.counts[GOLDEN]
            return
        program = compile_graph(self.graph, get_arch(self.network.core), CompileOptions(dump_tensors=True))
        if workers == 1:
            _load(program)
        else:
            # Products in the golden model are small: threads of numpy's linear algebra would only wait for each other.
            os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _load, (program,))

    def run(self, step: Callable[[int], None]) -> None:
        for start in range(0, len(self.images), BLOCK):
            real = self.images[start : start + BLOCK]
            codes = ir.quantize(real, self.graph.tensors[self.input])
            want = ir.run(self.graph, {self.input: codes}, keep=True)
            scale = np.asarray(self.graph.tensors[self.output].scale).reshape(-1, 1, 1)
            self.right += int((_top1(want[self.output] * scale) == self.labels[start : start + BLOCK]).sum())
            for kind, found in self._forms(real, codes, want):
                self._count(kind, found, want, scale)
            step(len(real))
        if self.pool is not None:
            self.pool.shutdown()

    def _forms(self, real: Array, codes: Array, want: dict[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
        given = {self.input: codes}
        if GOLDEN in self.counts:
            results = list((map if self.pool is None else self.pool.map)(_run, codes))
            yield GOLDEN, {name: np.stack([r[name] for r in results]) for name in results[0]}
        yield TORCH, torch_integers(self.graph, codes)
        yield ONNX, self.onnx.run(given)
        (logits,) = self.session.run(None, {self.input: real})
        yield LOGITS, {self.output: self._sums(logits)}
        yield PLAIN_LAYERS, self.plain_layers.run(want)
        yield PLAIN, self.plain.run(given)
        yield FAKE_LAYERS, fake_quant_codes(self.model, self.graph, want, isolated=True)
        yield FAKE, fake_quant_codes(self.model, self.graph, given)

    def _sums(self, logits: Array) -> Array:
        """Integers of real results: nearest, as float32 holds them to 2**-24 of their value."""
        tensor = self.graph.tensors[self.output]
        scale = np.asarray(tensor.scale).reshape(-1, 1, 1)
        found = logits.reshape(-1, *tensor.shape).astype(np.float64) / scale + tensor.zero
        whole = np.rint(found)
        return np.where(np.abs(found - whole) < 0.01 + 1e-6 * np.abs(found), whole, np.nan)

    def _count(self, kind: str, found: dict[str, Array], want: dict[str, Array], scale: Array) -> None:
        count = self.counts[kind]
        for name, got in found.items():
            if name == self.input:
                continue
            row = compare(self.graph, name, kind, got, want[name], None if kind in EQUAL else 1.0)
            count.values += row.codes
            # What is no number equals nothing.
            count.mismatches += max(row.mismatches, int((got != got).sum()))
            count.most = max(count.most, row.most)
        same = _top1(found[self.output] * scale) == _top1(want[self.output] * scale)
        count.same_top1 += int(same.sum())
        count.images += len(same)


def _quiet() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def _top1(values: Array) -> Array:
    return values.reshape(len(values), -1).argmax(axis=1)


def measure(name: str, *, seed: int, images: int, workers: int, progress: Progress) -> Result:
    """Train, convert, export and compare one network on the first ``images`` test images."""
    began = time.monotonic()
    data, network = digits.load(), NETWORKS[name]
    task = progress.add_task(f"{name}: training", total=network.float_epochs + network.qat_epochs)
    model = train(network, data, seed, lambda: progress.advance(task))
    progress.remove_task(task)
    test = enlarge(data.test_images[:images], network)
    bench = Bench(name, model, test, data.test_labels[:images], workers)
    task = progress.add_task(f"{name}: comparing", total=images)
    bench.run(lambda done: progress.advance(task, done))
    progress.remove_task(task)
    return Result(
        network=name,
        layers=len(bench.graph.nodes),
        accuracy=bench.right / images,
        exactness=dict(Counter(bench.onnx.model.exactness.values())),
        counts=bench.counts,
        seconds=time.monotonic() - began,
    )


def report(result: Result, console: Console) -> None:
    how = ", ".join(f"{count} in {kind}" for kind, count in sorted(result.exactness.items()))
    images = max(count.images for count in result.counts.values())
    title = f"{result.network}: {result.layers} layers ({how} in ONNX), {images} images, accuracy {result.accuracy:.2%}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("integers beside", no_wrap=True)
    for column in ("values", "differ", "share", "most", "top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    for kind, count in result.counts.items():
        colour = "green" if not count.mismatches else "red" if kind in EQUAL else "yellow"
        table.add_row(
            kind,
            f"{count.values:,}",
            f"[{colour}]{count.mismatches:,}",
            f"{count.share:.1e}" if count.mismatches else "0",
            f"{count.most:.3g}",
            f"{count.same_top1}",
        )
    console.print(table)
    console.print(
        f"differ, share, most: codes and by how many; top-1: images of the same class. {result.seconds:.0f} s\n"
    )


def to_json(results: list[Result]) -> str:
    networks = [
        {
            **{key: getattr(r, key) for key in ("network", "layers", "accuracy", "exactness", "equal", "seconds")},
            "compared": {
                kind: {**dataclasses.asdict(count), "share": count.share, "must_be_equal": kind in EQUAL}
                for kind, count in r.counts.items()
            },
        }
        for r in results
    ]
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    return json.dumps({"versions": versions, "networks": networks}, indent=2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--network", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--images", type=int, default=digits.TEST_IMAGES, help="test images (all 360)")
    parser.add_argument("--seed", type=int, default=1, help="of the training (1)")
    parser.add_argument("--workers", type=int, default=2, help="processes that run the golden model (2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    if not 1 <= options.images <= digits.TEST_IMAGES or options.workers < 1:
        parser.error(f"--images must be in 1..{digits.TEST_IMAGES}, and --workers at least 1")
    console = Console(stderr=options.json)
    results = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for name in NETWORKS if options.network == "all" else [options.network]:
            result = measure(name, seed=options.seed, images=options.images, workers=options.workers, progress=progress)
            report(result, console)
            results.append(result)
    if options.json:
        print(to_json(results))
    return int(not all(result.equal for result in results))


if __name__ == "__main__":
    sys.exit(main())
