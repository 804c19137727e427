// SPDX-License-Identifier: Apache-2.0
// Activations as the B operand of the main loop: k x columns, from global to shared memory and on to fragments.
//
//   linear       x [columns, k]: a stage is [column][k], fragments by ldmatrix
//   convolution  x [batch, channels, height, width]: a stage is [k][pixel], fragments by ldmatrix.trans (float32 by
//                plain loads); k counts (channel, r, s), columns count output pixels over all images
//
// Rows of a stage lie in chunks of 16 bytes, chunk c of row r at place c ^ f(r), so that the eight rows that ldmatrix
// reads at once lie in different banks. What lies beyond k or beyond the last column is zero.
//
// Copies are asynchronous, as wide as address and strides allow (16, 8 or 4 bytes; all threads of a block alike).
// 16-bit pixels of k x k convolutions cannot be copied so: load() fetches them into registers, and store() puts them
// into shared memory after the products of another step have hidden the wait. Rows of 16-bit numbers at odd addresses
// are rare: those are fetched and put at once.
//
// A convolution asks for the same (channel, r, s) at every pixel, so a table in shared memory holds for each k of a
// step its offset in the image and its place under the kernel; each thread keeps one or two pixels and goes down the
// table.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/params.h"

namespace slim::cuda {

__device__ __forceinline__ int64_t count_columns(const Activations& a) {
  return a.conv ? a.geometry.batch * a.geometry.out_h * a.geometry.out_w : a.m;
}

// The largest power of two that divides v; at most 16.
__device__ __forceinline__ int low_bit(uint64_t v) {
  const int b = int(v & 15);
  return b == 0 ? 16 : b & -b;
}

// Bytes from the start of a tile to a byte of a row, in rows of kRowBytes. kWords: fragments are read word by word,
// four rows of 32 bytes at once; else by ldmatrix, eight rows of 16 bytes.
template <int kRowBytes, bool kWords>
__device__ __forceinline__ int place(int row, int byte) {
  constexpr int kChunks = kRowBytes / 16;
  static_assert(kChunks >= 1 && (kChunks & (kChunks - 1)) == 0, "rows of whole chunks, a power of two");
  int turn = 0;
  if constexpr (kWords)
    turn = kChunks >= 8 ? (row & 3) * 2 : kChunks == 4 ? (row & 2) : 0;
  else
    turn = kChunks >= 8 ? row & 7 : kChunks == 4 ? (row >> 1) & 3 : kChunks == 2 ? (row >> 2) & 1 : 0;
  return row * kRowBytes + (byte ^ (turn * 16));
}

// B operands of kTiles tiles of 8 columns from `column` on, of 32 bytes of k from `k` on. The tile in shared memory is
// [column][k], or [k][column] if kTrans.
template <int kSize, bool kTrans, int kRowBytes, int kTiles>
__device__ __forceinline__ void load_b(uint32_t (&b)[kTiles][2], const unsigned char* tile, int column, int k) {
  const int lane = int(threadIdx.x) % kWarp, row = lane & 7, matrix = lane >> 3;
  if constexpr (kTrans && kSize == 4) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        b[j][h] = *reinterpret_cast<const uint32_t*>(
            tile + place<kRowBytes, true>(k + 4 * h + lane % 4, (column + 8 * j + lane / 4) * 4));
  } else {
    const auto at = [&](int j) {
      return tile + (kTrans ? place<kRowBytes, false>(k + (matrix & 1) * 8 + row, (column + 8 * j) * kSize)
                            : place<kRowBytes, false>(column + 8 * j + row, k * kSize + (matrix & 1) * 16));
    };
#pragma unroll
    for (int j = 0; j + 1 < kTiles; j += 2) {
      uint32_t r[4];
      if constexpr (kTrans)
        load_matrix_trans(r, at(j + (matrix >> 1)));
      else
        load_matrix(r, at(j + (matrix >> 1)));
      b[j][0] = r[0];
      b[j][1] = r[1];
      b[j + 1][0] = r[2];
      b[j + 1][1] = r[3];
    }
    if constexpr (kTiles % 2 == 1) {
      if constexpr (kTrans)
        load_matrix_trans(b[kTiles - 1], at(kTiles - 1));
      else
        load_matrix(b[kTiles - 1], at(kTiles - 1));
    }
  }
}

