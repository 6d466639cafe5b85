"""From a prepared model to the integer graph."""

import math

import numpy as np
import numpy.typing as npt
from torch import nn

from ..arch import numerics
from ..errors import CompileError
from ..frontend.from_torch import leaves
from ..ir import graph as ir
from ..ir.verify import verify
from .layers import QuantAdd, QuantAvgPool2d, QuantConv2d, QuantLayer, QuantOp
from .methods import ActQuantizer, InputQuantizer
from .operators import QuantConcat, QuantFlatten, QuantLookup, QuantMaxPool2d, QuantMul, QuantUpsample
from .prepare import QuantModel, prepared


def convert(model: nn.Module, name: str | None = None) -> ir.Graph:
    """The integers of a calibrated or trained model.

    Tensors are named after the module paths that write them; the input after its argument. Of a sum, the first input is
    the convolution that the sum is fused behind, if there is one. Steps that are read by name from the graph are those
    of the model, exactly; multipliers are rounded from them in float64.

    Parameters
    ----------
    model : nn.Module
        From :func:`nibblecore.qat.prepare`, perhaps wrapped: compiled, averaged, or for several processes.
    name : str, optional
        Name of the network; the model's class by default.

    Raises
    ------
    TypeError
        Another model.
    TrainingError
        Activation steps without calibration.
    CompileError
        Numbers that no requantization record can hold, all at once: module path, channel, value and what to change.
    """
    model = prepared(model)
    model._calibrated = False  # training may have lost a step since the last look
    model._check_ready(every=True)
    return _Converter(model, name or model._graph_name).graph


