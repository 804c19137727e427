# SPDX-License-Identifier: Apache-2.0
"""Importances against answers that do not come from them: closed forms, the loss itself, loops by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch import prune
from slimtorch.prune import (
    Evidence,
    Fisher,
    Magnitude,
    Movement,
    Neurons,
    PathIntegral,
    SecondOrder,
    Snip,
    Taylor,
    prune_,
)
from slimtorch.prune.importance import LifeLong, weigh

from .networks import CASES
from .test_magnitude import assert_unchanged, state


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / (2 * len(output))


def batches(count: int = 3, inputs: int = 5, outputs: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    return [(torch.randn(6, inputs, generator=g), torch.randn(6, outputs, generator=g)) for _ in range(count)]


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(5, 4, bias=False)


def scores(model: nn.Module, importance: Any, data: Any, **options: Any) -> Tensor:
    return weigh(model, {"": model}, importance, Evidence(data, half_square, **options))[""]


def slopes(layer: nn.Linear, data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The gradient of each batch in closed form: (Wx - t) xᵀ / n."""
    w = layer.weight.detach().double()
    return [(x.double() @ w.T - t.double()).T @ x.double() / len(x) for x, t in data]


# --- on data --------------------------------------------------------------------------------------------------------


def test_snip_and_taylor_in_closed_form() -> None:
    layer, data = linear(), batches()
    w, g = layer.weight.detach().double(), slopes(linear(), data)
    torch.testing.assert_close(scores(layer, "snip", data).double(), (w * sum(g) / 3).abs(), rtol=1e-4, atol=1e-6)
    mean = sum((w * one).square() for one in g) / 3
    torch.testing.assert_close(scores(layer, "taylor", data).double(), mean, rtol=1e-4, atol=1e-6)


def test_snip_differs_from_taylor_where_gradients_cancel() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0]])
    # of the first weight the gradients are +1 and -1, of the second twice 0.5
    data = [(torch.tensor([[1.0, 0.5]]), torch.tensor([[0.5]])), (torch.tensor([[-1.0, 0.5]]), torch.tensor([[-1.5]]))]
    torch.testing.assert_close(scores(layer, "snip", data), torch.tensor([[0.0, 0.5]]))
    torch.testing.assert_close(scores(layer, "taylor", data), torch.tensor([[1.0, 0.25]]))


def removal(layer: nn.Linear, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """How the mean loss really changes when each weight alone is set to zero."""

    def loss(model: nn.Linear) -> float:
        return sum(half_square(model(x), t).item() for x, t in data) / len(data)

    layer = copy.deepcopy(layer).double()
    data = [(x.double(), t.double()) for x, t in data]
    full, change = loss(layer), torch.zeros(layer.weight.shape, dtype=torch.float64)
    for index in range(layer.weight.numel()):
        cut = copy.deepcopy(layer)
        cut.weight.data.view(-1)[index] = 0
        change.view(-1)[index] = loss(cut) - full
    return change


def test_second_order_is_the_loss_of_removing_where_the_hessian_is_diagonal() -> None:
    """One-hot inputs: weights do not meet, the loss is quadratic, so one probe is exact for any change."""
    layer = linear()
    eye = torch.eye(5) * torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])
    data = [(eye, torch.randn(5, 4, generator=torch.Generator().manual_seed(2)) * scale) for scale in (1.0, 2.0)]
    found = scores(layer, "taylor2", data).double()
    torch.testing.assert_close(found, removal(layer, data).abs(), rtol=1e-4, atol=1e-6)


def test_second_order_approaches_the_loss_of_removing_with_many_probes() -> None:
    layer, data = linear(), batches()
    target = removal(layer, data).abs()
    few = scores(layer, SecondOrder(half_square), data).double()
    many = scores(layer, SecondOrder(half_square, probes=800), data).double()
    assert (many - target).abs().max() < 0.05 * target.max()
    assert (many - target).norm() < 0.3 * (few - target).norm()
    assert torch.equal(scores(layer, SecondOrder(half_square), data).double(), few)  # the seed decides


