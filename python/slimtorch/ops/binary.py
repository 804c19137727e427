# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d with binary weights: wrapper, checks, fake, autograd. Schemas: csrc/bindings/library.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

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
        x: ``[..., in_features]``, float32, bfloat16, float64, on CUDA float16, of the dtype of ``weight.scale``.
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
        x: ``[N, C, H, W]`` or ``[C, H, W]``, float32, bfloat16, float64, on CUDA float16, of the dtype of
            ``weight.scale``.
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
    stride, padding, dilation = common.geometry(stride, padding, dilation)
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


# ---- packed activations: what consecutive binary layers pass on ------------------------------------------------------
#
# uint8 [..., bytes] of a linear layer, [N, H, W, bytes] of a convolution. Bit b & 7 of byte b >> 3 belongs to feature
# or channel b and is 1 for +1. Whole 64-bit words; bits after the last feature are 0.


def binary_linear_to_bits(x: Tensor, weight: Binary, thresholds: Tensor, rising: Tensor) -> Tensor:
    """Signs of a monotone function of ``sign(x) @ sign(weight).T``, packed, by comparing whole numbers.

    Args:
        x: ``[..., in_features]`` float, or packed activations ``[..., bytes]``.
        weight: the packed ``[out_features, in_features]`` weight; its scale plays no part.
        thresholds: ``[out_features]`` int32, above ``-2**31``.
        rising: ``[out_features]`` bool: +1 where the dot product is at least (else: at most) the threshold.

    Returns:
        ``[..., 8 * ceil(out_features / 64)]`` uint8.
    """
    _rows, width = weight.shape
    if _runs(x):
        return _ops.binary_linear_to_bits(x, width, weight.signs, weight.plan(), thresholds, rising)
    dots = reference.linear(_unpacked(x, width), _unscaled(weight))
    return reference.pack_signs(_compare(dots, thresholds, rising))


def binary_linear_from_bits(
    x: Tensor, weight: Binary, bias: Tensor | None = None, *, activation: Activation = None
) -> Tensor:
    """:func:`binary_linear` over packed activations ``x [..., bytes]``; for inference."""
    relu = common.relu_flag(activation)
    if _runs(weight.scale):
        return _ops.binary_linear_from_bits(x, weight.shape[1], weight.signs, weight.scale, weight.plan(), bias, relu)
    return reference.linear(reference.unpack_signs(x, weight.shape[1], weight.scale.dtype), weight, bias, relu=relu)


def binary_conv2d_to_bits(
    x: Tensor, weight: Binary, thresholds: Tensor, rising: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1,
) -> Tensor:  # fmt: skip
    """As :func:`binary_linear_to_bits`, from ``[N, C, H, W]`` or ``[N, H, W, bytes]`` to ``[N, Ho, Wo, bytes]``."""
    geometry, channels = (stride, padding, dilation, groups), weight.shape[1] * groups
    if _runs(x):
        return _ops.binary_conv2d_to_bits(
            x, channels, weight.signs, weight.plan(groups), thresholds, rising, weight.shape[2:], *geometry
        )
    x = _unpacked(x, channels).movedim(-1, 1) if x.dtype == torch.uint8 else _unpacked(x, channels)
    dots = reference.conv2d(x, _unscaled(weight), None, *geometry).movedim(1, -1)
    return reference.pack_signs(_compare(dots, thresholds, rising))


def binary_conv2d_from_bits(
    x: Tensor, weight: Binary, bias: Tensor | None = None, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1, *, activation: Activation = None,
) -> Tensor:  # fmt: skip
    """:func:`binary_conv2d` over packed activations ``x [N, H, W, bytes]``; for inference."""
    geometry, channels, relu = (stride, padding, dilation, groups), weight.shape[1] * groups, activation == "relu"
    if _runs(weight.scale):
        return _ops.binary_conv2d_from_bits(
            x, channels, weight.signs, weight.scale, weight.plan(groups), bias, weight.shape[2:], *geometry, relu
        )
    signs = reference.unpack_signs(x, channels, weight.scale.dtype).movedim(-1, 1)
    return reference.conv2d(signs, weight, bias, *geometry, relu=relu)


