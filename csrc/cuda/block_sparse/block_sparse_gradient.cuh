// SPDX-License-Identifier: Apache-2.0
// Gradients of stored values on tensor cores: outer.cuh over one tile for each Rows x Cols of a stored block, so that
// nothing that is not stored is computed. A tile is as large as the block allows, 16 x 16 or 64 x 64: the larger, the fewer
// bytes a product takes from the second-level cache.
#pragma once

#include "cuda/block_sparse/block_sparse.h"
#include "cuda/common/outer_launch.cuh"

namespace slim::cuda::block_sparse {

template <class T, class Tile>
struct KeptBlock {
  using Value = T;
  using Params = Gradient;
  static constexpr int kSlab = Tile::kCols, kBlockBytes = 0;

  __device__ __forceinline__ KeptBlock(const Params& p, unsigned char*, int64_t tile) : p_(p) {
    const int across = p.w.c / Tile::kCols, down = p.w.r / Tile::kRows;
    block_ = tile / (across * down);
    const int in_block = int(tile - block_ * (across * down));
    inner_row_ = in_block / across * Tile::kRows;
    inner_k_ = in_block % across * Tile::kCols;
    int64_t begin = 0, end = (p.w.rows + p.w.r - 1) / p.w.r;  // the block row: the last that begins at or before it
    while (end - begin > 1) {
      const int64_t middle = (begin + end) / 2;
      if (load_constant(p.w.row_offsets + middle) <= block_)
        begin = middle;
      else
        end = middle;
    }
    const int64_t row = begin * p.w.r + inner_row_, of_group = p.w.rows / p.w.groups;
    group_ = int(row < p.w.rows ? row / of_group : 0);
    row_ = row - group_ * of_group;
    k_ = int64_t(load_constant(p.w.columns + block_)) * p.w.c + inner_k_;
  }
  __device__ __forceinline__ int group() const { return group_; }
  __device__ __forceinline__ int64_t row() const { return row_; }
  __device__ __forceinline__ int64_t k(int) const { return k_; }
  __device__ __forceinline__ void keep(const float* sums, int split) const {
    const int64_t of_group = p_.w.rows / p_.w.groups;
    for (int i = int(threadIdx.x); i < Tile::kRows * Tile::kCols; i += Tile::kThreads) {
      const int row = i / Tile::kCols, column = i % Tile::kCols;
      const int64_t to = (block_ * p_.w.r + inner_row_ + row) * p_.w.c + inner_k_ + column;
      // Beyond the edges of the weight there is padding, which stays 0.
      const float sum =
          row_ + row < of_group && k_ + column < p_.w.width ? sums[row * kOuterLine<Tile> + column] : 0.0f;
      if (p_.partial)
        p_.partial[split * (p_.w.blocks * p_.w.r * p_.w.c) + to] = sum;
      else
        static_cast<T*>(p_.grad_values)[to] = from_float<T>(sum);
    }
  }

 private:
  const Params& p_;
  int64_t block_, row_, k_;
  int inner_row_, inner_k_, group_;
};

}  // namespace slim::cuda::block_sparse
