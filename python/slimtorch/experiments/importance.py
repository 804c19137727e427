# SPDX-License-Identifier: Apache-2.0
"""What to remove: importances compared at equal sparsity, and layers by sensitivity.

Weights of LeNet-300-100, ranked by magnitude, chance, Taylor expansions of the loss (arXiv 1906.10771; Optimal Brain
Damage), connection sensitivity before and after training (SNIP, arXiv 1810.02340), and by what training has shown of
them: movement (2005.07683), path integral (1703.04200), Fisher information (1612.00796); per layer and over all layers.
Neurons by norm, APoZ (1607.03250), Taylor expansions and the scale of their batch norm (1708.06519). Then all train on
for equally many steps. `--data mnist` uses all of MNIST with the same number of epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.data import Digits, load
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.loop import evaluate
from slimtorch.experiments.machine import describe
from slimtorch.experiments.pruned import TITLES, begin, check_digits, restore, steps_of, train_dense, train_on
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.prune import (
    Evidence,
    Fisher,
    LifeLong,
    Magnitude,
    Movement,
    Neurons,
    PathIntegral,
    WeightImportance,
    allocate,
    prune_,
    sensitivity,
)
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # raise it when the code below trains differently
WEIGHTS = {
    "random": "random",
    "magnitude": "magnitude",
    "taylor": "Taylor, first order",
    "taylor2": "Taylor, second order",
    "snip": "SNIP, after training",
    "snip-start": "SNIP, before training",
    "movement": "movement",
    "path": "path integral",
    "fisher": "Fisher",
}
NEURONS = {
    "random": "random",
    "l1": "L1 norm",
    "apoz": "APoZ",
    "taylor": "Taylor, first order",
    "taylor2": "Taylor, second order",
    "batchnorm": "batch-norm scale",
}
SCOPES = {"layer": "each layer alike", "global": "over all layers"}
LIFE_LONG: dict[str, type[LifeLong]] = {"movement": Movement, "path": PathIntegral, "fisher": Fisher}
LAYERS = ("fc1", "fc2", "fc3")
_STYLES: dict[str, dict[str, Any]] = {
    "random": {"color": "#999999", "marker": "x", "linestyle": ":"},
    "magnitude": {"color": "#000000", "marker": "o"},
    "l1": {"color": "#000000", "marker": "o"},
    "taylor": {"color": "#0072B2", "marker": "s"},
    "taylor2": {"color": "#56B4E9", "marker": "^"},
    "snip": {"color": "#009E73", "marker": "D"},
    "snip-start": {"color": "#009E73", "marker": "D", "linestyle": "--"},
    "movement": {"color": "#CC79A7", "marker": "v"},
    "path": {"color": "#E69F00", "marker": "P"},
    "fisher": {"color": "#D55E00", "marker": "*"},
    "apoz": {"color": "#D55E00", "marker": "v"},
    "batchnorm": {"color": "#E69F00", "marker": "P"},
}
_ALLOCATIONS = {"layer": "uniform", "global": "global magnitude", "sensitivity": "by sensitivity"}


@dataclass(frozen=True)
class Plan:
    """All numbers of the experiment.

    Attributes:
        seeds: of initialisation and order of batches.
        levels: shares of the weights removed.
        ratios: shares of the neurons removed, in each hidden layer.
        weights: importances of weights.
        neurons: importances of neurons.
        scan: sparsities at which the sensitivity of each layer is measured.
        epochs: of training before.
        tune_epochs: of fine-tuning.
        rate: of Adam before.
        tune_rate: of Adam afterwards, constant.
        batch_size: images in a step, and in a batch that importances look at.
    """

    seeds: int
    levels: tuple[float, ...] = (0.9, 0.95, 0.98)
    ratios: tuple[float, ...] = (0.5, 0.75, 0.9)
    weights: tuple[str, ...] = tuple(WEIGHTS)
    neurons: tuple[str, ...] = tuple(NEURONS)
    scan: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    epochs: float = 6
    tune_epochs: float = 5
    rate: float = 1.2e-3
    tune_rate: float = 1.2e-3
    batch_size: int = 60


def plan(settings: Settings) -> Plan:
    """The numbers of a quick or a full run."""
    if settings.quick:
        return Plan(
            settings.seeds or 2, (0.9, 0.98), ratios=(0.75,), weights=("random", "magnitude", "taylor", "fisher"),
            neurons=("random", "l1", "apoz"), scan=(0.5, 0.9, 0.99), epochs=5,
        )  # fmt: skip
    return Plan(settings.seeds or 5)


class _Known(WeightImportance):
    """Scores found earlier, by layer."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self.scores = scores

    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        return {name: self.scores[name] for name in layers}


