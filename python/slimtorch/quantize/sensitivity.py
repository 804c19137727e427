# SPDX-License-Identifier: Apache-2.0
"""How many bits each layer needs, and which weights matter.

each layer, each bit width, alone ──▶ loss of the model ──▶ least sum of losses added that the budget allows
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch._budget import least_loss
from slimtorch._evaluate import Loss, Measure, finite, number_of
from slimtorch.measure import eval_mode
from slimtorch.packing import _Unit
from slimtorch.prune.mask import mask_of
from slimtorch.quantize.cluster import plan_units, resolve
from slimtorch.quantize.kmeans import (
    ClusterConfig,
    KMeans,
    Uniform,
    build,
    check_layer,
    importance_of,
    plan_format,
    weight_of,
)
from slimtorch.report import Table, format_bytes


def fisher(model: nn.Module, data: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """The mean squared gradient of each weight of the Linear and Conv2d layers: an ``importance`` for :class:`KMeans`.

    The increase of the loss when a weight moves by d is about d² times this (the diagonal of the empirical Fisher
    information), so that weighted k-means puts centroids where moving weights costs. Batches of one give the Fisher
    information itself; larger ones average the gradient first and rank weights much alike, in less time.

    Args:
        model: run in ``eval()``; its gradients are as before afterwards.
        data: an iterable of ``inputs`` or ``(inputs, *targets)``.
        loss: called as ``loss(outputs, *targets)``, gives a scalar.

    Returns:
        Layer name -> tensor of the weight's shape, not negative. Masked weights have 0.

    Raises:
        ValueError: no data, or no layer with a weight to train.
    """
    layers = [
        (name, module)
        for name, module in _select.candidates(model, (nn.Linear, nn.Conv2d))
        if isinstance(weight := _trained(module), Tensor) and weight.requires_grad
    ]
    if not layers:
        raise ValueError("model: expected a Linear or Conv2d layer with a weight that is trained, got none")
    weights = [_trained(module) for _, module in layers]
    totals = [torch.zeros_like(weight) for weight in weights]
    batches = 0
    with eval_mode(model), torch.enable_grad():
        for batch in data:
            inputs, *targets = batch if isinstance(batch, (tuple, list)) else (batch,)
            gradients = torch.autograd.grad(loss(model(inputs), *targets), weights, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient.square()
            batches += 1
    if not batches:
        raise ValueError("data: expected at least one batch, got none")
    return {name: total / batches for (name, _), total in zip(layers, totals, strict=True)}


def _trained(module: nn.Module) -> Tensor:
    """The parameter behind the layer's weight."""
    if mask_of(module) is not None:
        return cast(Tensor, cast(Any, module).parametrizations.weight.original)
    return cast(Tensor, module.weight)


