"""From the integer graph to ONNX with 4-bit tensors: QuantizeLinear and DequantizeLinear around ordinary operators.

Weights travel as INT4 or INT8 initializers (2 and 3 bits as INT4), activations as INT4 or INT8 tensors that hold the
*stored codes* of the integer graph. ONNX has unsigned types too; the signed ones with the graph's own zero points need
no conversion anywhere, so a code in the file is the code on the chip.

Two styles:

``"exact"`` (default)
    Computes the integers, bit for bit, in float32 arithmetic. An accumulator is exact while every partial sum is at
    most 2**24 in a unit of a power of two, whatever the order of the additions. Steps in the file are therefore powers
    of two near the real ones, and a multiplication per channel behind each layer, ``mult * 2**-shift`` up to powers of
    two, makes up for that. Two roundings remain: that product's, and the one of QuantizeLinear, which rounds ties to
    the even neighbour where the chip rounds them up. Both are harmless if no sum lies where they matter, and this is
    *proved* for each layer: accumulator and code are integers and the float evaluation is monotone, so only the sums
    at both sides of each of the 15 or 255 steps of a code have to be compared. A fraction of a unit, added to the bias,
    moves sums away from the boundaries. Of a residual sum, all pairs of codes are tried. Layers for which no such
    fraction exists multiply and round in float64, which holds the whole 50-bit product; partial sums beyond 2**24 are
    computed some input channels at a time and added in float64. What this cannot do, thousands of 8-bit taps in one
    channel, stays approximate: :class:`OnnxModel` and the file's metadata name such layers. The runtime must compute in
    float32: TF32 and half precision, which some run on GPUs unasked, must be off.

``"plain"``
    The pattern that other tools look for, with the real steps: DequantizeLinear, operator, QuantizeLinear. Weight
    steps are ``mult * 2**-shift * step_y / step_x``, so the file approximates the integers, not the network before its
    multipliers were rounded. A code differs by one where float32, or the rule for ties, takes the other neighbour.
    ONNX Runtime (1.31) replaces the pattern by integer operators that do not exist for 4 bits, and then refuses the
    model, unless the session option ``session.disable_quant_qdq`` is "1".

What holds for both: tensors are called after module paths, ``<path>.codes`` the stored codes and ``<path>.value`` their
real values in the file's steps; inputs and outputs of the model are real numbers called ``<path>`` of shape
``(N, C, H, W)``, or ``(N, C)`` where an output is a vector. The batch ``N`` is free.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..arch import numerics
from ..errors import CompileError, ToolchainError
from ..files import write_atomically
from ..ir.graph import (
    AvgPool,
    ChannelMul,
    Concat,
    Conv,
    Flatten,
    Graph,
    Lookup,
    MaxPool,
    Node,
    ResidualAdd,
    TensorType,
    Upsample,
)
from ..ir.verify import accumulator_range, verify

Style = Literal["exact", "plain"]
Inputs = Literal["real", "codes"]
Exactness = Literal["float32", "float64", "approximate"]

OPSET: Final = 21
"""The first operator set with 4-bit integers."""
_IR_VERSION: Final = 10
_EXACT: Final = 1 << 24
"""Integers up to this are exact in float32."""
_FRACTION_BITS: Final = 12
"""Finest offset of a bias that is tried, as a power of two."""
_LARGEST_FACTOR_ERROR: Final = 2.0**-13
"""A factor next to 1 that the plain style leaves out: it moves a 4-bit code by less than 1/500."""


@dataclasses.dataclass(frozen=True)
class OnnxModel:
    """An exported network.

    Parameters
    ----------
    data : bytes
        The file's contents.
    exactness : dict[str, str]
        For every node's path: the arithmetic in which it gives the integers' codes from the integers' inputs, "float32"
        or "float64", or "approximate".
    values : dict[str, tuple[str, float64 array, int]]
        For every tensor of the graph that the model gives as an output: the output's name, and step (per channel for
        32-bit tensors) and zero point, with ``code = value / step + zero``.
    """

    data: bytes
    exactness: dict[str, Exactness]
    values: dict[str, tuple[str, npt.NDArray[np.float64], int]]


def export_onnx(graph: Graph, path: str | Path, *, style: Style = "exact", inputs: Inputs = "real") -> OnnxModel:
    """Write ``graph`` as an ONNX file, under a temporary name first; see :func:`to_onnx`.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    result = to_onnx(graph, style=style, inputs=inputs)
    write_atomically(Path(path), result.data)
    return result


