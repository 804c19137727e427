// SPDX-License-Identifier: Apache-2.0
// Sparse shared weights on tensor cores: loaded as bits and codes, multiplied as dense.
//
//   global                    shared (one stage)             shared (a lane's own 64 bytes)      registers
//   cell of 16 x 64: 144 B -> bits of each lane, prefixes -> its 32 weights, zeros where
//   its codes, 4 bits each -> as they lie                 -> no bit is set                    -> A fragment: 16 bytes
//
// A lane clears its 64 bytes, goes from set bit to set bit, looks each code up in a table in shared memory and puts the
// value where its fragment is: about 13 instructions for a weight of the lane that has most, 30 more for a cell. Nobody
// else reads what a lane writes, so no barrier is needed; a warp decodes the strips that it multiplies, once for all
// columns of the block. At 90 % zeros a lane has 3 weights of 32, the fullest one of a warp about 8.
//
// Zeros are multiplied as well: CodeExact is what the main loop asks where that made a NaN.
#pragma once

#include "cuda/common/matmul.cuh"
#include "cuda/sparse/sparse_tiles.cuh"
#include "cuda/sparse_codebook/sparse_codebook_walk.cuh"

namespace slim::cuda::sparse_codebook {

template <class T>
struct CodeExact {
  struct Params {
    const unsigned char* cells;
    const uint32_t* starts;
    const unsigned char* codes;
    Weight w;
    int64_t group_rows;
    int32_t strips, strip_cells;  // of a group
    int32_t bits;                 // of a code in the plan
    int32_t shift;                // a table for each 2**shift columns; 31 where columns share
  };

  // The sum of output `row` (of the group) and `column`, over the stored weights alone, from the stored stream.
  static __device__ float exact(const Params& p, const Activations& a, int group, int64_t row, int64_t column) {
    const int64_t r = group * (a.n / a.groups) + row;
    const Tables<T> tables(p.w, nullptr, 0, 0, 0);
    const T* table = tables.of_row(r);
    float sum = 0.0f;
    uint32_t k = kNone;
    const int64_t last = p.w.row_offsets[r + 1], end = last < p.w.entries ? last : p.w.entries;
    for (int64_t e = p.w.row_offsets[r]; e < end; ++e) {
      const uint32_t gap = load_constant(p.w.gaps + e);
      k += gap;
      if (gap == kSkip) continue;
      ++k;
      const int64_t bit = e * p.w.bits, at = bit >> 3;
      uint32_t code = load_constant(p.w.codes + at);
      if (at + 1 < p.w.code_bytes) code |= uint32_t(load_constant(p.w.codes + at + 1)) << 8;
      sum += to_float(table[tables.index(k, code >> (bit & 7), 0)]) * sparse::activation_at<T>(a, group, column, k);
    }
    return sum;
  }
};

// T: Half or BFloat16.
template <class T, class Tile_>
class CodeWeights {
 public:
  using Value = T;
  using Tile = Tile_;
  using Exact = CodeExact<T>;
  using Params = typename Exact::Params;

  static_assert(Tile::kDepth == sparse::kCellDepth && Tile::kWarpsC == 1, "a step is a cell, decoded once");
  static constexpr int kStrips = Tile::kRows / sparse::kStripRows;
  static constexpr int kStripThreads = Tile::kThreads / kStrips;
  static constexpr int kCodeBytes = sparse::kCellValues + 32;  // 8 bits each; what is copied with them at either end
  static constexpr int kStripBytes = sparse::kCellBytes + kCodeBytes;
  static constexpr int kStageBytes = kStrips * kStripBytes + (kStrips * 4 + 15) / 16 * 16;
  static constexpr int kTableBytes = 8192;  // what takes more is read from global memory
  static constexpr int kLaneBytes = 80;     // 64, but eight lanes that read 16 bytes each meet all banks
  static constexpr int kBlockBytes = kTableBytes + kStrips * kWarp * kLaneBytes;
  static constexpr bool kExpands = false;
  static_assert(kStripThreads * kStrips == Tile::kThreads && kStripBytes % 16 == 0, "whole strips");

  __device__ __forceinline__ CodeWeights(const Params& p, unsigned char* block_shared, int64_t row0, int group,
                                         int split, int splits)
      : p_(p), fragments_(block_shared + kTableBytes) {
    const int cells = p.strip_cells, thread = int(threadIdx.x);
    first_ = int(int64_t(cells) * split / splits);
    steps_ = int(int64_t(cells) * (split + 1) / splits) - first_;
    const int64_t strip = row0 / sparse::kStripRows + thread / kStripThreads;
    inside_ = strip < p.strips;
    cell_ = inside_ ? (group * int64_t(p.strips) + strip) * cells + first_ : 0;
    if (inside_ && steps_ > 0) {
      begin_ = load_constant(p.starts + cell_);
      end_ = load_constant(p.starts + cell_ + 1);
    }
    // Tables: of the rows of the tile, or all.
    const bool by_row = p.w.group_size < 0;
    row_stride_ = by_row ? 1u << p.w.bits : 0;
    table_ = static_cast<const T*>(p.w.codebook);
    int64_t count = p.w.tables << p.w.bits;
    if (by_row) {
      const int64_t first = (group * p.group_rows + row0) << p.w.bits;
      table_ += first;
      count = count - first < int64_t(Tile::kRows) << p.w.bits ? count - first : int64_t(Tile::kRows) << p.w.bits;
    }
    if (count * int64_t(sizeof(T)) <= kTableBytes) {
      T* to = reinterpret_cast<T*>(block_shared);
      for (int i = thread; i < int(count); i += Tile::kThreads) to[i] = table_[i];
      table_ = to;
    }
  }

