# SPDX-License-Identifier: Apache-2.0
"""Weights as products of thin ones: what the layers of :mod:`slimtorch.design.low_rank` are started from.

Everything is computed in float64. With a *metric*, the second moment of what a layer gets, errors are those of its
outputs in place of those of its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from slimtorch.design._checks import pair, positive

Kind = Literal["channel", "spatial", "tucker", "cp"]
KINDS: tuple[str, ...] = get_args(Kind)
Rank = int | tuple[int, int]
_TINY = 1e-200  # in place of zero: even a small share of it can still be divided by


def check_kind(kind: object) -> str:
    """`kind`; ValueError where it is none of the four."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    return kind


def full_rank(shape: Sequence[int], kind: str = "channel") -> Rank:
    """The rank from which on a weight of this shape, [out, in] or [out, in, height, width], is met exactly."""
    out, c_in = shape[0], shape[1]
    if len(shape) == 2:
        return min(out, c_in)
    height, width = shape[2], shape[3]
    taps = height * width
    if kind == "channel":
        return min(out, c_in * taps)
    if kind == "spatial":
        return min(c_in * height, out * width)
    if kind == "tucker":
        return min(c_in, out * taps), min(out, c_in * taps)
    return out * c_in * taps // max(out, c_in, height, width)


def factors(
    weight: Tensor,
    rank: int | Sequence[int],
    kind: str = "channel",
    metric: Tensor | None = None,
    outputs: Tensor | None = None,
) -> list[Tensor]:
    """Weights of the thin layers, in order.

    Args:
        weight: [out, in] or [out, in, height, width], float64.
        rank: at most `full_rank`; of "tucker", what one number has above the other times the kernel's taps adds nothing
            and is left out.
        kind: of a convolution.
        metric: second moment (or covariance) of the rows or patches that the layer gets, [in, in] or
            [in · height · width, …]: the mean squared error of the outputs is then least (exactly for linear layers and
            "channel": the outputs' principal components; for the others in the last layer, the rest coming from the
            weight). None: that of the weight.
        outputs: in place of `metric`, for linear layers and "channel": second moment of the outputs, [out, out].

    Raises:
        ValueError: a rank out of range.
    """
    most = full_rank(weight.shape, kind)
    given = pair(cast(Any, rank), "rank") if isinstance(most, tuple) else positive(rank, "rank")
    pairs = [(given, most)] if isinstance(most, int) else list(zip(cast(Any, given), most, strict=True))
    if any(cast(Any, own) > limit for own, limit in pairs):
        raise ValueError(f"rank: expected at most {most} for a weight of {tuple(weight.shape)}, got {given}")
    if weight.dim() == 2 or kind == "channel":
        return _channel(weight, cast(int, given), metric, outputs)
    if kind == "spatial":
        parts = _spatial(weight, cast(int, given))
    elif kind == "tucker":
        parts = _tucker(weight, *cast("tuple[int, int]", given))
    else:
        parts = _cp(weight, cast(int, given))
    return parts if metric is None else _refit(weight, parts, kind, metric)


def spectrum(
    weight: Tensor, kind: str = "channel", metric: Tensor | None = None, outputs: Tensor | None = None
) -> list[Tensor]:
    """What each further rank adds to the sum of squares, descending, as shares; of "tucker" one for each of its two."""
    if weight.dim() == 2 or kind == "channel":
        if metric is None and outputs is None:
            squares = torch.linalg.svdvals(weight.flatten(1)).square()
        else:
            squares = _components(weight.flatten(1), metric, outputs)[0]
        return [shares(squares[: cast(int, full_rank(weight.shape, kind))])]
    if kind == "spatial":
        return [shares(torch.linalg.svdvals(weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)).square())]
    if kind != "tucker":
        raise ValueError(f"kind: {kind!r} has no spectrum")
    sides = (weight.transpose(0, 1).flatten(1), weight.flatten(1))
    return [shares(torch.linalg.svdvals(side).square()) for side in sides]


