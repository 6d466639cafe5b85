"""The integer graph: what training exports, import produces and the compiler takes."""

from .differences import compare_requantization
from .graph import (
    AvgPool,
    ChannelMul,
    Concat,
    Conv,
    Flatten,
    Graph,
    Lookup,
    MaxPool,
    Node,
    ResidualAdd,
    TensorType,
    Upsample,
)
from .grid import dequantize, quantize
from .interpret import run
from .verify import verify

__all__ = [
    "AvgPool",
    "ChannelMul",
    "Concat",
    "Conv",
    "Flatten",
    "Graph",
    "Lookup",
    "MaxPool",
    "Node",
    "ResidualAdd",
    "TensorType",
    "Upsample",
    "compare_requantization",
    "dequantize",
    "quantize",
    "run",
    "verify",
]
