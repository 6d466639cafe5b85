"""What every processing element of the array is to its neighbours."""

import abc
from collections.abc import Sequence
from typing import ClassVar

from amaranth.hdl import Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out


def check_int(name: str, value: int, low: int, high: int) -> None:
    """Raise unless an argument is an integer within its limits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, not {value}")


class DotElement(wiring.Component, abc.ABC):
    """One column of the array: the dot product of ``lanes`` activations with ``lanes`` stationary weights.

    Fully pipelined and without backpressure: the activations of every clock cycle are multiplied, and their exact sum
    is on ``sum`` :attr:`latency` cycles later. Whether a sum means anything is known to the sequencer, which delays its
    valid bit by the same number.

    An element holds two sets of weights: the *active* one, which multiplies, and the *shadow*, which is loaded while
    the active one works. ``load_stb`` writes the shadow, ``swap_stb`` makes the shadow active; the activations that
    come with ``swap_stb`` are the first to meet the new weights. Both may come in one cycle: the swap takes the shadow
    as it was, the load replaces it. A swap leaves the shadow as it is, so that a second swap changes nothing. Where
    :attr:`load_cycles` is more than 1, the sequencer issues neither a swap nor another load within that time. Without
    :attr:`OVERLAPS`, the shadow takes the place of the active weights: sums mean nothing from the activations on that
    come after ``load_stb`` to those before ``swap_stb``.

    The weights are 0 after power-up; a reset changes no weight. ``sum`` is arbitrary until :attr:`latency` cycles after
    power-up.

    Parameters
    ----------
    lanes : int
        Products per cycle, a power of two in 1..64.
    inverted : bool
        Operands come with the bits of ``ACTIVATION_POLARITY`` and ``WEIGHT_POLARITY`` inverted, as the element stores
        them: an array inverts them once and not in every column.

    Members
    -------
    activations : In(ArrayLayout(signed(4), lanes))
        Sampled in every cycle; -8..7 each. Lane 0 in the low bits.
    weights : In(ArrayLayout(signed(4), lanes))
        Sampled with ``load_stb``; each within :attr:`weight_range`, which is not checked.
    load_stb : In(1)
        The shadow takes ``weights``.
    swap_stb : In(1)
        The active weights take the shadow.
    sum : Out(signed(8 + log2(lanes)))
        Sum of products, at most ``64 * lanes``: never wraps.

    Raises
    ------
    TypeError, ValueError
        If ``lanes`` is not such a number.
    """

    WEIGHT_RANGE: ClassVar[tuple[int, int]] = (-8, 7)
    PIXELS: ClassVar[int] = 1
    OVERLAPS: ClassVar[bool] = True
    """Whether the active weights work while the shadow is loaded."""
    ACTIVATION_POLARITY: ClassVar[int] = 0
    """Bits of every activation that the element inverts as it stores them."""
    WEIGHT_POLARITY: ClassVar[int] = 0
    """Bits of every weight that the element inverts as it stores them."""

    activations: data.View
    weights: data.View
    load_stb: Signal
    swap_stb: Signal
    sum: Signal

    def __init__(self, *, lanes: int, inverted: bool = False) -> None:
        check_int("lanes", lanes, 1, 64)
        if lanes & (lanes - 1):
            raise ValueError(f"lanes must be a power of two, not {lanes}")
        self._lanes = lanes
        # What is left to do to each operand as it is stored.
        self._invert_activation = 0 if inverted else self.ACTIVATION_POLARITY
        self._invert_weight = 0 if inverted else self.WEIGHT_POLARITY
        word = data.ArrayLayout(signed(4), lanes)
        super().__init__(
            {
                "activations": In(word),
                "weights": In(word),
                "load_stb": In(1),
                "swap_stb": In(1),
                "sum": Out(signed(8 + (lanes - 1).bit_length())),
            }
        )

    @property
    def lanes(self) -> int:
        """Products per cycle."""
        return self._lanes

    @property
    def weight_range(self) -> tuple[int, int]:
        """Lowest and highest weight that is multiplied exactly."""
        return self.WEIGHT_RANGE

    @property
    def pixels(self) -> int:
        """Activation words per cycle, each with its own sum."""
        return self.PIXELS

    @property
    def load_cycles(self) -> int:
        """Cycles from ``load_stb`` to the first ``swap_stb`` that takes these weights."""
        return 1

    @property
    @abc.abstractmethod
    def latency(self) -> int:
        """Cycles from ``activations`` to their ``sum``: 1 is the very next cycle."""

    @staticmethod
    def model(activations: Sequence[int], weights: Sequence[int]) -> int:
        """The exact dot product.

        Raises
        ------
        ValueError
            If the lengths differ, or a value is not in -8..7.
        """
        if len(activations) != len(weights):
            raise ValueError(f"activations and weights must be equally long, not {len(activations)} and {len(weights)}")
        for name, values in (("activations", activations), ("weights", weights)):
            for lane, value in enumerate(values):
                if not -8 <= value <= 7:
                    raise ValueError(f"{name}[{lane}] must be in -8..7, not {value}")
        return sum(a * w for a, w in zip(activations, weights, strict=True))
