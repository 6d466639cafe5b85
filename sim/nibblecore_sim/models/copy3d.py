"""Python model of LOAD and STORE: which word goes where, and random instructions to try."""

from __future__ import annotations

import random

from nibblecore.arch import isa
from nibblecore.arch.isa import LOCAL_ADDR_BITS, Instruction, Opcode

__all__ = ["copied_words", "random_copy"]


def copied_words(copy: Instruction) -> list[tuple[int, int]]:
    """(buffer address modulo 2**16, DRAM word in the region) of each word that a LOAD or STORE copies, in order."""
    return [
        (
            (copy["local_addr"] + p * copy["local_step2"] + r * copy["local_step1"] + w) % (1 << LOCAL_ADDR_BITS),
            copy["dram_addr"] + p * copy["dram_step2"] + r * copy["dram_step1"] + w,
        )
        for p in range(copy["count2"])
        for r in range(copy["count1"])
        for w in range(copy["count0"])
    ]


def random_copy(
    rng: random.Random, opcode: Opcode, *, words: int, region: int, longest: int = 24, least: int = 0
) -> Instruction:
    """A random LOAD or STORE of rows of at most ``longest`` words, which stays within ``words`` words of its region.

    With ``least``, it reaches DRAM word ``least`` or beyond. Rows and planes may overlap on both sides.
    """
    while True:
        fields = {
            "count0": rng.choice([1, 2, rng.randint(1, longest)]),
            "count1": rng.randint(1, 4),
            "count2": rng.randint(1, 3),
            "dram_addr": rng.randrange(words),
            "dram_step1": rng.randint(0, 60),
            "dram_step2": rng.randint(0, 200),
            "local_addr": rng.getrandbits(LOCAL_ADDR_BITS),
            "local_step1": rng.randint(-100, 100),
            "local_step2": rng.randint(-32768, 32767),
        }
        if opcode is Opcode.LOAD:
            fields["target"] = rng.getrandbits(1)
        instruction = isa.make(opcode, wait=(), signal=(), region=region, **fields)
        if least <= max(dram for _, dram in copied_words(instruction)) < words:
            return instruction
