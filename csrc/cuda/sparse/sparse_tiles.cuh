// SPDX-License-Identifier: Apache-2.0
// Unstructured weights on tensor cores: loaded as sparse, multiplied as dense. What decides is bytes and instructions:
//
//   global                    shared (one stage)                registers
//   cell of 16 x 64: 144 B -> 32 words of bits, 8 prefixes ->  lane: its word, a place in the values
//   its values, packed     -> as they lie                  ->  bit set ? value there, and one on : 0    -> A fragment
//
// No dense tile is ever written: a set bit is one 2-byte load from shared memory into the register that the mma reads.
// For a fragment that is about 30 instructions of a warp, 8 of them loads, for 256 weights; for few columns they bound
// the kernel from about 85 % zeros on, bytes below. Values may be numbers (PackedValues) or codes of a table.
//
// Zeros are multiplied as well, so a NaN or Inf among the activations of a column spoils it for all rows. The main loop
// asks `exact` for every sum that is NaN: it walks the stored weights of one row. Rare, slow, and right.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/params.h"
#include "cuda/sparse/sparse_plan.h"

namespace slim::cuda::sparse {

// x of one column at depth k of a group; 0 in the padding of a convolution.
template <class T>
__device__ __forceinline__ float activation_at(const Activations& a, int64_t group, int64_t column, int64_t k) {
  const T* x = static_cast<const T*>(a.x);
  if (!a.conv) return to_float(load_constant(x + column * a.k + k));
  const ConvGeometry& g = a.geometry;  // fewer than 2^31 entries of an image, and columns
  const uint32_t taps = uint32_t(g.kernel_h * g.kernel_w), tap = uint32_t(k) % taps, kernel_w = uint32_t(g.kernel_w);
  const uint32_t pixels = uint32_t(g.out_h * g.out_w), out_w = uint32_t(g.out_w);
  const uint32_t image = uint32_t(column) / pixels, pixel = uint32_t(column) % pixels;
  const int64_t h = int64_t(pixel / out_w) * g.stride_h - g.pad_h + tap / kernel_w * g.dilation_h;
  const int64_t w = int64_t(pixel % out_w) * g.stride_w - g.pad_w + tap % kernel_w * g.dilation_w;
  if (h < 0 || h >= g.height || w < 0 || w >= g.width) return 0.0f;
  const int64_t channel = group * (g.channels / a.groups) + uint32_t(k) / taps;
  return to_float(load_constant(x + ((image * g.channels + channel) * g.height + h) * g.width + w));
}

// Values of T as they are, in packed order. What another source of values must have too:
template <class T>
struct PackedValues {
  struct Params {
    const T* values;  // [nnz], aligned to 16 bytes
  };
  static constexpr int kBlockBytes = 0;                                 // shared memory for tables
  static constexpr int kCellBytes = kCellValues * int(sizeof(T)) + 16;  // shared memory for the values of a cell

  // All threads of the block; the main loop synchronizes afterwards. `rows`: of the block's tile.
  __device__ __forceinline__ PackedValues(const Params& p, unsigned char* /*block_shared*/, int64_t /*row0*/,
                                          int /*rows*/, int /*group*/)
      : values_(p.values) {}

  // Values [begin, end) of a cell to shared memory, by `threads` threads. Copies begin at a multiple of 16 bytes, so
  // with up to 15 bytes of the cell before.
  __device__ __forceinline__ void load(unsigned char* shared, uint32_t begin, uint32_t end, int thread, int threads) {
    const uint32_t first = begin & ~7u;
    for (uint32_t at = first + 8 * uint32_t(thread); at < end; at += 8 * uint32_t(threads)) {
      const int valid = end - at < 8 ? int(end - at) * 2 : 16;
      copy_async<16>(shared + (at - first) * 2, values_ + at, valid);
    }
  }

  // A cursor says where in the block's shared memory a value lies, so that it is an address as it is: that of the first
  // value of a cell whose values were loaded to dynamic_shared() + offset, and how far it is from one to the next.
  __device__ __forceinline__ uint32_t origin(uint32_t offset, uint32_t begin) const { return offset + (begin & 7) * 2; }
  __device__ __forceinline__ uint32_t stride() const { return 2; }

