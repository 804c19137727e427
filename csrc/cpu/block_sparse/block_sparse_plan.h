// SPDX-License-Identifier: Apache-2.0
// The plan of a block-sparse matrix: how kernels walk its blocks. Positions only; values are read where they live.
//
//   strip  = rows of one block row that belong to one group      (all of the block row, unless the layer has groups)
//   entry  = part of a block inside one k block                  (all of it, mostly)
//   cell   = the entries of one strip in one k block, columns ascending
//
// Element (i, j) of an entry lies at  values + block * r * c + (strip.inner + i) * row_step + (first + j) * k_step  with
// steps (c, 1), or (1, c) in the plan of the transposed matrix, which the same kernels run for the input's gradient.
#pragma once

#include <cstdint>

namespace slim::block_sparse {

struct Strip {
  int32_t row, rows, inner, unused;
};
struct Entry {
  uint32_t block, k;
  uint16_t first, length;
};

constexpr uint32_t kPlanMagic = 0x31505342;  // "BSP1"

struct PlanHeader {
  uint32_t magic;
  int32_t transposed;
  int64_t rows, width, blocks;                       // of the matrix the plan walks
  int64_t block_rows, block_cols, row_step, k_step;  // of the stored blocks
  int64_t k_block, k_blocks, strips;
  int64_t strips_at, cells_at, entries_at, bytes;
};

struct Plan {
  const PlanHeader* header;
  const Strip* strips;
  const uint32_t* cells;  // [strips * k_blocks + 1] into entries
  const Entry* entries;
};

// Block rows of a weight [rows, width] per group, with blocks [r, c].
struct Bsr {
  const int32_t* columns;
  const int32_t* row_offsets;
  int64_t rows, width, r, c, blocks, groups;
  int64_t block_row_count() const { return (rows + r - 1) / r; }
};

// Returns null and fills `blob` (a std::vector<char>, passed as void* to keep this header plain), or what is wrong.
const char* build_plan(const Bsr& bsr, int64_t taps, bool transposed, void* blob_vector);

bool view_plan(const void* blob, int64_t bytes, const Bsr& bsr, bool transposed, Plan* plan);

}  // namespace slim::block_sparse
