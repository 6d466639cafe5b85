"""The integer graph: what training exports, import produces and the compiler takes."""

from .graph import AvgPool, Conv, Flatten, Graph, MaxPool, Node, ResidualAdd, TensorType
from .grid import dequantize, quantize
from .interpret import run
from .verify import verify

__all__ = [
    "AvgPool",
    "Conv",
    "Flatten",
    "Graph",
    "MaxPool",
    "Node",
    "ResidualAdd",
    "TensorType",
    "dequantize",
    "quantize",
    "run",
    "verify",
]