  // The 16 bits of the value at a cursor; row in the block's tile, k from the start of the group.
  __device__ __forceinline__ uint32_t at(uint32_t cursor, int /*row*/, int64_t /*k*/) const {
    return *reinterpret_cast<const uint16_t*>(dynamic_shared() + cursor);
  }

  // The value at place i of the packed order, from global memory.
  static __device__ __forceinline__ float exact(const Params& p, uint32_t i, int /*group*/, int64_t /*row*/,
                                                int64_t /*k*/) {
    return to_float(load_constant(p.values + i));
  }

 private:
  const T* values_;
};

// What tiles of any shape share.
template <class T, class Values>
struct TileExact {
  struct Params {
    Tiles tiles;
    typename Values::Params values;
  };

  // The sum of output `row` (of the group) and `column`, over the stored weights alone.
  static __device__ float exact(const Params& p, const Activations& a, int group, int64_t row, int64_t column) {
    const int64_t first = (group * int64_t(p.tiles.strips) + row / kStripRows) * p.tiles.strip_cells;
    const int eighth = int(row % 8);
    const uint32_t rows = row / 8 % 2 ? 0xccccccccu : 0x33333333u;  // registers 1 and 3, or 0 and 2
    float sum = 0.0f;
    for (int c = 0; c < p.tiles.strip_cells; ++c) {
      const unsigned char* cell = p.tiles.cells + (first + c) * kCellBytes;
      uint32_t at = load_constant(p.tiles.starts + first + c) +
                    load_constant(reinterpret_cast<const uint16_t*>(cell + kCellMaskBytes) + eighth);
      for (int t = 0; t < 4; ++t) {
        const uint32_t mask = load_constant(reinterpret_cast<const uint32_t*>(cell) + 4 * eighth + t);
        for (uint32_t left = mask & rows; left; left &= left - 1) {
          const int bit = first_bit(left);
          const int64_t k = int64_t(c) * kCellDepth + (bit >> 3) * 16 + (bit >> 2 & 1) * 8 + 2 * t + (bit & 1);
          const uint32_t i = at + uint32_t(popcount(mask & ((1u << bit) - 1)));
          sum += Values::exact(p.values, i, group, row, k) * activation_at<T>(a, group, column, k);
        }
        at += uint32_t(popcount(mask));
      }
    }
    return sum;
  }
};

// A policy for the main loop (common/matmul.cuh). T: Half or BFloat16.
template <class T, class Tile_, class Values>
class TileWeights {
 public:
  using Value = T;
  using Tile = Tile_;
  using Exact = TileExact<T, Values>;
  using Params = typename Exact::Params;

  static_assert(Tile::kDepth == kCellDepth, "a step is a cell");
  static constexpr int kStrips = Tile::kRows / kStripRows;
  static constexpr int kFragments = kStrips / Tile::kWarpsR;  // of a warp
  static constexpr int kStripThreads = Tile::kThreads / kStrips;
  // Of each strip: its cell, and its values; then where each strip's values start.
  static constexpr int kStripBytes = kCellBytes + (Values::kCellBytes + 15) / 16 * 16;
  static constexpr int kStageBytes = kStrips * kStripBytes + (kStrips * 4 + 15) / 16 * 16;
  static constexpr int kBlockBytes = Values::kBlockBytes;
  static constexpr bool kExpands = false;
  static_assert(kStripThreads * kStrips == Tile::kThreads && kFragments * Tile::kWarpsR == kStrips, "whole strips");

