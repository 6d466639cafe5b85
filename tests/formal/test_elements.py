# amaranth: UnusedElaboratable=no
"""Proofs that the processing elements give the same sums, down to the carry cells.

For any number of lanes the argument has four links. The inverted bit products and their constant are the signed
product: exhaustive, in tests/hw/test_elements.py. The plan hands every bit on exactly once, at its weight: also there.
The inferred adders of ``technology="generic"`` are the rows of the plan, written with ``+``. Every carry chain gives
what these adders give: proved here signal by signal, on Yosys' own model of the cell. Small elements are proved end to
end as well.
"""

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from amaranth.back import rtlil
from amaranth.hdl import Assert, Module, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In

from nibblecore_hw.core import elements
from nibblecore_hw.core.accumulate import AccumulateAdder
from nibblecore_hw.core.elements import BitplaneDot, GenericDot, TableColumns, TableFill, ecp5
from nibblecore_hw.core.elements.dsp import ProductTrees
from nibblecore_sim.toolchain import find_smt, find_yosys

pytestmark = pytest.mark.formal

MODELS = Path(elements.__path__[0]) / "ecp5_models.v"

CELLS = "read_verilog -overwrite +/ecp5/cells_sim.v"
"""Behaviour of the ECP5's cells, as Yosys' authors wrote it."""


