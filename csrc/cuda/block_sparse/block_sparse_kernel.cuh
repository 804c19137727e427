// SPDX-License-Identifier: Apache-2.0
// Blocks on tensor cores, as weights of the main loop (common/matmul.cuh), after a plan (block_sparse_plan.h):
//
//                 a step: 64 k (float32: 32) in slices of 16 (or 8), from anywhere
//   activations   [ slice 0 | slice 1 | slice 2 | slice 3 ]   loaded once for all rows of the tile: what bounds sparse
//                                                             products is the way from the second-level cache
//   warp 0, rows 0 …    [x]       [x]                         cells of 16 rows that are stored are loaded and multiplied;
//   warp 1, rows 32 …        [x]                 [x]          the others cost one look into shared memory
//   …
//
// Stage of a step: the cells' values, [slice][cell][16 rows x slice] (W^T: as stored, [slice k][16 rows], turned round by
// ldmatrix.trans), in chunks of 16 bytes, chunk c of line l at place c ^ f(l), so that eight lines lie in different
// banks; then for each cell whether it is stored. Offsets of cells are read one step ahead.
//
// Where block rows share a cell, or slices of 8 a product, and only some of them are stored, the others are zeros: those
// would turn NaN and Inf among the activations into NaN, so sums that are NaN are computed anew by exact().
#pragma once

#include "cuda/block_sparse/block_sparse_general.cuh"
#include "cuda/common/matmul.cuh"

namespace slim::cuda::block_sparse {

struct TiledParams {
  Product product;  // for exact(); without a plan
  const int32_t *order, *offsets, *depths, *cells;
  int64_t depth;            // of a group's sum
  int64_t tiles;            // of the plan, which may be taller than the kernel's
  int32_t tiles_per_group;
  int32_t cells_per_tile, parts, plan_steps;  // plan_steps: steps of the kernel in a step of the plan
};

// One output over stored weights alone.
template <class T>
struct StoredOnly {
  using Params = TiledParams;
  __device__ static float exact(const Params& p, const Activations& a, int group, int64_t row, int64_t column) {
    const auto sum = [&](auto x) {
      return p.product.transposed ? row_of_transpose(p.product, x, row, group, 0.0f)
                                  : row_of_w(p.product, x, group * (a.n / a.groups) + row, 0.0f);
    };
    return a.conv ? sum(Depth<T, true>(a, column, group)) : sum(Depth<T, false>(a, column, group));
  }
};

template <class T, class Tile, int kSlice>
struct Weights {
  using Value = T;
  using Params = TiledParams;
  using Exact = StoredOnly<T>;
  static constexpr int kSize = int(sizeof(T));
  static constexpr int kSlab = kSlice;
  static constexpr int kSlices = Tile::kDepth / kSlice, kCells = Tile::kRows / kCell;
  static constexpr int kCellBytes = kCell * kSlice * kSize;
  static constexpr int kStored = kSlices * kCells * kCellBytes;  // where the table of stored cells begins
  static constexpr int kStageBytes = (kStored + kSlices * kCells * 4 + 15) / 16 * 16;
  static constexpr int kBlockBytes = 0;
  static constexpr bool kExpands = false;
  static constexpr bool kSkips = true;
  // Each warp loads the same cell of every slice of a step: one look at a row of the plan's table, `kAhead` for each.
  static constexpr int kWarps = Tile::kThreads / kWarp, kAhead = (kSlices * kCells + kWarps - 1) / kWarps;
  static constexpr int kChunks = kCellBytes / 16, kRounds = (kChunks + kWarp - 1) / kWarp;
  static_assert(kStep % Tile::kDepth == 0 && (kSlice == 8 || kSlice == 16), "as plans are cut");

  // How many of the kernel's tiles the plan's tiles make, and which of them block `index` computes.
  static int64_t tiles(const Params& p) { return p.tiles * (p.cells_per_tile / kCells); }
  __device__ static void tile(const Params& p, unsigned index, int64_t& row0, int& group) {
    const unsigned per = unsigned(p.cells_per_tile / kCells);
    const int tile = load_constant(p.order + index / per);
    group = tile / p.tiles_per_group;
    row0 = int64_t(tile - group * p.tiles_per_group) * p.cells_per_tile * kCell + int64_t(index % per) * Tile::kRows;
  }

  __device__ __forceinline__ Weights(const Params& p, unsigned char*, int64_t row0, int group, int split, int splits)
      : values_(static_cast<const unsigned char*>(p.product.w.values)),
        stride_(p.product.w.c * kSize),
        parts_(p.parts),
        part_mask_(kCell / p.parts - 1),
        per_slice_(p.cells_per_tile * p.parts),
        transposed_(p.product.transposed),
        depth_(p.depth) {
    const int64_t plan_row = int64_t(p.cells_per_tile) * kCell;
    const int64_t tile = group * int64_t(p.tiles_per_group) + row0 / plan_row;
    const int64_t first = int64_t(load_constant(p.offsets + tile)) * p.plan_steps;
    const int64_t count = int64_t(load_constant(p.offsets + tile + 1)) * p.plan_steps - first;
    const int64_t begin = count * split / splits;
    steps_ = int(count * (split + 1) / splits - begin);
    depths_ = p.depths + (first + begin) * kSlices;
    cells_ = p.cells + (first + begin) * kSlices * per_slice_ + row0 % plan_row / kCell * p.parts;
    if (steps_ > 0) look(0);
  }

  __device__ __forceinline__ int steps() const { return steps_; }
  __device__ __forceinline__ int64_t depth(int step, int slab) const {
    return load_constant(depths_ + step * kSlices + slab);
  }

