"""Single instructions of the golden model against direct formulas, and what it refuses."""

import numpy as np
import numpy.typing as npt
import pytest

from nibblecore.arch import isa, numerics
from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Engine, Instruction, Opcode
from nibblecore.arch.regs import ErrorCause, ErrorUnit
from nibblecore.errors import ExecutionError
from nibblecore.golden.model import CoreStopped, GoldenCore, GoldenMemory
from nibblecore.runtime import layout

SHAPES = [(4, 4), (8, 4), (4, 8), (16, 16)]
BASES = {0: 0, 1: 0x1000, 2: 0x4000, 3: 0x8000, 4: 0xC000}
SIZE = 0x1000


def core(lanes: int = 4, columns: int = 4, **changes: object) -> GoldenCore:
    arch = ArchConfig(
        name="t",
        lanes=lanes,
        columns=columns,
        post_lanes=2,
        acc_depth=64,
        act_depth=256,
        weight_depth=256,
        act_banks=1,
        **changes,
    )  # type: ignore[arg-type]
    regions = [(BASES.get(i, 0), SIZE if i in BASES else 0) for i in range(isa.REGIONS)]
    return GoldenCore(arch, GoldenMemory(1 << 16, arch.word_bytes), regions)


def execute(c: GoldenCore, *program: Instruction, seed: int | None = None) -> int:
    c.memory.write(0, isa.to_bytes([*program, isa.make(Opcode.END)]))
    return c.run(seed=seed)


def set_act(c: GoldenCore, nibbles: npt.NDArray[np.integer], at: int = 0) -> None:
    c.act[at : at + len(nibbles)] = nibbles
    c.act_written[at : at + len(nibbles)] = True


def set_weights(c: GoldenCore, nibbles: npt.NDArray[np.integer], at: int = 0) -> None:
    c.weights[at : at + len(nibbles)] = nibbles
    c.weights_written[at : at + len(nibbles)] = True


def record_words(c: GoldenCore, bias: list[int], mult: list[int], shift: list[int]) -> npt.NDArray[np.int8]:
    raw = b"".join(
        (b & 0xFFFFFFFF | (m & 0x3FFFF) << 32 | s << 50).to_bytes(8, "little")
        for b, m, s in zip(bias, mult, shift, strict=True)
    )
    return layout.bytes_to_nibbles(np.frombuffer(raw, np.uint8)).reshape(-1, c.arch.lanes)


