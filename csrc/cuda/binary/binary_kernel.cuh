// SPDX-License-Identifier: Apache-2.0
// Sign x sign on tensor cores, exactly: with bits that are 1 for +1, over the taps inside the image,
//
//   dot = sum (2 w - 1)(2 a - 1) = sum over taps (channels - 2 ones(w)) - 2 ones(a) + 4 popc(w & a)
//                                  \_ border of the plan, per row ____/   \_ sums, per column
//
// AND and not XOR, which Hopper's tensor cores do not have. Taps outside the image and bits beyond the channels are zeros
// in a, so that popc does not see them; `border` leaves the former out too, by four of its corners.
//
// Weights are the A operand (rows), activations the B operand (columns: rows of x, or output pixels). Both pass through
// shared memory in steps of 1024 bits of k, by cp.async, kStages of them in a ring:
//
//   stage   [kRows + kCols][8 chunks of 16 bytes]; chunk q of row r lies at q ^ (r & 7), so that the eight rows that
//           ldmatrix reads at once lie in eight different groups of banks. 16 bytes of a row are the 128 bits of k that
//           four lanes hold: b1 fragments are ldmatrix's own layout.
//   warp    [kRows / kWarpsR, kCols / kWarpsC] sums in registers; of the four 256-bit slices of a step it takes 4 / kWarpsK
//
// The largest tile, 128 x 256 by 8 warps of 64 x 64, does 1365 operations for a byte from the second-level cache and 1024
// for 32 bytes from shared memory: both just fast enough for tensor cores at 8 POPS. Few columns are bound by the
// bytes of the weights or, mostly, by latency: there a tile has 32 rows x 8 columns and its four warps share k.
//
// A convolution gathers its columns on the way to shared memory (implicit GEMM): k runs over taps, and in a tap over the
// words of the pixel; a table in shared memory holds where each column's window begins. There is no im2col buffer.
//
// At the end the counts go through shared memory to be written in the order of the output: [column][row] for a linear
// layer and for bits (a ballot of 32 rows is a word), [row][column] for a convolution.
#pragma once

#include "cuda/binary/binary.h"
#include "cuda/binary/binary_epilogue.cuh"
#include "cuda/common/device.cuh"

