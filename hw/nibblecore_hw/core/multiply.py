"""A hard multiplier with all of its registers."""

from typing import Any, ClassVar

from amaranth.hdl import ClockSignal, Const, Instance, Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..technology import check_technology


class Multiplier(wiring.Component):
    """``left * right`` of two signed 18-bit numbers, :attr:`LATENCY` cycles behind them.

    On an ECP5 both registers are the block's own: the wires to and from it get a whole cycle each, where the block
    without them takes 3.9 ns in the middle (nextpnr's timing database, speed grade 6). Yosys does not merge registers
    into ``MULT18X18D``; so the primitive is instantiated.

    Parameters
    ----------
    product_bits : int
        How many of the product's lowest bits are wanted, 1..36.
    technology : {"generic", "ecp5"}
        ``ecp5`` instantiates a ``MULT18X18D``, ``generic`` leaves it to synthesis.

    Members
    -------
    left, right : In(signed(18))
    product : Out(signed(product_bits))

    Raises
    ------
    ValueError
        If ``product_bits`` is out of range, or the technology unknown.
    """

    LATENCY: ClassVar[int] = 2

    left: Signal
    right: Signal
    product: Signal

    def __init__(self, *, product_bits: int = 36, technology: str = "generic") -> None:
        if not 1 <= product_bits <= 36:
            raise ValueError(f"product_bits must be in 1..36, not {product_bits!r}")
        self._technology = check_technology(technology)
        super().__init__({"left": In(signed(18)), "right": In(signed(18)), "product": Out(signed(product_bits))})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        if self._technology == "ecp5":
            self._instantiate(m)
            return m
        left, right = (Signal(signed(18), name=f"{name}_register", reset_less=True) for name in ("left", "right"))
        product = Signal.like(self.product, name="product_register", reset_less=True)
        m.d.sync += [left.eq(self.left), right.eq(self.right), product.eq(left * right)]
        m.d.comb += self.product.eq(product)
        return m

    def _instantiate(self, m: Module) -> None:
        # nextpnr times the registers at inputs and output; REG_PIPELINE it would not.
        parameters = {"GSR": "DISABLED", "RESETMODE": "SYNC"}
        for register in ("INPUTA", "INPUTB", "OUTPUT"):
            parameters |= {f"REG_{register}_CLK": "CLK0", f"REG_{register}_CE": "CE0", f"REG_{register}_RST": "RST0"}
        inputs: dict[str, Any] = {"CLK0": ClockSignal(), "CE0": Const(1, 1), "RST0": Const(0, 1)}
        inputs |= {"SIGNEDA": Const(1, 1), "SIGNEDB": Const(1, 1), "SOURCEA": Const(0, 1), "SOURCEB": Const(0, 1)}
        inputs |= {f"A{n}": self.left[n] for n in range(18)} | {f"B{n}": self.right[n] for n in range(18)}
        inputs |= {f"C{n}": Const(0, 1) for n in range(18)}
        m.submodules.block = Instance(
            "MULT18X18D",
            **{f"p_{name}": value for name, value in parameters.items()},
            **{f"i_{name}": value for name, value in inputs.items()},
            **{f"o_P{n}": self.product[n] for n in range(len(self.product))},
        )
