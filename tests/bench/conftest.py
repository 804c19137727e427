# SPDX-License-Identifier: Apache-2.0
"""Results as a benchmark would write them, with times that are easy to check by head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.results import Case, Results, describe
from bench.timing import Role, Timing
from tests.problems import BENCH_CONV, BENCH_LINEAR, BLOCK_SIZES, Problem, at_densities, with_block_sizes

ROLES: dict[str, Role] = {
    "slimtorch-sparse": "ours",
    "slimtorch-block-sparse": "ours",
    "torch": "dense",
    "onednn": "dense",
    "mkl-csr": "sparse",
    "torch-bsr": "sparse",
    "deepsparse": "peer",
    "onnxruntime": "peer",
}


def timing(contender: str, seconds: float) -> Timing:
    return Timing(contender, ROLES[contender], contender, seconds, 0.9 * seconds, 1.2 * seconds, seconds, 15, 10, 1e-7)


def case(problem: Problem, seconds: dict[str, float]) -> Case:
    missing = {} if "deepsparse" in seconds else {"deepsparse": "no environment for it: run `make peers`"}
    return Case(describe(problem), 1, [timing(name, value) for name, value in seconds.items()], missing)


def results(benchmark: str, cases: list[Case], path: Path | None = None) -> Results:
    return Results(
        benchmark=benchmark,
        date="2030-01-02T03:04:05+00:00",
        machine={"cpu": "Test CPU", "isa": "avx2", "features": ["avx2"], "cores": 2},
        versions={"torch": "2.13.0", "mkl": "2024.2", "onednn": "3.12.0", "deepsparse": "1.8.0", "slimtorch": "0.1.0"},
        source={"commit": None, "modified": None, "digest": "0" * 64},
        settings={"rounds": 15, "sample_seconds": 5e-3},
        complete=True,
        cases=cases,
        path=path,
    )


def sparse_cases(ours: float = 10e-6) -> list[Case]:
    """torch 200 us, best dense 100 us, MKL CSR 50 us, DeepSparse 40 us at every shape and sparsity."""
    rivals = {"torch": 200e-6, "onednn": 100e-6, "mkl-csr": 50e-6, "deepsparse": 40e-6, "onnxruntime": 150e-6}
    problems = at_densities([BENCH_LINEAR[2], BENCH_CONV[1]], [0.4, 0.2, 0.1, 0.05])
    return [case(problem, {"slimtorch-sparse": ours, **rivals}) for problem in problems]


def block_cases() -> list[Case]:
    """Best dense 100 us; ours exactly as fast as the density says, DeepSparse not measured."""
    problems = with_block_sizes(at_densities([BENCH_LINEAR[2]], [0.2, 0.1]), BLOCK_SIZES[:2])
    return [
        case(p, {"slimtorch-block-sparse": 1e-4 * p.density, "torch": 2e-4, "onednn": 1e-4, "torch-bsr": 5e-5})
        for p in problems
    ]


@pytest.fixture
def make_case() -> Callable[..., Case]:
    return case


@pytest.fixture
def sparse_results() -> Results:
    return results("sparse", sparse_cases())


@pytest.fixture
def block_results() -> Results:
    return results("block_sparse", block_cases())


@pytest.fixture
def results_folder(tmp_path: Path, sparse_results: Results, block_results: Results) -> Path:
    """A folder like bench/results with one file for each benchmark, and a README with their markers beside it."""
    folder = tmp_path / "results"
    sparse_results.save(folder / "sparse-test.json")
    block_results.save(folder / "block_sparse-test.json")
    sections = "\n\n".join(
        f"<!-- bench:{name} -->\nold\n<!-- /bench -->" for name in ("sparse", "block_sparse", "targets")
    )
    (tmp_path / "README.md").write_text(f"# Title\n\nBefore.\n\n{sections}\n\nAfter.\n", encoding="utf-8")
    return folder
