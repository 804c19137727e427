// SPDX-License-Identifier: Apache-2.0
// What the CUDA bindings of every family share. Compiled a second time with SLIM_CUDA_HOST for tests/cuda_host: there
// tensors are the CPU's, and kernels run in the emulator, which is told what memory they may touch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#ifdef SLIM_CUDA_HOST
#include "cuda_host.h"
#else
#include <torch/csrc/stable/accelerator.h>
#endif

#include "bindings/common.h"
#include "bindings/families.h"
#include "cuda/common/params.h"

#ifndef SLIM_CUDA_HOST
// Stream::nativeHandle() needs torch 2.13; this symbol is there from 2.11 on, but only in CUDA builds of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace slim::cuda {

inline DType cuda_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
}

// One call of an operator: makes the device of `x` current, knows its stream, checks that all other tensors lie there.
class Call {
 public:
  explicit Call(const Tensor& x)
#ifndef SLIM_CUDA_HOST
      : guard_(checked_device(x))
#endif
  {
    device_ = x.get_device();
#ifdef SLIM_CUDA_HOST
    host::clear_memory();
#else
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this build of torch has no CUDA");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_) == 0, "no current CUDA stream");
#endif
    info_ = device_info(device_);
    STD_TORCH_CHECK(info_, "CUDA: device ", device_, " does not answer");
    STD_TORCH_CHECK(info_->major >= 8, "CUDA: expected a GPU of compute capability 8.0 or later, got ", info_->major,
                    ".", info_->minor);
  }
  ~Call() {
#ifdef SLIM_CUDA_HOST
    host::clear_memory();
#endif
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void* stream() const { return stream_; }
  const DeviceInfo& info() const { return *info_; }

  // Memory that kernels read: of a contiguous tensor on the device of x. The tensor must outlive the launch.
  const void* in(const Tensor& t, const char* name) {
    check(t, name);
#ifdef SLIM_CUDA_HOST
    host::add_memory(t.const_data_ptr(), bytes_of(t), false);
#endif
    return t.const_data_ptr();
  }
  template <class T>
  const T* in(const Tensor& t, const char* name, ScalarType type) {
    STD_TORCH_CHECK(t.scalar_type() == type, name, ": another dtype was expected");
    return static_cast<const T*>(in(t, name));
  }
  const int32_t* in_int32(const Tensor& t, const char* name) { return in<int32_t>(t, name, ScalarType::Int); }
  const uint8_t* in_bytes(const Tensor& t, const char* name) { return in<uint8_t>(t, name, ScalarType::Byte); }

  // Memory that kernels write (and may read): fresh, so that nothing may be expected of what it holds.
  void* out(Tensor& t) {
#ifdef SLIM_CUDA_HOST
    std::memset(t.mutable_data_ptr(), 0xff, size_t(bytes_of(t)));
#endif
    return in_out(t);
  }
  // The same, but filled already.
  void* in_out(Tensor& t) {
#ifdef SLIM_CUDA_HOST
    host::add_memory(t.const_data_ptr(), bytes_of(t), true);
#endif
    return t.mutable_data_ptr();
  }

  // Throws what a launcher returned.
  void check(const char* error) const { STD_TORCH_CHECK(!error, "CUDA: ", error ? error : ""); }

 private:
  static int64_t bytes_of(const Tensor& t) { return t.numel() * t.element_size(); }
#ifndef SLIM_CUDA_HOST
  static int32_t checked_device(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
    return x.get_device_index();
  }
#endif
  void check(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.get_device() == device_, name, ": expected the device of x");
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  }

#ifndef SLIM_CUDA_HOST
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  int32_t device_ = -1;
  void* stream_ = nullptr;
  const DeviceInfo* info_ = nullptr;
};

// Contiguous and aligned to 16 bytes, so that kernels may load whole vectors: copied if it is not. Meant for weights;
// activations are loaded as they lie.
inline Tensor as_aligned(const Tensor& t) {
  Tensor out = as_contiguous(t);
  return reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0 ? out : torch::stable::clone(out);
}

// Scratch memory of a call, from torch's allocator.
inline Tensor workspace(const Tensor& x, int64_t bytes) {
  return torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
}

// Activations of x: [..., k] -> y: [..., n].
inline Activations linear(Call& call, const Tensor& x, Tensor& y, int64_t n, const std::optional<Tensor>& bias,
                          bool relu) {
  Activations a{};
  a.type = cuda_dtype(x, "x");
  a.x = call.in(x, "x");
  a.y = call.out(y);
  a.bias = bias ? call.in(*bias, "bias") : nullptr;
  a.relu = relu;
  a.k = x.size(-1);
  a.n = n;
  a.m = 1;
  a.groups = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) a.m *= x.size(i);
  return a;
}

// Of a convolution with n output channels in all groups.
inline Activations conv2d(Call& call, const Tensor& x, Tensor& y, const ConvGeometry& geometry, int64_t n,
                          int64_t groups, const std::optional<Tensor>& bias, bool relu) {
  STD_TORCH_CHECK(groups > 0 && geometry.channels % groups == 0 && n % groups == 0,
                  "groups: expected a divisor of the channels");
  Activations a{};
  a.type = cuda_dtype(x, "x");
  a.conv = true;
  a.x = call.in(x, "x");
  a.y = call.out(y);
  a.bias = bias ? call.in(*bias, "bias") : nullptr;
  a.relu = relu;
  a.geometry = geometry;
  a.groups = groups;
  a.k = geometry.channels / groups * geometry.kernel_h * geometry.kernel_w;
  a.n = n;
  return a;
}

inline std::optional<Tensor> checked_cuda_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t n) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == n,
                  "bias: expected one entry per output, of x's dtype");
  return as_contiguous(*bias);
}

}  // namespace slim::cuda
