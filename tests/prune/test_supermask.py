# SPDX-License-Identifier: Apache-2.0
"""Supermasks: which mask computes when, gradients of scores, draws, state, and what is left after baking."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.prune import supermask
from slimtorch.prune.supermask import Bernoulli, TopK, supermask_


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(64, 20, generator=g)
    return x, x[:, :4].argmax(1)


def scores_of(model: nn.Sequential, index: int = 0) -> nn.Parameter:
    scores = model[index].parametrizations.weight[0].scores  # type: ignore[union-attr, index]
    assert isinstance(scores, nn.Parameter)
    return scores


def test_train_mode_draws_and_eval_mode_takes_the_likelier() -> None:
    model = net()
    weight = model[0].weight.detach().clone()
    supermask_(model, Bernoulli(start=1.0))
    torch.manual_seed(0)
    draws = torch.stack([model[0].weight.detach() for _ in range(400)])
    assert bool(((draws == 0) | (draws == weight)).all())
    share = (draws != 0).float().mean()
    assert abs(float(share) - 0.7311) < 0.004  # sigmoid(1)
    with torch.no_grad():
        scores_of(model)[0] = -0.1
    model.eval()
    assert torch.equal(model[0].weight[1:], weight[1:])
    assert not model[0].weight[0].any()


def test_gradients_pass_straight_through() -> None:
    layer = nn.Linear(3, 2, bias=False)
    supermask_(layer, Bernoulli(rescale=True))
    x, scores = torch.randn(7, 3), layer.parametrizations.weight[0].scores
    with torch.no_grad():
        scores.copy_(torch.randn(2, 3))
    original = layer.parametrizations.weight.original
    torch.manual_seed(1)
    mask = layer.weight.detach() != 0
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    # the same with a mask that is written as draw + p - p.detach()
    m = scores.detach().clone().requires_grad_()
    p = m.sigmoid()
    effective = original.detach() * (mask + p - p.detach()) * (6 / mask.sum())
    (x @ effective.T).square().sum().backward()
    torch.testing.assert_close(scores.grad, m.grad)
    assert original.grad is None


def test_rescaling_and_signed_constants() -> None:
    model = net()
    weight = model[0].weight.detach().clone()
    report = supermask_(model, {"0": Bernoulli(rescale=True, weights="signed_constant"), "2": None})
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.kept == 0.5
    with supermask.drawn(model, 3):
        now = model[0].weight.detach()
        ones = int((now != 0).sum())
        assert 200 < ones < 400
        alpha = float(weight.std()) * 600 / ones
        torch.testing.assert_close(now, torch.where(now != 0, weight.sign() * alpha, 0.0))
    assert "50.00%" in str(report)
    assert report.to_dict()["kept"] == 0.5


def test_everything_but_scores_is_frozen_and_training_learns() -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    supermask_(model, Bernoulli())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in trained] == [id(scores_of(model)), id(scores_of(model, 2))]
    x, y = batch()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(trained, 30.0, momentum=0.9)

    def accuracy(net: nn.Module) -> float:
        return float((net(x).argmax(1) == y).float().mean())

    first = supermask.sampled(model, accuracy, samples=5, seed=0)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    later = supermask.sampled(model, accuracy, samples=5, seed=0)
    assert sum(later) / 5 > 0.6 > 0.45 > sum(first) / 5
    for name in ("0", "2"):
        assert torch.equal(model.get_submodule(name).parametrizations.weight.original, before[f"{name}.weight"])
        assert torch.equal(model.get_submodule(name).bias, before[f"{name}.bias"])


def test_draws_depend_on_the_seed_only_and_end() -> None:
    model = net()
    supermask_(model, Bernoulli(start=0.5))
    x = batch()[0]
    seen = supermask.sampled(model, lambda net: net(x).detach(), samples=3, seed=7)
    assert not torch.equal(seen[0], seen[1])
    with supermask.drawn(model.eval(), 8):
        assert torch.equal(model(x), seen[1])
        assert torch.equal(model.train()(x), seen[1])
    torch.manual_seed(3)
    other = model(x)
    assert not torch.equal(other, seen[1])
    with supermask.expected(model):
        torch.testing.assert_close(model[0].weight, model[0].parametrizations.weight.original * 0.62245935)
    with pytest.raises(ZeroDivisionError), supermask.drawn(model, 1):
        raise ZeroDivisionError
    torch.manual_seed(3)
    assert torch.equal(model(x), other)


def test_top_k_keeps_the_largest_scores() -> None:
    model = net()
    weight = model[0].weight.detach().clone()
    supermask_(model, TopK(kept=0.3, seed=2))
    scores = scores_of(model)
    mask = torch.zeros(600, dtype=torch.bool)
    mask[scores.detach().abs().flatten().argsort(descending=True)[:180]] = True
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(model[0].weight, torch.where(mask.view(30, 20), weight, 0.0))
    x, y = batch()
    loss = nn.functional.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(loss, [scores], retain_graph=True)
    hidden = torch.relu(x @ torch.where(mask.view(30, 20), weight, 0.0).T + model[0].bias)
    dlogits = (torch.softmax(model[2](hidden), 1) - nn.functional.one_hot(y, 4)) / 64
    dweight = ((dlogits @ model[2].weight) * (hidden > 0)).T @ x
    torch.testing.assert_close(gradient, (dweight * weight * scores.sign()).detach())
    again = net(1)
    supermask_(again, TopK(kept=0.3, seed=2))
    assert torch.equal(scores_of(again), scores)


@pytest.mark.parametrize("config", [Bernoulli(rescale=True), TopK(kept=0.4, weights="signed_constant")])
def test_state_and_copies(config: Bernoulli | TopK) -> None:
    model = net()
    supermask_(model, config)
    with torch.no_grad():
        scores_of(model).normal_()
    x = batch()[0]
    model.eval()
    twin, fresh = copy.deepcopy(model), net(4)
    supermask_(fresh, config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model(x))
    expected = model(x)
    with torch.no_grad():
        scores_of(model).neg_()
    assert torch.equal(twin(x), expected)
    supermask.bake_(model)
    assert torch.equal(twin(x), expected)
    assert scores_of(twin) is not scores_of(fresh)


def test_baked_models_compute_the_same_and_pack() -> None:
    x = batch()[0]
    for seed in (None, 5):
        model = net()
        supermask_(model, Bernoulli(rescale=True))
        with torch.no_grad():
            scores_of(model).normal_()
            scores_of(model, 2).normal_()
        if seed is None:
            expected = model.eval()(x)
        else:
            with supermask.drawn(model, seed):
                expected = model(x)
        share = supermask.report(model).layers[0].likely
        assert supermask.bake_(model, seed) == ["0", "2"]
        torch.testing.assert_close(model(x), expected)
        assert set(slim.prune.masks(model)) == {"0", "2"}
        assert 0.35 < slim.prune.sparsity(model) < 0.65
        if seed is None:
            assert abs(float(slim.prune.masks(model)["0"].float().mean()) - share) < 1e-6
    slim.prune.bake_(model)
    assert model.state_dict().keys() == net().state_dict().keys()
    packed = slim.nn.SparseLinear.from_dense(model[0])
    torch.testing.assert_close(packed(x), model[0](x))


def test_by_criterion_needs_no_training() -> None:
    def train(model: nn.Module, start: int, after_step: object) -> None:
        with torch.no_grad():
            model[0].weight.add_(torch.linspace(-1, 1, 600).view(30, 20))  # type: ignore[index]

    ticket = next(slim.prune.lottery.search(net(), train, rounds=0))
    first, last = ticket.start["0.weight"], ticket.final["0.weight"]
    found = supermask.by_criterion(ticket, "large_final_same_sign", {"0": 0.2}, weights="signed_constant")
    model = net(3)
    found.apply_(model)
    kept = model[0].weight != 0
    assert int(kept.sum()) == 120
    same = torch.where(first.sign() == last.sign(), last.abs(), 0.0)
    assert same[kept].min() >= same[~kept].max()
    torch.testing.assert_close(model[0].weight[kept], first.sign()[kept] * first.std())
    assert torch.equal(model[2].weight.abs(), torch.full_like(ticket.start["2.weight"], ticket.start["2.weight"].std()))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one of initial, signed_constant"):
        Bernoulli(weights="ones")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        Bernoulli(start=float("nan"))
    with pytest.raises(ValueError, match="kept"):
        TopK(kept=0.0)
    with pytest.raises(TypeError, match="Bernoulli, TopK"):
        supermask_(net(), 0.5)  # type: ignore[arg-type]
    model = net()
    with pytest.raises(ValueError, match="would leave layer '0' without weights"):
        supermask_(model, TopK(kept=0.0005))
    assert all(p.requires_grad for p in model.parameters())
    supermask_(model, Bernoulli())
    with pytest.raises(ValueError, match="bake it first"):
        supermask_(model, Bernoulli())
    with torch.no_grad():
        scores_of(model).fill_(-5)
    with pytest.raises(ValueError, match="layer '0' keeps no weight"):
        supermask.bake_(model)
    assert scores_of(model) is not None
    with pytest.raises(ValueError, match="expected supermasks"):
        supermask.bake_(net())
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="share a weight"):
        supermask_(tied, Bernoulli())
    assert "No Linear" in str(supermask_(nn.ReLU(), Bernoulli()))
