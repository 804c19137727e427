# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d with binary weights, over binarised or real activations."""

from __future__ import annotations

from torch import Tensor

from slimtorch import reference
from slimtorch.formats import Binary
from slimtorch.ops import _common as common
from slimtorch.ops._common import Activation, Pair


def binary_linear(
    x: Tensor,
    weight: Binary,
    bias: Tensor | None = None,
    *,
    binarize_input: bool = True,
    activation: Activation = None,
) -> Tensor:
    """``sign(x) @ weight.T + bias`` with a binary weight; sign(0) = +1.

    Args:
        x: ``[..., in_features]``, of the dtype of ``weight.scale``.
        weight: the packed ``[out_features, in_features]`` weight.
        bias: ``[out_features]`` or None.
        binarize_input: take the signs of ``x`` (backward: straight through where ``|x| <= 1``), or ``x`` itself.
        activation: ``"relu"`` is fused.

    Returns:
        ``[..., out_features]``.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    relu = common.relu_flag(activation)
    x, scale, bias = common.autocast(x, weight.scale, bias)
    common.check_linear(x, scale, bias, weight.shape)
    return reference.binary_linear(x, _with_scale(weight, scale), bias, binarize_input=binarize_input, relu=relu)


def binary_conv2d(
    x: Tensor,
    weight: Binary,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    binarize_input: bool = True,
    activation: Activation = None,
) -> Tensor:
    """2-D cross-correlation of ``sign(x)`` with a binary weight; sign(0) = +1, and padding adds zeros.

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]``, of the dtype of ``weight.scale``.
        weight: the packed ``[out_channels, C / groups, kh, kw]`` weight.
        bias: ``[out_channels]`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d`` (padding in zeros, per side).
        binarize_input: take the signs of ``x`` (backward: straight through where ``|x| <= 1``), or ``x`` itself.
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
    x, scale, bias = common.autocast(x, weight.scale, bias)
    common.check_conv2d(x, scale, bias, weight.shape, stride, padding, dilation, groups)
    return reference.binary_conv2d(
        x, _with_scale(weight, scale), bias, stride, padding, dilation, groups, binarize_input=binarize_input, relu=relu
    )


def _with_scale(weight: Binary, scale: Tensor) -> Binary:
    return weight if scale is weight.scale else Binary(weight.signs, scale, weight.shape)
