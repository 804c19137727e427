# SPDX-License-Identifier: Apache-2.0
"""What a model costs: parameters, bytes, multiply-accumulates and measured latency.

:func:`measure` describes one model; :func:`interleave` times any number of callables side by side, which is how every
comparison in this package is made: rivals that take turns see the same clock frequency and the same neighbours.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from slimtorch.report import Table, format_bytes, format_seconds

MIN_SAMPLE_SECONDS = 3e-3  # short calls repeat until one sample lasts this long: far above the clock's own noise

_DENSE_LINEAR = (nn.Linear,)
_DENSE_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# --- latency ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: the median and the 10th and 90th percentile of ``samples`` samples.

    Each sample is the mean of ``calls`` calls in a row.
    """

    median: float
    p10: float
    p90: float
    samples: int
    calls: int

    def __str__(self) -> str:
        return f"{format_seconds(self.median)} ({format_seconds(self.p10)} - {format_seconds(self.p90)})"


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    samples: int = 15,
    min_sample_seconds: float = MIN_SAMPLE_SECONDS,
    device: torch.device | None = None,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Latency]:
    """Time several callables by turns: one sample of each, then the next round, ``samples`` rounds.

    Args:
        calls: name -> callable without arguments. Each is called at least twice before anything is timed.
        samples: rounds.
        min_sample_seconds: a sample repeats its call until it lasts about this long.
        device: where the callables run; on CUDA the time is taken with events on that device's current stream.
        on_round: told the number of rounds done after each one (progress bars).

    Raises:
        ValueError: ``samples`` below 1.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    timer = _timer(device)
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        timer(call, 1)  # the first call allocates, prepares primitives, may compile
        once = timer(call, 1)
        if once < min_sample_seconds:
            once = min(once, timer(call, 1), timer(call, 1))
        repeats[name] = max(1, math.ceil(min_sample_seconds / max(once, 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(samples):
        for name, call in calls.items():
            taken[name].append(timer(call, repeats[name]) / repeats[name])
        if on_round is not None:
            on_round(index + 1)
    return {name: _latency(values, repeats[name]) for name, values in taken.items()}


def _latency(values: Sequence[float], calls: int) -> Latency:
    p10, median, p90 = (float(q) for q in np.percentile(values, (10, 50, 90)))
    return Latency(median, p10, p90, len(values), calls)


def _time_cpu(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) * 1e-9


def _timer(device: torch.device | None) -> Callable[[Callable[[], object], int], float]:
    """What times ``repeats`` calls in a row on a device, in seconds."""
    if device is None or device.type != "cuda":
        return _time_cpu
    return functools.partial(_time_cuda, device)


def _time_cuda(device: torch.device, call: Callable[[], object], repeats: int) -> float:
    with torch.cuda.device(device):  # events are recorded on the current device's stream
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()  # nothing of others is left in the queue
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


@contextlib.contextmanager
def threads_of_torch(threads: int | None) -> Iterator[int]:
    """torch's thread count set to ``threads`` inside the ``with`` and as before after it; None leaves it."""
    before = torch.get_num_threads()
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int):
            raise TypeError(f"threads: expected an int or None, got {threads!r}")
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        if threads is not None:
            torch.set_num_threads(before)


# --- a model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCost:
    """One layer with parameters of its own.

    ``macs_dense`` is what a dense layer of this shape needs on these inputs, ``macs`` what this layer really executes
    (a masked dense layer executes them all); both are 0 for layers that multiply no matrix and for layers that the
    inputs never reached.
    """

    name: str
    kind: str
    parameters: int
    nonzero: int
    nbytes: int
    macs_dense: int
    macs: int


@dataclass(frozen=True)
class Measurement:
    """What :func:`measure` found. Bytes are bytes, latencies seconds, MACs those of one call on the given inputs.

    ``parameters`` counts what is stored (a packed layer stores its kept values only), ``nonzero`` those of them that
    are not zero after masks. ``bytes_memory`` are parameters, buffers and index arrays; ``bytes_prepacked`` what
    kernels derived from them and keep beside; ``bytes_disk`` the ``state_dict`` in the safetensors layout.
    """

    parameters: int
    nonzero: int
    bytes_memory: int
    bytes_prepacked: int
    bytes_disk: int
    macs_dense: int
    macs: int
    latency: Latency
    device: str
    threads: int
    layers: list[LayerCost]

    def table(self) -> Table:
        rows: list[list[object]] = [
            [c.name or "(model)", c.kind, c.parameters, c.nonzero, format_bytes(c.nbytes), c.macs_dense, c.macs]
            for c in self.layers
        ]
        total: list[object] = ["total", "", self.parameters, self.nonzero]
        rows.append([*total, format_bytes(self.bytes_memory), self.macs_dense, self.macs])
        title = f"Measured on {self.device}, {self.threads} thread{'s' if self.threads != 1 else ''}"
        columns = ["layer", "kind", "stored", "nonzero", "memory", "MACs dense", "MACs run"]
        prepacked = f" + {format_bytes(self.bytes_prepacked)} prepacked" if self.bytes_prepacked else ""
        speed = f"latency: median {format_seconds(self.latency.median)}, p10 {format_seconds(self.latency.p10)}, "
        speed += (
            f"p90 {format_seconds(self.latency.p90)} ({self.latency.samples} samples of {self.latency.calls} calls)"
        )
        size = f"bytes: {format_bytes(self.bytes_memory)} in memory{prepacked}, {format_bytes(self.bytes_disk)} on disk"
        return Table(title, columns, rows, [speed, size])

    def __str__(self) -> str:
        return str(self.table())

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


