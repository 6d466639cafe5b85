"""Requantization lanes: sums to 8-bit codes, and the residual add behind them. One value per cycle, no backpressure."""

from amaranth import Cat, Const, Module, Mux, Shape, Signal, Value, signed, unsigned
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch import numerics
from nibblecore.arch.numerics import ADD_FACTOR_BITS, ADD_SHIFT_MAX, BIAS_BITS, MULT_BITS, SHIFT_MAX

__all__ = ["CODE_BITS", "RequantLane", "ResidualLane", "RoundShiftClamp", "delayed"]

CODE_BITS = 8
"""Width of codes, zero points and clamps inside the post unit; 4-bit codes are clamped to -8..7 by the program."""

_LOW_BITS = 17
"""The 32-bit operand of the requantization is split here: 15 signed bits above, 17 unsigned ones below, so that each
part times the 18-bit multiplier is one signed 18x18 product."""


def delayed(m: Module, value: Value, cycles: int, name: str) -> Value:
    """``value`` behind ``cycles`` registers without reset, named ``<name>_<n>``."""
    for i in range(1, cycles + 1):
        stage = Signal(value.shape(), name=f"{name}_{i}", reset_less=True)
        m.d.sync += stage.eq(value)
        value = stage
    return value


class RoundShiftClamp(wiring.Component):
    """``clamp(zero + ((value + 2**(shift-1)) >> shift), low, high)``, :attr:`LATENCY` cycles behind ``value``.

    The shift is arithmetic, ties go towards +inf. ``value`` and ``shift`` change every cycle; ``zero``, ``low`` and
    ``high`` are read on the way and have to stand from the cycle of ``value`` to that of ``out``.

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
    zero, low, high : In(signed(8))
        Zero point and clamp; ``low`` must not be above ``high``.
    out : Out(signed(8))
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

    value: Signal
    shift: Signal
    zero: Signal
    low: Signal
    high: Signal
    out: Signal

    def __init__(self, *, value_bits: int, shift_max: int) -> None:
        if value_bits <= self._WINDOW:
            raise ValueError(f"value_bits must be at least {self._WINDOW + 1}, not {value_bits!r}")
        if not 2 <= shift_max <= 63:
            raise ValueError(f"shift_max must be in 2..63, not {shift_max!r}")
        code = signed(CODE_BITS)
        super().__init__(
            {
                "value": In(signed(value_bits)),
                "shift": In(range(shift_max + 1)),
                "zero": In(code),
                "low": In(code),
                "high": In(code),
                "out": Out(code),
            }
        )

    _WINDOW = CODE_BITS + 2
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
            value, dropped = self._halve(m, value, dropped, shift[bit], 1 << bit, keep=self._WINDOW + (1 << bit) - 1)
            if bit in (middle, 0):
                value_r = Signal(value.shape(), name=f"shifted_{bit}", reset_less=True)
                dropped_r = Signal(name=f"dropped_{bit}", reset_less=True)
                shift_r = Signal(bit, name=f"shift_{bit}", reset_less=True)
                m.d.sync += [value_r.eq(value), dropped_r.eq(dropped), shift_r.eq(shift[:bit])]
                value, dropped, shift = value_r, dropped_r, shift_r

        # |quotient| <= 2**9/2 and |zero| <= 2**7: the sum has as many bits as the window.
        moved = Signal(signed(self._WINDOW), reset_less=True)
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
        inside = delayed(m, moved[:CODE_BITS].as_signed(), 1, "inside")
        m.d.sync += self.out.eq(Mux(below, self.low, Mux(above, self.high, inside)))
        return m

    @staticmethod
    def _halve(m: Module, value: Value, dropped: Value, by: Value, amount: int, *, keep: int) -> tuple[Value, Value]:
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

    A new accumulator with its record (``bias``, ``mult``, ``shift``) enters in every cycle. ``acc + bias`` wraps at 32
    bits; programs guarantee that it fits. ``zero``, ``low`` and ``high`` have to stand from the cycle in which ``acc``
    enters to that of ``code``. Takes two 18x18 multipliers.

    Parameters
    ----------
    acc_bits : int
        Width of an accumulator, 24..32.

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
        Zero point and clamp; ``low`` must not be above ``high``.
    sum : Out(signed(32))
        ``acc + bias``, :attr:`SUM_LATENCY` cycles behind ``acc``.
    code : Out(signed(8))
        The stored code.

    Raises
    ------
    ValueError
        For ``acc_bits`` outside its range.
    """

    LATENCY = 4 + RoundShiftClamp.LATENCY
    SUM_LATENCY = 1

    acc: Signal
    bias: Signal
    mult: Signal
    shift: Signal
    zero: Signal
    low: Signal
    high: Signal
    sum: Signal
    code: Signal

    def __init__(self, *, acc_bits: int) -> None:
        if not 24 <= acc_bits <= 32:
            raise ValueError(f"acc_bits must be in 24..32, not {acc_bits!r}")
        code = signed(CODE_BITS)
        super().__init__(
            {
                "acc": In(signed(acc_bits)),
                "bias": In(signed(BIAS_BITS)),
                "mult": In(signed(MULT_BITS)),
                "shift": In(range(SHIFT_MAX + 1)),
                "zero": In(code),
                "low": In(code),
                "high": In(code),
                "sum": Out(Shape(BIAS_BITS, signed=True)),
                "code": Out(code),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.round = round_ = RoundShiftClamp(value_bits=BIAS_BITS + MULT_BITS, shift_max=SHIFT_MAX)

        # The multipliers' operands have registers of their own, which can be placed beside them: those of the sum stay
        # at its carry chain.
        mult = delayed(m, self.mult, 2, "mult")
        total = delayed(m, self.sum, 1, "total")
        low_product = Signal(signed(_LOW_BITS + MULT_BITS), reset_less=True)
        high_product = Signal(signed(BIAS_BITS - _LOW_BITS + MULT_BITS), reset_less=True)
        product = Signal(signed(BIAS_BITS + MULT_BITS), reset_less=True)
        m.d.sync += [
            self.sum.eq(self.acc + self.bias),
            low_product.eq(Cat(total[:_LOW_BITS], Const(0, 1)).as_signed() * mult),
            high_product.eq(total[_LOW_BITS:].as_signed() * mult),
            product.eq(Cat(low_product[:_LOW_BITS], high_product + low_product[_LOW_BITS:].as_signed())),
        ]
        m.d.comb += [
            round_.value.eq(product),
            round_.shift.eq(delayed(m, self.shift, 4, "shift")),
            round_.zero.eq(self.zero),
            round_.low.eq(self.low),
            round_.high.eq(self.high),
            self.code.eq(round_.out),
        ]
        return m

    @staticmethod
    def model(acc: int, bias: int, mult: int, shift: int, zero: int, low: int, high: int) -> int:
        """``code`` for one set of inputs."""
        return int(numerics.clamp(numerics.requantize(acc, bias, mult, shift) + zero, low, high))

    @staticmethod
    def model_sum(acc: int, bias: int) -> int:
        """``sum`` for one set of inputs."""
        return int(numerics.wrap(acc + bias, BIAS_BITS))


class ResidualLane(wiring.Component):
    """``clamp(zero + (((a - zero_a)*k_a + (b - zero_b)*k_b + 2**(n-1)) >> n), low, high)``, :attr:`LATENCY` behind.

    ``a`` and ``b`` enter in every cycle; everything else has to stand from there to the cycle of ``code``. With
    ``k_a = 2``, ``k_b = 0``, ``n = 1`` and ``zero = zero_a`` the lane passes ``a`` on, clamped. Takes two 18x18
    multipliers.

    Members
    -------
    a, b : In(signed(8))
        Stored codes.
    zero_a, zero_b : In(signed(8))
        Their zero points.
    k_a, k_b : In(signed(16))
        Their factors.
    n : In(unsigned(5))
        1..31.
    zero, low, high : In(signed(8))
        Zero point of the sum, and its clamp; ``low`` must not be above ``high``.
    code : Out(signed(8))
        The stored code.
    """

    LATENCY = 4 + RoundShiftClamp.LATENCY

    a: Signal
    b: Signal
    zero_a: Signal
    zero_b: Signal
    k_a: Signal
    k_b: Signal
    n: Signal
    zero: Signal
    low: Signal
    high: Signal
    code: Signal

    def __init__(self) -> None:
        code, factor = signed(CODE_BITS), signed(ADD_FACTOR_BITS)
        super().__init__(
            {
                "a": In(code),
                "b": In(code),
                "zero_a": In(code),
                "zero_b": In(code),
                "k_a": In(factor),
                "k_b": In(factor),
                "n": In(unsigned(ADD_SHIFT_MAX.bit_length())),
                "zero": In(code),
                "low": In(code),
                "high": In(code),
                "code": Out(code),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # A difference is within -255..255, its product within 24 bits.
        product_bits = CODE_BITS + ADD_FACTOR_BITS
        m.submodules.round = round_ = RoundShiftClamp(value_bits=product_bits + 1, shift_max=ADD_SHIFT_MAX)

        product_a = Signal(signed(product_bits), reset_less=True)
        product_b = Signal(signed(product_bits), reset_less=True)
        total = Signal(signed(product_bits + 1), reset_less=True)
        m.d.sync += [
            product_a.eq(delayed(m, self.a - self.zero_a, 2, "difference_a") * self.k_a),
            product_b.eq(delayed(m, self.b - self.zero_b, 2, "difference_b") * self.k_b),
            total.eq(product_a + product_b),
        ]
        m.d.comb += [
            round_.value.eq(total),
            round_.shift.eq(self.n),
            round_.zero.eq(self.zero),
            round_.low.eq(self.low),
            round_.high.eq(self.high),
            self.code.eq(round_.out),
        ]
        return m

    @staticmethod
    def model(
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
        """``code`` for one set of inputs."""
        return int(
            numerics.residual_add(
                a, b, zero_a=zero_a, zero_b=zero_b, k_a=k_a, k_b=k_b, n=n, zero=zero, low=low, high=high
            )
        )
