// SPDX-License-Identifier: Apache-2.0
// Forward on CUDA cores, straight from the stored stream: nothing derived is needed, and sums are in float32.
//
// Few columns (up to 8): a warp per row. Lanes hold entries; each gathers its activations, which lie side by side:
//
//     x [k][columns]    lane: column c0 -> values of x[c0][0 … 7] in one or two loads, times a table entry
//
// and the lanes' sums meet at the end of the row. Bound by gaps and codes (1.5 bytes a weight at 4 bits).
//
// Many columns: a warp per row again, but lanes hold columns, 32 or 128 of them. A chunk of entries is decoded, compacted
// and put into the warp's shared memory; then all lanes read one entry after the other (a broadcast) and load a row of x,
// which is contiguous: output pixels, or rows of x transposed before. Bound by those loads, 4 bytes a product, of which
// the first-level cache delivers 32 a clock: the 16 rows of a block walk k at the same pace and share them. In a
// convolution an entry is a channel and a tap, its activations are those of the pixels moved by the tap, or zeros.
#pragma once

#include <type_traits>

#include "cuda/sparse_codebook/sparse_codebook_walk.cuh"

namespace slim::cuda::sparse_codebook {

struct ForwardParams {
  Activations a;
  Weight w;
  const void* x;        // few columns: [k][kM], but [k] for one; many: as loads find it, see `step`
  int64_t step;         // many columns: elements of x from one k to the next, within a channel
  int32_t table_bytes;  // of shared memory
  int32_t staged;       // one column: bytes of x copied to shared memory, or 0
};

// kN consecutive elements, the first aligned to as many of them as make 16 bytes.
template <class T, int kN>
__device__ __forceinline__ void load_elements(const T* from, float (&out)[kN]) {
  if constexpr (kN == 1) {
    out[0] = to_float(*from);
  } else if constexpr (sizeof(T) == 4) {
    static_assert(kN % 4 == 0, "whole vectors");
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      const uint4 v = load_constant(reinterpret_cast<const uint4*>(from + i));
      out[i] = as_float(v.x);
      out[i + 1] = as_float(v.y);
      out[i + 2] = as_float(v.z);
      out[i + 3] = as_float(v.w);
    }
  } else {
    static_assert(kN == 8, "one vector");
    const uint4 v = load_constant(reinterpret_cast<const uint4*>(from));
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = to_float(T{uint16_t(words[i])});
      out[2 * i + 1] = to_float(T{uint16_t(words[i] >> 16)});
    }
  }
}

// Adds up kM values over the lanes: each exchange halves the values a lane keeps, or, when one is left, adds it up. The
// lanes of the i-th share of the warp hold value i.
template <int kM>
__device__ __forceinline__ float sum_lanes(float (&v)[kM], int lane) {
  int by = kWarp / 2;
#pragma unroll
  for (int n = kM / 2; n >= 1; n /= 2, by /= 2) {
    const bool upper = lane & by;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float give = upper ? v[i] : v[i + n];
      v[i] = (upper ? v[i + n] : v[i]) + shuffle_xor(give, by);
    }
  }
#pragma unroll
  for (int left = kWarp / kM / 2; left >= 1; left /= 2) v[0] += shuffle_xor(v[0], left);
  return v[0];
}

constexpr int kRowWarps = 8;

