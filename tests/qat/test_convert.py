"""Export: integers against fake quantization, layer by layer, over random networks; corner cases of the records."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.arch import numerics
from nibblecore.errors import CompileError, TrainingError
from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.qat import Override, QConfig, QuantModel, calibrate, convert, prepare
from nibblecore.qat.layers import round_ratio


class RandomNet(nn.Module):
    """A seeded chain of convolutions, pools, sums and linear layers; every construct of the integer graph occurs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, Any]] = []
        self.channels, self.size = int(self.rng.integers(1, 4)), 12
        self.input_shape = (self.channels, self.size, self.size)
        for _ in range(int(self.rng.integers(3, 7))):
            self.add_block()
        self.add_head()

    def add(self, kind: str, *layers: nn.Module) -> None:
        self.steps.append((kind, [len(self.layers) + i for i in range(len(layers))]))
        self.layers.extend(layers)

    def conv(self, out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        dilation = int(self.rng.integers(1, 3)) if kernel == 3 and stride == 1 else 1
        padding = dilation * (kernel - 1) // 2
        conv = nn.Conv2d(self.channels, out, kernel, stride, padding, dilation, bias=bool(self.rng.integers(2)))
        layers: list[nn.Module] = [conv]
        if self.rng.integers(2):
            bn = nn.BatchNorm2d(out)
            for tensor, low, high in ((bn.weight, -1.5, 1.5), (bn.bias, -0.5, 0.5), (bn.running_mean, -0.5, 0.5),
                                      (bn.running_var, 0.2, 2)):  # fmt: skip
                assert tensor is not None
                tensor.data = torch.from_numpy(self.rng.uniform(low, high, out)).float()
            layers.append(bn)
        return nn.Sequential(*layers)

    def add_block(self) -> None:
        kind = self.rng.choice(["conv", "conv", "residual", "downsample", "max_pool", "avg_pool"])
        out = int(self.rng.integers(2, 9))
        if kind == "conv":
            self.add("conv_relu" if self.rng.integers(3) else "conv", self.conv(out, int(self.rng.choice([1, 3]))))
            self.channels = out
        elif kind == "residual":
            self.add("residual" if self.rng.integers(2) else "residual_relu", self.conv(self.channels))
        elif kind == "downsample" and self.size >= 4:
            first, second = self.conv(out, 3, 2), self.conv(out, 1, 2)
            self.add("downsample", first, second)
            self.channels, self.size = out, (self.size + 1) // 2
        elif kind == "max_pool" and self.size >= 4:
            self.add("pool", nn.MaxPool2d(3, 2, padding=1))
            self.size = (self.size + 1) // 2
        elif kind == "avg_pool" and self.size >= 4:
            self.add("pool", nn.AvgPool2d(2, 2, padding=int(self.rng.integers(2)) * (self.size % 2 == 0)))
            self.size = self.steps and (self.size + 2 * self.layers[-1].padding - 2) // 2 + 1  # type: ignore[operator]

    def add_head(self) -> None:
        if self.rng.integers(2):
            self.add("pool", nn.AdaptiveAvgPool2d(1))
            self.size = 1
        features = self.channels * self.size**2
        self.add("linear", nn.Linear(features, 6))

    def forward(self, x: Tensor) -> Tensor:
        for kind, indices in self.steps:
            modules = [self.layers[i] for i in indices]
            if kind in ("conv", "pool"):
                x = modules[0](x)
            elif kind == "conv_relu":
                x = F.relu(modules[0](x))
            elif kind == "residual":
                x = x + modules[0](x)
            elif kind == "residual_relu":
                x = F.relu(modules[0](x) + x)
            elif kind == "downsample":
                x = F.relu(modules[0](x) + modules[1](x))
            else:
                x = modules[0](x.flatten(1))
        return x


def differing(model: QuantModel, graph: ir.Graph, x: Tensor) -> tuple[int, int, int]:
    """Codes of all 4- and 8-bit tensors that differ between fake quantization and integers; their number; the most."""
    (name,) = graph.inputs
    codes = ir.run(graph, {name: ir.quantize(x.numpy(), graph.tensors[name])}, keep=True)
    with torch.no_grad():
        grids = model._execute(x)
    wrong = total = most = 0
    for path, tensor in graph.tensors.items():
        real = grids[path].x.double().numpy().reshape(-1, *tensor.shape)
        if tensor.bits == 32:
            scale = np.array(tensor.scale)[:, None, None]
            spread = np.abs(real).max() + 1e-9
            assert np.abs(codes[path] * scale - real).max() < 0.05 * spread, path
            continue
        difference = np.abs(np.rint(real / tensor.scale + tensor.zero) - codes[path])
        wrong, total, most = (
            wrong + int((difference > 0).sum()),
            total + difference.size,
            max(most, int(difference.max())),
        )
    return wrong, total, most


def ready(
    net: nn.Module, shape: tuple[int, ...], qconfig: QConfig, seed: int = 0, **arguments: Any
) -> tuple[QuantModel, Tensor]:
    x = torch.rand(16, *shape, generator=torch.Generator().manual_seed(seed))
    model = prepare(net, qconfig, x, **arguments)
    calibrate(model, [x])
    return model.eval(), x


@pytest.mark.parametrize("seed", range(16))
def test_random_networks(seed: int) -> None:
    torch.manual_seed(seed)
    net = RandomNet(seed)
    qconfig = [QConfig(), QConfig(output_bits=8, shortcut_bits=4), QConfig(act_bits=8, residual_bits=4),
               QConfig(weight_bits=8, first_last_bits=4)][seed % 4]  # fmt: skip
    arguments = {"input_range": (-0.3, 1.0)} if seed % 3 == 0 else {}
    model, x = ready(net, net.input_shape, qconfig, seed, **arguments)
    graph = convert(model)
    wrong, total, most = differing(model, graph, x)
    assert wrong <= 2e-4 * total + 1, f"seed {seed}: {wrong} of {total} codes differ"
    assert most <= 2, f"seed {seed}: by up to {most}"


def test_random_networks_contain_everything() -> None:
    kinds = {kind for seed in range(16) for kind, _ in RandomNet(seed).steps}
    assert kinds == {"conv", "conv_relu", "residual", "residual_relu", "downsample", "pool", "linear"}


def test_after_training_too() -> None:
    torch.manual_seed(0)
    model, x = ready(resnet8_digits().train(), (1, 8, 8), QConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(16) % 10).backward()
        optimizer.step()
    wrong, total, _ = differing(model.eval(), convert(model), x)
    assert wrong <= 1e-4 * total, f"{wrong} of {total} codes differ"


def test_graph_of_resnet8() -> None:
    torch.manual_seed(0)
    model, x = ready(resnet8_digits(), (1, 8, 8), QConfig())
    graph = convert(model)
    assert (graph.name, graph.inputs, graph.outputs) == ("ResNet8", ("x",), ("classifier",))
    assert convert(model, "mine").name == "mine"
    assert [(type(n).__name__, n.output, n.inputs) for n in graph.nodes] == [
        ("Conv", "stem.0", ("x",)),
        ("Conv", "stage1.conv1", ("stem.0",)),
        ("Conv", "stage1.conv2", ("stage1.conv1",)),
        ("ResidualAdd", "stage1.add", ("stage1.conv2", "stem.0")),
        ("Conv", "stage2.conv1", ("stage1.add",)),
        ("Conv", "stage2.conv2", ("stage2.conv1",)),
        ("Conv", "stage2.shortcut.0", ("stage1.add",)),
        ("ResidualAdd", "stage2.add", ("stage2.conv2", "stage2.shortcut.0")),
        ("Conv", "stage3.conv1", ("stage2.add",)),
        ("Conv", "stage3.conv2", ("stage3.conv1",)),
        ("Conv", "stage3.shortcut.0", ("stage2.add",)),
        ("ResidualAdd", "stage3.add", ("stage3.conv2", "stage3.shortcut.0")),
        ("AvgPool", "pool", ("stage3.add",)),
        ("Conv", "classifier", ("pool",)),
    ]
    assert graph.tensors["x"] == ir.TensorType((1, 8, 8), 8, 1 / 255, -128)
    stem = graph.nodes[0]
    assert isinstance(stem, ir.Conv)
    assert (stem.weight_bits, stem.low, stem.high) == (8, -8, 7)
    assert bool(numerics.is_weight8(stem.weight).all())
    for node in graph.nodes:
        if isinstance(node, ir.Conv) and node.weight_bits == 4:
            assert np.abs(node.weight).max() <= 7
    logits = ir.dequantize(ir.run(graph, {"x": ir.quantize(x.numpy(), graph.tensors["x"])})["classifier"],
                           graph.tensors["classifier"])  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits[:, :, 0, 0]).float(), model(x), rtol=1e-3, atol=1e-3)


