"""The generated Verilog of arrays with multipliers, carry cells and LUT RAM, in Verilator with ``ecp5_models.v``."""

import json
from pathlib import Path

import pytest

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.elements import element_timing, tile_cycles
from nibblecore_hw.core import elements
from nibblecore_hw.core.array import SystolicArray
from nibblecore_sim.build import build_verilator, to_verilog

pytestmark = pytest.mark.cosim

BENCH = Path(__file__).with_name("bench_array.py")
MODELS = Path(elements.__path__[0]) / "ecp5_models.v"


@pytest.mark.parametrize(
    "arch",
    [
        ArchConfig(name="dsp", lanes=8, columns=8, post_lanes=2, element="dsp"),
        ArchConfig(name="tables", lanes=8, columns=8, post_lanes=2, element="lutram2"),
        ArchConfig(name="one_table", lanes=8, columns=8, post_lanes=2, element="lutram"),
        ArchConfig(name="mix", lanes=4, columns=16, post_lanes=4, element="bitplane", dsp_columns=8),
    ],
    ids=lambda arch: arch.name,
)
def test_random_passes(tmp_path: Path, arch: ArchConfig) -> None:
    array = SystolicArray(arch, technology="ecp5")
    source = tmp_path / "array.v"
    source.write_text(to_verilog(array, name="array"))
    assert ("MULT18X18D" in source.read_text()) == (arch.paired_columns > 0)
    assert "CCU2C" in source.read_text()
    build = build_verilator("array", [source, MODELS])
    setup = {
        "lanes": arch.lanes,
        "columns": arch.columns,
        "latencies": [array.latencies[column // arch.post_lanes] for column in range(arch.columns)],
        "lowest_weight": arch.weight_range[0],
        "highest_weight": arch.weight_range[1],
        "tile_cycles": tile_cycles(arch),
        "fill_columns": element_timing(arch).fill_columns,
        "overlaps": element_timing(arch).overlaps,
        "load_interval": element_timing(arch).load_interval,
        "load_cycles": element_timing(arch).load_cycles,
    }
    build.run(BENCH, directory=tmp_path, env={"NIBBLECORE_ARRAY": json.dumps(setup)})
