# SPDX-License-Identifier: Apache-2.0
"""Bits of shared weights against accuracy, by initialisation (Han et al. 2016, arXiv 1510.00149, figures 7 and 8).

LeNet-300-100, whole and pruned as in the paper's table 2, is clustered with 1 to 8 bits from each start of k-means and
on a uniform grid; then its tables are trained. A last line trains with shared weights from the first step.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimtorch import prune
from slimtorch.data import Digits
from slimtorch.experiments import machine
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.deep_compression import epoch_scale, load_data
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.training import NETWORKS, Batches, accuracy, train
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.quantize import ClusterAware, KMeans, Uniform, cluster_
from slimtorch.quantize.kmeans import ClusterConfig
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = 1  # raise it when trials train differently: stored ones are then not used
NETWORK = "lenet300"
KEPT = {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26}  # table 2 of the paper
STATES = ("whole", "pruned")
STARTS = ("linear", "density", "random", "uniform")
AWARE_BITS = (1, 2, 3)
BITS = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Plan:
    """What a run trains; epochs are those of the 3,500 embedded digits.

    Attributes:
        bits: to cluster with.
        dense_epochs: of the network, and of training with shared weights from the start.
        retrain_epochs: after pruning, in each of four rounds.
        tune_epochs: of the tables.
        rate, tune_rate: Adam's, with a cosine to 0.
        every: steps between updates of the centroids in training from the start.
    """

    bits: tuple[int, ...] = BITS
    dense_epochs: float = 8
    retrain_epochs: float = 3
    tune_epochs: float = 1
    rate: float = 2e-3
    tune_rate: float = 1e-3
    every: int = 50


QUICK = Plan(bits=(1, 2, 4), dense_epochs=2, retrain_epochs=0.5, tune_epochs=0.4)


@dataclass(frozen=True)
class _Unit:
    """One piece of work: the network of a state ("base"), "aware", or a start of k-means on that network."""

    kind: str
    state: str
    seed: int
    plan: Plan
    scale: float

    def trial(self) -> Trial:
        base = {"base": "whole" if self.state == "pruned" else None, "aware": None}.get(self.kind, self.state)
        needs = () if base is None else (replace(self, kind="base", state=base).trial(),)
        config = {"version": RECIPE, **asdict(self), "kept": KEPT}
        return Trial(f"clusters-{self.state}-{self.kind}-seed{self.seed}", self, config, needs)

    def batches(self, data: Digits) -> Batches:
        return Batches(data.train, NETWORKS[NETWORK].batch_size, self.seed)

    def __call__(self, config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
        return _run_unit(self, data, needed)


def _plan_of(settings: Settings) -> Plan:
    return QUICK if settings.quick else Plan()


def _seeds_of(settings: Settings) -> int:
    return settings.seeds or (1 if settings.quick else 3)


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train what is not stored in ``out`` and put it together."""
    data, words = load_data(settings)
    plan, seeds, scale = _plan_of(settings), _seeds_of(settings), epoch_scale(data)
    kinds = [(kind, state) for state in STATES for kind in ("base", *STARTS)] + [("aware", "whole")]
    units = [_Unit(kind, state, seed, plan, scale) for seed in range(seeds) for kind, state in kinds]
    records = run_all([unit.trial() for unit in units], data, out, settings, progress)
    results = {(unit.kind, unit.state, unit.seed): records[unit.trial().name].result for unit in units}
    return _result(settings, words, plan, seeds, results)


def _run_unit(unit: _Unit, data: Digits, needed: Sequence[Record]) -> Record:
    torch.manual_seed(2000 + unit.seed)
    network, plan, scale = NETWORKS[NETWORK], unit.plan, unit.scale
    model = network.build(network.hidden)
    if unit.kind == "aware":
        return _aware(unit, data)
    if not needed:
        train(model, unit.batches(data), plan.dense_epochs * scale, plan.rate)
        return _with_weights(model, data)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in needed[0].arrays.items()})
    if unit.kind == "base":
        batches = unit.batches(data)
        for round in (1, 2, 3, 4):
            prune.prune_(model, {name: prune.Magnitude(1 - kept ** (round / 4)) for name, kept in KEPT.items()})
            train(model, batches, plan.retrain_epochs * scale, plan.rate)
        prune.bake_(model)
        return _with_weights(model, data)
    result: dict[str, Any] = {"clustered": {}, "tuned": {}, "bytes": {}, "error": {}}
    for bits in plan.bits:
        candidate = copy.deepcopy(model)
        report = cluster_(candidate, _config(unit, bits))
        result["bytes"][str(bits)] = report.bytes_after
        result["error"][str(bits)] = [layer.error for layer in report.layers]
        result["clustered"][str(bits)] = accuracy(candidate, data.test)
        train(candidate, unit.batches(data), plan.tune_epochs * scale, plan.tune_rate)
        result["tuned"][str(bits)] = accuracy(candidate, data.test)
    return Record(result)


def _config(unit: _Unit, bits: int) -> ClusterConfig:
    if unit.kind == "uniform":
        return Uniform(bits)
    return KMeans(bits, init=unit.kind, seed=100 * unit.seed)  # type: ignore[arg-type]


def _aware(unit: _Unit, data: Digits) -> Record:
    """Trained with shared weights from the first step, for as long as the dense network."""
    network, plan = NETWORKS[NETWORK], unit.plan
    result: dict[str, Any] = {"tuned": {}}
    for bits in AWARE_BITS:
        if bits not in plan.bits:
            continue
        torch.manual_seed(2000 + unit.seed)
        model = network.build(network.hidden)
        aware = ClusterAware(model, KMeans(bits), every=plan.every)
        train(model, unit.batches(data), plan.dense_epochs * unit.scale, plan.rate, aware.step)
        aware.finish_()
        result["tuned"][str(bits)] = accuracy(model, data.test)
    return Record(result)


