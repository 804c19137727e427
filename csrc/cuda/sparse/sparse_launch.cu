// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/sparse/sparse_grad.cuh"

namespace slim::cuda::sparse {

namespace {

dim3 grid_for(int64_t entries) {
  return dim3(unsigned(std::min<int64_t>((entries + kThreads - 1) / kThreads, 1 << 20)));
}

template <class T>
const char* grad_of(const GradParams& p, void* stream) {
  return launch(p.a.conv ? grad_kernel<T, true> : grad_kernel<T, false>,
                {"sparse::grad_values", grid_for(p.nnz), dim3(kThreads), 0, stream}, p);
}

}  // namespace

const char* tiles(const Activations& a, const Tiles& t, const void* packed, int splits, float* partial, void* stream) {
  return (a.type == DType::f16 ? tiles_f16 : tiles_bf16)(a, t, packed, splits, partial, stream);
}

const char* pack(const void* values, const uint32_t* order, int64_t nnz, int element, void* out, void* stream) {
  const PackParams p{values, order, out, nnz};
  return launch(element == 2 ? pack_kernel<uint16_t> : pack_kernel<uint32_t>,
                {"sparse::pack", grid_for(nnz), dim3(kThreads), 0, stream}, p);
}

const char* grad_values(const GradParams& p, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return grad_of<float>(p, stream);
    case DType::f16:
      return grad_of<Half>(p, stream);
    default:
      return grad_of<BFloat16>(p, stream);
  }
}

}  // namespace slim::cuda::sparse
