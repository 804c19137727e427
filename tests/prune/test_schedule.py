# SPDX-License-Identifier: Apache-2.0
"""Schedules: their curves, one step() in a training loop, resuming."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimtorch import prune
from slimtorch.prune import Cubic, Iterative, Magnitude, OneShot, Pruner

from .networks import CASES
from .test_mask import OPTIMIZERS, train


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 20), st.integers(0, 50), st.integers(1, 12), st.floats(0, 0.99), st.floats(0, 0.5))
def test_cubic_is_equation_1(begin: int, length: int, every: int, final: float, initial: float) -> None:
    schedule = Cubic(begin, begin + length, every, initial)
    start = min(initial, final)
    previous = 0.0
    for step in range(begin + length + 5):
        now = schedule.sparsity(step, final)
        assert 0 <= previous <= now + 1e-12
        assert now <= final
        if step < begin:
            assert now == 0
            assert not schedule.due(step)
        elif begin <= step < begin + length and (step - begin) % every == 0:
            assert schedule.due(step)
            assert math.isclose(now, final + (start - final) * (1 - (step - begin) / length) ** 3, abs_tol=1e-12)
        elif not schedule.due(step):
            assert now == previous
        previous = now
    assert previous == final
    assert schedule.due(schedule.last)
    assert schedule.last == begin + length


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 5), st.floats(0, 0.99))
def test_iterative_removes_the_same_share_of_what_remains(rounds: int, every: int, begin: int, final: float) -> None:
    schedule = Iterative.rounds(rounds, every, begin)
    assert schedule.at == tuple(begin + i * every for i in range(rounds))
    density = [1 - schedule.sparsity(at, final) for at in schedule.at]
    assert math.isclose(density[-1], 1 - final)
    for before, after in zip([1.0, *density], density, strict=False):
        assert math.isclose(after / before, (1 - final) ** (1 / rounds), rel_tol=1e-9)
    assert sum(schedule.due(step) for step in range(200)) == rounds
    if begin:
        assert schedule.sparsity(begin - 1, final) == 0


def test_one_shot() -> None:
    assert [OneShot(2).sparsity(step, 0.9) for step in range(4)] == [0, 0, 0.9, 0.9]
    assert [OneShot(2).due(step) for step in range(4)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: Cubic(-1, 5), ValueError, "begin"),
        (lambda: Cubic(5, 4), ValueError, "end"),
        (lambda: Cubic(0, 4, 0), ValueError, "every"),
        (lambda: Cubic(0, 4.0), TypeError, "end"),  # type: ignore[arg-type]
        (lambda: Cubic(0, 4, initial=1.0), ValueError, "initial"),
        (lambda: Iterative(()), ValueError, "at"),
        (lambda: Iterative((3, 3)), ValueError, "ascending"),
        (lambda: Iterative((-1,)), ValueError, "at"),
        (lambda: Iterative.rounds(0, 3), ValueError, "rounds"),
        (lambda: OneShot(True), TypeError, "at"),
    ],
)
def test_bad_schedules(build: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        build()


SCHEDULES = [OneShot(3), Cubic(2, 12, 3), Iterative((1, 4, 9)), Iterative.rounds(3, 4)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_training_loop(schedule: Any, kind: str) -> None:
    model = CASES["mlp"].model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = Pruner(model, Magnitude(0.9), schedule)
    assert pruner.sparsity == 0
    reports = []
    previous = {n: m.clone() for n, m in prune.masks(model).items()}
    sizes = {n: m.numel() for n, m in previous.items()}

    def after() -> None:
        reports.append(pruner.step())
        target = schedule.sparsity(len(reports) - 1, 0.9)
        assert math.isclose(pruner.sparsity, target)
        for name, mask in prune.masks(model).items():
            assert int((~mask).sum()) == round(target * sizes[name])
            assert not bool((mask & ~previous[name]).any())
            previous[name] = mask.clone()
        assert pruner.finished == (len(reports) > schedule.last)

    train(model, optimizer, 15, after)
    assert [r is not None for r in reports] == [schedule.due(i) for i in range(15)]
    assert pruner.finished
    assert prune.bake_(model) == ["fc1", "fc2", "out"]
    assert abs(prune.sparsity(model) - 0.9) < 0.01


def test_masks_follow_the_weights_of_the_moment() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pruner = Pruner(layer, Magnitude(0.5), Iterative((0, 1)))
    pruner.step()  # 1 - sqrt(0.5) of 4: one weight
    assert prune.masks(layer)[""].tolist() == [[False, True, True, True]]
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.tensor([[9.0, 2.0, 3.0, 0.5]]))
    pruner.step()
    assert prune.masks(layer)[""].tolist() == [[False, True, True, False]]


def test_regrow_brings_weights_back() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pruner = Pruner(layer, Magnitude(0.5), Iterative((0, 1)), regrow=True)
    pruner.step()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.tensor([[9.0, 2.0, 3.0, 0.5]]))
    pruner.step()
    assert prune.masks(layer)[""].tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 5, 8, 14])
def test_interrupted_training_resumes(kind: str, stop: int) -> None:
    def start() -> tuple[nn.Module, Pruner, torch.optim.Optimizer]:
        model = CASES["mlp"].model()
        pruner = Pruner(model, Magnitude(0.9, scope="global"), Cubic(2, 12, 4))
        return model, pruner, OPTIMIZERS[kind](model.parameters())

    def run(model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()
            pruner.step()

    through = start()
    run(*through, 0, 16)
    first = start()
    run(*first, 0, stop)
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = start()
    for part, part_state in zip(second, saved, strict=True):
        part.load_state_dict(part_state)
    assert second[1].sparsity == first[1].sparsity
    run(*second, stop, 16)
    assert second[1].finished
    expected, got = through[0].state_dict(), second[0].state_dict()
    assert list(expected) == list(got)
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_layers_with_different_targets() -> None:
    model = CASES["mlp"].model()
    config = {"out": None, "fc1": Magnitude(0.9), "*": Magnitude(0.5, "row")}
    pruner = Pruner(model, config, Cubic(0, 4), filter_fn=lambda m, n: True)
    for _ in range(5):
        pruner.step()
    masks = prune.masks(model)
    assert list(masks) == ["fc1", "fc2"]
    assert int((~masks["fc1"]).sum()) == round(0.9 * 640)
    assert int((~masks["fc2"].any(1)).sum()) == 8
    assert math.isclose(pruner.sparsity, (0.9 * 640 + 0.5 * 512) / 1152)


def test_bare_layer_and_nothing_to_prune() -> None:
    layer = nn.Conv2d(3, 4, 3)
    Pruner(layer, Magnitude(0.5), OneShot()).step()
    assert int((layer.weight == 0).sum()) == 54
    pruner = Pruner(nn.ReLU(), Magnitude(0.5), OneShot())
    assert "Nothing to prune" in str(pruner.step())
    assert pruner.sparsity == 0


def test_keeps_masks_that_are_there() -> None:
    layer = nn.Linear(10, 10)
    prune.prune_(layer, Magnitude(0.3))
    first = prune.masks(layer)[""].clone()
    pruner = Pruner(layer, Magnitude(0.5), Cubic(0, 3))
    for _ in range(4):
        pruner.step()
        assert not bool((prune.masks(layer)[""] & ~first).any())
    assert int((~prune.masks(layer)[""]).sum()) == 50


def test_nan_during_training_changes_nothing() -> None:
    model = CASES["mlp"].model()
    pruner = Pruner(model, Magnitude(0.9), Cubic(0, 4))
    pruner.step()
    pruner.step()
    with torch.no_grad():
        model.get_submodule("out").parametrizations.weight.original[0, 0] = math.nan  # type: ignore[union-attr]
    before = {n: m.clone() for n, m in prune.masks(model).items()}
    with pytest.raises(ValueError, match="layer 'out' holds NaN"):
        pruner.step()
    assert pruner.steps == 2
    assert all(torch.equal(m, before[n]) for n, m in prune.masks(model).items())


def test_bad_arguments_change_nothing() -> None:
    model = CASES["mlp"].model()
    keys = list(model.state_dict())
    for config, schedule, error in [
        (prune.Neurons(0.5), OneShot(), TypeError),
        (Magnitude(0.5), 3, TypeError),
        (Magnitude(0.5), OneShot, TypeError),
        ({"nothing": Magnitude(0.5)}, OneShot(), ValueError),
    ]:
        with pytest.raises(error):
            Pruner(model, config, schedule)  # type: ignore[arg-type]
    model.get_submodule("out").weight.data[0, 0] = math.nan  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="NaN"):
        Pruner(model, Magnitude(0.5), OneShot())
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("state", [{}, {"steps": -1}, {"steps": "3"}, {"steps": True}])
def test_bad_state(state: dict[str, Any]) -> None:
    pruner = Pruner(nn.Linear(2, 2), Magnitude(0.5), OneShot())
    with pytest.raises(ValueError, match="steps"):
        pruner.load_state_dict(state)


def test_state_of_another_run() -> None:
    def pruner(sparsity: float = 0.5, schedule: prune.Schedule | None = None) -> Pruner:
        return Pruner(CASES["mlp"].model(), Magnitude(sparsity), schedule or Iterative((1, 3)))

    kept = pruner()
    kept.step()
    state = kept.state_dict()
    again = pruner()
    again.load_state_dict(copy.deepcopy(state))
    assert again.steps == 1
    for other, what in ((pruner(0.6), "sparsity"), (pruner(schedule=Iterative((1, 4))), "schedule")):
        with pytest.raises(ValueError, match=f"state: is of another run: expected {what}"):
            other.load_state_dict(state)
        assert other.steps == 0
        other.load_state_dict({"steps": 2})  # the state of an older version says no more
        assert other.steps == 2

    class Mine:  # a schedule that is no dataclass: nothing to compare
        last = 1

        def due(self, step: int) -> bool:
            return step == 1

        def sparsity(self, step: int, final: float) -> float:
            return final if step else 0.0

    mine = pruner(schedule=Mine())
    mine.load_state_dict(state)
    assert mine.state_dict()["schedule"] is None


def test_a_schedule_that_would_empty_a_layer_stops() -> None:
    """The step before stays: model, masks and count are those of the last good pruning."""
    model = CASES["mlp"].model()
    pruner = Pruner(model, Magnitude(0.995, allow_empty=False), Iterative((0, 1)))
    pruner.step()
    before = {name: mask.clone() for name, mask in prune.masks(model).items()}
    with pytest.raises(ValueError, match="would leave layer 'out' without weights"):
        pruner.step()
    assert pruner.steps == 1
    assert all(torch.equal(mask, before[name]) for name, mask in prune.masks(model).items())
