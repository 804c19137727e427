# SPDX-License-Identifier: Apache-2.0
"""factorize_: ranks by energy, size and budgets, fits to data, what is kept, and the other verbs afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

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


def test_a_budget_that_cannot_be_met_leaves_the_model(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtorch.design import factorize

    def fake(calls: Any, **_: Any) -> dict[str, Latency]:  # whatever the rank, half the time is the least
        seconds = dict.fromkeys(calls, 1.0) | {"0": 2.0}
        return {name: Latency(s, s, s, 1, 1) for name, s in seconds.items()}

    monkeypatch.setattr(factorize, "interleave", fake)
    model = network()
    before = copy.deepcopy(model.state_dict())
    for low, what in (
        (LowRank(parameters=1), "weights"), (LowRank(macs=0.001), "MACs"), (LowRank(latency=0.4), "seconds"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"expected at least 0\.\d+ of the [\d.e+]+ {what} .* got"):
            slim.factorize_(model, low, x)
    slim.factorize_(copy.deepcopy(model), LowRank(latency=0.5), x)
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


@pytest.mark.parametrize("shape", [(24, 20), (20, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_get_the_principal_components_of_their_outputs(shape: tuple[int, int], bias: bool) -> None:
    """No weight of that rank does better, by the singular values of the outputs themselves; wide or not."""
    torch.manual_seed(0)
    dense = nn.Linear(*shape, bias=bias, dtype=torch.float64)
    x = torch.randn(500, shape[0], dtype=torch.float64) @ torch.randn(shape[0], shape[0], dtype=torch.float64) + 2
    goal = dense(x).detach()
    centred = goal - goal.mean(0) if bias else goal
    squares = torch.linalg.svdvals(centred).square()
    for rank in (1, 5, 12):
        layer = copy.deepcopy(dense)
        report = slim.factorize_(layer, LowRank(rank=rank), data=x.split(170), objective=None)
        assert float((layer(x) - goal).detach().square().sum()) == pytest.approx(float(squares[rank:].sum()), rel=1e-3)
        assert report.layers[0].error == pytest.approx(float(squares[rank:].sum() / squares.sum()), rel=1e-3)
        share = float(squares[:rank].sum() / squares.sum()) - 1e-4  # and energy is that of the outputs
        layer = copy.deepcopy(dense)
        slim.factorize_(layer, LowRank(energy=share), data=[x], objective=None)
        assert layer.rank == rank


def test_moments_that_do_not_fit_into_memory_at_once(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers go in turns, ranks first: the same ranks and weights, and never more moments than fit."""
    from slimtorch.design import factorize

    whole, turns = network(), network()
    config = {"0": LowRank(energy=0.8), "2": LowRank(rank=(4, 5), kind="tucker"), "*": LowRank(parameters=0.5)}
    slim.factorize_(whole, config, data=[x, x + 1], objective=None)
    sizes = []
    real = factorize.moments_of

    def watched(*args: Any) -> Any:
        for found in real(*args):
            sizes.append(sum(own.covariance.numel() for own in found.values()))
            yield found

    monkeypatch.setattr(factorize, "moments_of", watched)
    monkeypatch.setattr("slimtorch.design._moments._TOGETHER", 1200)
    report = slim.factorize_(turns, config, data=iter([x, x + 1]), objective=None)
    # for the ranks those of outputs, then again for the weights of what gets a rank; a larger one comes alone
    assert sizes == [12**2 + 32**2, 10**2, 12**2, 108**2, 32**2]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), turns.parameters(), strict=True))
    assert "fitted to the inputs of 3 layers" in str(report)


@pytest.mark.parametrize(("wide", "narrow"), [(25088, 6), (6, 25088)])
def test_nothing_is_squared_but_the_smaller_side(wide: int, narrow: int) -> None:
    """25088 features, as in VGG, or as many classes: their second moments would take five gigabytes."""
    torch.manual_seed(0)
    layer = nn.Linear(wide, narrow)
    dense = copy.deepcopy(layer)
    x = torch.randn(4, wide)
    slim.factorize_(layer, LowRank(rank=3), data=[x], objective=None)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-3, atol=1e-4)  # four centred outputs have rank three


