# SPDX-License-Identifier: Apache-2.0
"""Mixed bits by sensitivity, and training with shared weights from the start."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.quantize import ClusterAware, KMeans, Uniform, choose_bits
from slimtorch.quantize.sensitivity import fit_budget

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = (X[:, :4].sum(1) > 0).long()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 2))


def _trained() -> nn.Sequential:
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


# --- choose_bits ---


@pytest.mark.parametrize("ratio", [4.0, 6.0, 9.0])
def test_the_budget_holds_as_it_is_stored(ratio: float) -> None:
    model = _trained()
    slim.prune_(model, {"2": slim.prune.Magnitude(0.8)})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    choice = choose_bits(model, ([(X, Y)], F.cross_entropy), ratio=ratio)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    dense = 4 * (12 * 32 + 32 * 24 + 24 * 2)
    assert choice.budget_bytes == pytest.approx(dense / ratio)
    report = slim.cluster_(model, choice)
    assert report.bytes_after == choice.nbytes <= dense / ratio
    assert [layer.bits for layer in report.layers] == [layer.bits for layer in choice.layers]


def test_layers_that_matter_get_more_bits() -> None:
    model = _trained()

    def loss(candidate: nn.Module) -> float:
        first = candidate[0].weight - before  # type: ignore[index]
        return float(first.detach().square().sum())

    before = model[0].weight.detach().clone()
    choice = choose_bits(model, loss, budget_bytes=1700, candidates=(2, 4, 8))
    bits = {layer.name: layer.bits for layer in choice.layers}
    assert bits["0"] == 8
    assert bits["2"] == bits["4"] == 2
    text = str(choice)
    assert "chosen" in text
    assert "8 bit" in text
    assert choice.to_dict()["layers"][0]["bits"] == 8


def test_the_choice_is_the_best_of_all_on_its_hull() -> None:
    """Against brute force: no choice within the bytes used adds less loss."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        sizes = [
            {bits: bits * int(torch.randint(10, 99, (), generator=generator)) for bits in (2, 4, 8)} for _ in range(4)
        ]
        losses = [
            dict(zip((8, 4, 2), torch.rand(3, generator=generator).cumsum(0).tolist(), strict=True)) for _ in range(4)
        ]
        allowed = 0.6 * sum(size[8] for size in sizes)
        try:
            chosen = fit_budget(sizes, losses, allowed)
        except ValueError:
            assert sum(min(size.values()) for size in sizes) > allowed
            continue
        used = sum(size[bits] for size, bits in zip(sizes, chosen, strict=True))
        assert used <= allowed
        added = sum(loss[bits] for loss, bits in zip(losses, chosen, strict=True))
        for other in itertools.product((2, 4, 8), repeat=4):
            if sum(size[bits] for size, bits in zip(sizes, other, strict=True)) <= used:
                assert sum(loss[bits] for loss, bits in zip(losses, other, strict=True)) >= added - 1e-9


