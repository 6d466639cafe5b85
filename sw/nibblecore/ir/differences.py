"""How often other requantizations give other codes than the core's, on a network and real inputs."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from .graph import Graph
from .interpret import REQUANTIZE, executors, run
from .requantization import MODES, NIBBLECORE


@dataclasses.dataclass(frozen=True)
class Difference:
    """One tensor under one mode, beside the core's codes.

    Parameters
    ----------
    mode, path : str
        The requantization, and the node that writes the tensor.
    codes : int
        How many codes were compared.
    alone : int
        How many differ where the node reads the core's own codes: what the rule itself does.
    together : int
        How many differ where the whole network runs in this mode.
    most_alone, most_together : int
        The largest differences of a code.
    """

    mode: str
    path: str
    codes: int
    alone: int
    together: int
    most_alone: int
    most_together: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A mode on a whole network; shares in 0..1.

    Parameters
    ----------
    mode : str
    alone, together : float
        Of the codes of all tensors that are requantized, see :class:`Difference`.
    outputs : float
        Of all numbers that leave the network, together.
    classes : float
        Of the images whose largest output is another one; nan for a network without one vector as its output.
    """

    mode: str
    alone: float
    together: float
    outputs: float
    classes: float


def compare_requantization(
    graph: Graph, inputs: dict[str, Any], modes: Iterable[str] = MODES
) -> tuple[list[Summary], list[Difference]]:
    """Run a network in several modes and count what differs from the core's own codes.

    Parameters
    ----------
    graph : Graph
        Whose multipliers are those of its scales, as training exports it.
    inputs : dict[str, integer array]
        As for :func:`nibblecore.ir.run`.
    modes : iterable of str
        Of :data:`nibblecore.ir.requantization.MODES`; the core's own is left out.

    Returns
    -------
    tuple of list
        A :class:`Summary` for each mode, and a :class:`Difference` for each mode and each node that requantizes.
    """
    core = run(graph, inputs, keep=True)
    summaries, differences = [], []
    for mode in modes:
        if mode == NIBBLECORE:
            continue
        execute = executors(mode)
        other = run(graph, inputs, keep=True, requantization=mode)
        rows = []
        for node in graph.nodes:
            if not isinstance(node, REQUANTIZE) or graph.tensors[node.output].bits == 32:
                continue
            want = core[node.output]
            alone = np.abs(execute[type(node)](graph, node, *(core[name] for name in node.inputs)) - want)
            together = np.abs(other[node.output] - want)
            counts = [int(np.count_nonzero(d)) for d in (alone, together)]
            most = [int(d.max(initial=0)) for d in (alone, together)]
            rows.append(Difference(mode, node.path, want.size, *counts, *most))
        total = max(1, sum(row.codes for row in rows))
        values = sum(core[name].size for name in graph.outputs)
        changed = sum(int(np.count_nonzero(other[name] != core[name])) for name in graph.outputs)
        summaries.append(
            Summary(
                mode,
                sum(row.alone for row in rows) / total,
                sum(row.together for row in rows) / total,
                changed / max(1, values),
                _other_class(graph, core, other),
            )
        )
        differences += rows
    return summaries, differences


def _other_class(graph: Graph, core: dict[str, Any], other: dict[str, Any]) -> float:
    name = graph.outputs[0]
    if len(graph.outputs) > 1 or graph.tensors[name].shape[1:] != (1, 1):
        return float("nan")
    scale = np.asarray(graph.tensors[name].scale).reshape(-1, 1, 1)
    first, second = ((t[name] * scale).argmax(axis=1) for t in (core, other))
    return float((first != second).mean()) if first.size else 0.0
