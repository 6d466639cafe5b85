"""ArchConfig: one description of a core, from which hardware, compiler, golden model and cost model are built."""

import dataclasses
import hashlib
import json
from typing import Any, Final, Literal

from ..errors import ConfigError

MemoryKind = Literal["dual", "single"]

ELEMENT_WEIGHT_RANGE: Final[dict[str, tuple[int, int]]] = {
    "generic": (-8, 7),
    "bitplane": (-8, 7),
    "lutram": (-7, 7),
    "lutram2": (-8, 7),
    "dsp": (-7, 7),
}
"""Processing elements that exist, with the weights that each multiplies exactly."""

PARAM_BITS: Final = 64
"""Bits of one requantization record: bias 32, mult 18, shift 6, spare 8 (see :class:`nibblecore.arch.isa.Post`)."""


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchConfig:
    """What a core is: array shape, buffers, ports. Validated on construction; raises :class:`ConfigError`.

    Units: a *word* is ``lanes`` nibbles, one pixel of one channel brick; buffer depths count words. A *beat* is one
    transfer on the AXI data bus.

    Parameters
    ----------
    name : str
        How users call it; not part of :attr:`hash`.
    lanes : int
        Input channels multiplied per column and cycle: the length of a channel brick. 4, 8, 16, 32 or 64.
    columns : int
        Output channels per cycle. A power of two; a multiple of ``lanes`` or a divisor of it.
    pixels : int
        Output pixels per cycle.
    element : str
        Processing element of the array, a key of :data:`ELEMENT_WEIGHT_RANGE`.
    dsp_columns : int
        So many columns, the last ones, are ``dsp`` elements whatever ``element`` says of the others: a multiple of
        ``2 * post_lanes`` below ``columns``. 0 where ``element`` is ``dsp``, because then all are.
    adder_levels : int
        Adders between two registers of ``bitplane``, ``lutram`` and ``lutram2``, 1..4: with fewer, an element is faster
        and takes more flip-flops and a few more cycles from a product to its sum.
    acc_bits : int
        Width of an accumulator, 24..32. Sums wrap; only the final one has to fit.
    acc_depth : int
        Output pixels that one of the two accumulator banks holds: the largest output tile.
    post_lanes : int
        Requantization lanes: output channels that the post unit finishes per cycle; lanes/8..lanes, so that a 32-bit
        sum per lane fills at least a word, and a code per lane at most one. Also the columns that share one
        accumulator memory and one activation register of the systolic chain.
    act_depth, act_banks : int
        Words of the activation buffer, and the number of equal banks of consecutive addresses that it is cut into.
    act_memory, weight_memory : {"dual", "single"}
        ``dual``: one read and one write port per bank (block RAM). ``single``: one port for both (iCE40 SPRAM).
    weight_depth : int
        Words of the weight buffer, which holds weight tiles and requantization records.
    bus_bits : int
        Data width of the AXI4 master, 32..512.
    addr_bits : int
        Width of AXI addresses, 16..64.
    burst_beats : int
        Longest burst that the DMA issues, 1..256 beats.
    outstanding : int
        Bursts in flight per direction, 1..16.
    queue_depth : int
        Instructions that each engine's queue holds; 0 for a core without queues, which runs one instruction at a time,
        in the order of the program.
    semaphore_bits : int
        Width of a semaphore; an engine that signals a full one waits.
    counters : bool
        Whether the performance counters exist; without them they read as 0.
    """

    name: str
    lanes: int
    columns: int
    pixels: int = 1
    element: str = "generic"
    dsp_columns: int = 0
    adder_levels: int = 2
    acc_bits: int = 24
    acc_depth: int = 256
    post_lanes: int = 4
    act_depth: int = 4096
    act_banks: int = 4
    act_memory: MemoryKind = "dual"
    weight_depth: int = 2048
    weight_memory: MemoryKind = "dual"
    bus_bits: int = 64
    addr_bits: int = 32
    burst_beats: int = 64
    outstanding: int = 4
    queue_depth: int = 4
    semaphore_bits: int = 4
    counters: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(f"{field.name} must be an integer, not {value!r}")
        self._check_choice("lanes", (4, 8, 16, 32, 64))
        for name, low, high in (
            ("columns", 1, 256),
            ("post_lanes", 1, 64),
            ("act_depth", 16, 65536),
            ("act_banks", 1, 16),
            ("weight_depth", 16, 65536),
            ("bus_bits", 32, 512),
            ("acc_depth", 4, 1024),
            ("burst_beats", 1, 256),
            ("outstanding", 1, 16),
        ):
            self._check_range(name, low, high)
            if not _is_power_of_two(getattr(self, name)):
                raise ConfigError(f"{name} must be a power of two, not {getattr(self, name)}")
        if self.queue_depth != 0 and not (2 <= self.queue_depth <= 64 and _is_power_of_two(self.queue_depth)):
            raise ConfigError(f"queue_depth must be 0 or a power of two in 2..64, not {self.queue_depth}")
        if self.sequential and (self.bus_bits != self.word_bits or self.bus_bits * self.burst_beats < 256):
            raise ConfigError(
                f"queue_depth=0 moves a word per beat and an instruction per burst: bus_bits must be {self.word_bits}, "
                f"not {self.bus_bits}, and burst_beats at least {-(-256 // self.word_bits)}, not {self.burst_beats}"
            )
        if self.sequential and self.post_lanes != 1:
            raise ConfigError(
                f"queue_depth=0 finishes one column at a time: post_lanes must be 1, not {self.post_lanes}"
            )
        if self.sequential and (self.element != "generic" or self.dsp_columns or self.columns < 2):
            raise ConfigError(
                f"queue_depth=0 has one element, which computes column after column: element must be 'generic', not "
                f"{self.element!r}, dsp_columns 0, not {self.dsp_columns}, and columns at least 2, not {self.columns}"
            )
        self._check_range("adder_levels", 1, 4)
        self._check_range("acc_bits", 24, 32)
        self._check_range("addr_bits", 16, 64)
        self._check_range("semaphore_bits", 2, 8)
        self._check_choice("pixels", (1,))
        self._check_choice("element", tuple(ELEMENT_WEIGHT_RANGE))
        self._check_choice("act_memory", ("dual", "single"))
        self._check_choice("weight_memory", ("dual", "single"))
        if self.columns % self.post_lanes:
            raise ConfigError(f"post_lanes={self.post_lanes} must divide columns={self.columns}")
        if not self.lanes <= 8 * self.post_lanes <= 8 * self.lanes:
            raise ConfigError(
                f"post_lanes must be in lanes/8..lanes, with lanes={self.lanes} in {max(1, self.lanes // 8)}.."
                f"{self.lanes}, not {self.post_lanes}"
            )
        self._check_paired_columns()
        if self.act_depth // self.act_banks < 16:
            raise ConfigError(
                f"act_depth={self.act_depth} leaves fewer than 16 words in each of {self.act_banks} banks"
            )
        if self.weight_depth < 2 * (self.columns + self.param_words):
            raise ConfigError(
                f"weight_depth={self.weight_depth} cannot hold two tiles of {self.columns} words and their "
                f"{self.param_words} words of requantization records; at least {2 * (self.columns + self.param_words)}"
            )
        if self.burst_beats < self.beats_per_word:
            raise ConfigError(
                f"burst_beats={self.burst_beats} is less than the {self.beats_per_word} beats of {self.bus_bits} bits "
                f"that a word of {self.word_bits} bits takes"
            )
        if self.bus_bits // 8 * self.burst_beats > 4096:
            raise ConfigError(
                f"burst_beats={self.burst_beats} of {self.bus_bits} bits exceed the 4096 bytes of an AXI burst"
            )

    def _check_paired_columns(self) -> None:
        unit = 2 * self.post_lanes
        if self.element == "dsp" and self.dsp_columns:
            raise ConfigError(
                f"dsp_columns must be 0 where element is 'dsp', because then all columns are, not {self.dsp_columns}"
            )
        if not 0 <= self.dsp_columns < self.columns or self.dsp_columns % unit:
            raise ConfigError(
                f"dsp_columns must be a multiple of 2 * post_lanes = {unit} below columns={self.columns}, "
                f"not {self.dsp_columns}"
            )
        if self.paired_columns and (self.post_lanes < 2 or self.columns < unit):
            raise ConfigError(
                f"dsp elements serve two columns of each of two groups: post_lanes must be in 2..columns/2, with "
                f"columns={self.columns} in 2..{self.columns // 2}, not {self.post_lanes}"
            )

    def _check_range(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            raise ConfigError(f"{name} must be in {low}..{high}, not {value}")

    def _check_choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")

    # Derived sizes ---------------------------------------------------------------------------------------------

    @property
    def word_bits(self) -> int:
        """Bits of one word: one pixel of one brick."""
        return 4 * self.lanes

    @property
    def word_bytes(self) -> int:
        return self.word_bits // 8

    @property
    def bus_bytes(self) -> int:
        return self.bus_bits // 8

    @property
    def beats_per_word(self) -> int:
        """Bus beats that move one word; 1 where the bus is as wide as a word or wider."""
        return max(1, self.word_bits // self.bus_bits)

    @property
    def tile_words(self) -> int:
        """Words of one weight tile: one per column, lane 0 of the column in the low nibble."""
        return self.columns

    @property
    def param_words(self) -> int:
        """Words of the requantization records of one column tile, ``columns`` records of :data:`PARAM_BITS`."""
        return -(-self.columns * PARAM_BITS // self.word_bits)

    @property
    def bricks_per_tile(self) -> int:
        """Channel bricks that one column tile produces; 1 where the columns fill a part of a brick."""
        return max(1, self.columns // self.lanes)

    @property
    def parts_per_brick(self) -> int:
        """Column tiles that together fill one channel brick; 1 where the columns fill it alone."""
        return max(1, self.lanes // self.columns)

    @property
    def sequential(self) -> bool:
        """Whether instructions run one at a time, in the order of the program."""
        return self.queue_depth == 0

    @property
    def macs_per_cycle(self) -> int:
        """Products per cycle; without queues, columns take turns."""
        return self.lanes * self.pixels * (1 if self.sequential else self.columns)

    @property
    def paired_columns(self) -> int:
        """Columns, the last ones, that are ``dsp`` elements. If there are any, pixels enter in pairs: a pass takes an
        even number of cycles."""
        return self.columns if self.element == "dsp" else self.dsp_columns

    @property
    def weight_range(self) -> tuple[int, int]:
        """Weight nibbles that all elements multiply exactly."""
        return ELEMENT_WEIGHT_RANGE["dsp" if self.paired_columns else self.element]

    # Identity --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ArchConfig":
        """Rebuild from :meth:`to_dict`; unknown and missing keys raise :class:`ConfigError` with their names."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown ArchConfig fields: {', '.join(unknown)}")
        required = {n for n, f in known.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ConfigError(f"missing ArchConfig fields: {', '.join(missing)}")
        return cls(**values)

    def program_view(self) -> dict[str, Any]:
        """The fields that a program depends on: all but the name and what elements are made of, with their weight
        range."""
        view = self.to_dict()
        del view["name"], view["element"], view["dsp_columns"], view["adder_levels"]
        view["weight_range"] = list(self.weight_range)
        return view

    @property
    def hash(self) -> int:
        """32-bit digest of :meth:`program_view`; stands in program headers and in the CONFIG_HASH register."""
        text = json.dumps(self.program_view(), sort_keys=True, separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")

    def differences(self, other: "ArchConfig") -> list[str]:
        """One ``field: mine, not theirs`` per field that keeps a program of one core from running on the other."""
        mine, theirs = self.program_view(), other.program_view()
        return [f"{key}: {mine[key]}, not {theirs[key]}" for key in mine if mine[key] != theirs[key]]

    def replace(self, **changes: Any) -> "ArchConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


_LARGE: Final = ArchConfig(
    name="large",
    lanes=32,
    columns=32,
    element="lutram2",
    adder_levels=1,
    act_depth=8192,
    weight_depth=4096,
    bus_bits=128,
)

ARCHS: Final[dict[str, ArchConfig]] = {
    a.name: a
    for a in (
        ArchConfig(
            name="tiny",
            lanes=8,
            columns=8,
            acc_depth=128,
            post_lanes=1,
            act_depth=16384,
            act_banks=1,
            act_memory="single",
            weight_depth=16384,
            weight_memory="single",
            bus_bits=32,
            addr_bits=24,
            burst_beats=8,
            outstanding=1,
            queue_depth=0,
            semaphore_bits=2,
            counters=False,
        ),
        ArchConfig(name="small", lanes=16, columns=16, element="lutram2", adder_levels=1, weight_depth=1024),
        _LARGE,
        _LARGE.replace(name="xlarge", columns=64, post_lanes=8),
    )
}
"""Named cores: ``tiny`` for an iCE40 UP5K, ``small`` for an ECP5-25F, ``large`` and ``xlarge`` for an ECP5-85F."""


def get_arch(name: str) -> ArchConfig:
    """The named core of :data:`ARCHS`; :class:`ConfigError` lists the names where there is none."""
    try:
        return ARCHS[name]
    except KeyError:
        raise ConfigError(f"there is no core {name!r}; the named cores are {', '.join(ARCHS)}") from None
