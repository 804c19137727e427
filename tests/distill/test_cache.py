# SPDX-License-Identifier: Apache-2.0
"""A teacher's logits on disk: right, resumable, and refused for another teacher, other data or a damaged file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slimtorch.distill import TeacherCache


class Counted(nn.Module):
    """A teacher that counts what it sees, and breaks down when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.seen = 0
        self.breaks_at: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks_at is not None and self.seen >= self.breaks_at:
            raise RuntimeError("power cut")
        self.seen += len(x)
        return self.linear(x)


def setting() -> tuple[Counted, Tensor]:
    torch.manual_seed(0)
    return Counted(), torch.randn(22, 4)


def batches(x: Tensor, size: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    for part in x.split(size):
        yield part, torch.zeros(len(part))


def test_logits_are_the_teachers(tmp_path: Path) -> None:
    teacher, x = setting()
    teacher.train()
    cache = TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    assert teacher.training
    assert (len(cache), cache.classes) == (22, 3)
    order = torch.tensor([20, 3, 3, 0])
    torch.testing.assert_close(cache[order], teacher.linear(x[order]).detach())
    torch.testing.assert_close(TeacherCache(tmp_path)[:], teacher.linear(x).detach())
    cache.check(teacher)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    teacher, x = setting()
    teacher.breaks_at = 12
    with pytest.raises(RuntimeError, match="power cut"):
        TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    with pytest.raises(ValueError, match=r"not finished \(12 samples done\)"):
        TeacherCache(tmp_path)
    teacher.breaks_at, teacher.seen = None, 0
    cache = TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    assert teacher.seen == 10
    torch.testing.assert_close(cache[:], teacher.linear(x).detach())
    teacher.seen = 0
    TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    assert teacher.seen == 0


def test_dict_inputs(tmp_path: Path) -> None:
    teacher, x = setting()
    cache = TeacherCache.fill(tmp_path, teacher, [{"x": x[:10]}, {"x": x[10:]}], len(x))
    torch.testing.assert_close(cache[:], teacher.linear(x).detach())


def test_other_teacher_or_data(tmp_path: Path) -> None:
    teacher, x = setting()
    teacher.breaks_at = 12
    with pytest.raises(RuntimeError):
        TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    teacher.breaks_at = None
    changed = x.clone()
    changed[1, 1] += 1
    with pytest.raises(ValueError, match="batches: the first 12 inputs are not those"):
        TeacherCache.fill(tmp_path, teacher, batches(changed), len(x))
    with pytest.raises(ValueError, match="not a multiple of these batches"):
        TeacherCache.fill(tmp_path, teacher, batches(x, 5), len(x))
    other = Counted()
    with pytest.raises(ValueError, match=r"teacher: .* holds logits of another one"):
        TeacherCache.fill(tmp_path, other, batches(x), len(x))
    cache = TeacherCache.fill(tmp_path, teacher, batches(x), len(x))  # nothing of it was lost
    with pytest.raises(ValueError, match="another one"):
        cache.check(other)


@pytest.mark.parametrize(("samples", "text"), [(21, "expected 21 samples, got more"), (23, "23 samples, got 22")])
def test_wrong_count(tmp_path: Path, samples: int, text: str) -> None:
    teacher, x = setting()
    with pytest.raises(ValueError, match=text):
        TeacherCache.fill(tmp_path, teacher, batches(x), samples)


def test_damage(tmp_path: Path) -> None:
    teacher, x = setting()
    with pytest.raises(ValueError, match="folder: expected a cache made by"):
        TeacherCache(tmp_path)
    TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    facts = tmp_path / "cache.json"
    text = facts.read_text()
    facts.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        TeacherCache(tmp_path)
    facts.write_text(json.dumps({**json.loads(text), "done": 99}))
    with pytest.raises(ValueError, match=r"expected float32 logits of shape \[99, 3\]"):
        TeacherCache(tmp_path)
    facts.write_text(text)
    logits = tmp_path / "logits.npy"
    logits.write_bytes(logits.read_bytes()[:60])
    with pytest.raises(ValueError, match="damaged or missing"):
        TeacherCache(tmp_path)


def test_teacher_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher: expected logits \[4, classes\], got \[4, 2, 2\]"):
        TeacherCache.fill(tmp_path, nn.Unflatten(1, (2, 2)), batches(torch.randn(8, 4)), 8)
