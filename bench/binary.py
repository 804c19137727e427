# SPDX-License-Identifier: Apache-2.0
"""Binary layers against dense ones: `python -m bench.binary --help`.

Sign x sign and signs x float, linear and conv2d, with packing of the activations inside the timing. Contenders take
turns, and their outputs are compared with float64 before they are timed; dense rivals are given the signs, and do not
have to take them. larq's engine is for ARM and installs nowhere here. A popcount roof is measured in the same run: xor,
popcount and add in registers, in general registers and (where there is one) in vectors.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils import mkldnn as torch_mkldnn

from bench import machine
from bench.run import guarded, positive
from bench.timing import Contender, Reference, Settings, Timing, WrongResultError, interleave, local
from slimtorch import nn as slim_nn
from slimtorch import reference
from slimtorch.report import Table
from tests.problems import ConvProblem, LinearProblem, Problem

SIGNS: tuple[Problem, ...] = (
    LinearProblem("1024x1024_m1024", 1024, 1024, 1024),
    *(LinearProblem(f"4096x4096_m{m}", m, 4096, 4096) for m in (1, 16, 64, 256, 1024)),
    *(ConvProblem(f"conv3x3_256_256_14_b{b}", b, 256, 256, 14, 14, padding=(1, 1)) for b in (1, 16)),
)
FLOATS: tuple[Problem, ...] = (
    *(LinearProblem(f"4096x4096_m{m}", m, 4096, 4096) for m in (1, 64)),
    ConvProblem("conv3x3_256_256_14_b1", 1, 256, 256, 14, 14, padding=(1, 1)),
)

ROOF = r"""
#include <stdint.h>
#include <time.h>
#if defined(__AVX512VPOPCNTDQ__)
#include <immintrin.h>
#endif
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
/* GOP/s, a bit pair counts 2. Eight independent sums, so that throughput counts and not latency. */
double roof_scalar(void) {
  uint64_t s[8] = {0}, x = 0x9e3779b97f4a7c15u;
  const long n = 4000000;
  const double begin = now();
  for (long i = 0; i < n; ++i) {
#define STEP(j) { uint64_t t = x; __asm__ volatile("xor %2, %0\n\tpopcnt %0, %0\n\tadd %0, %1" \
                                                   : "+r"(t), "+r"(s[j]) : "r"(i)); }
    STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7)
  }
  return 8.0 * 128 * n / (now() - begin) * 1e-9;
}
double roof_vector(void) {
#if defined(__AVX512VPOPCNTDQ__)
  __m512i s[16], x = _mm512_set1_epi64(0x9e3779b97f4a7c15);
  for (int j = 0; j < 16; ++j) s[j] = _mm512_setzero_si512();
  const long n = 2000000;
  const double begin = now();
  for (long i = 0; i < n; ++i) {
    const __m512i y = _mm512_set1_epi64(i);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      __m512i t = _mm512_xor_si512(x, y);
      __asm__ volatile("vpopcntq %0, %0" : "+v"(t));
      s[j] = _mm512_add_epi64(s[j], t);
      __asm__ volatile("" : "+v"(s[j]));
    }
  }
  return 16.0 * 1024 * n / (now() - begin) * 1e-9;
#else
  return 0;
#endif
}
"""


def roofs() -> dict[str, float]:
    """GOP/s of xor, popcount and add in registers, best of several; nothing where there is no C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "roof.c", Path(folder) / "roof.so"
        source.write_text(ROOF, encoding="utf-8")
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return {}
        loaded = ctypes.CDLL(str(library))
        found = {}
        for name in ("scalar", "vector"):
            function = getattr(loaded, f"roof_{name}")
            function.restype = ctypes.c_double
            found[name] = max(function() for _ in range(7))
    return {name: value for name, value in found.items() if value}