  __device__ __forceinline__ int steps() const { return steps_; }
  __device__ __forceinline__ int64_t depth(int step) const { return int64_t(first_ + step) * sparse::kCellDepth; }

  // Called once for each step, in ascending order: where the codes of the next cell end is fetched a step ahead.
  __device__ __forceinline__ void load(unsigned char* stage, int step) {
    const int strip = int(threadIdx.x) / kStripThreads, thread = int(threadIdx.x) % kStripThreads;
    unsigned char* to = stage + strip * kStripBytes;
    const unsigned char* cell = p_.cells + (cell_ + step) * sparse::kCellBytes;
    for (int i = thread; i < sparse::kCellBytes / 16; i += kStripThreads)  // strips beyond the last become empty
      copy_async<16>(to + 16 * i, inside_ ? cell + 16 * i : p_.cells, inside_ ? 16 : 0);
    if (thread == 0) reinterpret_cast<uint32_t*>(stage + kStrips * kStripBytes)[strip] = inside_ ? begin_ : 0;
    if (!inside_) return;
    // From the chunk of 16 bytes in which they start, and zeros: lanes read whole words, up to one beyond their codes.
    const int64_t start = (int64_t(begin_) * p_.bits >> 7) * 16, end = (int64_t(end_) * p_.bits + 7) >> 3;
    for (int64_t at = start + 16 * thread; at < end + 4; at += 16 * kStripThreads) {
      const int64_t left = end - at;
      copy_async<16>(to + sparse::kCellBytes + (at - start), p_.codes + (left > 0 ? at : 0),
                     left >= 16 ? 16
                     : left > 0 ? int(left)
                                : 0);
    }
    begin_ = end_;
    if (step + 1 < steps_) end_ = load_constant(p_.starts + cell_ + step + 2);
  }

  __device__ __forceinline__ void expand(unsigned char*, int) {}

  __device__ __forceinline__ void fragment(uint32_t (&a)[4], const unsigned char* stage, int step, int row, int k) {
    const int strip = row / sparse::kStripRows, lane = int(threadIdx.x) % kWarp;
    unsigned char* own = fragments_ + (strip * kWarp + lane) * kLaneBytes;
    if (k == 0) decode(own, stage, step, strip, lane);
    const uint4 v = *reinterpret_cast<const uint4*>(own + k);  // 16 k of a fragment: 16 bytes of a lane
    a[0] = v.x;
    a[1] = v.y;
    a[2] = v.z;
    a[3] = v.w;
  }

 private:
  __device__ __forceinline__ void decode(unsigned char* own, const unsigned char* stage, int step, int strip,
                                         int lane) {
    const unsigned char* cell = stage + strip * kStripBytes;
    const uint32_t mask = reinterpret_cast<const uint32_t*>(cell)[lane];
    const uint32_t count = uint32_t(popcount(mask));
    uint32_t sum = count, left = shuffle_up(sum, 1);
    if (lane % 4 >= 1) sum += left;
    left = shuffle_up(sum, 2);
    if (lane % 4 >= 2) sum += left;
    const uint32_t before = reinterpret_cast<const uint16_t*>(cell + sparse::kCellMaskBytes)[lane / 4] + sum - count;
    const uint32_t begin = reinterpret_cast<const uint32_t*>(stage + kStrips * kStripBytes)[strip];
    const auto bits = uint32_t(p_.bits), code = (1u << bits) - 1, per = 32 / bits;
    uint32_t bit = (begin * bits & 127) + before * bits;  // of the lane's first code, from the chunk that was copied
    const uint32_t* words = reinterpret_cast<const uint32_t*>(cell + sparse::kCellBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) *reinterpret_cast<uint4*>(own + 16 * i) = uint4{0, 0, 0, 0};
    const uint32_t first = uint32_t(strip * sparse::kStripRows + lane / 4) * row_stride_;
    const auto k0 = uint32_t(depth(step)) + lane % 4 * 2;
    const bool grouped = p_.shift < 31;
    for (uint32_t rest = mask; rest;) {
      uint32_t word = funnel_right(words[bit >> 5], words[(bit >> 5) + 1], bit & 31);
      bit += 32;
#pragma unroll 1
      for (uint32_t i = 0; i < per && rest; ++i) {
        const auto b = uint32_t(first_bit(rest));
        rest &= rest - 1;
        uint32_t index = first + (word & code) + (b & 2) * (4 * row_stride_);  // eight rows on
        word >>= bits;
        if (grouped) index += (k0 + (b >> 3) * 16 + (b & 4) * 2 + (b & 1)) >> p_.shift << p_.w.bits;
        reinterpret_cast<uint16_t*>(own)[b] = table_[index].bits;
      }
    }
  }

  const Params& p_;
  unsigned char* fragments_;
  const T* table_;
  uint32_t row_stride_;
  int first_, steps_;
  bool inside_;
  int64_t cell_;
  uint32_t begin_ = 0, end_ = 0;
};

}  // namespace slim::cuda::sparse_codebook
