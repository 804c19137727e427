# SPDX-License-Identifier: Apache-2.0
"""When to prune how much, inside anyone's training loop.

    optimizer = torch.optim.Adam(model.parameters())
    pruner = slim.prune.Pruner(model, slim.prune.Magnitude(0.9), slim.prune.Cubic(begin=100, end=1000, every=100))
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        pruner.step()

A schedule knows steps and shares only; `Pruner` draws the masks, from the weights as they are at that step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch.prune.magnitude import Magnitude, check_fraction, check_weight, prune_weights_
from slimtorch.prune.mask import MASKABLE, install, mask_of
from slimtorch.prune.report import PruneReport


class Schedule(Protocol):
    """Which steps prune, and how much is gone after them. Steps count from 0, the first call of `Pruner.step`."""

    @property
    def last(self) -> int:
        """The last step that prunes."""
        ...

    def due(self, step: int) -> bool:
        """Whether this step prunes."""
        ...

    def sparsity(self, step: int, final: float) -> float:
        """The target in force after this step, in [0, final]; `final` from `last` on."""
        ...


@dataclass(frozen=True)
class OneShot:
    """Everything at once, at step `at`."""

    at: int = 0

    def __post_init__(self) -> None:
        _check_step("at", self.at)

    @property
    def last(self) -> int:
        """`at`."""
        return self.at

    def due(self, step: int) -> bool:
        """True at `at`."""
        return step == self.at

    def sparsity(self, step: int, final: float) -> float:
        """0 before `at`, `final` from then on."""
        return final if step >= self.at else 0.0


@dataclass(frozen=True)
class Cubic:
    """Gradual pruning: fast at first, slower as fewer weights remain (Zhu & Gupta, "To prune, or not to prune",
    2017, equation 1): s_t = s_f + (s_i - s_f) · (1 - (t - begin) / (end - begin))³.

    Args:
        begin: first step that prunes.
        end: last step that prunes; reaches the final sparsity even where `every` does not divide the way to it.
        every: steps between prunings, >= 1.
        initial: s_i, the sparsity at `begin`, in [0, 1); not above the final one.
    """

    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_step("begin", self.begin)
        _check_step("end", self.end)
        if self.end < self.begin:
            raise ValueError(f"end: expected a step not before begin={self.begin}, got {self.end}")
        _check_step("every", self.every, least=1)
        check_fraction("initial", self.initial)

    @property
    def last(self) -> int:
        """`end`."""
        return self.end

    def due(self, step: int) -> bool:
        """True at begin, begin + every, … and at end."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def sparsity(self, step: int, final: float) -> float:
        """Equation 1 at the latest step that pruned; 0 before `begin`."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return final
        pruned_at = step - (step - self.begin) % self.every
        left = 1 - (pruned_at - self.begin) / (self.end - self.begin)
        return final + (min(self.initial, final) - final) * left**3


@dataclass(frozen=True)
class Iterative:
    """Rounds of prune and train; each removes the same share of what remains, so that after round i of n the density
    is (1 - final)^(i / n) (Han et al. 2015; the rounds of Frankle & Carbin 2018).

    Args:
        at: the steps that prune, ascending.

    `Iterative.rounds(n, every, begin)` spaces them evenly.
    """

    at: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.at, Sequence) or isinstance(self.at, str) or not self.at:
            raise ValueError(f"at: expected at least one step, got {self.at!r}")
        object.__setattr__(self, "at", tuple(self.at))
        for step in self.at:
            _check_step("at", step)
        if any(b <= a for a, b in zip(self.at, self.at[1:], strict=False)):
            raise ValueError(f"at: expected ascending steps, got {self.at!r}")

    @classmethod
    def rounds(cls, rounds: int, every: int, begin: int = 0) -> Iterative:
        """`rounds` rounds at begin, begin + every, …"""
        _check_step("rounds", rounds, least=1)
        _check_step("every", every, least=1)
        _check_step("begin", begin)
        return cls(tuple(begin + i * every for i in range(rounds)))

    @property
    def last(self) -> int:
        """The last of `at`."""
        return self.at[-1]

    def due(self, step: int) -> bool:
        """True at the steps of `at`."""
        return step in self.at

    def sparsity(self, step: int, final: float) -> float:
        """1 - (1 - final)^(rounds done / rounds)."""
        done = sum(step >= at for at in self.at)
        return final if done == len(self.at) else 1.0 - float((1.0 - final) ** (done / len(self.at)))


def _check_step(name: str, value: object, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


class Pruner:
    """Prunes a model while it trains: one `step()` after each `optimizer.step()`.

    Every layer gets its mask at once, all True, so that the keys of `model.state_dict()` are the same from the first
    step to the last. To resume an interrupted run build model, Pruner and optimizer in the same order as before (masks
    change the order of `model.parameters()`), then load the three state dicts; the masks are in the model's.
    Afterwards `bake_(model)` gives plain weights.

    Args:
        model: any module, or a single layer.
        config: one `Magnitude`, or a mapping from glob of names to `Magnitude`; its sparsity is the final one.
        schedule: `OneShot`, `Cubic`, `Iterative` or anything like them.
        filter_fn: `filter_fn(module, name) -> bool`.
        regrow: draw each mask anew, so that a weight pruned earlier may come back. What is masked gets no gradient;
            it comes back with the value it had, as far as the optimizer (momentum, weight decay) left it.
        data: for importances that need it: an iterable of `inputs` or `(inputs, *targets)` that is read again at each
            pruning step (a list or a loader, no iterator).

    Raises:
        TypeError, ValueError: as `prune_`. The model is left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Magnitude | Mapping[str, Magnitude | None],
        schedule: Schedule,
        *,
        filter_fn: _select.FilterFn | None = None,
        regrow: bool = False,
        data: Iterable[Any] | None = None,
    ) -> None:
        if isinstance(schedule, type) or not all(hasattr(schedule, name) for name in ("last", "due", "sparsity")):
            raise TypeError(f"schedule: expected OneShot, Cubic, Iterative or the like, got {schedule!r}")
        for value in config.values() if isinstance(config, Mapping) else [config]:
            if value is not None and not isinstance(value, Magnitude):
                raise TypeError(f"config: a schedule takes Magnitude, got {type(value).__name__}")
        chosen = _select.resolve(model, config, filter_fn, types=MASKABLE)
        for name, layer, _ in chosen:
            check_weight(name, layer)
        fresh = [layer for _, layer, _ in chosen if mask_of(layer) is None]
        install([(layer, torch.ones_like(_weight(layer), dtype=torch.bool)) for layer in fresh])
        self.model = model
        self.schedule = schedule
        self.regrow = regrow
        self.data = data
        self.steps = 0  # calls of step() so far
        self._final = {name: magnitude for name, _, magnitude in chosen}
        self._sizes = {name: _weight(layer).numel() for name, layer, _ in chosen}

    @property
    def sparsity(self) -> float:
        """The target in force, in [0, 1); the mean over weights where layers have different ones."""
        total = sum(self._sizes.values())
        if not total or not self.steps:
            return 0.0
        now = {n: self.schedule.sparsity(self.steps - 1, m.sparsity) for n, m in self._final.items()}
        return sum(now[name] * size for name, size in self._sizes.items()) / total

    @property
    def finished(self) -> bool:
        """Whether the last pruning is done."""
        return self.steps > self.schedule.last

    def step(self) -> PruneReport | None:
        """Counts one training step and prunes where the schedule says so; the report then, else None.

        Raises:
            ValueError: a weight holds NaN; neither the masks nor the count change.
        """
        now = self.steps
        report = None
        if self.schedule.due(now):
            targets = {
                name: replace(m, sparsity=self.schedule.sparsity(now, m.sparsity)) for name, m in self._final.items()
            }
            report = prune_weights_(
                self.model, _by_name(targets), filter_fn=_among(targets), regrow=self.regrow, data=self.data
            )
        self.steps = now + 1
        return report

    def state_dict(self) -> dict[str, Any]:
        """What must be kept beside the model's own state: the number of steps, and of what run they are."""
        final = {name: magnitude.sparsity for name, magnitude in self._final.items()}
        return {"steps": self.steps, "sparsity": final, "schedule": _told(self.schedule)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict()` was taken.

        Raises:
            ValueError: `state` is not such a state, or one of another schedule or of other final sparsities.
        """
        steps = state.get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"state: expected a dict with the number of 'steps', got {dict(state)!r}")
        own = self.state_dict()
        for key in ("sparsity", "schedule"):
            if state.get(key) is not None and own[key] is not None and state[key] != own[key]:
                raise ValueError(f"state: is of another run: expected {key} {own[key]!r}, got {state[key]!r}")
        self.steps = steps


def _told(schedule: Schedule) -> dict[str, Any] | None:
    """A schedule in plain values; None for one of a class whose values nobody knows."""
    if not is_dataclass(schedule):
        return None
    values = {f.name: getattr(schedule, f.name) for f in fields(schedule)}
    return {"kind": type(schedule).__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"model: expected a layer with a weight tensor, got {type(layer).__name__}")
    return weight


def _by_name(targets: Mapping[str, Magnitude]) -> dict[str, Magnitude | None]:
    return {_select.literal(name): magnitude for name, magnitude in targets.items()}


def _among(targets: Mapping[str, Magnitude]) -> _select.FilterFn:
    return lambda module, name: name in targets
