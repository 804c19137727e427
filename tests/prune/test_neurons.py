# SPDX-License-Identifier: Apache-2.0
"""Removing neurons: the right ones, everywhere at once, and nothing on error."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.prune import (
    L1,
    APoZ,
    BatchNorm,
    Evidence,
    Group,
    Importance,
    Magnitude,
    Neurons,
    Random,
    Taylor,
    bake_,
    prune_,
)
from slimtorch.prune.importance import call

from .networks import CASES, Case
from .test_magnitude import assert_unchanged, state


def widths(model: nn.Module) -> dict[str, int]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            found[name] = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    return found


def flat(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


@pytest.fixture(params=CASES, ids=[name.replace(" ", "-") for name in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


# --- which layers get narrower ------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["l1", "l2", "random"])
def test_half_of_the_neurons(case: Case, importance: str) -> None:
    model, inputs = case.model(), case.inputs()
    before = widths(model)
    shapes = [t.shape for t in flat(call(model, inputs))]
    parameters = sum(p.numel() for p in model.parameters())
    report = prune_(model, Neurons(0.5, importance), example_inputs=inputs)
    assert widths(model) == {**before, **case.halved}
    assert [t.shape for t in flat(call(model, inputs))] == shapes
    assert report.parameters_before == parameters
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < parameters
    reported = {x.name: (x.width_before, x.width_after) for x in report.layers}
    assert reported == {name: (before[name], widths(model)[name]) for name in before}
    for name, module in model.named_modules():  # the attributes agree with the weights
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), name
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups), name
    for output in flat(call(model, inputs)):  # it trains
        output.square().sum().backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


TOGETHER = {("grouped", "a"): 4, ("grouped", "b"): 4, ("chunked", "fc"): 2}  # neurons that can only go together


class Chosen:
    """Finds the first half of the neurons useless; remembers the groups."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.groups: list[Group] = []

    def useless(self, group: Group) -> Tensor:
        part = group.size // TOGETHER.get((self.name, group.name), 1)
        return torch.arange(group.size) % part < part // 2

    def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        self.groups = list(groups)
        return [1.0 - self.useless(group).float() for group in groups]


