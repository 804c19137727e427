// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/matmul_launch.cuh"
#include "cuda/sparse_codebook/sparse_codebook_tiles.cuh"

namespace slim::cuda::sparse_codebook {

namespace {

// rows x columns of a block, a warp for each 16 rows. Up to 8 columns (a single tile of the mma), up to 32, and more.
using Narrow = Tile<64, 8, 64, 4, 1, 4>;
using Middle = Tile<64, 32, 64, 4, 1, 3>;
using Wide = Tile<128, 64, 64, 8, 1, 3>;

enum class Size { narrow, middle, wide };

// Every tile of columns decodes the weights again, so tiles are as wide as the columns ask for. Convolutions have pixels
// enough for the widest.
Size size_for(const Activations& a) {
  if (a.conv) return Size::wide;
  return a.m <= 8 ? Size::narrow : a.m <= 32 ? Size::middle : Size::wide;
}

int64_t blocks_of(const Activations& a, Size size) {
  return size == Size::wide     ? matmul_blocks<Wide>(a)
         : size == Size::middle ? matmul_blocks<Middle>(a)
                                : matmul_blocks<Narrow>(a);
}

// Shares of the sum over k, until there are four blocks of four warps, or two of eight, for every multiprocessor: decoding
// waits for shared memory, so several warps have to take turns. A share is at least four cells, and shares are written
// and read again, 8 bytes for an output each, so that there are at most eight.
int splits_of(const Params& p) {
  const Size size = size_for(p.a);
  const int64_t blocks = blocks_of(p.a, size),
                wanted = int64_t(p.device.multiprocessors) * (size == Size::wide ? 2 : 4);
  int64_t splits = wanted / (blocks > 0 ? blocks : 1);
  const int64_t cells = (p.a.k + sparse::kCellDepth - 1) / sparse::kCellDepth;
  if (splits > cells / 4) splits = cells / 4;
  if (splits > 8) splits = 8;
  return splits < 1 ? 1 : int(splits);
}

template <class T, bool kConv, class Tile>
const char* run(const Params& p, void* stream) {
  using W = CodeWeights<T, Tile>;
  const sparse::Shape shape{p.w.rows / p.a.groups, p.w.width, p.a.groups, 0};
  typename W::Params w{};
  w.cells = p.codes.cells;
  w.starts = p.codes.starts;
  w.codes = p.codes.codes;
  w.w = p.w;
  w.group_rows = shape.rows;
  w.strips = int32_t(shape.strips());
  w.strip_cells = int32_t(shape.strip_cells());
  w.bits = p.codes.bits;
  w.shift = 31;
  if (p.w.group_size > 0)
    for (w.shift = 0; int64_t(1) << w.shift < p.w.group_size;) ++w.shift;
  return matmul<W, kConv, Tile>("sparse_codebook::codes", p.a, w, splits_of(p), static_cast<float*>(p.scratch), stream);
}

template <class T>
const char* run_as(const Params& p, void* stream) {
  if (p.a.conv) return run<T, true, Wide>(p, stream);
  switch (size_for(p.a)) {
    case Size::narrow:
      return run<T, false, Narrow>(p, stream);
    case Size::middle:
      return run<T, false, Middle>(p, stream);
    default:
      return run<T, false, Wide>(p, stream);
  }
}

}  // namespace

int64_t tiles_scratch_bytes(const Params& p) { return partial_size(p.a, splits_of(p)) * 4; }

const char* forward_tiles(const Params& p, void* stream) {
  return p.a.type == DType::f16 ? run_as<Half>(p, stream) : run_as<BFloat16>(p, stream);
}

}  // namespace slim::cuda::sparse_codebook
