# SPDX-License-Identifier: Apache-2.0
"""Structured sparsity learning: whole groups of weights are trained to zero, then removed or masked.

Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016 (1608.03665), equations 1 to 4, with the factor
√p of Yuan & Lin (2006) for groups of p weights, so that one strength serves groups of all sizes:

    loss = task + Σ over groups g of  strength · √p · ‖w_g‖₂

The groups are blocks of the weight matrix [out, in/groups · kh · kw]:

    filters  one row, with its bias      ──remove_──▶  a narrower dense network
    channels the kh·kw columns of one input channel ──remove_──▶  the same, from the reader's side
    shapes   one column                  ──mask_──▶    masks, for pack_
    (r, c)   a block                     ──mask_──▶    masks that pack_ stores as block-sparse
    depth    a whole layer or branch     ──remove_──▶  a residual branch becomes its shortcut

The gradient of ‖w_g‖ makes groups small, never zero: the step jumps over zero and back. The proximal step does,

    w_g ← w_g · max(0, 1 - learning rate · strength · √p / ‖w_g‖)

which is exactly what minimises the penalty beside a step of gradient descent (Parikh & Boyd, "Proximal Algorithms",
2014, section 6.5.1). Use one of the two, not both: `loss = task + penalty()`, or `loss = task` and after each
`optimizer.step()` a `penalty.proximal_(learning_rate)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch.prune.importance import Evidence, Group, _trained, call, usable
from slimtorch.prune.magnitude import check_weight, expand_groups, group_means
from slimtorch.prune.mask import MASKABLE, install, mask_of, nonzeros, unmasked_weight
from slimtorch.prune.neurons import Neurons, _copy, _tensors, remove_neurons_
from slimtorch.prune.report import PrunedLayer, PruneReport
from slimtorch.prune.slimming import check_strength
from slimtorch.report import Table

Groups = Literal["filters", "channels", "shapes", "depth"] | tuple[int, int]
_NAMES = ("filters", "channels", "shapes", "depth")


@dataclass(frozen=True)
class GroupLayer:
    """The groups of one layer, or of one branch of several layers.

    Attributes:
        name: of the layer or branch.
        groups: "filters", "channels", "shapes", "depth" or "r×c".
        shape: of the weight; of the first layer of a branch.
        count: groups.
        zero: those with no weight left (or below the threshold asked for).
        smallest: root mean square of the smallest group that is not among those, NaN where none is left.
        median: of all groups.
    """

    name: str
    groups: str
    shape: tuple[int, ...]
    count: int
    zero: int
    smallest: float
    median: float


@dataclass
class GroupReport:
    """Where the groups are; prints as a table.

    Attributes:
        layers: in the model's order.
        threshold: root mean square up to which a group counts as zero.
        penalty: the value of the loss term.
    """

    layers: list[GroupLayer]
    threshold: float
    penalty: float
    notes: list[str] = field(default_factory=list)

    @property
    def zero(self) -> float:
        """Share of groups that are zero, in [0, 1]."""
        total = sum(layer.count for layer in self.layers)
        return sum(layer.zero for layer in self.layers) / total if total else 0.0

    def table(self) -> Table:
        """One row per layer and a total."""
        rows: list[list[object]] = [
            [x.name or "(model)", x.shape, x.groups, x.count, x.zero, x.smallest, x.median] for x in self.layers
        ]
        counts: list[object] = [sum(x.count for x in self.layers), sum(x.zero for x in self.layers)]
        rows.append(["whole model", None, "", *counts, None, None])
        columns = ["layer", "shape", "groups", "count", "zero", "smallest other", "median"]
        notes = [f"penalty {self.penalty:.4g}; sizes of groups are root mean squares of their weights", *self.notes]
        return Table("Groups", columns, rows, notes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; no number where there is none."""
        layers = [{**asdict(x), "shape": list(x.shape)} for x in self.layers]
        for layer in layers:
            layer["smallest"] = layer["smallest"] if math.isfinite(layer["smallest"]) else None
        return {"layers": layers, "threshold": self.threshold, "penalty": self.penalty, "zero": self.zero}

    def __str__(self) -> str:
        return str(self.table())


