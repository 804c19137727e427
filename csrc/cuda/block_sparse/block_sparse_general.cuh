// SPDX-License-Identifier: Apache-2.0
// Blocks of any size, on CUDA cores: what the tensor-core kernels do not take. One thread per output, lanes along what
// is contiguous in y (outputs of a linear layer, pixels of a convolution); it walks the stored blocks of its row, so
// nothing else is multiplied, and NaN goes nowhere else. Sums in float32, in the order of storage. Bound by load
// instructions.
//
// W^T walks block columns: those of the plan, or, without one, whatever a binary search finds in each block row.
#pragma once

#include "cuda/block_sparse/block_sparse.h"
#include "cuda/common/device.cuh"

namespace slim::cuda::block_sparse {

constexpr int kGeneralThreads = 128;

// The depth of one column of activations, walked in order: a row of x, or the taps of an output pixel within a group.
template <class T, bool kConv>
class Depth {
 public:
  __device__ Depth(const Activations& a, int64_t column, int64_t group) : a_(a) {
    if constexpr (kConv) {
      const ConvGeometry& g = a.geometry;
      const int64_t pixels = g.out_h * g.out_w, image = column / pixels, pixel = column % pixels;
      y0_ = pixel / g.out_w * g.stride_h - g.pad_h;
      x0_ = pixel % g.out_w * g.stride_w - g.pad_w;
      const int64_t channels = g.channels / a.groups;
      base_ = static_cast<const T*>(a.x) + (image * g.channels + group * channels) * g.height * g.width;
    } else {
      base_ = static_cast<const T*>(a.x) + column * a.k;
    }
  }
  __device__ void seek(int64_t k) {
    if constexpr (kConv) {
      const ConvGeometry& g = a_.geometry;
      const int64_t taps = g.kernel_h * g.kernel_w;
      channel_ = k / taps;
      tap_y_ = k % taps / g.kernel_w;
      tap_x_ = k % g.kernel_w;
    } else {
      channel_ = k;
    }
  }
  // Outside the image 0.
  __device__ float value() const {
    if constexpr (kConv) {
      const ConvGeometry& g = a_.geometry;
      const int64_t y = y0_ + tap_y_ * g.dilation_h, x = x0_ + tap_x_ * g.dilation_w;
      if (y < 0 || y >= g.height || x < 0 || x >= g.width) return 0.0f;
      return to_float(load_constant(base_ + (channel_ * g.height + y) * g.width + x));
    } else {
      return to_float(load_constant(base_ + channel_));
    }
  }
  __device__ void next() {
    if constexpr (kConv) {
      if (++tap_x_ < a_.geometry.kernel_w) return;
      tap_x_ = 0;
      if (++tap_y_ < a_.geometry.kernel_h) return;
      tap_y_ = 0;
    }
    ++channel_;
  }

 private:
  const Activations& a_;
  const T* base_;
  int64_t channel_ = 0, tap_y_ = 0, tap_x_ = 0, y0_ = 0, x0_ = 0;
};

// Sum of one block's stored values, `step` apart, times the depth from `k` on.
template <class T, bool kConv>
__device__ __forceinline__ float add_block(float sum, Depth<T, kConv>& x, const T* w, int64_t step, int64_t k,
                                           int64_t count) {
  x.seek(k);
  for (int64_t j = 0; j < count; ++j, x.next()) sum += to_float(load_constant(w + j * step)) * x.value();
  return sum;
}

template <class T, bool kConv>
__device__ float row_of_w(const Product& p, Depth<T, kConv>& x, int64_t row, float sum) {
  const Blocks& w = p.w;
  const int64_t line = row / w.r, inner = row % w.r;
  for (int64_t b = w.row_offsets[line], end = w.row_offsets[line + 1]; b < end; ++b) {
    const int64_t k = int64_t(w.columns[b]) * w.c, left = w.width - k;
    const T* values = static_cast<const T*>(w.values) + (b * w.r + inner) * w.c;
    sum = add_block(sum, x, values, 1, k, left < w.c ? left : w.c);
  }
  return sum;
}

template <class T, bool kConv>
__device__ float row_of_transpose(const Product& p, Depth<T, kConv>& x, int64_t row, int64_t group, float sum) {
  const Blocks& w = p.w;
  const int64_t line = row / w.c, inner = row % w.c;
  const int64_t low = group * p.a.k, high = low + p.a.k;  // the group's rows of W
  const auto add = [&](int64_t block, int64_t block_row) {
    const int64_t top = block_row * w.r, begin = top > low ? top : low, end = top + w.r < high ? top + w.r : high;
    if (begin >= end) return;
    const T* values = static_cast<const T*>(w.values) + (block * w.r + begin - top) * w.c + inner;
    sum = add_block(sum, x, values, w.c, begin - low, end - begin);
  };
  if (p.plan) {
    const int64_t columns = (w.width + w.c - 1) / w.c;
    const int32_t* blocks = p.plan + columns + 1;
    for (int64_t i = p.plan[line], end = p.plan[line + 1]; i < end; ++i) add(blocks[i], blocks[w.blocks + i]);
    return sum;
  }
  for (int64_t block_row = low / w.r; block_row * w.r < high; ++block_row) {
    int64_t begin = w.row_offsets[block_row], end = w.row_offsets[block_row + 1];
    const int64_t stop = end;
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (w.columns[middle] < line)
        begin = middle + 1;
      else
        end = middle;
    }
    if (begin < stop && w.columns[begin] == line) add(begin, block_row);
  }
  return sum;
}