// Likewise the A operand of 16 rows: the tile is [row][k], or [k][row] if kTrans.
template <int kSize, bool kTrans, int kRowBytes>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* tile, int row, int k) {
  const int lane = int(threadIdx.x) % kWarp, line = lane & 7, matrix = lane >> 3;
  if constexpr (kTrans && kSize == 4) {
#pragma unroll
    for (int h = 0; h < 4; ++h)
      a[h] = *reinterpret_cast<const uint32_t*>(
          tile + place<kRowBytes, true>(k + 4 * (h >> 1) + lane % 4, (row + 8 * (h & 1) + lane / 4) * 4));
  } else if constexpr (kTrans) {
    load_matrix_trans(a,
                      tile + place<kRowBytes, false>(k + (matrix >> 1) * 8 + line, (row + (matrix & 1) * 8) * kSize));
  } else {
    load_matrix(a, tile + place<kRowBytes, false>(row + (matrix & 1) * 8 + line, k * kSize + (matrix >> 1) * 16));
  }
}

template <class T, bool kConv, class Tile>
class Columns {
 public:
  static constexpr int kSize = int(sizeof(T));
  static constexpr int kRowBytes = (kConv ? Tile::kCols : Tile::kDepth) * kSize;  // of a row in shared memory
  static constexpr int kStageBytes = Tile::kCols * Tile::kDepth * kSize;
  static constexpr int kTableBytes = kConv ? Tile::kStages * Tile::kDepth * 16 : 0;
  static constexpr int kWidth = Tile::kCols / Tile::kWarpsC;  // columns of a warp
  static constexpr int kTiles = kWidth / 8;
  static_assert(Tile::kThreads % Tile::kCols == 0, "each thread has columns of its own");

  // `column0`: the first of the tile. All threads must meet at a barrier between prepare() and load() of a step.
  __device__ __forceinline__ Columns(const Activations& a, unsigned char* table, int64_t column0, int group)
      : table_(reinterpret_cast<uint4*>(table)) {
    const int64_t left = count_columns(a) - column0;
    left_ = int(left < Tile::kCols ? left : Tile::kCols);
    k_ = a.k;
    if constexpr (!kConv) {
      x_ = static_cast<const T*>(a.x) + column0 * a.k;
      vector_ = low_bit(reinterpret_cast<uintptr_t>(a.x) | uint64_t(a.k * kSize));
    } else {
      const ConvGeometry& g = a.geometry;
      height_ = int(g.height);
      width_ = int(g.width);
      dilation_h_ = int(g.dilation_h);
      dilation_w_ = int(g.dilation_w);
      kernel_w_ = unsigned(g.kernel_w);
      taps_ = unsigned(g.kernel_h * g.kernel_w);
      const int64_t image = g.channels * g.height * g.width, pixels = g.out_h * g.out_w;
      const bool direct =
          g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
      vector_ = direct ? low_bit(reinterpret_cast<uintptr_t>(a.x) | uint64_t(pixels * kSize)) : 0;
      if (vector_ < 4) vector_ = 0;
      const T* x = static_cast<const T*>(a.x) + g.channels / a.groups * group * g.height * g.width;
      // Which pixels are this thread's: a whole chunk (its first pixel counts), or one or two.
      const int per = vector_ ? vector_ / kSize : kPair;
      const int first = int(threadIdx.x) % (Tile::kCols / per) * per;
#pragma unroll
      for (int i = 0; i < kPair; ++i) {
        const int64_t column = column0 + first + i;
        const bool in = first + i < left_;
        const int64_t b = in ? column / pixels : 0;
        const int64_t pixel = in ? column - b * pixels : 0;
        const int y = int(pixel / g.out_w), x0 = int(pixel - int64_t(y) * g.out_w);
        pixel_[i].image = x + b * image;
        pixel_[i].y = in ? y * int(g.stride_h) - int(g.pad_h) : -kFar;
        pixel_[i].x = x0 * int(g.stride_w) - int(g.pad_w);
        pixel_[i].offset = uint32_t(pixel_[i].y) * uint32_t(width_) + uint32_t(pixel_[i].x);
      }
    }
  }

