"""Fuse a residual addition behind the convolution that computes one of its operands."""

import dataclasses

from ...ir.graph import Graph, Node
from ..nodes import FusedAdd, MacLayer


def fuse_add(graph: Graph) -> Graph:
    """Let a convolution add the other operand itself, so that its own tensor is never stored.

    An operand qualifies if a layer without addition computes it, nothing else reads it and it is no output of the
    graph. Where both qualify, the one that is computed later is fused. The fused layer stands where the addition was,
    so that the stored operand exists by then.
    """
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
            ):
                candidates.append((position[name], operand))
        if candidates:
            place, operand = max(candidates)
            producer = nodes[place]
            assert isinstance(producer, MacLayer)
            nodes[place], nodes[index] = None, _fused(producer, node, operand)
            del tensors[producer.output]
    return graph.replace(nodes=tuple(n for n in nodes if n is not None), tensors=tensors)


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
