"""cocotb bench of the load and store DMA with the activation buffer between them (``tests/cosim/test_dma.py``)."""

import os
import random
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, RisingEdge

from nibblecore.arch import isa
from nibblecore.arch.isa import Instruction, LoadTarget, Opcode

from ..models.axi_ram import RandomAxiRam
from ..models.copy3d import copied_words, random_copy

SIZE = 1 << 15
SOURCE, SINK = 2, 5


class Tb:
    """Starts the clock, sets two regions, sends instructions and waits for their ends."""

    def __init__(self, dut: Any, *, seed: int, stall: float) -> None:
        self.dut = dut
        self.word_bytes = int(os.environ["NIBBLECORE_WORD_BYTES"])
        # Bases below a 4 KiB boundary that are multiples of the word only.
        self.bases = {SOURCE: 4096 - self.word_bytes, SINK: 20480 - 3 * self.word_bytes}
        self.size = 8000
        self.ram = RandomAxiRam(dut, read="load_bus", write="store_bus", size=SIZE, seed=seed, stall=stall)
        self.done = {"load": 0, "store": 0}

    async def start(self) -> None:
        dut = self.dut
        dut.load_command__valid.value = dut.store_command__valid.value = 0
        dut.regions.value = sum(base + (self.size << 32) << 64 * region for region, base in self.bases.items())
        dut.rst.value = 1
        Clock(dut.clk, 10, unit="ns").start()
        for _ in range(3):
            await FallingEdge(dut.clk)
        dut.rst.value = 0
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        while True:
            await FallingEdge(self.dut.clk)
            assert self.dut.error_stb.value == 0, "an engine reports an error"
            for engine in self.done:
                self.done[engine] += int(getattr(self.dut, f"{engine}_done_stb").value)

    async def execute(self, engine: str, instructions: list[Instruction]) -> None:
        """Send instructions as fast as the engine takes them, and wait until all have ended."""
        goal = self.done[engine] + len(instructions)
        payload, valid, ready = (getattr(self.dut, f"{engine}_command__{n}") for n in ("payload", "valid", "ready"))
        for instruction in instructions:
            payload.value, valid.value = isa.encode(instruction), 1
            await RisingEdge(self.dut.clk)
            while ready.value != 1:
                await RisingEdge(self.dut.clk)
        valid.value = 0
        while self.done[engine] < goal:
            await RisingEdge(self.dut.clk)


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(stall=[0.0, 0.5])
async def copies_through_the_buffer(dut: Any, stall: float) -> None:
    """Rounds of random LOADs, then random STOREs; at the end the whole memory must be what a Python model says."""
    seed = cocotb.RANDOM_SEED
    rng = random.Random(seed)
    tb = Tb(dut, seed=seed, stall=stall)
    await tb.start()
    expected = tb.ram.contents()
    buffer = [bytes(tb.word_bytes)] * int(os.environ["NIBBLECORE_ACT_DEPTH"])
    words = tb.size // tb.word_bytes
    # What benches before have left in the buffer is unknown: one LOAD of everything comes first.
    fill = isa.make(Opcode.LOAD, region=SOURCE, count0=len(buffer))
    await tb.execute("load", [fill])
    for local, dram in copied_words(fill):
        where = tb.bases[SOURCE] + dram * tb.word_bytes
        buffer[local] = bytes(expected[where : where + tb.word_bytes])
    for _ in range(3):
        loads = [copy for copy in (random_copy(rng, Opcode.LOAD, words=words, region=SOURCE) for _ in range(8))
                 if copy["target"] == LoadTarget.ACTIVATIONS]  # fmt: skip
        stores = [random_copy(rng, Opcode.STORE, words=words, region=SINK) for _ in range(4)]
        await tb.execute("load", loads)
        await tb.execute("store", stores)
        for load in loads:
            for local, dram in copied_words(load):
                where = tb.bases[SOURCE] + dram * tb.word_bytes
                buffer[local % len(buffer)] = bytes(expected[where : where + tb.word_bytes])
        for store in stores:
            for local, dram in copied_words(store):
                where = tb.bases[SINK] + dram * tb.word_bytes
                expected[where : where + tb.word_bytes] = buffer[local % len(buffer)]
    assert tb.ram.contents() == expected, f"seed {seed}"
