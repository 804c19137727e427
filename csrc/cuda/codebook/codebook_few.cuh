// SPDX-License-Identifier: Apache-2.0
// Linear layers with up to 16 rows of x: one launch, made to stream the codes at the speed of memory.
//
// A block has 32 rows of the weight and all of k, and 16 warps take turns at its slabs of 64 columns, so sums are split
// between warps and meet in shared memory, in their order: no workspace, no second kernel.
//
//   registers   the codes of the next kRing slabs of this warp, straight from the plan: with 4 bits 64 KiB of a block's
//               are on their way at once, asked for before anything else is done
//   shared      x of the same slabs, copied in the background: [warp][slab][row of x][64], chunk c (16 bytes) of row r
//               at c ^ (r & 7); two barriers of a warp a slab, none of the block. The pair table of PairWeights
//
// Meant to be bound by the bytes of the codes: two weights of a lane cost a shift, an AND, and a look-up that no other
// lane is in the way of.
#pragma once

#include "cuda/codebook/codebook.h"
#include "cuda/common/device.cuh"

namespace slim::cuda::codebook {

constexpr int kFewRows = 32, kFewWarps = 16, kRing = 4;

struct FewParams {
  Activations a;  // k a multiple of 8, x aligned to 16 bytes, m at most kCols
  Weight w;       // with a plan; one table
};

template <int kBits, int kCols>
struct FewShape {
  static constexpr int kTableBytes = (1 << 2 * kBits) * 128;
  static constexpr int kSlabBytes = kCols * kSlab * 2;
  static constexpr int kSumBytes = kFewWarps * kCols * (kFewRows + 1) * 4;  // in place of x
  static constexpr int kSharedBytes = kTableBytes + kFewWarps * kRing * kSlabBytes;
  static_assert(kSharedBytes == few_columns_shared(kBits, kCols), "what the heuristics reckon with");
  static_assert(kSumBytes <= kFewWarps * kRing * kSlabBytes, "sums fit where x was");
};

template <class T, int kBits, int kCols>
__global__ void __launch_bounds__(kFewWarps* kWarp) few_kernel(const FewParams p) {
  using Shape = FewShape<kBits, kCols>;
  constexpr int kTiles = kFewRows / 16, kColTiles = kCols / 8;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  unsigned char* const table = dynamic_shared();
  unsigned char* const ring = table + Shape::kTableBytes + warp * kRing * Shape::kSlabBytes;
  const int64_t row_tiles = (p.w.rows + 15) / 16;
  const int slabs = int((p.w.width + kSlab - 1) / kSlab), left = int(p.w.width);
  const int tiles = row_tiles - int64_t(blockIdx.x) * kTiles < kTiles ? 1 : kTiles;
  const uint32_t* const codes =
      reinterpret_cast<const uint32_t*>(p.w.plan) + int64_t(blockIdx.x) * kTiles * slabs * (kBits * kWarp) + lane;
  const T* const x = static_cast<const T*>(p.a.x);

  uint32_t held[kRing][kTiles][kBits];
  const auto ask = [&](int slot, int slab) {
    if (slab < slabs) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int b = 0; b < kBits; ++b)
          held[slot][i][b] =
              i < tiles ? load_constant(codes + (int64_t(i) * slabs + slab) * (kBits * kWarp) + b * kWarp) : 0;
      const int chunk = lane % 8, k = slab * kSlab + chunk * 8;
#pragma unroll
      for (int i = 0; i < kCols / 4; ++i) {
        const int row = i * 4 + lane / 8;
        const bool in = row < p.a.m && k < left;
        copy_async<16>(ring + slot * Shape::kSlabBytes + row * 128 + ((chunk ^ (row & 7)) * 16),
                       in ? x + row * p.a.k + k : x, in ? 16 : 0);
      }
    }
    copy_commit();
  };
