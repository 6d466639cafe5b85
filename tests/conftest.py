"""Options and fixtures of all tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nibblecore.ir import Graph


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--waves", type=Path, metavar="DIR", help="keep waveforms of Amaranth's simulator in DIR")


@pytest.fixture
def vcd(request: pytest.FixtureRequest) -> Path | None:
    """Where this test writes its waveform: a file named after it with ``--waves``, else ``None``."""
    folder: Path | None = request.config.getoption("--waves")
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (re.sub(r"[^\w.-]+", "_", request.node.nodeid) + ".vcd")


Evaluate = Callable[["Graph", dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="session")
def evaluate() -> Evaluate:
    """An integer graph computed once more, in float64 with torch's operators: ``(graph, codes) -> every tensor``.

    It shares nothing with the interpreter but the graph. All numbers are integers or exact binary fractions below
    2**53, so that results must be equal.
    """
    import torch
    from torch.nn import functional as F

    from nibblecore import ir

    def rounded(total: Any, mult: Any, shift: Any) -> Any:
        shape = (-1, 1, 1) if getattr(mult, "ndim", 0) else ()
        factor = torch.as_tensor(mult).double().reshape(shape) * 0.5 ** torch.as_tensor(shift).double().reshape(shape)
        return torch.floor(total * factor + 0.5)

    def one(graph: Graph, node: Any, *xs: Any) -> Any:
        x, y = xs[0], graph.tensors[node.output]
        zeros = [graph.tensors[name].zero for name in node.inputs]
        if isinstance(node, ir.Conv | ir.AvgPool):
            top, left, bottom, right = node.padding
            padded = F.pad(x, (left, right, top, bottom), value=zeros[0])
            if isinstance(node, ir.Conv):
                total = F.conv2d(padded, torch.as_tensor(node.weight).double(), torch.as_tensor(node.bias).double(),
                                 node.stride, 0, node.dilation, node.groups)  # fmt: skip
            else:
                total = F.avg_pool2d(padded, node.kernel, node.stride, divisor_override=1) + node.bias
            if y.bits == 32:
                return total
            return (rounded(total, node.mult, node.shift) + y.zero).clamp(node.low, node.high)
        if isinstance(node, ir.ResidualAdd):
            total = (x - zeros[0]) * node.k_a + (xs[1] - zeros[1]) * node.k_b
            return (rounded(total, 1, node.shift) + y.zero).clamp(node.low, node.high)
        if isinstance(node, ir.ChannelMul):
            total = (x - zeros[0]) * (xs[1] - zeros[1])
            return (rounded(total, node.k, node.shift) + y.zero).clamp(node.low, node.high)
        if isinstance(node, ir.MaxPool):
            top, left, bottom, right = node.padding
            padded = F.pad(x, (left, right, top, bottom), value=-1000)
            return F.max_pool2d(padded, node.kernel, node.stride, 0, node.dilation)
        if isinstance(node, ir.Lookup):
            return torch.as_tensor(node.table).double()[(x + 128).long()]
        if isinstance(node, ir.Concat):
            return torch.cat(xs, 1)
        if isinstance(node, ir.Upsample):
            return F.interpolate(x, size=y.shape[1:], mode="nearest")
        assert isinstance(node, ir.Flatten)
        return x.flatten(1)[:, :, None, None]

    def graph_in_float64(graph: Graph, inputs: dict[str, Any]) -> dict[str, Any]:
        values = {name: torch.as_tensor(codes).double() for name, codes in inputs.items()}
        for node in graph.nodes:
            values[node.output] = one(graph, node, *(values[name] for name in node.inputs))
        return {name: value.numpy() for name, value in values.items()}

    return graph_in_float64
