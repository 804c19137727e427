# SPDX-License-Identifier: Apache-2.0
"""Block-sparse linear layers and convolutions against everything else: `python -m bench.block_sparse --help`.

Masks are made of whole blocks. Our unstructured format runs on the same weights beside the block-sparse one, which
shows from which block size on the blocks are worth their own kernels.
"""

from __future__ import annotations

from bench.run import Benchmark, main
from tests.problems import BENCH_BLOCK_CONV, BENCH_BLOCK_LINEAR, BLOCK_SIZES

BENCHMARK = Benchmark(
    name="block_sparse",
    about="Block-sparse layers, side by side with torch, oneDNN, MKL CSR, torch BSR, DeepSparse and ONNX Runtime.",
    blocks=True,
    problems=(*BENCH_BLOCK_LINEAR, *BENCH_BLOCK_CONV),
    quick_problems=(BENCH_BLOCK_LINEAR[1], BENCH_BLOCK_CONV[1]),
    sparsities=(0.7, 0.8, 0.9, 0.95),
    quick_sparsities=(0.9,),
    block_sizes=BLOCK_SIZES,
    quick_block_sizes=((16, 16), (32, 32), (4, 16)),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