def test_second_order_without_curvature_is_first_order() -> None:
    layer, data = linear(), batches()
    evidence = Evidence(data, lambda y, t: (y * t).sum())
    found = weigh(layer, {"": layer}, "taylor2", evidence)[""]
    torch.testing.assert_close(found, weigh(layer, {"": layer}, "snip", evidence)[""])


def test_of_a_masked_network_only_what_is_left_counts() -> None:
    model, data = CASES["mlp"].model(), [(torch.randn(8, 20), torch.randn(8, 4))]
    prune_(model, Magnitude(0.5))
    reference = copy.deepcopy(model)
    prune.bake_(reference)
    half_square(reference(data[0][0]), data[0][1]).backward()
    layers = {"fc1": model.fc1, "fc2": model.fc2}
    found = weigh(model, layers, "snip", Evidence(data, half_square))
    for name in layers:
        layer = reference.get_submodule(name)
        torch.testing.assert_close(found[name], (layer.weight * layer.weight.grad).abs())
    prune_(model, Magnitude(0.8, importance="snip", loss_fn=half_square), data=data)
    mask = prune.masks(model)["fc1"]
    kept = (reference.fc1.weight * reference.fc1.weight.grad).abs().flatten().topk(mask.numel() - round(0.8 * 640))
    assert torch.equal(mask.flatten().nonzero().flatten(), kept.indices.sort().values)


def test_neurons_are_worth_the_sum_of_their_weights() -> None:
    model, x, t = CASES["mlp"].model(), torch.randn(8, 20), torch.randn(8, 4)
    old = copy.deepcopy(model)
    half_square(old(x), t).backward()
    keep = (old.fc1.weight * old.fc1.weight.grad).abs().sum(1).topk(16).indices.sort().values
    prune_(model, {"fc1": Neurons(0.5, "snip", loss_fn=half_square)}, example_inputs=x, data=[(x, t)])
    assert torch.equal(model.fc1.weight, old.fc1.weight[keep])


@pytest.mark.parametrize("granularity", ["weight", "row", "column", (2, 3)])
def test_every_granularity_ranks_the_mean_of_its_weights(granularity: Any) -> None:
    layer, data = linear(), batches()
    values = scores(layer, "taylor", data)
    r, c = {"weight": (1, 1), "row": (1, 5), "column": (4, 1)}.get(granularity, granularity)
    blocks = [values[i : i + r, j : j + c].mean().item() for i in range(0, 4, r) for j in range(0, 5, c)]
    order = sorted(range(len(blocks)), key=blocks.__getitem__)
    prune_(layer, Magnitude(0.5, granularity, importance=Taylor(half_square)), data=data)
    mask = prune.masks(layer)[""]
    marks = [bool(mask[i : i + r, j : j + c].all()) for i in range(0, 4, r) for j in range(0, 5, c)]
    assert [i for i, kept in enumerate(marks) if not kept] == sorted(order[: round(0.5 * len(blocks))])


def test_global_scope_over_layers() -> None:
    model, data = CASES["mlp"].model(), [(torch.randn(8, 20), torch.randn(8, 4))]
    found = weigh(model, {"fc1": model.fc1, "fc2": model.fc2}, "snip", Evidence(data, half_square))
    flat = torch.cat([found["fc1"].flatten(), found["fc2"].flatten()])
    remove = round(0.7 * len(flat))
    expected = torch.ones(len(flat), dtype=torch.bool)
    expected[flat.argsort()[:remove]] = False
    config = Magnitude(0.7, scope="global", importance="snip", loss_fn=half_square)
    prune_(model, {"fc*": config}, data=data)
    masks = prune.masks(model)
    assert torch.equal(torch.cat([masks["fc1"].flatten(), masks["fc2"].flatten()]), expected)


