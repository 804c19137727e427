# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d with shared weights, an index of few bits each: wrapper, checks, fake, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtorch import reference
from slimtorch.formats import Codebook
from slimtorch.formats.codebook import group_code
from slimtorch.ops import _common as common
from slimtorch.ops._common import Activation, Pair

_ops = torch.ops.slimtorch


def codebook_linear(
    x: Tensor, weight: Codebook, bias: Tensor | None = None, *, activation: Activation = None
) -> Tensor:
    """``x @ weight.T + bias`` with a weight of table entries.

    Args:
        x: ``[..., in_features]``, float32, bfloat16, float64 (float16 in its place on CUDA), of the dtype of
            ``weight.codebook``.
        weight: the packed ``[out_features, in_features]`` weight.
        bias: ``[out_features]`` or None.
        activation: ``"relu"`` is fused into the kernel.

    Returns:
        ``[..., out_features]``.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    relu = common.relu_flag(activation)
    if common.is_inference(x, weight.codebook, bias) and len(weight.shape) == 2:
        try:
            return _ops.codebook_linear_inference(
                x, weight.codebook, weight.codes, weight.plan(), weight.shape[0], weight.bits,
                group_code(weight.group_size), weight.zero, bias, relu,
            )  # fmt: skip
        except RuntimeError:
            pass  # what is wrong is said below, or a dtype or device without a kernel served
    x, tables, bias = common.autocast(x, weight.codebook, bias)
    common.check_linear(x, tables, bias, weight.shape)
    if not common.has_kernel("codebook_linear", x):
        return reference.linear(x, _with_tables(weight, tables), bias, relu=relu)
    return _ops.codebook_linear(
        x, tables, weight.codes, weight.plan(), weight.shape[0], weight.bits, group_code(weight.group_size),
        weight.zero, bias, relu,
    )  # fmt: skip


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
        x: ``[N, C, H, W]`` or ``[C, H, W]``, float32, bfloat16, float64 (float16 in its place on CUDA), of the dtype
            of ``weight.codebook``.
        weight: the packed ``[out_channels, C / groups, kh, kw]`` weight.
        bias: ``[out_channels]`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d`` (padding in zeros, per side).
        activation: ``"relu"`` is fused into the kernel.

    Returns:
        ``[N, out_channels, Ho, Wo]``, or without ``N`` if ``x`` has none.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    relu = common.relu_flag(activation)
    stride, padding, dilation = common.geometry(stride, padding, dilation)
    if common.is_inference(x, weight.codebook, bias) and len(weight.shape) == 4 and x.dim() == 4:
        try:
            return _ops.codebook_conv2d_inference(
                x, weight.codebook, weight.codes, weight.plan(groups), weight.shape[0], weight.bits,
                group_code(weight.group_size), weight.zero, bias, weight.shape[2:], stride, padding, dilation, groups,
                relu,
            )  # fmt: skip
        except RuntimeError:
            pass  # what is wrong is said below, or a dtype or device without a kernel served
    x, tables, bias = common.autocast(x, weight.codebook, bias)
    common.check_conv2d(x, tables, bias, weight.shape, stride, padding, dilation, groups)
    if not common.has_kernel("codebook_conv2d", x):
        return reference.conv2d(x, _with_tables(weight, tables), bias, stride, padding, dilation, groups, relu=relu)
    y = _ops.codebook_conv2d(
        x if x.dim() == 4 else x.unsqueeze(0), tables, weight.codes, weight.plan(groups), weight.shape[0], weight.bits,
        group_code(weight.group_size), weight.zero, bias, weight.shape[2:], stride, padding, dilation, groups, relu,
    )  # fmt: skip
    return y if x.dim() == 4 else y.squeeze(0)


def _with_tables(weight: Codebook, tables: Tensor) -> Codebook:
    if tables is weight.codebook:
        return weight
    return Codebook(tables, weight.codes, weight.shape, weight.bits, weight.group_size, weight.zero)


# ---- fake kernels: shapes only, for torch.compile and torch.export ---------------------------------------------------


@torch.library.register_fake("slimtorch::codebook_cuda_plan")
def _(codes: Tensor, rows: int, width: int, bits: int, groups: int) -> Tensor:
    tiles = groups * ((rows // groups + 15) // 16) * ((width + 63) // 64)  # of 16 rows and 64 columns
    return codes.new_empty([tiles * bits * 128])


@torch.library.register_fake("slimtorch::codebook_linear_inference")
@torch.library.register_fake("slimtorch::codebook_linear")
def _(
    x: Tensor, codebook: Tensor, codes: Tensor, plan: Tensor | None, rows: int, bits: int, group_size: int, zero: bool,
    bias: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty([*x.shape[:-1], rows])


@torch.library.register_fake("slimtorch::codebook_conv2d_inference")
@torch.library.register_fake("slimtorch::codebook_conv2d")
def _(
    x: Tensor, codebook: Tensor, codes: Tensor, plan: Tensor | None, rows: int, bits: int, group_size: int, zero: bool,
    bias: Tensor | None, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int, relu: bool,
) -> Tensor:  # fmt: skip
    size = common.conv_output_size((x.shape[2], x.shape[3]), kernel, stride, padding, dilation)
    return x.new_empty([x.shape[0], rows, *size])


@torch.library.register_fake("slimtorch::codebook_decode")
def _(codebook: Tensor, codes: Tensor, rows: int, width: int, bits: int, group_size: int) -> Tensor:
    return codebook.new_empty([rows, width])


@torch.library.register_fake("slimtorch::codebook_sum_members")
def _(grad_weight: Tensor, codes: Tensor, bits: int, group_size: int, zero: bool) -> Tensor:
    rows, width = grad_weight.shape
    tables = 1 if group_size == 0 else rows if group_size < 0 else (width + group_size - 1) // group_size
    return grad_weight.new_empty([tables, 1 << bits])


# ---- autograd --------------------------------------------------------------------------------------------------------

# The weight's gradient is dense before its members are summed, so gradients are dense products of torch, over the
# decoded weight. 16 bits go through float32: each gradient is then rounded once.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor, relu: bool) -> None:
    x, codebook, codes, _, rows, *tables = inputs[:8]
    common.save(
        ctx, x=x if ctx.needs_input_grad[1] else None, codebook=codebook if ctx.needs_input_grad[0] else None,
        codes=codes, output=output if relu else None,
    )  # fmt: skip
    ctx.rows, ctx.tables, ctx.x_shape = rows, tables, x.shape  # tables: bits, group_size, zero


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, output, inputs[9])


@once_differentiable  # the gradient operators have no gradients of their own
def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    grad = common.masked_by_relu(grad, t["output"])
    wide = common.widened(grad)
    width = ctx.x_shape[-1]
    grad_x = grad_codebook = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = _ops.codebook_decode(common.widened(t["codebook"]), t["codes"], ctx.rows, width, *ctx.tables[:2])
        grad_x = (wide @ dense).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        dense = wide.reshape(-1, ctx.rows).t() @ common.widened(t["x"]).reshape(-1, width)
        grad_codebook = _ops.codebook_sum_members(dense, t["codes"], *ctx.tables).to(grad.dtype)
    if ctx.needs_input_grad[8]:
        grad_bias = common.sum_to_bias(grad, list(range(grad.dim() - 1)))
    return grad_x, grad_codebook, *[None] * 6, grad_bias, None


torch.library.register_autograd("slimtorch::codebook_linear", _linear_backward, setup_context=_linear_setup)


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, output, inputs[14])
    ctx.kernel, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs[9:14]


@once_differentiable  # the gradient operators have no gradients of their own
def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    grad = common.masked_by_relu(grad, t["output"])
    wide = common.widened(grad)
    shape = [ctx.rows, ctx.x_shape[1] // ctx.groups, *ctx.kernel]
    width = shape[1] * shape[2] * shape[3]

    def gradient(x: Tensor, weight: Tensor, which: int) -> Tensor:
        """Of x (0) or the dense weight (1)."""
        mask = [which == 0, which == 1, False]
        options = (None, ctx.stride, ctx.padding, ctx.dilation, False, [0, 0], ctx.groups, mask)
        return torch.ops.aten.convolution_backward(wide, x, weight, *options)[which]

    grad_x = grad_codebook = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = _ops.codebook_decode(common.widened(t["codebook"]), t["codes"], ctx.rows, width, *ctx.tables[:2])
        grad_x = gradient(wide.new_empty(ctx.x_shape), dense.view(shape), 0).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        dense = gradient(common.widened(t["x"]), wide.new_empty(shape), 1).reshape(ctx.rows, width)
        grad_codebook = _ops.codebook_sum_members(dense, t["codes"], *ctx.tables).to(grad.dtype)
    if ctx.needs_input_grad[8]:
        grad_bias = common.sum_to_bias(grad, [0, 2, 3])
    return grad_x, grad_codebook, *[None] * 6, grad_bias, *[None] * 6


torch.library.register_autograd("slimtorch::codebook_conv2d", _conv2d_backward, setup_context=_conv2d_setup)