namespace slim::cuda::binary {

// Blocks: how many should fit a multiprocessor (bounds the registers).
template <int Rows, int Cols, int WarpsR, int WarpsC, int WarpsK, int Stages, int Blocks>
struct SignTile {
  static constexpr int kRows = Rows, kCols = Cols, kWarpsR = WarpsR, kWarpsC = WarpsC, kWarpsK = WarpsK;
  static constexpr int kStages = Stages, kBlocks = Blocks;
  static constexpr int kWarps = WarpsR * WarpsC * WarpsK, kThreads = kWarps * kWarp;
  static constexpr int kFragmentsR = Rows / WarpsR / 16, kFragmentsC = Cols / WarpsC / 8;
  static constexpr int kStepBytes = 128, kStepWords = 16;  // of k: 1024 bits
  static constexpr int kStageBytes = (Rows + Cols) * kStepBytes;
  // Of the counts in shared memory: bank conflicts apart, [column][row] or [row][column].
  static constexpr int kRowPitch = Rows + 4, kColPitch = Cols + 8;
  static constexpr int kCountBytes = (Cols * kRowPitch > Rows * kColPitch ? Cols * kRowPitch : Rows * kColPitch) * 4;
  static constexpr int kRingBytes = kStages * kStageBytes > kCountBytes ? kStages * kStageBytes : kCountBytes;
  static_assert(Rows % (16 * WarpsR) == 0 && Cols % (8 * WarpsC) == 0 && 4 % WarpsK == 0, "whole fragments");
  static_assert(kFragmentsC == 1 || kFragmentsC % 2 == 0, "ldmatrix takes two blocks of columns");
  static_assert(Rows % 32 == 0 && kWarps % (Rows / 32) == 0 && kThreads % (Rows / 4) == 0 && kThreads % (Cols / 4) == 0,
                "a thread writes the same rows, or columns, all the time");
};

// Of a column: what the kernel must know of its window and of its place in the output.
struct alignas(16) Window {
  int32_t h, w;   // of the first tap; may lie outside
  int64_t image;  // bytes from `bits` to this group of the image's first pixel
};
struct alignas(16) Corners {
  int32_t a, b, c, d;  // entries of border: (r0, s0), (r0, s1), (r1, s0), (r1, s1) of the taps inside
};
template <class Tile>
struct Shared {
  static constexpr int kPlaces = Tile::kRingBytes, kOnes = kPlaces + Tile::kCols * 8;
  static constexpr int kWindows = kOnes + Tile::kCols * 4, kCorners = kWindows + Tile::kCols * 16;
  static constexpr int kLinearBytes = kWindows, kConvBytes = kCorners + Tile::kCols * 16;
};

// First and last + 1 of the taps t with 0 <= at + t * dilation < size.
__device__ __forceinline__ void inside(int at, int size, int dilation, int taps, int* first, int* last) {
  const int before = at >= 0 ? 0 : (-at + dilation - 1) / dilation;
  const int until = at >= size ? 0 : (size - at + dilation - 1) / dilation;
  *first = before < taps ? before : taps;
  *last = until < taps ? until : taps;
  if (*last < *first) *last = *first;
}

// Columns of the tile, one thread each: where their windows begin, how many ones they hold, where their outputs go (in
// elements of y, or in 32-bit words of output bits).
template <bool kConv, class Tile>
__device__ __forceinline__ void describe_columns(const ProductParams& p, unsigned char* shared, int64_t column0,
                                                 int64_t group) {
  using S = Shared<Tile>;
  for (int i = threadIdx.x; i < Tile::kCols; i += Tile::kThreads) {
    const int64_t column = column0 + i;
    const bool in = column < p.columns;
    int32_t ones = 0;
    int64_t place = column * (p.out_bits ? p.out_words : p.rows);
    if constexpr (!kConv) {
      if (in) ones = load_constant(p.sums + column);
    } else {
      const ConvGeometry& g = p.geometry;
      Window window{INT32_MIN / 2, 0, 0};
      Corners corners{0, 0, 0, 0};
      if (in) {
        const int64_t plane = g.out_h * g.out_w, image = column / plane, pixel = column - image * plane;
        if (!p.out_bits) place = image * p.rows * plane + pixel;
        const int h = int(pixel / g.out_w), w = int(pixel - int64_t(h) * g.out_w);
        window.h = h * int(g.stride_h) - int(g.pad_h);
        window.w = w * int(g.stride_w) - int(g.pad_w);
        window.image = image * g.height * g.width * p.column_bytes + group * p.words * 8;
        int r0, r1, s0, s1;
        inside(window.h, int(g.height), int(g.dilation_h), int(g.kernel_h), &r0, &r1);
        inside(window.w, int(g.width), int(g.dilation_w), int(g.kernel_w), &s0, &s1);
        const int pitch = int(g.kernel_w) + 1;
        corners = {r0 * pitch + s0, r0 * pitch + s1, r1 * pitch + s0, r1 * pitch + s1};
        const int32_t* sums = p.sums + image * g.height * g.width * p.groups + group;
        for (int r = r0; r < r1; ++r)
          for (int s = s0; s < s1; ++s) {
            const int64_t y = window.h + r * int64_t(g.dilation_h), x = window.w + s * int64_t(g.dilation_w);
            ones += load_constant(sums + (y * g.width + x) * p.groups);
          }
      }
      reinterpret_cast<Window*>(shared + S::kWindows)[i] = window;
      reinterpret_cast<Corners*>(shared + S::kCorners)[i] = corners;
    }
    reinterpret_cast<int64_t*>(shared + S::kPlaces)[i] = place;
    reinterpret_cast<int32_t*>(shared + S::kOnes)[i] = ones;
  }
}

// One step of k of the tile's weights.
template <class Tile>
__device__ __forceinline__ void load_weights(const ProductParams& p, unsigned char* stage, int64_t first, int64_t count,
                                             int step) {
  const int q = threadIdx.x % 8;
  const int64_t at = int64_t(step) * Tile::kStepBytes + q * 16;  // rows end at a multiple of 16
  const uint8_t* from = p.weights + first * p.row_bytes + at;
  for (int r = threadIdx.x / 8; r < Tile::kRows; r += Tile::kThreads / 8) {
    const bool valid = r < count && at < p.row_bytes;
    copy_async<16>(stage + r * 128 + ((q ^ (r & 7)) << 4), valid ? from + r * p.row_bytes : p.weights, valid ? 16 : 0);
  }
}

// Where tap `tap` of a column's window lies, or null if it is outside.
__device__ __forceinline__ const uint8_t* tap_of(const ProductParams& p, const Window& window, int dh, int dw,
                                                 int64_t offset) {
  const int h = window.h + dh, w = window.w + dw;
  if (unsigned(h) >= unsigned(p.geometry.height) || unsigned(w) >= unsigned(p.geometry.width)) return nullptr;
  return p.bits + window.image + (int64_t(h) * p.geometry.width + w) * p.column_bytes + offset;
}

// The same of the tile's columns. Chunks of 16 bytes lie in one tap, or words of 8 are copied by themselves.
template <bool kConv, class Tile>
__device__ __forceinline__ void load_columns(const ProductParams& p, unsigned char* stage, const unsigned char* shared,
                                             int64_t column0, int step, bool whole_chunks) {
  const int q = threadIdx.x % 8;
  const int halves = whole_chunks ? 1 : 2;
  for (int half = 0; half < halves; ++half) {
    const int64_t word = int64_t(step) * Tile::kStepWords + q * 2 + half;
    if constexpr (!kConv) {
      const int64_t left = p.words - word;
      const int valid = left >= 2 ? 16 : left == 1 ? 8 : 0;
      const uint8_t* from = p.bits + column0 * p.column_bytes + word * 8;
      for (int c = threadIdx.x / 8; c < Tile::kCols; c += Tile::kThreads / 8) {
        const int bytes = column0 + c < p.columns ? valid : 0;
        unsigned char* to = stage + c * 128 + ((q ^ (c & 7)) << 4) + half * 8;
        const uint8_t* at = bytes ? from + c * p.column_bytes : p.bits;
        if (whole_chunks)
          copy_async<16>(to, at, bytes);
        else
          copy_async<8>(to, at, bytes < 8 ? bytes : 8);
      }
    } else {
      const int tap = int(word / p.words), kw = int(p.geometry.kernel_w);
      const int r = tap / kw, dw = (tap - r * kw) * int(p.geometry.dilation_w), dh = r * int(p.geometry.dilation_h);
      const int64_t offset = (word - tap * p.words) * 8;
      const bool exists = r < p.geometry.kernel_h;
      for (int c = threadIdx.x / 8; c < Tile::kCols; c += Tile::kThreads / 8) {
        const Window window = reinterpret_cast<const Window*>(shared + Shared<Tile>::kWindows)[c];
        const uint8_t* at = exists ? tap_of(p, window, dh, dw, offset) : nullptr;
        unsigned char* to = stage + c * 128 + ((q ^ (c & 7)) << 4) + half * 8;
        if (whole_chunks)
          copy_async<16>(to, at ? at : p.bits, at ? 16 : 0);
        else
          copy_async<8>(to, at ? at : p.bits, at ? 8 : 0);
      }
    }
  }
}

// counts += weights & columns over this warp's slices of a step.
template <class Tile>
__device__ __forceinline__ void multiply(int32_t (&counts)[Tile::kFragmentsR][Tile::kFragmentsC][4],
                                         const unsigned char* stage, int row0, int col0, int slice0) {
  const int lane = threadIdx.x % kWarp;
  const unsigned char* weights = stage + row0 * 128;
  const unsigned char* columns = stage + (Tile::kRows + col0) * 128;
  // ldmatrix: of weights rows 0-7 | 8-15 of chunk 0, then of chunk 1; of columns chunk 0 | 1 of block 0, then of block 1.
  const int a_row = lane % 16, a_chunk = lane / 16;
  const int b_row = lane / 16 * 8 + lane % 8, b_chunk = lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < 4 / Tile::kWarpsK; ++i) {
    const int slice = slice0 + i;
    uint32_t b[Tile::kFragmentsC][2];
    if constexpr (Tile::kFragmentsC == 1) {
      load_matrix(b[0], columns + lane % 8 * 128 + (((slice * 2 + b_chunk) ^ (lane & 7)) << 4));
    } else {
#pragma unroll
      for (int c = 0; c < Tile::kFragmentsC; c += 2) {
        uint32_t two[4];
        load_matrix(two, columns + (c * 8 + b_row) * 128 + (((slice * 2 + b_chunk) ^ (lane & 7)) << 4));
        b[c][0] = two[0], b[c][1] = two[1], b[c + 1][0] = two[2], b[c + 1][1] = two[3];
      }
    }
    // One fragment of weights ahead of its products.
    uint32_t a[2][4];
    const unsigned char* from = weights + a_row * 128 + (((slice * 2 + a_chunk) ^ (lane & 7)) << 4);
    load_matrix(a[0], from);
#pragma unroll
    for (int r = 0; r < Tile::kFragmentsR; ++r) {
      if (r + 1 < Tile::kFragmentsR) load_matrix(a[(r + 1) % 2], from + (r + 1) * 16 * 128);
#pragma unroll
      for (int c = 0; c < Tile::kFragmentsC; ++c) mma_m16n8k256_and(counts[r][c], a[r % 2], b[c]);
    }
  }
}

