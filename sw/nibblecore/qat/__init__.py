"""Quantization-aware training: ordinary PyTorch models in, integer graphs out.

::

    model = prepare(float_model, QConfig(), example_input)   # batch norm folded, quantizers inserted
    calibrate(model, loader)                                  # steps of the activations
    ...                                                       # your training loop
    graph = convert(model)                                    # nibblecore.ir.Graph
"""

from . import lsq  # registers its method
from .config import Override, QConfig
from .convert import convert
from .methods import METHODS, ActQuantizer, Method, WeightQuantizer
from .prepare import QuantModel, calibrate, parameter_groups, prepare

__all__ = [
    "METHODS",
    "ActQuantizer",
    "Method",
    "Override",
    "QConfig",
    "QuantModel",
    "WeightQuantizer",
    "calibrate",
    "convert",
    "lsq",
    "parameter_groups",
    "prepare",
]
