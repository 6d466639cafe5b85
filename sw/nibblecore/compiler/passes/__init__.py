"""Passes of the compiler: pure functions from a valid graph to a valid graph, one file each.

The driver (:mod:`nibblecore.compiler.pipeline`) verifies the graph behind every pass.
"""

from .fuse_add import fuse_add
from .lower import lower
from .merge_flatten import merge_flatten
from .split_planes import split_planes

__all__ = ["fuse_add", "lower", "merge_flatten", "split_planes"]
