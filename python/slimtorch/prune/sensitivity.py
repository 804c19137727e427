# SPDX-License-Identifier: Apache-2.0
"""Which layers bear pruning, and how much of a budget each should get.

    each layer, each sparsity, alone ──▶ loss of the model ──┐
    cost of each layer at each sparsity: weights, MACs or    ├──▶ least sum of losses added within the budget
    seconds, timed in the format that `pack_` would choose ──┘                 │
                                                              prune_ ◀── {layer: Magnitude(…)}

The scan is that of Han et al., "Learning both Weights and Connections", 2015, figure 6 (and of Li et al., "Pruning
Filters for Efficient ConvNets", 2017, figure 2b, for filters). What layers add to the loss is taken to add up.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch._budget import least_loss
from slimtorch._evaluate import Measure, finite, number_of
from slimtorch._files import write_atomically
from slimtorch._progress import shown
from slimtorch.measure import _count_macs, eval_mode, interleave, split_inputs
from slimtorch.prune._verb import prune_
from slimtorch.prune.importance import Importance
from slimtorch.prune.magnitude import Magnitude, check_fraction, check_weight
from slimtorch.prune.mask import MASKABLE, nonzeros, unmasked_weight
from slimtorch.prune.neurons import Neurons
from slimtorch.report import Table, format_number, format_seconds

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Sparsities that are tried unless told otherwise."""

_BETWEEN = 9  # sparsities between two measured ones that `allocate` may choose, where their cost is known exactly


# --- the scan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer of a scan.

    Attributes:
        name: in the model, "" for a bare layer.
        shape: of the weight.
        weights: nonzero weights before.
        values: what was measured of the whole model, by sparsity of this layer (of neurons: by ratio).
        left: what was left at that sparsity: nonzero weights of this layer; of neurons: parameters of the whole model.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    values: dict[float, float] = field(default_factory=dict)
    left: dict[float, int] = field(default_factory=dict)