def silence(layer: Any, channels: list[int]) -> None:
    """Zeroes the weights of `layer` that read `channels`."""
    with torch.no_grad():
        for channel in channels:
            if isinstance(layer, nn.Linear):
                layer.weight[:, channel] = 0
            elif layer.transposed:
                layer.weight[channel] = 0
            else:
                per = layer.in_channels // layer.groups
                rows = layer.out_channels // layer.groups
                start = channel // per * rows
                layer.weight[start : start + rows, channel % per] = 0


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", [n for n in CASES if n != "normed"])  # a norm over channels sees how many there are
def test_computes_what_the_wide_network_does_with_those_neurons_silent(name: str, scope: Any) -> None:
    wide, inputs = CASES[name].model().eval(), CASES[name].inputs()
    narrow = copy.deepcopy(wide)
    chosen = Chosen(name)
    prune_(narrow, Neurons(0.5, chosen, scope=scope), example_inputs=inputs)
    assert chosen.groups
    for group in chosen.groups:
        assert group.readers
        useless = chosen.useless(group)
        for slots in group.readers:
            channels = slots.index[useless[slots.neuron]].tolist()
            silence(wide.get_submodule(slots.layer), channels)
    for a, b in zip(flat(call(wide, inputs)), flat(call(narrow, inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_removes_the_smallest_rows() -> None:
    model = CASES["mlp"].model()
    weight = model.fc1.weight.detach().clone()
    keep = weight.abs().sum(1).topk(16).indices.sort().values
    bias = model.fc1.bias.detach().clone()
    columns = model.fc2.weight.detach().clone()
    prune_(model, {"fc1": Neurons(0.5)}, example_inputs=CASES["mlp"].inputs())
    assert torch.equal(model.fc1.weight, weight[keep])
    assert torch.equal(model.fc1.bias, bias[keep])
    assert torch.equal(model.fc2.weight, columns[:, keep])


def test_flattened_channels_and_batch_norm() -> None:
    model = CASES["conv"].model()
    old = copy.deepcopy(model)
    keep = old.conv2.weight.abs().sum((1, 2, 3)).topk(6).indices.sort().values
    prune_(model, {"conv2": Neurons(0.5)}, example_inputs=CASES["conv"].inputs())
    assert torch.equal(model.conv2.weight, old.conv2.weight[keep])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(model.bn2, name), getattr(old.bn2, name)[keep])
    columns = (keep[:, None] * 16 + torch.arange(16)).flatten()
    assert torch.equal(model.fc.weight, old.fc.weight[:, columns])


def test_residual_layers_lose_the_same_neurons() -> None:
    model = CASES["residual"].model()
    old = copy.deepcopy(model)
    total = old.stem.weight.abs().sum((1, 2, 3)) + old.a2.weight.abs().sum((1, 2, 3))
    keep = total.topk(4).indices.sort().values
    prune_(model, {"stem": Neurons(0.5), "a2": Neurons(0.5)}, example_inputs=CASES["residual"].inputs())
    assert torch.equal(model.stem.weight, old.stem.weight[keep])
    assert torch.equal(model.a2.weight, old.a2.weight[keep])
    assert torch.equal(model.a1.weight, old.a1.weight[:, keep])
    assert torch.equal(model.down.weight, old.down.weight[:, keep])


def test_grouped_convolution_loses_one_of_each_group() -> None:
    model = CASES["grouped"].model()
    old = copy.deepcopy(model)
    prune_(model, {"a": Neurons(0.5)}, example_inputs=CASES["grouped"].inputs())
    score = old.a.weight.abs().sum((1, 2, 3)).reshape(4, 4).mean(0)
    inner = score.topk(2).indices.sort().values
    keep = (inner[None, :] + 4 * torch.arange(4)[:, None]).flatten()
    assert torch.equal(model.a.weight, old.a.weight[keep])
    assert torch.equal(model.b.weight, old.b.weight[:, inner])


def test_gated_halves_go_together() -> None:
    model = CASES["chunked"].model()
    old = copy.deepcopy(model)
    prune_(model, {"fc": Neurons(0.5)}, example_inputs=CASES["chunked"].inputs())
    keep = old.fc.weight.abs().sum(1).reshape(2, 12).mean(0).topk(6).indices.sort().values
    assert torch.equal(model.fc.weight, old.fc.weight[torch.cat([keep, keep + 12])])


def test_module_used_twice() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.out = nn.Linear(20, 16), nn.Linear(16, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.out(F.relu(self.trunk(a)) * F.relu(self.trunk(b)))

    model = Siamese()
    prune_(model, Neurons(0.5), example_inputs=(torch.randn(2, 20), torch.randn(2, 20)))
    assert widths(model) == {"trunk": 8, "out": 3}


# --- how many -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 32), (0.01, 32), (0.25, 24), (0.9, 3), (0.999, 1)])
def test_exact_ratio(ratio: float, left: int) -> None:
    model = CASES["mlp"].model()
    prune_(model, {"fc1": Neurons(ratio)}, example_inputs=CASES["mlp"].inputs())
    assert widths(model)["fc1"] == left


def test_min_neurons_and_round_to() -> None:
    for options, expected in [
        ({"min_neurons": 5}, {"fc1": 5, "fc2": 5}),
        ({"min_neurons": 20}, {"fc1": 20, "fc2": 16}),
        ({"round_to": 8}, {"fc1": 8, "fc2": 8}),
        ({"round_to": 8, "min_neurons": 9}, {"fc1": 16, "fc2": 16}),
        ({"round_to": 12}, {"fc1": 12, "fc2": 12}),
    ]:
        model = CASES["mlp"].model()
        prune_(model, Neurons(0.9, **options), example_inputs=CASES["mlp"].inputs())
        assert widths(model) == {**expected, "out": 4}
    model = CASES["grouped"].model()
    prune_(model, Neurons(0.9, round_to=8), example_inputs=CASES["grouped"].inputs())
    assert widths(model) == {"a": 8, "b": 8, "c": 8, "out": 5}


def test_global_scope_counts_over_all_layers() -> None:
    model = CASES["mlp"].model()
    model.fc2.weight.data[:12] *= 1e-3  # far below their layer's mean
    prune_(model, Neurons(0.25, scope="global"), example_inputs=CASES["mlp"].inputs())
    assert widths(model)["fc2"] == 4
    assert widths(model)["fc1"] == 32
    model = CASES["mlp"].model()
    prune_(model, Neurons(0.9, scope="global", min_neurons=3), example_inputs=CASES["mlp"].inputs())
    left = widths(model)
    assert left["fc1"] + left["fc2"] == 48 - round(0.9 * 48) + max(0, 6 - (48 - round(0.9 * 48)))
    assert min(left["fc1"], left["fc2"]) >= 3


def test_threshold_takes_what_it_says() -> None:
    model = CASES["mlp"].model()
    with torch.no_grad():
        model.fc1.weight[:5] = 0
        model.fc2.weight[3] = 1e-3
    prune_(model, Neurons(0, threshold=0), example_inputs=CASES["mlp"].inputs())
    assert widths(model) == {"fc1": 27, "fc2": 16, "out": 4}
    prune_(model, Neurons(0, threshold=0.1, round_to=4), example_inputs=CASES["mlp"].inputs())
    assert widths(model) == {"fc1": 27, "fc2": 16, "out": 4}  # 15 are rounded up
    prune_(model, {"fc2": Neurons(0, threshold=0.1)}, example_inputs=CASES["mlp"].inputs())
    assert widths(model) == {"fc1": 27, "fc2": 15, "out": 4}
    prune_(model, {"fc2": Neurons(0, threshold=1e9, min_neurons=2)}, example_inputs=CASES["mlp"].inputs())
    assert widths(model) == {"fc1": 27, "fc2": 2, "out": 4}


def test_ignore_filter_and_dict() -> None:
    x = CASES["conv"].inputs()
    for config, filter_fn, expected in [
        (Neurons(0.5, ignore=["conv1", "f*"]), None, {"conv2": 6}),
        (Neurons(0.5, ignore="conv*"), None, {"fc": 12}),
        (Neurons(0.5), lambda m, n: n == "fc", {"fc": 12}),
        ({"conv1": Neurons(0.25), "fc": None, "*": Neurons(0.75)}, None, {"conv1": 6, "conv2": 3}),
    ]:
        model = CASES["conv"].model()
        before = widths(model)
        prune_(model, config, example_inputs=x, filter_fn=filter_fn)
        assert widths(model) == {**before, **expected}


def test_tied_to_a_layer_left_out() -> None:
    model = CASES["residual"].model()
    report = prune_(model, Neurons(0.5, ignore=["a2"]), example_inputs=CASES["residual"].inputs())
    assert widths(model)["stem"] == 8
    assert "'stem': all neurons kept, tied to 'a2', left out" in report.notes


# --- what is kept -------------------------------------------------------------------------------------------------


def test_output_layer_is_never_touched() -> None:
    for model in (
        nn.Linear(6, 5),
        nn.Sequential(nn.Linear(6, 5), nn.ReLU()),
        nn.Sequential(nn.Linear(6, 5), nn.Softmax(1)),
    ):
        before = state(model)
        report = prune_(model, Neurons(0.5), example_inputs=torch.randn(2, 6))
        assert "they reach the model's output" in str(report.notes)
        assert "Nothing to prune" in str(report.notes)
        assert_unchanged(model, before)


def test_training_mode_gradients_flags_and_identity() -> None:
    model = CASES["conv"].model()
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    inputs = CASES["conv"].inputs()
    model(inputs).sum().backward()
    identities = {n: id(p) for n, p in model.named_parameters()}
    grad = model.fc.weight.grad.clone()
    modes = {n: m.training for n, m in model.named_modules()}
    keep = model.fc.weight.abs().sum(1).topk(12).indices.sort().values
    prune_(model, {"fc": Neurons(0.5)}, example_inputs=inputs)
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.requires_grad
    assert torch.equal(model.fc.weight.grad, grad[keep])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.fc.weight.detach().clone()
    model(inputs).sum().backward()
    optimizer.step()
    assert not torch.equal(model.fc.weight, before)


def test_works_under_no_grad_and_inference_mode() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        model = CASES["conv"].model()
        with context():
            inputs = CASES["conv"].inputs()
            prune_(model, Neurons(0.5), example_inputs=inputs)
        assert widths(model)["fc"] == 12
        model(CASES["conv"].inputs()).sum().backward()


def test_frozen_model() -> None:
    model = CASES["residual"].model().requires_grad_(False)
    prune_(model, Neurons(0.5), example_inputs=CASES["residual"].inputs())
    assert widths(model)["stem"] == 4
    assert not any(p.requires_grad for p in model.parameters())


def test_running_statistics_of_the_model_do_not_move() -> None:
    model = CASES["conv"].model().train()
    mean, seen = model.bn1.running_mean.clone(), model.bn1.num_batches_tracked.clone()
    x = CASES["conv"].inputs()
    prune_(model, {"fc": Neurons(0.5, "apoz")}, example_inputs=x, data=[x, x])
    assert torch.equal(model.bn1.running_mean, mean)
    assert torch.equal(model.bn1.num_batches_tracked, seen)


def test_state_dict_and_deepcopy_of_the_result() -> None:
    model, x = CASES["conv"].model().eval(), CASES["conv"].inputs()
    prune_(model, Neurons(0.5), example_inputs=x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    twin.load_state_dict(model.state_dict())


def test_prune_neurons_twice_then_weights() -> None:
    model, x = CASES["conv"].model().eval(), CASES["conv"].inputs()
    prune_(model, Neurons(0.5), example_inputs=x)
    prune_(model, Neurons(0.5), example_inputs=x)
    assert widths(model) == {"conv1": 2, "conv2": 3, "fc": 6, "out": 5}
    prune_(model, Magnitude(0.5))
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("kind", ["dict", "tuple", "tensor"])
def test_forms_of_example_inputs(kind: str) -> None:
    model = CASES["two inputs"].model()
    left, right = CASES["two inputs"].inputs()
    prune_(model, Neurons(0.5), example_inputs={"left": left, "right": right} if kind == "dict" else (left, right))
    assert widths(model)["left"] == 8


def test_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = CASES["conv"].model().to(dtype)
        prune_(model, Neurons(0.5), example_inputs=CASES["conv"].inputs().to(dtype))
        assert model.fc.weight.dtype == dtype
        assert widths(model)["fc"] == 12


# --- importance ---------------------------------------------------------------------------------------------------


def silent(model: Any) -> list[int]:
    """Makes neurons 3, 4, 5 of fc1 and no others silent on every input."""
    model.fc1.bias.data.fill_(50.0)
    model.fc1.bias.data[3:6] = -50.0
    return [3, 4, 5]


def removed_rows(model: nn.Module, importance: Any, ratio: float, **options: Any) -> list[int]:
    old = model.fc1.bias.detach().clone()
    old_weight = model.fc1.weight.detach().clone()
    prune_(model, {"fc1": Neurons(ratio, importance, **options.pop("config", {}))}, **options)
    left = [tuple(r) for r in torch.cat([model.fc1.weight, model.fc1.bias[:, None]], 1).tolist()]
    before = [tuple(r) for r in torch.cat([old_weight, old[:, None]], 1).tolist()]
    return [i for i, row in enumerate(before) if row not in left]


def test_apoz_removes_silent_neurons() -> None:
    for importance in ("apoz", APoZ()):
        model = CASES["mlp"].model()
        gone = silent(model)
        data = [torch.randn(4, 20), (torch.randn(3, 20), torch.zeros(3))]
        assert removed_rows(model, importance, 3 / 32, example_inputs=data[0], data=data) == gone


def test_apoz_counts_each_value() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1))
    model[0].weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    x = torch.tensor([[1.0, -1, 2, 3], [-1, 2, 0, 5]]).view(2, 1, 2, 2)
    group = Group("0", 2)
    found: list[Tensor] = []

    class Spy(APoZ):
        def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
            found.extend(super().neurons(model, groups, evidence))
            return found

    prune_(model, Neurons(0.5, Spy()), example_inputs=x, data=[x, x[:1]])
    assert group.size == 2
    assert found[0].tolist() == [(3 + 2 + 3) / 12, (1 + 1 + 1) / 12]
    assert model[0].weight.flatten().tolist() == [1.0]


def test_taylor_removes_neurons_without_effect() -> None:
    model = CASES["mlp"].model()
    model.fc2.weight.data[:, [2, 9]] = 0  # nobody listens: no gradient reaches them
    model.fc1.bias.data.fill_(5.0)
    data = [(torch.randn(8, 20), torch.randint(0, 4, (8,))) for _ in range(3)]
    gone = removed_rows(
        model, "taylor", 2 / 32, example_inputs=data[0][0], data=data, config={"loss_fn": F.cross_entropy}
    )
    assert gone == [2, 9]


def test_taylor_is_equation_8() -> None:
    model = CASES["mlp"].model()
    data = [(torch.randn(8, 20), torch.randint(0, 4, (8,))) for _ in range(2)]
    expected = torch.zeros(32, 20)
    for x, y in data:
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), model.fc1.weight)[0]
        expected += (gradient * model.fc1.weight.detach()).square() / 2
    scores = Taylor(F.cross_entropy).weights(model, {"fc1": model.fc1}, Evidence(data))["fc1"]
    torch.testing.assert_close(scores, expected)


