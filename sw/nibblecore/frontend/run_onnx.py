"""Exported models in ONNX Runtime, tensor by tensor, in stored codes."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import ExecutionError
from ..ir.graph import Graph, IntArray, Node
from .to_onnx import OnnxModel, Style, import_onnx, to_onnx

_VALUES_AT_ONCE: Final = 1 << 24
"""Values of all tensors together that one call of the runtime may hold: 64 MiB."""


PLAIN_OPTION: Final = "session.disable_quant_qdq"
"""Session option that the plain style needs, see :mod:`nibblecore.frontend.to_onnx`."""


class OnnxRun:
    """An integer graph, exported and loaded in ONNX Runtime on the CPU, that gives every tensor.

    Parameters
    ----------
    graph : Graph
    style : {"exact", "plain"}
        See :mod:`nibblecore.frontend.to_onnx`.
    threads : int, optional
        Of the runtime; its own choice without it.

    Raises
    ------
    ToolchainError
        ``onnx`` or ``onnxruntime`` is not installed.
    ExecutionError
        The runtime refuses the model.
    """

    def __init__(self, graph: Graph, *, style: Style = "exact", threads: int | None = None) -> None:
        runtime = import_onnx("onnxruntime")
        self.graph = graph
        self.model: OnnxModel = to_onnx(graph, style=style, inputs="codes", every_tensor=True)
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if style == "plain":
            options.add_session_config_entry(PLAIN_OPTION, "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session: Any = runtime.InferenceSession(self.model.data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has classes of its own for each way to fail
            raise ExecutionError(f"ONNX Runtime {runtime.__version__} does not load the model: {error}") from error

    def run(self, inputs: Mapping[str, IntArray]) -> dict[str, IntArray]:
        """Stored codes of every tensor, ``(N, C, H, W)``; ``acc + bias`` for 32-bit tensors, rounded to integers.

        Parameters
        ----------
        inputs : mapping of str to int array
            Stored codes of every input of the graph.
        """
        names = list(self.model.values)
        outputs = [self.model.values[name][0] for name in names]
        images = len(next(iter(inputs.values())))
        values = sum(int(np.prod(t.shape)) for t in self.graph.tensors.values())
        block = max(1, _VALUES_AT_ONCE // values)
        parts: dict[str, list[IntArray]] = {name: [] for name in names}
        for start in range(0, images, block):
            given = {name: np.asarray(codes[start : start + block], np.int8) for name, codes in inputs.items()}
            for name, value in zip(names, self.session.run(outputs, given), strict=True):
                parts[name].append(self._codes(name, value))
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _codes(self, name: str, value: npt.NDArray[np.float32]) -> IntArray:
        _, step, zero = self.model.values[name]
        steps = step[:, None, None] if step.ndim else step
        # A channel without weights or bias has the step 0.
        codes = np.divide(value.astype(np.float64), steps, where=steps != 0, out=np.zeros(value.shape))
        return np.rint(codes).astype(np.int64) + zero


def single(graph: Graph, node: Node) -> Graph:
    """The graph of one node, its tensors as inputs and output."""
    inputs = tuple(dict.fromkeys(node.inputs))
    tensors = {name: graph.tensors[name] for name in (*inputs, node.output)}
    return Graph((node,), tensors, inputs, (node.output,), node.path)


class OnnxLayers:
    """Every node of a graph as a model of its own, in ONNX Runtime; parameters and errors of :class:`OnnxRun`."""

    def __init__(self, graph: Graph, *, style: Style = "exact", threads: int | None = None) -> None:
        self.layers = {node.output: OnnxRun(single(graph, node), style=style, threads=threads) for node in graph.nodes}

    def run(self, tensors: Mapping[str, IntArray]) -> dict[str, IntArray]:
        """The output of every node, each of which reads the given tensors: differences do not travel.

        Parameters
        ----------
        tensors : mapping of str to int array
            Stored codes of every tensor, as :func:`nibblecore.ir.run` gives them with ``keep=True``.

        Returns
        -------
        dict[str, int64 array]
            For every tensor that a node writes.
        """
        return {
            name: layer.run({source: tensors[source] for source in layer.graph.inputs})[name]
            for name, layer in self.layers.items()
        }
