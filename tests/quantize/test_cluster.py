# SPDX-License-Identifier: Apache-2.0
"""``cluster_``: tables, zeros, gradients, configurations, what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.formats.codebook import kmeans
from slimtorch.models import LeNet5
from slimtorch.quantize import KMeans, Uniform

SHARED = (
    slim.nn.CodebookLinear,
    slim.nn.CodebookConv2d,
    slim.nn.SparseCodebookLinear,
    slim.nn.SparseCodebookConv2d,
)


class Small(nn.Module):
    """A convolution and two linear layers on [N, 3, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 36, 40)
        self.fc2 = nn.Linear(40, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(F.relu(self.conv(x)).flatten(1))))


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small()


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[key], state[key]) for key in state)


def _lloyd(values: Tensor, centroids: Tensor, weights: Tensor, iterations: int) -> Tensor:
    """K-means written down as it is defined, float64."""
    values, weights, centroids = values.double(), weights.double(), centroids.double().clone()
    for _ in range(iterations):
        own = (values[:, None] - centroids[None]).abs().argmin(1)
        for k in range(len(centroids)):
            if weights[own == k].sum() > 0:
                centroids[k] = (values * weights)[own == k].sum() / weights[own == k].sum()
    return centroids.sort().values


# --- what it makes ---


@pytest.mark.parametrize("bits", range(1, 9))
def test_tables_have_the_size_asked_for_and_weights_few_values(model: Small, bits: int) -> None:
    report = slim.cluster_(model, KMeans(bits=bits))
    for layer in (model.conv, model.fc1, model.fc2):
        assert isinstance(layer, SHARED)
        assert layer.codebook.shape == (1, 2**bits)
        assert layer.weight.unique().numel() <= 2**bits
    assert [entry.bits for entry in report.clustered] == [bits] * 3


@pytest.mark.parametrize(("group", "tables"), [(None, 1), (7, 42), ("row", 40)])
def test_each_group_has_a_table_of_its_own(model: Small, group: Any, tables: int) -> None:
    before = model.fc1.weight.detach().clone()
    slim.cluster_(model, {"fc1": KMeans(bits=2, group_size=group)})
    layer = model.fc1
    assert isinstance(layer, slim.nn.CodebookLinear)
    assert layer.codebook.shape == (tables, 4)
    if group == 7:
        part = before[:, 35:42].reshape(-1)
        wanted = _lloyd(part, torch.linspace(float(part.min()), float(part.max()), 4), torch.ones_like(part), 200)
        torch.testing.assert_close(layer.codebook[5].detach().double(), wanted, rtol=1e-6, atol=1e-7)
        assert layer.weight[:, 35:42].unique().numel() <= 4
    assert isinstance(model.fc2, nn.Linear)


def test_more_bits_are_closer_and_few_distinct_values_are_exact(model: Small) -> None:
    errors = []
    for bits in (1, 2, 4, 6, 8):
        report = slim.cluster_(copy.deepcopy(model), {"fc1": KMeans(bits=bits)})
        errors.append(report.layers[0].error)
    assert errors == sorted(errors, reverse=True)
    with torch.no_grad():
        model.fc1.weight.copy_(torch.randint(-3, 4, model.fc1.weight.shape) / 8)
    before = model.fc1.weight.detach().clone()
    report = slim.cluster_(model, {"fc1": KMeans(bits=3, init="random")})
    assert report.layers[0].error == 0
    assert torch.equal(model.fc1.weight, before)


def test_outputs_are_those_of_the_clustered_weights(model: Small) -> None:
    slim.cluster_(model, KMeans(bits=8))
    twin = Small()
    twin.load_state_dict({
        "conv.weight": model.conv.weight, "conv.bias": model.conv.bias, "fc1.weight": model.fc1.weight,
        "fc1.bias": model.fc1.bias, "fc2.weight": model.fc2.weight,
    })  # fmt: skip
    torch.testing.assert_close(model(X), twin(X), rtol=1e-5, atol=1e-6)


