// SPDX-License-Identifier: Apache-2.0
// What the bindings of every family share: the only headers of torch are those of its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <vector>

#include "core/cpu_features.h"
#include "core/params.h"

namespace slim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float64");
  }
}

inline void check_same(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == like.scalar_type(), name, ": expected a CPU tensor of x's dtype");
}

// Contiguous int32 on the CPU; what else it must satisfy is checked when a plan is built from it.
inline const int32_t* int32_data(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.is_contiguous(), name,
                  ": expected a contiguous 1-D int32 CPU tensor");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Of a plan that a caller gives: bytes on the CPU, as the operator `maker` makes them.
inline void check_plan(const Tensor& plan, const char* maker) {
  STD_TORCH_CHECK(plan.is_cpu() && plan.is_contiguous() && plan.scalar_type() == ScalarType::Byte,
                  "plan: expected contiguous bytes made by ", maker);
}

// The operator of this name dispatches even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor like(const Tensor& t, const std::vector<int64_t>& sizes) { return torch::stable::new_empty(t, sizes); }

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  return sizes;
}

// Scratch memory of a thread, kept between calls: fresh pages for every call would cost more than small kernels do.
// Above a limit it is given back, so that one huge call does not hold on to memory.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const int64_t rounded = (bytes + 4095) & ~int64_t(4095);
      data_ = std::aligned_alloc(64, rounded);
      if (!data_) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }
  void trim() {
    if (size_ <= kKeep) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr int64_t kKeep = 64 << 20;
  void* data_ = nullptr;
  int64_t size_ = 0;
};

inline Scratch& kernel_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}
inline Scratch& value_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Run f(task) for all tasks on torch's threads, each with a workspace of its own. Too little work stays on this one.
template <class F>
void run_tasks(int64_t tasks, int64_t workspace_bytes, double flops, const F& f) {
  const auto body = [&](int64_t begin, int64_t end) {
    void* workspace = kernel_scratch().get(workspace_bytes);
    for (int64_t t = begin; t < end; ++t) f(t, workspace);
    kernel_scratch().trim();
  };
  if (tasks == 1 || flops < 5e5)
    body(0, tasks);
  else
    torch::stable::parallel_for(0, tasks, 1, body);
}

// Into how many ranges the rows should be cut so that groups * ranges tasks keep the threads equally busy.
inline int64_t row_ranges(int64_t groups, int64_t limit, double flops) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads <= 1 || groups == 0 || flops < 5e5) return 1;
  for (int64_t ranges = 1; ranges < limit; ++ranges) {
    const int64_t tasks = groups * ranges, rounds = (tasks + threads - 1) / threads;
    if (double(rounds * threads) <= 1.15 * double(tasks)) return ranges;
  }
  return std::max<int64_t>(1, limit);
}

inline Scratch& packed_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline int64_t compute_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// Values in the type that kernels sum in, in plan order: as they are where that is already so.
inline const void* compute_values(const Tensor& values, DType dtype, const uint32_t* order) {
  const int64_t n = values.numel();
  const void* data = values.const_data_ptr();
  if (!order && dtype != DType::bf16) return data;
  void* out = value_scratch().get(std::max<int64_t>(1, n * compute_size(dtype)));
  const auto at = [order](int64_t i) { return order ? int64_t(order[i]) : i; };
  if (dtype == DType::bf16)
    for (int64_t i = 0; i < n; ++i)
      static_cast<float*>(out)[i] = bf16_to_float(static_cast<const uint16_t*>(data)[at(i)]);
  else if (dtype == DType::f32)
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(out)[i] = static_cast<const float*>(data)[at(i)];
  else
    for (int64_t i = 0; i < n; ++i) static_cast<double*>(out)[i] = static_cast<const double*>(data)[at(i)];
  return out;
}

