# SPDX-License-Identifier: Apache-2.0
"""How the values of a table are chosen: k-means and uniform grids, as small configurations.

weight ──▶ table by table ──▶ start (linear, density, random) ──▶ Lloyd's iterations ──▶ codebook, indices
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from slimtorch.formats import Codebook, SparseCodebook
from slimtorch.formats._bits import pack_bits, stream_bytes
from slimtorch.formats._common import check_dense, matrix_shape
from slimtorch.formats.codebook import (
    GroupSize,
    check_bits,
    check_group_size,
    cluster,
    kmeans,
    table_count,
    table_of,
)
from slimtorch.formats.sparse_codebook import SKIP

Init = Literal["linear", "density", "random"]
Importance = Literal["magnitude"] | Mapping[str, Tensor] | Callable[[nn.Module, str], Tensor]
FormatName = Literal["auto", "codebook", "sparse_codebook"]

ZERO_SHARE = 1 / 8  # from this share of zeros on, they keep an entry of their own in a layer without a mask


@dataclass(frozen=True)
class KMeans:
    """Tables of ``2**bits`` values from 1-D k-means, one run per table (Han et al. 2016, 1510.00149, section 3).

    Args:
        bits: of an index, 1 … 8.
        group_size: None: one table for the layer. An int g: a table for every g consecutive inputs. "row": a table
            for every output.
        init: where k-means starts (section 3.2). "linear": evenly spaced from the smallest to the largest weight, the
            paper's choice, since the few large weights matter most. "density": evenly spaced in the distribution of
            the weights. "random": weights drawn at random.
        importance: what a weight counts in the mean of its cluster. None: all alike. "magnitude": its own magnitude.
            A mapping from layer name to a tensor of the weight's shape (see :func:`fisher`), or a callable
            ``(module, name) -> tensor``. Finite, not negative.
        iterations: of Lloyd, at most; it ends before where no centroid moves. 0 keeps the start.
        seed: of "random".
        format: "codebook" stores an index for every weight, "sparse_codebook" one for every weight that is not zero
            and its position; "auto" takes the one with fewer bytes.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.
    """

    bits: int = 4
    group_size: GroupSize = None
    init: Init = "linear"
    importance: Importance | None = field(default=None, compare=False)
    iterations: int = 300
    seed: int = 0
    format: FormatName = "auto"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size)
        if self.init not in ("linear", "density", "random"):
            raise ValueError(f"init: expected 'linear', 'density' or 'random', got {self.init!r}")
        known = self.importance in (None, "magnitude") if not isinstance(self.importance, Mapping) else True
        if not known and not callable(self.importance):
            raise TypeError(
                "importance: expected None, 'magnitude', a mapping from layer names to tensors or a callable "
                f"(module, name) -> tensor, got {self.importance!r}"
            )
        for name in ("iterations", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {value!r}")
        if self.iterations < 0:
            raise ValueError(f"iterations: expected 0 or more, got {self.iterations}")
        _check_format(self.format)

    def describe(self) -> str:
        """The method in two words."""
        return f"k-means {self.init}"

    def centroids(self, values: Tensor, count: int, weights: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """At most ``count`` ascending centroids (float64) of ``values [n]``; the distinct values where they are so few.

        ``seed`` is added to the configuration's own: the tables of a layer do not draw alike.
        """
        distinct = torch.unique(values)
        if distinct.numel() <= count:
            return distinct.double()
        start = self._start(values, distinct, count, weights, seed)
        return kmeans(values, start, self.iterations, weights)

    def _start(self, values: Tensor, distinct: Tensor, count: int, weights: Tensor | None, seed: int) -> Tensor:
        if self.init == "linear":
            return _grid(float(distinct[0]), float(distinct[-1]), count, values.device)
        if self.init == "density":
            ordered, order = values.double().sort()
            counts = torch.ones_like(ordered) if weights is None else weights.double()[order]
            if not bool(counts.sum() > 0):
                counts = torch.ones_like(ordered)
            reached = counts.cumsum(0)
            # The middle of each of `count` equal parts of the distribution.
            at = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count * reached[-1]
            return ordered[torch.searchsorted(reached, at).clamp(max=ordered.numel() - 1)]
        generator = torch.Generator().manual_seed(self.seed + seed)
        drawn = torch.randperm(distinct.numel(), generator=generator)[:count].to(values.device)
        return distinct[drawn].double().sort().values


@dataclass(frozen=True)
class Uniform:
    """A uniform grid of ``2**bits`` values per table: what is usually called k-bit quantization, as a codebook.

    The layer is the same as after :class:`KMeans`: its values can be trained, and leave the grid then.

    Args:
        bits, group_size, format: as in :class:`KMeans`.
        symmetric: the grid runs from -m to m, m the largest magnitude; otherwise from the smallest to the largest
            weight. Both ends are grid points.

    Where pruned zeros have entry 0 of each table, the grid has ``2**bits - 1`` values.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.
    """

    bits: int = 4
    group_size: GroupSize = None
    symmetric: bool = False
    format: FormatName = "auto"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size)
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric: expected a bool, got {self.symmetric!r}")
        _check_format(self.format)

    def describe(self) -> str:
        """The method in two words."""
        return "uniform symmetric" if self.symmetric else "uniform"

    def centroids(self, values: Tensor, count: int, weights: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """The ``count`` grid points (float64) for ``values [n]``; neither ``weights`` nor ``seed`` move them."""
        low, high = float(values.min()), float(values.max())
        if self.symmetric:
            high = max(-low, high)
            low = -high
        if count == 1 or low == high:
            return torch.tensor([(low + high) / 2], dtype=torch.float64, device=values.device)
        return _grid(low, high, count, values.device)


ClusterConfig = KMeans | Uniform


def _check_format(name: str) -> None:
    if name not in ("auto", "codebook", "sparse_codebook"):
        raise ValueError(f"format: expected 'auto', 'codebook' or 'sparse_codebook', got {name!r}")


def _grid(low: float, high: float, count: int, device: torch.device) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64, device=device)


# --- from a dense weight to a format ----------------------------------------------------------------------------------


def importance_of(config: ClusterConfig, module: nn.Module, name: str, weight: Tensor) -> Tensor | None:
    """What each entry of ``weight`` counts, of its shape; ValueError, with the layer's name, where it does not fit."""
    wanted = config.importance if isinstance(config, KMeans) else None
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return weight.detach().abs()
    if isinstance(wanted, Mapping):
        if name not in wanted:
            raise ValueError(f"importance: expected a tensor for layer {name!r}, got only {sorted(wanted)}")
        found = wanted[name]
    else:
        found = wanted(module, name)
    if not isinstance(found, Tensor) or found.shape != weight.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"importance: expected a tensor of shape {tuple(weight.shape)} for layer {name!r}, got {got}")
    found = found.detach().to(weight.device)
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise ValueError(f"importance: expected finite numbers, 0 or more, for layer {name!r}")
    return found


