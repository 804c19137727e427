# SPDX-License-Identifier: Apache-2.0
"""`slimmable_`: any network becomes one that runs at several widths; each width can be taken out as a plain network.

Yu et al., "Slimmable Neural Networks" (arXiv 1812.08928); any width: Yu & Huang, "Universally Slimmable Networks"
(arXiv 1903.05134). Which channels hang together, through residual connections, concatenations and flattening, says the
dependency graph that `prune_` uses:

    model ──trace──▶ groups of neurons ──▶ channels of each layer ──▶ copy, checked at every width ──▶ the model

What stays whole at every width: the classes, what is tied to the inputs, and neurons that layers of other kinds see.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch import _select
from slimtorch._paths import all_paths
from slimtorch.dynamic.slimmable_layers import (
    WIDTHS,
    Channels,
    SlimmableBatchNorm1d,
    SlimmableBatchNorm2d,
    SlimmableConv1d,
    SlimmableConv2d,
    SlimmableLayer,
    SlimmableLinear,
    _BatchNorm,
    check_widths,
)
from slimtorch.measure import count_macs, count_parameters, eval_mode
from slimtorch.prune.importance import call, usable
from slimtorch.prune.neurons import Neurons, _Candidate, _copy, _Network, _tensors
from slimtorch.report import Table

_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_KINDS: dict[type[nn.Module], Any] = {
    nn.Linear: SlimmableLinear,
    nn.Conv1d: SlimmableConv1d,
    nn.Conv2d: SlimmableConv2d,
    nn.BatchNorm1d: SlimmableBatchNorm1d,
    nn.BatchNorm2d: SlimmableBatchNorm2d,
}
_REMEDY = "leave the layers concerned out with filter_fn="


@dataclass(frozen=True)
class WidthCost:
    """One width: parameters of its plain network, and MACs of one call on the example inputs."""

    width: float
    parameters: int
    macs: int


@dataclass
class SlimmableReport:
    """What :func:`slimmable_` made; prints as a table.

    Attributes:
        costs: by width, ascending.
        layers: name of each layer with more than one width → its channels on the side that makes them, by width.
        parameters: of the model now, all widths together.
        notes: layers whose neurons all stay, and why.
    """

    costs: list[WidthCost]
    layers: dict[str, list[int]]
    parameters: int
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        whole = self.costs[-1]
        rows: list[list[object]] = [
            [
                f"{cost.width:g}", cost.parameters, f"{cost.parameters / whole.parameters:.1%}",
                cost.macs, f"{cost.macs / whole.macs:.1%}",
            ]
            for cost in self.costs
        ]  # fmt: skip
        stored = f"{self.parameters:,} parameters in all, for every width; {len(self.layers)} layers change theirs"
        columns = ["width", "parameters", "share", "MACs", "share of MACs"]
        return Table("Slimmable", columns, rows, [stored, *self.notes])

    def __str__(self) -> str:
        return str(self.table())

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


# --- the verb ---------------------------------------------------------------------------------------------------------


def slimmable_(
    model: nn.Module,
    widths: Sequence[float] = WIDTHS,
    *,
    example_inputs: Any,
    universal: bool = False,
    filter_fn: _select.FilterFn | None = None,
) -> SlimmableReport:
    """Makes a model run at several widths, in place; it then runs at width 1 and gives what it gave.

    Linear and convolution layers are replaced by ones that use the first channels of their weights, and *all* batch
    norms by ones with statistics for each width. Weights and biases stay the same parameters; those of batch norms are
    new ones. Hooks on replaced layers do not move along. Train with `slimmable_loss` or `sandwich_step`.

    Args:
        model: any module without masks; a network that is trained already gives narrow ones that are not.
        widths: shares of the neurons of each group, in (0, 1], with 1 among them.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        universal: any width from the smallest to 1 may then be set; batch norms share scale and shift between widths,
            and widths that are not in `widths` need `recalibrate_`.
        filter_fn: `filter_fn(module, name) -> bool`; neurons of layers for which it is false all stay, and those tied
            to them.

    Returns:
        Parameters and MACs of each width.

    Raises:
        TypeError: `model` is no module, or an argument of the wrong type.
        ValueError: widths out of range; inputs that do not fit; a model that is slimmable already, has masks, or cannot
            become narrower consistently. The model is left as it was.
    """
    widths = check_widths(widths)
    if not isinstance(universal, bool):
        raise TypeError(f"universal: expected True or False, got {universal!r}")
    chosen = _select.resolve(model, Neurons(0.0), filter_fn, types=_MATRICES)
    if _layers(model):
        raise ValueError("model: is slimmable already")
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"model: layer {name!r} has masks or other parametrizations; call slimtorch.prune.bake_(model) first"
            )
    notes: list[str] = []
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning's remarks on parameters that it guesses about
        example_inputs = usable(example_inputs)
        network = _Network(_copy(model), example_inputs)
        found = network.candidates({name: config for name, _, config in chosen}, notes)
    sides = _sides(model, network, found, notes)
    if not any(inputs.slim or outputs.slim for inputs, outputs in sides.values()):
        why = f": {'; '.join(notes)}" if notes else ""
        raise ValueError(f"model: no layer of it can become narrower{why}")
    options = {"widths": widths, "universal": universal}

    trial = _copy(model)
    _convert(trial, sides, options)
    with eval_mode(trial), eval_mode(model), torch.no_grad(), all_paths():
        for width in widths:
            _check(trial, model, sides, width, example_inputs)

    with torch.inference_mode(False):
        _convert(model, sides, options)
    costs = []
    for width in widths:
        narrow = export(model, width)
        costs.append(WidthCost(width, count_parameters(narrow)[0], count_macs(narrow, example_inputs)[1]))
    layers = {name: [outputs.count(w) for w in widths] for name, (inputs, outputs) in sides.items() if outputs.slim}
    return SlimmableReport(costs, layers, count_parameters(model)[0], notes)


def _sides(
    model: nn.Module, network: _Network, found: Sequence[_Candidate], notes: list[str]
) -> dict[str, tuple[Channels, Channels]]:
    """Name → channels on both sides, of every layer to replace; a note for each group that must stay whole."""
    modules = dict(model.named_modules())
    groups = []
    for candidate in found:
        reason = _obstacle(candidate, network, modules)
        if reason:
            notes.append(f"{candidate.group.name!r}: all neurons kept, {reason}")
        else:
            groups.append(candidate)
    while True:
        owners: dict[tuple[str, bool], dict[int, tuple[int, int]]] = {}  # (layer, is output) → channel → group, neuron
        for number, candidate in enumerate(groups):
            group = candidate.group
            for slots, out in (
                *((s, True) for s in (*group.makers, *group.norms)), *((s, False) for s in group.readers),
            ):  # fmt: skip
                own = owners.setdefault((slots.layer, out), {})
                pairs = zip(slots.index.tolist(), slots.neuron.tolist(), strict=True)
                own.update({channel: (number, neuron) for channel, neuron in pairs})
        sides: dict[str, tuple[Channels, Channels]] = {}
        bad: tuple[int, str] | None = None
        for name, module in modules.items():
            if type(module) in _NORMS:
                total = cast(nn.BatchNorm2d, module).num_features
                made = _runs(owners.get((name, True), {}), total, groups)
                pair = (made, made)
            elif type(module) in _MATRICES:
                ins, outs = _sizes(module)
                pair = (
                    _runs(owners.get((name, False), {}), ins, groups),
                    _runs(owners.get((name, True), {}), outs, groups),
                )
                if getattr(module, "groups", 1) != 1:
                    pair = (pair[1], pair[1])
            else:
                continue
            wrong = next((side for side in pair if isinstance(side, int)), None)
            if wrong is not None:
                bad = (wrong, name)
                break
            if type(module) in _NORMS or any(cast(Channels, side).slim for side in pair):
                sides[name] = cast("tuple[Channels, Channels]", pair)
        if bad is None:
            return sides
        notes.append(f"{groups[bad[0]].group.name!r}: all neurons kept, {bad[1]!r} has them in another order")
        del groups[bad[0]]


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    convolution = cast(nn.Conv2d, module)
    return convolution.in_channels, convolution.out_channels


def _obstacle(candidate: _Candidate, network: _Network, modules: Mapping[str, nn.Module]) -> str:
    """Why a group must stay whole, "" where it need not."""
    if candidate.together > 1:
        return "some of them can only go together"
    for item in candidate.tied:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return f"tied to the parameter {network.parameter_names.get(id(module))!r}"
        name = network.names.get(id(module))
        if name is None:
            continue  # an operation
        if type(module) not in _KINDS:
            return f"tied to {name!r}, a {type(module).__name__}"
        if getattr(modules[name], "padding_mode", "zeros") != "zeros":
            return f"{name!r} pads with other values than zero"
        groups = getattr(modules[name], "groups", 1)
        if groups != 1 and set(_sizes(modules[name])) != {groups}:
            return f"the groups of {name!r} take several channels each"
    return ""


def _runs(owners: Mapping[int, tuple[int, int]], total: int, groups: Sequence[_Candidate]) -> Channels | int:
    """The channels of one side as runs; the index of a group whose neurons do not lie there in order."""
    runs: list[tuple[int, int, bool]] = []
    channel = 0
    while channel < total:
        if channel not in owners:
            start = channel
            while channel < total and channel not in owners:
                channel += 1
            runs.append((channel - start, 1, False))
            continue
        number = owners[channel][0]
        size = groups[number].group.size
        each = 0
        while owners.get(channel + each) == (number, 0):
            each += 1
        wanted = [(number, neuron) for neuron in range(size) for _ in range(each)]
        if not each or [owners.get(channel + i) for i in range(len(wanted))] != wanted:
            return number
        runs.append((size, each, True))
        channel += len(wanted)
    return Channels(tuple(runs))


def _convert(model: nn.Module, sides: Mapping[str, tuple[Channels, Channels]], options: Mapping[str, Any]) -> None:
    modules = dict(model.named_modules())
    made: dict[nn.Module, nn.Module] = {}
    for name, (inputs, outputs) in sides.items():
        module = modules[name]
        kind = _KINDS[type(module)]
        own = {"slim": inputs} if type(module) in _NORMS else {"slim_in": inputs, "slim_out": outputs}
        made[module] = kind.from_dense(module, **own, **options)
    _replace(model, made)


def _replace(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Puts new modules in the place of old ones, wherever they are referred to as children."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in made:
                parent._modules[name] = made[child]


def _check(
    trial: nn.Module, model: nn.Module, sides: Mapping[str, tuple[Channels, Channels]], width: float, inputs: Any
) -> None:
    """The narrow network must compute what the whole one does with the columns of missing neurons set to zero."""
    muted = copy.deepcopy(model)
    modules = dict(muted.named_modules())
    for name, (channels, _) in sides.items():
        module = modules[name]
        if type(module) in _MATRICES and getattr(module, "groups", 1) == 1:
            gone = torch.ones(channels.total, dtype=torch.bool)
            for start, stop in channels.spans(width):
                gone[start:stop] = False
            cast(Tensor, module.weight)[:, gone] = 0
    expected = _tensors(call(muted, inputs))
    set_width(trial, width)
    try:
        got = _tensors(call(trial, inputs))
    except Exception as error:
        raise ValueError(f"model: does not run at width {width:g} ({error}); {_REMEDY}") from error
    if [t.shape for t in got] != [t.shape for t in expected]:
        raise ValueError(
            f"model: at width {width:g} its output would be {[tuple(t.shape) for t in got]}, "
            f"not {[tuple(t.shape) for t in expected]}; {_REMEDY}"
        )
    for one, other in zip(got, expected, strict=True):
        if not one.is_floating_point() or not one.numel():
            continue
        scale = float(other.double().abs().max())
        error_ = float((one.double() - other.double()).abs().max())
        if math.isfinite(scale) and error_ > 3 * math.sqrt(torch.finfo(one.dtype).eps) * scale:
            raise ValueError(
                "model: an operation mixes channels in a way that the dependency graph does not follow (outputs at "
                f"width {width:g} would be off by {error_:.3g} of {scale:.3g}); {_REMEDY}"
            )


# --- widths -----------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> list[SlimmableLayer]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [module for module in model.modules() if isinstance(module, SlimmableLayer)]


def _slimmable(model: nn.Module) -> list[SlimmableLayer]:
    layers = _layers(model)
    if not layers:
        raise ValueError("model: no layer of it is slimmable; call slimtorch.dynamic.slimmable_ first")
    return layers


def set_width(model: nn.Module, width: float) -> None:
    """Every slimmable layer of a model runs at this width from now on.

    Raises:
        TypeError, ValueError: a model without such layers; a width that one of them cannot run at. None has changed.
    """
    layers = _slimmable(model)
    for layer in layers:
        layer.check_width(width)
    for layer in layers:
        layer.set_width(width)


def width_of(model: nn.Module) -> float:
    """The width that a slimmable model runs at; ValueError where its layers do not agree."""
    found = {layer.width for layer in _slimmable(model)}
    if len(found) > 1:
        raise ValueError(f"model: its layers run at different widths: {', '.join(f'{w:g}' for w in sorted(found))}")
    return found.pop()


def widths_of(model: nn.Module) -> tuple[float, ...]:
    """The widths that a model was made for, ascending, the last of them 1."""
    return _slimmable(model)[0].widths


@contextlib.contextmanager
def at_width(model: nn.Module, width: float) -> Iterator[None]:
    """`set_width` inside the ``with``; the width before comes back after it."""
    before = width_of(model)
    set_width(model, width)
    try:
        yield
    finally:
        set_width(model, before)


def export(model: nn.Module, width: float | None = None) -> nn.Module:
    """The network of one width alone: a copy with plain layers that shares nothing with the model.

    It packs, exports and saves like any other, and its ``state_dict`` is that of the narrow network of the same class.
    Its weights are those of the model at this width to the bit, its answers to within rounding: a kernel may add in
    another order where a matrix lies in memory of its own.

    Args:
        width: None: the present one.

    Raises:
        TypeError, ValueError: as `set_width`; batch norms have no statistics for this width (see `recalibrate_`).
    """
    with at_width(model, width_of(model) if width is None else width):
        made: dict[int, nn.Module] = {id(layer): layer.export() for layer in _slimmable(model)}
    if id(model) in made:
        return made[id(model)]
    # the copy takes the plain layers instead of the wide ones, wherever they stand
    return copy.deepcopy(model, cast("dict[int, Any]", made))


def recalibrate_(model: nn.Module, data: Iterable[Any], widths: Sequence[float] | None = None) -> None:
    """Takes the statistics of batch norms anew, at each width the mean over all batches (1903.05134, section 3.3).

    Nothing is trained; width and modes are as before afterwards. Of widths that are not among the model's own, one is
    kept at a time.

    Args:
        data: batches `inputs` or `(inputs, …)`, read once for each width: a list, or a loader. A thousand samples do.
        widths: None: all that the model was made for.

    Raises:
        TypeError, ValueError: as `set_width`; no batch; two widths that are not the model's own. As on any error, the
            statistics are then as they were.
    """
    layers = _slimmable(model)
    own = widths_of(model)
    chosen = own if widths is None else tuple(widths)
    for width in chosen:
        for layer in layers:
            layer.check_width(width)
    if len({width for width in chosen if width not in own}) > 1:
        raise ValueError(f"widths: expected at most one beside {own}, got {chosen}")
    norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    if isinstance(data, Iterator):
        data = list(data)
    try:
        with eval_mode(model), torch.no_grad():
            for norm in norms:
                norm.momentum = None  # the plain average over batches
                norm.train()
            for width in chosen:
                with at_width(model, width):
                    for norm in norms:
                        norm.reset()
                    count = 0
                    for batch in data:
                        model(batch[0] if isinstance(batch, (tuple, list)) else batch)
                        count += 1
                    if not count:
                        raise ValueError("data: expected at least one batch, got none")
    except BaseException:
        with torch.no_grad():
            for norm, buffers in zip(norms, before, strict=True):
                for name, value in buffers.items():
                    cast(Tensor, getattr(norm, name)).copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class Slimmable(nn.Module):
    """A model with `slimmable_` applied, and what can be done with it as methods.

    Args: as `slimmable_`, which changes `model` in place.

    Attributes:
        model: that model.
        report: of `slimmable_`.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: Sequence[float] = WIDTHS,
        *,
        example_inputs: Any,
        universal: bool = False,
        filter_fn: _select.FilterFn | None = None,
    ) -> None:
        super().__init__()
        self.report = slimmable_(
            model, widths, example_inputs=example_inputs, universal=universal, filter_fn=filter_fn
        )
        self.model = model

    @property
    def width(self) -> float:
        """The present one."""
        return width_of(self.model)

    @property
    def widths(self) -> tuple[float, ...]:
        """Those that it was made for, ascending."""
        return widths_of(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def set_width(self, width: float) -> None:
        """As the function `set_width`."""
        set_width(self.model, width)

    def export(self, width: float | None = None) -> nn.Module:
        """As the function `export`: the inner model, narrow and plain."""
        return export(self.model, width)

    def recalibrate_(self, data: Iterable[Any], widths: Sequence[float] | None = None) -> None:
        """As the function `recalibrate_`."""
        recalibrate_(self.model, data, widths)
