// SPDX-License-Identifier: Apache-2.0
// Block-sparse weight times activations on a GPU. Raw pointers and a stream: nothing of torch, nothing allocated.
#pragma once

#include "cuda/common/params.h"

namespace slim::cuda::block_sparse {

struct Params {
  Activations a;
  const void* values;            // [blocks, r, c] of a.type
  const int32_t* block_columns;  // [blocks]
  const int32_t* row_offsets;    // [ceil(n / r) + 1]
  int32_t r, c;
};

// Launches on `stream` (a cudaStream_t); returns null, or what CUDA found wrong with the launch.
const char* linear(const Params& p, void* stream);

}  // namespace slim::cuda::block_sparse
