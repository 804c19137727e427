# SPDX-License-Identifier: Apache-2.0
"""Pruning by masks: the weights, blocks, rows or columns of the smallest norm, or of the least other importance.

    weight [out, in/groups · kh · kw]  ──scores──▶  one number per group  ──k smallest──▶  mask

The k-th smallest score is found by counting, in O(n) and without sorting; ties at it go by position, so that the
number of groups removed is exact and the same on every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch.prune import importance as importances
from slimtorch.prune.mask import MASKABLE, install, mask_of, nonzeros, unmasked_weight
from slimtorch.prune.report import PrunedLayer, PruneReport

CHUNK = 1 << 18
"""Weights handled at a time: their scores stay in the cache, and no copy of a whole weight is ever made."""

Granularity = Literal["weight", "row", "column"] | tuple[int, int]


@dataclass(frozen=True)
class Magnitude:
    """Prune what has the smallest magnitude, or the least of another importance.

    A weight is seen as a matrix [out, in/groups · kh · kw]. What is counted, ranked and removed is a *group*: a single
    weight, a whole row or column of that matrix, or a block of r × c (blocks at the right and lower edge are
    smaller). `round(sparsity · number of groups)` groups are removed, never more or fewer, except that weights removed
    earlier stay removed. Blocks are ranked by their mean, so that a cut-off block at the edge competes fairly.

    Args:
        sparsity: share of the groups to remove, in [0, 1).
        granularity: "weight", "row", "column" or a block (r, c).
        scope: "layer" ranks within each layer; "global" ranks over all layers with this configuration.
        norm: 1 (mean absolute value) or 2 (root mean square) of a group; single weights rank alike under both.
        importance: None ranks by `norm`; "magnitude", "l2", "random", on `data` with `loss_fn` "snip", "taylor" or
            "taylor2"; or any `WeightImportance`, such as `Movement`, `PathIntegral` and `Fisher`, which have watched
            training. A group is worth the mean of its weights.
        loss_fn: for importances on data: `loss_fn(output, *targets) -> scalar`.
        seed: of "random" and "taylor2".
        batches: how many of `data` to read; None: all. Fewer than that is an error.
        allow_empty: False refuses to take all weights of a layer, which cuts the network in two.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    sparsity: float
    granularity: Granularity = "weight"
    scope: Literal["layer", "global"] = "layer"
    norm: Literal[1, 2] = 1
    importance: str | importances.WeightImportance | None = None
    loss_fn: importances.LossFn | None = None
    seed: int = 0
    batches: int | None = None
    allow_empty: bool = True

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)
        block = self.granularity
        if isinstance(block, list):
            block = tuple(block)
            object.__setattr__(self, "granularity", block)
        if isinstance(block, tuple):
            whole = len(block) == 2 and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in block)
            if not whole:
                raise ValueError(f"granularity: expected a block of two positive whole numbers, got {block!r}")
        elif block not in ("weight", "row", "column"):
            raise ValueError(f"granularity: expected 'weight', 'row', 'column' or a block (r, c), got {block!r}")
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope: expected 'layer' or 'global', got {self.scope!r}")
        if self.norm not in (1, 2):
            raise ValueError(f"norm: expected 1 or 2, got {self.norm!r}")
        if self.importance is not None:
            chosen = importances.get(self.importance)
            if not hasattr(chosen, "weights"):
                raise TypeError(f"importance: {self.importance!r} scores neurons, not weights; use it with Neurons")
            if self.norm != 1:
                raise ValueError("norm: expected none beside importance, which says what is ranked by")
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise TypeError(f"loss_fn: expected a callable, got {type(self.loss_fn).__name__}")
        check_count("seed", self.seed, 0)
        if self.batches is not None:
            check_count("batches", self.batches, 1)

    def block(self, rows: int, columns: int) -> tuple[int, int]:
        """The size of a group in a matrix [rows, columns]."""
        if isinstance(self.granularity, tuple):
            return self.granularity
        return {"weight": (1, 1), "row": (1, max(columns, 1)), "column": (max(rows, 1), 1)}[self.granularity]

    def describe(self) -> str:
        """The granularity in one word."""
        return self.granularity if isinstance(self.granularity, str) else "{}×{}".format(*self.granularity)