def check_layer(name: str, weight: Tensor, config: ClusterConfig) -> None:
    """ValueError, with the layer's name, where the weight cannot be clustered so."""
    problem = None
    if not bool(weight.isfinite().all()):
        problem = "its weight holds NaN or infinity; repair it before clustering"
    else:
        try:
            check_dense(weight)
            check_group_size(config.group_size, matrix_shape(weight.shape)[1])
        except (TypeError, ValueError) as error:
            problem = str(error)
    if problem is not None:
        raise ValueError(f"model: layer {name!r}: {problem}")


def sparse_entries(weight: Tensor, skip: int = SKIP) -> int:
    """Entries of a sparse format whose gaps reach ``skip`` columns at most: weights that are not zero, and fillers."""
    rows, width = matrix_shape(weight.shape)
    row, column = (weight.detach().reshape(rows, width) != 0).nonzero().unbind(1)
    before = torch.cat([column.new_full((1,), -1), column[:-1]])
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    passed = column - torch.where(first, -1, before) - 1
    return int(row.numel() + (passed // skip).sum())


def plan_format(weight: Tensor, config: ClusterConfig, masked: bool) -> tuple[bool, bool, int]:
    """(sparse, zero, bytes): whether only nonzero weights are stored, whether zeros have entry 0, and the size."""
    rows, width = matrix_shape(weight.shape)
    bits = config.bits
    count = rows * width
    zeros = count - int(torch.count_nonzero(weight))
    keep_zeros = zeros > 0 and (masked or zeros > ZERO_SHARE * count)
    tables = table_count(tuple(weight.shape), config.group_size) * (1 << bits) * weight.element_size()
    dense = stream_bytes(count, bits) + tables
    if config.format == "codebook" or (config.format == "auto" and not keep_zeros):
        return False, keep_zeros, dense
    entries = sparse_entries(weight)
    sparse = stream_bytes(entries, bits) + entries + 4 * (rows + 1) + tables
    # A table of two, one of them the zero, would leave a single value for all other weights.
    if config.format == "sparse_codebook" or sparse < dense or bits == 1:
        return True, False, sparse
    return False, keep_zeros, dense


def build(
    weight: Tensor, config: ClusterConfig, *, masked: bool = False, importance: Tensor | None = None
) -> Codebook | SparseCodebook:
    """``weight`` clustered, in the format that ``config`` asks for; its zeros stay zero where ``masked``.

    Args:
        weight: ``[out, in]`` or ``[out, in / groups, kh, kw]``, finite.
        config: the method.
        masked: zeros are pruned weights. Without a mask they are where more than an eighth of the weights are zero.
        importance: of the shape of ``weight``, or None.
    """
    sparse, zero, _ = plan_format(weight, config, masked)
    return build_as(weight, config, sparse, zero, importance)


def build_as(
    weight: Tensor, config: ClusterConfig, sparse: bool, zero: bool, importance: Tensor | None = None
) -> Codebook | SparseCodebook:
    """:func:`build`, the format being decided."""
    rows, width = matrix_shape(weight.shape)
    shape = tuple(weight.shape)
    matrix = weight.detach().reshape(rows, width)
    row, column = (matrix != 0 if sparse else torch.ones_like(matrix, dtype=torch.bool)).nonzero().unbind(1)
    values = matrix[row, column]
    weights = None if importance is None else importance.reshape(rows, width)[row, column]
    done = [0]  # tables fitted so far

    def fit(own: Tensor, count: int, members: Tensor | slice) -> Tensor:
        done[0] += 1
        return config.centroids(own, count, None if weights is None else weights[members], seed=done[0] - 1)

    tables = table_of(row, column, config.group_size)
    codebook, codes = cluster(values, tables, table_count(shape, config.group_size), config.bits, zero, fit)
    if sparse:
        return SparseCodebook.from_positions(codebook, codes, row, column, shape, config.group_size)
    return Codebook(codebook, pack_bits(codes, config.bits), shape, config.bits, config.group_size, zero)


def zeros_of(weight: Tensor) -> float:
    """Share of zeros."""
    return 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())


def weight_of(module: nn.Module) -> Tensor:
    """The layer's weight as it computes with it, masks applied, without gradient."""
    return cast(Tensor, module.weight).detach()
