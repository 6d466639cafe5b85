"""Prepared models on disk, and models by name."""

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import write_atomically
from .config import QConfig
from .layers import Correction
from .methods import InputQuantizer
from .prepare import QuantModel, add_correction, prepare, prepared

FORMAT: Final = 1
_KEY: Final = "nibblecore.checkpoint"
_TRUSTED: Final = "nibblecore.models."


def save_checkpoint(model: nn.Module, path: str | Path, *, factory: str, **facts: Any) -> None:
    """Write ``model`` as a safetensors file: its ``state_dict``, and what rebuilds it as JSON in the metadata.

    The file appears under its name only when it is complete.

    Parameters
    ----------
    model : nn.Module
        From :func:`nibblecore.qat.prepare`, perhaps wrapped.
    path : str or Path
    factory : str
        ``package.module:function`` that makes the float model, see :func:`load_model`.
    **facts
        What else is worth keeping: accuracies, the seed. Must be expressible in JSON.
    """
    model = prepared(model)
    path = Path(path)
    source = model.get_submodule(model._input_name)
    assert isinstance(source, InputQuantizer)
    # Scalars and views are stored as tensors of their own.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    content = {
        "format": FORMAT,
        "factory": factory,
        "qconfig": json.loads(model._qconfig.to_json()),
        "input_shape": list(model._input_shape),
        "input_range": [float(v) for v in source.range],
        "correction": any(isinstance(m, Correction) for m in model.modules()),
        "sha256": _digest(tensors),
        "facts": facts,
    }
    data = safetensors.torch.save(tensors, {_KEY: json.dumps(content)})
    write_atomically(path, data)


def checkpoint_facts(path: str | Path) -> dict[str, Any]:
    """The facts that :func:`save_checkpoint` has kept, such as accuracies. Raises :class:`CheckpointError`."""
    facts: dict[str, Any] = _read(Path(path))[0]["facts"]
    return facts


def load_checkpoint(path: str | Path, factory: str | Callable[[], nn.Module] | None = None) -> QuantModel:
    """Rebuild the prepared model of a checkpoint, in evaluation mode.

    Parameters
    ----------
    path : str or Path
    factory : str or callable, optional
        What makes the float model. Left out, the file's own is called, if it is one of :mod:`nibblecore.models`: a file
        cannot make this function run other code.

    Raises
    ------
    CheckpointError
        A file that is missing, truncated, altered, foreign, of another format, or of another model.
    """
    path = Path(path)
    content, tensors = _read(path)
    if factory is None:
        factory = str(content["factory"])
        if not factory.startswith(_TRUSTED):
            raise CheckpointError(
                f"{path} wants to call {factory}, which is not part of nibblecore.",
                hint=f"If you trust it, name it: load_checkpoint(path, factory={factory!r}).",
            )
    model = load_model(factory) if isinstance(factory, str) else factory()
    try:
        qconfig = QConfig.from_json(json.dumps(content["qconfig"]))
        low, high = content["input_range"]
        example = torch.zeros(1, *content["input_shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no model that this version can prepare: {error}") from error
    prepared = prepare(model, qconfig, example, (low, high))
    if content.get("correction"):
        add_correction(prepared)
    _load_state(prepared, tensors, path)
    return prepared.eval()


def load_model(factory: str, state_dict: str | Path | None = None) -> nn.Module:
    """Make a float model from its name and load its weights.

    Parameters
    ----------
    factory : str
        ``package.module:function``, a function without arguments (or a class) that returns a module. The name is
        imported and called, so it must be trusted.
    state_dict : str or Path, optional
        ``.safetensors``, or anything else for ``torch.load`` with ``weights_only=True``.

    Raises
    ------
    CheckpointError
        A name that leads to no module, or a file that does not fit the model.
    """
    module_name, colon, function = factory.partition(":")
    if not (module_name and colon and function):
        raise CheckpointError(f"A model is named as package.module:function, not {factory!r}.")
    try:
        found = getattr(importlib.import_module(module_name), function)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists and lacks something itself
        raise CheckpointError(
            f"There is no module {error.name} for the model {factory}.",
            hint="Run in the folder that contains it, or install its package.",
        ) from error
    except AttributeError as error:
        raise CheckpointError(f"Module {module_name} has no {function} for the model {factory}.") from error
    model = found()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{factory} returned {type(model).__name__}, not a torch.nn.Module.")
    if state_dict is not None:
        _load_state(model, _read_state(Path(state_dict)), Path(state_dict))
    return model


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no mapping
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}.") from error
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but no checkpoint of nibblecore.",
            hint="Checkpoints are written by nibblecore.qat.save_checkpoint; load others with load_model.",
        )
    try:
        content = json.loads(metadata[_KEY])
        version, expected = content["format"], content["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has been altered: its metadata cannot be understood.") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {version}; this version reads format {FORMAT}.")
    if _digest(tensors) != expected:
        raise CheckpointError(f"{path} has been altered: its tensors do not match their checksum.")
    return content, tensors


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # torch.load raises a class of its own for each way in which a file can be broken
        raise CheckpointError(
            f"{path} is truncated or no file of weights.",
            hint="It must be a .safetensors file, or one that torch.load(..., weights_only=True) accepts.",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{path} holds no state_dict.", hint="Save model.state_dict(), not the model.")
    return loaded


def _load_state(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{path} is of another model than this {type(model).__name__}: {shown}.")
    model.load_state_dict(tensors)
