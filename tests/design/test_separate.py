# SPDX-License-Identifier: Apache-2.0
"""`separate_`: what it puts where, against plain least squares; what it refuses; the model stays whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.design import DepthwiseSeparableConv2d, Separable, _replace, separate_
from slimtorch.design._moments import moments_of, patches
from slimtorch.design.separate import fit
from slimtorch.measure import Latency


class Net(nn.Module):
    """Two convolutions that can be separated, two that cannot, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.one = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.body(x))
        return self.head(self.grouped(F.relu(self.one(x))).mean((2, 3)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(4, 1, 10, 10, generator=torch.Generator().manual_seed(5))


def test_replaces_what_it_can(model: Net) -> None:
    before = copy.deepcopy(model)
    body, seen = model.body, []
    model.body.register_forward_hook(lambda *_: seen.append(1))
    report = separate_(model, Separable(), X, objective=None)
    assert model.body is body  # the object stays
    assert isinstance(model.stem, DepthwiseSeparableConv2d)
    assert isinstance(model.body, DepthwiseSeparableConv2d)
    assert all(module.training for module in model.modules())
    model.eval()
    seen.clear()
    y = model(X)
    assert seen == [1]  # and so do its hooks
    twin = before.eval()
    twin.stem, twin.body = model.stem.to_dense(), model.body.to_dense()
    assert torch.allclose(y, twin(X), atol=1e-5)
    assert torch.equal(model.body.weight, twin.body.weight)  # for those who ask a layer for its dtype or device
    by_name = {layer.name: layer for layer in report.layers}
    assert [name for name, layer in by_name.items() if layer.replaced] == ["stem", "body"]
    assert by_name["one"].reason == "its kernel is 1x1"
    assert by_name["grouped"].reason == "it has groups"
    assert by_name["body"].parameters_after == 6 * 9 + 6 * 8
    assert by_name["body"].macs_after == 4 * 25 * (6 * 9 + 6 * 8)
    assert report.macs_after == slim.measure(model, X, repeats=1).macs
    assert by_name["body"].what == "depthwise + 1x1"
    assert "body" in str(report)
    # a second time there is nothing left: the parts of what was put in are not taken apart again
    again = separate_(model, Separable(), X, objective=None)
    assert {layer.name for layer in again.layers} == {"one", "grouped"}
    assert not again.replaced


def test_bare_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    dense = copy.deepcopy(layer)
    separate_(layer, Separable(9), objective=None)  # nine kernels per channel: nothing is lost
    assert isinstance(layer, DepthwiseSeparableConv2d)
    x = torch.randn(2, 4, 5, 5)
    assert torch.allclose(layer(x), dense(x), atol=1e-5)


def test_no_more_kernels_than_have_a_use() -> None:
    """Of a channel with two outputs, a third kernel would be zero, and so would its gradients be."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 2, 3)
    dense = copy.deepcopy(layer)
    separate_(layer, Separable(5), objective=None)
    assert layer.multiplier == 2
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), dense(x))
    nothing = nn.Conv2d(4, 8, 3)
    nn.init.zeros_(nothing.weight)
    separate_(nothing, Separable(energy=0.9), objective=None)
    assert nothing.multiplier == 1


def test_what_was_frozen_stays_frozen() -> None:
    layer = nn.Conv2d(4, 6, 3).requires_grad_(False)
    separate_(layer, Separable(), objective=None)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_energy_chooses_the_kernels() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    squares = torch.stack([torch.linalg.svdvals(layer.weight[:, i].detach().flatten(1)) for i in range(4)]).square()
    kept = squares.sum(0).cumsum(0) / squares.sum()
    for rank in (1, 3, 6):
        share = float(kept[rank - 1]) - 1e-6
        own = copy.deepcopy(layer)
        separate_(own, Separable(energy=share), objective=None)
        assert own.multiplier == rank  # type: ignore[union-attr]
        report = separate_(copy.deepcopy(layer), Separable(energy=share), objective="size")
        assert report.layers[0].error == pytest.approx(1 - float(kept[rank - 1]), abs=1e-6)


def test_moments_are_those_of_the_patches(model: Net) -> None:
    model.body.padding_mode = "reflect"
    (found,) = moments_of(model, [("stem", model.stem), ("body", model.body)], [(X[:3], 0), (X[3:], 1)])
    rows = F.unfold(X, 3, padding=1).transpose(1, 2).reshape(-1, 9).double()
    assert found["stem"].count == len(rows) == 400
    assert torch.allclose(found["stem"].mean, rows.mean(0))
    assert torch.allclose(found["stem"].second, rows.T @ rows / 400)
    assert torch.allclose(found["stem"].covariance, torch.cov(rows.T, correction=0))
    x = torch.randn(2, 6, 7, 5)
    y = patches(model.body, x) @ model.body.weight.flatten(1).T
    padded = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), model.body.weight, stride=2)
    assert torch.allclose(y.reshape(2, -1, 8).transpose(1, 2).reshape(padded.shape), padded, atol=1e-5)
    assert model.training  # ran in eval mode, and is as it was
    assert torch.equal(model.norm.running_mean, torch.zeros(6))  # type: ignore[arg-type]


def test_least_squares_descends_to_a_minimum() -> None:
    """The error never grows by rounds; at the end the gradient, by autograd, is zero in both factors."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 3, 2, 2, generator=generator).double()
    rows = torch.randn(200, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
    metric = rows.T @ rows / 200
    kernels, mix = slim.design.convolutions.separated(weight, 2)

    def error(k: Tensor, m: Tensor) -> Tensor:
        change = weight.flatten(1) - torch.einsum("oim,imk->oik", m, k).flatten(1)
        return (rows @ change.T).square().mean(0).sum()

    found = [float(error(kernels, mix))]
    for rounds in (1, 2, 5, 400):
        k, m, left = fit(weight, kernels, mix, metric, rounds)
        found.append(float(error(k, m)))
        assert float((rows @ left.T).square().mean(0).sum()) == pytest.approx(found[-1])
    assert all(b < a for a, b in pairwise(found))
    k, m = k.requires_grad_(), m.requires_grad_()
    slopes = torch.autograd.grad(error(k, m), (k, m))
    assert max(float(s.abs().max()) for s in slopes) < 1e-3 * found[0]
    assert torch.allclose(k.norm(dim=2), m.norm(dim=0))


@pytest.mark.parametrize("bias", [True, False])
def test_fits_real_activations(bias: bool) -> None:
    """Inputs with unequal, correlated channels: least squares beats the weight's own start, and says by how much."""
    torch.manual_seed(4)
    layer = nn.Conv2d(4, 6, 3, bias=bias)
    x = F.avg_pool2d(torch.randn(30, 4, 12, 12), 3, 1) * torch.tensor([0.2, 1, 3, 1]).view(1, 4, 1, 1) + 0.5
    y = layer(x).detach()
    errors = {}
    for name, data in (("weight", None), ("data", [x[:10], (x[10:], torch.zeros(20))])):
        own = copy.deepcopy(layer)
        report = separate_(own, Separable(), objective=None, data=data)
        errors[name] = float((own(x).detach() - y).square().sum(1).mean() / y.var((0, 2, 3), correction=0).sum())
        assert report.layers[0].error is not None
        if data is not None:
            assert report.layers[0].error == pytest.approx(errors[name], rel=1e-3)
        if bias and data is not None:  # the bias takes what the outputs lose on average
            assert torch.allclose(own(x).mean((0, 2, 3)), y.mean((0, 2, 3)), atol=1e-4)
    assert errors["data"] < 0.6 * errors["weight"]
    own = copy.deepcopy(layer)
    separate_(own, Separable(rounds=0), objective=None, data=[x])
    assert torch.equal(own.depthwise.weight, DepthwiseSeparableConv2d.from_dense(layer).depthwise.weight)  # type: ignore[union-attr]


def test_inputs_that_are_zero_keep_the_weights() -> None:
    torch.manual_seed(4)
    layer = nn.Conv2d(2, 3, 3)
    expected = DepthwiseSeparableConv2d.from_dense(layer).to_dense()
    separate_(layer, Separable(rounds=3), objective=None, data=[torch.zeros(2, 2, 5, 5)])
    assert torch.allclose(layer.to_dense().weight, expected.weight, atol=1e-5)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(("spread", "bias"), [(1e-5, True), (0.0, True), (0.0, False)])
def test_activations_that_hardly_change(spread: float, bias: bool) -> None:
    """A large mean and a small variance: the second is not lost in rounding of the first."""
    torch.manual_seed(4)
    layer = nn.Conv2d(3, 8, 3, bias=bias, dtype=torch.float64)
    dense = copy.deepcopy(layer)
    x = 1e3 + spread * torch.randn(4, 3, 6, 6, dtype=torch.float64)
    report = separate_(layer, Separable(), objective=None, data=[x])
    goal = dense(x).detach()
    off = layer(x).detach() - goal
    if spread:
        share = off.square().mean((0, 2, 3)).sum() / goal.var((0, 2, 3), correction=0).sum()
        assert report.layers[0].error == pytest.approx(float(share), rel=1e-3)
        assert float(share) < 1
    else:
        assert report.layers[0].error is None  # outputs that never change have no variance to compare with
        assert float(off.abs().max()) < 1e-5 * float(goal.abs().max())  # the ridge of the moments


@pytest.mark.parametrize("data", [None, [X.expand(-1, 3, -1, -1)]])
def test_weights_that_are_zero(data: list[Tensor] | None) -> None:
    layer = nn.Conv2d(3, 8, 3)
    nn.init.zeros_(layer.weight)
    bias = layer.bias.detach().clone()  # type: ignore[union-attr]
    separate_(layer, Separable(2), objective=None, data=data)
    assert torch.equal(layer(X.expand(-1, 3, -1, -1)), bias[:, None, None].expand(4, 8, 8, 8))


def test_moments_are_gathered_and_dropped_by_turns(model: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    together, turns = copy.deepcopy(model), copy.deepcopy(model)
    separate_(together, objective=None, data=[X])
    seen = []
    turns.stem.register_forward_pre_hook(lambda *_: seen.append(1))
    monkeypatch.setattr("slimtorch.design._moments._TOGETHER", 100)
    separate_(turns, objective=None, data=iter([X]))
    assert len(seen) == 2  # once for each of the two layers
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), turns.parameters(), strict=True))


def test_size_keeps_only_what_is_smaller() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 2))
    report = separate_(model, Separable(2), objective="size")  # 8·2·(9 + 8) = 272 of 576; 8·2·(4 + 2) = 96 of 64
    assert [layer.replaced for layer in report.layers] == [True, False]
    assert report.layers[1].reason == "not smaller"
    assert type(model[1]) is nn.Conv2d


