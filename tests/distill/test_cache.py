# SPDX-License-Identifier: Apache-2.0
"""A teacher's logits on disk: right, resumable, and refused for another teacher, other data or a damaged file."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
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


KILLED = """
import os, signal, sys
from tests.distill.test_cache import Counted, TeacherCache, batches, setting, torch
class Killed(Counted):
    def forward(self, x):
        if self.seen >= int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
Killed.__qualname__ = "Counted"
torch.manual_seed(0)
teacher, x = Killed(), torch.randn(100, 4)
TeacherCache.fill(sys.argv[1], teacher, batches(x), len(x))
"""


@pytest.mark.parametrize(("seen", "done"), [(0, 0), (20, 0), (64, 64), (84, 64)])
def test_a_killed_run_goes_on(tmp_path: Path, seen: int, done: int) -> None:
    """It loses what came after the last note, 16 batches of 4, and nothing else."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(seen)]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, capture_output=True, timeout=120).returncode == -9
    with pytest.raises(ValueError, match=rf"not finished \({done} samples" if done else "expected a cache made by"):
        TeacherCache(tmp_path)
    torch.manual_seed(0)
    teacher, x = Counted(), torch.randn(100, 4)
    cache = TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    assert teacher.seen == 100 - done
    torch.testing.assert_close(cache[:], teacher.linear(x).detach())
    cache.check(teacher)


def test_what_is_left_of_a_file_that_nothing_is_noted_of(tmp_path: Path) -> None:
    """A process may be killed while it makes the file, or before its first note of rows of another data set."""
    teacher, x = setting()
    logits = tmp_path / "logits.npy"
    logits.write_bytes(b"\x93NUMPY")
    torch.testing.assert_close(TeacherCache.fill(tmp_path, teacher, batches(x), 22)[:], teacher.linear(x).detach())
    (tmp_path / "cache.json").unlink()
    np.save(logits, np.ones((30, 7), np.float32))
    torch.testing.assert_close(TeacherCache.fill(tmp_path, teacher, batches(x), 22)[:], teacher.linear(x).detach())


def test_one_process_fills_and_others_wait(tmp_path: Path) -> None:
    teacher, x = setting()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as another process that fills it
    thread = threading.Thread(target=TeacherCache.fill, args=(tmp_path, teacher, list(batches(x)), 22))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert teacher.seen == 0
    os.close(descriptor)
    thread.join(60)
    torch.testing.assert_close(TeacherCache(tmp_path)[:], teacher.linear(x).detach())


def test_a_loader_whose_workers_stay(tmp_path: Path) -> None:
    """They are forked while the folder is locked, and must not keep the lock."""
    teacher, x = setting()
    data = torch.utils.data.TensorDataset(x, torch.zeros(22))
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    cache = TeacherCache.fill(tmp_path, teacher, loader, 22)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where it is locked
    os.close(descriptor)
    torch.testing.assert_close(cache[:], teacher.linear(x).detach())
    teacher.seen = 0
    TeacherCache.fill(tmp_path, teacher, loader, 22)
    assert teacher.seen == 0


