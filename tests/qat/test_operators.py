"""Grouped convolutions, clamps, functions by table, products, concatenations, upsampling: training against integers."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibblecore import ir
from nibblecore.arch import numerics
from nibblecore.errors import CompileError
from nibblecore.frontend.from_torch import FUNCTIONS, FloatLookup
from nibblecore.qat import METHODS, Ema, Override, QConfig, QuantModel, calibrate, convert, prepare
from nibblecore.qat.layers import Grid, QuantOp
from nibblecore.qat.methods import ActQuantizer
from nibblecore.qat.operators import QuantLookup, QuantMul, TableLookup, round_factor

Evaluate = Callable[[ir.Graph, dict[str, Any]], dict[str, Any]]


class Net(nn.Module):
    """Three convolutions of 4 channels, and what the test makes of them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(2 if i == 0 else 4, 4, 3, padding=1) for i in range(3))
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def images(seed: int = 1, size: int = 8, channels: int = 2, count: int = 16) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def ready(net: nn.Module, qconfig: QConfig | None = None, x: Tensor | None = None) -> QuantModel:
    """Prepared, calibrated, in evaluation mode."""
    x = images() if x is None else x
    model = prepare(net, qconfig or QConfig(), x[:1])
    calibrate(model, [x])
    return model.eval()


def quantizer(model: QuantModel, path: str) -> ActQuantizer:
    module = model.get_submodule(path)
    assert isinstance(module, QuantOp)
    return module.grid()


def grids(model: QuantModel) -> dict[str, str]:
    """uint4, int8 and so on by operator."""
    result = {}
    for path, _ in model._plan:
        module = model.get_submodule(path)
        if isinstance(module, QuantOp) and (q := module.output_quantizer) is not None:
            result[path] = f"{'u' if q.unsigned else ''}int{q.bits}"
    return result


# Whole networks ----------------------------------------------------------------------------------------------------


def conv(inputs: int, out: int, kernel: int = 1, stride: int = 1, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), act())


