# SPDX-License-Identifier: Apache-2.0
"""Writing: the old file or the new one, and nothing else in the folder."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import slimtorch as slim
from slimtorch.storage import _container


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "model.slim"
    slim.save(nn.Linear(8, 8), path)
    return path, path.read_bytes()


def only_old_is_there(old):
    path, data = old
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["model.slim"]
    slim.load(path, nn.Linear(8, 8))


def test_disk_full(old):
    """The file size limit stands in for a full disk: the write fails half-way, as it would there."""
    script = f"""
        import resource, signal, sys
        import torch
        import slimtorch as slim
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        try:
            slim.save(torch.nn.Linear(512, 512), {str(old[0])!r})
        except OSError as error:
            print("OSError", error.strerror)
            sys.exit(7)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert ended.returncode == 7, ended.stderr
    assert "OSError File too large" in ended.stdout
    only_old_is_there(old)


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["oserror", "^C"])
def test_any_step_that_fails(step, error, old, monkeypatch):
    def fail(*_args):
        raise error

    monkeypatch.setattr(_container.os, step, fail)
    with pytest.raises(type(error)):
        slim.save(nn.Linear(3, 3), old[0])
    monkeypatch.undo()
    only_old_is_there(old)


def test_killed_while_writing(old):
    script = f"""
        import os
        import torch
        import slimtorch as slim
        os.fsync = lambda _: os._exit(9)
        slim.save(torch.nn.Linear(512, 512), {str(old[0])!r})
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == 9
    path, data = old
    assert path.read_bytes() == data


def test_mode_and_links_stay(old, tmp_path):
    path, _ = old
    path.chmod(0o640)
    slim.save(nn.Linear(4, 4), path)
    assert path.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link.slim"
    link.symlink_to(path)
    slim.save(nn.Linear(5, 5), link)
    assert link.is_symlink()
    slim.load(path, nn.Linear(5, 5))
    mask = os.umask(0o027)
    try:
        slim.save(nn.Linear(4, 4), tmp_path / "new.slim")
    finally:
        os.umask(mask)
    assert (tmp_path / "new.slim").stat().st_mode & 0o777 == 0o640


def test_saving_over_the_file_that_was_loaded(old):
    path, _ = old
    model = slim.load(path, nn.Linear(8, 8))
    with torch.no_grad():
        model.weight.add_(1)
    slim.save(model, path)
    assert torch.equal(slim.load(path, nn.Linear(8, 8)).weight, model.weight)
