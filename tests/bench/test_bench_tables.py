# SPDX-License-Identifier: Apache-2.0
"""README, full tables and plots come from the JSON alone, and `--check` notices when they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import experiments, plots, tables, targets
from bench.results import Case, Results
from slimtorch.report import Table
from tests.problems import BENCH_LINEAR, at_densities


def run_tables(folder: Path, *more: str) -> int:
    return tables.main(["--results", str(folder), "--readme", str(folder.parent / "README.md"), *more])


def test_tables_fill_the_readme(results_folder: Path) -> None:
    readme = results_folder.parent / "README.md"
    assert run_tables(results_folder) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nBefore.\n")
    assert text.endswith("\nAfter.\n")
    assert "old" not in text
    # ours 10 us; torch 200, best dense 100, DeepSparse 40
    assert "| linear 1024 → 1024, M = 64 | 20 / 10 / 4.0 | 20 / 10 / 4.0 | 20 / 10 / 4.0 | 20 / 10 / 4.0 |" in text
    assert "| conv 3×3, 256 → 256, 14×14, batch 1 |" in text
    assert "| 16×16 | 10 / 5.0 / 2.5 | 20 / 10 / 5.0 |" in text  # blocks at 80 and 90 %: torch, best dense, BSR
    assert "Test CPU, our kernels: avx2; torch 2.13.0" in text
    assert "one thread" in text
    assert "results/plots/sparse-test.svg" in text
    details = (results_folder / "tables.md").read_text(encoding="utf-8")
    assert "10 us (9 us–12 us)" in details
    assert "run `make peers`" in details


def test_writing_twice_changes_nothing(results_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tables(results_folder) == 0
    capsys.readouterr()
    assert run_tables(results_folder) == 0
    assert capsys.readouterr().out == ""
    assert run_tables(results_folder, "--check") == 0


def test_check_fails_on_a_stale_readme(results_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = results_folder.parent / "README.md"
    before = readme.read_text(encoding="utf-8")
    assert run_tables(results_folder, "--check") == 1
    assert "README.md" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == before  # checking writes nothing
    assert not (results_folder / "tables.md").exists()
    assert not (results_folder / "plots").exists()
    assert run_tables(results_folder) == 0
    readme.write_text(readme.read_text(encoding="utf-8").replace("20 / 10 / 4.0", "99 / 10 / 4.0", 1), encoding="utf-8")
    assert run_tables(results_folder, "--check") == 1


def test_check_fails_on_new_results(results_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tables(results_folder) == 0
    path = results_folder / "sparse-test.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"median": 1e-05', '"median": 2e-05'), encoding="utf-8")
    capsys.readouterr()
    assert run_tables(results_folder, "--check") == 1
    stale = capsys.readouterr().err
    assert "README.md" in stale
    assert "tables.md" in stale
    assert "sparse-test.svg" in stale
    assert "block_sparse-test.svg" not in stale


@pytest.mark.parametrize(
    "text",
    [
        "no markers at all",
        "<!-- bench:sparse --> never closed <!-- bench:block_sparse --> <!-- /bench -->",
        2 * "<!-- bench:sparse --><!-- /bench -->" + "<!-- bench:block_sparse --><!-- /bench -->",
    ],
)
def test_broken_markers(results_folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    readme = results_folder.parent / "README.md"
    readme.write_text(text, encoding="utf-8")
    assert run_tables(results_folder) == 2
    assert "bench:sparse" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == text


def test_no_results_yet(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- bench:sparse --><!-- /bench -->", encoding="utf-8")
    (tmp_path / "results").mkdir()
    assert run_tables(tmp_path / "results") == 0
    assert "No results are committed yet." in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert run_tables(tmp_path / "results", "--check") == 0


def test_ratios_read_well() -> None:
    assert [tables.ratio(v) for v in (None, 0.5, 0.994, 0.996, 4.04, 9.96, 22.4)] == [
        "–", "0.50", "0.99", "1.0", "4.0", "10", "22",
    ]  # fmt: skip


def test_plots_are_reproducible(tmp_path: Path, sparse_results: Results, block_results: Results) -> None:
    for results in (sparse_results, block_results):
        path = plots.draw(results, tmp_path)
        assert path is not None
        assert plots.is_current(results, tmp_path)
        first = path.read_bytes()
        path.unlink()
        assert not plots.is_current(results, tmp_path)
        plots.draw(results, tmp_path)
        assert path.read_bytes() == first
    assert plots.draw(Results(**{**vars(sparse_results), "cases": []}), tmp_path) is None


# --- targets ----------------------------------------------------------------------------------------------------------


def outcome(results: Results, text: str) -> targets.Outcome:
    return next(o for o in targets.outcomes(results) if o.target.text == text)


def test_targets_met_and_missed(sparse_results: Results) -> None:
    met = outcome(sparse_results, "linear, M >= 64, 90%, over DeepSparse")
    assert (met.verdict, met.wanted, met.cases, met.met) == ("met", 1.8, 1, 1)
    assert met.reached == pytest.approx(4.0)
    missed = outcome(sparse_results, "linear, M >= 64, 95%, over torch")
    assert (missed.verdict, missed.wanted) == ("missed", 22.0)
    assert missed.reached == pytest.approx(20.0)
    assert missed.worst == "1024x1024_m64 at 95%"
    dense = outcome(sparse_results, "linear, from 60% on, over best dense")
    assert (dense.verdict, dense.cases) == ("met", 4)
    assert dense.reached == pytest.approx(10.0)
    assert outcome(sparse_results, "linear, M 1-16, 80-95%, over DeepSparse").verdict == "not measured"


def test_the_worst_case_decides(sparse_results: Results, make_case: Callable[..., Case]) -> None:
    slow = at_densities([BENCH_LINEAR[3]], [0.1])[0]
    sparse_results.cases.append(make_case(slow, {"slimtorch-sparse": 5e-5, "torch": 2e-4, "deepsparse": 4e-5}))
    worst = outcome(sparse_results, "linear, M >= 64, 90%, over DeepSparse")
    assert (worst.verdict, worst.met, worst.cases) == ("missed", 1, 2)
    assert worst.reached == pytest.approx(0.8)
    assert worst.worst == f"{slow.name} at 90%"


def test_block_targets_follow_the_density(block_results: Results) -> None:
    met = outcome(block_results, "linear, M >= 64, blocks 16x16, over best dense: 0.85 / density")
    assert met.verdict == "met"
    assert met.cases == 2
    assert met.reached == pytest.approx(met.wanted / 0.85)  # type: ignore[operator]
    assert outcome(block_results, "linear, M >= 64, blocks 4x16, over best dense: 0.85 / density").cases == 0


def test_targets_command(results_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in sorted(results_folder.glob("*.json"))]
    assert targets.main(files) == 0
    printed = capsys.readouterr().out
    assert "targets: sparse (sparse-test)" in printed
    assert "missed" in printed
    assert "met" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert targets.main([*files, "--strict"]) == 1
    capsys.readouterr()
    assert targets.main([*files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["columns"][0] == "target"


def test_targets_of_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main([str(tmp_path / "nothing.json")]) == 2
    assert "nothing.json" in capsys.readouterr().err


def test_the_page_of_experiments(
    results_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables and plots of an experiment come from its JSON; another JSON makes both stale."""
    module = SimpleNamespace(
        tables=lambda found: [Table("Errors", ["method", "error"], [["ours", found["error"]]], ["5 seeds"])],
        figures=lambda found: [("found-curve", "A curve.", experiments.plots.new_figure(1)[0])],
    )
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"known": ("known", "about")})
    monkeypatch.setattr(experiments, "_module", lambda name: module)
    machine = {"cpu": "c", "threads": 1, "dtype": "float32", "isa": "avx2", "torch": "2", "slimtorch": "0"}
    stored = results_folder / "experiments" / "known.json"
    stored.parent.mkdir()
    page = results_folder.parent / "docs" / "experiments.md"
    page.parent.mkdir()
    page.write_text("# Page\n\n<!-- bench:known -->\nold\n<!-- /bench -->\n", encoding="utf-8")
    assert run_tables(results_folder) == 0
    assert "No results are committed yet." in page.read_text(encoding="utf-8")
    plot = page.parent / "img" / "found-curve.png"
    for error in (0.5, 0.25):
        stored.write_text(json.dumps({"data": "digits", "machine": machine, "error": error}), encoding="utf-8")
        assert run_tables(results_folder, "--check") == 1
        assert str(page) in (said := capsys.readouterr().err)
        assert str(plot) in said
        assert run_tables(results_folder) == 0
        text = page.read_text(encoding="utf-8")
        assert f"| ours | {error:.3f} |" in text
        assert "On digits. c, 1 thread, float32" in text
        assert "![A curve.](img/found-curve.png)" in text
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert run_tables(results_folder, "--check") == 0
    page.write_text("<!-- bench:unknown -->\n<!-- /bench -->\n", encoding="utf-8")
    assert run_tables(results_folder) != 0
    assert "expected an experiment, one of known" in capsys.readouterr().err
