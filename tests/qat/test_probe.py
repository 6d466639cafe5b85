"""Weights at the edges of their bins: soft rounding and shares."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore.qat import (
    Override,
    QConfig,
    QuantModel,
    bin_offsets,
    calibrate,
    convert,
    edge_shares,
    prepare,
    soft_round,
)


def network(qconfig: QConfig | None = None) -> QuantModel:
    """Three layers, of which the middle one has few bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
    model = prepare(net, qconfig or QConfig(), torch.zeros(1, 1, 8, 8))
    calibrate(model, [torch.rand(8, 1, 8, 8)])
    return model.eval()


def middle(model: QuantModel) -> Any:
    return model.get_submodule("2")


def softly(u: Tensor, low: int, high: int, k: float) -> Tensor:
    """The probe as it is defined, one value at a time."""
    values = []
    for v in u.flatten().tolist():
        limited = max(low, min(high, v))
        nearest = float(torch.tensor(limited).round())
        values.append(limited if abs(limited - nearest) > k else nearest)
    return torch.tensor(values).reshape(u.shape)


@pytest.mark.parametrize("method", ["lsq", "iao", "tqt"])
@pytest.mark.parametrize("k", [0.0, 0.3, 0.45, 0.5])
def test_soft_rounding(method: str, k: float) -> None:
    model = network(QConfig(method=method))
    layer, x = middle(model), torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        layer.weight.mul_(1.7)  # so that learned steps clip some
    scale = layer.weight_quantizer.scale_like(layer.weight).detach()
    expected = softly(layer.weight.detach() / scale, -7, 7, k) * scale
    plain, graph = model(x), convert(model)
    with soft_round(model, k):
        torch.testing.assert_close(layer.weight_quantizer(layer.weight), expected)
        inside = model(x)
        assert (convert(model).nodes[1].weight == graph.nodes[1].weight).all()  # type: ignore[union-attr] # a Conv
    assert torch.equal(model(x), plain)
    if k == 0.5:
        torch.testing.assert_close(inside, plain, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(inside, plain, rtol=1e-4, atol=1e-5)
    # The layers of 8 bits stay as they are.
    for path in ("0", "4"):
        assert model.get_submodule(path).weight_quantizer.soft_rounding is None  # type: ignore[union-attr]


def test_without_rounding_it_is_the_clipped_float_model() -> None:
    """All weights float: what differs from the user's network are activations only, switched off here."""
    model = network(QConfig(method="iao"))
    model.disable_fake_quant(weights=False)
    layer, x = middle(model), torch.rand(4, 1, 8, 8)
    with soft_round(model, 0.0):
        got = model(x)
    model.disable_fake_quant("2")
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    assert layer.weight_quantizer.soft_rounding is None


def test_contexts_nest_and_restore() -> None:
    model = network()
    quantizer = middle(model).weight_quantizer
    with pytest.raises(KeyError), soft_round(model):  # noqa: PT012
        assert quantizer.soft_rounding == 0.45
        with soft_round(model, 0.2):
            assert quantizer.soft_rounding == 0.2
        assert quantizer.soft_rounding == 0.45
        raise KeyError
    assert quantizer.soft_rounding is None


def test_shares_and_offsets() -> None:
    model = network(QConfig(granularity="tensor"))
    layer = middle(model)
    with torch.no_grad():
        layer.weight_quantizer.step.fill_(0.1)
        weight = layer.weight.view(-1)
        weight.copy_(torch.linspace(-0.6, 0.6, len(weight)))
        weight[:4] = torch.tensor([0.049, 0.051, 5.0, -0.65])  # two at an edge inside, one clipped, one at an edge
    offsets = bin_offsets(model)
    assert list(offsets) == ["2"]
    u = layer.weight.detach().flatten() / 0.1
    expected = (u - u.round())[(u > -7) & (u < 7)]
    torch.testing.assert_close(offsets["2"], expected, rtol=0, atol=1e-5)
    assert len(offsets["2"]) == layer.weight.numel() - 1
    share = float((expected.abs() > 0.45).sum()) / layer.weight.numel()
    assert edge_shares(model) == {"2": pytest.approx(share)}
    assert 0.05 < share < 0.15  # even: 1 - 2 * 0.45
    assert edge_shares(model, 0.5) == {"2": 0.0}
    with torch.no_grad():
        layer.weight.copy_(layer.int_weight() * 0.1)
    assert edge_shares(model) == {"2": 0.0}


def test_folded_norms_are_in_the_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
                        nn.Conv2d(5, 2, 3))  # fmt: skip
    with torch.no_grad():
        net[3].weight.fill_(2.0)  # type: ignore[operator, union-attr] # a batch norm
    model = prepare(net, QConfig(batch_norm="folded_train"), torch.zeros(1, 1, 8, 8))
    layer: Any = model.get_submodule("2")
    quantizer, latent = layer.weight_quantizer, layer.latent()
    u = (latent / quantizer.scale_like(latent)).detach()
    expected = (u - u.round())[(u > -7) & (u < 7)]
    torch.testing.assert_close(bin_offsets(model)["2"], expected)


def test_errors() -> None:
    model = network()
    for bad in (-0.1, 0.51):
        text = rf"^k must be at least 0 and at most 0\.5, not {bad}$"
        with pytest.raises(ValueError, match=text):
            edge_shares(model, bad)
        with pytest.raises(ValueError, match=text), soft_round(model, bad):
            pass
    other = network(QConfig(overrides=(Override(pattern="2", method="dorefa"),)))
    text = r"^2: the codes of DorefaWeights are not those of w / step, which this needs$"
    with pytest.raises(ValueError, match=text):
        bin_offsets(other)


def test_training_shows_it() -> None:
    """Weights that are pulled to their levels leave the edges; pushed to the middle between two, they gather there."""
    model = network(QConfig(granularity="tensor"))
    layer = middle(model)
    with torch.no_grad():
        step = float(layer.scale()[0])
        between = (layer.weight / step).floor() + 0.5
    optimizer = torch.optim.SGD([layer.weight], lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        F.mse_loss(layer.weight / step, between, reduction="sum").mul(step**2).backward()
        optimizer.step()
    assert edge_shares(model)["2"] > 0.9
