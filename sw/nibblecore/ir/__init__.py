"""The integer graph: what training exports, import produces and the compiler takes."""

from .graph import AvgPool, Conv, Flatten, Graph, MaxPool, Node, ResidualAdd, TensorType

__all__ = ["AvgPool", "Conv", "Flatten", "Graph", "MaxPool", "Node", "ResidualAdd", "TensorType"]
