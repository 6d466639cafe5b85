"""What to train: bit widths, method, exceptions."""

import dataclasses
import fnmatch
import json
from typing import Any, Final, Literal

BITS: Final = (4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """Other widths for the layers whose module path matches ``pattern`` (shell wildcards, as in ``stage3.*``).

    Parameters
    ----------
    pattern : str
        Matches whole paths; ``*`` matches dots too.
    weight_bits : int, optional
        4 or 8.
    act_bits : int, optional
        4 or 8, of the layer's output; an output of the network becomes codes. The network's input has a path too: the
        name of its argument.
    """

    pattern: str
    weight_bits: int | None = None
    act_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            value = getattr(self, name)
            if value is not None and value not in BITS:
                raise ValueError(f"{name} of override {self.pattern!r} must be 4 or 8, not {value!r}")
        if self.weight_bits is None and self.act_bits is None:
            raise ValueError(f"override {self.pattern!r} must set weight_bits or act_bits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QConfig:
    """How a network is quantized.

    Parameters
    ----------
    method : str
        Training method, a name in :data:`nibblecore.qat.METHODS`.
    weight_bits, act_bits : int
        4 or 8: weights (per output channel) and stored activations (per tensor) of all layers but the ends.
    first_last_bits : int
        4 or 8: the network's input, the weights of layers that read it, the weights of layers behind which there is no
        other, and tensors that only such last layers or the host read.
    residual_bits : int
        4 or 8: the codes of a convolution right before a sum. They are never stored, so 8 costs nothing.
    shortcut_bits : int
        4 or 8: stored tensors that only sums read, such as the convolution on a downsampling shortcut. 8 costs memory
        traffic, but no multiplications.
    output_bits : int
        What last layers give the host: 32 for sums as they are, with a scale per channel, or 8 for codes.
    overrides : tuple[Override, ...]
        Exceptions by module path; the last match wins, for each field on its own.
    """

    method: str = "lsq"
    weight_bits: int = 4
    act_bits: int = 4
    first_last_bits: int = 8
    residual_bits: int = 8
    shortcut_bits: int = 8
    output_bits: Literal[8, 32] = 32
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "first_last_bits", "residual_bits", "shortcut_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(f"{name} must be 4 or 8, not {getattr(self, name)!r}")
        if self.output_bits not in (8, 32):
            raise ValueError(f"output_bits must be 8 or 32, not {self.output_bits!r}")
        if not isinstance(self.overrides, tuple) or not all(isinstance(o, Override) for o in self.overrides):
            raise TypeError(f"overrides must be a tuple of Override, not {self.overrides!r}")

    def override(self, path: str, field: str) -> int | None:
        """The width that the overrides give ``field`` of the layer at ``path``, or None."""
        values = [getattr(o, field) for o in self.overrides if fnmatch.fnmatchcase(path, o.pattern)]
        return next((v for v in reversed(values) if v is not None), None)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "QConfig":
        """The inverse of :meth:`to_json`; raises :class:`ValueError` or :class:`TypeError` for anything else."""
        values: dict[str, Any] = json.loads(text)
        values["overrides"] = tuple(Override(**o) for o in values["overrides"])
        return cls(**values)
