# SPDX-License-Identifier: Apache-2.0
"""The recipe: its steps in order, its sizes, its report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimtorch as slim
from slimtorch.quantize import DeepCompression, KMeans, Stage
from slimtorch.quantize.deep_compression import coded_layers, dense_bytes, pruned_bytes

X = torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0, :4].sum((1, 2)) > 0).long()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 64), nn.ReLU(), nn.Linear(64, 2)
    )


def _train(model: nn.Module, steps: int = 30) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def _accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(X).argmax(1) == Y).float().mean())


RECIPE = DeepCompression(
    sparsity={"0": 0.3, "3": 0.9, "5": 0.5}, cluster={"0": KMeans(bits=6), "*": KMeans(bits=3)}, rounds=3
)


def test_the_recipe_runs_all_steps_with_the_users_own_loop(tmp_path: Path) -> None:
    model = _model()
    _train(model)
    stages: list[Stage] = []
    kept: list[float] = []

    def fit(model: nn.Module, stage: Stage) -> None:
        stages.append(stage)
        kept.append(float((model[3].weight != 0).float().mean()))  # type: ignore[index]
        _train(model)

    report = RECIPE.run(model, fit, _accuracy, path=tmp_path / "small.slim")
    retraining = [Stage("retrain", round, 3) for round in (1, 2, 3)]
    assert stages == [*retraining, Stage("fine-tune", 1, 3)]
    # every round removes the same share of what is left
    for round, share in enumerate(kept[:3], start=1):
        assert share == pytest.approx(0.1 ** (round / 3), abs=1e-3)
    assert [step.name for step in report.steps] == [
        "dense", "pruned", "P: retrained", "clustered", "P+Q: tables fine-tuned", "P+Q+H: file"
    ]  # fmt: skip
    sizes = [step.nbytes for step in report.steps]
    assert sizes == sorted(sizes, reverse=True)
    assert report.ratio == sizes[0] / sizes[-1] > 10
    assert report.steps[-1].accuracy == _accuracy(model)
    assert sizes[-1] == (tmp_path / "small.slim").stat().st_size
    loaded = slim.load(tmp_path / "small.slim", _model())
    assert torch.equal(loaded(X), model(X))
    assert isinstance(model[3], slim.nn.SparseCodebookLinear)
    assert model[0].bits == 6
    assert float((model[3].weight == 0).float().mean()) == pytest.approx(0.9, abs=1e-3)


def test_the_report_prints_the_tables_of_the_paper() -> None:
    model = _model()
    report = RECIPE.run(model, lambda model, stage: None)
    text = str(report)
    for words in ("P: retrained", "P+Q+H", "test error", "fillers counted", "together", "kept"):
        assert words in text
    data = report.to_dict()
    assert [layer["name"] for layer in data["layers"]] == ["0", "3", "5"]
    assert data["steps"][0]["accuracy"] is None
    layer = data["layers"][1]
    assert layer["weights"] == 8 * 36 * 64
    assert layer["kept"] == pytest.approx(0.1, abs=1e-3)
    assert layer["weight_bits_coded"] <= layer["weight_bits"] == 3
    assert layer["index_bits_coded"] < layer["index_bits"] == 8
    assert layer["coded_bytes"] < layer["shared_bytes"] < layer["dense_bytes"]


def test_the_steps_by_hand_give_the_same_network() -> None:
    recipe = DeepCompression(sparsity=0.8, cluster=KMeans(bits=4))
    whole, parts = _model(), _model()
    recipe.run(whole, lambda model, stage: _train(model, 3))
    recipe.prune_(parts)
    _train(parts, 3)
    recipe.cluster_(parts)
    _train(parts, 3)
    for (name, one), (other_name, other) in zip(whole.state_dict().items(), parts.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)


def test_sizes_are_counted_as_the_paper_counts_them() -> None:
    model = nn.Sequential(nn.Linear(100, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, [0, 40]] = 1.0  # 39 columns passed over: one filler of 32 columns in 5 bits
        model[0].weight[1, 31] = 2.0  # 31 passed over: none
    assert dense_bytes(model) == 4 * 202
    assert pruned_bytes(model) == math.ceil(4 * 37 / 8) + 8
    whole = nn.Linear(10, 10)
    assert pruned_bytes(whole) == dense_bytes(whole) == 440  # sparse would be larger


def test_coded_layers_know_every_format(tmp_path: Path) -> None:
    model = _model()
    slim.cluster_(model, {"0": KMeans(bits=8), "5": KMeans(bits=4)})
    slim.save(model, tmp_path / "m.slim")
    layers = coded_layers(model, tmp_path / "m.slim")
    assert [layer.name for layer in layers] == ["0", "5"]
    assert layers[1].index_bits == layers[1].index_bits_coded == 0
    assert layers[1].kept == 1
    assert layers[1].coded_bytes <= layers[1].shared_bytes


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity: expected a number in"),
        ({"sparsity": {"fc*": -0.1}}, ValueError, r"sparsity\['fc\*'\]"),
        ({"sparsity": {}}, ValueError, "sparsity: expected at least one glob"),
        ({"sparsity": "x"}, TypeError, "sparsity"),
        ({"rounds": 0}, ValueError, "rounds: expected 1 or more"),
        ({"rounds": 1.5}, TypeError, "rounds: expected an int"),
    ],
)
def test_bad_recipes_are_refused_at_construction(options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        DeepCompression(**options)


def test_bad_arguments_are_refused_before_any_training() -> None:
    model = _model()
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def fit(model: nn.Module, stage: Stage) -> None:
        raise AssertionError("trained")

    with pytest.raises(TypeError, match="fit: expected a callable"):
        RECIPE.run(model, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="accuracy: expected a callable"):
        RECIPE.run(model, fit, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'fc1' matches no"):
        DeepCompression(cluster={"fc1": KMeans()}).run(model, fit)
    with pytest.raises(ValueError, match="'fc1' matches no"):
        DeepCompression(sparsity={"fc1": 0.5}).run(model, fit)
    with pytest.raises(TypeError, match="config: expected KMeans"):
        DeepCompression(cluster=4).run(model, fit)  # type: ignore[arg-type]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
