# SPDX-License-Identifier: Apache-2.0
"""What a model is worth, as one number: shared by every search that tries a change and looks at what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slimtorch.measure import eval_mode

Loss = Callable[..., Tensor]
"""`loss_fn(output, *targets) -> scalar tensor`."""

Measure = Callable[[nn.Module], float] | tuple[Iterable[Any], Loss]
"""`measure(model) -> number`, or `(data, loss_fn)`: batches `inputs` or `(inputs, *targets)`, read once for every
measurement, and the mean over batches of `loss_fn(output, *targets)` in eval mode."""


def number_of(measure: Measure) -> Callable[[nn.Module], float]:
    """A function that measures a model.

    Raises (the function, for a pair):
        ValueError: no batch, or fewer or more of them than the data has by its own word or had the first time.

    Raises:
        TypeError: `measure` is neither a callable nor such a pair.
    """
    if not isinstance(measure, tuple):
        if not callable(measure):
            raise TypeError(f"measure: expected a callable model -> number or a pair (data, loss_fn), got {measure!r}")
        return lambda model: float(measure(model))
    if len(measure) != 2 or not callable(measure[1]):
        raise TypeError("measure: expected a callable model -> number or a pair (data, loss_fn)")
    from slimtorch.prune.importance import call, usable  # here: that package's searches import this module

    data, loss = measure
    if isinstance(data, Iterator):
        data = list(data)  # it is read many times
    expected: list[int] = []

    def run(model: nn.Module) -> float:
        values: list[float] = []
        with eval_mode(model), torch.no_grad():
            for batch in data:
                inputs, *targets = batch if isinstance(batch, (tuple, list)) else (batch,)
                values.append(float(loss(call(model, usable(inputs)), *targets)))
        if not values:
            raise ValueError("measure: expected at least one batch, got none")
        if not expected:
            expected.append(_length(data) or len(values))
        if len(values) != expected[0]:
            raise ValueError(f"measure: expected {expected[0]} batches of the data, got {len(values)}")
        return sum(values) / len(values)

    return run


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return None


def finite(value: float, where: str) -> float:
    """`value`; ValueError, which says `where`, if it is NaN or infinite."""
    if not math.isfinite(value):
        raise ValueError(f"measure: expected a finite number {where}, got {value}")
    return value
