"""A scan chain around a component, so that place and route can measure a core that has more ports than a chip pins."""

from typing import Any

from amaranth import Cat, Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class ScanHarness(wiring.Component):
    """Every input port of ``component`` is a bit of a shift register, every output is captured into another one.

    Nothing of the component can be optimized away, and no path crosses the harness combinationally. It costs one
    flip-flop per port bit and one LUT per output bit.

    Parameters
    ----------
    component : wiring.Component
        The circuit to measure.
    """

    scan_in: Signal
    capture: Signal
    scan_out: Signal

    def __init__(self, component: Any) -> None:
        self.component = component
        super().__init__({"scan_in": In(1), "capture": In(1), "scan_out": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.core = self.component
        inputs: list[Value] = []
        outputs: list[Value] = []
        for _, member, port in self.component.signature.flatten(self.component):
            (inputs if member.flow is In else outputs).append(Value.cast(port))
        source = Signal(sum(len(p) for p in inputs), reset_less=True)
        sink = Signal(sum(len(p) for p in outputs), reset_less=True)
        m.d.sync += source.eq(Cat(self.scan_in, source))
        m.d.comb += Cat(inputs).eq(source)
        with m.If(self.capture):
            m.d.sync += sink.eq(Cat(outputs))
        with m.Else():
            m.d.sync += sink.eq(Cat(source[-1], sink))
        m.d.comb += self.scan_out.eq(sink[-1])
        return m