def test_modules_keep_their_identity_bias_hooks_and_flags(model: Small) -> None:
    conv, bias, calls = model.conv, model.conv.bias, []
    conv.register_forward_hook(lambda *_: calls.append(1))
    model.fc1.weight.requires_grad_(False)
    model.eval()
    slim.cluster_(model, KMeans())
    assert model.conv is conv
    assert conv.bias is bias
    assert not conv.training
    assert not model.fc1.codebook.requires_grad
    assert conv.codebook.requires_grad
    model(X)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tables_have_the_dtype_of_the_weights(model: Small, dtype: torch.dtype) -> None:
    model.to(dtype)
    slim.cluster_(model, KMeans(bits=3))
    assert model.fc1.codebook.dtype == dtype
    assert model(X.to(dtype)).dtype == dtype


# --- where k-means starts, what weighs ---


def test_linear_random_and_density_start_where_they_say() -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(3)) ** 3
    linear = KMeans(bits=3, iterations=0).centroids(values, 8)
    torch.testing.assert_close(linear, torch.linspace(float(values.min()), float(values.max()), 8, dtype=torch.float64))
    density = KMeans(bits=3, init="density", iterations=0).centroids(values, 8)
    shares = torch.stack([(values <= c).double().mean() for c in density])
    torch.testing.assert_close(shares, (torch.arange(8).double() + 0.5) / 8, atol=1e-3, rtol=0)
    drawn = [KMeans(bits=3, init="random", iterations=0, seed=seed).centroids(values, 8) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert bool(torch.isin(drawn[0].float(), values).all())


def test_weights_of_importance_shift_centroids_as_lloyd_in_float64() -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(800, generator=generator)
    weights = torch.rand(800, generator=generator) * (values > 0.5) + 1e-3
    start = torch.linspace(float(values.min()), float(values.max()), 8)
    got = kmeans(values, start, weights=weights)
    torch.testing.assert_close(got, _lloyd(values, start, weights, 300), rtol=1e-9, atol=1e-10)
    plain = kmeans(values, start)
    torch.testing.assert_close(plain, _lloyd(values, start, torch.ones(800), 300), rtol=1e-9, atol=1e-10)
    # What matters is met more closely, at the expense of the rest.
    heavy = values > 0.5

    def error(centroids: Tensor) -> float:
        return float((values[heavy].double()[:, None] - centroids).abs().min(1).values.square().mean())

    assert error(got) < error(plain)


def test_importance_comes_as_a_name_a_mapping_or_a_callable(model: Small) -> None:
    weights = {"fc1": torch.rand_like(model.fc1.weight)}

    def tables(importance: Any) -> Tensor:
        one = copy.deepcopy(model)
        slim.cluster_(one, {"fc1": KMeans(bits=3, importance=importance)})
        return one.fc1.codebook.detach()

    assert torch.equal(tables(weights), tables(lambda module, name: weights[name]))
    assert not torch.equal(tables(weights), tables(None))
    assert torch.equal(tables("magnitude"), tables(lambda module, name: module.weight.abs()))


def test_fisher_is_the_mean_squared_gradient(model: Small) -> None:
    slim.prune_(model, {"fc1": slim.prune.Magnitude(0.5)})
    batches = [(X[:2], torch.tensor([0, 1])), (X[2:], torch.tensor([2, 3]))]
    found = slim.quantize.fisher(model, batches, F.cross_entropy)
    wanted = torch.zeros_like(model.fc2.weight)
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        wanted += model.fc2.weight.grad.square() / 2
    torch.testing.assert_close(found["fc2"], wanted)
    assert float(found["fc1"][model.fc1.weight == 0].abs().max()) == 0
    report = slim.cluster_(model, KMeans(importance=found))
    assert len(report.clustered) == 3
    with pytest.raises(ValueError, match="data: expected at least one batch"):
        slim.quantize.fisher(Small(), [], F.cross_entropy)


# --- uniform grids ---


def test_the_uniform_grid_is_exact(model: Small) -> None:
    before = model.fc1.weight.detach().clone()
    slim.cluster_(model, {"fc1": Uniform(bits=3), "fc2": Uniform(bits=2, symmetric=True)})
    low, high = float(before.min()), float(before.max())
    grid = torch.linspace(low, high, 8, dtype=torch.float64).float()
    assert torch.equal(model.fc1.codebook[0].detach(), grid)
    step = (high - low) / 7
    assert float((model.fc1.weight.detach() - before).abs().max()) <= step / 2 * (1 + 1e-5)
    largest = float(model.fc2.codebook.detach().abs().max())
    torch.testing.assert_close(model.fc2.codebook[0].detach(), torch.tensor([-1, -1 / 3, 1 / 3, 1]) * largest)


# --- pruned weights ---


def test_the_smaller_format_is_taken_and_masks_are_gone() -> None:
    torch.manual_seed(0)
    model = LeNet5()
    slim.prune_(model, {"conv1": slim.prune.Magnitude(0.3), "*": slim.prune.Magnitude(0.9)})
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in ("conv1", "conv2", "fc1", "fc2")}
    report = slim.cluster_(model, KMeans(bits=5))
    assert [layer.format for layer in report.layers] == ["codebook", *["sparse_codebook"] * 3]
    for name, weight in dense.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight == 0, weight == 0)
        assert layer.format.nbytes == report.layers[list(dense).index(name)].bytes_after
    assert slim.prune.masks(model) == {}
    assert report.bytes_after == sum(layer.bytes_after for layer in report.layers)


