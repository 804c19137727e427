// SPDX-License-Identifier: Apache-2.0
// Choices that depend on sizes and device alone: pure functions, to be fed by measurements.
#pragma once

#include <algorithm>

#include "cuda/common/params.h"
#include "cuda/sparse/sparse_plan.h"

namespace slim::cuda::sparse {

constexpr int64_t kFewColumns = 8, kSomeColumns = 32;

// Rows of a block's tile, and blocks that a multiprocessor holds at once, of sparse_tiles_launch.cuh.
struct TileFacts {
  int rows, columns, resident;
};
inline TileFacts tile_facts(const Activations& a) {
  const int64_t columns = columns_of(a);
  if (!a.conv && columns <= kFewColumns) return {64, 8, 4};
  return columns <= kSomeColumns ? TileFacts{64, 32, 3} : TileFacts{a.conv ? 64 : 128, 64, 2};
}

// Splits of the depth: until every multiprocessor is full once, as long as each block keeps four steps (a stage of the
// pipeline each) and the sums, which go through memory in float32, stay below the bytes of the dense weight.
inline int splits_for(const Activations& a, const DeviceInfo& device) {
  const TileFacts t = tile_facts(a);
  const int64_t blocks =
      (a.n / a.groups + t.rows - 1) / t.rows * ((columns_of(a) + t.columns - 1) / t.columns) * a.groups;
  if (blocks == 0) return 1;
  const int64_t wanted = int64_t(device.multiprocessors) * t.resident / blocks;
  const int64_t by_depth = (a.k + kCellDepth - 1) / kCellDepth / 4;
  const int64_t by_bytes = a.k / std::max<int64_t>(1, 8 * columns_of(a));  // 8 bytes a sum, written and read; n cancels
  return int(std::max<int64_t>(1, std::min({wanted, by_depth, by_bytes * 2, int64_t(16)})));
}

// Whether tensor cores are the faster way for 16-bit values. A weight costs them 1.125 bits and two bytes if stored, and
// 30 instructions of a warp for 256; by rows it costs six bytes if stored, and each column a pass through shared memory.
// So rows win for a column or two of a weight that is almost empty; and for few columns of values that were not packed
// beforehand, which costs another eight bytes for each.
inline bool tiles_pay(const Activations& a, int64_t nnz, bool packed) {
  if (columns_of(a) > INT32_MAX) return false;  // they count in 32 bits
  if (!packed) return columns_of(a) > 8;
  return columns_of(a) > 2 || double(nnz) >= 0.03 * double(a.n) * double(a.k);
}

// By rows: how many columns a pass of the kernel for few columns takes; 0: the one for many is faster, or x does not fit
// into shared memory. Up to 32 columns gathers beat panels of 64, which would be half empty.
inline int dot_columns(const Activations& a) {
  constexpr int64_t kShared = 96 * 1024;  // two blocks on an H100, one on an A100
  if (a.conv || a.m > 32 || a.k * 4 > kShared) return 0;
  if (a.m >= 3 && a.k * 16 <= kShared) return 4;
  if (a.m >= 2 && a.k * 8 <= kShared) return 2;
  return a.m <= 8 ? 1 : 0;
}

// Whether panels with many rows a block, which share activations better, still fill the device.
inline bool panels_fill(const Activations& a, int64_t rows, const DeviceInfo& device) {
  const int64_t tiles = (a.n / a.groups + rows - 1) / rows * a.groups * ((columns_of(a) + 63) / 64);
  return tiles >= device.multiprocessors;
}

}  // namespace slim::cuda::sparse
