# SPDX-License-Identifier: Apache-2.0
"""Training with shared weights from the start: a parametrization that snaps each weight to its nearest centroid.

layer.weight ──▶ Shared.forward(original) = nearest centroid of each entry;   gradient straight to `original`
step()       ──▶ every so many steps the centroids follow the weights, by k-means
finish_()    ──▶ layers with tables and indices
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch import _select
from slimtorch.formats import Codebook, SparseCodebook
from slimtorch.formats._bits import pack_bits
from slimtorch.formats._common import matrix_shape
from slimtorch.formats.codebook import kmeans, nearest, table_count, table_of
from slimtorch.packing import LayerReport, _Member, _Unit
from slimtorch.prune.mask import _own_class, mask_of
from slimtorch.quantize.cluster import ClusteredLayer, ClusterReport, convert, plan_units, resolve
from slimtorch.quantize.kmeans import (
    ClusterConfig,
    KMeans,
    build_as,
    check_layer,
    importance_of,
    plan_format,
    weight_of,
    zeros_of,
)

LLOYD_STEPS = 5  # per update: centroids start where they were, so few are enough


class _Straight(torch.autograd.Function):
    """``quantized`` forward, exactly; the gradient goes to ``original`` as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Shared(nn.Module):
    """The parametrization of :class:`ClusterAware`: weights snap to ``centroids [tables, entries]``, ascending.

    With ``zero``, entries that are 0 (masked) stay 0.
    """

    centroids: Tensor
    tables: Tensor | None

    def __init__(
        self, centroids: Tensor, shape: tuple[int, ...], config: ClusterConfig, sparse: bool, zero: bool
    ) -> None:
        super().__init__()
        self.register_buffer("centroids", centroids)
        self.config = config
        self.sparse = sparse
        self.zero = zero or sparse
        rows, width = matrix_shape(shape)
        count = centroids.shape[0]
        tables = None
        if count > 1:
            device = centroids.device
            tables = table_of(
                torch.arange(rows, device=device)[:, None], torch.arange(width, device=device)[None], config.group_size
            ).reshape(-1)
        self.register_buffer("tables", tables, persistent=False)

    def indices(self, flat: Tensor) -> Tensor:
        """Nearest centroid of each entry of the flattened weight, int64."""
        if self.tables is None:
            return nearest(flat, self.centroids[0]).long()
        cuts = (self.centroids[:, 1:] + self.centroids[:, :-1]) / 2
        return (flat[:, None] > cuts[self.tables]).sum(1)

    def forward(self, original: Tensor) -> Tensor:
        """``original`` (masked before, where there is a mask), each entry replaced by its nearest centroid."""
        flat = original.detach().reshape(-1)
        table = 0 if self.tables is None else self.tables
        values = self.centroids[table, self.indices(flat)].to(original.dtype)
        if self.zero:
            values = torch.where(flat == 0, values.new_zeros(()), values)
        return cast(Tensor, _Straight.apply(original, values.reshape(original.shape)))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Lets ``layer.weight = tensor`` work: the latent weight becomes ``tensor``."""
        return weight

    @torch.no_grad()
    def follow(self, latent: Tensor, decay: float) -> None:
        """Move the centroids to where k-means takes them on ``latent``, ``decay`` of the way not."""
        flat = latent.detach().reshape(-1)
        for table in range(self.centroids.shape[0]):
            own = flat if self.tables is None else flat[self.tables == table]
            own = own[own != 0] if self.zero else own
            if own.numel() == 0:
                continue
            before = self.centroids[table].double()
            if isinstance(self.config, KMeans):
                moved = kmeans(own, before, LLOYD_STEPS)
            else:
                moved = self.config.centroids(own, before.numel()).expand(before.numel())
            self.centroids[table] = (decay * before + (1 - decay) * moved).to(self.centroids.dtype)

    def extra_repr(self) -> str:
        """Tables and entries."""
        return f"tables={self.centroids.shape[0]}, entries={self.centroids.shape[1]}"


class ClusterAware:
    """Trains a network whose weights share few values from the first step, with any optimizer.

        aware = slim.quantize.ClusterAware(model, slim.quantize.KMeans(bits=2), every=50)
        optimizer = torch.optim.Adam(model.parameters())
        for x, y in batches:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
            aware.step()
        print(aware.finish_())

    A layer computes with the nearest centroid of each of its float weights; the gradient passes straight through to
    the float weight (Bengio et al. 2013, 1308.3432, section 4), which is the same ``nn.Parameter`` as before. Every so
    many steps the centroids follow the weights by k-means. :meth:`finish_` leaves layers of tables and indices, as
    :func:`slimtorch.cluster_` does, whose tables can be trained further.

    Masks of :func:`slimtorch.prune_` that were there before hold on; their zeros stay zero. What the importance of the
    configuration says is used for the first centroids only.

    Args:
        model: any module, a single layer too.
        config: :class:`KMeans` or :class:`Uniform`, or a mapping from glob of layer names to one of them.
        every: steps between updates of the centroids, 1 or more.
        decay: in [0, 1): how much of the old centroids an update keeps (an exponential moving average).
        filter_fn: ``filter_fn(module, name) -> bool``.

    Raises:
        TypeError, ValueError: as :func:`slimtorch.cluster_`; a layer that shares its weight with another. The model is
            left as it was.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        config: ClusterConfig | Mapping[str, ClusterConfig | None],
        *,
        every: int = 100,
        decay: float = 0.0,
        filter_fn: _select.FilterFn | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every: expected an int, got {every!r}")
        if every < 1:
            raise ValueError(f"every: expected 1 or more, got {every}")
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"decay: expected a number in [0, 1), got {decay!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
        wanted = resolve(model, config, filter_fn)
        units, self._skipped = plan_units(model, wanted)
        configs = {id(module): value for _, module, value in wanted}
        plan: list[tuple[str, nn.Module, Shared]] = []
        for unit in units:
            name, module = unit.report.name, unit.members[0].module
            if len(unit.members) > 1:
                raise ValueError(f"model: layer {name!r} shares its weight with another: cluster it with cluster_")
            plan.append((name, module, _shared(name, module, configs[id(module)])))
        for _, module, shared in plan:
            _own_class(module)
            parametrize.register_parametrization(module, "weight", shared, unsafe=True)
        self.model = model
        self.every = every
        self.decay = float(decay)
        self.steps = 0
        self._layers = plan

    def step(self) -> bool:
        """Counts one training step; True where it updated the centroids."""
        self.steps += 1
        if self.steps % self.every:
            return False
        for _, module, shared in self._layers:
            shared.follow(_latent(module), self.decay)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What must be kept beside the model's own state, which holds the centroids: the number of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state_dict()`` was taken; ValueError where ``state`` is not such a state."""
        steps = state.get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"state: expected a dict with the number of 'steps', got {dict(state)!r}")
        self.steps = steps

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish_(self) -> ClusterReport:
        """Turns the layers into ``slimtorch.nn`` layers that compute the same, in place; the float weights are gone.

        Returns:
            As :func:`slimtorch.cluster_`. The error is that of the shared weights against the float ones.

        Raises:
            ValueError: called a second time, or a weight holds NaN; nothing is changed then.
        """
        if not self._layers and not self._skipped:
            raise ValueError("finish_: expected layers in training, got none: it was called before")
        made: list[tuple[_Unit, Codebook | SparseCodebook, ClusterConfig]] = []
        reports: dict[str, ClusteredLayer] = {layer.name: layer for layer in self._skipped}
        latents: dict[str, Tensor] = {}
        for name, module, shared in self._layers:
            latents[name] = _latent(module)
            check_layer(name, latents[name], shared.config)
            report = reports[name]
            report.zeros = zeros_of(weight_of(module))
            member = _Member.of(cast("nn.Linear | nn.Conv2d", module), [])
            unit = _Unit(LayerReport(name, report.kind, report.shape, report.zeros), (), [member])
            made.append((unit, _finished(latents[name], shared), shared.config))
        answer = convert(made, list(reports.values()))
        for (unit, held, _), layer in zip(made, answer.clustered, strict=True):
            assert layer.name == unit.report.name
            latent = latents[layer.name].double()
            layer.error = float((held.to_dense().double() - latent).norm() / latent.norm().clamp(min=1e-300))
        self._layers, self._skipped = [], []
        return answer


