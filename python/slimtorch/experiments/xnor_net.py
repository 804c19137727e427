# SPDX-License-Identifier: Apache-2.0
"""XNOR-Net on digits (arXiv 1603.05279): a small convolutional network with real weights, binary weights, XNOR."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from slimtorch.data import load
from slimtorch.experiments.binary_net import curves
from slimtorch.experiments.binary_training import (
    Plan,
    Variant,
    agreement,
    errors_of,
    latency_data,
    packed_copy,
    restore,
    row_data,
    speedup,
    time_networks,
    train_all,
)
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.machine import describe, headline
from slimtorch.experiments.rivals import best_dense
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.measure import Latency, memory_bytes
from slimtorch.quantize import BinaryWeight, XnorNet, xnor_block
from slimtorch.report import Table, format_bytes, format_seconds

BATCHES = (1, 100)
PAPER = {"full": "56.6", "weights": "56.8", "xnor": "44.2"}  # top-1 accuracy of AlexNet on ImageNet, table 1


def _features(shape: tuple[int, ...]) -> int:
    """Height times width after two 5 x 5 convolutions without padding, each followed by pooling by two."""
    height, width = (((size - 4) // 2 - 4) // 2 for size in shape[1:])
    return height * width


def real_network(shape: tuple[int, ...], widths: tuple[int, int, int] = (20, 50, 500)) -> nn.Sequential:
    """LeNet-5 with batch-norm: (conv → batch-norm → ReLU → pool) twice, then two linear layers."""
    first, second, third = widths
    return nn.Sequential(
        nn.Conv2d(shape[0], first, 5), nn.BatchNorm2d(first, eps=1e-4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5), nn.BatchNorm2d(second, eps=1e-4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * _features(shape), third), nn.BatchNorm1d(third, eps=1e-4), nn.ReLU(),
        nn.Linear(third, 10),
    )  # fmt: skip


def xnor_network(shape: tuple[int, ...], widths: tuple[int, int, int] = (20, 50, 500)) -> nn.Sequential:
    """The same layers in the order of XNOR-Net: batch-norm → (sign, conv) → pool in the middle, real ends."""
    first, second, third = widths
    features = second * _features(shape)
    return nn.Sequential(
        nn.Conv2d(shape[0], first, 5), nn.BatchNorm2d(first, eps=1e-4), nn.ReLU(), nn.MaxPool2d(2),
        *xnor_block(first, second, 5, pool=2),
        nn.Flatten(),
        nn.BatchNorm1d(features, eps=1e-4), nn.Linear(features, third), nn.BatchNorm1d(third, eps=1e-4), nn.ReLU(),
        nn.Linear(third, 10),
    )  # fmt: skip


def variants() -> dict[str, Variant]:
    """The three columns of the paper's table."""
    return {
        "full": Variant("full precision", real_network, None, hinge=False),
        "weights": Variant("binary weights", real_network, BinaryWeight(), hinge=False),
        "xnor": Variant("XNOR-Net", xnor_network, XnorNet(), hinge=False),
    }