// Up to kM columns. Grid: x over rows (striding). Threads: kRowWarps warps. Shared: tables, then x if it is staged.
template <class T, int kM>
__global__ void __launch_bounds__(kRowWarps* kWarp) few_columns_kernel(const ForwardParams p) {
  unsigned char* shared = dynamic_shared();
  const int thread = int(threadIdx.x), lane = thread % kWarp;
  const Tables<T> tables(p.w, shared, p.table_bytes, kRowWarps * kWarp, thread);
  const T* x = static_cast<const T*>(p.x);
  if (kM == 1 && p.staged) {
    T* to = reinterpret_cast<T*>(shared + p.table_bytes);
    for (int i = thread; i < int(p.w.width); i += kRowWarps * kWarp) to[i] = x[i];
    x = to;
  }
  sync_threads();
  for (int64_t row = int64_t(blockIdx.x) * kRowWarps + thread / kWarp; row < p.w.rows;
       row += int64_t(gridDim.x) * kRowWarps) {
    const T* table = tables.of_row(row);
    float sum[kM] = {};
    Walk walk(p.w, row);
    while (walk.more()) {
      const Step s = walk.step();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (s.column[j] == kNone) continue;
        const float value = to_float(table[tables.index(s.column[j], s.codes, j)]);
        float from[kM];
        load_elements<T, kM>(x + int64_t(s.column[j]) * kM, from);
#pragma unroll
        for (int m = 0; m < kM; ++m) sum[m] += value * from[m];
      }
    }
    float y = sum_lanes<kM>(sum, lane);
    const int64_t m = lane / (kWarp / kM);
    if (lane % (kWarp / kM) == 0 && m < p.a.m) {
      if (p.a.bias) y += to_float(static_cast<const T*>(p.a.bias)[row]);
      if (p.a.relu && y < 0) y = 0;
      static_cast<T*>(p.a.y)[m * p.a.n + row] = from_float<T>(y);
    }
  }
}

constexpr int kManyWarps = 16;  // rows of a block

struct alignas(8) Entry {
  uint32_t k;
  float value;
};
struct alignas(16) TapEntry {
  int32_t channel, y, x;  // of the group; of the input, from the pixel's first
  float value;
};

template <bool kTaps, int kV>
constexpr int many_shared_bytes() {
  constexpr int entries = kManyWarps * kChunk * int(kTaps ? sizeof(TapEntry) : sizeof(Entry));
  constexpr int sums = kManyWarps * (kV * kWarp + 1) * 4;
  return entries > sums ? entries : (sums + 15) / 16 * 16;  // the one after the other
}

// kTaps: a convolution of any kernel, stride and padding, over x as it lies; else columns lie side by side. kV: columns
// of a lane. Grid: x over rows, y over tiles of columns (striding). Shared: tables, then entries and sums.
template <class T, bool kTaps, int kV>
__global__ void __launch_bounds__(kManyWarps* kWarp) many_columns_kernel(const ForwardParams p) {
  using E = std::conditional_t<kTaps, TapEntry, Entry>;
  constexpr int kColumns = kV * kWarp;
  unsigned char* shared = dynamic_shared();
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const Tables<T> tables(p.w, shared, p.table_bytes, kManyWarps * kWarp, thread);
  sync_threads();
  E* entries = reinterpret_cast<E*>(shared + p.table_bytes) + warp * kChunk;
  const ConvGeometry& g = p.a.geometry;
  const int64_t pixels = p.a.conv ? g.out_h * g.out_w : 1, columns = p.a.conv ? g.batch * pixels : p.a.m;
  const int64_t row0 = int64_t(blockIdx.x) * kManyWarps, row = row0 + warp;
  const bool active = row < p.w.rows;
  // A group's first activation. Only convolutions have groups.
  const T* x = static_cast<const T*>(p.x);
  if (p.a.conv && active) x += row / (p.a.n / p.a.groups) * (g.channels / p.a.groups) * g.height * g.width;

  for (int64_t column0 = int64_t(blockIdx.y) * kColumns; column0 < columns; column0 += int64_t(gridDim.y) * kColumns) {
    // Lanes beyond the last column do the work of the last one, and do not write.
    const T* base[kV];
    int y0[kV], x0[kV];
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      int64_t column = column0 + v * kWarp + lane;
      column = column < columns ? column : columns - 1;
      base[v] = x + column;
      y0[v] = x0[v] = 0;
      if (p.a.conv) {
        const int64_t image = column / pixels, pixel = column - image * pixels;
        base[v] = x + image * g.channels * g.height * g.width + pixel;
        if (kTaps) {
          const int64_t out_y = pixel / g.out_w;
          y0[v] = int(out_y * g.stride_h - g.pad_h);
          x0[v] = int((pixel - out_y * g.out_w) * g.stride_w - g.pad_w);
          base[v] = x + image * g.channels * g.height * g.width;
        }
      }
    }
    float sum[kV] = {};
    if (active) {
      const T* table = tables.of_row(row);
      Walk walk(p.w, row);
      while (walk.more()) {
        const Step s = walk.step();
        int at = s.rank;
        sync_warp();  // all lanes have read the chunk before
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (s.column[j] == kNone) continue;
          const float value = to_float(table[tables.index(s.column[j], s.codes, j)]);
          if constexpr (kTaps) {
            const auto taps = uint32_t(g.kernel_h * g.kernel_w), kernel_w = uint32_t(g.kernel_w);
            const uint32_t channel = s.column[j] / taps, tap = s.column[j] - channel * taps, tap_y = tap / kernel_w;
            entries[at++] = {int32_t(channel), int32_t(tap_y * uint32_t(g.dilation_h)),
                             int32_t((tap - tap_y * kernel_w) * uint32_t(g.dilation_w)), value};
          } else {
            entries[at++] = {s.column[j], value};
          }
        }
        sync_warp();
#pragma unroll(kV == 1 ? 8 : kTaps ? 1 : 2)
        for (int i = 0; i < s.weights; ++i) {
          const E e = entries[i];
          if constexpr (kTaps) {
            const int64_t channel = int64_t(e.channel) * p.step;
#pragma unroll
            for (int v = 0; v < kV; ++v) {
              const int iy = y0[v] + e.y, ix = x0[v] + e.x;
              const bool inside = uint32_t(iy) < uint32_t(g.height) && uint32_t(ix) < uint32_t(g.width);
              const float from = inside ? to_float(base[v][channel + int64_t(iy) * g.width + ix]) : 0.0f;
              sum[v] += e.value * from;
            }
          } else {
            const int64_t offset = int64_t(e.k) * p.step;
#pragma unroll
            for (int v = 0; v < kV; ++v) sum[v] += e.value * to_float(base[v][offset]);
          }
        }
      }
      const float bias = p.a.bias ? to_float(static_cast<const T*>(p.a.bias)[row]) : 0.0f;
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        sum[v] += bias;
        if (p.a.relu && sum[v] < 0) sum[v] = 0;
      }
    }
    T* y = static_cast<T*>(p.a.y);
    if (p.a.conv) {
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        const int64_t column = column0 + v * kWarp + lane;
        if (!active || column >= columns) continue;
        const int64_t image = column / pixels, pixel = column - image * pixels;
        y[(image * p.a.n + row) * pixels + pixel] = from_float<T>(sum[v]);
      }
      continue;
    }
    // y [m][n]: sums of 16 rows are written side by side.
    float* sums = reinterpret_cast<float*>(shared + p.table_bytes);
    sync_threads();
