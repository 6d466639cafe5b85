"""Capture a PyTorch model as a list of the operators that the integer graph can express.

:func:`capture` is the first half of :func:`nibblecore.qat.prepare`: ``torch.export`` with a dynamic batch, frozen batch
norm folded, ReLU and other clamps fused into their producers, pass-through operators dropped. Every construct without
an integer form is reported at once. What a particular core cannot run is the compiler's concern, not this module's.
"""

import copy
import dataclasses
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..errors import CompileError

Shape = tuple[int, ...]
"""Sizes without the batch: ``(C, H, W)`` or ``(features,)``."""


@dataclasses.dataclass(frozen=True, eq=False)
class FloatOp:
    """One operator in real arithmetic.

    Parameters
    ----------
    path : str
        Module path in the user's model, made unique; also the name of the tensor that it writes.
    inputs : tuple[str, ...]
        Names of the tensors that it reads: paths of other operators, or the graph's input.
    shape : tuple[int, ...]
        Of the result, without the batch.
    low, high : float
        Clamp that follows at once, ``low <= 0 <= high``: 0 and infinity for a ReLU, 0 and 6 for a ReLU6, -1 and 1 for a
        Hardtanh.
    """

    path: str
    inputs: tuple[str, ...]
    shape: Shape
    low: float = dataclasses.field(default=-math.inf, kw_only=True)
    high: float = dataclasses.field(default=math.inf, kw_only=True)

    @property
    def relu(self) -> bool:
        """Whether negative values become 0."""
        return self.low == 0

    @property
    def clamped(self) -> bool:
        """Whether any clamp follows."""
        return math.isfinite(self.low) or math.isfinite(self.high)


@dataclasses.dataclass(frozen=True, eq=False)
class FloatBatchNorm:
    """A batch norm that was not folded; all tensors have one value per channel."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    momentum: float


@dataclasses.dataclass(frozen=True, eq=False)
class FloatConv(FloatOp):
    """Convolution, or linear layer where ``weight`` has two dimensions; frozen batch norm is folded in, or is ``norm``.

    ``padding`` is top, left, bottom, right; zeros. ``weight`` has ``in / groups`` input channels.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    norm: FloatBatchNorm | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FloatAdd(FloatOp):
    """Sum of two tensors of one shape."""


@dataclasses.dataclass(frozen=True, eq=False)
class FloatMul(FloatOp):
    """Product of two tensors of one shape, or of ``(C, H, W)`` and then ``(C, 1, 1)``."""


@dataclasses.dataclass(frozen=True, eq=False)
class FloatLookup(FloatOp):
    """A function of each value, by name in :data:`FUNCTIONS`, with the operator's other arguments."""

    function: str
    arguments: dict[str, Any]

    @property
    def never_negative(self) -> bool:
        """Whether results are never negative, whatever is read; no function here makes 0 and more negative."""
        return FUNCTIONS[self.function].never_negative

    def evaluate(self, x: Tensor) -> Tensor:
        """The function, without the clamp behind it."""
        result: Tensor = FUNCTIONS[self.function].evaluate(x, **self.arguments)
        return result


@dataclasses.dataclass(frozen=True)
class Function:
    """A scalar function: how torch computes it, and whether its results are never negative."""

    evaluate: Callable[..., Tensor]
    never_negative: bool = False


FUNCTIONS: Final[dict[str, Function]] = {
    "silu": Function(F.silu),
    "sigmoid": Function(torch.sigmoid, never_negative=True),
    "tanh": Function(torch.tanh),
    "hardswish": Function(F.hardswish),
    "hardsigmoid": Function(F.hardsigmoid, never_negative=True),
    "leaky_relu": Function(F.leaky_relu),
    "gelu": Function(F.gelu),
    "mish": Function(F.mish),
}
"""What becomes a lookup table, by the name of its ATen operator. Of 0 and more, none makes negative values."""


@dataclasses.dataclass(frozen=True, eq=False)
class FloatMaxPool(FloatOp):
    """Largest value of each window; ``padding``: rows, columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class FloatAvgPool(FloatOp):
    """Mean of each window, padding included; ``padding``: rows, columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class FloatConcat(FloatOp):
    """Its inputs one behind the other along the channels."""


@dataclasses.dataclass(frozen=True, eq=False)
class FloatUpsample(FloatOp):
    """Every pixel ``factor`` times, rows and columns."""

    factor: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class FloatFlatten(FloatOp):
    """``(C, H, W)`` to ``(C*H*W,)``, which may have ones behind it, as ``(C, 1, 1)``."""


PASS_THROUGH: Final = (FloatMaxPool, FloatFlatten, FloatConcat, FloatUpsample)
"""Operators whose results are values that they read: no arithmetic, no grid of their own."""


@dataclasses.dataclass(frozen=True, eq=False)
class FloatGraph:
    """A captured model.

    Parameters
    ----------
    name : str
        The model's class.
    input : str
        Name of the input tensor: the argument of the model's ``forward``.
    input_shape : tuple[int, ...]
        Without the batch.
    ops : tuple[FloatOp, ...]
        In topological order.
    outputs : Any
        What the model returns, with names of tensors in the place of tensors: a name, or tuples, lists and dicts.
    """

    name: str
    input: str
    input_shape: Shape
    ops: tuple[FloatOp, ...]
    outputs: Any

    def readers(self, name: str) -> list[FloatOp]:
        """The operators that read a tensor, once for each time that they do."""
        return [op for op in self.ops for n in op.inputs if n == name]


