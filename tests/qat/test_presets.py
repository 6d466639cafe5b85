"""Presets: what is in force in each layer, and what their integers keep to."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.arch.config import get_arch
from nibblecore.compiler.pipeline import compile_graph
from nibblecore.qat import (
    IaoOptions,
    QConfig,
    QuantModel,
    calibrate,
    convert,
    freeze_batch_norm,
    parameter_groups,
    prepare,
    presets,
)
from nibblecore.qat.iao import IaoActivations, MinMaxWeights
from nibblecore.qat.layers import QuantLayer
from nibblecore.qat.lsq import LsqActivations, LsqWeights
from nibblecore.qat.lsq_plus import LsqPlusActivations
from nibblecore.qat.methods import ActQuantizer
from nibblecore.qat.tqt import TqtActivations, TqtWeights
from nibblecore.qat.training.recipe import build_recipe
from nibblecore.runtime.device import Device
from nibblecore.runtime.transport import GoldenTransport

EXAMPLE = torch.zeros(1, 2, 8, 8)


class Net(nn.Module):
    """Stem, a block with a convolution on its shortcut, an average of 16 pixels, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.conv1 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.shortcut = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.pool = nn.AvgPool2d(4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.conv2(self.conv1(x)) + self.shortcut(x))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Net().train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(20):
            model(torch.rand(16, 2, 8, 8))
    return model


def trained(preset: presets.Preset, seed: int = 0, steps: int = 4) -> tuple[QuantModel, Tensor]:
    """Half of the steps with the statistics of batches, where the preset has any."""
    model = prepare(network(seed), preset.qconfig, EXAMPLE)
    x = torch.rand(16, 2, 8, 8)
    calibrate(model, [x])
    qat = preset.training["qat"]
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.01, step_lr=min(0.01, qat["step_lr"])), lr=0.01)
    for step in range(steps):
        if step == steps // 2 and "freeze_norm_after" in qat:
            freeze_batch_norm(model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(16) % 5).backward()
        optimizer.step()
    return model.eval(), x