@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker", "cp"])
def test_weights_that_are_zero(kind: Any) -> None:
    """They keep all of nothing at rank 1, under any rule, with data or without, and stay finite."""
    for config in (LowRank(energy=0.5, kind=kind), LowRank(parameters=0.5, kind=kind)):
        for data in (None, [torch.randn(2, 3, 6, 6)]):
            layer = nn.Conv2d(3, 8, 3)
            nn.init.zeros_(layer.weight)
            bias = layer.bias.detach().clone()  # type: ignore[union-attr]
            slim.factorize_(layer, config, data=data, objective=None)
            assert layer.rank == ((1, 1) if kind == "tucker" else 1)
            x = torch.randn(1, 3, 5, 5)
            torch.testing.assert_close(layer(x), bias[:, None, None].expand(1, 8, 3, 3))


@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker", "cp"])
@pytest.mark.parametrize("bias", [True, False])
def test_activations_that_do_not_change(kind: Any, bias: bool) -> None:
    """Singular moments: outputs on them are met at any rank, and weights do not grow where the data show nothing."""
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 8, 3, bias=bias)
    x = torch.full((4, 3, 6, 6), 0.1)
    layer = copy.deepcopy(dense)
    slim.factorize_(layer, LowRank(rank=(2, 3) if kind == "tucker" else 3, kind=kind), data=[x], objective=None)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-3, atol=1e-5)
    assert float(layer.weight.detach().norm()) < 2 * float(dense.weight.detach().norm())  # type: ignore[operator]


def _lost(layer: LowRankConv2d, dense: nn.Conv2d) -> float:
    with torch.no_grad():
        return float((layer.weight - dense.weight).square().sum() / dense.weight.square().sum())


def test_energy_of_tucker_is_kept_by_the_fewest_weights() -> None:
    torch.manual_seed(0)
    weight = torch.einsum("os,srhw,ir->oihw", torch.randn(12, 5), torch.randn(5, 4, 3, 3), torch.randn(10, 4))
    dense = nn.Conv2d(10, 12, 3)
    with torch.no_grad():
        dense.weight.copy_(weight + 0.3 * torch.randn(12, 10, 3, 3))

    for energy in (0.5, 0.8, 0.95, 0.99):
        layer = copy.deepcopy(dense)
        report = slim.factorize_(layer, LowRank(energy=energy, kind="tucker"), objective=None)
        assert isinstance(layer, LowRankConv2d)
        lost = _lost(layer, dense)
        assert report.layers[0].error == pytest.approx(lost, rel=1e-3)
        assert lost <= 1 - energy
        # one less on either side loses too much
        first, last = layer.rank  # type: ignore[misc]
        for pair in ((first - 1, last), (first, last - 1)):
            fewer = LowRankConv2d.from_dense(dense, pair, "tucker")
            assert _lost(fewer, dense) > 0.9 * (1 - energy)


def test_ranks_that_do_not_exist_leave_the_layer_dense() -> None:
    report = slim.factorize_(nn.Linear(3, 4), LowRank(ratio=0.5), objective=None)
    assert report.layers[0].reason == "even rank 1 has more than 0.5 of its weights"
    torch.manual_seed(0)
    report = slim.factorize_(nn.Conv2d(4, 4, 3), LowRank(energy=0.999, kind="cp"), objective=None)
    assert report.layers[0].reason == "no rank that saves weights keeps 0.999 of the sum of squares"
    assert not report.replaced


