# amaranth: UnusedElaboratable=no
"""Processing elements of the array: several implementations behind :class:`DotElement`, with the same sums."""

from typing import Any, Final

from ...technology import TECHNOLOGIES, check_technology
from .base import DotElement
from .bitplane import BitplaneDot
from .dsp import DspHead, DspQuad
from .generic import GenericDot
from .lutram import LutramDot, OneBankLutramDot, TableColumns, TableFill, code_activations

ELEMENTS: Final[dict[str, type[DotElement]]] = {
    "generic": GenericDot,
    "bitplane": BitplaneDot,
    "lutram": OneBankLutramDot,
    "lutram2": LutramDot,
}
"""Elements of one column, by the name that ``ArchConfig.element`` gives them. Those of ``dsp`` are :class:`DspQuad`."""


def make_element(kind: str, *, lanes: int, technology: str = "generic", **options: Any) -> DotElement:
    """Construct the element of a name.

    Parameters
    ----------
    kind : str
        A key of :data:`ELEMENTS`.
    lanes : int
        Products per cycle, a power of two in 1..64.
    technology : {"generic", "ecp5"}
        Primitives that the element may instantiate. ``GenericDot`` instantiates none on any technology.
    **options
        Further arguments of the element's class.

    Raises
    ------
    TypeError, ValueError
        If ``kind`` or ``technology`` is unknown, or the class refuses the other arguments.
    """
    if kind not in ELEMENTS:
        raise ValueError(f"element must be one of {', '.join(ELEMENTS)}, not {kind!r}")
    check_technology(technology)
    element = ELEMENTS[kind]
    if element is not GenericDot:
        options["technology"] = technology
    return element(lanes=lanes, **options)


__all__ = [
    "ELEMENTS",
    "TECHNOLOGIES",
    "BitplaneDot",
    "DotElement",
    "DspHead",
    "DspQuad",
    "GenericDot",
    "LutramDot",
    "OneBankLutramDot",
    "TableColumns",
    "TableFill",
    "code_activations",
    "make_element",
]