def measure(
    model: nn.Module,
    example_inputs: Any,
    *,
    repeats: int = 30,
    threads: int | None = None,
) -> Measurement:
    """Parameters, bytes in memory and on disk, MACs, and latency (median and spread) of ``model``.

    The model runs in ``eval()`` under ``inference_mode``; its training flags, its gradients and torch's thread count
    are as before afterwards.

    MACs are counted on ``nn.Linear``, ``nn.Conv1d/2d/3d`` and this library's packed layers as they are called: matrix
    products outside such layers (attention scores, ``F.linear`` in a ``forward``) are not seen.

    Args:
        model: any module, a single layer too.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments, on the
            model's device.
        repeats: samples of the latency.
        threads: torch threads during the run; None leaves them as they are.

    Raises:
        TypeError: ``model`` is no module, ``repeats`` or ``threads`` no int.
        ValueError: ``repeats`` or ``threads`` below 1; the example inputs do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(repeats, bool) or not isinstance(repeats, int):
        raise TypeError(f"repeats: expected an int, got {repeats!r}")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    args, kwargs = split_inputs(example_inputs)
    device = device_of(model, args, kwargs)

    with threads_of_torch(threads) as used_threads, eval_mode(model), torch.inference_mode():
        macs = _count_macs(model, args, kwargs)
        latency = interleave({"model": lambda: model(*args, **kwargs)}, samples=repeats, device=device)["model"]

    layers: list[LayerCost] = []
    counted: set[int] = set()
    for name, module in _owners(model):
        if _stored(module) or name in macs:
            layers.append(_layer_cost(name, module, *macs.get(name, (0, 0)), counted))
    return Measurement(
        parameters=sum(layer.parameters for layer in layers),
        nonzero=sum(layer.nonzero for layer in layers),
        bytes_memory=memory_bytes(model),
        bytes_prepacked=prepacked_bytes(model),
        bytes_disk=disk_bytes(model.state_dict()),
        macs_dense=sum(layer.macs_dense for layer in layers),
        macs=sum(layer.macs for layer in layers),
        latency=latency,
        device=str(device),
        threads=used_threads,
        layers=layers,
    )


# --- the parts, for those who need one only -----------------------------------------------------------------------


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (positional, keyword) arguments: a tuple or list is several, a dict is keywords."""
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    return (example_inputs,), {}


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside the ``with``; each module's own training flag comes back after it."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def count_macs(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """(MACs of the dense shapes, MACs that really run) of one call; layers and errors as in :func:`measure`."""
    args, kwargs = split_inputs(example_inputs)
    with eval_mode(model), torch.inference_mode():
        counts = _count_macs(model, args, kwargs).values()
    return sum(dense for dense, _ in counts), sum(run for _, run in counts)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(values stored, those of them that are not zero after masks); tied parameters count once."""
    counted: set[int] = set()
    costs = [_layer_cost(name, module, 0, 0, counted) for name, module in _owners(model)]
    return sum(cost.parameters for cost in costs), sum(cost.nonzero for cost in costs)


def memory_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers (values, index arrays, masks, statistics); shared tensors count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + _unregistered_bytes(
        model, canonical=True
    )


def prepacked_bytes(model: nn.Module) -> int:
    """Bytes that packed layers keep beside their canonical form because a kernel wants them in another order."""
    return _unregistered_bytes(model, canonical=False)


def disk_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of a ``state_dict`` in the safetensors layout; anything but tensors as ``torch.save`` writes it."""
    header: dict[str, object] = {}
    offset = 0
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in state.items() if name not in tensors}
    # safetensors writes the widest dtypes first; the order shows in the digits of the offsets
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        size = value.numel() * value.element_size()
        dtype = str(value.dtype).removeprefix("torch.").upper()
        short = {"FLOAT": "F", "BFLOAT": "BF", "INT": "I", "UINT": "U"}
        letters = dtype.rstrip("0123456789")
        header[name] = {
            "dtype": short.get(letters, letters) + dtype[len(letters) :],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = len(json.dumps(header, separators=(",", ":")).encode())
    total = 8 + -(-text // 8) * 8 + offset
    if rest:
        buffer = io.BytesIO()
        torch.save(rest, buffer)
        total += buffer.getbuffer().nbytes
    return total


# --- how it is counted --------------------------------------------------------------------------------------------


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own tensors; what lies inside a parametrization counts for the layer that it parametrizes."""
    for name, module in model.named_modules():
        if "parametrizations" not in name.split("."):
            yield name, module


def _format_of(module: nn.Module) -> Any | None:
    """The format object of a packed layer: something with ``to_dense``, ``density`` and ``shape``; else None."""
    held = getattr(module, "format", None)
    return held if all(hasattr(held, name) for name in ("to_dense", "density", "shape")) else None


def _stored(module: nn.Module) -> list[torch.Tensor]:
    """The trainable numbers that a module itself stores."""
    tensors: list[torch.Tensor] = [parameter for _, parameter in module.named_parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        tensors += module.parametrizations.parameters()  # type: ignore[union-attr]
    values = getattr(_format_of(module), "values", None)
    if isinstance(values, torch.Tensor) and all(tensor.data_ptr() != values.data_ptr() for tensor in tensors):
        tensors.append(values)
    return tensors


def _layer_cost(name: str, module: nn.Module, macs_dense: int, macs: int, counted: set[int]) -> LayerCost:
    parameters = nonzero = 0
    fresh = [tensor for tensor in _stored(module) if id(tensor) not in counted]
    counted.update(id(tensor) for tensor in fresh)
    parameters = sum(tensor.numel() for tensor in fresh)
    nonzero = sum(int(torch.count_nonzero(tensor.detach())) for tensor in fresh)
    if fresh and parametrize.is_parametrized(module):
        for tensor_name, entry in module.parametrizations.items():  # type: ignore[union-attr,operator]
            originals = list(entry.parameters())
            nonzero -= sum(int(torch.count_nonzero(tensor.detach())) for tensor in originals)
            nonzero += int(torch.count_nonzero(getattr(module, tensor_name).detach()))
    buffers = list(module.buffers(recurse=False))
    if parametrize.is_parametrized(module):
        buffers += module.parametrizations.buffers()  # type: ignore[union-attr]
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in [*fresh, *buffers])
    return LayerCost(
        name, type(module).__name__.removeprefix("Parametrized"), parameters, nonzero, nbytes, macs_dense, macs
    )


def _unregistered_bytes(model: nn.Module, *, canonical: bool) -> int:
    """Bytes of tensors that packed layers' formats hold without the module having registered them."""
    seen = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    total = 0
    for module in model.modules():
        held = _format_of(module)
        if held is None:
            continue
        for value in vars(held).values():
            direct = isinstance(value, torch.Tensor)
            candidates = [value] if direct else list(value.values()) if isinstance(value, dict) else []
            # the copy of the values in a plan's order hangs on the plan: (values, version, copy)
            candidates += [plan.slimtorch_packed[2] for plan in candidates if hasattr(plan, "slimtorch_packed")]
            for tensor in candidates:
                if isinstance(tensor, torch.Tensor) and direct == canonical and tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    total += tensor.numel() * tensor.element_size()
    return total


def _count_macs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Name of each layer that multiplied a matrix -> (MACs of its dense shape, MACs that ran) in one call."""
    counts: dict[str, tuple[int, int]] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle | None:
        held = _format_of(module)
        if held is not None:
            weights, out = math.prod(held.shape), held.shape[0]
            run = round(held.density * weights)
        elif isinstance(module, (*_DENSE_LINEAR, *_DENSE_CONV)):
            weights = run = module.weight.numel()
            out = module.weight.shape[0]
        elif isinstance(used := getattr(module, "used_shape", None), tuple):  # slimmable: the corner that runs
            weights, out = math.prod(used), used[0]
            run = weights
        else:
            return None

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            positions = output.numel() // max(1, out)
            dense, real = counts.get(name, (0, 0))
            counts[name] = (dense + positions * weights, real + positions * run)

        return module.register_forward_hook(hook)

    handles = [handle for name, module in _owners(model) if (handle := watch(name, module)) is not None]
    try:
        model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        given = ", ".join(_describe(value) for value in (*args, *kwargs.values()))
        raise ValueError(f"example_inputs: the model cannot run on {given}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def device_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where the model runs: where a GPU is among its tensors, there (a stray input may lie on the CPU)."""
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    devices = [tensor.device for tensor in (*inputs, *model.parameters(), *model.buffers())]
    return next((d for d in devices if d.type != "cpu"), devices[0] if devices else torch.device("cpu"))
