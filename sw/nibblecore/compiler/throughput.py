"""Cycles of the array alone: what a processing element makes of a network, DMA and post unit not counted.

Each layer is planned as the compiler plans it, on its own: the same packing of channels and taps, the same output
tiles, the same cycles per pass (:mod:`nibblecore.compiler.cost`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..arch.config import ArchConfig
from ..arch.isa import OutputMode
from ..ir.graph import Graph, TensorType
from .cost import DEFAULT_COST, CostParameters, free_pass_cycles, mac_gap, pass_cycles
from .nodes import MacLayer, WeightPlane
from .options import CompileOptions
from .schedule import Planner
from .workloads import LayerShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerThroughput:
    """The array on one layer.

    Parameters
    ----------
    name : str
    macs : int
        True products; padding of channels or tiles never counts.
    cycles : int
        In which the array works on the layer or waits for weights.
    lost_cycles : int
        Of them, those that would not be there if weights were loaded in no time.
    gap_cycles : int
        Of those, what passes between two MAC instructions.
    """

    name: str
    macs: int
    cycles: int
    lost_cycles: int
    gap_cycles: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """The array on a network.

    Parameters
    ----------
    layers : tuple of LayerThroughput
    """

    layers: tuple[LayerThroughput, ...]

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def cycles(self) -> int:
        return sum(layer.cycles for layer in self.layers)

    @property
    def lost_cycles(self) -> int:
        return sum(layer.lost_cycles for layer in self.layers)

    @property
    def gap_cycles(self) -> int:
        return sum(layer.gap_cycles for layer in self.layers)

    @property
    def lost_share(self) -> float:
        """Of the cycles, lost to weight loading."""
        return self.lost_cycles / self.cycles

    def macs_per_second(self, fmax_mhz: float) -> float:
        """True products per second at a clock."""
        return self.macs / self.cycles * fmax_mhz * 1e6


def layer_throughput(
    layer: LayerShape, arch: ArchConfig, *, bits: int = 4, cost: CostParameters = DEFAULT_COST
) -> LayerThroughput:
    """Cycles of one dense layer of 4-bit weights.

    Parameters
    ----------
    layer : LayerShape
    arch : ArchConfig
    bits : int
        Of the input: 4, or 8 for two passes.
    cost : CostParameters

    Raises
    ------
    ValueError
        For a grouped layer, which the array does not compute.
    CompileError
        Where not even one output pixel fits the core.
    """
    if layer.groups != 1:
        raise ValueError(f"groups must be 1, not {layer.groups}: the array has no grouped layers")
    planner = Planner(_graph(layer, bits), arch, CompileOptions(), cost)
    (plan,), packed = planner.plan(), planner.packed[0]
    assert packed is not None
    terms = sum(len(tile.terms) for tile in packed.tiles)
    # What all column tiles take per output tile, summed over output tiles.
    waiting = terms * mac_gap(arch, cost) * len(plan.tiles)
    cycles = packed.passes * sum(pass_cycles(arch, tile.pixels, cost) for tile in plan.tiles) + waiting
    free = packed.passes * sum(free_pass_cycles(arch, tile.pixels, cost) for tile in plan.tiles)
    return LayerThroughput(
        name=layer.name, macs=layer.macs, cycles=cycles, lost_cycles=cycles - free, gap_cycles=waiting
    )


def throughput(layers: Sequence[LayerShape], arch: ArchConfig, *, cost: CostParameters = DEFAULT_COST) -> Throughput:
    """:func:`layer_throughput` of every layer of a network, with nibbles everywhere."""
    return Throughput(layers=tuple(layer_throughput(layer, arch, cost=cost) for layer in layers))


def _graph(layer: LayerShape, bits: int) -> Graph:
    """The layer alone in a lowered graph, weights all 1: planes of zeros would be left out."""
    weight = np.broadcast_to(np.int64(1), (layer.cout, layer.cin, layer.kernel, layer.kernel))
    record = np.ones(layer.cout, np.int64)
    node = MacLayer(
        "y", ("x",), layer.name, op="Conv", kind="dense", kernel=(layer.kernel,) * 2, stride=(layer.stride,) * 2,
        padding=(layer.padding,) * 4, dilation=(1, 1), weight=weight, weight_bits=4,
        planes=(WeightPlane(0, weight),), bias=record, mult=record, shift=record, zero=0, low=-8, high=7,
        mode=OutputMode.INT4,
    )  # fmt: skip
    return Graph(
        nodes=(node,),
        tensors={
            "x": TensorType((layer.cin, layer.input_height, layer.input_width), bits, 1.0, 0),
            "y": TensorType((layer.cout, layer.height, layer.width), 4, 1.0, 0),
        },
        inputs=("x",),
        outputs=("y",),
        name=layer.name,
    )


__all__ = ["LayerThroughput", "Throughput", "layer_throughput", "throughput"]
