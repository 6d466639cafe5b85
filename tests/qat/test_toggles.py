"""Fake quantization and observers switched on and off; copies, pickles and states at any moment."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore.errors import TrainingError
from nibblecore.qat import (
    METHODS,
    Ema,
    IaoOptions,
    OscillationTracker,
    QConfig,
    QuantModel,
    bin_regularization,
    calibrate,
    convert,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    fake_quant_disabled,
    observer_disabled,
    prepare,
)
from nibblecore.qat.layers import QuantLayer
from nibblecore.qat.methods import ActQuantizer, InputQuantizer, WeightQuantizer


class Small(nn.Module):
    """Two layers, a sum, a pool and a classifier: every kind of module that has a quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.pool(F.relu(x + self.body(x)))
        logits: Tensor = self.head(x.flatten(1))
        return logits


@functools.cache
def _small(qconfig: QConfig, seed: int) -> tuple[QuantModel, nn.Module]:
    torch.manual_seed(seed)
    net = Small()
    return prepare(net, qconfig, torch.zeros(1, 1, 8, 8)), net


def small(qconfig: QConfig | None = None, seed: int = 0) -> tuple[QuantModel, nn.Module]:
    """Prepared, not calibrated; and the float model."""
    return copy.deepcopy(_small(qconfig or QConfig(), seed))


def images(seed: int = 1) -> Tensor:
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def enabled(model: nn.Module) -> set[str]:
    kinds = (WeightQuantizer, ActQuantizer, InputQuantizer)
    return {name for name, m in model.named_modules() if isinstance(m, kinds) and m.fake_quant_enabled}


def steps(model: QuantModel) -> dict[str, float]:
    return {name: float(q.scale().detach()) for name, q in model._quantizers().items()}


def test_without_fake_quantization_it_is_the_float_model() -> None:
    model, net = small()
    x = images()
    model.disable_fake_quant()  # and nothing needs to be calibrated
    torch.testing.assert_close(model(x), net(x))
    calibrate(model, [x])
    torch.testing.assert_close(model(x), net(x))
    model.enable_fake_quant()
    assert float((model(x) - net(x)).abs().max().detach()) > 1e-3


def test_what_is_switched_on_needs_a_step() -> None:
    model, _ = small()
    x = images()
    text = r"^\d of 4 activation steps are nan, the first at "
    model.disable_fake_quant()
    model(x)
    with pytest.raises(TrainingError, match=text):
        convert(model)
    for switch_on in (lambda: model.enable_fake_quant("stem"), lambda: model.apply(enable_fake_quant)):
        switch_on()
        with pytest.raises(TrainingError, match=text):
            model(x)
    calibrate(model, [x])
    assert bool(model(x).isfinite().all())


def test_patterns_choose_layers_weights_and_activations() -> None:
    model, _ = small()
    calibrate(model, [images()])
    everything = enabled(model)
    assert len(everything) == 8
    model.disable_fake_quant("b*")
    assert everything - enabled(model) == {"body.weight_quantizer", "body.output_quantizer"}
    model.enable_fake_quant("body", activations=False)
    assert everything - enabled(model) == {"body.output_quantizer"}
    model.enable_fake_quant()
    model.disable_fake_quant("x")
    assert everything - enabled(model) == {"x"}
    model.enable_fake_quant()
    with pytest.raises(ValueError, match=r"^pattern 'nose\*' matches no layer with such a quantizer$"):
        model.disable_fake_quant("nose*")
    with pytest.raises(ValueError, match=r"^pattern 'x' matches no layer with such a quantizer$"):
        model.disable_fake_quant("x", activations=False)
    with pytest.raises(ValueError, match=r"^pattern 'x' matches no layer with an observer$"):
        model.enable_observer("x")


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("activations", [False, True])
def test_every_mixture_computes_what_it_says(weights: bool, activations: bool) -> None:
    """Against a float model with quantized weights put in, and quantizers called by hand."""
    model, net = small(seed=3)
    x = images()
    calibrate(model, [x])
    if not weights:
        model.disable_fake_quant(activations=False)
    if not activations:
        model.disable_fake_quant(weights=False)

    def layer(name: str, source: Tensor) -> Tensor:
        quantized: Any = model.get_submodule(name)
        float_layer = copy.deepcopy(net.get_submodule(name))
        if weights:
            float_layer.weight.data = quantized.weight_quantizer(quantized.weight).detach()
        result: Tensor = float_layer(source)
        return result

    def grid(name: str, values: Tensor) -> Tensor:
        if not activations:
            return values.relu()
        quantizer: Any = model.get_submodule(name)
        result: Tensor = quantizer(values)
        return result

    with torch.no_grad():
        source = model.get_submodule("x")(x)
        stem = grid("stem.output_quantizer", layer("stem", source))
        body = layer("body", stem)
        body = grid("body.output_quantizer", body) if activations else body
        total = grid("add.output_quantizer", stem + body)
        pooled = grid("pool.output_quantizer", F.adaptive_avg_pool2d(total, 2))
        expected, got = layer("head", pooled.flatten(1)), model(x)
    # With both, biases and multipliers are rounded as well, which may move a code.
    tolerance = 5e-2 if weights and activations else 1e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["lsq", "iao", "tqt"])
