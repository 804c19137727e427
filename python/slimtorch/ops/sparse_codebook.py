# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d with sparse shared weights: wrapper, checks, fake, autograd. Schemas: csrc/bindings/library.cpp.

The kernels walk gaps and codes as they are stored (Han et al. 2016, "EIE", executes the same format in hardware). The
gradients go through compressed sparse rows, derived from the gaps: those of the unstructured family do the products,
and the gradient of a table entry is the sum over the weights that share it (Han et al. 2016, "Deep Compression",
section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtorch import reference
from slimtorch.formats import SparseCodebook
from slimtorch.formats.codebook import group_code
from slimtorch.ops import _common as common
from slimtorch.ops._common import Activation, Pair

_ops = torch.ops.slimtorch


def sparse_codebook_linear(
    x: Tensor, weight: SparseCodebook, bias: Tensor | None = None, *, activation: Activation = None
) -> Tensor:
    """``x @ weight.T + bias`` with a sparse weight of table entries.

    Args:
        x: ``[..., in_features]``, float32, bfloat16, float64 or (on CUDA) float16, of the dtype of
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
            return _ops.sparse_codebook_linear_inference(
                x, weight.codebook, weight.codes, weight.gaps, weight.row_offsets, weight.plan(), None, None, None,
                None, weight.bits, group_code(weight.group_size), bias, relu,
            )  # fmt: skip
        except RuntimeError:
            pass  # what is wrong is said below, or a dtype or device without a kernel served
    x, tables, bias = common.autocast(x, weight.codebook, bias)
    common.check_linear(x, tables, bias, weight.shape)
    if not common.has_kernel("sparse_codebook_linear", x):
        return reference.linear(x, _with_tables(weight, tables), bias, relu=relu)
    return _ops.sparse_codebook_linear(
        x, tables, weight.codes, weight.gaps, weight.row_offsets, weight.plan(), *_csr(x, tables, weight), weight.bits,
        group_code(weight.group_size), bias, relu,
    )  # fmt: skip


def sparse_codebook_conv2d(
    x: Tensor,
    weight: SparseCodebook,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    activation: Activation = None,
) -> Tensor:
    """2-D cross-correlation with a sparse weight of table entries.

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]``, float32, bfloat16, float64 or (on CUDA) float16, of the dtype of
            ``weight.codebook``.
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
            return _ops.sparse_codebook_conv2d_inference(
                x, weight.codebook, weight.codes, weight.gaps, weight.row_offsets, weight.plan(groups), None, None,
                None, None, weight.bits, group_code(weight.group_size), bias, weight.shape[2:], stride, padding,
                dilation, groups, relu,
            )  # fmt: skip
        except RuntimeError:
            pass  # what is wrong is said below, or a dtype or device without a kernel served
    x, tables, bias = common.autocast(x, weight.codebook, bias)
    common.check_conv2d(x, tables, bias, weight.shape, stride, padding, dilation, groups)
    if not common.has_kernel("sparse_codebook_conv2d", x):
        return reference.conv2d(x, _with_tables(weight, tables), bias, stride, padding, dilation, groups, relu=relu)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    y = _ops.sparse_codebook_conv2d(
        batched, tables, weight.codes, weight.gaps, weight.row_offsets, weight.plan(groups),
        *_csr(x, tables, weight, groups), weight.bits, group_code(weight.group_size), bias, weight.shape[2:], stride,
        padding, dilation, groups, relu,
    )  # fmt: skip
    return y if x.dim() == 4 else y.squeeze(0)


def _csr(x: Tensor, tables: Tensor, weight: SparseCodebook, groups: int = 1) -> tuple[Tensor | None, ...]:
    """Columns, offsets, forward and backward plan as the gradients want them; None for what none of them will want."""
    wanted = torch.is_grad_enabled()
    if not (wanted and (x.requires_grad or tables.requires_grad)):
        return None, None, None, None
    csr = weight.csr()
    if csr is None:
        return None, None, None, None
    return (
        csr.columns,
        csr.row_offsets,
        csr.plan(groups) if tables.requires_grad else None,
        csr.plan(groups, transposed=True) if x.requires_grad else None,
    )


def _with_tables(weight: SparseCodebook, tables: Tensor) -> SparseCodebook:
    if tables is weight.codebook:
        return weight
    return SparseCodebook(
        tables, weight.codes, weight.gaps, weight.row_offsets, weight.shape, weight.bits, weight.group_size
    )


# ---- fake kernels: shapes only, for torch.compile and torch.export ---------------------------------------------------


@torch.library.register_fake("slimtorch::sparse_codebook_cuda_plan")
def _(codes: Tensor, gaps: Tensor, row_offsets: Tensor, width: int, groups: int, bits: int) -> Tensor:
    return gaps.new_empty([torch.library.get_ctx().new_dynamic_size()], dtype=torch.uint8)


@torch.library.register_fake("slimtorch::sparse_codebook_plan")
def _(gaps: Tensor, row_offsets: Tensor, width: int, groups: int, taps: int) -> Tensor:
    return gaps.new_empty([torch.library.get_ctx().new_dynamic_size()])


