# SPDX-License-Identifier: Apache-2.0
"""When a sample leaves: entropy, largest probability, patience, or a learned mixture.

    logits of an exit ──float64──▶ score, larger where surer ──▶ leaves where score > cut
                                        └─ |score - cut| within rounding ──▶ "close": see `_walk.py`

Scores are on a logarithmic scale (log-odds, minus the logarithm of the entropy): there a rounding error of a logit
moves a score by about as much, however sure the network is, and thresholds near 0 or 1 lose no digits. Decisions
are made on the host in float64, a few microseconds for a sample: whether to run another
layer is for the host to say anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimtorch.dynamic._blocks import check_number


@dataclass(frozen=True)
class Decision:
    """Of n samples at one exit: ``leave`` and ``close`` bool [n]; ``memory`` [n, 2] for the next exit, or None.

    ``close``: the decision, or the answer of a sample that leaves, hangs on differences below the margin.
    """

    leave: np.ndarray
    close: np.ndarray
    memory: np.ndarray | None = None


class Criterion(nn.Module):
    """A score and a cut for each exit; what the criteria of this module have in common.

    Buffers stay float64 on the host, whatever the model is moved or cast to. A threshold that is no number is a
    TypeError; none, or one out of range, a ValueError.
    """

    cuts: Tensor  # [exits before the last], in the scale of the scores

    def __init__(self, threshold: float | Sequence[float]) -> None:
        super().__init__()
        given = list(threshold) if isinstance(threshold, Iterable) and not isinstance(threshold, str) else [threshold]
        if not given:
            raise ValueError("threshold: expected one or more, got none")
        for value in given:
            check_number("threshold", value)
        self._given = [self._cut(value) for value in given]
        self.register_buffer("cuts", torch.tensor(self._given, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> Criterion:
        return self

    def bind(self, exits: int) -> None:
        """One threshold for each of `exits` exits; of as many already they stay what they are.

        Raises:
            ValueError: another number of them was given, or it belongs to a network with another number.
        """
        if len(self._given) not in (1, exits):
            raise ValueError(f"threshold: expected one, or one for each of {exits} exits, got {len(self._given)}")
        if len(self.cuts) == exits:
            return
        if len(self.cuts) != 1:
            raise ValueError(
                f"criterion: has thresholds for {len(self.cuts)} exits before the last, expected a new one for {exits}"
            )
        self.cuts = torch.tensor(self._given * exits, dtype=torch.float64)

    @property
    def thresholds(self) -> list[float]:
        """One per exit before the last, in the unit of the constructor."""
        return [self._threshold(cut) for cut in self.cuts.tolist()]

    def _cut(self, threshold: float) -> float:
        raise NotImplementedError

    def _threshold(self, cut: float) -> float:
        raise NotImplementedError

    def score(self, exit: int, logits: np.ndarray) -> np.ndarray:
        """Float64 [n] of logits float64 [n, classes] of exit number `exit`: larger where surer."""
        raise NotImplementedError

    def decide(self, exit: int, logits: np.ndarray, memory: np.ndarray | None, margin: float) -> Decision:
        """Who of n samples leaves at an exit before the last; `logits` float64 [n, classes]."""
        score, cut = self.score(exit, logits), float(self.cuts[exit])
        leave = score > cut
        if not margin:
            return Decision(leave, np.zeros_like(leave))
        slack = margin * (1 + np.abs(logits).max(1))
        with np.errstate(invalid="ignore"):  # inf - inf: so sure that no rounding matters
            close = np.abs(score - cut) <= slack * self._steepness(exit)
        return Decision(leave, close | (leave & (gap(logits) <= slack)))

    def decide_one(self, exit: int, logits: list[float], memory: Any) -> tuple[bool, Any]:
        """Whether one sample leaves, and its memory: as `decide` with margin 0, in plain numbers.

        A batch of one waits for this; numpy would take longer than a small layer does.
        """
        return self.score_one(exit, logits) > self._cuts()[exit], None

    def _cuts(self) -> list[float]:
        cuts = self._buffers["cuts"]  # past the attribute look-up of modules: a batch of one waits
        return [] if cuts is None else cuts.tolist()

    def score_one(self, exit: int, logits: list[float]) -> float:
        """The score of one sample, as `score`."""
        return float(self.score(exit, np.array([logits]))[0])

    def _steepness(self, exit: int) -> float:
        """How much faster than logits the score may move."""
        return 1.0


def gap(logits: np.ndarray) -> np.ndarray:
    """Float64 [n]: the largest logit minus the second; inf with one class."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf)
    top = np.partition(logits, -2, axis=1)
    return np.asarray(top[:, -1] - top[:, -2])


