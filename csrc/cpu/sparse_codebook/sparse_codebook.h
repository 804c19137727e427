// SPDX-License-Identifier: Apache-2.0
// Sparse shared weights times activations: y = W x (+ bias, ReLU), W walked as it is stored.
#pragma once

#include "core/params.h"
#include "cpu/sparse_codebook/sparse_codebook_plan.h"

namespace slim::sparse_codebook {

struct Params {
  Activations a;
  Weight w;
  Plan plan;
  const void* codebook;  // [tables, 2**bits] of the type sums are kept in
  int64_t ranges;        // the rows are cut into this many ranges of about equal work; tasks = ranges * groups
};

// One entry per instruction set. Tasks are independent and may run on any thread, each with a workspace of its own.
struct Kernels {
  int64_t (*group_count)(const Params&);
  int64_t (*workspace_bytes)(const Params&);
  void (*forward)(const Params&, int64_t task, void* workspace);
};

const Kernels& scalar_kernels();
#ifdef SLIM_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif
#ifdef SLIM_EMULATED_AVX512
const Kernels& avx512_emulated_kernels();
#endif

}  // namespace slim::sparse_codebook
