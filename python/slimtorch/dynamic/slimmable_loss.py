# SPDX-License-Identifier: Apache-2.0
"""Training all widths at once: the sandwich rule, and narrow networks that learn from the whole one on the way.

Yu & Huang, "Universally Slimmable Networks" (arXiv 1903.05134). Sandwich rule (section 3.2): each step runs the whole
network, the narrowest one and some between, and adds their gradients. In-place distillation (section 3.4): the whole
network learns from the labels, all others from its outputs of this very step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.distill import soft_target_loss
from slimtorch.dynamic.slimmable import _slimmable, at_width
from slimtorch.prune.importance import call

Loss = Callable[[Tensor, Tensor], Tensor]


def sandwich_widths(
    model: nn.Module, samples: int | None = None, generator: torch.Generator | None = None
) -> tuple[float, ...]:
    """The widths of one step: 1 first, the smallest last, others between.

    Args:
        model: slimmable.
        samples: random widths between: of a universal model from a uniform distribution, of another one drawn without
            replacement from its own. None: 2 (the paper's) of a universal one, all of another.
        generator: of the draws, on the CPU; None takes torch's own.

    Raises:
        TypeError, ValueError: `samples` is no int >= 0.
    """
    layer = _slimmable(model)[0]
    if samples is not None:
        if isinstance(samples, bool) or not isinstance(samples, int):
            raise TypeError(f"samples: expected an int or None, got {samples!r}")
        if samples < 0:
            raise ValueError(f"samples: expected at least 0, got {samples}")
    least, between = layer.widths[0], layer.widths[1:-1]
    if layer.universal and least < 1:
        drawn = torch.rand(2 if samples is None else samples, generator=generator, dtype=torch.float64)
        between = tuple(least + (1 - least) * value for value in drawn.tolist())
    elif samples is not None:
        order = torch.randperm(len(between), generator=generator)[:samples].tolist()
        between = tuple(between[i] for i in order)
    return (1.0, *sorted(between, reverse=True), *((least,) if least < 1 else ()))


def slimmable_loss(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    loss_fn: Loss = F.cross_entropy,
    distill: bool = True,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of several widths, to be differentiated at once.

    Holds the activations of all of them; `sandwich_step` those of one at a time. The model's width is as before
    afterwards.

    Args:
        model: slimmable, in training mode; gives logits ``[batch, classes]``.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        labels: of `loss_fn`.
        loss_fn: `loss_fn(logits, labels) -> scalar`.
        distill: other widths than 1 learn from the whole network's softmax (their cross-entropy with it, up to a
            constant) instead of the labels.
        samples, generator: see `sandwich_widths`.

    Returns:
        (scalar, logits of the whole network).
    """
    total: Tensor | None = None
    logits: Tensor | None = None
    for _, loss, own in _terms(model, inputs, labels, loss_fn, distill, sandwich_widths(model, samples, generator)):
        total = loss if total is None else total + loss
        logits = own if logits is None else logits
    assert total is not None
    assert logits is not None
    return total, logits


def sandwich_step(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    loss_fn: Loss = F.cross_entropy,
    distill: bool = True,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> dict[float, Tensor]:
    """Forward and backward of one width after the other; gradients add up, the optimizer is the caller's.

    Args: as `slimmable_loss`, and
        backward: called with each loss (``lambda loss: scaler.scale(loss).backward()`` for a gradient scaler).

    Returns:
        Width → its loss, detached, in the order of the run.
    """
    losses: dict[float, Tensor] = {}
    for width, loss, _ in _terms(model, inputs, labels, loss_fn, distill, sandwich_widths(model, samples, generator)):
        backward(loss)
        losses[width] = loss.detach()
    return losses


def _terms(
    model: nn.Module, inputs: Any, labels: Tensor, loss_fn: Loss, distill: bool, widths: Sequence[float]
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """(width, loss, logits), the whole network first."""
    teacher: Tensor | None = None
    for width in widths:
        with at_width(model, width):
            logits = call(model, inputs)
        if distill and teacher is not None:
            loss = soft_target_loss(logits, teacher, 1.0)
        else:
            loss = loss_fn(logits, labels)
        teacher = logits.detach() if teacher is None else teacher
        yield width, loss, logits
