# SPDX-License-Identifier: Apache-2.0
"""BinaryConnect on digits: the table of the paper (arXiv 1511.00363, table 2), its weights and its curves."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimtorch.data import load
from slimtorch.experiments.binary_training import Plan, Variant, errors_of, row_data, train_all
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.machine import describe
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.quantize import BinaryConnect
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Test errors on MNIST, percent (table 2 of the paper): 3 x 1024 units, 50,000 images, 1,000 epochs.
PAPER = {"none": "1.30 ± 0.04", "det": "1.29 ± 0.08", "stoch": "1.18 ± 0.04", "dropout": "1.01 ± 0.04"}
RATE = 1e-2  # chosen on the validation images, for all rows alike
_COLORS = {"none": "#999999", "det": "#0072B2", "stoch": "#E69F00", "dropout": "#009E73"}


def mlp(shape: tuple[int, ...], width: int, hidden: int = 3, dropout: bool = False) -> nn.Sequential:
    """Linear → batch-norm → ReLU, ``hidden`` times, and ten outputs with batch-norm (the L2-SVM of the paper)."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = torch.Size(shape).numel()
    for index in range(hidden):
        if dropout:
            layers.append(nn.Dropout(0.2 if index == 0 else 0.5))
        layers += [nn.Linear(features, width), nn.BatchNorm1d(width, eps=1e-4), nn.ReLU()]
        features = width
    if dropout:
        layers.append(nn.Dropout(0.5))
    return nn.Sequential(*layers, nn.Linear(features, 10), nn.BatchNorm1d(10, eps=1e-4))


def variants(width: int) -> dict[str, Variant]:
    """The four rows of the paper's table."""
    plain, dropped = partial(mlp, width=width), partial(mlp, width=width, dropout=True)
    return {
        "none": Variant("no regularizer", plain, None, RATE),
        "det": Variant("BinaryConnect, deterministic", plain, BinaryConnect(), RATE, uniform=True),
        "stoch": Variant("BinaryConnect, stochastic", plain, BinaryConnect(stochastic=True), RATE, uniform=True),
        "dropout": Variant("50 % dropout", dropped, None, RATE),
    }


def plan_for(settings: Settings) -> tuple[int, Plan]:
    """Width of the hidden layers, and how much is trained."""
    if settings.quick:
        return 256, Plan(epochs=5, seeds=settings.seeds or 1)
    return 384, Plan(epochs=24, seeds=settings.seeds or 5)


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train the four rows and tell what came of them."""
    width, plan = plan_for(settings)
    data, what = load(settings.data, settings.quick)
    rows, inputs = variants(width), data.train.images[0].numel()
    found = train_all("binary-connect", rows, plan, data, out, settings, progress, keep_weights=False)
    table = Table(
        "BinaryConnect: binary weights as a regularizer",
        ["network", "test error, %", "inference", "paper, %"],
        [
            [rows[name].title, percent(errors_of(found[name])), "binary" if name == "det" else "real", PAPER[name]]
            for name in rows
        ],
        [
            f"{inputs} - 3 x {width} - 10, batch-norm, squared hinge loss, Adam, {plan.epochs} epochs; mean ± standard "
            f"deviation over {over_seeds(plan.seeds)}",
            f"trained on {what}; the paper: all of MNIST, 1,000 epochs, more units",
        ],
    )
    lead = (
        f"Networks of three hidden layers trained on {what}, with real weights, with binary weights in the forward and "
        "backward pass (BinaryConnect), or with dropout. The errors are those of held-out images, without a choice of "
        "epoch. Beside them stands what the paper found on all of MNIST."
    )
    captions = [
        ("binary-connect-curves", "Validation error and training loss by epoch, mean over seeds.", _curves),
        ("binary-connect-weights", "Real weights of the first layer after training, first seed.", _histograms),
    ]
    figures = [(name, caption, draw(found, rows)) for name, caption, draw in captions]
    results: dict[str, Any] = {
        "experiment": "binary-connect", "data": what, "width": width, "epochs": plan.epochs, "seeds": plan.seeds,
        "machine": describe(settings.threads), "rows": {name: row_data(rows[name], found[name]) for name in rows},
        "tables": [table.to_dict()],
    }  # fmt: skip
    return Result("BinaryConnect on digits", lead, [table], figures, results)


def _curves(found: dict[str, list[Record]], rows: dict[str, Variant]) -> Figure:
    from slimtorch.experiments.plots import new_figure, plain_ticks

    figure, axes = new_figure(2)
    for axis, key, label, factor in (
        (axes[0], "validation_error", "validation error, %", 100),
        (axes[1], "training_loss", "training loss (squared hinge)", 1),
    ):
        for name, records in found.items():
            values = zip(*(record.result[key] for record in records), strict=True)
            means = [factor * statistics.fmean(value) for value in values]
            axis.plot(range(1, len(means) + 1), means, label=rows[name].title, color=_COLORS[name], linewidth=1.6)
        axis.set_yscale("log")
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        plain_ticks(axis.yaxis)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _histograms(found: dict[str, list[Record]], rows: dict[str, Variant]) -> Figure:
    from slimtorch.experiments.plots import new_figure

    names = ("none", "det", "stoch")
    figure, axes = new_figure(len(names), height=3.2, width=3.8)
    for axis, name in zip(axes, names, strict=True):
        shares = found[name][0].result["first_layer_histogram"]
        width = 2 / len(shares)
        centres = [-1 + (index + 0.5) * width for index in range(len(shares))]
        axis.bar(centres, [100 * share for share in shares], width, color=_COLORS[name])
        axis.set_title(rows[name].title, fontsize=9)
        axis.set_xlabel("weight, clipped to [-1, 1]")
    axes[0].set_ylabel("share of the weights, %")
    return figure


EXPERIMENT = Experiment(
    name="binary-connect",
    about="binary weights as a regularizer: none, deterministic, stochastic, dropout",
    paper="arXiv 1511.00363",
    config=lambda settings: {"width": plan_for(settings)[0], **asdict(plan_for(settings)[1])},
    run=run,
)