@pytest.fixture
def yosys(tmp_path):
    def run(script, **designs):
        for name, element in designs.items():
            (tmp_path / f"{name}.il").write_text(rtlil.convert(element, name="top", platform="formal"))
        (tmp_path / "script.ys").write_text(script)
        process = subprocess.run(
            [find_yosys(), "-Q", "-l", "log", "script.ys"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return process.returncode, (tmp_path / "log").read_text()

    return run


EQUIVALENCE = f"""
read_rtlil gold.il
prep -flatten -top top
design -stash gold
{CELLS}
read_rtlil gate.il
hierarchy -top top
prep -flatten -top top
design -stash gate
design -copy-from gold -as gold top
design -copy-from gate -as gate top
equiv_make gold gate equiv
hierarchy -top equiv
opt_clean
equiv_simple
equiv_status -assert
"""


@pytest.mark.parametrize(
    ("lanes", "levels_per_stage", "chain_cells"), [(1, 4, 16), (2, 2, 16), (2, 3, 32), (4, 1, 48), (16, 2, 48)]
)
def test_carry_chains_are_the_inferred_adders(yosys, lanes, levels_per_stage, chain_cells):
    """Every row's output and every register, given equal registers before: for any weights, at any time."""
    options = {"lanes": lanes, "levels_per_stage": levels_per_stage, "chain_cells": chain_cells}
    gate = BitplaneDot(technology="ecp5", **options)
    code, log = yosys(EQUIVALENCE, gold=BitplaneDot(technology="generic", **options), gate=gate)
    assert code == 0, log[-3000:]
    assert "Equivalence successfully proven!" in log
    # Registers, rows and the sum took part: nothing was left out for want of a common name.
    proved = int(log.split("Found ")[-1].split()[0])
    assert proved >= 12 * lanes + sum(row.width for row in gate.plan.rows)


@pytest.mark.parametrize(
    ("component", "options"),
    [
        (TableColumns, {"lanes": 4, "columns": 2, "levels_per_stage": 1, "chain_cells": 16}),
        (TableColumns, {"lanes": 8, "columns": 1, "levels_per_stage": 2, "chain_cells": 48}),
        (TableFill, {"lanes": 4, "columns": 2, "blocks": 2}),
        (TableColumns, {"lanes": 8, "columns": 1, "levels_per_stage": 2, "chain_cells": 48, "banks": 1}),
        (TableFill, {"lanes": 4, "columns": 2, "blocks": 2, "banks": 1}),
    ],
)
def test_carry_chains_of_tables_are_the_inferred_adders(yosys, component, options):
    """The same for tables, whose words take part as registers, and for what fills them."""
    script = EQUIVALENCE.replace("prep -flatten -top top\n", "prep -flatten -top top\nmemory_map\nopt_clean\n")
    code, log = yosys(script, gold=component(**options), gate=component(technology="ecp5", **options))
    assert code == 0, log[-3000:]
    assert "Equivalence successfully proven!" in log
    proved = int(log.split("Found ")[-1].split()[0])
    if component is TableColumns:
        words = 4 * (options["lanes"] // 4) * 16 * 5 * options["columns"]
        rows = sum(row.width for row in component(**options).plan.rows) * options["columns"]
        assert proved >= words + rows


def test_a_wrong_carry_cell_is_found(yosys, monkeypatch):
    joint = ecp5._joint

    def without_carry(carry, *, sum):
        cell = joint(carry, sum=sum)
        cell.init = 0
        return cell

    monkeypatch.setattr(ecp5, "_joint", without_carry)
    code, log = yosys(EQUIVALENCE, gold=BitplaneDot(lanes=2), gate=BitplaneDot(lanes=2, technology="ecp5"))
    assert code != 0
    assert "unproven $equiv cells in 'equiv_status -assert'" in log


@pytest.mark.parametrize(("lanes", "chain_cells"), [(2, 16), (8, 40)])
def test_trees_of_packed_products(yosys, lanes, chain_cells):
    """The adders behind the multipliers: every sum, choice and register, given equal registers before."""
    trees = [ProductTrees(lanes=lanes, technology=t, chain_cells=chain_cells) for t in ("generic", "ecp5")]
    code, log = yosys(EQUIVALENCE, gold=trees[0], gate=trees[1])
    assert code == 0, log[-3000:]
    assert "Equivalence successfully proven!" in log
    # All sums of the trees and of the columns took part.
    proved = int(log.split("Found ")[-1].split()[0])
    assert proved >= 4 * (sum(lanes >> n + 1 << 3 for n in range(lanes.bit_length() - 1)) + 8 + lanes.bit_length() - 1)


@pytest.mark.parametrize("bits", [1, 8, 25])
def test_adder_of_alternatives(yosys, bits):
    """The carry cells of the accumulators, for all operands."""
    code, log = yosys(
        "read_rtlil gold.il\nprep -flatten -top top\ndesign -stash gold\n"
        f"{CELLS}\nread_rtlil gate.il\nhierarchy -top top\nprep -flatten -top top\ndesign -stash gate\n"
        "design -copy-from gold -as gold top\ndesign -copy-from gate -as gate top\n"
        "miter -equiv -flatten gold gate miter\nsat -verify -prove trigger 0 miter\n",
        gold=AccumulateAdder(bits=bits),
        gate=AccumulateAdder(bits=bits, technology="ecp5"),
    )
    assert code == 0, log[-3000:]
    assert "SAT proof finished - no model found: SUCCESS!" in log


WIRES = r"""
module \$_DFF_P_ (input C, D, output Q);
    assign Q = D;
endmodule
module \$_DFFE_PP_ (input C, E, D, output Q);
    assign Q = D;
endmodule
"""
"""Instead of registers."""

FLATTEN = """
prep -flatten -top top
opt_dff
simplemap t:$dff t:$dffe
techmap -map wires.v
opt_clean
setattr -unset init w:*
"""


@pytest.mark.parametrize("technology", ["generic", "ecp5"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_sums_of_all_operands(yosys, tmp_path, lanes, technology):
    """The way from operands to sum, with every register made a wire: every activation with every weight."""
    (tmp_path / "wires.v").write_text(WIRES)
    code, log = yosys(
        f"read_rtlil gold.il{FLATTEN}design -stash gold\n"
        f"{CELLS}\nread_rtlil gate.il\nhierarchy -top top{FLATTEN}design -stash gate\n"
        "design -copy-from gold -as gold top\ndesign -copy-from gate -as gate top\n"
        "miter -equiv -flatten -ignore_gold_x gold gate miter\nhierarchy -top miter\nopt -full\n"
        "select -assert-none t:$*dff* t:$_*DFF*\nsat -verify -prove trigger 0 miter\n",
        gold=GenericDot(lanes=lanes),
        gate=BitplaneDot(lanes=lanes, technology=technology),
    )
    assert code == 0, log[-3000:]
    assert "SAT proof finished - no model found: SUCCESS!" in log


@pytest.mark.parametrize("seed", [1])
def test_cell_model_is_that_of_yosys(yosys, tmp_path, seed):
    """``ecp5_models.v``, for random tables and both settings of the carry."""
    rng = random.Random(seed)
    cells = []
    for n in range(24):
        inject = [rng.choice(("YES", "NO", "NO")) for _ in range(2)]
        pins = ", ".join(
            f".{pin}(i[{k}])" for k, pin in enumerate(("A0", "B0", "C0", "D0", "A1", "B1", "C1", "D1", "CIN"))
        )
        cells.append(
            f"CCU2C #(.INIT0(16'd{rng.getrandbits(16)}), .INIT1(16'd{rng.getrandbits(16)}), "
            f'.INJECT1_0("{inject[0]}"), .INJECT1_1("{inject[1]}")) '
            f"cell{n} ({pins}, .S0(o[{3 * n}]), .S1(o[{3 * n + 1}]), .COUT(o[{3 * n + 2}]));"
        )
    ports = f"input [8:0] i, output [{3 * len(cells) - 1}:0] o"
    # Beside the script: YoWASP's Yosys sees a folder of its own at some absolute paths.
    shutil.copy(MODELS, tmp_path / "models.v")
    (tmp_path / "top.v").write_text(f"module top({ports});\n" + "\n".join(cells) + "\nendmodule\n")
    prepare = "read_verilog top.v\nhierarchy -top top\nprep -flatten -top top\ndesign -stash"
    code, log = yosys(
        f"{CELLS}\n{prepare} gold\nread_verilog models.v\n{prepare} gate\n"
        "design -copy-from gold -as gold top\ndesign -copy-from gate -as gate top\n"
        "miter -equiv -flatten gold gate miter\nsat -verify -prove trigger 0 miter\n"
    )
    assert code == 0, f"seed {seed}: {log[-3000:]}"
    assert "SAT proof finished - no model found: SUCCESS!" in log


class Miter(wiring.Component):
    """Both elements with the same inputs, and the later sum compared in every cycle once the pipelines are full."""

    def __init__(self, *, lanes: int, technology: str) -> None:
        self._elements = [GenericDot(lanes=lanes), BitplaneDot(lanes=lanes, technology=technology)]
        word = data.ArrayLayout(signed(4), lanes)
        super().__init__({"activations": In(word), "weights": In(word), "load_stb": In(1), "swap_stb": In(1)})
        self.latency = max(element.latency for element in self._elements)

    def elaborate(self, platform):
        m = Module()
        sums = []
        for name, element in zip(("generic", "bitplane"), self._elements, strict=True):
            m.submodules[name] = element
            for port in ("activations", "weights", "load_stb", "swap_stb"):
                m.d.comb += getattr(element, port).eq(getattr(self, port))
            total = element.sum
            for n in range(self.latency - element.latency):
                later = Signal(total.shape(), name=f"{name}_later{n}")
                m.d.sync += later.eq(total)
                total = later
            sums.append(total)
        age = Signal(range(self.latency + 1))
        with m.If(age < self.latency):
            m.d.sync += age.eq(age + 1)
        with m.Else():
            m.d.comb += Assert(sums[0] == sums[1])
        return m


@pytest.mark.parametrize("technology", ["generic", "ecp5"])
def test_loads_and_swaps_at_any_time(yosys, tmp_path, technology):
    """One lane, all inputs free in every cycle, for as long as two pipeline lengths."""
    miter = Miter(lanes=1, technology=technology)
    code, log = yosys(
        f"{CELLS}\nread_rtlil miter.il\nhierarchy -top top\nprep -flatten -top top\nasync2sync\n"
        "opt -full\ndffunmap\nwrite_smt2 -wires miter.smt2\n",
        miter=miter,
    )
    assert code == 0, log[-3000:]
    smt = find_smt()
    process = subprocess.run(
        [smt.smtbmc, "-s", "z3", "-t", str(2 * miter.latency + 2), "miter.smt2"],
        cwd=tmp_path,
        env=smt.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Status: PASSED" in process.stdout, process.stdout[-3000:]
    assert process.returncode == 0
