// SPDX-License-Identifier: Apache-2.0
#include "cuda/sparse/sparse.h"
#include "cuda/sparse/sparse_tiles_launch.cuh"

namespace slim::cuda::sparse {

const char* tiles_f16(const Activations& a, const Tiles& t, const void* packed, int splits, float* partial,
                      void* stream) {
  return tiles_of<Half, PackedValues>("sparse::tiles_f16", a, t, {static_cast<const Half*>(packed)}, splits, partial,
                                      stream);
}

}  // namespace slim::cuda::sparse