def test_names_and_flattening_of_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 6)

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(self.a(image))
            return torch.flatten(F.max_pool2d(x, 2), 1), self.b(x).flatten(1)

    model, _ = ready(Two(), (1, 8, 8), QConfig())
    graph = convert(model)
    assert graph.inputs == ("image",)
    # 2x3x3 codes need a Flatten; 3x1x1 sums are vectors already.
    assert graph.outputs == ("flatten", "b")
    assert [type(n).__name__ for n in graph.nodes] == ["Conv", "MaxPool", "Flatten", "Conv"]
    assert graph.tensors["b"].bits == 32


def two_layers() -> tuple[nn.Sequential, QConfig]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), QConfig(
        overrides=(Override(pattern="2", act_bits=8),)
    )


def test_channels_without_weights_are_exact_constants() -> None:
    net, qconfig = two_layers()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[1] = 0
            layer.bias[1] = 0.4
    model, x = ready(net, (1, 8, 8), qconfig)
    graph = convert(model)
    assert differing(model, graph, x)[0] == 0
    codes = ir.run(graph, {"input": ir.quantize(x.numpy(), graph.tensors["input"])}, keep=True)
    for path in ("0", "2"):
        y = graph.tensors[path]
        assert isinstance(y.scale, float)
        assert set(codes[path][:, 1].ravel().tolist()) == {math.floor(0.4 / y.scale + 0.5) + y.zero}


