"""Area of the array, the requantizer and whole cores against their budgets, by synthesis."""

import json
from pathlib import Path

import pytest

from nibblecore_hw.synth.budget import ITEMS, excess, measure

BUDGETS = json.loads((Path(__file__).parent / "budgets.json").read_text())


def test_every_item_has_a_budget() -> None:
    assert set(BUDGETS) == set(ITEMS)


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


def test_an_element_of_plain_products_bursts_the_budget_of_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    from nibblecore.arch import config

    small = config.get_arch("small")
    monkeypatch.setitem(config.ARCHS, "small", small.replace(element="generic"))
    (told,) = (
        line for line in excess("small/array", BUDGETS["small/array"], measure("small/array")) if ": lut" in line
    )
    assert told.startswith("small/array: lut was ")
