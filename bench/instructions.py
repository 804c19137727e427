# SPDX-License-Identifier: Apache-2.0
"""Instructions of one contender's call, for where a ratio needs explaining: `python -m bench.instructions --help`.

Times drift with clocks and neighbours, instruction counts do not. The contender runs under `valgrind
--tool=callgrind`, which counts only while it is told to: torch's import and the packing run uninstrumented. Valgrind
knows no AVX-512, so it is the AVX2 kernels that are counted on every machine.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.contenders import builders
from bench.machine import ROOT
from bench.run import DTYPES, block_size, density, guarded, positive
from slimtorch.report import Table
from tests.problems import LinearProblem, Problem

_CALLS = 3


def _counted(problem: Problem, contender: str) -> None:
    """What runs under valgrind: build, warm up, count `_CALLS` calls."""
    build = dict(builders(problem, blocks=True))[contender]
    torch.set_num_threads(1)
    with torch.inference_mode():
        call = build().result
        call()
        for switch in ("on", "off"):
            subprocess.run(
                ["callgrind_control", f"--instr={switch}", str(os.getpid())], check=True, capture_output=True
            )
            for _ in range(_CALLS if switch == "on" else 0):
                call()


def count(arguments: Sequence[str], contender: str) -> int:
    """Instructions per call of `contender` on the problem that `arguments` select."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "callgrind.out"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={output}"]
        command += [sys.executable, "-m", "bench.instructions", *arguments, "--inside", contender]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        totals = re.findall(
            r"^(?:totals|summary):\s+(\d+)", output.read_text() if output.exists() else "", re.MULTILINE
        )
    if done.returncode or not totals:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("==")]
        raise ValueError(f"{contender}: not counted: {said[-1] if said else 'valgrind gave no totals'}")
    return int(totals[-1]) // _CALLS


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(lambda: _main(list(sys.argv[1:] if arguments is None else arguments)))


def _problem(options: argparse.Namespace) -> LinearProblem:
    return LinearProblem(
        f"{options.n}x{options.k}_m{options.m}",
        options.m,
        options.n,
        options.k,
        options.density,
        DTYPES[options.dtype],
        block_size=options.block_size,
    )


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.instructions", description="Count the instructions of one call of a linear layer."
    )
    parser.add_argument("--m", type=positive, default=64, help="rows of x")
    parser.add_argument("--n", type=positive, default=1024, help="output features")
    parser.add_argument("--k", type=positive, default=1024, help="input features")
    parser.add_argument("--density", type=density, default=0.1, help="share of the weights that are kept")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--block-size", type=block_size, default=(1, 1), metavar="RxC", help="blocks in the mask")
    parser.add_argument("--contender", nargs="+", default=["slimtorch-sparse", "torch", "onednn-prepacked"])
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    problem = _problem(options)
    if options.inside:
        _counted(problem, options.inside)
        return 0
    known = [name for name, _ in builders(problem, blocks=True)]
    for contender in options.contender:
        if contender not in known:
            raise ValueError(f"contender: expected one of {', '.join(known)}, got {contender}")
    for tool in ("valgrind", "callgrind_control"):
        if shutil.which(tool) is None:
            raise ValueError(f"{tool} is not installed")
    rows: list[list[object]] = []
    for contender in options.contender:
        instructions = count(arguments, contender)
        rows.append([contender, instructions, instructions / (problem.dense_flops * problem.density)])
    columns = ["contender", "instructions a call", "per useful flop"]
    print(Table(f"{problem.name}, {1 - problem.density:.0%} zero, under callgrind (AVX2 at most)", columns, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
