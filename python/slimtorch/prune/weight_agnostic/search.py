# SPDX-License-Identifier: Apache-2.0
"""The search for topologies that work with any shared weight (Gaier & Ha, 1906.04358, section 3).

    population ── rewards under each shared weight ──▶ ranks by dominance ──▶ parents by tournament ──▶ operators
        ▲                                                 └─ the best stay as they are ─┐                    │
        └───────────────────────────────────────────────────────────────────────────────┴────────────────────┘

    found = slim.prune.weight_agnostic.search(SwingUp(), Config(generations=200), seed=0, folder=Path("search"))
    found.best, found.history["best_mean"]
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from slimtorch._files import write_atomically
from slimtorch.prune.magnitude import check_count
from slimtorch.prune.weight_agnostic.genome import Genome, add_connection, add_node, change_activation, start

_FORMAT = 1  # of the checkpoint; also raised when the same seed finds other networks than before
_FILE = "search.json"


class Task(Protocol):
    """What a search needs to know; more is better in every reward."""

    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...

    def describe(self) -> Mapping[str, Any]:
        """JSON-ready: all that rewards depend on; a folder of another task is refused."""
        ...

    def rewards(self, genomes: Sequence[Genome], shared: Tensor, seed: int) -> Tensor:
        """[population, W] for the shared weights [W]; everything random in it comes from `seed`."""
        ...

    def validate(self, genomes: Sequence[Genome], shared: Tensor) -> Tensor:
        """[population, W], always on the same held-out samples."""
        ...


@dataclass(frozen=True)
class Config:
    """How a search goes; the defaults are the authors' for the cart-pole, but for `generations` (theirs: 1,024).

    Attributes:
        population: topologies at a time.
        generations: how often they are ranked.
        shared: the weights that every connection has, one after the other.
        begin: probability of each direct connection of the first population.
        add_node, add_connection, change_activation: how often an operator is drawn, as parts of their sum.
        operators: a child is changed by 1 to so many of them (the authors: 1).
        tournament: how many individuals compete to be a parent.
        elite, cull: shares of the population that stay as they are, and that get no children.
        complexity: how often ranks come of mean reward and number of connections; else of mean and best reward.
        every: generations between two looks at validation, with a checkpoint each.
    """

    population: int = 192
    generations: int = 200
    shared: tuple[float, ...] = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
    begin: float = 0.5
    add_node: float = 0.25
    add_connection: float = 0.25
    change_activation: float = 0.5
    operators: int = 1
    tournament: int = 8
    elite: float = 0.2
    cull: float = 0.2
    complexity: float = 0.8
    every: int = 10

    def __post_init__(self) -> None:
        for name, least in (("population", 2), ("generations", 1), ("operators", 1), ("tournament", 1), ("every", 1)):
            check_count(name, getattr(self, name), least)
        for name in ("begin", "add_node", "add_connection", "change_activation", "elite", "cull", "complexity"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
        if not self.add_node + self.add_connection + self.change_activation > 0:
            raise ValueError("add_node, add_connection, change_activation: expected one above 0")
        if not self.cull < 1:
            raise ValueError(f"cull: expected less than 1, got {self.cull!r}: nobody would be left")
        if not self.shared or not all(math.isfinite(value) for value in self.shared):
            raise ValueError(f"shared: expected finite weights, at least one, got {self.shared!r}")


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: of all elites that were looked at on validation, the one of the highest mean reward over the shared
            weights.
        validation: that reward.
        history: by generation: "best_mean", "median_mean" (mean over the shared weights; best and median over the
            population), "best_max", "size" (connections of the best by mean); and "validation", that of the best
            topology known after each look, NaN-free, with "validated" the generations of these looks.
        population: the last one.
    """

    best: Genome
    validation: float
    history: dict[str, list[float]]
    population: list[Genome]


