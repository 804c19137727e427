# SPDX-License-Identifier: Apache-2.0
"""Network slimming: batch-norm scales are trained towards zero, and what they scale is removed.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017 (1708.06519), section 3:

    loss = task + λ · Σ|γ|          γ every scale of a batch norm; subgradient λ · sign(γ), as the paper's

    penalty = slim.prune.SlimmingPenalty(model, 1e-4)
    (task + penalty()).backward()                            # at every step of an ordinary training run
    channels = slim.prune.Neurons(0.5, "batchnorm", scope="global", normalize=False)     # one threshold over all layers
    slim.prune_(model, channels, example_inputs=x)           # then fine-tune

A scale and the weights of the layer before it can trade size, so that the penalty wants a run with weight decay, or a
learning rate that moves the scales: `report()` says how far it has come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch.report import Table

_NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,)


def check_strength(name: str, value: object) -> None:
    """TypeError for what is no number, ValueError for what is not finite and above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number above 0, got {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


@dataclass(frozen=True)
class SlimmedLayer:
    """The scales of one batch norm: how many there are, how many are below the threshold, |γ| at its median."""

    name: str
    scales: int
    small: int
    median: float


@dataclass
class SlimmingReport:
    """Where the scales are; prints as a table.

    Attributes:
        layers: in the model's order.
        threshold: below it a scale counts as small.
        penalty: the value of the loss term.
    """

    layers: list[SlimmedLayer]
    threshold: float
    penalty: float

    def table(self) -> Table:
        """One row per layer and a total."""
        rows: list[list[object]] = [[x.name or "(model)", x.scales, x.small, x.median] for x in self.layers]
        rows.append(["whole model", sum(x.scales for x in self.layers), sum(x.small for x in self.layers), None])
        columns = ["layer", "channels", f"|γ| < {self.threshold:g}", "median |γ|"]
        return Table("Batch-norm scales", columns, rows, [f"penalty {self.penalty:.4g}"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"layers": [asdict(x) for x in self.layers], "threshold": self.threshold, "penalty": self.penalty}

    def __str__(self) -> str:
        return str(self.table())


class SlimmingPenalty:
    """The loss term of network slimming: strength · Σ|γ| over the scales of batch norms.

    The layers are found once, at construction; the model may move to another device or be pruned later.

    Args:
        model: any module with batch norms.
        strength: λ, above 0 (the paper: 1e-4 for VGG, 1e-5 for ResNet and DenseNet); or a mapping from glob of names of
            batch norms to λ, where the first glob that matches wins and None leaves a layer out.
        filter_fn: `filter_fn(module, name) -> bool`; batch norms for which it is false are left out.

    Raises:
        TypeError, ValueError: a strength out of its range, a glob that matches nothing, or no batch norm with a scale.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float | Mapping[str, float | None] = 1e-4,
        *,
        filter_fn: _select.FilterFn | None = None,
    ) -> None:
        for value in strength.values() if isinstance(strength, Mapping) else [strength]:
            if value is not None:
                check_strength("strength", value)
        chosen = _select.resolve(model, strength, filter_fn, types=_NORMS)
        self._layers = [(name, layer, float(value)) for name, layer, value in chosen if layer.weight is not None]
        if not self._layers:
            raise ValueError("model: expected batch norms with scales (affine=True) to penalise, got none")

    @property
    def layers(self) -> list[str]:
        """The names of the batch norms penalised, in the model's order."""
        return [name for name, _, _ in self._layers]

    def __call__(self) -> Tensor:
        """The penalty: a scalar with a graph, to be added to the loss. ValueError where it is not finite."""
        terms = [cast(Tensor, layer.weight).abs().sum() * strength for _, layer, strength in self._layers]
        total = torch.stack([term.to(terms[0]) for term in terms]).sum()
        if not math.isfinite(float(total.detach())):
            bad = [name for (name, _, _), term in zip(self._layers, terms, strict=True) if not bool(term.isfinite())]
            raise ValueError(f"model: the scales of batch norm {bad[0]!r} are no longer finite" if bad else
                             "model: the sum of all batch-norm scales is no longer finite")  # fmt: skip
        return total

    @torch.no_grad()
    def report(self, threshold: float = 1e-2) -> SlimmingReport:
        """How many scales are below `threshold` (>= 0) in absolute value, per layer."""
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold: expected a number >= 0, got {threshold!r}")
        if not threshold >= 0:
            raise ValueError(f"threshold: expected a number >= 0, got {threshold!r}")
        layers = []
        for name, layer, _ in self._layers:
            scales = cast(Tensor, layer.weight).abs()
            small = int((scales < threshold).sum())
            layers.append(SlimmedLayer(name, scales.numel(), small, float(scales.float().median())))
        return SlimmingReport(layers, float(threshold), float(self()))
