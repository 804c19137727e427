# SPDX-License-Identifier: Apache-2.0
"""importance and one-shot-vs-iterative: what a trial does, and that tables and figures need the JSON only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtorch.data import Digits, Split, digits
from slimtorch.experiments import importance, one_shot_vs_iterative, pruned
from slimtorch.experiments.catalogue import Settings, find
from slimtorch.experiments.loop import evaluate
from slimtorch.prune import Magnitude, prune_, sparsity


@pytest.fixture(scope="module")
def data() -> Digits:
    return digits(200, 100, 100)


def check(module: Any, tiny: Any, data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs twice, the second time from what is kept; tables and figures come from the JSON alone."""
    monkeypatch.setattr(module, "plan", lambda settings: tiny)
    monkeypatch.setattr(module, "load", lambda name, quick: (data, "a few digits"))
    seen: list[tuple[str, int, int]] = []
    result = module.run(Settings(jobs=1), tmp_path, lambda *told: seen.append(told))
    assert seen[0][1] == 0
    found = json.loads(json.dumps(result.data))
    seen.clear()
    again = module.run(Settings(jobs=1), tmp_path, lambda *told: seen.append(told))
    assert seen[0][1] == seen[0][2]  # nothing left to do
    assert {**again.data, "machine": None} == {**result.data, "machine": None}
    assert [str(t) for t in module.tables(found)] == [str(t) for t in result.tables]
    assert all(len(line) <= 100 for table in result.tables for line in str(table).splitlines())
    names = [name for name, _, _ in module.figures(found)]
    assert len(set(names)) == len(names) == 2
    for _, _, figure in module.figures(found):
        figure.draw_without_rendering()
    assert "small scale" in result.lead
    return found


def test_importance(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(importance.WEIGHTS)
    tiny = importance.Plan(
        2, (0.5, 0.9), (0.5,), names, tuple(importance.NEURONS), (0.5, 0.95), epochs=0.6, tune_epochs=0.3
    )
    found = check(importance, tiny, data, tmp_path, monkeypatch)
    assert set(found["weights"]["global"]) == set(names)
    for part in found["allocation"]["density"]:
        for index, level in enumerate((0.5, 0.9)):
            sizes = (784 * 300, 300 * 100, 1000)
            uniform, ranked, shared = (part[name][index] for name in ("layer", "global", "sensitivity"))
            assert uniform == pytest.approx([1 - level] * 3)
            for density in (ranked, shared):  # equal nonzeros, shared out in another way
                left = sum(d * n for d, n in zip(density, sizes, strict=True))
                assert left <= (1 - level) * sum(sizes) + 2
                assert density != pytest.approx(uniform)


def test_a_trial_prunes_by_its_importance(data: Digits) -> None:
    config = {
        "network": "lenet300", "seed": 3, "epochs": 0.6, "tune_epochs": 0.3, "rate": 1e-3, "tune_rate": 1e-3,
        "batch_size": 60, "levels": [0.9], "scope": "global", "watch": ["fisher"],
    }  # fmt: skip
    dense = importance._dense(config, data, ())
    model = pruned.restore("lenet300", dense)
    assert evaluate(model, data.test)[1] == dense.result["test"]
    # the Fisher scores are w² · Σ g² / 2n; what was seen by the optimizer is what is kept
    for name in importance.LAYERS:
        weight = model.get_submodule(name).weight
        scores = torch.from_numpy(dense.arrays[f"fisher:{name}"])
        assert scores.shape == weight.shape  # type: ignore[union-attr]
        assert float(scores.max()) > 0
        assert not bool(scores[weight == 0].any())  # type: ignore[index]
    prune_(model, Magnitude(0.9, scope="global"))
    before = evaluate(model, data.test)[1]
    done = importance._prune_weights({**config, "importance": "magnitude"}, data, (dense,))
    assert done.result["untrained"] == [before]
    trained, kind = importance._score({**config, "importance": "snip-start"}, data, dense)
    assert kind == "snip"
    start = pruned.begin("lenet300", 3)
    assert torch.equal(trained.fc1.weight, start.fc1.weight)  # type: ignore[union-attr,arg-type]


def test_one_shot_vs_iterative(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = one_shot_vs_iterative.Plan(2, (0.5, 0.9), {"lenet300": 1}, {"lenet300": 6}, {"lenet300": 1e-3}, prunings=5)
    found = check(one_shot_vs_iterative, tiny, data, tmp_path, monkeypatch)
    part = found["networks"]["lenet300"]
    assert part["steps"] == 20
    assert len(part["test"]["cubic"]) == 2
    assert len(part["curves"]["cubic"][0][0]) == len(part["curve_steps"]) == 21


@pytest.mark.parametrize("steps", [7, 20, 467])
@pytest.mark.parametrize("name", list(one_shot_vs_iterative.SCHEDULES))
def test_every_schedule_ends_with_the_same_steps_left(steps: int, name: str) -> None:
    config = {"share": 0.6, "rounds": 5, "prunings": 30}
    schedule = one_shot_vs_iterative._schedule(name, steps, config)
    due = [step for step in range(steps) if schedule.due(step)]
    assert due[0] == 0  # all begin at once, and have as many steps in all
    assert schedule.sparsity(steps - 1, 0.98) == 0.98
    assert schedule.last < steps
    if name != "one-shot":
        assert due[-1] == pytest.approx(0.6 * steps, abs=3)
        assert len(due) == 5 if name == "iterative" else len(due) >= min(5, steps // 2)


def test_all_weights_of_a_trial_are_pruned(data: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network that is tested has the sparsity that the table says."""
    seen: list[float] = []
    monkeypatch.setattr(
        one_shot_vs_iterative, "evaluate", lambda model, split: (seen.append(sparsity(model)), 0.5)
    )
    config = {
        "network": "lenet300", "seed": 0, "epochs": 0.3, "rate": 1e-3, "tune_rate": 1e-3, "batch_size": 60,
        "level": 0.9, "share": 0.6, "rounds": 3, "prunings": 4, "tune_epochs": 3,
    }  # fmt: skip
    dense = one_shot_vs_iterative._dense(config, data, ())
    for name in one_shot_vs_iterative.SCHEDULES:
        seen.clear()
        one_shot_vs_iterative._prune({**config, "schedule": name}, data, (dense,))
        assert seen == pytest.approx([0.9, 0.9], abs=1e-5)  # after training, and of the copy that is not trained


def test_data_of_another_shape(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Split(torch.zeros(20, 3, 32, 32), torch.zeros(20, dtype=torch.long))
    for module in (importance, one_shot_vs_iterative):
        monkeypatch.setattr(module, "load", lambda name, quick: (Digits(image, image, image), "tiny images"))
        with pytest.raises(ValueError, match=r"data: .* digits of shape \(1, 28, 28\), got images of \(3, 32, 32\)"):
            module.run(Settings(jobs=1), tmp_path, lambda *told: None)


def test_they_are_found_by_name() -> None:
    for name in ("importance", "one-shot-vs-iterative"):
        experiment = find(name)
        assert experiment.config(Settings())["seeds"] >= 5
        quick = experiment.config(Settings(quick=True, seeds=3))
        assert quick["seeds"] == 3
        json.dumps(quick)
