"""MobileNetV2 (Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: inverted residuals and linear bottlenecks", CVPR
2018, table 2)."""

from typing import Final

from torch import Tensor, nn

BLOCKS: Final = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Table 2: expansion t, output channels c, repetitions n, stride s of the first of them."""


def scaled(channels: int, width: float, multiple: int = 8) -> int:
    """``channels * width`` to the nearest ``multiple``, at least one of them, and at most a tenth less than asked."""
    result = max(multiple, int(channels * width + multiple / 2) // multiple * multiple)
    return result + multiple if result < 0.9 * channels * width else result


def conv_bn(
    in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, clamp: bool = True
) -> nn.Sequential:
    """Convolution with batch norm, and ReLU6 unless told otherwise; the padding keeps the size at stride 1."""
    layers = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if clamp else []))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the shape stays. Figure 3 of the paper."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = [] if expansion == 1 else [conv_bn(in_channels, hidden)]
        layers += [
            conv_bn(hidden, hidden, 3, stride, groups=hidden),
            conv_bn(hidden, out_channels, clamp=False),
        ]
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """A stem, the blocks of :data:`BLOCKS`, a last 1x1 convolution, global pool, dropout, classifier.

    Parameters
    ----------
    num_classes, in_channels : int
    width : float
        Factor on channels, rounded to multiples of 8 by :func:`scaled`; that of the last convolution is at least 1.
    small_input : bool
        For images of some 32 pixels: stem and second stage without stride, so that rows and columns are divided by 8
        instead of 32.
    dropout : float
        Before the classifier.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        small_input: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        channels, last = scaled(32, width), scaled(1280, max(1.0, width))
        self.stem = conv_bn(in_channels, channels, 3, 1 if small_input else 2)
        blocks = []
        for index, (expansion, count, repetitions, stride) in enumerate(BLOCKS):
            out_channels = scaled(count, width)
            for repetition in range(repetitions):
                keep = repetition > 0 or (small_input and index == 1)
                blocks.append(InvertedResidual(channels, out_channels, 1 if keep else stride, expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn(channels, last)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(self.dropout(self.average(x).flatten(1)))
        return logits


def mobilenet_v2() -> MobileNetV2:
    """MobileNetV2 for 1000 classes, input ``(N, 3, 224, 224)``: 3.50 million parameters."""
    return MobileNetV2()


def mobilenet_v2_small() -> MobileNetV2:
    """MobileNetV2 for 10 classes of ``(N, 3, 32, 32)``: 2.24 million parameters."""
    return MobileNetV2(10, small_input=True)