def test_channels_whose_scale_vanishes_are_constants() -> None:
    # Weights of 1e-12 and a bias of 0.4: the bias in units of the products would need 42 bits.
    net, qconfig = two_layers()
    with torch.no_grad():
        net[2].weight[1] *= 1e-12
        net[2].bias[1] = 0.4
    model, x = ready(net, (1, 8, 8), qconfig)
    graph = convert(model)
    conv = graph.nodes[-1]
    assert isinstance(conv, ir.Conv)
    assert not conv.weight[1].any()
    assert (conv.mult[1], conv.shift[1]) == (2, 1)
    assert differing(model, graph, x)[0] == 0


def test_a_bias_that_does_not_fit_and_is_no_constant() -> None:
    net, _ = two_layers()
    with torch.no_grad():
        net[2].weight[1] *= 1e-12
        net[2].bias[1] = 0.4
    model, _ = ready(net, (1, 8, 8), QConfig())
    text = (
        r"^2: A bias fits 31 bits in units of the products\. That of channel 1 is \d+\. Give the channel larger "
        r"weights or a smaller bias\.$"
    )
    with pytest.raises(CompileError, match=text):
        convert(model)


def test_negative_and_tiny_steps_convert() -> None:
    net, qconfig = two_layers()
    model, _ = ready(net, (1, 8, 8), qconfig)
    expected = convert(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("step"):
                parameter.neg_()
    graph = convert(model)
    for a, b in zip(expected.nodes, graph.nodes, strict=True):
        assert isinstance(a, ir.Conv)
        assert isinstance(b, ir.Conv)
        assert np.array_equal(a.weight, b.weight)
        assert np.array_equal(a.mult, b.mult)


def test_records_that_do_not_exist() -> None:
    net, qconfig = two_layers()
    model, _ = ready(net, (1, 8, 8), qconfig)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_submodule("2").output_quantizer.step.fill_(1e-7)  # type: ignore[operator, union-attr]
        broken.get_submodule("2").weight_quantizer.step.fill_(4.0)  # type: ignore[operator, union-attr]
        broken.get_submodule("2").weight.fill_(8.0)  # type: ignore[operator]
    with pytest.raises(CompileError) as caught:
        convert(broken)
    assert caught.value.violations[0].startswith(
        "2, channel 0: A requantization factor is below 65536 in magnitude. This one is "
    )
    assert caught.value.violations[0].endswith(
        "Calibrate again: the step of the output is far too small for its values."
    )
    with torch.no_grad():
        model.get_submodule("0").weight[0, 0, 0, 0] = math.nan  # type: ignore[index, operator]
    text = r"^0: Weights, biases and steps are finite\. This layer has others\. Train again with a smaller learning r"
    with pytest.raises(CompileError, match=text):
        convert(model)


def test_sums_whose_factors_do_not_fit() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model, _ = ready(Sum(), (1, 2, 2), QConfig())
    with torch.no_grad():
        model.add.output_quantizer.step.fill_(1e-7)
    text = (
        r"^add: The factors of a sum are below 16384\. These are [\d.e+]+ and [\d.e+]+\. Calibrate again: the step of "
        r"the sum is far too small for its values\.$"
    )
    with pytest.raises(CompileError, match=text):
        convert(model)


def test_errors_before_conversion() -> None:
    net, qconfig = two_layers()
    with pytest.raises(TypeError, match=r"^model must come from nibblecore\.qat\.prepare, not be a Sequential$"):
        convert(net)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"^1 of 1 activation steps are nan"):
        convert(prepare(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), qconfig.__class__(), torch.zeros(1, 1, 4, 4)))
    model, x = ready(net, (1, 8, 8), qconfig)
    model(x)
    with torch.no_grad():
        model.get_submodule("0").output_quantizer.step.fill_(math.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(TrainingError, match=r"^1 of 2 activation steps are nan, the first at 0\.output_quantizer: "):
        convert(model)


def test_rounded_ratios_are_those_of_the_records() -> None:
    rng = np.random.default_rng(0)
    ratios = np.concatenate(
        [2.0 ** rng.uniform(-46, 15.9, 3000), 2.0 ** np.arange(-40.0, 15), [1 - 2**-18, 1 - 2**-20]]
    )
    for ratio, rounded in zip(ratios, round_ratio(torch.from_numpy(ratios)).tolist(), strict=True):
        mult, shift = numerics.quantize_multiplier(float(ratio))
        assert mult * 2.0**-shift == rounded, ratio
