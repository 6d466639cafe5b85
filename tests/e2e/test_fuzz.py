"""Random networks: integer graph = golden model = RTL, with stalls; the seed is in the failure message."""

import pytest

from nibblecore.arch.config import ARCHS
from nibblecore_sim.fuzz import FUZZ_ARCHS, run_case
from nibblecore_sim.toolchain import has_icarus
from nibblecore_sim.transport import SimTransport

CASES = 80


@pytest.mark.cosim
@pytest.mark.parametrize("name", FUZZ_ARCHS)
def test_random_networks_on_rtl(name: str) -> None:
    with SimTransport(FUZZ_ARCHS[name]) as rtl:
        cases = [run_case(FUZZ_ARCHS[name], seed, rtl) for seed in range(1000, 1000 + CASES)]
    assert [c for c in cases if c.mismatch] == []
    # The compiler may refuse a case, with a reason; if it refused most of them, this would test nothing.
    assert sum(not c.refused for c in cases) > CASES * 3 // 4
    # By its own counter, or where it has none by the simulation's.
    assert [c for c in cases if not c.refused and c.cycles <= 0] == []


@pytest.mark.cosim
@pytest.mark.skipif(not has_icarus(), reason="Icarus is not installed")
@pytest.mark.parametrize(("name", "seeds"), [("fuzz-square", (1, 4, 8, 10)), ("fuzz-sequential", (1, 2, 4))])
def test_second_simulator_agrees(name: str, seeds: tuple[int, ...]) -> None:
    """Icarus knows unknown values: nothing of the core may depend on what a register or memory holds at power-up."""
    arch = FUZZ_ARCHS[name]
    with SimTransport(arch, simulator="icarus", memory_bytes=1 << 20) as rtl:
        cases = [run_case(arch, seed, rtl) for seed in seeds]
    assert [c for c in cases if c.mismatch or c.refused] == []


@pytest.mark.parametrize("name", ARCHS)
def test_random_networks_on_the_golden_model(name: str) -> None:
    cases = [run_case(ARCHS[name], seed) for seed in range(2000, 2012)]
    assert [c for c in cases if c.mismatch] == []
    assert sum(not c.refused for c in cases) > 6
