"""What every lowered graph keeps to, checked behind every pass of the compiler."""

from collections.abc import Iterator

from ..arch import numerics
from ..arch.isa import OutputMode
from ..errors import GraphError
from ..ir.graph import Graph
from ..ir.verify import output_size
from .nodes import MacLayer, PoolLayer


def verify_lowered(graph: Graph) -> Graph:
    """Return ``graph`` if its layers fit together; raises :class:`GraphError` with every broken rule.

    Names are defined before use and once, shapes follow from the windows, planes add up to the weights, records,
    clamps and additions are within their fields.
    """
    if violations := list(_violations(graph)):
        raise GraphError(violations)
    return graph


def _violations(graph: Graph) -> Iterator[str]:
    known = set(graph.inputs)
    for node in graph.nodes:
        if not isinstance(node, MacLayer | PoolLayer):
            yield f"{node.path}: {type(node).__name__} has not been lowered"
            continue
        for name in node.inputs:
            if name not in known:
                yield f"{node.path}: tensor {name} is read before any layer has written it"
        if node.output in known:
            yield f"{node.path}: tensor {node.output} is written a second time"
        known.add(node.output)
        if node.inputs[0] in graph.tensors and node.output in graph.tensors:
            yield from (f"{node.path}: {text}" for text in _layer(graph, node))
    for name in graph.outputs:
        if name not in known:
            yield f"output {name} is written by no layer"
    if set(graph.tensors) != known:
        yield f"types and tensors differ: {sorted(set(graph.tensors) ^ known)}"


def _layer(graph: Graph, node: MacLayer | PoolLayer) -> Iterator[str]:
    x, y = graph.tensors[node.inputs[0]], graph.tensors[node.output]
    top, left, bottom, right = node.padding
    sizes = (
        output_size(x.shape[1], node.kernel[0], node.stride[0], node.dilation[0], top, bottom),
        output_size(x.shape[2], node.kernel[1], node.stride[1], node.dilation[1], left, right),
    )
    if sizes != y.shape[1:]:
        yield f"its output has shape {y.shape}, but the window gives {sizes}"
    if (isinstance(node, PoolLayer) or node.kind == "identity") and x.shape[0] != y.shape[0]:
        yield f"{x.shape[0]} channels become {y.shape[0]}"
    if isinstance(node, PoolLayer):
        return
    if node.mode is not {4: OutputMode.INT4, 8: OutputMode.INT8, 32: OutputMode.RAW32}[y.bits]:
        yield f"mode {node.mode.name} does not write {y.bits} bits"
    if (node.add is not None) != (len(node.inputs) == 2):
        yield f"it has {len(node.inputs)} inputs, and {'an' if node.add else 'no'} addition"
    if node.add is not None and graph.tensors[node.inputs[1]].shape != y.shape:
        yield f"it adds a tensor of shape {graph.tensors[node.inputs[1]].shape} to one of {y.shape}"
    if (node.weight is None) != (node.kind == "identity"):
        yield f"a layer of kind {node.kind} has {'no ' if node.weight is None else ''}weights"
    for name in ("bias", "mult", "shift"):
        if getattr(node, name).shape != y.shape[:1]:
            yield f"{name} must have shape {y.shape[:1]}, not {getattr(node, name).shape}"
    if node.weight is not None and node.weight.shape != (y.shape[0], x.shape[0], *node.kernel):
        yield f"weight must have shape {(y.shape[0], x.shape[0], *node.kernel)}, not {node.weight.shape}"
    if node.planes and node.weight is not None:
        total = sum(p.weight * 16**p.shift for p in node.planes)
        if (total != node.weight).any():
            yield "the planes do not add up to the weights"
        low, high = numerics.code_range(4)
        if any(p.weight.min() < low or p.weight.max() > high for p in node.planes):
            yield "a plane has weights that are no nibbles"
