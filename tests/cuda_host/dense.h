// SPDX-License-Identifier: Apache-2.0
// The main loop over a plain dense weight, to test it by itself: not a kernel that anybody should use.
#pragma once

#include "cuda/common/params.h"

namespace slim::cuda::dense {

struct Params {
  Activations a;
  const void* weight;  // [n, stride] of a.type, zeros beyond k
  int64_t stride;      // a multiple of 16
  int tile;            // see dense_launch.cu
  int kind;            // 0 as it lies, 1 through expand(), 2 in slabs of 16 from the last to the first
  int splits;
  float* partial;
};

const char* matmul(const Params& p, void* stream);

// The gradient of the weight, all of it.
struct OuterParams {
  Activations a;  // y: the gradient of the output
  void* values;   // [n, k] of a.type
  int tile;
  int kind;  // 0 in tiles, 1 in slabs of 16 from the last to the first
  int splits;
  float* partial;  // [splits, n, k] if splits > 1
};

const char* outer(const OuterParams& p, void* stream);

}  // namespace slim::cuda::dense
