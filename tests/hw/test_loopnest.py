# amaranth: UnusedElaboratable=no
"""The loop nest against its model: addresses, coordinates, flags, cycles."""

import random
import re
from typing import Any

import pytest
from amaranth.sim import Simulator

from nibblecore.arch.isa import Opcode
from nibblecore_hw.core.loopnest import Loop, LoopNest, loops_of

MAC_LOOPS = loops_of(Opcode.MAC, ("ox", "oy", "brick", "kx", "ky"))
_KX, _KY, _OX, _OY, _BRICK = loops_of(Opcode.POOL, ("kx", "ky", "ox", "oy", "brick"))
POOL_LOOPS = (_KX, _KY, Loop(name="plane", count_bits=1, step_bits=1), _OX, _OY, _BRICK)
COPY_LOOPS = (Loop(name="word", count_bits=2), Loop(name="row", count_bits=3, step_bits=4))
NESTS = {"mac": (MAC_LOOPS, 8), "pool": (POOL_LOOPS, 3), "copy": (COPY_LOOPS, 0)}


def random_job(rng: random.Random, nest: LoopNest) -> dict[str, int]:
    job: dict[str, int] = {}
    for name, field in nest.job.payload.shape():
        shape = field.shape
        low = -(1 << shape.width - 1) if shape.signed else 0
        high = low + (1 << shape.width) - 1
        if name.startswith("count_"):
            high = rng.choice([0, min(high, 2), min(high, 4)])
        elif name in ("width", "height"):
            high = rng.choice([3, 12, high])
        elif name in ("x0", "y0"):
            low, high = rng.choice([(-6, 6), (low, high)])
        job[name] = rng.randint(low, high)
    return job


def run(
    nest: LoopNest,
    jobs: list[dict[str, int]],
    *,
    rng: random.Random | None = None,
    gap: bool = False,
) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """All steps, the cycles of their transfers, and those of the jobs' transfers; ``rng`` makes both sides stall."""
    sim = Simulator(nest)
    sim.add_clock(1e-6)
    steps: list[dict[str, Any]] = []
    step_cycles: list[int] = []
    job_cycles: list[int] = []
    expected = sum(len(list(nest.model(nest.loops, job))) for job in jobs)

    async def bench(ctx: Any) -> None:
        waiting = list(jobs)
        offered = False
        for cycle in range(40 * expected + 400):
            if waiting and not offered and not (gap and rng and rng.random() < 0.7):
                ctx.set(nest.job.payload, waiting[0])
                offered = True
            ctx.set(nest.job.valid, offered)
            ctx.set(nest.o.ready, 1 if rng is None else rng.random() < 0.5)
            _, _, took, valid, ready, payload = await ctx.tick().sample(
                nest.job.ready, nest.o.valid, nest.o.ready, nest.o.payload
            )
            if took:
                assert offered, "job.ready without job.valid"
                job_cycles.append(cycle)
                del waiting[0]
                offered = False
            if valid and ready:
                names = [loop.name for loop in nest.loops]
                steps.append(
                    {
                        "addr": payload.addr,
                        "inside": payload.inside,
                        "first": {n: payload.first[n] for n in names},
                        "last": {n: payload.last[n] for n in names},
                    }
                    | {n: payload[n] for n in dict(payload.shape()) if n == "tag" or n.endswith(("inner", "outer"))}
                )
                step_cycles.append(cycle)
            if len(steps) >= expected and cycle > step_cycles[-1] + 20:
                break  # long enough to see steps that nobody asked for
        assert not waiting, f"{len(waiting)} jobs were not taken"

    sim.add_testbench(bench)
    sim.run()
    return steps, step_cycles, job_cycles


@pytest.mark.parametrize("kind", NESTS)
@pytest.mark.parametrize("seed", range(4))
def test_steps_equal_the_model(kind: str, seed: int) -> None:
    rng = random.Random(f"{kind}-{seed}")
    loops, tag_bits = NESTS[kind]
    nest = LoopNest(loops=loops, tag_bits=tag_bits, inner=seed % len(loops))
    jobs = [random_job(rng, nest) for _ in range(12)]
    steps, _, _ = run(nest, jobs, rng=rng if seed % 2 else None, gap=seed == 3)
    if seed % len(loops):
        for step in steps:
            joint = {name: step.pop(name) for name in ("first_inner", "last_inner", "first_outer", "last_outer")}
            for name in ("first", "last"):
                flags = list(step[name].values())
                assert joint[f"{name}_inner"] == all(flags[: seed % len(loops)]), f"{kind} seed={seed}"
                assert joint[f"{name}_outer"] == all(flags[seed % len(loops) :]), f"{kind} seed={seed}"
    assert steps == [step for job in jobs for step in nest.model(loops, job)], f"{kind} seed={seed}"


def test_first_step_comes_after_latency_and_one_step_per_cycle() -> None:
    rng = random.Random(5)
    nest = LoopNest(loops=MAC_LOOPS, tag_bits=8)
    jobs = [random_job(rng, nest) | {"count_ox": n, "count_ky": 2} for n in (0, 3, 1, 4)]
    steps, step_cycles, job_cycles = run(nest, jobs)
    assert step_cycles == list(range(nest.LATENCY, nest.LATENCY + len(steps)))
    assert job_cycles[0] == nest.HOLD


def test_short_jobs_take_the_cycles_of_their_fields() -> None:
    rng = random.Random(6)
    nest = LoopNest(loops=COPY_LOOPS)
    jobs = [random_job(rng, nest) | {"count_word": 0, "count_row": 0} for _ in range(5)]
    _, step_cycles, _ = run(nest, jobs)
    assert step_cycles == [nest.LATENCY + n * (nest.HOLD + 1) for n in range(5)]


def test_coordinates_do_not_wrap() -> None:
    nest = LoopNest(loops=MAC_LOOPS)
    highest = 127 + 1023 * 16 + 63 * 32
    assert highest < 1 << nest.coordinate_bits("x") - 1


def test_errors() -> None:
    def refuses(text: str) -> Any:
        return pytest.raises(ValueError, match=f"^{re.escape(text)}$")

    with refuses("count_bits of loop 'a' must be at least 1, not 0"):
        Loop(name="a", count_bits=0)
    with refuses("step_bits of loop 'a' must be in 0..16, not 17"):
        Loop(name="a", count_bits=1, step_bits=17)
    with refuses("axis of loop 'a' must be 'x', 'y' or None, not 'z'"):
        Loop(name="a", count_bits=1, axis="z", move_bits=1)  # type: ignore[arg-type]
    with refuses("loop 'a' must have both axis and move_bits or neither, not 'x' and 0"):
        Loop(name="a", count_bits=1, axis="x")
    with refuses("loops must hold at least one loop"):
        LoopNest(loops=())
    with refuses("inner must be in 0..0, not 1"):
        LoopNest(loops=(Loop(name="a", count_bits=1),), inner=1)
    with refuses("loops must have distinct names, and 'a' occurs 2 times"):
        LoopNest(loops=(Loop(name="a", count_bits=1), Loop(name="a", count_bits=2)))
