"""What Yosys is known to get wrong, looked for in its netlists."""

from collections.abc import Mapping
from typing import Any

from nibblecore.errors import ToolchainError

from .devices import FpgaDevice

__all__ = ["check_netlist"]


def check_netlist(netlist: Mapping[str, Any], device: FpgaDevice) -> None:
    """Refuse a netlist with a multiplier of an iCE40 that counts with pins which nothing drives.

    Where two products have a register each and are added, ``synth_ice40 -dsp`` of Yosys 0.70 takes the register of one
    of them twice: as input register of the multiplier that adds, whose pins C and D are then to be the other product
    without its register, and as output register of the multiplier of that other product, which from then on gives no
    such thing. C and D are left undefined, and the other multiplier is removed.

    Parameters
    ----------
    netlist : mapping
        What ``write_json`` wrote.
    device : FpgaDevice
        For which it was made; only those of the family ``ice40`` have such multipliers.

    Raises
    ------
    ToolchainError
        With the signal that is wrong, and how to write it otherwise.
    """
    if device.family != "ice40":
        return
    for module in netlist["modules"].values():
        for name, cell in module["cells"].items():
            if cell["type"] != "SB_MAC16":
                continue
            wires = cell["connections"]
            if lost := [pin for pin in _pins_in_use(cell) if "x" in wires.get(pin, ["x"])]:
                names = (n for n, net in module["netnames"].items() if not net["hide_name"])
                sums = (n for n in names if wires["O"][0] in module["netnames"][n]["bits"])
                raise ToolchainError(
                    f"Yosys lost a factor or a summand of '{next(sums, name)}' for {device.name}: nothing drives "
                    f"{' and '.join(lost)} of its SB_MAC16.",
                    hint="It does so where two products with a register each are added. Set the attribute 'keep' on "
                    "both registers: Signal(..., attrs={'keep': 1}).",
                )


def _pins_in_use(cell: Mapping[str, Any]) -> list[str]:
    """Inputs that its result depends on, by Lattice's TN1295: the factors; C and D where they are added or loaded."""
    parameters = {name: int(value, 2) for name, value in cell["parameters"].items()}
    pins = ["A", "B"]
    for pin, half in (("C", "TOP"), ("D", "BOT")):
        is_sum = parameters[f"{half}OUTPUT_SELECT"] in (0, 1)
        loads = cell["connections"].get(f"OLOAD{half}", ["0"]) != ["0"]
        if is_sum and (parameters[f"{half}ADDSUB_UPPERINPUT"] == 1 or loads):
            pins.append(pin)
    return pins
