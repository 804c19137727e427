# SPDX-License-Identifier: Apache-2.0
"""Unstructured sparse linear layers and convolutions against everything else: `python -m bench.sparse --help`.

torch's BSR is not among the rivals here: at random positions every block holds something, so it stores the dense
matrix. It is in `bench.block_sparse`, with masks made of blocks.
"""

from __future__ import annotations

from bench.run import Benchmark, main
from tests.problems import BENCH_CONV, BENCH_LINEAR, SPARSITIES

BENCHMARK = Benchmark(
    name="sparse",
    about="Unstructured sparse layers, side by side with torch, oneDNN, MKL CSR, DeepSparse and ONNX Runtime.",
    blocks=False,
    problems=(*BENCH_LINEAR, *BENCH_CONV),
    quick_problems=(BENCH_LINEAR[0], BENCH_LINEAR[2], BENCH_CONV[1], BENCH_CONV[2]),
    sparsities=SPARSITIES,
    quick_sparsities=(0.8, 0.9),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
