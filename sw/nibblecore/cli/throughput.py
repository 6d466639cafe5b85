"""``throughput``: what an array makes of published networks, DMA and post unit not counted."""

from typing import TYPE_CHECKING, Any

import typer

from ..arch.config import ArchConfig
from ..errors import NibbleError
from .console import ARCH_OPTION, ELEMENT_OPTION, JSON_OPTION, OUT, SET_OPTION, changed_arch, print_json, table

if TYPE_CHECKING:
    from ..compiler.throughput import Throughput


def array_figures(arch: ArchConfig) -> dict[str, Any]:
    """What an array needs for a weight tile, and for each network of the compiler's workloads.

    ``lost_per_tile``: cycles by which a weight tile lengthens a pass of a full accumulator bank. ``shortest_pass``:
    cycles of a pass of one pixel. ``networks``: name to ``macs``, ``cycles``, ``lost_cycles`` (of them, to weight
    loading), ``gap_cycles`` (of those, between MAC instructions) and ``first_layer_cycles``.
    """
    from ..compiler.cost import free_pass_cycles, pass_cycles
    from ..compiler.throughput import throughput
    from ..compiler.workloads import NETWORKS

    networks = {}
    for name, layers in NETWORKS.items():
        found = throughput(layers, arch)
        networks[name] = {
            "macs": found.macs,
            "cycles": found.cycles,
            "lost_cycles": found.lost_cycles,
            "gap_cycles": found.gap_cycles,
            "first_layer_cycles": found.layers[0].cycles,
        }
    return {
        "lost_per_tile": pass_cycles(arch, arch.acc_depth) - free_pass_cycles(arch, arch.acc_depth),
        "shortest_pass": pass_cycles(arch, 1),
        "networks": networks,
    }


def throughput(
    arch: str = ARCH_OPTION,
    element: str | None = ELEMENT_OPTION,
    settings: list[str] | None = SET_OPTION,
    network: str = typer.Option("resnet18-224", "--network", "-n", help="resnet18-224 or yolov5n-320."),
    frequency: float = typer.Option(100.0, "--freq", min=1, help="Clock in MHz, for products per second."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Cycles of a core's array alone on a published network, and what of them is lost to weight loading.

    Layers are tiled as the compiler tiles them; what `estimate` says of a compiled program counts everything.
    """
    from ..compiler.throughput import throughput as measure
    from ..compiler.workloads import NETWORKS

    if network not in NETWORKS:
        raise NibbleError(f"there is no network {network!r}.", hint=f"Networks: {', '.join(NETWORKS)}.")
    core = changed_arch(arch, element, settings)
    found = measure(NETWORKS[network], core)
    if as_json:
        print_json(_values(found, core, network, frequency))
        return
    rows = table(
        f"{network} on the array of {core.name} ({core.element})", "layer", "cycles>", "share>", "utilization>", "lost>"
    )
    for layer in found.layers:
        use = layer.macs / layer.cycles / core.macs_per_cycle
        lost = f"{layer.lost_cycles / layer.cycles:.1%}"
        rows.add_row(layer.name, f"{layer.cycles:,}", f"{layer.cycles / found.cycles:.1%}", f"{use:.1%}", lost)
    use = found.macs / found.cycles / core.macs_per_cycle
    rows.add_row("all", f"{found.cycles:,}", "100.0%", f"{use:.1%}", f"{found.lost_share:.2%}")
    OUT.print(rows)
    OUT.print(f"{found.macs_per_second(frequency) / 1e9:.1f} GMAC/s at {frequency:g} MHz", highlight=False)


def _values(found: "Throughput", arch: ArchConfig, network: str, frequency: float) -> dict[str, Any]:
    return {
        "arch": arch.name,
        "element": arch.element,
        "network": network,
        "macs": found.macs,
        "cycles": found.cycles,
        "lost_cycles": found.lost_cycles,
        "gap_cycles": found.gap_cycles,
        "lost_share": found.lost_share,
        "macs_per_second": found.macs_per_second(frequency),
        "layers": [
            {
                "name": v.name,
                "macs": v.macs,
                "cycles": v.cycles,
                "lost_cycles": v.lost_cycles,
                "gap_cycles": v.gap_cycles,
            }
            for v in found.layers
        ],
    }