// Grid: x over what is contiguous in y, y over the rest, striding, since it ends at 65535.
template <class T, bool kConv>
__global__ void __launch_bounds__(kGeneralThreads) product_kernel(const Product p) {
  const int64_t columns = kConv ? p.a.geometry.batch * p.a.geometry.out_h * p.a.geometry.out_w : p.a.m;
  const int64_t lane = int64_t(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (lane >= (kConv ? columns : p.a.n)) return;
  const int64_t rest = kConv ? p.a.n : columns, rows_per_group = p.a.n / p.a.groups;
  for (int64_t other = blockIdx.y; other < rest; other += gridDim.y) {
    const int64_t row = kConv ? other : lane, column = kConv ? lane : other, group = row / rows_per_group;
    Depth<T, kConv> x(p.a, column, group);
    float sum = p.a.bias ? to_float(load_constant(static_cast<const T*>(p.a.bias) + row)) : 0.0f;
    sum = p.transposed ? row_of_transpose(p, x, row - group * rows_per_group, group, sum) : row_of_w(p, x, row, sum);
    if (p.a.relu && sum < 0.0f) sum = 0.0f;
    int64_t at = column * p.a.n + row;
    if constexpr (kConv) {
      const int64_t pixels = p.a.geometry.out_h * p.a.geometry.out_w;
      at = (column / pixels * p.a.n + row) * pixels + column % pixels;
    }
    static_cast<T*>(p.a.y)[at] = from_float<T>(sum);
  }
}

// One thread per stored value of a linear layer, where rows of x are contiguous along a block's row; one warp per value
// of a convolution, where pixels are. Each lane sums its columns in order, then lanes are added up as a tree.
template <class T, bool kConv>
__global__ void __launch_bounds__(kGeneralThreads) grad_values_kernel(const Gradient p) {
  constexpr int kLanes = kConv ? kWarp : 1;
  const Blocks& w = p.w;
  const int64_t count = w.blocks * w.r * w.c, rows_per_group = w.rows / w.groups;
  const int64_t step = int64_t(gridDim.x) * (kGeneralThreads / kLanes);
  const int lane = int(threadIdx.x) % kLanes;
  for (int64_t at = (int64_t(blockIdx.x) * kGeneralThreads + threadIdx.x) / kLanes; at < count; at += step) {
    const int64_t block = at / (int64_t(w.r) * w.c), inner = at % (int64_t(w.r) * w.c);
    int64_t begin = 0, end = (w.rows + w.r - 1) / w.r;  // the block row: the last that begins at or before the block
    while (end - begin > 1) {
      const int64_t middle = (begin + end) / 2;
      if (w.row_offsets[middle] <= block)
        begin = middle;
      else
        end = middle;
    }
    const int64_t row = begin * w.r + inner / w.c, k = int64_t(w.columns[block]) * w.c + inner % w.c;
    float sum = 0.0f;
    if (row < w.rows && k < w.width) {
      if constexpr (kConv) {
        const ConvGeometry& g = p.a.geometry;
        const int64_t pixels = g.out_h * g.out_w, columns = g.batch * pixels;
        const T* grad = static_cast<const T*>(p.a.y);
        for (int64_t column = lane; column < columns; column += kLanes) {
          Depth<T, true> x(p.a, column, row / rows_per_group);
          x.seek(k);
          sum += x.value() * to_float(load_constant(grad + (column / pixels * w.rows + row) * pixels + column % pixels));
        }
      } else {
        const T* grad = static_cast<const T*>(p.a.y) + row;
        const T* x = static_cast<const T*>(p.a.x) + k;
        for (int64_t m = 0; m < p.a.m; ++m)
          sum += to_float(load_constant(x + m * p.a.k)) * to_float(load_constant(grad + m * w.rows));
      }
    }
    if constexpr (kConv)  // at is the same for all lanes, and so are the branches above
      for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) static_cast<T*>(p.grad_values)[at] = from_float<T>(sum);
  }
}

}  // namespace slim::cuda::block_sparse
