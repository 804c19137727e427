# SPDX-License-Identifier: Apache-2.0
"""Convolutions made separable: accuracy, multiply-accumulates and measured time (arXiv 1704.04861, 1808.05517).

From one dense network per seed, every 3x3 convolution but the first becomes depthwise and 1x1: from its weights, or
fitted to its activations, or from random ones as the control; with one kernel per input channel or two. All are then
trained on for equally few steps, with the labels alone or with the dense network's soft targets too. Times are those of
the fastest way to run each network, in turns with the dense one. The papers count multiplications; they time nothing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch import models
from slimtorch.data import Digits, Split, load
from slimtorch.design import Separable, separate_
from slimtorch.distill import soft_target_loss
from slimtorch.experiments import machine
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.compare import _build_stamp
from slimtorch.experiments.loop import evaluate, fit
from slimtorch.experiments.replaced import race, race_choice, time_table
from slimtorch.experiments.store import Record, Store
from slimtorch.experiments.summary import mean_and_deviation, over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.measure import count_macs, count_parameters, threads_of_torch
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # raise it when trials train differently: stored ones are then not used
BATCHES = (1, 16)
FITTED, ROUNDS = 250, 5  # training images whose activations the weights are fitted to, and how often by turns

Build = Callable[[int, int], nn.Module]


def _vgg(channels: int, width: int) -> nn.Module:
    """VGG-16 whose first layer has `width` channels (64 in the paper)."""
    return models.vgg16(10, channels, [width * w // 64 for w in models.VGG16_WIDTHS], hidden=8 * width)


def _resnet(channels: int, width: int) -> nn.Module:
    """ResNet-20 of that width on images at half the resolution."""
    return nn.Sequential(nn.AvgPool2d(2), models.resnet20(10, channels, width=width))


BUILD: dict[str, Build] = {"vgg": _vgg, "resnet": _resnet}
TITLES = {"vgg": "VGG-16", "resnet": "ResNet-20"}

# Row → (kernels per input channel, where it starts, with soft targets)
VARIANTS: dict[str, tuple[int, str, bool]] = {
    "1 kernel, random start": (1, "random", False),
    "1 kernel, from weights": (1, "weights", False),
    "1 kernel, fitted": (1, "fitted", False),
    "1 kernel, fitted, distilled": (1, "fitted", True),
    "2 kernels, fitted": (2, "fitted", False),
    "2 kernels, fitted, distilled": (2, "fitted", True),
}
# Rows of the dense network → in words; the second is trained for as long as the others in all
DENSE = {"dense": "dense", "trained on": "dense, trained on"}
# Networks that are timed → whose accuracy goes with them
TIMED = {"1 kernel": "1 kernel, fitted, distilled", "2 kernels": "2 kernels, fitted, distilled"}


@dataclass(frozen=True)
class Plan:
    """All numbers of a run.

    Attributes:
        widths: network → channels of its first layer.
        seeds: of initialisation and order of batches.
        epochs, tune_epochs: of the dense training, and of all training after that.
        rate, tune_rate: Adam's, with a cosine to 0.
        batch_size: images in a step.
        temperature, soft: of the soft targets, and their share of the loss.
        samples: rounds of timing.
        wide: network → a width at which it is timed too, with weights as they are drawn: time does not depend on them,
            and multiplications outweigh calls only in wide layers.
    """

    widths: Mapping[str, int]
    seeds: int = 5
    epochs: float = 2
    tune_epochs: float = 1
    rate: float = 2e-3
    tune_rate: float = 2e-3
    batch_size: int = 50
    temperature: float = 4.0
    soft: float = 0.5
    samples: int = 31
    wide: Mapping[str, int] = field(default_factory=dict)


FULL = Plan({"vgg": 16, "resnet": 16}, tune_epochs=3, wide={"vgg": 64, "resnet": 64})
QUICK = Plan({"vgg": 8}, seeds=2, epochs=5, tune_epochs=2, samples=7)


def plan(settings: Settings) -> Plan:
    """The numbers of a quick or a full run."""
    chosen = QUICK if settings.quick else FULL
    own = {name: getattr(chosen, name) for name in chosen.__dataclass_fields__}
    return chosen if settings.seeds is None else Plan(**{**own, "seeds": settings.seeds})


# --- training ---------------------------------------------------------------------------------------------------------


def trials(chosen: Plan, channels: int, images: int) -> dict[tuple[str, str, int], Trial]:
    """(network, row, seed) → trial; those of one seed share the dense network that they begin with."""
    per_epoch = max(1, images // chosen.batch_size)
    steps, tune_steps = (max(1, round(epochs * per_epoch)) for epochs in (chosen.epochs, chosen.tune_epochs))
    made: dict[tuple[str, str, int], Trial] = {}
    for network, width in chosen.widths.items():
        for seed in range(chosen.seeds):
            base = {"version": VERSION, "network": network, "width": width, "channels": channels, "seed": seed}
            base |= {"batch_size": chosen.batch_size}
            first = Trial(f"{network}-dense-seed{seed}", train_dense, {**base, "steps": steps, "rate": chosen.rate})
            tune = {**base, "steps": tune_steps, "rate": chosen.tune_rate}
            made[network, "dense", seed] = first
            made[network, "trained on", seed] = Trial(f"{network}-trained-on-seed{seed}", train_on, tune, (first,))
            starts: dict[tuple[int, str], Trial] = {}
            for row, (kernels, start, soft) in VARIANTS.items():
                if (kernels, start) not in starts:
                    extra: dict[str, Any] = {"kernels": kernels, "start": start, "rounds": ROUNDS, "images": FITTED}
                    name = f"{network}-{kernels}-{start}-seed{seed}"
                    starts[kernels, start] = Trial(name, separate, {**base, **extra}, (first,))
                extra = {"kernels": kernels, "soft": chosen.soft if soft else 0.0, "temperature": chosen.temperature}
                name = f"{network}-{row.replace(', ', '-').replace(' ', '-')}-seed{seed}"
                needs = (starts[kernels, start], first)
                made[network, row, seed] = Trial(name, train_separable, {**tune, **extra}, needs)
    return made


def train_dense(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The network that the others start from, and its logits on the images to train on."""
    torch.manual_seed(6000 + config["seed"])
    model = BUILD[config["network"]](config["channels"], config["width"])
    _fit(model, data, config, config["seed"])
    record = Record({"test": evaluate(model, data.test)[1], **_cost(model, data)}, _arrays(model))
    with torch.no_grad():
        logits = torch.cat([model.eval()(part) for part in data.train.images.split(250)])
    record.arrays["logits"] = logits.numpy()
    return record


