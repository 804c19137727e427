// SPDX-License-Identifier: Apache-2.0
// A warp walks the entries of one row, 128 at a time: four gaps, a word, and four codes to a lane.
//
//     lane     0                 1                          sum of a lane's steps, and how many are weights, packed in
//     gaps     g0 g1 g2 g3       g4 g5 g6 g7      …         one register: five shuffles make running sums of both
//     codes    c0 c1 c2 c3       c4 c5 c6 c7      …         `bits` each, cut out of two words
//
// About 50 instructions for 128 entries. A step is gap + 1, but 255 for a skip, which holds no weight.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/sparse_codebook/sparse_codebook.h"

namespace slim::cuda::sparse_codebook {

constexpr int kSkip = 255;
constexpr int kChunk = 128;  // entries of a warp's step
constexpr uint32_t kNone = 0xffffffffu;

// Word `at` (a multiple of 4) of `bytes` bytes, with zeros beyond their end.
__device__ __forceinline__ uint32_t load_word(const uint8_t* p, int64_t at, int64_t bytes) {
  if (at + 4 <= bytes) return load_constant(reinterpret_cast<const uint32_t*>(p + at));
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i)
    if (at + i < bytes) word |= uint32_t(load_constant(p + at + i)) << (8 * i);
  return word;
}

// What a lane holds of a chunk.
struct Step {
  uint32_t column[4];  // kNone where there is no weight
  uint32_t codes;      // of the four entries, the first lowest
  int rank;            // weights of the chunk before the lane's first
  int weights;         // of the chunk
};

class Walk {
 public:
  // All lanes of a warp, of one row.
  __device__ __forceinline__ Walk(const Weight& w, int64_t row) : w_(w) {
    const auto limit = uint32_t(w.entries);
    begin_ = uint32_t(w.row_offsets[row]);
    end_ = uint32_t(w.row_offsets[row + 1]);
    end_ = end_ < limit ? end_ : limit;
    at_ = begin_ & ~3u;
    last_ = kNone;  // column -1
    lane_ = threadIdx.x % kWarp;
  }

  __device__ __forceinline__ bool more() const { return at_ < end_ && begin_ < end_; }

  __device__ __forceinline__ Step step() {
    Step s;
    const uint32_t e = at_ + 4 * lane_;
    const bool any = e < end_;
    const uint32_t gaps = any ? load_word(w_.gaps, e, w_.entries) : 0;
    s.codes = any ? codes_at(e) : 0;
    uint32_t sum[4], total = 0, weights = 0;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t gap = gaps >> (8 * j) & 255;
      const bool inside = e + j >= begin_ && e + j < end_;
      const bool holds = inside && gap != kSkip;
      total += inside ? gap : 0;
      total += holds;
      weights += holds;
      sum[j] = holds ? total : kNone;
    }
    const uint32_t own = total | weights << 16;  // at most 32 * 4 * 255 and 128 in all
    uint32_t up_to = own;
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const uint32_t before = shuffle_up(up_to, by);
      up_to += lane_ >= uint32_t(by) ? before : 0;
    }
    const uint32_t all = shuffle(up_to, kWarp - 1), before = up_to - own;
    s.rank = int(before >> 16);
    s.weights = int(all >> 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t column = last_ + (before & 0xffff) + sum[j], most = uint32_t(w_.width) - 1;
      s.column[j] = sum[j] == kNone ? kNone : column < most ? column : most;  // a malformed stream stays inside
    }
    last_ += all & 0xffff;
    at_ += kChunk;
    return s;
  }

 private:
  // Codes of four entries, from e (a multiple of 4) on.
  __device__ __forceinline__ uint32_t codes_at(uint32_t e) const {
    const int64_t bit = int64_t(e) * w_.bits, at = (bit >> 5) * 4;
    const uint32_t shift = uint32_t(bit) & 31;
    const uint32_t low = load_word(w_.codes, at, w_.code_bytes);
    const uint32_t high = shift + 4 * w_.bits > 32 ? load_word(w_.codes, at + 4, w_.code_bytes) : 0;
    return funnel_right(low, high, shift);
  }

  const Weight& w_;
  uint32_t begin_, end_, at_, last_, lane_;
};

// Where a weight's value is: in a table of the row, of the group of columns, or of all. Tables that belong to no row are
// copied to shared memory if they are small.
constexpr int kSharedTables = 4096;  // bytes at most

template <class T>
class Tables {
 public:
  // Elements to be copied, in bytes rounded up to 16.
  static int shared_bytes(const Weight& w) {
    const int64_t bytes = w.tables * (int64_t(1) << w.bits) * int64_t(sizeof(T));
    return w.group_size >= 0 && bytes <= kSharedTables ? int(bytes + 15) & ~15 : 0;
  }

  // All threads of the block; read nothing before sync_threads().
  __device__ __forceinline__ Tables(const Weight& w, unsigned char* shared, int bytes, int threads, int thread)
      : table_(static_cast<const T*>(w.codebook)), bits_(w.bits), group_size_(w.group_size) {
    mask_ = (1u << w.bits) - 1;
    shift_ =
        w.group_size > 0 && (w.group_size & (w.group_size - 1)) == 0 ? 31 - leading_zeros(uint32_t(w.group_size)) : -1;
    if (bytes) {
      T* to = reinterpret_cast<T*>(shared);
      const int count = int(w.tables) << w.bits;
      for (int i = thread; i < count; i += threads) to[i] = table_[i];
      table_ = to;
    }
  }

  // First element of what a row looks values up in.
  __device__ __forceinline__ const T* of_row(int64_t row) const {
    return group_size_ < 0 ? table_ + (row << bits_) : table_;
  }

  // Index there of entry j of a lane's four.
  __device__ __forceinline__ uint32_t index(uint32_t column, uint32_t codes, int j) const {
    const uint32_t code = codes >> (j * bits_) & mask_;
    if (group_size_ <= 0) return code;
    return ((shift_ >= 0 ? column >> shift_ : column / uint32_t(group_size_)) << bits_) + code;
  }

 private:
  const T* table_;
  uint32_t mask_;
  int bits_, group_size_, shift_;
};

}  // namespace slim::cuda::sparse_codebook