def _dense(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """A trained network, with what the life-long importances have seen."""
    watchers = {name: LIFE_LONG[name]() for name in config["watch"]}
    model, arrays = train_dense(config, data, list(watchers.values()))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, watcher in watchers.items():
        watcher.stop()
        for layer, scores in watcher.weights(model, layers, Evidence()).items():
            arrays[f"{name}:{layer}"] = scores.numpy()
    return Record({"test": evaluate(model, data.test)[1]}, arrays)


def _batches(data: Digits, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data.train.images.split(size), data.train.labels.split(size), strict=True))


def _score(config: Mapping[str, Any], data: Digits, dense: Record) -> tuple[nn.Module, str | WeightImportance]:
    """The network to prune, and the importance to prune it by."""
    name = config["importance"]
    if name == "snip-start":
        return begin(config["network"], config["seed"]), "snip"
    model = restore(config["network"], dense)
    if name in LIFE_LONG:
        return model, _Known({layer: torch.from_numpy(dense.arrays[f"{name}:{layer}"]) for layer in LAYERS})
    return model, name


def _prune_weights(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """One importance at all levels: accuracy right after pruning, and after training on."""
    batches = _batches(data, config["batch_size"])
    untrained, test = [], []
    for level in config["levels"]:
        model, importance = _score(config, data, needed[0])
        magnitude = Magnitude(
            level, scope=config["scope"], importance=importance, loss_fn=F.cross_entropy, seed=config["seed"]
        )
        prune_(model, magnitude, data=batches)
        untrained.append(evaluate(model, data.test)[1])
        epochs = config["tune_epochs"] + (config["epochs"] if config["importance"] == "snip-start" else 0)
        train_on(model, data, config, steps=steps_of(epochs, data, config["batch_size"]))
        test.append(evaluate(model, data.test)[1])
    return Record({"untrained": untrained, "test": test})


def _prune_neurons(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    batches = _batches(data, config["batch_size"])
    untrained, test = [], []
    for ratio in config["ratios"]:
        model = restore(config["network"], needed[0])
        neurons = Neurons(ratio, config["importance"], loss_fn=F.cross_entropy, seed=config["seed"])
        prune_(model, neurons, example_inputs=data.train.images[:2], data=batches)
        untrained.append(evaluate(model, data.test)[1])
        train_on(model, data, config, steps=steps_of(config["tune_epochs"], data, config["batch_size"]))
        test.append(evaluate(model, data.test)[1])
    return Record({"untrained": untrained, "test": test})


def _allocate(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """Each layer's sensitivity on the validation images; what it allocates, and what comes of it."""
    model = restore(config["network"], needed[0])
    accuracy = sensitivity(
        model, lambda m: evaluate(m, data.validation)[1], levels=config["scan"], higher_is_better=True
    )
    scan = sensitivity(model, lambda m: evaluate(m, data.validation)[0], levels=config["scan"])
    result: dict[str, Any] = {
        "base": [scan.base, accuracy.base],
        "loss": {layer.name: [layer.values[s] for s in scan.levels] for layer in scan.layers},
        "accuracy": {layer.name: [layer.values[s] for s in scan.levels] for layer in accuracy.layers},
        "density": {name: [] for name in _ALLOCATIONS},
        "untrained": [],
        "test": [],
    }
    for level in config["levels"]:
        for name in _ALLOCATIONS:
            trial = restore(config["network"], needed[0])
            if name == "sensitivity":
                report = prune_(trial, allocate(model, scan, parameters=round((1 - level) * scan.weights)))
            else:
                report = prune_(trial, Magnitude(level, scope="global" if name == "global" else "layer"))
            left = {layer.name: 1 - layer.sparsity_after for layer in report.layers}
            result["density"][name].append([left.get(layer, 1.0) for layer in LAYERS])
        # the last one is allocated by sensitivity; the other two are the magnitude rows of the experiment
        result["untrained"].append(evaluate(trial, data.test)[1])
        train_on(trial, data, config, steps=steps_of(config["tune_epochs"], data, config["batch_size"]))
        result["test"].append(evaluate(trial, data.test)[1])
    return Record(result)


def trials(chosen: Plan) -> list[Trial]:
    """All trials; those of one seed share the dense network that they begin with."""
    found = []
    for seed in range(chosen.seeds):
        base = {"version": VERSION, "seed": seed, "batch_size": chosen.batch_size, "epochs": chosen.epochs}
        tune = {**base, "tune_epochs": chosen.tune_epochs, "tune_rate": chosen.tune_rate}
        watch = [name for name in chosen.weights if name in LIFE_LONG]
        dense = Trial(
            f"dense-seed{seed}", _dense, {**base, "network": "lenet300", "rate": chosen.rate, "watch": watch}
        )
        normed = Trial(
            f"norm-seed{seed}", _dense, {**base, "network": "lenet300-norm", "rate": chosen.rate, "watch": []}
        )
        found += [dense, normed]
        levels = {**tune, "network": "lenet300", "levels": list(chosen.levels)}
        for scope in SCOPES:
            for name in chosen.weights:
                config = {**levels, "importance": name, "scope": scope}
                found.append(Trial(f"weights-{scope}-{name}-seed{seed}", _prune_weights, config, (dense,)))
        found.append(Trial(f"allocate-seed{seed}", _allocate, {**levels, "scan": list(chosen.scan)}, (dense,)))
        for name in chosen.neurons:
            config = {**tune, "network": "lenet300-norm", "importance": name, "ratios": list(chosen.ratios)}
            found.append(Trial(f"neurons-{name}-seed{seed}", _prune_neurons, config, (normed,)))
    return found


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train, prune by each importance, train on, and tell what came of it."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    check_digits(data)
    records = run_all(trials(chosen), data, out, settings, progress)

    def of(name: str, key: str) -> list[Any]:
        """One value per seed, floats rounded."""
        return _rounded([records[f"{name}-seed{seed}"].result[key] for seed in range(chosen.seeds)])

    def rows(prefix: str, names: Sequence[str]) -> dict[str, Any]:
        return {n: {key: of(f"{prefix}-{n}", key) for key in ("untrained", "test")} for n in names}

    found: dict[str, Any] = {
        "experiment": "importance", "data": what, "plan": asdict(chosen), "machine": describe(settings.threads),
        "dense": of("dense", "test"),
        "dense_norm": of("norm", "test"),
        "weights": {scope: rows(f"weights-{scope}", chosen.weights) for scope in SCOPES},
        "neurons": rows("neurons", chosen.neurons),
        "allocation": {
            key: of("allocate", key) for key in ("base", "loss", "accuracy", "density", "untrained", "test")
        },
    }  # fmt: skip
    lead = (
        f"Networks trained on {what}; then weights or neurons are removed, those of least importance first, and what "
        "is left trains on. Accuracy on held-out images, at small scale."
    )
    return Result("Importances at equal sparsity", lead, tables(found), figures(found), found)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 5)


def _by_level(rows: Sequence[Sequence[float]]) -> list[str]:
    return [percent(column) for column in zip(*rows, strict=True)]


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Importances of weights, per layer and global, and of neurons; then allocations at equal nonzeros."""
    chosen = found["plan"]
    over = f"mean ± standard deviation over {over_seeds(len(found['dense']))}"
    dense = f"dense: {percent(found['dense'])} %; {over}, {found['data']}"
    steps = f"epochs of fine-tuning: {chosen['tune_epochs']:g}; pruned before training: {chosen['epochs']:g} more"
    result = []
    levels = [f"{level:.0%} removed" for level in chosen["levels"]]
    for scope, title in SCOPES.items():
        rows: list[list[object]] = [
            [WEIGHTS[name], *_by_level(part["test"])] for name, part in found["weights"][scope].items()
        ]
        name = f"Weights of {TITLES['lenet300']}, {title}: test accuracy after fine-tuning, %"
        result.append(Table(name, ["importance", *levels], rows, [dense, steps]))
    rows = [
        [WEIGHTS[name], *_by_level(part["untrained"])]
        for name, part in found["weights"]["global"].items()
        if name != "snip-start"
    ]
    name = "The same right after pruning over all layers, before fine-tuning: test accuracy, %"
    result.append(Table(name, ["importance", *levels], rows, [dense]))
    rows = []
    for name, part in found["neurons"].items():
        rows.append([NEURONS[name], *_by_level(part["test"])])
    ratios = [f"{ratio:.0%} removed" for ratio in chosen["ratios"]]
    notes = [f"dense: {percent(found['dense_norm'])} %; {over}", "the same share in both hidden layers"]
    title = f"Neurons of {TITLES['lenet300-norm']}: test accuracy after fine-tuning, %"
    result.append(Table(title, ["importance", *ratios], rows, notes))
    part = found["allocation"]
    rows = []
    for name, title in _ALLOCATIONS.items():
        values = part["test"] if name == "sensitivity" else found["weights"][name]["magnitude"]["test"]
        before = part["untrained"] if name == "sensitivity" else found["weights"][name]["magnitude"]["untrained"]
        for index, level in enumerate(chosen["levels"]):
            kept = [[100 * seed[name][index][i] for seed in part["density"]] for i in range(len(LAYERS))]
            shares = " / ".join(f"{sum(values) / len(values):.1f}" for values in kept)
            cells = (_by_level(before)[index], _by_level(values)[index])
            rows.append([f"{level:.0%} removed", title, shares, *cells])
    rows.sort(key=lambda row: str(row[0]))
    columns = ["", "sparsity per layer", "kept in layers, %", "before, %", "after, %"]
    notes = [
        "share of the weights kept in fc1 / fc2 / fc3; accuracy before and after fine-tuning; equal nonzeros in all",
        "smallest weights of each layer; sensitivity: of the loss on validation images",
    ]
    result.append(Table("How to share out the nonzeros", columns, rows, notes))
    return result


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy against sparsity per importance; each layer's sensitivity and what it allocates."""
    from slimtorch.experiments.plots import COLORS, band, new_figure

    chosen = found["plan"]
    figure, axes = new_figure(3, height=4.6, width=4.9)
    panels: list[tuple[str, Mapping[str, Any], Sequence[float], Mapping[str, str], Sequence[float]]] = [
        (f"weights, {title}", found["weights"][scope], chosen["levels"], WEIGHTS, found["dense"])
        for scope, title in SCOPES.items()
    ]
    panels.append(("neurons", found["neurons"], chosen["ratios"], NEURONS, found["dense_norm"]))
    for axis, (title, part, x, names, dense) in zip(axes, panels, strict=True):
        for name, row in part.items():
            band(axis, range(len(x)), [[100 * v for v in seed] for seed in row["test"]], names[name], **_STYLES[name])
        axis.axhline(100 * sum(dense) / len(dense), color="black", linewidth=1, label="dense")
        axis.set_xticks(range(len(x)), [f"{100 * level:g}" for level in x])
        others = [100 * min(seed) for name, row in part.items() if name != "random" for seed in row["test"]]
        axis.set_ylim(max(0.0, min(others) - 3), 97)  # chance falls out of sight
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("removed, %")
        axis.set_ylabel("test accuracy after fine-tuning, %")
    shown: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown.keys(), fontsize=8, loc="outside lower center", ncols=7, frameon=False)

    part = found["allocation"]
    second, (curves, bars) = new_figure(2, width=5.6)
    for index, layer in enumerate(LAYERS):
        rows = [
            [100 * base[1], *(100 * v for v in seed[layer])]
            for base, seed in zip(part["base"], part["accuracy"], strict=True)
        ]
        band(curves, [0, *(100 * s for s in chosen["scan"])], rows, layer, COLORS[index], marker="o")
    curves.set_xlabel("removed from this layer alone, %")
    curves.set_ylabel("validation accuracy without fine-tuning, %")
    curves.legend(fontsize=8, frameon=False)
    level = len(chosen["levels"]) - 1
    for index, (name, title) in enumerate(_ALLOCATIONS.items()):
        means = [
            100 * sum(seed[name][level][i] for seed in part["density"]) / len(part["density"])
            for i in range(len(LAYERS))
        ]
        bars.bar([i + 0.27 * (index - 1) for i in range(len(LAYERS))], means, 0.25, label=title, color=COLORS[index])
    bars.set_xticks(range(len(LAYERS)), LAYERS)
    bars.set_yscale("log")
    bars.set_ylabel(f"weights kept, % ({chosen['levels'][level]:.0%} removed in all)")
    bars.legend(fontsize=8, frameon=False)
    caption = "Accuracy against the share removed, by importance. Bands: ± 1 sd over seeds."
    return [
        ("importance", caption, figure),
        ("importance-sensitivity", "Each layer pruned alone, and how that shares out a budget of nonzeros.", second),
    ]


EXPERIMENT = Experiment(
    name="importance",
    about="what to remove: magnitude, Taylor, SNIP, life-long …, at equal sparsity",
    paper="arXiv 1906.10771, 1810.02340, 1703.04200, 1607.03250, 1506.02626",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
