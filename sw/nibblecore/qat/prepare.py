"""From an ordinary model to one that trains against its integers."""

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from ..errors import CompileError, TrainingError
from ..frontend.from_torch import (
    PASS_THROUGH,
    FloatAdd,
    FloatConv,
    FloatFlatten,
    FloatGraph,
    FloatLookup,
    FloatMul,
    FloatOp,
    capture,
    leaves,
    replace_leaves,
    walk_readers,
)
from .config import QConfig
from .distributed import gather, processes, reduce_sum, unwrap
from .layers import Correction, Grid, QuantLayer, QuantOp
from .methods import ActQuantizer, InputQuantizer, Method, WeightQuantizer, method
from .operators import build
from .toggles import switch, switched

RAW: Final = 32


class QuantModel(nn.Module):
    """A prepared model: same call, same results up to quantization, submodules at the user's module paths.

    Batch norms and clamps have gone into the layers before them, or are their ``norm``. Sums, and functional pools,
    have modules of their own at the path of the module whose ``forward`` calls them, as in ``stage1.0.add``. Results
    that are concatenated share one quantizer, which the ``state_dict`` has at the first of them. Parameters and
    ``state_dict`` are complete from the start; steps of activations are nan until :func:`calibrate`, and a forward pass
    before raises :class:`~nibblecore.errors.TrainingError`. Deep copies, pickles and moves between devices work as for
    any module.
    """

    def __init__(self, graph: FloatGraph, qconfig: QConfig, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self._graph_name = graph.name
        self._qconfig = qconfig
        self._input_name = graph.input
        self._input_shape = graph.input_shape
        self._outputs = graph.outputs
        # What forward does: (path, names that it reads), in order.
        self._plan = tuple((op.path, op.inputs) for op in graph.ops)
        self._shapes = {graph.input: graph.input_shape, **{op.path: op.shape for op in graph.ops}}
        self._calibrated = False
        # Unregistered, as they belong to operators.
        shared = dict.fromkeys(m.output_quantizer for m in modules.values() if isinstance(m, QuantOp))
        self._shared = tuple(q for q in shared if q is not None and q.parts > 1)
        for path, module in modules.items():
            parent: nn.Module = self
            *containers, leaf = path.split(".")
            for name in containers:
                child = parent._modules.get(name)
                if child is None:
                    child = nn.Module()
                    parent.add_module(name, child)
                parent = child
            parent.add_module(leaf, module)

        self.register_load_state_dict_post_hook(_look_again)

    def forward(self, x: Tensor) -> Any:
        self._check_ready()
        return replace_leaves(self._outputs, {name: grid.x for name, grid in self._execute(x).items()})

    def enable_fake_quant(self, pattern: str = "*", *, weights: bool = True, activations: bool = True) -> None:
        """Quantize the layers whose module paths match ``pattern`` (shell wildcards, as of an override).

        ``weights``, ``activations``: which; a layer's activations are its output, and the network's input has the path
        of its argument. Whether a tensor is quantized is a mode, like :attr:`training`: copies and pickles have it, a
        ``state_dict`` does not. Raises :class:`ValueError` for a pattern without a quantizer.
        """
        switch(self, pattern, fake_quant=True, weights=weights, activations=activations)

    def disable_fake_quant(self, pattern: str = "*", *, weights: bool = True, activations: bool = True) -> None:
        """The opposite of :meth:`enable_fake_quant`: what is switched off is float, ReLUs apart.

        Multipliers and biases are rounded only where both weights and input of a layer are quantized.
        """
        switch(self, pattern, fake_quant=False, weights=weights, activations=activations)

    def enable_observer(self, pattern: str = "*") -> None:
        """Let activations' observers look at what passes through; weights need none.

        Those of grids that are learned, as in LSQ, calibrate: they collect until :meth:`disable_observer` sets the
        grid. Ranges that follow the values, as in IAO, move in training mode, and calibrate in evaluation mode where
        fake quantization is off; their observers are on from the start. Raises :class:`ValueError` for a pattern
        without an observer.
        """
        switch(self, pattern, observer=True)

    def disable_observer(self, pattern: str = "*") -> None:
        """Let observers look no more: grids are set from what was collected, and ranges stay."""
        switch(self, pattern, observer=False)
        self._calibrated = not self._uncalibrated()

    def _execute(self, x: Tensor) -> dict[str, Grid]:
        """Every tensor by name."""
        source = self.get_submodule(self._input_name)
        assert isinstance(source, InputQuantizer)
        for quantizer in self._shared:
            quantizer.parts_seen.clear()  # of a pass that was interrupted
        values = {self._input_name: Grid(source(x), source.step_tensor() if source.fake_quant_enabled else None)}
        for path, inputs in self._plan:
            values[path] = self.get_submodule(path)(*(values[name] for name in inputs))
        for quantizer in self._shared:
            quantizer.follow_parts()
        return values

    def _quantizers(self) -> dict[str, ActQuantizer]:
        return {name: module for name, module in self.named_modules() if isinstance(module, ActQuantizer)}

    def _uncalibrated(self, every: bool = True) -> list[str]:
        """Paths of the activation quantizers whose steps are nan, ``every`` one or those that are switched on."""
        quantizers = self._quantizers()
        return [n for n, q in quantizers.items() if (every or q.fake_quant_enabled) and not q.is_calibrated()]

    def _check_ready(self, every: bool = False) -> None:
        """Raise unless the steps of activations are numbers, those that are switched on or ``every`` one.

        Looks until all are; new values make :meth:`forward` look again.
        """
        if self._calibrated:
            return
        quantizers = self._quantizers()
        if missing := self._uncalibrated(every):
            raise TrainingError(
                f"{len(missing)} of {len(quantizers)} activation steps are nan, the first at {missing[0]}: "
                "they were never calibrated, or training has lost them.",
                hint="Call nibblecore.qat.calibrate(model, loader) with a few batches, or load a state_dict.",
            )
        self._calibrated = every or all(q.fake_quant_enabled for q in quantizers.values())


def _look_again(model: nn.Module, _: Any) -> None:
    """Know right after loading a state whether steps are numbers: a compiled forward pass does not ask tensors."""
    assert isinstance(model, QuantModel)
    model._calibrated = not model._uncalibrated()


def prepared(model: nn.Module) -> QuantModel:
    """The model from :func:`prepare`, also inside what compiles, averages or parallelizes it; else a TypeError."""
    inner = unwrap(model)
    if not isinstance(inner, QuantModel):
        raise TypeError(f"model must come from nibblecore.qat.prepare, not be a {type(inner).__name__}")
    return inner


def prepare(
    model: nn.Module, qconfig: QConfig, example_input: Tensor, input_range: tuple[float, float] = (0.0, 1.0)
) -> QuantModel:
    """Make a model that trains against its integers.

    Parameters
    ----------
    model : nn.Module
        Any model of ``conv2d``, ``linear``, ``batch_norm``, ``relu``, ``relu6``, ``hardtanh``, ``silu``, ``sigmoid``,
        ``tanh``, ``hardswish``, ``hardsigmoid``, ``leaky_relu``, ``gelu``, ``mish``, ``add``, ``mul``, ``cat`` along
        channels, ``interpolate`` to the nearest, ``max_pool2d``, ``avg_pool2d``, ``adaptive_avg_pool2d``, ``mean`` over
        pixels, ``flatten`` and ``dropout``, as modules or functions. It stays as it is.

        What a function other than clamps reads has 8 bits: it becomes a table of 256 entries. Tensors that are
        concatenated, pools and upsampling between looked through, share one grid: as wide as the widest of them needs,
        unsigned if all of them are.
    qconfig : QConfig
        Widths and method.
    example_input : Tensor
        ``(N, C, H, W)`` or ``(N, features)``; its shape without N is the network's input shape.
    input_range : tuple[float, float]
        Range of input values, with 0 in it. It fixes the input's grid: with (0, 1) and 8 bits, a byte over 255.

    Returns
    -------
    QuantModel
        In training mode, with weight steps set from the weights and activation steps waiting for :func:`calibrate`.

    Raises
    ------
    CompileError
        Every unsupported construct of the model at once.
    TypeError, ValueError
        Arguments, overrides that match no layer, or that give tensors of one grid different settings.
    """
    if not isinstance(qconfig, QConfig):
        raise TypeError(f"qconfig must be a QConfig, not {type(qconfig).__name__}")
    method(qconfig.method)
    used = {qconfig.method, *(o.method for o in qconfig.overrides)}
    if unused := [type(o).__name__ for o in qconfig.options if o.method not in used]:
        raise ValueError(f"options hold {unused[0]}, but no layer trains with that method")
    low, high = (float(v) for v in input_range)
    if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high and low < high):
        raise ValueError(f"input_range must be finite and contain 0 and more, not ({low:g}, {high:g})")
    graph = capture(model, example_input, fold=qconfig.batch_norm == "folded")
    _check_overrides(graph, qconfig)

    widths = _Widths(graph, qconfig)
    graph = dataclasses.replace(graph, ops=tuple(map(widths.fused_first, graph.ops)))
    if qconfig.input_scale_kind == "power_of_two":
        low, high = _power_of_two_range(low, high, widths.input_bits)
    source = InputQuantizer(low, high, widths.input_bits)
    modules: dict[str, nn.Module] = {graph.input: source}
    positive = _positive(graph, qconfig, source.unsigned)
    grids: dict[tuple[str, ...], ActQuantizer] = {}
    for op in graph.ops:
        weights = output = None
        if isinstance(op, FloatConv):
            weights = _weights(op, widths.weight_bits(op), qconfig)
        sharing = widths.sharing.get(op.path, ())
        if sharing and (bits := widths.act_bits(op)) != RAW:
            output = grids.get(sharing)
            if output is None:
                parts = [o for o in graph.ops if o.path in sharing]
                output = _activations(parts, bits, all(positive[name] for name in sharing), qconfig)
        module = modules[op.path] = build(op, weights, output)
        if isinstance(module, QuantOp) and output is not None:
            module.limits = (-math.inf if op.relu and output.rectified else op.low, op.high)
            if sharing in grids:
                module.share(output)
            grids[sharing] = output
        if isinstance(module, QuantLayer):
            module.fold = qconfig.batch_norm == "folded_train"
            module.bias_bits = qconfig.bias_bits
    return QuantModel(graph, qconfig, modules)


