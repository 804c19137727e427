# SPDX-License-Identifier: Apache-2.0
"""early-exit: what a trial keeps, that tables and figures need the JSON only; a second run has nothing to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slimtorch.data import Digits, digits
from slimtorch.experiments import early_exit
from slimtorch.experiments.catalogue import Settings, find

SIZES = {"exits": 3, "base": 1, "step": 1, "width": 4, "growth": 2, "head": 8, "stride": 2}


@pytest.fixture(scope="module")
def data() -> Digits:
    return digits(200, 50, 50)


def test_the_experiment(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"branchynet-input": (0.5, 0.5, 1.0)}
    tiny = early_exit.Plan(
        2, {"branchynet": 0.6, "branchynet-input": 1.5}, SIZES, rate=3e-3,
        weights={"branchynet": (0.5, 1.0), **weights}, budgets=(0.1, 0.9), images=4, samples=1, each=2, together=10,
    )  # fmt: skip
    monkeypatch.setattr(early_exit, "plan", lambda settings: tiny)
    monkeypatch.setattr(early_exit, "load", lambda name, quick: (data, "a few digits"))
    seen: list[tuple[str, int, int]] = []
    result = early_exit.run(Settings(jobs=1), tmp_path, lambda *told: seen.append(told))
    assert seen[0][1] == 0
    found = json.loads(json.dumps(result.data))
    seen.clear()
    again = early_exit.run(Settings(jobs=1), tmp_path, lambda *told: seen.append(told))
    assert seen[0][1] == seen[0][2]  # nothing left to do, not even a time
    assert json.loads(json.dumps(again.data)) == found
    assert [str(table) for table in early_exit.tables(found)] == [str(table) for table in result.tables]
    assert all(len(line) <= 100 for table in result.tables for line in str(table).splitlines())
    for _, _, figure in early_exit.figures(found):
        figure.draw_without_rendering()
    assert [name for name, _, _ in early_exit.figures(found)] == ["early-exit", "early-exit-cost"]
    assert "small scale" in result.lead

    for network, part in found["networks"].items():
        exits = len(part["points"])
        assert part["points"][-1] == "last"
        for leaving, macs in zip(part["chosen"]["leaving"], part["chosen"]["macs"], strict=True):
            assert sum(leaving) == pytest.approx(1)
            # samples run twice come on top
            spent = sum(share * cost for share, cost in zip(leaving, part["cost"], strict=True))
            assert spent * 0.999 <= macs <= part["cost"][-1] * 2
        assert all(len(times["chosen"]) == 2 for times in (part["times"]["1"], part["times"]["256"]))
        assert part["times"]["changed"] == [0] * len(early_exit.SIZES)
        assert ("criteria" in part) == (exits > 2)
        first, last = part["curve"][0], part["curve"][1]
        assert sum(first["macs"]) <= sum(last["macs"]) * 1.5, network

    config = next(t.config for (name, seed), t in early_exit.trials(tiny).items() if (name, seed) == ("branchynet", 0))
    dense = early_exit.train_dense({**config, "epochs": 0.6}, data, ())
    record = early_exit.train_exits(config, data, [dense])
    model = early_exit.restore("branchynet", config, record)
    run = model.run(data.test.images)
    assert float((run.logits.argmax(1) == data.test.labels).float().mean()) == record.result["chosen"]["test"]
    assert model.criterion.thresholds == pytest.approx(record.result["chosen"]["thresholds"])
    assert record.result["exits"] == [row[0] for row in found["networks"]["branchynet"]["exits"]]
    first = 20 * 25 * 24 * 24 + 20 * 12 * 12 * 10
    assert record.result["cost"] == [first, first + 1_600_000 + 400_000 + 5_000]


def test_frozen_segments_are_the_network(data: Digits) -> None:
    torch.manual_seed(0)
    for network in ("branchynet-input", "msdnet"):
        model = early_exit.build(network, {"msdnet": SIZES}).eval()
        x = data.test.images[:20]
        with torch.inference_mode():
            model.criterion.cuts.fill_(-torch.log(torch.tensor(2.2)).item())
            call = model.with_segments(early_exit.frozen_segments(model, x))
            torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)


def test_known_by_its_name() -> None:
    assert find("early-exit") is early_exit.EXPERIMENT
    quick, full = (early_exit.EXPERIMENT.config(Settings(quick=quick)) for quick in (True, False))
    assert quick["seeds"] == 2
    assert full["seeds"] >= 5