class _Converter:
    def __init__(self, model: QuantModel, name: str) -> None:
        self.model = model
        self.violations: list[str] = []
        self.nodes: list[ir.Node] = []
        self.tensors: dict[str, ir.TensorType] = {}
        # A change of shape that the integer graph does not know gives its input a second name.
        self.aliases: dict[str, str] = {}
        source = model.get_submodule(model._input_name)
        assert isinstance(source, InputQuantizer)
        self.tensors[model._input_name] = ir.TensorType(
            self._shape(model._input_name), source.bits, source.step(), source.zero
        )
        for path, inputs in model._plan:
            self._node(path, tuple(self.aliases.get(n, n) for n in inputs), model.get_submodule(path))
        if self.violations:
            raise CompileError(self.violations)
        outputs = dict.fromkeys(self.aliases.get(n, n) for n in leaves(model._outputs))
        self.graph = verify(ir.Graph(tuple(self.nodes), self.tensors, (model._input_name,), tuple(outputs), name))

    def _shape(self, name: str) -> tuple[int, int, int]:
        shape = (*self.model._shapes[name], 1, 1)
        return (shape[0], shape[1], shape[2])

    def _output_type(self, path: str, quantizer: ActQuantizer) -> ir.TensorType:
        return ir.TensorType(
            self._shape(path), quantizer.storage_bits, float(quantizer.scale().detach()), quantizer.zero
        )

    @staticmethod
    def _clamps(module: QuantOp) -> tuple[int, int]:
        """Stored codes; the lowest one of a rectified grid is its zero, which makes the clamp a ReLU."""
        low, high = module.code_limits()
        return module.grid().zero + low, module.grid().zero + high

    def _node(self, path: str, inputs: tuple[str, ...], module: nn.Module) -> None:
        operands = [self.tensors[n] for n in inputs]
        if isinstance(module, QuantLayer):
            self._conv(path, inputs, module, operands[0])
        elif isinstance(module, QuantAdd):
            self._add(path, inputs, module)
        elif isinstance(module, QuantAvgPool2d):
            self._avg_pool(path, inputs, module, operands[0])
        elif isinstance(module, QuantMul):
            self._mul(path, inputs, module)
        elif isinstance(module, QuantLookup):
            self._lookup(path, inputs, module, operands[0])
        elif isinstance(module, QuantConcat):
            self._same_grid(path, operands[0])
            self.nodes.append(ir.Concat(path, inputs, path))
        elif isinstance(module, QuantUpsample):
            self._same_grid(path, operands[0])
            self.nodes.append(ir.Upsample(path, inputs, path, module.factor))
        elif isinstance(module, QuantMaxPool2d):
            self._same_grid(path, operands[0])
            self.nodes.append(
                ir.MaxPool(path, inputs, path, module.kernel, module.stride, module.padding * 2, module.dilation)
            )
        else:
            assert isinstance(module, QuantFlatten)
            (x,) = operands
            if x.shape == self._shape(path):
                self.aliases[path] = inputs[0]
                return
            self._same_grid(path, x)
            self.nodes.append(ir.Flatten(path, inputs, path))

    def _same_grid(self, path: str, x: ir.TensorType) -> None:
        self.tensors[path] = ir.TensorType(self._shape(path), x.bits, x.scale, x.zero)

    def _multiplier(self, path: str, ratio: float) -> tuple[int, int]:
        try:
            return numerics.quantize_multiplier(ratio)
        except ValueError:
            self.violations.append(
                f"{path}: A requantization factor is below 65536 in magnitude. This one is {ratio:g}. "
                "Calibrate again: the step of the output is far too small for its values."
            )
            return 0, numerics.SHIFT_MIN

    def _conv(self, path: str, inputs: tuple[str, ...], module: QuantLayer, x: ir.TensorType) -> None:
        assert isinstance(x.scale, float)
        if (why := module.weight_quantizer.refusal()) is not None:
            self.violations.append(f"{path}: {why}")
        weight = module.int_weight().cpu().numpy()
        weight = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1)))
        scale: npt.NDArray[np.float64] = module.scale().detach().double().cpu().numpy()
        unit: npt.NDArray[np.float64] = module.unit(x.scale).cpu().numpy()
        real = module.real_bias()
        real_bias = np.zeros_like(unit) if real is None else real.detach().cpu().numpy()
        if module.bias_bits is not None:
            real_bias = np.where(unit == 0, real_bias, module.int_bias(x.scale).cpu().numpy() * unit)
        if module.output_quantizer is None:
            steps = np.where(unit == 0, x.scale * scale, np.abs(unit))
            y = ir.TensorType(self._shape(path), 32, tuple(steps.tolist()), 0)
            low = high = 0
        else:
            y = self._output_type(path, module.output_quantizer)
            low, high = self._clamps(module)
        self.tensors[path] = y
        if not (
            np.isfinite(scale).all()
            and np.isfinite(real_bias).all()
            and np.isfinite(unit).all()
            and bool(module.weight.isfinite().all())
        ):
            self.violations.append(
                f"{path}: Weights, biases and steps are finite. This layer has others. "
                "Train again with a smaller learning rate."
            )
            return
        records = np.zeros((3, len(scale)), np.int64)
        records[2] = numerics.SHIFT_MIN
        for channel in range(len(scale)):
            record = self._record(path, channel, weight[channel], x, y, float(unit[channel]), float(real_bias[channel]))
            if record is None:
                return
            records[:, channel] = record
        bias, mult, shift = records
        geometry, groups = ((1, 1), (0, 0, 0, 0), (1, 1)), 1
        if isinstance(module, QuantConv2d):
            geometry, groups = (module.stride, module.padding, module.dilation), module.groups
        bits = module.weight_quantizer.storage_bits
        scale = np.where(weight.reshape(len(scale), -1).any(axis=1), np.abs(unit) / x.scale, scale)
        self.nodes.append(
            ir.Conv(path, inputs, path, weight, bits, scale, bias, mult, shift, *geometry, low, high, groups)
        )

    def _record(
        self,
        path: str,
        channel: int,
        weight: npt.NDArray[np.int64],
        x: ir.TensorType,
        y: ir.TensorType,
        unit: float,
        bias: float,
    ) -> tuple[int, int, int] | None:
        """``(bias, mult, shift)`` of one channel, whose weights it may change; None behind a violation.

        ``unit`` is the real value of a product of codes, ``bias`` the real bias.
        """
        if y.bits == 32 and unit <= 0:
            # Scales of sums are positive: the sign goes into the weights. A unit of 0 makes the channel a constant.
            assert isinstance(y.scale, tuple)
            weight *= -1 if unit < 0 else 0
            unit = y.scale[channel]
            if weight.max(initial=0) == 8 and weight.min(initial=0) >= -8:
                self.violations.append(
                    f"{path}: Weights whose sign changes are above -8. Channel {channel} has a negative factor and "
                    'weights of -8. Train the layer with weight_range="narrow".'
                )
                return None
        # A bias beyond any record stays so; a unit of 0 has none.
        rounded = math.floor(max(-(2.0**62), min(2.0**62, bias / unit)) + 0.5) if unit else 0
        # The zero point of the input is in the total.
        total = rounded - x.zero * int(weight.sum())
        # One bit is left for the sum of products.
        fits = numerics.signed_fits(total, numerics.BIAS_BITS - 1)
        if y.bits == 32 and fits:
            return total, 0, numerics.SHIFT_MIN
        if y.bits != 32:
            assert isinstance(y.scale, float)
            ratio = unit / y.scale
            if unit and fits and weight.any():
                return total, *self._multiplier(f"{path}, channel {channel}", ratio)
            # A channel without weights is a constant. One whose bias does not fit nearly always is one too: either its
            # products reach less than 1/256 of a step, or less than it takes to come back from beyond a clamp.
            real = rounded * ratio if unit else bias / y.scale
            reach = float(np.abs(weight).sum()) * (1 << x.bits) * abs(ratio)
            if reach < max(2**-8, abs(real) - (1 << y.bits) - 1):
                low, high = numerics.code_range(y.bits)
                weight[:] = 0
                code = max(low, min(high, math.floor(real + 0.5) + y.zero))
                return numerics.constant_record(code, y.zero)
        self.violations.append(
            f"{path}: A bias fits 31 bits in units of the products. That of channel {channel} is {total}. "
            "Give the channel larger weights or a smaller bias."
        )
        return None

    def _add(self, path: str, inputs: tuple[str, ...], module: QuantAdd) -> None:
        scales = [self.tensors[n].scale for n in inputs]
        assert isinstance(scales[0], float)
        assert isinstance(scales[1], float)
        self.tensors[path] = self._output_type(path, module.grid())
        try:
            k_a, k_b, n = module.factors(scales[0], scales[1])
        except ValueError:
            y_scale = float(module.grid().scale().detach())
            self.violations.append(
                f"{path}: The factors of a sum are below 16384. These are {scales[0] / y_scale:g} and "
                f"{scales[1] / y_scale:g}. Calibrate again: the step of the sum is far too small for its values."
            )
            return
        self.nodes.append(ir.ResidualAdd(path, inputs, path, k_a, k_b, n, *self._clamps(module)))

    def _mul(self, path: str, inputs: tuple[str, ...], module: QuantMul) -> None:
        scales = [self.tensors[n].scale for n in inputs]
        assert isinstance(scales[0], float)
        assert isinstance(scales[1], float)
        self.tensors[path] = self._output_type(path, module.grid())
        try:
            k, n = module.factor(scales[0], scales[1])
        except ValueError:
            ratio = scales[0] * scales[1] / float(module.grid().scale().detach())
            self.violations.append(
                f"{path}: The factor of a product is below 16384. This one is {ratio:g}. Calibrate again: the step of "
                "the product is far too small for its values."
            )
            return
        self.nodes.append(ir.ChannelMul(path, inputs, path, k, n, *self._clamps(module)))

    def _lookup(self, path: str, inputs: tuple[str, ...], module: QuantLookup, x: ir.TensorType) -> None:
        assert isinstance(x.scale, float)
        y = self.tensors[path] = self._output_type(path, module.grid())
        table = module.table(x.scale, x.zero).numpy() + y.zero
        self.nodes.append(ir.Lookup(path, inputs, path, table, module.function))

    def _avg_pool(self, path: str, inputs: tuple[str, ...], module: QuantAvgPool2d, x: ir.TensorType) -> None:
        assert isinstance(x.scale, float)
        y = self.tensors[path] = self._output_type(path, module.grid())
        assert isinstance(y.scale, float)
        window = module.kernel[0] * module.kernel[1]
        mult, shift = self._multiplier(path, x.scale / (window * y.scale))
        self.nodes.append(
            ir.AvgPool(
                path,
                inputs,
                path,
                module.kernel,
                module.stride,
                module.padding * 2,
                -x.zero * window,
                mult,
                shift,
                *self._clamps(module),
            )
        )