def _power_of_two_range(low: float, high: float, bits: int) -> tuple[float, float]:
    """The range whose step is the power of two nearest, in log2, to that of ``low..high``, with the same zero point."""
    free = InputQuantizer(low, high, bits)
    step = 2.0 ** round(math.log2(free.step()))
    zero = free.zero + (1 << bits - 1)
    return -step * zero, step * ((1 << bits) - 1 - zero)


def _method(path: str, qconfig: QConfig) -> tuple[Method, dict[str, Any]]:
    """The method of a layer, and what its quantizers are given whatever they quantize."""
    name = qconfig.setting(path, "method")
    chosen = method(name)
    arguments: dict[str, Any] = {"power_of_two": qconfig.setting(path, "scale_kind") == "power_of_two"}
    if chosen.options is not None:
        arguments["options"] = qconfig.options_of(name)
    return chosen, arguments


def _weights(op: FloatConv, bits: int, qconfig: QConfig) -> WeightQuantizer:
    chosen, arguments = _method(op.path, qconfig)
    weight = op.weight
    if qconfig.batch_norm == "folded_train" and (norm := op.norm) is not None:
        factor = (norm.var.double() + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.double())
        weight = weight * factor.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
    result: WeightQuantizer = chosen.weights(
        weight,
        bits,
        per_channel=qconfig.setting(op.path, "granularity") == "channel",
        full_range=qconfig.setting(op.path, "weight_range") == "full",
        **arguments,
    )
    return result


