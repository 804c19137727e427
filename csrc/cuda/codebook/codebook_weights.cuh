// SPDX-License-Identifier: Apache-2.0
// Codes as the A operand of the main loop (common/matmul.cuh).
//
// Raw codes travel in plan order (codebook.h) through the stages of the main loop; a fragment is looked up in registers
// when it is needed, so global memory sees `bits` bits a weight and shared memory the same plus the look-ups. These are
// what bounds few columns once the bytes do not: one look-up of shared memory serves 32 lanes if their words lie in
// different banks (or are the same word), so
//
//   PairWeights    16-bit values, one table, up to 4 bits: two neighbouring codes are one index into a table of pairs,
//                  2^(2 bits) words, each 32 times, [pair][lane] (after FLUTE, arXiv 2407.10960): no two lanes ever
//                  share a bank, and a word is a whole register of the fragment. 4 bits: 32 KiB, 4 look-ups for
//                  16 x 16 weights.
//   SingleWeights  the rest, a code at a time. One table: [entry][lane], 32 times too. Tables per group of columns or
//                  per row: all that the block needs, as they are. Tables that do not fit, and groups that a fragment
//                  may straddle, are read from global memory: slow, but right.
//
// Extracting: the bits of a fragment's codes are shifted up by the size of a table entry once, high:low = v << shift;
// then one funnel shift and one AND give the byte offset of an entry.
#pragma once

#include "cuda/codebook/codebook.h"
#include "cuda/common/device.cuh"
#include "cuda/common/matmul.cuh"

namespace slim::cuda::codebook {

// `count` (at most 8) codes from bit `at` of a stream of `bytes` bytes, of which reading none beyond the end.
__device__ __forceinline__ uint64_t stream_bits(const uint8_t* codes, int64_t bytes, int64_t at, int count) {
  const int64_t first = at >> 3;
  const int last = int(at & 7) + count;  // bits from the first byte on
  uint64_t v = 0;
#pragma unroll 1
  for (int i = 0; i * 8 < last; ++i)
    if (first + i < bytes) v |= uint64_t(load_constant(codes + first + i)) << (8 * i);
  return (v >> (at & 7)) & ((uint64_t(1) << count) - 1);
}

struct CodeParams {
  Weight w;
  uint32_t group_magic;  // ceil(2^32 / (group_size / k of a fragment)), or 0: look tables up one by one
};

// Codes through the stages. kBits: 0 if known at run time only, then at most kMaxBits.
template <class Tile, int kBits, int kMaxBits>
class CodeStages {
 public:
  static constexpr int kSlabs = Tile::kDepth / kSlab, kRowTiles = Tile::kRows / 16, kWarps = Tile::kThreads / kWarp;
  static constexpr int kStageBytes = kRowTiles * kSlabs * kMaxBits * 128;
  static constexpr bool kExpands = false;
  static_assert(Tile::kDepth % kSlab == 0, "a step is made of whole slabs");
  using Params = CodeParams;

  __device__ __forceinline__ int steps() const { return steps_; }
  __device__ __forceinline__ int64_t depth(int step) const { return int64_t(first_ + step) * Tile::kDepth; }

  __device__ __forceinline__ void load(unsigned char* stage, int step) const {
    const int warp = int(threadIdx.x) / kWarp, slab = (first_ + step) * kSlabs, bytes = bits() * 128;
    const int left = slabs_ - slab < kSlabs ? slabs_ - slab : kSlabs;
#pragma unroll
    for (int begin = 0; begin < kRowTiles; begin += kWarps) {
      const int i = begin + warp;
      if (kRowTiles % kWarps != 0 && i >= kRowTiles) break;
      unsigned char* const to = stage + i * kSlabs * bytes;
      if (w_.plan) {
        const unsigned char* const from = plan_ + (int64_t(i) * slabs_ + slab) * bytes;
        const int valid = i < tiles_ ? left * bytes : 0;
        for (int at = lane_ * 16; at < kSlabs * bytes; at += kWarp * 16)
          copy_async<16>(to + at, at < valid ? from + at : w_.plan, at < valid ? 16 : 0);
      } else {
        for (int j = 0; j < kSlabs; ++j)
          order(reinterpret_cast<uint32_t*>(to + j * bytes), i * 16, int64_t(slab + j) * kSlab);
      }
    }
  }

