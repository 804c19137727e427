# SPDX-License-Identifier: Apache-2.0
"""What the experiments have in common, and where each is found: ``slimtorch experiment NAME``.

An experiment is a module of this package with a constant ``EXPERIMENT``. It repeats, at small scale and on real data,
what a paper claims, and measures what the paper left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from slimtorch.report import Table

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``."""

# Name on the command line -> module of this package, and one line for the list.
EXPERIMENTS = {
    "lottery-ticket": ("lottery_ticket", "pruning round by round with rewinding: winning tickets and their controls"),
    "deconstructing": ("deconstructing", "what makes a ticket: criteria, starting values, signs, frozen values"),
    "supermask": ("supermask", "masks that make an untrained network work: by criterion, and learned"),
    "weight-agnostic": ("weight_agnostic", "topologies that classify and balance with any shared weight"),
    "rethinking": ("rethinking", "pruned shapes: fine-tuned, or trained from scratch"),
    "group-lasso": ("group_lasso", "group lasso against magnitude pruning at equal accuracy, with measured time"),
    "importance": ("importance", "what to remove: magnitude, Taylor, SNIP, life-long …, at equal sparsity"),
    "one-shot-vs-iterative": ("one_shot_vs_iterative", "do not prune too much at once: one shot, rounds, gradual"),
    "separable": ("separable", "3x3 convolutions made depthwise separable: accuracy, MACs, measured time"),
    "low-rank": ("low_rank", "layers of low rank by SVD, channel, spatial, Tucker, CP: accuracy, MACs, time"),
    "distillation": ("distillation", "a student from a teacher's soft targets, by temperature; shallow from deep"),
    "early-exit": ("early_exit", "samples that are sure leave: accuracy against measured time, by threshold"),
    "slimmable": ("slimmable", "several widths from one set of weights, against networks trained for each"),
    "skipping": ("skipping", "residual blocks skipped: gates per image, dropped layers; measured time"),
    "deep-compression": ("deep_compression", "prune, share, code: size, error and speed after each step"),
    "weight-clustering": ("weight_clustering", "bits of shared weights against accuracy, by initialisation"),
    "binary-connect": ("binary_connect", "binary weights as a regularizer: none, deterministic, stochastic, dropout"),
    "binary-net": ("binary_net", "binary weights and activations, trained, packed and timed"),
    "xnor-net": ("xnor_net", "binary convolutions with scales: full, binary weights, XNOR"),
    "pipeline": ("pipeline", "pruned, shared, distilled, with an exit: all in one recipe against each alone"),
}


@dataclass(frozen=True)
class Settings:
    """What the user can choose.

    Attributes:
        quick: under a minute, for a first look.
        seeds: number of training seeds; None: the experiment's own.
        data: ``"mnist"``, ``"cifar10"`` or a folder (see :func:`slimtorch.data.load`); None: the 5,000 embedded digits.
        threads: of torch while timing.
        jobs: processes that train; None: one per core.
        ray: train on a Ray cluster instead: its address, ``"auto"``, or ``"local"`` for one of this machine alone.
    """

    quick: bool = False
    seeds: int | None = None
    data: str | None = None
    threads: int = 1
    jobs: int | None = None
    ray: str | None = None


@dataclass(frozen=True)
class Result:
    """What an experiment found.

    Attributes:
        title, lead: heading and first paragraph of the report; ``lead`` says on what data and at what scale.
        tables: in order.
        figures: (file name, caption, figure), in order.
        data: everything measured, JSON-ready.
    """

    title: str
    lead: str
    tables: list[Table]
    figures: list[tuple[str, str, Figure]]
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One experiment: ``run(settings, out, progress)`` keeps finished pieces in the folder ``out``.

    ``config(settings)`` says, JSON-ready, what will be done: seeds, steps, rates.
    """

    name: str
    about: str
    paper: str
    config: Callable[[Settings], Mapping[str, Any]]
    run: Callable[[Settings, Path, Progress], Result]


def find(name: str) -> Experiment:
    """The experiment of that name; ValueError, with all names, where there is none."""
    if name not in EXPERIMENTS:
        raise ValueError(f"NAME: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    module = importlib.import_module(f"slimtorch.experiments.{EXPERIMENTS[name][0]}")
    experiment = module.EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment
