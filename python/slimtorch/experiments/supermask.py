# SPDX-License-Identifier: Apache-2.0
"""Supermasks: an untrained network under masks drawn by a criterion, and under learned masks (Zhou et al., arXiv
1905.01067, section 5 and figures 6 to 8; scores: Ramanujan et al., arXiv 1911.13299).

The paper's: all of MNIST, `--data mnist` (Conv-2 on `--data cifar10`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimtorch import prune
from slimtorch.data import Digits, Split, load
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.deconstructing import network
from slimtorch.experiments.loop import evaluate, fit
from slimtorch.experiments.machine import describe
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.prune import supermask
from slimtorch.prune.lottery import search
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1

# Test accuracies of the paper's fully connected network on MNIST, percent (abstract, section 5).
PAPER = {"criterion": 86.0, "learned": 95.3, "learned, rescaled": 98.0}

# name -> (how it is called, colour, line)
CRITERIA = {
    "large_final_same_sign": ("large final, same sign", "#0072B2", "-"),
    "large_final": ("large final", "#56B4E9", "-"),
    "magnitude_increase": ("magnitude increase", "#D55E00", "-"),
    "movement": ("movement", "#009E73", "-"),
    "large_init": ("large init", "#E69F00", "-"),
    "random": ("random", "#999999", "-"),
    "large_final_other_sign": ("large final, other sign", "#0072B2", ":"),
}
WEIGHTS: dict[str, supermask.Weights] = {"initial": "initial", "±α": "signed_constant"}


@dataclass(frozen=True)
class Plan:
    """All numbers of the experiment.

    Attributes:
        seeds: networks, each with its own initialisation and order of batches.
        epochs: of the training that criteria look at.
        mask_epochs: of learning masks and scores.
        batch_size: images in a step.
        rate: of Adam, for weights.
        mask_rate: of SGD with momentum 0.9, for masks.
        score_rate: of Adam, for scores.
        top: share of the weights that scores keep.
        samples: drawn masks that an accuracy is the mean of.
        kept: shares of weights that criteria keep.
    """

    seeds: int = 5
    epochs: int = 6
    mask_epochs: int = 15
    batch_size: int = 60
    rate: float = 1.2e-3
    mask_rate: float = 100.0
    score_rate: float = 0.01
    top: float = 0.3
    samples: int = 10
    kept: tuple[float, ...] = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


def plan(settings: Settings) -> Plan:
    """Quick or full; on full data sets with the paper's 55 epochs of training and 100 of learning masks."""
    chosen = Plan()
    if settings.data is not None:
        chosen = replace(chosen, epochs=55, mask_epochs=100)
    if settings.quick:
        chosen = replace(chosen, seeds=1, samples=3, kept=(0.65, 0.5, 0.3, 0.2, 0.1))
        chosen = replace(chosen, epochs=8, mask_epochs=12) if settings.data is None else replace(
            chosen, epochs=1, mask_epochs=1
        )  # fmt: skip
    return chosen if settings.seeds is None else replace(chosen, seeds=settings.seeds)


def learned(chosen: Plan) -> dict[str, supermask.Config]:
    """What is learned, by name."""
    return {
        "learned": supermask.Bernoulli(),
        "learned, ±α": supermask.Bernoulli(weights="signed_constant"),
        "learned, rescaled": supermask.Bernoulli(rescale=True),
        "learned, rescaled, ±α": supermask.Bernoulli(rescale=True, weights="signed_constant"),
        "scores, rescaled, ±α": supermask.TopK(chosen.top, rescale=True, weights="signed_constant"),
    }


