# SPDX-License-Identifier: Apache-2.0
"""The executable specification: every operation in a few lines of plain torch.

Tests compare the kernels with these, in float64. Where no kernel exists for a device or dtype, these run instead.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from slimtorch.formats import BlockSparse, Sparse

Pair = tuple[int, int]


def linear(x: Tensor, weight: Sparse | BlockSparse, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``x [..., in] @ weight.T + bias``, then ReLU if asked."""
    y = F.linear(x, weight.to_dense(), bias)
    return y.relu() if relu else y


def conv2d(
    x: Tensor,
    weight: Sparse | BlockSparse,
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
