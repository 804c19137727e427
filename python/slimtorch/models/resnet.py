# SPDX-License-Identifier: Apache-2.0
"""Residual networks: for 32x32 images (20, 56, 110), for ImageNet (18, 34, 50), and pruned shapes of them.

He et al., "Deep Residual Learning for Image Recognition" (1512.03385), Tables 1 and 6. The pruned shapes are those of
Li et al., "Pruning Filters for Efficient ConvNets" (1608.08710), Table 1, which "Rethinking the Value of Network
Pruning" (1810.05270) trains from scratch: the first convolution of a block loses channels, so that nothing outside the
block changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import nn


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions; ``inner`` channels between them, ``c_out`` unless it is given."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, inner: int | None = None, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        inner = c_out if inner is None else inner
        self.conv1 = nn.Conv2d(c_in, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = _projection(c_in, c_out, stride) if shortcut is None else shortcut

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """What the convolutions add to the shortcut."""
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def join(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """The output for a branch that gave ``y``; None: for one that was skipped."""
        return self.relu(self.shortcut(x) if y is None else y + self.shortcut(x))

    def skipped(self) -> nn.Module:
        """What is left when the branch is dropped for good."""
        return nn.Sequential(OrderedDict(shortcut=self.shortcut, relu=self.relu))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(x, self.branch(x))


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 to four times ``width``. The stride is in the 3x3 as in torchvision; the paper has it before."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = 4 * width
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = _projection(c_in, c_out, stride)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """What the convolutions add to the shortcut."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))

    def join(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """The output for a branch that gave ``y``; None: for one that was skipped."""
        return self.relu(self.shortcut(x) if y is None else y + self.shortcut(x))

    def skipped(self) -> nn.Module:
        """What is left when the branch is dropped for good."""
        return nn.Sequential(OrderedDict(shortcut=self.shortcut, relu=self.relu))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(x, self.branch(x))


class _ZeroShortcut(nn.Module):
    """Option A of section 3.3: every second pixel, and zeros for the channels that are new. No parameters."""

    def __init__(self, new: int, stride: int) -> None:
        super().__init__()
        self.new = new
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))

    def extra_repr(self) -> str:
        return f"new={self.new}, stride={self.stride}"


