# SPDX-License-Identifier: Apache-2.0
"""The code in README.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

import slimtorch as slim

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples save belongs to no checkout."""
    monkeypatch.chdir(tmp_path)


def test_quick_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS[0].strip().splitlines()) <= 20
    names: dict[str, object] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | slim.nn.SparseLinear)]
    assert layers
    assert all((layer.weight == 0).float().mean() > 0.85 for layer in layers)
    printed = capsys.readouterr().out
    assert "sparse" in printed


@pytest.mark.parametrize("block", BLOCKS[1:], ids=lambda block: block.split("\n", 1)[0])
def test_other_blocks_follow_the_first(block: str) -> None:
    names: dict[str, object] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    exec(compile(block, "README.md", "exec"), names)