// Sums of `n` gradients, zeroed, where they can be added up; `finish` writes them to the tensor.
inline void* gradient_sums(Tensor& grad, DType dtype) {
  const int64_t n = grad.numel();
  void* sums = dtype == DType::bf16 ? value_scratch().get(std::max<int64_t>(1, n * 4)) : grad.mutable_data_ptr();
  if (n) std::memset(sums, 0, size_t(n * compute_size(dtype)));
  return sums;
}
inline void finish_gradient(const void* sums, Tensor& grad, DType dtype) {
  if (dtype != DType::bf16) return;
  uint16_t* out = static_cast<uint16_t*>(grad.mutable_data_ptr());
  for (int64_t i = 0, n = grad.numel(); i < n; ++i) out[i] = float_to_bf16(static_cast<const float*>(sums)[i]);
}

inline ConvGeometry conv_geometry(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                  const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "kernel, stride, padding, dilation: expected two ints each");
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0,
                    "kernel, stride and dilation: expected positive ints, padding: none below 0");
  // Far beyond any layer, so that no product of them below overflows.
  constexpr int64_t kLimit = 1 << 20;
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(kernel[i] <= kLimit && stride[i] <= kLimit && padding[i] <= kLimit && dilation[i] <= kLimit,
                    "kernel, stride, padding, dilation: expected at most 2**20");
  STD_TORCH_CHECK(kernel[0] * kernel[1] <= INT32_MAX / std::max<int64_t>(1, channels),
                  "kernel: expected fewer than 2**31 taps over all channels");
  ConvGeometry g{batch,     channels,   height,     width,       kernel[0],   kernel[1], stride[0],
                 stride[1], padding[0], padding[1], dilation[0], dilation[1], 0,         0};
  const int64_t span_h = g.height + 2 * g.pad_h - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t span_w = g.width + 2 * g.pad_w - g.dilation_w * (g.kernel_w - 1) - 1;
  STD_TORCH_CHECK(span_h >= 0 && span_w >= 0, "x: the kernel is larger than the padded input");
  g.out_h = span_h / g.stride_h + 1;
  g.out_w = span_w / g.stride_w + 1;
  return g;
}

inline ConvGeometry conv_geometry(const Tensor& x, const std::vector<int64_t>& kernel,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions [N, C, H, W]");
  return conv_geometry(x.size(0), x.size(1), x.size(2), x.size(3), kernel, stride, padding, dilation);
}

// A 1x1 convolution over `x` with as many output pixels as it has itself.
inline ConvGeometry pointwise_geometry(const Tensor& x) { return conv_geometry(x, {1, 1}, {1, 1}, {0, 0}, {1, 1}); }

// Kernels address the lowered input of a convolution with 32 bits; only absurd dilations ask for more.
inline int64_t checked_workspace(const Activations& a, int64_t bytes) {
  STD_TORCH_CHECK(!a.conv || bytes <= INT32_MAX, "dilation: a tile of the input would take more than 2 GiB");
  return bytes;
}

inline int64_t columns_of(const Activations& a) {
  return a.conv ? a.geometry.batch * a.geometry.out_h * a.geometry.out_w : a.m;
}

inline Activations linear_activations(const Tensor& x, const void* x_data, void* y, int64_t k, int64_t n,
                                      const std::optional<Tensor>& bias, bool relu) {
  Activations a{};
  a.dtype = dtype_of(x, "x");
  a.x = x_data;
  a.y = y;
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  a.relu = relu;
  a.k = k;
  a.n = n;
  a.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) a.m *= x.size(i);
  return a;
}

// Of a convolution with `n` output channels; pointers are left to the caller.
inline Activations conv_activations(const Tensor& x, const ConvGeometry& geometry, int64_t n) {
  Activations a{};
  a.dtype = dtype_of(x, "x");
  a.conv = true;
  a.geometry = geometry;
  a.k = geometry.channels * geometry.kernel_h * geometry.kernel_w;
  a.n = n;
  return a;
}

inline std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t n) {
  if (!bias) return std::nullopt;
  check_same(*bias, x, "bias");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias: expected one entry per output");
  return as_contiguous(*bias);
}

}  // namespace slim
