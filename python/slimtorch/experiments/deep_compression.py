# SPDX-License-Identifier: Apache-2.0
"""Deep Compression (Han, Mao & Dally 2016, arXiv 1510.00149) on real digits, from training to a file that runs.

A trial is one network from one seed: trained densely, pruned and retrained in rounds, clustered, fine-tuned, written to
a ``.slim`` file and read back. The paper reports size and error; the latency of the compressed network is new here.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from slimtorch import storage
from slimtorch._files import write_atomically
from slimtorch.data import Digits, load
from slimtorch.experiments import machine
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.rivals import FROZEN, ONEDNN, TORCH, best_dense, dense_rivals
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.training import NETWORKS, TITLES, Batches, accuracy, train
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.formats import Sparse
from slimtorch.measure import Latency, interleave, threads_of_torch
from slimtorch.nn import PackedLayer, SparseConv2d, SparseLinear
from slimtorch.quantize import DeepCompression, KMeans, Stage
from slimtorch.quantize.deep_compression import CodedLayer, layer_table
from slimtorch.report import Table, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = 1  # raise it when trials train differently: stored ones are then not used
BATCHES = (1, 64)
PAPER = {  # 1510.00149, tables 1 to 3: error dense and compressed in %, ratio after P, P+Q, P+Q+H
    "lenet300": (1.64, 1.58, (12, 32, 40)),
    "lenet5": (0.80, 0.74, (12, 33, 39)),
}


@dataclass(frozen=True)
class Plan:
    """How one network is compressed. Epochs are those of the 3,500 embedded training digits.

    Attributes:
        sparsity: share of each layer's weights to remove.
        bits: of each layer's table.
        rounds: of pruning and retraining.
        dense_epochs, retrain_epochs, tune_epochs: of training, of each round, of the tables.
        rate, tune_rate: Adam's, with a cosine to 0 in each stage.
    """

    sparsity: dict[str, float]
    bits: dict[str, int]
    rounds: int
    dense_epochs: float
    retrain_epochs: float
    tune_epochs: float
    rate: float = 2e-3
    tune_rate: float = 1e-3


# LeNet-300-100: of the plans tried that reach 40 times, the one most accurate on validation digits, against the dense
# network. LeNet-5: from few trials, whose accuracy on test digits was seen too.
PLANS = {
    "lenet300": Plan(
        {"fc1": 0.92, "fc2": 0.9, "fc3": 0.6}, {"fc1": 4, "fc2": 4, "fc3": 4}, rounds=4,
        dense_epochs=10, retrain_epochs=4, tune_epochs=3,
    ),
    "lenet5": Plan(
        {"conv1": 0.4, "conv2": 0.88, "fc1": 0.95, "fc2": 0.8}, {"conv1": 5, "conv2": 4, "fc1": 4, "fc2": 4}, rounds=3,
        dense_epochs=5, retrain_epochs=2.5, tune_epochs=1.5, tune_rate=5e-4,
    ),
}  # fmt: skip


def load_data(settings: Settings) -> tuple[Digits, str]:
    """The images to train on and what they are; ValueError for images that these networks do not take."""
    data, words = load(settings.data)
    if data.train.images.shape[1:] != (1, 28, 28):
        shape = "x".join(map(str, data.train.images.shape[1:]))
        raise ValueError(f"data: expected MNIST's images of 1x28x28, got {shape}")
    return data, words


def epoch_scale(data: Digits) -> float:
    """Epochs for a data set of another size: more steps in all, but fewer passes."""
    return float(min(1.0, (3500 / len(data.train)) ** 0.5))


def _trial(network: str, seed: int, epochs: float) -> Trial:
    """One network from one seed; ``epochs`` scales all epochs of its plan."""
    config = {"version": RECIPE, "network": network, "seed": seed, "epochs": epochs}
    config |= {**asdict(PLANS[network]), "batch_size": NETWORKS[network].batch_size}
    return Trial(f"deep-{network}-seed{seed}", train_network, config)


def config(settings: Settings) -> dict[str, Any]:
    """What will be trained."""
    return {
        "seeds": settings.seeds or (1 if settings.quick else 5),
        "epochs": 0.25 if settings.quick else 1.0,
        "plans": {network: asdict(plan) for network, plan in PLANS.items()},
    }


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train what is not stored in ``out``, read the files back, time them."""
    data, words = load_data(settings)
    asked = config(settings)
    scale = epoch_scale(data) * asked["epochs"]
    trials = {network: [_trial(network, seed, scale) for seed in range(asked["seeds"])] for network in PLANS}
    found = run_all([trial for own in trials.values() for trial in own], data, out, settings, progress)
    records = {network: [found[trial.name] for trial in own] for network, own in trials.items()}
    with threads_of_torch(settings.threads):
        facts = machine.describe(settings.threads)
        times = {
            network: time_network(network, found[0], data, out, 5 if settings.quick else 31, progress)
            for network, found in records.items()
        }
    return _result(settings, words, records, times, facts)


