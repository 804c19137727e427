# SPDX-License-Identifier: Apache-2.0
"""What convolutions really get: mean and second moment of the patches under their kernels.

They are all that least squares needs: for weights W and W' the mean squared difference of the outputs is
trace((W - W') S (W - W')ᵀ), S the second moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch._progress import shown
from slimtorch.measure import eval_mode
from slimtorch.prune.importance import call, usable

_CHUNK = 2**23  # numbers in the patches that are made at once
_TOGETHER = 2**26  # numbers in the moments that one pass over the data gathers: half a gigabyte


@dataclass
class Moments:
    """Of patches p [in_channels · kernel height · width], in the order of a weight's row; float64.

    Attributes:
        mean: E[p].
        second: E[p pᵀ].
        count: patches seen.
    """

    mean: Tensor
    second: Tensor
    count: int = 0

    @property
    def covariance(self) -> Tensor:
        return self.second - torch.outer(self.mean, self.mean)


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """[N, C, H, W] or [C, H, W] → [positions, in_channels · kernel height · width]; padded as the layer does."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = (tuple(v) for v in (module.kernel_size, module.dilation, module.stride))
    return F.unfold(x, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def moments_of(model: nn.Module, layers: Sequence[tuple[str, nn.Conv2d]], data: Iterable[Any]) -> dict[str, Moments]:
    """Moments of the inputs of convolutions by name; a layer that no batch reaches has none.

    Args:
        model: run in eval mode, without gradients.
        layers: convolutions of it without groups.
        data: batches `inputs` or `(inputs, *targets)`; gone through several times where the layers are large.

    Raises:
        TypeError: `data` cannot be iterated.
        ValueError: no batch, one that does not fit the model, or activations that are not finite.
    """
    if not isinstance(data, Iterable):
        raise TypeError(f"data: expected an iterable of batches, got {type(data).__name__}")
    groups = _groups(layers)
    if isinstance(data, Iterator) and len(groups) > 1:
        data = list(data)
    found: dict[str, Moments] = {}
    for group in groups:
        found |= _one_pass(model, group, data)
    for name, moments in found.items():
        if not bool(torch.isfinite(moments.second).all()):
            raise ValueError(f"data: the inputs of layer {name!r} are not all finite")
    return found


def _groups(layers: Sequence[tuple[str, nn.Conv2d]]) -> list[list[tuple[str, nn.Conv2d]]]:
    groups: list[list[tuple[str, nn.Conv2d]]] = []
    room = 0
    for name, module in layers:
        size = module.weight[0].numel() ** 2
        if not groups or size > room:
            groups.append([])
            room = _TOGETHER
        groups[-1].append((name, module))
        room -= size
    return groups


def _one_pass(model: nn.Module, layers: Sequence[tuple[str, nn.Conv2d]], data: Iterable[Any]) -> dict[str, Moments]:
    found: dict[str, Moments] = {}

    def watch(name: str, module: nn.Conv2d) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            width = module.weight[0].numel()
            if name not in found:
                zeros = torch.zeros(width, width, dtype=torch.float64, device=x.device)
                found[name] = Moments(zeros[0].clone(), zeros)
            own = found[name]
            x = x if x.dim() == 4 else x.unsqueeze(0)
            per_image = max(1, width * x.shape[2] * x.shape[3])
            for part in x.split(max(1, _CHUNK // per_image)):
                rows = patches(module, part).double()
                own.mean += rows.sum(0)
                own.second += rows.T @ rows
                own.count += len(rows)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name, module) for name, module in layers]
    seen = 0
    try:
        with eval_mode(model), torch.no_grad():
            for batch in shown(data, "inputs of layers"):
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                try:
                    call(model, usable(inputs))
                except (RuntimeError, TypeError, ValueError, IndexError) as error:
                    raise ValueError(f"data: a batch does not fit the model: {error}") from error
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("data: expected at least one batch, got none")
    found = {name: own for name, own in found.items() if own.count}
    for own in found.values():
        own.mean /= own.count
        own.second /= own.count
    return found
