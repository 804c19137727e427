# SPDX-License-Identifier: Apache-2.0
"""One set of weights at several widths, against a network trained for each, with the measured time of every width.

After Yu et al., "Slimmable Neural Networks" (arXiv 1812.08928), and Yu & Huang, "Universally Slimmable Networks"
(arXiv 1903.05134): all widths are trained together (each step runs them all), from the labels or, except the whole
network, from its outputs; or random widths are, and the batch norms of any width take their statistics afterwards. The
rivals are plain networks of each width, trained alone with as many steps, and the whole one of them cut to a width
without training for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtorch.data import Digits, load
from slimtorch.dynamic import at_width, export, recalibrate_, sandwich_step, set_width, slimmable_
from slimtorch.dynamic.slimmable_layers import kept
from slimtorch.experiments import machine
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.compare import _build_stamp, _check_same
from slimtorch.experiments.loop import Diverged, batches, evaluate, fit
from slimtorch.experiments.pruned import check_digits, steps_of
from slimtorch.experiments.rivals import dense_rivals
from slimtorch.experiments.slimmable_report import figures, tables
from slimtorch.experiments.store import Record, Store
from slimtorch.experiments.summary import over_seeds
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.measure import count_macs, count_parameters, interleave, threads_of_torch
from slimtorch.models import resnet18
from slimtorch.packing import _judge

VERSION = 1  # raise it when the code below trains differently
BATCHES = (1, 256)
TOGETHER = ("slimmable", "labels", "universal")  # methods with one set of weights
SWITCHED = "switched"  # the way to run that is not exported


@dataclass(frozen=True)
class Plan:
    """All numbers of the experiment.

    Attributes:
        seeds: of initialisation, order of batches, draws of widths.
        epochs: of training, by network.
        methods: of `TOGETHER`, by network.
        widths: trained together, and each alone.
        others: widths at which the universal networks are looked at too.
        rate: of Adam, with a cosine to 0.
        batch_size: images in a step.
        statistics: training images that recalibrated batch norms see.
        samples: rounds of timing.
    """

    seeds: int
    epochs: Mapping[str, float]
    methods: Mapping[str, tuple[str, ...]]
    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    others: tuple[float, ...] = (0.35, 0.45, 0.6, 0.85)
    rate: float = 2e-3
    batch_size: int = 60
    statistics: int = 1200
    samples: int = 7


def plan(settings: Settings) -> Plan:
    """The numbers of a quick or a full run."""
    if settings.quick:
        made = Plan(2, {"convnet": 3}, {"convnet": ("slimmable", "universal")}, (0.25, 0.5, 1.0), samples=3)
    else:
        made = Plan(5, {"convnet": 6, "resnet": 4}, {"convnet": TOGETHER, "resnet": ("slimmable",)})
    return replace(made, seeds=settings.seeds or made.seeds)


# --- training ---------------------------------------------------------------------------------------------------------


def network(name: str, width: float = 1.0) -> nn.Module:
    """A plain network of a width: "convnet" is LeNet-5 with batch norms, "resnet" a narrow ResNet-18."""
    if name == "resnet":
        return resnet18(10, 1, kept(16, width))
    one, two, three = (kept(neurons, width) for neurons in (20, 50, 500))
    return nn.Sequential(
        nn.Conv2d(1, one, 5, bias=False), nn.BatchNorm2d(one), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(one, two, 5, bias=False), nn.BatchNorm2d(two), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * two, three, bias=False), nn.BatchNorm1d(three), nn.ReLU(), nn.Linear(three, 10),
    )  # fmt: skip


def together(config: Mapping[str, Any], data: Digits) -> nn.Module:
    """The slimmable network of a configuration, not trained."""
    model = network(config["network"])
    universal = config["method"] == "universal"
    slimmable_(model, config["widths"], example_inputs=data.train.images[:2], universal=universal)
    return model


def train_alone(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """A plain network of one width; the whole one is also cut to the others, with new statistics and nothing else."""
    torch.manual_seed(9000 + config["seed"])
    model = _fast(network(config["network"], config["width"]))
    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"])
    steps = steps_of(config["epochs"], data, config["batch_size"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    fit(model, data, optimizer, steps=steps, batch_size=config["batch_size"], seed=config["seed"], schedule=schedule)
    result: dict[str, Any] = {
        "validation": evaluate(model, data.validation)[1],
        "test": evaluate(model, data.test)[1],
        "macs": count_macs(model, data.test.images[:1])[1],
        "parameters": count_parameters(model)[0],
    }
    arrays = _arrays(model)
    if config["width"] == 1:
        slimmable_(model, config["widths"], example_inputs=data.train.images[:2])
        recalibrate_(model, _seen(config, data))
        result["cut"] = [look["test"] for look in _look(model, config["widths"], data)]
    return Record(result, arrays)


def train_together(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """All widths in one set of weights; ``widths`` of the result in the order of the configuration's."""
    torch.manual_seed(9000 + config["seed"])
    model = _fast(together(config, data))
    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"])
    steps = steps_of(config["epochs"], data, config["batch_size"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = torch.Generator().manual_seed(9500 + config["seed"])
    model.train()
    taken = islice(batches(data.train, config["batch_size"], config["seed"]), steps)
    for step, (images, labels) in enumerate(taken):
        optimizer.zero_grad()
        losses = sandwich_step(model, images, labels, distill=config["method"] != "labels", generator=draws)
        total = sum(float(loss) for loss in losses.values())
        if not math.isfinite(total):
            raise Diverged(step, total)
        optimizer.step()
        schedule.step()
    result: dict[str, Any] = {"parameters": count_parameters(model)[0]}
    if config["method"] == "universal":
        recalibrate_(model, _seen(config, data))
        result["others"] = []
        for width in config["others"]:
            recalibrate_(model, _seen(config, data), [width])
            result["others"] += _look(model, [width], data)
    result["widths"] = _look(model, config["widths"], data)
    return Record(result, _arrays(model))


def _fast(model: nn.Module) -> nn.Module:
    """Training convolutions takes half the time so."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _arrays(model: nn.Module) -> dict[str, Any]:
    return {key: value.contiguous().numpy().copy() for key, value in model.state_dict().items()}


def _seen(config: Mapping[str, Any], data: Digits) -> tuple[Tensor, ...]:
    return data.train.images[: config["statistics"]].split(config["batch_size"])


def _look(model: nn.Module, widths: Sequence[float], data: Digits) -> list[dict[str, Any]]:
    found = []
    for width in widths:
        with at_width(model, width):
            found.append({
                "validation": evaluate(model, data.validation)[1], "test": evaluate(model, data.test)[1],
                "macs": count_macs(model, data.test.images[:1])[1],
            })  # fmt: skip
    return found


def trials(chosen: Plan) -> dict[tuple[str, str, int], Trial]:
    """(network, method or width, seed) → trial."""
    made: dict[tuple[str, str, int], Trial] = {}
    for name, epochs in chosen.epochs.items():
        for seed in range(chosen.seeds):
            base = {
                "version": VERSION, "network": name, "seed": seed, "epochs": epochs, "rate": chosen.rate,
                "batch_size": chosen.batch_size, "widths": list(chosen.widths), "statistics": chosen.statistics,
            }  # fmt: skip
            for width in chosen.widths:
                label = f"{width:g}"
                trial = Trial(f"{name}-alone-{label}-seed{seed}", train_alone, {**base, "width": width})
                made[name, label, seed] = trial
            for method in chosen.methods[name]:
                config = {**base, "method": method, "others": list(chosen.others)}
                made[name, method, seed] = Trial(f"{name}-{method}-seed{seed}", train_together, config)
    return made


# --- timing -----------------------------------------------------------------------------------------------------------


def _times(
    chosen: Plan, made: Mapping[tuple[str, str, int], Trial], records: Mapping[str, Record], data: Digits,
    progress: Progress,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:  # fmt: skip
    """Network → batch size → width → way → seconds per image, of the slimmable network of seed 0."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    total = len(chosen.epochs) * len(BATCHES)
    for name in chosen.epochs:
        trial = made[name, chosen.methods[name][0], 0]
        model = together(trial.config, data).eval()
        state = records[trial.name].arrays
        model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in state.items()})
        found[name] = {}
        with torch.inference_mode():
            for batch in BATCHES:
                progress("time", len(found) * len(BATCHES) - len(BATCHES) + len(found[name]), total)
                x = data.test.images[:batch]
                calls: dict[str, Callable[[], object]] = {}
                for width in chosen.widths:
                    narrow = export(model, width)
                    with at_width(model, width):
                        _check_same(model, narrow, data.test.images[:64])
                    for way, call in dense_rivals(narrow, x).items():
                        calls[f"{width:g}/{way}"] = call
                    calls[f"{width:g}/{SWITCHED}"] = functools.partial(_switched, model, width, x)
                latencies = interleave(calls, samples=chosen.samples, min_sample_seconds=0.01)
                _, seconds = _judge(list(latencies.values()))
                own: dict[str, dict[str, float]] = {f"{width:g}": {} for width in chosen.widths}
                for key, value in zip(latencies, seconds, strict=True):
                    label, way = key.split("/")
                    own[label][way] = float(f"{value / batch:.4g}")
                found[name][str(batch)] = own
    progress("time", total, total)
    return found