def test_observers_by_hand_do_what_calibrate_does(name: str) -> None:
    model, _ = small(QConfig(method=name))
    other = copy.deepcopy(model)
    batches = list(images().split(8))
    calibrate(model, batches)
    # As with torch.ao, by functions and apply.
    other.eval()
    other.apply(enable_observer)
    other.apply(disable_fake_quant)
    for batch in batches:
        other(batch)
    other.apply(disable_observer)
    other.apply(enable_fake_quant)
    assert steps(other) == steps(model)
    assert torch.equal(other(batches[0]), model.eval()(batches[0]))


def test_observers_of_some_layers_only() -> None:
    model, _ = small(QConfig(calibration="minmax"))
    calibrate(model, [images()])
    before = steps(model)
    model.enable_observer("body")
    model(2 * images())  # quantized meanwhile
    assert steps(model) == before
    model.disable_observer("body")
    after = steps(model)
    assert {n for n in after if after[n] != before[n]} == {"body.output_quantizer"}
    model.disable_observer()  # nothing was collected
    assert steps(model) == after


def test_ranges_follow_while_the_observer_is_on() -> None:
    model, _ = small(QConfig(method="iao", options=(IaoOptions(decay=0.5),)))
    calibrate(model, [images()])
    model.train()
    before = steps(model)
    with observer_disabled(model):
        model(0.5 * images())
    model.disable_observer("stem")
    model(0.5 * images())
    after = steps(model)
    assert after["stem.output_quantizer"] == before["stem.output_quantizer"]
    assert all(after[n] != before[n] for n in after if not n.startswith("stem"))
    # They follow without fake quantization too, and need no calibration then.
    fresh, _ = small(QConfig(method="iao", options=(IaoOptions(decay=0.5),)))
    with fake_quant_disabled(fresh):
        fresh(images())
    assert all(value > 0 for value in steps(fresh).values())
    fresh(images())


def test_contexts_restore_what_was() -> None:
    model, net = small()
    x = images()
    calibrate(model, [x])
    model.disable_fake_quant("stem")
    before, expected = enabled(model), model(x)
    with fake_quant_disabled(model):
        assert not enabled(model)
        torch.testing.assert_close(model(x), net(x))
    assert enabled(model) == before
    with pytest.raises(KeyError), fake_quant_disabled(model, "b*", weights=False):  # noqa: PT012
        assert before - enabled(model) == {"body.output_quantizer"}
        raise KeyError
    assert enabled(model) == before
    assert torch.equal(model(x), expected)


def test_toggles_are_modes_and_no_state() -> None:
    model, _ = small()
    calibrate(model, [images()])
    keys = set(model.state_dict())
    model.disable_fake_quant("body")
    assert set(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert enabled(other) == enabled(model)
    fresh, _ = small()
    fresh.load_state_dict(model.state_dict())
    assert len(enabled(fresh)) == 8
    convert(model)  # integers do not depend on modes


def through_disk(model: nn.Module) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state: dict[str, Any] = torch.load(buffer, weights_only=True)
    return state


def trained(model: QuantModel, n: int = 2) -> list[float]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images()), torch.arange(16) % 3)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def before_calibration(model: QuantModel) -> None:
    pass


def during_observation(model: QuantModel) -> None:
    model.eval()
    model.enable_observer()
    model.disable_fake_quant()
    model(images()[:8])


def calibrated(model: QuantModel) -> None:
    calibrate(model, [images()])


def after_training(model: QuantModel) -> None:
    calibrate(model, [images()])
    trained(model)


def after_convert(model: QuantModel) -> None:
    after_training(model)
    convert(model)


def behind_a_graph(model: QuantModel) -> None:
    calibrate(model, [images()])
    model(images()).sum().backward()  # with gradients, and a graph that lives
    model.last = model(images())  # type: ignore[assignment] # what users do: any attribute
    del model.last


