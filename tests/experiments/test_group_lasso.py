# SPDX-License-Identifier: Apache-2.0
"""group-lasso on a hundred digits: whole, resumed, and what its tables choose."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from slimtorch import prune
from slimtorch.data import digits
from slimtorch.experiments import catalogue, group_lasso
from slimtorch.experiments.group_lasso import NetworkPlan, Plan, lasso, restore, tables, trials

DATA = digits(100, 50, 100)
LEVELS = {
    "weights": (0.9,),
    "filters": (0.5,),
    "lasso filters": (0.02, 10.0),
    "lasso columns": (0.03,),
    "lasso blocks": (0.02,),
}
SMALL = Plan({"lenet300": NetworkPlan(50, 20, 40, LEVELS)}, seeds=2, samples=1, pack_seconds=0.01)
SETTINGS = catalogue.Settings(quick=True, seeds=2, jobs=1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("group-lasso")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_lasso, "load", lambda name, quick: (DATA, "a hundred digits"))
        patch.setattr(group_lasso, "QUICK", SMALL)
        patch.setattr(group_lasso, "BATCHES", (2,))
        patch.setattr(group_lasso, "dense_rivals", lambda model, x: {"torch": lambda: model(x)})  # tracing takes long
        patch.setattr(group_lasso, "frozen", lambda model, x: None)
        first = catalogue.find("group-lasso").run(SETTINGS, out, lambda *_: None)

        def refuse(*args: object) -> None:
            raise AssertionError("done again")

        for name in ("fit", "_times"):
            patch.setattr(group_lasso, name, refuse)
        again = catalogue.find("group-lasso").run(SETTINGS, out, lambda *_: None)
    return first, again


def test_runs_and_resumes(ran: Any) -> None:
    first, again = ran
    assert again.data == first.data
    text = json.dumps(first.data)
    assert len(text) < 20_000
    stored = json.loads(text)  # tables and figures need nothing but the file
    assert [str(t) for t in tables(stored)] == [str(t) for t in first.tables]
    assert [name for name, _, _ in group_lasso.figures(stored)] == ["group-lasso-lenet300", "group-lasso-pixels"]
    rows = stored["networks"]["lenet300"]["rows"]
    assert [(r["method"], r["level"]) for r in rows[1:]] == [(m, v) for m, own in LEVELS.items() for v in own]
    for row in rows:
        assert len(row["test"]) == len(row["nonzero"]) == 2
        emptied = row["level"] == 10.0
        assert row["collapsed"] == (2 if emptied else 0)
        for time in row["time"].values():
            assert time is None if emptied else time["seconds"] > 0
    by = {(r["method"], r["level"]): r for r in rows}
    assert by["weights", 0.9]["nonzero"][0] == pytest.approx(0.1 * 266_200 + 410, abs=1)
    narrow = by["lasso filters", 0.02]
    for (a, b), left in zip(narrow["widths"], narrow["nonzero"], strict=True):
        assert (a, b) != (300, 100)
        assert 785 * a + (a + 1) * b + 11 * b - b + 10 == pytest.approx(left, abs=b)  # rows with their biases
    columns = by["lasso columns", 0.03]
    zero, count = columns["groups"]["fc1"]
    assert count == 784
    assert 0 < zero < 784
    assert max(columns["pixels"]) == 2
    assert sum(columns["pixels"]) <= 2 * 784 - zero


def test_what_is_timed_is_what_was_trained(ran: Any) -> None:
    del ran
    made = trials(SMALL, 1.0)
    torch.manual_seed(0)
    dense = made["lenet300", "dense", 0.0, 0]
    record = dense.run(dense.config, DATA, [])
    again = dense.run(dense.config, DATA, [])
    assert all((record.arrays[key] == again.arrays[key]).all() for key in record.arrays)
    trial = made["lenet300", "lasso filters", 0.02, 0]
    narrow = trial.run(trial.config, DATA, [record])
    model = restore("lenet300", narrow)
    with torch.no_grad():
        right = int((model(DATA.test.images).argmax(1) == DATA.test.labels).sum())
    assert narrow.result["test"] == right / 100
    assert list(model.fc1.weight.shape) == [narrow.result["widths"][0], 784]  # type: ignore[union-attr]


def test_the_penalty_leaves_the_classes_alone() -> None:
    made = trials(SMALL, 1.0)
    for method, groups in (("lasso filters", "filters"), ("lasso columns", "shapes"), ("lasso blocks", "16×16")):
        trial = next(t for (_, m, _, _), t in made.items() if m == method)
        model = restore("lenet300", made["lenet300", "dense", 0.0, 0].run({**BASE, "steps": 1}, DATA, []))
        report = lasso(model, trial.config).report()
        assert [(x.name, x.groups) for x in report.layers] == [("fc1", groups), ("fc2", groups)]
    easy = lasso(prune_free(), {"network": "lenet5", "method": "lasso filters", "level": 1.0, "easier": {"conv1": 0.5}})
    plain = lasso(prune_free(), {"network": "lenet5", "method": "lasso filters", "level": 1.0, "easier": {}})
    conv1 = prune.GroupLasso(prune_free(), {"conv1": 1.0})().item()
    assert plain().item() - easy().item() == pytest.approx(conv1 / 2, rel=1e-4)


BASE = {"network": "lenet300", "method": "dense", "seed": 0, "batch_size": 50, "rate": 1e-3}


def prune_free() -> torch.nn.Module:
    torch.manual_seed(0)
    return group_lasso.NETWORKS["lenet5"].build((20, 50, 500))


def test_the_table_chooses_on_validation_and_takes_the_smallest() -> None:
    def row(method: str, level: float, validation: float, nonzero: int, **more: Any) -> dict[str, Any]:
        time = {"1": {"seconds": 1e-6 * nonzero, "torch": 2e-4, "statistic": "p10"}}
        own = {"method": method, "level": level, "validation": [validation] * 2, "test": [0.5, 0.7], "collapsed": 0}
        return {**own, "nonzero": [nonzero] * 2, "time": time, **more}

    rows = [
        row("dense", 0, 0.95, 100),
        row("weights", 0.5, 0.96, 50),
        row("weights", 0.8, 0.941, 20),
        row("weights", 0.9, 0.939, 10),  # a point and more below
        row("lasso filters", 0.1, 0.95, 5, collapsed=1),
    ]
    found = {"machine": MACHINE, "networks": {"x": {"title": "X", "rows": rows}}}
    chosen = {cells[0]: cells for cells in tables(found)[0].rows}
    assert chosen["weights"] == ["weights", "0.800", "60.00 ± 14.14", "20.0%", "20.0", "5.00x"]
    assert chosen["lasso filters"][1] == "none"
    assert any(note.startswith("b1: other processes at work") for note in tables(found)[0].notes)
    assert "1 networks in which" in tables(found)[1].notes[0]


MACHINE = {"cpu": "c", "threads": 1, "dtype": "float32", "isa": "scalar", "torch": "2", "slimtorch": "0"}


def test_colour_images_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    colour = torch.zeros(10, 3, 32, 32)
    split = type(DATA.train)(colour, torch.zeros(10, dtype=torch.long))
    monkeypatch.setattr(group_lasso, "load", lambda name, quick: (type(DATA)(split, split, split), "colours"))
    with pytest.raises(ValueError, match=r"data: group-lasso is for images of 1×28×28"):
        group_lasso.run(SETTINGS, tmp_path, lambda *_: None)
