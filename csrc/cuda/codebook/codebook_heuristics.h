// SPDX-License-Identifier: Apache-2.0
// Which kernel and how many shares: pure functions of sizes and the device. Reasoned from bytes and instructions, to be
// corrected by measurements.
#pragma once

#include "cuda/codebook/codebook.h"

namespace slim::cuda::codebook {

enum class Kernel {
  few_rows_of_group,  // convolutions whose groups are too small for tiles of 16 rows
  few_columns,        // linear, codebook_few.cuh
  pair,
  single  // the main loop, with that policy of codebook_weights.cuh
};

struct Choice {
  Kernel kernel;
  int columns;  // of a tile of the main loop
  int splits;
};

struct TileSize {
  int rows, columns, depth;
};

// The tiles that are instantiated (codebook_*_launch.cu). Up to 16 columns: 8 warps share a table. More columns: a
// fragment, once looked up, serves 64 columns, eight products of 8 cycles each on an A100, so that looking up the next
// one hides behind them. Stages of float32 are twice as large: 64 rows.
constexpr TileSize tile_size(bool conv, bool f32, Kernel kernel, int64_t columns) {
  if (conv) return {64, 64, 64};
  if (f32) return {64, columns <= 16 ? 16 : 64, 64};
  if (columns <= 16) return {128, 16, kernel == Kernel::pair ? 128 : 64};
  return {128, columns <= 64 ? 64 : 128, 64};
}

inline Choice choose(const Activations& a, const Weight& w, const DeviceInfo& device) {
  const auto ceil_div = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const bool f32 = a.type == DType::f32;
  const int64_t columns = columns_of(a), rows = a.n / a.groups;
  Choice c{Kernel::single, 0, 1};
  if (columns == 0 || a.n == 0) return c;
  if (a.conv && a.groups > 1 && rows < 8) {
    c.kernel = Kernel::few_rows_of_group;
    return c;
  }
  if (!f32 && w.group_size == kOneTable && w.bits <= 4) {
    c.kernel = Kernel::pair;
    // A GPU other than A100 and H100 may have 99 KiB of shared memory: enough for 8 columns.
    if (!a.conv && columns <= 16 && w.bits >= 2 && w.plan && a.k % 8 == 0 &&
        reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && few_columns_shared(w.bits, columns) <= device.shared_per_block) {
      c.kernel = Kernel::few_columns;
      return c;
    }
  }
  // Shares of the sum where the tiles alone do not fill the device: as many as give each multiprocessor two blocks, but
  // none of fewer than 4 steps, since each begins with tables to fill and ends with sums to store, and no more bytes of
  // partial sums (written and read, 4 bytes each) than the codes have.
  TileSize tile = tile_size(a.conv, f32, c.kernel, columns);
  // Fewer than 4 bits are rare enough for one tile to do, and codes one by one leave no registers for the larger.
  if (tile.columns == 128 && (c.kernel == Kernel::single || w.bits < 4)) tile.columns = 64;
  c.columns = tile.columns;
  const int64_t blocks = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns) * a.groups;
  const int64_t steps = ceil_div(w.width, tile.depth);
  int64_t splits = 2 * device.multiprocessors / blocks;
  if (splits > steps / 4) splits = steps / 4;
  const int64_t bytes = w.rows * w.width * w.bits / 8, sums = 8 * a.n * columns;
  if (splits > 1 && columns > 16 && splits > bytes / sums) splits = bytes / sums;
  c.splits = splits < 1 ? 1 : int(splits);
  return c;
}

}  // namespace slim::cuda::codebook
