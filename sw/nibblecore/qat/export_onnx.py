"""A trained model as an ONNX file."""

from pathlib import Path

from ..frontend import to_onnx
from ..frontend.to_onnx import Inputs, OnnxModel, Style
from ..ir.graph import Graph
from .convert import convert
from .prepare import QuantModel


def export_onnx(
    model: QuantModel | Graph, path: str | Path, *, style: Style = "exact", inputs: Inputs = "real"
) -> OnnxModel:
    """Write the integers of a prepared model, or an integer graph, as an ONNX file.

    :func:`nibblecore.frontend.to_onnx.to_onnx` has the parameters and what the styles promise. A model is converted
    first and raises what :func:`nibblecore.qat.convert` raises.
    """
    if not isinstance(model, QuantModel | Graph):
        raise TypeError(f"model must be a QuantModel or an integer graph, not a {type(model).__name__}")
    graph = model if isinstance(model, Graph) else convert(model)
    return to_onnx.export_onnx(graph, path, style=style, inputs=inputs)
