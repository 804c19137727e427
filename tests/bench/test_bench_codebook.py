# SPDX-License-Identifier: Apache-2.0
"""The codebook benchmark: all contenders compute the same product, and who cannot is left out with a reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import codebook, machine
from bench.timing import Settings, WrongResultError

QUICK = Settings(1, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contenders_agree(dtype: str) -> None:
    with torch.inference_mode():
        timings, unavailable = codebook.measure(codebook.Case(3, 128, 4, dtype), QUICK, {}, {1: Path(), 4: Path()})
    names = {timing.contender for timing in timings}
    assert {"slimtorch", "torch", "torch-int4"} <= names
    assert names.isdisjoint(unavailable)
    assert "make peers" in unavailable["onnxruntime-fp32"]
    assert len(codebook.row(codebook.Case(3, 128, 4, dtype), timings)) == len(codebook.COLUMNS)


def test_our_wrong_result_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = codebook.ours
    monkeypatch.setattr(codebook, "ours", lambda x, weight: lambda: right(x, weight)() * 1.001)
    with torch.inference_mode(), pytest.raises(WrongResultError, match="slimtorch"):
        codebook.measure(codebook.Case(3, 128, 3, "float32"), QUICK, {}, {1: Path(), 4: Path()})


def test_writes_what_it_measured(tmp_path: Path) -> None:
    case = codebook.Case(2, 128, 2, "float32", "row")
    with torch.inference_mode():
        timings, _ = codebook.measure(case, QUICK, {}, {1: Path(), 4: Path()})
    path, cases = tmp_path / "out" / "codebook.json", [{"m": 2, "timings": len(timings)}]
    machine.save(path, "codebook", cases, settings=asdict(QUICK))
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["benchmark"] == "codebook"
    assert content["cases"] == cases


@pytest.mark.parametrize(("text", "value"), [("none", None), ("row", "row"), ("32", 32)])
def test_group_sizes(text: str, value: object) -> None:
    assert codebook.group(text) == value
