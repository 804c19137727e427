# SPDX-License-Identifier: Apache-2.0
"""README tables, the full tables and the plots, all from the committed JSON: `python -m bench.tables [--check]`.

README.md holds `<!-- bench:sparse -->` ... `<!-- /bench -->`, one such pair for each benchmark; what stands between
the two is replaced. So it is in docs/experiments.md, with a pair for each experiment. `bench/results/tables.md` has
every figure with its spread. `--check` writes nothing and fails where any of these would change.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import experiments, plots, quantized
from bench.machine import ROOT
from bench.markdown import markdown, ratio
from bench.results import RESULTS_DIR, Case, Results, load_all
from bench.run import guarded
from bench.targets import outcomes
from bench.timing import Timing
from slimtorch.report import format_seconds

QUANTIZED = {
    "quantized": quantized.section,
    "deep-compression": quantized.deep_compression,
    "binary-networks": quantized.binary_networks,
}
# What README may hold; targets and quantized ones only where it has the marker.
SECTIONS = ("sparse", "block_sparse", "targets", *QUANTIZED)
_END = "<!-- /bench -->"


def _setup(results: Results) -> str:
    """Machine, kernels, versions, date: what every figure depends on."""
    cpu, versions = results.machine, results.versions
    known = {
        "torch": "torch",
        "onednn": "oneDNN",
        "mkl": "MKL",
        "deepsparse": "DeepSparse",
        "onnxruntime": "ONNX Runtime",
    }
    software = ", ".join(f"{label} {versions[name]}" for name, label in known.items() if versions.get(name))
    return f"{cpu['cpu']}, our kernels: {cpu['isa']}; {software}; {results.date[:10]}" + (
        "" if results.complete else "; INCOMPLETE RUN"
    )


def _groups(results: Results) -> dict[tuple[str, int], list[Case]]:
    """Cases by dtype and thread count, in order of appearance."""
    groups: dict[tuple[str, int], list[Case]] = {}
    for case in results.cases:
        groups.setdefault((case.dtype, case.threads), []).append(case)
    return groups


def _ordered_sparsities(cases: Sequence[Case]) -> list[float]:
    return sorted({case.sparsity for case in cases})


def _rivals(case: Case, block_sparse: bool) -> tuple[Timing | None, ...]:
    third = case.timing("torch-bsr" if block_sparse else "deepsparse")
    return case.timing("torch"), case.best_dense(), third


def _geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _cell(cases: Sequence[Case], block_sparse: bool) -> str:
    """Our speed-ups over the three rivals, geometric means where there are several cases."""
    cells = []
    for index in range(3):
        reached = [case.speedup(_rivals(case, block_sparse)[index]) for case in cases]
        cells.append(ratio(_geometric_mean([value for value in reached if value is not None])))
    return " / ".join(cells)


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def summary(results: Results) -> str:
    """The compact tables of one file: one line for each problem (unstructured) or block size (blocks)."""
    block_sparse = results.benchmark == "block_sparse"
    parts = [f"{_setup(results)}."]
    for (dtype, threads), cases in _groups(results).items():
        lines: dict[str, list[Case]] = {}
        sparsities = _ordered_sparsities(cases)
        if block_sparse:
            wide = [case for case in cases if case.rows is None or case.rows >= 64]
            rivals = "torch dense / best dense kernel of torch / torch BSR"
            scope = ", geometric mean over linear layers with M ≥ 64 and convolutions"
            first = "blocks"
            for case in wide:
                lines.setdefault(f"{case.block_size[0]}×{case.block_size[1]}", []).append(case)
        else:
            rivals, scope = "torch dense / best dense kernel of torch / DeepSparse", ""
            first = "layer"
            for case in cases:
                lines.setdefault(plots.title(case), []).append(case)
        columns = [first, *(f"{sparsity:.0%} zero" for sparsity in sparsities)]
        rows = [
            [
                name,
                *(_cell([case for case in line if case.sparsity == sparsity], block_sparse) for sparsity in sparsities),
            ]
            for name, line in lines.items()
        ]
        parts.append(f"Times faster than {rivals}{scope}; {dtype}, {_threads(threads)}:")
        parts.append(markdown(columns, rows))
    return "\n\n".join(parts)


def targets_summary(every: Sequence[Results]) -> str:
    """All targets of all files, met or missed."""
    parts = []
    for results in every:
        rows = [
            [
                outcome.target.text,
                ratio(outcome.wanted),
                ratio(outcome.reached),
                outcome.worst or "–",
                f"{outcome.met} of {outcome.cases}",
                outcome.verdict,
            ]
            for outcome in outcomes(results)
        ]
        columns = ["target", "wanted", "reached", "in the case furthest behind", "cases met", "verdict"]
        parts.append(f"{_setup(results)}.\n\n{markdown(columns, rows)}")
    return "\n\n".join(parts)


def section(name: str, every: Sequence[Results], *, readme: Path, folder: Path) -> str:
    """What belongs between the markers of `name`; `folder` is where results, tables.md and plots are."""
    if name in QUANTIZED:
        return QUANTIZED[name](folder) or "No results are committed yet."
    chosen = [results for results in every if name in ("targets", results.benchmark)]
    if not chosen:
        return "No results are committed yet."
    if name == "targets":
        return targets_summary(chosen)
    parts = []
    for results in chosen:
        parts.append(summary(results))
        if plots.plotted(results):
            link = os.path.relpath(plots.plot_path(results, folder / "plots"), readme.parent)
            parts.append(f"![speed-up against sparsity, {results.stem}]({Path(link).as_posix()})")
    details = os.path.relpath(folder / "tables.md", readme.parent)
    parts.append(f"Every figure with its spread: [{Path(details).as_posix()}]({Path(details).as_posix()}).")
    return "\n\n".join(parts)


def fill(text: str, every: Sequence[Results], *, readme: Path, folder: Path) -> str:
    """README's text with every section replaced; ValueError where a benchmark's markers are missing or broken."""
    for name in SECTIONS:
        optional = name in ("targets", *QUANTIZED) or not any(results.benchmark == name for results in every)
        if optional and f"<!-- bench:{name} -->" not in text:
            continue
        text = _replace(text, name, section(name, every, readme=readme, folder=folder), readme)
    return text


def _replace(text: str, name: str, content: str, page: Path) -> str:
    """The text with what stands between the markers of `name` replaced; ValueError where they are not there once."""
    begin = f"<!-- bench:{name} -->"
    pattern = re.compile(re.escape(begin) + r"(?:(?!<!-- bench:).)*?" + re.escape(_END), re.DOTALL)
    if text.count(begin) != 1 or not pattern.search(text):
        raise ValueError(f"{page}: expected {begin} once, with {_END} after it")
    return pattern.sub(lambda _: f"{begin}\n\n{content}\n\n{_END}", text)


def full(every: Sequence[Results]) -> str:
    """All cases of all files with median and spread of every contender, and why some could not take part."""
    parts = [
        "# Benchmark results",
        "Written by `python -m bench.tables`: median of interleaved samples (p10–p90) a call.",
    ]
    for results in every:
        parts.append(f"## {results.stem}")
        settings, source = results.settings, results.source
        parts.append(
            f"{_setup(results)}. {settings['rounds']} samples of at least "
            f"{format_seconds(float(settings['sample_seconds']))} each; "
            f"timed source {str(source['digest'])[:12]}"
            + (f", commit {str(source['commit'])[:12]}." if source["commit"] else ".")
        )
        for (dtype, threads), cases in _groups(results).items():
            contenders = list(dict.fromkeys(timing.contender for case in cases for timing in case.timings))
            blocks = ["blocks"] if results.benchmark == "block_sparse" else []
            rows = [
                [plots.title(case), *("{}×{}".format(*case.block_size) for _ in blocks), f"{case.sparsity:.0%}"]
                + [_spread(case.timing(name)) for name in contenders]
                for case in cases
            ]
            parts.append(f"### {dtype}, {_threads(threads)}")
            parts.append(markdown(["layer", *blocks, "zero", *contenders], rows))
        reasons = {name: reason for case in results.cases for name, reason in case.unavailable.items()}
        if reasons:
            parts.append("\n".join(f"- not everywhere: {name}: {reason}" for name, reason in sorted(reasons.items())))
    return "\n\n".join(parts) + "\n"


def _spread(timing: Timing | None) -> str:
    if timing is None:
        return "–"
    return f"{format_seconds(timing.median)} ({format_seconds(timing.p10)}–{format_seconds(timing.p90)})"


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description="Write tables and plots from results.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where something is out of date"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS_DIR, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    every = load_all(options.results)
    before = options.readme.read_text(encoding="utf-8")
    details = options.results / "tables.md"
    wanted = {options.readme: fill(before, every, readme=options.readme, folder=options.results)}
    if every:
        wanted[details] = full(every)
    page, drawings = options.readme.parent / "docs" / "experiments.md", []
    if page.exists():
        wanted[page] = text = page.read_text(encoding="utf-8")
        for name in experiments.sections(text):
            found = experiments.found(name, options.results)
            content = "No results are committed yet." if found is None else experiments.section(name, found, "img")
            wanted[page] = _replace(wanted[page], name, content, page)
            if found is not None:
                drawings += [(found, *plot) for plot in experiments.stale_plots(name, found, page.parent / "img")]
    folder = options.results / "plots"
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    undrawn = [results for results in every if plots.plotted(results) and not plots.is_current(results, folder)]
    if options.check:
        late = [*stale, *(plots.plot_path(results, folder) for results in undrawn), *(path for _, path, _ in drawings)]
        for path in late:
            print(f"out of date: {path}; run `python -m bench.tables`", file=sys.stderr)
        return 1 if late else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path}")
    for results in undrawn:
        print(f"wrote {plots.draw(results, folder)}")
    for found, path, figure in drawings:
        experiments.draw(found, path, figure)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