MOMENTS: list[Callable[[QuantModel], None]] = [
    before_calibration, during_observation, calibrated, after_training, after_convert, behind_a_graph,
]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_copies_and_states_at_any_moment(name: str, moment: Callable[[QuantModel], None]) -> None:
    qconfig = QConfig(method=name, weight_bits=3 if name == "dorefa" else 4)
    model, _ = small(qconfig)
    moment(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    loaded, _ = small(qconfig, seed=9)
    loaded.load_state_dict(through_disk(model))
    state = model.state_dict()
    for other in (*copies, loaded):
        for key, value in other.state_dict().items():
            assert torch.equal(value.nan_to_num(-1.0), state[key].nan_to_num(-1.0)), key
            assert not len(value.shape) or value.data_ptr() != state[key].data_ptr(), key
    if moment is during_observation:  # what was collected is in the copies
        for each in (model, *copies):
            each(images()[8:])
            each.disable_observer()
            each.enable_fake_quant()
    elif moment is before_calibration:
        for each in (model, *copies, loaded):
            calibrate(each, [images()])
    followers = copies if moment is during_observation else [*copies, loaded]
    expected = trained(model)
    for other in followers:
        assert trained(other) == expected
        for key, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key


def test_copies_with_a_tracker_and_an_average_alive() -> None:
    model, _ = small()
    calibrate(model, [images()])
    ema, tracker = Ema(model, decay=0.5, ramp=0), OscillationTracker(model, momentum=0.5)
    trained(model, 1)
    tracker.step(0.1)
    ema.update(model)
    # Copied together, the parts of the copy belong together.
    other, other_ema, other_tracker = copy.deepcopy((model, ema, tracker))
    for m, e, t in ((model, ema, tracker), (other, other_ema, other_tracker)):
        assert all(t.layers[path] is m.get_submodule(path) for path in t.layers)
        trained(m, 3)
        t.step(0.1)
        e.update(m)
    for a, b in ((model, other), (ema.model, other_ema.model)):
        for key, value in b.state_dict().items():
            assert torch.equal(value, a.state_dict()[key]), key
    assert tracker.rate() == other_tracker.rate()
    # A copy of the average is a model to convert, and the average goes on.
    average = copy.deepcopy(ema.model)
    assert isinstance(average, QuantModel)
    convert(average)
    trained(model, 1)
    ema.update(model)
    weights = [m.weight for e in (average, ema.model) for m in e.modules() if isinstance(m, QuantLayer)]
    assert not torch.equal(weights[0], weights[len(weights) // 2])


def test_copies_while_a_regularizer_waits_for_its_gradient() -> None:
    """The loss may have been computed on the way, in the forward pass: a copy computes its own."""
    model, _ = small()
    calibrate(model, [images()])
    bin_regularization(model)
    for _ in range(2):
        loss = model(images()).square().sum()
        other = copy.deepcopy(model)
        for each in (other, pickle.loads(pickle.dumps(model)), Ema(model).model):
            assert each.state_dict().keys() == model.state_dict().keys()
        term, same = bin_regularization(model), bin_regularization(other)
        torch.testing.assert_close(same, term)
        (loss + term).backward()
        same.backward()
        bin_regularization(model)


class Branches(nn.Module):
    """Two layers whose results are concatenated and so share a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat((F.relu(self.a(x)), F.relu(self.b(x))), 1))
        return logits


@pytest.mark.parametrize("name", ["lsq", "iao"])
def test_a_shared_grid_is_found_under_every_path(name: str) -> None:
    torch.manual_seed(0)
    model = prepare(Branches(), QConfig(method=name), torch.zeros(1, 1, 8, 8))
    other, x = copy.deepcopy(model), images()
    a, b = model.get_submodule("a"), model.get_submodule("b")
    assert a.output_quantizer is b.output_quantizer
    calibrate(model, x.split(8))
    other.eval()
    other.enable_observer("b")
    other.disable_fake_quant()
    for batch in x.split(8):
        other(batch)
    other.disable_observer("a")
    other.enable_fake_quant()
    assert steps(other) == steps(model)
    model.eval()
    assert torch.equal(other(x), model(x))
    everything = enabled(model)
    with fake_quant_disabled(model, "b", weights=False):
        assert everything - enabled(model) == {"a.output_quantizer"}  # where it is registered
    # Copies share it as well, and a training of both goes the same way.
    twin = copy.deepcopy(model)
    assert twin.get_submodule("a").output_quantizer is twin.get_submodule("b").output_quantizer
    labels = torch.arange(16) % 2
    for each in (model, twin):
        each.train()
        F.cross_entropy(each(x).mean((2, 3)), labels).backward()
    for parameter, same in zip(model.parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None
        assert same.grad is not None
        assert torch.equal(parameter.grad, same.grad)
