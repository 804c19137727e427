# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth while training, layers dropped afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.dynamic import StochasticDepth, drop_layers_
from slimtorch.measure import count_macs, count_parameters
from slimtorch.models.resnet import _cifar


def network(depth: int = 20) -> nn.Sequential:
    torch.manual_seed(0)
    made = _cifar(depth, 5, 2, None, 4)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):  # or forgetting one would not show
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
    return made.eval()


def images(count: int = 5) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 2, 8, 8)


class Plain(nn.Module):
    """A residual block that says nothing about itself; where it is alone, nothing bends."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_probabilities_of_the_paper() -> None:
    model = StochasticDepth(slim.models.resnet110(10, 3, width=1), 0.5)
    chances = list(model.survival.values())
    assert len(chances) == 54
    assert chances[0] == pytest.approx(1 - 1 / 54 * 0.5)
    assert chances[-1] == 0.5
    assert sum(chances) == pytest.approx((3 * 54 - 1) / 4)  # section 3: "we effectively train with 40" of 54
    assert set(StochasticDepth(network(), 0.8, decay="constant").survival.values()) == {0.8}


def test_training_leaves_blocks_out() -> None:
    model = StochasticDepth(network(8), 0.4).train()
    called = dict.fromkeys(model.survival, 0)

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            called[name] += 1

        return hook

    for name in called:
        model.model.get_submodule(name).conv1.register_forward_pre_hook(count(name))  # type: ignore[union-attr,operator]
    torch.manual_seed(0)
    x = images(2)
    for _ in range(400):
        model(x)
    for name, p in {"3": 0.8, "4": 0.6, "5": 0.4}.items():
        assert called[name] / 400 == pytest.approx(p, abs=0.08)


def test_a_step_trains_the_network_without_the_missing_blocks() -> None:
    model = StochasticDepth(network(8), 0.5).train()
    x = images()
    for seed in range(6):
        torch.manual_seed(seed)
        there = (torch.rand(3) < torch.tensor([5 / 6, 4 / 6, 0.5])).tolist()
        kept = [name for name, own in zip(("3", "4", "5"), there, strict=True) if own]
        torch.manual_seed(seed)
        found = copy.deepcopy(model)(x)
        if kept:
            fewer = copy.deepcopy(model.model)
            drop_layers_(fewer, kept)
            torch.testing.assert_close(found, fewer.train()(x))


def test_evaluation_scales_each_branch() -> None:
    plain, x = network(8), images()
    model = StochasticDepth(plain, 0.4).eval()
    h = plain[2](plain[1](plain[0](x)))
    for block, p in zip(plain[3:6], (0.8, 0.6, 0.4), strict=True):
        own: Any = block
        h = torch.relu(own.shortcut(h) + p * own.bn2(own.conv2(torch.relu(own.bn1(own.conv1(h))))))
    torch.testing.assert_close(model(x), plain[6:](h))
    model.scale = False
    assert torch.equal(model(x), plain(x))


def test_a_block_that_says_nothing_about_itself() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), Plain(), nn.Sequential(Plain(), nn.Linear(4, 2)))
    x = torch.randn(6, 3)
    model = StochasticDepth(plain, 0.5, blocks=["1", "2.0"]).eval()
    h = plain[0](x)
    h = h + 0.75 * plain[1].inner(h)
    h = h + 0.5 * plain[2][0].inner(h)  # type: ignore[index]
    torch.testing.assert_close(model(x), plain[2][1](h))  # type: ignore[index]
    expected = plain[2][1](plain[0](x) + plain[1].inner(plain[0](x)))  # type: ignore[index]
    report = drop_layers_(model, ["1"])
    assert report.dropped == ("2.0",)
    torch.testing.assert_close(model(x), expected)


def test_dropping_gives_the_shorter_network() -> None:
    plain, x = network(20), images()
    shorter = _cifar(8, 5, 2, None, 4).eval()
    for to, source in {"0": "0", "1": "1", "3": "3", "4": "6", "5": "9", "8": "14"}.items():
        shorter.get_submodule(to).load_state_dict(plain.get_submodule(source).state_dict())
    report = drop_layers_(plain, 1 / 3, example_inputs=x)
    assert report.kept == ("3", "6", "9")
    torch.testing.assert_close(plain(x), shorter(x))
    assert count_parameters(plain) == count_parameters(shorter)
    assert report.macs_after == count_macs(shorter, (x[:1],))[0]
    assert report.macs_before == count_macs(network(20), (x[:1],))[0]
    assert report.macs is not None
    assert report.macs_before - report.macs_after == sum(report.macs[name] for name in report.dropped)
    assert "3 of 9 blocks kept" in str(report)
    fresh = _cifar(20, 5, 2, None, 4).eval()
    drop_layers_(fresh, report.kept)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(x), plain(x))
    torch.testing.assert_close(torch.export.export(plain, (x,)).module()(x), plain(x))


@pytest.mark.parametrize(("keep", "kept"), [(9, "345678901"), (6, "346790"), (0.5, "3579"), (2, "37"), (1, "3")])
def test_spread_evenly(keep: float, kept: str) -> None:
    names = {"0": "10", "1": "11"}
    expected = [names.get(letter, letter) for letter in kept]
    assert list(drop_layers_(network(), keep).kept) == expected


def test_of_a_stochastic_network_what_is_kept_runs_whole() -> None:
    plain, x = network(), images()
    model = StochasticDepth(copy.deepcopy(plain), 0.5).eval()
    report = drop_layers_(model, 4)
    assert tuple(model.survival) == report.kept
    drop_layers_(plain, report.kept)
    assert torch.equal(model(x), plain(x))
    torch.manual_seed(0)
    model.train()(x)  # still trains


def test_a_projection_shortcut_stays() -> None:
    torch.manual_seed(0)
    plain, x = slim.models.resnet18(5, 2, width=4).eval(), torch.randn(3, 2, 32, 32)
    before = copy.deepcopy(plain)
    assert drop_layers_(plain, ["4", "5", "7", "8", "9", "10", "11"]).dropped == ("6",)
    h = before[:6](x)
    own: Any = before[6]
    torch.testing.assert_close(plain(x), before[7:](torch.relu(own.shortcut(h))))
    assert "6.shortcut.0.weight" in plain.state_dict()
    assert "6.conv1.weight" not in plain.state_dict()


def test_search_drops_what_matters_least() -> None:
    x, labels = images(40), torch.arange(40) % 5
    plain = network(14)
    own: Any = plain
    for index in (7, 4):  # branches that add next to nothing
        nn.init.constant_(own[index].bn2.weight, 1e-4 * index)
        nn.init.zeros_(own[index].bn2.bias)
        own[index].bn2.running_mean.zero_()
    target = plain(x).detach()

    def far(model: nn.Module) -> float:
        return float((model(x) - target).detach().abs().mean())

    values = {}
    for name in ("3", "4", "5", "6", "7", "8"):
        fewer = copy.deepcopy(plain)
        drop_layers_(fewer, [other for other in ("3", "4", "5", "6", "7", "8") if other != name])
        values[name] = far(fewer)
    searched = copy.deepcopy(plain)
    with torch.no_grad():
        report = drop_layers_(searched, 3, measure=far)
    first = min(values, key=values.__getitem__)
    assert report.order[0] == (first, pytest.approx(values[first]))
    assert {report.order[0][0], report.order[1][0]} == {"4", "7"}
    assert report.order[-1][1] == pytest.approx(far(searched))
    pair = drop_layers_(copy.deepcopy(plain), 5, measure=([(x, labels)], nn.functional.cross_entropy))
    assert len(pair.order) == 1


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model, x = StochasticDepth(network(), 0.5).eval(), images()
    expected, calls = model(x), []

    def fails(_: nn.Module) -> float:
        calls.append(1)
        return float("nan") if len(calls) == 12 else float(len(calls))

    with pytest.raises(ValueError, match="measure: expected a finite number without block"):
        drop_layers_(model, 3, measure=fails)
    assert torch.equal(model(x), expected)
    assert len(model.survival) == 9


def test_statistics_are_taken_anew() -> None:
    plain, x = network(14), images(12)
    fewer = copy.deepcopy(plain)
    drop_layers_(fewer, 2)
    expected: dict[str, list[Tensor]] = {}
    for name, module in fewer.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            seen = expected[name] = []
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))  # type: ignore[misc]
    with torch.no_grad():
        fewer.train()(x[:8]), fewer(x[8:])
    report = drop_layers_(plain, 2, data=iter([x[:8], (x[8:], None)]))
    assert len(report.kept) == 2
    for name, (one, two) in expected.items():
        norm: Any = plain.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, (one.mean((0, 2, 3)) + two.mean((0, 2, 3))) / 2)
        torch.testing.assert_close(norm.running_var, (one.var((0, 2, 3)) + two.var((0, 2, 3))) / 2)
        assert norm.momentum == 0.1
        assert not norm.training
    assert slim.dynamic.renew_statistics_(plain, [x]) == len(expected)

    searched, seen_by = network(14), []

    def measure(model: nn.Module) -> float:
        seen_by.append(copy.deepcopy(model))
        return float(len(seen_by))

    drop_layers_(searched, 5, measure=measure, data=[x])
    for model in seen_by:  # each network was measured with statistics of its own
        own = copy.deepcopy(model)
        slim.dynamic.renew_statistics_(own, [x])
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())


def test_statistics_come_back_after_an_error() -> None:
    plain, x = network(), images()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with pytest.raises(ValueError, match="data: expected at least one batch, got none"):
        drop_layers_(plain, 3, data=[])
    with pytest.raises(ValueError, match="measure: expected a finite number"):
        drop_layers_(plain, 3, data=[x], measure=lambda model: float("nan"))
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    with pytest.raises(ValueError, match="data: expected at least one batch, got none"):
        slim.dynamic.renew_statistics_(plain, [])
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_packs_and_copies() -> None:
    model = StochasticDepth(network(8), 0.5).eval()
    x = images()
    slim.prune_(model, slim.prune.Magnitude(0.8))
    slim.prune.bake_(model)
    expected = model(x)
    slim.pack_(model, (x,), formats="sparse", objective="size", time_budget=0.5, min_gain=1e9)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert model(images(0)).shape == (0, 5)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (0, ValueError, "keep: expected 1 to 9 blocks, got 0"),
        (10, ValueError, "keep: expected 1 to 9 blocks, got 10"),
        (1.5, ValueError, r"keep: expected a share in \(0, 1\], got 1.5"),
        (True, TypeError, "keep: expected a number, a share or names of blocks, got True"),
        (["3", "12"], ValueError, "keep: '12' is no block; closest names: "),
    ],
)
def test_bad_keep(keep: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        drop_layers_(network(), keep)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"survival: expected a probability in \(0, 1\], got 0"):
        StochasticDepth(network(), 0)
    with pytest.raises(ValueError, match="decay: expected 'linear' or 'constant', got 'cosine'"):
        StochasticDepth(network(), decay="cosine")
    with pytest.raises(ValueError, match="blocks: StochasticDepth knows its blocks"):
        drop_layers_(StochasticDepth(network()), 3, blocks="3")
    with pytest.raises(ValueError, match="measure: expected None where keep names the blocks"):
        drop_layers_(network(), ["3"], measure=lambda model: 0.0)
    with pytest.raises(TypeError, match=r"model: expected an nn.Sequential, got LeNet300"):
        drop_layers_(slim.models.LeNet300(), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"blocks: '0' \(Conv2d\) turns"):
        drop_layers_(network(), 1, blocks=["0", "1"], example_inputs=images())
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"blocks: '0' \(Conv2d\) turns"):
        StochasticDepth(network(), 1.0, blocks="0").train()(images())


def test_names_to_keep_may_be_globs() -> None:
    plain = network(20)
    assert drop_layers_(plain, ["[34]", "1?"]).kept == ("3", "4", "10", "11")
    for keep, error, message in [
        ("99*", ValueError, r"keep: '99\*' is no block; closest names: "),
        ([], ValueError, r"keep: expected at least one block, got \[\]"),
        ([3], TypeError, "keep: expected names of blocks, got 3"),
    ]:
        with pytest.raises(error, match=message):
            drop_layers_(network(20), keep)  # type: ignore[arg-type]


def test_evaluation_is_the_mean_of_training() -> None:
    """Where nothing bends: each branch times its probability is what drawing gives on average (equation 5)."""
    torch.manual_seed(0)
    model = StochasticDepth(nn.Sequential(Plain(), Plain()), 0.4, blocks="*").double()
    x = torch.randn(3, 4, dtype=torch.float64)
    chances = list(model.survival.values())
    assert chances == pytest.approx([0.7, 0.4])
    own: Any = model.model
    mean = torch.zeros_like(x)
    for first in (True, False):
        for second in (True, False):
            p = (chances[0] if first else 1 - chances[0]) * (chances[1] if second else 1 - chances[1])
            h = own[0](x) if first else x
            mean += p * (own[1](h) if second else h)
    torch.testing.assert_close(model.eval()(x), mean)
