// SPDX-License-Identifier: Apache-2.0
// Which kernel and how many shares: pure functions of sizes and the device. Reasoned from bytes and instructions, to be
// corrected by measurements.
#pragma once

#include "cuda/codebook/codebook.h"

namespace slim::cuda::codebook {

enum class Look { pair, single };
enum class Width { few, some, many };  // columns of a tile, see kTiles

struct Choice {
  bool few_rows;  // a convolution whose groups are too small for tiles of 16 rows
  Look look;
  Width width;
  int splits;
};

struct TileSize {
  int rows, cols, depth;
};

// The tiles that are instantiated (codebook_*_launch.cu). Few columns: 128 rows and 8 warps, so that the 32 KiB of
// tables are filled for many rows and two blocks fit an A100's 164 KiB. More columns: a fragment, once looked up, serves
// 64 columns, eight products of 8 cycles each, so that looking up the next one hides behind them. float32 stages are twice
// as large: 64 rows.
constexpr TileSize tile_size(bool conv, bool f32, Look look, Width width) {
  if (conv) return TileSize{64, 64, 64};
  if (f32) return width == Width::few ? TileSize{64, 16, 64} : TileSize{64, 64, 64};
  switch (width) {
    case Width::few:
      return look == Look::pair ? TileSize{128, 8, 128} : TileSize{128, 16, 64};
    case Width::some:
      return look == Look::pair ? TileSize{128, 16, 128} : TileSize{128, 64, 64};
    default:
      return look == Look::pair ? TileSize{128, 128, 64} : TileSize{128, 64, 64};
  }
}

inline Choice choose(const Activations& a, const Weight& w, const DeviceInfo& device) {
  const auto ceil_div = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const bool f32 = a.type == DType::f32;
  const int64_t columns = columns_of(a), rows = a.n / a.groups;
  Choice c{};
  c.splits = 1;
  c.few_rows = a.conv && a.groups > 1 && rows < 8;
  if (c.few_rows || columns == 0 || a.n == 0) return c;
  c.look = !f32 && w.group_size == kOneTable && w.bits <= 4 ? Look::pair : Look::single;
  if (a.conv)
    c.width = Width::many;
  else if (c.look == Look::pair)
    c.width = columns <= 8 ? Width::few : columns <= 16 ? Width::some : Width::many;
  else
    c.width = columns <= 16 ? Width::few : Width::many;
  // Shares of the sum where the tiles alone do not fill the device: as many as give each multiprocessor two blocks, but
  // none of fewer than 4 steps, since each begins with tables to fill and ends with sums to store, and no more bytes of
  // partial sums (written and read, 4 bytes each) than the codes have.
  const TileSize tile = tile_size(a.conv, f32, c.look, c.width);
  const int64_t blocks = ceil_div(rows, tile.rows) * ceil_div(columns, tile.cols) * a.groups;
  const int64_t steps = ceil_div(w.width, tile.depth);
  int64_t splits = 2 * device.multiprocessors / blocks;
  if (splits > steps / 4) splits = steps / 4;
  const int64_t bytes = w.rows * w.width * w.bits / 8, sums = 8 * a.n * columns;
  if (splits > 1 && columns > 16 && splits > bytes / sums) splits = bytes / sums;
  c.splits = splits < 1 ? 1 : int(splits);
  return c;
}

}  // namespace slim::cuda::codebook
