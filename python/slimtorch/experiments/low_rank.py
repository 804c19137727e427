# SPDX-License-Identifier: Apache-2.0
"""Layers of low rank: accuracy, multiply-accumulates and measured time.

After Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions" (1405.3866: 2.5x without a
loss, 4.5x within a point), Zhang et al. (1505.06798: 4x on VGG-16, 0.3 points), Kim et al. (1511.06530, Tucker) and
Lebedev et al. (1412.6553, CP). From one dense network per seed, all layers but the first and the last are factorized by
each kind at two shares of the MACs, from its weights or fitted to its activations; all are then trained on for few
steps. Times are those of the fastest way to run each network, in turns with the dense one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimtorch import models
from slimtorch.data import Digits, load
from slimtorch.design import LowRank, LowRankConv2d, LowRankLinear, factorize_
from slimtorch.experiments import machine, separable
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.compare import _build_stamp
from slimtorch.experiments.loop import evaluate
from slimtorch.experiments.replaced import race, race_choice, time_table
from slimtorch.experiments.separable import Build, _arrays, _cost, _fit
from slimtorch.experiments.store import Record, Store
from slimtorch.experiments.summary import mean_and_deviation, over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.measure import count_macs, threads_of_torch
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # raise it when trials train differently: stored ones are then not used
BATCHES = (1, 16)
WIDE_KINDS = ("channel", "spatial")  # the others' factors take minutes to find in wide layers
FITTED = 250  # training images whose activations the factors are fitted to
KINDS = {"svd": "SVD", "channel": "channel", "spatial": "spatial", "tucker": "Tucker", "cp": "CP"}


def _lenet(channels: int, width: int) -> nn.Module:
    return models.LeNet300((3 * width, width))


BUILD: dict[str, Build] = {"lenet300": _lenet, **separable.BUILD}
TITLES = {"lenet300": "LeNet-300-100", **separable.TITLES}
_IGNORED = {"lenet300": ("fc3",)}  # the last layer; of the others, first convolutions and linear layers are left alone


@dataclass(frozen=True)
class Plan:
    """All numbers of a run.

    Attributes:
        widths: network → its width: channels of the first layer, or units of the second of LeNet-300-100.
        levels: network → share of the MACs (of LeNet-300-100 and of CP: of the weights) that is left; of CP, whose
            factors take long to find, the smallest only.
        kinds: network → kinds.
        epochs, tune_epochs: of the dense training, and of all training after that, by network.
        seeds: of initialisation and order of batches.
        rate, tune_rate: Adam's, with a cosine to 0.
        batch_size: images in a step.
        samples: rounds of timing.
        wide: network → a width at which it is timed too, with weights as they are drawn: time does not depend on them,
            and multiplications outweigh calls only in wide layers.
    """

    widths: Mapping[str, int]
    levels: Mapping[str, tuple[float, ...]]
    kinds: Mapping[str, tuple[str, ...]]
    epochs: Mapping[str, float]
    tune_epochs: Mapping[str, float]
    seeds: int = 5
    rate: float = 2e-3
    tune_rate: float = 1e-3
    batch_size: int = 50
    samples: int = 31
    wide: Mapping[str, int] = field(default_factory=dict)


_CONV_KINDS = ("channel", "spatial", "tucker", "cp")
FULL = Plan(
    {"lenet300": 100, "vgg": 16, "resnet": 16},
    {"lenet300": (0.5, 0.2, 0.1, 0.05), "vgg": (0.5, 0.25), "resnet": (0.5, 0.25)},
    {"lenet300": ("svd",), "vgg": _CONV_KINDS, "resnet": _CONV_KINDS},
    {"lenet300": 8, "vgg": 2, "resnet": 2},
    {"lenet300": 4, "vgg": 3, "resnet": 3},
    wide={"vgg": 64, "resnet": 64},
)
QUICK = Plan(
    {"lenet300": 100, "vgg": 8},
    {"lenet300": (0.2, 0.05), "vgg": (0.25,)},
    {"lenet300": ("svd",), "vgg": ("channel", "tucker")},
    {"lenet300": 8, "vgg": 4},
    {"lenet300": 2, "vgg": 1},
    seeds=2, samples=7,
)  # fmt: skip


def plan(settings: Settings) -> Plan:
    """The numbers of a quick or a full run."""
    chosen = QUICK if settings.quick else FULL
    own = {name: getattr(chosen, name) for name in chosen.__dataclass_fields__}
    return chosen if settings.seeds is None else Plan(**{**own, "seeds": settings.seeds})


# --- training ---------------------------------------------------------------------------------------------------------


def row_of(kind: str, level: float) -> str:
    """The name of a row of the tables."""
    return f"{KINDS[kind]}, {100 * level:g} %"


def variants(chosen: Plan, network: str) -> list[tuple[str, float]]:
    """(kind, share that is left) of a network."""
    levels = chosen.levels[network]
    return [(k, x) for k in chosen.kinds[network] for x in levels if k != "cp" or x == min(levels)]


def trials(chosen: Plan, channels: int, images: int) -> dict[tuple[str, str, int], Trial]:
    """(network, row, seed) → trial; those of one seed share the dense network that they begin with."""
    per_epoch = max(1, images // chosen.batch_size)
    made: dict[tuple[str, str, int], Trial] = {}
    for network, width in chosen.widths.items():
        steps, tune_steps = (max(1, round(e[network] * per_epoch)) for e in (chosen.epochs, chosen.tune_epochs))
        for seed in range(chosen.seeds):
            base = {"version": VERSION, "network": network, "width": width, "channels": channels, "seed": seed}
            base |= {"batch_size": chosen.batch_size}
            first = Trial(f"{network}-dense-seed{seed}", train_dense, {**base, "steps": steps, "rate": chosen.rate})
            tune = {**base, "steps": tune_steps, "rate": chosen.tune_rate}
            made[network, "dense", seed] = first
            made[network, "trained on", seed] = Trial(f"{network}-trained-on-seed{seed}", train_on, tune, (first,))
            for kind, level in variants(chosen, network):
                config = {**tune, "kind": kind, "level": level, "images": FITTED}
                trial = Trial(f"{network}-{kind}-{level:g}-seed{seed}", train_factorized, config, (first,))
                made[network, row_of(kind, level), seed] = trial
    return made


def train_dense(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The network that the others start from."""
    torch.manual_seed(6500 + config["seed"])
    model = BUILD[config["network"]](config["channels"], config["width"])
    _fit(model, data, config, config["seed"])
    return Record({"test": evaluate(model, data.test)[1], **_cost(model, data)}, _arrays(model))