def dense_call(problem: Problem, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    if isinstance(problem, LinearProblem):
        return lambda: F.linear(x, weight)
    return lambda: F.conv2d(x, weight, None, problem.stride, problem.padding, problem.dilation, problem.groups)


def twin(problem: Problem, weight: Tensor) -> torch.nn.Linear | torch.nn.Conv2d:
    layer: torch.nn.Linear | torch.nn.Conv2d
    if isinstance(problem, LinearProblem):
        layer = torch.nn.Linear(problem.k, problem.n, bias=False)
    else:
        layer = torch.nn.Conv2d(
            problem.c_in, problem.c_out, problem.kernel, problem.stride, problem.padding, problem.dilation,
            problem.groups, bias=False,
        )  # fmt: skip
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer.eval()


def ours(problem: Problem, x: Tensor, weight: Tensor, binarize: bool) -> Callable[[], Tensor]:
    layer = twin(problem, weight)
    if isinstance(layer, torch.nn.Linear):
        packed: torch.nn.Module = slim_nn.BinaryLinear.from_dense(layer, binarize_input=binarize)
    else:
        packed = slim_nn.BinaryConv2d.from_dense(layer, binarize_input=binarize)
    return lambda: packed(x)


def onednn(problem: Problem, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    packed = torch_mkldnn.to_mkldnn(twin(problem, weight))
    return lambda: packed(x.to_mkldnn()).to_dense()


def bfloat16(problem: Problem, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise NotImplementedError("no fast bfloat16 on this processor")
    return dense_call(problem, x.bfloat16(), weight.bfloat16())


def mkl(problem: Problem, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    if not isinstance(problem, LinearProblem):
        raise NotImplementedError("linear layers only")
    packed, rows = torch.ops.mkl._mkl_reorder_linear_weight(weight, problem.m), problem.m
    return lambda: torch.ops.mkl._mkl_linear(x, packed, weight, None, rows)


def measure(problem: Problem, binarize: bool, settings: Settings) -> tuple[list[Timing], dict[str, str]]:
    """Verify, then time everybody; the reason for each who cannot take part."""
    problem = replace(problem, density=1.0)
    x = problem.input()
    weight = torch.where(problem.weight() >= 0, 1.0, -1.0)
    given = reference.binarize(x) if binarize else x
    value = dense_call(problem, given.double(), weight.double())()
    size = dense_call(problem, given.double().abs(), weight.double().abs())()
    builders: dict[str, tuple[str, Callable[[], Callable[[], Tensor]]]] = {
        "slimtorch": ("ours", lambda: ours(problem, x, weight, binarize)),
        "torch": ("dense", lambda: dense_call(problem, given, weight)),
        "onednn": ("dense", lambda: onednn(problem, given, weight)),
        "mkl": ("dense", lambda: mkl(problem, given, weight)),
        "torch-bf16": ("peer", lambda: bfloat16(problem, given, weight)),
    }
    ready: list[Contender] = []
    errors: list[float] = []
    unavailable: dict[str, str] = {}
    for name, (role, build) in builders.items():
        try:
            contender = local(name, role, name, build())  # type: ignore[arg-type]
            exact = torch.zeros_like(size) if name == "slimtorch" and binarize else 1e-5 * size
            bound = 2.0**-6 * size if role == "peer" else exact
            error = Reference(value, bound).verify(name, contender.result())
        except (NotImplementedError, RuntimeError, WrongResultError) as failure:
            if role == "ours":
                raise
            unavailable[name] = " ".join(str(failure).split())[:160]
        else:
            ready.append(contender)
            errors.append(error)
    return interleave(ready, settings, errors), unavailable


COLUMNS = ["problem", "ours", "torch", "dense", "bf16", "GOP/s", "% of roof", "/torch", "/dense", "/bf16"]


def row(problem: Problem, binarize: bool, timings: Sequence[Timing], roof: float) -> list[object]:
    """Microseconds, our GOP/s and their share of the best popcount roof, our ratios."""
    times = {timing.contender: timing.median for timing in timings}
    mine = times["slimtorch"]
    best = min(t.median for t in timings if t.role == "dense")
    speed = problem.dense_flops / mine * 1e-9
    shown = [mine, times["torch"], best, times.get("torch-bf16")]
    return [
        f"{problem} {'signs' if binarize else 'float'}",
        *(None if t is None else round(t * 1e6) if t >= 1e-4 else round(t * 1e6, 1) for t in shown),
        round(speed),
        round(100 * speed / roof) if roof and binarize else None,
        *(None if t is None else t / mine for t in shown[1:]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.binary", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short samples")
    parser.add_argument("--only", choices=("signs", "float"), help="one kind of activations")
    parser.add_argument("--rounds", type=positive, help="samples of each contender (default 15, quick 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return guarded(lambda: run(parser.parse_args()))


def run(options: argparse.Namespace) -> int:
    cases = [(p, True) for p in SIGNS if options.only != "float"]
    cases += [(p, False) for p in FLOATS if options.only != "signs"]
    settings = Settings(options.rounds or (3 if options.quick else 15), 1e-3 if options.quick else 5e-3)
    rows: list[list[object]] = []
    content: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack, torch.inference_mode():
        stack.enter_context(machine.restricted(machine.cores(), 1))
        found = roofs()
        roof = max(found.values(), default=0.0)
        for problem, binarize in cases:
            timings, unavailable = measure(problem, binarize, settings)
            rows.append(row(problem, binarize, timings, roof))
            content.append(
                {
                    "name": str(problem), "binarize_input": binarize, "operations": problem.dense_flops,
                    "timings": [asdict(t) for t in timings], "unavailable": unavailable,
                }
            )  # fmt: skip
            if options.json:
                machine.save(options.json, "binary", content, settings=asdict(settings), popcount_roof_gops=found)
    notes = [
        "microseconds a call (median); the last three: how many times faster we are",
        f"popcount roof, GOP/s: {', '.join(f'{k} {v:.0f}' for k, v in found.items()) or 'no C compiler'}",
    ]
    title = f"binary on {machine.machine()['cpu']}, our kernels: {machine.machine()['isa']}, 1 thread"
    Console().print(Table(title, COLUMNS, rows, notes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
