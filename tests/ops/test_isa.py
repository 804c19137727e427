# SPDX-License-Identifier: Apache-2.0
"""Each instruction set of the build, forced in a process of its own, over every family, layer, dtype and kernel."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slimtorch import _C
from tests.ops.operators import (
    DTYPES,
    SPARSE,
    Format,
    apply,
    check_forward,
    check_gradients,
    geometry,
    stored_terms,
    sum_bound,
    tensors,
    with_values,
)
from tests.problems import ConvProblem, LinearProblem, Problem

ROOT = Path(__file__).resolve().parents[2]
ISAS = [name for name, missing in _C.isas().items() if not missing]
FORMATS = (SPARSE, Format((1, 4)), Format((3, 5)), Format((16, 16)), Format((64, 64)))
PROBLEMS: tuple[Problem, ...] = (
    # One kernel each: a dot product, few rows of x, one panel, several panels and k blocks, many rows.
    *(LinearProblem(f"linear_m{m}", m, 70, 331, 0.2, seed=m) for m in (1, 2, 4, 7, 20, 64, 131)),
    LinearProblem("linear_tall", 40, 1100, 50, 0.1, seed=1),
    LinearProblem("linear_wide_index", 3, 4, 65600, 0.005, seed=1),
    ConvProblem("conv3x3", 2, 9, 20, 13, 11, padding=(1, 1), density=0.3, seed=1),
    ConvProblem("conv_all", 3, 6, 10, 15, 12, (3, 2), (2, 3), (2, 1), (2, 1), 2, 0.5, seed=1),
    ConvProblem("conv_tiny_maps", 40, 5, 9, 3, 3, padding=(1, 1), density=0.5, seed=1),
    ConvProblem("conv_wide", 1, 2, 5, 3, 1100, padding=(1, 1), density=0.6, seed=1),
    ConvProblem("pointwise", 2, 20, 17, 12, 13, (1, 1), density=0.3, seed=1),
)


def run_all() -> dict[str, Tensor]:
    """Outputs by name of the case, forward and backward compared with the reference."""
    outputs: dict[str, Tensor] = {}
    for problem in PROBLEMS:
        for form in FORMATS:
            for dtype in DTYPES:
                x, weight, bias = tensors(problem, form, dtype)
                options = geometry(problem)
                y = check_forward(x, weight, bias, **options)
                assert torch.equal(apply(x, weight, bias, relu=True, **options), y.relu())
                if len(outputs) % 2 == 0:  # every other one: each format and dtype meets each kernel's backward
                    check_gradients(x, weight, bias, relu=True, **options)
                outputs[f"{problem} {form} {dtype}"] = y
    return outputs


def _run(isa: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SLIMTORCH_CPU": isa, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


_CHILD = """
import sys, torch
from slimtorch import _C
from tests.ops.test_isa import run_all
torch.save({"isa": _C.isa(), "outputs": run_all()}, sys.argv[1])
"""


@functools.cache
def outputs_of(isa: str) -> dict[str, Tensor]:
    """What a process forced to `isa` computes, checked there against the reference."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outputs.pt"
        done = _run(isa, _CHILD, str(path))
        assert done.returncode == 0, done.stderr[-3000:]
        result = torch.load(path)
    assert result["isa"] == isa
    outputs: dict[str, Tensor] = result["outputs"]
    return outputs


@pytest.mark.parametrize("isa", ISAS)
def test_against_the_reference(isa: str) -> None:
    assert len(outputs_of(isa)) == len(PROBLEMS) * len(FORMATS) * len(DTYPES)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
def test_agrees_with_scalar(isa: str) -> None:
    ours, scalar = outputs_of(isa), outputs_of("scalar")
    for problem in PROBLEMS:
        for form in FORMATS:
            for dtype in DTYPES:
                name = f"{problem} {form} {dtype}"
                x, weight, bias = (t.abs() if isinstance(t, Tensor) else t for t in tensors(problem, form, dtype))
                magnitude = apply(x, with_values(weight, weight.values.abs()), bias, **geometry(problem)).double()
                # Each errs by its bound, and rounds once to bfloat16.
                tolerance = 2 * sum_bound(stored_terms(weight), dtype) * magnitude
                if dtype == torch.bfloat16:
                    tolerance = tolerance * 1.01 + torch.finfo(dtype).eps * scalar[name].double().abs()
                error = (ours[name].double() - scalar[name].double()).abs()
                assert bool((error <= tolerance).all()), name


def test_the_emulated_set_is_only_used_by_name() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "SLIMTORCH_CPU"}
    code = "from slimtorch import _C; print(_C.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    chosen = done.stdout.strip()
    assert chosen == next(name for name in ISAS if name != "avx512_emulated")


@pytest.mark.parametrize("value", ["avx3", "AVX2"])
def test_an_unknown_name_is_a_clear_error(value: str) -> None:
    code = """
import torch, slimtorch as slim
from slimtorch.formats import Sparse
try:
    slim._C.isa()
except RuntimeError as error:
    print("isa:", error)
try:
    slim.ops.sparse_linear(torch.ones(3, 4), Sparse.pack(torch.ones(5, 4)))
except RuntimeError as error:
    print("op:", error)
"""
    done = _run(value, code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = ", ".join(_C.isas())
    expected = f"SLIMTORCH_CPU: expected one of {names}, got '{value}'"
    assert [line for line in lines if expected in line and line.startswith("isa:")], done.stdout
    assert [line for line in lines if expected in line and line.startswith("op:")], done.stdout


def test_a_set_that_this_cpu_lacks_is_a_clear_error() -> None:
    for name, missing in _C.isas().items():
        if missing:
            done = _run(name, "from slimtorch import _C; print(_C.isa())")
            assert done.returncode != 0
            assert f"SLIMTORCH_CPU={name}: this CPU lacks {missing}" in done.stderr
