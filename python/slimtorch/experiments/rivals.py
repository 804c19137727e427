# SPDX-License-Identifier: Apache-2.0
"""The dense code that a pruned network has to beat."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import mkldnn

from slimtorch.dynamic import EarlyExit
from slimtorch.measure import Latency

TORCH, ONEDNN, FROZEN = "torch", "oneDNN", "frozen"


def dense_rivals(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to run ``model`` densely on ``x`` (CPU, float32), by name; each callable gives the output.

    - ``torch``: the module as it is.
    - ``oneDNN``: ``torch.utils.mkldnn.to_mkldnn``, weights prepacked; converting ``x`` and the output is inside.
    - ``frozen``: ``torch.jit.optimize_for_inference``, which also fuses and saves Python's share.

    A rival that cannot run this model, or whose output differs, is left out; ``torch`` is always there.
    """
    model = copy.deepcopy(model).eval()
    calls: dict[str, Callable[[], torch.Tensor]] = {TORCH: lambda: model(x)}
    for name, convert in ((ONEDNN, _onednn), (FROZEN, _frozen)):
        call = _converted(convert, model, x)
        if call is not None:
            calls[name] = call
    return calls


def frozen(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """``model`` (packed or dense) as frozen TorchScript run on ``x``; None where that cannot be or differs."""
    return _converted(_frozen, model, x)


def _converted(
    convert: Callable[[nn.Module, torch.Tensor], Callable[[], torch.Tensor]], model: nn.Module, x: torch.Tensor
) -> Callable[[], torch.Tensor] | None:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both converters announce their age on every call
        expected = model(x)
        try:
            call = convert(model, x)
            result = call()
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        same = torch.allclose(result, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    return call if same else None


def _onednn(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    converted = mkldnn.to_mkldnn(copy.deepcopy(model))
    return lambda: converted(x.to_mkldnn()).to_dense()


def _frozen(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    traced = torch.jit.optimize_for_inference(torch.jit.trace(model, x))
    return lambda: traced(x)


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
