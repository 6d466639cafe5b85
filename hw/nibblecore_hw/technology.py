"""Primitives of a device family that components may instantiate."""

from typing import Final

TECHNOLOGIES: Final = ("generic", "ecp5")
"""None, or those of the ECP5."""


def check_technology(technology: str) -> str:
    """``technology``, if there is one of that name."""
    if technology not in TECHNOLOGIES:
        raise ValueError(f"technology must be one of {', '.join(TECHNOLOGIES)}, not {technology!r}")
    return technology