def test_names_and_objects_give_the_same() -> None:
    model, data = CASES["mlp"].model(), [(torch.randn(8, 20), torch.randn(8, 4))]
    for name, one in [("snip", Snip()), ("taylor", Taylor()), ("taylor2", SecondOrder()), ("magnitude", None)]:
        masks = []
        for importance in (name, one):
            twin = copy.deepcopy(model)
            prune_(twin, Magnitude(0.7, importance=importance, loss_fn=half_square), data=data)
            masks.append(prune.masks(twin))
        assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


def test_random_repeats_by_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        layer = nn.Linear(50, 40)
        prune_(layer, Magnitude(0.5, importance="random", seed=seed))
        found.append(prune.masks(layer)[""])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- over a training run --------------------------------------------------------------------------------------------


def trained(importance: LifeLong, steps: int = 6, **options: Any) -> tuple[nn.Linear, list[Tensor], list[Tensor]]:
    """A watched layer after some steps; its weights before each step and at the end, and the gradients."""
    layer, data = linear(), batches()
    optimizer = torch.optim.SGD(layer.parameters(), **{"lr": 0.2, "momentum": 0.9, **options})
    importance.watch(layer, optimizer)
    weights, gradients = [], []
    for step in range(steps):
        x, t = data[step % 3]
        optimizer.zero_grad()
        half_square(layer(x), t).backward()
        weights.append(layer.weight.detach().clone())
        gradients.append(layer.weight.grad.clone())
        optimizer.step()
    return layer, [*weights, layer.weight.detach().clone()], gradients


def test_movement_by_hand() -> None:
    movement = Movement()
    layer, weights, gradients = trained(movement)
    total = -sum(w * g for w, g in zip(weights, gradients, strict=False))
    torch.testing.assert_close(scores(layer, movement, None), total - total.min())


