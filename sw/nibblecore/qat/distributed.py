"""What data-parallel processes have to agree on besides gradients; nothing of it does anything in a single process.

Started by ``torchrun`` and wrapped in ``DistributedDataParallel``, a prepared model trains as one process would with
the whole batch, if the loss is a mean and all processes have equal shares:

- The gradients of steps are sums over values, times a factor that counts the values of an image. Neither depends on how
  a batch is split, so that averaging over processes is right. A factor that counts the batch counts all processes'.
- :func:`nibblecore.qat.calibrate` joins what the calibrators of all processes have seen; every process must call it.
- Ranges that follow the values (IAO) take in the range of the batch of all processes, in training mode: forward passes
  in training mode must be made by all.
- Batch norms that train see their own process's share, unless :func:`nibblecore.qat.synchronize_batch_norm` says
  otherwise.
- Regularizers, :class:`nibblecore.qat.OscillationTracker` and :class:`nibblecore.qat.Ema` are functions of the weights,
  which are the same everywhere.

::

    model = prepare(float_model, QConfig(), example_input)
    calibrate(model, loader)                              # each process with its share
    parallel = DistributedDataParallel(model)             # what the loop calls; model is what is averaged and saved
    ...
    if rank == 0:
        graph = convert(model)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def processes() -> int:
    """How many processes train together: 1 where ``torch.distributed`` is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """The ``value`` of every process, in the order of ranks: any object that pickles."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def reduce_max(value: Tensor) -> Tensor:
    """The elementwise maximum over processes; no gradient."""
    if processes() > 1:
        value = value.contiguous().clone()
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


class _Sum(torch.autograd.Function):
    """Sum over processes; so is the gradient, as every process uses the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def reduce_sum(value: Tensor) -> Tensor:
    """The elementwise sum over processes, differentiable."""
    if processes() > 1:
        result: Tensor = _Sum.apply(value)
        return result
    return value


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers of ``torch.compile``, of data-parallel training and of ``torch.optim.swa_utils``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