// Counts of this warp into shared memory, added to what other warps left of the same place.
template <class Tile>
__device__ __forceinline__ void stage_counts(const int32_t (&counts)[Tile::kFragmentsR][Tile::kFragmentsC][4],
                                             int32_t* out, int row0, int col0, bool by_column, bool add) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < Tile::kFragmentsR; ++r)
#pragma unroll
    for (int c = 0; c < Tile::kFragmentsC; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + r * 16 + g + i / 2 * 8, col = col0 + c * 8 + t * 2 + i % 2;
        int32_t* at = out + (by_column ? col * Tile::kRowPitch + row : row * Tile::kColPitch + col);
        *at = add ? *at + counts[r][c][i] : counts[r][c][i];
      }
}

// dot = base + 4 * count: unsigned, because only the sum is sure to fit.
__device__ __forceinline__ int32_t dot_of(int32_t base, int32_t ones, int32_t count) {
  return int32_t(uint32_t(base) - 2 * uint32_t(ones) + 4 * uint32_t(count));
}

// What the taps inside say of a row.
__device__ __forceinline__ int32_t base_of(const ProductParams& p, const Corners& at, int64_t row) {
  const int32_t* border = p.border + row;
  int32_t base = load_constant(border + at.d * p.rows);
  if (at.a | at.b | at.c)  // else all of them are the sums of no taps
    base += load_constant(border + at.a * p.rows) - load_constant(border + at.b * p.rows) -
            load_constant(border + at.c * p.rows);
  return base;
}

