"""``torch.compile`` takes prepared models whole, and what they learn is what they learn without it."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.errors import TrainingError
from nibblecore.qat import METHODS, IaoOptions, LsqOptions, QConfig, QuantModel, calibrate, convert, prepare


class Plain(nn.Module):
    """A layer with a norm, a sum, a pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.body, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardtanh(self.norm(self.stem(x)))
        logits: torch.Tensor = self.head(F.adaptive_avg_pool2d(F.relu(x + self.body(x)), 2).flatten(1))
        return logits


class Everything(nn.Module):
    """Layers, a norm, a function by table, a product, a sum, a concatenation, pools, upsampling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.body, self.gate = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm(self.stem(x)))
        x = F.relu(x + self.body(x))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        low = F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0, mode="nearest")
        logits: torch.Tensor = self.head(F.adaptive_avg_pool2d(torch.cat((x, low), 1), 2).flatten(1))
        return logits


def small(qconfig: QConfig, net: type[nn.Module] = Plain) -> tuple[QuantModel, torch.Tensor]:
    torch.manual_seed(0)
    model = prepare(net(), qconfig, torch.zeros(1, 1, 8, 8))
    x = torch.rand(16, 1, 8, 8)
    calibrate(model, [x])
    return model, x


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch's own, about its own modules.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch._dynamo.reset()


def losses(model: Any, x: torch.Tensor, steps: int = 3) -> list[float]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(16) % 3)
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def check(model: QuantModel, x: torch.Tensor, **options: Any) -> None:
    """Trained with and without: equal losses, the same codes, and no graph breaks."""
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, **options)
    expected = losses(plain, x)
    assert losses(compiled, x) == pytest.approx(expected, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-4, atol=1e-6)
    a, b = convert(model), convert(plain)
    for one, other in zip(a.nodes, b.nodes, strict=True):
        if isinstance(one, ir.Conv) and isinstance(other, ir.Conv):
            # Weights that differ by an ulp have other codes only next to a tie.
            assert (one.weight != other.weight).mean() <= 0.01, one.output
            assert np.abs(one.weight - other.weight).max() <= 1


CASES = {
    **{name: QConfig(method=name, weight_bits=3 if name == "dorefa" else 4) for name in sorted(METHODS)},
    "power of two": QConfig(scale_kind="power_of_two", granularity="tensor", options=(LsqOptions(act_count="batch"),)),
    "delayed": QConfig(method="iao", options=(IaoOptions(delay=2, quantile=0.99),)),
    "unfolded": QConfig(batch_norm="unfolded"),
    "folded in training": QConfig(batch_norm="folded_train", bias_bits=8),
}


@pytest.mark.parametrize("case", list(CASES))
def test_no_graph_breaks(case: str) -> None:
    check(*small(CASES[case]), backend="eager")


@pytest.mark.parametrize("method", ["lsq", "iao"])
def test_every_operator(method: str) -> None:
    check(*small(QConfig(method=method), Everything), backend="eager")


def test_forward_and_backward_graphs() -> None:
    check(*small(QConfig(method="lsq+")), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lsq", "iao", "power of two"])
def test_with_code_generation(case: str) -> None:
    check(*small(CASES[case]))


def test_switches_and_modes_are_noticed() -> None:
    """What is not a tensor is a guard: a compiled model follows it."""
    model, x = small(QConfig())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for change in (model.train, model.eval, model.disable_fake_quant, model.enable_fake_quant,
                   lambda: model.disable_fake_quant("body", activations=False)):  # fmt: skip
        change()
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    state = {k: v * 1.25 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_compiled_model_without_calibration() -> None:
    model, x = small(QConfig())
    fresh = prepare(Plain(), QConfig(), torch.zeros(1, 1, 8, 8))
    compiled = torch.compile(fresh, backend="eager")
    with pytest.raises(TrainingError, match=r"^\d+ of \d+ activation steps are nan, "):
        compiled(x)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(compiled(x), model(x))


def test_under_autocast() -> None:
    model, x = small(QConfig())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(x), model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
