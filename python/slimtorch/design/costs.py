# SPDX-License-Identifier: Apache-2.0
"""What layers cost, in closed form: parameters, and multiply-accumulates (MACs) of one sample.

One function for each kind of layer, in the sizes of the layer alone, so that an architecture can be weighed before
anything is built. I and O: channels in and out; k: kernel; P: output positions; r: rank. Without biases:

    linear                I O
    low-rank linear       r (I + O)
    convolution           k² I O / groups          · P        the same for shuffled groups: moving is no MAC
    depthwise separable   m I (k² + O)             · P        reduction m (1/O + 1/k²), m kernels per channel
    low-rank: channel     r (k² I + O)             · P
    low-rank: spatial     r (k I · P' + k O · P)              P': positions after the vertical half
    low-rank: tucker      I r₁ · P₀ + (k² r₁ r₂ + r₂ O) · P   P₀: positions of the input
    low-rank: cp          I r · P₀ + k r · P' + (k r + O r) · P
    fire, inverted residual, ShuffleNet unit, Ghost           sums of the above

Batch norm adds two parameters per channel and no MAC, as everywhere in this library. Biases are parameters and no MACs.
`reduction` compares. Sizes that a layer refuses are refused here too. Sources: 1704.04861 section 3.1, 1602.07360,
1801.04381, 1707.01083, 1911.11907; low rank: 1505.06798 (channel), 1405.3866 (spatial), 1511.06530 (Tucker-2),
1412.6553 (CP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimtorch.design._checks import divides, ghost_channels, odd, pair, positive, shuffle_channels

Size = int | Sequence[int]


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs of one sample."""

    parameters: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs)

    def reduction(self, dense: Cost) -> float:
        """MACs as a share of those of another layer; 0.1: a tenth is left."""
        return self.macs / dense.macs


_NOTHING = Cost(0, 0)


def output_size(
    size: Size, kernel_size: Size, stride: Size = 1, padding: Size = 0, dilation: Size = 1
) -> Sequence[int]:
    """Height and width after a convolution; ValueError where nothing is left."""
    found = []
    sizes = (pair(size, "size"), pair(kernel_size, "kernel_size"), pair(stride, "stride"))
    more = (pair(padding, "padding", 0), pair(dilation, "dilation"))
    for n, k, s, p, d in zip(*sizes, *more, strict=True):
        found.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
    if min(found) < 1:
        raise ValueError(f"size: expected an image that the kernel fits into, got {tuple(sizes[0])}")
    return found


def linear(in_features: int, out_features: int, *, bias: bool = True, positions: int = 1) -> Cost:
    """`torch.nn.Linear`; `positions`: rows in one sample (tokens)."""
    weight = positive(in_features, "in_features") * positive(out_features, "out_features")
    return Cost(weight + bias * out_features, weight * positive(positions, "positions"))