def rank(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int64 [N]: place of each individual, 0 the best, by dominance of two objectives; more is better in both.

    Front after front (who is dominated by nobody that is left), and within a front by crowding distance, the loneliest
    first (NSGA-II, Deb et al. 2002); ties keep their order.
    """
    better_or_equal = (first[:, None] >= first) & (second[:, None] >= second)
    better = (first[:, None] > first) | (second[:, None] > second)
    dominates = better_or_equal & better
    left = np.ones(len(first), np.bool_)
    order: list[int] = []
    while left.any():
        front = np.flatnonzero(left & ~dominates[left].any(axis=0))
        crowding = _crowding(first[front]) + _crowding(second[front])
        order += front[np.argsort(-crowding, kind="stable")].tolist()
        left[front] = False
    places = np.empty(len(first), np.int64)
    places[order] = np.arange(len(first))
    return places


def _crowding(values: np.ndarray) -> np.ndarray:
    """Distance between the two neighbours of each value, as part of the range; infinite at both ends."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    distance = np.full(len(values), np.inf)
    reach = ordered[-1] - ordered[0]
    if len(values) > 2:
        distance[order[1:-1]] = (ordered[2:] - ordered[:-2]) / reach if reach > 0 else 0.0
    return distance


def mutate(genome: Genome, config: Config, rng: np.random.Generator) -> Genome:
    """A child: 1 to `config.operators` operators, drawn by their parts; one that cannot be applied is drawn anew."""
    operators = [(add_node, config.add_node), (add_connection, config.add_connection)]
    operators.append((change_activation, config.change_activation))
    for _ in range(int(rng.integers(1, config.operators + 1))):
        left = [(operator, part) for operator, part in operators if part > 0]
        changed = None
        while changed is None and left:
            parts = np.array([part for _, part in left])
            chosen = int(rng.choice(len(left), p=parts / parts.sum()))
            changed = left.pop(chosen)[0](genome, rng)
        genome = genome if changed is None else changed
    return genome


def breed(population: Sequence[Genome], rewards: np.ndarray, config: Config, rng: np.random.Generator) -> list[Genome]:
    """The next generation: elites, then children of the winners of tournaments. `rewards`: float [population, W]."""
    mean = rewards.mean(1)
    if rng.random() < config.complexity:
        places = rank(mean, -np.array([genome.size for genome in population], np.float64))
    else:
        places = rank(mean, rewards.max(1))
    order = np.argsort(places)
    count = len(population)
    following = [population[index] for index in order[: max(1, round(config.elite * count))]]
    parents = max(1, count - round(config.cull * count))
    while len(following) < count:
        # places within the order: the least is the best
        winner = int(rng.integers(parents, size=config.tournament).min())
        following.append(mutate(population[order[winner]], config, rng))
    return following[:count]


def search(
    task: Task,
    config: Config | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    folder: Path | None = None,
    seed: int = 0,
) -> Found:
    """Searches; the result depends on `task`, `config` and `seed` only, whether interrupted or not.

    Args:
        task: see `Task`; `SwingUp` and `Classification` are two.
        config: None for the defaults.
        progress: called as `progress(done, generations)` after each generation.
        folder: a checkpoint is kept there, replaced every `config.every` generations; the same call goes on from it.
            More `generations` than before continue a finished search.
        seed: of everything random, >= 0.

    Raises:
        ValueError: the folder holds another search, or one that is further already, or a damaged file; a reward is NaN
            or infinite, or of another shape than [population, W].
    """
    config = config or Config()
    check_count("seed", seed, 0)
    asked = {"format": _FORMAT, "task": dict(task.describe()), "seed": seed, **asdict(config)}
    del asked["generations"]
    asked = json.loads(json.dumps(asked))
    path = None if folder is None else folder / _FILE
    state = None if path is None or not path.exists() else _load(path, asked, config.generations)
    if state is None:
        rng = np.random.default_rng([seed])
        population = [start(task.inputs, task.outputs, config.begin, rng) for _ in range(config.population)]
        state = _State(0, population, None, -math.inf, {})
    shared = torch.tensor(config.shared)
    for generation in range(state.generation, config.generations):
        rng = np.random.default_rng([seed, generation + 1])  # nothing of it has to be kept between generations
        given = task.rewards(state.population, shared, int(rng.integers(2**31)))
        rewards = _checked(given, state.population, shared, f"generation {generation}")
        state.record(rewards)
        last = generation + 1 == config.generations
        if (generation + 1) % config.every == 0 or last:
            _look(task, state, rewards, config, shared, generation)
        following = breed(state.population, rewards, config, rng)
        state.population = state.population if last else following
        state.generation = generation + 1
        if path is not None and ((generation + 1) % config.every == 0 or last):
            # children of the last generation too: more generations may be asked for later
            _write(path, state.to_dict(asked, following))
        if progress is not None:
            progress(generation + 1, config.generations)
    assert state.best is not None
    return Found(state.best, state.validation, state.history, state.population)


@dataclass
class _State:
    generation: int
    population: list[Genome]
    best: Genome | None
    validation: float
    history: dict[str, list[float]]

    def record(self, rewards: np.ndarray) -> None:
        mean = rewards.mean(1)
        top = int(mean.argmax())
        for name, value in (
            ("best_mean", mean[top]),
            ("median_mean", np.median(mean)),
            ("best_max", rewards.max()),
            ("size", self.population[top].size),
        ):
            self.history.setdefault(name, []).append(float(value))

    def to_dict(self, asked: Mapping[str, Any], population: Sequence[Genome]) -> dict[str, Any]:
        assert self.best is not None
        return {
            "asked": asked,
            "generation": self.generation,
            "best": self.best.to_dict(),
            "validation": self.validation,
            "history": self.history,
            "last": [genome.to_dict() for genome in self.population],
            "population": [genome.to_dict() for genome in population],
        }


def _look(task: Task, state: _State, rewards: np.ndarray, config: Config, shared: Tensor, generation: int) -> None:
    """The elites of this generation on validation; the best of all so far is kept."""
    count = max(1, round(config.elite * config.population))
    order = np.argsort(-rewards.mean(1), kind="stable")[:count]
    elites = [state.population[index] for index in order]
    mean = _checked(task.validate(elites, shared), elites, shared, f"generation {generation}, validation").mean(1)
    top = int(mean.argmax())
    if mean[top] > state.validation:
        state.best, state.validation = elites[top], float(mean[top])
    state.history.setdefault("validated", []).append(generation)
    state.history.setdefault("validation", []).append(state.validation)


def _checked(rewards: Tensor, genomes: Sequence[Genome], shared: Tensor, where: str) -> np.ndarray:
    expected = (len(genomes), len(shared))
    if not isinstance(rewards, Tensor) or tuple(rewards.shape) != expected:
        got = list(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"task: expected rewards of shape {list(expected)} in {where}, got {got}")
    values = rewards.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        individual, weight = (int(index) for index in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(
            f"task: expected finite rewards, got {values[individual, weight]} in {where} for individual {individual} "
            f"({genomes[individual].size} connections) under the shared weight {float(shared[weight]):g}"
        )
    return values


def _load(path: Path, asked: Mapping[str, Any], generations: int) -> _State:
    try:
        text = path.read_text(encoding="utf-8")
        digest, _, body = text.partition("\n")
        if hashlib.sha256(body.encode()).hexdigest() != digest:
            raise ValueError("its checksum is another")
        data = json.loads(body)
    except ValueError as error:  # also of UTF-8 and JSON
        raise ValueError(f"folder: {str(path)!r} is damaged or no checkpoint ({error}); take another folder") from error
    if data["asked"] != asked:
        keys = sorted({*data["asked"], *asked})
        others = [key for key in keys if data["asked"].get(key) != asked.get(key)]
        raise ValueError(
            f"folder: {str(path)!r} is of another search (different: {', '.join(others)}); take another folder"
        )
    if data["generation"] > generations:
        raise ValueError(f"folder: {str(path)!r} is at generation {data['generation']} already, beyond {generations}")
    held = "last" if data["generation"] == generations else "population"
    population = [Genome.from_dict(genome) for genome in data[held]]
    return _State(data["generation"], population, Genome.from_dict(data["best"]), data["validation"], data["history"])


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """A crash leaves the old file or the new one, never half of it."""
    body = json.dumps(data, separators=(",", ":"))
    text = hashlib.sha256(body.encode()).hexdigest() + "\n" + body
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
