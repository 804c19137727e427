# SPDX-License-Identifier: Apache-2.0
"""binary-connect, binary-net and xnor-net on a hundred digits: whole, resumed, and what they promise."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from slimtorch.data import digits
from slimtorch.experiments import binary_connect, binary_net, binary_training, catalogue, xnor_net
from slimtorch.experiments.binary_training import Plan, Variant, packed_copy, restore
from slimtorch.nn import BinaryConv2d, BinaryLinear
from slimtorch.quantize import BinaryConnect, XnorNet, binarize_

ONE = catalogue.Settings(jobs=1)
MODULES = {"binary-connect": binary_connect, "binary-net": binary_net, "xnor-net": xnor_net}


@pytest.fixture
def small(monkeypatch):
    data = digits(100, 50, 100)
    for module in MODULES.values():
        monkeypatch.setattr(module, "load", lambda name, quick: (data, "a hundred digits"))
    return data


@pytest.mark.parametrize("name", MODULES)
def test_the_experiment_runs_and_resumes(name, small, tmp_path, monkeypatch):
    stages: list[str] = []
    experiment = catalogue.find(name)
    assert experiment.name == name
    settings = catalogue.Settings(quick=True, seeds=2, jobs=1)
    result = experiment.run(settings, tmp_path, lambda stage, done, total: stages.append(stage))
    assert stages[0] == "train"
    first = result.tables[0]
    assert len(first.rows) == {"binary-connect": 4, "binary-net": 2, "xnor-net": 3}[name]
    assert all("±" in str(row[1]) for row in first.rows)
    text = json.dumps(result.data)
    assert len(text) < 60_000
    assert all(0 <= e <= 1 for row in result.data["rows"].values() for e in row["test_error"])
    if name != "binary-connect":
        pairs = result.data["predictions_equal"]
        for same, total in [pairs] if isinstance(pairs, list) else pairs.values():
            assert total == 200
            assert same >= 198  # the two forms round differently: a sign at a batch-norm's zero may differ
        assert all(row[-1].endswith("x") for row in result.tables[1].rows)
    for _, caption, figure in result.figures:
        assert caption
        assert figure.axes

    def refuse(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(binary_training, "train", refuse)
    again = experiment.run(settings, tmp_path, lambda stage, done, total: None)
    assert again.data["rows"] == result.data["rows"]


def test_a_unit_that_trains_otherwise_is_another_unit(small, tmp_path):
    plan = Plan(epochs=1, seeds=1)

    def unit(variant: Variant, plan: Plan = plan) -> int:
        binary_training.train_all("e", {"v": variant}, plan, small, tmp_path, ONE, lambda stage, done, total: None)
        return len(list((tmp_path / "trials").iterdir()))

    def narrow(shape: tuple[int, ...]) -> nn.Module:
        return binary_connect.mlp(shape, 8)

    assert unit(Variant("a", narrow, None)) == 1
    assert unit(Variant("renamed", narrow, None)) == 1
    assert unit(Variant("a", narrow, BinaryConnect())) == 2
    assert unit(Variant("a", narrow, BinaryConnect(stochastic=True))) == 3
    assert unit(Variant("a", narrow, None, rate=1e-2)) == 4
    assert unit(Variant("a", lambda shape: binary_connect.mlp(shape, 9), None)) == 5
    assert unit(Variant("a", narrow, None), Plan(epochs=2, seeds=1)) == 6
    assert unit(Variant("a", narrow, None), Plan(epochs=1, seeds=2)) == 7  # the first seed is there already


def test_restored_networks_are_the_trained_ones(small):
    variant = xnor_net.variants()["xnor"]
    model, record = binary_training.train(variant, Plan(epochs=1, seeds=1, batch_size=20), small, 0)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    copy = restore(variant, type(record)(record.result, state), (1, 28, 28))
    packed = packed_copy(copy)
    with torch.no_grad():
        assert torch.equal(copy(small.test.images), model.eval()(small.test.images))
        assert torch.equal(packed(small.test.images), model(small.test.images))
    assert sum(isinstance(m, (BinaryConv2d, BinaryLinear)) for m in packed.modules()) == 2


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_networks_take_digits_and_colour_images(shape):
    x = torch.randn(2, *shape)
    for build in (
        xnor_net.real_network,
        xnor_net.xnor_network,
        lambda s: binary_connect.mlp(s, 16, dropout=True),
        lambda s: binary_net.binary_mlp(s, 16),
    ):
        assert build(shape)(x).shape == (2, 10)


def test_order_of_the_xnor_network():
    """No ReLU or pooling between a batch-norm and the sign of the layer after it."""
    model = xnor_net.xnor_network((1, 28, 28))
    binarize_(model, XnorNet())
    modules = list(model)
    binary = [i for i, m in enumerate(modules) if getattr(m, "binarize_input", False)]
    assert len(binary) == 2
    assert all(isinstance(modules[i - 1], (nn.BatchNorm2d, nn.BatchNorm1d)) for i in binary)
