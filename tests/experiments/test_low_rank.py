# SPDX-License-Identifier: Apache-2.0
"""low-rank: what a trial does, and that tables and figures need the JSON only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from slimtorch.data import Digits, digits
from slimtorch.design import LowRankConv2d
from slimtorch.experiments import low_rank
from slimtorch.experiments.catalogue import Settings, find
from slimtorch.experiments.loop import evaluate


@pytest.fixture(scope="module")
def data() -> Digits:
    return digits(200, 50, 50)


def tiny_network(channels: int, width: int) -> nn.Module:
    """A first convolution that stays, and two that are factorized."""
    layers: list[nn.Module] = [nn.AvgPool2d(4)]
    for c_in in (channels, width, width):
        layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(low_rank.BUILD, "vgg", tiny_network)
        yield


PLAN = low_rank.Plan(
    {"lenet300": 20, "vgg": 8}, {"lenet300": (0.5, 0.1), "vgg": (0.5, 0.3)},
    {"lenet300": ("svd",), "vgg": ("channel", "cp")}, {"lenet300": 2, "vgg": 3}, {"lenet300": 1, "vgg": 1},
    seeds=1, samples=2, wide={"vgg": 16},
)  # fmt: skip


def test_a_trial_factorizes_and_trains_on(data: Digits) -> None:
    made = low_rank.trials(PLAN, 1, 200)
    assert ("vgg", "CP, 50 %", 0) not in made  # of CP the smallest level only
    dense = low_rank.train_dense(made["vgg", "dense", 0].config, data, ())
    model = low_rank.restore(made["vgg", "dense", 0].config, dense).eval()
    assert evaluate(model, data.test)[1] == dense.result["test"]
    config = made["vgg", "channel, 30 %", 0].config
    found = low_rank.train_factorized(config, data, (dense,))
    model = low_rank.restore(config, found)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankConv2d)}
    assert len(layers) == len(found.result["layers"]) == 2
    assert type(model[1]) is nn.Conv2d  # type: ignore[index]  # the first one stays
    assert evaluate(model, data.test)[1] == found.result["test"]
    assert found.result["macs"] < 0.45 * dense.result["macs"]
    assert low_rank.train_factorized(config, data, (dense,)).result == found.result
    # fitted to the outputs is nearer to the dense network than the weights alone
    x, off = data.train.images[:100], {}
    goal = low_rank.restore(config, dense).eval()(x)
    for fitted in (False, True):
        model = low_rank.restore(config, dense)
        low_rank.factorized_(model, config, data, fitted=fitted)
        off[fitted] = float((model.eval()(x) - goal).square().mean().detach())
    assert off[True] < off[False]


def test_run(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "plan", lambda settings: PLAN)
    monkeypatch.setattr(low_rank, "load", lambda name, quick: (data, "a few digits"))
    monkeypatch.setattr(low_rank, "BATCHES", (2,))
    result = low_rank.run(Settings(jobs=1), tmp_path, lambda *_: None)
    found = json.loads(json.dumps(result.data))
    told: list[tuple[str, int, int]] = []
    again = low_rank.run(Settings(jobs=1), tmp_path, lambda *now: told.append(now))
    assert told == [("train", 9, 9)]  # neither trained nor timed again
    assert again.data == result.data
    assert [str(t) for t in low_rank.tables(found)] == [str(t) for t in result.tables]
    assert all(len(line) <= 100 for table in result.tables for line in str(table).splitlines())
    for name, _, figure in low_rank.figures(found):
        assert name.startswith("low-rank")
        figure.draw_without_rendering()
    rows = found["networks"]["lenet300"]["rows"]
    assert rows["SVD, 10 %"]["parameters"][0] < rows["SVD, 50 %"]["parameters"][0] < rows["dense"]["parameters"][0]
    time = found["networks"]["vgg"]["time"]["2"]
    assert time["layers"] == 2
    assert all(time[row]["seconds"] > 0 for row in ("dense", "CP, 30 %", "where faster"))
    wide = found["wide"]["vgg"]
    assert set(wide["rows"]) == {"dense", "channel, 50 %", "channel, 30 %"}
    (dense,), (half,), (less,) = (wide["rows"][row]["macs"] for row in wide["rows"])
    assert less < 0.35 * dense < half < 0.55 * dense
    assert set(wide["time"]["2"]) == {"statistic", *wide["rows"]}
    assert "not trained" in str(result.tables[-1])
    assert "small scale" in result.lead


def test_plans() -> None:
    assert find("low-rank") is low_rank.EXPERIMENT
    full, quick = low_rank.plan(Settings()), low_rank.plan(Settings(quick=True, seeds=1))
    assert full.seeds == 5
    assert quick.seeds == 1
    assert torch.tensor(list(quick.epochs.values())).max() <= 8