def test_latency_keeps_only_what_is_faster(monkeypatch: pytest.MonkeyPatch, model: Net) -> None:
    """By a clock of our own: the second layer gains, the first does not."""
    real = _replace.interleave

    def times(calls: Any, **options: Any) -> dict[str, Latency]:
        found = real(calls, samples=1, min_sample_seconds=0.0)
        fast = "other" in calls and times.count > 0  # type: ignore[attr-defined]
        times.count += 1  # type: ignore[attr-defined]
        seconds = [2.0, 1.0 if fast or "other" not in calls else 2.0]
        return {name: Latency(s, s, s, 1, 1) for name, s in zip(found, seconds, strict=True)}

    times.count = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(_replace, "interleave", times)
    report = separate_(model, Separable(), X)
    assert [(layer.name, layer.replaced) for layer in report.layers if layer.what] == [("stem", False), ("body", True)]
    assert type(model.stem) is nn.Conv2d
    assert isinstance(model.body, DepthwiseSeparableConv2d)
    assert report.speedup == 2.0


def test_globs_and_filter(model: Net) -> None:
    separate_(model, {"stem": None, "*": Separable(2)}, objective=None)
    assert type(model.stem) is nn.Conv2d
    assert model.body.multiplier == 2
    fresh = Net()
    separate_(fresh, objective=None, filter_fn=lambda module, name: module.in_channels > 1)  # type: ignore[operator, arg-type, return-value]
    assert type(fresh.stem) is nn.Conv2d
    assert fresh.body.multiplier == 1