def _positive(graph: FloatGraph, qconfig: QConfig, input_is: bool) -> dict[str, bool]:
    """Whether each tensor has no negative values, or a ReLU or an unsigned grid that sees to it."""
    positive = {graph.input: input_is}
    for op in graph.ops:
        if isinstance(op, FloatLookup):
            inherited = op.never_negative or positive[op.inputs[0]]
        else:
            inherited = not isinstance(op, FloatConv) and all(positive[name] for name in op.inputs)
        unsigned = not isinstance(op, PASS_THROUGH) and qconfig.setting(op.path, "signed") is False
        positive[op.path] = op.relu or inherited or unsigned
    return positive


def _activations(ops: list[FloatOp], bits: int, positive: bool, qconfig: QConfig) -> ActQuantizer:
    """The quantizer that ``ops`` share.

    ``positive``: the tensors have no negative values, or ReLUs that the quantizer stands for.
    """
    path = ops[0].path
    for field in ("method", "signed", "scale_kind", "calibration"):
        for other in ops[1:]:
            values = [qconfig.setting(op.path, field) for op in (ops[0], other)]
            if values[0] != values[1]:
                raise ValueError(_conflict(field, path, other.path, *values))
    chosen, arguments = _method(path, qconfig)
    signed = qconfig.setting(path, "signed")
    result: ActQuantizer = chosen.activations(
        bits,
        positive if signed is None else not signed,
        sum(math.prod(op.shape) for op in ops),
        rectified=positive,
        calibration=qconfig.setting(path, "calibration"),
        **arguments,
    )
    result.parts = len(ops)
    return result


