# SPDX-License-Identifier: Apache-2.0
"""Do not prune too much at once: one shot, rounds and a gradual schedule with equally many steps of fine-tuning.

After Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (arXiv 1506.02626, figure 5),
and Zhu & Gupta, "To prune, or not to prune" (arXiv 1710.01878). A trained network loses its smallest weights, ranked
over all layers, and goes on training: equally many steps, whatever the schedule. `--data mnist` uses all of MNIST with
the same number of epochs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtorch.data import Digits, load
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.loop import evaluate
from slimtorch.experiments.machine import describe
from slimtorch.experiments.pruned import TITLES, check_digits, restore, steps_of, train_dense, train_on
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.prune import Cubic, Iterative, Magnitude, OneShot, Pruner, Schedule, prune_
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # raise it when the code below trains differently
SCHEDULES = {"one-shot": "one shot", "iterative": "iterative", "cubic": "gradual (cubic)"}
_COLORS = {"none": "#999999", "one-shot": "#D55E00", "iterative": "#0072B2", "cubic": "#009E73"}


@dataclass(frozen=True)
class Plan:
    """All numbers of the experiment.

    Attributes:
        seeds: of initialisation and order of batches.
        levels: shares of the weights removed.
        epochs: of training before, by network.
        tune_epochs: of fine-tuning in all, pruning included, by network.
        rate: of Adam before.
        tune_rate: of Adam afterwards, constant, by network.
        batch_size: images in a step.
        share: of the fine-tuning, after which the iterative and the cubic schedule prune no more.
        rounds: of the iterative schedule, evenly spaced.
        prunings: of the cubic schedule, evenly spaced.
    """

    seeds: int
    levels: tuple[float, ...]
    epochs: Mapping[str, float]
    tune_epochs: Mapping[str, float]
    tune_rate: Mapping[str, float]
    rate: float = 1.2e-3
    batch_size: int = 60
    share: float = 0.6
    rounds: int = 5
    prunings: int = 30


def plan(settings: Settings) -> Plan:
    """The numbers of a quick or a full run."""
    if settings.quick:
        return Plan(settings.seeds or 2, (0.9, 0.98), {"lenet300": 6}, {"lenet300": 6}, {"lenet300": 1.2e-3})
    levels = (0.9, 0.95, 0.98, 0.99)
    rates = {"lenet300": 1.2e-3, "lenet5": 3e-4}
    return Plan(settings.seeds or 5, levels, {"lenet300": 8, "lenet5": 3}, {"lenet300": 6, "lenet5": 2}, rates)


def _schedule(name: str, steps: int, config: Mapping[str, Any]) -> Schedule:
    """Where in `steps` steps of fine-tuning weights go."""
    if name == "one-shot":
        return OneShot(0)
    if name == "iterative":
        return Iterative.rounds(config["rounds"], max(1, round(config["share"] * steps / (config["rounds"] - 1))))
    end = round(config["share"] * steps)
    return Cubic(0, end, max(1, end // config["prunings"]))


def _dense(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    model, arrays = train_dense(config, data)
    return Record({"test": evaluate(model, data.test)[1]}, arrays)


def _prune(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """One schedule at one level, from the dense network of the same seed."""
    model = restore(config["network"], needed[0])
    magnitude = Magnitude(config["level"], scope="global")
    untrained = copy.deepcopy(model)
    prune_(untrained, magnitude)
    steps = steps_of(config["tune_epochs"], data, config["batch_size"])
    pruner = Pruner(model, magnitude, _schedule(config["schedule"], steps, config))
    curve = train_on(model, data, config, steps=steps, after_step=pruner.step, every=max(1, steps // 20))
    if not pruner.finished:
        raise RuntimeError(f"{config['schedule']}: {steps} steps did not reach the last pruning")
    return Record({
        "test": evaluate(model, data.test)[1],
        "untrained": evaluate(untrained, data.test)[1],
        "steps": curve.steps,
        "validation": curve.accuracy,
    })  # fmt: skip


def _continue(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The control: nothing is pruned, and as many steps follow."""
    model = restore(config["network"], needed[0])
    train_on(model, data, config, steps=steps_of(config["tune_epochs"], data, config["batch_size"]))
    return Record({"test": evaluate(model, data.test)[1]})


