"""Cells of the longest paths, moved nearer to what they are connected with.

nextpnr's static placer looks at wires and not at time, and the annealing behind it moves a cell over a few tiles only.
So now and then a LUT stands at the far end of a net that reaches there anyway, which costs no wire, and a path of two
hops crosses the chip twice. Here such cells are found by a static timing analysis of the placement, as nextpnr writes
it (SDF), and each goes to the empty slice where the longest path through it is shortest.

Only cells that are legal in any empty slice are moved: LUTs of which nothing but the four inputs and the output is
used, and which do not feed the flip-flop beside them; and flip-flops without enable and reset whose data do not come
from the LUT beside them. In a core of 1024 MACs that was to reach 98.0 MHz, 23 moves made it 105.4, before routing.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .floorplan import CLOCK_PORTS, Floats

__all__ = ["Timing", "relocate"]

SHARE: Final = 0.9
"""Paths of more than this share of the longest one are looked at."""

ROUNDS: Final = 25
"""Analyses after which it is enough."""

MOVES: Final = 3
"""Times that a cell is moved."""

LEAST_GAIN: Final = 100.0
"""Picoseconds that a move must bring."""

REACH: Final = 4
"""Tiles around the box of a cell's neighbours in which a place is looked for."""

_BEL: Final = re.compile(r"X(\d+)/Y(\d+)/(SLICE[A-D])\.(.*)")
_LUT_PORTS: Final = frozenset("ABCDF")