def test_movement_keeps_what_leaves_zero() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0, 0.1]])  # the large one is pulled to zero, the small one away from it
    movement, optimizer = Movement(), torch.optim.SGD(layer.parameters(), lr=0.1)
    movement.watch(layer, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        half_square(layer(torch.eye(2)), torch.tensor([[0.0], [1.0]])).backward()
        optimizer.step()
    assert layer.weight[0, 0].abs() > layer.weight[0, 1].abs()
    prune_(layer, Magnitude(0.5, importance=movement))
    assert prune.masks(layer)[""].tolist() == [[False, True]]


def test_fisher_by_hand() -> None:
    fisher = Fisher()
    layer, weights, gradients = trained(fisher)
    expected = weights[-1].square() * sum(g.square() for g in gradients) / (2 * len(gradients))
    torch.testing.assert_close(scores(layer, fisher, None), expected)


def test_path_integral_by_hand() -> None:
    path = PathIntegral(damping=0.01)
    layer, weights, gradients = trained(path)
    fall = -sum(g * (b - a) for a, b, g in zip(weights, weights[1:], gradients, strict=False))
    expected = fall.clamp(min=0) / ((weights[-1] - weights[0]).square() + 0.01) * weights[-1].square()
    torch.testing.assert_close(scores(layer, path, None), expected)


def test_path_integral_adds_up_to_the_fall_of_the_loss() -> None:
    """Along a fine path the sum over weights is the line integral of the gradient, which is the fall of the loss."""
    layer, (x, t) = linear(), batches(1)[0]
    path, optimizer = PathIntegral(), torch.optim.SGD(layer.parameters(), lr=1e-3)
    path.watch(layer, optimizer)
    before = half_square(layer(x), t).item()
    for _ in range(1500):
        optimizer.zero_grad()
        half_square(layer(x), t).backward()
        optimizer.step()
    fall = before - half_square(layer(x), t).item()
    assert path._sums[""].sum().item() == pytest.approx(fall, rel=2e-3)


@pytest.mark.parametrize("build", [Movement, PathIntegral, Fisher])
def test_life_long_with_a_pruner_and_with_neurons(build: Callable[[], LifeLong]) -> None:
    model, (x, t) = CASES["mlp"].model(), (torch.randn(16, 20), torch.randn(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    importance = build()
    importance.watch(model, optimizer)
    pruner = prune.Pruner(model, Magnitude(0.8, importance=importance), prune.Cubic(begin=2, end=8, every=3))
    for _ in range(9):
        optimizer.zero_grad()
        half_square(model(x), t).backward()
        optimizer.step()
        pruner.step()
    assert importance.steps == 9
    assert prune.sparsity(model) == pytest.approx(0.8, abs=0.01)
    importance.stop()
    prune.bake_(model)
    expected = weigh(model, {"fc1": model.fc1}, importance, Evidence())["fc1"].sum(1)
    old = model.fc1.weight.detach().clone()
    prune_(model, {"fc1": Neurons(0.5, importance)}, example_inputs=x)
    best = expected.double().topk(16).values.min()
    kept = (expected.double() >= best).nonzero().flatten()
    assert torch.equal(model.fc1.weight, old[kept])
    with pytest.raises(ValueError, match=r"watched layer 'fc1' with shape \(32, 20\), now it has \(16, 20\)"):
        prune_(model, {"fc1": Magnitude(0.5, importance=importance)})


def test_stop_and_watch_again() -> None:
    fisher = Fisher()
    layer, _, _ = trained(fisher)
    with pytest.raises(ValueError, match="watches one already"):
        fisher.watch(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    fisher.stop()
    seen = scores(layer, fisher, None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert torch.equal(scores(layer, fisher, None), seen)
    fisher.watch(layer, optimizer)
    optimizer.step()
    torch.testing.assert_close(scores(layer, fisher, None), layer.weight.detach().square() / 2)


def test_life_long_errors() -> None:
    model = CASES["mlp"].model()
    with pytest.raises(ValueError, match="Movement has seen no training step"):
        prune_(model, Magnitude(0.5, importance=Movement()))
    with pytest.raises(ValueError, match="optimizer: expected one that trains a Linear or Conv2d layer"):
        Fisher().watch(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    fisher = Fisher()
    optimizer = torch.optim.SGD(model.fc1.parameters(), lr=0.1)
    fisher.watch(model, optimizer)
    model(torch.randn(2, 20)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="Fisher did not watch layer 'fc2', only"):
        prune_(model, {"fc2": Magnitude(0.5, importance=fisher)})
    with pytest.raises(ValueError, match="damping: expected a positive number"):
        PathIntegral(damping=0.0)


# --- what is refused, with the model as it was ----------------------------------------------------------------------


class Negative(prune.WeightImportance):
    def weights(self, model: nn.Module, layers: Any, evidence: Evidence) -> dict[str, Tensor]:
        return {n: torch.full((m.weight.shape[0], m.weight[0].numel()), -1.0) for n, m in layers.items()}


class Nan(prune.WeightImportance):
    def weights(self, model: nn.Module, layers: Any, evidence: Evidence) -> dict[str, Tensor]:
        return {n: torch.full((m.weight.shape[0], m.weight[0].numel()), float("nan")) for n, m in layers.items()}


class Flat(prune.WeightImportance):
    def weights(self, model: nn.Module, layers: Any, evidence: Evidence) -> dict[str, Tensor]:
        return {n: torch.ones(3) for n in layers}


def two() -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(2):
        yield torch.randn(3, 20), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("config", "data", "error", "message"),
    [
        ({"importance": "snip", "loss_fn": half_square}, None, ValueError, "data: importance 'snip' needs an iterable"),
        ({"importance": "snip", "loss_fn": half_square}, [], ValueError, "data: importance 'snip' needs at least one"),
        ({"importance": "taylor", "loss_fn": half_square, "batches": 3}, two(), ValueError, "3 batches, .* after 2"),
        ({"importance": "taylor2"}, two(), ValueError, "loss_fn: importance 'taylor2' needs one"),
        ({"importance": "snip", "loss_fn": lambda y, t: y.sum() * float("nan")}, two(), ValueError, "nan on batch 0"),
        ({"importance": "snip", "loss_fn": lambda y, t: y}, two(), ValueError, "loss_fn: expected a scalar tensor"),
        ({"importance": "snip", "loss_fn": half_square}, [torch.randn(3, 20)], ValueError, "batch with 0 targets"),
        ({"importance": "snip", "loss_fn": half_square}, [torch.randn(3, 7)], ValueError, "does not fit the model"),
        ({"importance": Nan()}, None, ValueError, "'Nan' gave values for layer 'fc1' that are not finite"),
        ({"importance": Negative()}, None, ValueError, "'Negative' gave negative values for layer 'fc1'"),
        ({"importance": Flat()}, None, ValueError, r"gave shape \(3,\) for layer 'fc1', expected \(32, 20\)"),
    ],
)
def test_refused_and_unchanged(config: dict[str, Any], data: Any, error: type[Exception], message: str) -> None:
    model = CASES["mlp"].model()
    before, mode = state(model), model.training
    with pytest.raises(error, match=message):
        prune_(model, Magnitude(0.5, **config), data=data)
    assert_unchanged(model, before)
    assert model.training == mode
    assert all(p.grad is None for p in model.parameters())


def test_batches_are_counted_for_neurons_too() -> None:
    model, x = CASES["mlp"].model(), torch.randn(3, 20)
    with pytest.raises(ValueError, match="importance 'apoz' needs 5 batches, the data ended after 2"):
        prune_(model, Neurons(0.5, "apoz", batches=5), example_inputs=x, data=two())
    stream = two()
    prune_(model, Neurons(0.5, "apoz", batches=1), example_inputs=x, data=stream)
    assert len(list(stream)) == 1  # no batch drawn in vain


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"importance": "beauty"}, ValueError, "importance"),
        ({"importance": "apoz"}, TypeError, "importance: 'apoz' scores neurons"),
        ({"importance": Snip}, TypeError, "importance"),
        ({"importance": "l1", "norm": 2}, ValueError, "norm"),
        ({"loss_fn": 3}, TypeError, "loss_fn"),
        ({"batches": 0}, ValueError, "batches"),
        ({"batches": 1.5}, TypeError, "batches"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=argument):
        Magnitude(0.5, **options)
    for probes, kind in ((0, ValueError), (1.0, TypeError)):
        with pytest.raises(kind, match="probes"):
            SecondOrder(probes=probes)  # type: ignore[arg-type]


def test_a_layer_that_would_be_left_empty() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].weight.data *= 1e-4
    before = state(model)
    with pytest.raises(ValueError, match=r"sparsity: 0\.5 would leave layer '2' without weights"):
        prune_(model, Magnitude(0.5, scope="global", allow_empty=False))
    assert_unchanged(model, before)
    assert "layer '2' has no weights left" in prune_(model, Magnitude(0.5, scope="global")).notes


def test_training_mode_gradients_and_frozen_weights_stay() -> None:
    model = CASES["conv"].model().train()
    model.conv1.weight.requires_grad_(False)
    x, y = CASES["conv"].inputs(), torch.zeros(CASES["conv"].inputs().shape[0], dtype=torch.long)
    F.cross_entropy(model(x), y).backward()
    grad, mean = model.fc.weight.grad.clone(), model.bn1.running_mean.clone()
    with torch.inference_mode():
        prune_(model, Magnitude(0.5, importance="snip", loss_fn=F.cross_entropy), data=[(x, y)])
    assert prune.sparsity(model.conv1) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model.fc.parametrizations.weight.original.grad, grad)
    assert torch.equal(model.bn1.running_mean, mean)
    assert model.training
    assert not model.conv1.parametrizations.weight.original.requires_grad


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    scores(linear(), "snip", batches())
    assert "snip" in capsys.readouterr().err
    monkeypatch.delenv("FORCE_COLOR")
    scores(linear(), "snip", batches())
    assert capsys.readouterr().err == ""
