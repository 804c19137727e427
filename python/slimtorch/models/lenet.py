# SPDX-License-Identifier: Apache-2.0
"""The two networks for digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


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
