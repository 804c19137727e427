// SPDX-License-Identifier: Apache-2.0
// The plan of a sparse codebook matrix: in which order kernels walk entries that are executed as they are stored.
//
// Rows are cut into row blocks and k into k blocks, as in the plan of the unstructured kernels. The entries of one row in
// one k block are consecutive, so a cell (row block, k block) only has to say how many there are, rows with many first:
//
//     cell = runs of { count, number of rows - 1, row, row, … }, one byte each
//
// about one byte for each row and k block. Where the entries lie and at which column they start follows from walking the
// k blocks in order, with a cursor for each row. The skips before a weight belong to the weight's k block; what exceeds
// 255 entries takes several turns. Sorting keeps the end of the inner loop predicted; the order within a row is kept.
#pragma once

#include <cstdint>

namespace slim::sparse_codebook {

constexpr uint32_t kPlanMagic = 0x31504353;  // "SCP1"
constexpr int64_t kRowBlock = 256;
constexpr int kSkip = 255;

// The stored tensors. Row r belongs to group r / (rows / groups) of a convolution, whose columns start at group * width.
struct Weight {
  const uint8_t* gaps;   // [entries]
  const uint8_t* codes;  // [code_bytes], a bit stream of `bits` for each entry
  int64_t code_bytes;
  const int32_t* row_offsets;  // [rows + 1]
  int64_t rows, width, entries, groups;
  int64_t bits;
  int64_t group_size;  // tables: 0 one for all, -1 one for each row, else one for so many columns of `width`
};

// Blob: header, cells, runs.
struct PlanHeader {
  uint32_t magic;
  uint32_t reserved;
  int64_t rows, width, entries;  // width over all groups
  int64_t k_block, k_blocks, row_blocks;
  int64_t most_entries, most_turns;  // of a cell
  int64_t cells_at, runs_at, bytes;
};

struct Plan {
  const PlanHeader* header;
  const uint32_t* cells;  // [row_blocks * k_blocks + 1], bytes into runs
  const uint8_t* runs;
};

// Columns whose activations stay in the first-level cache; a multiple of `taps`, the taps per channel.
int64_t choose_k_block(const Weight& w, int64_t taps);

// Null if every walk stays inside the weight and no row ends with a skip, or what is wrong.
const char* check(const Weight& w);

// Bytes that build_plan writes at most.
int64_t plan_capacity(const Weight& w, int64_t k_block);

// Returns null if the weight is sound and the plan was written, or what is wrong with it.
const char* build_plan(const Weight& w, int64_t k_block, void* blob, int64_t* bytes);

// Views a blob; false if it is no plan of a matrix of these sizes.
bool view_plan(const void* blob, int64_t bytes, const Weight& w, Plan* plan);

// The rest is for gradients, which go through compressed sparse rows. All of it takes a weight that `check` accepts.

int64_t count_weights(const Weight& w);

// columns [nnz] and offsets [rows + 1] of the weights, without the skips.
void positions(const Weight& w, int32_t* columns, int32_t* offsets);

// values [nnz]: the table entry of each weight; `element` is the size of one.
void decode(const Weight& w, const void* codebook, int64_t element, void* values);

// sums [tables, 2**bits]: the values [nnz] of the weights that share an entry, added up in row order.
void sum_members(const Weight& w, const float* values, double* sums);
void sum_members(const Weight& w, const double* values, double* sums);

}  // namespace slim::sparse_codebook
