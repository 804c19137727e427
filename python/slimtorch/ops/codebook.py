# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d with shared weights: an index of few bits each, into tables."""

from __future__ import annotations

from torch import Tensor

from slimtorch import reference
from slimtorch.formats import Codebook
from slimtorch.ops import _common as common
from slimtorch.ops._common import Activation, Pair


def codebook_linear(
    x: Tensor, weight: Codebook, bias: Tensor | None = None, *, activation: Activation = None
) -> Tensor:
    """``x @ weight.T + bias`` with a weight of table entries.

    Args:
        x: ``[..., in_features]``, of the dtype of ``weight.codebook``.
        weight: the packed ``[out_features, in_features]`` weight.
        bias: ``[out_features]`` or None.
        activation: ``"relu"`` is fused.

    Returns:
        ``[..., out_features]``.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    relu = common.relu_flag(activation)
    x, tables, bias = common.autocast(x, weight.codebook, bias)
    common.check_linear(x, tables, bias, weight.shape)
    return reference.linear(x, _with_tables(weight, tables), bias, relu=relu)


def codebook_conv2d(
    x: Tensor,
    weight: Codebook,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    activation: Activation = None,
) -> Tensor:
    """2-D cross-correlation with a weight of table entries.

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]``, of the dtype of ``weight.codebook``.
        weight: the packed ``[out_channels, C / groups, kh, kw]`` weight.
        bias: ``[out_channels]`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d`` (padding in zeros, per side).
        activation: ``"relu"`` is fused.

    Returns:
        ``[N, out_channels, Ho, Wo]``, or without ``N`` if ``x`` has none.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    relu = common.relu_flag(activation)
    stride, padding, dilation = (
        common.pair("stride", stride, 1), common.pair("padding", padding, 0), common.pair("dilation", dilation, 1)
    )  # fmt: skip
    x, tables, bias = common.autocast(x, weight.codebook, bias)
    common.check_conv2d(x, tables, bias, weight.shape, stride, padding, dilation, groups)
    return reference.conv2d(x, _with_tables(weight, tables), bias, stride, padding, dilation, groups, relu=relu)


def _with_tables(weight: Codebook, tables: Tensor) -> Codebook:
    if tables is weight.codebook:
        return weight
    return Codebook(tables, weight.codes, weight.shape, weight.bits, weight.group_size, weight.zero)
