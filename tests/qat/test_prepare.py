"""prepare and calibrate: widths, places of quantizers, state, folding, errors."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore.errors import CompileError, TrainingError
from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.qat import Override, QConfig, QuantModel, calibrate, parameter_groups, prepare
from nibblecore.qat.layers import QuantConv2d, QuantLayer, QuantLinear
from nibblecore.qat.methods import ActQuantizer, InputQuantizer

EXAMPLE = torch.zeros(1, 1, 8, 8)


def resnet(seed: int = 0) -> nn.Module:
    """ResNet-8 with statistics in its batch norms."""
    torch.manual_seed(seed)
    model = resnet8_digits().train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(16, 1, 8, 8))
    return model


@pytest.fixture(scope="module")
def once() -> QuantModel:
    return prepare(resnet(), QConfig(), EXAMPLE)


@pytest.fixture
def fresh(once: QuantModel) -> QuantModel:
    """Prepared, not calibrated."""
    return copy.deepcopy(once)


@pytest.fixture
def prepared(fresh: QuantModel) -> QuantModel:
    torch.manual_seed(5)
    calibrate(fresh, [torch.rand(16, 1, 8, 8)])
    return fresh


def weight_bits(model: nn.Module) -> dict[str, int]:
    return {name: m.weight_quantizer.bits for name, m in model.named_modules() if isinstance(m, QuantLayer)}


def act_grids(model: nn.Module) -> dict[str, str]:
    """uint4, int8 and so on by layer."""
    return {
        name.removesuffix(".output_quantizer"): f"{'u' if m.unsigned else ''}int{m.bits}"
        for name, m in model.named_modules()
        if isinstance(m, ActQuantizer)
    }


def test_widths_of_resnet8(prepared: QuantModel) -> None:
    bits = weight_bits(prepared)
    assert {name for name, b in bits.items() if b == 8} == {"stem.0", "classifier"}
    assert set(bits.values()) == {4, 8}
    assert act_grids(prepared) == {
        "stem.0": "uint4",
        "stage1.conv1": "uint4",
        "stage1.conv2": "int8",  # never stored
        "stage1.add": "uint4",
        "stage2.conv1": "uint4",
        "stage2.conv2": "int8",
        "stage2.shortcut.0": "int8",  # stored, read by a sum only
        "stage2.add": "uint4",
        "stage3.conv1": "uint4",
        "stage3.conv2": "int8",
        "stage3.shortcut.0": "int8",
        "stage3.add": "uint4",
        "pool": "uint8",  # read by the last layer only
    }
    assert prepared.classifier.output_quantizer is None


def test_options_and_overrides_change_widths() -> None:
    qconfig = QConfig(
        residual_bits=4,
        shortcut_bits=4,
        output_bits=8,
        overrides=(
            Override(pattern="stage2.*", weight_bits=8),
            Override(pattern="stage3.add", act_bits=8),
            Override(pattern="x", act_bits=4),
        ),
    )
    model = prepare(resnet(), qconfig, EXAMPLE)
    grids = act_grids(model)
    assert (grids["stage1.conv2"], grids["stage2.shortcut.0"], grids["stage3.add"]) == ("int4", "int4", "uint8")
    assert grids["classifier"] == "int8"
    assert model.x.bits == 4
    assert {name for name, b in weight_bits(model).items() if b == 8} == {
        "stem.0", "stage2.conv1", "stage2.conv2", "stage2.shortcut.0", "classifier"
    }  # fmt: skip


class Chain(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(1 if i == 0 else 4, 4, 3, padding=1) for i in range(3))
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@pytest.mark.parametrize(
    ("forward", "expected", "outputs"),
    [
        # Signed where no ReLU is; a ReLU behind the last layer makes codes of it.
        (lambda m, x: m.c(m.b(m.a(x))), {"a": "int4", "b": "int8"}, "raw"),
        (lambda m, x: F.relu(m.c(F.relu(m.b(F.relu(m.a(x)))))), {"a": "uint4", "b": "uint8", "c": "uint8"}, "codes"),
        # Neither a maximum nor an average of what is never negative is negative.
        (lambda m, x: m.c(F.max_pool2d(m.b(F.avg_pool2d(F.relu(m.a(x)), 2)), 2)),
         {"a": "uint4", "avg_pool2d": "uint4", "b": "int8"}, "raw"),
        # The sum of two such tensors is not either. a is read twice, so it is stored; b goes into the sum at once.
        (lambda m, x: (lambda y: m.c(F.relu(m.b(y)) + y))(F.relu(m.a(x))),
         {"a": "uint4", "b": "uint8", "add": "uint8"}, "raw"),
        # A tensor that the host reads too is an ordinary one.
        (lambda m, x: (lambda y: (y, m.c(m.b(y))))(m.a(x)), {"a": "int4", "b": "int8"}, "codes and raw"),
    ],
)  # fmt: skip
def test_grids(forward: Callable[..., Any], expected: dict[str, str], outputs: str) -> None:
    model = prepare(Chain(forward), QConfig(), EXAMPLE)
    assert act_grids(model) == expected
    assert ("c" in act_grids(model)) == (outputs == "codes")


def test_the_fused_operand_comes_first_and_is_the_larger_convolution(fresh: QuantModel) -> None:
    sums = {path: inputs for path, inputs in fresh._plan if path.endswith("add")}
    assert sums == {
        "stage1.add": ("stage1.conv2", "stem.0"),
        "stage2.add": ("stage2.conv2", "stage2.shortcut.0"),
        "stage3.add": ("stage3.conv2", "stage3.shortcut.0"),
    }


def test_float_pass_equals_the_folded_float_model() -> None:
    # While calibration observes, nothing is quantized: what differs from the user's model is the folding only.
    model = resnet().eval()
    quantized = prepare(model, QConfig(), EXAMPLE)
    quantized.disable_fake_quant()
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(quantized._execute(x)["classifier"].x, model(x), rtol=1e-4, atol=1e-5)


def test_results_are_near_the_float_model(prepared: QuantModel) -> None:
    float_model = resnet().eval()
    x = torch.rand(64, 1, 8, 8)
    with torch.no_grad():
        exact, got = float_model(x), prepared(x)
    assert float((got - exact).abs().mean() / exact.std()) < 0.3
    eight = prepare(float_model, QConfig(weight_bits=8, act_bits=8), EXAMPLE)
    calibrate(eight, [x])
    with torch.no_grad():
        assert float((eight(x) - exact).abs().mean() / exact.std()) < 0.02


def test_layers_compute_with_codes_times_scale(prepared: QuantModel) -> None:
    seen = 0
    for module in prepared.modules():
        if isinstance(module, QuantLayer):
            scale = module.scale().reshape(-1, *[1] * (module.weight.ndim - 1))
            assert torch.equal(module.weight_quantizer(module.weight), module.int_weight() * scale)
            seen += 1
    assert seen == 10


def test_state_dict_is_complete_before_the_first_forward(fresh: QuantModel) -> None:
    keys = set(fresh.state_dict())
    assert {
        "x.range",
        "stem.0.weight",
        "stem.0.bias",
        "stem.0.weight_quantizer.step",
        "pool.output_quantizer.step",
    } <= keys
    parameters = [id(p) for p in fresh.parameters()]
    calibrate(fresh, [torch.rand(4, 1, 8, 8)])
    fresh(torch.rand(2, 1, 8, 8))
    assert set(fresh.state_dict()) == keys
    assert [id(p) for p in fresh.parameters()] == parameters  # an optimizer made before knows them all


def test_state_dict_round_trip(prepared: QuantModel) -> None:
    x = torch.rand(3, 1, 8, 8)
    other = prepare(resnet(1), QConfig(), EXAMPLE)
    other.load_state_dict(prepared.state_dict())
    assert torch.equal(other(x), prepared(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_and_equal(prepared: QuantModel, how: str) -> None:
    if how == "deepcopy":
        other = copy.deepcopy(prepared)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(prepared))
    else:
        buffer = io.BytesIO()
        torch.save(prepared, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = torch.rand(3, 1, 8, 8)
    before = prepared(x)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(prepared(x), before)


def test_every_parameter_gets_a_gradient(prepared: QuantModel) -> None:
    model = prepared
    F.cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.arange(8)).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert not missing
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if p.grad is not None and n.endswith("step"))


def test_parameter_groups(prepared: QuantModel) -> None:
    weights, biases, steps = parameter_groups(prepared, lr=0.1, step_lr=0.2, weight_decay=0.3)
    assert (len(weights["params"]), len(biases["params"]), len(steps["params"])) == (10, 10, 10 + 13)
    assert [(g["lr"], g["weight_decay"]) for g in (weights, biases, steps)] == [(0.1, 0.3), (0.1, 0.0), (0.2, 0.0)]


def test_forward_before_calibration(fresh: QuantModel) -> None:
    model = fresh
    text = (
        r"^13 of 13 activation steps are nan, the first at stem\.0\.output_quantizer: they were never calibrated, or "
        r"training has lost them\.\nCall nibblecore\.qat\.calibrate\(model, loader\) with a few batches, or load a "
        r"state_dict\.$"
    )
    with pytest.raises(TrainingError, match=text):
        model(torch.rand(1, 1, 8, 8))
    calibrate(model, [torch.rand(1, 1, 8, 8)])
    model(torch.rand(1, 1, 8, 8))
    state = model.state_dict()
    state["pool.output_quantizer.step"] = torch.tensor(math.nan)
    model.load_state_dict(state)
    with pytest.raises(
        TrainingError, match=r"^1 of 13 activation steps are nan, the first at pool\.output_quantizer: "
    ):
        model(torch.rand(1, 1, 8, 8))


def test_calibration_takes_loaders_and_keeps_the_mode(fresh: QuantModel) -> None:
    model = fresh
    x = torch.rand(32, 1, 8, 8)
    dataset = torch.utils.data.TensorDataset(x, torch.zeros(32))
    calibrate(model, torch.utils.data.DataLoader(dataset, batch_size=8))
    assert model.training
    first = {n: float(q.scale().detach()) for n, q in model._quantizers().items()}
    calibrate(model, [x])
    # The mean over batches of one size is the mean over all.
    assert {n: float(q.scale().detach()) for n, q in model._quantizers().items()} == pytest.approx(first, rel=1e-5)


def test_calibration_errors(fresh: QuantModel) -> None:
    model = fresh
    with pytest.raises(TrainingError, match=r"^Calibration needs at least one batch; the loader gave none\.$"):
        calibrate(model, [])
    with pytest.raises(TrainingError, match=r"^Calibration batch 1 makes values at x that are not finite\.$"):
        calibrate(model, [torch.rand(1, 1, 8, 8), torch.full((1, 1, 8, 8), math.inf)])
    assert not any(q.observer_enabled or q.calibrator for q in model._quantizers().values())


@pytest.mark.parametrize(
    ("low", "high", "bits", "step", "zero"),
    [(0, 1, 8, 1 / 255, -128), (0, 2, 4, 2 / 15, -8), (-1, 1, 8, 2 / 255, 0), (-2.55, 0, 8, 0.01, 127)],
)
def test_input_grids(low: float, high: float, bits: int, step: float, zero: int) -> None:
    grid = InputQuantizer(low, high, bits)
    assert grid.step() == pytest.approx(step)
    assert grid.zero == zero
    assert grid.unsigned == (low == 0)
    x = torch.linspace(low - 1, high + 1, 501)
    exact = x.clamp(grid.step() * (-(2 ** (bits - 1)) - zero), grid.step() * (2 ** (bits - 1) - 1 - zero))
    assert float((grid(x) - exact).abs().max()) <= grid.step() / 2 + 1e-6
    assert float(grid(torch.zeros(1))) == 0


def test_image_bytes_pass_the_input_exactly() -> None:
    grid = InputQuantizer(0, 1, 8)
    image = torch.arange(256) / 255
    assert torch.equal(grid.codes(image), torch.arange(256) - 128)
    assert torch.equal(grid.half().codes(image), torch.arange(256) - 128)


def test_vectors_and_several_outputs() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            x = F.relu(self.body(x))
            return {"left": self.left(x), "both": [self.right(x), x]}

    model = prepare(Heads(), QConfig(), torch.zeros(1, 6))
    calibrate(model, [torch.rand(8, 6)])
    out = model(torch.rand(7, 6))
    assert out["left"].shape == (7, 3)
    assert [t.shape for t in out["both"]] == [(7, 2), (7, 5)]
    assert isinstance(model.body, QuantLinear)


def test_uneven_padding_equals_torch() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, (2, 4), padding="same"), nn.Conv2d(3, 2, 3))
    model = prepare(net, QConfig(weight_bits=8, act_bits=8), EXAMPLE)
    conv = model.get_submodule("0")
    assert isinstance(conv, QuantConv2d)
    assert conv.padding == (0, 1, 1, 2)
    model.disable_fake_quant()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = F.conv2d(F.pad(x, (1, 2, 0, 1)), net[0].weight, net[0].bias)
        torch.testing.assert_close(model._execute(x)["0"].x, expected)


def test_argument_errors() -> None:
    with pytest.raises(TypeError, match=r"^qconfig must be a QConfig, not dict$"):
        prepare(resnet(), {}, EXAMPLE)  # type: ignore[arg-type]
    for bad, shown in (((1, 2), r"1, 2"), ((0, 0), "0, 0"), ((0, math.inf), "0, inf")):
        with pytest.raises(ValueError, match=rf"^input_range must be finite and contain 0 and more, not \({shown}\)$"):
            prepare(resnet(), QConfig(), EXAMPLE, bad)
    with pytest.raises(ValueError, match=r"^override 'conv\*' matches no layer; the layers are input, 0, 2$"):
        prepare(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1)),
                QConfig(overrides=(Override(pattern="conv*", act_bits=8),)), EXAMPLE)  # fmt: skip
    with pytest.raises(
        ValueError, match=r"^there is no training method 'best'; there is dorefa, iao, lsq, lsq\+, pact, tqt$"
    ):
        prepare(resnet(), QConfig(method="best"), EXAMPLE)
    with pytest.raises(
        CompileError, match=r"^1: An operator has an integer form\. There is none for elu\. Use nn\.ReLU, "
    ):
        prepare(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ELU()), QConfig(), torch.zeros(1, 2, 4, 4))
