# SPDX-License-Identifier: Apache-2.0
"""Weight-agnostic networks (Gaier & Ha, 1906.04358): topologies searched for that work with any shared weight.

Two tasks: swinging up a pole on a cart, and classifying digits scaled down to 8 x 8 pixels. After the search, the
network found and random topologies of its size are tried with random weights, with shared ones, and with tuned ones.

Small beside the paper: 192 topologies and some hundred generations, there 192 and 1,024 (cart-pole), 960 and 4,096
(MNIST at 16 x 16 pixels). ``--data mnist`` takes all of MNIST; the search, which sees a batch per generation, takes as
long, so its length is a matter of `Plan`: raise its generations, populations and `size` for the paper's scale.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimtorch.data import Digits, load
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.machine import describe
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.prune import weight_agnostic as wa
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # raise it when the code below, or that of the search, gives other results
TASKS = {"swing-up": "cart-pole swing-up", "digits": "digits, 8 x 8"}
WAYS = {
    "random": "random weights",
    "shared": "shared weight, mean",
    "best": "shared weight, best",
    "tuned": "tuned weights",
}
# The paper, in percent: table 1 (swing-up, of a reward of 1,000 at most) and the table of section 5 (MNIST).
PAPER = {
    "swing-up": {
        "found": {"random": "5.7", "shared": "51.5", "best": "72.3", "tuned": "93.2"},
        "control": {"random": "2.1", "shared": "0.7", "best": "0.8", "tuned": "91.8"},
    },
    "digits": {"found": {"random": "-", "shared": "82.0", "best": "91.9", "tuned": "94.2"}},
}


@dataclass(frozen=True)
class Plan:
    """All numbers of a run.

    Attributes:
        seeds: searches of each task.
        search: task name → fields of `slim.prune.weight_agnostic.Config` that are not the default.
        size, batch: pixels along a side of the small images; images per generation.
        episodes, held_out: starts of the cart-pole per generation; of validation and test.
        controls: random topologies per search, with as many hidden nodes and connections as the network found.
        draws: of random weights, for each topology.
        steps, rate: of Adam on each topology's weights (digits).
        rounds, candidates: of the population search for weights (swing-up).
        grid: shared weights from -3 to 3 that the curves have.
    """

    seeds: int = 5
    search: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "swing-up": {"population": 192, "generations": 120, "operators": 2, "tournament": 4},
            "digits": {"population": 192, "generations": 320, "operators": 3, "tournament": 16, "begin": 0.05},
        }
    )
    size: int = 8
    batch: int = 100
    episodes: int = 1
    held_out: int = 16
    controls: int = 3
    draws: int = 32
    steps: int = 1500
    rate: float = 0.02
    rounds: int = 25
    candidates: int = 48
    grid: int = 49


def plan(settings: Settings) -> Plan:
    """Quick or full."""
    if not settings.quick:
        return Plan(seeds=settings.seeds or 5)
    search: dict[str, dict[str, Any]] = {
        "swing-up": {"population": 64, "generations": 30, "operators": 2, "tournament": 4},
        "digits": {"population": 96, "generations": 60, "operators": 3, "tournament": 16, "begin": 0.05},
    }
    return Plan(seeds=settings.seeds or 1, search=search, held_out=4, controls=1, draws=8, steps=150, rounds=8, grid=13)


def config(settings: Settings) -> dict[str, Any]:
    """What will be done, JSON-ready."""
    return asdict(plan(settings))


def _task(config: Mapping[str, Any], data: Digits) -> wa.SwingUp | wa.Classification:
    if config["task"] == "swing-up":
        return wa.SwingUp(config["episodes"], held_out=config["held_out"])
    return wa.Classification(data, config["size"], config["batch"])


def _search(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    began = time.monotonic()
    found = wa.search(_task(config, data), wa.Config(**config["search"]), seed=config["seed"])
    result = {"best": found.best.to_dict(), "validation": found.validation, "history": found.history}
    return Record({**result, "seconds": time.monotonic() - began})


def _weigh(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The network found, then random topologies of its size, under all four kinds of weights."""
    began = time.monotonic()
    task, seed = _task(config, data), config["seed"]
    settings = wa.Config(**config["search"])
    best = wa.Genome.from_dict(needed[0].result["best"])
    genomes = [best]
    for index in range(config["controls"]):
        rng = np.random.default_rng([seed, index])
        genomes.append(wa.grown(best.inputs, best.outputs, best.hidden, best.size, settings.begin, rng))
    grid = torch.linspace(-3, 3, config["grid"])
    shared, one = torch.tensor(settings.shared), torch.ones(1)
    inside = grid[grid.abs() <= 2]

    def validate(weights: torch.Tensor) -> torch.Tensor:
        if isinstance(task, wa.Classification):
            return task.accuracy(genomes, weights, "validation")
        return task.validate(genomes, weights)

    chosen = inside[validate(inside).argmax(1)]
    under_chosen = task.test(genomes, chosen)
    kinds: dict[str, list[float]] = {
        "shared": task.test(genomes, shared).mean(1).tolist(),
        "best": under_chosen.diagonal().tolist(),
        "random": [],
    }
    for index, genome in enumerate(genomes):
        drawn = wa.random_weights(genome, config["draws"], 1000 * seed + index)
        kinds["random"].append(float(task.test([genome] * len(drawn), one, drawn).mean()))
    if isinstance(task, wa.Classification):
        train = task.part("train")
        tuned = [
            wa.tune_by_gradient(
                genome, train.images, train.labels, start=float(weight), steps=config["steps"], rate=config["rate"],
                seed=seed,
            )
            for genome, weight in zip(genomes, chosen, strict=True)
        ]  # fmt: skip
    else:
        tuned = wa.tune_by_population(
            genomes, task.rewards, start=chosen.tolist(), rounds=config["rounds"], population=config["candidates"],
            seed=seed,
        )  # fmt: skip
    kinds["tuned"] = task.test(genomes, one, tuned)[:, 0].tolist()
    balance: dict[str, list[float]] = {}
    if isinstance(task, wa.SwingUp):
        balance = {
            "shared": task.balance(genomes, shared).mean(1).tolist(),
            "best": task.balance(genomes, chosen).diagonal().tolist(),
            "tuned": task.balance(genomes, one, tuned)[:, 0].tolist(),
        }
    curve = task.test(genomes, grid)
    return Record({
        "balance": balance,
        "kinds": kinds, "chosen": chosen.tolist(), "grid": grid.tolist(), "curves": curve.tolist(),
        "hidden": best.hidden, "size": best.size, "seconds": time.monotonic() - began,
    })  # fmt: skip


