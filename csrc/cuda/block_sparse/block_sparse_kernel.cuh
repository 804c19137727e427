// SPDX-License-Identifier: Apache-2.0
// Simple and correct: one thread per output, a block of threads covers kColumns output columns of one block row times
// kRows rows of x, so that weights are read together along r and x is shared through the first-level cache. Sums in
// float32. Bound by load instructions; the tensor-core kernel is to replace it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/block_sparse/block_sparse.h"

namespace slim::cuda::block_sparse {

constexpr int kRows = 8;      // rows of x per block of threads
constexpr int kColumns = 32;  // outputs per block of threads

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void from_float(float v, float* out) { *out = v; }
__device__ inline void from_float(float v, __half* out) { *out = __float2half(v); }
__device__ inline void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16(v); }

// Grid: x over output columns, y over rows of x (striding, since y ends at 65535). Threads: (kColumns, kRows).
template <class T>
__global__ void linear_kernel(const Params p) {
  const int64_t n = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  if (n >= p.n) return;
  const T* x = static_cast<const T*>(p.x);
  const int64_t block_row = n / p.r, inner = n % p.r;
  const int32_t begin = p.row_offsets[block_row], end = p.row_offsets[block_row + 1];
  for (int64_t m = int64_t(blockIdx.y) * kRows + threadIdx.y; m < p.m; m += int64_t(gridDim.y) * kRows) {
    float sum = p.bias ? to_float(static_cast<const T*>(p.bias)[n]) : 0.0f;
    for (int32_t b = begin; b < end; ++b) {
      const int64_t k0 = int64_t(p.block_columns[b]) * p.c;
      const int count = int(k0 + p.c <= p.k ? p.c : p.k - k0);
      const T* w = static_cast<const T*>(p.values) + (int64_t(b) * p.r + inner) * p.c;
      for (int j = 0; j < count; ++j) sum += to_float(w[j]) * to_float(x[m * p.k + k0 + j]);
    }
    if (p.relu && sum < 0.0f) sum = 0.0f;
    from_float(sum, static_cast<T*>(p.y) + m * p.n + n);
  }
}

}  // namespace slim::cuda::block_sparse