 protected:
  __device__ __forceinline__ CodeStages(const Params& p, int64_t row0, int group, int split, int splits) : w_(p.w) {
    lane_ = int(threadIdx.x) % kWarp;
    const int64_t rows = w_.rows / w_.groups, tiles = (rows + 15) / 16, tile = row0 / 16;
    slabs_ = int((w_.width + kSlab - 1) / kSlab);
    const int64_t all = (slabs_ + kSlabs - 1) / kSlabs;
    first_ = int(all * split / splits);
    steps_ = int(all * (split + 1) / splits) - first_;
    tiles_ = int(tiles - tile < kRowTiles ? tiles - tile : kRowTiles);
    plan_ = w_.plan + (group * tiles + tile) * slabs_ * (bits() * 128);
    row_ = group * rows + row0;
    rows_ = int(rows - row0 < Tile::kRows ? rows - row0 : Tile::kRows);
  }

  __device__ __forceinline__ int bits() const { return kBits ? kBits : w_.bits; }

  // The words of a slab of which rows row … of the tile are those of one row tile.
  __device__ __forceinline__ const uint32_t* words(const unsigned char* stage, int row, int k) const {
    return reinterpret_cast<const uint32_t*>(stage) + (row / 16 * kSlabs + k / kSlab) * bits() * kWarp;
  }
  // 32 bits from bit `at` of a lane's words on; what lies beyond the last is something else.
  __device__ __forceinline__ uint32_t bits_at(const uint32_t* words, int lane, int at) const {
    const int word = at >> 5, next = word + 1 < bits() ? word + 1 : word;
    return funnel_right(words[word * kWarp + lane], words[next * kWarp + lane], uint32_t(at));
  }
  // Columns that are left from k of a step on.
  __device__ __forceinline__ int columns_left(int step, int k) const { return int(w_.width - depth(step)) - k; }

  const Weight& w_;
  const unsigned char* plan_;  // of the tile's first row
  int64_t row_;                // the tile's first row, over all groups
  int rows_, tiles_;           // rows and row tiles of the tile that exist
  int first_, steps_, slabs_;  // of this block: first step, steps; of a row: slabs
  int lane_;

 private:
  // From the canonical stream: one slab, this lane's words. Plain stores, a bit at a time where it has to be.
  __device__ void order(uint32_t* to, int row, int64_t column) const {
    const int g = lane_ / 4, t = lane_ % 4;
    uint64_t held = 0;
    int count = 0, word = 0;
#pragma unroll 1
    for (int pair = 0; pair < 16; ++pair) {
      const int r = row + g + (pair & 1) * 8;
      const int64_t c = column + pair / 4 * 16 + (pair >> 1 & 1) * 8 + 2 * t;
      const int64_t left = r < rows_ ? w_.width - c : 0;
      if (left > 0)
        held |= stream_bits(w_.codes, w_.bytes, ((row_ + r) * w_.width + c) * bits(), left > 1 ? 2 * bits() : bits())
                << count;
      count += 2 * bits();
      if (count >= 32) {
        to[word++ * kWarp + lane_] = uint32_t(held);
        held >>= 32;
        count -= 32;
      }
    }
  }
};

// Two 16-bit values of one look-up.
template <class T, class Tile, int kBits>
class PairWeights : public CodeStages<Tile, kBits, kBits ? kBits : 4> {
  using Base = CodeStages<Tile, kBits, kBits ? kBits : 4>;

 public:
  using Value = T;
  using Params = CodeParams;
  static constexpr int kBlockBytes = (1 << 2 * (kBits ? kBits : 4)) * 128;

  __device__ __forceinline__ PairWeights(const Params& p, unsigned char* table, int64_t row0, int group, int split,
                                         int splits)
      : Base(p, row0, group, split, splits), table_(table) {
    const int bits = this->bits(), pairs = 1 << 2 * bits;
    const T* const entries = static_cast<const T*>(p.w.tables);
    for (int i = int(threadIdx.x); i < pairs; i += Tile::kThreads) {
      const uint32_t low = load_constant(entries + (i & ((1 << bits) - 1))).bits,
                     high = load_constant(entries + (i >> bits)).bits;
      const uint32_t pair = low | high << 16;
      uint4* const to = reinterpret_cast<uint4*>(table + i * 128);
#pragma unroll
      for (int j = 0; j < 8; ++j) to[(j + i) & 7] = uint4{pair, pair, pair, pair};  // eight lanes, eight places
    }
    mask_ = uint32_t(pairs - 1) << 7;
  }

