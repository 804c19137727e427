# SPDX-License-Identifier: Apache-2.0
"""Unstructured sparsity: compressed sparse rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimtorch.formats._common import (
    INDEX_LIMIT,
    WithPlans,
    check_columns,
    check_dense,
    check_offsets,
    matrix_shape,
    on_gpu,
)

_ops = torch.ops.slimtorch


@dataclass(eq=False)
class Sparse(WithPlans):
    """The nonzero weights of a linear or conv2d layer as compressed sparse rows (CSR).

    Args:
        values: ``[nnz]``, floating point. Row after row, columns ascending.
        columns: ``[nnz]`` int32, index into the flattened ``shape[1:]``.
        row_offsets: ``[rows + 1]`` int32, where each row starts in ``values``.
        shape: shape of the dense weight, ``(out, in)`` or ``(out, in / groups, kh, kw)``.
    """

    values: Tensor
    columns: Tensor
    row_offsets: Tensor
    shape: tuple[int, ...]
    # Execution plans derived from the positions alone, so that no change of the values can make one stale.
    _plans: dict[tuple[int, bool], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def pack(cls, dense: Tensor) -> Sparse:
        """Keep the nonzero entries of ``dense`` (``[out, in]`` or ``[out, in / groups, kh, kw]``).

        Raises:
            TypeError: ``dense`` is no floating-point tensor.
            ValueError: wrong number of dimensions, NaN, or 2**31 nonzero entries or more.
        """
        check_dense(dense)
        rows, width = matrix_shape(dense.shape)
        matrix = dense.detach().reshape(rows, width)
        keep = matrix != 0
        counts = keep.sum(dim=1)
        nnz = int(counts.sum())
        if nnz > INDEX_LIMIT or width > INDEX_LIMIT:
            raise ValueError(f"dense: expected fewer than 2**31 nonzero entries, got {nnz}")
        row_offsets = torch.zeros(rows + 1, dtype=torch.int32, device=dense.device)
        row_offsets[1:] = torch.cumsum(counts, 0)
        values = matrix[keep]
        columns = keep.nonzero()[:, 1].to(torch.int32)
        return cls(values, columns, row_offsets, tuple(dense.shape))

    @classmethod
    def full(cls, dense: Tensor) -> Sparse:
        """Keep every entry of ``dense``, zeros too: what a layer that is yet to be trained starts from.

        The pattern does not depend on the values, so ``dense`` may be on the meta device.
        """
        rows, width = matrix_shape(dense.shape)
        if rows * width > INDEX_LIMIT:
            raise ValueError(f"dense: expected fewer than 2**31 entries, got {rows * width}")
        columns = torch.arange(width, dtype=torch.int32, device=dense.device).repeat(rows)
        row_offsets = torch.arange(rows + 1, dtype=torch.int32, device=dense.device) * width
        return cls(dense.detach().reshape(-1).clone(), columns, row_offsets, tuple(dense.shape))

    def validate(self) -> Sparse:
        """Check the invariants that the kernels rely on; raises TypeError or ValueError naming the field."""
        rows, width = matrix_shape(self.shape)
        if self.values.dim() != 1 or not self.values.is_floating_point():
            raise TypeError(
                f"values: expected a 1-D floating-point tensor, got {self.values.dtype} {list(self.values.shape)}"
            )
        if self.columns.shape != self.values.shape:
            raise ValueError(f"columns: expected shape {list(self.values.shape)}, got {list(self.columns.shape)}")
        check_offsets("row_offsets", self.row_offsets, rows, self.values.numel())
        check_columns("columns", self.columns, self.row_offsets, width)
        return self

    def to_dense(self) -> Tensor:
        """The dense weight, of ``self.shape``; differentiable with respect to ``values``."""
        rows, width = matrix_shape(self.shape)
        index = self.row_indices() * width + self.columns
        flat = torch.zeros(rows * width, dtype=self.values.dtype, device=self.values.device)
        return flat.index_put((index,), self.values).reshape(self.shape)

    def row_indices(self) -> Tensor:
        """Row of each value, ``[nnz]`` int64."""
        offsets = self.row_offsets.long()
        rows = torch.arange(offsets.numel() - 1, device=offsets.device)
        return rows.repeat_interleave(offsets[1:] - offsets[:-1], output_size=self.values.numel())

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical tensors."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.row_offsets))

    @property
    def density(self) -> float:
        """Stored entries over entries of the dense weight."""
        rows, width = matrix_shape(self.shape)
        return self.values.numel() / max(1, rows * width)

    def plan(self, groups: int = 1, *, transposed: bool = False) -> Tensor | None:
        """How the kernels of this device walk the positions (opaque bytes): derived once, cached, never saved.

        None while a graph is being traced and nothing is cached (kernels then derive it at every call, or do without),
        and on devices without kernels. On a GPU the first call waits for the device: the host makes the plan.

        Raises:
            TypeError, ValueError: the format breaks an invariant (see ``validate``); checked before the first plan.
        """
        key = (groups, transposed)
        if key not in self._plans:
            gpu = on_gpu(self.columns)
            if torch.compiler.is_compiling() or not (gpu or self.columns.device.type == "cpu"):
                return None
            if not self._plans:
                self.validate()  # kernels trust the positions from here on
            _, width = matrix_shape(self.shape)
            taps = self.shape[2] * self.shape[3] if len(self.shape) == 4 else 1
            with torch.inference_mode(False):  # else backward could not save a plan derived inside inference_mode
                if gpu:
                    plan = _ops.sparse_cuda_plan(
                        self.columns.cpu(), self.row_offsets.cpu(), width, groups, transposed
                    ).to(self.columns.device)
                else:
                    plan = _ops.sparse_plan(self.columns, self.row_offsets, width, groups, taps, transposed)
            self._plans[key] = plan
        return self._plans[key]

    def packed_values(self, groups: int = 1) -> Tensor | None:
        """A copy of the values in the order in which the kernels of many columns read them, or None.

        It hangs on the plan, with which it lives and dies, and is made anew when the values have changed. None where
        torch cannot tell that: while a graph is being traced, and for values made in inference mode. The kernel then
        orders them at every call. Edits through ``values.data`` are not counted by torch; the CPU's kernel compares 32
        values of the copy at every call, which finds changes of whole weights, but not of a single value. On a GPU,
        where only the 16-bit kernels want such a copy, nothing is compared.
        """
        plan = self.plan(groups)
        values = self.values
        if on_gpu(values) and values.dtype not in (torch.float16, torch.bfloat16):
            return None
        if plan is None or torch.compiler.is_compiling() or values.is_inference():
            return None
        held: tuple[Tensor, int, Tensor] | None = getattr(plan, "slimtorch_packed", None)
        # The version tells of changes in place; storage and dtype of `.data = …`, as in Module.to(). What is held is an
        # alias of the values, so that no new storage can get the address of the old one.
        if held is not None:
            alias, version, packed = held
            same = alias.data_ptr() == values.data_ptr() and alias.dtype == values.dtype
            if same and alias.shape == values.shape and version == values._version:
                return packed
        with torch.inference_mode(False), torch.no_grad():
            packed = _ops.sparse_pack_values(values.detach(), plan)
        plan.slimtorch_packed = (values.detach(), values._version, packed)  # type: ignore[attr-defined]
        return packed
