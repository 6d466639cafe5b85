"""Compiled quantizers against the tensor operations that they replace, and how they are built and refused."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from nibblecore.errors import ToolchainError
from nibblecore.qat import QConfig, QuantModel, bin_regularization, calibrate, kernels, prepare
from nibblecore.qat.layers import QuantLayer
from nibblecore.qat.lsq import Lsq, LsqActivations, LsqWeights


def both(v: Tensor, step: Tensor, low: int, high: int, kind: str, stored: bool = True) -> list[tuple[Tensor, ...]]:
    """Result and gradients with the kernels and without."""
    found: list[tuple[Tensor, ...]] = []
    upstream = torch.randn(v.shape, generator=torch.Generator().manual_seed(7))
    for compiled in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setattr(kernels, "library", lambda: None)
            a, s = v.clone().requires_grad_(), step.clone().requires_grad_()
            result = Lsq.apply(a, s, low, high, 0.3, kind, stored)
            result.backward(upstream)
            assert a.grad is not None
            assert s.grad is not None
            found.append((result.detach(), a.grad, s.grad))
    return found


# Rows shorter than a vector, than a block, and of several blocks; sizes that divide nothing.
@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 3, 3), (300, 7), (3, 20011), (2, 8192), (70001,)])
@pytest.mark.parametrize("threads", [1, 3])
def test_shapes(shape: tuple[int, ...], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        v = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        steps = torch.linspace(0.1, 0.4, shape[0] if len(shape) > 1 else 1)
        steps[0] *= -1  # stored steps may be negative
        assert kernels.usable(v, steps.abs().reshape(-1, *[1] * (v.ndim - 1)))
        fast, slow = both(v, steps, -7, 7, "half_even")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])
    torch.testing.assert_close(fast[2], slow[2], rtol=1e-4, atol=1e-5)
    assert fast[2].shape == steps.shape


def test_threads_do_not_change_sums() -> None:
    # More values than are worth a second thread.
    v, step = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)), torch.tensor(0.2)
    grad = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(kernels.lsq_backward(grad, v, step, 0, 15, "half_up", 0.5))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_sums_are_more_exact_than_float32() -> None:
    v, step = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)), torch.tensor(0.2)
    exact = both(v.double(), step.double(), 0, 15, "half_up")[1][2]
    fast = both(v, step, 0, 15, "half_up")[0][2]
    assert float(fast) == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("path", ["0", "2", "4"])
def test_parameters_of_layers(path: str, granularity: Literal["channel", "tensor"]) -> None:
    # 8-bit weights, 4-bit weights, and a last layer that is not requantized; one has no bias.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 40, 3), nn.ReLU(), nn.Conv2d(40, 7, 3, bias=False), nn.ReLU(), nn.Conv2d(7, 9, 1))
    model = prepare(net, QConfig(granularity=granularity), torch.zeros(1, 2, 8, 8))
    calibrate(model, [torch.rand(8, 2, 8, 8)])
    layer = model.get_submodule(path)
    assert isinstance(layer, QuantLayer)
    with torch.no_grad():
        layer.weight_quantizer.step[0] *= -0.7  # type: ignore[index, operator]
        if layer.bias is not None:
            layer.bias.normal_()
    generator, found = torch.Generator().manual_seed(1), []
    upstream = torch.randn(layer.weight.shape, generator=generator), torch.randn(len(layer.weight), generator=generator)
    for compiled in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setattr(kernels, "library", lambda: None)
            layer.zero_grad()
            weight, bias = layer._parameters_for(torch.tensor(0.0217))
            assert ("LsqParameters" in str(weight.grad_fn)) == compiled
            loss = (weight * upstream[0]).sum()
            (loss if bias is None else loss + (bias * upstream[1]).sum()).backward()
            found.append((weight.detach(), bias, [p.grad for p in layer.parameters()]))
    (weight, bias, grads), (slow_weight, slow_bias, slow_grads) = found
    assert torch.equal(weight, slow_weight)
    assert (bias is None) == (slow_bias is None) == (layer.bias is None)
    assert bias is None or slow_bias is None or torch.equal(bias, slow_bias)
    for grad, slow in zip(grads, slow_grads, strict=True):
        torch.testing.assert_close(grad, slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("grad_to_step", [True, False])
def test_bin_regularization(bits: int, granularity: Literal["channel", "tensor"], grad_to_step: bool) -> None:
    torch.manual_seed(bits)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 50, 3), nn.ReLU(), nn.Conv2d(50, 2, 3))
    qconfig = QConfig(weight_bits=bits, granularity=granularity, weight_range="full")
    model = prepare(net, qconfig, torch.zeros(1, 1, 8, 8))
    layer = model.get_submodule("2")
    assert isinstance(layer, QuantLayer)
    with torch.no_grad():
        layer.weight_quantizer.step.mul_(-0.6)  # type: ignore[operator]  # some weights are clipped
    found = []
    for compiled in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setattr(kernels, "library", lambda: None)
            model.zero_grad()
            loss = bin_regularization(model, grad_to_step=grad_to_step)
            (0.5 * loss).backward()
            found.append((loss.detach(), [p.grad for p in layer.parameters()]))
    (loss, grads), (slow_loss, slow_grads) = found
    torch.testing.assert_close(loss, slow_loss, rtol=1e-5, atol=0)
    assert sum(grad is not None for grad in grads) == 1 + grad_to_step
    for grad, slow in zip(grads, slow_grads, strict=True):
        torch.testing.assert_close(grad, slow, rtol=1e-4, atol=1e-7)


def _network() -> tuple[QuantModel, QuantLayer, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 50, 3), nn.ReLU(), nn.Conv2d(50, 2, 3))
    model, x = prepare(net, QConfig(), torch.zeros(1, 1, 8, 8)), torch.rand(8, 1, 8, 8)
    calibrate(model, [x])
    layer = model.get_submodule("2")
    assert isinstance(layer, QuantLayer)
    return model, layer, x


@pytest.mark.parametrize("grad_to_step", [True, False])
def test_bin_regularization_on_the_way(grad_to_step: bool) -> None:
    # From the second step on, the forward pass of the layers computes loss and gradients.
    model, layer, x = _network()
    found = []
    for step in range(4):
        on_the_way = step in (1, 2)
        if step == 3:  # the same step once more, in kernels of their own: as if the weights had changed in between
            layer.weight_quantizer._binned = None  # type: ignore[assignment]
        model.zero_grad()
        task = model(x).square().mean()
        regularization = bin_regularization(model, grad_to_step=grad_to_step)
        assert ("LsqParameters" in str(regularization.grad_fn.next_functions[0][0].next_functions)) == on_the_way  # type: ignore[union-attr]
        (task + 0.5 * regularization).backward()
        found.append((regularization.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert all(torch.equal(found[0][0], loss) for loss, _ in found)
    for _, grads in found[1:]:
        for grad, first in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(grad, first, rtol=1e-5, atol=1e-7)


def test_a_loss_belongs_to_its_weights() -> None:
    model, layer, x = _network()
    quantizer = layer.weight_quantizer
    bin_regularization(model)
    assert quantizer.pending_loss(layer.weight, True) is None
    model(x)
    assert quantizer.pending_loss(layer.weight, False) is None  # it moves steps
    model(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert quantizer.pending_loss(layer.weight, False) is None  # these were others
    model(x)
    assert quantizer.pending_loss(layer.weight, False) is not None
    assert quantizer.pending_loss(layer.weight, False) is None  # once
    model(x)
    double = copy.deepcopy(model)
    assert quantizer.pending_loss(layer.weight, False) is not None
    other = double.get_submodule("2")
    assert isinstance(other, QuantLayer)
    assert other.weight_quantizer.pending_loss(other.weight, False) is None
    model(x)
    with torch.no_grad():
        model(x)  # an evaluation in between changes nothing
    model(x)
    assert quantizer.pending_loss(layer.weight, False) is None  # that of the pass before was not asked for
    model(x)
    assert quantizer.pending_loss(layer.weight, False) is not None


def test_what_does_not_qualify() -> None:
    v, step = torch.zeros(4, 6), torch.tensor(1.0)
    assert kernels.usable(v, step)
    assert kernels.usable(v, torch.ones(4, 1))
    assert not kernels.usable(v, torch.ones(6))  # along the columns
    assert not kernels.usable(v.double(), step)
    assert not kernels.usable(v, step.double())
    assert not kernels.usable(v.T, step)
    assert not kernels.usable(v.to("meta"), step)


def test_gradients_of_any_layout() -> None:
    quantizer = LsqActivations(4, True, 1)
    with torch.no_grad():
        quantizer.step.fill_(0.1)
    x = torch.rand(3, 4, 5, requires_grad=True)
    quantizer(x).sum().backward()  # an expanded gradient
    assert x.grad is not None
    assert torch.equal(x.grad, (x < 1.5).float() * (x > 0))
    x.grad.zero_()
    (quantizer(x).transpose(0, 2) * torch.arange(3.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(3.0).reshape(3, 1, 1).expand(3, 4, 5) * (x > 0))


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # by torch itself
def test_a_compiled_model_has_the_same_values() -> None:
    quantizer = LsqWeights(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), 4)
    weight = nn.Parameter(torch.randn(4, 9, generator=torch.Generator().manual_seed(1)))
    compiled = torch.compile(copy.deepcopy(quantizer), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(weight), quantizer(weight))


def test_switched_off() -> None:
    code = "from nibblecore.qat import kernels; print(kernels.library())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"NIBBLECORE_KERNELS": "0"}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "None"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"^no-such-compiler is not installed\.\nOn Debian or Ubuntu: apt-get"):
        kernels.build("no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"^quantizers train with tensor operations, which is slower: g\+\+ is"):
            assert kernels.library() is None
        assert not kernels.usable(torch.zeros(1), torch.ones(()))
    finally:
        kernels.library.cache_clear()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("NIBBLECORE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ToolchainError, match=r"^broken does not compile kernels\.cpp:\nout of order$"):
        kernels.build("broken")
    assert not list((tmp_path / "cache").rglob("*.so"))