def test_batchnorm_scale() -> None:
    model = CASES["conv"].model()
    model.bn1.weight.data = torch.tensor([5.0, -0.1, 3, 0.2, -4, 0.05, 2, -0.3])
    for importance in ("batchnorm", BatchNorm()):
        narrow = copy.deepcopy(model)
        prune_(narrow, {"conv1": Neurons(0.5, importance)}, example_inputs=CASES["conv"].inputs())
        assert narrow.bn1.weight.tolist() == [5, 3, -4, 2]
    with pytest.raises(ValueError, match="'batchnorm' needs a batch norm with a scale after layer 'fc'"):
        prune_(model, Neurons(0.5, "batchnorm"), example_inputs=CASES["conv"].inputs())


def test_random_is_reproducible() -> None:
    rows = [removed_rows(CASES["mlp"].model(), "random", 0.5, example_inputs=CASES["mlp"].inputs(), config={"seed": s})
            for s in (1, 1, 2)]  # fmt: skip
    assert rows[0] == rows[1] != rows[2]
    own = removed_rows(CASES["mlp"].model(), Random(2), 0.5, example_inputs=CASES["mlp"].inputs(), config={"seed": 1})
    assert own == rows[2]


def test_own_importance() -> None:
    class First:
        """The first neurons matter most."""

        def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
            return [-torch.arange(group.size, dtype=torch.float32) + group.size for group in groups]

    assert isinstance(First(), Importance)
    gone = removed_rows(CASES["mlp"].model(), First(), 0.25, example_inputs=CASES["mlp"].inputs())
    assert gone == list(range(24, 32))


