// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/matmul_launch.cuh"
#include "dense.h"

namespace slim::cuda::dense {

namespace {

// Weights [n, stride]; a stage holds [row][kDepth], each row with 16 bytes more, so that ldmatrix meets no conflict.
template <class T, class Tile, int kKind>
struct Weights {
  using Value = T;
  struct Params {
    const T* weight;
    int64_t stride, rows, k;  // rows of a group
  };
  static constexpr int kSize = int(sizeof(T)), kPer = 16 / kSize, kLine = Tile::kDepth * kSize + 16;
  static constexpr bool kExpands = kKind == 1;
  static constexpr int kStageBytes = Tile::kRows * kLine, kBlockBytes = kExpands ? kStageBytes : 0;
  static constexpr int kSlab = kKind == 2 ? 16 : 0;

  __device__ Weights(const Params& p, unsigned char* block, int64_t row0, int group, int split, int splits)
      : block_(block), w_(p.weight + (group * p.rows + row0) * p.stride), stride_(p.stride) {
    rows_ = int(p.rows - row0 < Tile::kRows ? p.rows - row0 : Tile::kRows);
    const int all = int((p.k + Tile::kDepth - 1) / Tile::kDepth);
    begin_ = all * split / splits;
    end_ = all * (split + 1) / splits;
    slabs_ = int(p.k + 15) / 16;
  }
  __device__ int steps() const { return end_ - begin_; }
  __device__ int64_t depth(int step) const { return int64_t(begin_ + step) * Tile::kDepth; }
  __device__ int64_t depth(int step, int slab) const {
    const int at = (begin_ + step) * (Tile::kDepth / 16) + slab;
    return at < slabs_ ? int64_t(slabs_ - 1 - at) * 16 : stride_;
  }
  __device__ void load(unsigned char* stage, int step) {
    constexpr int kChunks = Tile::kDepth / kPer, kAtOnce = Tile::kThreads / kChunks;
    const int k = int(threadIdx.x) % kChunks * kPer, first = int(threadIdx.x) / kChunks;
    const int64_t at = kKind == 2 ? depth(step, k / 16) + k % 16 : depth(step) + k;
    const int rows = at < stride_ ? rows_ : 0;
    const T* from = w_ + first * stride_ + at;
#pragma unroll
    for (int i = 0; i < Tile::kRows / kAtOnce; ++i) {
      const int row = first + i * kAtOnce;
      copy_async<16>(stage + row * kLine + k * kSize, from, row < rows ? 16 : 0);
      from += kAtOnce * stride_;
    }
  }
  __device__ void expand(unsigned char* stage, int) {
    for (int i = int(threadIdx.x); i < kBlockBytes / 16; i += Tile::kThreads)
      reinterpret_cast<uint4*>(block_)[i] = reinterpret_cast<const uint4*>(stage)[i];
  }
  __device__ void fragment(uint32_t (&a)[4], const unsigned char* stage, int, int row, int k) {
    const unsigned char* from = kExpands ? block_ : stage;
    const int lane = int(threadIdx.x) % kWarp;
    load_matrix(a, from + (row + lane % 16) * kLine + k * kSize + lane / 16 * 16);
  }

 private:
  unsigned char* block_;
  const T* w_;
  int64_t stride_;
  int rows_, begin_, end_, slabs_;
};

template <class W, bool kConv, class Tile>
const char* start(const Params& p, void* stream) {
  const typename W::Params w{static_cast<const typename W::Value*>(p.weight), p.stride, p.a.n / p.a.groups, p.a.k};
  return slim::cuda::matmul<W, kConv, Tile>("dense::matmul", p.a, w, p.splits, p.partial, stream);
}

template <class T, class Tile>
const char* with_tile(const Params& p, void* stream) {
  // What a policy may be made of shows with any one tile.
  if constexpr (Tile::kRows == 64 && Tile::kCols == 16) {
    if (p.kind == 1)
      return p.a.conv ? start<Weights<T, Tile, 1>, true, Tile>(p, stream)
                      : start<Weights<T, Tile, 1>, false, Tile>(p, stream);
    if (p.kind == 2)
      return p.a.conv ? start<Weights<T, Tile, 2>, true, Tile>(p, stream)
                      : start<Weights<T, Tile, 2>, false, Tile>(p, stream);
  }
  if (p.kind != 0) return "no such kind for this tile";
  return p.a.conv ? start<Weights<T, Tile, 0>, true, Tile>(p, stream)
                  : start<Weights<T, Tile, 0>, false, Tile>(p, stream);
}

template <class T>
const char* with_type(const Params& p, void* stream) {
  switch (p.tile) {
    case 0:
      return with_tile<T, Tile<128, 128, 32, 2, 4, 4>>(p, stream);
    case 1:
      return with_tile<T, Tile<64, 64, 32, 2, 2, 4>>(p, stream);
    case 2:
      return with_tile<T, Tile<64, 16, 64, 4, 1, 4>>(p, stream);
    case 3:
      return with_tile<T, Tile<64, 8, 64, 4, 1, 3>>(p, stream);
    case 4:
      return with_tile<T, Tile<16, 32, 16, 1, 1, 2>>(p, stream);
    default:
      return "no such tile";
  }
}

}  // namespace

const char* matmul(const Params& p, void* stream) {
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
