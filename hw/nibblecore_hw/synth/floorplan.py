"""Sites for block RAM and multipliers, found before nextpnr places the rest.

nextpnr's static placer spreads all cells at once and then moves each block to a free site, one after the other. A block
whose site has been taken by another one wanders off from there. Where most block RAM is in use this nearly doubles the
wires: from 245,000 to 449,000 units, and in luckier placements 380,000, in a core of 1024 MACs with 156 of 208 blocks.
So blocks get their sites here, all at once. Logic is put where its neighbours' centre of gravity is (quadratic wire
length: Kleinhans et al., GORDIAN, IEEE TCAD 1991), with blocks as anchors; then every block goes where its own
neighbours' is, as a linear assignment of blocks to sites; and so on until nothing moves. That ends in a local optimum:
of many random beginnings the best few are followed to their end, and the best end counts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

__all__ = ["Site", "assign_sites"]

Floats = npt.NDArray[np.float64]

WIDEST_NET: Final = 400
"""Nets of more cells reach the whole chip wherever its cells are, and hide what belongs together."""

STARTS: Final = 24
TRIAL_ROUNDS: Final = 12
"""Assignments after which only a quarter of the beginnings goes on, those with the shortest wires."""

ROUNDS: Final = 60
"""Assignments after which a beginning is given up; mostly it has come to rest before, or nearly so."""

SWEEPS: Final = 40
"""Steps by which logic moves to its neighbours' centre between two assignments."""

CLOCK_PORTS: Final = ("CLK", "WCK")
"""How the names of clock inputs begin."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A place for a block: column, row, and what nextpnr calls it."""

    x: int
    y: int
    bel: str


class _Graph:
    """Cells and the nets between them, clocks left out."""

    def __init__(self, cells: Mapping[str, Any]) -> None:
        on_net: dict[int, set[int]] = {}
        for n, cell in enumerate(cells.values()):
            for port, bits in cell["connections"].items():
                if not port.startswith(CLOCK_PORTS):
                    for bit in bits:
                        if isinstance(bit, int):  # others are constants
                            on_net.setdefault(bit, set()).add(n)
        nets = [sorted(members) for members in on_net.values() if 2 <= len(members) <= WIDEST_NET]
        sizes = np.array([len(members) for members in nets], dtype=np.int64)
        columns = np.concatenate([np.array(members, dtype=np.int64) for members in nets] or [np.zeros(0, np.int64)])
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self._incidence = csr_array((np.ones(len(columns)), columns, starts), shape=(len(nets), len(cells)))
        self._columns, self._starts = columns, starts[:-1]
        self._share = 1 / np.maximum(sizes - 1.0, 1.0)  # each net pulls a cell as much, however many cells it has
        self.nets_of: Floats = np.bincount(columns, minlength=len(cells)).astype(np.float64)
        self._own = self._incidence.T @ self._share

    def centres(self, position: Floats) -> Floats:
        """The mean of each cell's neighbours, net by net; of a cell without any, the origin."""
        sums = self._incidence.T @ (self._share[:, None] * (self._incidence @ position))
        result: Floats = (sums - self._own[:, None] * position) / np.maximum(self.nets_of, 1.0)[:, None]
        return result

    def wire_length(self, position: Floats) -> float:
        """Half the perimeter of all nets' bounding boxes."""
        if not len(self._starts):
            return 0.0
        spans = 0.0
        for axis in range(2):
            values = position[self._columns, axis]
            highest, lowest = np.maximum.reduceat(values, self._starts), np.minimum.reduceat(values, self._starts)
            spans += float((highest - lowest).sum())
        return spans


class _Attempt:
    """A random beginning, and what becomes of it.

    Parameters
    ----------
    graph : _Graph
    kinds : mapping
        Numbers of the blocks of each type.
    places : mapping
        Coordinates of the sites of each type.
    rng : Generator
        Where the blocks are at first.

    Attributes
    ----------
    best, length
        Sites of the blocks when the wires were shortest, and how long they were.
    """

    def __init__(
        self,
        graph: _Graph,
        kinds: Mapping[str, npt.NDArray[np.int64]],
        places: Mapping[str, Floats],
        rng: np.random.Generator,
    ) -> None:
        self._graph, self._kinds, self._places = graph, kinds, places
        self._chosen = {kind: rng.permutation(len(places[kind]))[: len(blocks)] for kind, blocks in kinds.items()}
        self._position = np.tile(np.concatenate(list(places.values())).mean(0), (len(graph.nets_of), 1))
        self._rests = False
        self.best, self.length = self._chosen, np.inf

    def improve(self, rounds: int) -> None:
        """So many assignments, or until nothing moves."""
        graph, position = self._graph, self._position
        moves = graph.nets_of > 0
        for blocks in self._kinds.values():
            moves[blocks] = False
        for _ in range(rounds):
            if self._rests:
                return
            for kind, blocks in self._kinds.items():
                position[blocks] = self._places[kind][self._chosen[kind]]
            for _ in range(SWEEPS):
                position[moves] = graph.centres(position)[moves]
            length = graph.wire_length(position)
            if length < self.length:
                self.best, self.length = self._chosen, length
            centres, before, self._chosen = graph.centres(position), self._chosen, {}
            for kind, blocks in self._kinds.items():
                distances = ((centres[blocks][:, None] - self._places[kind][None]) ** 2).sum(2)
                _, self._chosen[kind] = linear_sum_assignment(distances * graph.nets_of[blocks][:, None])
            self._rests = all((self._chosen[kind] == before[kind]).all() for kind in self._kinds)


def assign_sites(
    cells: Mapping[str, Any], sites: Mapping[str, Sequence[Site]], *, seed: int, starts: int = STARTS
) -> dict[str, str]:
    """The site of each cell of a type in ``sites``.

    Parameters
    ----------
    cells : mapping
        Those of the top module as Yosys writes them: name to ``type`` and ``connections``.
    sites : mapping
        Type of cell to all its sites.
    seed : int
        Of the random beginnings; the same gives the same.
    starts : int
        Beginnings.

    Returns
    -------
    dict of str to str
        Name of a cell to :attr:`Site.bel`. Without the cells of a type that has fewer sites than cells: whoever places
        them will say so.
    """
    names = list(cells)
    kinds = {kind: np.array([n for n, name in enumerate(names) if cells[name]["type"] == kind]) for kind in sites}
    kinds = {kind: blocks for kind, blocks in kinds.items() if 0 < len(blocks) <= len(sites[kind])}
    if not kinds:
        return {}
    graph = _Graph(cells)
    places = {kind: np.array([(site.x, site.y) for site in sites[kind]], dtype=np.float64) for kind in kinds}
    rng = np.random.default_rng(seed)
    attempts = [_Attempt(graph, kinds, places, rng) for _ in range(starts)]
    for attempt in attempts:
        attempt.improve(TRIAL_ROUNDS)
    attempts.sort(key=lambda attempt: attempt.length)
    attempts = attempts[: -(-starts // 4)]
    for attempt in attempts:
        attempt.improve(ROUNDS - TRIAL_ROUNDS)
    best = min(attempts, key=lambda attempt: attempt.length).best
    return {
        names[n]: sites[kind][site].bel
        for kind, blocks in kinds.items()
        for n, site in zip(blocks, best[kind], strict=True)
    }