def check_fraction(name: str, value: object) -> None:
    """TypeError for what is no number, ValueError outside [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1), got {value!r}")
    if not 0 <= value < 1:  # also false for NaN
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")


def check_count(name: str, value: object, least: int) -> None:
    """TypeError for what is no whole number, ValueError below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def prune_weights_(
    model: nn.Module,
    config: Magnitude | Mapping[str, Magnitude | None],
    *,
    filter_fn: _select.FilterFn | None = None,
    regrow: bool = False,
    data: Iterable[Any] | None = None,
) -> PruneReport:
    """Masks the weights of Linear and Conv2d layers in place; `prune_` with a `Magnitude` does this.

    Args:
        model: any module, or a single layer.
        config: one configuration, or a mapping from glob of names to configuration.
        filter_fn: `filter_fn(module, name) -> bool`.
        regrow: masks are drawn anew from the unmasked weights, so that one pruned earlier may come back. Otherwise
            pruned weights stay pruned.
        data: iterable of `inputs` or `(inputs, *targets)`, for importances that need it.

    Raises:
        ValueError: a weight holds NaN or has no storage yet, a glob matches nothing, an importance cannot be told or is
            not finite, or a layer would be left empty that must not be. The model is left as it was.
    """
    chosen = _select.resolve(model, config, filter_fn, types=MASKABLE)
    for name, layer, _ in chosen:
        check_weight(name, layer)
    keeps = [torch.empty(0)] * len(chosen)
    scores = _weigh(model, chosen, data)
    for members in _pools(chosen):
        for index, keep in zip(members, _choose([chosen[i] for i in members], scores, regrow), strict=True):
            keeps[index] = keep
    for (name, _, magnitude), keep in zip(chosen, keeps, strict=True):
        if not magnitude.allow_empty and keep.numel() and not bool(keep.any()):
            raise ValueError(
                f"sparsity: {magnitude.sparsity:.4g} would leave layer {name!r} without weights; "
                "prune less, or by layer, or leave it out with a glob or filter_fn="
            )

    before = [_count(layer) for _, layer, _ in chosen]
    install([(layer, keep) for (_, layer, _), keep in zip(chosen, keeps, strict=True)])
    report = PruneReport([], 0, 0)
    for (name, layer, magnitude), (nonzero, size, bias) in zip(chosen, before, strict=True):
        left, _, _ = _count(layer)
        shape = tuple(unmasked_weight(layer).shape)
        report.layers.append(
            PrunedLayer(
                name,
                magnitude.describe(),
                shape[0],
                shape[0],
                shape,
                shape,
                1 - nonzero / size if size else 0.0,
                1 - left / size if size else 0.0,
                nonzero + bias,
                left + bias,
            )
        )
        if size and not left:
            report.notes.append(f"layer {name!r} has no weights left")
    untouched = sum(p.numel() for p in model.parameters()) - sum(size + bias for _, size, bias in before)
    report.parameters_before = untouched + sum(layer.parameters_before for layer in report.layers)
    report.parameters_after = untouched + sum(layer.parameters_after for layer in report.layers)
    if not chosen:
        report.notes.append("Nothing to prune: no Linear or Conv2d layer was selected. The model is as it was.")
    return report


def check_weight(name: str, layer: nn.Module) -> None:
    """ValueError where a layer's weight cannot be ranked: not initialised, on the meta device, or holding NaN."""
    weight = unmasked_weight(layer)
    where = f"layer {name!r}" if name else "the layer"
    if not isinstance(weight, Tensor):
        raise ValueError(f"model: {where} has no weight tensor, got {type(weight).__name__}")
    if torch.nn.parameter.is_lazy(weight):
        raise ValueError(f"model: the weight of {where} is not initialised yet; run the model once first")
    if weight.is_meta:
        raise ValueError(f"model: the weight of {where} is on the meta device, expected values")
    if not weight.is_floating_point():
        raise ValueError(f"model: the weight of {where} should be a floating dtype, got {weight.dtype}")
    with torch.no_grad():
        # a sum is NaN if one term is, and also for inf - inf: only then look at each
        if bool(weight.sum().isnan()) and bool(weight.isnan().any()):
            raise ValueError(f"model: the weight of {where} holds NaN")


def _pools(chosen: Sequence[tuple[str, nn.Module, Magnitude]]) -> list[list[int]]:
    """Which layers are ranked together: each on its own, or all of one global configuration."""
    pools: list[list[int]] = []
    shared: dict[Magnitude, list[int]] = {}
    for index, (_, _, magnitude) in enumerate(chosen):
        if magnitude.scope == "layer":
            pools.append([index])
        elif magnitude in shared:
            shared[magnitude].append(index)
        else:
            shared[magnitude] = [index]
            pools.append(shared[magnitude])
    return pools