def to_onnx(graph: Graph, *, style: Style = "exact", inputs: Inputs = "real", every_tensor: bool = False) -> OnnxModel:
    """The ONNX model of an integer graph, checked by the ``onnx`` package.

    Parameters
    ----------
    graph : Graph
    style : {"exact", "plain"}
        See above.
    inputs : {"real", "codes"}
        Real numbers, quantized in the model (in the exact style in float64, as :func:`nibblecore.ir.quantize` does), or
        stored codes as INT8.
    every_tensor : bool
        Give the values of every tensor as outputs, not those of the graph's outputs only.

    Raises
    ------
    CompileError
        Nodes that the export does not know, all at once.
    GraphError
        A graph that breaks the rules.
    ToolchainError
        The package ``onnx`` is not installed.
    """
    for name, value, allowed in (("style", style, ("exact", "plain")), ("inputs", inputs, ("real", "codes"))):
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, not {value!r}")
    onnx = import_onnx("onnx")
    verify(graph)
    violations = [
        f"{node.path}: {type(node).__name__} has no translation to ONNX."
        for node in graph.nodes
        if type(node) not in _EMIT
    ]
    violations += [
        f"{name} is an input and an output of the network." for name in graph.outputs if name in graph.inputs
    ]
    if violations:
        raise CompileError(violations)
    return _Writer(graph, onnx, style, inputs, every_tensor).result


