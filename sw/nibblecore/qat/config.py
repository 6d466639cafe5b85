"""What to train: bit widths, method, exceptions."""

import dataclasses
import fnmatch
import json
from typing import Any, Final, Literal

from .calibration import CALIBRATIONS
from .methods import METHODS, MethodOptions

BITS: Final = (2, 3, 4, 8)
_BITS_TEXT: Final = "2, 3, 4 or 8"
_CHOICES: Final[dict[str, tuple[Any, ...]]] = {
    "weight_range": ("narrow", "full"),
    "granularity": ("channel", "tensor"),
    "scale_kind": ("free", "power_of_two"),
    "signed": (True, False),
}


def _check_choices(item: Any, where: str) -> None:
    for name, allowed in _CHOICES.items():
        value = getattr(item, name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name}{where} must be {' or '.join(map(repr, allowed))}, not {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """Other settings for the layers whose module path matches ``pattern`` (shell wildcards, as in ``stage3.*``).

    Parameters
    ----------
    pattern : str
        Matches whole paths; ``*`` matches dots too.
    weight_bits : int, optional
        2, 3, 4 or 8.
    act_bits : int, optional
        2, 3, 4 or 8, of the layer's output; an output of the network becomes codes. The network's input has a path too:
        the name of its argument; it has 4 or 8 bits. What a function reads that becomes a table, as SiLU, has 8 bits
        whatever is set.
    signed, granularity, scale_kind, weight_range, method, calibration : optional
        As in :class:`QConfig`.
    """

    pattern: str
    weight_bits: int | None = None
    act_bits: int | None = None
    signed: bool | None = None
    granularity: Literal["channel", "tensor"] | None = None
    scale_kind: Literal["free", "power_of_two"] | None = None
    weight_range: Literal["narrow", "full"] | None = None
    method: str | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        where = f" of override {self.pattern!r}"
        for name in ("weight_bits", "act_bits"):
            value = getattr(self, name)
            if value is not None and value not in BITS:
                raise ValueError(f"{name}{where} must be {_BITS_TEXT}, not {value!r}")
        _check_choices(self, where)
        if self.calibration is not None:
            _check_calibration(self.calibration, where)
        if all(v is None for k, v in vars(self).items() if k != "pattern"):
            raise ValueError(f"override {self.pattern!r} must set weight_bits, act_bits or another field")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QConfig:
    """How a network is quantized.

    Parameters
    ----------
    method : str
        Training method, a name in :data:`nibblecore.qat.METHODS`.
    weight_bits, act_bits : int
        2, 3, 4 or 8: weights and stored activations (per tensor) of all layers but the ends. Codes of 2 and 3 bits
        travel in nibbles.
    first_last_bits : int
        2, 3, 4 or 8: the network's input (4 bits at least), the weights of layers that read it, the weights of layers
        behind which there is no other, and tensors that only such last layers or the host read.
    residual_bits : int
        2, 3, 4 or 8: the codes of a convolution right before a sum. They are never stored, so 8 costs nothing.
    shortcut_bits : int
        2, 3, 4 or 8: stored tensors that only sums read, such as the convolution on a downsampling shortcut. 8 costs
        memory traffic, but no multiplications.
    output_bits : int
        What last layers give the host: 32 for sums as they are, with a scale per channel, or 2, 3, 4 or 8 for codes.
    bias_bits : int, optional
        8 for biases of 8 bits: the integer bias of every channel is one of -128..127, times ``2**k`` with one
        ``k >= 0`` for each layer. By default biases have the 32 bits of the sums.
    weight_range : {"narrow", "full"}
        4-bit weights in -7..7, or in -8..7, which not every core runs in one pass. 2 and 3 bits are always full.
    granularity : {"channel", "tensor"}
        A step of the weights per output channel, or one per layer.
    signed : bool, optional
        Whether codes of activations are signed; by default where values can be negative. With False, negative values
        become 0 everywhere.
    scale_kind : {"free", "power_of_two"}
        Whether all steps but the input's are powers of two, which makes multipliers powers of two too.
    input_scale_kind : {"free", "power_of_two"}
        Whether the step of the network's input is the power of two nearest to that of the range: of a range of (0, 1)
        and 8 bits 1/256, so that 255/256 and more saturate.
    calibration : str
        Where activations' grids start: a name in :data:`nibblecore.qat.calibration.CALIBRATIONS`, or "method" for what
        the method's authors do.
    batch_norm : {"folded", "folded_train", "unfolded"}
        Whether batch norms go into the weights when the model is prepared, with the statistics that they have; or into
        the weights before these are quantized, in each step of training with the statistics of its batch; or stay
        behind the quantized weights, and go into multipliers and biases of the integers. The last two train, until
        :func:`nibblecore.qat.freeze_batch_norm`.
    options : tuple of MethodOptions
        Options of methods, at most one item for each, as ``(LsqOptions(grad_scale=False),)``.
    overrides : tuple[Override, ...]
        Exceptions by module path; the last match wins, for each field on its own.
    """

    method: str = "lsq"
    weight_bits: int = 4
    act_bits: int = 4
    first_last_bits: int = 8
    residual_bits: int = 8
    shortcut_bits: int = 8
    output_bits: Literal[2, 3, 4, 8, 32] = 32
    bias_bits: Literal[8] | None = None
    weight_range: Literal["narrow", "full"] = "narrow"
    granularity: Literal["channel", "tensor"] = "channel"
    signed: bool | None = None
    scale_kind: Literal["free", "power_of_two"] = "free"
    input_scale_kind: Literal["free", "power_of_two"] = "free"
    calibration: str = "method"
    batch_norm: Literal["folded", "folded_train", "unfolded"] = "folded"
    options: tuple[MethodOptions, ...] = ()
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "first_last_bits", "residual_bits", "shortcut_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(f"{name} must be {_BITS_TEXT}, not {getattr(self, name)!r}")
        if self.output_bits not in (*BITS, 32):
            raise ValueError(f"output_bits must be 2, 3, 4, 8 or 32, not {self.output_bits!r}")
        if self.bias_bits not in (None, 8):
            raise ValueError(f"bias_bits must be 8 or None, not {self.bias_bits!r}")
        if self.input_scale_kind not in _CHOICES["scale_kind"]:
            raise ValueError(f"input_scale_kind must be 'free' or 'power_of_two', not {self.input_scale_kind!r}")
        _check_choices(self, "")
        _check_calibration(self.calibration, "")
        if self.batch_norm not in ("folded", "folded_train", "unfolded"):
            raise ValueError(f"batch_norm must be 'folded', 'folded_train' or 'unfolded', not {self.batch_norm!r}")
        if not isinstance(self.options, tuple) or not all(isinstance(o, MethodOptions) for o in self.options):
            raise TypeError(f"options must be a tuple of MethodOptions, not {self.options!r}")
        if len({o.method for o in self.options}) < len(self.options):
            raise ValueError(f"options must hold one item for each method, not {self.options!r}")
        if not isinstance(self.overrides, tuple) or not all(isinstance(o, Override) for o in self.overrides):
            raise TypeError(f"overrides must be a tuple of Override, not {self.overrides!r}")

    def override(self, path: str, field: str) -> Any:
        """What the overrides give ``field`` of the layer at ``path``, or None."""
        values = [getattr(o, field) for o in self.overrides if fnmatch.fnmatchcase(path, o.pattern)]
        return next((v for v in reversed(values) if v is not None), None)

    def setting(self, path: str, field: str) -> Any:
        """``field`` of the layer at ``path``: the overrides' or the network's."""
        value = self.override(path, field)
        return getattr(self, field) if value is None else value

    def options_of(self, name: str) -> MethodOptions | None:
        """The options that a method was given."""
        return next((o for o in self.options if o.method == name), None)

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        content["options"] = [{"method": o.method, **dataclasses.asdict(o)} for o in self.options]
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> "QConfig":
        """The inverse of :meth:`to_json`; raises :class:`ValueError` or :class:`TypeError` for anything else."""
        values: dict[str, Any] = json.loads(text)
        values["overrides"] = tuple(Override(**o) for o in values["overrides"])
        options = []
        for item in values.get("options", ()):
            fields = dict(item)
            name = fields.pop("method", None)
            kind = METHODS[name].options if name in METHODS else None
            if kind is None:
                raise ValueError(f"there is no training method {name!r} with options")
            options.append(kind(**fields))
        return cls(**values | {"options": tuple(options)})


def _check_calibration(name: str, where: str) -> None:
    if name != "method" and name not in CALIBRATIONS:
        allowed = ", ".join(["method", *sorted(CALIBRATIONS)])
        raise ValueError(f"calibration{where} must be one of {allowed}, not {name!r}")
