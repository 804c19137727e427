# SPDX-License-Identifier: Apache-2.0
"""The executable specification: every operation in a few lines of plain torch.

Tests compare the kernels with these, in float64. Where no kernel exists for a device or dtype, these run instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtorch.formats import Binary, Format

Pair = tuple[int, int]


def linear(x: Tensor, weight: Format, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``x [..., in] @ weight.T + bias``, then ReLU if asked."""
    y = F.linear(x, weight.to_dense(), bias)
    return y.relu() if relu else y


def conv2d(
    x: Tensor,
    weight: Format,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    *,
    relu: bool = False,
) -> Tensor:
    """Cross-correlation of ``x [N, C, H, W]`` with the dense weight, then ReLU if asked."""
    y = F.conv2d(x, weight.to_dense(), bias, stride, padding, dilation, groups)
    return y.relu() if relu else y


def signs(x: Tensor) -> Tensor:
    """+1 where ``x >= 0``, else -1 (NaN included), without a gradient."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def binarize(x: Tensor) -> Tensor:
    """+1 where ``x >= 0``, else -1 (NaN included); the gradient passes straight through where ``|x| <= 1``.

    Courbariaux et al. 2016 (arXiv 1602.02830), equations 1 and 4.
    """
    if not x.requires_grad:
        return signs(x)
    clipped = x.nan_to_num(0).clamp(-1, 1)  # its gradient is the straight-through estimator's
    return clipped + (signs(x) - clipped).detach()


def pack_signs(x: Tensor) -> Tensor:
    """Signs ``[..., n]`` as packed activations ``[..., 8 * ceil(n / 64)]`` uint8, lowest bit first; 1 is +1."""
    bits = F.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(bits: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first ``count`` signs of packed activations ``[..., bytes]``, ``[..., count]``."""
    each = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return each.flatten(-2)[..., :count].to(dtype) * 2 - 1


def binary_linear(
    x: Tensor, weight: Binary, bias: Tensor | None = None, *, binarize_input: bool = True, relu: bool = False
) -> Tensor:
    """:func:`linear` over the signs of ``x``, or over ``x`` itself."""
    return linear(binarize(x) if binarize_input else x, weight, bias, relu=relu)


def binary_conv2d(
    x: Tensor,
    weight: Binary,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    *,
    binarize_input: bool = True,
    relu: bool = False,
) -> Tensor:
    """:func:`conv2d` over the signs of ``x``, or over ``x`` itself. Padding adds zeros, which no sign stands for."""
    x = binarize(x) if binarize_input else x
    return conv2d(x, weight, bias, stride, padding, dilation, groups, relu=relu)