def _projection(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


@torch.no_grad()
def he_(model: nn.Module) -> None:
    """Starts convolutions as He et al. 2015 do: normal, variance 2 / (outputs · kernel size)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _kept(
    blocks: Sequence[int], widths: Sequence[int], percent: Sequence[int], whole: Collection[int]
) -> tuple[int, ...]:
    """Channels inside each block after pruning.

    Args:
        blocks: per stage.
        widths: of the stages.
        percent: of the channels that go, per stage.
        whole: the convolutions that are not pruned, counted as 1608.08710 does: the stem is 1, a block's first are
            2, 4, 6 …
    """
    inner: list[int] = []
    for count, width, share in zip(blocks, widths, percent, strict=True):
        for _ in range(count):
            skipped = 2 * (len(inner) + 1) in whole
            inner.append(width if skipped else width * (100 - share) // 100)
    return tuple(inner)


# --- 32x32 images -------------------------------------------------------------------------------------------------


def _cifar(depth: int, classes: int, channels: int, inner: Sequence[int] | None, width: int) -> nn.Sequential:
    blocks = (depth - 2) // 6  # per stage
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    if inner is not None and len(inner) != 3 * blocks:
        raise ValueError(f"inner: expected {3 * blocks} numbers of channels, got {len(inner)}")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    c_in = width
    for index in range(3 * blocks):
        c_out = width * 2 ** (index // blocks)
        stride = c_out // c_in
        layers.append(
            _BasicBlock(
                c_in, c_out, stride, None if inner is None else inner[index], _ZeroShortcut(c_out - c_in, stride)
            )
        )
        c_in = c_out
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))
    he_(network)
    return network


def resnet20(
    classes: int = 10, channels: int = 3, inner: Sequence[int] | None = None, width: int = 16
) -> nn.Sequential:
    """ResNet-20 for CIFAR, shortcuts without parameters (option A): 269,722 parameters (0.27 M in Table 6).

    Args:
        classes: outputs.
        channels: of the images.
        inner: channels between the two convolutions of each block, in order (9 blocks); None: as wide as the block.
        width: channels of the first stage; the others have twice and four times as many.

    Input [N, channels, H, W] (CIFAR: 32x32), output [N, classes]. Channels can be removed inside blocks
    (``prune_(model, {"*.conv1": Neurons(...)}, ...)``); those between blocks hang together by zero padding, which
    ``prune_`` refuses to cut.
    """
    return _cifar(20, classes, channels, inner, width)


def resnet56(
    classes: int = 10, channels: int = 3, inner: Sequence[int] | None = None, width: int = 16
) -> nn.Sequential:
    """ResNet-56 for CIFAR: 853,018 parameters (0.85 M in Table 6). As :func:`resnet20`, with 27 blocks."""
    return _cifar(56, classes, channels, inner, width)


def resnet110(
    classes: int = 10, channels: int = 3, inner: Sequence[int] | None = None, width: int = 16
) -> nn.Sequential:
    """ResNet-110 for CIFAR: 1,727,962 parameters (1.7 M in Table 6). As :func:`resnet20`, with 54 blocks."""
    return _cifar(110, classes, channels, inner, width)


def _kept_cifar(
    depth: int, width: int, percent: tuple[int, int, int], whole: Collection[int]
) -> tuple[int, ...]:
    return _kept(((depth - 2) // 6,) * 3, (width, 2 * width, 4 * width), percent, whole)


def resnet56_a(classes: int = 10, channels: int = 3, width: int = 16) -> nn.Sequential:
    """ResNet-56-pruned-A: 10 % of the channels inside blocks gone, four blocks whole (1608.08710, section 4.2)."""
    return resnet56(classes, channels, _kept_cifar(56, width, (10, 10, 10), (16, 20, 38, 54)), width)


def resnet56_b(classes: int = 10, channels: int = 3, width: int = 16) -> nn.Sequential:
    """ResNet-56-pruned-B: 60, 30 and 10 % gone in the three stages, six blocks whole (1608.08710, section 4.2)."""
    return resnet56(classes, channels, _kept_cifar(56, width, (60, 30, 10), (16, 18, 20, 34, 38, 54)), width)


def resnet110_a(classes: int = 10, channels: int = 3, width: int = 16) -> nn.Sequential:
    """ResNet-110-pruned-A: 50 % gone in the first stage, one block whole (1608.08710, section 4.2)."""
    return resnet110(classes, channels, _kept_cifar(110, width, (50, 0, 0), (36,)), width)


def resnet110_b(classes: int = 10, channels: int = 3, width: int = 16) -> nn.Sequential:
    """ResNet-110-pruned-B: 50, 40 and 30 % gone in the three stages, three blocks whole (1608.08710, section 4.2)."""
    return resnet110(classes, channels, _kept_cifar(110, width, (50, 40, 30), (36, 38, 74)), width)


# --- ImageNet -----------------------------------------------------------------------------------------------------


def _stem(channels: int, width: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]


def _basic(
    blocks: Sequence[int], classes: int, channels: int, width: int, inner: Sequence[int] | None = None
) -> nn.Sequential:
    if inner is not None and len(inner) != sum(blocks):
        raise ValueError(f"inner: expected {sum(blocks)} numbers of channels, got {len(inner)}")
    between = iter([None] * sum(blocks) if inner is None else inner)
    layers = _stem(channels, width)
    c_in = width
    for stage, count in enumerate(blocks):
        c_out = width * 2**stage
        for index in range(count):
            layers.append(_BasicBlock(c_in, c_out, 2 if stage and not index else 1, next(between)))
            c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))


def resnet18(classes: int = 1000, channels: int = 3, width: int = 64) -> nn.Sequential:
    """A ResNet-18-shaped network (He et al. 2016, 1512.03385, Table 1): 11,689,512 parameters as by default.

    Input [N, channels, H, W] with H and W from 32 on (ImageNet: 224), output [N, classes].
    """
    return _basic((2, 2, 2, 2), classes, channels, width)


def resnet34(
    classes: int = 1000, channels: int = 3, width: int = 64, inner: Sequence[int] | None = None
) -> nn.Sequential:
    """ResNet-34 (Table 1): 21,797,672 parameters as by default. As :func:`resnet18`.

    ``inner``: channels between the two convolutions of each of the 16 blocks; None: as wide as the block.
    """
    return _basic((3, 4, 6, 3), classes, channels, width, inner)


_WHOLE_34 = (2, 8, 14, 16, 26, 28, 30, 32)


def resnet34_a(classes: int = 1000, channels: int = 3) -> nn.Sequential:
    """ResNet-34-pruned-A: 30 % gone in the first three stages, eight blocks whole (1608.08710, section 4.3)."""
    inner = _kept((3, 4, 6, 3), (64, 128, 256, 512), (30, 30, 30, 0), _WHOLE_34)
    return resnet34(classes, channels, inner=inner)


def resnet34_b(classes: int = 1000, channels: int = 3) -> nn.Sequential:
    """ResNet-34-pruned-B: 50, 60 and 40 % gone in the first three stages, eight blocks whole (section 4.3)."""
    inner = _kept((3, 4, 6, 3), (64, 128, 256, 512), (50, 60, 40, 0), _WHOLE_34)
    return resnet34(classes, channels, inner=inner)


def resnet50(classes: int = 1000, channels: int = 3, width: int = 64) -> nn.Sequential:
    """ResNet-50 (Table 1), strides in the 3x3 convolutions: 25,557,032 parameters by default. As :func:`resnet18`."""
    layers = _stem(channels, width)
    c_in = width
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            layers.append(_Bottleneck(c_in, width * 2**stage, 2 if stage and not index else 1))
            c_in = 4 * width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))