@dataclass
class _Unit:
    """Layers whose groups are counted together: one layer, or all of a branch, which then is one group."""

    name: str
    layers: dict[str, nn.Module]
    strength: float
    groups: Groups

    def describe(self) -> str:
        return self.groups if isinstance(self.groups, str) else "{}×{}".format(*self.groups)

    def block(self, layer: nn.Module) -> tuple[int, int]:
        """The size of a group in the weight matrix of a layer."""
        if isinstance(self.groups, tuple):
            return self.groups
        shape = unmasked_weight(layer).shape
        rows, columns = shape[0], math.prod(shape[1:])
        if self.groups == "channels":  # a grouped convolution: other rows read other channels
            return rows // int(getattr(layer, "groups", 1)), math.prod(shape[2:])
        return {"filters": (1, columns), "shapes": (rows, 1), "depth": (rows, columns)}[self.groups]

    def bias(self, layer: nn.Module) -> Tensor | None:
        """The bias that belongs to the groups: without it, a row of zeros would still say something."""
        return cast("Tensor | None", layer.bias) if self.groups in ("filters", "depth") else None

    def squares(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sums of squares of the groups and their sizes, both flat [groups], from the layers' weights and biases."""
        totals, sizes = [], []
        for name, layer in self.layers.items():
            weight = weights[name].flatten(1)
            shape, block = (weight.shape[0], weight.shape[1]), self.block(layer)
            size = _sizes(shape, block).to(weight)
            total = group_means(weight.square(), block) * size
            bias = self.bias(layer)
            if bias is not None:
                own = bias.square()
                total = total + (own if self.groups == "filters" else own.sum()).reshape(-1, 1)
                size = size + (1 if self.groups == "filters" else bias.numel())
            totals.append(total.flatten())
            sizes.append(size.flatten())
        if len(totals) == 1:
            return totals[0], sizes[0]
        return torch.stack([t.to(totals[0]) for t in totals]).sum(0), torch.stack(sizes).sum(0)

    @torch.no_grad()
    def rms(self) -> Tensor:
        """Root mean square of each group, flat."""
        squares, sizes = self.squares(
            {name: cast(Tensor, layer.weight) for name, layer in self.layers.items()}
        )
        return (squares / sizes).sqrt()

    def spread(self, layer: nn.Module, values: Tensor) -> Tensor:
        """One value per group, spread over the layer's weight."""
        weight = unmasked_weight(layer)
        shape = (weight.shape[0], math.prod(weight.shape[1:]))
        return expand_groups(values, shape, self.block(layer)).reshape(weight.shape)


class GroupLasso:
    """The penalty of structured sparsity learning on the Linear and Conv2d layers of a model.

        penalty = slim.prune.GroupLasso(model, 1e-4, "filters", filter_fn=lambda layer, name: name != "fc3")
        ...
        optimizer.step()
        penalty.proximal_(optimizer.param_groups[0]["lr"])      # or: (task + penalty()).backward()
        ...
        print(penalty.report())
        penalty.remove_(example_inputs)                         # or: penalty.mask_(); slim.pack_(model, ...)

    The layers are found once, at construction. Several penalties with other groups may act on one model: filters and
    shapes together are the paper's.

    Args:
        model: any module, or a single layer.
        strength: λ per group, finite and above 0; times the learning rate it is the root mean square that a proximal
            step takes off every group. Or a mapping from glob of names to strength: the first glob that matches wins,
            None leaves a layer out.
        groups: "filters", "channels", "shapes", "depth" or a block (r, c), as the module's text draws them; or a
            mapping from glob of names to these.
        branches: for "depth": name → globs of layers that are one group together (the layers of a residual branch).
            The layers in none of them are groups of their own. The first layer's strength holds.
        filter_fn: `filter_fn(module, name) -> bool`; layers for which it is false are left out. Leave the output layer
            out under "filters": its rows are the classes.

    Raises:
        TypeError, ValueError: a strength or group out of its range, a glob that matches nothing, no layer selected, or
            a weight with a parametrization beside its mask.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float | Mapping[str, float | None],
        groups: Groups | Mapping[str, Groups | None] = "filters",
        *,
        branches: Mapping[str, str | Sequence[str]] | None = None,
        filter_fn: _select.FilterFn | None = None,
    ) -> None:
        for value in strength.values() if isinstance(strength, Mapping) else [strength]:
            if value is not None:
                check_strength("strength", value)
        kind_of: Groups | dict[str, Groups | None]
        if isinstance(groups, Mapping):
            kind_of = {glob: None if value is None else _checked(value) for glob, value in groups.items()}
        else:
            kind_of = _checked(groups)
        strengths = _select.resolve(model, strength, filter_fn, types=MASKABLE)
        kind_by_layer = _select.resolve(model, kind_of, filter_fn, types=MASKABLE)
        kinds = {name: cast(Groups, kind) for name, _, kind in kind_by_layer}
        chosen = [(name, layer, float(value), kinds[name]) for name, layer, value in strengths if name in kinds]
        if not chosen:
            raise ValueError("model: no Linear or Conv2d layer was selected, expected at least one")
        for name, layer, _, _ in chosen:
            check_weight(name, layer)
            _trained(layer, name)
        self.model = model
        self._units = [_Unit(name, {name: layer}, value, kind) for name, layer, value, kind in chosen]
        if branches is not None:
            self._units = _merged(self._units, branches)

    # --- in training --------------------------------------------------------------------------------------------------

    def __call__(self) -> Tensor:
        """The penalty, a scalar with a graph; the gradient of a group that is zero is zero. ValueError where it is not
        finite."""
        terms = []
        for unit in self._units:
            squares, sizes = unit.squares({name: cast(Tensor, layer.weight) for name, layer in unit.layers.items()})
            positive = squares != 0  # NaN too; the root of 0 has no gradient
            terms.append(unit.strength * (sizes[positive] * squares[positive]).sqrt().sum())
        if not terms:
            return torch.zeros(())  # all of them have been removed
        total = torch.stack([term.to(terms[0]) for term in terms]).sum()
        if not math.isfinite(float(total.detach())):
            names = [u.name for u, term in zip(self._units, terms, strict=True) if not bool(term.isfinite())]
            where = f"of {names[0]!r}" if names else "of all layers together"
            raise ValueError(f"model: the penalty {where} is {float(total.detach())}, expected a finite number")
        return total

    @torch.no_grad()
    def proximal_(self, learning_rate: float) -> None:
        """Shrinks every group, after `optimizer.step()`: those smaller than the step become exactly zero.

        Args:
            learning_rate: of the step just made, finite and above 0. (With Adam, whose steps have another metric, it
                still is a shrinkage by learning rate times strength.)

        Raises:
            ValueError: a weight is not finite. No layer is changed then.
        """
        check_strength("learning_rate", learning_rate)
        factors = []
        for unit in self._units:
            squares, sizes = unit.squares({name: cast(Tensor, layer.weight) for name, layer in unit.layers.items()})
            if not bool(squares.isfinite().all()):
                raise ValueError(f"model: the weights of {unit.name!r} are no longer finite")
            step = learning_rate * unit.strength * sizes.sqrt()
            norms = squares.sqrt()
            factors.append(torch.where(norms > step, 1 - step / norms, 0))
        for unit, factor in zip(self._units, factors, strict=True):
            for layer in unit.layers.values():
                weight, bias = unmasked_weight(layer), unit.bias(layer)
                weight.mul_(unit.spread(layer, factor))
                if bias is not None:
                    bias.mul_(factor)

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def report(self, threshold: float = 0.0) -> GroupReport:
        """How many groups are zero, layer by layer; `threshold` (>= 0, root mean square) counts small ones too."""
        _check_threshold(threshold)
        layers = []
        for unit in self._units:
            rms = unit.rms().double()
            zero = rms <= threshold
            left = rms[~zero]
            shape = tuple(unmasked_weight(next(iter(unit.layers.values()))).shape)
            smallest = float(left.min()) if left.numel() else math.nan
            count, median = rms.numel(), float(rms.median()) if rms.numel() else math.nan
            layers.append(GroupLayer(unit.name, unit.describe(), shape, count, int(zero.sum()), smallest, median))
        with torch.no_grad():
            return GroupReport(layers, float(threshold), float(self()))

    @torch.no_grad()
    def mask_(self, threshold: float = 0.0) -> PruneReport:
        """Masks the groups up to `threshold`, in place, so that they stay zero while the rest is fine-tuned and
        `slimtorch.pack_` can leave them out. A bias keeps its value.

        Args:
            threshold: root mean square of a group, >= 0; 0 takes exact zeros only.

        Raises:
            ValueError: a layer would lose all its weights, or the groups are "depth" (see `remove_`). The model is left
                as it was.
        """
        _check_threshold(threshold)
        plan = []
        for unit in self._units:
            if unit.groups == "depth":
                raise ValueError(f"groups: 'depth' ({unit.name!r}) is for remove_(), a mask would leave a layer empty")
            ((name, layer),) = unit.layers.items()
            keep = unit.spread(layer, unit.rms() > threshold).contiguous()
            present = mask_of(layer)
            keep = keep if present is None else keep & present.mask
            if keep.numel() and not bool(keep.any()):
                raise ValueError(f"threshold: {threshold:g} would leave layer {name!r} without weights, {_LESS}")
            plan.append((name, layer, keep, unit.describe()))
        report = PruneReport([], 0, 0)
        before = {name: _counted(layer) for name, layer, _, _ in plan}
        install([(layer, keep) for _, layer, keep, _ in plan])
        for name, layer, _, groups in plan:
            (shape, sparsity, parameters), (_, after, left) = before[name], _counted(layer)
            rows = shape[0]
            layers = PrunedLayer(name, groups, rows, rows, shape, shape, sparsity, after, parameters, left)
            report.layers.append(layers)
        total = sum(p.numel() for p in self.model.parameters())
        rest = total - sum(p.numel() for _, layer, _, _ in plan for p in layer.parameters())
        report.parameters_before = rest + sum(x.parameters_before for x in report.layers)
        report.parameters_after = rest + sum(x.parameters_after for x in report.layers)
        return report

    def remove_(self, example_inputs: Any, threshold: float = 0.0) -> PruneReport:
        """Removes the groups up to `threshold`, in place: the network becomes narrower ("filters", "channels") or
        shallower ("depth") and stays dense.

        A filter goes where the row and bias of every layer that makes it are zero, a channel where every layer that
        reads it ignores it; what is tied together by a residual connection goes together or stays. Removing channels
        of zeros changes no output. Removing filters of zeros does not either unless a batch norm behind them adds its
        shift; the last note of the report says how far the outputs moved.

        A layer or branch of zeros ("depth") and the norms and layers on the same branch go where a shortcut leads
        around them; what is left of the branch is the number 0, added to the shortcut.

        Args:
            example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            threshold: root mean square of a group, >= 0; 0 takes exact zeros only.

        Raises:
            ValueError: a layer would lose everything, a layer of zeros has no shortcut around it, groups that can only
                be masked, or what `slimtorch.prune.Neurons` refuses. The model is left as it was.
        """
        _check_threshold(threshold)
        kinds = {unit.groups for unit in self._units}
        if len(kinds) > 1 or not kinds <= {"filters", "channels", "depth"}:
            found = ", ".join(sorted({unit.describe() for unit in self._units}))
            raise ValueError(
                f"groups: remove_() takes 'filters', 'channels' or 'depth', one kind at a time, got {found}; "
                "shapes and blocks become zeros inside a matrix, which mask_() and slimtorch.pack_() are for"
            )
        before = _outputs(self.model, example_inputs)
        if kinds == {"depth"}:
            report = self._remove_depth(example_inputs, threshold)
        else:
            report = self._remove_neurons(example_inputs, threshold, readers=kinds == {"channels"})
        moved, scale = _distance(before, _outputs(self.model, example_inputs))
        report.notes.append(f"Outputs on example_inputs moved by {moved:.3g} at most (they reach {scale:.3g}).")
        return report

    def _remove_neurons(self, example_inputs: Any, threshold: float, readers: bool) -> PruneReport:
        for unit in self._units:
            rms = unit.rms()
            if rms.numel() and bool((rms <= threshold).all()):
                raise ValueError(
                    f"threshold: {threshold:g} would leave layer {unit.name!r} without {unit.describe()}, {_LESS}"
                )
        config = Neurons(0, _LargestGroup(readers), threshold=threshold)
        names = {name for unit in self._units for name in unit.layers}
        if readers:  # the makers of a channel are layers before those selected
            return remove_neurons_(self.model, config, example_inputs=example_inputs)
        return remove_neurons_(
            self.model, config, example_inputs=example_inputs, filter_fn=lambda _, name: name in names
        )

    def _remove_depth(self, example_inputs: Any, threshold: float) -> PruneReport:
        dead = [name for u in self._units if bool((u.rms() <= threshold).all()) for name in u.layers]
        total = sum(p.numel() for p in self.model.parameters())
        report = PruneReport([], total, total)
        if not dead:
            report.notes.append("Nothing to remove: no layer or branch is zero. The model is as it was.")
            return report
        with torch.inference_mode(False), torch.enable_grad():
            swaps = _bypass(self.model, dead, usable(example_inputs))
        modules = dict(self.model.named_modules())
        for name in swaps:
            layer = modules[name]
            if isinstance(layer, MASKABLE):
                shape, sparsity, parameters = _counted(layer)
                report.layers.append(PrunedLayer(name, "depth", shape[0], 0, shape, (0,), sparsity, 0, parameters, 0))
        for name, swap in swaps.items():
            _put(self.model, name, swap)
        kept = dict(self.model.named_modules())
        self._units = [u for u in self._units if all(kept[name] is layer for name, layer in u.layers.items())]
        report.parameters_after = sum(p.numel() for p in self.model.parameters())
        gone = [name for name in swaps if name not in dead]
        if gone:
            report.notes.append(f"On the same branches: {', '.join(map(repr, gone))}.")
        return report


class Nothing(nn.Module):
    """What is left of a residual branch that was removed: the number 0, which is added to any shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """x: any; a scalar 0 of its dtype and device."""
        return x.new_zeros(())


_LESS = "expected it to keep some; take a smaller strength or threshold, or leave the layer out"


class _LargestGroup:
    """Rates a neuron by the largest root mean square among the groups that are its own: it goes if all are small.

    Args:
        readers: look at the columns that read the neuron, not at the rows that make it.
    """

    def __init__(self, readers: bool) -> None:
        self.readers = readers

    def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """[size] per group."""
        modules = dict(model.named_modules())
        results = []
        for group in groups:
            largest = torch.zeros(group.size, dtype=torch.float64)
            slots_of = group.readers if self.readers else group.makers
            if not slots_of:
                largest += 1  # nothing reads it: nothing says that it is not needed
            for slots in slots_of:
                layer = modules[slots.layer]
                if isinstance(layer, MASKABLE):
                    unit = _Unit("", {"": layer}, 1.0, "channels" if self.readers else "filters")
                    rms = unit.rms().double().cpu()
                else:  # a layer that cannot have been penalised: kept, unless it is all zeros
                    rms = torch.ones(int(slots.index.max()) + 1, dtype=torch.float64)
                largest.index_reduce_(0, slots.neuron, rms[slots.index], "amax")
            results.append(largest)
        return results


def _checked(groups: object) -> Groups:
    if isinstance(groups, list):
        groups = tuple(groups)
    if isinstance(groups, tuple):
        if len(groups) == 2 and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in groups):
            return groups
    elif isinstance(groups, str) and groups in _NAMES:
        return cast(Groups, groups)
    raise ValueError(f"groups: expected one of {', '.join(map(repr, _NAMES))} or a block (r, c), got {groups!r}")


