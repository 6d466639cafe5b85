"""The literature's systems as settings: what each paper quantizes how, and how it trains.

::

    preset = presets.fqn(bits=4)
    model = prepare(float_model, preset.qconfig, example_input)
    preset.training["qat"]["lr"]

A preset is data: a :class:`~nibblecore.qat.QConfig`, and the tables of a training recipe. Where a paper does what the
core does not, or does not say what it does, :attr:`Preset.deviations` says what is done here. All of them share: 4-bit
weights are in -7..7 unless ``weight_range="full"`` is set, 8-bit weights have the 225 codes of
:func:`nibblecore.arch.numerics.is_weight8`, sums have a grid of their own and one rounding, and the network's input has
a fixed grid.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from .config import QConfig
from .iao import IaoOptions
from .lsq import LsqOptions
from .lsq_plus import LsqPlusOptions
from .tqt import TqtOptions

Tables = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A system of the literature.

    Parameters
    ----------
    name : str
        The factory's, a key of :data:`PRESETS`.
    source : str
        The publication.
    qconfig : QConfig
        What :func:`nibblecore.qat.prepare` takes.
    training : mapping of mappings
        Tables of a recipe, as published where it is: ``qat``, ``bin_regularization``, ``ema``, .. Epochs and learning
        rates are those of the paper's data.
    deviations : tuple of str
        Where this is not the paper, or the paper is silent; a sentence each.
    """

    name: str
    source: str
    qconfig: QConfig
    training: Tables
    deviations: tuple[str, ...] = ()


_WEIGHT_DECAY: Final = {2: 2.5e-5, 3: 5e-5, 4: 1e-4, 8: 1e-4}
_STATISTICS: Final = (
    "Sums stay float in the paper; here their operands have 8 bits, and their results those of activations."
)
_LSQ_RANGE: Final = "The paper's weights use all codes, 4 bits -8..7."


def _check_bits(name: str, bits: int, allowed: tuple[int, ...]) -> None:
    if bits not in allowed:
        shown = f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]}"
        raise ValueError(f"{name} must be {shown}, not {bits!r}")


def _sgd(bits: int, epochs: int = 90, **changes: Any) -> dict[str, Any]:
    """LSQ's training: SGD with momentum 0.9, a cosine to 0, less weight decay the fewer bits."""
    return {
        "epochs": epochs,
        "optimizer": "sgd",
        "lr": 0.001 if bits == 8 else 0.01,
        "momentum": 0.9,
        "weight_decay": _WEIGHT_DECAY[bits],
        "schedule": "cosine",
        "step_optimizer": "same",
        "step_lr": 0.001 if bits == 8 else 0.01,
        **changes,
    }


def lsq(bits: int = 4, *, ends: int = 8) -> Preset:
    """LSQ: one learned step per layer, batch norm behind the quantized weights, ends of 8 bits.

    ``bits`` and ``ends``: 2, 3, 4 or 8.
    """
    _check_bits("bits", bits, (2, 3, 4, 8))
    _check_bits("ends", ends, (2, 3, 4, 8))
    return Preset(
        name="lsq",
        source="Esser et al., Learned Step Size Quantization, ICLR 2020",
        qconfig=QConfig(
            weight_bits=bits, act_bits=bits, first_last_bits=ends, granularity="tensor", batch_norm="unfolded"
        ),
        training={"qat": _sgd(bits)},
        deviations=(
            _STATISTICS,
            _LSQ_RANGE,
            "First steps are limited to what covers the largest value, which the paper's formula exceeds at 8 bits.",
        ),
    )


def fully_4bit() -> Preset:
    """LSQ with nothing above 4 bits: ends, operands of sums, results; the last sums go to the host as they are."""
    base = lsq(4, ends=4)
    return dataclasses.replace(
        base,
        name="fully_4bit",
        qconfig=dataclasses.replace(base.qconfig, residual_bits=4, shortcut_bits=4),
        deviations=(_LSQ_RANGE, "The paper has ends of 8 bits and float sums."),
    )