def _weigh(
    model: nn.Module, chosen: Sequence[tuple[str, nn.Module, Magnitude]], data: Iterable[Any] | None
) -> dict[str, Tensor]:
    """Scores [out, in/groups * kernel] of the layers not ranked by their norm; each importance runs once."""
    wanted: dict[Any, dict[str, nn.Module]] = {}
    for name, layer, magnitude in chosen:
        if magnitude.importance is not None:
            key = (magnitude.importance, magnitude.loss_fn, magnitude.seed, magnitude.batches)
            wanted.setdefault(key, {})[name] = layer
    if len(wanted) > 1 and isinstance(data, Iterator):
        data = list(data)  # read once per importance
    scores: dict[str, Tensor] = {}
    for (importance, loss_fn, seed, batches), layers in wanted.items():
        scores |= importances.weigh(model, layers, importance, importances.Evidence(data, loss_fn, seed, batches))
    return scores


@torch.no_grad()
def _choose(
    pool: Sequence[tuple[str, nn.Module, Magnitude]], scores: Mapping[str, Tensor], regrow: bool
) -> list[Tensor]:
    """The masks of layers that are ranked together: bool, the weights' shapes."""
    magnitude = pool[0][2]
    norm = importances.L1() if magnitude.norm == 1 or magnitude.granularity == "weight" else importances.L2()
    chunks: list[Callable[[], Tensor]] = []
    keeps: list[Tensor] = []
    homes: list[tuple[Tensor, tuple[int, int]]] = []  # per chunk: its rows of a mask, its block size
    for name, layer, _ in pool:
        weight, present = unmasked_weight(layer), mask_of(layer)
        rows, columns = weight.shape[0], math.prod(weight.shape[1:])
        block = magnitude.block(rows, columns)
        kept = None if present is None or regrow else present.mask.reshape(rows, columns)
        keep = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
        keeps.append(keep.view(weight.shape))
        step = block[0] * max(1, CHUNK // max(1, block[0] * columns))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            rated = partial(_normed, weight[part], norm) if name not in scores else partial(_same, scores[name][part])
            score = partial(_scores, rated, None if kept is None else kept[part], block)
            if block != (1, 1):  # few numbers from many: worth keeping
                score = partial(_same, score())
            chunks.append(score)
            homes.append((keep[part], block))
    marks = largest(chunks, magnitude.sparsity)
    for mark, (home, block) in zip(marks, homes, strict=True):
        home.copy_(expand_groups(mark, (home.shape[0], home.shape[1]), block))
    for (_, layer, _), keep in zip(pool, keeps, strict=True):
        present = mask_of(layer)
        if present is not None and not regrow:
            keep &= present.mask
    return keeps


def _scores(rated: Callable[[], Tensor], kept: Tensor | None, block: tuple[int, int]) -> Tensor:
    """One score per block of some rows of a weight, flat; -1 for blocks that are masked already."""
    score = rated()
    if kept is None:
        return group_means(score, block).flatten()
    score = group_means(torch.where(kept, score, 0), block)
    return torch.where(group_any(kept, block), score, -1).flatten()


def _normed(weight: Tensor, norm: importances.WeightImportance) -> Tensor:
    stand_in = _Weight(weight)
    return norm.weights(stand_in, {"": stand_in}, importances.Evidence())[""]


def _same(scores: Tensor) -> Tensor:
    return scores


class _Weight(nn.Module):
    """A layer that is nothing but a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()


def keep_largest(scores: Tensor, remove: int) -> Tensor:
    """Marks all but the `remove` smallest of `scores` [n], no NaN; among equals the first go first. [n] bool."""
    if remove <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return _mark([lambda: scores], remove, scores.dtype != torch.float32)[0]


def largest(chunks: Sequence[Callable[[], Tensor]], sparsity: float) -> list[Tensor]:
    """Marks all but the `round(sparsity · n)` smallest of n scores; among equals the first go first.

    Args:
        chunks: each gives some of the scores, float32 or float64, flat, no NaN; asked several times, so that the
            scores of a large layer need not be in memory together. Negative scores are always among the removed.
        sparsity: in [0, 1).

    Returns:
        One bool tensor per chunk. O(n) time.
    """
    total = gone = 0
    wide = False
    for chunk in chunks:
        scores = chunk()
        wide |= scores.dtype != torch.float32
        total += scores.numel()
        gone += int(torch.count_nonzero(scores < 0))
    remove = max(gone, round(sparsity * total))
    if remove == 0:
        return [torch.ones_like(chunk(), dtype=torch.bool) for chunk in chunks]
    return _mark(chunks, remove, wide)


def _mark(chunks: Sequence[Callable[[], Tensor]], remove: int, wide: bool) -> list[Tensor]:
    """The same for a given number >= 1 of scores to remove; `wide` where some of them are float64."""
    threshold, smaller = kth_smallest(chunks, remove, wide)
    equals = remove - smaller  # of those at the threshold, how many still go
    marks = []
    for chunk in chunks:
        scores = chunk()
        keep = scores >= threshold
        if equals:
            ties = (scores == threshold).nonzero().flatten()[:equals]
            keep[ties] = False
            equals -= ties.numel()
        marks.append(keep)
    return marks


def kth_smallest(chunks: Sequence[Callable[[], Tensor]], k: int, wide: bool) -> tuple[float, int]:
    """The k-th smallest (from 1) of all scores, and how many are smaller than it.

    Where some are float64 (`wide`) by partition. Else by counting: first by the upper 16 bits, then, among those that
    share them, by the lower 16. Read as an integer the bits of a float have the order of the number (of a negative one
    once the others are flipped). Two passes over the data whatever the values, where selection by partition takes ten
    times longer on some.
    """
    if wide:
        scores = torch.cat([chunk().double().cpu() for chunk in chunks])
        value = torch.kthvalue(scores, k).values
        return float(value), int(torch.count_nonzero(scores < value))
    counts = _total(torch.bincount((_ordered(c()) >> 16) + 0x8000, minlength=0x10000) for c in chunks)
    upper, below = _bucket(counts, k)
    counts = _total(torch.bincount(_lower_bits(c(), upper - 0x8000), minlength=0x10000) for c in chunks)
    lower, below_too = _bucket(counts, k - below)
    found = ((upper - 0x8000) << 16) | lower
    bits = torch.tensor(found if found >= 0 else found ^ 0x7FFFFFFF, dtype=torch.int32)
    return float(bits.view(torch.float32)), below + below_too


def _ordered(scores: Tensor) -> Tensor:
    """Integers in the order of float32 `scores`."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no minus zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _lower_bits(scores: Tensor, upper: int) -> Tensor:
    order = _ordered(scores)
    return order[(order >> 16) == upper] & 0xFFFF


def _total(counts: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(0x10000, dtype=torch.int64)
    for count in counts:
        total += count.cpu()
    return total


def _bucket(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th smallest, and how many lie in the buckets before it."""
    upto = counts.cumsum(0)
    bucket = int(torch.searchsorted(upto, k))
    return bucket, int(upto[bucket - 1]) if bucket else 0


def group_means(scores: Tensor, block: tuple[int, int]) -> Tensor:
    """Mean of each block of `scores` [rows, columns]; [ceil(rows/r), ceil(columns/c)], edges over their own size."""
    (rows, columns), (r, c) = scores.shape, block
    if block == (1, 1):
        return scores
    down, across = -(-rows // r), -(-columns // c)
    padded = nn.functional.pad(scores, (0, across * c - columns, 0, down * r - rows))
    sums = padded.reshape(down, r, across, c).sum((1, 3))
    heights = (rows - torch.arange(down, device=scores.device) * r).clamp(max=r)
    widths = (columns - torch.arange(across, device=scores.device) * c).clamp(max=c)
    return sums / (heights[:, None] * widths)


def group_any(keep: Tensor, block: tuple[int, int]) -> Tensor:
    """For each block of `keep` [rows, columns] bool, whether one is True; [ceil(rows/r), ceil(columns/c)]."""
    return keep if block == (1, 1) else group_means(keep.float(), block) > 0


def expand_groups(groups: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """One value per block, [ceil(rows/r) · ceil(columns/c)], spread over the matrix [rows, columns]."""
    (rows, columns), (r, c) = shape, block
    down, across = -(-rows // r), -(-columns // c)
    spread = groups.reshape(down, 1, across, 1).expand(down, r, across, c)
    return spread.reshape(down * r, across * c)[:rows, :columns]


def _count(layer: nn.Module) -> tuple[int, int, int]:
    """Weights that are not zero, weights, elements of the bias."""
    bias = cast("Tensor | None", layer.bias)
    with torch.no_grad():
        return nonzeros(layer), unmasked_weight(layer).numel(), 0 if bias is None else bias.numel()
