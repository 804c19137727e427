# SPDX-License-Identifier: Apache-2.0
"""deep-compression and weight-clustering on a handful of digits: everything runs, resumes and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import slimtorch as slim
from slimtorch.data import Digits, Split, digits
from slimtorch.experiments import catalogue, deep_compression, weight_clustering
from slimtorch.experiments.catalogue import Result, Settings
from slimtorch.models import LeNet300

FEW = "a few digits"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Digits:
    data = digits(240, 50, 100)
    monkeypatch.setattr(deep_compression, "load_data", lambda settings: (data, FEW))
    monkeypatch.setattr(weight_clustering, "load_data", lambda settings: (data, FEW))
    monkeypatch.setattr(weight_clustering, "STARTS", ("linear", "uniform"))
    monkeypatch.setattr(weight_clustering, "QUICK", weight_clustering.Plan((1, 3), 0.5, 0.2, 0.2))
    return data


def _run(name: str, out: Path, settings: Settings) -> tuple[Result, list[tuple[str, int, int]]]:
    seen: list[tuple[str, int, int]] = []
    result = catalogue.find(name).run(settings, out, lambda *done: seen.append(done))
    json.dumps(result.data, allow_nan=False)
    assert all(str(table) for table in result.tables)
    return result, seen


def test_deep_compression_from_training_to_a_timed_file(
    few: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, seen = _run("deep-compression", tmp_path, Settings(quick=True, jobs=1))
    assert FEW in result.lead
    assert ("train", 2, 2) in seen
    for network, found in result.data["networks"].items():
        names = [step["name"] for step in found["steps"]]
        assert names[0] == "dense"
        assert names[-1] == "P+Q+H: file"
        file = tmp_path / f"deep-{network}-seed0.slim"
        assert found["file_bytes"] == [file.stat().st_size]
        assert found["ratio"] == pytest.approx(found["steps"][0]["bytes"] / file.stat().st_size)
        assert found["ratio"] > 20
        assert {"torch", "compressed", "pruned, float32"} <= set(found["latency"]["1"])
    model = slim.load(tmp_path / "deep-lenet300-seed0.slim", LeNet300())
    steps = result.data["networks"]["lenet300"]["steps"]
    assert 1 - deep_compression.accuracy(model, few.test) == pytest.approx(steps[-1]["errors"][0])
    text = "\n".join(str(table) for table in result.tables)
    for words in ("LeNet-300-100", "LeNet-5", "P: retrained", "best dense", "together"):
        assert words in text
    assert result.figures[0][2].axes

    def no_training(*_: Any) -> Any:
        raise AssertionError("trained again")

    # What is stored is not trained again, and a file that is gone comes back from the store.
    monkeypatch.setattr(deep_compression, "train", no_training)
    (tmp_path / "deep-lenet300-seed0.slim").unlink()
    again, _ = _run("deep-compression", tmp_path, Settings(quick=True, jobs=1))
    assert again.data["networks"]["lenet300"]["steps"] == steps
    assert (tmp_path / "deep-lenet300-seed0.slim").exists()


def test_weight_clustering_over_bits_and_starts(few: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, seen = _run("weight-clustering", tmp_path, Settings(quick=True, jobs=1))
    assert ("train", 7, 7) in seen
    accuracy = result.data["accuracy"]
    assert set(accuracy) == {"whole", "pruned"}
    assert set(accuracy["pruned"]) == {"linear", "uniform"}
    assert set(accuracy["pruned"]["linear"]["tuned"]) == {"1", "3"}
    assert set(result.data["aware"]) == {"1", "3"}
    assert result.data["bytes"]["pruned"]["3"] < result.data["bytes"]["whole"]["3"]
    monkeypatch.setattr(weight_clustering, "_run_unit", lambda *_: pytest.fail("trained again"))
    again, _ = _run("weight-clustering", tmp_path, Settings(quick=True, jobs=1))
    assert again.data["accuracy"] == accuracy


def test_images_of_another_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
    monkeypatch.setattr(deep_compression, "load", lambda name: (Digits(split, split, split), FEW))
    with pytest.raises(ValueError, match="data: expected MNIST's images of 1x28x28, got 3x32x32"):
        _run("deep-compression", tmp_path, Settings(data=str(tmp_path)))
