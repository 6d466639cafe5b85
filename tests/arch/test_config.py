import re

import pytest

from nibblecore.arch.config import ARCHS, ArchConfig, get_arch
from nibblecore.errors import ConfigError


def config(**changes: object) -> ArchConfig:
    return ArchConfig(**{"name": "t", "lanes": 16, "columns": 16, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lanes": 12}, "lanes must be one of 4, 8, 16, 32, 64, not 12"),
        ({"lanes": True}, "lanes must be an integer, not True"),
        ({"columns": 24}, "columns must be a power of two, not 24"),
        ({"columns": 512}, "columns must be in 1..256, not 512"),
        ({"acc_bits": 16}, "acc_bits must be in 24..32, not 16"),
        ({"post_lanes": 32}, "post_lanes=32 must divide columns=16"),
        ({"post_lanes": 1}, "post_lanes must be in lanes/8..lanes, with lanes=16 in 2..16, not 1"),
        ({"lanes": 4, "post_lanes": 8}, "post_lanes must be in lanes/8..lanes, with lanes=4 in 1..4, not 8"),
        ({"act_depth": 32, "act_banks": 4}, "act_depth=32 leaves fewer than 16 words in each of 4 banks"),
        (
            {"weight_depth": 32},
            (
                "weight_depth=32 cannot hold two tiles of 16 words and their 16 words of requantization records; "
                "at least 64"
            ),
        ),
        ({"bus_bits": 512, "burst_beats": 128}, "burst_beats=128 of 512 bits exceed the 4096 bytes of an AXI burst"),
        (
            {"bus_bits": 32, "burst_beats": 1},
            "burst_beats=1 is less than the 2 beats of 32 bits that a word of 64 bits takes",
        ),
        ({"element": "magic"}, "element must be one of generic, bitplane, lutram, lutram2, dsp, not 'magic'"),
        ({"adder_levels": 0}, "adder_levels must be in 1..4, not 0"),
        ({"dsp_columns": True}, "dsp_columns must be an integer, not True"),
        ({"dsp_columns": 12}, "dsp_columns must be a multiple of 2 * post_lanes = 8 below columns=16, not 12"),
        ({"dsp_columns": -8}, "dsp_columns must be a multiple of 2 * post_lanes = 8 below columns=16, not -8"),
        ({"dsp_columns": 16}, "dsp_columns must be a multiple of 2 * post_lanes = 8 below columns=16, not 16"),
        (
            {"element": "dsp", "dsp_columns": 8},
            "dsp_columns must be 0 where element is 'dsp', because then all columns are, not 8",
        ),
        (
            {"element": "dsp", "post_lanes": 16},
            (
                "dsp elements serve two columns of each of two groups: post_lanes must be in 2..columns/2, with "
                "columns=16 in 2..8, not 16"
            ),
        ),
        (
            {"queue_depth": 0, "element": "generic"},
            "queue_depth=0 finishes one column at a time: post_lanes must be 1, not 4",
        ),
        (
            {"queue_depth": 0, "lanes": 8, "columns": 8, "bus_bits": 32, "post_lanes": 1, "element": "bitplane"},
            (
                "queue_depth=0 has one element, which computes column after column: element must be 'generic', not "
                "'bitplane', dsp_columns 0, not 0, and columns at least 2, not 8"
            ),
        ),
        ({"queue_depth": 1}, "queue_depth must be 0 or a power of two in 2..64, not 1"),
        (
            {"queue_depth": 0, "bus_bits": 32, "burst_beats": 4},
            (
                "queue_depth=0 moves a word per beat and an instruction per burst: bus_bits must be 64, not 32, and "
                "burst_beats at least 4, not 4"
            ),
        ),
        ({"act_memory": "quad"}, "act_memory must be one of dual, single, not 'quad'"),
    ],
)
def test_bad_value_is_named(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        config(**changes)


def test_unknown_core_lists_the_names() -> None:
    with pytest.raises(ConfigError, match="^there is no core 'huge'; the named cores are tiny, small, large, xlarge$"):
        get_arch("huge")


@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_dict_round_trip(arch: ArchConfig) -> None:
    assert ArchConfig.from_dict(arch.to_dict()) == arch


def test_from_dict_names_unknown_and_missing_fields() -> None:
    with pytest.raises(ConfigError, match="^unknown ArchConfig fields: colour, size$"):
        ArchConfig.from_dict({**get_arch("small").to_dict(), "size": 1, "colour": 2})
    with pytest.raises(ConfigError, match="^missing ArchConfig fields: lanes, name$"):
        ArchConfig.from_dict({"columns": 4})


def test_hash_ignores_what_programs_do_not_see() -> None:
    base = config(element="generic")
    assert base.hash == base.replace(name="other", element="bitplane", adder_levels=1).hash
    assert base.hash != base.replace(act_depth=8192).hash
    assert base.differences(base.replace(act_depth=8192, bus_bits=128)) == [
        "act_depth: 4096, not 8192",
        "bus_bits: 64, not 128",
    ]


def test_dsp_columns_narrow_the_weights_of_all() -> None:
    mix = config(element="bitplane", dsp_columns=8)
    assert (mix.weight_range, mix.paired_columns) == ((-7, 7), 8)
    assert config(element="dsp").paired_columns == 16
    assert config(element="dsp").hash == mix.hash != config(element="bitplane").hash
    assert mix.differences(config(element="bitplane")) == ["weight_range: [-7, 7], not [-8, 7]"]


@pytest.mark.parametrize(
    ("lanes", "columns", "bricks", "parts", "params"),
    [(16, 16, 1, 1, 16), (8, 4, 1, 2, 8), (32, 64, 2, 1, 32), (32, 32, 1, 1, 16)],
)
def test_derived_sizes(lanes: int, columns: int, bricks: int, parts: int, params: int) -> None:
    arch = config(lanes=lanes, columns=columns)
    assert (arch.bricks_per_tile, arch.parts_per_brick, arch.param_words) == (bricks, parts, params)
    assert arch.word_bits == 4 * lanes
    assert arch.macs_per_cycle == lanes * columns
