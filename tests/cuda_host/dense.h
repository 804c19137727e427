// SPDX-License-Identifier: Apache-2.0
// The main loop over a plain dense weight, to test it by itself: not a kernel that anybody should use.
#pragma once

#include "cuda/common/params.h"

namespace slim::cuda::dense {

struct Params {
  Activations a;
  const void* weight;  // [n, stride] of a.type, zeros beyond k
  int64_t stride;      // a multiple of 16
  int tile;            // which of kTiles
  int kind;            // 0 as it lies, 1 through expand(), 2 in slabs of 16 from the last to the first
  int splits;
  float* partial;
};
constexpr int kTiles = 5, kKinds = 3;

const char* matmul(const Params& p, void* stream);

}  // namespace slim::cuda::dense