  // Convolutions: the table of a step. depth(i): the k of row i of the stage.
  template <class Depth>
  __device__ __forceinline__ void prepare(const Depth& depth, int slot) {
    if constexpr (kConv) {
#pragma unroll 1
      for (int i = int(threadIdx.x); i < Tile::kDepth; i += Tile::kThreads) {
        const int64_t k = depth(i);
        uint4 tap{0, uint32_t(-kFar), 0, 0};
        if (k < k_) {
          unsigned channel = unsigned(k), r = 0, s = 0;
          if (taps_ != 1) {
            channel = unsigned(k) / taps_;
            const unsigned rest = unsigned(k) - channel * taps_;
            r = rest / kernel_w_;
            s = rest - r * kernel_w_;
          }
          tap.y = r * unsigned(dilation_h_);
          tap.z = s * unsigned(dilation_w_);
          tap.x = (channel * unsigned(height_) + tap.y) * unsigned(width_) + tap.z;
        }
        table_[slot * Tile::kDepth + i] = tap;
      }
    }
  }

  // Starts to load a step; the caller commits.
  template <class Depth>
  __device__ __forceinline__ void load(unsigned char* stage, int slot, const Depth& depth) {
    if constexpr (kConv) {
      if (vector_ == 16)
        copy_pixels<16>(stage, slot);
      else if (vector_ == 8)
        copy_pixels<8>(stage, slot);
      else if (vector_ == 4)
        copy_pixels<4>(stage, slot);
      else
        fetch_pixels(stage, slot);
    } else {
      // A step may begin anywhere.
      const int width = low_bit(uint64_t(vector_) | uint64_t(depth(0) * kSize));
      if (width == 16)
        copy_rows<16>(stage, depth);
      else if (width == 8)
        copy_rows<8>(stage, depth);
      else if (kSize == 4 || width == 4)
        copy_rows<4>(stage, depth);
      else
        put_rows(stage, depth);
    }
  }

  // Ends what load() began and cp.async cannot do.
  __device__ __forceinline__ void store(unsigned char* stage) {
    if constexpr (kConv && kSize == 2) {
      if (vector_ != 0) return;
#pragma unroll
      for (int i = 0; i < kFetches; ++i) {
        const int at = i * Tile::kThreads + int(threadIdx.x);
        if (kPairs % Tile::kThreads != 0 && at >= kPairs) break;
        const int row = at / (kRowBytes / 4), byte = at % (kRowBytes / 4) * 4;
        *reinterpret_cast<uint32_t*>(stage + place < kRowBytes, kConv && kSize == 4 > (row, byte)) =
            uint32_t(fetched_[i][0]) | uint32_t(fetched_[i][1]) << 16;
      }
    }
  }

  // The B operands of k … k + 15 (float: k + 7) in all columns of a warp, of which `column` is the first.
  __device__ __forceinline__ static void fragment(uint32_t (&b)[kTiles][2], const unsigned char* stage, int column,
                                                  int k) {
    load_b<kSize, kConv, kRowBytes>(b, stage, column, k);
  }

 private:
  static constexpr int kFar = 1 << 30;                       // beyond every image
  static constexpr int kPair = kConv && kSize == 2 ? 2 : 1;  // pixels of a thread
  static constexpr int kPairs = kStageBytes / 4;             // words of a stage
  static constexpr int kFetches = kConv && kSize == 2 ? (kPairs + Tile::kThreads - 1) / Tile::kThreads : 1;

  struct Pixel {
    const T* image;  // of its image the first channel of the group
    int y, x;        // of its upper left tap
    uint32_t offset;
  };

  // Each thread has one chunk of some columns. Chunks lie before k or beyond it, never across: their width divides k.
  template <int kBytes, class Depth>
  __device__ __forceinline__ void copy_rows(unsigned char* stage, const Depth& depth) {
    constexpr int kPer = kBytes / kSize, kChunks = Tile::kDepth / kPer;
    constexpr int kSide = Tile::kThreads < kChunks ? Tile::kThreads : kChunks, kAtOnce = Tile::kThreads / kSide;
    static_assert(kChunks % kSide == 0 && Tile::kThreads % kSide == 0, "whole columns");
    const int first = int(threadIdx.x) / kSide;
#pragma unroll
    for (int part = 0; part < kChunks; part += kSide) {
      const int k = (int(threadIdx.x) % kSide + part) * kPer;
      const int64_t at = depth(k);
      const int columns = at < k_ ? left_ : 0;
      const T* from = x_ + first * k_ + at;
#pragma unroll(kBytes == 16 ? 8 : 1)
      for (int i = 0; i < (Tile::kCols + kAtOnce - 1) / kAtOnce; ++i) {
        const int column = first + i * kAtOnce;
        if (Tile::kCols % kAtOnce == 0 || column < Tile::kCols)
          copy_async<kBytes>(stage + place<kRowBytes, false>(column, k * kSize), from, column < columns ? kBytes : 0);
        from += kAtOnce * k_;
      }
    }
  }

