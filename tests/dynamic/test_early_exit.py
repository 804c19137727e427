# SPDX-License-Identifier: Apache-2.0
"""EarlyExit: who leaves, that nothing depends on the batch, thresholds, deadlines, an ordinary module."""

from __future__ import annotations

import collections
import copy
import math
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.distill import self_distillation_loss
from slimtorch.dynamic import Criterion, EarlyExit, Entropy, Learned, MaxProbability, Patience, exit_loss
from slimtorch.measure import count_macs


def build(criterion: Criterion | None = None, **options: Any) -> EarlyExit:
    """Three exits over random layers; large weights, so that some samples are sure."""
    torch.manual_seed(3)
    backbone = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 4, 3), relu=nn.ReLU(), pool=nn.MaxPool2d(2), conv2=nn.Conv2d(4, 8, 3), relu2=nn.ReLU(),
            flat=nn.Flatten(), last=nn.Linear(32, 5),
        )
    )  # fmt: skip
    heads = {point: nn.Sequential(nn.Flatten(), nn.Linear(size, 5)) for point, size in (("relu2", 32), ("pool", 64))}
    model = EarlyExit(backbone, heads, criterion or Entropy(0.9), **options)
    with torch.no_grad():
        for head in model.heads:
            head[1].weight.mul_(8)  # type: ignore[index,operator,union-attr]
    return model.eval()


X = torch.randn(40, 1, 10, 10, generator=torch.Generator().manual_seed(5))


def plain(model: EarlyExit, x: Tensor, rule: Any) -> tuple[Tensor, list[int], list[Tensor]]:
    """Sample by sample, all exits computed: rule(exit, probabilities so far) says whether it leaves."""
    rows, exits = [], []
    for sample in x:
        probabilities = []
        for number, logits in enumerate(model.all_exits(sample[None])):
            probabilities.append(logits[0].double().softmax(0))
            if number == len(model.heads) or rule(number, probabilities):
                rows.append(logits[0])
                exits.append(number)
                break
    return torch.stack(rows), exits, model.all_exits(x)


def agreeing(probabilities: list[Tensor], patience: int) -> bool:
    answers = [int(p.argmax()) for p in probabilities]
    return len(answers) > patience and len(set(answers[-patience - 1 :])) == 1


RULES = {
    "entropy": (Entropy(0.9), lambda k, p: float(-(p[-1] * p[-1].log()).sum()) < 0.9),
    "entropies": (Entropy([0.2, 1.0]), lambda k, p: float(-(p[-1] * p[-1].log()).sum()) < (0.2, 1.0)[k]),
    "probability": (MaxProbability(0.6), lambda k, p: float(p[-1].max()) > 0.6),
    "patience": (Patience(1), lambda k, p: agreeing(p, 1)),
}


@pytest.mark.parametrize("name", RULES)
def test_leaves_where_the_definition_says(name: str) -> None:
    criterion, rule = RULES[name]
    model = build(copy.deepcopy(criterion))
    with torch.no_grad():
        expected, exits, _ = plain(model, X, rule)
        run = model.run(X)
        assert run.exits.tolist() == exits
        assert len(set(exits)) >= 2
        torch.testing.assert_close(run.logits, expected)
        torch.testing.assert_close(model(X), expected)
        for one, row in zip(X, expected, strict=True):  # the plain-number path of a batch of one
            torch.testing.assert_close(model(one[None])[0], row)


def test_the_batch_shrinks() -> None:
    model = build()
    seen: list[int] = []
    model.stages[1].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model.stages[2].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    exits = model.run(X).exits.tolist()
    counted = seen[:2] if seen[0] > 1 else seen[-2:]  # costs are counted with one sample, before
    assert counted == [sum(e >= 1 for e in exits), sum(e >= 2 for e in exits)]
    macs = model.run(X).macs
    steps = [count_macs(segment, state)[1] for segment, state in zip(model.segments(), states(model), strict=True)]
    assert macs.tolist() == [sum(steps[: e + 1]) for e in exits]
    assert steps[0] == 4 * 9 * 64 + 64 * 5


def states(model: EarlyExit) -> list[Tensor]:
    found = [X[:1]]
    for stage in list(model.stages)[:-1]:
        found.append(stage(found[-1]))
    return found


