// SPDX-License-Identifier: Apache-2.0
// What travels from the bindings to the kernels of every family: raw pointers, sizes, nothing of a framework.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace slim::cuda {

enum class DType : int32_t { f32, f16, bf16 };

constexpr int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// Activations of a linear layer (conv == false): x [m, k] -> y [m, n], or of a convolution: x [batch, channels, height,
// width] -> y [batch, n, out_h, out_w]. "Columns" are the rows of x, or the output pixels: m or batch * out_h * out_w.
// `k` is the depth of one group's sum: in_features, or channels / groups * kernel_h * kernel_w.
struct Activations {
  DType type;
  bool conv;
  const void* x;     // contiguous
  void* y;           // contiguous; in gradients of weights the gradient of the output, only read
  const void* bias;  // [n] of `type`, or null
  bool relu;
  int64_t m, k, n;
  int64_t groups;  // 1 for a linear layer; n and geometry.channels are those of all groups together
  ConvGeometry geometry;
};

inline int64_t columns_of(const Activations& a) {
  return a.conv ? a.geometry.batch * a.geometry.out_h * a.geometry.out_w : a.m;
}

// What heuristics need to know of a device.
struct DeviceInfo {
  int major, minor;      // compute capability
  int multiprocessors;   // SMs
  int shared_per_block;  // bytes a block may ask for
};

// Of device `index`, asked for once. Null if CUDA does not answer.
const DeviceInfo* device_info(int index);

}  // namespace slim::cuda