#pragma unroll
  for (int j = 0; j < kRing; ++j) ask(j, warp + j * kFewWarps);

  // Two threads to a pair, eight lanes in eight places.
  const T* const entries = static_cast<const T*>(p.w.tables);
  for (int i = int(threadIdx.x); i < 2 << 2 * kBits; i += kFewWarps * kWarp) {
    const int pair = i / 2;
    const uint32_t v = uint32_t(load_constant(entries + pair % (1 << kBits)).bits) |
                       uint32_t(load_constant(entries + (pair >> kBits)).bits) << 16;
    uint4* const to = reinterpret_cast<uint4*>(table + pair * 128) + i % 2 * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) to[(j + pair) & 3] = uint4{v, v, v, v};
  }
  sync_threads();

  float d[kTiles][kColTiles][4] = {};
  for (int first = warp; first < slabs; first += kRing * kFewWarps) {
#pragma unroll
    for (int j = 0; j < kRing; ++j) {
      const int slab = first + j * kFewWarps;
      if (slab >= slabs) break;
      copy_wait<kRing - 1>();
      sync_warp();
      const unsigned char* const here = ring + j * Shape::kSlabBytes;
      const int columns = left - slab * kSlab - lane % 4 * 2;  // that are left, from this lane's first on
#pragma unroll
      for (int f = 0; f < 4; f += 2) {
        uint32_t b[kColTiles][4];  // of fragments f and f + 1
#pragma unroll
        for (int c = 0; c < kColTiles; ++c)
          load_matrix(b[c], here + (c * 8 + lane % 8) * 128 + (((2 * f + lane / 8) ^ (lane % 8)) * 16));
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const int at = (f + h) * 8 * kBits, word = at / 32, next = word + 1 < kBits ? word + 1 : word;
            const uint32_t v = funnel_right(held[j][i][word], held[j][i][next], uint32_t(at % 32));
            uint32_t a[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              constexpr uint32_t kMask = ((1u << 2 * kBits) - 1) << 7;
              const uint32_t shifted = 2 * kBits * r < 7 ? v << (7 - 2 * kBits * r) : v >> (2 * kBits * r - 7);
              a[r] = *reinterpret_cast<const uint32_t*>(table + ((shifted & kMask) | uint32_t(lane * 4)));
            }
            if (slab == slabs - 1) {  // what lies beyond the last column meets zeros of x, but may be Inf or NaN
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                const int n = columns - 16 * (f + h) - r / 2 * 8;
                a[r] = n >= 2 ? a[r] : n == 1 ? a[r] & 0xffffu : 0;
              }
            }
#pragma unroll
            for (int c = 0; c < kColTiles; ++c) {
              const uint32_t own[2] = {b[c][2 * h], b[c][2 * h + 1]};
              mma_m16n8k16<T>(d[i][c], a, own);
            }
          }
      }
      sync_warp();
      ask(j, slab + kRing * kFewWarps);
    }
  }

  sync_threads();
  float* const sums = reinterpret_cast<float*>(table + Shape::kTableBytes);  // [warp][column][kFewRows + 1]
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int c = 0; c < kColTiles; ++c)
#pragma unroll
      for (int v = 0; v < 4; ++v)
        sums[(warp * kCols + c * 8 + lane % 4 * 2 + v % 2) * (kFewRows + 1) + i * 16 + lane / 4 + v / 2 * 8] =
            d[i][c][v];
  sync_threads();
  for (int o = int(threadIdx.x); o < kCols * kFewRows; o += kFewWarps * kWarp) {
    const int column = o / kFewRows;
    const int64_t row = int64_t(blockIdx.x) * kFewRows + o % kFewRows;
    if (column >= p.a.m || row >= p.a.n) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kFewWarps; ++w) sum += sums[(w * kCols + column) * (kFewRows + 1) + o % kFewRows];
    if (p.a.bias) sum += to_float(load_constant(static_cast<const T*>(p.a.bias) + row));
    if (p.a.relu && sum < 0.0f) sum = 0.0f;
    static_cast<T*>(p.a.y)[column * p.a.n + row] = from_float<T>(sum);
  }
}

}  // namespace slim::cuda::codebook
