"""The commands that hardware adds to ``nibblecore``: ``verilog``, ``synth`` and ``bench-synth``."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.progress import TaskID

from nibblecore.cli.console import (
    ARCH_OPTION,
    ELEMENT_OPTION,
    ERR,
    JSON_OPTION,
    OUT,
    SET_OPTION,
    changed_arch,
    print_json,
    progress,
    require_output_folder,
    say,
    table,
)
from nibblecore.cli.throughput import array_figures
from nibblecore.errors import NibbleError
from nibblecore.files import write_atomically

from .parts import PARTS, build_part
from .synth.devices import DEVICES, get_device


def register(app: typer.Typer) -> None:
    """Add the commands; called by ``nibblecore`` when this package is installed."""
    app.command("verilog")(verilog)
    app.command("synth")(synth)
    app.command("bench-synth")(bench_synth)


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


def bench_synth(
    only: list[str] | None = typer.Option(
        None, "--only", metavar="TEXT", help="Only configurations with this in their name: elements, small; repeatable."
    ),
    folder: Path = typer.Option(
        Path("hw"), "--folder", help="Where results.json is read and written, and RESULTS.md written."
    ),
    budgets: Path = typer.Option(
        Path("tests/synth/budgets.json"), "--budgets", help="Sites and clocks that what is measured must keep to."
    ),
    seeds: int | None = typer.Option(None, "--seeds", min=1, help="At most so many placements of each configuration."),
    jobs: int = typer.Option(1, "--jobs", "-j", min=1, help="Configurations at once; each takes a core and some GB."),
    render: bool = typer.Option(False, "--render", help="Measure nothing: only write cycles and page anew."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Measure every configuration that the project reports, write the page of results, and compare with the budgets.

    Stop it and call it again: results are kept by content, and what is there is not measured twice.
    """
    from .synth.budget import load_budgets, routed_excess
    from .synth.page import page
    from .synth.suite import CONFIGURATIONS, Configuration, Record, load, measure_all, save, select

    if not folder.is_dir():
        raise NibbleError(f"there is no folder {folder}.", hint="Call this in the repository, or give --folder.")
    if not budgets.exists():
        raise NibbleError(f"there is no file {budgets}.", hint="Call this in the repository, or give --budgets.")
    path = folder / "results.json"
    chosen = [] if render else select(only or ())
    measured: dict[str, Record] = {}
    began = time.monotonic()
    with progress(as_json) as bar:
        total = bar.add_task("configurations", total=len(chosen), visible=bool(chosen))
        tasks: dict[str, TaskID] = {}

        def tick(configuration: Configuration, text: str) -> None:
            if configuration.name not in tasks:
                tasks[configuration.name] = bar.add_task("", total=None)
            bar.update(tasks[configuration.name], description=f"{configuration.name}: {text}")

        def done(configuration: Configuration, record: Record) -> None:
            bar.remove_task(tasks.pop(configuration.name))
            bar.advance(total)
            measured[configuration.name] = record
            say(f"{time.monotonic() - began:5.0f} s  {configuration.name}: {_one_line(record)}", quiet=as_json)

        measure_all(chosen, path, jobs=jobs, seeds=seeds, figures=array_figures, tick=tick, done=done)
    records = load(path)
    for configuration in CONFIGURATIONS:  # those of older records may be of an older cost model
        record = records.get(configuration.name)
        if configuration.group == "elements" and record is not None and "failed" not in record:
            record["throughput"] = array_figures(configuration.config())
    save(records, path)
    records = load(path)
    write_atomically(folder / "RESULTS.md", page(records).encode())
    floor = load_budgets(budgets)["routed"]
    worse = [s for name, record in measured.items() if name in floor for s in routed_excess(name, floor[name], record)]
    if as_json:
        print_json({"results": records, "page": str(folder / "RESULTS.md"), "regressions": worse})
    else:
        OUT.print(f"page: {folder / 'RESULTS.md'}", highlight=False, soft_wrap=True)
    if worse:
        raise NibbleError("\n".join(worse), hint="If it is meant to be: make budgets.")


def _one_line(record: Mapping[str, Any]) -> str:
    if "failed" in record:
        return " ".join(record["failed"].split())
    return (
        f"{record['lut'] + 2 * record['lutram']:,} sites, {record['fmax_median_mhz']:.1f} MHz "
        f"(best {record['fmax_mhz']:.1f})"
    )
