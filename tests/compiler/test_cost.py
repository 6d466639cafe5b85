"""The cycle model: what engines overlap, what single-port memories cost, and what it refuses."""

import itertools

import pytest

from nibblecore.arch.config import get_arch
from nibblecore.arch.isa import Engine, LoadTarget, Opcode, OutputMode, Region, make
from nibblecore.compiler.cost import CostParameters, simulate, stolen_words, timing, transfer_cycles

ARCH = get_arch("small").replace(element="bitplane")
MAC = make(Opcode.MAC, rows=8, cols=8, bricks=4, kernel_y=3, kernel_x=3, w_step=16)


def test_a_pass_lasts_at_least_a_weight_tile() -> None:
    assert timing(MAC, ARCH).busy == 36 * 64
    assert timing(make(Opcode.MAC, rows=2, cols=2, bricks=4, w_step=16), ARCH).busy == 4 * 16


def test_a_tile_of_tables_takes_longer() -> None:
    tables = ARCH.replace(element="lutram2")
    small = make(Opcode.MAC, rows=2, cols=2, bricks=4, w_step=16)
    assert timing(MAC, tables).busy == timing(MAC, ARCH).busy
    assert timing(small, tables).busy == 4 * 43
    assert timing(small, tables).lead == 43


def test_one_table_is_filled_behind_the_last_pixel() -> None:
    tables = ARCH.replace(element="lutram")
    small = make(Opcode.MAC, rows=2, cols=2, bricks=4, w_step=16)
    assert timing(MAC, tables).busy == 36 * (64 + 68)
    assert timing(small, tables).busy == 4 * 81
    assert timing(small, tables).lead == 81
    # Done when the last pixel is, though no other one may follow at once.
    assert timing(MAC, tables).tail == timing(MAC, ARCH).tail - 68


@pytest.mark.parametrize(("prefetch", "gap"), [(True, 0), (False, 16)])
def test_macs_follow_each_other(prefetch: bool, gap: int) -> None:
    spans = simulate([MAC, MAC, MAC, make(Opcode.END)], ARCH, CostParameters(mac_prefetch=prefetch))
    assert [b.stream - a.stream for a, b in itertools.pairwise(spans[:3])] == [36 * 64 + gap] * 2


def test_transfers_count_beats_and_bursts() -> None:
    assert transfer_cycles(ARCH, 1, 100) == 100
    assert transfer_cycles(ARCH, 10, 1) == 20  # an address every second cycle
    assert transfer_cycles(ARCH.replace(lanes=8, columns=8, bus_bits=32), 1, 100) == 100
    assert transfer_cycles(ARCH.replace(bus_bits=128), 1, 100) == 50


def test_post_is_bound_by_lanes_or_words() -> None:
    fields = {"rows": 4, "cols": 4}
    assert timing(make(Opcode.POST, mode=OutputMode.INT4, **fields), ARCH).busy == 16 * 4
    assert timing(make(Opcode.POST, mode=OutputMode.RAW32, **fields), ARCH).busy == 16 * 8
    wide = ARCH.replace(post_lanes=16)
    assert timing(make(Opcode.POST, mode=OutputMode.INT8, **fields), wide).busy == 16 * 2


def test_single_port_memories_slow_the_array() -> None:
    tiny = get_arch("small").replace(
        lanes=8, columns=4, post_lanes=2, bus_bits=32, act_banks=1, act_memory="single", weight_memory="single"
    )
    load = make(Opcode.LOAD, target=LoadTarget.ACTIVATIONS, region=Region.INPUT, count0=500)
    mac = make(Opcode.MAC, rows=8, cols=8, bricks=8, kernel_y=3, kernel_x=3, w_step=4)
    assert stolen_words(load, tiny, 64) == 500
    assert stolen_words(load, ARCH, 64) == 0
    weights = make(Opcode.LOAD, target=LoadTarget.WEIGHTS, region=Region.CONSTANTS, count0=500)
    assert stolen_words(weights, tiny, 1) == 500
    assert stolen_words(weights, tiny, 40) == 50
    alone, beside = (simulate([*code, make(Opcode.END)], tiny) for code in ([mac], [mac, load]))
    assert beside[0].done - alone[0].done == pytest.approx(500, abs=10)


def test_a_program_out_of_order_is_refused() -> None:
    load, store = make(Opcode.LOAD, signal=[Engine.STORE]), make(Opcode.STORE, wait=[Engine.LOAD])
    with pytest.raises(ValueError, match=r"^instruction 0 waits for LOAD, which nothing earlier signals$"):
        simulate([store, load, make(Opcode.END)], ARCH)
    small = ARCH.replace(semaphore_bits=2)
    with pytest.raises(ValueError, match=r"^instruction 3 overflows the semaphore towards STORE$"):
        simulate([load] * 4 + [store] * 4 + [make(Opcode.END)], small)


def test_without_queues_everything_takes_its_turn() -> None:
    tiny = get_arch("tiny")
    load = make(Opcode.LOAD, target=LoadTarget.ACTIVATIONS, region=Region.INPUT, count0=20, count1=3)
    mac = make(Opcode.MAC, rows=4, cols=5, bricks=2, kernel_y=3, kernel_x=3, w_step=8)
    cost = CostParameters(read_latency=10)
    assert timing(load, tiny, cost).busy == 3 * (20 + 3 * (10 + 3))  # three bursts of at most 8 words to a row
    assert timing(mac, tiny, cost).busy == 18 * 20 * tiny.columns
    spans = simulate([load, mac, load, mac, make(Opcode.END)], tiny, cost)
    assert all(b.start >= a.done + 10 for a, b in itertools.pairwise(spans[:4]))
    assert stolen_words(load, tiny, 64) == 0


def test_records_hold_up_tiles_that_take_more_than_half_of_their_pass() -> None:
    macs = [make(Opcode.MAC, rows=1, cols=n, bricks=36, w_step=16) for n in (16, 24, 32)]
    assert [timing(mac, ARCH).gap for mac in macs] == [ARCH.param_words, 5, 0]
