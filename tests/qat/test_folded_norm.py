"""Batch norm folded with the statistics of batches, its freezing, and biases of 8 bits."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from nibblecore import ir
from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.qat import (
    Ema,
    OscillationTracker,
    Override,
    QConfig,
    QuantModel,
    add_correction,
    bin_regularization,
    calibrate,
    convert,
    fake_quant_disabled,
    freeze_batch_norm,
    load_checkpoint,
    parameter_groups,
    prepare,
    reestimate_batch_norm,
    save_checkpoint,
)
from nibblecore.qat.layers import Grid, QuantLayer

EXAMPLE = torch.zeros(1, 3, 7, 7)
FOLDED = QConfig(batch_norm="folded_train", overrides=(Override(pattern="0", weight_bits=4),))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2, padding=1), nn.BatchNorm2d(5, momentum=0.3), nn.ReLU(), nn.Flatten(),
        nn.Linear(80, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(20):
            model(torch.rand(16, 3, 7, 7))
    return model


def ready(qconfig: QConfig, seed: int = 0) -> tuple[QuantModel, Tensor]:
    model = prepare(network(seed), qconfig, EXAMPLE)
    x = torch.rand(16, 3, 7, 7)
    calibrate(model, [x])
    return model.train(), x


def layer(model: QuantModel, path: str) -> Any:
    module = model.get_submodule(path)
    assert isinstance(module, QuantLayer)
    return module


def step(model: QuantModel, x: Tensor, rate: float = 0.02) -> None:
    for p in model.parameters():
        p.grad = None
    F.cross_entropy(model(x), torch.arange(16) % 4).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(rate * p.grad)


@pytest.mark.parametrize("correction", [False, True])
def test_without_quantization_it_is_batch_norm(correction: bool) -> None:
    """Results, every gradient and running statistics, in float64."""
    model, x = ready(FOLDED)
    reference = network()
    if correction:
        add_correction(model)
        model.requires_grad_(True)
    for path, conv, norm in (("0", reference[0], reference[1]), ("4", reference[4], reference[5])):  # type: ignore[index]
        folded = layer(model, path).double()
        conv, norm = conv.double(), norm.double().train()
        gain, shift = torch.ones(len(conv.weight)).double(), torch.zeros(len(conv.weight)).double()
        if correction:
            with torch.no_grad():
                gain = folded.correction.gamma.uniform_(-2, 2).clone()
                shift = folded.correction.beta.uniform_(-1, 1).clone()
        a = (x if path == "0" else torch.rand(16, 80)).double().requires_grad_()
        b = a.detach().clone().requires_grad_()
        with fake_quant_disabled(model):
            got = folded._folded_with_batch(Grid(a, None))
        shape = (-1, *[1] * (conv.weight.ndim - 2))
        want = norm(conv(b) * gain.reshape(shape) + shift.reshape(shape))
        torch.testing.assert_close(got, want)
        upstream = torch.randn_like(want)
        got.backward(upstream)
        want.backward(upstream)
        pairs = [(a, b), (folded.weight, conv.weight), (folded.norm.weight, norm.weight), (folded.norm.bias, norm.bias)]
        if conv.bias is not None:
            # A bias in front of a batch norm does nothing.
            assert float(folded.bias.grad.abs().max()) < 1e-9
        for mine, theirs in pairs:
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(folded.norm.running_mean, norm.running_mean)
        torch.testing.assert_close(folded.norm.running_var, norm.running_var)
        assert int(folded.norm.num_batches_tracked) == 1


def test_equation_with_batch_statistics() -> None:
    """conv(x, Q(w * gamma / sigma)) + beta + (b - mean) * gamma / sigma, in numpy's float64."""
    model, x = ready(FOLDED)
    conv = layer(model, "0")
    source = model.get_submodule("input")(x)
    weight, gamma, beta, bias = (
        t.detach().double().numpy() for t in (conv.weight, conv.norm.weight, conv.norm.bias, conv.bias)
    )
    view = ir.interpret.windows(source.double().numpy(), kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1), fill=0)
    h = np.einsum("nchwij,ocij->nohw", view, weight) + bias[:, None, None]
    mean, sigma = h.mean((0, 2, 3)), np.sqrt(h.var((0, 2, 3)) + conv.norm.eps)
    folded = weight * (gamma / sigma)[:, None, None, None]
    scale = conv.weight_quantizer.step.detach().double().numpy()[:, None, None, None]
    quantized = np.clip(np.rint(folded / scale), -7, 7) * scale
    want = np.einsum("nchwij,ocij->nohw", view, quantized) + (beta + (bias - mean) * gamma / sigma)[:, None, None]
    got = conv._folded_with_batch(Grid(source, 1 / 255)).detach().double().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_with_frozen_statistics() -> None:
    """The straight-through ones: through w * gamma / sigma, where its code is none at the ends."""
    model, x = ready(FOLDED)
    freeze_batch_norm(model)
    conv = layer(model, "0")
    source = model.get_submodule("input")(x)
    quantizer, conv.output_quantizer = conv.output_quantizer, None
    y = conv(Grid(source, 1 / 255)).x
    conv.output_quantizer = quantizer
    upstream = torch.randn_like(y)
    y.backward(upstream)
    sigma = (conv.norm.running_var + conv.norm.eps).sqrt()
    latent = conv.latent().detach()
    inside = (latent / conv.scale().detach().reshape(-1, 1, 1, 1)).abs() < 7
    at_weight = conv2d_weight(source, conv.weight.shape, upstream, 2, 1) * inside
    direct = (upstream * (conv.bias - conv.norm.running_mean).reshape(-1, 1, 1)).sum((0, 2, 3))
    want = ((at_weight * conv.weight).sum((1, 2, 3)) + direct) / sigma
    torch.testing.assert_close(conv.norm.weight.grad, want.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(conv.norm.bias.grad, upstream.sum((0, 2, 3)), rtol=1e-3, atol=1e-3)
    factor = (conv.norm.weight / sigma).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(conv.weight.grad, (at_weight * factor).detach(), rtol=1e-3, atol=1e-3)


CONFIGS = [
    FOLDED,
    QConfig(batch_norm="folded_train", granularity="tensor", weight_bits=2, act_bits=3, bias_bits=8),
    QConfig(batch_norm="folded_train", method="lsq+", bias_bits=8, first_last_bits=4),
    QConfig(batch_norm="folded_train", method="iao", output_bits=8),
    QConfig(batch_norm="unfolded", bias_bits=8),
]


@pytest.mark.parametrize("qconfig", CONFIGS, ids=lambda q: f"{q.batch_norm}-{q.method}-{q.bias_bits}")
def test_integers_after_training(qconfig: QConfig, compare: Any) -> None:
    model, x = ready(qconfig, 2)
    for index in range(4):
        if index == 2:
            freeze_batch_norm(model)
        step(model, x)
    graph = convert(model.eval())
    compare(model, graph, x)
    for node in graph.nodes:
        if isinstance(node, ir.Conv):
            # A folded norm has its sign in the weights.
            assert (node.mult >= 0).all() or qconfig.batch_norm == "unfolded"
            if qconfig.bias_bits == 8:
                kept = node.weight.any(axis=(1, 2, 3))
                zero = graph.tensors[node.inputs[0]].zero
                bias = np.abs((node.bias + zero * node.weight.sum(axis=(1, 2, 3)))[kept])
                common = int(np.bitwise_or.reduce(bias))
                assert bias.max() // max(1, common & -common) <= 128


def test_frozen_statistics() -> None:
    """Training and evaluation are then the same function, which copies and modes keep."""
    model, x = ready(FOLDED)
    step(model, x)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model(x)
    assert any(not torch.equal(model.state_dict()[k], v) for k, v in before.items())
    freeze_batch_norm(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for version in (model, copy.deepcopy(model), copy.deepcopy(model).eval().train()):
        assert version.training
        y = version(x)
        assert torch.equal(y, copy.deepcopy(version).eval()(x))
        for k, v in version.state_dict().items():
            assert torch.equal(v, before[k]), k
    step(model, x)
    assert not torch.equal(model.state_dict()["0.norm.weight"], before["0.norm.weight"])
    with pytest.raises(ValueError, match=r"^the model has no batch norms; prepare it with batch_norm='unfolded' or "):
        freeze_batch_norm(prepare(network(), QConfig(), EXAMPLE))


def test_state_checkpoints_and_averages(tmp_path: Path) -> None:
    torch.manual_seed(0)
    qconfig = QConfig(batch_norm="folded_train")
    model = prepare(resnet8_digits(), qconfig, torch.zeros(1, 1, 8, 8))
    x = torch.rand(8, 1, 8, 8)
    calibrate(model, [x])
    average = Ema(model, decay=0.5, ramp=0)
    model.train()(x)
    average.update(model)
    model.eval()
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, factory="nibblecore.models.resnet8:resnet8_digits")
    assert torch.equal(load_checkpoint(path)(x), model(x))
    other = prepare(resnet8_digits(), qconfig, torch.zeros(1, 1, 8, 8)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert average.model(x).isfinite().all()


def test_reestimation() -> None:
    model, x = ready(FOLDED)
    conv = layer(model, "0")
    source = model.get_submodule("input")(x)
    h = F.conv2d(source, conv.weight, conv.bias, 2, 1)
    reestimate_batch_norm(model, [x])
    torch.testing.assert_close(conv.norm.running_mean, h.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conv.norm.running_var, h.var((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5)


def test_regularization_and_freezing_see_what_is_quantized() -> None:
    model, _ = ready(FOLDED)
    freeze_batch_norm(model)
    with torch.no_grad():
        conv = layer(model, "4")
        codes = conv.int_weight()
        conv.weight.copy_(conv.from_latent(codes * conv.weight_quantizer.scale_like(conv.weight)))
        for path in ("0", "7"):
            layer(model, path).weight_quantizer.bits = 8  # no part of the term
    assert float(bin_regularization(model).detach()) < 1e-9
    tracker = OscillationTracker(model, momentum=1.0)
    assert set(tracker.layers) == {"4"}
    weight = conv.weight.detach().clone()
    direction = weight.new_zeros(weight.shape)
    direction[0, 0] = 1.0
    for sign in (1, -1, 1):
        with torch.no_grad():
            moved = (codes + sign * direction) * conv.weight_quantizer.scale_like(weight)
            conv.weight.copy_(conv.from_latent(moved.clamp(-1e9, 1e9)))
        tracker.step(threshold=0.5)
    assert tracker.frozen() > 0
    frozen = tracker.state["4"]["frozen"]
    kept = conv.int_weight()[frozen]
    with torch.no_grad():
        conv.norm.weight *= 1.5
        tracker.step(threshold=0.5)
    # Also where the factor of the norm has moved.
    assert torch.equal(conv.int_weight()[frozen], kept)


def test_8_bit_biases_are_what_is_trained() -> None:
    """In every mode the bias that is added is an integer of 8 bits times a power of two, in units of the products."""
    qconfig = QConfig(batch_norm="folded_train", bias_bits=8, granularity="tensor")
    model, x = ready(qconfig)
    conv = layer(model, "0")
    source = model.get_submodule("input")(x)
    with torch.no_grad():
        y = conv._folded_with_batch(Grid(source, 1 / 255))
        conv.bias_bits = None
        free = conv._folded_with_batch(Grid(source, 1 / 255))
        conv.bias_bits = 8
        # The largest bias has 7 bits at least, so that half a unit is less than a 128th of it.
        offset = (y - free)[0, :, 0, 0].abs()
        assert 0 < float(offset.max()) <= float(conv.real_bias().abs().max()) / 64
        _, bias = conv.eval()._parameters_for(1 / 255)
        steps = conv.int_bias(1 / 255)
        # But for the rounding of the multiplier.
        assert (bias / (steps * conv.scale() / 255)).tolist() == pytest.approx([1.0] * 5, rel=1e-4)
    common = int(np.bitwise_or.reduce(steps.abs().long().numpy()))
    assert int(steps.abs().max()) // (common & -common) <= 128


def test_largest_bias_fills_8_bits() -> None:
    conv = layer(ready(QConfig(batch_norm="folded_train", bias_bits=8))[0], "0")
    unit = torch.full((5,), 0.5, dtype=torch.float64)
    for largest, want in ((63.7, 127.0), (63.75, 128.0), (63.8, 128.0), (127.4, 254.0), (-63.7, -127.0), (0.0, 0.0)):
        bias = torch.tensor([largest, 0.26, -0.25, 0.74, 0.0], dtype=torch.float64)
        assert float(conv._bias_codes(bias, unit)[0]) == want
    codes = conv._bias_codes(torch.tensor([63.7, 0.26, -0.25, 0.74, 0.0], dtype=torch.float64), unit)
    assert codes.tolist() == [127.0, 1.0, 0.0, 1.0, 0.0]
    # A channel whose unit is 0 has no bias of its own.
    assert float(conv._bias_codes(torch.ones(5).double(), unit * 0).abs().max()) == 0
    groups = parameter_groups(ready(FOLDED)[0], lr=1.0, step_lr=1.0)
    assert len(groups[1]["params"]) == 2 * 2 + 2
