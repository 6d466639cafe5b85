"""ResNet-18, MobileNetV2 and MobileNetV3-small, as they are: parameters, training, integers, compiler."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.arch.config import get_arch
from nibblecore.compiler import compile_graph
from nibblecore.errors import CompileError
from nibblecore.models.mobilenet_v2 import MobileNetV2, mobilenet_v2, mobilenet_v2_small, scaled
from nibblecore.models.mobilenet_v3 import MobileNetV3Small, mobilenet_v3_small, mobilenet_v3_small_32
from nibblecore.models.resnet18 import ResNet18, resnet18, resnet18_small
from nibblecore.qat import QConfig, QuantModel, calibrate, convert, parameter_groups, prepare
from nibblecore.runtime.device import Device
from nibblecore.runtime.transport.golden import GoldenTransport

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet18": lambda: ResNet18(10, width=0.25, small_input=True),
    "MobileNetV2": lambda: MobileNetV2(10, width=0.25, small_input=True),
    "MobileNetV3Small": lambda: MobileNetV3Small(10, width=0.25, small_input=True),
}


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        # The papers' and their implementations' 11.69, 3.50 and 2.54 million.
        (resnet18, 11_689_512),
        (mobilenet_v2, 3_504_872),
        (mobilenet_v3_small, 2_542_856),
        (resnet18_small, 11_173_962),
        (mobilenet_v2_small, 2_236_682),
        (mobilenet_v3_small_32, 1_528_106),
    ],
)
def test_parameters(factory: Callable[[], nn.Module], parameters: int) -> None:
    assert sum(p.numel() for p in factory().parameters()) == parameters


@pytest.mark.parametrize(
    ("make", "small", "divides"), [(ResNet18, False, 32), (ResNet18, True, 8), (MobileNetV2, False, 32),
                                   (MobileNetV2, True, 8), (MobileNetV3Small, False, 32), (MobileNetV3Small, True, 8)],
)  # fmt: skip
def test_sizes_of_maps_and_options(make: type[nn.Module], small: bool, divides: int) -> None:
    model = make(7, 2, width=0.35, small_input=small).eval()  # type: ignore[call-arg]
    sizes = []
    model.average.register_forward_hook(lambda m, x, y: sizes.append(tuple(x[0].shape[2:])))  # type: ignore[union-attr]
    assert model(torch.rand(1, 2, 64, 32)).shape == (1, 7)
    assert sizes == [(64 // divides, 32 // divides)]


def test_channels_are_rounded_as_in_the_reference() -> None:
    assert [scaled(c, 0.25) for c in (16, 24, 32, 64, 96, 160)] == [8, 8, 8, 16, 24, 40]
    assert scaled(24, 0.75) == 24  # 18 to the nearest 8 would be 16, more than a tenth less
    assert scaled(72, 0.25) == 24
    assert all(scaled(c, 1.0) == c for c in (16, 24, 72, 88, 96, 120, 576, 1280))


@functools.cache
def trained(name: str, qconfig: QConfig, size: int = 16) -> tuple[QuantModel, torch.Tensor]:
    """The model after a few steps of training, in evaluation mode, and its images; shared by the tests."""
    torch.manual_seed(0)
    net = MODELS[name]().train()
    x, y = torch.rand(16, 3, size, size), torch.arange(16) % 10
    with torch.no_grad():
        for _ in range(4):
            net(x)
    model = prepare(net, qconfig, x[:1])
    names = set(model.state_dict())
    calibrate(model, [x])
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.02, step_lr=0.002), momentum=0.9)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(x), y)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
    assert set(model.state_dict()) == names
    assert losses[-1] < losses[0]
    return model.eval(), x


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "lsq") for name in MODELS), ("MobileNetV2", "lsq+"), ("MobileNetV3Small", "lsq+")]
)
def test_from_the_float_model_to_integers(
    name: str, method: str, compare: Callable[..., None], evaluate: Callable[..., dict[str, Any]]
) -> None:
    model, x = trained(name, QConfig(method=method))
    graph = convert(model)
    compare(model, graph, x)
    (source,), (result,) = graph.inputs, graph.outputs
    codes = {source: ir.quantize(x.numpy(), graph.tensors[source])}
    integers = ir.run(graph, codes, keep=True)
    expected = evaluate(graph, codes)
    for tensor, got in integers.items():
        assert np.array_equal(got, expected[tensor]), tensor
    # End to end, where one code next to a tie changes others: few, and the logits stay near.
    with torch.no_grad():
        grids = model._execute(x)
        logits = model(x).numpy()
    wrong = total = 0
    for tensor, t in graph.tensors.items():
        if t.bits != 32:
            assert isinstance(t.scale, float)
            fake = np.rint(grids[tensor].x.double().numpy().reshape(-1, *t.shape) / t.scale + t.zero)
            wrong, total = wrong + int((fake != integers[tensor]).sum()), total + fake.size
    assert wrong <= 0.02 * total, f"{wrong} of {total} codes differ"
    real = ir.dequantize(integers[result], graph.tensors[result]).reshape(len(x), -1)
    assert np.abs(real - logits).max() <= 0.2 * np.abs(logits).max()
    assert np.median(np.abs(real - logits)) <= 1e-3 * np.abs(logits).max()


def test_operators_of_the_mobile_networks() -> None:
    v2 = convert(trained("MobileNetV2", QConfig())[0])
    assert sum(isinstance(n, ir.Conv) and n.groups > 1 for n in v2.nodes) == 17
    # 10 with the paper's widths; with these, two more blocks leave the shape as it is.
    assert sum(isinstance(n, ir.ResidualAdd) for n in v2.nodes) == 12
    v3 = convert(trained("MobileNetV3Small", QConfig())[0])
    kinds = Counter(type(n) for n in v3.nodes)
    assert kinds[ir.ChannelMul] == 9
    assert Counter(n.function for n in v3.nodes if isinstance(n, ir.Lookup)) == {"hardswish": 19, "hardsigmoid": 9}
    # The squeeze-excite path is integer throughout: 8-bit means and factors around 4-bit weights.
    gates = [n for n in v3.nodes if isinstance(n, ir.ChannelMul)]
    assert all(v3.tensors[n.inputs[1]].shape[1:] == (1, 1) and v3.tensors[n.inputs[1]].bits == 8 for n in gates)


def test_resnet18_compiles_and_the_core_computes_the_integers() -> None:
    model, x = trained("ResNet18", QConfig(), 8)
    graph = convert(model)
    arch = get_arch("small")
    program = compile_graph(graph, arch)
    device = Device(GoldenTransport(arch))
    device.load(program)
    (source,), (result,) = graph.inputs, graph.outputs
    codes = ir.quantize(x[:3].numpy(), graph.tensors[source])
    expected = ir.run(graph, {source: codes})[result]
    for image in range(3):
        assert np.array_equal(device.run({source: codes[image]}).outputs[result], expected[image])


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("MobileNetV2", {"Convolutions have one group": 17, "fits the accumulator": 1}),
        ("MobileNetV3Small", {"Convolutions have one group": 11, "There is no unit for lookup tables": 28,
                              "There is no unit for products": 9}),
    ],
)  # fmt: skip
def test_what_the_core_does_not_run_is_refused_by_name(name: str, refused: dict[str, int]) -> None:
    graph = convert(trained(name, QConfig())[0])
    with pytest.raises(CompileError) as caught:
        compile_graph(graph, get_arch("small"))
    assert len(caught.value.violations) == sum(refused.values())
    for text, count in refused.items():
        found = [v for v in caught.value.violations if text in v]
        assert len(found) == count
        assert all(v.split(":")[0] in {n.path for n in graph.nodes} for v in found)
