// SPDX-License-Identifier: Apache-2.0
// Which tile for how many columns. One file per dtype includes this, so that they compile side by side.
#pragma once

#include "cuda/common/matmul_launch.cuh"
#include "cuda/sparse/sparse_heuristics.h"
#include "cuda/sparse/sparse_tiles.cuh"

namespace slim::cuda::sparse {

// A warp takes all columns of the tile, so that no weight is decoded twice. Few columns: many small blocks, whose warps
// hide the latency of shared memory from each other. Many: 32 rows a warp, so that eight columns serve two products.
using FewColumns = Tile<64, 8, kCellDepth, 4, 1, 4, 4>;
using SomeColumns = Tile<64, 32, kCellDepth, 4, 1, 4, 3>;
template <bool kConv>  // a convolution's addresses take the registers of the other 16 rows
using ManyColumns = Tile<kConv ? 64 : 128, 64, kCellDepth, 4, 1, 3, 2>;

template <class T, template <class> class Values>
const char* tiles_of(const char* name, const Activations& a, const Tiles& t, const typename Values<T>::Params& values,
                     int splits, float* partial, void* stream) {
  const auto run = [&](auto tile, auto conv) {
    using Shape = decltype(tile);
    using W = TileWeights<T, Shape, Values<T>>;
    return matmul<W, decltype(conv)::value, Shape>(name, a, {t, values}, splits, partial, stream);
  };
  const int64_t columns = columns_of(a);
  if (a.conv)
    return columns <= kSomeColumns ? run(SomeColumns(), std::true_type()) : run(ManyColumns<true>(), std::true_type());
  if (columns <= kFewColumns) return run(FewColumns(), std::false_type());
  return columns <= kSomeColumns ? run(SomeColumns(), std::false_type()) : run(ManyColumns<false>(), std::false_type());
}

}  // namespace slim::cuda::sparse
