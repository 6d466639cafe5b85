"""The generated Verilog of the element with carry cells, in Verilator with the models of ``ecp5_models.v``."""

from pathlib import Path

import pytest

from nibblecore_hw.core import elements
from nibblecore_hw.core.elements import BitplaneDot
from nibblecore_sim.build import build_verilator, to_verilog

pytestmark = pytest.mark.cosim

BENCH = Path(__file__).with_name("bench_dot_element.py")
MODELS = Path(elements.__path__[0]) / "ecp5_models.v"


def test_random_stream(tmp_path):
    element = BitplaneDot(lanes=8, technology="ecp5")
    source = tmp_path / "dot.v"
    source.write_text(to_verilog(element, name="dot"))
    assert "CCU2C" in source.read_text()
    build = build_verilator("dot", [source, MODELS])
    build.run(
        BENCH,
        directory=tmp_path,
        env={"NIBBLECORE_LANES": str(element.lanes), "NIBBLECORE_LATENCY": str(element.latency)},
    )
