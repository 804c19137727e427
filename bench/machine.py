# SPDX-License-Identifier: Apache-2.0
"""What a figure depends on: the processor, the libraries and the source that produced it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import slimtorch
from bench.sources import ROOT, digest
from slimtorch import _C
from slimtorch._files import write_atomically

# Everything between a layer's call and its kernels: a change in any of these may change a time.
_TIMED_SOURCE = ("csrc", "python/slimtorch/formats", "python/slimtorch/ops", "python/slimtorch/nn", "CMakeLists.txt")


def _cpuinfo(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    match = re.search(rf"^{field}\s*:\s*(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1).strip() if match else None


def _cpu_name() -> str:
    """Model name, with family and model where the hypervisor hides what it is."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def cores() -> list[int]:
    """The cores this process may use."""
    return sorted(os.sched_getaffinity(0))


def machine() -> dict[str, object]:
    """Processor, features, chosen instruction set, cores this process may use, system."""
    return {
        "cpu": _cpu_name(),
        "features": sorted(name for name, present in _C.cpu_features().items() if present),
        "isa": _C.isa(),
        "forced_isa": os.environ.get("SLIMTORCH_CPU"),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """Versions of torch, of the math libraries inside it, and of this library."""
    built_with = torch.__config__.show()
    mkl = re.search(r"Math Kernel Library Version (\S+)", built_with)
    onednn = re.search(r"MKL-DNN v(\S+)", built_with)
    return {
        "slimtorch": slimtorch.__version__,
        "torch": torch.__version__,
        "mkl": mkl.group(1) if mkl else None,
        "onednn": onednn.group(1) if onednn else None,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, not a checkout, or no commit yet
        return None
    return done.stdout.strip()


def source_digest() -> str:
    """SHA-256 over the files that decide how fast a layer is, independent of git and of their dates."""
    return digest(_TIMED_SOURCE)


def source() -> dict[str, object]:
    """The commit, whether files differ from it, and the digest of the timed source."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--", *_TIMED_SOURCE)
    return {"commit": commit, "modified": None if commit is None else bool(status), "digest": source_digest()}


def save(path: Path, benchmark: str, cases: Sequence[object], **facts: object) -> None:
    """Write what a benchmark of quantized weights measured, on what, and further ``facts``, atomically."""
    content = {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "source": source(),
        "threads": 1,
        **facts,
        "cases": cases,
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def restricted(cores: Sequence[int], threads: int) -> Iterator[None]:
    """Keep this process, and what it starts, on the first `threads` of `cores`, with as many torch threads.

    ValueError where there are fewer cores. Torch's threads inherit the cores when they start, so rising numbers of
    threads can follow each other in one process and falling ones cannot.
    """
    if threads > len(cores):
        raise ValueError(f"threads: expected at most the {len(cores)} cores this process may use, got {threads}")
    before, threads_before = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores[:threads])
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        os.sched_setaffinity(0, before)
