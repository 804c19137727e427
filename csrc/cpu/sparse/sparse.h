// SPDX-License-Identifier: Apache-2.0
// Unstructured sparse weight times activations: y = W x (+ bias, ReLU), and the gradient of W's stored values.
#pragma once

#include "core/params.h"
#include "cpu/sparse/sparse_plan.h"

namespace slim::sparse {

struct Params {
  Activations a;
  Plan plan;
  const void* values;  // [nnz], in row order if `by_row`, else packed; of a.dtype if `dot`, else of the type of sums
  void* grad_values;   // [nnz] of the type sums are kept in, in row order, zeroed (grad_values only)
  bool dot;            // one column: read the activations where they are
  int64_t ranges;      // the rows are cut into this many ranges of about equal work; tasks = ranges * groups
};

// One entry per instruction set. Tasks are independent and may run on any thread, each with a workspace of its own.
struct Kernels {
  bool (*by_row)(const Params&);  // whether forward reads values in row order
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

}  // namespace slim::sparse
