# SPDX-License-Identifier: Apache-2.0
"""Putting another layer where a dense one stands, only where it is faster or smaller: shared by the verbs of design.

    proposals ──▶ parameters, MACs, time on real inputs ──▶ kept where it gains ──▶ race of whole models ──▶ report
                  of the dense layer and of the other         else back to dense      the least goes back

A layer is replaced *in place*: the module object stays and becomes a layer of the other class, so that every reference
to it, and its hooks, hold on; a layer that is used several times is replaced once, and a bare layer can be the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from slimtorch.measure import Latency, count_macs, device_of, eval_mode, interleave, memory_bytes, split_inputs
from slimtorch.packing import _HOOKS, _capture, _judge, _plain_twin
from slimtorch.report import Table, format_bytes, format_number, format_seconds

Objective = Literal["latency", "size"] | None

_SAMPLES, _MODEL_SAMPLES = 9, 15
_SAMPLE_SECONDS = 2e-3
_MODEL_TOLERANCE = 0.01  # by how much a model may seem slower than before: the noise of a median


@runtime_checkable
class Replacement(Protocol):
    """What stands where a dense layer stood. Files need no more of it than this.

    It has the attributes of the dense layer's geometry under the same names (`in_features` and `out_features`, or
    `in_channels`, `out_channels`, `kernel_size`, `stride`, `padding`, `dilation`, `padding_mode`), and `bias`, a
    parameter or None. They are read from its layers, so that they are right after channels were removed.
    """

    replaces: ClassVar[type[nn.Module]]

    def geometry(self) -> dict[str, Any]:
        """What `from_geometry` takes, JSON-ready."""
        ...

    @classmethod
    def from_geometry(cls, geometry: Mapping[str, Any], *, device: Any = None, dtype: Any = None) -> nn.Module:
        """A layer of this geometry, with values of no meaning; ValueError or TypeError where there is none."""
        ...


@dataclass
class Proposal:
    """A layer, and what could stand in its place.

    Attributes:
        name: in the model.
        module: the dense layer.
        replacement: computes about the same; of the same device, dtype and training flag.
        what: it is, in a few words: "channel, rank 12".
        error: of its outputs (or weights, where nothing else is known): squared error over variance; None if unknown.
    """

    name: str
    module: nn.Module
    replacement: nn.Module
    what: str
    error: float | None = None


@dataclass
class ReplacedLayer:
    """One layer and what was proposed for it. MACs and seconds are of all its calls in one run of the model.

    Attributes:
        name: in the model, "" for a bare layer.
        kind: of the dense layer, "Linear" or "Conv2d".
        shape: of its weight.
        what: was proposed, "" where nothing could be.
        parameters_before, parameters_after: of the dense layer, and of what was proposed.
        macs_before, macs_after: the same; None where no inputs were given or none reached it.
        latency_before, latency_after: the same, measured by turns; None where nothing was measured.
        error: squared error of its outputs, or of its weight, over their variance.
        replaced: whether it stands there now.
        reason: one sentence.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    what: str
    parameters_before: int
    parameters_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    latency_before: Latency | None = None
    latency_after: Latency | None = None
    error: float | None = None
    replaced: bool = False
    reason: str = ""

    @property
    def speedup(self) -> float | None:
        """Dense time over the other's; None where nothing was measured."""
        if self.latency_before is None or self.latency_after is None:
            return None
        _, (before, after) = _judge([self.latency_before, self.latency_after])
        return before / after


