# SPDX-License-Identifier: Apache-2.0
"""What layers really get: mean and second moment of their rows, or of the patches under their kernels.

They are all that least squares needs: for weights W and W' the mean squared difference of the outputs is
trace((W - W') S (W - W')ᵀ), S the second moment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch._progress import shown
from slimtorch.measure import eval_mode
from slimtorch.prune.importance import call, usable

Dense = nn.Linear | nn.Conv2d

_CHUNK = 2**23  # numbers in the patches that are made at once
_TOGETHER = 2**26  # numbers in the moments that one pass over the data gathers: half a gigabyte
_UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class Moments:
    """Of patches p [in_channels · kernel height · width], in the order of a weight's row, or of outputs W p; float64.

    Attributes:
        mean: E[p].
        covariance: E[(p - E[p]) (p - E[p])ᵀ], gathered without the mean, so that nothing cancels where that is large.
        count: patches seen.
    """

    mean: Tensor
    covariance: Tensor
    count: int = 0

    @property
    def second(self) -> Tensor:
        """E[p pᵀ]."""
        return torch.addr(self.covariance, self.mean, self.mean)

    def add(self, rows: Tensor) -> None:
        """More of them, [n, width], float64; `covariance` holds its sum until `finish`."""
        if not len(rows):
            return
        mean = rows.mean(0)
        rows = rows - mean
        self.covariance.addmm_(rows.T, rows)
        step, total = mean - self.mean, self.count + len(rows)
        self.covariance.addr_(step, step, alpha=self.count * len(rows) / total)
        self.mean += step * (len(rows) / total)
        self.count = total

    def finish(self) -> None:
        """After the last `add`."""
        self.covariance /= self.count


def patches(module: Dense, x: Tensor) -> Tensor:
    """[N, C, H, W] or [C, H, W] → [positions, in_channels · kernel height · width]; padded as the layer does.

    Of a linear layer [..., in_features] → [positions, in_features].
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    x = x if x.dim() == 4 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = (tuple(v) for v in (module.kernel_size, module.dilation, module.stride))
    return F.unfold(x, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def moments_of(
    model: nn.Module, layers: Sequence[tuple[str, Dense]], data: Iterable[Any], outputs: Collection[str] = ()
) -> Iterator[dict[str, Moments]]:
    """Moments of the inputs of layers by name, as many layers at a time as fit into half a gigabyte.

    Each dict has other layers; one that no batch reaches has no moments. Every dict takes a pass over the data.

    Args:
        model: run in eval mode, without gradients.
        layers: linear layers of it, and convolutions without groups.
        data: batches `inputs` or `(inputs, *targets)`; what can be gone through once is kept where that is not enough.
        outputs: names of layers of which to gather the moments of the outputs without bias, which are fewer numbers.

    Raises:
        TypeError: `data` cannot be iterated.
        ValueError: no batch, one that does not fit the model, or activations that are not finite.
    """
    if not isinstance(data, Iterable):
        raise TypeError(f"data: expected an iterable of batches, got {type(data).__name__}")
    groups = _groups(layers, outputs)
    if isinstance(data, Iterator) and len(groups) > 1:
        data = list(data)
    for group in groups:
        found = _one_pass(model, group, data, outputs)
        for name, moments in found.items():
            if not bool(torch.isfinite(moments.covariance).all()):
                raise ValueError(f"data: the inputs of layer {name!r} are not all finite")
        yield found


def passes(layers: Sequence[tuple[str, Dense]], outputs: Collection[str] = ()) -> int:
    """How many dicts `moments_of` gives."""
    return len(_groups(layers, outputs))


def _groups(layers: Sequence[tuple[str, Dense]], outputs: Collection[str]) -> list[list[tuple[str, Dense]]]:
    groups: list[list[tuple[str, Dense]]] = []
    room = 0
    for name, module in layers:
        size = (len(module.weight) if name in outputs else module.weight[0].numel()) ** 2
        if not groups or size > room:
            groups.append([])
            room = _TOGETHER
        groups[-1].append((name, module))
        room -= size
    return groups


def _one_pass(
    model: nn.Module, layers: Sequence[tuple[str, Dense]], data: Iterable[Any], outputs: Collection[str]
) -> dict[str, Moments]:
    found: dict[str, Moments] = {}

    def watch(name: str, module: Dense) -> torch.utils.hooks.RemovableHandle:
        weight = module.weight.detach().double().flatten(1) if name in outputs else None
        width = module.weight[0].numel()
        size = width if weight is None else len(weight)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if name not in found:
                zeros = torch.zeros(size, size, dtype=torch.float64, device=x.device)
                found[name] = Moments(zeros[0].clone(), zeros)
            own = found[name]
            if isinstance(module, nn.Linear):
                x = x.reshape(-1, width)
                per_image = width
            else:
                x = x if x.dim() == 4 else x.unsqueeze(0)
                per_image = max(1, width * x.shape[2] * x.shape[3])
            for part in x.split(max(1, _CHUNK // per_image)):
                rows = patches(module, part).double()
                own.add(rows if weight is None else rows @ weight.T)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name, module) for name, module in layers]
    seen = 0
    try:
        with eval_mode(model), torch.no_grad():
            for batch in shown(data, "inputs of layers"):
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                try:
                    call(model, usable(inputs))
                except _UNFIT as error:
                    raise ValueError(f"data: a batch does not fit the model: {error}") from error
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("data: expected at least one batch, got none")
    found = {name: own for name, own in found.items() if own.count}
    for own in found.values():
        own.finish()
    return found
