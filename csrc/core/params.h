// SPDX-License-Identifier: Apache-2.0
// Plain structs that travel from the bindings to the kernels: raw pointers, sizes, nothing of a framework.
#pragma once

#include <cstdint>

namespace slim {

enum class DType : int32_t { f32, bf16, f64 };

// What a convolution does to its input. Sizes in elements, NCHW, contiguous.
struct ConvGeometry {
  int64_t batch, channels, height, width;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  int64_t out_h, out_w;
};

// Activations of a linear layer (conv == false): x [m, k] -> y [m, n], or of a convolution: x [batch, channels, height,
// width] -> y [batch, n, out_h, out_w] with k = channels * kernel_h * kernel_w taps over all groups.
struct Activations {
  DType dtype;
  bool conv;
  const void* x;
  void* y;           // output; in grad_values the gradient of the output, only read
  const void* bias;  // [n] of dtype, or null
  bool relu;
  int64_t m, k, n;
  ConvGeometry geometry;
};

}  // namespace slim
