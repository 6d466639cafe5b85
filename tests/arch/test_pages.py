from pathlib import Path

import pytest

from nibblecore.arch.pages import PAGES

HW = Path(__file__).parents[2] / "hw"


@pytest.mark.parametrize("name", PAGES)
def test_committed_page_is_current(name: str) -> None:
    assert (HW / name).read_text(encoding="utf-8") == PAGES[name](), "run `make pages` and commit the result"
