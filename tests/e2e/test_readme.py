"""The Python of the README runs as it stands there."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.cosim
def test_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), names)
    result = names["result"]
    assert result.outputs["classifier"].shape == (10, 1, 1)  # type: ignore[attr-defined]
    assert result.cycles > 0  # type: ignore[attr-defined]
    assert str(result.cycles) in printed.getvalue()  # type: ignore[attr-defined]