def _check_threshold(threshold: object) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold: expected a number >= 0, got {threshold!r}")
    if not (threshold >= 0 and math.isfinite(threshold)):
        raise ValueError(f"threshold: expected a finite number >= 0, got {threshold!r}")


def _merged(units: list[_Unit], branches: Mapping[str, str | Sequence[str]]) -> list[_Unit]:
    """Single layers, and those of each branch as one unit at the place of its first."""
    by_name = {unit.name: unit for unit in units}
    if any(unit.groups != "depth" for unit in units):
        raise ValueError("branches: expected only with groups='depth'")
    owner: dict[str, str] = {}
    for branch, globs in branches.items():
        for glob in [globs] if isinstance(globs, str) else globs:
            for name in _select.check_glob(glob, list(by_name), types=MASKABLE, argument="branches"):
                if owner.setdefault(name, branch) != branch:
                    raise ValueError(f"branches: layer {name!r} is in {owner[name]!r} and in {branch!r}")
    merged: dict[str, _Unit] = {}
    for unit in units:
        key = owner.get(unit.name)
        if key is None:
            merged[f"layer {unit.name}"] = unit
        elif f"branch {key}" in merged:
            merged[f"branch {key}"].layers.update(unit.layers)
        else:
            merged[f"branch {key}"] = _Unit(key, dict(unit.layers), unit.strength, "depth")
    return list(merged.values())


