# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing: contenders take turns in every round, so that clock drift and noisy neighbours hit all alike.

A sample is many calls, long enough to be well above the clock's resolution, and follows one call that is not timed: the
contender before it has just filled the caches with its own weights.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Role = Literal["ours", "dense", "dense-fp32", "sparse", "peer"]

_MAX_CALLS = 100_000


@dataclass(frozen=True)
class Contender:
    """Something that computes a problem.

    `role`: "ours"; "dense" (a dense kernel in the problem's dtype); "dense-fp32" (a float32 one where the problem is
    in another dtype); "sparse" (a sparse kernel of torch); "peer" (another engine). `result()` gives the output as a
    tensor; `sample(calls)` computes `calls` times and returns the seconds that took, conversions of activations
    included.
    """

    name: str
    role: Role
    what: str
    result: Callable[[], torch.Tensor]
    sample: Callable[[int], float]


def local(name: str, role: Role, what: str, call: Callable[[], torch.Tensor]) -> Contender:
    """A contender that runs in this process."""

    def sample(calls: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - begin) * 1e-9

    return Contender(name, role, what, call, sample)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender: median and spread over `samples` samples of `calls` calls each."""

    contender: str
    role: Role
    what: str
    median: float
    p10: float
    p90: float
    minimum: float
    samples: int
    calls: int
    error: float  # largest deviation from the float64 reference, relative to the reference's largest value


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between order statistics; `fraction` in [0, 1], `values` not empty."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Settings:
    """How long to measure: `rounds` samples for each contender, each at least `sample_seconds` long."""

    rounds: int = 15
    sample_seconds: float = 5e-3
    pause_seconds: float = 0.0  # before each sample: lets another contender's spinning threads fall asleep

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")
        if not self.sample_seconds > 0:
            raise ValueError(f"sample_seconds: expected a positive number, got {self.sample_seconds}")


def _calibrate(contender: Contender, sample_seconds: float) -> int:
    """Calls per sample so that a sample lasts `sample_seconds`; warms the contender up while finding out."""
    contender.sample(2)
    calls = 1
    while (elapsed := contender.sample(calls)) < sample_seconds / 4 and calls < _MAX_CALLS:
        calls *= 2
    return max(1, min(_MAX_CALLS, math.ceil(calls * sample_seconds / elapsed)))


def interleave(contenders: Sequence[Contender], settings: Settings, errors: Sequence[float]) -> list[Timing]:
    """Time `contenders` in turns; `errors[i]` is what :func:`verify` found for contender i and goes into its Timing."""
    calls = [_calibrate(contender, settings.sample_seconds) for contender in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(settings.rounds):
            for place in range(len(contenders)):
                index = (turn + place) % len(contenders)  # nobody always follows the same neighbour into a new round
                if settings.pause_seconds:
                    time.sleep(settings.pause_seconds)
                contenders[index].sample(1)
                seconds[index].append(contenders[index].sample(calls[index]) / calls[index])
    finally:
        if collecting:
            gc.enable()
    return [
        Timing(
            contender=contender.name,
            role=contender.role,
            what=contender.what,
            median=statistics.median(taken),
            p10=percentile(taken, 0.1),
            p90=percentile(taken, 0.9),
            minimum=min(taken),
            samples=len(taken),
            calls=count,
            error=error,
        )
        for contender, taken, count, error in zip(contenders, seconds, calls, errors, strict=True)
    ]


class WrongResultError(ValueError):
    """A contender's output is not the problem's solution: its time would mean nothing."""


@dataclass(frozen=True)
class Reference:
    """The problem's solution in float64 and how far a correct kernel may be from it, element by element."""

    value: torch.Tensor
    bound: torch.Tensor

    def verify(self, name: str, output: torch.Tensor) -> float:
        """Relative error of `output`; raises WrongResultError where it is beyond the bound."""
        if output.shape != self.value.shape:
            raise WrongResultError(f"{name}: expected shape {tuple(self.value.shape)}, got {tuple(output.shape)}")
        difference = (output.double() - self.value).abs()
        if not bool((difference <= self.bound).all()):  # not "any >": a NaN must fail too
            worst = float((difference / self.bound).max())
            raise WrongResultError(f"{name}: error is {worst:.3g} times what rounding explains")
        scale = float(self.value.abs().max()) if self.value.numel() else 1.0
        return float(difference.max()) / scale if self.value.numel() and scale else 0.0
