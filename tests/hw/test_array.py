# amaranth: UnusedElaboratable=no
"""The systolic array and the accumulators behind it, each against its model and its published timing."""

import random
import re
from typing import Any

import pytest

from nibblecore.arch.config import ArchConfig
from nibblecore_hw.core.accumulate import Accumulators, EitherAdder
from nibblecore_hw.core.array import SystolicArray
from nibblecore_hw.core.elements import GenericDot
from nibblecore_hw.layouts import ACC_READ_LATENCY
from nibblecore_sim.pysim import simulate


def config(lanes: int = 4, columns: int = 4, **changes: Any) -> ArchConfig:
    return ArchConfig(
        **{
            "name": "t",
            "lanes": lanes,
            "columns": columns,
            "post_lanes": 2,
            "acc_depth": 16,
            "act_depth": 256,
            "weight_depth": 256,
        }
        | changes
    )


@pytest.mark.parametrize(
    ("lanes", "columns", "post_lanes", "element"),
    [(4, 4, 2, "generic"), (8, 2, 1, "bitplane"), (4, 8, 2, "bitplane"), (4, 4, 4, "generic"), (4, 1, 1, "generic")],
)
def test_sums_in_the_documented_cycle_while_the_next_tile_loads(
    lanes: int, columns: int, post_lanes: int, element: str
) -> None:
    """Passes of exactly ``columns`` pixels, every one with a new tile: the closest that loads and swaps can be."""
    rng = random.Random(f"{lanes} {columns} {post_lanes} {element}")
    array = SystolicArray(config(lanes, columns, post_lanes=post_lanes, element=element))
    passes = 6
    tiles = [[[rng.randint(-8, 7) for _ in range(lanes)] for _ in range(columns)] for _ in range(passes)]
    words = [[rng.randint(-8, 7) for _ in range(lanes)] for _ in range(passes * columns)]
    groups = columns // post_lanes
    start = columns - 1  # the cycle of the first swap is that of the tile's last load
    cycles = start + passes * columns + array.latency + groups
    seen: list[list[int]] = []

    async def bench(ctx: Any) -> None:
        for cycle in range(cycles):
            # Loads of tile n begin one cycle after the swap of tile n - 1.
            ctx.set(array.load_stb, cycle < passes * columns)
            if cycle < passes * columns:
                ctx.set(array.column, cycle % columns)
                ctx.set(array.weights, tiles[cycle // columns][cycle % columns])
            pixel = cycle - start
            ctx.set(array.swap_stb, 0 <= pixel < len(words) and pixel % columns == 0)
            ctx.set(array.activations, words[pixel] if 0 <= pixel < len(words) else [0] * lanes)
            _, _, *sums = await ctx.tick().sample(*(array.sums[n] for n in range(columns)))
            seen.append(sums)

    simulate(array, bench)
    for pixel, word in enumerate(words):
        expected = array.model(word, tiles[pixel // columns])
        for column in range(columns):
            cycle = start + pixel + array.latency + column // post_lanes
            assert seen[cycle][column] == expected[column], f"pixel {pixel}, column {column}"


@pytest.mark.parametrize("seed", range(3))
def test_accumulators_equal_the_model_at_the_hazard_distance(seed: int) -> None:
    rng = random.Random(seed)
    arch = config(columns=(4, 8, 2)[seed], acc_bits=24 + seed)
    columns, groups = arch.columns, arch.columns // arch.post_lanes
    # Groups may be later than their neighbours by any number of cycles.
    latencies = [1 + 2 * seed + group + 3 * (group >= groups // 2) * (seed % 2) for group in range(groups)]
    dut = Accumulators(arch, sum_bits=12, latencies=latencies)
    acc = [[[0] * columns for _ in range(arch.acc_depth)] for _ in range(2)]
    orders: list[dict[str, int] | None] = []
    sums: list[list[int]] = []
    recent: list[tuple[int, int] | None] = [None] * (dut.HAZARD - 1)
    for n in range(600):
        bank = rng.randrange(2)
        addr = n if n < 2 * arch.acc_depth else rng.randrange(4)
        order = {
            "valid": 1,
            "addr": addr % arch.acc_depth,
            "bank": n // arch.acc_depth % 2 if addr == n else bank,
            "overwrite": int(addr == n or rng.random() < 0.1),
            "shift": rng.randrange(3),
            "end": rng.randrange(2),
        }
        key = order["bank"], order["addr"]
        if (rng.random() < 0.1 and addr != n) or key in recent:
            orders.append(None)
            recent = [*recent[1:], None]
        else:
            orders.append(order)
            recent = [*recent[1:], key]
        # Large sums, so that the accumulators wrap.
        sums.append(
            [
                rng.choice([-2048, 2047, rng.randint(-2048, 2047)]) if rng.random() < 0.5 else 2047
                for _ in range(columns)
            ]
        )
    for order, products in zip(orders, sums, strict=True):
        if order:
            cells = acc[order["bank"]][order["addr"]]
            for column, product in enumerate(products):
                cells[column] = dut.model(
                    cells[column], product, overwrite=bool(order["overwrite"]), shift=order["shift"]
                )
    done: list[int] = []
    assert dut.done_latency == latencies[-1] + 3
    read: list[list[list[int]]] = [[[] for _ in range(arch.acc_depth)] for _ in range(2)]

    async def bench(ctx: Any) -> None:
        for cycle in range(len(orders) + dut.done_latency + 1):
            order = orders[cycle] if cycle < len(orders) else None
            ctx.set(dut.control, order or {"valid": 0, "addr": 3, "bank": 1, "overwrite": 1, "shift": 2, "end": 1})
            for column in range(columns):
                source = cycle - latencies[column // arch.post_lanes]
                if 0 <= source < len(sums):
                    ctx.set(dut.sums[column], sums[source][column])
            _, _, stb = await ctx.tick().sample(dut.done_stb)
            if stb:
                done.append(cycle)
        places = [(bank, addr, group) for bank in range(2) for addr in range(arch.acc_depth) for group in range(groups)]
        for cycle in range(len(places) + ACC_READ_LATENCY):
            ctx.set(dut.read.en, cycle < len(places))
            if cycle < len(places):
                bank, addr, group = places[cycle]
                ctx.set(dut.read.bank, bank)
                ctx.set(dut.read.addr, addr)
                ctx.set(dut.read.group, group)
            _, _, *data = await ctx.tick().sample(*(dut.read.data[n] for n in range(arch.post_lanes)))
            if cycle >= ACC_READ_LATENCY:
                bank, addr, group = places[cycle - ACC_READ_LATENCY]
                read[bank][addr] += data

    simulate(dut, bench)
    assert read == acc, f"seed={seed}"
    assert done == [n + dut.done_latency for n, order in enumerate(orders) if order and order["end"]], f"seed={seed}"


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('sum_bits must be in 1..24, not 25')}$"):
        Accumulators(config(), sum_bits=25, latencies=[1, 2])
    for latencies in ([0, 1], [1, 2, 3]):
        text = f"latencies must be 2 numbers of at least 1, not {latencies}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            Accumulators(config(), sum_bits=12, latencies=latencies)
    for make in (
        lambda: SystolicArray(config(), technology="gowin"),
        lambda: Accumulators(config(), sum_bits=12, latencies=[1, 2], technology="gowin"),
        lambda: EitherAdder(bits=4, technology="gowin"),
    ):
        with pytest.raises(ValueError, match="^technology must be one of generic, ecp5, not 'gowin'$"):
            make()
    monkeypatch.setattr(GenericDot, "load_cycles", 3)
    text = "element 'generic' takes 3 cycles from load to swap, and the timing of the array allows 1"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        SystolicArray(config())
