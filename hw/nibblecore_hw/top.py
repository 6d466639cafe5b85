"""The accelerator: the block diagram, as code.

::

      s_axil ───► Control: fetch, issue stages, semaphores, registers, counters ───► irq
                    │ command, done          │
         ┌──────────┼──────────────┬─────────┴────┐
         ▼          ▼              ▼              ▼
      LoadDma    MacEngine ──► PostUnit       StoreDma
       │  │       ▲   ▲  acc    ▲  │  ▲          ▲ │
       │  └─► weight buffer ────┘  ▼  │          │ │
       │          activation buffer ──┴──────────┘ │
       ▼                                           ▼
      m_axi (reads, shared with fetch)           m_axi (writes)
"""

from typing import Any, NamedTuple

from amaranth import Cat, Module, ResetInserter, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, Signature, connect

from nibblecore.arch.config import ArchConfig
from nibblecore.arch.isa import Engine

from .core.mac import MacEngine
from .core.post import PostUnit
from .core.sequential import SequentialMac
from .core.sequential_post import SequentialPost
from .ctrl.control import Control
from .ctrl.sequential import SequentialControl
from .dma.axi import FETCH_ID, AxiReadArbiter
from .dma.load import LoadDma
from .dma.sequential import SequentialDma
from .dma.store import StoreDma
from .layouts import axi_lite_signature, axi_read_signature, axi_write_signature
from .mem.buffer import BankedBuffer
from .mem.sequential import SequentialBuffer
from .registers import copies, delayed


def _flat(prefix: str, *signatures: Signature) -> dict[str, Any]:
    """The members of interfaces as members of their own, so that ports get conventional names (``m_axi_araddr``)."""
    return {f"{prefix}_{name}": member for s in signatures for name, member in s.members.items()}


class _Dma(NamedTuple):
    """What the rest of the core sees of the DMA: writes to the buffers, a read of one, the bus."""

    act: Any
    weights: Any
    act_read: Any
    read_bus: Any
    write_bus: Any