  __device__ __forceinline__ TileWeights(const Params& p, unsigned char* block_shared, int64_t row0, int group,
                                         int split, int splits)
      : p_(p), values_(p.values, block_shared, row0, Tile::kRows, group) {
    const int cells = p.tiles.strip_cells;
    first_ = int(int64_t(cells) * split / splits);
    steps_ = int(int64_t(cells) * (split + 1) / splits) - first_;
    const int thread = int(threadIdx.x);
    const int64_t strip = row0 / kStripRows + thread / kStripThreads;
    inside_ = strip < p.tiles.strips;
    cell_ = inside_ ? (group * int64_t(p.tiles.strips) + strip) * cells + first_ : 0;
    if (inside_ && steps_ > 0) {
      begin_ = load_constant(p.tiles.starts + cell_);
      end_ = load_constant(p.tiles.starts + cell_ + 1);
    }
  }

  __device__ __forceinline__ int steps() const { return steps_; }
  __device__ __forceinline__ int64_t depth(int step) const { return int64_t(first_ + step) * kCellDepth; }

  // Called once for each step, in ascending order: where the values of the next cell end is fetched here, a step before
  // it is needed, so that no load waits for another.
  __device__ __forceinline__ void load(unsigned char* stage, int step) {
    const int strip = int(threadIdx.x) / kStripThreads, thread = int(threadIdx.x) % kStripThreads;
    unsigned char* to = stage + strip * kStripBytes;
    const unsigned char* cell = p_.tiles.cells + (cell_ + step) * kCellBytes;
    for (int i = thread; i < kCellBytes / 16; i += kStripThreads)  // rows beyond the last become empty
      copy_async<16>(to + 16 * i, inside_ ? cell + 16 * i : p_.tiles.cells, inside_ ? 16 : 0);
    const uint32_t begin = inside_ ? begin_ : 0;
    if (thread == 0) reinterpret_cast<uint32_t*>(stage + kStrips * kStripBytes)[strip] = begin;
    if (!inside_) return;
    values_.load(to + kCellBytes, begin, end_, thread, kStripThreads);
    begin_ = end_;
    if (step + 1 < steps_) end_ = load_constant(p_.tiles.starts + cell_ + step + 2);
  }

  __device__ __forceinline__ void expand(unsigned char*, int) {}

  __device__ __forceinline__ void fragment(uint32_t (&a)[4], const unsigned char* stage, int step, int row, int k) {
    const int strip = int(unsigned(row) / kStripRows), lane = int(threadIdx.x) % kWarp;
    const unsigned char* cell = stage + strip * kStripBytes;
    const int f =
        int(unsigned(strip) % kFragments);  // the compiler knows it: a warp's first row is a multiple of all its rows
    if (k == 0) {                           // the lane's part of the cell
      const uint32_t mask = reinterpret_cast<const uint32_t*>(cell)[lane];
      const uint32_t count = uint32_t(popcount(mask));
      uint32_t sum = count, left = shuffle_up(sum, 1);
      if (lane % 4 >= 1) sum += left;
      left = shuffle_up(sum, 2);
      if (lane % 4 >= 2) sum += left;
      const uint32_t before = reinterpret_cast<const uint16_t*>(cell + kCellMaskBytes)[lane / 4] + sum - count;
      mask_[f] = mask;
      const uint32_t begin = reinterpret_cast<const uint32_t*>(stage + kStrips * kStripBytes)[strip];
      cursor_[f] = values_.origin(uint32_t(cell + kCellBytes - dynamic_shared()), begin) + values_.stride() * before;
    }
    const uint32_t mask = mask_[f];
    uint32_t cursor = cursor_[f];
    const int64_t k0 = depth(step) + k + lane % 4 * 2;
    const int own = row + lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t v[2] = {0, 0};
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (mask & (1u << (k / 2 + 2 * j + h))) {
          v[h] = values_.at(cursor, own + 8 * (j & 1), k0 + 8 * (j >> 1) + h);
          cursor += values_.stride();
        }
      a[j] = byte_permute(v[0], v[1], 0x5410);
    }
    cursor_[f] = cursor;
  }

 private:
  const Params& p_;
  Values values_;
  int first_, steps_;
  bool inside_;
  int64_t cell_;
  uint32_t begin_ = 0, end_ = 0;
  uint32_t mask_[kFragments], cursor_[kFragments];
};

}  // namespace slim::cuda::sparse
