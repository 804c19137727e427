# SPDX-License-Identifier: Apache-2.0
"""What the benchmark modules share: options, the loop over cases, the file, the table on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import machine, peers
from bench.contenders import time_problem
from bench.results import Case, Results, describe
from bench.timing import Settings, Timing
from slimtorch.report import Table
from tests.problems import ConvProblem, LinearProblem, Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Benchmark:
    """One family's benchmark: the problems of its full and of its quick grid, before densities and block sizes."""

    name: str
    about: str
    blocks: bool
    problems: tuple[Problem, ...]
    quick_problems: tuple[Problem, ...]
    sparsities: tuple[float, ...]
    quick_sparsities: tuple[float, ...]
    block_sizes: tuple[tuple[int, int], ...] = ((1, 1),)
    quick_block_sizes: tuple[tuple[int, int], ...] = ((1, 1),)


def positive(text: str) -> int:
    """An option's value as a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def density(text: str) -> float:
    """An option's value as a share in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a density in (0, 1], the share of weights kept, got {text}")
    return value


def block_size(text: str) -> tuple[int, int]:
    """An option's value such as `4x16`."""
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS such as 16x16, got {text}")
    return positive(parts[0]), positive(parts[1])


def parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    """Command line of one benchmark."""
    options = argparse.ArgumentParser(prog=f"python -m bench.{benchmark.name}", description=benchmark.about)
    options.add_argument("--quick", action="store_true", help="few shapes and short samples: a first look")
    options.add_argument("--only", choices=("linear", "conv"), help="one kind of layer")
    for name, what in (("m", "rows of x"), ("n", "output features"), ("k", "input features")):
        options.add_argument(
            f"--{name}", type=positive, nargs="+", help=f"{what}; linear layers of these sizes instead"
        )
    options.add_argument("--density", type=density, nargs="+", help="shares of the weights that are kept")
    if benchmark.blocks:
        options.add_argument("--block-size", type=block_size, nargs="+", metavar="RxC", help="such as 16x16 4x16")
    options.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["float32"])
    options.add_argument("--threads", type=positive, nargs="+", default=[1], help="default: 1")
    options.add_argument("--rounds", type=positive, help="samples of each contender (default 15, quick 5)")
    options.add_argument("--sample-ms", type=float, help="shortest sample in ms (default 5, quick 2)")
    options.add_argument("--no-peers", action="store_true", help="leave DeepSparse and ONNX Runtime out")
    options.add_argument("--no-ours", action="store_true", help="time the rivals alone")
    options.add_argument(
        "--peers-python",
        type=Path,
        default=peers.DEFAULT_PYTHON,
        help="Python of the peers' environment (default: the one that `make peers` builds)",
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write results here; continues an interrupted run")
    return options


def problems(benchmark: Benchmark, options: argparse.Namespace) -> list[Problem]:
    """The grid that the options ask for, cheap thread counts and dtypes outermost."""
    shapes: Sequence[Problem] = benchmark.quick_problems if options.quick else benchmark.problems
    if options.m or options.n or options.k:
        sizes = itertools.product(options.n or [1024], options.k or [1024], options.m or [1, 16, 64, 256])
        shapes = [LinearProblem(f"{n}x{k}_m{m}", m, n, k) for n, k, m in sizes]
    if options.only:
        wanted = LinearProblem if options.only == "linear" else ConvProblem
        shapes = [problem for problem in shapes if isinstance(problem, wanted)]
    sparsities = benchmark.quick_sparsities if options.quick else benchmark.sparsities
    densities = options.density or [round(1 - sparsity, 9) for sparsity in sparsities]
    block_sizes = (benchmark.quick_block_sizes if options.quick else benchmark.block_sizes) or ((1, 1),)
    if benchmark.blocks and options.block_size:
        block_sizes = tuple(options.block_size)
    return [
        replace(problem, density=share, dtype=DTYPES[dtype], block_size=size)
        for dtype in options.dtype
        for problem in shapes
        for size in block_sizes
        for share in densities
    ]


def settings(options: argparse.Namespace, threads: int) -> Settings:
    """How long to measure; ValueError for a sample that is not positive."""
    rounds = options.rounds or (5 if options.quick else 15)
    milliseconds = options.sample_ms if options.sample_ms is not None else (2.0 if options.quick else 5.0)
    return Settings(rounds, milliseconds * 1e-3, pause_seconds=0.0 if threads == 1 else 2e-3)


def _continue(fresh: Results, path: Path, wanted: set[str]) -> Results:
    """What an interrupted run with the same machine, source and settings left in `path`, or `fresh`.

    Of its cases only the `wanted` ones (by key) are kept.
    """
    if not path.exists():
        return fresh
    earlier = Results.load(path)  # refuses, rather than overwrites, a file that is something else
    if earlier.complete or not earlier.same_setup(fresh):
        return fresh
    earlier.path = None
    earlier.cases = [case for case in earlier.cases if case.key in wanted]
    return earlier


def run(benchmark: Benchmark, options: argparse.Namespace, console: Console) -> Results:
    """Measure every case and return the results; with `options.json` the file is written after each case."""
    grid = problems(benchmark, options)
    if not grid:
        raise ValueError("no case is left by these options")
    results: Results | None = None
    cores = machine.cores()
    if max(options.threads) > len(cores):
        raise ValueError(
            f"threads: expected at most the {len(cores)} cores this process may use, got {max(options.threads)}"
        )
    for threads in sorted(set(options.threads)):
        timing = settings(options, threads)
        with contextlib.ExitStack() as stack:
            stack.enter_context(machine.restricted(cores, threads))
            engines = None
            if not options.no_peers:
                engines = stack.enter_context(peers.Peers(options.peers_python, threads))
            if results is None:
                results = Results(
                    benchmark=benchmark.name,
                    date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                    machine=machine.machine(),
                    versions=machine.versions() | (engines.versions if engines else {}),
                    source=machine.source(),
                    settings={"rounds": timing.rounds, "sample_seconds": timing.sample_seconds},
                    complete=False,
                    cases=[],
                )
                if options.json:
                    wanted = {Case(describe(problem), t, []).key for problem in grid for t in options.threads}
                    results = _continue(results, options.json, wanted)
            _measure(benchmark, options, grid, threads, timing, engines, results, console)
    assert results is not None
    results.complete = True
    if options.json:
        results.save(options.json)
    return results


def _measure(
    benchmark: Benchmark,
    options: argparse.Namespace,
    grid: Sequence[Problem],
    threads: int,
    timing: Settings,
    engines: peers.Peers | None,
    results: Results,
    console: Console,
) -> None:
    done = {case.key for case in results.cases}
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    # Refreshed by hand: a thread that redraws the bar would run inside the samples.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task(benchmark.name, total=len(grid))
        for problem in grid:
            progress.update(task, description=f"{problem.name} {1 - problem.density:.0%}", refresh=True)
            if Case(describe(problem), threads, []).key not in done:
                timings, unavailable = time_problem(
                    problem, timing, blocks=benchmark.blocks, threads=threads, peers=engines, ours=not options.no_ours
                )
                results.cases.append(Case(describe(problem), threads, timings, unavailable))
                if options.json:
                    results.save(options.json)
            progress.advance(task)


def _microseconds(timing: Timing | None) -> float | int | None:
    if timing is None:
        return None
    value = timing.median * 1e6
    return round(value) if value >= 100 else round(value, 1)


def table(results: Results) -> Table:
    """All cases, one line each: microseconds of every contender that matters and our ratios to them."""
    blocks = results.benchmark == "block_sparse"
    threads = sorted({case.threads for case in results.cases})
    kernel = "torch-bsr" if blocks else "mkl-csr"
    optional = [*(["block"] if blocks else []), *(["thr"] if len(threads) > 1 else [])]
    columns = ["problem", *optional, "zero %", "torch", "dense", kernel.split("-")[1], "DeepSp", "ORT", "ours"]
    columns += ["/torch", "/dense", "/DeepSp"]
    rows: list[list[object]] = []
    reasons: dict[str, str] = {}
    for case in results.cases:
        dense, deepsparse = case.best_dense(), case.timing("deepsparse")
        measured = (
            case.timing("torch"),
            dense,
            case.timing(kernel),
            deepsparse,
            case.timing("onnxruntime"),
            case.ours(),
        )
        name = case.name if case.dtype == "float32" else f"{case.name} bf16"
        row: list[object] = [name]
        row += [{"block": case.block_size, "thr": case.threads}[column] for column in optional]
        row += [f"{100 * case.sparsity:g}", *(_microseconds(timing) for timing in measured)]
        row += [case.speedup(rival) for rival in (case.timing("torch"), dense, deepsparse)]
        rows.append(row)
        reasons.update(case.unavailable)
    notes = [
        f"microseconds a call, median of {results.settings['rounds']} interleaved samples; dense: the fastest dense "
        "kernel; the last three: how many times faster we are",
        *(f"not everywhere: {name} ({reason[:160]})" for name, reason in sorted(reasons.items())),
    ]
    noisy = sum(timing.p90 > 1.25 * timing.p10 for case in results.cases for timing in case.timings)
    if noisy:
        total = sum(len(case.timings) for case in results.cases)
        notes.append(f"noisy: p90 is more than 1.25 times p10 in {noisy} of {total} timings; was the machine busy?")
    cpu = results.machine
    title = f"{results.benchmark} on {cpu['cpu']}, our kernels: {cpu['isa']}"
    if len(threads) == 1:
        title += f", {threads[0]} thread{'s' if threads[0] > 1 else ''}"
    return Table(title, columns, rows, notes)


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Entry point of a benchmark module; returns the exit code."""
    return guarded(lambda: _main(benchmark, arguments))


def _main(benchmark: Benchmark, arguments: Sequence[str] | None) -> int:
    options = parser(benchmark).parse_args(arguments)
    results = run(benchmark, options, Console(stderr=True))
    print(table(results))
    return 0


def guarded(body: Callable[[], int]) -> int:
    """Run `body`; bad options and files end in one line and exit code 2, an interruption in 130."""
    try:
        return body()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