def lsq_plus(bits: int = 4, *, configuration: int = 4, ends: int = 8) -> Preset:
    """LSQ+ in one of the paper's four configurations.

    1: unsigned codes, so that negative values become 0; 2: signed codes; 3 and 4: codes with a learned offset.
    """
    _check_bits("bits", bits, (2, 3, 4, 8))
    _check_bits("ends", ends, (2, 3, 4, 8))
    _check_bits("configuration", configuration, (1, 2, 3, 4))
    return Preset(
        name="lsq_plus",
        source="Bhalgat et al., LSQ+: Improving low-bit quantization through learnable offsets, CVPR workshops 2020",
        qconfig=QConfig(
            method="lsq+",
            weight_bits=bits,
            act_bits=bits,
            first_last_bits=ends,
            granularity="tensor",
            batch_norm="unfolded",
            signed=False if configuration == 1 else None,
            options=(LsqPlusOptions(offset=configuration >= 3),),
        ),
        training={"qat": _sgd(bits)},
        deviations=(
            _STATISTICS,
            _LSQ_RANGE,
            "The offset is a multiple of the step, so that zero padding is exact; configurations 3 and 4 are then one.",
            "Behind a ReLU there is no offset, and codes are unsigned in every configuration.",
        ),
    )


def bin_regularization(bits: int = 4, *, ends: int = 8, schedule: str = "S2") -> Preset:
    """Bin regularization over LSQ; with schedule S2, steps settle for the first third of the epochs.

    ``schedule``: "S1", "S2" or "S3", see :func:`nibblecore.qat.bin_regularization_weight`.
    """
    if schedule not in ("S1", "S2", "S3"):
        raise ValueError(f"schedule must be 'S1', 'S2' or 'S3', not {schedule!r}")
    base = lsq(bits, ends=ends)
    return dataclasses.replace(
        base,
        name="bin_regularization",
        source="Han et al., Improving low-precision network quantization via bin regularization, ICCV 2021",
        training={**base.training, "bin_regularization": _bins(schedule)},
        deviations=(
            *base.deviations,
            "The term is summed over layers; the paper does not say sum or mean.",
            "The term moves steps too, as both are said to be updated together.",
        ),
    )


def _bins(schedule: str) -> dict[str, Any]:
    return {"weight": 0.5, "schedule": schedule, "grad_to_step": True}


def bin_regularization_hardware(bits: int = 4, *, schedule: str = "S2") -> Preset:
    """Bin regularization's hardware-friendly setting: power-of-two steps everywhere, 8-bit biases, the same bits in all
    layers, operands and results of sums included, and batch norm folded during training.

    All multipliers are powers of two, but those of average pools whose window is none.
    """
    _check_bits("bits", bits, (2, 3, 4))
    base = bin_regularization(bits, ends=bits, schedule=schedule)
    return dataclasses.replace(
        base,
        name="bin_regularization_hardware",
        qconfig=QConfig(
            method="tqt",
            weight_bits=bits,
            act_bits=bits,
            first_last_bits=bits,
            residual_bits=bits,
            shortcut_bits=bits,
            bias_bits=8,
            granularity="tensor",
            scale_kind="power_of_two",
            input_scale_kind="power_of_two",
            batch_norm="folded_train",
        ),
        training={
            "qat": {**base.training["qat"], "freeze_norm_after": 1 / 3},
            "bin_regularization": _bins(schedule),
        },
        deviations=(
            "The network's input has at least 4 bits.",
            "The last sums go to the host as they are.",
            (
                "Batch norms keep their statistics from the first third on, where S2 begins: what is regularized then "
                "is what is quantized. The paper does not say when."
            ),
            "Learning rates are those of LSQ; of the thresholds in log2.",
        ),
    )


