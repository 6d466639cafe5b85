"""ResNet-18 (He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016, table 1)."""

from torch import Tensor, nn

from .resnet8 import Block


class ResNet18(nn.Module):
    """A stem, four stages of two blocks (each but the first halves rows and columns), global pool, classifier.

    Parameters
    ----------
    num_classes, in_channels : int
    width : float
        Factor on the channels of all layers, 64 in the first stage.
    small_input : bool
        For images of some 32 pixels: a 3x3 stem without stride, and no max-pool, as section 4.2 of the paper has it
        for CIFAR-10. Otherwise a 7x7 stem with stride 2 and a max-pool, for some 224 pixels.
    """

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, *, width: float = 1.0, small_input: bool = False
    ) -> None:
        super().__init__()
        channels = [max(1, round(c * width)) for c in (64, 128, 256, 512)]
        if small_input:
            stem = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        else:
            stem = nn.Conv2d(in_channels, channels[0], 7, stride=2, padding=3, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(channels[0]), nn.ReLU())
        self.pool = nn.Identity() if small_input else nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        previous = channels[0]
        for index, count in enumerate(channels):
            stages.append(nn.Sequential(Block(previous, count, 1 if index == 0 else 2), Block(count, count, 1)))
            previous = count
        self.stages = nn.Sequential(*stages)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(previous, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.pool(self.stem(x)))
        logits: Tensor = self.classifier(self.average(x).flatten(1))
        return logits


def resnet18() -> ResNet18:
    """ResNet-18 for 1000 classes, input ``(N, 3, 224, 224)``: 11.69 million parameters."""
    return ResNet18()


def resnet18_small() -> ResNet18:
    """ResNet-18 for 10 classes of ``(N, 3, 32, 32)``: 11.17 million parameters."""
    return ResNet18(10, small_input=True)
