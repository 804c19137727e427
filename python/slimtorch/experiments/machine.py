# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no Linux: platform knows something
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict[str, object]:
    """Machine, versions and instruction set, JSON-ready: what every report of a measurement carries."""
    from slimtorch import _C

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": threads,
        "isa": _C.isa(),
        "dtype": "float32",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "slimtorch": _C.version,
    }


def headline(machine: dict[str, object]) -> str:
    """One line for the foot of a table."""
    threads = machine["threads"]
    return (
        f"{machine['cpu']}, {threads} thread{'' if threads == 1 else 's'}, {machine['dtype']}, "
        f"kernels: {machine['isa']}, torch {machine['torch']}, slimtorch {machine['slimtorch']}"
    )