def test_layers_that_the_inputs_never_reach(x: Tensor) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    for config in (LowRank(macs=0.7), LowRank(latency=0.999)):
        report = slim.factorize_(Half(), {"unused": config}, x[0, 0, :, :6], objective=None)
        assert report.layers[0].reason == "the example inputs never reach it"
    report = slim.factorize_(Half(), LowRank(rank=2), data=[x[0, 0, :, :6]], objective=None)
    assert len(report.replaced) == 2  # by its weight alone
    assert "fitted to the inputs of 1 layers" in str(report)
    report = slim.factorize_(Half(), LowRank(rank=2), data=[x[0, 0, :0, :6]], objective=None)  # a batch of none
    assert "fitted to the inputs of 0 layers" in str(report)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(5, 6)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.a(left) + self.b(right)

    torch.manual_seed(0)
    left, right = torch.randn(9, 4), torch.randn(9, 5)
    found = []
    for inputs in ((left, right), {"left": left, "right": right}):
        model = Two()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().reshape(parameter.shape))
        slim.factorize_(model, LowRank(macs=0.9), inputs, [(inputs, torch.zeros(9))], objective=None)
        found.append(model(left, right))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype: torch.dtype, x: Tensor) -> None:
    model = network().to(dtype)
    given = x.to(dtype)
    expected = model.eval()(given)
    slim.factorize_(model, LowRank(energy=0.999), data=[given], objective=None)
    slim.separate_(nn.Sequential(model, nn.Conv2d(2, 2, 3, dtype=dtype)), objective=None)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(given).dtype == dtype
    close = 0.1 if dtype == torch.bfloat16 else 0.06
    assert float((model(given) - expected).detach().norm() / expected.detach().norm()) < close


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
    report = slim.factorize_(model, LowRank(parameters=0.5), x, objective="latency")
    assert "the budget of parameters counted on '2', which stays dense" in str(report)
    fake.calls = 0
    model = network()
    report = slim.factorize_(model, LowRank(ratio=0.5), x, objective="latency")
    assert [entry.replaced for entry in report.layers] == [False, True, True, True]
    assert "1.02x dense; 1.05x needed" in report.layers[0].reason
    assert report.speedup == pytest.approx(1.5)
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[2], LowRankConv2d)


