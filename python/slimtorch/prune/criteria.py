# SPDX-License-Identifier: Apache-2.0
"""Mask criteria: which weights stay, told from their values before and after training (Zhou et al., "Deconstructing
Lottery Tickets", 1905.01067, figure 2 and section 5).

A criterion gives each weight a score; in each layer the weights of the largest scores stay, and ties are broken at
random, so that a score of 0 for every weight is a random mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slimtorch.prune.magnitude import check_count, keep_largest

Criterion = Callable[[Tensor, Tensor], Tensor]
"""`criterion(initial, final) -> scores`, all float of one shape, the weights that are in question of one layer."""


def large_final(initial: Tensor, final: Tensor) -> Tensor:
    """|w_f|: the criterion of lottery tickets."""
    return final.abs()


def small_final(initial: Tensor, final: Tensor) -> Tensor:
    """-|w_f|, a control."""
    return -final.abs()


def large_init(initial: Tensor, final: Tensor) -> Tensor:
    """|w_i|."""
    return initial.abs()


def small_init(initial: Tensor, final: Tensor) -> Tensor:
    """-|w_i|."""
    return -initial.abs()


def large_init_large_final(initial: Tensor, final: Tensor) -> Tensor:
    """min(α |w_f|, |w_i|): both large.

    The paper chooses α so that the threshold cuts off the same share of both. Taking ranks in place of magnitudes does
    that for every threshold at once.
    """
    return torch.minimum(_rank(final.abs()), _rank(initial.abs()))


def small_init_small_final(initial: Tensor, final: Tensor) -> Tensor:
    """-max(α |w_f|, |w_i|): both small; α as for `large_init_large_final`."""
    return -torch.maximum(_rank(final.abs()), _rank(initial.abs()))


def magnitude_increase(initial: Tensor, final: Tensor) -> Tensor:
    """|w_f| - |w_i|."""
    return final.abs() - initial.abs()


def movement(initial: Tensor, final: Tensor) -> Tensor:
    """|w_f - w_i|."""
    return (final - initial).abs()


def random(initial: Tensor, final: Tensor) -> Tensor:
    """0 for every weight, so that only chance decides."""
    return torch.zeros_like(final)


def large_final_same_sign(initial: Tensor, final: Tensor) -> Tensor:
    """max(0, w_i w_f / |w_i|): large at the end, with the sign it had. Makes supermasks (section 5)."""
    return (initial.sign() * final).clamp(min=0)


def large_final_other_sign(initial: Tensor, final: Tensor) -> Tensor:
    """max(0, -w_i w_f / |w_i|): large at the end, with the other sign. The control of the last."""
    return (-initial.sign() * final).clamp(min=0)


CRITERIA: dict[str, Criterion] = {
    f.__name__: f
    for f in (
        large_final,
        small_final,
        large_init,
        small_init,
        large_init_large_final,
        small_init_small_final,
        magnitude_increase,
        movement,
        random,
        large_final_same_sign,
        large_final_other_sign,
    )
}
"""By name: the nine of figure 2, and the two that ask for signs."""


def get(criterion: str | Criterion) -> Criterion:
    """The criterion of that name, or the function itself; ValueError for another name, TypeError for neither."""
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)} or a function, got {criterion!r}")
        return CRITERIA[criterion]
    if not callable(criterion):
        raise TypeError(f"criterion: expected a name or a function (initial, final) -> scores, got {criterion!r}")
    return criterion


def name_of(criterion: str | Criterion) -> str:
    """The name that tells the criterion from others."""
    found = get(criterion)
    for name, known in CRITERIA.items():
        if found is known:
            return name
    return f"{found.__module__}.{getattr(found, '__qualname__', type(found).__qualname__)}"


def choose(
    criterion: str | Criterion,
    initial: Mapping[str, Tensor],
    final: Mapping[str, Tensor],
    kept: float | Mapping[str, float],
    *,
    within: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """One mask for each layer: `n - round((1 - kept) · n)` of its n weights are kept.

    Args:
        criterion: a name of `CRITERIA` or a function (initial, final) -> scores.
        initial: layer name → weight before training.
        final: the same after training.
        kept: share to keep, in (0, 1]: one number, or by layer name; layers that it leaves out have no mask.
        within: masks from before: what they have removed stays removed, and is not shown to the criterion.
        seed: of the random order in which ties are broken.

    Returns:
        Layer name → bool tensor of the weight's shape, True where it is kept.

    Raises:
        ValueError: an unknown criterion, layers or shapes that do not fit, scores that hold NaN, or a layer that would
            have no weight left.
    """
    function = get(criterion)
    check_count("seed", seed, 0)
    shares = dict(kept) if isinstance(kept, Mapping) else dict.fromkeys(initial, kept)
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, share in shares.items():
        check_share(f"kept[{name!r}]" if isinstance(kept, Mapping) else "kept", share)
        if name not in initial or name not in final:
            raise ValueError(f"kept: layer {name!r} has no initial or no final weights, only {sorted(initial)}")
        first, last = initial[name].detach(), final[name].detach()
        if first.shape != last.shape:
            raise ValueError(
                f"final: layer {name!r} has shape {tuple(last.shape)}, its initial weights {tuple(first.shape)}"
            )
        before = None if within is None or name not in within else within[name]
        if before is not None and (before.shape != last.shape or before.dtype != torch.bool):
            raise ValueError(
                f"within: expected bool of shape {tuple(last.shape)} for layer {name!r}, "
                f"got {before.dtype} of shape {tuple(before.shape)}"
            )
        masks[name] = _mask(function, name, first, last, share, before, generator)
    return masks


def check_share(name: str, value: object) -> None:
    """TypeError for what is no number, ValueError outside (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {value!r}")


@torch.no_grad()
def _mask(
    criterion: Criterion,
    name: str,
    initial: Tensor,
    final: Tensor,
    share: float,
    before: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    keep = torch.ones(final.numel(), dtype=torch.bool) if before is None else before.flatten().cpu()
    size = keep.numel()
    remaining = size - round((1 - share) * size)
    if size and not remaining:
        raise ValueError(f"kept: {share:.4g} would leave layer {name!r} without weights; keep more of it")
    there = keep.nonzero().flatten()
    wide = torch.float64 if torch.float64 in (initial.dtype, final.dtype) else torch.float32
    scores = criterion(initial.flatten().cpu()[there].to(wide), final.flatten().cpu()[there].to(wide))
    if scores.shape != there.shape:
        raise ValueError(f"criterion: expected {len(there)} scores for layer {name!r}, got {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError(f"criterion: {name_of(criterion)!r} gave NaN for layer {name!r}; are its weights finite?")
    order = torch.randperm(len(there), generator=generator)  # among equals, the first of this order go
    chosen = keep_largest(scores[order], max(0, len(there) - remaining))
    keep = torch.zeros(size, dtype=torch.bool)
    keep[there[order[chosen]]] = True
    return keep.view(final.shape).to(final.device)


def _rank(values: Tensor) -> Tensor:
    """The place of each value in ascending order, from 0; float64, which holds any."""
    ranks = torch.empty(len(values), dtype=torch.float64, device=values.device)
    ranks[torch.argsort(values, stable=True)] = torch.arange(len(values), dtype=torch.float64, device=values.device)
    return ranks
