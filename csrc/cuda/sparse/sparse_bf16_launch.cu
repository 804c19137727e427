// SPDX-License-Identifier: Apache-2.0
#include "cuda/sparse/sparse.h"
#include "cuda/sparse/sparse_tiles_launch.cuh"

namespace slim::cuda::sparse {

const char* tiles_bf16(const Activations& a, const Tiles& t, const void* packed, int splits, float* partial,
                       void* stream) {
  return tiles_of<BFloat16, PackedValues>("sparse::tiles_bf16", a, t, {static_cast<const BFloat16*>(packed)}, splits,
                                          partial, stream);
}

}  // namespace slim::cuda::sparse
