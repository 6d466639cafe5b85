"""The table of methods: cells, cache, and what the page says about orderings."""

from pathlib import Path
from typing import Any

import pytest

from nibblecore.qat.training import load_recipe
from nibblecore.qat.training.results import METHOD_RECIPES, TASK, run_table
from nibblecore.qat.training.results_page import PUBLISHED, Table, page

QUICK = ("float.epochs=1", "qat.epochs=1", "data.limit=128", "correction.epochs=0")


def test_every_method_has_a_recipe() -> None:
    for name, (recipe, title) in METHOD_RECIPES.items():
        assert load_recipe(recipe, TASK).data.name == "digits-noisy"
        assert title, name
    assert {c.better for c in PUBLISHED} | {c.worse for c in PUBLISHED} <= set(METHOD_RECIPES)


def test_a_small_table_and_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "build" / "results.jsonl"
    ticks: list[tuple[int, int, str]] = []
    cells = run_table(["ptq", "dorefa"], [4], 2, cache=cache, jobs=1, settings=QUICK, tick=lambda *t: ticks.append(t))
    assert [(c["method"], c["bits"], c["seed"]) for c in cells] == [
        ("float", 0, 1), ("float", 0, 2), ("ptq", 4, 1), ("dorefa", 4, 1), ("ptq", 4, 2), ("dorefa", 4, 2)
    ]  # fmt: skip
    assert ticks[-1][:2] == (6, 6)
    assert 0 < cells[2]["integer"] <= 1
    assert abs(cells[2]["integer"] - cells[2]["fake"]) < 0.02
    assert cells[3]["integer"] is None
    assert "DoReFa" in cells[3]["refusal"]
    assert (cells[0]["steps"], cells[2]["steps"], cells[3]["steps"]) == (2, 0, 2)
    assert len(cache.read_text().splitlines()) == 6
    text = page(Table(cells), seeds=2)
    assert "DoReFa, 4 bits, has no integers: stem.0: Weights fit nibbles." in text

    # What is there is not trained again; half a line of a killed run is, on a line of its own.
    lines = cache.read_text()
    cache.write_text(lines[: lines.rindex("{") + 40])
    trained: list[str] = []
    import nibblecore.qat.training.results as results

    original = results.train_cell
    monkeypatch.setattr(results, "train_cell", lambda cell, *a: trained.append(cell.key) or original(cell, *a))  # type: ignore[func-returns-value]
    again = run_table(["ptq", "dorefa"], [4], 2, cache=cache, jobs=1, settings=QUICK)
    assert trained == [cells[-1]["key"]]
    drop = {"seconds"}
    assert [{k: v for k, v in c.items() if k not in drop} for c in again] == [
        {k: v for k, v in c.items() if k not in drop} for c in cells
    ]
    # Another recipe is another cell.
    run_table(["ptq"], [4], 2, cache=cache, jobs=1, settings=(*QUICK, "data.noise=0.1"))
    assert len(trained) == 5


def record(method: str, bits: int, seed: int, integer: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "bits": bits, "seed": seed, "fake": integer, "integer": integer, "steps": 10, **more}


def cells(gain: float, spread: float) -> list[dict[str, Any]]:
    result = [record("float", 0, s, 0.9) for s in (1, 2, 3)]
    for bits in (4, 3):
        for s in (1, 2, 3):
            base = 0.8 + 0.01 * s - 0.1 * (4 - bits)
            result.append(record("lsq", bits, s, base, oscillation=0.05))
            result.append(record("dampening", bits, s, base + gain + spread * (s - 2), oscillation=0.01))
    return result


def test_differences_are_paired() -> None:
    table = Table(cells(0.02, 0.001))
    found = table.difference("dampening", "lsq", 4)
    assert found is not None
    # Differences 1.9, 2.0, 2.1: standard error 0.1 / sqrt(3), t of 2 degrees of freedom 4.30.
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert table.difference("freezing", "lsq", 4) is None


@pytest.mark.parametrize(
    ("gain", "spread", "verdict", "sentence"),
    [
        (
            0.02,
            0.001,
            "reproduced",
            "Of 2 published orderings, 2 reproduced here.\n- Reproduced: LSQ + dampening > LSQ at 4",
        ),
        (
            0.02,
            0.05,
            "not told apart",
            "Did not reproduce, because the difference is within the spread of the seeds: LSQ",
        ),
        (
            -0.02,
            0.001,
            "reversed",
            "Did not reproduce: here it is the other way round: LSQ + dampening > LSQ at 4 bits (",
        ),
    ],
)
def test_what_the_page_says(gain: float, spread: float, verdict: str, sentence: str) -> None:
    text = page(Table(cells(gain, spread)), seeds=3)
    assert f"{'+' if gain > 0 else '-'}2.00 ± " in text
    assert f"| {verdict} |" in text
    assert sentence in text
    assert (
        "published to lower the oscillating weights of 3 bits from 4.93 % to 1.11 %; it does so here too: 5.00 % to"
        in text
    )
    assert "**90.00 ± 0.00**" in text
    assert "| LSQ | " in text
    assert "82.00 ± 1.00" in text
    assert "LSQ falls with each bit less: 82.00 at 4, 72.00 at 3 bits" in text
    assert "`nibblecore results --seeds 3`" in text


def test_stopped_trainings_are_said() -> None:
    table = cells(0.02, 0.001)
    table[3] = {"method": "lsq", "bits": 4, "seed": 1, "error": "The loss is nan in quantized epoch 1.", "seconds": 1.0}
    text = page(Table(table), seeds=3)
    assert "82.50 ± 0.71 (1 of 3 stopped)" in text
    assert "- LSQ, 4 bits, stopped: The loss is nan in quantized epoch 1." in text
