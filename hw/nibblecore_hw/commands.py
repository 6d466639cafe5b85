"""The commands that hardware adds to ``nibblecore``: ``verilog`` and ``synth``."""

import dataclasses
import tempfile
from pathlib import Path

import typer

from nibblecore.arch.config import ArchConfig, get_arch
from nibblecore.cli.console import ARCH_OPTION, ERR, JSON_OPTION, OUT, print_json, require_output_folder, say, table
from nibblecore.errors import ConfigError
from nibblecore.files import write_atomically

ELEMENT_OPTION = typer.Option(
    None, "--element", help="Processing element instead of the core's own: generic, bitplane."
)


def register(app: typer.Typer) -> None:
    """Add the commands; called by ``nibblecore`` when this package is installed."""
    app.command("verilog")(verilog)
    app.command("synth")(synth)


def _arch(name: str, element: str | None) -> ArchConfig:
    arch = get_arch(name)
    return arch if element is None else arch.replace(element=element)


def verilog(
    arch: str = ARCH_OPTION,
    element: str | None = ELEMENT_OPTION,
    output: Path = typer.Option(..., "--output", "-o", help="File to write."),
    module: str = typer.Option("nibblecore", "--module", help="Name of the top module."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Write a core as one Verilog file with conventional AXI names."""
    from .top import Accelerator
    from .verilog import to_verilog

    config = _arch(arch, element)
    path = require_output_folder(output)
    say(f"elaborating {config.name} ({config.lanes}x{config.columns}, {config.element})", quiet=as_json)
    text = to_verilog(Accelerator(config), name=module)
    write_atomically(path, text.encode())
    if as_json:
        print_json({"arch": config.name, "element": config.element, "config_hash": config.hash, "file": str(path)})
    else:
        OUT.print(f"{path}: module {module}, {len(text.splitlines())} lines, configuration hash {config.hash:#010x}")


def synth(
    arch: str = ARCH_OPTION,
    element: str | None = ELEMENT_OPTION,
    device: str = typer.Option("ecp5-85k", "--device", "-d", help="FPGA: ecp5-12k, ecp5-25k, ecp5-45k or ecp5-85k."),
    part: str = typer.Option("core", "--part", help="core, or array: the MAC array alone."),
    seeds: int = typer.Option(1, "--seeds", min=1, help="Placement seeds; best and median are printed."),
    work: Path | None = typer.Option(None, "--work", help="Folder that keeps netlist, logs and reports."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Synthesize, place and route a core with Yosys and nextpnr, and print what it costs and how fast it is."""
    from .core.array import SystolicArray
    from .synth import DEVICES, synthesize
    from .top import Accelerator

    config = _arch(arch, element)
    if device not in DEVICES:
        raise ConfigError(f"there is no device {device!r}; known are {', '.join(DEVICES)}")
    if part not in ("core", "array"):
        raise ConfigError(f"part must be core or array, not {part!r}")
    component = Accelerator(config, technology="ecp5") if part == "core" else SystolicArray(config, technology="ecp5")
    with tempfile.TemporaryDirectory(prefix="nibblecore-synth-") as scratch, ERR.status("") as status:
        report = synthesize(
            component,
            config,
            DEVICES[device],
            work or Path(scratch),
            part=part,
            seeds=seeds,
            report=lambda text: status.update(f"{config.name} on {device}: {text}"),
        )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    fpga = DEVICES[device]
    result = table(f"{config.name} ({config.element}) on {device}, {part}", "what", "used>", "share>")
    result.add_row("LUT4 sites", str(report.lut), f"{report.lut / fpga.lut:.1%}")
    result.add_row("LUT RAM", str(report.lutram), f"{2 * report.lutram / fpga.lut:.1%}")
    result.add_row("flip-flops", str(report.ff), f"{report.ff / fpga.lut:.1%}")
    result.add_row("block RAM (DP16KD)", str(report.bram), f"{report.bram / fpga.bram:.1%}")
    result.add_row("multipliers (MULT18X18D)", str(report.dsp), f"{report.dsp / fpga.dsp:.1%}")
    result.add_row("sites per MAC", f"{report.sites_per_mac:.1f}", "")
    result.add_row(
        "Fmax, best / median", f"{report.fmax_mhz:.1f} / {report.fmax_median_mhz:.1f} MHz", f"{seeds} seed(s)"
    )
    result.add_row("tools", f"{report.seconds:.0f} s", f"{report.peak_memory_mb:.0f} MB")
    OUT.print(result)
    OUT.print("critical path:\n  " + "\n  ".join(report.critical_path), highlight=False)
