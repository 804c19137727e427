# SPDX-License-Identifier: Apache-2.0
"""Removing neurons and channels: the network becomes narrower and stays dense.

A neuron is one output of a Linear layer or one output channel of a convolution. Taking it out takes a row from every
layer that makes it, an entry from every norm it passes and a column from every layer that reads it; which those are,
through residual connections, concatenations, depthwise convolutions and flattening, torch-pruning's dependency graph
says (Fang et al., "DepGraph", 2023). The work goes

    copy of the model ──trace──▶ groups ──importance──▶ plan ──▶ copy, checked ──▶ the model

so that whatever fails, fails on the copy. The plan is a list of cuts (layer, rows or columns, which); nothing but the
last arrow touches the model.

What is never removed: neurons that reach the output of the model (its output layer, and every layer tied to it), those
tied to an input of the model by a residual connection, and those in layers that the graph cannot cut (attention,
recurrent layers, parameters shared between layers).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch import _select
from slimtorch._paths import all_paths
from slimtorch.prune import importance as importances
from slimtorch.prune.importance import Evidence, Group, Importance, LossFn, Slots, call, usable
from slimtorch.prune.magnitude import check_count, check_fraction, check_weight, keep_largest
from slimtorch.prune.report import PrunedLayer, PruneReport

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, *_CONV)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CUTTABLE = (
    *_TYPES,
    _BATCH_NORM,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.PReLU,
    nn.Embedding,
)


@dataclass(frozen=True)
class Neurons:
    """Remove the least important neurons and channels.

    Layers whose neurons are tied together by a residual connection lose the same ones; the first of them in the model
    gives the configuration, and none is touched where one of them is left out by a glob, `ignore` or `filter_fn`.

    Args:
        ratio: share of the neurons to remove, in [0, 1); `round(ratio · n)` of the n of a layer, or of all layers
            together under "global", or fewer where `min_neurons` or `round_to` say so.
        importance: "l1", "l2" (norm of a neuron's weights), "apoz" (how often it is not zero on `data`), "taylor"
            (on `data`, with `loss_fn`; "taylor2" and "snip" too), "batchnorm" (scale of the batch norm after it),
            "random", or any object with a method `neurons(model, groups, evidence)`.
        scope: "layer" ranks within each layer; "global" ranks over all.
        seed: of "random".
        min_neurons: how many each layer keeps at least, >= 1.
        round_to: widths are rounded up to a multiple of this, >= 1 (vector units like 8 or 16).
        ignore: globs of names of layers whose neurons all stay.
        loss_fn: for "taylor", "taylor2" and "snip": `loss_fn(output, *targets) -> scalar`.
        batches: how many of `data` to read; None: all. Fewer than that is an error.
        normalize: under "global", each layer's scores are divided by their mean first, since layers differ in scale.
            False compares them as they are, like the one threshold of network slimming.
        threshold: remove the neurons whose score is at most this, >= 0, instead of a share; `ratio` must then be 0.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    ratio: float
    importance: str | Importance = "l1"
    scope: Literal["layer", "global"] = "layer"
    seed: int = 0
    min_neurons: int = 1
    round_to: int = 1
    ignore: Sequence[str] = ()
    loss_fn: LossFn | None = None
    batches: int | None = None
    normalize: bool = True
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_fraction("ratio", self.ratio)
        importances.get(self.importance)
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope: expected 'layer' or 'global', got {self.scope!r}")
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize: expected True or False, got {self.normalize!r}")
        if self.scope == "layer" and not self.normalize:
            raise ValueError("normalize: False is for scope='global'; within one layer it changes no rank")
        for name, least in (("seed", 0), ("min_neurons", 1), ("round_to", 1)):
            check_count(name, getattr(self, name), least)
        if self.batches is not None:
            check_count("batches", self.batches, 1)
        if self.threshold is not None:
            if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
                raise TypeError(f"threshold: expected a number >= 0, got {self.threshold!r}")
            if not (self.threshold >= 0 and math.isfinite(self.threshold)):
                raise ValueError(f"threshold: expected a finite number >= 0, got {self.threshold!r}")
            if self.ratio != 0 or self.scope != "layer":
                raise ValueError("threshold: expected ratio=0 and scope='layer' beside it: it alone says what goes")
        globs = (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore)
        if not all(isinstance(glob, str) for glob in globs):
            raise TypeError(f"ignore: expected globs of layer names, got {self.ignore!r}")
        object.__setattr__(self, "ignore", globs)
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise TypeError(f"loss_fn: expected a callable, got {type(self.loss_fn).__name__}")


@dataclass
class _Cut:
    """Which channels one pruning function takes out of one layer or bare parameter of that name."""

    name: str
    handler: Callable[..., Any]
    dim: int
    channels: set[int]


@dataclass
class _Candidate:
    """A group that may lose neurons.

    Attributes:
        config: says how many.
        group: the neurons.
        tied: torch-pruning's group of all of them.
        unit: [size] int64 in [0, units); neurons of one unit can only go together (one from each group of a grouped
            convolution, or i and i + n/2 where two halves of a layer's outputs are multiplied). All of one size.
    """

    config: Neurons
    group: Group
    tied: Any
    unit: Tensor

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    @property
    def together(self) -> int:
        """Neurons per unit."""
        return self.group.size // self.units


def remove_neurons_(
    model: nn.Module,
    config: Neurons | Mapping[str, Neurons | None],
    *,
    example_inputs: Any,
    filter_fn: _select.FilterFn | None = None,
    data: Iterable[Any] | None = None,
) -> PruneReport:
    """Removes neurons in place; `prune_` with a `Neurons` does this.

    Parameters stay the same objects with smaller values and keep `requires_grad`; an optimizer with state per element
    (momentum, Adam) must be built anew.

    Args:
        model: any module.
        config: one configuration, or a mapping from glob of names to configuration.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        filter_fn: `filter_fn(module, name) -> bool`.
        data: iterable of `inputs` or `(inputs, *targets)`, for "apoz" and "taylor".

    Raises:
        ValueError: `example_inputs` missing or not fitting, no data where the importance needs it, NaN weights, masked
            weights, or a model that cannot be cut consistently. The model is left as it was.
    """
    chosen = _select.resolve(model, config, filter_fn, types=_TYPES)
    names = [name for name, _ in _select.candidates(model, _TYPES)]
    configs = {name: value for name, _, value in chosen}
    for value in {id(v): v for v in configs.values()}.values():
        for glob in value.ignore:
            for name in _select.check_glob(glob, names, types=_TYPES, argument="ignore"):
                if configs.get(name) is value:
                    del configs[name]
    for name, layer, _ in chosen:
        check_weight(name, layer)
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"model: layer {name!r} has masks or other parametrizations, which cannot be cut; "
                "call slimtorch.prune.bake_(model) first"
            )
    report = PruneReport([], _size(model), _size(model))
    if not configs:
        report.notes.append("Nothing to prune: no Linear or convolution layer was selected. The model is as it was.")
        return report
    if example_inputs is None:
        raise ValueError("example_inputs: Neurons needs inputs to trace the model with, got None")

    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning's remarks on parameters it guesses about; the copy is checked
        example_inputs = usable(example_inputs)
        trial = _copy(model)
        network = _Network(trial, example_inputs)
        candidates = network.candidates(configs, report.notes)
        chosen_units = _rank(trial, candidates, data)
        cuts = network.plan(candidates, chosen_units)
        if cuts:
            _check(trial, model, cuts, example_inputs, network.output_shapes)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, _TYPES)}
    before = {name: _state(module) for name, module in layers.items()}
    with torch.inference_mode(False):  # a tensor made in inference mode could not be trained
        _apply(model, cuts)
    for name, module in layers.items():
        (width, shape, sparsity, count), after = before[name], _state(module)
        if after[1] != shape or name in configs:
            report.layers.append(
                PrunedLayer(name, "neuron", width, after[0], shape, after[1], sparsity, after[2], count, after[3])
            )
    report.parameters_after = _size(model)
    if not candidates:
        report.notes.append(
            "Nothing to prune: every neuron selected reaches the model's output or is tied to what cannot be cut. "
            "The model is as it was."
        )
    return report


