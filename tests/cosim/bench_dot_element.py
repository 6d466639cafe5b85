"""cocotb bench of a processing element: random streams against the element's own model."""

import os
import random

import cocotb
from amaranth.hdl import signed
from amaranth.lib import data
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge

from nibblecore_hw.core.elements import DotElement


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def random_stream(dut):
    lanes, latency = int(os.environ["NIBBLECORE_LANES"]), int(os.environ["NIBBLECORE_LATENCY"])
    word = data.ArrayLayout(signed(4), lanes)
    dut.rst.value = 0
    Clock(dut.clk, 10, unit="ns").start()
    await FallingEdge(dut.clk)
    active = shadow = [0] * lanes
    expected = []
    for cycle in range(3000):
        # Rare strobes in one part, dense ones in the next.
        often = 0.1 if cycle % 400 < 200 else 0.7
        load, swap = random.random() < often, random.random() < often
        activations, weights = (
            random.choices((-8, 7) if random.random() < 0.3 else range(-8, 8), k=lanes) for _ in range(2)
        )
        dut.activations.value = word.const(activations).as_bits()
        dut.weights.value = word.const(weights).as_bits()
        dut.load_stb.value, dut.swap_stb.value = int(load), int(swap)
        if swap:
            active = shadow
        if load:
            shadow = weights
        expected.append(DotElement.model(activations, active))
        await FallingEdge(dut.clk)
        if cycle >= latency - 1:
            assert dut.sum.value.to_signed() == expected[cycle - latency + 1], f"cycle {cycle}"