# --- mixed bits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerBits:
    """One layer of :class:`BitChoice`.

    Attributes:
        name: in the model.
        shape: of the weight.
        bits: chosen.
        nbytes: of the clustered weight, by candidate.
        losses: of the model with only this layer clustered, by candidate.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    nbytes: dict[int, int]
    losses: dict[int, float]


class BitChoice(dict[str, ClusterConfig | None]):
    """A configuration for :func:`slimtorch.cluster_`, layer by layer; prints as a table.

    Attributes:
        layers: what was measured, in the model's order.
        budget_bytes: that was to be kept.
        loss: of the model as it came.
    """

    def __init__(
        self, configs: dict[str, ClusterConfig | None], layers: list[LayerBits], budget_bytes: float, loss: float
    ) -> None:
        super().__init__(configs)
        self.layers = layers
        self.budget_bytes = budget_bytes
        self.loss = loss

    @property
    def nbytes(self) -> int:
        """Of the weights with the bits chosen."""
        return sum(layer.nbytes[layer.bits] for layer in self.layers)

    def table(self) -> Table:
        """One row per layer: loss added by each bit width alone, the bits chosen, their bytes."""
        widths = sorted({bits for layer in self.layers for bits in layer.losses})
        rows: list[list[object]] = []
        for layer in self.layers:
            added = [f"{layer.losses[b] - self.loss:.1e}" if b in layer.losses else None for b in widths]
            rows.append(
                [layer.name or "(model)", layer.shape, *added, layer.bits, format_bytes(layer.nbytes[layer.bits])]
            )
        notes = [
            f"loss {self.loss:.4g} before; columns: what clustering a layer alone adds to it",
            f"{format_bytes(self.nbytes)} of the {format_bytes(self.budget_bytes)} that were allowed",
        ]
        return Table(
            "Bits by sensitivity", ["layer", "weight", *(f"{b} bit" for b in widths), "chosen", "bytes"], rows, notes
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layers = [
            {"name": x.name, "shape": list(x.shape), "bits": x.bits, "nbytes": x.nbytes[x.bits], "losses": x.losses}
            for x in self.layers
        ]
        return {"layers": layers, "budget_bytes": self.budget_bytes, "nbytes": self.nbytes, "loss": self.loss}

    def __str__(self) -> str:
        return str(self.table())


def choose_bits(
    model: nn.Module,
    measure: Measure,
    *,
    budget_bytes: int | None = None,
    ratio: float | None = None,
    config: ClusterConfig | None = None,
    candidates: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    filter_fn: _select.FilterFn | None = None,
) -> BitChoice:
    """Bits for each layer, so that all weights together fit a budget and the loss grows as little as possible.

    Each layer is clustered alone with each number of bits, and the loss of the model measured. What layers add to the
    loss is taken to add up; dynamic programming over the layers then finds the least sum within the budget.

    Args:
        model: with Linear and Conv2d layers; it is as before afterwards. Masks are respected.
        measure: ``measure(model) -> loss``, or ``(data, loss_fn)`` with batches ``(inputs, *targets)`` that are read
            once for every measurement, and ``loss_fn(outputs, *targets)``, averaged over batches in ``eval()``.
        budget_bytes: of all clustered weights in memory: tables, indices and positions, without biases.
        ratio: instead: how many times smaller than the dense weights in their own dtype, at least.
        config: how to cluster; its bits are not used. None: ``KMeans()``.
        candidates: bits to choose from, each in 1 … 8.
        filter_fn: ``filter_fn(module, name) -> bool``; layers for which it is false are neither clustered nor counted.

    Returns:
        A mapping from layer name to configuration, for :func:`slimtorch.cluster_`; prints as a table.

    Raises:
        TypeError: ``measure`` or ``config`` of the wrong kind.
        ValueError: not exactly one of ``budget_bytes`` and ``ratio``; a budget that even the fewest bits exceed; a loss
            that is not finite; candidates out of range; a model without layers to cluster.
    """
    if (budget_bytes is None) == (ratio is None):
        raise ValueError("budget_bytes, ratio: expected exactly one of them")
    for label, value in (("budget_bytes", budget_bytes), ("ratio", ratio)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{label}: expected a number, got {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{label}: expected a number above 0, got {value!r}")
    own = KMeans() if config is None else config
    if not isinstance(own, (KMeans, Uniform)):
        raise TypeError(f"config: expected KMeans or Uniform, got {own!r}")
    if isinstance(candidates, (str, int)) or len(candidates) == 0:
        raise ValueError(f"candidates: expected at least one number of bits, got {candidates!r}")
    variants = {bits: replace(own, bits=bits) for bits in sorted(set(candidates), reverse=True)}
    loss_of = number_of(measure)
    wanted = resolve(model, own, filter_fn)
    units, _ = plan_units(model, wanted)
    if not units:
        raise ValueError("model: expected a Linear or Conv2d layer that can be clustered, got none")

    base = finite(loss_of(model), "of the model as it is")
    sizes: list[dict[int, int]] = []
    losses: list[dict[int, float]] = []
    for unit in units:
        module, name = unit.members[0].module, unit.report.name
        weight = weight_of(module).clone()
        check_layer(name, weight, own)
        masked = mask_of(module) is not None
        importance = importance_of(own, module, name, weight)
        sizes.append({bits: plan_format(weight, variant, masked)[2] for bits, variant in variants.items()})
        losses.append({})
        for bits, variant in variants.items():
            with torch.no_grad():
                clustered = build(weight, variant, masked=masked, importance=importance).to_dense()
            with _in_place_of(unit, clustered):
                losses[-1][bits] = finite(loss_of(model), f"with layer {name!r} at {bits} bits")
    if budget_bytes is None:
        assert ratio is not None
        budget = sum(weight_of(u.members[0].module).numel() * u.members[0].twin.weight.element_size() for u in units)
        allowed = budget / ratio
    else:
        allowed = float(budget_bytes)
    chosen = fit_budget(sizes, losses, allowed)
    layers = [
        LayerBits(unit.report.name, unit.report.shape, bits, size, loss)
        for unit, bits, size, loss in zip(units, chosen, sizes, losses, strict=True)
    ]
    by_module = {
        id(member.module): variants[bits] for unit, bits in zip(units, chosen, strict=True) for member in unit.members
    }
    configs: dict[str, ClusterConfig | None] = {
        _select.literal(name): by_module[id(module)] for name, module, _ in wanted if id(module) in by_module
    }
    return BitChoice(configs, layers, allowed, base)


def fit_budget(sizes: Sequence[dict[int, int]], losses: Sequence[dict[int, float]], allowed: float) -> list[int]:
    """The bits of each layer: the least sum of losses whose sum of sizes is allowed."""
    least = sum(min(size.values()) for size in sizes)
    if least > allowed:
        raise ValueError(f"budget: expected at least {least} bytes, what the fewest bits take, got {allowed:.0f}")
    chosen = least_loss(
        [list(size.values()) for size in sizes],
        [[loss[bits] for bits in size] for size, loss in zip(sizes, losses, strict=True)],
        allowed,
    )
    return [list(size)[index] for size, index in zip(sizes, chosen, strict=True)]


@contextmanager
def _in_place_of(unit: _Unit, weight: Tensor) -> Iterator[None]:
    """The layers of ``unit`` compute with ``weight`` inside the ``with``."""
    held = _trained(unit.members[0].module)
    before = held.detach().clone()
    with torch.no_grad():
        held.copy_(weight)
    try:
        yield
    finally:
        with torch.no_grad():
            held.copy_(before)
