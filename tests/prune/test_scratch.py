# SPDX-License-Identifier: Apache-2.0
"""Scratch-E and Scratch-B: epochs of the paper, and weights that are really new."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slimtorch import models, prune
from slimtorch.prune.scratch import compare, inherit_, milestones, restart_, scratch_b, scratch_e, work

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


# --- Scratch-E and Scratch-B of any architecture ------------------------------------------------------------------


def test_both_start_from_the_same_new_weights_and_differ_in_epochs() -> None:
    full, x = CASES["mlp"].model(), torch.randn(3, 20)
    pruned = copy.deepcopy(full)
    prune.prune_(pruned, prune.Magnitude(0.75, scope="global"))
    before, drawn = state(pruned), torch.get_rng_state()
    starts: list[dict[str, torch.Tensor]] = []
    noise: list[torch.Tensor] = []

    def train(model: nn.Module, epochs: int) -> dict[str, int]:
        starts.append({k: v.clone() for k, v in model.state_dict().items()})
        noise.append(torch.rand(3))
        return {"epochs seen": epochs}

    both = compare(pruned, train, 10, full=full, example_inputs=x, seed=4)
    expected = copy.deepcopy(pruned)
    restart_(expected, seed=4)
    assert [(t.epochs, t.result) for t in (both.e, both.b)] == [(10, {"epochs seen": 10}), (40, {"epochs seen": 40})]
    for start in starts:
        assert all(torch.equal(v, expected.state_dict()[k]) for k, v in start.items())
    assert torch.equal(noise[0], noise[1])
    assert prune.masks(both.b.model).keys() == prune.masks(pruned).keys()
    assert both.b.model is not both.e.model
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_unchanged(pruned, before)
    assert compare(pruned, train, 10, full=full, example_inputs=x, at_most=2).b.epochs == 20


def test_what_is_built_keeps_its_own_initialisation() -> None:
    full, x = CASES["mlp"].model(), torch.randn(3, 20)

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4))
        models.glorot_(model)
        return model

    both = compare(build, lambda model, epochs: epochs, 2, full=full, example_inputs=x, seed=9)
    torch.manual_seed(9)
    expected = build()
    for trained in (both.e, both.b):
        assert all(torch.equal(v, expected.state_dict()[k]) for k, v in trained.model.state_dict().items())
    macs = (20 * 32 + 32 * 16 + 16 * 4, 20 * 8 + 8 * 4)
    assert (both.e.result, both.b.result) == (2, int(2 * macs[0] / macs[1]))


def test_no_shorter_network_is_trained_once() -> None:
    full, x, calls = CASES["mlp"].model(), torch.randn(3, 20), []
    both = compare(full, lambda model, epochs: calls.append(epochs), 3, full=full, example_inputs=x)
    assert calls == [3]
    assert both.b is both.e


def test_training_from_scratch_learns() -> None:
    full = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 0] > inputs[:, 1]).long()

    def train(model: nn.Module, epochs: int) -> float:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(epochs):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    pruned = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    both = compare(pruned, train, 20, full=full, example_inputs=inputs[:1])
    assert both.b.epochs == 80
    assert both.b.result < both.e.result < 0.69


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, print, 2), TypeError, "pruned: expected a module or what builds one, got int"),
        ((lambda: 3, print, 2), TypeError, "pruned: expected it to build a torch.nn.Module, got int"),
        ((nn.Linear(20, 2), 5, 2), TypeError, "train: expected a callable"),
        ((nn.Linear(20, 2), print, 0), ValueError, "epochs: expected at least 1"),
        ((nn.Linear(20, 900), print, 1), ValueError, "pruned: expected at most the"),
    ],
)
def test_comparisons_refused(arguments: tuple[Any, Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare(*arguments, full=CASES["mlp"].model(), example_inputs=torch.randn(2, 20))


# --- predefined widths ----------------------------------------------------------------------------------------------


def _randomise(model: nn.Module) -> None:
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.eval()


def test_inherited_filters_are_those_of_largest_norm() -> None:
    """VGG-16-A by hand: sort filters by their sum of |w|, keep rows here and columns in the next layer."""
    widths, small_widths = (6, 4, 4, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8), (3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4)
    full, small = models.vgg16(widths=widths, hidden=5), models.vgg16(widths=small_widths, hidden=5)
    _randomise(full)
    x = torch.randn(2, 3, 16, 16)
    before = state(full)
    report = inherit_(small, full, x)
    assert_unchanged(full, before)
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    convolutions = [m for m in full if isinstance(m, nn.Conv2d)]
    norms = [m for m in full if isinstance(m, nn.BatchNorm2d)]
    below = torch.arange(3)
    for mine, conv, norm, width, after in zip(
        (m for m in small if isinstance(m, nn.Conv2d)),
        convolutions,
        norms,
        small_widths,
        (m for m in small if isinstance(m, nn.BatchNorm2d)),
        strict=True,
    ):
        kept = conv.weight.abs().sum((1, 2, 3)).argsort(descending=True)[:width].sort().values
        torch.testing.assert_close(mine.weight, conv.weight[kept][:, below], rtol=0, atol=0)
        torch.testing.assert_close(after.running_mean, norm.running_mean[kept], rtol=0, atol=0)
        below = kept
    first = next(m for m in full if isinstance(m, nn.Linear))
    assert torch.equal(next(m for m in small if isinstance(m, nn.Linear)).weight, first.weight[:, below])


@pytest.mark.parametrize("shape", [models.resnet56_a, models.resnet56_b])
def test_resnets_inherit_inside_blocks(shape: Callable[..., nn.Module]) -> None:
    full, small = models.resnet56(width=4), shape(width=4)
    _randomise(full)
    x = torch.randn(1, 3, 8, 8)
    inherit_(small, full, x)
    for big, thin in zip(full, small, strict=True):
        if not hasattr(big, "conv1"):
            continue
        kept = big.conv1.weight.abs().sum((1, 2, 3)).argsort(descending=True)[: thin.conv1.out_channels].sort().values
        assert torch.equal(thin.conv1.weight, big.conv1.weight[kept])
        assert torch.equal(thin.conv2.weight, big.conv2.weight[:, kept])
        assert torch.equal(thin.bn2.weight, big.bn2.weight)
    with torch.no_grad():  # what the full network computes without those channels
        for big, thin in zip(full, small, strict=True):
            if hasattr(big, "conv1"):
                order = big.conv1.weight.abs().sum((1, 2, 3)).argsort(descending=True)
                big.conv2.weight[:, order[thin.conv1.out_channels :]] = 0
        torch.testing.assert_close(small.eval()(x), full(x), rtol=1e-4, atol=1e-4)


def test_equal_widths_are_copied() -> None:
    full, small = CASES["residual"].model(), CASES["residual"].build()
    report = inherit_(small, full, CASES["residual"].inputs())
    assert not report.layers
    assert all(torch.equal(v, full.state_dict()[k]) for k, v in small.state_dict().items())


def test_widths_that_cannot_be_inherited() -> None:
    x = torch.randn(2, 3, 16, 16)
    full = models.resnet20(width=4)
    for small, message in [
        (models.resnet20(width=8), "small: expected 1 to 4 neurons in layer '0', got 8"),
        (models.vgg16(widths=[4] * 13, hidden=4), "small: expected the layers of full"),
        (models.resnet20(width=4, classes=7), "cannot be reached by removing neurons of full"),
    ]:
        before = state(small)
        with pytest.raises(ValueError, match=message):
            inherit_(small, full, x)
        assert_unchanged(small, before)
