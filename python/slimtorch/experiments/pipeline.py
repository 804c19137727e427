# SPDX-License-Identifier: Apache-2.0
"""Everything combined against each alone: one network made smaller by five methods, in one recipe, and measured.

    dense ──┬── neurons, exit ── distil ── prune ── distil ── share ── distil ── calibrate ── pack     combined
            ├── prune ── train ── pack                                                              each alone
            ├── share ── train ── pack
            └── …

Every branch is a :class:`slimtorch.Recipe` of the same dense network and trains for equally many epochs. Networks are
packed and timed after all training is done, in one process and by turns.
"""

from __future__ import annotations

import copy
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from slimtorch import models
from slimtorch.data import Digits, load
from slimtorch.dynamic import EarlyExit
from slimtorch.experiments import machine
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.rivals import FROZEN, dense_ways, frozen, frozen_segments
from slimtorch.experiments.store import Record, Store, digest
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.measure import threads_of_torch
from slimtorch.nn import PackedLayer
from slimtorch.prune import Magnitude, Neurons, bake_
from slimtorch.quantize import KMeans
from slimtorch.recipe import Calibrate, Cluster, Distill, Exits, Pack, Phase, Prune, Recipe, Train, Work
from slimtorch.recipe.checkpoints import Folder, dump, restore
from slimtorch.recipe.run import measure_by_turns
from slimtorch.report import Table, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CODE = 2  # raise it when trials train differently: stored ones are then not used
BATCHES = (1, 256)
TIMING = 4  # raise it when networks are packed or timed differently
EFFORT = {True: (0.5, 3), False: (6.0, 21)}  # quick or not: seconds to pack a network, samples of a latency
ARMS = {
    "longer": "trained on, nothing else",
    "pruned": "weights pruned",
    "clustered": "weights shared",
    "smaller": "neurons removed, labels only",
    "distilled": "neurons removed, distilled",
    "exits": "early exit",
    "combined": "all of these",
}


@dataclass(frozen=True)
class Plan:
    """What is done to the network.

    Attributes:
        seeds: of training.
        dense_epochs, rate: of the dense network; Adam with a cosine to 0 here and everywhere.
        epochs: of training in the three stages of the combination; the others train once, for their sum.
        tune_rate, table_rate: in them; the last for tables of shared values.
        neurons: share removed of each hidden layer.
        sparsity: of the weights of all layers but the first.
        bits: of shared weights.
        within: by how much the validation accuracy may fall for samples to leave early.
        temperature, soft: of distillation, and the weight of its term; labels have the rest.
        batch_size: of training.
    """

    seeds: int = 5
    dense_epochs: float = 6
    rate: float = 2e-3
    epochs: tuple[float, float, float] = (4, 3, 2)
    tune_rate: float = 2e-3
    table_rate: float = 5e-4
    neurons: float = 0.5
    sparsity: float = 0.8
    bits: int = 4
    within: float = 0.004
    temperature: float = 4.0
    soft: float = 0.9
    batch_size: int = 60
    hidden: tuple[int, int, int] = (20, 50, 500)


def plan(settings: Settings) -> Plan:
    """The numbers of a quick or a full run."""
    if settings.quick:
        return Plan(settings.seeds or 1, dense_epochs=8, epochs=(5, 4, 1), hidden=(10, 25, 250))
    return Plan(settings.seeds or 5)


# --- what is trained --------------------------------------------------------------------------------------------------