def train_on(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The control: the dense network with as many steps more."""
    model = restore(config, needed[0])
    _fit(model, data, config, 100 + config["seed"])
    return Record({"test": evaluate(model, data.test)[1]})


def train_factorized(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """Factorized from the weights alone, and fitted to activations; the second is trained on."""
    model = restore(config, needed[0])
    plain = copy.deepcopy(model)
    factorized_(plain, config, data, fitted=False)
    factorized_(model, config, data, fitted=True)
    found: dict[str, Any] = {"weights": evaluate(plain, data.test)[1], "fitted": evaluate(model, data.test)[1]}
    _fit(model, data, config, 100 + config["seed"])
    found |= {"test": evaluate(model, data.test)[1], **_cost(model, data), "layers": _layers(model)}
    return Record(found, _arrays(model) if config["seed"] == 0 else {})


def factorized_(model: nn.Module, config: Mapping[str, Any], data: Digits, *, fitted: bool) -> None:
    """In place: every layer that this experiment factorizes, whether it gains or not."""
    level, kind = config["level"], config["kind"]
    if kind == "svd":
        low = LowRank(ratio=level)
    else:
        low = LowRank(ratio=level, kind=kind) if kind == "cp" else LowRank(macs=level, kind=kind)
    batches = data.train.images[:FITTED].split(125) if fitted else None
    factorize_(
        model, low, data.train.images[:1], batches, objective=None, filter_fn=_chosen(config["network"])
    )  # fmt: skip


def _chosen(network: str) -> Callable[[nn.Module, str], bool]:
    def chosen(module: nn.Module, name: str) -> bool:
        if network == "lenet300":
            return name not in _IGNORED["lenet300"]
        return isinstance(module, nn.Conv2d) and module.in_channels > 3 and module.kernel_size != (1, 1)

    return chosen


def _layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name → geometry of the layers of low rank."""
    kinds = (LowRankLinear, LowRankConv2d)
    return {name: module.geometry() for name, module in model.named_modules() if isinstance(module, kinds)}


def restore(config: Mapping[str, Any], record: Record) -> nn.Module:
    """The network of a record, dense or of low rank."""
    model = BUILD[config["network"]](config["channels"], config["width"])
    for name, geometry in record.result.get("layers", {}).items():
        layer: type[LowRankLinear] | type[LowRankConv2d] = LowRankConv2d if "kind" in geometry else LowRankLinear
        model.set_submodule(name, layer.from_geometry(geometry))
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in record.arrays.items()})
    return model


