# SPDX-License-Identifier: Apache-2.0
"""``pack_``: every layer goes to the format that measured fastest on the given inputs, or stays dense.

    run once ──▶ real inputs of each layer ──▶ candidate formats ──▶ race against dense ──▶ choose
                                                                                            │
                          model keeps what is faster as a whole  ◀── race of whole models ◀─┘

A layer is converted *in place*: the module object stays the same and becomes a packed layer (its class and attributes
change). So every reference to it holds on, a layer that is used several times is converted once, and a bare layer can
be the whole model.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch import _select, reference
from slimtorch.formats import Binary, BlockSparse, Codebook, Format, Sparse, SparseCodebook
from slimtorch.formats._common import matrix_shape
from slimtorch.formats.block_sparse import check_block_size
from slimtorch.measure import (
    Latency,
    device_of,
    eval_mode,
    interleave,
    memory_bytes,
    prepacked_bytes,
    split_inputs,
)
from slimtorch.nn import (
    BinaryConv2d,
    BinaryLinear,
    BlockSparseConv2d,
    BlockSparseLinear,
    CodebookConv2d,
    CodebookLinear,
    PackedLayer,
    SparseCodebookConv2d,
    SparseCodebookLinear,
    SparseConv2d,
    SparseLinear,
)
from slimtorch.ops._common import KERNEL_DTYPES, Pair
from slimtorch.prune.mask import Mask, bake_, mask_of
from slimtorch.report import Table, format_bytes, format_seconds

FormatName = Literal["auto", "dense", "sparse", "block_sparse", "codebook", "sparse_codebook", "binary"]
Formats = FormatName | Sequence[FormatName]
Objective = Literal["latency", "size"]
Statistic = Literal["median", "p10"]

FORMATS = ("sparse", "block_sparse", "codebook", "sparse_codebook", "binary")
# Layers that are raced: dense ones, and clustered ones against what else they could be.
_CLUSTERED = (CodebookLinear, CodebookConv2d, SparseCodebookLinear, SparseCodebookConv2d)
_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, *_CLUSTERED)
BLOCK_SIZES: tuple[Pair, ...] = ((1, 4), (1, 16), (4, 16), (8, 8), (16, 16), (32, 32), (64, 64))

# What "auto" tries at all. Beyond these bounds no kernel has a chance, and measuring would only take time.
_SPARSE_MAX_DENSITY = 0.8
_BLOCK_MAX_DENSITY = 0.9  # stored entries over entries of the weight
_BLOCK_MIN_FILL = 0.4  # nonzero entries over stored entries: how well blocks of a size fit the zeros

_SAMPLE_SECONDS = 2e-3  # a sample repeats its call until it lasts this long
_HEAT_SAMPLES, _FINAL_SAMPLES, _MODEL_SAMPLES = 3, 11, 15
_FINALISTS = 3
_NOISY = 1.5  # from this spread on (p90 over p10), a median says more about other processes than about the layer
_MODEL_TOLERANCE = 0.01  # by how much a packed model may seem slower than dense: the noise of a median


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One format on one layer.

    Attributes:
        format: "dense", "sparse", "block_sparse", "codebook", "sparse_codebook" or "binary".
        block_size: of block_sparse, else None.
        density: stored entries over entries of the weight.
        nbytes: of the weight in this format.
        latency: seconds of all calls of the layer in one run of the model; None where the format gave wrong results.
        error: largest deviation from the dense output, in units of what rounding explains; must be at most 1.
    """

    format: str
    block_size: Pair | None
    density: float
    nbytes: int
    latency: Latency | None
    error: float

    @property
    def label(self) -> str:
        """The format in one word, "16x16" for blocks."""
        return self.format if self.block_size is None else "{}x{}".format(*self.block_size)


