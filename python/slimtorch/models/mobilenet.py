# SPDX-License-Identifier: Apache-2.0
"""MobileNets: depthwise convolutions and 1x1 convolutions between them."""

from __future__ import annotations

from torch import nn

from slimtorch.design.blocks import InvertedResidual


def mobilenet_v1(classes: int = 1000, channels: int = 3, width: float = 1.0) -> nn.Sequential:
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


mobilenet = mobilenet_v1


def _unit(c_in: int, c_out: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(c_out), nn.ReLU6()]


def mobilenet_v2(classes: int = 1000, channels: int = 3, width: float = 1.0) -> nn.Sequential:
    """MobileNet-V2 (Sandler et al. 2018, 1801.04381, Table 2): 3,504,872 parameters as by default.

    ``width`` is the paper's width multiplier; channels are rounded to multiples of 8 as the authors' code does, and the
    last 1x1 convolution is not narrowed (section 6.1). Input [N, channels, H, W] with H and W from 32 on (ImageNet:
    224), output [N, classes].
    """

    def scaled(count: int) -> int:
        rounded = max(8, int(count * width + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * count * width else rounded

    c_in = scaled(32)
    layers = _unit(channels, c_in, 3, 2, 1)
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for factor, c_out, count, stride in plan:
        for index in range(count):
            layers.append(InvertedResidual(c_in, scaled(c_out), 1 if index else stride, factor))
            c_in = scaled(c_out)
    last = scaled(1280) if width > 1 else 1280
    layers += _unit(c_in, last, 1, 1, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(last, classes))
