"""Cells that stand at the far end of a path are found and moved; others stay."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from nibblecore_hw.synth.relocate import Timing, relocate

CLOCK, LUT, SETUP = 525, 236, 40
Nets = Mapping[str, Sequence[str]]
"""Driver to sinks, each ``<cell>/<port>``."""


def wire(a: tuple[int, int], b: tuple[int, int]) -> int:
    """What nextpnr estimates for a wire of the ECP5, speed grade 6, in picoseconds."""
    return 480 + sum(160 * min(abs(p - q), 5) + 80 * max(abs(p - q) - 5, 0) for p, q in zip(a, b, strict=True))


def design(bels: Mapping[str, str], nets: Nets) -> tuple[dict[str, Any], str]:
    """Cells and SDF: names beginning with ``f`` are flip-flops, others LUTs."""
    cells: dict[str, Any] = {
        name: {
            "type": "TRELLIS_FF" if name.startswith("f") else "TRELLIS_COMB",
            "parameters": {},
            "attributes": {"NEXTPNR_BEL": bel},
            "connections": {"CLK": [0]} if name.startswith("f") else {},
        }
        for name, bel in bels.items()
    }
    lines = ["(DELAYFILE", "  (CELL", "    (INSTANCE )"]
    for number, (driver, sinks) in enumerate(nets.items(), start=1):
        for pin in (driver, *sinks):
            name, _, port = pin.partition("/")
            cells[name]["connections"][port] = [number]
        for sink in sinks:
            ends = [bels[pin.partition("/")[0]] for pin in (driver, sink)]
            a, b = (tuple(int(part[1:]) for part in bel.split("/")[:2]) for bel in ends)
            beside = sink.endswith("/DI") and ends[0].rpartition(".")[0] == ends[1].rpartition(".")[0]
            delay = 0 if beside else wire(a, b)  # type: ignore[arg-type]
            lines.append(f"        (INTERCONNECT {driver} {sink} ({delay}:{delay}:{delay}) (1:1:1))")
    for name, cell in cells.items():
        lines.append(f"    (INSTANCE {name})")
        for port in cell["connections"]:
            if name.startswith("f") and port in ("M", "DI", "CE"):
                lines.append(f"        (SETUPHOLD (posedge {port}) (posedge CLK) (0:{SETUP}:{SETUP}) (0:0:0))")
            elif name.startswith("f") and port == "Q":
                lines.append(f"        (IOPATH CLK Q (500:510:{CLOCK}) (1:1:1))")
            elif port in "ABCD" and not name.startswith("f"):
                lines.append(f"        (IOPATH {port} F (200:218:{LUT}) (200:218:{LUT}))")
    return cells, "\n".join(lines)


# Around two registers, logic and wires as a placement has them: tiles with empty slices, and short paths.
AROUND = {f"f{x}_{y}": f"X{x}/Y{y}/SLICEA.FF0" for x in range(10, 70, 3) for y in range(10, 20, 3)}
SHORT: Nets = {f"f{x}_{y}/Q": [f"f{x + 3}_{y}/M"] for x in range(10, 67, 3) for y in range(10, 20, 3)}


def place_of(cells: Mapping[str, Any], name: str) -> tuple[int, int]:
    x, y = cells[name]["attributes"]["NEXTPNR_BEL"].split("/")[:2]
    return int(x[1:]), int(y[1:])


def there_and_back(bels: Mapping[str, str], nets: Nets) -> tuple[dict[str, Any], str]:
    return design({**AROUND, **bels}, {**SHORT, **nets})


def test_lengths_are_those_of_the_longest_paths() -> None:
    cells, sdf = there_and_back(
        {"fa": "X10/Y10/SLICEB.FF0", "lut": "X60/Y10/SLICEB.K0", "fb": "X13/Y10/SLICEB.FF0"},
        {"fa/Q": ["lut/A"], "lut/F": ["fb/M"]},
    )
    timing = Timing(sdf.splitlines())
    length, end = timing.analyse()[0]
    assert end == "fb/M"
    assert length == CLOCK + wire((10, 10), (60, 10)) + LUT + wire((60, 10), (13, 10)) + SETUP
    assert timing.critical_cells(end) == ["fb", "lut", "fa"]
    assert timing.tail("lut/A") == LUT + wire((60, 10), (13, 10)) + SETUP
    assert timing.arrival("lut/F") == CLOCK + wire((10, 10), (60, 10)) + LUT
    assert len(cells) == len(AROUND) + 3


def test_a_lut_at_the_far_end_comes_back() -> None:
    cells, sdf = there_and_back(
        {"fa": "X10/Y10/SLICEB.FF0", "lut": "X60/Y10/SLICEB.K0", "fb": "X13/Y10/SLICEB.FF0"},
        {"fa/Q": ["lut/A"], "lut/F": ["fb/M"]},
    )
    timing = Timing(sdf.splitlines())
    moves, longest = relocate(cells, timing)
    assert moves >= 1
    assert place_of(cells, "lut")[0] in (10, 13)
    assert longest == pytest.approx(timing.analyse()[0][0])
    assert longest < 4000
    # What it says of itself is what the new places give.
    bels = {name: cell["attributes"]["NEXTPNR_BEL"] for name, cell in cells.items()}
    again = Timing(design(bels, {**SHORT, "fa/Q": ["lut/A"], "lut/F": ["fb/M"]})[1].splitlines())
    assert again.analyse()[0][0] == pytest.approx(longest)
    assert len(set(bels.values())) == len(bels)


def test_luts_behind_each_other_come_back_together() -> None:
    """Neither would gain anything without the other."""
    nets: Nets = {"fa/Q": ["one/A"], "one/F": ["two/B"], "two/F": ["fb/CE"]}
    cells, sdf = there_and_back(
        {
            "fa": "X10/Y10/SLICEB.FF0", "one": "X60/Y10/SLICEB.K0", "two": "X60/Y10/SLICEC.K0",
            "fb": "X13/Y10/SLICEB.FF0",
        },
        nets,
    )  # fmt: skip
    # The registers are fixed: one has an enable, the other one is beside a LUT.
    cells["fa"]["connections"]["LSR"] = [999]
    moves, longest = relocate(cells, Timing(sdf.splitlines()))
    assert moves >= 2
    assert place_of(cells, "one")[0] < 20
    assert place_of(cells, "two")[0] < 20
    assert longest < 4000


@pytest.mark.parametrize(
    "fixed",
    [
        lambda cell: cell["parameters"].update(MODE="CCU2"),
        lambda cell: cell["connections"].update(M=[998]),
    ],
    ids=["carry", "wide"],
)
def test_what_is_more_than_a_lut_stays(fixed: Any) -> None:
    cells, sdf = there_and_back(
        {"fa": "X10/Y10/SLICEB.FF0", "lut": "X60/Y10/SLICEB.K0", "fb": "X13/Y10/SLICEB.FF0"},
        {"fa/Q": ["lut/A"], "lut/F": ["fb/CE"]},
    )
    fixed(cells["lut"])
    cells["fa"]["connections"]["LSR"] = [999]
    moves, longest = relocate(cells, Timing(sdf.splitlines()))
    assert (moves, place_of(cells, "lut")) == (0, (60, 10))
    assert longest == Timing(sdf.splitlines()).analyse()[0][0]


def test_a_lut_stays_beside_the_register_that_it_feeds() -> None:
    cells, sdf = there_and_back(
        {"fa": "X10/Y10/SLICEB.FF0", "lut": "X60/Y10/SLICEB.K0", "fb": "X60/Y10/SLICEB.FF0"},
        {"fa/Q": ["lut/A"], "lut/F": ["fb/DI"]},
    )
    cells["fa"]["connections"]["LSR"] = [999]
    assert relocate(cells, Timing(sdf.splitlines()))[0] == 0


def test_a_register_without_enable_and_reset_goes_where_its_longest_wire_is_shortest() -> None:
    cells, sdf = there_and_back(
        {"fa": "X10/Y10/SLICEB.FF0", "fm": "X11/Y10/SLICEB.FF0", "fb": "X60/Y10/SLICEB.FF0"},
        {"fa/Q": ["fm/M"], "fm/Q": ["fb/CE"]},
    )
    cells["fa"]["connections"]["LSR"] = [999]
    moves, longest = relocate(cells, Timing(sdf.splitlines()))
    assert moves >= 1
    assert 25 <= place_of(cells, "fm")[0] <= 45
    assert longest < 5000


def test_without_paths_nothing_moves() -> None:
    assert relocate({}, Timing(["(DELAYFILE"])) == (0, 0.0)
