# SPDX-License-Identifier: Apache-2.0
"""factorize_: ranks by energy, size and budgets, fits to data, what is kept, and the other verbs afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.design import LowRank, LowRankConv2d, LowRankLinear
from slimtorch.design import _replace as replacing
from slimtorch.measure import Latency, count_macs


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_energy_is_the_smallest_rank_that_keeps_it() -> None:
    model = network()
    squares = torch.linalg.svdvals(model[7].weight.detach().double()).square()
    model[7].register_forward_hook(lambda *_: None)
    layer = model[7]
    report = slim.factorize_(model, {"7": LowRank(energy=0.6)}, objective=None)
    assert model[7] is layer
    assert isinstance(layer, LowRankLinear)
    assert len(layer._forward_hooks) == 1  # hooks stay
    rank = layer.rank
    assert squares[:rank].sum() >= 0.6 * squares.sum() > squares[: rank - 1].sum()
    (entry,) = report.replaced
    assert entry.error == pytest.approx(float(squares[rank:].sum() / squares.sum()))
    assert report.parameters_after == size(model)
    assert "SVD, rank" in str(report)
    assert slim.factorize_(model, {"7*": None, "9": LowRank(rank=3)}, objective=None).replaced[0].name == "9"
    # parts of what was factorized are not factorized again
    assert [entry.name for entry in slim.factorize_(model, LowRank(rank=1, kind="channel")).layers] == ["0", "2"]


@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker", "cp"])
def test_ratio_is_the_largest_rank_that_fits(kind: Any) -> None:
    model = network()
    slim.factorize_(model, {"2": LowRank(ratio=0.5, kind=kind)})
    layer = model[2]
    assert isinstance(layer, LowRankConv2d)
    assert size(layer) <= 0.5 * 16 * 12 * 9
    rank: Any = [r + 1 for r in layer.rank] if isinstance(layer.rank, tuple) else layer.rank + 1
    bigger = LowRankConv2d(12, 16, 3, rank, kind=kind, bias=False)
    assert size(bigger) > 0.5 * 16 * 12 * 9


@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker"])
def test_budgets(kind: Any, x: Tensor) -> None:
    dense = network()
    weights = sum(m.weight.numel() for m in dense if isinstance(m, (nn.Conv2d, nn.Linear)))
    model = copy.deepcopy(dense)
    slim.factorize_(model, LowRank(parameters=0.5, kind=kind), objective=None)
    others = size(dense) - weights
    assert 0.4 * weights < size(model) - others <= 0.5 * weights
    number = copy.deepcopy(dense)
    slim.factorize_(number, LowRank(parameters=weights // 2, kind=kind), objective=None)
    assert size(number) == size(model)
    model = copy.deepcopy(dense)
    report = slim.factorize_(model, LowRank(macs=0.5, kind=kind), x, objective=None)
    before, after = count_macs(dense, x)[1], count_macs(model, x)[1]
    assert (report.macs_before, report.macs_after) == (before, after)
    assert 0.3 * before < after <= 0.5 * before


def test_a_budget_of_time_is_measured(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that are MACs, the budget is one of MACs."""
    from slimtorch.design import factorize

    def fake(calls: Any, **_: Any) -> dict[str, Latency]:
        seconds = {}
        for name, call in calls.items():
            module = call.__closure__[call.__code__.co_freevars.index("layer")].cell_contents
            shape = (6, 64) if isinstance(module, (nn.Linear, LowRankLinear)) and module.in_features == 64 else None
            shape = shape or ((6, 32) if isinstance(module, (nn.Linear, LowRankLinear)) else (6, 3, 12, 12))
            if shape[1] == 3 and module.in_channels == 12:
                shape = (6, 12, 12, 12)
            seconds[name] = float(count_macs(module, torch.zeros(shape))[1])
        return {name: Latency(s, s, s, 1, 1) for name, s in seconds.items()}

    monkeypatch.setattr(factorize, "interleave", fake)
    model, other = network(), network()
    slim.factorize_(model, LowRank(latency=0.5), x, objective=None)
    slim.factorize_(other, LowRank(macs=0.5), x, objective=None)
    assert [m.rank for m in model if hasattr(m, "rank")] == [m.rank for m in other if hasattr(m, "rank")]


def test_a_budget_that_cannot_be_met_leaves_the_model(x: Tensor) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    for low, what in ((LowRank(parameters=1), "weights"), (LowRank(macs=0.001), "MACs")):
        with pytest.raises(ValueError, match=rf"expected at least 0\.\d+ of the [\d.e+]+ {what} .* got"):
            slim.factorize_(model, low, x)
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker", "cp"])
@pytest.mark.parametrize("bias", [True, False])
def test_data_brings_the_outputs_nearer(kind: Any, bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 16, 3, padding=1, bias=bias)
    mix = torch.randn(8, 8) * torch.logspace(0, -1.5, 8)
    data = torch.einsum("nchw,dc->ndhw", torch.randn(20, 8, 7, 7), mix) + 1.0
    rank: Any = (3, 4) if kind == "tucker" else 6
    errors = []
    for given in (None, data.split(7)):
        layer = copy.deepcopy(dense)
        report = slim.factorize_(layer, LowRank(rank=rank, kind=kind), data=given, objective=None)
        assert isinstance(layer, LowRankConv2d)
        off = layer(data) - dense(data)
        errors.append(float(off.detach().square().mean()))
    assert errors[1] < 0.8 * errors[0]
    goal = dense(data).detach()
    variance = (goal - goal.mean((0, 2, 3), keepdim=True)).square().mean() if bias else goal.square().mean()
    assert report.layers[0].error == pytest.approx(errors[1] / float(variance), rel=1e-2)
    if bias:  # the mean of the outputs is met, whatever the rank
        torch.testing.assert_close(off.mean((0, 2, 3)), torch.zeros(16), atol=1e-4, rtol=0)