def import_onnx(name: str) -> Any:
    """The package ``onnx`` or ``onnxruntime``; :class:`ToolchainError` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ToolchainError(
            f"ONNX models need the package {name!r}, which is not installed or does not load: {error}.",
            hint="Install: pip install 'nibblecore[onnx]'",
        ) from None


# Proofs ------------------------------------------------------------------------------------------------------------


def power_of_two(scale: float) -> float:
    """The power of two nearest to ``scale`` in ratio."""
    return float(2.0 ** round(math.log2(scale)))


@dataclasses.dataclass(frozen=True)
class Requantizer:
    """What makes float32 give the codes of a requantization: ``rint((total + offset) * factor)``, one rounding each.

    Parameters
    ----------
    factor : float32 array
        Per channel.
    offset : float64 array
        Per channel: multiples of a power of two that leave ``total + offset`` exact.
    """

    factor: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float64]


def prove(
    mult: npt.NDArray[np.int64],
    shift: npt.NDArray[np.int64],
    lowest: npt.NDArray[np.int64],
    highest: npt.NDArray[np.int64],
    magnitude: npt.NDArray[np.int64],
    clamp: tuple[int, int],
) -> Requantizer | None:
    """Factors and offsets with which float32 equals :func:`nibblecore.arch.numerics.requantize` for every total.

    Parameters
    ----------
    mult, shift : int64 arrays ``(channels,)``
    lowest, highest : int64 arrays ``(channels,)``
        Totals ``acc + bias`` that can occur.
    magnitude : int64 array ``(channels,)``
        Bound of every partial sum; ``magnitude * 2**bits`` of at most 2**24 leaves room for that many bits of offset.
    clamp : tuple[int, int]
        Lowest and highest code, less the zero point.

    Returns
    -------
    Requantizer or None
        None where no offset was found for some channel.
    """
    # code(t) >= k, for a positive multiplier, from t = ceil((2*k - 1) * 2**(shift-1) / mult) on; for a negative one up
    # to the floor of that. `before` and `after` are the integers at both sides of each boundary.
    k = np.arange(clamp[0] + 1, clamp[1] + 1, dtype=np.int64)[None]
    divisor = np.where(mult == 0, 1, mult)[:, None]
    numerator = (2 * k - 1) << (shift[:, None] - 1)
    floor = numerator // divisor
    remainder = (numerator - floor * divisor) / divisor  # of the boundary, in units of a total, 0 <= remainder < 1
    rising = divisor > 0
    upper = np.where(rising & (remainder == 0), floor, floor + 1)
    lower = upper - 1
    # The offset must move `upper` beyond the boundary and leave `lower` in front of it.
    boundary = floor - lower + remainder  # relative to `lower`: in (0, 1], or in [0, 1) for a falling staircase
    crossed = (lower >= lowest[:, None]) & (upper <= highest[:, None]) & (mult != 0)[:, None]
    least = np.where(crossed, boundary - 1, -1.0).max(axis=1, initial=-1.0)
    most = np.where(crossed, boundary, 1.0).min(axis=1, initial=1.0)
    middle = (least + most) / 2
    points = np.concatenate([lowest[:, None], highest[:, None], np.where(crossed, lower, lowest[:, None]),
                             np.where(crossed, upper, highest[:, None])], axis=1)  # fmt: skip
    wanted = numerics.clamp(numerics.requantize(points, 0, mult[:, None], shift[:, None]), *clamp)
    factor = np.ldexp(mult.astype(np.float64), -shift).astype(np.float32)
    offset = np.zeros(len(mult))
    unproved = np.ones(len(mult), dtype=bool)
    for bits in range(_FRACTION_BITS + 1):
        (todo,) = np.nonzero(unproved & (magnitude <= _EXACT >> bits))
        if not todo.size:
            break
        candidate = np.rint(np.ldexp(middle[todo], bits)) / (1 << bits)
        total = (points[todo] + candidate[:, None]).astype(np.float32)  # exact, see magnitude
        codes = numerics.clamp(np.rint(total * factor[todo, None]), *clamp)
        proved = (codes == wanted[todo]).all(axis=1)
        offset[todo[proved]] = candidate[proved]
        unproved[todo[proved]] = False
    return None if unproved.any() else Requantizer(factor, offset)


# The writer --------------------------------------------------------------------------------------------------------


class _Writer:
    """Builds the model, node by node; ``result`` is the outcome."""

    def __init__(self, graph: Graph, onnx: Any, style: Style, inputs: Inputs, every_tensor: bool) -> None:
        self.graph, self.onnx, self.exact = graph, onnx, style == "exact"
        self.types, self.helper = onnx.TensorProto, onnx.helper
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.exactness: dict[str, Exactness] = {}
        self.values: dict[str, tuple[str, npt.NDArray[np.float64], int]] = {}
        self.dequantized: set[str] = set()
        self.wide: set[str] = set()  # 32-bit tensors that are float64
        sources = [self._input(name, inputs) for name in graph.inputs]
        for node in graph.nodes:
            self.exactness[node.path] = _EMIT[type(node)](self, node)
        results = [self._output(name) for name in graph.outputs]
        if every_tensor:
            results += [self._watch(name) for name in graph.tensors]
        self.result = OnnxModel(self._model(sources, results, style), self.exactness, self.values)

    def _model(self, inputs: list[Any], outputs: list[Any], style: Style) -> bytes:
        tensors = {
            name: {"shape": t.shape, "bits": t.bits, "scale": t.scale, "zero": t.zero}
            for name, t in self.graph.tensors.items()
        }
        graph = self.helper.make_graph(
            self.nodes, self.graph.name, inputs, outputs, list(self.initializers.values()),
            doc_string="Stored codes are <path>.codes; their real steps and zero points are in the metadata.",
        )  # fmt: skip
        model = self.helper.make_model(
            graph,
            opset_imports=[self.helper.make_opsetid("", OPSET)],
            ir_version=_IR_VERSION,
            producer_name="nibblecore",
            producer_version=__version__,
        )
        facts = {"name": self.graph.name, "style": style, "tensors": tensors, "exactness": self.exactness}
        for key, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value)
            model.metadata_props.add(key=f"nibblecore.{key}", value=text)
        self.onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    # Pieces ----------------------------------------------------------------------------------------------------

    def op(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add one node; returns its output's name."""
        self.nodes.append(self.helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: Any, kind: str = "FLOAT") -> str:
        """Add an initializer; returns its name. INT4 values are packed two to a byte, the first in the low bits."""
        array = np.asarray(values)
        dtype = {"FLOAT": "<f4", "DOUBLE": "<f8", "INT8": "<i1", "INT64": "<i8", "INT4": "<i1"}[kind]
        data = np.ascontiguousarray(array, dtype).reshape(-1)
        if kind == "INT4":
            even = np.append(data, np.zeros(len(data) % 2, np.int8)).view(np.uint8).reshape(-1, 2) & 15
            data = even[:, 0] | even[:, 1] << 4
        tensor = self.helper.make_tensor(name, getattr(self.types, kind), array.shape, data.tobytes(), raw=True)
        self.initializers[name] = tensor
        return name

    def step(self, tensor: TensorType) -> float:
        """The step of a 4- or 8-bit tensor in the file."""
        assert isinstance(tensor.scale, float)
        return power_of_two(tensor.scale) if self.exact else float(np.float32(tensor.scale))

    def _kind(self, bits: int) -> str:
        return "INT4" if bits == 4 else "INT8"

    def _grid(self, name: str, step: float | None = None) -> tuple[str, str]:
        """Step and zero point of a tensor, as initializers; ``step`` in place of the file's."""
        tensor = self.graph.tensors[name]
        suffix = "" if step is None else "_real"
        scale = self.constant(f"{name}.step{suffix}", np.float32(self.step(tensor) if step is None else step))
        return scale, self.constant(f"{name}.zero", tensor.zero, self._kind(tensor.bits))

    def value(self, name: str) -> str:
        """The real values of a tensor in the file's steps; dequantized once, for all its readers."""
        result = f"{name}.value"
        if name not in self.dequantized:
            self.dequantized.add(name)
            self.op("DequantizeLinear", (f"{name}.codes", *self._grid(name)), result)
            tensor = self.graph.tensors[name]
            self.values[name] = (result, np.asarray(self.step(tensor)), tensor.zero)
        return result

    def quantize(self, node: Node, x: str, low: int | None = None, high: int | None = None) -> None:
        """Codes of a node's output from its real values ``x``, limited to ``low..high`` before they are rounded.

        Limits are codes, and rounding is monotone: the order does not matter. QuantizeLinear saturates by itself.
        """
        tensor = self.graph.tensors[node.output]
        lowest, highest = numerics.code_range(tensor.bits)
        # Neither Clip nor Relu: in front of a QuantizeLinear with 4 bits, ONNX Runtime (1.31) fails to load the one
        # and drops the other, although codes below zero exist.
        for kind, code, limit in (("Max", low, lowest), ("Min", high, highest)):
            if code is not None and code != limit:
                edge = np.float32((code - tensor.zero) * self.step(tensor))
                limited = (x, self.constant(f"{node.output}.{kind}", edge))
                x = self.op(kind, limited, f"{node.output}.limited_{kind}")
        self.op("QuantizeLinear", (x, *self._grid(node.output)), f"{node.output}.codes")

    def factor(self, node: Node, x: str, factor: Any, what: str = "factor") -> str:
        """``x * factor``, ``factor`` a number or one per channel, in float32; ``x`` itself for a factor of 1."""
        values = np.asarray(factor, np.float32)
        if (values == 1).all():
            return x
        shaped = values.reshape(-1, 1, 1) if values.ndim else values
        return self.op("Mul", (x, self.constant(f"{node.output}.{what}", shaped)), f"{node.output}.{what}_applied")

    def near_one(self, node: Node, x: str, factor: float, what: str) -> str:
        """The plain style's ``x * factor``, where the factor matters."""
        return x if abs(factor - 1) <= _LARGEST_FACTOR_ERROR else self.factor(node, x, factor, what)

    def in_float64(
        self, node: Conv | AvgPool | ResidualAdd | ChannelMul, x: str, factor: Any, *, wide: bool = False
    ) -> Exactness:
        """Codes of ``floor(x * factor + 1/2)``: nothing else is rounded, as the product has 50 bits.

        ``wide``: ``x`` is float64 already.
        """
        name = node.output
        half = self.constant("constants.half", np.float64(0.5), "DOUBLE")
        x = x if wide else self.op("Cast", (x,), f"{name}.wide", to=self.types.DOUBLE)
        scale = self.constant(f"{name}.factor", np.reshape(factor, (-1, 1, 1)), "DOUBLE")
        product = self.op("Mul", (x, scale), f"{name}.product")
        rounded = self.op("Floor", (self.op("Add", (product, half), f"{name}.raised"),), f"{name}.rounded")
        step = self.constant(f"{name}.step64", np.float64(self.step(self.graph.tensors[name])), "DOUBLE")
        scaled = self.op("Mul", (rounded, step), f"{name}.rounded_value")
        narrow = self.op("Cast", (scaled,), f"{name}.narrow", to=self.types.FLOAT)
        self.quantize(node, narrow, node.low, node.high)
        return "float64"

    # The model's inputs and outputs ----------------------------------------------------------------------------

    def _info(self, name: str, kind: str, shape: tuple[int, ...]) -> Any:
        return self.helper.make_tensor_value_info(name, getattr(self.types, kind), ["N", *shape])

    def _input(self, name: str, inputs: Inputs) -> Any:
        tensor = self.graph.tensors[name]
        assert isinstance(tensor.scale, float)
        codes = f"{name}.codes"
        if inputs == "codes":
            self.op("Cast", (name,), codes, to=getattr(self.types, self._kind(tensor.bits)))
            return self._info(name, "INT8", tensor.shape)
        if self.exact:
            wide = self.op("Cast", (name,), f"{name}.wide", to=self.types.DOUBLE)
            scale = self.constant(f"{name}.step64", np.float64(tensor.scale), "DOUBLE")
            half = self.constant("constants.half", np.float64(0.5), "DOUBLE")
            raised = self.op("Add", (self.op("Div", (wide, scale), f"{name}.steps"), half), f"{name}.raised")
            # Limited before the conversion to float32, where infinity would come of it.
            lowest, highest = numerics.code_range(tensor.bits)
            limits = [self.constant(f"{name}.{what}", np.float64(code - tensor.zero), "DOUBLE")
                      for what, code in (("low", lowest), ("high", highest))]  # fmt: skip
            limited = self.op("Clip", (self.op("Floor", (raised,), f"{name}.rounded"), *limits), f"{name}.limited")
            narrow = self.op("Cast", (limited,), f"{name}.narrow", to=self.types.FLOAT)
            one = self.constant("constants.one", np.float32(1))
            zero = self.constant(f"{name}.zero", tensor.zero, self._kind(tensor.bits))
            self.op("QuantizeLinear", (narrow, one, zero), codes)
        else:
            self.op("QuantizeLinear", (name, *self._grid(name)), codes)
        return self._info(name, "FLOAT", tensor.shape)

    def _output(self, name: str) -> Any:
        tensor = self.graph.tensors[name]
        vector = tensor.shape[1:] == (1, 1)
        real = f"{name}.real" if vector else name
        if tensor.bits == 32:
            scale = np.broadcast_to(np.asarray(tensor.scale), tensor.shape[0])
            _, unit, _ = self.values[name]
            ratio = self.constant(f"{name}.ratio", (scale / unit).reshape(-1, 1, 1))
            value = f"{name}.value"
            if name in self.wide:
                value = self.op("Cast", (value,), f"{name}.narrow", to=self.types.FLOAT)
            self.op("Mul", (value, ratio), real)
        else:
            assert isinstance(tensor.scale, float)
            self.op("DequantizeLinear", (f"{name}.codes", *self._grid(name, tensor.scale)), real)
        if not vector:
            return self._info(name, "FLOAT", tensor.shape)
        self.op("Flatten", (real,), name, axis=1)
        return self._info(name, "FLOAT", tensor.shape[:1])

    def _watch(self, name: str) -> Any:
        tensor = self.graph.tensors[name]
        if tensor.bits != 32:
            self.value(name)
        return self._info(f"{name}.value", "DOUBLE" if name in self.wide else "FLOAT", tensor.shape)

    # Operators -------------------------------------------------------------------------------------------------

    def windowed(self, node: Conv | MaxPool | AvgPool, **more: Any) -> dict[str, Any]:
        """Attributes of a window operator."""
        return {"strides": node.stride, "pads": node.padding, **more}

    def conv(self, node: Conv) -> Exactness:
        x, y = self.graph.tensors[node.inputs[0]], self.graph.tensors[node.output]
        assert isinstance(x.scale, float)
        # Values are relative to the zero point here: its part of the bias goes, and padding reads real zero.
        bias = node.bias + x.zero * node.weight.reshape(len(node.bias), -1).sum(axis=1)
        signed = np.ldexp(node.mult.astype(np.float64), -node.shift)
        if not self.exact:
            return self._plain_conv(node, x, y, bias, signed)
        step = power_of_two(x.scale)
        if y.bits == 32:
            scales = np.broadcast_to(np.asarray(y.scale), len(bias))
            unit = np.array([power_of_two(s) for s in scales])
        else:
            unit = np.array([step * power_of_two(s) for s in node.weight_scale.tolist()])
        reach = self._reach(x)
        sums = np.abs(node.weight).reshape(len(bias), -1).sum(axis=1) * reach
        magnitude = sums + np.abs(bias) + 1
        output = f"{node.output}.value" if y.bits == 32 else f"{node.output}.sum"
        if y.bits == 32:
            self.values[node.output] = (output, unit, 0)
        if (magnitude > _EXACT).any():
            return self._wide_conv(node, reach, bias, unit, signed, output)
        if y.bits == 32:
            self.weighted(node, node.weight, unit / step, bias * unit, output)
            return "float32"
        lowest, highest = (acc + node.bias for acc in accumulator_range(node, x))
        proof = prove(node.mult, node.shift, lowest, highest, magnitude, (node.low - y.zero, node.high - y.zero))
        if proof is None:
            total = self.weighted(node, node.weight, unit / step, bias * unit, output)
            return self.in_float64(node, total, signed / unit)
        factor = proof.factor.astype(np.float64) * self.step(y) / unit
        if (factor == 1).all():
            # A convolution between DequantizeLinear and QuantizeLinear and nothing else makes ONNX Runtime use its
            # integer convolution, which does not exist for 4 bits.
            unit, factor = 2 * unit, factor / 2
        total = self.weighted(node, node.weight, unit / step, (bias + proof.offset) * unit, output)
        self.quantize(node, self.factor(node, total, factor), node.low, node.high)
        return "float32"

    def _reach(self, x: TensorType) -> int:
        """Largest magnitude of ``code - zero``."""
        return max(abs(code - x.zero) for code in numerics.code_range(x.bits))

    def weighted(self, node: Conv, weight: npt.NDArray[np.int64], scale: Any, bias: Any, output: str) -> str:
        """A convolution with quantized weights; ``scale`` and ``bias`` per output channel."""
        real = self._weight(f"{node.output}.weight", weight, node.weight_bits, scale)
        operands = (self.value(node.inputs[0]), real, self.constant(f"{node.output}.bias", bias))
        return self.op("Conv", operands, output, **self._conv_attributes(node))

    def _conv_attributes(self, node: Conv) -> dict[str, Any]:
        return self.windowed(node, dilations=node.dilation, kernel_shape=node.weight.shape[2:], group=node.groups)

    def _weight(self, name: str, weight: npt.NDArray[np.int64], bits: int, scale: Any) -> str:
        codes, steps = self.constant(name, weight, self._kind(bits)), self.constant(f"{name}_step", scale)
        return self.op("DequantizeLinear", (codes, steps), f"{name}_value", axis=0)

    def _wide_conv(
        self, node: Conv, reach: int, bias: Any, unit: npt.NDArray[np.float64], signed: Any, output: str
    ) -> Exactness:
        """Sums beyond float32: some input channels at a time, added up in float64.

        Approximate only where the taps of one input channel, or of one of several groups, are too many.
        """
        x, y = self.graph.tensors[node.inputs[0]], self.graph.tensors[node.output]
        name, step = node.output, self.step(x)
        # The largest sum over output channels that each input channel can add.
        each = np.abs(node.weight).sum(axis=(2, 3)) * reach
        parts: list[list[int]] = []
        for channel in range(node.weight.shape[1]):
            fits = parts and int(each[:, [*parts[-1], channel]].sum(axis=1).max()) <= _EXACT
            if fits or (parts and node.groups > 1):
                parts[-1].append(channel)
            else:
                parts.append([channel])
        exact = all(int(each[:, part].sum(axis=1).max()) <= _EXACT for part in parts)
        values = [self.value(node.inputs[0])]
        if len(parts) > 1:
            sizes = self.constant(f"{name}.parts", [len(part) for part in parts], "INT64")
            outputs = [f"{name}.part{index}" for index in range(len(parts))]
            self.nodes.append(self.helper.make_node("Split", [*values, sizes], outputs, name=outputs[0], axis=1))
            values = outputs
        total = self.constant(f"{name}.bias", (bias * unit).reshape(-1, 1, 1), "DOUBLE")
        for index, (part, value) in enumerate(zip(parts, values, strict=True)):
            real = self._weight(f"{name}.weight{index}", node.weight[:, part], node.weight_bits, unit / step)
            sums = self.op("Conv", (value, real), f"{name}.sum{index}", **self._conv_attributes(node))
            wide = self.op("Cast", (sums,), f"{name}.wide{index}", to=self.types.DOUBLE)
            last = index == len(parts) - 1
            total = self.op("Add", (wide, total), output if last else f"{name}.total{index}")
        if y.bits == 32:
            self.wide.add(name)
        else:
            self.in_float64(node, total, signed / unit, wide=True)
        return "float64" if exact else "approximate"

    def _plain_conv(
        self, node: Conv, x: TensorType, y: TensorType, bias: npt.NDArray[np.int64], signed: npt.NDArray[np.float64]
    ) -> Exactness:
        weight, turned = node.weight, np.ones(len(bias), np.int64)
        if y.bits == 32:
            unit = np.broadcast_to(np.asarray(y.scale), len(bias)).astype(np.float64)
        else:
            # Steps are positive: the sign of a multiplier goes into the weights, unless they hold a code like -8, whose
            # opposite does not exist; then it goes behind the layer.
            unit = np.abs(signed) * self.step(y)
            lowest = weight.reshape(len(bias), -1).min(axis=1) == numerics.code_range(node.weight_bits)[0]
            sign = np.where(signed < 0, -1, 1)
            turned = np.where(lowest, sign, 1)
            weight, bias = weight * (sign * turned)[:, None, None, None], bias * sign * turned
            weight[unit == 0] = 0
        steps = np.where(unit == 0, 1.0, unit / self.step(x))
        output = f"{node.output}.value" if y.bits == 32 else f"{node.output}.sum"
        total = self.weighted(node, weight, steps, bias * unit, output)
        if y.bits == 32:
            self.values[node.output] = (output, unit, 0)
        else:
            self.quantize(node, self.factor(node, total, turned, "sign"), node.low, node.high)
        return "approximate"

    def residual_add(self, node: ResidualAdd) -> Exactness:
        y = self.graph.tensors[node.output]
        operands = []
        factors = dict(zip(("factor_a", "factor_b"), (node.k_a, node.k_b), strict=True))
        for name, (what, k) in zip(node.inputs, factors.items(), strict=True):
            # The product is exact in the exact style: 9 bits of a difference of codes times 16 of the factor.
            factor = math.ldexp(k, -node.shift) * self.step(y) / self.step(self.graph.tensors[name])
            apply = self.factor if self.exact else self.near_one
            operands.append(apply(node, self.value(name), factor, what))
        total = self.op("Add", operands, f"{node.output}.sum")
        if not self.exact:
            self.quantize(node, total, node.low, node.high)
            return "approximate"
        if self._proved_sum(node):
            # Half a unit of the factors makes ties go up.
            offset = self.constant(f"{node.output}.offset", np.float32(math.ldexp(self.step(y), -node.shift - 1)))
            total = self.op("Add", (total, offset), f"{node.output}.sum_raised")
            self.quantize(node, total, node.low, node.high)
            return "float32"
        return self.in_float64(node, total, 1 / self.step(y))

    def _proved_sum(self, node: ResidualAdd) -> bool:
        """Whether half a unit of the factors, added in float32, is right for every pair of codes: all are tried."""
        y = self.graph.tensors[node.output]
        first, second = (self.graph.tensors[name] for name in node.inputs)
        a, b = (np.arange(numerics.code_range(t.bits)[0], numerics.code_range(t.bits)[1] + 1) for t in (first, second))
        wanted = numerics.residual_add(
            a[:, None], b, zero_a=first.zero, zero_b=second.zero, k_a=node.k_a, k_b=node.k_b, n=node.shift,
            zero=y.zero, low=node.low, high=node.high,
        )  # fmt: skip
        total = ((a - first.zero) * node.k_a)[:, None] + (b - second.zero) * node.k_b
        raised = np.ldexp(total.astype(np.float32) + np.float32(0.5), -node.shift)
        codes = numerics.clamp(np.rint(raised) + y.zero, node.low, node.high)
        return bool((np.abs(total) <= _EXACT).all() and (codes == wanted).all())

    def _moved(self, node: Node, move: Callable[[list[str]], str]) -> Exactness:
        """An operator that moves codes and changes none: ``move`` takes values and returns a value.

        Between DequantizeLinear and QuantizeLinear, ONNX Runtime (1.31) would move the codes themselves, and then finds
        that it cannot do so with 4 bits. A maximum with the lowest value in between changes nothing but that.
        """
        y = self.graph.tensors[node.output]
        values = [self.value(name) for name in node.inputs]
        if not self.exact or y.bits == 8:
            self.quantize(node, move(values))
            return "float32"
        limit = np.float32((numerics.code_range(4)[0] - y.zero) * self.step(y))
        lowest = self.constant(f"{node.output}.lowest", limit)
        values = [self.op("Max", (v, lowest), f"{node.output}.before{k}") for k, v in enumerate(values)]
        self.quantize(node, self.op("Max", (move(values), lowest), f"{node.output}.after"))
        return "float32"

    def max_pool(self, node: MaxPool) -> Exactness:
        more = self.windowed(node, kernel_shape=node.kernel, dilations=node.dilation)
        return self._moved(node, lambda values: self.op("MaxPool", values, f"{node.output}.pooled", **more))

    def flatten(self, node: Flatten) -> Exactness:
        shape = self.constant("constants.vector", [0, -1, 1, 1], "INT64")
        return self._moved(node, lambda values: self.op("Reshape", (*values, shape), f"{node.output}.reshaped"))

    def concat(self, node: Concat) -> Exactness:
        return self._moved(node, lambda values: self.op("Concat", values, f"{node.output}.joined", axis=1))

    def upsample(self, node: Upsample) -> Exactness:
        scales = self.constant(f"{node.output}.scales", [1, 1, *node.factor])
        more = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self._moved(
            node, lambda values: self.op("Resize", (*values, "", scales), f"{node.output}.repeated", **more)
        )

    def lookup(self, node: Lookup) -> Exactness:
        y = self.graph.tensors[node.output]
        index = self.op("Cast", (f"{node.inputs[0]}.codes",), f"{node.output}.index", to=self.types.INT32)
        # Negative indices count from the end, so the table begins with the entry of code 0.
        values = np.roll((node.table - y.zero) * self.step(y), -128)
        table = self.constant(f"{node.output}.table", values)
        self.quantize(node, self.op("Gather", (table, index), f"{node.output}.entry"))
        return "float32"

    def channel_mul(self, node: ChannelMul) -> Exactness:
        a, b, y = (self.graph.tensors[name] for name in (*node.inputs, node.output))
        product = self.op("Mul", [self.value(name) for name in node.inputs], f"{node.output}.product32")
        unit = self.step(a) * self.step(b)
        ratio = math.ldexp(node.k, -node.shift)
        if not self.exact:
            product = self.near_one(node, product, ratio * self.step(y) / unit, "factor")
            self.quantize(node, product, node.low, node.high)
            return "approximate"
        ranges = [np.array(numerics.code_range(t.bits)) - t.zero for t in (a, b)]
        extremes = np.outer(*ranges)
        lowest, highest = extremes.min(keepdims=True)[0], extremes.max(keepdims=True)[0]
        proof = prove(
            np.array([node.k]), np.array([node.shift]), lowest, highest, np.abs(extremes).max(keepdims=True)[0] + 1,
            (node.low - y.zero, node.high - y.zero),
        )  # fmt: skip
        # With a product between DequantizeLinear and QuantizeLinear and nothing else, ONNX Runtime uses integers: see
        # conv().
        if proof is None or (proof.offset[0] == 0 and proof.factor[0] * self.step(y) == unit):
            return self.in_float64(node, product, ratio / unit)
        if proof.offset[0]:
            offset = self.constant(f"{node.output}.offset", np.float32(proof.offset[0] * unit))
            product = self.op("Add", (product, offset), f"{node.output}.product_raised")
        product = self.factor(node, product, float(proof.factor[0]) * self.step(y) / unit)
        self.quantize(node, product, node.low, node.high)
        return "float32"

    def avg_pool(self, node: AvgPool) -> Exactness:
        x, y = self.graph.tensors[node.inputs[0]], self.graph.tensors[node.output]
        window = node.kernel[0] * node.kernel[1]
        bias = node.bias + x.zero * window
        ratio = math.ldexp(node.mult, -node.shift)
        if not self.exact:
            more = self.windowed(node, kernel_shape=node.kernel, count_include_pad=1)
            mean = self.op("AveragePool", (self.value(node.inputs[0]),), f"{node.output}.mean", **more)
            mean = self.near_one(node, mean, ratio * window * self.step(y) / self.step(x), "factor")
            if bias:
                offset = self.constant(f"{node.output}.bias", np.float32(bias * ratio * self.step(y)))
                mean = self.op("Add", (mean, offset), f"{node.output}.mean_biased")
            self.quantize(node, mean, node.low, node.high)
            return "approximate"
        # AveragePool divides, and that rounds. A depthwise convolution whose weights are 1 sums, in steps that make it
        # nearly the mean.
        step = power_of_two(1 / window)
        codes = numerics.code_range(x.bits)
        magnitude = np.array([window * self._reach(x) + abs(bias) + 1])
        lowest, highest = (np.array([window * code + node.bias]) for code in codes)
        mult, shift = np.array([node.mult]), np.array([node.shift])
        proof = prove(mult, shift, lowest, highest, magnitude, (node.low - y.zero, node.high - y.zero))
        factor = 0.0
        if proof is not None:
            factor = float(proof.factor[0]) * self.step(y) / (self.step(x) * step)
            if factor == 1:  # as in conv()
                step, factor = 2 * step, factor / 2
        unit = self.step(x) * step
        channels = x.shape[0]
        ones = self._weight(
            f"{node.output}.weight", np.ones((channels, 1, *node.kernel), np.int64), 4, np.full(channels, step)
        )
        added = np.full(channels, (bias + (0.0 if proof is None else float(proof.offset[0]))) * unit)
        operands = (self.value(node.inputs[0]), ones, self.constant(f"{node.output}.bias", added))
        more = self.windowed(node, kernel_shape=node.kernel, group=channels)
        total = self.op("Conv", operands, f"{node.output}.sum", **more)
        if proof is None:
            exactness = self.in_float64(node, total, ratio / unit)
            return exactness if int(magnitude[0]) <= _EXACT else "approximate"
        self.quantize(node, self.factor(node, total, factor), node.low, node.high)
        return "float32"


_EMIT: Final[dict[type[Node], Callable[..., Exactness]]] = {
    Conv: _Writer.conv,
    ResidualAdd: _Writer.residual_add,
    ChannelMul: _Writer.channel_mul,
    Lookup: _Writer.lookup,
    MaxPool: _Writer.max_pool,
    AvgPool: _Writer.avg_pool,
    Concat: _Writer.concat,
    Upsample: _Writer.upsample,
    Flatten: _Writer.flatten,
}
