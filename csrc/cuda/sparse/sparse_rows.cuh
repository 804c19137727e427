// SPDX-License-Identifier: Apache-2.0
// Unstructured weights on plain cores, row by row from the CSR: float32, and 16-bit values where nobody made a plan.
//
// dot_kernel, few columns: a warp takes a row, its lanes take the stored weights, and x lies in shared memory as
//   [k][kM], so that one gather of up to 16 bytes serves kM columns. Bound by the bytes of the weight (4 + 4 of each
//   float32), then by conflicts between the gathers.
//
// panel_kernel, many columns: the dense dimension lies in the lanes, so nothing is gathered.
//
//            64 columns                       warp w: rows 6 w … 6 w + 5 of the tile, all 64 columns, two a lane
//       k0  +----------+   panel, float32,      each stored weight (column, value), from shared memory, is broadcast:
//           |          |   two of them:           acc[row][0 … 1] += value * panel[column - k0][2 lane … 2 lane + 1]
//  k0 + 128 +----------+   one is filled      columns ascend in a row, so each row keeps its place from panel to panel
//
//   Two multiply-adds for each 8 bytes from shared memory: that bounds it at a quarter of the peak of dense float32.
//
// scatter_kernel: the transposed matrix where only the CSR of the other is there. A warp keeps a range of one column's
//   outputs in shared memory and adds row after row to it. Slow, but right, and the same bits every time.
//
// Only stored weights are multiplied: NaN and Inf go where they should by themselves. Sums in float32, in a fixed order.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/sparse/sparse.h"