@dataclass
class LayerReport:
    """What was tried on a layer, what became of it and why.

    Attributes:
        name: in the model, "" for a bare layer; of layers that share one weight, the first.
        kind: "Linear" or "Conv2d", for those of the training of binary networks and clustered ones too.
        shape: of the dense weight.
        sparsity: share of zeros in the weight.
        inputs: shapes of the inputs it was measured on.
        trials: dense first; empty where nothing could be measured.
        chosen: label of the format kept, "dense" where the layer stays as it was.
        speedup: dense time over the chosen format's; 1 for dense.
        reason: one sentence.
        statistic: what the times were compared by: "median", or "p10" where they varied so much (other processes at
            work) that the undisturbed samples say more.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    chosen: str = "dense"
    speedup: float = 1.0
    reason: str = ""
    statistic: Statistic = "median"

    def trial(self, label: str) -> Trial:
        """The trial of that label; KeyError where there is none."""
        for trial in self.trials:
            if trial.label == label:
                return trial
        raise KeyError(label)


@dataclass
class PackReport:
    """The answer of :func:`pack_`; prints as a table. Latencies in seconds.

    Attributes:
        layers: every layer considered, in the model's order.
        objective: "latency" or "size".
        dense_latency: of the whole model before, masks of pruning baked; None where no layer was converted.
        packed_latency: of the whole model after; None where no layer was converted.
        bytes_before: parameters and buffers of the dense model, without masks.
        bytes_after: the same, packed.
        bytes_prepacked: what kernels keep beside, derived from the positions.
        device: the model ran on.
        threads: of torch.
        notes: what the table cannot say, one sentence each.
    """

    layers: list[LayerReport]
    objective: str
    dense_latency: Latency | None
    packed_latency: Latency | None
    bytes_before: int
    bytes_after: int
    bytes_prepacked: int
    device: str
    threads: int
    notes: list[str] = field(default_factory=list)

    @property
    def packed(self) -> list[LayerReport]:
        """The layers that were converted."""
        return [layer for layer in self.layers if layer.chosen != "dense"]

    @property
    def speedup(self) -> float:
        """Of the whole model, dense over packed; 1 where nothing was converted."""
        if self.dense_latency is None or self.packed_latency is None:
            return 1.0
        _, (dense, packed) = _judge([self.dense_latency, self.packed_latency])
        return dense / packed

    def table(self) -> Table:
        """One row per layer: what was tried, with median times, what was chosen and why."""
        rows: list[list[object]] = []
        for layer in self.layers:
            tried = ", ".join(f"{trial.label} {_time(trial, layer.statistic)}" for trial in layer.trials)
            rows.append([
                layer.name or "(model)", layer.shape, f"{layer.sparsity:.1%}", tried or None, layer.chosen,
                f"{layer.speedup:.2f}x", layer.reason,
            ])  # fmt: skip
        notes = [f"{len(self.packed)} of {len(self.layers)} layers packed, for {self.objective}"]
        if self.dense_latency is not None and self.packed_latency is not None:
            notes.append(f"whole model: dense {self.dense_latency}, packed {self.packed_latency}: {self.speedup:.2f}x")
        if any(layer.statistic == "p10" for layer in self.layers):
            notes.append("~ times varied a lot (p90 above 1.5 p10): compared by, and shown as, 10th percentiles")
        prepacked = f" + {format_bytes(self.bytes_prepacked)} prepacked" if self.bytes_prepacked else ""
        notes.append(
            f"bytes: {format_bytes(self.bytes_before)} before, {format_bytes(self.bytes_after)} after{prepacked}"
        )
        columns = ["layer", "weight", "zeros", "tried: time per run", "chosen", "speed-up", "reason"]
        title = f"Packed on {self.device}, {self.threads} thread{'s' if self.threads != 1 else ''}"
        return Table(title, columns, rows, [*notes, *self.notes])

    def trials(self) -> Table:
        """One row per layer and format: times with spread, bytes, density."""
        rows: list[list[object]] = []
        for layer in self.layers:
            for trial in layer.trials:
                t = trial.latency
                rows.append([
                    layer.name or "(model)", trial.label, trial.density, format_bytes(trial.nbytes),
                    None if t is None else format_seconds(t.median),
                    None if t is None else f"{format_seconds(t.p10)} - {format_seconds(t.p90)}",
                    None if t is None else t.samples,
                    "chosen" if trial.label == layer.chosen else "",
                ])  # fmt: skip
        columns = ["layer", "format", "density", "bytes", "median", "p10 - p90", "samples", ""]
        return Table("Formats tried, layer by layer", columns, rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every field, and the whole model's speed-up."""
        return {**cast("dict[str, Any]", _plain(asdict(self))), "speedup": self.speedup}

    def __str__(self) -> str:
        return str(self.table())


def _time(trial: Trial, statistic: Statistic) -> str:
    if trial.latency is None:
        return "wrong"
    return format_seconds(trial.latency.median) if statistic == "median" else f"~{format_seconds(trial.latency.p10)}"


def _judge(latencies: Sequence[Latency]) -> tuple[Statistic, list[float]]:
    """Seconds to compare latencies by, and which statistic that is: the same one for all of them."""
    if any(latency.p90 > _NOISY * latency.p10 > 0 for latency in latencies):
        return "p10", [latency.p10 for latency in latencies]
    return "median", [latency.median for latency in latencies]


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# --- the verb ---------------------------------------------------------------------------------------------------------


