# SPDX-License-Identifier: Apache-2.0
"""Individual weights for a topology: drawn at random, trained by gradient, or searched for by a population."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slimtorch.prune.magnitude import check_count
from slimtorch.prune.weight_agnostic.genome import Genome
from slimtorch.prune.weight_agnostic.network import Network

Rewards = Callable[[Sequence[Genome], Tensor, int, Sequence[np.ndarray]], Tensor]
"""`rewards(genomes, shared, seed, weights)` → [population, W], as tasks have it."""


def random_weights(genome: Genome, count: int, seed: int, reach: float = 2.0) -> list[np.ndarray]:
    """`count` draws of one float32 weight per connection, uniform in [-reach, reach]."""
    check_count("count", count, 1)
    rng = np.random.default_rng([seed])
    return list(rng.uniform(-reach, reach, (count, genome.size)).astype(np.float32))


def tune_by_gradient(
    genome: Genome,
    x: Tensor,
    labels: Tensor,
    *,
    start: float | np.ndarray,
    steps: int = 400,
    batch_size: int = 100,
    rate: float = 0.02,
    seed: int = 0,
) -> np.ndarray:
    """Weights float32 [size] trained for cross-entropy by Adam, its rate falling linearly to nothing.

    Args:
        genome: the topology; `x` [N, inputs] and `labels` int64 [N] are what it is trained on.
        start: first weight of every connection, or one for each.
        steps, batch_size, rate, seed: of the training; the seed gives the order of the samples.

    Raises:
        ValueError: the loss is not finite.
    """
    check_count("steps", steps, 1)
    check_count("batch_size", batch_size, 1)
    network = Network(genome, torch.as_tensor(start))
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(x), (batch_size,), generator=generator)
        loss = F.cross_entropy(network(x[chosen]), labels[chosen])
        if not bool(loss.isfinite()):
            value = float(loss.detach())
            raise ValueError(f"rate: the loss is {value} at step {step}; a lower rate than {rate} may help")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.weight.detach().numpy().copy()


def tune_by_population(
    genomes: Sequence[Genome],
    rewards: Rewards,
    *,
    start: Sequence[float],
    rounds: int = 30,
    population: int = 48,
    deviation: float = 0.5,
    seed: int = 0,
) -> list[np.ndarray]:
    """Weights float32 [size] for each genome by the cross-entropy method: no gradient, all genomes side by side.

    Candidates are drawn from a normal distribution with a deviation for each weight; the best quarter gives the next
    one, whose deviation is kept above a floor that falls linearly to nothing. Returned is the last mean.

    Args:
        genomes: any topologies of the task.
        rewards: `task.rewards`.
        start: of each genome, the first mean of all its weights.
        rounds, population, deviation: how often, how many candidates of each genome, and how far they lie first.
        seed: of the draws and of the episodes.
    """
    check_count("rounds", rounds, 1)
    check_count("population", population, 4)
    if len(start) != len(genomes):
        raise ValueError(f"start: expected {len(genomes)} weights, one for each genome, got {len(start)}")
    means = [np.full(genome.size, value) for genome, value in zip(genomes, start, strict=True)]
    deviations = [np.full(genome.size, deviation) for genome in genomes]
    one = torch.ones(1)
    for index in range(rounds):
        rng = np.random.default_rng([seed, index])
        drawn = [m + d * rng.standard_normal((population, len(m))) for m, d in zip(means, deviations, strict=True)]
        for candidates, mean in zip(drawn, means, strict=True):
            candidates[0] = mean
        every = [genome for genome in genomes for _ in range(population)]
        flat = [row.astype(np.float32) for candidates in drawn for row in candidates]
        gained = rewards(every, one, int(rng.integers(2**31)), flat).view(len(genomes), population)
        floor = 0.2 * deviation * (1 - (index + 1) / rounds)
        for at, candidates in enumerate(drawn):
            best = candidates[torch.argsort(gained[at], descending=True, stable=True)[: population // 4].numpy()]
            means[at] = best.mean(0)
            deviations[at] = np.maximum(best.std(0), floor)
    return [mean.astype(np.float32) for mean in means]