def test_bad_budgets_and_measures_are_named() -> None:
    model = _model()
    good = ([(X, Y)], F.cross_entropy)
    with pytest.raises(ValueError, match="budget_bytes, ratio: expected exactly one"):
        choose_bits(model, good)
    with pytest.raises(ValueError, match="budget_bytes, ratio: expected exactly one"):
        choose_bits(model, good, ratio=2, budget_bytes=10)
    with pytest.raises(ValueError, match="budget: expected at least"):
        choose_bits(model, good, budget_bytes=10)
    with pytest.raises(ValueError, match="ratio: expected a number above 0"):
        choose_bits(model, good, ratio=-1)
    with pytest.raises(ValueError, match="bits: expected 1 … 8, got 9"):
        choose_bits(model, good, ratio=2, candidates=(2, 9))
    with pytest.raises(ValueError, match="candidates"):
        choose_bits(model, good, ratio=2, candidates=())
    with pytest.raises(ValueError, match="measure: expected a finite number"):
        choose_bits(model, lambda m: float("nan"), ratio=2)
    with pytest.raises(TypeError, match="measure"):
        choose_bits(model, 3, ratio=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config: expected KMeans or Uniform"):
        choose_bits(model, good, ratio=2, config="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="can be clustered"):
        choose_bits(nn.Sequential(nn.ReLU()), good, ratio=2)


# --- ClusterAware ---


def _fit(model: nn.Module, aware: ClusterAware, steps: int, optimizer: Any = None) -> list[float]:
    used = optimizer or torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        used.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        used.step()
        aware.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "config", [KMeans(bits=2), KMeans(bits=2, group_size=5), KMeans(bits=1, group_size="row"), Uniform(bits=2)]
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_with_few_values_learns_and_ends_in_tables(config: Any, optimizer: Any) -> None:
    model = _model()
    weight = model[0].weight
    aware = ClusterAware(model, config, every=5)
    assert dict(model.named_parameters())["0.parametrizations.weight.original"] is weight
    used = optimizer(model.parameters(), lr=0.3 if optimizer is torch.optim.SGD else 0.02)
    losses = _fit(model, aware, 80, used)
    assert losses[-1] < 0.7 * losses[0]
    out = model(X)
    shown = model[2].weight.detach().clone()
    report = aware.finish_()
    assert isinstance(model[2], slim.nn.CodebookLinear)
    assert torch.equal(model[2].weight, shown)
    torch.testing.assert_close(model(X), out, rtol=1e-5, atol=1e-6)
    for layer, entry in zip((model[0], model[2], model[4]), report.layers, strict=True):
        tables = layer.format.tables()
        for table in range(entry.tables):
            assert layer.weight[tables == table].unique().numel() <= 2**config.bits
    assert len(report.clustered) == 3
    assert report.layers[0].error > 0
    # and goes on training as tables
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model(X).sum().backward()
    assert model[2].codebook.grad is not None
    with pytest.raises(ValueError, match="finish_"):
        aware.finish_()


@pytest.mark.parametrize("format", ["codebook", "sparse_codebook"])
def test_masks_hold_through_clustering_aware_training(format: Any) -> None:
    model = _model()
    slim.prune_(model, {"2": slim.prune.Magnitude(0.7)})
    zeros = model[2].weight == 0
    aware = ClusterAware(model, KMeans(bits=3, format=format), every=3)
    _fit(model, aware, 20, torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.3))
    assert bool((model[2].weight[zeros] == 0).all())
    shown = model[2].weight.detach().clone()
    aware.finish_()
    assert torch.equal(model[2].weight, shown)
    assert bool((model[2].weight[zeros] == 0).all())
    assert model[2].weight[~zeros].unique().numel() <= 8


def test_centroids_follow_every_so_many_steps_and_by_the_decay() -> None:
    model = _model()
    aware = ClusterAware(model, KMeans(bits=2), every=4, decay=0.5)
    centroids = model[0].parametrizations.weight[0].centroids
    before = centroids.clone()
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(3)
    assert [aware.step() for _ in range(3)] == [False] * 3
    assert torch.equal(centroids, before)
    assert aware.step()
    whole = ClusterAware(fresh := _model(), KMeans(bits=2), every=1)
    with torch.no_grad():
        fresh[0].parametrizations.weight.original.mul_(3)
    whole.step()
    moved = fresh[0].parametrizations.weight[0].centroids
    torch.testing.assert_close(centroids, (before + moved) / 2)
    assert aware.state_dict() == {"steps": 4}
    whole.load_state_dict({"steps": 7})
    assert whole.steps == 7


def test_the_gradient_goes_straight_to_the_float_weights() -> None:
    model = _model()
    ClusterAware(model, KMeans(bits=2))
    shown = [model[i].weight.detach().clone().requires_grad_() for i in (0, 2, 4)]
    F.cross_entropy(model(X), Y).backward()
    x: Tensor = X
    for index, weight in enumerate(shown):
        x = F.linear(x, weight, model[2 * index].bias.detach())
        x = F.relu(x) if index < 2 else x
    F.cross_entropy(x, Y).backward()
    for index, weight in enumerate(shown):
        torch.testing.assert_close(model[2 * index].parametrizations.weight.original.grad, weight.grad)


def test_a_copy_of_a_model_in_training_is_independent() -> None:
    model = _model()
    aware = ClusterAware(model, KMeans(bits=2))
    other = copy.deepcopy(model)
    aware.finish_()
    assert isinstance(model[0], slim.nn.CodebookLinear)
    torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-6)


def test_bad_arguments_leave_the_model_alone() -> None:
    model = _model()
    for options, error, text in (
        ({"every": 0}, ValueError, "every: expected 1 or more"),
        ({"every": 1.0}, TypeError, "every: expected an int"),
        ({"decay": 1.0}, ValueError, r"decay: expected a number in \[0, 1\)"),
        ({"decay": "x"}, TypeError, "decay"),
    ):
        with pytest.raises(error, match=text):
            ClusterAware(model, KMeans(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size"):
        ClusterAware(model, KMeans(group_size=13))
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '4'"):
        ClusterAware(model, KMeans())
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in model)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="shares its weight"):
        ClusterAware(tied, KMeans())
