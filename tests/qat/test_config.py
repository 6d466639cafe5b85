"""QConfig: checks, overrides, JSON."""

from typing import Any

import pytest

from nibblecore.qat import Override, QConfig
from nibblecore.qat.methods import method


def test_overrides_last_match_wins_for_each_field() -> None:
    qconfig = QConfig(
        overrides=(
            Override(pattern="stage?.*", weight_bits=8, act_bits=8),
            Override(pattern="stage2.conv1", act_bits=4),
        )
    )
    assert qconfig.override("stage2.conv1", "weight_bits") == 8
    assert qconfig.override("stage2.conv1", "act_bits") == 4
    assert qconfig.override("stem", "act_bits") is None


def test_json_round_trip() -> None:
    qconfig = QConfig(act_bits=8, output_bits=8, overrides=(Override(pattern="a", act_bits=4),))
    assert QConfig.from_json(qconfig.to_json()) == qconfig


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"weight_bits": 5}, ValueError, r"^weight_bits must be 2, 3, 4 or 8, not 5$"),
        ({"act_bits": "4"}, ValueError, r"^act_bits must be 2, 3, 4 or 8, not '4'$"),
        ({"first_last_bits": 16}, ValueError, r"^first_last_bits must be 2, 3, 4 or 8, not 16$"),
        ({"residual_bits": 0}, ValueError, r"^residual_bits must be 2, 3, 4 or 8, not 0$"),
        ({"shortcut_bits": None}, ValueError, r"^shortcut_bits must be 2, 3, 4 or 8, not None$"),
        ({"output_bits": 5}, ValueError, r"^output_bits must be 2, 3, 4, 8 or 32, not 5$"),
        ({"bias_bits": 4}, ValueError, r"^bias_bits must be 8 or None, not 4$"),
        ({"input_scale_kind": "x"}, ValueError, r"^input_scale_kind must be 'free' or 'power_of_two', not 'x'$"),
        ({"overrides": [1]}, TypeError, r"^overrides must be a tuple of Override, not \[1\]$"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        QConfig(**arguments)


def test_override_errors() -> None:
    with pytest.raises(ValueError, match=r"^weight_bits of override 'a\*' must be 2, 3, 4 or 8, not 6$"):
        Override(pattern="a*", weight_bits=6)
    with pytest.raises(ValueError, match=r"^override 'a\*' must set weight_bits, act_bits or another field$"):
        Override(pattern="a*")


def test_unknown_method() -> None:
    with pytest.raises(
        ValueError, match=r"^there is no training method 'best'; there is dorefa, iao, lsq, lsq\+, pact, tqt$"
    ):
        method("best")