def _sizes(shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Weights per block of a matrix of that shape; [ceil(rows/r), ceil(columns/c)] int64."""
    (rows, columns), (r, c) = shape, block
    heights = (rows - torch.arange(0, rows, r)).clamp(max=r)
    widths = (columns - torch.arange(0, columns, c)).clamp(max=c)
    return heights[:, None] * widths


def _counted(layer: nn.Module) -> tuple[tuple[int, ...], float, int]:
    """Shape of the weight, share of zeros, parameters that are not zero (all of the bias)."""
    weight, bias = unmasked_weight(layer), cast("Tensor | None", layer.bias)
    nonzero = nonzeros(layer)
    sparsity = 1 - nonzero / weight.numel() if weight.numel() else 0.0
    return tuple(weight.shape), sparsity, nonzero + (0 if bias is None else bias.numel())


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return [t.clone() for t in _tensors(call(model, example_inputs))]
    except Exception as error:
        raise ValueError(f"example_inputs: do not fit the model: {error}") from error
    finally:
        for module, training in flags:
            module.training = training


def _distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference of floating outputs, and the largest of them."""
    pairs = [(a.double(), b.double()) for a, b in zip(before, after, strict=True) if a.is_floating_point()]
    pairs = [(a, b) for a, b in pairs if a.numel()]
    moved = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    return moved, max((float(a.abs().max()) for a, _ in pairs), default=0.0)


class _Reached(Exception):
    """A layer got the 0 of a removed branch."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _bypass(model: nn.Module, dead: Sequence[str], example_inputs: Any) -> dict[str, nn.Module]:
    """What to put in the place of which layers so that the branches of the `dead` ones are gone; tried on a copy.

    The dead layer gives the number 0. Every layer with parameters that this 0 then meets lies behind it on the branch
    and lets it pass; every layer that no longer gets a gradient lies before it. A 0 that is not added to a shortcut
    changes the shape of what comes after, and shows.
    """
    trial, wanted = _copy(model).eval(), _copy(model).eval()
    for parameter in trial.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    try:
        reach = _with_gradient(trial, example_inputs)
        swaps: dict[str, nn.Module] = {}
        for name in dead:
            swaps[name] = Nothing()
            _put(trial, name, Nothing())
        after: list[str] = []
        while (behind := _next_behind(trial, example_inputs)) is not None:
            swaps[behind] = nn.Identity()
            after.append(behind)
            _put(trial, behind, nn.Identity())
        before = reach - _with_gradient(trial, example_inputs)
        for idle in sorted(before - set(swaps)):
            swaps[idle] = nn.Identity()
            _put(trial, idle, nn.Identity())
        # the same branches in the model as it was, their ends times 0
        for name in [*dead, *after]:
            wanted.get_submodule(name).register_forward_hook(lambda _m, _x, y: y * 0)
        with torch.no_grad():
            expected, got = _tensors(call(wanted, example_inputs)), _tensors(call(trial, example_inputs))
        if [t.shape for t in got] != [t.shape for t in expected]:
            raise ValueError("the output would have another shape")
    except Exception as error:
        raise ValueError(
            f"model: of the layers that are all zero, {', '.join(map(repr, dead))}, one has no shortcut around it, so "
            f"that nothing would be left behind it ({error}); leave it out, or take a smaller strength or threshold"
        ) from error
    moved, scale = _distance(expected, got)
    if moved > 1e-3 * scale:
        raise ValueError(
            f"model: without {', '.join(map(repr, dead))} outputs would be off by {moved:.3g} of {scale:.3g}: they are "
            "not added to a shortcut"
        )
    order = [name for name, _ in model.named_modules()]
    return {name: swaps[name] for name in order if name in swaps}


def _next_behind(trial: nn.Module, example_inputs: Any) -> str | None:
    """The first layer with parameters or buffers that gets a 0-dimensional input; None where none does."""

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if any(isinstance(x, Tensor) and x.dim() == 0 for x in inputs):
                raise _Reached(name)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in trial.named_modules()
        if any(True for _ in [*module.parameters(recurse=False), *module.buffers(recurse=False)])
    ]
    try:
        with torch.no_grad():
            call(trial, example_inputs)
    except _Reached as reached:
        return reached.name
    finally:
        for handle in handles:
            handle.remove()
    return None


def _with_gradient(trial: nn.Module, example_inputs: Any) -> set[str]:
    """Modules without children whose parameters the outputs depend on."""
    outputs = [t.sum() for t in _tensors(call(trial, example_inputs)) if t.grad_fn is not None]
    parameters = [p for p in trial.parameters() if p.requires_grad]
    if not outputs or not parameters:
        return set()
    gradients = torch.autograd.grad(torch.stack([t.double() for t in outputs]).sum(), parameters, allow_unused=True)
    used = {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    leaves = [(n, m) for n, m in trial.named_modules() if not any(True for _ in m.children())]
    return {name for name, module in leaves if any(id(p) in used for p in module.parameters(recurse=False))}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise ValueError("a bare layer cannot be removed from itself")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