def tucker_kept(weight: Tensor) -> Tensor:
    """[first, last]: the share of the sum of squares that at least is kept by each pair of ranks, counted from 0.

    It is that of the weight in the directions of its two sides; `factors` goes on from there.
    """
    inner = torch.linalg.svd(weight.transpose(0, 1).flatten(1), full_matrices=False)[0]
    out = torch.linalg.svd(weight.flatten(1), full_matrices=False)[0]
    squares = torch.einsum("oihw,ir,os->rshw", weight, inner, out).square().sum((2, 3))
    kept = squares.cumsum(0).cumsum(1)
    return kept / kept[-1, -1] if kept[-1, -1] > 0 else torch.ones_like(kept)


def shares(squares: Tensor) -> Tensor:
    """Of their sum; descending ones."""
    total = squares.sum()
    if total <= 0:  # the first rank has all that there is
        return (torch.arange(len(squares), device=squares.device) == 0).to(squares.dtype)
    return squares / total


def enough(shares: Tensor, energy: float) -> int:
    """How many of the descending shares have that sum together."""
    kept = shares.cumsum(0)
    return min(int((kept < energy - 1e-12).sum()) + 1, len(shares))


def composed(parts: Sequence[Tensor], kind: str) -> Tensor:
    """[out, in, height, width]: the weight that the parts make together."""
    if kind == "channel":
        return torch.einsum("or,rihw->oihw", parts[1].flatten(1), parts[0])
    if kind == "spatial":
        return torch.einsum("orw,rih->oihw", parts[1].flatten(2), parts[0].flatten(2))
    if kind == "tucker":
        return torch.einsum("os,srhw,ri->oihw", parts[2].flatten(1), parts[1], parts[0].flatten(1))
    first, down, across, last = (part.flatten(1) for part in parts)
    inner = (first[:, :, None, None] * down[:, None, :, None] * across[:, None, None]).flatten(1)  # [r, i h w]
    return (last @ inner).reshape(len(last), first.shape[1], down.shape[1], across.shape[1])


def _components(rows: Tensor, metric: Tensor | None, outputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Principal components of the outputs: squares, descending, and directions [out, ...].

    Of `outputs`; or of `metric`, in whichever of the two spaces is smaller: a head may have far more outputs than
    inputs.
    """
    if outputs is None and metric is not None:
        if len(rows) > rows.shape[1]:
            squares, directions = torch.linalg.eigh(metric)
            left, values, _ = torch.linalg.svd(rows @ (directions * squares.clamp_min(0).sqrt()), full_matrices=False)
            return values.square(), left
        outputs = rows @ metric @ rows.T
    squares, directions = torch.linalg.eigh(cast(Tensor, outputs))
    return squares.flip(0).clamp_min(0), directions.flip(1)


def _channel(weight: Tensor, rank: int, metric: Tensor | None, outputs: Tensor | None) -> list[Tensor]:
    rows = weight.flatten(1)
    if metric is None and outputs is None:
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        root = values[:rank].sqrt()
        first, last = root[:, None] * right[:rank], left[:, :rank] * root
    else:
        last = _components(rows, metric, outputs)[1][:, :rank]
        first, last = _balanced(last.T @ rows, last)
    if weight.dim() == 2:
        return [first, last]
    return [first.reshape(rank, *weight.shape[1:]), last[:, :, None, None]]


def _balanced(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `first` and columns of `last` of equal norms, so that neither is trained much faster."""
    a, b = first.norm(dim=1), last.norm(dim=0)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(_TINY)).sqrt(), torch.ones_like(a))
    return first * scale[:, None], last / scale


def _spatial(weight: Tensor, rank: int) -> list[Tensor]:
    out, c_in, height, width = weight.shape
    matrix = weight.permute(1, 2, 0, 3).reshape(c_in * height, out * width)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    down = (left[:, :rank] * root).T.reshape(rank, c_in, height, 1)
    across = (root[:, None] * right[:rank]).reshape(rank, out, 1, width).transpose(0, 1)
    return [down.contiguous(), across.contiguous()]


