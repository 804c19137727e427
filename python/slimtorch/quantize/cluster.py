# SPDX-License-Identifier: Apache-2.0
"""``cluster_``: the weights of a layer become indices into small tables, in place; the tables are then trained.

Linear, Conv2d ──cluster_──▶ Codebook… or SparseCodebook… layers ──your training loop──▶ better tables
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch.formats import Codebook, SparseCodebook
from slimtorch.nn import CodebookConv2d, CodebookLinear, PackedLayer, SparseCodebookConv2d, SparseCodebookLinear
from slimtorch.packing import _Unit, _units
from slimtorch.prune.mask import mask_of
from slimtorch.quantize.kmeans import (
    ClusterConfig,
    KMeans,
    Uniform,
    build,
    check_layer,
    importance_of,
    weight_of,
    zeros_of,
)
from slimtorch.report import Table, format_bytes

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, PackedLayer)


@dataclass
class ClusteredLayer:
    """What became of one layer.

    Attributes:
        name: in the model, "" for a bare layer; of layers that share one weight, the first.
        kind: "Linear", "Conv2d" or the class of a layer that was packed before.
        shape: of the dense weight.
        zeros: share of zeros in the weight, in [0, 1].
        format: "codebook", "sparse_codebook", or "" where the layer was left alone.
        method: "k-means linear", "uniform" …
        bits: of an index.
        tables: number of tables.
        error: relative, the root of sum of (clustered - dense)² over sum of dense².
        bytes_before: of the dense weight in its own dtype, without bias.
        bytes_after: of the clustered weight: tables, indices, positions.
        reason: why the layer was left alone, else "".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    zeros: float
    format: str = ""
    method: str = ""
    bits: int | None = None
    tables: int | None = None
    error: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    reason: str = ""


