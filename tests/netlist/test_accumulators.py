# amaranth: UnusedElaboratable=no
"""Accumulators after synthesis: one bank is added to at the hazard distance while the other one is read."""

import random
from typing import Any

import pytest

from nibblecore_hw.core.accumulate import control_layout
from nibblecore_hw.layouts import ACC_READ_LATENCY

pytestmark = pytest.mark.cosim

PHASES, PIXELS = 8, 300


@pytest.mark.parametrize("seed", range(2))
def test_accumulators(bench: Any, seed: int) -> None:
    dut, rng = bench.component("accumulators"), random.Random(seed)
    arch, latencies = dut._arch, dut._latencies
    lanes, groups = arch.post_lanes, arch.columns // arch.post_lanes
    layout, sum_bits = control_layout(arch), dut.sums.shape().elem_shape.width
    bits = arch.acc_bits
    acc = [[[0] * arch.columns for _ in range(arch.acc_depth)] for _ in range(2)]
    length = PHASES * (PIXELS + dut.done_latency)
    orders: list[dict[str, int]] = []
    sums: list[list[int]] = []
    reads: list[dict[str, int]] = []
    wanted: list[tuple[int, list[int]]] = []
    wrapped = 0
    for cycle in range(length):
        phase, n = divmod(cycle, PIXELS + dut.done_latency)
        first, bank = n < arch.acc_depth and phase < 2, phase % 2
        order = {
            "valid": int(first or (n < PIXELS and rng.random() < 0.9)),
            "addr": n if first else rng.choice((rng.randrange(5), rng.randrange(arch.acc_depth))),
            "bank": bank,
            "overwrite": int(first or rng.random() < 0.1),
            "shift": rng.randrange(3),
            "end": rng.randrange(2),
        }
        # The closest that two sums for one accumulator may be.
        near = [(o["bank"], o["addr"]) for o in orders[max(cycle - dut.HAZARD + 1, 0) :] if o["valid"]]
        if (bank, order["addr"]) in near:
            order["valid"] = 0
        orders.append(order)
        extremes = (-1 << sum_bits - 1, (1 << sum_bits - 1) - 1)
        sums.append([rng.choice((extremes[1], *extremes, rng.randint(*extremes))) for _ in range(arch.columns)])
        if order["valid"]:
            cells = acc[bank][order["addr"]]
            for column, product in enumerate(sums[-1]):
                what = {"overwrite": bool(order["overwrite"]), "shift": order["shift"]}
                before, cells[column] = cells[column], dut.model(cells[column], product, **what)
                wrapped += abs(before - cells[column]) > 1 << bits - 1
        # Of the bank that nothing is added to; where nobody asks, the port shows anything, the same word included.
        asks = phase >= 1 and n < PIXELS and rng.random() < 0.8
        read = {"bank": 1 - bank if asks else rng.randrange(2), "addr": rng.randrange(arch.acc_depth),
                "group": rng.randrange(groups), "en": int(asks)}  # fmt: skip
        reads.append({f"read__{name}": value for name, value in read.items()})
        if asks:
            low = read["group"] * lanes
            wanted.append((cycle + ACC_READ_LATENCY, acc[read["bank"]][read["addr"]][low : low + lanes]))
    rows: list[dict[str, int]] = []
    for cycle, (order, read) in enumerate(zip(orders, reads, strict=True)):
        word = 0
        for column in range(arch.columns):
            source = max(cycle - latencies[column // lanes], 0)
            word |= (sums[source][column] & (1 << sum_bits) - 1) << column * sum_bits
        rows.append({"control": layout.const(order).as_bits(), "sums": word, **read})
    outputs = bench.play("accumulators", [*rows, *[{}] * ACC_READ_LATENCY])
    for cycle, want in wanted:
        got = outputs[cycle]["read__data"]
        assert got == sum((value & (1 << bits) - 1) << bits * n for n, value in enumerate(want)), f"{seed=} {cycle=}"
    done = [cycle for cycle, row in enumerate(outputs) if row["done_stb"]]
    assert done == [n + dut.done_latency for n, o in enumerate(orders) if o["valid"] and o["end"]], f"{seed=}"
    pairs = sum(
        a["valid"] and b["valid"] and (a["bank"], a["addr"]) == (b["bank"], b["addr"])
        for a, b in zip(orders, orders[dut.HAZARD :], strict=False)
    )
    assert pairs > 50
    assert wrapped > 10
    assert len(wanted) > 1000
    if bench.device.family == "ecp5":
        # Two memories of each group, of 36 and of 12 bits.
        assert bench.player.netlists["accumulators"].cells["DP16KD"] == 4 * groups
