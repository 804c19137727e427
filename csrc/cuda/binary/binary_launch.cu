// SPDX-License-Identifier: Apache-2.0
#include "cuda/binary/binary_kernel.cuh"
#include "cuda/common/launch.cuh"

namespace slim::cuda::binary {

namespace {

using Large = SignTile<128, 256, 2, 4, 1, 3, 1>;  // 147 KB of shared memory (157 of a convolution): A100 has 163
using Medium = SignTile<64, 64, 2, 2, 1, 4, 2>;   // 65 KB
using Narrow = SignTile<32, 8, 1, 1, 4, 4, 4>;    // 20 KB

// Which tile is best. Few columns: as many blocks as there can be. Large tiles as soon as they fill the GPU, for only they
// need few enough bytes; predicted from bytes and operations, not measured yet.
enum class Choice { narrow, medium, large };
Choice choose(int64_t group_rows, int64_t groups, int64_t columns, const DeviceInfo& device) {
  if (columns <= 16) return Choice::narrow;
  const int64_t large = (group_rows + 127) / 128 * ((columns + 255) / 256) * groups;
  const bool filled = 4 * large >= 3 * int64_t(device.multiprocessors);
  return filled && group_rows > 64 && Shared<Large>::kConvBytes <= device.shared_per_block ? Choice::large
                                                                                           : Choice::medium;
}

template <bool kConv, class Tile>
const char* start(const ProductParams& given, void* stream) {
  ProductParams p = given;
  int64_t row_tiles = (p.rows / p.groups + Tile::kRows - 1) / Tile::kRows;
  // Bits are written in words of 64: a tile of 32 rows may have to write the zeros of the upper half.
  if (p.out_bits && Tile::kRows == 32) row_tiles = (row_tiles + 1) / 2 * 2;
  const int64_t column_tiles = (p.columns + Tile::kCols - 1) / Tile::kCols;
  if (column_tiles > INT32_MAX || row_tiles > INT32_MAX / (column_tiles * p.groups))
    return "more outputs than a grid has blocks";
  p.row_tiles = unsigned(row_tiles);
  p.column_tiles = unsigned(column_tiles);
  const dim3 grid(unsigned(row_tiles * column_tiles * p.groups));
  const int shared = kConv ? Shared<Tile>::kConvBytes : Shared<Tile>::kLinearBytes;
  const char* name = kConv ? "binary::conv2d" : "binary::linear";
  return launch(product_kernel<kConv, Tile>, {name, grid, dim3(Tile::kThreads), shared, stream}, p);
}

template <bool kConv>
const char* start(const ProductParams& p, const DeviceInfo& device, void* stream) {
  switch (choose(p.rows / p.groups, p.groups, p.columns, device)) {
    case Choice::narrow:
      return start<kConv, Narrow>(p, stream);
    case Choice::medium:
      return start<kConv, Medium>(p, stream);
    default:
      return start<kConv, Large>(p, stream);
  }
}

}  // namespace

const char* product(const ProductParams& p, const DeviceInfo& device, void* stream) {
  return p.conv ? start<true>(p, device, stream) : start<false>(p, device, stream);
}

}  // namespace slim::cuda::binary