def test_data_of_a_linear_layer_is_met_exactly_where_it_has_the_rank() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(20, 15)
    x = torch.randn(50, 3) @ torch.randn(3, 20) + 2
    layer = copy.deepcopy(dense)
    slim.factorize_(layer, LowRank(rank=3), data=[(x, torch.zeros(50))])
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-3, atol=1e-3)
    plain = copy.deepcopy(dense)
    slim.factorize_(plain, LowRank(rank=3))
    assert float((plain(x) - dense(x)).detach().abs().max()) > 0.1


def test_kept_only_where_smaller_or_faster(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    report = slim.factorize_(model, LowRank(energy=1.0))
    assert not report.replaced
    assert {entry.reason for entry in report.layers} == {"not smaller"}
    assert type(model[0]) is nn.Conv2d

    def fake(calls: Any, **_: Any) -> dict[str, Latency]:  # whatever is proposed: 1.5x faster, 1.02x for the first
        seconds = {"dense": 3.0, "other": 2.0, "before": 3.0, "after": 2.0}
        first = fake.calls == 0
        fake.calls += 1
        return {n: Latency(*[2.94 if n == "other" and first else seconds[n]] * 3, 1, 1) for n in calls}

    fake.calls = 0
    monkeypatch.setattr(replacing, "interleave", fake)
    report = slim.factorize_(model, LowRank(ratio=0.5), x, objective="latency")
    assert [entry.replaced for entry in report.layers] == [False, True, True, True]
    assert "1.02x dense; 1.05x needed" in report.layers[0].reason
    assert report.speedup == pytest.approx(1.5)
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[2], LowRankConv2d)


def test_the_other_verbs_work_on_the_result(x: Tensor) -> None:
    model = network()
    slim.factorize_(model, {"0": LowRank(rank=4, kind="cp"), "2": LowRank(rank=(6, 8), kind="tucker"),
                            "*": LowRank(ratio=0.5)})  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = float(nn.functional.cross_entropy(model(x), torch.arange(6)).detach())
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.arange(6))
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < before
    model.eval()
    slim.prune_(model, slim.prune.Neurons(0.25), example_inputs=x)
    assert model[2].rank == (4, 6)  # type: ignore[union-attr]  # channels between are channels
    assert model[2].in_channels == 9  # type: ignore[union-attr]
    slim.prune_(model, slim.prune.Magnitude(0.8))
    expected = model(x)
    slim.pack_(model, x, formats="sparse", objective="size", time_budget=0.1)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_layers_that_are_left_alone() -> None:
    model = nn.ModuleDict({
        "groups": nn.Conv2d(4, 4, 3, groups=2), "masked": nn.Linear(6, 6),
        "tied": nn.Linear(6, 6), "same": nn.Linear(6, 6),
    })  # fmt: skip
    model["same"].weight = model["tied"].weight
    slim.prune_(model["masked"], slim.prune.Magnitude(0.5))
    report = slim.factorize_(model, LowRank(rank=1))
    reasons = {entry.name: entry.reason for entry in report.layers}
    assert reasons["groups"] == "it has groups"
    assert "mask" in reasons["masked"]
    assert "shared with 'same'" in reasons["tied"]
    assert not report.replaced
    assert "the model is as it was" in str(report)


def test_bad_input(x: Tensor) -> None:
    model = network()
    for build, message in (
        (lambda: LowRank(), "exactly one of energy, rank.*got none"),
        (lambda: LowRank(energy=0.5, rank=3), "got energy, rank"),
        (lambda: LowRank(energy=1.5), r"energy: expected a share in \(0, 1\], got 1.5"),
        (lambda: LowRank(ratio=1.0), r"ratio: expected a share in \(0, 1\), got 1.0"),
        (lambda: LowRank(rank=0), "rank: expected at least 1"),
        (lambda: LowRank(rank=3, kind="kron"), "kind: expected one of"),  # type: ignore[arg-type]
        (lambda: slim.factorize_(model, LowRank(macs=0.5)), "example_inputs: a budget of macs needs"),
        (lambda: slim.factorize_(model, LowRank(rank=2), objective="speed"), "objective: expected"),  # type: ignore[arg-type]
        (lambda: slim.factorize_(model, LowRank(rank=2), objective="latency"), "example_inputs: objective='latency'"),
        (lambda: slim.factorize_(model, {"11": LowRank(rank=2)}), "matches no"),
        (lambda: slim.factorize_(model, LowRank(rank=(2, 2))), "rank: expected one for layer '0'"),
        (lambda: slim.factorize_(model, LowRank(rank=2, kind="tucker")), "rank: expected two numbers for layer '0'"),
        (lambda: slim.factorize_(model, LowRank(rank=2), data=[]), "data: expected at least one batch"),
        (lambda: slim.factorize_(model, LowRank(rank=2), data=[x[:, :2]]), "data: a batch does not fit"),
        (lambda: slim.factorize_(model, LowRank(rank=2), data=[x * torch.inf]), "are not all finite"),
        (lambda: slim.factorize_(model, {}), "config: expected at least one glob"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(TypeError, match="config: expected LowRank"):
        slim.factorize_(model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="energy: expected a number"):
        LowRank(energy="much")  # type: ignore[arg-type]
    assert type(model[0]) is nn.Conv2d
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of layer '0' holds NaN"):
        slim.factorize_(model, LowRank(rank=2))