def _conflict(field: str, a: str, b: str, value_a: Any, value_b: Any) -> str:
    return (
        f"{a} and {b} are concatenated and share a grid, but overrides give them {field} {value_a!r} and {value_b!r}; "
        "they must be the same"
    )


def _check_overrides(graph: FloatGraph, qconfig: QConfig) -> None:
    paths = [graph.input, *(op.path for op in graph.ops if not isinstance(op, PASS_THROUGH))]
    for override in qconfig.overrides:
        matching = [path for path in paths if fnmatch.fnmatchcase(path, override.pattern)]
        if not matching:
            raise ValueError(f"override {override.pattern!r} matches no layer; the layers are {', '.join(paths)}")
        if override.act_bits in (None, 8):
            continue
        functions = [next((r for r in walk_readers(graph, p) if isinstance(r, FloatLookup)), None) for p in matching]
        if all(functions):
            assert functions[0] is not None
            raise ValueError(
                f"act_bits of override {override.pattern!r} must be 8, not {override.act_bits}: {matching[0]} is the "
                f"index of a table, that of {functions[0].function} at {functions[0].path}"
            )


class _Widths:
    """Bits of every weight and tensor, from the configuration and each layer's place in the network."""

    def __init__(self, graph: FloatGraph, qconfig: QConfig) -> None:
        self.graph, self.qconfig = graph, qconfig
        self.ops = {op.path: op for op in graph.ops}
        self.outputs = set(leaves(graph.outputs))
        self.sharing = self._find_sharing()
        """For each operator with a grid, all those that have the same one, itself included, in order."""
        self.first = {r.path for r in walk_readers(graph, graph.input) if isinstance(r, FloatConv)}
        self.last = {op.path for op in graph.ops if isinstance(op, FloatConv) and not self._leads_to_a_layer(op.path)}
        # The operand of each sum that the sum is fused behind, and that is therefore never stored.
        self.unstored = {path for op in graph.ops if isinstance(op, FloatAdd) and (path := self._fused_operand(op))}
        # The host knows nibbles and bytes, so a grid of 2 or 3 bits would gain nothing.
        self.input_bits: int = qconfig.override(graph.input, "act_bits") or max(4, qconfig.first_last_bits)
        if self._is_index(graph.input):
            self.input_bits = 8
        if self.input_bits < 4:
            raise ValueError(f"act_bits of the network's input {graph.input} must be 4 or 8, not {self.input_bits}")

    def _find_sharing(self) -> dict[str, tuple[str, ...]]:
        """Union-find over concatenations. ``CompileError`` where the network's input is in one, whose grid is fixed."""
        parent = {self.graph.input: self.graph.input}
        violations = []

        def root(path: str) -> str:
            while parent[path] != path:
                path = parent[path]
            return path

        for op in self.graph.ops:
            if not isinstance(op, PASS_THROUGH):
                parent[op.path] = op.path
                continue
            first, *others = dict.fromkeys(root(name) for name in op.inputs)
            parent[op.path] = first
            if others and root(self.graph.input) in (first, *others):
                other = next(name for name in op.inputs if root(name) != root(self.graph.input))
                violations.append(
                    f"{op.path}: A concatenation has parts whose common grid can be found in training. This one joins "
                    f"{self.graph.input}, the network's input, whose grid is fixed, with {other}. Put a convolution "
                    "between the input and it."
                )
                continue
            for name in others:
                parent[name] = first
        if violations:
            raise CompileError(violations)
        producers = [op.path for op in self.graph.ops if not isinstance(op, PASS_THROUGH)]
        return {path: tuple(p for p in producers if root(p) == root(path)) for path in producers}

    def _is_index(self, path: str) -> bool:
        """Whether a function that becomes a table reads the tensor."""
        return any(isinstance(r, FloatLookup) for r in walk_readers(self.graph, path))

    def _leads_to_a_layer(self, path: str) -> bool:
        return any(isinstance(r, FloatConv) or self._leads_to_a_layer(r.path) for r in self.graph.readers(path))

    def _fused_operand(self, add: FloatAdd) -> str | None:
        """Of the convolutions that only this sum reads, the one with more work behind each value; else the later."""
        candidates = [
            op
            for op in self.graph.ops
            if isinstance(op, FloatConv)
            and [r.path for r in self.graph.readers(op.path)] == [add.path]
            and op.path not in self.outputs
        ]
        # max takes the first of equals.
        best = max(reversed(candidates), key=lambda op: op.weight[0].numel(), default=None)
        return None if best is None else best.path

    def fused_first(self, op: FloatOp) -> FloatOp:
        """A sum with its fused operand in front; anything else as it is."""
        if not isinstance(op, FloatAdd):
            return op
        return dataclasses.replace(op, inputs=tuple(sorted(op.inputs, key=lambda name: name not in self.unstored)))

    def weight_bits(self, op: FloatConv) -> int:
        bits: int | None = self.qconfig.override(op.path, "weight_bits")
        if bits is not None:
            return bits
        return self.qconfig.first_last_bits if op.path in self.first | self.last else self.qconfig.weight_bits

    def act_bits(self, op: FloatOp) -> int:
        """2, 3, 4, 8, or :data:`RAW`; of operators that share a grid what overrides say, or else the most."""
        sharing = self.sharing[op.path]
        if any(map(self._is_index, sharing)):
            return 8
        explicit = {path: bits for path in sharing if (bits := self.qconfig.override(path, "act_bits")) is not None}
        for path, bits in explicit.items():
            first = next(iter(explicit))
            if bits != explicit[first]:
                raise ValueError(_conflict("act_bits", first, path, explicit[first], bits))
        if explicit:
            return next(iter(explicit.values()))
        return max(self._usual_bits(self.ops[path]) for path in sharing)

    def _usual_bits(self, op: FloatOp) -> int:
        readers = list(walk_readers(self.graph, op.path))
        if isinstance(op, FloatConv) and not op.clamped and set(readers) == {None} and self._leaves_as_it_is(op):
            return self.qconfig.output_bits
        if op.path in self.unstored:
            return self.qconfig.residual_bits
        if all(r is None or r.path in self.last for r in readers):
            return self.qconfig.first_last_bits
        if all(isinstance(r, (FloatAdd, FloatMul)) for r in readers):
            return self.qconfig.shortcut_bits
        return self.qconfig.act_bits

    def _leaves_as_it_is(self, op: FloatOp) -> bool:
        """Whether nothing is between a layer and the host but a flattening that the integer graph does not need."""
        return all(
            isinstance(r, FloatFlatten) and r.shape == op.shape[:1] and self._leaves_as_it_is(r)
            for r in self.graph.readers(op.path)
        )


