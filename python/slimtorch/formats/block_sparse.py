# SPDX-License-Identifier: Apache-2.0
"""Block sparsity: compressed rows of dense blocks (BSR)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
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

MAX_BLOCK = 1024


def check_block_size(block_size: tuple[int, int]) -> tuple[int, int]:
    """``block_size`` as a pair of plain ints; TypeError or ValueError otherwise."""
    if not isinstance(block_size, (tuple, list)) or len(block_size) != 2:
        raise TypeError(f"block_size: expected a pair (rows, columns), got {block_size!r}")
    for extent in block_size:
        if isinstance(extent, bool) or not isinstance(extent, int):
            raise TypeError(f"block_size: expected two ints, got {block_size!r}")
        if not 1 <= extent <= MAX_BLOCK:
            raise ValueError(f"block_size: expected extents in 1 … {MAX_BLOCK}, got {tuple(block_size)}")
    return int(block_size[0]), int(block_size[1])


@dataclass(eq=False)
class BlockSparse(WithPlans):
    """The nonzero blocks of a linear or conv2d weight, seen as a matrix ``[out, prod(rest)]``.

    Blocks on the right and lower edge of a matrix that the block size does not divide are padded with zeros.

    Args:
        values: ``[nblocks, r, c]``, floating point. Block row after block row, block columns ascending.
        block_columns: ``[nblocks]`` int32.
        block_row_offsets: ``[ceil(out / r) + 1]`` int32.
        shape: shape of the dense weight, ``(out, in)`` or ``(out, in / groups, kh, kw)``.
        block_size: ``(r, c)``.
    """

    values: Tensor
    block_columns: Tensor
    block_row_offsets: Tensor
    shape: tuple[int, ...]
    block_size: tuple[int, int] = (16, 16)
    # Execution plans derived from the positions alone, so that no change of the values can make one stale.
    _plans: dict[tuple[int, bool], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def pack(cls, dense: Tensor, block_size: tuple[int, int] = (16, 16)) -> BlockSparse:
        """Keep every block of ``dense`` that has a nonzero entry.

        Raises:
            TypeError: ``dense`` is no floating-point tensor, or ``block_size`` no pair of ints.
            ValueError: wrong number of dimensions, NaN, block extents outside 1 … 1024.
        """
        check_dense(dense)
        r, c = check_block_size(block_size)
        rows, width = matrix_shape(dense.shape)
        matrix = dense.detach().reshape(rows, width)
        padded = F.pad(matrix, (0, -width % c, 0, -rows % r))
        blocks = padded.reshape(padded.shape[0] // r, r, padded.shape[1] // c, c).transpose(1, 2)
        keep = (blocks != 0).any(dim=3).any(dim=2)
        if keep.numel() > INDEX_LIMIT:
            raise ValueError(f"dense: expected fewer than 2**31 blocks, got {keep.numel()}")
        counts = keep.sum(dim=1)
        offsets = torch.zeros(keep.shape[0] + 1, dtype=torch.int32, device=dense.device)
        offsets[1:] = torch.cumsum(counts, 0)
        columns = keep.nonzero()[:, 1].to(torch.int32)
        return cls(blocks[keep].contiguous(), columns, offsets, tuple(dense.shape), (r, c))

    @classmethod
    def full(cls, dense: Tensor, block_size: tuple[int, int] = (16, 16)) -> BlockSparse:
        """Keep every block of ``dense``, zeros too: what a layer that is yet to be trained starts from.

        The pattern does not depend on the values, so ``dense`` may be on the meta device.
        """
        r, c = check_block_size(block_size)
        rows, width = matrix_shape(dense.shape)
        down, across = -(-rows // r), -(-width // c)
        padded = F.pad(dense.detach().reshape(rows, width), (0, -width % c, 0, -rows % r))
        values = padded.reshape(down, r, across, c).transpose(1, 2).reshape(-1, r, c).clone()
        columns = torch.arange(across, dtype=torch.int32, device=dense.device).repeat(down)
        offsets = torch.arange(down + 1, dtype=torch.int32, device=dense.device) * across
        return cls(values, columns, offsets, tuple(dense.shape), (r, c))

    def validate(self) -> BlockSparse:
        """Check the invariants that the kernels rely on; raises TypeError or ValueError naming the field."""
        r, c = check_block_size(self.block_size)
        rows, width = matrix_shape(self.shape)
        if not self.values.is_floating_point():
            raise TypeError(f"values: expected a floating-point tensor, got {self.values.dtype}")
        if self.values.dim() != 3 or self.values.shape[1:] != (r, c):
            raise ValueError(f"values: expected shape [nblocks, {r}, {c}], got {list(self.values.shape)}")
        if self.block_columns.shape != self.values.shape[:1]:
            raise ValueError(
                f"block_columns: expected shape [{self.values.shape[0]}], got {list(self.block_columns.shape)}"
            )
        check_offsets("block_row_offsets", self.block_row_offsets, -(-rows // r), self.values.shape[0])
        check_columns("block_columns", self.block_columns, self.block_row_offsets, -(-width // c))
        return self

    def to_dense(self) -> Tensor:
        """The dense weight, of ``self.shape``; differentiable with respect to ``values``."""
        r, c = self.block_size
        rows, width = matrix_shape(self.shape)
        block_rows, block_cols = -(-rows // r), -(-width // c)
        offsets = self.block_row_offsets.long()
        row = torch.arange(block_rows, device=offsets.device)
        row = row.repeat_interleave(offsets[1:] - offsets[:-1], output_size=self.values.shape[0])
        grid = torch.zeros(block_rows * block_cols, r, c, dtype=self.values.dtype, device=self.values.device)
        grid = grid.index_put((row * block_cols + self.block_columns,), self.values)
        full = grid.reshape(block_rows, block_cols, r, c).transpose(1, 2).reshape(block_rows * r, block_cols * c)
        return full[:rows, :width].reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical tensors."""
        tensors = (self.values, self.block_columns, self.block_row_offsets)
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def density(self) -> float:
        """Stored entries (padding of edge blocks included) over entries of the dense weight."""
        rows, width = matrix_shape(self.shape)
        return self.values.numel() / max(1, rows * width)

    def plan(self, groups: int = 1, *, transposed: bool = False) -> Tensor | None:
        """How kernels walk the positions (opaque): derived once, cached, never saved.

        For the CPU these are bytes. For CUDA they are made on the CPU and moved, so the first call for a weight waits
        for the device; call a layer once before it is captured in a CUDA graph. None while a graph is being traced and
        nothing is cached (the kernel then does without, more slowly), and on other devices.

        Raises:
            TypeError, ValueError: the format breaks an invariant (see ``validate``); checked before the first plan.
        """
        key = (groups, transposed)
        if key not in self._plans:
            gpu = on_gpu(self.block_columns)
            if torch.compiler.is_compiling() or not (gpu or self.block_columns.device.type == "cpu"):
                return None
            if not self._plans:
                self.validate()  # kernels trust the positions from here on
            rows, width = matrix_shape(self.shape)
            with torch.inference_mode(False):  # else backward could not save a plan derived inside inference_mode
                if gpu:
                    plan = torch.ops.slimtorch.block_sparse_cuda_plan(
                        self.block_columns.cpu(), self.block_row_offsets.cpu(), self.block_size, rows, width, groups,
                        transposed,
                    )  # fmt: skip
                    self._plans[key] = plan.to(self.block_columns.device)
                else:
                    taps = self.shape[2] * self.shape[3] if len(self.shape) == 4 else 1
                    self._plans[key] = torch.ops.slimtorch.block_sparse_plan(
                        self.block_columns, self.block_row_offsets, self.block_size, rows, width, groups, taps,
                        transposed,
                    )  # fmt: skip
        return self._plans[key]