  template <class Depth>
  __device__ __forceinline__ void put_rows(unsigned char* stage, const Depth& depth) {
    if constexpr (kSize == 2) {
#pragma unroll 1
      for (int i = int(threadIdx.x); i < kPairs; i += Tile::kThreads) {
        const int column = i / (Tile::kDepth / 2), row = i % (Tile::kDepth / 2) * 2;
        const int64_t k = depth(row), left = column < left_ ? k_ - k : 0;
        const T* from = x_ + column * k_ + k;
        const uint32_t low = left > 0 ? load_constant(from).bits : 0,
                       high = left > 1 ? load_constant(from + 1).bits : 0;
        *reinterpret_cast<uint32_t*>(stage + place<kRowBytes, false>(column, row * kSize)) = low | high << 16;
      }
    }
  }

  template <int kBytes>
  __device__ __forceinline__ void copy_pixels(unsigned char* stage, int slot) {
    constexpr int kPer = kBytes / kSize, kChunks = Tile::kCols / kPer, kTotal = Tile::kDepth * kChunks;
    const int column = int(threadIdx.x) % kChunks * kPer;
#pragma unroll(kBytes == 16 ? 8 : 1)
    for (int begin = 0; begin < kTotal; begin += Tile::kThreads) {
      const int i = begin + int(threadIdx.x);
      if (kTotal % Tile::kThreads != 0 && i >= kTotal) break;
      const int row = i / kChunks;
      const uint4 tap = table_[slot * Tile::kDepth + row];
      const bool in = int(tap.y) + pixel_[0].y >= 0;
      copy_async<kBytes>(stage + place < kRowBytes, kConv && kSize == 4 > (row, column * kSize),
                         in ? pixel_[0].image + (tap.x + pixel_[0].offset) : pixel_[0].image, in ? kBytes : 0);
    }
  }

  // Where a tap of a pixel lies, if it does.
  __device__ __forceinline__ const T* at(const Pixel& p, const uint4& tap, bool& in) const {
    in = unsigned(p.y + int(tap.y)) < unsigned(height_) && unsigned(p.x + int(tap.z)) < unsigned(width_);
    return p.image + (tap.x + p.offset);
  }

  __device__ __forceinline__ void fetch_pixels(unsigned char* stage, int slot) {
    constexpr int kSide = Tile::kCols / kPair, kAtOnce = Tile::kThreads / kSide;
    const int first = int(threadIdx.x) / kSide, column = int(threadIdx.x) % kSide * kPair;
#pragma unroll
    for (int i = 0; i < (Tile::kDepth + kAtOnce - 1) / kAtOnce; ++i) {
      const int row = first + i * kAtOnce;
      if (Tile::kDepth % kAtOnce != 0 && row >= Tile::kDepth) break;
      const uint4 tap = table_[slot * Tile::kDepth + row];
#pragma unroll
      for (int j = 0; j < kPair; ++j) {
        bool in;
        const T* const from = at(pixel_[j], tap, in);
        if constexpr (kSize == 2)
          fetched_[i][j] = in ? load_constant(from).bits : uint16_t(0);
        else
          copy_async<4>(stage + place<kRowBytes, true>(row, column * kSize), from, in ? 4 : 0);
      }
    }
  }

  uint4* table_;  // [stages][depth] of (offset in the image, y, x, unused)
  const T* x_ = nullptr;
  int64_t k_;
  int left_;    // columns of the tile that exist
  int vector_;  // bytes of a copy; 0: pixels one by one
  int height_ = 0, width_ = 0, dilation_h_ = 0, dilation_w_ = 0;
  unsigned kernel_w_ = 1, taps_ = 1;
  Pixel pixel_[kPair] = {};
  uint16_t fetched_[kFetches][2] = {};
};

}  // namespace slim::cuda