# --- timing -----------------------------------------------------------------------------------------------------------


def _times(
    config: Mapping[str, Any], records: Mapping[str, Record], chosen: Plan, data: Digits, progress: Progress
) -> dict[str, Any]:
    """Batch size → row → seconds in the fastest way and in torch; and what `factorize_` keeps where it chooses."""
    found: dict[str, Any] = {}
    network = config["network"]
    stage = f"time {TITLES[network]}"
    level = min(chosen.levels[network])
    low = LowRank(ratio=level) if network == "lenet300" else LowRank(macs=level)
    for number, batch in enumerate(BATCHES):
        progress(stage, number, len(BATCHES))
        x = data.test.images[:batch]
        networks = {row: restore(config, record).eval() for row, record in records.items()}
        choose = functools.partial(
            factorize_, config=low, example_inputs=x, objective="latency", filter_fn=_chosen(network)
        )
        found[str(batch)] = race_choice(networks, x, chosen.samples, choose)
    progress(stage, len(BATCHES), len(BATCHES))
    return found


def _wide_times(network: str, chosen: Plan, data: Digits, progress: Progress) -> dict[str, Any]:
    """The same kinds and shares in a wider network that nobody trained: rows with their MACs, and times."""
    stage = f"time {TITLES[network]}, wide"
    torch.manual_seed(0)
    dense = BUILD[network](data.train.images.shape[1], chosen.wide[network]).eval()
    x = data.test.images[: max(BATCHES)]
    networks = {"dense": dense}
    todo = variants(chosen, network)
    for number, (kind, level) in enumerate(todo):
        progress(stage, number, len(todo) + 1)
        if kind in WIDE_KINDS:
            made = copy.deepcopy(dense)
            config = LowRank(macs=level, kind=kind)  # type: ignore[arg-type]
            factorize_(made, config, x[:1], objective=None, filter_fn=_chosen(network))
            networks[row_of(kind, level)] = made.eval()
    progress(stage, len(todo), len(todo) + 1)
    found = {
        "rows": {row: {"macs": [count_macs(model, x[:1])[1]]} for row, model in networks.items()},
        "time": {str(batch): race(networks, x[:batch], chosen.samples) for batch in BATCHES},
    }
    progress(stage, len(todo) + 1, len(todo) + 1)
    return found