@pytest.mark.parametrize(("lanes", "columns"), SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_mac_is_a_convolution(lanes: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    c = core(lanes, columns)
    height, width, bricks, kernel, stride, dilation, pad = 6, 5, 2, (2, 3), 2, 1 + seed % 2, -3
    x = rng.integers(-8, 8, (height, width, bricks, lanes))
    w = rng.integers(-8, 8, (*kernel, bricks, columns, lanes))
    top, left = 1, 2
    rows = (height + 2 * top - dilation * (kernel[0] - 1) - 1) // stride + 1
    cols = (width + 2 * left - dilation * (kernel[1] - 1) - 1) // stride + 1
    set_act(c, x.reshape(-1, lanes), at=20)
    set_weights(c, w.reshape(-1, lanes))
    row_words = width * bricks
    execute(
        c,
        isa.make(
            Opcode.MAC,
            acc_bank=1,
            shift=1,
            w_step=columns,
            x_addr=(20 - top * row_words - left * bricks) & 0xFFFF,
            cols=cols,
            rows=rows,
            bricks=bricks,
            kernel_y=kernel[0],
            kernel_x=kernel[1],
            ox_step=stride * bricks,
            oy_step=stride * row_words,
            brick_step=1,
            kx_step=dilation * bricks,
            ky_step=dilation * row_words,
            x0=-left,
            y0=-top,
            width=width,
            height=height,
            stride_x=stride,
            stride_y=stride,
            dilation_x=dilation,
            dilation_y=dilation,
            pad=pad,
        ),
    )
    padded = np.full((height + 2 * top, width + 2 * left, bricks, lanes), pad)
    padded[top : top + height, left : left + width] = x
    for oy in range(rows):
        for ox in range(cols):
            window = padded[oy * stride :: dilation, ox * stride :: dilation][: kernel[0], : kernel[1]]
            want = 16 * np.einsum("yxbl,yxbcl->c", window, w)
            assert (c.acc[1, oy * cols + ox] == want).all(), f"seed {seed}, pixel {oy},{ox}"


@pytest.mark.parametrize(("lanes", "columns"), SHAPES)
@pytest.mark.parametrize("mode", [isa.OutputMode.INT4, isa.OutputMode.INT8])
@pytest.mark.parametrize("add", [None, 4, 8])
def test_post_requantizes_and_adds(lanes: int, columns: int, mode: isa.OutputMode, add: int | None) -> None:
    rng = np.random.default_rng(7)
    c = core(lanes, columns)
    bricks, parts = c.arch.bricks_per_tile, c.arch.parts_per_brick
    acc = rng.integers(-5000, 5000, (6, columns))
    bias, mult, shift = (rng.integers(lo, hi, columns) for lo, hi in ((-900, 900), (-3000, 3000), (14, 20)))
    c.acc[0, :6], c.acc_written[0, :6] = acc, True
    set_weights(c, record_words(c, bias.tolist(), mult.tolist(), shift.tolist()), at=8)
    b_bits = add or 4
    b = rng.integers(*numerics.code_range(b_bits), (2, 3, bricks * lanes))
    packed = layout.pack(np.moveaxis(b, -1, 0), bits=b_bits, zero=0, lanes=lanes)
    set_act(c, layout.bytes_to_nibbles(packed.reshape(-1, lanes // 2)), at=100)
    out_planes, b_planes = (2 if mode else 1) * bricks, b_bits // 4 * bricks
    program = [
        isa.make(
            Opcode.POST,
            cols=3,
            rows=2,
            p_addr=8,
            out_addr=30,
            out_ox_step=out_planes,
            out_oy_step=3 * out_planes,
            mode=mode,
            bricks=bricks,
            part=part,
            zero=-2,
            low=-120 if add else -8,
            high=120 if add else 7,
            add=bool(add),
            add_wide=b_bits == 8,
            add_addr=100,
            add_ox_step=b_planes,
            add_oy_step=3 * b_planes,
            k_a=500,
            k_b=-700,
            add_shift=10,
            zero_b=3,
            add_zero=-1,
            add_low=-8,
            add_high=6,
        )
        for part in range(parts)
    ]
    execute(c, *program)
    low, high = (-120, 120) if add else (-8, 7)
    q = np.clip(((acc + bias) * mult + (1 << shift - 1) >> shift) - 2, low, high)
    q = np.tile(q, (1, parts)).reshape(2, 3, -1)
    if add:
        q = np.clip(-1 + ((q + 2) * 500 + (b - 3) * -700 + 512 >> 10), -8, 6)
    raw = layout.nibbles_to_bytes(c.act[30 : 30 + 6 * out_planes]).reshape(-1)
    got = layout.unpack(raw, shape=(bricks * lanes, 2, 3), bits=8 if mode else 4, lanes=lanes)
    assert (np.moveaxis(got, 0, -1) == q).all()


@pytest.mark.parametrize(("lanes", "columns"), SHAPES)
def test_post_raw_sums(lanes: int, columns: int) -> None:
    c = core(lanes, columns)
    rng = np.random.default_rng(3)
    acc, bias = rng.integers(-(1 << 23), 1 << 23, (2, columns)), rng.integers(-(1 << 30), 1 << 30, columns)
    c.acc[0, :2], c.acc_written[0, :2] = acc, True
    set_weights(c, record_words(c, bias.tolist(), [1] * columns, [1] * columns))
    step = 8 * c.arch.bricks_per_tile
    execute(
        c,
        *(
            isa.make(Opcode.POST, cols=2, out_ox_step=step, mode=2, bricks=c.arch.bricks_per_tile, part=p)
            for p in range(c.arch.parts_per_brick)
        ),
    )
    raw = layout.nibbles_to_bytes(c.act[: 2 * step]).reshape(-1)
    got = layout.unpack(raw, shape=(c.arch.bricks_per_tile * lanes, 1, 2), bits=32, lanes=lanes)
    assert (np.tile(acc + bias, (1, c.arch.parts_per_brick)) == got[:, 0, :].T).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_pool_skips_taps_outside(bits: int) -> None:
    c = core(4, 4)
    rng = np.random.default_rng(bits)
    planes = bits // 4
    x = rng.integers(*numerics.code_range(bits), (8, 4, 4))
    set_act(c, layout.bytes_to_nibbles(layout.pack(x, bits=bits, zero=0, lanes=4).reshape(-1, 2)), at=10)
    step = 2 * planes
    execute(
        c,
        isa.make(
            Opcode.POOL,
            in_addr=(10 - 5 * step) & 0xFFFF,
            out_addr=100,
            cols=2,
            rows=2,
            bricks=2,
            kernel_x=3,
            kernel_y=3,
            ox_step=2 * step,
            oy_step=8 * step,
            kx_step=step,
            ky_step=4 * step,
            brick_step=planes,
            out_ox_step=step,
            out_oy_step=2 * step,
            x0=-1,
            y0=-1,
            width=4,
            height=4,
            stride_x=2,
            stride_y=2,
            wide=bits == 8,
        ),
    )
    padded = np.full((8, 6, 6), -1000)
    padded[:, 1:5, 1:5] = x
    want = np.array(
        [
            [[padded[k, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max() for j in range(2)] for i in range(2)]
            for k in range(8)
        ]
    )
    raw = layout.nibbles_to_bytes(c.act[100 : 100 + 4 * step]).reshape(-1)
    assert (layout.unpack(raw, shape=(8, 2, 2), bits=bits, lanes=4) == want).all()


def test_dma_moves_planes_of_rows() -> None:
    c = core()
    data = bytes(range(256))
    c.memory.write(BASES[3], data)
    shape = {"count0": 3, "count1": 2, "count2": 2, "dram_step1": 10, "dram_step2": 40}
    execute(
        c,
        isa.make(
            Opcode.LOAD,
            region=3,
            dram_addr=1,
            local_addr=5,
            local_step1=3,
            local_step2=6,
            signal=[Engine.STORE],
            **shape,
        ),
        isa.make(
            Opcode.STORE, region=4, dram_addr=2, local_addr=5, local_step1=3, local_step2=6, wait=[Engine.LOAD], **shape
        ),
    )
    for plane in range(2):
        for row in range(2):
            source = 2 * (1 + plane * 40 + row * 10)
            want = data[source : source + 6]
            assert c.memory.read(BASES[4] + source + 2, 6) == want


@pytest.mark.parametrize("seed", range(5))
def test_engines_run_in_any_legal_order(seed: int) -> None:
    c = core()
    c.memory.write(BASES[3], bytes(8 * 2))
    program = []
    for k in range(8):
        program += [
            isa.make(Opcode.LOAD, region=3, dram_addr=k, local_addr=k, signal=[Engine.STORE]),
            isa.make(Opcode.STORE, region=4, dram_addr=k, local_addr=k, wait=[Engine.LOAD]),
        ]
    assert execute(c, *program, seed=seed) == 16


def run_text(*program: Instruction) -> str:
    with pytest.raises(ExecutionError) as caught:
        execute(core(), *program)
    return str(caught.value)


def test_poison_and_deadlock_are_named() -> None:
    assert run_text(isa.make(Opcode.STORE, region=4, local_addr=9)) == (
        "instruction 0 (store region=4 local_addr=9): reads word 9 of the activation buffer, which nobody has written"
    )
    assert run_text(isa.make(Opcode.LOAD, region=3)).endswith(
        f"reads DRAM word {BASES[3] // 2}, which nobody has written"
    )
    assert run_text(isa.make(Opcode.MAC, cols=2)).endswith(
        "reads word 0 of the activation buffer, which nobody has written"
    )
    assert run_text(isa.make(Opcode.POST, cols=2)).endswith("drains accumulators of bank 0 that nobody has written")
    assert run_text(isa.make(Opcode.MAC, cols=65)).endswith("the tile has 65 pixels, the accumulators hold 64")
    assert run_text(isa.make(Opcode.MAC, wait=[Engine.LOAD])) == (
        "the program deadlocks: MAC at instruction 0 waits for LOAD"
    )


@pytest.mark.parametrize(
    ("instruction", "cause", "unit"),
    [
        (isa.make(Opcode.LOAD, region=3, dram_addr=SIZE // 2), ErrorCause.REGION, ErrorUnit.LOAD),
        (isa.make(Opcode.LOAD, region=7), ErrorCause.REGION, ErrorUnit.LOAD),
    ],
)
def test_core_stops_where_hardware_does(instruction: Instruction, cause: ErrorCause, unit: ErrorUnit) -> None:
    with pytest.raises(CoreStopped) as caught:
        execute(core(), instruction)
    assert (caught.value.cause, caught.value.unit, caught.value.index) == (cause, unit, 0)


def test_illegal_instruction_and_missing_end_stop_fetch() -> None:
    c = core()
    c.memory.write(0, isa.to_bytes([]) + bytes(32))
    with pytest.raises(CoreStopped, match="^instruction 0: there is no opcode 0$") as caught:
        c.run()
    assert caught.value.cause is ErrorCause.ILLEGAL_INSTRUCTION
    c.regions[0] = (0, 0)
    with pytest.raises(CoreStopped, match="^instruction 0 lies outside the program region$"):
        c.run()
