# SPDX-License-Identifier: Apache-2.0
"""Digests of source files: what a figure belongs to. Needs nothing but Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def digest(entries: Iterable[str]) -> str:
    """SHA-256 over files, and over all files in folders, independent of git and of their dates."""
    total = hashlib.sha256()
    for entry in entries:
        top = ROOT / entry
        files = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file())
        for path in files:
            if "__pycache__" not in path.parts:
                total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def kernel_families() -> list[str]:
    """The families with CUDA kernels, and "common" for what all of them use."""
    return sorted(path.name for path in (ROOT / "csrc/cuda").iterdir() if path.is_dir())


def kernel_digest(family: str) -> str:
    """SHA-256 over what the CUDA kernels of a family are made of: its sources, the common ones, binding and plan."""
    entries = ["csrc/cuda/common"]
    if family != "common":
        bindings = (f"cuda_{family}.cpp", f"cuda_{family}_plan.cpp", f"cuda_{family}_plan.h", f"{family}_plan.h")
        entries += [f"csrc/cuda/{family}", *(f"csrc/bindings/{name}" for name in ("cuda_common.h", *bindings))]
    return digest(entry for entry in entries if (ROOT / entry).exists())