def train_on(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The control: the dense network with as many steps more."""
    model = restore(config, needed[0])
    curve = _fit(model, data, config, 100 + config["seed"])
    return Record({"test": evaluate(model, data.test)[1], "curve": curve})


def separate(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The dense network separated in one way, not trained yet."""
    torch.manual_seed(7000 + config["seed"])
    model = restore(config, needed[0])
    separated_(model, config["kernels"], data if config["start"] == "fitted" else None)
    if config["start"] == "random":
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
                module.reset_parameters()
    return Record({"test": evaluate(model, data.test)[1]}, _arrays(model))


def train_separable(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """A separated network trained on, with or without the dense one's soft targets."""
    start, dense = needed
    model = restore(config, start, config["kernels"])
    curve = _fit(model, data, config, 100 + config["seed"], dense)
    found = {"before": start.result["test"], "test": evaluate(model, data.test)[1], "curve": curve}
    timed = config["seed"] == 0 and config["soft"]
    return Record({**found, **_cost(model, data)}, _arrays(model) if timed else {})


def separated_(model: nn.Module, kernels: int, data: Digits | None = None) -> None:
    """Every 3x3 convolution but the first, whose input channels are too few, in place."""
    batches = None if data is None else data.train.images[:FITTED].split(125)
    separate_(model, Separable(kernels, rounds=ROUNDS), data=batches, objective=None, filter_fn=_inner)


def _inner(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Conv2d) and module.in_channels > 3


def restore(config: Mapping[str, Any], record: Record, kernels: int = 0) -> nn.Module:
    """The network of a record, dense or with so many kernels per input channel."""
    model = BUILD[config["network"]](config["channels"], config["width"])
    if kernels:
        separated_(model, kernels)
    state = {key: torch.from_numpy(value.copy()) for key, value in record.arrays.items() if key != "logits"}
    model.load_state_dict(state)
    return model


def _arrays(model: nn.Module) -> dict[str, Any]:
    return {key: value.contiguous().numpy() for key, value in model.state_dict().items()}


def _cost(model: nn.Module, data: Digits) -> dict[str, int]:
    return {"parameters": count_parameters(model)[0], "macs": count_macs(model, data.test.images[:1])[1]}


def _fit(
    model: nn.Module, data: Digits, config: Mapping[str, Any], seed: int, teacher: Record | None = None
) -> dict[str, list[float]]:
    """Adam with a cosine; every method of a seed sees the same batches. Validation on the way.

    Batches carry the numbers of their images in place of labels, by which the teacher's logits are found too.
    """
    steps, soft = config["steps"], config.get("soft", 0.0)
    labels = data.train.labels
    logits = torch.from_numpy(teacher.arrays["logits"]) if soft and teacher is not None else None

    def loss_fn(output: Tensor, index: Tensor) -> Tensor:
        hard = F.cross_entropy(output, labels[index])
        if logits is None:
            return hard
        return (1 - soft) * hard + soft * soft_target_loss(output, logits[index], config["temperature"])

    numbered = Digits(Split(data.train.images, torch.arange(len(labels))), data.validation, data.test)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"], fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPUs
    curve = fit(
        model, numbered, optimizer, steps=steps, batch_size=config["batch_size"], seed=seed, schedule=schedule,
        loss_fn=loss_fn, every=max(1, steps // 6) if "kernels" in config else None,
    )  # fmt: skip
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if not curve.steps:
        return {"steps": [], "accuracy": []}
    return {"steps": [float(step) for step in curve.steps], "accuracy": [round(a, 4) for a in curve.accuracy]}


# --- timing -----------------------------------------------------------------------------------------------------------


def _times(
    config: Mapping[str, Any], records: Mapping[str, Record], chosen: Plan, data: Digits, progress: Progress
) -> dict[str, Any]:
    """Batch size → network → seconds in the fastest way and in torch; and what `separate_` keeps where it chooses."""
    found: dict[str, Any] = {}
    stage = f"time {TITLES[config['network']]}"
    dense = restore(config, records["dense"]).eval()
    networks = {"dense": dense, "1 kernel": restore(config, records["1 kernel"], 1).eval()}
    networks["2 kernels"] = restore(config, records["2 kernels"], 2).eval()
    for number, batch in enumerate(BATCHES):
        progress(stage, number, len(BATCHES))
        x = data.test.images[:batch]
        choose = functools.partial(separate_, config=Separable(), example_inputs=x, filter_fn=_inner)
        found[str(batch)] = race_choice(networks, x, chosen.samples, choose)
    progress(stage, len(BATCHES), len(BATCHES))
    return found


def _wide_times(network: str, chosen: Plan, data: Digits, progress: Progress) -> dict[str, Any]:
    """The same in a wider network that nobody trained: rows with their MACs, and times."""
    stage = f"time {TITLES[network]}, wide"
    torch.manual_seed(0)
    dense = BUILD[network](data.train.images.shape[1], chosen.wide[network]).eval()
    x = data.test.images[: max(BATCHES)]
    networks = {"dense": dense}
    for kernels, row in enumerate(TIMED, 1):
        progress(stage, kernels - 1, len(TIMED) + 1)
        networks[row] = copy.deepcopy(dense)
        separated_(networks[row], kernels)
    progress(stage, len(TIMED), len(TIMED) + 1)
    found = {
        "rows": {row: {"macs": count_macs(model, x[:1])[1]} for row, model in networks.items()},
        "time": {str(batch): race(networks, x[:batch], chosen.samples) for batch in BATCHES},
    }
    progress(stage, len(TIMED) + 1, len(TIMED) + 1)
    return found


# --- the run ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train what is not stored in ``out``, time it, and put it together."""
    data, words = load(settings.data, settings.quick)
    channels = data.train.images.shape[1]
    chosen = plan(settings)
    made = trials(chosen, channels, len(data.train))
    records = run_all(list(made.values()), data, out, settings, progress)
    store = Store(out / "times")
    found: dict[str, Any] = {"experiment": "separable", "data": words, "plan": asdict(chosen), "networks": {}}
    with threads_of_torch(settings.threads):
        found["machine"] = machine.describe(settings.threads)
        for network in chosen.widths:
            config = made[network, "dense", 0].config
            timed = {key: records[made[network, row, 0].name] for key, row in {"dense": "dense", **TIMED}.items()}
            stamp = {
                "version": VERSION, "machine": found["machine"], "build": _build_stamp(), "samples": chosen.samples,
                "trials": [dict(made[network, row, 0].config) for row in ("dense", *TIMED.values())],
            }  # fmt: skip
            make = functools.partial(_times, config, timed, chosen, data, progress)
            times = store.once(network, stamp, make)
            found["networks"][network] = {
                "title": f"{TITLES[network]}, {chosen.widths[network]} channels in the first layer",
                "rows": {row: _row(made, records, network, row, chosen) for row in ("dense", "trained on", *VARIANTS)},
                "time": times,
            }
        found["wide"] = {}
        for network in (name for name in chosen.wide if name in chosen.widths):
            stamp = {
                "wide": chosen.wide[network], "machine": found["machine"], "build": _build_stamp(),
                "samples": chosen.samples,
            }  # fmt: skip
            make = functools.partial(_wide_times, network, chosen, data, progress)
            times = store.once(f"{network}-wide", stamp, make)
            found["wide"][network] = {"title": f"{TITLES[network]}, {chosen.wide[network]} channels", **times}
    lead = (
        f"3x3 convolutions made depthwise separable, at small scale: networks of the shape of VGG-16 and ResNet-20 on "
        f"{words}; {over_seeds(chosen.seeds)}, mean ± standard deviation. Times are measured, of seed 0's networks, in "
        "turns with the dense network. After arXiv 1704.04861 and 1808.05517."
    )
    return Result("Separable convolutions", lead, tables(found), figures(found), found)


def _row(
    made: Mapping[tuple[str, str, int], Trial], records: Mapping[str, Record], network: str, row: str, chosen: Plan
) -> dict[str, Any]:
    results = [records[made[network, row, seed].name].result for seed in range(chosen.seeds)]
    found: dict[str, Any] = {"test": [round(r["test"], 4) for r in results]}
    if "before" in results[0]:
        found["before"] = [round(r["before"], 4) for r in results]
        found["steps"] = results[0]["curve"]["steps"]
        found["validation"] = [r["curve"]["accuracy"] for r in results]
    for key in ("parameters", "macs"):
        if key in results[0]:
            found[key] = results[0][key]
    return found


# --- report -----------------------------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Per network: accuracy of every start, and measured times."""
    result = []
    headline = machine.headline(found["machine"])
    for network in found["networks"].values():
        rows: list[list[object]] = []
        dense = network["rows"]["dense"]
        for name, row in network["rows"].items():
            cost = row if "macs" in row else dense
            before = percent(row["before"]) if "before" in row else "-"
            left = f"{cost['macs'] / dense['macs']:.1%}"
            title, size = DENSE.get(name, name), f"{cost['parameters'] / 1e3:.0f} K"
            rows.append([title, size, left, before, percent(row["test"])])
        chosen = found["plan"]
        notes = [
            f"MACs: of the dense network's {dense['macs'] / 1e6:.2f} M for an image. Before and after "
            f"{chosen['tune_epochs']:g} epoch{'' if chosen['tune_epochs'] == 1 else 's'} of training, the same for all "
            "rows but the first.",
            "kernels: per input channel. distilled: soft targets of the dense network at temperature "
            f"{chosen['temperature']:g}.",
        ]
        columns = ["3x3 convolutions", "parameters", "MACs", "before, %", "test, %"]
        result.append(Table(f"{network['title']}: accuracy", columns, rows, notes))
        macs = {"dense": dense["macs"], **{key: network["rows"][row]["macs"] for key, row in TIMED.items()}}
        result.append(_times_of(network["title"], macs, network["time"], headline))
    for network in found["wide"].values():
        macs = {row: own["macs"] for row, own in network["rows"].items()}
        result.append(_times_of(network["title"], macs, network["time"], headline))
    return result


def _times_of(title: str, macs: Mapping[str, int], time: Mapping[str, Any], headline: str) -> Table:
    return time_table(title, "3x3 convolutions", macs, time, "separate_ with objective 'latency'", headline)


_STYLE: dict[str, dict[str, Any]] = {
    "dense": {"color": "black", "marker": "*", "markersize": 9},
    "trained on": {"color": "black", "marker": "P"},
    "1 kernel, random start": {"color": "#999999", "marker": "v"},
    "1 kernel, from weights": {"color": "#56B4E9", "marker": "o"},
    "1 kernel, fitted": {"color": "#0072B2", "marker": "o"},
    "1 kernel, fitted, distilled": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "2 kernels, fitted": {"color": "#D55E00", "marker": "o"},
    "2 kernels, fitted, distilled": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
}


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Recovery by training on; accuracy against measured time."""
    from slimtorch.experiments.plots import band, new_figure, plain_ticks

    networks = found["networks"]
    way, axes = new_figure(len(networks))
    for axis, network in zip(axes, networks.values(), strict=True):
        for name in VARIANTS:
            row, style = network["rows"][name], _STYLE[name]
            band(axis, row["steps"], [[100 * v for v in own] for own in row["validation"]], name, **style)
        axis.set_title(network["title"], fontsize=10)
        axis.set_xlabel("step of training after the separation")
        axis.set_ylabel("validation accuracy, %")
    way.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3, frameon=False)

    batches = list(next(iter(networks.values()))["time"])
    speed, panels = new_figure(len(networks) * len(batches), width=4.2)
    for axis, (network, batch) in zip(panels, ((n, b) for n in networks.values() for b in batches), strict=True):
        time = network["time"][batch]
        for name, label in (*DENSE.items(), *((row, row) for row in list(VARIANTS)[2:])):
            key = "dense" if name in DENSE else name.split(",")[0]
            numbers = mean_and_deviation([100 * v for v in network["rows"][name]["test"]])
            look: dict[str, Any] = {**_STYLE[name], "linestyle": "none"}
            deviation = numbers["std"] or 0.0
            axis.errorbar(time[key]["seconds"] * 1e3, numbers["mean"], deviation, label=label, capsize=3, **look)
        axis.set_xscale("log")
        seconds = [time[key]["seconds"] * 1e3 for key in ("dense", *TIMED)]
        axis.set_xlim(min(seconds) / 1.3, max(seconds) * 1.3)
        plain_ticks(axis.xaxis)
        axis.set_title(f"{network['title'].split(',')[0]}, batch {batch}", fontsize=10)
        axis.set_xlabel("milliseconds per call")
        axis.set_ylabel("test accuracy, %")
    speed.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    caption = "Test accuracy against measured time in the fastest way; up and to the left is better. Bars: ± 1 sd."
    return [
        ("separable", caption, speed),
        ("separable-recovery", "Validation accuracy while training on. Bands: ± 1 sd over seeds.", way),
    ]


EXPERIMENT = Experiment(
    name="separable",
    about="3x3 convolutions made depthwise separable: accuracy, MACs, measured time",
    paper="arXiv 1704.04861, 1808.05517",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
