# SPDX-License-Identifier: Apache-2.0
"""A batch on its way through segments: who is sure leaves, the others go on, results come back in order.

    8 samples ──segment 0──▶ exit ──5 go on──▶ segment 1 ──▶ exit ──1 goes on──▶ segment 2 ──▶ last exit
                              3 leave                          4 leave

*The batch must not decide.* Matrix products round differently for different numbers of rows, so that the last bits of a
logit depend on the batch, and with them a decision that hangs on these bits. No margin added to a threshold mends that:
it moves the place where decisions flip. Here a sample whose decision or answer is closer than the margin leaves the
batch and is run again, alone, from the start. What comes out is what a batch of one gives, always: far from a threshold
because rounding cannot reach it, close to one because it *was* a batch of one. Few samples are: it costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimtorch.dynamic.criteria import Criterion, gap

State = Any
"""What goes from one segment to the next: a tensor with the batch first, or a tuple or list of such."""

MARGINS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""By dtype of the logits, relative to 1 + the largest logit: far above what the number of rows changes."""


@dataclass
class Walk:
    """What came of a batch of n: logits [n, classes], exits int64 [n], numbers from 0.

    ``again``: sample that was run again, alone → the exit up to which it had come with the batch.
    """

    logits: Tensor
    exits: np.ndarray
    again: dict[int, int] = field(default_factory=dict)


def rows_of(state: State, index: Tensor) -> State:
    """The same state for these samples only."""
    if isinstance(state, Tensor):
        return state.index_select(0, index.to(state.device))
    return type(state)(rows_of(part, index) for part in state)


def host(logits: Tensor) -> np.ndarray:
    """Logits as float64 on the host."""
    return logits.detach().to("cpu", torch.float64).numpy()


def walk(
    segments: Sequence[Callable[[State], Any]],
    x: State,
    criterion: Criterion | None,
    margin: float | None,
    proceed: Callable[[int, int], bool] | None = None,
) -> Walk:
    """Run a batch.

    Args:
        segments: each gives (state, logits), the last one logits.
        x: the input, batch first.
        criterion: None: nobody leaves before the last exit.
        margin: see above; None: by dtype. 0 trusts the batch, inf runs every sample alone.
        proceed: ``proceed(number of the next segment, samples left)``: False stops everybody at the exit just reached.
    """
    first = x
    while not isinstance(first, Tensor):
        first = first[0]
    count, last = len(first), len(segments) - 1
    if count > 1 and margin == float("inf"):
        return _alone(segments, x, criterion, range(count))
    if count == 1:
        return _walk_one(segments, x, criterion, proceed)
    active: np.ndarray | None = None  # numbers of the samples still here; None: all
    memory: np.ndarray | None = None
    pieces: list[tuple[np.ndarray | None, Tensor]] = []
    exits = np.full(count, last, dtype=np.int64)
    again: dict[int, int] = {}
    state = x
    for number, segment in enumerate(segments):
        here = count if active is None else len(active)
        if number == last:
            logits = segment(state)
        else:
            state, logits = segment(state)
        bound = MARGINS.get(logits.dtype, 1e-4) if margin is None else margin
        ends = number == last or (proceed is not None and not proceed(number + 1, here))
        if ends or not here:
            if bound and here:
                values = host(logits)
                close = gap(values) <= bound * (1 + np.abs(values).max(1))
                if close.any() and proceed is None:
                    who = np.flatnonzero(close) if active is None else active[close]
                    again |= dict.fromkeys(who.tolist(), number)
            if number != last:
                exits[slice(None) if active is None else active] = number
            pieces.append((active, logits))
            break
        if criterion is None:
            continue
        values = host(logits)
        decision = criterion.decide(number, values, memory, bound)
        gone = decision.leave
        if bound and proceed is None:
            gone = gone | decision.close
        memory = decision.memory
        if not gone.any():
            continue
        leaving = np.flatnonzero(gone)
        numbers = leaving if active is None else active[leaving]
        exits[numbers] = number
        if bound and proceed is None:
            again |= dict.fromkeys(numbers[decision.close[leaving]].tolist(), number)
        if len(leaving) == here:
            pieces.append((active, logits))
            break
        staying = np.flatnonzero(~gone)
        pieces.append((numbers, logits.index_select(0, torch.from_numpy(leaving).to(logits.device))))
        state = rows_of(state, torch.from_numpy(staying))
        active = staying if active is None else active[staying]
        memory = None if memory is None else memory[staying]
    if pieces[0][0] is None:
        logits = pieces[0][1]
    else:
        order = torch.from_numpy(np.argsort(np.concatenate([numbers for numbers, _ in pieces]), kind="stable"))
        joined = torch.cat([part for _, part in pieces])
        logits = joined.index_select(0, order.to(joined.device))
    if not again:
        return Walk(logits, exits)
    repeated = _alone(segments, x, criterion, list(again))
    index = torch.tensor(list(again))
    exits[list(again)] = repeated.exits
    return Walk(logits.index_copy(0, index.to(logits.device), repeated.logits), exits, again)


def _walk_one(
    segments: Sequence[Callable[[State], Any]], x: State, criterion: Criterion | None,
    proceed: Callable[[int, int], bool] | None,
) -> Walk:  # fmt: skip
    """A batch of one: nothing to gather, nothing to sort."""
    state, memory, last = x, None, len(segments) - 1
    for number, segment in enumerate(segments[:-1]):
        state, logits = segment(state)
        if proceed is not None and not proceed(number + 1, 1):
            return Walk(logits, np.array([number]))
        if criterion is not None:
            leaves, memory = criterion.decide_one(number, logits.detach()[0].tolist(), memory)
            if leaves:
                return Walk(logits, np.array([number]))
    return Walk(segments[last](state), np.array([last]))


def _alone(
    segments: Sequence[Callable[[State], Any]], x: State, criterion: Criterion | None, numbers: Sequence[int]
) -> Walk:
    """These samples, each as a batch of one."""
    walks = [walk(segments, rows_of(x, torch.tensor([number])), criterion, 0.0) for number in numbers]
    return Walk(torch.cat([single.logits for single in walks]), np.concatenate([single.exits for single in walks]))
