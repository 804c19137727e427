# SPDX-License-Identifier: Apache-2.0
"""A recipe of every kind of phase, and `main`, which runs it in a process that kills itself at a stage."""

from __future__ import annotations

import os
import signal
import sys
from collections import OrderedDict

import torch
from torch import nn

from slimtorch import distill, prune, quantize, recipe
from slimtorch.data import Digits, digits


def network() -> nn.Module:
    """With dropout and batch-norm: random numbers and statistics must go on as well."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(1, 4, 5, stride=3), norm=nn.BatchNorm2d(4), relu=nn.ReLU(), flat=nn.Flatten(),
        fc1=nn.Linear(256, 24), relu1=nn.ReLU(), drop=nn.Dropout(0.2), fc2=nn.Linear(24, 10),
    ))  # fmt: skip


def few() -> Digits:
    return digits(200, 100, 100)


def halve(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)


TERMS = (distill.SoftTargets(weight=0.5), distill.Hint("stages.0.relu", "relu", weight=0.5, project=True))
PHASES = (
    recipe.Train(epochs=2, batch_size=50, rate=5e-3, name="dense"),
    recipe.Prune(config=prune.Neurons(ratio=0.25)),
    recipe.Exits(exits={"relu": None}),
    recipe.Distill(epochs=1, batch_size=50, terms=TERMS),
    recipe.Prune(config={"*fc1": prune.Magnitude(0.5), "*fc2": None}),
    recipe.Train(epochs=1, batch_size=50, optimizer="sgd", rate=0.05, weight_decay=1e-3, schedule="constant"),
    recipe.Cluster(config={"*fc1": quantize.KMeans(bits=3)}),
    recipe.Distill(epochs=1, batch_size=50, teacher="dense"),
    recipe.Binarize(config={"*fc2": quantize.BinaryConnect()}),
    recipe.Train(epochs=1, batch_size=50, loss="squared_hinge", rate=1e-3),
    recipe.Apply(function=halve),
    recipe.Calibrate(within=0.1),
)


def full(batches: tuple[int, ...] = ()) -> recipe.Recipe:
    return recipe.Recipe(PHASES, seed=3, batches=batches, threads=1)


def main() -> None:
    """Ends with a signal."""
    folder, stage, at = sys.argv[1], sys.argv[2], int(sys.argv[3])

    def show(told: str, done: int, total: int) -> None:
        if told == stage and done >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    full().run(network, few(), folder, every=0.0, show=show)
    raise SystemExit(f"stage {stage!r} never came to {at}")
