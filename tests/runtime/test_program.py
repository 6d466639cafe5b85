import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from nibblecore.arch import isa
from nibblecore.arch.config import get_arch
from nibblecore.arch.isa import Opcode, Region
from nibblecore.errors import ProgramError
from nibblecore.runtime.program import LayerInfo, Program, TensorBinding


def example() -> Program:
    return Program(
        arch=get_arch("small"),
        name="example",
        instructions=[isa.make(Opcode.LOAD, region=3), isa.make(Opcode.END)],
        constants=bytes(range(64)),
        region_sizes={Region.PROGRAM: 64, Region.CONSTANTS: 64, Region.INPUT: 8, Region.OUTPUT: 64},
        inputs=[TensorBinding("image", Region.INPUT, 0, (3, 1, 1), 4, 0.5, -8)],
        outputs=[TensorBinding("logits", Region.OUTPUT, 0, (3, 1, 1), 32, (0.5, 0.25, 0.125), 0)],
        tensors=[],
        layers=[LayerInfo("logits", "head", "conv", 9, 1)],
        debug=[0, -1],
        predicted_cycles=123,
    )


def metadata(program: Program) -> dict[str, Any]:
    data = program.to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["nibblecore"])


def rewritten(program: Program, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The program's file with other metadata, its own checksum made right again."""
    from nibblecore.runtime.program import _metadata_digest

    values = metadata(program)
    change(values)
    if isinstance(values.get("sha256"), dict):
        values["sha256"]["metadata"] = _metadata_digest(values)
    blobs = {"instructions": isa.to_bytes(program.instructions), "constants": program.constants}
    return save({k: np.frombuffer(b, np.uint8) for k, b in blobs.items()}, {"nibblecore": json.dumps(values)})


def test_file_round_trip_and_determinism(tmp_path: Path) -> None:
    program = example()
    path = tmp_path / "deep" / "example.nib"
    program.save(path)
    loaded = Program.load(path)
    assert loaded.to_bytes() == program.to_bytes() == path.read_bytes()
    assert loaded.inputs == program.inputs
    assert loaded.outputs == program.outputs
    assert [p.name for p in path.parent.iterdir()] == ["example.nib"]


def test_quantize_and_dequantize() -> None:
    binding = example().inputs[0]
    codes = binding.quantize(np.array([0.0, 0.25, 100.0]).reshape(3, 1, 1))
    assert codes.reshape(-1).tolist() == [-8, -7, 7]
    assert binding.dequantize(codes).reshape(-1).tolist() == [0.0, 0.5, 7.5]


def set_key(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update(changes)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            set_key(format_version=2),
            (
                "f: file format version 2 is newer than this nibblecore's 1\n"
                "Update nibblecore, or compile the network with this version."
            ),
        ),
        (set_key(isa_version=0), "f: ISA version 0 is older than this nibblecore's 1\nCompile the network again."),
        (set_key(isa_version="1"), "f: the metadata names no isa_version"),
        (set_key(sha256=None), "f: the metadata holds no checksums"),
        (set_key(debug=[0]), "f: the debug table has 1 entries for 2 instructions"),
        (set_key(debug=[0, 1]), "f: instruction 1 belongs to layer 1, of 1"),
        (
            set_key(arch_hash=1),
            (
                f"f: the hash of its ArchConfig is {get_arch('small').hash:#010x}, not 0x00000001; "
                "compile the network again"
            ),
        ),
        (set_key(regions={"PROGRAM": 32}), "f: region PROGRAM has 32 bytes, its contents 64"),
        (
            set_key(regions={"PROGRAM": 64, "CONSTANTS": 64, "INPUT": 8}),
            "f: tensor 'logits' ends at byte 64 of region OUTPUT, which has 0",
        ),
        (set_key(layers=[{"colour": 1}]), None),
        (set_key(arch={"lanes": 16}), "f: missing ArchConfig fields: columns, name"),
    ],
)
def test_altered_metadata_is_refused(change: Callable[[dict[str, Any]], None], text: str | None) -> None:
    with pytest.raises(ProgramError) as caught:
        Program.from_bytes(rewritten(example(), change), source="f")
    if text is None:
        assert str(caught.value).startswith("f: the metadata is not that of a program (")
    else:
        assert str(caught.value) == text


def test_every_single_damaged_byte_is_refused() -> None:
    data = example().to_bytes()
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x41
        with pytest.raises(ProgramError):
            Program.from_bytes(bytes(damaged))


def test_every_truncation_is_refused() -> None:
    data = example().to_bytes()
    for length in range(0, len(data), 11):
        with pytest.raises(ProgramError, match=r"^f: is not a program file, or is truncated \("):
            Program.from_bytes(data[:length], source="f")


def test_altered_instructions_are_named() -> None:
    program = example()
    data = bytearray(program.to_bytes())
    position = bytes(data).index(isa.to_bytes(program.instructions))
    data[position + 31] ^= 1
    with pytest.raises(
        ProgramError, match="^f: the checksum of its instructions is wrong; the file was damaged or altered\n"
    ):
        Program.from_bytes(bytes(data), source="f")


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    foreign = save({"weight": np.zeros(3, np.float32)})
    with pytest.raises(ProgramError, match="^f: is a safetensors file, but not a nibblecore program\n"):
        Program.from_bytes(foreign, source="f")
    with pytest.raises(ProgramError, match=re.escape(f"{tmp_path / 'no'}: cannot be read: No such file or directory")):
        Program.load(tmp_path / "no")


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    example().save(path)
    old = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="^disk full$"):
        example().replace(name="other").save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
