"""Fuse a residual addition behind the convolution that computes one of its operands."""

import dataclasses
from collections.abc import Callable

from ...arch.config import ArchConfig
from ...ir.graph import Graph, Node
from ..nodes import FusedAdd, MacLayer
from ..tiling import tensor_layout


def fuse_add(arch: ArchConfig) -> Callable[[Graph], Graph]:
    """The pass for a core: let a convolution add the other operand itself, so that its own tensor is never stored.

    An operand qualifies if a layer without addition computes it, nothing else reads it and it is no output of the
    graph, and if the activation buffer holds the window of one pixel of that layer with that pixel of the stored
    operand and of the sum. Where both qualify, the one that is computed later is fused. The fused layer stands where
    the addition was, so that the stored operand exists by then.
    """
    return lambda graph: _fuse(graph, arch)


def _fuse(graph: Graph, arch: ArchConfig) -> Graph:
    nodes: list[Node | None] = list(graph.nodes)
    tensors = dict(graph.tensors)
    position = {n.output: i for i, n in enumerate(graph.nodes)}
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    for index, node in enumerate(graph.nodes):
        if not (isinstance(node, MacLayer) and node.add is not None):
            continue
        candidates = []
        for operand in (0, 1):
            name = node.inputs[operand]
            producer = nodes[position[name]] if name in position else None
            if (
                isinstance(producer, MacLayer)
                and producer.add is None
                and readers[name] == 1
                and name not in graph.outputs
                and _window_words(graph, producer, node, operand, arch) <= arch.act_depth
            ):
                candidates.append((position[name], operand))
        if candidates:
            place, operand = max(candidates)
            producer = nodes[place]
            assert isinstance(producer, MacLayer)
            nodes[place], nodes[index] = None, _fused(producer, node, operand)
            del tensors[producer.output]
    return graph.replace(nodes=tuple(n for n in nodes if n is not None), tensors=tensors)


def _window_words(graph: Graph, producer: MacLayer, addition: MacLayer, operand: int, arch: ArchConfig) -> int:
    """Words of the activation buffer that one pixel of the fused layer takes, all its channels at once."""
    names = (producer.inputs[0], addition.inputs[1 - operand], addition.output)
    x, stored, y = (tensor_layout(graph.tensors[n].shape, graph.tensors[n].bits, arch) for n in names)
    rows, cols = ((k - 1) * d + 1 for k, d in zip(producer.kernel, producer.dilation, strict=True))
    return min(rows, x.height) * min(cols, x.width) * x.pixel_words + stored.pixel_words + y.pixel_words


def _fused(producer: MacLayer, addition: MacLayer, operand: int) -> MacLayer:
    add = addition.add
    assert add is not None
    if operand == 1:  # the sum is commutative: the convolution's factor becomes k_a
        add = FusedAdd(add.k_b, add.k_a, add.shift, addition.zero, add.zero, add.low, add.high)
    stored = addition.inputs[1 - operand]
    return dataclasses.replace(
        producer, output=addition.output, inputs=(producer.inputs[0], stored), op=f"{producer.op}+Add",
        path=f"{producer.path}+{addition.path}", mode=addition.mode, add=add,
    )  # fmt: skip