def binary_thresholds(
    weight: Binary, bias: Tensor | None, then: Callable[[Tensor], Tensor], *, activation: Activation = None
) -> tuple[Tensor, Tensor]:
    """Thresholds and directions with which the ``…_to_bits`` operators give ``sign(then(layer(x)))``, bit for bit.

    ``then`` maps outputs ``[m, out]`` (of a convolution ``[m, out, 4, 4]``) to the same shape, each row of the weight
    on its own, and must not rise for some outputs of a row and fall for others: batch norm, Hardtanh. It is evaluated,
    with the kernel's own arithmetic before it, at those of the possible dot products that a binary search asks for.

    Returns:
        ``thresholds [out]`` int32 and ``rising [out]`` bool.
    """
    relu, rows = common.relu_flag(activation), weight.shape[0]
    limit = weight.signs.new_full((rows,), math.prod(weight.shape[1:]), dtype=torch.int32)

    def values(dots: Tensor) -> Tensor:
        if _runs(weight.scale):
            y = _ops.binary_scale_dots(dots[None], weight.scale, bias, relu)
        else:
            y = dots[None] * weight.scale + (0 if bias is None else bias)
            y = y.relu() if relu else y
        if len(weight.shape) == 2:
            return then(y)[0]
        return then(y[:, :, None, None].expand(1, rows, 4, 4).contiguous())[0, :, 0, 0]

    with torch.no_grad():
        low, high = -limit, limit.clone()
        at_low, at_high = values(low), values(high)
        first, last = at_low >= 0, at_high >= 0
        constant, rising = first == last, last & ~first
        while bool((high - low > 1).any()):
            middle = torch.div(low + high, 2, rounding_mode="floor").to(torch.int32)
            like_low = (values(middle) >= 0) == first
            low, high = torch.where(like_low, middle, low), torch.where(like_low, high, middle)
        never = torch.full_like(high, 2**31 - 1)
        thresholds = torch.where(rising, high, low)
        thresholds = torch.where(constant, torch.where(first, -never, never), thresholds)
    return thresholds, rising | constant


def _runs(tensor: Tensor) -> bool:
    """Whether the operators over bits have kernels for these floats (or bits); else plain torch does their work."""
    dtypes = common.KERNEL_DTYPES.get(tensor.device.type)
    return dtypes is not None and (tensor.dtype in dtypes or not tensor.is_floating_point())


def _unscaled(weight: Binary) -> Binary:
    return _with_scale(weight, torch.ones(weight.shape[0], device=weight.signs.device))


def _unpacked(x: Tensor, count: int) -> Tensor:
    """Signs as float32, from floats or from packed activations (whose order of dimensions stays)."""
    if x.dtype == torch.uint8:
        return reference.unpack_signs(x, count, torch.float32)
    return reference.binarize(x.float())


def _compare(dots: Tensor, thresholds: Tensor, rising: Tensor) -> Tensor:
    return torch.where(torch.where(rising, dots >= thresholds, dots <= thresholds), 1.0, -1.0)


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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, signs, scale, _, _, *geometry, binarize_input, relu = inputs
    needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
    common.save(ctx, x=x if needs_x else None, signs=signs, scale=scale, output=output if relu else None)
    ctx.geometry, ctx.binarize_input = geometry, binarize_input


_linear_setup = _conv2d_setup = _setup


def _binarized(ctx: Any, x: Tensor) -> Tensor:
    wide = x.to(common.sum_dtype(x.dtype))
    return reference.binarize(wide.detach()) if ctx.binarize_input else wide


def _through(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
    """The straight-through estimator: the gradient of the signs where ``|x| <= 1``, else 0."""
    grad = torch.where(x.abs() <= 1, grad, 0) if ctx.binarize_input else grad
    return grad.to(x.dtype)


@once_differentiable  # the gradients are made of plain numbers
def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    scale, x = t["scale"], t["x"]
    grad = common.masked_by_relu(grad, t["output"])
    wide = grad.to(common.sum_dtype(grad.dtype))
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


torch.library.register_autograd("slimtorch::binary_linear", _linear_backward, setup_context=_linear_setup)


@once_differentiable  # the gradients are made of plain numbers
def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    scale, x = t["scale"], t["x"]
    kernel, stride, padding, dilation, groups = ctx.geometry
    grad = common.masked_by_relu(grad, t["output"])
    wide = grad.to(common.sum_dtype(grad.dtype))
    grad_x = grad_scale = grad_bias = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        signs = _signs(t["signs"], (scale.shape[0], x.shape[1] // groups, *kernel), wide.dtype)
        if ctx.needs_input_grad[0]:
            scaled = wide * scale.to(wide.dtype)[:, None, None]
            grad_x = conv2d_input(x.shape, signs, scaled, stride, padding, dilation, groups)
            grad_x = _through(ctx, x, grad_x)
        if ctx.needs_input_grad[2]:
            products = wide * F.conv2d(_binarized(ctx, x), signs, None, stride, padding, dilation, groups)
            grad_scale = common.sum_to_bias(products, [0, 2, 3]).to(scale.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = common.sum_to_bias(grad, [0, 2, 3])
    return (grad_x, None, grad_scale, None, grad_bias, *[None] * 7)


torch.library.register_autograd("slimtorch::binary_conv2d", _conv2d_backward, setup_context=_conv2d_setup)
