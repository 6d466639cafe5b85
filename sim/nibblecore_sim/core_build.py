"""Builds the simulated core, and runs it as a process of its own for :mod:`nibblecore_sim.transport`."""

import hashlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import nibblecore.arch
import nibblecore_hw
from nibblecore.arch.config import ArchConfig
from nibblecore.files import write_atomically
from nibblecore_hw.synth.devices import FpgaDevice

from .build import Build, build_icarus, build_verilator, cache_dir, to_verilog
from .netlist import cell_models, make_netlist

TOP = "simulated_core"
RTL = Path(__file__).parent / "rtl"
# What Yosys writes for Amaranth's zero-width signals, and for multiplexers whose one-hot selects it knows.
GENERATED = ("-Wno-ASCRANGE", "-Wno-CASEOVERLAP")
# Memories and registers without a reset hold random bits at power-up, as on silicon: nothing may depend on them.
POWER_UP = ("--x-initial", "unique")


def core_verilog(arch: ArchConfig, *, spoil_collisions: bool = False) -> Path:
    """Verilog of the core, module ``nibblecore``, as a file in the cache.

    The key is the core's configuration, our sources that describe it and the version of Amaranth: elaborating a large
    array takes longer than simulating a small network. For ``spoil_collisions`` see
    :func:`~nibblecore_hw.verilog.to_verilog`.
    """
    what = [arch.to_dict(), metadata.version("amaranth"), *["spoil_collisions"] * spoil_collisions]
    digest = hashlib.sha256(json.dumps(what).encode())
    for package in (nibblecore.arch, nibblecore_hw):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    path = cache_dir() / "verilog" / f"{digest.hexdigest()[:32]}.v"
    if not path.exists():
        from nibblecore_hw.top import Accelerator

        text = to_verilog(Accelerator(arch), name="nibblecore", spoil_collisions=spoil_collisions)
        write_atomically(path, text.encode())
    return path


def build_core(
    arch: ArchConfig,
    *,
    memory_bytes: int,
    latency: int,
    simulator: str = "verilator",
    waves: bool = False,
    netlist: FpgaDevice | None = None,
) -> Build:
    """The simulator of ``arch`` with its memory model, from the cache where it is there.

    With ``netlist``, of what synthesis for that device made of the core; in Verilator only. Its flip-flops and memories
    hold at power-up what the configuration of the device gives them.
    """
    if netlist is not None and simulator != "verilator":
        raise ValueError(f"netlists run in Verilator only, not in {simulator}")
    parameters = {
        "BUS_BYTES": arch.bus_bytes,
        "ADDR_BITS": arch.addr_bits,
        "MEMORY_BYTES": memory_bytes,
        "LATENCY": latency,
    }
    around = [RTL / "axi_memory.sv", RTL / "simulated_core.sv"]
    if netlist is not None:
        from nibblecore_hw.top import Accelerator

        core = make_netlist(Accelerator(arch, technology=netlist.technology), netlist, name="nibblecore")
        models = cell_models(netlist)
        return build_verilator(
            TOP,
            [*models.sources, core.path, *around],
            parameters=parameters,
            includes=models.includes,
            flags=models.flags,
            optimize=False,
            waves=waves,
        )
    if simulator == "icarus":
        # Which knows unknown values: who uses a word that was read while it was written spreads them.
        spoilt = core_verilog(arch, spoil_collisions=True)
        return build_icarus(TOP, [spoilt, *around], parameters=parameters, waves=waves)
    sources = [core_verilog(arch), *around]
    return build_verilator(TOP, sources, parameters=parameters, flags=(*GENERATED, *POWER_UP), waves=waves)


def serve_command(build: Build, folder: Path, power_up: int) -> list[str]:
    """Command line of the process that runs ``build`` in ``folder`` and serves a host; ``power_up`` is a seed."""
    values: dict[str, Any] = {k: os.fspath(v) if isinstance(v, Path) else v for k, v in vars(build).items()}
    return [sys.executable, "-m", "nibblecore_sim.core_build", json.dumps(values), str(folder), str(power_up)]


def main() -> None:
    values, folder, power_up = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    paths: dict[str, Any] = {name: Path(values[name]) for name in ("directory", "executable")}
    build = Build(**{**values, **paths})
    random_bits = ("+verilator+rand+reset+2", f"+verilator+seed+{power_up}")
    build.run("nibblecore_sim.tb.tb_transport", directory=folder, waves=build.waves, plusargs=random_bits)


if __name__ == "__main__":
    main()
