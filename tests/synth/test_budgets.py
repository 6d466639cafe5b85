"""Area of the array, the requantizer and whole cores against their budgets, by synthesis."""

from pathlib import Path
from typing import Any

import pytest
from amaranth import Module, Signal

from nibblecore.arch.config import ArchConfig
from nibblecore_hw.core import array
from nibblecore_hw.core.elements import BitplaneDot, DotElement, make_element
from nibblecore_hw.synth.budget import ITEMS, area, excess, figures, load_budgets, measure

BUDGETS = load_budgets(Path(__file__).parent / "budgets.json")["area"]


def test_every_item_has_a_budget() -> None:
    assert set(BUDGETS) == set(ITEMS), "run `make budgets`"


@pytest.mark.parametrize("item", ITEMS)
def test_area_is_within_budget(item: str) -> None:
    assert not excess(item, BUDGETS[item], measure(item)), "or raise the budget on purpose: make budgets"


def test_a_regression_is_told_with_the_numbers_before_and_after() -> None:
    budget = {"lut": 1000, "ff": 500, "lutram": 0, "bram": 4, "dsp": 2}
    assert excess("small/array", budget, {**budget, "lut": 1030}) == []
    assert excess("small/array", budget, {**budget, "lut": 1031, "bram": 5}) == [
        "small/array: lut was 1,000 and is 1,031 (+3.1%; 3% are allowed)",
        "small/array: bram was 4 and is 5 (+25.0%; 3% are allowed)",
    ]
    assert excess("small/array", budget, {**budget, "lutram": 1}) == [
        "small/array: lutram was 0 and is 1 (+100.0%; 3% are allowed)"
    ]


def test_cells_of_both_families() -> None:
    assert figures({"LUT4": 3, "CCU2C": 2, "TRELLIS_FF": 5, "MULT18X18D": 1, "PFUMX": 9}, "ecp5") == {
        "lut": 7, "ff": 5, "lutram": 0, "bram": 0, "dsp": 1
    }  # fmt: skip
    cells = {"SB_LUT4": 3, "SB_CARRY": 2, "SB_DFFESR": 5, "SB_DFF": 1, "SB_RAM40_4K": 2, "SB_SPRAM256KA": 1}
    assert figures(cells, "ice40") == {"lut": 3, "ff": 6, "lutram": 0, "bram": 3, "dsp": 0}


class Wasteful(DotElement):
    """The ``bitplane`` element with a register too many, behind an adder that changes nothing but costs."""

    ACTIVATION_POLARITY = BitplaneDot.ACTIVATION_POLARITY
    WEIGHT_POLARITY = BitplaneDot.WEIGHT_POLARITY

    def __init__(self, *, lanes: int, inverted: bool) -> None:
        super().__init__(lanes=lanes, inverted=inverted)
        self.inner = make_element("bitplane", lanes=lanes, inverted=inverted, technology="ecp5")

    @property
    def latency(self) -> int:
        return self.inner.latency + 1

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.inner = inner = self.inner
        for name in ("activations", "weights", "load_stb", "swap_stb"):
            m.d.comb += getattr(inner, name).eq(getattr(self, name))
        ballast = Signal(8, reset_less=True)
        total = Signal.like(inner.sum, reset_less=True)
        before = Signal.like(ballast, reset_less=True)
        m.d.sync += [ballast.eq(ballast + 1), before.eq(ballast), total.eq(inner.sum + ballast)]
        m.d.comb += self.sum.eq(total - before)
        return m


def test_a_wasteful_element_bursts_the_budget_of_its_array(monkeypatch: pytest.MonkeyPatch) -> None:
    core = ArchConfig(name="4x4", lanes=4, columns=4, post_lanes=2, element="bitplane")
    budget = area(array.SystolicArray(core, technology="ecp5"), "ecp5-25k")
    assert excess("4x4/array", budget, budget) == []
    monkeypatch.setattr(
        array, "make_element", lambda kind, *, lanes, inverted, **_: Wasteful(lanes=lanes, inverted=inverted)
    )
    now = area(array.SystolicArray(core, technology="ecp5"), "ecp5-25k")
    told = excess("4x4/array", budget, now)
    assert [text.split(" (+")[0] for text in told] == [
        f"4x4/array: lut was {budget['lut']:,} and is {now['lut']:,}",
        f"4x4/array: ff was {budget['ff']:,} and is {now['ff']:,}",
    ]
    # Ten bits of sum and eight of ballast, twice, in each of four columns.
    assert now["ff"] >= budget["ff"] + 4 * 10
