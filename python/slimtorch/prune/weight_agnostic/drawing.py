# SPDX-License-Identifier: Apache-2.0
"""A picture of a topology: levels from left to right, a colour and a sign for each activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slimtorch.prune.weight_agnostic.genome import Genome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of ACTIVATIONS, in that order
_SIGNS = ("lin", "step", "sin", "gau", "tanh", "sig", "inv", "abs", "relu", "cos")
# ten colours that are told apart side by side; the sign in the node says the same for readers who cannot
_COLORS = (
    "#BBBBBB", "#E69F00", "#56B4E9", "#F0E442", "#009E73", "#88CCAA", "#CC79A7", "#D55E00", "#DDCC99", "#99AAFF"
)  # fmt: skip


def draw(
    axis: Axes,
    genome: Genome,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
) -> None:
    """Draws `genome` on a matplotlib axis: inputs on the left, hidden nodes by their longest path, outputs right.

    Args:
        axis: is emptied of its frame.
        inputs, outputs: names beside the nodes; None: none for inputs, numbers for outputs.
        grid: (rows, columns) of an image that the inputs are the pixels of: they are drawn as that image (an input
            without a connection stays empty), else as a column.

    Raises:
        ValueError: names or a grid that do not fit the numbers of inputs and outputs.
    """
    if inputs is not None and len(inputs) != genome.inputs:
        raise ValueError(f"inputs: expected {genome.inputs} names, got {len(inputs)}")
    if outputs is not None and len(outputs) != genome.outputs:
        raise ValueError(f"outputs: expected {genome.outputs} names, got {len(outputs)}")
    if grid is not None and grid[0] * grid[1] != genome.inputs:
        raise ValueError(f"grid: expected as many pixels as the {genome.inputs} inputs, got {grid[0]} x {grid[1]}")
    level = genome.levels()
    last, first = genome.nodes - genome.outputs, genome.inputs + 1
    at = np.zeros((genome.nodes, 2))  # x in levels, y in [0, 1]
    left = 0.0
    if grid is not None:
        rows, columns = grid
        pixel = np.arange(genome.inputs)
        step = 0.9 / max(rows, 2)
        at[pixel, 0] = (pixel % columns) / max(1, columns - 1) * 1.6 - 1.6
        at[pixel, 1] = 0.98 - (pixel // columns) * step
        at[genome.inputs] = (-0.8, 0.02)
        left = -1.6
    else:
        at[:first, 1] = _spread(first)
    for depth in range(1, int(level.max())):
        here = np.flatnonzero((level == depth) & (np.arange(genome.nodes) < last))
        # near what feeds it: fewer crossings
        feeds = [at[genome.connections[:, j], 1].mean() if genome.connections[:, j].any() else 0.5 for j in here]
        here = here[np.argsort(-np.array(feeds), kind="stable")]
        at[here, 1] = _spread(len(here)) + 0.035 * (-1) ** depth / max(1, len(here))
        at[here, 0] = depth + 0.25 * ((np.arange(len(here)) % 2) - 0.5) * (len(here) > 8)
    at[last:, 0] = level.max()
    at[last:, 1] = _spread(genome.outputs)

    source, destination = genome.edges()
    few = max(0.15, min(0.7, 30 / max(1, len(source))))
    for i, j in zip(source, destination, strict=True):
        axis.plot(at[[i, j], 0], at[[i, j], 1], color="#444444", linewidth=0.8, alpha=few, zorder=1)
    used = genome.connections.sum(axis=1) > 0
    for node in range(first):
        label = "1" if node == genome.inputs else ""
        color = "#333333" if used[node] else "white"
        axis.plot(*at[node], "s", color=color, markeredgecolor="#888888", markersize=6, zorder=2)
        if label or inputs is not None:
            text = "bias" if label else (inputs or ())[node]
            place = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            axis.annotate(text, at[node], fontsize=8, **place)  # type: ignore[arg-type]
    crowded = max((int((level[first:last] == depth).sum()) for depth in range(1, int(level.max()))), default=0)
    size, font = (15, 5.5) if crowded <= 24 else (10, 4)
    for node in range(first, last):
        kind = int(genome.activations[node - first])
        axis.plot(*at[node], "o", color=_COLORS[kind], markeredgecolor="#333333", markersize=size, zorder=3)
        axis.annotate(_SIGNS[kind], at[node], ha="center", va="center", fontsize=font, zorder=4)
    for number, node in enumerate(range(last, genome.nodes)):
        axis.plot(*at[node], "s", color="#333333", markersize=9, zorder=3)
        text = str(number) if outputs is None else outputs[number]
        axis.annotate(text, at[node], xytext=(8, 0), textcoords="offset points", ha="left", va="center", fontsize=8)
    axis.set_xlim(left - 0.35, float(level.max()) + 0.35)
    axis.set_ylim(-0.04, 1.04)
    axis.set_axis_off()


def _spread(count: int) -> np.ndarray:
    return 1 - (np.arange(count) + 0.5) / count
