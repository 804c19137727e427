// SPDX-License-Identifier: Apache-2.0
// The plan of an unstructured sparse matrix: how kernels walk its positions.
//
//   rows are cut into row blocks, k into k blocks; one (row block, k block) cell is a list of segments:
//
//     segment = { start in the packed order, row in the block, count }     sorted by count
//
// Packed order is the order of the walk, so that values and columns are read as two streams. In CSR order a 4096 x 4096
// weight ran at half the speed: every segment began with a miss. Sorting makes neighbouring segments equally long, so
// the end of the inner loop is predicted; a k block keeps the activations it needs in the first-level cache.
//
// A plan holds no values. Values in packed order are a copy (pack_values), made anew when the weight has changed. The
// blob is position-independent bytes: it can be copied, moved with a module and executed by any instruction set.
#pragma once

#include <cstdint>

#include "cpu/common/segment.h"

namespace slim::sparse {

constexpr uint32_t kPlanMagic = 0x31505353;  // "SSP1"
constexpr int64_t kRowBlock = 256;

// Blob: header, then at the byte offsets it names: columns in row order (absolute over groups) and in packed order (from
// the start of their k block, so 16 bits are always enough), row_offsets, cells, segments, where each segment starts in row order, and, in a plan of the transposed
// matrix, for each value in its row order where it lies in the CSR that the plan was made from.
struct PlanHeader {
  uint32_t magic;
  uint32_t by_row;           // columns in row order are there: they fit 16 bits
  int64_t rows, width, nnz;  // of the matrix the plan walks (the transposed one, if transposed)
  int64_t source_rows;       // of the CSR it was made from
  int64_t k_block, k_blocks, row_blocks;
  int64_t transposed;
  int64_t columns_at, packed_columns_at, row_offsets_at, cells_at, segments_at, sources_at, order_at, bytes;
};

struct Plan {
  const PlanHeader* header;
  const uint16_t* columns;         // [nnz] in row order, if header->by_row
  const uint16_t* packed_columns;  // [nnz] in packed order
  const int32_t* row_offsets;      // [rows + 1]
  const uint32_t* cells;           // [row_blocks * k_blocks + 1] into segments
  const Segment* segments;
  const uint32_t* sources;  // of each segment: where it starts in row order
  const uint32_t* order;    // [nnz] or null
};

// CSR [rows, width] per group; row r belongs to group r / (rows / groups), whose columns start at group * width.
struct Csr {
  const int32_t* columns;
  const int32_t* row_offsets;
  int64_t rows, width, nnz, groups;
};

// Activations kept in the first-level cache by a k block, chosen by density; a multiple of `taps`, the taps per channel.
int64_t choose_k_block(const Csr& csr, int64_t taps, bool transposed);

// Bytes that build_plan writes at most.
int64_t plan_capacity(const Csr& csr, int64_t k_block, bool transposed);

// Returns null if the CSR is sound and the plan was written, or what is wrong with it.
const char* build_plan(const Csr& csr, int64_t k_block, bool transposed, void* blob, int64_t* bytes);

// Views a blob; false if it is no plan of a matrix of these sizes.
bool view_plan(const void* blob, int64_t bytes, int64_t rows, int64_t width, int64_t nnz, bool transposed, Plan* plan);

// Copies values in row order to packed order; `element` is the size of one.
void pack_values(const Plan& plan, const void* values, int64_t element, void* packed);

}  // namespace slim::sparse
