# SPDX-License-Identifier: Apache-2.0
"""The networks of the experiments, and the layer shapes of three well-known ones.

The networks are plain ``torch.nn``: whatever this library does to them, it does to anyone's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

# --- networks -----------------------------------------------------------------------------------------------------


class LeNet300(nn.Module):
    """LeNet-300-100 (LeCun et al. 1998): 784 - 300 - 100 - 10 with ReLU, 266,610 parameters.

    Args:
        hidden: widths of the two hidden layers; narrower ones give the control networks.

    Input [N, 1, 28, 28] or [N, 784], output [N, 10].
    """

    def __init__(self, hidden: Sequence[int] = (300, 100)) -> None:
        super().__init__()
        first, second = hidden
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(784, first)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(first, second)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(second, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.fc1(self.flatten(x)))
        return self.fc3(self.relu2(self.fc2(x)))


class LeNet5(nn.Module):
    """LeNet-5 as Caffe and the pruning papers have it: 20 - 50 - 500 - 10, 5x5 kernels, 431,080 parameters.

    Args:
        hidden: channels of the two convolutions and width of the hidden linear layer.

    Input [N, 1, 28, 28], output [N, 10].
    """

    def __init__(self, hidden: Sequence[int] = (20, 50, 500)) -> None:
        super().__init__()
        first, second, third = hidden
        self.conv1 = nn.Conv2d(1, first, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * 16, third)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(third, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.fc2(self.relu3(self.fc1(self.flatten(x))))


class _BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


def resnet18(classes: int = 1000, channels: int = 3, width: int = 64) -> nn.Sequential:
    """A ResNet-18-shaped network (He et al. 2016, 1512.03385, Table 1): 11,689,512 parameters as by default.

    Input [N, channels, H, W] with H and W from 32 on (ImageNet: 224), output [N, classes].
    """
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    c_in = width
    for stage in range(4):
        c_out = width * 2**stage
        layers += [_BasicBlock(c_in, c_out, 1 if stage == 0 else 2), _BasicBlock(c_out, c_out, 1)]
        c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))


def mobilenet(classes: int = 1000, channels: int = 3, width: float = 1.0) -> nn.Sequential:
    """A MobileNet-shaped network (Howard et al. 2017, 1704.04861, Table 1): 4,231,976 parameters as by default.

    ``width`` is the paper's width multiplier. Input [N, channels, H, W] with H and W from 32 on (ImageNet: 224),
    output [N, classes].
    """

    def scaled(count: int) -> int:
        return max(1, round(count * width))

    def unit(c_in: int, c_out: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
        convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(c_out), nn.ReLU()]

    layers = unit(channels, scaled(32), 3, 2, 1)
    c_in = scaled(32)
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for c_out, stride in plan:
        layers += unit(c_in, c_in, 3, stride, c_in) + unit(c_in, scaled(c_out), 1, 1, 1)
        c_in = scaled(c_out)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))


# --- layer shapes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerShape:
    """One convolution or linear layer of a network, by its numbers.

    ``height`` is the height and width of the input; ``count`` how often the network has this very layer. A linear
    layer has ``kernel`` 0 and ``height`` 1.
    """

    name: str
    c_out: int
    c_in: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    height: int = 1
    count: int = 1

    @property
    def is_linear(self) -> bool:
        return self.kernel == 0

    @property
    def out_height(self) -> int:
        return 1 if self.is_linear else (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.is_linear:
            return (self.c_out, self.c_in)
        return (self.c_out, self.c_in // self.groups, self.kernel, self.kernel)

    @property
    def weights(self) -> int:
        return self.c_out * self.c_in // self.groups * max(1, self.kernel) ** 2

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.weights * self.out_height**2

    def input_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.c_in) if self.is_linear else (batch, self.c_in, self.height, self.height)

    def build(self) -> nn.Linear | nn.Conv2d:
        """A torch layer of this shape, initialised as torch does."""
        if self.is_linear:
            return nn.Linear(self.c_in, self.c_out)
        return nn.Conv2d(self.c_in, self.c_out, self.kernel, self.stride, self.padding, groups=self.groups)


# Krizhevsky et al. 2012 as in Caffe's bvlc_reference: conv2, conv4 and conv5 in two groups.
ALEXNET = (
    LayerShape("conv1", 96, 3, 11, stride=4, height=227),
    LayerShape("conv2", 256, 96, 5, padding=2, groups=2, height=27),
    LayerShape("conv3", 384, 256, 3, padding=1, height=13),
    LayerShape("conv4", 384, 384, 3, padding=1, groups=2, height=13),
    LayerShape("conv5", 256, 384, 3, padding=1, groups=2, height=13),
    LayerShape("fc6", 4096, 9216, 0),
    LayerShape("fc7", 4096, 4096, 0),
    LayerShape("fc8", 1000, 4096, 0),
)

# Simonyan & Zisserman 2014 (1409.1556), configuration D.
VGG16 = (
    LayerShape("conv1_1", 64, 3, 3, padding=1, height=224),
    LayerShape("conv1_2", 64, 64, 3, padding=1, height=224),
    LayerShape("conv2_1", 128, 64, 3, padding=1, height=112),
    LayerShape("conv2_2", 128, 128, 3, padding=1, height=112),
    LayerShape("conv3_1", 256, 128, 3, padding=1, height=56),
    LayerShape("conv3_2", 256, 256, 3, padding=1, height=56, count=2),
    LayerShape("conv4_1", 512, 256, 3, padding=1, height=28),
    LayerShape("conv4_2", 512, 512, 3, padding=1, height=28, count=2),
    LayerShape("conv5", 512, 512, 3, padding=1, height=14, count=3),
    LayerShape("fc6", 4096, 25088, 0),
    LayerShape("fc7", 4096, 4096, 0),
    LayerShape("fc8", 1000, 4096, 0),
)


def _resnet50() -> tuple[LayerShape, ...]:
    """He et al. 2016, Table 1, with the stride of a stage in its first 3x3 (as torchvision has it)."""
    shapes = [LayerShape("conv1", 64, 3, 7, stride=2, padding=3, height=224)]
    c_in, height = 64, 56
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=2):
        c_out, stride = 4 * width, 1 if stage == 2 else 2
        small = height // stride
        shapes += [
            LayerShape(f"conv{stage}_1.a", width, c_in, 1, height=height),
            LayerShape(f"conv{stage}_1.b", width, width, 3, stride=stride, padding=1, height=height),
            LayerShape(f"conv{stage}_1.skip", c_out, c_in, 1, stride=stride, height=height),
            LayerShape(f"conv{stage}_x.a", width, c_out, 1, height=small, count=blocks - 1),
            LayerShape(f"conv{stage}_x.b", width, width, 3, padding=1, height=small, count=blocks - 1),
            LayerShape(f"conv{stage}.c", c_out, width, 1, height=small, count=blocks),
        ]
        c_in, height = c_out, small
    return (*shapes, LayerShape("fc", 1000, 2048, 0))


RESNET50 = _resnet50()