// Of a linear layer, whose border is [2, 2].
__device__ __forceinline__ Corners one_tap() { return {0, 0, 0, 3}; }

template <class Tile>
__device__ __forceinline__ Corners corners_of(const unsigned char* shared, int col) {
  return reinterpret_cast<const Corners*>(shared + Shared<Tile>::kCorners)[col];
}

// Four rows of a column at a time. first: of the tile, in all rows; count: rows of it that there are.
template <class Tile>
__device__ __forceinline__ void write_rows(const ProductParams& p, const unsigned char* shared, int64_t first,
                                           int64_t count, int64_t column0) {
  constexpr int kQuads = Tile::kRows / 4;
  const int row = int(threadIdx.x) % kQuads * 4;
  const bool whole = p.rows % 4 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  float scale[4] = {}, bias[4] = {};
  int32_t base[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < count) {
      scale[i] = value_at(p.scale, p.type, first + row + i);
      if (p.bias) bias[i] = value_at(p.bias, p.type, first + row + i);
      base[i] = base_of(p, one_tap(), first + row + i);
    }
  const int32_t* counts = reinterpret_cast<const int32_t*>(shared);
  for (int col = threadIdx.x / kQuads; col < Tile::kCols; col += Tile::kThreads / kQuads) {
    if (column0 + col >= p.columns || row >= count) break;
    const int4 four = *reinterpret_cast<const int4*>(counts + col * Tile::kRowPitch + row);
    const int32_t ones = reinterpret_cast<const int32_t*>(shared + Shared<Tile>::kOnes)[col];
    const int64_t place = (column0 + col) * p.rows + first + row;
    const float v[4] = {scaled(dot_of(base[0], ones, four.x), scale[0], bias[0], p.relu),
                        scaled(dot_of(base[1], ones, four.y), scale[1], bias[1], p.relu),
                        scaled(dot_of(base[2], ones, four.z), scale[2], bias[2], p.relu),
                        scaled(dot_of(base[3], ones, four.w), scale[3], bias[3], p.relu)};
    if (whole)  // and so is first: rows of a linear layer are one group
      write4(p.y, p.type, place, v);
    else
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (row + i < count) write(p.y, p.type, place + i, v[i]);
  }
}

