"""Layers of published networks as data: what arrays and schedules are measured on, without weights and without torch.

Only what multiplies stands here, convolutions and linear layers. Shapes follow from the networks' published structure:
ResNet-18 from He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016, table 1; YOLOv5n from
version 6.0 of Ultralytics' YOLOv5, depth 0.33, width 0.25.
"""

import dataclasses
from typing import Final


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A convolution; a linear layer is one of a single pixel.

    Parameters
    ----------
    name : str
    cin, cout : int
        Channels.
    kernel, stride : int
        Of rows and columns.
    input_height, input_width : int
    height, width : int
        Of the output.
    padding : int
        On every side.
    groups : int
    """

    name: str
    cin: int
    cout: int
    kernel: int
    stride: int
    input_height: int
    input_width: int
    height: int
    width: int
    padding: int
    groups: int = 1

    @property
    def weights(self) -> int:
        return self.cout * self.cin // self.groups * self.kernel**2

    @property
    def macs(self) -> int:
        return self.weights * self.height * self.width


class _Walk:
    """Follows a map through a network and writes down its layers."""

    def __init__(self, size: int) -> None:
        self.layers: list[LayerShape] = []
        self.size = size

    def conv(self, name: str, cin: int, cout: int, kernel: int = 1, stride: int = 1, padding: int | None = None) -> int:
        """Append a convolution, by default with padding that keeps the size; returns its output channels."""
        pad = kernel // 2 if padding is None else padding
        before, self.size = self.size, (self.size + 2 * pad - kernel) // stride + 1
        self.layers.append(
            LayerShape(name=name, cin=cin, cout=cout, kernel=kernel, stride=stride, input_height=before,
                       input_width=before, height=self.size, width=self.size, padding=pad)
        )  # fmt: skip
        return cout

    def c3(self, name: str, cin: int, cout: int, bottlenecks: int) -> int:
        """YOLOv5's C3: two 1x1 convolutions side by side, bottlenecks behind the first, a 1x1 over both."""
        hidden = cout // 2
        self.conv(f"{name}.cv1", cin, hidden)
        self.conv(f"{name}.cv2", cin, hidden)
        for index in range(bottlenecks):
            self.conv(f"{name}.m.{index}.cv1", hidden, hidden)
            self.conv(f"{name}.m.{index}.cv2", hidden, hidden, 3)
        return self.conv(f"{name}.cv3", 2 * hidden, cout)


def resnet18(size: int = 224, classes: int = 1000) -> tuple[LayerShape, ...]:
    """ResNet-18 for images of ``size x size`` pixels, as published: 7x7 stem with stride 2, max-pool."""
    walk = _Walk(size)
    channels = walk.conv("stem", 3, 64, 7, 2)
    walk.size = (walk.size - 1) // 2 + 1  # max-pool, 3x3, stride 2, padding 1
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            before = walk.size
            walk.conv(f"{name}.conv1", channels, width, 3, stride)
            walk.conv(f"{name}.conv2", width, width, 3)
            if stride != 1:
                walk.size = before
                walk.conv(f"{name}.shortcut", channels, width, 1, stride)
            channels = width
    walk.size = 1  # global average
    walk.conv("classifier", channels, classes)
    return tuple(walk.layers)


def yolov5n(size: int = 320, classes: int = 80) -> tuple[LayerShape, ...]:
    """YOLOv5n for images of ``size x size`` pixels, a multiple of 32; layers have YOLOv5's own numbers."""
    walk = _Walk(size)
    out: dict[int, tuple[int, int]] = {}

    def mark(layer: int, channels: int) -> int:
        out[layer] = channels, walk.size
        return channels

    c = mark(0, walk.conv("0", 3, 16, 6, 2, 2))
    for layer, width, bottlenecks in ((1, 32, 1), (3, 64, 2), (5, 128, 3), (7, 256, 1)):
        c = mark(layer, walk.conv(str(layer), c, width, 3, 2))
        c = mark(layer + 1, walk.c3(str(layer + 1), c, width, bottlenecks))
    walk.conv("9.cv1", c, c // 2)  # SPPF: three max-pools, concatenated
    c = mark(9, walk.conv("9.cv2", 2 * c, c))
    for layer, other, width in ((10, 6, 128), (14, 4, 64)):  # upsampled, beside the backbone's map
        c = mark(layer, walk.conv(str(layer), c, width))
        c, walk.size = c + out[other][0], out[other][1]
        c = mark(layer + 3, walk.c3(str(layer + 3), c, width, 1))
    for layer, other, width in ((18, 14, 128), (21, 10, 256)):
        c = walk.conv(str(layer), c, c, 3, 2)
        c = mark(layer + 2, walk.c3(str(layer + 2), c + out[other][0], width, 1))
    for index, layer in enumerate((17, 20, 23)):
        c, walk.size = out[layer]
        walk.conv(f"24.m.{index}", c, 3 * (5 + classes))
    return tuple(walk.layers)


NETWORKS: Final = {"resnet18-224": resnet18(), "yolov5n-320": yolov5n()}
"""What ``hw/RESULTS.md`` measures arrays on."""
