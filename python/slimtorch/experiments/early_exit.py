# SPDX-License-Identifier: Apache-2.0
"""Early exits: accuracy against measured time, by threshold (BranchyNet, arXiv 1709.01686; MSDNet, arXiv 1703.09844).

    LeNet-5         ─────────────────────────────────▶ logits       the rival: trained alone, in its fastest dense form
    B-LeNet         ── conv1 ──┬── conv2 fc1 fc2 ────▶ logits       one branch, as in the paper
    B-LeNet, input  ─┬─ conv1 ─┬── conv2 fc1 fc2 ────▶ logits       a second one that sees the image itself
    MSDNet          ── block ──┬── block ──┬── … ────▶ logits       the rival: itself without exits

Thresholds come from the validation images, for an accuracy or for budgets; the test images are run with batches that
really shrink, and timed as a whole, in turns with the rival.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimtorch.data import Digits, load
from slimtorch.dynamic import (
    Criterion,
    EarlyExit,
    Entropy,
    Learned,
    MaxProbability,
    Option,
    Patience,
    exit_loss,
)
from slimtorch.dynamic._walk import walk
from slimtorch.experiments import machine
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.compare import _build_stamp
from slimtorch.experiments.loop import evaluate, fit
from slimtorch.experiments.pruned import check_digits, steps_of
from slimtorch.experiments.rivals import dense_ways, frozen_segments
from slimtorch.experiments.store import Record, Store
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.measure import interleave, threads_of_torch
from slimtorch.models import LeNet5, msdnet
from slimtorch.report import Table, format_number, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # raise it when trials train differently: stored ones are then not used
BATCHES = (1, 256)
SIZES = (2, 7, 32, 256)  # of batches in which every test image must have one answer and one exit
TITLES = {"branchynet": "B-LeNet", "branchynet-input": "B-LeNet, input", "msdnet": "MSDNet"}
CRITERIA: dict[str, Callable[[], Criterion]] = {
    "entropy": Entropy, "max probability": MaxProbability, "patience": Patience, "learned": Learned,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All numbers of a run.

    Attributes:
        seeds: of initialisation and order of batches.
        epochs: of training, by network; LeNet-5 alone gets those of "branchynet".
        rate: of Adam, with a cosine to 0.
        weights: of the exits' losses of the B-LeNets, by network; MSDNet's are 1.
        tolerance: share of validation accuracy that the thresholds may give away: the rival's less this is the goal.
        budgets: of the curves, as shares of what separates the first exit's MACs from the last one's.
        msdnet: sizes, see `slimtorch.models.msdnet`.
        images: of the test part that are run in batches of 1 for a time; larger batches use all.
        samples: rounds of timing.
        each: test images timed one by one for the histogram.
        together: test images run alone and in batches of `SIZES`, to see that nothing changes.
    """

    seeds: int
    epochs: Mapping[str, float]
    msdnet: Mapping[str, int]
    rate: float = 1.5e-3
    batch_size: int = 60
    weights: Mapping[str, tuple[float, ...]] | None = None
    tolerance: float = 0.0
    budgets: tuple[float, ...] = (0.02, 0.06, 0.12, 0.25, 0.5, 1.0)
    images: int = 200
    samples: int = 7
    each: int = 200
    together: int = 1000


def plan(settings: Settings) -> Plan:
    """The numbers of a quick or a full run."""
    weights = {"branchynet": (0.5, 1.0), "branchynet-input": (0.5, 0.5, 1.0)}
    if settings.quick:
        small = {"exits": 3, "base": 1, "step": 1, "width": 8, "growth": 4, "head": 24, "stride": 2}
        return Plan(
            settings.seeds or 2, {"branchynet": 3, "branchynet-input": 3, "msdnet": 4}, small, rate=2e-3,
            weights=weights, budgets=(0.05, 0.2, 0.5), images=40, samples=1, each=20, together=100,
        )  # fmt: skip
    full = {"exits": 4, "base": 1, "step": 1, "width": 8, "growth": 6, "head": 32, "stride": 2}
    return Plan(
        settings.seeds or 5, {"branchynet": 6, "branchynet-input": 6, "msdnet": 6}, full, weights=weights
    )  # fmt: skip


# --- networks ---------------------------------------------------------------------------------------------------------


