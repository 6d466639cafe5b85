"""Powers of two, exactly, on every device and in compiled code.

``torch.frexp`` and ``torch.ldexp`` would do in eager mode; compiled, the first does not build for CPUs and the second
goes through ``pow``, which may be an ulp off.
"""

from typing import Final

import torch
from torch import Tensor

_FRACTION_BITS: Final = 52
_BIAS: Final = 1023


def exponent(x: Tensor) -> Tensor:
    """``e`` with ``2**(e-1) <= x < 2**e``, int64, for positive ``x``; float64 and normal, or the result is too small.

    The exponent of :func:`math.frexp`.
    """
    return (x.double().view(torch.int64) >> _FRACTION_BITS) - (_BIAS - 1)


def power_of_two(e: Tensor) -> Tensor:
    """``2.0 ** e`` in float64; ``e`` int64, in -1022 .. 1023."""
    return (e + _BIAS << _FRACTION_BITS).view(torch.float64)