def train_network(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """One network, all steps. The file is part of the record."""
    start = time.perf_counter()
    network, plan = NETWORKS[config["network"]], PLANS[config["network"]]
    torch.manual_seed(1000 + config["seed"])
    batches = Batches(data.train, network.batch_size, config["seed"])
    model = network.build(network.hidden)
    train(model, batches, plan.dense_epochs * config["epochs"], plan.rate)

    def fit(model: nn.Module, stage: Stage) -> None:
        if stage.name == "retrain":
            train(model, batches, plan.retrain_epochs * config["epochs"], plan.rate)
        else:
            train(model, batches, plan.tune_epochs * config["epochs"], plan.tune_rate)

    recipe = DeepCompression(plan.sparsity, {name: KMeans(bits) for name, bits in plan.bits.items()}, plan.rounds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.slim"
        report = recipe.run(model, fit, partial(accuracy, split=data.test), path=path)
        loaded = storage.load(path, network.build(network.hidden)).eval()
        file = np.frombuffer(path.read_bytes(), np.uint8)
    with torch.inference_mode():
        same = torch.equal(loaded(data.test.images[:250]), model.eval()(data.test.images[:250]))
    if not same:
        raise RuntimeError("the network in the file computes something else")
    result = {
        "steps": [asdict(step) for step in report.steps],
        "layers": [asdict(layer) for layer in report.layers],
        "validation": accuracy(model, data.validation),
        "seconds": time.perf_counter() - start,
    }
    return Record(result, {"file": file})


# --- latency ----------------------------------------------------------------------------------------------------------

COMPRESSED, PRUNED = "compressed", "pruned, float32"


def time_network(
    network: str, record: Record, data: Digits, out: Path, samples: int, progress: Progress
) -> dict[str, dict[str, Latency]]:
    """Batch -> contender -> latency: the file of the first seed as it runs, and dense code, by turns."""
    path = out / f"deep-{network}-seed0.slim"
    if not path.exists() or path.read_bytes() != record.arrays["file"].tobytes():
        write_atomically(path, lambda temporary: temporary.write_bytes(record.arrays["file"].tobytes()))
    compressed = storage.load(path, NETWORKS[network].build(NETWORKS[network].hidden)).eval()
    dense, pruned = _dense_twin(network, compressed), _pruned_twin(network, path)
    found: dict[str, dict[str, Latency]] = {}
    stage = f"timing {TITLES[network]}"
    progress(stage, 0, len(BATCHES))
    with torch.inference_mode():
        for index, batch in enumerate(BATCHES, start=1):
            x = data.test.images[:batch]
            calls: dict[str, Any] = dict(dense_rivals(dense, x))
            calls[PRUNED] = partial(pruned, x)
            calls[COMPRESSED] = partial(compressed, x)
            found[str(batch)] = interleave(calls, samples=samples)
            progress(stage, index, len(BATCHES))
    return found


def _dense_twin(network: str, compressed: nn.Module) -> nn.Module:
    """The same network in dense layers."""
    twin = NETWORKS[network].build(NETWORKS[network].hidden)
    with torch.no_grad():
        for name, module in compressed.named_modules():
            if isinstance(module, PackedLayer):
                layer: Any = twin.get_submodule(name)
                layer.weight.copy_(module.weight)
                layer.bias.copy_(module.bias)
    return twin.eval()


def _pruned_twin(network: str, path: Path) -> nn.Module:
    """The same network with the layers that have zeros in the sparse float32 format."""
    model = storage.load(path, NETWORKS[network].build(NETWORKS[network].hidden))
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLayer) and "." not in name:
            layer: Any = module.to_dense()
            if float((layer.weight == 0).float().mean()) > 0.5:
                kind: Any = SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d
                layer = kind.from_format(layer, Sparse.pack(layer.weight))
            setattr(model, name, layer)
    return model.eval()


# --- report -----------------------------------------------------------------------------------------------------------


def _errors(records: Sequence[Record], step: int) -> list[float]:
    return [1 - record.result["steps"][step]["accuracy"] for record in records]


def _bytes(records: Sequence[Record], step: int) -> float:
    return statistics.fmean(record.result["steps"][step]["nbytes"] for record in records)


def _ratio(records: Sequence[Record], step: int = -1) -> float:
    return _bytes(records, 0) / _bytes(records, step)


def _result(
    settings: Settings,
    words: str,
    records: dict[str, list[Record]],
    times: dict[str, dict[str, dict[str, Latency]]],
    facts: dict[str, Any],
) -> Result:
    seeds = len(next(iter(records.values())))
    tables = [_summary(records)]
    for network, found in records.items():
        tables.append(_step_table(network, found))
        layers = [CodedLayer(**layer) for layer in found[0].result["layers"]]
        tables.append(layer_table(layers, f"{TITLES[network]}, seed 0: layer by layer (tables 2 and 3 of the paper)"))
    tables.append(_latency_table(times, settings.threads))
    lead = (
        f"Deep Compression (arXiv 1510.00149) at small scale, on {words}; {over_seeds(seeds)}, "
        f"mean ± standard deviation of the test error. Every file was read back into "
        "a fresh network, which computes the same to the bit. Latencies: the network in the file, as it runs, against "
        "dense code that took turns with it."
    )
    caption = "Test error against size after each step; bars: standard deviation. Down and to the right is better."
    data = {
        "experiment": "deep-compression",
        "data": words,
        "seeds": seeds,
        "quick": settings.quick,
        "machine": facts,
        "plans": {network: asdict(plan) for network, plan in PLANS.items()},
        "networks": {
            network: {
                "ratio": _ratio(found),
                "ratio_smallest": min(
                    r.result["steps"][0]["nbytes"] / r.result["steps"][-1]["nbytes"] for r in found
                ),
                "file_bytes": [r.result["steps"][-1]["nbytes"] for r in found],
                "steps": [
                    {"name": step["name"], "bytes": _bytes(found, i), "errors": _errors(found, i)}
                    for i, step in enumerate(found[0].result["steps"])
                ],
                "layers_seed0": found[0].result["layers"],
                "seconds": sum(r.result["seconds"] for r in found),
                "latency": {
                    batch: {name: asdict(value) for name, value in row.items()}
                    for batch, row in times[network].items()
                },
                "paper": PAPER[network],
            }
            for network, found in records.items()
        },
    }  # fmt: skip
    return Result("Deep Compression", lead, tables, [("error-size", caption, _figure(records))], data)


def _summary(records: dict[str, list[Record]]) -> Table:
    rows: list[list[object]] = []
    for network, found in records.items():
        errors = _errors(found, 0), _errors(found, -1)
        rows.append([
            TITLES[network], percent(errors[0]) + " %", percent(errors[1]) + " %",
            format_bytes(_bytes(found, 0)), format_bytes(_bytes(found, -1)), f"{_ratio(found):.1f}x",
            f"{PAPER[network][2][-1]}x",
        ])  # fmt: skip
    columns = [
        "network", "error dense", "error compressed", "float32", "file", "rate", "paper"
    ]  # fmt: skip
    return Table("From float32 to the file", columns, rows)


def _step_table(network: str, found: list[Record]) -> Table:
    paper = dict(zip((2, 4, 5), PAPER[network][2], strict=True))
    rows: list[list[object]] = []
    for index, step in enumerate(found[0].result["steps"]):
        rows.append([
            step["name"], percent(_errors(found, index)) + " %", format_bytes(_bytes(found, index)),
            f"{_ratio(found, index):.1f}x", f"{paper[index]}x" if index in paper else None,
        ])  # fmt: skip
    notes = [
        "P: a float32 and a position (5 bits in linear layers, 8 in convolutions, fillers counted) per weight",
        "P+Q: in memory, as it runs (positions in 8 bits); P+Q+H: the whole file, header and float32 biases included",
    ]
    return Table(f"{TITLES[network]}: step by step", ["step", "test error", "size", "rate", "paper"], rows, notes)


def _latency_table(times: dict[str, dict[str, dict[str, Latency]]], threads: int) -> Table:
    rows: list[list[object]] = []
    for network, batches in times.items():
        for batch, row in batches.items():
            torch_time, best, ours = row[TORCH].median, best_dense(row), row[COMPRESSED].median
            rows.append([
                TITLES[network], int(batch), format_seconds(torch_time), format_seconds(best),
                format_seconds(row[PRUNED].median), format_seconds(ours), f"{torch_time / ours:.2f}x",
                f"{best / ours:.2f}x",
            ])  # fmt: skip
    columns = ["network", "batch", "torch", "best dense", PRUNED, COMPRESSED, "over torch", "over best"]
    notes = [
        f"medians, {threads} thread{'s' if threads != 1 else ''}; best dense: the fastest of {TORCH}, {ONEDNN} "
        f"(prepacked) and {FROZEN} TorchScript; {PRUNED}: the same zeros in the sparse format"
    ]
    return Table("Latency of the compressed network, as it runs", columns, rows, notes)


def _figure(records: dict[str, list[Record]]) -> Figure:
    from slimtorch.experiments import plots

    figure, axes = plots.new_figure(len(records))
    marks = {0: ("dense", "s", "#999999"), 2: ("P", "^", "#009E73"), 4: ("P+Q", "o", "#0072B2"),
             5: ("P+Q+H (file)", "D", "#D55E00")}  # fmt: skip
    for axis, (network, found) in zip(axes, records.items(), strict=True):
        x = {index: _ratio(found, index) for index in marks}
        y = {index: [100 * error for error in _errors(found, index)] for index in marks}
        axis.plot([*x.values()], [statistics.fmean(v) for v in y.values()], color="#bbbbbb", linewidth=1, zorder=1)
        for index, (label, marker, color) in marks.items():
            bar = statistics.stdev(y[index]) if len(found) > 1 else 0.0
            axis.errorbar(
                x[index], statistics.fmean(y[index]), yerr=bar, fmt=marker, color=color, label=label, capsize=3
            )
        axis.axhline(statistics.fmean(y[0]), color="#999999", linestyle=":", linewidth=1)
        axis.axvline(PAPER[network][2][-1], color="#CC79A7", linestyle="--", linewidth=1, label="rate in the paper")
        axis.set_xscale("log")
        plots.plain_ticks(axis.xaxis)
        axis.set_xlabel("times smaller than float32")
        axis.set_ylabel("test error, %")
        axis.set_title(TITLES[network], fontsize=10)
        axis.margins(y=0.25)
    axes[0].legend(fontsize=8)
    figure.suptitle("Deep Compression: error and size after each step")
    return figure


EXPERIMENT = Experiment(
    name="deep-compression",
    about="prune, share, code: size, error and speed after each step",
    paper="arXiv 1510.00149",
    config=config,
    run=run,
)
