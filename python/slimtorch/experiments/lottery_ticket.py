# SPDX-License-Identifier: Apache-2.0
"""Lottery tickets on digits: LeNet-300-100, iterative magnitude pruning, rewinding, controls (Frankle & Carbin, arXiv
1803.03635, figures 1, 3 and 4; late rewinding: Frankle et al., arXiv 1903.01611).

The paper's settings as they are: Glorot normal weights, Adam with rate 1.2e-3, batches of 60, each round removes 20 %
of a layer's weights (10 % of the last one's), then all weights go back to where they started. Only the number of
iterations fits the data: the paper's 50,000 with ``slimtorch experiment lottery-ticket --data mnist``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from slimtorch.data import Digits, load
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.loop import Curve, evaluate, fit
from slimtorch.experiments.machine import describe
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.models import LeNet300
from slimtorch.prune.lottery import Ticket, _state, early_stop, rates_of
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # raise it when a trial would give another record
NEAR = 1.1  # times the dense network's least loss: a level that one lucky validation does not decide
TITLES = {
    "ticket": "winning ticket, reset to iteration 0",
    "late": "winning ticket, rewound to iteration k",
    "reinit": "its mask, weights drawn anew",
    "random": "its weights, random mask",
}
_STYLE: dict[str, dict[str, Any]] = {
    "ticket": {"color": "#0072B2", "marker": "o"},
    "late": {"color": "#009E73", "marker": "^"},
    "reinit": {"color": "#E69F00", "marker": "s"},
    "random": {"color": "#CC79A7", "marker": "v"},
}


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        seeds: of weights and of the order of images.
        steps: iterations of each training; well past the dense network's early stop.
        rounds: prunings of the tickets.
        controls: rounds at which weights are drawn anew, and at which masks are random.
        rewind: iteration of the dense training that late rewinding goes back to.
        late_rounds: prunings with late rewinding; a chain of its own.
        every: iterations between validations.
        batch_size, rate: of Adam.
        linear, output: share of what remains that a round removes, hidden layers and the last.
        shown: rounds in the first table, and whose course is drawn; 0 is the dense network.
    """

    seeds: int
    steps: int
    rounds: int
    controls: tuple[int, ...]
    rewind: int
    late_rounds: int
    every: int = 10
    batch_size: int = 60
    rate: float = 1.2e-3
    linear: float = 0.2
    output: float = 0.1
    shown: tuple[int, ...] = (0, 4, 7, 9, 17)


def plan(settings: Settings) -> Plan:
    """Embedded digits: 3,500 images, on which the dense network is best after some 400 iterations. The paper's 50,000
    iterations of full data sets, validated every 100."""
    if settings.quick:
        steps, every = (250, 10) if settings.data is None else (2_000, 50)
        return Plan(settings.seeds or 2, steps, 9, (7, 9), 40, 0, every=every, shown=(0, 7, 9))
    if settings.data is not None:
        return Plan(settings.seeds or 5, 50_000, 20, tuple(range(1, 21)), 500, 20, every=100)
    return Plan(settings.seeds or 5, 1_000, 17, (4, 7, 9, 17), 60, 9)


def config(settings: Settings) -> dict[str, Any]:
    """The plan, JSON-ready."""
    return asdict(plan(settings))


def trials_of(plan: Plan) -> list[Trial]:
    """Seed after seed: the dense network, the tickets one after another, each followed by its controls."""
    basis = {"version": VERSION, **{key: getattr(plan, key) for key in (
        "steps", "every", "batch_size", "rate", "linear", "output", "rewind")}}  # fmt: skip
    trials: list[Trial] = []

    def add(kind: str, seed: int, index: int, *needs: Trial) -> Trial:
        name = f"{kind}-seed{seed}" + (f"-round{index:02d}" if index else "")
        trial = Trial(name, train_ticket, {**basis, "kind": kind, "seed": seed, "round": index}, needs)
        trials.append(trial)
        return trial

    for seed in range(plan.seeds):
        dense = ticket = late = add("dense", seed, 0)
        for index in range(1, max(plan.rounds, plan.late_rounds) + 1):
            before = ticket
            if index <= plan.rounds:
                ticket = add("ticket", seed, index, before)
                for kind in ("reinit", "random") if index in plan.controls else ():
                    add(kind, seed, index, before)
            if index <= plan.late_rounds:
                late = add("late", seed, index, late, dense)
    return trials


