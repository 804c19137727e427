// SPDX-License-Identifier: Apache-2.0
// From dot products to outputs: one arithmetic for all kernels, so that thresholds searched for with it hold to the bit.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/params.h"

namespace slim::cuda::binary {

__device__ __forceinline__ float scaled(int32_t dot, float scale, float bias, bool relu) {
  const float v = float(dot) * scale + bias;
  return relu && v < 0.0f ? 0.0f : v;  // NaN stays
}

__device__ __forceinline__ float value_at(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return load_constant(static_cast<const float*>(p) + i);
  if (type == DType::f16) return to_float(load_constant(static_cast<const Half*>(p) + i));
  return to_float(load_constant(static_cast<const BFloat16*>(p) + i));
}

__device__ __forceinline__ void write(void* y, DType type, int64_t i, float v) {
  if (type == DType::f32)
    static_cast<float*>(y)[i] = v;
  else if (type == DType::f16)
    static_cast<Half*>(y)[i] = from_float<Half>(v);
  else
    static_cast<BFloat16*>(y)[i] = from_float<BFloat16>(v);
}

// Four neighbours, at an address that is aligned to all four.
__device__ __forceinline__ void write4(void* y, DType type, int64_t i, const float (&v)[4]) {
  if (type == DType::f32)
    *reinterpret_cast<float4*>(static_cast<float*>(y) + i) = make_float4(v[0], v[1], v[2], v[3]);
  else if (type == DType::f16)
    *reinterpret_cast<uint2*>(static_cast<Half*>(y) + i) = make_uint2(pack2<Half>(v[0], v[1]), pack2<Half>(v[2], v[3]));
  else
    *reinterpret_cast<uint2*>(static_cast<BFloat16*>(y) + i) =
        make_uint2(pack2<BFloat16>(v[0], v[1]), pack2<BFloat16>(v[2], v[3]));
}

}  // namespace slim::cuda::binary
