// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "cuda/block_sparse/block_sparse_kernel.cuh"

namespace slim::cuda::block_sparse {

namespace {

template <class T>
void launch(const Params& p, cudaStream_t stream) {
  const int64_t rows = (p.m + kRows - 1) / kRows;
  const dim3 grid(unsigned((p.n + kColumns - 1) / kColumns), unsigned(rows < 65535 ? rows : 65535));
  linear_kernel<T><<<grid, dim3(kColumns, kRows), 0, stream>>>(p);
}

}  // namespace

const char* linear(const Params& p, void* stream) {
  if (p.m == 0 || p.n == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case Type::f32:
      launch<float>(p, s);
      break;
    case Type::f16:
      launch<__half>(p, s);
      break;
    case Type::bf16:
      launch<__nv_bfloat16>(p, s);
      break;
  }
  // Peek first: an error that was there before this launch is somebody else's to report.
  const cudaError_t error = cudaPeekAtLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace slim::cuda::block_sparse