@pytest.mark.parametrize("format", ["codebook", "sparse_codebook"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_zero_through_training(model: Small, format: Any, optimizer: str) -> None:
    slim.prune_(model, slim.prune.Magnitude(0.6))
    slim.cluster_(model, KMeans(bits=3, format=format))
    zeros = {name: model.get_submodule(name).weight == 0 for name in ("conv", "fc1", "fc2")}
    before = model.fc1.weight.detach().clone()
    if optimizer == "sgd":
        used: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    else:
        used = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(5):
        used.zero_grad()
        (model(X) - 1).square().mean().backward()
        used.step()
    assert not torch.equal(model.fc1.weight, before)
    for name, mask in zeros.items():
        assert bool((model.get_submodule(name).weight[mask] == 0).all())
        assert 0.55 < float(mask.float().mean()) < 0.65


def test_few_zeros_without_a_mask_are_weights_like_others(model: Small) -> None:
    with torch.no_grad():
        model.fc1.weight[0, :3] = 0
    slim.cluster_(model, {"fc1": KMeans(bits=4)})
    assert isinstance(model.fc1, slim.nn.CodebookLinear)
    assert not model.fc1.zero


def test_one_bit_beside_zeros_leaves_one_value_or_two(model: Small) -> None:
    slim.prune_(model, slim.prune.Magnitude(0.5))
    for format, values in (("codebook", 2), ("sparse_codebook", 3)):
        one = copy.deepcopy(model)
        slim.cluster_(one, KMeans(bits=1, format=format))  # type: ignore[arg-type]
        assert one.fc1.weight.unique().numel() == values


# --- training ---


def test_the_gradient_of_a_centroid_is_the_sum_over_its_members(model: Small) -> None:
    slim.prune_(model, {"fc1": slim.prune.Magnitude(0.9)})
    slim.cluster_(model, {"fc1": KMeans(bits=2), "conv": KMeans(bits=3, group_size=9)})
    twin = Small()
    with torch.no_grad():
        twin.conv.weight.copy_(model.conv.weight)
        twin.conv.bias.copy_(model.conv.bias)
        twin.fc1.weight.copy_(model.fc1.weight)
        twin.fc1.bias.copy_(model.fc1.bias)
        twin.fc2.weight.copy_(model.fc2.weight)
    model(X).square().sum().backward()
    twin(X).square().sum().backward()
    held = model.fc1.format
    rows, columns = held.positions()
    members = twin.fc1.weight.grad[rows, columns]
    wanted = torch.zeros(4).index_add(0, held.indices().long(), members)
    torch.testing.assert_close(model.fc1.codebook.grad[0], wanted, rtol=1e-4, atol=1e-4)
    conv = model.conv.format
    wanted = torch.zeros(3, 8).reshape(-1)
    wanted.index_add_(0, (conv.tables() * 8 + conv.indices()).reshape(-1), twin.conv.weight.grad.reshape(-1))
    torch.testing.assert_close(model.conv.codebook.grad.reshape(-1), wanted, rtol=1e-4, atol=1e-4)


def test_tables_train_to_a_lower_loss(model: Small) -> None:
    target = 3 * model(X).detach()
    slim.cluster_(model, KMeans(bits=2))
    codes = model.fc1.codes.clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert torch.equal(model.fc1.codes, codes)
    assert model.fc1.weight.unique().numel() <= 4


# --- which layers ---


def test_a_single_layer_is_a_model() -> None:
    layer = nn.Linear(30, 20)
    report = slim.cluster_(layer, KMeans(bits=3))
    assert isinstance(layer, slim.nn.CodebookLinear)
    assert report.layers[0].name == ""
    assert "(model)" in str(report)


def test_globs_filters_and_none_choose_layers(model: Small) -> None:
    slim.cluster_(
        model, {"fc1": None, "fc*": KMeans(bits=2), "conv": KMeans(bits=6)}, filter_fn=lambda m, n: n != "conv"
    )
    assert type(model.conv) is nn.Conv2d
    assert type(model.fc1) is nn.Linear
    assert isinstance(model.fc2, slim.nn.CodebookLinear)
    with pytest.raises(ValueError, match="'fc9' matches no"):
        slim.cluster_(model, {"fc9": KMeans()})


def test_layers_that_cannot_be_converted_say_why(model: Small) -> None:
    slim.cluster_(model, {"fc2": KMeans(bits=2)})
    model.conv.padding_mode = "reflect"
    codebook = model.fc2.codebook
    report = slim.cluster_(model, KMeans(bits=5))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["fc2"] == "is a CodebookLinear already"
    assert "padding_mode" in reasons["conv"]
    assert model.fc2.codebook is codebook
    assert [layer.name for layer in report.clustered] == ["fc1"]
    text = str(report)
    assert "1 of 3 layers clustered" in text
    assert "padding_mode" in text


def test_layers_of_one_weight_share_one_table() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Tied()
    with pytest.raises(ValueError, match="'a' and 'b' share one weight"):
        slim.cluster_(model, {"a": KMeans(bits=2), "b": KMeans(bits=3)})
    assert type(model.a) is nn.Linear
    slim.cluster_(model, KMeans(bits=2))
    assert model.a.codebook is model.b.codebook
    assert model.a.bias is not model.b.bias
    x = torch.randn(2, 12)
    model(x).sum().backward()
    alone = copy.deepcopy(model)
    weight = alone.a.weight.detach().requires_grad_()
    F.linear(F.linear(x, weight, alone.a.bias), weight, alone.b.bias).sum().backward()
    wanted = torch.zeros(4).index_add(0, model.a.format.indices().long().reshape(-1), weight.grad.reshape(-1))
    torch.testing.assert_close(model.a.codebook.grad[0], wanted, rtol=1e-5, atol=1e-5)

    half = Tied()
    report = slim.cluster_(half, {"a": KMeans(bits=2)})
    assert report.clustered == []
    assert "shared with 'b'" in report.layers[0].reason


def test_a_model_without_layers_gives_an_empty_report() -> None:
    report = slim.cluster_(nn.Sequential(nn.ReLU()), KMeans())
    assert report.layers == []
    assert "the model is as it was" in str(report)


# --- the report ---


def test_the_report_is_a_table_and_json(model: Small) -> None:
    slim.prune_(model, {"fc1": slim.prune.Magnitude(0.9)})
    report = slim.cluster_(model, {"fc1": KMeans(bits=3), "conv": Uniform(bits=4)})
    text = str(report)
    assert all(word in text for word in ("fc1", "sparse_codebook", "8x3x3x3", "together", "new one"))
    data = report.to_dict()
    assert data["layers"][0]["method"] == "uniform"
    assert data["layers"][1]["zeros"] == pytest.approx(0.9)
    assert data["bytes_before"] == 4 * (216 + 11520)
    conv = report.layers[0]
    assert conv.bytes_after == 216 // 2 + 16 * 4


# --- bad input: refused by name, the model left as it was ---


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"bits": 0}, ValueError, "bits: expected 1 … 8, got 0"),
        ({"bits": 9}, ValueError, "bits: expected 1 … 8, got 9"),
        ({"bits": 2.0}, TypeError, "bits: expected an int"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"group_size": "column"}, TypeError, "group_size"),
        ({"init": "kmeans++"}, ValueError, "init: expected 'linear'"),
        ({"importance": "gradient"}, TypeError, "importance: expected None, 'magnitude'"),
        ({"importance": 3}, TypeError, "importance"),
        ({"iterations": -1}, ValueError, "iterations: expected 0 or more"),
        ({"iterations": 1.5}, TypeError, "iterations"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"format": "sparse"}, ValueError, "format: expected 'auto'"),
    ],
)
def test_bad_configurations_are_refused_at_construction(options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        KMeans(**options)


def test_bad_grids_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="bits: expected 1 … 8"):
        Uniform(bits=9)
    with pytest.raises(TypeError, match="symmetric: expected a bool"):
        Uniform(symmetric=1)  # type: ignore[arg-type]


