# SPDX-License-Identifier: Apache-2.0
"""Block-sparse linear and conv2d: wrapper, checks, fake, autograd. Schemas: csrc/bindings/library.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtorch import reference
from slimtorch.formats import BlockSparse
from slimtorch.ops import _common as common
from slimtorch.ops._common import Activation, Pair

_ops = torch.ops.slimtorch


def block_sparse_linear(
    x: Tensor, weight: BlockSparse, bias: Tensor | None = None, *, activation: Activation = None
) -> Tensor:
    """``x @ weight.T + bias`` with a block-sparse weight.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float64 (on CUDA: float16, not float64), of the dtype of
            ``weight.values``.
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
    if common.is_inference(x, weight.values, bias) and len(weight.shape) == 2:
        try:
            return _ops.block_sparse_linear_inference(
                x, weight.values, weight.block_columns, weight.block_row_offsets, weight.plan(), None, bias,
                weight.shape[0], relu,
            )  # fmt: skip
        except RuntimeError:
            pass  # what is wrong is said below, or a dtype or device without a kernel served
    x, values, bias = common.autocast(x, weight.values, bias)
    common.check_linear(x, values, bias, weight.shape)
    if not common.has_kernel("block_sparse_linear", x):
        return reference.linear(x, _with_values(weight, values), bias, relu=relu)
    backward_plan = weight.plan(transposed=True) if _needs_grad(x) else None
    return _ops.block_sparse_linear(
        x,
        values,
        weight.block_columns,
        weight.block_row_offsets,
        weight.plan(),
        backward_plan,
        bias,
        weight.shape[0],
        relu,
    )


