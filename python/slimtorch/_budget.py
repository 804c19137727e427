# SPDX-License-Identifier: Apache-2.0
"""One choice for each layer, so that costs fit a budget and the loss added is least: a knapsack of choices.

    layer 1  {dense, 50 %, 90 %, …} ─┐
    layer 2  {dense, 50 %, 90 %, …} ─┼─▶ all (cost, loss) of the layers so far that no other beats in both ─▶ the best
    layer 3  …                      ─┘                                                                       that fits
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CELLS = 5_000
"""The budget in cells. Of several beginnings that cost the same cell only the one of least loss is followed."""


def least_loss(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The index of one option per layer: the least sum of losses whose sum of costs is within the budget.

    Dynamic programming over layers, on the Pareto front of (sum of costs, sum of losses). It is exact as long as a
    front has no more than `CELLS` points; beyond that the answer is at least as good as the best one for a budget
    smaller by `layers / CELLS`. Of equal losses the cheaper one is taken.

    Args:
        costs: per layer, one per option, finite and >= 0.
        losses: the same shape, finite.
        budget: of the sum of costs.

    Raises:
        ValueError: even the cheapest options exceed the budget; the message has the least that can be reached.
    """
    least = sum(min(options) for options in costs)
    budget = float(budget)
    allowed = budget * (1 + 1e-12)  # sums in another order may differ in the last bit
    if least > allowed:
        raise ValueError(f"budget: expected at least {least:.6g}, the least that can be reached, got {budget:.6g}")
    # What the layers still to come need at least: a beginning that leaves them less is no beginning.
    needed = np.cumsum([0.0, *(min(options) for options in reversed(costs))])[::-1]
    total, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # per layer: where each state comes from, its option
    for index, (cost, added) in enumerate(zip(costs, losses, strict=True)):
        totals = (total[:, None] + np.asarray(cost, dtype=float)).reshape(-1)
        sums = (loss[:, None] + np.asarray(added, dtype=float)).reshape(-1)
        fits = np.flatnonzero(totals + needed[index + 1] <= allowed)
        if not len(fits):  # rounding of the sums: the cheapest way on is within the budget by the check above
            fits = np.array([int(np.argmin(totals))])
        kept = fits[_front(totals[fits], sums[fits])]
        if len(kept) > CELLS:
            kept = kept[_thin(totals[kept], sums[kept], budget)]
        steps.append((kept // len(cost), kept % len(cost)))
        total, loss = totals[kept], sums[kept]
    at = int(np.argmin(loss))
    chosen: list[int] = []
    for parents, options in reversed(steps):
        chosen.append(int(options[at]))
        at = int(parents[at])
    return chosen[::-1]


def _front(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats in cost and loss; cheapest first, losses falling."""
    order = np.lexsort((losses, costs))
    sorted_losses = losses[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(sorted_losses)[:-1]))
    return order[sorted_losses < before]


def _thin(costs: np.ndarray, losses: np.ndarray, budget: float) -> np.ndarray:
    """Of a front, per cell of the budget the point of least loss, which is the last; and the cheapest of all."""
    cells = np.floor(costs * (CELLS / budget))
    last = np.append(cells[1:] != cells[:-1], True)
    last[0] = True
    return np.flatnonzero(last)