def leaves(structure: Any) -> list[str]:
    """The names in :attr:`FloatGraph.outputs`, in order, each once."""
    if isinstance(structure, str):
        return [structure]
    parts = structure.values() if isinstance(structure, dict) else structure or ()
    return list(dict.fromkeys(name for part in parts for name in leaves(part)))


def replace_leaves(structure: Any, values: dict[str, Any]) -> Any:
    """:attr:`FloatGraph.outputs` with ``values[name]`` in the place of each name."""
    if isinstance(structure, str):
        return values[structure]
    if isinstance(structure, dict):
        return {key: replace_leaves(part, values) for key, part in structure.items()}
    if isinstance(structure, (tuple, list)):
        return type(structure)([replace_leaves(part, values) for part in structure])
    return structure


def capture(model: nn.Module, example_input: Tensor, *, fold: bool = True) -> FloatGraph:
    """Export ``model`` in evaluation mode and reduce it to integer-expressible operators.

    Parameters
    ----------
    model : nn.Module
        Left as it is; its batch norms are folded with the statistics that they have now.
    example_input : Tensor
        ``(N, C, H, W)`` or ``(N, features)``; only its shape matters, and the batch stays dynamic.
    fold : bool
        Whether batch norms go into weights and biases, or stay, as :attr:`FloatConv.norm`.

    Raises
    ------
    TypeError, ValueError
        Arguments that are no module or no such tensor.
    CompileError
        Every unsupported construct at once: module path, rule, value and what to change.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"example_input must be a torch.Tensor, not {type(example_input).__name__}")
    if example_input.ndim not in (2, 4) or 0 in example_input.shape:
        raise ValueError(
            f"example_input must have shape (N, C, H, W) or (N, features), not {tuple(example_input.shape)}"
        )
    reader = _Reader(model, example_input)
    fused = _fuse(reader.ops, leaves(reader.outputs), reader.violations, fold)
    if not reader.violations and not fused.ops:
        reader.violations.append("model: A model computes something. This one returns its input.")
    if reader.violations:
        raise CompileError(reader.violations)
    outputs = replace_leaves(reader.outputs, {name: fused.alias(name) for name in leaves(reader.outputs)})
    ops = tuple(fused.ops.values())
    return FloatGraph(type(model).__name__, reader.input, tuple(example_input.shape[1:]), ops, outputs)


# Rules -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an ATen operator, as the rules see it.

    Parameters
    ----------
    path : str
        Module path in the user's model.
    target : str
        The operator, as in ``conv2d``.
    args : dict[str, Any]
        Every argument by its name in the operator's schema, defaults included.
    shapes : dict[str, tuple[int, ...]]
        Shape, batch left out, of every argument that is a tensor, and of those in lists as ``tensors[0]``.
    shape : tuple[int, ...]
        Shape of the result, batch left out; empty where there is none.
    parameters : dict[str, str]
        Arguments that are parameters or buffers of the model: their names in its ``state_dict``.
    """

    path: str
    target: str
    args: dict[str, Any]
    shapes: dict[str, Shape]
    shape: Shape
    parameters: dict[str, str]


Rule = Callable[[Call], str | None]
"""A support rule: what is wrong with the call, as a sentence, or None. Its docstring states the rule and, in its second
paragraph, what to change."""


def explain(path: str, rule: Callable[..., Any], why: str, change: str | None = None) -> str:
    """The text of a violation: path, rule, value, what to change."""
    parts = [" ".join(p.split()) for p in (inspect.getdoc(rule) or "").split("\n\n")]
    return f"{path}: {parts[0]} {why} {change or parts[1]}"


def rule_weight_is_a_parameter(call: Call) -> str | None:
    """The weight of a convolution or linear layer is a parameter of the model.

    Remove parametrizations (weight norm, masks), or store their result as the weight.
    """
    return None if "weight" in call.parameters else "The weight of this one is computed."


def rule_bias_is_a_parameter(call: Call) -> str | None:
    """The bias of a convolution or linear layer is a parameter of the model.

    Store the result of the computation as the bias.
    """
    missing = call.args["bias"] is not None and "bias" not in call.parameters
    return "The bias of this one is computed." if missing else None


def rule_linear_input(call: Call) -> str | None:
    """A linear layer reads vectors of shape (N, features).

    Flatten its input, or use a 1x1 convolution.
    """
    shape = call.shapes["input"]
    return None if len(shape) == 1 else f"This one reads the shape {_with_batch(shape)}."


def rule_frozen_batch_norm(call: Call) -> str | None:
    """Batch norm uses stored statistics in evaluation mode.

    Use track_running_stats=True, and pass training=self.training to functional batch norms.
    """
    frozen = not call.args["training"] and {"running_mean", "running_var"} <= call.parameters.keys()
    return None if frozen else "This one normalizes with the statistics of each batch."


