"""Tests of training share the machine: one thread each, which also makes sums the same everywhere."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from nibblecore import ir
from nibblecore.qat import QuantModel
from nibblecore.qat.layers import Grid

torch.set_num_threads(1)

Compare = Callable[[QuantModel, ir.Graph, Tensor], None]


@pytest.fixture(scope="session")
def compare() -> Compare:
    """Fake quantization against integers, each layer on the integers of the layers before it.

    At most 2 codes in 10**4 may differ, by 1: as one differing code changes no other layer here, these are values of
    float32 next to a tie, of which a channel with few different sums has many or none. 32-bit sums must be near.
    """

    def layer_by_layer(model: QuantModel, graph: ir.Graph, x: Tensor) -> None:
        (source,) = graph.inputs
        codes = ir.run(graph, {source: ir.quantize(x.numpy(), graph.tensors[source])}, keep=True)
        grids: dict[str, Grid] = {}
        wrong = total = most = 0

        def exact(path: str) -> Grid:
            tensor = graph.tensors[path]
            assert isinstance(tensor.scale, float)
            real = ir.dequantize(codes[path], tensor).reshape(-1, *model._shapes[path])
            return Grid(torch.from_numpy(real).float(), tensor.scale)

        grids[source] = exact(source)
        for path, inputs in model._plan:
            with torch.no_grad():
                got = model.get_submodule(path)(*(grids[name] for name in inputs))
            if path not in graph.tensors:  # a flattening of what is a vector already
                grids[path] = got
                continue
            tensor = graph.tensors[path]
            real = got.x.double().numpy().reshape(-1, *tensor.shape)
            if tensor.bits == 32:
                want = ir.dequantize(codes[path], tensor)
                assert np.abs(want - real).max() <= 1e-4 * (np.abs(want).max() + 1e-9), path
                continue
            difference = np.abs(np.rint(real / tensor.scale + tensor.zero) - codes[path])
            wrong, total = wrong + int((difference > 0).sum()), total + difference.size
            most = max(most, int(difference.max()))
            grids[path] = exact(path)
        assert most <= 1
        assert wrong <= 2e-4 * total, f"{wrong} of {total} codes differ"

    return layer_by_layer
