# SPDX-License-Identifier: Apache-2.0
"""separable: what a trial does, and that tables and figures need the JSON only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimtorch.data import Digits, digits
from slimtorch.design import DepthwiseSeparableConv2d
from slimtorch.experiments import separable
from slimtorch.experiments.catalogue import Settings, find
from slimtorch.experiments.loop import evaluate
from slimtorch.experiments.store import Record


@pytest.fixture(scope="module")
def data() -> Digits:
    return digits(200, 50, 50)


def tiny_network(channels: int, width: int) -> nn.Module:
    """A first convolution that stays, and two that become separable."""
    layers: list[nn.Module] = [nn.AvgPool2d(4)]
    for c_in in (channels, width, width):
        layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(separable.BUILD, "resnet", tiny_network)
        yield


real = dict(separable.BUILD)
BASE = {"version": 0, "network": "resnet", "width": 8, "channels": 1, "seed": 0, "batch_size": 50, "rate": 2e-3}
START = {**BASE, "kernels": 1, "start": "fitted"}
FITTED = {**BASE, "steps": 3, "kernels": 1, "temperature": 4.0, "soft": 0.9}


@pytest.fixture(scope="module")
def dense(data: Digits, small: None) -> Record:
    return separable.train_dense({**BASE, "steps": 25}, data, ())


def test_the_dense_network_comes_back(data: Digits, dense: Record) -> None:
    model = separable.restore(BASE, dense).eval()
    assert evaluate(model, data.test)[1] == dense.result["test"]
    assert torch.allclose(model(data.train.images[:9]), torch.from_numpy(dense.arrays["logits"][:9]), atol=1e-4)


def test_a_trial_separates_and_trains_on(data: Digits, dense: Record) -> None:
    start = separable.separate(START, data, (dense,))
    found = separable.train_separable(FITTED, data, (start, dense))
    model = separable.restore(BASE, found, 1)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DepthwiseSeparableConv2d)}
    assert len(layers) == 2
    assert type(model[1]) is nn.Conv2d  # type: ignore[index]  # the first one stays
    assert evaluate(model, data.test)[1] == found.result["test"]
    assert found.result["macs"] < 0.6 * dense.result["macs"]
    assert found.result["before"] == start.result["test"]
    again = separable.train_separable(FITTED, data, (start, dense))
    assert again.result == found.result
    # the start: fitted to the activations is nearer to the dense network than the weights alone, and random is far
    x, goal = data.test.images, separable.restore(BASE, dense).eval()(data.test.images)
    off = {}
    for start, given in (("weights", None), ("fitted", data)):
        model = separable.restore(BASE, dense)
        separable.separated_(model, 1, given)
        off[start] = float(F.mse_loss(model.eval()(x), goal).detach())
    assert off["fitted"] < off["weights"]


def test_soft_targets_belong_to_their_images(data: Digits, dense: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are in another order than the teacher's logits: each image must meet its own."""
    seen: list[float] = []
    student = separable.restore(BASE, dense)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(student, "forward", lambda x: given.append(x) or nn.Sequential.forward(student, x))

    def look(output: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        own = separable.restore(BASE, dense).eval()(given[-1])
        seen.append(float((own - teacher).abs().max().detach()))
        assert temperature == 4.0
        return output.sum()

    monkeypatch.setattr(separable, "soft_target_loss", look)
    config = {key: value for key, value in FITTED.items() if key != "kernels"}
    separable._fit(student, data, config, 3, dense)
    assert len(seen) == 3
    assert max(seen) < 1e-3


def test_experiment(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = separable.Plan({"resnet": 8}, seeds=2, epochs=1, tune_epochs=0.5, samples=2, wide={"resnet": 16})
    monkeypatch.setattr(separable, "plan", lambda settings: tiny)
    monkeypatch.setattr(separable, "load", lambda name, quick: (data, "a few digits"))
    told: list[tuple[str, int, int]] = []
    result = separable.run(Settings(jobs=1), tmp_path, lambda *now: told.append(now))
    found: dict[str, Any] = json.loads(json.dumps(result.data))
    told.clear()
    again = separable.run(Settings(jobs=1), tmp_path, lambda *now: told.append(now))
    assert told == [("train", 16, 16)]  # nothing is left to train or to time
    assert again.data["networks"] == result.data["networks"]
    assert [str(t) for t in separable.tables(found)] == [str(t) for t in result.tables]
    assert all(len(line) <= 100 for table in result.tables for line in str(table).splitlines())
    names = [name for name, _, _ in separable.figures(found)]
    assert names == ["separable", "separable-recovery"]
    for _, _, figure in separable.figures(found):
        figure.draw_without_rendering()
    assert "small scale" in result.lead
    part = found["networks"]["resnet"]
    assert set(part["rows"]) == {"dense", "trained on", *separable.VARIANTS}
    for times in part["time"].values():
        for key in ("dense", "1 kernel", "2 kernels", "where faster"):
            assert 0 < times[key]["seconds"] <= times[key]["torch"]
        assert times["layers"] == 2
    wide = found["wide"]["resnet"]
    assert list(wide["rows"]) == ["dense", "1 kernel", "2 kernels"]
    dense, one, two = (row["macs"] for row in wide["rows"].values())
    assert 4 * one < dense
    assert one < two < dense
    assert set(wide["time"]["16"]) == {"statistic", *wide["rows"]}
    assert "not trained" in str(result.tables[-1])
    # the networks of the real runs separate as they should
    for network, count in (("vgg", 12), ("resnet", 18)):
        model = real[network](3, 4)
        separable.separated_(model, 2)
        assert sum(isinstance(m, DepthwiseSeparableConv2d) for m in model.modules()) == count
        assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert find("separable") is separable.EXPERIMENT
    assert separable.EXPERIMENT.config(Settings(quick=True))