@dataclass
class Sensitivity:
    """What `sensitivity` found; prints as a table.

    Attributes:
        layers: in the model's order; those that could not lose anything are only named in the notes.
        base: of the model as it came.
        levels: the sparsities tried.
        config: how layers were pruned; its sparsity (ratio) is not used.
        higher_is_better: of the measure: True for an accuracy, False for a loss.
        notes: what the table cannot say, one sentence each.
    """

    layers: list[LayerSensitivity]
    base: float
    levels: tuple[float, ...]
    config: Magnitude | Neurons
    higher_is_better: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Nonzero weights of all layers scanned, before."""
        return sum(layer.weights for layer in self.layers)

    def layer(self, name: str) -> LayerSensitivity:
        """The layer of that name; KeyError where there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def harm(self, name: str) -> dict[float, float]:
        """By how much the measure got worse, by sparsity of that layer: positive is worse, whatever the measure."""
        sign = -1 if self.higher_is_better else 1
        return {level: sign * (value - self.base) for level, value in self.layer(name).values.items()}

    def table(self) -> Table:
        """One row per layer, one column per sparsity."""
        rows: list[list[object]] = []
        for layer in self.layers:
            values = [format_number(layer.values[s]) if s in layer.values else None for s in self.levels]
            rows.append([layer.name or "(model)", layer.shape, layer.weights, *values])
        columns = ["layer", "shape", "weights", *(f"{s:.4g}" for s in self.levels)]
        what = "ratio of neurons removed" if isinstance(self.config, Neurons) else f"sparsity ({_how(self.config)})"
        better = "higher" if self.higher_is_better else "lower"
        lead = f"{format_number(self.base)} before; columns: with that {what} in this layer alone; {better} is better"
        return Table("Sensitivity", columns, rows, [lead, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; levels are in the order of "levels"."""
        return {
            "base": self.base,
            "higher_is_better": self.higher_is_better,
            "levels": list(self.levels),
            "config": _describe(self.config),
            "layers": [
                {
                    "name": x.name,
                    "shape": list(x.shape),
                    "weights": x.weights,
                    "values": [x.values.get(level) for level in self.levels],
                    "left": [x.left.get(level) for level in self.levels],
                }
                for x in self.layers
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return str(self.table())


class ScanStopped(ValueError):
    """A scan that could not go on. `scan` holds what was measured until then."""

    def __init__(self, message: str, scan: Sensitivity) -> None:
        super().__init__(message)
        self.scan = scan


def sensitivity(
    model: nn.Module,
    measure: Measure,
    *,
    levels: Sequence[float] = LEVELS,
    config: Magnitude | Neurons | None = None,
    higher_is_better: bool = False,
    filter_fn: _select.FilterFn | None = None,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    resume: str | os.PathLike[str] | None = None,
) -> Sensitivity:
    """What the model is worth with one layer pruned at a time, for each layer and each sparsity.

    Every measurement is made on a copy of the model of its own, so `measure` may do with it what it likes (train it for
    a few steps, too). A bar on standard error counts them.

    Args:
        model: with Linear or Conv2d layers; left as it is. Masks that are there stay.
        measure: `measure(model) -> number`, or `(data, loss_fn)`: batches `inputs` or `(inputs, *targets)`, read once
            for every measurement, and the mean over batches of `loss_fn(output, *targets)` in eval mode.
        levels: sparsities to try, in [0, 1).
        config: what is pruned and by which importance: `Magnitude` (weights, blocks, rows, columns) or `Neurons`, for
            which levels are ratios, and a layer stands for all that are tied to it. Its own sparsity is not used. None:
            `Magnitude`, single weights.
        higher_is_better: True where `measure` is an accuracy rather than a loss.
        filter_fn: `filter_fn(module, name) -> bool`; layers for which it is false are not scanned.
        data: for importances that need it: an iterable that can be read many times.
        example_inputs: for `Neurons`, as `prune_` takes them.
        resume: a JSON file; what it holds is not measured again, and each new measurement is written to it at once.

    Returns:
        The scan, for `allocate`; prints as a table.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: levels out of range; a model with nothing to prune, or that cannot be copied; `resume` is damaged or
            belongs to another model, configuration or measure (which shows in another value for the unpruned model).
        ScanStopped: a `ValueError`: the measure is not finite, or its data ended early. `error.scan` and the file have
            what was measured before.
    """
    chosen = Magnitude(0.0) if config is None else config
    if not isinstance(chosen, (Magnitude, Neurons)):
        raise TypeError(f"config: expected Magnitude or Neurons, got {chosen!r}")
    tried = _check_levels(levels)
    number = number_of(measure)
    named = _select.resolve(model, chosen, filter_fn, types=MASKABLE)
    for name, layer, _ in named:
        check_weight(name, layer)
    if not named:
        raise ValueError("model: expected a Linear or Conv2d layer to prune, got none")
    known = _Kept(resume, "sensitivity", {
        "model": _fingerprint(model), "config": _describe(chosen), "higher_is_better": bool(higher_is_better),
    })  # fmt: skip
    base = finite(number(_copy(model)), "of the model as it is")
    known.same("base", base)
    scan = Sensitivity([], base, tried, chosen, bool(higher_is_better))
    try:
        for name, level in shown([(n, s) for n, _, _ in named for s in tried], "sensitivity", len(named) * len(tried)):
            _measure_one(model, name, level, scan, number, known, data, example_inputs)
    except _Unusable as error:
        done = sum(len(layer.values) for layer in scan.layers)
        where = f", in {known.path}" if known.path else ""
        raise ScanStopped(
            f"{error}; {done} of {len(named) * len(tried)} measurements are kept{where}", scan
        ) from error.__cause__
    if isinstance(chosen, Neurons):
        _leave_out_what_stays(scan)
    return scan


class _Unusable(ValueError):
    """The measure gave nothing to go on with."""


def _measure_one(
    model: nn.Module,
    name: str,
    level: float,
    scan: Sensitivity,
    number: Any,
    known: _Kept,
    data: Iterable[Any] | None,
    example_inputs: Any,
) -> None:
    """One layer at one level: measured, or read from the file, and put into the scan."""
    if not scan.layers or scan.layers[-1].name != name:
        layer = model.get_submodule(name)
        scan.layers.append(LayerSensitivity(name, tuple(unmasked_weight(layer).shape), nonzeros(layer)))
    row = scan.layers[-1]
    found = known.get(name, level)
    if found is None:
        trial = _copy(model)
        wanted: dict[str, Any]
        if isinstance(scan.config, Neurons):
            # of layers tied together the first says how many neurons go: the others must not be left out
            wanted = {_select.literal(name): replace(scan.config, ratio=level), "*": replace(scan.config, ratio=0.0)}
            report = prune_(trial, wanted, example_inputs=example_inputs, data=data)
            left = report.parameters_after
        else:
            wanted = {_select.literal(name): replace(scan.config, sparsity=level)}
            prune_(trial, wanted, data=data)
            left = nonzeros(trial.get_submodule(name))
        where = f"with layer {name!r} at {level:.4g}"
        try:
            found = finite(number(trial), where), left
        except ValueError as error:
            if not str(error).startswith("measure: "):  # of the user's own measure
                raise
            raise _Unusable(str(error)) from error
        known.put(name, level, *found)
    row.values[level], row.left[level] = found


def _leave_out_what_stays(scan: Sensitivity) -> None:
    """Takes the layers out of a scan of neurons that lost none at any ratio."""
    most = max(max(layer.left.values()) for layer in scan.layers)
    stays = [layer for layer in scan.layers if max(scan.levels) > 0 and min(layer.left.values()) == most]
    if stays and len(stays) < len(scan.layers):
        names = ", ".join(repr(layer.name) for layer in stays)
        scan.notes.append(f"no neurons of their own to lose, or tied to a layer before them: {names}")
        scan.layers = [layer for layer in scan.layers if layer not in stays]


def _check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    if isinstance(levels, (str, int, float)) or not isinstance(levels, (Sequence, np.ndarray)) or len(levels) == 0:
        raise ValueError(f"levels: expected at least one sparsity in [0, 1), got {levels!r}")
    for level in levels:
        check_fraction("levels", level)
    return tuple(sorted({float(level) for level in levels}))


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"model: cannot be copied to be pruned: {error}") from error


def _how(config: Magnitude) -> str:
    by = "" if config.importance is None else f", by {_who(config.importance)}"
    return config.describe() + by


def _who(importance: str | Importance) -> str:
    return importance if isinstance(importance, str) else type(importance).__name__


def _describe(config: Magnitude | Neurons) -> dict[str, Any]:
    """What a scan depends on, JSON-ready; functions by their name."""
    shared = {
        "importance": None if config.importance is None else _who(config.importance),
        "loss_fn": getattr(config.loss_fn, "__qualname__", type(config.loss_fn).__name__),
        "seed": config.seed,
        "batches": config.batches,
        "scope": config.scope,
    }
    if isinstance(config, Neurons):
        own = {"min_neurons": config.min_neurons, "round_to": config.round_to, "ignore": list(config.ignore)}
        return {"kind": "Neurons", **shared, **own}
    return {"kind": "Magnitude", **shared, "granularity": config.describe(), "norm": config.norm}


def _fingerprint(model: nn.Module) -> str:
    """Changes with any name, shape or value of the model's state."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()[:16]


# --- what is kept on disk ---------------------------------------------------------------------------------------------


class _Kept:
    """Pairs of numbers by layer and level, in a JSON file that is written after each new one; or nowhere."""

    def __init__(self, path: str | os.PathLike[str] | None, kind: str, config: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.state: dict[str, Any] = {"kind": kind, "version": 1, "config": dict(config), "found": {}}
        if self.path is None or not self.path.exists():
            return
        state = self._read(self.path)
        if state["kind"] != kind:
            raise ValueError(f"resume: {str(self.path)!r} holds a {state['kind']}, expected a {kind}")
        for key, value in json.loads(json.dumps(config)).items():
            other = state["config"].get(key)
            if other != value:
                raise ValueError(
                    f"resume: {str(self.path)!r} is of another {key} (there: {other!r}, now: {value!r}); "
                    "name another file, or remove it to begin anew"
                )
        self.state = state

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            whole = isinstance(state["kind"], str) and isinstance(state["config"], dict) and state["version"] == 1
            for levels in state["found"].values():
                for level, pair in levels.items():
                    first, second = pair
                    whole &= bool(np.isfinite([float(level), float(first), float(second)]).all())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"resume: {str(path)!r} is damaged or no such file: {error}; remove it to begin anew"
            ) from error
        if not whole:
            raise ValueError(f"resume: {str(path)!r} is damaged or no such file; remove it to begin anew")
        return state

    def same(self, key: str, value: float) -> None:
        """Keeps a number that must be the same when work goes on (but for rounding)."""
        before = self.state.get(key, value)
        if not isinstance(before, (int, float)) or not np.isclose(before, value, rtol=1e-4, atol=1e-7):
            raise ValueError(
                f"resume: {str(self.path)!r} is of another measure or other data: {key} was {before!r} there, it is "
                f"{value!r} now; name another file, or remove it to begin anew"
            )
        self.state.setdefault(key, value)

    def get(self, name: str, level: float) -> tuple[float, int] | None:
        found = self.state["found"].get(name, {}).get(repr(level))
        return None if found is None else (float(found[0]), int(found[1]))

    def put(self, name: str, level: float, first: float, second: int) -> None:
        self.state["found"].setdefault(name, {})[repr(level)] = [first, second]
        if self.path is None:
            return
        text = json.dumps(self.state, indent=1)
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# --- what layers take -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerLatency:
    """One layer of `LatencyTable`; seconds of all its calls in one run of the model.

    Attributes:
        name: in the model.
        dense: before pruning.
        seconds: by sparsity, in the format that `pack_` would choose for it; dense where none is faster.
        formats: by sparsity, which format that is.
    """

    name: str
    dense: float
    seconds: dict[float, float] = field(default_factory=dict)
    formats: dict[float, str] = field(default_factory=dict)


@dataclass
class LatencyTable:
    """What `time_layers` found; prints as a table.

    Attributes:
        layers: in the model's order.
        levels: the sparsities timed.
        threads: of torch.
    """

    layers: list[LayerLatency]
    levels: tuple[float, ...]
    threads: int

    @property
    def dense(self) -> float:
        """Seconds of all layers before pruning."""
        return sum(layer.dense for layer in self.layers)

    def table(self) -> Table:
        """One row per layer: time and format at each sparsity."""
        rows: list[list[object]] = []
        for x in self.layers:
            timed = [f"{format_seconds(x.seconds[s])} {x.formats[s]}" for s in self.levels]
            rows.append([x.name or "(model)", format_seconds(x.dense), *timed])
        notes = [f"{self.threads} thread{'s' if self.threads != 1 else ''}; in the format that pack_ would choose"]
        return Table("Time per layer", ["layer", "dense", *(f"{s:.4g}" for s in self.levels)], rows, notes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; levels are in the order of "levels"."""
        return {
            "levels": list(self.levels),
            "threads": self.threads,
            "layers": [
                {
                    "name": x.name,
                    "dense": x.dense,
                    "seconds": [x.seconds[s] for s in self.levels],
                    "formats": [x.formats[s] for s in self.levels],
                }
                for x in self.layers
            ],
        }

    def __str__(self) -> str:
        return str(self.table())


def time_layers(
    model: nn.Module, scan: Sensitivity, example_inputs: Any, *, time_budget: float = 60.0
) -> LatencyTable:
    """Times the layers of a scan at each of its sparsities, each in the format that `pack_` would choose for it.

    Zeros are put where the magnitude is smallest, in the granularity of the scan; the inputs are those that the layer
    gets from `example_inputs`, all its calls together. Dense and packed take turns; a layer's time at a sparsity is its
    dense time, the median over all sparsities, divided by the speed-up measured at this one, so that a clock that
    changes between two races does not matter.

    Args:
        model: the one scanned; left as it is.
        scan: of `sensitivity`, with `Magnitude`.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        time_budget: seconds that it should take, about.

    Raises:
        TypeError: a scan of neurons, for which the layers after them change too.
        ValueError: inputs that do not fit, or a model without the scan's layers.
    """
    from slimtorch import packing  # it needs the masks of this package to be loaded first

    config = _magnitude_of(scan)
    packing._check_number("time_budget", time_budget)
    names = [layer.name for layer in _check_scan(model, scan).layers]
    times: dict[str, list[float]] = {name: [] for name in names}
    speedups: dict[str, dict[float, tuple[float, str]]] = {name: {} for name in names}
    args, kwargs = split_inputs(example_inputs)
    share = time_budget / (len(names) * len(scan.levels))
    for level in shown(scan.levels, "timing layers", len(scan.levels)):
        trial = _copy(model)
        smallest = replace(config, sparsity=level, importance=None, scope="layer")
        prune_(trial, smallest, filter_fn=lambda _, name: name in times)
        with eval_mode(trial), torch.no_grad():
            wanted = [(name, trial.get_submodule(name), ("auto", "sparse")) for name in names]
            seen = packing._capture(trial, [module for _, module, _ in wanted], args, kwargs)
            race = packing._Race("latency", 0.05, list(packing.BLOCK_SIZES))
            units, reports = packing._units(trial, wanted, seen)
            for unit in units:
                race.run(unit, share)
            for report in reports:
                layer = trial.get_submodule(report.name)
                timed = [t.latency for t in report.trials if t.latency is not None]
                # a layer of another class, or one that the inputs never reach, stays dense
                seconds = packing._judge(timed)[1][0] if timed else _time_dense(layer, seen[id(layer)])
                times[report.name].append(seconds)
                speedups[report.name][level] = (report.speedup, report.chosen)
    layers = []
    for name in names:
        # a layer that shares the weight of another is timed with it
        found = LayerLatency(name, statistics.median(times[name]) if times[name] else 0.0)
        for level in scan.levels:
            speedup, found.formats[level] = speedups[name].get(level, (1.0, "shared"))
            found.seconds[level] = found.dense / speedup
        layers.append(found)
    return LatencyTable(layers, scan.levels, torch.get_num_threads())


def _time_dense(layer: nn.Module, calls: Sequence[tuple[Tensor, int]]) -> float:
    if not calls:
        return 0.0

    def run() -> None:
        for x, n in calls:
            for _ in range(n):
                layer(x)

    return interleave({"dense": run}, samples=5, device=calls[0][0].device)["dense"].median


def _magnitude_of(scan: Sensitivity) -> Magnitude:
    if not isinstance(scan, Sensitivity):
        raise TypeError(f"scan: expected what slim.prune.sensitivity returns, got {type(scan).__name__}")
    if not isinstance(scan.config, Magnitude):
        raise TypeError(
            "scan: expected one with Magnitude, got one with Neurons: removing neurons changes what the next layer "
            "costs, so costs of layers do not add up"
        )
    return scan.config


def _check_scan(model: nn.Module, scan: Sensitivity) -> Sensitivity:
    layers = dict(_select.candidates(model, MASKABLE))
    for layer in scan.layers:
        shape = tuple(unmasked_weight(layers[layer.name]).shape) if layer.name in layers else None
        if shape != layer.shape:
            raise ValueError(f"scan: layer {layer.name!r} has shape {layer.shape} there, {shape} in the model")
        missing = [level for level in scan.levels if level not in layer.values]
        if missing:
            raise ValueError(f"scan: layer {layer.name!r} was not measured at {missing[0]:.4g}; finish the scan first")
    if not scan.layers:
        raise ValueError("scan: expected at least one layer, got none")
    return scan


# --- the budget -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """One layer of an `Allocation`.

    Attributes:
        name: in the model.
        sparsity: chosen; 0 leaves the layer as it is.
        cost: with that sparsity, in the budget's unit.
        dense: cost before pruning.
        harm: by how much the measure gets worse with this layer pruned alone.
    """

    name: str
    sparsity: float
    cost: float
    dense: float
    harm: float


class Allocation(dict[str, "Magnitude | None"]):
    """A configuration for `prune_`, layer by layer; prints as a table.

    Attributes:
        layers: the shares, in the model's order.
        budget: that was to be kept.
        unit: "parameters", "MACs" or "seconds".
        latencies: that were measured, where the unit is seconds; else None.
    """

    def __init__(
        self,
        configs: Mapping[str, Magnitude | None],
        layers: list[Share],
        budget: float,
        unit: str,
        latencies: LatencyTable | None = None,
    ) -> None:
        super().__init__(configs)
        self.layers = layers
        self.budget = budget
        self.unit = unit
        self.latencies = latencies

    @property
    def cost(self) -> float:
        """Of all layers as chosen, in the unit; at most the budget."""
        return sum(layer.cost for layer in self.layers)

    @property
    def harm(self) -> float:
        """The sum that was minimised."""
        return sum(layer.harm for layer in self.layers)

    def sparsity(self, name: str) -> float:
        """Chosen for the layer of that name; KeyError where there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer.sparsity
        raise KeyError(name)

    def table(self) -> Table:
        """One row per layer: sparsity, cost before and after, what it adds to the loss."""
        show = format_seconds if self.unit == "seconds" else format_number
        rows: list[list[object]] = [
            [x.name or "(model)", f"{x.sparsity:.2%}", show(x.dense), show(x.cost), f"{x.harm:.2e}"]
            for x in self.layers
        ]
        dense = sum(x.dense for x in self.layers)
        rows.append(["total", "", show(dense), show(self.cost), f"{self.harm:.2e}"])
        notes = [f"{show(self.cost)} of the {show(self.budget)} {self.unit} that were allowed"]
        columns = ["layer", "sparsity", f"{self.unit} dense", "left", "harm alone"]
        return Table("Budget by sensitivity", columns, rows, notes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layers = [
            {"name": x.name, "sparsity": x.sparsity, "cost": x.cost, "dense": x.dense, "harm": x.harm}
            for x in self.layers
        ]
        latencies = None if self.latencies is None else self.latencies.to_dict()
        return {"layers": layers, "budget": self.budget, "unit": self.unit, "cost": self.cost, "latencies": latencies}

    def __str__(self) -> str:
        return str(self.table())


def allocate(
    model: nn.Module,
    scan: Sensitivity,
    *,
    parameters: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    example_inputs: Any = None,
    latencies: LatencyTable | None = None,
    time_budget: float = 60.0,
) -> Allocation:
    """Sparsities per layer that fit a budget over all layers scanned and do least harm by the scan.

    What layers add to the measure is taken to add up. Each layer may stay as it is, take a sparsity of the scan or, for
    parameters and MACs, one of nine between two of them, its harm interpolated over the weights left; none goes beyond
    the largest that was tried. Among all combinations the best is found by dynamic programming over the Pareto front of
    (cost, harm): exactly for few layers, within a fraction layers / 5,000 of the budget for many.

    Exactly one budget, of the weights of the scanned layers (no biases, no other layers) as they are after `prune_`:

    Args:
        model: the one scanned; left as it is.
        scan: of `sensitivity`, with `Magnitude`, complete.
        parameters: nonzero weights. `0.1 * scan.weights` is a tenth of what there was.
        macs: multiply-accumulates of nonzero weights on `example_inputs`.
        latency: seconds on `example_inputs`, measured, each layer in the format that `pack_` would choose; torch's
            number of threads is that of now.
        example_inputs: for `macs` and `latency`: a tensor, a tuple of positional arguments or a dict of keywords.
        latencies: what `time_layers` measured before, with the same scan; None measures now (`Allocation.latencies`
            then has it).
        time_budget: seconds for measuring latencies.

    Returns:
        A mapping from layer name to `Magnitude` (None: leave alone) for `prune_`; prints as a table.

    Raises:
        TypeError: an argument of the wrong kind, or a scan of neurons.
        ValueError: not exactly one budget; one that cannot be met, with the smallest that can; a scan that is not
            complete or of another model; inputs missing or not fitting.
    """
    config = _magnitude_of(scan)
    _check_scan(model, scan)
    given = {"parameters": parameters, "macs": macs, "latency": latency}
    chosen = [(name, value) for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"parameters, macs, latency: expected exactly one of them, got {len(chosen)}")
    kind, budget = chosen[0]
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"{kind}: expected a number, got {budget!r}")
    if not (np.isfinite(budget) and budget > 0):
        raise ValueError(f"{kind}: expected a finite number above 0, got {budget!r}")
    if latencies is not None and kind != "latency":
        raise ValueError(f"latencies: expected none with a budget of {kind}")
    if kind == "parameters" and example_inputs is not None:
        raise ValueError("example_inputs: expected none with a budget of parameters")
    if example_inputs is None and (kind == "macs" or (kind == "latency" and latencies is None)):
        raise ValueError(f"example_inputs: expected inputs of the model with a budget of {kind}, got None")

    options: list[list[tuple[float, float, float]]]  # per layer: sparsity, cost, harm
    if kind == "latency":
        if latencies is None:
            latencies = time_layers(model, scan, example_inputs, time_budget=time_budget)
        options = _timed(scan, latencies)
    else:
        per_weight = {layer.name: 1.0 for layer in scan.layers}
        if kind == "macs":
            args, kwargs = split_inputs(example_inputs)
            with eval_mode(model), torch.inference_mode():
                counts = _count_macs(model, args, kwargs)
            modules = dict(model.named_modules())
            for name in per_weight:
                dense, _ = counts.get(name, (0, 0))
                per_weight[name] = dense / max(1, unmasked_weight(modules[name]).numel())
        options = [
            [(sparsity, left * per_weight[layer.name], harm) for sparsity, left, harm in _curve(layer, scan, model)]
            for layer in scan.layers
        ]
    costs = [[cost for _, cost, _ in layer] for layer in options]
    harms = [[harm for _, _, harm in layer] for layer in options]
    try:
        picks = least_loss(costs, harms, budget)
    except ValueError as error:
        raise ValueError(
            f"{kind}: expected at least {sum(map(min, costs)):.6g}, what the largest sparsities tried leave, "
            f"got {budget:.6g}"
        ) from error
    shares = [
        Share(layer.name, found[pick][0], found[pick][1], dense=found[0][1], harm=found[pick][2])
        for layer, found, pick in zip(scan.layers, options, picks, strict=True)
    ]
    configs = {
        _select.literal(share.name): replace(config, sparsity=share.sparsity, scope="layer") if share.sparsity else None
        for share in shares
    }
    unit = {"parameters": "parameters", "macs": "MACs", "latency": "seconds"}[kind]
    return Allocation(configs, shares, float(budget), unit, latencies)


def _curve(layer: LayerSensitivity, scan: Sensitivity, model: nn.Module) -> list[tuple[float, int, float]]:
    """(sparsity, weights left, harm): as it is, what was measured, and, for single weights, nine between two of those.

    Of blocks, rows and columns at the edges some are smaller: what is left in between is not known beforehand.
    """
    harm = scan.harm(layer.name)
    points = [(0.0, layer.weights, 0.0), *((s, layer.left[s], harm[s]) for s in scan.levels if s > 0)]
    if scan.config.granularity != "weight":  # type: ignore[union-attr]
        return points
    size = unmasked_weight(model.get_submodule(layer.name)).numel()
    curve = points[:1]
    for (s0, left0, harm0), (s1, left1, harm1) in itertools.pairwise(points):
        for step in range(1, _BETWEEN + 1):
            sparsity = s0 + (s1 - s0) * step / (_BETWEEN + 1)
            left = min(layer.weights, size - round(sparsity * size))  # zeros that are there already count
            if left1 < left < left0:
                curve.append((sparsity, left, harm0 + (harm1 - harm0) * (left0 - left) / (left0 - left1)))
        curve.append((s1, left1, harm1))
    return curve


def _timed(scan: Sensitivity, latencies: LatencyTable) -> list[list[tuple[float, float, float]]]:
    """(sparsity, seconds, harm) of each layer at the sparsities of the scan."""
    if not isinstance(latencies, LatencyTable):
        raise TypeError(f"latencies: expected what slim.prune.time_layers returns, got {type(latencies).__name__}")
    if [x.name for x in latencies.layers] != [x.name for x in scan.layers] or latencies.levels != scan.levels:
        raise ValueError("latencies: expected the layers and sparsities of the scan, got others")
    options: list[list[tuple[float, float, float]]] = []
    for layer in latencies.layers:
        harm = scan.harm(layer.name)
        options.append([(0.0, layer.dense, 0.0), *((s, layer.seconds[s], harm[s]) for s in scan.levels if s > 0)])
    return options
