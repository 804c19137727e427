# SPDX-License-Identifier: Apache-2.0
"""lottery-ticket on a hundred digits: its trials against `lottery.search`, whole, resumed, and its metrics by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slimtorch.data import Digits, digits
from slimtorch.experiments import catalogue, lottery_ticket
from slimtorch.experiments.catalogue import Settings
from slimtorch.experiments.loop import fit
from slimtorch.experiments.lottery_ticket import Plan, gather, network, plan, tables, trials_of
from slimtorch.experiments.store import Record
from slimtorch.experiments.trials import run_all
from slimtorch.measure import threads_of_torch
from slimtorch.prune.lottery import rates_of, search
from slimtorch.report import MAX_WIDTH

TINY = Plan(seeds=2, steps=6, rounds=2, controls=(2,), rewind=2, late_rounds=2, every=2, batch_size=20, shown=(0, 2))


@pytest.fixture(scope="module")
def data() -> Digits:
    return digits(100, 50, 100)


@pytest.fixture(scope="module")
def records(data, tmp_path_factory) -> dict[str, Record]:
    out = tmp_path_factory.mktemp("lottery")
    return run_all(trials_of(TINY), data, out, Settings(jobs=1), lambda stage, done, total: None)


def searched(data: Digits, rewind: int) -> list[Any]:
    """What `lottery.search` gives, whose code prunes and rewinds by itself, for the second seed."""

    def train(model: nn.Module, start: int, after_step: Callable[[], None]) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=TINY.rate, fused=True)
        fit(model, data, optimizer, steps=6, batch_size=20, seed=1, start=start, after_step=after_step)

    model = network(1, (1, 28, 28))
    with threads_of_torch(1):  # as trials have it: more of them add in another order
        return list(search(model, train, rounds=3, rates=rates_of(model), rewind=rewind))


@pytest.mark.parametrize(("kind", "rewind"), [("ticket", 0), ("late", 2)])
def test_a_chain_of_trials_is_a_search(data, records, kind, rewind):
    tickets = searched(data, rewind)
    for index in (0, 1, 2):
        record = records[f"{kind}-seed1-round{index:02d}" if index else "dense-seed1"]
        assert record.result["remaining"] == tickets[index].remaining
        for name, mask in tickets[index + 1].masks.items():
            bits = np.unpackbits(record.arrays[f"next:{name}"], count=mask.numel())
            assert torch.equal(torch.from_numpy(bits.astype(bool)).view(mask.shape), mask)
    if rewind:
        for key, value in tickets[1].start.items():
            assert torch.equal(torch.from_numpy(records["dense-seed1"].arrays[f"early:{key}"]), value)
        assert records["late-seed1-round02"].result["steps"] == [2, 4, 6]
    else:
        assert records["ticket-seed1-round02"].result["steps"] == [0, 2, 4, 6]


def test_controls_differ_from_the_ticket_in_one_thing(records):
    ticket, anew, random = (records[f"{k}-seed0-round02"].result for k in ("ticket", "reinit", "random"))
    assert ticket["remaining"] == anew["remaining"] == random["remaining"] == pytest.approx(0.64, abs=0.002)
    assert len({ticket["loss"][0], anew["loss"][0], random["loss"][0]}) == 3
    assert records["reinit-seed1-round02"].result["loss"] != anew["loss"]


def test_weights_start_as_glorot_has_it():
    model = network(0, (1, 28, 28))
    assert model.fc1.weight.std().item() == pytest.approx((2 / (784 + 300)) ** 0.5, rel=0.01)
    assert not any(bool(layer.bias.any()) for layer in (model.fc1, model.fc2, model.fc3))
    assert network(0, (3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_metrics_by_hand():
    def record(loss: list[float]) -> Record:
        stop = 10 * loss.index(min(loss))
        steps = [10 * index for index in range(len(loss))]
        return Record({
            "remaining": 0.2, "stop": stop, "stop_loss": min(loss), "stop_accuracy": 0.9, "end_accuracy": 0.8,
            "steps": steps, "loss": loss, "accuracy": [0.5] * len(loss),
        })  # fmt: skip

    chosen = Plan(seeds=2, steps=30, rounds=7, controls=(7,), rewind=2, late_rounds=0, shown=(0, 7))
    given = {"dense-seed0": record([3.0, 2.0, 1.0, 1.5]), "dense-seed1": record([3.0, 2.0, 1.2, 1.1])}
    for seed, loss in enumerate(([3.0, 0.9, 0.8, 1.5], [3.0, 1.3, 1.2, 1.4])):
        given |= {f"ticket-seed{seed}-round{index:02d}": record(loss) for index in range(1, 8)}
        given |= {f"{kind}-seed{seed}-round07": record([3.0, 2.5, 2.4, 1.4]) for kind in ("reinit", "random")}
    found = {"data": "made up", "plan": lottery_ticket.asdict(chosen), **gather(chosen, given)}
    points = {(p["kind"], p["round"]): p for p in found["points"]}
    assert points["dense", 0]["reach"] == points["dense", 0]["stop"] == [20, 30]
    assert (points["ticket", 7]["stop"], points["ticket", 7]["reach"]) == ([20, 20], [10, None])
    assert points["reinit", 7]["reach"] == [None, None]
    assert points["ticket", 7]["near"] == [10, 20]
    main, paired, levels = tables(found)
    by_name = {row[1]: row for row in main.rows if row[0] == "20.0"}
    assert by_name["ticket"][2:] == ["20 ± 0", "1.000", "90.00 ± 0.00", "80.00 ± 0.00"]
    differences = {row[1]: row[2:] for row in paired.rows}
    assert differences["dense"] == ["-5 ± 7", "1 of 2", "1.25x", "+0.00 ± 0.00"]
    assert differences["drawn anew"] == ["-10 ± 0", "2 of 2", "1.50x", "+0.00 ± 0.00"]
    reached = {row[1]: row[2:] for row in levels.rows}
    assert reached["dense"] == ["25 ± 7", "2 of 2", None, "20 ± 0", "2 of 2", None]
    assert reached["ticket"] == [">= 20 ± 14", "1 of 2", "1 of 2", "15 ± 7", "2 of 2", "1 of 2"]  # never counts as 30
    assert reached["drawn anew"] == ["never", "0 of 2", "0 of 2", "never", "0 of 2", "0 of 2"]


def test_the_experiment_runs_and_resumes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(lottery_ticket, "load", lambda name, quick: (data, "a hundred digits"))
    monkeypatch.setattr(lottery_ticket, "plan", lambda settings: TINY)
    experiment = catalogue.find("lottery-ticket")
    assert experiment.config(Settings())["rounds"] == 2
    result = experiment.run(Settings(jobs=1), tmp_path, lambda stage, done, total: None)
    content = json.loads(json.dumps(result.data))
    assert [str(t) for t in tables(content)] == [str(t) for t in result.tables]
    assert all(len(line) <= MAX_WIDTH for table in result.tables for line in str(table).splitlines())
    assert {p["kind"] for p in content["points"]} == {"dense", "ticket", "late", "reinit", "random"}
    drawn = lottery_ticket.figures(content)
    assert [len(figure.axes) for _, _, figure in drawn] == [3, 2]
    calls: list[int] = []
    again = experiment.run(Settings(jobs=1), tmp_path, lambda stage, done, total: calls.append(done))
    assert calls == [14]  # all there: nothing is trained
    assert again.data["points"] == result.data["points"]


def test_plans():
    full, quick = plan(Settings()), plan(Settings(quick=True))
    assert full.seeds >= 5
    assert {7, 9} <= set(full.controls) & set(quick.controls)
    assert max(full.controls) <= full.rounds
    assert plan(Settings(data="mnist")).steps == 50_000
    assert plan(Settings(seeds=3)).seeds == 3
    names = [trial.name for trial in trials_of(full)]
    assert len(names) == len(set(names)) == full.seeds * (1 + 17 + 2 * 7 + 10)
