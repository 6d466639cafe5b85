"""The reference pages ``hw/ISA.md`` and ``hw/CSR.md``, written from the contract.

``python -m nibblecore.arch.pages DIR`` writes both into a folder; a test keeps the committed ones current.
"""

import inspect
import sys
from pathlib import Path

from . import isa, regs
from .config import ARCHS, ArchConfig

_NOTE = "<!-- Generated from nibblecore.arch by `make pages`; do not edit. -->\n\n"


def isa_page() -> str:
    """Contents of ``hw/ISA.md``."""
    lines = [_NOTE, f"# Instruction set, version {isa.ISA_VERSION}\n\n", f"{inspect.getdoc(isa)}\n\n"]
    lines += ["Engines, by the bit that names them in `wait` and `signal`: "]
    lines += [", ".join(f"{e.value} {e.name}" for e in isa.Engine) + ". Regions, as the compiler uses them: "]
    lines += [", ".join(f"{r.value} {r.name}" for r in isa.Region) + ".\n"]
    for spec in isa.INSTRUCTIONS.values():
        engine = "fetch" if spec.engine is None else spec.engine.name
        lines += [f"\n## {spec.opcode.name} (opcode {spec.opcode.value}, {engine})\n\n{spec.doc}\n\n"]
        lines += [f"{spec.bits} of {isa.INSTRUCTION_BITS} bits used.\n\n"]
        lines += ["| bits | field | values | meaning |\n|---|---|---|---|\n"]
        for name, (low, f) in spec.layout().items():
            span = f"{low + f.bits - 1}:{low}" if f.bits > 1 else f"{low}"
            values = ", ".join(map(str, f.allowed)) if f.allowed is not None else f"{f.low}..{f.high}"
            if name == "opcode":
                values = str(spec.opcode.value)
            lines.append(f"| {span} | `{name}` | {values} | {f.doc} |\n")
    lines += [
        "\n## Cores\n\nBuffer depths in words; the hash of a core stands in CONFIG_HASH and in every program.\n\n"
    ]
    shown = [f for f in ArchConfig.__dataclass_fields__ if f != "name"]
    lines += ["| | " + " | ".join(ARCHS) + " |\n|---|" + "---|" * len(ARCHS) + "\n"]
    lines += [f"| `{f}` | " + " | ".join(str(getattr(a, f)) for a in ARCHS.values()) + " |\n" for f in shown]
    lines += ["| hash | " + " | ".join(f"`{a.hash:#010x}`" for a in ARCHS.values()) + " |\n"]
    return "".join(lines)


def csr_page() -> str:
    """Contents of ``hw/CSR.md``."""
    lines = [_NOTE, "# Control and status registers\n\n", f"{inspect.getdoc(regs)}\n\n"]
    lines += ["| offset | register | access | reset | meaning |\n|---|---|---|---|---|\n"]
    for r in regs.REGISTERS.values():
        lines.append(f"| `{r.offset:#05x}` | {r.name} | {r.access} | {r.reset:#x} | {r.doc} |\n")
        lines += [f"| | · bits {f.low + f.bits - 1}:{f.low} `{f.name}` | | | {f.doc} |\n" for f in r.fields]
    lines += ["\n## Error causes\n\n| value | cause | meaning |\n|---|---|---|\n"]
    lines += [f"| {c.value} | {c.name} | {regs.ERROR_TEXT[c]} |\n" for c in regs.ErrorCause]
    lines += ["\nUnits: " + ", ".join(f"{u.value} {u.name}" for u in regs.ErrorUnit) + ".\n"]
    return "".join(lines)


PAGES = {"ISA.md": isa_page, "CSR.md": csr_page}
"""File name to the function that gives its contents."""


def write(folder: Path) -> None:
    """Write every page into ``folder``."""
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