def rule_no_dropout_in_evaluation(call: Call) -> str | None:
    """Dropout does nothing in evaluation mode.

    Use nn.Dropout, or pass training=self.training to functional dropouts.
    """
    return "This one drops values there too." if call.args["train"] else None


def rule_add_operands(call: Call) -> str | None:
    """A sum has two tensors of one shape.

    Give both operands that shape in the layers before; put constants into a bias.
    """
    if "other" not in call.shapes:
        return f"This one adds the constant {call.args['other']}."
    a, b = call.shapes["self"], call.shapes["other"]
    return None if a == b else f"This one has {_with_batch(a)} and {_with_batch(b)}."


def rule_add_alpha(call: Call) -> str | None:
    """A sum weighs both operands alike.

    Leave out alpha and scale the weights of the layer before.
    """
    return None if call.args["alpha"] == 1 else f"This one has alpha={call.args['alpha']}."


def rule_mul_operands(call: Call) -> str | None:
    """A product has two tensors of one shape, or a tensor and one factor per channel, (N, C, 1, 1).

    Give the operands such shapes in the layers before; fold constants into the weights there.
    """
    if len(call.shapes) < 2:
        other = call.parameters.get("other") or call.parameters.get("self")
        return f"This one multiplies by {f'the parameter {other}' if other else call.args['other']}."
    a, b = call.shapes["self"], call.shapes["other"]
    if a == b or _is_factor(a, b) or _is_factor(b, a):
        return None
    return f"This one has {_with_batch(a)} and {_with_batch(b)}."


def _is_factor(shape: Shape, of: Shape) -> bool:
    """Whether ``shape`` is one value per channel of maps of shape ``of``."""
    return len(of) == 3 and shape == (of[0], 1, 1)


def rule_clamp_limits(call: Call) -> str | None:
    """A clamp has numbers for limits, with 0 between them.

    Use min <= 0 and max >= 0, as nn.ReLU, nn.ReLU6 and nn.Hardtanh do.
    """
    low, high = _clamp_limits(call)
    if any(isinstance(v, (Tensor, fx.Node)) for v in (low, high)):
        return "The limits of this one are tensors."
    return None if low <= 0 <= high and low < high else f"This one has {low:g} and {high:g}."


def _clamp_limits(call: Call) -> tuple[Any, Any]:
    """Lowest and highest value of ``hardtanh`` and ``clamp``."""
    names = ("min_val", "max_val") if "min_val" in call.args else ("min", "max")
    low, high = (call.args.get(name) for name in names)
    return -math.inf if low is None else low, math.inf if high is None else high


def rule_concat_channels(call: Call) -> str | None:
    """A concatenation joins tensors along their channels.

    Use dim=1.
    """
    along = call.args["dim"] % (len(call.shape) + 1)
    return None if along == 1 else f"This one has dim={call.args['dim']}."


def rule_upsample_factor(call: Call) -> str | None:
    """Upsampling repeats each pixel a whole number of times.

    Use mode="nearest" with an integer scale_factor.
    """
    (rows, cols), (out_rows, out_cols) = call.shapes["input"][-2:], call.shape[-2:]
    whole = out_rows % rows == 0 and out_cols % cols == 0
    return None if whole else f"This one makes {out_rows}x{out_cols} out of {rows}x{cols}."


def rule_floor_mode(call: Call) -> str | None:
    """Windows that reach over the edge are dropped.

    Use ceil_mode=False, with more padding where the shape must stay.
    """
    return "This one has ceil_mode=True." if call.args["ceil_mode"] else None


def rule_average_counts_padding(call: Call) -> str | None:
    """An average pool divides by its whole window.

    Use count_include_pad=True, or padding=0.
    """
    bad = any(call.args["padding"]) and not call.args["count_include_pad"]
    return f"This one has padding={tuple(call.args['padding'])} and count_include_pad=False." if bad else None


def rule_no_divisor(call: Call) -> str | None:
    """An average pool divides by its whole window.

    Leave out divisor_override and scale the weights of the layer behind.
    """
    divisor = call.args["divisor_override"]
    return None if divisor is None else f"This one has divisor_override={divisor}."


def rule_adaptive_size(call: Call) -> str | None:
    """An adaptive average pool has equal windows: its output size divides the input size.

    Use an output size of 1, or avg_pool2d.
    """
    (rows, cols), (out_rows, out_cols) = call.shapes["self"][-2:], call.shape[-2:]
    even = rows % out_rows == 0 and cols % out_cols == 0
    return None if even else f"This one makes {out_rows}x{out_cols} out of {rows}x{cols}."


def rule_mean_over_pixels(call: Call) -> str | None:
    """A mean is taken over rows and columns of feature maps.

    Use dim=(2, 3).
    """
    rank, dims = len(call.shapes["self"]) + 1, call.args.get("dim") or ()
    right = rank == 4 and sorted(d % rank for d in dims) == [2, 3]
    return None if right else f"This one has dim={tuple(dims)} on {_with_batch(call.shapes['self'])}."


def rule_float32(call: Call) -> str | None:
    """Tensors stay float32.

    Remove the conversion.
    """
    dtype = call.args.get("dtype")
    return None if dtype in (None, torch.float32) else f"This call converts to {str(dtype).removeprefix('torch.')}."


