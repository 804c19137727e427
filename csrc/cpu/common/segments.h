// SPDX-License-Identifier: Apache-2.0
// What kernels share that multiply single weights of a row with rows of lowered activations.
#pragma once

#include "cpu/common/columns.h"

namespace slim::cpu::SLIM_ISA {
namespace {

template <bool kTable, class T, class Column>
SLIM_INLINE const T* row_of(const Lowered<T>& x, const char* base, Column column) {
  if constexpr (kTable)
    return reinterpret_cast<const T*>(base + x.table[column]);
  else
    return reinterpret_cast<const T*>(base + int64_t(column) * x.pitch);
}

// Sets of accumulators that take turns where one row has too few vectors to hide the latency of an FMA.
constexpr int sets_for(int vectors) { return vectors == 1 ? 4 : vectors == 2 ? 4 : vectors <= 5 ? 2 : 1; }

// First row block of range `i` of `ranges`: equal shares of the entries, and of the rows, whose outputs cost too.
SLIM_INLINE int64_t range_start(const int32_t* row_offsets, int64_t rows, int64_t row_block, int64_t i,
                                int64_t ranges) {
  const int64_t blocks = ceil_div(rows, row_block);
  if (i <= 0) return 0;
  if (i >= ranges) return blocks;
  const double target = double(row_offsets[rows] + 2 * rows) * double(i) / double(ranges);
  int64_t low = 0, high = blocks;
  while (low < high) {
    const int64_t middle = (low + high) / 2, row = middle * row_block;
    if (double(row_offsets[row]) + 2 * double(row) < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace
}  // namespace slim::cpu::SLIM_ISA
