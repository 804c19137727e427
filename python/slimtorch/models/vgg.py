# SPDX-License-Identifier: Apache-2.0
"""VGG-16 for 32x32 images, as the papers on filter pruning have it, and its pruned shape.

Li et al., "Pruning Filters for Efficient ConvNets" (1608.08710), Table 2; Liu et al., "Rethinking the Value of Network
Pruning" (1810.05270): thirteen 3x3 convolutions with batch norm, then one hidden layer of 512.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from slimtorch.models.resnet import he_

VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG16_A_WIDTHS = (32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256)
_POOL_AFTER = (1, 3, 6, 9)  # indices of convolutions


def vgg16(
    classes: int = 10, channels: int = 3, widths: Sequence[int] = VGG16_WIDTHS, hidden: int = 512
) -> nn.Sequential:
    """VGG-16 for CIFAR: 14,987,722 parameters (1.5·10⁷ in 1608.08710, Table 1).

    Args:
        classes: outputs.
        channels: of the images.
        widths: output channels of the thirteen convolutions; fewer give a pruned network.
        hidden: units of the hidden layer.

    Input [N, channels, H, W] with H and W from 16 on (CIFAR: 32), output [N, classes].
    """
    if len(widths) != len(VGG16_WIDTHS):
        raise ValueError(f"widths: expected {len(VGG16_WIDTHS)} numbers of channels, got {len(widths)}")
    layers: list[nn.Module] = []
    c_in = channels
    for index, width in enumerate(widths):
        layers += [nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        if index in _POOL_AFTER:
            layers.append(nn.MaxPool2d(2))
        c_in = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(hidden, classes))
    he_(network)
    return network


def vgg16_a(classes: int = 10, channels: int = 3) -> nn.Sequential:
    """VGG-16-pruned-A: half of the filters of the first and of the last six convolutions gone; 5,397,034 parameters.

    1608.08710, Table 1: 5.4·10⁶, 64.0 % fewer.
    """
    return vgg16(classes, channels, VGG16_A_WIDTHS)