def _tucker(weight: Tensor, first: int, last: int, rounds: int = 5) -> list[Tensor]:
    def leading(matrix: Tensor, rank: int) -> Tensor:
        return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]

    taps = weight.shape[2] * weight.shape[3]
    first, last = min(first, last * taps), min(last, first * taps)
    out = leading(weight.flatten(1), last)
    inner = out
    for _ in range(rounds):
        inner = leading(torch.einsum("oihw,os->ishw", weight, out).flatten(1), first)
        out = leading(torch.einsum("oihw,ir->orhw", weight, inner).flatten(1), last)
    core = torch.einsum("oihw,os,ir->srhw", weight, out, inner)
    return [inner.T[:, :, None, None], core, out[:, :, None, None]]


def _cp(weight: Tensor, rank: int, rounds: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in weight.shape]
    sides = [side.to(weight.device) for side in sides]
    for index in range(2):  # channels start from the weight's own directions, as far as there are any
        own = torch.linalg.svd(weight.movedim(index, 0).flatten(1), full_matrices=False)[0][:, :rank]
        sides[index][:, : own.shape[1]] = own
    rows = weight.flatten(1)
    left = rows  # the weight with its outputs contracted, [in, height, width, rank], once they are fitted
    for _ in range(rounds):
        for index in range(4):
            gram = torch.ones(rank, rank, dtype=weight.dtype, device=weight.device)
            for i, side in enumerate(sides):
                if i != index:
                    gram = gram * (side.T @ side)
            # A little ridge: without it components grow against one another.
            gram.diagonal().add_(1e-6 * gram.diagonal().mean().clamp_min(_TINY))
            _, b, c, d = sides
            if index == 0:
                pull = rows @ (b[:, None, None] * c[None, :, None] * d[None, None]).flatten(0, 2)
                sides[0] = torch.linalg.solve(gram, pull.T).T
                left = (rows.T @ sides[0]).reshape(*weight.shape[1:], rank)
                continue
            if index == 1:
                pull = (left * c[:, None] * d).sum((1, 2))
            elif index == 2:
                pull = (left * b[:, None, None] * d).sum((0, 2))
            else:
                pull = (left * b[:, None, None] * c[:, None]).sum((0, 1))
            side = torch.linalg.solve(gram, pull.T).T
            sides[index] = side if index == 3 else side / side.norm(dim=0).clamp_min(_TINY)
    norms = [side.norm(dim=0).clamp_min(_TINY) for side in sides]
    whole = (norms[0] * norms[1] * norms[2] * norms[3]).pow(0.25)  # the same norm in each, to train all alike
    out, c_in, down, across = (side * (whole / norm) for side, norm in zip(sides, norms, strict=True))
    return [c_in.T[:, :, None, None], down.T[:, None, :, None], across.T[:, None, None, :], out[:, :, None, None]]


def _refit(weight: Tensor, parts: list[Tensor], kind: str, metric: Tensor) -> list[Tensor]:
    """The last part anew, by least squares of the outputs under `metric`."""
    width = weight.shape[3]
    rank = parts[-1].shape[1]
    if kind == "spatial":  # what comes out of the vertical part, seen from each place of the horizontal one
        before = torch.zeros(rank, width, *weight.shape[1:], dtype=weight.dtype, device=weight.device)
        for x in range(width):
            before[:, x, :, :, x] = parts[0][:, :, :, 0]
        before = before.flatten(2).flatten(0, 1)
    else:
        identity = torch.eye(rank, dtype=weight.dtype, device=weight.device)[:, :, None, None]
        before = composed([*parts[:-1], identity], kind).flatten(1)
    pulled = before @ metric
    gram = pulled @ before.T
    gram.diagonal().add_(1e-9 * gram.diagonal().mean().clamp_min(_TINY))
    last = torch.linalg.solve(gram, pulled @ weight.flatten(1).T).T
    return [*parts[:-1], last.reshape(parts[-1].shape)]