class Drift(nn.Module):
    """Rounding made visible: logits depend on the number of rows in the sixth digit."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.same.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(x) * torch.tensor([1.0, 0.0]) * (1 + 2e-6 * len(x))


def drifting(margin: float | None, criterion: Criterion) -> EarlyExit:
    return EarlyExit([("a", nn.Identity()), ("b", Drift())], {"a": Drift()}, criterion, margin=margin).eval()


def test_no_answer_depends_on_the_batch() -> None:
    x = torch.zeros(32, 2)
    x[:, 0] = torch.linspace(-3, 3, 32)
    odds = float(x[20, 0]) * (1 + 2e-6 * 8)  # between what a batch of 1 and one of 32 give
    criterion = MaxProbability(1 / (1 + math.exp(-odds)))
    trusting = drifting(0.0, copy.deepcopy(criterion))
    assert int(trusting.run(x).exits[20]) == 0
    assert int(trusting.run(x[20:21]).exits[0]) == 1  # the flip is real
    for margin in (None, math.inf):
        model = drifting(margin, copy.deepcopy(criterion))
        whole = model.run(x)
        single = [model.run(row[None]) for row in x]
        assert whole.exits.tolist() == [int(run.exits) for run in single]
        assert whole.logits.argmax(1).tolist() == [int(run.logits.argmax()) for run in single]
        if margin is None:
            assert whole.alone == 2  # and its mirror image, as sure of the other class
            assert whole.exits[20] == 1
            lone = trusting.run(x[20:21]).macs
            assert whole.macs[20] == lone + trusting.run(x[31:]).macs  # the first exit twice, the second once
        else:
            assert torch.equal(whole.logits, torch.cat([run.logits for run in single]))
            assert whole.alone == 0  # nobody twice
        for size in (2, 5, 31):
            parts = [model.run(part) for part in x.split(size)]
            assert torch.cat([part.exits for part in parts]).tolist() == whole.exits.tolist()


def test_answers_of_equal_logits_do_not_depend_on_the_batch() -> None:
    """A tie at the end: which of two classes is larger is up to rounding, unless the sample is run alone."""

    class Tie(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack((x[:, 0], x[:, 0] + 1e-6 * (len(x) - 1.5)), 1)

    model = EarlyExit([("a", nn.Identity()), ("b", Tie())], {"a": Tie()}, Entropy(0.0)).eval()
    x = torch.ones(6, 1)
    assert model(x).argmax(1).tolist() == [0] * 6 == [int(model(row[None]).argmax()) for row in x]
    assert model.run(x).alone == 6
    assert Tie()(x).argmax(1).tolist() == [1] * 6


def test_real_kernels_and_every_batch_size() -> None:
    model = build()
    with torch.no_grad():
        first = model.all_exits(X)[0].double().softmax(1)
    entropies = -(first * first.log()).sum(1)
    for index in (0, 7, 21):
        model.criterion = Entropy(float(entropies[index]))  # exactly on a sample
        model.criterion.bind(2)
        alone = [int(model.run(row[None]).exits) for row in X]
        assert model.run(X).alone >= 1
        for size in (2, 3, 8, 17, 40):
            assert torch.cat([model.run(part).exits for part in X.split(size)]).tolist() == alone


def test_both_paths_score_alike() -> None:
    generator = np.random.default_rng(0)
    for scale in (0.1, 1, 10, 60):
        rows = generator.normal(size=(50, 7)) * scale
        for criterion in (Entropy(), MaxProbability(), Learned()):
            criterion.bind(1)
            one = [criterion.score_one(0, row.tolist()) for row in rows]
            np.testing.assert_allclose(one, criterion.score(0, rows), rtol=1e-10, atol=1e-10)
            assert np.isfinite(one).all()
    p = torch.from_numpy(rows[:5] / 30).softmax(1)
    np.testing.assert_allclose(np.exp(-Entropy().score(0, rows[:5] / 30)), -(p * p.log()).sum(1))
    odds = MaxProbability().score(0, rows[:5] / 30)
    np.testing.assert_allclose(1 / (1 + np.exp(-odds)), p.max(1).values)


def test_not_a_number_goes_on_to_the_end() -> None:
    x = X.clone()
    x[3] = math.nan
    for criterion in (Entropy(2.0), MaxProbability(0.0)):
        model = build(criterion)
        with torch.no_grad():
            assert bool(model(x)[3].isnan().all())
            assert bool(model(x[3:4]).isnan().all())
            assert int((model.run(x).exits == 0).sum()) == 39
            assert model.run(x[3:4]).exits.tolist() == [2] == model.run(x).exits[3:4].tolist()


# --- ordinary module --------------------------------------------------------------------------------------------------


def test_train_mode_gives_all_exits() -> None:
    model = build().train()
    outputs = model(X)
    assert [output.shape for output in outputs] == [(40, 5)] * 3
    loss = exit_loss(outputs, torch.zeros(40, dtype=torch.long))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    before = model(X)[0]
    torch.testing.assert_close(before, model.eval().all_exits(X)[0])


def test_gradients_in_eval_mode() -> None:
    model = build()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    expected = X.clone().requires_grad_()
    exits = model.run(X).exits
    torch.stack(model.all_exits(expected), 1)[torch.arange(40), exits].sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("margin", [None, 0.0, math.inf])
def test_small_batches(count: int, margin: float | None) -> None:
    model = build(margin=margin)
    x = X[:count]
    assert model(x).shape == (count, 5)
    run = model.run(x)
    assert run.exits.shape == run.macs.shape == (count,)
    strided = X[: 2 * count : 2].expand(count, 1, 10, 10).permute(0, 1, 3, 2)
    torch.testing.assert_close(model(strided), model(strided.contiguous()))


def test_copies_states_and_casts() -> None:
    model = build(Entropy([0.25, 0.75]))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    fresh = build(Entropy(0.1))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(model.state_dict())
    assert fresh.criterion.thresholds == pytest.approx([0.25, 0.75])
    assert torch.equal(fresh(X), model(X))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.criterion.cuts.dtype == torch.float64
    assert half(X.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key|Unexpected key"):
        build(Learned()).load_state_dict(model.state_dict())


def test_exported_segments() -> None:
    model = build()
    rows = torch.export.Dim("rows", min=1, max=64)
    programs = []
    state: Any = X[:8]
    for segment in model.segments():
        program = torch.export.export(segment, (state,), dynamic_shapes=({0: rows},))
        programs.append(program.module())
        result = segment(state)
        state = result[0] if isinstance(result, tuple) else result
    run = model.with_segments(programs)
    with torch.no_grad():
        torch.testing.assert_close(run(X), model(X))
    with pytest.raises(ValueError, match="segments: expected 3, got 2"):
        model.with_segments(programs[:2])


def test_packed_layers_inside() -> None:
    model = build()
    slim.prune_(model, slim.prune.Magnitude(sparsity=0.8))
    slim.prune.bake_(model)
    first = model.all_exits(X)[0].detach().double().softmax(1)
    entropies = -(first * first.log()).sum(1)
    model.criterion = Entropy(float(entropies.sort().values[19:21].mean()))
    model.criterion.bind(2)
    pruned = model.run(X)
    assert 15 < int((pruned.exits == 0).sum()) < 25
    kinds = {nn.Linear: slim.nn.SparseLinear, nn.Conv2d: slim.nn.SparseConv2d}
    for stage in [*model.stages, *model.heads]:
        for name, module in list(stage.named_children()):
            if type(module) in kinds:
                setattr(stage, name, kinds[type(module)].from_dense(module))
    assert not any(type(module) in kinds for module in model.modules())
    packed = model.run(X)
    torch.testing.assert_close(packed.logits, pruned.logits)
    assert packed.exits.tolist() == pruned.exits.tolist()
    assert int(packed.macs.max()) < int(pruned.macs.max()) / 3
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model.segments()[0], (X[:8],), dynamic_shapes=({0: rows},)).module()
    torch.testing.assert_close(program(X)[1], model.all_exits(X)[0])


def test_pack_sees_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    exits = model.run(X).exits
    seen: list[int] = []

    def record(segment: nn.Module, example_inputs: Any, **options: Any) -> str:
        assert options == {"objective": "size"}
        seen.append(len(example_inputs[0]))
        return "report"

    monkeypatch.setattr("slimtorch.dynamic.early_exit.pack_", record)
    assert model.pack_(X, objective="size") == ["report"] * 3
    assert seen == [40, int((exits >= 1).sum()), int((exits >= 2).sum())]
    seen.clear()
    model.criterion.cuts.fill_(-math.inf)
    model.pack_(X, objective="size")
    assert seen == [40, 1, 1]  # somebody has to
    with pytest.raises(ValueError, match="example_inputs: expected at least one sample, got none"):
        model.pack_(X[:0], objective="size")


def test_packing_as_a_whole() -> None:
    model = build()
    reports = model.pack_(X, time_budget=0.2)
    assert [len(report.layers) for report in reports] == [2, 2, 1]  # each segment's layers, its head's too
    torch.testing.assert_close(model(X), build()(X))


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = build(MaxProbability([0.7, 0.8]))
    slim.save(model, tmp_path / "model.slim")
    loaded = slim.load(tmp_path / "model.slim", build(MaxProbability(0.1)).train()).eval()
    assert loaded.criterion.thresholds == pytest.approx([0.7, 0.8])
    assert torch.equal(loaded(X), model(X))


def test_states_of_several_tensors() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return x[:, :2], [x[:, 2:], x * 2]

    class Join(nn.Module):
        def forward(self, x: tuple[Tensor, list[Tensor]]) -> Tensor:
            return torch.cat((x[0], x[1][0] + x[1][1][:, :2]), 1)

    class Head(nn.Module):
        def forward(self, x: tuple[Tensor, list[Tensor]]) -> Tensor:
            return x[0]

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2]

    model = EarlyExit([("a", Split()), ("b", Join()), ("c", First())], {"a": Head()}, MaxProbability(0.9)).eval()
    x = torch.randn(30, 4) * 3
    run = model.run(x)
    assert 0 < int((run.exits == 0).sum()) < 30
    assert torch.equal(run.logits, x[:, :2])


def test_nested_sequential_points() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model = EarlyExit(nn.Sequential(inner, nn.Linear(4, 3)), {"0.1": nn.Linear(4, 3)}).eval()
    x = torch.randn(5, 4)
    first, last = model.all_exits(x)
    torch.testing.assert_close(last, model.stages[1][2 - 1](inner(x)))  # type: ignore[index]
    torch.testing.assert_close(first, model.heads[0](inner[1](inner[0](x))))


# --- loss -------------------------------------------------------------------------------------------------------------


def test_exit_loss() -> None:
    outputs = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    parts = [float(F.cross_entropy(output, labels)) for output in outputs]
    assert float(exit_loss(outputs, labels)) == pytest.approx(sum(parts))
    assert float(exit_loss(outputs, labels, weights=(0.5, 0, 2))) == pytest.approx(0.5 * parts[0] + 2 * parts[2])
    distilled = float(exit_loss(outputs, labels, distill_temperature=3.0, distill_weight=0.25))
    assert distilled == pytest.approx(sum(parts) + 0.25 * float(self_distillation_loss(outputs, 3.0)))


def test_exit_loss_refuses() -> None:
    labels = torch.zeros(3, dtype=torch.long)
    good = torch.zeros(3, 2)
    for outputs, options, message in [
        (good, {}, r"outputs: expected logits of two exits or more, got one tensor \(is the model in train mode"),
        ([good], {}, "outputs: expected logits of two exits or more, got 1"),
        ([good, good], {"weights": (1,)}, "weights: expected one for each of 2 exits, got 1"),
        ([good, good], {"weights": (1, -1)}, "weights, distill_weight: expected numbers of 0 or more"),
        ([good, torch.zeros(3, 4)], {}, "outputs, labels: expected as many rows and classes in all"),
        ([good, good], {"distill_temperature": 0.0}, "temperature"),
    ]:
        with pytest.raises(ValueError, match=message):
            exit_loss(outputs, labels, **options)


# --- thresholds -------------------------------------------------------------------------------------------------------


def staged(criterion: Criterion) -> tuple[EarlyExit, Tensor, Tensor]:
    """Exits that know more and more: 2 classes, the first sees a noisy copy, the last the truth."""

    class Column(nn.Module):
        def __init__(self, column: int) -> None:
            super().__init__()
            self.weight = nn.Linear(1, 1, bias=False)  # something that costs
            nn.init.ones_(self.weight.weight)
            self.column = column

        def forward(self, x: Tensor) -> Tensor:
            value = self.weight(x[:, self.column : self.column + 1])
            return torch.cat((value, -value), 1)

    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (400,), generator=generator)
    truth = (1 - 2 * labels).float()[:, None]
    noise = torch.randn(400, 3, generator=generator) * torch.tensor([1.2, 0.6, 0.0])
    backbone = [("a", nn.Identity()), ("b", nn.Identity()), ("c", Column(2))]
    return EarlyExit(backbone, {"a": Column(0), "b": Column(1)}, criterion, margin=0.0).eval(), truth + noise, labels


@pytest.mark.parametrize("kind", [Entropy, MaxProbability, Learned, Patience])
def test_calibration(kind: type[Criterion]) -> None:
    criterion = kind()  # type: ignore[call-arg]
    model, x, labels = staged(criterion)
    data = list(zip(x.split(150), labels.split(150), strict=True))
    for goal in (0.93, 0.97):
        if isinstance(criterion, Patience) and goal > 0.95:
            continue
        found = model.calibrate_(data, accuracy=goal)
        run = model.run(x)
        accuracy = float((run.logits.argmax(1) == labels).float().mean())
        assert accuracy >= goal
        assert accuracy == pytest.approx(found.chosen.accuracy)
        assert float(run.macs.double().mean()) == pytest.approx(found.chosen.macs)
        assert found.chosen.macs < 3
        share = np.bincount(run.exits.numpy(), minlength=3) / 400
        assert share.tolist() == pytest.approx(list(found.chosen.leaving))
        assert all(option.accuracy < goal for option in found.options if option.macs < found.chosen.macs)
    found = model.calibrate_(iter(data), macs=2.3)
    assert found.chosen.macs <= 2.3
    assert all(option.accuracy <= found.chosen.accuracy for option in found.options if option.macs <= 2.3)
    assert "leaving" in str(found)


def test_geometric_shares() -> None:
    """Exit k gets a share proportional to q^k, whatever the exits' scores."""
    model, x, labels = staged(MaxProbability())
    found = model.calibrate_([(x, labels)], macs=1.9)
    seen = 0
    for option in found.options:
        first, second, third = option.leaving
        if min(option.leaving) > 0.05:
            assert second / first == pytest.approx(third / second, rel=0.1)
            seen += 1
    assert seen > 10