def rule_whole_slice(call: Call) -> str | None:
    """A slice takes everything.

    Let the layer before make only what is read, or a layer for each part.
    """
    start, end = call.args["start"] or 0, call.args["end"]
    all_images = start == 0 and (end is None or (isinstance(end, int) and end >= 1 << 62)) and call.args["step"] == 1
    whole = call.shape == call.shapes["self"] and (call.args["dim"] != 0 or all_images)
    return None if whole else f"This one makes {_with_batch(call.shape)} out of {_with_batch(call.shapes['self'])}."


def rule_flatten_all(call: Call) -> str | None:
    """A change of shape flattens whole images to vectors.

    Use torch.flatten(x, 1).
    """
    # (C, 1, 1) is a vector too: squeeze-excite turns one into the other.
    vector = call.shape[:1] == (math.prod(call.shapes["self"]),) and set(call.shape[1:]) <= {1}
    whole = vector or call.shape == call.shapes["self"]
    return None if whole else f"This one makes {_with_batch(call.shape)} out of {_with_batch(call.shapes['self'])}."


def rule_images(call: Call) -> str | None:
    """Convolutions, pools and upsampling work on feature maps of shape (N, C, H, W).

    Keep the four dimensions.
    """
    shape = next(iter(call.shapes.values()))
    return None if len(shape) == 3 else f"This one reads the shape {_with_batch(shape)}."


def rule_known_operator(call: Call) -> str | None:
    """An operator has an integer form."""
    return None if call.target in OPERATORS else f"There is none for {call.target}."


def rule_depends_on_the_input(call: Call) -> str:
    """An operator computes with what depends on the network's input.

    Store the result as a parameter of the layer that reads it.
    """
    return "This one computes with parameters only."


def rule_one_call_per_layer(path: str, count: int) -> str | None:
    """A convolution or linear layer is called once.

    Use one module for each call.
    """
    return None if count == 1 else f"This one is called {count} times."


def rule_batch_norm_follows_convolution(reason: str) -> str:
    """Batch norm follows a convolution or linear layer whose result nothing else reads.

    Move it there, or remove it.
    """
    return reason


def rule_relu_follows_producer(reason: str) -> str:
    """A ReLU or other clamp follows an operator that computes, and nothing else reads the result before the clamp.

    Let the other readers read behind it, or give them a layer of their own.
    """
    return reason


def rule_no_alias_after_change(name: str) -> str:
    """A tensor that is changed in place has no other view that is read later.

    Use inplace=False, or an operator without the underscore.
    """
    return f"This call reads a view of a tensor that {name} has changed."


def _with_batch(shape: Shape) -> str:
    return f"({', '.join(['N', *map(str, shape)])})"


OPERATORS: Final[dict[str, tuple[str, tuple[Rule, ...]]]] = {
    "conv2d": ("conv", (rule_images, rule_weight_is_a_parameter, rule_bias_is_a_parameter)),
    "linear": ("linear", (rule_linear_input, rule_weight_is_a_parameter, rule_bias_is_a_parameter)),
    "batch_norm": ("batch_norm", (rule_frozen_batch_norm,)),
    "relu": ("relu", ()),
    "relu_": ("relu", ()),
    **{name + end: ("clamp", (rule_clamp_limits,)) for name in ("relu6", "hardtanh", "clamp") for end in ("", "_")},
    **{name + end: ("lookup", ()) for name in FUNCTIONS for end in ("", "_")},
    "add": ("add", (rule_add_operands, rule_add_alpha)),
    "add_": ("add", (rule_add_operands, rule_add_alpha)),
    "mul": ("mul", (rule_mul_operands,)),
    "mul_": ("mul", (rule_mul_operands,)),
    "cat": ("concat", (rule_concat_channels,)),
    "upsample_nearest2d": ("upsample", (rule_images, rule_upsample_factor)),
    "_upsample_nearest_exact2d": ("upsample", (rule_images, rule_upsample_factor)),
    "max_pool2d": ("max_pool", (rule_images, rule_floor_mode)),
    "avg_pool2d": ("avg_pool", (rule_images, rule_floor_mode, rule_average_counts_padding, rule_no_divisor)),
    "adaptive_avg_pool2d": ("adaptive_avg_pool", (rule_images, rule_adaptive_size)),
    "mean": ("mean", (rule_mean_over_pixels, rule_float32)),
    "flatten": ("flatten", (rule_flatten_all,)),
    "view": ("flatten", (rule_flatten_all,)),
    "reshape": ("flatten", (rule_flatten_all,)),
    "squeeze": ("flatten", (rule_flatten_all,)),
    "unsqueeze": ("flatten", (rule_flatten_all,)),
    "slice": ("identity", (rule_whole_slice,)),
    "dropout": ("identity", (rule_no_dropout_in_evaluation,)),
    "dropout_": ("identity", (rule_no_dropout_in_evaluation,)),
    "feature_dropout": ("identity", (rule_no_dropout_in_evaluation,)),
    "alias": ("identity", ()),
    "detach": ("identity", ()),
    "contiguous": ("identity", ()),
    "to": ("identity", (rule_float32,)),
    "clone": ("copy", ()),
}
"""ATen operator to kind and rules. Everything else is reported by name."""

