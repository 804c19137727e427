# SPDX-License-Identifier: Apache-2.0
"""pipeline: branches do what their names say, train equally long, and tables and figures need the JSON only."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimtorch as slim
from slimtorch import recipe
from slimtorch.data import Digits, digits
from slimtorch.dynamic import EarlyExit
from slimtorch.experiments import pipeline
from slimtorch.experiments.catalogue import Settings, find
from slimtorch.nn import PackedLayer
from slimtorch.recipe import Calibrate, Distill, Train

TINY = pipeline.Plan(2, 0.2, epochs=(0.2, 0.2, 0.2), hidden=(3, 4, 8), batch_size=50)


@pytest.fixture(scope="module")
def data() -> Digits:
    return digits(100, 100, 100)


def test_every_branch_trains_for_equally_many_epochs() -> None:
    for arm in pipeline.ARMS:
        phases = pipeline.phases_of(arm, TINY)
        assert sum(phase.epochs for phase in phases if isinstance(phase, Train)) == pytest.approx(0.6)
        taught = [isinstance(phase, Distill) for phase in phases if isinstance(phase, Train)]
        assert set(taught) == {arm in ("distilled", "combined")}
        assert isinstance(phases[-1], Calibrate) == (arm in ("exits", "combined"))


def test_run(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "plan", lambda settings: TINY)
    monkeypatch.setattr(pipeline, "load", lambda name, quick: (data, "a few digits"))
    monkeypatch.setattr(pipeline, "BATCHES", (1, 3))
    monkeypatch.setattr(pipeline, "EFFORT", {True: (0.02, 1)})
    monkeypatch.setattr(recipe.run, "SINGLES", 4)
    # freezing has a test of its own, and takes long
    monkeypatch.setattr(pipeline, "_ways", lambda network, x, dense: {"torch": network} if dense else {})
    seen: list[tuple[str, int, int]] = []
    settings = Settings(jobs=1, quick=True)
    result = find("pipeline").run(settings, tmp_path, lambda *told: seen.append(told))
    found: dict[str, Any] = json.loads(json.dumps(result.data))
    assert ("train", 0, 16) in seen

    rows = found["rows"]
    assert set(rows) == {"dense", *pipeline.ARMS}
    assert all(len(phase["test"]) == 2 for phases in rows.values() for phase in phases)
    sparse, dense, small = (rows[arm][-1]["nonzero"][0] for arm in ("pruned", "longer", "smaller"))
    assert sparse < 0.5 * dense
    assert small < 0.6 * dense
    assert rows["clustered"][-1]["bytes_file"][0] < 0.5 * rows["longer"][-1]["bytes_file"][0]
    left = {phase["name"]: phase["nonzero"][0] for phase in rows["combined"]}
    assert left["weights pruned"] < 0.5 * left["distilled"]
    assert set(found["sizes"]) == set(found["packed"]["3"]) == set(pipeline.ARMS) - {"longer"}

    for batch in ("1", "3"):
        names = set(found["times"][batch])
        assert {"pruned", "exits", "combined", "dense:torch", "phase:weights shared"} <= names
        assert all(low <= middle <= high for middle, low, high in found["times"][batch].values())
    assert [str(t) for t in pipeline.tables(found)] == [str(t) for t in result.tables]
    assert all(len(line) <= 100 for table in result.tables for line in str(table).splitlines())
    assert len(result.tables[0].rows) == 1 + len(pipeline.ARMS)
    figures = pipeline.figures(found)
    assert [name for name, _, _ in figures] == ["pipeline", "pipeline-phases"]
    for _, _, figure in figures:
        figure.draw_without_rendering()
    assert "small scale" in result.lead

    seen.clear()
    again = pipeline.run(settings, tmp_path, lambda *told: seen.append(told))
    assert seen == [("train", 16, 16)]  # nothing is trained, packed or timed
    assert again.data == result.data


def test_frozen_segments_answer_alike(data: Digits) -> None:
    torch.manual_seed(0)
    network = slim.models.LeNet5((3, 4, 8)).eval()
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 144, 10))
    exits = EarlyExit(list(network.named_children()), {"pool1": head}, slim.dynamic.MaxProbability(0.15)).eval()
    x = data.test.images[:7]
    call = pipeline._frozen_segments(exits, x)
    assert call is not None
    with torch.inference_mode():
        assert 0 < int((exits.run(x).exits == 0).sum()) < 7  # both ways are taken
        torch.testing.assert_close(call(x), exits(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(call(x[2:3]), exits(x[2:3]), rtol=1e-4, atol=1e-5)


def test_decoded_networks_are_dense_and_answer_the_same() -> None:
    torch.manual_seed(0)
    parts = list(slim.models.LeNet5((3, 4, 8)).named_children())
    network = EarlyExit(parts, {"pool1": nn.Sequential(nn.Flatten(), nn.Linear(432, 10))}).eval()
    slim.cluster_(network, slim.quantize.KMeans(bits=3))
    before = copy.deepcopy(network)
    made = pipeline._decoded(network)
    assert not any(isinstance(module, PackedLayer) for module in made.modules())
    assert sum(isinstance(module, PackedLayer) for module in network.modules()) == 5
    x = torch.randn(20, 1, 28, 28)
    for one, two, three in zip(made.all_exits(x), network.all_exits(x), before.all_exits(x), strict=True):
        torch.testing.assert_close(one, two)
        assert torch.equal(two, three)
