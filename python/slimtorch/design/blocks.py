# SPDX-License-Identifier: Apache-2.0
"""Units of the small networks: fire, inverted residual, ShuffleNet unit, and the shuffle between groups of channels.

They are of plain `torch.nn` layers, so that pruning, clustering, packing and files find what they know. What each costs
says :mod:`slimtorch.design.costs`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.design._checks import divides, odd, positive, shuffle_channels


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel `g · n + i` of [N, groups · n, H, W] goes to `i · groups + g`: each group gets some of every group.

    Zhang et al., "ShuffleNet" (1707.01083), section 3.1, figure 1.

    Args:
        x: [N, C, ...], any dtype and batch.
        groups: of the group convolution before it; divides C.

    Returns:
        The same shape, contiguous.

    Raises:
        ValueError: `x` has no channels, or `groups` does not divide them.
    """
    positive(groups, "groups")
    if x.dim() < 2:
        raise ValueError(f"x: expected [N, C, ...], got {list(x.shape)}")
    channels = x.shape[1]
    divides(groups, channels, "groups", "the channels of x")
    if groups == 1:
        return x.contiguous()
    return x.unflatten(1, (groups, channels // groups)).transpose(1, 2).flatten(1, 2)


class Fire(nn.Module):
    """SqueezeNet's unit: 1x1 to few channels, then 1x1 and 3x3 side by side, each with ReLU; sizes stay.

    Iandola et al., "SqueezeNet" (1602.07360), section 3.2. No batch norm, as there.

    Args:
        in_channels: of the input.
        squeeze: channels between.
        expand1x1, expand3x3: channels of the two convolutions, which are put one after the other.

    Input [N, in_channels, H, W] or without N, output [N, expand1x1 + expand3x3, H, W].
    """

    def __init__(self, in_channels: int, squeeze: int, expand1x1: int, expand3x3: int) -> None:
        super().__init__()
        given = {"in_channels": in_channels, "squeeze": squeeze, "expand1x1": expand1x1, "expand3x3": expand3x3}
        for name, value in given.items():
            positive(value, name)
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand1x1, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand3x3, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        return torch.cat([self.relu(self.expand1x1(x)), self.relu(self.expand3x3(x))], -3)


class InvertedResidual(nn.Module):
    """MobileNet-V2's unit: 1x1 to `factor` times the channels, depthwise, 1x1 without activation behind it.

    Sandler et al., "MobileNetV2" (1801.04381), section 3.3, table 1: batch norm after each convolution, ReLU6 after the
    first two; added to its input where stride is 1 and the channels stay. With a factor of 1 the first 1x1 is left out,
    as in the authors' code.

    Args:
        in_channels, out_channels: of input and output.
        stride: of the depthwise convolution.
        factor: of the expansion, t in the paper.
        kernel_size: of the depthwise convolution, odd.

    Input [N, in_channels, H, W], output [N, out_channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, factor: int = 6, kernel_size: int = 3
    ) -> None:
        super().__init__()
        given = {"in_channels": in_channels, "out_channels": out_channels, "stride": stride, "factor": factor}
        for name, value in given.items():
            positive(value, name)
        odd(kernel_size, "kernel_size")
        hidden = factor * in_channels
        layers = _unit(in_channels, hidden, 1, 1, 1) if factor != 1 else []
        layers += _unit(hidden, hidden, kernel_size, stride, hidden)
        last = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.body = nn.Sequential(*layers, last, nn.BatchNorm2d(out_channels))
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)

    def extra_repr(self) -> str:
        return f"adds={self.adds}"


def _unit(c_in: int, c_out: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(c_out), nn.ReLU6()]


class ShuffleUnit(nn.Module):
    """ShuffleNet's unit: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1, beside a shortcut.

    Zhang et al., "ShuffleNet" (1707.01083), section 3.2, figure 2 b and c: batch norm after each convolution, ReLU
    after the first and at the end. Stride 1 adds the input; stride 2 puts the input, averaged over 3x3, before the new
    channels.

    Args:
        in_channels: of the input.
        out_channels: of the output; for stride 1 as many as `in_channels`, for stride 2 more.
        stride: 1 or 2.
        groups: of both 1x1 convolutions.
        bottleneck: channels between; None: a quarter of `out_channels` (section 3.3), at least one per group.
        group_first: False leaves the first 1x1 without groups, as the paper does where the input has few channels.

    Input [N, in_channels, H, W], output [N, out_channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 3,
        bottleneck: int | None = None,
        group_first: bool = True,
    ) -> None:
        super().__init__()
        bottleneck, new = shuffle_channels(in_channels, out_channels, stride, groups, bottleneck, group_first)
        self.groups = groups
        self.stride = stride
        self.compress = nn.Conv2d(in_channels, bottleneck, 1, groups=groups if group_first else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(bottleneck)
        self.depthwise = nn.Conv2d(bottleneck, bottleneck, 3, stride, 1, groups=bottleneck, bias=False)
        self.bn2 = nn.BatchNorm2d(bottleneck)
        self.expand = nn.Conv2d(bottleneck, new, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(new)

    def forward(self, x: Tensor) -> Tensor:
        y = channel_shuffle(F.relu(self.bn1(self.compress(x))), self.groups)
        y = self.bn3(self.expand(self.bn2(self.depthwise(y))))
        if self.stride == 1:
            return F.relu(x + y)
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, groups={self.groups}"