_HINTS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (("conv1d", "conv3d"), "Use nn.Conv2d."),
    (("conv_transpose",), "Use nn.Conv2d."),
    (("elu", "prelu", "celu", "selu", "softplus", "softsign"), "Use nn.ReLU, nn.LeakyReLU, nn.SiLU or nn.Hardswish."),
    (("softmax", "log_softmax"), "Return the logits: losses and the host apply it."),
    (("max_pool2d_with_indices",), "Use return_indices=False."),
    (("matmul", "mm", "bmm", "addmm", "einsum"), "Use nn.Linear or nn.Conv2d."),
    (("upsample",), 'Use mode="nearest".'),
    (("expand",), "Leave it out: products spread factors of shape (N, C, 1, 1) over the pixels themselves."),
    (("div", "sub", "neg"), "Fold constants into the weights of the layer before."),
    (("pad", "constant_pad_nd"), "Use the padding of the convolution or pool behind it, with zeros."),
    (("group_norm", "layer_norm", "instance_norm", "rms_norm"), "Use nn.BatchNorm2d behind a convolution."),
    (("dropout",), "Use nn.Dropout."),
)


def _hint(target: str) -> str:
    for names, text in _HINTS:
        if any(target.strip("_").startswith(name) for name in names):
            return text
    supported = (
        "conv2d",
        "linear",
        "batch_norm",
        "relu",
        "clamp",
        *FUNCTIONS,
        "add",
        "mul",
        "cat",
        "interpolate",
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "mean",
        "flatten",
        "dropout",
    )
    return f"The model may use {', '.join(supported)}."


# Reading the exported program --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _BatchNorm(FloatOp):
    """``x * factor + offset`` per channel."""

    factor: Tensor
    offset: Tensor
    norm: FloatBatchNorm


@dataclasses.dataclass(frozen=True, eq=False)
class _Clamp(FloatOp):
    """``low`` and ``high`` are the limits of the operator itself."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Unsupported(FloatOp):
    """Stands for what has been reported, so that the rest can be read."""


@dataclasses.dataclass
class _Ref:
    """What an exported node stands for: the tensor's name, and the storage that in-place operators change."""

    name: str
    storage: int
    stale: str | None = None


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return (int(values[0]), int(values[-1]))


