// SPDX-License-Identifier: Apache-2.0
// Weights that are indices into small tables, times activations, on a GPU: y = W x (+ bias, ReLU),
// W[r][c] = table(r, c)[code].
//
// The canonical codes are a stream of bits, row after row. Kernels prefer the plan: the same codes in the order in
// which the lanes of a warp need them as A fragments, so that nothing is moved between lanes. For every group of a
// convolution
//
//   row tile 0 (16 rows)   | slab 0 (64 k) | slab 1 | …        slab: bits x 32 words, [word][lane], 128 * bits bytes
//   row tile 1             | slab 0        | slab 1 | …
//
// The words of lane 4 g + t are 32 codes without gaps, lowest bit first; code 8 f + 2 r + e is that of
//
//   row g + 8 (r & 1), column 16 f + 8 (r >> 1) + 2 t + e     of the slab; f: which m16n8k16 product, r: which register
//
// Rows and columns beyond the weight's have code 0.
#pragma once

#include "cuda/common/params.h"

namespace slim::cuda::codebook {

// Which table an entry looks into: the only one, that of its group of `group_size` columns, or that of its row.
constexpr int64_t kOneTable = 0, kTablePerRow = -1;

constexpr int kSlab = 64;  // columns of a slab of the plan

struct Weight {
  const unsigned char* plan;  // or null: then the kernels bring the codes into order themselves
  const uint8_t* codes;       // [bytes] entry r * width + c occupies bits [entry * bits, (entry + 1) * bits)
  int64_t bytes;
  const void* tables;   // [tables, 2**bits] of the dtype of x; null in sum_members
  int64_t rows, width;  // of all groups together; of one row
  int64_t group_size;
  int64_t table_count;
  int32_t bits;
  int32_t groups;  // of a convolution
};

constexpr int64_t slabs_of(int64_t width) { return (width + kSlab - 1) / kSlab; }
constexpr int64_t row_tiles_of(int64_t rows) { return (rows + 15) / 16; }

constexpr int64_t plan_bytes(int64_t rows, int64_t width, int64_t bits, int64_t groups) {
  return groups * row_tiles_of(rows / groups) * slabs_of(width) * bits * 128;
}

// The launchers return null, or what is wrong; `stream` is a cudaStream_t.

// Shared memory of the kernel for few columns (codebook_few.cuh): pair table, and four slabs of x for each of 16 warps.
constexpr int64_t few_columns_shared(int bits, int64_t columns) {
  return (int64_t(128) << 2 * bits) + 16 * 4 * (columns <= 8 ? 8 : 16) * kSlab * 2;
}

// How a product is computed (codebook_heuristics.h); into how many shares its sums are cut.
struct Choice;
// partial: splits * n * columns floats, or null for one share.
const char* forward(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream);

// The dense matrix [rows, width] of the dtype of the tables, to `out` (aligned to 16 bytes).
const char* decode(const Weight& w, DType type, void* out, void* stream);

// The sum of grad [rows, width] over the members of every entry, to sums [tables, 2**bits] of grad's dtype; entry 0 is
// set to 0 if `zero`. partial: sum_chunks(w) * tables * 2**bits floats.
int64_t sum_chunks(const Weight& w);
const char* sum_members(const Weight& w, DType type, const void* grad, bool zero, float* partial, void* sums,
                        void* stream);

}  // namespace slim::cuda::codebook
