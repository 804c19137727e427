// SPDX-License-Identifier: Apache-2.0
#include "cuda/binary/binary_float_launch.cuh"

namespace slim::cuda::binary {

const char* floats_f32(const FloatParams& p, int splits, float* partial, void* stream) {
  return start_floats<float>(p, splits, partial, stream);
}

// Two blocks for each multiprocessor, as far as parts keep four steps; a part costs a workspace written and read.
int float_splits(const Activations& a, const DeviceInfo& device) {
  const bool few = columns_of(a) <= kFewColumns;
  const int64_t blocks = few ? matmul_blocks<FewColumns<float>>(a) : matmul_blocks<ManyColumns<float>>(a);
  const int64_t steps = (a.k + 127) / (few ? FewColumns<float>::kDepth : ManyColumns<float>::kDepth);
  const int64_t wanted = 2 * int64_t(device.multiprocessors) / (blocks > 0 ? blocks : 1), most = steps / 4;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits > 16 ? 16 : int(splits);
}

const char* floats(const FloatParams& p, int splits, float* partial, void* stream) {
  switch (p.a.type) {
    case DType::f32:
      return floats_f32(p, splits, partial, stream);
    case DType::f16:
      return floats_f16(p, splits, partial, stream);
    default:
      return floats_bf16(p, splits, partial, stream);
  }
}

}  // namespace slim::cuda::binary
