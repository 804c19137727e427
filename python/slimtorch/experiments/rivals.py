# SPDX-License-Identifier: Apache-2.0
"""The dense code that a pruned network has to beat."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import mkldnn

from slimtorch.dynamic import EarlyExit
from slimtorch.measure import Latency

TORCH, ONEDNN, FROZEN = "torch", "oneDNN", "frozen"


Way = Callable[[torch.Tensor], torch.Tensor]


def dense_ways(model: nn.Module, x: torch.Tensor) -> dict[str, Way]:
    """Ways to run ``model`` densely on inputs like ``x`` (CPU, float32), by name; each takes one and gives the output.

    - ``torch``: the module as it is.
    - ``oneDNN``: ``torch.utils.mkldnn.to_mkldnn``, weights prepacked; converting input and output is inside.
    - ``frozen``: ``torch.jit.optimize_for_inference``, which also fuses and saves Python's share.

    A way that cannot run this model, or whose output differs, is left out; ``torch`` is always there.
    """
    model = copy.deepcopy(model).eval()
    ways: dict[str, Way] = {TORCH: model}
    for name, convert in ((ONEDNN, _onednn), (FROZEN, _frozen)):
        way = _converted(convert, model, x)
        if way is not None:
            ways[name] = way
    return ways


def dense_rivals(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """`dense_ways` on ``x`` itself: callables that give the output."""
    return {name: functools.partial(way, x) for name, way in dense_ways(model, x).items()}


def frozen(model: nn.Module, x: torch.Tensor) -> Way | None:
    """``model`` (packed or dense) as frozen TorchScript for inputs like ``x``; None where that cannot be or differs."""
    return _converted(_frozen, model, x)


def _converted(convert: Callable[[nn.Module, torch.Tensor], Way], model: nn.Module, x: torch.Tensor) -> Way | None:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both converters announce their age on every call
        expected = model(x)
        try:
            way = convert(model, x)
            result = way(x)
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        same = torch.allclose(result, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    return way if same else None


def _onednn(model: nn.Module, x: torch.Tensor) -> Way:
    converted = mkldnn.to_mkldnn(copy.deepcopy(model))
    return lambda x: converted(x.to_mkldnn()).to_dense()


def _frozen(model: nn.Module, x: torch.Tensor) -> Way:
    made: Way = torch.jit.optimize_for_inference(torch.jit.trace(model, x))
    return made


def frozen_segments(model: EarlyExit, x: torch.Tensor) -> list[Callable[[Any], Any]]:
    """Each segment of a network with exits as frozen TorchScript, for `EarlyExit.with_segments`.

    Raises:
        RuntimeError, TypeError, NotImplementedError: a segment that cannot be.
    """
    found: list[Callable[[Any], Any]] = []
    state: Any = x
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter announces its age
        for number, segment in enumerate(model.segments()):
            found.append(torch.jit.optimize_for_inference(torch.jit.trace(segment.eval(), (state,), check_trace=False)))
            if number < len(model.heads):
                state = segment.stage(state)
    return found


def best_dense(latencies: Mapping[str, Latency]) -> float:
    """Median seconds of the fastest dense rival among ``latencies``."""
    return min(latency.median for name, latency in latencies.items() if name in (TORCH, ONEDNN, FROZEN))