def fqn(bits: int = 4, *, ends: int | None = None) -> Preset:
    """FQN: every tensor of few bits, from the network's input to its outputs; frozen batch norm, folded before
    quantization; ranges from the quantiles of 20 batches, then moving averages; a step per channel of weights; integer
    zero points.

    ``ends``: bits of the network's input, its first and last weights and its outputs, if not ``bits``.
    """
    _check_bits("bits", bits, (2, 3, 4, 8))
    ends = max(bits, 4) if ends is None else ends
    _check_bits("ends", ends, (4, 8))
    return Preset(
        name="fqn",
        source="Li et al., Fully quantized network for object detection, CVPR 2019",
        qconfig=QConfig(
            method="iao",
            weight_bits=bits,
            act_bits=bits,
            first_last_bits=ends,
            residual_bits=bits,
            shortcut_bits=bits,
            output_bits=8 if ends == 8 else 4,
            granularity="channel",
            calibration="percentile",
            batch_norm="folded",
            options=(IaoOptions(quantile=0.999),),
        ),
        training={"qat": _sgd(bits, lr=0.001), "data": {"calibration_batches": 20}},
        deviations=(
            "Weights are symmetric, so that products of their zero points need not be summed.",
            (
                "Moving averages follow the quantiles 0.001 and 0.999 of each batch, decay 0.99; the paper's decay, "
                "and whether its averages follow quantiles or extremes, are not known."
            ),
            "The learning rate is a tenth of LSQ's; the paper's is not known.",
            "Batch norm is folded once: its factors train within the weights.",
            (
                "Sums have one rounding; the arithmetic of Jacob et al. is the interpreter's "
                '``requantization="tflite-double"``.'
            ),
        ),
    )


def ema_qc(bits: int = 4, *, ends: int = 8) -> Preset:
    """EMA and QC: LSQ with a step per layer, moving averages of weights and steps, and one epoch of quantization
    correction behind it.

    ``ends=bits`` is the paper's starred variant.
    """
    base = lsq(bits, ends=ends)
    return dataclasses.replace(
        base,
        name="ema_qc",
        source="Gupta and Asthana, Reducing the side-effects of oscillations in training of quantized YOLO networks, "
        "WACV 2024",
        training={
            "qat": _sgd(
                bits,
                100,
                lr=0.01,
                momentum=0.937,
                weight_decay=5e-4,
                step_optimizer="adam",
                step_lr=1e-4,
                nesterov=True,
            ),
            "ema": {"decay": 0.9999, "ramp": 2000},
            "correction": {"epochs": 1, "lr": 1e-4},
        },
        deviations=(
            *base.deviations,
            "Weights train with SGD as in YOLOv5; the paper names Adam for steps only.",
            "The correction trains on all training images; the paper's subset is not known.",
        ),
    )


def tqt(weight_bits: int = 4, act_bits: int = 8) -> Preset:
    """TQT: power-of-two steps learned as thresholds, one per layer; ends of 8 bits; batch norm folded with the
    statistics of batches for one epoch, then frozen."""
    _check_bits("weight_bits", weight_bits, (2, 3, 4, 8))
    _check_bits("act_bits", act_bits, (2, 3, 4, 8))
    return Preset(
        name="tqt",
        source="Jain et al., Trained quantization thresholds, MLSys 2020",
        qconfig=QConfig(
            method="tqt",
            weight_bits=weight_bits,
            act_bits=act_bits,
            granularity="tensor",
            scale_kind="power_of_two",
            input_scale_kind="power_of_two",
            batch_norm="folded_train",
            options=(TqtOptions(weight_threshold="3std"),),
        ),
        training={
            "qat": {
                "epochs": 5,
                "optimizer": "adam",
                "lr": 1e-6,
                "weight_decay": 0.0,
                "schedule": "cosine",
                "step_optimizer": "same",
                "step_lr": 1e-2,
                "freeze_norm_after": 1 / 5,
            }
        },
        deviations=(
            "Biases have the width of the sums, not 16 bits.",
            "Learning rates fall along a cosine; the paper's fall in stages.",
            "Sums and average pools have grids of their own.",
        ),
    )


def iao(bits: int = 8, *, delay: int = 0) -> Preset:
    """IAO: ranges of weights at every step, of activations by moving averages, batch norm folded while it trains.

    ``delay``: batches for which activations are not quantized.
    """
    _check_bits("bits", bits, (2, 3, 4, 8))
    return Preset(
        name="iao",
        source="Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only "
        "inference, CVPR 2018",
        qconfig=QConfig(
            method="iao",
            weight_bits=bits,
            act_bits=bits,
            output_bits=8,
            granularity="tensor",
            batch_norm="folded_train",
            options=(IaoOptions(decay=0.999, delay=delay),),
        ),
        training={"qat": _sgd(bits, lr=0.001)},
        deviations=(
            "Weights are symmetric.",
            "Training starts at a calibrated float network, so that activations need not wait.",
            "Learning rates are those of LSQ at 8 bits; the paper's belong to its data.",
        ),
    )


