"""cocotb bench of an array: random passes, the loads of the next tile meanwhile and as late as they may be."""

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
    tile_cycles, load_interval, load_cycles = (setup[n] for n in ("tile_cycles", "load_interval", "load_cycles"))
    # Without overlap, from this load on up to the swap, sums mean nothing.
    filling = load_cycles + (columns - setup["fill_columns"]) * load_interval if not setup["overlaps"] else 0
    word = data.ArrayLayout(signed(4), lanes)
    bits = 8 + (lanes - 1).bit_length()
    dut.rst.value = 0
    Clock(dut.clk, 10, unit="ns").start()
    await FallingEdge(dut.clk)
    loaded = tile = [[0] * lanes] * columns
    expected, loads = {}, {}
    cycle = 0
    for number in itertools.count():
        following = [
            random.choices((low, high) if random.random() < 0.3 else range(low, high + 1), k=lanes)
            for _ in range(columns)
        ]
        # Of even length, as pairs want it; the last column is loaded when the next swap just allows it.
        length = tile_cycles + tile_cycles % 2 + 2 * random.randrange(3 if setup["overlaps"] else 20)
        for column, weights in enumerate(following):
            loads[cycle + length - load_cycles - (columns - 1 - column) * load_interval] = column, weights
        for step in range(length):
            swap = number > 0 and step == 0
            if swap:
                tile = loaded
            load = cycle in loads
            index, source = loads.pop(cycle) if load else (random.randrange(columns), tile[0])
            activations = random.choices((-8, 7) if random.random() < 0.3 else range(-8, 8), k=lanes)
            dut.activations.value = word.const(activations).as_bits()
            dut.weights.value = word.const(source).as_bits()
            dut.column.value, dut.load_stb.value, dut.swap_stb.value = index, int(load), int(swap)
            if number and step < length - filling:
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
