# SPDX-License-Identifier: Apache-2.0
"""Swinging up a pole on a cart, for many controllers and many starts at once.

The system of Deisenroth & Rasmussen (PILCO, 2011) in the form that 1906.04358 uses, after Zuo's DeepPILCO. The pole
hangs from the cart at θ = π and stands at θ = 0; F is the force, L the length, b the friction of the cart:

    ẍ = (-2 m L θ̇² sin θ + 3 m g sin θ cos θ + 4 F - 4 b ẋ) / (4 (M + m) - 3 m cos² θ)
    θ̈ = (-3 m L θ̇² sin θ cos θ + 6 (M + m) g sin θ + 6 (F - b ẋ) cos θ) / (4 L (M + m) - 3 m L cos² θ)

with M = m = 0.5 kg, L = 0.6 m, b = 0.1 N s/m, g = 9.82 m/s². Integrated by semi-implicit Euler (velocities first, then
positions from the new ones) with steps of 0.02 s, 500 of them; the authors take explicit Euler, 1,000 steps of 0.01 s.

Observed are x, ẋ, cos θ, sin θ, θ̇. The output, clipped to [-1, 1], times 10 N is the force. Each step is worth
(1 + cos θ) / 2 · cos(π x / 4.8), at most 1; once |x| > 2.4 m the episode is over and nothing more is earned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from slimtorch.prune.magnitude import check_count
from slimtorch.prune.weight_agnostic.genome import Genome
from slimtorch.prune.weight_agnostic.network import Networks, Weights

GRAVITY, CART, POLE, LENGTH, FRICTION, FORCE, LIMIT = 9.82, 0.5, 0.5, 0.6, 0.1, 10.0, 2.4
_VALIDATION, _TEST = 10**9 + 1, 10**9 + 2  # seeds of starts that no generation has


def advance(x: Tensor, v: Tensor, theta: Tensor, omega: Tensor, force: Tensor, dt: float) -> tuple[Tensor, ...]:
    """(x, ẋ, θ, θ̇) after one step of `dt` seconds under `force` in newtons; all of one shape."""
    sin, cos = theta.sin(), theta.cos()
    total, swing = CART + POLE, POLE * LENGTH * omega * omega * sin
    push = force - FRICTION * v
    below = 4 * total - 3 * POLE * cos * cos
    v = v + dt * (-2 * swing + 3 * POLE * GRAVITY * sin * cos + 4 * push) / below
    omega = omega + dt * (-3 * swing * cos + 6 * total * GRAVITY * sin + 6 * push * cos) / (LENGTH * below)
    return x + dt * v, v, theta + dt * omega, omega


@dataclass(frozen=True)
class SwingUp:
    """The task for `search`; a reward is the mean over all steps and episodes, in [0, 1].

    Attributes:
        episodes: starts per generation, other ones in each, the same for the whole population.
        steps: of 0.02 s.
        held_out: episodes of validation, and of the test; their starts are drawn once.
    """

    episodes: int = 2
    steps: int = 500
    held_out: int = 16
    dt: float = 0.02

    inputs = 5
    outputs = 1

    def __post_init__(self) -> None:
        for name in ("episodes", "steps", "held_out"):
            check_count(name, getattr(self, name), 1)
        if not 0 < self.dt <= 0.1:
            raise ValueError(f"dt: expected seconds above 0, 0.1 at most, got {self.dt}")

    def describe(self) -> Mapping[str, Any]:
        """What a search is remembered by."""
        return {"task": "cart-pole swing-up", **asdict(self)}

    def starts(self, seed: int, count: int) -> Tensor:
        """float32 [4, count]: x, ẋ, θ, θ̇, normal with deviation 0.2 about the pole hanging at rest."""
        drawn = torch.randn(4, count, generator=torch.Generator().manual_seed(seed)) * 0.2
        drawn[2] += math.pi
        return drawn

    def rewards(
        self, genomes: Sequence[Genome], shared: Tensor, seed: int, weights: Weights = None
    ) -> Tensor:
        """[population, W]: mean reward from starts drawn with `seed`, under each shared weight."""
        return self.play(genomes, shared, self.starts(seed, self.episodes), weights)

    def validate(self, genomes: Sequence[Genome], shared: Tensor, weights: Weights = None) -> Tensor:
        """[population, W]: the same from the starts of validation."""
        return self.play(genomes, shared, self.starts(_VALIDATION, self.held_out), weights)

    def test(self, genomes: Sequence[Genome], shared: Tensor, weights: Weights = None) -> Tensor:
        """[population, W]: the same from the starts of the test."""
        return self.play(genomes, shared, self.starts(_TEST, self.held_out), weights)

    def balance(self, genomes: Sequence[Genome], shared: Tensor, weights: Weights = None) -> Tensor:
        """[population, W]: share of the last fifth of the test's episodes with the pole within 26° of upright.

        A pole that only turns round earns up to half of the reward, but is there for a seventh of the time.
        """
        return self._simulate(genomes, shared, self.starts(_TEST, self.held_out), weights)[1]

    def play(self, genomes: Sequence[Genome], shared: Tensor, starts: Tensor, weights: Weights = None) -> Tensor:
        """[population, W]: mean reward from `starts` [4, episodes]. A force that is not a number ends the episode."""
        return self._simulate(genomes, shared, starts, weights)[0]

    @torch.no_grad()
    def _simulate(
        self, genomes: Sequence[Genome], shared: Tensor, starts: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        networks = Networks(genomes, weights, common=False)
        ready = networks.prepare(shared, starts.shape[1])
        x, v, theta, omega = starts.repeat(1, len(shared))[:, None].expand(-1, len(genomes), -1)
        alive = torch.ones_like(x, dtype=torch.bool)
        earned, upright = torch.zeros(x.shape), torch.zeros(x.shape)
        still = torch.zeros(())
        last = max(1, self.steps // 5)
        for step in range(self.steps):
            for row, value in zip(ready.inputs, (x, v, theta.cos(), theta.sin(), omega), strict=True):
                row.copy_(value)
            force = ready.run()[0].clamp(-1, 1) * FORCE
            x, v, theta, omega = advance(x, v, theta, omega, force, self.dt)
            alive = alive & (x.abs() <= LIMIT)
            gained = (1 + theta.cos()) / 2 * torch.cos(x * (math.pi / 2 / LIMIT))
            earned += torch.where(alive, gained, still)
            v, omega = torch.where(alive, v, still), torch.where(alive, omega, still)
            if step >= self.steps - last:
                upright += alive & (theta.cos() > 0.9)
        shape = (len(genomes), len(shared), -1)
        return (earned / self.steps).view(shape).mean(2), (upright / last).view(shape).mean(2)
