"""Networks as data, and the cycles of the array alone on them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from nibblecore.arch.config import get_arch
from nibblecore.arch.isa import Opcode
from nibblecore.cli.throughput import array_figures
from nibblecore.compiler import compile_graph
from nibblecore.compiler.cost import DEFAULT_COST, mac_gap, timing
from nibblecore.compiler.throughput import layer_throughput, throughput
from nibblecore.compiler.workloads import NETWORKS, LayerShape, resnet18, yolov5n
from nibblecore.ir.graph import Conv, Graph, TensorType


def shape(**changes: int) -> LayerShape:
    values = {"cin": 64, "cout": 40, "kernel": 3, "stride": 1, "height": 20, "width": 30, "padding": 1, **changes}
    stride = values["stride"]
    size = {f"input_{name}": values[name] * stride for name in ("height", "width")}
    return LayerShape(name="layer", **{**size, **values})


def test_resnet18_is_the_published_one() -> None:
    layers = resnet18()
    assert sum(layer.macs for layer in layers) == 1_814_073_344
    # 11,689,512 parameters, of which 4,800 are batch norms' factors: folded, their offsets are the biases.
    assert sum(layer.weights + layer.cout for layer in layers) == 11_689_512 - 4_800


def test_resnet18_is_that_of_the_models() -> None:
    import torch
    from torch import nn

    from nibblecore.models.resnet18 import resnet18 as model

    found = []

    def note(module: nn.Module, x: tuple[torch.Tensor], y: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            (kernel, _), (stride, _) = module.kernel_size, module.stride
            found.append((x[0].shape[1], y.shape[1], kernel, stride, *x[0].shape[2:], *y.shape[2:]))
        else:
            found.append((x[0].shape[1], y.shape[1], 1, 1, 1, 1, 1, 1))

    network = model().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    ours = [(v.cin, v.cout, v.kernel, v.stride, v.input_height, v.input_width, v.height, v.width) for v in resnet18()]
    assert sorted(found) == sorted(ours)


def test_yolov5n_is_the_published_one() -> None:
    layers = yolov5n()
    # 1,867,405 parameters with folded batch norms: what YOLOv5 itself prints for its fused model.
    assert sum(layer.weights + layer.cout for layer in layers) == 1_867_405
    assert sum(layer.macs for layer in layers) == 558_515_200
    assert sum(layer.macs for layer in yolov5n(640)) == 4 * 558_515_200
    assert [(v.height, v.cout) for v in layers if v.name.startswith("24.")] == [(40, 255), (20, 255), (10, 255)]


@pytest.mark.parametrize("arch", ["tiny", "small", "large"])
@pytest.mark.parametrize(
    "layer",
    [
        shape(),
        shape(kernel=1, padding=0, cin=128, cout=24),
        shape(kernel=7, padding=3, cin=3, stride=2, cout=16),
        shape(height=1, width=1, cin=256, cout=96, kernel=1, padding=0),
    ],
    ids=["3x3", "1x1", "stem", "linear"],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_cycles_are_those_of_the_compiled_layer(arch: str, layer: LayerShape, bits: int) -> None:
    core = get_arch(arch)
    weight = np.ones((layer.cout, layer.cin, layer.kernel, layer.kernel), np.int64)
    ones = np.ones(layer.cout, np.int64)
    node = Conv(
        "y", ("x",), "layer", weight=weight, weight_bits=4, weight_scale=np.ones(layer.cout), bias=ones, mult=ones,
        shift=ones, stride=(layer.stride,) * 2, padding=(layer.padding,) * 4, dilation=(1, 1), low=-8, high=7,
    )  # fmt: skip
    tensors = {
        "x": TensorType((layer.cin, layer.input_height, layer.input_width), bits, 1.0, 0),
        "y": TensorType((layer.cout, layer.height, layer.width), 4, 1.0, 0),
    }
    program = compile_graph(Graph(nodes=(node,), tensors=tensors, inputs=("x",), outputs=("y",), name="one"), core)
    macs = [i for i in program.instructions if i.opcode is Opcode.MAC]
    expected = sum(timing(i, core).busy + mac_gap(core) for i in macs)
    found = layer_throughput(layer, core, bits=bits)
    assert found.cycles == expected
    assert found.gap_cycles == len(macs) * mac_gap(core)
    assert found.macs == layer.weights * layer.height * layer.width
    pixels = [(i["rows"] * i["cols"], i["kernel_y"] * i["kernel_x"] * i["bricks"]) for i in macs]
    turns = core.columns if core.sequential else 1
    assert found.cycles - found.lost_cycles == sum(max(turns * p, DEFAULT_COST.acc_hazard) * n for p, n in pixels)


def test_a_pixel_waits_for_its_weights() -> None:
    core = get_arch("small").replace(element="bitplane")
    found = layer_throughput(shape(height=1, width=1, cin=256, cout=256, kernel=1, padding=0), core)
    # 16 bricks for each of 16 column tiles: as many cycles as columns for each.
    assert (found.cycles, found.lost_cycles) == (16 * 16 * 16, 16 * 16 * 12)
    assert found.gap_cycles == 0


def test_grouped_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^groups must be 1, not 64: the array has no grouped layers$"):
        layer_throughput(shape(groups=64), get_arch("small"))


@pytest.mark.parametrize("arch", ["small", "large"])
@pytest.mark.parametrize("network", NETWORKS)
def test_little_is_lost_to_weight_loading(arch: str, network: str) -> None:
    found = throughput(NETWORKS[network], get_arch(arch))
    assert found.macs == sum(layer.macs for layer in NETWORKS[network])
    assert found.macs <= (found.cycles - found.lost_cycles) * get_arch(arch).macs_per_cycle
    assert found.lost_share <= 0.03


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nibblecore.cli import main; main()", "throughput", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def test_the_command() -> None:
    values = json.loads(call("-n", "yolov5n-320", "--set", "columns=32", "--freq", "50", "--json").stdout)
    expected = throughput(NETWORKS["yolov5n-320"], get_arch("small").replace(columns=32))
    assert (values["cycles"], values["lost_cycles"]) == (expected.cycles, expected.lost_cycles)
    assert values["macs_per_second"] == pytest.approx(558_515_200 / expected.cycles * 50e6)
    assert len(values["layers"]) == 60
    text = call("-n", "yolov5n-320").stdout
    assert "24.m.2" in text
    assert "GMAC/s at 100 MHz" in text
    assert call("-n", "vgg").stderr == ("error: there is no network 'vgg'.\nNetworks: resnet18-224, yolov5n-320.\n")


def test_figures_of_an_array() -> None:
    core = get_arch("small").replace(element="bitplane")
    figures = array_figures(core)
    assert (figures["lost_per_tile"], figures["shortest_pass"]) == (0, 16)
    assert figures["networks"].keys() == NETWORKS.keys()
    stem = layer_throughput(NETWORKS["yolov5n-320"][0], core).cycles
    assert figures["networks"]["yolov5n-320"]["first_layer_cycles"] == stem
