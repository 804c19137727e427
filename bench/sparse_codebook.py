# SPDX-License-Identifier: Apache-2.0
"""Sparse shared weights against unstructured float32 and dense ones: `python -m bench.sparse_codebook --help`.

All hold the same values, so that all compute the same product: outputs are compared with float64 before they are timed,
and contenders take turns. Beside the times stand the bytes a nonzero takes in memory, plan included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench import machine
from bench.codebook import mkl, onednn
from bench.run import density, guarded, positive
from bench.timing import Contender, Reference, Settings, Timing, WrongResultError, interleave, local
from slimtorch import nn as slim_nn
from slimtorch.formats import Sparse, SparseCodebook
from slimtorch.report import Table, format_seconds
from tests.problems import masked_matrix

SIZES, ROWS, BITS, DENSITIES = (1024, 4096), (1, 16, 64, 256), (4, 5, 8), (0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Case:
    """`y [m, n] = x [m, n] @ weight [n, n].T`, float32, with one table of 2**bits values."""

    m: int
    n: int
    bits: int
    density: float

    def weight(self) -> SparseCodebook:
        pattern = masked_matrix(self.n, self.n, self.density, self.bits)
        rows, columns = pattern.nonzero().unbind(1)
        draw = torch.Generator().manual_seed(self.bits)
        tables = torch.randn(1, 1 << self.bits, generator=draw)
        indices = torch.randint(0, 1 << self.bits, rows.shape, dtype=torch.uint8, generator=draw)
        return SparseCodebook.from_positions(tables, indices, rows, columns, (self.n, self.n))

    def input(self) -> Tensor:
        return torch.randn(self.m, self.n, generator=torch.Generator().manual_seed(1))


def contenders(case: Case, weight: SparseCodebook, x: Tensor, dense: Tensor) -> list[tuple[str, Any]]:
    """Name and builder of every contender; builders raise where there is nothing to compare with."""
    twin = torch.nn.Linear(case.n, case.n, bias=False, device="meta")
    ours = slim_nn.SparseCodebookLinear.from_format(twin, weight).eval()
    sparse = slim_nn.SparseLinear.from_format(twin, Sparse.pack(dense)).eval()
    return [
        ("slimtorch", lambda: local("slimtorch", "ours", "SparseCodebookLinear", lambda: ours(x))),
        ("slimtorch-sparse", lambda: local("slimtorch-sparse", "ours", "SparseLinear", lambda: sparse(x))),
        ("torch", lambda: local("torch", "dense", "F.linear", lambda: F.linear(x, dense))),
        ("onednn", lambda: local("onednn", "dense", "torch.utils.mkldnn", onednn(x, dense))),
        ("mkl", lambda: local("mkl", "dense", "MKL, prepacked", mkl(x, dense))),
    ]


def bytes_per_nonzero(weight: SparseCodebook) -> float:
    """Of everything that execution keeps: the format and its plan."""
    plan = weight.plan()
    return (weight.nbytes + (0 if plan is None else plan.numel())) / weight.nnz


def measure(case: Case, weight: SparseCodebook, settings: Settings) -> tuple[list[Timing], dict[str, str]]:
    """Verify, then time everybody; the reason for each who cannot take part."""
    x, dense = case.input(), weight.to_dense()
    value = F.linear(x.double(), dense.double())
    exact = case.n * 2.0**-24 * F.linear(x.double().abs(), dense.double().abs()) + 2.0**-23 * value.abs()
    ready: list[Contender] = []
    errors: list[float] = []
    unavailable: dict[str, str] = {}
    for name, build in contenders(case, weight, x, dense):
        try:
            contender = build()
            error = Reference(value, exact).verify(name, contender.result())
        except (NotImplementedError, RuntimeError, WrongResultError) as failure:
            if name.startswith("slimtorch"):
                raise
            unavailable[name] = " ".join(str(failure).split())[:160]
        else:
            ready.append(contender)
            errors.append(error)
    return interleave(ready, settings, errors), unavailable


def row(case: Case, size: float, timings: Sequence[Timing]) -> list[object]:
    """Times of everybody, our ratios, bytes per nonzero."""
    by_name = {timing.contender: timing.median for timing in timings}
    best = min(t.median for t in timings if t.role == "dense")
    times = [by_name["slimtorch"], by_name["slimtorch-sparse"], by_name["torch"], best]
    return [
        f"{case.n}² m{case.m} {100 * (1 - case.density):g}% {case.bits}b",
        *(format_seconds(t) for t in times),
        *(t / times[0] for t in times[1:]),
        size,
    ]


COLUMNS = ["problem", "ours", "sparse", "torch", "dense", "/sparse", "/torch", "/dense", "bytes/nz"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sparse_codebook", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1024 only, short samples")
    parser.add_argument("--size", type=positive, nargs="+", help=f"inputs and outputs (default {SIZES})")
    parser.add_argument("--m", type=positive, nargs="+", default=list(ROWS), help="rows of x")
    parser.add_argument("--bits", type=int, choices=range(1, 9), nargs="+", default=list(BITS))
    parser.add_argument("--density", type=density, nargs="+", default=list(DENSITIES), help="share of weights kept")
    parser.add_argument("--rounds", type=positive, help="samples of each contender (default 15, quick 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return guarded(lambda: run(parser.parse_args()))


def run(options: argparse.Namespace) -> int:
    sizes = options.size or (SIZES[:1] if options.quick else SIZES)
    settings = Settings(options.rounds or (5 if options.quick else 15), 2e-3 if options.quick else 5e-3)
    rows: list[list[object]] = []
    content: list[dict[str, Any]] = []
    with machine.restricted(machine.cores(), 1), torch.inference_mode():
        for n in sizes:
            for share in options.density:
                for bits in options.bits:
                    weight = Case(1, n, bits, share).weight()
                    size = bytes_per_nonzero(weight)
                    for m in options.m:
                        case = Case(m, n, bits, share)
                        timings, unavailable = measure(case, weight, settings)
                        rows.append(row(case, size, timings))
                        timed = [asdict(t) for t in timings]
                        content.append(
                            {**asdict(case), "bytes_per_nonzero": size, "timings": timed, "unavailable": unavailable}
                        )
                    if options.json:
                        machine.save(options.json, "sparse_codebook", content, settings=asdict(settings))
    note = "median times of a call; then how many times faster we are, and bytes in memory with the plan"
    title = f"sparse codebook on {machine.machine()['cpu']}, our kernels: {machine.machine()['isa']}, 1 thread"
    Console().print(Table(title, COLUMNS, rows, [note]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