@dataclass
class ClusterReport:
    """The answer of :func:`cluster_`; prints as a table.

    Attributes:
        layers: the layers considered, in the model's order.
        notes: what the table cannot say, one sentence each.
    """

    layers: list[ClusteredLayer]
    notes: list[str] = field(default_factory=list)

    @property
    def clustered(self) -> list[ClusteredLayer]:
        """The layers that were converted."""
        return [layer for layer in self.layers if layer.format]

    @property
    def bytes_before(self) -> int:
        """Of the weights of the converted layers."""
        return sum(layer.bytes_before for layer in self.clustered)

    @property
    def bytes_after(self) -> int:
        """Of the same weights, clustered, in memory."""
        return sum(layer.bytes_after for layer in self.clustered)

    def table(self) -> Table:
        """One row per layer and a total."""
        rows: list[list[object]] = []
        for layer in self.layers:
            name = layer.name or "(model)"
            start: list[object] = [name, layer.shape, f"{layer.zeros:.1%}"]
            if not layer.format:
                rows.append([*start, layer.reason, None, None, None, None, None])
                continue
            sizes = [format_bytes(layer.bytes_before), format_bytes(layer.bytes_after)]
            rows.append([*start, layer.format, layer.bits, layer.tables, f"{layer.error or 0.0:.2%}", *sizes])
        if len(self.clustered) > 1:
            sizes = [format_bytes(self.bytes_before), format_bytes(self.bytes_after)]
            rows.append(["together", "", "", "", "", "", "", *sizes])
        notes = [f"{len(self.clustered)} of {len(self.layers)} layers clustered"]
        if self.clustered:
            methods = ", ".join(dict.fromkeys(layer.method for layer in self.clustered))
            notes[0] += f" ({methods}): {self.bytes_before / max(1, self.bytes_after):.1f} times smaller in memory"
        columns = ["layer", "weight", "zeros", "format", "bits", "tables", "error", "before", "after"]
        return Table("Clustered", columns, rows, [*notes, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return str(self.table())


@torch.inference_mode(False)  # tables made in inference mode could not be trained
@torch.no_grad()
def cluster_(
    model: nn.Module,
    config: ClusterConfig | Mapping[str, ClusterConfig | None],
    *,
    filter_fn: _select.FilterFn | None = None,
) -> ClusterReport:
    """Cluster the weights of ``nn.Linear`` and ``nn.Conv2d`` layers in place (Han et al. 2016, 1510.00149, section 3).

    Each layer becomes a ``slimtorch.nn`` layer with shared weights: the module object stays, its class and parameters
    change. What is trained from then on are its tables, ``layer.codebook``: the gradient of an entry is the sum over
    the weights that share it. **Optimizers made before hold the old weights: make a new one.**

    Zeros of :func:`slimtorch.prune_` stay zero for ever, whatever the optimizer does; masks are taken away, since the
    format holds the zeros. Where it takes fewer bytes, only the weights that are not zero are stored, with positions.
    A weight without a mask counts as pruned where more than an eighth of it is zero.

    Bias, hooks and training flags stay. Layers that share one weight share one table afterwards. Layers that are
    packed already, or cannot be converted, are left alone; the report says why.

    Args:
        model: any module, a single layer too.
        config: :class:`~slimtorch.quantize.KMeans` or :class:`~slimtorch.quantize.Uniform`, or a mapping from glob of
            layer names to one of them: the first glob that matches wins, None leaves a layer alone.
            :func:`slimtorch.quantize.choose_bits` makes such a mapping.
        filter_fn: ``filter_fn(module, name) -> bool``; layers for which it is false are left alone.

    Returns:
        What was done, per layer; prints as a table.

    Raises:
        TypeError: ``model`` is no module, or ``config`` of another kind.
        ValueError: weights that are not finite, a group larger than a row, an importance that does not fit, layers of
            one weight with different configurations, a glob that matches nothing. The model is left as it was.
    """
    wanted = resolve(model, config, filter_fn)
    units, reports = plan_units(model, wanted)
    configs = {id(module): value for _, module, value in wanted}
    names = {id(module): name for name, module, _ in wanted}
    made: list[tuple[_Unit, Codebook | SparseCodebook, ClusterConfig]] = []
    for unit in units:
        first = unit.members[0]
        own = configs[id(first.module)]
        for member in unit.members[1:]:
            if configs[id(member.module)] != own:
                raise ValueError(
                    f"config: layers {unit.report.name!r} and {names[id(member.module)]!r} share one weight; "
                    "expected one configuration for both"
                )
        weight = first.twin.weight.detach()
        check_layer(unit.report.name, weight, own)
        importance = importance_of(own, first.module, unit.report.name, weight)
        made.append((unit, build(weight, own, masked=mask_of(first.module) is not None, importance=importance), own))
    return convert(made, reports)


def resolve(
    model: nn.Module, config: ClusterConfig | Mapping[str, ClusterConfig | None], filter_fn: _select.FilterFn | None
) -> list[tuple[str, nn.Module, ClusterConfig]]:
    """The layers to touch with their configurations; checks the kinds."""
    if isinstance(config, Mapping) and not config:
        raise ValueError("config: expected at least one glob, got an empty mapping")
    for value in config.values() if isinstance(config, Mapping) else [config]:
        if value is not None and not isinstance(value, (KMeans, Uniform)):
            raise TypeError(f"config: expected KMeans, Uniform or a mapping of globs to them, got {value!r}")
    return _select.resolve(model, config, filter_fn, types=LAYERS)


def plan_units(
    model: nn.Module, wanted: Sequence[tuple[str, nn.Module, ClusterConfig]]
) -> tuple[list[_Unit], list[ClusteredLayer]]:
    """The layers that can be converted, those of one weight together; and a report of every layer, in order."""
    dense = [(name, module, ()) for name, module, _ in wanted if not isinstance(module, PackedLayer)]
    for name, module, _ in dense:
        if weight_of(module).is_meta:
            raise ValueError(f"model: layer {name!r}: its weight is on the meta device: there is nothing to cluster")
    units, reports = _units(model, dense, {id(module): [] for _, module, _ in dense})
    known = {report.name: report for report in reports}
    layers: list[ClusteredLayer] = []
    for name, module, _ in wanted:
        if isinstance(module, PackedLayer):
            kind = type(module).__name__
            weight = module.weight.detach()
            layers.append(
                ClusteredLayer(name, kind, tuple(weight.shape), zeros_of(weight), reason=f"is a {kind} already")
            )
        elif name in known:
            found = known[name]
            layers.append(ClusteredLayer(name, found.kind, found.shape, found.sparsity, reason=found.reason))
    return units, layers


def convert(
    made: Sequence[tuple[_Unit, Codebook | SparseCodebook, ClusterConfig]], layers: list[ClusteredLayer]
) -> ClusterReport:
    """Turn the modules into layers of their new formats, all of them, and complete the report."""
    known = {layer.name: layer for layer in layers}
    for unit, held, config in made:
        dense = unit.members[0].twin.weight.detach()
        layer = known[unit.report.name]
        layer.format = "codebook" if isinstance(held, Codebook) else "sparse_codebook"
        layer.method, layer.bits = config.describe(), config.bits
        layer.tables = int(held.codebook.shape[0])
        layer.error = relative_error(held.to_dense(), dense)
        layer.bytes_before = dense.numel() * dense.element_size()
        layer.bytes_after = held.nbytes
        packed = [_layer_of(member.twin, held) for member in unit.members]
        for twin in packed[1:]:
            setattr(twin, twin.VALUES, getattr(packed[0], packed[0].VALUES))
        for member, twin in zip(unit.members, packed, strict=True):
            member.pack(twin)
    for unit, _, _ in made:
        for member in unit.members:
            member.show("packed")
    notes = []
    if not layers:
        notes.append("no Linear or Conv2d layer to cluster: the model is as it was")
    elif made:
        notes.append("optimizers made before hold the old weights: make a new one to train the tables")
    return ClusterReport(layers, notes)


def _layer_of(twin: nn.Linear | nn.Conv2d, held: Codebook | SparseCodebook) -> PackedLayer:
    if isinstance(twin, nn.Linear):
        if isinstance(held, Codebook):
            return CodebookLinear.from_format(twin, held)
        return SparseCodebookLinear.from_format(twin, held)
    if isinstance(held, Codebook):
        return CodebookConv2d.from_format(twin, held)
    return SparseCodebookConv2d.from_format(twin, held)


def relative_error(clustered: Tensor, dense: Tensor) -> float:
    """Root of the sum of squared differences over that of squared weights; 0 where both are 0."""
    gap = float((clustered.detach().double() - dense.detach().double()).norm())
    return gap / max(float(dense.detach().double().norm()), 1e-300) if gap else 0.0
