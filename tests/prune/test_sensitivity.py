# SPDX-License-Identifier: Apache-2.0
"""Sensitivity per layer, and budgets shared out by it."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch import _budget, packing
from slimtorch._budget import least_loss
from slimtorch.measure import Latency
from slimtorch.prune import Magnitude, Neurons, ScanStopped, Sensitivity, allocate, sensitivity, time_layers
from slimtorch.prune.sensitivity import LatencyTable, LayerLatency

from .networks import CASES

X = torch.randn(40, 20, generator=torch.Generator().manual_seed(1))
Y = torch.arange(40) % 4
LOSS = ([(X[:25], Y[:25]), (X[25:], Y[25:])], F.cross_entropy)


def model_() -> nn.Module:
    return CASES["mlp"].model()


def mean_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float((F.cross_entropy(model(X[:25]), Y[:25]) + F.cross_entropy(model(X[25:]), Y[25:])) / 2)


def zeroed(model: nn.Module, name: str, sparsity: float) -> nn.Module:
    """A copy with the smallest weights of one layer set to zero, by sorting."""
    trial = copy.deepcopy(model)
    weight = trial.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    order = weight.detach().abs().flatten().argsort(stable=True)
    with torch.no_grad():
        weight.view(-1)[order[: round(sparsity * weight.numel())]] = 0
    return trial


# --- the scan ---


def test_each_value_is_the_loss_with_that_layer_pruned_alone() -> None:
    model = model_()
    model.fc1.train()
    state = copy.deepcopy(model.state_dict())
    scan = sensitivity(model, LOSS, levels=(0.9, 0.5))
    assert scan.levels == (0.5, 0.9)
    assert [layer.name for layer in scan.layers] == ["fc1", "fc2", "out"]
    assert scan.base == pytest.approx(mean_loss(model), rel=1e-6)
    for layer in scan.layers:
        for level in scan.levels:
            trial = zeroed(model, layer.name, level)
            assert layer.values[level] == pytest.approx(mean_loss(trial), rel=1e-6)
            assert layer.left[level] == int(torch.count_nonzero(trial.get_submodule(layer.name).weight))
        assert scan.harm(layer.name)[0.9] == pytest.approx(layer.values[0.9] - scan.base)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.fc1.training
    assert scan.weights == 20 * 32 + 32 * 16 + 16 * 4
    assert "fc2" in str(scan)
    assert json.loads(json.dumps(scan.to_dict()))["layers"][1]["left"] == list(scan.layers[1].left.values())


def test_an_accuracy_harms_downwards_and_a_measure_may_train() -> None:
    model = model_()

    def accuracy(trial: nn.Module) -> float:
        with torch.no_grad():
            for parameter in trial.parameters():
                parameter.mul_(1.5)  # whatever it does, the next measurement does not see it
        return float((trial(X).argmax(1) == Y).double().mean())

    scan = sensitivity(model, accuracy, levels=(0.8,), higher_is_better=True)
    again = sensitivity(model, accuracy, levels=(0.8,), higher_is_better=True)
    for layer, other in zip(scan.layers, again.layers, strict=True):
        assert layer.values == other.values
        assert scan.harm(layer.name)[0.8] == pytest.approx(scan.base - layer.values[0.8])


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (Magnitude(0.0, granularity="row"), 20 * 16),
        (Magnitude(0.0, granularity=(8, 4)), 20 * 16),
        (Magnitude(0.0, importance="taylor", loss_fn=F.cross_entropy), 20 * 16),
    ],
)
def test_blocks_rows_and_other_importances(config: Magnitude, left: int) -> None:
    model = model_()
    scan = sensitivity(model, LOSS, levels=(0.5,), config=config, data=[(X, Y)], filter_fn=lambda m, n: n == "fc1")
    trial = copy.deepcopy(model)
    slim.prune_(trial, {"fc1": Magnitude(**{**vars(config), "sparsity": 0.5})}, data=[(X, Y)])
    assert [layer.name for layer in scan.layers] == ["fc1"]
    assert scan.layers[0].left[0.5] == left
    assert scan.layers[0].values[0.5] == pytest.approx(mean_loss(trial), rel=1e-6)


def test_neurons_and_what_is_tied_together() -> None:
    case = CASES["residual"]
    model = case.model()
    x, y = case.inputs(), torch.tensor([1, 3])
    scan = sensitivity(
        model, ([(x, y)], F.cross_entropy), levels=(0.25, 0.5), config=Neurons(0.0), example_inputs=x
    )
    # stem and a2 are added up, and so are b2 and down: the first of each stands for both
    assert [layer.name for layer in scan.layers] == ["stem", "a1", "b1", "b2"]
    assert "'a2'" in scan.notes[0]
    assert "'out'" in scan.notes[0]
    trial = copy.deepcopy(model)
    report = slim.prune_(trial, {"stem": Neurons(0.5), "*": Neurons(0.0)}, example_inputs=x)
    assert trial.a2.weight.shape[0] == 4
    with torch.no_grad():
        loss = float(F.cross_entropy(trial.eval()(x), y))
    assert scan.layer("stem").values[0.5] == pytest.approx(loss, rel=1e-5)
    assert scan.layer("stem").left[0.5] == report.parameters_after
    with pytest.raises(TypeError, match="scan: expected one with Magnitude"):
        allocate(model, scan, parameters=100)


def test_masks_that_are_there_stay() -> None:
    model = model_()
    slim.prune_(model, {"fc1": Magnitude(0.75)})
    scan = sensitivity(model, LOSS, levels=(0.5, 0.9))
    assert scan.layer("fc1").weights == scan.layer("fc1").left[0.5] == 160
    assert scan.layer("fc1").values[0.5] == pytest.approx(scan.base)
    assert scan.layer("fc1").left[0.9] == 64


# --- resuming, and what stops a scan ---


class Counter:
    """Counts its calls; fails at one of them."""

    def __init__(self, fail_at: int = -1, error: Any = float("nan")) -> None:
        self.calls, self.fail_at, self.error = 0, fail_at, error

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        if self.calls == self.fail_at:
            if isinstance(self.error, BaseException):
                raise self.error
            return float(self.error)
        return mean_loss(model)


@pytest.mark.parametrize("error", [float("nan"), float("inf"), KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_was_measured_is_kept(tmp_path: Path, error: Any) -> None:
    path, model = tmp_path / "deep" / "scan.json", model_()
    whole = sensitivity(model, mean_loss, levels=(0.5, 0.9))
    stopped = Counter(fail_at=5, error=error)  # the unpruned model and three measurements were good
    if isinstance(error, float):
        with pytest.raises(ScanStopped, match=r"number with layer 'fc2' at 0.9.*3 of 6 measurements are kept") as e:
            sensitivity(model, stopped, levels=(0.5, 0.9), resume=path)
        assert e.value.scan.layer("fc1").values == whole.layer("fc1").values
        assert e.value.scan.layer("fc2").values == {0.5: whole.layer("fc2").values[0.5]}
        with pytest.raises(ValueError, match=r"scan: layer 'fc2' was not measured at 0\.9"):
            allocate(model, e.value.scan, parameters=1000)
    else:
        with pytest.raises(type(error)):
            sensitivity(model, stopped, levels=(0.5, 0.9), resume=path)
    rest = Counter()
    resumed = sensitivity(model, rest, levels=(0.5, 0.9), resume=path)
    assert rest.calls == 1 + 3
    assert resumed.to_dict() == whole.to_dict()
    assert [p.name for p in path.parent.iterdir()] == ["scan.json"]
    more = Counter()
    sensitivity(model, more, levels=(0.5, 0.7, 0.9), resume=path)
    assert more.calls == 1 + 3  # a level more for each layer


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path, model = tmp_path / "scan.json", model_()
    sensitivity(model, mean_loss, levels=(0.5,), resume=path)
    good = path.read_text()
    other = model_()
    with torch.no_grad():
        other.out.bias[0] += 1  # type: ignore[operator]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("another model", {"model": other}),
        ("another config", {"config": Magnitude(0.0, granularity="row")}),
        ("another config", {"config": Magnitude(0.0, norm=2)}),
        ("another higher_is_better", {"higher_is_better": True}),
        ("another measure or other data", {"measure": lambda m: mean_loss(m) + 0.1}),
    ]
    for match, change in cases:
        with pytest.raises(ValueError, match=f"resume: .*scan.json' is of {match}"):
            sensitivity(**{"model": model, "measure": mean_loss, "levels": (0.5,), "resume": path, **change})
    broken = ["", good[: len(good) // 2], "[]", "{}", good.replace('"version": 1', '"version": 2'), "\0" * 99]
    state = json.loads(good)
    state["found"]["fc1"]["0.5"] = ["low", 3]
    for text in [*broken, json.dumps(state), good.replace('"found": {', '"found": 3, "was": {')]:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"resume: .*scan.json' is damaged"):
            sensitivity(model, mean_loss, levels=(0.5,), resume=path)
        assert path.read_text() == text  # ours to refuse, not to overwrite


class Shrinking:
    """A loader that loses a batch every time it is read."""

    def __init__(self, batches: int, length: int | None = None) -> None:
        self.batches, self.length = batches, length

    def __iter__(self) -> Any:
        self.batches -= 1
        return iter([(X, Y)] * (self.batches + 1))


class Promising(Shrinking):
    def __len__(self) -> int:
        assert self.length is not None
        return self.length


def test_loaders_that_end_early() -> None:
    model = model_()
    with pytest.raises(ValueError, match="measure: expected at least one batch, got none"):
        sensitivity(model, ([], F.cross_entropy))
    with pytest.raises(ScanStopped, match=r"measure: expected 3 batches of the data, got 2; 0 of 3 measurements"):
        sensitivity(model, (Shrinking(3), F.cross_entropy), levels=(0.5,))
    with pytest.raises(ValueError, match="measure: expected 9 batches of the data, got 3"):
        sensitivity(model, (Promising(3, 9), F.cross_entropy), levels=(0.5,))
    once = iter([(X[:25], Y[:25]), (X[25:], Y[25:])])
    assert sensitivity(model, (once, F.cross_entropy), levels=(0.5,)).layers == sensitivity(
        model, LOSS, levels=(0.5,)
    ).layers


def test_bad_arguments() -> None:
    model = model_()
    with pytest.raises(ValueError, match=r"measure: expected a finite number of the model as it is, got nan"):
        sensitivity(model, lambda m: float("nan"))
    with pytest.raises(TypeError, match="measure: expected a callable"):
        sensitivity(model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config: expected Magnitude or Neurons"):
        sensitivity(model, LOSS, config=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a Linear or Conv2d layer to prune"):
        sensitivity(nn.Sequential(nn.ReLU()), LOSS)
    with pytest.raises(ValueError, match=r"levels: expected a number in \[0, 1\), got 1.0"):
        sensitivity(model, LOSS, levels=(0.5, 1.0))
    with pytest.raises(ValueError, match="levels: expected at least one"):
        sensitivity(model, LOSS, levels=())
    with pytest.raises(ValueError, match="would leave layer 'out' without weights"):
        sensitivity(model, LOSS, levels=(0.999,), config=Magnitude(0.0, allow_empty=False))
    with torch.no_grad():
        model.fc2.weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(ValueError, match="weight of layer 'fc2' holds NaN"):
        sensitivity(model, LOSS)


# --- the budget ---


def test_dynamic_programming_is_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    for trial in range(60):
        layers, options = int(generator.integers(1, 5)), int(generator.integers(1, 5))
        costs = generator.integers(1, 30, (layers, options)).astype(float) * (0.1 if trial % 2 else 1)
        losses = generator.normal(size=(layers, options)).round(trial % 3 or 8)
        budget = float(generator.uniform(0.3, 1.0) * costs.max(1).sum())
        every = list(itertools.product(range(options), repeat=layers))
        sums = [(sum(losses[i, j] for i, j in enumerate(c)), sum(costs[i, j] for i, j in enumerate(c))) for c in every]
        fitting = [loss for loss, cost in sums if cost <= budget]
        if not fitting:
            with pytest.raises(ValueError, match=f"expected at least {costs.min(1).sum():.6g}"):
                least_loss(costs.tolist(), losses.tolist(), budget)
            continue
        chosen = least_loss(costs.tolist(), losses.tolist(), budget)
        assert sum(costs[i, j] for i, j in enumerate(chosen)) <= budget * (1 + 1e-9)
        assert sum(losses[i, j] for i, j in enumerate(chosen)) == pytest.approx(min(fitting), abs=1e-9)
        # With few cells it is still within the budget, and no worse than the best for a budget a little smaller.
        monkeypatch.setattr(_budget, "CELLS", 40)
        coarse = least_loss(costs.tolist(), losses.tolist(), budget)
        monkeypatch.undo()
        assert sum(costs[i, j] for i, j in enumerate(coarse)) <= budget * (1 + 1e-9)
        smaller = [loss for loss, cost in sums if cost <= budget * (1 - layers / 40)]
        if smaller:
            assert sum(losses[i, j] for i, j in enumerate(coarse)) <= min(smaller) + 1e-9


def test_many_layers_stay_quick_and_within_the_budget() -> None:
    generator = np.random.default_rng(0)
    costs = generator.uniform(1, 2, (20, 60)).cumsum(1)[:, ::-1]
    losses = generator.uniform(0, 1, (20, 60)).cumsum(1)
    budget = 0.3 * costs[:, 0].sum()
    chosen = least_loss(costs.tolist(), losses.tolist(), budget)
    used = sum(costs[i, j] for i, j in enumerate(chosen))
    assert 0.999 * budget < used <= budget


def test_a_budget_of_parameters_is_kept_and_the_best_of_all() -> None:
    model = model_()
    scan = sensitivity(model, LOSS, levels=(0.5, 0.8, 0.95), config=Magnitude(0.0, granularity=(4, 4)))
    budget = 0.3 * scan.weights
    allocation = allocate(model, scan, parameters=budget)
    best = min(
        sum(harm for _, harm in combination)
        for combination in itertools.product(
            *([(x.weights, 0.0), *((x.left[s], scan.harm(x.name)[s]) for s in scan.levels)] for x in scan.layers)
        )
        if sum(left for left, _ in combination) <= budget
    )
    assert allocation.harm == pytest.approx(best)
    report = slim.prune_(model, allocation)
    left = sum(int(torch.count_nonzero(model.get_submodule(x.name).weight)) for x in scan.layers)  # type: ignore[arg-type]
    assert left == allocation.cost <= budget
    assert {layer.granularity for layer in report.layers} == {"4×4"}
    assert "fc1" in str(allocation)
    assert json.loads(json.dumps(allocation.to_dict()))["unit"] == "parameters"


def test_sparsities_between_those_tried() -> None:
    """One layer: a budget between two measured points is filled, at a harm between theirs."""
    layer = nn.Linear(20, 32)
    before = layer.weight.detach().clone()
    scan = sensitivity(layer, lambda m: float((m.weight - before).detach().square().sum()), levels=(0.5, 0.9))
    allocation = allocate(layer, scan, parameters=192)  # 70 %: half way
    assert allocation.sparsity("") == pytest.approx(0.7)
    assert allocation.harm == pytest.approx((scan.harm("")[0.5] + scan.harm("")[0.9]) / 2)
    slim.prune_(layer, allocation)
    assert int(torch.count_nonzero(layer.weight)) == 192


def test_a_layer_that_matters_keeps_more() -> None:
    model = model_()
    before = model.fc2.weight.detach().clone()  # type: ignore[union-attr,operator]

    def moved(trial: nn.Module) -> float:
        return float((trial.fc2.weight - before).detach().square().sum())  # type: ignore[operator]

    scan = sensitivity(model, moved, levels=(0.5, 0.9))
    allocation = allocate(model, scan, parameters=0.5 * scan.weights)
    assert allocation.sparsity("fc1") == allocation.sparsity("out") == 0.9
    assert allocation.sparsity("fc2") < 0.25
    # no need: nothing is pruned that harms, and what does not harm is given away
    free = allocate(model, scan, parameters=scan.weights)
    assert free["fc2"] is None
    slim.prune_(model, free)
    assert slim.prune.masks(model).keys() == {"fc1", "out"}


def test_a_budget_of_macs_counts_positions() -> None:
    case = CASES["conv"]
    model, x = case.model(), torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(5))

    class Net(nn.Module):  # conv2 looks at 25 positions where the linear layers look at one
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = model.conv1, model.conv2
            self.out = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))

    net = Net()
    scan = sensitivity(net, ([(x, torch.tensor([0, 1]))], F.cross_entropy), levels=(0.5, 0.9))
    dense = {"conv1": 2 * 100 * 8 * 27, "conv2": 2 * 16 * 12 * 72, "out": 2 * 60}
    allocation = allocate(net, scan, macs=0.4 * sum(dense.values()), example_inputs=x)
    assert {share.name: share.dense for share in allocation.layers} == dense
    slim.prune_(net, allocation)
    weights = {name: net.get_submodule(name).weight for name in dense}
    left = sum(dense[n] * int(torch.count_nonzero(w)) / w.numel() for n, w in weights.items())  # type: ignore[arg-type,union-attr,operator]
    assert left == pytest.approx(allocation.cost)
    assert left <= 0.4 * sum(dense.values())


def pair() -> tuple[nn.Sequential, Tensor, Sensitivity]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(16, 64)
    return model, x, sensitivity(model, ([(x, model(x).detach())], F.mse_loss), levels=(0.5, 0.99))


def test_layers_are_timed_in_the_format_that_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, scan = pair()
    clock = iter((1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0))  # two races a layer; the clock slows down in between

    def fake(calls: dict[str, Any], **_: Any) -> dict[str, Latency]:
        unit = 1e-3 * next(clock)
        times = {"dense": unit, "sparse": unit / 4}
        return {name: Latency(*[times.get(name, 2 * unit)] * 3, 1, 1) for name in calls}

    monkeypatch.setattr(packing, "interleave", fake)
    table = time_layers(model, scan, x)
    for layer in table.layers:
        assert layer.dense == pytest.approx(2e-3)  # median of 1 and 3 ms
        assert layer.formats == {0.5: "sparse", 0.99: "sparse"}
        assert layer.seconds == pytest.approx({0.5: 5e-4, 0.99: 5e-4})


def test_a_budget_of_measured_seconds() -> None:
    model, x, scan = pair()
    state = copy.deepcopy(model.state_dict())
    table = time_layers(model, scan, x, time_budget=0.4)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [layer.name for layer in table.layers] == ["0", "2"]
    for layer in table.layers:
        for level in table.levels:
            assert 0 < layer.seconds[level] <= layer.dense
            assert (layer.formats[level] == "dense") == (layer.seconds[level] == layer.dense)
    measured = allocate(model, scan, latency=1.0, example_inputs=x, time_budget=0.1)
    assert measured.latencies is not None
    assert [share.sparsity for share in measured.layers] == [0.0, 0.0]
    assert "pack_" in str(table)
    json.dumps(measured.to_dict())

    known = LatencyTable(
        [LayerLatency(n, 4e-3, {0.5: 3e-3, 0.99: 1e-3}, {0.5: "sparse", 0.99: "sparse"}) for n in ("0", "2")],
        scan.levels,
        1,
    )
    allocation = allocate(model, scan, latency=5e-3, latencies=known)
    assert sorted(share.sparsity for share in allocation.layers) == [0.0, 0.99]
    harms = [scan.harm(n)[0.99] for n in ("0", "2")]
    assert allocation.harm == pytest.approx(min(harms))
    assert allocation.cost == pytest.approx(5e-3)
    with pytest.raises(ValueError, match=r"latency: expected at least 0\.002"):
        allocate(model, scan, latency=1e-9, latencies=known)
    known.levels = (0.5,)
    with pytest.raises(ValueError, match="latencies: expected the layers and sparsities of the scan"):
        allocate(model, scan, latency=1.0, latencies=known)


def test_names_are_taken_literally() -> None:
    model = nn.Sequential()
    model.add_module("a[1]*", nn.Linear(20, 8))
    model.add_module("a1x", nn.Linear(8, 4))
    scan = sensitivity(model, LOSS, levels=(0.5,))
    allocation = allocate(model, scan, parameters=0.5 * scan.weights)
    slim.prune_(model, allocation)
    assert list(slim.prune.masks(model)) == ["a[1]*", "a1x"]
    assert slim.prune.sparsity(model) == 0.5


def test_budgets_that_cannot_be(tmp_path: Path) -> None:
    model = model_()
    scan = sensitivity(model, LOSS, levels=(0.5, 0.9))
    least = sum(layer.left[0.9] for layer in scan.layers)
    assert allocate(model, scan, parameters=least).cost == least
    with pytest.raises(ValueError, match=rf"parameters: expected at least {least}, .*got {least - 1}"):
        allocate(model, scan, parameters=least - 1)
    with pytest.raises(ValueError, match="expected exactly one of them, got 0"):
        allocate(model, scan)
    with pytest.raises(ValueError, match="expected exactly one of them, got 2"):
        allocate(model, scan, parameters=1000, macs=1000)
    with pytest.raises(ValueError, match="parameters: expected a finite number above 0, got nan"):
        allocate(model, scan, parameters=float("nan"))
    with pytest.raises(TypeError, match="macs: expected a number, got '3'"):
        allocate(model, scan, macs="3", example_inputs=X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example_inputs: expected inputs of the model with a budget of macs"):
        allocate(model, scan, macs=1000)
    with pytest.raises(ValueError, match="example_inputs: expected none with a budget of parameters"):
        allocate(model, scan, parameters=1000, example_inputs=X)
    with pytest.raises(ValueError, match="example_inputs: the model cannot run on"):
        allocate(model, scan, macs=1000, example_inputs=X[:, :3])
    with pytest.raises(TypeError, match=r"scan: expected what slim\.prune.sensitivity returns"):
        allocate(model, {}, parameters=1000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scan: layer 'fc1' has shape \(32, 20\) there, None in the model"):
        allocate(nn.Linear(20, 32), scan, parameters=1000)
    assert isinstance(scan, Sensitivity)
