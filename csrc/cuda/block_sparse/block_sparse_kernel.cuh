// SPDX-License-Identifier: Apache-2.0
// Simple and correct: one thread per output, a block of threads covers kColumns output columns of one block row times
// kRows rows of x, so that weights are read together along r and x is shared through the first-level cache. Sums in
// float32. Bound by load instructions; the tensor-core kernel is to replace it.
#pragma once

#include "cuda/block_sparse/block_sparse.h"
#include "cuda/common/device.cuh"

namespace slim::cuda::block_sparse {

constexpr int kRows = 8;      // rows of x per block of threads
constexpr int kColumns = 32;  // outputs per block of threads

// Grid: x over output columns, y over rows of x (striding, since y ends at 65535). Threads: (kColumns, kRows).
template <class T>
__global__ void linear_kernel(const Params p) {
  const int64_t n = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  if (n >= p.a.n) return;
  const T* x = static_cast<const T*>(p.a.x);
  const int64_t block_row = n / p.r, inner = n % p.r;
  const int32_t begin = p.row_offsets[block_row], end = p.row_offsets[block_row + 1];
  for (int64_t m = int64_t(blockIdx.y) * kRows + threadIdx.y; m < p.a.m; m += int64_t(gridDim.y) * kRows) {
    float sum = p.a.bias ? to_float(static_cast<const T*>(p.a.bias)[n]) : 0.0f;
    for (int32_t b = begin; b < end; ++b) {
      const int64_t k0 = int64_t(p.block_columns[b]) * p.c;
      const int count = int(k0 + p.c <= p.a.k ? p.c : p.a.k - k0);
      const T* w = static_cast<const T*>(p.values) + (int64_t(b) * p.r + inner) * p.c;
      for (int j = 0; j < count; ++j) sum += to_float(w[j]) * to_float(x[m * p.a.k + k0 + j]);
    }
    if (p.a.relu && sum < 0.0f) sum = 0.0f;
    static_cast<T*>(p.a.y)[m * p.a.n + n] = from_float<T>(sum);
  }
}

}  // namespace slim::cuda::block_sparse