# --- the run ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train what is not stored in ``out``, time it, and put it together."""
    data, words = load(settings.data, settings.quick)
    channels = data.train.images.shape[1]
    chosen = plan(settings)
    if "lenet300" in chosen.widths and data.train.images[0].numel() != 784:
        without = {name: width for name, width in chosen.widths.items() if name != "lenet300"}
        chosen = Plan(**{**{n: getattr(chosen, n) for n in chosen.__dataclass_fields__}, "widths": without})
    made = trials(chosen, channels, len(data.train))
    records = run_all(list(made.values()), data, out, settings, progress)
    store = Store(out / "times")
    found: dict[str, Any] = {"experiment": "low-rank", "data": words, "plan": asdict(chosen), "networks": {}}
    with threads_of_torch(settings.threads):
        found["machine"] = machine.describe(settings.threads)
        for network in chosen.widths:
            rows = [row_of(kind, level) for kind, level in variants(chosen, network)]
            timed = {row: records[made[network, row, 0].name] for row in ("dense", *rows)}
            stamp = {
                "version": VERSION, "machine": found["machine"], "build": _build_stamp(), "samples": chosen.samples,
                "trials": [dict(made[network, row, 0].config) for row in timed],
            }  # fmt: skip
            make = functools.partial(_times, made[network, "dense", 0].config, timed, chosen, data, progress)
            times = store.once(network, stamp, make)
            found["networks"][network] = {
                "title": TITLES[network],
                "rows": {row: _row(made, records, network, row, chosen) for row in ("dense", "trained on", *rows)},
                "time": times,
            }
        found["wide"] = {}
        for network in (name for name in chosen.wide if name in chosen.widths):
            stamp = {
                "wide": chosen.wide[network], "levels": list(chosen.levels[network]), "kinds": list(WIDE_KINDS),
                "machine": found["machine"], "build": _build_stamp(), "samples": chosen.samples,
            }  # fmt: skip
            make = functools.partial(_wide_times, network, chosen, data, progress)
            times = store.once(f"{network}-wide", stamp, make)
            found["wide"][network] = {"title": f"{TITLES[network]}, {chosen.wide[network]} channels", **times}
    lead = (
        f"Layers of low rank, at small scale: LeNet-300-100 and networks of the shape of VGG-16 and ResNet-20 on "
        f"{words}; {over_seeds(chosen.seeds)}, mean ± standard deviation. Times are measured, of seed 0's networks, in "
        "turns with the dense network. After arXiv 1405.3866, 1505.06798, 1511.06530 and 1412.6553."
    )
    return Result("Layers of low rank", lead, tables(found), figures(found), found)


def _row(
    made: Mapping[tuple[str, str, int], Trial], records: Mapping[str, Record], network: str, row: str, chosen: Plan
) -> dict[str, Any]:
    results = [records[made[network, row, seed].name].result for seed in range(chosen.seeds)]
    found: dict[str, Any] = {
        key: [round(r[key], 4) for r in results] for key in ("weights", "fitted", "test") if key in results[0]
    }
    found |= {key: [r[key] for r in results] for key in ("parameters", "macs") if key in results[0]}
    return found