class Yolo(nn.Module):
    """The topology of a small YOLO: CSP block, SPPF, top-down and bottom-up paths with concatenations, two heads."""

    def __init__(self, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 8, 3, 2, act), conv(8, 8, 3, 2, act)
        self.left, self.right, self.join = conv(8, 4, act=act), conv(8, 4, act=act), conv(8, 8, act=act)
        self.inner = nn.Sequential(conv(4, 4, act=act), conv(4, 4, 3, act=act))
        self.last = conv(8, 8, 3, 2, act)
        self.pyramid, self.mix = conv(8, 4, act=act), conv(16, 8, act=act)
        self.pool, self.up = nn.MaxPool2d(5, 1, 2), nn.Upsample(scale_factor=2)
        self.top, self.bottom = conv(16, 8, act=act), conv(8, 8, 3, 2, act)
        self.out = conv(16, 8, act=act)
        self.heads = nn.ModuleList([nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.down(self.stem(x))
        y = self.left(x)
        c3 = self.join(torch.cat([y + self.inner(y), self.right(x)], 1))
        s = self.pyramid(self.last(c3))
        p1 = self.pool(s)
        p2 = self.pool(p1)
        c4 = self.mix(torch.cat([s, p1, p2, self.pool(p2)], 1))
        p3 = self.top(torch.cat([self.up(c4), c3], 1))
        p4 = self.out(torch.cat([self.bottom(p3), c4], 1))
        return [self.heads[0](p3), self.heads[1](p4)]


class Fpn(nn.Module):
    """A feature pyramid: laterals, nearest upsampling, sums, a shared-grid output of two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.c2, self.c3 = conv(3, 6, 3, 2, nn.ReLU), conv(6, 8, 3, 2, nn.ReLU)
        self.l2, self.l3 = nn.Conv2d(6, 5, 1), nn.Conv2d(8, 5, 1)
        self.smooth = nn.Conv2d(5, 5, 3, padding=1)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c2 = self.c2(x)
        p3 = self.l3(self.c3(c2))
        p2 = self.smooth(self.l2(c2) + F.interpolate(p3, size=c2.shape[2:]))
        return self.head(torch.cat([p2, F.interpolate(p3, scale_factor=2)], 1)), p3


def trained(net: nn.Module, qconfig: QConfig, x: Tensor, steps: int = 3) -> QuantModel:
    """With statistics in its batch norms, and after some steps of training."""
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(x)
    model = prepare(net, qconfig, x[:1])
    calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        outputs = model(x)
        sum(y.square().mean() for y in outputs).backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
        assert not missing
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


CASES = {
    "yolo, lsq": (Yolo, QConfig()),
    "yolo, lsq+": (Yolo, QConfig(method="lsq+")),
    "yolo, iao": (Yolo, QConfig(method="iao")),
    "yolo, tqt": (Yolo, QConfig(method="tqt")),
    "yolo, pact": (Yolo, QConfig(method="pact")),
    "yolo, hard-swish, unfolded": (lambda: Yolo(nn.Hardswish), QConfig(batch_norm="unfolded", output_bits=8)),
    "yolo, relu6": (lambda: Yolo(nn.ReLU6), QConfig(residual_bits=4, shortcut_bits=4)),
    "yolo, leaky, all 4 bits": (lambda: Yolo(nn.LeakyReLU), QConfig(first_last_bits=4, method="lsq+")),
    "fpn, lsq": (Fpn, QConfig()),
    "fpn, lsq+, 3 bits": (Fpn, QConfig(method="lsq+", weight_bits=3, act_bits=3)),
    "fpn, 2 bits": (Fpn, QConfig(weight_bits=2, act_bits=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_detectors(case: str, compare: Callable[..., None], evaluate: Evaluate) -> None:
    make, qconfig = CASES[case]
    torch.manual_seed(3)
    x = images(channels=3, size=16, count=8)
    model = trained(make(), qconfig, x)
    graph = convert(model)
    compare(model, graph, x)
    codes = {graph.inputs[0]: ir.quantize(x.numpy(), graph.tensors[graph.inputs[0]])}
    expected = evaluate(graph, codes)
    for name, result in ir.run(graph, codes, keep=True).items():
        assert np.array_equal(result, expected[name]), name
    if make is Yolo:
        assert sum(isinstance(n, ir.Concat) for n in graph.nodes) == 4
        assert sum(isinstance(n, ir.Upsample) for n in graph.nodes) == 1
        assert sum(isinstance(n, ir.Lookup) for n in graph.nodes) == 13


class RandomNet(nn.Module):
    """A seeded chain of the newer constructs."""

    KINDS = ("depthwise", "groups", "act", "squeeze", "product", "concat", "spp", "upsample", "clamp")

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.channels = int(self.rng.integers(2, 5))
        self.stem = nn.Conv2d(2, self.channels, 3, padding=1)
        self.kinds = [str(k) for k in self.rng.choice(self.KINDS, 5)]
        self.layers = nn.ModuleList([self.layer(kind) for kind in self.kinds])
        self.head = nn.Linear(self.channels, 5)

    def layer(self, kind: str) -> nn.Module:
        channels = self.channels
        if kind == "depthwise":
            self.channels *= int(self.rng.integers(1, 3))
            return nn.Conv2d(channels, self.channels, 3, 1, 1, groups=channels)
        if kind == "groups":
            groups = int(self.rng.choice([g for g in range(1, channels + 1) if channels % g == 0]))
            self.channels = groups * int(self.rng.integers(1, 4))
            return nn.Conv2d(channels, self.channels, 1, groups=groups)
        if kind == "act":
            return nn.Sequential(nn.Conv2d(channels, channels, 1), self.activation())
        if kind in ("concat", "spp"):
            self.channels *= 2
        return nn.Conv2d(channels, channels, 1)

    def activation(self) -> nn.Module:
        kinds = (nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.GELU, nn.Mish)
        return kinds[int(self.rng.integers(len(kinds)))]()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if kind == "squeeze":
                x = x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))
            elif kind == "product":
                x = F.hardtanh(layer(x) * x, -1, 2)
            elif kind == "concat":
                x = torch.cat([F.relu(layer(x)), x], 1)
            elif kind == "spp":
                y = F.relu6(layer(x))
                x = torch.cat([y, F.max_pool2d(y, 3, 1, 1)], 1)
            elif kind == "upsample":
                x = F.interpolate(F.avg_pool2d(layer(x), 2), scale_factor=2)
            elif kind == "clamp":
                x = F.hardtanh(layer(x), -0.1, 0.3)
            else:
                x = layer(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed: int, compare: Callable[..., None], evaluate: Evaluate) -> None:
    torch.manual_seed(seed)
    x = images(seed)
    qconfig = [QConfig(), QConfig(method="lsq+"), QConfig(act_bits=8), QConfig(method="iao", first_last_bits=4)][
        seed % 4
    ]
    model = ready(RandomNet(seed), qconfig, x)
    graph = convert(model)
    compare(model, graph, x)
    codes = {graph.inputs[0]: ir.quantize(x.numpy(), graph.tensors[graph.inputs[0]])}
    expected = evaluate(graph, codes)
    for name, result in ir.run(graph, codes, keep=True).items():
        assert np.array_equal(result, expected[name]), f"seed {seed}, {name}"


def test_random_networks_contain_everything() -> None:
    assert {kind for seed in range(20) for kind in RandomNet(seed).kinds} == set(RandomNet.KINDS)


# Clamps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "high"),
    # 15 steps end below 6; and beyond it, with 6 between codes, on a code, and in the middle, which rounds up.
    [(0.3, 15), (0.4, 15), (0.7, 9), (0.75, 8), (0.8, 8)],
)  # fmt: skip
def test_relu6_saturates_at_the_code_of_6(step: float, high: int) -> None:
    model = ready(Net(lambda m, x: m.c(m.b(F.relu6(m.a(x))))))
    with torch.no_grad():
        quantizer(model, "a").step.copy_(torch.tensor(step))
        model.a.weight.mul_(30)
    layer = convert(model).nodes[0]
    assert isinstance(layer, ir.Conv)
    assert (layer.low, layer.high) == (-8, high - 8)
    real = torch.linspace(-3, 20, 1001)
    codes = model.a.finish(real).x / step
    assert torch.equal(codes.round(), torch.floor(real.clamp(0, 6) / step + 0.5).clamp(0, 15))
    assert int(codes.round().max()) == high


def test_clamps_pass_gradients_between_their_limits() -> None:
    model = ready(Net(lambda m, x: m.b(F.hardtanh(m.a(x), -0.5, 0.25))))
    assert grids(model)["a"] == "int8"
    x = torch.tensor([-1.0, -0.4, 0.2, 0.3], requires_grad=True)
    model.a.finish(x).x.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
    layer = convert(model).nodes[0]
    assert isinstance(layer, ir.Conv)
    step = float(quantizer(model, "a").scale().detach())
    assert (layer.low, layer.high) == (math.floor(-0.5 / step + 0.5), math.floor(0.25 / step + 0.5))


# Functions by table ------------------------------------------------------------------------------------------------


def lookup(function: str, **arguments: Any) -> FloatLookup:
    return FloatLookup("act", ("x",), (4,), function, arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("method", ["lsq", "lsq+"])
def test_tables_have_the_values_of_training(function: str, method: str) -> None:
    act = {"leaky_relu": {"negative_slope": 0.01}, "gelu": {"approximate": "none"}}.get(function, {})
    module = QuantLookup(lookup(function, **act), METHODS[method].activations(4, False, 4))
    with torch.no_grad():
        module.grid().set_range(-0.3, 2.0)
    step, zero = 0.031, -17
    table = module.table(step, zero).numpy()
    codes = np.arange(-128, 128)
    real = module.evaluate(torch.from_numpy((codes - zero) * step)).float()
    scale = module.grid().scale().detach()
    low, high = module.grid().low, module.grid().high
    assert np.array_equal(table, torch.floor(real / scale + 0.5).clamp(low, high).numpy())
    x = (torch.from_numpy(codes - zero).float() * torch.tensor(step)).reshape(4, 64)
    got = module(Grid(x, torch.tensor(step)))
    assert np.array_equal((got.x / scale).detach().round().numpy().ravel(), table)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_of_tables_are_the_derivatives(function: str) -> None:
    arguments = {"leaky_relu": {"negative_slope": 0.1}, "gelu": {"approximate": "tanh"}}.get(function, {})
    module = QuantLookup(lookup(function, **arguments), METHODS["lsq"].activations(8, False, 4))
    step = 0.0371
    x = (torch.arange(-200, 200) * step).requires_grad_()
    module.forward = None  # type: ignore[assignment,method-assign] # only the table is looked at
    index = torch.arange(-200, 200, dtype=torch.int32) + module.CODES
    y = TableLookup.apply(x, index, *module.tables(step, x))
    y.sum().backward()
    exact = x.detach().double().requires_grad_()
    module.evaluate(exact).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    smooth = exact.detach().abs() > step / 2  # leaky ReLU has no derivative at 0
    torch.testing.assert_close(x.grad[smooth], exact.grad[smooth].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, module.evaluate(exact).float())


def test_signs_and_widths_around_functions() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.silu(m.a(x))
        z = F.silu(F.relu(m.b(y)))
        gate = torch.sigmoid(m.c(F.adaptive_avg_pool2d(z, 1)))
        return m.d(y * gate)

    for config, index in ((QConfig(), "int8"), (QConfig(act_bits=2, first_last_bits=4), "int8")):
        found = grids(prepare(Net(forward, d=nn.Conv2d(4, 3, 1)), config, images()[:1]))
        bits = config.act_bits
        assert found["a"] == found["c"] == index  # what a table reads
        assert found["b"] == "uint8"
        assert found["silu"] == f"int{bits}"
        assert found["silu_2"] == f"uint{bits}"  # of what is never negative
        assert found["sigmoid"] == "uint8"  # only products read it
        assert found["mul"] == f"int{config.first_last_bits}"
    plus = ready(Net(forward, d=nn.Conv2d(4, 3, 1)), QConfig(method="lsq+"))
    q = quantizer(plus, "silu")
    assert q.affine
    assert 0 < -q.low < 8
    assert float(q.scale().detach()) * q.low > -0.4  # SiLU is above -0.2785
    assert not quantizer(plus, "sigmoid").affine


def test_the_index_of_a_table_has_8_bits_whatever_is_set() -> None:
    net = Net(lambda m, x: m.b(F.silu(m.a(x))))
    some = QConfig(overrides=(Override(pattern="*", act_bits=4),))
    assert grids(prepare(net, some, images()[:1]))["a"] == "int8"
    only = QConfig(overrides=(Override(pattern="a", act_bits=4),))
    text = r"^act_bits of override 'a' must be 8, not 4: a is the index of a table, that of silu at silu$"
    with pytest.raises(ValueError, match=text):
        prepare(net, only, images()[:1])
    start = Net(lambda m, x: m.a(F.silu(x)))
    assert prepare(start, QConfig(first_last_bits=4), images()[:1]).x.bits == 8
    with pytest.raises(ValueError, match=r"^act_bits of override 'x' must be 8, not 4: x is the index of a table"):
        prepare(start, QConfig(overrides=(Override(pattern="x", act_bits=4),)), images()[:1])


# Products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_factor_of_a_product_is_the_integers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(200):
        a, b, y = (torch.tensor(float(2 ** rng.uniform(low, 3))) for low in (-20, -20, -7))
        k, n = numerics.mul_factor(float(a), float(b), float(y))
        got = float(round_factor(a, b, y)) * float(a) * float(b) / float(y)
        assert got == pytest.approx(k / 2**n, rel=1e-12), f"seed {seed}"
    edge = torch.tensor(2.0 - 2.0**-16)  # 2**15 - 1/4 rounds to a number of 16 bits
    assert numerics.mul_factor(float(edge), 1.0, 1.0) == (16384, 13)
    assert float(round_factor(edge, 1.0, torch.tensor(1.0)) * edge) == 2.0


def test_a_product_beyond_its_record() -> None:
    model = ready(Net(lambda m, x: m.b(m.a(x) * m.b2(x)), b2=nn.Conv2d(2, 4, 3, padding=1)))
    assert isinstance(model.mul, QuantMul)
    with torch.no_grad():
        quantizer(model, "mul").step.fill_(1e-7)
        quantizer(model, "a").step.fill_(1.0)
    text = (
        r"(?m)^mul: The factor of a product is below 16384\. This one is [\d.e+]+\. Calibrate again: the step of the "
        r"product is far too small for its values\.$"
    )
    with pytest.raises(CompileError, match=text):
        convert(model)


# Shared grids ------------------------------------------------------------------------------------------------------


def joined(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    z = m.b(y)
    return m.e(m.d(torch.cat([F.max_pool2d(z, 3, 1, 1), y], 1)) + m.c(z))


def joined_model(qconfig: QConfig | None = None) -> QuantModel:
    return prepare(Net(joined, d=nn.Conv2d(8, 4, 1), e=nn.Conv2d(4, 2, 1)), qconfig or QConfig(), images()[:1])


def test_what_is_concatenated_shares_one_quantizer() -> None:
    model = joined_model()
    shared = quantizer(model, "a")
    assert quantizer(model, "b") is shared
    assert quantizer(model, "c") is not shared
    assert not shared.unsigned  # b has negative values
    assert shared.features == 2 * 4 * 64  # LSQ's N: the values that share the step
    # Once among the submodules, parameters and state: at the first that has it.
    assert [n for n, m in model.named_modules(remove_duplicate=False) if m is shared] == ["a.output_quantizer"]
    state = model.state_dict()
    assert "a.output_quantizer.step" in state
    assert "b.output_quantizer.step" not in state
    calibrate(model, [images()])
    graph = convert(model)
    cat = next(n for n in graph.nodes if isinstance(n, ir.Concat))
    assert len({(graph.tensors[n].bits, graph.tensors[n].scale, graph.tensors[n].zero) for n in cat.inputs}) == 1
    first = graph.nodes[0]
    assert isinstance(first, ir.Conv)
    assert (first.low, first.high) == (0, 7)  # its ReLU, on a signed grid
    assert {name for name in model.state_dict()} == set(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "Ema"])
def test_copies_share_as_the_original_does(how: str) -> None:
    model = joined_model()
    calibrate(model, [images()])
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "Ema":
        other = Ema(model).model  # type: ignore[assignment]
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert quantizer(other, "a") is quantizer(other, "b")
    assert quantizer(other, "a") is not quantizer(model, "a")
    assert other._shared == (quantizer(other, "a"),)
    x = images()
    assert torch.equal(other.eval()(x), model.eval()(x))
    with torch.no_grad():
        quantizer(other, "b").step.mul_(3)  # type: ignore[operator]
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_an_average_moves_a_shared_step_once() -> None:
    model = joined_model()
    calibrate(model, [images()])
    ema = Ema(model, decay=0.5, ramp=0)
    with torch.no_grad():
        quantizer(model, "a").step.fill_(3.0)
    before = float(quantizer(ema.model, "b").step)  # type: ignore[arg-type]
    ema.update(model)
    assert float(quantizer(ema.model, "b").step) == pytest.approx((before + 3.0) / 2)  # type: ignore[arg-type]


def test_switches_find_a_shared_grid_under_the_path_of_each() -> None:
    model = joined_model()
    model.disable_fake_quant("b", weights=False)
    assert not quantizer(model, "a").fake_quant_enabled
    assert quantizer(model, "c").fake_quant_enabled
    model.enable_fake_quant("a", weights=False)
    assert quantizer(model, "b").fake_quant_enabled


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [("minmax", (-3.0, 9.0)), ("mean_range", (-2.0, 7.0))],
)  # fmt: skip
def test_a_shared_grid_is_calibrated_on_all_its_parts(calibration: str, expected: tuple[float, float]) -> None:
    model = joined_model(QConfig(method="lsq+", calibration=calibration, act_bits=8))
    seen: list[tuple[float, float]] = []
    shared = quantizer(model, "a")
    shared.set_range = lambda low, high: seen.append((low, high))  # type: ignore[method-assign]
    shared.observer_enabled, shared.fake_quant_enabled = True, False
    for low, high in ((-1.0, 5.0), (-3.0, 9.0)):
        shared(torch.tensor([0.0, high]))  # a has a ReLU
        shared(torch.tensor([low, 1.0]))
        shared.follow_parts()
    shared.finish()
    assert seen == [expected]


def test_ranges_of_a_shared_grid_follow_all_its_parts_once_per_pass() -> None:
    model = joined_model(QConfig(method="iao"))
    calibrate(model, [images()])
    shared = quantizer(model, "a")
    start = shared.range.clone()  # type: ignore[operator, union-attr]
    x = 2 * images(2)
    seen: list[Tensor] = []
    follow = shared.follow
    shared.follow = lambda t: (seen.append(t), follow(t))[0]  # type: ignore[method-assign, assignment, func-returns-value]
    shared.parts_seen.append(torch.full((1,), 1e9))  # of a pass that was interrupted
    model.train()
    with torch.no_grad():
        values = model._execute(x)
    assert len(seen) == int(shared.seen) == 1  # type: ignore[arg-type]
    assert seen[0].numel() == 2 * 16 * 4 * 64
    # Both were quantized with the range before.
    assert values["a"].step == values["b"].step
    low, high = seen[0].clamp(max=0).min(), seen[0].max()
    torch.testing.assert_close(shared.range, 0.99 * start + 0.01 * torch.stack([low, high]))


def test_bits_of_a_shared_grid() -> None:
    # b alone would have 4 bits; a sum alone would give it 8; the widest wins.
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(x)))
        z = F.silu(m.c(y))
        return m.e(m.d(torch.cat([y, z], 1)))

    extra = {"d": nn.Conv2d(8, 4, 1), "e": nn.Conv2d(4, 2, 1)}
    assert {grids(prepare(Net(forward, **extra), QConfig(), images()[:1]))[n] for n in ("b", "silu")} == {"int4"}
    eight = QConfig(overrides=(Override(pattern="silu", act_bits=8),))
    assert {grids(prepare(Net(forward, **extra), eight, images()[:1]))[n] for n in ("b", "silu")} == {"int8"}
    both = QConfig(overrides=(Override(pattern="silu", act_bits=8), Override(pattern="b", act_bits=3)))
    text = (
        r"^b and silu are concatenated and share a grid, but overrides give them act_bits 3 and 8; they must be the "
        r"same$"
    )
    with pytest.raises(ValueError, match=text):
        prepare(Net(forward, **extra), both, images()[:1])
    with pytest.raises(ValueError, match=r"share a grid, but overrides give them method 'lsq' and 'lsq\+'; they"):
        prepare(Net(forward, **extra), QConfig(overrides=(Override(pattern="silu", method="lsq+"),)), images()[:1])

    def indexed(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(x)))
        return m.d(F.silu(torch.cat([y, m.c(y)], 1)))

    found = grids(prepare(Net(indexed, **extra), QConfig(), images()[:1]))
    assert found["b"] == found["c"] == "int8"


def test_concatenations_that_meet_share_one_grid() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        b, c = F.relu(m.b(a)), F.relu(m.c(a))
        first = torch.cat([a, F.max_pool2d(b, 3, 1, 1)], 1)
        return m.d(torch.cat([first, F.interpolate(F.max_pool2d(c, 2), scale_factor=2)], 1))

    model = prepare(Net(forward, d=nn.Conv2d(12, 2, 1)), QConfig(), images()[:1])
    assert quantizer(model, "a") is quantizer(model, "b") is quantizer(model, "c")
    assert grids(model)["a"] == "uint8"  # the last layer reads it
    assert model._shared == (quantizer(model, "a"),)
    assert quantizer(model, "a").parts == 3


def test_a_concatenation_with_the_input() -> None:
    text = (
        r"^cat: A concatenation has parts whose common grid can be found in training\. This one joins x, the network's "
        r"input, whose grid is fixed, with a\. Put a convolution between the input and it\.$"
    )
    with pytest.raises(CompileError, match=text):
        prepare(Net(lambda m, x: m.d(torch.cat([F.max_pool2d(x, 3, 1, 1), m.a(x)], 1)), d=nn.Conv2d(6, 2, 1)),
                QConfig(), images()[:1])  # fmt: skip
    alone = Net(lambda m, x: m.d(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)), d=nn.Conv2d(4, 2, 1))
    graph = convert(ready(alone))
    assert [type(n) for n in graph.nodes] == [ir.MaxPool, ir.Concat, ir.Conv]


def test_state_is_complete_before_the_first_pass() -> None:
    torch.manual_seed(0)
    model = prepare(Yolo(), QConfig(), torch.zeros(1, 3, 16, 16))
    keys, parameters = set(model.state_dict()), [id(p) for p in model.parameters()]
    assert len(parameters) == len(set(parameters))
    calibrate(model, [images(channels=3, size=16)])
    model(images(channels=3, size=16))
    assert set(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
