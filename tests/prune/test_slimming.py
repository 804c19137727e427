# SPDX-License-Identifier: Apache-2.0
"""Network slimming: the loss term by hand, and one threshold over all layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from slimtorch.prune import Neurons, SlimmingPenalty, prune_

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    model[1].weight.data = torch.tensor([0.9, -0.8, 0.001, 0.7, 0.6, 0.5])
    model[7].weight.data = torch.tensor([0.01, 0.02, 0.0, 0.04, 0.05, 2.0, -0.06, 0.07])
    return model


def test_value_and_subgradient() -> None:
    model = network()
    penalty = SlimmingPenalty(model, {"1": 0.5, "*": 0.25})
    assert penalty.layers == ["1", "7"]  # the one without scales has nothing to penalise
    value = penalty()
    assert value.item() == pytest.approx(0.5 * 3.501 + 0.25 * 2.25, rel=1e-6)
    value.backward()
    assert model[1].weight.grad.tolist() == [0.5, -0.5, 0.5, 0.5, 0.5, 0.5]
    assert model[7].weight.grad.tolist() == [0.25, 0.25, 0.0, 0.25, 0.25, 0.25, -0.25, 0.25]
    assert all(p.grad is None for n, p in model.named_parameters() if n not in ("1.weight", "7.weight"))


def test_drives_scales_down_that_the_task_does_not_need() -> None:
    model = network()
    with torch.no_grad():
        for norm in (model[1], model[7]):
            norm.weight.fill_(0.5)
        model[3].weight[:, 3:] = 0  # nothing reads the last channels of the first layer
    model[3].requires_grad_(False)
    penalty = SlimmingPenalty(model, 0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    target = torch.arange(4) % 5
    for _ in range(100):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(X), target) + penalty()).backward()
        optimizer.step()
    assert model[1].weight[3:].abs().max() < 0.01 < model[1].weight[:3].abs().max()
    report = penalty.report(0.01)
    assert report.layers[0].small >= 3
    assert "6" in str(report)
    assert report.to_dict()["layers"][0]["scales"] == 6


def test_removal_by_one_threshold() -> None:
    model = network()
    # of 14 scales the 8 smallest are 7 of the last layer and one of the first
    prune_(
        model,
        Neurons(8 / 14, "batchnorm", scope="global", normalize=False, ignore=["3"]),
        example_inputs=X,
    )
    assert model[0].out_channels == 5
    assert model[1].weight.tolist() == pytest.approx([0.9, -0.8, 0.7, 0.6, 0.5])
    assert model[6].out_channels == 1
    assert model[7].weight.tolist() == [2.0]
    # another scale of one layer: 0 of the last, all but the best of the first, then the next of the last
    other = network()
    other[7].weight.data *= 100
    third = copy.deepcopy(other)
    prune_(other, Neurons(7 / 14, "batchnorm", scope="global", normalize=False, ignore=["3"]), example_inputs=X)
    assert other[1].weight.tolist() == pytest.approx([0.9])
    assert other[7].weight.tolist() == pytest.approx([2.0, 4.0, 5.0, 200.0, -6.0, 7.0])
    # each by its own mean: the large layer's one large scale makes the others small
    prune_(third, Neurons(7 / 14, "batchnorm", scope="global", ignore=["3"]), example_inputs=X)
    assert third[1].weight.tolist() == pytest.approx([0.9, -0.8, 0.7, 0.6, 0.5])
    assert third[7].weight.tolist() == pytest.approx([200.0, 7.0])


def test_bad_input() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"strength: expected a finite number above 0, got 0"):
        SlimmingPenalty(model, 0)
    with pytest.raises(ValueError, match="strength"):
        SlimmingPenalty(model, {"1": float("nan")})
    with pytest.raises(TypeError, match="strength"):
        SlimmingPenalty(model, "strong")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matches no"):
        SlimmingPenalty(model, {"0": 1e-4})
    with pytest.raises(ValueError, match="got none"):
        SlimmingPenalty(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="threshold"):
        SlimmingPenalty(model).report(-1)
    model[7].weight.data[2] = float("nan")
    with pytest.raises(ValueError, match=r"batch norm '7' are no longer finite"):
        SlimmingPenalty(model)()
