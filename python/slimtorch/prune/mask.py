# SPDX-License-Identifier: Apache-2.0
"""Masks as parametrizations: zeros that stay zero while the network trains.

A pruned layer keeps its dense weight as `parametrizations.weight.original`, which is the same `nn.Parameter` object as
before (an optimizer that holds it goes on working), beside a boolean `mask`. What the layer computes with is
`weight = where(mask, original, 0)`, so that a masked weight gets a gradient of zero and a NaN that drifts into one
cannot reach the output. Both tensors are in `state_dict`.

    layer.weight ──▶ Mask.forward(original) = where(mask, original, 0)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

MASKABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
"""The layers whose weights can be masked."""

_MASK_KEY = re.compile(r"^(?:(?P<name>.+)\.)?parametrizations\.weight\.\d+\.mask$")


class Mask(nn.Module):
    """The parametrization `weight = where(mask, original, 0)`.

    Args:
        mask: bool, the weight's shape; True where the weight is kept. Stored as the buffer `mask`.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, original: Tensor) -> Tensor:
        """`original`, any floating dtype, with zeros where the mask is False; same shape and dtype."""
        return torch.where(self.mask, original, original.new_zeros(()))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Lets `layer.weight = tensor` work: the mask still applies to the new weight. ValueError on another shape."""
        if weight.shape != self.mask.shape:
            raise ValueError(f"weight: expected shape {tuple(self.mask.shape)}, got {tuple(weight.shape)}")
        return weight

    def extra_repr(self) -> str:
        """Shape and share of zeros."""
        return f"shape={tuple(self.mask.shape)}, sparsity={1 - self.mask.float().mean().item():.4g}"


def mask_of(layer: nn.Module) -> Mask | None:
    """The layer's own `Mask`, or None where its weight is not masked."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    parametrizations = cast(nn.ModuleDict, layer.parametrizations)["weight"]
    for parametrization in cast(nn.ModuleList, parametrizations):
        if isinstance(parametrization, Mask):
            return parametrization
    return None


def unmasked_weight(layer: nn.Module) -> Tensor:
    """The weight that is trained, before its mask; `layer.weight` where there is no mask or it is not the only
    parametrization."""
    if mask_of(layer) is None or len(_all_of(layer)) > 1:
        return cast(Tensor, layer.weight)
    return cast(Tensor, cast(nn.Module, _all_of(layer)).original)


def nonzeros(layer: nn.Module) -> int:
    """How many weights of the layer are neither masked nor zero, without building the masked weight."""
    weight, mask = unmasked_weight(layer).detach(), mask_of(layer)
    if mask is None:
        return int(torch.count_nonzero(weight))
    rows = max(1, (1 << 18) // max(1, weight[:1].numel()))
    pairs = zip(torch.split(weight, rows), torch.split(mask.mask, rows), strict=True)
    return sum(int(torch.count_nonzero((w != 0) & m)) for w, m in pairs)


@torch.inference_mode(False)  # a tensor made in inference mode could not be trained with
def install(plan: list[tuple[nn.Module, Tensor]]) -> None:
    """Sets the mask of each layer: a new parametrization, or the new value of the one it has. All or none.

    Args:
        plan: layers, each with a bool mask of the shape of its weight.
    """
    added: list[nn.Module] = []
    replaced: list[tuple[Mask, Tensor]] = []
    try:
        for layer, keep in plan:
            keep = keep.clone() if keep.is_inference() else keep
            present = mask_of(layer)
            if present is None:
                added.append(layer)
                attach(layer, Mask(keep))
            else:
                replaced.append((present, present.mask.clone()))
                present.mask.copy_(keep)
    except Exception:
        for layer in added:
            if mask_of(layer) is None:
                continue
            if len(_all_of(layer)) == 1:
                detach(layer, keep=False)
            else:
                del _all_of(layer)[-1]
        for present, keep in replaced:
            present.mask.copy_(keep)
        raise


def _all_of(layer: nn.Module) -> nn.ModuleList:
    return cast(nn.ModuleList, cast(nn.ModuleDict, layer.parametrizations)["weight"])


def _own_class(layer: nn.Module) -> None:
    """Gives a parametrized layer a class of its own.

    torch keeps `weight` as a property of a class made for the layer, and a deep copy shares that class: adding or
    taking away the property on one would do so on both.
    """
    if parametrize.is_parametrized(layer):
        shared = type(layer)
        members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        layer.__class__ = type(shared.__name__, shared.__bases__, members)


def attach(layer: nn.Module, parametrization: nn.Module) -> None:
    """Puts a parametrization, which keeps shape and dtype, on the weight of a layer."""
    _own_class(layer)
    # unsafe only leaves out running it to see that it does keep them: a copy of the weight
    parametrize.register_parametrization(layer, "weight", parametrization, unsafe=True)
    if len(_all_of(layer)) == 1:
        cast(parametrize.ParametrizationList, _all_of(layer)).unsafe = False


def detach(layer: nn.Module, *, keep: bool) -> None:
    """Makes `weight` a plain parameter again, the first of the layer as it was: with the values that it had under its
    parametrizations, or (`keep` False) with those below them."""
    _own_class(layer)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep)
    parameters = layer._parameters
    others = {name: parameters.pop(name) for name in list(parameters) if name != "weight"}
    parameters.update(others)


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of the model: layer name → bool tensor of the weight's shape, True where a weight is kept."""
    found = {name: mask_of(module) for name, module in model.named_modules()}
    return {name: mask.mask for name, mask in found.items() if mask is not None}