def trials(plan: Plan) -> dict[str, list[Trial]]:
    """Task → for each seed the trial that weighs what its search found."""
    every: dict[str, list[Trial]] = {}
    for task in TASKS:
        for seed in range(plan.seeds):
            base = {"version": VERSION, "task": task, "seed": seed, "search": dict(plan.search[task])}
            if task == "swing-up":
                base |= {"episodes": plan.episodes, "held_out": plan.held_out}
            else:
                base |= {"size": plan.size, "batch": plan.batch}
            search = Trial(f"search-{task}-seed{seed}", _search, base)
            tuning = {"rounds": plan.rounds, "candidates": plan.candidates}
            if task == "digits":
                tuning = {"steps": plan.steps, "rate": plan.rate}  # type: ignore[dict-item]
            more = {**base, **tuning, "controls": plan.controls, "draws": plan.draws, "grid": plan.grid}
            every.setdefault(task, []).append(Trial(f"weights-{task}-seed{seed}", _weigh, more, (search,)))
    return every


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Searches, weighs, and tells what came of it."""
    numbers = plan(settings)
    data, what = load(settings.data, settings.quick)
    weighed = trials(numbers)
    # seed after seed: an interrupted run has both tasks
    flat = [trial for pair in zip(*weighed.values(), strict=True) for trial in pair]
    every = [part for trial in flat for part in (*trial.needs, trial)]
    records = run_all(every, data, out, settings, progress, "search")
    found: dict[str, Any] = {
        "experiment": "weight-agnostic", "data": what, "plan": asdict(numbers), "machine": describe(settings.threads),
        "tasks": {},
    }  # fmt: skip
    for task, ends in weighed.items():
        found["tasks"][task] = [_rounded(records[e.needs[0].name], records[e.name]) for e in ends]
    lead = (
        "Topologies searched for that work with one weight shared by all connections, whatever it is, at small scale: "
        f"a cart-pole swing-up, and {what} scaled down to {numbers.size} x {numbers.size} pixels. Beside each network "
        "found stand random topologies with as many hidden nodes and connections, made by the same operators without "
        "selection."
    )
    return Result("Weight-agnostic networks", lead, tables(found), figures(found), found)


def _rounded(search: Record, weighed: Record) -> dict[str, Any]:
    """One seed, JSON-ready."""
    history = search.result["history"]
    step = max(1, len(history["best_mean"]) // 40)
    kept = {name: [round(v, 4) for v in history[name][::step]] for name in ("best_mean", "median_mean", "size")}
    return {
        "best": search.result["best"],
        "history": {
            "generations": list(range(0, len(history["best_mean"]), step)),
            **kept,
            "validated": history["validated"],
            "validation": [round(v, 4) for v in history["validation"]],
        },
        "kinds": {name: [round(v, 4) for v in values] for name, values in weighed.result["kinds"].items()},
        "balance": {name: [round(v, 4) for v in values] for name, values in weighed.result["balance"].items()},
        "chosen": [round(v, 3) for v in weighed.result["chosen"]],
        "grid": [round(v, 4) for v in weighed.result["grid"]],
        "curves": [[round(v, 4) for v in row] for row in weighed.result["curves"]],
        "hidden": weighed.result["hidden"],
        "size": weighed.result["size"],
        "seconds": [round(search.result["seconds"], 1), round(weighed.result["seconds"], 1)],
    }


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The four kinds of weights, for the networks found and for random topologies; and who balances."""
    rows: list[list[object]] = []
    for task, seeds in found["tasks"].items():
        for which, label in (("found", "found"), ("control", "random topology")):
            cells = [percent(_of(which, [seed["kinds"][way] for seed in seeds])) for way in WAYS]
            rows.append([TASKS[task], label, *cells])
        for which, label in (("found", "paper: found"), ("control", "paper: fixed topology")):
            if which in PAPER[task]:
                rows.append([TASKS[task], label, *(PAPER[task][which][way] for way in WAYS)])
    sizes = [
        f"{TASKS[task]}, found: {', '.join(str(s['size']) for s in seeds)} connections, "
        f"{', '.join(str(s['hidden']) for s in seeds)} hidden nodes"
        for task, seeds in found["tasks"].items()
    ]
    shared = ", ".join(f"{value:g}" for value in wa.Config().shared)
    count = over_seeds(found["plan"]["seeds"])
    notes = [
        f"swing-up: % of the highest reward; digits: % of test images right; {count}",
        f"random weights: uniform in [-2, 2]; shared, mean: over {shared}; shared, best: chosen on validation",
        f"random topologies: {found['plan']['controls']} per seed, as many connections and nodes as the network found",
        *sizes,
        "the paper: swing-up 1,024 generations; MNIST at 16 x 16 pixels, 960 networks, 4,096 generations",
    ]
    title = "Weight-agnostic networks: one topology, four kinds of weights"
    swing = found["tasks"]["swing-up"]
    ways = ("shared", "best", "tuned")
    upright: list[list[object]] = [
        [label, *(percent(_of(which, [seed["balance"][way] for seed in swing])) for way in ways)]
        for which, label in (("found", "found"), ("control", "random topology"))
    ]
    explained = (
        f"% of the last 2 s of {found['plan']['held_out']} test episodes with the pole within 26° of upright "
        "(evenly turning round: 14)"
    )
    return [
        Table(title, ["task", "topology", *WAYS.values()], rows, notes),
        Table("Cart-pole: is it balanced?", ["topology", *(WAYS[way] for way in ways)], upright, [explained, count]),
    ]


