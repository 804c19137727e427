// SPDX-License-Identifier: Apache-2.0
#include "cuda/block_sparse/block_sparse_kernel.cuh"
#include "cuda/common/launch.cuh"

namespace slim::cuda::block_sparse {

namespace {

template <class T>
const char* start(const Params& p, void* stream) {
  const int64_t rows = (p.a.m + kRows - 1) / kRows;
  const dim3 grid(unsigned((p.a.n + kColumns - 1) / kColumns), unsigned(rows < 65535 ? rows : 65535));
  return launch(linear_kernel<T>, {"block_sparse::linear", grid, dim3(kColumns, kRows), 0, stream}, p);
}

}  // namespace

const char* linear(const Params& p, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return start<float>(p, stream);
    case DType::f16:
      return start<Half>(p, stream);
    default:
      return start<BFloat16>(p, stream);
  }
}

}  // namespace slim::cuda::block_sparse
