# amaranth: UnusedElaboratable=no
"""The systolic array and the accumulators behind it, each against its model and its published timing."""

import itertools
import random
import re
from typing import Any

import pytest

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.elements import element_timing, swap_cycles, tile_cycles
from nibblecore_hw.core.accumulate import AccumulateAdder, Accumulators
from nibblecore_hw.core.array import SystolicArray
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


ARRAYS = {
    "square": config(4, 4, element="generic"),
    "narrow": config(8, 2, post_lanes=1, element="bitplane"),
    "wide": config(4, 8, element="bitplane"),
    "one_group": config(4, 4, post_lanes=4, element="generic"),
    "one_column": config(4, 1, post_lanes=1, element="generic"),
    "dsp": config(4, 4, element="dsp"),
    "dsp_long": config(4, 16, element="dsp"),
    "dsp_wide": config(8, 16, element="dsp", post_lanes=8),
    "mix": config(4, 16, element="bitplane", dsp_columns=8),
    "tables": config(4, 4, element="lutram2"),
    "tables_narrow": config(8, 2, post_lanes=1, element="lutram2"),
    "tables_wide": config(4, 8, post_lanes=4, element="lutram2"),
    "tables_two_groups_at_once": config(8, 32, post_lanes=4, element="lutram2"),
    "tables_all_levels": config(8, 8, post_lanes=4, element="lutram2", adder_levels=1),
    "tables_one_column": config(4, 1, post_lanes=1, element="lutram2"),
    "tables_mix": config(4, 16, element="lutram2", dsp_columns=8),
    "one_table": config(4, 4, element="lutram"),
    "one_table_narrow": config(8, 2, post_lanes=1, element="lutram"),
    "one_table_wide": config(4, 8, post_lanes=4, element="lutram"),
    "one_table_two_groups_at_once": config(8, 32, post_lanes=4, element="lutram"),
    "one_table_one_column": config(4, 1, post_lanes=1, element="lutram"),
    "one_table_mix": config(4, 16, element="lutram", dsp_columns=8),
    "mix_of_many": config(4, 16, element="generic", dsp_columns=12),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("gaps", [False, True])
def test_sums_in_the_documented_cycle_while_the_next_tile_loads(kind: str, gaps: bool) -> None:
    """Passes of exactly ``tile_cycles`` pixels, each with a new tile: the closest that loads and swaps can be.

    Where loading does not overlap, the words that fill tables come right behind the last pixel.

    With ``gaps``, passes of any length, followed by cycles without pixels, and loads that come as late as they may.
    """
    arch = ARRAYS[kind]
    lanes, columns, paired = arch.lanes, arch.columns, arch.paired_columns > 0
    rng = random.Random(f"{kind} {gaps}")
    array, timing = SystolicArray(arch), element_timing(arch)
    passes = 12 if gaps else 6
    low, high = arch.weight_range
    tiles = [[[rng.randint(low, high) for _ in range(lanes)] for _ in range(columns)] for _ in range(passes)]
    tiles[1] = [[rng.choice((low, -1, 0, high)) for _ in range(lanes)] for _ in range(columns)]
    # Per cycle: the column that is loaded, the first pixel of a pass, and the pass whose pixel it is.
    loads: dict[int, tuple[int, int]] = {}
    swaps: set[int] = set()
    pixels: dict[int, int] = {}
    cycle = -1
    for n in range(passes):
        # Loads of tile n begin one cycle after the swap of tile n - 1.
        spare = rng.randrange(6) if gaps else 0
        late = sorted(rng.choices(range(spare + 1), k=columns))
        chosen = [cycle + 1 + column * timing.load_interval + late[column] for column in range(columns)]
        if pixels and not timing.overlaps:
            held = max(0, max(pixels) + 1 - chosen[timing.fill_columns - 1])
            chosen[timing.fill_columns - 1 :] = [slot + held for slot in chosen[timing.fill_columns - 1 :]]
        loads |= {slot: (n, column) for column, slot in enumerate(chosen)}
        cycle = chosen[-1] + timing.load_cycles + (rng.randrange(3) if gaps and rng.random() < 0.5 else 0)
        if pixels and (gaps or paired):
            # Only a cycle that does not count may be cut off from its pair.
            last = max(pixels)
            cycle = max(cycle, last + 1)
            if paired and cycle == last + 1 and (cycle - max(swaps)) % 2:
                cycle += 1
        if pixels and not gaps and not timing.overlaps:
            assert cycle - max(swaps) == swap_cycles(arch, len(pixels) // n)
        swaps.add(cycle)
        length = rng.randint(1, 2 * columns) if gaps else tile_cycles(arch)
        pixels |= {slot: n for slot in range(cycle, cycle + length) if slot == cycle or not gaps or rng.random() < 0.8}
    words = {slot: [rng.choice((-8, 7, rng.randint(-8, 7))) for _ in range(lanes)] for slot in pixels}
    cycles = max(pixels) + max(array.latencies) + 1
    seen: list[list[int]] = []

    async def bench(ctx: Any) -> None:
        for cycle in range(cycles):
            ctx.set(array.load_stb, cycle in loads)
            number, column = loads.get(cycle, (0, rng.randrange(columns)))
            ctx.set(array.column, column)
            ctx.set(array.weights, tiles[number][column])
            ctx.set(array.swap_stb, cycle in swaps)
            ctx.set(array.activations, words.get(cycle, [rng.randint(-8, 7) for _ in range(lanes)]))
            _, _, *sums = await ctx.tick().sample(*(array.sums[n] for n in range(columns)))
            seen.append(sums)

    simulate(array, bench)
    assert not gaps or not paired or any((b - a) % 2 for a, b in itertools.pairwise(sorted(swaps)))
    for slot, number in pixels.items():
        expected = array.model(words[slot], tiles[number])
        for column in range(columns):
            got = seen[slot + array.latencies[column // arch.post_lanes]][column]
            assert got == expected[column], f"cycle {slot}, pass {number}, column {column}"


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


def test_errors() -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('sum_bits must be in 1..24, not 25')}$"):
        Accumulators(config(), sum_bits=25, latencies=[1, 2])
    for latencies in ([0, 1], [1, 2, 3]):
        text = f"latencies must be 2 numbers of at least 1, not {latencies}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            Accumulators(config(), sum_bits=12, latencies=latencies)
    for make in (
        lambda: SystolicArray(config(), technology="gowin"),
        lambda: Accumulators(config(), sum_bits=12, latencies=[1, 2], technology="gowin"),
        lambda: AccumulateAdder(bits=4, technology="gowin"),
    ):
        with pytest.raises(ValueError, match="^technology must be one of generic, ecp5, not 'gowin'$"):
            make()
