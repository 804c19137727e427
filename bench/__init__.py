# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one module per family, timed side by side against everything else a user could run.

Run from the repository root:

    python -m bench.sparse --quick                                  # a first look, half a minute
    python -m bench.sparse --json bench/results/sparse-avx2.json    # the full grid, committed
    python -m bench.block_sparse --json bench/results/block_sparse-avx2.json
    python -m bench.targets                                         # each target line: wanted, reached, met or missed
    python -m bench.gpu_status                                      # which CUDA kernels have run on a GPU, and how fast
    python -m bench.cuda_resources                                  # what the compiler made of them
    python -m bench.tables [--check]                                # README tables and plots from the committed JSON

`problems` (shared with the tests, in tests/problems.py) say what is computed, `contenders` who computes it, `timing`
how it is timed, `results` what is written down. `peers` talks to engines that live in an environment of their own
(`make peers`).
"""
