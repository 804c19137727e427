# SPDX-License-Identifier: Apache-2.0
"""Networks with other layers in the place of some: what the experiments separable and low-rank time alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtorch.design import ReplaceReport
from slimtorch.experiments.rivals import TORCH, dense_rivals
from slimtorch.measure import count_macs, interleave
from slimtorch.packing import _judge
from slimtorch.report import Table

SAMPLE_SECONDS = 1e-3  # short: another process then spoils few of them
CHOSEN = "where faster"  # the row of the network in which the verb itself chose


def race(networks: Mapping[str, nn.Module], x: Tensor, samples: int) -> dict[str, Any]:
    """Row → seconds in the fastest way and in torch, all by turns; and the statistic they are."""
    calls: dict[str, Callable[[], object]] = {}
    with torch.inference_mode():
        for row, model in networks.items():
            calls |= {f"{row}/{name}": call for name, call in dense_rivals(model, x).items()}
        latencies = interleave(calls, samples=samples, min_sample_seconds=SAMPLE_SECONDS)
    by, values = _judge(list(latencies.values()))
    seconds = dict(zip(latencies, values, strict=True))
    found: dict[str, Any] = {"statistic": by}
    for row in networks:
        ways = {n.rsplit("/", 1)[1]: value for n, value in seconds.items() if n.rsplit("/", 1)[0] == row}
        name = min(ways, key=ways.__getitem__)
        found[row] = {"seconds": float(f"{ways[name]:.4g}"), "by": name, "torch": float(f"{ways[TORCH]:.4g}")}
    return found


def race_choice(
    networks: Mapping[str, nn.Module], x: Tensor, samples: int, choose: Callable[[nn.Module], ReplaceReport]
) -> dict[str, Any]:
    """`race`, with one row more: a copy of the dense network in which ``choose`` replaced what it wants, its MACs of
    one image, and how many ``layers`` it looked at and ``replaced``."""
    own = copy.deepcopy(networks["dense"])
    report = choose(own)
    found = race({**networks, CHOSEN: own.eval()}, x, samples)
    found |= {"replaced": len(report.replaced), "layers": len(report.layers)}
    found[CHOSEN]["macs"] = count_macs(own, x[:1])[1]
    return found


def time_table(
    title: str, column: str, macs: Mapping[str, float], time: Mapping[str, Mapping[str, Any]], verb: str, headline: str
) -> Table:
    """Times of a network's rows.

    Args:
        title: of the network.
        column: the head of the first column.
        macs: row → of one image, the dense network's first.
        time: batch size → what `race` or `race_choice` found.
        verb: its call, in words; a network in which nothing was chosen is one with weights as they are drawn.
        headline: the machine.
    """
    dense = next(iter(macs.values()))
    chose = all(CHOSEN in part for part in time.values())
    rows: list[list[object]] = []
    for name in [*macs, *([CHOSEN] if chose else [])]:
        row: list[object] = [name, f"{dense / macs[name]:.2f}x" if name in macs else "-"]
        for part in time.values():
            own, reference = part[name], part["dense"]
            row += [f"{own['torch'] * 1e3:.3g}", f"{own['seconds'] * 1e3:.3g}"]
            row.append(f"{reference['seconds'] / own['seconds']:.2f}x")
        rows.append(row)
    columns = [column, "fewer MACs"]
    for batch in time:
        columns += [f"torch, b{batch}", f"best, b{batch}", f"gain, b{batch}"]
    notes = [
        "milliseconds per call, b: batch size. torch: the module as it is; best: the fastest of torch, oneDNN and "
        "frozen TorchScript; gain: of the best ways.",
    ]
    if chose:
        kept = ", ".join(f"{part['replaced']} of {part['layers']} at b{b}" for b, part in time.items())
        notes.append(f"where faster: {verb} kept {kept}: it measures layers as torch runs them.")
    else:
        notes.append("not trained: weights as drawn, on which time does not depend.")
    notes.append(headline)
    noisy = [f"b{batch}" for batch, part in time.items() if part["statistic"] == "p10"]
    if noisy:
        notes.append(f"{' and '.join(noisy)}: other processes at work, 10th percentiles instead of medians.")
    return Table(f"{title}: measured time", columns, rows, notes)
