"""Verilog from Amaranth, as simulators, synthesis and users get it."""

import os
import re
from typing import Any, Final
from unittest import mock

from amaranth import Fragment
from amaranth._toolchain.yosys import find_yosys
from amaranth.back import rtlil
from amaranth.hdl._ir import PortDirection
from amaranth.lib.wiring import In

_ATTRIBUTES: Final = ("generator", "top", "src", "amaranth.hierarchy", "amaranth.decoding")
_MEMORY_INIT: Final = re.compile(r"  cell \$meminit_v2 .*?\n  end\n", re.DOTALL)
_ELEMENT: Final = re.compile(r"\\([^\s\[\]]+)\[(\d+)\] ")
_FUNCTION: Final = re.compile(r"\\(\$procmux\$\d+) ")
_NONZERO: Final = re.compile(r"connect \\DATA \d+'[0x]*1")
_READ_PORT: Final = re.compile(r"  cell \$memrd_v2 .*?\n  end\n", re.DOTALL)
_CHOICES: Final = re.compile(r"(parameter \\COLLISION_X_MASK \d+')(0+)\n")


def _spoil(port: re.Match[str]) -> str:
    """A memory's read port for which a word that is being written is unknown."""
    text = port.group(0)
    # One that passes the new word on, or that has no clock, does not have the choice.
    if not re.search(r"\\TRANSPARENCY_MASK \d+'0+\n", text) or "\\CLK_ENABLE 1\n" not in text:
        return text
    return _CHOICES.sub(lambda m: m[1] + "1" * len(m[2]) + "\n", text)


def to_verilog(component: Any, *, name: str, platform: Any = None, spoil_collisions: bool = False) -> str:
    """Verilog-2001 text of a component; the same sources give the same text.

    Ports are the members of the component's signature, nested ones joined by two underscores, and ``clk`` and ``rst``
    if it has synchronous logic.

    This is not ``amaranth.back.verilog.convert`` for three reasons. That one leaves combinational processes as
    ``always @*``, which assign nothing when they read no signal (a constant bit stays 0 or X for ever), and which
    Icarus does not run before an input changes: here all of them become ``assign``. It writes out zeros for every word
    of every memory, which single-port RAMs of some FPGAs cannot have, and which our circuits do not need. And it uses
    whatever Yosys is installed: here it is always the one that comes with Amaranth.

    Parameters
    ----------
    component : wiring.Component
        The circuit.
    name : str
        Name of its module.
    platform : optional
        Handed to ``elaborate``.
    spoil_collisions : bool
        For simulation: a word that a memory reads at the edge at which it is written comes out unknown, where Amaranth
        defines it as the old word. Block RAM gives the old one, the new one or neither, and our netlists have no logic
        around it that would change that.
    """
    ports = {
        "__".join(map(str, path)): (
            value.as_value() if hasattr(value, "as_value") else value,
            PortDirection.Input if member.flow is In else PortDirection.Output,
        )
        for path, member, value in component.signature.flatten(component)
    }
    with mock.patch.dict(os.environ, {"AMARANTH_USE_YOSYS": "builtin"}):
        text, _ = rtlil.convert_fragment(Fragment.get(component, platform), ports, name, emit_src=False)
        text = _MEMORY_INIT.sub(lambda m: m.group(0) if _NONZERO.search(m.group(0)) else "", text)
        if spoil_collisions:
            text = _READ_PORT.sub(_spoil, text)
        remove = " ".join(f"-remove {attribute}" for attribute in _ATTRIBUTES)
        script = [
            f"read_rtlil <<rtlil\n{text}\nrtlil",
            "proc -norom",
            "memory_collect",
            f"attrmap {remove}",
            f"attrmap -modattr {remove}",
            "write_verilog -norename",
        ]
        yosys = find_yosys(lambda version: version >= (0, 40))
        result: str = yosys.run(["-q", "-"], "\n".join(script), ignore_warnings=True)
    # The elements of an array are called as Yosys calls the bits of a wire when it hands them to ABC9. In large
    # circuits it takes the ones for the others: ``Assert `GetSize(conn.first) == GetSize(conn.second)' failed``.
    result = _ELEMENT.sub(r"\\\1.\2 ", result)
    # Functions named like system tasks: legal as escaped names, but Icarus takes them for system tasks.
    return _FUNCTION.sub(lambda m: m.group(1).replace("$", "_")[1:] + " ", result)
