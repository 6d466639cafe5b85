"""Quantizers in one pass over memory, for float32 tensors of a CPU: ``kernels.cpp``, compiled when first needed.

A step of training is mostly convolutions, and a quantizer made of tensor operations is a dozen passes over what they
compute. Here it is one forward and one backward. Whatever does not qualify (another type, device or memory layout, a
model that is being compiled or traced, a machine without g++) is computed by the operations that the kernels replace;
values and gradients of values have the same bits, and sums (losses, gradients of steps) differ in their order.

The environment variable ``NIBBLECORE_KERNELS=0`` switches them off.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..arch import numerics
from ..errors import ToolchainError
from ..files import cache_dir, write_atomically

SOURCE: Final = Path(__file__).with_suffix(".cpp")
FLAGS: Final = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"),
    # What follows changes no value: contraction would, and -ffast-math does.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
KINDS: Final = {"half_up": 0, "half_even": 1, "w8": 2}
LEVELS: Final = 16
"""Bins that :func:`bins_forward` has for each row."""


def build(compiler: str = "g++") -> Path:
    """The compiled kernels, from the cache if this machine has compiled them before.

    Raises :class:`~nibblecore.errors.ToolchainError` without a compiler, or where it fails.
    """
    program = shutil.which(compiler)
    if program is None:
        raise ToolchainError(f"{compiler} is not installed.", hint="On Debian or Ubuntu: apt-get install g++")
    source = SOURCE.read_bytes()
    version = subprocess.run([program, "--version"], capture_output=True, check=False).stdout
    # A home may be shared by machines whose processors differ.
    facts = (source, " ".join(FLAGS).encode(), version, _processor())
    digest = hashlib.sha256(b"\0".join(facts)).hexdigest()[:32]
    path = cache_dir() / "kernels" / f"{digest}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "kernels.so"
            command = [program, *FLAGS, str(SOURCE), "-o", str(result)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise ToolchainError(f"{compiler} does not compile {SOURCE.name}:\n{run.stderr.strip()}")
            write_atomically(path, result.read_bytes())
    return path


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return os.uname().machine.encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


@functools.cache
def library() -> Any:
    """The loaded kernels; None where they are switched off or, with one warning that says why, cannot be built."""
    if os.environ.get("NIBBLECORE_KERNELS") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(build()))
    except (ToolchainError, OSError) as error:
        warnings.warn(f"quantizers train with tensor operations, which is slower: {error}", stacklevel=2)
        return None
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    loaded.nibble_lsq_forward.argtypes = [*[pointer] * 4, *[integer] * 6]
    loaded.nibble_lsq_forward.restype = None
    loaded.nibble_lsq_backward.argtypes = [*[pointer] * 6, real, pointer, real, *[integer] * 7]
    loaded.nibble_lsq_backward.restype = None
    double = ctypes.c_double
    loaded.nibble_parameters.argtypes = [
        *(pointer, integer, pointer, double, double, real, integer, integer),
        *(pointer, pointer, pointer, integer),
    ]
    loaded.nibble_parameters.restype = None
    loaded.nibble_bins_forward.argtypes = [*[pointer] * 3, *[integer] * 5]
    loaded.nibble_bins_forward.restype = ctypes.c_double
    loaded.nibble_bins_backward.argtypes = [*[pointer] * 3, real, *[pointer] * 2, *[integer] * 5]
    loaded.nibble_bins_backward.restype = None
    return loaded


_ORDINARY: Final = (Tensor, nn.Parameter)


def parameters(
    raw: Tensor, bias: Tensor | None, input_step: float, output_step: float, step_min: float, rows: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps, factors of rounded multipliers and rounded biases of a layer with ``rows`` output channels.

    ``raw`` holds its stored steps, 1 or ``rows``; ``output_step`` is 0 where nothing is requantized. See
    ``QuantLayer._parameters_for`` in :mod:`nibblecore.qat.layers`.
    """
    step, gain = raw.new_empty(rows), raw.new_empty(rows)
    rounded = None if bias is None else torch.empty_like(bias)
    library().nibble_parameters(
        *(raw.data_ptr(), raw.numel(), None if bias is None else bias.data_ptr(), input_step, output_step, step_min),
        *(numerics.MULT_BITS, numerics.SHIFT_MAX, step.data_ptr(), gain.data_ptr()),
        *(None if rounded is None else rounded.data_ptr(), rows),
    )
    return step, gain, rounded


