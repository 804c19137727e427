# SPDX-License-Identifier: Apache-2.0
"""Training a pruned architecture from scratch instead of fine-tuning it (Liu et al., "Rethinking the Value of Network
Pruning", 1810.05270, section 3): how long, and from which weights.

    Scratch-E    as many epochs as the unpruned network
    Scratch-B    as much computation: epochs · MACs of the unpruned network / MACs of the pruned one

    both = slim.prune.scratch.compare(pruned, train, 160, full=full, example_inputs=x)
    print(both.e.result, both.b.epochs, both.b.result)

What it is compared with is the pruned network, fine-tuned. Where the small architecture is given beforehand, `inherit_`
fills it with the neurons that the trained one can spare least.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch.measure import _count_macs, eval_mode, split_inputs
from slimtorch.prune.importance import Importance
from slimtorch.prune.magnitude import check_count
from slimtorch.prune.mask import mask_of, nonzeros, unmasked_weight
from slimtorch.prune.neurons import Neurons, remove_neurons_
from slimtorch.prune.report import PruneReport

Train = Callable[[nn.Module, int], Any]
"""`train(model, epochs) -> result`: trains in place, from the first step to the last, and returns anything."""


@dataclass(frozen=True)
class Trained:
    """A pruned architecture after training from scratch.

    Attributes:
        epochs: it was trained for.
        model: after them.
        result: what `train` returned.
    """

    epochs: int
    model: nn.Module
    result: Any


@dataclass(frozen=True)
class Scratch:
    """Both ways: `e` with the epochs of the unpruned network, `b` with its computation."""

    e: Trained
    b: Trained


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


def compare(
    pruned: nn.Module | Callable[[], nn.Module],
    train: Train,
    epochs: int,
    *,
    full: nn.Module,
    example_inputs: Any,
    seed: int = 0,
    at_most: float | None = None,
) -> Scratch:
    """Scratch-E and Scratch-B of any pruned architecture: both from the same new weights, trained by the same function.

    Args:
        pruned: the smaller or masked network, of which copies get new weights (`restart_`; masks stay). Or what builds
            it, with new weights, at each call: for a scheme of initialisation of one's own. A module counts as the
            former.
        train: `train(model, epochs) -> result`; its schedule has to follow `epochs` (`milestones`). Everything random
            in it beside torch's generator, which is seeded before, is its own business.
        epochs: that the unpruned network was trained for, >= 1.
        full: the unpruned network, whose multiply-accumulates set the epochs of Scratch-B; its weights do not matter.
        example_inputs: one batch for both networks; its size does not matter.
        seed: of torch's generator before the weights are drawn and before each training; the generator is then as it
            was.
        at_most: the largest factor of Scratch-B. The paper takes 2 on ImageNet, None on CIFAR.

    Returns:
        Both, with their models. Where Scratch-B has no more epochs than Scratch-E, the two are one training.

    Raises:
        TypeError: `pruned` is neither, builds no module, or `train` cannot be called.
        ValueError: as `scratch_b` and `restart_`.
    """
    check_count("seed", seed, 0)
    if not callable(train):
        raise TypeError(f"train: expected a callable (model, epochs) -> result, got {type(train).__name__}")
    if not isinstance(pruned, nn.Module) and not callable(pruned):
        raise TypeError(f"pruned: expected a module or what builds one, got {type(pruned).__name__}")

    def fresh() -> nn.Module:
        torch.manual_seed(seed)
        if isinstance(pruned, nn.Module):
            model = copy.deepcopy(pruned)
            restart_(model)
            return model
        built: object = pruned()
        if not isinstance(built, nn.Module):
            raise TypeError(f"pruned: expected it to build a torch.nn.Module, got {type(built).__name__}")
        return built

    def trained(count: int) -> Trained:
        model = fresh()
        torch.manual_seed(seed)
        return Trained(count, model, train(model, count))

    with torch.random.fork_rng():
        longer = scratch_b(epochs, full, fresh(), example_inputs, at_most=at_most)
        e = trained(scratch_e(epochs))
        return Scratch(e, e if longer == e.epochs else trained(longer))


@torch.no_grad()
def inherit_(
    small: nn.Module, full: nn.Module, example_inputs: Any, *, importance: str | Importance = "l1"
) -> PruneReport:
    """Fills a pruned architecture given beforehand with what matters most of a trained network, in place.

    From a copy of `full` the least important neurons of every layer that is narrower in `small` are removed, as many as
    it takes, and the rest becomes the state of `small`: filter pruning to predefined widths (Li et al., 1608.08710).

    Args:
        small: the same network with fewer neurons: `slim.models.vgg16_a()` for `slim.models.vgg16()`.
        full: the trained network; it is not changed.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments that both take.
        importance: as of `Neurons`; one that needs no data.

    Returns:
        What was removed, per layer.

    Raises:
        ValueError: the two have layers of other names, `small` is wider somewhere, its widths cannot be reached by
            removing neurons (layers tied to each other, to the inputs or to the outputs), or `full` has masks. `small`
            is left as it was.
    """
    widths, wanted = _widths(full), _widths(small)
    if widths.keys() != wanted.keys():
        odd = sorted(widths.keys() ^ wanted.keys())
        raise ValueError(f"small: expected the layers of full, but only one of the two has {odd[0]!r}")
    config: dict[str, Neurons | None] = {}
    for name, width in widths.items():
        if not 0 < wanted[name] <= width:
            raise ValueError(f"small: expected 1 to {width} neurons in layer {name!r}, got {wanted[name]}")
        if wanted[name] < width:
            config[name.replace("[", "[[]")] = Neurons(1 - wanted[name] / width, importance)
    donor = copy.deepcopy(full)
    if config:
        report = remove_neurons_(donor, config, example_inputs=example_inputs)
    else:
        size = sum(p.numel() for p in full.parameters())
        report = PruneReport([], size, size, notes=["Nothing to remove: small is as wide as full."])
    state = donor.state_dict()
    here = small.state_dict()
    for key in state.keys() | here.keys():
        left, needed = (None if held is None else tuple(held.shape) for held in (state.get(key), here.get(key)))
        if left != needed:
            raise ValueError(
                f"small: its widths cannot be reached by removing neurons of full: {key!r} would have shape {left}, "
                f"{needed} is expected; {' '.join(report.notes) or 'layers tied together must be equally wide'}"
            )
    small.load_state_dict(state)
    return report


def _widths(model: nn.Module) -> dict[str, int]:
    """Neurons of each Linear layer and convolution."""
    found: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            found[name] = layer.out_features
        elif isinstance(layer, nn.modules.conv._ConvNd):
            found[name] = layer.out_channels
    return found


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