@contextmanager
def _observing(model: QuantModel) -> Iterator[dict[str, ActQuantizer]]:
    """Float evaluation with all observers on; what they have not given to a grid at the end is forgotten."""
    quantizers = model._quantizers()
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with switched(model, fake_quant=False, observer=True):
            for quantizer in quantizers.values():
                quantizer.calibrator = None
            yield quantizers
    finally:
        for module, mode in modes.items():
            module.training = mode
        for quantizer in quantizers.values():
            quantizer.calibrator = None


def calibrate(model: nn.Module, loader: Iterable[Any], batches: int | None = None, *, sync: bool = True) -> None:
    """Set the steps of all activations from data, with unquantized weights and activations.

    Parameters
    ----------
    model : nn.Module
        From :func:`prepare`, perhaps wrapped, as for several processes. Steps that it already has are replaced.
    loader : iterable
        Batches: tensors, or tuples and lists whose first item is the tensor. Empty ones are passed over.
    batches : int, optional
        How many of them to use; all by default. FQN takes 20, with ``calibration="percentile"``.
    sync : bool
        Whether processes that train together, each with batches of its own, find one grid from what all of them have
        seen; then each must call this. The first batches of all are taken for one batch, and so on, as far as the
        method looks at batches.

    Raises
    ------
    TrainingError
        No batch, or values that are not finite, in any process.
    TypeError
        Another model.
    """
    model = prepared(model)
    device = next(model.parameters()).device
    sync = sync and processes() > 1
    with _observing(model) as quantizers, torch.no_grad():
        count, failure = 0, None
        try:
            for batch in itertools.islice(loader, batches):
                x = batch[0] if isinstance(batch, (tuple, list)) else batch
                if not len(x):
                    continue
                for name, grid in model._execute(x.to(device)).items():
                    if not bool(torch.isfinite(grid.x).all()):
                        raise TrainingError(f"Calibration batch {count} makes values at {name} that are not finite.")
                count += 1
        except TrainingError as error:
            failure = error
        # Before anything else is waited for: a process that stops alone would leave the others waiting.
        reports = gather((count, failure and str(failure))) if sync else [(count, None)]
        if failure is not None:
            raise failure
        for rank, (_, text) in enumerate(reports):
            if text is not None:
                raise TrainingError(f"Calibration has failed in process {rank}: {text}")
        if not sum(n for n, _ in reports):
            raise TrainingError("Calibration needs at least one batch; the loader gave none.")
        for quantizer in quantizers.values():
            if sync:
                quantizer.join()
            quantizer.finish()
    model._calibrated = not model._uncalibrated()


