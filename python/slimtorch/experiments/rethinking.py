# SPDX-License-Identifier: Apache-2.0
"""Is it worth pruning a trained network, or does its small shape do as well when it is trained from scratch?

Liu et al., "Rethinking the Value of Network Pruning" (1810.05270): the same shape, four times.

    unpruned      the large network
    fine-tuned    what pruning leaves of it, trained on
    Scratch-E     the same shape from new random weights, for as many epochs as the large network
    Scratch-B     the same, for as much computation

Shapes given beforehand, filled by the L1 norm of filters (VGG-16-A, ResNet-56-A and -B, ResNet-110-A and -B), and
shapes that pruning finds: by network slimming, and by magnitude of single weights.

On the embedded digits networks are narrowed and images reduced (see `SMALL`). With ``--data cifar10`` (or ``mnist``, or
a folder with either) everything is as in the paper: full widths, 160 epochs, ResNet-110 too, crops and flips of colour
images; with two cores that takes months, so that it is work for many machines (``--ray``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch import models, prune
from slimtorch.data import Digits, Split, load
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.loop import evaluate, fit
from slimtorch.experiments.machine import describe
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import mean_and_deviation, over_seeds, percent, spread
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.prune import scratch
from slimtorch.prune.mask import unmasked_weight
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # raise it when the code below trains differently


@dataclass(frozen=True)
class Pruned:
    """One row of the table.

    Attributes:
        title: of the row.
        network: the large one: "vgg16", "resnet20", "resnet56" or "resnet110".
        how: a predefined shape, "A" or "B"; "slimming": channels by batch-norm scale; "weights": by magnitude.
        paper: unpruned, fine-tuned, Scratch-E, Scratch-B on CIFAR-10, percent (Table 1, mean of five runs); None: the
            paper prunes another network in this way.
    """

    title: str
    network: str
    how: str
    paper: tuple[float, float, float, float] | None = None


ROWS = {
    "vgg16-a": Pruned("VGG-16-A", "vgg16", "A", (93.63, 93.41, 93.62, 93.78)),
    "resnet56-a": Pruned("ResNet-56-A", "resnet56", "A", (93.14, 92.97, 92.96, 93.09)),
    "resnet56-b": Pruned("ResNet-56-B", "resnet56", "B", (93.14, 92.67, 92.54, 93.05)),
    "resnet110-a": Pruned("ResNet-110-A", "resnet110", "A", (93.14, 93.14, 93.25, 93.22)),
    "resnet110-b": Pruned("ResNet-110-B", "resnet110", "B", (93.14, 92.69, 92.89, 93.60)),
    "vgg16-slimming": Pruned("VGG-16, slimming", "vgg16", "slimming"),
    "resnet20-weights": Pruned("ResNet-20, weights", "resnet20", "weights"),
}
COLUMNS = {"unpruned": "unpruned", "tuned": "fine-tuned", "e": "Scratch-E", "b": "Scratch-B"}
_COLORS = {"unpruned": "#999999", "tuned": "#E69F00", "e": "#56B4E9", "b": "#0072B2"}
_MARKERS = {"unpruned": "s", "tuned": "^", "e": "o", "b": "D"}

# Network -> (what all its widths are divided by, height and width of the images): VGG-16 halves its images four times.
SMALL = {"vgg16": (8, 16), "resnet20": (4, 14), "resnet56": (4, 14)}


@dataclass(frozen=True)
class Plan:
    """All numbers of a run.

    Attributes:
        seeds, rows: what is trained.
        small: networks and images as in `SMALL`, else as they are.
        epochs: of the large network and of Scratch-E; the learning rate falls to a tenth after half of them and again
            after three quarters.
        tune_epochs, tune_rate: of fine-tuning, at one rate.
        batch_size, rate, momentum, weight_decay: of SGD, for all columns alike.
        strength: of the penalty on batch-norm scales.
        slimmed: share of all channels of convolutions that slimming removes.
        sparsity: share of all weights of convolutions that magnitude pruning removes.
        at_most: the largest factor of Scratch-B; None: what the multiply-accumulates say.
    """

    seeds: int
    rows: tuple[str, ...]
    small: bool
    epochs: int
    tune_epochs: int
    tune_rate: float
    strength: float
    slimmed: float
    sparsity: float
    at_most: float | None
    batch_size: int = 64
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4


def plan(settings: Settings) -> Plan:
    """For the embedded digits, rates and strength chosen on validation; the paper's recipe for data of one's own."""
    if settings.data is not None:
        return Plan(
            seeds=settings.seeds or (1 if settings.quick else 5), rows=tuple(ROWS), small=False,
            epochs=2 if settings.quick else 160, tune_epochs=1 if settings.quick else 40, tune_rate=1e-3,
            strength=1e-4, slimmed=0.7, sparsity=0.8, at_most=None,
        )  # fmt: skip
    rows = ("vgg16-a", "resnet56-b", "vgg16-slimming", "resnet20-weights")
    if settings.quick:  # smaller batches, and not the deepest: as many steps as a minute has room for
        return Plan(
            seeds=settings.seeds or 1, rows=tuple(name for name in rows if name != "resnet56-b"), small=True,
            epochs=5, tune_epochs=1, tune_rate=1e-2, strength=1e-3, slimmed=0.5, sparsity=0.8, at_most=2.0,
            batch_size=32,
        )  # fmt: skip
    return Plan(
        seeds=settings.seeds or 5, rows=rows, small=True, epochs=8, tune_epochs=2, tune_rate=1e-2, strength=1e-3,
        slimmed=0.5, sparsity=0.8, at_most=2.0,
    )  # fmt: skip


# --- networks and images --------------------------------------------------------------------------------------------


def build(network: str, narrow: int, channels: int, shape: str | Sequence[int] | None = None) -> nn.Module:
    """A network with all widths divided by ``narrow``; ``shape``: "A", "B", or the widths of VGG-16's convolutions."""
    if network == "vgg16":
        widths: Sequence[int]
        if shape is None or isinstance(shape, str):
            full = models.VGG16_WIDTHS if shape is None else models.VGG16_A_WIDTHS
            widths = [width // narrow for width in full]
        else:
            widths = shape
        return models.vgg16(channels=channels, widths=widths, hidden=512 // narrow)
    makers: dict[str, Callable[..., nn.Module]] = {
        "resnet20": models.resnet20,
        "resnet56": models.resnet56,
        "resnet56A": models.resnet56_a,
        "resnet56B": models.resnet56_b,
        "resnet110": models.resnet110,
        "resnet110A": models.resnet110_a,
        "resnet110B": models.resnet110_b,
    }
    return makers[f"{network}{shape or ''}"](channels=channels, width=16 // narrow)


class Augmented(nn.Module):
    """The network behind random crops (four pixels of zeros around) and flips of the images it is trained on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.network(x)
        count, _, height, width = x.shape
        padded = F.pad(x, (4, 4, 4, 4))
        tops, lefts = torch.randint(9, (2, count)).tolist()
        crops = [padded[i, :, t : t + height, s : s + width] for i, (t, s) in enumerate(zip(tops, lefts, strict=True))]
        flips = torch.rand(count) < 0.5
        images = torch.stack(crops)
        return self.network(torch.where(flips[:, None, None, None], images.flip(3), images))


# --- trials -----------------------------------------------------------------------------------------------------------


def _images(config: Mapping[str, Any], data: Digits) -> Digits:
    """Images averaged down to the size asked for."""
    size = config["size"]
    if size is None:
        return data
    parts = (data.train, data.validation, data.test)
    return Digits(*(Split(F.interpolate(p.images, size=(size, size), mode="area"), p.labels) for p in parts))


def _train(
    model: nn.Module,
    config: Mapping[str, Any],
    images: Digits,
    epochs: int,
    *,
    tune: bool = False,
    penalty: Callable[[], Tensor] | None = None,
) -> dict[str, float]:
    """The recipe, the same for every column. Fine-tuning goes on at a rate that does not fall."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        config["tune_rate"] if tune else config["rate"],
        config["momentum"],
        weight_decay=config["weight_decay"],
    )
    steps = max(1, len(images.train) // min(config["batch_size"], len(images.train)))
    marks = [] if tune else [mark * steps for mark in scratch.milestones(epochs)]
    fit(
        Augmented(model) if config["augment"] else model,
        images,
        optimizer,
        steps=epochs * steps,
        batch_size=config["batch_size"],
        seed=config["seed"] + (1000 if tune else 0),
        schedule=torch.optim.lr_scheduler.MultiStepLR(optimizer, marks),
        penalty=penalty,
    )
    return _scores(model, images)


def _scores(model: nn.Module, images: Digits) -> dict[str, float]:
    return {"test": evaluate(model, images.test)[1], "validation": evaluate(model, images.validation)[1]}


def _state(model: nn.Module) -> dict[str, Any]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


def _sizes(model: nn.Module, images: Digits) -> dict[str, float]:
    masked = sum(int((~mask).sum()) for mask in prune.masks(model).values())
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - masked,
        "macs": scratch.work(model, images.test.images[:1]),
    }


def _build(config: Mapping[str, Any], images: Digits, shape: str | Sequence[int] | None = None) -> nn.Module:
    return build(config["network"], config["narrow"], images.train.images.shape[1], shape)


def run_unpruned(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The large network."""
    torch.manual_seed(config["seed"])
    images = _images(config, data)
    model = _build(config, images)
    scores = _train(model, config, images, config["epochs"])
    return Record({**scores, **_sizes(model, images)}, _state(model))


def run_tuned(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The large network pruned and fine-tuned; tells the shape found (widths, or masks)."""
    torch.manual_seed(config["seed"])
    images, how = _images(config, data), config["how"]
    example = images.train.images[:2]
    model = _build(config, images)
    result: dict[str, Any] = {}
    if how == "slimming":  # slimming prunes a network that was trained with the penalty from the start
        penalty = prune.SlimmingPenalty(model, config["strength"], filter_fn=lambda m, _: isinstance(m, nn.BatchNorm2d))
        result["penalised"] = _train(model, config, images, config["epochs"], penalty=penalty)["test"]
        channels = prune.Neurons(config["slimmed"], "batchnorm", scope="global", normalize=False)
        prune.prune_(model, channels, example_inputs=example, filter_fn=lambda m, _: isinstance(m, nn.Conv2d))
        result["widths"] = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    else:
        model.load_state_dict({key: torch.from_numpy(value) for key, value in needed[0].arrays.items()})
        if how == "weights":
            weights = prune.Magnitude(config["sparsity"], scope="global", allow_empty=False)
            prune.prune_(model, weights, filter_fn=lambda m, _: isinstance(m, nn.Conv2d))
        else:
            small = _build(config, images, how)
            scratch.inherit_(small, model, example)
            model = small
    result["pruned"] = evaluate(model, images.test)[1]
    result |= _train(model, config, images, config["tune_epochs"], tune=True)
    return Record({**result, **_sizes(model, images)}, {k: m.numpy() for k, m in prune.masks(model).items()})


def run_scratch(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """Scratch-E and Scratch-B of the shape."""
    images, how = _images(config, data), config["how"]
    shape = needed[0].result["widths"] if how == "slimming" else None if how == "weights" else how

    def new() -> nn.Module:
        model = _build(config, images, shape)
        if how == "weights":
            _mask(model, {name: torch.from_numpy(mask) for name, mask in needed[0].arrays.items()})
        return model

    both = scratch.compare(
        new,
        lambda model, epochs: _train(model, config, images, epochs),
        config["epochs"],
        full=_build(config, images),
        example_inputs=images.train.images[:1],
        seed=5000 + config["seed"],  # not what the large network started from
        at_most=config["at_most"],
    )
    return Record({key: {**one.result, "epochs": one.epochs} for key, one in (("e", both.e), ("b", both.b))})


@torch.no_grad()
def _mask(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Masks, and the weights left made larger: the authors draw them with the fan that is left."""
    prune.mask_like_(model, {f"{name}.parametrizations.weight.0.mask": mask for name, mask in masks.items()})
    for name, mask in masks.items():
        unmasked_weight(model.get_submodule(name)).mul_(float(mask.float().mean()) ** -0.5)


def trials(chosen: Plan, colour: bool) -> dict[tuple[str, str, int], Trial]:
    """(row, column, seed) -> what has to be run for it; Scratch-E and -B are one, "scratch"."""
    recipe = {key: getattr(chosen, key) for key in ("epochs", "batch_size", "rate", "momentum", "weight_decay")}
    tuning = {key: getattr(chosen, key) for key in ("tune_epochs", "tune_rate")}
    ways: dict[str, dict[str, float]] = {
        "slimming": {"strength": chosen.strength, "slimmed": chosen.slimmed},
        "weights": {"sparsity": chosen.sparsity},
    }
    found: dict[tuple[str, str, int], Trial] = {}
    for name in chosen.rows:
        row = ROWS[name]
        narrow, size = SMALL[row.network] if chosen.small else (1, None)
        for seed in range(chosen.seeds):
            common = {
                **recipe, "version": VERSION, "network": row.network, "narrow": narrow, "size": size,
                "augment": colour, "seed": seed,
            }  # fmt: skip
            ours = {**common, "how": row.how}
            first = Trial(f"{row.network}-unpruned-seed{seed}", run_unpruned, common)
            needs = () if row.how == "slimming" else (first,)
            pruning = {**ours, **tuning, **ways.get(row.how, {})}
            tuned = Trial(f"{name}-tuned-seed{seed}", run_tuned, pruning, needs)
            needs = (tuned,) if row.how in ("slimming", "weights") else ()
            found[name, "unpruned", seed] = first
            found[name, "tuned", seed] = tuned
            found[name, "scratch", seed] = Trial(
                f"{name}-scratch-seed{seed}", run_scratch, {**ours, "at_most": chosen.at_most}, needs
            )
    return found


# --- what came of it --------------------------------------------------------------------------------------------------


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train all columns of all rows and tell what came of them."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    asked = trials(chosen, colour=data.train.images.shape[1] == 3)
    records = run_all(list({t.name: t for t in asked.values()}.values()), data, out, settings, progress)
    rows: dict[str, Any] = {}
    for name in chosen.rows:
        got = {
            column: [records[asked[name, column, seed].name].result for seed in range(chosen.seeds)]
            for column in ("unpruned", "tuned", "scratch")
        }
        results = {**got, **{column: [r[column] for r in got["scratch"]] for column in "eb"}}
        rows[name] = {
            "test": {column: _rounded(results[column], "test") for column in COLUMNS},
            "validation": {column: _rounded(results[column], "validation") for column in COLUMNS},
            "pruned": _rounded(got["tuned"], "pruned"),
            "epochs": {column: [r["epochs"] for r in results[column]] for column in "eb"},
            "parameters": [[int(r["parameters"]) for r in got[column]] for column in ("unpruned", "tuned")],
            "macs": [[int(r["macs"]) for r in got[column]] for column in ("unpruned", "tuned")],
        }
        if ROWS[name].how == "slimming":
            rows[name]["penalised"] = _rounded(got["tuned"], "penalised")
            rows[name]["widths"] = [r["widths"] for r in got["tuned"]]
    found = {
        "experiment": EXPERIMENT.name, "data": what, "plan": asdict(chosen), "machine": describe(settings.threads),
        "rows": rows,
    }  # fmt: skip
    lead = (
        f"Pruned networks trained on {what}: what is left of the large network, fine-tuned, against the same shape "
        "trained from new random weights, with as many epochs (Scratch-E) or as much computation (Scratch-B). "
        "Accuracies are those of held-out images after the last epoch."
    )
    return Result("Rethinking the value of pruning", lead, tables(found), figures(found), found)


def _rounded(results: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    summary = mean_and_deviation([float(r[key]) for r in results])
    for name in ("mean", "std"):
        summary[name] = None if summary[name] is None else round(summary[name], 6)
    summary["values"] = [round(value, 6) for value in summary["values"]]
    return summary


def _scale(found: Mapping[str, Any]) -> str:
    if not found["plan"]["small"]:
        return "networks at full width"
    parts = [
        f"{title} at 1/{SMALL[key][0]} of its width on {SMALL[key][1]}x{SMALL[key][1]} pixels"
        for key, title in (("vgg16", "VGG-16"), ("resnet20", "ResNet-20"), ("resnet56", "ResNet-56"))
        if any(ROWS[name].network == key for name in found["rows"])
    ]
    return "at small scale: " + ", ".join(parts)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The four columns beside the paper's, and what the shapes save, from the content of ``results.json``."""
    chosen, rows = found["plan"], found["rows"]
    accuracy: list[list[object]] = []
    sizes: list[list[object]] = []
    for name, row in rows.items():
        about = ROWS[name]
        accuracy.append([about.title, *(percent(row["test"][column]["values"]) for column in COLUMNS)])
        if about.paper is not None:
            accuracy.append(["  the paper, CIFAR-10", *(f"{value:.2f}" for value in about.paper)])
        scores = {column: row["test"][column]["values"] for column in COLUMNS}
        gains = [
            spread([100 * (b - a) for a, b in zip(scores["tuned"], scores[column], strict=True)], 2) for column in "eb"
        ]
        fewer = [100 * (1 - sum(small) / sum(large)) for large, small in (row["parameters"], row["macs"])]
        epochs = [f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"
                  for values in (row["epochs"][c] for c in "eb")]  # fmt: skip
        sizes.append([about.title, *(f"-{value:.1f} %" for value in fewer), " / ".join(epochs), *gains])
    cap = "" if chosen["at_most"] is None else f", at most {chosen['at_most']:g} times the epochs"
    recipe = [
        f"test accuracy, %, mean ± standard deviation over {over_seeds(chosen['seeds'])}; {_scale(found)}",
        f"SGD {chosen['rate']:g}, a tenth after 1/2 and 3/4 of the epochs, momentum {chosen['momentum']:g}, weight "
        f"decay {chosen['weight_decay']:g}, batch {chosen['batch_size']}, {chosen['epochs']} epochs; fine-tuned for "
        f"{chosen['tune_epochs']} at {chosen['tune_rate']:g}; Scratch-B: equal computation{cap}",
    ]
    if any(ROWS[name].how == "slimming" for name in rows):
        recipe.append(
            f"slimming: {chosen['slimmed']:.0%} of all channels by batch-norm scale, penalty {chosen['strength']:g}; "
            f"weights: {chosen['sparsity']:.0%} of those of convolutions by magnitude; the paper has VGG-19 there"
        )
    return [
        Table("Rethinking pruning: the same shape, fine-tuned or from scratch", ["network", *COLUMNS.values()],
              accuracy, recipe),
        Table("What the shapes save, and what training from scratch gains over fine-tuning",
              ["network", "parameters", "MACs", "epochs", "gain of E", "gain of B"], sizes,
              ["fewer parameters and multiply-accumulates than the large network (zeros cost nothing); epochs of "
               "Scratch-E / Scratch-B",
               "gain: points of test accuracy, paired by seed; above 0, training from scratch is better"]),
    ]  # fmt: skip


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Four dots with error bars for each network."""
    from slimtorch.experiments.plots import new_figure

    rows = found["rows"]
    figure, (axis,) = new_figure(1, height=3.8, width=max(5.0, 1.7 * len(rows)))
    for offset, (column, label) in enumerate(COLUMNS.items()):
        at = [index + 0.16 * (offset - 1.5) for index in range(len(rows))]
        scores = [row["test"][column] for row in rows.values()]
        axis.errorbar(
            at, [100 * s["mean"] for s in scores], [100 * (s["std"] or 0.0) for s in scores], label=label,
            color=_COLORS[column], marker=_MARKERS[column], linestyle="none", markersize=7, capsize=3, linewidth=1.4,
        )  # fmt: skip
        for x, score in zip(at, scores, strict=True):
            count = len(score["values"])
            values = [100 * value for value in score["values"]]
            axis.plot([x] * count, values, ".", color=_COLORS[column], alpha=0.45, markersize=4)
    axis.set_xticks(range(len(rows)), [ROWS[name].title.replace(", ", ",\n") for name in rows])
    axis.grid(False, axis="x")
    axis.set_ylabel("test accuracy, %")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=4, frameon=False)
    return [("rethinking", "Mean and standard deviation over seeds; small dots: each seed.", figure)]


EXPERIMENT = Experiment(
    name="rethinking",
    about="pruned shapes: fine-tuned, or trained from scratch for as many epochs or as much computation",
    paper="arXiv 1810.05270",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
