import multiprocessing
import os
import re
from pathlib import Path

import pytest
from amaranth import Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nibblecore.errors import SimulationError, ToolchainError
from nibblecore_sim import build
from nibblecore_sim.build import Build, build_icarus, build_verilator, to_verilog
from nibblecore_sim.toolchain import has_icarus

pytestmark = pytest.mark.cosim

BENCH = Path(__file__).with_name("bench_mac.py")


class Multiply(wiring.Component):
    a: Signal
    b: Signal
    product: Signal

    def __init__(self):
        super().__init__({"a": In(signed(4)), "b": In(signed(4)), "product": Out(signed(8))})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.product.eq(self.a * self.b)
        return m


class Mac(wiring.Component):
    a: Signal
    b: Signal
    en: Signal
    acc: Signal

    def __init__(self):
        super().__init__({"a": In(signed(4)), "b": In(signed(4)), "en": In(1), "acc": Out(signed(16))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.multiply = multiply = Multiply()
        m.d.comb += [multiply.a.eq(self.a), multiply.b.eq(self.b)]
        with m.If(self.en):
            m.d.sync += self.acc.eq(self.acc + multiply.product)
        return m


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("mac") / "mac.v"
    file.write_text(to_verilog(Mac(), name="mac"))
    return file


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An empty cache for this run of the tests, so that its first builds are real ones; parallel workers share it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIBBLECORE_CACHE", str(base / "nibblecore-cache"))
        yield build.cache_dir()


@pytest.fixture(scope="module")
def verilated(cache, source):
    return build_verilator("mac", [source])


def test_verilog_is_the_same_every_time_and_names_no_file():
    text = to_verilog(Mac(), name="mac")
    assert text == to_verilog(Mac(), name="mac")
    assert "module mac(" in text
    assert ".py" not in text


def test_bench_passes_in_verilator(verilated, tmp_path):
    results = verilated.run(BENCH, directory=tmp_path, seed=7)
    assert results.passed == ("dot_product/length=1", "dot_product/length=64")
    assert "Seeding Python random module with 7\n" in results.log.read_text()


def test_second_build_comes_from_the_cache(verilated, source, tmp_path):
    elsewhere = tmp_path / "mac.v"
    elsewhere.write_bytes(source.read_bytes())
    again = build_verilator("mac", [elsewhere])
    assert again.cached
    assert again.executable == verilated.executable
    assert sorted(file.name for file in again.directory.iterdir()) == ["build.json", "build.log", "mac"]


def test_failing_test_is_named(verilated, tmp_path):
    with pytest.raises(
        SimulationError, match=r"(?s)^bench_mac: 1 of 3 tests failed:\n    environment: .*\nThe log is "
    ):
        verilated.run(BENCH, directory=tmp_path, env={"NIBBLECORE_TEST_EXPECT": "1"})


def test_environment_reaches_the_bench(verilated, tmp_path):
    results = verilated.run(BENCH, directory=tmp_path, env={"NIBBLECORE_TEST_EXPECT": "0"}, tests=["environment"])
    assert results.passed == ("environment",)


def test_only_ports_are_public_by_default(verilated, tmp_path):
    with pytest.raises(SimulationError, match=r"inside: .*multiply"):
        verilated.run(BENCH, directory=tmp_path, env={"NIBBLECORE_TEST_INSIDE": "1"}, tests=["inside"])


def test_bench_that_cannot_start_says_so(verilated, tmp_path):
    with pytest.raises(SimulationError, match=r"(?s)^no_such_bench stopped before it had results:\n.*No module named"):
        verilated.run("no_such_bench", directory=tmp_path)


def test_bench_without_a_test_is_an_error(verilated, tmp_path):
    with pytest.raises(SimulationError, match=r"^bench_mac ran no test\.\nThe log is .*bench_mac\.log\.$"):
        verilated.run(BENCH, directory=tmp_path, tests=["dot"])


def test_waves_need_a_build_with_waves(verilated, tmp_path):
    with pytest.raises(ValueError, match=r"^waves=True needs a build of mac with waves=True$"):
        verilated.run(BENCH, directory=tmp_path, waves=True)


def test_broken_verilog_is_quoted(cache, tmp_path):
    file = tmp_path / "broken.v"
    file.write_text("module broken(output x); assign y = 1; wire z = ; endmodule\n")
    with pytest.raises(ToolchainError, match=r"^Verilator failed on broken with status 1: %Error: .*broken\.v:1:"):
        build_verilator("broken", [file])
    log = next(cache.glob("logs/verilator-broken-*.log"))
    assert "syntax error" in log.read_text()
    assert not list(cache.glob("verilator/*broken*")), "a failed build must leave nothing to be found"


def test_arguments_are_checked(source, tmp_path):
    with pytest.raises(ValueError, match=r"^threads must be at least 1, not 0$"):
        build_verilator("mac", [source], threads=0)
    with pytest.raises(FileNotFoundError, match=re.escape(f"no such source file: {tmp_path / 'gone.v'}")):
        build_verilator("mac", [tmp_path / "gone.v"])


@pytest.mark.slow
def test_inner_signals_can_be_made_public(cache, source, tmp_path):
    made = build_verilator("mac", [source], public="all", waves=True)
    assert not made.cached
    assert "inside" in made.run(BENCH, directory=tmp_path, env={"NIBBLECORE_TEST_INSIDE": "1"}, waves=True).passed
    assert "$enddefinitions" in (tmp_path / "dump.vcd").read_text()


@pytest.mark.slow
def test_own_harness(cache, source, tmp_path):
    import subprocess

    main = tmp_path / "main.cpp"
    main.write_text(
        """#include <cstdio>
        #include "Vtop.h"
        int main() {
            VerilatedContext context;
            Vtop top{&context};
            top.rst = 0; top.en = 1; top.a = 0xd; top.b = 5;   // -3 * 5
            for (int cycle = 0; cycle < 4; ++cycle) { top.clk = 0; top.eval(); top.clk = 1; top.eval(); }
            std::printf("%d\\n", static_cast<short>(top.acc));
        }"""
    )
    made = build_verilator("mac", [source], harness=[main])
    assert subprocess.run([made.executable], capture_output=True, text=True, check=True).stdout == "-60\n"


@pytest.mark.skipif(not has_icarus(), reason="Icarus is optional and not installed")
def test_bench_passes_in_icarus(cache, source, tmp_path):
    made = build_icarus("mac", [source], waves=True)
    results = made.run(BENCH, directory=tmp_path, env={"NIBBLECORE_TEST_INSIDE": "1"}, waves=True)
    assert results.passed == ("dot_product/length=1", "dot_product/length=64", "inside")
    assert (tmp_path / "mac.fst").stat().st_size > 0
    assert build_icarus("mac", [source], waves=True).cached


def _fake_build(cache, barrier, marks):
    os.environ["NIBBLECORE_CACHE"] = str(cache)

    def compile_(folder, log):
        with marks.open("a") as file:
            file.write("built\n")
        program = folder / "mac"
        program.write_text("program")
        return program

    barrier.wait()
    directory, _ = build._cached("verilator", "mac", {"sources": [["mac.v", "0"]]}, compile_)
    assert (directory / "mac").read_text() == "program"


def test_concurrent_builders_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, marks = context.Barrier(4), tmp_path / "marks"
    workers = [context.Process(target=_fake_build, args=(tmp_path / "cache", barrier, marks)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert marks.read_text() == "built\n"


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NIBBLECORE_CACHE", str(tmp_path / "own"))
    assert build.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("NIBBLECORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_dir() == tmp_path / "xdg" / "nibblecore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / ".cache" / "nibblecore"


def test_old_builds_are_deleted_by_new_ones(cache, source, tmp_path, monkeypatch):
    monkeypatch.setenv("NIBBLECORE_CACHE", str(tmp_path))
    old, recent = tmp_path / "verilator" / "old-0", tmp_path / "verilator" / "recent-0"
    for folder in (old, recent):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    broken = tmp_path / "broken.v"
    broken.write_text("module")
    with pytest.raises(ToolchainError):
        build_verilator("broken", [broken])
    assert not old.exists()
    assert recent.exists()


def test_build_is_a_plain_value(verilated):
    assert isinstance(verilated, Build)
    assert verilated == Build(**{name: getattr(verilated, name) for name in Build.__dataclass_fields__})