def parameter_groups(model: nn.Module, *, lr: float, step_lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights with decay, biases without, steps with a learning rate of their own.

    Batch norms and corrections are among the biases.

    Decay would shrink steps towards zero for no reason, so they never get any.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "biases": [], "steps": []}
    layers = {}
    for module in model.modules():
        if isinstance(module, QuantLayer):
            layers[id(module.weight)] = "weights"
            others = [part for part in (module.norm, module.correction) if part is not None]
            layers.update({id(p): "biases" for part in others for p in part.parameters()})
            if module.bias is not None:
                layers[id(module.bias)] = "biases"
    for parameter in model.parameters():
        groups[layers.get(id(parameter), "steps")].append(parameter)
    return [
        {"params": groups["weights"], "lr": lr, "weight_decay": weight_decay},
        {"params": groups["biases"], "lr": lr, "weight_decay": 0.0},
        {"params": groups["steps"], "lr": step_lr, "weight_decay": 0.0},
    ]


def add_correction(model: QuantModel) -> list[nn.Parameter]:
    """Give every layer an affine map per output channel, the only thing that then trains (QC).

    Gupta and Asthana (WACV 2024) train it for one epoch with Adam and a learning rate of 1e-4, from the averaged model
    (:class:`nibblecore.qat.Ema`). Keep the model in evaluation mode, so that statistics stay: gradients do not care.
    Factors and offsets start at 1 and 0, and go into multipliers and biases of the integers, at no cost.

    Returns
    -------
    list of Parameter
        For the optimizer.
    """
    model.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, QuantLayer):
            if module.correction is None:
                module.correction = Correction(len(module.weight)).to(module.weight)
            module.correction.requires_grad_(True)
            parameters += module.correction.parameters()
    return parameters


