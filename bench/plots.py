# SPDX-License-Identifier: Apache-2.0
"""One SVG for each file of results, drawn from it and carrying its digest, so that a stale plot can be told."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import Case, Results
from bench.timing import Timing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

PLOTS_DIR = Path(__file__).resolve().parent / "results" / "plots"

# Name on the plot, colour (Okabe and Ito's palette, which colour-blind readers tell apart), line style, marker.
_LINES = {
    "ours": ("slimtorch", "#D55E00", "-", "o"),
    "dense": ("best dense", "#000000", "--", ""),
    "mkl-csr": ("MKL CSR", "#0072B2", "-", "s"),
    "deepsparse": ("DeepSparse", "#009E73", "-", "^"),
    "onnxruntime": ("ONNX Runtime", "#999999", ":", ""),
}
_BLOCK_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def digest(results: Results) -> str:
    """SHA-256 over everything that is drawn."""
    return hashlib.sha256(json.dumps(results.to_dict(), sort_keys=True).encode()).hexdigest()


def plot_path(results: Results, folder: Path = PLOTS_DIR) -> Path:
    return folder / f"{results.stem}.svg"


def is_current(results: Results, folder: Path = PLOTS_DIR) -> bool:
    """Whether the plot exists and was drawn from exactly these results."""
    path = plot_path(results, folder)
    return path.exists() and digest(results) in path.read_text(encoding="utf-8")


def plotted(results: Results) -> list[Case]:
    """The cases on the plot: float32, one thread."""
    return [case for case in results.cases if case.dtype == "float32" and case.threads == 1]


def title(case: Case) -> str:
    """A problem in words: `linear 1024 -> 1024, M = 64`, `conv 3x3, 128 -> 128, 28x28`."""
    p = case.problem
    if case.kind == "linear":
        return f"linear {p['k']} → {p['n']}, M = {p['m']}"
    kernel = p["kernel"]
    return f"conv {kernel[0]}×{kernel[1]}, {p['c_in']} → {p['c_out']}, {p['h']}×{p['w']}, batch {p['batch']}"


def _rival(case: Case, name: str) -> Timing | None:
    if name == "ours":
        return case.ours()
    return case.best_dense() if name == "dense" else case.timing(name)


def draw(results: Results, folder: Path = PLOTS_DIR) -> Path | None:
    """Write the plot and return its path; None where no case belongs on one. Needs matplotlib (ImportError)."""
    cases = plotted(results)
    if not cases:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {"svg.hashsalt": "slimtorch", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    panels: dict[str, list[Case]] = {}
    for case in cases:
        panels.setdefault(case.name, []).append(case)
    columns = min(len(panels), 5 if len(panels) > 6 else 3)
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(7.0, 3.1 * columns), 2.6 * rows + 0.7), squeeze=False, sharex=True
    )
    blocks = results.benchmark == "block_sparse"
    for axis, group in zip(axes.flat, panels.values(), strict=False):
        if blocks:
            _draw_blocks(axis, group)
        else:
            _draw_rivals(axis, group)
        axis.set_title(title(group[0]), fontsize=9)
        axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axis.set_xticks(sorted({100 * case.sparsity for case in group}))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("zero weights, %")
    for row in axes:
        row[0].set_ylabel("times faster than " + ("best dense" if blocks else "torch dense"))
    handles: dict[str, Artist] = {}
    for axis in axes.flat:
        handles.update({label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)})
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=len(handles), frameon=False)
    cpu = results.machine
    figure.suptitle(
        f"{cpu['cpu']}, kernels {cpu['isa']}, one thread, float32, torch {results.versions['torch']}", fontsize=9
    )
    figure.tight_layout(rect=(0, 0.08 if rows == 1 else 0.05, 1, 1))
    folder.mkdir(parents=True, exist_ok=True)
    path = plot_path(results, folder)
    figure.savefig(path, metadata={"Date": None, "Description": f"drawn from results {digest(results)}"})
    plt.close(figure)
    return path


def _draw_rivals(axis: Axes, group: list[Case]) -> None:
    """Everyone's speed-up over torch dense against sparsity, for one problem."""
    group = sorted(group, key=lambda case: case.sparsity)
    for name, (label, colour, style, marker) in _LINES.items():
        points = []
        for case in group:
            timing, torch_dense = _rival(case, name), case.timing("torch")
            if timing is not None and torch_dense is not None:
                points.append((100 * case.sparsity, torch_dense.median / timing.median))
        if points:
            width = 2.0 if name == "ours" else 1.2
            axis.plot(
                *zip(*points, strict=True),
                label=label,
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=4,
                linewidth=width,
            )
    axis.axhline(1, color="#BBBBBB", linewidth=0.8)


def _draw_blocks(axis: Axes, group: list[Case]) -> None:
    """Our speed-up over the best dense against sparsity, a line for each block size, and the ideal."""
    sizes = list(dict.fromkeys(case.block_size for case in group))
    for size, colour in zip(sizes, _BLOCK_COLOURS * len(sizes), strict=False):
        points = sorted(
            (100 * case.sparsity, speedup)
            for case in group
            if case.block_size == size and (speedup := case.speedup(case.best_dense())) is not None
        )
        if points:
            axis.plot(*zip(*points, strict=True), label=f"{size[0]}×{size[1]}", color=colour, marker="o", markersize=4)
    ideal = sorted({(100 * case.sparsity, 1 / case.density) for case in group})
    axis.plot(*zip(*ideal, strict=True), label="1 / density", color="#000000", linestyle="--", linewidth=1.0)
    axis.axhline(1, color="#BBBBBB", linewidth=0.8)