  __device__ __forceinline__ void fragment(uint32_t (&a)[4], const unsigned char* stage, int step, int row,
                                           int k) const {
    const int bits = this->bits();
    const uint32_t v = this->bits_at(this->words(stage, row, k), this->lane_, k % kSlab / 16 * 8 * bits);
    const uint32_t low = v << 7, high = v >> 25, lane = uint32_t(this->lane_) * 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t at = (funnel_right(low, high, uint32_t(2 * bits * r)) & mask_) | lane;
      a[r] = *reinterpret_cast<const uint32_t*>(table_ + at);
    }
    const int left = this->columns_left(step, k);
    if (left < 16) cut(a, left - this->lane_ % 4 * 2);
  }

 private:
  // Zeros beyond the last column, `left` from this lane's first on: a table may hold Inf or NaN.
  __device__ __forceinline__ static void cut(uint32_t (&a)[4], int left) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int n = left - r / 2 * 8;
      a[r] = n >= 2 ? a[r] : n == 1 ? a[r] & 0xffffu : 0;
    }
  }

  const unsigned char* table_;  // [pair][lane]
  uint32_t mask_;
};

// One value of a look-up; of any size, from any table.
template <class T, class Tile>
class SingleWeights : public CodeStages<Tile, 0, 8> {
  using Base = CodeStages<Tile, 0, 8>;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

 public:
  using Value = T;
  using Params = CodeParams;
  static constexpr int kBlockBytes = 32 * 1024;
  static constexpr int kK = 32 / int(sizeof(T));  // k of a fragment

  __device__ __forceinline__ SingleWeights(const Params& p, unsigned char* table, int64_t row0, int group, int split,
                                           int splits)
      : Base(p, row0, group, split, splits), table_(table), magic_(p.group_magic) {
    const int entries = 1 << p.w.bits;
    const Bits* const from = static_cast<const Bits*>(p.w.tables);
    shift_ = sizeof(T) == 2 ? 1 : 2;
    if (p.w.group_size == kOneTable) {
      kind_ = kShared;
      shift_ = 7;
      for (int i = int(threadIdx.x); i < entries; i += Tile::kThreads) {
        const uint32_t v = load_constant(from + i);
        uint4* const to = reinterpret_cast<uint4*>(table + i * 128);
#pragma unroll
        for (int j = 0; j < 8; ++j) to[(j + i) & 7] = uint4{v, v, v, v};
      }
    } else if (p.w.group_size == kTablePerRow) {
      kind_ = Tile::kRows * entries * int(sizeof(T)) <= kBlockBytes ? kRows : kScattered;
      if (kind_ == kRows) keep(table, from + this->row_ * entries, this->rows_ * entries, Tile::kRows * entries);
    } else {
      kind_ = kScattered;
      if (magic_ && this->steps_ > 0) {
        first_table_ = group_of(unsigned(this->depth(0) / kK));
        const int64_t end = this->depth(this->steps_) < p.w.width ? this->depth(this->steps_) : p.w.width;
        const int count = int(group_of(unsigned((end - 1) / kK)) - first_table_ + 1);
        if (count <= kBlockBytes / int(sizeof(T)) >> p.w.bits) {
          kind_ = kGroups;
          keep(table, from + int64_t(first_table_) * entries, count * entries, count * entries);
        }
      }
    }
    mask_ = uint32_t(entries - 1) << shift_;
  }

