# SPDX-License-Identifier: Apache-2.0
"""README's section about quantized weights comes from the committed JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import networks, quantized, tables
from bench.machine import ROOT
from bench.results import RESULTS_DIR

SETUP = {"machine": {"cpu": "Test CPU", "isa": "avx2"}, "versions": {"torch": "2.13.0"}, "date": "2026-01-02T00:00:00"}


def _timings(**medians: float) -> list[dict[str, Any]]:
    roles = {"slimtorch": "ours", "slimtorch-sparse": "ours", "torch": "dense", "onednn": "dense"}
    return [
        {"contender": name.replace("_", "-"), "role": roles.get(name.replace("_", "-"), "peer"), "median": median}
        for name, median in medians.items()
    ]


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / "quantized").mkdir(exist_ok=True)
    (folder / "quantized" / f"{name}.json").write_text(json.dumps({"benchmark": name, **SETUP, **content}))


def test_every_part_is_told_from_its_json(tmp_path: Path) -> None:
    assert quantized.section(tmp_path) == ""
    times = _timings(slimtorch=1e-3, torch=4e-3, onednn=2e-3)
    _write(tmp_path, "codebook", {"cases": [{"n": 64, "m": 1, "bits": 4, "dtype": "float32", "timings": times}]})
    sparse = {"n": 64, "m": 1, "bits": 4, "density": 0.1, "bytes_per_nonzero": 1.585}
    timed = _timings(slimtorch=1e-3, slimtorch_sparse=5e-4, torch=4e-3, onednn=2e-3)
    _write(tmp_path, "sparse_codebook", {"cases": [{**sparse, "timings": timed}]})
    case = {"name": "1024", "binarize_input": True, "operations": 2e9, "timings": times}
    _write(tmp_path, "binary", {"popcount_roof_gops": {"scalar": 488.2}, "cases": [case]})
    text = quantized.section(tmp_path)
    assert "Test CPU, our kernels: avx2; torch 2.13.0; 2026-01-02; one thread" in text
    assert "| 64 → 64, M = 1, 4 bits, float32 | 1 ms | 4.0 | 2.0 | – | – | – | – |" in text
    assert "| 64 → 64, M = 1, 90% zero, 4 bits | 1 ms | 0.50 | 4.0 | 2.0 | 1.58 |" in text
    assert "| 1024, signs | 1 ms | 2000 | 4.0 | 2.0 |" in text
    assert "scalar 488" in text


def test_a_missing_experiment_leaves_its_section_empty(tmp_path: Path) -> None:
    assert quantized.deep_compression(tmp_path) == quantized.binary_networks(tmp_path) == ""


@pytest.mark.parametrize("part", list(tables.QUANTIZED))
def test_readme_shows_what_is_committed(part: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = tables.QUANTIZED[part](RESULTS_DIR)
    assert told
    assert told in text


def test_networks_are_timed_as_stored_and_as_packed() -> None:
    small = networks.Network("mlp", lambda: networks.nn.Linear(40, 30), networks.clustered, "codebook", ((2, 40),))
    case = networks.measure(small, (2, 40), 1)
    assert {"torch", "as stored", "pack_"} <= set(case["seconds"])
    assert case["bytes"] < case["bytes_dense"]
    assert "mlp" in str(networks.table([case]))
