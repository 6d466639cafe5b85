"""Options and fixtures of all tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--waves", type=Path, metavar="DIR", help="keep waveforms of Amaranth's simulator in DIR")


@pytest.fixture
def vcd(request: pytest.FixtureRequest) -> Path | None:
    """Where this test writes its waveform: a file named after it with ``--waves``, else ``None``."""
    folder: Path | None = request.config.getoption("--waves")
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (re.sub(r"[^\w.-]+", "_", request.node.nodeid) + ".vcd")
