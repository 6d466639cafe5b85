"""Capturing models: what comes out, and the text of every violation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore.errors import CompileError
from nibblecore.frontend.from_torch import (
    FUNCTIONS,
    FloatAdd,
    FloatAvgPool,
    FloatConcat,
    FloatConv,
    FloatFlatten,
    FloatGraph,
    FloatLookup,
    FloatMaxPool,
    FloatMul,
    FloatUpsample,
    capture,
)
from nibblecore.models.resnet8 import resnet8_digits

EXAMPLE = torch.zeros(1, 2, 8, 8)


class Net(nn.Module):
    """One convolution (N, 3, 8, 8), then whatever the test wants."""

    def __init__(self, tail: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.tail = tail
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.tail(self, self.conv(x))


def kinds(graph: FloatGraph) -> list[tuple[type, str, tuple[str, ...], bool]]:
    return [(type(op), op.path, op.inputs, op.relu) for op in graph.ops]


def violations(model: nn.Module, example: Tensor = EXAMPLE) -> list[str]:
    with pytest.raises(CompileError) as caught:
        capture(model, example)
    return caught.value.violations


def test_resnet8() -> None:
    graph = capture(resnet8_digits(), torch.zeros(4, 1, 8, 8))
    assert (graph.name, graph.input, graph.input_shape, graph.outputs) == ("ResNet8", "x", (1, 8, 8), "classifier")
    assert kinds(graph) == [
        (FloatConv, "stem.0", ("x",), True),
        (FloatConv, "stage1.conv1", ("stem.0",), True),
        (FloatConv, "stage1.conv2", ("stage1.conv1",), False),
        (FloatAdd, "stage1.add", ("stage1.conv2", "stem.0"), True),
        (FloatConv, "stage2.conv1", ("stage1.add",), True),
        (FloatConv, "stage2.conv2", ("stage2.conv1",), False),
        (FloatConv, "stage2.shortcut.0", ("stage1.add",), False),
        (FloatAdd, "stage2.add", ("stage2.conv2", "stage2.shortcut.0"), True),
        (FloatConv, "stage3.conv1", ("stage2.add",), True),
        (FloatConv, "stage3.conv2", ("stage3.conv1",), False),
        (FloatConv, "stage3.shortcut.0", ("stage2.add",), False),
        (FloatAdd, "stage3.add", ("stage3.conv2", "stage3.shortcut.0"), True),
        (FloatAvgPool, "pool", ("stage3.add",), False),
        (FloatFlatten, "flatten", ("pool",), False),
        (FloatConv, "classifier", ("flatten",), False),
    ]


def test_functions_are_recognized_like_modules() -> None:
    def tail(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(x), 3, 2, padding=1)
        x = F.dropout(F.avg_pool2d(x, 2), training=m.training)
        x = F.batch_norm(m.second(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias)
        return F.linear(F.adaptive_avg_pool2d(F.relu(x), 1).view(x.shape[0], -1), m.fc.weight)

    graph = capture(Net(tail, second=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 5)).train(), EXAMPLE)
    assert kinds(graph) == [
        (FloatConv, "conv", ("x",), True),
        (FloatMaxPool, "max_pool2d", ("conv",), False),
        (FloatAvgPool, "avg_pool2d", ("max_pool2d",), False),
        (FloatConv, "second", ("avg_pool2d",), True),
        (FloatAvgPool, "adaptive_avg_pool2d", ("second",), False),
        (FloatFlatten, "view", ("adaptive_avg_pool2d",), False),
        (FloatConv, "fc", ("view",), False),
    ]
    pool = graph.ops[1]
    assert isinstance(pool, FloatMaxPool)
    assert (pool.kernel, pool.stride, pool.padding, pool.dilation) == ((3, 3), (2, 2), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (lambda m, x: x.mean((2, 3)), [(FloatAvgPool, "mean"), (FloatFlatten, "mean.flatten")]),
        (lambda m, x: x.mean((-1, -2), keepdim=True), [(FloatAvgPool, "mean")]),
        (lambda m, x: F.adaptive_avg_pool2d(x, (2, 4)), [(FloatAvgPool, "adaptive_avg_pool2d")]),
        (lambda m, x: torch.flatten(x, 1), [(FloatFlatten, "flatten")]),
        (lambda m, x: x.reshape(x.size(0), -1), [(FloatFlatten, "reshape")]),
        (lambda m, x: m.id(x).clone().detach().contiguous().float(), []),
        (lambda m, x: x + x, [(FloatAdd, "add")]),
        (lambda m, x: F.relu(F.relu(x) + F.relu(x).clone()), [(FloatAdd, "add")]),
    ],
)
def test_variants(tail: Callable[..., Any], expected: list[tuple[type, str]]) -> None:
    graph = capture(Net(tail, id=nn.Identity()), EXAMPLE)
    assert [(type(op), op.path) for op in graph.ops][1:] == expected


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {
    "silu": (F.silu, nn.SiLU(inplace=True)),
    "sigmoid": (torch.sigmoid, nn.Sigmoid()),
    "tanh": (torch.tanh, nn.Tanh()),
    "hardswish": (F.hardswish, nn.Hardswish(inplace=True)),
    "hardsigmoid": (F.hardsigmoid, nn.Hardsigmoid()),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), nn.LeakyReLU(0.1, inplace=True)),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU("tanh")),
    "mish": (F.mish, nn.Mish()),
}


def test_every_function_is_known() -> None:
    assert set(ACTIVATIONS) == set(FUNCTIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_as_functions_and_modules(name: str) -> None:
    function, module = ACTIVATIONS[name]
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for graph, path in (
        (capture(Net(lambda m, x: function(x)), EXAMPLE), name),
        (capture(Net(lambda m, x: m.act(x), act=module), EXAMPLE), "act"),
    ):
        op = graph.ops[1]
        assert isinstance(op, FloatLookup)
        assert (op.path, op.inputs, op.function) == (path, ("conv",), name)
        assert torch.equal(op.evaluate(x), function(x))
        assert bool((op.evaluate(x[x >= 0]) >= 0).all())
        assert op.never_negative == bool((function(x) >= 0).all())


@pytest.mark.parametrize(
    ("tail", "limits"),
    [
        (F.relu, (0, math.inf)),
        (F.relu6, (0, 6)),
        (lambda x: x.clamp_(0, 6), (0, 6)),
        (lambda x: F.hardtanh(x, -2, 3), (-2, 3)),
        (lambda x: x.clamp(max=1.5), (-math.inf, 1.5)),
        (lambda x: F.relu(F.hardtanh(F.max_pool2d(x, 2))), (0, 1)),
        (lambda x: F.relu6(F.interpolate(x, scale_factor=2)), (0, 6)),
    ],
)  # fmt: skip
def test_clamps_go_into_the_layer(tail: Callable[[Tensor], Tensor], limits: tuple[float, float]) -> None:
    conv = capture(Net(lambda m, x: tail(x)), EXAMPLE).ops[0]
    assert (conv.low, conv.high) == limits
    assert conv.relu == (limits[0] == 0)
    assert conv.clamped


def test_a_clamp_behind_a_concatenation_goes_into_all_its_parts() -> None:
    def tail(m: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        return F.relu6(torch.cat([m.a(y), m.b(y).clamp(-1, 1), F.sigmoid(y)], 1))

    graph = capture(Net(tail, a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 2, 1)), EXAMPLE)
    limits = {op.path: (op.low, op.high) for op in graph.ops}
    assert limits["a"] == (0, 6)
    assert limits["b"] == (0, 1)
    assert graph.ops[-1].inputs == ("a", "b", "sigmoid")


def test_squeeze_excite() -> None:
    def tail(m: Any, x: Tensor) -> Tensor:
        s = m.fc(x.mean((2, 3))).sigmoid()
        return s[:, :, None, None] * x + s.view(s.shape[0], -1, 1, 1) * x

    graph = capture(Net(tail, fc=nn.Linear(3, 3)), EXAMPLE)
    products = [op for op in graph.ops if isinstance(op, FloatMul)]
    assert [op.inputs for op in products] == [("conv", "unsqueeze_2"), ("conv", "view")]
    assert {op.shape for op in graph.ops if isinstance(op, FloatFlatten)} == {(3,), (3, 1), (3, 1, 1)}


def test_concatenation_and_upsampling() -> None:
    def tail(m: Any, x: Tensor) -> Tensor:
        y = F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:], mode="nearest-exact")
        return torch.cat((x, torch.cat([y], 1), m.up(F.max_pool2d(x, (2, 1))), x), -3)

    graph = capture(Net(tail, up=nn.Upsample(scale_factor=(2, 1))), EXAMPLE)
    last = graph.ops[-1]
    assert isinstance(last, FloatConcat)
    assert (last.inputs, last.shape) == (("conv", "upsample_nearest_exact2d", "up", "conv"), (12, 8, 8))
    assert [op.factor for op in graph.ops if isinstance(op, FloatUpsample)] == [(2, 2), (2, 1)]


def test_groups() -> None:
    net = Net(lambda m, x: m.bn(m.g(x)), g=nn.Conv2d(3, 6, 3, groups=3), bn=nn.BatchNorm2d(6))
    net.bn.running_var.fill_(2.0)
    op = capture(net, EXAMPLE).ops[1]
    assert isinstance(op, FloatConv)
    assert (op.groups, op.weight.shape) == (3, (6, 1, 3, 3))
    torch.testing.assert_close(op.weight, net.g.weight / math.sqrt(2.0 + 1e-5))


def test_padding_same_puts_the_odd_pixel_behind() -> None:
    graph = capture(Net(lambda m, x: m.even(x), even=nn.Conv2d(3, 3, (2, 5), padding="same", dilation=(3, 1))), EXAMPLE)
    even = graph.ops[1]
    assert isinstance(even, FloatConv)
    assert even.padding == (1, 2, 2, 2)


def test_batch_norm_is_folded_as_in_evaluation() -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.bn(x), bn=nn.BatchNorm2d(3))
    for parameter in (net.bn.running_mean, net.bn.running_var, net.bn.weight, net.bn.bias):
        parameter.data.uniform_(0.5, 2).mul_(-1 if parameter is net.bn.weight else 1)
    (conv,) = capture(net, EXAMPLE).ops
    assert isinstance(conv, FloatConv)
    x = torch.rand(3, 2, 8, 8)
    torch.testing.assert_close(F.conv2d(x, conv.weight, conv.bias, padding=1), net.eval()(x), rtol=1e-5, atol=1e-6)


def test_a_relu_behind_pool_and_flatten_moves_to_the_layer() -> None:
    graph = capture(Net(lambda m, x: F.relu(F.max_pool2d(m.bn(x), 2).flatten(1)), bn=nn.BatchNorm2d(3)), EXAMPLE)
    assert [op.relu for op in graph.ops] == [True, False, False]


def test_in_place_changes_are_seen_by_later_readers() -> None:
    def tail(m: Any, x: Tensor) -> Tensor:
        y = F.relu_(x)
        y += x  # x is the rectified one
        return y

    graph = capture(Net(tail), EXAMPLE)
    assert kinds(graph)[1:] == [(FloatAdd, "add", ("conv", "conv"), False)]
    assert graph.ops[0].relu


def test_outputs_keep_their_structure() -> None:
    graph = capture(Net(lambda m, x: {"a": x, "b": (F.max_pool2d(x, 2), None)}), EXAMPLE)
    assert graph.outputs == {"a": "conv", "b": ("max_pool2d", None)}


def test_the_model_is_left_alone() -> None:
    model = resnet8_digits().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, torch.zeros(1, 1, 8, 8))
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


OPERATORS = (
    "The model may use conv2d, linear, batch_norm, relu, clamp, silu, sigmoid, tanh, hardswish, hardsigmoid, "
    "leaky_relu, gelu, mish, add, mul, cat, interpolate, max_pool2d, avg_pool2d, adaptive_avg_pool2d, mean, flatten, "
    "dropout."
)


@pytest.mark.parametrize(
    ("tail", "modules", "text"),
    [
        (lambda m, x: F.conv2d(x, m.conv.weight.repeat(1, 2, 1, 1)[:, :3]), {},
         ("conv2d: The weight of a convolution or linear layer is a parameter of the model. The weight of this one is "
         "computed. Remove parametrizations (weight norm, masks), or store their result as the weight.")),
        (lambda m, x: F.conv2d(x, m.c.weight, m.c.bias * 2), {"c": nn.Conv2d(3, 3, 1)},
         ("conv2d: The bias of a convolution or linear layer is a parameter of the model. The bias of this one is "
         "computed. Store the result of the computation as the bias.")),
        (lambda m, x: m.fc(x), {"fc": nn.Linear(8, 2)},
         ("fc: A linear layer reads vectors of shape (N, features). This one reads the shape (N, 3, 8, 8). Flatten its "
         "input, or use a 1x1 convolution.")),
        (lambda m, x: m.bn(x), {"bn": nn.BatchNorm2d(3, track_running_stats=False)},
         ("bn: Batch norm uses stored statistics in evaluation mode. This one normalizes with the statistics of each "
         "batch. Use track_running_stats=True, and pass training=self.training to functional batch norms.")),
        (lambda m, x: F.dropout(x), {},
         ("dropout: Dropout does nothing in evaluation mode. This one drops values there too. Use nn.Dropout, or pass "
         "training=self.training to functional dropouts.")),
        (lambda m, x: x + 1, {},
         ("add: A sum has two tensors of one shape. This one adds the constant 1. Give both operands that shape in the "
         "layers before; put constants into a bias.")),
        (lambda m, x: x + F.adaptive_avg_pool2d(x, 1), {},
         ("add: A sum has two tensors of one shape. This one has (N, 3, 8, 8) and (N, 3, 1, 1). Give both operands "
         "that shape in the layers before; put constants into a bias.")),
        (lambda m, x: torch.add(x, x, alpha=2), {},
         ("add: A sum weighs both operands alike. This one has alpha=2. Leave out alpha and scale the weights of the "
         "layer before.")),
        (lambda m, x: m.pool(x), {"pool": nn.MaxPool2d(3, 2, ceil_mode=True)},
         ("pool: Windows that reach over the edge are dropped. This one has ceil_mode=True. Use ceil_mode=False, with "
         "more padding where the shape must stay.")),
        (lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), {},
         ("avg_pool2d: An average pool divides by its whole window. This one has padding=(1, 1) and "
         "count_include_pad=False. Use count_include_pad=True, or padding=0.")),
        (lambda m, x: F.avg_pool2d(x, 2, divisor_override=3), {},
         ("avg_pool2d: An average pool divides by its whole window. This one has divisor_override=3. Leave out "
         "divisor_override and scale the weights of the layer behind.")),
        (lambda m, x: F.adaptive_avg_pool2d(x, 3), {},
         ("adaptive_avg_pool2d: An adaptive average pool has equal windows: its output size divides the input size. "
         "This one makes 3x3 out of 8x8. Use an output size of 1, or avg_pool2d.")),
        (lambda m, x: x.mean(1), {},
         ("mean: A mean is taken over rows and columns of feature maps. This one has dim=(1,) on (N, 3, 8, 8). Use "
         "dim=(2, 3).")),
        (lambda m, x: x.double(), {},
         "to: Tensors stay float32. This call converts to float64. Remove the conversion."),
        (lambda m, x: x.reshape(-1, 24, 8), {},
         ("reshape: A change of shape flattens whole images to vectors. This one makes (N, 24, 8) out of (N, 3, 8, 8). "
         "Use torch.flatten(x, 1).")),
        (lambda m, x: x.unsqueeze(1), {},
         ("unsqueeze: A change of shape flattens whole images to vectors. This one makes (N, 1, 3, 8, 8) out of "
         "(N, 3, 8, 8). Use torch.flatten(x, 1).")),
        (lambda m, x: F.max_pool2d(x[0], 2)[None], {},
         f"select: An operator has an integer form. There is none for select. {OPERATORS}"),
        (lambda m, x: m.a(x), {"a": nn.ELU()},
         ("a: An operator has an integer form. There is none for elu. Use nn.ReLU, nn.LeakyReLU, nn.SiLU or "
         "nn.Hardswish.")),
        (lambda m, x: m.a(x), {"a": nn.Hardtanh(1, 6)},
         ("a: A clamp has numbers for limits, with 0 between them. This one has 1 and 6. Use min <= 0 and max >= 0, as "
         "nn.ReLU, nn.ReLU6 and nn.Hardtanh do.")),
        (lambda m, x: x.clamp(x.mean(), x.mean()), {},
         ("clamp: A clamp has numbers for limits, with 0 between them. The limits of this one are tensors. Use min <= "
         "0 and max >= 0, as nn.ReLU, nn.ReLU6 and nn.Hardtanh do.")),
        (lambda m, x: (F.relu(x), F.relu6(x)), {},
         ("relu: A ReLU or other clamp follows an operator that computes, and nothing else reads the result before the "
         "clamp. The result of conv is read 2 times. Let the other readers read behind it, or give them a layer of "
         "their own.")),
        (lambda m, x: torch.cat([x, x], 2), {},
         "cat: A concatenation joins tensors along their channels. This one has dim=2. Use dim=1."),
        (lambda m, x: x * m.b.bias, {"b": nn.Linear(3, 8)},
         ("mul: A product has two tensors of one shape, or a tensor and one factor per channel, (N, C, 1, 1). This one "
         "multiplies by the parameter b.bias. Give the operands such shapes in the layers before; fold constants into "
         "the weights there.")),
        (lambda m, x: F.relu(torch.cat([x, m.g(x)], 1)), {"g": nn.Conv2d(3, 2, 1)},
         ("relu: A ReLU or other clamp follows an operator that computes, and nothing else reads the result before the "
         "clamp. The result of conv is read 2 times. Let the other readers read behind it, or give them a layer of "
         "their own.")),
        (lambda m, x: F.interpolate(x, size=(12, 16)), {},
         ("upsample_nearest2d: Upsampling repeats each pixel a whole number of times. This one makes 12x16 out of 8x8. "
         'Use mode="nearest" with an integer scale_factor.')),
        (lambda m, x: m.u(x), {"u": nn.Upsample(scale_factor=2, mode="bilinear")},
         'u: An operator has an integer form. There is none for upsample_bilinear2d. Use mode="nearest".'),
        (lambda m, x: x * x.mean((2, 3), keepdim=True).expand_as(x), {},
         ("expand_as: An operator has an integer form. There is none for expand_as. Leave it out: products spread "
         "factors of shape (N, C, 1, 1) over the pixels themselves.")),
        (lambda m, x: x * x[:, :, :1], {},
         ("mul: A product has two tensors of one shape, or a tensor and one factor per channel, (N, C, 1, 1). This one "
         "has (N, 3, 8, 8) and (N, 3, 1, 8). Give the operands such shapes in the layers before; fold constants into "
         "the weights there.")),
        (lambda m, x: x * m.b.bias.reshape(-1, 1, 1), {"b": nn.Conv2d(3, 3, 1)},
         ("reshape: An operator computes with what depends on the network's input. This one computes with parameters "
         "only. Store the result as a parameter of the layer that reads it.")),
        (lambda m, x: x[:, :2], {},
         ("slice: A slice takes everything. This one makes (N, 2, 8, 8) out of (N, 3, 8, 8). Let the layer before make "
         "only what is read, or a layer for each part.")),
        (lambda m, x: x + x.mean(), {},
         ("mean: A mean is taken over rows and columns of feature maps. This one has dim=() on (N, 3, 8, 8). Use "
         "dim=(2, 3).")),
        (lambda m, x: F.log_softmax(x, 1), {},
         ("log_softmax: An operator has an integer form. There is none for log_softmax. Return the logits: losses and "
         "the host apply it.")),
        (lambda m, x: x * 2, {},
         ("mul: A product has two tensors of one shape, or a tensor and one factor per channel, (N, C, 1, 1). This one "
         "multiplies by 2. Give the operands such shapes in the layers before; fold constants into the weights "
         "there.")),
        (lambda m, x: x / 2, {},
         ("div: An operator has an integer form. There is none for div. Fold constants into the weights of the layer "
         "before.")),
        (lambda m, x: m.t(x), {"t": nn.ConvTranspose2d(3, 3, 2)},
         "t: An operator has an integer form. There is none for conv_transpose2d. Use nn.Conv2d."),
        (lambda m, x: m.c(x.flatten(2)), {"c": nn.Conv1d(3, 3, 1)},
         "c: An operator has an integer form. There is none for conv1d. Use nn.Conv2d."),
        (lambda m, x: m.c(x[:, :, None]), {"c": nn.Conv3d(3, 3, 1)},
         "c: An operator has an integer form. There is none for conv3d. Use nn.Conv2d."),
        (lambda m, x: m.c(x), {"c": nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")},
         ("c: An operator has an integer form. There is none for pad. Use the padding of the convolution or pool "
         "behind it, with zeros.")),
        (lambda m, x: m.n(x), {"n": nn.GroupNorm(1, 3)},
         "n: An operator has an integer form. There is none for group_norm. Use nn.BatchNorm2d behind a convolution."),
        (lambda m, x: F.max_pool2d(x, 2, return_indices=True), {},
         ("max_pool2d_with_indices: An operator has an integer form. There is none for max_pool2d_with_indices. Use "
         "return_indices=False.")),
        (lambda m, x: x.flatten(1) @ m.w.weight, {"w": nn.Linear(5, 192)},
         "matmul: An operator has an integer form. There is none for matmul. Use nn.Linear or nn.Conv2d."),
        (lambda m, x: m.c(m.c(x)), {"c": nn.Conv2d(3, 3, 1)},
         "c: A convolution or linear layer is called once. This one is called 2 times. Use one module for each call."),
        (lambda m, x: m.bn(F.max_pool2d(x, 2)), {"bn": nn.BatchNorm2d(3)},
         ("bn: Batch norm follows a convolution or linear layer whose result nothing else reads. This one follows "
         "max_pool2d. Move it there, or remove it.")),
        (lambda m, x: m.bn(F.relu(x)), {"bn": nn.BatchNorm2d(3)},
         ("bn: Batch norm follows a convolution or linear layer whose result nothing else reads. This one follows "
         "relu. Move it there, or remove it.")),
        (lambda m, x: m.bn(x) + x, {"bn": nn.BatchNorm2d(3)},
         ("bn: Batch norm follows a convolution or linear layer whose result nothing else reads. The result of conv is "
         "read 2 times. Move it there, or remove it.")),
        (lambda m, x: F.relu(x) + x, {},
         ("relu: A ReLU or other clamp follows an operator that computes, and nothing else reads the result before the "
         "clamp. The result of conv is read 2 times. Let the other readers read behind it, or give them a layer of "
         "their own.")),
        (lambda m, x: (F.relu(F.max_pool2d(x, 2)), x), {},
         ("relu: A ReLU or other clamp follows an operator that computes, and nothing else reads the result before the "
         "clamp. The result of conv is read 2 times. Let the other readers read behind it, or give them a layer of "
         "their own.")),
        (lambda m, x: (x.flatten(1), F.relu_(x))[0] + x.flatten(1), {},
         ("add: A tensor that is changed in place has no other view that is read later. This call reads a view of a "
         "tensor that relu has changed. Use inplace=False, or an operator without the underscore.")),
    ],
)  # fmt: skip
def test_violation(tail: Callable[..., Any], modules: dict[str, nn.Module], text: str) -> None:
    assert text in violations(Net(tail, **modules))


class Whole(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def test_models_that_compute_nothing_or_start_with_a_relu() -> None:
    assert violations(Whole(lambda x: x)) == ["model: A model computes something. This one returns its input."]
    assert violations(Whole(F.relu)) == [
        (
            "relu: A ReLU or other clamp follows an operator that computes, and nothing else reads the result before "
            "the clamp. This one follows the input. Let the other readers read behind it, or give them a layer of "
            "their own."
        )
    ]


def test_pools_of_other_than_images() -> None:
    text = (
        "max_pool2d: Convolutions, pools and upsampling work on feature maps of shape (N, C, H, W). This one reads the "
        "shape (N, 3, 64). Keep the four dimensions."
    )
    assert text in violations(Net(lambda m, x: F.max_pool2d(x.flatten(2), 2)))


def test_all_violations_at_once() -> None:
    net = Net(lambda m, x: m.pool(m.g(m.a(x))) + 1, a=nn.ELU(), g=nn.Conv2d(3, 3, 1, padding_mode="circular"),
              pool=nn.AvgPool2d(3, 1, 1, True, False))  # fmt: skip
    assert [v.split(":")[0] for v in violations(net)] == ["a", "g", "pool", "pool", "add"]


def test_models_that_torch_cannot_export() -> None:
    with pytest.raises(
        CompileError, match=r"^model: A model can be exported for any batch size\. torch\.export says: "
    ) as e:
        capture(Net(lambda m, x: x.view(2, -1)), EXAMPLE)
    assert e.value.hint == (
        "The model must run on example_input, take that one argument, and have no control flow that depends on values "
        "or on the batch size."
    )
    with pytest.raises(CompileError, match=r"torch\.export says: .*channels"):
        capture(Net(lambda m, x: x), torch.zeros(1, 5, 8, 8))


def test_outputs_without_a_plain_structure() -> None:
    from collections import namedtuple

    pair = namedtuple("pair", "a b")
    text = (
        "model: A model returns a tensor, or tuples, lists and dicts of tensors. This one returns pair. Return a "
        "tensor, tuple, list or dict."
    )
    assert violations(Net(lambda m, x: pair(x, x))) == [text]


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, not function$"):
        capture(F.relu, EXAMPLE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^example_input must be a torch\.Tensor, not list$"):
        capture(nn.Linear(2, 2), [1])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^example_input must have shape \(N, C, H, W\) or \(N, features\), not \(2,\)$"
    ):
        capture(nn.Linear(2, 2), torch.zeros(2))