def test_data_read_once_serves_several_configurations() -> None:
    model, x = CASES["mlp"].model(), CASES["mlp"].inputs()
    config = {"fc1": Neurons(0.5, "apoz"), "fc2": Neurons(0.25, "apoz")}
    prune_(model, config, example_inputs=x, data=iter([x, x]))
    assert widths(model) == {"fc1": 16, "fc2": 12, "out": 4}


# --- bad input ----------------------------------------------------------------------------------------------------


class _Shuffle(nn.Module):
    """Flips the channels, which the dependency graph takes for an elementwise operation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.a(x)).flip(1))


class _Fixed(nn.Module):
    """A width written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.a(x)).view(-1, 2, 4).sum(1))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.out = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out(x + self.mix(x, x, x, need_weights=False)[0])


def test_shared_parameters_and_attention_stay() -> None:
    for model, x, why in [
        (_Tied(), torch.randn(2, 6), "shared"),
        (_Attention(), torch.randn(2, 4, 6), "MultiheadAttention"),
    ]:
        before = state(model)
        report = prune_(model, Neurons(0.5), example_inputs=x)
        assert why in str(report.notes)
        assert_unchanged(model, before)


X = torch.randn(2, 20)


@pytest.mark.parametrize(
    ("config", "options", "error", "match"),
    [
        (Neurons(0.5), {}, ValueError, "example_inputs: Neurons needs inputs"),
        (Neurons(0.5), {"example_inputs": torch.randn(2, 19)}, ValueError, "example_inputs: do not fit"),
        (Neurons(0.5), {"example_inputs": (X, X)}, ValueError, "example_inputs: do not fit"),
        (Neurons(0.5), {"example_inputs": "x"}, ValueError, "example_inputs: do not fit"),
        (Neurons(0.5, "apoz"), {"example_inputs": X}, ValueError, "data: importance 'apoz' needs"),
        (Neurons(0.5, "apoz"), {"example_inputs": X, "data": []}, ValueError, "at least one batch"),
        (Neurons(0.5, "apoz"), {"example_inputs": X, "data": [()]}, ValueError, "batch 0 is empty"),
        (Neurons(0.5, "apoz"), {"example_inputs": X, "data": [X[:, 1:]]}, ValueError, "data: a batch does not fit"),
        (Neurons(0.5, "taylor"), {"example_inputs": X, "data": [X]}, ValueError, "loss_fn: importance 'taylor'"),
        (Neurons(0.5, Taylor(F.cross_entropy)), {"example_inputs": X}, ValueError, "data: importance 'taylor'"),
        (Neurons(0.5, Taylor(F.cross_entropy)), {"example_inputs": X, "data": [X]}, ValueError, "0 targets"),
        (Neurons(0.5, Taylor(lambda y: y)), {"example_inputs": X, "data": [X]}, ValueError, "scalar tensor"),
        (Neurons(0.5, "batchnorm"), {"example_inputs": X}, ValueError, "needs a batch norm"),
        (Neurons(0.5, ignore=["head"]), {"example_inputs": X}, ValueError, "ignore: the glob 'head' matches no"),
        ({"head": Neurons(0.5)}, {"example_inputs": X}, ValueError, "config: the glob 'head' matches no"),
    ],
)
def test_bad_input_changes_nothing(config: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = CASES["mlp"].model().train()
    before, before_widths = state(model), widths(model)
    with pytest.raises(error, match=match):
        prune_(model, config, **options)
    assert_unchanged(model, before)
    assert widths(model) == before_widths
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())


