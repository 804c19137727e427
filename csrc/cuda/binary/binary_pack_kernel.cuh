// SPDX-License-Identifier: Apache-2.0
// Signs to words: activations at every call, weights once (the plan). All bound by the bytes they read.
//
//   rows     a lane loads 16 bytes of a row, 4 or 8 signs of neighbours; 8 or 4 lanes put theirs together to a word
//   pixels   lanes are neighbouring pixels, so that each channel of theirs is one transaction; a lane collects the signs
//            of 32 channels in a register: [channel][pixel] -> [pixel][channel] without shared memory
//
// 1 where x >= 0: sign(0) is +1, and NaN is not >= 0.
#pragma once

#include "cuda/binary/binary.h"
#include "cuda/common/device.cuh"

namespace slim::cuda::binary {

constexpr int kPackThreads = 256;
constexpr int kPackWarps = kPackThreads / kWarp;

template <class T>
struct alignas(16) Vector {
  static constexpr int kCount = 16 / int(sizeof(T));
  T v[kCount];
};

template <class T>
__device__ __forceinline__ uint32_t sign_bit(T v) {
  return to_float(v) >= 0.0f ? 1u : 0u;
}

// Grid: x over rows, p.warps of a block to each. Words beyond k become 0.
template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_rows_kernel(const PackRowsParams p) {
  constexpr int V = Vector<T>::kCount;
  constexpr int kBatch = 4;  // loads in flight
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = int64_t(blockIdx.x) * (kPackWarps / p.warps) + warp / p.warps;
  const bool active = row < p.m;
  const int64_t bits = active ? p.column_bytes * 8 : 0;
  const T* x = static_cast<const T*>(p.x) + (active ? row : 0) * p.k;
  uint32_t* out = reinterpret_cast<uint32_t*>(p.bits + (active ? row : 0) * p.column_bytes);
  int count = 0;
  if (p.vectors) {
    constexpr int64_t kStep = kWarp * V;
    for (int64_t at = (warp % p.warps) * kBatch * kStep; at < bits; at += p.warps * kBatch * kStep) {
      Vector<T> v[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t k = at + i * kStep + lane * V;
        if (k < p.k) v[i] = load_constant(reinterpret_cast<const Vector<T>*>(x + k));  // k ends at a multiple of V
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t k = at + i * kStep + lane * V;
        uint32_t word = 0;
        if (k < p.k)
#pragma unroll
          for (int j = 0; j < V; ++j) word |= sign_bit(v[i].v[j]) << j;
        count += popcount(word);
        word <<= lane % (32 / V) * V;
        word |= shuffle_xor(word, 1);
        word |= shuffle_xor(word, 2);
        if constexpr (V == 4) word |= shuffle_xor(word, 4);
        if (lane % (32 / V) == 0 && k < bits) out[k / 32] = word;
      }
    }
  } else {
    for (int64_t at = (warp % p.warps) * kBatch * kWarp; at < bits; at += p.warps * kBatch * kWarp) {
      T v[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (at + i * kWarp + lane < p.k) v[i] = load_constant(x + at + i * kWarp + lane);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t k = at + i * kWarp;
        const uint32_t word = warp_ballot(k + lane < p.k && sign_bit(v[i]));
        if (lane == 0 && k < bits) out[k / 32] = word;
        if (lane == 0) count += popcount(word);
      }
    }
  }
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) count += shuffle_xor(count, mask);
  if (p.warps == 1) {
    if (lane == 0 && active) p.sums[row] = count;
    return;
  }
  int32_t* parts = reinterpret_cast<int32_t*>(dynamic_shared());
  if (lane == 0) parts[warp] = count;
  sync_threads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kPackWarps; ++i) count += parts[i];
    p.sums[row] = count;
  }
}

// Grid: x over 32 pixels of all images; warps of a block share the 32-bit words of those pixels.
template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_pixels_kernel(const PackPixelsParams p) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t pixels = p.images * p.plane, pixel = int64_t(blockIdx.x) * kWarp + lane;
  const bool active = pixel < pixels;
  const int64_t image = active ? pixel / p.plane : 0, inner = active ? pixel - image * p.plane : 0;
  const T* x = static_cast<const T*>(p.x) + image * p.groups * p.channels * p.plane + inner;
  const int64_t per_group = p.words * 2, words = p.groups * per_group;
  uint32_t* out = reinterpret_cast<uint32_t*>(p.bits) + (active ? pixel : 0) * words;
  int count = 0;
  if (active)
    for (int64_t w = warp; w < words; w += kPackWarps) {
      const int64_t group = p.groups == 1 ? 0 : w / per_group, first = (w - group * per_group) * 32;
      const int channels = int(p.channels - first < 32 ? p.channels - first : 32);
      const T* from = x + (group * p.channels + first) * p.plane;
      uint32_t word = 0;
      if (channels == 32) {
#pragma unroll 16
        for (int c = 0; c < 32; ++c, from += p.plane) word |= sign_bit(load_constant(from)) << c;
      } else {
        for (int c = 0; c < channels; ++c, from += p.plane) word |= sign_bit(load_constant(from)) << c;
      }
      count += popcount(word);
      out[w] = word;
    }
  if (p.groups != 1) return;
  int32_t* parts = reinterpret_cast<int32_t*>(dynamic_shared());  // [warps][32]
  parts[threadIdx.x] = count;
  sync_threads();
  if (warp == 0 && active) {
    for (int i = 1; i < kPackWarps; ++i) count += parts[i * kWarp + lane];
    p.sums[pixel] = count;
  }
}

