// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <mutex>

#include "cuda/common/params.h"

namespace slim::cuda {

const DeviceInfo* device_info(int index) {
  constexpr int kDevices = 64;
  static std::once_flag asked[kDevices];
  static DeviceInfo infos[kDevices];
  static bool known[kDevices];
  if (index < 0 || index >= kDevices) return nullptr;
  std::call_once(asked[index], [index] {
    DeviceInfo& info = infos[index];
    const auto ask = [index](int* value, cudaDeviceAttr what) {
      return cudaDeviceGetAttribute(value, what, index) == cudaSuccess;
    };
    known[index] = ask(&info.major, cudaDevAttrComputeCapabilityMajor) &&
                   ask(&info.minor, cudaDevAttrComputeCapabilityMinor) &&
                   ask(&info.multiprocessors, cudaDevAttrMultiProcessorCount) &&
                   ask(&info.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    cudaGetLastError();
  });
  return known[index] ? &infos[index] : nullptr;
}

}  // namespace slim::cuda