def network(seed: int, shape: Sequence[int]) -> nn.Module:
    """LeNet-300-100 for such images, Glorot normal weights and no biases (section 2 of the paper)."""
    torch.manual_seed(seed)
    model = LeNet300()
    if (inputs := torch.Size(shape).numel()) != 784:
        model.fc1 = nn.Linear(inputs, 300)
    for layer in (model.fc1, model.fc2, model.fc3):
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def train_ticket(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """One training: the dense network, a ticket, or a control.

    ``needed`` is the trained network that the mask comes from, and for late rewinding the dense one. The record holds
    the course on validation images, test accuracy at the early stop and at the end, and where a next round may follow,
    its mask (bits) and, of the dense network, the weights after ``rewind`` iterations.
    """
    kind, seed, index = config["kind"], config["seed"], config["round"]
    shape = data.train.images.shape[1:]
    model = network(seed, shape)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    rates = rates_of(model, linear=config["linear"], output=config["output"])
    begin = 0
    if kind == "dense":
        layers = {name: torch.ones_like(model.get_parameter(f"{name}.weight"), dtype=torch.bool) for name in rates}
        ticket = Ticket(0, 0, layers, start)
    else:
        ticket = Ticket(index, 0, _unpacked(needed[0], model, rates), start)
        if kind == "reinit":
            ticket = ticket.with_start(network(10_000 + 1000 * seed + index, shape))
        elif kind == "random":
            ticket = ticket.shuffled(1000 * seed + index)
        elif kind == "late":
            begin = config["rewind"]
            weights = needed[1].arrays
            ticket = replace(ticket, step=begin, start={k: torch.from_numpy(weights[f"early:{k}"]) for k in start})
        ticket.apply_(model)

    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"], fused=True)
    watch = _Watch(model, data, begin, config["every"], config["steps"], config["rewind"] if kind == "dense" else None)
    fit(
        model, data, optimizer, steps=config["steps"], batch_size=config["batch_size"], seed=seed, start=begin,
        after_step=watch,
    )  # fmt: skip
    curve = watch.curve
    result = {
        "remaining": ticket.remaining,
        "stop": early_stop(curve.steps, curve.loss),
        "stop_loss": min(curve.loss),
        "stop_accuracy": watch.test_at_best,
        "end_accuracy": evaluate(model, data.test)[1],
        "steps": curve.steps,
        "loss": [round(value, 5) for value in curve.loss],
        "accuracy": [round(value, 5) for value in curve.accuracy],
    }
    arrays: dict[str, np.ndarray] = {}
    if kind in ("dense", "ticket", "late"):
        following = replace(ticket, final=_state(model)).pruned(rates)
        arrays |= {f"next:{name}": np.packbits(mask.numpy()) for name, mask in following.masks.items()}
    arrays |= {f"early:{key}": value.numpy() for key, value in watch.early.items()}
    return Record(result, arrays)


class _Watch:
    """Called after each iteration: validates, and looks at the test images where validation was best so far.

    What the test images say decides nothing; looking at once spares a copy of the weights.
    """

    def __init__(
        self, model: nn.Module, data: Digits, begin: int, every: int, steps: int, early_at: int | None
    ) -> None:
        self.model, self.data, self.step, self.every, self.steps = model, data, begin, every, steps
        self.early_at = early_at
        self.early: dict[str, Tensor] = {}
        self.curve = Curve()
        self.test_at_best = 0.0
        self._look()

    def __call__(self) -> None:
        self.step += 1
        self._look()

    def _look(self) -> None:
        if self.step == self.early_at:
            self.early = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        if self.step % self.every and self.step != self.steps:
            return
        loss, accuracy = evaluate(self.model, self.data.validation)
        if not self.curve.loss or loss < min(self.curve.loss):
            self.test_at_best = evaluate(self.model, self.data.test)[1]
        self.curve.steps.append(self.step)
        self.curve.loss.append(loss)
        self.curve.accuracy.append(accuracy)


def _unpacked(record: Record, model: nn.Module, names: Mapping[str, float]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        bits = np.unpackbits(record.arrays[f"next:{name}"], count=weight.numel())
        found[name] = torch.from_numpy(bits.astype(bool)).view(weight.shape)
    return found


# --- what came of it --------------------------------------------------------------------------------------------------


def gather(plan: Plan, records: Mapping[str, Record]) -> dict[str, Any]:
    """``points``: each kind of network and round with the figures of every seed; ``curves``: the course of some."""
    points: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    dense = [records[f"dense-seed{seed}"].result for seed in range(plan.seeds)]
    kinds = [("dense", 0)]
    for index in range(1, max(plan.rounds, plan.late_rounds) + 1):
        kinds += [(kind, index) for kind in TITLES if f"{kind}-seed0-round{index:02d}" in records]
    for kind, index in kinds:
        name = f"-round{index:02d}" if index else ""
        runs = [records[f"{kind}-seed{seed}{name}"].result for seed in range(plan.seeds)]
        points.append({
            "kind": kind, "round": index, "remaining": round(runs[0]["remaining"], 5),
            "stop": [run["stop"] for run in runs],
            "stop_loss": [round(run["stop_loss"], 4) for run in runs],
            "reach": [_reach(run, base["stop_loss"]) for run, base in zip(runs, dense, strict=True)],
            "near": [_reach(run, NEAR * base["stop_loss"]) for run, base in zip(runs, dense, strict=True)],
            "stop_accuracy": [round(run["stop_accuracy"], 5) for run in runs],
            "end_accuracy": [round(run["end_accuracy"], 5) for run in runs],
        })  # fmt: skip
        if index in plan.shown and kind in ("dense", "ticket", "reinit"):
            curves.append({
                "kind": kind, "round": index, "remaining": round(runs[0]["remaining"], 5), "steps": runs[0]["steps"],
                **{key: [[round(v, 4) for v in run[key]] for run in runs] for key in ("loss", "accuracy")},
            })  # fmt: skip
    return {"points": points, "curves": curves}


def _reach(run: Mapping[str, Any], level: float) -> int | None:
    """The first validation with a loss no larger than ``level``; None: never."""
    return next((step for step, loss in zip(run["steps"], run["loss"], strict=True) if loss <= level + 1e-5), None)


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train the dense networks, the tickets and their controls, and tell what came of them."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    records = run_all(trials_of(chosen), data, out, settings, progress)
    found: dict[str, Any] = {
        "experiment": "lottery-ticket", "data": what, "plan": asdict(chosen), "machine": describe(settings.threads),
        **gather(chosen, records),
    }  # fmt: skip
    lead = (
        f"LeNet-300-100 trained on {what}, pruned round after round by magnitude; after each round its weights go back "
        "to where they started. If the lottery ticket hypothesis holds, what is left learns at least as fast and as "
        "well as the dense network, and faster than the same mask over other weights. Early stop: the iteration of "
        "least validation loss. The test images are used for nothing but the figures."
    )
    return Result("Lottery tickets on digits", lead, tables(found), figures(found), found)


def _point(found: Mapping[str, Any], kind: str, index: int) -> dict[str, Any] | None:
    return next((p for p in found["points"] if (p["kind"], p["round"]) == (kind, index)), None)


def _whole(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.0f}{deviation}"


def _names(found: Mapping[str, Any]) -> dict[str, str]:
    late = f"ticket, rewound to {found['plan']['rewind']}"
    return {"dense": "dense", "ticket": "ticket", "late": late, "reinit": "drawn anew", "random": "random mask"}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Of the content of results.json: all networks at some rounds, differences within a seed, iterations to a loss."""
    plan = found["plan"]
    rows: list[list[object]] = []
    for index in plan["shown"]:
        for kind, name in _names(found).items():
            point = _point(found, kind, index)
            if point is not None:
                rows.append([
                    f"{100 * point['remaining']:.1f}", name, _whole(point["stop"]),
                    f"{statistics.fmean(point['stop_loss']):.3f}", percent(point["stop_accuracy"]),
                    percent(point["end_accuracy"]),
                ])  # fmt: skip
    main = Table(
        "Lottery tickets: iterative magnitude pruning of LeNet-300-100",
        ["weights, %", "network", "early stop", "loss", "test at stop, %", "test at end, %"],
        rows,
        [
            f"{plan['steps']:,} iterations, batch {plan['batch_size']}, Adam {plan['rate']:g}; mean ± standard "
            f"deviation over {over_seeds(plan['seeds'])}; trained on {found['data']}",
            f"early stop: iteration of least validation loss (every {plan['every']}), and that loss; drawn anew: the "
            "ticket's mask, other weights; random mask: the ticket's weights, as many kept in each layer",
        ],
    )
    return [main, _paired(found), _levels_reached(found)]


def _paired(found: Mapping[str, Any]) -> Table:
    rows: list[list[object]] = []
    for index in sorted({7, 9, found["plan"]["controls"][-1]}):
        ticket = _point(found, "ticket", index)
        for kind, label in _names(found).items():
            other = _point(found, kind, 0 if kind == "dense" else index)
            if ticket is None or other is None or kind == "ticket":
                continue
            stops = [a - b for a, b in zip(ticket["stop"], other["stop"], strict=True)]
            right = [100 * (a - b) for a, b in zip(ticket["stop_accuracy"], other["stop_accuracy"], strict=True)]
            deviation = f" ± {statistics.stdev(right):.2f}" if len(right) > 1 else ""
            rows.append([
                f"{100 * ticket['remaining']:.1f}", label, _whole(stops),
                f"{sum(s < 0 for s in stops)} of {len(stops)}",
                f"{statistics.fmean(other['stop']) / statistics.fmean(ticket['stop']):.2f}x",
                f"{statistics.fmean(right):+.2f}{deviation}",
            ])  # fmt: skip
    return Table(
        "The winning ticket less another network, within each seed",
        ["weights, %", "against", "early stop", "sooner in", "faster", "test at stop, points"],
        rows,
        [
            "faster: ratio of the mean early stops. The paper, all of MNIST, 21.1 % of weights: stops 38 % sooner than "
            "dense (1.6x), and 2.5x faster than weights drawn anew",
        ],
    )


def _levels_reached(found: Mapping[str, Any]) -> Table:
    steps = found["plan"]["steps"]
    dense = _point(found, "dense", 0)
    assert dense is not None
    rows: list[list[object]] = []
    for index in sorted({0, 7, 9, found["plan"]["controls"][-1]}):
        for kind, name in _names(found).items():
            point = _point(found, kind, index)
            if point is None:
                continue
            row: list[object] = [f"{100 * point['remaining']:.1f}", name]
            for key in ("reach", "near"):
                own, base = ([steps if v is None else v for v in p[key]] for p in (point, dense))
                never = point[key].count(None)
                row.append("never" if never == len(own) else (">= " if never else "") + _whole(own))
                row.append(f"{len(own) - never} of {len(own)}")
                sooner = sum(a < b for a, b in zip(own, base, strict=True))
                row.append(None if kind == "dense" else f"{sooner} of {len(own)}")
            rows.append(row)
    return Table(
        "Iterations until the validation loss is as low as the dense network's least, of the same seed",
        ["weights, %", "network", "dense's loss", "ever", "sooner", f"{NEAR:g} x that", "ever", "sooner"],
        rows,
        [
            "ever: in how many seeds; sooner: in how many before the dense network itself; where it never is, "
            f"{steps:,} iterations are counted. The least of some hundred noisy validations is a lucky one, so "
            f"{NEAR:g} times that loss stands beside it",
        ],
    )


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Of the content of results.json: the paper's figures 1 and 4, and 3."""
    captions = [
        (
            "lottery-ticket-curve",
            "Early stop and test accuracy against weights that remain; dotted: the dense network. Bars: standard "
            "deviation over seeds. As figures 1 and 4 of the paper.",
            _levels,
        ),
        (
            "lottery-ticket-training",
            "Validation while training, mean over seeds: tickets, and the same masks over weights drawn anew (dashed). "
            "As figure 3 of the paper.",
            _courses,
        ),
    ]
    return [(name, caption, draw(found)) for name, caption, draw in captions]


def _levels(found: Mapping[str, Any]) -> Figure:
    from slimtorch.experiments.plots import new_figure, plain_ticks

    figure, axes = new_figure(3, width=4.4)
    dense = _point(found, "dense", 0)
    assert dense is not None
    panels = [("stop", "early stop, iteration", 1), ("stop_accuracy", "test accuracy at early stop, %", 100),
              ("end_accuracy", f"test accuracy after {found['plan']['steps']:,} iterations, %", 100)]  # fmt: skip
    for axis, (key, label, factor) in zip(axes, panels, strict=True):
        axis.axhline(factor * statistics.fmean(dense[key]), color="black", linewidth=1, linestyle=":")
        for shift, kind in enumerate(_STYLE):
            points = [dense, *(point for point in found["points"] if point["kind"] == kind)]
            if len(points) == 1:
                continue
            x = [100 * point["remaining"] * (1 + 0.015 * (shift - 1.5)) for point in points]
            y = [factor * statistics.fmean(point[key]) for point in points]
            spreads = [factor * statistics.stdev(p[key]) if len(p[key]) > 1 else 0.0 for p in points]
            style = {"capsize": 2, "linewidth": 1.4, "elinewidth": 0.7, "markersize": 4, **_STYLE[kind]}
            axis.errorbar(x, y, spreads, label=TITLES[kind], **style)
        axis.set_xscale("log")
        axis.invert_xaxis()
        plain_ticks(axis.xaxis)
        axis.set_xlabel("weights remaining, %")
        axis.set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _courses(found: Mapping[str, Any]) -> Figure:
    from slimtorch.experiments.plots import COLORS, new_figure, plain_ticks

    figure, axes = new_figure(2)
    rounds = sorted({curve["round"] for curve in found["curves"]})
    colors = dict(zip(rounds, ("#000000", *COLORS), strict=False))
    for axis, key, label, factor in (
        (axes[0], "loss", "validation loss", 1),
        (axes[1], "accuracy", "validation accuracy, %", 100),
    ):
        ends = []
        for curve in found["curves"]:
            means = [factor * statistics.fmean(values) for values in zip(*curve[key], strict=True)]
            ends.append((means[0], min(means), max(means)))
            again = curve["kind"] == "reinit"
            name = f"{100 * curve['remaining']:.3g} %" + (", drawn anew" if again else "")
            axis.plot(
                curve["steps"], means, label=name, color=colors[curve["round"]], linewidth=1.0 if again else 1.5,
                linestyle="--" if again else "-",
            )  # fmt: skip
        if key == "loss":
            low = min(end[1] for end in ends)
            axis.set_yscale("log")
            axis.set_ylim(0.93 * low, 3.5 * low)
            plain_ticks(axis.yaxis)
        else:
            top = max(end[2] for end in ends)
            axis.set_ylim(top - 12, top + 0.7)
        axis.set_xlabel("training iterations")
        axis.set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5, frameon=False)
    return figure


EXPERIMENT = Experiment(
    name="lottery-ticket",
    about="pruning round by round with rewinding: winning tickets and their controls",
    paper="arXiv 1803.03635, 1903.01611",
    config=config,
    run=run,
)
