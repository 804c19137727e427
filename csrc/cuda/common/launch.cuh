// SPDX-License-Identifier: Apache-2.0
// Starting a kernel, on a GPU or in the emulator. Only *_launch.cu files include this.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#include "cuda/common/device.cuh"

namespace slim::cuda {

struct Launch {
  const char* name;  // of the kernel, for messages
  dim3 grid, block;  // whole warps
  int shared_bytes;
  void* stream;  // a cudaStream_t
};

// Null, or what is wrong with the launch; CUDA's "last error" is left as it was found. A grid without blocks is no error.
template <class Params>
const char* launch(void (*kernel)(Params), const Launch& l, const Params& p) {
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return nullptr;
#ifdef __CUDACC__
  static_assert(sizeof(Params) <= 4096, "what a kernel's arguments may take");
  const auto function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (l.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes);
  void* arguments[] = {const_cast<Params*>(&p)};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(function, l.grid, l.block, arguments, size_t(l.shared_bytes),
                             static_cast<cudaStream_t>(l.stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // said here; nobody else is to find it
  return cudaGetErrorString(error);
#else
  return host::launch(l.name, reinterpret_cast<const void*>(kernel), l.grid, l.block, l.shared_bytes,
                      [&] { kernel(p); });
#endif
}

}  // namespace slim::cuda