#pragma unroll
    for (int v = 0; v < kV; ++v) sums[warp * (kColumns + 1) + v * kWarp + lane] = sum[v];
    sync_threads();
    const int to_row = thread % kManyWarps;
    for (int c = thread / kManyWarps; c < kColumns; c += kWarp)
      if (column0 + c < columns && row0 + to_row < p.w.rows)
        y[(column0 + c) * p.a.n + row0 + to_row] = from_float<T>(sums[to_row * (kColumns + 1) + c]);
    sync_threads();
  }
}

// x [m, k] -> [k, width], zeros beyond m. Grid: x over k, y over columns (striding), 32 each. Threads: 32 x 8.
struct TransposeParams {
  const void* x;
  void* out;
  int64_t m, k, width;
};

template <class T>
__global__ void __launch_bounds__(32 * 8) transpose_kernel(const TransposeParams p) {
  T* tile = reinterpret_cast<T*>(dynamic_shared());  // [32][33]
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  const int64_t k0 = int64_t(blockIdx.x) * 32;
  for (int64_t m0 = int64_t(blockIdx.y) * 32; m0 < p.width; m0 += int64_t(gridDim.y) * 32) {
    for (int i = int(threadIdx.y); i < 32; i += 8) {
      const int64_t m = m0 + i, k = k0 + threadIdx.x;
      tile[i * 33 + threadIdx.x] = m < p.m && k < p.k ? x[m * p.k + k] : from_float<T>(0.0f);
    }
    sync_threads();
    for (int i = int(threadIdx.y); i < 32; i += 8) {
      const int64_t k = k0 + i, m = m0 + threadIdx.x;
      if (k < p.k && m < p.width) out[k * p.width + m] = tile[threadIdx.x * 33 + i];
    }
    sync_threads();
  }
}

}  // namespace slim::cuda::sparse_codebook
