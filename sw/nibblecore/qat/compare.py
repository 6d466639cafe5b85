"""The tensors of fake quantization in the codes of the integer graph, for a comparison layer by layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..ir.graph import Graph, IntArray
from ..ir.grid import dequantize
from .layers import Grid
from .methods import InputQuantizer
from .prepare import QuantModel

Array = npt.NDArray[Any]


def fake_quant_codes(
    model: QuantModel, graph: Graph, tensors: Mapping[str, IntArray], *, isolated: bool = False
) -> dict[str, Array]:
    """What every layer of a prepared model computes in float32, as stored codes.

    Parameters
    ----------
    model : QuantModel
        In evaluation mode.
    graph : Graph
        What :func:`nibblecore.qat.convert` makes of it.
    tensors : mapping of str to int array
        Stored codes ``(N, C, H, W)`` of the input; with ``isolated``, of every tensor, as :func:`nibblecore.ir.run`
        gives them with ``keep=True``.
    isolated : bool
        Give every layer these tensors as inputs, in place of what the layers before it have computed: differences then
        do not travel from layer to layer.

    Returns
    -------
    dict[str, array]
        For every tensor of the graph that the model has too: int64 codes, or for 32-bit tensors float64 sums in the
        units of the integers, not rounded.
    """
    (name,) = graph.inputs
    real = torch.from_numpy(dequantize(tensors[name], graph.tensors[name]))
    parameter = next(model.parameters())
    x = real.to(parameter.device, parameter.dtype).reshape(len(real), *model._input_shape)
    with torch.no_grad():
        grids = model._execute(x)
        if isolated:
            grids = _isolated(model, graph, tensors, grids)
    return {name: _codes(graph, name, grids[name].x) for name in graph.tensors if name in grids}


def _isolated(
    model: QuantModel, graph: Graph, tensors: Mapping[str, IntArray], grids: Mapping[str, Grid]
) -> dict[str, Grid]:
    """Every module executed on the integers' values; ``grids`` has shapes and steps."""

    def exact(name: str) -> Grid:
        if name not in graph.tensors:  # a change of shape that the graph does not have: its own output
            return result[name]
        x = grids[name].x
        value = torch.from_numpy(dequantize(tensors[name], graph.tensors[name])).to(x).reshape(x.shape)
        return Grid(value, grids[name].step)

    source = model.get_submodule(model._input_name)
    assert isinstance(source, InputQuantizer)
    result = {model._input_name: grids[model._input_name]}
    for path, inputs in model._plan:
        result[path] = model.get_submodule(path)(*(exact(name) for name in inputs))
    return result


def _codes(graph: Graph, name: str, value: Tensor) -> Array:
    tensor = graph.tensors[name]
    real = value.detach().double().cpu().numpy().reshape(-1, *tensor.shape)
    if tensor.bits == 32:
        scale = np.asarray(tensor.scale)
        codes: Array = real / (scale[:, None, None] if scale.ndim else scale)
        return codes
    return np.rint(real / tensor.scale + tensor.zero).astype(np.int64)
