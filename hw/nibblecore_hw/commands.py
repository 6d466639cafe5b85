"""The commands that hardware adds to ``nibblecore``: ``verilog`` and ``synth``."""

import dataclasses
import time
from pathlib import Path

import typer

from nibblecore.cli.console import (
    ARCH_OPTION,
    ELEMENT_OPTION,
    ERR,
    JSON_OPTION,
    OUT,
    SET_OPTION,
    changed_arch,
    print_json,
    require_output_folder,
    say,
    table,
)
from nibblecore.files import write_atomically

from .parts import PARTS, build_part
from .synth.devices import DEVICES, get_device


def register(app: typer.Typer) -> None:
    """Add the commands; called by ``nibblecore`` when this package is installed."""
    app.command("verilog")(verilog)
    app.command("synth")(synth)


def verilog(
    arch: str = ARCH_OPTION,
    element: str | None = ELEMENT_OPTION,
    settings: list[str] | None = SET_OPTION,
    output: Path = typer.Option(..., "--output", "-o", help="File to write."),
    module: str = typer.Option("nibblecore", "--module", help="Name of the top module."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Write a core as one Verilog file with conventional AXI names."""
    from .top import Accelerator
    from .verilog import to_verilog

    config = changed_arch(arch, element, settings)
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
    settings: list[str] | None = SET_OPTION,
    device: str = typer.Option("ecp5-85k", "--device", "-d", help=f"FPGA: {', '.join(DEVICES)}."),
    part: str = typer.Option("core", "--part", help=f"{', '.join(PARTS)}."),
    seeds: int = typer.Option(1, "--seeds", min=1, help="Placement seeds; best and median are printed."),
    frequency: float | None = typer.Option(
        None, "--freq", min=1, help="Clock in MHz that nextpnr strives for, instead of the device's usual one."
    ),
    work: Path | None = typer.Option(None, "--work", help="Folder that keeps netlist, logs and nextpnr's reports."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Synthesize, place and route a core with Yosys and nextpnr, and print what it costs and how fast it is.

    Results are kept by the hash of what made them: asking twice is free.
    """
    from .synth.run import synthesize

    config = changed_arch(arch, element, settings)
    fpga = get_device(device)
    component = build_part(part, config, technology=fpga.technology)
    began = time.monotonic()
    with ERR.status("") as status:

        def show(text: str) -> None:
            status.update(f"{config.name} ({part}) on {device}, {time.monotonic() - began:.0f} s: {text}")

        report = synthesize(
            component, config, fpga, part=part, seeds=seeds, frequency_mhz=frequency, work=work, report=show
        )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    result = table(f"{config.name} ({config.element}) on {device}, {part}", "what", "used>", "share>")
    result.add_row("LUT4 sites", f"{report.lut:,}", f"{report.lut / fpga.lut:.1%}")
    if fpga.lutram:
        result.add_row("LUT RAM cells", f"{report.lutram:,}", f"{report.lutram / fpga.lutram:.1%}")
    result.add_row("flip-flops", f"{report.ff:,}", f"{report.ff / fpga.ff:.1%}")
    result.add_row("block RAMs", str(report.bram), f"{report.bram / fpga.bram:.1%}")
    if fpga.spram:
        result.add_row("single-port RAMs", str(report.spram), f"{report.spram / fpga.spram:.1%}")
    result.add_row("multipliers", str(report.dsp), f"{report.dsp / fpga.dsp:.1%}")
    result.add_row("sites per MAC", f"{report.sites_per_mac:.1f}", "")
    for clock, mhz in report.clocks.items():
        figures = f"{mhz['fmax_mhz']:.1f} / {mhz['fmax_median_mhz']:.1f} MHz"
        result.add_row(f"Fmax of {clock}, best / median", figures, f"{seeds} seed(s)")
    result.add_row(
        "tools", f"{report.seconds:.0f} s", f"{report.peak_memory_mb:.0f} MB{', kept' if report.cached else ''}"
    )
    OUT.print(result)
    OUT.print("critical path:\n  " + "\n  ".join(report.critical_path), highlight=False, soft_wrap=True)
