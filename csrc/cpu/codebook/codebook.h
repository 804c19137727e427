// SPDX-License-Identifier: Apache-2.0
// Weights that are indices into small tables, times activations: y = W x (+ bias, ReLU), W[r][c] = table(r, c)[code].
#pragma once

#include "core/params.h"

namespace slim::codebook {

// Which table an entry looks into: the only one, that of its group of `group_size` columns, or that of its row.
constexpr int64_t kOneTable = 0, kTablePerRow = -1;

struct Weight {
  DType dtype;           // of the codebook
  const uint8_t* codes;  // [bytes] bit stream: entry r * width + c occupies bits [entry * bits, (entry + 1) * bits)
  int64_t bytes;
  const void* codebook;  // [tables, 2**bits]
  int64_t rows, width;
  int bits;
  int64_t group_size, tables;
};

struct Params {
  Activations a;
  Weight w;
  int64_t groups;  // of a convolution
  int64_t ranges;  // the rows are cut into this many ranges; tasks = ranges * group_count
};

// One entry per instruction set. Tasks are independent and may run on any thread, each with a workspace of its own.
struct Kernels {
  int64_t (*group_count)(const Params&);
  int64_t (*workspace_bytes)(const Params&);
  void (*forward)(const Params&, int64_t task, void* workspace);
  int64_t (*decode_bytes)(const Weight&);  // workspace of the two below
  // Rows row0 … row1 of the dense matrix, to out [rows, width] of the weight's dtype.
  void (*decode)(const Weight&, int64_t row0, int64_t row1, void* out, void* workspace);
  // Adds every element of rows row0 … row1 of grad [rows, width] to the sum of its table entry, sums [tables, 2**bits].
  void (*sum_members)(const Weight&, const void* grad, int64_t row0, int64_t row1, double* sums, void* workspace);
};

const Kernels& scalar_kernels();
#ifdef SLIM_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif
#ifdef SLIM_EMULATED_AVX512
const Kernels& avx512_emulated_kernels();
#endif

}  // namespace slim::codebook