def test_the_result_trains_exports_and_packs(model: Net) -> None:
    separate_(model, Separable(), objective=None, data=[X])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.body.depthwise.weight.detach().clone()
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.body.depthwise.weight, before)
    model.eval()
    fresh = Net()
    separate_(fresh, Separable(), objective=None)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=9)},))
    assert torch.allclose(program.module()(X[:3]), model(X[:3]), atol=1e-6)
    expected = model(X)
    slim.prune_(model, {"body.pointwise": slim.prune.Magnitude(0.5)})
    expected = model(X)
    slim.pack_(model, X, formats={"body.pointwise": "codebook"}, objective="size", min_gain=1e9)
    assert torch.allclose(model(X), expected, atol=1e-5)


def test_channels_can_be_removed(model: Net) -> None:
    separate_(model, {"body": Separable()}, objective=None)
    half = slim.prune.Neurons(0.5)
    slim.prune_(model, {"stem": half, "body.depthwise": half}, example_inputs=X)  # they are tied
    assert (model.body.in_channels, model.body.out_channels) == (3, 8)
    assert model(X).shape == (4, 3)


def broken() -> Net:
    net = Net()
    with torch.no_grad():
        net.body.weight[0] = float("inf")
    return net


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Separable(0), ValueError, "multiplier: expected at least 1, got 0"),
    (lambda: Separable(1.5), TypeError, r"multiplier: expected an int, got 1\.5"),  # type: ignore[arg-type]
    (lambda: Separable(1, energy=0.5), ValueError, "energy: expected None where multiplier=1 is given"),
    (lambda: Separable(energy=1.1), ValueError, r"energy: expected a share in \(0, 1\], got 1\.1"),
    (lambda: Separable(energy="x"), TypeError, "energy: expected a number, got 'x'"),  # type: ignore[arg-type]
    (lambda: Separable(rounds=-1), ValueError, "rounds: expected at least 0, got -1"),
    (lambda: Separable(rounds=True), TypeError, "rounds: expected an int, got True"),
    (lambda: separate_(Net(), {}), ValueError, "config: expected at least one glob"),
    (lambda: separate_(Net(), 3), TypeError, "config: expected Separable or a mapping"),  # type: ignore[arg-type]
    (lambda: separate_(Net(), {"bodi": Separable()}, X), ValueError, "'bodi' matches no .*closest names: 'body'"),
    (lambda: separate_(Net()), ValueError, "example_inputs: objective='latency' needs inputs"),
    (lambda: separate_(Net(), objective="speed"), ValueError, "objective: expected 'latency', 'size' or None"),  # type: ignore[arg-type]
    (lambda: separate_(Net(), None, X[:, :, :1, 0]), ValueError, "example_inputs: "),
    (lambda: separate_(Net(), None, X, min_gain=-1), ValueError, "min_gain: expected a finite number, at least 0"),
    (lambda: separate_(broken(), objective=None), ValueError, "weight of layer 'body' holds NaN or infinity"),
    (lambda: separate_(Net(), objective=None, data=[]), ValueError, "data: expected at least one batch, got none"),
    (lambda: separate_(Net(), objective=None, data=3), TypeError, "data: expected an iterable of batches, got int"),  # type: ignore[arg-type]
    (lambda: separate_(Net(), objective=None, data=[X[:, 0]]), ValueError, "data: a batch does not fit the model"),
    (lambda: separate_(Net(), objective=None, data=[X / 0]), ValueError, "data: the inputs of layer 'stem' are not"),
    (lambda: separate_("net", objective=None), TypeError, "model: expected a torch.nn.Module"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("act", "kind", "message"), BAD)
def test_bad_input(act: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        act()


def test_the_model_is_whole_after_an_error(model: Net) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="example_inputs: "):
        separate_(model, Separable(), X[:, :, :1, 0], objective="latency")
    assert type(model.body) is nn.Conv2d
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
