# SPDX-License-Identifier: Apache-2.0
"""Sparse shared weights: positions as gaps of a byte, values as indices of few bits (Han et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimtorch.formats._bits import check_stream, pack_bits, stream_bytes, unpack_bits
from slimtorch.formats._common import INDEX_LIMIT, WithPlans, check_dense, check_offsets, matrix_shape, on_gpu
from slimtorch.formats.codebook import (
    GroupSize,
    check_bits,
    check_group_size,
    check_tables,
    cluster,
    table_count,
    table_of,
)
from slimtorch.formats.sparse import Sparse

SKIP = 255


@dataclass(eq=False)
class SparseCodebook(WithPlans):
    """The nonzero weights of a linear or conv2d layer, each as a gap to the one before and an index into a table.

    A row is walked from column -1. An entry with a gap below 255 moves on by ``gap + 1`` columns, and its weight stands
    there. An entry with gap 255 is a *skip*: it moves on by 255 columns and holds no weight (its code is 0).

    Args:
        codebook: ``[tables, 2**bits]``, floating point.
        codes: ``[ceil(entries * bits / 8)]`` uint8, a bit stream (lowest bits first) of one index per entry.
        gaps: ``[entries]`` uint8. Row after row. No row ends with a skip.
        row_offsets: ``[out + 1]`` int32, where the entries of each row start.
        shape: shape of the dense weight, ``(out, in)`` or ``(out, in / groups, kh, kw)``.
        bits: of an index, 1 … 8.
        group_size: which table a weight uses: see :class:`slimtorch.formats.Codebook`.
    """

    codebook: Tensor
    codes: Tensor
    gaps: Tensor
    row_offsets: Tensor
    shape: tuple[int, ...]
    bits: int = 4
    group_size: GroupSize = None
    # Execution plans, by groups, and the positions as CSR: derived from the gaps alone, so no change of the tables can
    # make one stale.
    _plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def pack(cls, dense: Tensor, bits: int = 4, group_size: GroupSize = None) -> SparseCodebook:
        """Cluster the nonzero entries of ``dense`` into ``2**bits`` values per table.

        A table with no more distinct values than entries is exact; otherwise its values come from k-means.

        Raises:
            TypeError: ``dense`` is no floating-point tensor, or an option has the wrong type.
            ValueError: wrong number of dimensions, NaN or infinite weights, bits outside 1 … 8, a group larger than a
                row.
        """
        check_dense(dense)
        return cls._of(dense, dense.detach().reshape(matrix_shape(dense.shape)) != 0, bits, group_size)

    @classmethod
    def full(cls, dense: Tensor, bits: int = 4, group_size: GroupSize = None) -> SparseCodebook:
        """Keep every entry of ``dense``, zeros too: what a layer that is yet to be trained starts from.

        The pattern does not depend on the values, so ``dense`` may be on the meta device.
        """
        rows, width = matrix_shape(dense.shape)
        shape = tuple(dense.shape)
        if not dense.is_meta:
            return cls._of(dense, torch.ones(rows, width, dtype=torch.bool, device=dense.device), bits, group_size)
        check_bits(bits)
        check_group_size(group_size, width)
        return cls(
            dense.new_empty(table_count(shape, group_size), 1 << bits),
            dense.new_empty(stream_bytes(rows * width, bits), dtype=torch.uint8),
            dense.new_empty(rows * width, dtype=torch.uint8),
            dense.new_empty(rows + 1, dtype=torch.int32),
            shape, bits, group_size,
        )  # fmt: skip

    @classmethod
    def _of(cls, dense: Tensor, keep: Tensor, bits: int, group_size: GroupSize) -> SparseCodebook:
        check_bits(bits)
        rows, width = matrix_shape(dense.shape)
        check_group_size(group_size, width)
        matrix, shape = dense.detach().reshape(rows, width), tuple(dense.shape)
        if not bool(matrix.isfinite().all()):
            raise ValueError("dense: expected finite weights, got infinity")
        row, column = keep.nonzero().unbind(1)
        codebook, codes = cluster(
            matrix[keep], table_of(row, column, group_size), table_count(shape, group_size), bits, zero=False
        )
        return cls.from_positions(codebook, codes, row, column, shape, group_size)

    @classmethod
    def from_positions(
        cls,
        codebook: Tensor,
        indices: Tensor,
        rows: Tensor,
        columns: Tensor,
        shape: tuple[int, ...],
        group_size: GroupSize = None,
    ) -> SparseCodebook:
        """From tables, and for each stored weight its index (uint8), row and column (int64, in row-major order)."""
        bits = check_bits(int(codebook.shape[-1]).bit_length() - 1)
        count = matrix_shape(shape)[0]
        previous = torch.cat([columns.new_full((1,), -1), columns[:-1]])
        starts = torch.ones_like(rows, dtype=torch.bool)
        starts[1:] = rows[1:] != rows[:-1]
        distance = columns - torch.where(starts, -1, previous) - 1  # columns passed over
        skips = distance // SKIP
        last = torch.cumsum(skips + 1, 0) - 1  # entry of each weight, after its skips
        entries = int(last[-1]) + 1 if last.numel() else 0
        if entries > INDEX_LIMIT:
            raise ValueError(f"dense: expected fewer than 2**31 entries, got {entries}")
        gaps = torch.full((entries,), SKIP, dtype=torch.uint8, device=columns.device)
        gaps[last] = (distance % SKIP).to(torch.uint8)
        codes = torch.zeros(entries, dtype=torch.uint8, device=columns.device)
        codes[last] = indices.to(torch.uint8)
        offsets = torch.zeros(count + 1, dtype=torch.int32, device=columns.device)
        offsets[1:] = torch.cumsum(rows.new_zeros(count).index_add(0, rows, skips + 1), 0)
        return cls(codebook, pack_bits(codes, bits), gaps, offsets, tuple(shape), bits, group_size)

    def validate(self) -> SparseCodebook:
        """Check the invariants that the kernels rely on; raises TypeError or ValueError naming the field."""
        check_bits(self.bits)
        rows, width = matrix_shape(self.shape)
        check_group_size(self.group_size, None if rows * width == 0 else width)
        check_tables(self.codebook, self.shape, self.bits, self.group_size)
        if self.gaps.dim() != 1 or self.gaps.dtype != torch.uint8:
            raise TypeError(f"gaps: expected a 1-D uint8 tensor, got {self.gaps.dtype} {list(self.gaps.shape)}")
        entries = self.gaps.numel()
        check_offsets("row_offsets", self.row_offsets, rows, entries)
        check_stream("codes", self.codes, entries, self.bits)
        if entries == 0:
            return self
        ends = self.row_offsets[1:].long()
        ends = ends[ends > self.row_offsets[:-1].long()] - 1
        if bool((self.gaps[ends] == SKIP).any()):
            raise ValueError("gaps: expected no row to end with a skip (255)")
        _, columns = self._walk()
        if int(columns[ends].max()) >= width:
            raise ValueError(f"gaps: expected columns below {width}, got {int(columns[ends].max())}")
        return self

    def _walk(self) -> tuple[Tensor, Tensor]:
        """Row and column of each entry, int64; skips included."""
        gaps, offsets = self.gaps.long(), self.row_offsets.long()
        rows = torch.arange(offsets.numel() - 1, device=gaps.device)
        rows = rows.repeat_interleave(offsets[1:] - offsets[:-1], output_size=gaps.numel())
        reach = torch.cumsum(torch.where(gaps == SKIP, SKIP, gaps + 1), 0)
        before = torch.cat([reach.new_zeros(1), reach])[offsets[:-1]]
        return rows, reach - before[rows] - 1

    def positions(self) -> tuple[Tensor, Tensor]:
        """Row and column of each stored weight, int64 ``[nnz]``."""
        rows, columns = self._walk()
        keep = self.gaps != SKIP
        return rows[keep], columns[keep]

    def indices(self) -> Tensor:
        """Index of each stored weight in its table, uint8 ``[nnz]``."""
        return unpack_bits(self.codes, self.bits, self.gaps.numel())[self.gaps != SKIP]

    def to_dense(self) -> Tensor:
        """The dense weight, of ``self.shape``; differentiable with respect to ``codebook``."""
        rows, width = matrix_shape(self.shape)
        row, column = self.positions()
        entry = (table_of(row, column, self.group_size) << self.bits) + self.indices()
        flat = torch.zeros(rows * width, dtype=self.codebook.dtype, device=self.codebook.device)
        return flat.index_put((row * width + column,), self.codebook.reshape(-1)[entry]).reshape(self.shape)

    @property
    def nnz(self) -> int:
        """Stored weights: entries that are not skips."""
        return int((self.gaps != SKIP).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical tensors."""
        tensors = (self.codebook, self.codes, self.gaps, self.row_offsets)
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def density(self) -> float:
        """Stored weights over entries of the dense weight."""
        rows, width = matrix_shape(self.shape)
        return self.nnz / max(1, rows * width)

    def plan(self, groups: int = 1) -> Tensor | None:
        """What kernels want beside the stored tensors (opaque bytes): derived once, cached, never saved.

        For the CPU: how it walks the entries, about a byte for each row and 160 columns, whatever the density. For
        CUDA: positions as bits and the codes in the order of tensor cores, 9/64 of a byte for each entry of the dense
        weight and the codes once more; made on the CPU and moved, so the first call for a weight waits for the device.
        A plan for CUDA holds the codes: who writes to them in place starts a new format. None while a graph is being
        traced and nothing is cached (the kernel then derives it at every call, or does without), and on other devices.

        Raises:
            TypeError, ValueError: the format breaks an invariant (see ``validate``); checked before the first plan.
        """
        if groups not in self._plans:
            gpu = on_gpu(self.gaps)
            if torch.compiler.is_compiling() or not (gpu or self.gaps.device.type == "cpu"):
                return None
            if not self._plans:
                self.validate()  # kernels trust the positions from here on
            _, width = matrix_shape(self.shape)
            with torch.inference_mode(False):  # else backward could not save a plan derived inside inference_mode
                if gpu:
                    made = torch.ops.slimtorch.sparse_codebook_cuda_plan(
                        self.codes.cpu(), self.gaps.cpu(), self.row_offsets.cpu(), width, groups, self.bits
                    )
                    self._plans[groups] = made.to(self.gaps.device)
                else:
                    taps = self.shape[2] * self.shape[3] if len(self.shape) == 4 else 1
                    self._plans[groups] = torch.ops.slimtorch.sparse_codebook_plan(
                        self.gaps, self.row_offsets, width, groups, taps
                    )
        plan: Tensor = self._plans[groups]
        return plan

    def csr(self) -> Sparse | None:
        """The positions as compressed sparse rows, with values of no meaning: what gradients are computed with.

        Derived once, cached, never saved; six bytes and more for each weight, so only training asks for it. None while
        a graph is being traced and nothing is cached, and on devices other than the CPU and CUDA.

        Raises:
            TypeError, ValueError: the format breaks an invariant (see ``validate``).
        """
        if "csr" not in self._plans:
            device = self.gaps.device
            if torch.compiler.is_compiling() or not (on_gpu(self.gaps) or device.type == "cpu"):
                return None
            if not self._plans:
                self.validate()
            with torch.inference_mode(False):
                columns, offsets = torch.ops.slimtorch.sparse_codebook_positions(
                    self.gaps.cpu(), self.row_offsets.cpu(), matrix_shape(self.shape)[1]
                )
                values = torch.zeros((), device=device).expand(columns.shape)
                self._plans["csr"] = Sparse(values, columns.to(device), offsets.to(device), self.shape)
        csr: Sparse = self._plans["csr"]
        return csr