class Accelerator(wiring.Component):
    """The whole core: AXI4 master, AXI4-Lite slave, interrupt.

    Parameters
    ----------
    arch : ArchConfig
        What to build.
    technology : {"generic", "ecp5"}
        Primitives that may be instantiated.
    checks : bool
        Assert in simulation that no buffer word is read while it is written, and that STORE asks for what it has
        foretold.

    Members
    -------
    m_axi_* : AXI4 master
        Reads of instructions (ID 1) and data (ID 0), writes (ID 0); INCR bursts of at most ``arch.burst_beats`` beats.
    s_axil_* : AXI4-Lite slave
        The registers of :mod:`nibblecore.arch.regs`.
    irq : Out(1)
        High while an enabled interrupt is pending.
    """

    irq: Signal

    def __init__(self, arch: ArchConfig, *, technology: str = "generic", checks: bool = False) -> None:
        self.arch, self.technology, self.checks = arch, technology, checks
        self._master = {**axi_read_signature(arch).members, **axi_write_signature(arch).members}
        super().__init__(
            {
                **_flat("m_axi", axi_read_signature(arch), axi_write_signature(arch)),
                **_flat("s_axil", axi_lite_signature()),
                "irq": Out(1),
            }
        )

    def _connect_ports(self, m: Module, prefix: str, interface: Any, *, master: bool) -> None:
        """Join flat ports with an inner interface whose ``Out`` members are outputs of the inner component."""
        for name, member in interface.signature.members.items():
            port, inner = getattr(self, f"{prefix}_{name}"), getattr(interface, name)
            outwards = (member.flow is Out) == master
            m.d.comb += port.eq(inner) if outwards else inner.eq(port)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        arch = self.arch
        m.submodules.control = control = (
            SequentialControl(arch=arch, axi_id=FETCH_ID)
            if arch.sequential
            else Control(arch=arch, axi_id=FETCH_ID, technology=self.technology)
        )
        mac = SequentialMac(arch) if arch.sequential else MacEngine(arch, technology=self.technology)
        # A register for each unit, as a reset reaches hundreds of flip-flops. Yosys makes one of registers that are the
        # same, so one holds the opposite.
        mac_reset, post_runs = Signal(init=1), Signal(init=1)
        if isinstance(mac, MacEngine):
            # It takes no command until its pipelines have run empty.
            left = Signal(range(mac.reset_cycles), init=mac.reset_cycles - 1)
            with m.If(control.core_reset):
                m.d.sync += [left.eq(left.init), mac_reset.eq(1)]
            with m.Else():
                m.d.sync += [left.eq(left - mac_reset), mac_reset.eq(mac_reset & left.any())]
        else:
            m.d.comb += mac_reset.eq(control.core_reset)
        if arch.sequential:
            soft_reset: Value = control.core_reset
            m.d.comb += post_runs.eq(~soft_reset)
        else:
            # One register more on the way, so that each of those behind it can be near what it resets.
            soft_reset = delayed(m, control.core_reset, 1, "soft_reset")
            m.d.sync += post_runs.eq(~soft_reset)
        post = SequentialPost(arch) if arch.sequential else PostUnit(arch, technology=self.technology)
        m.submodules.mac = ResetInserter(mac_reset)(mac)
        m.submodules.post = ResetInserter(~post_runs)(post)
        m.submodules.arbiter = arbiter = AxiReadArbiter(arch=arch)
        activations = self._buffer(
            depth=arch.act_depth, banks=arch.act_banks, parts=arch.parts_per_brick, kind=arch.act_memory, readers=3,
            writers=2, foretold=True,
        )  # fmt: skip
        weights = self._buffer(depth=arch.weight_depth, banks=1, parts=1, kind=arch.weight_memory, readers=2, writers=1)
        m.submodules.activations = activations
        m.submodules.weights = weights

        dma = (
            self._one_dma(m, control, soft_reset)
            if arch.sequential
            else self._two_dmas(m, control, soft_reset, post, activations)
        )

        # Buffers, in order of priority: whoever asks less often wins.
        for client, port in zip((dma.act_read, post.act_read, mac.x), activations.reads, strict=True):
            connect(m, client, port)
        for client, port in zip((post.act_write, dma.act), activations.writes, strict=True):
            connect(m, client, port)
        for client, port in zip((post.params, mac.w), weights.reads, strict=True):
            connect(m, client, port)
        if not arch.sequential:
            m.d.comb += [
                mac.x_ready_next.eq(activations.last_ready_next), mac.w_ready_next.eq(weights.last_ready_next),
                post.params_wanted.eq(mac.w.valid),
            ]  # fmt: skip
        connect(m, dma.weights, weights.writes[0])
        connect(m, post.acc_read, mac.acc_read)

        # Bus
        connect(m, dma.read_bus, arbiter.load)
        connect(m, control.m_axi, arbiter.fetch)
        self._connect_ports(m, "m_axi", arbiter.bus, master=True)
        self._connect_ports(m, "m_axi", dma.write_bus, master=True)
        for name, member in axi_lite_signature().members.items():
            port, inner = getattr(self, f"s_axil_{name}"), getattr(control.s_axil, name)
            m.d.comb += inner.eq(port) if member.flow is In else port.eq(inner)

        # Commands
        for engine, unit in ((Engine.MAC, mac), (Engine.POST, post)):
            port = control.engine(engine)
            connect(m, port.command, unit.command)
            m.d.comb += [port.done_stb.eq(unit.done_stb), port.busy.eq(unit.busy)]
        stalls = control.stalls
        m.d.comb += [
            stalls.mac_weights.eq(mac.mac_weights),
            stalls.mac_bank.eq(mac.mac_bank),
            stalls.mac_active.eq(mac.mac_active),
            stalls.post_bank.eq(post.bank_stall),
            self.irq.eq(control.irq),
        ]
        beats = [
            self.m_axi_rvalid & self.m_axi_rready,
            self.m_axi_wvalid & self.m_axi_wready,
            mac.mac_active,
            post.act_write.valid & post.act_write.ready,
            post.act_read.valid & post.act_read.ready,
        ]
        m.d.sync += control.progress.eq(Cat(beats).any())
        return m

    def _buffer(self, *, banks: int, foretold: bool = False, **parameters: Any) -> Any:
        """For engines that work beside each other, or one after the other."""
        if self.arch.sequential:
            return SequentialBuffer(word_bits=self.arch.word_bits, **parameters)
        return BankedBuffer(
            banks=banks, word_bits=self.arch.word_bits, technology=self.technology, foretold=foretold,
            checks=self.checks, **parameters,
        )  # fmt: skip

    def _two_dmas(self, m: Module, control: Any, reset: Value, post: Any, activations: Any) -> "_Dma":
        """Engines of their own for LOAD and STORE."""
        load, store = LoadDma(arch=self.arch), StoreDma(arch=self.arch)
        load_reset, store_reset = copies(m, reset, 2, name="dma_reset")
        m.submodules.load = ResetInserter(load_reset)(load)
        m.submodules.store = ResetInserter(store_reset)(store)
        m.d.comb += [load.act_ready_next.eq(~post.act_write_next), activations.first_next.eq(store.act_next)]
        for port, unit, stall in (
            (control.load, load, control.stalls.load_bus),
            (control.store, store, control.stalls.store_bus),
        ):
            connect(m, port.command, unit.command)
            m.d.comb += [
                port.done_stb.eq(unit.done_stb),
                port.busy.eq(unit.busy),
                port.idle.eq(unit.idle),
                port.error_stb.eq(unit.error_stb),
                port.error_cause.eq(unit.error_cause),
                unit.stop.eq(control.stop),
                unit.region.eq(port.region),
                stall.eq(unit.stall_bus_stb),
            ]
        return _Dma(load.act, load.weights, store.act, load.bus, store.bus)

    def _one_dma(self, m: Module, control: Any, reset: Value) -> "_Dma":
        """One for both."""
        m.submodules.dma = ResetInserter(reset)(dma := SequentialDma(arch=self.arch))
        m.d.comb += [dma.stop.eq(control.stop), dma.region.eq(control.load.region)]
        for n, (port, command, stall) in enumerate(
            (
                (control.load, dma.load, control.stalls.load_bus),
                (control.store, dma.store, control.stalls.store_bus),
            )
        ):
            connect(m, port.command, command)
            m.d.comb += [
                port.done_stb.eq(dma.done_stb[n]),
                port.busy.eq(dma.busy[n]),
                port.idle.eq(dma.idle),
                port.error_stb.eq(dma.error_stb[n]),
                port.error_cause.eq(dma.error_cause),
                stall.eq(dma.stall_bus_stb[n]),
            ]
        return _Dma(dma.act, dma.weights, dma.act_read, dma.read_bus, dma.write_bus)
