"""What the post unit may cost on an ECP5, counted by Yosys before placement."""

import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nibblecore.arch.config import get_arch
from nibblecore_hw.core.post import PostUnit
from nibblecore_hw.core.requantize import RequantLane
from nibblecore_hw.verilog import to_verilog
from nibblecore_sim.toolchain import find_yosys

pytestmark = pytest.mark.synth


def cells(component: Any, folder: Path) -> dict[str, int]:
    (folder / "top.v").write_text(to_verilog(component, name="top"))
    script = "read_verilog top.v; synth_ecp5 -top top -no-rw-check -nowidelut; tee -o stat.json stat -json"
    subprocess.run([find_yosys(), "-q", "-p", script], cwd=folder, check=True)
    found: dict[str, int] = json.loads((folder / "stat.json").read_text())["design"]["num_cells_by_type"]
    return found


@pytest.mark.parametrize(
    "make_lane",
    [functools.partial(RequantLane, acc_bits=bits, technology="ecp5") for bits in (24, 32)],
    ids=["requant24", "requant32"],
)
def test_a_lane_takes_two_multipliers(make_lane: Callable[[], Any], tmp_path: Path) -> None:
    found = cells(make_lane(), tmp_path)
    assert found["MULT18X18D"] == 2
    assert found["LUT4"] + 2 * found["CCU2C"] <= 360


def test_post_unit_of_small(tmp_path: Path) -> None:
    found = cells(PostUnit(get_arch("small"), technology="ecp5"), tmp_path)
    assert found["MULT18X18D"] == 2 * get_arch("small").post_lanes
    assert found["DP16KD"] == 4
    assert found["TRELLIS_DPR16X4"] <= 72
    assert found["LUT4"] + 2 * found["CCU2C"] <= 3260
