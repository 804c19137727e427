# SPDX-License-Identifier: Apache-2.0
"""The experiments deconstructing and supermask, tiny: what is trained, resumed, and told from the JSON alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slimtorch.data import Digits, digits
from slimtorch.experiments import deconstructing, supermask
from slimtorch.experiments.catalogue import Settings, find
from slimtorch.experiments.deconstructing import Plan, tickets
from slimtorch.experiments.trials import run_all

SETTINGS = Settings(seeds=2, jobs=1)


@pytest.fixture
def data() -> Digits:
    return digits(60, 10, 50)


def run(module: ModuleType, tiny: Any, data: Digits, out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "load", lambda *_: (data, "a few digits"))
    monkeypatch.setattr(module, "plan", lambda _: tiny)
    pytest.importorskip("matplotlib")
    result = module.run(SETTINGS, out, lambda *_: None)
    told = json.loads(json.dumps(result.data))
    assert [str(table) for table in module.tables(told)] == [str(table) for table in result.tables]
    assert [name for name, _, _ in module.figures(told)] == [name for name, _, _ in result.figures]
    return result


def test_deconstructing(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Plan(seeds=1, epochs=2, batch_size=30, rounds=2)
    result = run(deconstructing, tiny, data, tmp_path, monkeypatch)
    found = result.data
    assert {name: list(rows) for name, rows in found.items() if name in ("criteria", "actions", "freezing")} == {
        "criteria": ["large_final", *(n for n in found["criteria"] if n != "large_final")],
        "actions": list(deconstructing.ACTIONS),
        "freezing": ["zero", *(n for n in found["freezing"] if n != "zero")],
    }
    assert found["criteria"].keys() == deconstructing.CRITERIA.keys()
    assert found["criteria"]["large_final"] == found["actions"]["rewind"] == found["freezing"]["zero"]
    rows = [r for group in ("criteria", "actions", "freezing") for r in found[group].values()]
    assert all(len(row) == 1 and len(row[0]) == 2 for row in rows)
    assert len({json.dumps(row) for row in rows}) > 12  # no two ways give the same networks, but for the ticket
    layers = {784 * 300: 0.4, 300 * 100: 0.4, 1000: 0.65}
    expected = [sum(size * share**index for size, share in layers.items()) / 266_200 for index in (1, 2)]
    assert found["remaining"] == pytest.approx(expected, abs=1e-5)

    monkeypatch.setattr(deconstructing, "fit", None)  # nothing is trained again
    assert run(deconstructing, tiny, data, tmp_path, monkeypatch).data == found


def test_the_masks_of_tickets_are_handed_on(data: Digits, tmp_path: Path) -> None:
    tiny = Plan(seeds=1, epochs=1, batch_size=30, rounds=2)
    trial = deconstructing.trials(tiny)["criteria"]["large_final"][0]
    record = run_all([trial], data, tmp_path, SETTINGS, lambda *_: None)[trial.name]
    dense, first, second = tickets(record)
    assert [t.remaining for t in (dense, first, second)] == pytest.approx(record.result["remaining"])
    start = deconstructing.network(data, 0).state_dict()
    for ticket in (first, second):
        assert all(torch.equal(ticket.start[key], value) for key, value in start.items())
    kept = first.masks["fc1"]
    magnitudes = dense.final["fc1.weight"].abs()
    assert magnitudes[kept].min() >= magnitudes[~kept].max()
    assert not bool((second.masks["fc1"] & ~kept).any())
    trained = torch.from_numpy(record.arrays["trained:fc1.weight"])
    assert torch.equal(trained[~kept], dense.final["fc1.weight"][~kept])


def test_supermask(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = supermask.Plan(seeds=2, epochs=1, mask_epochs=2, batch_size=60, samples=2, kept=(0.5, 0.1))
    result = run(supermask, tiny, data, tmp_path, monkeypatch)
    found = result.data
    assert set(found["criteria"]) == {f"{n}/{w}" for n in supermask.CRITERIA for w in ("initial", "signed_constant")}
    assert set(found["learned"]) == set(supermask.learned(tiny))
    for name, row in found["learned"].items():
        assert len(row["test"]) == 2
        assert len(row["validation"][0]) == 3  # before the first epoch and after each
        share = 0.7 if name.startswith("scores") else 0.5
        assert row["sparsity"] == pytest.approx([share] * 2, abs=0.02)
    name = "large_final_same_sign/initial"
    found["criteria"][name]["validation"] = [[0.1, 0.3], [0.2, 0.1]]
    assert supermask.best(found, name) == 1  # by the mean over seeds
    monkeypatch.setattr(supermask, "fit", None)
    again = run(supermask, tiny, data, tmp_path, monkeypatch).data
    assert again["learned"] == found["learned"]


def test_plans() -> None:
    for name, module in (("deconstructing", deconstructing), ("supermask", supermask)):
        experiment = find(name)
        assert experiment.config(Settings(quick=True))["seeds"] == 1
        full = module.plan(Settings())  # type: ignore[attr-defined]
        assert full.seeds >= 5
        assert module.plan(Settings(seeds=3)) == replace(full, seeds=3)  # type: ignore[attr-defined]
        assert module.plan(Settings(data="mnist")).epochs == 55  # type: ignore[attr-defined]
        json.dumps(experiment.config(Settings()))
