# SPDX-License-Identifier: Apache-2.0
"""The training loop of the experiments: batches in an order that the seed decides, validation on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from slimtorch.data import Digits, Split
from slimtorch.measure import eval_mode


class Diverged(ValueError):
    """A training loss that is not finite; ``step`` says when."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"training diverged: the loss of step {step} is {loss}; lower the learning rate")
        self.step, self.loss = step, loss

    def __reduce__(self) -> tuple[type[Diverged], tuple[int, float]]:
        return Diverged, (self.step, self.loss)  # processes hand it on


@dataclass
class Curve:
    """Validation on the way: after ``steps[i]`` steps a mean cross-entropy ``loss[i]`` and a share right,
    ``accuracy[i]`` in [0, 1]."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def batches(split: Split, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, all of one size; every epoch in another order, which only the seed decides.

    Args:
        split: what to train on; the last images of an order that fill no batch are left out.
        batch_size: images in a batch, at most all of them.
        seed: the same batches for every method of a seed.
        start: batches to leave out: training goes on where another one was at that step.
    """
    return islice(draw(split, batch_size, order_of(seed)), start, None)


def order_of(seed: int) -> torch.Generator:
    """Of the order of batches."""
    return torch.Generator().manual_seed(7000 + seed)


def draw(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """As `batches`, in the orders that a generator gives from where it stands."""
    size = min(batch_size, len(split))
    while True:
        order = torch.randperm(len(split), generator=generator)
        for batch in order[: len(split) // size * size].split(size):
            yield split.images[batch], split.labels[batch]


def fit(
    model: nn.Module,
    data: Digits,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    start: int = 0,
    schedule: LRScheduler | None = None,
    penalty: Callable[[], Tensor] | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    after_step: Callable[[], object] | None = None,
    every: int | None = None,
) -> Curve:
    """Trains in place, for steps ``start`` to ``steps``; the model is left in train mode.

    Args:
        model: gives logits.
        data: batches come from ``train``, the curve from ``validation``.
        optimizer: of the model.
        steps: at which training is over, counted from 0; ``steps - start`` are made.
        batch_size, seed, start: see `batches`.
        schedule: stepped after each step.
        penalty: added to the loss.
        loss_fn: of logits and labels.
        after_step: called after each step.
        every: steps between validations, the first before the first step; the last is always there. None: none.

    Raises:
        Diverged: a loss is not finite.
    """
    curve = Curve()

    def look(step: int) -> None:
        loss, accuracy = evaluate(model, data.validation)
        curve.steps.append(step)
        curve.loss.append(loss)
        curve.accuracy.append(accuracy)

    model.train()
    for step, (images, labels) in enumerate(islice(batches(data.train, batch_size, seed, start), steps - start), start):
        if every is not None and (step - start) % every == 0:
            look(step)
        train_step(model, optimizer, images, labels, step, penalty, loss_fn)
        if schedule is not None:
            schedule.step()
        if after_step is not None:
            after_step()
    if every is not None:
        look(steps)
    return curve


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    step: int,
    penalty: Callable[[], Tensor] | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> float:
    """One step on one batch; its loss. Diverged, with the number ``step``, where that is not finite."""
    loss = loss_fn(model(images), labels)
    if penalty is not None:
        loss = loss + penalty()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise Diverged(step, value)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value


def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """(mean cross-entropy, share right in [0, 1]) in eval mode; the model is then as it was."""
    loss = right = 0.0
    with eval_mode(model), torch.no_grad():
        for images, labels in zip(split.images.split(250), split.labels.split(250), strict=True):
            logits = model(images)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
    return loss / len(split), right / len(split)
