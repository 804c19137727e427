# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of `skipping`, made from its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimtorch.experiments import machine
from slimtorch.experiments.summary import mean_and_deviation, over_seeds, percent, spread
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCKS = 9  # of ResNet-20


def _mean(values: Sequence[float]) -> float:
    return float(mean_and_deviation(values)["mean"])


def _title(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    name = row["name"]
    if name.startswith("short"):
        return f"trained with {name.removeprefix('short')} blocks"
    if name.startswith("gates"):
        _, kind, target = name.split("-")
        return f"gates, {float(target):.0%} {'of each block' if kind == 'each' else 'of all'}"
    if "how" in row:
        source = "stochastic" if name.startswith("stochastic") else "whole"
        return f"{source}, {row['blocks']} kept, {row['how']}"
    return {"whole": f"whole network, {_BLOCKS} blocks", "stochastic": f"stochastic depth, {_BLOCKS} blocks"}[name]


def _micro(row: Mapping[str, Any], batch: str) -> str | None:
    """Microseconds per image, over seeds where they differ."""
    values = [1e6 * value for value in row["time"].get(batch, [])]
    return spread(values, digits=0 if values[0] >= 100 else 1) if values else None


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Everything against the whole network; what the gates do; layers dropped, with and without new statistics."""
    rows, chosen = found["rows"], found["plan"]
    whole = rows[0]
    batches = list(whole["time"])

    def gain(row: Mapping[str, Any], batch: str) -> str | None:
        times = row["time"].get(batch)
        return f"{_mean(whole['time'][batch]) / _mean(times):.2f}x" if times else None

    cells: list[list[object]] = []
    for row in rows:
        if not row["time"]:
            continue
        own: list[object] = [_title(row, found), percent(row["test"]), f"{_mean(row['macs']) / 1e6:.2f}"]
        for batch in batches:
            own += [_micro(row, batch), gain(row, batch)]
        cells.append(own)
    columns = ["network", "test, %", "MMACs"]
    for batch in batches:
        columns += [f"us, b{batch}", f"gain, b{batch}"]
    noisy = [f"b{b}" for b in batches if any(own["statistic"] == "p10" for own in found["times"][b].values())]
    notes = [
        f"mean ± standard deviation over {over_seeds(chosen['seeds'])}; {found['steps']} steps each",
        "us: microseconds per image, b: images in a call; at b1 the mean over the first test images, one by one; ± "
        "over seeds where paths differ. MMACs: million multiply-accumulates per image, gates included.",
        "The scales of stochastic depth fold into batch norms: time of the whole network.",
        "kept: blocks of the network above, spread evenly or searched on validation images; batch norms then take "
        "their statistics anew.",
        *([f"{' and '.join(noisy)}: other processes at work, 10th percentiles instead of medians."] if noisy else []),
        machine.headline(found["machine"]),
    ]
    result = [Table("Skipping blocks of a narrow ResNet-20", columns, cells, notes)]

    gates = [row for row in rows if "share" in row]
    cells = [
        [_title(row, found), percent(row["test"]), spread([100 * m / whole["macs"][0] for m in row["macs"]], 1),
         spread([sum(d * n for d, n in enumerate(own)) / sum(own) for own in row["depths"]], 2),
         spread([float(p) for p in row["paths"]], 1)]
        for row in gates
    ]  # fmt: skip
    notes = ["paths: different choices of blocks among the test images"]
    columns = ["penalty draws to", "test, %", "MACs, % of whole", "blocks run", "paths"]
    result.append(Table("What the gates do", columns, cells, notes))

    cells = []
    for count in sorted(chosen["kept"], reverse=True):
        for row in rows:
            if row.get("blocks") == count:
                cells.append([_title(row, found), percent(row["raw"]), percent(row["test"])])
    result.append(Table(
        "Layers dropped after training", ["from", "as it is, test, %", "new statistics, test, %"], cells,
        [f"whole: trained without dropping, {percent(whole['test'])} % with all {_BLOCKS} blocks"],
    ))  # fmt: skip
    return result


_STYLE: dict[str, dict[str, Any]] = {
    "trained as such": {"color": "black", "marker": "o"},
    "gates, target for all": {"color": "#0072B2", "marker": "s"},
    "gates, target for each": {"color": "#56B4E9", "marker": "D"},
    "stochastic depth, spread": {"color": "#E69F00", "marker": "^", "linestyle": "--"},
    "stochastic depth, searched": {"color": "#D55E00", "marker": "v", "linestyle": "--"},
}


def _family(row: Mapping[str, Any]) -> str | None:
    name = row["name"]
    if name == "whole" or name.startswith("short"):
        return "trained as such"
    if name.startswith("gates"):
        return f"gates, target for {name.split('-')[1]}"
    return f"stochastic depth, {row['how']}" if name.startswith("stochastic ") else None


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy against measured time at each batch size; how many blocks images run."""
    from slimtorch.experiments import plots

    rows = found["rows"]
    whole = rows[0]
    figure, axes = plots.new_figure(len(whole["time"]))
    for axis, batch in zip(axes, whole["time"], strict=True):
        for family, style in _STYLE.items():
            own = sorted(
                (row for row in rows if row["time"] and _family(row) == family), key=lambda r: _mean(r["time"][batch])
            )
            if not own:
                continue
            x = [1e6 * _mean(row["time"][batch]) for row in own]
            summary = [mean_and_deviation([100 * v for v in row["test"]]) for row in own]
            wide = [1e6 * (mean_and_deviation(row["time"][batch])["std"] or 0.0) for row in own]
            axis.errorbar(
                x, [s["mean"] for s in summary], [s["std"] or 0.0 for s in summary], wide, label=family, capsize=2,
                linewidth=1.4, markersize=5, **style,
            )  # fmt: skip
        height = 100 * _mean(whole["test"])
        least = min(100 * _mean(row["test"]) for row in rows if row["time"])
        axis.set_ylim(max(least - 1, height - 12), min(100.0, height + 2))
        axis.set_xlabel(f"microseconds per image, batch {batch}")
        axis.set_ylabel("test accuracy, %")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("A narrow ResNet-20: accuracy against measured time")

    gates = [row for row in rows if "share" in row]
    second, panels = plots.new_figure(2)
    blocks = range(1, _BLOCKS + 1)
    for index, row in enumerate(gates):
        color, title = plots.COLORS[index % len(plots.COLORS)], _title(row, found)
        totals = [sum(own) for own in row["depths"]]
        shares = [[100 * n / t for n in own] for own, t in zip(row["depths"], totals, strict=True)]
        plots.band(panels[0], range(_BLOCKS + 1), shares, title, color, marker="o")
        opened = [[100 * value for value in own] for own in row["share"]]
        plots.band(panels[1], blocks, opened, title, color, marker="o")
    panels[0].set_xlabel("blocks run")
    panels[0].set_ylabel("test images, %")
    panels[1].set_xlabel("block")
    panels[1].set_ylabel("test images that run it, %")
    for panel in panels:
        panel.set_ylim(0, 102)
    handles = panels[0].get_legend_handles_labels()
    second.legend(*handles, fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    second.suptitle("What the gates do with an image")
    caption = (
        "Test accuracy against measured time per image: up and to the left is better. Bars: ± 1 sd over seeds. What is "
        "far below is left out."
    )
    return [
        ("skipping", caption, figure),
        ("skipping-gates", "Blocks that images run, and images that run a block. Bands: ± 1 sd over seeds.", second),
    ]