def pack_(
    model: nn.Module,
    example_inputs: Any,
    *,
    formats: Formats | Mapping[str, Formats | None] = "auto",
    objective: Objective = "latency",
    filter_fn: _select.FilterFn | None = None,
    block_sizes: Sequence[Pair] = BLOCK_SIZES,
    min_gain: float = 0.05,
    time_budget: float = 60.0,
) -> PackReport:
    """Give each linear and conv2d layer the format that is fastest on these inputs, in place.

    Dense layers are considered, with masks of :func:`slimtorch.prune_` baked; the training layers of
    :func:`slimtorch.binarize_`; and the layers that :func:`slimtorch.cluster_` made. No format changes a weight: shared
    values and signs are tried where the weight has at most 256 distinct values, or one magnitude per row.

    The model runs once in ``eval()`` without gradients; then every layer is raced, on the inputs it really got, against
    each candidate format, by turns and in several rounds. A format must give the dense layer's result within rounding.
    In the end the whole model is raced too, and the layers that gain least go back to dense until it is not slower.
    Bias parameters, hooks and training flags stay; optimizers must be given the new parameters of packed layers.

    Args:
        model: any module, a single layer too (it changes its class in place).
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments. The choice
            holds for inputs of this kind: give a typical batch.
        formats: "auto" (all formats that fit the weight), a name ("sparse", "block_sparse", "codebook",
            "sparse_codebook", "binary", "dense"), a list of names, or a dict from glob of layer names to one of these.
            Formats that are named are tried whatever the density.
        objective: "latency" keeps the fastest format, and dense where none is faster by ``min_gain``. "size" keeps the
            one with the fewest bytes among those that are at most ``min_gain`` slower than dense.
        filter_fn: ``filter_fn(module, name) -> bool``; layers for which it is false are left alone.
        block_sizes: block sizes to try. "auto" takes those that fit the zeros of the weight.
        min_gain: see ``objective``; 0.05 is 5 %.
        time_budget: seconds that the measurements should take, about; large models may need longer.

    Returns:
        What was tried, the times and the reasons. Where no layer gains, it says so and the weights are as before.

    Raises:
        TypeError: ``model`` is no module; wrong kind of ``formats`` or ``block_sizes``.
        ValueError: inputs that do not fit, NaN weights, an unknown format or objective, a glob that matches nothing,
            numbers out of range. The model is left as it was, on any other exception too.
    """
    chosen = _select.resolve(model, formats, filter_fn, types=_TYPES)
    wanted = [(name, module, _format_names(value)) for name, module, value in chosen]
    sizes = [check_block_size(size) for size in block_sizes]
    if objective not in ("latency", "size"):
        raise ValueError(f"objective: expected 'latency' or 'size', got {objective!r}")
    _check_number("min_gain", min_gain)
    _check_number("time_budget", time_budget)

    args, kwargs = split_inputs(example_inputs)
    with eval_mode(model), torch.no_grad():
        seen = _capture(model, [module for _, module, _ in wanted], args, kwargs)
        for name, module, _ in wanted:
            if bool(torch.isnan(cast(Tensor, module.weight)).any()):
                raise ValueError(f"model: the weight of layer {name!r} holds NaN; repair it before packing")
        units, reports = _units(model, wanted, seen)
        race = _Race(objective, min_gain, sizes)
        todo = [unit for unit in units if unit.members]
        deadline = time.monotonic() + time_budget
        try:
            with _progress(len(todo) + 1) as advance:
                for index, unit in enumerate(todo):
                    left = deadline - time.monotonic()
                    race.run(unit, left / (len(todo) - index + 1))
                    advance(unit.report.name or "(model)")
                for unit in units:
                    unit.show("dense")
                before = memory_bytes(model)
                device = device_of(model, args, kwargs)
                notes, latencies = _settle(model, units, args, kwargs, race, device)
                advance("whole model")
        except BaseException:
            for unit in units:
                unit.show("original")
            raise
        for unit in units:
            unit.commit()
    if not reports:
        notes.append("no dense Linear or Conv2d layer to pack: the model is as it was")
    elif not any(unit.winner for unit in units):
        notes.append("no layer gains from another format: every weight is as it was")
    return PackReport(
        layers=reports,
        objective=objective,
        dense_latency=latencies[0],
        packed_latency=latencies[1],
        bytes_before=before,
        bytes_after=memory_bytes(model),
        bytes_prepacked=prepacked_bytes(model),
        device=str(device),
        threads=torch.get_num_threads(),
        notes=notes,
    )


