"""Quantization-aware training: ordinary PyTorch models in, integer graphs out.

::

    model = prepare(float_model, QConfig(), example_input)   # batch norm folded, quantizers inserted
    calibrate(model, loader)                                  # steps of the activations
    ...                                                       # your training loop
    graph = convert(model)                                    # nibblecore.ir.Graph
"""

from . import lsq  # registers its method
from .checkpoint import checkpoint_facts, load_checkpoint, load_model, save_checkpoint
from .config import Override, QConfig
from .convert import convert
from .lsq import LsqOptions
from .methods import METHODS, ActQuantizer, Method, MethodOptions, WeightQuantizer
from .prepare import QuantModel, calibrate, parameter_groups, prepare

__all__ = [
    "METHODS",
    "ActQuantizer",
    "LsqOptions",
    "Method",
    "MethodOptions",
    "Override",
    "QConfig",
    "QuantModel",
    "WeightQuantizer",
    "calibrate",
    "checkpoint_facts",
    "convert",
    "load_checkpoint",
    "load_model",
    "lsq",
    "parameter_groups",
    "prepare",
    "save_checkpoint",
]
