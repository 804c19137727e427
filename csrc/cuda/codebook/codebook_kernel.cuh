// SPDX-License-Identifier: Apache-2.0
// What is not a product of tiles: decoding, sums over the members of an entry, convolutions with few rows in a group.
#pragma once

#include "cuda/codebook/codebook_weights.cuh"

namespace slim::cuda::codebook {

// First entry of the table of a weight.
__device__ __forceinline__ int64_t table_of(const Weight& w, int64_t row, int64_t column) {
  const int64_t table = w.group_size == kOneTable      ? 0
                        : w.group_size == kTablePerRow ? row
                                                       : uint32_t(column) / uint32_t(w.group_size);
  return table << w.bits;
}

// ---- decode ---------------------------------------------------------------------------------------------------------

struct DecodeParams {
  Weight w;
  void* out;  // [rows, width], aligned to 16 bytes
};

constexpr int kDecodeThreads = 256;

// Eight codes a thread, which are whole bytes of the stream; writes bound it.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads) decode_kernel(const DecodeParams p) {
  struct alignas(16) Eight {
    T v[8];
  };
  const int64_t total = p.w.rows * p.w.width;
  const T* const tables = static_cast<const T*>(p.w.tables);
  for (int64_t i = (int64_t(blockIdx.x) * kDecodeThreads + threadIdx.x) * 8; i < total;
       i += int64_t(gridDim.x) * kDecodeThreads * 8) {
    const int count = total - i < 8 ? int(total - i) : 8;
    uint64_t codes = 0;
    for (int b = 0; b < (count * p.w.bits + 7) / 8; ++b)
      codes |= uint64_t(load_constant(p.w.codes + i / 8 * p.w.bits + b)) << (8 * b);
    int64_t row = i / p.w.width, column = i - row * p.w.width;
    Eight out;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < count)
        out.v[j] = load_constant(tables + table_of(p.w, row, column) + int(codes & ((1u << p.w.bits) - 1)));
      codes >>= p.w.bits;
      if (++column == p.w.width) {
        column = 0;
        ++row;
      }
    }
    T* const to = static_cast<T*>(p.out) + i;
    if (count == 8) {
#pragma unroll
      for (int h = 0; h < int(sizeof(T)) / 2; ++h)
        reinterpret_cast<uint4*>(to)[h] = reinterpret_cast<const uint4*>(out.v)[h];
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < count) to[j] = out.v[j];
    }
  }
}

// ---- sums of members ------------------------------------------------------------------------------------------------

// A table has the members [row0, row1) x [column0, column1). They are cut into chunks, of which each is one block's; in
// it every lane of every warp has sums of its own, [warp][entry][lane] in shared memory: no atomics, no conflicts. They
// are added up in the order of lanes and warps, the chunks' sums in the order of chunks: always the same bits.
struct SumParams {
  Weight w;
  const void* grad;  // [rows, width]
  float* partial;    // [chunks][tables][2**bits]
  int64_t chunks;
};

constexpr int kSumWarps = 8;  // fewer where the tables are large
constexpr int sum_warps(int bits) { return bits <= 5 ? kSumWarps : kSumWarps >> (bits - 5); }

// Grid: x over chunks, y over tables (striding).
template <class T>
__global__ void __launch_bounds__(kSumWarps* kWarp) sum_kernel(const SumParams p) {
  const int entries = 1 << p.w.bits, warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  float* const all = reinterpret_cast<float*>(dynamic_shared());
  float* const sums = all + int(threadIdx.x) / kWarp * entries * kWarp + lane;
  const T* const grad = static_cast<const T*>(p.grad);
  // A weight has fewer than 2^31 entries: 32 bits do for all but bits of the stream.
  const uint32_t width = uint32_t(p.w.width);
  for (uint32_t table = blockIdx.y; table < uint32_t(p.w.table_count); table += gridDim.y) {
    const bool of_row = p.w.group_size == kTablePerRow, of_group = p.w.group_size > 0;
    const uint32_t row0 = of_row ? table : 0, rows = of_row ? 1 : uint32_t(p.w.rows);
    const uint32_t column0 = of_group ? table * uint32_t(p.w.group_size) : 0, left = width - column0;
    const uint32_t columns = of_group && p.w.group_size < left ? uint32_t(p.w.group_size) : left;
    const uint32_t each = (rows * columns + uint32_t(p.chunks) - 1) / uint32_t(p.chunks);
    const uint32_t begin = each * blockIdx.x;
    const uint32_t end = begin + each < rows * columns ? begin + each : rows * columns;
    for (int e = 0; e < entries; ++e) sums[e * kWarp] = 0.0f;
    for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const uint32_t row = i / columns, at = (row0 + row) * width + column0 + (i - row * columns);
      const int code = int(stream_bits(p.w.codes, p.w.bytes, int64_t(at) * p.w.bits, p.w.bits));
      sums[code * kWarp] += to_float(load_constant(grad + at));
    }
    sync_threads();
    for (int e = int(threadIdx.x); e < entries; e += int(blockDim.x)) {
      float sum = 0.0f;
      for (int w = 0; w < warps; ++w)
        for (int l = 0; l < kWarp; ++l)  // each thread begins elsewhere: banks
          sum += all[(w * entries + e) * kWarp + (l + e) % kWarp];
      p.partial[(blockIdx.x * p.w.table_count + table) * entries + e] = sum;
    }
    sync_threads();
  }
}

