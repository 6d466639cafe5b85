"""Proofs on Amaranth components with Yosys, yosys-smtbmc and z3.

A *spec* is a component that contains the design under test, drives it with its own inputs (any value in any cycle is
tried), restricts them with ``Assume`` and states properties with ``Assert`` and ``Cover``, all from ``amaranth.hdl``.
``AnyConst`` and ``AnySeq`` are in ``amaranth.asserts``; a value of the cycle before is a register of the spec.

::

    class QueueSpec(wiring.Component):
        def __init__(self):
            self.queue = Queue(depth=4)
            super().__init__({"i": In(...), "o": Out(...)})

        def elaborate(self, platform):
            m = Module()
            m.submodules.queue = self.queue
            connect(m, flipped(self), self.queue)
            assume_stream_rule(m, self.i)
            assert_stream_rule(m, self.o)
            return m

    prove(QueueSpec(), mode="induction", depth=4)

:func:`prove` is exhaustive over inputs, not over time: ``"bmc"`` looks at the first ``depth`` cycles, ``"induction"``
at all of them if it succeeds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

from amaranth.hdl import Assert, Assume, Module, ResetSignal, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import Out

from nibblecore.errors import ProofError, ToolchainError

from .toolchain import find_smt, find_yosys

__all__ = ["Mode", "Proof", "StreamContract", "assert_stream_rule", "assume_stream_rule", "prove"]

Mode = Literal["bmc", "induction", "cover"]

# $check cells of Amaranth become $assert, $assume and $cover; every flip-flop becomes one step of the solver.
_SCRIPT = """
read_rtlil design.il
hierarchy -check -top top
proc
flatten
async2sync
chformal -lower
{memories}
opt_clean
formalff -setundef -clk2ff -ff2anyinit
setundef -undriven -anyseq
opt -fast
dffunmap
check -assert
write_smt2 -wires design.smt2
"""

_MEMORIES = {"registers": "memory_map -formal", "arrays": "memory_nordff\nmemory_collect"}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A question that was answered as hoped.

    Attributes
    ----------
    spec : str
        Name of the spec's class.
    mode : str
        ``"bmc"``, ``"induction"`` or ``"cover"``.
    depth : int
        Cycles.
    properties : int
        Number of assertions, or of covers.
    seconds : float
        Wall-clock time.
    traces : tuple of Path
        In ``"cover"`` mode, a waveform per cover (or per group of covers reached together); they exist only if a
        ``directory`` was given.
    """

    spec: str
    mode: Mode
    depth: int
    properties: int
    seconds: float
    traces: tuple[Path, ...] = ()


