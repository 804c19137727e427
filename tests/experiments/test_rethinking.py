# SPDX-License-Identifier: Apache-2.0
"""rethinking on a hundred digits: whole and resumed; its recipe, its shapes, and what its trials depend on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimtorch import models
from slimtorch.data import Digits, digits
from slimtorch.experiments import catalogue, rethinking
from slimtorch.experiments.catalogue import Settings
from slimtorch.experiments.rethinking import Augmented, build, figures, plan, tables, trials
from slimtorch.prune import masks, scratch, sparsity

TINY = rethinking.Plan(
    seeds=2, rows=("vgg16-a", "vgg16-slimming", "resnet20-weights"), small=True, epochs=2, tune_epochs=1,
    tune_rate=1e-2, strength=1e-2, slimmed=0.4, sparsity=0.7, at_most=1.5, batch_size=25,
)  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Digits:
    data = digits(50, 20, 30)
    monkeypatch.setattr(rethinking, "load", lambda name, quick: (data, "fifty digits"))
    monkeypatch.setattr(rethinking, "plan", lambda settings: TINY)
    monkeypatch.setattr(rethinking, "SMALL", {"vgg16": (16, 16), "resnet20": (8, 8)})
    return data


def silent(stage: str, done: int, total: int) -> None:
    pass


def test_the_experiment_runs_and_resumes(small: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = catalogue.find("rethinking")
    result = experiment.run(Settings(jobs=1), tmp_path, silent)
    found = json.loads(json.dumps(result.data))
    assert list(found["rows"]) == list(TINY.rows)
    for row in found["rows"].values():
        for column in ("unpruned", "tuned", "e", "b"):
            assert len(row["test"][column]["values"]) == 2
            assert all(0 <= value <= 1 for value in row["test"][column]["values"])
        assert row["epochs"]["e"] == [2, 2]
        assert all(2 <= epochs <= 3 for epochs in row["epochs"]["b"])
        for large, after in (row["parameters"], row["macs"]):
            assert all(a < b for a, b in zip(after, large, strict=True))
    widths = found["rows"]["vgg16-slimming"]["widths"][0]
    full = [w // 16 for w in models.VGG16_WIDTHS]
    assert sum(widths) == sum(full) - round(0.4 * sum(full))
    assert all(1 <= now <= before for now, before in zip(widths, full, strict=True))
    # tables and figures need the JSON only
    assert [t.to_dict() for t in tables(found)] == [t.to_dict() for t in result.tables]
    accuracy = result.tables[0]
    assert [row[0] for row in accuracy.rows] == [
        "VGG-16-A", "  the paper, CIFAR-10", "VGG-16, slimming", "ResNet-20, weights",
    ]  # fmt: skip
    assert accuracy.rows[1][1:] == ["93.63", "93.41", "93.62", "93.78"]
    mean = sum(found["rows"]["vgg16-a"]["test"]["e"]["values"]) / 2
    assert str(accuracy.rows[0][3]).startswith(f"{100 * mean:.2f} ± ")
    assert max(len(line) for table in result.tables for line in str(table).splitlines()) <= 100
    ((_, caption, figure),) = figures(found)
    assert caption
    assert len(figure.axes) == 1

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(rethinking, "fit", refuse)
    assert experiment.run(Settings(jobs=1), tmp_path, silent).data["rows"] == found["rows"]


@pytest.mark.parametrize("row", TINY.rows)
def test_from_scratch_has_the_shape_and_masks_of_the_tuned(
    row: str, small: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rethinking, "fit", lambda *args, **options: None)
    asked = trials(TINY, colour=False)
    seen: list[nn.Module] = []
    compare = scratch.compare

    def kept(*args: Any, **options: Any) -> scratch.Scratch:
        both = compare(*args, **options)
        seen.extend([both.e.model, both.b.model])
        return both

    monkeypatch.setattr(scratch, "compare", kept)
    done: dict[str, Any] = {}
    for column in ("unpruned", "tuned", "scratch"):
        trial = asked[row, column, 1]
        done[trial.name] = trial.run(trial.config, small, [done[need.name] for need in trial.needs])
    tuned = done[f"{row}-tuned-seed1"]
    large = next(r for n, r in done.items() if "unpruned" in n)
    for model in seen:
        kept_weights = sum(p.numel() for p in model.parameters()) - sum(int((~m).sum()) for m in masks(model).values())
        assert kept_weights == tuned.result["parameters"] < large.result["parameters"]
        assert {n: m.tolist() for n, m in masks(model).items()} == {n: m.tolist() for n, m in tuned.arrays.items()}
    if row == "resnet20-weights":
        total, gone = (sum(f(m) for m in tuned.arrays.values()) for f in (lambda m: m.size, lambda m: (~m).sum()))
        assert gone == round(0.7 * total)
        assert all(m.ndim == 4 for m in tuned.arrays.values())  # convolutions only
        torch.manual_seed(5001)  # the start: drawn as the network's own, larger where less of it is left
        fresh = dict(build("resnet20", 8, 1).named_modules())
        for name, layer in seen[0].named_modules():
            if name in tuned.arrays:
                mask = torch.from_numpy(tuned.arrays[name])
                expected = torch.where(mask, fresh[name].weight / mask.float().mean().sqrt(), 0)
                torch.testing.assert_close(layer.weight, expected)
    else:
        assert sparsity(seen[0]) == 0


def test_recipe(small: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """1810.05270, section 4: SGD 0.1, a tenth at half and at three quarters; one low rate for fine-tuning."""
    rates: list[float] = []

    def follow(model: nn.Module, data: Digits, optimizer: Any, *, steps: int, schedule: Any, **options: Any) -> None:
        assert options["batch_size"] == 25
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["momentum"] == 0.9
        assert optimizer.param_groups[0]["weight_decay"] == 1e-4

    monkeypatch.setattr(rethinking, "fit", follow)
    asked = trials(replace(TINY, epochs=8), colour=False)
    config = asked["vgg16-a", "tuned", 0].config
    model = build("resnet20", 8, 1)
    rethinking._train(model, config, small, 8)
    assert rates == pytest.approx([0.1] * 8 + [0.01] * 4 + [0.001] * 4)  # two steps an epoch
    rates.clear()
    rethinking._train(model, config, small, 3, tune=True)
    assert rates == pytest.approx([0.01] * 6)


def test_own_data_get_the_recipe_and_networks_of_the_paper() -> None:
    full = plan(Settings(data="cifar10"))
    assert (full.epochs, full.tune_epochs, full.tune_rate, full.rate, full.batch_size) == (160, 40, 1e-3, 0.1, 64)
    assert full.rows == tuple(rethinking.ROWS)
    assert full.at_most is None
    asked = trials(full, colour=True)
    for name, row in rethinking.ROWS.items():
        config = asked[name, "scratch", 0].config
        assert config["augment"]
        if row.how not in "AB":
            continue
        with torch.device("meta"):
            mine = build(config["network"], config["narrow"], 3, row.how)
            published: Callable[[], nn.Module] = getattr(models, f"{row.network}_{row.how.lower()}")
            assert [p.shape for p in mine.parameters()] == [p.shape for p in published().parameters()]


def test_what_trials_need_and_depend_on() -> None:
    asked = trials(TINY, colour=False)
    needs = {key[:2]: [n.name for n in trial.needs] for key, trial in asked.items() if key[2] == 0}
    assert needs["vgg16-a", "tuned"] == ["vgg16-unpruned-seed0"]
    assert needs["vgg16-a", "scratch"] == []
    assert needs["vgg16-slimming", "tuned"] == []
    assert needs["vgg16-slimming", "scratch"] == ["vgg16-slimming-tuned-seed0"]
    assert needs["resnet20-weights", "scratch"] == ["resnet20-weights-tuned-seed0"]
    other = trials(replace(TINY, strength=1e-3), colour=False)
    changed = {key[:2] for key in asked if asked[key].config != other[key].config}
    assert changed == {("vgg16-slimming", "tuned")}
    other = trials(replace(TINY, epochs=3), colour=False)
    assert all(asked[key].config != other[key].config for key in asked)


def test_crops_and_flips() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 2, 6, 5)
    model = Augmented(nn.Identity())
    assert torch.equal(model.eval()(x), x)
    y = model.train()(x)
    padded = torch.zeros(16, 2, 14, 13)
    padded[:, :, 4:10, 4:9] = x
    found = []
    for before, after in zip(padded, y, strict=True):
        windows = [(t, s, f) for t in range(9) for s in range(9) for f in (False, True)]
        views = {w: before[:, w[0] : w[0] + 6, w[1] : w[1] + 5] for w in windows}
        fitting = [w for w in windows if torch.equal(after, views[w].flip(2) if w[2] else views[w])]
        assert fitting
        found.append(fitting[0])
    assert len(set(found)) > 8
    assert {flip for _, _, flip in found} == {False, True}