def freeze_batch_norm(model: QuantModel) -> None:
    """Let batch norms keep their running statistics, and use them, in training mode too.

    What trains from now on computes exactly what the integers do; factors and offsets still learn. This is a property
    of the modules that copies keep and a ``state_dict`` does not: call it again after loading one into a new model.

    Raises
    ------
    ValueError
        A model without batch norms.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLayer) and m.norm is not None]
    if not layers:
        raise ValueError("the model has no batch norms; prepare it with batch_norm='unfolded' or 'folded_train'")
    for layer in layers:
        layer.frozen_norm = True
        layer.train(layer.training)


def synchronize_batch_norm(model: QuantModel) -> None:
    """Let batch norms take the statistics of the batch of all processes that train together, as one process would.

    For gradients too. ``torch.nn.SyncBatchNorm`` does so for batch norms that stay, on GPUs; this does on every device,
    and also for those that are folded in training. Like :func:`freeze_batch_norm`, a property of the modules.

    Raises
    ------
    ValueError
        A model without batch norms.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLayer) and m.norm is not None]
    if not layers:
        raise ValueError("the model has no batch norms; prepare it with batch_norm='unfolded' or 'folded_train'")
    for layer in layers:
        layer.sync_norm = True


def reestimate_batch_norm(model: QuantModel, loader: Iterable[Any], batches: int = 50) -> None:
    """Replace the statistics of batch norms by the mean over batches of theirs, as weights have moved since.

    Processes that train together all call this, each with batches of its own, and get the mean over all.

    Parameters
    ----------
    model : QuantModel
        Calibrated, prepared with ``batch_norm="unfolded"`` or "folded_train".
    loader : iterable
        As for :func:`calibrate`.
    batches : int
        How many to use.

    Raises
    ------
    TrainingError
        No batch.
    ValueError
        A model without batch norms.
    """
    norms = [m.norm for m in model.modules() if isinstance(m, QuantLayer) and m.norm is not None]
    statistics = [(cast(Tensor, n.running_mean), cast(Tensor, n.running_var)) for n in norms]
    if not norms:
        raise ValueError("the model has no batch norms; prepare it with batch_norm='unfolded' or 'folded_train'")
    device = next(model.parameters()).device
    modes, momenta = {m: m.training for m in model.modules()}, [norm.momentum for norm in norms]
    sums = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in statistics]
    model.eval()
    count = 0
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # a batch's own statistics
        with torch.no_grad():
            for batch in itertools.islice(loader, batches):
                model((batch[0] if isinstance(batch, (tuple, list)) else batch).to(device))
                count += 1
                for now, total in zip(statistics, sums, strict=True):
                    for value, so_far in zip(now, total, strict=True):
                        so_far += value
            if not count:
                raise TrainingError("Batch norms are re-estimated from at least one batch; the loader gave none.")
            count = int(reduce_sum(torch.tensor(count, device=device)))
            for now, total in zip(statistics, sums, strict=True):
                for value, so_far in zip(now, total, strict=True):
                    value.copy_(reduce_sum(so_far) / count)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


__all__ = [
    "QuantModel",
    "add_correction",
    "calibrate",
    "freeze_batch_norm",
    "parameter_groups",
    "prepare",
    "reestimate_batch_norm",
    "synchronize_batch_norm",
]