class _Reader:
    """Walks an exported program; fills ``ops`` and ``violations``."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        self.violations: list[str] = []
        self.ops: list[FloatOp] = []
        # The caller keeps its training mode, and a module may change itself while it is traced.
        self.model = copy.deepcopy(model).eval().to("cpu", torch.float32)
        self.program = self._export(example_input)
        self.refs: dict[fx.Node, _Ref] = {}
        self.parameters: dict[fx.Node, str] = {}
        self.paths: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.values: dict[str, Tensor] = {**self.program.state_dict, **self.program.constants}
        signature = self.program.graph_signature
        named = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in named:
                    self.parameters[node] = named[node.name]
                else:
                    self.input = self._unique(str(node.target))
                    self.refs[node] = _Ref(self.input, 0)
            elif node.op == "call_function":
                self._read(node)
            elif node.op == "output":
                self.outputs = self._read_outputs(node)
        for path, count in self.calls.items():
            if (why := rule_one_call_per_layer(path, count)) is not None:
                self.violations.append(explain(path, rule_one_call_per_layer, why))

    def _export(self, example_input: Tensor) -> torch.export.ExportedProgram:
        example = example_input.detach().to("cpu", torch.float32)
        # A batch of one would be taken for a constant.
        example = example[:1].expand(2, *example.shape[1:]).contiguous()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # Of uneven "same" padding, which is what this module turns into four sides.
                warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
                return torch.export.export(self.model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        except Exception as error:  # torch.export raises whatever the model raises, and a dozen classes of its own
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CompileError(
                [f"model: A model can be exported for any batch size. torch.export says: {first.strip()}"],
                hint="The model must run on example_input, take that one argument, and have no control flow that "
                "depends on values or on the batch size.",
            ) from error

    def _read(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        target = node.target
        if not isinstance(value, (Tensor, tuple, list)) or not isinstance(target, torch._ops.OpOverload):
            if any(n in self.refs for n in node.all_input_nodes) and isinstance(value, Tensor):
                self._emit(_Unsupported(self._unique(node.name), (), tuple(value.shape[1:])), node)
            return  # sizes and assertions: no tensors
        name = target._schema.name.removeprefix("aten::")
        call = self._call(node, name)
        kind, rules = OPERATORS.get(name, ("unsupported", ()))
        sources = [n for n in node.all_input_nodes if n in self.refs]
        if kind == "unsupported" and (why := rule_known_operator(call)) is not None:
            found = [explain(call.path, rule_known_operator, why, _hint(name))]
        elif not sources:
            found = [explain(call.path, rule_depends_on_the_input, rule_depends_on_the_input(call))]
        else:
            found = [explain(call.path, rule, why) for rule in rules if (why := rule(call)) is not None]
        for source in sources:
            if (stale := self.refs[source].stale) is not None:
                found.append(explain(call.path, rule_no_alias_after_change, rule_no_alias_after_change(stale)))
        self.violations += found
        if found or not sources:
            if kind in ("conv", "linear") and "weight" in call.parameters:
                self.calls[self._layer_path(call)] += 1
            inputs = tuple(self.refs[n].name for n in sources)
            self._emit(_Unsupported(self._unique(call.path), inputs, call.shape), node)
            return
        getattr(self, f"_{kind}")(node, call)

    def _call(self, node: fx.Node, name: str) -> Call:
        args: dict[str, Any] = {}
        assert isinstance(node.target, torch._ops.OpOverload)
        for index, argument in enumerate(node.target._schema.arguments):
            if index < len(node.args):
                args[argument.name] = node.args[index]
            else:
                args[argument.name] = node.kwargs.get(argument.name, argument.default_value)
        # Of lists of tensors, each item by its number.
        items = {f"{k}[{i}]": a for k, v in args.items() if isinstance(v, (list, tuple)) for i, a in enumerate(v)}
        shapes = {
            k: tuple(a.meta["val"].shape[1:])
            for k, a in (args | items).items()
            if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor) and a not in self.parameters
        }
        parameters = {k: self.parameters[a] for k, a in args.items() if isinstance(a, fx.Node) and a in self.parameters}
        value = node.meta["val"]
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
        return Call(self._path(node, name), name, args, shapes, shape, parameters)

    def _path(self, node: fx.Node, name: str) -> str:
        """The module where it does nothing but this call; else the enclosing module and the operator's name."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]).split("@")[0] if stack else ""
        if path and not any(self.model.get_submodule(path).children()):
            return path
        return f"{path}.{name.strip('_')}".removeprefix(".")

    def _unique(self, path: str) -> str:
        result, count = path, 1
        while result in self.paths:
            count += 1
            result = f"{path}_{count}"
        self.paths.add(result)
        return result

    def _emit(self, op: FloatOp, node: fx.Node, storage_of: fx.Node | None = None) -> None:
        self.ops.append(op)
        storage = len(self.refs) + 1 if storage_of is None else self.refs[storage_of].storage
        self.refs[node] = _Ref(op.path, storage)

    def _source(self, call: Call, name: str) -> str:
        return self.refs[call.args[name]].name

    def _changed_in_place(self, node: fx.Node, call: Call) -> None:
        """Let earlier nodes of the changed storage read the result of an operator with a trailing underscore."""
        if not call.target.endswith("_"):
            return
        old = self.refs[call.args["self"]]
        for other, ref in self.refs.items():
            if other is not node and ref.storage == old.storage:
                same = ref.name == old.name
                self.refs[other] = (
                    _Ref(self.refs[node].name, ref.storage) if same else _Ref(ref.name, ref.storage, call.path)
                )
        self.refs[node].storage = old.storage

    def _value(self, call: Call, name: str) -> Tensor | None:
        return self.values[call.parameters[name]].detach().clone() if name in call.parameters else None

    # One method per kind of OPERATORS.

    def _layer_path(self, call: Call) -> str:
        """Layers are known by their weight: the path without ``.weight``."""
        return call.parameters["weight"].removesuffix(".weight")

    def _conv(self, node: fx.Node, call: Call) -> None:
        weight = self._value(call, "weight")
        assert weight is not None
        dilation, padding = _pair(call.args["dilation"]), call.args["padding"]
        if isinstance(padding, str):
            # "same" puts the odd pixel behind; "valid" pads nothing.
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
            sides = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
        else:
            sides = _pair(padding) * 2
        self._layer(node, call, weight, _pair(call.args["stride"]), sides, dilation, int(call.args["groups"]))

    def _linear(self, node: fx.Node, call: Call) -> None:
        weight = self._value(call, "weight")
        assert weight is not None
        self._layer(node, call, weight)

    def _layer(self, node: fx.Node, call: Call, weight: Tensor, *geometry: Any) -> None:
        path = self._layer_path(call)
        self.calls[path] += 1
        inputs = (self._source(call, "input"),)
        self._emit(
            FloatConv(self._unique(path), inputs, call.shape, weight, self._value(call, "bias"), *geometry), node
        )

    def _batch_norm(self, node: fx.Node, call: Call) -> None:
        mean, var = self._value(call, "running_mean"), self._value(call, "running_var")
        assert mean is not None
        assert var is not None
        gamma, beta = self._value(call, "weight"), self._value(call, "bias")
        factor = (var.double() + call.args["eps"]).rsqrt() * (1.0 if gamma is None else gamma.double())
        offset = (0.0 if beta is None else beta.double()) - mean.double() * factor
        path = call.parameters["running_mean"].removesuffix(".running_mean")
        norm = FloatBatchNorm(gamma, beta, mean, var, float(call.args["eps"]), float(call.args["momentum"]))
        inputs = (self._source(call, "input"),)
        self._emit(_BatchNorm(self._unique(path), inputs, call.shape, factor, offset, norm), node)

    def _relu(self, node: fx.Node, call: Call) -> None:
        self._emit(_Clamp(self._unique(call.path), (self._source(call, "self"),), call.shape, low=0.0), node)
        self._changed_in_place(node, call)

    def _clamp(self, node: fx.Node, call: Call) -> None:
        low, high = (0.0, 6.0) if call.target.startswith("relu6") else map(float, _clamp_limits(call))
        op = _Clamp(self._unique(call.path), (self._source(call, "self"),), call.shape, low=low, high=high)
        self._emit(op, node)
        self._changed_in_place(node, call)

    def _lookup(self, node: fx.Node, call: Call) -> None:
        inputs = (self._source(call, "self"),)
        arguments = {name: value for name, value in call.args.items() if name != "self"}
        function = call.target.removesuffix("_")
        self._emit(FloatLookup(self._unique(call.path), inputs, call.shape, function, arguments), node)
        self._changed_in_place(node, call)

    def _mul(self, node: fx.Node, call: Call) -> None:
        names = ("self", "other") if call.shapes["self"] == call.shape else ("other", "self")
        inputs = tuple(self._source(call, name) for name in names)
        self._emit(FloatMul(self._unique(call.path), inputs, call.shape), node)
        self._changed_in_place(node, call)

    def _concat(self, node: fx.Node, call: Call) -> None:
        inputs = tuple(self.refs[n].name for n in call.args["tensors"])
        if len(inputs) == 1:
            self.refs[node] = _Ref(inputs[0], len(self.refs) + 1)
            return
        self._emit(FloatConcat(self._unique(call.path), inputs, call.shape), node)

    def _upsample(self, node: fx.Node, call: Call) -> None:
        (rows, cols), (out_rows, out_cols) = call.shapes["input"][-2:], call.shape[-2:]
        inputs = (self._source(call, "input"),)
        self._emit(
            FloatUpsample(self._unique(call.path), inputs, call.shape, (out_rows // rows, out_cols // cols)), node
        )

    def _add(self, node: fx.Node, call: Call) -> None:
        inputs = (self._source(call, "self"), self._source(call, "other"))
        self._emit(FloatAdd(self._unique(call.path), inputs, call.shape), node)
        self._changed_in_place(node, call)

    def _max_pool(self, node: fx.Node, call: Call) -> None:
        kernel = _pair(call.args["kernel_size"])
        stride = _pair(call.args["stride"]) if call.args["stride"] else kernel
        self._emit(
            FloatMaxPool(
                self._unique(call.path),
                (self._source(call, "self"),),
                call.shape,
                kernel,
                stride,
                _pair(call.args["padding"]),
                _pair(call.args["dilation"]),
            ),
            node,
        )

    def _avg_pool(self, node: fx.Node, call: Call) -> None:
        kernel = _pair(call.args["kernel_size"])
        stride = _pair(call.args["stride"]) if call.args["stride"] else kernel
        self._average(node, call, kernel, stride, _pair(call.args["padding"]), call.shape)

    def _adaptive_avg_pool(self, node: fx.Node, call: Call) -> None:
        (rows, cols), (out_rows, out_cols) = call.shapes["self"][-2:], call.shape[-2:]
        kernel = (rows // out_rows, cols // out_cols)
        self._average(node, call, kernel, kernel, (0, 0), call.shape)

    def _mean(self, node: fx.Node, call: Call) -> None:
        channels, *kernel = call.shapes["self"]
        self._average(node, call, _pair(kernel), _pair(kernel), (0, 0), (channels, 1, 1))
        if not call.args["keepdim"]:
            inputs = (self.refs[node].name,)
            self._emit(FloatFlatten(self._unique(f"{call.path}.flatten"), inputs, call.shape), node)

    def _average(
        self,
        node: fx.Node,
        call: Call,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        shape: Shape,
    ) -> None:
        inputs = (self._source(call, "self"),)
        self._emit(FloatAvgPool(self._unique(call.path), inputs, shape, kernel, stride, padding), node)

    def _flatten(self, node: fx.Node, call: Call) -> None:
        if call.shape == call.shapes["self"]:
            self._identity(node, call)
        else:
            inputs = (self._source(call, "self"),)
            self._emit(FloatFlatten(self._unique(call.path), inputs, call.shape), node, call.args["self"])

    def _identity(self, node: fx.Node, call: Call) -> None:
        source = next(n for n in node.all_input_nodes if n in self.refs)
        self.refs[node] = dataclasses.replace(self.refs[source])

    def _copy(self, node: fx.Node, call: Call) -> None:
        self.refs[node] = _Ref(self._source(call, "self"), len(self.refs) + 1)

    def _read_outputs(self, node: fx.Node) -> Any:
        names: list[Any] = []
        for value in node.args[0]:  # type: ignore[union-attr] # of an output node it is a tuple
            names.append(self.refs[value].name if isinstance(value, fx.Node) and value in self.refs else None)
        # The tree is rebuilt with names for tensors; None stays where the model returns one.
        structure = torch.utils._pytree.tree_unflatten(names, self.program.call_spec.out_spec)
        if not _is_plain(structure):
            self.violations.append(
                "model: A model returns a tensor, or tuples, lists and dicts of tensors. This one returns "
                f"{type(structure).__name__}. Return a tensor, tuple, list or dict."
            )
            return None
        return structure


def _is_plain(structure: Any) -> bool:
    if structure is None or isinstance(structure, str):
        return True
    if type(structure) in (tuple, list):
        return all(map(_is_plain, structure))
    return type(structure) is dict and all(map(_is_plain, structure.values()))


# Fusing ------------------------------------------------------------------------------------------------------------


class _Fused:
    """Operators in the making: found and replaced by name, and the names of fused operators."""

    def __init__(self, fold: bool) -> None:
        self.fold = fold
        self.ops: dict[str, FloatOp] = {}
        self.aliases: dict[str, str] = {}
        self.unclamped: set[str] = set()
        """Tensors that something else than clamps reads, or different clamps."""

    def alias(self, name: str) -> str:
        while name in self.aliases:
            name = self.aliases[name]
        return name


def _fuse(ops: list[FloatOp], outputs: list[str], violations: list[str], fold: bool) -> _Fused:
    """Fold batch norms into convolutions, or attach them, and clamps into whatever comes before them."""
    fused = _Fused(fold)
    for kind, rule, fuse in (
        (_BatchNorm, rule_batch_norm_follows_convolution, _fuse_batch_norm),
        (_Clamp, rule_relu_follows_producer, _fuse_clamp),
    ):
        # Each round sees the names that the round before has left.
        ops = [dataclasses.replace(op, inputs=tuple(map(fused.alias, op.inputs))) for op in ops]
        reads = Counter([name for op in ops for name in op.inputs] + [fused.alias(name) for name in outputs])
        limits: dict[str, set[tuple[float, float] | None]] = {fused.alias(name): {None} for name in outputs}
        for op in ops:
            for name in op.inputs:
                limits.setdefault(name, set()).add((op.low, op.high) if isinstance(op, _Clamp) else None)
        fused.unclamped = {name for name, found in limits.items() if None in found or len(found) > 1}
        fused.ops = {}
        for op in ops:
            if not isinstance(op, kind):
                fused.ops[op.path] = dataclasses.replace(op, inputs=tuple(map(fused.alias, op.inputs)))
                continue
            source = fused.alias(op.inputs[0])
            if (why := fuse(fused, op, source, op.inputs[0], reads)) is not None:
                violations.append(explain(op.path, rule, rule(why)))
            fused.aliases[op.path] = source
        ops = list(fused.ops.values())
    return fused


def _fuse_batch_norm(fused: _Fused, op: FloatOp, source: str, read: str, reads: Counter[str]) -> str | None:
    assert isinstance(op, _BatchNorm)
    conv = fused.ops.get(source)
    if isinstance(conv, _Unsupported):
        return None
    if not isinstance(conv, FloatConv):
        return f"This one follows {'the input' if conv is None else conv.path}."
    if reads[read] > 1:
        return f"The result of {conv.path} is read {reads[read]} times."
    if not fused.fold:
        if conv.norm is not None:
            return f"{conv.path} has one already."
        fused.ops[source] = dataclasses.replace(conv, norm=op.norm)
        return None
    factor = op.factor.reshape(-1, *[1] * (conv.weight.ndim - 1))
    bias = op.offset if conv.bias is None else conv.bias.double() * op.factor + op.offset
    weight = (conv.weight.double() * factor).to(conv.weight.dtype)
    fused.ops[source] = dataclasses.replace(conv, weight=weight, bias=bias.to(weight.dtype))
    return None


def _fuse_clamp(
    fused: _Fused, op: FloatOp, source: str, read: str, reads: Counter[str], moving: bool = False
) -> str | None:
    """Clamp the producer of ``source``; what is in the way, as a sentence, or None.

    ``moving``: the clamp stood behind a pool or another operator of values that pass through, which is now the one that
    reads ``source``.
    """
    producer = fused.ops.get(source)
    if producer is None:
        return "This one follows the input."
    if isinstance(producer, _Unsupported) or _is_within(fused, producer, op.low, op.high):
        return None
    if read in fused.unclamped and not moving:
        return f"The result of {producer.path} is read {reads[read]} times."
    if isinstance(producer, PASS_THROUGH):
        # The largest of clamped values is the clamped largest, and so on: the clamp moves up.
        for behind in dict.fromkeys(producer.inputs):
            if _is_within(fused, fused.ops.get(behind), op.low, op.high):
                continue
            if reads[behind] > producer.inputs.count(behind):
                return f"The result of {behind} is read {reads[behind]} times."
            if (why := _fuse_clamp(fused, op, behind, behind, reads, moving=True)) is not None:
                return why
        return None
    fused.ops[source] = dataclasses.replace(producer, low=max(producer.low, op.low), high=min(producer.high, op.high))
    return None


def _is_within(fused: _Fused, op: FloatOp | None, low: float, high: float) -> bool:
    """Whether a clamp behind ``op`` would change nothing."""
    if op is None:
        return False
    passes = isinstance(op, PASS_THROUGH)
    within = op.low >= low and op.high <= high
    return within or (passes and all(_is_within(fused, fused.ops.get(name), low, high) for name in op.inputs))


def walk_readers(graph: FloatGraph, name: str) -> Iterator[FloatOp | None]:
    """Who computes with what it reads from tensor ``name``, looking through :data:`PASS_THROUGH`; None: the host."""
    if name in leaves(graph.outputs):
        yield None
    for op in graph.readers(name):
        if isinstance(op, PASS_THROUGH):
            yield from walk_readers(graph, op.path)
        else:
            yield op
