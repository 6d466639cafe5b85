# amaranth: UnusedElaboratable=no
import re
from pathlib import Path

import pytest
from amaranth import Module, Signal
from amaranth.asserts import AnyConst
from amaranth.hdl import Assert, Assume, Cover, Instance
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped

from nibblecore.errors import ProofError, ToolchainError
from nibblecore_sim.formal import StreamContract, prove

pytestmark = pytest.mark.formal

HERE = re.escape(str(Path(__file__)))


class Register(wiring.Component):
    """Stream register; with ``bug`` the payload 0x55 is lost when it has to wait."""

    def __init__(self, *, bug=False):
        self.bug = bug
        super().__init__({"i": In(stream.Signature(8)), "o": Out(stream.Signature(8))})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.i.ready.eq(~self.o.valid | self.o.ready)
        with m.If(self.i.ready):
            m.d.sync += [self.o.valid.eq(self.i.valid), self.o.payload.eq(self.i.payload)]
        if self.bug:
            with m.Elif(self.o.payload == 0x55):
                m.d.sync += self.o.payload.eq(0)
        return m


class Fifo(wiring.Component):
    def __init__(self):
        super().__init__({"i": In(stream.Signature(2)), "o": Out(stream.Signature(2))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.fifo = fifo = SyncFIFOBuffered(width=2, depth=2)
        connect(m, flipped(self.i), fifo.w_stream)
        connect(m, fifo.r_stream, flipped(self.o))
        return m


class Delay(wiring.Component):
    """Spec: what goes into a register comes out of it, in order; the number under way is 0 or 1."""

    def __init__(self):
        self.dut = Register()
        super().__init__(self.dut.signature)

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = self.dut
        connect(m, flipped(self), self.dut)
        inside, item = Signal(), Signal(8)
        taken, given = self.i.valid & self.i.ready, self.o.valid & self.o.ready
        with m.If(taken):
            m.d.sync += [inside.eq(1), item.eq(self.i.payload)]
        with m.Elif(given):
            m.d.sync += inside.eq(0)
        m.d.comb += Assert(self.o.valid == inside)
        with m.If(inside):
            m.d.comb += Assert(self.o.payload == item, "another item comes out")
        return m


class Counter(wiring.Component):
    """Counts to 9 and starts again; the spec's question is a parameter."""

    def __init__(self, question):
        self.question = question
        super().__init__({"en": In(1), "count": Out(4)})

    def elaborate(self, platform):
        m = Module()
        with m.If(self.en):
            m.d.sync += self.count.eq(self.count + 1)
            with m.If(self.count == 9):
                m.d.sync += self.count.eq(0)
        self.question(m, self)
        return m


def test_register_keeps_the_stream_rule_for_ever():
    proof = prove(StreamContract(Register()), depth=2, mode="induction")
    assert (proof.spec, proof.mode, proof.depth, proof.properties) == ("StreamContract", "induction", 2, 2)
    assert prove(Delay(), depth=2, mode="induction").properties == 2


def test_planted_bug_is_found(tmp_path):
    text = (
        r"^StreamContract: assertion fails in cycle 2:\n"
        r"    .*formal\.py:\d+: the payload of o__valid changed before ready\n"
        rf"The waveform is {re.escape(str(tmp_path))}/counterexample\.vcd\.$"
    )
    with pytest.raises(ProofError, match=text):
        prove(StreamContract(Register(bug=True)), depth=8, directory=tmp_path)
    assert "$enddefinitions" in (tmp_path / "counterexample.vcd").read_text()


def test_bounded_check_of_a_memory_based_fifo():
    assert prove(StreamContract(Fifo()), depth=8).seconds < 60


def test_folder_is_kept_only_when_a_proof_fails(tmp_path):
    # conftest.py makes tmp_path the folder for temporary files.
    prove(StreamContract(Register()), depth=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProofError):
        prove(StreamContract(Register(bug=True)), depth=8)
    (folder,) = tmp_path.iterdir()
    assert (folder / "counterexample.vcd").exists()


def test_failing_induction_is_told_from_a_failing_assertion():
    def question(m, counter):
        m.d.comb += Assert(counter.count != 14, "fourteen")

    prove(Counter(question), depth=30)
    text = (
        r"^Counter: assertion does not follow from 3 cycles in which all assertions hold:\n"
        rf"    {HERE}:\d+: fourteen\n"
        r"The waveform is .*induction\.vcd\.\n"
        r"The trace may start in a state that is never reached: assert more about the registers, or add depth\.$"
    )
    with pytest.raises(ProofError, match=text):
        prove(Counter(question), depth=3, mode="induction")


def test_invariant_makes_the_induction_go_through():
    def question(m, counter):
        m.d.comb += [Assert(counter.count != 14), Assert(counter.count < 10)]

    assert prove(Counter(question), depth=1, mode="induction").properties == 2


def test_covers(tmp_path):
    def question(m, counter):
        m.d.comb += [Cover(counter.count == 3), Cover(counter.count == 5)]

    proof = prove(Counter(question), depth=6, mode="cover", directory=tmp_path)
    assert proof.properties == 2
    assert [trace.name for trace in proof.traces] == ["cover0.vcd", "cover1.vcd"]
    log = re.escape(str(tmp_path / "covers.log"))
    text = rf"^Counter: cover is not reached in 5 cycles:\n    {HERE}:\d+\nThe log is {log}\.$"
    with pytest.raises(ProofError, match=text):
        prove(Counter(question), depth=5, mode="cover", directory=tmp_path)


def test_reset_is_never_asserted_unless_asked():
    def question(m, counter):
        last = Signal(4)
        m.d.sync += last.eq(counter.count)
        with m.If(last == 5):
            m.d.comb += Assert((counter.count == 5) | (counter.count == 6))

    prove(Counter(question), depth=10)
    # The reset clears `last` too, so only an assertion on a register without reset sees it.

    def unreset(m, counter):
        last = Signal(4, reset_less=True)
        m.d.sync += last.eq(counter.count)
        with m.If(last == 5):
            m.d.comb += Assert((counter.count == 5) | (counter.count == 6))

    prove(Counter(unreset), depth=10)
    with pytest.raises(ProofError, match=r"^Counter: assertion fails in cycle 6:\n"):
        prove(Counter(unreset), depth=10, reset="any")


class MemorySpec(wiring.Component):
    """Spec: a memory gives back the last value written to any one address."""

    def __init__(self, *, depth, bug=False):
        self.depth = depth
        self.bug = bug
        address = range(depth)
        super().__init__({"w_addr": In(address), "w_data": In(4), "w_en": In(1), "r_addr": In(address)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = memory = Memory(shape=4, depth=self.depth, init=[])
        write, read = memory.write_port(), memory.read_port()
        address, value = AnyConst(range(self.depth)), Signal(4)
        with m.If(self.w_en & (self.w_addr == address)):
            m.d.sync += value.eq(self.w_data)
        m.d.comb += [
            write.addr.eq(self.w_addr),
            write.data.eq(self.w_data),
            write.en.eq(self.w_en & ~((self.w_addr == self.depth - 1) & self.bug)),
            read.addr.eq(self.r_addr),
            read.en.eq(1),
        ]
        asked, expected = Signal(), Signal(4)
        m.d.sync += [asked.eq(self.r_addr == address), expected.eq(value)]
        with m.If(asked):
            m.d.comb += Assert(read.data == expected)
        return m


@pytest.mark.parametrize("memories", ["registers", "arrays"])
def test_memories(memories):
    prove(MemorySpec(depth=8), depth=6, memories=memories)
    with pytest.raises(ProofError, match=r"^MemorySpec: assertion fails in cycle 2:\n"):
        prove(MemorySpec(depth=8, bug=True), depth=6, memories=memories)


def test_contradicting_assumptions_prove_nothing():
    def question(m, counter):
        m.d.comb += [Assume(counter.en), Assume(~counter.en), Assert(counter.count == 12)]

    text = "Counter: the assumptions contradict each other, so every assertion would hold."
    with pytest.raises(ProofError, match=f"^{re.escape(text)}$"):
        prove(Counter(question), depth=3)


@pytest.mark.parametrize(("mode", "kind"), [("bmc", "Assert"), ("induction", "Assert"), ("cover", "Cover")])
def test_spec_without_a_property_proves_nothing(mode, kind):
    text = f"Counter has no {kind}, so there is nothing to check."
    with pytest.raises(ProofError, match=f"^{re.escape(text)}$"):
        prove(Counter(lambda m, counter: None), depth=3, mode=mode)


def test_time_limit():
    text = (
        "StreamContract: the solver did not finish in 0.01 s at depth 2.\n"
        "Use smaller parameters or less depth: a proof needs only the smallest case of each kind."
    )
    with pytest.raises(ProofError, match=f"^{re.escape(text)}$"):
        prove(StreamContract(Register()), depth=2, timeout_s=0.01)


def test_design_that_yosys_refuses():
    class Foreign(wiring.Component):
        def __init__(self):
            super().__init__({"a": In(1), "o": Out(1)})

        def elaborate(self, platform):
            m = Module()
            m.submodules.inner = Instance("unheard_of", i_a=self.a, o_o=self.o)
            m.d.comb += Assert(self.o)
            return m

    with pytest.raises(
        ToolchainError, match=r"^Yosys does not accept Foreign: .*unheard_of.*\nThe log is .*yosys\.log\.$"
    ):
        prove(Foreign(), depth=1)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"^depth must be at least 1, not 0$"):
        prove(Register(), depth=0)
    with pytest.raises(ValueError, match=r"^mode must be one of bmc, induction, cover, not 'live'$"):
        prove(Register(), depth=1, mode="live")
    with pytest.raises(ValueError, match=r"^Counter has no output stream$"):
        StreamContract(Counter(lambda m, counter: None))
