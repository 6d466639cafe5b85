"""The portable element: ``a * w`` and an adder tree."""

from typing import Any

from amaranth.hdl import Module, Signal

from .base import DotElement


class GenericDot(DotElement):
    """Dot product written as it is read, for any FPGA and for simulation: the reference of the other elements.

    Products are registered, and every level of the balanced adder tree is. Parameters, members and errors are those of
    :class:`DotElement`.
    """

    @property
    def latency(self) -> int:
        return 2 + (self.lanes - 1).bit_length()

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        shape = self.activations.shape()
        activations = Signal(shape, reset_less=True)
        shadow = Signal(shape, reset_less=True)
        active = Signal(shape, reset_less=True)
        m.d.sync += activations.eq(self.activations)
        with m.If(self.load_stb):
            m.d.sync += shadow.eq(self.weights)
        with m.If(self.swap_stb):
            m.d.sync += active.eq(shadow)

        terms = []
        for lane in range(self.lanes):
            product = Signal(range(-56, 65), name=f"product{lane}", reset_less=True)
            m.d.sync += product.eq(activations[lane] * active[lane])
            terms.append(product)
        # A tree and not sum(): the chain would be as deep as it is long, and its widths grow with every term.
        level = 0
        while len(terms) > 1:
            level += 1
            pairs = []
            for i in range(0, len(terms), 2):
                pair = Signal(range(-56 << level, (64 << level) + 1), name=f"sum{level}_{i // 2}", reset_less=True)
                m.d.sync += pair.eq(terms[i] + terms[i + 1])
                pairs.append(pair)
            terms = pairs
        m.d.comb += self.sum.eq(terms[0])
        return m