def trials(chosen: Plan) -> list[Trial]:
    """All trials; those of one network and seed share the dense network that they begin with."""
    found = []
    for network, epochs in chosen.epochs.items():
        for seed in range(chosen.seeds):
            base = {"version": VERSION, "network": network, "seed": seed, "batch_size": chosen.batch_size}
            dense = Trial(f"{network}-dense-seed{seed}", _dense, {**base, "epochs": epochs, "rate": chosen.rate})
            tune = {**base, "tune_epochs": chosen.tune_epochs[network], "tune_rate": chosen.tune_rate[network]}
            found += [dense, Trial(f"{network}-continued-seed{seed}", _continue, tune, (dense,))]
            for level in chosen.levels:
                for schedule in SCHEDULES:
                    config = {
                        **tune, "level": level, "schedule": schedule, "share": chosen.share,
                        "rounds": chosen.rounds, "prunings": chosen.prunings,
                    }  # fmt: skip
                    found.append(Trial(f"{network}-{schedule}-{level:g}-seed{seed}", _prune, config, (dense,)))
    return found


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train, prune by each schedule, train on, and tell what came of it."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    check_digits(data)
    records = run_all(trials(chosen), data, out, settings, progress)
    networks: dict[str, Any] = {}
    for network in chosen.epochs:
        seeds = range(chosen.seeds)

        def of(schedule: str, level: float, key: str, network: str = network) -> list[Any]:
            return [records[f"{network}-{schedule}-{level:g}-seed{s}"].result[key] for s in range(chosen.seeds)]

        networks[network] = {
            "steps": steps_of(chosen.tune_epochs[network], data, chosen.batch_size),
            "dense": [records[f"{network}-dense-seed{s}"].result["test"] for s in seeds],
            "continued": [records[f"{network}-continued-seed{s}"].result["test"] for s in seeds],
            "untrained": [of("one-shot", level, "untrained") for level in chosen.levels],
            "test": {name: [of(name, level, "test") for level in chosen.levels] for name in SCHEDULES},
            "curve_steps": of("one-shot", chosen.levels[0], "steps")[0],
            "curves": {
                name: [[[round(v, 4) for v in row] for row in of(name, x, "validation")] for x in chosen.levels]
                for name in SCHEDULES
            },
        }
    found: dict[str, Any] = {
        "experiment": "one-shot-vs-iterative", "data": what, "plan": asdict(chosen),
        "machine": describe(settings.threads), "levels": list(chosen.levels), "networks": networks,
    }  # fmt: skip
    lead = (
        f"Trained on {what}; then the smallest weights of all layers together are removed, by three schedules that are "
        "followed by training, with equally many steps in all. Held-out images, at small scale."
    )
    return Result("Do not prune too much at once", lead, tables(found), figures(found), found)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """One per network: a row per schedule, a column per share of weights removed."""
    result = []
    for network, part in found["networks"].items():
        rows: list[list[object]] = [["no training afterwards", *(percent(x) for x in part["untrained"])]]
        rows += [[title, *(percent(x) for x in part["test"][name])] for name, title in SCHEDULES.items()]
        chosen, seeds = found["plan"], len(part["dense"])
        notes = [
            f"dense: {percent(part['dense'])} %, trained on for as many steps: {percent(part['continued'])} %",
            f"mean ± standard deviation over {over_seeds(seeds)}, {found['data']}",
            f"{part['steps']} steps from the first pruning on in every row but the first; {chosen['rounds']} rounds, "
            f"or {chosen['prunings']} gradual steps, in the first {chosen['share']:.0%} of them",
        ]
        columns = ["test accuracy, %", *(f"{level:.0%} removed" for level in found["levels"])]
        result.append(Table(f"{TITLES[network]}: one shot against iterative, equal steps", columns, rows, notes))
    return result


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy lost against weights removed (figure 5 of Han et al.), and the way there at two levels."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from slimtorch.experiments.plots import band, new_figure

    levels = found["levels"]
    x = [1 / (1 - level) for level in levels]
    figure, axes = new_figure(len(found["networks"]))
    for axis, (network, part) in zip(axes, found["networks"].items(), strict=True):
        dense = part["dense"]

        def lost(rows: Sequence[Sequence[float]], dense: Sequence[float] = dense) -> list[list[float]]:
            """Per seed, by level: percent points below the dense network of that seed."""
            return [[100 * (row[seed] - dense[seed]) for row in rows] for seed in range(len(dense))]

        drawn = {name: lost(part["test"][name]) for name in SCHEDULES}
        band(axis, x, lost(part["untrained"]), "no training afterwards", _COLORS["none"], marker="v", linestyle=":")
        for name, title in SCHEDULES.items():
            band(axis, x, drawn[name], title, _COLORS[name], marker="o")
        axis.axhline(0, color="black", linewidth=1)
        more = sum(part["continued"]) - sum(dense)
        axis.axhline(100 * more / len(dense), color="black", linewidth=1, linestyle="--", label="dense, trained on")
        least = min(min(row) for rows in drawn.values() for row in rows)
        axis.set_ylim(least - 1, 1.5)  # what is not trained falls out of sight
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(x))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * (1 - 1 / value):.3g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(TITLES[network], fontsize=10)
        axis.set_xlabel("weights removed, %")
        axis.set_ylabel("test accuracy against dense, points")
    handles, columns = axes[0].get_legend_handles_labels(), 3 if len(axes) == 1 else 5
    figure.legend(*handles, fontsize=8, loc="outside lower center", ncols=columns, frameon=False)

    shown = levels[-2:]
    way, panels = new_figure(len(shown))
    network, part = next(iter(found["networks"].items()))
    for axis, level in zip(panels, shown, strict=True):
        for name, title in SCHEDULES.items():
            rows = [[100 * v for v in row] for row in part["curves"][name][levels.index(level)]]
            band(axis, part["curve_steps"], rows, title, _COLORS[name])
        axis.set_title(f"{TITLES[network]}, {level:.0%} removed", fontsize=10)
        axis.set_xlabel("step of fine-tuning")
        axis.set_ylabel("validation accuracy, %")
        final = [row[-1] for name in SCHEDULES for row in part["curves"][name][levels.index(level)]]
        axis.set_ylim(max(0.0, 100 * min(final) - 15), 100)
    way.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    caption = "Accuracy lost against weights removed, with equally many steps of fine-tuning. Bands: ± 1 sd over seeds."
    return [
        ("one-shot-vs-iterative", caption, figure),
        ("one-shot-vs-iterative-way", "Validation accuracy while pruning and fine-tuning.", way),
    ]


EXPERIMENT = Experiment(
    name="one-shot-vs-iterative",
    about="do not prune too much at once: one shot, rounds, gradual, with equal steps",
    paper="arXiv 1506.02626, 1710.01878",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