// One thread per 32-bit word of the result.
__global__ void __launch_bounds__(kPackThreads) regroup_kernel(const RegroupParams p) {
  const int64_t per_group = p.words * 2, i = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (i >= p.pixels * p.groups * per_group) return;
  const int64_t w = i % per_group, group = i / per_group % p.groups, pixel = i / per_group / p.groups;
  const int64_t left = p.channels - w * 32;
  uint32_t word = 0;
  if (left > 0) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(p.source + pixel * p.source_bytes);
    const int64_t bit = group * p.channels + w * 32, at = bit / 32;
    const uint32_t low = load_constant(from + at);
    const uint32_t high = (at + 1) * 4 < p.source_bytes ? load_constant(from + at + 1) : 0;
    word = funnel_right(low, high, uint32_t(bit % 32));
    if (left < 32) word &= (1u << left) - 1;
  }
  reinterpret_cast<uint32_t*>(p.bits)[i] = word;
}

// Four lanes to an item.
__global__ void __launch_bounds__(kPackThreads) count_kernel(const CountParams p) {
  const int64_t item = (int64_t(blockIdx.x) * kPackThreads + threadIdx.x) / 4;
  const uint64_t* from = reinterpret_cast<const uint64_t*>(p.bits) + item * p.words;
  int count = 0;
  if (item < p.items)
    for (int64_t w = threadIdx.x % 4; w < p.words; w += 4) count += popcount(load_constant(from + w));
  count += shuffle_xor(count, 1);
  count += shuffle_xor(count, 2);
  if (threadIdx.x % 4 == 0 && item < p.items) p.sums[item] = count;
}

// One thread per 64-bit word of the weights.
__global__ void __launch_bounds__(kPackThreads) plan_words_kernel(const PlanParams p) {
  const int64_t per_row = p.layout.row_bytes / 8, i = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (i >= p.shape.rows * per_row) return;
  const int64_t row = i / per_row, at = i % per_row, tap = at / p.layout.words, first = at % p.layout.words * 64;
  const int64_t taps = p.shape.kernel_h * p.shape.kernel_w;
  const int64_t left = tap < taps ? p.shape.channels - first : 0;
  int64_t bit = (row * p.shape.channels + first) * taps + tap;
  uint64_t word = 0;
  for (int c = 0; c < 64 && c < left; ++c, bit += taps)
    word |= uint64_t((load_constant(p.signs + bit / 8) >> (bit % 8)) & 1) << c;
  reinterpret_cast<uint64_t*>(p.plan)[i] = word;
}

// One thread per 64 weights of a row.
__global__ void __launch_bounds__(kPackThreads) float_plan_kernel(const FloatPlanParams p) {
  const int64_t i = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (i >= p.shape.groups * p.layout.blocks * p.layout.rows) return;
  const int64_t inner = i % p.layout.rows, block = i / p.layout.rows % p.layout.blocks;
  const int64_t group = i / p.layout.rows / p.layout.blocks, group_rows = p.shape.rows / p.shape.groups;
  const int64_t width = p.shape.channels * p.shape.kernel_h * p.shape.kernel_w;
  const int64_t left = inner < group_rows ? width - block * 64 : 0;
  int64_t bit = (group * group_rows + inner) * width + block * 64;
  uint2 words{0, 0};
  for (int k = 0; k < 64 && k < left; ++k, ++bit) {
    const uint32_t one = (load_constant(p.signs + bit / 8) >> (bit % 8)) & 1;
    (k < 32 ? words.x : words.y) |= one << (k % 32 / 2 + k % 2 * 16);
  }
  reinterpret_cast<uint2*>(p.plan)[i] = words;
}

// One thread per row, after the weights are there.
__global__ void __launch_bounds__(kPackThreads) plan_border_kernel(const PlanParams p) {
  const int64_t row = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (row >= p.shape.rows) return;
  const int64_t kh = p.shape.kernel_h, kw = p.shape.kernel_w, words = p.layout.words;
  const uint64_t* from = reinterpret_cast<const uint64_t*>(p.plan + row * p.layout.row_bytes);
  int32_t* border = reinterpret_cast<int32_t*>(p.plan + p.layout.border) + row;
  const int64_t line_pitch = (kw + 1) * p.shape.rows;
  for (int64_t j = 0; j <= kw; ++j) border[j * p.shape.rows] = 0;
  for (int64_t i = 0; i < kh; ++i) {
    int32_t* line = border + (i + 1) * line_pitch;
    int32_t sum = 0;
    line[0] = 0;
    for (int64_t j = 0; j < kw; ++j) {
      int32_t ones = 0;
      for (int64_t w = 0; w < words; ++w) ones += popcount(*from++);
      sum += int32_t(p.shape.channels) - 2 * ones;
      line[(j + 1) * p.shape.rows] = line[(j + 1) * p.shape.rows - line_pitch] + sum;
    }
  }
}

}  // namespace slim::cuda::binary
