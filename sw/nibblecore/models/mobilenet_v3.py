"""MobileNetV3-small (Howard et al., "Searching for MobileNetV3", ICCV 2019, table 2)."""

from typing import Final

from torch import Tensor, nn

from .mobilenet_v2 import scaled

BLOCKS: Final = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
"""Table 2: kernel, expanded channels, output channels, squeeze-excite, hard-swish instead of ReLU, stride."""
NORM_EPS: Final = 0.001


class SqueezeExcite(nn.Module):
    """Each channel times a factor in 0..1 that two 1x1 convolutions make of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Section 5.3: a quarter of the expanded channels.
        reduced = scaled(channels, 0.25)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        factor = self.gate(self.expand(self.relu(self.reduce(self.average(x)))))
        return x * factor


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int, activation: type[nn.Module] | None, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm and activation; the padding keeps the size at stride 1."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out_channels, NORM_EPS)
    return nn.Sequential(conv, norm) if activation is None else nn.Sequential(conv, norm, activation())


class Bottleneck(nn.Module):
    """1x1 expansion, depthwise, squeeze-excite, linear 1x1 projection; a shortcut where the shape stays. Figure 4."""

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, kernel: int, stride: int, squeeze: bool, swish: bool
    ) -> None:
        super().__init__()
        activation = nn.Hardswish if swish else nn.ReLU
        layers: list[nn.Module] = [] if hidden == in_channels else [conv_bn(in_channels, hidden, 1, 1, activation)]
        layers.append(conv_bn(hidden, hidden, kernel, stride, activation, groups=hidden))
        if squeeze:
            layers.append(SqueezeExcite(hidden))
        layers.append(conv_bn(hidden, out_channels, 1, 1, None))
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


class MobileNetV3Small(nn.Module):
    """A stem, the blocks of :data:`BLOCKS`, a 1x1 convolution, global pool, two linear layers.

    Parameters
    ----------
    num_classes, in_channels : int
    width : float
        Factor on channels, rounded to multiples of 8 by :func:`nibblecore.models.mobilenet_v2.scaled`.
    small_input : bool
        For images of some 32 pixels: stem and first block without stride, so that rows and columns are divided by 8
        instead of 32.
    dropout : float
        Before the classifier.
    momentum : float
        Of the batch norms' statistics. The paper's, whose averages decay by 0.99 (section 6.1.1), wants thousands of
        steps before evaluation mode means anything; short trainings take 0.1.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        small_input: bool = False,
        dropout: float = 0.2,
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        channels = scaled(16, width)
        self.stem = conv_bn(in_channels, channels, 3, 1 if small_input else 2, nn.Hardswish)
        blocks = []
        for index, (kernel, hidden, out_channels, squeeze, swish, stride) in enumerate(BLOCKS):
            stride = 1 if small_input and index == 0 else stride
            sizes = scaled(hidden, width), scaled(out_channels, width)
            blocks.append(Bottleneck(channels, *sizes, kernel, stride, squeeze, swish))
            channels = sizes[1]
        self.blocks = nn.Sequential(*blocks)
        last, features = 6 * channels, scaled(1024, width)
        self.head = conv_bn(channels, last, 1, 1, nn.Hardswish)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.features = nn.Linear(last, features)
        self.swish = nn.Hardswish()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.head(self.blocks(self.stem(x)))).flatten(1)
        logits: Tensor = self.classifier(self.dropout(self.swish(self.features(x))))
        return logits


def mobilenet_v3_small() -> MobileNetV3Small:
    """MobileNetV3-small for 1000 classes, input ``(N, 3, 224, 224)``: 2.54 million parameters."""
    return MobileNetV3Small()


def mobilenet_v3_small_32() -> MobileNetV3Small:
    """MobileNetV3-small for 10 classes of ``(N, 3, 32, 32)``: 1.53 million parameters."""
    return MobileNetV3Small(10, small_input=True, momentum=0.1)
