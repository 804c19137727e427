// SPDX-License-Identifier: Apache-2.0
// Starting the main loop. Only *_launch.cu files include this.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/matmul.cuh"

namespace slim::cuda {

// Shared memory that a block takes: heuristics compare it with DeviceInfo::shared_per_block.
template <class W, bool kConv, class Tile>
constexpr int matmul_shared() {
  return MatmulShape<W, kConv, Tile>::kSharedBytes;
}

// Blocks that the tiles of a product make, before it is split.
template <class Tile>
int64_t matmul_blocks(const Activations& a) {
  const int64_t rows = (a.n / a.groups + Tile::kRows - 1) / Tile::kRows;
  return rows * ((columns_of(a) + Tile::kCols - 1) / Tile::kCols) * a.groups;
}
template <class W, class Tile>
int64_t matmul_blocks(const Activations& a, const typename W::Params& w) {
  if constexpr (HasOrder<W>::value)
    return W::tiles(w) * ((columns_of(a) + Tile::kCols - 1) / Tile::kCols);
  else
    return matmul_blocks<Tile>(a);
}

// Floats that `partial` must hold.
inline int64_t partial_size(const Activations& a, int splits) { return splits == 1 ? 0 : splits * a.n * columns_of(a); }

// What the kernels cannot address: images are walked with 32 bits.
inline const char* check_geometry(const Activations& a) {
  const ConvGeometry& g = a.geometry;
  constexpr int64_t kLimit = int64_t(1) << 29;
  if (a.conv && (g.height > kLimit || g.width > kLimit || g.height * g.width > INT32_MAX ||
                 g.channels * g.height * g.width > INT32_MAX))
    return "convolution: an image has more than 2**31 - 1 entries";
  return nullptr;
}

// y = W x^T with a bias and ReLU, as `a` asks for. `partial`: null if splits == 1, else partial_size() floats. Returns
// null, or what is wrong.
template <class W, bool kConv, class Tile>
const char* matmul(const char* name, const Activations& a, const typename W::Params& w, int splits, float* partial,
                   void* stream) {
  if (const char* error = check_geometry(a)) return error;
  const int64_t columns = columns_of(a), blocks = matmul_blocks<W, Tile>(a, w) * splits;
  if (blocks > INT32_MAX) return "too many tiles for one grid";
  MatmulParams<W> p{a, w, splits == 1 ? nullptr : partial, splits, 0, 0};
  p.row_tiles = unsigned((a.n / a.groups + Tile::kRows - 1) / Tile::kRows);
  p.column_tiles = unsigned((columns + Tile::kCols - 1) / Tile::kCols);
  const char* error =
      launch(matmul_kernel<W, kConv, Tile>,
             {name, dim3(unsigned(blocks)), dim3(Tile::kThreads), matmul_shared<W, kConv, Tile>(), stream}, p);
  if (error || splits == 1) return error;
  using Exact = typename ExactOf<W>::type;
  ReduceParams<Exact> r{partial, a.y, a.bias, splits, a.relu, a.n * columns, a.n, 1, a, ExactOf<W>::params(w)};
  if (kConv) r.inner = a.geometry.out_h * a.geometry.out_w;
  const int64_t wanted = (r.total + kReduceThreads - 1) / kReduceThreads;
  return launch(reduce_kernel<typename W::Value, Exact>,
                {"reduce", dim3(unsigned(wanted < 65535 ? wanted : 65535)), dim3(kReduceThreads), 0, stream}, r);
}

}  // namespace slim::cuda
