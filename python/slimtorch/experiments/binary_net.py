# SPDX-License-Identifier: Apache-2.0
"""BinaryNet on digits (arXiv 1602.02830): weights and activations of ±1, trained, packed and timed end to end."""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimtorch.data import load
from slimtorch.experiments.binary_connect import mlp
from slimtorch.experiments.binary_training import (
    Plan,
    Variant,
    agreement,
    errors_of,
    latency_data,
    packed_copy,
    predict,
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
from slimtorch.nn.fuse_binary import fuse_binary_
from slimtorch.quantize import BinaryNet, binarize_
from slimtorch.report import Table, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCHES = (1, 100)
PAPER_WIDTH = 4096  # units of each hidden layer on MNIST in the paper


def binary_mlp(shape: tuple[int, ...], width: int, hidden: int = 3) -> nn.Sequential:
    """Linear → batch-norm, ``hidden`` + 1 times: the sign at the input of the next layer is the activation."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = torch.Size(shape).numel()
    for size in (*[width] * hidden, 10):
        layers += [nn.Linear(features, size), nn.BatchNorm1d(size, eps=1e-4)]
        features = size
    return nn.Sequential(*layers)


def variants(width: int) -> dict[str, Variant]:
    """The network with real weights and ReLU, and the binary one."""
    return {
        "real": Variant("real weights, ReLU", partial(mlp, width=width), None, rate=RATE),
        "binary": Variant("BinaryNet", partial(binary_mlp, width=width), BinaryNet(), rate=RATE, uniform=True),
    }


RATE = 1e-2  # chosen on the validation images


def plan_for(settings: Settings) -> tuple[int, Plan]:
    """Width of the hidden layers, and how much is trained."""
    if settings.quick:
        return 256, Plan(epochs=5, seeds=settings.seeds or 1)
    return 512, Plan(epochs=20, seeds=settings.seeds or 5)


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train both networks, pack the binary one, compare predictions and time."""
    width, plan = plan_for(settings)
    data, what = load(settings.data, settings.quick)
    shape = tuple(data.train.images.shape[1:])
    rows = variants(width)
    found = train_all("binary-net", rows, plan, data, out, settings, progress)

    progress("check", 0, 1)
    same, total = agreement(rows["binary"], found["binary"], data.test)
    progress("check", 1, 1)

    widths = [width] if settings.quick else [width, PAPER_WIDTH]
    times: dict[int, dict[int, dict[str, Latency]]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for index, size in enumerate(widths):
        progress("time", index, len(widths))
        if size == width:
            dense = restore(rows["real"], found["real"][0], shape)
            packed = packed_copy(restore(rows["binary"], found["binary"][0], shape))
        else:  # speed does not depend on the weights
            dense, packed = mlp(shape, size).eval(), binary_mlp(shape, size)
            binarize_(packed, BinaryNet())
            packed = packed_copy(packed)
        sizes[size] = memory_bytes(dense), memory_bytes(packed)
        fused = copy.deepcopy(packed)
        fuse_binary_(fused)
        if not torch.equal(predict(fused, data.test.images), predict(packed, data.test.images)):
            raise RuntimeError("the fused network predicts other classes than the packed one")
        networks = {"packed": packed, "fused": fused}
        times[size] = time_networks(dense, networks, data.test.images, BATCHES, settings)
    progress("time", len(widths), len(widths))

    machine = describe(settings.threads)
    accuracy = Table(
        "BinaryNet: test error",
        ["network", "test error, %", "bytes", "packed agrees"],
        [
            [rows["real"].title, percent(errors_of(found["real"])), format_bytes(sizes[width][0]), None],
            [rows["binary"].title, percent(errors_of(found["binary"])), format_bytes(sizes[width][1]),
             f"{same} of {total}"],
        ],
        [
            f"{shape[0] * shape[1] * shape[2]} - 3 x {width} - 10, squared hinge loss, Adam, {plan.epochs} epochs; "
            f"mean ± standard deviation over {over_seeds(plan.seeds)}",
            f"trained on {what}; the paper on all of MNIST, 3 x 4096 units: 0.96 to 1.40 %",
            "agrees: predictions of the packed network and of the trained layers in plain torch, all seeds; outputs in "
            "eval mode are the same to the bit",
        ],
    )  # fmt: skip
    speed = Table(
        "BinaryNet: time of a call, whole network",
        ["hidden layers", "batch", "network", "time", "torch", "best dense", "speed-up over torch", "over best dense"],
        [
            [
                f"3 x {size}", batch, name, format_seconds(latencies[name].median),
                format_seconds(latencies["torch"].median), format_seconds(best_dense(latencies)),
                f"{latencies['torch'].median / latencies[name].median:.2f}x", f"{speedup(latencies, name):.2f}x",
            ]
            for size, by_batch in times.items()
            for batch, latencies in by_batch.items()
            for name in ("packed", "fused")
        ],
        [
            headline(machine),
            "medians; dense: the real network; taking signs is inside; best dense: of torch, oneDNN and frozen",
            "fused: batch-norm and sign between binary layers are one comparison of whole numbers, and bits are passed",
            *([f"3 x {PAPER_WIDTH} is the paper's size, with random weights"] if len(widths) > 1 else []),
        ],
    )  # fmt: skip
    lead = (
        f"Networks of three hidden layers trained on {what}: one with real weights and ReLU, one with weights and "
        "activations of ±1. The binary one is packed into single bits and timed as it is executed, beside the best "
        "dense code on the same machine, in one process and by turns. Errors are those of held-out images."
    )
    figures = [
        ("binary-net-curves", "Validation error by epoch, mean over seeds.", curves(rows, found)),
        (
            "binary-net-speed",
            "Speed-up of the packed and fused network; below 1 the dense one wins.",
            speed_bars(times),
        ),
    ]
    results: dict[str, Any] = {
        "experiment": "binary-net", "data": what, "width": width, "epochs": plan.epochs, "seeds": plan.seeds,
        "machine": machine, "rows": {name: row_data(rows[name], found[name]) for name in rows},
        "predictions_equal": [same, total],
        "bytes": {str(size): {"real": pair[0], "packed": pair[1]} for size, pair in sizes.items()},
        "latency": {str(size): latency_data(by_batch) for size, by_batch in times.items()},
        "tables": [accuracy.to_dict(), speed.to_dict()],
    }  # fmt: skip
    return Result("BinaryNet on digits", lead, [accuracy, speed], figures, results)


def curves(rows: Any, found: Any) -> Figure:
    """Validation error by epoch, one line per row."""
    import statistics

    from slimtorch.experiments.plots import COLORS, new_figure, plain_ticks

    figure, (axis,) = new_figure(1, height=3.6)
    for (name, records), color in zip(found.items(), COLORS[::2], strict=False):
        values = zip(*(record.result["validation_error"] for record in records), strict=True)
        means = [100 * statistics.fmean(value) for value in values]
        axis.plot(range(1, len(means) + 1), means, label=rows[name].title, color=color, linewidth=1.6)
    axis.set_yscale("log")
    plain_ticks(axis.yaxis)
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation error, %")
    axis.legend(fontsize=8, frameon=False)
    return figure


def speed_bars(times: dict[int, dict[int, dict[str, Latency]]]) -> Figure:
    """Speed-up of "fused" over torch and over the best dense code, a group of bars per size and batch."""
    from slimtorch.experiments.plots import COLORS, new_figure

    figure, (axis,) = new_figure(1, height=3.6)
    cases = [(size, batch, found) for size, by_batch in times.items() for batch, found in by_batch.items()]
    over = {
        "over torch": [found["torch"].median / found["fused"].median for _, _, found in cases],
        "over the best dense code": [speedup(found, "fused") for _, _, found in cases],
    }
    for index, (label, heights) in enumerate(over.items()):
        at = [position + (index - 0.5) * 0.38 for position in range(len(cases))]
        bars = axis.bar(at, heights, 0.36, label=label, color=COLORS[index])
        axis.bar_label(bars, [f"{height:.2g}x" for height in heights], fontsize=8)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(range(len(cases)), [f"3 x {size}\nbatch {batch}" for size, batch, _ in cases], fontsize=8)
    axis.set_ylabel("speed-up, whole network")
    axis.margins(y=0.15)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    return figure


EXPERIMENT = Experiment(
    name="binary-net",
    about="binary weights and activations, trained, packed and timed",
    paper="arXiv 1602.02830",
    config=lambda settings: {"width": plan_for(settings)[0], **asdict(plan_for(settings)[1])},
    run=run,
)
