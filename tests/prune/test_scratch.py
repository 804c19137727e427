# SPDX-License-Identifier: Apache-2.0
"""Scratch-E and Scratch-B: epochs of the paper, and weights that are really new."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from slimtorch import models, prune
from slimtorch.prune.scratch import milestones, restart_, scratch_b, scratch_e, work

from .networks import CASES
from .test_magnitude import assert_unchanged, state


def test_epochs_of_the_pruned_shapes() -> None:
    """160 epochs times the ratio of MACs in 1608.08710, Table 1, to its three digits."""
    x = torch.zeros(1, 3, 32, 32)
    assert scratch_e(160) == 160
    for full, pruned, ratio in [
        (models.vgg16, models.vgg16_a, 3.13 / 2.06),
        (models.resnet56, models.resnet56_a, 1.25 / 1.12),
        (models.resnet56, models.resnet56_b, 1.25 / 0.909),
        (models.resnet110, models.resnet110_b, 2.53 / 1.55),
    ]:
        assert scratch_b(160, full(), pruned(), x) == pytest.approx(160 * ratio, abs=2)


def test_masked_weights_cost_nothing_here() -> None:
    full, x = CASES["mlp"].model(), torch.randn(3, 20)
    sizes = [20 * 32, 32 * 16, 16 * 4]
    assert work(full, x) == 3 * sum(sizes)
    pruned = copy.deepcopy(full)
    prune.prune_(pruned, {"fc1": prune.Magnitude(0.75)})
    assert work(pruned, x) == 3 * (sizes[0] / 4 + sizes[1] + sizes[2])
    factor = sum(sizes) / (sizes[0] / 4 + sizes[1] + sizes[2])
    assert scratch_b(100, full, pruned, x) == int(100 * factor) == 165
    assert scratch_b(100, full, pruned, x, at_most=1.5) == 150
    assert scratch_b(100, full, full, x) == 100


def test_milestones_are_half_and_three_quarters() -> None:
    assert milestones(160) == (80, 120)
    assert milestones(243) == (121, 182)


def test_restart_draws_everything_anew_and_keeps_masks() -> None:
    model, x = CASES["conv"].model(), CASES["conv"].inputs()
    model(x)  # moves the statistics
    prune.prune_(model, prune.Magnitude(0.5))
    masks = {n: m.clone() for n, m in prune.masks(model).items()}
    parameters = {n: id(p) for n, p in model.named_parameters()}
    drawn = torch.get_rng_state()
    restart_(model, seed=7)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    torch.manual_seed(7)
    fresh = type(model)()  # the same layers in the same order: the same numbers
    for name, mask in masks.items():
        assert torch.equal(prune.masks(model)[name], mask)
        layer, new = model.get_submodule(name), fresh.get_submodule(name)
        assert torch.equal(layer.parametrizations.weight.original, new.weight)
        assert torch.equal(layer.weight, torch.where(mask, new.weight, 0))
        if new.bias is not None:
            assert torch.equal(layer.bias, new.bias)
    assert torch.equal(model.bn1.running_mean, torch.zeros(8))
    assert int(model.bn1.num_batches_tracked) == 0


def test_restart_of_other_seeds_differs() -> None:
    one, other = CASES["mlp"].model(), CASES["mlp"].model()
    restart_(one, seed=1)
    restart_(other, seed=2)
    assert not torch.equal(one.fc1.weight, other.fc1.weight)


def test_refused() -> None:
    x = torch.randn(2, 20)
    small, large = CASES["mlp"].model(), CASES["mlp"].model()
    prune.prune_(small, prune.Magnitude(0.5))
    with pytest.raises(ValueError, match="pruned: expected at most the"):
        scratch_b(10, small, large, x)
    with pytest.raises(ValueError, match="epochs: expected at least 1"):
        scratch_b(0, large, small, x)
    with pytest.raises(TypeError, match="epochs: expected a whole number"):
        scratch_e(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at_most: expected a number of at least 1"):
        scratch_b(10, large, small, x, at_most=0.5)
    with pytest.raises(ValueError, match="pruned: expected a network that multiplies something"):
        scratch_b(10, large, nn.ReLU(), x)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    model = Scaled()
    before = state(model)
    with pytest.raises(ValueError, match="layer '', a Scaled, has no reset_parameters"):
        restart_(model)
    assert_unchanged(model, before)
