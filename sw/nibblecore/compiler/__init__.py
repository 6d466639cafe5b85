"""The compiler: integer graph to program, with scheduler, allocator, linter and cost model."""

from .cost import CostParameters, Estimate, estimate
from .lint import lint
from .options import CompileOptions
from .pipeline import compile_graph

__all__ = ["CompileOptions", "CostParameters", "Estimate", "compile_graph", "estimate", "lint"]