def _format_names(value: object) -> tuple[str, ...]:
    """The names in one configuration, "auto" left as it is."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"formats: expected a name, a list of names or a dict of globs to them, got {value!r}")
    known = ("auto", "dense", *FORMATS)
    for name in names:
        if name not in known:
            raise ValueError(f"formats: expected one of {', '.join(map(repr, known))}, got {name!r}")
    return tuple(names)


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number, at least 0, got {value!r}")


# --- the inputs that layers really get --------------------------------------------------------------------------------

_Inputs = list[tuple[Tensor, int]]  # each kind of input once, with the number of calls


def _capture(
    model: nn.Module, layers: Sequence[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[int, _Inputs]:
    """id of a layer -> the inputs of its calls in one run; calls alike in shape, strides and dtype count together."""
    seen: dict[int, dict[object, tuple[Tensor, int]]] = {id(layer): {} for layer in layers}

    def note(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = positional[0] if positional else keywords.get("input")
        if isinstance(x, Tensor):
            kind = (tuple(x.shape), tuple(x.stride()), x.dtype, x.device)
            kept, calls = seen[id(module)].get(kind, (x.detach(), 0))
            seen[id(module)][kind] = (kept, calls + 1)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model(*args, **kwargs)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(_describe(value) for value in (*args, *kwargs.values()))
        raise ValueError(f"example_inputs: the model cannot run on {given}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return {key: list(kinds.values()) for key, kinds in seen.items()}


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


# --- layers that change their form ------------------------------------------------------------------------------------

_Form = tuple[type[nn.Module], dict[str, Any]]  # what a module is: its class and its attributes

# A packed layer takes over the hooks of the layer it replaces: handles that remove them go on working.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _form_of(module: nn.Module) -> _Form:
    return type(module), module.__dict__


@dataclass
class _Member:
    """One layer: the module of the model, a plain dense twin of it, and the inputs it got."""

    module: nn.Module
    twin: nn.Linear | nn.Conv2d
    inputs: _Inputs
    forms: dict[str, _Form]
    held: PackedLayer | None  # what a clustered layer is, and a layer of binary training becomes

    @classmethod
    def of(cls, module: nn.Module, inputs: _Inputs) -> _Member:
        held: nn.Module = module
        if isinstance(module, PackedLayer):
            # An object of its own, without hooks, over the same tensors: `module` is about to change its class.
            held = type(module).__new__(type(module))
            nn.Module.__init__(held)
            held.__dict__.update({key: value for key, value in module.__dict__.items() if key not in _HOOKS})
            twin = cast("nn.Linear | nn.Conv2d", module.to_dense()).eval()
        elif hasattr(module, "packed"):
            held = cast(Any, module).packed()
            dense = held.to_dense() if isinstance(held, PackedLayer) else held
            twin = cast("nn.Linear | nn.Conv2d", dense).eval()
        else:
            twin = _plain_twin(cast("nn.Linear | nn.Conv2d", module))
        original = _form_of(module)
        member = cls(module, twin, inputs, {"original": original}, held if isinstance(held, PackedLayer) else None)
        plain = type(module) in (nn.Linear, nn.Conv2d)
        member.forms["dense"] = original if plain else member._in_place(member.rival)
        return member

    @property
    def signed(self) -> bool:
        """Whether the layer takes the signs of its input."""
        return isinstance(self.held, (BinaryLinear, BinaryConv2d)) and self.held.binarize_input

    @property
    def rival(self) -> nn.Module:
        """The dense layer to beat."""
        if not self.signed:
            return self.twin
        kind = _SignsLinear if isinstance(self.twin, nn.Linear) else _SignsConv2d
        rival: nn.Module = kind.__new__(kind)
        rival.__dict__.update(self.twin.__dict__)
        return rival

    def _in_place(self, stand_in: nn.Module) -> _Form:
        """The form of ``stand_in`` with the hooks, the bias and the user's own attributes of the original module."""
        _, original = self.forms["original"]
        known = {*self.twin.__dict__, "parametrizations", *(self.held.__dict__ if self.held is not None else ())}
        own = {k: v for k, v in original.items() if k not in known}
        hooks = {k: original[k] for k in _HOOKS if k in original}
        attributes = {**own, **stand_in.__dict__, **hooks, "training": self.module.training}
        attributes["_parameters"] = {**stand_in._parameters, "bias": original["_parameters"]["bias"]}
        return type(stand_in), attributes

    def pack(self, layer: PackedLayer) -> None:
        self.forms["packed"] = self._in_place(layer)

    def show(self, form: str) -> None:
        kind, attributes = self.forms[form]
        self.module.__class__ = kind
        self.module.__dict__ = attributes


@dataclass
class _Unit:
    """Layers that share one weight (mostly a single one), which therefore take the same format."""

    report: LayerReport
    names: tuple[str, ...]
    members: list[_Member]
    winner: Trial | None = None
    raced: bool = False

    @property
    def signed(self) -> bool:
        """Whether the layers take the signs of their inputs."""
        return self.members[0].signed

    def show(self, form: str) -> None:
        """Turn the modules into what they were ("original"), plain dense layers ("dense") or the winner ("packed")."""
        for member in self.members:
            member.show("dense" if form == "packed" and self.winner is None else form)

    def commit(self) -> None:
        """What the modules are from now on."""
        if self.winner is not None:
            self.show("packed")
            return
        for member in self.members:
            # A clustered or binarised layer for which dense is faster becomes dense: its values stay.
            member.show("dense" if member.held is not None and self.raced else "original")
            if member.held is None:
                bake_(member.module)


class _SignsLinear(nn.Linear):
    """A dense layer over the signs of its input: what a binarised layer is without packed bits. For races only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(reference.signs(input))


class _SignsConv2d(nn.Conv2d):
    """As :class:`_SignsLinear`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(reference.signs(input))