def _with_weights(model: nn.Module, data: Digits) -> Record:
    arrays = {key: value.contiguous().numpy() for key, value in model.state_dict().items()}
    return Record({"test": accuracy(model, data.test), "validation": accuracy(model, data.validation)}, arrays)


# --- report -----------------------------------------------------------------------------------------------------------


def _result(settings: Settings, words: str, plan: Plan, seeds: int, results: dict[tuple[str, str, int], Any]) -> Result:
    base = {state: [results["base", state, seed]["test"] for seed in range(seeds)] for state in STATES}

    def of(kind: str, state: str, what: str, bits: int) -> list[float]:
        return [results[kind, state, seed][what][str(bits)] for seed in range(seeds)]

    curves: dict[str, dict[str, dict[str, dict[str, list[float]]]]] = {
        state: {
            kind: {what: {str(bits): of(kind, state, what, bits) for bits in plan.bits} for what in _WHAT}
            for kind in STARTS
        }
        for state in STATES
    }
    aware_bits = [bits for bits in AWARE_BITS if bits in plan.bits]
    aware = {str(bits): of("aware", "whole", "tuned", bits) for bits in aware_bits}
    sizes = {state: results["linear", state, 0]["bytes"] for state in STATES}
    tables = [_table(state, curves[state], base[state], sizes[state], plan) for state in STATES]
    rows: list[list[object]] = [[int(bits), percent(values) + " %"] for bits, values in aware.items()]
    tables.append(Table("Trained with shared weights from the first step", ["bits", "test accuracy"], rows))
    lead = (
        f"Bits of shared weights against test accuracy at small scale: LeNet-300-100 on {words}; {over_seeds(seeds)}, "
        f"mean ± standard deviation. After figures 7 and 8 of arXiv 1510.00149. "
        "Pruned: 8, 9 and 26 % of the weights of the three layers are kept, as in the paper; their zeros stay zero."
    )
    caption = "Test accuracy against bits: dashed as clustered, solid with trained tables, dotted the network before."
    data = {
        "experiment": "weight-clustering",
        "data": words,
        "seeds": seeds,
        "quick": settings.quick,
        "machine": machine.describe(settings.threads),
        "plan": asdict(plan),
        "base": base,
        "accuracy": curves,
        "aware": aware,
        "bytes": sizes,
    }
    figure = _figure(curves, base, aware, plan)
    return Result("Weight clustering", lead, tables, [("accuracy-bits", caption, figure)], data)


_WHAT = ("clustered", "tuned")


def _table(
    state: str,
    curves: dict[str, dict[str, dict[str, list[float]]]],
    base: list[float],
    sizes: dict[str, int],
    plan: Plan,
) -> Table:
    rows: list[list[object]] = []
    for bits in plan.bits:
        cells = [f"{100 * statistics.fmean(curves[kind][what][str(bits)]):.1f}" for what in _WHAT for kind in STARTS]
        rows.append([bits, *cells, f"{4 * 266_200 / sizes[str(bits)]:.1f}x"])
    columns = ["bits", *STARTS, *(f"{kind}, trained" for kind in STARTS), "rate"]
    notes = [
        f"test accuracy in %, mean of {len(base)}; the network before: {percent(base)} %; trained: its tables, for "
        f"{plan.tune_epochs:g} epochs; rate: float32 weights over clustered ones in memory"
    ]
    return Table(f"LeNet-300-100, {state}", columns, rows, notes)


def _figure(
    curves: dict[str, dict[str, dict[str, dict[str, list[float]]]]],
    base: dict[str, list[float]],
    aware: dict[str, list[float]],
    plan: Plan,
) -> Figure:
    from slimtorch.experiments import plots

    figure, axes = plots.new_figure(len(STATES))
    colors = dict(zip(STARTS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=False))
    for axis, state in zip(axes, STATES, strict=True):
        for kind in STARTS:
            for what, style in (("clustered", "--"), ("tuned", "-")):
                values = [curves[state][kind][what][str(bits)] for bits in plan.bits]
                means = [100 * statistics.fmean(v) for v in values]
                bars = [100 * statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
                label = kind if what == "tuned" else None
                axis.errorbar(
                    plan.bits, means, yerr=bars, color=colors[kind], linestyle=style, marker="o", markersize=3.5,
                    linewidth=1.3, capsize=2, elinewidth=0.8, label=label,
                )  # fmt: skip
        if state == "whole" and aware:
            axis.plot(
                [int(bits) for bits in aware], [100 * statistics.fmean(v) for v in aware.values()], color="black",
                marker="D", markersize=4, linewidth=1, label="from the first step",
            )  # fmt: skip
        axis.axhline(100 * statistics.fmean(base[state]), color="#999999", linestyle=":", linewidth=1)
        axis.set_xticks(plan.bits)
        axis.set_xlabel("bits of a weight")
        axis.set_ylabel("test accuracy, %")
        axis.set_title(f"{state} network", fontsize=10)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.suptitle("LeNet-300-100: solid with trained tables, dashed without")
    return figure


EXPERIMENT = Experiment(
    name="weight-clustering",
    about="bits of shared weights against accuracy, by initialisation",
    paper="arXiv 1510.00149",
    config=lambda settings: {"seeds": _seeds_of(settings), **asdict(_plan_of(settings))},
    run=run,
)
