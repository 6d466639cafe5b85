"""The compiler's driver: an integer graph in, a program out."""

from typing import Final

import numpy as np

from ..arch.config import ArchConfig
from ..arch.isa import INSTRUCTION_BYTES, Opcode, Region
from ..ir.graph import Graph
from ..ir.verify import verify
from ..runtime.program import LayerInfo, Program, TensorBinding
from . import passes
from .cost import DEFAULT_COST, CostParameters, estimate
from .emit import dependencies, stream_order, synchronize
from .lint import check
from .nodes import Layer, MacLayer
from .options import CompileOptions
from .rules import check_supported
from .schedule import Place, schedule
from .verify import verify_lowered

DEFAULT_OPTIONS: Final = CompileOptions()


def lower_graph(graph: Graph, arch: ArchConfig) -> Graph:
    """All passes, with the verifier behind each: the graph that the scheduler takes."""
    graph = verify(passes.merge_flatten(graph))
    for step in (passes.lower, passes.fuse_add(arch), passes.split_planes(arch.weight_range)):
        graph = verify_lowered(step(graph))
    return graph


def compile_graph(
    graph: Graph,
    arch: ArchConfig,
    options: CompileOptions = DEFAULT_OPTIONS,
    *,
    cost: CostParameters = DEFAULT_COST,
) -> Program:
    """Compile an integer graph for a core. The same input gives the same bytes.

    Raises
    ------
    GraphError
        The graph breaks a rule of :mod:`nibblecore.ir.graph`.
    CompileError
        The core cannot run it; every reason at once.
    """
    check_supported(verify(graph), arch)
    lowered = lower_graph(graph, arch)
    planned = schedule(lowered, arch, options, cost)
    needed = dependencies(planned.instructions, arch)
    order = stream_order(planned.instructions, needed, arch, cost)
    instructions = synchronize(planned.instructions, needed, order, arch)
    debug = [planned.layers[index] for index in order] + [-1] * (instructions[-1].opcode is Opcode.END)
    constants = planned.constants or bytes(arch.word_bytes)
    sizes = {
        Region.PROGRAM: len(instructions) * INSTRUCTION_BYTES,
        Region.CONSTANTS: len(constants),
        **{region: words * arch.word_bytes for region, words in planned.region_words.items() if words},
    }
    tensors: list[str] = []
    if options.dump_tensors:
        tensors = [n.output for n in lowered.nodes if n.output not in graph.outputs]
    program = Program(
        arch=arch,
        name=graph.name,
        instructions=instructions,
        constants=constants,
        region_sizes=sizes,
        inputs=[_binding(graph, name, planned.places[name]) for name in graph.inputs],
        outputs=[_binding(graph, name, planned.places[name]) for name in graph.outputs],
        tensors=[_binding(graph, name, planned.places[name]) for name in tensors],
        layers=[_layer_info(lowered, node) for node in lowered.nodes],  # type: ignore[arg-type] # a lowered graph has no others
        debug=debug,
    )
    check(program)
    return program.replace(predicted_cycles=estimate(program, cost).cycles)


def _binding(graph: Graph, name: str, place: Place) -> TensorBinding:
    t = graph.tensors[name]
    return TensorBinding(name, place.region, place.offset, t.shape, t.bits, t.scale, t.zero)


def _layer_info(graph: Graph, layer: Layer) -> LayerInfo:
    x, y = graph.tensors[layer.inputs[0]], graph.tensors[layer.output]
    if not isinstance(layer, MacLayer) or layer.weight is None:
        return LayerInfo(layer.output, layer.path, layer.op, 0, 1)
    macs = int(np.prod(layer.weight.shape)) * y.shape[1] * y.shape[2]
    return LayerInfo(layer.output, layer.path, layer.op, macs, (x.bits // 4) * (layer.weight_bits // 4))