def phases_of(arm: str, chosen: Plan) -> list[Phase]:
    """The recipe of one branch, without packing."""
    size, long = chosen.batch_size, sum(chosen.epochs)
    first, second, third = chosen.epochs
    neurons = Prune(config=Neurons(ratio=chosen.neurons), name="neurons removed")
    weights = Prune(config={"*conv1": None, "*": Magnitude(chosen.sparsity)}, name="weights pruned")
    share = Cluster(config=KMeans(bits=chosen.bits), name="weights shared")
    exits = Exits(exits={"pool1": None}, pool=None, name="exit added")
    thresholds = Calibrate(within=chosen.within, name="thresholds set")

    def labels(epochs: float, rate: float = chosen.tune_rate, name: str = "trained") -> Train:
        return Train(epochs=epochs, rate=rate, batch_size=size, name=name)

    def taught(epochs: float, rate: float = chosen.tune_rate, name: str = "distilled") -> Distill:
        from slimtorch.distill import SoftTargets

        terms = (SoftTargets(temperature=chosen.temperature, weight=chosen.soft),)
        return Distill(epochs=epochs, rate=rate, batch_size=size, terms=terms, hard_weight=1 - chosen.soft, name=name)

    recipes: dict[str, list[Phase]] = {
        "longer": [labels(long)],
        "pruned": [weights, labels(long)],
        "clustered": [share, labels(long, chosen.table_rate)],
        "smaller": [neurons, labels(long)],
        "distilled": [neurons, taught(long)],
        "exits": [exits, labels(long), thresholds],
        "combined": [
            neurons, exits, taught(first), weights, taught(second, name="distilled again"), share,
            taught(third, chosen.table_rate, name="tables distilled"), thresholds,
        ],
    }  # fmt: skip
    return recipes[arm]


