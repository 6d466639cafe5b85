"""Recipes: what to train, as small TOML files.

A recipe names what it starts from (``base``) and says only what is different. Tables are the dataclasses of this
module, keys their fields; ``nibblecore recipes --keys`` lists them all. A table ``preset`` names a system of
:mod:`nibblecore.qat.presets` and the arguments of its factory; it comes on top of the base, and the file's other tables
on top of it.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_type_hints

from ...errors import RecipeError
from ..config import Override, QConfig
from ..methods import METHODS
from ..presets import PRESETS

FOLDER: Final = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the package."""


def _key(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    metadata = {"doc": doc, "choices": choices, "low": low, "above": above, "high": high, "below": below}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The float network."""

    factory: str = _key("", "package.module:function, a function without arguments that makes the network")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """Images and labels."""

    name: str = _key(
        "", "digits, digits-noisy, a folder of images (a subfolder per class), an .npz file, or package.module:function"
    )
    batch: int = _key(64, "images of a step; what is left over at the end of an epoch waits for the next", low=1)
    shift: int = _key(0, "pixels by which training images move at most, in each direction", low=0)
    flip: bool = _key(False, "mirror half of the training images, left to right")
    noise: float = _key(0.0, "standard deviation of noise on training images, in units of their values", low=0)
    limit: int = _key(0, "how many training images to use; 0 for all", low=0)
    image_size: int = _key(0, "rows and columns to which the images of a folder are resized; 0 for as they are", low=0)
    channels: int = _key(0, "channels of the images of a folder: 1 for grey, 3 for RGB; 0 for RGB", choices=(0, 1, 3))
    test_share: float = _key(0.2, "of a folder without train and test: the share to test on", above=0, below=1)
    allow_constant: bool = _key(False, "take images whose pixels are all equal")
    calibration_augment: bool = _key(False, "whether the images that set the steps are changed as in training")
    calibration_batches: int = _key(8, "batches that set the first steps of activations", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """Epochs of one phase, optimizer and schedule."""

    epochs: int = _key(10, "passes over the training images", low=0)
    optimizer: str = _key("sgd", "of weights and biases", choices=("sgd", "adam"))
    lr: float = _key(0.01, "learning rate, the highest of the schedule", above=0)
    momentum: float = _key(0.9, "of SGD", low=0, below=1)
    nesterov: bool = _key(False, "Nesterov's form of the momentum")
    weight_decay: float = _key(0.0, "of weights; steps never get any", low=0)
    schedule: str = _key(
        "cosine", "cosine falls to 0, one-cycle rises first", choices=("cosine", "one-cycle", "constant")
    )
    clip_norm: float = _key(0.0, "limit of the norm of all gradients; 0 for none", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatSection(Optimization):
    """The float phase."""

    epochs: int = _key(20, "passes over the training images", low=0)
    lr: float = _key(0.1, "learning rate, the highest of the schedule", above=0)
    schedule: str = _key(
        "one-cycle", "cosine falls to 0, one-cycle rises first", choices=("cosine", "one-cycle", "constant")
    )
    weights: str = _key("", "a state dict to start from (.safetensors, or a file of torch.save)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatSection(Optimization):
    """The quantized phase."""

    weight_decay: float = _key(1e-4, "of weights; steps never get any", low=0)
    step_optimizer: str = _key("same", "of steps; same: that of the weights", choices=("same", "adam"))
    step_lr: float = _key(0.01, "learning rate of steps", low=0)
    clipping_penalty: float = _key(0.0, "weight of PACT's sum of alpha**2 in the loss", low=0)
    freeze_norm_after: float = _key(
        1.0, "share of the epochs after which batch norms keep their statistics; 1 for never", low=0, high=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinRegularizationSection:
    """Bin regularization (Han et al., ICCV 2021)."""

    weight: float = _key(0.0, "of the term in the loss, lambda; the paper's is 0.5; 0 for none", low=0)
    schedule: str = _key("S2", "S1: always; S2: after a third; S3: every other epoch", choices=("S1", "S2", "S3"))
    grad_to_step: bool = _key(True, "whether the term also moves steps")
    groups: str = _key("step", "what shares bins", choices=("step", "layer"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DampeningSection:
    """Oscillation dampening (Nagel et al., ICML 2022)."""

    weight: float = _key(0.0, "of the term in the loss at the end, to which it rises along a cosine; 0 for none", low=0)
    start: float = _key(0.25, "share of the steps before it begins", low=0, below=1)
    aggregation: str = _key("kernel_mean", "within a layer", choices=("sum", "mean", "kernel_mean"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezingSection:
    """Iterative freezing (Nagel et al., ICML 2022)."""

    first: float = _key(0.0, "first threshold of the frequency; 0 and 0 for no freezing", low=0, high=1)
    last: float = _key(0.0, "last threshold, reached along a cosine", low=0, high=1)
    start: float = _key(0.25, "share of the steps before it begins", low=0, below=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdFreezingSection:
    """Freezing of TQT's thresholds, one after another (Jain et al., MLSys 2020)."""

    every: int = _key(0, "steps between two thresholds; 0 for no freezing", low=0)
    start: float = _key(0.25, "share of the steps before it begins", low=0, below=1)
    momentum: float = _key(0.05, "of the moving averages of gradients and sides", above=0, high=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OscillationSection:
    """Counting of oscillating weights."""

    track: bool = _key(True, "whether to count; freezing needs it")
    momentum: float = _key(0.01, "of the moving averages of frequencies and codes", above=0, high=1)
    frequency: float = _key(0.005, "above it, a weight counts as oscillating", low=0, below=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaSection:
    """Moving averages of weights, steps and statistics (Gupta and Asthana, WACV 2024)."""

    decay: float = _key(0.0, "of a step of the optimizer; 0 for no averages", low=0, below=1)
    ramp: int = _key(2000, "steps over which the decay rises to its value", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNormSection:
    """What happens to batch norms behind the quantized phase."""

    reestimate_batches: int = _key(0, "batches for new statistics; 0 to keep them", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectionSection:
    """Quantization correction, QC (Gupta and Asthana, WACV 2024)."""

    epochs: int = _key(0, "passes over the training images; 0 for no correction", low=0)
    lr: float = _key(1e-4, "learning rate of Adam", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopsSection:
    """When a training ends before its time."""

    step_factor: float = _key(1024.0, "how far a step may move from where calibration put it, up or down", above=1)
    sign: bool = _key(True, "whether a stored step may not fall to 0 or below; where it may, its magnitude is the step")
    zero_share: float = _key(0.999, "share of codes of a tensor that may be 0", above=0, high=1)
    every: int = _key(50, "steps between looks at the steps; each epoch ends with one, too", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run as such."""

    seed: int = _key(0, "of initial weights, order and augmentation", low=0)
    threads: int = _key(1, "of torch; other numbers give other sums; 0 for torch's choice", low=0)
    checkpoint_steps: int = _key(0, "steps between checkpoints within an epoch; 0 for only one at its end", low=0)


_SECTIONS: Final[dict[str, type]] = {
    "model": ModelSection,
    "data": DataSection,
    "float": FloatSection,
    "qat": QatSection,
    "bin_regularization": BinRegularizationSection,
    "dampening": DampeningSection,
    "freezing": FreezingSection,
    "threshold_freezing": ThresholdFreezingSection,
    "oscillation": OscillationSection,
    "ema": EmaSection,
    "batch_norm": BatchNormSection,
    "correction": CorrectionSection,
    "stops": StopsSection,
    "run": RunSection,
}
_QUANTIZATION: Final = "quantization"
_PRESET: Final = "preset"
_SHORT: Final = {
    "seed": ("run.seed",),
    "epochs": ("qat.epochs",),
    "lr": ("qat.lr", "qat.step_lr"),
    "method": ("quantization.method",),
    "bits": ("quantization.weight_bits", "quantization.act_bits"),
}
"""What ``--set`` takes besides ``table.key``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training, completely.

    Parameters
    ----------
    name : str
        Of its file.
    summary : str
        One line.
    quantization : QConfig
    others
        One for each table of the file.
    """

    name: str
    summary: str
    model: ModelSection
    data: DataSection
    float_phase: FloatSection
    quantization: QConfig
    qat: QatSection
    bin_regularization: BinRegularizationSection
    dampening: DampeningSection
    freezing: FreezingSection
    threshold_freezing: ThresholdFreezingSection
    oscillation: OscillationSection
    ema: EmaSection
    batch_norm: BatchNormSection
    correction: CorrectionSection
    stops: StopsSection
    run: RunSection

    def to_toml(self) -> str:
        """A file without base that gives this recipe: every table and key, defaults included."""
        tables: dict[str, Any] = {"summary": self.summary}
        for table in _SECTIONS:
            tables[table] = dataclasses.asdict(getattr(self, _attribute(table)))
        tables[_QUANTIZATION] = _quantization_table(self.quantization)
        return dump_toml(tables)

    def identity(self) -> str:
        """What a result depends on, as text: everything but name and summary."""
        tables = {t: dataclasses.asdict(getattr(self, _attribute(t))) for t in _SECTIONS}
        return json.dumps([tables, json.loads(self.quantization.to_json())], sort_keys=True)


def builtin_recipes() -> dict[str, str]:
    """Name and summary of the recipes that come with the package."""
    return {p.stem: load_recipe(p.stem).summary for p in sorted(FOLDER.glob("*.toml"))}


def load_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    name : str or Path
        One of :func:`builtin_recipes`, or the path of a file: whatever contains a slash or ends in ``.toml``.
    settings : sequence of str
        ``table.key=value`` to change single values, or a short form: ``seed``, ``epochs``, ``lr``, ``bits``,
        ``method``.

    Raises
    ------
    RecipeError
        A file that is missing or no TOML, an unknown table or key, a value of the wrong type or out of its range.
    """
    path = _find(str(name), None)
    content = _read(path, ())
    where = str(path)
    for setting in settings:
        content = _apply(content, setting)
        where = "--set"
    return build_recipe(content, path.stem, str(path) if not settings else f"{path} with {where}")


def build_recipe(content: Mapping[str, Any], name: str, where: str) -> Recipe:
    """A recipe from its tables; ``where`` is how errors call their source."""
    known = ["summary", _QUANTIZATION, *_SECTIONS]
    for key in content:
        if key not in known:
            raise RecipeError(f"{where}: there is no table {key!r}.{_nearest(key, known)}", hint=_all("Tables", known))
    summary = content.get("summary", "")
    if not isinstance(summary, str):
        raise RecipeError(f"{where}: summary must be a text, not {summary!r}.")
    sections = {_attribute(t): _section(kind, content.get(t, {}), t, where) for t, kind in _SECTIONS.items()}
    recipe = Recipe(
        name=name,
        summary=summary,
        quantization=_qconfig(content.get(_QUANTIZATION, {}), where),
        **sections,
    )
    _check_whole(recipe, where)
    return recipe


def describe_keys() -> Iterator[tuple[str, str, str, str]]:
    """``(table.key, type, default, meaning)`` of every key but those of quantization, which is a QConfig."""
    for table, kind in _SECTIONS.items():
        types = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            doc = field.metadata["doc"]
            if field.metadata["choices"]:
                doc += f" ({', '.join(map(str, field.metadata['choices']))})"
            yield f"{table}.{field.name}", types[field.name].__name__, _value(field.default), doc


def _check_whole(recipe: Recipe, where: str) -> None:
    """What no table can say alone."""
    if not recipe.model.factory:
        raise RecipeError(f"{where}: model.factory is missing: package.module:function of the float network.")
    if not recipe.data.name:
        raise RecipeError(f"{where}: data.name is missing: a data set such as digits, or a folder of images.")
    freezing = recipe.freezing
    if (freezing.first > 0) != (freezing.last > 0):
        raise RecipeError(f"{where}: freezing.first and freezing.last must both be above 0, or both 0 for no freezing.")
    if freezing.first and not recipe.oscillation.track:
        raise RecipeError(f"{where}: freezing needs oscillation.track = true.")
    needs = [t for t, on in (("bin_regularization", recipe.bin_regularization.weight),) if on]
    needs += [t for t, on in (("dampening", recipe.dampening.weight), ("freezing", freezing.first)) if on]
    if needs and recipe.quantization.method == "dorefa":
        raise RecipeError(f"{where}: {needs[0]} needs codes of w / step, which the method 'dorefa' does not have.")
    if recipe.qat.clipping_penalty and recipe.quantization.method != "pact":
        raise RecipeError(
            f"{where}: qat.clipping_penalty goes with the method 'pact', not {recipe.quantization.method!r}."
        )
    if recipe.threshold_freezing.every and recipe.quantization.method != "tqt":
        raise RecipeError(
            f"{where}: threshold_freezing.every goes with the method 'tqt', not {recipe.quantization.method!r}."
        )
    if recipe.batch_norm.reestimate_batches and recipe.quantization.batch_norm == "folded":
        raise RecipeError(
            f'{where}: batch_norm.reestimate_batches needs quantization.batch_norm = "unfolded": folded ones have no '
            "statistics."
        )


def _attribute(table: str) -> str:
    return "float_phase" if table == "float" else table


def _find(name: str, beside: Path | None) -> Path:
    if "/" in name or name.endswith(".toml"):
        path = Path(name)
        path = path if beside is None or path.is_absolute() else beside / path
        if not path.is_file():
            raise RecipeError(f"There is no recipe file {path}.")
        return path
    path = FOLDER / f"{name}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in FOLDER.glob("*.toml"))
        raise RecipeError(
            f"There is no recipe {name!r}.{_nearest(name, names)}",
            hint="`nibblecore recipes` lists them; a file of your own is named with its path, as ./my.toml.",
        )
    return path


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise RecipeError(f"{path} is its own base, through {', '.join(str(p) for p in above)}.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no text: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is no TOML: {error}.") from error
    base, preset = content.pop("base", None), content.pop(_PRESET, None)
    tables: dict[str, Any] = {}
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError(f"{path}: base must be the name or path of a recipe, not {base!r}.")
        tables = _read(_find(base, path.parent), (*above, path.resolve()))
    if preset is not None:
        tables = _merge(tables, _preset(preset, str(path)))
    return _merge(tables, content)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged key by key; everything else is replaced. Another method starts without the base's options."""
    result = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merge(result[key], value)
        else:
            result[key] = value
    return result


def _apply(content: Mapping[str, Any], setting: str) -> dict[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals:
        raise RecipeError(f"--set {setting}: write key=value, as in --set qat.epochs=5.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a text without quotation marks, which a shell would have taken away
    result = dict(content)
    for full in _SHORT.get(key, (key,)):
        table, dot, rest = full.partition(".")
        if not dot:
            known = [*_SHORT, *(k for k, *_ in describe_keys())]
            raise RecipeError(
                f"--set {setting}: there is no key {key!r}.{_nearest(key, known)}",
                hint=f"Write table.key=value, or one of {', '.join(_SHORT)}.",
            )
        change: Any = value
        for part in reversed(rest.split(".")):
            change = {part: change}
        result = _merge(result, {table: change})
    return result


def _section(kind: type, values: Any, table: str, where: str) -> Any:
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: {table} must be a table, [{table}], not {values!r}.")
    types = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    given = {}
    for key, value in values.items():
        full = f"{table}.{key}"
        if key not in fields:
            raise RecipeError(
                f"{where}: there is no key {full!r}.{_nearest(key, list(fields))}",
                hint=_all(f"Keys of [{table}]", list(fields)),
            )
        wanted = types[key]
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            kinds = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
            raise RecipeError(f"{where}: {full} must be {kinds[wanted]}, not {value!r}.")
        limits = fields[key].metadata
        if (text := _limit(value, limits)) is not None:
            raise RecipeError(f"{where}: {full} must be {text}, not {value!r}.")
        given[key] = value
    return kind(**given)


def _limit(value: Any, limits: Mapping[str, Any]) -> str | None:
    """What a value should be, or None where it is."""
    if limits["choices"]:
        return None if value in limits["choices"] else _alternatives(limits["choices"])
    if not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return "finite"
    checks = (
        ("low", "at least", lambda a, b: a >= b),
        ("above", "above", lambda a, b: a > b),
        ("high", "at most", lambda a, b: a <= b),
        ("below", "below", lambda a, b: a < b),
    )
    wanted = [
        (f"{word} {limits[name]:g}", fits(value, limits[name]))
        for name, word, fits in checks
        if limits[name] is not None
    ]
    return None if all(fits for _, fits in wanted) else " and ".join(text for text, _ in wanted)


def _qconfig(values: Any, where: str) -> QConfig:
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: {_QUANTIZATION} must be a table, [{_QUANTIZATION}], not {values!r}.")
    fields = {f.name for f in dataclasses.fields(QConfig)}
    for key in values:
        if key not in fields:
            raise RecipeError(
                f"{where}: there is no key {f'{_QUANTIZATION}.{key}'!r}.{_nearest(key, sorted(fields))}",
                hint=_all(f"Keys of [{_QUANTIZATION}]", [f.name for f in dataclasses.fields(QConfig)]),
            )
    try:
        arguments = dict(values)
        if arguments.get("method") not in (None, *METHODS):
            raise ValueError(f"method must be {_alternatives(tuple(sorted(METHODS)))}, not {arguments['method']!r}")
        arguments["overrides"] = tuple(Override(**o) for o in values.get("overrides", ()))
        options = []
        used = {values.get("method", QConfig.method), *(o.method for o in arguments["overrides"])}
        for name, table in values.get("options", {}).items():
            kind = METHODS[name].options if name in METHODS else None
            if kind is None:
                raise ValueError(f"options.{name}: no training method {name!r} has options")
            if name in used:  # a base may have options for its own method
                options.append(kind(**table))
        return QConfig(**arguments | {"options": tuple(options)})
    except (TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"{where}: {_QUANTIZATION}: {error}.") from error


def _preset(values: Any, where: str) -> dict[str, Any]:
    """The tables of a preset."""
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise RecipeError(
            f'{where}: {_PRESET} must be a table with a name, as in preset = {{ name = "fqn", bits = 4 }}.'
        )
    arguments = dict(values)
    name = arguments.pop("name")
    if name not in PRESETS:
        known = sorted(PRESETS)
        raise RecipeError(f"{where}: there is no preset {name!r}.{_nearest(name, known)}", hint=_all("Presets", known))
    try:
        preset = PRESETS[name](**arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {_PRESET} {name!r}: {error}.") from error
    return {**{t: dict(v) for t, v in preset.training.items()}, _QUANTIZATION: _quantization_table(preset.qconfig)}


def _quantization_table(config: QConfig) -> dict[str, Any]:
    table = dataclasses.asdict(config)
    table["options"] = {o.method: dataclasses.asdict(o) for o in config.options}
    table["overrides"] = [{k: v for k, v in o.items() if v is not None} for o in table["overrides"]]
    return {k: v for k, v in table.items() if v is not None and v not in ([], {}, ())}


def _alternatives(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values[:-1])) + f" or {values[-1]!r}" if len(values) > 1 else repr(values[0])


def _nearest(key: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(key, known, 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _all(what: str, names: Sequence[str]) -> str:
    return f"{what}: {', '.join(names)}."


def _value(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    # A JSON text is a TOML text, but for a character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def dump_toml(content: Mapping[str, Any], prefix: str = "") -> str:
    """Numbers, texts, truth values, lists of them, tables, and lists of tables, as TOML."""
    keys = {k: k if re.fullmatch("[A-Za-z0-9_-]+", k) else _value(k) for k in content}
    lines = [f"{keys[k]} = {_value(v)}" for k, v in content.items() if not _is_table(v)]
    for key, value in content.items():
        path = prefix + keys[key]
        if isinstance(value, Mapping):
            lines += ["", f"[{path}]", dump_toml(value, f"{path}.").rstrip("\n")]
        elif _is_table(value):
            for item in value:
                lines += ["", f"[[{path}]]", dump_toml(item, f"{path}.").rstrip("\n")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)
    )
