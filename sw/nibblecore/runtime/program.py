"""The program: a file that explains itself, and its loader, which checks everything before anything runs.

The container is a safetensors file: two byte tensors, ``instructions`` and ``constants``, and one metadata entry,
``nibblecore``, with a JSON object: versions, the ArchConfig and its hash, regions, tensor bindings, layers, the debug
table and SHA-256 checksums. Loading executes no code.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors
from safetensors.numpy import save as safetensors_save

from ..arch.config import ArchConfig
from ..arch.isa import ISA_VERSION, Instruction, Region, from_bytes, to_bytes
from ..errors import ConfigError, EncodingError, ProgramError
from ..files import write_atomically
from . import layout

FORMAT_VERSION: Final = 1
_METADATA_KEY: Final = "nibblecore"


@dataclasses.dataclass(frozen=True)
class TensorBinding:
    """Where a tensor lies in DRAM and what its codes mean.

    ``real = scale * (code - zero)``; ``scale`` is a tuple with one step per channel for 32-bit tensors. The layout is
    that of :mod:`nibblecore.runtime.layout`.
    """

    name: str
    region: Region
    offset_words: int
    shape: tuple[int, int, int]
    bits: int
    scale: float | tuple[float, ...]
    zero: int

    def words(self, lanes: int) -> int:
        return layout.tensor_words(self.shape, self.bits, lanes)

    def scales(self) -> npt.NDArray[np.float64]:
        """Steps, shape ``(1 or C, 1, 1)``."""
        return np.asarray(self.scale, np.float64).reshape(-1, 1, 1)

    def quantize(self, real: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Stored codes of a ``(C, H, W)`` tensor of real numbers: nearest, ties towards +inf, clamped to the grid."""
        low, high = -(1 << self.bits - 1), (1 << self.bits - 1) - 1
        codes = np.floor(np.asarray(real, np.float64) / self.scales() + 0.5) + self.zero
        return np.clip(codes, low, high).astype(np.int64)

    def dequantize(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Real numbers of ``(C, H, W)`` stored codes."""
        return (np.asarray(codes, np.float64) - self.zero) * self.scales()


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One layer of the program.

    Parameters
    ----------
    name : str
        Name of the tensor that it writes.
    path : str
        Module path in the user's model.
    op : str
        Kind of operation, for people.
    macs : int
        True multiply-accumulates of one image, padding of channels, taps and tiles excluded.
    nibble_products : int
        1, 2, 2 or 4: products of nibbles that one of these MACs takes at its bit widths.
    """

    name: str
    path: str
    op: str
    macs: int
    nibble_products: int


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A network compiled for one core.

    Parameters
    ----------
    arch : ArchConfig
        The core; the runtime refuses any other.
    name : str
        The network's name.
    instructions : sequence of Instruction
        Contents of the PROGRAM region.
    constants : bytes
        Contents of the CONSTANTS region: weights in the order of use, requantization records.
    region_sizes : mapping of Region to int
        Bytes of every region that the program uses.
    inputs, outputs : sequence of TensorBinding
        What the host writes before and reads after a run.
    tensors : sequence of TensorBinding
        Intermediate tensors that the program also stores, for comparison layer by layer; usually empty.
    layers : sequence of LayerInfo
    debug : sequence of int
        Layer index of each instruction, -1 where it belongs to none.
    predicted_cycles : int
        Cycles of one run by the compiler's cost model.
    """

    arch: ArchConfig
    name: str
    instructions: Sequence[Instruction]
    constants: bytes
    region_sizes: Mapping[Region, int]
    inputs: Sequence[TensorBinding]
    outputs: Sequence[TensorBinding]
    tensors: Sequence[TensorBinding]
    layers: Sequence[LayerInfo]
    debug: Sequence[int]
    predicted_cycles: int = 0

    @property
    def nibble_macs(self) -> int:
        """True MACs of one image, times their nibble products: the numerator of MAC utilization."""
        return sum(layer.macs * layer.nibble_products for layer in self.layers)

    def utilization(self, cycles: int) -> float:
        """MAC utilization of a run that took ``cycles``: true nibble products over what the array could have done."""
        return self.nibble_macs / (cycles * self.arch.macs_per_cycle)

    def replace(self, **changes: Any) -> "Program":
        return dataclasses.replace(self, **changes)

    # File ------------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The file's contents; the same program gives the same bytes."""
        blobs = {"instructions": to_bytes(self.instructions), "constants": self.constants}
        sums = {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()}
        metadata: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "isa_version": ISA_VERSION,
            "arch": self.arch.to_dict(),
            "arch_hash": self.arch.hash,
            "name": self.name,
            "regions": {region.name: self.region_sizes[region] for region in sorted(self.region_sizes)},
            "inputs": [_binding_to_json(b) for b in self.inputs],
            "outputs": [_binding_to_json(b) for b in self.outputs],
            "tensors": [_binding_to_json(b) for b in self.tensors],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "debug": list(self.debug),
            "predicted_cycles": self.predicted_cycles,
            "sha256": sums,
        }
        sums["metadata"] = _metadata_digest(metadata)
        text = json.dumps(metadata, sort_keys=True)
        return safetensors_save({k: np.frombuffer(b, np.uint8) for k, b in blobs.items()}, {_METADATA_KEY: text})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; under its name it is either the old one or complete."""
        write_atomically(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Program":
        """Read and check a program file. Raises :class:`ProgramError` that says what is wrong with which file."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ProgramError(f"{path}: cannot be read: {error.strerror}") from None
        return cls.from_bytes(data, source=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "program") -> "Program":
        """Rebuild from :meth:`to_bytes`, checked like :meth:`load`."""
        blobs, metadata = _open_container(data, source)
        _check_versions(metadata, source)
        _check_sums(blobs, metadata, source)
        try:
            return cls._rebuild(blobs, metadata)
        except (ConfigError, EncodingError, ProgramError) as error:
            raise ProgramError(f"{source}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise ProgramError(f"{source}: the metadata is not that of a program ({error!r})") from None

    @classmethod
    def _rebuild(cls, blobs: dict[str, bytes], metadata: dict[str, Any]) -> "Program":
        arch = ArchConfig.from_dict(metadata["arch"])
        if arch.hash != metadata["arch_hash"]:
            raise ProgramError(
                f"the hash of its ArchConfig is {arch.hash:#010x}, not {metadata['arch_hash']:#010x}; "
                f"compile the network again"
            )
        program = cls(
            arch=arch,
            name=metadata["name"],
            instructions=from_bytes(blobs["instructions"]),
            constants=blobs["constants"],
            region_sizes={Region[name]: size for name, size in metadata["regions"].items()},
            inputs=[_binding_from_json(b) for b in metadata["inputs"]],
            outputs=[_binding_from_json(b) for b in metadata["outputs"]],
            tensors=[_binding_from_json(b) for b in metadata["tensors"]],
            layers=[LayerInfo(**layer) for layer in metadata["layers"]],
            debug=metadata["debug"],
            predicted_cycles=metadata["predicted_cycles"],
        )
        program.check()
        return program

    def check(self) -> None:
        """Raise :class:`ProgramError` unless regions, bindings and debug table fit each other."""
        sizes = self.region_sizes
        for region, size in (
            (Region.PROGRAM, len(to_bytes(self.instructions))),
            (Region.CONSTANTS, len(self.constants)),
        ):
            if sizes.get(region, 0) < size:
                raise ProgramError(f"region {region.name} has {sizes.get(region, 0)} bytes, its contents {size}")
        for binding in (*self.inputs, *self.outputs, *self.tensors):
            end = (binding.offset_words + binding.words(self.arch.lanes)) * self.arch.word_bytes
            if end > sizes.get(binding.region, 0):
                raise ProgramError(
                    f"tensor {binding.name!r} ends at byte {end} of region {binding.region.name}, "
                    f"which has {sizes.get(binding.region, 0)}"
                )
        if len(self.debug) != len(self.instructions):
            raise ProgramError(
                f"the debug table has {len(self.debug)} entries for {len(self.instructions)} instructions"
            )
        for index, layer in enumerate(self.debug):
            if not -1 <= layer < len(self.layers):
                raise ProgramError(f"instruction {index} belongs to layer {layer}, of {len(self.layers)}")


def _binding_to_json(binding: TensorBinding) -> dict[str, Any]:
    values = dataclasses.asdict(binding)
    values["region"] = binding.region.name
    return values


def _binding_from_json(values: dict[str, Any]) -> TensorBinding:
    scale = values["scale"]
    channels, height, width = values["shape"]
    return TensorBinding(
        **{
            **values,
            "region": Region[values["region"]],
            "shape": (channels, height, width),
            "scale": tuple(scale) if isinstance(scale, list) else scale,
        }
    )


def _metadata_digest(metadata: dict[str, Any]) -> str:
    """Digest of all metadata but the digest itself."""
    rest = {**metadata, "sha256": {k: v for k, v in metadata["sha256"].items() if k != "metadata"}}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _open_container(data: bytes, source: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    try:
        blobs = {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(data)}
        header_length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_length])
    except (safetensors.SafetensorError, ValueError) as error:
        raise ProgramError(f"{source}: is not a program file, or is truncated ({error})") from None
    text = header.get("__metadata__", {}).get(_METADATA_KEY)
    if text is None or set(blobs) != {"instructions", "constants"}:
        raise ProgramError(
            f"{source}: is a safetensors file, but not a nibblecore program",
            hint="Give the file that `nibblecore compile` writes.",
        )
    try:
        metadata = json.loads(text)
    except ValueError:
        raise ProgramError(f"{source}: the program's metadata is damaged") from None
    if not isinstance(metadata, dict):
        raise ProgramError(f"{source}: the program's metadata is damaged")
    return blobs, metadata


def _check_versions(metadata: dict[str, Any], source: str) -> None:
    for key, ours, what in (("format_version", FORMAT_VERSION, "file format"), ("isa_version", ISA_VERSION, "ISA")):
        theirs = metadata.get(key)
        if not isinstance(theirs, int):
            raise ProgramError(f"{source}: the metadata names no {key}")
        if theirs > ours:
            raise ProgramError(
                f"{source}: {what} version {theirs} is newer than this nibblecore's {ours}",
                hint="Update nibblecore, or compile the network with this version.",
            )
        if theirs < ours:
            raise ProgramError(
                f"{source}: {what} version {theirs} is older than this nibblecore's {ours}",
                hint="Compile the network again.",
            )


def _check_sums(blobs: dict[str, bytes], metadata: dict[str, Any], source: str) -> None:
    sums = metadata.get("sha256")
    if not isinstance(sums, dict):
        raise ProgramError(f"{source}: the metadata holds no checksums")
    actual = {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()}
    actual["metadata"] = _metadata_digest(metadata)
    for name, digest in actual.items():
        if sums.get(name) != digest:
            raise ProgramError(
                f"{source}: the checksum of its {name} is wrong; the file was damaged or altered",
                hint="Compile the network again.",
            )
