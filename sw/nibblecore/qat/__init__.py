"""Quantization-aware training: ordinary PyTorch models in, integer graphs out.

::

    model = prepare(float_model, QConfig(), example_input)   # batch norm folded, quantizers inserted
    calibrate(model, loader)                                  # steps of the activations
    ...                                                       # your training loop
    graph = convert(model)                                    # nibblecore.ir.Graph

A prepared model is an ordinary module. ``state_dict``, ``deepcopy`` and pickles work at any time; ``torch.autocast``
leaves codes alone; ``torch.compile(model, fullgraph=True)`` takes it whole; under ``torchrun`` it trains as in one
process (:mod:`nibblecore.qat.distributed`). Quantization and observers are switched on and off by
:meth:`QuantModel.disable_fake_quant` and its like, by ``model.apply(disable_observer)``, or for a while by
``with fake_quant_disabled(model, "stage2.*"):`` (:mod:`nibblecore.qat.toggles`).
"""

from . import dorefa, iao, lsq, lsq_plus, pact, presets, tqt  # most of them register their methods
from .averaging import Ema
from .checkpoint import checkpoint_facts, load_checkpoint, load_model, save_checkpoint
from .compare import fake_quant_codes
from .config import Override, QConfig
from .convert import convert
from .dorefa import DorefaOptions
from .export_onnx import export_onnx
from .iao import IaoOptions
from .lsq import LsqOptions
from .lsq_plus import LsqPlusOptions
from .methods import METHODS, ActQuantizer, Method, MethodOptions, WeightQuantizer
from .pact import clipping_penalty
from .prepare import (
    QuantModel,
    add_correction,
    calibrate,
    freeze_batch_norm,
    parameter_groups,
    prepare,
    reestimate_batch_norm,
    synchronize_batch_norm,
)
from .presets import PRESETS, Preset
from .probe import bin_offsets, edge_shares, soft_round
from .regularization import (
    OscillationTracker,
    bin_regularization,
    bin_regularization_weight,
    cosine_ramp,
    dampening,
)
from .toggles import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    fake_quant_disabled,
    observer_disabled,
)
from .tqt import ThresholdFreezer, TqtOptions

__all__ = [
    "METHODS",
    "PRESETS",
    "ActQuantizer",
    "DorefaOptions",
    "Ema",
    "IaoOptions",
    "LsqOptions",
    "LsqPlusOptions",
    "Method",
    "MethodOptions",
    "OscillationTracker",
    "Override",
    "Preset",
    "QConfig",
    "QuantModel",
    "ThresholdFreezer",
    "TqtOptions",
    "WeightQuantizer",
    "add_correction",
    "bin_offsets",
    "bin_regularization",
    "bin_regularization_weight",
    "calibrate",
    "checkpoint_facts",
    "clipping_penalty",
    "convert",
    "cosine_ramp",
    "dampening",
    "disable_fake_quant",
    "disable_observer",
    "dorefa",
    "edge_shares",
    "enable_fake_quant",
    "enable_observer",
    "export_onnx",
    "fake_quant_codes",
    "fake_quant_disabled",
    "freeze_batch_norm",
    "iao",
    "load_checkpoint",
    "load_model",
    "lsq",
    "lsq_plus",
    "observer_disabled",
    "pact",
    "parameter_groups",
    "prepare",
    "presets",
    "reestimate_batch_norm",
    "save_checkpoint",
    "soft_round",
    "synchronize_batch_norm",
    "tqt",
]
