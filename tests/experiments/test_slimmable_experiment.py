# SPDX-License-Identifier: Apache-2.0
"""slimmable: what its trials do, and that tables and figures need the JSON only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slimtorch.data import Digits, digits
from slimtorch.dynamic import at_width, export
from slimtorch.experiments import slimmable
from slimtorch.experiments.catalogue import Settings, find
from slimtorch.experiments.loop import evaluate
from slimtorch.measure import count_macs, count_parameters

TINY = slimmable.Plan(
    seeds=2, epochs={"convnet": 1}, methods={"convnet": ("slimmable", "universal")}, widths=(0.25, 0.5, 1.0),
    others=(0.4,), statistics=60, samples=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Digits:
    return digits(120, 30, 50)


def test_the_experiment(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slimmable, "plan", lambda settings: TINY)
    monkeypatch.setattr(slimmable, "load", lambda name, quick: (data, "a few digits"))
    monkeypatch.setattr(slimmable, "BATCHES", (1, 4))
    monkeypatch.setattr(slimmable, "dense_rivals", lambda model, x: {"torch": lambda: model(x)})  # others take seconds
    result = slimmable.run(Settings(jobs=1), tmp_path, lambda *told: None)
    found = json.loads(json.dumps(result.data))
    seen: list[tuple[str, int, int]] = []
    again = slimmable.run(Settings(jobs=1), tmp_path, lambda *told: seen.append(told))
    assert seen == [("train", 10, 10)]  # neither trained nor timed again
    assert again.data == result.data
    assert [str(t) for t in slimmable.tables(found)] == [str(t) for t in result.tables]
    assert all(len(line) <= 100 for table in result.tables for line in str(table).splitlines())
    for name, _, figure in slimmable.figures(found):
        assert name == "slimmable-convnet"
        figure.draw_without_rendering()
    assert "small scale" in result.lead

    own = found["networks"]["convnet"]
    assert set(own["methods"]) == {"alone", "cut", "slimmable", "universal"}
    for rows in own["methods"].values():
        assert [len(seeds) for seeds in rows["test"]] == [2, 2, 2]
    assert [len(seeds) for seeds in own["methods"]["universal"]["others"]] == [2]
    plain = [slimmable.network("convnet", width) for width in TINY.widths]
    assert own["parameters"] == [count_parameters(model)[0] for model in plain]
    assert own["macs"] == [count_macs(model, data.test.images[:1])[1] for model in plain]
    assert own["parameters"][-1] < own["parameters_together"] < sum(own["parameters"])  # one set, norms apart
    for times in own["times"].values():
        assert set(times) == {"0.25", "0.5", "1"}
        assert all(set(ways) == {"torch", "switched"} and min(ways.values()) > 0 for ways in times.values())


def test_a_trial_is_the_network_that_it_says(data: Digits) -> None:
    config = slimmable.trials(TINY)["convnet", "slimmable", 1].config
    record = slimmable.train_together(config, data, ())
    model = slimmable.together(config, data).eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in record.arrays.items()})
    for width, row in zip(TINY.widths, record.result["widths"], strict=True):
        with at_width(model, width):
            assert evaluate(model, data.test)[1] == row["test"]
        assert evaluate(export(model, width), data.test)[1] == row["test"]
    assert slimmable.train_together(config, data, ()).result == record.result
    other = slimmable.train_together({**config, "seed": 0}, data, ())
    assert any((other.arrays[key] != value).any() for key, value in record.arrays.items())


def test_known_by_its_name() -> None:
    assert find("slimmable") is slimmable.EXPERIMENT
    full, quick = (slimmable.plan(Settings(quick=quick)) for quick in (False, True))
    assert full.seeds == 5
    assert len(full.widths) == 4
    assert quick.seeds < full.seeds
    assert slimmable.plan(Settings(seeds=1)).seeds == 1
