// SPDX-License-Identifier: Apache-2.0
#include "cuda/block_sparse/block_sparse_launch.cuh"

namespace slim::cuda::block_sparse {

const char* product_f16(const Product& p, const Shape& s, const Tiling& tiling, float* partial, void* stream) {
  return product<Half>(p, s, tiling, partial, stream);
}

}  // namespace slim::cuda::block_sparse