def _largest(triples: str) -> float:
    """The largest number of delays like ``(1:2:3)``."""
    return max(float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", triples))


class Timing:
    """The longest paths of a placement.

    Parameters
    ----------
    sdf : iterable of str
        Lines of what nextpnr writes with ``--sdf``; picoseconds.

    Attributes
    ----------
    wires : dict of str to (str, float)
        Driver of an input pin, and how long the wire takes. May be changed; :meth:`analyse` takes notice. A pin is a
        cell's name, a slash and the port's name.
    sinks : dict of str to list of str
        Input pins of a driver.
    """

    def __init__(self, sdf: Iterable[str]) -> None:
        self.wires: dict[str, tuple[str, float]] = {}
        self.sinks: dict[str, list[str]] = defaultdict(list)
        self._into: dict[str, list[tuple[str, float]]] = defaultdict(list)  # of an output: inputs, and their delays
        self._from: dict[str, list[tuple[str, float]]] = defaultdict(list)  # of an input: outputs
        self._launch: dict[str, float] = {}
        self._setup: dict[str, float] = {}
        instance = ""
        for line in sdf:
            words = line.replace("\\", "").split()
            match words[:1]:
                case ["(INSTANCE"]:
                    instance = words[1].rstrip(")") if len(words) > 1 else ""
                case ["(INTERCONNECT"]:
                    self.wires[words[2]] = (words[1], _largest(" ".join(words[3:])))
                    self.sinks[words[1]].append(words[2])
                case ["(IOPATH"]:
                    start, end, delay = words[1], f"{instance}/{words[2]}", _largest(" ".join(words[3:]))
                    if start.startswith(CLOCK_PORTS):
                        self._launch[end] = max(delay, self._launch.get(end, 0.0))
                    else:
                        self._into[end].append((f"{instance}/{start}", delay))
                        self._from[f"{instance}/{start}"].append((end, delay))
                case ["(SETUPHOLD"]:
                    # (SETUPHOLD (posedge DI) (posedge CLK) (setup) (hold))
                    groups = re.findall(r"\(([^()]*)\)", line)
                    pin = f"{instance}/{groups[0].split()[-1]}"
                    self._setup[pin] = max(_largest(groups[2]), self._setup.get(pin, 0.0))
        self._arrivals: dict[str, float] = {}
        self._tails: dict[str, float] = {}

    def analyse(self) -> list[tuple[float, str]]:
        """Length of the longest path to each end, and the end's pin; the longest first."""
        self._arrivals.clear()
        self._tails.clear()
        found = []
        for pin, setup in self._setup.items():
            if pin in self.wires:
                driver, wire = self.wires[pin]
                arrival = self.arrival(driver)
                if arrival > 0:
                    found.append((arrival + wire + setup, pin))
        return sorted(found, reverse=True)

    def arrival(self, output: str) -> float:
        """When an output of a cell is there, after the clock; minus infinity where no clock leads to it."""
        return self._walk(output, self._arrivals, self._arrive)

    def tail(self, pin: str) -> float:
        """From an input of a cell to the end of the longest path through it, its setup included."""
        return self._walk(pin, self._tails, self._leave)

    def _arrive(self, output: str, known: Mapping[str, float]) -> tuple[float, list[str]]:
        best, missing = self._launch.get(output, -np.inf), []
        for pin, delay in self._into.get(output, ()):
            if pin in self.wires:
                driver, wire = self.wires[pin]
                if driver in known:
                    best = max(best, known[driver] + wire + delay)
                else:
                    missing.append(driver)
        return best, missing

    def _leave(self, pin: str, known: Mapping[str, float]) -> tuple[float, list[str]]:
        best, missing = self._setup.get(pin, -np.inf), []
        for output, delay in self._from.get(pin, ()):
            for sink in self.sinks.get(output, ()):
                if sink in known:
                    best = max(best, delay + self.wires[sink][1] + known[sink])
                else:
                    missing.append(sink)
        return best, missing

    @staticmethod
    def _walk(start: str, known: dict[str, float], step: Any) -> float:
        """Depth first without recursion, as chains are thousands of cells long; a loop counts for nothing."""
        stack, entered = [start], set[str]()
        while stack:
            pin = stack[-1]
            if pin in known:
                stack.pop()
                continue
            best, missing = step(pin, known)
            missing = [other for other in missing if other not in entered]
            if missing and pin not in entered:
                entered.add(pin)
                stack.extend(missing)
            else:
                known[pin] = best
                stack.pop()
        return known[start]

    def critical_cells(self, end: str) -> list[str]:
        """Names of the cells on the longest path to ``end``, from its end to its beginning."""
        cells = [end.rpartition("/")[0]]
        driver = self.wires[end][0]
        while True:
            cells.append(driver.rpartition("/")[0])
            ways = [
                (self._arrivals[self.wires[pin][0]] + self.wires[pin][1] + delay, self.wires[pin][0])
                for pin, delay in self._into.get(driver, ())
                if pin in self.wires
            ]
            if not ways or max(ways)[0] <= self._launch.get(driver, -np.inf):
                return cells
            driver = max(ways)[1]

    def through(self, cell: str, port: str) -> float:
        """The delay from an input of a LUT to its output."""
        return max((delay for _, delay in self._from.get(f"{cell}/{port}", ())), default=0.0)

    def setup(self, pin: str) -> float:
        """The setup time of an end."""
        return self._setup.get(pin, 0.0)

    def launch(self, output: str) -> float:
        """From the clock to a register's output."""
        return self._launch.get(output, 0.0)


class _Delays:
    """How long a wire takes over a distance, as nextpnr estimates it: fitted to the wires of a placement."""

    def __init__(self, distances: Floats, delays: Floats) -> None:
        self._weights, *_ = np.linalg.lstsq(self._features(distances), delays, rcond=None)

    @staticmethod
    def _features(distances: Floats) -> Floats:
        """Near tiles cost more each than far ones; both axes alike or not."""
        near, far = np.minimum(distances, 5), np.maximum(distances - 5, 0)
        return np.concatenate([np.ones((len(distances), 1)), near, far], axis=1)

    def __call__(self, there: Floats, here: Floats) -> Floats:
        result: Floats = self._features(np.abs(there - here)) @ self._weights
        return result


class _Placement:
    """Where cells are, which of them may be moved, and which slices are empty."""

    def __init__(self, cells: Mapping[str, Any]) -> None:
        self.cells = cells
        self.at: dict[str, Floats] = {}
        used: dict[tuple[int, int], set[str]] = defaultdict(set)  # slices of each tile
        resets: dict[tuple[int, int], set[int]] = defaultdict(set)
        for name, cell in cells.items():
            place = cell["attributes"].get("NEXTPNR_BEL", "")
            if not (where := re.match(r"X(\d+)/Y(\d+)/", place)):
                continue
            tile = int(where[1]), int(where[2])
            self.at[name] = np.array(tile, dtype=np.float64)
            if found := _BEL.match(place):
                used[tile].add(found[3])
                resets[tile].update(bit for bit in cell["connections"].get("LSR", []) if isinstance(bit, int))
        # Every tile of which a slice is used has four.
        self._empty = sorted(
            (*tile, f"SLICE{letter}")
            for tile, slices in used.items()
            for letter in "ABCD"
            if f"SLICE{letter}" not in slices
        )
        # Two resets at most reach a tile, and no reset might count as one.
        self._few_resets = [len(resets[x, y]) <= 1 for x, y, _ in self._empty]
        self._free = np.ones(len(self._empty), dtype=bool)
        self.places = np.array([(x, y) for x, y, _ in self._empty], dtype=np.float64).reshape(-1, 2)

    def movable(self, name: str, timing: Timing) -> bool:
        """Whether a cell is legal in any empty slice."""
        cell = self.cells[name]
        used = {port for port, bits in cell["connections"].items() if bits}
        if cell["type"] == "TRELLIS_COMB":
            beside = cell["attributes"]["NEXTPNR_BEL"].rpartition(".")[0]
            return (
                "MODE" not in cell["parameters"]
                and used <= _LUT_PORTS
                and not any(
                    sink.endswith("/DI")
                    and self.cells[sink[:-3]]["attributes"].get("NEXTPNR_BEL", "").rpartition(".")[0] == beside
                    for sink in timing.sinks.get(f"{name}/F", ())
                )
            )
        return cell["type"] == "TRELLIS_FF" and used <= {"Q", "M", "CLK"}

    def candidates(self, name: str, neighbours: Floats) -> npt.NDArray[np.int64]:
        """Numbers of empty slices around the neighbours."""
        low, high = neighbours.min(0) - REACH, neighbours.max(0) + REACH
        fits = self._free & ((self.places >= low) & (self.places <= high)).all(1)
        if self.cells[name]["type"] == "TRELLIS_FF":
            fits &= self._few_resets
        return np.flatnonzero(fits)

    def move(self, name: str, place: int) -> None:
        """Into an empty slice, which is used then."""
        x, y, piece = self._empty[place]
        bel = "FF0" if self.cells[name]["type"] == "TRELLIS_FF" else "K0"
        self.cells[name]["attributes"]["NEXTPNR_BEL"] = f"X{x}/Y{y}/{piece}.{bel}"
        self.at[name] = self.places[place]
        self._free[place] = False


def _cell(pin: str) -> str:
    return pin.rpartition("/")[0]


def relocate(cells: Mapping[str, Any], timing: Timing) -> tuple[int, float]:
    """Move cells of the longest paths; changes ``NEXTPNR_BEL`` among the attributes of ``cells``.

    Parameters
    ----------
    cells : mapping
        Those of the top module as nextpnr writes them after placement.
    timing : Timing
        Of that placement; changed with it.

    Returns
    -------
    moves, longest : int, float
        How many cells were moved, and the longest path in picoseconds after that; 0.0 where there is no path.
    """
    placement = _Placement(cells)
    # Those that take no time are wires of a slice.
    known = [
        (sink, driver, delay)
        for sink, (driver, delay) in timing.wires.items()
        if delay > 0 and _cell(sink) in placement.at and _cell(driver) in placement.at
    ]
    if not known or not len(placement.places):
        return 0, next((length for length, _ in timing.analyse()), 0.0)
    distances = np.array([np.abs(placement.at[_cell(w)] - placement.at[_cell(d)]) for w, d, _ in known])
    delays = _Delays(distances, np.array([t for _, _, t in known]))
    movable = functools.cache(lambda name: name in placement.at and placement.movable(name, timing))
    moves: dict[str, int] = defaultdict(int)
    for _ in range(ROUNDS):
        ends = timing.analyse()
        busy, moved = set[str](), False
        for length, end in ends:
            if length < SHARE * ends[0][0]:
                break
            for group in _groups(timing.critical_cells(end), cells, movable):
                if any(name in busy or moves[name] == MOVES for name in group):
                    continue
                if _move(group, placement, timing, delays):
                    moved = True
                    for name in group:
                        moves[name] += 1
                        pins = [f"{name}/{port}" for port in cells[name]["connections"]]
                        busy |= {name, *(_cell(timing.wires[pin][0]) for pin in pins if pin in timing.wires)}
                        busy |= {_cell(sink) for pin in pins for sink in timing.sinks.get(pin, ())}
        if not moved:
            break
    return sum(moves.values()), timing.analyse()[0][0]


def _groups(path: list[str], cells: Mapping[str, Any], movable: Callable[[str], bool]) -> Iterator[list[str]]:
    """What may be moved of a path, from its end to its beginning: LUTs one behind the other, and each cell alone.

    A path to the far end of the chip and back may have two LUTs there, and neither is better off without the other.
    """
    run: list[str] = []
    for name in reversed(path):
        if movable(name) and cells[name]["type"] == "TRELLIS_COMB" and name not in run:
            run.append(name)
            continue
        if len(run) > 1:
            yield run
        run = []
    if len(run) > 1:
        yield run
    for name in dict.fromkeys(path):
        if movable(name):
            yield [name]


def _move(group: list[str], placement: _Placement, timing: Timing, delays: _Delays) -> bool:
    """Move LUTs that drive each other, or one cell, to where the longest path through them is shortest.

    Returns whether that brings anything; nothing is moved otherwise.
    """
    is_register = placement.cells[group[0]]["type"] == "TRELLIS_FF"
    inputs: dict[str, list[tuple[float, Floats, str]]] = {}  # of each cell: arrival, where the driver is, the pin
    outputs: dict[str, list[tuple[float, Floats, str]]] = {}  # tail, where the sink is, the pin
    within: dict[str, list[str]] = {name: [] for name in group}  # drivers that move, too
    for name in group:
        inputs[name], outputs[name] = [], []
        for port in placement.cells[name]["connections"]:
            pin = f"{name}/{port}"
            if pin in timing.wires and port != "CLK":
                driver = timing.wires[pin][0]
                behind = timing.setup(pin) if is_register else timing.through(name, port)
                if _cell(driver) in within:
                    within[name].append(_cell(driver))
                elif _cell(driver) in placement.at:
                    inputs[name].append((timing.arrival(driver) + behind, placement.at[_cell(driver)], pin))
                else:
                    return False
            for sink in timing.sinks.get(pin, ()):
                if _cell(sink) in placement.at:
                    outputs[name].append((timing.tail(sink), placement.at[_cell(sink)], sink))
                else:
                    return False
    ends = [end for found in (inputs, outputs) for name in group for end in found[name]]
    if not any(inputs.values()) or not any(outputs.values()):
        return False
    numbers = placement.candidates(group[0], np.array([place for _, place, _ in ends]))
    if len(numbers) < len(group):
        return False
    places = placement.places[numbers]
    beside = float(delays(places[:1], places[:1])[0])

    def longest(where: Mapping[str, Floats]) -> Floats:
        """Length of the longest path through the group for each of several places."""
        result = np.full(len(where[group[0]]), -np.inf)
        arrivals: dict[str, Floats] = {}
        for name in group:
            arrival = np.full(len(result), -np.inf)
            for offset, place, _ in inputs[name]:
                arrival = np.maximum(arrival, offset + delays(place[None], where[name]))
            for driver in within[name]:
                wire = delays(where[driver], where[name]) if len(result) == 1 else beside
                arrival = np.maximum(arrival, arrivals[driver] + wire + timing.through(name, "A"))
            if is_register:
                result = np.maximum(result, arrival)
                arrival = np.full(len(result), timing.launch(f"{name}/Q"))
            arrivals[name] = arrival
            for offset, place, pin in outputs[name]:
                if _cell(pin) not in within:
                    result = np.maximum(result, arrival + delays(place[None], where[name]) + offset)
        return result

    lengths = longest(dict.fromkeys(group, places))
    best = numbers[int(lengths.argmin())]
    nearest = numbers[np.abs(placement.places[numbers] - placement.places[best]).sum(1).argsort(kind="stable")]
    there = {name: placement.places[[number]] for name, number in zip(group, nearest, strict=False)}
    if float((longest({name: placement.at[name][None] for name in group}) - longest(there))[0]) < LEAST_GAIN:
        return False
    for name, number in zip(group, nearest, strict=False):
        placement.move(name, int(number))
    for _, _, pin in ends:
        driver, _ = timing.wires[pin]
        a, b = placement.at[_cell(driver)], placement.at[_cell(pin)]
        timing.wires[pin] = driver, float(delays(a[None], b[None])[0])
    return True
