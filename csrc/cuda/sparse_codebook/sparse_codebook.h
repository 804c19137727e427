// SPDX-License-Identifier: Apache-2.0
// Sparse shared weights on a GPU: y = W x (+ bias, ReLU), and what gradients need. Raw pointers and a stream: nothing of
// torch, nothing allocated.
#pragma once

#include "cuda/common/params.h"

namespace slim::cuda::sparse_codebook {

// The stored tensors, as python/slimtorch/formats/sparse_codebook.py defines them. Row r belongs to group
// r / (rows / groups) of a convolution. Walks end at `entries` and columns at `width`, so that with a malformed stream
// results are wrong, but nothing is touched that is not the tensors'. Without columns there are no entries.
struct Weight {
  const void* codebook;        // [tables, 2**bits] of the activations' type; 16-byte aligned
  const uint8_t* gaps;         // [entries], 16-byte aligned
  const uint8_t* codes;        // [code_bytes], 16-byte aligned
  const int32_t* row_offsets;  // [rows + 1]
  int64_t code_bytes, entries, rows, width, tables;
  int32_t bits;
  int32_t group_size;  // tables: 0 one for all, -1 one for each row, else one for so many columns of `width`
};

// The parts of a plan (sparse_codebook_plan.h) on the device; all null where there is none.
struct Codes {
  const unsigned char* cells;
  const uint32_t* starts;
  const unsigned char* codes;
  int32_t bits;  // of a code in the plan
};

struct Params {
  Activations a;
  Weight w;
  Codes codes;
  void* scratch;  // of scratch_bytes()
  DeviceInfo device;
};

// Launchers enqueue on `stream` (a cudaStream_t) and return null, or what CUDA found wrong with the launch.

int64_t scratch_bytes(const Params& p);
const char* forward(const Params& p, void* stream);

// The weights as compressed sparse rows.
struct Csr {
  Weight w;
  DType type;        // of the codebook and `values`
  int32_t* offsets;  // [rows + 1]
  int32_t* columns;  // [weights], or null
  void* values;      // [weights], or null
  int64_t weights;   // offsets[rows]
};

// Writes the offsets alone.
const char* offsets(const Csr& p, void* stream);
// Writes columns and values, where they are wanted; the offsets are there.
const char* positions(const Csr& p, void* stream);

struct Sums {
  Weight w;
  DType type;              // of the result
  const int32_t* offsets;  // [rows + 1], of the compressed sparse rows
  const float* values;     // [weights]
  float* partial;          // scratch of partial_bytes()
  void* sums;              // [tables, 2**bits] of `type`
  int64_t weights;
  int multiprocessors;
};

// sums[entry] = values of the weights that share the entry, always added in the same order.
int64_t partial_bytes(const Sums& p);
const char* sum_members(const Sums& p, void* stream);

// What forward() is put together from: CUDA cores and the stored stream; tensor cores and a plan.
int64_t stream_scratch_bytes(const Activations& a);
const char* forward_stream(const Params& p, void* stream);
int64_t tiles_scratch_bytes(const Params& p);
const char* forward_tiles(const Params& p, void* stream);

}  // namespace slim::cuda::sparse_codebook