  __device__ __forceinline__ void fragment(uint32_t (&a)[4], const unsigned char* stage, int step, int row,
                                           int k) const {
    const int bits = this->w_.bits, lane = this->lane_, left = this->columns_left(step, k);
    const uint32_t* const words = this->words(stage, row, k);
    const int at = k % kSlab / 16 * 8 * bits;
    // Four codes each: [row half][neighbour]; in register i of a product rows half i & 1.
    uint32_t first, second;
    if constexpr (sizeof(T) == 2) {
      first = this->bits_at(words, lane, at);
      second = this->bits_at(words, lane, at + 4 * bits);
    } else {  // columns t and t + 4 of this half of a 16-bit product are the codes of two lanes
      const int from = lane / 4 * 4 + lane % 4 / 2, half = at + k / 8 % 2 * 4 * bits;
      first = this->bits_at(words, from, half);
      second = this->bits_at(words, from + 2, half);
    }
    if (kind_ == kScattered) {
      scattered(a, first, second, row, step, k);
    } else {
      uint32_t base[2];  // of the tables of rows g and g + 8
      if (kind_ == kRows) {
        base[0] = uint32_t(row + lane / 4) << (bits + shift_);
        base[1] = base[0] + (8u << (bits + shift_));
      } else {
        base[0] = kind_ == kShared
                      ? uint32_t(lane) * 4
                      : (group_of(unsigned((this->depth(step) + k) / kK)) - first_table_) << (bits + shift_);
        base[1] = base[0];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t v = h ? second : first, low = v << shift_, high = v >> (32 - shift_);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (sizeof(T) == 2) {
            const uint32_t even = (funnel_right(low, high, uint32_t(2 * i * bits)) & mask_) + base[i];
            const uint32_t odd = (funnel_right(low, high, uint32_t((2 * i + 1) * bits)) & mask_) + base[i];
            a[2 * h + i] = uint32_t(entry(even)) | uint32_t(entry(odd)) << 16;
          } else {
            a[2 * h + i] = entry((funnel_right(low, high, uint32_t((2 * i + lane % 2) * bits)) & mask_) + base[i]);
          }
        }
      }
    }
    if (left < kK) cut(a, left);
  }

 private:
  enum Kind { kShared, kRows, kGroups, kScattered };

  __device__ __forceinline__ uint32_t entry(uint32_t at) const { return *reinterpret_cast<const Bits*>(table_ + at); }
  // The table of a fragment, of which `index` counts them along k.
  __device__ __forceinline__ unsigned group_of(unsigned index) const {
    return magic_ == 1 ? index : unsigned(uint64_t(index) * magic_ >> 32);
  }
  __device__ __forceinline__ static void keep(unsigned char* table, const Bits* from, int count, int room) {
    for (int i = int(threadIdx.x); i < room; i += Tile::kThreads)
      reinterpret_cast<Bits*>(table)[i] = i < count ? load_constant(from + i) : Bits(0);
  }

  __device__ void scattered(uint32_t (&a)[4], uint32_t first, uint32_t second, int row, int step, int k) const {
    const int bits = this->w_.bits, lane = this->lane_;
    const uint32_t mask = (1u << bits) - 1;
    const int64_t size = this->w_.group_size;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      a[r] = 0;
      const int of_tile = row + lane / 4 + r % 2 * 8;
#pragma unroll
      for (int e = 0; e < 4 / int(sizeof(T)); ++e) {
        const int neighbour = sizeof(T) == 2 ? e : lane % 2;
        const uint32_t code = (r / 2 ? second : first) >> ((r % 2 * 2 + neighbour) * bits) & mask;
        const int64_t column =
            this->depth(step) + k + (sizeof(T) == 2 ? r / 2 * 8 + lane % 4 * 2 + e : r / 2 * 4 + lane % 4);
        if (of_tile >= this->rows_ || column >= this->w_.width) continue;
        const int64_t table = size == kTablePerRow ? this->row_ + of_tile : uint32_t(column) / uint32_t(size);
        a[r] |= uint32_t(load_constant(static_cast<const Bits*>(this->w_.tables) + (table << bits) + code)) << (16 * e);
      }
    }
  }

  __device__ __forceinline__ void cut(uint32_t (&a)[4], int left) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if constexpr (sizeof(T) == 2) {
        const int n = left - r / 2 * 8 - this->lane_ % 4 * 2;
        a[r] = n >= 2 ? a[r] : n == 1 ? a[r] & 0xffffu : 0;
      } else {
        a[r] = this->lane_ % 4 + r / 2 * 4 < left ? a[r] : 0;
      }
    }
  }

  const unsigned char* table_;
  uint32_t magic_, mask_;
  unsigned first_table_ = 0;
  int shift_;  // of an entry in bytes
  Kind kind_;
};

}  // namespace slim::cuda::codebook