def test_bad_models_are_refused_by_layer_name_and_left_alone(model: Small) -> None:
    slim.prune_(model, {"conv": slim.prune.Magnitude(0.5)})
    with torch.no_grad():
        model.fc2.weight[1, 1] = float("nan")
    state = _state(model)
    with pytest.raises(ValueError, match="layer 'fc2': its weight holds NaN"):
        slim.cluster_(model, KMeans())
    assert [type(model.fc1), type(model.fc2)] == [nn.Linear, nn.Linear]
    with torch.no_grad():
        model.fc2.weight[1, 1] = 0
    state = _state(model)
    with pytest.raises(ValueError, match=r"layer 'fc2': group_size: expected 1 … 40"):
        slim.cluster_(model, {"fc2": KMeans(group_size=41), "*": KMeans()})
    assert _same(model, state)
    with pytest.raises(ValueError, match="importance: expected a tensor for layer 'fc1'"):
        slim.cluster_(model, {"fc*": KMeans(importance={"fc2": torch.ones(5, 40)})})
    with pytest.raises(
        ValueError, match=r"importance: expected a tensor of shape \(5, 40\) for layer 'fc2', got \(5,\)"
    ):
        slim.cluster_(model, {"fc2": KMeans(importance=lambda m, n: torch.ones(5))})
    with pytest.raises(ValueError, match="importance: expected finite numbers"):
        slim.cluster_(model, {"fc2": KMeans(importance=lambda m, n: -torch.ones(5, 40))})
    assert _same(model, state)


def test_wrong_kinds_of_arguments_are_named(model: Small) -> None:
    with pytest.raises(TypeError, match="config: expected KMeans, Uniform"):
        slim.cluster_(model, slim.prune.Magnitude(0.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config: expected at least one glob"):
        slim.cluster_(model, {})
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        slim.cluster_([model], KMeans())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 'fc1': its weight is on the meta device"):
        slim.cluster_(Small().to("meta"), {"fc1": KMeans()})


def test_one_bit_of_a_pruned_layer_means_two_values_beside_the_zero() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    slim.prune_(layer, slim.prune.Magnitude(sparsity=0.5))
    slim.cluster_(layer, slim.quantize.KMeans(bits=1))
    assert isinstance(layer, slim.nn.SparseCodebookLinear)
    assert torch.unique(layer.weight.detach()).numel() == 3
