# SPDX-License-Identifier: Apache-2.0
"""Figures of the experiments, drawn from the same objects as the tables."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtorch._files import write_atomically
from slimtorch.experiments.rivals import TORCH, best_dense
from slimtorch.experiments.training import PRUNED, TITLES, Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from slimtorch.experiments.compare import Comparison
    from slimtorch.experiments.layers import LayerComparison

# Okabe & Ito's colours, told apart by colour-blind readers too; unstructured blue, blocks orange, structured green.
_STYLE: dict[Method, dict[str, Any]] = {
    Method.ONE_SHOT: {"color": "#56B4E9", "marker": "o"},
    Method.ITERATIVE: {"color": "#0072B2", "marker": "o"},
    Method.BLOCKS: {"color": "#E69F00", "marker": "s"},
    Method.NEURONS: {"color": "#009E73", "marker": "^"},
    Method.SCRATCH: {"color": "#999999", "marker": "v"},
}
COLORS = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#999999", "#CC79A7", "#D55E00")
"""For series without a colour of their own."""


def new_figure(panels: int, height: float = 4.2, width: float = 5.6) -> tuple[Figure, list[Axes]]:
    """Panels side by side, each ``width`` by ``height`` inches; ImportError, with the extra, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need the package matplotlib: install the extra with `pip install slimtorch[experiments]`"
        ) from error
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    for axis in axes:
        axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def accuracy_against_latency(comparison: Comparison, network: str) -> Figure:
    """Test accuracy over measured time, one panel per batch size; up and to the left is better."""
    batches = comparison.settings.batches
    figure, axes = new_figure(len(batches))
    dense = comparison.dense(network)
    for axis, batch in zip(axes, batches, strict=True):
        for method in PRUNED:
            variants = comparison.of(network, method)
            x = [variant.seconds(batch) * 1e6 for variant in variants]
            y = [statistics.fmean(variant.test) * 100 for variant in variants]
            spread = [100 * statistics.stdev(variant.test) if len(variant.test) > 1 else 0.0 for variant in variants]
            axis.errorbar(x, y, spread, label=method.value, capsize=2, linewidth=1.4, markersize=5, **_STYLE[method])
            if method in (Method.ITERATIVE, Method.NEURONS):
                for variant, a, b in zip(variants, x, y, strict=True):
                    color = _STYLE[method]["color"]
                    offset = {"xytext": (4, -10), "textcoords": "offset points"}
                    axis.annotate(f"{variant.sparsity:.0%}", (a, b), color=color, fontsize=7, **offset)  # type: ignore[arg-type]
        height = statistics.fmean(dense.test) * 100
        latency = dense.latency[batch]
        axis.plot(latency[TORCH].median * 1e6, height, "k*", markersize=11, label="dense, torch")
        axis.plot(best_dense(latency) * 1e6, height, "kP", markersize=8, label="dense, best")
        axis.set_xscale("log")
        plain_ticks(axis.xaxis)
        top = max(height, *(statistics.fmean(variant.test) * 100 for variant in comparison.networks[network]))
        # What fell far down is no competitor.
        axis.set_ylim(max(axis.get_ylim()[0], height - 20), min(100.0, top + 1.5))
        axis.set_xlabel(f"microseconds per call, batch {batch}")
        axis.set_ylabel("test accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=7, frameon=False)
    figure.suptitle(f"{TITLES[network]}: accuracy against measured latency")
    return figure


def speedup_against_sparsity(comparison: Comparison, network: str) -> Figure:
    """Speed-up over the best dense code, structured against unstructured; below 1 the dense code wins."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    batches = comparison.settings.batches
    figure, axes = new_figure(len(batches))
    for axis, batch in zip(axes, batches, strict=True):
        values = [1.0]
        for method in PRUNED:
            if method is Method.SCRATCH:
                continue  # the shapes of "neurons", the same times
            variants = comparison.of(network, method)
            x = [1 / (1 - variant.sparsity) for variant in variants]
            y = [comparison.speedup(network, variant, batch, "best") for variant in variants]
            values += y
            axis.plot(x, y, label=method.value, linewidth=1.4, markersize=5, **_STYLE[method])
        latency = comparison.dense(network).latency[batch]
        eager = best_dense(latency) / latency[TORCH].median
        axis.axhline(1, color="black", linewidth=1, label="best dense")
        axis.axhline(eager, color="black", linewidth=1, linestyle=":", label="dense, torch")
        ticks = [1 / (1 - sparsity) for sparsity in comparison.settings.sparsities]
        axis.set_xlim(min(ticks) * 0.9, max(ticks) * 1.1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        bottom, top = min([eager, *values]) * 0.8, max(values) * 1.25
        axis.set_ylim(bottom, top)
        axis.axhspan(bottom, 1, color="#D55E00", alpha=0.08)
        axis.text(0.02, 0.02, "slower than the best dense code", transform=axis.transAxes, fontsize=8, color="#D55E00")
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * (1 - 1 / value):.4g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        plain_ticks(axis.yaxis)
        axis.set_xlabel(f"weights removed, % (batch {batch})")
        axis.set_ylabel("speed-up over the best dense code")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"{TITLES[network]}: measured speed-up against sparsity")
    return figure


def layer_speedups(comparison: LayerComparison) -> list[tuple[str, Figure]]:
    """Bars of the speed-up over torch for each layer and contender; one figure per kind of timing, with its name."""
    figures = []
    for kind in comparison.kinds():
        figure, (axis,) = new_figure(1, width=11)
        names = comparison.layer_names()
        contenders = comparison.contenders(kind)
        width = 0.8 / max(1, len(contenders))
        for index, contender in enumerate(contenders):
            heights = [comparison.speedup(kind, name, contender) or 0.0 for name in names]
            at = [position + (index - (len(contenders) - 1) / 2) * width for position in range(len(names))]
            axis.bar(at, heights, width * 0.95, label=contender, color=COLORS[index % len(COLORS)])
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(range(len(names)), names, rotation=45 if len(names) > 8 else 0)
        axis.set_ylabel("speed-up over torch, dense")
        axis.legend(fontsize=8, ncols=2)
        figure.suptitle(f"{comparison.title}: {kind}")
        figures.append((kind, figure))
    return figures


def plain_ticks(axis: Any) -> None:
    """Few ticks on a logarithmic axis, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def band(
    axis: Axes, x: Sequence[float], rows: Sequence[Sequence[float]], label: str | None, color: str, **style: Any
) -> None:
    """The mean over seeds as a line, and one standard deviation around it; ``rows`` holds len(x) values per seed."""
    columns = list(zip(*rows, strict=True))
    means = [statistics.fmean(column) for column in columns]
    axis.plot(x, means, **{"label": label, "color": color, "linewidth": 1.6, **style})
    if len(rows) > 1:
        spreads = [statistics.stdev(column) for column in columns]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def phase_by_phase(
    names: Sequence[str],
    accuracy: Sequence[Sequence[float]],
    bytes_file: Sequence[float | None],
    latency: Mapping[int, Sequence[float]],
    rival: str,
) -> Figure:
    """What phases do to a network, a panel each: accuracy, size of the file, and latency where it was measured.

    Args:
        names: of the phases.
        accuracy: for each seed, of each phase, in [0, 1].
        bytes_file: of each phase; None where there is no file.
        latency: batch size → of each phase, as a multiple of ``rival``'s.
        rival: what latencies are compared with, in words.
    """
    figure, (left, middle, *right) = new_figure(3 if latency else 2, width=4.4)
    x = list(range(len(names)))
    band(left, x, [[100 * value for value in row] for row in accuracy], None, COLORS[0], marker="o")
    left.set_ylabel("test accuracy, %")
    middle.plot(x, [math.nan if size is None else size / 1024 for size in bytes_file], marker="o", color=COLORS[0])
    middle.set_ylabel("file, KiB")
    middle.set_yscale("log")
    plain_ticks(middle.yaxis)
    for axis in right:
        for color, (batch, ratios) in zip(itertools.cycle(COLORS[2:]), latency.items(), strict=False):
            axis.plot(x, ratios, marker="o", color=color, label=f"batch {batch}")
        axis.axhline(1, color="black", linewidth=1)
        axis.set_ylabel(f"latency / {rival}")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
    for axis in (left, middle, *right):
        axis.set_xticks(x, names, rotation=45, ha="right", fontsize=8)
    return figure


def save_png(figure: Figure, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write ``figure`` as a PNG, atomically; ``metadata`` goes into the file as text."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120, metadata=metadata))


def svg(figure: Figure) -> str:
    """``figure`` as SVG text with its letters as paths: it needs no font."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "slimtorch"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def comparison_figures(comparison: Comparison) -> Sequence[tuple[str, str, Figure]]:
    """(file name, caption, figure) of all figures of a comparison."""
    figures = []
    for network in comparison.networks:
        title = TITLES[network]
        caption = f"{title}: up and to the left is better. Beside points: weights removed. Bars: standard deviation."
        figures.append((f"{network}-accuracy-latency", caption, accuracy_against_latency(comparison, network)))
        caption = f"{title}: in the shaded part the dense network is faster."
        figures.append((f"{network}-speedup-sparsity", caption, speedup_against_sparsity(comparison, network)))
    return figures