struct SumReduceParams {
  const float* partial;  // [chunks][total]
  void* sums;            // [total]
  int64_t chunks, total;
  int32_t entries;
  bool zero;  // entry 0 of every table is no sum
};

template <class T>
__global__ void __launch_bounds__(256) sum_reduce_kernel(const SumReduceParams p) {
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < p.total; i += int64_t(gridDim.x) * 256) {
    float sum = 0.0f;
    for (int64_t c = 0; c < p.chunks; ++c) sum += p.partial[c * p.total + i];
    if (p.zero && i % p.entries == 0) sum = 0.0f;
    static_cast<T*>(p.sums)[i] = from_float<T>(sum);
  }
}

// ---- convolutions with few rows in a group --------------------------------------------------------------------------

// A tile of tensor cores would be mostly padding: a block has one output channel and kPixels pixels, of which each
// thread computes one. The channel's weights are decoded to shared memory, kTaps at a time, with each the place of its
// input. Bound by the reads of x, which neighbours share in the first-level cache.
struct FewRowsParams {
  Activations a;
  Weight w;
};

constexpr int kPixels = 256, kTaps = 256;

struct alignas(16) Tap {
  float weight;
  int32_t channel, y, x;
};

// Grid: x over pixels of all images, y over output channels (striding).
template <class T>
__global__ void __launch_bounds__(kPixels) few_rows_kernel(const FewRowsParams p) {
  Tap* const taps = reinterpret_cast<Tap*>(dynamic_shared());
  const ConvGeometry& g = p.a.geometry;
  const int64_t pixels = g.out_h * g.out_w, column = int64_t(blockIdx.x) * kPixels + threadIdx.x;
  const bool inside = column < g.batch * pixels;
  const int64_t image = inside ? column / pixels : 0;
  const uint32_t pixel = inside ? uint32_t(column - image * pixels) : 0, out_w = uint32_t(g.out_w);
  const int y0 = int(pixel / out_w * uint32_t(g.stride_h)) - int(g.pad_h);
  const int x0 = int(pixel % out_w * uint32_t(g.stride_w)) - int(g.pad_w);
  const int height = int(g.height), width = int(g.width);
  const uint32_t rows = uint32_t(p.a.n / p.a.groups);
  const int64_t channels = g.channels / p.a.groups;
  for (int64_t row = blockIdx.y; row < p.a.n; row += gridDim.y) {
    const T* const from =
        static_cast<const T*>(p.a.x) + (image * g.channels + uint32_t(row) / rows * channels) * g.height * g.width;
    float sum = 0.0f;
    for (int64_t k0 = 0; k0 < p.a.k; k0 += kTaps) {
      const int count = int(p.a.k - k0 < kTaps ? p.a.k - k0 : kTaps);
      if (int(threadIdx.x) < count) {
        const int64_t k = k0 + threadIdx.x;
        const int code = int(stream_bits(p.w.codes, p.w.bytes, (row * p.w.width + k) * p.w.bits, p.w.bits));
        const uint32_t of_kernel = uint32_t(g.kernel_h * g.kernel_w), kernel_w = uint32_t(g.kernel_w);
        const uint32_t channel = uint32_t(k) / of_kernel, rest = uint32_t(k) - channel * of_kernel;
        taps[threadIdx.x] = {to_float(load_constant(static_cast<const T*>(p.w.tables) + table_of(p.w, row, k) + code)),
                             int32_t(channel), int32_t(rest / kernel_w * uint32_t(g.dilation_h)),
                             int32_t(rest % kernel_w * uint32_t(g.dilation_w))};
      }
      sync_threads();
      for (int i = 0; i < count; ++i) {
        const Tap tap = taps[i];
        const int y = y0 + tap.y, x = x0 + tap.x;
        if (inside && unsigned(y) < unsigned(height) && unsigned(x) < unsigned(width))
          sum += tap.weight * to_float(load_constant(from + (tap.channel * height + y) * width + x));
      }
      sync_threads();
    }
    if (p.a.bias) sum += to_float(load_constant(static_cast<const T*>(p.a.bias) + row));
    if (p.a.relu && sum < 0.0f) sum = 0.0f;
    if (inside) static_cast<T*>(p.a.y)[(image * p.a.n + row) * pixels + pixel] = from_float<T>(sum);
  }
}

}  // namespace slim::cuda::codebook
