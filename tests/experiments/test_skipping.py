# SPDX-License-Identifier: Apache-2.0
"""skipping: what its trials do, and that tables and figures need the JSON only."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from slimtorch.data import Digits, digits
from slimtorch.dynamic import DynamicDepth
from slimtorch.experiments import skipping
from slimtorch.experiments.catalogue import Settings, find
from slimtorch.experiments.loop import evaluate
from slimtorch.measure import count_macs


@pytest.fixture(scope="module")
def data() -> Digits:
    return digits(120, 30, 50)


TINY = skipping.Plan(
    seeds=2, epochs=2, first=1, width=2, short=(3,), gates=((True, 0.3),), kept=(8, 7), statistics=60, samples=1,
)  # fmt: skip


def test_the_experiment(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipping, "plan", lambda settings: TINY)
    monkeypatch.setattr(skipping, "load", lambda name, quick: (data, "a few digits"))
    monkeypatch.setattr(skipping, "BATCHES", (1, 16))
    monkeypatch.setattr(skipping, "ONE_BY_ONE", 2)
    monkeypatch.setattr(skipping, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(skipping, "dense_rivals", lambda model, x: {"torch": lambda: model(x)})  # others take seconds
    monkeypatch.setattr(skipping, "_frozen", lambda segment, x: segment)
    seen: list[tuple[str, int, int]] = []
    result = skipping.run(Settings(jobs=1), tmp_path, lambda *told: seen.append(told))
    found = json.loads(json.dumps(result.data))
    seen.clear()
    again = skipping.run(Settings(jobs=1), tmp_path, lambda *told: seen.append(told))
    assert seen == [("train", len(skipping.trials(TINY)), len(skipping.trials(TINY)))]  # neither trained nor timed
    assert again.data == result.data
    assert [str(t) for t in skipping.tables(found)] == [str(t) for t in result.tables]
    assert all(len(line) <= 100 for table in result.tables for line in str(table).splitlines())
    names = [name for name, _, _ in skipping.figures(found)]
    assert names == ["skipping", "skipping-gates"]
    for _, _, figure in skipping.figures(found):
        figure.draw_without_rendering()
    assert "small scale" in result.lead

    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {
        "whole", "short3", "gates-each-0.3", "stochastic", "stochastic spread 8", "stochastic spread 7",
        "stochastic searched 8", "stochastic searched 7", "whole spread 8", "whole spread 7",
    }  # fmt: skip
    for row in rows.values():
        assert len(row["test"]) == 2
        assert row["macs"][0] <= rows["whole"]["macs"][0] * 1.01
    assert len(rows["gates-each-0.3"]["time"]["1"]) == 2  # each seed's own path
    for fewer, more in zip(rows["stochastic searched 7"]["kept"], rows["stochastic searched 8"]["kept"], strict=True):
        assert len(fewer) == 7
        assert set(fewer) < set(more)


def test_gates_begin_at_the_trained_network(data: Digits) -> None:
    made = skipping.trials(TINY)
    first = skipping.train(made["first", 1].config, data, ())
    config = {**made["gates-each-0.3", 1].config, "epochs": 0.01}  # one step
    record = skipping.train({**config, "rate": 0.0, "gate_rate": 0.0}, data, (first,))
    weights = {key.removeprefix("model."): value for key, value in record.arrays.items()}
    assert all((weights[key] == value).all() for key, value in first.arrays.items() if key.endswith("weight"))
    moved = skipping.train(config, data, (first,))
    assert any((moved.arrays[f"model.{key}"] != value).any() for key, value in first.arrays.items())
    assert any((moved.arrays[key] != record.arrays[key]).any() for key in record.arrays if key.startswith("gates."))

    model = skipping.gated(skipping.network(2), data, config)
    assert model.per_block
    assert model.target == 0.3
    model.load_state_dict(skipping._state(moved))
    assert evaluate(model, data.test)[1] == moved.result["test"]
    run = model.run(data.test.images)
    assert moved.result["macs"] == pytest.approx(float(run.macs.double().mean()))


def test_dropping_renews_the_statistics(data: Digits) -> None:
    made = skipping.trials(TINY)
    whole = skipping.train(made["whole", 0].config, data, ())
    record = skipping.drop({**made["drop-whole", 0].config, "kept": [9, 2]}, data, (whole,))
    nothing, two = record.result["levels"]
    assert nothing["raw"] == whole.result["test"]
    assert len(nothing["kept"]) == 9
    assert len(two["kept"]) == 2
    model = skipping.network(2)
    model.load_state_dict(skipping._state(whole))
    before = copy.deepcopy(model.state_dict())
    renewed = skipping.recalibrated(model, data.train, 60)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # a copy was changed
    x = model[0](data.train.images)
    convolution = model[1][0](x)  # type: ignore[index]
    halves = convolution.split(60)
    torch.testing.assert_close(renewed[1][1].running_mean, convolution.mean((0, 2, 3)))  # type: ignore[index]
    variance = torch.stack([half.var((0, 2, 3)) for half in halves]).mean(0)
    torch.testing.assert_close(renewed[1][1].running_var, variance)  # type: ignore[index]
    assert two["macs"] == count_macs(skipping.network(2, 2), (data.test.images[:1],))[1]


def test_timing_runs_what_was_trained(data: Digits) -> None:
    torch.manual_seed(0)
    config = {"target": 0.5, "penalty": 1.0, "per_block": True}
    model = skipping.gated(skipping.network(2), data, config).eval()
    for gate in model.gates:
        torch.nn.init.zeros_(gate.score.bias)  # type: ignore[arg-type,union-attr]
    assert isinstance(model, DynamicDepth)
    x = data.test.images[:20]
    run = model.run(x)
    assert run.ran.any()
    assert not run.ran.all()
    with torch.inference_mode():
        frozen = model.prepare(skipping._frozen, x[:2])
        torch.testing.assert_close(frozen(x), run.logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(frozen(x[:1]), run.logits[:1], rtol=1e-3, atol=1e-3)


def test_in_the_catalogue() -> None:
    experiment = find("skipping")
    assert experiment.name == "skipping"
    assert experiment.config(Settings())["seeds"] == 5
    assert experiment.config(Settings(quick=True, seeds=3))["seeds"] == 3
