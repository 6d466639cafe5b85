"""Moving averages against YOLOv5's formula and torch's own, with everything that may happen to a model meanwhile."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nibblecore import ir
from nibblecore.qat import METHODS, Ema, QConfig, QuantModel, calibrate, convert, prepare, save_checkpoint


def network(qconfig: QConfig | None = None, seed: int = 0, ready: bool = True) -> QuantModel:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Hardtanh(),
                        nn.Conv2d(5, 2, 3))  # fmt: skip
    model = prepare(net, qconfig or QConfig(granularity="tensor"), torch.zeros(1, 1, 8, 8))
    if ready:
        calibrate(model, [torch.rand(8, 1, 8, 8)])
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    F.mse_loss(model(x), torch.zeros(8, 2, 2, 2)).backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("batch_norm", ["folded", "unfolded"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_floating_point_entry_is_averaged(name: str, batch_norm: Any) -> None:
    model = network(QConfig(method=name, batch_norm=batch_norm, weight_bits=3 if name == "dorefa" else 4))
    optimizer, ema = sgd(model), Ema(model, decay=0.9, ramp=5)
    expected = {k: v.clone().double() for k, v in model.state_dict().items()}
    for t in range(1, 6):
        step(model, optimizer, t)
        ema.update(model)
        decay = 0.9 * (1 - math.exp(-t / 5))  # YOLOv5's
        for key, value in model.state_dict().items():
            used = value.double()
            if key.endswith(("quantizer.step", "quantizer.alpha")):  # a step may have gone negative
                used, expected[key] = used.abs(), expected[key].abs()
            expected[key] = decay * expected[key] + (1 - decay) * used if value.is_floating_point() else used
    assert ema.model.state_dict().keys() == expected.keys()
    for key, value in ema.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6, msg=key)
    assert not any(p.requires_grad for p in ema.model.parameters())
    convert(ema.model)


@pytest.mark.parametrize("scale_kind", ["free", "power_of_two"])
def test_steps_that_went_negative_are_averaged_as_they_are_used(scale_kind: Any) -> None:
    model = network(QConfig(granularity="tensor", scale_kind=scale_kind))
    ema = Ema(model, decay=0.5, ramp=0)
    quantizer: Any = model.get_submodule("3.weight_quantizer")
    first = float(quantizer.step.detach().abs())
    with torch.no_grad():
        quantizer.step.fill_(-first)  # the same step
    ema.update(model)
    averaged: Any = ema.model.get_submodule("3.weight_quantizer")
    assert float(averaged.step) == first
    weight = torch.ones(5, 4, 3, 3)
    assert torch.equal(averaged.scale(weight), quantizer.scale(weight).detach())
    if scale_kind == "power_of_two":  # what is used is a power of two, whatever the average is
        with torch.no_grad():
            quantizer.step.fill_(first * 1.3)
        ema.update(model)
        assert math.frexp(float(averaged.scale(weight)[0]))[0] == 0.5
        assert math.frexp(float(averaged.step))[0] != 0.5


def test_of_pact_too() -> None:
    model = network(QConfig(method="pact"))
    ema = Ema(model, decay=0.5, ramp=0)
    quantizer: Any = model.get_submodule("0.output_quantizer")
    alpha = float(quantizer.alpha.detach())
    with torch.no_grad():
        quantizer.alpha.fill_(-3 * alpha)
    ema.update(model)
    assert float(ema.model.get_parameter("0.output_quantizer.alpha")) == pytest.approx(2 * alpha)


def test_an_average_that_starts_before_calibration() -> None:
    model = network(ready=False)
    ema = Ema(model, decay=0.5, ramp=0)
    calibrate(model, [torch.rand(8, 1, 8, 8)])
    ema.update(model)
    key = "0.output_quantizer.step"
    first = float(model.get_parameter(key).detach())
    assert float(ema.model.get_parameter(key)) == first
    with torch.no_grad():
        model.get_parameter(key).mul_(3)
    ema.update(model)
    assert float(ema.model.get_parameter(key)) == pytest.approx(2 * first)
    convert(ema.model)


@pytest.mark.parametrize("when", [0, 2])
def test_resumed_it_goes_on_as_if_nothing_had_been(when: int) -> None:
    model = network(ready=False)
    if when:
        calibrate(model, [torch.rand(8, 1, 8, 8)])
    else:
        model = network()
    optimizer, ema = sgd(model), Ema(model, decay=0.9, ramp=3)
    for t in range(when):
        step(model, optimizer, t)
        ema.update(model)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = network(seed=5)
    other_optimizer, other_ema = sgd(other), Ema(other, decay=0.9, ramp=3)
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    other_ema.load_state_dict(state["ema"])
    for t in range(3):
        for m, o, e in ((model, optimizer, ema), (other, other_optimizer, other_ema)):
            step(m, o, 10 + t)
            e.update(m)
    for key, value in ema.model.state_dict().items():
        assert torch.equal(value, other_ema.model.state_dict()[key]), key
    assert other_ema.updates == ema.updates == when + 3


def test_wrapped_models() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    ema = Ema(compiled, decay=0.5, ramp=0)
    assert type(ema.model) is QuantModel
    with torch.no_grad():
        model.get_parameter("3.weight").add_(1.0)
    ema.update(compiled)
    plain = Ema(network(), decay=0.5, ramp=0)
    plain.update(model)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, ema.model.state_dict()[key]), key


def test_on_another_device_or_in_another_type() -> None:
    model = network()
    ema = Ema(model, decay=0.5, ramp=0).to(torch.float64)
    with torch.no_grad():
        model.get_parameter("3.weight").add_(1.0)
    ema.update(model)
    weight = ema.model.get_parameter("3.weight")
    assert weight.dtype == torch.float64
    torch.testing.assert_close(weight, model.get_parameter("3.weight").double() - 0.5)


def test_torch_averages_a_prepared_model_too() -> None:
    model = network(QConfig(method="iao", batch_norm="unfolded"))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(model)  # the first is copied
    ema, optimizer = Ema(model, decay=0.9, ramp=0), sgd(model)
    for t in range(3):
        step(model, optimizer, t)
        theirs.update_parameters(model)
        ema.update(model)
    state = ema.model.state_dict()
    for key, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-6, msg=key)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(theirs.eval()(x), ema.model(x), rtol=1e-3, atol=1e-3)
    other = AveragedModel(copy.deepcopy(model), use_buffers=True)
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other.eval()(x), theirs(x))
    convert(theirs.module)


def test_models_may_be_wrapped(tmp_path: Path) -> None:
    """Compiled, averaged, both: what needs the prepared model finds it."""
    model = network()
    graph = convert(model)
    for wrapped in (torch.compile(model, backend="eager"), AveragedModel(torch.compile(model, backend="eager"))):
        assert all(np.array_equal(a.weight, b.weight) for a, b in zip(convert(wrapped).nodes, graph.nodes, strict=True)
                   if isinstance(a, ir.Conv) and isinstance(b, ir.Conv))  # fmt: skip
        calibrate(wrapped, [torch.rand(8, 1, 8, 8)])
        save_checkpoint(wrapped, tmp_path / "model.safetensors", factory="tests:net")
    text = r"^model must come from nibblecore\.qat\.prepare, not be a Linear$"
    for use in (convert, lambda m: calibrate(m, []), lambda m: save_checkpoint(m, tmp_path / "x", factory="a:b")):
        with pytest.raises(TypeError, match=text):
            use(torch.compile(nn.Linear(2, 2), backend="eager"))