def _of(which: str, seeds: Sequence[Sequence[float]]) -> list[float]:
    """Per seed: the value of the network found, or the mean over its random topologies."""
    return [values[0] if which == "found" else _mean(values[1:]) for values in seeds]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Against the shared weight, against generations, and the networks themselves."""
    return [
        ("weight-agnostic-shared", "Performance against the weight that all connections share, mean ± one standard "
         "deviation over seeds; the search saw the six weights marked.", _curves(found)),
        ("weight-agnostic-search", "The best topology known by generation: mean validation reward over the shared "
         "weights. A pale line for each seed.", _generations(found)),
        ("weight-agnostic-networks", "The best network of each task over all seeds, inputs on the left; pixels that "
         "are not connected are white.", _networks(found)),
    ]  # fmt: skip


def _curves(found: Mapping[str, Any]) -> Figure:
    from slimtorch.experiments.plots import COLORS, band, new_figure

    figure, axes = new_figure(2)
    for axis, (task, seeds) in zip(axes, found["tasks"].items(), strict=True):
        grid = seeds[0]["grid"]
        axis.axvspan(-2, 2, color="#000000", alpha=0.04, linewidth=0)
        for weight in wa.Config().shared:
            axis.axvline(weight, color="#999999", linewidth=0.8, linestyle=":")
        rows = [[100 * v for v in s["curves"][0]] for s in seeds]
        band(axis, grid, rows, "found", COLORS[0])
        controls = [[100 * _mean(column) for column in zip(*s["curves"][1:], strict=True)] for s in seeds]
        band(axis, grid, controls, "random topologies of the same size", COLORS[2])
        axis.set_title(TASKS[task], fontsize=10)
        axis.set_xlabel("shared weight")
        axis.set_ylabel("reward, % of the highest" if task == "swing-up" else "test accuracy, %")
        axis.set_ylim(0, None)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _generations(found: Mapping[str, Any]) -> Figure:
    from slimtorch.experiments.plots import COLORS, band, new_figure

    figure, axes = new_figure(2)
    for axis, (task, seeds) in zip(axes, found["tasks"].items(), strict=True):
        factor = 100 if task == "swing-up" else -1
        looks = seeds[0]["history"]["validated"]
        rows = [[factor * v for v in s["history"]["validation"]] for s in seeds]
        for row in rows:
            axis.plot(looks, row, color=COLORS[0], linewidth=0.7, alpha=0.4)
        band(axis, looks, rows, "best so far", COLORS[0])
        axis.set_title(TASKS[task], fontsize=10)
        axis.set_xlabel("generation")
        axis.set_ylabel("reward, % of the highest" if task == "swing-up" else "cross-entropy")
    return figure


def _networks(found: Mapping[str, Any]) -> Figure:
    from slimtorch.experiments.plots import new_figure

    figure, axes = new_figure(2, height=6.4, width=7.0)
    for axis, (task, seeds) in zip(axes, found["tasks"].items(), strict=True):
        best = max(seeds, key=lambda s: s["history"]["validation"][-1])
        genome = wa.Genome.from_dict(best["best"])
        if task == "swing-up":
            wa.draw(axis, genome, inputs=["x", "dx/dt", "cos θ", "sin θ", "dθ/dt"], outputs=["force"])
        else:
            side = found["plan"]["size"]
            grid = (side, side) if genome.inputs == side * side else None  # colours: three of them
            wa.draw(axis, genome, grid=grid)
        shared = 100 * best["kinds"]["shared"][0]
        title = f"{TASKS[task]}: {genome.size} connections, {genome.hidden} hidden nodes, {shared:.1f} % (shared, mean)"
        axis.set_title(title, fontsize=10)
    return figure


EXPERIMENT = Experiment(
    name="weight-agnostic",
    about="topologies that classify and balance with any shared weight",
    paper="arXiv 1906.04358",
    config=config,
    run=run,
)