namespace slim::cuda::sparse {

template <class T>
__device__ __forceinline__ float stored_value(const RowParams& p, int64_t i) {
  const T* values = static_cast<const T*>(p.values);
  return to_float(load_constant(values + (p.sources ? int64_t(load_constant(p.sources + i)) : i)));
}

__device__ __forceinline__ float finish(const Activations& a, float sum) { return a.relu && sum < 0.0f ? 0.0f : sum; }
template <class T>
__device__ __forceinline__ float bias_of(const Activations& a, int64_t row) {
  return a.bias ? to_float(load_constant(static_cast<const T*>(a.bias) + row)) : 0.0f;
}

// ---- few columns of a linear layer -----------------------------------------------------------------------------------

constexpr int kDotThreads = 256;

template <int kM>
struct alignas(4 * kM) Few {
  float v[kM];
};

// Grid: x strides over rows, y over groups of kM columns. Shared memory: Few<kM> [k].
template <class T, int kM>
__global__ void __launch_bounds__(kDotThreads) dot_kernel(const RowParams p) {
  constexpr int kUnroll = 4;
  Few<kM>* const x = reinterpret_cast<Few<kM>*>(dynamic_shared());
  const int64_t column0 = int64_t(blockIdx.y) * kM;
  const int columns = int(p.a.m - column0 < kM ? p.a.m - column0 : kM);
  const T* from = static_cast<const T*>(p.a.x) + column0 * p.a.k;
  for (int64_t k = threadIdx.x; k < p.a.k; k += kDotThreads) {
    Few<kM> v;
#pragma unroll
    for (int m = 0; m < kM; ++m) v.v[m] = m < columns ? to_float(load_constant(from + m * p.a.k + k)) : 0.0f;
    x[k] = v;
  }
  sync_threads();
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t warps = int64_t(gridDim.x) * (kDotThreads / kWarp);
  for (int64_t row = int64_t(blockIdx.x) * (kDotThreads / kWarp) + threadIdx.x / kWarp; row < p.a.n; row += warps) {
    const int64_t begin = load_constant(p.csr.row_offsets + row), end = load_constant(p.csr.row_offsets + row + 1);
    float sum[kM] = {};
    for (int64_t i = begin + lane; i < end; i += kUnroll * kWarp) {
      int32_t column[kUnroll];
      float value[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {  // all on their way before the first is needed
        const int64_t at = i + u * kWarp;
        column[u] = at < end ? load_constant(p.csr.columns + at) : -1;
        value[u] = at < end ? stored_value<T>(p, at) : 0.0f;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (column[u] >= 0) {
          const Few<kM> v = x[column[u]];
#pragma unroll
          for (int m = 0; m < kM; ++m) sum[m] += value[u] * v.v[m];
        }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int mask = kWarp / 2; mask; mask /= 2) sum[m] += shuffle_xor(sum[m], mask);
      if (lane == 0 && m < columns)
        static_cast<T*>(p.a.y)[(column0 + m) * p.a.n + row] = from_float<T>(finish(p.a, sum[m] + bias_of<T>(p.a, row)));
    }
  }
}

// ---- many columns ----------------------------------------------------------------------------------------------------

constexpr int kPanelColumns = 64;
constexpr int kPanelDepth = 128;
constexpr int kPanelThreads = 256;
constexpr int kPanelRows = 6;  // of a warp, or 2
constexpr int kPanelWarps = kPanelThreads / kWarp;
constexpr int kPanelPitch = kPanelColumns + 2;  // even, and rows that are filled together lie in different banks
constexpr int kPanelFloats = kPanelDepth * kPanelPitch;
constexpr int kWeightBytes = kPanelWarps * kWarp * 8;  // (place in the panel, value), of each warp
constexpr int kTapBytes = 2 * kPanelDepth * 16;        // of each k of a panel its offset in the image, y, x
constexpr int kPanelShared = 2 * kPanelFloats * 4 + kWeightBytes + kTapBytes + kPanelWarps * kPanelRows * 4;

// Fills panels with activations. Lanes run along what lies together in memory: k of a linear layer, pixels of an image.
template <class T, bool kConv>
class Panels {
 public:
  __device__ __forceinline__ Panels(const Activations& a, int64_t column0, int group, float* panels, uint4* taps)
      : a_(a), panels_(panels), taps_(taps) {
    const int thread = int(threadIdx.x);
    if constexpr (kConv) {
      const ConvGeometry& g = a.geometry;
      const int64_t pixels = g.out_h * g.out_w, all = g.batch * pixels, column = column0 + thread % kPanelColumns;
      const int64_t image = column / pixels, pixel = column % pixels;
      inside_ = column < all;
      y_ = int(pixel / g.out_w * g.stride_h - g.pad_h);
      x_ = int(pixel % g.out_w * g.stride_w - g.pad_w);
      from_ = static_cast<const T*>(a.x) +
              (inside_ ? (image * g.channels + group * (g.channels / a.groups)) * g.height * g.width : 0);
    } else {
      left_ = int(a.m - column0 < kPanelColumns ? a.m - column0 : kPanelColumns);
      from_ = static_cast<const T*>(a.x) + column0 * a.k;
    }
  }

  // Of a convolution: what the ks of a panel mean. A barrier must follow before load() of the same panel.
  __device__ __forceinline__ void prepare(int64_t k0, int slot) {
    if constexpr (kConv) {
      const ConvGeometry& g = a_.geometry;
      const uint32_t taps = uint32_t(g.kernel_h * g.kernel_w);
      for (int i = int(threadIdx.x); i < kPanelDepth; i += kPanelThreads) {
        uint4 tap{0, 0, 0, 0};
        if (k0 + i < a_.k) {
          const uint32_t k = uint32_t(k0 + i), tap_of = k % taps;
          tap.y = uint32_t(tap_of / uint32_t(g.kernel_w) * g.dilation_h);
          tap.z = uint32_t(tap_of % uint32_t(g.kernel_w) * g.dilation_w);
          tap.x = k / taps;
          tap.w = 1;
        }
        taps_[slot * kPanelDepth + i] = tap;
      }
    }
  }

  __device__ __forceinline__ void load(int64_t k0, int slot) {
    float* panel = panels_ + slot * kPanelFloats;
    const int thread = int(threadIdx.x);
    if constexpr (kConv) {
      const ConvGeometry& g = a_.geometry;
      const int column = thread % kPanelColumns;
      for (int k = thread / kPanelColumns; k < kPanelDepth; k += kPanelThreads / kPanelColumns) {
        const uint4 tap = taps_[slot * kPanelDepth + k];
        const int h = y_ + int(tap.y), w = x_ + int(tap.z);
        const bool in = inside_ && tap.w && h >= 0 && h < g.height && w >= 0 && w < g.width;
        copy(panel + k * kPanelPitch + column, in ? from_ + (tap.x * g.height + h) * g.width + w : from_, in);
      }
    } else {
      const int k = thread % kPanelDepth;
      const bool in_depth = k0 + k < a_.k;
      for (int column = thread / kPanelDepth; column < kPanelColumns; column += kPanelThreads / kPanelDepth) {
        const bool in = in_depth && column < left_;
        copy(panel + k * kPanelPitch + column, in ? from_ + column * a_.k + k0 + k : from_, in);
      }
    }
  }

 private:
  static __device__ __forceinline__ void copy(float* to, const T* from, bool in) {
    if constexpr (sizeof(T) == 4)
      copy_async<4>(to, from, in ? 4 : 0);
    else
      *to = in ? to_float(load_constant(from)) : 0.0f;
  }

  const Activations& a_;
  float* panels_;
  uint4* taps_;
  const T* from_;
  bool inside_ = true;
  int y_ = 0, x_ = 0, left_ = 0;
};

// kRows: rows of a warp. Grid: x over row tiles (fastest), column tiles and groups.
template <class T, bool kConv, int kRows>
__global__ void __launch_bounds__(kPanelThreads, 2) panel_kernel(const RowParams p) {
  constexpr int kTileRows = kRows * kPanelWarps;
  float* const panels = reinterpret_cast<float*>(dynamic_shared());
  uint2* const weights = reinterpret_cast<uint2*>(panels + 2 * kPanelFloats);
  uint4* const taps = reinterpret_cast<uint4*>(weights + kPanelWarps * kWarp);
  int32_t* const ends = reinterpret_cast<int32_t*>(taps + 2 * kPanelDepth);  // of each row, to spare registers
  const int64_t of_group = p.a.n / p.a.groups;
  unsigned tile = blockIdx.x;
  const int64_t row_tile = tile % unsigned(p.row_tiles);
  tile /= unsigned(p.row_tiles);
  const int group = int(tile % unsigned(p.a.groups));
  const int64_t column0 = int64_t(tile / unsigned(p.a.groups)) * kPanelColumns;

  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  uint2* const own = weights + warp * kWarp;
  const int64_t first = row_tile * kTileRows + warp * kRows;  // in the group
  Panels<T, kConv> panel(p.a, column0, group, panels, taps);

  int32_t place[kRows];
  int32_t* const end = ends + warp * kRows;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool in = first + r < of_group;
    const int32_t* at = p.csr.row_offsets + group * of_group + first + r;
    place[r] = in ? load_constant(at) : 0;
    if (lane == r) end[r] = in ? load_constant(at + 1) : 0;
  }
  sync_warp();
  float sum[kRows][2] = {};
  const int64_t panel_count = (p.a.k + kPanelDepth - 1) / kPanelDepth;
  panel.prepare(0, 0);
  if (panel_count > 1) panel.prepare(kPanelDepth, 1);
  if constexpr (kConv) sync_threads();
  if (panel_count > 0) panel.load(0, 0);
  copy_commit();
  for (int64_t b = 0; b < panel_count; ++b) {
    const int slot = int(b & 1);
    const int64_t k0 = b * kPanelDepth;
    // The columns of all rows are on their way while the panel lands.
    int32_t column[kRows];
    float value[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t i = place[r] + lane;
      const bool in = i < end[r];
      column[r] = in ? load_constant(p.csr.columns + i) : INT32_MAX;
      value[r] = in ? stored_value<T>(p, i) : 0.0f;
    }
    copy_wait<0>();
    sync_threads();  // this panel is there, and nobody reads the other one any more
    if (b + 1 < panel_count) panel.load(k0 + kPanelDepth, slot ^ 1);
    copy_commit();
    const float* const from = panels + slot * kPanelFloats + 2 * lane;
    const int32_t limit = int32_t(k0 + kPanelDepth < p.a.k ? k0 + kPanelDepth : p.a.k);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (;;) {
        const int count = popcount(warp_ballot(column[r] < limit));  // the first lanes: columns ascend
        sync_warp();
        own[lane] = uint2{uint32_t(column[r] - int32_t(k0)) * kPanelPitch, as_bits(value[r])};
        sync_warp();
        int i = 0;
        for (; i + 2 <= count; i += 2) {
          const uint4 two = *reinterpret_cast<const uint4*>(own + i);
          const float2 a = *reinterpret_cast<const float2*>(from + two.x);
          const float2 c = *reinterpret_cast<const float2*>(from + two.z);
          sum[r][0] += as_float(two.y) * a.x;
          sum[r][1] += as_float(two.y) * a.y;
          sum[r][0] += as_float(two.w) * c.x;
          sum[r][1] += as_float(two.w) * c.y;
        }
        if (i < count) {
          const uint2 one = own[i];
          const float2 a = *reinterpret_cast<const float2*>(from + one.x);
          sum[r][0] += as_float(one.y) * a.x;
          sum[r][1] += as_float(one.y) * a.y;
        }
        place[r] += count;
        if (count < kWarp) break;
        const int32_t at = place[r] + lane;  // more than 32 in this panel
        column[r] = at < end[r] ? load_constant(p.csr.columns + at) : INT32_MAX;
        value[r] = at < end[r] ? stored_value<T>(p, at) : 0.0f;
      }
    }
    // This panel was loaded before the barrier above, so its table is free; a barrier comes before the next load reads it.
    if (b + 2 < panel_count) panel.prepare(k0 + 2 * kPanelDepth, slot);
  }

