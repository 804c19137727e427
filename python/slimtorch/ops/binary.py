# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d with binary weights: wrapper, checks, fake, autograd. Schemas: csrc/bindings/library.cpp."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtorch import reference
from slimtorch.formats import Binary
from slimtorch.ops import _common as common
from slimtorch.ops._common import Activation, Pair

_ops = torch.ops.slimtorch


def binary_linear(
    x: Tensor,
    weight: Binary,
    bias: Tensor | None = None,
    *,
    binarize_input: bool = True,
    activation: Activation = None,
) -> Tensor:
    """``sign(x) @ weight.T + bias`` with a binary weight; sign(0) = +1, and NaN counts as -1.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float64, of the dtype of ``weight.scale``.
        weight: the packed ``[out_features, in_features]`` weight.
        bias: ``[out_features]`` or None.
        binarize_input: take the signs of ``x`` (backward: straight through where ``|x| <= 1``), or ``x`` itself.
        activation: ``"relu"`` is fused into the kernel.

    Returns:
        ``[..., out_features]``.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    relu = common.relu_flag(activation)
    if common.is_inference(x, weight.scale, bias) and len(weight.shape) == 2:
        try:
            return _ops.binary_linear_inference(
                x, weight.signs, weight.scale, _plan(weight, x, 1, binarize_input), bias, binarize_input, relu
            )
        except RuntimeError:
            pass  # what is wrong is said below, or a dtype or device without a kernel served
    x, scale, bias = common.autocast(x, weight.scale, bias)
    common.check_linear(x, scale, bias, weight.shape)
    if not common.has_kernel("binary_linear", x):
        return reference.binary_linear(x, _with_scale(weight, scale), bias, binarize_input=binarize_input, relu=relu)
    return _ops.binary_linear(
        x, weight.signs, scale, _plan(weight, x, 1, binarize_input), bias, binarize_input, relu
    )  # fmt: skip


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
    """2-D cross-correlation of ``sign(x)`` with a binary weight; sign(0) = +1, NaN counts as -1, padding adds zeros.

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]``, float32, bfloat16 or float64, of the dtype of ``weight.scale``.
        weight: the packed ``[out_channels, C / groups, kh, kw]`` weight.
        bias: ``[out_channels]`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d`` (padding in zeros, per side).
        binarize_input: take the signs of ``x`` (backward: straight through where ``|x| <= 1``), or ``x`` itself.
        activation: ``"relu"`` is fused into the kernel.

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
    if common.is_inference(x, weight.scale, bias) and len(weight.shape) == 4 and x.dim() == 4:
        try:
            return _ops.binary_conv2d_inference(
                x, weight.signs, weight.scale, _plan(weight, x, groups, binarize_input), bias, weight.shape[2:],
                stride, padding, dilation, groups, binarize_input, relu,
            )  # fmt: skip
        except RuntimeError:
            pass  # what is wrong is said below, or a dtype or device without a kernel served
    x, scale, bias = common.autocast(x, weight.scale, bias)
    common.check_conv2d(x, scale, bias, weight.shape, stride, padding, dilation, groups)
    if not common.has_kernel("binary_conv2d", x):
        return reference.binary_conv2d(
            x, _with_scale(weight, scale), bias, stride, padding, dilation, groups,
            binarize_input=binarize_input, relu=relu,
        )  # fmt: skip
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    y = _ops.binary_conv2d(
        batched, weight.signs, scale, _plan(weight, x, groups, binarize_input), bias, weight.shape[2:],
        stride, padding, dilation, groups, binarize_input, relu,
    )  # fmt: skip
    return y if x.dim() == 4 else y.squeeze(0)


def _plan(weight: Binary, x: Tensor, groups: int, binarize_input: bool) -> Tensor | None:
    if not binarize_input and x.dtype == torch.float64:
        return None
    return weight.plan(groups, binarize_input=binarize_input)


def _with_scale(weight: Binary, scale: Tensor) -> Binary:
    return weight if scale is weight.scale else Binary(weight.signs, scale, weight.shape)


# ---- fake kernels: shapes only, for torch.compile and torch.export ---------------------------------------------------


@torch.library.register_fake("slimtorch::binary_plan")
def _(signs: Tensor, rows: int, channels: int, kernel: Pair, groups: int, kind: int) -> Tensor:
    return signs.new_empty([torch.library.get_ctx().new_dynamic_size()])


@torch.library.register_fake("slimtorch::binary_linear_inference")
@torch.library.register_fake("slimtorch::binary_linear")
def _(
    x: Tensor, signs: Tensor, scale: Tensor, plan: Tensor | None, bias: Tensor | None, binarize_input: bool, relu: bool
) -> Tensor:
    return x.new_empty([*x.shape[:-1], scale.shape[0]])


@torch.library.register_fake("slimtorch::binary_conv2d_inference")
@torch.library.register_fake("slimtorch::binary_conv2d")
def _(
    x: Tensor, signs: Tensor, scale: Tensor, plan: Tensor | None, bias: Tensor | None, kernel: Pair, stride: Pair,
    padding: Pair, dilation: Pair, groups: int, binarize_input: bool, relu: bool,
) -> Tensor:  # fmt: skip
    size = common.conv_output_size((x.shape[2], x.shape[3]), kernel, stride, padding, dilation)
    return x.new_empty([x.shape[0], scale.shape[0], *size])


@torch.library.register_fake("slimtorch::binary_linear_from_bits")
def _(
    x: Tensor, width: int, signs: Tensor, scale: Tensor, plan: Tensor | None, bias: Tensor | None, relu: bool
) -> Tensor:
    return scale.new_empty([*x.shape[:-1], scale.shape[0]])


@torch.library.register_fake("slimtorch::binary_conv2d_from_bits")
def _(
    x: Tensor, channels: int, signs: Tensor, scale: Tensor, plan: Tensor | None, bias: Tensor | None, kernel: Pair,
    stride: Pair, padding: Pair, dilation: Pair, groups: int, relu: bool,
) -> Tensor:  # fmt: skip
    size = common.conv_output_size((x.shape[1], x.shape[2]), kernel, stride, padding, dilation)
    return scale.new_empty([x.shape[0], scale.shape[0], *size])


@torch.library.register_fake("slimtorch::binary_linear_to_bits")
def _(x: Tensor, width: int, signs: Tensor, plan: Tensor | None, thresholds: Tensor, rising: Tensor) -> Tensor:
    return x.new_empty([*x.shape[:-1], bit_bytes(thresholds.shape[0])], dtype=torch.uint8)


@torch.library.register_fake("slimtorch::binary_conv2d_to_bits")
def _(
    x: Tensor, channels: int, signs: Tensor, plan: Tensor | None, thresholds: Tensor, rising: Tensor, kernel: Pair,
    stride: Pair, padding: Pair, dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    size = (x.shape[1], x.shape[2]) if x.dtype == torch.uint8 else (x.shape[2], x.shape[3])
    height, width = common.conv_output_size(size, kernel, stride, padding, dilation)
    return x.new_empty([x.shape[0], height, width, bit_bytes(thresholds.shape[0])], dtype=torch.uint8)


@torch.library.register_fake("slimtorch::binary_scale_dots")
def _(dots: Tensor, scale: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return scale.new_empty(dots.shape)


def bit_bytes(count: int) -> int:
    """Bytes of ``count`` packed activations: whole 64-bit words."""
    return (count + 63) // 64 * 8


# ---- autograd: the gradients of a dense layer of signs ---------------------------------------------------------------


def _signs(signs: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight without its scale: +1 and -1, of ``shape``."""
    ones = torch.ones(shape[0], dtype=dtype, device=signs.device)
    return Binary(signs, ones, shape).to_dense()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Gradients are summed in float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, signs, scale, _, _, *geometry, binarize_input, relu = inputs
    needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
    common.save(ctx, x=x if needs_x else None, signs=signs, scale=scale, output=output if relu else None)
    ctx.geometry, ctx.binarize_input = geometry, binarize_input


def _binarized(ctx: Any, x: Tensor) -> Tensor:
    wide = x.to(_wide(x.dtype))
    return reference.binarize(wide) if ctx.binarize_input else wide


def _through(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
    """The straight-through estimator: the gradient of the signs where ``|x| <= 1``, else 0."""
    grad = torch.where(x.abs() <= 1, grad, 0) if ctx.binarize_input else grad
    return grad.to(x.dtype)


@once_differentiable  # the gradients are made of plain numbers
def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    scale, x = t["scale"], t["x"]
    grad = common.masked_by_relu(grad, t["output"])
    wide = grad.to(_wide(grad.dtype))
    grad_x = grad_scale = grad_bias = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        signs = _signs(t["signs"], (scale.shape[0], x.shape[-1]), wide.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = _through(ctx, x, (wide * scale.to(wide.dtype)) @ signs)
        if ctx.needs_input_grad[2]:
            products = wide * F.linear(_binarized(ctx, x), signs)
            grad_scale = common.sum_to_bias(products, list(range(grad.dim() - 1))).to(scale.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = common.sum_to_bias(grad, list(range(grad.dim() - 1)))
    return grad_x, None, grad_scale, None, grad_bias, None, None


torch.library.register_autograd("slimtorch::binary_linear", _linear_backward, setup_context=_setup)


@once_differentiable  # the gradients are made of plain numbers
def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    scale, x = t["scale"], t["x"]
    kernel, stride, padding, dilation, groups = ctx.geometry
    grad = common.masked_by_relu(grad, t["output"])
    wide = grad.to(_wide(grad.dtype))
    grad_x = grad_scale = grad_bias = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        signs = _signs(t["signs"], (scale.shape[0], x.shape[1] // groups, *kernel), wide.dtype)
        if ctx.needs_input_grad[0]:
            scaled = wide * scale.to(wide.dtype)[:, None, None]
            grad_x = torch.nn.grad.conv2d_input(x.shape, signs, scaled, stride, padding, dilation, groups)
            grad_x = _through(ctx, x, grad_x)
        if ctx.needs_input_grad[2]:
            products = wide * F.conv2d(_binarized(ctx, x), signs, None, stride, padding, dilation, groups)
            grad_scale = common.sum_to_bias(products, [0, 2, 3]).to(scale.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = common.sum_to_bias(grad, [0, 2, 3])
    return (grad_x, None, grad_scale, None, grad_bias, *[None] * 7)


torch.library.register_autograd("slimtorch::binary_conv2d", _conv2d_backward, setup_context=_setup)
