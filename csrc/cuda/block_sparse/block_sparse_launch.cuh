// SPDX-License-Identifier: Apache-2.0
// The tiles that blocks are multiplied in, and how one is started. Instantiated type by type: block_sparse_*_launch.cu.
#pragma once

#include "cuda/block_sparse/block_sparse_kernel.cuh"
#include "cuda/common/matmul_launch.cuh"

namespace slim::cuda::block_sparse {

// 16 bit: 64 k in a step; float: 32, the same bytes.
template <class T>
constexpr int kDepth = 128 / int(sizeof(T));

constexpr int kWideColumns = 64;

// Low blocks and many columns: many rows share the activations, which are what most bytes are of. A stage takes 40 KiB.
template <class T>
using Wide = Tile<256, kWideColumns, kDepth<T>, 4, 2, 3>;
// Blocks of 64 rows: all warps have work at every step. 24 KiB a stage; two blocks a multiprocessor where their registers
// fit, which they do not with a convolution's addresses or with float32's halves.
template <class T, bool kConv>
using Tall = Tile<64, 128, kDepth<T>, 2, 4, 3, sizeof(T) == 2 && !kConv ? 2 : 1>;
// Few columns: many small blocks of threads, for the weights' bytes are what bounds. 10 KiB a stage.
template <class T>
using Few = Tile<64, 16, kDepth<T>, 4, 1, 4>;

const char* product_f32(const Product& p, const Shape& s, const Tiling& tiling, float* partial, void* stream);
const char* product_f16(const Product& p, const Shape& s, const Tiling& tiling, float* partial, void* stream);
const char* product_bf16(const Product& p, const Shape& s, const Tiling& tiling, float* partial, void* stream);

template <class T, class Tile, int kSlice, bool kConv>
const char* start(const Product& p, const Shape& s, int splits, float* partial, void* stream) {
  TiledParams w{};
  w.product = p;
  w.product.plan = nullptr;
  w.order = p.plan;
  w.offsets = p.plan + s.tiles();
  w.depths = p.plan + s.head_words();
  w.cells = w.depths + s.slices(p.plan_words);
  w.depth = s.group_depth();
  w.tiles = s.tiles();
  w.tiles_per_group = int32_t(s.tiles_per_group());
  w.cells_per_tile = int32_t(s.tile_rows() / kCell);
  w.parts = int32_t(s.parts());
  w.plan_steps = kStep / Tile::kDepth;
  return matmul<Weights<T, Tile, kSlice>, kConv, Tile>("block_sparse::product", p.a, w, splits, partial, stream);
}

template <class T>
const char* product(const Product& p, const Shape& s, const Tiling& tiling, float* partial, void* stream) {
  const int splits = tiling.splits;
  if (s.slice() == 16) {
    if (p.a.conv)
      return tiling.tile == kWide ? start<T, Wide<T>, 16, true>(p, s, splits, partial, stream)
                                  : start<T, Tall<T, true>, 16, true>(p, s, splits, partial, stream);
    return tiling.tile == kWide   ? start<T, Wide<T>, 16, false>(p, s, splits, partial, stream)
           : tiling.tile == kTall ? start<T, Tall<T, false>, 16, false>(p, s, splits, partial, stream)
                                  : start<T, Few<T>, 16, false>(p, s, splits, partial, stream);
  }
  if (p.a.conv) return start<T, Tall<T, true>, 8, true>(p, s, splits, partial, stream);
  return tiling.tile == kFew ? start<T, Few<T>, 8, false>(p, s, splits, partial, stream)
                             : start<T, Tall<T, false>, 8, false>(p, s, splits, partial, stream);
}

}  // namespace slim::cuda::block_sparse