def prove(
    spec: Any,
    *,
    depth: int,
    mode: Mode = "bmc",
    reset: Literal["never", "any"] = "never",
    memories: Literal["registers", "arrays"] = "registers",
    ports: Sequence[Any] = (),
    timeout_s: float = 300,
    directory: Path | None = None,
) -> Proof:
    """Check every assertion of a spec, or reach every cover.

    Parameters
    ----------
    spec : Elaboratable
        Registers and memories start at their ``init`` values. The inputs of a component's signature are free.
    depth : int
        ``"bmc"``: cycles from the start in which assertions must hold. ``"cover"``: cycles in which every cover must
        be reached. ``"induction"``: length of the window; assertions must hold in the first ``depth`` cycles, and in
        any cycle that follows ``depth`` cycles in which they held.
    mode : str
        See ``depth``.
    reset : str
        ``"never"`` asserts the reset of domain ``sync`` never, ``"any"`` in any cycle.
    memories : str
        How the solver sees memories: ``"registers"`` is quicker up to about a kilobit, ``"arrays"`` above.
    ports : sequence
        Free inputs of an elaboratable that is not a component.
    timeout_s : float
        Limit for each call of the solver, in seconds.
    directory : Path, optional
        Keep the design, the solver's log and the traces there. Otherwise they are kept, in a new temporary folder,
        only if the proof fails.

    Raises
    ------
    ProofError
        If an assertion fails, a cover is not reached, the induction does not go through, the assumptions contradict
        each other, the spec has nothing to check, or time runs out. The message has source positions and, where there
        is one, the waveform of the counterexample.
    ToolchainError
        If a tool is missing, or Yosys does not accept the design.
    ValueError
        If an argument is out of range.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth!r}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
    name = type(spec).__name__
    began = time.monotonic()
    rtlil = _rtlil(spec, reset, ports)
    folder = Path(tempfile.mkdtemp(prefix=f"nibblecore-{name}-")) if directory is None else directory.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _write_smt2(rtlil, name, folder, memories)
    kind = "cover" if mode == "cover" else "assert"
    smt2 = (folder / "design.smt2").read_text()
    properties = len(re.findall(rf"^; yosys-smt2-{kind} ", smt2, re.MULTILINE))
    if not properties:
        raise ProofError(f"{name} has no {kind.capitalize()}, so there is nothing to check.")
    call = _Solver(name=name, folder=folder, depth=depth, timeout_s=timeout_s, messages=_messages(rtlil))
    if mode == "cover":
        call.run(["-c", "--dump-vcd", "cover%.vcd"], "covers.log", "is not reached", kind="cover")
    else:
        call.run(["--presat", "--dump-vcd", "counterexample.vcd"], "bmc.log", "fails")
    if mode == "induction":
        call.run(
            ["-i", "--dump-vcd", "induction.vcd"],
            "induction.log",
            f"does not follow from {depth} cycles in which all assertions hold",
            hint="The trace may start in a state that is never reached: assert more about the registers, or add depth.",
        )
    traces: tuple[Path, ...] = ()
    if directory is None:
        shutil.rmtree(folder)
    else:
        traces = tuple(sorted(folder.glob("cover*.vcd"))) if mode == "cover" else ()
    return Proof(
        spec=name, mode=mode, depth=depth, properties=properties, seconds=time.monotonic() - began, traces=traces
    )


class _Top(wiring.Component):
    """The spec with its reset held low."""

    def __init__(self, spec: wiring.Component) -> None:
        self._spec = spec
        super().__init__(spec.signature)

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.spec = self._spec
        wiring.connect(m, wiring.flipped(self), self._spec)
        m.d.comb += Assume(~ResetSignal())
        return m


def _rtlil(spec: Any, reset: str, ports: Sequence[Any]) -> str:
    from amaranth.back import rtlil

    if isinstance(spec, wiring.Component):
        text = rtlil.convert(_Top(spec) if reset == "never" else spec, name="top", platform="formal")
    else:
        top = Module()
        top.submodules.spec = spec
        if reset == "never":
            top.d.comb += Assume(~ResetSignal())
        text = rtlil.convert(top, name="top", platform="formal", ports=list(ports))
    assert isinstance(text, str)
    return text


def _messages(rtlil: str) -> dict[str, str]:
    """Message of each check, by its source position."""
    found = {}
    for source, cell in re.findall(r'attribute \\src "([^"]*)"\n\s*cell \$check (.*?)\n\s*end\n', rtlil, re.DOTALL):
        message = re.search(r'parameter \\FORMAT "((?:[^"\\]|\\.)+)"', cell)
        if message is not None:
            found[source] = message[1]
    return found


def _write_smt2(rtlil: str, name: str, folder: Path, memories: str) -> None:
    """Write ``design.smt2``."""
    (folder / "design.il").write_text(rtlil)
    (folder / "design.ys").write_text(_SCRIPT.format(memories=_MEMORIES[memories]))
    # Relative names: the WebAssembly build of Yosys sees the working directory.
    command = [str(find_yosys()), "-q", "-l", "yosys.log", "design.ys"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if run.returncode:
        said = (run.stderr or run.stdout).strip().splitlines()
        raise ToolchainError(
            f"Yosys does not accept {name}: {said[-1] if said else 'it says nothing'}",
            hint=f"The log is {folder / 'yosys.log'}.",
        )


@dataclass(frozen=True, kw_only=True)
class _Solver:
    name: str
    folder: Path
    depth: int
    timeout_s: float
    messages: Mapping[str, str]

    def run(
        self, options: Sequence[str], log: str, verdict: str, *, kind: str = "assert", hint: str | None = None
    ) -> None:
        """One call of yosys-smtbmc; returns if its answer is the hoped-for one."""
        smt = find_smt()
        command = [str(smt.smtbmc), "-s", "z3", "--noprogress", "-t", str(self.depth), *options, "design.smt2"]
        # A session of its own, so that a time-out ends the solver too.
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=smt.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        with process:
            try:
                said, _ = process.communicate(timeout=self.timeout_s)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise ProofError(
                    f"{self.name}: the solver did not finish in {self.timeout_s:g} s at depth {self.depth}.",
                    hint="Use smaller parameters or less depth: a proof needs only the smallest case of each kind.",
                ) from None
        (self.folder / log).write_text(said)
        if process.returncode == 0 and "Status: PASSED" in said:
            return
        if "Status: PREUNSAT" in said:
            raise ProofError(f"{self.name}: the assumptions contradict each other, so every assertion would hold.")
        pattern = r"Unreached cover statement" if kind == "cover" else r"Assert failed"
        places = re.findall(rf"{pattern}[^:]*: (.*?) \(", said)
        if not places:
            raise ToolchainError(
                f"{self.name}: yosys-smtbmc stopped with status {process.returncode}.",
                hint=f"The log is {self.folder / log}.",
            )
        what = "cover" if kind == "cover" else "assertion"
        lines = [f"{self.name}: {what} {verdict}:"]
        for place in places:
            message = self.messages.get(place)
            lines.append(f"    {place}" + (f": {message}" if message else ""))
        traces = re.findall(r"Writing trace to VCD file: (\S+)", said)
        if kind == "assert" and traces:
            cycle = re.findall(r"Checking assertions in step (\d+)", said)
            in_cycle = f" in cycle {cycle[-1]}" if cycle else ""
            lines[0] = f"{self.name}: {what} {verdict}{in_cycle}:"
            lines.append(f"The waveform is {self.folder / traces[-1]}.")
        else:
            lines[0] = f"{self.name}: {what} {verdict} in {self.depth} cycles:"
            lines.append(f"The log is {self.folder / log}.")
        raise ProofError("\n".join(lines), hint=hint)


def assert_stream_rule(m: Module, interface: Any, *, domain: str = "sync") -> None:
    """Assert in ``m`` that a stream keeps its offer: ``valid`` and the payload stay until ``ready``.

    Adds two registers (the last cycle's offer) in ``domain``. It holds the other way for the inputs of a design, see
    :func:`assume_stream_rule`.
    """
    _stream_rule(m, interface, Assert, domain)


def assume_stream_rule(m: Module, interface: Any, *, domain: str = "sync") -> None:
    """Assume in ``m`` what :func:`assert_stream_rule` asserts: for the inputs of the design."""
    _stream_rule(m, interface, Assume, domain)


def _stream_rule(m: Module, interface: Any, check: Any, domain: str) -> None:
    payload = Value.cast(interface.payload)
    offered, offer = Signal(), Signal(len(payload))
    m.d[domain] += [offered.eq(interface.valid & ~interface.ready), offer.eq(payload)]
    name = getattr(Value.cast(interface.valid), "name", "valid")
    with m.If(offered & ~ResetSignal(domain, allow_reset_less=True)):
        if check is Assert:
            m.d.comb += Assert(interface.valid, f"{name} fell before ready")
            m.d.comb += Assert(payload == offer, f"the payload of {name} changed before ready")
        else:
            m.d.comb += [Assume(interface.valid), Assume(payload == offer)]


class StreamContract(wiring.Component):
    """Spec: every output stream of a component keeps the stream rule if every input stream does.

    Parameters
    ----------
    dut : wiring.Component
        The component; its signature is this spec's. Streams inside other interfaces are found too, arrays of
        streams are not.

    Raises
    ------
    ValueError
        If it has no output stream.
    """

    def __init__(self, dut: wiring.Component) -> None:
        self.dut = dut
        self._paths = list(_stream_paths(dut.signature))
        if not any(is_output for _, is_output in self._paths):
            raise ValueError(f"{type(dut).__name__} has no output stream")
        super().__init__(dut.signature)

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.dut = self.dut
        wiring.connect(m, wiring.flipped(self), self.dut)
        for path, is_output in self._paths:
            interface = reduce(getattr, path, self)
            (assert_stream_rule if is_output else assume_stream_rule)(m, interface)
        return m


def _stream_paths(signature: Any) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Path of every stream, and whether it is an output."""
    for name, member in signature.members.items():
        if not member.is_signature or member.dimensions:
            continue
        if isinstance(member.signature, stream.Signature):
            yield (name,), member.flow is Out
        else:  # already flipped where the member is an input
            yield from (((name, *path), is_output) for path, is_output in _stream_paths(member.signature))