def low_rank_linear(in_features: int, out_features: int, rank: int, *, bias: bool = True, positions: int = 1) -> Cost:
    """Two linear layers with `rank` features between; the bias is the second one's."""
    first = linear(in_features, positive(rank, "rank"), bias=False, positions=positions)
    return first + linear(rank, out_features, bias=bias, positions=positions)


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
) -> Cost:
    """`torch.nn.Conv2d` on an input of height and width `size`; `ShuffledGroupConv2d` costs the same."""
    positive(in_channels, "in_channels")
    positive(out_channels, "out_channels")
    positive(groups, "groups")
    divides(groups, in_channels, "groups", "in_channels")
    divides(groups, out_channels, "groups", "out_channels")
    height, width = output_size(size, kernel_size, stride, padding, dilation)
    kernel = pair(kernel_size, "kernel_size")
    weight = out_channels * (in_channels // groups) * kernel[0] * kernel[1]
    return Cost(weight + bias * out_channels, weight * height * width)


def depthwise_separable(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    bias: bool = True,
    multiplier: int = 1,
    norm: bool = False,
) -> Cost:
    """`DepthwiseSeparableConv2d` on an input of height and width `size`."""
    hidden = in_channels * positive(multiplier, "multiplier")
    depthwise = conv2d(
        in_channels, hidden, kernel_size, size, stride=stride, padding=padding, dilation=dilation,
        groups=in_channels, bias=False,
    )  # fmt: skip
    after = output_size(size, kernel_size, stride, padding, dilation)
    return depthwise + _norm(hidden * norm) + conv2d(hidden, out_channels, 1, after, bias=bias)


def separable_reduction(out_channels: int, kernel_size: Size, multiplier: int = 1) -> float:
    """MACs of a depthwise separable convolution as a share of the dense one's: m (1/O + 1/k²) (1704.04861, 3.1)."""
    kernel = pair(kernel_size, "kernel_size")
    share = 1 / positive(out_channels, "out_channels") + 1 / (kernel[0] * kernel[1])
    return positive(multiplier, "multiplier") * share


def low_rank_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    size: Size,
    rank: int | Sequence[int],
    *,
    kind: str = "channel",
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    bias: bool = True,
) -> Cost:
    """`LowRankConv2d` on an input of height and width `size`; `rank`: two numbers for "tucker", one for the others."""
    kinds = ("channel", "spatial", "tucker", "cp")
    if kind not in kinds:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, kinds))}, got {kind!r}")
    kernel, steps = pair(kernel_size, "kernel_size"), pair(stride, "stride")
    edges, gaps = pair(padding, "padding", 0), pair(dilation, "dilation")
    image = pair(size, "size")
    first, last = pair(rank, "rank")
    if kind != "tucker" and first != last:
        raise ValueError(f"rank: expected one number for kind={kind!r}, got {rank!r}")
    after = output_size(size, kernel_size, stride, padding, dilation)
    end = conv2d(last, out_channels, 1, after, bias=bias)
    if kind == "channel":
        start = conv2d(in_channels, last, kernel, image, stride=steps, padding=edges, dilation=gaps, bias=False)
        return start + end
    start = conv2d(in_channels, first, 1, image, bias=False)
    if kind == "tucker":
        middle = conv2d(first, last, kernel, image, stride=steps, padding=edges, dilation=gaps, bias=False)
        return start + middle + end
    vertical: dict[str, Any] = {"stride": (steps[0], 1), "padding": (edges[0], 0), "dilation": (gaps[0], 1)}
    horizontal: dict[str, Any] = {"stride": (1, steps[1]), "padding": (0, edges[1]), "dilation": (1, gaps[1])}
    between = output_size(image, (kernel[0], 1), **vertical)
    if kind == "spatial":
        one = conv2d(in_channels, last, (kernel[0], 1), image, bias=False, **vertical)
        return one + conv2d(last, out_channels, (1, kernel[1]), between, bias=bias, **horizontal)
    one = conv2d(last, last, (kernel[0], 1), image, groups=last, bias=False, **vertical)
    return start + one + conv2d(last, last, (1, kernel[1]), between, groups=last, bias=False, **horizontal) + end


def fire(in_channels: int, squeeze: int, expand1x1: int, expand3x3: int, size: Size) -> Cost:
    """`Fire` on an input of height and width `size`."""
    start = conv2d(in_channels, squeeze, 1, size)
    return start + conv2d(squeeze, expand1x1, 1, size) + conv2d(squeeze, expand3x3, 3, size, padding=1)


def inverted_residual(
    in_channels: int, out_channels: int, size: Size, *, stride: int = 1, factor: int = 6, kernel_size: int = 3
) -> Cost:
    """`InvertedResidual` on an input of height and width `size`."""
    hidden = in_channels * positive(factor, "factor")
    start = conv2d(in_channels, hidden, 1, size, bias=False) + _norm(hidden) if factor != 1 else _NOTHING
    around = odd(kernel_size, "kernel_size") // 2
    middle = conv2d(hidden, hidden, kernel_size, size, stride=stride, padding=around, groups=hidden, bias=False)
    after = output_size(size, kernel_size, stride, around)
    return start + middle + _norm(hidden) + conv2d(hidden, out_channels, 1, after, bias=False) + _norm(out_channels)


def shuffle_unit(
    in_channels: int,
    out_channels: int,
    size: Size,
    *,
    stride: int = 1,
    groups: int = 3,
    bottleneck: int | None = None,
    group_first: bool = True,
) -> Cost:
    """`ShuffleUnit` on an input of height and width `size`."""
    inner, new = shuffle_channels(in_channels, out_channels, stride, groups, bottleneck, group_first)
    start = conv2d(in_channels, inner, 1, size, groups=groups if group_first else 1, bias=False)
    middle = conv2d(inner, inner, 3, size, stride=stride, padding=1, groups=inner, bias=False)
    end = conv2d(inner, new, 1, output_size(size, 3, stride, 1), groups=groups, bias=False)
    return start + middle + end + _norm(2 * inner + new)


def ghost(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    bias: bool = True,
    ratio: int = 2,
    cheap_kernel: int = 3,
    norm: bool = False,
) -> Cost:
    """`GhostConv2d` on an input of height and width `size`."""
    own, ghosts = ghost_channels(out_channels, ratio, cheap_kernel)
    bias = bias and not norm
    found = conv2d(in_channels, own, kernel_size, size, stride=stride, padding=padding, dilation=dilation, bias=bias)
    if ghosts:
        after = output_size(size, kernel_size, stride, padding, dilation)
        found += conv2d(own, ghosts, cheap_kernel, after, padding=cheap_kernel // 2, groups=own, bias=bias)
    return found + _norm((own + ghosts) * norm)


def _norm(channels: int) -> Cost:
    return Cost(2 * channels, 0)
