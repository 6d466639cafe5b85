"""Requantization lanes: sums to 8-bit codes, with a stored code added on a second pass. No backpressure."""

from amaranth import Cat, Const, Module, Mux, Shape, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch import numerics
from nibblecore.arch.numerics import ADD_FACTOR_BITS, BIAS_BITS, MULT_BITS, SHIFT_MAX

from ..registers import delayed
from ..technology import check_technology
from .multiply import Multiplier

__all__ = ["CODE_BITS", "DIFFERENCE_BITS", "RequantLane", "RoundShiftClamp"]

CODE_BITS = 8
"""Width of codes, zero points and clamps inside the post unit; 4-bit codes are clamped to -8..7 by the program."""

DIFFERENCE_BITS = CODE_BITS + 1
"""Width of a code less its zero point."""

_LOW_BITS = 16
"""The 32-bit operand of the requantization is split here: 16 signed bits above, 16 unsigned ones below, so that each
part times the 18-bit multiplier is one signed 18x18 product."""


class RoundShiftClamp(wiring.Component):
    """``clamp(zero + ((value + 2**(shift-1)) >> shift), low, high)``, :attr:`LATENCY` cycles behind ``value``.

    The shift is arithmetic, ties go towards +inf. Everything may change every cycle: ``shift`` comes with ``value``,
    ``zero`` :attr:`ZERO_LATENCY` cycles behind them, ``low`` and ``high`` :attr:`CLAMP_LATENCY` cycles behind them, as
    all lanes get these alike and one register is enough for them.

    Parameters
    ----------
    value_bits : int
        Width of ``value``, at least 11.
    shift_max : int
        Largest ``shift``, 2..63.

    Members
    -------
    value : In(signed(value_bits))
        What is shifted.
    shift : In
        1..shift_max.
    zero : In(signed(8))
        Zero point.
    low, high : In(signed(9))
        Clamp; ``low`` must not be above ``high``.
    out : Out(signed(9))
        The code.

    Raises
    ------
    ValueError
        For a parameter outside its range.
    """

    # With t = value >> (shift-1), the rounded quotient is (t >> 1) + t[0]: the rounding constant is a carry-in and no
    # shifter of its own. The result leaves the range of every clamp as soon as t leaves 10 bits, so each stage of the
    # shifter keeps only what the later ones can still bring into these 10 bits, and notes whether anything else was
    # dropped.

    LATENCY = 5
    ZERO_LATENCY = 2
    CLAMP_LATENCY = 3

    value: Signal
    shift: Signal
    zero: Signal
    low: Signal
    high: Signal
    out: Signal

    def __init__(self, *, value_bits: int, shift_max: int) -> None:
        if value_bits <= self.WINDOW:
            raise ValueError(f"value_bits must be at least {self.WINDOW + 1}, not {value_bits!r}")
        if not 2 <= shift_max <= 63:
            raise ValueError(f"shift_max must be in 2..63, not {shift_max!r}")
        code = signed(DIFFERENCE_BITS)
        super().__init__(
            {
                "value": In(signed(value_bits)),
                "shift": In(range(shift_max + 1)),
                "zero": In(signed(CODE_BITS)),
                "low": In(code),
                "high": In(code),
                "out": Out(code),
            }
        )

    WINDOW = CODE_BITS + 2
    """Bits of t: quotients within the sum of two 8-bit ranges, and the bit that rounds."""

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # t = (2*value) >> shift needs no shift-1.
        value: Value = Cat(Const(0, 1), self.value).as_signed()
        dropped: Value = Const(0, 1)
        shift: Value = self.shift
        middle = len(shift) // 2
        for bit in reversed(range(len(shift))):
            # Lower bits can still shift by 2**bit - 1.
            value, dropped = self.halve(m, value, dropped, shift[bit], 1 << bit, keep=self.WINDOW + (1 << bit) - 1)
            if bit in (middle, 0):
                value_r = Signal(value.shape(), name=f"shifted_{bit}", reset_less=True)
                dropped_r = Signal(name=f"dropped_{bit}", reset_less=True)
                shift_r = Signal(bit, name=f"shift_{bit}", reset_less=True)
                m.d.sync += [value_r.eq(value), dropped_r.eq(dropped), shift_r.eq(shift[:bit])]
                value, dropped, shift = value_r, dropped_r, shift_r

        # |quotient| <= 2**9/2 and |zero| <= 2**7: the sum has as many bits as the window.
        moved = Signal(signed(self.WINDOW), reset_less=True)
        dropped_m = Signal(reset_less=True)
        negative_m = Signal(reset_less=True)
        m.d.sync += [
            moved.eq(value[1:].as_signed() + self.zero + value[0]),
            dropped_m.eq(dropped),
            negative_m.eq(value[-1]),
        ]
        below, above = Signal(reset_less=True), Signal(reset_less=True)
        m.d.sync += [
            below.eq(Mux(dropped_m, negative_m, moved < self.low)),
            above.eq(Mux(dropped_m, ~negative_m, moved > self.high)),
        ]
        inside = delayed(m, moved[:DIFFERENCE_BITS].as_signed(), 1, "inside")
        low, high = delayed(m, self.low, 1, "low"), delayed(m, self.high, 1, "high")
        out = Signal.like(self.out, reset_less=True)
        m.d.sync += out.eq(Mux(below, low, Mux(above, high, inside)))
        m.d.comb += self.out.eq(out)
        return m

    @staticmethod
    def halve(m: Module, value: Value, dropped: Value, by: Value, amount: int, *, keep: int) -> tuple[Value, Value]:
        """One stage of the shifter: the low ``keep`` bits of ``value >> amount`` or ``value``, the top one the sign."""
        n, sign = len(value), value[-1]

        def differ(start: int, stop: int) -> Value:
            """Whether any of these bits is not the sign. Written so that a LUT takes three of them and the sign."""
            start, stop = min(start, n - 1), min(stop, n - 1)
            return (value[start:stop] ^ sign.replicate(stop - start)).any() if start < stop else Const(0, 1)

        shifted = Signal(signed(min(keep, n)), name=f"stage_{amount}")
        lost = Signal(name=f"lost_{amount}")
        width = len(shifted) - 1
        straight = Cat(value[:width], sign)
        moved = Cat(value[amount : amount + width], *[sign] * (width - max(0, min(width, n - amount))), sign)
        m.d.comb += [
            shifted.eq(Mux(by, moved, straight)),
            lost.eq(dropped | differ(amount + keep - 1, n) | (differ(keep - 1, amount + keep - 1) & ~by)),
        ]
        return shifted, lost

    @staticmethod
    def model(value: int, shift: int, zero: int, low: int, high: int) -> int:
        """``out`` for one set of inputs."""
        return int(numerics.clamp(numerics.rounding_shift(value, shift) + zero, low, high))


