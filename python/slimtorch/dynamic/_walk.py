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
"""By dtype, relative to 1 + the largest logit: far above what the number of rows changes. Of the dtypes of the logits
and of all states before them the coarsest counts: what a layer has rounded stays rounded in a head of float32."""


@dataclass
class Walk:
    """What came of a batch of n: logits [n, classes], exits int64 [n], numbers from 0.

    ``again``: sample that was run again, alone → the exit up to which it had come with the batch.
    """

    logits: Tensor
    exits: np.ndarray
    again: dict[int, int] = field(default_factory=dict)


def first_of(state: State) -> Tensor:
    """The first tensor of a state; TypeError where there is none."""
    while not isinstance(state, Tensor):
        if not isinstance(state, (tuple, list)) or not state:
            raise _no_state(state)
        state = state[0]
    return state


def rows_of(state: State, index: Tensor, count: int) -> State:
    """The same state of `count` samples for these of them only."""
    if isinstance(state, Tensor):
        if not state.dim() or state.shape[0] != count:
            raise ValueError(f"state: expected {count} rows in every tensor, got {list(state.shape)}")
        return state.index_select(0, index.to(state.device))
    if not isinstance(state, (tuple, list)):
        raise _no_state(state)
    parts = [rows_of(part, index, count) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def _no_state(state: object) -> TypeError:
    return TypeError(f"state: expected tensors, or tuples or lists of them, got {type(state).__name__}")


def laid_out(x: Tensor) -> Tensor:
    """The same values as in memory of their own: without gaps, and where the allocator would have put them.

    Matrix products begin at a boundary of vectors; at another place in memory the same sum may round otherwise.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 64 else x


def host(logits: Tensor) -> np.ndarray:
    """Logits as float64 on the host."""
    return logits.detach().to("cpu", torch.float64).numpy()


def check_logits(logits: object, count: int, exit: int, classes: int | None) -> int:
    """The classes of logits [count, classes], with None any number from 1 on; TypeError, ValueError for all else."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"exit {exit}: expected a tensor of logits, got {type(logits).__name__}")
    shape = logits.shape
    if len(shape) != 2 or shape[0] != count or not shape[1]:
        raise ValueError(f"exit {exit}: expected logits [{count}, classes], got {list(shape)}")
    if classes is not None and shape[1] != classes:
        raise ValueError(f"exit {exit}: expected {classes} classes like the exits before, got {shape[1]}")
    return int(shape[1])


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
            Nobody is run a second time then.
    """
    count, last = len(first_of(x)), len(segments) - 1
    if count == 1:
        logits, exit = walk_one(segments, x, criterion, proceed)
        return Walk(logits, np.array([exit]))
    if proceed is not None:
        margin = 0.0
    elif count and margin == float("inf"):
        return _alone(segments, x, criterion, range(count), count)
    coarsest, classes = 0.0, None
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
            if margin is None:
                coarsest = max(coarsest, MARGINS.get(first_of(state).dtype, 0.0))
        classes = check_logits(logits, here, number, classes)
        bound = max(coarsest, MARGINS.get(logits.dtype, 1e-4)) if margin is None else margin
        gone = np.full(here, number == last or not here)
        close = np.zeros_like(gone)
        if number == last:
            if bound and here:
                values = host(logits)
                close = gap(values) <= bound * (1 + np.abs(values).max(1))
        elif criterion is not None and here:
            decision = criterion.decide(number, host(logits), memory, bound)
            gone, close, memory = decision.leave | decision.close, decision.close, decision.memory
        leaving = np.flatnonzero(gone)
        if proceed is not None and len(leaving) < here and not proceed(number + 1, here - len(leaving)):
            leaving = np.arange(here)
        if not len(leaving) and here:
            continue
        numbers = leaving if active is None else active[leaving]
        exits[numbers] = number
        again |= dict.fromkeys(numbers[close[leaving]].tolist(), number)
        if len(leaving) == here:
            pieces.append((active, logits))
            break
        staying = np.flatnonzero(~gone)
        pieces.append((numbers, logits.index_select(0, torch.from_numpy(leaving).to(logits.device))))
        state = rows_of(state, torch.from_numpy(staying), here)
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
    repeated = _alone(segments, x, criterion, list(again), count)
    index = torch.tensor(list(again))
    exits[list(again)] = repeated.exits
    return Walk(logits.index_copy(0, index.to(logits.device), repeated.logits), exits, again)


def walk_one(
    segments: Sequence[Callable[[State], Any]],
    x: State,
    criterion: Criterion | None,
    proceed: Callable[[int, int], bool] | None = None,
) -> tuple[Tensor, int]:
    """Logits [1, classes] and exit of a batch of one: nothing to gather, nothing to sort.

    The input is laid out like any other, whatever batch it is a row of, because kernels round by that too.
    """
    state = laid_out(x) if isinstance(x, Tensor) else rows_of(x, torch.tensor([0]), 1)  # gathered rows are new memory
    memory, classes, last = None, None, len(segments) - 1
    for number in range(last):
        state, logits = segments[number](state)
        classes = check_logits(logits, 1, number, classes)
        if criterion is not None:
            leaves, memory = criterion.decide_one(number, logits.tolist()[0], memory)
            if leaves:
                return logits, number
        if proceed is not None and not proceed(number + 1, 1):
            return logits, number
    logits = segments[last](state)
    check_logits(logits, 1, last, classes)
    return logits, last


def _alone(
    segments: Sequence[Callable[[State], Any]],
    x: State,
    criterion: Criterion | None,
    numbers: Sequence[int],
    count: int,
) -> Walk:
    """These of `count` samples, each as a batch of one."""
    walks = [walk_one(segments, rows_of(x, torch.tensor([number]), count), criterion) for number in numbers]
    return Walk(torch.cat([logits for logits, _ in walks]), np.array([exit for _, exit in walks], dtype=np.int64))
