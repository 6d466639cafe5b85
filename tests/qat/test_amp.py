"""Automatic mixed precision: codes are found in float32, integers are those of training without it."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.qat import METHODS, QConfig, QuantModel, calibrate, convert, prepare
from nibblecore.qat.iao import IaoActivations
from nibblecore.qat.methods import ActQuantizer


class Everything(nn.Module):
    """A layer, a norm, a function by table, a sum, pools and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm(self.stem(x)))
        x = F.relu(x + self.body(x))
        logits: torch.Tensor = self.head(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 2).flatten(1))
        return logits


@functools.cache
def _ready(method: str, batch_norm: Any) -> tuple[QuantModel, torch.Tensor]:
    torch.manual_seed(0)
    qconfig = QConfig(method=method, batch_norm=batch_norm, weight_bits=3 if method == "dorefa" else 4)
    model = prepare(Everything(), qconfig, torch.zeros(1, 1, 8, 8))
    x = torch.rand(32, 1, 8, 8)
    calibrate(model, [x])
    return model, x


def ready(method: str, batch_norm: str = "folded") -> tuple[QuantModel, torch.Tensor]:
    return copy.deepcopy(_ready(method, batch_norm))


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def quantizer_of(name: str, unsigned: bool, bits: int) -> ActQuantizer:
    quantizer: ActQuantizer = METHODS[name].activations(bits, unsigned, 64)
    with torch.no_grad():
        quantizer.set_range(0.0 if unsigned else -1.3, 3.1)
    if isinstance(quantizer, IaoActivations):
        quantizer.disable_observer()
    return quantizer


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_codes_of_narrow_values_are_those_of_the_same_values_in_float32(name: str, unsigned: bool, bits: int) -> None:
    torch.manual_seed(bits)
    quantizer = quantizer_of(name, unsigned, bits)
    for dtype in (torch.bfloat16, torch.float16):
        x = (2 * torch.randn(5000)).to(dtype)
        narrow, full = x.clone().requires_grad_(), x.float().requires_grad_()
        with autocast():
            got = quantizer(narrow)
        want = quantizer(full)
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))
        upstream = torch.randn(5000).to(dtype)
        got.backward(upstream)
        gradients = {n: p.grad for n, p in quantizer.named_parameters()}
        quantizer.zero_grad(set_to_none=True)
        want.backward(upstream.float())
        assert narrow.grad is not None
        assert full.grad is not None
        assert torch.equal(narrow.grad, full.grad.to(dtype))
        for parameter, gradient in zip(quantizer.parameters(), gradients.values(), strict=True):
            assert gradient is not None
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, parameter.grad)  # type: ignore[arg-type] # it has one
        quantizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("batch_norm", ["folded", "unfolded", "folded_train"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_training(name: str, batch_norm: str) -> None:
    """Losses near those in float32, parameters in float32, and weights quantized to the same codes in both."""
    model, x = ready(name, batch_norm)
    twin, labels = copy.deepcopy(model), torch.arange(32) % 3
    losses = []
    for each, enabled in ((model, True), (twin, False)):
        each.train()
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = each(x)
                loss = F.cross_entropy(logits, labels)
            assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[:3] == pytest.approx(losses[3:], rel=0.03)
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert bool(parameter.isfinite().all())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_same_weights_give_the_same_integers(name: str) -> None:
    model, x = ready(name)
    model.eval()
    plain = convert(model)
    with autocast():
        model(x)
        mixed = convert(model)
        calibrated = copy.deepcopy(model)
        calibrate(calibrated, [x])
    for a, b in zip(plain.nodes, mixed.nodes, strict=True):
        if isinstance(a, ir.Conv) and isinstance(b, ir.Conv):
            for field in ("weight", "bias", "mult", "shift"):
                assert np.array_equal(getattr(a, field), getattr(b, field)), (a.output, field)
    assert plain.tensors == mixed.tensors
    # Calibrated on values of bfloat16, steps are near.
    for path, quantizer in model._quantizers().items():
        step = calibrated.get_submodule(path).scale()  # type: ignore[operator] # a method
        assert float(step.detach()) == pytest.approx(float(quantizer.scale().detach()), rel=0.05), path


def test_predictions_in_bfloat16_are_near_the_integers() -> None:
    model, x = ready("lsq")
    model.eval()
    graph = convert(model)
    integers = ir.run(graph, {"x": ir.quantize(x.numpy(), graph.tensors["x"])})["head"]
    want = torch.from_numpy(ir.dequantize(integers, graph.tensors["head"])).reshape(32, 3).float()
    with torch.no_grad(), autocast():
        got = model(x).float()
    with torch.no_grad():
        exact = model(x)
    torch.testing.assert_close(exact, want, rtol=1e-3, atol=1e-3)
    assert float((got - want).abs().mean()) < 0.05 * float(want.std())


def test_a_gradient_scaler_skips_what_is_not_finite() -> None:
    model, x = ready("lsq")
    labels = torch.arange(32) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)

    def step(factor: float) -> bool:
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(model(x).float(), labels) * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    assert step(1.0)
    assert scaler.get_scale() == 2.0**11
    assert not step(float("inf"))
    assert scaler.get_scale() == 2.0**10
    assert step(1.0)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_models_in_bfloat16(name: str) -> None:
    """Weights stored in bfloat16 are quantized, and converted, to the codes of their values."""
    model, x = ready(name)
    model.bfloat16().eval()
    assert model(x.bfloat16()).dtype == torch.bfloat16
    graph = convert(model)
    for node in graph.nodes:
        if isinstance(node, ir.Conv):
            layer: Any = model.get_submodule(node.output)
            codes = torch.from_numpy(node.weight).reshape(layer.weight.shape)
            assert torch.equal(layer.int_weight(), codes)
            scale = layer.scale().detach().reshape(-1, *[1] * (codes.ndim - 1))
            assert torch.equal(layer.weight_quantizer(layer.weight).detach(), (codes * scale).bfloat16())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_gradient_that_is_not_finite_is_hidden(name: str) -> None:
    """One infinite gradient of an activation inside the grid is seen in the layer's own gradients."""
    model, x = ready(name)
    handle: Any = model.get_submodule("body").register_forward_hook(
        lambda module, inputs, grid: grid._replace(x=_Inf.apply(grid.x))
    )
    F.cross_entropy(model(x), torch.arange(32) % 3).backward()
    handle.remove()
    body: Any = model.get_submodule("body")
    assert not bool(body.weight.grad.isfinite().all())


class _Inf(torch.autograd.Function):
    """A gradient of which one value has overflown."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        grad = grad.clone()
        # A value inside the grid: the smallest magnitude that is not zero.
        where = torch.where(x == 0, torch.inf, x.abs()).flatten().argmin()
        grad.view(-1)[where] = torch.inf
        return grad
