"""Addresses and window coordinates of nested loops, one step per cycle, with one adder per sum and no multiplier."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from amaranth import Cat, Const, Module, Mux, Shape, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from nibblecore.arch.isa import INSTRUCTIONS, LOCAL_ADDR_BITS, Field, Opcode

AXES: Final = ("x", "y")

# How the fields of MAC and POOL are called, by loop; the address steps are `<loop>_step`.
_COUNT_FIELDS: Final = {"ox": "cols", "oy": "rows", "brick": "bricks", "kx": "kernel_x", "ky": "kernel_y"}
_MOVE_FIELDS: Final = {"ox": "stride_x", "oy": "stride_y", "kx": "dilation_x", "ky": "dilation_y"}
_LOOP_AXES: Final[dict[str, Literal["x", "y"]]] = {"ox": "x", "oy": "y", "kx": "x", "ky": "y"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """One level of a nest.

    Parameters
    ----------
    name : str
        Names the members of jobs and steps.
    count_bits : int
        Width of its number of iterations, stored minus 1.
    step_bits : int
        Width of its address step in words; 0 for a loop that does not move the address.
    step_signed : bool
        Whether the step is signed.
    axis : {"x", "y"} or None
        Coordinate that it moves.
    move_bits : int
        Width of its coordinate step, stored minus 1; only with ``axis``.
    """

    name: str
    count_bits: int
    step_bits: int = 0
    step_signed: bool = False
    axis: Literal["x", "y"] | None = None
    move_bits: int = 0

    def __post_init__(self) -> None:
        if self.count_bits < 1:
            raise ValueError(f"count_bits of loop {self.name!r} must be at least 1, not {self.count_bits}")
        if not 0 <= self.step_bits <= LOCAL_ADDR_BITS:
            raise ValueError(f"step_bits of loop {self.name!r} must be in 0..{LOCAL_ADDR_BITS}, not {self.step_bits}")
        if self.axis not in (None, *AXES):
            raise ValueError(f"axis of loop {self.name!r} must be 'x', 'y' or None, not {self.axis!r}")
        if (self.move_bits > 0) != (self.axis is not None):
            raise ValueError(
                f"loop {self.name!r} must have both axis and move_bits or neither, "
                f"not {self.axis!r} and {self.move_bits}"
            )

    @property
    def step_shape(self) -> Shape:
        return Shape(self.step_bits, signed=self.step_signed)


def loops_of(opcode: Opcode, order: Iterable[str]) -> tuple[Loop, ...]:
    """The loops named in ``order`` (``ox, oy, brick, kx, ky``), innermost first, with the widths of MAC or POOL."""
    fields: dict[str, Field] = {f.name: f for f in INSTRUCTIONS[opcode].fields}

    def loop(name: str) -> Loop:
        step = fields[f"{name}_step"]
        move = fields[_MOVE_FIELDS[name]].bits if name in _MOVE_FIELDS else 0
        return Loop(
            name=name,
            count_bits=fields[_COUNT_FIELDS[name]].bits,
            step_bits=step.bits,
            step_signed=step.signed,
            axis=_LOOP_AXES.get(name),
            move_bits=move,
        )

    return tuple(loop(name) for name in order)


def job_layout(loops: Sequence[Loop], *, tag_bits: int = 0) -> data.StructLayout:
    """What a nest is told: a job.

    ``base`` is the address of the first step; ``count_<loop>`` is stored minus 1; ``step_<loop>`` exists where the loop
    moves the address. Where a loop has an axis: ``x0``, ``y0`` are the coordinates of the first step, ``width``,
    ``height`` (stored minus 1) the valid ones, ``move_<loop>`` is stored minus 1. ``tag`` comes back with every step.
    """
    window = {f.name: f for f in INSTRUCTIONS[Opcode.MAC].fields}
    members: dict[str, Shape] = {"base": unsigned(LOCAL_ADDR_BITS)}
    for loop in loops:
        members[f"count_{loop.name}"] = unsigned(loop.count_bits)
        if loop.step_bits:
            members[f"step_{loop.name}"] = loop.step_shape
        if loop.move_bits:
            members[f"move_{loop.name}"] = unsigned(loop.move_bits)
    if any(loop.axis for loop in loops):
        for name in ("x0", "y0", "width", "height"):
            members[name] = Shape(window[name].bits, signed=window[name].signed)
    if tag_bits:
        members["tag"] = unsigned(tag_bits)
    return data.StructLayout(members)


def step_layout(loops: Sequence[Loop], *, tag_bits: int = 0, inner: int = 0) -> data.StructLayout:
    """What a nest says at every step.

    ``addr`` modulo 2**16; ``inside``: both coordinates are valid (always 1 without axes); ``first.<loop>``,
    ``last.<loop>``: this loop is in its first or last iteration, whatever the others are; ``tag`` of the job. With
    ``inner``, ``first_inner``, ``last_inner``: so are all of that many innermost loops; ``first_outer``,
    ``last_outer``: all others.
    """
    flags = data.StructLayout({loop.name: unsigned(1) for loop in loops})
    members: dict[str, Any] = {"addr": unsigned(LOCAL_ADDR_BITS), "inside": unsigned(1), "first": flags, "last": flags}
    if inner:
        members |= {name: unsigned(1) for name in ("first_inner", "last_inner", "first_outer", "last_outer")}
    if tag_bits:
        members["tag"] = unsigned(tag_bits)
    return data.StructLayout(members)


def assign_job(job: data.View, instruction: data.View, loops: Iterable[Loop], *, base: Value) -> list[Any]:
    """Assignments of an instruction's fields to a job, for those ``loops`` and the window; ``base`` to the address.

    Loops without a field of their own (``plane``) and ``tag`` are left to the caller.
    """
    result = [job.base.eq(base)]
    for loop in loops:
        if loop.name in _COUNT_FIELDS:
            result.append(job[f"count_{loop.name}"].eq(instruction[_COUNT_FIELDS[loop.name]]))
            result.append(job[f"step_{loop.name}"].eq(instruction[f"{loop.name}_step"]))
            if loop.move_bits:
                result.append(job[f"move_{loop.name}"].eq(instruction[_MOVE_FIELDS[loop.name]]))
    result.extend(job[name].eq(instruction[name]) for name in ("x0", "y0", "width", "height"))
    return result


def _one_hot_mux(choices: Iterable[tuple[Value, Value]]) -> Value:
    """The unsigned value whose select bit is set; 0 where none is."""
    return functools.reduce(operator.or_, (Mux(select, value, 0) for select, value in choices), Const(0, 1))


def _sign_extend(value: Value, bits: int) -> Value:
    """The two's complement ``value`` in ``bits`` bits, as an unsigned one."""
    return Cat(value, value[-1].replicate(bits - len(value)))[:bits]