# --- report -----------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return float(mean_and_deviation(values)["mean"])


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Per network: accuracy of every kind before and after training on, and measured times."""
    result = []
    headline = machine.headline(found["machine"])
    for name, network in found["networks"].items():
        rows: list[list[object]] = []
        dense = network["rows"]["dense"]
        for row, own in network["rows"].items():
            cost = own if "macs" in own else dense
            before = [percent(own[key]) if key in own else "-" for key in ("weights", "fitted")]
            left = f"{_mean(cost['macs']) / dense['macs'][0]:.1%}"
            title = separable.DENSE.get(row, row)
            rows.append([title, f"{_mean(cost['parameters']) / 1e3:.0f} K", left, *before, percent(own["test"])])
        epochs = found["plan"]["tune_epochs"][name]
        notes = [
            f"MACs: of the dense network's {dense['macs'][0] / 1e6:.2f} M for an image. SVD and CP: share of the "
            "weights of the layers that are factorized; others: of their MACs, shared out by energy.",
            "weights: factors of the weights alone, not trained on; fitted: to the outputs on "
            f"{FITTED} training images; test: the latter after {epochs:g} epochs more, as the dense one trained on.",
        ]
        columns = ["rank", "parameters", "MACs", "weights, %", "fitted, %", "test, %"]
        result.append(Table(f"{network['title']}: accuracy", columns, rows, notes))
        result.append(_times_of(network, headline))
    return result + [_times_of(network, headline) for network in found["wide"].values()]


def _times_of(network: Mapping[str, Any], headline: str) -> Table:
    macs = {row: own["macs"][0] for row, own in network["rows"].items() if row != "trained on"}
    verb = "factorize_ with objective 'latency', at the smallest share,"
    return time_table(network["title"], "rank", macs, network["time"], verb, headline)


_STYLE: dict[str, dict[str, Any]] = {
    "SVD": {"color": "#0072B2", "marker": "o"},
    "channel": {"color": "#0072B2", "marker": "o"},
    "spatial": {"color": "#E69F00", "marker": "s"},
    "Tucker": {"color": "#009E73", "marker": "^"},
    "CP": {"color": "#CC79A7", "marker": "D"},
}


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy against measured time, by network; accuracy before and after training on."""
    from slimtorch.experiments.plots import new_figure

    networks = found["networks"]
    drawn = []
    for name, network in networks.items():
        caption = (
            f"{network['title']}: test accuracy against measured time in the fastest way; up and to the left is "
            "better. Bars: ± 1 sd."
        )
        drawn.append((f"low-rank-{name}", caption, _accuracy_latency(network)))

    before, axes = new_figure(len(networks), width=5.2)
    for axis, network in zip(axes, networks.values(), strict=True):
        names = [row for row in network["rows"] if row not in ("dense", "trained on")]
        for offset, (key, label, color) in enumerate((
            ("weights", "from weights, not trained", "#999999"), ("fitted", "fitted, not trained", "#56B4E9"),
            ("test", "fitted, trained on", "#0072B2"),
        )):  # fmt: skip
            heights = [mean_and_deviation([100 * v for v in network["rows"][row][key]]) for row in names]
            at = [index + 0.27 * (offset - 1) for index in range(len(names))]
            axis.bar(
                at, [n["mean"] for n in heights], 0.25, yerr=[n["std"] or 0.0 for n in heights], label=label,
                color=color, capsize=2,
            )  # fmt: skip
        axis.axhline(100 * _mean(network["rows"]["dense"]["test"]), color="black", linewidth=1, label="dense")
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axis.set_title(network["title"], fontsize=10)
        axis.set_ylabel("test accuracy, %")
        axis.set_ylim(0, 100)
    before.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    caption = "Test accuracy right after the factorization and after training on."
    return [*drawn, ("low-rank-recovery", caption, before)]


def _accuracy_latency(network: Mapping[str, Any]) -> Figure:
    from slimtorch.experiments.plots import new_figure, plain_ticks

    rows = network["rows"]
    figure, panels = new_figure(len(network["time"]))
    for axis, (batch, time) in zip(panels, network["time"].items(), strict=True):
        for name, marker in (("dense", "*"), ("trained on", "P")):
            numbers = mean_and_deviation([100 * v for v in rows[name]["test"]])
            axis.errorbar(
                time["dense"]["seconds"] * 1e3, numbers["mean"], numbers["std"] or 0.0, label=separable.DENSE[name],
                capsize=3, color="black", marker=marker, markersize=8, linestyle="none",
            )  # fmt: skip
        for kind, style in _STYLE.items():
            own = [row for row in rows if row.split(",")[0] == kind]
            if own:
                points = [mean_and_deviation([100 * v for v in rows[row]["test"]]) for row in own]
                axis.errorbar(
                    [time[row]["seconds"] * 1e3 for row in own], [p["mean"] for p in points],
                    [p["std"] or 0.0 for p in points], label=kind, capsize=3, linewidth=1.2, **style,
                )  # fmt: skip
        axis.set_xscale("log")
        seconds = [own["seconds"] * 1e3 for own in time.values() if isinstance(own, dict)]
        axis.set_xlim(min(seconds) / 1.3, max(seconds) * 1.3)
        plain_ticks(axis.xaxis)
        axis.set_xlabel(f"milliseconds per call, batch {batch}")
        axis.set_ylabel("test accuracy, %")
    labels = panels[0].get_legend_handles_labels()
    figure.legend(*labels, fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"{network['title']}: accuracy against measured time")
    return figure


EXPERIMENT = Experiment(
    name="low-rank",
    about="layers of low rank by SVD, channel, spatial, Tucker and CP: accuracy, MACs, measured time",
    paper="arXiv 1405.3866, 1505.06798, 1511.06530, 1412.6553",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