def test_many_read_one_cache(tmp_path: Path) -> None:
    """A worker gets the name of the folder, not a copy of all logits."""
    teacher, x = setting()
    cache = TeacherCache.fill(tmp_path, teacher, batches(x.repeat(100, 1)), 2200)
    data = pickle.dumps(cache)
    assert len(data) < 500
    assert torch.equal(pickle.loads(data)[:], cache[:])
    code = (
        f"import pickle, torch; cache = pickle.loads({data!r})\n"
        "print(float(sum(cache[torch.arange(i, 2200, 4)].double().sum() for i in range(4))))"
    )
    readers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    for reader in readers:
        out, _ = reader.communicate(timeout=120)
        assert float(out) == pytest.approx(float(cache[:].double().sum()), rel=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        cache._logits[0] = 0
    before = cache[3].clone()
    cache[torch.tensor([3])].zero_()  # a copy
    assert torch.equal(cache[3], before)


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
    with pytest.raises(ValueError, match=r"samples: .* holds 12, got 8; give another folder"):
        TeacherCache.fill(tmp_path, teacher, batches(changed[:8]), 8)
    with pytest.raises(ValueError, match=r"expected float32 logits of shape \[26, 3\].* got float32 \[22, 3\]"):
        TeacherCache.fill(tmp_path, teacher, batches(torch.cat([x, x[:4]])), 26)
    cache = TeacherCache.fill(tmp_path, teacher, batches(x), len(x))  # nothing of it was lost
    with pytest.raises(ValueError, match="another one"):
        cache.check(other)


def test_other_data_for_a_finished_cache(tmp_path: Path) -> None:
    """As from random augmentation, or a shuffled loader."""
    teacher, x = setting()
    TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    for other in (x + 0.01 * torch.randn_like(x), x.flip(0)):
        with pytest.raises(ValueError, match="batches: the first 22 inputs are not those"):
            TeacherCache.fill(tmp_path, teacher, batches(other), len(x))
    for part in (x[:20], torch.cat([x, x])):
        with pytest.raises(ValueError, match=rf"samples: .* holds 22, got {len(part)}; give another folder"):
            TeacherCache.fill(tmp_path, teacher, batches(part), len(part))
    torch.testing.assert_close(TeacherCache(tmp_path)[:], teacher.linear(x).detach())
    teacher.seen = 0
    TeacherCache.fill(tmp_path, teacher, batches(x, 5), len(x))  # the size of the batches does not matter then
    assert teacher.seen == 0


def test_a_teacher_with_the_same_weights_and_other_layers(tmp_path: Path) -> None:
    linear, (_, x) = nn.Linear(4, 3), setting()
    teacher = nn.Sequential(linear, nn.ReLU())
    cache = TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    cache.check(teacher)
    with pytest.raises(ValueError, match="another one"):
        cache.check(nn.Sequential(linear, nn.GELU()))


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
    right = json.loads(text)
    for wrong in ({"done": "22"}, {"done": -1}, {"complete": 1}, {"checksum": None}, {"classes": None}, {"teacher": 0}):
        facts.write_text(json.dumps({**right, **wrong}))
        with pytest.raises(ValueError, match="is damaged"):
            TeacherCache(tmp_path)
    facts.write_text(json.dumps({**right, "done": 99}))
    with pytest.raises(ValueError, match=r"expected float32 logits of shape \[99, 3\]"):
        TeacherCache(tmp_path)
    facts.write_text(text)
    logits = tmp_path / "logits.npy"
    whole = logits.read_bytes()
    for damaged in (whole[:60], whole[:-8], b"", b"PK\x03\x04" + whole):
        logits.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or missing"):
            TeacherCache(tmp_path)
        with pytest.raises(ValueError, match="damaged or missing"):
            TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    logits.unlink()
    with pytest.raises(ValueError, match="damaged or missing"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_bit(tmp_path: Path, finished: bool) -> None:
    teacher, x = setting()
    if finished:
        TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
    else:
        teacher.breaks_at = 12
        with pytest.raises(RuntimeError):
            TeacherCache.fill(tmp_path, teacher, batches(x), len(x))
        teacher.breaks_at = None
    logits = np.load(tmp_path / "logits.npy", mmap_mode="r+")
    logits[7, 1] = np.nextafter(logits[7, 1], np.float32(9))
    logits.flush()
    if finished:
        with pytest.raises(ValueError, match=r"is damaged \(wrong checksum\); delete it"):
            TeacherCache(tmp_path).check(teacher)
    with pytest.raises(ValueError, match=r"is damaged \(wrong checksum\); delete it"):
        TeacherCache.fill(tmp_path, teacher, batches(x), len(x))


def test_teacher_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher: expected logits \[4, classes\], got \[4, 2, 2\]"):
        TeacherCache.fill(tmp_path, nn.Unflatten(1, (2, 2)), batches(torch.randn(8, 4)), 8)


def test_bad_input(tmp_path: Path) -> None:
    teacher, x = setting()
    for samples, error in ((0, ValueError), (22.0, TypeError), ("22", TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"samples: expected a whole number, 1 or more, got {samples!r}"):
            TeacherCache.fill(tmp_path, teacher, batches(x), samples)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="teacher: expected a module, got function"):
        TeacherCache.fill(tmp_path, lambda x: x, batches(x), 22)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batches: expected tensors with a batch dimension, got ndarray"):
        TeacherCache.fill(tmp_path, teacher, [x.numpy()], 22)
    with pytest.raises(ValueError, match=r"teacher: expected logits \[22, classes\], got dict"):
        TeacherCache.fill(tmp_path, Exits(), [x], 22)


class Exits(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x}
