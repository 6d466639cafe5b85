"""What all commands share: tables, progress bars, JSON, and the search for transports."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..arch.config import ELEMENT_WEIGHT_RANGE, ArchConfig, get_arch
from ..errors import ConfigError, NibbleError
from ..runtime.transport import GoldenTransport, Transport

OUT: Final = Console()
ERR: Final = Console(stderr=True)

JSON_OPTION: Final = typer.Option(False, "--json", help="Print one JSON object instead of tables.")
ARCH_OPTION: Final = typer.Option("small", "--arch", "-a", help="Named core: tiny, small, large or xlarge.")
ELEMENT_OPTION: Final = typer.Option(
    None, "--element", help=f"Processing element instead of the core's own: {', '.join(ELEMENT_WEIGHT_RANGE)}."
)
SET_OPTION: Final = typer.Option(
    None, "--set", "-s", metavar="FIELD=VALUE", help="Change a field of the core: act_depth=2048; repeatable."
)

TRANSPORT_GROUP: Final = "nibblecore.transports"


def progress(quiet: bool) -> Progress:
    """Progress bars on stderr; none where the output is for a program or not for a terminal."""
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    return Progress(*columns, console=ERR, disable=quiet or not ERR.is_terminal, transient=True)


def say(text: str, *, quiet: bool = False) -> None:
    """One line about what is being done, on stderr."""
    if not quiet:
        ERR.print(text, highlight=False)


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(values, indent=2))


def table(title: str, *columns: str) -> Table:
    """A table; columns whose name ends in ``>`` are right-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        number = column.endswith(">")
        # Text gives way on a narrow terminal, numbers do not.
        result.add_column(column.rstrip(">"), justify="right" if number else "left", no_wrap=number, overflow="fold")
    return result


def changed_arch(name: str, element: str | None, settings: Sequence[str] | None = None) -> ArchConfig:
    """The named core with the options' changes; :class:`ConfigError` says what is no field or no value of it."""
    arch = get_arch(name)
    changes: dict[str, Any] = {} if element is None else {"element": element}
    for text in settings or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes FIELD=VALUE, not {text!r}")
        known = arch.to_dict()
        if key not in known or key == "name":
            raise ConfigError(f"a core has no field {key!r}; it has {', '.join(k for k in known if k != 'name')}")
        changes[key] = _value(key, value, type(known[key]))
    return arch.replace(**changes)


def _value(key: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{key} must be true or false, not {text!r}")
        return text == "true"
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{key} must be an integer, not {text!r}") from None


def require_output_folder(path: Path) -> Path:
    """The path, once its folder exists; a folder in its place is an error."""
    if path.is_dir():
        raise NibbleError(f"{path} is a folder, not a file to write.", hint="Give the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def transports() -> list[str]:
    """Every way to run a program, installed packages included."""
    return ["golden", *sorted(e.name for e in metadata.entry_points(group=TRANSPORT_GROUP))]


def open_transport(kind: str, arch: ArchConfig, **options: Any) -> Transport:
    """A core of the named kind: ``golden``, or one that another package registers (``rtl``)."""
    if kind == "golden":
        return GoldenTransport(arch, **{k: v for k, v in options.items() if k == "memory_bytes"})
    found = {e.name: e for e in metadata.entry_points(group=TRANSPORT_GROUP)}
    if kind not in found:
        raise NibbleError(
            f"there is no way to run on {kind!r}; installed are {', '.join(transports())}",
            hint="RTL simulation comes with: pip install 'nibblecore[sim]'",
        )
    try:
        factory: Callable[..., Transport] = found[kind].load()
    except ImportError as error:
        raise NibbleError(
            f"running on {kind!r} needs a package that is missing: {error}",
            hint="Install: pip install 'nibblecore[sim]'",
        ) from None
    return factory(arch, **options)
