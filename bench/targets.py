# SPDX-License-Identifier: Apache-2.0
"""The speeds this library sets itself, each as a ratio to a rival timed in the same run: `python -m bench.targets`.

For each target: the ratio wanted, the ratio reached in the case that is furthest behind, and in how many cases it was
met. "Best dense" is the fastest dense kernel that torch can reach for that problem, oneDNN and MKL with prepacked
weights included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.results import Case, Results, load_all
from bench.run import guarded
from bench.timing import Timing
from slimtorch.report import Table
from tests.problems import BLOCK_SIZES


@dataclass(frozen=True)
class Target:
    """At least `wanted(case)` times faster than `rival(case)` in every case of `benchmark` that `applies`."""

    benchmark: str
    text: str
    rival: Callable[[Case], Timing | None]
    wanted: Callable[[Case], float]
    applies: Callable[[Case], bool]


@dataclass(frozen=True)
class Outcome:
    """A target held against results. `wanted` and `reached` are of the case with the least `reached / wanted`."""

    target: Target
    cases: int
    met: int
    wanted: float | None
    reached: float | None
    worst: str | None

    @property
    def verdict(self) -> str:
        if not self.cases:
            return "not measured"
        return "met" if self.met == self.cases else "missed"


def _rival(contender: str) -> Callable[[Case], Timing | None]:
    return lambda case: case.timing(contender)


def _best_dense(case: Case) -> Timing | None:
    return case.best_dense()


def _best_dense_same_dtype(case: Case) -> Timing | None:
    return case.best_dense(same_dtype=True)


def _ratio(value: float) -> Callable[[Case], float]:
    return lambda case: value


def _is(
    *,
    kind: str | None = None,
    dtype: str = "float32",
    rows: tuple[int, int] | None = None,
    sparsity: float | None = None,
    sparsities: tuple[float, float] = (0.0, 1.0),
    block_size: tuple[int, int] | None = None,
) -> Callable[[Case], bool]:
    """Cases on one thread with these properties; ranges include both ends."""

    def applies(case: Case) -> bool:
        return (
            case.threads == 1
            and case.dtype == dtype
            and kind in (None, case.kind)
            and (rows is None or (case.rows is not None and rows[0] <= case.rows <= rows[1]))
            and (sparsity is None or abs(case.sparsity - sparsity) < 1e-6)
            and sparsities[0] - 1e-6 <= case.sparsity <= sparsities[1] + 1e-6
            and block_size in (None, case.block_size)
        )

    return applies


_ANY_MORE = 1 << 62


def _targets() -> list[Target]:
    lines = []
    wide = (64, _ANY_MORE)
    for sparsity, over_deepsparse, over_torch in ((0.8, 1.5, 5.0), (0.9, 1.8, 12.0), (0.95, 2.5, 22.0)):
        at = _is(kind="linear", rows=wide, sparsity=sparsity)
        percent = f"{sparsity:.0%}"
        text = f"linear, M >= 64, {percent}, over"
        lines.append(Target("sparse", f"{text} DeepSparse", _rival("deepsparse"), _ratio(over_deepsparse), at))
        lines.append(Target("sparse", f"{text} torch", _rival("torch"), _ratio(over_torch), at))
    few = _is(kind="linear", rows=(1, 16), sparsities=(0.8, 0.95))
    lines.append(Target("sparse", "linear, M 1-16, 80-95%, over DeepSparse", _rival("deepsparse"), _ratio(3.0), few))
    for kind in ("linear", "conv"):
        from60 = _is(kind=kind, sparsities=(0.6, 1.0))
        lines.append(Target("sparse", f"{kind}, from 60% on, over best dense", _best_dense, _ratio(1.0), from60))
    conv = _is(kind="conv", sparsities=(0.8, 0.95))
    lines.append(Target("sparse", "conv, 80-95%, over DeepSparse", _rival("deepsparse"), _ratio(1.3), conv))
    bf16 = _is(kind="linear", dtype="bfloat16", rows=wide, sparsities=(0.8, 1.0))
    text = "linear bf16, M >= 64, from 80% on, over best dense bf16"
    lines.append(Target("sparse", text, _best_dense_same_dtype, _ratio(1.0), bf16))
    one = _is(kind="linear", dtype="bfloat16", rows=(1, 1), sparsity=0.9)
    text = "linear bf16, M = 1, 90%, over best dense bf16"
    lines.append(Target("sparse", text, _best_dense_same_dtype, _ratio(3.0), one))
    for block_size in BLOCK_SIZES:
        at = _is(kind="linear", rows=wide, block_size=block_size)
        text = f"linear, M >= 64, blocks {block_size[0]}x{block_size[1]}, over best dense: 0.85 / density"
        lines.append(Target("block_sparse", text, _best_dense, lambda case: 0.85 / case.density, at))
    return lines


TARGETS: tuple[Target, ...] = tuple(_targets())


def evaluate(target: Target, results: Results) -> Outcome:
    """Hold one target against one file of results; cases without ours or without the rival do not count."""
    judged: list[tuple[float, float, Case]] = []
    if results.benchmark == target.benchmark:
        for case in results.cases:
            reached = case.speedup(target.rival(case)) if target.applies(case) else None
            if reached is not None:
                judged.append((reached, target.wanted(case), case))
    if not judged:
        return Outcome(target, 0, 0, None, None, None)
    reached, wanted, worst = min(judged, key=lambda item: item[0] / item[1])
    name = f"{worst.name} at {worst.sparsity:.0%}"
    return Outcome(target, len(judged), sum(r >= w for r, w, _ in judged), wanted, reached, name)


def outcomes(results: Results) -> list[Outcome]:
    """Every target of the results' benchmark, in the order of `TARGETS`."""
    return [evaluate(target, results) for target in TARGETS if target.benchmark == results.benchmark]


def table(results: Results) -> Table:
    """The outcomes as a table."""
    rows: list[list[object]] = [
        [o.target.text, o.wanted, o.reached, o.worst, f"{o.met} of {o.cases}" if o.cases else None, o.verdict]
        for o in outcomes(results)
    ]
    columns = ["target", "wanted", "reached", "in the case", "cases met", "verdict"]
    cpu = results.machine
    notes = [
        f"{cpu['cpu']}, kernels {cpu['isa']}, one thread; wanted and reached: times faster, in the case furthest behind"
    ]
    return Table(f"targets: {results.benchmark} ({results.stem})", columns, rows, notes)


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description="Hold results against the targets.")
    parser.add_argument("files", type=Path, nargs="*", help="results (default: every committed one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--strict", action="store_true", help="exit code 1 where a target is missed")
    options = parser.parse_args(arguments)
    every = [Results.load(path) for path in options.files] or load_all()
    if not every:
        raise ValueError("no results: run `python -m bench.sparse --json bench/results/NAME.json` first")
    tables = [table(results) for results in every]
    if options.json:
        print(json.dumps([item.to_dict() for item in tables], indent=1))
    else:
        print("\n\n".join(map(str, tables)))
    missed = any(outcome.verdict == "missed" for results in every for outcome in outcomes(results))
    return 1 if options.strict and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
