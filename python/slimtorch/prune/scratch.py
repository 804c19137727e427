# SPDX-License-Identifier: Apache-2.0
"""Training a pruned architecture from scratch instead of fine-tuning it (Liu et al., "Rethinking the Value of Network
Pruning", 1810.05270, section 3): how long, and from which weights.

    Scratch-E    as many epochs as the unpruned network
    Scratch-B    as much computation: epochs · MACs of the unpruned network / MACs of the pruned one
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch.measure import _count_macs, eval_mode, split_inputs
from slimtorch.prune.magnitude import check_count
from slimtorch.prune.mask import mask_of, nonzeros, unmasked_weight


def work(model: nn.Module, example_inputs: Any) -> float:
    """Multiply-accumulates of one call, those with masked weights left out.

    What a masked network would need if zeros cost nothing, as the paper counts unstructured pruning; what runs is
    `slimtorch.measure`'s to say.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
    """
    args, kwargs = split_inputs(example_inputs)
    with eval_mode(model), torch.inference_mode():
        counts = _count_macs(model, args, kwargs)
    modules = dict(model.named_modules())
    total = 0.0
    for name, (dense, _) in counts.items():
        layer = modules[name]
        share = 1.0 if mask_of(layer) is None else nonzeros(layer) / max(1, unmasked_weight(layer).numel())
        total += dense * share
    return total


def scratch_e(epochs: int) -> int:
    """Epochs of Scratch-E: those of the unpruned network."""
    check_count("epochs", epochs, 1)
    return epochs


def scratch_b(
    epochs: int, full: nn.Module, pruned: nn.Module, example_inputs: Any, *, at_most: float | None = None
) -> int:
    """Epochs of Scratch-B: `epochs · work(full) / work(pruned)`, rounded down.

    Args:
        epochs: that the unpruned network was trained for, >= 1.
        full: the unpruned network.
        pruned: the smaller or masked one.
        example_inputs: one batch; its size does not matter.
        at_most: the largest factor. The paper takes 2 on ImageNet, None on CIFAR.

    Raises:
        ValueError: the pruned network multiplies nothing, or more than the full one.
    """
    check_count("epochs", epochs, 1)
    if at_most is not None and not at_most >= 1:
        raise ValueError(f"at_most: expected a number of at least 1, got {at_most!r}")
    before, after = work(full, example_inputs), work(pruned, example_inputs)
    if after <= 0:
        raise ValueError("pruned: expected a network that multiplies something, got 0 multiply-accumulates")
    if after > before:
        raise ValueError(f"pruned: expected at most the {before:,.0f} multiply-accumulates of full, got {after:,.0f}")
    factor = before / after
    return int(epochs * (factor if at_most is None else min(factor, at_most)))


def milestones(epochs: int) -> tuple[int, int]:
    """The epochs before which the learning rate is divided by 10: after half and after three quarters of them."""
    check_count("epochs", epochs, 1)
    return epochs // 2, epochs * 3 // 4


@torch.no_grad()
def restart_(model: nn.Module, seed: int | None = None) -> None:
    """New random weights and fresh statistics, in place, as the layers' `reset_parameters()` draws them. Masks stay.

    Args:
        model: any module. A scheme of initialisation of its own (`slim.models` have one) must be applied afterwards.
        seed: of torch's generator while it draws, which is then as before; None draws on from where it stands.

    Raises:
        ValueError: a layer has parameters but no `reset_parameters()`, or parametrizations beside a mask. The model is
            left as it was.
    """
    for name, module in model.named_modules():
        if mask_of(module) is not None:
            original = cast(Any, module).parametrizations.weight.original
            if unmasked_weight(module) is not original:
                raise ValueError(f"model: the weight of layer {name!r} has a parametrization beside its mask")
        elif isinstance(module, parametrize.ParametrizationList):
            continue  # what a mask keeps its weight in
        elif any(p is not None for p in module._parameters.values()) and not _resets(module):
            raise ValueError(f"model: layer {name!r}, a {type(module).__name__}, has no reset_parameters()")
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for module in model.modules():
            if mask_of(module) is not None:
                _restart_masked(module)
            elif _resets(module):
                cast(Any, module).reset_parameters()


def _resets(module: nn.Module) -> bool:
    return callable(getattr(module, "reset_parameters", None))


def _restart_masked(layer: nn.Module) -> None:
    """`reset_parameters` of a masked layer would fill the masked weight, which is computed anew at each access."""
    original = unmasked_weight(layer)
    bias = cast("Tensor | None", layer.bias)
    options: dict[str, Any] = {"bias": bias is not None, "device": original.device, "dtype": original.dtype}
    fresh: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Linear):
        fresh = nn.Linear(layer.in_features, layer.out_features, **options)
    else:
        conv = cast(nn.Conv2d, layer)
        kernel = cast("tuple[int, int]", conv.kernel_size)
        fresh = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, groups=conv.groups, **options)
    original.copy_(fresh.weight)
    if bias is not None:
        bias.copy_(cast(Tensor, fresh.bias))
