// SPDX-License-Identifier: Apache-2.0
// What training needs besides products: values in packed order, and gradients of stored values.
//
// grad_kernel: one lane for each stored value (row r, column k), which walks over the columns of the product and adds up
//   grad[column][r] * x[column][k]. Lanes of a warp are neighbours in the CSR: mostly one row, so that one load of the
//   gradient serves all, and ascending k, so that their loads of x share lines. Bound by the first-level cache.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/sparse/sparse.h"

namespace slim::cuda::sparse {

constexpr int kThreads = 256;

struct PackParams {
  const void* values;
  const uint32_t* order;
  void* out;
  int64_t nnz;
};

template <class Word>
__global__ void __launch_bounds__(kThreads) pack_kernel(const PackParams p) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.nnz; i += int64_t(gridDim.x) * kThreads)
    static_cast<Word*>(p.out)[i] = load_constant(static_cast<const Word*>(p.values) + load_constant(p.order + i));
}

template <class T, bool kConv>
__global__ void __launch_bounds__(kThreads) grad_kernel(const GradParams p) {
  const Activations& a = p.a;
  const T* const x = static_cast<const T*>(a.x);
  const T* const grad = static_cast<const T*>(a.y);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.nnz; i += int64_t(gridDim.x) * kThreads) {
    int64_t row = 0;  // the last that starts at i or before
    for (int64_t above = a.n; above - row > 1;) {
      const int64_t middle = (row + above) / 2;
      (load_constant(p.csr.row_offsets + middle) <= i ? row : above) = middle;
    }
    const int64_t k = load_constant(p.csr.columns + i);
    float sum = 0.0f;
    if constexpr (!kConv) {
#pragma unroll 4
      for (int64_t m = 0; m < a.m; ++m)
        sum += to_float(load_constant(grad + m * a.n + row)) * to_float(load_constant(x + m * a.k + k));
    } else {
      const ConvGeometry& g = a.geometry;
      const int64_t taps = g.kernel_h * g.kernel_w, tap = k % taps, group = row / (a.n / a.groups);
      const int64_t channel = group * (g.channels / a.groups) + k / taps;
      const int64_t top = tap / g.kernel_w * g.dilation_h - g.pad_h, left = tap % g.kernel_w * g.dilation_w - g.pad_w;
      for (int64_t b = 0; b < g.batch; ++b) {
        const T* const image = x + (b * g.channels + channel) * g.height * g.width;
        const T* const of_row = grad + (b * a.n + row) * g.out_h * g.out_w;
        for (int64_t r = 0; r < g.out_h; ++r) {
          const int64_t h = r * g.stride_h + top;
          if (h < 0 || h >= g.height) continue;
#pragma unroll 4
          for (int64_t c = 0; c < g.out_w; ++c) {
            const int64_t w = c * g.stride_w + left;
            if (w >= 0 && w < g.width)
              sum +=
                  to_float(load_constant(of_row + r * g.out_w + c)) * to_float(load_constant(image + h * g.width + w));
          }
        }
      }
    }
    static_cast<T*>(p.out)[i] = from_float<T>(sum);
  }
}

}  // namespace slim::cuda::sparse
