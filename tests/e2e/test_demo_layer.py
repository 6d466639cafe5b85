"""The figures that the README states for one layer, kept true."""

import numpy as np
import pytest

from nibblecore.arch.config import get_arch
from nibblecore.compiler.pipeline import compile_graph
from nibblecore.ir.interpret import run as interpret
from nibblecore.ir.random_graph import GraphBuilder
from nibblecore.runtime.device import Device
from nibblecore_sim.transport import SimTransport


@pytest.mark.cosim
def test_layer_fills_the_array_of_small() -> None:
    """3x3, 64 to 64 channels, 16x16 pixels: at least 85 % of the MACs, DMA included; predicted within 5 %."""
    builder = GraphBuilder(np.random.default_rng(1), (64, 16, 16), bits=4)
    graph = builder.finish(builder.conv(builder.input, 64, weight_bits=4, bits=4))
    program = compile_graph(graph, get_arch("small"))
    codes = np.random.default_rng(1).integers(-8, 8, (64, 16, 16))
    with SimTransport(program.arch) as rtl:
        device = Device(rtl)
        device.load(program)
        result = device.run(codes)
    want = interpret(graph, {program.inputs[0].name: codes[None]})
    for name, got in result.outputs.items():
        assert (got == want[name][0]).all()
    assert result.cycles is not None
    # The simulation counts the same from outside, but for the cycles around start and interrupt.
    assert result.elapsed is not None
    assert abs(result.elapsed - result.cycles) <= 20
    assert program.utilization(result.cycles) >= 0.85
    assert abs(program.predicted_cycles / result.cycles - 1) <= 0.05
