# SPDX-License-Identifier: Apache-2.0
"""Conv-2, Conv-4 and Conv-6: the small convolutional networks of the lottery-ticket papers.

Frankle & Carbin, "The Lottery Ticket Hypothesis" (1803.03635), Figure 2: one, two or three times two 3x3 convolutions
and a max pooling, then 256 - 256 - classes. The figure gives 38 K, 260 K and 1.1 M weights in convolutions and 4.3 M,
2.4 M and 1.7 M in all. The last does not follow from its own columns: 1.1 M in convolutions and 4096·256 in the first
linear layer alone are more; with the padding that gives the other numbers, Conv-6 has 2.3 M.
"""

from __future__ import annotations

import torch
from torch import nn


def conv2(classes: int = 10, channels: int = 3, size: int = 32) -> nn.Sequential:
    """Two convolutions of 64 channels: 4,301,642 parameters.

    Input [N, channels, size, size] (``size`` divisible by 2), output [N, classes]. Weights start Glorot normal.
    """
    return _conv((64,), classes, channels, size)


def conv4(classes: int = 10, channels: int = 3, size: int = 32) -> nn.Sequential:
    """Twice 64, twice 128 channels: 2,425,930 parameters. As :func:`conv2`, ``size`` divisible by 4."""
    return _conv((64, 128), classes, channels, size)


def conv6(classes: int = 10, channels: int = 3, size: int = 32) -> nn.Sequential:
    """Twice 64, 128 and 256 channels: 2,262,602 parameters. As :func:`conv2`, ``size`` divisible by 8."""
    return _conv((64, 128, 256), classes, channels, size)


def _conv(widths: tuple[int, ...], classes: int, channels: int, size: int) -> nn.Sequential:
    step = 2 ** len(widths)
    if size < step or size % step:
        raise ValueError(f"size: expected a positive multiple of {step}, got {size}")
    layers: list[nn.Module] = []
    c_in = channels
    for width in widths:
        layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        c_in = width
    layers += [nn.Flatten(), nn.Linear(c_in * (size // step) ** 2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(256, classes))
    glorot_(network)
    return network


@torch.no_grad()
def glorot_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Starts Linear and Conv2d layers anew, in place: weights Glorot normal, biases zero (1803.03635, Figure 2).

    Args:
        model: any module; other layers stay as they are.
        generator: on the device of the weights; None takes torch's own.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