def _steps(data: Digits, config: Mapping[str, Any], epochs: str) -> tuple[int, int]:
    size = min(config["batch_size"], len(data.train))
    return config[epochs] * (len(data.train) // size), size


def run_criteria(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """Accuracies of the untrained network under the masks of each criterion, and of the trained network."""
    model = network(data, config["seed"])
    untrained = evaluate(model, data.test)[1]
    steps, size = _steps(data, config, "epochs")

    def train(model: nn.Module, *_: object) -> None:
        optimizer = torch.optim.Adam(model.parameters(), config["rate"], fused=True)
        fit(model, data, optimizer, steps=steps, batch_size=size, seed=config["seed"])

    ticket = next(search(model, train, rounds=0))
    found: dict[str, Any] = {"untrained": untrained, "trained": evaluate(model, data.test)[1]}
    for weights in WEIGHTS.values():
        for name in CRITERIA:
            row: dict[str, list[float]] = {"validation": [], "test": []}
            for kept in config["kept"]:
                chosen = supermask.by_criterion(ticket, name, kept, weights=weights, seed=config["seed"])
                chosen.apply_(model)
                row["validation"].append(evaluate(model, data.validation)[1])
                row["test"].append(evaluate(model, data.test)[1])
            found[f"{name}/{weights}"] = row
    return Record(found)


def run_learned(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """A learned mask: accuracy under drawn masks along the way and at the end, under the likeliest, and baked."""
    model = network(data, config["seed"])
    choice = _config(config["supermask"])
    supermask.supermask_(model, choice)
    trained = [p for p in model.parameters() if p.requires_grad]
    if isinstance(choice, supermask.TopK):
        optimizer: torch.optim.Optimizer = torch.optim.Adam(trained, config["score_rate"], fused=True)
    else:
        optimizer = torch.optim.SGD(trained, config["mask_rate"], momentum=0.9)
    steps, size = _steps(data, config, "mask_epochs")
    every = max(1, steps // config["mask_epochs"])
    curve: list[float] = [_drawn(model, data.validation, 1)]
    done = 0

    def look() -> None:
        nonlocal done
        done += 1
        if done % every == 0:
            curve.append(_drawn(model, data.validation, 1))

    torch.manual_seed(1000 + config["seed"])  # of the draws
    fit(model, data, optimizer, steps=steps, batch_size=size, seed=config["seed"], after_step=look)
    with supermask.expected(model):
        expected = evaluate(model, data.test)[1]
    result = {
        "validation": curve, "test": _drawn(model, data.test, config["samples"]), "expected": expected,
        "likely": evaluate(model, data.test)[1], "report": supermask.report(model).to_dict(),
    }  # fmt: skip
    supermask.bake_(model, seed=0)  # what is reported is what would be packed
    return Record({**result, "baked": evaluate(model, data.test)[1], "sparsity": prune.sparsity(model)})


def _drawn(model: nn.Module, split: Split, samples: int) -> float:
    return statistics.fmean(supermask.sampled(model, lambda m: evaluate(m, split)[1], samples=samples, seed=0))


def _config(options: Mapping[str, Any]) -> supermask.Config:
    return supermask.TopK(**options) if "kept" in options else supermask.Bernoulli(**options)


def trials(chosen: Plan) -> dict[str, list[Trial]]:
    """Name → one trial for each seed; "criteria" are in one."""
    found: dict[str, list[Trial]] = {"criteria": []}
    for seed in range(chosen.seeds):
        basis: dict[str, Any] = {**asdict(chosen), "kept": list(chosen.kept), "version": VERSION, "seed": seed}
        del basis["seeds"]
        found["criteria"].append(Trial(f"criteria-seed{seed}", run_criteria, basis))
        for name, choice in learned(chosen).items():
            options = asdict(choice) | ({"seed": seed} if isinstance(choice, supermask.TopK) else {})
            label = name.replace(", ", "-").replace("±α", "constant")
            config = {**basis, "supermask": options}
            found.setdefault(name, []).append(Trial(f"{label}-seed{seed}", run_learned, config))
    return found


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Draw and learn supermasks, and tell what came of them."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    wanted = trials(chosen)
    records = run_all([trial for row in wanted.values() for trial in row], data, out, settings, progress)
    by_name = {name: [records[trial.name].result for trial in row] for name, row in wanted.items()}
    criteria = by_name.pop("criteria")

    def rounded(values: Sequence[float]) -> list[float]:
        return [round(value, 5) for value in values]

    found: dict[str, Any] = {
        "experiment": "supermask", "data": what, "plan": asdict(chosen) | {"kept": list(chosen.kept)},
        "machine": describe(settings.threads),
        "network": "LeNet-300-100" if data.train.images.shape[1] == 1 else "Conv-2",
        "untrained": rounded([r["untrained"] for r in criteria]),
        "trained": rounded([r["trained"] for r in criteria]),
        "criteria": {
            f"{name}/{weights}": {
                part: [rounded(r[f"{name}/{weights}"][part]) for r in criteria] for part in ("validation", "test")
            }
            for weights in WEIGHTS.values()
            for name in CRITERIA
        },
        "learned": {
            name: {
                **{key: rounded([r[key] for r in row]) for key in ("test", "expected", "likely", "baked", "sparsity")},
                "validation": [rounded(r["validation"]) for r in row],
                "kept": rounded([r["report"]["kept"] for r in row]),
            }
            for name, row in by_name.items()
        },
    }  # fmt: skip
    lead = (
        f"{found['network']} whose weights are never trained, on {what}. Masks come from a criterion, which compares "
        "the weights before and after a training whose result is thrown away, or are learned while the weights stay "
        "frozen. Accuracies are those of held-out images; how many weights to keep is chosen on others."
    )
    return Result("Supermasks", lead, tables(found), figures(found), found)


def best(found: dict[str, Any], name: str) -> int:
    """The share of weights (its index) that has the best mean validation accuracy."""
    means = [statistics.fmean(values) for values in zip(*found["criteria"][name]["validation"], strict=True)]
    return means.index(max(means))


def tables(found: dict[str, Any]) -> list[Table]:
    """By criterion, and learned, beside the paper's."""
    chosen, labels = found["plan"], {weights: label for label, weights in WEIGHTS.items()}
    seeds, notes = over_seeds(chosen["seeds"]), [f"trained on {found['data']}"]
    rows: list[list[object]] = []
    for name, (title, _, _) in CRITERIA.items():
        cells: list[object] = [title]
        for weights in labels:
            index = best(found, f"{name}/{weights}")
            values = [row[index] for row in found["criteria"][f"{name}/{weights}"]["test"]]
            cells += [percent(values), f"{100 * chosen['kept'][index]:.3g} %"]
        rows.append(cells)
    by_criterion = Table(
        "Supermasks by criterion: test accuracy of untrained weights, %",
        ["criterion", "initial weights", "kept", "signed constant ±α", "kept"],
        rows,
        [
            f"mean ± standard deviation over {seeds}; share kept: the best of {len(chosen['kept'])} on validation "
            f"images; no mask: {percent(found['untrained'])}; trained weights: {percent(found['trained'])}",
            f"the paper, on all of MNIST: up to {PAPER['criterion']:g} %",
            *notes,
        ],
    )
    learned_rows: list[list[object]] = [
        [
            name,
            percent(row["test"]),
            percent(row["expected"]),
            percent(row["likely"]),
            f"{100 * statistics.fmean(row['kept']):.1f} %",
            PAPER.get(name),
        ]
        for name, row in found["learned"].items()
    ]
    learned_rows.append(["trained weights, no mask", percent(found["trained"]), None, None, None, None])
    by_learning = Table(
        "Learned supermasks: test accuracy of untrained weights, %",
        ["mask", "drawn", "expected", "likeliest", "kept", "paper"],
        learned_rows,
        [
            f"mean ± standard deviation over {seeds}; drawn: the mean of {chosen['samples']} masks for each seed; "
            f"{chosen['mask_epochs']} epochs; weights trained for {chosen['epochs']}",
            "expected: weights times their probability; likeliest: kept where that is at least one half",
            "the paper: all of MNIST",
            *notes,
        ],
    )
    return [by_criterion, by_learning]


def figures(found: dict[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy against weights kept by criterion, bars of the best of each kind, and the learning of masks."""
    return [
        (
            "supermask-criteria",
            "Test accuracy of an untrained network under masks, against the share of weights that they keep.",
            _curves(found),
        ),
        ("supermask-bars", "The best supermask of each kind; lines: no mask, and trained weights.", _bars(found)),
        ("supermask-learning", "Validation accuracy under drawn masks while they are learned.", _learning(found)),
    ]


def _curves(found: dict[str, Any]) -> Figure:
    from slimtorch.experiments.plots import band, new_figure

    figure, axes = new_figure(2, height=4.4, width=5.4)
    x = [100 * share for share in found["plan"]["kept"]]
    for axis, (label, weights) in zip(axes, WEIGHTS.items(), strict=True):
        for name, (title, color, line) in CRITERIA.items():
            rows = [[100 * v for v in values] for values in found["criteria"][f"{name}/{weights}"]["test"]]
            band(axis, x, rows, title, color, linestyle=line, marker="o", markersize=3)
        axis.axhline(10, color="black", linewidth=1, linestyle="--", label="chance")
        axis.set_ylim(0, 100)
        axis.invert_xaxis()
        axis.set_xlabel("weights kept, %")
        axis.set_title("initial weights" if label == "initial" else "signed constant ±α", fontsize=10)
    axes[0].set_ylabel("test accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _bars(found: dict[str, Any]) -> Figure:
    from slimtorch.experiments.plots import COLORS, new_figure

    figure, (axis,) = new_figure(1, height=4.4, width=8.4)
    bars: list[tuple[str, list[float], str]] = []
    for name, title in (("random", "random"), ("large_final", "large final"), ("large_final_same_sign", "same sign")):
        for label, weights in WEIGHTS.items():
            index = best(found, f"{name}/{weights}")
            values = [row[index] for row in found["criteria"][f"{name}/{weights}"]["test"]]
            bars.append((title + ("\n±α" if label == "±α" else ""), values, COLORS[4 if name == "random" else 1]))
    for name, row in found["learned"].items():
        bars.append((name.replace(", ", "\n"), row["test"], COLORS[3 if name.startswith("scores") else 2]))
    for position, (_, values, color) in enumerate(bars):
        error = 100 * statistics.stdev(values) if len(values) > 1 else 0
        axis.bar(position, 100 * statistics.fmean(values), 0.7, yerr=error, color=color, capsize=3)
        axis.text(position, 2, f"{100 * statistics.fmean(values):.1f}", ha="center", fontsize=8)
    axis.axhline(100 * statistics.fmean(found["trained"]), color="black", linewidth=1)
    axis.axhline(100 * statistics.fmean(found["untrained"]), color="black", linewidth=1, linestyle="--")
    axis.set_xticks(range(len(bars)), [label for label, _, _ in bars], fontsize=7.5)
    axis.set_ylim(0, 100)
    axis.set_ylabel("test accuracy, %")
    return figure


def _learning(found: dict[str, Any]) -> Figure:
    from slimtorch.experiments.plots import COLORS, band, new_figure

    figure, (axis,) = new_figure(1, height=4.2, width=6.4)
    for (name, row), color in zip(found["learned"].items(), COLORS, strict=False):
        rows = [[100 * value for value in values] for values in row["validation"]]
        band(axis, range(len(rows[0])), rows, name, color)
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation accuracy, % (one drawn mask)")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


EXPERIMENT = Experiment(
    name="supermask",
    about="masks that make an untrained network work: by criterion, and learned",
    paper="arXiv 1905.01067",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
