"""Bin regularization, dampening, oscillation tracking and freezing, moving averages."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibblecore.qat import (
    Ema,
    OscillationTracker,
    Override,
    QConfig,
    QuantModel,
    bin_regularization,
    bin_regularization_weight,
    calibrate,
    convert,
    cosine_ramp,
    dampening,
    prepare,
)
from nibblecore.qat.layers import QuantLayer


def network(qconfig: QConfig | None = None, seed: int = 0) -> QuantModel:
    """Three layers, of which the middle one has few bits."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
    model = prepare(net, qconfig or QConfig(granularity="tensor"), torch.zeros(1, 1, 8, 8))
    calibrate(model, [torch.rand(8, 1, 8, 8)])
    return model


def middle(model: QuantModel) -> Any:
    layer = model.get_submodule("2")
    assert isinstance(layer, QuantLayer)
    return layer


def paper(weight: Tensor, step: float, codes: Tensor) -> float:
    """The loss as the paper defines it, bin by bin."""
    total = 0.0
    for code in codes.unique().tolist():
        members = weight[codes == code]
        total += float((members.mean() - code * step) ** 2)
        if len(members) > 1:
            total += float(members.var(correction=0))
    return total


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_bin_regularization_is_the_papers(bits: int, granularity: Any) -> None:
    model = network(QConfig(weight_bits=bits, granularity=granularity), bits).double()
    layer = middle(model)
    with torch.no_grad():
        layer.weight_quantizer.step.mul_(0.6)  # some are clipped
    weight, codes = layer.weight.detach(), layer.int_weight()
    steps = layer.scale().tolist()
    if granularity == "tensor":
        expected = paper(weight, steps[0], codes)
    else:
        expected = sum(paper(w, s, c) for w, s, c in zip(weight, steps, codes, strict=True))
    assert float(bin_regularization(model).detach()) == pytest.approx(expected)
    loss = bin_regularization(model)
    loss.backward()
    first = model.get_submodule("0")
    assert isinstance(first, QuantLayer)
    assert first.weight.grad is None  # 8 bits
    # 2 * (w - level) / population
    bins = codes if granularity == "tensor" else codes + 100 * torch.arange(5).reshape(-1, 1, 1, 1)
    values, index, counts = bins.flatten().unique(return_inverse=True, return_counts=True)
    level = codes * layer.scale().detach().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(layer.weight.grad.flatten(), (2 * (weight - level)).flatten() / counts[index])
    assert bool(layer.weight_quantizer.step.grad.any())
    layer.weight_quantizer.step.grad = None
    bin_regularization(model, grad_to_step=False).backward()
    assert layer.weight_quantizer.step.grad is None
    assert len(values) > 1


def test_bins_of_a_layer_with_a_step_per_channel() -> None:
    model = network(QConfig()).double()
    layer = middle(model)
    codes, scale = layer.int_weight(), layer.scale().detach().reshape(-1, 1, 1, 1)
    square = (layer.weight.detach() - codes * scale).square()
    expected = sum(float(square[codes == c].mean()) for c in codes.unique().tolist())
    assert float(bin_regularization(model, groups="layer").detach()) == pytest.approx(expected)


def test_schedules_of_bin_regularization() -> None:
    assert [bin_regularization_weight("S1", e, 3) for e in range(3)] == [0.5, 0.5, 0.5]
    s2 = [bin_regularization_weight("S2", e, 90) for e in range(90)]
    assert s2 == [0.0] * 30 + [0.5] * 60
    assert [bin_regularization_weight("S3", e, 4, 0.1) for e in range(4)] == [0.0, 0.1, 0.0, 0.1]
    with pytest.raises(ValueError, match=r"^schedule must be 'S1', 'S2' or 'S3', not 'S4'$"):
        bin_regularization_weight("S4", 0, 1)
    with pytest.raises(ValueError, match=r"^groups must be 'step' or 'layer', not 'bin'$"):
        bin_regularization(network(), groups="bin")


def test_bin_regularization_settles_weights() -> None:
    model = network()
    optimizer = torch.optim.SGD([middle(model).weight], lr=1.0)
    first = float(bin_regularization(model).detach())
    for _ in range(50):
        optimizer.zero_grad()
        loss = bin_regularization(model, grad_to_step=False)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05 * first


def test_dampening() -> None:
    model = network().double()
    layer = middle(model)
    with torch.no_grad():
        layer.weight_quantizer.step.mul_(0.6)
    step = float(layer.scale()[0].detach())
    weight, codes = layer.weight.detach(), layer.int_weight()
    square = (codes * step - weight.clamp(-7 * step, 7 * step)).square()
    for aggregation, expected in (
        ("sum", square.sum()),
        ("mean", square.mean()),
        ("kernel_mean", square.mean((1, 2, 3)).sum()),
    ):
        got = dampening(model, aggregation=aggregation)
        assert float(got.detach()) == pytest.approx(float(expected))
    dampening(model, aggregation="sum").backward()
    inside = weight.abs() < 7 * step
    assert not bool(inside.all())
    torch.testing.assert_close(layer.weight.grad, 2 * (weight - codes * step) * inside)
    assert layer.weight_quantizer.step.grad is None
    with pytest.raises(ValueError, match=r"^aggregation must be 'sum', 'mean' or 'kernel_mean', not 'max'$"):
        dampening(model, aggregation="max")