  // A warp loads whole cells, lane by lane chunks of 16 bytes.
  __device__ __forceinline__ void load(unsigned char* stage, int step) {
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int cell = i * kWarps + warp;  // [slice][cell]
      if (kSlices * kCells % kWarps != 0 && cell >= kSlices * kCells) break;
      const bool here = warp_ballot(ahead_[i][0] >= 0 || (kRounds == 2 && ahead_[i][kRounds - 1] >= 0)) != 0;
      if (lane == 0) *reinterpret_cast<uint32_t*>(stage + kStored + cell * 4) = here;
      // Slices of 8 are multiplied two by two: where one of them is stored, the other must be zero.
      if (!here && kSlice >= kProduct) continue;
      const int64_t k = depth(step, cell / kCells);
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int chunk = round * kWarp + lane;
        if (kChunks % kWarp != 0 && chunk >= kChunks) break;
        const int line = chunk_line(chunk), in_line = chunk_in_line(chunk);
        const int64_t first = k + (transposed_ ? line : in_line * (16 / kSize)), left = depth_ - first;
        int valid = ahead_[i][round] >= 0 ? 16 : 0;
        if (left < 16 / kSize) valid = left <= 0 ? 0 : transposed_ ? valid : valid ? int(left) * kSize : 0;
        const unsigned char* from =
            values_ + int64_t(ahead_[i][round]) * (kUnit * kSize) + int64_t(part_line(line)) * stride_ + part_byte(in_line);
        copy_async<16>(stage + cell * kCellBytes + place(line, in_line), valid ? from : values_, valid);
      }
    }
    if (step + 1 < steps_) look(step + 1);
  }

  // Whether a product of rows row … row + 15 with k … has weights at all.
  __device__ __forceinline__ bool stored(const unsigned char* stage, int, int row, int k) const {
    const auto* table = reinterpret_cast<const uint32_t*>(stage + kStored) + k / kSlice * kCells + row / kCell;
    if constexpr (kSlice < kProduct) return (table[0] | table[kCells]) != 0;
    return table[0] != 0;
  }

  __device__ __forceinline__ void fragment(uint32_t (&a)[4], const unsigned char* stage, int, int row, int k) const {
    const int lane = int(threadIdx.x) % kWarp, matrix = lane >> 3, in = lane & 7;
    const unsigned char* cell = stage + (k / kSlice * kCells + row / kCell) * kCellBytes;
    const int inner = k % kSlice;
    if constexpr (kSize == 2) {
      // Matrix 2 h + v: rows 8 v …, k 8 h …
      if constexpr (kSlice == 8) {
        cell += (matrix >> 1) * kCells * kCellBytes;
        if (transposed_)
          load_matrix_trans(a, cell + place(in, matrix & 1));
        else
          load_matrix(a, cell + place((matrix & 1) * 8 + in, 0));
      } else if (transposed_) {
        load_matrix_trans(a, cell + place((matrix >> 1) * 8 + in, matrix & 1));
      } else {
        load_matrix(a, cell + place((matrix & 1) * 8 + in, matrix >> 1));
      }
    } else if (transposed_) {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int v = 0; v < 2; ++v)
          a[2 * h + v] = *reinterpret_cast<const uint32_t*>(
              cell + place(inner + 4 * h + t, 2 * v + g / 4) + g % 4 * 4);
    } else {
      load_matrix(a, cell + place((matrix & 1) * 8 + in, inner / 4 + (matrix >> 1)));
    }
  }

 private:
  static constexpr int kProduct = 32 / kSize;  // k of a product
  static constexpr int kLineChunks = kSlice * kSize / 16, kLineChunksT = kCell * kSize / 16;

  // Of a chunk of a cell as it is stored: which line, and which of its chunks.
  __device__ __forceinline__ int chunk_line(int chunk) const {
    return transposed_ ? chunk / kLineChunksT : chunk / kLineChunks;
  }
  __device__ __forceinline__ int chunk_in_line(int chunk) const {
    return transposed_ ? chunk % kLineChunksT : chunk % kLineChunks;
  }
  // Within the part of the cell that shares an offset.
  __device__ __forceinline__ int part_line(int line) const { return transposed_ ? line : line & part_mask_; }
  __device__ __forceinline__ int part_byte(int in_line) const {
    return transposed_ ? in_line * 16 & (part_mask_ * kSize + kSize - 1) : in_line * 16;
  }
  __device__ __forceinline__ int place(int line, int chunk) const {
    const int chunks = transposed_ ? kLineChunksT : kLineChunks;
    const int turn = chunks == 4 ? (line >> 1) & 3 : chunks == 2 ? (line >> 2) & 1 : 0;
    return (line * chunks + (chunk ^ turn)) * 16;
  }

  // The offsets of the parts that this lane will load a step later.
  __device__ __forceinline__ void look(int step) {
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int cell = i * kWarps + warp;
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int chunk = round * kWarp + lane;
        const int first = transposed_ ? chunk_in_line(chunk) * 16 / kSize : chunk_line(chunk);  // row of the cell
        ahead_[i][round] = -1;
        if (cell < kSlices * kCells && chunk < kChunks)
          ahead_[i][round] = load_constant(cells_ + (int64_t(step) * kSlices + cell / kCells) * per_slice_ +
                                           cell % kCells * parts_ + (first >> popcount(uint32_t(part_mask_))));
      }
    }
  }

  const unsigned char* values_;
  const int32_t *depths_, *cells_;
  int steps_, stride_, parts_, part_mask_, per_slice_;
  bool transposed_;
  int64_t depth_;
  int32_t ahead_[kAhead][kRounds];
};

}  // namespace slim::cuda::block_sparse