def _train(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """One branch of one seed: its rows, and for seed 0 its networks, masks baked, as bytes."""
    chosen = Plan(**{**config["plan"], "epochs": tuple(config["plan"]["epochs"])})
    arm, seed = config["arm"], config["seed"]
    torch.manual_seed(1000 + seed)
    model = models.LeNet5(chosen.hidden)
    if arm == "dense":
        phases: list[Phase] = [
            Train(epochs=chosen.dense_epochs, rate=chosen.rate, batch_size=chosen.batch_size, name="dense")
        ]
    else:
        model.load_state_dict({key: torch.from_numpy(value) for key, value in needed[0].arrays.items()})
        phases = phases_of(arm, chosen)
    with tempfile.TemporaryDirectory() as folder:
        result = Recipe(phases, seed=seed, batches=(), threads=1).run(model, data, folder)
        arrays: dict[str, np.ndarray] = {}
        if arm == "dense":
            arrays = {key: value.numpy() for key, value in result.model.state_dict().items()}
        elif seed == 0:
            wanted = range(1, len(phases) + 1) if arm == "combined" else [len(phases)]
            arrays = {f"{index:02d}": _bytes(Folder(Path(folder)), index) for index in wanted}
    return Record({"phases": result.report.to_dict()["phases"][1:]}, arrays)


def _bytes(kept: Folder, index: int) -> np.ndarray:
    held = kept.load(index)
    assert held is not None
    model = restore(held["model"])
    bake_(model)
    array: np.ndarray = dump(model)["module"].numpy()
    return array


def _network(array: np.ndarray) -> nn.Module:
    return restore({"module": torch.from_numpy(array), "masked": False}).eval()


# --- what is timed ----------------------------------------------------------------------------------------------------


class _Way(nn.Module):
    """Another way to run a network, as a module."""

    def __init__(self, call: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> object:
        return self.call(x)


def _ways(network: nn.Module, x: Tensor, *, dense: bool) -> dict[str, nn.Module]:
    """Other ways to run it on inputs like ``x``: a network that is dense in all that there are, for it to be a fair
    rival; others frozen, exits segment by segment."""
    if isinstance(network, EarlyExit):
        call = _frozen_segments(network, x)
        return {} if call is None else {FROZEN: _Way(call)}
    if dense:
        return {how: _Way(way) for how, way in dense_ways(network, x).items()}
    made = frozen(network, x)
    return {} if made is None else {FROZEN: _Way(made)}


def _decoded(network: nn.Module) -> nn.Module:
    """A copy with dense layers of the same values in place of those that run as they are stored."""
    made = copy.deepcopy(network)
    for parent in list(made.modules()):
        for name, child in parent.named_children():
            if isinstance(child, PackedLayer):
                setattr(parent, name, child.to_dense())
    return made.eval()


def _frozen_segments(network: EarlyExit, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Its segments as frozen TorchScript; None where that cannot be or differs."""
    try:
        call = network.with_segments(frozen_segments(network, x))
        with torch.inference_mode():
            expected = network(x)
            same = torch.allclose(call(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return call if same else None


class _Silent:
    """Packing keeps no progress."""

    seconds = 0.0

    def load(self) -> None:
        return None

    def save(self, state: dict[str, Any]) -> None:
        raise AssertionError("packing has no progress to keep")

    def show(self, done: int, total: int) -> None:
        return None


def _pack(model: nn.Module, data: Digits, batch: int, seconds: float) -> tuple[nn.Module, str]:
    notes: list[str] = []
    work = Work(data, 0, _Silent(), lambda name: model, notes.append)
    return Pack(batch=batch, time_budget=seconds).apply(model, work), notes[0].removeprefix("packed: ")


def _times(
    records: Mapping[str, Record], data: Digits, chosen: Plan, quick: bool, progress: Progress
) -> dict[str, Any]:
    """Pack the networks of seed 0 and time all of them by turns, beside the best dense code of the original."""
    seconds, samples = EFFORT[quick]
    torch.manual_seed(0)
    dense = models.LeNet5(chosen.hidden)
    dense.load_state_dict({key: torch.from_numpy(value) for key, value in records["dense-seed0"].arrays.items()})
    names = [f"phase:{phase['name']}" for phase in records["combined-seed0"].result["phases"]]
    arrays = records["combined-seed0"].arrays
    phases = {name: _network(arrays[f"{index:02d}"]) for index, name in enumerate(names, 1)}
    found: dict[str, dict[str, list[float]]] = {}
    packed: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    for batch in BATCHES:
        x = data.test.images[torch.arange(batch) % len(data.test)]
        networks: dict[str, nn.Module] = dict(phases)
        packed[str(batch)] = {}
        for number, arm in enumerate(ARMS, 1):
            if arm != "longer":  # that one is the dense network with other values
                held = records[f"{arm}-seed0"].arrays
                network, packed[str(batch)][arm] = _pack(_network(held[max(held)]), data, batch, seconds)
                networks[arm], sizes[arm] = network, _file_bytes(network)
                networks[f"{arm}:unpacked"] = _network(held[max(held)])  # pack_ knows nothing of frozen dense code
            progress(f"pack, batch {batch}", number, len(ARMS))
        every = dict(networks)
        for number, (name, network) in enumerate({"dense": dense, **networks}.items()):
            progress(f"convert, batch {batch}", number, len(networks) + 1)
            plain = not any(isinstance(module, PackedLayer) for module in network.modules())
            every.update((f"{name}:{how}", way) for how, way in _ways(network, x, dense=plain).items())
            if not plain and name not in ARMS:  # for many images decoding once, beforehand, can be the best
                decoded = _decoded(network)
                every[f"{name}:decoded"] = decoded
                every.update((f"{name}:decoded {how}", way) for how, way in _ways(decoded, x, dense=True).items())
        progress(f"convert, batch {batch}", len(networks) + 1, len(networks) + 1)
        times = measure_by_turns(every, data.test, (batch,), samples, progress)[batch]
        found[str(batch)] = {name: [float(f"{v:.4g}") for v in (t.median, t.p10, t.p90)] for name, t in times.items()}
    return {"times": found, "packed": packed, "sizes": sizes}


def _file_bytes(model: nn.Module) -> int:
    from slimtorch import storage

    with tempfile.TemporaryDirectory() as folder:
        return storage.save(model, Path(folder) / "model.slim")


# --- the experiment ---------------------------------------------------------------------------------------------------


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Trains what is missing, packs and times the networks of seed 0, gathers all of it."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    trials: list[Trial] = []
    for seed in range(chosen.seeds):
        config = {"code": CODE, "seed": seed, "plan": {**asdict(chosen), "seeds": 0}}
        dense = Trial(f"dense-seed{seed}", _train, {**config, "arm": "dense"})
        trials.append(dense)
        trials += [Trial(f"{arm}-seed{seed}", _train, {**config, "arm": arm}, (dense,)) for arm in ARMS]
    records = run_all(trials, data, out, settings, progress)
    # Times are kept apart: without this folder they are taken anew, and nothing is trained.
    kept = Store(out / "times")
    stamp = {
        "code": TIMING, "threads": settings.threads, "quick": settings.quick,
        "networks": [digest({k: int(v.astype(np.int64).sum()) for k, v in records[f"{arm}-seed0"].arrays.items()})
                     for arm in ARMS],
    }  # fmt: skip
    make = functools.partial(_times, records, data, chosen, settings.quick, progress)
    with threads_of_torch(settings.threads):
        times = kept.once("times", stamp, make)
    rows = {arm: [records[f"{arm}-seed{s}"].result["phases"] for s in range(chosen.seeds)] for arm in ("dense", *ARMS)}
    found: dict[str, Any] = {
        "experiment": "pipeline", "data": what, "plan": asdict(chosen),
        "machine": machine.describe(settings.threads), "rows": {a: _gathered(r) for a, r in rows.items()},
        **times,
    }  # fmt: skip
    lead = (
        f"LeNet-5 trained on {what}, then made smaller by one recipe of several methods, and by each of them alone; "
        "all train for equally many epochs. Held-out images, at small scale; latency is measured."
    )
    return Result("Everything combined, against each alone", lead, tables(found), figures(found), found)


def _gathered(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Phase by phase, a list of values over seeds."""
    keys = ("validation", "test", "nonzero", "bytes_file", "macs")
    made = zip(*seeds, strict=True)
    return [{"name": parts[0]["name"], **{k: [part[k] for part in parts] for k in keys}} for parts in made]


def _best(times: Mapping[str, Sequence[float]], name: str) -> float:
    """The median of the fastest way to run a network."""
    return min(value[0] for key, value in times.items() if key == name or key.startswith(f"{name}:"))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _cells(found: Mapping[str, Any], name: str) -> list[object]:
    """Latency and speed-up over the best dense code, at both batch sizes."""
    cells: list[object] = []
    for batch in BATCHES:
        times = found["times"][str(batch)]
        own = _best(times, name)
        cells += [format_seconds(own), f"{_best(times, 'dense') / own:.2f}x"]
    return cells


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Each branch, then the combination phase by phase."""
    rows, chosen = found["rows"], found["plan"]
    dense = rows["dense"][-1]
    base = _mean(dense["bytes_file"])
    timed = [text for batch in BATCHES for text in (f"batch {batch}", "speed-up")]
    columns = ["", "test accuracy, %", "file", "ratio", "MACs", *timed]
    body: list[list[object]] = [_row(found, "dense", dense, "dense", base)]
    for arm, title in ARMS.items():
        last = dict(rows[arm][-1])
        last["bytes_file"] = [found["sizes"][arm]] if arm in found["sizes"] else last["bytes_file"]
        body.append(_row(found, title, last, "dense" if arm == "longer" else arm, base))
    setup = (
        f"{over_seeds(chosen['seeds'])}, mean ± standard deviation, {found['data']}; all train for "
        f"{sum(chosen['epochs']):g} more epochs"
    )
    clock = (
        f"latency of seed 0's networks, packed for that batch, {found['machine']['threads']} thread"
        f"{'' if found['machine']['threads'] == 1 else 's'}, medians, by turns; each runs in the fastest way that "
        "it can: packed or not, shared weights decoded to dense ones beforehand or not, frozen to TorchScript (with "
        "exits: each segment), dense ones in oneDNN's; batch 1: the mean over 64 images"
    )
    chosen_formats = [
        f"packed for batch {batch}: " + "; ".join(f"{ARMS[arm]}: {what}" for arm, what in packed.items())
        for batch, packed in found["packed"].items()
    ]
    first = Table("Combined against each alone", columns, body, [setup, clock, *chosen_formats])

    steps: list[list[object]] = [_row(found, "dense", dense, "dense", base)]
    for phase in rows["combined"]:
        steps.append(_row(found, phase["name"], phase, f"phase:{phase['name']}", base))
    last = dict(rows["combined"][-1])
    last["bytes_file"] = [found["sizes"]["combined"]]
    steps.append(_row(found, "packed", last, "combined", base))
    notes = [
        "each row is the network after that phase, masks baked; speed-up over the best dense code of the original",
        "packing changes no weight; its file is that of seed 0, packed for the larger batch",
    ]
    return [first, Table("The combination, phase by phase", columns, steps, notes)]


def _row(found: Mapping[str, Any], title: str, phase: Mapping[str, Any], timed: str, base: float) -> list[object]:
    size = _mean(phase["bytes_file"])
    macs = f"{_mean(phase['macs']) / 1e6:.3f} M"
    return [title, percent(phase["test"]), format_bytes(size), f"{base / size:.1f}x", macs, *_cells(found, timed)]


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy against measured latency, area the size of the file; and the combination phase by phase."""
    from matplotlib.collections import PathCollection

    from slimtorch.experiments.plots import COLORS, new_figure, plain_ticks

    rows = found["rows"]
    figure, axes = new_figure(len(BATCHES), height=4.8)
    for axis, batch in zip(axes, BATCHES, strict=True):
        times = found["times"][str(batch)]
        shown = {"dense": ("dense", rows["dense"][-1])}
        shown |= {arm: (title, rows[arm][-1]) for arm, title in ARMS.items() if arm != "longer"}
        for color, (name, (title, phase)) in zip(("black", *COLORS), shown.items(), strict=False):
            y = [100 * value for value in phase["test"]]
            bar = statistics.stdev(y) if len(y) > 1 else 0.0
            size = found["sizes"].get(name, _mean(phase["bytes_file"]))
            x = 1e6 * _best(times, name)
            axis.errorbar(x, _mean(y), yerr=bar, color=color, capsize=2, linewidth=1, fmt="none", zorder=2)
            axis.scatter([x], [_mean(y)], s=20 + 380 * size / _mean(rows["dense"][-1]["bytes_file"]), color=color,
                         alpha=0.75, label=title, zorder=3, linewidths=0)  # fmt: skip
        axis.set_xscale("log")
        plain_ticks(axis.xaxis)
        axis.set_xlabel(f"microseconds per call, batch {batch}")
        axis.set_ylabel("test accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([40])
    caption = (
        "Test accuracy against measured latency: each method alone, and all of them; the area of a point is the size "
        "of the file. Bars: ± 1 sd over seeds."
    )
    return [("pipeline", caption, figure), ("pipeline-phases", "The combination, phase by phase.", _way(found))]


def _way(found: Mapping[str, Any]) -> Figure:
    """Accuracy, size and latency after each phase."""
    from slimtorch.experiments.plots import phase_by_phase

    rows = found["rows"]
    phases = [rows["dense"][-1], *rows["combined"], rows["combined"][-1]]
    timed = ["dense", *(f"phase:{phase['name']}" for phase in rows["combined"]), "combined"]
    names = ["dense", *(phase["name"] for phase in rows["combined"]), "packed"]
    sizes = [*(_mean(phase["bytes_file"]) for phase in phases[:-1]), found["sizes"]["combined"]]
    latency = {
        batch: [_best(times, name) / _best(times, "dense") for name in timed] for batch, times in found["times"].items()
    }
    accuracy = list(zip(*(phase["test"] for phase in phases), strict=True))
    return phase_by_phase(names, accuracy, sizes, latency, "best dense")


EXPERIMENT = Experiment(
    name="pipeline",
    about="pruned, shared, distilled, with an exit: all in one recipe against each alone",
    paper="arXiv 1510.00149, 1503.02531, 1709.01686",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
