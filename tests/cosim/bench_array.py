"""cocotb bench of an array with ``dsp`` columns: random passes, the loads of the next tile meanwhile."""

import itertools
import json
import os
import random

import cocotb
from amaranth.hdl import signed
from amaranth.lib import data
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge

from nibblecore_hw.core.elements import DotElement


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def random_passes(dut):
    setup = json.loads(os.environ["NIBBLECORE_ARRAY"])
    lanes, columns, latencies, low, high = (
        setup[name] for name in ("lanes", "columns", "latencies", "lowest_weight", "highest_weight")
    )
    word = data.ArrayLayout(signed(4), lanes)
    bits = 8 + (lanes - 1).bit_length()
    dut.rst.value = 0
    Clock(dut.clk, 10, unit="ns").start()
    await FallingEdge(dut.clk)
    loaded = tile = [[0] * lanes] * columns
    expected = {}
    cycle = 0
    for number in itertools.count():
        following = [
            random.choices((low, high) if random.random() < 0.3 else range(low, high + 1), k=lanes)
            for _ in range(columns)
        ]
        # Of even length, as pairs want it; the last column is loaded in the cycle of the next swap.
        length = columns + 2 * random.randrange(3)
        for step in range(length):
            swap, column = number > 0 and step == 0, step - (length - columns)
            if swap:
                tile = loaded
            # The cycle of the last load is the first one of the next pass.
            load = column >= 1 or swap
            index = column - 1 if column >= 1 else columns - 1
            source = following if column >= 1 else loaded
            activations = random.choices((-8, 7) if random.random() < 0.3 else range(-8, 8), k=lanes)
            dut.activations.value = word.const(activations).as_bits()
            dut.weights.value = word.const(source[index]).as_bits()
            dut.column.value, dut.load_stb.value, dut.swap_stb.value = index, int(load), int(swap)
            if number:
                expected[cycle] = [DotElement.model(activations, weights) for weights in tile]
            await FallingEdge(dut.clk)
            cycle += 1
            seen = dut.sums.value.to_unsigned()
            for column, latency in enumerate(latencies):
                if cycle - latency in expected:
                    got = seen >> bits * column & (1 << bits) - 1
                    want = expected[cycle - latency][column]
                    assert got == want % (1 << bits), f"cycle {cycle}, column {column}"
        loaded = following
        if cycle > 2500:
            return