def block_sparse_conv2d(
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    activation: Activation = None,
) -> Tensor:
    """2-D cross-correlation with a block-sparse weight.

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]``, float32, bfloat16 or float64 (on CUDA: float16, not float64), of the dtype
            of ``weight.values``.
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
    if common.is_inference(x, weight.values, bias) and len(weight.shape) == 4 and x.dim() == 4:
        try:
            return _ops.block_sparse_conv2d_inference(
                x, weight.values, weight.block_columns, weight.block_row_offsets, weight.plan(groups), None,
                bias, weight.shape[0], weight.shape[2:], stride, padding, dilation, groups, relu,
            )  # fmt: skip
        except RuntimeError:
            pass  # what is wrong is said below, or a dtype or device without a kernel served
    x, values, bias = common.autocast(x, weight.values, bias)
    common.check_conv2d(x, values, bias, weight.shape, stride, padding, dilation, groups)
    if not common.has_kernel("block_sparse_conv2d", x):
        return reference.conv2d(x, _with_values(weight, values), bias, stride, padding, dilation, groups, relu=relu)
    backward_plan = weight.plan(groups, transposed=True) if _needs_grad(x) else None
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    y = _ops.block_sparse_conv2d(
        batched, values, weight.block_columns, weight.block_row_offsets, weight.plan(groups), backward_plan, bias,
        weight.shape[0], weight.shape[2:], stride, padding, dilation, groups, relu,
    )  # fmt: skip
    return y if x.dim() == 4 else y.squeeze(0)


def _needs_grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _with_values(weight: BlockSparse, values: Tensor) -> BlockSparse:
    return BlockSparse(values, weight.block_columns, weight.block_row_offsets, weight.shape, weight.block_size)


# ---- fake kernels: shapes only, for torch.compile and torch.export ---------------------------------------------------


@torch.library.register_fake("slimtorch::block_sparse_plan")
def _(
    columns: Tensor, row_offsets: Tensor, block_size: Pair, rows: int, width: int, groups: int, taps: int,
    transposed: bool,
) -> Tensor:  # fmt: skip
    return columns.new_empty([torch.library.get_ctx().new_dynamic_size()], dtype=torch.uint8)


@torch.library.register_fake("slimtorch::block_sparse_cuda_plan")
def _(
    columns: Tensor, row_offsets: Tensor, block_size: Pair, rows: int, width: int, groups: int, transposed: bool
) -> Tensor:
    return columns.new_empty([torch.library.get_ctx().new_dynamic_size()])


@torch.library.register_fake("slimtorch::block_sparse_linear_inference")
@torch.library.register_fake("slimtorch::block_sparse_linear")
def _(
    x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, plan: Tensor | None,
    backward_plan: Tensor | None, bias: Tensor | None, rows: int, relu: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty([*x.shape[:-1], rows])


@torch.library.register_fake("slimtorch::block_sparse_linear_grad_input")
def _(
    grad: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, backward_plan: Tensor | None, width: int
) -> Tensor:
    return grad.new_empty([*grad.shape[:-1], width])


@torch.library.register_fake("slimtorch::block_sparse_linear_grad_values")
def _(grad: Tensor, x: Tensor, columns: Tensor, row_offsets: Tensor, plan: Tensor | None, block_size: Pair) -> Tensor:
    return x.new_empty([columns.shape[0], *block_size])


@torch.library.register_fake("slimtorch::block_sparse_conv2d_inference")
@torch.library.register_fake("slimtorch::block_sparse_conv2d")
def _(
    x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, plan: Tensor | None,
    backward_plan: Tensor | None, bias: Tensor | None, rows: int, kernel: Pair, stride: Pair, padding: Pair,
    dilation: Pair, groups: int, relu: bool,
) -> Tensor:  # fmt: skip
    size = common.conv_output_size((x.shape[2], x.shape[3]), kernel, stride, padding, dilation)
    return x.new_empty([x.shape[0], rows, *size])


@torch.library.register_fake("slimtorch::block_sparse_conv2d_grad_columns")
def _(
    grad: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, backward_plan: Tensor | None,
    width: int, groups: int,
) -> Tensor:  # fmt: skip
    return grad.new_empty([grad.shape[0], width * groups, grad.shape[2], grad.shape[3]])


@torch.library.register_fake("slimtorch::block_sparse_conv2d_grad_values")
def _(
    grad: Tensor, x: Tensor, columns: Tensor, row_offsets: Tensor, plan: Tensor | None, block_size: Pair,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    return x.new_empty([columns.shape[0], *block_size])


# ---- autograd --------------------------------------------------------------------------------------------------------


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, row_offsets, plan, backward_plan, _, _, relu = inputs
    common.save(
        ctx, x=x if ctx.needs_input_grad[1] else None, values=values, columns=columns, row_offsets=row_offsets,
        plan=plan, backward_plan=backward_plan, output=output if relu else None,
    )  # fmt: skip
    ctx.width, ctx.block_size = x.shape[-1], tuple(values.shape[1:])


@once_differentiable  # the gradient operators have no gradients of their own
def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    grad = common.masked_by_relu(grad, t["output"])
    columns, row_offsets = t["columns"], t["row_offsets"]
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _ops.block_sparse_linear_grad_input(
            grad, t["values"], columns, row_offsets, t["backward_plan"], ctx.width
        )
    if ctx.needs_input_grad[1]:
        grad_values = _ops.block_sparse_linear_grad_values(
            grad, t["x"], columns, row_offsets, t["plan"], ctx.block_size
        )
    if ctx.needs_input_grad[6]:
        grad_bias = common.sum_to_bias(grad, list(range(grad.dim() - 1)))
    return grad_x, grad_values, None, None, None, None, grad_bias, None, None


torch.library.register_autograd("slimtorch::block_sparse_linear", _linear_backward, setup_context=_linear_setup)


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, row_offsets, plan, backward_plan, _, _, *geometry, groups, relu = inputs
    common.save(
        ctx, x=x if ctx.needs_input_grad[1] else None, values=values, columns=columns, row_offsets=row_offsets,
        plan=plan, backward_plan=backward_plan, output=output if relu else None,
    )  # fmt: skip
    ctx.size, ctx.channels, ctx.groups = tuple(x.shape[2:]), x.shape[1], groups
    ctx.block_size = tuple(values.shape[1:])
    ctx.geometry = tuple(tuple(g) for g in geometry)  # kernel, stride, padding, dilation


@once_differentiable  # the gradient operators have no gradients of their own
def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    grad = common.masked_by_relu(grad, t["output"])
    columns, row_offsets = t["columns"], t["row_offsets"]
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        kernel = ctx.geometry[0]
        width = ctx.channels // ctx.groups * kernel[0] * kernel[1]
        dtype = common.fold_dtype(grad.dtype, kernel)
        lowered = _ops.block_sparse_conv2d_grad_columns(
            grad.to(dtype), t["values"].to(dtype), columns, row_offsets, t["backward_plan"], width, ctx.groups
        )
        grad_x = common.fold_columns(lowered, ctx.size, *ctx.geometry).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_values = _ops.block_sparse_conv2d_grad_values(
            grad, t["x"], columns, row_offsets, t["plan"], ctx.block_size, *ctx.geometry, ctx.groups
        )
    if ctx.needs_input_grad[6]:
        grad_bias = common.sum_to_bias(grad, [0, 2, 3])
    return (grad_x, grad_values, None, None, None, None, grad_bias, *[None] * 7)


torch.library.register_autograd("slimtorch::block_sparse_conv2d", _conv2d_backward, setup_context=_conv2d_setup)