def build(network: str, config: Mapping[str, Any]) -> EarlyExit:
    """A network of `TITLES`, not trained; its random numbers are torch's."""
    if network == "msdnet":
        return msdnet(10, 1, **config["msdnet"])
    parts: list[tuple[str, nn.Module]] = list(LeNet5().named_children())
    exits: dict[str, nn.Module] = {"pool1": nn.Sequential(nn.Flatten(), nn.Linear(20 * 12 * 12, 10))}
    if network == "branchynet-input":
        parts.insert(0, ("input", nn.Identity()))
        exits["input"] = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    return EarlyExit(parts, exits, Entropy())


def restore(network: str, config: Mapping[str, Any], record: Record) -> EarlyExit:
    """The network of a record, in eval mode."""
    model = build(network, config)
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in record.arrays.items()})
    return model.eval()


def _arrays(model: nn.Module) -> dict[str, Any]:
    return {key: value.contiguous().numpy() for key, value in model.state_dict().items()}


# --- training ---------------------------------------------------------------------------------------------------------


def _fit(model: nn.Module, data: Digits, config: Mapping[str, Any], loss_fn: Callable[[Any, Tensor], Tensor]) -> None:
    steps = steps_of(config["epochs"], data, config["batch_size"])
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # trains a third faster on CPUs
    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"], fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    fit(
        model, data, optimizer, steps=steps, batch_size=config["batch_size"], seed=config["seed"], schedule=schedule,
        loss_fn=loss_fn,
    )  # fmt: skip
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def train_dense(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """LeNet-5 alone."""
    torch.manual_seed(config["seed"])
    model = LeNet5()
    _fit(model, data, config, nn.functional.cross_entropy)
    result = {"validation": evaluate(model, data.validation)[1], "test": evaluate(model, data.test)[1]}
    return Record(result, _arrays(model) if not config["seed"] else {})


def train_exits(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """A network with exits, its thresholds, and what they do on the test images."""
    torch.manual_seed(config["seed"])
    model = build(config["network"], config)
    _fit(model, data, config, functools.partial(exit_loss, weights=config["weights"]))
    model.eval()
    validation = [(data.validation.images, data.validation.labels)]
    with torch.no_grad():
        outputs = model.all_exits(data.test.images), model.all_exits(data.validation.images)
    exits = [float((each.argmax(1) == data.test.labels).float().mean()) for each in outputs[0]]
    last = float((outputs[1][-1].argmax(1) == data.validation.labels).float().mean())

    everything = model.calibrate_(validation, macs=1e18)
    cost = [everything.options[0].macs, max(option.macs for option in everything.options)]
    curve = []
    for share in config["budgets"]:
        found = model.calibrate_(validation, macs=cost[0] + share * (cost[1] - cost[0]))
        curve.append(_outcome(model, data, found.chosen))
    rival = needed[0].result["validation"] if needed else last
    best = max(option.accuracy for option in everything.options)
    goal = min(rival, best) - config["tolerance"]
    found = model.calibrate_(validation, accuracy=goal)
    chosen = {**_outcome(model, data, found.chosen), "goal": goal}
    arrays = _arrays(model)
    result: dict[str, Any] = {
        "exits": exits, "last_validation": last, "cost": _costs(model, data), "curve": curve, "chosen": chosen,
        "points": model.points,
    }  # fmt: skip
    if len(model.points) > 1:
        result["criteria"] = _criteria(model, data, validation)
    return Record(result, arrays)


def _costs(model: EarlyExit, data: Digits) -> list[int]:
    """MACs of one sample until each exit."""
    return torch.tensor(model._macs(data.test.images[:1])).cumsum(0).tolist()


def _outcome(model: EarlyExit, data: Digits, option: Option) -> dict[str, Any]:
    """What the thresholds set do on the test images; ``option`` is what they did on the validation images."""
    run = model.run(data.test.images)
    leaving = torch.bincount(run.exits, minlength=len(model.stages)).double() / len(run.exits)
    return {
        "thresholds": list(option.thresholds), "validation": option.accuracy,
        "test": float((run.logits.argmax(1) == data.test.labels).float().mean()),
        "macs": float(run.macs.double().mean()), "leaving": leaving.tolist(), "alone": run.alone,
    }  # fmt: skip


def _criteria(model: EarlyExit, data: Digits, validation: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Test accuracy of every criterion at the mean MACs of patience 1, the coarsest of them."""
    kept = model.criterion
    found: dict[str, Any] = {}
    try:
        model.criterion = Patience(1)
        model.criterion.bind(len(model.points))
        with torch.no_grad():
            budget = float(model.run(data.validation.images).macs.double().mean())
        for name, kind in CRITERIA.items():
            model.criterion = kind()
            model.criterion.bind(len(model.points))
            outcome = _outcome(model, data, model.calibrate_(validation, macs=budget * (1 + 1e-6)).chosen)
            found[name] = {"test": outcome["test"], "macs": outcome["macs"]}
    finally:
        model.criterion = kept
    return found


def trials(chosen: Plan) -> dict[tuple[str, int], Trial]:
    """(network, seed) → trial; "lenet5" is the rival of the B-LeNets."""
    made: dict[tuple[str, int], Trial] = {}
    for seed in range(chosen.seeds):
        base = {"version": VERSION, "seed": seed, "batch_size": chosen.batch_size, "rate": chosen.rate}
        dense = {**base, "epochs": chosen.epochs["branchynet"]}
        made["lenet5", seed] = Trial(f"lenet5-seed{seed}", train_dense, dense)
        for network, epochs in chosen.epochs.items():
            config: dict[str, Any] = {
                **base, "network": network, "epochs": epochs, "tolerance": chosen.tolerance,
                "budgets": list(chosen.budgets), "weights": None,
            }  # fmt: skip
            if network == "msdnet":
                config["msdnet"] = dict(chosen.msdnet)
            elif chosen.weights is not None:
                config["weights"] = list(chosen.weights[network])
            needs = () if network == "msdnet" else (made["lenet5", seed],)
            made[network, seed] = Trial(f"{network}-seed{seed}", train_exits, config, needs)
    return made


# --- timing -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _timed(
    network: str, configs: Sequence[Mapping[str, Any]], records: Sequence[Record], dense: Record | None, chosen: Plan,
    data: Digits,
) -> dict[str, Any]:  # fmt: skip
    """Batch size → seconds per image of the rival, of every seed's network at its thresholds, of seed 0's curve."""
    found: dict[str, Any] = {}
    models = [restore(network, config, record) for config, record in zip(configs, records, strict=True)]
    rival: nn.Module = nn.Sequential(*models[0].stages)
    if dense is not None:
        rival = LeNet5()
        rival.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in dense.arrays.items()})
    rival.eval()
    for batch in BATCHES:
        images = data.test.images[: chosen.images] if batch == 1 else data.test.images
        parts = [part.clone() for part in images.split(batch)]
        calls: dict[str, Callable[[], object]] = {}
        for name, way in dense_ways(rival, parts[0]).items():
            calls[f"dense/{name}"] = functools.partial(_all, way, parts)
        segments: list[Callable[[Any], Any]] = []
        for seed, model in enumerate(models):
            own = frozen_segments(model, parts[0])
            segments = segments or own
            quick = model.with_segments(own)
            if float((quick(images) - model(images)).abs().max()) > 1e-2:
                raise RuntimeError(f"{network}, seed {seed}: frozen segments differ")
            calls[f"chosen/{seed}"] = functools.partial(_all, quick, parts)
        calls["chosen/torch"] = functools.partial(_all, models[0], parts)
        for number, point in enumerate(records[0].result["curve"]):
            twin = restore(network, configs[0], records[0])
            twin.criterion = type(twin.criterion)(point["thresholds"])
            twin.criterion.bind(len(twin.points))
            calls[f"curve/{number}"] = functools.partial(_all, twin.with_segments(segments), parts)
        taken = interleave(calls, samples=chosen.samples, min_sample_seconds=0.0)
        seconds = {name: float(f"{latency.median / len(images):.4g}") for name, latency in taken.items()}
        found[str(batch)] = {
            "dense": {name.split("/")[1]: value for name, value in seconds.items() if name.startswith("dense/")},
            "chosen": [seconds[f"chosen/{seed}"] for seed in range(len(models))],
            "torch": seconds["chosen/torch"],
            "curve": [seconds[f"curve/{number}"] for number in range(len(records[0].result["curve"]))],
        }
    found["changed"] = _changed(models[0], data.test.images[: chosen.together])
    each = models[0].latencies(data.test.images[: chosen.each], samples=3)
    found["each"] = [float(f"{value:.3g}") for value in each.tolist()]
    return found


def _changed(model: EarlyExit, images: Tensor) -> list[int]:
    """How many images get another answer or leave elsewhere in batches of each of `SIZES` than alone."""

    def outcome(size: int) -> Tensor:
        """Answer and exit of every image, [n, 2]."""
        walks = [walk(model._calls(), part, model.criterion, model.margin) for part in images.split(size)]
        answers = torch.cat([each.logits.argmax(1) for each in walks])
        return torch.stack((answers, torch.cat([torch.from_numpy(each.exits) for each in walks])), 1)

    alone = outcome(1)
    return [int((outcome(size) != alone).any(1).sum()) for size in SIZES]


def _all(call: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> None:
    for part in parts:
        call(part)


# --- the run ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train what is not stored in ``out``, time it, and put it together."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    check_digits(data)
    made = trials(chosen)
    records = run_all(list(made.values()), data, out, settings, progress)
    found: dict[str, Any] = {
        "experiment": "early-exit", "data": what, "plan": asdict(chosen), "networks": {},
        "dense": [records[made["lenet5", seed].name].result["test"] for seed in range(chosen.seeds)],
    }  # fmt: skip
    store = Store(out / "times")
    with threads_of_torch(settings.threads):
        found["machine"] = machine.describe(settings.threads)
        for done, network in enumerate(chosen.epochs):
            progress("time", done, len(chosen.epochs))
            own = [records[made[network, seed].name] for seed in range(chosen.seeds)]
            configs = [made[network, seed].config for seed in range(chosen.seeds)]
            stamp = {
                "version": VERSION, "machine": found["machine"], "build": _build_stamp(),
                "trials": list(map(dict, configs)), "samples": chosen.samples,
                "images": chosen.images, "each": chosen.each, "together": chosen.together,
            }  # fmt: skip
            dense = None if network == "msdnet" else records[made["lenet5", 0].name]
            make = functools.partial(_timed, network, configs, own, dense, chosen, data)
            times = store.once(network, stamp, make)
            found["networks"][network] = _gathered([record.result for record in own], times)
        progress("time", len(chosen.epochs), len(chosen.epochs))
    lead = (
        f"Networks with exits, trained on {what}, {over_seeds(chosen.seeds)}. Thresholds are set on validation images; "
        "a sample that is sure leaves, the batch shrinks, and what is told is the measured time of all test images. "
        "At small scale."
    )
    return Result("Early exits", lead, tables(found), figures(found), found)


def _gathered(results: Sequence[Mapping[str, Any]], times: Mapping[str, Any]) -> dict[str, Any]:
    first = results[0]
    found = {
        "points": [*first["points"], "last"],
        "cost": first["cost"],
        "exits": [[result["exits"][k] for result in results] for k in range(len(first["exits"]))],
        "chosen": {key: [r["chosen"][key] for r in results] for key in ("test", "macs", "leaving", "alone", "goal")},
        "thresholds": [[float(f"{t:.4g}") for t in r["chosen"]["thresholds"]] for r in results],
        "curve": [
            {key: [r["curve"][k][key] for r in results] for key in ("test", "macs")} for k in range(len(first["curve"]))
        ],
        "times": times,
    }  # fmt: skip
    if "criteria" in first:
        found["criteria"] = {
            name: {key: [r["criteria"][name][key] for r in results] for key in ("test", "macs")} for name in CRITERIA
        }
    return found


# --- report -----------------------------------------------------------------------------------------------------------


def _best(times: Mapping[str, Any], batch: int) -> tuple[str, float]:
    own = times[str(batch)]["dense"]
    name = min(own, key=own.__getitem__)
    return name, own[name]


def _rival_accuracy(found: Mapping[str, Any], network: str) -> list[float]:
    """Per seed: LeNet-5 alone, or MSDNet's own last exit."""
    return list(found["networks"][network]["exits"][-1] if network == "msdnet" else found["dense"])


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Speed at equal accuracy; where samples leave; the criteria."""
    rows: list[list[object]] = []
    for network, part in found["networks"].items():
        times = part["times"]
        dense = _rival_accuracy(found, network)
        for batch in BATCHES:
            name, seconds = _best(times, batch)
            own = times[str(batch)]["chosen"]
            first = [TITLES[network], percent(dense), percent(part["chosen"]["test"])]
            first = first if batch == BATCHES[0] else [""] * 3
            faster = f"{statistics.fmean(seconds / value for value in own):.1f}x"
            mean = format_seconds(statistics.fmean(own))
            rows.append([*first, batch, f"{format_seconds(seconds)} ({name})", mean, faster])
    seeds = found["plan"]["seeds"]
    notes = [
        "rival: LeNet-5 trained alone, for MSDNet itself without exits; in its fastest form: torch, oneDNN or frozen",
        f"accuracy on 1,000 test images in percent, mean ± standard deviation over {over_seeds(seeds)}; time per "
        "image of a run over all of them, measured; segments are frozen TorchScript",
        "thresholds: the cheapest that reach the rival's accuracy on the validation images, or the best there are",
    ]
    columns = ["", "rival, %", "with exits, %", "batch", "rival, time", "with exits", "faster"]
    result = [Table("Early exits: time per image at equal accuracy", columns, rows, notes)]

    rows = []
    for network, part in found["networks"].items():
        for k, point in enumerate(part["points"]):
            leaving = [each[k] for each in part["chosen"]["leaving"]]
            rows.append([
                TITLES[network] if not k else "", point, format_number(part["cost"][k]), percent(part["exits"][k]),
                percent(leaving),
            ])  # fmt: skip
    notes = ["MACs of a sample that leaves there; accuracy of the exit on all test images; share that leaves there"]
    changed = sum(count for part in found["networks"].values() for count in part["times"]["changed"])
    notes.append(
        f"{changed} of {found['plan']['together']:,} test images have another answer or exit in batches of "
        f"{', '.join(map(str, SIZES))} than alone (seed 0, all networks)"
    )
    result.append(Table("Where samples leave", ["", "exit", "MACs", "accuracy, %", "leaving, %"], rows, notes))

    rows = []
    for network, part in found["networks"].items():
        for number, name in enumerate(part.get("criteria", {})):
            own = part["criteria"][name]
            macs = format_number(statistics.fmean(own["macs"]))
            rows.append([TITLES[network] if not number else "", name, percent(own["test"]), macs])
    if rows:
        notes = ["thresholds for the mean MACs that patience 1 needs on validation images; MACs are those of the test"]
        result.append(Table("Criteria at one budget", ["", "criterion", "accuracy, %", "MACs per image"], rows, notes))
    return result


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy against measured time, by threshold; what samples cost."""
    from slimtorch.experiments.plots import COLORS, new_figure, plain_ticks

    figure, axes = new_figure(len(BATCHES))
    for axis, batch in zip(axes, BATCHES, strict=True):
        for number, (network, part) in enumerate(found["networks"].items()):
            x = [1e6 * value for value in part["times"][str(batch)]["curve"]]
            means = [100 * statistics.fmean(point["test"]) for point in part["curve"]]
            deviations = [100 * statistics.stdev(p["test"]) if len(p["test"]) > 1 else 0.0 for p in part["curve"]]
            color = COLORS[(0, 2, 3)[number]]
            axis.errorbar(x, means, deviations, label=TITLES[network], color=color, marker="o", markersize=4, capsize=2)
            own = [1e6 * statistics.fmean(part["times"][str(batch)]["chosen"])]
            axis.plot(own, [100 * statistics.fmean(part["chosen"]["test"])], marker="o", color=color, markersize=11,
                      fillstyle="none", linestyle="none")  # fmt: skip
            if network != "branchynet-input":
                title = "LeNet-5 alone" if network == "branchynet" else "MSDNet without exits"
                dense = 100 * statistics.fmean(_rival_accuracy(found, network))
                axis.plot([1e6 * _best(part["times"], batch)[1]], [dense], marker="*", markersize=13, color=color,
                          markeredgecolor="black", linestyle="none", label=title)  # fmt: skip
        axis.set_xscale("log")
        plain_ticks(axis.xaxis)
        axis.set_xlabel(f"microseconds per image, batch {batch}")
        axis.set_ylabel("test accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5, frameon=False)

    costs, panels = new_figure(len(found["networks"]), width=4.2, height=3.6)
    for number, (axis, (network, part)) in enumerate(zip(panels, found["networks"].items(), strict=True)):
        values = [1e6 * value for value in part["times"]["each"]]
        low, high = min(values), max(values)
        bins = [low * (high / low * 1.001) ** (k / 30) for k in range(31)]
        axis.hist(values, bins, color=COLORS[(0, 2, 3)[number]])
        axis.axvline(statistics.fmean(values), color="black", linestyle="--", linewidth=1.2, label="mean")
        axis.set_xscale("log")
        plain_ticks(axis.xaxis)
        axis.set_title(TITLES[network], fontsize=10)
        axis.set_xlabel("microseconds of one image")
        axis.set_ylabel("test images")
        axis.legend(fontsize=8, frameon=False)
    return [
        (
            "early-exit",
            "Accuracy against measured time by threshold; circles: those of the table. Bars: ± 1 sd over seeds.",
            figure,
        ),
        ("early-exit-cost", "What single images cost, timed one by one, at the table's thresholds (seed 0).", costs),
    ]


EXPERIMENT = Experiment(
    name="early-exit",
    about="samples that are sure leave: accuracy against measured time, by threshold",
    paper="arXiv 1709.01686, 1703.09844",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