// Four pixels of a row at a time.
template <class Tile>
__device__ __forceinline__ void write_pixels(const ProductParams& p, const unsigned char* shared, int64_t first,
                                             int64_t count, int64_t column0) {
  constexpr int kQuads = Tile::kCols / 4;
  const int col = int(threadIdx.x) % kQuads * 4;
  const int64_t plane = p.geometry.out_h * p.geometry.out_w, left = p.columns - column0 - col;
  if (left <= 0) return;
  // Four pixels of one image, at an aligned address.
  const bool whole = plane % 4 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  const int32_t all = int32_t((p.geometry.kernel_h + 1) * (p.geometry.kernel_w + 1) - 1);
  Corners corners[4];
  int32_t ones[4];
  int64_t place[4];
  bool full = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    corners[i] = corners_of<Tile>(shared, col + i);
    ones[i] = reinterpret_cast<const int32_t*>(shared + Shared<Tile>::kOnes)[col + i];
    place[i] = reinterpret_cast<const int64_t*>(shared + Shared<Tile>::kPlaces)[col + i];
    full = full && corners[i].a == 0 && corners[i].d == all;
  }
  const int32_t* counts = reinterpret_cast<const int32_t*>(shared);
  for (int r = threadIdx.x / kQuads; r < count && r < Tile::kRows; r += Tile::kThreads / kQuads) {
    const int64_t row = first + r;
    const int4 four = *reinterpret_cast<const int4*>(counts + r * Tile::kColPitch + col);
    const float scale = value_at(p.scale, p.type, row), bias = p.bias ? value_at(p.bias, p.type, row) : 0.0f;
    int32_t base[4];
    const int32_t whole_base = load_constant(p.border + all * p.rows + row);
#pragma unroll
    for (int i = 0; i < 4; ++i) base[i] = full ? whole_base : base_of(p, corners[i], row);
    const float v[4] = {scaled(dot_of(base[0], ones[0], four.x), scale, bias, p.relu),
                        scaled(dot_of(base[1], ones[1], four.y), scale, bias, p.relu),
                        scaled(dot_of(base[2], ones[2], four.z), scale, bias, p.relu),
                        scaled(dot_of(base[3], ones[3], four.w), scale, bias, p.relu)};
    if (whole)
      write4(p.y, p.type, place[0] + row * plane, v);
    else
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < left) write(p.y, p.type, place[i] + row * plane, v[i]);
  }
}

// A warp compares 32 rows of a column at a time; the answers are a word.
template <bool kConv, class Tile>
__device__ __forceinline__ void write_bits(const ProductParams& p, const unsigned char* shared, int64_t first,
                                           int64_t count, int64_t column0, bool last_group) {
  constexpr int kWords = Tile::kRows / 32;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, word0 = warp % kWords * 32, row = word0 + lane;
  const bool there = row < count;
  const int32_t threshold = there ? load_constant(p.thresholds + first + row) : 0;
  const bool rising = there && load_constant(p.rising + first + row) != 0;
  const int32_t base = kConv || !there ? 0 : base_of(p, one_tap(), first + row);
  const int64_t at = first + word0;
  const int32_t* counts = reinterpret_cast<const int32_t*>(shared);
  // Words beyond a group belong to the next; beyond the last, they are zeros up to 64 bits.
  if (word0 >= count && (!last_group || p.shared_words || at / 32 >= p.out_words)) return;
  for (int col = warp / kWords; col < Tile::kCols; col += Tile::kWarps / kWords) {
    if (column0 + col >= p.columns) break;
    const int32_t ones = reinterpret_cast<const int32_t*>(shared + Shared<Tile>::kOnes)[col];
    int32_t from = base;
    if constexpr (kConv)
      if (there) from = base_of(p, corners_of<Tile>(shared, col), first + row);
    const int32_t dot = dot_of(from, ones, counts[col * Tile::kRowPitch + row]);
    const uint32_t word = warp_ballot(there && (rising ? dot >= threshold : dot <= threshold));
    uint32_t* to = p.out_bits + (column0 + col) * p.out_words + at / 32;
    if (lane != 0) continue;
    if (!p.shared_words) {
      *to = word;
    } else {  // every bit is added once, so that it does not matter in which order
      const int shift = int(at % 32);
      if (word << shift) atomic_add(to, word << shift);
      if (shift && word >> (32 - shift)) atomic_add(to + 1, word >> (32 - shift));
    }
  }
}