def test_learned_knows_more_than_one_number() -> None:
    """An exit whose sureness is upside down: the regression finds out, a threshold on the probability cannot."""
    generator = np.random.default_rng(2)
    logits = generator.normal(size=(600, 3)) * 3
    labels = logits.argmax(1)
    odds = MaxProbability().score(0, logits)
    labels[odds > np.median(odds)] += 1  # wrong where sure
    criterion = Learned()
    criterion.bind(1)
    criterion.fit_(0, logits, labels % 3)
    score = criterion.score(0, logits)
    assert score[odds < np.median(odds)].mean() > score[odds > np.median(odds)].mean() + 1


def test_goals_that_cannot_be_met() -> None:
    model, x, labels = staged(Entropy(0.4))
    with pytest.raises(ValueError, match=r"accuracy: expected a share in \[0, 1\], got 1.01"):
        model.calibrate_([(x, labels)], accuracy=1.01)
    with pytest.raises(ValueError, match=r"accuracy: expected at most 0\.9\d+, the best of these exits"):
        model.calibrate_([(x, 1 - labels), (x, labels), *[(x, labels)] * 30], accuracy=0.999)
    with pytest.raises(ValueError, match=r"macs: expected at least 1 per sample, the least of these exits, got 0.5"):
        model.calibrate_([(x, labels)], macs=0.5)
    assert model.criterion.thresholds == pytest.approx([0.4, 0.4])
    for options in ({}, {"accuracy": 0.9, "macs": 2}):
        with pytest.raises(ValueError, match="accuracy, macs: expected exactly one of them"):
            model.calibrate_([(x, labels)], **options)
    with pytest.raises(ValueError, match="data: expected at least one sample, got none"):
        model.calibrate_([], accuracy=0.9)
    with pytest.raises(ValueError, match=r"data: expected integer labels \[400\], got torch.int64 \[399\]"):
        model.calibrate_([(x, labels[1:])], accuracy=0.9)


