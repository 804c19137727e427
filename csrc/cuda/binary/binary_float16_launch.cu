// SPDX-License-Identifier: Apache-2.0
#include "cuda/binary/binary_float_launch.cuh"

namespace slim::cuda::binary {

const char* floats_f16(const FloatParams& p, int splits, float* partial, void* stream) {
  return start_floats<Half>(p, splits, partial, stream);
}

const char* floats_bf16(const FloatParams& p, int splits, float* partial, void* stream) {
  return start_floats<BFloat16>(p, splits, partial, stream);
}

}  // namespace slim::cuda::binary
