// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/outer_launch.cuh"
#include "dense.h"

namespace slim::cuda::dense {

namespace {

template <class T, class Tile, int kKind>
struct Kept {
  using Value = T;
  struct Params {
    T* values;           // [n, k]
    float* partial;      // [splits][n, k], or null
    int64_t n, rows, k;  // rows of a group
  };
  static constexpr int kSlab = kKind == 1 ? 16 : Tile::kCols, kBlockBytes = 0;

  __device__ Kept(const Params& p, unsigned char*, int64_t tile) : p_(p) {
    const int64_t row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows, k_tiles = (p.k + Tile::kCols - 1) / Tile::kCols;
    row_ = tile % row_tiles * Tile::kRows;
    tile_ = tile / row_tiles % k_tiles;
    group_ = int(tile / row_tiles / k_tiles);
  }
  __device__ int group() const { return group_; }
  __device__ int64_t row() const { return row_; }
  __device__ int64_t k(int slab) const {
    if (kKind == 0) return tile_ * Tile::kCols;
    const int64_t slabs = (p_.k + kSlab - 1) / kSlab, at = tile_ * (Tile::kCols / kSlab) + slab;
    return at < slabs ? (slabs - 1 - at) * kSlab : p_.k;
  }
  __device__ void keep(const float* sums, int split) {
    for (int i = int(threadIdx.x); i < Tile::kRows * Tile::kCols; i += Tile::kThreads) {
      const int row = i / Tile::kCols, column = i % Tile::kCols;
      const int64_t at = k(column / kSlab) + column % kSlab;
      if (row_ + row >= p_.rows || at >= p_.k) continue;
      const int64_t to = (group_ * p_.rows + row_ + row) * p_.k + at;
      const float sum = sums[row * kOuterLine<Tile> + column];
      if (p_.partial)
        p_.partial[split * p_.n * p_.k + to] = sum;
      else
        p_.values[to] = from_float<T>(sum);
    }
  }

 private:
  const Params& p_;
  int64_t row_, tile_;
  int group_;
};

template <class T, class Tile, int kKind>
const char* start(const OuterParams& p, void* stream) {
  using K = Kept<T, Tile, kKind>;
  const int64_t rows = p.a.n / p.a.groups;
  const int64_t tiles = (rows + Tile::kRows - 1) / Tile::kRows * ((p.a.k + Tile::kCols - 1) / Tile::kCols) * p.a.groups;
  float* const partial = p.splits == 1 ? nullptr : p.partial;
  const typename K::Params kept{static_cast<T*>(p.values), partial, p.a.n, rows, p.a.k};
  const char* error = p.a.conv ? slim::cuda::outer<K, true, Tile>("dense::outer", p.a, kept, tiles, p.splits, stream)
                               : slim::cuda::outer<K, false, Tile>("dense::outer", p.a, kept, tiles, p.splits, stream);
  return error || p.splits == 1 ? error : add_splits<T>(partial, p.splits, p.a.n * p.a.k, p.values, stream);
}

template <class T>
const char* with_type(const OuterParams& p, void* stream) {
  if (p.tile == 0 && p.kind == 0) return start<T, Tile<128, 128, 32, 2, 4, 3>, 0>(p, stream);
  if (p.tile == 1 && p.kind == 0) return start<T, Tile<64, 64, 32, 2, 2, 4>, 0>(p, stream);
  if (p.tile == 2 && p.kind == 0) return start<T, Tile<16, 128, 32, 1, 4, 4>, 0>(p, stream);
  if (p.tile == 2 && p.kind == 1) return start<T, Tile<16, 128, 32, 1, 4, 4>, 1>(p, stream);
  return "no such tile";
}

}  // namespace

const char* outer(const OuterParams& p, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return with_type<float>(p, stream);
    case DType::f16:
      return with_type<Half>(p, stream);
    default:
      return with_type<BFloat16>(p, stream);
  }
}

}  // namespace slim::cuda::dense