def _switched(model: nn.Module, width: float, x: Tensor) -> Tensor:
    set_width(model, width)
    result: Tensor = model(x)
    return result


# --- the run ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train what is not stored in `out`, time it, and put it together."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    check_digits(data)
    made = trials(chosen)
    records = run_all(list(made.values()), data, out, settings, progress)
    with threads_of_torch(settings.threads):
        described = machine.describe(settings.threads)
        stamp = {
            "version": VERSION, "machine": described, "build": _build_stamp(), "samples": chosen.samples,
            "trials": [dict(trial.config) for trial in made.values()],
        }  # fmt: skip
        store = Store(out / "times")  # without it, times are taken again and nothing is trained
        times = store.once("slimmable", stamp, functools.partial(_times, chosen, made, records, data, progress))
    networks: dict[str, Any] = {}
    for name in chosen.epochs:

        def of(label: str, name: str = name) -> list[dict[str, Any]]:
            return [records[made[name, label, seed].name].result for seed in range(chosen.seeds)]

        alone = {width: of(f"{width:g}") for width in chosen.widths}
        rows: dict[str, Any] = {
            "alone": {key: [[own[key] for own in alone[width]] for width in chosen.widths] for key in _KEYS},
            "cut": {"test": [[own["cut"][i] for own in alone[1.0]] for i in range(len(chosen.widths))]},
        }
        for method in chosen.methods[name]:
            results = of(method)
            rows[method] = {
                key: [[own["widths"][i][key] for own in results] for i in range(len(chosen.widths))] for key in _KEYS
            }
            if method == "universal":
                rows[method]["others"] = [
                    [own["others"][i]["test"] for own in results] for i in range(len(chosen.others))
                ]
        networks[name] = {
            "methods": rows,
            "macs": [alone[width][0]["macs"] for width in chosen.widths],
            "parameters": [alone[width][0]["parameters"] for width in chosen.widths],
            "parameters_together": of(chosen.methods[name][0])[0]["parameters"],
            "steps": steps_of(chosen.epochs[name], data, chosen.batch_size),
            "times": times[name],
        }
    found: dict[str, Any] = {
        "experiment": "slimmable", "data": what, "plan": asdict(chosen), "machine": described, "networks": networks,
    }  # fmt: skip
    lead = (
        f"Several widths from one set of weights, on {what}, at small scale; {over_seeds(chosen.seeds)}, mean ± "
        "standard deviation. Times are measured on the network that is exported at each width, all widths by turns, "
        "each in the fastest of the ways that torch has to run it."
    )
    return Result("Slimmable networks", lead, tables(found), figures(found), found)


_KEYS = ("validation", "test")

EXPERIMENT = Experiment(
    name="slimmable",
    about="several widths from one set of weights, against networks trained for each, with measured time",
    paper="arXiv 1812.08928, 1903.05134",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