class _Wrong:
    def __init__(self, value: Any) -> None:
        self.value = value

    def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        return [torch.full((group.size + self.value[0],), self.value[1]) for group in groups][self.value[2] :]


@pytest.mark.parametrize(
    ("value", "match"), [((1, 1.0, 0), "shape"), ((0, math.nan, 0), "not finite"), ((0, 1.0, 1), "1 tensors for 2")]
)
def test_importance_that_answers_nonsense(value: Any, match: str) -> None:
    model = CASES["mlp"].model()
    before = state(model)
    with pytest.raises(ValueError, match=match):
        prune_(model, Neurons(0.5, _Wrong(value)), example_inputs=X)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("build", "match"), [(_Shuffle, "mixes channels"), (_Fixed, "without the neurons")])
def test_wiring_that_the_graph_does_not_follow(build: Any, match: str) -> None:
    torch.manual_seed(0)
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=match):
        prune_(model, Neurons(0.4), example_inputs=torch.randn(2, 6))
    assert_unchanged(model, before)


def test_nan_masks_and_lazy_layers() -> None:
    model = CASES["mlp"].model()
    model.fc2.weight.data[0, 0] = math.nan
    before = state(model)
    with pytest.raises(ValueError, match="layer 'fc2' holds NaN"):
        prune_(model, Neurons(0.5), example_inputs=X)
    assert_unchanged(model, before)

    model = CASES["mlp"].model()
    prune_(model, Magnitude(0.5))
    before = state(model)
    with pytest.raises(ValueError, match=r"layer 'fc1' has masks.*bake_"):
        prune_(model, Neurons(0.5), example_inputs=X)
    assert_unchanged(model, before)
    bake_(model)
    prune_(model, Neurons(0.5), example_inputs=X)

    with pytest.raises(ValueError, match="not initialised"):
        prune_(nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2)), Neurons(0.5), example_inputs=X)