def _shared(name: str, module: nn.Module, config: ClusterConfig) -> Shared:
    weight = weight_of(module)
    check_layer(name, weight, config)
    sparse, zero, _ = plan_format(weight, config, mask_of(module) is not None)
    first = build_as(weight, config, sparse, zero, importance_of(config, module, name, weight))
    # Entries that no weight uses are 0 here: centroids for weights that come to lie there.
    tables = first.codebook[:, 1:] if zero else first.codebook
    return Shared(tables.sort(1).values.contiguous(), tuple(weight.shape), config, sparse, zero)


def _latent(module: nn.Module) -> Tensor:
    """The float weight that is trained, masked where there is a mask."""
    parametrizations = cast(Any, module).parametrizations.weight
    latent = cast(Tensor, parametrizations.original).detach()
    mask = mask_of(module)
    return latent if mask is None else torch.where(mask.mask, latent, latent.new_zeros(()))


def _finished(latent: Tensor, shared: Shared) -> Codebook | SparseCodebook:
    """The format that holds exactly what the layer computes with."""
    shape, config = tuple(latent.shape), shared.config
    rows, width = matrix_shape(shape)
    flat = latent.reshape(-1)
    indices = shared.indices(flat).to(torch.uint8)
    tables = shared.centroids.to(latent.dtype)
    assert tables.shape[0] == table_count(shape, config.group_size)
    if shared.sparse:
        row, column = (latent.reshape(rows, width) != 0).nonzero().unbind(1)
        kept = indices[row * width + column]
        return SparseCodebook.from_positions(tables.clone(), kept, row, column, shape, config.group_size)
    if shared.zero:
        tables = torch.cat([torch.zeros_like(tables[:, :1]), tables], dim=1)
        indices = torch.where(flat == 0, 0, indices + 1).to(torch.uint8)
    return Codebook(tables.clone(), pack_bits(indices, config.bits), shape, config.bits, config.group_size, shared.zero)