def test_cosine_ramp() -> None:
    got = [cosine_ramp(step, 100, 0.04, 0.01) for step in (0, 24, 25, 62, 63, 100, 120)]
    assert got[:3] == pytest.approx([0, 0, 0.04])
    assert got[3] > 0.025 > got[4]
    assert got[5:] == pytest.approx([0.01, 0.01])
    assert cosine_ramp(100, 100, 0.0, 0.1) == pytest.approx(0.1)


def test_oscillations_are_counted_and_frozen() -> None:
    model = network()
    layer = middle(model)
    tracker = OscillationTracker(model, momentum=0.1)
    assert list(tracker.layers) == ["2"]

    def place(code: float) -> None:
        with torch.no_grad():
            layer.weight.view(-1)[0] = code * float(layer.scale()[0])

    place(1)
    tracker.step()
    for state in tracker.state.values():  # whatever the first change was
        state["direction"].zero_()
        state["frequency"].zero_()
        state["average"].view(-1)[0] = 1.0
    frequency, average = 0.0, 1.0
    # up, up, down (against), up (against), still, down (against)
    for code, oscillates in ((2, 0), (3, 0), (2, 1), (3, 1), (3, 0), (2, 1)):
        place(code)
        tracker.step()
        frequency = 0.9 * frequency + 0.1 * oscillates
        average = 0.9 * average + 0.1 * code
        state = tracker.state["2"]
        assert float(state["frequency"].view(-1)[0]) == pytest.approx(frequency)
        assert float(state["average"].view(-1)[0]) == pytest.approx(average)
    assert tracker.rate(0.2) == 1 / layer.weight.numel()
    assert tracker.frozen() == 0.0

    place(3)
    tracker.step(threshold=0.2)
    assert tracker.frozen() == 1 / layer.weight.numel()
    frozen = round(average)
    assert int(layer.int_weight().view(-1)[0]) == frozen
    # Neither the optimizer nor a moving step changes the code.
    place(-5)
    with torch.no_grad():
        layer.weight_quantizer.step.mul_(1.7)
    tracker.step(threshold=0.2)
    assert int(layer.int_weight().view(-1)[0]) == frozen
    assert float(layer.weight.detach().view(-1)[0]) == pytest.approx(frozen * float(layer.scale()[0].detach()))

    other = OscillationTracker(model, momentum=0.1)
    other.load_state_dict(tracker.state_dict())
    assert other.frozen() == tracker.frozen()
    text = r"^the state is that of a tracker of another model$"
    with pytest.raises(ValueError, match=text):
        other.load_state_dict({})
    with pytest.raises(ValueError, match=r"^momentum must be above 0 and at most 1, not 0$"):
        OscillationTracker(model, momentum=0)


def test_methods_without_levels_are_refused() -> None:
    model = network(QConfig(overrides=(Override(pattern="2", method="dorefa"),)))
    text = r"^2: the codes of DorefaWeights are not those of w / step, which this needs$"
    for use in (bin_regularization, dampening, OscillationTracker):
        with pytest.raises(ValueError, match=text):
            use(model)


def test_moving_averages() -> None:
    model = network()
    ema = Ema(model, decay=0.9, ramp=5)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {k: v.clone().double() for k, v in start.items()}
    for t in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * t)
        ema.update(model)
        decay = 0.9 * (1 - math.exp(-t / 5))
        for k, v in model.state_dict().items():
            expected[k] = decay * expected[k] + (1 - decay) * v.double()
    state = ema.model.state_dict()
    assert "2.weight_quantizer.step" in state
    assert "2.output_quantizer.step" in state
    for k, v in state.items():
        torch.testing.assert_close(v.double(), expected[k], rtol=1e-5, atol=1e-6)
    # The input's grid does not move by an ulp.
    assert torch.equal(state["input.range"], start["input.range"])
    assert not ema.model.training
    convert(ema.model)  # type: ignore[arg-type]
    other = Ema(network(), decay=0.9, ramp=5)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 5
    assert torch.equal(other.model.state_dict()["2.weight"], state["2.weight"])


def test_the_first_update_without_history() -> None:
    model = network()
    ema = Ema(model)
    with torch.no_grad():
        middle(model).weight.add_(1.0)
    ema.update(model)
    # The decay starts at nearly 0: 0.9999 * (1 - exp(-1/2000)) = 0.0005.
    moved = (middle(ema.model) if isinstance(ema.model, QuantModel) else model).weight - middle(model).weight
    assert float(moved.abs().max().detach()) == pytest.approx(0.9999 * (1 - math.exp(-1 / 2000)), rel=1e-2)
    for arguments, text in (
        ({"decay": 1.0}, r"^decay must be at least 0 and less than 1, not 1\.0$"),
        ({"ramp": -1}, r"^ramp must be at least 0, not -1$"),
    ):
        with pytest.raises(ValueError, match=text):
            Ema(model, **arguments)  # type: ignore[arg-type]


def test_frozen_weights_do_not_oscillate() -> None:
    model = network()
    tracker = OscillationTracker(model, momentum=0.5)
    layer = next(iter(tracker.layers.values()))
    step = layer.weight_quantizer.scale_like(layer.weight)
    for code in (0.0, 1.0, 0.0, 1.0):
        with torch.no_grad():
            layer.weight.copy_(code * step.expand_as(layer.weight))
        tracker.step()
    assert tracker.rate() > 0
    tracker.step(threshold=0.1)
    assert tracker.frozen() > 0
    assert tracker.rate() == 0
