# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of `slimmable`, made from its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimtorch.experiments import machine
from slimtorch.experiments.summary import over_seeds, percent, spread
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NETWORKS = {"convnet": "LeNet-5 with batch norms", "resnet": "a narrow ResNet-18"}
_METHODS = {
    "alone": "one network per width",
    "slimmable": "slimmable, in-place distillation",
    "labels": "slimmable, labels only",
    "universal": "universal, random widths",
    "cut": "whole network, cut",
}
_STYLE: dict[str, dict[str, Any]] = {
    "alone": {"color": "#000000", "marker": "o"},
    "slimmable": {"color": "#0072B2", "marker": "s"},
    "labels": {"color": "#56B4E9", "marker": "D"},
    "universal": {"color": "#E69F00", "marker": "^"},
    "cut": {"color": "#999999", "marker": "v"},
}


def _best(ways: Mapping[str, float]) -> float:
    """Seconds of the fastest way to run an exported network."""
    return min(seconds for way, seconds in ways.items() if way != "switched")


def _micro(seconds: float) -> float:
    return float(f"{1e6 * seconds:.3g}")


def _difference(rows: Sequence[float], alone: Sequence[float]) -> str:
    """Points, per seed; a star where the mean is within the spread (standard deviation) of the networks alone."""
    points = [100 * (a - b) for a, b in zip(rows, alone, strict=True)]
    within = len(alone) > 1 and abs(statistics.fmean(points)) <= 100 * statistics.stdev(alone)
    return spread(points, 2) + (" *" if within else "")


def tables(found: Mapping[str, Any]) -> list[Table]:
    """For each network: accuracy by method and width, difference to networks trained alone, measured time."""
    chosen, result = found["plan"], []
    widths = [f"{width:g}" for width in chosen["widths"]]
    for name, part in found["networks"].items():
        methods = part["methods"]
        rows: list[list[object]] = [
            [_METHODS[method], *(percent(values) for values in methods[method]["test"])] for method in _METHODS
            if method in methods
        ]  # fmt: skip
        for method in _METHODS:
            if method in methods and method not in ("alone", "cut"):
                pairs = zip(methods[method]["test"], methods["alone"]["test"], strict=True)
                cells = [_difference(own, alone) for own, alone in pairs]
                rows.append([f"{_METHODS[method]}: difference", *cells])
        notes = [
            f"mean ± standard deviation over {over_seeds(chosen['seeds'])}; {part['steps']} steps each, of batches of "
            f"{chosen['batch_size']}",
            "difference: points to the networks of each width, seed by seed; *: within their standard deviation",
            "cut: the network trained alone at width 1, its first channels, batch-norm statistics taken anew",
        ]
        if "universal" in methods:
            others = ", ".join(
                f"{width:g}: {percent(values)}"
                for width, values in zip(chosen["others"], methods["universal"]["others"], strict=True)
            )
            notes.append(f"universal, at widths that no step has met: {others}")
        columns = ["test accuracy, % at width", *widths]
        result.append(Table(f"Several widths of {_NETWORKS[name]}", columns, rows, notes))

        rows = []
        for index, width in enumerate(widths):
            cells_: list[object] = [width, f"{part['parameters'][index]:,}", f"{part['macs'][index] / 1e6:.2f}"]
            for own in part["times"].values():
                best, whole = _best(own[width]), _best(own[widths[-1]])
                cells_ += [_micro(best), f"{whole / best:.2f}x", _micro(own[width]["switched"])]
            rows.append(cells_)
        columns = ["width", "parameters", "MMACs"]
        for batch in part["times"]:
            columns += [f"us, b{batch}", f"gain, b{batch}", f"switched, b{batch}"]
        notes = [
            "us: microseconds per image, b: images in a call; the exported network in its fastest way; gain: against "
            "width 1. MMACs: million multiply-accumulates per image",
            "switched: `set_width` and a call of the slimmable network itself, plain torch",
            f"one set of weights for all widths: {part['parameters_together']:,} parameters, against "
            f"{sum(part['parameters']):,} of all networks",
            machine.headline(found["machine"]),
        ]
        result.append(Table(f"Measured time of each width of {_NETWORKS[name]}", columns, rows, notes))
    return result


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy against width, and against measured time at each batch size, one figure per network."""
    from slimtorch.experiments import plots

    chosen, result = found["plan"], []
    widths = chosen["widths"]
    for name, part in found["networks"].items():
        batches = list(part["times"])
        figure, axes = plots.new_figure(1 + len(batches), width=4.8)
        methods = part["methods"]
        for method, style in _STYLE.items():
            if method not in methods:
                continue
            x, rows = list(widths), methods[method]["test"]
            if method == "universal":
                pairs = sorted(zip([*x, *chosen["others"]], [*rows, *methods[method]["others"]], strict=True))
                plots.band(axes[0], [w for w, _ in pairs], _seeds([v for _, v in pairs]), _METHODS[method], **style)
            else:
                plots.band(axes[0], x, _seeds(rows), _METHODS[method], **style)
            for axis, batch in zip(axes[1:], batches, strict=True):
                seconds = [1e6 * _best(part["times"][batch][f"{width:g}"]) for width in widths]
                plots.band(axis, seconds, _seeds(rows), None, **style)
        means = [
            [100 * statistics.fmean(values) for values in own["test"]] for key, own in methods.items() if key != "cut"
        ]
        least, most = min(map(min, means)), max(map(max, means))
        axes[0].set_xlabel("width")
        axes[0].set_xticks(widths)
        axes[0].set_ylabel("test accuracy, %")
        for axis, batch in zip(axes[1:], batches, strict=True):
            axis.set_xlabel(f"microseconds per image, batch {batch}")
        for axis in axes:
            axis.set_ylim(least - 1.5, min(100.0, most + 1))
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, fontsize=8, loc="outside lower center", ncols=5, frameon=False)
        figure.suptitle(f"{_NETWORKS[name][0].upper()}{_NETWORKS[name][1:]}: one set of weights at several widths")
        caption = (
            f"{_NETWORKS[name][0].upper()}{_NETWORKS[name][1:]}: test accuracy against width and against the measured "
            "time of the network exported at each width. Bands: ± 1 sd over seeds. What is far below is left out."
        )
        result.append((f"slimmable-{name}", caption, figure))
    return result


def _seeds(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """[width][seed] of shares → [seed][width] in percent."""
    return [[100 * value for value in row] for row in zip(*rows, strict=True)]