class _Network:
    """The traced copy: which neurons hang together.

    Args:
        trial: a copy of the model; put into eval mode, all its floating parameters requiring gradients.
        example_inputs: as given.
    """

    def __init__(self, trial: nn.Module, example_inputs: Any) -> None:
        trial.eval()
        for parameter in trial.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        self.trial = trial
        self.names = {id(module): name for name, module in trial.named_modules()}
        self.parameter_names = {id(p): name for name, p in trial.named_parameters()}
        self.shared = _shared_parameters(trial)
        # the trace runs the model behind an entrance, so that what is tied to the inputs shows in the graph
        traced = _Entrance(trial, len(_tensors(example_inputs)))
        outputs: list[Tensor] = []

        def forward(entrance: nn.Module, inputs: Any) -> list[Tensor]:
            with all_paths():
                outputs.extend(_tensors(call(entrance, inputs)))
            return [t for t in outputs if t.grad_fn is not None]

        try:
            call(trial, example_inputs)
        except Exception as error:
            raise ValueError(f"example_inputs: do not fit the model: {error}") from error
        import torch_pruning as tp  # type: ignore[import-untyped]  # here, because all else runs without it

        graph = tp.DependencyGraph()
        try:
            graph.build_dependency(
                traced,
                example_inputs,
                forward_fn=forward,
                customized_pruners={_Input: _input_pruner()},
                verbose=False,
            )
        except Exception as error:
            raise ValueError(f"model: its layers cannot be traced: {error}") from error
        self.graph = graph
        self.output_shapes = [tuple(t.shape) for t in outputs]
        self.exits = {t.grad_fn for t in outputs if t.grad_fn is not None}

    def candidates(self, configs: Mapping[str, Neurons], notes: list[str]) -> list[_Candidate]:
        """The groups that may lose neurons, in the model's order; a note for those that may not and why."""
        order = {name: i for i, name in enumerate(self.names.values())}
        found: list[_Candidate] = []
        kept: dict[str, str] = {}
        seen: set[str] = set()
        for tied in self.graph.get_all_groups(root_module_types=list(_TYPES)):
            group = self._group(tied)
            makers = sorted({slots.layer for slots in group.makers}, key=order.__getitem__)
            seen.update(makers)
            selected = [name for name in makers if name in configs]
            if not selected:
                continue
            group.name = makers[0]
            unit, reason = self._units(tied, group)
            if not reason and len(selected) < len(makers):
                reason = f"tied to {_listed([name for name in makers if name not in configs])}, left out"
            if reason:
                kept.update(dict.fromkeys(selected, reason))
            else:
                found.append(_Candidate(configs[makers[0]], group, tied, unit))
        kept.update(dict.fromkeys([name for name in configs if name not in seen], "example_inputs do not reach them"))
        for name, reason in sorted(kept.items(), key=lambda item: order[item[0]]):
            notes.append(f"{name!r}: all neurons kept, {reason}")
        return sorted(found, key=lambda candidate: order[candidate.group.name])

    def _group(self, tied: Any) -> Group:
        group = Group("", len(tied[0].idxs))
        for item in tied:
            module = item.dep.target.module
            if not isinstance(module, (*_TYPES, _BATCH_NORM)):
                continue
            index, neuron = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            slots = Slots(self.names[id(module)], index.long(), neuron.long())
            if isinstance(module, _BATCH_NORM):
                group.norms.append(slots)
            elif self.graph.is_out_channel_pruning_fn(item.dep.handler):
                group.makers.append(slots)  # a depthwise convolution too: rows and columns go by one function
            else:
                group.readers.append(slots)
        return group

    def _units(self, tied: Any, group: Group) -> tuple[Tensor, str]:
        """Which neurons can only go together, and why the group cannot be cut at all ("" where it can)."""
        import torch_pruning as tp

        parts, unit = 1, torch.arange(group.size)
        for item in tied:
            node, module = item.dep.target, item.dep.target.module
            made = self.graph.is_out_channel_pruning_fn(item.dep.handler)
            if made and (node.grad_fn in self.exits or isinstance(module, tp.ops._OutputOp)):
                return unit, "they reach the model's output"
            if isinstance(module, _Input):
                return unit, "tied to the model's input"
            if isinstance(module, nn.Parameter):
                if id(module) in self.shared:
                    return unit, f"parameter {self.parameter_names[id(module)]!r} is shared between layers"
                continue
            name = self.names.get(id(module))
            if name is None:
                continue  # an operation, not a layer
            if not isinstance(module, _CUTTABLE):
                return unit, f"tied to {name!r}, a {type(module).__name__}"
            layer = cast(nn.Module, module)
            if any(id(p) in self.shared for p in layer.parameters(recurse=False)):
                return unit, f"a parameter of {name!r} is shared between layers"
            groups = int(getattr(layer, "groups", getattr(layer, "num_groups", 1)))
            if groups == 1:
                continue
            depthwise = isinstance(item.dep.handler.__self__, type(tp.function.PrunerBox[tp.ops.OPTYPE.DEPTHWISE_CONV]))
            if depthwise:
                if cast(nn.Conv2d, layer).in_channels != cast(nn.Conv2d, layer).out_channels:
                    return unit, f"the groups of {name!r} take several channels each"
                continue
            if list(item.idxs) != list(item.root_idxs) or len(item.idxs) != group.size:
                return unit, f"the groups of {name!r} do not line up with them"
            parts = math.lcm(parts, groups)
        if group.size % parts:
            return unit, f"{group.size} neurons do not divide into {parts} groups"
        unit = self._ties(tied, unit % (group.size // parts))
        sizes = torch.bincount(unit)
        if int(sizes.min()) != int(sizes.max()):
            return unit, "some of them can only go together, in unequal numbers"
        return unit, ""

    def _closure(self, tied: Any, neurons: Sequence[int]) -> list[int]:
        """The neurons of a group that go when `neurons` go, ascending."""
        root = tied[0].dep
        with_them = self.graph.get_pruning_group(root.target.module, root.handler, list(neurons))
        return sorted({int(i) for i in with_them[0].idxs})

    def _ties(self, tied: Any, unit: Tensor) -> Tensor:
        """`unit`, with units merged that the graph ties together."""
        size = len(unit)
        # ties are rare and asking for each neuron is slow: first ask for a random half, which a tie would leave
        shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        half = sorted(shuffled[: (size + 1) // 2].tolist())
        if size < 2 or self._closure(tied, half) == half:
            return unit
        unit = unit.clone()
        for neuron in range(size):
            members = torch.unique(unit[self._closure(tied, [neuron])])
            unit[torch.isin(unit, members)] = members.min()
        labels: Tensor = torch.unique(unit, return_inverse=True)[1]
        return labels

    def plan(self, candidates: Sequence[_Candidate], removed: Sequence[Sequence[int]]) -> list[_Cut]:
        """The cuts that take out the neurons `removed` of each candidate; channels count as in the whole model."""
        cuts: dict[tuple[int, str], _Cut] = {}
        for candidate, neurons in zip(candidates, removed, strict=True):
            if not neurons:
                continue
            root = candidate.tied[0].dep
            for item in self.graph.get_pruning_group(root.target.module, root.handler, list(neurons)):
                module, handler = item.dep.target.module, item.dep.handler
                name = self.parameter_names.get(id(module)) if isinstance(module, nn.Parameter) else None
                name = self.names.get(id(module)) if name is None else name
                if name is None:
                    continue
                key = (id(module), handler.__name__ + type(handler.__self__).__name__)
                cut = cuts.setdefault(key, _Cut(name, handler, item.dep.target.pruning_dim, set()))
                cut.channels.update(int(i) for i in item.idxs)
        return list(cuts.values())


class _Input(nn.Module):
    """Marks one input of the model in the trace."""

    channels: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        # a fresh tensor with a gradient function of its own, which the trace can name
        return x.detach().clone().requires_grad_(True).clone()


def _input_pruner() -> Any:
    """Tells the graph how many channels an input has; it is never cut."""
    import torch_pruning as tp

    class Pruner(tp.pruner.function.BasePruningFunc):
        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> int | None:
            return cast("int | None", getattr(layer, "channels", None))

        get_in_channels = get_out_channels

    return Pruner()


class _Entrance(nn.Module):
    """The model with every floating tensor among its inputs marked."""

    def __init__(self, model: nn.Module, inputs: int) -> None:
        super().__init__()
        self.model = model
        self.inputs = nn.ModuleList(_Input() for _ in range(inputs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        marks = iter(self.inputs)

        def mark(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                entry = cast(_Input, next(marks))
                # [N, C, ...] for images, [N, T, C] for sequences into Linear layers, [N, C]
                entry.channels = value.shape[1 if value.dim() != 3 else 2] if value.dim() > 1 else value.shape[0]
                return entry(value)
            if isinstance(value, (tuple, list)):
                marked = [mark(v) for v in value]
                return type(value)(*marked) if hasattr(value, "_fields") else type(value)(marked)
            if isinstance(value, Mapping):
                return {k: mark(v) for k, v in value.items()}
            return value

        return self.model(*mark(args), **mark(kwargs))


def _rank(trial: nn.Module, candidates: Sequence[_Candidate], data: Iterable[Any] | None) -> list[list[int]]:
    """For each candidate the neurons to remove, ascending."""
    by_config: dict[int, list[int]] = {}
    for index, candidate in enumerate(candidates):
        by_config.setdefault(id(candidate.config), []).append(index)
    if len(by_config) > 1 and isinstance(data, Iterator):
        data = list(data)  # read once per configuration
    removed: list[list[int]] = [[] for _ in candidates]
    for members in by_config.values():
        config = candidates[members[0]].config
        evidence = Evidence(data, config.loss_fn, config.seed, config.batches)
        groups = [candidates[i].group for i in members]
        scores = importances.get(config.importance).neurons(trial, groups, evidence)
        trial.zero_grad(set_to_none=True)
        _check_scores(scores, groups, config)
        means = [_unit_means(s.double().cpu(), candidates[i]) for i, s in zip(members, scores, strict=True)]
        if config.scope == "global" and config.normalize:
            means = [m / m.mean() if float(m.mean()) > 0 else m for m in means]
        keeps = _keep(means, [candidates[i] for i in members], config)
        for i, keep in zip(members, keeps, strict=True):
            removed[i] = (~keep[candidates[i].unit]).nonzero().flatten().tolist()
    return removed


def _unit_means(scores: Tensor, candidate: _Candidate) -> Tensor:
    """Where neurons can only go together their mean decides: [size] → [units]."""
    return torch.zeros(candidate.units, dtype=scores.dtype).index_add_(0, candidate.unit, scores) / candidate.together


def _keep(means: list[Tensor], candidates: Sequence[_Candidate], config: Neurons) -> list[Tensor]:
    """Which units stay, [units] bool per candidate."""
    if config.threshold is not None:
        keeps = [m > config.threshold for m in means]
    elif config.scope == "layer":
        keeps = [keep_largest(m, round(config.ratio * len(m))) for m in means]
    else:
        # what must stay is out of the ranking; the rest is ranked in one
        pairs = zip(means, candidates, strict=True)
        flat = torch.cat([torch.where(_best(m, _least(c, config)), torch.inf, m) for m, c in pairs])
        remove = min(round(config.ratio * len(flat)), int(flat.isfinite().sum()))
        keeps = list(torch.split(keep_largest(flat, remove), [len(m) for m in means]))
    results = []
    for mean, keep, candidate in zip(means, keeps, candidates, strict=True):
        # rounding up can only keep more: the best of what would have gone
        step = config.round_to // math.gcd(config.round_to, candidate.together)
        least = max(int(keep.sum()), _least(candidate, config))
        results.append(_best(mean, min(len(mean), math.ceil(least / step) * step)))
    return results


def _least(candidate: _Candidate, config: Neurons) -> int:
    return min(candidate.units, math.ceil(config.min_neurons / candidate.together))


def _best(scores: Tensor, count: int) -> Tensor:
    return keep_largest(scores, len(scores) - count)


def _check_scores(scores: Sequence[Tensor], groups: Sequence[Group], config: Neurons) -> None:
    who = config.importance if isinstance(config.importance, str) else type(config.importance).__name__
    if len(scores) != len(groups):
        raise ValueError(f"importance: {who!r} gave {len(scores)} tensors for {len(groups)} groups")
    for score, group in zip(scores, groups, strict=True):
        if tuple(score.shape) != (group.size,):
            raise ValueError(
                f"importance: {who!r} gave shape {tuple(score.shape)} for the {group.size} neurons of {group.name!r}"
            )
        if not bool(score.isfinite().all()):
            raise ValueError(f"importance: {who!r} gave values for {group.name!r} that are not finite")


def _check(
    trial: nn.Module, model: nn.Module, cuts: Sequence[_Cut], example_inputs: Any, shapes: Sequence[tuple[int, ...]]
) -> None:
    """Cuts the copy and runs it, so that what does not fit together shows before the model is touched.

    The narrow copy must also compute what the wide one does with the columns of the removed neurons set to zero: a
    channel cut at the wrong place gives the right shapes and wrong numbers. Norms over channels (layer, group) do
    change with the channels, so that this second check is left out where one was cut.
    """
    remedy = "leave the layers concerned out with ignore= or filter_fn="
    exact = not any(isinstance(dict(trial.named_modules()).get(cut.name), (nn.LayerNorm, nn.GroupNorm)) for cut in cuts)
    with torch.no_grad(), all_paths():
        expected: list[Tensor] = []
        if exact:
            muted = copy.deepcopy(trial)
            _mute(muted, cuts)
            expected = _tensors(call(muted, example_inputs))
        try:
            _apply(trial, cuts)
            got = _tensors(call(trial, example_inputs))
        except Exception as error:
            raise ValueError(f"model: does not run without the neurons chosen ({error}); {remedy}") from error
    if [tuple(t.shape) for t in got] != list(shapes):
        raise ValueError(
            f"model: without the neurons chosen its output would be {[tuple(t.shape) for t in got]}, "
            f"not {list(shapes)}; {remedy}"
        )
    for one, other in zip(got, expected, strict=False):
        if not one.is_floating_point():
            continue
        tolerance = 3 * math.sqrt(torch.finfo(one.dtype).eps)  # 1e-3 in float32: rounding, far from a wrong channel
        scale = float(other.double().abs().max()) if other.numel() else 0.0
        error_ = float((one.double() - other.double()).abs().max()) if other.numel() else 0.0
        if math.isfinite(scale) and error_ > tolerance * scale:
            raise ValueError(
                "model: an operation mixes channels in a way that the dependency graph does not follow (outputs would "
                f"be off by {error_:.3g} of {scale:.3g}); {remedy}"
            )


def _mute(model: nn.Module, cuts: Sequence[_Cut]) -> None:
    """Zeroes the columns that read removed neurons, instead of cutting anything."""
    modules = dict(model.named_modules())
    for cut in cuts:
        layer = modules.get(cut.name)
        if cut.handler.__name__ != "prune_in_channels" or not isinstance(layer, _TYPES):
            continue
        channels = torch.tensor(sorted(cut.channels))
        weight = cast(Tensor, layer.weight).data
        if isinstance(layer, nn.Linear):
            weight[:, channels] = 0
            continue
        convolution = cast(nn.Conv2d, layer)
        if convolution.transposed:
            weight[channels] = 0
            continue
        # a grouped convolution holds, per group of outputs, only its own inputs
        per_group, out_per_group = weight.shape[1], weight.shape[0] // convolution.groups
        for channel in channels.tolist():
            group, column = divmod(channel, per_group)
            weight[group * out_per_group : (group + 1) * out_per_group, column] = 0


def _apply(model: nn.Module, cuts: Sequence[_Cut]) -> None:
    """Makes the cuts. Every parameter stays the same object and keeps `requires_grad` and what is left of `grad`."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for cut in cuts:
        pruner = cast(Any, cut.handler).__self__
        pruner.pruning_dim = cut.dim
        channels = sorted(cut.channels)
        if cut.name in parameters:
            _replace(parameters[cut.name], cut.handler(parameters[cut.name], channels))
            continue
        module = modules[cut.name]
        held = dict(module._parameters)
        cut.handler(module, channels)
        for name, old in held.items():
            new = module._parameters.get(name)
            if old is not None and new is not None and new is not old:
                _replace(old, new)
                module._parameters[name] = old


def _replace(old: nn.Parameter, new: nn.Parameter) -> None:
    gradient = new.grad
    old.grad = None  # its shape is checked against the data
    old.data = new.data
    old.grad = gradient


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"model: cannot be copied to try the removal on: {error}") from error


def _shared_parameters(model: nn.Module) -> set[int]:
    """Identities of parameters that more than one module, or one module twice, holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a tensor, list, tuple or mapping, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def _state(layer: nn.Module) -> tuple[int, tuple[int, ...], float, int]:
    """Neurons, shape of the weight, share of zeros in it, parameters that are not zero (all of the bias)."""
    weight = cast(Tensor, layer.weight)
    nonzero = int(torch.count_nonzero(weight.detach()))
    bias = cast("Tensor | None", layer.bias)
    sparsity = 1 - nonzero / weight.numel() if weight.numel() else 0.0
    width = weight.shape[0] if isinstance(layer, nn.Linear) else cast(nn.Conv2d, layer).out_channels
    return width, tuple(weight.shape), sparsity, nonzero + (0 if bias is None else bias.numel())


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if not torch.nn.parameter.is_lazy(p))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
