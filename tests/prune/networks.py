# SPDX-License-Identifier: Apache-2.0
"""Small networks, one for each way in which neurons hang together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 32)
        self.fc2 = nn.Linear(32, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))


class ConvNet(nn.Module):
    """Convolutions, batch norm, pooling, flatten into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12 * 4 * 4, 24)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.conv2(x)))
        return self.out(F.relu(self.fc(F.max_pool2d(x, 1).flatten(1))))


class Residual(nn.Module):
    """Two blocks, the second with a projection, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.na1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a2, self.na2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b1, self.nb1 = nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16)
        self.b2, self.nb2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down, self.ndown = nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.na2(self.a2(F.relu(self.na1(self.a1(x))))))
        x = F.relu(self.ndown(self.down(x)) + self.nb2(self.b2(F.relu(self.nb1(self.b1(x))))))
        return self.out(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Inverted residual blocks, as in MobileNet v2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.n1 = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depth, self.n2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.project, self.n3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.n0(self.stem(x)))
        y = F.relu6(self.n2(self.depth(F.relu6(self.n1(self.expand(x))))))
        return self.out(F.adaptive_avg_pool2d(x + self.n3(self.project(y)), 1).flatten(1))


class Grouped(nn.Module):
    """A grouped convolution in the middle, as in ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.c = nn.Conv2d(24, 8, 1)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.out(x.mean((2, 3)))


class Concat(nn.Module):
    """Dense connections, with the input of the network among what is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(11, 6, 3, padding=1)
        self.c = nn.Conv2d(17, 10, 1)
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.out(F.relu(self.c(x)).mean((2, 3)))


class Chunked(nn.Module):
    """A gated unit: two halves of one layer's outputs multiply, so that neuron i goes with neuron i + 12."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 24)
        self.mid = nn.Linear(12, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc(x).chunk(2, 1)
        return self.out(F.relu(self.mid(a * torch.sigmoid(b))))


class InputResidual(nn.Module):
    """The input is added back: the layer before the addition cannot lose neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(20, 32)
        self.b = nn.Linear(32, 20)
        self.out = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(x + self.b(F.relu(self.a(x)))))


class TwoHeads(nn.Module):
    """Several outputs, in a dict; one of them is a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(20, 32)
        self.features = nn.Linear(32, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.features(F.relu(self.trunk(x))))
        return {"features": features, "logits": self.head(features)}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(20, 16)
        self.right = nn.Linear(7, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(F.relu(self.left(left) + self.right(right)))


class Normed(nn.Module):
    """Layer norm and group norm over what is removed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.gn = nn.GroupNorm(4, 16)
        self.fc = nn.Linear(16, 24)
        self.ln = nn.LayerNorm(24)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gn(self.conv(x))).mean((2, 3))
        return self.out(F.relu(self.ln(self.fc(x))))


class Transposed(nn.Module):
    """An auto-encoder with a transposed convolution; PReLU with one slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.act = nn.PReLU(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up(self.act(self.down(x)))))


class Sequence1d(nn.Module):
    """Linear layers over [N, T, C], with a residual connection and a bare scale parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.up = nn.Linear(16, 32)
        self.scale = nn.Parameter(torch.rand(32) + 0.5)
        self.down = nn.Linear(32, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(x)) * self.scale)
        return self.out(x)


@dataclass(frozen=True)
class Case:
    """A network, inputs that fit it, and which layers lose how many neurons at a ratio of one half."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    halved: dict[str, int]  # width afterwards of every layer that gets narrower; all others stay

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # anything but the identity
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        return model


def _image() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def _rows(n: int = 20) -> Tensor:
    return torch.randn(3, n, generator=torch.Generator().manual_seed(n))


CASES: dict[str, Case] = {
    "mlp": Case(Mlp, _rows, {"fc1": 16, "fc2": 8}),
    "conv": Case(ConvNet, lambda: torch.randn(2, 3, 20, 20), {"conv1": 4, "conv2": 6, "fc": 12}),
    "residual": Case(Residual, _image, {"stem": 4, "a1": 4, "a2": 4, "b1": 8, "b2": 8, "down": 8}),
    "depthwise": Case(Depthwise, _image, {"stem": 4, "expand": 12, "depth": 12, "project": 4}),
    "grouped": Case(Grouped, _image, {"a": 8, "b": 12, "c": 4}),
    "concat": Case(Concat, _image, {"a": 4, "b": 3, "c": 5}),
    "chunked": Case(Chunked, _rows, {"fc": 12, "mid": 8}),
    "input residual": Case(InputResidual, _rows, {"a": 16}),
    "two heads": Case(TwoHeads, _rows, {"trunk": 16}),
    "two inputs": Case(TwoInputs, lambda: (_rows(), _rows(7)), {"left": 8, "right": 8}),
    "normed": Case(Normed, _image, {"conv": 8, "fc": 12}),
    "transposed": Case(Transposed, _image, {"down": 8, "up": 4}),
    "sequence": Case(Sequence1d, lambda: torch.randn(2, 5, 6), {"embed": 8, "up": 16, "down": 8}),
}
