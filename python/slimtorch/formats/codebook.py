# SPDX-License-Identifier: Apache-2.0
"""Shared weights: an index of few bits for every weight, into learned tables (Han et al. 2016, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from slimtorch.formats._bits import check_stream, pack_bits, stream_bytes, unpack_bits
from slimtorch.formats._common import INDEX_LIMIT, WithPlans, check_dense, matrix_shape, on_gpu

GroupSize = int | Literal["row"] | None

Fit = Callable[[Tensor, int, "Tensor | slice"], Tensor]
"""``fit(values, count, members)``: at most ``count`` ascending centroids of ``values``, the ``members`` of a table."""


def check_bits(bits: int) -> int:
    """``bits`` if it is an int in 1 … 8; TypeError or ValueError otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits: expected an int, got {bits!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: expected 1 … 8, got {bits}")
    return bits


def check_group_size(group_size: GroupSize, width: int | None = None) -> GroupSize:
    """``group_size`` if it is None, "row" or an int that fits a layer of ``width`` inputs; raises otherwise."""
    if group_size is None or group_size == "row":
        return group_size
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size: expected None, 'row' or an int, got {group_size!r}")
    if group_size < 1 or (width is not None and group_size > width):
        limit = "1 or more" if width is None else f"1 … {width} (the inputs of a row)"
        raise ValueError(f"group_size: expected {limit}, got {group_size}")
    return group_size


def table_count(shape: tuple[int, ...], group_size: GroupSize) -> int:
    """How many tables a weight of ``shape`` has."""
    rows, width = matrix_shape(shape)
    if group_size is None:
        return 1
    return rows if group_size == "row" else -(-width // group_size)


def check_tables(codebook: Tensor, shape: tuple[int, ...], bits: int, group_size: GroupSize) -> None:
    """Tables of a floating-point dtype, as many and as large as a weight of ``shape`` needs."""
    if not codebook.is_floating_point():
        raise TypeError(f"codebook: expected a floating-point tensor, got {codebook.dtype}")
    wanted = (table_count(shape, group_size), 1 << bits)
    if codebook.shape != wanted:
        raise ValueError(f"codebook: expected shape {list(wanted)}, got {list(codebook.shape)}")


def table_of(row: Tensor, column: Tensor, group_size: GroupSize) -> Tensor:
    """Table of each weight, from its row and column (int64, broadcast together)."""
    if group_size is None:
        return torch.zeros_like(row + column)
    return row + 0 * column if group_size == "row" else 0 * row + column // group_size


def group_code(group_size: GroupSize) -> int:
    """``group_size`` as the operators take it: 0 for None, -1 for "row"."""
    return 0 if group_size is None else -1 if group_size == "row" else group_size


def cluster(
    values: Tensor, tables: Tensor, count: int, bits: int, zero: bool, fit: Fit | None = None
) -> tuple[Tensor, Tensor]:
    """Tables ``[count, 2**bits]`` for ``values [n]`` of which each belongs to one of ``tables [n]``, and indices.

    Exact where a table has at most ``2**bits`` distinct values, else 1-D k-means from linear initialisation (Han et
    al. 2016, section 3.2), or whatever ``fit`` gives. With ``zero``, entry 0 of every table is 0 and serves the zeros,
    and nothing else.
    """
    entries = 1 << bits
    codebook = torch.zeros(count, entries, dtype=values.dtype, device=values.device)
    codes = torch.zeros(values.numel(), dtype=torch.uint8, device=values.device)
    order = torch.argsort(tables, stable=True) if count > 1 else None
    ends = torch.cumsum(torch.bincount(tables, minlength=count), 0).tolist()
    start = 0
    for table, end in enumerate(ends):
        members: slice | Tensor = slice(start, end) if order is None else order[start:end]
        start = end
        own = values[members]
        room = entries
        if zero:
            nonzero = own != 0
            room -= 1
            members = nonzero.nonzero()[:, 0] if isinstance(members, slice) else members[nonzero]
            own = own[nonzero]
        if own.numel() == 0:
            continue
        centroids = _centroids(own, room) if fit is None else fit(own, room, members)
        codebook[table, entries - room : entries - room + centroids.numel()] = centroids.to(codebook.dtype)
        # Indices by the centroids as they are stored, so that rounding them cannot move a weight to a farther one.
        stored = codebook[table, entries - room : entries - room + centroids.numel()]
        codes[members] = nearest(own, stored) + (entries - room)
    return codebook, codes


def _centroids(values: Tensor, count: int) -> Tensor:
    """At most ``count`` ascending centroids of ``values``."""
    distinct = torch.unique(values)
    if distinct.numel() <= count:
        return distinct
    return kmeans(values, torch.linspace(float(values.min()), float(values.max()), count, dtype=torch.float64))


def _native(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.numel() > 0 and not torch.compiler.is_compiling()


def kmeans(values: Tensor, centroids: Tensor, iterations: int = 300, weights: Tensor | None = None) -> Tensor:
    """Lloyd's iterations in one dimension, on sorted values and their prefix sums; ascending centroids, float64.

    Args:
        values: ``[n]``.
        centroids: where to start.
        iterations: at most; it ends before where no centroid moves.
        weights: ``[n]``, not negative: what each value counts in the mean of its cluster; None: all alike. A cluster
            without weight stays where it is.
    """
    if _native(values):
        wide, counts = values.flatten().double(), None if weights is None else weights.flatten().double()
        return torch.ops.slimtorch.kmeans_1d(wide, centroids.double(), counts, iterations, 0.0)
    ordered, order = values.flatten().double().sort()
    counts = torch.ones_like(ordered) if weights is None else weights.flatten().double()[order]
    sums = torch.cat([ordered.new_zeros(1), (ordered * counts).cumsum(0)])
    totals = torch.cat([ordered.new_zeros(1), counts.cumsum(0)])
    centroids = centroids.to(ordered).sort().values
    for _ in range(iterations):
        cuts = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, right=True)
        cuts = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), ordered.numel())])
        sizes = totals[cuts[1:]] - totals[cuts[:-1]]
        means = (sums[cuts[1:]] - sums[cuts[:-1]]) / torch.where(sizes > 0, sizes, 1)
        moved = torch.where(sizes > 0, means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved.sort().values
    return centroids


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of the ascending ``centroids`` for each value, uint8; ties to the lower one."""
    wide = centroids.double()
    if _native(values):
        return torch.ops.slimtorch.assign_1d(values.flatten().double(), wide).reshape(values.shape)
    return torch.searchsorted((wide[1:] + wide[:-1]) / 2, values.double().contiguous()).to(torch.uint8)


@dataclass(eq=False)
class Codebook(WithPlans):
    """A linear or conv2d weight as indices into tables, seen as a matrix ``[out, prod(rest)]``.

    Args:
        codebook: ``[tables, 2**bits]``, floating point.
        codes: ``[ceil(out * prod(rest) * bits / 8)]`` uint8, a bit stream (lowest bits first) of one index per weight,
            row after row.
        shape: shape of the dense weight, ``(out, in)`` or ``(out, in / groups, kh, kw)``.
        bits: of an index, 1 … 8.
        group_size: None: one table for all. An int g: a table for every g consecutive inputs (columns of the matrix),
            shared by all rows. "row": a table per output row.
        zero: entry 0 of every table is a constant without gradient: the zero of pruned weights.
    """

    codebook: Tensor
    codes: Tensor
    shape: tuple[int, ...]
    bits: int = 4
    group_size: GroupSize = None
    zero: bool = False
    # Derived from the codes alone, so that no change of the tables can make one stale.
    _plans: dict[tuple[int, bool], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def pack(cls, dense: Tensor, bits: int = 4, group_size: GroupSize = None, *, zero: bool | None = None) -> Codebook:
        """Cluster ``dense`` (``[out, in]`` or ``[out, in / groups, kh, kw]``) into ``2**bits`` values per table.

        A table with no more distinct values than entries is exact; otherwise its values come from k-means.
        ``slimtorch.cluster_`` has more to choose from.

        Args:
            zero: whether zeros keep an entry of their own; None: where more than an eighth of the weights are zero.

        Raises:
            TypeError: ``dense`` is no floating-point tensor, or an option has the wrong type.
            ValueError: wrong number of dimensions, NaN or infinite weights, bits outside 1 … 8, a group larger than a
                row.
        """
        check_dense(dense)
        check_bits(bits)
        rows, width = matrix_shape(dense.shape)
        check_group_size(group_size, width)
        shape = tuple(dense.shape)
        if dense.is_meta:
            codes = dense.new_empty(stream_bytes(rows * width, bits), dtype=torch.uint8)
            return cls(dense.new_empty(table_count(shape, group_size), 1 << bits), codes, shape, bits, group_size)
        flat = dense.detach().reshape(-1)
        if not bool(flat.isfinite().all()):
            raise ValueError("dense: expected finite weights, got infinity")
        if zero is None:
            zero = bits > 1 and 8 * int(torch.count_nonzero(flat)) < 7 * flat.numel()
        index = torch.arange(rows * width, device=dense.device)
        tables = table_of(index // max(1, width), index % max(1, width), group_size)
        codebook, codes = cluster(flat, tables, table_count(shape, group_size), bits, zero)
        return cls(codebook, pack_bits(codes, bits), shape, bits, group_size, zero)

    @classmethod
    def from_indices(
        cls,
        codebook: Tensor,
        indices: Tensor,
        shape: tuple[int, ...],
        group_size: GroupSize = None,
        *,
        zero: bool = False,
    ) -> Codebook:
        """From tables ``[tables, 2**bits]`` and an index per weight (uint8, any shape, row-major order)."""
        bits = check_bits(int(codebook.shape[-1]).bit_length() - 1)
        return cls(codebook, pack_bits(indices.flatten(), bits), tuple(shape), bits, group_size, zero).validate()

    def validate(self) -> Codebook:
        """Check the invariants that the kernels rely on; raises TypeError or ValueError naming the field."""
        check_bits(self.bits)
        rows, width = matrix_shape(self.shape)
        check_group_size(self.group_size, None if rows * width == 0 else width)
        if rows * width > INDEX_LIMIT:
            raise ValueError(f"shape: expected fewer than 2**31 weights, got {rows * width}")
        check_tables(self.codebook, self.shape, self.bits, self.group_size)
        check_stream("codes", self.codes, rows * width, self.bits)
        return self

    def indices(self) -> Tensor:
        """Index of each weight in its table, uint8 ``[out, prod(rest)]``."""
        rows, width = matrix_shape(self.shape)
        return unpack_bits(self.codes, self.bits, rows * width).reshape(rows, width)

    def tables(self) -> Tensor:
        """Table of each weight, int64 ``[out, prod(rest)]``."""
        rows, width = matrix_shape(self.shape)
        device = self.codes.device
        return table_of(
            torch.arange(rows, device=device)[:, None], torch.arange(width, device=device)[None, :], self.group_size
        )

    def to_dense(self) -> Tensor:
        """The dense weight, of ``self.shape``; differentiable with respect to ``codebook``."""
        codebook = self.codebook
        if self.zero:
            codebook = torch.cat([codebook[:, :1].detach(), codebook[:, 1:]], dim=1)
        flat = (self.tables() << self.bits) + self.indices()
        return codebook.reshape(-1)[flat].reshape(self.shape)

    def plan(self, groups: int = 1) -> Tensor | None:
        """The codes in the order of the CUDA kernels (opaque bytes): derived once, cached, never saved.

        None on the CPU, whose kernels read the codes as they are, and while a graph is being traced and nothing is
        cached (the kernel then brings the codes into order itself, at every call).

        Raises:
            TypeError, ValueError: the format breaks an invariant (see ``validate``); checked before the first plan.
        """
        if not on_gpu(self.codes):
            return None
        key = (groups, False)
        if key not in self._plans:
            if torch.compiler.is_compiling():
                return None
            if not self._plans:
                self.validate()
            rows, width = matrix_shape(self.shape)
            with torch.inference_mode(False):  # else backward could not save a plan derived inside inference_mode
                made = torch.ops.slimtorch.codebook_cuda_plan(self.codes.cpu(), rows, width, self.bits, groups)
                self._plans[key] = made.to(self.codes.device)
        return self._plans[key]

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical tensors."""
        return self.codes.numel() + self.codebook.numel() * self.codebook.element_size()

    @property
    def density(self) -> float:
        """Stored entries over entries of the dense weight: 1."""
        return 1.0
