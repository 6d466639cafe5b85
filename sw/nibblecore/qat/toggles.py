"""Fake quantization and observers, switched on and off.

Three ways, with the same effect: the methods of :class:`nibblecore.qat.QuantModel`, which take patterns of module
paths; the functions here, for ``model.apply(disable_observer)`` or for any module as a whole; and the context managers,
which restore what was. What is switched is a mode like ``training``: copies and pickles keep it, a ``state_dict`` has
no trace of it, and a loaded model quantizes.
"""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .methods import ActQuantizer, InputQuantizer, WeightQuantizer

_ROLES = {"weight_quantizer", "output_quantizer"}


def _layer(path: str) -> str:
    """The layer that a quantizer at ``path`` belongs to, the input quantizer being its own."""
    owner, _, name = path.rpartition(".")
    return owner if name in _ROLES else path


def _chosen(
    module: nn.Module, pattern: str, weights: bool, activations: bool
) -> list[WeightQuantizer | ActQuantizer | InputQuantizer]:
    # A grid that layers share is found under the path of each.
    kinds = (*((WeightQuantizer,) if weights else ()), *((ActQuantizer, InputQuantizer) if activations else ()))
    found: dict[WeightQuantizer | ActQuantizer | InputQuantizer, None] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, kinds) and fnmatch.fnmatchcase(_layer(path), pattern):
            found[part] = None
        shared = getattr(part, "output_quantizer", None)
        if isinstance(shared, kinds) and fnmatch.fnmatchcase(path, pattern):
            found[shared] = None
    return list(found)


def switch(
    module: nn.Module,
    pattern: str = "*",
    *,
    fake_quant: bool | None = None,
    observer: bool | None = None,
    weights: bool = True,
    activations: bool = True,
) -> None:
    """Switch quantizers in ``module``; None leaves as it is. Raises :class:`ValueError` where a pattern has none."""
    quantizers = _chosen(module, pattern, weights, activations)
    observers = [q for q in quantizers if isinstance(q, ActQuantizer)]
    if pattern != "*" and not (quantizers if observer is None else observers):
        what = "such a quantizer" if observer is None else "an observer"
        raise ValueError(f"pattern {pattern!r} matches no layer with {what}")
    for quantizer in quantizers if fake_quant is not None else ():
        quantizer.fake_quant_enabled = bool(fake_quant)
    for quantizer in observers if observer is not None else ():
        if observer:
            quantizer.enable_observer()
        else:
            quantizer.disable_observer()


@contextmanager
def switched(
    module: nn.Module,
    pattern: str = "*",
    *,
    fake_quant: bool | None = None,
    observer: bool | None = None,
    weights: bool = True,
    activations: bool = True,
) -> Iterator[None]:
    """:func:`switch` for a while; on the way out nothing is calibrated."""
    quantizers = _chosen(module, pattern, weights, activations)
    fake = [(q, q.fake_quant_enabled) for q in quantizers]
    observers = [(q, q.observer_enabled) for q in quantizers if isinstance(q, ActQuantizer)]
    switch(module, pattern, fake_quant=fake_quant, observer=observer, weights=weights, activations=activations)
    try:
        yield
    finally:
        for quantizer, enabled in fake if fake_quant is not None else ():
            quantizer.fake_quant_enabled = enabled
        for quantizer, enabled in observers if observer is not None else ():
            quantizer.observer_enabled = enabled


def enable_fake_quant(module: nn.Module) -> None:
    """Quantize everything in ``module``."""
    switch(module, fake_quant=True)


def disable_fake_quant(module: nn.Module) -> None:
    """Quantize nothing in ``module``."""
    switch(module, fake_quant=False)


def enable_observer(module: nn.Module) -> None:
    """Observers on, see :meth:`nibblecore.qat.QuantModel.enable_observer`."""
    switch(module, observer=True)


def disable_observer(module: nn.Module) -> None:
    """Observers off: grids are set from what was collected, and ranges stay."""
    switch(module, observer=False)


@contextmanager
def fake_quant_disabled(
    module: nn.Module, pattern: str = "*", *, weights: bool = True, activations: bool = True
) -> Iterator[None]:
    """Float for a while, as to see what a layer's quantization costs."""
    with switched(module, pattern, fake_quant=False, weights=weights, activations=activations):
        yield


@contextmanager
def observer_disabled(module: nn.Module, pattern: str = "*") -> Iterator[None]:
    """Ranges stay for a while, and nothing is collected."""
    with switched(module, pattern, observer=False):
        yield