class RequantLane(wiring.Component):
    """``clamp((((acc + bias) * mult + 2**(shift-1)) >> shift) + zero, low, high)``, :attr:`LATENCY` cycles behind.

    An accumulator enters in any cycle, and its record (``bias``, ``mult``, ``shift``) :attr:`RECORD_LATENCY` cycles
    behind it. ``acc + bias`` wraps at 32 bits; programs guarantee that it fits. Takes two 18x18 multipliers.

    With ``add`` that is the first of two passes through the same multipliers and the same shifter. It leaves the code
    without its zero point, ``q - zero_a``: the caller gives ``first_low = low_a - zero_a`` and ``first_high = high_a -
    zero_a``, and no zero point is added. The second pass begins :attr:`AGAIN_LATENCY` cycles behind ``acc``, with
    ``again``; no accumulator can enter in that cycle. Its record is that of :meth:`add_record`. The stored operand
    ``b`` comes a cycle behind ``again``, and :attr:`LATENCY` cycles behind it, ``code`` is

    ``clamp(zero + (((q - zero_a)*k_a + (b - zero_b)*k_b + 2**(n-1)) >> n), low, high)``

    As it begins an odd number of cycles behind the first one, accumulators that enter every second cycle never meet a
    second pass. ``add``, ``zero``, ``low``, ``high``, ``first_low``, ``first_high`` and ``zero_b`` have to stand from
    the cycle in which ``acc`` enters to that of the last ``code``.

    Parameters
    ----------
    acc_bits : int
        Width of an accumulator, 24..32.
    technology : {"generic", "ecp5"}
        Primitives that may be instantiated.

    Members
    -------
    acc : In(signed(acc_bits))
        Accumulator.
    bias : In(signed(32))
        Added to it.
    mult : In(signed(18))
        Multiplier, of either sign.
    shift : In(unsigned(6))
        1..47.
    zero, low, high : In(signed(8))
        Zero point and clamp of the code that leaves the lane at last; ``low`` must not be above ``high``.
    add : In(1)
        Codes take two passes.
    again : In(1)
        A second pass begins.
    b : In(signed(8))
        Stored code.
    first_low, first_high : In(signed(9))
        Clamp of the first pass, less the zero point of ``acc``'s code.
    zero_b : In(signed(8))
        Zero point of ``b``.
    sum : Out(signed(32))
        ``acc + bias``, :attr:`SUM_LATENCY` cycles behind ``acc``.
    code : Out(signed(9))
        The stored code, within 8 bits; behind the first of two passes, the code less its zero point.

    Raises
    ------
    ValueError
        For ``acc_bits`` outside its range, or an unknown technology.
    """

    LATENCY = 5 + RoundShiftClamp.LATENCY
    AGAIN_LATENCY = LATENCY - 1
    RECORD_LATENCY = 1
    SUM_LATENCY = 2

    acc: Signal
    bias: Signal
    mult: Signal
    shift: Signal
    zero: Signal
    low: Signal
    high: Signal
    add: Signal
    again: Signal
    b: Signal
    first_low: Signal
    first_high: Signal
    zero_b: Signal
    sum: Signal
    code: Signal

    def __init__(self, *, acc_bits: int, technology: str = "generic") -> None:
        if not 24 <= acc_bits <= 32:
            raise ValueError(f"acc_bits must be in 24..32, not {acc_bits!r}")
        self._technology = check_technology(technology)
        code, difference = signed(CODE_BITS), signed(DIFFERENCE_BITS)
        super().__init__(
            {
                "acc": In(signed(acc_bits)),
                "bias": In(signed(BIAS_BITS)),
                "mult": In(signed(MULT_BITS)),
                "shift": In(range(SHIFT_MAX + 1)),
                "zero": In(code),
                "low": In(code),
                "high": In(code),
                "add": In(1),
                "again": In(1),
                "b": In(code),
                "first_low": In(difference),
                "first_high": In(difference),
                "zero_b": In(code),
                "sum": Out(Shape(BIAS_BITS, signed=True)),
                "code": Out(difference),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.round = round_ = RoundShiftClamp(value_bits=BIAS_BITS + MULT_BITS, shift_max=SHIFT_MAX)

        again: list[Value] = [self.again]
        for i in range(1, self.LATENCY - 1):
            stage = Signal(name=f"again_{i}", reset_less=True)
            m.d.sync += stage.eq(again[-1])
            again.append(stage)

        # On the second pass the factors of the addition are the bias of nothing, as a register costs no LUT to reset,
        # and the differences take the place of the multiplier.
        acc, sum_ = Signal(self.acc.shape(), reset_less=True), Signal.like(self.sum, reset_less=True)
        m.d.sync += [acc.eq(self.acc), sum_.eq(acc + self.bias)]
        m.d.comb += self.sum.eq(sum_)
        with m.If(self.again):
            m.d.sync += acc.eq(0)
        mult = delayed(m, self.mult, 1, "mult")
        a = delayed(m, self.code, 1, "a")
        b = Signal(signed(DIFFERENCE_BITS), reset_less=True)
        m.d.sync += b.eq(self.b - self.zero_b)
        low = m.submodules.low = Multiplier(product_bits=_LOW_BITS + MULT_BITS, technology=self._technology)
        high = m.submodules.high = Multiplier(
            product_bits=BIAS_BITS - _LOW_BITS + MULT_BITS, technology=self._technology
        )
        m.d.comb += [
            low.left.eq(Cat(self.sum[:_LOW_BITS], self.sum[_LOW_BITS - 1] & again[2]).as_signed()),
            high.left.eq(self.sum[_LOW_BITS:].as_signed()),
            low.right.eq(Mux(again[2], b, mult)),
            high.right.eq(Mux(again[2], a, mult)),
        ]
        low_product, high_product = low.product, high.product
        product = Signal(signed(BIAS_BITS + MULT_BITS), reset_less=True)
        # The sum of the second pass stands _LOW_BITS higher, where the two products of the first one are added. What
        # is below it does not count, as its shift is at least 1. Its products fit 24 bits: a difference is within
        # -255..255.
        lower = Mux(
            again[4], low_product[: DIFFERENCE_BITS + ADD_FACTOR_BITS].as_signed(), low_product[_LOW_BITS:].as_signed()
        )
        m.d.sync += product.eq(Cat(low_product[:_LOW_BITS], high_product + lower))

        # Registers that are alike in all lanes become one.
        zero = Signal(signed(CODE_BITS), reset_less=True)
        least, most = (Signal(signed(DIFFERENCE_BITS), name=name, reset_less=True) for name in ("least", "most"))
        first_zero = self.add & ~again[4 + RoundShiftClamp.ZERO_LATENCY]
        first_clamp = self.add & ~again[4 + RoundShiftClamp.CLAMP_LATENCY]
        m.d.sync += [
            zero.eq(Mux(first_zero, 0, self.zero)),
            least.eq(Mux(first_clamp, self.first_low, self.low)),
            most.eq(Mux(first_clamp, self.first_high, self.high)),
        ]
        m.d.comb += [
            round_.value.eq(product),
            round_.shift.eq(delayed(m, self.shift, 5 - self.RECORD_LATENCY, "shift")),
            round_.zero.eq(zero),
            round_.low.eq(least),
            round_.high.eq(most),
            self.code.eq(round_.out),
        ]
        return m

    @staticmethod
    def add_record(k_a: Value, k_b: Value, n: Value) -> tuple[Value, Value]:
        """``bias`` and ``shift`` of the second pass, whose ``mult`` does not count, with signed 16-bit factors."""
        return Cat(k_b, k_a), (n + _LOW_BITS)[: SHIFT_MAX.bit_length()]

    @staticmethod
    def model(acc: int, bias: int, mult: int, shift: int, zero: int, low: int, high: int) -> int:
        """``code`` for one set of inputs, without ``add``."""
        return int(numerics.clamp(numerics.requantize(acc, bias, mult, shift) + zero, low, high))

    @staticmethod
    def model_sum(acc: int, bias: int) -> int:
        """``sum`` for one set of inputs."""
        return int(numerics.wrap(acc + bias, BIAS_BITS))

    @staticmethod
    def model_add(
        a: int,
        b: int,
        *,
        zero_a: int,
        zero_b: int,
        k_a: int,
        k_b: int,
        n: int,
        zero: int,
        low: int,
        high: int,
    ) -> int:
        """``code`` behind the second pass; ``a`` is what the first one would have left with its zero point."""
        return int(
            numerics.residual_add(
                a, b, zero_a=zero_a, zero_b=zero_b, k_a=k_a, k_b=k_b, n=n, zero=zero, low=low, high=high
            )
        )
