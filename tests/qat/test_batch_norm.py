"""Unfolded batch norm, its re-estimation, and quantization correction, down to the integers."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.arch.config import get_arch
from nibblecore.compiler.pipeline import compile_graph
from nibblecore.errors import CompileError, TrainingError
from nibblecore.models.resnet8 import resnet8_digits
from nibblecore.qat import (
    Override,
    QConfig,
    QuantModel,
    add_correction,
    calibrate,
    convert,
    load_checkpoint,
    parameter_groups,
    prepare,
    reestimate_batch_norm,
    save_checkpoint,
)
from nibblecore.qat.layers import QuantConv2d, QuantLayer
from nibblecore.runtime.device import Device
from nibblecore.runtime.transport import GoldenTransport

EXAMPLE = torch.zeros(1, 1, 8, 8)
UNFOLDED = QConfig(batch_norm="unfolded")


def resnet(seed: int = 0) -> nn.Module:
    """ResNet-8 with statistics in its batch norms, and factors of both signs."""
    torch.manual_seed(seed)
    model = resnet8_digits().train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(5):
            model(torch.rand(16, 1, 8, 8))
    return model


def ready(qconfig: QConfig, seed: int = 0) -> tuple[QuantModel, Tensor]:
    model = prepare(resnet(seed), qconfig, EXAMPLE)
    x = torch.rand(16, 1, 8, 8)
    calibrate(model, [x])
    return model, x


def layer(model: QuantModel, path: str) -> Any:
    module = model.get_submodule(path)
    assert isinstance(module, QuantLayer)
    return module


def test_unfolded_is_the_float_model_while_nothing_is_quantized() -> None:
    model = resnet().eval()
    quantized = prepare(model, UNFOLDED, EXAMPLE).eval()
    quantized.disable_fake_quant()
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(quantized._execute(x)["classifier"].x, model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(quantized, "stem.0").weight, model.get_parameter("stem.0.weight"))


def test_batch_statistics_in_training() -> None:
    model, x = ready(UNFOLDED)
    stem = layer(model, "stem.0")
    before = stem.norm.running_mean.clone()
    source = model._execute(x)["x"]
    weight = stem.weight_quantizer(stem.weight)
    h = F.conv2d(source.x, weight, stem.bias, stem.stride, stem.padding[:2], stem.dilation)
    mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)
    shape = (1, -1, 1, 1)
    normal = (h - mean.reshape(shape)) * (var + stem.norm.eps).rsqrt().reshape(shape)
    y = normal * stem.norm.weight.reshape(shape) + stem.norm.bias.reshape(shape)
    expected = stem.output_quantizer(y)
    got = stem(source).x
    assert float(((got - expected).abs() > 1e-4).float().mean()) < 1e-3
    assert not torch.equal(stem.norm.running_mean, before)
    model.eval()
    after = stem.norm.running_mean.clone()
    model(x)
    assert torch.equal(stem.norm.running_mean, after)


@pytest.mark.parametrize("qconfig", [UNFOLDED, QConfig(batch_norm="unfolded", weight_bits=2, act_bits=3,
                                                       granularity="tensor", method="lsq+")])  # fmt: skip
def test_integers_after_training(qconfig: QConfig, compare: Any) -> None:
    model, x = ready(qconfig)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.02, step_lr=0.01), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(16) % 10).backward()
        optimizer.step()
    graph = convert(model.eval())
    compare(model, graph, x)
    signs = [np.sign(n.mult) for n in graph.nodes if isinstance(n, ir.Conv)]
    assert (np.concatenate(signs) < 0).any()


def test_reestimation() -> None:
    model, x = ready(UNFOLDED)
    model.train()
    stem = layer(model, "stem.0")
    batches = [x[:8], x[8:], 0 * x]
    weight = stem.weight_quantizer(stem.weight).detach()
    means, variances = [], []
    for batch in batches[:2]:
        source = model.get_submodule("x")(batch)
        h = F.conv2d(source, weight, None, stem.stride, stem.padding[:2])
        means.append(h.mean((0, 2, 3)))
        variances.append(h.var((0, 2, 3)))
    other = copy.deepcopy(model)
    reestimate_batch_norm(other, batches, batches=2)
    norm = layer(other, "stem.0").norm
    torch.testing.assert_close(norm.running_mean, (means[0] + means[1]) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, (variances[0] + variances[1]) / 2, rtol=1e-4, atol=1e-5)
    assert norm.momentum == stem.norm.momentum
    assert other.training
    assert norm.training
    # Weights, factors and steps stay.
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    with pytest.raises(TrainingError, match=r"^Batch norms are re-estimated from at least one batch; the loader gave "):
        reestimate_batch_norm(other, [])
    assert norm.momentum == stem.norm.momentum
    text = r"^the model has no batch norms; prepare it with batch_norm='unfolded' or 'folded_train'$"
    with pytest.raises(ValueError, match=text):
        reestimate_batch_norm(prepare(resnet(), QConfig(), EXAMPLE), [x])


def test_one_batch_norm_for_each_layer() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    prepare(net, QConfig(), EXAMPLE)
    text = r"^2: Batch norm follows a convolution .* 0 has one already\. Move it there, or remove it\.$"
    with pytest.raises(CompileError, match=text):
        prepare(net, UNFOLDED, EXAMPLE)
    with pytest.raises(ValueError, match=r"^batch_norm must be 'folded', 'folded_train' or 'unfolded', not 'no'$"):
        QConfig(batch_norm="no")  # type: ignore[arg-type]


def test_batch_norm_of_vectors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    model = prepare(net, UNFOLDED, torch.zeros(1, 6))
    x = torch.rand(16, 6).reshape(16, 6, 1, 1)
    calibrate(model, [x[:, :, 0, 0]])
    model.train()(x[:, :, 0, 0])
    assert isinstance(layer(model, "0").norm, nn.BatchNorm1d)
    graph = convert(model.eval())
    codes = ir.run(graph, {"input": ir.quantize(x.numpy(), graph.tensors["input"])})["3"]
    with torch.no_grad():
        got = torch.from_numpy(ir.dequantize(codes, graph.tensors["3"])[:, :, 0, 0]).float()
        torch.testing.assert_close(got, model(x[:, :, 0, 0]), rtol=1e-3, atol=1e-4)


# Quantization correction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", ["folded", "unfolded", "folded_train"])
def test_correction_starts_as_nothing_and_trains_alone(batch_norm: Any, compare: Any) -> None:
    model, x = ready(QConfig(batch_norm=batch_norm))
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
    parameters = add_correction(model)
    assert len(parameters) == 20
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(16) % 10)
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for k, v in before.items():
        assert torch.equal(model.state_dict()[k], v), k
    compare(model, convert(model), x)


@pytest.mark.parametrize("batch_norm", ["folded", "unfolded", "folded_train"])
def test_correction_is_folded_into_records(batch_norm: Any, compare: Any) -> None:
    """Also with factors that are negative or 0, on the core too, and at no cost: weights and graph stay."""
    model, x = ready(QConfig(batch_norm=batch_norm), 3)
    model.eval()
    plain = convert(model)
    add_correction(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QuantLayer):
                assert module.correction is not None
                gamma, beta = module.correction.gamma, module.correction.beta
                gamma.copy_(torch.empty(len(gamma)).uniform_(-1.5, 1.5, generator=generator))
                beta.copy_(torch.empty(len(beta)).uniform_(-0.2, 0.2, generator=generator))
                gamma[1] = 0.0
    calibrate(model, [x])
    graph = convert(model)
    compare(model, graph, x)
    for a, b in zip(plain.nodes, graph.nodes, strict=True):
        assert type(a) is type(b)
        if isinstance(a, ir.Conv) and isinstance(b, ir.Conv) and graph.tensors[b.output].bits != 32:
            kept = b.weight.any(axis=(1, 2, 3))
            assert np.array_equal(a.weight[kept], b.weight[kept])
            assert not kept[1]
            assert (b.mult[kept] < 0).any()
    program = compile_graph(graph, get_arch("small"))
    device = Device(GoldenTransport(program.arch))
    device.load(program)
    codes = ir.quantize(x[:1].numpy(), graph.tensors["x"])
    want = ir.run(graph, {"x": codes})
    for name, got in device.run(codes[0]).outputs.items():
        assert np.array_equal(got, want[name][0])


def test_equations_of_the_fold() -> None:
    """A = a * gamma and B = a * beta + c, with a = gamma_bn / sigma and c = beta_bn - a * mean."""
    model, _ = ready(UNFOLDED)
    add_correction(model)
    conv = layer(model, "stage1.conv1")
    assert isinstance(conv, QuantConv2d)
    assert conv.correction is not None
    with torch.no_grad():
        conv.correction.gamma.uniform_(-2, 2)
        conv.correction.beta.uniform_(-1, 1)
    norm: Any = conv.norm
    h = torch.randn(6, 16, 4, 4, dtype=torch.float64)
    shape = (1, -1, 1, 1)
    corrected = conv.correction.gamma.double().reshape(shape) * h + conv.correction.beta.double().reshape(shape)
    expected = F.batch_norm(corrected, norm.running_mean.double(), norm.running_var.double(), norm.weight.double(),
                            norm.bias.double(), False, 0.0, norm.eps)  # fmt: skip
    affine = conv.affine()
    assert affine is not None
    torch.testing.assert_close(affine[0].reshape(shape) * h + affine[1].reshape(shape), expected)


def test_negative_factors_of_sums_need_narrow_weights() -> None:
    overrides = (Override(pattern="classifier", weight_bits=4, weight_range="full"),)
    model, _ = ready(QConfig(overrides=overrides))
    add_correction(model)
    classifier = layer(model, "classifier")
    with torch.no_grad():
        classifier.weight_quantizer.step.fill_(0.1)
        classifier.weight[3, 0] = -5.0
        classifier.correction.gamma[3] = -1.0
    text = (
        r"^classifier: Weights whose sign changes are above -8\. Channel 3 has a negative factor and weights of -8\. "
        r'Train the layer with weight_range="narrow"\.$'
    )
    with pytest.raises(CompileError, match=text):
        convert(model)


def test_checkpoints_keep_norms_and_corrections(tmp_path: Path) -> None:
    model, x = ready(UNFOLDED)
    add_correction(model)
    with torch.no_grad():
        layer(model, "stage1.conv1").correction.gamma.fill_(0.5)
    model.eval()
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, factory="nibblecore.models.resnet8:resnet8_digits")
    assert torch.equal(load_checkpoint(path)(x), model(x))
