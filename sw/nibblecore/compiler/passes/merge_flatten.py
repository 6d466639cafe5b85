"""Turn a linear layer behind Flatten into a convolution whose kernel is the whole map."""

import dataclasses
from typing import Any

from ...ir.graph import Conv, Flatten, Graph, Node


def merge_flatten(graph: Graph) -> Graph:
    """Remove every Flatten: codes stay where they are, and the following layers read the map itself.

    A linear layer's weights ``(out, C*H*W, 1, 1)`` become ``(out, C, H, W)``, channels outermost as in PyTorch. A
    Flatten of a 1x1 map is a change of name. Precondition: :func:`nibblecore.compiler.rules.check_supported`.
    """
    source: dict[str, str] = {}  # flattened tensor -> the map it was made from
    tensors = dict(graph.tensors)
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, Flatten):
            source[node.output] = source.get(node.inputs[0], node.inputs[0])
            del tensors[node.output]
            continue
        inputs = tuple(source.get(name, name) for name in node.inputs)
        if inputs != node.inputs:
            changes: dict[str, Any] = {"inputs": inputs}
            channels, height, width = tensors[inputs[0]].shape
            if isinstance(node, Conv) and (height, width) != (1, 1):
                changes["weight"] = node.weight.reshape(-1, channels, height, width)
                changes["stride"] = (1, 1)
            node = dataclasses.replace(node, **changes)
        nodes.append(node)
    return graph.replace(nodes=tuple(nodes), tensors=tensors)
