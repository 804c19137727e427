// SPDX-License-Identifier: Apache-2.0
// Unstructured sparse weight times activations on a GPU. Raw pointers and a stream: nothing of torch, nothing allocated.
// Launchers return null, or what CUDA found wrong; `stream` is a cudaStream_t.
#pragma once

#include "cuda/common/params.h"
#include "cuda/sparse/sparse_plan.h"

namespace slim::cuda::sparse {

// ---- tensor cores: float16, bfloat16; needs a plan -------------------------------------------------------------------

// `packed`: values in packed order, aligned to 16 bytes. `partial`: null for one split, else [splits][as y].
const char* tiles(const Activations& a, const Tiles& tiles, const void* packed, int splits, float* partial,
                  void* stream);
const char* tiles_f16(const Activations& a, const Tiles& tiles, const void* packed, int splits, float* partial,
                      void* stream);
const char* tiles_bf16(const Activations& a, const Tiles& tiles, const void* packed, int splits, float* partial,
                       void* stream);

// out[i] = values[order[i]]; `element` bytes each, 2 or 4.
const char* pack(const void* values, const uint32_t* order, int64_t nnz, int element, void* out, void* stream);

// ---- plain cores: all dtypes, no plan --------------------------------------------------------------------------------

struct RowParams {
  Activations a;
  const void* values;      // of a.type
  Csr csr;                 // of the matrix that is walked
  const int32_t* sources;  // its entry i has the value values[sources[i]]; null: values[i]
  int32_t row_tiles;       // set by the launcher
};
const char* rows(const RowParams& p, const DeviceInfo& device, void* stream);

// y of the transposed matrix, whose rows nobody has written down: slow. p.csr is that of the other: a.k rows
// in each group, a.n / a.groups columns.
const char* scatter(const RowParams& p, void* stream);

// Gradient of each stored value: the product of a row of the output's gradient (a.y) and a row of x, as columns.
struct GradParams {
  Activations a;
  Csr csr;
  void* out;  // [nnz] of a.type
  int64_t nnz;
};
const char* grad_values(const GradParams& p, void* stream);

}  // namespace slim::cuda::sparse