def test_nothing_to_prune() -> None:
    model = nn.Sequential(nn.ReLU())
    assert "Nothing to prune" in str(prune_(model, Neurons(0.5), example_inputs=X))
    model = CASES["mlp"].model()
    report = prune_(model, Neurons(0.5), example_inputs=X, filter_fn=lambda m, n: False)
    assert "Nothing to prune" in str(report)


def test_layer_that_is_not_run_is_noted() -> None:
    model = CASES["mlp"].model()
    model.add_module("spare", nn.Linear(3, 3))
    report = prune_(model, Neurons(0.5), example_inputs=X)
    assert "'spare': all neurons kept, example_inputs do not reach them" in report.notes
    assert widths(model)["spare"] == 3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ratio": 1.0}, ValueError),
        ({"ratio": -0.1}, ValueError),
        ({"ratio": "half"}, TypeError),
        ({"importance": "beauty"}, ValueError),
        ({"importance": 3}, TypeError),
        ({"importance": L1}, TypeError),
        ({"scope": "all"}, ValueError),
        ({"min_neurons": 0}, ValueError),
        ({"min_neurons": 1.5}, TypeError),
        ({"round_to": 0}, ValueError),
        ({"seed": "a"}, TypeError),
        ({"ignore": [3]}, TypeError),
        ({"loss_fn": "mse"}, TypeError),
        ({"normalize": 1}, TypeError),
        ({"normalize": False}, ValueError),  # scope is "layer"
        ({"threshold": "low"}, TypeError),
        ({"threshold": -1.0}, ValueError),
        ({"threshold": math.nan}, ValueError),
        ({"threshold": 0.1}, ValueError),  # ratio is 0.5
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        Neurons(**{"ratio": 0.5, **options})
