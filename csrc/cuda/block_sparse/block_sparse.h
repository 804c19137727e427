// SPDX-License-Identifier: Apache-2.0
// Block-sparse weight times activations on a GPU. Raw pointers and a stream: nothing of torch, nothing allocated.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace slim::cuda::block_sparse {

enum class Type : int32_t { f32, f16, bf16 };

struct Params {
  Type type;
  const void* x;                 // [m, k]
  const void* values;            // [blocks, r, c]
  const int32_t* block_columns;  // [blocks]
  const int32_t* row_offsets;    // [ceil(n / r) + 1]
  const void* bias;              // [n] or null
  void* y;                       // [m, n]
  int64_t m, n, k;
  int32_t r, c;
  bool relu;
};

// Launches on `stream` (a cudaStream_t); returns null, or what CUDA found wrong with the launch.
const char* linear(const Params& p, void* stream);

}  // namespace slim::cuda::block_sparse
