# SPDX-License-Identifier: Apache-2.0
"""Thresholds from validation data: how many leave where, for an accuracy or for a budget.

After MSDNet (Huang et al., 1703.09844, section 4.2): of those that arrive anywhere, a fixed share 1 - q leaves, so that
exit k gets a share proportional to q^k of all samples. A large q sends everybody on. For one q the thresholds follow
from the scores, exit by exit: the surest leave. What they really do on the data is then counted, and the best q kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slimtorch.dynamic.criteria import Criterion, Learned, Patience
from slimtorch.report import Table

_RATIOS = np.exp(np.linspace(-7, 7, 141))  # q: from nearly all at the first exit to nearly all at the last


@dataclass(frozen=True)
class Option:
    """One setting of thresholds and what it does on the validation data.

    Attributes:
        thresholds: one per exit before the last, in the criterion's unit.
        accuracy: share right in [0, 1].
        macs: mean multiply-accumulates per sample.
        leaving: share of all samples that leaves at each exit, the last included.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    macs: float
    leaving: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What `EarlyExit.calibrate_` chose, of which ``options`` (cheapest first)."""

    points: tuple[str, ...]
    chosen: Option
    options: tuple[Option, ...]
    samples: int

    def table(self) -> Table:
        rows: list[list[object]] = []
        for index, share in enumerate(self.chosen.leaving):
            last = index == len(self.points)
            threshold = None if last else self.chosen.thresholds[index]
            rows.append(["(last)" if last else self.points[index], threshold, f"{share:.1%}"])
        notes = [
            f"on {self.samples:,} validation samples: accuracy {self.chosen.accuracy:.2%}, "
            f"{self.chosen.macs:,.0f} MACs per sample"
        ]
        return Table("Exits", ["exit", "threshold", "leaving"], rows, notes)

    def __str__(self) -> str:
        return str(self.table())


def exits_of(criterion: Criterion, logits: Sequence[np.ndarray]) -> np.ndarray:
    """Where each of n samples leaves, int64 [n]; logits float64 [n, classes] of every exit."""
    exits = np.full(len(logits[-1]), len(logits) - 1, dtype=np.int64)
    active = np.arange(len(exits))
    memory: np.ndarray | None = None
    for number, values in enumerate(logits[:-1]):
        decision = criterion.decide(number, values[active], memory, 0.0)
        exits[active[decision.leave]] = number
        memory = None if decision.memory is None else decision.memory[~decision.leave]
        active = active[~decision.leave]
    return exits


def calibrate(
    criterion: Criterion,
    points: Sequence[str],
    logits: Sequence[np.ndarray],
    labels: np.ndarray,
    cost: Sequence[int],
    accuracy: float | None,
    macs: float | None,
) -> Calibration:
    """Set the cuts of `criterion`; arguments and errors as of `EarlyExit.calibrate_`.

    Args:
        logits: float64 [n, classes] of every exit, the last included.
        labels: int [n].
        cost: MACs until each exit.
    """
    before = [buffer.clone() for buffer in criterion.buffers()]
    right = np.stack([values.argmax(1) == labels for values in logits])
    found: list[tuple[Option, list[float]]] = []
    try:
        if isinstance(criterion, Learned):
            for number, values in enumerate(logits[:-1]):
                criterion.fit_(number, values, labels)
        for cuts in _candidates(criterion, logits):
            criterion.cuts.copy_(torch.tensor(cuts, dtype=torch.float64))
            exits = exits_of(criterion, logits)
            leaving = np.bincount(exits, minlength=len(logits)) / len(labels)
            share = float(right[exits, np.arange(len(labels))].mean())
            spent = float(np.asarray(cost)[exits].mean())
            found.append((Option(tuple(criterion.thresholds), share, spent, tuple(leaving.tolist())), cuts))
        option, cuts = _choose(found, accuracy, macs)
    except BaseException:
        for buffer, value in zip(criterion.buffers(), before, strict=True):
            buffer.copy_(value)
        raise
    criterion.cuts.copy_(torch.tensor(cuts, dtype=torch.float64))
    options = sorted((each for each, _ in found), key=lambda each: (each.macs, -each.accuracy))
    return Calibration(tuple(points), option, tuple(dict.fromkeys(options)), len(labels))


def _candidates(criterion: Criterion, logits: Sequence[np.ndarray]) -> list[list[float]]:
    """Cuts to try: nobody leaves, everybody leaves at once, and all between."""
    exits = len(logits) - 1
    if isinstance(criterion, Patience):
        return [[float(patience)] * exits for patience in range(1, exits + 1)]
    scores = [criterion.score(number, values) for number, values in enumerate(logits[:-1])]
    scores = [np.where(np.isnan(score), -np.inf, score) for score in scores]  # they never leave
    never, always = [math.inf] * exits, [-math.inf] * exits
    return [never, always, *(_geometric(scores, float(q)) for q in _RATIOS)]


def _geometric(scores: Sequence[np.ndarray], q: float) -> list[float]:
    """Cuts that let a share proportional to q^k of all samples leave at exit k, the surest of those that are there."""
    count = len(scores[0])
    shares = q ** np.arange(len(scores) + 1)
    wanted = np.cumsum(shares / shares.sum()) * count
    active = np.arange(count)
    cuts = []
    for number, score in enumerate(scores):
        here = np.sort(score[active])[::-1]
        leave = min(max(0, round(wanted[number]) - (count - len(active))), len(active))
        if not leave:
            cuts.append(math.inf)
            continue
        low = here[leave] if leave < len(here) else here[-1] - 1
        middle = 0.5 * (here[leave - 1] + low)
        cuts.append(float(middle) if math.isfinite(middle) else float(low))
        active = active[score[active] <= cuts[-1]]
    return cuts


def _choose(
    found: Sequence[tuple[Option, list[float]]], accuracy: float | None, macs: float | None
) -> tuple[Option, list[float]]:
    if accuracy is not None:
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy: expected a share in [0, 1], got {accuracy!r}")
        good = [each for each in found if each[0].accuracy >= accuracy]
        if not good:
            best = max(option.accuracy for option, _ in found)
            raise ValueError(f"accuracy: expected at most {best:.4f}, the best of these exits here, got {accuracy}")
        return min(good, key=lambda each: (each[0].macs, -each[0].accuracy))
    assert macs is not None
    cheap = [each for each in found if each[0].macs <= macs]
    if not cheap:
        least = min(option.macs for option, _ in found)
        raise ValueError(f"macs: expected at least {least:,.6g} per sample, the least of these exits, got {macs:,.6g}")
    return max(cheap, key=lambda each: (each[0].accuracy, -each[0].macs))