def _others(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits minus the largest, and their exponentials with 0 for the largest itself: sums of these are exact."""
    best = logits.argmax(1)
    rows = np.arange(len(logits))
    shifted = logits - logits[rows, best][:, None]
    powers = np.exp(shifted)
    powers[rows, best] = 0
    return shifted, powers


class Entropy(Criterion):
    """Leaves where the entropy of the softmax is below a threshold (BranchyNet, Teerapittayanon et al., 1709.01686).

    Args:
        threshold: in nats, from 0 (nobody leaves) on; one for all exits, or one for each exit before the last.
    """

    def __init__(self, threshold: float | Sequence[float] = 0.3) -> None:
        super().__init__(threshold)

    def _cut(self, threshold: float) -> float:
        if not threshold >= 0:
            raise ValueError(f"threshold: expected an entropy in nats, 0 or more, got {threshold!r}")
        return -math.log(threshold) if threshold else math.inf

    def _threshold(self, cut: float) -> float:
        return math.exp(-cut) if cut > -700 else math.inf

    def score(self, exit: int, logits: np.ndarray) -> np.ndarray:
        return -_log_entropy(*_others(logits))

    def score_one(self, exit: int, logits: list[float]) -> float:
        best, rest, sum_, exp = max(logits), 0.0, 0.0, math.exp
        top = logits.index(best)
        for value in logits[:top] + logits[top + 1 :]:
            shifted = value - best
            power = exp(shifted)
            rest += power
            if power:
                sum_ += power * shifted
        entropy = math.log1p(rest) - sum_ / (1 + rest) if rest == rest else math.nan
        return -math.log(entropy) if entropy else math.inf


def _log_entropy(shifted: np.ndarray, powers: np.ndarray) -> np.ndarray:
    rest = powers.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.log1p(rest) - np.where(powers == 0, 0.0, powers * shifted).sum(1) / (1 + rest)
        return np.asarray(np.log(entropy))


class MaxProbability(Criterion):
    """Leaves where the largest probability of the softmax is above a threshold (MSDNet, Huang et al., 1703.09844).

    Args:
        threshold: in [0, 1], from 1 on nobody leaves; one for all exits, or one for each exit before the last.
    """

    def __init__(self, threshold: float | Sequence[float] = 0.9) -> None:
        super().__init__(threshold)

    def _cut(self, threshold: float) -> float:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a probability in [0, 1], got {threshold!r}")
        if threshold in (0, 1):
            return math.inf if threshold else -math.inf
        return math.log(threshold) - math.log1p(-threshold)

    def _threshold(self, cut: float) -> float:
        return 1 / (1 + math.exp(-cut)) if cut > -700 else 0.0

    def score(self, exit: int, logits: np.ndarray) -> np.ndarray:
        return _log_odds(_others(logits)[1])

    def score_one(self, exit: int, logits: list[float]) -> float:
        best = max(logits)
        top = logits.index(best)
        rest = sum(math.exp(value - best) for index, value in enumerate(logits) if index != top)
        return -math.log(rest) if rest else math.inf


def _log_odds(powers: np.ndarray) -> np.ndarray:
    """Of the largest probability; `powers` from `_others`."""
    with np.errstate(divide="ignore"):
        return np.asarray(-np.log(powers.sum(1)))


class Patience(Criterion):
    """Leaves once so many exits in a row gave the same answer as the one before (PABEE, Zhou et al., 2006.04152).

    Args:
        patience: exits that agree with the one before them, 1 or more; it takes one exit more than that.
    """

    def __init__(self, patience: int = 1) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int):
            raise TypeError(f"patience: expected an int, got {patience!r}")
        if patience < 1:
            raise ValueError(f"patience: expected 1 or more, got {patience}")
        super().__init__(patience)

    def _cut(self, threshold: float) -> float:
        return float(threshold)

    def _threshold(self, cut: float) -> float:
        return cut

    def decide(self, exit: int, logits: np.ndarray, memory: np.ndarray | None, margin: float) -> Decision:
        answer = np.where(np.isnan(logits).any(1), -1 - exit, logits.argmax(1))  # no answer, like no other
        count = np.zeros_like(answer) if memory is None else np.where(memory[:, 0] == answer, memory[:, 1] + 1, 0)
        leave = count >= float(self.cuts[exit])
        close = gap(logits) <= margin * (1 + np.abs(logits).max(1)) if margin else np.zeros_like(leave)
        return Decision(leave, close, np.stack((answer, count), 1))

    def decide_one(self, exit: int, logits: list[float], memory: Any) -> tuple[bool, Any]:
        answer = -1 - exit if any(value != value for value in logits) else logits.index(max(logits))
        count = memory[1] + 1 if memory is not None and memory[0] == answer else 0
        return count >= self._cuts()[exit], (answer, count)


class Learned(Criterion):
    """Leaves where a logistic regression believes in the answer: fitted for each exit by `EarlyExit.calibrate_`.

    Its inputs are the log-odds of the largest probability, minus the logarithm of the entropy, and the gap between the
    two largest logits; it learns whether the exit's answer is the right one. Until then it is the log-odds alone.

    Args:
        threshold: probability, in [0, 1], that the answer is right; one for all exits, or one for each before the last.
    """

    weights: Tensor  # [exits before the last, 4], the bias last

    _FEATURES = 3

    def __init__(self, threshold: float | Sequence[float] = 0.9) -> None:
        super().__init__(threshold)
        self.register_buffer("weights", torch.zeros(0, self._FEATURES + 1, dtype=torch.float64))

    def bind(self, exits: int) -> None:
        super().bind(exits)
        if len(self.weights) != exits:
            self.weights = torch.zeros(exits, self._FEATURES + 1, dtype=torch.float64)
            self.weights[:, 0] = 1

    def _cut(self, threshold: float) -> float:
        return MaxProbability._cut(self, threshold)  # type: ignore[arg-type]  # the same scale

    def _threshold(self, cut: float) -> float:
        return MaxProbability._threshold(self, cut)  # type: ignore[arg-type]

    def _features(self, logits: np.ndarray) -> np.ndarray:
        shifted, powers = _others(logits)
        columns = (_log_odds(powers), -_log_entropy(shifted, powers), gap(logits))
        return np.minimum(np.stack(columns, 1), 50.0)  # as good as certain; the regression wants finite numbers

    def score(self, exit: int, logits: np.ndarray) -> np.ndarray:
        weights = self.weights[exit].numpy()
        return np.asarray(self._features(logits) @ weights[:-1] + weights[-1])

    def _steepness(self, exit: int) -> float:
        return float(self.weights[exit].abs().sum())

    def fit_(self, exit: int, logits: np.ndarray, labels: np.ndarray) -> None:
        """Fit one exit's regression: logits float64 [n, classes], labels int [n]; Newton's method with a ridge.

        Of logits that are not finite nothing is learned.
        """
        known = np.isfinite(logits).all(1)
        logits, labels = logits[known], labels[known]
        if not len(labels):
            return
        right = (logits.argmax(1) == labels).astype(np.float64)
        features = np.concatenate((self._features(logits), np.ones((len(labels), 1))), 1)
        scale = np.maximum(np.abs(features).max(0), 1e-9)
        x, weights = features / scale, np.zeros(features.shape[1])
        ridge = np.diag([1e-2] * (x.shape[1] - 1) + [1e-6])  # an exit that is always right has no finite fit
        for _ in range(50):
            p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
            gradient = x.T @ (p - right) + ridge @ weights
            step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, gradient)
            weights -= step * min(1.0, 5 / max(1e-12, float(np.abs(step).max())))
            if float(np.abs(step).max()) < 1e-8:
                break
        self.weights[exit] = torch.from_numpy(weights / scale)
