# SPDX-License-Identifier: Apache-2.0
"""The JSON survives a round trip and an interruption, and nothing else passes for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import block_sparse, machine, run, sparse
from bench.results import SCHEMA, Case, Results, describe, load_all
from bench.timing import Timing
from tests.problems import ConvProblem, LinearProblem

TINY = ["--m", "2", "--n", "16", "--k", "24", "--rounds", "2", "--sample-ms", "0.01", "--no-peers"]


def test_round_trip(tmp_path: Path, sparse_results: Results) -> None:
    path = tmp_path / "deep" / "sparse.json"
    sparse_results.save(path)
    again = Results.load(path)
    assert again.path == path
    assert again.stem == "sparse"
    again.path = None
    assert again == sparse_results
    assert not list(path.parent.glob("*.part"))
    assert [r.stem for r in load_all(path.parent)] == ["sparse"]


def test_schema(tmp_path: Path, sparse_results: Results) -> None:
    path = tmp_path / "sparse.json"
    sparse_results.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["schema"] == SCHEMA
    assert set(content) == {
        "schema", "benchmark", "date", "machine", "versions", "source", "settings", "complete", "cases",
    }  # fmt: skip
    case = content["cases"][0]
    assert set(case) == {"problem", "threads", "timings", "unavailable"}
    assert case["problem"]["kind"] == "linear"
    assert case["problem"]["dtype"] == "float32"
    assert set(case["timings"][0]) == {
        "contender", "role", "what", "median", "p10", "p90", "minimum", "samples", "calls", "error",
    }  # fmt: skip
    line = next(
        line for line in path.read_text(encoding="utf-8").splitlines() if '"onednn"' in line and "median" in line
    )
    assert json.loads(line.strip().rstrip(","))["median"] == 100e-6  # a timing is one line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[]", "schema"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema"),
        (lambda text: text.replace('"threads"', '"treads"'), "threads"),
        (lambda text: text.replace('"median": 0.0001', '"median": -1'), "damaged timing of onednn"),
        (lambda text: text.replace('"role": "dense"', '"role": "king"'), "damaged timing of torch"),
        (lambda text: text.replace('"p10"', '"p11"'), "p1"),
    ],
)
def test_damaged_files(tmp_path: Path, sparse_results: Results, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "sparse.json"
    sparse_results.save(path)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        Results.load(path)
    assert str(path) in str(caught.value)


def test_cases_know_themselves() -> None:
    def timing(name: str, role: str, median: float) -> Timing:
        return Timing(name, role, "", median, median, median, median, 1, 1, 0.0)  # type: ignore[arg-type]

    problem = LinearProblem("p", 64, 8, 8, 0.1, torch.bfloat16, block_size=(4, 16))
    case = Case(
        describe(problem),
        1,
        [
            timing("slimtorch-sparse", "ours", 2.0),
            timing("torch", "dense", 8.0),
            timing("torch-fp32", "dense-fp32", 5.0),
        ],
    )
    assert (case.kind, case.rows, case.dtype, case.sparsity, case.block_size) == (
        "linear",
        64,
        "bfloat16",
        0.9,
        (4, 16),
    )
    assert case.speedup(case.best_dense()) == 2.5
    assert case.speedup(case.best_dense(same_dtype=True)) == 4.0
    assert case.speedup(case.timing("deepsparse")) is None
    assert Case(describe(ConvProblem("c", 1, 2, 2, 5, 5)), 1, []).rows is None


def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sparse.json"
    assert run.main(sparse.BENCHMARK, [*TINY, "--density", "0.5", "0.25", "--json", str(path)]) == 0
    results = Results.load(path)
    assert results.complete
    assert results.benchmark == "sparse"
    assert [case.density for case in results.cases] == [0.5, 0.25]
    assert all(case.ours() is not None and case.timing("torch") is not None for case in results.cases)
    assert results.versions["torch"] == torch.__version__
    assert results.machine["isa"] in ("scalar", "avx2", "avx512")
    assert len(results.source["digest"]) == 64
    printed = capsys.readouterr().out
    assert "16x24_m2" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_block_sizes_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "block.json"
    options = ["--density", "0.5", "--block-size", "4x8", "8x8", "--dtype", "float32", "bfloat16", "--json", str(path)]
    assert run.main(block_sparse.BENCHMARK, [*TINY, *options]) == 0
    cases = Results.load(path).cases
    assert [(case.block_size, case.dtype) for case in cases] == [
        ((4, 8), "float32"), ((8, 8), "float32"), ((4, 8), "bfloat16"), ((8, 8), "bfloat16"),
    ]  # fmt: skip
    assert all(case.ours().contender == "slimtorch-block-sparse" for case in cases)  # type: ignore[union-attr]


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse.json"
    arguments = [*TINY, "--density", "0.5", "0.25", "0.125", "--json", str(path)]
    measured: list[float] = []
    real = run.time_problem

    def interrupted(problem, *rest, **more):  # type: ignore[no-untyped-def]
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(problem.density)
        return real(problem, *rest, **more)

    monkeypatch.setattr(run, "time_problem", interrupted)
    assert run.main(sparse.BENCHMARK, arguments) == 130
    assert not Results.load(path).complete
    assert measured == [0.5, 0.25]
    measured.clear()
    assert run.main(sparse.BENCHMARK, arguments) == 0
    assert measured == [0.125]
    assert [case.density for case in Results.load(path).cases] == [0.5, 0.25, 0.125]
    measured.clear()  # a finished file is measured anew
    monkeypatch.setattr(run, "time_problem", real)
    assert run.main(sparse.BENCHMARK, [*TINY, "--density", "0.5", "--json", str(path)]) == 0
    assert len(Results.load(path).cases) == 1


def test_continuing_keeps_only_the_cases_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "sparse.json"
    assert run.main(sparse.BENCHMARK, [*TINY, "--density", "0.5", "0.25", "--json", str(path)]) == 0
    results = Results.load(path)
    results.complete, kept = False, results.cases[0]
    results.save(path)
    assert run.main(sparse.BENCHMARK, [*TINY, "--density", "0.125", "0.5", "--json", str(path)]) == 0
    cases = Results.load(path).cases
    assert [case.density for case in cases] == [0.5, 0.125]
    assert cases[0] == kept


def test_other_settings_do_not_continue(tmp_path: Path, sparse_results: Results) -> None:
    path = tmp_path / "sparse.json"
    sparse_results.complete = False
    sparse_results.save(path)
    assert run.main(sparse.BENCHMARK, [*TINY, "--density", "0.5", "--json", str(path)]) == 0
    assert len(Results.load(path).cases) == 1


def test_a_foreign_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "precious.json"
    path.write_text('{"mine": 1}', encoding="utf-8")
    assert run.main(sparse.BENCHMARK, [*TINY, "--density", "0.5", "--json", str(path)]) == 2
    assert path.read_text(encoding="utf-8") == '{"mine": 1}'
    assert "schema" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", [["--density", "0"], ["--density", "1.5"], ["--m", "0"], ["--dtype", "int8"], ["--threads", "0"]]
)
def test_bad_options(bad: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(sparse.BENCHMARK, bad)
    assert caught.value.code == 2


def test_several_thread_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = machine.cores()[0]
    monkeypatch.setattr(machine, "cores", lambda: [core, core])  # two threads, on machines with one core too
    before = torch.get_num_threads()
    path = tmp_path / "sparse.json"
    assert run.main(sparse.BENCHMARK, [*TINY, "--density", "0.5", "--threads", "2", "1", "--json", str(path)]) == 0
    assert [case.threads for case in Results.load(path).cases] == [1, 2]
    assert torch.get_num_threads() == before


def test_more_threads_than_cores(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(sparse.BENCHMARK, [*TINY, "--threads", "4096"]) == 2
    assert "threads" in capsys.readouterr().err


def test_the_full_grids_cover_the_targets() -> None:
    for benchmark in (sparse.BENCHMARK, block_sparse.BENCHMARK):
        grid = run.problems(benchmark, run.parser(benchmark).parse_args([]))
        assert len(grid) == len(set(grid))
        quick = run.problems(benchmark, run.parser(benchmark).parse_args(["--quick"]))
        assert 0 < len(quick) < len(grid) / 4
        only = run.problems(benchmark, run.parser(benchmark).parse_args(["--only", "conv"]))
        assert only
        assert all(isinstance(problem, ConvProblem) for problem in only)