  const int64_t pixels = kConv ? p.a.geometry.out_h * p.a.geometry.out_w : 1;
  const int64_t all = kConv ? p.a.geometry.batch * pixels : p.a.m;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t column = column0 + 2 * lane + h;
    if (column >= all) continue;
    const int64_t image = kConv ? column / pixels : 0;
    T* const y = static_cast<T*>(p.a.y) + (kConv ? image * p.a.n * pixels + column - image * pixels : column * p.a.n);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= of_group) break;
      const int64_t row = group * of_group + first + r;
      y[row * pixels] = from_float<T>(finish(p.a, sum[r][h] + bias_of<T>(p.a, row)));
    }
  }
}

// ---- the transposed matrix, without a plan ---------------------------------------------------------------------------

constexpr int kScatterRange = 2048;  // outputs of a warp, in shared memory

// Here x is [columns][csr rows], y [columns][csr columns], both of all groups; a convolution's are images of 1x1 taps.
// Grid: x over ranges of a group's outputs, groups, then columns.
template <class T>
__global__ void __launch_bounds__(kWarp) scatter_kernel(const RowParams p) {
  float* const sum = reinterpret_cast<float*>(dynamic_shared());
  const int lane = int(threadIdx.x);
  const int64_t width = p.a.n / p.a.groups, ranges = (width + kScatterRange - 1) / kScatterRange;
  const int64_t pixels = p.a.conv ? p.a.geometry.out_h * p.a.geometry.out_w : 1;
  const int64_t all = p.a.conv ? p.a.geometry.batch * pixels : p.a.m, depth = p.a.k;
  for (int64_t tile = blockIdx.x; tile < ranges * p.a.groups * all; tile += gridDim.x) {
    const int64_t low = tile % ranges * kScatterRange, group = tile / ranges % p.a.groups;
    const int64_t column = tile / ranges / p.a.groups, image = column / pixels, pixel = column % pixels;
    const int64_t high = width < low + kScatterRange ? width : low + kScatterRange;
    for (int i = lane; i < kScatterRange; i += kWarp) sum[i] = 0.0f;
    sync_warp();
    for (int64_t r = 0; r < depth; ++r) {
      const int64_t row = group * depth + r;
      const T* x = static_cast<const T*>(p.a.x) + (image * depth * p.a.groups + row) * pixels + pixel;
      const float g = to_float(load_constant(x));
      const int64_t end = load_constant(p.csr.row_offsets + row + 1);
      for (int64_t i = int64_t(load_constant(p.csr.row_offsets + row)) + lane; i < end; i += kWarp) {
        const int64_t k = load_constant(p.csr.columns + i);
        if (k >= low && k < high) sum[k - low] += stored_value<T>(p, i) * g;
      }
      sync_warp();  // other lanes add to the same sums in the next row
    }
    T* y = static_cast<T*>(p.a.y) + (image * p.a.n + group * width) * pixels + pixel;
    for (int64_t k = low + lane; k < high; k += kWarp) y[k * pixels] = from_float<T>(sum[k - low]);
    sync_warp();
  }
}

}  // namespace slim::cuda::sparse