@torch.inference_mode(False)
def bake_(model: nn.Module) -> list[str]:
    """Takes the masks away and leaves their zeros in plain weights, in place.

    Each weight becomes an ordinary `nn.Parameter` again, the same object as before pruning, with zeros where the mask
    was False; nothing keeps them zero in later training.

    Returns:
        The names of the layers that had a mask ("" for a bare layer).

    Raises:
        ValueError: a masked weight has another parametrization too (weight norm, for example), which would be baked
            with it. Nothing is changed then.
    """
    masked = [(name, module) for name, module in model.named_modules() if mask_of(module) is not None]
    for name, module in masked:
        others = [type(p).__name__ for p in _all_of(module) if not isinstance(p, Mask)]
        if others:
            raise ValueError(
                f"model: the masked weight of layer {name!r} is also parametrized by {', '.join(others)}; remove those "
                "with torch.nn.utils.parametrize.remove_parametrizations first"
            )
    for _, module in masked:
        detach(module, keep=True)
    return [name for name, _ in masked]


def mask_like_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Gives a freshly built model the masks that `state_dict` holds, so that `load_state_dict` then fits.

        fresh = Net()
        prune.mask_like_(fresh, state)
        fresh.load_state_dict(state)

    Args:
        model: the model without masks, of the class that `state_dict` came from.
        state_dict: the state of a masked model; only its masks are read here.

    Returns:
        The names of the layers masked, in the model's order; empty where the state holds no mask.

    Raises:
        ValueError: a mask belongs to a layer that the model lacks, or its shape or dtype does not fit. The model is
            left as it was.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MASKABLE)}
    plan: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        match = _MASK_KEY.match(key)
        if match is None:
            continue
        name = match["name"] or ""
        if name not in layers:
            raise ValueError(f"state_dict: {key!r} masks a layer {name!r} that the model does not have")
        weight = cast(Tensor, layers[name].weight)
        if value.dtype != torch.bool or value.shape != weight.shape:
            raise ValueError(
                f"state_dict: {key!r} should be bool of shape {tuple(weight.shape)}, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        plan[name] = value.detach().to(device=weight.device, copy=True)
    ordered = [name for name in layers if name in plan]
    install([(layers[name], plan[name]) for name in ordered])
    return ordered


def sparsity(model: nn.Module) -> float:
    """The share of zeros, in [0, 1], among the weights of all Linear and Conv2d layers; 0 where there are none."""
    zeros = total = 0
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MASKABLE):
                size = unmasked_weight(module).numel()
                total += size
                zeros += size - nonzeros(module)
    return zeros / total if total else 0.0