# --- deadlines --------------------------------------------------------------------------------------------------------


class Clock:
    """Time that only passes where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now * 1e-9)
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Slow(nn.Module):
    """Takes a second, and a tenth for each sample; counts its calls."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.seen = clock, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += 1_000_000_000 + 100_000_000 * len(x)
        self.seen.append(len(x))
        return x


def slow(clock: Clock, criterion: Criterion, **options: Any) -> EarlyExit:
    backbone = [("a", Slow(clock)), ("b", Slow(clock)), ("c", Slow(clock))]
    return EarlyExit(backbone, {"a": nn.Identity(), "b": nn.Identity()}, criterion, **options).eval()


@pytest.mark.parametrize("margin", [None, 0.0, math.inf])
def test_deadline(clock: Clock, margin: float | None) -> None:
    """A segment takes 1.4 seconds for four samples, 1.1 for one."""
    model = slow(clock, Entropy(0.0), margin=margin)
    x = torch.randn(4, 3)
    for deadline, exit in ((1e-6, 0), (1.3, 0), (1.5, 1), (2.9, 2), (1e9, 2), (math.inf, 2)):
        run = model.predict(x, deadline)  # nobody knows how long: begun while time is left
        assert run.exits.tolist() == [exit] * 4, deadline
        assert run.seconds == pytest.approx(1.4 * (exit + 1))
        assert run.macs.tolist() == [0] * 4
        assert torch.equal(run.logits, x)
        assert run.alone == 0
    assert model.predict(x[:0], 1.0).logits.shape == (0, 3)
    assert model.measure_(x, samples=3) == pytest.approx([1.4] * 3)  # from now on none begins that would be late
    for deadline, exit in ((1e-6, 0), (2.7, 0), (2.9, 1), (4.1, 1), (4.3, 2), (1e9, 2)):
        run = model.predict(x, deadline)
        assert run.exits.tolist() == [exit] * 4, deadline
        assert run.seconds <= max(1.4, deadline)
    for deadline, exit in ((2.1, 0), (2.3, 1), (3.2, 1), (3.4, 2)):
        assert model.predict(x[:1], deadline).exits.tolist() == [exit], deadline
    for deadline, exit in ((3.5, 0), (3.7, 1)):  # 1.8 for eight samples, more than were measured
        assert model.predict(x.repeat(2, 1), deadline).exits.tolist() == [exit] * 8, deadline
    for deadline in (0, -1.0, math.nan, "1", True, None):
        with pytest.raises((TypeError, ValueError), match="deadline: expected seconds"):
            model.predict(x, deadline)  # type: ignore[arg-type]


