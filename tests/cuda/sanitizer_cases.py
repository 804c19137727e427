# SPDX-License-Identifier: Apache-2.0
"""A few small problems of every family for compute-sanitizer, which slows kernels down by orders of magnitude.

    compute-sanitizer --tool memcheck python tests/cuda/sanitizer_cases.py

Each layer runs forward and backward on edges of tiles: one row, some, more than one tile. It prints what ran; results
are compared by the tests, not here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.nn.cases import CASES, Case, with_dtype

DTYPES = (torch.float16, torch.float32, torch.bfloat16)
ROWS = (1, 17, 70)


def problems() -> Iterator[Case]:
    """Every layer of the tests, binary ones over signs too, and linear layers of more than one tile."""
    for case in CASES:
        signs = [replace(case, name=f"{case.name}_of_signs", options={"binarize_input": True})] if case.binary else []
        for each in (case, *signs):
            yield each
            if "linear" in case.name:
                yield replace(each, name=f"{each.name}_larger", dense=lambda: nn.Linear(203, 150), sample=(203,))


def main(device: str = "cuda", seconds: float = 30.0) -> int:
    """Run all of it, or what fits into `seconds`; returns how many layers ran."""
    began, count = time.monotonic(), 0
    for dtype in DTYPES:  # half precision first: what tensor cores are used for
        for case in problems():
            if time.monotonic() - began > seconds:
                print(f"the rest is left out after {seconds:.0f} s")
                return count
            case = with_dtype(case, dtype)
            layer = case.packed().to(device)
            for rows in ROWS if len(case.sample) == 1 else ROWS[:2]:
                x = case.input(rows).to(device).requires_grad_()
                y = layer(x)
                y.backward(torch.ones_like(y))
                with torch.inference_mode():
                    layer(x)
            count += 1
            print(case.name, str(dtype).removeprefix("torch."), flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to check")
    print(main(), "layers")
