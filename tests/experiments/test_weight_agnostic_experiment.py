# SPDX-License-Identifier: Apache-2.0
"""weight-agnostic with a handful of topologies: whole, resumed, and drawn again from its JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from slimtorch.data import digits
from slimtorch.experiments import catalogue, weight_agnostic
from slimtorch.prune import weight_agnostic as wa

TINY = weight_agnostic.Plan(
    seeds=2,
    search={
        "swing-up": {"population": 8, "generations": 4, "every": 2},
        "digits": {"population": 8, "generations": 4, "every": 2, "begin": 0.1},
    },
    size=4, batch=20, held_out=2, controls=2, draws=3, steps=5, rounds=1, candidates=4, grid=7,
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    data = digits(100, 50, 50)
    monkeypatch.setattr(weight_agnostic, "load", lambda name, quick: (data, "a hundred digits"))
    monkeypatch.setattr(weight_agnostic, "plan", lambda settings: TINY)
    short = wa.SwingUp.__init__
    monkeypatch.setattr(wa.SwingUp, "__init__", lambda self, *a, **k: short(self, *a, **{**k, "steps": 40}))
    return data


def test_it_runs_resumes_and_is_drawn_from_its_json(small, tmp_path, monkeypatch):
    experiment = catalogue.find("weight-agnostic")
    settings = catalogue.Settings(quick=True, jobs=1)
    steps: list[tuple[str, int, int]] = []
    result = experiment.run(settings, tmp_path, lambda *step: steps.append(step))
    assert steps[0] == ("search", 0, 8)
    assert steps[-1] == ("search", 8, 8)
    for task, seeds in result.data["tasks"].items():
        assert len(seeds) == 2
        assert seeds[0]["best"] != seeds[1]["best"]
        for seed in seeds:
            genome = wa.Genome.from_dict(seed["best"])
            assert (genome.size, genome.hidden) == (seed["size"], seed["hidden"])
            assert len(seed["curves"]) == 3  # found, two controls
            for values in seed["kinds"].values():
                assert len(values) == 3
                assert all(0 <= value <= 1 for value in values)
            if task == "digits":
                # what the tables say of the network found is what the network does
                shared = torch.tensor(wa.Config().shared)
                plain = wa.Classification(small, 4, 20).test([genome], shared).mean()
                assert seed["kinds"]["shared"][0] == pytest.approx(float(plain), abs=1e-4)
                at = seed["grid"].index(2.0)
                assert seed["curves"][0][at] == pytest.approx(
                    float(wa.Classification(small, 4, 20).test([genome], torch.tensor([2.0]))), abs=1e-4
                )
    text = json.dumps(result.data)
    assert len(text) < 60_000
    assert [len(table.rows) for table in result.tables] == [7, 2]
    assert all(len(line) <= 100 for table in result.tables for line in str(table).splitlines())
    again = json.loads(text)
    assert [t.to_dict() for t in weight_agnostic.tables(again)] == [t.to_dict() for t in result.tables]
    for name, caption, figure in weight_agnostic.figures(again):
        assert name.startswith("weight-agnostic-")
        assert caption
        assert len(figure.axes) == 2

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(wa, "search", refuse)
    assert experiment.run(settings, tmp_path, lambda *step: None).data["tasks"] == result.data["tasks"]


def test_trials_depend_on_what_their_task_needs_only():
    first = weight_agnostic.trials(TINY)
    other = weight_agnostic.trials(replace(TINY, size=5, steps=6))
    assert [t.config for t in first["swing-up"]] == [t.config for t in other["swing-up"]]
    assert all(a.config != b.config for a, b in zip(first["digits"], other["digits"], strict=True))
    tuned = weight_agnostic.trials(replace(TINY, steps=6))["digits"]
    assert tuned[0].needs[0].config == first["digits"][0].needs[0].config  # the search is kept


def test_quick_and_full_plans():
    quick = weight_agnostic.plan(catalogue.Settings(quick=True, seeds=3))
    full = weight_agnostic.plan(catalogue.Settings())
    assert (quick.seeds, full.seeds) == (3, 5)
    told = json.loads(json.dumps(weight_agnostic.config(catalogue.Settings())))
    assert told["search"].keys() == {"swing-up", "digits"}