def test_a_measurement_with_one_sample(clock: Clock) -> None:
    """No more is known then than what one takes: as much for each."""
    model = slow(clock, Entropy(0.0))
    x = torch.randn(3, 3)
    assert model.measure_(x[:1], samples=2) == pytest.approx([1.1] * 3)
    for deadline, exit in ((4.5, 0), (4.7, 1)):  # 1.3 spent, 3.3 expected
        assert model.predict(x, deadline).exits.tolist() == [exit] * 3, deadline
    with pytest.raises(ValueError, match="x: expected at least one sample, got none"):
        model.measure_(x[:0])


def test_only_who_stays_needs_time(clock: Clock) -> None:
    """Three samples leave at the first exit; there is time for the fourth, as there would not be for all."""
    model = slow(clock, MaxProbability(0.9))
    x = torch.tensor([[9.0, 0.0], [0.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    model.measure_(x, samples=1)
    stage: Any = model.stages[1]
    stage.b.seen.clear()
    assert model.predict(x, 1.4 + 1.15).exits.tolist() == [0, 1, 0, 0]
    assert stage.b.seen[0] == 1  # what counts multiplications comes after
    assert model.predict(x, 1.4 + 1.05).exits.tolist() == [0] * 4
    assert model.predict(x[:1], 1e-6).exits.tolist() == [0]


def test_sure_samples_leave_before_the_deadline() -> None:
    model = build()
    assert model.predict(X, 1e9).exits.tolist() == model.run(X).exits.tolist()
    with torch.no_grad():
        torch.testing.assert_close(model.predict(X, 1e9).logits, model(X))


def test_latency_of_each_sample(clock: Clock) -> None:
    x = torch.tensor([[5.0, 0.0], [0.1, 0.0], [0.0, 6.0]])
    model = slow(clock, MaxProbability(0.9))
    assert model.latencies(x, samples=2).tolist() == pytest.approx([1.1, 3.3, 1.1])
    assert model.run(x).seconds == pytest.approx(1.3 + 2 * 1.1)
    assert model.latencies(x[:0]).shape == (0,)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    linear = nn.Linear(2, 2)
    parts = [("first", linear), ("second", nn.ReLU()), ("third", nn.Linear(2, 2))]
    block = nn.ModuleDict({"inner": nn.Linear(2, 2)})
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (linear, {"a": linear}, {}, TypeError, "backbone: expected an nn.Sequential or a sequence"),
        ([linear], {"a": linear}, {}, TypeError, r"backbone: expected pairs \(name, module\)"),
        ([parts[0], parts[0]], {"first": linear}, {}, ValueError, "names of their own, got 'first' twice"),
        (parts, {}, {}, ValueError, "exits: expected one or more, got none"),
        (parts, {"first": 3}, {}, TypeError, "exits: expected a mapping"),
        (parts, {"secnd": linear}, {}, ValueError, "exits: the backbone has no point 'secnd'; closest names: 'second'"),
        ([("b", block), *parts], {"b.inner": linear}, {}, ValueError, "'b.inner' lies inside 'b', a ModuleDict"),
        (parts, {"third": linear}, {}, ValueError, "exits: 'third' is the end of the backbone"),
        (parts, {"first": linear}, {"criterion": 0.5}, TypeError, "criterion: expected one of slimtorch.dynamic's"),
        (parts, {"first": linear}, {"criterion": Entropy([1, 2])}, ValueError, "one for each of 1 exits, got 2"),
        (parts, {"first": linear}, {"margin": -1}, ValueError, "margin: expected 0 or more"),
        (parts, {"first": linear}, {"margin": math.nan}, ValueError, "margin: expected 0 or more"),
        (parts, {"first": linear}, {"margin": "1"}, TypeError, "margin: expected a number, got '1'"),
    ]  # fmt: skip
    for backbone, exits, options, error, message in cases:
        with pytest.raises(error, match=message):
            EarlyExit(backbone, exits, **options)
    for make, error, message in [
        (lambda: Entropy(-1), ValueError, "threshold: expected an entropy"),
        (lambda: MaxProbability(1.5), ValueError, "threshold: expected a probability"),
        (lambda: Learned([0.5, -0.1]), ValueError, "threshold: expected a probability"),
        (lambda: Entropy("0.3"), TypeError, r"threshold: expected a number, got '0\.3'"),  # type: ignore[arg-type]
        (lambda: MaxProbability(None), TypeError, "threshold: expected a number, got None"),  # type: ignore[arg-type]
        (lambda: Learned(["0.5"]), TypeError, r"threshold: expected a number, got '0\.5'"),  # type: ignore[list-item]
        (lambda: Entropy([]), ValueError, "threshold: expected one or more, got none"),
        (lambda: Entropy(math.nan), ValueError, "threshold: expected an entropy"),
        (lambda: Patience(0), ValueError, "patience: expected 1 or more"),
        (lambda: Patience(1.5), TypeError, "patience: expected an int"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(error, match=message):
            make()


# --- backbones as they come -------------------------------------------------------------------------------------------


def test_a_module_that_stands_there_twice_runs_twice() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    twice = Twice()
    x = torch.randn(4, 3)
    backbone = nn.Sequential(twice, nn.Sequential(nn.Identity(), twice), twice)
    model = EarlyExit(backbone, {"0": nn.Identity(), "1.1": nn.Identity()})
    for logits, factor in zip(model(x), (2, 4, 8), strict=True):
        assert torch.equal(logits, factor * x)
    inside: Any = OrderedDict(inner=None)
    with pytest.raises(ValueError, match=r"backbone: expected a module at '1\.inner', got None"):
        EarlyExit(nn.Sequential(nn.ReLU(), nn.Sequential(inside)), {"0": nn.Identity()})


def test_names_that_look_alike_stay_apart() -> None:
    class Add(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return x + self.value

    inner = nn.Sequential(OrderedDict(b=Add(1), b_=Add(2)))
    backbone = nn.Sequential(OrderedDict(a=inner, a_b=Add(4), a_b_=Add(8), end=Add(16)))
    x = torch.zeros(2, 3)
    model = EarlyExit(backbone, {"a_b_": nn.Identity()})
    assert [float(logits[0, 0]) for logits in model(x)] == [15, 31]
    assert list(model.state_dict()) == ["criterion.cuts"]
    with pytest.raises(ValueError, match="names of their own, got '1' twice"):
        EarlyExit([(1, Add(1)), ("1", Add(2))], {"1": nn.Identity()})  # type: ignore[list-item]


def test_a_backbone_that_computes_something_else_is_refused() -> None:
    class Skips(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self[0](x)
            return made

    with pytest.raises(ValueError, match="that run one after the other, got a Skips with a forward of"):
        EarlyExit(Skips(nn.Linear(2, 2), nn.Linear(2, 2)), {"0": nn.Identity()})
    hooked = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    handle = hooked.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="got a Sequential with hooks of its own"):
        EarlyExit(hooked, {"0": nn.Identity()})
    handle.remove()
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    inner.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(3, 2)
    model = EarlyExit(nn.Sequential(inner, nn.ReLU()), {"0": nn.Identity()})  # goes on as one module, with its hook
    torch.testing.assert_close(model(x)[0], inner[1](inner[0](x)) + 1)


class Fixed(nn.Module):
    """Whatever a head may give."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: x[:, :, None], ValueError, r"exit 0: expected logits \[{count}, classes\], got \[{count}, 2, 1\]"),
        (lambda x: x[:, 0], ValueError, r"exit 0: expected logits \[{count}, classes\], got \[{count}\]"),
        (lambda x: x.repeat(2, 1), ValueError, r"exit 0: expected logits \[{count}, classes\], got \[{twice}, 2\]"),
        (lambda x: x[:, :0], ValueError, r"exit 0: expected logits \[{count}, classes\], got \[{count}, 0\]"),
        (lambda x: (x, x), TypeError, "exit 0: expected a tensor of logits, got tuple"),
    ],
)
def test_heads_that_give_no_logits(count: int, make: Any, error: type[Exception], message: str) -> None:
    model = EarlyExit([("a", nn.Identity()), ("b", nn.Identity())], {"a": Fixed(make)}, MaxProbability(0.9)).eval()
    with pytest.raises(error, match=message.format(count=count, twice=2 * count)):
        model(torch.randn(count, 2))


def test_the_last_exit_gives_logits_too() -> None:
    for count in (1, 3):
        parts = [("a", nn.Identity()), ("b", Fixed(lambda x: x[:, 0]))]
        model = EarlyExit(parts, {"a": nn.Identity()}, Entropy(0)).eval()
        with pytest.raises(ValueError, match=rf"exit 1: expected logits \[{count}, classes\], got \[{count}\]"):
            model(torch.randn(count, 2))
    parts = [("a", nn.Identity()), ("b", Fixed(lambda x: x[:, :1]))]
    model = EarlyExit(parts, {"a": nn.Identity()}, Entropy(0)).eval()
    for count in (1, 3):
        with pytest.raises(ValueError, match="exit 1: expected 2 classes like the exits before, got 1"):
            model(torch.randn(count, 2))


def test_states_that_cannot_shrink() -> None:
    def model(make: Any) -> EarlyExit:
        head = Fixed(lambda state: torch.tensor([[9.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
        return EarlyExit([("a", Fixed(make)), ("b", Fixed(lambda state: state[0]))], {"a": head}, Entropy(0.1)).eval()

    x = torch.randn(3, 2)
    for make, error, message in [
        (lambda x: {"x": x}, TypeError, "state: expected tensors, or tuples or lists of them, got dict"),
        (lambda x: (x, 3), TypeError, "state: expected tensors, or tuples or lists of them, got int"),
        (lambda x: (x, x[:2]), ValueError, r"state: expected 3 rows in every tensor, got \[2, 2\]"),
        (lambda x: (x, x.sum()), ValueError, r"state: expected 3 rows in every tensor, got \[\]"),
    ]:
        with pytest.raises(error, match=message):
            model(make)(x)
    Pair = collections.namedtuple("Pair", "one two")
    assert torch.equal(model(lambda x: Pair(x, 2 * x))(x)[1:], x[1:])


# --- one sample like many ---------------------------------------------------------------------------------------------


def test_patience_takes_no_comfort_from_nan() -> None:
    """Of logits with NaN, alone and in a batch, nothing agrees with anything."""
    nan = math.nan
    rows = torch.tensor([[[1, nan, 2], [1, nan, 2], [nan, 1, 0]], [[nan] * 3] * 3, [[0, 1, nan]] * 3, [[0, 1, 0]] * 3])

    class At(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.index]

    backbone = [("a", nn.Identity()), ("b", nn.Identity()), ("c", At(2))]
    model = EarlyExit(backbone, {"a": At(0), "b": At(1)}, Patience(1)).eval()
    assert model.run(rows).exits.tolist() == [2, 2, 2, 1]
    assert [int(model.run(row[None]).exits) for row in rows] == [2, 2, 2, 1]


def test_the_layout_of_a_batch_does_not_decide() -> None:
    """A sample comes to its layers laid out alike, whichever way its batch is, and wherever it lies."""
    seen: list[bool] = []
    model = build(margin=math.inf)
    model.stages[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous() and args[0].data_ptr() % 64 == 0)
    )
    first_row = model(X[:1])
    for offset in (1, 4, 8):  # [1, 1, 10, 10] is 400 bytes, so that rows of a batch lie anywhere
        moved = torch.empty(X[:1].numel() + offset)[offset:].view(1, 1, 10, 10).copy_(X[:1])
        assert torch.equal(model(moved), first_row)
        assert torch.equal(model(moved.expand(2, 1, 10, 10))[1:], first_row)
    x = X[:4].expand(4, 3, 10, 10)
    with torch.no_grad():
        first: Any = model.stages[0]
        first.conv.weight = nn.Parameter(first.conv.weight.repeat(1, 3, 1, 1))
    wide = x.contiguous(memory_format=torch.channels_last)
    rows = torch.cat([model(row) for row in wide.split(1)])
    outputs = [model(x.contiguous()), model(wide), rows, model(wide.flip(0)).flip(0)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert all(seen)


def test_half_precision_before_a_head_of_full_precision() -> None:
    """The margin is that of the coarsest numbers on the way, not of the logits alone."""

    class Coarse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * (1 + 0.004 * (len(x) > 1))).bfloat16()  # a last bit

    class Fine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() * torch.tensor([1.0, 0.0])

    x = torch.ones(2, 2)
    between = 1 / (1 + math.exp(-1.002))
    for backbone, exits in [
        ([("a", Coarse()), ("b", Fine())], {"a": Fine()}),
        ([("a", Coarse()), ("b", Fine()), ("c", nn.Identity())], {"a": Fixed(lambda x: 0.0 * x.float()), "b": Fine()}),
    ]:
        model = EarlyExit(backbone, exits, MaxProbability(between)).eval()
        assert model.run(x).exits.tolist() == [len(exits)] * 2 == [int(model.run(row[None]).exits) for row in x]


def test_one_class_and_two() -> None:
    for classes in (1, 2):
        for criterion in (Entropy(), MaxProbability(), Learned(), Patience()):
            x = torch.tensor([[4.0, -4.0], [0.1, 0.0], [-5.0, 5.0]])[:, :classes]
            model = EarlyExit([("a", nn.Identity()), ("b", nn.Identity())], {"a": nn.Identity()}, criterion).eval()
            expected = [1] * 3 if isinstance(criterion, Patience) else [0] * 3 if classes == 1 else [0, 1, 0]
            assert model.run(x).exits.tolist() == expected
            assert [int(model.run(row[None]).exits) for row in x] == expected
            assert torch.equal(model(x), x)


def test_extreme_thresholds() -> None:
    for never, always in [
        (Entropy(0.0), Entropy(math.inf)),
        (MaxProbability(1.0), MaxProbability(0.0)),
        (Learned(1.0), Learned(0.0)),
        (Patience(10**9), None),
    ]:
        for criterion, exit in ((never, 2), (always, 0)):
            if criterion is not None:
                model = build(criterion)
                assert model.run(X).exits.tolist() == [exit] * 40
                assert model.run(X[:1]).exits.tolist() == [exit]
                with torch.no_grad():
                    torch.testing.assert_close(model(X), model.all_exits(X)[exit])


def test_the_mode_decides_and_stays() -> None:
    model = build().train()
    model.heads[0].eval()
    flags = [module.training for module in model.modules()]
    model.run(X[:3]), model.predict(X[:3], 1.0), model.latencies(X[:1], 1), model.measure_(X[:2], 1)
    model.calibrate_([(X, torch.zeros(40, dtype=torch.long))], macs=1e9)
    assert [module.training for module in model.modules()] == flags
    assert isinstance(model(X), list)
    assert model.eval()(X).shape == (40, 5)


def test_hooks_of_leaving_samples() -> None:
    """Hooks on the backbone's modules run, with the samples that are there."""
    model = build()
    seen: list[int] = []
    last: Any = model.stages[2]
    last.last.register_forward_hook(lambda module, args, output: (seen.append(len(output)), output + 1)[1])
    plain = build()
    with torch.no_grad():
        exits = torch.as_tensor(plain.run(X).exits)
        assert 0 < int((exits == 2).sum()) < 40
        torch.testing.assert_close(model(X), plain(X) + (exits == 2)[:, None])
    assert seen == [int((exits == 2).sum())]


# --- criteria come and go ---------------------------------------------------------------------------------------------


def test_another_criterion_fits_itself() -> None:
    model = build()
    model.criterion = MaxProbability(0.7)
    assert model.criterion.thresholds == pytest.approx([0.7, 0.7])
    model(X)
    with pytest.raises(TypeError, match=r"criterion: expected one of slimtorch.dynamic's, got float"):
        model.criterion = 0.5  # type: ignore[assignment]
    with pytest.raises(ValueError, match="threshold: expected one, or one for each of 2 exits, got 3"):
        model.criterion = Entropy([0.1, 0.2, 0.3])
    assert model.criterion.thresholds == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize("kind", [Entropy, MaxProbability, Learned, Patience])
def test_a_calibrated_criterion_keeps_its_thresholds(kind: type[Criterion]) -> None:
    model, x, labels = staged(kind())  # type: ignore[call-arg]
    model.calibrate_([(x, labels)], macs=2.3)
    before = copy.deepcopy(model.criterion)
    backbone = [(str(number), stage) for number, stage in enumerate(model.stages)]
    other = EarlyExit(backbone, {"0": model.heads[0], "1": model.heads[1]}, model.criterion, margin=0.0).eval()
    assert other.criterion.thresholds == before.thresholds
    assert all(torch.equal(*pair) for pair in zip(other.criterion.buffers(), before.buffers(), strict=True))
    with pytest.raises(ValueError, match="criterion: has thresholds for 2 exits before the last, expected a new"):
        EarlyExit(backbone, {"0": model.heads[0]}, model.criterion)
    assert model.criterion.thresholds == before.thresholds


def test_training_on_several_devices_leaves_the_thresholds_alone(tmp_path: Any) -> None:
    """They lie on the host, where a backend for GPUs cannot send them."""
    model = build(Learned())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model.train())
        assert wrapped.parameters_to_ignore == {"criterion.cuts", "criterion.weights"}
        exit_loss(wrapped(X), torch.zeros(40, dtype=torch.long)).backward()  # no parameter goes unused
        exit_loss(wrapped(X), torch.zeros(40, dtype=torch.long)).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- calibration: what may come ---------------------------------------------------------------------------------------


def test_validation_data_with_nan() -> None:
    """What is not a number is not sure; the others are calibrated as if it were not there."""
    for criterion in (Entropy(), MaxProbability(), Learned()):
        model, x, labels = staged(criterion)
        clean = model.calibrate_([(x, labels)], accuracy=0.95).chosen
        spoilt = torch.cat((x, torch.full((4, 3), math.nan))), torch.cat((labels, torch.ones(4).long()))
        found = model.calibrate_([spoilt], accuracy=0.95 * 400 / 404).chosen
        assert all(math.isfinite(threshold) for threshold in found.thresholds)
        assert found.macs == pytest.approx((clean.macs * 400 + 3 * 4) / 404, rel=0.02)


def test_calibration_refuses() -> None:
    model, x, labels = staged(Entropy(0.4))
    for data, options, error, message in [
        ([(x, labels)], {"accuracy": "0.9"}, TypeError, "accuracy: expected a number, got '0.9'"),
        ([(x, labels)], {"macs": True}, TypeError, "macs: expected a number, got True"),
        ([(x, labels)], {"macs": math.nan}, ValueError, "macs: expected at least 1 per sample"),
        ([(x, labels)], {"accuracy": math.nan}, ValueError, r"accuracy: expected a share in \[0, 1\], got nan"),
        ([x], {"accuracy": 0.9}, TypeError, r"data: expected pairs \(inputs, labels\), got Tensor"),
        ([(x, labels.tolist())], {"accuracy": 0.9}, TypeError, "data: expected a tensor of labels, got list"),
        ([(x, labels + 1)], {"accuracy": 0.9}, ValueError, "data: expected labels from 0 to 1, got 1 to 2"),
        ([(x, labels - 1)], {"accuracy": 0.9}, ValueError, "data: expected labels from 0 to 1, got -1 to 0"),
        ([(x, labels.float())], {"accuracy": 0.9}, ValueError, r"integer labels \[400\], got torch.float32"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            model.calibrate_(data, **options)  # type: ignore[arg-type]
    assert model.criterion.thresholds == pytest.approx([0.4, 0.4])
    assert model.calibrate_([(x, labels), (x[:0], labels[:0])], accuracy=0).chosen.macs == 1


# --- neurons are removed from all paths -------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 10.0], ids=["nobody leaves", "everybody leaves"])
@pytest.mark.parametrize("training", [False, True])
def test_neurons_go_from_the_backbone_and_its_heads(threshold: float, training: bool) -> None:
    """Whatever way the example inputs take, and in either mode: all exits are looked at."""
    torch.manual_seed(0)
    heads = {"pool1": nn.Sequential(nn.Flatten(), nn.Linear(4 * 144, 10))}
    model = EarlyExit(list(slim.models.LeNet5((4, 6, 8)).named_children()), heads, Entropy([threshold])).train(training)
    x = torch.randn(3, 1, 28, 28)
    slim.prune_(model, slim.prune.Neurons(ratio=0.5), example_inputs=x)
    assert model.training is training
    widths = {name: tuple(p.shape[:2]) for name, p in model.named_parameters() if p.dim() > 1}
    assert widths == {
        "stages.0.conv1.weight": (2, 1), "stages.1.conv2.weight": (3, 2), "stages.1.fc1.weight": (4, 48),
        "stages.1.fc2.weight": (10, 4), "heads.0.1.weight": (10, 288),
    }  # fmt: skip
    with torch.no_grad():
        assert [tuple(logits.shape) for logits in model.all_exits(x)] == [(3, 10), (3, 10)]
        assert model.eval()(x).shape == (3, 10)


def test_a_network_with_exits_becomes_slimmable() -> None:
    torch.manual_seed(0)
    heads = {"pool1": nn.Sequential(nn.Flatten(), nn.Linear(4 * 144, 10))}
    model = EarlyExit(list(slim.models.LeNet5((4, 6, 8)).named_children()), heads, Entropy([10.0])).eval()
    x = torch.randn(3, 1, 28, 28)
    slim.dynamic.slimmable_(model, (0.5, 1.0), example_inputs=x)
    narrow = slim.dynamic.export(model, 0.5)
    with torch.no_grad(), slim.dynamic.at_width(model, 0.5):
        for one, other in zip(narrow.all_exits(x), model.all_exits(x), strict=True):  # type: ignore[operator]
            torch.testing.assert_close(one, other)
    assert narrow.stages[1].conv2.weight.shape == (3, 2, 5, 5)  # type: ignore[union-attr, index]