@dataclass
class ReplaceReport:
    """What a verb of :mod:`slimtorch.design` did; prints as a table. Latencies in seconds.

    Attributes:
        title: of the table.
        layers: every layer considered, in the model's order.
        objective: "latency", "size" or None.
        parameters_before, parameters_after: of the whole model.
        bytes_before, bytes_after: of its parameters and buffers.
        macs_before, macs_after: of the whole model on the example inputs; None without them.
        latency_before, latency_after: the same, measured by turns; None where nothing was replaced too.
        notes: what the table cannot say, one sentence each.
    """

    title: str
    layers: list[ReplacedLayer]
    objective: Objective
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    latency_before: Latency | None = None
    latency_after: Latency | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> list[ReplacedLayer]:
        """The layers that were replaced."""
        return [layer for layer in self.layers if layer.replaced]

    @property
    def speedup(self) -> float | None:
        """Of the whole model on the example inputs; None where it was not timed."""
        if self.latency_before is None or self.latency_after is None:
            return None
        _, (before, after) = _judge([self.latency_before, self.latency_after])
        return before / after

    def table(self) -> Table:
        """One row per layer and a total."""
        rows: list[list[object]] = []
        for layer in self.layers:
            time = None
            if layer.latency_before is not None and layer.latency_after is not None:
                time = _change(layer.latency_before.median, layer.latency_after.median, format_seconds)
            proposed = bool(layer.what)
            verdict = f"{'yes' if layer.replaced else 'no'}: {layer.reason}"
            rows.append([
                layer.name or "(model)", layer.shape, layer.what or None,
                _change(layer.parameters_before, layer.parameters_after if proposed else None, _short),
                _change(layer.macs_before, layer.macs_after, _short), time,
                None if layer.error is None else f"{layer.error:.1%}", verdict,
            ])  # fmt: skip
        if rows:
            rows.append([
                "whole model", "", "", _change(self.parameters_before, self.parameters_after, _short),
                _change(self.macs_before, self.macs_after, _short), "", "", "",
            ])  # fmt: skip
        notes = [
            f"{len(self.replaced)} of {len(self.layers)} layers replaced; bytes: {format_bytes(self.bytes_before)} "
            f"before, {format_bytes(self.bytes_after)} after"
        ]
        if self.speedup is not None:
            notes.append(f"whole model: {self.latency_before} before, {self.latency_after} after: {self.speedup:.2f}x")
        columns = ["layer", "weight", "proposed", "parameters", "MACs", "time", "error", "kept"]
        shown = [i for i, name in enumerate(columns) if name not in ("MACs", "time", "error") or _any(rows, i)]
        rows = [[row[i] for i in shown] for row in rows]
        return Table(self.title, [columns[i] for i in shown], rows, [*notes, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every field, and the speed-up of the whole model."""
        found = {**asdict(self), "speedup": self.speedup}
        for layer in found["layers"]:
            layer["shape"] = list(layer["shape"])
        return found

    def __str__(self) -> str:
        return str(self.table())


def _change(before: float | None, after: float | None, form: Callable[[float], str] = format_number) -> str | None:
    if before is None:
        return None
    return form(before) if after is None else f"{form(before)} → {form(after)}"


def _short(count: float) -> str:
    """At most four digits: 448, 3.54 M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if count >= scale:
            size = count / min(scale, 1e3 if unit == "K" else scale)
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
    return format_number(int(count))


def _any(rows: Sequence[Sequence[object]], column: int) -> bool:
    return any(row[column] not in (None, "") for row in rows)


# --- what can be replaced at all --------------------------------------------------------------------------------------


def obstacles(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> dict[str, str]:
    """Name -> why a layer cannot be replaced, of those that cannot.

    Raises:
        ValueError: a weight has no values (a lazy layer, the meta device), or holds NaN or infinity.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for name, module in layers:
        if is_lazy(cast(Tensor, module._parameters.get("weight"))):
            raise ValueError(f"model: the weight of layer {name!r} has no shape yet; run the model once")
        if parametrize.is_parametrized(module):
            found[name] = "its weight has a mask or another parametrization; slimtorch.prune.bake_(model) first"
        elif type(module) not in (nn.Linear, nn.Conv2d):
            found[name] = f"{type(module).__name__} is a class of its own"
        elif "forward" in module.__dict__:
            found[name] = "its forward has been replaced"
        elif module._parameters.get("weight") is None:
            found[name] = "its weight is computed by a hook"
        else:
            weight = cast(Tensor, module.weight)
            shared = [
                f"its {kind} is shared with {', '.join(map(repr, others))}"
                for kind, parameter in module._parameters.items() if parameter is not None
                if (others := [other for other in owners[id(parameter)] if other != name])
            ]  # fmt: skip
            # What hooks of the user's compute with would be gone; a bias that a hook computes is among it.
            besides = [*(set(module._parameters) - {"weight", "bias"}), *module._buffers, *module._modules]
            if shared:
                found[name] = shared[0]
            elif besides or "bias" not in module._parameters:
                found[name] = f"it holds {', '.join(sorted(besides)) or 'a bias of its own'} besides weight and bias"
            elif weight.is_meta:
                raise ValueError(f"model: the weight of layer {name!r} is on the meta device, expected values")
            elif weight.numel() == 0:
                found[name] = "its weight is empty"
            elif not weight.is_floating_point():
                found[name] = f"its weight is {weight.dtype}"
            elif not bool(torch.isfinite(weight).all()):
                raise ValueError(f"model: the weight of layer {name!r} holds NaN or infinity; repair it first")
    return found


def inside_replacements(model: nn.Module) -> set[int]:
    """id of every layer within one that stands in for a dense one: those are not replaced again."""
    return {
        id(inner)
        for module in model.modules() if isinstance(module, Replacement)
        for inner in module.modules() if inner is not module
    }  # fmt: skip


# --- the work ---------------------------------------------------------------------------------------------------------

_Form = tuple[type[nn.Module], dict[str, Any]]  # what a module is: its class and its attributes


@dataclass
class _Place:
    """One layer of the model that may take another form."""

    proposal: Proposal
    report: ReplacedLayer
    before: _Form
    after: _Form
    training: bool  # the flag of the dense layer, which races set aside

    def show(self, form: _Form) -> None:
        self.proposal.module.__class__ = form[0]
        self.proposal.module.__dict__ = form[1]


def replaced_attributes(module: nn.Module, replacement: nn.Module) -> dict[str, Any]:
    """The attributes of `module` once it has become `replacement`: hooks, training flag and the user's own stay."""
    kind = nn.Linear(1, 1, device="meta") if isinstance(module, nn.Linear) else nn.Conv2d(1, 1, 1, device="meta")
    own = {key: value for key, value in module.__dict__.items() if key not in kind.__dict__}
    hooks = {key: module.__dict__[key] for key in _HOOKS if key in module.__dict__}
    return {**own, **replacement.__dict__, **hooks, "training": module.training}


def replace_(
    model: nn.Module,
    proposals: Sequence[Proposal],
    *,
    objective: Objective,
    example_inputs: Any = None,
    min_gain: float = 0.05,
    title: str = "Replaced",
    skipped: Mapping[str, tuple[nn.Module, str]] | None = None,
    notes: Sequence[str] = (),
) -> ReplaceReport:
    """Puts the proposals that gain into the model.

    Args:
        model: any module; left as it was on any exception.
        proposals: at most one for a layer.
        objective: "latency": a proposal is kept where it is faster than the dense layer by `min_gain`, measured by
            turns on the inputs that the layer really gets; then whole models race, and what saves least goes back until
            the model is not slower. "size": kept where it has fewer parameters. None: always.
        example_inputs: a tensor, a tuple or list of positional arguments or a dict of keyword arguments. "latency"
            needs them; else they only fill the columns of MACs and of time.
        min_gain: share of the time.
        title: of the report.
        skipped: name -> (layer, why nothing was proposed), for the report.
        notes: for the report.

    Raises:
        ValueError: an unknown objective, "latency" without inputs, inputs that do not fit.
    """
    check_objective(objective, example_inputs)
    reports: dict[str, ReplacedLayer] = {}
    for name, (module, reason) in (skipped or {}).items():
        size = _size(module)
        reports[name] = ReplacedLayer(name, _kind(module), _shape(module), "", size, size, reason=reason)
    places: list[_Place] = []
    for proposal in proposals:
        module, new = proposal.module, proposal.replacement
        report = ReplacedLayer(
            proposal.name, _kind(module), _shape(module), proposal.what, _size(module), _size(new), error=proposal.error
        )
        reports[proposal.name] = report
        # The parts take the flag too; the module itself gets its attributes below.
        new.train(module.training)
        before = (type(module), module.__dict__)
        places.append(_Place(proposal, report, before, (type(new), replaced_attributes(module, new)), module.training))
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    result = ReplaceReport(
        title, [reports[name] for name in sorted(reports, key=order.__getitem__)], objective,
        _size(model), _size(model), memory_bytes(model), memory_bytes(model), notes=list(notes),
    )  # fmt: skip
    try:
        with eval_mode(model), torch.no_grad():
            if example_inputs is not None:
                args, kwargs = split_inputs(example_inputs)
                device = device_of(model, args, kwargs)
                result.macs_before = result.macs_after = count_macs(model, example_inputs)[1]
                seen = _capture(model, [place.proposal.module for place in places], args, kwargs)
                for place in places:
                    _measure(place, seen[id(place.proposal.module)], objective, device)
            for place in places:
                place.report.replaced, place.report.reason = _verdict(place.report, objective, min_gain)
            kept = [place for place in places if place.report.replaced]
            if kept and example_inputs is not None:
                result.latency_before, result.latency_after = _settle(
                    model, kept, args, kwargs, objective, device, result.notes
                )
        # outside eval_mode: it would give the flag of the dense layer to the parts of the other
        for place in places:
            place.show(place.after if place.report.replaced else place.before)
        if example_inputs is not None:
            result.macs_after = count_macs(model, example_inputs)[1]
    except BaseException:
        for place in places:
            place.show(place.before)
            # eval_mode gives the flag back to the form that it finds, which may have been the other one
            place.proposal.module.training = place.training
        raise
    if result.layers and not result.replaced:
        result.notes.append("no layer was replaced: the model is as it was")
        result.latency_before = result.latency_after = None
    elif not result.layers:
        result.notes.append("no layer to replace: the model is as it was")
    result.parameters_after, result.bytes_after = _size(model), memory_bytes(model)
    return result


def check_objective(objective: Objective, example_inputs: Any) -> None:
    """ValueError where the objective is unknown or lacks inputs."""
    if objective not in ("latency", "size", None):
        raise ValueError(f"objective: expected 'latency', 'size' or None, got {objective!r}")
    if objective == "latency" and example_inputs is None:
        raise ValueError("example_inputs: objective='latency' needs inputs to measure with, got None")


def check_gain(min_gain: float) -> None:
    """TypeError or ValueError where it is no share."""
    if isinstance(min_gain, bool) or not isinstance(min_gain, (int, float)):
        raise TypeError(f"min_gain: expected a number, got {min_gain!r}")
    if not (math.isfinite(min_gain) and min_gain >= 0):
        raise ValueError(f"min_gain: expected a finite number, at least 0, got {min_gain!r}")


def _kind(module: nn.Module) -> str:
    return "Linear" if isinstance(module, nn.Linear) else "Conv2d"


def _shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(cast(Tensor, module.weight).shape)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _measure(place: _Place, inputs: Sequence[tuple[Tensor, int]], objective: Objective, device: torch.device) -> None:
    """MACs of both, and their times where those decide."""
    report, new = place.report, place.proposal.replacement
    inputs = [(x, calls) for x, calls in inputs if x.numel()]
    if not inputs:
        return
    twin = _plain_twin(cast("nn.Linear | nn.Conv2d", place.proposal.module))
    with eval_mode(new):
        report.macs_before = sum(calls * count_macs(twin, x)[1] for x, calls in inputs)
        report.macs_after = sum(calls * count_macs(new, x)[1] for x, calls in inputs)
        if objective != "latency":
            return

        def runner(module: nn.Module) -> Callable[[], None]:
            def run() -> None:
                for x, calls in inputs:
                    for _ in range(calls):
                        module(x)

            return run

        times = interleave(
            {"dense": runner(twin), "other": runner(new)},
            samples=_SAMPLES, min_sample_seconds=_SAMPLE_SECONDS, device=device,
        )  # fmt: skip
    report.latency_before, report.latency_after = times["dense"], times["other"]


def _verdict(report: ReplacedLayer, objective: Objective, min_gain: float) -> tuple[bool, str]:
    if objective is None:
        return True, "as asked"
    if objective == "size":
        ratio = report.parameters_before / max(1, report.parameters_after)
        smaller = report.parameters_after < report.parameters_before
        return smaller, f"{ratio:.2f}x smaller" if smaller else "not smaller"
    speedup = report.speedup
    if speedup is None:
        return False, "the example inputs never reach it"
    if speedup < 1 + min_gain:
        return False, f"{speedup:.2f}x dense; {1 + min_gain:.2f}x needed"
    return True, f"{speedup:.2f}x dense"


def _settle(
    model: nn.Module,
    kept: list[_Place],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    objective: Objective,
    device: torch.device,
    notes: list[str],
) -> tuple[Latency | None, Latency | None]:
    """Whole models by turns; for latency, the layers that save least go back until the model is not slower."""
    while kept:

        def runner(after: bool, places: Sequence[_Place] = tuple(kept)) -> Callable[[], object]:
            def run() -> object:
                for place in places:  # once a call: microseconds, and the same for both
                    place.show(place.after if after else place.before)
                    place.proposal.module.train(False)
                return model(*args, **kwargs)

            return run

        times = interleave({"before": runner(False), "after": runner(True)}, samples=_MODEL_SAMPLES, device=device)
        for place in kept:
            place.show(place.after)
            place.proposal.module.train(place.training)
            place.show(place.before)
        _, (before, after) = _judge([times["before"], times["after"]])
        if objective != "latency" or after <= before * (1 + _MODEL_TOLERANCE):
            return times["before"], times["after"]
        kept.sort(key=_saved)
        back = kept[: max(1, len(kept) // 4)]
        del kept[: len(back)]
        for place in back:
            place.report.replaced = False
            place.report.reason = f"{place.report.speedup:.2f}x dense alone, but the whole model was slower with it"
        names = ", ".join(repr(place.report.name) for place in back)
        notes.append(f"as a whole the model took {after / before:.3f}x the time: {names} went back to dense")
    return None, None


def _saved(place: _Place) -> float:
    """Seconds that a run of the model saves by this layer."""
    assert place.report.latency_before is not None
    assert place.report.latency_after is not None
    _, (before, after) = _judge([place.report.latency_before, place.report.latency_after])
    return before - after