def pact(bits: int = 4, *, ends: int = 8) -> Preset:
    """PACT: activations clipped to a learned threshold, which the loss pulls down as weight decay does weights."""
    _check_bits("bits", bits, (2, 3, 4, 8))
    _check_bits("ends", ends, (2, 3, 4, 8))
    return Preset(
        name="pact",
        source="Choi et al., PACT: Parameterized clipping activation for quantized neural networks, 2018",
        qconfig=QConfig(
            method="pact",
            weight_bits=bits,
            act_bits=bits,
            first_last_bits=ends,
            granularity="tensor",
            batch_norm="unfolded",
        ),
        training={"qat": _sgd(bits, weight_decay=1e-4, clipping_penalty=1e-4)},
        deviations=(
            "Weights have steps by their largest magnitude; the paper's (DoReFa's) have no code of zero.",
            "Thresholds start at the largest value seen, not at a constant.",
            "The paper's ends are float.",
        ),
    )


def dorefa(bits: int = 2) -> Preset:
    """DoReFa: weights through a tanh, activations clipped to 0..1; 2 or 3 bits, as 4 bits of odd levels need 5."""
    _check_bits("bits", bits, (2, 3))
    return Preset(
        name="dorefa",
        source="Zhou et al., DoReFa-Net, 2016",
        qconfig=QConfig(method="dorefa", weight_bits=bits, act_bits=bits, granularity="tensor", batch_norm="unfolded"),
        training={"qat": _sgd(bits, weight_decay=1e-4)},
        deviations=(
            "Layers of 8 bits, float in the paper, have ranges by their largest magnitude.",
            "Quantized weights keep the magnitude of the float ones.",
            "Gradients stay float.",
        ),
    )


def _oscillations(name: str, bits: int, tables: Tables) -> Preset:
    _check_bits("bits", bits, (2, 3, 4))
    base = lsq(bits)
    rate = {4: 0.0033}.get(bits, 0.01)
    return dataclasses.replace(
        base,
        name=name,
        source="Nagel et al., Overcoming oscillations in quantization-aware training, ICML 2022",
        qconfig=dataclasses.replace(
            base.qconfig, calibration="mse", options=(LsqOptions(grad_scale=False, weight_init="mse"),)
        ),
        training={
            "qat": _sgd(bits, lr=rate, step_optimizer="adam", step_lr=1e-5),
            "batch_norm": {"reestimate_batches": 50},
            **tables,
        },
        deviations=(_STATISTICS, _LSQ_RANGE),
    )


def oscillation_dampening(bits: int = 4) -> Preset:
    """Weights are pulled to their levels, from a quarter of the training on."""
    return _oscillations("oscillation_dampening", bits, {"dampening": {"weight": 0.1, "start": 0.25}})


def oscillation_freezing(bits: int = 4) -> Preset:
    """Weights that oscillate are frozen, from a quarter of the training on."""
    last = {4: 0.01}.get(bits, 0.011)
    return _oscillations(
        "oscillation_freezing",
        bits,
        {"freezing": {"first": 0.1, "last": last, "start": 0.25}, "oscillation": {"momentum": 0.001}},
    )


PRESETS: Final[dict[str, Callable[..., Preset]]] = {
    "bin_regularization": bin_regularization,
    "bin_regularization_hardware": bin_regularization_hardware,
    "dorefa": dorefa,
    "ema_qc": ema_qc,
    "fqn": fqn,
    "fully_4bit": fully_4bit,
    "iao": iao,
    "lsq": lsq,
    "lsq_plus": lsq_plus,
    "oscillation_dampening": oscillation_dampening,
    "oscillation_freezing": oscillation_freezing,
    "pact": pact,
    "tqt": tqt,
}
"""Factories by name."""