// Grid: x over tiles; rows run fastest, then columns, then groups.
template <bool kConv, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) product_kernel(const ProductParams p) {
  unsigned char* shared = dynamic_shared();
  const int warp = threadIdx.x / kWarp;
  const int row0 = warp % Tile::kWarpsR * (Tile::kRows / Tile::kWarpsR);
  const int col0 = warp / Tile::kWarpsR % Tile::kWarpsC * (Tile::kCols / Tile::kWarpsC);
  const int part = warp / (Tile::kWarpsR * Tile::kWarpsC), slice0 = part * (4 / Tile::kWarpsK);
  const int64_t group_rows = p.rows / p.groups;
  unsigned rest = blockIdx.x / p.row_tiles;
  const int64_t inner = int64_t(blockIdx.x % p.row_tiles) * Tile::kRows;
  const int64_t column0 = int64_t(rest % p.column_tiles) * Tile::kCols, group = rest / p.column_tiles;
  const int64_t first = group * group_rows + inner, left = group_rows - inner;
  const int64_t count = left < 0 ? 0 : left < Tile::kRows ? left : Tile::kRows;
  const int64_t k_bytes = p.geometry.kernel_h * p.geometry.kernel_w * p.words * 8;
  const int steps = int((k_bytes + Tile::kStepBytes - 1) / Tile::kStepBytes);
  const bool whole_chunks = kConv ? p.words % 2 == 0 : p.column_bytes % 16 == 0;

  describe_columns<kConv, Tile>(p, shared, column0, group);
  if constexpr (kConv) sync_threads();  // windows

  int32_t counts[Tile::kFragmentsR][Tile::kFragmentsC][4];
#pragma unroll
  for (int r = 0; r < Tile::kFragmentsR; ++r)
#pragma unroll
    for (int c = 0; c < Tile::kFragmentsC; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) counts[r][c][i] = 0;

  const auto load = [&](int step, int slot) {
    if (step < steps) {
      unsigned char* stage = shared + slot * Tile::kStageBytes;
      load_weights<Tile>(p, stage, first, count, step);
      load_columns<kConv, Tile>(p, stage + Tile::kRows * 128, shared, column0, step, whole_chunks);
    }
    copy_commit();
  };
  for (int step = 0; step + 1 < Tile::kStages; ++step) load(step, step);
  int slot = 0, free = Tile::kStages - 1;  // the stage of this step, and the one that the step before has left
  for (int step = 0; step < steps; ++step) {
    copy_wait<Tile::kStages - 2>();
    sync_threads();  // the step has landed for all, and all have left the free stage
    load(step + Tile::kStages - 1, free);
    multiply<Tile>(counts, shared + slot * Tile::kStageBytes, row0, col0, slice0);
    free = slot;
    slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
  }
  copy_wait<0>();
  sync_threads();

  int32_t* staged = reinterpret_cast<int32_t*>(shared);
#pragma unroll
  for (int i = 0; i < Tile::kWarpsK; ++i) {
    if (part == i) stage_counts<Tile>(counts, staged, row0, col0, !kConv || p.out_bits, i > 0);
    sync_threads();
  }
  if (p.out_bits)
    write_bits<kConv, Tile>(p, shared, first, count, column0, group + 1 == p.groups);
  else if constexpr (kConv)
    write_pixels<Tile>(p, shared, first, count, column0);
  else
    write_rows<Tile>(p, shared, first, count, column0);
}

}  // namespace slim::cuda::binary