def _plain_twin(module: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """A dense layer without hooks and parametrizations that computes the same, sharing tensors where it can."""
    meta = torch.device("meta")
    twin: nn.Linear | nn.Conv2d
    if isinstance(module, nn.Linear):
        twin = nn.Linear(module.in_features, module.out_features, module.bias is not None, meta)
    else:
        twin = nn.Conv2d(
            module.in_channels, module.out_channels, cast(Pair, module.kernel_size), cast(Pair, module.stride),
            cast("str | Pair", module.padding), cast(Pair, module.dilation), module.groups, module.bias is not None,
            module.padding_mode, meta,
        )  # fmt: skip
    held = module.weight
    if parametrize.is_parametrized(module, "weight"):  # what is computed has no gradient under no_grad
        held = cast(Any, module).parametrizations.weight.original
    twin.weight = nn.Parameter(module.weight.detach(), requires_grad=held.requires_grad)
    if module.bias is not None:
        twin.bias = module.bias
    return twin.eval()


def _units(
    model: nn.Module, wanted: Sequence[tuple[str, nn.Module, tuple[str, ...]]], seen: dict[int, _Inputs]
) -> tuple[list[_Unit], list[LayerReport]]:
    """The layers to convert, those that share a weight together; those that cannot be get a reason instead."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    considered = {id(module) for _, module, _ in wanted}
    units: dict[int, _Unit] = {}
    reports: list[LayerReport] = []
    for name, module, names in wanted:
        weight = cast(Tensor, module.weight).detach()
        kind = "Linear" if weight.dim() == 2 else "Conv2d"
        zeros = 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
        report = LayerReport(name, kind, tuple(weight.shape), zeros)
        reports.append(report)
        inputs = seen[id(module)]
        report.inputs = [tuple(x.shape) for x, _ in inputs]
        mask = mask_of(module)
        stored = cast(Any, module).parametrizations.weight.original if mask is not None else module.weight
        if isinstance(module, PackedLayer):
            stored = module._values()
        sharing = owners.get(id(stored), [])
        reason = _obstacle(module)
        if reason is None:
            strangers = [
                n for n, m in sharing if m is not module and id(m) not in considered and not _is_list_of(m, module)
            ]
            if strangers or (mask is not None and len(sharing) > 1):
                others = strangers or [n for n, m in sharing if m is not module]
                reason = f"its weight is shared with {', '.join(map(repr, others))}, which cannot be packed with it"
        if reason is not None:
            report.reason = reason
            continue
        member = _Member.of(module, inputs)
        unit = units.get(id(stored))
        if unit is None:
            units[id(stored)] = _Unit(report, names, [member])
        else:
            unit.members.append(member)
            unit.report.inputs += report.inputs
            reports.remove(report)
    return list(units.values()), reports


def _is_list_of(owner: nn.Module, layer: nn.Module) -> bool:
    """Whether ``owner`` is the list inside ``layer`` that holds the layer's parametrized weight."""
    return isinstance(owner, parametrize.ParametrizationList) and any(owner is part for part in layer.modules())


def _obstacle(module: nn.Module) -> str | None:
    """Why the layer cannot be converted, or None."""
    base: type = type(module)
    weight = cast(Tensor, module.weight)
    if weight.numel() == 0:
        return "its weight is empty"
    if weight.dtype not in KERNEL_DTYPES.get(weight.device.type, ()):
        return f"no kernels for {weight.dtype} on {weight.device.type}"
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    if isinstance(module, PackedLayer):
        return None if module.activation is None else "a ReLU is fused into it"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode is {module.padding_mode!r}"
    if hasattr(module, "packed"):
        return None
    if parametrize.is_parametrized(module):
        lists = cast("Mapping[str, Any]", module.parametrizations)
        if set(lists) != {"weight"} or not all(isinstance(part, Mask) for part in lists["weight"]):
            return "its parameters are parametrized by something other than a mask of slimtorch.prune"
        base = base.__mro__[1]
    elif "weight" not in module._parameters:
        return "its weight is computed by a hook; make it permanent first (torch.nn.utils.prune.remove and the like)"
    if base not in (nn.Linear, nn.Conv2d):
        return f"{base.__name__} is a class of its own"
    return None


# --- candidates -------------------------------------------------------------------------------------------------------


def block_density(weight: Tensor, block_size: Pair) -> float:
    """Entries that :class:`slimtorch.formats.BlockSparse` would store, over entries of the weight."""
    rows, width = matrix_shape(weight.shape)
    r, c = block_size
    nonzero = F.pad((weight != 0).reshape(rows, width), (0, -width % c, 0, -rows % r))
    blocks = nonzero.reshape(-1, r, nonzero.shape[1] // c, c).any(dim=3).any(dim=1)
    return int(blocks.sum()) * r * c / weight.numel()


def _distinct(weight: Tensor) -> int | None:
    """How many values a weight has, or None where there are more than a codebook can hold."""
    flat = weight.reshape(-1)
    if flat.numel() > 65536 and torch.unique(flat[:: flat.numel() // 4096]).numel() > 256:
        return None
    count = torch.unique(flat).numel()
    return count if count <= 256 else None


def _is_binary(weight: Tensor) -> bool:
    """Whether each row of a weight has one magnitude, and no zeros."""
    low, high = weight.reshape(weight.shape[0], -1).abs().aminmax(dim=1)
    return bool((low == high).all()) and bool((low > 0).all())


def _bits(values: int) -> int:
    return max(1, (values - 1).bit_length())


_Candidate = tuple[str, Pair | None, int]  # format, block size, bits of an index; of those that have none, None and 0


def _candidates(
    weight: Tensor, sparsity: float, names: tuple[str, ...], block_sizes: Sequence[Pair], held: PackedLayer | None
) -> tuple[list[_Candidate], list[str]]:
    """The formats to race (named ones all, of "auto" those that have a chance), and why others cannot be."""
    found: list[_Candidate] = []
    refused: list[str] = []
    auto = "auto" in names
    if isinstance(held, (BinaryLinear, BinaryConv2d)) and held.binarize_input:
        return ([("binary", None, 0)] if auto or "binary" in names else []), []
    own = None if held is None else _family(held.format)
    if own is not None and (auto or own in names):
        found.append((own, None, 0))
    sparse = auto and 1 - sparsity <= _SPARSE_MAX_DENSITY
    if "sparse" in names or sparse:
        found.append(("sparse", None, 0))
    if "block_sparse" in names:
        found += [("block_sparse", size, 0) for size in block_sizes]
    elif auto:
        for size in block_sizes:
            density = block_density(weight, size)
            if 1 - sparsity >= _BLOCK_MIN_FILL * density and density <= _BLOCK_MAX_DENSITY:
                found.append(("block_sparse", size, 0))
    codebook = (auto or "codebook" in names) and own != "codebook"
    sparse_codebook = (sparse or "sparse_codebook" in names) and own != "sparse_codebook"
    if codebook or sparse_codebook:
        values = _distinct(weight)
        if values is None:
            wanted = [name for name in ("codebook", "sparse_codebook") if name in names]
            refused += [f"{name}: more than 256 distinct values, cluster them first" for name in wanted]
        else:
            if codebook:
                found.append(("codebook", None, _bits(values)))
            if sparse_codebook:
                found.append(("sparse_codebook", None, _bits(values - (sparsity > 0))))
    if (auto or "binary" in names) and own != "binary":
        if _is_binary(weight):
            found.append(("binary", None, 0))
        elif "binary" in names:
            refused.append("binary: a row has more than one magnitude, binarize the layer first")
    return found, refused


def _family(weight: Format) -> str:
    names = {Sparse: "sparse", BlockSparse: "block_sparse", Codebook: "codebook", SparseCodebook: "sparse_codebook"}
    return names.get(type(weight), "binary")


def _pack_weight(dense: Tensor, candidate: _Candidate) -> Format:
    name, block_size, bits = candidate
    if block_size is not None:
        return BlockSparse.pack(dense, block_size)
    if name == "sparse":
        return Sparse.pack(dense)
    if name == "codebook":
        return Codebook.pack(dense, bits, zero=False)
    return SparseCodebook.pack(dense, bits) if name == "sparse_codebook" else Binary.pack(dense)


def _pack_layer(twin: nn.Linear | nn.Conv2d, weight: Format) -> PackedLayer:
    linear = isinstance(twin, nn.Linear)
    if isinstance(weight, Binary):
        binary: Any = BinaryLinear if linear else BinaryConv2d
        return cast(PackedLayer, binary.from_format(twin, weight, binarize_input=False))
    kinds: dict[type, tuple[Any, Any]] = {
        Sparse: (SparseLinear, SparseConv2d),
        BlockSparse: (BlockSparseLinear, BlockSparseConv2d),
        Codebook: (CodebookLinear, CodebookConv2d),
        SparseCodebook: (SparseCodebookLinear, SparseCodebookConv2d),
    }
    return cast(PackedLayer, kinds[type(weight)][0 if linear else 1].from_format(twin, weight))


def _packed_layers(unit: _Unit, candidate: _Candidate) -> tuple[Format, list[PackedLayer]]:
    """A packed layer for each member of the unit; they share one parameter, as their dense weights do."""
    held = [member.held for member in unit.members if member.held is not None]
    if held and candidate[0] == _family(held[0].format):  # what the layers are already
        return held[0].format, held
    weight = _pack_weight(unit.members[0].twin.weight, candidate)
    layers = [_pack_layer(member.twin, weight) for member in unit.members]
    for layer in layers[1:]:
        layer._parameters[layer.VALUES] = layers[0]._parameters[layer.VALUES]
    return weight, layers


def _deviation(member: _Member, packed: PackedLayer, x: Tensor) -> float:
    """Largest difference of the outputs in units of what rounding explains; infinity where a value is missing.

    The bound is the textbook one for a sum of K products, |error| <= K * eps * sum |x||w|, for both results, plus the
    rounding of the output to its own dtype.
    """
    twin, dense, ours = member.twin, member.rival(x), packed(x)
    if dense.shape != ours.shape or dense.dtype != ours.dtype:
        return math.inf
    wide = torch.float64 if dense.dtype == torch.float64 else torch.float32
    terms = math.prod(twin.weight.shape[1:]) + 1
    bias = None if twin.bias is None else twin.bias.abs().to(wide)
    reach = torch.ones_like(x, dtype=wide) if member.signed else x.abs().to(wide)
    magnitude = torch.func.functional_call(
        twin, {"weight": twin.weight.abs().to(wide), **({} if bias is None else {"bias": bias})}, (reach,)
    )
    bound = (2 * terms * torch.finfo(wide).eps + _rounding(twin, dense)) * magnitude
    bound += torch.finfo(dense.dtype).tiny
    # Where an activation is not finite, dense multiplies it with zeros that a packed layer does not store.
    finite = dense.isfinite() & magnitude.isfinite()
    excess = ((ours.to(wide) - dense.to(wide)).abs() / bound)[finite]
    return float(excess.nan_to_num(nan=math.inf).max()) if excess.numel() else 0.0


def _rounding(twin: nn.Linear | nn.Conv2d, dense: Tensor) -> float:
    """What one product of the dense layer may be off by, beside the rounding of a sum: as its library computes it."""
    rounding = 2 * torch.finfo(dense.dtype).eps
    if dense.device.type == "cuda" and dense.dtype == torch.float32:
        library: Any = torch.backends.cudnn if isinstance(twin, nn.Conv2d) else torch.backends.cuda.matmul
        try:
            allowed = bool(library.allow_tf32)
        except RuntimeError:  # torch does not say where it was set by the newer `fp32_precision`
            allowed = True
        if allowed:
            rounding += 2 * 2.0**-10  # both factors lose all but ten bits
    return rounding


# --- races ------------------------------------------------------------------------------------------------------------


@dataclass
class _Race:
    """Dense against the candidate formats, layer by layer."""

    objective: Objective
    min_gain: float
    block_sizes: list[Pair]

    def run(self, unit: _Unit, seconds: float) -> None:
        """Race one unit within about ``seconds``; sets its winner and completes its report."""
        report = unit.report
        calls = [(index, x, n) for index, member in enumerate(unit.members) for x, n in member.inputs]
        weight = unit.members[0].twin.weight.detach()
        if not calls:
            report.reason = "the example inputs never reach it"
            return
        if any(x.numel() == 0 for _, x, _ in calls):
            report.reason = "the example inputs give it an empty batch: nothing to measure"
            return
        candidates, refused = _candidates(
            weight, report.sparsity, unit.names, self.block_sizes, unit.members[0].held
        )
        if not candidates:
            few = f"only {report.sparsity:.1%} zeros: too few to skip"
            report.reason = "asked to stay dense" if unit.names == ("dense",) else "; ".join(refused) or few
            return
        unit.raced = True

        size = weight.numel() * weight.element_size()
        trials = {"dense": Trial("dense", None, 1.0, size, None, 0.0)}
        layers: dict[str, list[nn.Module]] = {"dense": [member.rival for member in unit.members]}
        for candidate in candidates:
            held, packed = _packed_layers(unit, candidate)
            error = max(_deviation(unit.members[i], packed[i], x) for i, x, _ in calls)
            trial = Trial(candidate[0], candidate[1], held.density, held.nbytes, None, error)
            trials[trial.label] = trial
            if error <= 1:
                layers[trial.label] = [*packed]

        def runner(modules: list[nn.Module]) -> Callable[[], None]:
            def run() -> None:
                for index, x, n in calls:
                    for _ in range(n):
                        modules[index](x)

            return run

        device = calls[0][1].device
        started = time.monotonic()
        heat = interleave(
            {label: runner(modules) for label, modules in layers.items()},
            samples=_HEAT_SAMPLES, min_sample_seconds=_SAMPLE_SECONDS, device=device,
        )  # fmt: skip
        finalists = self._finalists(trials, heat)
        cost = sum(max(_SAMPLE_SECONDS, heat[label].median) for label in finalists)
        left = seconds - (time.monotonic() - started)
        samples = min(_FINAL_SAMPLES, max(5, int(left / cost)))
        times = dict(heat)
        if len(finalists) > 1:
            times |= interleave(
                {label: runner(layers[label]) for label in finalists},
                samples=samples, min_sample_seconds=_SAMPLE_SECONDS, device=device,
            )  # fmt: skip
        report.trials = [
            Trial(t.format, t.block_size, t.density, t.nbytes, times.get(label), t.error) for label, t in trials.items()
        ]
        self._choose(unit, finalists)
        if refused:
            report.reason += f"; {'; '.join(refused)}"
        if unit.winner is not None:
            kept = cast("list[PackedLayer]", layers[unit.winner.label])
            for member, layer in zip(unit.members, kept, strict=True):
                member.pack(layer)

    def _finalists(self, trials: dict[str, Trial], heat: dict[str, Latency]) -> list[str]:
        """Dense and the few formats that a closer look could still make the winner."""
        _, judged = _judge(list(heat.values()))
        seconds = dict(zip(heat, judged, strict=True))
        latency = self.objective == "latency"
        limit = seconds["dense"] * (1 if latency else 1 + self.min_gain)
        rivals = [label for label in heat if label != "dense" and seconds[label] < 1.3 * limit]
        if latency:
            rivals.sort(key=seconds.__getitem__)
        else:
            rivals.sort(key=lambda label: (seconds[label] > limit, trials[label].nbytes, seconds[label]))
        return ["dense", *rivals[:_FINALISTS]]

    def _choose(self, unit: _Unit, finalists: list[str]) -> None:
        report = unit.report
        wrong = [trial.label for trial in report.trials if trial.error > 1]
        timed = {t.label: t.latency for t in report.trials if t.latency is not None}
        report.statistic, judged = _judge(list(timed.values()))
        seconds = dict(zip(timed, judged, strict=True))
        dense = seconds.pop("dense")
        if not seconds:
            report.reason = f"wrong results: {', '.join(wrong)}"
            return
        fastest = min((label for label in seconds if label in finalists), key=seconds.__getitem__, default=None)
        if fastest is None:
            fastest = min(seconds, key=seconds.__getitem__)
        gain = dense / seconds[fastest]
        best: str | None = fastest
        if self.objective == "latency":
            if gain < 1 + self.min_gain:
                best = None
                report.reason = f"{fastest} is {gain:.2f}x dense; {1 + self.min_gain:.2f}x needed"
                # What a layer is already, and what is smaller besides, need not gain: it must not lose.
                own = unit.members[0].held
                label = None if own is None else _family(own.format)
                if label in seconds and label in finalists and seconds[label] <= dense:
                    best = label
        else:
            fit = [t for t in report.trials if t.label in finalists and t.label in seconds]
            fit = [t for t in fit if seconds[t.label] <= dense * (1 + self.min_gain)]
            fit = [t for t in fit if t.nbytes < report.trials[0].nbytes]
            best = min(fit, key=lambda t: (t.nbytes, seconds[t.label])).label if fit else None
            if best is None:
                report.reason = f"no smaller format is fast enough: {fastest} is {gain:.2f}x dense"
        if best is None and unit.signed:  # only packed, or still to be trained: torch has no dense layer over signs
            unit.winner = report.trial(fastest)
            report.chosen, report.speedup = fastest, gain
            report.reason = f"{gain:.2f}x a dense layer over signs, which torch does not have"
        elif best is not None:
            unit.winner = report.trial(best)
            report.chosen, report.speedup = best, dense / seconds[best]
            smaller = report.trials[0].nbytes / max(1, unit.winner.nbytes)
            report.reason = "fastest" if self.objective == "latency" else f"smallest, {smaller:.1f}x less than dense"
        if wrong:
            report.reason += f"; wrong results: {', '.join(wrong)}"


def _settle(
    model: nn.Module,
    units: Sequence[_Unit],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    race: _Race,
    device: torch.device,
) -> tuple[list[str], tuple[Latency | None, Latency | None]]:
    """Race the whole model and send the layers that gain least back to dense until it is not slower."""
    notes: list[str] = []
    tolerance = _MODEL_TOLERANCE if race.objective == "latency" else race.min_gain
    state = ["dense"]

    def runner(form: str) -> Callable[[], object]:
        def run() -> object:
            if state[0] != form:  # once per sample: far below what a sample takes
                state[0] = form
                for unit in units:
                    unit.show(form)
            return model(*args, **kwargs)

        return run

    while True:
        won = [unit for unit in units if unit.winner is not None]
        if not won:
            return notes, (None, None)
        times = interleave(
            {"dense": runner("dense"), "packed": runner("packed")}, samples=_MODEL_SAMPLES, device=device
        )
        _, (dense, packed) = _judge([times["dense"], times["packed"]])
        won = [unit for unit in won if not unit.signed]
        if packed <= dense * (1 + tolerance) or not won:
            return notes, (times["dense"], times["packed"])
        won.sort(key=_saved)
        back = won[: max(1, len(won) // 4)]
        for unit in back:
            label = unit.report.chosen
            unit.report.reason = (
                f"{label} is {unit.report.speedup:.2f}x dense alone, but the whole model was slower with it"
            )
            unit.report.chosen, unit.report.speedup, unit.winner = "dense", 1.0, None
        lost = ", ".join(repr(unit.report.name) for unit in back)
        notes.append(f"packed was {packed / dense:.3f}x the time of dense as a whole: {lost} went back to dense")


def _saved(unit: _Unit) -> float:
    """Seconds that a run of the model saves by the unit's winner."""
    assert unit.winner is not None
    dense, ours = unit.report.trials[0].latency, unit.winner.latency
    assert dense is not None
    assert ours is not None
    _, (before, after) = _judge([dense, ours])
    return before - after


# --- progress ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, where that is a terminal and the work takes longer than a second."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip
    task = bar.add_task("", total=steps)
    began = time.monotonic()

    def advance(name: str) -> None:
        bar.update(task, advance=1, description=name)
        if not bar.live.is_started and time.monotonic() - began > 1:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