def plan_for(settings: Settings) -> Plan:
    """How much is trained."""
    return Plan(epochs=2, seeds=settings.seeds or 1) if settings.quick else Plan(epochs=6, seeds=settings.seeds or 5)


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train the three networks, pack two of them, compare predictions and time."""
    plan = plan_for(settings)
    data, what = load(settings.data, settings.quick)
    shape = tuple(data.train.images.shape[1:])
    rows = variants()
    found = train_all("xnor-net", rows, plan, data, out, settings, progress)

    equal: dict[str, tuple[int, int]] = {}
    for name in ("weights", "xnor"):
        progress("check", len(equal), 2)
        equal[name] = agreement(rows[name], found[name], data.test)
    progress("check", 2, 2)

    progress("time", 0, 2)
    networks = {name: packed_copy(restore(rows[name], found[name][0], shape)) for name in rows}
    sizes = {name: memory_bytes(network) for name, network in networks.items()}
    others = {rows[name].title: networks[name] for name in ("weights", "xnor")}
    times = {"20-50-500": time_networks(networks["full"], others, data.test.images, BATCHES, settings)}
    if not settings.quick:
        progress("time", 1, 2)
        wide = (64, 256, 2048)  # speed does not depend on the weights
        untrained: dict[str, nn.Module] = {}
        for name, row in rows.items():
            build = xnor_network if name == "xnor" else real_network
            model, _ = Variant(row.title, partial(build, widths=wide), row.method).model(shape, 0)
            untrained[row.title] = packed_copy(model)
        dense = untrained.pop(rows["full"].title)
        times["64-256-2048"] = time_networks(dense, untrained, data.test.images, BATCHES, settings)
    progress("time", 2, 2)

    machine = describe(settings.threads)
    accuracy = Table(
        "XNOR-Net: accuracy",
        ["network", "test accuracy, %", "bytes", "packed agrees", "paper, %"],
        [
            [
                rows[name].title, percent([1 - e for e in errors_of(found[name])]), format_bytes(sizes[name]),
                f"{equal[name][0]} of {equal[name][1]}" if name in equal else None, PAPER[name],
            ]
            for name in rows
        ],
        [
            f"LeNet-5 (20 - 50 - 500) with batch-norm; first and last layer real; Adam, {plan.epochs} epochs; mean ± "
            f"standard deviation over {over_seeds(plan.seeds)}",
            f"trained on {what}; the paper's column is top-1 of AlexNet on ImageNet",
            "agrees: predictions of the packed network and of the trained layers in plain torch, all seeds; outputs in "
            "eval mode are the same to the bit",
        ],
    )  # fmt: skip
    speed = Table(
        "XNOR-Net: time of a call, whole network",
        ["widths", "batch", "network", "time", "torch", "best dense", "speed-up over torch", "over best dense"],
        [
            [
                widths, batch, name, format_seconds(latencies[name].median), format_seconds(latencies["torch"].median),
                format_seconds(best_dense(latencies)), f"{latencies['torch'].median / latencies[name].median:.2f}x",
                f"{speedup(latencies, name):.2f}x",
            ]
            for widths, by_batch in times.items()
            for batch, latencies in by_batch.items()
            for name in others
        ],
        [
            headline(machine),
            "medians; torch and best dense (of torch, oneDNN and frozen) run the full-precision network; taking signs "
            "is inside",
            *(["64-256-2048: the same network made wider, with random weights"] if len(times) > 1 else []),
        ],
    )  # fmt: skip
    lead = (
        f"A LeNet-5 trained on {what}: with full precision, with binary weights and a scale per filter, and with "
        "binary activations too, in the layer order of XNOR-Net. The two binary ones are packed and timed as they are "
        "executed, beside the best dense code on the same machine, in one process and by turns. Accuracy is that of "
        "held-out images."
    )
    figures = [
        ("xnor-net-curves", "Validation error by epoch, mean over seeds.", curves(rows, found)),
        ("xnor-net-speed", "Speed-up over torch; below 1 the dense network wins.", _bars(times, list(others))),
    ]
    results: dict[str, Any] = {
        "experiment": "xnor-net", "data": what, "epochs": plan.epochs, "seeds": plan.seeds, "machine": machine,
        "rows": {name: row_data(rows[name], found[name]) for name in rows},
        "predictions_equal": {name: list(pair) for name, pair in equal.items()},
        "bytes": sizes, "latency": {widths: latency_data(by_batch) for widths, by_batch in times.items()},
        "tables": [accuracy.to_dict(), speed.to_dict()],
    }  # fmt: skip
    return Result("XNOR-Net on digits", lead, [accuracy, speed], figures, results)


def _bars(times: dict[str, dict[int, dict[str, Latency]]], names: list[str]) -> Any:
    from slimtorch.experiments.plots import COLORS, new_figure

    figure, (axis,) = new_figure(1, height=3.6)
    cases = [(widths, batch, found) for widths, by_batch in times.items() for batch, found in by_batch.items()]
    for index, name in enumerate(names):
        heights = [found["torch"].median / found[name].median for _, _, found in cases]
        at = [position + (index - (len(names) - 1) / 2) * 0.38 for position in range(len(cases))]
        bars = axis.bar(at, heights, 0.36, label=name, color=COLORS[index])
        axis.bar_label(bars, [f"{height:.2g}x" for height in heights], fontsize=8)
    for index, (_, _, found) in enumerate(cases):
        best = found["torch"].median / best_dense(found)
        label = "_" if index else "full precision, best dense code"  # one entry in the legend
        axis.hlines(best, index - 0.4, index + 0.4, colors="black", linestyles=":", label=label)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(range(len(cases)), [f"{widths}\nbatch {batch}" for widths, batch, _ in cases], fontsize=8)
    axis.set_ylabel("speed-up over torch, whole network")
    axis.margins(y=0.15)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return figure


EXPERIMENT = Experiment(
    name="xnor-net",
    about="binary convolutions with scales: full, binary weights, XNOR",
    paper="arXiv 1603.05279",
    config=lambda settings: asdict(plan_for(settings)),
    run=run,
)
