# SPDX-License-Identifier: Apache-2.0
"""What `prune_` did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from slimtorch.report import Table


@dataclass(frozen=True)
class PrunedLayer:
    """One layer before and after.

    Attributes:
        name: the layer's name in the model, "" for a bare layer.
        granularity: "weight", "row", "column", "r×c" or "neuron".
        width_before: neurons or channels that the layer makes.
        width_after: the same, afterwards.
        shape_before: of the weight.
        shape_after: of the weight; differs only where neurons were removed.
        sparsity_before: share of zeros in the weight, in [0, 1].
        sparsity_after: the same, afterwards.
        parameters_before: weights that are not zero, plus the bias.
        parameters_after: the same, afterwards.
    """

    name: str
    granularity: str
    width_before: int
    width_after: int
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]
    sparsity_before: float
    sparsity_after: float
    parameters_before: int
    parameters_after: int


@dataclass
class PruneReport:
    """The answer of `prune_`; prints as a table.

    Attributes:
        layers: the layers touched, in the model's order.
        parameters_before: over the whole model: weights that are not zero in the layers touched, all others counted
            in full.
        parameters_after: the same, afterwards.
        notes: what the table cannot say, one sentence each.
    """

    layers: list[PrunedLayer]
    parameters_before: int
    parameters_after: int
    notes: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all weights of the layers touched, afterwards."""
        total = sum(_size(layer.shape_after) for layer in self.layers)
        return sum(layer.sparsity_after * _size(layer.shape_after) for layer in self.layers) / total if total else 0.0

    def table(self) -> Table:
        """One row per layer and a total; widths where neurons were removed, else sparsities."""
        narrowed = any(layer.granularity == "neuron" for layer in self.layers)
        before_after: list[str] = ["width before", "after"] if narrowed else ["sparsity before", "after"]
        rows: list[list[object]] = []
        for layer in self.layers:
            shape = _shape(layer.shape_before)
            if layer.shape_after != layer.shape_before:
                shape += f" → {_shape(layer.shape_after)}"
            figures: list[object] = [f"{layer.sparsity_before:.2%}", f"{layer.sparsity_after:.2%}"]
            if narrowed:
                figures = [layer.width_before, layer.width_after]
            name = layer.name or "(model)"
            rows.append([name, shape, layer.granularity, *figures, layer.parameters_before, layer.parameters_after])
        if rows:
            overall = "" if narrowed else f"{self.sparsity:.2%}"
            rows.append(["whole model", "", "", "", overall, self.parameters_before, self.parameters_after])
        columns = ["layer", "shape", "granularity", *before_after, "parameters", "left"]
        return Table(title="Pruned", columns=columns, rows=rows, notes=list(self.notes))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "layers": [
                {**asdict(x), "shape_before": list(x.shape_before), "shape_after": list(x.shape_after)}
                for x in self.layers
            ],
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "sparsity": self.sparsity,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return str(self.table())


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