def test_what_saves_least_goes_back_until_the_model_is_not_slower(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is faster alone; the whole is slower with more than two of them."""
    model = network()
    dense = copy.deepcopy(model).eval()
    gains = iter((4.0, 1.5, 3.0, 2.0))  # of layers 0, 2, 7 and 9

    def fake(calls: Any, **_: Any) -> dict[str, Latency]:
        if "after" in calls:
            calls["after"]()
            few = sum(isinstance(module, (LowRankConv2d, LowRankLinear)) for module in model) <= 2
            seconds = {"before": 2.0, "after": 1.0 if few else 3.0}
        else:
            seconds = {"dense": 6.0, "other": 6.0 / next(gains)}
        return {name: Latency(s, s, s, 1, 1) for name, s in seconds.items()}

    monkeypatch.setattr(replacing, "interleave", fake)
    report = slim.factorize_(model, LowRank(rank=2), x, objective="latency")
    assert [layer.name for layer in report.replaced] == ["0", "7"]
    assert "1.50x dense alone, but the whole model was slower with it" in report.layers[1].reason
    assert "as a whole the model took 1.500x the time: '9' went back to dense" in report.notes
    assert report.speedup == 2.0
    for index in (2, 9):
        assert type(model[index]) is type(dense[index])
        assert torch.equal(model[index].weight, dense[index].weight)
    assert all(module.training for module in model.modules())


def test_an_error_while_models_race_leaves_all_as_it_was(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    real = replacing.interleave

    def broken(calls: Any, **options: Any) -> Any:
        if "after" not in calls:
            return real(calls, **options)
        calls["after"]()
        raise KeyboardInterrupt

    monkeypatch.setattr(replacing, "interleave", broken)
    with pytest.raises(KeyboardInterrupt):
        slim.factorize_(model, LowRank(rank=2), x, objective=None)
    assert before == {name: (type(module), module.training) for name, module in model.named_modules()}


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


def left_alone(change: Callable[[nn.ModuleDict], None]) -> str:
    """Why layer "own" of a model stays as it is, by both verbs that could replace it."""
    reasons = set()
    for verb, config in ((slim.factorize_, LowRank(rank=1)), (slim.separate_, slim.design.Separable())):
        model = nn.ModuleDict({"own": nn.Conv2d(4, 4, 3), "other": nn.Conv2d(4, 4, 3)})
        change(model)
        x = torch.randn(2, 4, 5, 5)
        expected = model["own"](x)
        report = verb(model, {"own": config}, objective=None)  # type: ignore[operator]
        assert torch.equal(model["own"](x), expected)
        reasons.add(report.layers[0].reason)
        assert not report.replaced
    assert len(reasons) == 1
    return reasons.pop()


def test_what_hooks_need_is_not_taken_away() -> None:
    def buffer(model: nn.ModuleDict) -> None:
        model["own"].register_buffer("scale", torch.tensor(3.0))
        model["own"].register_forward_hook(lambda module, _, y: y * module.scale)

    def tied(model: nn.ModuleDict) -> None:
        model["own"].bias = model["other"].bias

    def pruned_bias(model: nn.ModuleDict) -> None:
        l1_unstructured(model["own"], "bias", 2)

    def normed(model: nn.ModuleDict) -> None:
        torch.nn.utils.parametrizations.weight_norm(model["own"])

    def other_forward(model: nn.ModuleDict) -> None:
        model["own"].forward = model["other"].forward

    assert left_alone(buffer) == "it holds scale besides weight and bias"
    assert left_alone(tied) == "its bias is shared with 'other'"
    assert left_alone(pruned_bias) == "it holds bias_mask, bias_orig besides weight and bias"
    assert "parametrization" in left_alone(normed)
    assert left_alone(other_forward) == "its forward has been replaced"


def test_globs_filter_and_what_was_frozen() -> None:
    model = network()
    model[7].weight.requires_grad_(False)
    only = {"0": None, "[27]": LowRank(rank=2), "*": LowRank(rank=1)}
    report = slim.factorize_(model, only, objective=None, filter_fn=lambda module, name: name != "9")
    assert {layer.name: layer.what for layer in report.layers} == {"2": "channel, rank 2", "7": "SVD, rank 2"}
    assert [type(model[index]) for index in (0, 9)] == [nn.Conv2d, nn.Linear]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["7.0.weight", "7.1.weight"]


def test_other_layers_are_left_alone() -> None:
    """Those of another dimension or kind, and those that already have a format."""
    model = nn.ModuleDict({
        "1d": nn.Conv1d(4, 4, 3), "3d": nn.Conv3d(4, 4, 3), "transposed": nn.ConvTranspose2d(4, 4, 3),
        "bilinear": nn.Bilinear(4, 4, 4), "packed": slim.nn.SparseLinear.from_dense(nn.Linear(4, 4)),
        "clustered": nn.Linear(8, 8),
    })  # fmt: skip
    slim.cluster_(model["clustered"], slim.quantize.KMeans(bits=1))
    types = {name: type(module) for name, module in model.items()}
    assert not slim.factorize_(model, LowRank(rank=1), objective=None).layers
    assert not slim.separate_(model, objective=None).layers
    assert types == {name: type(module) for name, module in model.items()}


def test_a_layer_used_twice_is_replaced_once(x: Tensor) -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = slim.factorize_(model, LowRank(macs=0.7), torch.randn(5, 6), objective=None)
    assert [layer.name for layer in report.layers] == ["0"]
    assert model[0] is model[2] is shared
    assert isinstance(shared, LowRankLinear)
    assert report.layers[0].macs_before == 2 * 5 * 36


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
    for build, message in (  # type: ignore[assignment]
        (lambda: LowRank(rank=1.5), "rank: expected an int or two, got 1.5"),  # type: ignore[arg-type]
        (lambda: LowRank(rank="3"), "rank: expected an int or two, got '3'"),  # type: ignore[arg-type]
        (lambda: slim.factorize_(model, LowRank(rank=2), data=3), "data: expected an iterable of batches, got int"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=message):
            build()
    assert LowRank(rank=[2, 3], kind="tucker").rank == (2, 3)  # type: ignore[arg-type]  # as JSON has it
    for odd, message in (
        (nn.Linear(4, 4, device="meta"), "the weight of layer '0' is on the meta device"),
        (nn.LazyLinear(4), "the weight of layer '0' has no shape yet; run the model once"),
    ):
        with pytest.raises(ValueError, match=message):
            slim.factorize_(nn.Sequential(odd), LowRank(rank=2), objective=None)
    with pytest.raises(ValueError, match="data: a batch does not fit the model"):
        slim.factorize_(model, LowRank(rank=2), data="text")
    with pytest.raises(TypeError, match="config: expected LowRank"):
        slim.factorize_(model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="energy: expected a number"):
        LowRank(energy="much")  # type: ignore[arg-type]
    assert type(model[0]) is nn.Conv2d
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of layer '0' holds NaN"):
        slim.factorize_(model, LowRank(rank=2))
