"""cocotb bench of the multiply-accumulate component in test_build.py."""

import os
import random

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge


async def _start(dut):
    for port in (dut.en, dut.a, dut.b):
        port.value = 0
    dut.rst.value = 1
    Clock(dut.clk, 10, unit="ns").start()
    for _ in range(2):
        await FallingEdge(dut.clk)
    dut.rst.value = 0


@cocotb.test(timeout_time=100, timeout_unit="us")
@cocotb.parametrize(length=[1, 64])
async def dot_product(dut, length):
    await _start(dut)
    total = 0
    for _ in range(length):
        a, b = random.randint(-8, 7), random.randint(-8, 7)
        dut.a.value, dut.b.value, dut.en.value = a, b, 1
        total += a * b
        await FallingEdge(dut.clk)
    dut.en.value = 0
    await FallingEdge(dut.clk)
    assert dut.acc.value.to_signed() == total


@cocotb.test(timeout_time=100, timeout_unit="us", skip="NIBBLECORE_TEST_EXPECT" not in os.environ)
async def environment(dut):
    await _start(dut)
    assert dut.acc.value.to_signed() == int(os.environ["NIBBLECORE_TEST_EXPECT"])


@cocotb.test(timeout_time=100, timeout_unit="us", skip="NIBBLECORE_TEST_INSIDE" not in os.environ)
async def inside(dut):
    await _start(dut)
    assert dut.multiply.product.value.to_signed() == 0
