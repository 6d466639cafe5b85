"""LSQ+ (Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization",
CVPR workshops 2020), with an integer zero point.

The paper's offset beta is a real number, and real 0 then has no code: zero padding would be inexact. Here
``x_hat = step * (q - z)`` with ``z`` the nearest integer to a learned ``zeta``, through which gradients pass straight.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .calibration import affine_grid
from .distributed import processes
from .lsq import Lsq, LsqActivations, LsqOptions, LsqWeights
from .methods import METHODS, Method, check_choice


class LsqPlus(torch.autograd.Function):
    """``step * (clamp(floor(x/step + 1/2) + z, 0, top) - z)`` with ``z = clamp(floor(zeta + 1/2), 0, top)``.

    With ``u = x / step`` and relative codes, ``q - z``, in ``-z .. top - z``::

        d/dx    = 1 inside, 0 at and beyond the ends
        d/dstep = grad_scale * sum(code - u inside, code elsewhere)
        d/dzeta = grad_scale * sum(0 inside, -step elsewhere)

    The last is the paper's gradient of beta, with ``beta = -step * z``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zeta: Tensor, top: int, grad_scale: float) -> Tensor:
        zero = torch.floor(zeta + 0.5).clamp(0, top)
        u = x / step
        code = torch.floor(u + 0.5).maximum(-zero).minimum(top - zero)
        ctx.save_for_backward(u, code, step, zero)
        ctx.top, ctx.grad_scale = top, grad_scale
        return code * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, code, step, zero = ctx.saved_tensors
        inside = (u > -zero) & (u < ctx.top - zero)
        grad_step = (grad * torch.where(inside, code - u, code)).sum_to_size(step.shape) * ctx.grad_scale
        grad_zeta = (grad * ~inside).sum() * -step * ctx.grad_scale
        return grad * inside, grad_step, grad_zeta, None, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LsqPlusOptions(LsqOptions):
    """The options of LSQ, for LSQ+, and the paper's configurations.

    Parameters
    ----------
    offset : bool
        Whether tensors with negative values have a zero point: the paper's configurations 3 and 4, which are the same
        one where the zero point is an integer. Without, they have signed codes (configuration 2) or, with
        ``QConfig(signed=False)``, unsigned ones, and negative values become 0 (configuration 1).
    """

    method = "lsq+"
    offset: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "offset", (True, False))


class LsqPlusWeights(LsqWeights):
    """As :class:`LsqWeights`, symmetric; the first step is ``max(|mean - 3 std|, |mean + 3 std|) / 2**(bits-1)``."""

    def initial(self, groups: Tensor) -> Tensor:
        mean, std = groups.mean(1), groups.std(1, correction=0)
        return torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 2 ** (self.bits - 1)


class LsqPlusActivations(LsqActivations):
    """As :class:`LsqActivations`, with a learned zero point, ``zeta``, where values can be negative.

    Behind a ReLU an offset would waste codes, and there is none: LSQ+ is LSQ. Its grid starts at least squared error.
    """

    own_calibration = "mse"

    def __init__(
        self, bits: int, unsigned: bool, features: int, *, options: LsqOptions | None = None, **grid: Any
    ) -> None:
        super().__init__(bits, unsigned, features, options=options, **grid)
        if self.affine:
            self.zeta = nn.Parameter(torch.zeros(()))

    @property
    def affine(self) -> bool:
        return not self.rectified and getattr(self.options, "offset", True)

    def zero_point(self) -> int:
        """Unsigned code of real zero, 0 .. ``2**bits - 1``."""
        if not self.affine:
            return 0
        return max(0, min((1 << self.bits) - 1, math.floor(float(self.zeta.detach()) + 0.5)))

    @property
    def low(self) -> int:
        return -self.zero_point() if self.affine else self.plain_range[0]

    @property
    def high(self) -> int:
        return (1 << self.bits) - 1 - self.zero_point() if self.affine else self.plain_range[1]

    @property
    def zero(self) -> int:
        return self.zero_point() - (1 << self.storage_bits - 1) if self.affine else super().zero

    def grad_scale(self, x: Tensor) -> float:
        if not self.affine or not self.options.grad_scale:
            return super().grad_scale(x)
        count = x.numel() * processes() if self.options.act_count == "batch" else self.features
        return 1 / math.sqrt(count * ((1 << self.bits) - 1))

    def set_range(self, low: float, high: float) -> None:
        if not self.affine:
            super().set_range(low, high)
            return
        step, zero = affine_grid(low, high, self.bits)
        self.step.fill_(step)
        self.zeta.fill_(zero)

    def fake_quantize(self, x: Tensor) -> Tensor:
        scale, factor = self.scale(), self.grad_scale(x)
        if self.affine:
            result: Tensor = LsqPlus.apply(x, scale, self.zeta, (1 << self.bits) - 1, factor)
        else:
            result = Lsq.apply(x, scale, self.low, self.high, factor, "half_up")
        return result


METHODS["lsq+"] = Method(weights=LsqPlusWeights, activations=LsqPlusActivations, options=LsqPlusOptions)
