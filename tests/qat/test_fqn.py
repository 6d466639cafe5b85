"""FQN as a whole, on a detector-like network: backbone, feature pyramid with nearest upsampling, heads per level."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.qat import QuantModel, calibrate, convert, parameter_groups, prepare, presets
from nibblecore.qat.iao import IaoActivations
from nibblecore.qat.layers import QuantLayer


class Block(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__(nn.Conv2d(channels, out, 3, 2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Pyramid(nn.Module):
    """Classes and boxes at three scales."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = Block(3, 6), Block(6, 8), Block(8, 10)
        self.l1, self.l2, self.l3 = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(10, 8, 1)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.towers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.classes = nn.ModuleList(nn.Conv2d(8, 6, 3, padding=1) for _ in range(3))
        self.boxes = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        a = self.c1(x)
        b = self.c2(a)
        p3 = self.l3(self.c3(b))
        p2 = self.l2(b) + self.up(p3)
        p1 = self.l1(a) + F.interpolate(p2, scale_factor=2.0)
        results = []
        for tower, classes, boxes, p in zip(self.towers, self.classes, self.boxes, (p1, p2, p3), strict=True):
            features = torch.relu(tower(p))
            results.append((classes(features), boxes(features)))
        return results


@pytest.fixture(scope="module")
def trained() -> tuple[QuantModel, Tensor, dict[str, Tensor]]:
    """Calibrated with 20 batches, then fine-tuned for a few steps."""
    torch.manual_seed(0)
    net = Pyramid().train()
    with torch.no_grad():
        for _ in range(10):
            net(torch.rand(8, 3, 32, 32))
    preset = presets.fqn()
    model = prepare(net, preset.qconfig, torch.zeros(1, 3, 32, 32))
    loader = [torch.rand(4, 3, 32, 32) for _ in range(25)]
    calibrate(model, loader, preset.training["data"]["calibration_batches"])
    ranges = {n: m.range.clone() for n, m in model.named_modules() if isinstance(m, IaoActivations)}
    x = torch.rand(8, 3, 32, 32)
    optimizer = torch.optim.SGD(parameter_groups(model.train(), lr=0.02, step_lr=0.02), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = torch.stack([part.square().mean() for level in model(x) for part in level]).sum()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    return model.eval(), x, ranges


def test_integers(trained: tuple[QuantModel, Tensor, dict[str, Tensor]], compare: Any) -> None:
    model, x, _ = trained
    compare(model, convert(model), x)


def test_every_tensor_has_4_bits_and_an_integer_zero_point(
    trained: tuple[QuantModel, Tensor, dict[str, Tensor]],
) -> None:
    model, x, _ = trained
    graph = convert(model)
    assert {t.bits for t in graph.tensors.values()} == {4}
    assert {n.weight_bits for n in graph.nodes if isinstance(n, ir.Conv)} == {4}
    # Nothing but integers from the input to what the host decodes.
    kinds = {type(n) for n in graph.nodes}
    assert kinds == {ir.Conv, ir.ResidualAdd, ir.Upsample}
    codes = ir.quantize(x.numpy(), graph.tensors["x"])
    tensors = ir.run(graph, {"x": codes}, keep=True)
    assert len(graph.outputs) == 6
    for name, values in tensors.items():
        assert values.dtype == np.int64
        assert -8 <= values.min() <= values.max() <= 7, name
    # Tensors that can be negative have zero points inside the grid, rectified ones at its lower end.
    for name, tensor in graph.tensors.items():
        rectified = name.startswith(("x", "c1", "c2", "c3", "towers"))
        assert tensor.zero == -8 if rectified else -8 < tensor.zero < 7, name
    # Real zero has a code, so that the ends of ranges are multiples of the step, and padding is exact.
    for path in ("l3", "boxes.0"):
        quantizer: Any = model.get_submodule(path).output_quantizer
        assert float(quantizer(torch.zeros(1))[0]) == 0.0


def test_upsampling_is_a_copy(trained: tuple[QuantModel, Tensor, dict[str, Tensor]]) -> None:
    graph = convert(trained[0])
    ups = [n for n in graph.nodes if isinstance(n, ir.Upsample)]
    assert len(ups) == 2
    for node in ups:
        source, result = graph.tensors[node.inputs[0]], graph.tensors[node.output]
        assert (source.bits, source.scale, source.zero) == (result.bits, result.scale, result.zero)


def test_batch_norm_is_folded_and_weights_have_a_step_per_channel(
    trained: tuple[QuantModel, Tensor, dict[str, Tensor]],
) -> None:
    for _, layer in trained[0].named_modules():
        if isinstance(layer, QuantLayer):
            assert layer.norm is None
            assert layer.bias is not None
            assert len(set(layer.scale().tolist())) > 1


def test_ranges_start_at_quantiles_and_move(trained: tuple[QuantModel, Tensor, dict[str, Tensor]]) -> None:
    model, _, start = trained
    moved = {n: m.range for n, m in model.named_modules() if isinstance(m, IaoActivations)}
    assert any(not torch.equal(moved[n], start[n]) for n in start)
    # 6 steps with a decay of 0.99 are 6 %.
    for name, before in start.items():
        assert float((moved[name] - before).abs().max()) < 0.2 * float(before.abs().max()), name


def test_sums_in_tflites_arithmetic(trained: tuple[QuantModel, Tensor, dict[str, Tensor]]) -> None:
    model, x, _ = trained
    graph = convert(model)
    codes = ir.quantize(x.numpy(), graph.tensors["x"])
    _, differences = ir.compare_requantization(graph, {"x": codes}, ("tflite-double",))
    sums = [d for d in differences if "add" in d.path]
    assert len(sums) == 2
    for row in sums:
        assert row.most_alone <= 1
        assert row.alone < 0.01 * row.codes