def eager(*tensors: Tensor) -> bool:
    """Whether these are ordinary contiguous float32 tensors of a CPU, and nothing compiles or traces the model."""
    return not torch.compiler.is_compiling() and all(map(_plain, tensors)) and not torch._C._is_tracing()


def usable(v: Tensor, step: Tensor) -> bool:
    """Whether kernels can work on ``v`` with ``step``: one value, or one for each ``v[i]`` as ``(len(v), 1, 1, …)``."""
    shaped = step.numel() == 1 or step.numel() == v.shape[0] == step.shape[0]
    return shaped and eager(v, step) and library() is not None


def _plain(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.is_cpu and type(t) in _ORDINARY and t.is_contiguous()


def lsq_forward(v: Tensor, step: Tensor, low: int, high: int, kind: str, gain: Tensor | None = None) -> Tensor:
    """``step * code(v / step)``, see :class:`nibblecore.qat.lsq.Lsq`, times ``gain`` of as many values as ``step``."""
    out = torch.empty_like(v)
    rows, columns = _rows(v, step)
    library().nibble_lsq_forward(
        *(v.data_ptr(), step.data_ptr(), None if gain is None else gain.data_ptr(), out.data_ptr()),
        *(rows, columns, low, high, KINDS[kind], torch.get_num_threads()),
    )
    return out


def lsq_backward(
    grad: Tensor,
    v: Tensor,
    step: Tensor,
    low: int,
    high: int,
    kind: str,
    grad_scale: float,
    gain: Tensor | None = None,
    bins: tuple[Tensor, float, bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of that with respect to ``v`` and, times ``grad_scale``, to ``step``.

    ``bins`` (population, gradient, whether it reaches the step) adds those of :func:`bins_forward`, in the same pass.
    """
    grad = grad.contiguous()
    grad_v, grad_step = torch.empty_like(v), torch.empty_like(step)
    rows, columns = _rows(v, step)
    library().nibble_lsq_backward(
        *(v.data_ptr(), step.data_ptr(), None if gain is None else gain.data_ptr(), grad.data_ptr()),
        *(grad_v.data_ptr(), grad_step.data_ptr(), grad_scale),
        *((None, 0.0, 0) if bins is None else (bins[0].data_ptr(), bins[1], int(bins[2]))),
        *(rows, columns, low, high, KINDS[kind], torch.get_num_threads()),
    )
    return grad_v, grad_step


def bins_forward(v: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The bin regularization loss of ``v``, shape ``()``, and how many values each bin holds: ``(rows, LEVELS)``.

    What shares a step shares bins; codes are rounded half to even, at most :data:`LEVELS` of them.
    """
    rows, columns = _rows(v, step)
    population = v.new_empty(rows, LEVELS)
    loss = library().nibble_bins_forward(
        *(v.data_ptr(), step.data_ptr(), population.data_ptr()),
        *(rows, columns, low, high, torch.get_num_threads()),
    )
    return v.new_tensor(loss), population


def bins_backward(
    grad: float, v: Tensor, step: Tensor, population: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """The gradients of ``grad`` times that loss with respect to ``v`` and ``step``."""
    grad_v, grad_step = torch.empty_like(v), torch.empty_like(step)
    rows, columns = _rows(v, step)
    library().nibble_bins_backward(
        *(v.data_ptr(), step.data_ptr(), population.data_ptr(), grad, grad_v.data_ptr(), grad_step.data_ptr()),
        *(rows, columns, low, high, torch.get_num_threads()),
    )
    return grad_v, grad_step


def _rows(v: Tensor, step: Tensor) -> tuple[int, int]:
    rows = step.numel()
    return rows, v.numel() // rows