@torch.library.register_fake("slimtorch::sparse_codebook_positions")
def _(gaps: Tensor, row_offsets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    weights = torch.library.get_ctx().new_dynamic_size()
    return row_offsets.new_empty([weights]), row_offsets.new_empty(row_offsets.shape)


@torch.library.register_fake("slimtorch::sparse_codebook_decode")
def _(
    codebook: Tensor, codes: Tensor, gaps: Tensor, row_offsets: Tensor, columns: Tensor, width: int, bits: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    return codebook.new_empty(columns.shape)


@torch.library.register_fake("slimtorch::sparse_codebook_sum_members")
def _(
    values: Tensor, codebook: Tensor, codes: Tensor, gaps: Tensor, row_offsets: Tensor, width: int, bits: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    return codebook.new_empty(codebook.shape)


@torch.library.register_fake("slimtorch::sparse_codebook_linear_inference")
@torch.library.register_fake("slimtorch::sparse_codebook_linear")
def _(
    x: Tensor, codebook: Tensor, codes: Tensor, gaps: Tensor, row_offsets: Tensor, plan: Tensor | None,
    columns: Tensor | None, offsets: Tensor | None, forward_plan: Tensor | None, backward_plan: Tensor | None,
    bits: int, group_size: int, bias: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty([*x.shape[:-1], row_offsets.shape[0] - 1])


@torch.library.register_fake("slimtorch::sparse_codebook_conv2d_inference")
@torch.library.register_fake("slimtorch::sparse_codebook_conv2d")
def _(
    x: Tensor, codebook: Tensor, codes: Tensor, gaps: Tensor, row_offsets: Tensor, plan: Tensor | None,
    columns: Tensor | None, offsets: Tensor | None, forward_plan: Tensor | None, backward_plan: Tensor | None,
    bits: int, group_size: int, bias: Tensor | None, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair,
    groups: int, relu: bool,
) -> Tensor:  # fmt: skip
    size = common.conv_output_size((x.shape[2], x.shape[3]), kernel, stride, padding, dilation)
    return x.new_empty([x.shape[0], row_offsets.shape[0] - 1, *size])


# ---- autograd --------------------------------------------------------------------------------------------------------

_STORED = ("codebook", "codes", "gaps", "row_offsets")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codebook, codes, gaps, row_offsets, _, columns, offsets, forward_plan, backward_plan, *rest = inputs
    bits, group_size, _, *rest = rest
    common.save(
        ctx, x=x if ctx.needs_input_grad[1] else None, codebook=codebook, codes=codes, gaps=gaps,
        row_offsets=row_offsets, columns=columns, offsets=offsets, forward_plan=forward_plan,
        backward_plan=backward_plan, output=output if rest[-1] else None,
    )  # fmt: skip
    ctx.bits, ctx.group_size, ctx.shape = bits, group_size, tuple(x.shape)
    ctx.geometry = tuple(tuple(g) for g in rest[:-2])  # kernel, stride, padding, dilation; none for a linear layer
    ctx.groups = rest[-2] if rest[:-2] else 1


_linear_setup = _conv2d_setup = _setup


def _width(ctx: Any) -> int:
    if not ctx.geometry:
        return int(ctx.shape[-1])
    kernel = ctx.geometry[0]
    return int(ctx.shape[1] // ctx.groups * kernel[0] * kernel[1])


def _positions(t: dict[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    if t["columns"] is None:
        columns, offsets = _ops.sparse_codebook_positions(t["gaps"], t["row_offsets"], width)
        return columns, offsets
    return t["columns"], t["offsets"]


@once_differentiable  # the gradient operators have no gradients of their own
def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    grad = common.masked_by_relu(grad, t["output"])
    width = _width(ctx)
    stored = [t[name] for name in _STORED]
    columns, offsets = _positions(t, width)
    grad_x = grad_codebook = grad_bias = None
    if ctx.needs_input_grad[0]:
        values = _ops.sparse_codebook_decode(*stored, columns, width, ctx.bits, ctx.group_size)
        grad_x = _ops.sparse_linear_grad_input(grad, values, columns, offsets, t["backward_plan"], width)
    if ctx.needs_input_grad[1]:
        grad_values = _ops.sparse_linear_grad_values(
            common.widened(grad), common.widened(t["x"]), columns, offsets, t["forward_plan"]
        )
        grad_codebook = _ops.sparse_codebook_sum_members(grad_values, *stored, width, ctx.bits, ctx.group_size)
    if ctx.needs_input_grad[12]:
        grad_bias = common.sum_to_bias(grad, list(range(grad.dim() - 1)))
    return (grad_x, grad_codebook, *[None] * 10, grad_bias, None)


torch.library.register_autograd("slimtorch::sparse_codebook_linear", _linear_backward, setup_context=_linear_setup)


@once_differentiable  # the gradient operators have no gradients of their own
def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t = common.saved(ctx)
    grad = common.masked_by_relu(grad, t["output"])
    width = _width(ctx)
    stored = [t[name] for name in _STORED]
    columns, offsets = _positions(t, width)
    grad_x = grad_codebook = grad_bias = None
    if ctx.needs_input_grad[0]:
        dtype = common.fold_dtype(grad.dtype, ctx.geometry[0])
        values = _ops.sparse_codebook_decode(*stored, columns, width, ctx.bits, ctx.group_size)
        lowered = _ops.sparse_conv2d_grad_columns(
            grad.to(dtype), values.to(dtype), columns, offsets, t["backward_plan"], width, ctx.groups
        )
        grad_x = common.fold_columns(lowered, ctx.shape[2:], *ctx.geometry).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_values = _ops.sparse_conv2d_grad_values(
            common.widened(grad), common.widened(t["x"]), columns, offsets, t["forward_plan"], *ctx.geometry, ctx.groups
        )
        grad_codebook = _ops.sparse_codebook_sum_members(grad_values, *stored, width, ctx.bits, ctx.group_size)
    if ctx.needs_input_grad[12]:
        grad_bias = common.sum_to_bias(grad, [0, 2, 3])
    return (grad_x, grad_codebook, *[None] * 10, grad_bias, *[None] * 6)


torch.library.register_autograd("slimtorch::sparse_codebook_conv2d", _conv2d_backward, setup_context=_conv2d_setup)