def weight_bits(model: nn.Module) -> dict[str, int]:
    return {n: m.weight_quantizer.bits for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def act_bits(model: QuantModel) -> dict[str, int]:
    found = {n: m.bits for n, m in model.named_modules() if isinstance(m, ActQuantizer)}
    return {n.removesuffix(".output_quantizer"): bits for n, bits in found.items()}


LAYERS = ("stem.0", "conv1.0", "conv2.0", "shortcut.0", "head")


def everywhere(bits: int, ends: int) -> dict[str, int]:
    return {path: ends if path in ("stem.0", "head") else bits for path in LAYERS}


CASES: dict[str, tuple[presets.Preset, dict[str, int], dict[str, int]]] = {
    "lsq": (
        presets.lsq(),
        everywhere(4, 8),
        {"stem.0": 4, "conv1.0": 4, "conv2.0": 8, "shortcut.0": 8, "add": 4, "pool": 8},
    ),
    "lsq3": (
        presets.lsq(3, ends=4),
        everywhere(3, 4),
        {"stem.0": 3, "conv1.0": 3, "conv2.0": 8, "shortcut.0": 8, "add": 3, "pool": 4},
    ),
    "fully_4bit": (
        presets.fully_4bit(),
        everywhere(4, 4),
        {"stem.0": 4, "conv1.0": 4, "conv2.0": 4, "shortcut.0": 4, "add": 4, "pool": 4},
    ),
    "lsq_plus": (
        presets.lsq_plus(),
        everywhere(4, 8),
        {"stem.0": 4, "conv1.0": 4, "conv2.0": 8, "shortcut.0": 8, "add": 4, "pool": 8},
    ),
    "bin_regularization": (
        presets.bin_regularization(2),
        everywhere(2, 8),
        {"stem.0": 2, "conv1.0": 2, "conv2.0": 8, "shortcut.0": 8, "add": 2, "pool": 8},
    ),
    "bin_regularization_hardware": (
        presets.bin_regularization_hardware(),
        everywhere(4, 4),
        {"stem.0": 4, "conv1.0": 4, "conv2.0": 4, "shortcut.0": 4, "add": 4, "pool": 4},
    ),
    "fqn": (
        presets.fqn(),
        everywhere(4, 4),
        {"stem.0": 4, "conv1.0": 4, "conv2.0": 4, "shortcut.0": 4, "add": 4, "pool": 4, "head": 4},
    ),
    "ema_qc": (
        presets.ema_qc(ends=4),
        everywhere(4, 4),
        {"stem.0": 4, "conv1.0": 4, "conv2.0": 8, "shortcut.0": 8, "add": 4, "pool": 4},
    ),
    "tqt": (
        presets.tqt(),
        everywhere(4, 8),
        {"stem.0": 8, "conv1.0": 8, "conv2.0": 8, "shortcut.0": 8, "add": 8, "pool": 8},
    ),
    "iao": (
        presets.iao(),
        everywhere(8, 8),
        {"stem.0": 8, "conv1.0": 8, "conv2.0": 8, "shortcut.0": 8, "add": 8, "pool": 8, "head": 8},
    ),
    "pact": (
        presets.pact(),
        everywhere(4, 8),
        {"stem.0": 4, "conv1.0": 4, "conv2.0": 8, "shortcut.0": 8, "add": 4, "pool": 8},
    ),
    "dorefa": (
        presets.dorefa(),
        everywhere(2, 8),
        {"stem.0": 2, "conv1.0": 2, "conv2.0": 8, "shortcut.0": 8, "add": 2, "pool": 8},
    ),
    "oscillation_dampening": (
        presets.oscillation_dampening(3),
        everywhere(3, 8),
        {"stem.0": 3, "conv1.0": 3, "conv2.0": 8, "shortcut.0": 8, "add": 3, "pool": 8},
    ),
    "oscillation_freezing": (
        presets.oscillation_freezing(),
        everywhere(4, 8),
        {"stem.0": 4, "conv1.0": 4, "conv2.0": 8, "shortcut.0": 8, "add": 4, "pool": 8},
    ),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_settings_in_force_and_integers(name: str, compare: Any) -> None:
    preset, weights, activations = CASES[name]
    model, x = trained(preset)
    assert weight_bits(model) == weights
    assert act_bits(model) == activations
    compare(model, convert(model), x)


def test_every_preset_is_tested_and_is_data() -> None:
    assert {preset.name for preset, *_ in CASES.values()} == set(presets.PRESETS)
    for name, factory in presets.PRESETS.items():
        preset = factory()
        assert preset.name == name
        assert QConfig.from_json(preset.qconfig.to_json()) == preset.qconfig
        for text in (preset.source, *preset.deviations):
            assert text.endswith(".") or text == preset.source
            assert "  " not in text
        assert preset.training["qat"]["epochs"] > 0


def test_every_preset_is_a_recipe() -> None:
    """Its tables are those of recipes, key by key."""
    for factory in presets.PRESETS.values():
        preset = factory()
        table = {k: v for k, v in dataclasses.asdict(preset.qconfig).items() if v not in (None, ()) and k != "options"}
        table["options"] = {o.method: dataclasses.asdict(o) for o in preset.qconfig.options}
        tables = {k: dict(v) for k, v in preset.training.items()}
        data = {"name": "digits", **tables.pop("data", {})}
        recipe = build_recipe(
            {"model": {"factory": "a:b"}, "data": data, "quantization": table, **tables}, preset.name, "a preset"
        )
        assert recipe.quantization == preset.qconfig
        assert recipe.qat.lr == preset.training["qat"]["lr"]
        assert recipe.qat.step_optimizer == preset.training["qat"]["step_optimizer"]


def convolutions(graph: ir.Graph) -> list[ir.Conv]:
    return [n for n in graph.nodes if isinstance(n, ir.Conv)]


def is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] == 0.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hardware_friendly_bin_regularization(bits: int) -> None:
    """Multipliers are powers of two, biases of 8 bits, and no tensor has more than 4 bits."""
    model, _ = trained(presets.bin_regularization_hardware(bits))
    graph = convert(model)
    assert {t.bits for t in graph.tensors.values()} == {4, 32}
    for name, tensor in graph.tensors.items():
        scales = tensor.scale if isinstance(tensor.scale, tuple) else (tensor.scale,)
        assert all(map(is_power_of_two, scales)), name
    for node in convolutions(graph):
        assert node.weight_bits == 4
        assert np.abs(node.weight).max() <= 7
        assert all(is_power_of_two(float(m)) for m in node.mult[node.weight.any(axis=(1, 2, 3))] if m)
        # The zero point of the input is in the bias of the graph; without it, 8 bits times one power of two are left.
        source = graph.tensors[node.inputs[0]]
        bias = node.bias + source.zero * node.weight.sum(axis=(1, 2, 3))
        bias = bias[node.weight.any(axis=(1, 2, 3))]
        common = np.bitwise_or.reduce(np.abs(bias))
        shift = (int(common) & -int(common)).bit_length() - 1
        assert common
        assert (bias >> shift).min() >= -128
        assert (bias >> shift).max() <= 127
        layer: Any = model.get_submodule(node.path)
        assert isinstance(source.scale, float)
        assert np.array_equal(layer.int_bias(source.scale).numpy()[node.weight.any(axis=(1, 2, 3))], bias)
    (add,) = [n for n in graph.nodes if isinstance(n, ir.ResidualAdd)]
    assert is_power_of_two(add.k_a)
    assert is_power_of_two(add.k_b)
    (pool,) = [n for n in graph.nodes if isinstance(n, ir.AvgPool)]
    assert is_power_of_two(pool.mult)


@pytest.mark.parametrize("preset", [presets.fully_4bit(), presets.fqn(), presets.fqn(3)], ids=lambda p: p.name)
def test_nothing_above_4_bits(preset: presets.Preset) -> None:
    model, _ = trained(preset)
    graph = convert(model)
    sums = {"head"} if preset.qconfig.output_bits == 32 else set()
    assert {name for name, t in graph.tensors.items() if t.bits != 4} == sums
    assert all(n.weight_bits == 4 for n in convolutions(graph))


@pytest.mark.parametrize(
    "preset",
    [presets.bin_regularization_hardware(), presets.fqn(), presets.tqt(), presets.lsq_plus(2, ends=4)],
    ids=lambda p: p.name,
)
def test_on_the_core(preset: presets.Preset) -> None:
    model, x = trained(preset)
    graph = convert(model)
    program = compile_graph(graph, get_arch("small"))
    device = Device(GoldenTransport(program.arch))
    device.load(program)
    codes = ir.quantize(x[:2].numpy(), graph.tensors["x"])
    want = ir.run(graph, {"x": codes})
    for index, image in enumerate(codes):
        for name, got in device.run(image).outputs.items():
            assert np.array_equal(got, want[name][index])


def test_fqn() -> None:
    """Folded norms that stay, a step per channel, integer zero points, ranges by quantiles."""
    preset = presets.fqn()
    assert preset.training["data"]["calibration_batches"] == 20
    model, _ = trained(preset)
    for _, module in model.named_modules():
        if isinstance(module, QuantLayer):
            assert module.norm is None
            assert isinstance(module.weight_quantizer, MinMaxWeights)
            assert module.weight_quantizer.per_channel
            assert isinstance(module.output_quantizer, IaoActivations)
            assert module.output_quantizer.options == IaoOptions(quantile=0.999)
            assert module.output_quantizer.calibration == "percentile"
    graph = convert(model)
    assert graph.tensors["head"].zero not in (-8, 0)
    assert graph.tensors["stem.0"].zero == -8


@pytest.mark.parametrize("quantile", [1.0, 0.9])
def test_moving_averages_follow_quantiles(quantile: float) -> None:
    quantizer = IaoActivations(4, False, 100, options=IaoOptions(decay=0.75, quantile=quantile))
    quantizer.set_range(-4.0, 8.0)
    x = torch.arange(-30, 70, dtype=torch.float32)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    quantizer.train()(x.reshape(4, 25))
    ends = (-30.0, 69.0) if quantile == 1 else (-20.0, 59.0)
    assert quantizer.range.tolist() == pytest.approx([-3.0 + ends[0] / 4, 6.0 + ends[1] / 4])


def test_kinds_of_the_others() -> None:
    model = prepare(network(), presets.lsq().qconfig, EXAMPLE)
    layer: Any = model.get_submodule("conv1.0")
    assert isinstance(layer.weight_quantizer, LsqWeights)
    assert layer.weight_quantizer.step.shape == (1,)
    assert layer.norm is not None
    assert not layer.fold
    assert isinstance(layer.output_quantizer, LsqActivations)
    model = prepare(network(), presets.tqt().qconfig, EXAMPLE)
    layer = model.get_submodule("conv1.0")
    assert isinstance(layer.weight_quantizer, TqtWeights)
    assert isinstance(layer.output_quantizer, TqtActivations)
    assert layer.output_quantizer.calibration == "symmetric_entropy"
    assert layer.fold
    latent = layer.latent().detach()
    threshold = min(3 * float(latent.std(correction=0)), float(latent.abs().max()))
    assert layer.weight_quantizer.log2_t.item() == pytest.approx(math.log2(threshold), abs=1e-5)


@pytest.mark.parametrize("configuration", [1, 2, 3, 4])
def test_configurations_of_lsq_plus(configuration: int, compare: Any) -> None:
    model, x = trained(presets.lsq_plus(configuration=configuration))
    compare(model, convert(model), x)
    signed: Any = model.get_submodule("conv2.0").output_quantizer
    rectified: Any = model.get_submodule("stem.0").output_quantizer
    assert isinstance(signed, LsqPlusActivations)
    assert (signed.low >= 0) == (configuration == 1)
    assert signed.affine == (configuration >= 3)
    assert hasattr(signed, "zeta") == (configuration >= 3)
    assert (rectified.low, rectified.high) == (0, 15)


def test_published_settings() -> None:
    for bits, decay in ((4, 1e-4), (3, 5e-5), (2, 2.5e-5)):
        preset = presets.bin_regularization(bits)
        assert preset.training["qat"]["weight_decay"] == decay
        assert (preset.training["qat"]["epochs"], preset.training["qat"]["lr"]) == (90, 0.01)
        assert preset.training["bin_regularization"] == {"weight": 0.5, "schedule": "S2", "grad_to_step": True}
    preset = presets.ema_qc()
    assert preset.training["ema"] == {"decay": 0.9999, "ramp": 2000}
    assert preset.training["correction"] == {"epochs": 1, "lr": 1e-4}
    assert (preset.training["qat"]["step_optimizer"], preset.training["qat"]["step_lr"]) == ("adam", 1e-4)
    preset = presets.tqt()
    assert (preset.training["qat"]["lr"], preset.training["qat"]["step_lr"]) == (1e-6, 1e-2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: presets.lsq(5), r"^bits must be 2, 3, 4 or 8, not 5$"),
        (lambda: presets.fqn(ends=3), r"^ends must be 4 or 8, not 3$"),
        (lambda: presets.lsq_plus(configuration=0), r"^configuration must be 1, 2, 3 or 4, not 0$"),
        (lambda: presets.bin_regularization(schedule="S4"), r"^schedule must be 'S1', 'S2' or 'S3', not 'S4'$"),
        (lambda: presets.dorefa(4), r"^bits must be 2 or 3, not 4$"),
        (
            lambda: IaoOptions(quantile=0.5),
            r"^quantile of IaoOptions must be above 0\.5 and at most 1, not 0\.5$",
        ),
    ],
)
def test_errors(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(("range_", "bits", "step", "zero"), [
    ((0.0, 1.0), 8, 1 / 256, -128), ((0.0, 1.0), 4, 1 / 16, -8), ((-1.0, 1.0), 8, 1 / 128, 0),
    ((-2.0, 2.0), 4, 0.25, 0),
])  # fmt: skip
def test_power_of_two_inputs(range_: tuple[float, float], bits: int, step: float, zero: int) -> None:
    qconfig = dataclasses.replace(presets.tqt().qconfig, first_last_bits=bits)
    model = prepare(network(), qconfig, EXAMPLE, range_)
    source: Any = model.get_submodule("x")
    assert (source.step(), source.zero) == (step, zero)
    low, high = -step * (zero + (1 << bits - 1)), step * ((1 << bits - 1) - 1 - zero)
    x = torch.tensor([10.0, -10.0, 0.0, 3 * step])
    assert source(x).tolist() == [high, low, 0.0, 3 * step]
