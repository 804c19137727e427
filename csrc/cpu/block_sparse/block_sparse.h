// SPDX-License-Identifier: Apache-2.0
// Block-sparse weight times activations: y = W x (+ bias, ReLU), and the gradient of W's stored blocks.
#pragma once

#include "core/params.h"
#include "cpu/block_sparse/block_sparse_plan.h"

namespace slim::block_sparse {

struct Params {
  Activations a;
  Plan plan;
  const void* values;  // [blocks, r, c] of the type sums are kept in
  void* grad_values;   // the same, zeroed (grad_values only)
  int64_t ranges;      // the rows are cut into this many ranges of about equal work; tasks = ranges * groups
};

// One entry per instruction set. Tasks are independent and may run on any thread, each with a workspace of its own.
struct Kernels {
  int64_t (*group_count)(const Params&);
  int64_t (*workspace_bytes)(const Params&);
  void (*forward)(const Params&, int64_t task, void* workspace);
  void (*grad_values)(const Params&, int64_t range, void* workspace);  // tasks = ranges
};

const Kernels& scalar_kernels();
#ifdef SLIM_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif
#ifdef SLIM_EMULATED_AVX512
const Kernels& avx512_emulated_kernels();
#endif

}  // namespace slim::block_sparse