class LoopNest(wiring.Component):
    """Runs jobs of nested loops and emits one :func:`step_layout` per iteration of the innermost loop.

    The step with loop indices ``n`` has ``addr = base + sum(n[l] * step[l])`` modulo 2**16 and coordinates
    ``x = x0 + sum(n[l] * (move[l] + 1))`` over the loops of that axis, likewise ``y``; they never wrap. ``inside`` is
    ``0 <= x <= width`` and ``0 <= y <= height``, with both as they are stored.

    One step per cycle, also from one job to the next. From idle, the first step of a job is on ``o`` :attr:`LATENCY`
    cycles after the first cycle with ``job.valid``; ``job.ready`` comes :attr:`HOLD` cycles after that one where
    nothing stalls, and then the next job may follow: every stage takes the fields when it needs them, which saves a
    copy of them. So a job of fewer than ``HOLD + 1`` steps takes ``HOLD + 1`` cycles. ``o`` may stall at any time;
    ``o.ready`` enables the output register only; a step that finds it occupied waits in a spare register, which stops
    all stages before it. A reset abandons all jobs.

    Parameters
    ----------
    loops : sequence of Loop
        Innermost first, with distinct names.
    tag_bits : int
        Width of the job's ``tag``, 0 for none.
    inner : int
        Innermost loops that the joint flags of a step are about, 0 for no such flags.

    Members
    -------
    job : In(stream.Signature(job_layout(loops, tag_bits=tag_bits)))
        The payload must stay while ``valid`` and not ``ready``, as in any stream.
    o : Out(stream.Signature(step_layout(loops, tag_bits=tag_bits, inner=inner)))

    Raises
    ------
    ValueError
        If there is no loop, two have the same name, or ``inner`` is not less than their number.
    """

    LATENCY = 4
    HOLD = 2

    job: Any
    o: Any

    def __init__(self, *, loops: Sequence[Loop], tag_bits: int = 0, inner: int = 0) -> None:
        names = [loop.name for loop in loops]
        if not names:
            raise ValueError("loops must hold at least one loop")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"loops must have distinct names, and {name!r} occurs {names.count(name)} times")
        if not 0 <= inner < len(names):
            raise ValueError(f"inner must be in 0..{len(names) - 1}, not {inner}")
        self._loops = tuple(loops)
        self._inner = inner
        self._tag_bits = tag_bits
        super().__init__(
            {
                "job": In(stream.Signature(job_layout(loops, tag_bits=tag_bits))),
                "o": Out(stream.Signature(step_layout(loops, tag_bits=tag_bits, inner=inner))),
            }
        )

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Innermost first."""
        return self._loops

    def coordinate_bits(self, axis: str) -> int:
        """Bits of a signed coordinate along ``axis`` that no job of these widths overflows."""
        highest = 127 + sum((1 << loop.count_bits) - 1 << loop.move_bits for loop in self._loops if loop.axis == axis)
        return highest.bit_length() + 1

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        loops = self._loops
        levels = range(len(loops))
        job = self.job.payload
        axes = [axis for axis in AXES if any(loop.axis for loop in loops)]
        # All stages move together, bubbles included, when the spare register is free: what says so reaches every
        # register, so it must be one itself.
        spare_valid = Signal()
        moves_on = Signal()
        m.d.comb += moves_on.eq(~spare_valid)

        # Stage 0 counts. `hit` is the loop whose move has led to this step (none: the job begins); `reach` marks it and
        # the loops inside it, whose indices are 0 again.
        counts_valid = Signal()
        begins = Signal()
        taken = Signal()
        offered = Signal()
        # What comes next in stage 0 is a job's first step: this one is the last one of its job, or there is none. As a
        # register, because it reaches every bit of the stage.
        from_job = Signal(init=1)
        ends_next = Signal(len(loops))
        hit = Signal(len(loops), reset_less=True)
        reach = Signal(len(loops), reset_less=True)
        first = Signal(len(loops), reset_less=True)
        last = Signal(len(loops), reset_less=True)
        single = Signal(len(loops), reset_less=True)
        counts = [Signal(loop.count_bits, name=f"count_{loop.name}", reset_less=True) for loop in loops]
        left = [Signal(loop.count_bits, name=f"left_{loop.name}", reset_less=True) for loop in loops]
        roll = Signal(len(loops) + 1)
        m.d.comb += [
            roll.eq(Cat(1, *(last[: level + 1].all() for level in levels))),
            offered.eq(self.job.valid & ~taken),
            ends_next.eq(
                Cat(
                    Mux(roll[level], Mux(last[level], single[level], left[level] == 1), last[level]) for level in levels
                )
            ),
        ]
        # Behind the last step these take a job's fields whether one is there or not, as that is known later.
        with m.If(from_job & (moves_on | ~counts_valid)):
            m.d.sync += [counts_valid.eq(offered), begins.eq(1), hit.eq(0), reach.eq(~0), first.eq(~0)]
            m.d.sync += from_job.eq(~offered | Cat(job[f"count_{loop.name}"] == 0 for loop in loops).all())
            with m.If(offered):
                m.d.sync += taken.eq(1)
            for level, loop in enumerate(loops):
                count = job[f"count_{loop.name}"]
                m.d.sync += [
                    counts[level].eq(count),
                    left[level].eq(count),
                    single[level].eq(count == 0),
                    last[level].eq(count == 0),
                ]
        with m.Elif(moves_on):
            m.d.sync += [begins.eq(0), from_job.eq(ends_next.all())]
            for level in levels:
                m.d.sync += [hit[level].eq(roll[level] & ~last[level]), reach[level].eq(roll[level])]
                with m.If(roll[level]):
                    with m.If(last[level]):
                        m.d.sync += [left[level].eq(counts[level]), first[level].eq(1), last[level].eq(single[level])]
                    with m.Else():
                        m.d.sync += [
                            left[level].eq(left[level] - 1),
                            first[level].eq(0),
                            last[level].eq(left[level] == 1),
                        ]

        # Stage 1 chooses what to add. These fields are taken as the first step of the job, which adds nothing, passes.
        choice_valid = Signal()
        choice_begins = Signal()
        choice_starts = Signal()  # choice_valid & choice_begins
        choice_hit = Signal.like(hit)
        choice_reach = Signal.like(reach)
        choice_first = Signal.like(first)
        choice_last = Signal.like(last)
        begin_passes = Signal()
        m.d.comb += begin_passes.eq(moves_on & counts_valid & begins)
        with m.If(moves_on):
            m.d.sync += [
                choice_valid.eq(counts_valid),
                choice_begins.eq(begins),
                choice_starts.eq(counts_valid & begins),
                choice_hit.eq(hit),
                choice_reach.eq(reach),
                choice_first.eq(first),
                choice_last.eq(last),
            ]

        # Stage 2 adds; there the last fields are taken, and the job is done with.
        total_valid = Signal()
        total_first = Signal.like(first)
        total_last = Signal.like(last)
        release = Signal()
        m.d.comb += [release.eq(moves_on & choice_starts), self.job.ready.eq(release)]
        with m.If(release):
            m.d.sync += taken.eq(0)
        with m.If(moves_on):
            m.d.sync += [total_valid.eq(choice_valid), total_first.eq(choice_first), total_last.eq(choice_last)]

        def running_sum(name: str, bits: int, start: Value, steps: dict[int, Value], *, one_more: bool) -> Signal:
            """``start``, plus a step (and one) per move of the loops that are keys of ``steps``."""
            origin = Signal(bits, name=f"{name}_origin", reset_less=True)
            fields = {
                level: Signal(step.shape(), name=f"{name}_step_{loops[level].name}", reset_less=True)
                for level, step in steps.items()
            }
            wide = {
                level: _sign_extend(field, bits) if field.shape().signed else field for level, field in fields.items()
            }
            step = Signal(max(map(len, wide.values()), default=0), name=f"{name}_step", reset_less=True)
            moves = Signal(name=f"{name}_moves", reset_less=True)
            with m.If(begin_passes):
                m.d.sync += origin.eq(_sign_extend(start, bits) if start.shape().signed else start)
                m.d.sync += [field.eq(steps[level]) for level, field in fields.items()]
            with m.If(moves_on):
                m.d.sync += step.eq(_one_hot_mux((hit[level], value) for level, value in wide.items()))
                if one_more:
                    m.d.sync += moves.eq(Cat(hit[level] for level in fields).any())

            # Where the sum stands whenever a loop moves: one state per loop that adds to it, taken from the loop that
            # moves, or from the next one around it; all loops in reach then start from the new sum.
            state = {level: Signal(bits, name=f"{name}_{loops[level].name}", reset_less=True) for level in fields}
            result = Signal(bits, name=name, reset_less=True)
            if 0 in state:
                state[0] = result
            stands = [state[min(outer)] if (outer := [n for n in state if n >= level]) else origin for level in levels]
            total = Signal(bits, name=f"{name}_total")
            stand = _one_hot_mux([(choice_begins, origin), *((choice_hit[n], stands[n]) for n in levels)])
            # The carry enters below bit 0, because a third addend would become an adder of its own.
            m.d.comb += total.eq((Cat(1, stand) + Cat(moves, step))[1:])
            with m.If(moves_on & choice_valid):
                m.d.sync += result.eq(total)
                for level in state:
                    if level:
                        with m.If(choice_reach[level]):
                            m.d.sync += state[level].eq(total)
            return result

        found = Signal(self.o.payload.shape())
        if self._inner:
            for name, flags in (("first", choice_first), ("last", choice_last)):
                for where, part in (("inner", flags[: self._inner]), ("outer", flags[self._inner :])):
                    flag = Signal(name=f"total_{name}_{where}")
                    with m.If(moves_on):
                        m.d.sync += flag.eq(part.all())
                    m.d.comb += found[f"{name}_{where}"].eq(flag)
        address = running_sum(
            "address",
            LOCAL_ADDR_BITS,
            job.base,
            {n: job[f"step_{loop.name}"] for n, loop in enumerate(loops) if loop.step_bits},
            one_more=False,
        )
        inside: Value = Const(1, 1)
        for axis in axes:
            moves = {n: job[f"move_{loop.name}"] for n, loop in enumerate(loops) if loop.axis == axis}
            coordinate = running_sum(axis, self.coordinate_bits(axis), job[f"{axis}0"], moves, one_more=True)
            size = job["width" if axis == "x" else "height"]
            limit = Signal(size.shape(), name=f"{axis}_limit", reset_less=True)
            with m.If(release):
                m.d.sync += limit.eq(size)
            inside = inside & (coordinate <= limit)  # unsigned: negative coordinates are large
        if self._tag_bits:
            tag = Signal(self._tag_bits, reset_less=True)
            with m.If(release):
                m.d.sync += tag.eq(job.tag)
            m.d.comb += found.tag.eq(tag)

        # Stage 3 compares, into the output register or, when that is held up, into the spare one beside it.
        spare = Signal.like(found, reset_less=True)
        output = Signal.like(found, reset_less=True)
        output_valid = Signal()
        m.d.comb += [
            found.addr.eq(address),
            found.inside.eq(inside),
            found.first.eq(total_first),
            found.last.eq(total_last),
            self.o.payload.eq(output),
            self.o.valid.eq(output_valid),
        ]
        with m.If(moves_on):
            m.d.sync += [spare.eq(found), spare_valid.eq(total_valid & output_valid & ~self.o.ready)]
        with m.Elif(self.o.ready):
            m.d.sync += spare_valid.eq(0)
        with m.If(~output_valid | self.o.ready):
            m.d.sync += [output.eq(Mux(spare_valid, spare, found)), output_valid.eq(spare_valid | total_valid)]
        return m

    @staticmethod
    def model(loops: Sequence[Loop], job: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        """The steps of a job, as dicts of :func:`step_layout`; ``job`` holds the fields of :func:`job_layout`."""
        axes = [axis for axis in AXES if any(loop.axis for loop in loops)]
        totals = [job[f"count_{loop.name}"] + 1 for loop in loops]
        for outer_first in itertools.product(*(range(total) for total in reversed(totals))):
            index = tuple(reversed(outer_first))
            address, position = job["base"], {axis: job[f"{axis}0"] for axis in axes}
            for n, loop in zip(index, loops, strict=True):
                address += n * job[f"step_{loop.name}"] if loop.step_bits else 0
                if loop.axis:
                    position[loop.axis] += n * (job[f"move_{loop.name}"] + 1)
            sizes = {"x": "width", "y": "height"}
            yield {
                "addr": address % (1 << LOCAL_ADDR_BITS),
                "inside": int(all(0 <= position[axis] <= job[sizes[axis]] for axis in axes)),
                "first": {loop.name: int(n == 0) for n, loop in zip(index, loops, strict=True)},
                "last": {loop.name: int(n == total - 1) for n, total, loop in zip(index, totals, loops, strict=True)},
            } | ({"tag": job["tag"]} if "tag" in job else {})
